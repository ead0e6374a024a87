"""The configuration of a run from defaults, files and overrides; strict and torch-free.

Precedence: defaults, then the file (`-c`), then `--set` overrides, then command-line options.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from kdtool.errors import ConfigProblem, UsageProblem, nearest
from kdtool.registry import ATTENTION, COMPRESSORS, EXPORTERS, METHODS, Plugin, Registry
from kdtool.sections import Command, RunConfig


def stages(config: RunConfig) -> list[tuple[str, dict[str, Any]]]:
    """Name and settings of each stage of `compress`, in order.

    Settings of one method stand beside its name, those of several under their names:
    `method.width.ffn=0.5`.
    """
    names = [name.strip() for name in config.method_name.split(",") if name.strip()]
    values = config.method_values
    return [(name, values if len(names) == 1 else dict(values.get(name) or {})) for name in names]


def before_recovery(names: Sequence[str]) -> int:
    """How many stages come before recovery: all but the last ones that training would undo or does not concern.

    Raises:
        UsageProblem: training would undo a stage before another one.
    """
    facts = [COMPRESSORS.info(name).facts for name in names]
    count = len(names)
    while count and (facts[count - 1].get("late") or not facts[count - 1].get("trainable", True)):
        count -= 1
    stuck = [name for name, fact in zip(names[:count], facts, strict=False) if not fact.get("trainable", True)]
    if stuck:
        raise UsageProblem(
            f"--recover cannot train what {stuck[0]} makes", hint=f"put {stuck[0]} last: recovery comes before it"
        )
    return count


def _check_stages(config: RunConfig, where: str) -> None:
    """Check the settings of each compressor; see `stages`."""
    found = stages(config)
    names = [name for name, _ in found]
    if len(set(names)) != len(names):
        raise ConfigProblem(f"{where}a compressor comes twice in '{config.method_name}'")
    for name, values in found:
        checked = check_plugin_values(COMPRESSORS.info(name), values, "method" + f".{name}" * (len(found) > 1), where)
        if len(found) > 1:
            config.method[name] = checked
        else:
            config.method = {"name": name, **checked}
    stray = [key for key in config.method_values if len(found) > 1 and key not in names]
    if stray:
        raise ConfigProblem(
            f"{where}unknown key 'method.{stray[0]}' for {config.method_name}",
            hint=f"settings of one of several are written method.{names[0]}.NAME",
        )


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-5 is a number and duplicate keys are errors."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _no_duplicates(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.MarkedYAMLError(problem="a key that is no word", problem_mark=key_node.start_mark)
        if key in keys:
            raise yaml.MarkedYAMLError(problem=f"key '{key}' appears twice", problem_mark=key_node.start_mark)
        keys.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


_Loader.add_constructor("tag:yaml.org,2002:map", _no_duplicates)


def parse_scalar(text: str) -> Any:
    """Read the right-hand side of `--set key=value` as YAML (`1e-5`, `true`, `[a, b]`, `text`)."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader derives from SafeLoader
    except yaml.YAMLError:
        return text


def read_file(path: Path) -> tuple[dict[str, Any], str]:
    """Read a YAML or JSON configuration, or the `config` part of a `kdtool.json` manifest.

    Returns:
        The mapping and the text it came from (for line numbers).

    Raises:
        ConfigProblem: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.[yj]*")]) if path.parent.is_dir() else None
        raise ConfigProblem(f"configuration file {path} does not exist", hint=near) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigProblem(f"configuration file {path} cannot be read", why=str(error)) from None
    try:
        values = yaml.load(text, Loader=_Loader)  # noqa: S506
    except RecursionError:
        raise ConfigProblem(f"{path}: nested too deeply", hint="configurations are YAML or JSON mappings") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        why = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigProblem(f"{where}: {why}", hint="configurations are YAML or JSON mappings") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigProblem(f"{path}: a configuration is a mapping of sections", hint="see: kdtool recipes show NAME")
    if "kdtool" in values and isinstance(values.get("config"), dict):
        values = values["config"]
    return values, text


def _line_of(text: str, keys: Sequence[str | int]) -> int | None:
    """Line (from 1) of the deepest part of a key path that the text holds."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        return None
    line: int | None = None
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            for key_node, value in node.value:
                if key_node.value == str(key):
                    line, node = key_node.start_mark.line + 1, value
                    break
            else:
                return line
        else:
            return line
    return line


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply `--set key.path=value` items to nested mappings, in order.

    Raises:
        ConfigProblem: an item has no `=`, an empty key, or goes through something that is no section.
    """
    for item in overrides:
        key, sign, value = item.partition("=")
        parts = key.strip().split(".")
        if not sign or not all(parts):
            raise ConfigProblem(f"--set {item}: not of the form key.path=value", hint="such as --set train.lr=1e-4")
        target = values
        for part in parts[:-1]:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ConfigProblem(f"--set {item}: '{part}' is a value, not a section")
        target[parts[-1]] = parse_scalar(value)


def _known_keys(path: Sequence[str | int]) -> list[str]:
    model: Any = RunConfig
    for part in path:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        model = field.annotation
    if isinstance(model, type) and issubclass(model, BaseModel):
        return list(model.model_fields)
    return []


def key_paths() -> Iterator[str]:
    """All key paths of the configuration, such as `train.lr`."""
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{key}" for key in field.annotation.model_fields)
        else:
            yield name


def _unknown_key(where: str, path: Sequence[str | int]) -> ConfigProblem:
    name = ".".join(map(str, path))
    siblings = _known_keys(path[:-1])
    elsewhere = [full for full in key_paths() if full.rsplit(".", 1)[-1] == path[-1]]
    if elsewhere and not difflib.get_close_matches(str(path[-1]), siblings, cutoff=0.75):
        hint = f"did you mean {', '.join(elsewhere)}?"
    else:
        hint = nearest(str(path[-1]), siblings)
    return ConfigProblem(f"{where}unknown key '{name}'", hint=hint)


def _explain(error: ValidationError, path: Path | None, text: str) -> ConfigProblem:
    """One line for the first problem of a validation."""
    problem = error.errors(include_url=False)[0]
    location = [
        part for part in problem["loc"] if not (isinstance(part, str) and part.startswith(("literal[", "dict[")))
    ]
    line = _line_of(text, location) if text else None
    where = f"{path}:{line}: " if path and line else ""
    if problem["type"] == "extra_forbidden":
        return _unknown_key(where, location)
    name = ".".join(map(str, location))
    detail = str(problem["msg"]).replace("Input should", "should").removeprefix("Value error, ")
    return ConfigProblem(
        f"{where}{name}={problem['input']!r}: {detail}", hint="see docs/configuration.md, or the command's --help"
    )


_CACHE = "cache:"
"""Begins what stands in the place of a model where a cache stands for the teacher."""

_REGISTRY_OF: Mapping[str, Registry] = {
    "distill": METHODS,
    "patch-attention": ATTENTION,
}


def check_plugin_values(plugin: Plugin, values: Mapping[str, Any], prefix: str, where: str = "") -> dict[str, Any]:
    """Check hyper-parameters against a plug-in's declared settings, without importing it.

    Raises:
        ConfigProblem: an unknown name, a missing required one, or a value of the wrong type or range.
    """
    known = {setting.name: setting for setting in plugin.settings}
    names = {"Any": Any, "Literal": Literal, "Field": Field}
    from typing import Annotated

    names["Annotated"] = Annotated
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigProblem(
                f"{where}unknown key '{prefix}.{key}' for {plugin.name}",
                hint=f"{nearest(key, known)} See: kdtool methods show {plugin.name}",
            )
        annotation = eval(known[key].annotation, {"__builtins__": _TYPES}, names)  # noqa: S307 - our own plug-in source, names only
        try:
            checked[key] = TypeAdapter(annotation).validate_python(value, strict=True)
        except ValidationError as error:
            detail = str(error.errors(include_url=False)[0]["msg"]).replace("Input should", "should")
            raise ConfigProblem(
                f"{where}{prefix}.{key}={value!r}: {detail}", hint=f"see: kdtool methods show {plugin.name}"
            ) from None
    for setting in plugin.settings:
        if setting.required and setting.name not in checked:
            raise ConfigProblem(f"{plugin.name} needs --set {prefix}.{setting.name}=...", hint=setting.doc or None)
    return checked


_TYPES = {t.__name__: t for t in (int, float, str, bool, list, dict, tuple)} | {"None": None}


def load_config(
    command: Command,
    path: Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Merge defaults, file, `--set` items and command-line options into one checked configuration.

    Args:
        command: The subcommand this configuration is for.
        path: YAML or JSON file, or a `kdtool.json` manifest.
        overrides: `key.path=value` items.
        options: Key path to value; None values mean "not given".

    Raises:
        ConfigProblem: anything unknown, of the wrong type or out of range, with file and line.
    """
    values, text = read_file(path) if path else ({}, "")
    stated = values.get("command", command)
    if stated != command and (stated, command) != ("distill", "compare"):
        raise ConfigProblem(f"{path} is a configuration for 'kdtool {stated}', not 'kdtool {command}'")
    values["command"] = command
    if isinstance(values.get("method"), str):
        values["method"] = {"name": values["method"]}
    apply_overrides(values, overrides)
    method = values.get("method")
    if isinstance(method, dict) and "terms" in method and not (options or {}).get("method.name"):
        method.setdefault("name", "combine")
    for key, value in (options or {}).items():
        if value is not None:
            section, _, name = key.partition(".")
            target = values.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigProblem(f"'{section}' is a section, not a value", hint=f"write {section}: {{...}}")
            target[name] = value
    teacher = values.get("teacher")
    if isinstance(teacher, dict) and str(teacher.get("model")).startswith(_CACHE):
        teacher["cache"] = str(teacher.pop("model")).removeprefix(_CACHE)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, path, text) from None
    if command == "patch-attention" and not config.method_name:
        config.method = {"name": "cluster", **config.method}
    registry = _REGISTRY_OF.get(command)
    line = _line_of(text, ["method"]) if text else None
    where = f"{path}:{line}: " if line else ""
    if command == "export":
        # the plug-in is output.format, so its settings are all that `method` holds
        config.method = check_plugin_values(EXPORTERS.info(config.output.format), config.method, "method", where)
    elif command == "compress":
        _check_stages(config, where)
        recovery = METHODS.info(config.recover.method)
        config.recover.settings = check_plugin_values(recovery, config.recover.settings, "recover.settings", where)
    elif registry is not None and config.method_name:
        plugin = registry.info(config.method_name)
        checked = check_plugin_values(plugin, config.method_values, "method", where)
        config.method = {"name": plugin.name, **checked}
    return config


def dump_json(config: RunConfig) -> str:
    """The resolved configuration as JSON, in declaration order."""
    return json.dumps(config.model_dump(mode="json"), indent=2)
