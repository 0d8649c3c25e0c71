"""The reference work and the refusal of noisy machines."""

from collections.abc import Sequence
from typing import Any

import pytest

from latency import OnnxRuntime
from latency.device_runner.timer import Run
from latency.runtimes.reference import require_stable, time_references
from space import InputError, ModelConfig, Workload
from space.ops import Op


class Disturbed(OnnxRuntime):
    """A runtime with disturbances: every third session runs its work twice."""

    def __init__(self) -> None:
        super().__init__(1)
        self.made = 0

    def stack(
        self, op: Op, height: int, workloads: Sequence[Workload], model_config: ModelConfig
    ) -> dict[Workload, Run]:
        self.made += 1
        twice = 2 if self.made % 3 == 0 else 1

        def slowed(run: Any) -> Run:
            return lambda loops: run(twice * loops)

        return {w: slowed(run) for w, run in super().stack(op, height, workloads, model_config).items()}


def test_noisy_machine_is_refused_with_advice() -> None:
    with pytest.raises(
        InputError, match=r"too noisy for claims.*differs by \d+.*stop other programs"
    ) as caught:
        require_stable(time_references(Disturbed()), 0.1)
    assert "\n" not in str(caught.value)


def test_aa_difference_is_relative() -> None:
    assert 0 < require_stable(time_references(OnnxRuntime(1)), 9.0) < 1
