"""A model's configuration, one layer of it, and the constants that torch functions and graphs share."""

from dataclasses import dataclass

NORM_EPS = 1e-5
ROPE_BASE = 10000.0
MIN_LOG_DECAY = -20.0  # e^-20 forgets everything within fp32; the chunked form is exact down to here


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The settings that a space fixes for all its architectures.

    Attributes:
        vocab_size: number of token ids.
        max_seq_len: longest sequence in tokens.
        head_dim: channels of a head, of queries, keys and values alike.
        tie_embeddings: the embedding matrix is the output matrix too.
        qk_norm: softmax mixers normalise the queries and keys of each head (Dehghani et al. 2023).
    """

    vocab_size: int
    max_seq_len: int
    head_dim: int
    tie_embeddings: bool = True
    qk_norm: bool = False


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
