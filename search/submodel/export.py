"""Export of a sub-model: ONNX graphs in several precisions, and a Hugging Face folder."""

from collections.abc import Sequence
from pathlib import Path

from onnx import load_model, save_model

from search.submodel.formats import check_formats
from space import InputError, Workload
from space.io.artefact import atomic_path, canonical_json, digest, file_digest
from space.onnx.model import model_graph
from space.onnx.quantise import quantise
from space.precision import PRECISIONS, model_file
from supernet.extract import SubModel
from supernet.hf.export import write_hf

HF = "hf"  # the Hugging Face folder, inside the sub-model's


def export(submodel: SubModel, formats: Sequence[str], precisions: Sequence[str] = ()) -> list[str]:
    """Write a sub-model in some formats.

    Args:
        submodel: with its weights.
        formats: ``onnx``, ``hf`` or both.
        precisions: of further ONNX graphs; the one in fp32 is always written.

    Returns:
        The files, relative to the sub-model's folder.

    Raises:
        InputError: the weights or the tokenizer cannot be read, or a format or precision is unknown.
    """
    check_formats(formats, precisions)
    files = []
    if "onnx" in formats:
        files += [export_onnx(submodel, p).name for p in dict.fromkeys(("fp32", *precisions))]
    if "hf" in formats:
        weights = submodel.model().state_dict()
        folder = submodel.folder / HF
        written = write_hf(
            folder, weights, submodel.architecture, submodel.model_config, submodel.tokenizer()
        )
        files += [f"{HF}/{name}" for name in written]
    return files


def export_onnx(submodel: SubModel, precision: str = "fp32") -> Path:
    """Write an ONNX graph beside the weights.

    Args:
        submodel: with its weights.
        precision: of the graph.

    Returns:
        The file.
    """
    weights = {name: p.numpy() for name, p in submodel.model().named_parameters()}
    graph = model_graph(submodel.architecture, submodel.model_config, weights, metadata(submodel, precision))
    path = model_file(submodel.folder, precision)
    with atomic_path(path) as temporary:
        save_model(quantise(graph, precision), str(temporary))
    return path


def exported(submodel: SubModel, workloads: Sequence[Workload]) -> list[str]:
    """The precisions in which a sub-model was exported.

    Args:
        submodel: the sub-model.
        workloads: whose precisions are needed; fp32, the reference of all others, always is.

    Raises:
        InputError: the graph of a needed precision is missing, or a graph cannot be read or is not of the
            weights beside it.
    """
    for needed in dict.fromkeys(["fp32", *(w.precision for w in workloads)]):
        path = model_file(submodel.folder, needed)
        if not path.exists():
            option = "" if needed == "fp32" else f" --precision {needed}"
            raise InputError(f"{path}: not found; `formfit extract --format onnx{option}` writes it")
    found = [p for p in PRECISIONS if model_file(submodel.folder, p).exists()]
    weights = file_digest(submodel.folder / "model.safetensors")
    for path in (model_file(submodel.folder, p) for p in found):
        try:
            written = {item.key: item.value for item in load_model(path).metadata_props}
        except Exception:  # protobuf's errors have no common base but this one
            raise InputError(f"{path}: not a whole graph; `formfit export` writes it again") from None
        if written.get("formfit.weights") != weights:
            raise InputError(f"{path}: not of the weights beside it; `formfit export` writes it again")
    return found


def models_digest(submodel: SubModel, precisions: Sequence[str] = PRECISIONS) -> str:
    """The sha256 over a sub-model's exported graphs.

    Args:
        submodel: the sub-model.
        precisions: whose graphs count, if they exist.
    """
    files = [path for p in precisions if (path := model_file(submodel.folder, p)).exists()]
    return digest(canonical_json({path.name: file_digest(path) for path in files}))


def metadata(submodel: SubModel, precision: str) -> dict[str, str]:
    """The metadata of an exported graph: names as text, other values as JSON; docs/files.md has the keys.

    Args:
        submodel: the sub-model.
        precision: of the graph.
    """
    text = submodel.text
    values = {
        "key": submodel.architecture.key,
        "architecture": canonical_json(submodel.architecture.to_json()),
        "model_config": canonical_json(submodel.model_config.to_json()),
        "vocab_size": str(submodel.model_config.vocab_size),
        "max_seq_len": str(submodel.model_config.max_seq_len),
        "trained_length": str(text.length if text else submodel.model_config.max_seq_len),
        "tokenizer": submodel.tokenizer_digest or "bytes",
        "precision": precision,
        "weights": file_digest(submodel.folder / "model.safetensors"),
        "limits": canonical_json(submodel.chosen.get("limits", [])),
        "predicted": canonical_json(submodel.chosen.get("predicted", {})),
    }
    return {f"formfit.{name}": value for name, value in values.items()}
