"""`kdtool patch-attention` on a tiny text classifier with room for 256 tokens."""

import json

import pytest
import torch
import transformers

import kdtool
from kdtool import patching
from tests import tiny
from tests.pipelines.conftest import QUICK, start, wait

EXACT_LEAVES = ["--set", "method.leaf=1", "--set", "method.near=0", "--set", "method.min_length=64"]
"""An operator that leaves nothing out, used from the shortest length on."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long-bert")
    tiny.save_bert_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 256}))
    config = tiny.bert_config(2)
    config.max_position_embeddings = 256
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long-text")
    for split, size, seed in (("train", 16, 1), ("test", 9, 2)):
        short = tiny.text_rows(size * 12, seed)
        made = [
            {"text": " ".join(row["text"] for row in short[i * 12 : i * 12 + 12]), "label": tiny.LABELS[i % 3]}
            for i in range(size)
        ]
        tiny.write_rows(folder / f"{split}.jsonl", made)
    return folder


@pytest.fixture(scope="module")
def patched(model, rows, tmp_path_factory):
    root = tmp_path_factory.mktemp("patched")
    arguments = ["patch-attention", model, "--data", rows, "--lengths", "128", "--max-drop", "accuracy=0", "--json"]
    latency = ["--set", "eval.latency_repeats=2", "--set", "eval.latency_batches=[2]"]
    return wait(start(*arguments, *EXACT_LEAVES, *latency, "-o", root / "out", folder=root)), root / "out"


def test_a_run_says_what_became_of_each_layer(patched):
    outcome, _ = patched
    assert outcome.code == 0, outcome.err
    answer = outcome.answer
    assert answer["command"] == "patch-attention"
    assert [layer["method"] for layer in answer["layers"]] == ["cluster", "cluster"]
    assert all(layer["called"] and layer["min_length"] == 64 for layer in answer["layers"])
    assert all(layer["error"]["128"] < 1e-3 for layer in answer["layers"])
    assert 0 < answer["calls"]["approximate"] <= answer["calls"]["total"]
    assert answer["metrics"]["student"] == pytest.approx(answer["metrics"]["teacher"], abs=1e-4)
    assert answer["gates"][0]["name"] == "accuracy.drop"
    assert answer["reload"]["passed"]


def test_it_leaves_a_documented_model(patched, model):
    _, folder = patched
    report = (folder / "report.md").read_text()
    assert "| cluster leaf=1, near=0, block=256 |" in report
    assert "patched model | exact model" in report
    assert (folder / "plots" / "attention.png").is_file()
    assert "kdtool.load" in (folder / "README.md").read_text()
    settings = json.loads((folder / "kdtool.json").read_text())["layers"][0]["settings"]
    assert settings == {"leaf": 1, "near": 0, "block": 256}
    said = json.loads((folder / "config.json").read_text())["kde_attention"]
    assert len(said["layers"]) == 2
    assert len(patching.layers_of(kdtool.load(folder))) == 2
    plain, source = (
        transformers.AutoModelForSequenceClassification.from_pretrained(path).state_dict() for path in (folder, model)
    )
    assert all(plain[key].equal(source[key]) for key in source)


def test_the_manifest_repeats_the_run(patched, cli, tmp_path):
    _, folder = patched
    again = cli("patch-attention", "-c", folder / "kdtool.json", "-o", tmp_path / "again", "--json", *QUICK)
    assert again.code == 0, again.err
    first, second = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert first["kde_attention"] == second["kde_attention"]


def test_layers_that_miss_the_bound_or_are_not_named_stay_exact(cli, model, rows, tmp_path):
    arguments = ["--layers", "1", "--max-error", "1e-9", "--lengths", "128", "--fail-under", "accuracy=1.0"]
    outcome = cli("patch-attention", model, "--data", rows, *arguments, *QUICK, "--json", "-o", tmp_path / "out")
    assert outcome.code == 3
    answer = json.loads(outcome.out)
    folder = tmp_path / "out"
    manifest = json.loads((folder / "kdtool.json").read_text())
    reasons = [layer["reason"] for layer in manifest["layers"]]
    assert reasons[0] == "not among --layers"
    assert "error" in reasons[1]
    assert manifest["calls"]["approximate"] == 0
    assert answer["gates"][0]["passed"] is False


def test_a_plan_is_printed_without_work(cli, model, rows, tmp_path):
    outcome = cli("patch-attention", model, "--data", rows, "-o", tmp_path / "out", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)["plan"]
    assert plan["method"]["name"] == "cluster"
    assert plan["patch"]["lengths"] == [512, 2048]
    assert not (tmp_path / "out").exists()


MISTAKES = {
    "layer": (["--layers", "9", "--lengths", "128"], 2, "there is no layer 9"),
    "backwards": (["--layers", "1-0", "--lengths", "128"], 2, "1-0 runs backwards"),
    "unmeasured": (["--max-drop", "perplexity=0.1", "--lengths", "128"], 2, "does not measure perplexity"),
    "length": (["--lengths", "99999"], None, "positions"),
    "short": (["--lengths", "10"], 2, "64 and more"),
    "words": (["--lengths", "many"], 2, "--lengths many"),
    "method": (["--method", "clusters"], 2, "unknown attention operator"),
    "exact": (["--method", "exact"], 2, "has already"),
    "drop": (["--max-drop", "accuracy"], 2, "METRIC=VALUE"),
    "metric": (["--max-drop", "acuracy=0.1"], 2, "unknown metric"),
    "setting": (["--set", "method.leafs=3"], 2, "unknown key"),
}


@pytest.mark.parametrize(("arguments", "code", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_said_in_one_line(cli, model, rows, tmp_path, arguments, code, said):
    outcome = cli("patch-attention", model, "--data", rows, *arguments, "-o", tmp_path / "out")
    assert outcome.code in (1, 2) if code is None else outcome.code == code
    assert said in outcome.problem
    assert not (tmp_path / "out").exists()


def test_people_read_how_many_layers_are_approximate(cli, models, data, tmp_path):
    arguments = ["--data", data("plain"), "--lengths", "64", *QUICK, "-o", tmp_path / "out"]
    outcome = cli("patch-attention", models("llama"), *arguments)
    assert outcome.code == 0, outcome.err
    assert "attention: 0 of 4 layers are approximate; layer 0 is exact: causal chunks are exact" in outcome.out


def test_a_causal_model_is_patched_too(cli, models, data, tmp_path):
    values = ["--set", "method.leaf=1", "--set", "method.chunk=16", "--set", "method.min_length=64"]
    arguments = ["--data", data("plain"), "--lengths", "64", *values, *QUICK, "--json", "-o", tmp_path / "out"]
    outcome = cli("patch-attention", models("llama"), *arguments)
    assert outcome.code == 0, outcome.err
    answer = outcome.answer
    assert all(layer["method"] == "cluster" and layer["called"] for layer in answer["layers"])
    assert answer["metrics"]["student"]["loss"] == pytest.approx(answer["metrics"]["teacher"]["loss"], rel=1e-4)
    assert answer["calls"]["approximate"] > 0


def test_generation_with_a_bound_of_0_is_that_of_the_exact_model(cli, models, data, tmp_path):
    arguments = [
        "--data",
        data("plain"),
        "--lengths",
        "64",
        "--max-error",
        "0",
        *QUICK,
        "--json",
        "-o",
        tmp_path / "out",
    ]
    outcome = cli("patch-attention", models("llama"), *arguments)
    assert outcome.code == 0, outcome.err
    assert {layer["reason"] for layer in outcome.answer["layers"]} == {"no error is allowed"}
    exact = transformers.AutoModelForCausalLM.from_pretrained(models("llama"))
    patched = kdtool.load(tmp_path / "out")
    prompt = torch.randint(4, 20, (2, 64), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": prompt, "attention_mask": (torch.arange(64) >= torch.tensor([[0], [9]])).long()}
    wanted, found = (
        model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
        for model in (exact, patched)
    )
    assert found.equal(wanted)


def test_fixed_projections_are_for_operators_that_have_them(cli, model, rows, tmp_path):
    arguments = ["--data", rows, "--method", "hyper", "--set", "patch.fixed=true", "-o", tmp_path / "out"]
    outcome = cli("patch-attention", model, *arguments)
    assert outcome.code == 2
    assert "patch.fixed does not apply to hyper" in outcome.problem


def test_an_image_model_that_reads_few_patches_stays_exact(cli, models, data, tmp_path):
    values = ["--set", "method.leaf=1", "--set", "method.min_length=64"]
    arguments = ["--data", data("images"), "--lengths", "64", *values, *QUICK, "--json", "-o", tmp_path / "out"]
    outcome = cli("patch-attention", models("vit"), *arguments)
    assert outcome.code == 0, outcome.err
    assert {layer["reason"] for layer in outcome.answer["layers"]} == {"pays from 64 keys on, and the model takes 5"}


def test_a_patched_model_can_be_patched_again(cli, patched, rows, tmp_path):
    _, folder = patched
    arguments = ["--data", rows, "--lengths", "128", "--layers", "0", *EXACT_LEAVES, *QUICK, "-o", tmp_path / "out"]
    outcome = cli("patch-attention", folder, *arguments, "--json")
    assert outcome.code == 0, outcome.err
    assert [layer["method"] for layer in outcome.answer["layers"]] == ["cluster", "exact"]


def test_a_patched_model_can_be_a_student_and_stays_patched(cli, patched, model, rows, tmp_path):
    _, folder = patched
    arguments = ["--method", "kd", "--data", rows, "--max-steps", "2", "--batch-size", "4", *QUICK]
    outcome = cli("distill", model, "--student", folder, *arguments, "--json", "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    assert after["kde_attention"] == before["kde_attention"]
    trained = kdtool.load(tmp_path / "out")
    ids = torch.randint(4, 20, (1, 128), generator=torch.Generator().manual_seed(0))
    with patching.counting() as count, torch.no_grad():
        trained(input_ids=ids)
    assert count.approximate == 2
