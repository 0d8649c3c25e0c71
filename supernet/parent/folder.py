"""The weights in a folder of transformers: safetensors in one file, or shards with an index."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from space.io.errors import InputError
from supernet.parent.settings import read_object

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
TensorOf = tuple[Path, str, Tensor]


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights: one file, or the index and its shards.

    Args:
        folder: the folder.

    Raises:
        InputError: there are none, or the index names files elsewhere.
    """
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.exists():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        why = f"; {pickles[0]} is a pickle, which is never loaded" if pickles else ""
        raise InputError(f"{folder}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}{why}")
    table = read_object(index).get("weight_map")
    shards = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index}: weight_map names {shard!r}, expected a safetensors file beside it")
    if not shards:
        raise InputError(f"{index}: expected a weight_map from tensors to files")
    return [index, *(folder / shard for shard in shards)]


def folder_tensors(folder: Path) -> Iterator[TensorOf]:
    """Yield every tensor with its file and name, one in memory at a time.

    Args:
        folder: the folder.

    Raises:
        InputError: a file is missing or incomplete.
    """
    for path in weight_files(folder):
        if path.name == INDEX_FILE:
            continue
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    yield path, name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a complete safetensors file ({error})") from None
