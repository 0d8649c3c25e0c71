"""The frozen parent of a blockwise training: a model of transformers', or a sub-model of formfit's."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from space import Architecture, InputError, Space
from supernet.extract import read_submodel
from supernet.parent import read_parent
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
        folder: a parent as :func:`supernet.parent.read_parent` reads it, or a sub-model's folder.
        space: a space of one width, of as many slots as the parent has layers.

    Raises:
        InputError: it is neither, or a model of another width, depth or configuration.
    """
    if is_submodel(folder):
        submodel = read_submodel(folder)
        architecture, model_config = submodel.architecture, submodel.model_config
        weights = {name: value.detach() for name, value in submodel.model().named_parameters()}
    else:
        parent = read_parent(folder)
        architecture, model_config, weights = parent.architecture, parent.model_config, parent.weights
    expected = {"width": space.width[0], "layers": space.slots, **vars(space.config)}
    found = {"width": architecture.width, "layers": len(architecture.layers), **vars(model_config)}
    if found["max_seq_len"] > space.max_seq_len:  # a shorter context is fine
        found["max_seq_len"] = space.max_seq_len
    wrong = [f"{key} {found[key]} (space: {value})" for key, value in expected.items() if found[key] != value]
    if wrong:
        raise InputError(f"train.init: {folder} does not fit space {space.name}: it has {', '.join(wrong)}")
    return Parent(architecture, weights, init_digest(folder))
