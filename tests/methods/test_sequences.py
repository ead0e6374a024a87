"""Methods that write texts: prompts and responses, whole batches and single rows, what is logged and kept."""

import json

import pytest
import torch

from kdtool.generation import Interleaving
from kdtool.methods._once import Once
from kdtool.methods._sequences import SequenceMethod
from kdtool.methods.imitkd import Config as ImitConfig
from kdtool.registry import METHODS
from kdtool.run import Run, Silent
from kdtool.sections import TrainSection
from kdtool.tasks._base import LABELS, ROWS
from kdtool.train.loop import Trainer
from kdtool.train.state import seed_everything
from tests.kits import make_kit

WRITERS = ["gkd", "imitkd", "minillm", "mixed-skd", "on-policy", "seqkd", "skd"]
ALWAYS = {"gkd": "student_share", "imitkd": "student_share", "mixed-skd": "skd_share"}
"""Settings that make a method write in every step."""


@pytest.fixture(scope="module")
def kit(models, data):
    """Prompts with responses of several lengths."""
    return make_kit("causal-lm", models, data, "prompts")


@pytest.fixture(scope="module")
def plain(models, data):
    return make_kit("causal-lm", models, data)


def build(kit, name, **values):
    seed_everything(3)
    if name in ALWAYS:
        values[ALWAYS[name]] = 1.0
    return kit.build(name, **values).eval()


def texts(method, batch):
    """Tokens that count of each row, by row number, of what a step learns from."""
    seen = []
    method.learn = lambda text, **_: seen.append(text)
    if METHODS.info("minillm").name == type(method).__module__.rsplit(".", 1)[-1]:
        seen.append(
            method.write(batch, 0.5, method.sampling(scored=True), method.scorer(method.student)),
        )
    else:
        method.step(batch, 0.5)
    text = seen[0]
    rows = zip(batch[ROWS].tolist(), text.ids, text.counts, strict=True)
    return {row: (ids[: int(counts.nonzero()[-1]) + 1].tolist(), ids[counts].tolist()) for row, ids, counts in rows}


@pytest.mark.parametrize("name", WRITERS)
def test_texts_go_on_from_their_prompts_whatever_the_batch(kit, name):
    method = build(kit, name)
    rows = [0, 5, 2, 9, 4, 7]
    batch = kit.batch(rows)
    together = texts(method, batch)
    first, room = method.prompts(batch)
    assert len(set(first.tolist())) > 1, "prompts of one length show nothing"
    for i, row in enumerate(rows):
        whole, new = together[row]
        prompt = batch["input_ids"][i, : int(first[i])].tolist()
        assert batch[LABELS][i, : int(first[i])].eq(-100).all()
        assert batch[LABELS][i, int(first[i])] == batch["input_ids"][i, int(first[i])]
        assert whole == prompt + new, "ids of the prompt are kept"
        assert 1 <= len(new) <= int(room[i])
        assert len(new) == int(room[i]) or new[-1] in method.stop
        assert texts(method, kit.batch([row]))[row] == together[row]
    assert texts(method, kit.batch(rows[::-1]))[9] == together[9]


def test_more_or_less_than_the_data_may_be_written(kit):
    batch = kit.batch([0, 1, 2, 3])
    few, many = (texts(build(kit, "on-policy", max_new_tokens=most), batch) for most in (2, 20))
    _, room = build(kit, "on-policy").prompts(batch)
    assert max(len(new) for _, new in few.values()) == 2
    assert any(len(new) > int(room[row]) for row, (_, new) in many.items())
    for row in few:
        assert many[row][1][:2] == few[row][1]
    positions = build(kit, "on-policy", max_new_tokens=1000)
    longest = max(len(whole) for whole, _ in texts(positions, batch).values())
    assert longest <= positions.positions


def test_what_is_written_never_leaves_the_models_positions(kit):
    method = build(kit, "on-policy", max_new_tokens=1000)
    method.stop = ()
    assert {len(whole) for whole, _ in texts(method, kit.batch([0, 1])).values()} == {method.positions}
    method = build(kit, "on-policy", max_new_tokens=1000)
    method.positions = int(method.prompts(kit.batch([0]))[0])
    assert int(method.step(kit.batch([0]), 0.5).count) == 0


def test_stop_strings_end_texts(kit):
    free = texts(build(kit, "on-policy", max_new_tokens=20), kit.batch([0, 1, 2, 3]))
    decode = kit.student.processor.decode
    word = decode(free[0][1][1])
    ended = texts(build(kit, "on-policy", max_new_tokens=20, stop_strings=[word]), kit.batch([0, 1, 2, 3]))
    for row, (_, new) in ended.items():
        assert new == free[row][1][: len(new)]
        assert word not in decode(new[:-1])
        assert word in decode(new) or new == free[row][1]
    assert word in decode(ended[0][1])


@pytest.mark.parametrize("name", ["supervised-kd", "gkd", "imitkd", "mixed-skd", "distillm", "skd", "minillm"])
@pytest.mark.parametrize("written", [False, True])
def test_padding_and_other_prompt_tokens_never_count(kit, name, written):
    if written and name in ("supervised-kd", "distillm"):
        pytest.skip("writes nothing at first")
    method = build(kit, name)
    if not written and name in ALWAYS:
        method = kit.build(name, **{ALWAYS[name]: 0.0}).eval()
    batch = kit.batch([0, 1, 2])
    wider = {key: torch.nn.functional.pad(batch[key], (0, 5), value=7) for key in ("input_ids", LABELS)}
    wider[LABELS][:, -5:] = -100
    wider |= {"attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5)), ROWS: batch[ROWS]}
    expected, found = (method.step(one, 0.5) for one in (batch, wider))
    assert int(expected.count) == int(found.count)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-5, atol=1e-5)
    if not written and name != "skd":
        assert int(found.count) == int((batch[LABELS] != -100).sum()) or name == "minillm"


def test_rows_with_responses_add_up(kit):
    for name in (*WRITERS, "supervised-kd"):
        method = build(kit, name)
        whole = method.step(kit.batch([0, 1, 2]), 0.5)
        parts = [method.step(kit.batch([row]), 0.5) for row in range(3)]
        assert int(whole.count) == sum(int(one.count) for one in parts)
        torch.testing.assert_close(whole.total, sum(one.total for one in parts), rtol=1e-4, atol=1e-4)


def test_packed_rows_give_the_loss_of_rows_of_their_own(kit):
    method = build(kit, "supervised-kd", ce_weight=0.5)
    rows = [*map(int, kit.train.lengths.argsort()[:6]), int(kit.train.lengths.argmax())]
    packed = kit.task.packed(kit.train, method.models)
    batch = kit.task.collate([packed[i] for i in rows]) | {ROWS: torch.tensor(rows)}
    assert len(batch["input_ids"]) < len(rows)
    expected, found = method.step(kit.batch(rows), 0.5), method.step(batch, 0.5)
    assert int(found.count) == int(expected.count)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-5, atol=1e-5)


def train(kit, name, folder=None, reporter=None, checkpoints=None, **values):
    steps = values.pop("steps", 6)
    seed_everything(7)
    method = kit.build(name, **values)
    method.folder = folder
    config = TrainSection(
        max_steps=steps, batch_size=4, grad_accum=2, lr=1e-2, log_every=1, checkpoint_every=2, resume=True
    )
    trainer = Trainer(method, kit.train, config, Run(seed=7, reporter=reporter or Silent()), folder=checkpoints)
    return method, trainer.train()


class Breaks(Silent):
    def progress(self, stage, done, total, facts):
        if done == 5:
            raise RuntimeError("cut off")


@pytest.mark.parametrize("name", ["skd", "seqkd"])
def test_kept_generations_are_those_of_an_unbroken_run(kit, name, tmp_path):
    values = {"save_generations": True, "max_new_tokens": 5}
    whole, _ = train(kit, name, tmp_path / "whole", **values)
    with pytest.raises(RuntimeError, match="cut off"):
        train(kit, name, tmp_path / "cut", Breaks(), tmp_path / "checkpoints", **values)
    resumed, _ = train(kit, name, tmp_path / "cut", None, tmp_path / "checkpoints", **values)
    path = "generations.jsonl"
    assert (tmp_path / "whole" / path).read_text() == (tmp_path / "cut" / path).read_text()
    lines = [json.loads(line) for line in (tmp_path / "whole" / path).read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert {line["step"] for line in lines} == set(range(1, 7))
    assert len(lines) == 6 * 8 - 2 * (len(lines) < 48)  # an epoch of 30 rows ends with a batch of two
    for line in lines:
        assert line["text"] == kit.student.processor.decode(line["tokens"])
        assert line["prompt"] == kit.train[line["row"]]["input_ids"][: len(line["prompt"])].tolist()
        assert ("acceptance" in line) == (name == "skd")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize(("name", "values"), [("seqkd", {}), ("gkd", {"seqkd": True, "student_share": 0.0})])
def test_a_teacher_writes_each_row_once(kit, tmp_path, monkeypatch, name, values):
    """A text written again in another batch might differ: here it surely does, and nobody must see it."""
    calls = []

    def drawn(self, batch, settings, *others):
        out = plain(self, batch, settings, *others)
        if self.training:
            out.tokens.add_(len(calls) % 3).remainder_(self.vocabulary)
            calls.append(batch[ROWS].tolist())
        return out

    plain = SequenceMethod.drawn
    monkeypatch.setattr(SequenceMethod, "drawn", drawn)
    whole, first = train(kit, name, tmp_path / "whole", steps=12, **values)
    written = [row for rows in calls for row in rows]
    assert sorted(written) == list(range(len(kit.train)))
    calls.clear()
    with pytest.raises(RuntimeError, match="cut off"):
        train(kit, name, tmp_path / "cut", Breaks(), tmp_path / "checkpoints", steps=12, **values)
    resumed, second = train(kit, name, tmp_path / "cut", None, tmp_path / "checkpoints", steps=12, **values)
    assert [row for rows in calls for row in rows] == written
    assert first.rows == second.rows
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    path = "data/texts.jsonl"
    assert (tmp_path / "cut" / path).read_text() == (tmp_path / "whole" / path).read_text()


def test_a_line_that_a_kill_cut_short_is_written_again(kit, tmp_path):
    method, _ = train(kit, "seqkd", tmp_path, steps=1)
    path = tmp_path / "data" / "texts.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    again = Once(kit.student.processor)
    again.open(path.parent)
    rows = list(method.once.texts)
    assert again.missing(rows) == [len(rows) - 1]
    out = method.once.of(rows[-1:], 0, torch.device("cpu"))
    again.add(rows[-1:], out)
    assert path.read_bytes() == content


def test_acceptance_is_over_repaired_texts_alone(kit):
    _, history = train(kit, "mixed-skd", k=5, steps=12)
    repaired = [row for row in history.rows if "acceptance" in row]
    assert 0 < len(repaired) < len(history.rows)
    assert all(0 < row["acceptance"] < 1 and row["teacher log-likelihood"] < 0 for row in repaired)
    assert not any(name.startswith("units") for row in history.rows for name in row)


def test_acceptance_rises_while_the_student_learns(plain):
    seed_everything(7)
    method = plain.build("skd", k=5, student_temperature=1.0, student_top_p=1.0)
    batch = plain.batch(list(range(len(plain.train))))

    def accepted():
        text = method.repaired(batch, 0.0)
        return float(text.parts["acceptance"] / text.units["acceptance"])

    before = accepted()
    config = TrainSection(max_steps=15, batch_size=8, lr=2e-2)
    Trainer(method, plain.train, config, Run(seed=7)).train()
    assert accepted() > before + 0.03


def test_the_teacher_is_asked_for_its_own_texts(kit):
    method = build(kit, "gkd", seqkd=True)
    object.__setattr__(method, "config", METHODS.build_config("gkd", {"student_share": 0.0, "seqkd": True}))
    twice = [texts(method, kit.batch([0, 1, 2])) for _ in range(2)]
    assert twice[0] == twice[1]
    assert twice[0] == texts(build(kit, "seqkd"), kit.batch([0, 1, 2]))


def test_the_datas_share_decays(plain):
    method = plain.build("imitkd", schedule="decay", student_share=0.75)
    assert method.student_share(0.0) == 0
    assert method.student_share(0.5) == pytest.approx(0.5)
    assert method.student_share(1.0) == pytest.approx(0.75)
    assert plain.build("imitkd").student_share(0.3) == ImitConfig().student_share


def test_draws_change_with_step_and_seed(kit):
    method = build(kit, "on-policy", max_new_tokens=12)
    batch = kit.batch([0, 1, 2, 3])
    settings = Interleaving()
    first, second = (method.write(batch, at, settings, method.scorer(method.student)).ids for at in (0.25, 0.5))
    assert not torch.equal(first, second)
    method.seed += 1
    assert not torch.equal(method.write(batch, 0.25, settings, method.scorer(method.student)).ids, first)
