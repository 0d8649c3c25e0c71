"""Atomic checkpoints.

A checkpoint is a folder ``step-NNNNNN`` with ``model.safetensors``, ``optimizer.safetensors`` and
``state.json``. The last is written last and holds the hashes of the other two; a folder whose hashes do not
match is ignored.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from space import InputError
from space.io.artefact import Artefact, check_inputs, file_digest
from space.io.config import shown
from space.io.filesystem import try_lock
from supernet.tensors import load_tensors, save_tensors

CHECKPOINT = Artefact("supernet checkpoint", "formfit train")
KEPT_CHECKPOINTS = 2
PARTS = ("model", "optimizer")
LOCK_TIMEOUT_S = 30.0  # the workers of a killed training hold the lock for two or three seconds more
LOCK_POLL_S = 0.1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        folder: the checkpoint's folder.
        step: number of training steps taken.
        digest: sha256 of the weights file.
    """

    folder: Path
    step: int
    digest: str

    def load(self, part: str) -> dict[str, Tensor]:
        """Load the tensors of one part.

        Args:
            part: ``model`` or ``optimizer``.

        Raises:
            InputError: the file is not whole, or holds a value that is not finite.
        """
        return load_tensors(self.folder / f"{part}.safetensors", CHECKPOINT.made_by)

    def load_into(self, module: nn.Module) -> None:
        """Load the weights of a module.

        Args:
            module: of the shapes that were trained.

        Raises:
            InputError: see :meth:`load`; or a tensor is missing, unknown or of another shape.
        """
        tensors, expected = self.load("model"), module.state_dict()
        wrong = sorted(
            name
            for name in tensors.keys() | expected.keys()
            if name not in tensors or name not in expected or tensors[name].shape != expected[name].shape
        )
        if wrong:
            found, wanted = (
                tuple(named[wrong[0]].shape) if wrong[0] in named else None for named in (tensors, expected)
            )
            path = self.folder / "model.safetensors"
            raise InputError(f"{path}: {wrong[0]} is {found}, expected {wanted} ({len(wrong)} differ)")
        module.load_state_dict(tensors)


@contextmanager
def sole_writer(root: Path) -> Iterator[None]:
    """Hold an exclusive lock on a training's folder; the operating system releases it if the process dies.

    Args:
        root: the folder; created if missing.

    Raises:
        InputError: another training still holds the lock after ``LOCK_TIMEOUT_S``.
    """
    root.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        with try_lock(root) as is_held:
            if is_held:
                yield
                return
        if time.monotonic() > deadline:
            raise InputError(f"{root}: another process writes here; wait until it ends")
        time.sleep(LOCK_POLL_S)


def save_checkpoint(
    root: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], inputs: Mapping[str, str]
) -> None:
    """Write a checkpoint, then delete all but the newest ``KEPT_CHECKPOINTS``.

    Args:
        root: the folder of the checkpoints.
        step: number of training steps taken.
        parts: tensors by part and name.
        inputs: sha256 of everything the training depends on, by name.
    """
    folder = root / f"step-{step:06d}"
    shutil.rmtree(folder, ignore_errors=True)
    for part in PARTS:
        tensors = {name: tensor.detach().contiguous() for name, tensor in parts[part].items()}
        save_tensors(folder / f"{part}.safetensors", tensors)
    hashes = {part: file_digest(folder / f"{part}.safetensors") for part in PARTS}
    CHECKPOINT.write(folder / "state.json", inputs, {"step": step, "hashes": hashes})
    for old in _folders(root)[KEPT_CHECKPOINTS:]:
        shutil.rmtree(old, ignore_errors=True)


def _folders(root: Path) -> list[Path]:
    """The checkpoint folders below ``root``, newest first."""
    folders = {int(p.name[5:]): p for p in root.glob("step-*") if p.is_dir() and p.name[5:].isdecimal()}
    return [folders[step] for step in sorted(folders, reverse=True)]


def latest_checkpoint(root: Path, inputs: Mapping[str, str]) -> Checkpoint | None:
    """The newest complete checkpoint; None if there is none.

    Args:
        root: the folder of the checkpoints.
        inputs: sha256 of everything the training depends on, by name.

    Raises:
        InputError: the newest complete checkpoint was made from other inputs, such as another space.
    """
    for folder in _folders(root):
        path = folder / "state.json"
        try:
            state = CHECKPOINT.read(path)
            hashes = {part: file_digest(folder / f"{part}.safetensors") for part in PARTS}
        except (InputError, OSError):
            continue
        if hashes == state.get("hashes"):
            check_inputs(path, state, inputs)
            step = state.get("step")
            if type(step) is not int or step != int(folder.name[5:]):
                raise InputError(f"{path}: its step is {shown(step)}; remove the folder to resume before it")
            return Checkpoint(folder, step, hashes["model"])
    return None
