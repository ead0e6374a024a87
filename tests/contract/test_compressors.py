"""What every registered compressor must do, on tiny models of text, images and language."""

import copy

import pytest
import torch

from kdtool.compressors._base import Context, renumber
from kdtool.config import OutputSection
from kdtool.errors import UsageProblem
from kdtool.models import load
from kdtool.registry import COMPRESSORS
from kdtool.run import Run
from kdtool.saving import save_model
from kdtool.verify import outputs
from tests.kits import make_kit

TASKS = ("text-classification", "image-classification", "causal-lm")
each = pytest.mark.parametrize("name", COMPRESSORS.names())
on_each = pytest.mark.parametrize("task", TASKS)
with_and_without_data = pytest.mark.parametrize("calibrated", [False, True])


def _dials(name):
    return COMPRESSORS.info(name).facts.get("dials", {}).items()


@pytest.fixture(scope="module")
def kits(models, data):
    return {task: make_kit(task, models, data) for task in TASKS}


def apply(name, kit, calibrated, **values):
    for setting in COMPRESSORS.info(name).settings:
        if setting.required:
            assert setting.name == "models", "say here what this setting needs"
            values.setdefault("models", [str(kit.teacher.folder)])
    config = COMPRESSORS.build_config(name, values)
    return COMPRESSORS.get(name)(kit.copy(kit.teacher), config, context_of(kit, calibrated))


def context_of(kit, calibrated):
    batches = [kit.task.example_inputs(kit.train, 4)] if calibrated else None
    return Context(kit.task, batches, Run(offline=True), kit.train if calibrated else None)


def takes(name, task, calibrated):
    facts = COMPRESSORS.info(name).facts
    return task in facts.get("tasks", {task}) and (calibrated or not facts.get("needs_data"))


@each
def test_says_where_it_comes_from(name):
    info = COMPRESSORS.info(name)
    assert info.summary.endswith(".")
    assert "arXiv:" in info.facts["paper"]
    assert all(setting.doc for setting in info.settings)
    names = {setting.name for setting in info.settings}
    assert names >= info.facts.get("dials", {}).keys()
    assert info.facts.get("streams", False) == hasattr(COMPRESSORS.module(name), "stream")


@each
@on_each
@with_and_without_data
def test_refuses_what_it_cannot_take(kits, name, task, calibrated):
    if not takes(name, task, calibrated):
        with pytest.raises(UsageProblem, match=name):
            apply(name, kits[task], calibrated)


@each
@on_each
@with_and_without_data
def test_makes_a_model_that_reloads_and_leaves_its_source(kits, name, task, calibrated, tmp_path):
    if not takes(name, task, calibrated):
        return
    kit = kits[task]
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


@each
@on_each
def test_two_runs_agree(kits, name, task):
    if not takes(name, task, True):
        return
    first, second = (apply(name, kits[task], True).model.state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, setting) for name in COMPRESSORS.names() for setting, least in _dials(name) if isinstance(least, float)],
)
def test_refuses_what_is_no_share(kits, name, setting):
    with pytest.raises(UsageProblem, match="no share"):
        apply(name, kits["causal-lm"], True, **{setting: 1.5})
