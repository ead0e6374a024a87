"""From a model to a smaller, documented one, through the real command line."""

import json

import pytest
import transformers

import kdtool
from kdtool.compressors import layers
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
    assert type(model).__name__ == "LowRankForCausalLM"
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "layer"], "unknown compressor 'layer'"),
        (["--method", "layers", "--set", "method.kep=1"], "unknown key 'method.kep' for layers"),
        (["--method", "layers,width", "--set", "method.ffn=1"], "unknown key 'method.ffn'"),
        (["--method", "layers,layers"], "comes twice"),
        (["--method", "layers", "--recover", "3"], "--recover trains on data"),
        (["--method", "layers", "--fail-under", "accuracy=1"], "needs something to measure on"),
        (["--method", "width", "--set", "method.heads=0.5"], "cannot lose heads"),
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
