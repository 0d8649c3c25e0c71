"""Claim: with a known device as prior, a new device's kernels are predicted from 20 or 50 measurements.

Measured latencies of Gated DeltaNet kernels on an H100 and an H200 (NVIDIA aiconfigurator). For each kernel,
some shapes are measured on the target device, selected by expected variance reduction or at random; all
others are the test set. The model is the op model of profiling. Comparisons: one scale factor between the
devices, and the same model without the prior.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import pandas as pd
from numpy.typing import NDArray

from latency.predictor.design import expected_variance_reduction
from latency.predictor.op_model import Observations, fit_op_model, kernel

Array = NDArray[np.float64]
FILES = {"H100": "gdn_h100_sxm.parquet", "H200": "gdn_h200_sxm.parquet"}
SHAPE = ["batch_size", "seq_len", "num_k_heads", "num_v_heads"]
GOALS = {20: 1.8, 50: 1.2}
WITHOUT = 5.0  # from 50 measurements, without a prior
PUBLISHED = {20: 1.9, 50: 1.3}  # a log-space Gaussian process with the known latency as a feature
NOISE, TESTED = 0.003, 500


def read(folder: Path) -> pd.DataFrame:
    """Return latencies of both devices by kernel and shape, without duplicate shapes."""
    try:
        tables = {name: pd.read_parquet(folder / file) for name, file in FILES.items()}
    except OSError as error:
        raise SystemExit(f"--data {folder}: {error}") from None
    columns = [t.groupby(["kernel_source", *SHAPE])["latency"].median().rename(n) for n, t in tables.items()]
    return pd.concat(columns, axis=1).dropna().reset_index()


def describe(rows: pd.DataFrame) -> tuple[Array, Array]:
    """Return features and work of kernels."""
    batch, length, keys, values = rows[SHAPE].to_numpy(np.float64).T
    sizes = np.log2(np.column_stack([batch, length, keys, values, batch * length, batch * values]))
    one = np.ones(len(rows))
    work = [one, length, batch * values, length * values, batch * length * keys, batch * length * values]
    return sizes, np.column_stack(work)


def observed(rows: pd.DataFrame, target: str, source: str | None) -> Observations:
    known = rows[source].to_numpy(np.float64) if source else None
    noise = np.full(len(rows), NOISE)
    return Observations(*describe(rows), rows[target].to_numpy(np.float64), noise, known)


def error(train: pd.DataFrame, test: pd.DataFrame, target: str, source: str | None) -> float:
    model, wanted = fit_op_model(observed(train, target, source)), observed(test, target, source)
    predicted = np.exp(model.predict(wanted.features, wanted.work, wanted.source)[0])
    return 100 * float(np.abs(predicted / wanted.seconds - 1).mean())


def scaled(train: pd.DataFrame, test: pd.DataFrame, target: str, source: str) -> float:
    """Return the error of one scale factor between the devices."""
    factor = float(np.median(train[target] / train[source]))
    return 100 * float(np.abs(factor * test[source] / test[target] - 1).mean())


def chosen(rows: pd.DataFrame, source: str, count: int) -> NDArray[np.int64]:
    """Select rows by expected variance reduction, before any measurement on the target."""
    inputs = np.column_stack([describe(rows)[0], np.log2(rows[source].to_numpy(np.float64))])
    covariance = np.asarray(kernel(inputs.shape[1])(inputs))
    one, all_free = np.ones(len(rows)), np.ones(len(rows), dtype=bool)
    found = expected_variance_reduction(covariance, np.eye(len(rows)), one * NOISE**2, one, count, all_free)
    return np.array(found)


def main() -> int:
    parser = outcome.options(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the two Parquet files")
    arguments = parser.parse_args()
    seeds = range(1 if arguments.quick else 5)
    table = read(arguments.data)
    found: dict[str, dict[str, float]] = {}
    for target, source in (("H200", "H100"), ("H100", "H200")):
        for name, rows in table.groupby("kernel_source"):
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
            key = f"{source} to {target}, {name}"
            found[key] = {how: float(np.mean(values)) for how, values in errors.items()}
            sys.stderr.write(f"{key}: { ({k: round(v, 2) for k, v in found[key].items()}) }\n")
    mean = {how: float(np.mean([row[how] for row in found.values()])) for how in next(iter(found.values()))}
    checks = {
        f"{count} chosen: {mean[f'chosen {count}']:.2f}% <= {goal}% (random {mean[f'random {count}']:.2f}%, "
        f"one scale factor {mean[f'scale {count}']:.0f}%)": mean[f"chosen {count}"] <= goal
        for count, goal in GOALS.items()
    }
    no_prior = mean[f"no prior {max(GOALS)}"]
    checks[f"{max(GOALS)} at random without a prior: {no_prior:.2f}% <= {WITHOUT}%"] = no_prior <= WITHOUT
    body: dict[str, Any] = {"mape_percent": found, "mean": mean, "published": PUBLISHED}
    return outcome.write("latency_transfer", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
