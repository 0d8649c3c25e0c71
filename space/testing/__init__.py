"""A contract suite for mixers, built-in or of a plug-in.

Subclass :class:`MixerContract` in a test module, and pytest collects its tests::

    from space.testing import MixerContract

    class TestMine(MixerContract):
        mixer = "mine"

The suite tests, for several numbers of heads:

- declarations: names and dimensions of parameters, the class, heads and window, first values, and that all
  two-dimensional parameters are declared; FLOPs are at least those of the matrices;
- the torch function: reading in pieces, padding, causality, gradients, states, bf16 matrices and autocast,
  and that a smaller block runs on prefix views of a larger one, as in a supernet;
- the ONNX graph of two layers with different weights, in fp32 against torch and in int8 against fp32, with
  the predicted bytes.

It trusts ``flops`` and ``activations`` beyond these bounds, ``full_precision`` and ``runs_everywhere``, and
does not compare the function with its paper. It writes no Hugging Face folder, but tests that the functions
whose source a folder holds are at the top of a module.
"""

from space.testing.declarations import DeclarationTests
from space.testing.function import FunctionTests
from space.testing.graphs import GraphTests


class MixerContract(DeclarationTests, FunctionTests, GraphTests):
    """Tests of one mixer; see :class:`space.testing.settings.MixerSettings` for its attributes."""


__all__ = ["MixerContract"]
