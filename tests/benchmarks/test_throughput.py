"""The throughput benchmark itself works: on tiny models, without its goals."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from . import throughput

WORDS = ["[PAD]", "[UNK]", "who", "is", "this", "and", "where", "was", "that"]


@pytest.fixture
def setting(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), num_labels=2, **sizes))
    model.save_pretrained(tmp_path / "teacher")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "teacher")
    rows = [{"text": " ".join(WORDS[2 : 4 + i % 6]), "label": i % 2} for i in range(48)]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return throughput.prepare(str(tmp_path / "teacher"), str(tmp_path / "data"), "1", 4, 6, 16)


def test_every_loop_gets_its_turns(setting, capsys):
    clocks, parts = throughput.measure(setting, rounds=2, with_torchdistill=False)
    assert [samples for samples, _, _ in clocks["kdtool"].rounds] == [8, 12]  # one step of six warmed up
    assert [samples for samples, _, _ in clocks[throughput.PADDED].rounds] == [4, 4]
    assert all(seconds > 0 for seconds in parts.values())
    throughput.report(clocks, parts, setting)
    printed = capsys.readouterr().out
    assert "plain, padded to 16" in printed
    assert "24 rows" in printed


def test_other_work_is_not_compared(setting, monkeypatch):
    monkeypatch.setattr(throughput, "CE_WEIGHT", 0.5)
    trainer = throughput.make_trainer(setting, throughput.Silent(), 1)
    monkeypatch.setattr(throughput, "CE_WEIGHT", 0.1)
    with pytest.raises(SystemExit, match="do not do the same work"):
        throughput.check_same_work(setting, trainer, None)
