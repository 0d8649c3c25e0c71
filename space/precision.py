"""Precisions of exported models, and the bytes of a matrix in each.

``int8`` stores weights of matrix products and of the embedding as bytes, with one scale per block of inputs,
and keeps activations between nodes in fp32: decoding reads a quarter of the bytes. ``int8-dynamic`` also
quantises activations, each tensor by its range at run time, with one scale per output of a matrix: faster for
many tokens at once, less exact.
"""

from pathlib import Path

PRECISIONS = ("fp32", "int8", "int8-dynamic")
FLOAT_BYTES = 4
MIN_BLOCK_INPUTS = 16  # of onnxruntime's kernels; a matrix without whole blocks stays in fp32
MAX_BLOCK_INPUTS = 128  # that share a scale in int8: more saves little, fewer is slower


def block_size(inputs: int) -> int:
    """Number of inputs of a matrix that share a scale in ``int8``: the greatest power of two up to 128.

    Args:
        inputs: inputs of the matrix.

    Raises:
        ValueError: ``inputs`` is not a multiple of 16.
    """
    if inputs % MIN_BLOCK_INPUTS:
        raise ValueError(f"{inputs} inputs are no multiple of 16")
    return min(MAX_BLOCK_INPUTS, inputs & -inputs)


def matrix_bytes(outputs: int, inputs: int, precision: str) -> int:
    """Bytes of the matrix of a product in an exported graph.

    Args:
        outputs: rows of the matrix.
        inputs: columns of the matrix.
        precision: one of :data:`PRECISIONS`.
    """
    count = outputs * inputs
    if precision == "fp32" or (precision == "int8" and inputs % MIN_BLOCK_INPUTS):
        return FLOAT_BYTES * count
    if precision == "int8":
        return count + FLOAT_BYTES * count // block_size(inputs)
    return count + (FLOAT_BYTES + 1) * outputs  # a scale and a zero point for each output


def model_file(folder: Path, precision: str = "fp32") -> Path:
    """Path of the exported graph of a precision.

    Args:
        folder: the sub-model's folder.
        precision: one of :data:`PRECISIONS`.
    """
    return folder / ("model.onnx" if precision == "fp32" else f"model.{precision}.onnx")
