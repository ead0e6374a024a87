import pytest

from kdtool.config import load_config
from kdtool.models import load_model
from kdtool.pipelines.setup import load_processor
from kdtool.registry import TASKS
from kdtool.run import Run


@pytest.fixture
def opened(models):
    """`opened(TASK, MODEL)`: the task and the loaded model with its processor."""

    def call(task_name, model):
        task = TASKS.get(task_name)()
        loaded = load_model(str(models(model)), task.auto_class, Run(offline=True))
        load_processor(loaded, task, Run(offline=True))
        return task, loaded

    return call


@pytest.fixture
def config():
    def call(*overrides):
        return load_config("distill", None, overrides)

    return call
