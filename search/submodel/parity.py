"""Parity: errors of every form of a sub-model against the plain model in fp64."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from search.engine.verification import Parity
from search.submodel.decoder import Decoder
from search.submodel.export import HF
from space.blocks import Model, State
from space.precision import model_file
from supernet.extract import SubModel
from supernet.hf.export import load_hf

PARITY_BOUND = 1e-5  # max|a-b| / max|b|
# Errors up to so many times that of the plain model in fp32 count as rounding.
FP32_ERROR_FACTOR = 3
Tokens = NDArray[np.int64]
States = dict[str, NDArray[Any]]
Reader = Callable[[Sequence[int]], tuple[NDArray[Any], States]]  # reads the text up to each of some positions


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """``max|a-b| / max|b|``; infinite if a value is not finite.

    Args:
        found: a.
        expected: b, of the same shape.
    """
    if not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def fp64_model(submodel: SubModel) -> Model:
    """The plain model of a sub-model in fp64.

    Args:
        submodel: with its weights.
    """
    precise = Model(submodel.architecture, submodel.model_config).double()
    weights = submodel.model().state_dict()
    precise.load_state_dict({name: value.double() for name, value in weights.items()})
    return precise


def parity_tokens(submodel: SubModel, count: int, seed: int = 0) -> Tokens:
    """Random tokens [1, T] that forms of a sub-model are compared on.

    Args:
        submodel: its ``max_seq_len`` bounds T.
        count: T.
        seed: of the tokens.
    """
    rng = np.random.default_rng(seed)
    config = submodel.model_config
    return rng.integers(0, config.vocab_size, (1, min(count, config.max_seq_len)))


@torch.inference_mode()
def parity(submodel: SubModel, tokens: int, seed: int = 0, device: str = "cpu") -> Parity:
    """Errors of the plain fp32 model and of its exported fp32 graph against the plain model in fp64.

    Logits and final states are compared for a prefill, token by token, and for a prefill in two parts. The
    bound is 1e-5, or three times the plain fp32 model's own error if that is more.

    Args:
        submodel: with its exported graph. The logits of its Hugging Face folder are compared too, if it has
            one.
        tokens: length of the text.
        seed: of the text.
        device: of torch; another than ``cpu`` adds the plain model there.

    Raises:
        InputError: the weights, the graph or the Hugging Face folder cannot be loaded.
    """
    plain, decoder = submodel.model(), Decoder(model_file(submodel.folder))
    text = parity_tokens(submodel, tokens, seed)
    length = text.shape[1]
    expected, expected_states = fp64_model(submodel)(torch.from_numpy(text))
    reference = {"logits": expected.numpy(), **flat(expected_states)}
    readers: dict[str, Reader] = {
        "torch": partial(_read_torch, plain, "cpu", text),
        "onnx": partial(_read_onnx, decoder, text),
    }
    if device != "cpu":
        readers[device] = partial(_read_torch, plain, device, text)
    unmeasured = []
    if (submodel.folder / HF / "config.json").exists():
        if find_spec("transformers"):
            readers["hf"] = partial(_read_hf, load_hf(submodel.folder / HF), text)
        else:
            unmeasured.append("hf: transformers is not installed")
    ways = {"prefill": [0, length], "split": [0, length // 3, length], "decode": list(range(length + 1))}
    errors = {
        f"{form}_{way}": _worst_error(read(cuts), reference)
        for form, read in readers.items()
        for way, cuts in ways.items()
    }
    rounding = max(error for name, error in errors.items() if name.startswith("torch"))
    bound = max(PARITY_BOUND, FP32_ERROR_FACTOR * rounding)
    return Parity(errors=errors, bound=bound, tokens=length, unmeasured=tuple(unmeasured))


def _worst_error(result: tuple[NDArray[Any], States], reference: States) -> float:
    logits, states = result
    return max(relative_error(value, reference[key]) for key, value in {"logits": logits, **states}.items())


def _read_torch(model: Model, device: str, text: Tokens, cuts: Sequence[int]) -> tuple[NDArray[Any], States]:
    """Logits [1, T, V] and final states of the plain model; ``cuts`` are the ends of the parts."""
    model, logits, states = model.to(device), [], None
    for start, end in pairwise(cuts):
        out, states = model(torch.from_numpy(text[:, start:end]).to(device), start, states)
        logits.append(out.cpu().numpy())
    return np.concatenate(logits, axis=1), flat(states or {})


def _read_onnx(decoder: Decoder, text: Tokens, cuts: Sequence[int]) -> tuple[NDArray[Any], States]:
    """The same of an exported graph."""
    logits, state = [], decoder.start(capacity=text.shape[1])
    for start, end in pairwise(cuts):
        out, state = decoder(text[:, start:end], state)
        logits.append(out)
    return np.concatenate(logits, axis=1), dict(decoder.arrays(state))


def _read_hf(model: Any, text: Tokens, cuts: Sequence[int]) -> tuple[NDArray[Any], States]:
    """The logits [1, T, V] of a Hugging Face model; its states have another form and are not compared."""
    logits: list[NDArray[Any]] = []
    past: dict[str, Any] = {}
    for start, end in pairwise(cuts):
        out = model(input_ids=torch.from_numpy(text[:, start:end]), use_cache=True, **past)
        name = "cache" if "cache" in out else "past_key_values"  # the name before transformers 5.24
        past = {name: out[name]}
        logits.append(out.logits.numpy())
    return np.concatenate(logits, axis=1), {}


def flat(states: Mapping[int, State]) -> States:
    """States as arrays by their names in the exported graph.

    Args:
        states: of a plain model, by slot.
    """
    return {
        f"state.{slot}.{name}": t.cpu().numpy() for slot, state in states.items() for name, t in state.items()
    }
