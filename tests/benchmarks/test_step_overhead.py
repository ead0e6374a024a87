"""The script of the step times works, on tiny models."""

from tests.benchmarks.step_overhead import measure, prepare


def test_every_method_is_stepped_and_timed(models, data):
    parts, config = prepare(str(models("bert")), "layers:1", str(data("pairs")), "text-classification", 8, 2, 4, 16)
    found = measure(["kd", "none", "bd-kd", "one"], parts, config, 2)
    assert found.keys() == {"kd", "none", "bd-kd", "one"}
    assert min(found.values()) > 0
