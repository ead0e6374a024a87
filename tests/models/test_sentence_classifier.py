"""The sentence classifier: pooling, saving, and sentence-encoder folders."""

import json

import pytest
import torch
import transformers

from kdtool import load
from kdtool.errors import ModelProblem
from kdtool.modeling import SentenceClassifier, SentenceClassifierConfig
from kdtool.models import load_model
from kdtool.run import Run
from tests import tiny

AUTO = "AutoModelForSequenceClassification"


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = SentenceClassifierConfig(
        backbone_config=tiny.bert_config(2), logit_scale=3.0, normalize=True, **tiny.names_of()
    )
    return SentenceClassifier(config).eval()


@pytest.fixture
def inputs():
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture
def encoder(tmp_path):
    """A folder as sentence encoders come: a BERT body and modules.json."""
    tiny.save_bert_tokenizer(tmp_path)
    torch.manual_seed(0)
    transformers.BertModel(tiny.bert_config(2)).save_pretrained(tmp_path)
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (kind, path) in enumerate(kinds)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return tmp_path


@torch.no_grad()
def test_pools_over_real_tokens_only(model, inputs):
    states = model.encoder(**inputs).last_hidden_state
    means = torch.stack([states[0].mean(0), states[1, :3].mean(0)])
    expected = 3.0 * means / means.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.embed(**inputs), expected)
    torch.testing.assert_close(model(**inputs).logits, model.classifier(expected))
    alone = model(input_ids=inputs["input_ids"][1:, :3]).logits
    torch.testing.assert_close(model(**inputs).logits[1:], alone)


@torch.no_grad()
def test_save_and_load(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    found = load(tmp_path)
    assert isinstance(found, SentenceClassifier)
    assert found.config.logit_scale == 3.0
    assert found.config.id2label == dict(enumerate(tiny.LABELS))
    assert torch.equal(found(**inputs).logits, model(**inputs).logits)


def test_loss_is_the_mean_cross_entropy(model, inputs):
    labels = torch.tensor([2, 0])
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))


@torch.no_grad()
def test_sentence_encoder_folders_get_a_head(encoder, inputs):
    loaded = load_model(str(encoder), AUTO, Run(), labels=tiny.LABELS)
    assert isinstance(loaded.model, SentenceClassifier)
    assert loaded.labels == tiny.LABELS
    assert loaded.facts["new_weights"] == ["classifier.weight"]
    assert (loaded.model.config.normalize, loaded.model.config.logit_scale) == (True, 20.0)
    body = transformers.BertModel.from_pretrained(encoder)
    expected = body(**inputs).last_hidden_state
    torch.testing.assert_close(loaded.model.encoder(**inputs).last_hidden_state, expected)
    assert str(encoder) not in json.dumps(loaded.model.config.to_dict())


def test_other_pooling_is_refused(encoder):
    (encoder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(ModelProblem, match="does not pool by the mean"):
        load_model(str(encoder), AUTO, Run(), labels=tiny.LABELS)
