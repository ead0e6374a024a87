"""Checkpoints after kills and damage."""

import json

import pytest
import torch

from kdtool.train import checkpoint


def write(folder, step):
    return checkpoint.save(folder, step, {"weight": torch.full((3,), float(step))}, {"step": step})


def test_round_trip(tmp_path):
    shared = torch.arange(6.0)
    tensors = {"whole": shared, "part": shared[2:4], "turned": shared.reshape(2, 3).T, "count": torch.tensor(3)}
    checkpoint.save(tmp_path / "new", 5, tensors, {"history": {"loss": [0.1, 1e-300]}})
    found, state = checkpoint.newest(tmp_path / "new")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    assert state == {"history": {"loss": [0.1, 1e-300]}}


def test_the_newest_by_number_and_only_two_are_kept(tmp_path):
    for step in (8, 9, 10):
        write(tmp_path, step)
    assert checkpoint.newest(tmp_path)[1] == {"step": 10}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-9"]


def test_nothing_there(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None


def cut(path):
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(path):
    file = path / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def empty_state(path):
    (path / "state.json").write_text("")


def foreign_state(path):
    (path / "state.json").write_text(json.dumps({"step": 2}))


def no_tensors(path):
    (path / "tensors.safetensors").unlink()


@pytest.mark.parametrize("damage", [cut, flip, empty_state, foreign_state, no_tensors])
def test_a_damaged_newest_one_is_skipped(tmp_path, damage):
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    tensors, state = checkpoint.newest(tmp_path)
    assert state == {"step": 1}
    assert tensors["weight"].tolist() == [1.0, 1.0, 1.0]
    write(tmp_path, 2)
    assert checkpoint.newest(tmp_path)[1] == {"step": 2}


class Killed(BaseException):
    pass


def die(*_args, **_kwargs):
    raise Killed


MOMENTS = {
    "writing": (checkpoint, "save_file"),
    "flushing": (checkpoint, "sync"),
    "renaming": (checkpoint.Path, "rename"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_before_the_rename_leaves_the_one_before(tmp_path, monkeypatch, moment):
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(*MOMENTS[moment], die)
        with pytest.raises(Killed):
            write(tmp_path, 2)
    assert checkpoint.newest(tmp_path)[1] == {"step": 1}
    write(tmp_path, 2)
    assert checkpoint.newest(tmp_path)[1] == {"step": 2}
    assert not list(tmp_path.glob(".*"))
