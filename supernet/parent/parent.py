"""Reading of parents.

A parent is a trained causal language model of transformers' families Llama, Qwen2 or Qwen3: a folder with
``config.json`` and safetensors, or a GGUF file. All of it is read as data. Its architecture is equal layers
of attention and an FFN, which compute the same function as the original; what they cannot compute is an
error, never approximated.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from space.architecture import Architecture, ModelConfig
from space.io.artefact import canonical_json, digest, file_digest
from space.io.errors import InputError
from space.shapes import model_shapes
from supernet.parent.folder import TensorOf, folder_tensors, weight_files
from supernet.parent.gguf_file import GgufFile
from supernet.parent.names import transformers_name
from supernet.parent.settings import ParentSettings, read_object, read_settings

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOKENIZER_FILE = "tokenizer.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, eq=False)
class Parent:
    """A trained model as weights of an architecture.

    Attributes:
        folder: the folder, or the GGUF file.
        architecture: equal layers of attention and an FFN, whose size is a multiple of 16; the channels that
            this adds are zero.
        model_config: the settings of the model; ``max_seq_len`` is its context.
        weights: every parameter of :func:`space.shapes.model_shapes` in fp32.
        tokenizer: the ``tokenizer.json`` beside the weights, else the GGUF file; None for a folder without.
        digest: sha256 of the settings and the weights, wherever they are.
        family: transformers' ``model_type``.
    """

    folder: Path
    architecture: Architecture
    model_config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: Path | None
    digest: str
    family: str


def read_parent(path: str | Path) -> Parent:
    """Read a parent.

    Args:
        path: a folder of ``config.json`` and safetensors, or of one GGUF file, or a GGUF file.

    Raises:
        InputError: it is no model, incomplete, or one that is not supported; the message names the feature.
    """
    source = _source(Path(path))
    tensors: Iterable[TensorOf]
    if source.is_dir():
        where = source / "config.json"
        settings, tensors = read_settings(read_object(where), str(where)), folder_tensors(source)
    else:
        gguf = GgufFile(source)
        settings, tensors = read_settings(gguf.settings, str(source)), gguf.tensors()
    model_config, weights = _weights(settings, tensors, source)
    tokenizer: Path | None = (source if source.is_dir() else source.parent) / TOKENIZER_FILE
    if tokenizer and tokenizer.exists():
        _check_tokenizer(tokenizer, model_config.vocab_size)
    else:
        tokenizer = None if source.is_dir() else source
    return Parent(
        folder=source,
        architecture=settings.architecture,
        model_config=model_config,
        weights=weights,
        tokenizer=tokenizer,
        digest=parent_digest(source),
        family=settings.family,
    )


def parent_digest(path: str | Path) -> str:
    """The sha256 of a parent's settings and weights, as 64 hexadecimal digits; the path is not part of it.

    Args:
        path: as for :func:`read_parent`.

    Raises:
        InputError: a file is missing.
    """
    source = _source(Path(path))
    files = {"gguf": source}
    if source.is_dir():
        files = {file.name: file for file in (source / "config.json", *weight_files(source))}
    try:
        return digest(canonical_json({name: file_digest(file) for name, file in files.items()}))
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _source(path: Path) -> Path:
    """The folder of transformers, or the GGUF file."""
    if not path.exists():
        raise InputError(f"{path}: not found; give a folder of config.json and safetensors, or a GGUF file")
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise InputError(f"{path}: holds {len(files)} GGUF files; give one of them, such as {files[0]}")
        return files[0] if files else path
    if path.is_file() and path.suffix != ".gguf":
        raise InputError(f"{path}: no parent; give a folder of config.json and safetensors, or a GGUF file")
    return path


def _weights(
    settings: ParentSettings, tensors: Iterable[TensorOf], source: Path
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The weights, and the model configuration with the head that they show.

    A head that a file has beside ``tie_word_embeddings`` is the model's if it is not the embedding.
    """
    untied = replace(settings.model_config, tie_embeddings=False)
    unpadded = _unpadded(settings.architecture, settings.ffn)
    slots = range(len(unpadded.layers))
    names = {transformers_name(name, slots): name for name in model_shapes(unpadded, untied)}
    shapes = model_shapes(unpadded, untied)
    weights: dict[str, Tensor] = {}
    for path, theirs, tensor in tensors:
        if theirs.endswith("rotary_emb.inv_freq"):
            continue  # a buffer in old folders
        if theirs not in names:
            raise InputError(f"{path}: {theirs} is a weight that {settings.family} models do not have")
        weights[names[theirs]] = _checked(tensor, shapes[names[theirs]], f"{path}: {theirs}")
    tied = settings.model_config.tie_embeddings
    if tied and "head" in weights and "embedding" in weights:
        tied = torch.equal(weights["head"], weights["embedding"])
    if tied:
        weights.pop("head", None)
    model_config = replace(settings.model_config, tie_embeddings=tied)
    wanted = model_shapes(settings.architecture, model_config)
    missing = sorted(theirs for theirs, name in names.items() if name in wanted and name not in weights)
    if missing:
        raise InputError(f"{source}: has no weight {missing[0]} ({len(missing)} are missing)")
    return model_config, {name: _padded(weights[name], shape) for name, shape in wanted.items()}


def _checked(tensor: Tensor, expected: tuple[int, ...], where: str) -> Tensor:
    """A tensor in fp32; an InputError if it has another shape, or values that are no weights."""
    if tuple(tensor.shape) != expected:
        raise InputError(f"{where} is {tuple(tensor.shape)}, its settings say {expected}")
    if tensor.dtype not in FLOAT_TYPES or not tensor.isfinite().all():
        raise InputError(f"{where} holds {tensor.dtype}, expected finite fp32, bf16, fp16 or fp64")
    return tensor.to(torch.float32)


def _unpadded(architecture: Architecture, ffn: int) -> Architecture:
    return replace(architecture, layers=tuple(replace(layer, ffn=ffn) for layer in architecture.layers))


def _padded(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A weight with zeros after its last rows and columns, up to a shape."""
    if weight.shape == shape:
        return weight
    whole = torch.zeros(shape, dtype=weight.dtype)
    whole[tuple(slice(size) for size in weight.shape)] = weight
    return whole


def _check_tokenizer(path: Path, vocab_size: int) -> None:
    """Raise an InputError if a ``tokenizer.json`` has ids that the model does not have."""
    value = read_object(path)
    model = value.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    try:
        listed = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary or ()))
        last = max(map(int, [*listed, *(token["id"] for token in value.get("added_tokens") or ())]))
    except (TypeError, ValueError, KeyError, OverflowError):
        raise InputError(f"{path}: not a Hugging Face tokenizer.json") from None
    if last >= vocab_size:
        raise InputError(f"{path}: has {last + 1} tokens, the model's vocabulary has {vocab_size}")
