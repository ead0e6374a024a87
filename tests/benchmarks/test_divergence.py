"""The benchmark of divergences itself works: on a tiny problem, without its goals and peers."""

import subprocess
import sys

import pytest

from . import divergence


@pytest.mark.parametrize("kind", divergence.KINDS)
def test_kdtool_and_the_plain_form_do_the_same_work(kind, capsys):
    found = {name: divergence.measure(name, kind, 300, 2) for name in (divergence.KDTOOL, divergence.NAIVE)}
    assert divergence.check_same(found) <= divergence.TOLERANCE
    assert [len(one.seconds) for one in found.values()] == [2, 2]
    found[divergence.KDTOOL].mebibytes, found[divergence.NAIVE].mebibytes = 10.0, 70.0
    missed = divergence.report({name: [one] for name, one in found.items()})
    assert f"memory against {divergence.NAIVE}" in missed
    assert "70 MiB    7.0 x" in capsys.readouterr().out


def test_other_work_is_not_compared():
    same = divergence.Measured(1.0, [1.0, 1.0], 1.0, [1.0])
    other = divergence.Measured(1.0, [1.0, 1.001], 1.0, [1.0])
    with pytest.raises(SystemExit, match="differ"):
        divergence.check_same({divergence.KDTOOL: other, divergence.NAIVE: same})


def test_peers_that_are_not_there_are_left_out_with_a_line(capsys, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: not here\n")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_more: failed)
    assert divergence.in_a_process(sys.executable, "TRL", "jsd", 64, 1) is None
    assert "TRL is left out: ImportError: not here" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="not here"):
        divergence.in_a_process(sys.executable, divergence.NAIVE, "jsd", 64, 1)
