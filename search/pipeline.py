"""The stages of a run: train, profile, search and verify, distil finalists, summarise, report.

Each stage writes files whose headers name the sha256 of their inputs. A stage whose files exist with the same
inputs is skipped, and an interrupted stage resumes. The audit, which is no stage, is exported from here too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latency import Predictor, load_card, load_predictor
from latency.card import PREDICTOR, open_card
from latency.predictor.schema import read_predictor
from latency.profiling import profile, settings_digest
from latency.runtimes.registry import open_runtime
from search.audit.audit import AuditConfig, audit
from search.audit.page import CORRELATION_COLUMNS, audit_section, correlation_rows
from search.audit.result import AuditResult
from search.config import Run, open_run
from search.report.page import report_search
from search.report.summary import SUMMARY, Summary, TextQuality, VerifiedMember
from search.select.measured_search import require_kept, run_measured_search
from search.select.search_command import Distillation, SearchResult, distil_best, require_tuned
from search.select.verified_picks import VerifiedPicks, verify_picks
from search.select.verifier import Verifier
from space import genome
from space.io.artefact import canonical_json, digest, file_digest
from space.io.progress import Reporter
from supernet.blockwise.train import train_blocks
from supernet.data.baselines import gzip_bits_per_byte, order2_bits_per_byte
from supernet.data.corpus import Corpus, load_corpus, window_starts
from supernet.evaluate import evaluate, evaluation_set, mqar_accuracy
from supernet.training.checkpoint import Checkpoint, latest_checkpoint
from supernet.training.loop import row_share
from supernet.training.train import load_supernet, train, training_inputs

__all__ = [
    "CORRELATION_COLUMNS",
    "AuditConfig",
    "AuditResult",
    "Summary",
    "audit",
    "correlation_rows",
    "distilled",
    "execute",
    "profiled",
    "rewrite_report",
    "summarised",
    "text_quality",
    "trained",
    "verified",
]


def execute(run: Run, reporter: Reporter) -> Summary:
    """Run every stage that is not complete.

    Args:
        run: its folder and configuration.
        reporter: shows the progress.

    Raises:
        InputError: the configuration or a file of the run is wrong.
        InfeasibleError: no architecture can meet the limits.
        LimitMissedError: the chosen model missed a limit when measured.
        ParityError: the chosen model differs from the plain one when exported.
    """
    run.check()
    corpus = load_corpus(run.config.train.data)
    checkpoint = trained(run, reporter, corpus)
    predictor = profiled(run, reporter)
    picks = verified(run, reporter, checkpoint, predictor, corpus)
    distillation = distilled(run, reporter, checkpoint, predictor, picks, corpus)
    summary = summarised(run, checkpoint, corpus, predictor, picks, distillation)
    if picks.measured.unmeasured:
        reporter.warn(picks.measured.unmeasured)
    require_kept(picks.measured)
    if distillation:
        require_tuned(distillation)
    return summary


def trained(run: Run, reporter: Reporter, corpus: Corpus) -> Checkpoint:
    """Train the supernet, unless it is trained.

    Args:
        run: its folder and configuration.
        reporter: shows the progress.
        corpus: of the run.

    Returns:
        The last checkpoint.

    Raises:
        InputError: the held-out text is too short for the search, or the folder has another training.
    """
    settings = run.config.search
    if corpus.recall < 1:  # the evaluations of the search, checked before hours of training
        windows = max(settings.windows, settings.front_windows)
        window_starts(len(corpus.held_out), windows, run.config.train.length or run.space.max_seq_len)
    root, inputs = run.folder / "supernet", training_inputs(run.space, run.config.train, corpus)
    checkpoint = latest_checkpoint(root, inputs)  # refuses one of another training
    run.save_config()
    if checkpoint and checkpoint.step == run.config.train.steps:
        reporter.skipped("train")
        return checkpoint
    with reporter.stage("train") as stage:
        if run.config.train.method == "blockwise":
            return train_blocks(run.space, run.config.train, root, stage, corpus)

        def report(row: Mapping[str, Any]) -> None:
            text = f"loss {row['loss_nats']:.3f} nats, {row['tokens_per_second']:,.0f} tokens/s"
            stage(row_share(row), text)

        return train(run.space, run.config.train, root, report, corpus)


def profiled(run: Run, reporter: Reporter) -> Predictor:
    """Profile this machine, unless its predictor exists.

    Args:
        run: its folder and configuration.
        reporter: shows the progress.

    Returns:
        The predictor of the run's space.
    """
    config = run.config.profile
    runtime = open_runtime(config.runtime, config.threads, config.precision)
    card = open_card(run.devices, run.config.device, runtime.fingerprint())
    path = card.predictor_path(run.space.name, runtime.name, config.threads, config.precision)
    inputs = {"space": run.space.hash, "settings": settings_digest(config)}
    if path.exists():
        read_predictor(path)  # refuses a file that is not whole, which profiling would overwrite
        if PREDICTOR.made_from(path, inputs):
            reporter.skipped("profile")
            return load_predictor(path, run.space, "formfit profile")
    with reporter.stage("profile") as stage:
        return profile(
            run.space, run.devices, run.config.device, config, lambda what, share: stage(share, what)
        )


def verified(
    run: Run, reporter: Reporter, checkpoint: Checkpoint, predictor: Predictor, corpus: Corpus
) -> VerifiedPicks:
    """Run the measured search, and verify the picks.

    Args:
        run: its folder and configuration.
        reporter: shows the progress.
        checkpoint: the supernet's last.
        predictor: of this machine.
        corpus: of the run.

    Raises:
        InfeasibleError: no architecture can meet the limits.
    """
    verifier = _verifier(run, checkpoint, corpus)
    folder = run.folder / "searches" / verifier.card.name
    predictors = {verifier.card.name: predictor}
    measured = run_measured_search(folder, verifier, predictors, run.config.search, reporter)
    return verify_picks(folder, verifier, measured, run.config.picks, reporter)


def distilled(
    run: Run,
    reporter: Reporter,
    checkpoint: Checkpoint,
    predictor: Predictor,
    picks: VerifiedPicks,
    corpus: Corpus,
) -> Distillation | None:
    """Distil the best members that kept the limits; None if none is to be distilled, or none kept them.

    Args:
        run: its folder and configuration.
        reporter: shows the progress.
        checkpoint: the supernet's last.
        predictor: of this machine.
        picks: of the measured search.
        corpus: of the run.
    """
    if not run.config.finalists.count:
        return None
    verifier = _verifier(run, checkpoint, corpus)
    folder = run.folder / "searches" / verifier.card.name
    result = SearchResult(front=picks.front, measured=picks.measured)
    predictors = {verifier.card.name: predictor}
    found = distil_best(
        folder, verifier, result, predictors, run.config.search, run.config.finalists, reporter
    )
    return found if found.finalists else None


def _verifier(run: Run, checkpoint: Checkpoint, corpus: Corpus) -> Verifier:
    card = load_card(run.devices, run.config.device)
    return Verifier(run.folder / "submodels", run.trained(checkpoint, corpus), card, run.config.verify)


def summarised(
    run: Run,
    checkpoint: Checkpoint,
    corpus: Corpus,
    predictor: Predictor,
    picks: VerifiedPicks,
    distillation: Distillation | None = None,
) -> Summary:
    """Write ``summary.json`` and the report, unless they exist.

    Args:
        run: its folder and configuration.
        checkpoint: the supernet's last.
        corpus: of the run.
        predictor: of this machine.
        picks: verified members.
        distillation: of finalists; None for none.
    """
    card = load_card(run.devices, run.config.device)
    results = {pick: VerifiedMember.of(*member) for pick, member in picks.members.items()}
    inputs = {
        "supernet": checkpoint.digest,
        "front": digest(canonical_json([member.to_json() for member in picks.front.members])),
        "verified": digest(canonical_json([member.to_json() for member in results.values()])),
    }
    if distillation:
        inputs["distilled"] = file_digest(distillation.folder / "finalists.json")
    path = run.folder / "summary.json"
    if SUMMARY.made_from(path, inputs):
        return Summary.read(path)
    chosen = results["chosen"]
    summary = Summary(
        space=run.space.name,
        architectures=genome.size(run.space),
        device=card.name,
        fingerprint=card.fingerprint.to_json(),
        text=text_quality(run, checkpoint, corpus, chosen.member.loss_nats),
        predictor={str(w): model.errors for w, model in predictor.models.items() if model.errors},
        front=picks.front.members,
        rounds=len(picks.measured.rounds),
        chosen=chosen,
        verified=results,
        distilled=distillation.to_json(run.folder) if distillation else None,
        inputs=inputs,
    )
    summary.write(path)
    audited = audit_section(run.folder, checkpoint.digest)
    report_search(run.folder / "searches" / card.name, run.space, summary, card, audited)
    return summary


def text_quality(run: Run, checkpoint: Checkpoint, corpus: Corpus, chosen_loss_nats: float) -> TextQuality:
    """Bits per byte of the largest sub-network, of gzip and of an order-2 model, on the same text.

    Args:
        run: its configuration.
        checkpoint: the supernet's last.
        corpus: of the run.
        chosen_loss_nats: held-out loss of the chosen architecture, in nats per token.
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
    return TextQuality(
        source=corpus.source,
        held_out_bytes=data.text_bytes,
        recall_share=data.recall_share,
        largest_bits_per_byte=quality.bits_per_byte,
        largest_recall_loss_nats=quality.recall_loss_nats if data.recallable.any() else None,
        largest_mqar_accuracy=accuracy,
        chosen_bits_per_byte=data.bits_per_byte(chosen_loss_nats),
        gzip_bits_per_byte=gzip_bits_per_byte(corpus.train, data.windows) if baselines else None,
        order2_bits_per_byte=order2_bits_per_byte(corpus.train, data.windows) if baselines else None,
    )


def rewrite_report(folder: Path, devices: Path, png: Path | None = None) -> list[Path]:
    """Write the report of a finished run again.

    Args:
        folder: the run's.
        devices: the folder of the device cards.
        png: the folder that each figure is written to as a PNG; None for none.

    Returns:
        The page, then the images.

    Raises:
        InputError: the run is not finished, or images cannot be drawn on this machine.
    """
    run, summary = open_run(folder, devices), Summary.read(folder / "summary.json")
    card = load_card(devices, summary.device)
    audited = audit_section(folder, summary.inputs["supernet"])
    return report_search(folder / "searches" / card.name, run.space, summary, card, audited, png)
