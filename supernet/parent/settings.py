"""A parent's settings: transformers' ``config.json`` as an architecture and a model configuration.

The file is read as data; transformers is not needed, and code that it names is never executed. A feature that
changes the model's function and is not supported is an error that names it, never ignored.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from space.architecture import Architecture, Layer, ModelConfig
from space.io.errors import InputError
from space.layer import ROPE_THETA, Llama3Scaling, Rope

Settings = Mapping[str, Any]
MAX_LAYERS = 256  # of a space
FFN_MULTIPLE = 16  # FFN sizes are padded with zeros up to it
# Families: the class in transformers, and what it has that its configuration does not say.
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Defaults of transformers for settings that config.json omits. Sizes have none, as they are always written.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}


def _off(value: object) -> bool:
    return value in (None, False, 0)


def _one(value: object) -> bool:
    return value is None or value == 1


def _full(value: object) -> bool:
    return value is None or (isinstance(value, list) and set(map(str, value)) <= {"full_attention"})


# Settings that may stand in a file as long as they change nothing, and what they are for.
UNSUPPORTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "attention_bias": (_off, "a bias of the output projection"),
    "mlp_bias": (_off, "biases in the FFN"),
    "use_sliding_window": (_off, "sliding windows"),
    "layer_types": (_full, "layers of several kinds"),
    "num_experts": (_off, "mixture of experts"),
    "num_local_experts": (_off, "mixture of experts"),
    "n_routed_experts": (_off, "mixture of experts"),
    "attn_logit_softcapping": (_off, "soft-capped attention"),
    "final_logit_softcapping": (_off, "soft-capped logits"),
    "embedding_multiplier": (_one, "an embedding multiplier"),
    "residual_multiplier": (_one, "a residual multiplier"),
    "attention_multiplier": (lambda value: value is None, "an attention multiplier"),
    "logits_scaling": (_one, "scaled logits"),
    "quantization_config": (_off, "quantised weights; give the original"),
}


class ParentSettings(NamedTuple):
    """A parent's settings.

    Attributes:
        family: transformers' ``model_type``.
        architecture: equal layers of attention and an FFN.
        model_config: ``tie_embeddings`` as the file says.
        ffn: hidden size of the FFN before padding.
    """

    family: str
    architecture: Architecture
    model_config: ModelConfig
    ffn: int


def read_settings(value: Settings, where: str) -> ParentSettings:
    """Read a parent's settings.

    Args:
        value: the object of a ``config.json``.
        where: its file, for error messages.

    Raises:
        InputError: a setting is missing or of another type, or asks for what is not supported.
    """
    family = _family(value, where)
    _refuse_unsupported(value, family, where)
    settings = {name: item for name, item in value.items() if item is not None}
    if family == "llama" or "num_key_value_heads" in value:
        settings.setdefault("num_key_value_heads", settings.get("num_attention_heads"))
    settings = DEFAULTS[family] | settings
    width, heads = _size(settings, "hidden_size", where), _size(settings, "num_attention_heads", where)
    settings.setdefault("head_dim", width // heads)
    kv_heads, head_dim = (_size(settings, name, where) for name in ("num_key_value_heads", "head_dim"))
    ffn, layers = (_size(settings, name, where) for name in ("intermediate_size", "num_hidden_layers"))
    if layers > MAX_LAYERS:
        raise InputError(f"{where}: num_hidden_layers {layers} is more than {MAX_LAYERS}")
    if heads % kv_heads:
        raise InputError(f"{where}: num_key_value_heads {kv_heads} does not divide {heads} heads")
    for name, size, multiple in (("hidden_size", width, 16), ("head_dim", head_dim, 8)):
        if size % multiple:
            raise InputError(f"{where}: {name} {size} is not a multiple of {multiple}")
    padded = -(-ffn // FFN_MULTIPLE) * FFN_MULTIPLE
    layer = Layer(mixer="attention", heads=heads, kv_heads=kv_heads, ffn=padded)
    context = _size(settings, "max_position_embeddings", where)
    model_config = ModelConfig.from_json(
        {
            "vocab_size": _size(settings, "vocab_size", where),
            "max_seq_len": context,
            "head_dim": head_dim,
            "tie_embeddings": settings.get("tie_word_embeddings", False),
            "qk_norm": family == "qwen3",
            "norm_eps": settings.get("rms_norm_eps", 1e-6),
            "qkv_bias": family == "qwen2",
            "rope": rope_json(read_rope(value, context, where)),
        },
        where,
    )
    return ParentSettings(family, Architecture(width, (layer,) * layers), model_config, ffn)


def _family(value: Settings, where: str) -> str:
    """The family of a model; an InputError for one that is not supported or has code of its own."""
    family, supported = value.get("model_type"), ", ".join(CLASSES)
    if not isinstance(family, str) or family not in CLASSES:
        code = ", and its code (auto_map) is never executed" if "auto_map" in value else ""
        raise InputError(f"{where}: model_type {family!r} is not supported{code}; supported are {supported}")
    auto_map = value.get("auto_map") or {}
    if any(name != "AutoTokenizer" for name in auto_map):
        raise InputError(f"{where}: auto_map names code of the folder, which is never executed")
    classes = value.get("architectures") or [CLASSES[family]]
    if classes != [CLASSES[family]]:
        raise InputError(f"{where}: architectures {classes!r}: expected {CLASSES[family]}")
    return family


def _refuse_unsupported(value: Settings, family: str, where: str) -> None:
    """Raise an InputError for a feature that changes the model's function and is not supported."""
    for name, (changes_nothing, feature) in UNSUPPORTED.items():
        if not changes_nothing(value.get(name)):
            raise InputError(f"{where}: {name} {value[name]!r} is not supported ({feature})")
    if family == "llama" and value.get("sliding_window") is not None:
        raise InputError(f"{where}: sliding_window {value['sliding_window']!r} is not supported")
    if value.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"{where}: hidden_act {value['hidden_act']!r} is not supported; only silu is")


def _size(settings: Settings, name: str, where: str) -> int:
    value = settings.get(name)
    if type(value) is not int or value < 1:
        raise InputError(f"{where}: {name} {value!r} is not a positive integer")
    return value


def read_rope(value: Settings, context: int, where: str) -> Rope:
    """The rotary embedding of a ``config.json``, in any of the forms that transformers has had.

    Args:
        value: the object of the file.
        context: its ``max_position_embeddings``.
        where: the file, for error messages.

    Raises:
        InputError: a setting is of another type, or not supported.
    """
    found = _rope_values(value, where)
    if any(isinstance(item, Mapping) for item in found.values()):
        raise InputError(f"{where}: rope_parameters of several kinds of layers are not supported")
    if not _one(found.get("partial_rotary_factor")):
        factor = found["partial_rotary_factor"]
        raise InputError(f"{where}: partial_rotary_factor {factor!r}: partial rotation is not supported")
    kind = found.get("rope_type") or "default"
    if kind not in ("default", "llama3"):
        raise InputError(f"{where}: rope_type {kind!r} is not supported; default and llama3 are")
    rope: dict[str, Any] = {"theta": ROPE_THETA if found.get("rope_theta") is None else found["rope_theta"]}
    if kind == "llama3":
        names = Llama3Scaling.__dataclass_fields__
        found.setdefault("original_max_position_embeddings", context)
        rope["scaling"] = {name: found[name] for name in names if name in found}
    return Rope.from_json(rope, f"{where}: rope_parameters")


def _rope_values(value: Settings, where: str) -> dict[str, Any]:
    """The settings of the rotary embedding by their names of today, from all places where they may stand."""
    names = ("rope_theta", "partial_rotary_factor")
    found = {name: value[name] for name in names if name in value}
    for source in (value.get("rope_scaling"), value.get("rope_parameters")):
        if not isinstance(source, Mapping | None):
            raise InputError(f"{where}: rope_parameters: expected an object, found {source!r}")
        for name, item in (source or {}).items():
            found["rope_type" if name == "type" else name] = item
    return found


def rope_json(rope: Rope) -> dict[str, Any]:
    """The JSON value of :meth:`space.layer.Rope.from_json`."""
    return {"theta": rope.theta, "scaling": rope.scaling and vars(rope.scaling)}


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); a parent is a folder of config.json and safetensors"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a complete JSON file ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
