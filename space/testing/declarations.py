"""Tests of what a mixer declares: shapes, matrices, first values and cost."""

from math import prod

import torch

from space.blocks import initial, mixer_block
from space.cost import op_activation_bytes, op_flops, op_params, op_state_bytes, op_weight_bytes
from space.mixers.heads import head_shapes
from space.ops import mixer_op
from space.shapes import SHARED, mixer_shapes, state_shapes
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
        unknown = set(entry.initial)
        for layer, model_config in self.layers():
            shapes = self.shapes(layer, model_config)
            unknown -= set(shapes)  # a bias is there only where the model has biases
            lost = set(matrices) - set(shapes)
            require(not lost, f"declared, but not among the shapes: {sorted(lost)}")
            for name in matrices:
                require(len(shapes[name]) == 2, f"matrix {name} has not two dimensions: {shapes[name]}")
            for name in entry.projections:
                require(shapes[name][1] == self.width, f"projection {name} does not read the input")
            require(shapes[entry.output][0] == self.width, "the output matrix does not write [width]")
        require(not unknown, f"initial names no parameter: {sorted(unknown)}")

    def test_shapes_are_well_formed(self) -> None:
        """The pre-norm comes first, names have no dots, and shared projections have the usual shapes."""
        for layer, model_config in self.layers():
            shapes = self.shapes(layer, model_config)
            require(next(iter(shapes.items())) == ("pre_norm", (self.width,)), "pre_norm [width] comes first")
            require(not any("." in name for name in shapes), "a name has a dot in it")
            require(all(len(shape) in (1, 2) for shape in shapes.values()), "a shape has 1 or 2 dimensions")
            require(all(min(shape) > 0 for shape in shapes.values()), f"a dimension is 0: {shapes}")
            usual = head_shapes(self.width, layer.heads, layer.kv_heads, model_config)
            for name in set(SHARED) & set(shapes):
                require(shapes[name] == usual[name], f"{name}: {shapes[name]}, mixers share {usual[name]}")

    def test_every_two_dimensional_parameter_is_declared(self) -> None:
        """It is a projection, a matrix, the output matrix, or has an initialiser, as taps have."""
        entry = self.entry
        known = {*entry.projections, *entry.matrices, entry.output, *entry.initial}
        for layer, model_config in self.layers():
            shapes = self.shapes(layer, model_config)
            lost = [name for name, shape in shapes.items() if len(shape) == 2 and name not in known]
            require(not lost, f"in none of projections, matrices, output and initial: {lost}")

    def test_shapes_follow_the_heads(self) -> None:
        """Shapes of a mixer with heads depend on the query heads and on the kv heads."""
        if not self.entry.has_heads:
            return
        for model_config in self.model_configs:
            first, more, fewer = (
                mixer_shapes(self.mixer, self.width, heads, kv_heads, model_config)
                for heads, kv_heads in ((4, 2), (8, 2), (4, 1))
            )
            require(first != more, "has_heads, but the shapes do not depend on heads")
            require(first != fewer, "has_heads, but the shapes do not depend on kv_heads")

    def test_states_grow_as_the_class_says(self) -> None:
        """States of a full mixer grow with the sequence; the others' stop growing."""
        for layer, model_config in self.layers():
            last = model_config.max_seq_len
            empty, half, whole = (
                state_shapes(layer, self.width, model_config, 1, past) for past in (0, last // 2, last)
            )
            mixer_class = self.entry.mixer_class
            require(list(empty) == list(whole), "names of states depend on the sequence")
            if mixer_class == "full":
                require(half != whole, f"class full, but the states do not grow: {whole}")
            else:
                require(half == whole, f"class {mixer_class}, but the states grow: {half}, {whole}")
            if mixer_class == "linear":
                require(empty == whole, f"class linear, but the states grow at first: {empty}, {whole}")

    def test_functions_are_at_the_top_of_a_module(self) -> None:
        """A Hugging Face folder holds the source of ``shapes``, ``forward`` and the initialisers."""
        entry = self.entry
        functions = {"shapes": entry.shapes, "forward": entry.forward}
        functions |= {f"initial[{name!r}]": make for name, make in entry.initial.items()}
        for name, function in functions.items():
            place = getattr(function, "__qualname__", "<none>")
            require("<" not in place, f"{name} is not a function at the top of a module: {place}")

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
