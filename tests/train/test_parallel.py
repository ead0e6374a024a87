"""Two processes are one with the doubled batch, whatever happens to them on the way.

Each launch takes seconds, so there are four: one by torchrun itself, three by --launcher.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdtool.config import load_config
from kdtool.pipelines import distill
from kdtool.pipelines.setup import make_run
from kdtool.run import Silent
from kdtool.train import checkpoint, parallel
from tests import tiny
from tests.cli.conftest import clean_environment

BATCH = 4
LONG = 160
QUICK = ["eval.latency=false", "eval.reload=false", "output.plots=false", "train.log_every=1", "train.lr=0.001"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "kdtool"]
LAUNCHER = [sys.executable, "-m", "kdtool"]
FROZEN = ["student.freeze=[embeddings]"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Teacher without dropout, and 17 texts of 3 to 12 words: two processes share steps of 8, 8 and 1 row."""
    root = tmp_path_factory.mktemp("parts")
    return tiny.bert(root / "teacher", dropout=0.0), tiny.text_data(root / "rows", train=17)


def command(parts, folder, *settings, launch, more=()):
    teacher, rows = parts
    words = [*launch, "distill", teacher, "--student", "layers:2", "--method", "kd", "--data", rows]
    words += ["--batch-size", BATCH, "--json", "-o", folder, *more]
    for item in (*QUICK, *settings):
        words += ["--set", item]
    return list(map(str, words))


def start(words, folder):
    return subprocess.Popen(
        words, env=clean_environment(), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


class Listens(Silent):
    def __init__(self):
        self.said, self.warned = [], []

    def info(self, message):
        self.said.append(message)

    def warn(self, message):
        self.warned.append(message)


def alone(parts, folder, *settings, batch=2 * BATCH, **options):
    """The same run in this process; gives its reporter."""
    teacher, rows = parts
    options = {f"train.{name}": value for name, value in options.items()} | {"train.batch_size": batch}
    options |= {"teacher.model": str(teacher), "student.model": "layers:2", "data.source": str(rows)}
    options |= {"method.name": "kd", "output.folder": str(folder)}
    config = load_config("distill", None, [*QUICK, *settings], options)
    listens = Listens()
    distill(config, make_run(config, listens))
    return listens


def weights(folder):
    return load_file(folder / "model.safetensors")


def losses(folder):
    return [row["loss"] for row in json.loads((folder / "kdtool.json").read_text())["history"]]


def check_equal(found, wanted):
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-4)
    left, right = weights(found), weights(wanted)
    assert left.keys() == right.keys()
    for name, value in left.items():
        if name.endswith("key.bias"):
            continue  # does not change attention: its gradient is rounding alone, which AdamW makes large
        torch.testing.assert_close(value, right[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)


def test_torchrun_gives_what_one_process_with_the_doubled_batch_gives(parts, tmp_path):
    process = start(command(parts, tmp_path / "two", launch=TORCHRUN, more=["--epochs", 3]), tmp_path)
    alone(parts, tmp_path / "one", epochs=3.0)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert json.loads(out)["steps"] == 9, "exactly one object: the second process is silent"
    check_equal(tmp_path / "two", tmp_path / "one")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


def test_sharded_with_frozen_parts_and_a_missed_gate_through_the_launcher(parts, tmp_path):
    more = ["--launcher", "torchrun", "--nproc", 2, "--epochs", 3, "--fail-under", "nll=0.001"]
    words = command(parts, tmp_path / "two", "train.parallel=fsdp2", *FROZEN, launch=LAUNCHER, more=more)
    process = start(words, tmp_path)
    alone(parts, tmp_path / "one", *FROZEN, epochs=3.0)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 3, err
    assert [gate["passed"] for gate in json.loads(out)["gates"]] == [False]
    assert "Traceback" not in err
    check_equal(tmp_path / "two", tmp_path / "one")
    teacher = load_file(parts[0] / "model.safetensors")
    kept = {name: value for name, value in weights(tmp_path / "two").items() if "embeddings." in name}
    assert kept
    assert all(torch.equal(value, teacher[name]) for name, value in kept.items()), "sharding must not thaw them"


def worker_of(folder, rank):
    """Process id of the worker of a rank whose command names a folder; None while there is none."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and f"RANK={rank}".encode() in environment:
            return int(entry.name)
    return None


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker in /proc")
def test_a_lost_worker_ends_the_job_and_any_number_of_processes_goes_on(parts, tmp_path):
    lost, again = tmp_path / "lost", tmp_path / "again"
    more = ["--launcher", "torchrun", "--nproc", 2, "--max-steps", LONG]
    process = start(command(parts, lost, "train.checkpoint_every=5", launch=LAUNCHER, more=more), tmp_path)
    deadline = time.monotonic() + 600
    while not list((lost / ".kdtool" / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(worker_of(lost, 1), signal.SIGKILL)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 1
    assert json.loads(out)["error"]["code"] == "training"
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "process" in lines[0]
    assert "same command goes on" in err
    assert checkpoint.newest(lost / ".kdtool" / "checkpoints") is not None

    alone(parts, tmp_path / "one", "train.checkpoint_every=100", max_steps=LONG)
    shutil.copytree(lost, again)
    words = command(parts, again, "train.checkpoint_every=5", launch=LAUNCHER, more=more)
    process = start(words, tmp_path)
    # the very configuration of the lost run, so its batch of 4, but in one process
    listens = alone(parts, lost, "train.checkpoint_every=5", max_steps=LONG, batch=BATCH)
    assert any("steps keep their 8 rows" in message for message in listens.warned)
    assert any("resuming after step" in message for message in listens.said)
    check_equal(lost, tmp_path / "one")
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    check_equal(again, tmp_path / "one")


def test_gradients_sharded_and_plain_are_kept_apart():
    plain = [torch.tensor([3.0]), torch.tensor([4.0])]
    assert parallel.by_kind(plain) == [plain]
    assert float(parallel.total_norm(plain)) == pytest.approx(5.0)
