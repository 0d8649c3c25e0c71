import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from space import Architecture, InputError, ModelConfig, Space, load_space
from space.genome import contains
from space.mixers import MIXERS
from space.space import Hybrid, LayerChoices
from space.variation import sample
from tests.contracts import TINY_SPACES, attempt, every_architecture, tiny_space, tiny_value

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "spaces").glob("*.yaml"))
TEXT = """\
# A space as a person writes it.
name: by-hand
max_seq_len: 512
head_dim: 32
width: [96, 144]
depth: [2, 3, 4]
kv_group: 2            # two query heads share a key and value head
layer:
  mixer: [attention, sliding, linear, "retnet", gated_deltanet, none]
  heads: [2, 4, 6]
  ffn:
    - 0
    - 128
  window: [64]
hybrid: {ratios: [full, 1, 3, linear], max_linear_kinds: 2}
"""
Refused = Callable[[str | bytes], str]


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """The error message for a file's text, without the leading path."""
    path = tmp_path / "space.yaml"

    def load(text: str | bytes) -> str:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(InputError) as caught:
            load_space(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert len(message.splitlines()) == 1
        return message.removeprefix(f"{path}: ")

    return load


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"width": []}, "width: no choice is given"),
    ({"depth": []}, "depth: no choice is given"),
    ({"heads": []}, "layer.heads: no choice is given"),
    ({"kv_heads": []}, "layer.kv_heads: no choice is given"),
    ({"ffn": []}, "layer.ffn: no choice is given"),
    ({"ratios": []}, "hybrid.ratios: no choice is given"),
    ({"mixer": [], "ratios": ["full"]}, "layer.mixer: no mixer but none is given"),
    ({"mixer": ["none"], "ratios": ["full"]}, "layer.mixer: no mixer but none is given"),
    ({"width": [32, 16]}, "width: [32, 16] must be in ascending order, each value once"),
    ({"depth": [2, 2]}, "depth: [2, 2] must be in ascending order, each value once"),
    ({"heads": [1, 3, 2]}, "layer.heads: [1, 3, 2] must be in ascending order, each value once"),
    (
        {"heads": [2], "kv_heads": [2, 1]},
        "layer.kv_heads: [2, 1] must be in ascending order, each value once",
    ),
    ({"ffn": [16, 0]}, "layer.ffn: [16, 0] must be in ascending order, each value once"),
    (
        {"mixer": ["attention", "sliding"], "window": [8, 8]},
        "layer.window: [8, 8] must be in ascending order, each value once",
    ),
    ({"width": [16, 40]}, "width[1]: 40 is not a multiple of 16"),
    ({"ffn": [0, 16, 20]}, "layer.ffn[2]: 20 is not a multiple of 16"),
    ({"head_dim": 12}, "head_dim: 12 is not a multiple of 8"),
    (
        {"mixer": ["attention", "linear", "none"], "ffn": [0]},
        "layer: mixer none and no FFN size above 0 give empty layers; vary depth instead",
    ),
    (
        {"heads": [2], "kv_group": 2, "kv_heads": [1]},
        "layer.kv_heads: kv_group is given too; give only one of them",
    ),
    ({"heads": [2, 3], "kv_group": 2}, "layer.heads[1]: 3 is not a multiple of kv_group 2"),
    ({"heads": [2, 4], "kv_heads": [1, 3]}, "layer.kv_heads[1]: 3 does not divide any of heads [2, 4]"),
    (
        {"heads": [2, 3], "kv_heads": [2]},
        "layer.heads[1]: 3 is not a multiple of any of kv_heads [2]",
    ),
    (
        {"mixer": ["attention", "linear", "retnett"]},
        f"layer.mixer[2]: 'retnett' is not one of {', '.join(MIXERS.builtin)}, none",
    ),
    (
        {"mixer": ["attention", "linear", "attention"]},
        "layer.mixer: ['attention', 'linear', 'attention'] names a mixer twice",
    ),
    ({"mixer": ["attention", "sliding"]}, "layer.window: mixer sliding needs at least one window"),
    ({"window": [8]}, "layer.window: no mixer has a window; only sliding has one"),
    (
        {"mixer": ["attention", "sliding"], "window": [8, 65]},
        "layer.window[1]: 65 is more than max_seq_len 64",
    ),
    ({"ratios": ["full", 1, 1]}, "hybrid.ratios: ['full', 1, 1] names a ratio twice"),
    (
        {"mixer": ["attention"], "ratios": ["full", 2]},
        "hybrid.ratios[1]: 2 needs a linear mixer, and layer.mixer has none",
    ),
    (
        {"mixer": ["attention", "sliding"], "window": [8], "local": "separate", "ratios": ["full", "linear"]},
        "hybrid.ratios[1]: linear needs a linear mixer, and layer.mixer has none",
    ),
    (
        {"mixer": ["linear"], "ratios": ["linear", 3]},
        "hybrid.ratios[1]: 3 needs a full mixer, and layer.mixer has none of attention",
    ),
    (
        {"mixer": ["attention", "linear", "retnet"], "ratios": ["full"]},
        "hybrid.ratios: only full is allowed, so that linear, retnet can never appear",
    ),
    ({"ratios": None}, "hybrid.ratios: only full is allowed, so that linear can never appear"),
    ({"ratios": ["linear"]}, "hybrid.ratios: only linear is allowed, so that attention can never appear"),
    ({"max_linear_kinds": 2}, "hybrid.max_linear_kinds: 2 is more than the 1 linear mixers"),
    (
        {"local": "separate"},
        "hybrid.local: separate, but layer.mixer has none of sliding, short_conv",
    ),
    (
        {"mixer": ["linear"], "ratios": ["linear"], "full_layers": [0]},
        "hybrid.full_layers: layer.mixer has none of attention",
    ),
    ({"full_layers": [2]}, "hybrid.full_layers: 2 is past the last layer 1"),
    ({"full_layers": [0, 0]}, "hybrid.full_layers: a layer is named twice"),
    (
        {"ratios": [1], "full_layers": [0, 1]},
        "hybrid: no combination of depth and ratio allows an architecture",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS, ids=[m for _, m in CONTRADICTIONS])
def test_contradiction_is_error(refused: Refused, changes: dict[str, Any], message: str) -> None:
    assert message in refused(yaml.safe_dump(tiny_value(**changes)))


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (
            {"name": "Tiny Space"},
            "name: String should match pattern '^[a-z0-9][a-z0-9_-]*$', found 'Tiny Space'",
        ),
        ({"name": "tiny\n"}, "name: String should match pattern"),
        ({"name": 3}, "name: Input should be a valid string, found 3"),
        ({"name": None}, "name: missing"),
        ({"layer": None}, "layer: missing"),
        ({"mixer": None}, "layer.mixer: missing"),
        ({"width": 16}, "width: Input should be a valid tuple, found 16"),
        ({"width": [16, "wide"]}, "width[1]: Input should be a valid integer, found 'wide'"),
        ({"mixer": "attention"}, "layer.mixer: Input should be a valid tuple, found 'attention'"),
        ({"max_seq_len": "64"}, "max_seq_len: Input should be a valid integer, found '64'"),
        ({"max_seq_len": True}, "max_seq_len: Input should be a valid integer, found True"),
        ({"max_seq_len": 64.0}, "max_seq_len: Input should be a valid integer, found 64.0"),
        ({"max_seq_len": 0}, "max_seq_len: Input should be greater than 0, found 0"),
        ({"max_seq_len": 10**30}, "max_seq_len: Input should be less than or equal to"),
        ({"depth": [10**9]}, "depth[0]: Input should be less than or equal to"),
        ({"depth": [True]}, "depth[0]: Input should be a valid integer, found True"),
        ({"tie_embeddings": 1}, "tie_embeddings: Input should be a valid boolean, found 1"),
        ({"qk_norm": "yes"}, "qk_norm: Input should be a valid boolean, found 'yes'"),
        ({"ffn": [-16]}, "layer.ffn[0]: Input should be greater than or equal to 0, found -16"),
        (
            {"mixer": ["attention", "sliding"], "window": [1]},
            "layer.window[0]: Input should be greater than 1, found 1",
        ),
        ({"kv_group": 0}, "kv_group: Input should be greater than 0, found 0"),
        ({"sharing": "all"}, "sharing: Input should be 'qkvo', 'none' or 'block', found 'all'"),
        ({"local": "apart"}, "hybrid.local: Input should be 'linear' or 'separate', found 'apart'"),
        ({"max_linear_kinds": 0}, "hybrid.max_linear_kinds: Input should be greater than 0, found 0"),
        (
            {"full_layers": [-1]},
            "hybrid.full_layers[0]: Input should be greater than or equal to 0, found -1",
        ),
        ({"ratios": ["full", "most"]}, "hybrid.ratios[1]: 'most' is not full, linear"),
        ({"ratios": [0]}, "hybrid.ratios[0]: 0 is not full, linear"),
        ({"ratios": [True]}, "hybrid.ratios[0]: True is not full, linear"),
        ({"ratios": [1.5]}, "hybrid.ratios[0]: 1.5 is not full, linear"),
        ({"ratios": [["full"]]}, "hybrid.ratios[0]: ['full'] is not full, linear"),
    ],
)
def test_wrong_value_is_error(refused: Refused, changes: dict[str, Any], fragment: str) -> None:
    message = refused(yaml.safe_dump(tiny_value(**changes)))
    assert message.startswith(fragment)
    assert "; " not in message  # nothing else is wrong


@pytest.mark.parametrize(
    ("place", "key", "message"),
    [
        ((), "widht", "widht: unknown key (did you mean width?); known are depth, head_dim, "),
        ((), "zzz", "zzz: unknown key; known are depth, "),
        (("layer",), "head", "layer.head: unknown key (did you mean heads?); known are ffn, heads, "),
        (("hybrid",), "ratio", "hybrid.ratio: unknown key (did you mean ratios?); known are full_layers, "),
        (
            ("hybrid",),
            "width",
            "hybrid.width: unknown key; known are full_layers, local, max_linear_kinds, ratios",
        ),
        ((), "a\nb", "['a\\nb']: unknown key; known are depth, "),
        ((), 1, "[1]: Keys should be strings, found 1"),
    ],
)
def test_unknown_key_error_lists_known_keys(
    refused: Refused, place: tuple[str, ...], key: Any, message: str
) -> None:
    value = tiny_value()
    inside = value
    for step in place:
        inside = inside[step]
    inside[key] = 1
    assert refused(yaml.safe_dump(value)).startswith(message)


def test_all_errors_are_reported_at_once(refused: Refused) -> None:
    assert refused(
        yaml.safe_dump(tiny_value(width=[24], heads=[2, 1], ratios=["full"], full_layers=[7]))
    ).split("; ") == [
        "layer.heads: [2, 1] must be in ascending order, each value once",
        "width[0]: 24 is not a multiple of 16",
        "hybrid.ratios: only full is allowed, so that linear can never appear",
        "hybrid.full_layers: 7 is past the last layer 1",
    ]
    message = refused(yaml.safe_dump(tiny_value(width=[-1], heads=["a"], local=3, colour="red", name=None)))
    for fragment in (
        "width[0]: ",
        "layer.heads[0]: ",
        "hybrid.local: ",
        "colour: unknown key",
        "name: missing",
    ):
        assert fragment in message


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "expected keys and values, found NoneType"),
        ("- a\n- b\n", "expected keys and values, found list"),
        ("space", "expected keys and values, found str"),
        ("name: a\nname: b\n", "the key 'name' is given twice"),
        ("layer:\n  heads: [1]\n  ffn: [16]\n  heads: [2]\n", "the key 'heads' is given twice"),
        ("a: b: c\n", "not valid YAML: mapping values are not allowed here"),
        ("a: [1, 2\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML: expected a single document"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML: could not determine a constructor"),
        ("mixer: !!set {attention, linear}\n", "not valid YAML: a set has no order"),
        ("? [a, b]\n: c\n", "not valid YAML"),
        ("? {a: b}\n: c\n", "not valid YAML"),
        ("width: &a [*a]\n", "not valid YAML"),
        ("name: 2024-13-45\n", "not valid YAML"),
        ("width: [0x_]\n", "not valid YAML"),
        ("width: [!!int many]\n", "not valid YAML"),
        ("width: [!!int '']\n", "not valid YAML"),
        ("tie_embeddings: !!bool maybe\n", "not valid YAML"),
        ("name: !!timestamp today\n", "not valid YAML"),
        ("max_seq_len: " + "9" * 5000, "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("[" * 600, "not valid YAML"),
        (b"name: \xff", "cannot be read"),
    ],
)
def test_file_without_mapping_is_error(refused: Refused, text: str | bytes, fragment: str) -> None:
    assert fragment in refused(text)


def test_missing_file_and_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_space(tmp_path / "space.yaml")
    assert str(caught.value) == f"{tmp_path / 'space.yaml'}: not found"
    with pytest.raises(InputError, match="cannot be read"):
        load_space(tmp_path)


# Values that the fuzzer puts in any place, and keys under which it puts them.
ODD_VALUES = st.deferred(
    lambda: (
        st.none()
        | st.booleans()
        | st.sampled_from([-16, -1, 0, 1, 2, 3, 8, 15, 16, 32, 64, 10**6, 2**31, 2**63, 10**30])
        | st.sampled_from([0.5, 16.0, math.inf, math.nan])
        | st.sampled_from(
            ["", "none", "full", "linear", "sliding", "kda", "16", "a\nb", "\x85", "\ud7ff\u2028"]
        )
        | st.text(max_size=3)
        | st.dates()
        | st.binary(max_size=2)
        | st.lists(ODD_VALUES, max_size=3)
        | st.dictionaries(st.text(max_size=2) | st.integers(), ODD_VALUES, max_size=2)
    )
)
ODD_KEYS = (
    st.sampled_from(["width", "ratios", "window", "kv_heads", "kv_group", "full_layers", "local", "hybrid"])
    | st.text(max_size=4)
    | st.integers()
    | st.none()
    | st.dates()
)
SNIPPETS = [
    *(
        "[",
        "]",
        "{",
        "}",
        ":",
        ",",
        "-",
        "*a",
        "&a",
        "!!int",
        "!!set",
        "!x",
        "?",
        "<<",
        "'",
        "#",
        "|",
        ">",
        "%",
    ),
    *("@", "~", "0x_", "1:99", "2024-13-45"),
    *('"', "\n", " ", ": ", "- ", "\t", "\x00", "\x85", "\N{LINE SEPARATOR}", "9" * 99),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a nested value."""
    found: list[tuple[Any, Any]] = []
    steps = list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in steps:
        found += [(value, key), *places(inner)]
    return found


@st.composite
def spoilt_values(draw: st.DrawFn) -> str:
    """A valid space with one to three values replaced, removed or added."""
    value = deepcopy(draw(st.sampled_from([tiny_value(**changes) for changes in TINY_SPACES.values()])))
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(value)))
        change = draw(st.sampled_from(["replace", "delete", "add"]))
        if change == "replace":
            container[key] = draw(ODD_VALUES)
        elif change == "delete":
            del container[key]
        elif isinstance(container, dict):
            container[draw(ODD_KEYS)] = draw(ODD_VALUES)
        else:
            container.append(draw(ODD_VALUES))
        if not value:
            break
    return str(yaml.safe_dump(value, allow_unicode=True))


@st.composite
def spoilt_texts(draw: st.DrawFn) -> str:
    """The text of a valid space with pieces inserted, removed or repeated."""
    text = TEXT
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 6))
        piece = draw(st.sampled_from(SNIPPETS) | st.text(max_size=2) | st.just(text[at : at + 2 * length]))
        text = text[:at] + piece + text[at + length :]
    return text


def is_read_or_refused(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8", newline="")
    space, message = attempt(lambda: load_space(path))
    if space is None:
        assert message.startswith(f"{path}: ")
        assert len(message.splitlines()) == 1
    else:
        assert contains(space, sample(space, np.random.default_rng(0), 4)).all()


@given(text=spoilt_values())
@example(text="name: 2024-13-45")
@settings(max_examples=250, derandomize=True, deadline=None)
def test_any_value_anywhere_is_read_or_one_line_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    is_read_or_refused(text, tmp_path_factory.getbasetemp() / "space.yaml")


@given(text=spoilt_texts())
@example(text="? []\n: a")
@settings(max_examples=250, derandomize=True, deadline=None)
def test_any_edit_of_text_is_read_or_one_line_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    is_read_or_refused(text, tmp_path_factory.getbasetemp() / "space.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_shipped_spaces_load(path: Path) -> None:
    assert load_space(path).name == path.stem


def test_yaml_is_read_into_space(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(TEXT)
    space = load_space(tmp_path / "space.yaml")
    assert space.name == "by-hand"
    assert space.slots == 4
    assert space.config == ModelConfig(
        vocab_size=256, max_seq_len=512, head_dim=32, tie_embeddings=True, qk_norm=False
    )
    assert space.head_options == ((2, 1), (4, 2), (6, 3))
    assert space.ffn_options == (0, 128)
    assert space.mixer_options == (
        ("none", 0),
        ("attention", 0),
        ("sliding", 64),
        ("linear", 0),
        ("retnet", 0),
        ("gated_deltanet", 0),
    )
    assert space.hybrid.ratios == ("full", 1, 3, "linear")
    assert space.max_linear_kinds == 2


def test_options() -> None:
    space = tiny_space(
        mixer=["sliding", "none", "attention"],
        window=[4, 8],
        heads=[2, 3, 4],
        kv_heads=[1, 2],
        ffn=[16],
        ratios=[2],
    )
    assert space.mixer_options == (("none", 0), ("sliding", 4), ("sliding", 8), ("attention", 0))
    assert space.head_options == ((2, 1), (2, 2), (3, 1), (4, 1), (4, 2))
    assert space.ffn_options == (0, 16)
    assert space.max_linear_kinds == 1
    assert tiny_space(heads=[2, 3]).head_options == ((2, 2), (3, 3))


def test_hybrid_ratio_rounds_towards_full() -> None:
    """n_full = ceil(m / (r + 1)): at 3:1, the first of every four layers is full."""
    space = tiny_space()
    assert [list(space.full_counts(3, m)) for m in range(6)] == [[0], [1], [1], [1], [1], [2]]
    assert [list(space.full_counts(1, m)) for m in range(6)] == [[0], [1], [1], [2], [2], [3]]
    assert [list(space.full_counts("full", m)) for m in range(4)] == [[0], [1], [2], [3]]
    assert [list(space.full_counts("linear", m)) for m in range(4)] == [[0], [0], [0], [0]]
    assert [list(space.full_counts("any", m)) for m in range(3)] == [[0], [0, 1], [0, 1, 2]]


def layers_by_class(space: Space, architecture: Architecture) -> tuple[int, int, int, int]:
    """Number of layers of each class: FFN only, full, linear, local."""
    apart = ("sliding", "short_conv") if space.hybrid.local == "separate" else ()
    count = Counter(
        "full"
        if mixer == "attention"
        else mixer
        if mixer == "none"
        else "local"
        if mixer in apart
        else "linear"
        for mixer in architecture.pattern
    )
    return count["none"], count["full"], count["linear"], count["local"]


@pytest.mark.parametrize("name", TINY_SPACES)
def test_patterns_equal_layer_counts_of_all_architectures(name: str) -> None:
    space = tiny_space(**TINY_SPACES[name])
    assert set(space.all_patterns) == {layers_by_class(space, member) for member in every_architecture(space)}
    assert len(set(space.all_patterns)) == len(space.all_patterns)
    for (depth, ratio), patterns in space.patterns.items():
        rule = space.hybrid.model_copy(update={"ratios": (ratio,)})
        alone = space.model_copy(update={"depth": (*{depth, space.slots},), "hybrid": rule})
        found = {layers_by_class(space, a) for a in every_architecture(alone) if a.depth == depth}
        assert set(patterns) == found
        assert {pattern.depth for pattern in patterns} == {depth}


def test_hash_depends_on_content_only(tmp_path: Path) -> None:
    value = tiny_value(
        mixer=["attention", "linear", "retnet", "sliding"],
        window=[8],
        max_linear_kinds=2,
        kv_heads=[1],
        full_layers=[0],
    )
    base = tiny_space_of(value)
    again = dict(reversed(value.items())) | {"layer": dict(reversed(value["layer"].items())), "name": "other"}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(again, sort_keys=False))
    assert load_space(tmp_path / "space.yaml").hash == base.hash
    assert len(base.hash) == 64

    changes: dict[str, Any] = {
        "vocab_size": 20,
        "max_seq_len": 63,
        "head_dim": 32,
        "tie_embeddings": False,
        "qk_norm": True,
        "sharing": "none",
        "width": [16],
        "depth": [2],
        "mixer": ["attention", "linear", "sliding", "retnet"],
        "heads": [1],
        "kv_heads": [1, 2],
        "ffn": [16],
        "window": [9],
        "ratios": ["full", 2, "linear"],
        "max_linear_kinds": 3,
        "full_layers": [1],
        "local": "separate",
    }
    hashes = {tiny_space(**tiny_changes(value) | {key: change}).hash for key, change in changes.items()}
    hashes.add(tiny_space(**tiny_changes(value) | {"kv_heads": None, "kv_group": 1}).hash)
    assert len(hashes | {base.hash}) == len(changes) + 2


def tiny_changes(value: dict[str, Any]) -> dict[str, Any]:
    """A nested value as the flat arguments of :func:`tiny_space`."""
    return {k: v for k, v in value.items() if k not in ("layer", "hybrid")} | value["layer"] | value["hybrid"]


def tiny_space_of(value: dict[str, Any]) -> Space:
    return tiny_space(**tiny_changes(value))


def test_hash_is_equal_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(TEXT)
    script = "import pathlib, space, sys\nprint(space.load_space(pathlib.Path(sys.argv[1])).hash)"
    hashes = {
        subprocess.check_output(
            [sys.executable, "-c", script, str(tmp_path / "space.yaml")],
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).strip()
        for seed in ("1", "2")
    }
    assert hashes == {load_space(tmp_path / "space.yaml").hash}


def test_space_is_a_value() -> None:
    assert tiny_space() == tiny_space()
    assert hash(tiny_space()) == hash(tiny_space())
    assert tiny_space() != tiny_space(max_seq_len=32)
    assert tiny_space().patterns
    assert tiny_space(name="seen") == tiny_space(name="seen")  # with and without cached properties


def test_files_page_lists_every_key_of_a_space() -> None:
    page = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    table = page.split("## Space\n")[1].split("\n## ")[0]
    nested = {"layer": LayerChoices, "hybrid": Hybrid}
    keys = {name for name in Space.model_fields if name not in nested}
    keys |= {f"{name}.{key}" for name, model in nested.items() for key in model.model_fields}
    assert {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")} == keys
