"""`quickstart`: the main job on real data that travels with the package."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdtool.config import load_config
from kdtool.errors import UsageProblem, nearest
from kdtool.models import load
from kdtool.pipelines.distill import distill
from kdtool.proof import Result, Side, number
from kdtool.run import Run

_NAMES = {"stories": "stories", "intents": "intents"}
_PROMPT = "Once upon a time"


def quickstart(name: str, run: Run, output: Path) -> Result:
    """Distil a shipped teacher on shipped data, with and without the teacher, and compare.

    Args:
        name: `stories` (a language model, about a minute) or `intents` (a sentence classifier).
        run: Context.
        output: Folder; the students go to `kd` and `none` inside.

    Returns:
        The result of the student with a teacher; `extra["control"]` holds the one without.

    Raises:
        UsageProblem: no such quickstart, or the output folder is in use.
    """
    if name not in _NAMES:
        raise UsageProblem(f"unknown quickstart '{name}'", hint=nearest(name, _NAMES))
    began = time.perf_counter()
    recipe = Path(__file__).parent.parent / "recipes" / f"quickstart-{name}.yaml"
    say = run.reporter.info
    results: dict[str, Result] = {}
    for method, meaning in (("none", "the control: labels only"), ("kd", "with the teacher")):
        config = load_config("distill", recipe, [], {"output.folder": str(output / method), "runtime.seed": run.seed})
        if method == "none":
            config.method = {"name": "none"}
            config.eval.latency = False
        say(f"student {'1' if method == 'none' else '2'} of 2, {meaning}")
        command = f"kdtool distill -c {output / method / 'kdtool.json'} -o FOLDER"
        results[method] = distill(config, replace(run, provenance={"command": command}))
    main, control = results["kd"], results["none"]
    assert main.proof is not None
    assert control.proof is not None
    extra: dict[str, Any] = {
        "quickstart": name,
        "control": {"metrics": control.proof.student.metrics, "output": str(control.output)},
        "comparison": _comparison(main.proof.student, control.proof.student, main.proof.teacher),
        "next": f"kdtool evaluate {main.output} --teacher {config.teacher.model} --data {config.data.source}",
    }
    if name == "stories":
        assert config.teacher.model is not None
        extra["stories"] = {"teacher": _story(config.teacher.model, run), "student": _story(str(main.output), run)}
    return Result("quickstart", output, main.proof, time.perf_counter() - began, main.steps, main.extra | extra)


def _comparison(student: Side, control: Side, teacher: Side | None) -> list[list[str]]:
    """Rows of a table: metric, teacher, student with the teacher, student without."""
    rows = [["metric", "teacher", "student (kd)", "student (none)"]]
    for metric in student.metrics:
        sides = (teacher, student, control)
        rows.append(
            [metric, *(number(side.metrics.get(metric), side.errors.get(metric)) if side else "-" for side in sides)]
        )
    return rows


@torch.inference_mode()
def _story(reference: str, run: Run) -> str:
    """A greedy continuation, so that anyone can judge by reading."""
    from transformers import AutoTokenizer

    from kdtool.models import resolve

    folder, _ = resolve(reference, run)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = load(reference, "causal-lm", run).float()
    inputs = tokenizer(_PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=120, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
