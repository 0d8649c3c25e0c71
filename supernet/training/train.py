"""Training: a supernet by its recipe, or one architecture as a plain model, from scratch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from space import Architecture, Space
from space.blocks import Model
from space.io.artefact import canonical_json, digest
from supernet.data.corpus import Corpus, load_corpus
from supernet.extract import Text
from supernet.hf.pretrained import pretrained_digest
from supernet.supernet import Supernet
from supernet.training.checkpoint import Checkpoint, latest_checkpoint, sole_writer
from supernet.training.loop import take_steps
from supernet.training.recipe import TrainConfig
from supernet.training.trainer import Trainer


def training_inputs(
    space: Space, config: TrainConfig, corpus: Corpus, architecture: Architecture | None = None
) -> dict[str, str]:
    """The hashes that identify a training: another value is another result."""
    settings = config.model_dump(mode="json", exclude={"data", "init", "checkpoint_every", "workers"})
    inputs = {"space": space.hash, "corpus": corpus.digest, "training": digest(canonical_json(settings))}
    if config.init:
        inputs["init"] = pretrained_digest(config.init)
    if architecture:
        inputs["architecture"] = architecture.key
    return inputs


def train(
    space: Space,
    config: TrainConfig,
    root: Path,
    report: Callable[[Mapping[str, Any]], None] | None = None,
    corpus: Corpus | None = None,
    architecture: Architecture | None = None,
) -> Checkpoint:
    """Train to the last step, from the newest whole checkpoint if there is one.

    Args:
        space: the space whose supernet is trained.
        config: how; with ``workers`` above 0 in so many processes through Ray Train.
        root: the folder for checkpoints, ``metrics.jsonl`` and ``tensorboard/``.
        report: called with each row of the metrics.
        corpus: the data, where it is loaded already.
        architecture: train this one alone and from scratch instead of the supernet.

    Raises:
        InputError: bad data, a checkpoint of other inputs, a loss that is not finite, or a folder that
            another training writes to.
    """
    corpus = corpus or load_corpus(config.data)
    inputs = training_inputs(space, config, corpus, architecture)

    def take() -> None:
        if config.workers:
            from supernet.training.parallel import train_parallel

            train_parallel(space, config, corpus, root, inputs, report, architecture)
        else:
            with sole_writer(root):
                take_steps(Trainer(space, config, corpus, architecture), root, inputs, report)

    return trained_until(config.steps, root, inputs, take)


def trained_until(step: int, root: Path, inputs: Mapping[str, str], take: Callable[[], None]) -> Checkpoint:
    """The newest whole checkpoint, after taking the steps up to this one where they are missing."""
    found = latest_checkpoint(root, inputs)
    if not found or found.step < step:
        take()
        found = latest_checkpoint(root, inputs)
    if found is None:
        raise RuntimeError(f"{root}: the checkpoint just written cannot be read back")
    return found


def load_supernet(space: Space, checkpoint: Checkpoint) -> Supernet:
    """The supernet of a checkpoint, without gradients."""
    supernet = Supernet(space)
    supernet.load_state_dict(checkpoint.load("model"))
    return supernet.requires_grad_(False).eval()


def load_stand_alone(space: Space, checkpoint: Checkpoint, architecture: Architecture) -> Model:
    """The plain model of an architecture that was trained alone, without gradients."""
    model = Model(architecture, space.config)
    model.load_state_dict(checkpoint.load("model"))
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Trained:
    """A trained supernet and the text that it is evaluated on."""

    space: Space
    checkpoint: Checkpoint
    corpus: Corpus
    text: Text  # what the corpus was made of, and how its members are judged

    @property
    def length(self) -> int:
        """Tokens of an evaluation window."""
        return self.text.length
