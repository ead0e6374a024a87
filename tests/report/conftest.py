import math

import numpy as np
import pytest

from kdtool.gates import check, parse_gates
from kdtool.metrics import reliability_bins, score
from kdtool.proof import Proof, Side, retention
from kdtool.sections import RunConfig


def side(name, strength, parameters, milliseconds, revision=None):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 80)
    logits = generator.normal(size=(80, 4))
    logits[np.arange(80), labels] += strength
    values, errors = score(["accuracy", "nll", "ece"], logits, labels, resamples=20)
    latency = {size: {"median_ms": milliseconds * size, "p95_ms": 1.2 * milliseconds * size} for size in (1, 32)}
    bins = reliability_bins(logits, labels)
    return Side(name, revision, parameters, 4 * parameters, values, errors, latency, bins)


@pytest.fixture
def proof():
    student, teacher = side("out/student", 2.0, 5_000_000, 2.0), side("owner/teacher", 3.0, 20_000_000, 8.0, "0" * 40)
    kept = retention(student.metrics, teacher.metrics)
    gates = parse_gates(["accuracy=0.5", "accuracy.retention=0.999"])
    results = [check(gate, student.metrics, teacher.metrics, kept) for gate in gates]
    return Proof(student, teacher, kept, {1: 4.0, 32: 4.0}, results, {"max_abs_diff": 1e-7, "passed": True})


@pytest.fixture
def config():
    made = RunConfig()
    made.teacher.model, made.student.model = "owner/teacher@main", "layers:3"
    made.method = {"name": "nkd", "gamma": 1e-05}
    made.data.source, made.data.task = "owner/data:en@v1#test", "text-classification"
    made.output.folder = "out/student"
    return made


@pytest.fixture
def history():
    return [
        {"step": step, "loss": 3.0 * math.exp(-step / 20), "lr": 1e-4, "parts": {"ce": 1.0, "kd": 2.0}}
        for step in range(1, 30)
    ]
