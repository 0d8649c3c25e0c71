"""Whole mixer blocks against transformers' modules of the same layers, weights copied over."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from space import Architecture, Layer, ModelConfig
from space.blocks import Model, mixer_block
from tests.contracts import scatter
from tests.numerics import TOLERANCE, assert_close

CONFIG = ModelConfig(vocab_size=37, max_seq_len=96, head_dim=16)
WIDTH, HEADS, D = 48, 6, CONFIG.head_dim
FP32 = TOLERANCE["float32"]
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 1, "rms_norm_eps": 1e-5}
Weights = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore")


def weights_of(layer: Layer) -> Weights:
    made = Model(Architecture(WIDTH, (layer,)), CONFIG, torch.Generator().manual_seed(0))
    scatter(made)
    return {key.removeprefix("layers.0.mixer."): p.detach() for key, p in made.named_parameters()}


def compare(name: str, theirs: nn.Module, names: Any) -> None:
    """Copy the weights over, by ``names(weights)``, and compare outputs on 40 tokens."""
    layer = Layer(mixer=name) if name == "short_conv" else Layer(mixer=name, heads=HEADS, kv_heads=HEADS)
    weights = weights_of(layer)
    theirs.eval().load_state_dict(names(weights))
    x = torch.randn(2, 40, WIDTH, generator=torch.Generator().manual_seed(1))
    hidden = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights["pre_norm"]
    with torch.no_grad():
        assert_close(name, mixer_block(weights, x, layer, CONFIG)[0] - x, theirs(hidden), FP32)


def conv(weights: Weights, order: str) -> Tensor:
    return torch.cat([weights[f"conv_{name}"] for name in order])[:, None]


def test_short_conv_equals_lfm2() -> None:
    from transformers.models.lfm2.modeling_lfm2 import Lfm2Config, Lfm2ShortConv

    config = Lfm2Config(
        hidden_size=WIDTH, conv_L_cache=3, conv_bias=False, num_hidden_layers=1, layer_types=["conv"]
    )
    compare(
        "short_conv",
        Lfm2ShortConv(config, 0),
        lambda w: {
            "in_proj.weight": torch.cat([w["in_b"], w["in_c"], w["in_x"]]),
            "conv.weight": conv(w, "x"),
            "out_proj.weight": w["out"],
        },
    )


def test_mamba2_equals_transformers() -> None:
    """Theirs has B and C by group and norms by group; a group for each head is our form."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    config = Mamba2Config(
        hidden_size=WIDTH, num_heads=HEADS, head_dim=D, state_size=D, n_groups=HEADS, expand=2, conv_kernel=4,
        use_conv_bias=False, use_bias=False, layer_norm_epsilon=1e-5, chunk_size=16, num_hidden_layers=1,
    )  # fmt: skip
    compare(
        "mamba2",
        Mamba2Mixer(config, 0),
        lambda w: {
            "in_proj.weight": torch.cat([w[name] for name in ("gate", "v", "k", "q", "decay")]),
            "conv1d.weight": conv(w, "vkq"),
            "norm.weight": w["norm"].repeat(HEADS),
            "out_proj.weight": w["o"],
            **{name: w[name] for name in ("A_log", "dt_bias", "D")},
        },
    )


def test_gated_deltanet_equals_qwen3_next() -> None:
    """Theirs packs q, k, v and the gate head by head, and beta with the decay."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        linear_num_value_heads=HEADS, linear_num_key_heads=HEADS, linear_key_head_dim=D,
        linear_value_head_dim=D, linear_conv_kernel_dim=4, layer_types=["linear_attention"], **SIZES,
    )  # fmt: skip

    def by_head(w: Weights, *names: str) -> Tensor:
        return torch.cat([w[name].view(HEADS, -1, WIDTH) for name in names], dim=1).flatten(0, 1)

    compare(
        "gated_deltanet",
        Qwen3NextGatedDeltaNet(config, 0),
        lambda w: {
            "in_proj_qkvz.weight": by_head(w, "q", "k", "v", "gate"),
            "in_proj_ba.weight": by_head(w, "beta", "decay"),
            "conv1d.weight": conv(w, "qkv"),
            "norm.weight": w["norm"],
            "out_proj.weight": w["o"],
            **{name: w[name] for name in ("A_log", "dt_bias")},
        },
    )


def test_kda_equals_kimi_linear_with_the_bounded_gate_of_glm() -> None:
    """Theirs has an output gate of rank D: ours is given one, as the product of its two matrices."""
    from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextForgetGate
    from transformers.models.kimi_linear.modeling_kimi_linear import (
        KimiLinearConfig,
        KimiLinearDeltaAttention,
    )

    config = KimiLinearConfig(
        linear_num_heads=HEADS, linear_head_dim=D, linear_conv_kernel_dim=4, **SIZES,
        layer_types=["linear_attention"], mlp_layer_types=["dense"],
    )  # fmt: skip
    theirs = KimiLinearDeltaAttention(config, 0)
    sizes = {
        "hidden_size": WIDTH,
        "linear_num_heads": HEADS,
        "linear_head_dim": D,
        "linear_lower_bound": -5.0,
    }
    theirs.forget_gate = Glm5NextTextForgetGate(SimpleNamespace(**sizes))

    def names(w: Weights) -> Weights:
        down, up = w["gate"][:D].clone(), torch.randn(HEADS * D, D) / D**0.5
        w["gate"] = up @ down
        return {
            **{f"{name}_proj.weight": w[name] for name in ("q", "k", "v", "o")},
            "conv1d.weight": conv(w, "qkv"),
            "b_proj.weight": w["beta"],
            "g_a_proj.weight": down,
            "g_b_proj.weight": up,
            "o_norm.weight": w["norm"],
            "forget_gate.f_a_proj.weight": w["decay_down"],
            "forget_gate.f_b_proj.weight": w["decay_up"],
            "forget_gate.dt_bias": w["dt_bias"],
            "forget_gate.A_log": w["slope_log"],
        }

    compare("kda", theirs, names)
