"""Text from exported models: the plain model's own choices, with a draft or without; the command."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from scipy.special import softmax
from tokenizers import decoders, models, pre_tokenizers

from search.submodel.decoder import Decoder
from search.submodel.export import export_onnx
from search.submodel.generation import (
    DraftStatistics,
    Sampling,
    StreamingTokenizer,
    choose,
    generate,
    near_tie,
    probabilities,
    speculate,
)
from space import Architecture, Layer, Space, genome
from supernet.data.corpus import DataConfig
from supernet.data.tokenizer import load_tokenizer
from supernet.extract import SubModel, write_submodel
from supernet.extract import Text as TrainedOn
from supernet.supernet import Supernet
from tests.conftest import Program
from tests.contracts import scatter, tiny_space

CHANGES = {
    "vocab_size": 256,
    "max_seq_len": 96,
    "width": [32],
    "depth": [1, 2, 3],
    "mixer": ["attention", "sliding", "linear", "gated_deltanet", "mamba2", "short_conv", "none"],
    "heads": [1, 2],
    "kv_heads": [1],
    "ffn": [0, 32],
    "window": [8],
    "ratios": ["full", 1, "linear"],
}
SPACE = tiny_space(**CHANGES)
GREEDY = Sampling()


def layer(mixer: str) -> Layer:
    if mixer == "short_conv":
        return Layer(mixer=mixer, ffn=32)
    return Layer(mixer=mixer, heads=2, kv_heads=1, window=8 if mixer == "sliding" else 0, ffn=32)


def submodel_of(folder: Path, *mixers: str, space: Space = SPACE, seed: int = 0) -> SubModel:
    supernet = Supernet(space)
    scatter(supernet, seed)
    text = TrainedOn(data=DataConfig(), length=64, windows=4)
    layers = (*map(layer, mixers), *[Layer()] * (3 - len(mixers)))
    submodel = write_submodel(folder, supernet, Architecture(32, layers), {}, {}, text)
    export_onnx(submodel)
    return submodel


def plain_greedy(submodel: SubModel, prompt: list[int], most: int) -> list[int]:
    """The likeliest tokens by the plain model, which reads the whole text anew for each."""
    model, tokens = submodel.model(), list(prompt)
    with torch.no_grad():
        for _ in range(most):
            tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    return tokens[len(prompt) :]


MODELS = {
    "attention": ("attention", "attention"),
    "hybrid": ("gated_deltanet", "attention", "sliding"),
    "linear": ("mamba2", "linear", "short_conv"),
    "windows": ("sliding", "gated_deltanet"),
}


@pytest.fixture(scope="module", params=MODELS, ids=MODELS)
def submodel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SubModel:
    return submodel_of(tmp_path_factory.mktemp("model"), *MODELS[request.param])


@pytest.mark.parametrize("prompt", [[0], [0, 104, 105], list(range(40, 80))], ids=len)
def test_greedy_tokens_are_the_plain_models(submodel: SubModel, prompt: list[int]) -> None:
    found = list(generate(Decoder(submodel.folder / "model.onnx"), prompt, 30, GREEDY, None))
    assert found == plain_greedy(submodel, prompt, 30)


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 4, 7])
@pytest.mark.parametrize("draft", [("gated_deltanet",), ("attention",), ("short_conv", "sliding")], ids=str)
def test_a_draft_changes_nothing(
    submodel: SubModel, draft: tuple[str, ...], num_draft_tokens: int, tmp_path: Path
) -> None:
    """A draft of the same supernet: some proposals are right and some wrong."""
    prompt, path = [0, 5, 77, 31], submodel.folder / "model.onnx"
    small = submodel_of(tmp_path, *draft)
    expected = list(generate(Decoder(path), prompt, 60, GREEDY, None))
    counts = DraftStatistics()
    decoder, theirs = (
        Decoder(path),
        Decoder(small.folder / "model.onnx", num_kept_states=num_draft_tokens + 1),
    )
    found = list(speculate(decoder, theirs, prompt, 60, None, num_draft_tokens, counts))
    assert found == expected
    assert 0 <= counts.accepted <= counts.proposed
    assert counts.proposed <= counts.rounds * num_draft_tokens
    assert len(found) == 60


def test_a_draft_that_is_the_model_is_always_right(submodel: SubModel) -> None:
    path, counts = submodel.folder / "model.onnx", DraftStatistics()
    found = speculate(Decoder(path), Decoder(path, num_kept_states=5), [0, 9], 40, None, 4, counts)
    assert len(list(found)) == 40
    assert counts.accepted == counts.proposed == 4 * counts.rounds


def test_a_text_ends_at_the_stop_token_and_at_the_context(submodel: SubModel, tmp_path: Path) -> None:
    path, prompt = submodel.folder / "model.onnx", [0, 60]
    small = submodel_of(tmp_path, "linear").folder / "model.onnx"
    whole = list(generate(Decoder(path), prompt, 200, GREEDY, None))
    assert len(whole) == 96 - 2 + 1  # the last one is never read
    counts = DraftStatistics()
    assert (
        list(speculate(Decoder(path), Decoder(small, num_kept_states=5), prompt, 200, None, 4, counts))
        == whole
    )
    stop = whole[20]
    first = whole[: whole.index(stop)]
    assert list(generate(Decoder(path), prompt, 200, GREEDY, stop)) == first
    assert (
        list(speculate(Decoder(path), Decoder(small, num_kept_states=5), prompt, 200, stop, 4, counts))
        == first
    )


@pytest.mark.parametrize("prompt", [[0, 60], list(range(40, 80))], ids=len)
def test_where_the_drafts_context_ends_the_model_goes_on_alone(
    submodel: SubModel, prompt: list[int], tmp_path: Path
) -> None:
    small = submodel_of(tmp_path, "linear", space=tiny_space(**{**CHANGES, "max_seq_len": 32}))
    path, counts = submodel.folder / "model.onnx", DraftStatistics()
    expected = list(generate(Decoder(path), prompt, 50, GREEDY, None))
    draft = Decoder(small.folder / "model.onnx", num_kept_states=5)
    assert list(speculate(Decoder(path), draft, prompt, 50, None, 4, counts)) == expected
    assert bool(counts.proposed) == (len(prompt) < 32)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-9])
def test_what_is_drawn_from(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32) * 2
    found = probabilities(logits, Sampling(temperature=temperature, top_p=top_p))
    exact = softmax(logits.astype(np.float64) / temperature)
    kept: list[int] = []
    for token in sorted(range(50), key=lambda i: -exact[i]):  # the fewest that reach the share
        if sum(exact[kept]) < top_p:
            kept.append(token)
    expected = np.zeros(50)
    expected[kept] = exact[kept] / exact[kept].sum()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_least_temperature_is_greedy() -> None:
    found = probabilities(np.array([1.0, 3.0, 2.0]), Sampling(temperature=1e-320))
    assert found.tolist() == [0.0, 1.0, 0.0]


def test_draws_have_the_frequencies() -> None:
    logits = np.array([1.0, 0.0, -1.0, 2.0])
    rng, sampling = np.random.default_rng(1), Sampling(temperature=0.8, top_p=0.95)
    drawn = np.bincount([choose(logits, sampling, rng) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(drawn, probabilities(logits, sampling), atol=0.015)


def test_the_seed_decides_what_is_drawn(submodel: SubModel) -> None:
    path = submodel.folder / "model.onnx"

    def drawn(seed: int) -> list[int]:
        return list(generate(Decoder(path), [0], 20, Sampling(temperature=1.0, seed=seed), None))

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_near_ties_are_seen() -> None:
    assert near_tie(np.array([1.0, 3.0, 2.99995]))
    assert not near_tie(np.array([1.0, 3.0, 2.9998]))


def test_bytes_become_text_when_characters_are_whole() -> None:
    text = StreamingTokenizer(None)
    assert text.encode("hé") == [0, 104, 195, 169]
    assert [text.feed(token) for token in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert text.feed(0xFF) == "\ufffd"
    assert text.feed(0xC3) == ""
    assert text.end() == "\ufffd"


def make_tokenizer(path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab_size = {"<|endoftext|>": 0, **{piece: i + 1 for i, piece in enumerate(alphabet)}}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab_size, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(path))


def test_pieces_become_text_too(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    text = StreamingTokenizer(tokenizer)
    ids = text.encode("aé €")
    assert ids[0] == 0
    assert "".join(text.feed(token) for token in ids[1:]) == "aé €"


def test_what_goes_on_keeps_the_space_of_its_first_piece(tmp_path: Path) -> None:
    """As SentencePiece has it: a text's first piece loses the space that it stands for."""
    vocab_size = {"<s>": 0, "\u2581hello": 1, "\u2581world": 2}
    made = tokenizers.Tokenizer(models.WordLevel(vocab_size, "<s>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    text = StreamingTokenizer(load_tokenizer(tmp_path / "tokenizer.json"))
    assert text.encode("hello")[1:] == [1]
    assert text.feed(2) == " world"


# The command.


def byte_fallback(path: Path, *pieces: str) -> StreamingTokenizer:
    """A tokenizer of Llama's style, in which a token may be a byte of a character."""
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.save(str(path / "tokenizer.json"))
    return StreamingTokenizer(load_tokenizer(path / "tokenizer.json"))


def streamed(text: StreamingTokenizer, tokens: list[int]) -> str:
    return "".join([*map(text.feed, tokens), text.end()])


def test_bytes_that_are_no_character_do_not_end_a_text(tmp_path: Path) -> None:
    text = byte_fallback(tmp_path, "<0x41>", "<0xFF>", "▁a")
    for tokens in itertools.product(range(3), repeat=6):
        text = StreamingTokenizer(text.tokenizer)
        given = streamed(text, list(tokens))
        assert given.count("a") == tokens.count(2)
        assert ("\ufffd" in given) == (1 in tokens)
    text = StreamingTokenizer(text.tokenizer)
    text.encode("AA")
    assert streamed(text, [0, 1, 2, 0]) == "A\ufffd aA"


def test_a_character_that_is_left_open_is_shown(tmp_path: Path) -> None:
    text = byte_fallback(tmp_path, "a", "<0xE6>", "<0x97>", "<0xA5>")
    assert [*map(text.feed, [0, 1, 2, 3, 0])] == ["a", "", "", "日", "a"]
    assert [*map(text.feed, [0, 1, 2])] == ["a", "", ""]
    assert text.end() == "\ufffd\ufffd"
    assert text.end() == ""
    level = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate("aæĹ¥")}, []))
    level.decoder = decoders.ByteLevel()
    level.save(str(tmp_path / "level.json"))
    text = StreamingTokenizer(load_tokenizer(tmp_path / "level.json"))
    assert [*map(text.feed, [0, 1, 2, 3, 0, 1])] == ["a", "", "", "日", "a", ""]
    assert text.end() == "\ufffd"


@pytest.mark.parametrize("seed", range(4))
def test_streamed_text_is_the_decoded_text(seed: int, tmp_path: Path) -> None:
    """Whole characters, in any order, as the library decodes all at once."""
    words = ["▁a", "b", "▁日", "▁", "é", "▁the"]
    spelled = [f"<0x{byte:02X}>" for byte in "ñ日😀".encode()]
    text = byte_fallback(tmp_path, *words, *dict.fromkeys(spelled))
    ids = {piece: i for i, piece in enumerate([*words, *dict.fromkeys(spelled)])}
    groups = [[ids[word]] for word in words]
    groups += [[ids[f"<0x{byte:02X}>"] for byte in character.encode()] for character in "ñ日😀"]
    rng = np.random.default_rng(seed)
    tokens = [0, *(token for i in rng.integers(len(groups), size=200) for token in groups[i])]
    assert text.tokenizer
    assert streamed(text, tokens) == text.tokenizer.library.decode(tokens)


def test_any_tokens_can_be_streamed(tmp_path: Path) -> None:
    pieces = ["▁a", "b", *(f"<0x{byte:02X}>" for byte in range(256)), "</s>"]
    text = byte_fallback(tmp_path, *pieces)
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert isinstance(streamed(text, rng.integers(len(pieces) + 3, size=100).tolist()), str)


def test_generate_streams_and_says_how_fast(formfit: Program, submodel: SubModel) -> None:
    done = formfit("generate", submodel.folder, "--prompt", "def f", "--tokens", 20, "--ignore-eos")
    assert done.returncode == 0, done.stderr
    expected = bytes(plain_greedy(submodel, [0, *b"def f"], 20)).decode(errors="replace")
    assert done.stdout == expected + "\n"
    assert "20 tokens, " in done.stderr


def test_generate_as_json_with_a_draft(formfit: Program, submodel: SubModel, tmp_path: Path) -> None:
    submodel_of(tmp_path / "draft", "linear")
    words = ("generate", submodel.folder, "--prompt", "x", "--tokens", 30, "--ignore-eos", "--json")
    plain = json.loads(formfit(*words).stdout)
    done = json.loads(formfit(*words, "--draft", tmp_path / "draft", "--draft-tokens", 3).stdout)
    assert plain["draft"] is None
    assert done["text"] == plain["text"]
    assert done["draft"]["proposed"] > 0
    assert done["draft"]["acceptance"] == done["draft"]["accepted"] / done["draft"]["proposed"]
    assert (done["tokens"], done["prompt_tokens"]) == (30, 2)


def test_a_prompt_may_be_a_file(formfit: Program, submodel: SubModel, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("import os")
    words = ("generate", submodel.folder, "--tokens", 8, "--ignore-eos")
    given = formfit(*words, "--prompt", "import os").stdout
    assert formfit(*words, "--prompt-file", tmp_path / "prompt.txt").stdout == given


def test_generate_runs_without_torch(submodel: SubModel) -> None:
    script = (
        "import sys; sys.modules['torch'] = None; sys.modules['onnx'] = None; from search.cli import main; "
        f"sys.argv = ['formfit', 'generate', {str(submodel.folder)!r}, '--prompt', 'a', '--tokens', '4', "
        "'--ignore-eos', '--json']; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 4


def test_a_length_beyond_training_is_warned_of(formfit: Program, submodel: SubModel) -> None:
    done = formfit("generate", submodel.folder, "--prompt", "a" * 60, "--tokens", 8)
    assert done.returncode == 0
    assert "trained on sequences of 64 tokens, and this one may have 69" in done.stderr
    done = formfit("generate", submodel.folder, "--prompt", "a" * 60, "--tokens", 100)
    assert "100 new tokens do not fit: context 96, prompt 61; at most 36" in done.stderr


BAD = {
    ("--prompt", "a" * 96): "a prompt of 97 tokens is longer than the model's context of 96",
    (): "give one of --prompt TEXT and --prompt-file FILE",
    ("--prompt", "a", "--prompt-file", "b"): "give one of --prompt TEXT and --prompt-file FILE",
    ("--prompt-file", "nowhere.txt"): "--prompt-file nowhere.txt: cannot be read as UTF-8 text",
    ("--prompt", "a", "--precision", "int3"): "--precision int3: not one of fp32, int8, int8-dynamic",
    ("--prompt", "a", "--precision", "int8"): "--format onnx --precision int8` writes it",
    ("--prompt", "a", "--top-p", "0"): "--top-p 0.0: a share above 0, at most 1",
    ("--prompt", "a", "--draft", "nowhere"): "nowhere/model.onnx: not found",
    ("--prompt", "a", "--draft", ".", "--temperature", "1"): "--draft takes the most likely token",
    ("--prompt", "a\udcff"): "--prompt: not UTF-8 text",
    ("--prompt", "a", "--draft", ".", "--precision", "int8-dynamic"): "--draft: not with int8-dynamic",
    ("--prompt", "a", "--threads", "100000"): "--threads 100000: this process may use",
    ("--prompt", "a", "--tokens", "0"): "Invalid value for '--tokens'",
}


@pytest.mark.parametrize("words", BAD, ids=lambda words: " ".join(words)[:40])
def test_bad_input_gets_one_line(formfit: Program, submodel: SubModel, words: tuple[str, ...]) -> None:
    done = formfit("generate", submodel.folder, *words)
    assert done.returncode == 2
    assert BAD[words] in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_folder_without_a_model(formfit: Program, tmp_path: Path) -> None:
    done = formfit("generate", tmp_path, "--prompt", "a")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == f"formfit: {tmp_path}/model.onnx: not found; `formfit extract --format onnx` writes it\n"
    )


def test_a_draft_of_other_tokens_is_refused(formfit: Program, submodel: SubModel, tmp_path: Path) -> None:
    other = tiny_space(**{**CHANGES, "vocab_size": 300})
    submodel_of(tmp_path, "linear", space=other)
    done = formfit("generate", submodel.folder, "--prompt", "a", "--draft", tmp_path)
    assert done.returncode == 2
    assert f"--draft {tmp_path}: a vocabulary of 300, that of {submodel.folder} is 256" in done.stderr


def test_the_tokenizer_goes_with_the_model(formfit: Program, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "given.json")
    space = tiny_space(**{**CHANGES, "vocab_size": 257})
    supernet = Supernet(space)
    scatter(supernet)
    data = DataConfig(tokenizer=tmp_path / "given.json")
    folder = tmp_path / "model"
    submodel = write_submodel(
        folder, supernet, genome.smallest(space), {}, {}, TrainedOn(data=data, length=64, windows=4)
    )
    export_onnx(submodel)
    words = ("generate", folder, "--prompt", "ab", "--tokens", 5, "--json")
    found = json.loads(formfit(*words).stdout)
    assert found["prompt_tokens"] == 3
    (folder / "tokenizer.json").write_text("{}")
    assert "not the tokenizer that the model was trained with" in formfit(*words).stderr
    (folder / "tokenizer.json").unlink()
    done = formfit(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "tokenizer.json: missing, and the model cannot read text without it" in done.stderr
