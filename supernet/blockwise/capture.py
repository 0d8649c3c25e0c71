"""The parent's residual stream before each layer, on windows of the training text, in memory-mapped files.

``x-SS.npy`` holds what enters slot SS, [N, T, W]; bf16 as the bits of int16, which NumPy has no type for. One
file is made from the one before, so that an interrupted capture goes on at a layer, and a part of the layers
is enough on disk. What enters a slot's FFN and what its blocks contribute is not stored: a layer's task
computes both from the file with the parent's own block, in fp32. So targets belong exactly to the inputs that
are fitted, whatever those were rounded to.

The first windows are for fitting, the last ones held out; they come from the last part of the training text,
and so from other documents.
"""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from space import Architecture, InputError, ModelConfig
from space.blocks import ffn, mixer_block
from space.io.artefact import atomic_path
from supernet.blockwise.block import Block, Weights
from supernet.blockwise.candidates import halves
from supernet.data.corpus import Corpus, window_starts

HELD_OUT_SHARE = 8  # one held-out window for so many fitted ones
BATCH_WINDOWS = 8  # that the parent reads at a time
ITEM_BYTES = {"bf16": 2, "fp32": 4}


def capture_windows(corpus: Corpus, tokens: int, length: int) -> tuple[NDArray[np.int64], int]:
    """The windows of the training text [N, length], evenly spaced and disjoint, and how many are held out.

    Args:
        corpus: the text.
        tokens: tokens to fit on, rounded down to windows.
        length: tokens per window.

    Raises:
        InputError: fewer than two windows, or a text that is too short for them.
    """
    fitted = tokens // length
    if fitted < 2:
        raise InputError(f"train.blockwise.tokens: {tokens} are fewer than two windows of {length}")
    held_out = max(1, fitted // HELD_OUT_SHARE)
    count = fitted + held_out
    if len(corpus.train) < count * (length + 1):
        raise InputError(
            f"train.blockwise.tokens: {count} windows of {length} tokens need {count * (length + 1)}, the "
            f"training text has {len(corpus.train)}; give fewer tokens or more text"
        )
    starts = window_starts(len(corpus.train), count, length)
    return np.asarray(corpus.train[starts[:, None] + np.arange(length)], np.int64), held_out


def boundary_path(folder: Path, slot: int) -> Path:
    """The file of what enters a slot.

    Args:
        folder: of the capture.
        slot: the slot.
    """
    return folder / f"x-{slot:03d}.npy"


def read_boundary(folder: Path, slot: int) -> Tensor:
    """The residual stream before a slot [N, T, W], memory-mapped; bf16 or fp32.

    Args:
        folder: of the capture.
        slot: the slot.
    """
    stored = np.load(boundary_path(folder, slot), mmap_mode="c")  # torch wants a writable array
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if stored.dtype == np.int16 else tensor


def boundary_bytes(windows: NDArray[np.int64], width: int, storage: str) -> int:
    """Size of one boundary's file.

    Args:
        windows: token ids [N, T].
        width: of the residual stream.
        storage: ``bf16`` or ``fp32``.
    """
    return windows.size * width * ITEM_BYTES[storage]


@torch.no_grad()
def capture(
    folder: Path,
    parent: Path,
    architecture: Architecture,
    model_config: ModelConfig,
    windows: NDArray[np.int64],
    slot: int,
    storage: str,
) -> None:
    """Write what enters a slot, unless it is there, from what enters the slot before.

    Args:
        folder: of the capture.
        parent: file of the parent's weights.
        architecture: the parent's.
        model_config: its constants.
        windows: token ids [N, T].
        slot: the slot.
        storage: ``bf16`` or ``fp32``.
    """
    path = boundary_path(folder, slot)
    if path.exists():
        return
    shape = (*windows.shape, architecture.width)
    dtype = np.int16 if storage == "bf16" else np.float32
    before = read_boundary(folder, slot - 1) if slot else None
    embedding = {} if slot else read_weights(parent, "embedding")
    blocks = read_layer(parent, slot - 1) if slot else {}
    with atomic_path(path) as temporary:
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        for start in range(0, len(windows), BATCH_WINDOWS):
            part = slice(start, start + BATCH_WINDOWS)
            if before is None:
                x = F.embedding(torch.from_numpy(windows[part]), embedding["embedding"])
            else:
                x = run_layer(blocks, before[part].float(), architecture, slot - 1, model_config)
            out[part] = x.to(torch.bfloat16).view(torch.int16) if storage == "bf16" else x
        out.flush()


def run_layer(
    blocks: Mapping[str, Weights], x: Tensor, architecture: Architecture, slot: int, model_config: ModelConfig
) -> Tensor:
    """The residual stream [B, T, W] after one of the parent's layers.

    Args:
        blocks: weights of its blocks, ``mixer`` and ``ffn``.
        x: the residual stream before it.
        architecture: the parent's.
        slot: the layer's slot.
        model_config: the constants.
    """
    layer = architecture.layers[slot]
    if layer.mixer != "none":
        x, _ = mixer_block(blocks["mixer"], x, layer, model_config)
    return ffn(blocks["ffn"], x, model_config) if layer.ffn else x


def write_parent(path: Path, weights: Weights, digest: str) -> None:
    """Write the parent's weights, from which tasks read single layers, unless they are there.

    Args:
        path: the file.
        weights: by the names of :mod:`space.shapes`.
        digest: of the parent.
    """
    with contextlib.suppress(OSError, SafetensorError, KeyError), safe_open(path, framework="pt") as file:
        if file.metadata()["parent"] == digest:
            return
    with atomic_path(path) as temporary:
        tensors = {name: value.contiguous() for name, value in weights.items()}
        save_file(tensors, temporary, {"parent": digest})


def read_weights(path: Path, prefix: str) -> dict[str, Tensor]:
    """The weights whose names start with a prefix, by what follows it, or by the name itself if it is one.

    Args:
        path: a safetensors file.
        prefix: of the names.
    """
    with safe_open(path, framework="pt") as file:
        return {
            name.removeprefix(prefix) or name: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 (not a mapping)
            if name.startswith(prefix)
        }


def read_layer(parent: Path, slot: int) -> dict[str, dict[str, Tensor]]:
    """The weights of a layer's blocks, ``mixer`` and ``ffn``, by name; empty where it has none.

    Args:
        parent: file of the parent's weights.
        slot: the layer's slot.
    """
    return {part: read_weights(parent, f"layers.{slot}.{part}.") for part in ("mixer", "ffn")}


def parent_blocks(architecture: Architecture, slot: int, model_config: ModelConfig) -> dict[str, Block]:
    """The parent's blocks of a slot, ``mixer`` and ``ffn``, as far as it has them.

    Args:
        architecture: the parent's.
        slot: the slot.
        model_config: the constants.
    """
    mixer, feed_forward = halves(architecture.layers[slot])
    blocks = {}
    if mixer.mixer != "none":
        blocks["mixer"] = Block(mixer, architecture.width, model_config)
    if feed_forward.ffn:
        blocks["ffn"] = Block(feed_forward, architecture.width, model_config)
    return blocks


def remove_capture(folder: Path) -> None:
    """Delete a capture's files.

    Args:
        folder: of the capture.
    """
    shutil.rmtree(folder, ignore_errors=True)
