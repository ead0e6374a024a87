"""The teacher cache: same numbers however it was filled, and never those of something else."""

import pytest
import torch

from kdtool.errors import ConfigProblem, UsageProblem
from kdtool.run import Run
from kdtool.teacher_cache import TeacherCache, fingerprint

TASKS = ["text-classification", "image-classification", "causal-lm"]


def cache(kit, folder, teacher, limit=2**30):
    run = Run(offline=True)
    marks = fingerprint(teacher, kit.train, run, "processor")
    return TeacherCache(folder, kit.task, teacher, kit.train, run, 0, marks, limit)


@pytest.mark.parametrize("task", TASKS)
def test_cold_and_warm_are_equal_and_true(task, kit, tmp_path):
    one = kit(task)
    teacher = one.copy(one.teacher)
    teacher.model.eval()
    rows = torch.tensor([3, 0, 2])
    cold = cache(one, tmp_path, teacher).get(rows)
    warm = cache(one, tmp_path, teacher)
    assert warm.share > 0
    assert torch.equal(warm.get(rows), cold)
    with torch.no_grad():
        direct = one.task.forward(teacher.model, one.batch([3, 0, 2])).logits.float()
    torch.testing.assert_close(cold, direct, rtol=1e-4, atol=1e-5)


def test_another_teacher_is_refused(kit, tmp_path):
    one = kit("text-classification")
    teacher = one.copy(one.teacher)
    cache(one, tmp_path, teacher)
    with torch.no_grad():
        next(teacher.model.parameters()).add_(1.0)
    with pytest.raises(ConfigProblem, match="made for another run") as caught:
        cache(one, tmp_path, teacher)
    assert "teacher" in str(caught.value.why)


def test_a_cache_too_large_is_refused(kit, tmp_path):
    one = kit("text-classification")
    with pytest.raises(UsageProblem, match="would take"):
        cache(one, tmp_path, one.copy(one.teacher), limit=1)
