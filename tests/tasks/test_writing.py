"""Greedy texts: the same whatever the batch, ended where they should be, and scored."""

import numpy as np
import pytest
import torch
import transformers

from kdtool.config import load_config
from kdtool.errors import UsageProblem
from kdtool.pipelines.evaluate import evaluate
from kdtool.run import Run
from kdtool.tasks._writing import Writing, write
from tests import tiny
from tests.kits import make_kit

NAME = "causal-lm"


@pytest.fixture(scope="module")
def kit(models, data):
    made = make_kit(NAME, models, data, "prompts")
    made.test = made.test.select(range(7))
    made.task.writing = Writing(6)
    return made


def prompts_of(kit):
    return [kit.task.prompt_of(kit.test[i]) for i in range(len(kit.test))]


def naive(model, tokenizer, prompt, longest, stop=()):
    """One prompt, one token at a time, without a cache."""
    ids = torch.from_numpy(prompt)[None]
    for _ in range(longest):
        token = model(ids).logits[0, -1].argmax()
        if int(token) == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token.view(1, 1)], 1)
    text = tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
    for end in stop:
        text = text.partition(end)[0]
    return text.strip()


@pytest.mark.parametrize("stop", [(), ("meal",), ("is", "very slow")])
@torch.no_grad()
def test_texts_are_those_of_a_naive_loop_whatever_the_batch(kit, stop):
    loaded, prompts = kit.teacher, prompts_of(kit)
    assert len({len(prompt) for prompt in prompts}) > 3
    expected = [naive(loaded.model.eval(), loaded.processor, prompt, 6, stop) for prompt in prompts]
    assert len(set(expected)) > 3
    for size in (1, 3, 64):
        assert write(loaded.model, loaded.processor, prompts, Writing(6, stop), size, Run()) == expected


def test_a_models_own_habits_of_generation_do_not_count_and_stay(kit):
    loaded, prompts = kit.teacher, prompts_of(kit)[:4]
    plain = write(loaded.model, loaded.processor, prompts, Writing(6), 4, Run())
    habits = transformers.GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_length=3)
    loaded.model.generation_config, before = habits, loaded.model.generation_config
    assert write(loaded.model, loaded.processor, prompts, Writing(6), 4, Run()) == plain
    assert loaded.model.generation_config is habits
    loaded.model.generation_config = before


def test_texts_end_where_the_positions_of_a_model_end(kit):
    tokenizer = kit.teacher.processor
    settings = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=12, n_embd=8, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=3
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(settings).eval()
    model.lm_head.weight.data[3] = -1.0  # keeps it from ending
    prompts = [np.arange(4, 4 + n) for n in (3, 9, 11, 12, 0)]
    for size in (1, 8):
        texts = write(model, tokenizer, prompts, Writing(8), size, Run())
        assert [len(text.split()) for text in texts] == [8, 3, 1, 0, 0]


def test_evaluation_scores_what_is_written(kit):
    found = kit.task.evaluate(kit.teacher.model, kit.test, Run(), ["loss", "exact-answer", "agreement"], 5)
    kit.task.answers = "text"
    texts = write(kit.teacher.model, kit.teacher.processor, prompts_of(kit), kit.task.writing, 64, Run())
    right = [text.split() == kit.test[i]["reference"].split() for i, text in enumerate(texts)]
    again = kit.task.evaluate(kit.teacher.model, kit.test, Run(), ["exact-answer"], 64)
    kit.task.answers = "number"
    assert set(found.metrics) == {"loss", "exact-answer"}
    assert again.metrics["exact-answer"] == np.mean(right)
    assert found.units.sum() == len(found.predictions)


def test_agreement_is_that_of_the_tokens_ranked_first(kit, models, tmp_path):
    options = {"student.model": str(models("llama-small")), "teacher.model": str(models("llama"))}
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.prompt_rows(12, 12)[:7])
    options |= {"data.source": str(rows), "eval.latency": False}
    result = evaluate(load_config("evaluate", None, ["eval.metrics=[agreement,loss]"], options))
    ranked = []
    with torch.no_grad():
        for loaded in (kit.student, kit.teacher):
            rows = [kit.task.collate([kit.test[i]]) for i in range(7)]
            outs = [kit.task.forward(loaded.model.eval(), row) for row in rows]
            ranked.append(torch.cat([out.logits.argmax(-1) for out in outs]))
    expected = (ranked[0] == ranked[1]).double().mean()
    assert result.proof.student.metrics["agreement"] == pytest.approx(float(expected))
    assert "agreement" not in result.proof.teacher.metrics


def test_graphs_cannot_write(kit):
    with pytest.raises(UsageProblem, match="exported graph does not"):
        write(torch.nn.Linear(1, 1), kit.teacher.processor, prompts_of(kit), Writing(6), 4, Run())


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("prompts", ["eval.metrics=[agreement]"], "compares with a teacher"),
        ("plain", ["eval.metrics=[rouge-l]", "data.max_length=8"], "compares responses, and the data has none"),
        ("prompts", ["eval.metrics=[accuracy]"], "causal-lm has no metric 'accuracy'"),
        ("prompts", ["eval.metrics=[exact-answer]", "eval.answers=gsm9k"], "no rule 'gsm9k'"),
    ],
)
def test_metrics_that_cannot_be_measured_are_refused(models, data, source, overrides, message):
    options = {"student.model": str(models("llama-small")), "data.source": str(data(source))}
    with pytest.raises(UsageProblem, match=message):
        evaluate(load_config("evaluate", None, overrides, options))
