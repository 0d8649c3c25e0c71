"""Analytic cost of ops and architectures: parameters, FLOPs and bytes.

A multiply-add counts as two FLOPs. Weights have the bytes of the workload's precision, everything else is
fp32. FLOPs include projections, convolutions and the mixing itself (for linear mixers in recurrent form), but
not norms, gates and activations, which are a few percent.
"""

from math import prod

from space.architecture import Architecture, ModelConfig
from space.mixers import MIXERS
from space.ops import Cost, Op, OpTables, count_ops
from space.precision import FLOAT_BYTES, matrix_bytes
from space.shapes import end_shapes, ffn_shapes, mixer_shapes, state_shapes
from space.space import Space
from space.workload import Workload

FFN_MATRICES = ("gate", "up", "down")


def op_params(op: Op, model_config: ModelConfig) -> int:
    """Number of parameters of an op. A tied head has only its norm: its matrix is the embedding's.

    Args:
        op: the op.
        model_config: the constants of the space.
    """
    if op.kind in ("embedding", "head"):
        ends = end_shapes(op.width, model_config)
        names = ("embedding",) if op.kind == "embedding" else ("norm", "head")
        return sum(prod(ends[name]) for name in names if name in ends)
    return sum(prod(shape) for shape in _shapes(op, model_config).values())


def op_weight_bytes(op: Op, model_config: ModelConfig, precision: str = "fp32") -> int:
    """Bytes of an op's weights in an exported graph.

    A tied head's matrix belongs to the embedding's op, except in ``int8-dynamic``: no operator there reads
    one quantised tensor both as rows and as a matrix.

    Args:
        op: the op.
        model_config: the constants of the space.
        precision: one of :data:`space.precision.PRECISIONS`.
    """
    if precision == "fp32":
        return FLOAT_BYTES * op_params(op, model_config)
    matrix = matrix_bytes(model_config.vocab_size, op.width, precision)
    if op.kind == "embedding":  # dynamic: one scale and zero point for all
        return matrix if precision == "int8" else model_config.vocab_size * op.width + FLOAT_BYTES + 1
    if op.kind == "head":
        return FLOAT_BYTES * op.width + (0 if model_config.tie_embeddings and precision == "int8" else matrix)
    shapes, matrices = _shapes(op, model_config), _matrices(op)
    return sum(
        matrix_bytes(shape[0], shape[1], precision) if name in matrices else FLOAT_BYTES * prod(shape)
        for name, shape in shapes.items()
    )


def _shapes(op: Op, model_config: ModelConfig) -> dict[str, tuple[int, ...]]:
    if op.kind == "ffn":
        return ffn_shapes(op.width, op.ffn)
    return mixer_shapes(op.kind, op.width, op.heads, op.kv_heads, model_config)


def _matrices(op: Op) -> tuple[str, ...]:
    """Names of the parameters of a mixer or FFN op that are matrices of products."""
    if op.kind == "ffn":
        return FFN_MATRICES
    mixer = MIXERS.get(op.kind)
    return (*mixer.projections, *mixer.matrices, mixer.output)


def op_flops(op: Op, workload: Workload, model_config: ModelConfig) -> int:
    """FLOPs of an op in one run of a workload.

    Args:
        op: the op.
        workload: the workload.
        model_config: the constants of the space.
    """
    tokens = workload.batch * workload.tokens
    if op.kind == "embedding":
        return 0
    if op.kind == "head":
        return 2 * tokens * op.width * model_config.vocab_size
    shapes = _shapes(op, model_config)
    flops = 2 * tokens * sum(prod(shapes[name]) for name in _matrices(op))
    if op.kind == "ffn":
        return flops
    return flops + MIXERS.get(op.kind).flops(op.layer, op.width, workload, model_config)


def op_state_bytes(op: Op, workload: Workload, model_config: ModelConfig) -> int:
    """Bytes of an op's state after a workload's ``length`` tokens.

    Args:
        op: the op.
        workload: the workload.
        model_config: the constants of the space.
    """
    if op.kind in ("embedding", "head", "ffn"):
        return 0
    shapes = state_shapes(op.layer, op.width, model_config, workload.batch, workload.length)
    return FLOAT_BYTES * sum(prod(shape) for shape in shapes.values())


def op_held_bytes(op: Op, workload: Workload, model_config: ModelConfig) -> int:
    """Bytes of an op's weights, and of its state after a workload's tokens.

    Args:
        op: the op.
        workload: the workload.
        model_config: the constants of the space.
    """
    return op_weight_bytes(op, model_config, workload.precision) + op_state_bytes(op, workload, model_config)


def op_activation_bytes(op: Op, workload: Workload, model_config: ModelConfig) -> int:
    """Bytes of the values that are alive at the widest node of an op's graph.

    States and the memory inside a node (such as the scores of attention) are not included. An op's last node
    adds to the residual stream and normalises it for the next op.

    Args:
        op: the op.
        workload: the workload.
        model_config: the constants of the space.
    """
    w, tokens = op.width, workload.batch * workload.tokens
    if op.kind == "embedding":
        return FLOAT_BYTES * tokens * w
    if op.kind == "head":
        return FLOAT_BYTES * tokens * max(2 * w, w + model_config.vocab_size)
    if op.kind == "ffn":
        # x, and at successive nodes: pre-norm with packed gate and up; packed and split; SiLU with its parts.
        return FLOAT_BYTES * tokens * max(2 * w + 2 * op.ffn, w + 4 * op.ffn, 4 * w)
    mixer, shapes = MIXERS.get(op.kind), _shapes(op, model_config)
    packed = sum(shapes[name][0] for name in mixer.projections)
    return FLOAT_BYTES * mixer.activations(op.layer, w, packed, workload, model_config)


def params(architecture: Architecture, model_config: ModelConfig) -> int:
    """Number of parameters of a sub-model.

    Args:
        architecture: the architecture.
        model_config: the constants of the space.
    """
    return sum(n * op_params(op, model_config) for op, n in count_ops(architecture).items())


def flops(architecture: Architecture, workload: Workload, model_config: ModelConfig) -> int:
    """FLOPs of one run of a workload.

    Args:
        architecture: the architecture.
        workload: the workload.
        model_config: the constants of the space.
    """
    return sum(n * op_flops(op, workload, model_config) for op, n in count_ops(architecture).items())


def memory_bytes(architecture: Architecture, workload: Workload, model_config: ModelConfig) -> int:
    """Bytes of weights, of states after a workload, and of peak activations.

    Args:
        architecture: the architecture.
        workload: the workload.
        model_config: the constants of the space.
    """
    ops = count_ops(architecture)
    held = sum(n * op_held_bytes(op, workload, model_config) for op, n in ops.items())
    return held + max(op_activation_bytes(op, workload, model_config) for op in ops)


def flops_table(space: Space, workload: Workload) -> OpTables:
    """FLOPs of each op of a space.

    Args:
        space: the space.
        workload: the workload.
    """
    return OpTables(space, lambda op: op_flops(op, workload, space.config))


def params_cost(space: Space) -> Cost:
    """Cost of genomes: number of parameters.

    Args:
        space: the space.
    """
    return Cost(OpTables(space, lambda op: op_params(op, space.config)))


def memory_cost(space: Space, workload: Workload) -> Cost:
    """Cost of genomes: bytes of weights, of states after a workload, and of peak activations.

    Args:
        space: the space.
        workload: the workload.
    """
    model_config = space.config
    held = OpTables(space, lambda op: op_held_bytes(op, workload, model_config))
    return Cost(held, max_op=OpTables(space, lambda op: op_activation_bytes(op, workload, model_config)))


def row_flops(space: Space, architecture: Architecture, length: int) -> int:
    """FLOPs of a prefill of one sequence.

    Args:
        space: the space.
        architecture: the architecture.
        length: tokens of the sequence.
    """
    return flops(architecture, Workload(phase="prefill", length=length), space.config)
