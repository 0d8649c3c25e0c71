"""Claim: torch, ONNX and Hugging Face compute the same function for every architecture.

Fifty random architectures with every mixer, grouped heads, empty layers and every FFN size, and distinct
values in every weight: a prefill of 96 tokens, and 64 tokens read one at a time after a prefill of 32, so
that sliding windows wrap. Each result is compared with the plain model in fp64 (docs/files.md has the bound).
Rows with left padding are compared with the same rows without it, and 64 greedy tokens of `formfit generate`
with those of transformers' generate().
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import torch

from search.submodel.decoder import Decoder
from search.submodel.export import export
from search.submodel.generation import Sampling, generate, near_tie
from search.submodel.parity import PARITY_BOUND, relative_error
from space import Space
from space.blocks import Model
from space.genome import decode
from space.io.config import parse
from space.mixers import MIXERS
from space.variation import sample
from supernet.extract import SubModel, write_submodel
from supernet.supernet import Supernet

SPACE = {
    "name": "parity", "vocab_size": 256, "max_seq_len": 192, "head_dim": 16, "width": [32, 48, 64],
    "depth": [1, 2, 3, 4, 5],
    "layer": {
        "mixer": [*MIXERS, "none"], "heads": [1, 2, 4], "kv_heads": [1, 2], "ffn": [0, 32, 64, 96],
        "window": [8, 16],
    },
    "hybrid": {"ratios": ["full", 1, 2, 3, "linear"]},
}  # fmt: skip
PREFILL, READ, STEPS = 96, 32, 64
PADS = (0, 5, 40)  # tokens of padding on the left of three rows


def scattered(space: Space) -> Supernet:
    """Return a supernet at initialisation scale with distinct values in all parameters."""
    supernet, generator = Supernet(space), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in supernet.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += noise * (0.1 if parameter.ndim == 1 else 0.03)
    return supernet.requires_grad_(False)


def carried(output: Any) -> dict[str, Any]:
    """Return the cache of a call as keyword argument, by its name in the installed transformers version."""
    name = "cache" if "cache" in output else "past_key_values"
    return {name: output[name]}


@torch.inference_mode()
def errors(submodel: SubModel, hf: Any) -> dict[str, float]:
    """Return the largest relative errors against the plain model in fp64, also of left-padded rows."""
    plain = submodel.model()
    precise = Model(submodel.architecture, submodel.model_config).double()
    precise.load_state_dict({name: p.double() for name, p in plain.state_dict().items()})
    text = np.random.default_rng(0).integers(1, 256, (1, PREFILL))
    tokens = torch.from_numpy(text)
    whole = precise(tokens)[0].numpy()
    found: dict[str, Any] = {"torch_prefill": plain(tokens)[0].numpy()}
    decoder = Decoder(submodel.folder / "model.onnx")
    found["onnx_prefill"] = decoder(text, decoder.start())[0]
    found["hf_prefill"] = hf(input_ids=tokens).logits.numpy()

    steps: dict[str, list[Any]] = {"torch": [], "onnx": [], "hf": []}
    states = plain(tokens[:, :READ])[1]
    _, state = decoder(text[:, :READ], decoder.start())
    past = hf(input_ids=tokens[:, :READ], use_cache=True)
    for t in range(READ, READ + STEPS):
        now = tokens[:, t : t + 1]
        out, states = plain(now, t, states)
        steps["torch"].append(out.numpy())
        out, state = decoder(text[:, t : t + 1], state)
        steps["onnx"].append(out)
        past = hf(input_ids=now, **carried(past), use_cache=True)
        steps["hf"].append(past.logits.numpy())
    found |= {f"{who}_decode": np.concatenate(rows, axis=1) for who, rows in steps.items()}
    result = {
        name: relative_error(value, whole if name.endswith("prefill") else whole[:, READ : READ + STEPS])
        for name, value in found.items()
    }

    batch, mask = tokens.repeat(len(PADS), 1), torch.ones(len(PADS), PREFILL, dtype=torch.long)
    for row, pad in enumerate(PADS):
        batch[row] = tokens[0].roll(pad)
        batch[row, :pad], mask[row, :pad] = 0, 0
    padded = hf(input_ids=batch, attention_mask=mask).logits.numpy()
    result["hf_padded"] = max(
        relative_error(padded[row, pad:], whole[0, : PREFILL - pad]) for row, pad in enumerate(PADS)
    )
    return result


@torch.inference_mode()
def same_text(submodel: SubModel, hf: Any) -> tuple[bool, int]:
    """Return whether the greedy tokens of both agree, and the number of near ties."""
    prompt = np.random.default_rng(1).integers(1, 256, 20)
    ids = torch.from_numpy(prompt[None])
    theirs = hf.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    decoder = Decoder(submodel.folder / "model.onnx")
    ours = list(generate(decoder, prompt.tolist(), STEPS, Sampling(), None))
    logits, _ = decoder(np.array([[*prompt.tolist(), *ours[:-1]]]), decoder.start())
    return ours == theirs, sum(near_tie(row) for row in logits[0, len(prompt) - 1 :])


def main() -> int:
    arguments = outcome.options(__doc__).parse_args()
    space = parse(Space, SPACE, "parity")
    supernet = scattered(space)
    architectures = decode(space, sample(space, np.random.default_rng(0), 6 if arguments.quick else 50))
    rows = []
    with tempfile.TemporaryDirectory() as temporary, torch.random.fork_rng():
        os.environ["HF_MODULES_CACHE"] = str(Path(temporary) / "modules")
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        warnings.simplefilter("ignore")
        for architecture in architectures:
            submodel = write_submodel(Path(temporary) / architecture.key, supernet, architecture, {}, {})
            export(submodel, ["onnx", "hf"])
            hf = AutoModelForCausalLM.from_pretrained(submodel.folder / "hf", trust_remote_code=True).eval()
            found, (same, ties) = errors(submodel, hf), same_text(submodel, hf)
            bound = max(PARITY_BOUND, 3 * max(found["torch_prefill"], found["torch_decode"]))
            rows.append(
                {
                    "architecture": architecture.describe(), "errors": found, "bound": bound,
                    "kept": max(found.values()) <= bound, "same_text": same, "near_ties": ties,
                    "class": type(hf).__name__,
                }
            )  # fmt: skip
    worst = {name: max(row["errors"][name] for row in rows) for name in rows[0]["errors"]}
    mixers = {layer.mixer for a in architectures for layer in a.layers}
    count = len(rows)
    checks = {
        f"all {len(MIXERS)} mixers and empty layers occur": arguments.quick or mixers == {*MIXERS, "none"},
        f"{sum(row['kept'] for row in rows)} of {count} within the bound": all(row["kept"] for row in rows),
        f"largest error {max(worst.values()):.1e} <= {PARITY_BOUND:.0e}": max(worst.values()) <= PARITY_BOUND,
        f"{sum(row['same_text'] for row in rows)} of {count} generate the same 64 tokens": all(
            row["same_text"] for row in rows
        ),
    }
    return outcome.write("parity", arguments, {"worst": worst, "architectures": rows}, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
