"""Tests of a mixer's torch function."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from space.blocks import mixer_block
from space.layer import Layer, ModelConfig
from space.mixers import State, Weights
from space.shapes import is_half_precision, state_shapes
from space.testing.settings import MixerSettings, require, require_close

HALF_TOLERANCE = 2**-4  # a dozen roundings of 2^-9
ROUNDING = 1e-12  # differences of equal fp64 outputs


class FunctionTests(MixerSettings):
    """Tests of a mixer's torch function."""

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
                kinds = {name: value.dtype for name, value in state.items()}
                require({*kinds.values()} <= {torch.float32}, f"states of fp32 weights: {kinds}")

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

    def test_outputs_depend_on_the_tokens_of_the_class(self) -> None:
        """The last output depends on the first token, unless the class is local."""
        for layer, model_config in self.layers():
            length = model_config.max_seq_len - 1
            x = self.inputs(1, length).requires_grad_()
            out, _ = mixer_block(self.weights(layer, model_config), x, layer, model_config)
            out[0, -1].sum().backward()  # type: ignore[no-untyped-call]
            require(x.grad is not None, "the output does not depend on the input")
            slope = float("nan") if x.grad is None else float(x.grad[0, 0].abs().max())
            if self.entry.mixer_class == "local":
                require(slope == 0, f"class local, but token {length} depends on the first")
            else:
                require(slope > 0, f"class {self.entry.mixer_class}, but token {length} ignores the first")

    def test_the_window_applies(self) -> None:
        """Another window gives other outputs of a windowed mixer."""
        if not self.entry.windowed:
            return
        for layer, model_config in self.layers():
            weights, x = self.weights(layer, model_config), self.inputs(1, 3 * self.window)
            wide = replace(layer, window=2 * self.window)
            found, other = (mixer_block(weights, x, setting, model_config)[0] for setting in (layer, wide))
            difference = float((found - other)[:, : self.window].abs().max())
            require(difference < ROUNDING, "tokens inside the window depend on its size")
            require(not torch.equal(found, other), "windowed, but the window changes nothing")

    def test_autocast_is_finite(self) -> None:
        """Under bf16 autocast the block returns finite fp32 outputs close to those without."""
        for layer, model_config in self.layers():
            weights = {name: value.float() for name, value in self.weights(layer, model_config).items()}
            x = self.inputs(1, 40).float()
            expected, _ = mixer_block(weights, x, layer, model_config)
            with torch.autocast("cpu", torch.bfloat16):
                found, _ = mixer_block(weights, x, layer, model_config)
            require(found.dtype == torch.float32, f"the residual stream became {found.dtype}")
            require_close("autocast", found - x, expected - x, HALF_TOLERANCE)

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
            require_close("bf16", found - x, expected - x, HALF_TOLERANCE)
