"""The whole way: train, profile, search, extract, export, verify, report.

Each stage leaves files whose headers name the hashes of what they were made from. A stage
whose files are there with the same hashes is skipped; one that was interrupted goes on from
what it left.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from latency import OnnxRuntime, Predictor, ProfileConfig, load_card, load_predictor, profile
from latency.card import open_card
from latency.profile import settings_digest
from search.audit_report import audit_section
from search.evaluators import evaluator
from search.report import write_report
from search.search import FRONT_KIND, Search, SearchConfig, make_problem, search_digest
from search.verify import KIND as VERIFY_KIND
from search.verify import VerifyConfig, export_onnx, verify
from space import Architecture, InputError, LimitError, Space, genome, load_space
from space.config import load_yaml, parse
from space.files import canonical_json, digest, file_digest, read_json, write_json, write_text
from supernet import Checkpoint, Supernet, TrainConfig, evaluate, evaluation_set, load_corpus, train
from supernet.baselines import gzip_bits_per_byte, order2_bits_per_byte
from supernet.checkpoint import latest_checkpoint
from supernet.corpus import Corpus, window_starts
from supernet.evaluate import mqar_accuracy
from supernet.extract import KIND as SUBMODEL_KIND
from supernet.extract import SubModel, read_submodel, write_submodel
from supernet.train import load_supernet, training_inputs

SUMMARY_KIND = "summary"


class RunConfig(BaseModel):
    """All that one run needs: a space and how each stage treats it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: Space | Path
    device: str = Field(default="here", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    train: TrainConfig = TrainConfig()
    profile: ProfileConfig = ProfileConfig()
    search: SearchConfig = SearchConfig()
    verify: VerifyConfig = VerifyConfig()
    picks: tuple[str, ...] = ("best", "knee", "fastest")

    @field_validator("profile")
    @classmethod
    def _deployed(cls, value: ProfileConfig) -> ProfileConfig:
        if value.runtime != "onnxruntime":
            raise ValueError(f"runtime {value.runtime}: a run verifies its models with onnxruntime")
        return value

    @property
    def the_space(self) -> Space:
        """The space, read from its file where it was given as a path."""
        return self.space if isinstance(self.space, Space) else load_space(self.space)


def load_run_config(path: Path) -> RunConfig:
    """Read a run configuration; a space given as a path is found beside the file.

    Raises:
        InputError: names every error, in the run's file or in the space's.
    """
    value = load_yaml(path)
    if isinstance(value, dict) and isinstance(value.get("space"), str):
        value = {**value, "space": load_space(path.parent / value["space"])}
    return parse(RunConfig, value, str(path))


def smoke(config: RunConfig) -> RunConfig:
    """The same stages, small: a check that everything works, not a result."""
    changes: dict[str, dict[str, Any]] = {
        "train": {"steps": 12, "batch": 2, "checkpoint_every": 6},
        "profile": {"block_ms": 1.0, "min_rounds": 2, "op_rounds": 2, "max_rounds": 2,
                    "op_error": 1.0, "most_noise": None, "rss_models": 1,
                    "optimal_models": 6, "random_models": 4,
                    "held_out_models": 5, "repeated_models": 2},
        "search": {"generations": 2, "population": 8, "windows": 4, "front_windows": 8},
        "verify": {"tokens": 24, "copies": 1, "rounds": 4, "block_ms": 2.0, "most_noise": None},
    }  # fmt: skip
    fields = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    data = config.train.data.model_copy(update={"limit_mb": min(config.train.data.limit_mb or 2.0, 2.0)})
    fields["train"] = fields["train"].model_copy(update={"data": data})
    return config.model_copy(update=fields)


class Stage(Protocol):
    """Says what a long stage is doing."""

    def __call__(self, share: float, text: str) -> None:
        """Report the share that is done, and what is known so far."""
        ...


class Reporter(Protocol):
    """Shows the progress of stages to a person."""

    def stage(self, title: str) -> AbstractContextManager[Stage]:
        """A stage that is about to start."""
        ...

    def skipped(self, title: str) -> None:
        """A stage whose files are there already."""
        ...


@dataclass(frozen=True)
class Run:
    """A run's folder and configuration."""

    folder: Path
    config: RunConfig
    devices: Path

    @property
    def space(self) -> Space:
        """The space."""
        return self.config.the_space

    def save_config(self) -> None:
        """Keep the configuration in the run's folder, the space inside."""
        path = self.folder / "config.yaml"
        value = self.config.model_copy(update={"space": self.space}).model_dump(mode="json")
        text = yaml.safe_dump(value, sort_keys=False)
        if not path.exists() or path.read_text() != text:
            write_text(path, text)

    # Stages, in order. Each returns what the next ones need.

    def trained(self, reporter: Reporter, corpus: Corpus) -> Checkpoint:
        """The supernet's last checkpoint, trained where it is not there."""
        settings = self.config.search
        if corpus.recall < 1:  # what the search will evaluate on, refused now rather than after hours
            windows = max(settings.windows, settings.front_windows)
            window_starts(len(corpus.held_out), windows, self.config.train.length or self.space.context)
        root, inputs = self.folder / "supernet", training_inputs(self.space, self.config.train, corpus)
        found = latest_checkpoint(root, inputs)  # refuses one of another training
        self.save_config()
        if found and found.step == self.config.train.steps:
            reporter.skipped("train")
            return found
        with reporter.stage("train") as stage:

            def report(row: Mapping[str, Any]) -> None:
                text = f"loss {row['loss_nats']:.3f} nats, {row['tokens_per_second']:,.0f} tokens/s"
                stage(row["step"] / row["steps"], text)

            return train(self.space, self.config.train, root, report, corpus)

    def profiled(self, reporter: Reporter) -> Predictor:
        """The predictor of this machine, profiled where it is not there."""
        config = self.config.profile
        runtime = OnnxRuntime(config.threads)
        card = open_card(self.devices, self.config.device, runtime.fingerprint())
        path = card.predictor_path(self.space.name, runtime.name, config.threads, "fp32")
        if path.exists():
            header = read_json(path, "latency predictor", "formfit profile")["header"]["inputs"]
            if header.get("space") == self.space.hash and header.get("settings") == settings_digest(config):
                reporter.skipped("profile")
                return load_predictor(path, self.space, "formfit profile")
        with reporter.stage("profile") as stage:
            return profile(
                self.space, self.devices, self.config.device, config, lambda what, share: stage(share, what)
            )

    def searched(
        self, reporter: Reporter, checkpoint: Checkpoint, predictor: Predictor, corpus: Corpus
    ) -> dict[str, Any]:
        """The front, searched where it is not there."""
        card = load_card(self.devices, self.config.device)
        return search_front(
            self.folder / "searches" / card.name,
            self.space,
            checkpoint,
            {card.name: predictor},
            self.config.search,
            corpus,
            self.config.train.length,
            reporter,
        )

    def extracted(
        self, reporter: Reporter, checkpoint: Checkpoint, front: Mapping[str, Any]
    ) -> dict[str, SubModel]:
        """The picked sub-models with their graphs, by pick."""
        members = {m["key"]: m for m in front["members"]}
        wanted = {pick: members[pick_key(front, pick)] for pick in self.config.picks}
        inputs = {"supernet": checkpoint.digest, "front": digest(canonical_json(front["members"]))}
        found: dict[str, SubModel] = {}
        missing = []
        for pick, member in wanted.items():
            folder = self.folder / "submodels" / member["key"]
            if (
                _made_from(folder / "architecture.json", SUBMODEL_KIND, inputs)
                and (folder / "model.onnx").exists()
            ):
                found[pick] = read_submodel(folder)
            else:
                missing.append(pick)
        if not missing:
            reporter.skipped("extract")
            return found
        with reporter.stage("extract") as stage:
            supernet = load_supernet(self.space, checkpoint)
            for i, pick in enumerate(missing):
                stage(i / len(missing), wanted[pick]["key"])
                found[pick] = extract_member(self.folder / "submodels", supernet, wanted[pick], front, inputs)
        return {pick: found[pick] for pick in wanted}

    def verified(self, reporter: Reporter, submodels: Mapping[str, SubModel]) -> dict[str, dict[str, Any]]:
        """What verification found, by pick."""
        card = load_card(self.devices, self.config.device)
        settings = digest(canonical_json(self.config.verify.model_dump(mode="json")))
        found: dict[str, dict[str, Any]] = {}
        done: dict[str, dict[str, Any]] = {}
        for pick, submodel in submodels.items():
            inputs = {"model": file_digest(submodel.folder / "model.onnx"), "settings": settings}
            path = submodel.folder / "verify.json"
            if _made_from(path, VERIFY_KIND, inputs):
                found[pick] = read_json(path, VERIFY_KIND, "formfit verify")
                continue
            if submodel.architecture.key not in done:
                with reporter.stage(f"verify {pick}") as stage:
                    stage(0.0, submodel.architecture.key)
                    done[submodel.architecture.key] = verify(submodel, card, self.config.verify, inputs)
            found[pick] = done[submodel.architecture.key]
        if not done:
            reporter.skipped("verify")
        return found

    def summarised(
        self,
        checkpoint: Checkpoint,
        corpus: Corpus,
        predictor: Predictor,
        front: Mapping[str, Any],
        verified: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Write ``summary.json`` and the report."""
        card = load_card(self.devices, self.config.device)
        inputs = {
            "supernet": checkpoint.digest,
            "front": digest(canonical_json(front["members"])),
            "verified": digest(canonical_json([dict(v) for v in verified.values()])),
        }
        path = self.folder / "summary.json"
        if _made_from(path, SUMMARY_KIND, inputs):
            return read_json(path, SUMMARY_KIND, "formfit run")
        chosen = self.config.picks[0]
        member = next(m for m in front["members"] if m["key"] == verified[chosen]["key"])
        body = {
            "space": {"name": self.space.name, "architectures": genome.size(self.space)},
            "device": {"name": card.name, **card.fingerprint},
            "text": self.text_quality(checkpoint, corpus, member),
            "predictor": {str(w): dict(model.errors) for w, model in predictor.models.items()},
            "front": front["members"],
            "limits": verified[chosen]["limits"],
            "chosen": {"pick": chosen, **member, **_results(verified[chosen])},
            "verified": {pick: {"key": value["key"], **_results(value)} for pick, value in verified.items()},
        }
        write_json(path, SUMMARY_KIND, inputs, body)
        page = self.folder / "searches" / card.name / "report.html"
        audited = audit_section(self.folder, checkpoint.digest)
        write_report(page, self.space, front, body, card, audited)
        return read_json(path, SUMMARY_KIND, "formfit run")

    def text_quality(
        self, checkpoint: Checkpoint, corpus: Corpus, member: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Bits per byte of the largest sub-network beside gzip's and an order-2 model's, on the same text.

        None stands for what is unknown: the baselines where bytes are not the tokens, all where there is
        no text or its bytes are not known, and the accuracy on MQAR where it was not trained on.
        """
        length = self.config.train.length or self.space.context
        data = evaluation_set(corpus, self.config.search.front_windows, length)
        largest, frame = genome.largest(self.space), self.space.frame
        weights = load_supernet(self.space, checkpoint).weights(largest)
        quality = evaluate(weights, largest, frame, data)
        accuracy = None
        if corpus.recall:
            accuracy = mqar_accuracy(
                weights, largest, frame, length=length, pairs=corpus.pairs, vocabulary=corpus.vocabulary
            )
        baselines = corpus.is_bytes and data.text_bytes is not None
        return {
            "source": corpus.source,
            "held_out_bytes": data.text_bytes,
            "recall_share": data.recall_share,
            "largest_bits_per_byte": quality.bits_per_byte,
            "largest_recall_loss_nats": quality.recall_loss_nats if data.recallable.any() else None,
            "largest_mqar_accuracy": accuracy,
            "chosen_bits_per_byte": data.bits_per_byte(member["loss_nats"]),
            "gzip_bits_per_byte": gzip_bits_per_byte(corpus.train, data.windows) if baselines else None,
            "order2_bits_per_byte": order2_bits_per_byte(corpus.train, data.windows) if baselines else None,
        }


def _results(verified: Mapping[str, Any]) -> dict[str, Any]:
    return {name: verified[name] for name in ("latency", "limits", "parity")}


def _made_from(path: Path, kind: str, inputs: Mapping[str, str]) -> bool:
    """Whether a whole artefact is there that was made from these inputs."""
    try:
        header = read_json(path, kind, "formfit run")["header"]
    except InputError:
        return False
    return all(header["inputs"].get(name) == value for name, value in inputs.items())


def pick_key(front: Mapping[str, Any], pick: str) -> str:
    """The key of a front's member by name (``best``, ``knee``, ``fastest``) or by key.

    Raises:
        InputError: there is no such member.
    """
    keys = [m["key"] for m in front["members"]]
    key = front["picks"].get(pick, pick)
    if key not in keys:
        raise InputError(f"pick {pick!r}: not one of {', '.join(front['picks'])}, nor a key of the front")
    return str(key)


def extract_member(
    root: Path,
    supernet: Supernet,
    member: Mapping[str, Any],
    front: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> SubModel:
    """Extract a front's member into its folder under ``root``, and export it."""
    architecture = Architecture.from_json(member["architecture"])
    submodel = write_submodel(
        root / architecture.key, supernet, architecture, inputs, member_choice(front, member)
    )
    export_onnx(submodel)
    return submodel


def search_front(
    folder: Path,
    space: Space,
    checkpoint: Checkpoint,
    predictors: Mapping[str, Predictor],
    config: SearchConfig,
    corpus: Corpus,
    length: int | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Search, or read the front that is there already."""
    problem = make_problem(space, predictors, config)
    inputs = {
        "space": space.hash,
        "supernet": checkpoint.digest,
        "predictors": digest(canonical_json({d: p.identity() for d, p in predictors.items()})),
    }
    path = folder / "front.json"
    if _made_from(path, FRONT_KIND, {**inputs, "search": search_digest(problem, config)}):
        reporter.skipped("search")
        return read_json(path, FRONT_KIND, "formfit search")
    search = Search(problem, config, folder, inputs)
    search.check()
    with reporter.stage("search") as stage:
        stage(0.0, "starting the evaluators")
        sets = {
            "search": evaluation_set(corpus, config.windows, length or space.context),
            "front": evaluation_set(corpus, config.front_windows, length or space.context),
        }
        if "recall_loss" in problem.objectives and not sets["search"].recall_share:
            raise InputError("objective recall_loss: no byte of the evaluation windows can be recalled")
        supernet = load_supernet(space, checkpoint)
        with evaluator(supernet, sets, config.workers) as evaluate_all:
            search.run(evaluate_all, lambda done, total, text: stage(done / total, text))
    return read_json(path, FRONT_KIND, "formfit search")


def execute(run: Run, reporter: Reporter) -> dict[str, Any]:
    """Carry out every stage that is not done yet; returns the summary.

    Raises:
        InputError: something given is wrong.
        LimitError: a limit is impossible, or the chosen model missed one when measured.
    """
    corpus = load_corpus(run.config.train.data)
    checkpoint = run.trained(reporter, corpus)
    predictor = run.profiled(reporter)
    front = run.searched(reporter, checkpoint, predictor, corpus)
    submodels = run.extracted(reporter, checkpoint, front)
    verified = run.verified(reporter, submodels)
    summary = run.summarised(checkpoint, corpus, predictor, front, verified)
    missed = [item["limit"] for item in summary["limits"] if item["status"] == "missed"]
    if missed:
        raise LimitError(
            f"{run.folder}: the chosen model missed {', '.join(missed)} when measured; see summary.json"
        )
    return summary


def open_run(folder: Path, devices: Path) -> Run:
    """A run's folder that was trained in.

    Raises:
        InputError: it is not one; names the command that makes it.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise InputError(
            f"{folder}: not a run's folder (no config.yaml); `formfit train CONFIG --out {folder}` makes it"
        )
    return Run(folder, load_run_config(path), devices)


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


def chosen_architecture(
    run: Run, search: str | None, pick: str, file: Path | None
) -> tuple[dict[str, Any], Architecture]:
    """An architecture to extract, with what it was chosen under: a search's member, or a file's.

    Raises:
        InputError: there is no such search, member or file, or it is not of the run's space.
    """
    if file is not None:
        value = load_yaml(file)  # JSON is YAML
        value = value.get("architecture", value) if isinstance(value, dict) else value
        architecture = Architecture.from_json(value, str(file))
        rows = genome.encode(run.space, [architecture])
        if not genome.contains(run.space, rows)[0]:
            raise InputError(
                f"{file}: not an architecture of space {run.space.name}: its hybrid rule excludes it"
            )
        return {}, architecture
    front = read_json(run.folder / "searches" / str(search) / "front.json", FRONT_KIND, "formfit search")
    member = next(m for m in front["members"] if m["key"] == pick_key(front, pick))
    return member_choice(front, member), Architecture.from_json(member["architecture"])


def member_choice(front: Mapping[str, Any], member: Mapping[str, Any]) -> dict[str, Any]:
    """What a front's member was chosen under, to be kept beside its sub-model."""
    return {
        "limits": front["limits"],
        "confidence": front["confidence"],
        "predicted": member["predicted"],
        "loss_nats": member["loss_nats"],
    }
