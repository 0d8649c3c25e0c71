"""A run's folder: its configuration, its space and its trained supernet."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from search.config import RunConfig, trained_config
from space import InputError, Space
from space.io.artefact import (
    write_text,
)
from supernet.data.corpus import Corpus, load_corpus
from supernet.extract import Text
from supernet.training.checkpoint import Checkpoint, latest_checkpoint
from supernet.training.train import Trained, training_inputs


@dataclass(frozen=True)
class Run:
    """A run's folder and configuration."""

    folder: Path
    config: RunConfig
    devices: Path

    @property
    def space(self) -> Space:
        """The space."""
        return self.config.space

    def save_config(self) -> None:
        """Keep the configuration in the run's folder, the space inside."""
        path = self.folder / "config.yaml"
        value = self.config.model_copy(update={"space": self.space}).model_dump(mode="json")
        text = yaml.safe_dump(value, sort_keys=False)
        if not path.exists() or path.read_text() != text:
            write_text(path, text)

    def trained(self, checkpoint: Checkpoint, corpus: Corpus) -> Trained:
        """The trained supernet with the text that it is evaluated on.

        Args:
            checkpoint: the supernet's last.
            corpus: that it was trained on.
        """
        return Trained(self.space, checkpoint, corpus, self.text)

    @property
    def text(self) -> Text:
        """The text that the supernet is trained on, and its members are judged by."""
        train = self.config.train
        length = train.length or self.space.max_seq_len
        return Text(data=train.data, length=length, windows=self.config.search.front_windows)


def open_run(folder: Path, devices: Path) -> Run:
    """A run's folder that was trained in.

    Raises:
        InputError: it is not one; names the command that makes it.
    """
    return Run(folder, trained_config(folder), devices)


def open_trained(run: Run) -> Trained:
    """The trained supernet of a run with its text.

    Args:
        run: a run that was trained.

    Raises:
        InputError: nothing was trained, with other inputs, or not to the end; or the text is missing.
    """
    corpus = load_corpus(run.config.train.data)
    return run.trained(open_supernet(run, corpus), corpus)


def open_supernet(run: Run, corpus: Corpus) -> Checkpoint:
    """The finished checkpoint of a run.

    Raises:
        InputError: there is none, it was made from other inputs, or the training is not at its end.
    """
    inputs = training_inputs(run.space, run.config.train, corpus)
    found = latest_checkpoint(run.folder / "supernet", inputs)
    if found is None:
        raise InputError(
            f"{run.folder}: no whole checkpoint; `formfit train CONFIG --out {run.folder}` makes it"
        )
    if found.step < run.config.train.steps:
        raise InputError(
            f"{run.folder}: the training stopped at step {found.step} of {run.config.train.steps}; "
            f"`formfit train {run.folder}/config.yaml --out {run.folder}` goes on"
        )
    return found
