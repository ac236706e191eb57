"""Packing: every token once, documents whole where they fit, segments apart."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from whatwhere.lab.data.base import IGNORED
from whatwhere.lab.data.packing import pack

SIZES = st.lists(st.integers(0, 70), min_size=1, max_size=40).filter(any)
LENGTHS = st.integers(2, 24)
PADDING = 999_999


def bounds_of(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


@settings(deadline=None)
@given(SIZES, LENGTHS)
def test_rows_hold_every_token_once(sizes: list[int], length: int) -> None:
    packing = pack(bounds_of(sizes), length)
    stream = np.arange(sum(sizes), dtype=np.uint32)
    tokens, _, segments = packing.gather(stream, np.arange(len(packing)), PADDING)
    assert tokens.shape == (len(packing), length)
    assert sorted(tokens[segments > 0].tolist()) == stream.tolist()
    assert (tokens[segments == 0] == PADDING).all()


@settings(deadline=None)
@given(SIZES, LENGTHS)
def test_segments_are_documents_or_full_cuts(sizes: list[int], length: int) -> None:
    bounds = bounds_of(sizes)
    packing = pack(bounds, length)
    stream = np.arange(sum(sizes), dtype=np.uint32)
    tokens, labels, segments = packing.gather(stream, np.arange(len(packing)), PADDING)
    pieces = []
    for row, row_labels, row_segments in zip(tokens, labels, segments, strict=True):
        used = row_segments[row_segments > 0]
        # Segments are 1, 2, ... from the left, and padding is on the right.
        assert (row_segments[: len(used)] == used).all()
        assert set(np.diff(used)) <= {0, 1}
        assert used[0] == 1
        for segment in range(1, used[-1] + 1):
            piece = row[row_segments == segment]
            piece_labels = row_labels[row_segments == segment]
            assert (np.diff(piece) == 1).all()
            assert piece_labels[0] == IGNORED
            assert (piece_labels[1:] == piece[1:]).all()
            pieces.append((int(piece[0]), len(piece)))
        assert (row_labels[row_segments == 0] == IGNORED).all()
    expected = []
    for start, size in zip(bounds[:-1].tolist(), sizes, strict=True):
        while size > 0:
            expected.append((start, min(size, length)))
            start, size = start + length, size - length
    assert sorted(pieces) == expected


@settings(deadline=None)
@given(SIZES, LENGTHS, st.data())
def test_gathering_rows_is_row_by_row(sizes: list[int], length: int, data: st.DataObject) -> None:
    packing = pack(bounds_of(sizes), length)
    stream = np.arange(sum(sizes), dtype=np.uint32)
    rows = st.lists(st.integers(0, len(packing) - 1), min_size=1, max_size=8)
    chosen = np.array(data.draw(rows))
    together = packing.gather(stream, chosen, PADDING)
    for i, row in enumerate(chosen):
        alone = packing.gather(stream, np.array([row]), PADDING)
        for one, many in zip(alone, together, strict=True):
            assert (one[0] == many[i]).all()


@settings(deadline=None)
@given(SIZES, LENGTHS)
def test_little_room_is_wasted(sizes: list[int], length: int) -> None:
    """Best fit leaves no two rows half empty or emptier."""
    packing = pack(bounds_of(sizes), length)
    filled = np.add.reduceat(packing.sizes, packing.rows[:-1])
    assert (filled <= length).all()
    assert (2 * filled <= length).sum() <= 1
