"""Shapes and cost that the mixers on the linear recurrence share; see :mod:`space.attention.linear`.

Their state is S [B, Hkv, D, D], and for some the last inputs of a causal convolution over q, k and v.
"""

from space.layer import Layer, ModelConfig
from space.mixers.heads import head_shapes
from space.mixers.initial import taps
from space.mixers.mixer import Initialiser, Shapes, elementwise_activations
from space.workload import Workload

CONV = 4  # taps of the causal depthwise convolution before a recurrence (Yang et al. 2024)
CONV_INITIAL: dict[str, Initialiser] = dict.fromkeys(("conv_q", "conv_k", "conv_v"), taps)


def recurrent_shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """The pre-norm, q, k, v and o, and the gain of the norm of each head's output."""
    return head_shapes(width, heads, kv_heads, model_config) | {"norm": (model_config.head_dim,)}


def conv_shapes(heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """The taps of the convolutions over q, k and v: [channels, CONV]."""
    q, kv = heads * model_config.head_dim, kv_heads * model_config.head_dim
    return {"conv_q": (q, CONV), "conv_k": (kv, CONV), "conv_v": (kv, CONV)}


def recurrent_state(layer: Layer, width: int, model_config: ModelConfig, batch: int, past: int) -> Shapes:
    """The state ``s`` [B, Hkv, D, D], key channels first."""
    d = model_config.head_dim
    return {"s": (batch, layer.kv_heads, d, d)}


def convolved_state(layer: Layer, width: int, model_config: ModelConfig, batch: int, past: int) -> Shapes:
    """The state ``s``, and ``conv``, the last inputs of the convolutions [B, CONV - 1, (H + 2 Hkv) D]."""
    channels = (layer.heads + 2 * layer.kv_heads) * model_config.head_dim
    state = recurrent_state(layer, width, model_config, batch, past)
    return state | {"conv": (batch, CONV - 1, channels)}


def recurrent_flops(layer: Layer, width: int, workload: Workload, model_config: ModelConfig) -> int:
    """FLOPs of the recurrent form: S += k v^T for each kv head, S^T q for each query head."""
    return _state_flops(layer, workload, model_config, layer.heads + layer.kv_heads)


def convolved_flops(layer: Layer, width: int, workload: Workload, model_config: ModelConfig) -> int:
    """The same, with the convolutions before it."""
    state = recurrent_flops(layer, width, workload, model_config)
    return state + _conv_flops(layer, workload, model_config)


def delta_flops(layer: Layer, width: int, workload: Workload, model_config: ModelConfig) -> int:
    """The same for the delta rules, which read S^T k before they write."""
    products = layer.heads + 2 * layer.kv_heads
    return _state_flops(layer, workload, model_config, products) + _conv_flops(layer, workload, model_config)


def _state_flops(layer: Layer, workload: Workload, model_config: ModelConfig, products: int) -> int:
    return 2 * workload.batch * workload.tokens * products * model_config.head_dim**2


def _conv_flops(layer: Layer, workload: Workload, model_config: ModelConfig) -> int:
    channels = (layer.heads + 2 * layer.kv_heads) * model_config.head_dim
    return 2 * workload.batch * workload.tokens * channels * CONV


def convolved_activations(
    layer: Layer, width: int, packed: int, workload: Workload, model_config: ModelConfig
) -> int:
    """Floats at the widest node of a graph with convolutions before the recurrence.

    Beside the gates stand, where there are more tokens than one, what is convolved after its past, twice, and
    later the silu of what it becomes with its parts.
    """
    tokens = workload.batch * workload.tokens
    mixed = (layer.heads + 2 * layer.kv_heads) * model_config.head_dim
    past = workload.batch * (CONV - 1) * mixed
    widest = elementwise_activations(layer, width, packed, workload, model_config)
    silu = tokens * (width + packed + 2 * mixed)
    joined = tokens * (width + packed + mixed) + 2 * past if workload.tokens > 1 else 0
    return max(widest, silu, joined)
