"""Sub-models: a sub-network taken out of the supernet as a plain model in a folder.

``architecture.json`` says what it is (with the frame of its space, what it was chosen for, and the
text that it was trained on), ``model.safetensors`` holds its weights under the names of
:mod:`space.shapes`, and ``tokenizer.json`` stands beside them where bytes are not the tokens.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from space import Architecture, InputError, ModelConfig
from space.blocks import Model
from space.io.artefact import Artefact, atomic_path, file_digest, write_bytes, write_text
from space.io.config import parse
from space.shapes import model_shapes
from supernet.data.corpus import DataConfig
from supernet.supernet import Supernet

SUBMODEL = Artefact("sub-model", "formfit extract", schema=2)
TOKENIZER = "tokenizer.json"
MADE_BY = "formfit extract"


class Text(BaseModel):
    """The text that a sub-model was trained on, and is judged by."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataConfig
    length: int = Field(gt=0)  # tokens of a sequence, in training and in an evaluation
    windows: int = Field(gt=0)  # sequences of an evaluation


@dataclass(frozen=True)
class SubModel:
    """A sub-model's folder, read."""

    folder: Path
    architecture: Architecture
    model_config: ModelConfig
    chosen: Mapping[str, Any]  # the limits and predictions it was chosen under
    text: Text | None = None  # None: unknown
    tokenizer_digest: str | None = None  # of its tokenizer.json; None: bytes are the tokens

    def tokenizer(self) -> Path | None:
        """The tokenizer's file, beside the weights; None where bytes are the tokens.

        Raises:
            InputError: it is missing, or another than the model was trained with.
        """
        if self.tokenizer_digest is None:
            return None
        path = self.folder / TOKENIZER
        if not path.exists():
            raise InputError(
                f"{path}: missing, and the model cannot read text without it; `{MADE_BY}` writes it"
            )
        if file_digest(path) != self.tokenizer_digest:
            raise InputError(
                f"{path}: not the tokenizer that the model was trained with; `{MADE_BY}` writes it"
            )
        return path

    def model(self) -> Model:
        """The plain model with its weights.

        Raises:
            InputError: the weights are missing, not whole, or of another architecture.
        """
        path = self.folder / "model.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a whole weights file ({error}); `{MADE_BY}` makes it") from None
        expected = model_shapes(self.architecture, self.model_config)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            raise InputError(
                f"{path}: not the weights of architecture {self.architecture.key}: {wrong[0]} is "
                f"{found.get(wrong[0])}, expected {expected.get(wrong[0])} ({len(wrong)} differ)"
            )
        model = Model(self.architecture, self.model_config)
        model.load_state_dict(tensors)
        return model.requires_grad_(False).eval()


def extract(supernet: Supernet, architecture: Architecture) -> dict[str, Tensor]:
    """Copies of an architecture's weights, named as in its sub-model."""
    return {name: view.detach().clone() for name, view in supernet.weights(architecture).items()}


def write_submodel(
    folder: Path,
    supernet: Supernet,
    architecture: Architecture,
    inputs: Mapping[str, str],
    chosen: Mapping[str, Any],
    text: Text | None = None,
) -> SubModel:
    """Extract a sub-model into a folder: weights first, then what they are.

    Args:
        folder: the sub-model's.
        supernet: that holds its weights.
        architecture: which of its members.
        inputs: the hashes of what it is made from.
        chosen: the limits and predictions it was chosen under.
        text: what the supernet was trained on; its tokenizer is copied.

    Raises:
        InputError: the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; give one that is a sub-model's, empty or not there")
    remove_derived(folder)
    model_config = supernet.space.config
    tokenizer = text.data.tokenizer if text else None
    if tokenizer:
        write_bytes(folder / TOKENIZER, tokenizer.read_bytes())
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(extract(supernet, architecture), temporary)
    body = {
        "key": architecture.key,
        "architecture": architecture.to_json(),
        "model_config": vars(model_config),
        "space": supernet.space.name,
        "chosen": dict(chosen),
        "text": text.model_dump(mode="json") if text else None,
        "tokenizer": file_digest(folder / TOKENIZER) if tokenizer else None,
    }
    SUBMODEL.write(folder / "architecture.json", inputs, body)
    write_text(folder / "README.md", _card(architecture, model_config, chosen))
    return read_submodel(folder)


def remove_derived(folder: Path) -> None:
    """Remove what was made of the weights that a folder had: it would speak of another model."""
    shutil.rmtree(folder / "hf", ignore_errors=True)
    names = ("architecture.json", "verify.json", "kit.json", TOKENIZER)
    for old in [*folder.glob("model*.onnx"), *(folder / name for name in names)]:
        old.unlink(missing_ok=True)


def read_submodel(folder: Path) -> SubModel:
    """Read a sub-model's folder.

    Raises:
        InputError: it is not one, or not whole.
    """
    path = folder / "architecture.json"
    value = SUBMODEL.read(path)
    missing = [name for name in ("architecture", "key", "model_config", "chosen") if name not in value]
    if missing:
        raise InputError(f"{path}: has no {missing[0]}; `{MADE_BY}` writes it")
    architecture = Architecture.from_json(value["architecture"], f"{path}: architecture")
    if architecture.key != value["key"]:
        raise InputError(f"{path}: key {value['key']}, but its architecture has {architecture.key}")
    model_config = _frame(value["model_config"], f"{path}: frame")
    text = value.get("text") and parse(Text, value["text"], f"{path}: text")
    return SubModel(folder, architecture, model_config, value["chosen"], text, value.get("tokenizer"))


def _frame(value: Any, where: str) -> ModelConfig:
    """What a space fixes, read.

    Raises:
        InputError: a field is missing, unknown or of another type.
    """
    known = {field.name: field.type for field in fields(ModelConfig)}
    if not isinstance(value, dict) or set(value) != set(known):
        raise InputError(f"{where}: expected an object with {', '.join(known)}")
    for name, kind in known.items():
        if type(value[name]) is not kind or (kind is int and value[name] < 1):
            raise InputError(f"{where}.{name}: {value[name]!r} is not what it should be")
    return ModelConfig(**value)


def _card(architecture: Architecture, model_config: ModelConfig, chosen: Mapping[str, Any]) -> str:
    rows = [f"| {slot} | {layer.describe()} |" for slot, layer in enumerate(architecture.layers)]
    limits = "".join(f"- `{item['limit']}`\n" for item in chosen.get("limits", []))
    return (
        f"# Sub-model {architecture.key}\n\n"
        f"A language model found and extracted by formfit: residual width {architecture.width}, "
        f"{architecture.depth} layers, vocabulary {model_config.vocab_size}, "
        f"context {model_config.max_seq_len}.\n\n"
        "| slot | layer: mixer/heads:kv heads@window+ffn size |\n|---|---|\n"
        + "\n".join(rows)
        + "\n\n"
        + (f"Chosen under the limits\n\n{limits}\n" if limits else "")
        + "`architecture.json` holds the architecture and what was predicted of it, `model.safetensors` the "
        "weights, `model.onnx` (where exported) one graph for prefill and decode: inputs `tokens`, "
        "`position` and `state.SLOT.NAME`, outputs `logits` and `state.SLOT.NAME.next`; `model.int8.onnx` "
        "the same in eight bits, and `hf/` the model for transformers. `formfit generate` runs it.\n"
    )
