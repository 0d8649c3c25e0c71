"""Parity: what every form of a sub-model computes, against the plain model in fp64."""

import math
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from search.submodel.decoder import Decoder
from search.submodel.export import HF
from space.blocks import Model, State
from supernet.extract import SubModel
from supernet.hf.export import load_hf

PARITY = 1e-5  # max|a-b| / max|b|
States = dict[str, NDArray[Any]]


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """``max|a-b| / max|b|``; infinite where something is not finite."""
    if not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@torch.inference_mode()
def parity(submodel: SubModel, path: Path, tokens: int, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Errors of the plain fp32 model and of its exported fp32 graph against the plain model in fp64.

    Where ``device`` is not the CPU, also of the plain model there; where there is a Hugging Face folder, of
    its logits.

    Prefill, token by token, and a prefill split in two are compared, logits and final states.
    The bound is 1e-5, or three times the plain fp32 model's own error where that is more.
    """
    plain, decoder = submodel.model(), Decoder(path)
    precise = Model(submodel.architecture, submodel.model_config).double()
    precise.load_state_dict({name: p.double() for name, p in plain.state_dict().items()})
    rng = np.random.default_rng(seed)
    text = rng.integers(
        0, submodel.model_config.vocab_size, (1, min(tokens, submodel.model_config.max_seq_len))
    )
    length = text.shape[1]
    expected, expected_states = precise(torch.from_numpy(text))

    def torch_run(cuts: list[int], where: str = "cpu") -> tuple[NDArray[Any], States]:
        model, logits, states = plain.to(where), [], None
        for start, end in pairwise(cuts):
            out, states = model(torch.from_numpy(text[:, start:end]).to(where), start, states)
            logits.append(out.cpu().numpy())
        return np.concatenate(logits, axis=1), flat(states or {})

    def onnx_run(cuts: list[int]) -> tuple[NDArray[Any], States]:
        logits, state = [], decoder.start(capacity=length)
        for start, end in pairwise(cuts):
            out, state = decoder(text[:, start:end], state)
            logits.append(out)
        return np.concatenate(logits, axis=1), dict(decoder.arrays(state))

    reference = {"logits": expected.numpy(), **flat(expected_states)}
    errors = {}
    ways = {"prefill": [0, length], "split": [0, length // 3, length], "decode": list(range(length + 1))}

    def hf_run(cuts: list[int]) -> tuple[NDArray[Any], States]:
        logits: list[NDArray[Any]] = []
        past: dict[str, Any] = {}
        for start, end in pairwise(cuts):
            out = hf(input_ids=torch.from_numpy(text[:, start:end]), use_cache=True, **past)
            name = "cache" if "cache" in out else "past_key_values"  # as transformers before 5.24 calls it
            past = {name: out[name]}
            logits.append(out.logits.numpy())
        return np.concatenate(logits, axis=1), {}

    runs = {"torch": torch_run, "onnx": onnx_run}
    if device != "cpu":
        runs[device] = partial(torch_run, where=device)
    shipped = (submodel.folder / HF / "config.json").exists()
    unmeasured = []
    if shipped and not find_spec("transformers"):
        unmeasured.append("hf: transformers is not installed")
    elif shipped:
        hf, runs["hf"] = load_hf(submodel.folder / HF), hf_run
    for name, run in runs.items():
        for way, cuts in ways.items():
            logits, states = run(cuts)
            errors[f"{name}_{way}"] = max(
                relative_error(value, reference[key]) for key, value in {"logits": logits, **states}.items()
            )
    own = max(error for name, error in errors.items() if name.startswith("torch"))
    bound = max(PARITY, 3 * own)
    kept = max(errors.values()) <= bound
    return {"errors": errors, "bound": bound, "tokens": length, "kept": kept, "UNMEASURED": unmeasured}


def flat(states: Mapping[int, State]) -> States:
    """States by the names that the exported graph gives them."""
    return {
        f"state.{slot}.{name}": t.cpu().numpy() for slot, state in states.items() for name, t in state.items()
    }
