"""The frozen parent of a blockwise training: a Llama's folder, or a sub-model that formfit extracted."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from space import Architecture, InputError, Space
from supernet.extract import read_submodel
from supernet.hf.llama import read_llama
from supernet.training.train import init_digest, is_submodel


@dataclass(frozen=True, eq=False)
class Parent:
    """A trained model.

    Attributes:
        architecture: its architecture.
        weights: by the names of :mod:`space.shapes`, fp32.
        digest: sha256 of its files.
    """

    architecture: Architecture
    weights: dict[str, Tensor]
    digest: str


def open_parent(folder: Path, space: Space) -> Parent:
    """Read the parent of a space.

    Args:
        folder: of a ``LlamaForCausalLM`` or of a sub-model.
        space: a space of one width, of as many slots as the parent has layers.

    Raises:
        InputError: the folder holds neither, or a model of another width, depth or configuration.
    """
    if not is_submodel(folder):
        architecture, weights = read_llama(folder, space)
        return Parent(architecture, weights, init_digest(folder))
    submodel = read_submodel(folder)
    architecture = submodel.architecture
    expected = {"width": space.width[0], "layers": space.slots, **vars(space.config)}
    found = {"width": architecture.width, "layers": len(architecture.layers), **vars(submodel.model_config)}
    wrong = [f"{key} {found[key]} (space: {value})" for key, value in expected.items() if found[key] != value]
    if wrong:
        raise InputError(f"train.init: {folder} does not fit space {space.name}: it has {', '.join(wrong)}")
    weights = {name: value.detach() for name, value in submodel.model().named_parameters()}
    return Parent(architecture, weights, init_digest(folder))
