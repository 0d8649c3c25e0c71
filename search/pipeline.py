"""The whole way: train, profile, search, extract, export, verify, report.

Each stage leaves files whose headers name the hashes of what they were made from. A stage
whose files are there with the same hashes is skipped; one that was interrupted goes on from
what it left.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from latency import Predictor, load_card, load_predictor
from latency.card import open_card
from latency.profile import open_runtime, profile, settings_digest
from search.audit.page import audit_section
from search.config import RunConfig, trained_config
from search.engine.run import Trained, member_choice, pick_key, search_front
from search.engine.search import FRONT_KIND
from search.progress import Reporter
from search.report.page import write_report
from search.select.measured_search import KIND as PROMISE_KIND
from search.select.measured_search import keep_promise, make_workbench, require_kept
from space import Architecture, InputError, Space, genome
from space.io.artefact import (
    canonical_json,
    check_inputs,
    digest,
    file_digest,
    made_from,
    read_json,
    write_json,
    write_text,
)
from space.io.config import load_yaml
from supernet.data.baselines import gzip_bits_per_byte, order2_bits_per_byte
from supernet.data.corpus import Corpus, load_corpus, window_starts
from supernet.evaluate import evaluate, evaluation_set, mqar_accuracy
from supernet.extract import Text
from supernet.training.checkpoint import Checkpoint, latest_checkpoint
from supernet.training.train import load_supernet, train, training_inputs

SUMMARY_KIND = "summary"


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

    def the_trained(self, checkpoint: Checkpoint, corpus: Corpus) -> Trained:
        """What a search needs to know of the training."""
        return Trained(self.space, checkpoint, corpus, self.text)

    @property
    def text(self) -> Text:
        """The text that the supernet is trained on, and its members are judged by."""
        train = self.config.train
        length = train.length or self.space.context
        return Text(data=train.data, length=length, windows=self.config.search.front_windows)

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
        runtime = open_runtime(config.runtime, config.threads, config.precision)
        card = open_card(self.devices, self.config.device, runtime.fingerprint())
        path = card.predictor_path(self.space.name, runtime.name, config.threads, config.precision)
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
            self.the_trained(checkpoint, corpus),
            {card.name: predictor},
            self.config.search,
            reporter,
        )

    def promised(
        self, reporter: Reporter, checkpoint: Checkpoint, predictor: Predictor, corpus: Corpus
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """What came of searching and measuring, and the chosen and picked members by pick, verified."""
        card = load_card(self.devices, self.config.device)
        bench = make_workbench(
            self.folder / "submodels", self.the_trained(checkpoint, corpus), card, self.config.verify
        )
        folder = self.folder / "searches" / card.name
        promise = keep_promise(folder, bench, {card.name: predictor}, self.config.search, reporter)
        front = read_json(folder / "front.json", FRONT_KIND, "formfit search")
        members = {m["key"]: m for m in front["members"]}
        measured = {row["key"]: row for one in promise["rounds"] for row in one["finalists"]}
        keys = {pick: pick_key(front, pick) for pick in self.config.picks}
        picked = {"chosen": promise["chosen"]}
        picked |= {pick: measured.get(key, members[key]) for pick, key in keys.items()}
        found = {}
        for pick, member in picked.items():
            choice = member.get("choice") or member_choice(front, member)
            submodel = bench.extracted(Architecture.from_json(member["architecture"]), choice)
            found[pick] = {**_member(member), **_results(bench.verified(submodel, reporter))}
        return promise, found

    def summarised(
        self,
        checkpoint: Checkpoint,
        corpus: Corpus,
        predictor: Predictor,
        promise: Mapping[str, Any],
        verified: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Write ``summary.json`` and the report."""
        card = load_card(self.devices, self.config.device)
        folder = self.folder / "searches" / card.name
        front = read_json(folder / "front.json", FRONT_KIND, "formfit search")
        inputs = {
            "supernet": checkpoint.digest,
            "front": digest(canonical_json(front["members"])),
            "verified": digest(canonical_json([dict(v) for v in verified.values()])),
        }
        path = self.folder / "summary.json"
        if made_from(path, SUMMARY_KIND, inputs):
            return read_json(path, SUMMARY_KIND, "formfit run")
        body = {
            "space": {"name": self.space.name, "architectures": genome.size(self.space)},
            "device": {"name": card.name, **card.fingerprint},
            "text": self.text_quality(checkpoint, corpus, verified["chosen"]),
            "predictor": {str(w): dict(model.errors) for w, model in predictor.models.items()},
            "front": front["members"],
            "rounds": len(promise["rounds"]),
            "limits": verified["chosen"]["limits"],
            "chosen": dict(verified["chosen"]),
            "verified": {pick: dict(value) for pick, value in verified.items()},
        }
        write_json(path, SUMMARY_KIND, inputs, body)
        audited = audit_section(self.folder, checkpoint.digest)
        write_report(folder / "report.html", self.space, front, body, card, audited)
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


def _member(member: Mapping[str, Any]) -> dict[str, Any]:
    names = ("key", "architecture", "loss_nats", "recall_loss_nats", "predicted")
    return {name: member[name] for name in names}


def _results(verified: Mapping[str, Any]) -> dict[str, Any]:
    return {name: verified[name] for name in ("latency", "limits", "parity")}


def execute(run: Run, reporter: Reporter) -> dict[str, Any]:
    """Carry out every stage that is not done yet; returns the summary.

    Raises:
        InputError: something given is wrong.
        LimitError: a limit is impossible, or the chosen model missed one when measured.
    """
    corpus = load_corpus(run.config.train.data)
    checkpoint = run.trained(reporter, corpus)
    predictor = run.profiled(reporter)
    promise, verified = run.promised(reporter, checkpoint, predictor, corpus)
    summary = run.summarised(checkpoint, corpus, predictor, promise, verified)
    require_kept(promise)
    return summary


def open_run(folder: Path, devices: Path) -> Run:
    """A run's folder that was trained in.

    Raises:
        InputError: it is not one; names the command that makes it.
    """
    return Run(folder, trained_config(folder), devices)


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
    run: Run, search: str | None, pick: str | None, file: Path | None
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
    folder = run.folder / "searches" / str(search)
    front = read_json(folder / "front.json", FRONT_KIND, "formfit search")
    members = {m["key"]: m for m in front["members"]}
    if (folder / "promise.json").exists():
        promise = read_json(folder / "promise.json", PROMISE_KIND, "formfit search --verify")
        check_inputs(folder / "promise.json", promise, {"front": file_digest(folder / "front.json")})
        members |= {row["key"]: row for one in promise["rounds"] for row in one["finalists"]}
        front["picks"] = {"chosen": promise["chosen"]["key"], **front["picks"]}
        front["members"] = list(members.values())
    member = members[pick_key(front, pick or next(iter(front["picks"])))]
    choice = member.get("choice") or member_choice(front, member)
    return choice, Architecture.from_json(member["architecture"])
