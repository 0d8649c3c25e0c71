"""Entry point of blockwise training: capture, library, scores and checkpoint, each resumable.

The checkpoint is written last, so a folder with a checkpoint is complete.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from space import InputError, Space
from space.io.artefact import Artefact, canonical_json, digest
from space.io.parquet import write_table
from space.io.progress import Stage
from supernet.blockwise.capture import (
    boundary_bytes,
    boundary_path,
    capture,
    capture_windows,
    remove_capture,
    write_parent,
)
from supernet.blockwise.fit import Recipe
from supernet.blockwise.library import LibraryPlan, fit_layer, read_block, read_entry, remove_damaged
from supernet.blockwise.parent import Parent, open_parent
from supernet.blockwise.scores import read_scores, score_layer, score_table, scores_path
from supernet.blockwise.tasks import Shared, run_layers
from supernet.data.corpus import Corpus, load_corpus, require_fits
from supernet.evaluate import EvaluationSet, evaluation_set
from supernet.supernet import supernet_shapes
from supernet.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint, sole_writer
from supernet.training.parallel import ray_session
from supernet.training.precision import matrix_type
from supernet.training.recipe import TrainConfig
from supernet.training.train import training_inputs
from supernet.training.trials import Share

LIBRARY = Artefact("block library", "formfit train")
SCORES = Artefact("block scores", "formfit train")
CAPTURE_SHARE, FIT_SHARE = 0.05, 0.85  # of the progress, after the capture and after the fits
SPARE_BYTES = 2**27  # left free on disk and in memory


def train_blocks(
    space: Space, config: TrainConfig, root: str | Path, report: Stage, corpus: Corpus | None = None
) -> Checkpoint:
    """Fit every block of a space to a frozen parent; a complete training returns at once.

    Args:
        space: a space with ``sharing: block``.
        config: the training settings, of method blockwise.
        root: the folder for the checkpoint, ``library.parquet``, ``scores.parquet`` and ``blocks/``.
        report: shows the progress.
        corpus: the training text; None loads ``config.data``.

    Returns:
        The checkpoint; :func:`supernet.training.train.load_supernet` reads it.

    Raises:
        InputError: the space shares parameters, the parent or the text does not fit it, the machine has too
            little disk or memory, or the folder holds another training.
    """
    if config.init is None or space.sharing != "block":
        raise InputError(
            f"train.method: blockwise needs a parent (train.init) and a space with sharing: block; "
            f"space {space.name} has sharing: {space.sharing}"
        )
    root, corpus = Path(root).resolve(), corpus or load_corpus(config.data)
    inputs = training_inputs(space, config, corpus)
    with sole_writer(root):
        checkpoint = latest_checkpoint(root, inputs)
        if checkpoint is None:
            torch.set_num_threads(config.threads or torch.get_num_threads())
            _train(space, config, root, inputs, corpus, open_parent(config.init, space), report)
            checkpoint = latest_checkpoint(root, inputs)
    if checkpoint is None:
        raise RuntimeError(f"{root}: the checkpoint just written cannot be read back")
    return checkpoint


def _train(
    space: Space,
    config: TrainConfig,
    root: Path,
    inputs: Mapping[str, str],
    corpus: Corpus,
    parent: Parent,
    report: Stage,
) -> None:
    """Run the stages."""
    length = config.length or space.max_seq_len
    if length > space.max_seq_len:
        raise InputError(f"train.length: {length} is more than the space's max_seq_len {space.max_seq_len}")
    require_fits(corpus, space.vocab_size, length)
    windows, held_out = capture_windows(corpus, config.blockwise.tokens, length)
    scored = config.blockwise.score_windows
    data = evaluation_set(corpus, scored, length) if scored else None
    plan = make_plan(space, config, root / "blocks", parent, windows, held_out)
    remove_damaged(plan.path(one) for slot in range(space.slots) for one in plan.slot_candidates(slot))
    missing = [slot for slot in range(space.slots) if plan.missing(slot)]
    boundaries = require_room(plan, parent, windows, config, len(missing))
    write_parent(plan.parent, parent.weights, parent.digest)
    parent.weights.clear()  # from here on read from the file, a layer at a time
    stages = Stages(plan, windows, config, report)
    with ray_session(config.workers) if config.workers else nullcontext():  # one session for all stages
        stages.fit(missing, boundaries)
        remove_capture(plan.capture)
        if data is not None:
            stages.score(data)
    if data is not None:
        scores = [one for slot in range(space.slots) for one in read_scores(scores_path(plan, slot, data))]
        write_table(root / "scores.parquet", SCORES, inputs, score_table(scores))
    paths = [plan.path(one) for slot in range(space.slots) for one in plan.slot_candidates(slot)]
    write_table(root / "library.parquet", LIBRARY, inputs, library_table(paths))
    _write_checkpoint(plan, config.steps, root, inputs)


def make_plan(
    space: Space,
    config: TrainConfig,
    folder: Path,
    parent: Parent,
    windows: NDArray[np.int64],
    held_out: int,
) -> LibraryPlan:
    """The plan of a library.

    Args:
        space: a space with ``sharing: block``.
        config: the training settings.
        folder: of the block files and of what they are made from.
        parent: the parent.
        windows: captured token ids [N, T].
        held_out: number of last windows that are not fitted.

    Raises:
        InputError: a choice is larger than the parent's.
    """
    made_from = {
        "parent": parent.digest,
        "windows": digest(windows.tobytes() + str(windows.shape).encode()),
        "held_out": str(held_out),
        "storage": config.blockwise.storage,
    }
    folder = folder.resolve()
    plan = LibraryPlan(
        space=space,
        architecture=parent.architecture,
        recipe=Recipe(
            steps=config.steps,
            batch=config.batch,
            rate=config.learning_rate,
            inherited_rate=config.blockwise.inherited_rate,
            dtype=matrix_type(config),
        ),
        seed=config.seed,
        held_out=held_out,
        made_from=made_from,
        folder=folder,
        capture=folder / f"capture-{digest(canonical_json(made_from))[:16]}",
        parent=folder / "parent.safetensors",
    )
    for slot, own in enumerate(parent.architecture.layers):
        for one in plan.slot_candidates(slot):
            if own.ffn and one.layer.ffn > own.ffn:
                raise InputError(f"layer.ffn: {one.layer.ffn} is more than the parent's {own.ffn}")
            if own.heads and one.layer.heads > own.heads:
                raise InputError(f"layer.heads: {one.layer.heads} is more than the parent's {own.heads}")
    return plan


def require_room(
    plan: LibraryPlan, parent: Parent, windows: NDArray[np.int64], config: TrainConfig, layers: int
) -> int:
    """Check disk and memory before the work.

    Args:
        plan: of the library.
        parent: the parent.
        windows: captured token ids [N, T].
        config: the training settings.
        layers: number of layers with missing blocks.

    Returns:
        Number of boundaries that fit on disk at once, at most the number of slots.

    Raises:
        InputError: the disk or the memory is too small; the message says what is needed and what is there.
    """
    width, slots = parent.architecture.width, plan.space.slots
    library = 4 * sum(int(np.prod(shape)) for shape in supernet_shapes(plan.space).values())
    files = [plan.path(one) for slot in range(slots) for one in plan.slot_candidates(slot)]
    there = sum(path.stat().st_size for path in (plan.parent, *files) if path.exists())
    parents = sum(value.nbytes for value in parent.weights.values())
    boundary = boundary_bytes(windows, width, config.blockwise.storage)
    fixed = max(0, library + parents - there) + library  # block files, and the checkpoint made of them
    plan.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(plan.folder).free - SPARE_BYTES
    on_disk = min(slots, (free - fixed) // boundary - 1) if layers else slots
    if on_disk < 1:
        raise InputError(
            f"{plan.folder}: blockwise training needs {_gigabytes(fixed + 2 * boundary)} of disk "
            f"({_gigabytes(fixed)} for the blocks, {_gigabytes(boundary)} a layer of activations), "
            f"{_gigabytes(free)} are free"
        )
    tasks = max(1, min(config.workers, layers))
    needed = max(tasks * task_bytes(plan, windows), library)
    available = available_memory()
    if available is not None and needed > available - SPARE_BYTES:
        raise InputError(
            f"blockwise training needs {_gigabytes(needed)} of memory for {tasks} layers at a time, "
            f"{_gigabytes(available)} are available; give fewer train.blockwise.tokens or train.workers"
        )
    return int(on_disk)


def task_bytes(plan: LibraryPlan, windows: NDArray[np.int64]) -> int:
    """Memory of one layer's task, in bytes, rounded up generously.

    Args:
        plan: of the library.
        windows: captured token ids [N, T].
    """
    width, space = plan.architecture.width, plan.space
    inner = max(max(space.ffn_options), width)
    rows = 3 * 4 * windows.size * width  # inputs of the FFN, contributions of mixer and FFN
    step = 4 * plan.recipe.batch * windows.shape[1] * (12 * inner + 40 * width)  # activations of a step
    moments = 8 * 5 * inner * (inner + width)
    return int(rows + step + moments) + 2**28  # and torch itself


def available_memory() -> int | None:
    """Memory that programs can take without swapping, in bytes; None if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


@dataclass(frozen=True)
class Stages:
    """The long stages, with their progress."""

    plan: LibraryPlan
    windows: NDArray[np.int64]
    config: TrainConfig
    report: Stage

    def fit(self, missing: list[int], boundaries: int) -> None:
        """Capture and fit the layers with missing blocks.

        Args:
            missing: their slots.
            boundaries: number of layers whose inputs fit on disk at once.
        """
        plan, part = self.plan, (FIT_SHARE - CAPTURE_SHARE) / max(1, len(missing))

        # The parent's own blocks are copied at once, and say nothing of the time that fits take.
        to_fit = {slot: [one for one in plan.missing(slot) if not one.is_parents] for slot in missing}

        def share_of(slot: int) -> float:
            done = sum(plan.path(one).exists() for one in to_fit[slot])
            return done / max(1, len(to_fit[slot]))

        for start in range(0, len(missing), boundaries):
            group = missing[start : start + boundaries]
            for slot in group:
                self._capture(slot, group)
            begin = CAPTURE_SHARE + part * start
            self._run(fit_layer, group, plan, "fitted", share_of, (begin, begin + part * len(group)))

    def score(self, data: EvaluationSet) -> None:
        """Score the layers without a file of scores.

        Args:
            data: held-out sequences.
        """
        slots = range(self.plan.space.slots)
        missing = [slot for slot in slots if not scores_path(self.plan, slot, data).exists()]
        self._run(score_layer, missing, (self.plan, data), "scored", lambda slot: 0.0, (FIT_SHARE, 1.0))

    def _capture(self, slot: int, group: Iterable[int]) -> None:
        """Write what enters a slot; boundaries below that no slot of the group needs are deleted."""
        plan, slots = self.plan, self.plan.space.slots
        there = [below for below in range(slot + 1) if boundary_path(plan.capture, below).exists()]
        for below in range(max(there, default=-1) + 1, slot + 1):
            self.report(CAPTURE_SHARE * below / slots, f"the parent reads the text, layer {below} of {slots}")
            capture(
                plan.capture, plan.parent, plan.architecture, plan.space.config, self.windows, below,
                self.config.blockwise.storage,
            )  # fmt: skip
            for old in range(below):
                if old not in group:
                    boundary_path(plan.capture, old).unlink(missing_ok=True)

    def _run(
        self,
        work: Callable[[int, Shared, Share], None],
        slots: list[int],
        shared: Shared,
        done: str,
        share_of: Callable[[int], float],
        shares: tuple[float, float],
    ) -> None:
        """Run one task a layer, as a stage from one share of the progress to another."""
        begin, end = shares

        def stage(share: float, text: str) -> None:
            self.report(begin + (end - begin) * share, text)

        run_layers(work, slots, shared, self.config.workers, stage, f"layers {done}", share_of)


def library_table(paths: Iterable[Path]) -> pd.DataFrame:
    """The errors of block files as a table of one row each.

    Args:
        paths: of the files.
    """
    table = pd.DataFrame([vars(read_entry(path)) for path in paths])
    return table.astype({"slot": np.int32, "parameters": np.int64, "steps": np.int32})


def _write_checkpoint(plan: LibraryPlan, step: int, root: Path, inputs: Mapping[str, str]) -> None:
    """Write the supernet that the block files and the parent's ends make."""
    from safetensors import safe_open

    tensors = {}
    with safe_open(plan.parent, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if not name.startswith("layers."):
                tensors[name] = file.get_tensor(name)
    for slot in range(plan.space.slots):
        for one in plan.slot_candidates(slot):
            for leaf, value in read_block(plan.path(one)).items():
                tensors[f"layers.{slot}.{one.name}.{leaf}"] = value
    save_checkpoint(root, step, {"model": tensors, "optimizer": {}}, inputs)
