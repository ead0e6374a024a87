"""Images and recordings: what reaches the model, and padding."""

import numpy as np
import pytest
import torch
from PIL import Image

from kdtool.config import load_config
from kdtool.data.examples import Examples
from kdtool.pipelines.setup import get_data
from kdtool.run import Run
from kdtool.tasks import image_classification
from tests import tiny


def rows_of(task, data, name):
    config = load_config("distill", None, [], {"data.source": str(data(name))})
    return get_data(config, task, Run()).train


@pytest.mark.parametrize("model", ["vit", "resnet"])
@torch.no_grad()
def test_images_are_processed_as_the_processor_does(opened, config, data, model):
    task, loaded = opened("image-classification", model)
    rows = rows_of(task, data, "images")
    encoded = task.encode(rows, loaded, config(), Run())
    batch = task.collate([encoded[i] for i in (0, 7, 13)])
    pictures = [rows.columns["image"][i] for i in (0, 7, 13)]
    expected = loaded.processor(images=pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [0, 1, 2]
    out = task.forward(loaded.model, batch)
    torch.testing.assert_close(out.logits, loaded.model(pixel_values=expected).logits)
    assert out.labels.tolist() == [0, 1, 2]


def test_large_sets_are_processed_on_access(opened, config, data, monkeypatch):
    task, loaded = opened("image-classification", "vit")
    rows = rows_of(task, data, "images")
    kept = task.encode(rows, loaded, config(), Run())
    monkeypatch.setattr(image_classification, "_IN_MEMORY", 0)
    lazy = task.encode(rows, loaded, config(), Run())
    assert not isinstance(lazy.columns["pixel_values"], np.ndarray)
    for i in (0, 5):
        np.testing.assert_array_equal(lazy[i]["pixel_values"], kept[i]["pixel_values"])
    np.testing.assert_array_equal(lazy.select([4, 2])[1]["pixel_values"], kept[2]["pixel_values"])


@torch.no_grad()
def test_padding_of_recordings_does_not_change_logits(opened, config, data):
    task, loaded = opened("audio-classification", "wav2vec")
    encoded = task.encode(rows_of(task, data, "audio"), loaded, config(), Run())
    rows = [0, 4, 7, 11]
    assert len(set(encoded.lengths[rows])) > 1
    together = task.forward(loaded.model, task.collate([encoded[i] for i in rows]))
    for place, i in enumerate(rows):
        alone = task.forward(loaded.model, task.collate([encoded[i]]))
        torch.testing.assert_close(together.logits[place : place + 1], alone.logits, rtol=1e-4, atol=1e-4)


def test_recordings_come_at_the_rate_of_the_model_and_are_cut(opened, config):
    task, loaded = opened("audio-classification", "wav2vec")
    time = np.arange(8000) / 8000
    tone = np.sin(2 * np.pi * 100 * time).astype(np.float32)
    rows = Examples({"audio": [{"array": tone, "sampling_rate": 8000}], "label": np.array([0])})
    encoded = task.encode(rows, loaded, config(), Run())
    wave = encoded[0]["wave"]
    assert abs(len(wave) - tiny.RATE) <= 2
    crossings = int(np.sum(np.diff(np.signbit(wave))))
    assert abs(crossings - 200) <= 4, "100 Hz crosses zero 200 times in a second"
    assert task.encode(rows, loaded, config("data.max_length=500"), Run()).lengths.tolist() == [500]


def test_grey_and_transparent_images(opened, config, tmp_path, data):
    for place, mode in (("a", "L"), ("b", "RGBA")):
        for i in range(3):
            (tmp_path / place).mkdir(exist_ok=True)
            Image.new(mode, (9, 9)).save(tmp_path / place / f"{i}.png")
    task, loaded = opened("image-classification", "vit")
    config_of = load_config("distill", None, [], {"data.source": str(tmp_path)})
    encoded = task.encode(get_data(config_of, task, Run()).train, loaded, config(), Run())
    assert encoded.columns["pixel_values"].shape[1:] == (3, tiny.SIDE, tiny.SIDE)
