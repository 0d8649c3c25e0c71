"""The Optuna study equals the record, and optuna-dashboard opens it."""

import io
import json
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest

from search.config import load_run_config
from search.engine.evaluations import EVALUATIONS, genomes_of
from search.engine.optuna_study import open_projection, summary_params
from space import InputError, genome
from space.io.parquet import read_table


def objectives_of(folder: Path) -> list[str]:
    return list(json.loads((folder / "front.json").read_text())["objectives"])


@pytest.fixture
def folder(run_folder: Path) -> Path:
    return run_folder / "run" / "searches" / "desk"


def asked(app: Any, path: str) -> Any:
    """The answer of the dashboard's server to a GET."""
    environ: dict[str, Any] = {"PATH_INFO": path, "wsgi.input": io.BytesIO()}
    setup_testing_defaults(environ)
    said: list[str] = []
    body = b"".join(app(environ, lambda status, *_: said.append(status)))
    assert said[0].startswith("200"), (path, said[0], body[:300])
    return body


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_dashboard_opens_the_study_and_draws_its_plots(folder: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    app = dashboard.wsgi(JournalStorage(JournalFileBackend(str(folder / "study.log"))))
    studies = json.loads(asked(app, "/api/studies"))["study_summaries"]
    assert [study["study_name"] for study in studies] == ["desk"]
    number = studies[0]["study_id"]
    detail = json.loads(asked(app, f"/api/studies/{number}"))
    assert len(detail["trials"]) == 32
    assert "latency:prefill@64" in json.dumps(detail)
    assert {item["name"] for item in detail["union_search_space"]} == {
        "width", "depth", "full_layers", "linear_layers", "linear_kind", "heads", "ffn"
    }  # fmt: skip
    # The importance of parameters for the predicted latency: it is made of them, so they explain it.
    latency = json.loads(asked(app, f"/api/studies/{number}/param_importances"))["param_importances"][1]
    weights = {item["name"]: item["importance"] for item in latency}
    assert sum(weights.values()) == pytest.approx(1, abs=0.01)
    assert max(weights, key=weights.__getitem__) in (
        "width",
        "depth",
        "heads",
        "ffn",
        "linear_layers",
        "full_layers",
    )
    for plot in ("contour", "slice", "edf", "rank"):
        drawn = json.loads(asked(app, f"/api/studies/{number}/plot/{plot}"))
        assert drawn["data"], plot


def test_trials_equal_the_record(folder: Path, run_folder: Path) -> None:
    space = load_run_config(run_folder / "run" / "config.yaml").space
    study = open_projection(folder / "study.log", "desk", objectives_of(folder), space.hash).study
    part, _ = read_table(folder / "evaluations" / "part-0001.parquet", EVALUATIONS)
    trials = study.get_trials()[8:16]
    for trial, row, architecture in zip(
        trials, part.to_dict("records"), genome.decode(space, genomes_of(part)), strict=True
    ):
        assert trial.user_attrs["genome"] == row["genome"].tolist()
        assert trial.user_attrs["key"] == row["key"] == architecture.key
        assert trial.values == [row["loss"], row["latency:prefill@64"]]
        assert trial.params == summary_params(space, architecture)
        present = [layer for layer in architecture.layers if layer.present]
        assert trial.params["depth"] == len(present)
        assert trial.params["ffn"] == sum(layer.ffn for layer in present)


def test_study_of_another_space_or_other_objectives_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="made for space"):
        open_projection(folder / "study.log", "desk", objectives_of(folder), "0" * 64)
    with pytest.raises(InputError, match="objectives are"):
        open_projection(folder / "study.log", "desk", ["loss", "params"], "0" * 64)


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"[]",
        b"7",
        b'{"op_code": 99, "worker_id": "x"}',
        b'{"op_code": 4, "worker_id": "x"}',
        b'{"op_code": "a", "worker_id": 3}',
    ],
)
def test_a_journal_with_a_line_that_is_no_record_is_made_again(
    line: bytes, folder: Path, run_folder: Path
) -> None:
    objectives, space = objectives_of(folder), load_run_config(run_folder / "run" / "config.yaml").space
    path = folder / "study.log"
    count = open_projection(path, "desk", objectives, space.hash).count
    assert count > 0
    lines = path.read_bytes().splitlines(keepends=True)
    for place in (1, len(lines) // 2, len(lines)):
        path.write_bytes(b"".join([*lines[:place], line + b"\n", *lines[place:]]))
        again = open_projection(path, "desk", objectives, space.hash)
        assert 0 <= again.count <= count  # those that lack are added from the record
        assert open_projection(path, "desk", objectives, space.hash).count == again.count
