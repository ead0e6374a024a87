"""What `compare` sets side by side: methods, and one method with several settings; torch-free.

`--method none,kd:temperature=1,kd:temperature=4:ce_weight=0.5` names three: settings stand behind the name,
each after a colon.
"""

import re
from dataclasses import dataclass
from typing import Any

from kdtool.config import check_plugin_values, parse_scalar
from kdtool.errors import ConfigProblem, UsageProblem
from kdtool.registry import METHODS
from kdtool.sections import RunConfig

_NO_PATH = re.compile(r"[^\w.=+-]+")


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the things compared.

    Attributes:
        name: As it was asked for and as tables show it: METHOD, or METHOD:KEY=VALUE.
        method: Name and settings, as the section `method` of a run.
    """

    name: str
    method: dict[str, Any]

    @property
    def folder(self) -> str:
        """The name as a part of the names of folders."""
        return _NO_PATH.sub("-", self.name)


def _read(text: str) -> tuple[str, str, dict[str, Any]]:
    """Name of the variant, name of the method, and settings that stand behind it.

    Raises:
        ConfigProblem: a setting has no value, or comes twice.
    """
    method, *items = (part.strip() for part in text.split(":"))
    values: dict[str, Any] = {}
    for item in items:
        key, sign, value = (part.strip() for part in item.partition("="))
        if not (sign and key and value):
            raise ConfigProblem(
                f"--method {text}: '{item}' is no setting", hint=f"such as {method or 'kd'}:temperature=2"
            )
        if key in values:
            raise ConfigProblem(f"--method {text}: '{key}' comes twice")
        values[key] = parse_scalar(value)
    return ":".join([method, *items]), method, values


def variants_of(config: RunConfig) -> list[Variant]:
    """What to compare, each with its own settings.

    `method.name` holds names separated by commas, with or without settings. Settings under `method.NAME` belong to
    that method however often it is named; a setting beside the names goes to every method that has it. What stands
    behind a name wins.

    Raises:
        UsageProblem, ConfigProblem: unknown names or settings.
    """
    found = [_read(text) for text in config.method_name.split(",") if text.strip()]
    names = {method for _, method, _ in found}
    folders = [Variant(name, {}).folder for name, _, _ in found]
    if len(set(folders)) != len(found) or not found:
        raise UsageProblem(
            "--method needs different names separated by commas",
            hint="--method none,kd, or of one method --method kd:temperature=1,kd:temperature=4",
        )
    known = {name: {setting.name for setting in METHODS.info(name).settings} for name in names}
    own = {key: value for key, value in config.method_values.items() if key in names and isinstance(value, dict)}
    common = {key: value for key, value in config.method_values.items() if key not in own}
    for key in common:
        if not any(key in settings for settings in known.values()):
            raise UsageProblem(f"no compared method has a setting '{key}'", hint="see: kdtool methods show NAME")
    chosen = []
    for name, method, values in found:
        merged = {key: value for key, value in common.items() if key in known[method]} | own.get(method, {}) | values
        checked = check_plugin_values(METHODS.info(method), merged, f"method.{method}")
        chosen.append(Variant(name, {"name": method, **checked}))
    return chosen
