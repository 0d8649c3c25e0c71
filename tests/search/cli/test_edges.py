"""Edges of the command line: names, terminals, encodings, disks, interrupts; each error is one line."""

import ast
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from search.cli.output import MAX_LINE_CHARACTERS, printable
from tests.conftest import Program
from tests.search.cli.test_startup import ROOT, SPACE, run

MODULE = (sys.executable, "-m", "formfit")
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202eevil\r"


def program(folder: Path, *words: object, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [*MODULE, *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        check=False,
    )


NAMES = ["../../evil", "/tmp/evil", "x" * 300, ".", "a b", "a\x1b[2J"]  # noqa: S108 - nothing is written there
NAMED = [
    ["profile", "--space", str(SPACE), "--device", "NAME"],
    ["profile", "--space", str(SPACE), "--device", "here", "--prior", "NAME"],
    ["profile", "--space", str(SPACE), "--device", "NAME", "--make-kit", "kit.zip"],
    ["search", "--run", "run", "--device", "NAME"],
    ["search", "--run", "run", "--device", "here", "--name", "NAME"],
    ["search", "--run", "run", "--device", "here", "--limit", "NAME:decode@64<=1ms"],
    ["search", "--run", "run", "--device", "here", "--objective", "NAME:latency:decode@64"],
    ["devices", "NAME"],
    ["run", "NAME.yaml", "--dry-run"],
]


def test_a_name_is_checked_before_it_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    config = {"space": yaml.safe_load(SPACE.read_text()), "device": "here"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    commands = []
    for number, name in enumerate(NAMES):
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump({**config, "device": name}))
        for words in NAMED:
            given = [word.replace("NAME.yaml", f"{number}.yaml") for word in words]
            commands.append([word.replace("NAME", name) for word in given])
    before = sorted(tmp_path.rglob("*"))
    for words, (code, out, err, _) in zip(commands, run(tmp_path, commands), strict=True):
        assert (code, out, err.count("\n")) == (2, "", 1), (words, err)
        assert len(err) < 700, words
        assert err.rstrip("\n").isprintable(), words
    assert sorted(tmp_path.rglob("*")) == before


def test_text_from_a_file_has_no_power_over_the_terminal(
    run_folder: Path, formfit: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder / "devices" / "desk" / "device.json"
    card = json.loads(path.read_text())
    card["fingerprint"]["cpu"] = f"cpu {ESCAPES}"
    card["unsupported"] = {f"linear {ESCAPES}": ESCAPES}
    path.write_text(json.dumps(card))
    bad = run_folder / f"space {ESCAPES.replace('/', '')}.yaml"
    bad.write_text(f'name: "{"x" * 9}"\nkey{ESCAPES[:4]}: 1\n'.replace("\x1b", ""))
    for words in (("devices",), ("devices", "desk"), ("space", bad), ("run", bad, "--dry-run")):
        done = formfit("--devices", run_folder / "devices", *words)
        for text in (done.stdout, done.stderr):
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text), words
    assert "\\x1b[2J" in formfit("--devices", run_folder / "devices", "devices").stdout


def test_printable_text_keeps_lines_and_words() -> None:
    text = "naïve\t日本 [/v1]\n"
    assert printable(text) == text
    assert printable(ESCAPES).isprintable()
    assert "\\x1b" in printable(ESCAPES)


def test_square_brackets_and_escapes_in_a_bar_are_text() -> None:
    code = (
        "from search.cli.output import Bars\n"
        f"with Bars().stage('[/v1]') as stage: stage(0.5, '[bold]x[/bold] [/v2]' + {ESCAPES!r})"
    )
    main, follower = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, stderr=follower, stdout=subprocess.PIPE, check=False)
    os.close(follower)
    shown = os.read(main, 1 << 16).decode()
    os.close(main)
    assert done.returncode == 0, shown
    assert "[/v1]" in shown
    assert "[bold]x[/bold] [/v2]\\x1b[2J" in shown
    assert "\x1b]0;title" not in shown


def test_a_folder_with_square_brackets_is_shown_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "a[red]b [" / "v1]"
    folder.mkdir(parents=True)
    done = program(folder, "--devices", folder, "devices", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert "".join(f"Devices in {folder}".split()) in "".join(done.stdout.decode().split())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    name = b"caf\xe9-\xe6\x97\xa5.yaml"  # not UTF-8
    folder = os.fsencode(tmp_path)
    Path(os.fsdecode(folder + b"/" + name)).write_text("name: 日本 ±\n")
    for words in (("space", SPACE), ("space", os.fsdecode(name))):
        done = program(tmp_path, *words, PYTHONIOENCODING=encoding)
        assert done.returncode == (0 if words[1] == SPACE else 2)
        assert b"Traceback" not in done.stderr
        assert done.stderr.count(b"\n") == (0 if words[1] == SPACE else 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    for words in (("space", SPACE), ("--version",)):
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(
                [*MODULE, *map(str, words)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=full, stderr=subprocess.PIPE, check=False,
            )  # fmt: skip
        assert (done.returncode, done.stderr) == (2, b"formfit: No space left on device\n"), words


def test_closed_streams_are_no_error(tmp_path: Path) -> None:
    tried = ((">&-", f"space {SPACE}", 0), (">&- 2>&-", "space none.yaml", 2), ("2>&-", "x", 2))
    for closed, words, code in tried:
        command = f"exec {sys.executable} -m formfit {words} {closed}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (code, b"", b""), closed


def test_texts_are_read_in_utf_8_whatever_the_locale() -> None:
    found = []
    for package in ("space", "supernet", "latency", "search"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                is_text = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                if is_text and node.func.attr in ("read_text", "write_text") and not node.keywords:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_a_reader_that_ends_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*MODULE, "space", str(SPACE)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writer, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_folder_that_cannot_be_written_is_one_line(
    config_file: Path, tmp_path: Path, formfit: Program
) -> None:
    (tmp_path / "file").write_text("")
    for out in (Path("/proc/formfit/run"), tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        done = formfit("train", config_file, "--out", out)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert str(out)[:8] in done.stderr


def test_a_long_error_is_cut(formfit: Program, tmp_path: Path) -> None:
    done = formfit("space", tmp_path / ("x/" * 3000))
    assert done.returncode == 2
    assert len(done.stderr) < MAX_LINE_CHARACTERS + 100


def test_an_interrupt_is_one_line(config_file: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(config_file.read_text())
    config["space"] = str(config_file.parent / "space.yaml")
    config["train"] |= {"steps": 100_000, "checkpoint_every": 100_000}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [*MODULE, "train", "long.yaml", "--out", "run"], cwd=tmp_path, text=True, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # A shell's background job ignores the signal, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process:
        try:
            deadline = time.monotonic() + 120
            metrics = tmp_path / "run" / "supernet" / "metrics.jsonl"
            while not metrics.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            lines = process.communicate(timeout=60)[1].splitlines()
        finally:
            process.kill()
    assert process.returncode == 130
    assert [line for line in lines if not line.startswith("train ")] == ["formfit: stopped"]


DRY = {
    "pick": ({"picks": ["knee", "nearest"]}, "picks[1]: 'nearest' is not one of best, knee, fastest"),
    "threshold": ({"verify": {"max_noise": -0.1}}, "verify.max_noise"),
    "infinite threshold": ({"profile": {"max_error": float("inf")}}, "profile.max_error"),
    "workload that is not profiled": (
        {"search": {"limits": ["decode@32<=1ms"]}, "profile": {"workloads": ["prefill@64"]}},
        "decode@32<=1ms: outside of what is profiled",
    ),
    "precision that is not profiled": (
        {"search": {"objectives": ["loss", "latency:decode@64,precision=int8"]}}, "of different precisions"
    ),
    "batch that is not profiled": (
        {"search": {"limits": ["decode@64,batch=4<=1ms"]}}, "outside of what is profiled"
    ),
    "another device": ({"search": {"limits": ["phone:decode@64<=1ms"]}}, "the run has one device, desk"),
    "long workload": ({"profile": {"workloads": ["decode@9999"]}}, "longer than the context"),
    "threads": ({"profile": {"threads": 4096}}, "profile.threads 4096: this process may use"),
    "training threads": ({"train": {"threads": 4096}}, "train.threads 4096: this process may use"),
    "no quality": ({"search": {"objectives": ["params"]}}, "objective"),
    "too many objectives": (
        {"search": {"strategy": "hat", "objectives": ["loss", "params", "latency:decode@64"]}}, "strategy hat"
    ),
    "limits that exclude all": ({"search": {"limits": ["params<=10"]}}, "params"),
}  # fmt: skip


@pytest.mark.parametrize("case", DRY)
def test_a_dry_run_refuses_what_would_fail_later(case: str, config_file: Path, formfit: Program) -> None:
    changes, expected = DRY[case]
    config = yaml.safe_load(config_file.read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    path = config_file.parent / "changed.yaml"
    path.write_text(yaml.safe_dump(config))
    for words in (("--dry-run",), ("--out", config_file.parent / "none")):
        done = formfit("run", path, *words)
        assert done.returncode in (2, 3), words
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (config_file.parent / "none").exists()
