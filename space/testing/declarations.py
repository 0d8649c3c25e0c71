"""Tests of what a mixer declares: shapes, matrices, first values and cost."""

from math import prod

import torch

from space.blocks import initial, mixer_block
from space.cost import op_activation_bytes, op_flops, op_params, op_state_bytes, op_weight_bytes
from space.mixers.heads import head_shapes
from space.ops import mixer_op
from space.shapes import SHARED, state_shapes
from space.testing.settings import MixerSettings, require, require_close
from space.workload import Workload


class DeclarationTests(MixerSettings):
    """Tests of a mixer's declarations."""

    def test_declared_matrices_are_matrices(self) -> None:
        """Every name that the value declares is a parameter, with the dimensions of its role."""
        entry = self.entry
        matrices = (*entry.projections, *entry.matrices, entry.output)
        require(len(set(matrices)) == len(matrices), f"a matrix is declared twice: {matrices}")
        require(set(entry.full_precision) <= set(matrices), "full_precision names no matrix")
        for layer, model_config in self.layers():
            shapes = self.shapes(layer, model_config)
            lost = {*matrices, *entry.initial} - set(shapes)
            require(not lost, f"declared, but not among the shapes: {sorted(lost)}")
            for name in matrices:
                require(len(shapes[name]) == 2, f"matrix {name} has not two dimensions: {shapes[name]}")
            for name in entry.projections:
                require(shapes[name][1] == self.width, f"projection {name} does not read the input")
            require(shapes[entry.output][0] == self.width, "the output matrix does not write [width]")

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
            entry = self.entry
            matrices = sum(prod(shapes[n]) for n in (*entry.projections, *entry.matrices, entry.output))
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
