"""Training images that could not be used, counted over all processes."""

import pytest
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from runs import Processes

from gs_d2.engine.left_out import LeftOutHook


class Views:
    """Of each process: which images it found bad in which iteration, and when its drive did not answer."""

    def __init__(self, found, errors):
        self.found, self.errors, self.iteration = found, errors, -1

    def __len__(self):
        return 1000

    @property
    def left_out(self):
        return [index for iteration, index in self.found if iteration <= self.iteration]

    @property
    def num_read_errors(self):
        return sum(iteration <= self.iteration for iteration in self.errors)


class Small(TrainerBase):
    def __init__(self, views):
        super().__init__()
        self.views = views
        self.register_hooks([LeftOutHook(views)])

    def run_step(self):
        self.views.iteration = self.iter


def count(found, errors, iterations):
    rank = comm.get_rank()
    trainer = Small(Views(found[rank], errors[rank]))
    trainer.train(0, iterations)
    return {name: (when, int(value)) for name, (value, when) in trainer.storage.latest().items()}


def test_nothing_is_written_while_all_is_well():
    assert count([[]], [[]], 41) == {}


@pytest.mark.parametrize("iterations", [20, 33])
def test_they_are_counted_when_detectron2_writes(caplog, iterations):
    with caplog.at_level("WARNING", logger="gs_d2"):
        found = count([[(0, 7), (5, 8), (25, 9)]], [[3, 4]], iterations)
    last = iterations - 1
    assert found == {"left_out_images": (last, 2 + (last > 25)), "read_errors": (last, 2)}
    assert "So far 2 of 1,000 images cannot be trained on, and 2 times a drive did not answer" in caplog.text
    assert len(caplog.records) == 1 + (last > 25)


def test_an_image_that_two_processes_know_counts_once():
    both = Processes(count, [[(0, 7), (1, 8)], [(2, 8)]], [[1], [2, 3]], 20, world_size=2).wait()
    assert both == [{"left_out_images": (19, 2), "read_errors": (19, 3)}, {}]
