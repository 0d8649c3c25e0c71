"""Scores: the parent with one block replaced, judged on held-out text.

A score is KL(parent || child), the mean over tokens in nats, beside the child's loss on all targets and on
those that can be recalled from the context. The layers below the replaced block are run once a slot, those
above it once a choice; the logits are made for a few tokens at a time, the parent's once for all choices of
a slot, so that a large vocabulary fits into memory.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from space.attention.projection import project, rms_norm
from space.io.artefact import canonical_json, digest, write_text
from supernet.blockwise.block import Block, Weights
from supernet.blockwise.candidates import Candidate
from supernet.blockwise.capture import parent_blocks
from supernet.blockwise.library import LibraryPlan, read_block
from supernet.data.mqar import IGNORED
from supernet.evaluate import EvaluationSet, evaluation_digest
from supernet.training.trials import Share, one_thread

LOGITS = 2**24  # elements of logits at a time: 64 MB each of the parent's and a child's
BATCH_WINDOWS = 4


@dataclass(frozen=True)
class Score:
    """The parent with one block replaced.

    Attributes:
        slot: the slot.
        candidate: name of the block that stands there; ``none`` or ``ffn-0`` if it is left out.
        kl: KL(parent || child), in nats per token.
        loss_nats: mean loss over all targets, in nats per token.
        recall_loss_nats: mean loss over the targets that can be recalled from the context; None without any.
    """

    slot: int
    candidate: str
    kl: float
    loss_nats: float
    recall_loss_nats: float | None


@dataclass(frozen=True)
class Replacement:
    """The replacement of one of the parent's blocks.

    Attributes:
        part: the block that is replaced, ``mixer`` or ``ffn``.
        candidate: what stands there; None if nothing does.
    """

    part: str
    candidate: Candidate | None

    @property
    def name(self) -> str:
        """Name of the choice; ``none`` for no mixer, ``ffn-0`` for no FFN."""
        if self.candidate:
            return self.candidate.name
        return "none" if self.part == "mixer" else "ffn-0"


def replacements(plan: LibraryPlan, slot: int) -> list[Replacement]:
    """The replacements that are scored at a slot: all choices, and no block where the space allows it.

    Args:
        plan: of the library.
        slot: the slot.
    """
    space = plan.space
    made = [Replacement("ffn" if one.is_ffn else "mixer", one) for one in plan.slot_candidates(slot)]
    fewer_layers = len(space.depth) > 1
    if slot not in space.hybrid.full_layers and (fewer_layers or "none" in space.layer.mixer):
        made.append(Replacement("mixer", None))
    if fewer_layers or 0 in space.layer.ffn:
        made.append(Replacement("ffn", None))
    return made


def scores_path(plan: LibraryPlan, slot: int, data: EvaluationSet) -> Path:
    """The file of a slot's scores.

    Args:
        plan: of the library.
        slot: the slot.
        data: held-out sequences.
    """
    names = [plan.path(one.candidate).name if one.candidate else one.name for one in replacements(plan, slot)]
    key = digest(canonical_json([names, plan.made_from, evaluation_digest(data)]))
    return plan.folder / f"{slot:03d}-scores-{key[:16]}.json"


@torch.no_grad()
def score_layer(slot: int, shared: tuple[LibraryPlan, EvaluationSet], tell: Share) -> None:
    """Score what may stand at a slot, and write its file.

    Args:
        slot: the slot.
        shared: the library's plan, and held-out sequences.
        tell: called with the share that is done.
    """
    plan, data = shared
    with one_thread():
        found = Scorer(plan, data).scores(slot, tell)
    write_text(scores_path(plan, slot, data), canonical_json([vars(score) for score in found]))
    tell(1.0)


def read_scores(path: Path) -> list[Score]:
    """The scores of a slot's file.

    Args:
        path: the file.
    """
    return [Score(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def score_table(scores: list[Score]) -> pd.DataFrame:
    """Scores as a table of one row each.

    Args:
        scores: of all slots.
    """
    table = pd.DataFrame([vars(score) for score in scores])
    return table.astype({"slot": np.int32, **dict.fromkeys(table.columns[2:], np.float64)})


class Scorer:
    """Runs the parent with one block replaced.

    Args:
        plan: of the library.
        data: held-out sequences.
    """

    def __init__(self, plan: LibraryPlan, data: EvaluationSet) -> None:
        self.plan, self.data, self.config = plan, data, plan.space.config
        self.architecture = plan.architecture
        self.weights = load_file(plan.parent)  # memory-mapped

    def scores(self, slot: int, tell: Share) -> list[Score]:
        """The score of each choice of a slot.

        Args:
            slot: the slot.
            tell: called with the share that is done.
        """
        x = F.embedding(torch.from_numpy(self.data.tokens), self.weights["embedding"])
        for below in range(slot):
            x = self._layer(x, below)
        after_mixer = self._parents(x, slot, "mixer")
        parent = self._above(self._parents(after_mixer, slot, "ffn"), slot)
        choices, children = replacements(self.plan, slot), []
        for i, choice in enumerate(choices):
            before = x if choice.part == "mixer" else after_mixer
            child = before
            if choice.candidate:
                block = choice.candidate.block(self.architecture.width, self.config)
                child = _run(block, read_block(self.plan.path(choice.candidate)), before)
            if choice.part == "mixer":
                child = self._parents(child, slot, "ffn")
            children.append(self._above(child, slot))
            tell(0.9 * (i + 1) / len(choices))
        return [
            Score(slot, choice.name, *values)
            for choice, values in zip(choices, self._compare(parent, children), strict=True)
        ]

    def _parents(self, x: Tensor, slot: int, part: str) -> Tensor:
        """The residual stream after one of the parent's blocks."""
        block = parent_blocks(self.architecture, slot, self.config).get(part)
        if block is None:
            return x
        return _run(block, {n: self.weights[f"layers.{slot}.{part}.{n}"] for n in block.shapes}, x)

    def _layer(self, x: Tensor, slot: int) -> Tensor:
        return self._parents(self._parents(x, slot, "mixer"), slot, "ffn")

    def _above(self, x: Tensor, slot: int) -> Tensor:
        """The normed residual stream after the last layer, given it after a slot's."""
        for above in range(slot + 1, len(self.architecture.layers)):
            x = self._layer(x, above)
        return rms_norm(x, self.weights["norm"], self.config.norm_eps)

    def _compare(self, parent: Tensor, children: list[Tensor]) -> list[tuple[float, float, float | None]]:
        """KL, loss and recall loss of each child, from the last normed states [N, T, W]."""
        head = self.weights["embedding" if self.config.tie_embeddings else "head"]
        targets = torch.from_numpy(self.data.targets).flatten()
        counted = targets != IGNORED
        recalled = torch.from_numpy(self.data.recallable).flatten()[counted]
        states = [x.flatten(0, 1)[counted] for x in (parent, *children)]
        targets = targets[counted]
        totals = np.zeros((len(children), 3))
        size = max(1, LOGITS // len(head))
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            reference = project(states[0][part], head).log_softmax(-1)
            for i, state in enumerate(states[1:]):
                logs = project(state[part], head).log_softmax(-1)
                losses = -logs.gather(1, targets[part, None])[:, 0].double()
                kl = F.kl_div(logs, reference, reduction="none", log_target=True).sum(-1).double()
                totals[i] += kl.sum(), losses.sum(), losses[recalled[part]].sum()
        count, recall_count = len(targets), int(recalled.sum())
        return [
            (kl / count, loss / count, recall / recall_count if recall_count else None)
            for kl, loss, recall in totals.tolist()
        ]


def _run(block: Block, weights: Weights, x: Tensor) -> Tensor:
    """The residual stream [N, T, W] after a block, a few windows at a time."""
    return torch.cat([rows + block.contribution(weights, rows) for rows in torch.split(x, BATCH_WINDOWS)])
