"""The stream of training images: which, in which order, with which random numbers; from any iteration on."""

import pickle
import random

import numpy as np
import pytest
import torch
from detectron2.utils import comm

from gs_d2.engine import TrainLoader
from gs_d2.engine.seeding import SAMPLE, STEP, seed_generators
from gs_d2.engine.train_data import SeededSampler


class Views(torch.utils.data.Dataset):
    """The row, and a number from each generator that augmentations use."""

    def __len__(self):
        return 7

    def __getitem__(self, row):
        return {"row": row, "drawn": (random.random(), np.random.rand(), torch.rand(()).item())}


def batches(count, first=0, **options):
    loader = TrainLoader(Views(), **{"seed": 3, "total_batch_size": 2, **options})
    loader.seek(first)
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("steps", [1, 3])
def test_seeking_gives_the_rest_of_the_same_stream(num_workers, steps):
    whole = batches(10 * steps)
    torch.rand(5), np.random.rand(5), random.random()  # what else was drawn does not matter
    rest = batches(4 * steps, first=6, num_workers=num_workers, batches_per_iteration=steps)
    assert rest == whole[6 * steps :]


def test_every_pass_shows_every_image_once_in_another_order_and_view():
    images = [image for batch in batches(21, total_batch_size=1) for image in batch]
    passes = [[image["row"] for image in images[7 * i : 7 * i + 7]] for i in range(3)]
    assert all(sorted(rows) == list(range(7)) for rows in passes)
    assert passes[0] != passes[1] != passes[2]
    assert len({number for image in images for number in image["drawn"]}) == 3 * 21


def test_another_seed_is_another_stream():
    ours, others = batches(4), batches(4, seed=4)
    assert [x["row"] for batch in ours for x in batch] != [x["row"] for batch in others for x in batch]
    assert not {x["drawn"] for batch in ours for x in batch} & {x["drawn"] for batch in others for x in batch}


def test_processes_share_one_stream(monkeypatch):
    """So that an image's view does not depend on how many processes train."""
    alone = SeededSampler(7, 3, first=5)
    expected = [pair for pair, _ in zip(alone, range(12), strict=False)]
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    found = {}
    for rank in range(3):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        found[rank] = [pair for pair, _ in zip(SeededSampler(7, 3, first=5), range(4), strict=False)]
    assert [found[i % 3][i // 3] for i in range(12)] == expected
    assert [place for place, _ in expected] == list(range(5, 17))
    second = pickle.dumps(SeededSampler(7, 3, first=5))  # as rank 2 of 3
    monkeypatch.undo()  # a loader worker that was not forked knows no group
    assert [pair for pair, _ in zip(pickle.loads(second), range(4), strict=False)] == found[2]


def test_generators_depend_on_all_of_the_place():
    def numbers(*place):
        seed_generators(*place)
        return random.random(), np.random.rand(), torch.rand(()).item()

    places = [(s, p, a, b, c) for s in (0, 1) for p in (SAMPLE, STEP) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    drawn = {place: numbers(*place) for place in places}
    assert all(len({found[i] for found in drawn.values()}) == len(places) for i in range(3))
    assert all(numbers(*place) == found for place, found in drawn.items())
