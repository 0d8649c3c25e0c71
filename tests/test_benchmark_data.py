"""Tables that benchmarks of the latency model read, in small copies of their shape."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Run = Callable[..., int]


@pytest.fixture
def hat(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, with a model that needs no fit: the mean of the training rows."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("latency_hat")
    monkeypatch.setattr(
        module, "predicted", lambda part, train, known, rows: np.full(len(rows), known.mean())
    )
    return module


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, with a model that needs no fit: the latency of the source."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("latency_transfer")
    monkeypatch.setattr(
        module,
        "predicted",
        lambda train, rows, target, source: rows[source].to_numpy() if source else np.ones(len(rows)),
    )
    return module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A function that runs a benchmark's quick version on ``tmp_path`` and returns its exit code."""

    def started(module: ModuleType, *words: object, data: Path = tmp_path) -> int:
        options = ["--quick", "--data", data, "--out", tmp_path / "out", *words]
        monkeypatch.setattr(sys, "argv", [str(module.__file__), *map(str, options)])
        return int(module.outcome.ended(module.main))

    return started


def written(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / "out" / f"{name}-quick.json").read_text()))


def transformers(module: ModuleType, rows: int = 360) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({name: rng.uniform(1, 8, rows) for name in ("extra", *module.COLUMNS)})


def kernels(
    devices: tuple[str, ...], names: tuple[str, ...] = ("scan", "norm"), rows: int = 70
) -> pd.DataFrame:
    """A table with a column of latencies for each device, or one with a column ``latency``."""
    rng = np.random.default_rng(0)
    places = np.arange(rows * len(names))
    table = pd.DataFrame({"kernel_source": np.repeat(names, rows), "phase": "context"})
    table["batch_size"], table["seq_len"] = 1 + places % 7, 1 + places
    table["num_k_heads"] = table["num_v_heads"] = 16
    for name in devices:
        table[name] = rng.uniform(1.0, 2.0, len(table)) * 1e-3
    return table


def test_hat_reports_an_unknown_table_without_a_goal(
    hat: ModuleType, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers(hat).to_csv(tmp_path / "mine_gpu_all.csv", index=False)
    (tmp_path / "other.csv").write_text("not read")
    assert run(hat) == 0
    out = capsys.readouterr().out
    assert "no goal  n 50, mine_gpu_all: " in out
    assert "no goal  mine_gpu_all, drift modelled: " in out
    found = written(tmp_path, "latency_hat-other")
    assert found["goals"] == {}
    assert set(found["mape_percent"]) == {"50"}
    assert (
        found["mape_percent"]["50"].keys() == found["drift_modelled_mape_percent"].keys() == {"mine_gpu_all"}
    )


def test_hat_states_goals_of_its_four_tables_only(hat: ModuleType, run: Run, tmp_path: Path) -> None:
    for stem in (*hat.KNOWN, "mine_all"):
        transformers(hat).to_csv(tmp_path / f"{stem}.csv", index=False)
    assert run(hat) == 3  # a mean is a poor model
    found = written(tmp_path, "latency_hat")
    assert [goal.split(":")[0] for goal in found["goals"]] == [
        "n 50",
        "iwslt Titan Xp, drift modelled",
        "ende Raspberry Pi, drift modelled",
    ]
    assert set(found["drift_modelled_mape_percent"]) == {*hat.DRIFT_GOALS, "mine_all"}


def test_hat_reads_one_file_of_any_name(hat: ModuleType, tmp_path: Path) -> None:
    table = transformers(hat)
    table.to_csv(tmp_path / "mine.csv", index=False)
    (tmp_path / "broken_all.csv").write_text("")
    read = hat.read(tmp_path / "mine.csv")
    assert list(read) == ["mine"]
    pd.testing.assert_frame_equal(read["mine"], table[list(hat.COLUMNS)])


def without_latency(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns=["latency_mean_encoder", "latency_mean_decoder"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_latency, "no column latency_mean_encoder, latency_mean_decoder; needed: encoder_embed_dim"),
        (lambda table: table.head(349), "349 rows; at least 350 are needed"),
        (lambda table: table.head(0), "no rows"),
        (
            lambda table: table.assign(decoder_embed_dim=0),
            "decoder_embed_dim, row 1: 0 is not a number above 0",
        ),
        (
            lambda table: table.assign(decoder_layer_num=["3", "many", *["4"] * 358]),
            "decoder_layer_num, row 2: many is not a number above 0",
        ),
        (lambda table: table.shift(), "encoder_embed_dim, row 1: nan is not a number above 0"),
    ],
)
def test_hat_refuses_a_table(
    hat: ModuleType,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[pd.DataFrame], pd.DataFrame],
    message: str,
) -> None:
    path = tmp_path / "mine_all.csv"
    spoil(transformers(hat)).to_csv(path, index=False)
    assert run(hat) == 2
    assert capsys.readouterr().err.startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "No columns to parse from file"),
        (b"a,b\n1,2\n1,2,3\n", "Error tokenizing data."),
        (b"\xff\xfe\x00\x01", "'utf-8' codec can't decode"),
    ],
)
def test_hat_refuses_what_is_no_table(
    hat: ModuleType,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: bytes,
    message: str,
) -> None:
    path = tmp_path / "mine_all.csv"
    path.write_bytes(text)
    assert run(hat) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{path}: {message}")
    assert err.count("\n") == 1


def test_hat_refuses_rows_that_are_longer_than_the_header(
    hat: ModuleType, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine_all.csv"
    header, *lines = transformers(hat).to_csv(index=False).splitlines()
    path.write_text("\n".join([header, *(f"{line}," for line in lines)]))
    assert run(hat) == 2
    assert capsys.readouterr().err == f"{path}: rows have more values than the header has names\n"


@pytest.mark.parametrize("name", ["latency_hat", "latency_transfer"])
def test_folder_without_tables(
    name: str,
    hat: ModuleType,
    transfer: ModuleType,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, pattern = {"latency_hat": (hat, "*_all.csv"), "latency_transfer": (transfer, "*.parquet")}[name]
    assert run(module) == 2
    assert capsys.readouterr().err == f"--data {tmp_path}: holds no {pattern}\n"
    assert run(module, data=tmp_path / "none") == 2
    assert capsys.readouterr().err == f"--data {tmp_path / 'none'}: no such file or folder\n"


@pytest.mark.parametrize("name", ["latency_hat", "latency_transfer"])
def test_help_states_the_columns(
    name: str, hat: ModuleType, transfer: ModuleType, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    module = {"latency_hat": hat, "latency_transfer": transfer}[name]
    with pytest.raises(SystemExit, match="0"):
        run(module, "--help")
    out = capsys.readouterr().out
    columns = hat.COLUMNS if module is hat else ("kernel_source", *transfer.SHAPE, "latency_NAME", "device")
    assert [column for column in columns if column not in out] == []


def test_transfer_reports_all_pairs_of_unknown_devices(
    transfer: ModuleType, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels(("latency_A", "latency_B", "latency_C")).to_parquet(tmp_path / "any.parquet")
    assert run(transfer) == 0
    out = capsys.readouterr().out
    assert "no goal  A to B, norm: chosen 20 " in out
    found = written(tmp_path, "latency_transfer-other")
    assert found["goals"] == {}
    assert "mean" not in found
    assert list(found["mape_percent"]) == [
        f"{a} to {b}, {kernel}"
        for a, b in ("AB", "AC", "BA", "BC", "CA", "CB")
        for kernel in ("norm", "scan")
    ]


def test_transfer_takes_chosen_pairs_by_part_of_a_name(
    transfer: ModuleType, run: Run, tmp_path: Path
) -> None:
    kernels(("latency_New A", "latency_New B", "latency_Old C")).to_parquet(tmp_path / "any.parquet")
    words = ("--source", "c", "--target", "New A", "--source", "new b", "--target", "OLD")
    assert run(transfer, *words, data=tmp_path / "any.parquet") == 0
    found = written(tmp_path, "latency_transfer-other")
    assert {key.split(",")[0] for key in found["mape_percent"]} == {"Old C to New A", "New B to Old C"}


def test_transfer_states_goals_of_the_known_devices_only(
    transfer: ModuleType, run: Run, tmp_path: Path
) -> None:
    """The published form: a file for each device, which its column ``device`` names."""
    for device in (*transfer.KNOWN, "NVIDIA B200"):
        table = kernels(("latency",), (*transfer.KERNELS, "scan")).assign(device=device)
        pd.concat([table, table]).to_parquet(tmp_path / f"{device}.parquet")
    assert run(transfer) == 3  # without a prior, the model above is poor
    found = written(tmp_path, "latency_transfer")
    assert len(found["goals"]) == 3
    assert set(found["mean"]) == {
        f"{how} {count}" for how in ("chosen", "random", "scale") for count in (20, 50)
    } | {"no prior 50"}
    assert len(found["mape_percent"]) == 6 * 5


def test_transfer_reads_medians_and_gaps(transfer: ModuleType, tmp_path: Path) -> None:
    """Repeated shapes become their median; a missing latency is a shape that was not measured."""
    table = kernels(("latency",), ("scan",), 3)
    table["latency"] = [1.0, 2.0, np.nan]
    repeated = table.head(2).assign(latency=[3.0, 2.0])
    pd.concat([table, repeated]).to_parquet(tmp_path / "a.parquet")
    table.assign(latency=[5.0, 6.0, 7.0]).to_parquet(tmp_path / "b.parquet")
    read = transfer.read(tmp_path)
    assert read["seq_len"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(read["a"], [2.0, 2.0, np.nan])
    np.testing.assert_array_equal(read["b"], [5.0, 6.0, 7.0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--source", "A"), "1 --source, but 0 --target: give as many of both"),
        (("--source", "A", "--target", "X"), "--target X: no such device; devices: A, B1, B2"),
        (("--source", "A", "--target", "b"), "--target b: fits B1 and B2; devices: A, B1, B2"),
        (("--source", "A", "--target", "a"), "--source A --target a: the same device, A"),
    ],
)
def test_transfer_refuses_a_pair(
    transfer: ModuleType,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    kernels(("latency_A", "latency_B1", "latency_B2")).to_parquet(tmp_path / "any.parquet")
    assert run(transfer, *words) == 2
    assert capsys.readouterr().err == f"{message}\n"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda table: table.drop(columns="kernel_source"), "no column kernel_source; needed: "),
        (lambda table: table.drop(columns=["latency_A", "latency_B"]), "no column latency or latency_NAME"),
        (lambda table: table.assign(latency_B=-1.0), "latency_B, row 1: -1.0 is not a number above 0"),
        (
            lambda table: table.assign(latency_B=[[1]] * len(table)),
            "latency_B, row 1: [1] is not a number above 0",
        ),
        (lambda table: table.assign(seq_len="long"), "seq_len, row 1: long is not a number above 0"),
        (lambda table: table.assign(kernel_source=None), "kernel_source, row 1: no value"),
        (lambda table: table.assign(latency=1.0, device=None), "device, row 1: no value"),
    ],
)
def test_transfer_refuses_a_table(
    transfer: ModuleType,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[pd.DataFrame], pd.DataFrame],
    message: str,
) -> None:
    path = tmp_path / "any.parquet"
    spoil(kernels(("latency_A", "latency_B"))).to_parquet(path)
    assert run(transfer) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{path}: {message}")
    assert err.count("\n") == 1


def test_transfer_refuses_data_without_a_pair(
    transfer: ModuleType, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "any.parquet"
    path.write_bytes(b"text")
    assert run(transfer) == 2
    assert capsys.readouterr().err.startswith(f"{path}: ")
    kernels(("latency",)).to_parquet(path)
    assert run(transfer) == 2
    assert capsys.readouterr().err == "--data: latencies of one device only, any; two are needed\n"
    kernels(("latency_A", "latency_B"), rows=59).to_parquet(path)
    assert run(transfer) == 2
    err = capsys.readouterr().err
    assert "A to B, scan: left out, 59 shapes on both\n" in err
    assert err.endswith(f"--data {tmp_path}: no pair of devices has a kernel with 60 shapes on both\n")


def test_models_fit_and_predict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions that the other tests replace: a latency that is one term of the work is predicted."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    hat, transfer = (importlib.import_module(name) for name in ("latency_hat", "latency_transfer"))
    rows = transformers(hat, 60)
    width, ffn = rows["encoder_embed_dim"].to_numpy(), rows["encoder_ffn_embed_dim_avg"].to_numpy()
    found = hat.predicted("encoder", rows.head(50), (width * ffn)[:50], rows.tail(10))
    np.testing.assert_allclose(found, (width * ffn)[50:], rtol=0.02)
    table = kernels(("A",), ("scan",), 60)
    table["B"] = 2 * table["A"]
    found = transfer.predicted(table.head(50), table.tail(10), "B", "A")
    np.testing.assert_allclose(found, table["B"].tail(10), rtol=0.02)
