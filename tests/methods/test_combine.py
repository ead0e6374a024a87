"""A combination is the sum of its terms, from one forward pass of each model."""

import pytest
import torch

from kdtool.config import load_config
from kdtool.errors import ConfigProblem, UsageProblem
from kdtool.methods.combine import parse_term
from kdtool.registry import METHODS
from tests.kits import gradients, make_kit

ROWS = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def kit(models, data):
    return make_kit("text-classification", models, data)


def losses(kit, name, progress=0.5, **values):
    return kit.build(name, **values).eval()(kit.batch(ROWS), progress)


def test_is_the_sum_of_its_terms(kit):
    found = losses(kit, "combine", ce_weight=0.3, terms=["kd:1", "logit-mse:0.5", "nkd:2"])
    alone = {name: losses(kit, name, ce_weight=0.0).total for name in ("kd", "logit-mse", "nkd")}
    ce = losses(kit, "none").total
    expected = 0.3 * ce + alone["kd"] + 0.5 * alone["logit-mse"] + 2 * alone["nkd"]
    torch.testing.assert_close(found.total, expected)
    assert set(found.parts) == {"ce", "kd.kd", "logit-mse.mse", "nkd.target", "nkd.nontarget"}
    assert found.count == len(ROWS)


def test_gradient_is_the_sum_too(kit):
    def slopes(name, **values):
        method = kit.build(name, **values).eval()
        method(kit.batch(ROWS), 0.5).total.backward()
        return gradients(method.student)

    both = slopes("combine", ce_weight=0.0, terms=["kd:2", "dist:1"])
    parts = slopes("kd", ce_weight=0.0), slopes("dist", ce_weight=0.0)
    for key, value in both.items():
        torch.testing.assert_close(value, 2 * parts[0][key] + parts[1][key], rtol=1e-4, atol=1e-6)


def test_settings_of_a_term_are_its_own(kit):
    found = losses(kit, "combine", ce_weight=0.0, terms=[{"name": "kd", "weight": 0.5, "temperature": 2.0}])
    torch.testing.assert_close(found.total, 0.5 * losses(kit, "kd", ce_weight=0.0, temperature=2.0).total)


def test_models_run_once(kit):
    method = kit.build("combine", terms=["kd:1", "dkd:1", "uskd:1"]).eval()
    calls = []
    for model in (method.student, method.teacher_list[0].model):
        model.register_forward_hook(lambda *_: calls.append(1))
    method(kit.batch(ROWS), 0.5)
    assert len(calls) == 2


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.25, 0.0), (0.5, 0.5), (0.75, 1.0), (1.0, 1.0)])
def test_a_term_sets_in_when_it_is_due(kit, progress, share):
    late = {"name": "kd", "delay": 0.25, "ramp": 0.5}
    found = losses(kit, "combine", progress, ce_weight=0.0, terms=[late, "logit-mse:1"])
    kd, mse = (losses(kit, name, ce_weight=0.0).total for name in ("kd", "logit-mse"))
    torch.testing.assert_close(found.total, share * kd + mse)


def test_the_whole_ramps_on_top_of_its_terms(kit):
    term = {"name": "kd", "ramp": 1.0}
    found = losses(kit, "combine", 0.5, ce_weight=0.0, ramp=1.0, terms=[term])
    torch.testing.assert_close(found.total, 0.25 * losses(kit, "kd", ce_weight=0.0).total)


def test_helpers_train_and_are_not_saved(kit):
    method = kit.build("combine", terms=["uskd:1", "kd:1"])
    names = [name for name, _ in method.named_parameters()]
    helpers = [name for name in names if name.startswith("members.")]
    assert helpers == ["members.0.weak.weight", "members.0.weak.bias"]
    assert len(names) == len(helpers) + len(list(kit.student.model.parameters())), "the student is there twice"
    method(kit.batch(ROWS), 0.5).total.backward()
    assert method.members[0].weak.weight.grad.any()
    assert method.finish() is method.student


def test_facts_are_those_of_any_member(kit):
    assert not kit.build("combine", terms=["kd"]).batchwise
    coupled = kit.build("combine", terms=["kd", "sinkd:0.1"])
    assert coupled.batchwise
    assert coupled.needs_rows


@pytest.mark.parametrize(
    "item",
    ["kd:0.5", " kd : 0.5", {"kd": 0.5}, {"name": "kd", "weight": 0.5}, {"name": "kd", "weight": "0.5"}],
)
def test_forms_of_a_term(item):
    assert parse_term(item) == ("kd", 0.5, {})


def test_a_weight_may_be_left_out():
    assert parse_term("kd")[1] == parse_term({"name": "kd"})[1] == 1.0
    assert parse_term({"name": "kd", "temperature": 2})[2] == {"temperature": 2}


def test_terms_come_from_the_command_line():
    config = load_config("distill", None, ["method.name=combine", "method.terms=[kd:1,logit-mse:0.5]"])
    settings = METHODS.build_config("combine", config.method_values)
    assert [parse_term(item)[:2] for item in settings.terms] == [("kd", 1.0), ("logit-mse", 0.5)]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (3, "is no term"),
        ({"weight": 1, "kd": 2}, "is no term"),
        ("kd:much", "is no number"),
        ({"name": "kd", "weight": None}, "is no number"),
        ("kd:-1", "is negative"),
        ("kdd:1", "unknown method 'kdd'"),
        ({"name": "kd", "temprature": 2}, "temprature"),
        ({"name": "kd", "temperature": -2}, "temperature"),
    ],
)
def test_what_is_no_term_is_refused(item, says):
    with pytest.raises(UsageProblem, match=says) as caught:
        parse_term(item)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        (None, "needs terms"),
        ([], "needs terms"),
        (["none:1"], "none cannot be combined"),
        (["combine:1"], "combine cannot be combined"),
        (["tf-kd:1"], "tf-kd cannot be combined"),
    ],
)
def test_what_cannot_be_combined_is_refused(kit, terms, says):
    config = METHODS.build_config("combine", {"terms": terms})
    with pytest.raises(ConfigProblem, match=says):
        METHODS.get("combine")(config, kit.copy(kit.student), [kit.copy(kit.teacher)], kit.task)


def test_a_term_must_fit_the_task(models, data):
    kit = make_kit("causal-lm", models, data)
    config = METHODS.build_config("combine", {"terms": ["kd:1", "dist:1"]})
    with pytest.raises(ConfigProblem, match="dist does not fit causal-lm"):
        METHODS.get("combine")(config, kit.copy(kit.student), [kit.copy(kit.teacher)], kit.task)
