"""AdamW that updates prefixes of parameters; rows and columns that a sub-network does not use keep their
state.

With zero gradients for unused rows instead, their momentum would continue and their weights would decay once
for every smaller sub-network.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from supernet.supernet import prefix

BETAS = (0.9, 0.95)


class PrefixAdamW:
    """AdamW (Loshchilov and Hutter 2019) on leading rows and columns of its parameters.

    Vectors have no weight decay. The step of the bias correction is counted per parameter.

    Args:
        parameters: parameters by name, updated in place.
        weight_decay: weight decay of matrices.
    """

    def __init__(self, parameters: Mapping[str, Tensor], weight_decay: float) -> None:
        self.parameters, self.weight_decay = parameters, weight_decay
        self.state: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(
        self, parts: Mapping[str, tuple[int, ...]], gradients: Mapping[str, Tensor], rate: float, clip: float
    ) -> None:
        """Update prefixes of the parameters.

        Args:
            parts: shapes of the prefixes to update, by parameter name.
            gradients: gradients of full size by name; the prefixes are scaled in place.
            rate: learning rate.
            clip: greatest norm of all prefixes' gradients together.

        Raises:
            FloatingPointError: a gradient is not finite; no parameter has changed.
        """
        views = {name: prefix(gradients[name], shape) for name, shape in parts.items()}
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(views.values()))))
        if not torch.isfinite(norm):
            raise FloatingPointError("a gradient is not finite")
        torch._foreach_mul_(list(views.values()), (clip / (norm + 1e-6)).clamp(max=1.0))
        for matrices in (True, False):
            names = [name for name, shape in parts.items() if (len(shape) == 2) == matrices]
            for name in names:
                if name not in self.state:
                    parameter = self.parameters[name]
                    self.state[name] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
            adamw(
                [prefix(self.parameters[name].detach(), parts[name]) for name in names],
                [views[name] for name in names],
                [prefix(self.state[name]["exp_avg"], parts[name]) for name in names],
                [prefix(self.state[name]["exp_avg_sq"], parts[name]) for name in names],
                [],
                [self.state[name]["step"] for name in names],
                foreach=True,
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=rate,
                weight_decay=self.weight_decay if matrices else 0.0,
                eps=1e-8,
                maximize=False,
            )
