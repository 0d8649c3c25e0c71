"""The report: self-contained, drawn in a real browser, and readable on a phone."""

import html
import json
import re
import shutil
import struct
import subprocess
from contextlib import suppress
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from search.config import Run, load_run_config
from search.engine.front import FailedEvaluation, Front
from search.pipeline import execute
from search.report.figures import MAX_DRAWN_MEMBERS, thinned
from search.report.front_figure import above_points, axis_of, limit_of, picked_members, rescoring_shift
from search.report.history import evaluations, first_to_reach, progress, volume, volumes
from search.report.images import write_images
from search.report.page import architecture_kind, figures, headline, limits_in_words, write_report
from search.report.summary import Summary
from space import Architecture, InputError, LimitMissedError
from tests.conftest import Program, Quiet
from tests.search.records import limit_result, make_member

PHONE = 390  # pixels across
FIGURES = ["front", "layers", "prediction", "progress"]


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")
    return str(found)


@pytest.fixture(scope="session")
def reported(finished_run: Path, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run``, finished to its report, random search beside it, and ``devices``."""
    folder = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("reported") / "copy"))
    config = load_run_config(config_file)
    config = config.model_copy(update={"search": config.search.model_copy(update={"baseline": "random"})})
    run = Run(folder / "run", config, folder / "devices")
    run.save_config()
    with suppress(LimitMissedError):  # so small a run may miss: the report says so
        execute(run, Quiet())
    return folder


def artefacts(folder: Path) -> tuple[Run, Front, Summary, Path]:
    """The run, its front and summary, and the folder of its search."""
    run = Run(folder / "run", load_run_config(folder / "run" / "config.yaml"), folder / "devices")
    record = run.folder / "searches" / "desk"
    return run, Front.read(record / "front.json"), Summary.read(run.folder / "summary.json"), record


class Page(HTMLParser):
    """Files that a page loads, and its text outside of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.inside: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(v) for name, v in attrs if name in ("src", "href", "data", "action", "srcset")]
        self.ids += [str(v) for name, v in attrs if name == "id"]
        if tag in ("script", "style"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.words.append(data)


def test_page_is_self_contained_and_complete(reported: Path) -> None:
    _, front, summary, record = artefacts(reported)
    source = (record / "report.html").read_text()
    page = Page(source)
    assert page.links == []
    assert "@import" not in source.split("</style>")[0]
    assert "url(" not in source.split("</style>")[0]
    assert source.count("plotly.js v") == 1
    assert [i for i in page.ids if i.startswith("figure-")] == [f"figure-{name}" for name in FIGURES]
    assert headline(front, summary) in html.unescape(source)
    for item in summary.limits:
        assert item.bounded.text in page.text
        assert item.status in page.text
    for value in summary.verified.values():
        assert value.key in page.text
    assert f"Strategy {front.strategy}" in page.text
    assert f"{front.evaluations} evaluations, 0 failed" in page.text
    assert "random search has" in page.text
    assert not re.search(r"[{}]|\bnan\b|\bNone\b", page.text)
    for workload in summary.predictor:
        assert workload in page.text


def test_report_without_evaluations_and_with_failures(reported: Path, tmp_path: Path) -> None:
    from latency import load_card

    run, front, summary, _ = artefacts(reported)
    old = replace(front, failed=(), surrogate={}, strategy="unknown", objectives=("loss",))
    path = tmp_path / "elsewhere" / "report.html"
    write_report(path, run.space, old, summary, load_card(run.devices, "desk"), "<p>the end</p>")
    page = Page(path.read_text())
    assert "the end" in page.text
    assert "figure-progress" not in page.ids
    failing = replace(front, failed=(FailedEvaluation(key="0", reason="out of <memory>"),) * 2)
    write_report(path, run.space, failing, summary, load_card(run.devices, "desk"), record=tmp_path)
    assert "2 failed with: out of <memory>" in Page(path.read_text()).text


@pytest.mark.parametrize(
    ("objectives", "title", "progressed"),
    [
        (["loss"], "latency, ms", True),
        (["recall_loss", "params"], "parameters, millions", False),
        (["loss", "memory:prefill@64", "latency:prefill@64"], "memory at prefill@64, MiB", False),
        (["loss", "desk:latency:decode@64"], "decode@64 latency, ms", False),
    ],
)
def test_axes_of_other_objectives(
    reported: Path, objectives: list[str], title: str, progressed: bool
) -> None:
    run, front, summary, record = artefacts(reported)
    documents = [front.to_json(), summary.document()]
    recalled = json.dumps(documents).replace('"recall_loss_nats": null', '"recall_loss_nats": 1.5')
    front_value, summary_value = json.loads(recalled)
    front = replace(Front.from_json(front_value), objectives=tuple(objectives))
    drawn = {d.name: d.figure for d in figures(run.space, front, Summary.from_json(summary_value), record)}
    assert drawn["front"].layout.xaxis.title.text.endswith(title)
    assert ("progress" in drawn) == progressed


# A script that goes into a page, and tells the page around it what became of the figures.
SPY = """<script>
var errors = [];
window.addEventListener("error", function (e) { errors.push(String(e.message)); }, true);
window.addEventListener("unhandledrejection", function (e) { errors.push(String(e.reason)); });
var warn = console.error; console.error = function () { errors.push(Array.from(arguments).join(" ")); };
window.addEventListener("load", function () { setTimeout(function () {
  var figures = {};
  document.querySelectorAll(".plotly-graph-div").forEach(function (div) {
    var box = div.getBoundingClientRect();
    figures[div.id] = {svgs: div.querySelectorAll(".main-svg").length, width: box.width, height: box.height,
      traces: div.querySelectorAll(".trace, .bars .point").length, given: (div.data || []).length};
  });
  var root = document.documentElement;
  parent.postMessage({width: window.innerWidth, scroll: root.scrollWidth, client: root.clientWidth,
    body: document.body.scrollWidth, errors: errors, figures: figures}, "*");
}, 1500); });
</script>"""


def look_at(page: Path, folder: Path, widths: list[int]) -> dict[int, dict[str, Any]]:
    """A page in a browser at some widths.

    In frames, since a window of a headless Chrome is never as narrow as a phone.
    """
    spied = folder / "spied.html"
    spied.write_text(page.read_text().replace("<head>", f"<head>{SPY}", 1))
    frames = "".join(f'<iframe src="spied.html" style="width:{w}px;height:900px"></iframe>' for w in widths)
    outer = folder / "outer.html"
    outer.write_text(
        "<!doctype html><body><script>window.addEventListener('message', function (e) {"
        "var p = document.createElement('pre'); p.className = 'found';"
        "p.textContent = JSON.stringify(e.data); document.body.appendChild(p); });</script>"
        f"{frames}</body>"
    )
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=20000", "--dump-dom", outer.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = [json.loads(html.unescape(t)) for t in re.findall(r'<pre class="found">(.*?)</pre>', done.stdout)]
    return {int(one["width"]): one for one in found}


def test_browser_draws_the_page_without_sideways_scrolling(reported: Path, tmp_path: Path) -> None:
    browser()
    run, front, summary, record = artefacts(reported)
    given = {f"figure-{d.name}": len(d.figure.data) for d in figures(run.space, front, summary, record)}
    found = look_at(record / "report.html", tmp_path, [PHONE, 1200])
    assert sorted(found) == [PHONE, 1200]
    for width, seen in found.items():
        assert seen["errors"] == []
        assert seen["scroll"] <= seen["client"] <= width
        assert seen["body"] <= seen["client"]
        assert set(seen["figures"]) == set(given)
        for name, figure in seen["figures"].items():
            assert figure["svgs"] >= 2, name
            assert figure["given"] == given[name]
            assert figure["traces"] >= given[name], name
            assert 0.8 * min(width, 900) < figure["width"] <= width
            assert figure["height"] > 100


def test_figures_are_written_as_images(reported: Path, tmp_path: Path, formfit: Program) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed")
    browser()
    done = formfit(
        "--devices", reported / "devices", "report", reported / "run", "--png", tmp_path / "png", "--json"
    )
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert [Path(p).stem for p in value["images"]] == FIGURES
    for path in map(Path, value["images"]):
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width == 2400
        assert 300 < height < 4000
        assert len(data) > 20_000


def test_without_kaleido_images_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("search.report.images.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"kaleido is not installed; `pip install 'formfit\[report\]'`"):
        write_images(tmp_path, [])


def test_without_a_browser_images_are_refused(
    reported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, formfit: Program
) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nothing"))
    done = formfit("--devices", reported / "devices", "report", reported / "run", "--png", tmp_path / "png")
    assert done.returncode == 2
    assert "no Chrome or Chromium was found" in done.stderr
    assert done.stderr.count("\n") == 1


# What the figures are made of.


def test_hypervolume_increases_to_the_total(reported: Path) -> None:
    _, front, _, record = artefacts(reported)
    tables = {"search": evaluations(record), "random": evaluations(record / "random")}
    assert len(tables["search"]) == front.evaluations
    found = progress(tables, front.objectives)
    for counts, shares in found.lines.values():
        assert counts[0] == 1
        assert counts == sorted(set(counts))
        assert np.all(np.diff(shares) >= 0)
        assert shares[-1] <= 100 + 1e-9
    both = progress({"search": pd.concat(tables.values())}, front.objectives)
    assert both.lines["search"][1][-1] == pytest.approx(100)


def test_volumes_equal_those_of_every_prefix() -> None:
    rng = np.random.default_rng(0)
    for objectives in (1, 2, 3):
        values = rng.random((40, objectives)).round(1)
        values[rng.integers(0, 40, 4)] = np.nan
        counts = np.array([1, 2, 7, 20, 40])
        assert volumes(values, counts) == pytest.approx([volume(values[:n]) for n in counts])
        for wanted in (0.01, volume(values[:9]), volume(values)):
            first = next(n for n in range(1, 41) if volume(values[:n]) >= wanted)
            assert first_to_reach(values, wanted) == first
        assert first_to_reach(values, 1.1) is None


def test_progress_by_hand() -> None:
    mine = pd.DataFrame({"a": [1.0, 0.5, 0.0], "b": [1.0, 0.5, 0.25]})
    rival = pd.DataFrame({"a": [np.nan, 0.5], "b": [0.0, 0.0]})
    found = progress({"search": mine, "random": rival}, ["a", "b"])
    # The union holds (0.5, 0) and (0, 0.25): 0.5 + 0.5 * 0.75; the rival alone 0.5, mine 0, 0.25, 0.75.
    assert found.lines["search"][1] == pytest.approx([0, 100 * 0.25 / 0.875, 100 * 0.75 / 0.875])
    assert found.lines["random"][1] == pytest.approx([0, 100 * 0.5 / 0.875])
    assert found.matched == 3
    assert progress({"search": mine[:0], "random": rival[:0]}, ["a"]).lines == {}
    assert progress({"search": mine[:1]}, ["a", "b"]).lines == {"search": ([1], [100])}  # all are alike
    ends = pd.DataFrame({"a": [0.0, 1.0], "b": [1.0, 0.0]})  # neither is better than the worst of both
    assert progress({"search": ends}, ["a", "b"]).lines == {}


def test_architecture_and_limits_in_words() -> None:
    layers: list[dict[str, Any]] = [
        {"mixer": "gated_deltanet", "heads": 2, "kv_heads": 2, "ffn": 64},
        {"mixer": "none", "ffn": 0},
        {"mixer": "attention", "heads": 2, "kv_heads": 2, "ffn": 0},
        {"mixer": "gated_deltanet", "heads": 2, "kv_heads": 2, "ffn": 64},
    ]
    both = Architecture.from_json({"width": 16, "layers": layers})
    assert architecture_kind(both) == "gated_deltanet/attention hybrid"
    assert (
        architecture_kind(Architecture.from_json({"width": 16, "layers": layers[2:3]})) == "attention model"
    )
    limits = [limit_result("params<=5M", 5e6, 1e6), limit_result("rss@64<=1GiB", 2.0**30, None)]
    assert limits_in_words([]) == "under no limits"
    assert limits_in_words(limits[:1]) == "keeps its limit"
    assert limits_in_words(limits[:1] * 2) == "keeps both limits"
    assert limits_in_words(limits[:1] * 3) == "keeps all 3 limits"
    assert limits_in_words(limits) == "rss@64<=1GiB not measured"
    missed = limit_result("decode@64<=1ms", 1e-3, 2e-3)
    assert limits_in_words([*limits, missed]) == "misses decode@64<=1ms"


def test_parts_of_the_front(reported: Path) -> None:
    _, front, summary, _ = artefacts(reported)
    axis = axis_of(front)
    found = limit_of(front, axis)
    item = next(i for i in front.limits if i.text.startswith("prefill"))
    assert found == (item.text, pytest.approx(1e3 * item.bound))
    assert limit_of(front, axis._replace(device="elsewhere")) is None
    picks = picked_members(summary)
    assert {v.key for v in picks.values()} == {
        summary.chosen.key,
        *(v.key for v in summary.verified.values()),
    }
    members = [make_member(1, 1.5), make_member(2, 2.75), make_member(3, 7.0)]
    keys = [members[i].key for i in (1, 0, 0)]
    table = pd.DataFrame({"key": keys, "loss": [2.0, 1.0, 9.0]})
    assert rescoring_shift(members, table, "loss") == pytest.approx(0.625)
    assert rescoring_shift(members, table[:0][["key"]], "loss") == 0
    points = np.array([[3.0, 1.0], [1.0, 3.0], [3.0, 1.01], [2.0, 2.0]])
    assert above_points(*points.T) == [False, True, True, False]
    many = [make_member(i) for i in range(200)]
    drawn = [m.key for m in thinned(many, {many[77].key: "knee"})]
    assert len(drawn) in (MAX_DRAWN_MEMBERS, MAX_DRAWN_MEMBERS + 1)
    assert {many[i].key for i in (0, 77, 199)} <= set(drawn)
