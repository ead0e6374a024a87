"""What every registered compressor must do, on tiny models of text, images and language."""

import copy

import pytest
import torch

from kdtool.compressors._base import Context
from kdtool.config import OutputSection, TrainSection
from kdtool.errors import UsageProblem
from kdtool.models import load
from kdtool.registry import COMPRESSORS
from kdtool.registry import TASKS as ALL_TASKS
from kdtool.run import Run
from kdtool.saving import save_model
from kdtool.train.state import seed_everything
from kdtool.verify import outputs
from tests.kits import make_kit

TASKS = ("text-classification", "image-classification", "causal-lm")
"""What compressors that name no tasks are held to."""
PAIRS = [
    pytest.param(name, task, id=f"{name}-{task}")
    for name in COMPRESSORS.names()
    for task in sorted(COMPRESSORS.info(name).facts.get("tasks", TASKS))
]
NEEDED = {"models": lambda kit: [str(kit.teacher.folder)], "hidden": lambda kit: 8}
"""What required settings are set to."""
SHORT = {"steps": 17, "interval": 1}
"""What makes compressors that train do so briefly."""
each = pytest.mark.parametrize("name", COMPRESSORS.names())
on_each = pytest.mark.parametrize(("name", "task"), PAIRS)
with_and_without_data = pytest.mark.parametrize("calibrated", [False, True])


@pytest.fixture(scope="module")
def kits(models, data):
    return {task: make_kit(task, models, data) for task in {pair.values[1] for pair in PAIRS}}


def trains(name):
    return COMPRESSORS.info(name).facts.get("trains", False)


def apply(name, kit, calibrated, **values):
    for setting in COMPRESSORS.info(name).settings:
        if setting.required:
            assert setting.name in NEEDED, "say in NEEDED what this setting needs"
            values.setdefault(setting.name, NEEDED[setting.name](kit))
        elif trains(name) and setting.name in SHORT:
            values.setdefault(setting.name, SHORT[setting.name])
    batches = [kit.task.example_inputs(kit.train, 4)] if calibrated else None
    config = COMPRESSORS.build_config(name, values)
    seed_everything(0)
    run, rows = Run(offline=True), kit.train if calibrated else None
    context = Context(kit.task, batches, run, rows, TrainSection(batch_size=4))
    return COMPRESSORS.get(name)(kit.copy(kit.teacher), config, context)


@each
def test_says_where_it_comes_from(name):
    info = COMPRESSORS.info(name)
    assert info.summary.endswith(".")
    assert "arXiv:" in info.facts["paper"]
    assert set(info.facts.get("tasks", ())) <= set(ALL_TASKS.names())
    assert all(setting.doc for setting in info.settings)


@on_each
@with_and_without_data
def test_makes_a_model_that_reloads_and_leaves_its_source(kits, name, task, calibrated, tmp_path):
    kit = kits[task]
    if trains(name) and not calibrated:
        with pytest.raises(UsageProblem, match="trains on data"):
            apply(name, kit, calibrated)
        return
    before = copy.deepcopy(kit.teacher.model.state_dict())
    made = apply(name, kit, calibrated)
    probe = kit.task.example_inputs(kit.test, 3)
    found = outputs(kit.task, made.model, probe)
    assert torch.isfinite(found).all()
    assert made.parameters <= kit.teacher.parameters
    assert made.facts["new_weights"] == []
    assert not made.model.training
    save_model(made, tmp_path, OutputSection())
    again = load(tmp_path)
    assert type(again) is type(made.model)
    assert torch.equal(outputs(kit.task, again, probe), found)
    assert all(torch.equal(value, before[key]) for key, value in kit.teacher.model.state_dict().items())


@on_each
def test_two_runs_agree(kits, name, task):
    first, second = (apply(name, kits[task], True).model.state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize(
    ("name", "setting"), [("layers", "keep"), ("width", "ffn"), ("width", "heads"), ("low-rank", "keep")]
)
def test_refuses_what_is_no_share(kits, name, setting):
    with pytest.raises(UsageProblem, match="no share"):
        apply(name, kits["causal-lm"], False, **{setting: 1.5})


@pytest.mark.parametrize(("pattern", "group"), [("unstructured", 16), ("2:4", 4)])
def test_sparse_keeps_half_of_each_group(kits, pattern, group):
    made = apply("sparse", kits["text-classification"], True, pattern=pattern)
    weight = made.model.bert.encoder.layer[1].attention.self.query.weight
    assert ((weight != 0).reshape(-1, group).sum(1) == group // 2).all()
    assert made.facts["zeros"] * 2 == made.facts["weights"]


def test_low_rank_on_data_loses_less_of_the_outputs_than_without(kits):
    kit = kits["text-classification"]
    probe = kit.task.example_inputs(kit.train, 4)
    expected = outputs(kit.task, kit.teacher.model, probe)
    errors = [(outputs(kit.task, apply("low-rank", kit, c).model, probe) - expected).norm() for c in (True, False)]
    assert errors[0] < errors[1]


def test_width_keeps_the_neurons_that_the_data_excites(kits):
    kit = kits["causal-lm"]
    loaded = kit.copy(kit.teacher)
    mlp = loaded.model.model.layers[0].mlp
    with torch.no_grad():
        mlp.up_proj.weight[::2] = 0.0  # every other neuron is silent
    config = COMPRESSORS.build_config("width", {})
    context = Context(kit.task, [kit.task.example_inputs(kit.train, 4)], Run(offline=True))
    made = COMPRESSORS.get("width")(loaded, config, context)
    assert torch.equal(made.model.model.layers[0].mlp.up_proj.weight, mlp.up_proj.weight[1::2])


def test_grouped_heads_go_by_groups():
    from transformers import LlamaConfig, LlamaForCausalLM

    from kdtool.compressors import width
    from kdtool.models import Loaded

    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight[:, :8] = 0.0  # the first group says nothing
    made = width.compress(Loaded(model, None, "x"), width.Config(ffn=1.0, heads=0.5), Context(None, None, Run()))
    ids = torch.arange(6).unsqueeze(0)
    torch.testing.assert_close(made.model(ids).logits, model(ids).logits)
    assert (made.model.config.num_attention_heads, made.model.config.num_key_value_heads) == (2, 1)
