"""Entry points of training: a supernet by its recipe, or one architecture as a plain model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from space import Architecture, InputError, Space
from space.blocks import Model
from space.io.artefact import canonical_json, digest, file_digest
from supernet.data.corpus import Corpus, load_corpus
from supernet.extract import ARCHITECTURE_FILE, WEIGHTS_FILE, Text
from supernet.parent import parent_digest
from supernet.supernet import Supernet
from supernet.training.checkpoint import Checkpoint, latest_checkpoint, sole_writer
from supernet.training.loop import Report, take_steps
from supernet.training.recipe import TrainConfig
from supernet.training.trainer import Trainer


def training_inputs(
    space: Space, config: TrainConfig, corpus: Corpus | None, architecture: Architecture | None = None
) -> dict[str, str]:
    """The sha256 of everything that a training's result depends on, by name.

    Args:
        space: the space.
        config: the training settings.
        corpus: the training text; None leaves out what depends on files that may be gone since.
        architecture: the architecture of a stand-alone training; None is the supernet's.
    """
    left_out = {"data", "init", "checkpoint_every", "workers"}
    if config.method == "joint":
        left_out |= {"method", "blockwise"}
    settings = config.model_dump(mode="json", exclude=left_out)
    inputs = {"space": space.hash, "training": digest(canonical_json(settings))}
    if corpus:
        inputs["corpus"] = corpus.digest
    if corpus and config.init:
        inputs["init"] = init_digest(config.init)
    if architecture:
        inputs["architecture"] = architecture.key
    return inputs


def is_submodel(folder: Path) -> bool:
    """True if a folder holds a sub-model of formfit's, and not a parent of transformers'.

    Args:
        folder: the folder.
    """
    return (folder / ARCHITECTURE_FILE).exists()


def init_digest(folder: Path) -> str:
    """The sha256 of a pretrained model, as 64 hexadecimal digits.

    Args:
        folder: of a parent or of a sub-model; or a GGUF file.

    Raises:
        InputError: a file is missing.
    """
    if not is_submodel(folder):
        return parent_digest(folder)
    paths = [folder / ARCHITECTURE_FILE, folder / WEIGHTS_FILE]
    try:
        return digest(canonical_json({path.name: file_digest(path) for path in paths}))
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None


def train(
    space: Space,
    config: TrainConfig,
    root: str | Path,
    report: Report | None = None,
    corpus: Corpus | None = None,
    architecture: Architecture | None = None,
) -> Checkpoint:
    """Train to the last step, from the newest complete checkpoint if there is one.

    A complete training returns at once. A resumed training equals an uninterrupted one.

    Args:
        space: the space whose supernet is trained.
        config: the training settings; with ``workers`` above 0, data-parallel through Ray Train.
        root: the folder for checkpoints, ``metrics.jsonl`` and ``tensorboard/``.
        report: called with each row of the metrics.
        corpus: the training text; None loads ``config.data``.
        architecture: train a plain model of this architecture from scratch instead of the supernet.

    Returns:
        The last step's checkpoint; :func:`load_supernet` and :func:`load_stand_alone` read it.

    Raises:
        InputError: invalid data, a checkpoint of other inputs, a loss that is not finite, or a folder that
            another training writes to.
    """
    if config.method == "blockwise" and architecture is None:
        raise InputError("train.method: blockwise is trained by supernet.blockwise.train.train_blocks")
    root, corpus = Path(root), corpus or load_corpus(config.data)
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
    """The newest complete checkpoint, after training up to a step if there is none that far.

    Args:
        step: the step that the checkpoint has to reach.
        root: the folder of the checkpoints.
        inputs: sha256 of everything the training depends on, by name.
        take: takes the missing steps and writes their checkpoints.

    Raises:
        InputError: the newest complete checkpoint was made from other inputs.
    """
    checkpoint = latest_checkpoint(root, inputs)
    if not checkpoint or checkpoint.step < step:
        take()
        checkpoint = latest_checkpoint(root, inputs)
    if checkpoint is None:
        raise RuntimeError(f"{root}: the checkpoint just written cannot be read back")
    return checkpoint


def load_supernet(space: Space, checkpoint: Checkpoint) -> Supernet:
    """Load the supernet of a checkpoint, in evaluation mode and without gradients.

    Args:
        space: the space that it was trained for.
        checkpoint: a checkpoint of a supernet's training.

    Raises:
        InputError: the weights are incomplete, or of another space.
    """
    path = checkpoint.folder / "model.safetensors"
    try:
        supernet = Supernet(space, values=checkpoint.load("model"))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return supernet.requires_grad_(False).eval()


def load_stand_alone(space: Space, checkpoint: Checkpoint, architecture: Architecture) -> Model:
    """Load the plain model of a stand-alone training, in evaluation mode and without gradients.

    Args:
        space: the space of the architecture.
        checkpoint: a checkpoint of the architecture's training.
        architecture: the architecture.
    """
    model = Model(architecture, space.config)
    checkpoint.load_into(model)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Trained:
    """A trained supernet and the text that it is evaluated on.

    Attributes:
        space: the supernet's space.
        checkpoint: the last checkpoint of its training.
        corpus: the text, loaded.
        text: the settings of the corpus and of evaluations.
    """

    space: Space
    checkpoint: Checkpoint
    corpus: Corpus
    text: Text

    @property
    def length(self) -> int:
        """Tokens per sequence of an evaluation."""
        return self.text.length
