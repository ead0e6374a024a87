import numpy as np

from kdtool.data.examples import Examples


def test_select_keeps_arrays_lists_and_lengths_aligned():
    examples = Examples({"label": np.arange(4), "text": list("abcd")}, lengths=np.array([4, 3, 2, 1]))
    chosen = examples.select([3, 1])
    assert len(chosen) == 2
    assert chosen[0] == {"label": 3, "text": "d"}
    assert chosen.lengths.tolist() == [1, 3]
    assert len(examples.select([])) == 0
