"""Sub-models: sub-networks extracted from a supernet as plain models, one folder each.

``architecture.json`` holds the architecture, the constants of its space, the limits and predictions it was
chosen under and the text it was trained on. ``model.safetensors`` holds the weights under the names of
:mod:`space.shapes`. ``tokenizer.json`` is there unless the tokens are bytes.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from space import Architecture, InputError, ModelConfig
from space.blocks import Model
from space.io.artefact import Artefact, file_digest, write_bytes, write_text
from space.io.config import parse
from space.shapes import model_shapes
from supernet.data.corpus import DataConfig
from supernet.data.tokenizer import tokenizer_json
from supernet.supernet import Supernet
from supernet.tensors import load_tensors, save_tensors

SUBMODEL = Artefact("sub-model", "formfit extract", schema=2)
ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"


class Text(BaseModel):
    """The text that a sub-model was trained on and is evaluated on.

    Attributes:
        data: the corpus.
        length: tokens per sequence, in training and evaluation.
        windows: sequences of an evaluation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataConfig
    length: int = Field(gt=0)
    windows: int = Field(gt=0)


@dataclass(frozen=True)
class SubModel:
    """A sub-model's folder, as read.

    Attributes:
        folder: the folder.
        architecture: the sub-model's architecture.
        model_config: the constants of its space.
        chosen: limits and predictions that the sub-model was chosen under, as JSON values.
        text: its training text; None if unknown.
        tokenizer_digest: sha256 of ``tokenizer.json``; None if the tokens are bytes.
    """

    folder: Path
    architecture: Architecture
    model_config: ModelConfig
    chosen: Mapping[str, Any]
    text: Text | None = None
    tokenizer_digest: str | None = None

    def tokenizer(self) -> Path | None:
        """The path of the tokenizer's file; None if the tokens are bytes.

        Raises:
            InputError: the file is missing, or differs from the tokenizer of the training.
        """
        if self.tokenizer_digest is None:
            return None
        path = self.folder / TOKENIZER_FILE
        if not path.exists():
            raise InputError(
                f"{path}: missing, and the model cannot read text without it; `{SUBMODEL.made_by}` writes it"
            )
        if file_digest(path) != self.tokenizer_digest:
            raise InputError(
                f"{path}: not the tokenizer that the model was trained with; `{SUBMODEL.made_by}` writes it"
            )
        return path

    def model(self) -> Model:
        """Load the weights into a plain model in evaluation mode.

        Raises:
            InputError: the weights are missing, truncated, or of another architecture.
        """
        path = self.folder / WEIGHTS_FILE
        tensors = load_tensors(path, SUBMODEL.made_by)
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
    """Copy the weights of a sub-network.

    Args:
        supernet: the supernet.
        architecture: an architecture of its space.

    Returns:
        Tensors under the names of :mod:`space.shapes`.
    """
    return {name: view.detach().clone() for name, view in supernet.weights(architecture).items()}


def write_submodel(
    folder: str | Path,
    supernet: Supernet,
    architecture: Architecture,
    inputs: Mapping[str, str],
    chosen: Mapping[str, Any],
    text: Text | None = None,
) -> SubModel:
    """Extract a sub-model into a folder; ``architecture.json`` is written after the weights.

    Args:
        folder: the sub-model's folder; files derived from previous weights are removed.
        supernet: the supernet that holds the weights.
        architecture: an architecture of its space.
        inputs: sha256 of everything the sub-model is made from, by name.
        chosen: limits and predictions that it was chosen under, as JSON values.
        text: the supernet's training text; its tokenizer is copied.

    Returns:
        The sub-model, as read back from the folder.

    Raises:
        InputError: ``folder`` is a file.
    """
    return write_model(
        folder,
        extract(supernet, architecture),
        architecture,
        supernet.space.config,
        inputs,
        chosen,
        space=supernet.space.name,
        text=text,
        tokenizer=text.data.tokenizer if text else None,
    )


def write_model(
    folder: str | Path,
    weights: dict[str, Tensor],
    architecture: Architecture,
    model_config: ModelConfig,
    inputs: Mapping[str, str],
    chosen: Mapping[str, Any],
    *,
    space: str,
    text: Text | None = None,
    tokenizer: Path | None = None,
) -> SubModel:
    """Write weights as a sub-model's folder; ``architecture.json`` is written after the weights.

    Args:
        folder: the sub-model's folder; files derived from previous weights are removed.
        weights: every parameter of :func:`space.shapes.model_shapes`.
        architecture: the architecture.
        model_config: the constants of its space.
        inputs: sha256 of everything the sub-model is made from, by name.
        chosen: limits and predictions that it was chosen under, as JSON values.
        space: name of its space.
        text: its training text.
        tokenizer: its ``tokenizer.json``, which is copied, or a GGUF file; None if the tokens are bytes.

    Returns:
        The sub-model, as read back from the folder.

    Raises:
        InputError: ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; give a sub-model's folder, an empty one, or a new path")
    remove_derived(folder)
    if tokenizer:
        write_bytes(folder / TOKENIZER_FILE, tokenizer_json(tokenizer))
    save_tensors(folder / WEIGHTS_FILE, weights)
    body = {
        "key": architecture.key,
        "architecture": architecture.to_json(),
        "model_config": model_config.to_json(),
        "space": space,
        "chosen": dict(chosen),
        "text": text.model_dump(mode="json") if text else None,
        "tokenizer": file_digest(folder / TOKENIZER_FILE) if tokenizer else None,
    }
    SUBMODEL.write(folder / ARCHITECTURE_FILE, inputs, body)
    write_text(folder / "README.md", _card(architecture, model_config, chosen))
    return read_submodel(folder)


def remove_derived(folder: Path) -> None:
    """Remove files that were derived from a sub-model's previous weights, such as exports and verifications.

    Args:
        folder: the sub-model's folder.
    """
    shutil.rmtree(folder / "hf", ignore_errors=True)
    names = (ARCHITECTURE_FILE, "verify.json", "kit.json", TOKENIZER_FILE)
    for old in [*folder.glob("model*.onnx"), *(folder / name for name in names)]:
        old.unlink(missing_ok=True)


def read_submodel(folder: Path) -> SubModel:
    """Read a sub-model's folder; weights are loaded by :meth:`SubModel.model`.

    Args:
        folder: the folder.

    Raises:
        InputError: the folder holds no sub-model, or an incomplete one.
    """
    path = folder / ARCHITECTURE_FILE
    value = SUBMODEL.read(path)
    missing = [name for name in ("architecture", "key", "model_config", "chosen") if name not in value]
    if missing:
        raise InputError(f"{path}: has no {missing[0]}; `{SUBMODEL.made_by}` writes it")
    architecture = Architecture.from_json(value["architecture"], f"{path}: architecture")
    if architecture.key != value["key"]:
        raise InputError(f"{path}: key {value['key']}, but its architecture has {architecture.key}")
    model_config = ModelConfig.from_json(value["model_config"], f"{path}: model_config")
    text = value.get("text") and parse(Text, value["text"], f"{path}: text")
    return SubModel(folder, architecture, model_config, value["chosen"], text, value.get("tokenizer"))


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
        + "`architecture.json` holds the architecture and its predicted costs, `model.safetensors` the "
        "weights, `model.onnx` (if exported) one graph for prefill and decode: inputs `tokens`, "
        "`position` and `state.SLOT.NAME`, outputs `logits` and `state.SLOT.NAME.next`; `model.int8.onnx` "
        "the same with 8-bit weights, and `hf/` the model for transformers. `formfit generate` runs it.\n"
    )
