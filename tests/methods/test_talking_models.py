"""What a conversation must be: exact for copies, answered by this teacher, and silent at weight 0."""

import copy

import pytest
import torch

from kdtool.errors import ConfigProblem
from kdtool.methods.talking_models import converse, distance, linear_cka
from kdtool.models import load_model
from kdtool.run import Run
from tests.kits import make_kit

ROWS = [0, 1, 2, 3]
SILENT = {"interact_weight": 0.0, "message_weight": 0.0, "state_weight": 0.0}


@pytest.fixture(scope="module")
def kit(models, data):
    return make_kit("text-classification", models, data)


def test_an_exact_copy_with_identity_codecs_has_nothing_to_learn():
    low = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    high = low.tanh()
    codecs = dict.fromkeys(("enc_s", "dec_s", "enc_t", "dec_t"), lambda x: x)
    talk = converse(codecs, torch.tanh, (low, high, low, high), None, 1)
    assert float(talk.rounds) == float(talk.message) == float(talk.state) == 0.0


def test_masked_positions_do_not_count():
    a, b = torch.randn(2, 2, 3, 4)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    expected = distance(a, b, mask)
    a[0, 2], b[1, 1:] = 99.0, -99.0
    torch.testing.assert_close(distance(a, b, mask), expected)


def test_weights_of_0_are_plain_training_bit_for_bit(kit):
    found = []
    for name, values in (("none", {}), ("talking-models", SILENT)):
        torch.manual_seed(0)
        method = kit.build(name, **values)
        method.train()
        torch.manual_seed(1)
        losses = method(kit.batch(ROWS), 0.5)
        losses.total.backward()
        found.append({key: p.grad for key, p in method.student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(found[0][key].equal(found[1][key]) for key in found[0])


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_the_upper_layers_answer_every_round(kit, rounds):
    method = kit.build("talking-models", rounds=rounds)
    calls = []
    for block in method._upper[0].blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    assert method._upper[0].blocks
    method(kit.batch(ROWS), 0.5)
    assert len(calls) == (rounds + 1) * len(method._upper[0].blocks)


def test_it_matters_which_teacher_answers_and_to_whom(kit):
    method = kit.build("talking-models", message_weight=1.0)
    method.eval()
    batch = kit.batch(ROWS)
    before = method(batch, 0.5).parts
    state = copy.deepcopy(method._upper[0].blocks[0].state_dict())
    with torch.no_grad():
        for parameter in method._upper[0].blocks[0].parameters():
            parameter.add_(0.5)
    after = method(batch, 0.5).parts
    assert before["interact"] != after["interact"]
    assert before["messages"] != after["messages"]
    method._upper[0].blocks[0].load_state_dict(state)


def test_gradient_reaches_the_low_state_through_the_teacher(kit):
    values = SILENT | {"interact_weight": 1.0, "stop_high": True, "ce_weight": 0.0}
    method = kit.build("talking-models", **values)
    method(kit.batch(ROWS), 1.0).total.backward()
    assert all(p.grad is None for p in method.teacher_list[0].model.parameters())
    assert any(p.grad is not None and p.grad.any() for p in method.student.parameters())
    assert all(p.grad is not None for p in method.codecs.parameters())


def test_messages_align_with_training(kit):
    method = kit.build("talking-models", codec="linear")
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=5e-3)
    batch, seen = kit.batch(list(range(12))), []
    for _ in range(40):
        losses = method(batch, 1.0)
        seen.append(float(losses.parts["cka"]) / 12)
        optimizer.zero_grad()
        (losses.total / losses.count).backward()
        optimizer.step()
    assert seen[-1] > seen[0]


def test_alignment_does_not_change_with_rotation_and_scale():
    a = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert float(linear_cka(a, 3 * a @ rotation + 1)) == pytest.approx(1.0)
    assert float(linear_cka(a, torch.randn(20, 5, dtype=torch.float64))) < 0.9


@pytest.mark.parametrize("layers", [[0], [2, 1], [0, 99], [1, 1]])
def test_layers_that_do_not_fit_are_refused(kit, layers):
    with pytest.raises(ConfigProblem, match="low and a high layer"):
        kit.build("talking-models", teacher_layers=layers)


def test_convolutional_models_are_refused(models, data):
    images = make_kit("image-classification", models, data)
    images.teacher = load_model(str(models("resnet")), images.task.auto_class, Run(offline=True))
    with pytest.raises(ConfigProblem):
        images.build("talking-models")
