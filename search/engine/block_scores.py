"""Scores of private blocks that a supernet's training wrote, as outcomes of a search's probes.

Block-wise training judges every block in its parent and writes ``scores.parquet`` beside the checkpoints. A
search on KL then need not evaluate single replacements again.
"""

from dataclasses import replace
from pathlib import Path

from search.engine.config import SearchConfig
from search.engine.evaluator import make_quality
from search.problem.problem import Problem
from space import Architecture, InputError, Layer, Space
from space.architecture import has_heads
from space.genome import largest
from space.io.artefact import Artefact
from space.io.parquet import read_table
from supernet.evaluate import Quality

BLOCK_SCORES = Artefact("block scores", "formfit train")


def score_file(folder: Path, problem: Problem, config: SearchConfig) -> Path | None:
    """The file of scores that a search's probes can be taken from; None if there is none.

    Scores are differences from a parent whose KL is 0. Losses would need the parent's on the same windows.

    Args:
        folder: of the supernet's training.
        problem: its first quality has to be KL.
        config: its strategy has to be ``mip-nsga2``.
    """
    path = folder / "scores.parquet"
    quality = next(objective.text for objective in problem.objectives if objective.is_quality)
    return path if quality == "kl" and config.strategy == "mip-nsga2" and path.is_file() else None


def read_block_scores(path: Path, space: Space) -> dict[str, Quality]:
    """The qualities of the parent's single replacements, by the architecture's key.

    Args:
        path: with columns ``slot``, ``candidate``, ``kl``, ``loss_nats`` and ``recall_loss_nats``.
        space: of the supernet.

    Raises:
        InputError: the file is not whole, or has a block that the space has not.
    """
    table, _ = read_table(path, BLOCK_SCORES)
    parent, blocks = largest(space), _blocks_by_name(space)
    found: dict[str, Quality] = {}
    for row in table.to_dict("records"):
        slot, name = int(row["slot"]), row["candidate"]
        if name not in blocks or not 0 <= slot < space.slots:
            raise InputError(f"{path}: {name} at slot {slot} is no block of space {space.name}")
        own, block = parent.layers[slot], blocks[name]
        layer = replace(own, ffn=block.ffn) if name.startswith("ffn-") else replace(block, ffn=own.ffn)
        layers = (*parent.layers[:slot], layer, *parent.layers[slot + 1 :])
        values = {"kl": row["kl"], "loss": row["loss_nats"], "recall_loss": row["recall_loss_nats"]}
        found[Architecture(parent.width, layers).key] = make_quality(values)
    return found


def _blocks_by_name(space: Space) -> dict[str, Layer]:
    """The mixers and FFNs of a space by name, such as ``sliding-h9-k3-w256``, ``none`` and ``ffn-768``."""
    blocks = {f"ffn-{size}": Layer(ffn=size) for size in space.ffn_options}
    for mixer, window in space.mixer_options:
        for heads, kv_heads in space.head_options if has_heads(mixer) else ((0, 0),):
            name = mixer + (f"-h{heads}-k{kv_heads}" if heads else "") + (f"-w{window}" if window else "")
            blocks[name] = Layer(mixer=mixer, heads=heads, kv_heads=kv_heads, window=window)
    return blocks
