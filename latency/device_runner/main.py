"""The program of a probe kit: times a fixed list of graphs on a device that has neither torch nor formfit.

``python3 kit.zip`` measures what is missing and writes ``result.json`` after every group, so that a device
may be unplugged. Python 3.8, the standard library, numpy and onnxruntime are all it needs; the modules
:mod:`latency.device_runner.timer`, :mod:`latency.device_runner.timing` and
:mod:`latency.device_runner.io_binding` come in the kit as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import sys
import zipfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from latency.device_runner.io_binding import Binding, Run, bind, session_options
from latency.device_runner.timer import TimerConfig, measure, pinned

SCHEMA = 1


def cpu_model() -> str:
    """The CPU's name and feature flags in short, where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    pairs = (line.partition(":") for line in reversed(lines))
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    name = fields.get("model name") or fields.get("Model") or "unknown"
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    wide = [
        flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimddp", "sve") if flag in flags
    ]
    return " ".join([name, f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}", *wide])


def fingerprint() -> dict[str, Any]:
    """CPU, system and versions: what identifies a device and its runtime."""
    return {
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "system": platform.system(),
        "runtime": "onnxruntime",
        "runtime_version": ort.__version__,
    }


def load(graph: bytes, weights: Sequence[Sequence[Any]], threads: int) -> ort.InferenceSession:
    """A session of a graph whose weights were left out of it.

    Args:
        graph: an ONNX model.
        weights: of each weight left out: name, shape, mean, standard deviation, the seed of its values, and
            their type.
        threads: of the session.
    """
    options = session_options(threads)
    values = []
    for _, shape, mean, spread, seed, kind in weights:
        drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
        drawn = np.float32(mean) + np.float32(spread) * drawn
        if kind != "float32":
            drawn = drawn.clip(np.iinfo(kind).min, np.iinfo(kind).max).astype(kind)
        values.append(ort.OrtValue.ortvalue_from_numpy(drawn))
    if values:
        options.add_external_initializers([name for name, *_ in weights], values)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def seal(result: Mapping[str, Any]) -> str:
    """A hash of a result without its own seal: a result that was cut or edited by hand does not match."""
    body = {name: value for name, value in result.items() if name != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result whole or not at all."""
    result["seal"] = seal(result)
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(result, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


class Probe:
    """One kit on one device."""

    def __init__(self, kit: zipfile.ZipFile, path: Path, refused: Sequence[str] = ()) -> None:
        self.kit, self.path, self.refused = kit, path, refused
        self.plan: dict[str, Any] = json.loads(kit.read("kit.json"))
        self.threads: int = self.plan["threads"]
        self.result = self._begun() or {
            "schema": SCHEMA,
            "kit": self.plan["kit"],
            "fingerprint": fingerprint(),
            "threads": self.threads,
            "groups": [],
            "unsupported": {},
            "parity": {},
            "complete": False,
        }

    def _begun(self) -> dict[str, Any] | None:
        """What an earlier run left, if it is of this kit and this device."""
        if not self.path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            whole = found["seal"] == seal(found)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise SystemExit(f"{self.path}: not a whole result; remove it, or give another --out")
        if found["kit"] != self.plan["kit"]:
            raise SystemExit(f"{self.path}: the result of another kit; give another --out")
        if found["fingerprint"] != fingerprint():
            raise SystemExit(f"{self.path}: begun on another device or onnxruntime; give another --out")
        return found

    def run(self) -> int:
        """Measure what is missing, group by group."""
        if self.result["complete"]:
            say(f"{self.path}: complete already")
            return 0
        with pinned(self.threads):
            anchor = self.plan["anchor"]
            here, oldest = (tuple(map(int, v.split(".")[:2])) for v in (ort.__version__, self.plan["oldest"]))
            if here < oldest:
                raise SystemExit(
                    f"onnxruntime {ort.__version__}: this kit needs {self.plan['oldest']} or newer"
                )
            session = load(self.kit.read(anchor["graph"]), anchor["weights"], self.threads)
            anchors = [bind(session, Binding.from_json(anchor["bindings"][""]))]
            groups: list[dict[str, Any]] = self.plan["groups"]
            for number, group in enumerate(groups):
                if number >= len(self.result["groups"]):
                    self._group(number, len(groups), group, anchors)
        for case in self.plan.get("parity", ()):
            self.result["parity"][case["name"]] = self._parity(case)
        self.result["complete"] = True
        write(self.path, self.result)
        command = "profile" if "space" in self.plan else "verify"
        say(f"\nwritten: {self.path} (bring it back: formfit {command} --kit-result {self.path.name})")
        return 0

    def _group(self, number: int, groups: int, group: Mapping[str, Any], anchors: Sequence[Run]) -> None:
        items: dict[str, Run] = {}
        timings: dict[str, Any] = {}
        found: dict[str, Any] = {"timings": timings, "anchor_reference": None, "problems": []}
        for item in group["items"]:
            lacking = [mixer for mixer in item["mixers"] if mixer in self.result["unsupported"]]
            if lacking or (item["fallback"] and not self.result["unsupported"]):
                continue
            try:
                self._refuse(item["mixers"])
                session = load(self.kit.read(item["graph"]), item["weights"], self.threads)
                runs = {w: bind(session, Binding.from_json(b)) for w, b in item["bindings"].items()}
                for run in runs.values():
                    run(1)
            except MemoryError:
                raise SystemExit(f"{item['name']}: out of memory; the same command goes on") from None
            except Exception as error:  # onnxruntime's own classes have no common base but this one
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                if item["op"] and item["mixers"]:
                    self.result["unsupported"][item["mixers"][0]] = reason
                    say(f"\nUNSUPPORTED {item['mixers'][0]}: {reason}")
                    continue
                if item["op"] or not item["mixers"]:
                    raise SystemExit(f"{item['name']} does not run: {reason}") from None
                say(f"\nleft out, does not run: {item['name']}: {reason}")
                found["problems"].append(f"{item['name']} does not run: {reason}")
                continue
            items.update({f"{item['name']}|{w}": run for w, run in runs.items()})
        if any(not name.startswith("reference|") for name in items):
            progress = Progress(number, groups, len(items))
            measured = measure(items, anchors, TimerConfig(**group["timer"]), progress=progress)
            timings.update({name: timing.to_json() for name, timing in measured.timings.items()})
            found["anchor_reference"] = measured.anchor_reference
            found["problems"] += measured.machine_problems()
        found["ended"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.result["groups"].append(found)
        write(self.path, self.result)

    def _parity(self, case: Mapping[str, Any]) -> float:
        """``max|a-b| / max|b|`` of what a graph gives here and what it should, over all outputs."""
        session = load(self.kit.read(case["graph"]), [], self.threads)
        arrays = np.load(io.BytesIO(self.kit.read(case["arrays"])), allow_pickle=False)
        names = [output.name for output in session.get_outputs()]
        found = session.run(names, {i.name: arrays["in." + i.name] for i in session.get_inputs()})
        errors = [0.0]
        for name, value in zip(names, found):
            wanted = arrays["out." + name]
            errors.append(float(np.abs(value - wanted).max() / np.abs(wanted).max()) if wanted.size else 0.0)
        return max(errors) if np.isfinite(errors).all() else 1e30

    def _refuse(self, mixers: Sequence[str]) -> None:
        for mixer in mixers:
            if mixer in self.refused:
                raise RuntimeError(f"{mixer} refused by --refuse")


class Progress:
    """Rounds done, on the terminal."""

    def __init__(self, group: int, groups: int, items: int) -> None:
        self.group, self.groups, self.items = group, groups, items

    def __call__(self, done: int, most: int) -> None:
        """Say how far a group is."""
        text = (
            f"group {self.group + 1} of {self.groups}, {self.items} timings: round {done} of at most {most}"
        )
        sys.stderr.write(f"\r{text:70s}")
        sys.stderr.flush()


def say(text: str) -> None:
    """One line on the terminal."""
    sys.stderr.write(text + "\n")


def main() -> int:
    """Run the kit that this program came in."""
    parser = argparse.ArgumentParser(
        prog="python3 kit.zip", description="Times a formfit kit on this device."
    )
    parser.add_argument("--out", type=Path, default=Path("result.json"), help="where the result is written")
    parser.add_argument("--kit", type=Path, default=Path(sys.argv[0]), help=argparse.SUPPRESS)
    parser.add_argument(
        "--refuse", action="append", default=[], metavar="MIXER", help="treat a mixer as if it could not run"
    )
    arguments = parser.parse_args()
    with zipfile.ZipFile(arguments.kit) as kit:
        try:
            return Probe(kit, arguments.out, arguments.refuse).run()
        except KeyboardInterrupt:
            say("\nstopped; the same command goes on")
            return 130
