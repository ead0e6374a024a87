"""Configurations and rows drawn at random: a run works or is refused, and never ends in another way.

KDTOOL_EXAMPLES=2000 draws that many.
"""

import json
import os

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdtool.config import key_paths, load_config
from kdtool.data.sources import load_data
from kdtool.errors import KdtoolError
from kdtool.run import Run
from kdtool.sections import RunConfig

COUNT = int(os.environ.get("KDTOOL_EXAMPLES", "60"))
often = settings(
    max_examples=COUNT,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
text = st.text(max_size=40)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text, st.sampled_from(["kd", "1e-5", "../x"]))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
)
keys = st.sampled_from([*key_paths(), *RunConfig.model_fields]) | text
commands = st.sampled_from(["distill", "compare", "evaluate", "export"])


def check(problem):
    """One line, exit code 2."""
    assert problem.exit_code == 2
    assert "\n" not in problem.message


def nested(flat):
    """`a.b: v` as `a: {b: v}`, as far as that goes."""
    made = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if dot and isinstance(made.get(section, {}), dict):
            made.setdefault(section, {})[name] = value
        else:
            made[section] = value
    return made


@often
@given(command=commands, flat=st.dictionaries(keys, values, max_size=5), overrides=st.lists(text, max_size=2))
def test_any_configuration_is_taken_or_refused(command, flat, overrides, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(nested(flat), allow_unicode=True), encoding="utf-8", errors="replace")
    try:
        config = load_config(command, path, overrides)
    except KdtoolError as problem:
        check(problem)
    else:
        assert config.command == command


@often
@given(raw=st.text(max_size=200))
def test_any_file_is_a_configuration_or_refused(raw, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(raw.encode("utf-8", "replace"))
    try:
        load_config("distill", path)
    except KdtoolError as problem:
        check(problem)


rows = st.lists(
    st.one_of(
        values,
        st.fixed_dictionaries({"text": values, "label": values}),
        st.fixed_dictionaries({"text": text, "label": st.sampled_from(["a", "b", 0, 1, None])}),
    ),
    max_size=6,
)


@often
@given(lines=rows)
def test_any_rows_are_taken_or_refused(lines, tmp_path):
    for split in ("train", "test"):
        with (tmp_path / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    section = load_config("distill", None, [], {"data.source": str(tmp_path)}).data
    try:
        found = load_data(section, ("text", "label"), (), Run(offline=True))
    except KdtoolError as problem:
        check(problem)
    else:
        assert len(found.test) > 0
