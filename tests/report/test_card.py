import math

import pytest
from huggingface_hub import ModelCard

from kdtool.card import write_card


def written(folder, proof, config, **facts):
    write_card(folder, proof, config, facts)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_metadata_is_what_the_hub_reads(tmp_path, config, proof):
    proof.student.metrics["auroc"] = math.nan
    text = written(tmp_path, proof, config, name="owner/student", license="apache-2.0", dataset_split="test")
    data = ModelCard(text).data
    assert data.base_model == "owner/teacher"
    assert data.datasets == ["owner/data"]
    assert data.library_name == "transformers"
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "text-classification"
    assert data.tags == ["kdtool", "knowledge-distillation", "nkd"]
    results = {result.metric_type: result for result in data.eval_results}
    assert set(results) == {"accuracy", "nll", "ece"}
    assert results["accuracy"].metric_value == pytest.approx(proof.student.metrics["accuracy"], abs=1e-6)
    assert results["accuracy"].dataset_split == "test"


def test_text_holds_command_table_use_and_limits(tmp_path, config, proof):
    command = ["kdtool", "distill", "owner/teacher", "--token", "hf_abcdefgh1234", "-o", "out dir"]
    text = written(tmp_path, proof, config, command_line=command, auto_class="AutoModelForX", test_rows=80)
    assert "kdtool distill owner/teacher --token '[redacted]' -o 'out dir'" in text.replace(
        "--token [redacted]", "--token '[redacted]'"
    )
    assert "| metric | student | teacher | kept |" in text
    assert "from transformers import AutoModelForX" in text
    assert "80 rows" in text
    assert "A quality bar was missed: accuracy.retention" in text
    assert "No licence is stated" in text
    assert text == written(tmp_path, proof, config, command_line=command, auto_class="AutoModelForX", test_rows=80)


def test_local_models_and_data_are_not_called_hub_ids(tmp_path, config, proof):
    (tmp_path / "teacher").mkdir()
    config.teacher.model = str(tmp_path / "teacher")
    config.data.source = "reviews/rows.jsonl"
    data = ModelCard(written(tmp_path, proof, config)).data
    assert data.base_model is None
    assert data.datasets is None
    assert len(data.eval_results) == 3


def test_the_model_whose_weights_are_trained_is_the_base(tmp_path, config, proof):
    config.student.model = "owner/small@main"
    assert ModelCard(written(tmp_path, proof, config)).data.base_model == "owner/small"


def test_architectures_of_our_own_load_through_kdtool(tmp_path, config):
    text = written(tmp_path, None, config, loads_with="kdtool", limits=["English only."])
    assert "kdtool.load(" in text
    assert "- English only." in text


def test_how_it_loads_follows_from_the_task_and_the_saved_files(tmp_path, config):
    text = written(tmp_path, None, config)
    assert "from transformers import AutoModelForSequenceClassification, AutoTokenizer" in text
    assert 'AutoTokenizer.from_pretrained("out/student")' in text
    (tmp_path / "config.json").write_text('{"model_type": "kdtool-x"}')
    assert "kdtool.load(" in written(tmp_path, None, config)
