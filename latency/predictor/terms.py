"""Terms of a model's latency: its ops, what it spends once, and the bytes that it reads from beyond a cache.

``T = run + shared nodes of each mixer class in use + sum over ops + sum over caches of r_c beyond_c(bytes)``

Every term is written as an op: an op of the space, or one of the kinds ``run`` (a call of the runtime),
``shared.CLASS`` (nodes that all layers of a mixer class share, such as positions and masks) and
``cache.BYTES``. A model that decodes reads all of its weights and states for one token. If they fit into a
cache, they are there from the run before. If they exceed it, reading a byte takes ``r_c`` seconds longer.
The caches' sizes are unknown, so there is one term for every power of two within the range of the models,
and ``r_c`` is 0 where there is no cache.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from latency.predictor.op_model import Ops
from space import Architecture, ModelConfig, Space, Workload
from space.cost import op_activation_bytes, op_flops, op_held_bytes, op_state_bytes, op_weight_bytes
from space.ops import Op, count_ops
from space.precision import matrix_bytes

Array = NDArray[np.float64]
Point = tuple[Op, Workload]
RUN = Op(kind="run")
CLASSES = ("full", "linear", "local")  # of mixers, in the order of Cost.shared
SHARED = {name: Op(kind=f"shared.{name}") for name in CLASSES}
CACHE_PREFIX = "cache."
CACHE_SIZES = tuple(2**i for i in range(16, 31))  # bytes
CACHE_UNIT = 2**20  # bytes; the count of a cache's term is in these
MAX_READING_TOKENS = 64  # up to which reading the weights dominates the time of a run
EXTREMES = (0.1, 0.95)  # quantiles of the bytes of models, between which a cache can be told from the ops


def cache_term(size: int) -> Op:
    """The term of the bytes beyond a cache.

    Args:
        size: bytes of the cache.
    """
    return Op(kind=f"{CACHE_PREFIX}{size}")


def cache_size(term: Op) -> int | None:
    """Bytes of the cache of a term; None for another term."""
    return int(term.kind[len(CACHE_PREFIX) :]) if term.kind.startswith(CACHE_PREFIX) else None


def beyond(held: Array, size: int) -> Array:
    """Bytes that a model reads from beyond a cache in each run.

    All of them from twice the size of the cache, none up to its size, and a linearly growing part in between:
    part of a slightly larger model is still found there.

    Args:
        held: bytes that the model holds: [N].
        size: of the cache, bytes.
    """
    return np.asarray(np.maximum(0.0, np.minimum(2.0 * (held - size), held)))


def reads_most(workload: Workload) -> bool:
    """True for a workload whose time is mostly that of reading weights and states."""
    return workload.batch * workload.tokens <= MAX_READING_TOKENS


def caches(held: Array) -> tuple[int, ...]:
    """Sizes of caches that models may or may not fit into.

    Args:
        held: bytes that each model holds: [N].
    """
    if not len(held):
        return ()
    low, high = np.quantile(held, EXTREMES)
    return tuple(size for size in CACHE_SIZES if low < 2 * size and size < high)


@lru_cache(maxsize=4096)
def op_bytes(op: Op, workload: Workload, model_config: ModelConfig) -> int:
    """Bytes of weights and states of an op."""
    return op_held_bytes(op, workload, model_config)


def held_bytes(architecture: Architecture, workload: Workload, model_config: ModelConfig) -> int:
    """Bytes of the weights of a model, and of its states after a workload's tokens."""
    return sum(n * op_bytes(op, workload, model_config) for op, n in count_ops(architecture).items())


@lru_cache(maxsize=8192)
def terms(architecture: Architecture, workload: Workload, space: Space) -> Mapping[Op, float]:
    """The terms of a model's latency with their counts; every cache in :data:`CACHE_SIZES` that it exceeds.

    Args:
        architecture: the model.
        workload: the workload.
        space: a space with its model configuration, which has the classes of mixers.
    """
    found: dict[Op, float] = {op: float(n) for op, n in count_ops(architecture).items()}
    found[RUN] = 1.0
    for layer in architecture.layers:
        if layer.mixer != "none":
            found[SHARED[space.mixer_class(layer.mixer)]] = 1.0
    if reads_most(workload):
        held = np.array([held_bytes(architecture, workload, space.config)], dtype=np.float64)
        for size in CACHE_SIZES:
            count = float(beyond(held, size)[0]) / CACHE_UNIT
            if count:
                found[cache_term(size)] = count
    return found


def features(points: Sequence[Point]) -> Array:
    """Sizes of ops and workloads, as logarithms to base 2.

    Args:
        points: N ops and workloads.

    Returns:
        Width, heads, kv heads, window, FFN width, length and batch; a size that an op does not have counts
        as 1: [N, 7].
    """
    sizes = [
        (op.width, op.heads, op.kv_heads, op.window, op.ffn, workload.length, workload.batch)
        for op, workload in points
    ]
    return np.asarray(np.log2(np.maximum(np.array(sizes, dtype=np.float64).reshape(-1, 7), 1.0)))


def is_op(term: Op) -> bool:
    """True for an op of a space."""
    return "." not in term.kind and term != RUN


def work(points: Sequence[Point], model_config: ModelConfig) -> Array:
    """Terms of the roofline.

    Args:
        points: N ops and workloads.
        model_config: vocabulary, context and heads.

    Returns:
        1 (a call), FLOPs, and bytes of weights, states and activations: [N, 5]; 1 alone for what is no op.
    """
    return np.array([_work(op, workload, model_config) for op, workload in points], dtype=np.float64).reshape(
        -1, 5
    )


@lru_cache(maxsize=16384)
def _work(op: Op, workload: Workload, model_config: ModelConfig) -> tuple[float, ...]:
    if not is_op(op):
        return 1.0, 0.0, 0.0, 0.0, 0.0
    return (
        1.0,
        op_flops(op, workload, model_config),
        _read_bytes(op, workload, model_config),
        op_state_bytes(op, workload, model_config),
        op_activation_bytes(op, workload, model_config),
    )


def _read_bytes(op: Op, workload: Workload, model_config: ModelConfig) -> int:
    """Bytes of weights; a head's matrix is read even if its parameters are those of the embedding."""
    head = matrix_bytes(model_config.vocab_size, op.width, workload.precision) if op.kind == "head" else 0
    return op_weight_bytes(op, model_config, workload.precision) + head


def by_kind(points: Sequence[Point]) -> dict[str, list[int]]:
    """Indices of points by kind of op, in the order of their first appearance."""
    found: dict[str, list[int]] = {}
    for i, (op, _) in enumerate(points):
        found.setdefault(op.kind, []).append(i)
    return found


def as_ops(
    points: Sequence[Point], model_config: ModelConfig, source: Mapping[Point, float] | None = None
) -> tuple[dict[str, Ops], list[int]]:
    """Points as the op model takes them.

    Args:
        points: ops and workloads.
        model_config: vocabulary, context and heads.
        source: seconds on a known device.

    Returns:
        Ops by kind, and the index in ``points`` of each of them in that order.
    """
    found, order = {}, []
    for kind, places in by_kind(points).items():
        some = [points[i] for i in places]
        known = None if source is None else np.array([source[point] for point in some])
        found[kind] = Ops(features(some), work(some, model_config), known)
        order += places
    return found, order
