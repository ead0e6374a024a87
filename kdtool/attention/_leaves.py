"""Leaves of keys: the directions in which keys and queries are told apart, and centroids weighted by pilot rows.

Shapes: X independent sets, n keys or rows. All directions and weights are constant in the gradient.
"""

import torch
from torch import Tensor

from kdtool.attention._tree import leaf_order, rows_at

FEATURES = 16
"""Directions in which the spread of keys within leaves is measured."""
_QUERY_FEATURES = 8
_KEY_FEATURES = 6
_VALUE_FEATURES = 10
"""Directions in which trees measure distances."""
_MOMENT_ROWS = 512
"""Rows from which second moments are estimated."""
_VALUE_SHARE = 2.0
"""Spread of the values beside that of the keys in the metric of the tree; a leaf loses what differs in both."""
_FLOOR = 1e-30
"""Probability below which a pilot says nothing of a leaf."""


def pick(rows: Tensor, valid: Tensor | None, count: int) -> Tensor:
    """`count` rows spread evenly over the valid ones, [X, count, d]; all of them if there are no more."""
    total = rows.shape[1]
    count = min(count, total)
    place = (torch.arange(count, device=rows.device) * 2 + 1) * total // (2 * count)
    if valid is None:
        return rows.index_select(1, place)
    position = torch.arange(total, device=rows.device)
    first = torch.sort((~valid).long() * total + position, dim=1).values % total  # the valid ones in front
    many = valid.sum(1, keepdim=True).clamp_min(1)
    place = (torch.arange(count, device=rows.device) * 2 + 1) * many // (2 * count)
    return rows_at(rows, first.gather(1, place))


def rows_for_moments(rows: Tensor, valid: Tensor | None) -> Tensor:
    """The rows that second moments are estimated from, [X, up to 512, d]."""
    return rows if valid is None and rows.shape[1] <= _MOMENT_ROWS else pick(rows, valid, _MOMENT_ROWS)


@torch.no_grad()
def key_features(k: Tensor, valid: Tensor | None, queries: Tensor, count: int = _QUERY_FEATURES) -> Tensor:
    """Directions of the key space in which keys act differently on these queries.

    With M = L L^T the second moment of the queries, |L^T (k - k')|^2 is the mean squared difference of
    two keys' logits; U spans the largest variances of k L.

    Args:
        k: [X, n, d]
        valid: [X, n] keys that count; None for all.
        queries: [X, rows, d]
        count: Number of directions.

    Returns:
        [X, d, min(count, d)]: features of keys are k @ this.
    """
    queries = queries.float()
    moment = queries.mT @ queries / queries.shape[1]
    size = torch.diagonal(moment, dim1=1, dim2=2).mean(-1)[:, None, None]
    eye = torch.eye(k.shape[-1], device=k.device)
    lower = torch.linalg.cholesky(moment + (1e-4 * size + 1e-12) * eye)
    found: Tensor = lower @ _main(rows_for_moments(k, valid).float() @ lower, count)
    return found


@torch.no_grad()
def value_features(v: Tensor, valid: Tensor | None, count: int = _VALUE_FEATURES) -> Tensor:
    """Directions of the largest variances of values [X, n, dv], [X, dv, min(count, dv)]."""
    return _main(rows_for_moments(v, valid).float(), count)


def _main(x: Tensor, count: int) -> Tensor:
    """Orthogonal directions of the largest variances of rows [X, n, d], [X, d, min(count, d)].

    They are stretched so that squared distances along them are on average those in all directions.
    """
    centred = x - x.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(centred.mT @ centred / x.shape[1])
    values = values.clamp_min(0.0)
    stretch = (values.sum(-1) / values[:, -count:].sum(-1).clamp_min(_FLOOR)).clamp_min(1.0).sqrt()
    found: Tensor = vectors[..., -count:] * stretch[:, None, None]
    return found


@torch.no_grad()
def key_order(y: Tensor, z: Tensor, valid: Tensor | None, levels: int, size: int) -> Tensor:
    """Order of the keys in which leaves are consecutive; keys of a leaf act alike and have like values.

    What a centroid loses of its leaf is the part in which logits and values differ together.

    Args:
        y: [X, n, m] features of the keys, the main ones last.
        z: [X, n, m] features of their values.
        valid: [X, n] keys that count; None for all.
        levels: Splits.
        size: Keys of a leaf.

    Returns:
        [X, 2^levels size] int64, as of `leaf_order`.
    """
    parts = []
    for seen, share in ((y[..., -_KEY_FEATURES:], 1.0), (z, _VALUE_SHARE)):
        some = rows_for_moments(seen, valid)
        spread = (some - some.mean(1, keepdim=True)).square().sum(-1).mean(-1).sqrt()
        parts.append(seen * (share / spread.clamp_min(_FLOOR))[:, None, None])
    return leaf_order(torch.cat(parts, -1), valid, levels, size)


def centroids(rows: Tensor, weight: Tensor) -> Tensor:
    """Weighted means of consecutive rows: [X, L c, d] with weights [X, L, c] to [X, L, d]."""
    leaves, size = weight.shape[1:]
    leaf = rows.reshape(-1, size, rows.shape[-1])
    found = weight.to(rows.dtype).reshape(-1, 1, size) @ leaf
    return found.reshape(rows.shape[0], leaves, -1)


def present_in(order: Tensor, n: int, valid: Tensor | None) -> Tensor | None:
    """Which places of an order hold a row that counts; None if all do."""
    if valid is None:
        return None if order.shape[1] == n else order < n
    return (order < n) & valid.gather(1, order.clamp_max(n - 1))


def ordered(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x [X, n, d] in an order [X, places]; places without a row repeat the last one."""
    n = x.shape[1]
    return rows_at(x, order if order.shape[1] == n else order.clamp_max(n - 1))
