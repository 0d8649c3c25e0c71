"""A sub-model as a folder that transformers loads.

``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` runs ``modeling_formfit.py``,
which is generated: the classes of :mod:`supernet.hf.modeling` and, of the modules of :mod:`space`, each
definition that they reach, as it stands. It needs torch and transformers and nothing of formfit. A
sub-model that is a Llama in all but name is written as one, without code.

transformers is imported only where a folder is read back.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from space.architecture import Architecture, ModelConfig
from space.io.artefact import atomic_path, write_text
from space.io.errors import InputError
from space.layer import NORM_EPS, ROPE_BASE
from space.shapes import model_shapes
from supernet.data.tokenizer import SEPARATORS, load_tokenizer
from supernet.hf.bundle import one_file
from supernet.hf.llama import BLOCKS, ENDS

MODEL = "modeling_formfit.py"
BYTES = 256
CLASSES = {"AutoConfig": "FormfitConfig", "AutoModelForCausalLM": "FormfitForCausalLM"}
END = "<|endoftext|>"  # what byte 0, between documents, is called


def write_hf(
    folder: Path,
    weights: Mapping[str, Tensor],
    architecture: Architecture,
    model_config: ModelConfig,
    tokenizer: Path | None,
) -> list[str]:
    """Write a sub-model as a folder for ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    Both want ``trust_remote_code=True``: a tokenizer has no code, but its loader reads the model's settings.

    Args:
        folder: where; ``config.json`` comes last.
        weights: every parameter of :func:`space.shapes.model_shapes`.
        architecture: what they are the weights of. All softmax, with equal layers and without q/k norm,
            it becomes a ``LlamaForCausalLM``, which needs no ``trust_remote_code``.
        model_config: what its space fixes.
        tokenizer: the ``tokenizer.json`` that it was trained with; None where bytes are the tokens. A
            vocabulary that does not hold the bytes gets no tokenizer.

    Returns:
        The names of the files.

    Raises:
        ValueError: the weights are not the architecture's.
        InputError: the tokenizer cannot be read, or has more tokens than the frame.
    """
    shapes = model_shapes(architecture, model_config)
    if {name: tuple(weight.shape) for name, weight in weights.items()} != shapes:
        raise ValueError(f"not the weights of architecture {architecture.key}")
    separator, texts = _tokenizer(model_config, tokenizer)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), separator)
    config: dict[str, Any] = {"dtype": str(weights["embedding"].dtype).removeprefix("torch."), **ids}
    names = {name: name for name in shapes}
    if llama := _as_llama(architecture, model_config):
        (folder / MODEL).unlink(missing_ok=True)  # of another model that was written here
        config |= llama
        slots = [slot for slot, layer in enumerate(architecture.layers) if layer.present]
        names = {name: _llama_name(name, slots) for name in shapes}
    else:
        config |= {
            "architectures": [CLASSES["AutoModelForCausalLM"]],
            "auto_map": {auto: f"{Path(MODEL).stem}.{name}" for auto, name in CLASSES.items()},
            "model_type": "formfit",
            "architecture": architecture.to_json(),
            "model_config": dict(vars(model_config)),
        }
        texts[MODEL] = modelling_file()
    with atomic_path(folder / "model.safetensors") as temporary:
        tensors = {names[name]: weight.detach().contiguous() for name, weight in weights.items()}
        save_file(tensors, temporary, metadata={"format": "pt"})
    texts |= {"generation_config.json": _json(ids), "config.json": _json(config)}
    for name, text in texts.items():
        write_text(folder / name, text)
    return ["model.safetensors", *texts]


def modelling_file() -> str:
    """The text of ``modeling_formfit.py``."""
    return one_file("supernet.hf.modeling", list(CLASSES.values()))


def load_hf(folder: Path) -> Any:
    """The model of a folder that :func:`write_hf` wrote; nothing that stands there is executed.

    Raises:
        InputError: transformers is not installed, or the folder's code is not what this version writes.
    """
    try:
        from transformers import LlamaForCausalLM
        from transformers.utils import logging

        from supernet.hf.modeling import FormfitForCausalLM
    except ImportError:
        raise InputError(f"{folder}: needs transformers; `pip install 'formfit[hf]'` installs it") from None
    code, again = folder / MODEL, "`formfit export --format hf` writes it again"
    if code.exists() and code.read_bytes() != modelling_file().encode():
        raise InputError(f"{code}: not what this formfit writes; {again}")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    kind: Any = FormfitForCausalLM if code.exists() else LlamaForCausalLM
    try:
        return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}: transformers cannot load it ({reason}); {again}") from None


def _as_llama(architecture: Architecture, model_config: ModelConfig) -> dict[str, Any]:
    """The settings of the Llama that an architecture is; empty where it is none."""
    layers = [layer for layer in architecture.layers if layer.present]
    first = layers[0]
    alike = all(layer == first for layer in layers) and first.mixer == "attention" and first.ffn > 0
    if (
        not alike or model_config.qk_norm or architecture.width % first.heads
    ):  # transformers refuses such a width
        return {}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model_config.vocab_size,
        "hidden_size": architecture.width,
        "intermediate_size": first.ffn,
        "num_hidden_layers": len(layers),
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        "head_dim": model_config.head_dim,
        "max_position_embeddings": model_config.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model_config.tie_embeddings,
        "use_cache": True,
    }


def _llama_name(name: str, slots: Sequence[int]) -> str:
    """A parameter's name in a Llama whose layers stood in these slots."""
    if name in ENDS:
        return f"{ENDS[name]}.weight"
    _, slot, block = name.split(".", 2)
    return f"model.layers.{slots.index(int(slot))}.{BLOCKS[block]}.weight"


def _tokenizer(model_config: ModelConfig, path: Path | None) -> tuple[int, dict[str, str]]:
    """The id between documents, and the texts of the tokenizer's files."""
    if path is None and model_config.vocab_size < BYTES:
        return 0, {}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model_config.max_seq_len,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    if path is None:
        separator, name, text = 0, END, _json(_byte_tokenizer())
        config["split_special_tokens"] = True  # a text that spells it out is its bytes, as in training
    else:
        given = load_tokenizer(path)
        if given.vocab_size > model_config.vocab_size:
            raise InputError(f"{path}: {given.vocab_size} tokens, the model has {model_config.vocab_size}")
        separator, text = given.separator, path.read_bytes().decode()
        name = given.library.id_to_token(separator)
    if name in SEPARATORS:  # without one, id 0 separates documents, and may be a word
        config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), name)
    return separator, {"tokenizer.json": text, "tokenizer_config.json": _json(config)}


def _byte_tokenizer() -> dict[str, Any]:
    """Bytes as tokens, under the characters that GPT-2 shows them by; byte 0 comes before every text."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(BYTES, 2 * BYTES))
    vocab_size = {chr(byte if byte in shown else next(hidden)): byte for byte in range(BYTES)}
    vocab_size = {END: 0} | {character: byte for character, byte in vocab_size.items() if byte}
    start = {"SpecialToken": {"id": END, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": END, **flags, "special": True}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first],
            "pair": [start, first, start, second],
            "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
        },
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab_size, "merges": []},
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
