"""Weight-sharing supernet: elastic weights, corpora, training, evaluation, extraction.

Importing this package imports neither torch nor Ray: each public name is loaded on first use. ``evaluate``
and ``extract`` are modules; import the functions of the same names from them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supernet.evaluate import Quality
    from supernet.extract import SubModel, read_submodel, write_submodel
    from supernet.supernet import Supernet
    from supernet.training.recipe import TrainConfig
    from supernet.training.train import load_supernet, train

__all__ = [
    "Quality",
    "SubModel",
    "Supernet",
    "TrainConfig",
    "load_supernet",
    "read_submodel",
    "train",
    "write_submodel",
]

_MODULE_OF = {
    "Quality": "supernet.evaluate",
    "SubModel": "supernet.extract",
    "Supernet": "supernet.supernet",
    "TrainConfig": "supernet.training.recipe",
    "load_supernet": "supernet.training.train",
    "read_submodel": "supernet.extract",
    "train": "supernet.training.train",
    "write_submodel": "supernet.extract",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'supernet' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
