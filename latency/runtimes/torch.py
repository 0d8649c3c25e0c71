"""torch as a runtime: eager or compiled, on the CPU or on a GPU.

On a GPU a timed block ends when the device has finished all of its loops. Waiting costs about ten
microseconds, so a block should be much longer than that.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from latency.device_runner.fingerprint import Fingerprint
from latency.device_runner.timer import Run
from latency.runtimes.protocol import ANCHOR_SIDE, ExportedModel, Runtime, Weights, random_weights
from latency.runtimes.registry import register_runtime
from space import Architecture, InputError, Layer, ModelConfig, Workload
from space.attention.projection import project, rms_norm
from space.blocks import State, ffn, forward, mixer_block
from space.ops import Op
from space.shapes import Shapes, end_shapes, ffn_shapes, mixer_shapes, model_shapes, state_shapes

Step = Callable[[], object]


class TorchRuntime(Runtime):
    """torch on one device.

    Args:
        threads: number of threads of the whole process.
        device: ``cpu`` or ``cuda``.
        compiled: True for ``torch.compile``, False for eager execution.

    Raises:
        InputError: ``device`` is ``cuda`` and torch finds no CUDA device.
    """

    def __init__(self, threads: int = 1, device: str = "cpu", *, compiled: bool = False) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("runtime torch-cuda: torch sees no CUDA device here")
        self.threads, self.device, self.compiled = threads, torch.device(device), compiled
        self.torch_device = device
        self.name = "-".join(
            ["torch", *(["cuda"] if device == "cuda" else []), *(["compiled"] if compiled else [])]
        )
        torch.set_num_threads(threads)

    def stack(
        self, op: Op, height: int, workloads: Sequence[Workload], model_config: ModelConfig
    ) -> dict[Workload, Run]:
        """Build copies of an op; see :meth:`Runtime.stack`."""
        copies = [self._random(_shapes(op, model_config), seed) for seed in range(height)]
        return {w: self._runner(self._stacked(op, copies, w, model_config)) for w in workloads}

    def model(
        self, architecture: Architecture, workloads: Sequence[Workload], model_config: ModelConfig, seed: int
    ) -> dict[Workload, Run]:
        """Build a whole model with random weights; see :meth:`Runtime.model`."""
        weights = self._random(model_shapes(architecture, model_config), seed)
        return self._runners(weights, architecture, workloads, model_config)

    def deploy(self, exported: ExportedModel, workloads: Sequence[Workload]) -> dict[Workload, Run]:
        """Copy the weights to the device and run the plain model; see :meth:`Runtime.deploy`."""
        weights = self._copied(exported.load_weights())
        return self._runners(weights, exported.architecture, workloads, exported.model_config)

    def logits(self, exported: ExportedModel, tokens_BT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of the plain model on the device; see :meth:`Runtime.logits`."""
        weights = self._copied(exported.load_weights())
        tokens = torch.from_numpy(tokens_BT).to(self.device)
        with torch.inference_mode():
            logits, _ = forward(weights, exported.architecture, exported.model_config, tokens)
        return np.asarray(logits.cpu().numpy())

    def anchors(self) -> list[Run]:
        """A product of two square matrices; see :meth:`Runtime.anchors`."""
        x = torch.randn(ANCHOR_SIDE, ANCHOR_SIDE, device=self.device)
        return [self._runner(lambda: x @ x)]

    def fingerprint(self) -> Fingerprint:
        """CPU or GPU, system and version of torch."""
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else None
        return Fingerprint.local(self.name, torch.__version__, gpu)

    def _runners(
        self,
        weights: Mapping[str, Tensor],
        architecture: Architecture,
        workloads: Sequence[Workload],
        model_config: ModelConfig,
    ) -> dict[Workload, Run]:
        """Runners of a model with these weights, one for each workload."""
        found = {}
        for workload in workloads:
            tokens = self._tokens(workload, model_config)
            states = {
                slot: self._state(layer, architecture.width, model_config, workload)
                for slot, layer in enumerate(architecture.layers)
                if layer.mixer != "none" and workload.past
            }

            # Defaults bind this workload's values: a closure would see those of the last one.
            def step(
                tokens: Tensor = tokens, states: dict[int, State] = states, past: int = workload.past
            ) -> object:
                return forward(weights, architecture, model_config, tokens, position=past, states=states)

            found[workload] = self._runner(step)
        return found

    def _copied(self, weights: Weights) -> dict[str, Tensor]:
        return {name: torch.from_numpy(w).to(self.device, copy=True) for name, w in weights.items()}

    def _random(self, shapes: Shapes, seed: int) -> dict[str, Tensor]:
        values = random_weights(shapes, seed)
        return {name: torch.from_numpy(value).to(self.device) for name, value in values.items()}

    def _tokens(self, workload: Workload, model_config: ModelConfig) -> Tensor:
        size = (workload.batch, workload.tokens)
        return torch.randint(1, model_config.vocab_size, size, device=self.device)

    def _state(
        self, layer: Layer, width: int, model_config: ModelConfig, workload: Workload
    ) -> dict[str, Tensor]:
        shapes = state_shapes(layer, width, model_config, workload.batch, workload.past)
        return {name: 0.1 * torch.randn(shape, device=self.device) for name, shape in shapes.items()}

    def _stacked(
        self, op: Op, copies: Sequence[Mapping[str, Tensor]], workload: Workload, model_config: ModelConfig
    ) -> Step:
        """A step that runs all copies of an op."""
        if op.kind == "embedding":
            tokens = self._tokens(workload, model_config)
            return lambda: [F.embedding(tokens, weights["embedding"]) for weights in copies]
        x = torch.randn(workload.batch, workload.tokens, op.width, device=self.device)
        if op.kind == "head":
            eps = model_config.norm_eps
            return lambda: [project(rms_norm(x, w["norm"], eps), w["embedding"]) for w in copies]
        states = [
            self._state(op.layer, op.width, model_config, workload)
            if workload.past and op.kind != "ffn"
            else None
            for _ in copies
        ]

        def step() -> Tensor:
            y = x
            for weights, state in zip(copies, states, strict=True):
                if op.kind == "ffn":
                    y = ffn(weights, y, model_config)
                else:
                    y, _ = mixer_block(weights, y, op.layer, model_config, workload.past, state)
            return y

        return step

    def _runner(self, step: Step) -> Run:
        """A function that runs a step the given number of times and waits for the device."""
        if self.compiled:
            step = _compiled(step)
            with warnings.catch_warnings(), torch.inference_mode():
                # The cached functions return tables of rotary angles, which never change.
                warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
                step()  # compiles now rather than in a timed block

        def run(loops: int) -> None:
            with torch.inference_mode():
                for _ in range(loops):
                    step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return run


def _compiled(step: Step) -> Step:
    """The compiled step.

    torch keeps compiled graphs by code object, and only a few for each. Every step therefore gets a copy of
    its code object.
    """
    if not isinstance(step, FunctionType):
        raise TypeError(f"{step!r} is not a plain function")
    code = step.__code__.replace()
    copy = FunctionType(code, step.__globals__, step.__name__, step.__defaults__, step.__closure__)
    compiled: Step = torch.compile(copy, dynamic=False)
    return compiled


def _shapes(op: Op, model_config: ModelConfig) -> Shapes:
    """Shapes of an op's parameters."""
    if op.kind in ("embedding", "head"):
        return end_shapes(op.width, model_config)
    if op.kind == "ffn":
        return ffn_shapes(op.width, op.ffn)
    return mixer_shapes(op.kind, op.width, op.heads, op.kv_heads, model_config)


def _open(threads: int, precision: str, *, device: str, compiled: bool) -> TorchRuntime:
    """Open a torch runtime; the registry has checked the precision, which is fp32."""
    return TorchRuntime(threads, device, compiled=compiled)


for _name, _device, _is_compiled in (
    ("torch", "cpu", False),
    ("torch-compiled", "cpu", True),
    ("torch-cuda", "cuda", False),
    ("torch-cuda-compiled", "cuda", True),
):
    register_runtime(_name, partial(_open, device=_device, compiled=_is_compiled))
