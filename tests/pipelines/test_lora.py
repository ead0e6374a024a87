"""LoRA students: only the additions train, runs resume, and the result is a plain model."""

import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from kdtool import lora
from kdtool.config import load_config
from kdtool.errors import ConfigProblem, UsageProblem
from kdtool.pipelines.distill import distill, get_ready
from kdtool.pipelines.setup import make_run
from kdtool.run import Run, Silent
from tests.cli.conftest import clean_environment


class Stop(Silent):
    def __init__(self, at):
        self.at = at

    def progress(self, stage, done, total, facts):
        if stage == "train" and done == self.at:
            raise KeyboardInterrupt


@pytest.fixture
def options(models, data, tmp_path):
    def call(folder, *overrides, **more):
        given = {
            "teacher.model": str(models("llama")),
            "student.model": str(models("llama-small")),
            "data.source": str(data("prompts")),
            "method.name": "kd",
            "output.folder": str(tmp_path / folder),
            "train.max_steps": 6,
            "train.batch_size": 4,
            "train.checkpoint_every": 3,
            "train.log_every": 1,
            "train.lr": 0.01,
            "eval.latency": False,
            "eval.reload": False,
            "output.plots": False,
            **more,
        }
        return load_config("distill", None, ["student.lora_rank=2", *overrides], given)

    return call


ALONE = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(4, 16).view(2, 6)).logits}, sys.argv[3])
assert not [name for name in sys.modules if name.partition(".")[0] == "kdtool"]
"""
PROBE = torch.arange(4, 16).view(2, 6)


@torch.no_grad()
def logits_of(model):
    return model.eval()(input_ids=PROBE).logits


def test_only_the_additions_train_and_the_result_is_plain(options, models, tmp_path):
    distill(options("out", "student.lora_adapter=true"))
    before, after = (load_file(folder / "model.safetensors") for folder in (models("llama-small"), tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("_proj.weight" in name for name in changed)
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) <= 2
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(merged, "peft_config")
    plain = transformers.AutoModelForCausalLM.from_pretrained(models("llama-small"))
    adapter = tmp_path / "out" / lora.ADAPTER
    assert {path.name for path in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    # by peft alone, in a process of its own
    words = [sys.executable, "-W", "ignore", "-c", ALONE, str(models("llama-small")), str(adapter), str(tmp_path / "x")]
    subprocess.run(words, check=True, cwd=tmp_path, env=clean_environment({"HF_HUB_OFFLINE": "1"}))
    adapted = load_file(tmp_path / "x")["logits"]
    torch.testing.assert_close(adapted, logits_of(merged), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted, logits_of(plain), atol=1e-3)


def test_a_resumed_run_gives_the_same_weights(options, tmp_path):
    distill(options("whole"))
    config = options("cut")
    with pytest.raises(KeyboardInterrupt):
        distill(config, make_run(config, Stop(5)))
    distill(options("cut"))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("method", ["skd", "supervised-kd"])
def test_methods_that_make_their_loss_from_hidden_states(options, method):
    config = options("out", "student.lora_targets=[q_proj, lm_head]", **{"method.name": method, "train.max_steps": 2})
    ready = get_ready(config, Run())
    trained = [name for name, p in ready.method.named_parameters() if p.requires_grad]
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained} == {"q_proj", "lm_head"}
    distill(config)


def test_new_heads_train_beside_the_additions(options, models, data):
    more = {
        "teacher.model": str(models("bert")),
        "student.model": str(models("masked")),
        "data.source": str(data("text")),
    }
    ready = get_ready(options("out", "data.task=text-classification", **more), Run())
    trained = [name for name, p in ready.student.model.named_parameters() if p.requires_grad]
    assert {"classifier.weight", "classifier.bias"} <= set(trained)
    assert all("lora_" in name or name in ready.student.facts["new_weights"] for name in trained)


@pytest.mark.parametrize(
    ("overrides", "problem", "message"),
    [
        (["student.lora_targets=[qq_proj]"], ConfigProblem, "nothing to add to"),
        (["student.init=random"], UsageProblem, "the student's are random"),
        (["student.lora_rank=null", "student.lora_alpha=4"], UsageProblem, "lora_alpha needs student.lora_rank"),
        (["student.lora_adapter=true", "student.model=layers:2"], UsageProblem, "no other place has the student"),
    ],
)
def test_mistakes(options, overrides, problem, message):
    config = options("out", *overrides)
    if overrides[-1].startswith("student.model"):
        config.student.model = "layers:2"
    with pytest.raises(problem, match=message):
        get_ready(config, Run())
