import pytest
import torch
from safetensors import safe_open
from torch.nn import functional

from kdtool.methods.uskd import Targets, middle, soft_targets, uskd_terms, zipf
from kdtool.models import Loaded, load_model
from kdtool.run import Run
from kdtool.saving import save_model
from kdtool.sections import OutputSection
from tests.kits import make_kit

LABELS = torch.tensor([0, 3, 1, 4, 4, 2])


def logits(rows=6, classes=5):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(rows, classes, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]


def test_soft_labels_are_distributions_without_gradient():
    student, weak = logits()
    targets = Targets.of(LABELS, student.detach())
    zeta = zipf(student.log_softmax(-1), weak.softmax(-1), targets)
    torch.testing.assert_close(zeta.sum(1), torch.ones(6, dtype=torch.float64))
    assert (zeta.gather(1, LABELS[:, None]) == 0).all()
    soft = soft_targets(student.softmax(-1), targets)
    torch.testing.assert_close(soft.mean(), targets.values.mean())
    assert not zeta.requires_grad
    assert not soft.requires_grad


def test_the_label_leaves_its_rank_empty():
    """The values are 1, 1/2, ... by rank among all classes, renormalised without the label."""
    student = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    zeta = zipf(student.log_softmax(-1), student.softmax(-1), Targets.of(torch.tensor([1]), student))
    expected = torch.tensor([[1.0, 0.0, 1 / 3, 1 / 4]])
    torch.testing.assert_close(zeta, expected / expected.sum())


@pytest.mark.parametrize("score", ["log-probability", "probability"])
def test_a_single_unit_is_plain_cross_entropy(score):
    student, weak = logits(1)
    target, *_ = uskd_terms(student, weak, LABELS[:1], score)
    torch.testing.assert_close(target, functional.cross_entropy(student, LABELS[:1]))


def test_units_are_coupled_but_not_ordered():
    student, weak = logits()
    first = uskd_terms(student, weak, LABELS)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    for left, right in zip(first, uskd_terms(student[order], weak[order], LABELS[order]), strict=True):
        torch.testing.assert_close(left, right)
    changed = student.detach().clone()
    changed[0] *= 5
    before, after = (soft_targets(z.softmax(-1), Targets.of(LABELS, z)) for z in (student.detach(), changed))
    assert (before[1:] != after[1:]).all()


def test_one_hot_rows_are_hard_labels():
    student, weak = logits()
    soft = functional.one_hot(LABELS, 5).double()
    for left, right in zip(uskd_terms(student, weak, LABELS), uskd_terms(student, weak, soft), strict=True):
        torch.testing.assert_close(left, right)


def test_takes_the_middle_of_each_kind_of_network(models):
    run = Run(offline=True)
    resnet = load_model(str(models("resnet")), "AutoModelForImageClassification", run).model
    vit = load_model(str(models("vit")), "AutoModelForImageClassification", run).model
    stages = len(resnet.config.depths)
    assert middle(resnet).endswith(f"stages.{stages - 2}")
    assert middle(vit).endswith(f".{vit.config.num_hidden_layers // 2 - 1}")


def test_the_weak_head_trains_and_is_not_saved(models, data, tmp_path):
    kit = make_kit("image-classification", models, data)
    method = kit.build("uskd")
    assert not method.teacher_list
    losses = method(kit.batch([0, 1, 2, 3]), 0.0)
    assert set(losses.parts) == {"ce", "target", "nontarget", "weak"}
    losses.total.backward()
    assert method.weak.weight.grad.any()
    names = []
    for folder, model in (("uskd", method.finish()), ("plain", kit.student.model)):
        save_model(Loaded(model, kit.student.processor, "student"), tmp_path / folder, OutputSection())
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as saved:
            names.append(set(saved.keys()))
    assert names[0] == names[1]


def test_a_teacher_is_refused(tmp_path):
    from kdtool.cli.checks import check
    from kdtool.config import load_config
    from kdtool.errors import UsageProblem

    values = {"student.model": "s", "data.source": "d", "output.folder": str(tmp_path / "out")}
    check(load_config("distill", None, ["method.name=uskd"], values))
    with pytest.raises(UsageProblem, match="takes no teacher"):
        check(load_config("distill", None, ["method.name=uskd"], values | {"teacher.model": "t"}))
