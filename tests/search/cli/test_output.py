"""Tables of a run's result."""

from search.cli.app import summary_tables
from tests.search.cli.test_progress import member


def test_unknown_bits_per_byte_are_shown_as_a_dash() -> None:
    names = ("largest", "chosen", "order2", "gzip")
    text = {f"{name}_bits_per_byte": None for name in names} | {"largest_bits_per_byte": 2.0}
    summary = {
        "text": text,
        "front": [member(256).to_json()],
        "verified": {},
        "chosen": {"latency": {}, "limits": []},
        "limits": [],
    }
    table = summary_tables(summary)[-1]
    assert [[str(cell) for cell in column.cells] for column in table.columns] == [
        ["2.000"],
        ["-"],
        ["-"],
        ["-"],
    ]
