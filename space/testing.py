"""A contract suite for mixers, built-in or of a plug-in.

Subclass :class:`MixerContract` in a test module, and pytest collects its tests::

    from space.testing import MixerContract

    class TestMine(MixerContract):
        mixer = "mine"

A mixer that passes trains in a supernet, is extracted, exported, priced and decoded like the others.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from space.architecture import Architecture
from space.blocks import Model, initial, mixer_block
from space.cost import op_activation_bytes, op_flops, op_params, op_state_bytes, op_weight_bytes
from space.layer import Layer, ModelConfig
from space.mixers import MIXERS, Mixer, Shapes, State, Weights
from space.mixers.heads import head_shapes
from space.ops import mixer_op
from space.shapes import SHARED, is_half_precision, mixer_shapes, state_shapes
from space.workload import Workload

TOLERANCE = 1e-5  # of max|found - expected| / max|expected|
HEADS = ((4, 2), (3, 3), (4, 1))  # (heads, kv heads)


def require(condition: bool, message: str) -> None:
    """Raise an AssertionError with a message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def require_close(name: str, found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Fail unless a tensor or array is finite and close to another of the same shape.

    Args:
        name: for the message.
        found: tensor or array.
        expected: tensor or array.
        tolerance: largest max|found - expected| / max|expected|.
    """
    a, b = (
        x.detach().double().numpy() if isinstance(x, Tensor) else np.asarray(x) for x in (found, expected)
    )
    require(a.shape == b.shape, f"{name}: shape {a.shape}, expected {b.shape}")
    error, allowed = np.abs(a - b).max(initial=0.0), tolerance * np.abs(b).max(initial=0.0)
    close = bool(np.isfinite(a).all()) and error <= allowed
    require(close, f"{name}: largest error {error:.3g}, allowed {allowed:.3g}")


class MixerContract:
    """Tests of one mixer.

    Attributes:
        mixer: its name; set by the subclass.
        model_configs: the settings that it is tested with.
        width: of the residual stream.
        window: of a windowed mixer.
    """

    mixer: ClassVar[str]
    model_configs: ClassVar[tuple[ModelConfig, ...]] = tuple(
        ModelConfig(vocab_size=37, max_seq_len=64, head_dim=16, qk_norm=qk_norm) for qk_norm in (False, True)
    )
    width: ClassVar[int] = 48
    window: ClassVar[int] = 8

    @property
    def value(self) -> Mixer:
        """The registered mixer."""
        return MIXERS.get(self.mixer)

    def layers(self) -> Iterator[tuple[Layer, ModelConfig]]:
        """The layers, with numbers of heads, and settings that every test runs with."""
        window = self.window if self.value.windowed else 0
        for model_config in self.model_configs:
            for heads, kv_heads in HEADS if self.value.has_heads else ((0, 0),):
                layer = Layer(mixer=self.mixer, heads=heads, kv_heads=kv_heads, window=window)
                yield layer, model_config

    def shapes(self, layer: Layer, model_config: ModelConfig, width: int | None = None) -> Shapes:
        """The shapes of a layer's block."""
        return mixer_shapes(self.mixer, width or self.width, layer.heads, layer.kv_heads, model_config)

    def weights(self, layer: Layer, model_config: ModelConfig, seed: int = 1) -> dict[str, Tensor]:
        """Distinct fp64 values near the first ones, so that a wrong slice or order shows."""
        generator, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        found = {}
        for name, shape in self.shapes(layer, model_config).items():
            value = initial(name, shape, generator, mixer=self.mixer).double()
            scale = 0.1 if len(shape) == 1 else 0.03
            found[name] = value + scale * torch.randn(shape, generator=noise, dtype=torch.float64)
        return found

    def inputs(self, batch: int, length: int, seed: int = 2) -> Tensor:
        """A residual stream [B, T, width] in fp64."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length, self.width, dtype=torch.float64, generator=generator)

    def test_declared_matrices_are_matrices(self) -> None:
        """Every name that the value declares is a parameter, with the dimensions of its role."""
        value = self.value
        matrices = (*value.projections, *value.matrices, value.output)
        require(len(set(matrices)) == len(matrices), f"a matrix is declared twice: {matrices}")
        require(set(value.full_precision) <= set(matrices), "full_precision names no matrix")
        for layer, model_config in self.layers():
            shapes = self.shapes(layer, model_config)
            lost = {*matrices, *value.initial} - set(shapes)
            require(not lost, f"declared, but not among the shapes: {sorted(lost)}")
            for name in matrices:
                require(len(shapes[name]) == 2, f"matrix {name} has not two dimensions: {shapes[name]}")
            for name in value.projections:
                require(shapes[name][1] == self.width, f"projection {name} does not read the input")
            require(shapes[value.output][0] == self.width, "the output matrix does not write [width]")

    def test_shapes_are_well_formed(self) -> None:
        """The pre-norm comes first, names have no dots, and shared projections have the usual shapes."""
        for layer, model_config in self.layers():
            shapes = self.shapes(layer, model_config)
            require(next(iter(shapes.items())) == ("pre_norm", (self.width,)), "pre_norm [width] comes first")
            require(not any("." in name for name in shapes), "a name has a dot in it")
            require(all(len(shape) in (1, 2) for shape in shapes.values()), "a shape has 1 or 2 dimensions")
            usual = head_shapes(self.width, layer.heads, layer.kv_heads, model_config)
            for name in set(SHARED) & set(shapes):
                require(shapes[name] == usual[name], f"{name}: {shapes[name]}, mixers share {usual[name]}")

    def test_every_parameter_counts(self) -> None:
        """Every weight gets a finite gradient that is not zero, and the input too."""
        for layer, model_config in self.layers():
            leaves = {k: v.requires_grad_() for k, v in self.weights(layer, model_config).items()}
            x = self.inputs(2, 35).requires_grad_()
            out, _ = mixer_block(leaves, x, layer, model_config)
            (out * self.inputs(2, 35, seed=3)).sum().backward()  # type: ignore[no-untyped-call]
            for name, leaf in {"x": x, **leaves}.items():
                gradient = leaf.grad
                require(gradient is not None, f"{name}: no gradient")
                require(gradient is not None and bool(torch.isfinite(gradient).all()), f"{name}: not finite")
                require(gradient is not None and float(gradient.abs().max()) > 0, f"{name}: gradient 0")

    def test_smaller_sizes_are_prefixes(self) -> None:
        """A smaller block has the same names and no larger dimension, and runs on prefix views."""
        for layer, model_config in self.layers():
            whole, small = self.weights(layer, model_config), self.width - 16
            fewer = Layer(
                mixer=self.mixer,
                heads=layer.heads // layer.kv_heads if layer.heads else 0,
                kv_heads=min(1, layer.kv_heads),
                window=layer.window,
            )
            shapes = self.shapes(fewer, model_config, small)
            require(list(shapes) == list(whole), "names depend on sizes")
            for name, shape in shapes.items():
                fits = len(shape) == whole[name].ndim and all(
                    a <= b for a, b in zip(shape, whole[name].shape, strict=True)
                )
                require(fits, f"{name}: {shape} is no prefix of {tuple(whole[name].shape)}")
            views = {name: whole[name][tuple(map(slice, shape))] for name, shape in shapes.items()}
            copies = {name: view.clone() for name, view in views.items()}
            x = self.inputs(2, 20)[..., :small]
            found, expected = (mixer_block(weights, x, fewer, model_config)[0] for weights in (views, copies))
            require_close("on views", found, expected)

    def test_states_have_their_shapes(self) -> None:
        """The states after any number of tokens have the declared names and shapes."""
        for layer, model_config in self.layers():
            weights = {name: value.float() for name, value in self.weights(layer, model_config).items()}
            for length in (1, 2, 5, 40):
                _, state = mixer_block(weights, self.inputs(3, length).float(), layer, model_config)
                shapes = state_shapes(layer, self.width, model_config, 3, length)
                found = {name: tuple(value.shape) for name, value in state.items()}
                require(found == shapes, f"after {length} tokens: {found}, declared {shapes}")

    def in_pieces(
        self, weights: Weights, x: Tensor, cuts: list[int], setting: tuple[Layer, ModelConfig], **others: Any
    ) -> tuple[Tensor, State]:
        """The outputs of a sequence that is read piece by piece, and the last states."""
        outs, state = [], None
        for start, end in pairwise(cuts):
            masks = {name: mask[:, :end] for name, mask in others.items()}
            out, state = mixer_block(weights, x[:, start:end], *setting, start, state, **masks)
            outs.append(out)
        return torch.cat(outs, 1), state or {}

    def test_pieces_equal_the_whole(self) -> None:
        """One call, two calls and a call for each token give the same outputs and states."""
        for layer, model_config in self.layers():
            weights, x = self.weights(layer, model_config), self.inputs(2, 37)
            expected, final = mixer_block(weights, x, layer, model_config)
            for cuts in ([0, 13, 37], [*range(38)]):
                found, state = self.in_pieces(weights, x, cuts, (layer, model_config))
                require_close(f"in {len(cuts) - 1} pieces", found, expected)
                for name, value in final.items():
                    require_close(f"{name} in {len(cuts) - 1} pieces", state[name], value)

    def test_padding_on_the_left_changes_nothing(self) -> None:
        """Tokens after padding get what they get without it, in one call or in several."""
        for layer, model_config in self.layers():
            weights, x, padded = self.weights(layer, model_config), self.inputs(2, 30), 7
            mask = torch.ones(2, 30, dtype=torch.bool)
            mask[1, :padded] = False
            first, second = (mixer_block(weights, y, layer, model_config)[0] for y in (x[:1], x[1:, padded:]))
            for cuts in ([0, 30], [0, 11, 30], [0, 3, 30], [*range(31)]):
                found, _ = self.in_pieces(weights, x, cuts, (layer, model_config), mask=mask)
                require_close("without padding", found[:1], first)
                require_close("after padding", found[1:, padded:], second)

    def test_later_tokens_change_nothing(self) -> None:
        """An output depends on no later token."""
        for layer, model_config in self.layers():
            weights, x = self.weights(layer, model_config), self.inputs(1, 40)
            other = torch.cat([x[:, :20], self.inputs(1, 20, seed=4)], 1)
            found, expected = (mixer_block(weights, y, layer, model_config)[0] for y in (other, x))
            require_close("before the change", found[:, :20], expected[:, :20])

    def test_half_precision_is_finite(self) -> None:
        """With its matrices in bf16 the block returns finite fp32 outputs close to those in fp32."""
        for layer, model_config in self.layers():
            whole = {name: value.float() for name, value in self.weights(layer, model_config).items()}
            half = {
                name: value.bfloat16()
                if is_half_precision(f"layers.0.{self.mixer}.{name}", value.shape)
                else value
                for name, value in whole.items()
            }
            x = self.inputs(1, 40).float()
            found, expected = (mixer_block(weights, x, layer, model_config)[0] for weights in (half, whole))
            require(found.dtype == torch.float32, f"the residual stream became {found.dtype}")
            require_close("bf16", found - x, expected - x, 2**-4)

    def test_first_values_are_deterministic(self) -> None:
        """A seed gives the same first values each time, finite ones, with which the block changes nothing."""
        for layer, model_config in self.layers():
            shapes = self.shapes(layer, model_config)
            draws = []
            for _ in range(2):
                generator = torch.Generator().manual_seed(5)
                draws.append({n: initial(n, s, generator, mixer=self.mixer) for n, s in shapes.items()})
            for name, value in draws[0].items():
                require(tuple(value.shape) == shapes[name], f"{name}: shape {tuple(value.shape)}")
                require(bool(torch.isfinite(value).all()), f"{name}: not finite")
                require(torch.equal(value, draws[1][name]), f"{name}: another draw, another value")
            x = self.inputs(1, 9).float()
            require_close("at first", mixer_block(draws[0], x, layer, model_config)[0], x, 0.0)

    def test_cost_follows_the_shapes(self) -> None:
        """Parameters and bytes are those of the shapes; FLOPs cover the matrices and grow with the work."""
        for layer, model_config in self.layers():
            op = mixer_op(self.width, layer)
            shapes = self.shapes(layer, model_config)
            require(op_params(op, model_config) == sum(map(prod, shapes.values())), "op_params")
            value = self.value
            matrices = sum(prod(shapes[n]) for n in (*value.projections, *value.matrices, value.output))
            smaller = op_weight_bytes(op, model_config, "int8") < op_weight_bytes(op, model_config)
            require(smaller, "op_weight_bytes: int8 takes no less than fp32")
            for text in ("prefill@32", "decode@32", "prefill@64,batch=2", "decode@64,batch=2"):
                workload = Workload.parse(text)
                tokens = workload.batch * workload.tokens
                states = state_shapes(layer, self.width, model_config, workload.batch, workload.length)
                held = 4 * sum(map(prod, states.values()))
                require(op_state_bytes(op, workload, model_config) == held, f"{text}: op_state_bytes")
                flops = op_flops(op, workload, model_config)
                require(
                    isinstance(flops, int) and flops >= 2 * tokens * matrices, f"{text}: op_flops {flops}"
                )
                once = op_flops(op, Workload(phase=workload.phase, length=workload.length), model_config)
                require(flops == workload.batch * once, f"{text}: FLOPs are not proportional to the batch")
                widest = op_activation_bytes(op, workload, model_config)
                require(widest >= 16 * tokens * self.width, f"{text}: op_activation_bytes {widest}")

    def test_the_graph_equals_torch(self) -> None:
        """The ONNX graph of two layers gives torch's logits and states, in one call, in two or by token."""
        if self.value.write is None:
            return
        for layer, model_config in self.layers():
            model = self._model(layer, model_config)
            graph = self._graph(model)
            tokens = np.random.default_rng(0).integers(0, model_config.vocab_size, (2, 40))
            with torch.no_grad():
                logits, states = model.double()(torch.from_numpy(tokens))
            # onnxruntime reads several tokens after others for one sequence at a time.
            for cuts, rows in (([0, 40], 2), ([0, 17, 40], 1), ([*range(41)], 2)):
                found, state = self._run(graph, model, tokens[:rows], cuts, past=0)
                require_close(f"logits in {len(cuts) - 1} pieces", found, logits[:rows])
                for slot, name, expected in (
                    (i, name, x) for i, after in states.items() for name, x in after.items()
                ):
                    value = state[f"state.{slot}.{name}"]
                    require_close(f"{name} in {len(cuts) - 1} pieces", value, expected[:rows])

    def test_a_cache_in_place_is_read_up_to_the_position(self) -> None:
        """The graph of a cache that may be longer than what was read ignores what lies behind."""
        if self.value.write is None or not self.value.cache_in_place:
            return
        for layer, model_config in self.layers():
            model = self._model(layer, model_config)
            tokens = np.random.default_rng(0).integers(0, model_config.vocab_size, (1, 20))
            with torch.no_grad():
                logits, _ = model.double()(torch.from_numpy(tokens))
            cuts = [0, 9, *range(10, 21)]
            found, _ = self._run(self._graph(model), model, tokens, cuts, past=model_config.max_seq_len)
            require_close("logits", found, logits)

    def _model(self, layer: Layer, model_config: ModelConfig) -> Model:
        """The mixer twice with different weights, so that a constant of both is noticed, and an FFN."""
        model = Model(Architecture(self.width, (layer, Layer(ffn=32), layer)), model_config)
        with torch.no_grad():
            for slot in (0, 2):
                for name, value in self.weights(layer, model_config, seed=1 + slot).items():
                    model.get_parameter(f"layers.{slot}.mixer.{name}").copy_(value)
            model.get_parameter("layers.1.ffn.down").normal_(
                std=0.1, generator=torch.Generator().manual_seed(6)
            )
        return model.requires_grad_(False)

    @staticmethod
    def _graph(model: Model) -> Any:
        from space.onnx.model import model_graph

        weights = {name: value.float().numpy() for name, value in model.named_parameters()}
        return model_graph(model.architecture, model.model_config, weights)

    def _run(
        self, graph: Any, model: Model, tokens: Any, cuts: list[int], past: int
    ) -> tuple[Any, Mapping[str, Any]]:
        """Logits and last states of a graph fed piece by piece, from states as after ``past`` tokens of 7."""
        import onnxruntime

        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        known, names = {x.name for x in session.get_inputs()}, [x.name for x in session.get_outputs()]
        states: dict[str, Any] = {
            f"state.{slot}.{name}": np.full(shape, 7.0 if past else 0.0, np.float32)
            for slot, layer in enumerate(model.architecture.layers)
            for name, shape in state_shapes(layer, self.width, model.model_config, len(tokens), past).items()
        }
        logits = []
        for start, end in pairwise(cuts):
            feed = {"tokens": tokens[:, start:end], "position": np.array([start]), **states}
            values = session.run(names, {name: value for name, value in feed.items() if name in known})
            states = {name.removesuffix(".next"): x for name, x in zip(names, values, strict=True)}
            logits.append(states.pop("logits"))
        return np.concatenate(logits, 1), states
