"""Sub-models: a sub-network taken out of the supernet as a plain model in a folder.

``architecture.json`` says what it is (with the frame of its space, and what it was chosen
for), ``model.safetensors`` holds its weights under the names of :mod:`space.shapes`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from space import Architecture, Frame, InputError
from space.blocks import Model
from space.files import atomic_path, read_json, write_json, write_text
from space.shapes import model_shapes
from supernet.supernet import Supernet

KIND = "sub-model"
MADE_BY = "formfit extract"


@dataclass(frozen=True)
class SubModel:
    """A sub-model's folder, read."""

    folder: Path
    architecture: Architecture
    frame: Frame
    chosen: Mapping[str, Any]  # the limits and predictions it was chosen under

    def model(self) -> Model:
        """The plain model with its weights.

        Raises:
            InputError: the weights are missing, not whole, or of another architecture.
        """
        path = self.folder / "model.safetensors"
        try:
            tensors = load_file(path)
        except (FileNotFoundError, SafetensorError) as error:
            raise InputError(f"{path}: not a whole weights file ({error}); `{MADE_BY}` makes it") from None
        expected = model_shapes(self.architecture, self.frame)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            raise InputError(
                f"{path}: not the weights of architecture {self.architecture.key}: {wrong[0]} is "
                f"{found.get(wrong[0])}, expected {expected.get(wrong[0])} ({len(wrong)} differ)"
            )
        model = Model(self.architecture, self.frame)
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
) -> SubModel:
    """Extract a sub-model into a folder: weights first, then what they are."""
    frame = supernet.space.frame
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(extract(supernet, architecture), temporary)
    body = {
        "key": architecture.key,
        "architecture": architecture.to_json(),
        "frame": vars(frame),
        "space": supernet.space.name,
        "chosen": dict(chosen),
    }
    write_json(folder / "architecture.json", KIND, inputs, body)
    write_text(folder / "README.md", _card(architecture, frame, chosen))
    return read_submodel(folder)


def read_submodel(folder: Path) -> SubModel:
    """Read a sub-model's folder.

    Raises:
        InputError: it is not one, or not whole.
    """
    path = folder / "architecture.json"
    value = read_json(path, KIND, MADE_BY)
    architecture = Architecture.from_json(value["architecture"], f"{path}: architecture")
    if architecture.key != value["key"]:
        raise InputError(f"{path}: key {value['key']}, but its architecture has {architecture.key}")
    try:
        frame = Frame(**value["frame"])
    except TypeError as error:
        raise InputError(f"{path}: frame: {error}") from None
    return SubModel(folder, architecture, frame, value["chosen"])


def _card(architecture: Architecture, frame: Frame, chosen: Mapping[str, Any]) -> str:
    rows = [f"| {slot} | {layer.describe()} |" for slot, layer in enumerate(architecture.layers)]
    limits = "".join(f"- `{item['limit']}`\n" for item in chosen.get("limits", []))
    return (
        f"# Sub-model {architecture.key}\n\n"
        f"A language model found and extracted by formfit: residual width {architecture.width}, "
        f"{architecture.depth} layers, vocabulary {frame.vocabulary}, context {frame.context}.\n\n"
        "| slot | layer: mixer/heads:kv heads@window+ffn size |\n|---|---|\n"
        + "\n".join(rows)
        + "\n\n"
        + (f"Chosen under the limits\n\n{limits}\n" if limits else "")
        + "`architecture.json` holds the architecture and what was predicted of it, `model.safetensors` the "
        "weights, `model.onnx` (where exported) one graph for prefill and decode: inputs `tokens`, "
        "`position` and `state.SLOT.NAME`, outputs `logits` and `state.SLOT.NAME.next`.\n"
    )
