"""The search space, declared in YAML and validated as a whole.

A space lists choices; :mod:`space.genome` encodes its architectures. The hybrid rule becomes a table of
*patterns* (:class:`LayerCounts`), which sampling, repair, counting and the feasibility check read.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    model_validator,
)

from space.architecture import ModelConfig, is_windowed
from space.io.artefact import canonical_json, digest
from space.io.config import load_yaml, parse
from space.io.errors import InputError
from space.io.names import MAX_NAME_CHARACTERS
from space.layer import NORM_EPS, Rope
from space.mixers import MIXERS, MixerClass, mixers_of_class

MAX_INT = 2**31 - 1
Positive = Annotated[int, Field(strict=True, gt=0, le=MAX_INT)]
Depth = Annotated[int, Field(strict=True, gt=0, le=256)]


def _ratio(value: object) -> object:
    if value in ("full", "linear", "any") or (type(value) is int and 0 < value <= MAX_INT):
        return value
    raise ValueError(f"{value!r} is not full, linear, any, or a whole number above 0")


Ratio = Annotated[Literal["full", "linear", "any"] | int, BeforeValidator(_ratio)]


def _rope(value: object) -> Rope:
    if isinstance(value, Rope):
        return value
    try:
        return Rope.from_json(value)
    except InputError as error:
        raise ValueError(str(error).removeprefix("rope").lstrip(".: ")) from None


def _full() -> str:
    return ", ".join(mixers_of_class("full"))


class LayerChoices(BaseModel):
    """Choices of every layer.

    Attributes:
        mixer: names of registered mixers, and ``none`` for layers without one.
        heads: numbers of query heads.
        kv_heads: numbers of key and value heads; None is as many as query heads, unless ``kv_group`` is
            given.
        ffn: hidden sizes of the FFN; 0 is no FFN.
        window: windows of windowed mixers, in tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mixer: tuple[str, ...]
    heads: tuple[Positive, ...]
    kv_heads: tuple[Positive, ...] | None = None
    ffn: tuple[Annotated[int, Field(strict=True, ge=0, le=MAX_INT)], ...]
    window: tuple[Annotated[int, Field(strict=True, gt=1, le=MAX_INT)], ...] = ()


class Hybrid(BaseModel):
    """The hybrid rule: allowed mixtures of full and linear mixers.

    Attributes:
        ratios: linear layers per full layer; ``full`` and ``linear`` allow only one class, ``any`` allows
            every mixture.
        max_linear_kinds: greatest number of distinct linear mixers in an architecture; None is no limit.
        full_layers: slots that must have a full mixer.
        local: whether local mixers count as ``linear``, or are ``separate`` and not counted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratios: tuple[Ratio, ...] = ("full",)
    max_linear_kinds: Positive | None = None
    full_layers: tuple[Annotated[int, Field(strict=True, ge=0)], ...] = ()
    local: Literal["linear", "separate"] = "linear"


class LayerCounts(NamedTuple):
    """Number of layers of each class.

    Attributes:
        ffn_only: layers with an FFN and no mixer.
        full: layers with a full mixer.
        linear: layers with a linear mixer.
        local: layers with a local mixer that counts separately.
    """

    ffn_only: int
    full: int
    linear: int
    local: int

    @property
    def depth(self) -> int:
        """Number of layers that are not empty."""
        return sum(self)


class Space(BaseModel):
    """The set of architectures that a search chooses from.

    Attributes:
        name: name for files and messages.
        vocab_size: number of token ids.
        max_seq_len: longest sequence, in tokens.
        head_dim: channels per head.
        tie_embeddings: whether the embedding is the output matrix too.
        qk_norm: whether softmax mixers normalise queries and keys.
        norm_eps: added to the mean of squares in the model's norms.
        qkv_bias: whether softmax mixers add biases to queries, keys and values.
        rope: rotary embedding: ``theta`` and, if any, Llama 3's ``scaling``.
        kv_group: query heads per kv head; None uses ``layer.kv_heads``.
        sharing: what the choices of a slot share in the supernet. ``qkvo``: q, k, v and o of all mixers,
            and prefixes; ``none``: prefixes only; ``block``: nothing.
        width: residual widths, ascending.
        depth: numbers of layers, ascending.
        layer: choices of every layer.
        hybrid: allowed mixtures of mixers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=MAX_NAME_CHARACTERS)]
    vocab_size: Positive = 256
    max_seq_len: Positive
    head_dim: Positive
    tie_embeddings: StrictBool = True
    qk_norm: StrictBool = False
    norm_eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = NORM_EPS  # YAML reads 1e-5 as text
    qkv_bias: StrictBool = False
    rope: Annotated[Rope, PlainValidator(_rope), PlainSerializer(asdict)] = Rope()
    kv_group: Positive | None = None
    sharing: Literal["qkvo", "none", "block"] = "qkvo"
    width: tuple[Positive, ...]
    depth: tuple[Depth, ...]
    layer: LayerChoices
    hybrid: Hybrid = Hybrid()

    @model_validator(mode="after")
    def _consistent(self) -> "Space":
        errors = [*self._axis_errors(), *self._head_errors(), *self._mixer_errors()]
        if not errors and not self.patterns:
            errors.append("hybrid: no combination of depth and ratio allows an architecture")
        if errors:
            raise ValueError("; ".join(errors))
        return self

    def _axis_errors(self) -> Iterator[str]:
        axes = {
            "width": self.width,
            "depth": self.depth,
            "layer.heads": self.layer.heads,
            "layer.kv_heads": (1,) if self.layer.kv_heads is None else self.layer.kv_heads,
            "layer.ffn": self.layer.ffn,
            "layer.window": self.layer.window or (2,),
        }
        for name, values in axes.items():
            if not values:
                yield f"{name}: no choice is given"
            if any(b <= a for a, b in pairwise(values)):
                yield f"{name}: {list(values)} must be in ascending order, each value once"
        for name in ("width", "layer.ffn"):
            for i, value in enumerate(axes[name]):
                if value % 16:
                    yield f"{name}[{i}]: {value} is not a multiple of 16"
        if self.head_dim % 8:
            yield f"head_dim: {self.head_dim} is not a multiple of 8"
        if self.sharing == "block" and len(self.width) > 1:
            yield f"sharing: block needs one width, width gives {list(self.width)}"
        if self.layer.ffn == (0,) and "none" in self.layer.mixer:
            yield "layer: mixer none and no FFN size above 0 give empty layers; vary depth instead"

    def _head_errors(self) -> Iterator[str]:
        heads, kv = self.layer.heads, self.layer.kv_heads
        if self.kv_group is not None:
            if kv is not None:
                yield "layer.kv_heads: kv_group is given too; give only one of them"
            for i, value in enumerate(heads):
                if value % self.kv_group:
                    yield f"layer.heads[{i}]: {value} is not a multiple of kv_group {self.kv_group}"
            return
        for i, value in enumerate(kv or ()):
            if all(h % value for h in heads):
                yield f"layer.kv_heads[{i}]: {value} does not divide any of heads {list(heads)}"
        for i, value in enumerate(heads):
            if kv and all(value % k for k in kv):
                yield f"layer.heads[{i}]: {value} is not a multiple of any of kv_heads {list(kv)}"

    def _mixer_errors(self) -> Iterator[str]:
        mixers = self.layer.mixer
        unknown = [i for i, mixer in enumerate(mixers) if mixer != "none" and mixer not in MIXERS]
        if unknown:
            for i in unknown:
                yield f"layer.mixer[{i}]: {mixers[i]!r} is not one of {', '.join(MIXERS)}, none"
            return
        if len(set(mixers)) < len(mixers):
            yield f"layer.mixer: {list(mixers)} names a mixer twice"
        if not set(mixers) - {"none"}:
            yield "layer.mixer: no mixer but none is given"
        yield from self._window_errors()
        classes = {m: self.mixer_class(m) for m in mixers if m != "none"}
        full, linear = ([m for m, c in classes.items() if c == kind] for kind in ("full", "linear"))
        yield from self._ratio_errors(full, linear)
        yield from self._hybrid_errors(bool(full), len(linear))

    def _window_errors(self) -> Iterator[str]:
        windowed = [m for m in self.layer.mixer if is_windowed(m)]
        if windowed and not self.layer.window:
            yield f"layer.window: mixer {windowed[0]} needs at least one window"
        if self.layer.window and not windowed:
            known = ", ".join(name for name in MIXERS if is_windowed(name))
            yield f"layer.window: no mixer has a window; only {known} has one"
        for i, window in enumerate(self.layer.window):
            if window > self.max_seq_len:
                yield f"layer.window[{i}]: {window} is more than max_seq_len {self.max_seq_len}"

    def _ratio_errors(self, full: list[str], linear: list[str]) -> Iterator[str]:
        ratios = self.hybrid.ratios
        if not ratios:
            yield "hybrid.ratios: no choice is given"
        if len(set(ratios)) < len(ratios):
            yield f"hybrid.ratios: {list(ratios)} names a ratio twice"
        for i, ratio in enumerate(ratios):
            if ratio == "any" and (full or linear):
                continue
            if ratio != "full" and not linear:
                yield f"hybrid.ratios[{i}]: {ratio} needs a linear mixer, and layer.mixer has none"
            if ratio != "linear" and not full:
                yield f"hybrid.ratios[{i}]: {ratio} needs a full mixer, and layer.mixer has none of {_full()}"
        if linear and set(ratios) == {"full"}:
            yield f"hybrid.ratios: only full is allowed, so that {', '.join(linear)} can never appear"
        if full and set(ratios) == {"linear"}:
            yield f"hybrid.ratios: only linear is allowed, so that {', '.join(full)} can never appear"

    def _hybrid_errors(self, has_full: bool, linear_count: int) -> Iterator[str]:
        hybrid, mixers = self.hybrid, [m for m in self.layer.mixer if m != "none"]
        if hybrid.max_linear_kinds is not None and hybrid.max_linear_kinds > linear_count:
            count = f"the {linear_count} linear mixers"
            yield f"hybrid.max_linear_kinds: {hybrid.max_linear_kinds} is more than {count}"
        if hybrid.local == "separate" and all(MIXERS.get(m).mixer_class != "local" for m in mixers):
            known = ", ".join(mixers_of_class("local"))  # listing all mixers loads plug-ins
            yield f"hybrid.local: separate, but layer.mixer has none of {known}"
        places = hybrid.full_layers
        if not places:
            return
        if not has_full:
            yield f"hybrid.full_layers: layer.mixer has none of {_full()}"
        if self.depth and max(places) >= self.slots:
            yield f"hybrid.full_layers: {max(places)} is past the last layer {self.slots - 1}"
        if len(set(places)) < len(places):
            yield "hybrid.full_layers: a layer is named twice"

    def mixer_class(self, mixer: str) -> MixerClass:
        """The class of a mixer under the hybrid rule: ``full``, ``linear`` or ``local``.

        Args:
            mixer: name of a registered mixer; local ones count as linear unless ``hybrid.local`` is separate.
        """
        known = MIXERS.get(mixer).mixer_class
        return "linear" if known == "local" and self.hybrid.local == "linear" else known

    @property
    def slots(self) -> int:
        """Number of layer slots, the greatest depth."""
        return max(self.depth)

    @property
    def config(self) -> ModelConfig:
        """The constants of all architectures."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            max_seq_len=self.max_seq_len,
            head_dim=self.head_dim,
            tie_embeddings=self.tie_embeddings,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
            qkv_bias=self.qkv_bias,
            rope=self.rope,
        )

    @cached_property
    def mixer_options(self) -> tuple[tuple[str, int], ...]:
        """Pairs of mixer and window; the first is always ("none", 0)."""
        options: list[tuple[str, int]] = [("none", 0)]
        for mixer in self.layer.mixer:
            if is_windowed(mixer):
                options += [(mixer, window) for window in self.layer.window]
            elif mixer != "none":
                options.append((mixer, 0))
        return tuple(options)

    @cached_property
    def head_options(self) -> tuple[tuple[int, int], ...]:
        """Pairs of query heads and kv heads, ascending."""
        if self.kv_group is not None:
            return tuple((h, h // self.kv_group) for h in self.layer.heads)
        if self.layer.kv_heads is None:
            return tuple((h, h) for h in self.layer.heads)
        return tuple((h, k) for h in self.layer.heads for k in self.layer.kv_heads if h % k == 0)

    @cached_property
    def ffn_options(self) -> tuple[int, ...]:
        """FFN sizes, ascending; the first is always 0, for layers without an FFN."""
        return self.layer.ffn if self.layer.ffn[0] == 0 else (0, *self.layer.ffn)

    @cached_property
    def max_linear_kinds(self) -> int:
        """Greatest number of distinct linear mixers in an architecture."""
        kinds = {m for m in self.layer.mixer if m != "none" and self.mixer_class(m) == "linear"}
        return self.hybrid.max_linear_kinds or max(1, len(kinds))

    def full_counts(self, ratio: Ratio, mixers: int) -> range:
        """The numbers of full layers that a ratio allows.

        At a ratio of r linear layers to 1 full one, it is one number, rounded up.

        Args:
            ratio: r, ``full``, ``linear`` or ``any``.
            mixers: number of full and linear layers together.
        """
        if ratio == "any":
            classes = {self.mixer_class(m) for m, _ in self.mixer_options[1:]}
            return range(0 if "linear" in classes else mixers, (mixers if "full" in classes else 0) + 1)
        count = {"full": mixers, "linear": 0}.get(str(ratio))
        count = -(-mixers // (int(ratio) + 1)) if count is None else count
        return range(count, count + 1)

    @cached_property
    def patterns(self) -> dict[tuple[int, Ratio], tuple[LayerCounts, ...]]:
        """Patterns of each pair of depth and ratio; pairs without a pattern are omitted."""
        has_local = any(self.mixer_class(m) == "local" for m, _ in self.mixer_options[1:])
        table: dict[tuple[int, Ratio], tuple[LayerCounts, ...]] = {}
        for depth in self.depth:
            for ratio in self.hybrid.ratios:
                rows = []
                for ffn_only in range(depth if "none" in self.layer.mixer else 1):
                    for local in range(depth - ffn_only + 1 if has_local else 1):
                        mixers = depth - ffn_only - local
                        rows += [
                            LayerCounts(ffn_only, full, mixers - full, local)
                            for full in self.full_counts(ratio, mixers)
                            if full >= len(self.hybrid.full_layers)
                        ]
                if rows:
                    table[depth, ratio] = tuple(rows)
        return table

    @cached_property
    def all_patterns(self) -> tuple[LayerCounts, ...]:
        """All distinct patterns, sorted."""
        return tuple(sorted({p for rows in self.patterns.values() for p in rows}))

    @cached_property
    def hash(self) -> str:
        """The sha256 of the space without its name.

        Settings of the model that newer versions added count only where they are not the default, so that
        spaces keep the hash that their supernets and device cards refer to.
        """
        value = self.model_dump(mode="json", exclude={"name", "norm_eps", "qkv_bias", "rope"})
        newer = {"norm_eps", "qkv_bias", "rope"} & set(self.config.to_json())
        return digest(canonical_json(value | self.model_dump(mode="json", include=newer)))


def load_space(path: str | Path) -> Space:
    """Read a space from YAML.

    Args:
        path: path of the file.

    Raises:
        InputError: the file is missing or invalid; the message lists every unknown key, wrong type and
            contradiction with its path.
    """
    return parse(Space, load_yaml(Path(path)), str(path))
