"""A model's configuration, one layer of it, and the constants that torch functions and graphs share."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from space.io.errors import InputError

NORM_EPS = 1e-5  # of norms inside mixers, and the default of the model's norms
ROPE_THETA = 10000.0
MIN_LOG_DECAY = -20.0  # e^-20 forgets everything within fp32; the chunked form is exact down to here


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's change of rotary frequencies for contexts longer than those of pretraining.

    Wavelengths above ``original_max_position_embeddings / low_freq_factor`` tokens are stretched by
    ``factor``, those below ``original_max_position_embeddings / high_freq_factor`` are kept, and those
    between are interpolated. The names are those of transformers.

    Attributes:
        factor: stretch of the long wavelengths.
        low_freq_factor: see above.
        high_freq_factor: see above; greater than ``low_freq_factor``.
        original_max_position_embeddings: context of pretraining, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @staticmethod
    def from_json(value: object, where: str) -> "Llama3Scaling":
        """Read the settings.

        Args:
            value: a JSON value.
            where: its place, for error messages.

        Raises:
            InputError: a field is missing, unknown, or not a number above 0, or the two factors of
                frequencies are not in ascending order.
        """
        names = [field.name for field in fields(Llama3Scaling)]
        if not isinstance(value, Mapping) or set(value) != set(names):
            raise InputError(f"{where}: expected an object with {', '.join(names)}")
        *factors, context = (_positive(value[name], f"{where}.{name}") for name in names)
        if not context.is_integer():
            raise InputError(f"{where}.{names[-1]}: {context} is not a whole number")
        scaling = Llama3Scaling(
            **dict(zip(names, factors, strict=False)), original_max_position_embeddings=int(context)
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise InputError(f"{where}: low_freq_factor is not below high_freq_factor")
        return scaling

    def scale(self, frequency: float) -> float:
        """The scaled frequency.

        Args:
            frequency: radians per token.
        """
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = min(max(share, 0.0), 1.0)
        return (1 - share) * frequency / self.factor + share * frequency


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (Su et al. 2021).

    Attributes:
        theta: base of the frequencies.
        scaling: change of the frequencies; None for none.
    """

    theta: float = ROPE_THETA
    scaling: Llama3Scaling | None = None

    @staticmethod
    def from_json(value: object, where: str = "rope") -> "Rope":
        """Read the settings; a missing one has its default.

        Args:
            value: a JSON value.
            where: its place, for error messages.

        Raises:
            InputError: a field is unknown, or not a number above 0.
        """
        if not isinstance(value, Mapping) or not set(value) <= {"theta", "scaling"}:
            raise InputError(f"{where}: expected an object with theta and scaling")
        scaling = value.get("scaling")
        return Rope(
            theta=_positive(value.get("theta", ROPE_THETA), f"{where}.theta"),
            scaling=None if scaling is None else Llama3Scaling.from_json(scaling, f"{where}.scaling"),
        )

    def frequencies(self, head_dim: int) -> tuple[float, ...]:
        """The rotary frequencies of a head's pairs of channels, D/2 numbers in radians per token.

        Args:
            head_dim: channels of a head D; channel i is paired with i + D/2.
        """
        plain = [self.theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
        return tuple(plain if self.scaling is None else map(self.scaling.scale, plain))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The settings that a space fixes for all its architectures.

    Attributes:
        vocab_size: number of token ids.
        max_seq_len: longest sequence in tokens.
        head_dim: channels of a head, of queries, keys and values alike.
        tie_embeddings: the embedding matrix is the output matrix too.
        qk_norm: softmax mixers normalise the queries and keys of each head (Dehghani et al. 2023).
        norm_eps: added to the mean of squares in pre-norms, the final norm and those of ``qk_norm``.
        qkv_bias: softmax mixers add biases to queries, keys and values.
        rope: rotary embedding of the mixers that have one.
    """

    vocab_size: int
    max_seq_len: int
    head_dim: int
    tie_embeddings: bool = True
    qk_norm: bool = False
    norm_eps: float = NORM_EPS
    qkv_bias: bool = False
    rope: Rope = Rope()

    def to_json(self) -> dict[str, Any]:
        """The JSON value; ``norm_eps``, ``qkv_bias`` and ``rope`` are omitted where they are the default.

        So configurations that do not use them keep the digests and files of versions that lacked them.
        """
        return {
            field.name: asdict(self.rope) if field.name == "rope" else getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("norm_eps", "qkv_bias", "rope")
            or getattr(self, field.name) != field.default
        }

    @staticmethod
    def from_json(value: object, where: str = "model_config") -> "ModelConfig":
        """Read a configuration; the inverse of :meth:`to_json`.

        Args:
            value: a JSON value.
            where: its place, for error messages.

        Raises:
            InputError: a field is missing, unknown or of another type.
        """
        known = [field.name for field in fields(ModelConfig)]
        sizes = ("vocab_size", "max_seq_len", "head_dim")  # the others have defaults
        if not isinstance(value, Mapping) or not set(sizes) <= set(value) <= set(known):
            raise InputError(f"{where}: expected an object with {', '.join(known)}")
        read: dict[str, Any] = dict(value)
        for name, item in value.items():
            if name == "rope":
                read[name] = Rope.from_json(item, f"{where}.{name}")
            elif name == "norm_eps":
                read[name] = _positive(item, f"{where}.{name}")
            elif type(item) is not (int if name in sizes else bool) or (name in sizes and item < 1):
                expected = "a positive integer" if name in sizes else "true or false"
                raise InputError(f"{where}.{name}: {item!r} is not {expected}")
        return ModelConfig(**read)


def _positive(value: object, where: str) -> float:
    """A finite number above 0; an InputError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{where}: {value!r} is not a number above 0")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A mixer choice and an FFN choice.

    Attributes:
        mixer: name of a registered mixer, or ``none``.
        heads: query heads; 0 for a mixer without heads.
        kv_heads: key and value heads, a divisor of ``heads``.
        window: tokens that a windowed mixer sees, itself included; 0 for the others.
        ffn: hidden size of the FFN; 0 for no FFN.
    """

    mixer: str = "none"
    heads: int = 0
    kv_heads: int = 0
    window: int = 0
    ffn: int = 0

    @property
    def present(self) -> bool:
        """True with a mixer or an FFN; other layers do not count for depth."""
        return self.mixer != "none" or self.ffn > 0

    def describe(self) -> str:
        """A short readable form, such as ``attention/4:2+ffn256``."""
        mixer = self.mixer
        if self.heads:
            mixer += f"/{self.heads}" + (f":{self.kv_heads}" if self.kv_heads != self.heads else "")
        if self.window:
            mixer += f"@{self.window}"
        return f"{mixer}+ffn{self.ffn}" if self.present else "-"
