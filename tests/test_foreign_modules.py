"""A user's own space.py, latency.py, search.py or supernet.py does not break formfit."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from supernet.training.worker_imports import PACKAGES, SETUP_HOOK, worker_environment

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "configs" / "spaces" / "quickstart.yaml"
SCRIPT = Path(sysconfig.get_path("scripts")) / "formfit"
MODULE = (sys.executable, "-m", "formfit")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with a module for each of formfit's packages, none of which can be imported."""
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('the user has a {name}.py')\n")
    return tmp_path


def program(folder: Path, *command: object, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    words = list(map(str, command))
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [("--version",), ("space", SPACE)], ids=["version", "space"])
@pytest.mark.parametrize("on_path", [False, True], ids=["cwd", "PYTHONPATH"])
def test_module_runs_beside_foreign_modules(foreign: Path, on_path: bool, words: tuple[object, ...]) -> None:
    done = program(foreign, *MODULE, *words, path=(foreign,) if on_path else ())
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not SCRIPT.exists(), reason="formfit is not installed")
def test_console_script_runs_beside_foreign_modules(foreign: Path) -> None:
    done = program(foreign, SCRIPT, "space", SPACE, path=(foreign,))
    assert (done.returncode, done.stderr) == (0, "")


def test_import_beside_foreign_modules_gives_own_names(foreign: Path) -> None:
    code = "import formfit; print(formfit.Space.__module__, formfit.Limit.__module__)"
    done = program(foreign, sys.executable, "-c", code, path=(foreign,))
    assert (done.stdout.split(), done.stderr) == (["space.space", "search.problem.limit"], "")


def test_a_folder_of_the_same_name_hides_nothing(tmp_path: Path) -> None:
    for name in PACKAGES:
        (tmp_path / name).mkdir()
    assert program(tmp_path, *MODULE, "space", SPACE).returncode == 0


def test_a_foreign_module_that_is_imported_already_is_named(tmp_path: Path) -> None:
    (tmp_path / "space.py").write_text("")
    code = "import space, formfit; formfit.main()"
    done = program(tmp_path, sys.executable, "-c", code)
    assert done.returncode == 2
    assert done.stderr == (
        f"formfit: module 'space' was imported from {tmp_path / 'space.py'} and hides formfit's package; "
        "rename that file\n"
    )
    done = program(tmp_path, sys.executable, "-c", "import space, formfit; formfit.Space")
    assert "ImportError: module 'space' was imported from" in done.stderr


def test_workers_are_set_up_only_where_a_foreign_module_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    assert worker_environment() is None
    (tmp_path / "latency.py").write_text("")
    assert worker_environment() == {"worker_process_setup_hook": SETUP_HOOK}
    (tmp_path / "clean").mkdir()
    monkeypatch.chdir(tmp_path / "clean")
    assert worker_environment() is None
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, ROOT))))
    assert worker_environment() == {"worker_process_setup_hook": SETUP_HOOK}


def test_pytest_in_a_project_with_foreign_modules(foreign: Path) -> None:
    code = f"""
import formfit

def test_space() -> None:
    space = formfit.load_space({str(SPACE)!r})
    assert formfit.Problem(space, limits=["params<=100M"]).constraints()
"""
    (foreign / "test_it.py").write_text(code)
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py")
    done = program(foreign, *command, path=(foreign,))
    assert done.returncode == 0, done.stdout


DRIVER = """
import sys
import formfit

def evaluate(architecture):
    return 3.0 - 0.1 * architecture.depth

if __name__ == "__main__":
    space = formfit.load_space(sys.argv[1])
    problem = formfit.Problem(space, objectives=["loss"])
    front = formfit.run_search(problem, evaluate, "out", population=4, generations=1, workers=1)
    print(len(front.failed), front.evaluations)
"""


def test_search_with_a_ray_worker_runs_beside_foreign_modules(foreign: Path) -> None:
    (foreign / "driver.py").write_text(DRIVER)
    done = program(foreign, sys.executable, "driver.py", SPACE, path=(foreign,))
    assert done.stdout == "0 4\n", done.stderr
