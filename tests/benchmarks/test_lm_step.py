"""The scripts of language-model benchmarks work, on tiny models and without their peers."""

import torch

from tests.benchmarks import generation, lm_step
from tests.benchmarks.step_overhead import prepare


def test_steps_and_writing_are_timed(models, data):
    parts, config = prepare(str(models("llama")), "layers:1", str(data("plain")), "causal-lm", 40, 2, 3, 8)
    ours = {name: lm_step.Ours(name, {}, parts, config) for name in ("supervised-kd", "on-policy")}
    assert min(lm_step.measure(ours, 1).values()) > 0
    ids = torch.as_tensor(parts[3].columns["input_ids"][:2, :4])
    student, teacher = (loaded.model.eval() for loaded in (parts[2], parts[1]))
    found = generation.measure(student, teacher, ids, 3, 1)
    assert found.keys() == {"student", "teacher", "repaired"}
    assert all(rate > 0 for rates in found.values() for rate in rates)
