"""A contract suite for mixers, built-in or of a plug-in.

Subclass :class:`MixerContract` in a test module, and pytest collects its tests::

    from space.testing import MixerContract

    class TestMine(MixerContract):
        mixer = "mine"

A mixer that passes trains in a supernet, is extracted, exported, priced and decoded like the others.
"""

from space.testing.declarations import DeclarationTests
from space.testing.function import FunctionTests
from space.testing.graphs import GraphTests


class MixerContract(DeclarationTests, FunctionTests, GraphTests):
    """Tests of one mixer; see :class:`space.testing.settings.MixerSettings` for its attributes."""


__all__ = ["MixerContract"]
