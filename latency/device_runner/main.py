"""The program of a kit: times a fixed list of graphs on a device that has neither torch nor formfit.

``python3 kit.zip`` measures the missing groups and writes ``result.json`` after every group, so that a device
may be switched off at any time. It needs Python 3.8, the standard library, numpy and onnxruntime. The other
modules of :mod:`latency.device_runner` are copied into the kit unchanged.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import zipfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Sequence

import numpy as np
import onnxruntime as ort

from latency.device_runner.fingerprint import Fingerprint
from latency.device_runner.io_binding import bind, session_options
from latency.device_runner.plan import (
    REFERENCE_PREFIX,
    GroupResult,
    KitGroup,
    KitItem,
    KitPlan,
    KitResult,
    ParityCase,
    RandomWeight,
)
from latency.device_runner.timer import Run, measure, pinned
from space.cpus import available_cpus, slow_cpus

MAX_REASON = 500  # characters of an error of onnxruntime that a result keeps
NOT_FINITE = 1e30  # reported as the error of outputs that are not finite: JSON has no infinity


def fingerprint() -> Fingerprint:
    """The fingerprint of this machine under onnxruntime."""
    return Fingerprint.local("onnxruntime", ort.__version__)


def load(graph: bytes, weights: Sequence[RandomWeight], threads: int) -> ort.InferenceSession:
    """Create a session of a graph, with weights drawn at random.

    Args:
        graph: an ONNX model.
        weights: the weights that are not in the graph.
        threads: number of threads of the session.
    """
    options = session_options(threads)
    values = []
    for weight in weights:
        drawn = np.random.default_rng(weight.seed).standard_normal(weight.shape, np.float32)
        drawn = np.float32(weight.mean) + np.float32(weight.std) * drawn
        if weight.dtype != "float32":
            limits = np.iinfo(weight.dtype)
            drawn = drawn.clip(limits.min, limits.max).astype(weight.dtype)
        values.append(ort.OrtValue.ortvalue_from_numpy(drawn))
    if values:
        options.add_external_initializers([weight.name for weight in weights], values)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class KitFolder:
    """A kit that was unzipped, with the methods of a zip file that are used.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> bytes:
        """The content of a file.

        Args:
            name: its name in the kit.
        """
        return (self.folder / name).read_bytes()

    def __enter__(self) -> KitFolder:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def open_kit(path: Path) -> zipfile.ZipFile | KitFolder:
    """Open a kit: the zip file, or the folder that it was unzipped to.

    Args:
        path: of the file, the folder, or the program in the folder.
    """
    folder = path if path.is_dir() else path.parent
    if (path.is_dir() or path.name == "__main__.py") and (folder / "kit.json").is_file():
        return KitFolder(folder)
    return zipfile.ZipFile(path)


def require_writable(path: Path) -> None:
    """Make the folder of a result, and check that it can be written to.

    Args:
        path: file of the result.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"")
    temporary.unlink()


def write(path: Path, result: KitResult) -> None:
    """Write a result atomically.

    Args:
        path: the file.
        result: everything measured so far.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(result.to_json(), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class DeviceRunner:
    """A kit on a device.

    Args:
        kit: the opened kit.
        path: file of the result; measuring resumes from it if it exists.
        refused: mixers that are treated as unsupported.
    """

    def __init__(self, kit: zipfile.ZipFile | KitFolder, path: Path, refused: Sequence[str] = ()) -> None:
        self.kit, self.path, self.refused = kit, path, refused
        self.slow: str | None = None  # a line about slow CPUs
        self.plan = KitPlan.from_json(json.loads(kit.read("kit.json")))
        self.threads = self.plan.threads
        self.result = self._resumed() or KitResult(self.plan.kit, fingerprint(), self.threads)

    def _resumed(self) -> KitResult | None:
        """The result of an earlier run of this kit on this device; None if there is none."""
        if not self.path.exists():
            return None
        try:
            result = KitResult.from_json(json.loads(self.path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"{self.path}: not a whole result; remove it, or give another --out") from None
        if result.kit != self.plan.kit:
            raise SystemExit(f"{self.path}: the result of another kit; give another --out")
        if result.fingerprint != fingerprint():
            raise SystemExit(f"{self.path}: begun on another device or onnxruntime; give another --out")
        return result

    def run(self) -> int:
        """Measure the missing groups; returns the exit status."""
        if self.result.complete:
            say(f"{self.path}: complete already")
            return 0
        cpus = available_cpus()
        if self.threads > cpus:
            raise SystemExit(f"the kit measures {self.threads} threads, this process may use {cpus} CPUs")
        with pinned(self.threads) as taken:
            self.slow = slow_cpus(taken)
            required = self.plan.min_runtime_version
            if _version(ort.__version__) < _version(required):
                raise SystemExit(f"onnxruntime {ort.__version__}: this kit needs {required} or newer")
            anchor = self.plan.anchor
            session = load(self.kit.read(anchor.graph), anchor.weights, self.threads)
            anchors = [bind(session, io_binding) for io_binding in anchor.io_bindings.values()]
            for number in range(len(self.result.groups), len(self.plan.groups)):
                self.result.groups.append(self._group(number, anchors))
                write(self.path, self.result)
        for case in self.plan.parity:
            self.result.parity[case.name] = self._parity(case)
        self.result.complete = True
        write(self.path, self.result)
        command = f"formfit {self.plan.return_command} --kit-result {self.path.name}"
        say(f"\nwritten: {self.path} (copy it back, then: {command})")
        return 0

    def _group(self, number: int, anchors: Sequence[Run]) -> GroupResult:
        """Time the items of a group that this device can run."""
        group: KitGroup = self.plan.groups[number]
        result = GroupResult()
        items: dict[str, Run] = {}
        for item in group.items:
            if self._wanted(item):
                items.update(self._prepared(item, result))
        # The reference work is timed only to relate other items to other groups.
        if any(not name.startswith(REFERENCE_PREFIX) for name in items):
            progress = Progress(number, len(self.plan.groups), len(items))
            measured = measure(items, anchors, group.timer, progress=progress)
            result.timings.update(measured.timings)
            result.anchor_reference = measured.anchor_reference
            result.problems += measured.machine_problems()
            if self.slow:
                result.problems.append(self.slow)
        result.ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return result

    def _wanted(self, item: KitItem) -> bool:
        """True if the device is not known to lack a mixer of the item, and its role applies."""
        if any(mixer in self.result.unsupported for mixer in item.mixers):
            return False
        return bool(self.result.unsupported) or not item.fallback

    def _prepared(self, item: KitItem, result: GroupResult) -> dict[str, Run]:
        """Runners of an item by name, each run once; none if it does not run on this device."""
        try:
            for mixer in item.mixers:
                if mixer in self.refused:
                    raise RuntimeError(f"{mixer} refused by --refuse")
            session = load(self.kit.read(item.graph), item.weights, self.threads)
            runs = {w: bind(session, io_binding) for w, io_binding in item.io_bindings.items()}
            for run in runs.values():
                run(1)
        except MemoryError:
            raise SystemExit(f"{item.name}: out of memory; the same command resumes") from None
        except Exception as error:  # onnxruntime's own classes have no other common base
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._failed(item, result, reason[:MAX_REASON])
            return {}
        return {f"{item.name}|{w}": run for w, run in runs.items()}

    def _failed(self, item: KitItem, result: GroupResult, reason: str) -> None:
        """Record an item that does not run; stop if other devices would have run it without exception."""
        if not item.mixers:
            raise SystemExit(f"{item.name} does not run: {reason}")
        if item.is_op:
            self.result.unsupported[item.mixers[0]] = reason
            say(f"\nUNSUPPORTED {item.mixers[0]}: {reason}")
        else:
            say(f"\nleft out, does not run: {item.name}: {reason}")
            result.problems.append(f"{item.name} does not run: {reason}")

    def _parity(self, case: ParityCase) -> float:
        """``max|a-b| / max|b|`` over all outputs, of those computed here (a) and those expected (b)."""
        session = load(self.kit.read(case.graph), [], self.threads)
        arrays = np.load(io.BytesIO(self.kit.read(case.arrays)), allow_pickle=False)
        names = [output.name for output in session.get_outputs()]
        found = session.run(names, {i.name: arrays["in." + i.name] for i in session.get_inputs()})
        errors = [0.0]
        for name, value in zip(names, found):
            wanted = arrays["out." + name]
            errors.append(float(np.abs(value - wanted).max() / np.abs(wanted).max()) if wanted.size else 0.0)
        return max(errors) if np.isfinite(errors).all() else NOT_FINITE


def _version(text: str) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(map(int, text.split(".")[:2]))


class Progress:
    """Progress of a group, on the terminal.

    Args:
        group: number of the group, from 0.
        groups: number of groups.
        items: number of timings in the group.
    """

    def __init__(self, group: int, groups: int, items: int) -> None:
        self.group, self.groups, self.items = group, groups, items

    def __call__(self, done: int, maximum: int) -> None:
        """Show the rounds done.

        Args:
            done: rounds done.
            maximum: rounds after which the group ends in any case.
        """
        group = f"group {self.group + 1} of {self.groups}, {self.items} timings"
        sys.stderr.write(f"\r{f'{group}: round {done} of at most {maximum}':70s}")
        sys.stderr.flush()


def say(text: str) -> None:
    """Write a line to the terminal."""
    sys.stderr.write(text + "\n")


def main() -> int:
    """Run the kit that this program is in; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python3 kit.zip", description="Times a formfit kit on this device."
    )
    parser.add_argument("--out", type=Path, default=Path("result.json"), help="file of the result")
    parser.add_argument("--kit", type=Path, default=Path(sys.argv[0]), help=argparse.SUPPRESS)
    parser.add_argument(
        "--refuse", action="append", default=[], metavar="MIXER", help="treat a mixer as unsupported"
    )
    arguments = parser.parse_args()
    try:
        require_writable(arguments.out)  # before minutes of measuring
        with open_kit(arguments.kit) as kit:
            return DeviceRunner(kit, arguments.out, arguments.refuse).run()
    except KeyboardInterrupt:
        say("\nstopped; the same command resumes")
        return 130
    except (OSError, zipfile.BadZipFile) as error:
        say(f"\n{error}; the same command resumes")
        return 2
