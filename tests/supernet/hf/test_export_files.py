"""Files of a sub-model's folder for transformers: generated code, a tokenizer, settings and weights."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from space import Architecture, InputError, Layer, ModelConfig, genome
from space.architecture import has_heads
from space.blocks import Model
from space.mixers import MIXERS
from supernet.hf.bundle import one_file
from supernet.hf.export import load_hf, modelling_file, tensor_name, write_hf
from supernet.hf.modeling import FormfitConfig, FormfitForCausalLM
from supernet.parent import read_parent
from supernet.training.precision import cast_matrices
from tests.contracts import scatter, tiny_space
from tests.numerics import TOLERANCE, assert_close

ROOT = Path(__file__).parents[3]
BYTES = ModelConfig(vocab_size=256, max_seq_len=96, head_dim=16)
HALF = 2**-4  # eleven layers of bf16 products, each rounded to 2^-9
ATTENTION = Layer(mixer="attention", heads=4, kv_heads=2, ffn=32)


def layer_of(name: str) -> Layer:
    if not has_heads(name):
        return Layer(mixer=name, ffn=32)
    return Layer(mixer=name, heads=4, kv_heads=2, window=8 if name == "sliding" else 0, ffn=32)


MIXED = Architecture(48, tuple(layer_of(name) for name in MIXERS))


def written(
    folder: Path,
    architecture: Architecture = MIXED,
    model_config: ModelConfig = BYTES,
    tokenizer: Path | None = None,
) -> tuple[Model, list[str]]:
    model = Model(architecture, model_config)
    scatter(model)
    model.requires_grad_(False)
    return model, write_hf(folder, model.state_dict(), architecture, model_config, tokenizer)


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


# The code.


@pytest.fixture(scope="module")
def code() -> str:
    return modelling_file()


class WithoutImports(ast.NodeTransformer):
    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None


def dumps(text: str) -> dict[str, str]:
    """Each definition at the top of a text, by its name, as its syntax tree without the imports inside it."""
    nodes: dict[str, str] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            nodes[node.name] = ast.dump(WithoutImports().visit(node))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            nodes[ast.unparse(target)] = ast.dump(node)
    return nodes


def test_generated_code_equals_the_sources(code: str) -> None:
    head, *sections = re.split(r"(?m)^# (\S+\.py): .*\n", code)
    assert ast.get_docstring(ast.parse(head))
    found = dict(zip(sections[::2], sections[1::2], strict=True))
    assert {
        "space/blocks.py",
        "space/shapes.py",
        "space/mixers/kda.py",
        "supernet/hf/modeling.py",
    } < found.keys()
    for path, text in found.items():
        wanted, here = dumps((ROOT / path).read_text(encoding="utf-8")), dumps(text)
        assert here
        if path == "space/mixers/__init__.py":
            assert set(here) == {"MIXERS"}
            continue
        assert list(here) == [name for name in wanted if name in here]
        for name, dump in here.items():
            assert dump == wanted[name], f"{path}: {name}"
    for path, comment in {
        "space/attention/linear.py": "# The terms of chunks, for M = N * B * Hkv",
        "space/attention/fla.py": "# The kernels by rule and by whether",
    }.items():
        assert comment in found[path]
    # What formfit alone needs stays out.
    assert not {"Model", "write_json", "state_shapes"} & dumps(code).keys()
    assert not re.search(r"(?m)^\s*(import|from) (space|supernet|fla|triton)", code)


FILES = {
    "supernet/top.py": "from space import part\nfrom space.one import first\n\n\n"
    "class Main:\n    def run(self, second=None):\n        return first(self), part.second(), part.é()\n",
    "space/one.py": "import math\n\n# What it adds.\nSTEP = math.pi\nUNUSED = nowhere\n\n\n"
    "@property\ndef first(x):\n    return x + STEP\n",
    "space/part.py": "import math\n\n\ndef second():\n    return math.tau\n\n\n"
    "def é():\n    return [second for second in range(3)]\n",
}


def built(folder: Path, packages: tuple[str, ...] = (), **changes: str) -> str:
    for path, text in (FILES | {f"space/{name}.py": text for name, text in changes.items()}).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return one_file("supernet.top", ["Main"], folder, packages=packages)


def test_file_holds_the_reached_definitions(tmp_path: Path) -> None:
    text = built(tmp_path)
    _, body = text.split("import math\n")
    assert body == (
        "\n\n# space/one.py: \n\n\n# What it adds.\nSTEP = math.pi\n\n\n"
        "@property\ndef first(x):\n    return x + STEP\n"
        "\n\n# space/part.py: \n\n\ndef second():\n    return math.tau\n\n\n"
        "def é():\n    return [second for second in range(3)]\n"
        "\n\n# supernet/top.py: \n\n\nclass Main:\n    def run(self, second=None):\n"
        "        return first(self), second(), é()\n"
    )


def test_imports_inside_functions_are_moved(tmp_path: Path) -> None:
    part = (
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from decimal import Decimal\n\n\n"
        "def second() -> Decimal:\n    import math\n\n    from space.one import STEP as step\n\n"
        "    return step * math.tau\n\n\ndef é():\n    pass\n"
    )
    one = "from space.constants import STEP\ndef first(x): return x\n"
    text = built(tmp_path, part=part, one=one, constants="STEP = 1\n")
    assert "from decimal import Decimal" in text
    assert "def second() -> Decimal:\n    return STEP * math.tau\n" in text
    assert "# space/constants.py: \n\n\nSTEP = 1\n" in text


def test_definitions_of_other_packages_get_the_name_of_their_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("STEP = 2\n")
    (tmp_path / "other" / "first.py").write_text(
        "from other import STEP\nfrom space.one import first as ours\n\n\nclass Base:\n    step = STEP\n\n\n"
        "def first(x, second=STEP):\n    return first, ours(x), Base, second\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    part = "from other.first import first as second\ndef é(): pass\n"
    text = built(tmp_path, ("other",), part=part)
    assert "class other_first_Base:\n    step = other_STEP\n" in text
    assert "def other_first_first(x, second=other_STEP):\n" in text
    assert "    return other_first_first, first(x), other_first_Base, second\n" in text
    assert "        return first(self), other_first_first(), é()\n" in text
    assert "# other/__init__.py: \n\n\nother_STEP = 2\n" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": "STEP = 1\ndef second(): return STEP\ndef é(): pass\n"}, "STEP is space.(one|part)"),
        ({"part": "import cmath as math\ndef second(): return math\ndef é(): pass\n"}, "math is import "),
        ({"part": "def second(): return first\ndef é(): pass\n"}, "space.part.second uses first, which"),
        ({"part": "def second(): pass\ndef é(): pass\nCOUNT = 1\n", "one": "from space.part import COUNT as "
          "size\ndef first(x): return [lambda size: size, size]\n"}, "size has two meanings"),
        ({"part": "def second(): pass\n"}, "space.part does not define é"),
        ({"part": "def second(): pass\ndef é():\n    import space.one\n    pass\n"}, "import space.one: not"),
        ({"part": "def second(): pass\ndef é():\n    if 1:\n        import math\n"}, "import math: not an"),
        ({"part": "import numpy\ndef second(): return numpy\ndef é(): pass\n"}, "second needs numpy: "),
        ({"one": "from space.part import third\ndef first(x): return third\n", "part": "from space.one import"
          " first\ndef second(): return first\ndef third(): pass\ndef é(): pass\n"}, "use each other: "),
        ({"one": "import space.part\ndef first(x): return space\n"}, "space.one.first uses space, which"),
        ({"one": "def first(x): return abs\n", "part": "from space.one import first\ndef abs(): pass\n"
          "def second(): return abs()\ndef é(): pass\n"}, "abs is "),
    ],
)  # fmt: skip
def test_impossible_files_are_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(tmp_path, **changes)


# The tokenizer.


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("bytes")
    _, files = written(folder)
    assert {"tokenizer.json", "tokenizer_config.json"} < set(files)
    return PreTrainedTokenizerFast.from_pretrained(folder)


ANY = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
ODD = st.lists(st.sampled_from(["<|endoftext|>", " ", "\r\n", "é", "😀", " ,", "n't"])).map("".join)


@given(text=ANY | ODD)
def test_byte_tokenizer_starts_with_byte_0(byte_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = byte_tokenizer(text).input_ids
    assert ids == [0, *text.encode()]
    assert byte_tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_pads_on_the_left_and_truncates_at_max_seq_len(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    batch = byte_tokenizer(["ab", "abcd"], padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"] == [[0, 0, 0, 97, 98], [0, 97, 98, 99, 100]]
    assert batch["attention_mask"] == [[0, 0, 1, 1, 1], [1] * 5]
    assert len(byte_tokenizer("a" * 200, truncation=True).input_ids) == BYTES.max_seq_len
    assert byte_tokenizer("a", "b").input_ids == [0, 97, 0, 98]
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(byte_tokenizer, name) for name in names] == [0, 0, 0]


def word_pieces(folder: Path, specials: list[str]) -> Path:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the cat and the hat and the bat"] * 3, trainer)
    made.save(str(folder / "given.json"))
    return folder / "given.json"


@pytest.mark.parametrize(
    ("specials", "separator", "name"), [(["<unk>", "</s>"], 1, "</s>"), (["<unk>"], 0, None)], ids=str
)
def test_given_tokenizer_puts_a_separator_before_a_text(
    tmp_path: Path, specials: list[str], separator: int, name: str | None
) -> None:
    given = word_pieces(tmp_path, specials)
    model_config = ModelConfig(vocab_size=300, max_seq_len=64, head_dim=16)
    written(tmp_path / "model", model_config=model_config, tokenizer=given)
    assert {**read(tmp_path / "model/tokenizer.json"), "post_processor": None} == read(given)
    assert read(tmp_path / "model/config.json")["eos_token_id"] == separator
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == (name, name, 64)
    text = "the cat <unk> hat"
    plain = tokenizers.Tokenizer.from_file(str(given))
    plain.encode_special_tokens = True  # in a text they are plain text
    assert tokenizer(text).input_ids == [separator, *plain.encode(text).ids]
    with pytest.raises(InputError, match=r"given.json: \d+ tokens, the model has 256"):
        written(tmp_path / "small", tokenizer=given)


# Settings and weights.


def test_written_files(tmp_path: Path) -> None:
    _, files = written(
        tmp_path / "small", model_config=ModelConfig(vocab_size=61, max_seq_len=96, head_dim=16)
    )
    assert files == ["model.safetensors", "modeling_formfit.py", "generation_config.json", "config.json"]
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == sorted(files)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    assert read(tmp_path / "small/generation_config.json") == ids
    with pytest.raises(ValueError, match="not the weights of architecture"):
        write_hf(tmp_path, {}, MIXED, BYTES, None)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_softmax_model_is_written_as_a_llama(tmp_path: Path, tie_embeddings: bool) -> None:
    space = tiny_space(
        vocab_size=256, max_seq_len=96, tie_embeddings=tie_embeddings, width=[48], depth=[2],
        mixer=["attention"], heads=[4],
        kv_heads=[2], ffn=[32], ratios=["full"],
    )  # fmt: skip
    model, files = written(tmp_path, genome.largest(space), space.config)
    assert "modeling_formfit.py" not in files
    parent = read_parent(tmp_path)
    assert (parent.architecture, parent.model_config) == (model.architecture, space.config)
    for name, value in model.state_dict().items():
        assert torch.equal(parent.weights[name], value), name
    ids = torch.arange(38).view(2, 19)
    with torch.no_grad():
        found = LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits
        assert_close("logits", found, model.double()(ids)[0], TOLERANCE["float32"])
    # The same with empty slots between is the same folder.
    apart = Architecture(48, (Layer(), ATTENTION, Layer(), Layer(), ATTENTION))
    written(tmp_path / "apart", apart, space.config)
    for name in files:
        assert (tmp_path / "apart" / name).read_bytes() == (tmp_path / name).read_bytes(), name


@pytest.mark.parametrize(
    ("layers", "changes"),
    [
        ([Layer(mixer="attention", heads=2, kv_heads=2, ffn=32)], {}),
        ([Layer(mixer="attention", heads=4, kv_heads=1, ffn=32)], {}),
        ([Layer(mixer="attention", heads=4, kv_heads=2, ffn=64)], {}),
        ([Layer(mixer="attention", heads=4, kv_heads=2)], {}),
        ([Layer(ffn=32)], {}),
        ([layer_of("sliding")], {}),
        ([], {"qk_norm": True, "qkv_bias": True}),
    ],
    ids=str,
)
def test_other_architectures_are_not_written_as_a_llama(
    tmp_path: Path, layers: list[Layer], changes: dict[str, Any]
) -> None:
    model_config = ModelConfig(vocab_size=61, max_seq_len=96, head_dim=16, **changes)
    written(tmp_path, Architecture(48, (ATTENTION, *layers)), model_config)
    assert read(tmp_path / "config.json")["model_type"] == "formfit"


def test_width_that_transformers_refuses_is_not_written_as_a_llama(tmp_path: Path) -> None:
    written(tmp_path, Architecture(32, (Layer(mixer="attention", heads=3, kv_heads=3, ffn=32),)))
    assert read(tmp_path / "config.json")["model_type"] == "formfit"


def test_half_precision_casts_only_matrices(tmp_path: Path) -> None:
    model, _ = written(tmp_path)
    full, half = (
        FormfitForCausalLM.from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    wanted = cast_matrices(dict(model.named_parameters()), torch.bfloat16, MIXED)
    assert {n: p.dtype for n, p in half.named_parameters()} == {
        tensor_name(n, tuple(p.shape), MIXED): p.dtype for n, p in wanted.items()
    }
    ids, mask = torch.arange(38).view(2, 19), torch.arange(19) >= torch.tensor([[0], [7]])
    with torch.no_grad():
        expected = full(ids, attention_mask=mask).logits
        assert_close("fp32", expected[:1], model(ids[:1])[0], TOLERANCE["float32"])
        assert_close("bf16", half(ids, attention_mask=mask).logits, expected, HALF)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close("autocast", full(ids, attention_mask=mask).logits, expected, HALF)
    assert half.generate(ids, attention_mask=mask.long(), max_new_tokens=3).shape == (2, 22)


def test_new_model_is_initialised_as_in_formfit() -> None:
    layer = {"mixer": "mamba2", "heads": 4, "kv_heads": 4, "ffn": 32}
    config = FormfitConfig(architecture={"width": 32, "layers": [layer]}, model_config=BYTES.to_json())
    starts = []
    for _ in range(2):
        torch.manual_seed(3)
        starts.append(FormfitForCausalLM(config).state_dict())
    first, second = starts
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert (first["norm"] == 1).all()
    assert (first["layers.0.mixer.o.weight"] == 0).all()
    up, gate = (first[f"layers.0.ffn.{name}.weight"] for name in ("up", "gate"))
    assert 0.9 < up.std() * 32**0.5 < 1.1
    assert not torch.equal(up, gate)


def test_folder_with_other_code_is_not_executed(tmp_path: Path) -> None:
    written(tmp_path)
    assert type(load_hf(tmp_path)).__name__ == "FormfitForCausalLM"
    code = tmp_path / "modeling_formfit.py"
    code.write_text(code.read_text() + "raise SystemExit('executed')\n")
    with pytest.raises(InputError, match="not what this formfit writes"):
        load_hf(tmp_path)


def test_llama_replacing_another_model_has_no_code(tmp_path: Path) -> None:
    written(tmp_path)
    written(tmp_path, Architecture(64, (ATTENTION, ATTENTION)))
    assert not (tmp_path / "modeling_formfit.py").exists()
    assert type(load_hf(tmp_path)).__name__ == "LlamaForCausalLM"
