"""Parameter shapes of mixers with heads."""

from space.layer import ModelConfig
from space.mixers.mixer import Shapes


def head_shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """The pre-norm and the projections q, k, v and o, which the mixers of a layer may share.

    Args:
        width: of the residual stream.
        heads: number of query heads H; rows of q are H * D.
        kv_heads: number of key and value heads Hkv; rows of k and v are Hkv * D.
        model_config: gives the head dimension D.
    """
    q, kv = heads * model_config.head_dim, kv_heads * model_config.head_dim
    return {"pre_norm": (width,), "q": (q, width), "k": (kv, width), "v": (kv, width), "o": (width, q)}
