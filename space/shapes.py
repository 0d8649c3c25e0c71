"""The shape of every parameter: the one table from which all else is made.

The plain modules allocate these shapes, the supernet allocates the largest of them and
slices prefixes to them, extraction copies those slices, the graphs name their weights
by them, and the parameter count is their sum.
"""

from dataclasses import dataclass

from space.architecture import Architecture, Layer, ModelConfig

Shapes = dict[str, tuple[int, ...]]

CONV = 4  # taps of the causal depthwise convolution before a recurrence (Yang et al. 2024)
SHORT_CONV = 3  # taps of the mixer short_conv
GLA_RANK = 16  # of the product that makes gla's decays (Yang et al. 2023)
SHARED = ("q", "k", "v", "o")  # shared by the mixers of a layer unless the space says otherwise
# The projections of a mixer's input, in the order in which a graph packs them into one product.
PACKED = ("q", "k", "v", "gate", "beta", "decay", "decay_down", "in_b", "in_c", "in_x")
FEW = 32  # tokens up to which a graph's convolution before a recurrence is the one for few
NORM_EPS = 1e-5
ROPE_BASE = 10000.0
MIN_LOG_DECAY = -20.0  # e^-20 forgets everything within fp32; the chunked form is exact down to here


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """What a mixer adds to the linear recurrence that it runs on; see :mod:`space.attention.linear`.

    The delta rules take unit queries and keys, and a write strength ``beta`` for each kv head.
    """

    rule: str
    decay: str = ""  # "" none, "fixed", "head" a learned one per kv head, "channel" one per key channel
    conv: bool = False  # q, k and v pass a causal depthwise convolution and silu first
    gate: str = ""  # the activation of the output gate: "", "silu" or "sigmoid"
    gate_first: bool = False  # the gate comes before the norm

    @property
    def delta(self) -> bool:
        """Whether a write first takes away what the state holds under its key."""
        return "delta" in self.rule


RECURRENCES = {
    "linear": Recurrence(rule="linear"),  # Katharopoulos et al. 2020
    "retnet": Recurrence(rule="gated", decay="fixed", gate="silu"),  # Sun et al. 2023
    # Dao and Gu 2024
    "mamba2": Recurrence(rule="gated", decay="head", conv=True, gate="silu", gate_first=True),
    "gla": Recurrence(rule="gated", decay="channel", gate="silu"),  # Yang et al. 2023
    "hgrn2": Recurrence(rule="gated", decay="channel"),  # Qin et al. 2024
    "deltanet": Recurrence(rule="delta", conv=True),  # Yang et al. 2024
    # Yang, Kautz and Hatamizadeh 2024
    "gated_deltanet": Recurrence(rule="gated_delta", decay="head", conv=True, gate="silu"),
    "kda": Recurrence(rule="gated_delta", decay="channel", conv=True, gate="sigmoid"),  # Kimi Linear, 2025
}


def mixer_shapes(mixer: str, width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """Parameters of one mixer block: its pre-norm, projections and private parts.

    Matrices are [out, in], as in ``torch.nn.functional.linear``. What belongs to the state (decays,
    write strengths, mamba2's D) has one row for each kv head, or one for each of its channels.

    Raises:
        ValueError: there is no such mixer.
    """
    if mixer == "short_conv":
        square = (width, width)
        inner: Shapes = {"in_b": square, "in_c": square, "in_x": square, "conv_x": (width, SHORT_CONV)}
        return {"pre_norm": (width,)} | inner | {"out": square}
    d = model_config.head_dim
    q, kv = heads * d, kv_heads * d
    shapes: Shapes = {
        "pre_norm": (width,),
        "q": (q, width),
        "k": (kv, width),
        "v": (kv, width),
        "o": (width, q),
    }
    if mixer in ("attention", "sliding"):
        if model_config.qk_norm:
            shapes |= {"q_norm": (d,), "k_norm": (d,)}
        return shapes
    if mixer not in RECURRENCES:
        raise ValueError(f"there is no mixer {mixer!r}")
    recurrence = RECURRENCES[mixer]
    shapes["norm"] = (d,)
    if recurrence.gate:
        shapes["gate"] = (q, width)
    if recurrence.delta:
        shapes["beta"] = (kv_heads, width)
    if recurrence.decay == "head":
        shapes |= {"decay": (kv_heads, width), "A_log": (kv_heads,), "dt_bias": (kv_heads,)}
    if mixer == "mamba2":
        shapes["D"] = (kv_heads,)
    elif mixer == "gla":
        shapes |= {"decay_down": (GLA_RANK, width), "decay_up": (kv, GLA_RANK), "decay_bias": (kv,)}
    elif mixer == "hgrn2":
        shapes["lower_bound"] = (kv,)
    elif mixer == "kda":
        shapes |= {"decay_down": (d, width), "decay_up": (kv, d), "slope_log": (kv_heads,), "dt_bias": (kv,)}
    if recurrence.conv:
        shapes |= {"conv_q": (q, CONV), "conv_k": (kv, CONV), "conv_v": (kv, CONV)}
    return shapes


def ffn_shapes(width: int, ffn: int) -> Shapes:
    """Parameters of one SwiGLU block (Shazeer 2020) with its pre-norm."""
    return {"pre_norm": (width,), "gate": (ffn, width), "up": (ffn, width), "down": (width, ffn)}


def layer_shapes(layer: Layer, width: int, model_config: ModelConfig) -> Shapes:
    """Parameters of one layer, named ``mixer.NAME`` and ``ffn.NAME``; empty where it is absent."""
    shapes: Shapes = {}
    if layer.mixer != "none":
        block = mixer_shapes(layer.mixer, width, layer.heads, layer.kv_heads, model_config)
        shapes |= {f"mixer.{name}": shape for name, shape in block.items()}
    if layer.ffn:
        shapes |= {f"ffn.{name}": shape for name, shape in ffn_shapes(width, layer.ffn).items()}
    return shapes


def end_shapes(width: int, model_config: ModelConfig) -> Shapes:
    """The embedding, the final norm and, where it is not tied to the embedding, the head."""
    shapes: Shapes = {"embedding": (model_config.vocab_size, width), "norm": (width,)}
    if not model_config.tie_embeddings:
        shapes["head"] = (model_config.vocab_size, width)
    return shapes


def model_shapes(architecture: Architecture, model_config: ModelConfig) -> Shapes:
    """Every parameter of a sub-model: the ends, and ``layers.SLOT.PART.NAME``."""
    shapes = end_shapes(architecture.width, model_config)
    for slot, layer in enumerate(architecture.layers):
        block = layer_shapes(layer, architecture.width, model_config)
        shapes |= {f"layers.{slot}.{name}": shape for name, shape in block.items()}
    return shapes


def state_shapes(layer: Layer, width: int, model_config: ModelConfig, batch: int, past: int) -> Shapes:
    """What a layer of a model of this width carries from one call to the next, after ``past`` tokens.

    ``key``, ``value`` [B, Hkv, tokens held, D]; ``s`` [B, Hkv, D, D]; ``conv`` [B, channels, taps - 1].
    """
    d, kv = model_config.head_dim, layer.kv_heads
    if layer.mixer in ("attention", "sliding"):
        held = min(past, layer.window - 1) if layer.mixer == "sliding" else past
        return {"key": (batch, kv, held, d), "value": (batch, kv, held, d)}
    if layer.mixer == "short_conv":
        return {"conv": (batch, width, SHORT_CONV - 1)}
    if layer.mixer not in RECURRENCES:
        return {}
    shapes: Shapes = {"s": (batch, kv, d, d)}
    if RECURRENCES[layer.mixer].conv:
        shapes["conv"] = (batch, (layer.heads + 2 * kv) * d, CONV - 1)
    return shapes
