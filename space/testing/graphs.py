"""Tests of a mixer's ONNX writer."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from space.architecture import Architecture
from space.blocks import Model
from space.cost import op_weight_bytes
from space.layer import Layer, ModelConfig
from space.ops import count_ops
from space.shapes import state_shapes
from space.testing.settings import MixerSettings, require, require_close

INT8_TOLERANCE = 0.1  # root mean square of the difference, relative to that of the logits


def _weight_bytes(model: Any) -> int:
    """Bytes of the constants of a graph, except whole numbers such as shapes."""
    from onnx import TensorProto, numpy_helper

    integers = (TensorProto.INT64, TensorProto.INT32)
    constants = (tensor for tensor in model.graph.initializer if tensor.data_type not in integers)
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in constants)


class GraphTests(MixerSettings):
    """Tests of a mixer's ONNX writer."""

    def test_the_graph_equals_torch(self) -> None:
        """The ONNX graph of two layers gives torch's logits and states, in one call, in two or by token."""
        if not self._has_graph():
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
        if not self.entry.cache_in_place or not self._has_graph():
            return
        for layer, model_config in self.layers():
            model = self._model(layer, model_config)
            tokens = np.random.default_rng(0).integers(0, model_config.vocab_size, (1, 20))
            with torch.no_grad():
                logits, _ = model.double()(torch.from_numpy(tokens))
            cuts = [0, 9, *range(10, 21)]
            found, _ = self._run(self._graph(model), model, tokens, cuts, past=model_config.max_seq_len)
            require_close("logits", found, logits)

    def test_the_quantised_graph_is_close(self) -> None:
        """The int8 graph runs, is close to the one in fp32, and is smaller by the predicted bytes."""
        if not self._has_graph():
            return
        from space.onnx.quantise import quantise

        layer, model_config = next(iter(self.layers()))
        model = self._model(layer, model_config)
        plain, small = self._graph(model), quantise(self._graph(model), "int8")
        tokens = np.random.default_rng(0).integers(0, model_config.vocab_size, (1, 24))
        found, expected = (self._run(graph, model, tokens, [0, 24], past=0)[0] for graph in (small, plain))
        error = float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))
        require(error <= INT8_TOLERANCE, f"logits in int8: relative error {error:.3g}")
        saved = sum(
            count * (op_weight_bytes(op, model_config) - op_weight_bytes(op, model_config, "int8"))
            for op, count in count_ops(model.architecture).items()
        )
        smaller = _weight_bytes(plain) - _weight_bytes(small)
        require(
            smaller == saved,
            f"int8 saves {smaller} bytes, but {saved} by projections, matrices and output: "
            "these are not the matrices that the graph multiplies with",
        )

    def _has_graph(self) -> bool:
        """False for a mixer whose suite allows that it has no writer."""
        require(self.entry.write is not None or not self.needs_graph, "write is missing (see needs_graph)")
        return self.entry.write is not None

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
