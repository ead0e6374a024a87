"""The Sinkhorn benchmark itself works: on a tiny problem, without its goal."""

import pytest

from . import sinkhorn


def test_all_forms_get_their_turns(capsys):
    problem = sinkhorn.Problem.make(8, 5)
    assert sinkhorn.check_same(problem) <= sinkhorn.TOLERANCE
    seconds = sinkhorn.measure(problem, 3)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(sinkhorn.FORMS, 3)
    ratios = sinkhorn.report({name: [float(i + 1)] for i, name in enumerate(sinkhorn.FORMS)})
    assert list(ratios.values()) == [2.0, 3.0]
    assert "torch.cdist" in capsys.readouterr().out


def test_other_work_is_not_compared(monkeypatch):
    monkeypatch.setitem(sinkhorn.FORMS, sinkhorn.KDTOOL, lambda s, t: 1.001 * sinkhorn.broadcast(s, t))
    with pytest.raises(SystemExit, match="differ"):
        sinkhorn.check_same(sinkhorn.Problem.make(8, 5))
