"""The CIFAR ResNet: its shortcut, its checkpoints, the published accuracy where the data is at hand."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdtool import load
from kdtool.errors import ModelProblem
from kdtool.features import head_of, resolve_tap, taps
from kdtool.modeling.cifar_resnet import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    from_checkpoint,
    image_processor,
    shortcut,
)
from tests import tiny

SHARED = Path(os.environ.get("KDTOOL_DATA_DIR") or Path(__file__).resolve().parents[3] / "shared" / "data")
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = CifarResNetConfig(n=2, widths=[4, 8, 16], **tiny.names_of())
    return CifarResNetForImageClassification(config).eval()


@pytest.mark.parametrize("stride", [1, 2])
def test_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides(stride):
    x = torch.randn(2, 4, 6, 5)
    out = shortcut(x, 8, stride)
    assert torch.equal(out[:, 2:6], x[:, :, ::stride, ::stride])
    assert not out[:, :2].any()
    assert not out[:, 6:].any()
    assert shortcut(x, 4, 1) is x


@torch.no_grad()
def test_against_layers_written_out(model):
    """The same tensors in a plain forward pass."""
    state = model.state_dict()
    x = torch.randn(3, 3, 8, 8)

    def norm(value, name):
        mean, var, weight, bias = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        shaped = (slice(None), None, None)
        return (value - mean[shaped]) / (var[shaped] + 1e-5).sqrt() * weight[shaped] + bias[shaped]

    def conv(value, name, stride=1):
        return nn.functional.conv2d(value, state[f"{name}.weight"], stride=stride, padding=1)

    value = norm(conv(x, "conv1"), "bn1").relu()
    for stage in (1, 2, 3):
        for block in (0, 1):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            inner = norm(conv(value, f"{name}.conv1", stride), f"{name}.bn1").relu()
            inner = norm(conv(inner, f"{name}.conv2"), f"{name}.bn2")
            rest = value[:, :, ::stride, ::stride]
            edge = (inner.shape[1] - rest.shape[1]) // 2
            value = (inner + nn.functional.pad(rest, (0, 0, 0, 0, edge, edge))).relu()
    expected = value.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_stages_and_the_vector_before_the_head_can_be_tapped(model):
    assert [resolve_tap(model, point) for point in ("0", "-1")] == ["layer1", "layer3"]
    with taps(model, ["-1", "pre:-1", "pooled"], 3) as values:
        model(torch.randn(2, 3, 8, 8))
    assert values["-1"].shape == (2, 16, 2, 2)
    torch.testing.assert_close(values["pooled"], values["-1"].mean((2, 3)))
    assert torch.equal(values["pre:-1"].relu(), values["-1"])
    assert (values["pre:-1"] < 0).any()
    assert head_of(model, 3)[0] == "linear"


@torch.no_grad()
def test_flat_checkpoints_load_with_depth_and_widths_from_the_tensors(model, tmp_path):
    state = {f"module.{name}": t for name, t in model.state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "flat.safetensors")
    found = from_checkpoint(tmp_path / "flat.safetensors", tiny.LABELS)
    assert (found.config.n, found.config.widths) == (2, [4, 8, 16])
    assert found.config.id2label == dict(enumerate(tiny.LABELS))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(found(x).logits, model(x).logits)
    found.save_pretrained(tmp_path / "folder")
    again = load(tmp_path / "folder")
    assert isinstance(again, CifarResNetForImageClassification)
    assert torch.equal(again(x).logits, model(x).logits)


def test_other_files_are_refused(model, tmp_path):
    path = tmp_path / "flat.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ModelProblem, match="cannot be read"):
        from_checkpoint(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ModelProblem, match="no CIFAR ResNet"):
        from_checkpoint(path)
    save_file(dict(model.state_dict()), path)
    with pytest.raises(ModelProblem, match="with 2 classes"):
        from_checkpoint(path, ["a", "b"])
    save_file({name: t for name, t in model.state_dict().items() if name != "layer2.1.bn1.bias"}, path)
    with pytest.raises(ModelProblem) as caught:
        from_checkpoint(path)
    assert caught.value.why == "see layer2.1.bn1.bias"


def test_image_processor_standardises_and_does_not_resize(tmp_path):
    image_processor().save_pretrained(tmp_path)
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = processor(images=pixels, return_tensors="np")["pixel_values"][0]
    expected = (pixels / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_published_weights_are_as_accurate_as_measured():
    weights, rows = SHARED / "models" / "cifar10_resnet20.safetensors", SHARED / "cifar10" / "lossless" / "test.parquet"
    if not (weights.is_file() and rows.is_file()):
        pytest.skip("no published CIFAR-10 weights and images here")
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(rows).slice(0, 500).to_pydict()
    image = next(name for name, values in table.items() if isinstance(values[0], dict | bytes))
    cells = [cell["bytes"] if isinstance(cell, dict) else cell for cell in table[image]]
    images = [np.asarray(Image.open(io.BytesIO(cell)).convert("RGB")) for cell in cells]
    model, processor = from_checkpoint(weights, NAMES), image_processor()
    assert sum(p.numel() for p in model.parameters()) == 269_722
    logits = model(processor(images=images, return_tensors="pt")["pixel_values"]).logits
    accuracy = (logits.argmax(1) == torch.tensor(table["label"])).float().mean()
    assert 0.88 < accuracy < 0.95
