"""SimKD: what is trained is what is saved."""

import pytest
import torch

from kdtool import load
from kdtool.errors import ConfigProblem
from kdtool.modeling import SimKDForImageClassification
from kdtool.modeling.simkd import PatientBatchNorm
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.saving import save_model
from kdtool.sections import OutputSection, TrainSection
from kdtool.train.loop import Trainer
from tests.methods import cnn


@pytest.mark.parametrize(("student", "tap", "size"), [((4, 8, 8), None, 4), ((4, 8), None, 4), ((4, 8), "pooled", 1)])
def test_the_saved_student_answers_through_the_teachers_head(student, tap, size, tmp_path):
    data = cnn.rows()
    method = cnn.build("simkd", student=student, student_tap=tap)
    Trainer(method, data, TrainSection(max_steps=3, batch_size=4, lr=1e-2), Run()).train()
    batch = cnn.batch_of(data, list(range(6)))
    method.eval()
    model = method.finish()
    assert isinstance(model, SimKDForImageClassification)
    assert model.config.map_size == [size, size]
    seen = {}
    with torch.no_grad():
        method.project.register_forward_hook(lambda _m, _args, out: seen.update(projected=out))
        method(batch, 1.0)
        expected = method.teacher_list[0].model.linear(seen["projected"].mean((2, 3)))
        torch.testing.assert_close(model(pixel_values=batch["pixel_values"]).logits, expected)
    save_model(Loaded(model, None, "student"), tmp_path, OutputSection())
    again = load(tmp_path)
    assert isinstance(again, SimKDForImageClassification)
    with torch.no_grad():
        found = again(pixel_values=batch["pixel_values"]).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not any("linear" in name for name in again.backbone.state_dict()), "the student's own head is saved"


def test_learns_the_teachers_features_and_leaves_its_own_head():
    data = cnn.rows()
    method = cnn.build("simkd")
    before = method.student.linear.weight.clone()
    settings = TrainSection(max_steps=30, batch_size=12, lr=1e-2, log_every=1)
    history = Trainer(method, data, settings, Run()).train()
    assert torch.equal(method.student.linear.weight, before)
    assert history.rows[-1]["loss"] < 0.9 * history.rows[0]["loss"]
    assert "ce" not in history.rows[-1]


def test_cross_entropy_is_that_of_the_reused_head():
    method = cnn.build("simkd", ce_weight=1.0, feature_weight=0.0).eval()
    batch = cnn.batch_of(cnn.rows(), [0, 1, 2, 3])
    logits = method.finish()(pixel_values=batch["pixel_values"]).logits
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
    torch.testing.assert_close(method(batch, 0.5).total, expected)


def test_cannot_be_combined():
    with pytest.raises(ConfigProblem, match="simkd cannot be combined"):
        cnn.build("combine", terms=["kd:1", "simkd:1"])


def test_batch_norm_of_one_value_takes_its_running_statistics():
    norm = PatientBatchNorm(3).train()
    x = torch.randn(1, 3, 1, 1)
    torch.testing.assert_close(norm(x), x, rtol=1e-4, atol=1e-5)
    assert int(norm.num_batches_tracked) == 0
    assert norm(torch.randn(2, 3, 1, 1)).mean().abs() < 1e-6
