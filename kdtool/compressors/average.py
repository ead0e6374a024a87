"""The mean of several checkpoints of one model: nothing smaller, often a little better."""

import copy
from dataclasses import dataclass

from kdtool.compressors._base import Context, carried
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.models import Loaded, load_model

paper = "Wortsman et al.: Model soups: averaging weights of multiple fine-tuned models, 2022, arXiv:2203.05482"


@dataclass(frozen=True)
class Config:
    """Settings."""

    models: list[str]
    """The other checkpoints: folders or Hub ids of models of the same shape."""


def compress(loaded: Loaded, config: Config, context: Context) -> Loaded:
    """A model whose weights are the mean of the model's and the others'.

    Raises:
        UsageProblem: no other checkpoint is named.
        ModelProblem: a checkpoint has other weights.
    """
    if not config.models:
        raise UsageProblem("average: no other checkpoint given", hint="--set method.models=[./run-1,./run-2]")
    own = loaded.model.state_dict()
    total = {name: value.double() for name, value in own.items()}
    for reference in config.models:
        other = load_model(reference, context.task.auto_class, context.run, "model").model.state_dict()
        same = other.keys() == own.keys() and all(other[name].shape == own[name].shape for name in own)
        if not same:
            raise ModelProblem(f"average: '{reference}' is not of the same shape as '{loaded.ref}'")
        for name, value in other.items():
            total[name] += value.double()
    share = 1.0 / (1 + len(config.models))
    model = copy.deepcopy(loaded.model)
    # buffers of whole numbers, such as counts of batches, stay those of the model itself
    means = {name: (value * share).to(own[name].dtype) for name, value in total.items()}
    model.load_state_dict({n: means[n] if own[n].is_floating_point() else own[n] for n in own})
    return Loaded(
        model.eval(), loaded.processor, loaded.ref, None, None, carried(loaded, averaged=1 + len(config.models))
    )
