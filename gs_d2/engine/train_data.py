"""The stream of training images: endless, shuffled, and entered at any iteration."""

import itertools

import torch
from detectron2.data import build_detection_train_loader
from detectron2.utils import comm
from torch.utils.data import Dataset, Sampler

from gs_d2.data.workers import prepare_worker
from gs_d2.engine.seeding import ORDER, SAMPLE, derive_seeds, seed_generators


class TrainLoader:
    """Batches of views, for this process; each `iter()` starts at the iteration of the last `seek` (0).

    The stream of all processes together is one: its order is shuffled for each pass over the data set, and what is
    random in `views` (generators of random, numpy and torch) is seeded for every item of the stream. Both depend on
    `seed` and the place in the stream alone; not on the number of loader workers, nor on earlier random numbers.
    With `aspect_ratio_grouping`, images that wait for others of their shape are lost by a seek, and the number of
    workers may change the batches.
    """

    def __init__(
        self,
        views: Dataset,
        *,
        seed: int,
        total_batch_size: int,
        batches_per_iteration: int = 1,
        aspect_ratio_grouping: bool = False,
        num_workers: int = 0,
    ):
        """
        Args:
            views: at least one, each what the model takes; say :class:`gs_d2.data.loaders.TrainingViews`.
            seed: >= 0, the same in all processes.
            total_batch_size: images of one batch in all processes together, a multiple of their number.
            batches_per_iteration: how many batches an iteration consumes.
            aspect_ratio_grouping, num_workers: as :func:`detectron2.data.build_detection_train_loader`.
        """
        num_processes = comm.get_world_size()
        if total_batch_size < 1 or total_batch_size % num_processes:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH must be a multiple of the {num_processes} processes, got {total_batch_size}"
            )
        self.views = views
        self.dataset = SeededViews(views, seed)
        self._seed = seed
        self._images_per_iteration = total_batch_size * batches_per_iteration
        self._options = {
            "total_batch_size": total_batch_size,
            "aspect_ratio_grouping": aspect_ratio_grouping,
            "num_workers": num_workers,
        }
        self._first = 0

    def seek(self, iteration: int):
        """Makes the next `iter()` start with what this iteration (>= 0) trains on."""
        self._first = iteration * self._images_per_iteration

    def reseed(self, seed: int):
        """Makes the next `iter()` one of another seed."""
        self._seed = seed
        self.dataset.seed = seed

    def __iter__(self):
        sampler = SeededSampler(len(self.dataset), self._seed, self._first)
        return iter(build_detection_train_loader(self.dataset, mapper=None, sampler=sampler, **self._options))


class SeededSampler(Sampler):
    """Endless pairs (place in the stream, row of the data set): this process's share, every world size-th."""

    def __init__(self, size: int, seed: int, first: int = 0):
        """
        Args:
            size: rows of the data set.
            first: the place where the stream of all processes together starts.
        """
        self._size, self._seed, self._first = size, seed, first
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()  # loader workers may not know

    def __iter__(self):
        epoch = None
        for place in itertools.count(self._first + self._rank, self._world_size):
            if place // self._size != epoch:
                epoch = place // self._size
                order = self._shuffled(epoch)
            yield place, order[place % self._size]

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator()
        generator.manual_seed(int(derive_seeds(self._seed, ORDER, epoch)[0]))
        return torch.randperm(self._size, generator=generator).tolist()


class SeededViews(Dataset):
    """The view of the row of :class:`SeededSampler`'s pairs, after setting the process's generators by the place."""

    def __init__(self, views, seed: int):
        self._views, self.seed = views, seed

    def __len__(self):
        return len(self._views)

    def __getitem__(self, place_and_row: tuple[int, int]):
        prepare_worker()
        place, row = place_and_row
        seed_generators(self.seed, SAMPLE, place)
        return self._views[row]
