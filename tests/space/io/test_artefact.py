import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from space import InputError
from space.io.artefact import (
    Artefact,
    atomic_path,
    canonical_json,
    check_inputs,
    digest,
    file_digest,
    write_bytes,
    write_text,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Stop(BaseException):
    """An exception that is not an Exception, like KeyboardInterrupt."""


@pytest.mark.parametrize("end", [ValueError, Stop])
def test_exception_keeps_old_file(tmp_path: Path, end: type[BaseException]) -> None:
    path = tmp_path / "card.json"
    write_text(path, "old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("new, but only ha")
            assert path.read_text() == "old"
            raise end

    with pytest.raises(end):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == {"card.json"}


def test_exception_writes_no_file(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "card.json") as temporary:
            temporary.write_text("{")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - ours, raised above
        fail()
    assert names(tmp_path) == set()


def test_killed_process_keeps_old_file(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    write_text(path, "old")
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom space.io.artefact import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('new, but only ha')\n"
        "    os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == 9
    assert path.read_text() == "old"


def test_content_is_synced_before_rename_and_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = tmp_path / "card.json", []
    sync, rename = os.fsync, Path.replace

    def spy_sync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(("sync", target.name if target == tmp_path else target.read_text()))
        sync(descriptor)

    def spy_rename(self: Path, target: Path) -> Path:
        events.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(Path, "replace", spy_rename)
    write_text(path, "whole")
    assert events == [("sync", "whole"), ("rename", "card.json"), ("sync", tmp_path.name)]


def test_written_files_are_complete_readable_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "devices" / "this" / "card.bin"  # folders are made
    write_bytes(path, b"first")
    write_bytes(path, b"\x00second")
    assert path.read_bytes() == b"\x00second"
    assert names(path.parent) == {"card.bin"}
    assert path.stat().st_mode & 0o777 == 0o644
    write_text(path, "\N{GREEK SMALL LETTER TAU}\n")
    assert path.read_bytes() == b"\xcf\x84\n"


def test_digests(tmp_path: Path) -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    tau = "\N{GREEK SMALL LETTER TAU}"
    assert digest("") == digest(b"") == empty
    assert digest(tau) == digest(b"\xcf\x84") != empty
    (tmp_path / "tau").write_text(tau, encoding="utf-8")
    assert file_digest(tmp_path / "tau") == digest(tau)


def test_canonical_json_is_unique() -> None:
    assert (
        canonical_json({"b": [1, None], "a": {"d": 1.5, "c": "x y"}})
        == '{"a":{"c":"x y","d":1.5},"b":[1,null]}'
    )
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical_json({"a": number})


CARD = Artefact("card", "formfit profile")
BODY = {"rows": [1, 2.5, None], "name": 'a "quoted" \N{GREEK SMALL LETTER TAU}'}


def card(path: Path) -> Path:
    CARD.write(path, {"space": "ab" * 32}, BODY)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        CARD.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "`formfit profile` makes" in message
    assert len(message.splitlines()) == 1
    return message


def test_artefact_is_header_and_body(tmp_path: Path) -> None:
    path = card(tmp_path / "card.json")
    header = {"kind": "card", "schema": 1, "inputs": {"space": "ab" * 32}}
    assert CARD.read(path) == {"header": header, **BODY}
    assert next(iter(json.loads(path.read_text()))) == "header"


def test_body_with_header_is_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="header"):
        CARD.write(tmp_path / "card.json", {}, {"header": {"kind": "front", "schema": 1}})
    assert names(tmp_path) == set()


def test_nan_is_not_written(tmp_path: Path) -> None:
    path = card(tmp_path / "card.json")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        CARD.write(path, {}, {"median": math.nan})
    assert path.read_bytes() == before
    assert names(tmp_path) == {"card.json"}


def test_missing_file_error_names_command(tmp_path: Path) -> None:
    assert "not found; `formfit profile` makes it" in refusal(tmp_path / "card.json")


def test_truncation_at_any_byte_is_error(tmp_path: Path) -> None:
    path = card(tmp_path / "card.json")
    whole = path.read_bytes()
    assert whole.endswith(b"}\n")
    for end in range(len(whole) - 1):  # all but the last newline belong to the value
        path.write_bytes(whole[:end])
        assert "not a whole card file" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\xfa", b"[" * 100_000, b'{"header": ' + b"9" * 5000 + b"}", b'{"a":1}{"b":2}', b"\x00" * 64],
    ids=["bytes", "deep", "long number", "two values", "zeros"],
)
def test_other_content_is_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "card.json"
    path.write_bytes(content)
    assert "not a whole card file" in refusal(path)


@pytest.mark.parametrize(
    "value",
    [[], 3, None, "card", {}, {"header": []}, {"header": {}}, {"header": {"kind": "front", "schema": 1}}],
)
def test_other_kind_is_error(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps(value))
    assert "not a card file" in refusal(path)


@pytest.mark.parametrize("schema", [0, 2, "1", None, "a\nb"])
def test_other_schema_is_error(tmp_path: Path, schema: Any) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"header": {"kind": "card", "schema": schema}}))
    message = refusal(path)
    assert f"schema version {schema!r}, this formfit reads 1" in message


def test_folder_instead_of_file_is_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        CARD.read(tmp_path)


def test_equal_inputs_pass(tmp_path: Path) -> None:
    artefact = CARD.read(card(tmp_path / "card.json"))
    check_inputs(tmp_path / "card.json", artefact, {"space": "ab" * 32})
    check_inputs(tmp_path / "card.json", artefact, {})


def test_different_inputs_error_names_both(tmp_path: Path) -> None:
    path = card(tmp_path / "card.json")
    artefact = CARD.read(path)
    with pytest.raises(InputError) as caught:
        check_inputs(path, artefact, {"space": "cd" * 32})
    assert str(caught.value) == f"{path}: made for space abababababab, but the space given is cdcdcdcdcdcd"


@pytest.mark.parametrize("inputs", [{}, None, [], "space", {"space": None}, {"spaces": "ab" * 32}])
def test_missing_inputs_are_error(tmp_path: Path, inputs: Any) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"header": {"kind": "card", "schema": 1, "inputs": inputs}}))
    with pytest.raises(InputError, match=r"made for space None, but the .*|its header has no inputs"):
        check_inputs(path, CARD.read(path), {"space": "ab" * 32})
