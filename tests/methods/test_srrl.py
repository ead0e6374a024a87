"""Softmax regression: the features, and the logits that the teacher's head makes of them."""

import torch

from tests.methods import cnn


def test_against_the_formula():
    method = cnn.build("srrl", student=(4, 8, 8), teacher=(8, 8, 16), beta=5.0, ce_weight=0.0).eval()
    batch = cnn.batch_of(cnn.rows(), [0, 1, 2, 3])
    found = method(batch, 0.5)
    student, _ = method.see(batch)
    teacher = method.hear(batch)
    mapped = method.connect(student.taps["pooled"])
    head = method.teacher_list[0].model.linear
    feature = (mapped - teacher.taps["pooled"]).square().mean(1).sum()
    regression = (head(mapped) - teacher.logits).square().mean(1).sum()
    torch.testing.assert_close(found.parts["feature"], feature.detach())
    torch.testing.assert_close(found.total, feature + 5 * regression)


def test_maps_get_a_convolution_and_keep_their_mean():
    method = cnn.build("srrl", student_tap="-1")
    kinds = [type(layer).__name__ for layer in method.connect]
    assert kinds == ["Conv2d", "PatientBatchNorm", "ReLU"]
