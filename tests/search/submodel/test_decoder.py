"""Step by step with buffers bound once, going back, and what may not be continued from."""

from pathlib import Path

import numpy as np
import pytest

from search.submodel.decoder import CHUNK, Decoder
from search.submodel.export import export_onnx
from space import Architecture, InputError, Layer
from supernet.extract import write_submodel
from supernet.supernet import Supernet
from tests.contracts import scatter, tiny_space
from tests.numerics import assert_close

SPACE = tiny_space(
    width=[32],
    depth=[1, 2, 3],
    max_seq_len=640,
    mixer=["attention", "sliding", "gated_deltanet", "short_conv", "retnet"],
    heads=[1, 2],
    kv_heads=[1],
    ffn=[0, 32],
    window=[8],
    ratios=["full", 1, "linear"],
)


def layer(mixer: str) -> Layer:
    if mixer == "short_conv":
        return Layer(mixer=mixer, ffn=32)
    return Layer(mixer=mixer, heads=2, kv_heads=1, window=8 if mixer == "sliding" else 0, ffn=32)


def exported(folder: Path, *mixers: str) -> Path:
    supernet = Supernet(SPACE)
    scatter(supernet)
    architecture = Architecture(32, tuple(layer(mixer) for mixer in mixers))
    return export_onnx(write_submodel(folder, supernet, architecture, {}, {}))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("mixed"), "attention", "sliding", "gated_deltanet")


def test_a_long_prompt_is_read_in_chunks(mixed: Path) -> None:
    decoder, text = Decoder(mixed), np.random.default_rng(0).integers(0, 19, 2 * CHUNK + 3)
    whole, _ = decoder(text[None], decoder.start())
    last, state = decoder.read(text.tolist(), decoder.start())
    assert state.position == len(text)
    assert_close("logits", last, whole[0, -1], 1e-5)


@pytest.mark.parametrize("start", [0, 3, 20])
def test_an_earlier_state_goes_on_as_if_nothing_had_followed(mixed: Path, start: int) -> None:
    """Before and after the window is full: the states are then new, or in buffers that take turns."""
    text = np.random.default_rng(1).integers(0, 19, (1, 60))
    whole, _ = (decoder := Decoder(mixed, num_kept_states=5))(text, decoder.start())
    states = [decoder.start()]
    for t in range(start + 5):
        states.append(decoder(text[:, t : t + 1], states[-1])[1])
    for back in (5, 4, 2):
        other = (text[:, start + 5 - back : start + 6 - back] + 1) % 19
        decoder(other, states[-1 - back])  # what is taken back
        states = states[: len(states) - back]
        while len(states) <= start + 5:
            t = states[-1].position
            logits, state = decoder(text[:, t : t + 1], states[-1])
            assert_close(f"token {t}", logits[0, 0], whole[0, t], 1e-5)
            states.append(state)


def test_a_state_whose_buffers_were_taken_is_refused(mixed: Path) -> None:
    decoder = Decoder(mixed, num_kept_states=1)
    state = old = decoder.read(list(range(10)), decoder.start())[1]
    for _ in range(4):
        state = decoder(np.array([[1]]), state)[1]
        old = old if old.slot else state
    with pytest.raises(RuntimeError, match="no longer kept"):
        decoder(np.array([[1]]), old)
    decoder.start()
    with pytest.raises(RuntimeError, match="no longer kept"):
        decoder(np.array([[1]]), state)


def test_attention_alone_is_cut_back_by_its_position(tmp_path: Path, mixed: Path) -> None:
    assert not Decoder(mixed).is_rewindable
    decoder = Decoder(exported(tmp_path, "attention", "attention"))
    assert decoder.is_rewindable
    text = np.random.default_rng(2).integers(0, 19, (1, 30))
    whole, _ = decoder(text, decoder.start())
    _, state = decoder(np.concatenate([text[:, :20], text[:, :5]], axis=1), decoder.start())
    rest, _ = decoder(text[:, 20:], decoder.rewind(state, 20))
    assert_close("logits", rest, whole[:, 20:], 1e-5)


def test_a_batch_decodes_as_its_rows(mixed: Path) -> None:
    text = np.random.default_rng(3).integers(0, 19, (3, 24))
    decoder = Decoder(mixed)
    steps = []
    _, state = decoder(text[:, :12], decoder.start(batch=3))
    for t in range(12, 24):
        logits, state = decoder(text[:, t : t + 1], state)
        steps.append(logits)
    for row in range(3):
        alone, _ = decoder(text[row : row + 1], decoder.start())
        assert_close(f"row {row}", np.concatenate(steps, 1)[row], alone[0, 12:], 1e-5)


def test_more_than_the_context_is_refused(mixed: Path) -> None:
    decoder = Decoder(mixed)
    with pytest.raises(InputError, match="641 tokens are more than the model's context of 640"):
        decoder(np.zeros((1, 641), np.int64), decoder.start())


def test_what_is_no_model_of_ours_is_refused(tmp_path: Path, mixed: Path) -> None:
    import onnx

    with pytest.raises(InputError, match="not found; `formfit extract"):
        Decoder(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match="cannot run it"):
        Decoder(tmp_path / "model.onnx")
    model = onnx.load(mixed)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="not a model that formfit exported"):
        Decoder(tmp_path / "model.onnx")
