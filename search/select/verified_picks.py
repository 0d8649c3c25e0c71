"""Verification of the members that a run picks from its front."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from search.engine.front import Front, Member
from search.engine.verification import Verification
from search.select.measurements import MeasuredSearch
from search.select.verifier import Verifier
from space.io.progress import Reporter


@dataclass(frozen=True, kw_only=True)
class VerifiedPicks:
    """Verified members of a search's front.

    Attributes:
        front: of the first round.
        measured: the measured search.
        members: by pick; the first is ``chosen``.
    """

    front: Front
    measured: MeasuredSearch
    members: Mapping[str, tuple[Member, Verification]]


def verify_picks(
    folder: Path, verifier: Verifier, measured: MeasuredSearch, picks: Sequence[str], reporter: Reporter
) -> VerifiedPicks:
    """Verify picked members of a front; members that were measured keep the choice of their round.

    Args:
        folder: the search's.
        verifier: extracts and verifies sub-models.
        measured: of that search.
        picks: names of picks, or keys.
        reporter: shows the progress.

    Raises:
        InputError: the front has no such member.
    """
    front, finalists = Front.read(folder / "front.json"), measured.finalists
    picked = {"chosen": (measured.chosen.member, measured.chosen.choice)}
    for pick in picks:
        member = front.member(pick)
        finalist = finalists.get(member.key)
        picked[pick] = (finalist.member, finalist.choice) if finalist else (member, front.choice(member))
    members = {
        pick: (member, verifier.verify(verifier.extract(member.architecture, choice), reporter))
        for pick, (member, choice) in picked.items()
    }
    return VerifiedPicks(front=front, measured=measured, members=members)
