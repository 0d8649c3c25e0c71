"""Export of a sub-model as a folder that transformers loads.

``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` runs ``modeling_formfit.py``, a
generated file: the classes of :mod:`supernet.hf.modeling` with every definition of :mod:`space` that they
use, copied verbatim. It needs torch and transformers, not formfit. A sub-model that computes the same
function as transformers' Llama, Qwen2 or Qwen3 is written as one of them, without code.

transformers is imported only to read a folder back.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from space.architecture import Architecture, ModelConfig
from space.io.artefact import atomic_path, write_text
from space.io.errors import InputError
from space.mixers import MIXERS
from space.shapes import is_matrix, model_shapes
from supernet.data.tokenizer import BYTE_SEPARATOR, SEPARATORS, load_tokenizer, prompt_template
from supernet.hf.bundle import one_file
from supernet.hf.mixer_table import mixer_table
from supernet.parent.names import transformers_name
from supernet.parent.settings import CLASSES as FAMILIES

MODELING_FILE = "modeling_formfit.py"
BYTE_VOCAB_SIZE = 256
CLASSES = {"AutoConfig": "FormfitConfig", "AutoModelForCausalLM": "FormfitForCausalLM"}
END_OF_TEXT = "<|endoftext|>"  # name of byte 0, which separates documents
Json = dict[str, Any]


def write_hf(
    folder: Path,
    weights: Mapping[str, Tensor],
    architecture: Architecture,
    model_config: ModelConfig,
    tokenizer: Path | None,
) -> list[str]:
    """Write a sub-model as a folder for ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    Both need ``trust_remote_code=True``: a tokenizer has no code, but its loader reads the model's settings.
    An architecture of equal softmax layers becomes a ``LlamaForCausalLM``, a ``Qwen2ForCausalLM`` with qkv
    biases or a ``Qwen3ForCausalLM`` with q/k norm, which do not need it.

    Args:
        folder: the folder; ``config.json`` is written last.
        weights: every parameter of :func:`space.shapes.model_shapes`.
        architecture: the sub-model's architecture.
        model_config: the constants of its space.
        tokenizer: the ``tokenizer.json`` of its training; None if the tokens are bytes. A model of bytes with
            a vocabulary below 256 gets no tokenizer.

    Returns:
        The names of the files.

    Raises:
        ValueError: the weights are not the architecture's.
        InputError: the tokenizer cannot be read, or has more tokens than the model.
    """
    shapes = model_shapes(architecture, model_config)
    if {name: tuple(weight.shape) for name, weight in weights.items()} != shapes:
        raise ValueError(f"not the weights of architecture {architecture.key}")
    separator, texts = _tokenizer(model_config, tokenizer)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), separator)
    config: Json = {"dtype": str(weights["embedding"].dtype).removeprefix("torch."), **ids}
    names = {name: tensor_name(name, shape, architecture) for name, shape in shapes.items()}
    if native := _native(architecture, model_config):
        (folder / MODELING_FILE).unlink(missing_ok=True)  # of a model that was written here before
        config |= native
        slots = [slot for slot, layer in enumerate(architecture.layers) if layer.present]
        names = {name: transformers_name(name, slots) for name in shapes}
    else:
        config |= {
            "architectures": [CLASSES["AutoModelForCausalLM"]],
            "auto_map": {auto: f"{Path(MODELING_FILE).stem}.{name}" for auto, name in CLASSES.items()},
            "model_type": "formfit",
            "architecture": architecture.to_json(),
            "model_config": model_config.to_json(),
        }
        texts[MODELING_FILE] = modelling_file(layer.mixer for layer in architecture.layers)
    with atomic_path(folder / "model.safetensors") as temporary:
        tensors = {names[name]: weight.detach().contiguous() for name, weight in weights.items()}
        save_file(tensors, temporary, metadata={"format": "pt"})
    texts |= {"generation_config.json": _json(ids), "config.json": _json(config)}
    for name, text in texts.items():
        write_text(folder / name, text)
    return ["model.safetensors", *texts]


def tensor_name(name: str, shape: tuple[int, ...], architecture: Architecture) -> str:
    """The name of a parameter in a folder for transformers, where a matrix is the weight of a module.

    Args:
        name: in :func:`space.shapes.model_shapes`.
        shape: of the parameter.
        architecture: of the sub-model.
    """
    return f"{name}.weight" if is_matrix(name, shape, architecture) else name


def modelling_file(mixers: Iterable[str] = ()) -> str:
    """The text of ``modeling_formfit.py``, with all built-in mixers.

    Args:
        mixers: of the model; those of plug-ins are copied too.

    Raises:
        InputError: a plug-in's mixer cannot be copied.
    """
    used = set(mixers)
    plugins = [name for name in MIXERS.known_names() if name in used and name not in MIXERS.builtin]
    table, packages = mixer_table([*MIXERS.builtin, *plugins])
    try:
        return one_file(
            "supernet.hf.modeling",
            list(CLASSES.values()),
            packages=packages,
            replaced={"space.mixers": table},
        )
    except ValueError as error:
        if not plugins:
            raise
        raise InputError(
            f"mixer {', '.join(plugins)}: a Hugging Face folder cannot hold its code ({error}); "
            "extract with --format onnx"
        ) from None


def _mixers_of(folder: Path) -> list[str]:
    """The mixers that a folder's settings name; none if they cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return [str(layer["mixer"]) for layer in config["architecture"]["layers"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def load_hf(folder: Path) -> Any:
    """Load the model of a folder that :func:`write_hf` wrote; the folder's code is not executed.

    Args:
        folder: the folder.

    Returns:
        A transformers model in evaluation mode.

    Raises:
        InputError: transformers is not installed, or the folder's code is not what this version writes.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from supernet.hf.modeling import FormfitForCausalLM
    except ImportError:
        raise InputError(f"{folder}: needs transformers; `pip install 'formfit[hf]'` installs it") from None
    code, hint = folder / MODELING_FILE, "`formfit export --format hf` writes it again"
    if code.exists() and code.read_bytes() != modelling_file(_mixers_of(folder)).encode():
        raise InputError(f"{code}: not what this formfit writes; {hint}")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model_class: Any = FormfitForCausalLM if code.exists() else AutoModelForCausalLM
    try:
        return model_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
        ).eval()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}: transformers cannot load it ({reason}); {hint}") from None


def _native(architecture: Architecture, model_config: ModelConfig) -> Json:
    """The configuration of transformers' model that computes the same function; empty if there is none."""
    layers = [layer for layer in architecture.layers if layer.present]
    first = layers[0]
    uniform = all(layer == first for layer in layers) and first.mixer == "attention" and first.ffn > 0
    extras = (model_config.qkv_bias, model_config.qk_norm)
    family = {(False, False): "llama", (True, False): "qwen2", (False, True): "qwen3"}.get(extras)
    # transformers rejects a Llama whose width is not a multiple of the heads.
    if not uniform or family is None or (family == "llama" and architecture.width % first.heads):
        return {}
    rope = model_config.rope
    scaling = (
        {"rope_type": "default"} if rope.scaling is None else {"rope_type": "llama3", **vars(rope.scaling)}
    )
    config: Json = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": model_config.vocab_size,
        "hidden_size": architecture.width,
        "intermediate_size": first.ffn,
        "num_hidden_layers": len(layers),
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        "head_dim": model_config.head_dim,
        "max_position_embeddings": model_config.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": model_config.norm_eps,
        "rope_parameters": {**scaling, "rope_theta": rope.theta},
        "tie_word_embeddings": model_config.tie_embeddings,
        "use_cache": True,
    }
    if family != "qwen2":
        config["attention_bias"] = False
    if family == "llama":
        config["mlp_bias"] = False
    return config


def _tokenizer(model_config: ModelConfig, path: Path | None) -> tuple[int, dict[str, str]]:
    """The id that separates documents, and the texts of the tokenizer's files by name."""
    if path is None and model_config.vocab_size < BYTE_VOCAB_SIZE:
        return 0, {}
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model_config.max_seq_len,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # the separator's name in a text is plain text, as in training
    }
    if path is None:
        separator, name, text = BYTE_SEPARATOR, END_OF_TEXT, _json(_byte_tokenizer())
    else:
        loaded = load_tokenizer(path)
        if loaded.vocab_size > model_config.vocab_size:
            raise InputError(f"{path}: {loaded.vocab_size} tokens, the model has {model_config.vocab_size}")
        separator = loaded.separator
        name = loaded.library.id_to_token(separator)
        value = json.loads(path.read_bytes())
        value["post_processor"] = prompt_template(name, separator)
        text = _json(value)
    if name in SEPARATORS:  # otherwise id 0 separates documents, and may be a word
        config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), name)
    return separator, {"tokenizer.json": text, "tokenizer_config.json": _json(config)}


def _byte_tokenizer() -> Json:
    """A tokenizer of bytes, named by GPT-2's printable characters; byte 0 precedes every text."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(BYTE_VOCAB_SIZE, 2 * BYTE_VOCAB_SIZE))
    vocabulary = {
        chr(byte if byte in printable else next(substitutes)): byte for byte in range(BYTE_VOCAB_SIZE)
    }
    vocabulary = {END_OF_TEXT: 0} | {character: byte for character, byte in vocabulary.items() if byte}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": END_OF_TEXT, **flags, "special": True}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": prompt_template(END_OF_TEXT, BYTE_SEPARATOR),
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
