import inspect
from collections.abc import Callable
from typing import Any

import pytest

from kdtool.cli import app, launch, options
from kdtool.cli.compare import compare
from kdtool.cli.compress import compress
from kdtool.cli.distill import distill
from kdtool.cli.evaluate import evaluate
from kdtool.cli.export import export
from kdtool.cli.patch_attention import patch_attention
from kdtool.config import key_paths

COMMANDS = {
    "distill": distill,
    "compare": compare,
    "compress": compress,
    "evaluate": evaluate,
    "export": export,
    "patch-attention": patch_attention,
}
NO_KEY = {
    "ctx", "config", "set_", "revision", "student_revision", "dry_run", "no_teacher_cache", "launcher", "nproc",
    "json", "quiet", "verbose", "token",
}  # fmt: skip


def test_options_set_keys_that_exist() -> None:
    known = {*key_paths(), "method.name"}
    for table in (options.KEYS, *options.COMMAND_KEYS.values()):
        assert set(table.values()) <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_every_parameter_has_a_meaning(command: str) -> None:
    parameters = set(inspect.signature(COMMANDS[command]).parameters)
    assert parameters - NO_KEY <= {*options.KEYS, *options.COMMAND_KEYS[command]}


def test_one_word_one_meaning() -> None:
    """An option is declared once: same annotation, same flags, same variable wherever it appears."""
    seen: dict[str, Any] = {}
    for function in COMMANDS.values():
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in ("ctx", "model", "teacher", "method"):  # a method is of the command
                assert seen.setdefault(name, parameter.annotation) == parameter.annotation


def test_every_option_has_its_variable() -> None:
    group = app.build()
    for command in COMMANDS:
        for param in group.commands[command].params:
            if param.param_type_name == "option" and param.name != "help":
                flag = next(flag for flag in param.opts if flag.startswith("--"))
                assert param.envvar == "KDTOOL_" + flag[2:].replace("-", "_").upper()


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make the configuration that a command line stands for."""

    def call(command: str, *arguments: str) -> Any:
        built: list[Any] = []
        monkeypatch.setattr(
            f"kdtool.cli.{command}.start",
            lambda name, values: built.append(launch.build_config(name, values, values["ctx"])),
        )
        with app.build().make_context("kdtool", [command, *arguments]) as context:
            context.command.invoke(context)
        return built[0]

    return call


def test_options_reach_the_configuration(build) -> None:
    config = build(
        "distill", "t", "--student", "layers:4", "--method", "kd", "-d", "set", "--task", "causal-lm", "--lr", "1e-3",
        "--max-steps", "7", "--no-resume", "--seed", "3", "--dtype", "bfloat16", "--limit", "9", "--no-private",
        "--metrics", "accuracy, ece", "--fail-under", "accuracy=0.5", "--fail-under", "accuracy.retention=0.9",
        "--set", "method.temperature=2.0", "-o", "out", "--cache-dir", "cache", "--fine-tune-teacher",
    )  # fmt: skip
    assert config.teacher.model == "t"
    assert config.teacher.fine_tune is True
    assert config.student.model == "layers:4"
    assert config.method == {"name": "kd", "temperature": 2.0}
    assert config.train.lr == 1e-3
    assert config.train.max_steps == 7
    assert config.train.resume is False
    assert config.runtime.seed == 3
    assert config.runtime.cache_dir == "cache"
    assert config.data.limit == 9
    assert config.eval.metrics == ["accuracy", "ece"]
    assert config.eval.fail_under == ["accuracy=0.5", "accuracy.retention=0.9"]
    assert config.output.private is False
    assert config.output.folder == "out"


def test_absent_options_keep_the_defaults(build) -> None:
    from kdtool.sections import RunConfig

    config = build("distill")
    assert config.model_dump() == RunConfig().model_dump()


def test_models_by_command(build) -> None:
    config = build("evaluate", "m", "--teacher", "t", "--limit", "5", "--revision", "v1")
    assert (config.student.model, config.teacher.model) == ("m@v1", "t")
    assert (config.data.limit, config.data.test_limit) == (None, 5)
    assert build("export", "m", "--format", "safetensors").teacher.model == "m"
    config = build("distill", "t", "--student", "s", "--revision", "v1", "--student-revision", "v2")
    assert (config.teacher.model, config.student.model) == ("t@v1", "s@v2")


def test_the_token_never_reaches_the_configuration(build) -> None:
    assert "hf_secret" not in build("distill", "t", "--token", "hf_secret").model_dump_json()
