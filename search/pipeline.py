"""The whole way: train, profile, search, extract, export, verify, report.

Each stage leaves files whose headers name the hashes of what they were made from. A stage
whose files are there with the same hashes is skipped; one that was interrupted goes on from
what it left.
"""

from collections.abc import Mapping
from typing import Any

from latency import Predictor, load_card, load_predictor
from latency.card import open_card
from latency.predictor.predictor import PREDICTOR
from latency.profile import profile, settings_digest
from latency.runtimes.registry import open_runtime
from search.audit.page import audit_section
from search.engine.front import FRONT, member_choice, pick_key
from search.engine.run import search_front
from search.report.page import write_report
from search.select.measured_search import make_workbench, require_kept, run_measured_search
from search.workspace import Run
from space import Architecture, genome
from space.io.artefact import (
    Artefact,
    canonical_json,
    digest,
)
from space.io.progress import Reporter
from supernet.data.baselines import gzip_bits_per_byte, order2_bits_per_byte
from supernet.data.corpus import Corpus, load_corpus, window_starts
from supernet.evaluate import evaluate, evaluation_set, mqar_accuracy
from supernet.training.checkpoint import Checkpoint, latest_checkpoint
from supernet.training.train import load_supernet, train, training_inputs

SUMMARY = Artefact("summary", "formfit run", schema=2)


def trained(run: Run, reporter: Reporter, corpus: Corpus) -> Checkpoint:
    """The supernet's last checkpoint, trained where it is not there."""
    settings = run.config.search
    if corpus.recall < 1:  # what the search will evaluate on, refused now rather than after hours
        windows = max(settings.windows, settings.front_windows)
        window_starts(len(corpus.held_out), windows, run.config.train.length or run.space.max_seq_len)
    root, inputs = run.folder / "supernet", training_inputs(run.space, run.config.train, corpus)
    found = latest_checkpoint(root, inputs)  # refuses one of another training
    run.save_config()
    if found and found.step == run.config.train.steps:
        reporter.skipped("train")
        return found
    with reporter.stage("train") as stage:

        def report(row: Mapping[str, Any]) -> None:
            text = f"loss {row['loss_nats']:.3f} nats, {row['tokens_per_second']:,.0f} tokens/s"
            stage(row["step"] / row["steps"], text)

        return train(run.space, run.config.train, root, report, corpus)


def profiled(run: Run, reporter: Reporter) -> Predictor:
    """The predictor of this machine, profiled where it is not there."""
    config = run.config.profile
    runtime = open_runtime(config.runtime, config.threads, config.precision)
    card = open_card(run.devices, run.config.device, runtime.fingerprint())
    path = card.predictor_path(run.space.name, runtime.name, config.threads, config.precision)
    if path.exists():
        header = PREDICTOR.read(path)["header"]["inputs"]
        if header.get("space") == run.space.hash and header.get("settings") == settings_digest(config):
            reporter.skipped("profile")
            return load_predictor(path, run.space, "formfit profile")
    with reporter.stage("profile") as stage:
        return profile(
            run.space, run.devices, run.config.device, config, lambda what, share: stage(share, what)
        )


def searched(
    run: Run, reporter: Reporter, checkpoint: Checkpoint, predictor: Predictor, corpus: Corpus
) -> dict[str, Any]:
    """The front, searched where it is not there."""
    card = load_card(run.devices, run.config.device)
    return search_front(
        run.folder / "searches" / card.name,
        run.trained(checkpoint, corpus),
        {card.name: predictor},
        run.config.search,
        reporter,
    )


def verified(
    run: Run, reporter: Reporter, checkpoint: Checkpoint, predictor: Predictor, corpus: Corpus
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What came of searching and measuring, and the chosen and picked members by pick, verified."""
    card = load_card(run.devices, run.config.device)
    bench = make_workbench(
        run.folder / "submodels", run.trained(checkpoint, corpus), card, run.config.verify
    )
    folder = run.folder / "searches" / card.name
    measured_search = run_measured_search(folder, bench, {card.name: predictor}, run.config.search, reporter)
    front = FRONT.read(folder / "front.json")
    members = {m["key"]: m for m in front["members"]}
    measured = {row["key"]: row for one in measured_search["rounds"] for row in one["finalists"]}
    keys = {pick: pick_key(front, pick) for pick in run.config.picks}
    picked = {"chosen": measured_search["chosen"]}
    picked |= {pick: measured.get(key, members[key]) for pick, key in keys.items()}
    found = {}
    for pick, member in picked.items():
        choice = member.get("choice") or member_choice(front, member)
        submodel = bench.extracted(Architecture.from_json(member["architecture"]), choice)
        found[pick] = {**_member(member), **_results(bench.verified(submodel, reporter))}
    return measured_search, found


def summarised(
    run: Run,
    checkpoint: Checkpoint,
    corpus: Corpus,
    predictor: Predictor,
    measured_search: Mapping[str, Any],
    verified: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Write ``summary.json`` and the report."""
    card = load_card(run.devices, run.config.device)
    folder = run.folder / "searches" / card.name
    front = FRONT.read(folder / "front.json")
    inputs = {
        "supernet": checkpoint.digest,
        "front": digest(canonical_json(front["members"])),
        "verified": digest(canonical_json([dict(v) for v in verified.values()])),
    }
    path = run.folder / "summary.json"
    if SUMMARY.made_from(path, inputs):
        return SUMMARY.read(path)
    body = {
        "space": {"name": run.space.name, "architectures": genome.size(run.space)},
        "device": {"name": card.name, **card.fingerprint},
        "text": text_quality(run, checkpoint, corpus, verified["chosen"]),
        "predictor": {str(w): dict(model.errors) for w, model in predictor.models.items()},
        "front": front["members"],
        "rounds": len(measured_search["rounds"]),
        "limits": verified["chosen"]["limits"],
        "chosen": dict(verified["chosen"]),
        "verified": {pick: dict(value) for pick, value in verified.items()},
    }
    SUMMARY.write(path, inputs, body)
    audited = audit_section(run.folder, checkpoint.digest)
    write_report(folder / "report.html", run.space, front, body, card, audited)
    return SUMMARY.read(path)


def text_quality(
    run: Run, checkpoint: Checkpoint, corpus: Corpus, member: Mapping[str, Any]
) -> dict[str, Any]:
    """Bits per byte of the largest sub-network beside gzip's and an order-2 model's, on the same text.

    None stands for what is unknown: the baselines where bytes are not the tokens, all where there is
    no text or its bytes are not known, and the accuracy on MQAR where it was not trained on.
    """
    length = run.config.train.length or run.space.max_seq_len
    data = evaluation_set(corpus, run.config.search.front_windows, length)
    largest, model_config = genome.largest(run.space), run.space.config
    weights = load_supernet(run.space, checkpoint).weights(largest)
    quality = evaluate(weights, largest, model_config, data)
    accuracy = None
    if corpus.recall:
        accuracy = mqar_accuracy(
            weights, largest, model_config, length=length, pairs=corpus.pairs, vocab_size=corpus.vocab_size
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
        InfeasibleError: no architecture can meet the limits.
        LimitMissedError: the chosen model missed a limit when measured.
    """
    corpus = load_corpus(run.config.train.data)
    checkpoint = trained(run, reporter, corpus)
    predictor = profiled(run, reporter)
    measured_search, results = verified(run, reporter, checkpoint, predictor, corpus)
    summary = summarised(run, checkpoint, corpus, predictor, measured_search, results)
    require_kept(measured_search)
    return summary
