"""Two processes give what one with the doubled batch gives."""

import json
import os
import subprocess
import sys

import pytest

SMALL = [
    *("--set", "data.max_length=32", "--limit", "40", "--set", "data.test_limit=8", "--max-steps", "4"),
    *("--set", "train.log_every=1", "--set", "eval.latency=false", "--set", "eval.reload=false"),
    *("--set", "output.plots=false", "--set", "output.dtype=float32", "--offline", "--device", "cpu"),
]


def losses(folder, *launch, batch, extra=()):
    from kdtool.recipes import path

    command = [*launch, "-m", "kdtool", "distill", "-c", str(path("quickstart-stories")), *SMALL, *extra]
    command += ["--batch-size", str(batch), "-o", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [row["loss"] for row in json.loads((folder / "kdtool.json").read_text())["history"]]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one_with_the_doubled_batch(kind, tmp_path):
    one = losses(tmp_path / "one", sys.executable, batch=6)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = losses(tmp_path / "two", *torchrun, batch=3, extra=("--set", f"train.parallel={kind}"))
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-5)
