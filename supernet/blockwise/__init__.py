"""Blockwise training: private copies of every alternative block, each fitted to a frozen parent's block.

The parent is a trained model. Its activations are captured once (:mod:`supernet.blockwise.capture`); every
choice of every slot is then fitted alone to the residual contribution of the parent's block at that slot
(:mod:`supernet.blockwise.library`), and scored by the parent with that one block replaced
(:mod:`supernet.blockwise.scores`). The result is a checkpoint of a supernet with ``sharing: block``, which
search, evaluation and extraction read as any other.
"""
