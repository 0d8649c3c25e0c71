"""torch as a runtime: eager or compiled, on the CPU or a GPU, under the protocol of every runtime.

On a GPU a timed block ends when the device has done all of its loops, so a block should be long beside
the some ten microseconds that waiting costs.
"""

import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latency.device_runner.io_binding import Run
from latency.device_runner.main import cpu_model
from latency.runtimes.onnxruntime import ANCHOR_SIDE
from latency.runtimes.protocol import random_weights
from space import Architecture, InputError, Layer, ModelConfig, Workload
from space.attention.projection import project, rms_norm
from space.blocks import ffn, forward, mixer
from space.ops import Op
from space.shapes import Shapes, end_shapes, ffn_shapes, mixer_shapes, model_shapes, state_shapes


class TorchRuntime:
    """torch on one device, with a fixed number of threads."""

    def __init__(self, threads: int = 1, device: str = "cpu", *, compiled: bool = False) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("runtime torch-cuda: torch sees no CUDA device here")
        self.threads, self.device, self.compiled = threads, torch.device(device), compiled
        self.name = "-".join(
            ["torch", *(["cuda"] if device == "cuda" else []), *(["compiled"] if compiled else [])]
        )
        torch.set_num_threads(threads)

    def stack(
        self, op: Op, height: int, workloads: Sequence[Workload], model_config: ModelConfig
    ) -> dict[Workload, Run]:
        """Runners of ``height`` copies of an op, one for each workload."""
        copies = [self._weights(_shapes(op, model_config), seed) for seed in range(height)]
        return {w: self._runner(self._stacked(op, copies, w, model_config)) for w in workloads}

    def model(
        self, architecture: Architecture, workloads: Sequence[Workload], model_config: ModelConfig, seed: int
    ) -> dict[Workload, Run]:
        """Runners of a whole model with random weights, one for each workload."""
        weights = self._weights(model_shapes(architecture, model_config), seed)
        return self.load(weights, architecture, workloads, model_config)

    def load(
        self,
        weights: Mapping[str, Tensor],
        architecture: Architecture,
        workloads: Sequence[Workload],
        model_config: ModelConfig,
    ) -> dict[Workload, Run]:
        """Runners of a model with these weights, copied to the device; one for each workload."""
        weights = {name: tensor.to(self.device, copy=True) for name, tensor in weights.items()}
        found = {}
        for workload in workloads:
            tokens = self._tokens(workload, model_config)
            states = {
                slot: self._state(layer, architecture.width, model_config, workload)
                for slot, layer in enumerate(architecture.layers)
                if layer.mixer != "none" and workload.past
            }

            def step(tokens: Tensor = tokens, states: Any = states, past: int = workload.past) -> Any:
                return forward(weights, architecture, model_config, tokens, position=past, states=states)

            found[workload] = self._runner(step)
        return found

    def anchors(self) -> list[Run]:
        """A square matrix product; see docs/adr/0005."""
        x = torch.randn(ANCHOR_SIDE, ANCHOR_SIDE, device=self.device)
        return [self._runner(lambda: x @ x)]

    def fingerprint(self) -> dict[str, Any]:
        """CPU or GPU, system and versions."""
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else None
        return {
            "machine": platform.machine(),
            "cpu": gpu or cpu_model(),
            "system": platform.system(),
            "runtime": self.name,
            "runtime_version": torch.__version__,
        }

    def _weights(self, shapes: Shapes, seed: int) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(value).to(self.device)
            for name, value in random_weights(shapes, seed).items()
        }

    def _tokens(self, workload: Workload, model_config: ModelConfig) -> Tensor:
        return torch.randint(
            1, model_config.vocab_size, (workload.batch, workload.tokens), device=self.device
        )

    def _state(
        self, layer: Layer, width: int, model_config: ModelConfig, workload: Workload
    ) -> dict[str, Tensor]:
        shapes = state_shapes(layer, width, model_config, workload.batch, workload.past)
        return {name: 0.1 * torch.randn(shape, device=self.device) for name, shape in shapes.items()}

    def _stacked(
        self, op: Op, copies: Sequence[Mapping[str, Tensor]], workload: Workload, model_config: ModelConfig
    ) -> Callable[[], Any]:
        if op.kind == "embedding":
            tokens = self._tokens(workload, model_config)
            return lambda: [F.embedding(tokens, weights["embedding"]) for weights in copies]
        x = torch.randn(workload.batch, workload.tokens, op.width, device=self.device)
        if op.kind == "head":
            return lambda: [project(rms_norm(x, weights["norm"]), weights["embedding"]) for weights in copies]
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
                    y = ffn(weights, y)
                else:
                    y, _ = mixer(weights, y, op.layer, model_config, workload.past, state)
            return y

        return step

    def _runner(self, step: Any) -> Run:
        """Runs a step a number of times, to its end."""
        if self.compiled:
            # Each with code of its own: compiled graphs are kept by code object, and only some for each.
            code = step.__code__.replace()
            own = FunctionType(code, step.__globals__, step.__name__, step.__defaults__, step.__closure__)
            step = torch.compile(own, dynamic=False)
            with warnings.catch_warnings(), torch.inference_mode():
                # The cache holds tables of rotary angles, which are the same each time.
                warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
                step()  # compiled here, not within a timed block

        def run(loops: int) -> None:
            with torch.inference_mode():
                for _ in range(loops):
                    step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return run


def _shapes(op: Op, model_config: ModelConfig) -> Shapes:
    if op.kind in ("embedding", "head"):
        return end_shapes(op.width, model_config)
    if op.kind == "ffn":
        return ffn_shapes(op.width, op.ffn)
    return mixer_shapes(op.kind, op.width, op.heads, op.kv_heads, model_config)
