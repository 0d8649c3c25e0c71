"""The value that describes one mixer to every part of formfit.

Importing this module imports neither torch nor onnx. The same holds for a mixer's module: ``forward``,
``write`` and initialisers import them, and the modules ``*_torch`` and ``*_onnx``, when they are called.

A Hugging Face folder holds the source of ``shapes``, ``forward`` and the initialisers with everything that
they use, so these are functions at the top of a module, no lambdas, that need only torch and ``space``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from space.layer import Layer, ModelConfig
from space.workload import Workload

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from space.onnx.block import Block

Shapes = dict[str, tuple[int, ...]]
Weights = Mapping[str, "Tensor"]
State = dict[str, "Tensor"]
MixerClass = Literal["full", "linear", "local"]
ShapesOf = Callable[[int, int, int, ModelConfig], Shapes]
StateShapesOf = Callable[[Layer, int, ModelConfig, int, int], Shapes]
Forward = Callable[[Weights, "Tensor", "MixerCall"], tuple["Tensor", State]]
Writer = Callable[["Block"], tuple[str, dict[str, str]]]
Initialiser = Callable[[tuple[int, ...], "torch.Generator"], "Tensor"]
FlopsOf = Callable[[Layer, int, Workload, ModelConfig], int]
ActivationsOf = Callable[[Layer, int, int, Workload, ModelConfig], int]


class MixerCall(NamedTuple):
    """The arguments of a mixer's torch function besides its weights and its input.

    Attributes:
        layer: the layer, with heads and window.
        model_config: the settings of its space.
        position: place of the first token in its sequence.
        state: the state that an earlier call returned; empty at the start of a sequence.
        mask: bool [B, tokens before + T], False for padding on the left; None without padding. The input is
            zero where it is False, so only a mixer that compares tokens by a softmax needs it.
    """

    layer: Layer
    model_config: ModelConfig
    position: int
    state: State
    mask: Tensor | None


def elementwise_activations(
    layer: Layer, width: int, packed: int, workload: Workload, model_config: ModelConfig
) -> int:
    """Floats at the widest node of a graph whose values are no larger than its packed product.

    The candidates: norm and packed product; the product and its parts; the sum with the residual stream.
    """
    tokens = workload.batch * workload.tokens
    return tokens * max(2 * width + packed, width + 2 * packed, 4 * width)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixer:
    """One kind of token mixer.

    The block around it is not part of it: a mixer maps the normed input [B, T, width] to the input of its
    output matrix, and the block adds the product with that matrix to the residual stream.

    Attributes:
        name: as in the YAML of a space: lower-case letters, digits and underscores.
        mixer_class: how the hybrid rule counts it. ``full``: the state grows with the sequence; ``linear``: a
            state of fixed size that depends on all tokens; ``local``: the output depends on a fixed number of
            tokens.
        shapes: ``(width, heads, kv_heads, model_config)`` -> the shape of every parameter of the block by
            name, ``pre_norm`` first. Matrices are [out, in]. A smaller size must give a prefix of each
            parameter, in every dimension. Parameters named q, k, v and o have the shapes that
            :func:`space.mixers.heads.head_shapes` gives: the mixers of a layer may share them.
        state_shapes: ``(layer, width, model_config, batch, past)`` -> the shape of every state after ``past``
            tokens, batch first; names do not depend on ``past``. A graph's states are fp32 and start at zero,
            caches empty. In torch a state is fp32 where all weights are, and may follow bf16 projections.
        forward: ``(weights, hidden [B, T, width], call)`` -> (the output matrix's input [B, T, inputs], the
            state after the last token), in torch. ``project`` of ``space.attention.projection`` multiplies in
            the type of the matrix; ``project_wide`` is for matrices in ``full_precision``, such as those of
            decays and write strengths, which stay in fp32 under autocast too. Log decays given to
            ``linear_attention`` are clamped to at least :data:`space.layer.MIN_LOG_DECAY`. See
            :class:`MixerCall`.
        write: ``(block)`` -> (the same, the state by name), as nodes of an ONNX graph; None where no graph
            can be written. See :class:`space.onnx.block.Block`.
        flops: ``(layer, width, workload, model_config)`` -> FLOPs of a run besides those of the products with
            its matrices. The algorithm counts, not the implementation: a recurrence counts its steps, even
            where chunks of tokens are computed at once. A multiply-add counts as two; norms, gates and
            activations are left out.
        activations: ``(layer, width, packed, workload, model_config)`` -> the largest sum of input and output
            sizes of one node of its graph, with the residual stream, in floats; used for the memory limit.
            ``packed`` is the number of rows of ``projections``.
        projections: the matrices that multiply the normed input, in the order in which a graph packs them
            into one product.
        matrices: every other 2-D parameter that is multiplied with the tokens, except the output matrix; one
            that is left out stays fp32 and its products cost nothing.
        output: the matrix that writes to the residual stream; it starts at zero.
        full_precision: the matrices that stay in fp32 where the others train in bf16.
        initial: by parameter, its initialiser. Others follow :func:`space.blocks.initial`: those whose names
            end in ``norm`` start at one, the output matrix at zero, and all others, vectors too, normal with
            variance 1 / (size of the last dimension). A vector such as a bias should have an initialiser.
        has_heads: the layer's ``heads`` and ``kv_heads`` apply.
        windowed: the layer's ``window`` applies.
        cache_in_place: states are caches that grow with the sequence and may be longer than what was read: a
            graph reads only what lies before ``position``, and may write into the buffer that it reads.
        runs_everywhere: onnxruntime 1.19, the oldest that a device may have, has the operators of its graph.
            A kit adds whole models of such mixers only, so that a predictor can be fitted on an old device
            too. A device's card lists the mixers that the device does not run; searches leave them out.
    """

    name: str
    mixer_class: MixerClass
    shapes: ShapesOf
    state_shapes: StateShapesOf
    forward: Forward
    write: Writer | None
    flops: FlopsOf
    activations: ActivationsOf = elementwise_activations
    projections: tuple[str, ...]
    matrices: tuple[str, ...] = ()
    output: str = "o"
    full_precision: tuple[str, ...] = ()
    initial: Mapping[str, Initialiser] = field(default_factory=lambda: MappingProxyType({}))
    has_heads: bool = True
    windowed: bool = False
    cache_in_place: bool = False
    runs_everywhere: bool = False
