"""Images that run out of memory, simulated by a model that refuses more than so many pixels."""

import itertools
import logging
import math

import pytest
import torch
from small_detector import DIVISIBILITY, build, image
from test_pyramid import assert_same, in_order, pyramid

from gs_d2.inference.tiling import TiledPredictor, plan_tiles, split_axis


def limit_memory(model, pixels):
    """Makes `model` run out of memory above that many pixels; returns the (height, width) of all that ran."""
    ran = []
    backbone = model.backbone.forward

    def forward(x):
        if x.shape[0] * x.shape[2] * x.shape[3] > pixels:
            raise torch.OutOfMemoryError("simulated")
        ran.append(tuple(x.shape[2:]))
        return backbone(x)

    model.backbone.forward = forward
    return ran


@pytest.mark.parametrize("size", [(203, 307), (160, 320), (96, 640)])
@pytest.mark.parametrize("fraction", [0.7, 0.45])
def test_tiles_find_what_the_whole_image_finds(size, fraction, caplog):
    x = image(*size)
    expected = pyramid(build(), scales=[0.5, 1.0], tile_margin=16)([x])[0]["instances"]
    model = build()
    ran = limit_memory(model, fraction * size[0] * size[1])
    detector = pyramid(model, scales=[0.5, 1.0], tile_margin=16)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ran.clear()
            assert_same(in_order(detector([x])[0]["instances"]), in_order(expected), 1e-4)
    (warning,) = [r.getMessage() for r in caplog.records]
    num_tiles = len(ran) - 1  # less the level of 0.5
    assert num_tiles >= 2
    assert f"Level 1 of the pyramid ({size[1]} x {size[0]} px)" in warning
    assert f"it runs in {num_tiles} overlapping tiles" in warning


def test_batches_that_do_not_fit_run_one_by_one():
    inputs = [image(96, 128), image(96, 128, seed=1)]
    expected = pyramid(flip=True)(inputs)
    model = build()
    ran = limit_memory(model, 96 * 128)
    for ours, other in zip(pyramid(model, flip=True)(inputs), expected, strict=True):
        assert_same(in_order(ours["instances"]), in_order(other["instances"]), 1e-4)
    assert ran == [(96, 128)] * 4


def test_a_size_that_ran_out_is_not_tried_again():
    model = build()
    attempts = []
    predict = model.predict_candidates
    model.predict_candidates = lambda inputs: attempts.append(inputs[0]["image"].shape[1:]) or predict(inputs)
    limit_memory(model, 40000)
    detector = pyramid(model, tile_margin=16)
    detector([image(203, 307)])
    attempts.clear()
    detector([image(203, 307, seed=1)])
    assert torch.Size((203, 307)) not in attempts


def test_not_even_tiles_fit():
    model = build()
    limit_memory(model, 1000)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"Level 1 of the pyramid \(307 x 203 px\) does not fit into memory"
    ):
        pyramid(model, tile_margin=16)([image(203, 307)])


def test_topk_is_the_image_s():
    model = build(topk=300)
    (whole,) = TiledPredictor(model, 300, 16)([image(203, 307)["image"]], "x")
    limit_memory(model, 40000)
    (tiled,) = TiledPredictor(model, 300, 16)([image(203, 307)["image"]], "x")
    assert len(whole) == len(tiled)
    torch.testing.assert_close(tiled.scores, whole.scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [5, 64, 100, 333, 3000])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_spans_own_everything_once(size, count):
    spans = split_axis(size, count, DIVISIBILITY, 48)
    assert 1 <= len(spans) <= count
    assert spans[0].low == -math.inf and spans[-1].high == math.inf
    for before, after in itertools.pairwise(spans):
        assert before.high == after.low
    for span in spans:
        assert span.start % DIVISIBILITY == 0 and 0 <= span.start < span.stop <= size
        assert span.low == -math.inf or span.low - span.start >= min(48, span.low)
        assert span.high == math.inf or span.stop - span.high >= min(48, size - span.high)


def test_plan_prefers_small_tiles():
    tiles = plan_tiles(3000, 3000, 4, 32, 384)
    assert sorted({(y.start, x.start) for y, x in tiles}) == [(0, 0), (0, 1120), (1120, 0), (1120, 1120)]
    assert len(plan_tiles(600, 4000, 4, 32, 384)) == 4
    assert {y.start for y, _ in plan_tiles(600, 4000, 4, 32, 384)} == {0}


def test_tile_geometry_of_a_strided_detector():
    """Anchors of a tile are the whole image's only where all strides agree."""
    assert build().tile_geometry == (16, 32)
