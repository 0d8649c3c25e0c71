"""A sub-model's folder for transformers: loaded without formfit, run, generated from, trained."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, Trainer, TrainingArguments

from space import Architecture, Layer, ModelConfig, genome, variation
from space.architecture import has_heads
from space.blocks import Model
from space.mixers import MIXERS
from supernet.hf.export import modelling_file, tensor_name, write_hf
from supernet.hf.modeling import CACHE
from tests.contracts import scatter, tiny_space
from tests.numerics import TOLERANCE, assert_close

FP32 = TOLERANCE["float32"]
SPACE = tiny_space(
    width=[32, 48, 64],
    depth=[3, 4, 5],
    mixer=[*MIXERS, "none"],
    heads=[1, 2, 4],
    kv_heads=[1, 2],
    ffn=[0, 32, 64],
    window=[8, 16],
    ratios=["full", 1, 3, "linear"],
    vocab_size=61,
)
CONFIG = ModelConfig(vocab_size=61, max_seq_len=96, head_dim=16)
LENGTH = 40
WAYS = {"prefill": [LENGTH], "split": [15, 1, LENGTH - 16], "decode": [1] * LENGTH}
MIXTURES = {name: (name,) for name in MIXERS} | {"all of them": MIXERS}

# Runs where formfit cannot be imported: writes each folder's logits, whole and in pieces.
OUTSIDE = """
import json, sys
for name in ("space", "supernet", "latency", "search"):
    sys.modules[name] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

task = json.load(sys.stdin)
text, found = load_file("text")["text"], {}

def run(model, sizes, key="cache"):
    cache, outs = None, []
    with torch.no_grad():
        for piece in torch.split(text, sizes, 1):
            out = model(piece, use_cache=True, **{key: cache} if cache is not None else {})
            cache = out.get("cache", out.get("past_key_values"))
            outs.append(out.logits)
    return torch.cat(outs, 1)

for folder in task["folders"]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for (way, sizes), key in zip(task["ways"].items(), ("cache", "past_key_values", "cache")):
        found[f"{folder}.{way}"] = run(model, sizes, key)
if "said" in task:
    model.save_pretrained("saved")
    saved = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
    llama, tokenizer = AutoModelForCausalLM.from_pretrained("llama"), AutoTokenizer.from_pretrained("llama")
    found |= {"saved": run(saved, [text.shape[1]]), "llama": run(llama, [text.shape[1]])}
    print(json.dumps([type(llama).__name__, tokenizer(task["said"]).input_ids]))
save_file(found, "found")
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer_of(name: str) -> Layer:
    if not has_heads(name):
        return Layer(mixer=name, ffn=32)
    return Layer(mixer=name, heads=4, kv_heads=2, window=8 if name == "sliding" else 0, ffn=32)


def plain(architecture: Architecture, model_config: ModelConfig = CONFIG) -> Model:
    made = Model(architecture, model_config)
    scatter(made)
    return made.requires_grad_(False)


def exact(model: Model, tokens: Tensor) -> Tensor:
    """The plain model's logits in fp64."""
    logits: Tensor = copy.deepcopy(model).double()(tokens)[0]
    return logits


def write(folder: Path, model: Model, tokenizer: Path | None = None) -> list[str]:
    return write_hf(folder, model.state_dict(), model.architecture, model.model_config, tokenizer)


def words(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(1, CONFIG.vocab_size, (batch, length)))


@pytest.fixture(scope="module")
def modeling(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The generated file, imported."""
    path = tmp_path_factory.mktemp("generated") / "modeling_formfit.py"
    path.write_text(modelling_file())
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(modeling: ModuleType, model: Model) -> Any:
    """A plain model as transformers has it."""
    config = modeling.FormfitConfig(
        architecture=model.architecture.to_json(), model_config=model.model_config.to_json()
    )
    made = modeling.FormfitForCausalLM(config).eval()
    made.load_state_dict(renamed(model))
    return made


def renamed(model: Model) -> dict[str, Tensor]:
    """A plain model's parameters under the names of transformers' model."""
    return {
        tensor_name(name, tuple(value.shape), model.architecture): value
        for name, value in model.state_dict().items()
    }


@pytest.fixture(params=MIXTURES)
def pair(request: pytest.FixtureRequest, modeling: ModuleType) -> tuple[Model, Any]:
    model = plain(Architecture(48, tuple(layer_of(name) for name in MIXTURES[request.param])))
    return model, theirs(modeling, model)


# Loaded where there is no formfit.


def outside(folder: Path, models: list[Model], **more: Any) -> tuple[dict[str, Tensor], str]:
    folders = [f"model{i}" for i in range(len(models))]
    for name, model in zip(folders, models, strict=True):
        write(folder / name, model)
    save_file({"text": words(2, LENGTH)}, folder / "text")
    home = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE],
        input=json.dumps({"folders": folders, "ways": WAYS, **more}),
        cwd=folder, env=os.environ | home, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return load_file(folder / "found"), done.stdout


def check_parity(found: dict[str, Tensor], models: list[Model]) -> None:
    for i, model in enumerate(models):
        expected = exact(model, words(2, LENGTH))
        for way in WAYS:
            assert_close(f"{model.architecture.describe()}, {way}", found[f"model{i}.{way}"], expected, FP32)


def sampled(count: int) -> list[Model]:
    genomes = variation.sample(SPACE, np.random.default_rng(13), count)
    return [plain(architecture, SPACE.config) for architecture in genome.decode(SPACE, genomes)]


def test_folders_run_without_formfit(tmp_path: Path) -> None:
    models = sampled(8)
    layers = [layer for model in models for layer in model.architecture.layers]
    assert {layer.mixer for layer in layers} == {*MIXERS, "none"}
    assert any(layer.heads > layer.kv_heads for layer in layers)
    assert any(not layer.present for layer in layers)
    assert any(layer.present and not layer.ffn for layer in layers)

    model_config = ModelConfig(vocab_size=256, max_seq_len=64, head_dim=16, tie_embeddings=False)
    llama = plain(
        Architecture(48, (Layer(), layer_of("attention"), Layer(), layer_of("attention"))), model_config
    )
    assert "modeling_formfit.py" not in write(tmp_path / "llama", llama)
    found, said = outside(tmp_path, models, said="héllo")
    check_parity(found, models)
    assert json.loads(said) == ["LlamaForCausalLM", [0, *"héllo".encode()]]
    assert_close("llama", found["llama"], exact(llama, words(2, LENGTH)), FP32)
    # What fine-tuning saves is as loadable: transformers copies the code too.
    assert torch.equal(found["saved"], found["model7.prefill"])
    assert (tmp_path / "saved/modeling_formfit.py").read_bytes() == (
        tmp_path / "model0/modeling_formfit.py"
    ).read_bytes()
    first, last = (json.loads((tmp_path / of / "config.json").read_text()) for of in ("model7", "saved"))
    assert first.items() <= last.items()


@pytest.mark.slow
def test_fifty_architectures_run_without_formfit(tmp_path: Path) -> None:
    models = sampled(50)
    check_parity(outside(tmp_path, models)[0], models)


# Run in batches, generated from.


def batch_of(lengths: list[int]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Rows of different lengths, and the same padded on the left."""
    rows, longest = [words(1, length, seed=length) for length in lengths], max(lengths)
    ids = torch.cat([F.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return rows, {"input_ids": ids, "attention_mask": mask.long()}


def test_padding_on_the_left_changes_nothing(pair: tuple[Model, Any]) -> None:
    model, hf = pair
    rows, batch = batch_of([LENGTH, 17, 3, 1])
    cache, outs, seen = None, [], 0
    hf.double()
    with torch.no_grad():
        whole = hf(**batch).logits
        for piece in torch.split(batch["input_ids"], [20, 1, 18, 1], 1):
            seen += piece.shape[1]
            out = hf(piece, attention_mask=batch["attention_mask"][:, :seen], past_key_values=cache)
            cache = out[CACHE]
            outs.append(out.logits)
    assert cache.get_seq_length() == LENGTH
    for i, row in enumerate(rows):
        expected = exact(model, row)
        for way, logits in {"whole": whole, "pieces": torch.cat(outs, 1)}.items():
            assert_close(f"row {i}, {way}", logits[i : i + 1, LENGTH - row.shape[1] :], expected, 1e-11)


def greedily(model: Model, row: Tensor, count: int) -> list[int]:
    """The continuation of a row [1, T]: the likeliest token each time, 0 ends."""
    tokens: list[int] = []
    for _ in range(count):
        ended = 0 in tokens
        text = torch.cat([row, torch.tensor([tokens], dtype=row.dtype)], 1)
        tokens.append(0 if ended else int(model(text)[0][0, -1].argmax()))
    return tokens


def test_greedy_generation_takes_the_likeliest_token(pair: tuple[Model, Any]) -> None:
    model, hf = pair
    rows, batch = batch_of([19, 7, 12])
    found = hf.generate(**batch, max_new_tokens=10, do_sample=False)
    assert torch.equal(found, hf.generate(**batch, max_new_tokens=10, do_sample=False, use_cache=False))
    assert found[:, 19:].tolist() == [greedily(model, row, 10) for row in rows]


@pytest.fixture
def mixed(modeling: ModuleType) -> Any:
    return theirs(modeling, plain(Architecture(48, tuple(layer_of(name) for name in MIXERS))))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5},
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True, "top_k": 5},
    ],
    ids=str,
)
def test_generation_options_give_the_same_without_cache(mixed: Any, options: dict[str, Any]) -> None:
    _, batch = batch_of([19, 7])
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(mixed.generate(**batch, max_new_tokens=9, use_cache=use_cache, **options))
    assert len(found[0]) == 2 * options.get("num_return_sequences", 1)
    assert torch.equal(*found)


def test_generation_continues_from_a_cache(mixed: Any) -> None:
    _, batch = batch_of([19, 7])
    for mask in (batch["attention_mask"], torch.ones_like(batch["attention_mask"])):
        options = {"do_sample": False, "return_dict_in_generate": True}
        first = mixed.generate(batch["input_ids"], attention_mask=mask, max_new_tokens=3, **options)
        ids = torch.cat([first.sequences, words(2, 4)], 1)  # five tokens more than the cache has seen
        options |= {"attention_mask": F.pad(mask, (0, 7), value=1), "max_new_tokens": 6}
        rest = mixed.generate(ids, **{CACHE: first[CACHE]}, **options)
        assert torch.equal(rest.sequences, mixed.generate(ids, **options).sequences)
        assert rest[CACHE] is first[CACHE]


def test_cache_rows_are_selected_and_repeated(mixed: Any) -> None:
    ids = words(3, 12)
    with torch.no_grad():
        cache = mixed(ids[:, :9])[CACHE]
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        found = mixed(ids[[2, 2, 0, 0], 9:], cache=cache).logits
        assert_close("rows", found, mixed(ids[[2, 2, 0, 0]]).logits[:, 9:], FP32)


# Trained.


def test_loss_is_next_token_cross_entropy(mixed: Any) -> None:
    ids = words(3, 20)
    labels = ids.clone()
    labels[0, :9] = labels[2, 15:] = -100
    with torch.no_grad():
        logits, wanted = mixed(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        for keep, places in ((0, slice(None)), (2, slice(-2, None)), (torch.tensor([3, 5]), [3, 5])):
            out = mixed(ids, labels=labels, logits_to_keep=keep)
            assert_close("mean", out.loss, F.cross_entropy(logits, wanted), FP32)
            assert_close("kept", out.logits, mixed(ids).logits[:, places], FP32)
            assert_close("kept", mixed(ids, logits_to_keep=keep).logits, out.logits, FP32)
        summed = mixed(ids, labels=labels, num_items_in_batch=7).loss
        assert_close("sum", summed, F.cross_entropy(logits, wanted, reduction="sum") / 7, FP32)
        assert mixed(ids, labels=labels, return_dict=False)[0] == mixed(ids, labels=labels).loss


def test_transformers_trainer_lowers_the_loss(mixed: Any, tmp_path: Path) -> None:
    text = words(8, 24)
    rows = [{"input_ids": row, "labels": row} for row in text]
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=3e-3,
        gradient_accumulation_steps=2, logging_steps=3, save_strategy="no", report_to=[], use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=mixed, args=settings, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0], losses
    assert trainer.evaluate()["eval_loss"] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    again = type(mixed).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(text).logits, mixed.eval()(text).logits)


def test_unsupported_arguments_are_refused(mixed: Any) -> None:
    ids = words(2, 5)
    with pytest.raises(ValueError, match=r"attention_mask: shape \(2, 4\), expected \(2, 5\)"):
        mixed(ids, attention_mask=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="position_ids: formfit models take no such argument"):
        mixed(ids, position_ids=torch.arange(5)[None])
    for cache in ({}, DynamicCache()):
        with pytest.raises(TypeError, match="has no states of these mixers; leave it out in the first call"):
            mixed(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="stateful"):
        mixed.generate(ids[:1], max_new_tokens=2, prompt_lookup_num_tokens=2)
