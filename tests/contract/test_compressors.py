"""What every registered compressor must do, on tiny models of text, images and language."""

import copy

import pytest
import torch

from kdtool.compressors._base import Context, renumber
from kdtool.config import load_config
from kdtool.errors import UsageProblem
from kdtool.models import load
from kdtool.registry import COMPRESSORS
from kdtool.registry import TASKS as ALL_TASKS
from kdtool.run import Run
from kdtool.saving import save_model
from kdtool.sections import OutputSection, TrainSection
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
    config = COMPRESSORS.build_config(name, values)
    seed_everything(0)
    return COMPRESSORS.get(name)(kit.copy(kit.teacher), config, context_of(kit, calibrated))


def context_of(kit, calibrated):
    batches = [kit.task.example_inputs(kit.train, 4)] if calibrated else None
    rows = kit.train if calibrated else None
    return Context(kit.task, batches, Run(offline=True), rows, TrainSection(batch_size=4))


@each
def test_says_where_it_comes_from(name):
    info = COMPRESSORS.info(name)
    assert info.summary.endswith(".")
    assert "arXiv:" in info.facts["paper"]
    assert set(info.facts.get("tasks", ())) <= set(ALL_TASKS.names())
    assert all(setting.doc for setting in info.settings)
    assert {setting.name for setting in info.settings} >= info.facts.get("dials", {}).keys()
    assert info.facts.get("streams", False) == hasattr(COMPRESSORS.module(name), "stream")


@on_each
@with_and_without_data
def test_makes_a_model_that_reloads_and_leaves_its_source(kits, name, task, calibrated, tmp_path):
    kit = kits[task]
    facts = COMPRESSORS.info(name).facts
    if (facts.get("trains") or facts.get("needs_data")) and not calibrated:
        with pytest.raises(UsageProblem, match="data"):
            apply(name, kit, calibrated)
        return
    before = copy.deepcopy(kit.teacher.model.state_dict())
    made = apply(name, kit, calibrated)
    probe = kit.task.example_inputs(kit.test, 3)
    if "ids" in made.facts:
        probe = renumber(probe, made.facts["ids"])
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
    ("name", "setting"),
    [(n, dial) for n in COMPRESSORS.names() for dial in COMPRESSORS.info(n).facts.get("dials", {}) if n != "quantize"],
)
def test_refuses_what_is_no_share_before_anything_is_loaded(name, setting):
    for value in ("1.5", "0"):
        with pytest.raises(UsageProblem, match=f"method.{setting}={value}"):
            load_config("compress", None, [f"method.{setting}={value}"], {"method.name": name})
