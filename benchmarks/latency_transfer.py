"""Claim: with a known device as prior, a new device's kernels are predicted from 20 or 50 measurements.

Measured latencies of Gated DeltaNet kernels on an H100 and an H200 (NVIDIA aiconfigurator). For each kernel,
some shapes are measured on the target device, selected by expected variance reduction or at random; all
others are the test set. The model is the op model of profiling. Comparisons: one scale factor between the
devices, and the same model without the prior.

Every ``*.parquet`` of the folder ``--data`` is read, or one Parquet file. Goals and published errors belong
to the four kernels and two devices above; other kernels and devices are reported without a goal. Without all
of the former, the result file is latency_transfer-other.json. A table has a row for each measurement, and
these columns; others are ignored:

    kernel_source
        name of the kernel
    batch_size, seq_len, num_k_heads, num_v_heads
        shape: numbers above 0
    latency
        time on the row's device in any unit, above 0 or missing. The name of the device is in the column
        "device"; without that column, it is the name of the file
    latency_NAME, instead of latency
        the same for the device NAME: a column for each device

Rows of the same kernel, shape and device, of all files, are replaced by their median. Devices are chosen by
``--source`` and ``--target``, each a name or a part of only one name, in any case; a pair is a --source and
the --target at the same place. Kernels with fewer than 60 shapes on both devices are left out. Of more than
5000 shapes, 5000 at random are used.
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import measured
import numpy as np
import outcome
import pandas as pd
from numpy.typing import NDArray

from latency.predictor.design import expected_variance_reduction
from latency.predictor.op_model import Observations, Ops, fit_op_model, kernel
from space import InputError

Array = NDArray[np.float64]
KNOWN = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200"}  # the names in the tables
KERNELS = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_gated_delta_rule_flashinfer",
    "fused_recurrent_gated_delta_rule_packed_decode",
)
SHAPE = ["batch_size", "seq_len", "num_k_heads", "num_v_heads"]
GOALS = {20: 1.8, 50: 1.2}
WITHOUT = 5.0  # from 50 measurements, without a prior
PUBLISHED = {20: 1.9, 50: 1.3}  # a log-space Gaussian process with the known latency as a feature
NOISE, TESTED = 0.003, 500
LEAST, MOST = 60, 5000  # shapes of a kernel


def read(data: Path) -> pd.DataFrame:
    """Return a row for each kernel and shape, with a column for each device; NaN if not measured."""
    parts = [part for path in measured.files(data, "*.parquet") for part in read_file(path)]
    rows = pd.concat(parts).dropna(subset="latency")
    if rows.empty:
        raise InputError(f"--data {data}: no latencies")
    shapes = rows.groupby(["kernel_source", *SHAPE, "device"])["latency"].median()
    return shapes.unstack("device").sort_index().reset_index()


def read_file(path: Path) -> list[pd.DataFrame]:
    """Return the measurements of a file, a table for each column of latencies."""
    needed = ["kernel_source", *SHAPE]
    rows = measured.read(path, lambda file: pd.read_parquet(file).reset_index(), needed)
    shape = {name: measured.above_zero(path, rows, name) for name in SHAPE}
    columns: dict[str, pd.Series[str] | str]
    if "latency" in rows:
        own = measured.names(path, rows, "device").replace(KNOWN) if "device" in rows else path.stem
        columns = {"latency": own}
    else:
        headers = [str(name) for name in rows.columns]
        columns = {name: name.removeprefix("latency_") for name in headers if name.startswith("latency_")}
    if not columns:
        raise InputError(f"{path}: no column latency or latency_NAME")
    return [
        pd.DataFrame(
            {
                "kernel_source": measured.names(path, rows, "kernel_source"),
                **shape,
                "device": devices,
                "latency": measured.above_zero(path, rows, name, gaps=True),
            }
        )
        for name, devices in columns.items()
    ]


def named(option: str, text: str, devices: Sequence[str]) -> str:
    """Return the device that an option names, or names a part of."""
    alike = [text] if text in devices else [name for name in devices if text.lower() in name.lower()]
    if len(alike) != 1:
        problem = "fits " + " and ".join(alike) if alike else "no such device"
        raise InputError(f"{option} {text}: {problem}; devices: {', '.join(devices)}")
    return alike[0]


def pairs(devices: Sequence[str], sources: Sequence[str], targets: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of source and target; all ordered pairs if none is chosen.

    Args:
        devices: names of all devices.
        sources: values of --source.
        targets: values of --target, as many.
    """
    if len(sources) != len(targets):
        raise InputError(f"{len(sources)} --source, but {len(targets)} --target: give as many of both")
    if not sources:
        if len(devices) < 2:
            raise InputError(f"--data: latencies of one device only, {devices[0]}; two are needed")
        return list(permutations(devices, 2))
    found = []
    for source, target in zip(sources, targets, strict=True):
        pair = named("--source", source, devices), named("--target", target, devices)
        if pair[0] == pair[1]:
            raise InputError(f"--source {source} --target {target}: the same device, {pair[0]}")
        found.append(pair)
    return list(dict.fromkeys(found))


def shared(table: pd.DataFrame, source: str, target: str) -> dict[str, pd.DataFrame]:
    """Return for each kernel the shapes that were measured on both devices, if there are enough."""
    both = table.dropna(subset=[source, target]).reset_index(drop=True)
    found = {}
    for name, rows in both.groupby("kernel_source"):
        if len(rows) < LEAST:
            sys.stderr.write(f"{source} to {target}, {name}: left out, {len(rows)} shapes on both\n")
        else:
            found[str(name)] = rows.sample(MOST, random_state=0).sort_index() if len(rows) > MOST else rows
    return found


def describe(rows: pd.DataFrame) -> tuple[Array, Array]:
    """Return features and work of kernels."""
    batch, length, keys, values = rows[SHAPE].to_numpy(np.float64).T
    sizes = np.log2(np.column_stack([batch, length, keys, values, batch * length, batch * values]))
    one = np.ones(len(rows))
    work = [one, length, batch * values, length * values, batch * length * keys, batch * length * values]
    return sizes, np.column_stack(work)


def predicted(train: pd.DataFrame, rows: pd.DataFrame, target: str, source: str | None) -> Array:
    """Return predicted latencies of rows on the target, by the op model of the training rows."""
    known, given = ((t[source].to_numpy(np.float64) if source else None) for t in (train, rows))
    noise = np.full(len(train), NOISE)
    seen = Observations.of_ops(Ops(*describe(train), known), train[target].to_numpy(np.float64), noise)
    return np.exp(fit_op_model(seen).log_seconds({"op": Ops(*describe(rows), given)}))


def covariance(inputs: Array) -> Array:
    """Return the op model's covariance between rows before it is fitted."""
    return np.asarray(kernel(inputs.shape[1])(inputs))


def error(train: pd.DataFrame, test: pd.DataFrame, target: str, source: str | None) -> float:
    wanted = test[target].to_numpy(np.float64)
    return 100 * float(np.abs(predicted(train, test, target, source) / wanted - 1).mean())


def scaled(train: pd.DataFrame, test: pd.DataFrame, target: str, source: str) -> float:
    """Return the error of one scale factor between the devices."""
    factor = float(np.median(train[target] / train[source]))
    return 100 * float(np.abs(factor * test[source] / test[target] - 1).mean())


def chosen(rows: pd.DataFrame, source: str, count: int) -> NDArray[np.int64]:
    """Select rows by expected variance reduction, before any measurement on the target."""
    inputs = np.column_stack([describe(rows)[0], np.log2(rows[source].to_numpy(np.float64))])
    one, all_free = np.ones(len(rows)), np.ones(len(rows), dtype=bool)
    found = expected_variance_reduction([covariance(inputs)], [one * NOISE**2], one, count, all_free)
    return np.array(found)


def compared(rows: pd.DataFrame, source: str, target: str, seeds: range) -> dict[str, float]:
    """Return the errors of one kernel by method and number of measurements."""
    errors: dict[str, list[float]] = {}
    for count in GOALS:
        picks = [("chosen", chosen(rows, source, count))]
        picks += [("random", np.random.RandomState(s).permutation(len(rows))[:count]) for s in seeds]
        for how, places in picks:
            train, test = rows.iloc[places], rows.drop(index=rows.index[places])
            test = test.sample(min(TESTED, len(test)), random_state=0)
            errors.setdefault(f"{how} {count}", []).append(error(train, test, target, source))
            errors.setdefault(f"scale {count}", []).append(scaled(train, test, target, source))
            if count == max(GOALS) and how == "random":
                errors.setdefault(f"no prior {count}", []).append(error(train, test, target, None))
    return {how: float(np.mean(values)) for how, values in errors.items()}


def goals(mean: Mapping[str, float]) -> dict[str, bool]:
    """Return the goals, with whether they were reached.

    Args:
        mean: errors over the known kernels and devices, by method and number of measurements.
    """
    checks = {
        f"{count} chosen: {mean[f'chosen {count}']:.2f}% <= {goal}% (random {mean[f'random {count}']:.2f}%, "
        f"one scale factor {mean[f'scale {count}']:.0f}%)": mean[f"chosen {count}"] <= goal
        for count, goal in GOALS.items()
    }
    no_prior = mean[f"no prior {max(GOALS)}"]
    checks[f"{max(GOALS)} at random without a prior: {no_prior:.2f}% <= {WITHOUT}%"] = no_prior <= WITHOUT
    return checks


def main() -> int:
    parser = outcome.options(__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of *.parquet, or one Parquet file, with the columns above",
    )
    parser.add_argument("--source", action="append", default=[], help="known device; may be repeated")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        help="device to predict, for each --source; default: all ordered pairs of devices",
    )
    arguments = parser.parse_args()
    seeds = range(1 if arguments.quick else 5)
    table = read(arguments.data)
    devices = [str(name) for name in table.columns if name not in ("kernel_source", *SHAPE)]
    found: dict[str, dict[str, float]] = {}
    for source, target in pairs(devices, arguments.source, arguments.target):
        for name, rows in shared(table, source, target).items():
            key = f"{source} to {target}, {name}"
            found[key] = compared(rows, source, target, seeds)
            sys.stderr.write(f"{key}: { ({k: round(v, 2) for k, v in found[key].items()}) }\n")
    if not found:
        raise InputError(
            f"--data {arguments.data}: no pair of devices has a kernel with {LEAST} shapes on both"
        )
    known = [f"{a} to {b}, {name}" for a, b in permutations(KNOWN.values(), 2) for name in KERNELS]
    body: dict[str, Any] = {"mape_percent": found}
    checks = {}
    if complete := all(key in found for key in known):
        body["mean"] = {how: float(np.mean([found[key][how] for key in known])) for how in found[known[0]]}
        checks = goals(body["mean"])
    reports = [
        f"{key}: {', '.join(f'{how} {error:.2f}%' for how, error in errors.items())}"
        for key, errors in found.items()
        if not complete or key not in known
    ]
    name = "latency_transfer" if complete else "latency_transfer-other"
    return outcome.write(name, arguments, {**body, "published": PUBLISHED}, checks, reports)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
