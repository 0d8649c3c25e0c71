"""Reading the result of a kit, an untrusted file.

It is JSON of a fixed form. Nothing in it names a path or is executed, every value must follow from its raw
times, and no time is accepted that the device's own anchor contradicts. Its checksum detects accidents, not
fraud: plausible forged times are accepted.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, ValidationError

from latency.device_runner.fingerprint import Fingerprint
from latency.device_runner.plan import RESULT_SCHEMA, checksum
from latency.device_runner.timing import JsonObject, Timing
from latency.records import min_plausible_seconds
from latency.runtimes.reference import reference_work
from space import InputError
from space.io.filesystem import read_file

MAX_RESULT_BYTES = 64 * 2**20
MIN_ANCHOR_SECONDS = 1e-7  # no product of this size is faster
RELATIVE_ROUNDING = 1e-9  # of values that are computed again from raw times
MAX_SECONDS = 600.0  # of one timed item
MAX_TEXT = 2000  # characters of a reason
Text = Annotated[str, Field(max_length=MAX_TEXT)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ResultFingerprint(_Strict):
    """Identity of the device; fields as of :class:`latency.device_runner.fingerprint.Fingerprint`."""

    machine: Text
    cpu: Text
    system: Text
    runtime: Text
    runtime_version: Text


class ResultGroup(_Strict):
    """Form of a group; fields as of :class:`latency.device_runner.plan.GroupResult`."""

    timings: dict[str, JsonObject]
    anchor_reference: PositiveFloat | None
    problems: list[Text] = Field(max_length=10_000)
    ended: Text


class Result(_Strict):
    """Form of a result; fields as of :class:`latency.device_runner.plan.KitResult`."""

    schema_: int
    kit: str
    fingerprint: ResultFingerprint
    threads: int
    groups: list[ResultGroup] = Field(min_length=1)
    unsupported: dict[Text, Text] = Field(max_length=100)
    parity: dict[Text, NonNegativeFloat] = Field(max_length=100)
    complete: bool
    checksum: str

    @property
    def device(self) -> Fingerprint:
        """The identity of the device."""
        return Fingerprint(**self.fingerprint.model_dump())


def read_result(path: Path, kit: str, device: str) -> Result:
    """Read a result whose form and checksum are right.

    Args:
        path: the file.
        kit: digest of the kit that it must be of.
        device: name of the device's card, for errors.

    Raises:
        InputError: the file is not a result, was changed, is incomplete, or is of another kit.
    """
    result, is_whole = _parsed(path)
    again = _copy_again(path)
    if result.schema_ != RESULT_SCHEMA:
        raise InputError(f"{path}: schema version {result.schema_}, this formfit reads {RESULT_SCHEMA}")
    if not is_whole:
        raise InputError(f"{path}: changed since it was measured; {again}")
    if not result.complete:
        raise InputError(f"{path}: {len(result.groups)} groups are there, not all; run the kit to its end")
    if result.kit != kit:
        raise InputError(f"{path}: the result of kit {result.kit[:12]}, device {device} has {kit[:12]}")
    return result


def _copy_again(path: Path) -> str:
    return f"copy {path.name} from the device again"


def _parsed(path: Path) -> tuple[Result, bool]:
    """A file of the form of a result, and whether its checksum matches."""
    again = _copy_again(path)
    try:
        value = json.loads(read_file(path, MAX_RESULT_BYTES), parse_constant=_refuse_constant)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        result = Result.model_validate({"schema_" if k == "schema" else k: v for k, v in value.items()})
        return result, result.checksum == checksum(value)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: not a result: {place}: {first['msg']}; {again}") from None
    except (ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"{path}: not a result ({str(error)[:80]}); {again}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no time")


def require_design(
    path: Path, result: Result, threads: int, groups: int, mixers: Collection[str], cases: Collection[str]
) -> None:
    """Compare a result with what its kit was packed to do.

    Args:
        path: the result, for errors.
        result: of the kit.
        threads: number of threads of the kit.
        groups: number of its groups.
        mixers: those that it measures.
        cases: names of its parity checks.

    Raises:
        InputError: they differ.
    """
    again = _copy_again(path)
    if result.threads != threads:
        raise InputError(f"{path}: measured on {result.threads} threads, its kit on {threads}; {again}")
    if len(result.groups) != groups:
        raise InputError(f"{path}: has {len(result.groups)} groups, its kit {groups}; {again}")
    unknown = sorted(set(result.unsupported) - set(mixers))
    if unknown:
        raise InputError(f"{path}: mixer {unknown[0][:80]!r} is not one of its kit; {again}")
    if set(result.parity) != set(cases):
        raise InputError(f"{path}: lacks what its kit measures; run the kit again")


def read_timings(
    path: Path, group: ResultGroup, work: Mapping[str, int], rounds: tuple[int, int]
) -> dict[str, Timing]:
    """Check the timings of a group.

    Args:
        path: the result, for errors.
        group: a group that was measured.
        work: FLOPs of all items that the kit measures, by name.
        rounds: least and greatest number of rounds of an item in the kit.

    Returns:
        The timings by name.

    Raises:
        InputError: a time is not of the kit, does not follow from its raw times, or is impossible.
    """
    anchor = float(group.anchor_reference or 0.0)
    if not MIN_ANCHOR_SECONDS <= anchor <= MAX_SECONDS:
        raise InputError(f"{path}: the reference product in {anchor:.3g} s is impossible")
    found = {}
    for name, value in group.timings.items():
        if name not in work:
            raise InputError(f"{path}: {' '.join(name.split())[:80]}: its kit does not measure that")
        found[name] = _checked(path, name, value, work[name], anchor)
        least, most = rounds
        if not least <= len(found[name].values) <= most:
            count = len(found[name].values)
            raise InputError(f"{path}: {name}: {count} rounds, its kit takes {least} to {most}")
    missing = [name for name in reference_work() if name not in found]
    if missing:
        raise InputError(f"{path}: lacks {missing[0]}, the reference work of a group")
    return found


def _checked(path: Path, name: str, value: JsonObject, flops: int, anchor: float) -> Timing:
    """A timing whose values follow from its raw times and are possible."""
    try:
        timing = Timing.from_json(value)
        wanted = np.divide(timing.raw, timing.anchors) * anchor
        follows = np.allclose(timing.values, wanted, rtol=RELATIVE_ROUNDING, atol=0)
    except (ValueError, TypeError, OverflowError, FloatingPointError) as error:
        raise InputError(f"{path}: {name}: {error}") from None
    if not follows or timing.name != name:
        raise InputError(f"{path}: {name}: its values do not follow from its raw times")
    least = min_plausible_seconds(flops, anchor)
    if timing.seconds > MAX_SECONDS:
        raise InputError(f"{path}: {name}: {timing.seconds:.3g} s is impossible, above {MAX_SECONDS:.0f} s")
    if timing.seconds < least:
        raise InputError(
            f"{path}: {name}: {timing.seconds:.3g} s is impossible, the device needs {least:.3g} s or more"
        )
    return timing
