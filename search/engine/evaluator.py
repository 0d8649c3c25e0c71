"""Who evaluates architectures: this process, or Ray actors that hold the supernet.

Every evaluator runs one torch thread, one architecture at a time, in a fixed batch shape, so
that who does it, and how many there are, changes no bit of the result. Results come back in
the order of submission. An architecture whose evaluation raises is tried again, then recorded as failed;
a worker that dies, or whose machine does, is replaced where there is room, and its work is done again.
"""

import math
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from latency.device_runner.main import cpu_model
from space import Architecture, InputError, Space
from supernet.evaluate import EvaluationSet, Quality, evaluate
from supernet.supernet import Supernet
from supernet.training.parallel import ray_session

RETRIES = 2
PATIENCE = 120.0  # seconds without any worker before a search gives up
POLL = 1.0  # seconds
ANSWER = 30.0  # seconds that an idle worker has to answer


@dataclass(frozen=True)
class Failed:
    """An architecture that could not be evaluated, and why."""

    reason: str


Outcome = Quality | Failed
Evaluate = Callable[[Architecture, str], Quality]  # one architecture, on a named set of windows


class Evaluator(Protocol):
    """What the search needs of an evaluator."""

    def __call__(self, architectures: Sequence[Architecture], data: str) -> Iterator[Outcome]:
        """Evaluate on the named set of windows, in order."""
        ...


@dataclass(frozen=True)
class Machine:
    """What the last bits of a loss depend on, beside the weights and the text."""

    cpu: str
    torch: str

    @staticmethod
    def here() -> "Machine":
        """This process's."""
        return Machine(cpu_model() or platform.machine(), torch.__version__)


def attempt(evaluate_one: Evaluate, architecture: Architecture, data: str) -> Outcome:
    """Evaluate, again where it raises; what cannot be evaluated is an outcome too."""
    reason = ""
    for _ in range(1 + RETRIES):
        try:
            quality = evaluate_one(architecture, data)
        except Exception as error:  # whatever it is, the search goes on
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            if math.isfinite(quality.loss_nats):
                return quality
            return Failed(f"the loss is {quality.loss_nats}")
    return Failed(reason)


class SupernetEvaluate:
    """Evaluates sub-networks of a supernet that is rebuilt from arrays."""

    def __init__(
        self, space: dict[str, Any], weights: Mapping[str, NDArray[Any]], sets: Mapping[str, EvaluationSet]
    ) -> None:
        torch.use_deterministic_algorithms(True)
        supernet = Supernet(Space.model_validate(space))
        supernet.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
        self.supernet, self.sets = supernet.requires_grad_(False).eval(), dict(sets)

    def __call__(self, architecture: Architecture, data: str) -> Quality:
        """Evaluate an architecture on a set."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            weights = self.supernet.weights(architecture)
            return evaluate(weights, architecture, self.supernet.space.config, self.sets[data])
        finally:
            torch.set_num_threads(threads)


class _Worker:
    """A Ray actor's state."""

    def __init__(self, make: Callable[..., Evaluate], *arguments: Any) -> None:
        self.evaluate_one = make(*arguments)

    def machine(self) -> Machine:
        return Machine.here()

    def evaluate(self, architecture: dict[str, Any], data: str) -> Outcome:
        return attempt(self.evaluate_one, Architecture.from_json(architecture), data)


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
        """Whether an idle worker is still there; one that is not is replaced."""
        import ray

        try:
            ray.get(actor.machine.remote(), timeout=ANSWER)
        except ray.exceptions.RayError:
            self._add()
            return False
        return True

    def __call__(self, architectures: Sequence[Architecture], data: str) -> Iterator[Outcome]:
        import ray

        todo = deque(range(len(architectures)))
        busy: dict[Any, tuple[int, Any]] = {}
        found: dict[int, Outcome] = {}
        deaths = [0] * len(architectures)
        given = 0
        alone_since = time.monotonic()
        while given < len(architectures):
            while todo and self.idle:
                index, actor = todo.popleft(), self.idle.pop()
                if deaths[index] and not self._answers(actor):  # not the index's doing
                    todo.appendleft(index)
                    continue
                busy[actor.evaluate.remote(architectures[index].to_json(), data)] = index, actor
            if busy:
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > PATIENCE:
                raise InputError(
                    f"Ray: no worker for {PATIENCE:.0f} s; what was evaluated is kept, and the same command "
                    "goes on from it"
                )
            answers, _ = ray.wait([*busy, *self.starting], timeout=POLL)
            for answer in answers:
                if answer in self.starting:
                    self._started(answer)
                    continue
                index, actor = busy.pop(answer)
                try:
                    found[index] = ray.get(answer)
                    self.idle.append(actor)
                except ray.exceptions.RayError as error:
                    deaths[index] += 1
                    if deaths[index] > RETRIES:
                        reason = str(error).strip().splitlines()[0]
                        found[index] = Failed(f"its worker died {deaths[index]} times: {reason}")
                    else:
                        todo.appendleft(index)
                    self._add()
            while given in found:
                yield found.pop(given)
                given += 1


@contextmanager
def pool(
    make: Callable[..., Evaluate],
    arguments: Sequence[Any],
    workers: int,
    address: str | None = None,
    warn: Callable[[str], None] = lambda _text: None,
) -> Iterator[Evaluator]:
    """An evaluator made of what ``make(*arguments)`` gives: here with 0 workers, else in Ray actors.

    Args:
        make: called in every worker.
        arguments: of it; shared once through Ray's object store.
        workers: Ray actors of one CPU each.
        address: of a running Ray cluster; None starts one on this machine for as long.
        warn: told once for every worker whose CPU or torch is another than here.

    Raises:
        InputError: no cluster answers at the address, or all workers are lost.
    """
    if workers == 0:
        evaluate_one = make(*arguments)
        yield lambda architectures, data: (attempt(evaluate_one, a, data) for a in architectures)
        return
    with ray_session(workers, address):
        import ray

        shared = [ray.put(argument) for argument in arguments]
        actor = ray.remote(num_cpus=1)(_Worker)
        yield _Pool(partial(actor.remote, make, *shared), workers, warn)


def evaluator(
    supernet: Supernet,
    sets: Mapping[str, EvaluationSet],
    workers: int,
    address: str | None = None,
    warn: Callable[[str], None] = lambda _text: None,
) -> AbstractContextManager[Evaluator]:
    """The :func:`pool` that evaluates sub-networks of a supernet on named sets of windows."""
    weights = {name: value.numpy() for name, value in supernet.state_dict().items()}
    space = supernet.space.model_dump(mode="json")
    return pool(SupernetEvaluate, (space, weights, dict(sets)), workers, address, warn)
