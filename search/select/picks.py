"""Members of a front by name or key."""

from pathlib import Path
from typing import Any

from search.engine.front import FRONT, member_choice, pick_key
from search.workspace import Run
from space import Architecture, InputError, genome
from space.io.artefact import Artefact, check_inputs, file_digest
from space.io.config import load_yaml

MEASURED_SEARCH = Artefact("measured search", "formfit search --verify")


def chosen_architecture(
    run: Run, search: str | None, pick: str | None, file: Path | None
) -> tuple[dict[str, Any], Architecture]:
    """An architecture to extract, with what it was chosen under: a search's member, or a file's.

    Raises:
        InputError: there is no such search, member or file, or it is not of the run's space.
    """
    if file is not None:
        value = load_yaml(file)  # JSON is YAML
        value = value.get("architecture", value) if isinstance(value, dict) else value
        architecture = Architecture.from_json(value, str(file))
        rows = genome.encode(run.space, [architecture])
        if not genome.contains(run.space, rows)[0]:
            raise InputError(
                f"{file}: not an architecture of space {run.space.name}: its hybrid rule excludes it"
            )
        return {}, architecture
    folder = run.folder / "searches" / str(search)
    front = FRONT.read(folder / "front.json")
    members = {m["key"]: m for m in front["members"]}
    if (folder / "measured_search.json").exists():
        measured_search = MEASURED_SEARCH.read(folder / "measured_search.json")
        check_inputs(
            folder / "measured_search.json", measured_search, {"front": file_digest(folder / "front.json")}
        )
        members |= {row["key"]: row for one in measured_search["rounds"] for row in one["finalists"]}
        front["picks"] = {"chosen": measured_search["chosen"]["key"], **front["picks"]}
        front["members"] = list(members.values())
    member = members[pick_key(front, pick or next(iter(front["picks"])))]
    choice = member.get("choice") or member_choice(front, member)
    return choice, Architecture.from_json(member["architecture"])
