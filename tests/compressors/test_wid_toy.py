"""The comparison of docs/evidence/wid.md, made small."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "wid_toy.py"


def test_inherited_weights_beat_cut_ones_and_those_beat_random_ones():
    spec = importlib.util.spec_from_file_location("wid_toy", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    toy = script.Toy(0, hidden=16, symbols=6, length=10, rows=512)
    found = toy.compare(teacher_steps=300, steps=80, interval=2, more=0, rates=[3e-3])
    order = [found[name] for name in ("teacher", "wid", "trained cut, lr 0.003", "random, trained", "cut, untrained")]
    assert order == sorted(order)
    assert abs(found["wid"] - found["wid before merging"]) < 1e-5
    assert found["largest dropped norm"] < 0.5
