"""Who evaluates architectures: this process, or Ray actors that hold the supernet.

Every evaluator runs one torch thread, one architecture at a time, in a fixed batch shape, so
that who does it, and how many there are, changes no bit of the result. Results come back in
the order of submission.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from space import Architecture, Space
from supernet import Quality, Supernet, evaluate
from supernet.evaluate import EvaluationSet
from supernet.parallel import ray_session

RETRIES = 2


class Evaluator(Protocol):
    """What the search needs of an evaluator."""

    def __call__(self, architectures: Sequence[Architecture], data: str) -> Iterator[Quality]:
        """Evaluate on the named set of windows, in order."""
        ...


class _Local:
    """Evaluates in this process."""

    def __init__(self, supernet: Supernet, sets: Mapping[str, EvaluationSet]) -> None:
        self.supernet, self.sets = supernet, dict(sets)

    def __call__(self, architectures: Sequence[Architecture], data: str) -> Iterator[Quality]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for architecture in architectures:
                weights = self.supernet.weights(architecture)
                yield evaluate(weights, architecture, self.supernet.space.frame, self.sets[data])
        finally:
            torch.set_num_threads(threads)


class _Worker:
    """A Ray actor's state: a supernet rebuilt from shared arrays."""

    def __init__(
        self, space: dict[str, Any], weights: Mapping[str, NDArray[Any]], sets: Mapping[str, EvaluationSet]
    ) -> None:
        torch.use_deterministic_algorithms(True)
        supernet = Supernet(Space.model_validate(space))
        supernet.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
        self.local = _Local(supernet.requires_grad_(False).eval(), sets)

    def evaluate(self, architecture: dict[str, Any], data: str) -> Quality:
        return next(iter(self.local([Architecture.from_json(architecture)], data)))


@contextmanager
def evaluator(
    supernet: Supernet, sets: Mapping[str, EvaluationSet], workers: int, address: str | None = None
) -> Iterator[Evaluator]:
    """An evaluator: in this process with 0 workers, else as so many Ray actors.

    A worker that dies is started again and its work done again.
    """
    if workers == 0:
        torch.use_deterministic_algorithms(True)
        yield _Local(supernet, sets)
        return
    with ray_session(workers, address):
        import ray

        weights = ray.put({name: value.numpy() for name, value in supernet.state_dict().items()})
        shared_sets = ray.put(dict(sets))
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=RETRIES)(_Worker)
        space = supernet.space.model_dump(mode="json")
        actors = [actor.remote(space, weights, shared_sets) for _ in range(workers)]

        def run(architectures: Sequence[Architecture], data: str) -> Iterator[Quality]:
            pool = ray.util.ActorPool(actors)
            values = [a.to_json() for a in architectures]
            yield from pool.map(lambda worker, value: worker.evaluate.remote(value, data), values)

        yield run
