"""From a model to a smaller, documented one, through the real command line."""

import json
import shutil
import weakref

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import kdtool
from kdtool import lazy
from kdtool.compressors import layers
from tests import tiny
from tests.pipelines.conftest import QUICK, start, wait


def test_compresses_and_recovers_as_a_process(models, data, tmp_path):
    out = tmp_path / "out"
    done = wait(
        start(
            "compress", models("bert"), "--method", "layers,width", "--set", "method.layers.keep=0.5",
            "-d", data("text"), "--recover", "2", "-o", out, "--json", "--fail-under", "accuracy=0.0",
            "--set", "eval.latency=false", "--offline", folder=tmp_path,
        )
    )  # fmt: skip
    assert done.code == 0, done.err
    answer = done.answer
    assert answer["command"] == "compress"
    assert [stage["name"] for stage in answer["stages"]] == ["layers", "width"]
    assert answer["model"]["parameters"] < answer["teacher"]["parameters"]
    assert answer["steps"] == 2
    assert answer["reload"]["passed"]
    assert {"student", "teacher", "retention"} <= answer["metrics"].keys()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (2, 16)
    assert not (out / ".kdtool").exists()
    assert "## Stages" in (out / "report.md").read_text()
    assert json.loads((out / "kdtool.json").read_text())["recovery"] == {"method": "kd", "steps": 2}


def test_without_data_sizes_alone_are_compared(cli, models, tmp_path):
    done = cli("compress", models("llama"), "--method", "low-rank", "-o", tmp_path / "o", "--json", "--offline", *QUICK)
    assert done.code == 0, done.err
    assert done.answer["metrics"]["student"] == {}
    model = kdtool.load(tmp_path / "o")
    assert type(model).__name__ == "CompressedForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == done.answer["model"]["parameters"]


def test_the_manifest_repeats_the_run(cli, models, tmp_path):
    first = ["compress", models("vit"), "--method", "width", "--set", "method.ffn=0.25", "--offline", *QUICK]
    assert cli(*first, "-o", tmp_path / "a").code == 0
    again = cli("compress", "-c", tmp_path / "a" / "kdtool.json", "-o", tmp_path / "b")
    assert again.code == 0, again.err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_missed_gate_keeps_the_result(cli, models, data, tmp_path):
    done = cli(
        "compress", models("bert"), "--method", "layers", "-d", data("text"), "-o", tmp_path / "o",
        "--fail-under", "accuracy=1.0", "--offline", *QUICK,
    )  # fmt: skip
    assert done.code == 3
    assert (tmp_path / "o" / "model.safetensors").is_file()


def test_a_collapse_stops_the_run(cli, models, tmp_path, monkeypatch):
    def ruin(loaded, config, context):
        made = compress(loaded, config, context)
        for parameter in made.model.classifier.parameters():
            parameter.data.zero_()
        return made

    compress = layers.compress
    monkeypatch.setattr(layers, "compress", ruin)
    done = cli("compress", models("bert"), "--method", "layers", "-o", tmp_path / "o", "--offline", *QUICK)
    assert done.code == 1
    assert "collapsed in the stage 'layers'" in done.problem
    assert not (tmp_path / "o").exists()


def test_dry_run_names_the_stages(cli, models, tmp_path):
    done = cli("compress", models("bert"), "--method", "layers,width", "-o", tmp_path / "o", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert [stage["name"] for stage in done.answer["plan"]["stages"]] == ["layers", "width"]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("recover", [[], ["--recover", "1"]])
def test_weights_stay_in_their_number_format(cli, models, data, tmp_path, recover):
    shutil.copytree(models("bert"), tmp_path / "half")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "half")
    model.half().save_pretrained(tmp_path / "half")
    done = cli(
        "compress", tmp_path / "half", "--method", "layers", "-d", data("text"), *recover, "-o", tmp_path / "o",
        "--json", "--offline", *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert {value.dtype for value in load_file(tmp_path / "o" / "model.safetensors").values()} == {torch.float16}
    assert done.answer["model"]["bytes"] < done.answer["teacher"]["bytes"]


def test_recovers_before_what_training_would_undo(cli, models, data, tmp_path):
    done = cli(
        "compress", models("bert"), "--method", "layers,vocab,quantize", "-d", data("text"), "--recover", "2",
        "--set", "recover.settings.temperature=3", "-o", tmp_path / "o", "--json", "--offline", *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert [stage["name"] for stage in done.answer["stages"]] == ["layers", "vocab", "quantize"]
    manifest = json.loads((tmp_path / "o" / "kdtool.json").read_text())
    assert manifest["recovery"] == {"method": "kd", "steps": 2}
    assert manifest["config"]["recover"]["settings"] == {"temperature": 3}
    evaluated = cli("evaluate", tmp_path / "o", "-d", data("text"), "--json", "--offline", *QUICK)
    assert evaluated.answer["metrics"]["student"] == done.answer["metrics"]["student"]
    assert evaluated.answer["model"] == done.answer["model"]
    again = cli(
        "distill", models("bert"), "--student", tmp_path / "o", "--method", "kd", "-d", data("text"),
        "-o", tmp_path / "p", "--offline",
    )  # fmt: skip
    assert again.code == 2
    assert "quantised" in again.problem


@pytest.mark.parametrize(
    ("model", "source", "method", "budget"),
    [
        ("bert", "text", "vocab,low-rank", "parameters=0.7"),
        ("llama", "plain", "layers,quantize", "bytes=0.3"),
        ("vit", "images", "layers", "latency=0.9"),
    ],
)
def test_finds_settings_that_meet_a_budget(cli, models, data, tmp_path, model, source, method, budget):
    done = cli(
        "compress", models(model), "--method", method, "-d", data(source), "--budget", budget, "-o", tmp_path / "o",
        "--json", "--offline", "--set", "search.notches=3", "--set", "data.max_length=16", *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.err
    quantity, share = budget.split("=")
    found = done.answer["search"]
    assert found["budget"] == budget
    last = [point for point in found["points"] if point["taken"]][-1]
    assert last["share"] <= float(share)
    assert found["points"][0]["taken"]
    if quantity == "parameters":
        assert done.answer["model"]["parameters"] == last["parameters"]
        assert done.answer["model"]["parameters"] <= float(share) * done.answer["teacher"]["parameters"]
    report = (tmp_path / "o" / "report.md").read_text()
    assert f"## Search for {budget}" in report
    manifest = json.loads((tmp_path / "o" / "kdtool.json").read_text())
    assert manifest["search"]["settings"].keys() == set(method.split(","))


def test_a_vocabulary_that_lost_only_unused_tokens_scores_the_same(cli, models, data, tmp_path):
    done = cli(
        "compress", models("llama"), "--method", "vocab", "-d", data("plain"), "-o", tmp_path / "o", "--json",
        "--offline", "--set", "data.max_length=16", *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.answer["stages"][0]["relative_error"] < 1e-6
    assert done.answer["metrics"]["student"].keys() == done.answer["metrics"]["teacher"].keys()


def test_each_model_writes_and_is_read_with_its_own_tokens(cli, models, tmp_path):
    rows = tiny.prompt_data(tmp_path / "rows")
    metrics = ["--metrics", "loss,chrf", "--set", "eval.max_new_tokens=6", "--offline", "--json", *QUICK]
    done = cli("compress", models("llama"), "--method", "vocab", "-d", rows, "-o", tmp_path / "o", *metrics)
    assert done.code == 0, done.err
    for side, model in (("teacher", models("llama")), ("student", tmp_path / "o")):
        alone = cli("evaluate", model, "-d", rows, *metrics)
        assert alone.code == 0, alone.err
        assert done.answer["metrics"][side] == pytest.approx(alone.answer["metrics"]["student"]), side


SHARDS = ["--set", "output.max_shard_size=8KB", "--set", "runtime.stream=always"]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("layers", ["--set", "method.layers=0,2"]),
        ("vocab,quantize", ["--set", "method.quantize.scheme=int4"]),
        ("sparse", ["--set", "method.score=magnitude"]),
        ("average", []),
    ],
)
def test_weight_by_weight_makes_what_memory_makes(cli, models, data, tmp_path, method, settings):
    if method == "average":
        settings = ["--set", f"method.models=[{models('llama')}]"]
    common = ["compress", models("llama"), "--method", method, *settings, "-d", data("plain"), "--offline"]
    whole = cli(*common, "-o", tmp_path / "whole", *QUICK)
    streamed = cli(*common, *SHARDS, "-o", tmp_path / "streamed", "--json")
    assert (whole.code, streamed.code) == (0, 0), whole.err + streamed.err
    assert "not compared" in streamed.answer["checked"]
    assert "were not compared" in (tmp_path / "streamed" / "report.md").read_text()
    assert len(list((tmp_path / "streamed").glob("model-*.safetensors"))) > 1
    one, other = (kdtool.load(tmp_path / name).state_dict() for name in ("whole", "streamed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    tokenizers = [transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("whole", "streamed")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


@pytest.mark.parametrize("method", ["layers,quantize", "sparse"])
def test_one_weight_is_held_at_a_time(cli, models, tmp_path, monkeypatch, method):
    """The run under a limit of memory is tests/benchmarks/compress_streaming.py; here weights are counted."""
    held, most, largest, total = [], 0, 0, 0
    reader = lazy._reader

    def counting(path, name):
        load = reader(path, name)

        def counted():
            nonlocal most, largest, total
            value = load()
            held.append(weakref.ref(value))
            sizes = [found.numel() for found in (one() for one in held) if found is not None]
            most, largest, total = max(most, sum(sizes)), max(largest, value.numel()), total + value.numel()
            return value

        return counted

    monkeypatch.setattr(lazy, "_reader", counting)
    done = cli("compress", models("llama"), "--method", method, *SHARDS, "-o", tmp_path / "o", "--offline")
    assert done.code == 0, done.err
    assert most <= 2 * largest  # one that was written, and the one after it
    assert total > 5 * largest


def test_a_number_format_is_changed_weight_by_weight(cli, models, tmp_path):
    common = ["export", models("llama"), "--set", "output.dtype=float16", "--offline"]
    streamed = cli(*common, *SHARDS, "-o", tmp_path / "streamed", "--json")
    assert streamed.code == 0, streamed.err
    assert streamed.answer["dtype"] == "float16"
    one, other = (kdtool.load(folder).state_dict() for folder in (models("llama"), tmp_path / "streamed"))
    assert all(torch.equal(value.half(), other[name]) for name, value in one.items())
    assert {value.dtype for value in other.values()} == {torch.float16}


def test_weights_that_are_not_finite_are_refused_weight_by_weight(cli, models, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(models("llama"), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    done = cli("compress", broken, "--method", "layers", *SHARDS, "-o", tmp_path / "o", "--offline")
    assert done.code == 1
    assert "'model.norm.weight' is not finite" in done.problem
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "layer"], "unknown compressor 'layer'"),
        (["--method", "layers", "--set", "method.kep=1"], "unknown key 'method.kep' for layers"),
        (["--method", "layers,width", "--set", "method.ffn=1"], "unknown key 'method.ffn'"),
        (["--method", "layers,layers"], "comes twice"),
        (["--method", "layers", "--recover", "3"], "--recover trains on data"),
        (["--method", "layers", "--fail-under", "accuracy=1"], "needs something to measure on"),
        (["--method", "width", "--set", "method.heads=1.5"], "less than or equal to 1"),
        (["--method", "vocab"], "vocab looks at data"),
        (["--method", "layers", "--budget", "size=0.5"], "not of the form parameters=0.5"),
        (["--method", "layers", "--budget", "parameters=50"], "not of the form"),
        (["--method", "sparse", "--budget", "bytes=0.5"], "no setting to search"),
        (["--method", "layers", "--set", "method.keep=0.5", "--budget", "bytes=0.5"], "no open setting"),
        (["--method", "quantize", "--budget", "parameters=0.5"], "no open setting that changes parameters"),
        (["--method", "layers", "--budget", "parameters=0.01"], "cannot leave less than"),
        (["--method", "quantize", "--recover", "3"], "nothing to recover from before quantize"),
        (["--method", "quantize,layers", "--recover", "3"], "cannot train what quantize makes"),
        (["--method", "layers", "--set", "recover.settings.temprature=2"], "unknown key 'recover.settings.temprature'"),
        (["--method", "width", "--set", "runtime.stream=always"], "width needs the whole model"),
        (["--method", "layers", "--budget", "bytes=0.5", "--set", "runtime.stream=always"], "--budget needs the whole"),
        (["--method", "average"], "average needs --set method.models"),
        (["--method", "wid"], "wid needs --set method.hidden"),
        (["--method", "wid", "--set", "method.hidden=8"], "wid trains on data"),
        ([], "no method given"),
    ],
)
def test_mistakes(cli, models, tmp_path, arguments, said):
    done = cli("compress", models("bert"), *arguments, "-o", tmp_path / "o", "--offline", *QUICK)
    assert done.code == 2
    assert said in done.problem
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["hidden=16"], "hidden=16 makes nothing smaller"),
        (["hidden=9"], "cannot be divided into 2 heads of equal size"),
        (["hidden=12", "strategy=head"], "cannot be divided into whole heads of 8"),
        (["hidden=8", "steps=63"], "63 steps are too few"),
        (["hidden=8", "steps=160", "interval=10"], "160 steps are too few"),
        (["hidden=8", "stepz=9"], "unknown key 'method.stepz' for wid"),
    ],
)
def test_mistakes_of_trained_compressors(cli, models, data, tmp_path, settings, said):
    given = [part for value in settings for part in ("--set", f"method.{value}")]
    command = ["compress", models("bert"), "--method", "wid", *given, "-d", data("text")]
    done = cli(*command, "-o", tmp_path / "o", "--offline", *QUICK)
    assert done.code == 2
    assert said in done.problem
    assert not (tmp_path / "o").exists()


def test_a_compressor_of_encoders_refuses_decoders(cli, models, data, tmp_path):
    command = ["compress", models("llama"), "--method", "wid", "--set", "method.hidden=8", "-d", data("plain")]
    done = cli(*command, "-o", tmp_path / "o", "--offline", *QUICK)
    assert done.code == 2
    assert "compressor 'wid' does not fit task 'causal-lm'" in done.problem
    assert "it needs an encoder" in done.err


def test_a_trained_compressor_makes_a_plain_model_that_can_be_fine_tuned(cli, models, data, tmp_path):
    settings = ["method.hidden=8", "method.steps=17", "method.interval=1", "train.batch_size=4"]
    given = [part for value in settings for part in ("--set", value)]
    command = ["compress", models("bert-small"), "--method", "wid", *given, "-d", data("text"), "-o", tmp_path / "o"]
    done = cli(*command, "--recover", "1", "--json", "--offline", *QUICK)
    assert done.code == 0, done.err
    made = done.answer["stages"][0]["made"]
    assert made["merge_difference"] < 1e-5
    assert made["largest_dropped_norm"] > 0
    assert done.answer["steps"] == 18
    assert "largest norm of what was dropped" in (tmp_path / "o" / "report.md").read_text()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "o")
    shape = (model.config.hidden_size, model.config.num_attention_heads, model.config.intermediate_size)
    assert shape == (8, 2, 16)
    tuned = cli(
        "distill", "--student", tmp_path / "o", "--method", "none", "-d", data("text"), "--max-steps", "1",
        "-o", tmp_path / "tuned", "--offline", *QUICK,
    )  # fmt: skip
    assert tuned.code == 0, tuned.err


def test_a_masked_language_model_becomes_narrower_and_a_classifier(cli, models, data, tmp_path):
    settings = ["method.hidden=8", "method.strategy=head", "method.steps=17", "method.interval=1", "train.batch_size=4"]
    given = [part for value in settings for part in ("--set", value)]
    command = ["compress", models("masked-small"), "--method", "wid", *given, "-d", data("plain"), "-o", tmp_path / "o"]
    done = cli(*command, "--json", "--offline", *QUICK)
    assert done.code == 0, done.err
    assert done.answer["task"] == "masked-lm"
    assert done.answer["stages"][0]["made"]["merge_difference"] < 1e-5
    config = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "o").config
    assert (config.hidden_size, config.num_attention_heads, config.tie_word_embeddings) == (8, 1, False)
    tuned = cli(
        "distill", models("bert-small"), "--student", tmp_path / "o", "--task", "text-classification", "--method", "kd",
        "-d", data("text"), "--max-steps", "1", "-o", tmp_path / "tuned", "--offline", *QUICK,
    )  # fmt: skip
    assert tuned.code == 0, tuned.err
