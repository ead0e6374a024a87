"""WID: merge exactness, mask schedules and penalty steps against their reference values."""

import math

import pytest
import torch
import transformers

from kdtool.compressors import _wid_merge as merging
from kdtool.compressors import _wid_schedule as schedule
from kdtool.compressors import _wid_step as stepping
from kdtool.compressors._wid_anatomy import anatomy_of
from tests.golden._cases import cases

KINDS = {}
for parameter in cases("wid"):
    case = parameter.values[0]
    for kind in ("end_to_end", "mask_schedule", "penalty_step"):
        if case is None or case.entry["kind"] == kind:
            KINDS.setdefault(kind, []).append(parameter)


def of(kind):
    return pytest.mark.parametrize("case", KINDS.get(kind, []))


def part(case, prefix):
    return {k.removeprefix(f"{prefix}."): v for k, v in case.tensors.items() if k.startswith(f"{prefix}.")}


def masked_lm(values, state):
    config = transformers.BertConfig(**values, tie_word_embeddings=False)
    model = transformers.BertForMaskedLM(config).double().eval()
    # an untied decoder has a bias of its own, which the files hold under the name of the tied one
    state = {"cls.predictions.decoder.bias": state["cls.predictions.bias"]} | state
    model.load_state_dict(state)
    return model


@torch.no_grad()
def run(model, case):
    inputs = {key: case.tensors[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    out = model(**inputs, output_hidden_states=True)
    return out.logits, out.hidden_states


def factor_of(case):
    teacher, student = case.entry["teacher"], case.entry["student"]
    sizes = [side["hidden_size"] // side["num_attention_heads"] for side in (teacher, student)]
    return merging.query_factor(*sizes)


def merged_of(case, factor):
    """Weights of the student, from those of the teacher."""
    state, compactors, keep = (part(case, name) for name in ("teacher", "compactor", "keep"))
    teacher = masked_lm(case.entry["teacher"], state)
    return merging.merge(teacher.state_dict(), compactors, keep, anatomy_of(teacher), factor)


def student_of(case, factor):
    return masked_lm(case.entry["teacher"] | case.entry["student"], merged_of(case, factor))


def masked_of(case):
    """The teacher between its compactors, all that is dropped zero."""
    teacher = masked_lm(case.entry["teacher"], part(case, "teacher"))
    anatomy = anatomy_of(teacher)
    wrapped = merging.compacted(teacher, anatomy)
    with torch.no_grad():
        for name, compactor in merging.compactors_of(wrapped, anatomy).items():
            compactor.copy_(part(case, "compactor")[name])
    keep = part(case, "keep")
    masks = {g: torch.zeros(size, dtype=torch.bool).index_fill(0, keep[g], 1) for g, size in anatomy.sizes.items()}
    return merging.zeroed(wrapped, anatomy, masks)


@of("end_to_end")
def test_the_merge_gives_the_reference_student(case):
    expected, factor = part(case, "student"), factor_of(case)
    assert math.isclose(factor, case.entry["query_factor"])
    merged = merged_of(case, factor)
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, **case.tolerance.of("end_to_end"))


@of("end_to_end")
def test_the_merged_student_is_the_masked_teacher(case):
    keep, near = part(case, "keep"), case.tolerance.of("end_to_end")
    masked, masked_states = run(masked_of(case), case)
    student, states = run(student_of(case, factor_of(case)), case)
    torch.testing.assert_close(masked, case.tensors["logits"], **near)
    torch.testing.assert_close(student, case.tensors["logits"], **near)
    for i, (before, after) in enumerate(zip(masked_states, states, strict=True)):
        torch.testing.assert_close(before[..., keep["hidden"]], case.tensors[f"hidden.{i}"], **near)
        torch.testing.assert_close(after, case.tensors[f"hidden.{i}"], **near)


@of("end_to_end")
def test_smaller_heads_need_the_query_factor(case):
    logits, _ = run(student_of(case, 1.0), case)
    off = float((logits - case.tensors["logits"]).abs().max())
    assert off < 1e-9 if factor_of(case) == 1.0 else off > 0.05


@of("mask_schedule")
def test_masks_follow_the_schedule(case):
    entry, given = case.entry, case.tensors
    hidden, head = entry["hidden"], entry["head_dim"]
    for name in (key for key in given if key.startswith("keep.")):
        _, strategy, target, group = name.split(".")
        for step, expected in zip(entry["steps"], given[name], strict=True):
            k = step // entry["w_step"]
            scores = given["norm_ffn" if group == "ffn" else "norm_hidden"]
            if group == "attn":
                found = schedule.keep_attention(scores, k, int(target), head, strategy)
            else:
                size = len(scores)
                drops = schedule.dense_drops(k, size, int(target) * size // hidden)
                found = schedule.keep_smallest_out(scores, drops)
            assert found.equal(expected.bool()), (name, step)


@of("penalty_step")
@pytest.mark.parametrize("role", ["in", "out", "bias"])
@pytest.mark.parametrize("phase", ["active", "warm"])
def test_penalty_steps(case, role, phase):
    entry, given = case.entry, part(case, role)
    assert not entry["bias_correction"]
    decay = entry["weight_decay"]["bias" if role == "bias" else "compactor"]
    adam = stepping.Adam(entry["lr"], tuple(entry["betas"]), entry["eps"], decay)
    param, grad, m, v = (given[key].clone() for key in ("param0", "grad", "exp_avg0", "exp_avg_sq0"))
    if phase == "active":
        gone = stepping.dropped_entries(given["keep"], role)
        grad = stepping.penalise(param, grad, m, gone, entry["l2_lambda"])
    elif role != "bias":
        grad = stepping.shrink(param, grad)
    stepping.step(param, grad, m, v, adam)
    near = case.tolerance.of("penalty_step")
    for found, key in ((param, "param"), (m, "exp_avg"), (v, "exp_avg_sq")):
        torch.testing.assert_close(found, given[f"{phase}.{key}"], **near)
