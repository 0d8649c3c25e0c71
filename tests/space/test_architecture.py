import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from space import Architecture, InputError, Layer
from tests.contracts import TINY_SPACES, attempt, every_architecture, tiny_space

MIXED = Architecture(
    48,
    (
        Layer(mixer="attention", heads=4, kv_heads=2, ffn=64),
        Layer(),
        Layer(mixer="sliding", heads=2, kv_heads=2, window=8),
        Layer(ffn=32),
    ),
)
MIXED_JSON = (
    '{"layers":[{"ffn":64,"heads":4,"kv_heads":2,"mixer":"attention"},{"ffn":0,"mixer":"none"},'
    '{"ffn":0,"heads":2,"kv_heads":2,"mixer":"sliding","window":8},{"ffn":32,"mixer":"none"}],"width":48}'
)


def test_canonical_json_and_key_are_fixed() -> None:
    """Folders and records are named by keys, so a changed key would orphan them."""
    assert json.dumps(MIXED.to_json(), sort_keys=True, separators=(",", ":")) == MIXED_JSON
    assert MIXED.key == "b2fa498b5e56"


def test_properties_and_description() -> None:
    assert MIXED.depth == 3
    assert MIXED.pattern == ("attention", "sliding", "none")
    assert [layer.present for layer in MIXED.layers] == [True, False, True, True]
    assert MIXED.describe() == "width 48: attention/4:2+ffn64 - sliding/2@8+ffn0 none+ffn32"


def test_architecture_is_frozen_and_hashable() -> None:
    copy = Architecture.from_json(json.loads(MIXED_JSON))
    assert copy == MIXED
    assert hash(copy) == hash(MIXED)
    with pytest.raises(FrozenInstanceError):
        copy.width = 16  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        copy.layers[0].ffn = 16  # type: ignore[misc]


@pytest.mark.parametrize("name", TINY_SPACES)
def test_json_round_trip_and_distinct_keys(name: str) -> None:
    members = every_architecture(tiny_space(**TINY_SPACES[name]))
    for architecture in members:
        again = Architecture.from_json(json.loads(json.dumps(architecture.to_json())))
        assert again == architecture
        assert again.key == architecture.key
    assert len({architecture.key for architecture in members}) == len(members)


def edited(path: str, value: Any) -> Any:
    """The mixed architecture's JSON with one value replaced, or removed by ``...``."""
    whole = MIXED.to_json()
    *way, last = path.split("/")
    place: Any = whole
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    if value is ...:
        del place[last]
    else:
        place[int(last) if last.isdigit() else last] = value
    return whole


@pytest.mark.parametrize(
    ("value", "fragment"),
    [
        (None, "expected an object with exactly 'width' and 'layers'"),
        ([], "expected an object with exactly 'width' and 'layers'"),
        (edited("width", ...), "expected an object with exactly 'width' and 'layers'"),
        (edited("layers", ...), "expected an object with exactly 'width' and 'layers'"),
        (edited("depth", 3), "expected an object with exactly 'width' and 'layers'"),
        (edited("width", 0), "'width' must be a positive integer"),
        (edited("width", -16), "'width' must be a positive integer"),
        (edited("width", True), "'width' must be a positive integer"),
        (edited("width", 48.0), "'width' must be a positive integer"),
        (edited("width", "48"), "'width' must be a positive integer"),
        (edited("layers", []), "'layers' a list"),
        (edited("layers", {"0": {}}), "'layers' a list"),
        (edited("layers/1", None), ".layers[1]: expected an object"),
        (edited("layers/1/heats", 2), ".layers[1]: expected an object"),
        (edited("layers/1/mixer", ...), ".layers[1]: expected an object"),
        (edited("layers/3/ffn", ...), ".layers[3]: expected an object"),
        (edited("layers/0/mixer", "atention"), ".layers[0].mixer: 'atention' is not one of attention, "),
        (edited("layers/0/mixer", 3), ".layers[0].mixer: 3 is not one of"),
        (edited("layers/0/mixer", ["attention"]), ".layers[0].mixer: ['attention'] is not one of"),
        (edited("layers/0/ffn", -16), ".layers[0].ffn: -16 is not a whole number >= 0"),
        (edited("layers/0/ffn", 1.5), ".layers[0].ffn: 1.5 is not a whole number >= 0"),
        (edited("layers/0/ffn", False), ".layers[0].ffn: False is not a whole number >= 0"),
        (edited("layers/0/heads", "4"), ".layers[0].heads: '4' is not a whole number >= 0"),
        (edited("layers/0/kv_heads", None), ".layers[0].kv_heads: None is not a whole number >= 0"),
        (edited("layers/0/heads", 0), ".layers[0].heads: 0 does not go with mixer attention"),
        (edited("layers/0/heads", ...), ".layers[0].heads: 0 does not go with mixer attention"),
        (edited("layers/1/heads", 2), ".layers[1].heads: 2 does not go with mixer none"),
        (edited("layers/0/kv_heads", 3), ".layers[0].kv_heads: 3 does not divide heads 4"),
        (edited("layers/0/kv_heads", 0), ".layers[0].kv_heads: 0 does not divide heads 4"),
        (edited("layers/3/kv_heads", 2), ".layers[3].kv_heads: 2 does not"),
        (edited("layers/2/window", 0), ".layers[2].window: 0 does not go with mixer sliding"),
        (edited("layers/2/window", 1), ".layers[2].window: 1 does not go with mixer sliding"),
        (edited("layers/0/window", 8), ".layers[0].window: 8 does not go with mixer attention"),
        (edited("layers/0/window", 1), ".layers[0].window: 1 does not go with mixer attention"),
    ],
)
def test_invalid_json_error_names_place(value: Any, fragment: str) -> None:
    with pytest.raises(InputError) as caught:
        Architecture.from_json(value, "here.json")
    message = str(caught.value)
    assert message.startswith("here.json")
    assert fragment in message
    assert len(message.splitlines()) == 1


ODD = st.sampled_from(
    [None, True, -1, 0, 1, 3, 1.0, 1e300, float("nan"), "", "none", "a\nb", [], [1], {}, {"": 0}]
)
PLACES = ["width", "layers", "layers/2"] + [
    f"layers/{slot}/{name}"
    for slot in range(4)
    for name in ("mixer", "heads", "kv_heads", "window", "ffn", "a\nb")
]


@given(st.sampled_from(PLACES), ODD | st.sampled_from(["linear", "sliding", "attention", 4]))
@example("layers/1/kv_heads", 2)
@settings(max_examples=300, derandomize=True, deadline=None)
def test_any_json_is_one_line_error_or_has_canonical_form(path: str, value: Any) -> None:
    architecture, message = attempt(lambda: Architecture.from_json(edited(path, value)))
    if architecture is None:
        assert len(message.splitlines()) == 1
    else:
        assert Architecture.from_json(architecture.to_json()) == architecture
        assert all(layer == Layer() for layer in architecture.layers if not layer.present)
