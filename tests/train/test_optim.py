import torch
from torch import nn

from kdtool.pipelines.setup import is_head_of
from kdtool.sections import TrainSection
from kdtool.train.optim import build_optimizer, parameter_groups


def groups_of(model, prefix="", **more):
    values = {"lr": 0.1, "head_lr": 0.5, "decay": 0.01, "is_head": lambda name: name.startswith("head")} | more
    named = [(prefix + name, parameter) for name, parameter in model.named_parameters()]
    return named, parameter_groups(named, values["lr"], values["head_lr"], values["decay"], values["is_head"])


def test_vectors_are_not_decayed_and_heads_have_their_own_rate():
    model = nn.ModuleDict({"body": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 2)})
    named, groups = groups_of(model)
    found = {id(p): (g["peak_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert {name: found[id(p)] for name, p in named} == {
        "body.weight": (0.1, 0.01),
        "body.bias": (0.1, 0.0),
        "norm.weight": (0.1, 0.0),
        "norm.bias": (0.1, 0.0),
        "head.weight": (0.5, 0.01),
        "head.bias": (0.5, 0.0),
    }
    assert sum(len(g["params"]) for g in groups) == len(named)


def test_the_head_is_what_lies_outside_the_pretrained_body(text):
    model = text.student.model
    named, _ = groups_of(model, "student.")
    is_head = is_head_of(model)
    assert [name for name, _ in named if is_head(name)] == ["student.classifier.weight", "student.classifier.bias"]


def test_sgd_has_nesterov_momentum():
    model = nn.Linear(2, 2)
    _, groups = groups_of(model)
    optimizer = build_optimizer(groups, TrainSection(optimizer="sgd"), "cpu")
    assert isinstance(optimizer, torch.optim.SGD)
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimizer.param_groups)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
