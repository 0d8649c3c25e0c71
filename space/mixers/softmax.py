"""Shapes and cost that the softmax mixers share."""

from space.layer import Layer, ModelConfig
from space.mixers.heads import head_shapes
from space.mixers.initial import zeros
from space.mixers.mixer import Initialiser, Shapes
from space.workload import Workload

BIAS_INITIAL: dict[str, Initialiser] = dict.fromkeys(("q_bias", "k_bias", "v_bias"), zeros)


def softmax_shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """The pre-norm, q, k, v and o, and what the model's settings ask for besides.

    With ``qkv_bias`` these are the biases of queries, keys and values, with ``qk_norm`` the gains of the
    norms of queries and keys.
    """
    shapes, d = head_shapes(width, heads, kv_heads, model_config), model_config.head_dim
    if model_config.qkv_bias:
        shapes |= {f"{name}_bias": shapes[name][:1] for name in ("q", "k", "v")}
    return shapes | ({"q_norm": (d,), "k_norm": (d,)} if model_config.qk_norm else {})


def rotates_inside(model_config: ModelConfig) -> bool:
    """True if the attention operator of a graph rotates queries and keys; it refuses heads of 8, 24, ..."""
    return model_config.head_dim % 16 == 0


def cache_shapes(layer: Layer, model_config: ModelConfig, batch: int, held: int) -> Shapes:
    """Keys after RoPE and values of the last ``held`` tokens, [B, Hkv, tokens held, D] each."""
    shape = (batch, layer.kv_heads, held, model_config.head_dim)
    return {"key": shape, "value": shape}


def softmax_flops(layer: Layer, width: int, workload: Workload, model_config: ModelConfig) -> int:
    """FLOPs of scores and weighted sums, over the (query, key) pairs that the window lets see each other."""
    window = layer.window or workload.length
    pairs = _pairs(workload.length, window) - _pairs(workload.past, window)
    return workload.batch * 4 * pairs * layer.heads * model_config.head_dim


def _pairs(tokens: int, window: int) -> int:
    """Number of (query, key) pairs of the first tokens of a sequence, each seeing at most a window."""
    full = min(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * window


def softmax_activations(
    layer: Layer, width: int, packed: int, workload: Workload, model_config: ModelConfig
) -> int:
    """Floats at the widest node, caches aside; what the attention operator uses inside is not counted."""
    tokens, q = workload.batch * workload.tokens, layer.heads * model_config.head_dim
    apart = model_config.qk_norm or model_config.qkv_bias or not rotates_inside(model_config)
    inner = 2 * packed if apart else packed + q
    return tokens * max(2 * width + packed, width + inner, 4 * width)
