"""The contract suite, run over every registered mixer."""

from space.mixers import MIXERS
from space.testing import MixerContract

for name in MIXERS:
    title = "".join(word.title() for word in name.split("_"))
    globals()[f"Test{title}"] = type(f"Test{title}", (MixerContract,), {"mixer": name})
