"""optimum-cli in an environment of its own: its ONNX part does not work beside this transformers."""

import shutil
import subprocess
from pathlib import Path

from kdtool.errors import QualityProblem, UsageProblem
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.tasks._base import Task

_TASKS = {"causal-lm": "text-generation"}
"""optimum's word for a task, where it differs."""

HOW = (
    "make an environment for it: python -m venv OPT && OPT/bin/pip install 'optimum-onnx[onnxruntime]' "
    "'transformers<4.58', then --set method.optimum_python=OPT/bin/python"
)


def write(loaded: Loaded, task: Task, path: Path, opset: int, python: str | None, run: Run) -> None:
    """Export a model's files through `optimum-cli export onnx`.

    Args:
        loaded: The model; its folder is read by the other environment.
        task: Its task.
        path: The .onnx file to write.
        opset: ONNX operator set.
        python: Interpreter of the environment that has optimum-onnx.
        run: Context.

    Raises:
        UsageProblem: no such interpreter, or the model has no folder.
        QualityProblem: optimum failed; its last line is given.
    """
    if python is None:
        raise UsageProblem("the engine optimum needs an environment of its own", hint=HOW)
    found = shutil.which(str(Path(python).expanduser()))
    if found is None:
        raise UsageProblem(f"method.optimum_python: '{python}' is no program", hint=HOW)
    if loaded.folder is None:
        raise UsageProblem(f"'{loaded.ref}' has no folder that optimum could read")
    made = path.parent / "optimum"
    words = [found, "-m", "optimum.commands.optimum_cli", "export", "onnx", "--model", str(loaded.folder)]
    words += ["--task", _TASKS.get(task.name, task.name), "--opset", str(opset), str(made)]
    run.reporter.info("exporting with optimum-cli in its own environment")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (made / "model.onnx").is_file():
        last = (done.stderr.strip() or "no message").rsplit("\n", 1)[-1][:300]
        missing = "No module named" in last
        raise (UsageProblem if missing else QualityProblem)(
            f"optimum could not export '{loaded.ref}'", why=last, hint=HOW if missing else None
        )
    # other files of optimum's folder are copies of what kdtool writes itself
    for file in made.glob("model.onnx*"):
        file.replace(path.parent / file.name)
    shutil.rmtree(made)
