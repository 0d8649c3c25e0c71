"""Extracting and verifying the members of a front, each once."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from latency import Card
from search.engine.choice import Choice
from search.engine.config import VerifyConfig
from search.engine.verification import VERIFICATION, Verification
from search.select.picks import Selection
from search.submodel.export import export, models_digest
from search.submodel.verify import verify
from space import Architecture
from space.io.artefact import canonical_json, digest
from space.io.progress import Reporter
from space.precision import model_file
from supernet.evaluate import EvaluationSet, evaluation_set
from supernet.extract import SUBMODEL, SubModel, read_submodel, write_submodel
from supernet.supernet import Supernet
from supernet.training.train import Trained, load_supernet


@dataclass(frozen=True)
class Verifier:
    """Extracts architectures from a trained supernet and verifies them on a device.

    Attributes:
        submodels: the folder of the sub-models' folders.
        trained: the supernet and its text.
        card: the device's.
        config: settings of the verification.
    """

    submodels: Path
    trained: Trained
    card: Card
    config: VerifyConfig

    @cached_property
    def supernet(self) -> Supernet:
        """The supernet, loaded on first use."""
        return load_supernet(self.trained.space, self.trained.checkpoint)

    @cached_property
    def evaluation(self) -> EvaluationSet:
        """The sequences that exported graphs are evaluated on."""
        return evaluation_set(self.trained.corpus, self.trained.text.windows, self.trained.length)

    @property
    def card_digest(self) -> str:
        """The sha256 of what measurements depend on of the card: its machine and reference work."""
        return digest(canonical_json([self.card.name, self.card.fingerprint.to_json(), self.card.references]))

    def extract(self, architecture: Architecture, choice: Choice) -> SubModel:
        """The sub-model of an architecture with its exported graphs; extracted unless it exists.

        Args:
            architecture: of the supernet's space.
            choice: the limits and predictions that it was chosen under.
        """
        selection = Selection(architecture=architecture, choice=choice)
        inputs = {
            "supernet": self.trained.checkpoint.digest,
            "chosen": digest(canonical_json(selection.chosen)),
        }
        folder = self.submodels / architecture.key
        exists = SUBMODEL.made_from(folder / "architecture.json", inputs)
        precisions = selection.precisions(self.card.name)
        if exists and all(model_file(folder, p).exists() for p in precisions):
            return read_submodel(folder)
        submodel = write_submodel(
            folder, self.supernet, architecture, inputs, selection.chosen, self.trained.text
        )
        export(submodel, ("onnx",), precisions)
        return submodel

    def verify(self, submodel: SubModel, reporter: Reporter) -> Verification:
        """The verification of a sub-model; measured unless its ``verify.json`` is up to date.

        Args:
            submodel: with its exported graphs.
            reporter: shows the progress.

        Raises:
            InputError: this machine is not the card's, or its timings are unstable.
        """
        inputs = {
            "model": models_digest(submodel),
            "settings": digest(canonical_json(self.config.model_dump(mode="json"))),
            "card": self.card_digest,
        }
        path = submodel.folder / "verify.json"
        if VERIFICATION.made_from(path, inputs):
            return Verification.read(path)
        with reporter.stage(f"verify {submodel.architecture.key}") as stage:
            stage(0.0, submodel.architecture.describe())
            return verify(submodel, self.card, self.config, inputs, self.evaluation)
