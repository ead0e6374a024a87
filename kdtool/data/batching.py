"""Which rows form a batch: deterministic, each row once, rows of similar length together."""

import numpy as np


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _check(lengths: np.ndarray | None, size: int, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not positive")
    if lengths is not None and len(lengths) != size:
        raise ValueError(f"{len(lengths)} lengths for {size} rows")


def epoch_batches(
    lengths: np.ndarray | None,
    size: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    buckets: bool = True,
    window: int = 50,
) -> list[np.ndarray]:
    """Row indices of each batch of one epoch; the same arguments give the same batches.

    With buckets, a random permutation is cut into windows of `window * batch_size` rows, each window is
    sorted by length (so that a batch needs little padding) and cut into batches, and the batches are
    shuffled. The incomplete batch, if there is one, comes last.

    Args:
        lengths: [size] length of each row; None when all rows are equally long.
        size: Number of rows.
        batch_size: Rows in a batch.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        shuffle: Random order; without it rows and batches stay in the order of the data.
        buckets: Batch rows of similar length together.
        window: Batches in one sorting window; larger means less padding and less randomness.

    Returns:
        Index arrays (int64) that hold every row exactly once.

    Raises:
        ValueError: batch_size is not positive, or lengths and size disagree.
    """
    _check(lengths, size, batch_size)
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(size) if shuffle else np.arange(size)
    if lengths is not None and buckets:
        parts = [part[np.argsort(lengths[part], kind="stable")] for part in _cut(order, window * batch_size)]
        order = np.concatenate(parts) if parts else order
    batches = _cut(order, batch_size)
    if shuffle and buckets and lengths is not None:
        complete = size // batch_size
        batches = [batches[i] for i in generator.permutation(complete)] + batches[complete:]
    return batches


def ordered_batches(lengths: np.ndarray | None, size: int, batch_size: int) -> list[np.ndarray]:
    """Row indices of each batch of an evaluation, longest rows first.

    Sorting keeps padding small; starting with the longest shows a lack of memory at once. The caller
    restores the order of the data from the indices.

    Args:
        lengths: [size] length of each row; None when all rows are equally long (then in data order).
        size: Number of rows.
        batch_size: Rows in a batch.

    Returns:
        Index arrays (int64) that hold every row exactly once.

    Raises:
        ValueError: batch_size is not positive, or lengths and size disagree.
    """
    _check(lengths, size, batch_size)
    order = np.arange(size) if lengths is None else np.argsort(-np.asarray(lengths), kind="stable")
    return _cut(order, batch_size)
