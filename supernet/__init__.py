"""The weight-sharing model: elastic weights, corpora, training, evaluation, extraction."""

from supernet.checkpoint import Checkpoint
from supernet.corpus import load_corpus
from supernet.evaluate import Quality, evaluate, evaluation_set
from supernet.recipe import TrainConfig
from supernet.supernet import Supernet
from supernet.train import train

__all__ = [
    "Checkpoint",
    "Quality",
    "Supernet",
    "TrainConfig",
    "evaluate",
    "evaluation_set",
    "load_corpus",
    "train",
]
