"""Precisions of an exported model: what they are called, and the bytes that a matrix takes in each.

``int8`` stores the weights of matrix products and of the embedding as bytes with one scale for each block
of inputs, and keeps activations between nodes in fp32: decoding reads a quarter of the bytes.
``int8-dynamic`` quantises activations as well, each tensor by its own range while it runs, with one scale
for each output of a matrix: quicker for many tokens at once, less exact.
"""

from pathlib import Path

PRECISIONS = ("fp32", "int8", "int8-dynamic")
FLOAT = 4  # bytes
LARGEST_BLOCK = 128  # inputs that share a scale in int8: more saves little, fewer is slower


def block_size(inputs: int) -> int:
    """How many inputs of a matrix share a scale in ``int8``: a power of two that divides them.

    Raises:
        ValueError: they are no multiple of 16, which onnxruntime's kernels begin at.
    """
    if inputs % 16:
        raise ValueError(f"{inputs} inputs are no multiple of 16")
    return min(LARGEST_BLOCK, inputs & -inputs)


def matrix_bytes(outputs: int, inputs: int, precision: str) -> int:
    """The bytes of a matrix [outputs, inputs] of a product in a graph of this precision."""
    count = outputs * inputs
    if precision == "fp32":
        return FLOAT * count
    if precision == "int8":
        return count + FLOAT * count // block_size(inputs)
    return count + (FLOAT + 1) * outputs  # a scale and a zero point for each output


def model_file(folder: Path, precision: str = "fp32") -> Path:
    """Where the exported graph of a precision stands in a sub-model's folder."""
    return folder / ("model.onnx" if precision == "fp32" else f"model.{precision}.onnx")
