import pytest

from kdtool.train.schedule import factor


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(100, 0.1), (100, 0.0), (7, 0.5), (1, 0.06), (3, 1.0)])
def test_rises_then_falls_and_is_never_zero(shape, total, warmup):
    values = [factor(step, total, warmup, shape) for step in range(total)]
    rising = round(warmup * total)
    assert all(0 < value <= 1 for value in values)
    assert values[:rising] == sorted(values[:rising])
    assert values[rising:] == sorted(values[rising:], reverse=True)
    assert max(values) == 1.0


def test_values():
    assert [factor(step, 10, 0.2, "linear") for step in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.125]
    assert factor(6, 10, 0.2, "cosine") == pytest.approx(0.5)
    assert factor(9, 10, 0.2, "constant") == 1.0
