"""Runs one task a layer, in this process or as Ray tasks on one CPU each."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from space import InputError
from space.io.progress import Stage
from supernet.training.parallel import ray_session
from supernet.training.trials import MAX_RETRIES, Progress, Share

POLL_INTERVAL_S = 1.0  # of the progress

Shared = TypeVar("Shared")


def run_layers(
    work: Callable[[int, Shared, Share], None],
    slots: Sequence[int],
    shared: Shared,
    workers: int,
    stage: Stage,
    done: str,
    share_of: Callable[[int], float],
) -> None:
    """Run a function for each layer; it writes its result to files that this machine sees.

    A worker that dies is replaced, at most twice a layer.

    Args:
        work: called with a slot, ``shared`` and a function that takes the share that is done.
        slots: the layers' slots.
        shared: second argument of every call.
        workers: layers at a time; 0 runs them in this process.
        stage: shows the progress.
        done: what it says of layers that are done.
        share_of: the share of a layer that is done, by its files.

    Raises:
        InputError: a layer failed.
    """
    progress = Progress(len(slots), stage, done)
    if not workers:
        for i, slot in enumerate(slots):
            work(slot, shared, partial(progress, i))
        return
    with ray_session(workers):
        import ray

        task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_run)
        common = ray.put(shared)
        left = list(range(len(slots)))[::-1]
        running: dict[Any, int] = {}  # Ray's reference to a task -> place in slots
        try:
            while left or running:
                while left and len(running) < workers:
                    i = left.pop()
                    running[task.remote(work, slots[i], common)] = i
                ready, _ = ray.wait(list(running), timeout=POLL_INTERVAL_S)
                for reference in ready:
                    i = running.pop(reference)
                    _raise_failure(slots[i], reference)
                    progress(i, 1.0)
                for i in running.values():
                    progress(i, min(share_of(slots[i]), 0.99))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _run(work: Callable[[int, Any, Share], None], slot: int, shared: Any) -> str | None:
    """Run one layer in a worker; the message of its :class:`InputError`, which another try would repeat."""
    try:
        work(slot, shared, lambda share: None)
    except InputError as error:
        return str(error)
    return None


def _raise_failure(slot: int, reference: Any) -> None:
    """Raise what a finished task failed with.

    Raises:
        InputError: it raised one, or its process died.
    """
    import ray

    try:
        refused = ray.get(reference)
    except ray.exceptions.WorkerCrashedError:
        raise InputError(
            f"blockwise training: layer {slot}: its process died {MAX_RETRIES + 1} times, perhaps for lack "
            "of memory; the same command goes on from here"
        ) from None
    if refused:
        raise InputError(refused)
