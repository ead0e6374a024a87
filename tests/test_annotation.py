"""Rationales by stages: who writes them, how they are judged, chosen and kept on disk."""

import json

import pytest
import transformers

from kdtool import annotation
from kdtool.authors import EndpointAuthor, LocalAuthor, Order, Style, cut
from kdtool.data.examples import Examples
from kdtool.endpoint import EndpointRef
from kdtool.errors import DataProblem, EndpointProblem
from kdtool.journal import Journal, read_rows
from kdtool.models import Loaded, load_model
from kdtool.pipelines.setup import load_processor
from kdtool.registry import TASKS
from kdtool.run import Run
from tests import chains
from tests.endpoint.server import Fault, Server

SVAMP = "svamp"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Loaded:
    task, run = TASKS.get("causal-lm")(), Run()
    loaded = load_model(str(chains.speller(tmp_path_factory.mktemp("speller"))), task.auto_class, run)
    load_processor(loaded, task, run)
    return loaded


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("KDTOOL_ENDPOINT_BACKOFF", "0.01")
    with Server() as running:
        running.write = chains.solver
        yield running


def questions(rows=None):
    rows = chains.sums(4) if rows is None else rows
    columns = {"prompt": [row["question"] for row in rows], "response": [row["answer"] for row in rows]}
    return annotation.questions_of(Examples(columns), SVAMP)


# Authors


def write(author, orders, style, known=lambda order: False):
    found = {}
    author.write(orders, style, known, lambda order, texts: found.update(zip(order.keys, texts, strict=True)))
    return found


def orders(count=7, samples=3):
    prompts = ["go" + "o" * (3 * i % 11) for i in range(count)]
    return [Order(prompt, tuple((i, s) for s in range(samples))) for i, prompt in enumerate(prompts)]


def test_a_text_depends_on_its_key_and_not_on_what_was_known_before(model):
    author, style = LocalAuthor(model, Run(), batch_size=6), Style(3, 0.9, 0.95, max_tokens=6)
    whole = write(author, orders(), style)
    assert len(set(whole.values())) > 15
    before = set(list(whole)[:6])
    rest = write(author, orders(), style, lambda order: set(order.keys) <= before)
    assert rest.items() <= whole.items()
    assert whole.keys() - rest.keys() <= before
    other = write(author, orders(), Style(4, 0.9, 0.95, max_tokens=6))
    assert other != whole
    greedy = write(author, orders(), Style(3, 0.0, max_tokens=6))
    assert all(greedy[i, 0] == greedy[i, 1] for i in range(7))


def test_an_encoder_decoder_writes_what_transformers_lets_it_write(tmp_path):
    folder = chains.encoder_decoder(tmp_path)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    author = LocalAuthor(Loaded(model, tokenizer, "t5"), Run(), batch_size=6)
    whole = write(author, orders(), Style(3, 0.9, max_tokens=6))
    assert len(set(whole.values())) > 15
    alone = LocalAuthor(Loaded(model, tokenizer, "t5"), Run(), batch_size=1)
    assert write(alone, orders(), Style(3, 0.9, max_tokens=6)) == whole
    greedy = write(author, orders(), Style(temperature=0.0, max_tokens=6))
    for order in orders():
        given = tokenizer("<s>" + order.prompt, return_tensors="pt")
        ids = model.generate(**given, max_new_tokens=6, do_sample=False)
        assert greedy[order.keys[0]] == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_a_long_prompt_is_refused(model):
    with pytest.raises(Exception, match="takes 256 tokens"):
        write(LocalAuthor(model, Run()), [Order("x" * 300, ((0, 0),))], Style())


def test_texts_end_before_a_stop_word():
    assert cut("one\nQ: two\n\n", ("\n\n", "\nQ:")) == "one"
    assert cut("one", ("two",)) == "one"


def test_an_endpoint_gets_all_samples_of_a_question_at_once(server):
    author = EndpointAuthor(EndpointRef.parse(server.reference), Run())
    server.write = lambda prompt, number: f"{prompt}-{number}"
    found = write(author, orders(3, 2), Style(1, 0.5, 0.9, 9, ("\n",), chat=True))
    assert found[2, 1] == f"{orders()[2].prompt}-1"
    assert {(a["n"], a["temperature"], a["top_p"], a["max_tokens"]) for a in server.asked} == {(2, 0.5, 0.9, 9)}
    assert len({asked["seed"] for asked in server.asked}) == 3
    assert all("messages" in asked for asked in server.asked)
    assert author.facts() == {"model": "tiny", "endpoint": server.url}


# Stages


def test_a_teacher_explains_in_one_call_and_answers_in_another(server, tmp_path):
    author = EndpointAuthor(EndpointRef.parse(server.reference), Run())
    rows = annotation.annotate(tmp_path, lambda: author, questions(), 2, Style(0, 0.7), SVAMP)
    assert [(row["question"], row["sample"]) for row in rows] == [(q, s) for q in range(4) for s in range(2)]
    assert [row["initial_correct"] for row in rows] == [True, False] * 4
    assert rows[0]["chain"] == "Count on to 0 -> done.", "a mark in a chain would hide the answer"
    assert rows[0]["answer"] == "0"
    assert rows[0]["input"] == "What is 0 and 0?"
    first, second = server.asked[0], server.asked[-1]
    assert first["prompt"].startswith("Q: What is ")  # several are asked at once, and any may be the first to arrive
    assert first["prompt"].endswith("?\nA: Let's think step by step.")
    assert second["prompt"].endswith("\nTherefore, the answer is")
    assert second["temperature"] == 0
    provenance = rows[1]["provenance"]
    assert provenance["endpoint"] == server.url
    assert (provenance["model"], provenance["sample"], provenance["seed"]) == ("tiny", 1, 0)
    assert provenance["prompt"].startswith("Q: What is 0 and 0?")
    assert rows == read_rows(tmp_path / "annotations.jsonl")


def test_a_broken_stage_goes_on_where_it_stopped(server, tmp_path, monkeypatch):
    monkeypatch.setenv("KDTOOL_ENDPOINT_PARALLEL", "1")
    author = EndpointAuthor(EndpointRef.parse(server.reference), Run())
    whole = annotation.annotate(tmp_path / "whole", lambda: author, questions(), 2, Style(), SVAMP)
    asked = len(server.asked)
    server.asked.clear()

    def fail(after):
        server.faults = [Fault(times=after), Fault(400)]
        with pytest.raises(EndpointProblem):
            annotation.annotate(tmp_path / "cut", lambda: author, questions(), 2, Style(), SVAMP)

    fail(2)
    fail(2)  # the last two chains, and no answer yet
    part = tmp_path / "cut" / "annotations.jsonl.part"
    fail(3)
    assert len(read_rows(part)) == 3
    part.write_bytes(part.read_bytes()[:-20])  # as a kill in the middle of a write leaves it
    again = annotation.annotate(tmp_path / "cut", lambda: author, questions(), 2, Style(), SVAMP)
    assert again == whole
    files = [(tmp_path / name / "annotations.jsonl").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    assert not part.exists()
    assert len(server.asked) == asked + 3 + 1, "more was asked again than the three refused and the torn one"


def test_a_finished_stage_asks_nobody(server, tmp_path):
    author = EndpointAuthor(EndpointRef.parse(server.reference), Run())
    rows = annotation.annotate(tmp_path, lambda: author, questions(), 2, Style(), SVAMP)

    def nobody():
        raise AssertionError("the teacher was asked for")

    assert annotation.annotate(tmp_path, nobody, questions(), 2, Style(), SVAMP) == rows


def test_rows_of_another_origin_are_not_taken_up(tmp_path):
    path = tmp_path / "rows.jsonl"
    with Journal(path, {(0, 0): {"seed": 1}}) as journal:
        journal.add([{"question": 0, "sample": 0, "provenance": {"seed": 1}}])
    with Journal(path, {(0, 0): {"seed": 2}}) as journal:
        assert journal.rows == {}
        row = {"question": 0, "sample": 0, "provenance": {"seed": 2}}
        journal.add([row])
        journal.add([row])
        assert journal.finish() == [row]
    assert len(path.read_bytes().splitlines()) == 1


def test_a_mentor_writes_chain_and_answer_at_once(server, tmp_path):
    server.write = lambda prompt, number: f"So {number} --> {number} it is"
    author = EndpointAuthor(EndpointRef.parse(server.reference), Run())
    rows = annotation.augment(tmp_path, lambda: author, questions()[:2], 3, Style(), SVAMP)
    assert {asked["prompt"] for asked in server.asked} == {"What is 0 and 0?", "What is 0 and 1?"}
    assert [(row["chain"], row["answer"], row["initial_correct"]) for row in rows] == [
        *[(f"So {i}", "0", i == 0) for i in range(3)],
        *[(f"So {i}", "1", i == 1) for i in range(3)],
    ]


# Files of rationales


def test_rationales_of_a_file_are_matched_to_the_questions(tmp_path):
    more = [
        {**chains.sums()[0], "rationale": "planted", "correct": False},
        {"question": "What is  0 AND 0?", "answer": "0.0", "rationale": "spelt otherwise", "correct": True},
        {**chains.sums()[1], "answer": "7", "rationale": "another answer", "correct": True},
        {"question": "Who?", "answer": "1", "rationale": "of no question", "correct": True},
        {**chains.sums()[2], "rationale": "", "correct": True},
    ]
    path = chains.teacher_file(tmp_path / "teacher.jsonl", chains.sums(4), more)
    rows = annotation.from_file(path, tmp_path / "annotations.jsonl", questions(), SVAMP)
    assert len(rows) == 8 + 4
    right = {row["chain"] for row in annotation.chosen(rows, 0, 0, True)}
    assert "spelt otherwise" in right
    assert not right & {"planted", "another answer", ""}
    assert rows[0]["provenance"]["row"] == 1
    assert rows[0]["provenance"]["file"] == "teacher.jsonl"


def test_the_published_record_is_read_and_files_without_a_verdict_are_judged(tmp_path):
    rows = [{"input": "What is 0 and 1?", "chain": f"I think {n}", "answer": "1"} for n in (1, 2)]
    path = chains.write_rows(tmp_path / "records.jsonl", rows)
    found = annotation.from_file(path, tmp_path / "out.jsonl", questions(), SVAMP)
    assert [row["initial_correct"] for row in found] == [True, False]
    table = tmp_path / "table.csv"
    table.write_text("question,rationale,answer,correct\nWhat is 0 and 1?,a,1,true\nWhat is 0 and 1?,b,1,false\n")
    found = annotation.from_file(table, tmp_path / "out2.jsonl", questions(), SVAMP)
    assert [row["initial_correct"] for row in found] == [True, False]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.jsonl", None, "does not exist"),
        ("a.txt", "x", "no table of rationales"),
        ("a.jsonl", '{"question": "What is 0 and 0?", "answer": "0"}\n', "no column 'chain'"),
        ("a.jsonl", '{"question": "?", "answer": "0", "rationale": "x"}\n', "no rationale for any"),
        ("a.jsonl", "{", "line 1: not valid JSON"),
    ],
)
def test_files_that_are_none(tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataProblem, match=said):
        annotation.from_file(tmp_path / name, tmp_path / "out.jsonl", questions(), SVAMP)
    assert not (tmp_path / "out.jsonl").exists()


# Choosing


def test_right_rows_are_drawn_by_seed_and_question():
    rows = [
        {"question": q, "sample": s, "input": f"q{q}", "chain": f"c{s}", "answer": "1", "initial_correct": s != 2}
        for q in range(20)
        for s in range(6)
    ]
    kept = annotation.chosen(rows, 3, 0, True)
    assert len(kept) == 60
    assert all(row["initial_correct"] for row in kept)
    assert kept == annotation.chosen(rows, 3, 0, True)
    assert kept != annotation.chosen(rows, 3, 1, True)
    assert len(annotation.chosen(rows, 0, 0, True)) == 100
    assert len(annotation.chosen([*rows, rows[0]], 0, 0, False)) == 101


def test_learning_from_nothing_is_refused():
    with pytest.raises(DataProblem, match="no rationale ends in the right answer"):
        annotation.as_examples([])


# Mistakes


def test_questions_come_once_and_need_answers_that_are_some():
    rows = chains.sums(3)
    assert len(questions([*rows, rows[0]])) == 3
    for bad, said in (
        ({**rows[0], "answer": " "}, "without an answer"),
        ({**rows[0], "answer": "nought"}, "'nought' is no answer by the rule 'svamp'"),
        ({**rows[0], "answer": "5"}, "that of the same question before it '0'"),
    ):
        with pytest.raises(DataProblem, match=said):
            questions([*rows, bad])
    with pytest.raises(DataProblem, match="questions with answers"):
        annotation.questions_of(Examples({"text": ["a"]}), SVAMP)


def test_rows_hold_any_text(server, tmp_path):
    server.escapes = True
    server.write = lambda prompt, number: json.loads('"half \\ud83d, whole \\ud83d\\ude00 --> 0"')
    author = EndpointAuthor(EndpointRef.parse(server.reference), Run())
    rows = annotation.augment(tmp_path, lambda: author, questions()[:1], 1, Style(), SVAMP)
    assert rows[0]["prediction"] == "half \ufffd, whole \U0001f600 --> 0"
    assert rows[0]["initial_correct"]
