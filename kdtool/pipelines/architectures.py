"""Tasks of architectures whose names do not end in what they do, asked of optimum."""

import contextlib
from collections.abc import Mapping
from typing import Any

import transformers

_OURS = {
    "text-classification": "text-classification",
    "image-classification": "image-classification",
    "audio-classification": "audio-classification",
    "text-generation": "causal-lm",
    "text2text-generation": "seq2seq-lm",
    "fill-mask": "masked-lm",
}
"""optimum's word to kdtool's."""


def task_by_optimum(values: Mapping[str, Any]) -> str | None:
    """The task of a config.json by optimum's TasksManager, such as that of ReformerModelWithLMHead.

    TasksManager cannot tell the task of a folder, but can that of a class.

    Returns:
        A task of kdtool; None where optimum does not know, or kdtool has no such task.
    """
    classes = [getattr(transformers, str(name), None) for name in values.get("architectures") or ()]
    known = [found for found in classes if isinstance(found, type)]
    if not known:
        return None  # no need to pay for the import
    from optimum.exporters.tasks import TasksManager

    with contextlib.suppress(ValueError):
        return _OURS.get(str(TasksManager.infer_task_from_model(known[0])))
    return None
