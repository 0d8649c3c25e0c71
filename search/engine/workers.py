"""Evaluation by Ray actors, one CPU each.

The number of workers changes no bit of a result: each runs one torch thread, evaluates one architecture at a
time in a fixed batch shape, and outcomes come back in the order of submission. A worker that dies, or whose
machine does, is replaced where there is room, and its work is done again.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from search.engine.evaluator import RETRIES, EvaluateMany, EvaluateOne, Failed, Machine, Outcome, attempt
from space import Architecture, InputError
from supernet.training.parallel import ray_session

WORKER_TIMEOUT_S = 120.0  # without any worker, before a search gives up
POLL_INTERVAL_S = 1.0
PING_TIMEOUT_S = 30.0  # in which an idle worker has to answer


class _Worker:
    """A Ray actor's state."""

    def __init__(self, make: Callable[..., EvaluateOne], required: Sequence[str], *arguments: Any) -> None:
        self.evaluate_one, self.required = make(*arguments), required

    def machine(self) -> Machine:
        return Machine.here()

    def evaluate(self, architecture: dict[str, Any], stage: str) -> Outcome:
        return attempt(self.evaluate_one, Architecture.from_json(architecture), stage, self.required)


class _Pool:
    """Ray actors, replaced as they are lost."""

    def __init__(self, start: Callable[[], Any], count: int, warn: Callable[[str], None]) -> None:
        self.start, self.warn = start, warn
        self.starting: dict[Any, Any] = {}  # by the answer that says one has started
        self.idle: list[Any] = []
        self.here = Machine.here()
        for _ in range(count):
            self._add()

    def _add(self) -> None:
        actor = self.start()
        self.starting[actor.machine.remote()] = actor

    def _started(self, answer: Any) -> None:
        import ray

        actor = self.starting.pop(answer)
        try:
            machine = ray.get(answer)
        except ray.exceptions.RayActorError as error:
            if "creation task" not in str(error):  # lost before it was made
                self._add()
                return
            reason = str(error).strip().splitlines()[-1]
            raise InputError(
                f"Ray: a worker cannot be made ({reason}); every machine of the cluster needs formfit"
            ) from None
        if machine != self.here:
            self.warn(
                f"a worker has {machine.cpu} and torch {machine.torch}, this machine {self.here.cpu} and "
                f"{self.here.torch}: the same seed may give another front elsewhere"
            )
        self.idle.append(actor)

    def _answers(self, actor: Any) -> bool:
        """True if an idle worker answers; one that does not is replaced."""
        import ray

        try:
            ray.get(actor.machine.remote(), timeout=PING_TIMEOUT_S)
        except ray.exceptions.RayError:
            self._add()
            return False
        return True

    def __call__(self, architectures: Sequence[Architecture], stage: str) -> Iterator[Outcome]:
        import ray

        todo = deque(range(len(architectures)))
        busy: dict[Any, tuple[int, Any]] = {}  # by answer, the index of its architecture and the actor
        outcomes: dict[int, Outcome] = {}  # finished before their turn
        deaths = [0] * len(architectures)  # times a worker died while evaluating this architecture
        given = 0
        idle_since = time.monotonic()
        while given < len(architectures):
            while todo and self.idle:
                index, actor = todo.popleft(), self.idle.pop()
                if deaths[index] and not self._answers(actor):  # lost while it was idle
                    todo.appendleft(index)
                    continue
                busy[actor.evaluate.remote(architectures[index].to_json(), stage)] = index, actor
            if busy:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > WORKER_TIMEOUT_S:
                raise InputError(
                    f"Ray: no worker for {WORKER_TIMEOUT_S:.0f} s; finished generations are kept, and the "
                    "same command continues from them"
                )
            answers, _ = ray.wait([*busy, *self.starting], timeout=POLL_INTERVAL_S)
            for answer in answers:
                if answer in self.starting:
                    self._started(answer)
                    continue
                index, actor = busy.pop(answer)
                try:
                    outcomes[index] = ray.get(answer)
                    self.idle.append(actor)
                except ray.exceptions.RayError as error:
                    deaths[index] += 1
                    if deaths[index] > RETRIES:
                        reason = str(error).strip().splitlines()[0]
                        outcomes[index] = Failed(f"its worker died {deaths[index]} times: {reason}")
                    else:
                        todo.appendleft(index)
                    self._add()
            while given in outcomes:
                yield outcomes.pop(given)
                given += 1


@contextmanager
def pool(
    make: Callable[..., EvaluateOne],
    arguments: Sequence[Any],
    workers: int,
    address: str | None = None,
    warn: Callable[[str], None] = lambda _text: None,
    required: Sequence[str] = ("loss",),
) -> Iterator[EvaluateMany]:
    """An evaluator that calls the result of ``make(*arguments)`` in Ray actors, or here with 0 workers.

    Args:
        make: called once in every worker.
        arguments: of ``make``; shared through Ray's object store.
        workers: Ray actors of one CPU each.
        address: of a running Ray cluster; None starts one on this machine for as long.
        warn: called for every worker whose CPU or torch differs from this process's.
        required: qualities that must be finite.

    Raises:
        InputError: no cluster answers at the address, or all workers are lost.
    """
    if workers == 0:
        evaluate_one = make(*arguments)
        yield lambda architectures, stage: (attempt(evaluate_one, a, stage, required) for a in architectures)
        return
    with ray_session(workers, address):
        import ray

        shared = [ray.put(argument) for argument in arguments]
        actor = ray.remote(num_cpus=1)(_Worker)
        yield _Pool(partial(actor.remote, make, tuple(required), *shared), workers, warn)
