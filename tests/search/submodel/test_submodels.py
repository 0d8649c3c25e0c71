"""The commands that make sub-models, on a finished run: formats, precisions, limits as picks, tuning."""

import json
from pathlib import Path

import numpy as np
import pytest

from latency import load_card, load_predictor
from search.config import load_run_config
from search.engine.config import SearchConfig, precision_of
from search.engine.devices import open_devices
from search.submodel.decoder import Decoder
from search.submodel.verify import evaluation_data, graph_loss
from space import InputError, genome
from space.cost import params
from supernet.evaluate import evaluate
from supernet.extract import read_submodel
from tests.conftest import Program, Quiet
from tests.search.test_pipeline import ROOT

INT8 = "precision=int8"


def words(folder: Path, *rest: object) -> tuple[object, ...]:
    return ("--devices", folder / "devices", *rest)


def test_a_submodel_in_every_form(formfit: Program, run_folder: Path) -> None:
    out = run_folder / "model"
    done = formfit(
        *words(run_folder, "extract", "--run", run_folder / "run", "--search", "desk", "--pick", "best"),
        *("--format", "onnx", "--format", "hf", "--precision", "int8", "--precision", "int8-dynamic"),
        *("--out", out, "--json"),
    )
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout)["files"]
    assert {"model.onnx", "model.int8.onnx", "model.int8-dynamic.onnx", "hf/config.json"} <= set(files)
    assert all((out / name).exists() for name in files)
    sizes = [(out / f"model{p}.onnx").stat().st_size for p in ("", ".int8", ".int8-dynamic")]
    assert max(sizes[1:]) < sizes[0]

    # What a graph says of itself, and its loss as the plain model has it.
    submodel = read_submodel(out)
    decoder = Decoder(out / "model.int8.onnx")
    assert decoder.metadata["formfit.precision"] == "int8"
    assert decoder.metadata["formfit.trained_length"] == str(submodel.text and submodel.text.length)
    assert json.loads(decoder.metadata["formfit.limits"])[0]["limit"] == "prefill@64<=90%"
    assert "desk" in json.loads(decoder.metadata["formfit.predicted"])["latency"]
    data = evaluation_data(submodel)
    assert data is not None
    weights = dict(submodel.model().named_parameters())
    quality = evaluate(weights, submodel.architecture, submodel.model_config, data)
    assert graph_loss(out / "model.onnx", data) == pytest.approx(quality.loss_nats, abs=1e-5)
    assert abs(graph_loss(out / "model.int8.onnx", data) - quality.loss_nats) < 0.1

    done = formfit(*words(run_folder, "verify", out, "--device", "desk", "--max-noise", 1000, "--json"))
    assert done.returncode in (0, 3), done.stderr
    errors = json.loads(done.stdout)["parity"]["errors"]
    assert max(errors[f"hf_{way}"] for way in ("prefill", "split", "decode")) <= 1e-5
    found = json.loads(done.stdout)["precisions"]
    assert list(found) == ["fp32", "int8", "int8-dynamic"]
    for name, of in found.items():
        suffix = "" if name == "fp32" else f",precision={name}"
        assert set(of["latency_ms"]) == {f"prefill@64{suffix}", f"decode@64{suffix}"}
        assert min(of["latency_ms"].values()) > 0
        assert of["bytes"] == sizes[list(found).index(name)]
        assert abs(of["loss_nats"] - quality.loss_nats) < 0.1
    assert found["fp32"]["loss_nats"] == pytest.approx(quality.loss_nats, abs=1e-5)


def test_a_folder_that_is_used_again_keeps_nothing_of_the_former_model(
    formfit: Program, run_folder: Path
) -> None:
    out = run_folder / "model"
    source = words(run_folder, "extract", "--run", run_folder / "run", "--search", "desk", "--out", out)
    first = formfit(*source, "--pick", "best", "--format", "onnx", "--format", "hf", "--precision", "int8")
    assert first.returncode == 0, first.stderr
    old = (out / "model.int8.onnx").read_bytes()
    assert formfit(*source, "--pick", "fastest").returncode == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "architecture.json",
        "model.safetensors",
    ]
    (out / "model.int8.onnx").write_bytes(old)
    assert formfit("export", out, "--format", "onnx").returncode == 0
    done = formfit(*words(run_folder, "verify", out, "--device", "desk", "--max-noise", 1000))
    assert (done.returncode, done.stdout) == (2, "")
    assert "model.int8.onnx: not of the weights beside it" in done.stderr
    (out / "model.int8.onnx").write_bytes(old[: len(old) // 2])
    done = formfit(*words(run_folder, "verify", out, "--device", "desk", "--max-noise", 1000))
    assert "model.int8.onnx: not a whole graph" in done.stderr


def test_what_is_spoilt_in_a_folder_is_said_in_one_line(formfit: Program, run_folder: Path) -> None:
    out = run_folder / "model"
    source = words(run_folder, "extract", "--run", run_folder / "run", "--search", "desk", "--out", out)
    assert formfit(*source, "--format", "onnx", "--format", "hf").returncode == 0

    def said() -> str:
        done = formfit(*words(run_folder, "verify", out, "--device", "desk", "--max-noise", 1000))
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.count("\n") == 1
        return done.stderr

    weights = (out / "hf" / "model.safetensors").read_bytes()
    (out / "hf" / "model.safetensors").write_bytes(weights[:100])
    assert "hf: transformers cannot load it" in said()
    (out / "hf" / "model.safetensors").unlink()
    assert "hf: transformers cannot load it" in said()
    (out / "hf" / "model.safetensors").write_bytes(weights)
    (out / "hf" / "config.json").write_text("{")
    assert "hf: transformers cannot load it" in said()
    value = json.loads((out / "architecture.json").read_text())
    (out / "architecture.json").write_text(
        json.dumps({**value, "model_config": {**value["model_config"], "max_seq_len": "64"}})
    )
    assert "model_config.max_seq_len: '64' is not a positive integer" in said()
    del value["chosen"]
    (out / "architecture.json").write_text(json.dumps(value))
    assert "has no chosen" in said()
    (run_folder / "file").write_text("x")
    done = formfit(*source[:-1], run_folder / "file")
    assert (done.returncode, done.stdout) == (2, "")
    assert "file: not a folder" in done.stderr


def test_losses_without_their_text_stay_unmeasured(formfit: Program, run_folder: Path) -> None:
    out = run_folder / "model"
    source = (
        "extract",
        "--run",
        run_folder / "run",
        "--search",
        "desk",
        "--format",
        "onnx",
        "--out",
        out,
    )
    assert formfit(*words(run_folder, *source)).returncode == 0
    value = json.loads((out / "architecture.json").read_text())
    value["text"]["data"]["path"] = "/nowhere/at/all"
    (out / "architecture.json").write_text(json.dumps(value))
    done = formfit(*words(run_folder, "verify", out, "--device", "desk", "--max-noise", 1000))
    assert "losses stay UNMEASURED: data.path: /nowhere/at/all" in done.stderr
    verified = json.loads((out / "verify.json").read_text())
    assert verified["precisions"]["fp32"]["loss_nats"] == "UNMEASURED"


def test_a_search_aims_at_int8(formfit: Program, run_folder: Path, text_folder: Path) -> None:
    """Profile, search, extract and verify in int8: the card holds both precisions side by side."""
    run, devices = run_folder / "run", run_folder / "devices"
    config = load_run_config(run / "config.yaml")
    space = run_folder / "space.yaml"
    space.write_text(json.dumps(config.space.model_dump(mode="json")))
    from latency import ProfileConfig
    from latency.profiling import profile

    settings = config.profile.model_dump() | {"precision": "int8", "rss": False}
    profile(config.space, devices, "desk", ProfileConfig.model_validate(settings))
    card = load_card(devices, "desk")
    plain, small = (card.predictor_path("small", "onnxruntime", 1, p) for p in ("fp32", "int8"))
    assert plain.exists()
    predictor = load_predictor(small, config.space, "")
    assert set(map(str, predictor.models)) == {f"prefill@64,{INT8}", f"decode@64,{INT8}"}

    limit = f"prefill@64,{INT8}<=90%"
    memory = f"memory@64,{INT8}<=90%"
    found = formfit(
        *words(run_folder, "search", "--run", run, "--device", "desk", "--limit", limit, "--limit", memory),
        *("--name", "small", "--generations", 2, "--verify", "--max-noise", 1000, "--json"),
    )
    assert found.returncode in (0, 3), found.stderr
    chosen = json.loads(found.stdout)["measured_search"]["chosen"]
    assert [item["limit"] for item in chosen["limits"]] == [limit, memory]
    folder = run / "submodels" / chosen["key"]
    assert (folder / "model.int8.onnx").exists()
    verified = json.loads((folder / "verify.json").read_text())
    assert set(verified["latency"]) == {f"prefill@64,{INT8}", f"decode@64,{INT8}"}
    assert all(item["status"] != "UNMEASURED" for item in verified["limits"])


def test_limits_of_one_device_are_of_one_precision() -> None:
    config = SearchConfig(
        limits=("decode@64<=2ms", f"prefill@64,{INT8}<=2ms", "phone:decode@64,precision=int8<=1s")
    )
    with pytest.raises(InputError, match=r"device desk: .* are of different precisions; give one"):
        precision_of(config, "desk", "desk")
    assert precision_of(config, "phone", "desk") == "int8"
    assert precision_of(SearchConfig(limits=("params<=1M",)), "desk", "desk") is None
    objectives = SearchConfig(objectives=("loss", f"latency:decode@64,{INT8}"))
    assert precision_of(objectives, "desk", "desk") == "int8"


def test_a_precision_that_was_not_profiled_names_the_command(run_folder: Path) -> None:
    config = load_run_config(run_folder / "run" / "config.yaml")
    asked = SearchConfig(limits=("decode@64,precision=int8-dynamic<=60%",))
    with pytest.raises(InputError, match="--device desk --precision int8-dynamic` makes it"):
        open_devices(run_folder / "devices", ["desk"], config.space, config.profile, asked, Quiet())


def test_a_limit_as_a_pick_mixes_the_ffns(formfit: Program, run_folder: Path) -> None:
    run, out = run_folder / "run", run_folder / "mixed"
    config = load_run_config(run / "config.yaml")
    most = params(genome.largest(config.space), config.space.config)
    source = words(run_folder, "extract", "--run", run, "--out", out, "--json")
    done = formfit(*source, "--pick", f"params<={0.8 * most:.0f}", "--format", "onnx")
    assert done.returncode == 0, done.stderr
    submodel = read_submodel(out)
    assert 0.6 * most < params(submodel.architecture, submodel.model_config) <= 0.8 * most
    assert submodel.chosen["picked"]["base"] == genome.largest(config.space).key
    done = formfit(*source, "--pick", "decode@64<=50ms", "--search", "desk", "--format", "onnx")
    assert done.returncode == 0, done.stderr
    done = formfit(*words(run_folder, "verify", out, "--device", "desk", "--max-noise", 1000, "--json"))
    assert [item["limit"] for item in json.loads(done.stdout)["limits"]] == ["decode@64<=50ms"]
    done = formfit(*source, "--pick", "params<=1")
    assert done.returncode == 3
    assert "the least is" in done.stderr


def test_export_goes_on_from_a_folder(formfit: Program, run_folder: Path) -> None:
    out = run_folder / "model"
    source = ("extract", "--run", run_folder / "run", "--search", "desk", "--out", out)
    assert formfit(*words(run_folder, *source)).returncode == 0
    assert not (out / "model.onnx").exists()
    done = formfit("export", out, "--format", "onnx", "--precision", "int8", "--json")
    assert json.loads(done.stdout)["files"] == ["model.onnx", "model.int8.onnx"]
    done = formfit("generate", out, "--prompt", "alpha", "--precision", "int8", "--tokens", 4, "--json")
    assert done.returncode == 0, done.stderr
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(weights[:-100])
    done = formfit("export", out, "--format", "hf")
    assert (done.returncode, done.stdout) == (2, "")
    assert "not a whole weights file" in done.stderr


def test_finetune_from_the_command_line(formfit: Program, run_folder: Path, tmp_path: Path) -> None:
    source = words(run_folder, "extract", "--run", run_folder / "run", "--search", "desk")
    assert formfit(*source, "--out", run_folder / "model").returncode == 0
    text = tmp_path / "text"
    text.mkdir()
    rng = np.random.default_rng(5)
    for i in range(40):
        (text / f"{i}.txt").write_text(
            " ".join(["omega", "sigma", "tau"][j] for j in rng.integers(0, 3, 200))
        )
    asked = (
        *("finetune", run_folder / "model", "--data", text, "--teacher", run_folder / "run"),
        *(
            "--out",
            run_folder / "tuned",
            "--steps",
            20,
            "--held-out",
            0.2,
            "--threads",
            1,
            "--distillation",
            0.1,
        ),
        *("--format", "onnx", "--json"),
    )
    done = formfit(*words(run_folder, *asked))
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["after"]["loss_nats"] < value["before"]["loss_nats"]
    assert value["files"] == ["model.onnx"]
    tuned = read_submodel(run_folder / "tuned")
    data = evaluation_data(tuned)
    assert data is not None
    assert graph_loss(tuned.folder / "model.onnx", data) == pytest.approx(
        value["after"]["loss_nats"], abs=1e-5
    )


BAD = {
    ("extract", "--format", "pdf"): "--format pdf: not one of onnx, hf",
    ("extract", "--precision", "int3"): "--precision int3: not one of fp32, int8, int8-dynamic",
    ("extract", "--precision", "int8"): "--precision int8: only --format onnx has it; give that too",
    ("extract", "--pick", "params<1M"): "'<' is not allowed",
    ("extract", "--pick", "decode@64<=2ms", "--device", "nowhere"): "device nowhere: no card",
    ("extract", "--pick", "decode@99<=2ms"): "outside what was measured",
    ("extract", "--architecture", "x.json", "--search", "desk"): "give one of --search NAME",
}


@pytest.mark.parametrize("given", BAD, ids=lambda given: " ".join(given))
def test_bad_input_gets_one_line_and_writes_nothing(
    formfit: Program, finished_run: Path, tmp_path: Path, given: tuple[str, ...]
) -> None:
    command, *rest = given
    if not {"--search", "--pick"} & set(rest):
        rest += ["--search", "desk"]
    out = tmp_path / "out"
    done = formfit(*words(finished_run, command, "--run", finished_run / "run", "--out", out, *rest))
    assert done.returncode == 2, done.stderr
    assert BAD[given] in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_profile_refuses_a_workload_of_another_precision(formfit: Program, tmp_path: Path) -> None:
    space = ROOT / "configs" / "spaces" / "quickstart.yaml"
    asked = ("--devices", tmp_path, "profile", "--space", space, "--device", "x")
    done = formfit(*asked, "--workload", "decode@64,precision=int8")
    assert "profiling is of fp32; give --precision" in done.stderr
    done = formfit(*asked, "--precision", "int8", "--runtime", "torch")
    assert "precision int8 is not one of fp32" in done.stderr
    done = formfit(*asked, "--precision", "int3")
    assert done.returncode == 2
