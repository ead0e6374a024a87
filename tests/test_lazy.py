"""Weights read, changed and written one at a time."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdtool import lazy
from kdtool.errors import ModelProblem


def tensors():
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int64]
    found = {f"{i}.weight": torch.randint(0, 9, (4, 5), generator=generator).to(kind) for i, kind in enumerate(kinds)}
    return {**found, "scalar": torch.tensor(3.0)}


def read_all(folder):
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


@pytest.mark.parametrize("limit", [10**6, 100])
def test_what_is_written_is_read_again(tmp_path, limit):
    given = tensors()
    names = [name for name, _ in lazy.write(lazy.held(given), tmp_path, limit, {"a": "b"})]
    assert names == list(given)
    found = read_all(tmp_path)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in given.items())
    assert lazy.header(tmp_path) == {"a": "b"}
    state = lazy.read(tmp_path, "x")
    assert state.keys() == given.keys()
    assert all(torch.equal(state[name].load(), value) for name, value in given.items())
    assert all(state[name].shape == tuple(value.shape) for name, value in given.items())
    assert (tmp_path / lazy.INDEX).is_file() == (limit == 100)


def test_floating_point_alone_changes_its_format():
    state = {name: tensor.to(torch.float16) for name, tensor in lazy.held(tensors()).items()}
    assert [tensor.load().dtype for tensor in state.values()] == [tensor.dtype for tensor in state.values()]
    assert state["0.weight"].dtype == torch.float16
    assert state["2.weight"].dtype == torch.int8


def test_changes_leave_the_source():
    given = {"w": torch.ones(3, 2)}
    state = lazy.held(given)
    assert state["w"].then(lambda value: value.mul_(2)).load().sum() == 12
    assert given["w"].sum() == 6


def test_damaged_files_are_refused(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ModelProblem, match="damaged or missing"):
        lazy.read(tmp_path, "x")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("200MiB", 200 * 2**20), ("1.5 kb", 1500), ("7", 7)])
def test_sizes(text, size):
    assert lazy.size_in_bytes(text) == size


def test_a_size_that_is_none():
    with pytest.raises(ModelProblem, match="no size of a file"):
        lazy.size_in_bytes("many")
