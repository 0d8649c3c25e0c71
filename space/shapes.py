"""The shape of every parameter and state: the one table from which everything else is made.

The plain modules allocate these shapes, the supernet allocates the largest of them and
slices prefixes to them, extraction copies those slices, the graphs name their weights
by them, and the parameter count is their sum.
"""

from bisect import bisect_left

from space.architecture import Architecture, Layer, ModelConfig
from space.mixers import MIXERS, Shapes

__all__ = [
    "SHARED",
    "Shapes",
    "end_shapes",
    "ffn_shapes",
    "fixed_shapes_from",
    "is_half_precision",
    "layer_shapes",
    "mixer_shapes",
    "model_shapes",
    "parameter_mixer",
    "state_shapes",
]

SHARED = ("q", "k", "v", "o")  # shared by the mixers of a layer unless the space says otherwise


def mixer_shapes(mixer: str, width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """The parameters of one mixer block by name: its pre-norm, projections and private parts.

    Matrices are [out, in], as in ``torch.nn.functional.linear``. The parameters of the state (decays,
    write strengths, mamba2's D) have one row for each kv head, or one for each of its channels.

    Args:
        mixer: name of a registered mixer.
        width: of the residual stream.
        heads: query heads; 0 for a mixer without heads.
        kv_heads: key and value heads.
        model_config: the settings of the space.

    Raises:
        InputError: there is no such mixer.
    """
    return MIXERS.get(mixer).shapes(width, heads, kv_heads, model_config)


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
    """The states that a layer carries from one call to the next, by name; empty without a mixer.

    Args:
        layer: the layer.
        width: of the residual stream.
        model_config: the settings of the space.
        batch: number of sequences.
        past: tokens read so far.
    """
    if layer.mixer == "none":
        return {}
    return MIXERS.get(layer.mixer).state_shapes(layer, width, model_config, batch, past)


def fixed_shapes_from(layer: Layer, width: int, model_config: ModelConfig) -> int:
    """The number of past tokens from which the states of a layer keep their shapes.

    It is ``max_seq_len`` for a cache of all tokens, and 0 for a state of fixed size.

    Args:
        layer: the layer.
        width: of the residual stream.
        model_config: the settings of the space.
    """
    final = state_shapes(layer, width, model_config, 1, model_config.max_seq_len)
    return bisect_left(
        range(model_config.max_seq_len),
        True,
        key=lambda past: state_shapes(layer, width, model_config, 1, past) == final,
    )


def parameter_mixer(name: str, architecture: Architecture | None = None) -> str:
    """The mixer that a parameter is private to; empty for the ends, FFNs and shared projections.

    Args:
        name: of a parameter of a sub-model (``layers.SLOT.mixer.NAME``) or of a supernet
            (``layers.SLOT.MIXER.NAME``, or ``layers.SLOT.MIXER-SIZES.NAME`` of a private block).
        architecture: of the sub-model; None for a supernet.
    """
    if not name.startswith("layers."):
        return ""
    _, slot, part, _ = name.split(".")
    if part == "mixer":
        if architecture is None:
            raise ValueError(f"{name}: a parameter of a sub-model needs its architecture")
        return architecture.layers[int(slot)].mixer
    owner = part.split("-")[0]
    return "" if owner in ("shared", "ffn") else owner


def is_matrix(name: str, shape: tuple[int, ...], architecture: Architecture | None = None) -> bool:
    """True for a matrix that vectors are multiplied with, or an embedding; convolutions are none.

    Args:
        name: of a parameter; see :func:`parameter_mixer`.
        shape: of the parameter.
        architecture: of the sub-model; None for a supernet.
    """
    owner = parameter_mixer(name, architecture)
    if len(shape) != 2 or not owner:
        return len(shape) == 2
    mixer = MIXERS.get(owner)
    return name.rsplit(".", 1)[-1] in (*mixer.projections, *mixer.matrices, mixer.output)


def is_half_precision(name: str, shape: tuple[int, ...], architecture: Architecture | None = None) -> bool:
    """True for a parameter that may train in bf16: a matrix that its mixer does not keep in fp32.

    Args:
        name: of a parameter; see :func:`parameter_mixer`.
        shape: of the parameter.
        architecture: of the sub-model; None for a supernet.
    """
    owner = parameter_mixer(name, architecture)
    exact = MIXERS.get(owner).full_precision if owner else ()
    return is_matrix(name, shape, architecture) and name.rsplit(".", 1)[-1] not in exact
