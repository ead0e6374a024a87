"""kill -9 at any moment: the same command goes on, and ends with the very result of an unbroken run."""

import hashlib
import json
import signal

from kdtool.train import checkpoint
from tests.reliability.conftest import STEPS, read

TRIALS = 24


def checkpoints_of(folder):
    return folder / ".kdtool" / "checkpoints"


def steps_of(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoints_of(folder).glob("step-*"))


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


def check_survives(driver, command, unbroken, folder, event, method="kd"):
    ended = driver.run(*command(method), "-o", folder, event=event)
    assert ended.signal == signal.SIGKILL
    found = checkpoint.newest(checkpoints_of(folder)) if checkpoints_of(folder).exists() else None
    claimed = (folder / ".kdtool" / "run.json").is_file()
    done = unbroken(method).events[:event].count("step")
    if claimed and done >= 3 and checkpoints_of(folder).exists() and "teacher-cache" in str(list(folder.rglob("*"))):
        assert found is not None, "older checkpoints go only when the new one is there"
    if (folder / "kdtool.json").exists():
        # the manifest moves last: where it is, all is
        assert (folder / "model.safetensors").read_bytes() == unbroken(method).weights
    if not claimed and (folder / "kdtool.json").exists():
        check_whole(folder, unbroken(method))
        return
    again = driver.run(*command(method), "-o", folder)
    assert again.code == 0, again.text
    if found is not None and found[1]["step"] < STEPS and "teacher" not in again.text:
        assert f"resuming after step {found[1]['step']} of {STEPS}" in again.text
    check_whole(folder, unbroken(method))


def test_all(driver, command, unbroken, tmp_path):
    import collections
    import time

    ev = unbroken().events
    print(len(ev))
    print(collections.Counter(e.split()[0] for e in ev))
    print(ev)
    for n in range(len(ev)):
        t = time.time()
        try:
            check_survives(driver, command, unbroken, tmp_path / f"o{n}", n)
        except AssertionError as e:
            print("FAIL", n, ev[n], str(e)[:1500])
    print(time.time() - t)
