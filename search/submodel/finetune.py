"""Fine-tuning: a sub-model learns a person's own text, and from a supernet's largest sub-network beside it.

The sub-model starts from its own weights and learns as a finalist does
(:mod:`supernet.training.distillation`): the steps of a run that was killed are taken up again, and the
weights at the end are the same, bit for bit at the same thread count. What comes of it is a sub-model's
folder of its own, whose ``text`` is the new one.

``finetune.json`` is written first, so that the folder tells what it is becoming, and once more at the end:

- ``key``: the architecture's; ``steps``: how many it learns for.
- ``before``, ``after``: ``loss_nats``, ``recall_loss_nats`` (null where nothing can be recalled) and
  ``bits_per_byte`` (null where the bytes are unknown), both on the same held-out sequences of the new text;
  ``after`` is null until the end.
- ``model``: the sha256 of the tuned weights; null until the end.
- ``teacher``: ``run``, its folder, and ``key``, the teaching architecture's.
- ``text``: ``data``, and ``length`` and ``windows`` of the held-out sequences.
"""

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from search.workspace import Run, open_supernet
from space import InputError, genome
from space.io.artefact import Artefact, check_inputs, file_digest
from space.io.progress import Reporter
from supernet.data.corpus import Corpus, DataConfig, load_corpus, require_fits
from supernet.data.tokenizer import load_tokenizer
from supernet.evaluate import EvaluationSet, evaluate, evaluation_digest, evaluation_set, losses
from supernet.extract import SUBMODEL, SubModel, Text, read_submodel, write_submodel
from supernet.training.distillation import distil, distil_inputs, load_subnet, largest_teacher
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_supernet
from supernet.training.trainer import Weights
from supernet.training.trials import one_thread, remove_checkpoints

FINETUNING = Artefact("fine-tuning", "formfit finetune")
MADE_BY = "formfit finetune"
STAGE = "finetune"
WARMUP = 0.05  # share of the steps
CHECKPOINT_EVERY = 50


class FinetuneConfig(BaseModel):
    """How a sub-model is fine-tuned.

    Attributes:
        steps: how many.
        batch: rows of a step.
        learning_rate: the greatest; it rises shortly, then falls along a cosine.
        distillation: the weight of the teacher against the text.
        length: tokens of a row; None is what the sub-model was trained with, or else the run.
        threads: of torch; None is all cores.
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
        """The training that these settings mean, on rows of ``length`` tokens."""
        return TrainConfig(
            **self.model_dump(exclude={"length"}),
            length=length,
            warmup=WARMUP,
            checkpoint_every=CHECKPOINT_EVERY,
        )


def finetune(
    submodel: SubModel, run: Run, data: DataConfig, out: Path, config: FinetuneConfig, reporter: Reporter
) -> SubModel:
    """Fine-tune a sub-model into a folder of its own, or go on where that stopped.

    Args:
        submodel: what is tuned; its folder is only read.
        run: a finished training on a space that has the architecture; its largest sub-network teaches.
        data: the new text; the tokenizer is the run's, and need not be named.
        out: the folder: a sub-model's, with ``finetune.json`` and ``training/metrics.jsonl``.
        config: how.
        reporter: told how far it is, or that the result is there.

    Raises:
        InputError: the sub-model does not fit the run, the tokenizers differ, the text is too short, ``out``
            is the sub-model's own folder, another fine-tuning or something else, or a loss is not finite.
    """
    space, architecture = run.space, submodel.architecture
    if out.resolve() == submodel.folder.resolve():
        raise InputError(f"{out}: the folder of the sub-model itself; give the tuned one a folder of its own")
    _require_fitting(submodel, run)
    checkpoint = open_supernet(run, load_corpus(run.config.train.data))
    text, corpus = _new_text(submodel, run, data, config)
    evaluation = evaluation_set(corpus, text.windows, text.length)
    supernet = load_supernet(space, checkpoint)
    start, teacher = submodel.model().state_dict(), largest_teacher(supernet)
    training = config.training(text.length)
    inputs = {
        "supernet": checkpoint.digest,
        **distil_inputs(space, training, architecture, start, teacher, corpus),
        "evaluation": evaluation_digest(evaluation),
    }
    path, weights = out / "finetune.json", out / "model.safetensors"
    if path.exists():
        value = FINETUNING.read(path)
        check_inputs(path, value, inputs)
        whole = weights.exists() and file_digest(weights) == value["model"]
        if whole and SUBMODEL.made_from(out / "architecture.json", inputs):
            reporter.skipped(STAGE)
            remove_checkpoints(out / "training")
            return read_submodel(out)
    else:
        _require_empty(out)
        value = {
            "key": architecture.key,
            "steps": config.steps,
            "before": _judged(start, submodel, evaluation, str(submodel.folder)),
            "after": None,
            "model": None,
            "teacher": {"run": str(run.folder), "key": teacher.architecture.key},
            "text": text.model_dump(mode="json"),
        }
        FINETUNING.write(path, inputs, value)
    with reporter.stage(STAGE) as stage:
        found = distil(
            space, training, out / "training", architecture, start, teacher, corpus,
            report=lambda row: stage(row["step"] / row["steps"], f"loss {row['loss_nats']:.3f} nats"),
        )  # fmt: skip
        tuned = found.load("model")
        after = _judged(tuned, submodel, evaluation, f"{out}: after {config.steps} steps")
        load_subnet(supernet, architecture, tuned)
        # What it was measured to reach before holds no longer; limits and latencies do.
        chosen = {name: part for name, part in submodel.chosen.items() if name != "loss_nats"}
        write_submodel(out, supernet, architecture, inputs, chosen, text)
    body = {name: part for name, part in value.items() if name != "header"}
    FINETUNING.write(path, inputs, body | {"after": after, "model": file_digest(weights)})
    remove_checkpoints(out / "training")
    return read_submodel(out)


def _require_fitting(submodel: SubModel, run: Run) -> None:
    """Refuse a sub-model whose frame is not the run's, or whose architecture is not of its space."""
    space, architecture = run.space, submodel.architecture
    ours, theirs = vars(submodel.model_config), vars(space.config)
    apart = [name for name in ours if ours[name] != theirs[name]]
    if apart:
        one, other = (
            ", ".join(f"{name} {model_config[name]}" for name in apart) for model_config in (ours, theirs)
        )
        raise InputError(
            f"{submodel.folder}: the sub-model has {one}, the teacher {run.folder} has {other}; they have to "
            "be equal"
        )
    if not genome.contains(space, genome.encode(space, [architecture]))[0]:
        raise InputError(
            f"{submodel.folder}: architecture {architecture.key} is not of space {space.name} of the teacher "
            f"{run.folder}: its hybrid rule excludes it"
        )


def _new_text(submodel: SubModel, run: Run, data: DataConfig, config: FinetuneConfig) -> tuple[Text, Corpus]:
    """The new text with the run's tokenizer, and what is read of it.

    Raises:
        InputError: a tokenizer is not the run's; rows or held-out sequences that the text or the context is
            too short for.
    """
    tokenizer = run.config.train.data.tokenizer
    wanted, given = _tokens(tokenizer), {}
    if submodel.text:
        given[f"the sub-model {submodel.folder}"] = submodel.tokenizer_digest
    if data.tokenizer:
        given[f"data.tokenizer {data.tokenizer}"] = _tokens(data.tokenizer)
    for name, digest in given.items():
        if digest != wanted:
            raise InputError(
                f"{name} has {_named(digest)}, the teacher {run.folder} has {_named(wanted)}; "
                "they have to be equal"
            )
    known = submodel.text or run.text
    length = config.length or known.length
    if length > run.space.max_seq_len:
        raise InputError(
            f"length: {length} is more than the context {run.space.max_seq_len} of the sub-model"
        )
    data = data.model_copy(update={"tokenizer": tokenizer})
    corpus = load_corpus(data)
    require_fits(corpus, run.space.vocab_size, length)
    # A person's own text may be short: it is judged on as many sequences as there are.
    windows = min(known.windows, len(corpus.held_out) // (length + 1)) or known.windows
    return Text(data=data, length=length, windows=windows), corpus


def _tokens(tokenizer: Path | None) -> str | None:
    """The digest of a tokenizer; None where bytes are the tokens."""
    return load_tokenizer(tokenizer).digest if tokenizer else None


def _named(digest: str | None) -> str:
    return f"tokenizer {digest[:12]}" if digest else "bytes as tokens"


def _require_empty(out: Path) -> None:
    """Refuse a place where something is; hidden files do not count, a killed process leaves them."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: not a folder; give one that is empty or not there")
    if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise InputError(f"{out}: not empty, and no fine-tuning; give a folder that is empty or not there")


def _judged(weights: Weights, submodel: SubModel, data: EvaluationSet, where: str) -> dict[str, Any]:
    """What weights of the sub-model's architecture reach on held-out sequences.

    Raises:
        InputError: the loss is not finite.
    """
    with one_thread():
        quality = evaluate(weights, submodel.architecture, submodel.model_config, data)
    if not math.isfinite(quality.loss_nats):
        raise InputError(f"{where}: the held-out loss is {quality.loss_nats}")
    return {**losses(quality), "bits_per_byte": quality.bits_per_byte}
