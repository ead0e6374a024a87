"""Runs that are cut off go on from their checkpoints, and end with the very weights of an unbroken run."""

import json
import signal
import time

import pytest
import torch

from kdtool.config import load_config
from kdtool.errors import UsageProblem
from kdtool.pipelines.output import Output
from kdtool.train import checkpoint
from tests.pipelines.conftest import QUICK, call, start, wait

STEPS = 240


@pytest.fixture(scope="module")
def arguments(models, data):
    """The command without its output folder."""
    given = ["distill", models("bert"), "--student", "layers:2", "--method", "kd", "--data", data("pairs")]
    given += ["--max-steps", str(STEPS), "--batch-size", "4", "--set", "train.checkpoint_every=10"]
    return [*map(str, given), *QUICK]


def steps_of(folder):
    return [int(path.name.removeprefix("step-")) for path in (folder / ".kdtool" / "checkpoints").glob("step-*")]


@pytest.fixture(scope="module")
def cut_off(arguments, tmp_path_factory):
    """Signal to the ended process and its folder."""
    root = tmp_path_factory.mktemp("cut")
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
    running = [start(*arguments, "-o", root / number.name, folder=root) for number in signals]
    waiting = list(zip(signals, running, strict=True))
    deadline = time.monotonic() + 600
    while waiting:
        for number, process in list(waiting):
            if steps_of(root / number.name):
                process.send_signal(number)
                waiting.remove((number, process))
            assert process.poll() is None or (number, process) not in waiting, wait(process).err
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ended = {}
    for number, process in zip(signals, running, strict=True):
        ended[number] = wait(process), root / number.name
    return ended


@pytest.fixture(scope="module")
def unbroken(arguments, tmp_path_factory):
    root = tmp_path_factory.mktemp("unbroken")
    ended = call(*arguments, "-o", root / "out", folder=root)
    assert ended.code == 0, ended.err
    return (root / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_exits_130_with_a_checkpoint_and_says_how_to_go_on(cut_off, number):
    outcome, folder = cut_off[number]
    assert outcome.code == 130, outcome.err
    assert "stopped after step" in outcome.problem
    assert "a checkpoint was written" in outcome.err
    assert "the same command goes on from there" in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert 0 < max(steps_of(folder)) < STEPS
    assert {path.name for path in folder.iterdir()} == {".kdtool"}


def test_another_configuration_does_not_touch_the_unfinished_run(cut_off, arguments, cli):
    _, folder = cut_off[signal.SIGINT]
    before = steps_of(folder)
    found = cli(*arguments, "-o", folder, "--seed", "3")
    assert found.code == 2
    assert "unfinished run of another configuration" in found.problem
    assert "--overwrite" in found.err
    assert steps_of(folder) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_same_command_finishes_with_the_weights_of_an_unbroken_run(cut_off, unbroken, arguments, number, cli):
    _, folder = cut_off[number]
    last = max(steps_of(folder))
    found = cli(*arguments, "-o", folder)
    assert found.code == 0, found.err
    assert f"resuming after step {last} of {STEPS}" in found.err
    assert (folder / "model.safetensors").read_bytes() == unbroken
    assert not (folder / ".kdtool").exists()
    assert json.loads((folder / "kdtool.json").read_text())["steps"] == STEPS


# The output folder


def config_of(folder, *overrides):
    return load_config("distill", None, overrides, {"output.folder": str(folder)})


def staged(folder, **files):
    output = Output(folder, config_of(folder))
    for name, text in files.items():
        (output.staging / name).write_text(text)
    return output


def test_a_kill_while_files_move_is_made_good_by_the_next_run(tmp_path, monkeypatch):
    output = staged(tmp_path / "out", a="1", b="2", c="3")
    (output.staging / "kdtool.json").write_text("{}")
    moved = []
    real = type(output.folder).replace

    def replace(self, target):
        if target.parent == output.folder:
            if len(moved) == 2:
                raise KeyboardInterrupt
            moved.append(target.name)
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(output.folder), "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            output.commit()
    assert not (output.folder / "kdtool.json").exists(), "the manifest must come last"
    assert Output(tmp_path / "out", config_of(tmp_path / "out")).complete
    assert sorted(path.name for path in output.folder.iterdir()) == ["a", "b", "c", "kdtool.json"]


def test_a_claim_without_checkpoints_leaves_nothing_behind(tmp_path):
    staged(tmp_path / "out", a="1").release()
    assert not (tmp_path / "out").exists()


def test_a_claim_with_checkpoints_stays(tmp_path):
    output = staged(tmp_path / "out")
    checkpoint.save(output.checkpoints, 3, {"x": torch.zeros(2)}, {"step": 3})
    output.release()
    assert steps_of(tmp_path / "out") == [3]
    again = Output(tmp_path / "out", config_of(tmp_path / "out"))
    assert again.checkpoints == output.checkpoints
    with pytest.raises(UsageProblem, match="unfinished run of another configuration"):
        Output(tmp_path / "out", config_of(tmp_path / "out", "train.lr=0.1"))
    Output(tmp_path / "out", config_of(tmp_path / "out", "train.lr=0.1", "output.overwrite=true"))
    assert steps_of(tmp_path / "out") == []
