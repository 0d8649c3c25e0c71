"""Reading what a kit measured: a stranger's file.

It is JSON of a fixed form, nothing in it names a path or is executed, every value follows from its raw times,
and no time is taken that the device's own reference product cannot explain. Its seal finds accidents, not
liars: whoever forges plausible times is believed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from latency.device_runner import main as probe
from latency.device_runner.timing import Timing
from latency.records import least_anchored
from latency.runtimes.reference import reference_work
from space import InputError

MOST_BYTES = 64 * 2**20  # of a result
LEAST_ANCHOR = 1e-7  # seconds; no product of this size is quicker


class Fingerprint(BaseModel):
    """What identifies the device."""

    model_config = ConfigDict(extra="forbid", strict=True)

    machine: str
    cpu: str
    system: str
    runtime: str
    runtime_version: str


class Result(BaseModel):
    """The form of a result; everything else about it is checked against the kit."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    class Group(BaseModel):
        """What was measured together."""

        model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
        timings: dict[str, dict[str, Any]]
        anchor_reference: PositiveFloat | None
        problems: list[str]
        ended: str

    schema_: int
    kit: str
    fingerprint: Fingerprint
    threads: int
    groups: list[Group] = Field(min_length=1)
    unsupported: dict[str, str]
    parity: dict[str, float]
    complete: bool
    seal: str


def read_result(path: Path, kit: str, device: str) -> Result:
    """A result of a kit, whose form is right and whose seal is whole.

    Raises:
        InputError: it is not.
    """
    again = f"bring {path.name} back from the device again"
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(
                f"{path}: {path.stat().st_size / 2**20:.0f} MiB, no result is above {MOST_BYTES >> 20}"
            )
        value = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        whole = value.get("seal") == probe.seal(value)
        result = Result.model_validate({"schema_" if k == "schema" else k: v for k, v in value.items()})
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: not a result: {place}: {first['msg']}; {again}") from None
    except (ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"{path}: not a result ({str(error)[:80]}); {again}") from None
    if result.schema_ != probe.SCHEMA:
        raise InputError(f"{path}: schema version {result.schema_}, this formfit reads {probe.SCHEMA}")
    if not whole:
        raise InputError(f"{path}: changed since it was measured; {again}")
    if not result.complete:
        raise InputError(f"{path}: {len(result.groups)} groups are there, not all; run the kit to its end")
    if result.kit != kit:
        raise InputError(f"{path}: the result of kit {result.kit[:12]}, device {device} has {kit[:12]}")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no time")


def read_timings(path: Path, group: Result.Group, work: Mapping[str, int]) -> dict[str, Timing]:
    """The timings of a group, by name.

    Args:
        path: of the result, for messages.
        group: one that was measured.
        work: the FLOPs of all that the kit measures.

    Raises:
        InputError: a time is not of the kit, does not follow from its raw times, or is impossible.
    """
    anchor = float(group.anchor_reference or 0.0)
    if anchor < LEAST_ANCHOR:
        raise InputError(f"{path}: the reference product in {anchor:.3g} s is impossible")
    found = {}
    for name, value in group.timings.items():
        if name not in work:
            raise InputError(f"{path}: {' '.join(name.split())[:80]}: its kit does not measure that")
        try:
            timing = Timing.from_json(value)
            wanted = np.divide(timing.raw, timing.anchors) * anchor
            follows = np.allclose(timing.values, wanted, rtol=1e-9, atol=0)
        except (ValueError, TypeError, OverflowError, FloatingPointError) as error:
            raise InputError(f"{path}: {name}: {error}") from None
        if not follows or timing.name != name:
            raise InputError(f"{path}: {name}: its values do not follow from its raw times")
        least = least_anchored(work[name], anchor)
        if timing.seconds < least:
            raise InputError(
                f"{path}: {name}: {timing.seconds:.3g} s is impossible, "
                f"the device needs {least:.3g} s or more"
            )
        found[name] = timing
    untied = [name for name in reference_work() if name not in found]
    if untied:
        raise InputError(f"{path}: lacks {untied[0]}, the reference work of a group")
    return found
