"""Imports of Ray workers: formfit's own packages, whatever else the working directory holds.

Ray puts the working directory and the folder of the script first on the path of a worker, so that a user's
``space.py`` there would be imported in place of the package ``space``.
"""

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

PACKAGES = ("space", "latency", "supernet", "search")
SETUP_HOOK = "formfit.import_packages"  # called in a worker before Ray changes its path
ROOT = Path(__file__).resolve().parents[2]


def worker_environment() -> dict[str, str] | None:
    """Ray's runtime environment for workers.

    Returns:
        One that imports formfit's packages first. None if no other module has one of their names, because a
        worker with an environment takes about a second longer to start.
    """
    folders = [str(Path.cwd()), str(Path(sys.argv[0]).resolve().parent)]
    folders += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    for name in PACKAGES:
        spec = PathFinder.find_spec(name, folders)
        if spec and (spec.origin is None or Path(spec.origin).resolve().parent.parent != ROOT):
            return {"worker_process_setup_hook": SETUP_HOOK}
    return None
