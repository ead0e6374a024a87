import numpy as np
import pytest

from kdtool.data.splits import SplitPlan, choose, hold_out, plan_splits
from kdtool.errors import DataProblem
from kdtool.sections import DataSection


@pytest.mark.parametrize(
    ("known", "data", "expected"),
    [
        (["train", "validation", "test"], {}, ("train", "validation", "test")),
        (["test", "dev", "train"], {}, ("train", "dev", "test")),
        (["train", "valid"], {}, ("train", None, "valid")),
        (["train", "dev"], {"validation_split": "dev"}, ("train", "dev", None)),
        (["train"], {}, ("train", None, None)),
        (["all"], {}, ("all", None, None)),
        (["test"], {}, (None, None, "test")),
        (["validation"], {}, (None, None, "validation")),
        (["train", "validation", "test"], {"test_split": "validation"}, ("train", None, "validation")),
        (["train", "validation", "ood"], {"test_split": "ood"}, ("train", "validation", "ood")),
        (["a", "b"], {"train_split": "a", "test_split": "b"}, ("a", None, "b")),
    ],
)
def test_plan(known, data, expected):
    assert plan_splits(known, DataSection(**data), score_only=False) == SplitPlan(*expected)


def test_scoring_takes_a_single_split_in_full():
    assert plan_splits(["train"], DataSection(), score_only=True) == SplitPlan(None, None, "train")


@pytest.mark.parametrize(
    ("known", "data", "message"),
    [
        (["train", "test"], {"test_split": "tset"}, r"no split 'tset' \(data.test_split\)"),
        (["train", "test"], {"train_split": "trian"}, r"no split 'trian' \(data.train_split\)"),
        (["train", "test"], {"train_split": "test", "test_split": "test"}, "'test' is chosen for two purposes"),
        (["a", "b"], {}, "no split to train on or to score"),
    ],
)
def test_impossible_plans(known, data, message):
    with pytest.raises(DataProblem, match=message) as caught:
        plan_splits(known, DataSection(**data), score_only=False)
    assert caught.value.hint


@pytest.mark.parametrize(("size", "share"), [(2, 0.01), (2, 0.99), (100, 0.1), (101, 0.333)])
def test_hold_out_cuts_all_rows_once(size, share):
    kept, held = hold_out(size, share, seed=3)
    assert sorted([*kept, *held]) == list(range(size))
    assert len(held) == min(max(1, round(size * share)), size - 1)
    assert np.array_equal(held, hold_out(size, share, seed=3)[1])


def test_hold_out_depends_on_the_seed_and_needs_two_rows():
    assert not np.array_equal(hold_out(100, 0.5, 0)[1], hold_out(100, 0.5, 1)[1])
    with pytest.raises(DataProblem, match="1 row cannot be cut"):
        hold_out(1, 0.5, 0)


def test_choose_is_seeded_sorted_and_without_repeats():
    rows = choose(100, 10, 0)
    assert len(set(rows.tolist())) == 10
    assert rows.tolist() == sorted(rows.tolist()) == choose(100, 10, 0).tolist()
    assert choose(100, 10, 1).tolist() != rows.tolist() != choose(100, 10, 0, test=True).tolist()
    assert choose(10, 10, 0) is None
    assert choose(10, None, 0) is None
