"""The library: every block of every slot as one file, fitted by one task a layer.

A file's name holds a digest of all that its content depends on, and it is written atomically: a run that was
stopped goes on with the blocks that are missing, and a space that gained a choice fits only that one. A task
computes with one thread and draws from a generator seeded by slot and block, so that the files are the same
with any number of workers. (On another CPU or another version of torch, last digits differ.)
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from space import Architecture, Space
from space.attention.projection import rms_norm
from space.blocks import initial
from space.io.artefact import atomic_path, canonical_json, digest
from supernet.blockwise.block import Block
from supernet.blockwise.candidates import Candidate, candidates
from supernet.blockwise.capture import parent_blocks, read_boundary, read_layer
from supernet.blockwise.fit import Fitted, Recipe, Rows, batches, fit, moments
from supernet.blockwise.ridge import Moments, elimination_order
from supernet.blockwise.start import (
    SOFTMAX_MIXERS,
    Measured,
    constant_direction,
    mean_distances,
    start_ffn,
    start_mixer,
)
from supernet.training.trials import Share, one_thread

FORMAT = 1  # of the files and of the way they are made; another number makes all of them anew
MEASURED_TOKENS = 16384  # by which heads are chosen and gates are started
DISTANCE_WINDOWS = 2


@dataclass(frozen=True, kw_only=True)
class LibraryPlan:
    """Everything that the tasks of a library need; small, so that it can be sent to workers.

    Attributes:
        space: a space with ``sharing: block``.
        architecture: the parent's.
        recipe: settings of the fits.
        seed: of the batches and of random weights.
        held_out: number of last captured windows that are not fitted.
        made_from: digests of the parent and of the captured windows, by name.
        folder: of the block files.
        capture: folder of the captured boundaries.
        parent: file of the parent's weights.
    """

    space: Space
    architecture: Architecture
    recipe: Recipe
    seed: int
    held_out: int
    made_from: dict[str, str]
    folder: Path
    capture: Path
    parent: Path

    def slot_candidates(self, slot: int) -> list[Candidate]:
        """The choices of a slot.

        Args:
            slot: the slot.
        """
        return candidates(self.space, self.architecture, slot)

    @cached_property
    def _base(self) -> str:
        recipe = {**vars(self.recipe), "dtype": str(self.recipe.dtype)}
        return canonical_json(
            {
                "format": FORMAT,
                "recipe": recipe,
                "seed": self.seed,
                "constants": self.space.config.to_json(),
                **self.made_from,
            }
        )

    def path(self, candidate: Candidate) -> Path:
        """The file of a block.

        Args:
            candidate: the choice.
        """
        key = digest(f"{self._base}/{candidate.slot}/{candidate.name}")
        return self.folder / f"{candidate.slot:03d}-{candidate.name}-{key[:16]}.safetensors"

    def missing(self, slot: int) -> list[Candidate]:
        """The choices of a slot without a file.

        Args:
            slot: the slot.
        """
        return [one for one in self.slot_candidates(slot) if not self.path(one).exists()]


@dataclass(frozen=True)
class Entry:
    """A fitted block's errors and size.

    Attributes:
        slot: the slot.
        candidate: the choice's name.
        parameters: number of parameters.
        start_error: held-out error before the first step: squared error of the contribution over the
            square of the parent's contribution.
        error: held-out error of the weights.
        steps: steps that were taken.
    """

    slot: int
    candidate: str
    parameters: int
    start_error: float
    error: float
    steps: int


def read_entry(path: Path) -> Entry:
    """The errors and size of a block's file.

    Args:
        path: the file.

    Raises:
        SafetensorError: the file is damaged.
    """
    with safe_open(path, framework="pt") as file:
        return Entry(**json.loads(file.metadata()["entry"]))


def read_block(path: Path) -> dict[str, Tensor]:
    """The weights of a block's file, by name.

    Args:
        path: the file.
    """
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def remove_damaged(paths: Iterable[Path]) -> None:
    """Delete block files that cannot be read, such as after a power failure.

    Args:
        paths: of block files, which may be missing.
    """
    for path in paths:
        try:
            read_entry(path)
        except FileNotFoundError:
            pass
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            path.unlink()


def fit_layer(slot: int, plan: LibraryPlan, tell: Share) -> None:
    """Fit the blocks of a slot that have no file.

    Args:
        slot: the slot.
        plan: of the library.
        tell: called with the share that is done.
    """
    left = plan.missing(slot)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with one_thread():
            layer = _LayerFits(slot, plan)
            for i, candidate in enumerate(left):

                def tell_step(share: float, i: int = i) -> None:
                    tell((i + share) / len(left))

                tell_step(0.0)
                _write(plan.path(candidate), candidate, layer.fitted(candidate, tell_step))
    finally:
        torch.use_deterministic_algorithms(deterministic)
    tell(1.0)


def _write(path: Path, candidate: Candidate, fitted: Fitted) -> None:
    entry = Entry(
        slot=candidate.slot,
        candidate=candidate.name,
        parameters=sum(value.numel() for value in fitted.weights.values()),
        start_error=fitted.start_error,
        error=fitted.error,
        steps=fitted.steps,
    )
    tensors = {name: value.detach().contiguous() for name, value in fitted.weights.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"entry": canonical_json(vars(entry))})


class _LayerFits:
    """The inputs, targets and measurements that the fits of a slot share; each is made when first used."""

    def __init__(self, slot: int, plan: LibraryPlan) -> None:
        self.plan, config = plan, plan.space.config
        self.width = plan.architecture.width
        self.x = read_boundary(plan.capture, slot)
        self.weights = read_layer(plan.parent, slot)
        self.blocks = parent_blocks(plan.architecture, slot, config)
        self.config = config

    def fitted(self, candidate: Candidate, tell: Share) -> Fitted:
        """The fitted block of a choice."""
        part = "ffn" if candidate.is_ffn else "mixer"
        if candidate.is_parents:
            return Fitted(self.weights[part], 0.0, 0.0, 0)
        block = candidate.block(self.width, self.config)
        seed = int(digest(f"{self.plan.seed}/{candidate.slot}/{candidate.name}")[:12], 16)
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        if part not in self.blocks or not self._rows(part).target.any():
            # The parent adds nothing; the zeros that an output matrix starts with are exact.
            return Fitted(_zero_block(block, generator), 0.0, 0.0, 0)
        if candidate.is_ffn:
            return self._fit_ffn(block, rng, tell)
        parent = self.blocks["mixer"]
        weights, taken = start_mixer(block, parent, self.weights["mixer"], self.measured, generator)
        return fit(block, weights, taken, self.mixer_rows, self.plan.recipe, rng, tell)

    def _rows(self, part: str) -> Rows:
        return self.ffn_rows if part == "ffn" else self.mixer_rows

    def _fit_ffn(self, block: Block, rng: np.random.Generator, tell: Share) -> Fitted:
        fitted, held_out, order = self.ffn_moments
        weights = start_ffn(block, self.weights["ffn"], order)
        kept = torch.tensor(order[: block.layer.ffn])
        return fit(
            block, weights, frozenset(weights), self.ffn_rows, self.plan.recipe, rng, tell,
            fitted=fitted.leading(kept), held_out=held_out.leading(kept),
        )  # fmt: skip

    @cached_property
    @torch.no_grad()
    def mixer_rows(self) -> Rows:
        """Inputs of the mixer, and contributions of the parent's mixer."""
        return Rows(self.x, self._contributions("mixer", self.x), self.plan.held_out)

    @cached_property
    @torch.no_grad()
    def ffn_rows(self) -> Rows:
        """Inputs of the FFN, and contributions of the parent's FFN."""
        x = self.x
        if "mixer" in self.blocks:
            x = self.mixer_rows.target + x.float()
        return Rows(x, self._contributions("ffn", x), self.plan.held_out)

    def _contributions(self, part: str, x: Tensor) -> Tensor:
        """Contributions of a block of the parent on windows [N, T, W], fp32."""
        block, weights = self.blocks[part], self.weights[part]
        return torch.cat([block.contribution(weights, x[rows].float()) for rows in batches(x)])

    @cached_property
    @torch.no_grad()
    def measured(self) -> Measured:
        """Measurements of the parent's mixer."""
        block, weights = self.blocks["mixer"], self.weights["mixer"]
        count = max(1, MEASURED_TOKENS // self.x.shape[1])
        x = self.x[: min(count, self.mixer_rows.fitted)].float()
        square = torch.zeros(self.width, self.width, dtype=torch.float64)
        total = torch.zeros(self.width, dtype=torch.float64)
        for rows in batches(x):
            hidden = rms_norm(x[rows], weights["pre_norm"], self.config.norm_eps).flatten(0, 1)
            square += hidden.T @ hidden
            total += hidden.double().sum(0)
        tokens = x.shape[0] * x.shape[1]
        own = None
        if block.layer.heads:
            own = moments(block, weights, self.mixer_rows, slice(0, len(x)))
        softmax = block.layer.mixer in SOFTMAX_MIXERS
        distances = mean_distances(block, weights, x[:DISTANCE_WINDOWS]) if softmax else None
        return Measured(constant_direction(square / tokens, total / tokens), square / tokens, own, distances)

    @cached_property
    def ffn_moments(self) -> tuple[Moments, Moments, list[int]]:
        """The moments of the parent's FFN on fitted and on held-out windows, and its channels in order."""
        block, weights, rows = self.blocks["ffn"], self.weights["ffn"], self.ffn_rows
        fitted = moments(block, weights, rows, slice(0, rows.fitted))
        held_out = moments(block, weights, rows, slice(rows.fitted, None))
        return fitted, held_out, elimination_order(fitted.gram, weights["down"])


def _zero_block(block: Block, generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights of a block that adds nothing."""
    part, mixer = ("ffn", "") if block.is_ffn else ("mixer", block.layer.mixer)
    return {
        name: initial(f"layers.0.{part}.{name}", shape, generator, mixer=mixer)
        for name, shape in block.shapes.items()
    }
