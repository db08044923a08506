"""Boxes over time: faces that blink out stay covered, frames come back in order, and few of them wait."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_d2.inference.tracks import GaplessBoxes


def covered(frames, max_gap) -> list[np.ndarray]:
    """The boxes of every frame; how many frames wait is checked on the way."""
    gapless, done = GaplessBoxes(max_gap), []
    for i, boxes in enumerate(frames):
        done += gapless.push(i, boxes)
        assert len(done) == max(i + 1 - max_gap, 0)
    done += gapless.finish()
    assert [frame for frame, _ in done] == list(range(len(frames))) and gapless.finish() == []
    assert all(boxes.shape == (len(boxes), 4) for _, boxes in done)
    return [boxes for _, boxes in done]


def at(x, y=0, size=20):
    return [x, y, x + size, y + size]


def test_a_gap_is_filled_on_a_straight_line():
    frames = [[at(0)], [at(1)], [], [], [], [at(9)], [at(10)]]
    assert [boxes.tolist() for boxes in covered(frames, 3)] == [[at(x)] for x in (0, 1, 3, 5, 7, 9, 10)]


@pytest.mark.parametrize("gap", range(1, 9))
def test_both_ends_of_a_long_gap_stay_where_they_are(gap):
    """Up to max_gap it is one face; above, its last box and its next one are held for max_gap frames each."""
    result = covered([[at(0)], *[[]] * gap, [at(4)]], 3)
    if gap <= 3:
        assert [len(boxes) for boxes in result] == [1] * (gap + 2)
        assert np.allclose([boxes[0, 0] for boxes in result], np.linspace(0, 4, gap + 2))
        return
    for i, boxes in enumerate(result):
        expected = ([at(0)] if i <= 3 else []) + ([at(4)] if i >= gap + 1 - 3 else [])
        assert boxes.tolist() == expected


def test_before_the_first_and_after_the_last():
    frames = [[]] * 5 + [[at(50)]] + [[]] * 5
    assert [len(boxes) for boxes in covered(frames, 2)] == [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]
    assert [len(boxes) for boxes in covered([[], [at(0)], []], 30)] == [1, 1, 1], "shorter than the delay"


def test_two_faces_that_cross_and_blink_in_turn():
    frames = [[at(0 + i, 0), at(40 - i, 100)] for i in range(8)]
    frames[3], frames[4], frames[6] = frames[3][1:], [], frames[6][:1]
    for i, boxes in enumerate(covered(frames, 2)):
        assert sorted(boxes.tolist()) == sorted([at(i, 0), at(40 - i, 100)])


def test_the_best_pairs_are_linked():
    """Both boxes overlap the first face; the nearer one continues it, the other is a new face."""
    result = covered([[at(0)], [], [at(8), at(2)]], 1)
    assert sorted(result[1].tolist()) == [at(1), at(8)]


def test_no_delay_keeps_the_frames_as_they_are():
    frames = [[at(0)], [], [at(0), at(50)]]
    assert [boxes.tolist() for boxes in covered(frames, 0)] == frames
    with pytest.raises(ValueError, match="max_gap must be at least 0, got -1"):
        GaplessBoxes(-1)


@given(
    st.integers(0, 6),
    st.lists(st.lists(st.integers(0, 300).map(lambda x: at(x, size=30)), max_size=3, unique_by=str), max_size=25),
)
@settings(max_examples=100, deadline=None)
def test_nothing_found_is_lost_and_nothing_is_added_far_from_it(max_gap, frames):
    result = covered(frames, max_gap)
    for i, (found, boxes) in enumerate(zip(frames, result, strict=True)):
        kept = boxes.tolist()
        assert all(box in kept for box in found)
        near = [box for other in frames[max(i - max_gap, 0) : i + max_gap + 1] for box in other]
        for box in kept:  # on the line between two boxes near in time
            assert near and min(b[0] for b in near) <= box[0] + 1e-9 and box[0] <= max(b[0] for b in near) + 1e-9
        if max_gap and near:
            assert kept, "a face found within max_gap frames is covered"
