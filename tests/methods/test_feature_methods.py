"""What all feature methods share: convolutional pairs, one row alone, padding, precision, taps."""

import pytest
import torch

from kdtool.errors import ConfigProblem
from kdtool.features import stages_of, taps
from kdtool.methods import _maps
from kdtool.methods._terms import Side
from kdtool.methods.fitnet import hint_loss
from kdtool.methods.nst import nst_loss
from kdtool.methods.pkt import pkt_loss
from kdtool.methods.sp import sp_loss
from kdtool.models import load_model
from kdtool.run import Run
from tests.methods import cnn

NAMES = ["at", "cc", "crd", "fitnet", "mgd", "nst", "ofd", "pkt", "reviewkd", "rkd", "simkd", "sp", "srrl", "vid"]
MAPS = {name: {"student_tap": "-1", "teacher_tap": "-1"} for name in ("cc", "crd", "pkt", "rkd")}
MAPS |= {"srrl": {"student_tap": "-1"}, "none": {}}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [8, 1], ids=["batch", "one row"])
def test_convolutional_pairs_of_other_widths(name, size):
    method = cnn.build(name, **MAPS.get(name, {})).train()
    losses = method(cnn.batch_of(cnn.rows(), list(range(size))), 0.5)
    losses.total.backward()
    assert torch.isfinite(losses.total)
    found = {key: p.grad for key, p in method.named_parameters() if p.requires_grad and p.ndim > 1}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in found.values())
    helpers = [key for key in found if not key.startswith("student.")]
    if size > 1:
        assert all(found[key].any() for key in helpers), "a helper does not learn"
        assert found["student.conv1.weight"].any()


@pytest.mark.parametrize("name", ["fitnet", "vid", "nst", "at", "sp", "ofd", "reviewkd", "mgd", "simkd"])
def test_maps_of_other_sizes(name):
    named = name in ("at", "ofd", "reviewkd")
    values = {"student_taps": ["-1"], "teacher_taps": ["-2"]} if named else {"student_tap": "-1", "teacher_tap": "-2"}
    if name == "simkd":
        with pytest.raises(ConfigProblem, match="does not read the mean"):
            cnn.build(name, **values)
        return
    losses = cnn.build(name, **values)(cnn.batch_of(cnn.rows(), [0, 1, 2]), 0.5)
    assert torch.isfinite(losses.total)


def test_losses_ignore_autocast_and_keep_double():
    s, t = torch.randn(6, 5), torch.randn(6, 7)
    plain = pkt_loss(s, t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pkt_loss(s, t), plain)
        assert sp_loss(s.bfloat16(), t.bfloat16()).dtype == torch.float32
    exact = pkt_loss(s.double(), t.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(plain.double(), exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", [pkt_loss, sp_loss])
def test_relations_do_not_see_the_scale_of_features(loss):
    s, t = torch.randn(6, 5), torch.randn(6, 7)
    torch.testing.assert_close(loss(3 * s, t), loss(s, t), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(loss(s.flip(0), t.flip(0)), loss(s, t), rtol=1e-3, atol=1e-6)
    assert loss(t, t).abs() < 1e-6


def test_nst_does_not_see_the_order_or_scale_of_channels():
    s, t = torch.randn(3, 4, 6), torch.randn(3, 5, 6)
    torch.testing.assert_close(nst_loss(2 * s.flip(1), t), nst_loss(s, t))
    assert nst_loss(torch.cat([t, t], 1), t).abs() < 1e-5


def test_padding_does_not_count():
    """A row alone gives what it gives among longer ones."""
    s, t = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    batch = {"input_ids": torch.ones(2, 5), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5])}
    sides = [Side(torch.zeros(2, 3), {"-1": value}) for value in (s, t)]
    left, right, mask = _maps.positions_of(*sides, ("-1", "-1"), batch)
    expected = (s[0, :3] - t[0, :3]).square().mean() + (s[1] - t[1]).square().mean()
    torch.testing.assert_close(hint_loss(left, right, mask), expected)
    torch.testing.assert_close(_maps.vector_of(sides[0], "-1", batch)[0], s[0, :3].mean(0))
    assert not _maps.flat_of(sides[0], "-1", batch)[0, 12:].any()


def test_sequences_of_other_lengths_have_no_common_positions():
    sides = [Side(torch.zeros(2, 3), {"-1": torch.randn(2, size, 4)}) for size in (5, 6)]
    batch = {"input_ids": torch.ones(2, 5), "attention_mask": torch.ones(2, 5)}
    batch |= {"teacher0.input_ids": torch.ones(2, 6), "teacher0.attention_mask": torch.ones(2, 6)}
    with pytest.raises(ConfigProblem, match="different lengths"):
        _maps.positions_of(*sides, ("-1", "-1"), batch)
    # equal lengths of other tokens are no common positions either
    batch["teacher0.attention_mask"] = torch.ones(2, 5)
    sides[1].taps["-1"] = torch.randn(2, 5, 4)
    with pytest.raises(ConfigProblem, match="different lengths"):
        _maps.positions_of(*sides, ("-1", "-1"), batch)


def test_stages_are_matched_from_the_end():
    deep, flat = cnn.network([4, 4, 8]).model, cnn.network([4, 8]).model
    assert _maps.matched_stages(flat, deep, None, None) == (["-2", "-1"], ["-2", "-1"])
    assert _maps.matched_stages(flat, deep, None, ["0"]) == (["-1"], ["0"])
    with pytest.raises(ConfigProblem, match="2 student taps, but 1 teacher taps"):
        _maps.matched_stages(flat, deep, ["0", "1"], ["0"])


@pytest.mark.parametrize(
    ("name", "auto", "stages"),
    [
        ("bert", "AutoModelForSequenceClassification", "bert.encoder.layer"),
        ("resnet", "AutoModelForImageClassification", "resnet.encoder.stages"),
        ("wav2vec-small", "AutoModelForAudioClassification", "wav2vec2.encoder.layers"),
    ],
)
def test_stages_are_the_largest_list_of_like_modules(name, auto, stages, models):
    found = stages_of(load_model(str(models(name)), auto, Run()).model)
    assert found == [f"{stages}.{i}" for i in range(len(found))]


@torch.no_grad()
def test_what_enters_the_last_relu_of_a_stage(models):
    model = load_model(str(models("resnet")), "AutoModelForImageClassification", Run()).model
    with taps(model, ["0", "pre:0"], 3) as values:
        model(torch.randn(2, 3, 8, 8))
    assert torch.equal(values["pre:0"].relu(), values["0"])
    assert (values["pre:0"] < 0).any()
