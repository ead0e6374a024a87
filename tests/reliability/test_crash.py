"""kill -9 at any moment: the same command goes on, and ends with the very result of an unbroken run.

24 moments are drawn; KDTOOL_EVERY_MOMENT=1 tries them all. Kills of the real command line from outside
are in tests/pipelines/test_interrupt.py.
"""

import hashlib
import json
import os
import random
import signal

import pytest
from safetensors.torch import load_file, save_file

from kdtool.train import checkpoint
from tests.reliability.conftest import STEPS, read

TRIALS = 400 if os.environ.get("KDTOOL_EVERY_MOMENT") else 24


def checkpoints_of(folder):
    return folder / ".kdtool" / "checkpoints"


def steps_of(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoints_of(folder).glob("step-*"))


def claim_of(folder):
    path = folder / ".kdtool" / "run.json"
    return json.loads(path.read_text()) if path.is_file() else None


def check_whole(folder, wanted):
    """The result of an unbroken run, each file as its manifest says, and nothing else."""
    found = read(folder, [])
    assert found.weights == wanted.weights
    assert found.history == wanted.history
    assert found.metrics == wanted.metrics
    files = json.loads((folder / "kdtool.json").read_text())["files"]
    for name, facts in files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"], name
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {*files, "kdtool.json"}


def check_left(folder, wanted, event):
    """What a kill before an event leaves: every durable checkpoint, and a manifest only on a whole result.

    Returns:
        The step that the next run must go on from.
    """
    written = sum(name.startswith("rename .step-") for name in wanted.events[:event])
    claim = claim_of(folder)
    if claim and claim["state"] == "working":
        found = checkpoint.newest(checkpoints_of(folder), pytest.fail)
        assert (found[1]["step"] if found else 0) == written
        assert steps_of(folder)[-2:] == [step for step in (written - 1, written) if step > 0]
    if (folder / "kdtool.json").exists():
        assert (folder / "model.safetensors").read_bytes() == wanted.weights
    return written


def check_survives(driver, command, wanted, folder, event):
    ended = driver.run(*command, "-o", folder, event=event)
    assert ended.signal == signal.SIGKILL, ended.text
    step = check_left(folder, wanted, event)
    claim = claim_of(folder)
    if claim or not (folder / "kdtool.json").exists():
        again = driver.run(*command, "-o", folder)
        assert again.code == 0, again.text
        moving = claim is not None and claim["state"] == "moving"
        said = "lacked only its last files" if moving else f"resuming after step {step} of {STEPS}"
        assert said in again.text or (step == 0 and "resuming" not in again.text)
    if (folder / ".kdtool").exists():
        assert not list((folder / ".kdtool").iterdir())
        (folder / ".kdtool").rmdir()
    check_whole(folder, wanted)


@pytest.fixture(scope="session")
def moments(unbroken):
    """Event numbers: a third of them while the result is saved and moved, some the ones that once lost data."""
    names = unbroken().events
    chosen = random.Random(0)
    moved = len(names) - names[::-1].index("replace model.safetensors")
    late = [event for event in range(len(names) - names[::-1].index("stepped"), len(names)) if event != moved]
    drawn = [moved, *chosen.sample(late, min(TRIALS // 3, len(late)))]
    rest = [event for event in range(len(names)) if event not in drawn]
    return sorted(drawn + chosen.sample(rest, min(TRIALS - len(drawn), len(rest))))


@pytest.mark.parametrize("trial", range(TRIALS))
def test_killed_at_any_moment(driver, command, unbroken, moments, tmp_path, trial):
    if trial >= len(moments):
        pytest.skip("all moments were tried")
    check_survives(driver, command(), unbroken(), tmp_path / "out", moments[trial])


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(driver, command, unbroken, tmp_path, seed):
    chosen, folder = random.Random(seed), tmp_path / "out"
    for _ in range(3):
        ended = driver.run(*command(), "-o", folder, event=chosen.randrange(12, 60))
        assert ended.signal == signal.SIGKILL, ended.text
    assert driver.run(*command(), "-o", folder).code == 0
    check_whole(folder, unbroken())


@pytest.mark.parametrize("at", ["step 2", "gradients 3", "gradients 4", "tear tensors.safetensors 5", "stepped 6"])
def test_killed_in_stages_with_helpers(driver, command, unbroken, tmp_path, at):
    """40 % of 6 steps are the first stage: kills in the second must bring back its optimiser, not the first's."""
    name, _, number = at.rpartition(" ")
    events = unbroken("two-stage").events
    event = [i for i, event in enumerate(events) if event == name][int(number) - 1]
    check_survives(driver, command("two-stage"), unbroken("two-stage"), tmp_path / "out", event)


def nth(events, name, number):
    return [i for i, event in enumerate(events) if event.startswith(name)][number - 1]


@pytest.mark.parametrize("number", ["INT", "TERM"])
@pytest.mark.parametrize("at", ["gradients 3", "write tensors.safetensors 3", "teacher 1", "write model.safetensors 1"])
def test_a_signal_exits_130_and_the_run_can_go_on(driver, command, unbroken, tmp_path, number, at):
    name, _, count = at.rpartition(" ")
    event = nth(unbroken().events, name, int(count))
    ended = driver.run(*command(), "-o", tmp_path / "out", event=event, signal=number)
    assert ended.code == 130, ended.text
    assert "Traceback" not in ended.text
    if name in ("gradients", "write tensors.safetensors"):
        # in a step it is ended first; while a checkpoint is written, the next step is
        step = int(count) + (name != "gradients")
        assert f"stopped after step {step} of {STEPS}" in ended.text
        assert steps_of(tmp_path / "out")[-1] == step
    elif name == "teacher":
        assert not (tmp_path / "out").exists(), "nothing worth keeping"
    else:
        assert steps_of(tmp_path / "out")[-1] == STEPS - 1
    assert driver.run(*command(), "-o", tmp_path / "out").code == 0
    check_whole(tmp_path / "out", unbroken())


def test_a_signal_while_files_move_loses_none_of_them(driver, command, unbroken, tmp_path):
    event = nth(unbroken().events, "replace report.md", 1)
    assert driver.run(*command(), "-o", tmp_path / "out", event=event, signal="TERM").code == 130
    again = driver.run(*command(), "-o", tmp_path / "out", "--json")
    assert again.code == 0
    answer = json.loads(again.text[again.text.index("{") :])
    assert answer["metrics"]["student"] == unbroken().metrics["student"]
    assert answer["steps"] == STEPS
    check_whole(tmp_path / "out", unbroken())


def test_killed_while_it_replaces_an_older_result(driver, command, unbroken, tmp_path):
    folder = tmp_path / "out"
    assert driver.run(*command(), "-o", folder, "--seed", "5").code == 0
    older = (folder / "model.safetensors").read_bytes()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"a shard of an older result")
    event = nth(unbroken().events, "replace model.safetensors", 1)
    # the old result adds events at the start; the kill is somewhere in the moves either way
    ended = driver.run(*command(), "-o", folder, "--overwrite", event=event)
    assert ended.signal == signal.SIGKILL
    assert claim_of(folder)["state"] == "moving"
    assert older != unbroken().weights
    assert driver.run(*command(), "-o", folder, "--overwrite").code == 0
    check_whole(folder, unbroken())


@pytest.mark.parametrize("at", ["teacher 3", "checksum 2", "gradients 3"])
def test_killed_while_a_shared_teacher_cache_is_filled(driver, command, unbroken, tmp_path, at):
    name, _, count = at.rpartition(" ")
    event = nth(unbroken().events, name, int(count))
    shared = [*command(), "--teacher-cache", tmp_path / "cache"]
    assert driver.run(*shared, "-o", tmp_path / "out", event=event).signal == signal.SIGKILL
    # another run takes over what was filled, then the killed one goes on
    for folder in ("other", "out"):
        assert driver.run(*shared, "-o", tmp_path / folder).code == 0
        check_whole(tmp_path / folder, unbroken())


# Damaged checkpoints


def cut(path):
    os.truncate(path / "tensors.safetensors", (path / "tensors.safetensors").stat().st_size // 2)


def flip(path):
    content = bytearray((path / "tensors.safetensors").read_bytes())
    content[len(content) // 2] ^= 16
    (path / "tensors.safetensors").write_bytes(content)


def no_state(path):
    (path / "state.json").unlink()


def other_state(path):
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"step": 4', '"step": 3'))


def no_optimizer(path):
    """Even with sums that fit: what is missing would be started anew in silence."""
    tensors = load_file(path / "tensors.safetensors")
    save_file({name: t for name, t in tensors.items() if "exp_avg" not in name}, path / "tensors.safetensors")
    record = json.loads((path / "state.json").read_text())
    record["size"] = (path / "tensors.safetensors").stat().st_size
    record["sha256"] = checkpoint.file_hash(path / "tensors.safetensors")
    record["digest"] = checkpoint._digest(record)
    (path / "state.json").write_text(json.dumps(record))


DAMAGE = {
    cut: "not of its size",
    flip: "has changed",
    no_state: "No such file",
    other_state: "state.json has changed",
    no_optimizer: "tensors are missing",
}


@pytest.fixture
def cut_off(driver, command, unbroken, tmp_path):
    """A run killed in its fifth step, with checkpoints of steps 3 and 4."""
    event = nth(unbroken().events, "gradients", 5)
    assert driver.run(*command(), "-o", tmp_path / "out", event=event).signal == signal.SIGKILL
    assert steps_of(tmp_path / "out") == [3, 4]
    return tmp_path / "out"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(driver, command, unbroken, cut_off, damage):
    damage(checkpoints_of(cut_off) / "step-4")
    again = driver.run(*command(), "-o", cut_off)
    assert again.code == 0, again.text
    warnings = [line for line in again.text.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "checkpoint step-4 is damaged" in warnings[0]
    assert DAMAGE[damage] in warnings[0]
    assert f"resuming after step 3 of {STEPS}" in again.text
    check_whole(cut_off, unbroken())


def test_without_a_sound_checkpoint_the_run_starts_over(driver, command, unbroken, cut_off):
    for step in (3, 4):
        flip(checkpoints_of(cut_off) / f"step-{step}")
    # killed after its first checkpoint: the damaged ones of later steps must not outlive it
    event = nth(unbroken().events, "step", 2)
    ended = driver.run(*command(), "-o", cut_off, event=event)
    assert ended.text.count("is damaged") == 2
    assert all(step < 3 for step in steps_of(cut_off))
    assert driver.run(*command(), "-o", cut_off).code == 0
    check_whole(cut_off, unbroken())


def test_half_written_folders_are_cleaned(driver, command, unbroken, tmp_path):
    folder = tmp_path / "out"
    driver.run(*command(), "-o", folder, event=nth(unbroken().events, "tear tensors.safetensors", 3))
    left = checkpoints_of(folder)
    assert {path.name for path in left.iterdir()} == {"step-1", "step-2", ".step-3.partial"}
    checkpoint.discard(left, after=1)
    assert {path.name for path in left.iterdir()} == {"step-1"}
