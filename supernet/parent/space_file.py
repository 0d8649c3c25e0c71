"""A search space around a parent, as the text of a YAML file whose largest architecture is the parent."""

import re

from space.architecture import ModelConfig
from space.cost import params
from space.io.errors import InputError
from supernet.parent.parent import Parent
from supernet.parent.settings import FFN_MULTIPLE

WINDOWS = (128, 256, 512)  # of at most a quarter of the context, as a longer one saves little
MIXERS = ("attention", "sliding", "gated_deltanet", "kda", "mamba2", "gla", "short_conv", "none")


def space_text(parent: Parent, context: int | None = None) -> str:
    """The YAML text of a space around a parent, with comments that say why each choice is there.

    Args:
        parent: the parent.
        context: longest sequence in tokens; None is the parent's.

    Raises:
        InputError: the context is longer than the parent's.
    """
    config, layer = parent.model_config, parent.architecture.layers[0]
    context = config.max_seq_len if context is None else context
    if context > config.max_seq_len:
        raise InputError(f"--context {context}: the parent's context is {config.max_seq_len}")
    depth = len(parent.architecture.layers)
    windows = [window for window in WINDOWS if 4 * window <= context]
    mixers = [mixer for mixer in MIXERS if windows or mixer != "sliding"]
    group, half = layer.heads // layer.kv_heads, layer.heads // 2
    heads = [half, layer.heads] if half and half % group == 0 else [layer.heads]
    quarters = {round(layer.ffn * i / 4 / FFN_MULTIPLE) * FFN_MULTIPLE for i in range(5)}
    name = parent.folder.stem if parent.folder.suffix == ".gguf" else parent.folder.name
    count = params(parent.architecture, config)
    return "\n".join(
        [
            f"# Space around a parent: a {parent.family} model of {count:,} parameters in {depth} layers.",
            "# Its largest architecture is the parent; written by `formfit space --from`.",
            f"name: {_name(name)}",
            "",
            "# The parent fixes these settings. The context may be shorter than its own.",
            *_settings(config, context),
            "",
            "# All blocks read and write the parent's residual stream, so its width is kept.",
            f"width: [{parent.architecture.width}]",
            "# A slot without a mixer and an FFN is a removed layer, anywhere in the model; one with only an",
            "# FFN, or only a mixer, counts as a layer. At least half of the layers stay.",
            f"depth: {_list(range((depth + 1) // 2, depth + 1))}",
            "sharing: block      # every choice of a layer is a block of its own, fitted to the parent",
            f"kv_group: {group}         # query heads per kv head",
            "layer:",
            "  # Full attention, attention in a window, linear recurrences, a short convolution, no mixer.",
            f"  mixer: [{', '.join(mixers)}]",
            f"  heads: {_list(heads)}",
            *([f"  window: {_list(windows)}"] if windows else []),
            "  # Hidden sizes of the FFN: none, quarters of the parent's, and all of it.",
            f"  ffn: {_list(sorted(quarters))}",
            "hybrid:",
            "  ratios: [any]     # any mixer in any layer",
            "",
        ]
    )


def _settings(config: ModelConfig, context: int) -> list[str]:
    rope = f"theta: {config.rope.theta!r}"
    if config.rope.scaling:
        values = ", ".join(f"{name}: {value!r}" for name, value in vars(config.rope.scaling).items())
        rope += f", scaling: {{{values}}}"
    settings = {
        "vocab_size": config.vocab_size,
        "max_seq_len": context,
        "head_dim": config.head_dim,
        "tie_embeddings": str(config.tie_embeddings).lower(),
        "qk_norm": str(config.qk_norm).lower(),
        "qkv_bias": str(config.qkv_bias).lower(),
        "norm_eps": repr(config.norm_eps),
        "rope": f"{{{rope}}}",
    }
    return [f"{name}: {value}" for name, value in settings.items()]


def _name(text: str) -> str:
    """A name that a space may have."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-") or "parent"


def _list(values: range | list[int]) -> str:
    return f"[{', '.join(map(str, values))}]"
