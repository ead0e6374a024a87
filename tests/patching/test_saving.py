"""A patched model on disk: kdtool gives it back bit for bit, plain transformers gives the exact one."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import kdtool
from kdtool import patching
from kdtool.config import load_config
from kdtool.derive import from_layers
from kdtool.errors import ModelProblem
from kdtool.models import Loaded, load_model
from kdtool.run import Run
from kdtool.saving import save_model
from tests.patching.families import FAMILIES, build, noise, output

SETTINGS = {"leaf": 4, "near": 2, "block": 16, "chunk": 16}


def patched(name="bert"):
    make, inputs = FAMILIES[name]
    model = build(make)
    first, second = patching.find_sites(model, lambda: output(model, inputs()))
    layers = [
        patching.Layer(first.name, "cluster", SETTINGS, 20, 3, {"features": noise(4, 4, 3)}),
        patching.Layer(second.name, "exact", reason="it misses the bound"),
    ]
    patching.patch(model, layers, "cluster", 3)
    return model, inputs()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("patched")
    model, _ = patched()
    save_model(Loaded(model, None, "x"), path, load_config("distill").output)
    return path


def test_a_fresh_process_gives_the_same_bits(folder, tmp_path):
    model, inputs = patched()
    save_file(inputs, tmp_path / "in.safetensors")
    code = (
        "import sys, torch, kdtool; from safetensors.torch import load_file, save_file\n"
        "model = kdtool.load(sys.argv[1]); torch.set_num_threads(1)\n"
        "with torch.no_grad(): out = model(**load_file(sys.argv[2] + '/in.safetensors')).logits\n"
        "save_file({'out': out}, sys.argv[2] + '/out.safetensors')"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path)], check=True, capture_output=True)
    assert load_file(tmp_path / "out.safetensors")["out"].equal(output(model, inputs))


def test_plain_transformers_loads_the_exact_model(folder):
    exact = build(FAMILIES["bert"][0])
    model, inputs = patched()
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert output(plain, inputs).equal(output(exact, inputs))
    assert not output(plain, inputs).equal(output(model, inputs))
    assert "attn_implementation" not in (folder / "config.json").read_text()


def test_both_loaders_restore_it_and_saving_again_keeps_it(folder, tmp_path):
    model, inputs = patched()
    wanted = output(model, inputs)
    loaded = load_model(str(folder), "AutoModelForSequenceClassification", Run(offline=True))
    assert output(loaded.model, inputs).equal(wanted)
    save_model(loaded, tmp_path, load_config("distill").output)
    assert output(kdtool.load(tmp_path), inputs).equal(wanted)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["kde_attention"] == json.loads((folder / "config.json").read_text())["kde_attention"]
    assert saved["kde_attention"]["min_length"] == 20


def test_the_body_alone_is_patched_too(folder):
    body = transformers.AutoModel.from_pretrained(folder).eval()
    assert patching.restore(body, folder, "body")
    assert [layer.method for layer in patching.layers_of(body)] == ["cluster", "exact"]


def test_layers_taken_from_a_patched_teacher_are_exact(folder):
    teacher = load_model(str(folder), "AutoModelForSequenceClassification", Run(offline=True))
    student = from_layers(teacher, "layers:1")
    assert not patching.layers_of(student.model)
    assert not hasattr(student.model.config, "kde_attention")


def wrong(folder, tmp_path, change):
    values = json.loads((folder / "config.json").read_text())
    change(values["kde_attention"])
    for path in folder.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def rename(key):
    key["layers"]["encoder.layer.9.x"] = key["layers"].popitem()[1]


CHANGES = {
    "version": (lambda key: key.update(version=9), "another version"),
    "method": (lambda key: first(key).update(method="none"), "wrong"),
    "settings": (lambda key: first(key).update(settings={"leaf": 0}), "wrong"),
    "unknown setting": (lambda key: first(key).update(settings={"code": "x"}), "wrong"),
    "no layers": (lambda key: key.pop("layers"), "damaged"),
    "state": (lambda key: first(key).update(state=["other"]), "damaged"),
    "name": (rename, "no attention module"),
}


def first(key):
    return next(iter(key["layers"].values()))


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_a_damaged_key_is_refused(folder, tmp_path, change, said):
    with pytest.raises(ModelProblem, match=said):
        kdtool.load(wrong(folder, tmp_path, change))


def test_missing_and_broken_projections_are_refused(folder, tmp_path):
    copy = wrong(folder, tmp_path, lambda key: None)
    (copy / patching.FILE).write_bytes(b"x")
    with pytest.raises(ModelProblem, match="damaged"):
        kdtool.load(copy)
    (copy / patching.FILE).unlink()
    with pytest.raises(ModelProblem, match="incomplete"):
        kdtool.load(copy)


def test_the_projections_are_no_weights(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / patching.FILE)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelProblem, match="no weights"):
        kdtool.load(tmp_path)
