"""Fine-tuning: a sub-model learns a new text, distilled from the largest sub-network of a supernet.

The sub-model starts from its own weights and is trained as finalists are
(:mod:`supernet.training.distillation`): a killed run resumes, and the final weights are the same, bit for bit
at the same thread count. The result is a sub-model's folder whose ``text`` is the new one.

``finetune.json`` is written before the training, so that the folder shows its purpose, and again at the end;
see :class:`FineTuning` for its content.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from search.submodel.verify import choice_of
from space import InputError, genome
from space.io.artefact import Artefact, check_inputs, file_digest
from space.io.progress import Reporter
from space.io.record import read_document, read_record
from supernet.data.corpus import Corpus, DataConfig, load_corpus, require_fits
from supernet.data.tokenizer import load_tokenizer
from supernet.evaluate import EvaluationSet, evaluate, evaluation_digest, evaluation_set, losses
from supernet.extract import SUBMODEL, SubModel, Text, read_submodel, write_submodel
from supernet.training.distillation import distil, distil_inputs, largest_teacher, load_subnet
from supernet.training.loop import row_share
from supernet.training.recipe import TrainConfig
from supernet.training.train import Trained, load_supernet
from supernet.training.trainer import Weights
from supernet.training.trials import one_thread, remove_checkpoints

FINETUNING = Artefact("fine-tuning", "formfit finetune")
STAGE = "finetune"
WARMUP = 0.05  # share of the steps
CHECKPOINT_EVERY = 50
HeldOutLosses = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class TeacherName:
    """The model that a fine-tuning distils from.

    Attributes:
        run: the folder of its run.
        key: its architecture's key.
    """

    run: str
    key: str


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """A fine-tuning that is under way or finished: the content of ``finetune.json``.

    Attributes:
        key: the architecture's key.
        steps: of the training.
        before: ``loss_nats``, ``recall_loss_nats`` (None if nothing can be recalled) and ``bits_per_byte``
            (None if the number of bytes is unknown) of the sub-model on held-out sequences of the new text.
        after: the same of the tuned model on the same sequences; None until the end.
        model: sha256 of the tuned weights; None until the end.
        teacher: the teacher's run and architecture.
        text: the new text, and the length and number of the held-out sequences.
        inputs: sha256 of everything that the result depends on, by name.
    """

    key: str
    steps: int
    before: HeldOutLosses
    after: HeldOutLosses | None = None
    model: str | None = None
    teacher: TeacherName
    text: Text
    inputs: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The JSON object, without its header."""
        return {
            "key": self.key,
            "steps": self.steps,
            "before": self.before,
            "after": self.after,
            "model": self.model,
            "teacher": dict(vars(self.teacher)),
            "text": self.text.model_dump(mode="json"),
        }

    def write(self, path: Path) -> None:
        """Write ``finetune.json`` atomically.

        Args:
            path: the file.
        """
        FINETUNING.write(path, self.inputs, self.to_json())

    @staticmethod
    def read(path: Path) -> "FineTuning":
        """Read a ``finetune.json``.

        Args:
            path: the file.

        Raises:
            InputError: the file is missing, not whole, or of another kind or schema version.
        """
        with FINETUNING.checked(path):
            return read_document(
                FineTuning,
                FINETUNING.read(path),
                teacher=lambda item: read_record(TeacherName, item),
                text=Text.model_validate,
            )


class FinetuneConfig(BaseModel):
    """Settings of fine-tuning.

    Attributes:
        steps: of the training.
        batch: rows of a step.
        learning_rate: peak; after a short warm-up it decays along a cosine.
        distillation: weight of the teacher's loss; the text's loss has the rest, up to 1.
        length: tokens of a row; None for the length that the sub-model, or else the run, was trained with.
        threads: of torch; None for all cores.
        seed: of the batches.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: Annotated[int, Field(gt=0)] = 200
    batch: Annotated[int, Field(gt=0)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.5
    length: Annotated[int, Field(gt=1)] | None = None
    threads: Annotated[int, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    def training(self, length: int) -> TrainConfig:
        """The training's configuration.

        Args:
            length: tokens of a row.
        """
        return TrainConfig(
            **self.model_dump(exclude={"length"}),
            length=length,
            warmup=WARMUP,
            checkpoint_every=CHECKPOINT_EVERY,
        )


def finetune(
    submodel: SubModel,
    trained: Trained,
    teacher_run: Path,
    data: DataConfig,
    out: Path,
    config: FinetuneConfig,
    reporter: Reporter,
) -> SubModel:
    """Fine-tune a sub-model into a folder of its own, or resume a fine-tuning that was stopped.

    Args:
        submodel: only read.
        trained: a trained supernet whose space has the architecture; its largest sub-network is the teacher.
        teacher_run: the folder of its run, for records and messages.
        data: the new text; the tokenizer is the run's and can be left out.
        out: the folder of the tuned sub-model, with ``finetune.json`` and ``training/metrics.jsonl``.
        config: settings.
        reporter: shows the progress, or that the result exists already.

    Raises:
        InputError: the sub-model does not fit the supernet; the tokenizers differ; the text is too short;
            ``out`` is the sub-model's own folder, another fine-tuning or a folder of other files; or a loss
            is not finite.
    """
    architecture = submodel.architecture
    if out.resolve() == submodel.folder.resolve():
        raise InputError(f"{out}: the folder of the sub-model itself; give the tuned one a folder of its own")
    _require_fitting(submodel, trained, teacher_run)
    text, corpus = _new_text(submodel, trained, teacher_run, data, config)
    evaluation = evaluation_set(corpus, text.windows, text.length)
    supernet = load_supernet(trained.space, trained.checkpoint)
    start, teacher = submodel.model().state_dict(), largest_teacher(supernet)
    training = config.training(text.length)
    inputs = {
        "supernet": trained.checkpoint.digest,
        **distil_inputs(trained.space, training, architecture, start, teacher, corpus),
        "evaluation": evaluation_digest(evaluation),
    }
    path = out / "finetune.json"
    if path.exists():
        record = _earlier(out, inputs)
        if _is_finished(out, record):
            reporter.skipped(STAGE)
            remove_checkpoints(out / "training")
            return read_submodel(out)
    else:
        _require_empty(out)
        record = FineTuning(
            key=architecture.key,
            steps=config.steps,
            before=_held_out_losses(start, submodel, evaluation, str(submodel.folder)),
            teacher=TeacherName(run=str(teacher_run), key=teacher.architecture.key),
            text=text,
            inputs=inputs,
        )
        record.write(path)
    with reporter.stage(STAGE) as stage:
        checkpoint = distil(
            trained.space, training, out / "training", architecture, start, teacher, corpus,
            report=lambda row: stage(row_share(row), f"loss {row['loss_nats']:.3f} nats"),
        )  # fmt: skip
        tuned = checkpoint.load("model")
        after = _held_out_losses(tuned, submodel, evaluation, f"{out}: after {config.steps} steps")
        load_subnet(supernet, architecture, tuned)
        # The loss inside the supernet no longer holds; limits and predicted latencies do.
        choice = replace(choice_of(submodel), loss_nats=None).to_json() if submodel.chosen else {}
        write_submodel(out, supernet, architecture, inputs, choice, text)
    replace(record, after=after, model=file_digest(out / "model.safetensors")).write(path)
    remove_checkpoints(out / "training")
    return read_submodel(out)


def _earlier(out: Path, inputs: Mapping[str, str]) -> FineTuning:
    """The record of a fine-tuning that was started in a folder.

    Raises:
        InputError: it has other inputs.
    """
    path = out / "finetune.json"
    check_inputs(path, FINETUNING.read(path), inputs)
    return FineTuning.read(path)


def _is_finished(out: Path, record: FineTuning) -> bool:
    weights = out / "model.safetensors"
    whole = weights.exists() and file_digest(weights) == record.model
    return whole and SUBMODEL.made_from(out / "architecture.json", record.inputs)


def _require_fitting(submodel: SubModel, trained: Trained, teacher_run: Path) -> None:
    """Refuse a sub-model whose model config is not the supernet's, or that is not a member of its space."""
    space, architecture = trained.space, submodel.architecture
    ours, theirs = vars(submodel.model_config), vars(space.config)
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        one, other = (", ".join(f"{name} {config[name]}" for name in differing) for config in (ours, theirs))
        raise InputError(
            f"{submodel.folder}: the sub-model has {one}, the teacher {teacher_run} has {other}; "
            "they have to be equal"
        )
    row = genome.encode(space, [architecture])
    if not genome.contains(space, row)[0]:
        raise InputError(
            f"{submodel.folder}: architecture {architecture.key} is not of space {space.name} of the teacher "
            f"{teacher_run}: {genome.reasons_outside(space, row[0])}"
        )


def _new_text(
    submodel: SubModel, trained: Trained, teacher_run: Path, data: DataConfig, config: FinetuneConfig
) -> tuple[Text, Corpus]:
    """The new text with the run's tokenizer, and its corpus.

    Raises:
        InputError: a tokenizer is not the run's, or the text or the context is too short for the rows or the
            held-out sequences.
    """
    tokenizer = trained.text.data.tokenizer
    wanted, given = _tokens(tokenizer), {}
    if submodel.text:
        given[f"the sub-model {submodel.folder}"] = submodel.tokenizer_digest
    if data.tokenizer:
        given[f"data.tokenizer {data.tokenizer}"] = _tokens(data.tokenizer)
    for name, digest in given.items():
        if digest != wanted:
            raise InputError(
                f"{name} has {_named(digest)}, the teacher {teacher_run} has {_named(wanted)}; "
                "they have to be equal"
            )
    known = submodel.text or trained.text
    length = config.length or known.length
    max_seq_len = trained.space.max_seq_len
    if length > max_seq_len:
        raise InputError(f"length: {length} is more than the context {max_seq_len} of the sub-model")
    data = data.model_copy(update={"tokenizer": tokenizer})
    corpus = load_corpus(data)
    require_fits(corpus, trained.space.vocab_size, length)
    # A user's text may be short: it is evaluated on as many sequences as there are.
    windows = min(known.windows, len(corpus.held_out) // (length + 1)) or known.windows
    return Text(data=data, length=length, windows=windows), corpus


def _tokens(tokenizer: Path | None) -> str | None:
    """The sha256 of a tokenizer; None if bytes are the tokens."""
    return load_tokenizer(tokenizer).digest if tokenizer else None


def _named(digest: str | None) -> str:
    return f"tokenizer {digest[:12]}" if digest else "bytes as tokens"


def _require_empty(out: Path) -> None:
    """Refuse a folder with files; hidden ones do not count because a killed process may leave them."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: not a folder; give one that is empty or does not exist")
    if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise InputError(
            f"{out}: not empty, and no fine-tuning; give a folder that is empty or does not exist"
        )


def _held_out_losses(weights: Weights, submodel: SubModel, data: EvaluationSet, where: str) -> HeldOutLosses:
    """The losses of weights of the sub-model's architecture on held-out sequences.

    Raises:
        InputError: the loss is not finite.
    """
    with one_thread():
        quality = evaluate(weights, submodel.architecture, submodel.model_config, data)
    if not math.isfinite(quality.loss_nats):
        raise InputError(f"{where}: the held-out loss is {quality.loss_nats}")
    return {**losses(quality), "bits_per_byte": quality.bits_per_byte}
