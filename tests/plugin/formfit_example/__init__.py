"""A plug-in of formfit: importing it registers a mixer, a metric, an objective, a strategy and a runtime."""

from formfit_example import energy, hill_climbing, runtime, token_shift, worst_loss

__all__ = ["energy", "hill_climbing", "runtime", "token_shift", "worst_loss"]
