"""What every registered method must do, on every task it names, with tiny random models.

A method that cannot meet a requirement says why in a literal class attribute: `golden` (no golden
test exists), `minimum` (a student that equals its teacher is not at the least loss).
"""

import copy
import re
from pathlib import Path

import pytest
import torch

from kdtool import load
from kdtool.config import dump_json, load_config
from kdtool.models import Loaded
from kdtool.registry import METHODS, TASKS
from kdtool.run import Run, Silent
from kdtool.saving import save_model
from kdtool.sections import OutputSection, TrainSection
from kdtool.tasks._base import LABELS, to_device
from kdtool.train.loop import Trainer
from kdtool.train.state import seed_everything
from tests.kits import gradients

ROOT = Path(__file__).resolve().parents[2]
ROWS = list(range(8))

PAIRS = [
    pytest.param(name, task, id=f"{name}-{task}")
    for name in METHODS.names()
    for task in sorted(METHODS.info(name).facts.get("tasks", ()))
]
on_every_task = pytest.mark.parametrize(("name", "task"), PAIRS)
each_method = pytest.mark.parametrize("name", METHODS.names())


def facts(name):
    return METHODS.info(name).facts


def differentiate(method, batch):
    """Gradients of the mean loss of a batch."""
    method.zero_grad(set_to_none=True)
    losses = method(batch, 0.5)
    (losses.total / losses.count).backward()
    return gradients(method)


# Declarations


@each_method
def test_declares_paper_tasks_teachers_and_documented_settings(name):
    info = METHODS.info(name)
    assert info.summary.endswith(".")
    assert info.facts.get("paper"), f"{info.source}: say where the method comes from: paper: ClassVar[str] = ..."
    assert info.facts.get("tasks"), f"{info.source}: name the tasks it fits: tasks: ClassVar[frozenset[str]] = ..."
    assert set(info.facts["tasks"]) <= set(TASKS.names())
    fewest, most = info.facts.get("teachers", (1, 1))
    assert 0 <= fewest <= most
    for setting in info.settings:
        assert setting.doc, f"{info.source}: describe {setting.name} in a string below it"


@each_method
def test_default_configuration_is_valid_and_round_trips(name, tmp_path):
    config = load_config("distill", None, [f"method.name={name}"])
    settings = METHODS.build_config(name, config.method_values)
    path = tmp_path / "config.json"
    path.write_text(dump_json(config))
    assert load_config("distill", path) == config
    stated = {setting.name: getattr(settings, setting.name) for setting in METHODS.info(name).settings}
    again = load_config("distill", None, [f"method.name={name}"], {f"method.{k}": v for k, v in stated.items()})
    assert METHODS.build_config(name, again.method_values) == settings


@each_method
def test_has_a_docs_page(name):
    page = ROOT / "docs" / "methods" / f"{name}.md"
    assert page.is_file(), f"missing: {page.relative_to(ROOT)}"


@each_method
def test_has_a_golden_test(name):
    named = re.compile(rf"[\"']{name.replace('-', '[-_]')}[\"']")
    tests = sorted((ROOT / "tests" / "golden").glob("test_*.py"))
    reason = facts(name).get("golden", "")
    covered = any(named.search(path.read_text()) for path in tests)
    assert covered or len(reason) > 10, (
        f"missing: tests/golden/test_{name.replace('-', '_')}.py (or another there that names {name!r}), "
        f"or a reason in {METHODS.info(name).source.name}: golden: ClassVar[str] = ..."
    )
    assert not (covered and reason), f"{name}: a golden test names it, so drop golden = {reason!r}"


# Gradients


@on_every_task
def test_gradient_reaches_the_student_and_no_teacher(name, task, kit):
    method = kit(task).build(name)
    method.train()
    found = differentiate(method, kit(task).batch(ROWS))
    for key, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert key in found, f"no gradient reaches {key}"
            assert torch.isfinite(found[key]).all(), key
            if parameter.ndim > 1:
                assert found[key].any(), f"the gradient of {key} is zero"
    for teacher in method.teacher_list:
        assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())


@on_every_task
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_loss_is_finite_and_float32(name, task, dtype, kit):
    method = kit(task).build(name)
    method.train()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        losses = method(kit(task).batch(ROWS), 0.5)
    losses.total.backward()
    assert losses.total.shape == ()
    assert losses.total.dtype == torch.float32
    assert torch.isfinite(losses.total)
    assert int(losses.count) > 0
    assert all(torch.isfinite(g).all() for g in gradients(method).values())
    assert all(not part.requires_grad for part in losses.parts.values()), "parts must be detached"


@on_every_task
def test_one_batch_of_eight_equals_eight_of_one(name, task, kit):
    method = kit(task).build(name)
    if method.batchwise:
        pytest.skip(f"{name} couples the samples of a batch")
    method.eval()  # dropout would draw other masks
    whole = method(kit(task).batch(ROWS), 0.5)
    expected = {k: g.clone() for k, g in differentiate(method, kit(task).batch(ROWS)).items()}
    method.zero_grad(set_to_none=True)
    count = 0
    for row in ROWS:
        losses = method(kit(task).batch([row]), 0.5)
        losses.total.backward()
        count += int(losses.count)
    assert count == int(whole.count)
    # the gradient of a key's bias is zero but for rounding: what counts is the largest of all
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in gradients(method).items():
        torch.testing.assert_close(gradient / count, expected[key], rtol=1e-4, atol=1e-5 * scale, msg=key)


MIXING = [
    pytest.param(name, id=name)
    for name in METHODS.names()
    if facts(name).get("mixes") and "image-classification" in facts(name)["tasks"]
]


@pytest.mark.parametrize("name", MIXING)
def test_mixed_labels_of_one_class_are_that_class(name, kit):
    method = kit("image-classification").build(name).eval()
    batch = kit("image-classification").batch(ROWS)
    soft = batch | {LABELS: torch.nn.functional.one_hot(batch[LABELS], 3).float()}
    torch.testing.assert_close(method(soft, 0.5).total, method(batch, 0.5).total, rtol=1e-5, atol=1e-5)
    mixed = batch | {LABELS: 0.3 * soft[LABELS] + 0.7 * soft[LABELS].roll(1, 0)}
    assert torch.isfinite(method(mixed, 0.5).total)


def has_a_known_minimum(name):
    return facts(name).get("teachers", (1, 1))[0] > 0 and not facts(name).get("minimum")


@pytest.mark.parametrize(("name", "task"), [pair for pair in PAIRS if has_a_known_minimum(pair.values[0])])
def test_a_student_that_equals_its_teacher_is_at_the_minimum(name, task, kit):
    off = {setting.name: 0.0 for setting in METHODS.info(name).settings if setting.name.endswith("ce_weight")}
    batch = kit(task).batch(ROWS)
    sizes = {}
    for same in (True, False):
        method = kit(task).build(name, same=same, **off).eval()
        found = differentiate(method, batch)
        sizes[same] = float(torch.stack([g.norm() for g in found.values()]).norm())
        if same:
            losses = method(batch, 0.5)
            loss = float(losses.total.detach() / losses.count)
    assert sizes[True] <= 1e-4 * sizes[False], "the gradient is not zero"
    assert abs(loss) <= 1e-5, "the loss of a unit is not zero"


# Training


class Breaks(Silent):
    """Stops a run as a crash would, at the log line of a step."""

    def __init__(self, at):
        self.at = at

    def progress(self, stage, done, total, facts):
        if done == self.at:
            raise RuntimeError("cut off")


def settings(**changes):
    values = {"max_steps": 4, "batch_size": 4, "grad_accum": 2, "lr": 1e-2, "log_every": 1, "checkpoint_every": 2}
    return TrainSection(**values | changes)


def train(kit, name, folder=None, reporter=None, seed=7, **changes):
    seed_everything(seed)
    method = kit.build(name)
    before = copy.deepcopy(method.state_dict())
    run = Run(seed=7, reporter=reporter or Silent())
    history = Trainer(method, kit.train, settings(**changes), run, folder=folder).train()
    assert any(not torch.equal(tensor, before[key]) for key, tensor in method.state_dict().items()), "nothing trained"
    return method, history


def same_state(left, right):
    assert left.state_dict().keys() == right.state_dict().keys()
    for key, tensor in left.state_dict().items():
        assert torch.equal(tensor, right.state_dict()[key]), key


@on_every_task
def test_training_repeats_and_resumes_bit_for_bit(name, task, kit, tmp_path):
    """The run that is cut off starts anew from the same seed, so it repeats the whole one up to its checkpoint."""
    whole, history = train(kit(task), name)
    with pytest.raises(RuntimeError, match="cut off"):
        train(kit(task), name, tmp_path, Breaks(at=3))
    resumed, rows = train(kit(task), name, tmp_path, seed=8)
    same_state(whole, resumed)
    assert rows.rows == history.rows
    assert rows.samples == history.samples


@on_every_task
def test_teachers_stay_as_they_are(name, task, kit):
    method = kit(task).build(name)
    before = [copy.deepcopy(teacher.model.state_dict()) for teacher in method.teacher_list]
    Trainer(method, kit(task).train, settings(max_steps=1), Run()).train()
    own = {p.data_ptr() for p in method.state_dict().values()}
    for teacher, state in zip(method.teacher_list, before, strict=True):
        assert not any(module.training for module in teacher.model.modules())
        assert all(torch.equal(tensor, state[key]) for key, tensor in teacher.model.state_dict().items())
        assert not own & {tensor.data_ptr() for tensor in teacher.model.state_dict().values()}


@on_every_task
def test_saved_and_loaded_student_gives_equal_outputs(name, task, kit, tmp_path):
    method = kit(task).build(name)
    student = method.finish().eval()
    save_model(Loaded(student, kit(task).student.processor, "student"), tmp_path, OutputSection())
    inputs = to_device(kit(task).task.example_inputs(kit(task).test, 4), "cpu")
    with torch.no_grad():
        expected = kit(task).task.forward(student, inputs).logits
        found = kit(task).task.forward(load(tmp_path, task), inputs).logits
        assert torch.equal(kit(task).task.forward(load(tmp_path), inputs).logits, found), "guessed another Auto class"
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
