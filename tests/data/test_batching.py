import numpy as np
import pytest

from kdtool.data.batching import epoch_batches, ordered_batches

LENGTHS = np.random.default_rng(0).integers(1, 200, size=1037)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 1037])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("buckets", [True, False])
@pytest.mark.parametrize("lengths", [True, False])
def test_every_row_exactly_once_and_only_the_last_batch_is_incomplete(size, shuffle, buckets, lengths):
    given = LENGTHS[:size] if lengths else None
    batches = epoch_batches(given, size, 8, seed=1, epoch=2, shuffle=shuffle, buckets=buckets, window=4)
    assert sorted(np.concatenate(batches).tolist() if batches else []) == list(range(size))
    assert [len(batch) for batch in batches] == [8] * (size // 8) + ([size % 8] if size % 8 else [])


def test_same_arguments_same_batches_other_epoch_or_seed_other_batches():
    def flat(**change):
        arguments = {"seed": 1, "epoch": 0} | change
        return np.concatenate(epoch_batches(LENGTHS, len(LENGTHS), 16, **arguments)).tolist()

    assert flat() == flat()
    assert flat() != flat(epoch=1)
    assert flat() != flat(seed=2)


def test_buckets_cut_padding_and_keep_batches_in_random_order():
    def padding(**how):
        batches = epoch_batches(LENGTHS, len(LENGTHS), 16, seed=0, epoch=0, **how)
        return sum(LENGTHS[batch].max() * len(batch) for batch in batches) - LENGTHS.sum()

    assert padding(buckets=True) < 0.2 * padding(buckets=False)
    longest = [LENGTHS[batch].max() for batch in epoch_batches(LENGTHS, len(LENGTHS), 16, seed=0, epoch=0)]
    assert longest != sorted(longest)


def test_without_shuffling_and_buckets_rows_stay_in_order():
    batches = epoch_batches(None, 10, 4, seed=0, epoch=0, shuffle=False)
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_window_of_one_batch_sorts_only_within_batches():
    lengths = np.array([3, 1, 2, 9, 8, 7])
    batches = epoch_batches(lengths, 6, 3, seed=0, epoch=0, shuffle=False, window=1)
    assert [batch.tolist() for batch in batches] == [[1, 2, 0], [5, 4, 3]]


def test_ordered_batches_start_with_the_longest():
    batches = ordered_batches(np.array([1, 5, 3, 5]), 4, 3)
    assert [batch.tolist() for batch in batches] == [[1, 3, 2], [0]]
    assert [batch.tolist() for batch in ordered_batches(None, 3, 2)] == [[0, 1], [2]]


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"size": 3}])
def test_impossible_sizes_are_refused(wrong):
    arguments = {"size": 4, "batch_size": 2} | wrong
    with pytest.raises(ValueError):
        ordered_batches(np.ones(4), **arguments)
    with pytest.raises(ValueError):
        epoch_batches(np.ones(4), seed=0, epoch=0, **arguments)
