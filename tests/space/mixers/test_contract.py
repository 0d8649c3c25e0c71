"""The contract suite, run over every registered mixer."""

from dataclasses import replace

from space.mixers import MIXERS
from space.testing import MixerContract

for name in MIXERS:
    title = "".join(word.title() for word in name.split("_"))
    globals()[f"Test{title}"] = type(f"Test{title}", (MixerContract,), {"mixer": name})

# Heads of 8, which graphs rotate in nodes of their own; matrices with 8 inputs stay in fp32 in int8.
EIGHT = tuple(replace(config, head_dim=8) for config in MixerContract.model_configs)
for name in ("attention", "sliding", "kda"):
    title = f"Test{name.title()}OfEight"
    globals()[title] = type(title, (MixerContract,), {"mixer": name, "model_configs": EIGHT})
