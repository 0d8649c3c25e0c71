"""The manifest of a kit: what was packed, kept in the folder of the card until a result comes back."""

from dataclasses import dataclass
from pathlib import Path

from latency.config import ProfileConfig
from latency.predictor.design import ModelRole
from space import Architecture, InputError, Space
from space.io.artefact import Artefact, check_inputs
from space.onnx.graph import VERSION

KIT_MANIFEST = Artefact("kit manifest", "formfit profile --make-kit", schema=5)
MANIFEST_FILE = "kit.json"
KIT_RUNTIME = "onnxruntime"  # the only one that a kit runs on


@dataclass(frozen=True)
class KitModel:
    """A whole model of a kit.

    Attributes:
        role: use of the model.
        fallback: True if it is timed only on devices that lack a mixer.
        architecture: the architecture.
    """

    role: ModelRole
    fallback: bool
    architecture: Architecture


@dataclass(frozen=True)
class KitManifest:
    """Contents of a kit.

    Attributes:
        kit: digest of the kit's plan.
        settings: settings of the profiling.
        groups: number of groups of items.
        models: whole models to measure.
    """

    kit: str
    settings: ProfileConfig
    groups: int
    models: tuple[KitModel, ...]

    def write(self, folder: Path, space: Space) -> None:
        """Write the manifest into the folder of a card.

        Args:
            folder: folder of the card.
            space: the space that the kit was packed for.
        """
        body = {
            "kit": self.kit,
            "settings": self.settings.model_dump(mode="json"),
            "groups": self.groups,
            "models": [
                {"role": m.role, "fallback": m.fallback, "architecture": m.architecture.to_json()}
                for m in self.models
            ],
        }
        inputs = {"space": space.hash, "graphs": str(VERSION)}
        KIT_MANIFEST.write(folder / MANIFEST_FILE, inputs, body)

    @staticmethod
    def read(folder: Path, space: Space) -> "KitManifest":
        """Read the manifest in the folder of a card.

        Args:
            folder: folder of the card.
            space: the space that the kit must have been packed for.

        Raises:
            InputError: there is none, or it is of another space or another graph version.
        """
        path = folder / MANIFEST_FILE
        value = KIT_MANIFEST.read(path, f"formfit profile --make-kit KIT --device {folder.name}")
        if value["header"]["inputs"].get("space") != space.hash:
            raise InputError(f"{path}: packed for another space than {space.name}")
        check_inputs(path, value, {"graphs": str(VERSION)})
        with KIT_MANIFEST.checked(path):
            return KitManifest(
                kit=value["kit"],
                settings=ProfileConfig.model_validate(value["settings"]),
                groups=int(value["groups"]),
                models=tuple(
                    KitModel(m["role"], m["fallback"], Architecture.from_json(m["architecture"]))
                    for m in value["models"]
                ),
            )
