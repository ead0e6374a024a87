import io
import pickle
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
from PIL import Image

from kdtool.data.examples import Examples
from kdtool.data.media import AudioColumn, ImageColumn
from kdtool.errors import DataProblem, UsageProblem

IMAGE = (("image", "label"), ())
AUDIO = (("audio", "label"), ())


def png(colour, mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, (4, 3), colour).save(stream, "PNG")
    return stream.getvalue()


def flac(level, channels=1, rate=8000):
    stream = io.BytesIO()
    samples = np.full((80, channels), level, dtype=np.float32)
    soundfile.write(stream, samples, rate, format="FLAC")
    return stream.getvalue()


def structs(values):
    return pa.chunked_array([pa.array([{"bytes": value, "path": None} for value in values])])


def test_images_decode_to_rgb_and_survive_pickling_and_selection():
    column = ImageColumn(structs([png(10, "L"), png((1, 2, 3)), png((7, 8, 9, 255), "RGBA")]), "images", None)
    examples = Examples({"image": column}).select([2, 0])
    again = pickle.loads(pickle.dumps(examples.columns["image"]))
    assert isinstance(again, ImageColumn)
    assert [image.getpixel((0, 0)) for image in again] == [(7, 8, 9), (10, 10, 10)]
    assert again[-1].size == (4, 3)
    assert len(column[1:]) == 2


def test_audio_decodes_to_mono_float32():
    column = AudioColumn(structs([flac(0.5), flac(0.25, channels=2, rate=16000)]), "clips", None)
    first, second = pickle.loads(pickle.dumps(column))
    assert first["sampling_rate"] == 8000
    assert second["sampling_rate"] == 16000
    assert second["array"].dtype == np.float32
    assert second["array"].shape == (80,)
    assert np.allclose(second["array"], 0.25, atol=1e-3)


def write_media(folder, name, content):
    path = folder / name
    assert path.is_relative_to(folder), "an absolute name would leave the test's folder"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("split", [True, False])
def test_image_folder(tmp_path, load, split):
    for purpose in ("train/", "test/") if split else ("",):
        for index in range(10):
            write_media(tmp_path, f"{purpose}dog/{index}.png", png((1, 1, index)))
            write_media(tmp_path, f"{purpose}cat/{index}.png", png((2, 2, index)))
    data = load(tmp_path, *IMAGE)
    assert data.labels == ["cat", "dog"]
    assert data.roles == {"image": "image", "label": "label"}
    assert (len(data.train), len(data.test)) == ((20, 20) if split else (18, 2))
    for row in (data.train[0], data.test[-1]):
        assert row["image"].getpixel((0, 0))[0] == {"cat": 2, "dog": 1}[data.labels[row["label"]]]
    assert data.provenance["form"] == "images"


def test_audio_folder(tmp_path, load):
    for index in range(4):
        write_media(tmp_path, f"yes/{index}.flac", flac(0.5))
        write_media(tmp_path, f"no/{index}.flac", flac(0.1))
    data = load(tmp_path, *AUDIO)
    assert data.labels == ["no", "yes"]
    assert data.train[0]["audio"]["sampling_rate"] == 8000


def test_parquet_with_feature_description(tmp_path, load):
    names = (
        b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["b", "a"]}, "img": {"_type": "Image"}}}}'
    )
    table = pa.table({"img": structs([png((5, 5, 5))] * 10), "label": pa.array([0, 1] * 5)})
    for split in ("train", "test"):
        path = tmp_path / f"{split}.parquet"
        pa.parquet.write_table(table.replace_schema_metadata({b"huggingface": names}), path)
    data = load(tmp_path, *IMAGE)
    assert data.labels == ["b", "a"]
    assert data.test[1]["image"].size == (4, 3)
    assert data.test[1]["label"] == 1


def test_csv_that_names_files(tmp_path, load):
    write_media(tmp_path, "pictures/a.png", png((1, 2, 3)))
    (tmp_path / "data.csv").write_text("file,label\n" + "pictures/a.png,x\npictures/a.png,y\n" * 4)
    data = load(tmp_path / "data.csv", *IMAGE, image="file")
    assert data.train[0]["image"].getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname"])
def test_files_outside_the_data_folder_are_refused(tmp_path, load, name):
    write_media(tmp_path, "outside.png", png((1, 2, 3)))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "data.csv").write_text(f"image,label\n{name},x\n{name},y\n")
    with pytest.raises(DataProblem, match="lies outside the data folder"):
        load(tmp_path / "in" / "data.csv", *IMAGE)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no picture", "row 1: this image cannot be decoded"), (None, "row 1: no image")],
)
def test_broken_media_are_named(tmp_path, load, content, message):
    path = tmp_path / "train.parquet"
    pa.parquet.write_table(pa.table({"image": structs([content, png(1, "L")]), "label": pa.array([0, 1])}), path)
    with pytest.raises(DataProblem, match=message):
        load(path, *IMAGE, score_only=True)


def test_a_missing_file_and_a_mixed_folder_are_named(tmp_path, load):
    (tmp_path / "data.csv").write_text("image,label\ngone.png,x\ngone.png,y\n")
    with pytest.raises(DataProblem, match=r"file 'gone.png' does not exist"):
        load(tmp_path / "data.csv", *IMAGE)
    mixed = tmp_path / "mixed"
    write_media(mixed, "a/1.png", png((1, 2, 3)))
    write_media(mixed, "b/1.flac", flac(0.1))
    with pytest.raises(DataProblem, match="mixes 1 images and 1 recordings"):
        load(mixed, *IMAGE)


def test_numbers_are_no_images(tmp_path, load, write):
    write(tmp_path / "a.jsonl", [{"image": 1, "label": 0}, {"image": 2, "label": 1}])
    with pytest.raises(DataProblem, match="holds int64, no images"):
        load(tmp_path / "a.jsonl", *IMAGE)


@pytest.mark.parametrize(
    ("module", "column", "extra"),
    [
        ("PIL", ImageColumn(structs([png(1, "L")]), "x", None), "vision"),
        ("soundfile", AudioColumn(structs([flac(0.1)]), "x", None), "audio"),
    ],
)
def test_a_missing_decoder_names_the_extra(monkeypatch, module, column, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageProblem) as caught:
        column[0]
    assert caught.value.hint == f"pip install 'kdtool[{extra}]'"
