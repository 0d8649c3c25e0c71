"""Progress where there is no terminal, and tables."""

from dataclasses import replace

import pytest

from search.cli.output import Bars, ProgressLines, make_table, show
from search.cli.tables import front_tables, mixer_letters, short_description, short_keys
from search.engine.choice import LatencyPrediction, Prediction
from search.engine.front import Member
from space import Architecture, Layer


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_stage_has_a_line_at_its_start_each_tenth_and_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars().stage("search") as stage:
        for step in range(101):
            stage(step / 100, f"step {step}")
    expected = [f"search {10 * tenth}%: step {10 * tenth}" for tenth in range(1, 10)]
    assert lines(capsys) == ["search ...", *expected, "search done: step 100"]


def test_a_slow_stage_has_a_line_every_30_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    stage = ProgressLines("train", clock=lambda: now)
    for now in (10.0, 29.0, 31.0, 45.0, 62.0):
        stage(0.01, f"{now:.0f} s")
    stage.end()
    assert lines(capsys) == ["train ...", "train 1%: 31 s", "train 1%: 62 s", "train done: 62 s"]


def test_a_failed_stage_does_not_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="stop"), Bars().stage("train"):
        raise ValueError("stop")
    assert lines(capsys) == ["train ..."]


def test_a_stage_without_progress_has_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars().stage("verify"):
        pass
    assert lines(capsys) == ["verify ...", "verify done"]


def member(width: int) -> Member:
    architecture = Architecture(width, (Layer(mixer="gated_deltanet", ffn=1024, heads=8, kv_heads=4),) * 12)
    latency = {
        f"{phase}@1024": LatencyPrediction(latency_ms=12.345, upper_ms=14.0)
        for phase in ("prefill", "decode")
    }
    return Member(
        architecture=architecture,
        qualities={"loss": 1.23456, "recall_loss": 2.0},
        predicted=Prediction(params=123_456_789, latency={"laptop": latency}),
    )


def test_a_front_of_two_workloads_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    members = [member(256), member(512)]
    show({}, False, lambda: front_tables(members, {"fastest": members[0].key}))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for shown in (members[0].key[:6], members[1].key[:6], "1.2346", "12.345", "123,456,789", "fastest"):
        assert shown in printed  # on one line, not broken
    assert "256 | 12*g8:4.1024 " in printed  # of the picked member
    assert "(g gated_deltanet)" in printed


def test_architectures_of_many_layers_are_one_line_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    full = Layer(mixer="attention", heads=8, kv_heads=8, ffn=1024)
    local = Layer(mixer="sliding", heads=8, kv_heads=4, window=256, ffn=512)
    kinds = [
        full,
        local,
        Layer(mixer="none", ffn=64),
        Layer(mixer="none", ffn=0),
        Layer(mixer="mamba2", heads=4, kv_heads=4, ffn=0),
    ]
    layers = tuple(kinds[i % 5] for i in range(8))
    letters = mixer_letters([Architecture(128, layers)])
    assert letters == {"attention": "a", "mamba2": "m", "sliding": "s"}
    text = short_description(Architecture(128, layers), letters)
    assert text == "128 | a8.1024 s8:4@256.512 .64 - m4 a8.1024 s8:4@256.512 .64"
    made = replace(member(128), architecture=Architecture(128, layers))
    show({}, False, lambda: front_tables([made], {"knee": made.key, "best": made.key}))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert text in printed
    assert printed.count("knee") == 2  # in both tables
    assert printed.count("best") == 1


def test_letters_and_keys_are_unique_beginnings() -> None:
    kinds = ("mamba2", "gated_deltanet", "gla", "deltanet")
    layers = tuple(Layer(mixer=kind, heads=1, kv_heads=1, ffn=0) for kind in kinds)
    letters = mixer_letters([Architecture(16, layers)])
    assert letters == {"deltanet": "d", "gated_deltanet": "ga", "gla": "gl", "mamba2": "m"}
    assert short_keys(["0123456789ab", "0123450789ab"]) == {
        "0123456789ab": "0123456",
        "0123450789ab": "0123450",
    }
    assert short_keys(["0123456789ab"]) == {"0123456789ab": "012345"}
    assert short_keys([]) == {}


def test_square_brackets_in_a_table_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    show({}, False, lambda: [make_table("Title", ["column"], [["[bold]kept[/bold]"]])])
    assert "[bold]kept[/bold]" in capsys.readouterr().out
