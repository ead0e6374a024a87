"""Students out of the teacher's own layers."""

import pytest
import torch
import transformers

from kdtool.derive import from_layers, layer_indices
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.modeling import SentenceClassifier, SentenceClassifierConfig
from kdtool.models import Loaded, load_model
from kdtool.run import Run
from tests import tiny


@pytest.mark.parametrize(
    ("spec", "depth", "expected"),
    [
        ("layers:1", 4, [3]),
        ("layers:2", 4, [1, 3]),
        ("layers:3", 4, [0, 1, 3]),
        ("layers:4", 4, [0, 1, 2, 3]),
        ("layers:6", 12, [1, 3, 5, 7, 9, 11]),
        ("layers:5", 12, [1, 3, 6, 8, 11]),
        ("layers:0,3,5", 6, [0, 3, 5]),
        ("layers:2,", 4, [2]),
    ],
)
def test_layer_indices(spec, depth, expected):
    assert layer_indices(spec, depth) == expected


@pytest.mark.parametrize(
    "spec",
    [
        "layers:0",
        "layers:5",
        "layers:1,1",
        "layers:2,1",
        "layers:0,4",
        "layers:",
        "layers:x",
        "layers:-1",
        "layers:1.5",
    ],
)
def test_layer_indices_that_cannot_be(spec):
    with pytest.raises(UsageProblem, match="--student layers:") as caught:
        layer_indices(spec, 4)
    assert caught.value.hint


CASES = {
    "bert": ("AutoModelForSequenceClassification", "bert.encoder.layer"),
    "vit": ("AutoModelForImageClassification", None),
    "llama": ("AutoModelForCausalLM", "model.layers"),
    "wav2vec": ("AutoModelForAudioClassification", "wav2vec2.encoder.layers"),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_copied_and_the_teacher_is_left_alone(name, models):
    auto, stack = CASES[name]
    teacher = load_model(str(models(name)), auto, Run())
    depth = teacher.model.config.num_hidden_layers
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    chosen = [0, depth - 1] if depth > 2 else [1]
    student = from_layers(teacher, "layers:" + ",".join(map(str, chosen)) + ",")
    assert student.model.config.num_hidden_layers == len(chosen)
    assert teacher.model.config.num_hidden_layers == depth
    assert student.facts["layers"] == chosen
    assert student.facts["new_weights"] == []
    taken = 0
    for key, value in student.model.state_dict().items():
        parts = key.split(".")
        place = next(
            (i for i, part in enumerate(parts) if part.isdecimal() and (stack is None or ".".join(parts[:i]) == stack)),
            None,
        )
        if place is not None:
            parts[place] = str(chosen[int(parts[place])])
            taken += 1
        assert torch.equal(value, before[".".join(parts)]), key
        assert value.data_ptr() != teacher.model.state_dict()[".".join(parts)].data_ptr(), (
            "shares memory with the teacher"
        )
    assert taken >= len(chosen)
    assert all(torch.equal(value, before[key]) for key, value in teacher.model.state_dict().items())


def test_all_layers_give_the_teacher_back(models):
    teacher = load_model(str(models("llama")), "AutoModelForCausalLM", Run())
    student = from_layers(teacher, "layers:4")
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        assert torch.equal(student.model(ids).logits, teacher.model(ids).logits)


def test_tied_embeddings_stay_tied(models):
    teacher = load_model(str(models("llama")), "AutoModelForCausalLM", Run())
    config = transformers.LlamaConfig(**teacher.model.config.to_dict() | {"tie_word_embeddings": True})
    tied = Loaded(transformers.LlamaForCausalLM(config), None, "tied")
    model = from_layers(tied, "layers:2").model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_lists_with_one_entry_a_layer_follow():
    config = transformers.Qwen3Config(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
    )
    teacher = Loaded(transformers.Qwen3ForCausalLM(config), None, "qwen")
    kinds = config.layer_types
    assert len(set(kinds)) == 2
    student = from_layers(teacher, "layers:0,3").model
    assert student.config.layer_types == [kinds[0], kinds[3]]
    assert config.layer_types == kinds


def test_sentence_classifier():
    config = SentenceClassifierConfig(backbone_config=tiny.bert_config(4), **tiny.names_of())
    teacher = Loaded(SentenceClassifier(config).eval(), None, "sentences")
    student = from_layers(teacher, "layers:1,3").model
    assert student.config.backbone_config.num_hidden_layers == 2
    assert teacher.model.config.backbone_config.num_hidden_layers == 4
    for new, old in ((0, 1), (1, 3)):
        left = student.encoder.encoder.layer[new].state_dict()
        right = teacher.model.encoder.encoder.layer[old].state_dict()
        assert all(torch.equal(value, right[key]) for key, value in left.items())
    assert torch.equal(student.classifier.weight, teacher.model.classifier.weight)


def test_architectures_without_one_stack_of_layers(models):
    teacher = load_model(str(models("resnet")), "AutoModelForImageClassification", Run())
    with pytest.raises(ModelProblem, match="does not state a number of layers"):
        from_layers(teacher, "layers:1")
    config = transformers.BartConfig(
        vocab_size=16,
        d_model=8,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=16,
    )
    two = Loaded(transformers.BartModel(config), None, "bart")
    with pytest.raises(ModelProblem, match="one stack of 2 layers in the teacher, found 2"):
        from_layers(two, "layers:1")


def test_the_random_generator_is_not_moved(models):
    teacher = load_model(str(models("bert")), "AutoModelForSequenceClassification", Run())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    from_layers(teacher, "layers:2")
    assert torch.equal(torch.rand(3), expected)
