"""The shape of every parameter: the one table from which all else is made.

The plain modules allocate these shapes, the supernet allocates the largest of them and
slices prefixes to them, extraction copies those slices, the graphs name their weights
by them, and the parameter count is their sum.
"""

from space.architecture import Architecture, Frame, Layer

Shapes = dict[str, tuple[int, ...]]

CONV = 4  # taps of the causal depthwise convolution before the delta rule (Yang et al. 2024)
SHARED = ("q", "k", "v", "o")  # shared by the mixers of a layer unless the space says otherwise
NORM_EPS = 1e-5
ROPE_BASE = 10000.0
MIN_LOG_DECAY = -20.0  # e^-20 forgets everything within fp32; the chunked form is exact down to here


def mixer_shapes(mixer: str, width: int, heads: int, kv_heads: int, frame: Frame) -> Shapes:
    """Parameters of one mixer block: its pre-norm, projections and private parts.

    Matrices are [out, in], as in ``torch.nn.functional.linear``.
    """
    d = frame.head_dim
    q, kv = heads * d, kv_heads * d
    shapes: Shapes = {
        "pre_norm": (width,),
        "q": (q, width),
        "k": (kv, width),
        "v": (kv, width),
        "o": (width, q),
    }
    if mixer in ("attention", "sliding"):
        if frame.qk_norm:
            shapes |= {"q_norm": (d,), "k_norm": (d,)}
        return shapes
    shapes["norm"] = (d,)
    if mixer == "linear":
        return shapes
    shapes["gate"] = (q, width)
    if mixer == "retnet":
        return shapes
    if mixer == "gated_deltanet":
        return shapes | {
            "beta": (kv_heads, width),
            "decay": (kv_heads, width),
            "A_log": (kv_heads,),
            "dt_bias": (kv_heads,),
            "conv_q": (q, CONV),
            "conv_k": (kv, CONV),
            "conv_v": (kv, CONV),
        }
    raise ValueError(f"mixer {mixer} is not built")


def ffn_shapes(width: int, ffn: int) -> Shapes:
    """Parameters of one SwiGLU block (Shazeer 2020) with its pre-norm."""
    return {"pre_norm": (width,), "gate": (ffn, width), "up": (ffn, width), "down": (width, ffn)}


def layer_shapes(layer: Layer, width: int, frame: Frame) -> Shapes:
    """Parameters of one layer, named ``mixer.NAME`` and ``ffn.NAME``; empty where it is absent."""
    shapes: Shapes = {}
    if layer.mixer != "none":
        block = mixer_shapes(layer.mixer, width, layer.heads, layer.kv_heads, frame)
        shapes |= {f"mixer.{name}": shape for name, shape in block.items()}
    if layer.ffn:
        shapes |= {f"ffn.{name}": shape for name, shape in ffn_shapes(width, layer.ffn).items()}
    return shapes


def end_shapes(width: int, frame: Frame) -> Shapes:
    """The embedding, the final norm and, where it is not tied to the embedding, the head."""
    shapes: Shapes = {"embedding": (frame.vocabulary, width), "norm": (width,)}
    if not frame.tied:
        shapes["head"] = (frame.vocabulary, width)
    return shapes


def model_shapes(architecture: Architecture, frame: Frame) -> Shapes:
    """Every parameter of a sub-model: the ends, and ``layers.SLOT.PART.NAME``."""
    shapes = end_shapes(architecture.width, frame)
    for slot, layer in enumerate(architecture.layers):
        block = layer_shapes(layer, architecture.width, frame)
        shapes |= {f"layers.{slot}.{name}": shape for name, shape in block.items()}
    return shapes


def state_shapes(layer: Layer, frame: Frame, batch: int, past: int) -> Shapes:
    """What a layer carries from one call to the next, after ``past`` tokens.

    ``key``, ``value`` [B, Hkv, tokens held, D]; ``s`` [B, Hkv, D, D]; ``conv`` [B, channels, taps - 1].
    """
    d, kv = frame.head_dim, layer.kv_heads
    if layer.mixer in ("attention", "sliding"):
        held = min(past, layer.window - 1) if layer.mixer == "sliding" else past
        return {"key": (batch, kv, held, d), "value": (batch, kv, held, d)}
    if layer.mixer in ("linear", "retnet"):
        return {"s": (batch, kv, d, d)}
    if layer.mixer == "gated_deltanet":
        channels = (layer.heads + 2 * kv) * d
        return {"s": (batch, kv, d, d), "conv": (batch, channels, CONV - 1)}
    return {}
