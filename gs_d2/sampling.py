"""Group sampling: chooses the labelled anchors that take part in the loss (paper, section 4.2). Needs torch only."""

import math

import torch
from torch import Tensor

from gs_d2 import ops


def group_by_scale(scales: Tensor, group_scales) -> Tensor:
    """Computes the group of each box: the nearest of `group_scales` in log2 (eq. 4).

    Args:
        scales (Tensor[...]): sqrt(w * h) of each box in pixels, positive.
        group_scales (sequence of float): the G scales of the groups in pixels, positive.

    Returns:
        int64 Tensor of the same shape, in [0, G); the lower index if two scales are equally near.

    Example:
        >>> group_by_scale(torch.tensor([5.0, 20.0, 30.0, 500.0]), [16, 32, 64])
        tensor([0, 0, 1, 2])
    """
    # As numbers: a tensor would be copied to the device, which waits for that.
    logarithms = scales.float().log2()
    return torch.stack([(logarithms - math.log2(scale)).abs() for scale in group_scales], dim=-1).argmin(dim=-1)


def first_of_each_group(group_idxs: Tensor, num_groups: int, count: int) -> Tensor:
    """Finds the first `count` members of each group.

    Args:
        group_idxs (int64 Tensor[N]): in [0, num_groups).

    Returns:
        int64 Tensor[K]: their rows, ascending; K <= num_groups * count.
    """
    one_hot = group_idxs[:, None] == torch.arange(num_groups, device=group_idxs.device)
    rank = one_hot.cumsum(dim=0).gather(1, group_idxs[:, None])[:, 0]
    return torch.nonzero(rank <= count)[:, 0]


class GroupSampler:
    """Takes the same number of samples from each group, positives : negatives = 1 : 3.

    Args:
        num_groups (int): G; 1 means sampling without groups.
        num_per_group (int): samples per group and image (the paper's N).
        positive_fraction (float): largest fraction of positives in a group; "ohem_all" and "none" do not use it.
        method: "random", "wrs", "ohem" or "ohem_all" (the paper's OHEM without groups: the labels compete), see
            :func:`gs_d2.ops.group_subsample`; "none" samples every labelled box.

    Raises:
        ValueError: the method is unknown.
    """

    METHODS = ("random", "wrs", "ohem", "ohem_all", "none")

    def __init__(self, num_groups, num_per_group, positive_fraction=0.25, method="random"):
        if method not in self.METHODS:
            raise ValueError(f"method must be one of {', '.join(self.METHODS)}, got {method!r}")
        self.num_groups = num_groups
        self.num_per_group = num_per_group
        self.positive_fraction = positive_fraction
        self.method = method

    @property
    def max_positives(self) -> int | None:
        """The largest number of positives in the samples of one image. None means no known limit: with "none", and in a
        subclass with its own `__call__` that does not override this."""
        if self.method == "none" or type(self).__call__ is not GroupSampler.__call__:
            return None
        share = 1.0 if self.labels_compete else self.positive_fraction
        return self.num_groups * int(self.num_per_group * share)

    @property
    def labels_compete(self) -> bool:
        """Whether positives and negatives compete for the same places."""
        return self.method == "ohem_all"

    @property
    def needs_losses(self) -> bool:
        """Whether sampling depends on the losses."""
        return self.method in ("wrs", "ohem", "ohem_all")

    def __call__(self, match_labels: Tensor, group_idxs: Tensor, losses: Tensor | None = None, seed=None) -> Tensor:
        """Samples anchors.

        Args:
            match_labels (int8 Tensor[N] or [B, N]), group_idxs (int64 Tensor[N] or [B, N]): as
                :func:`gs_d2.ops.group_subsample`.
            losses (Tensor, shape of match_labels): classification loss of each anchor; used if `needs_losses`.
            seed (int or 0-dim int64 Tensor): None takes a seed from torch's CPU generator.

        Returns:
            int8 Tensor of match_labels' shape: 1 or 0 where sampled, -1 elsewhere.
        """
        if self.method == "none":
            return match_labels
        return ops.group_subsample(
            match_labels,
            group_idxs,
            num_groups=self.num_groups,
            num_per_group=self.num_per_group,
            positive_fraction=self.positive_fraction,
            method=self.method,
            losses=losses if self.needs_losses else None,
            seed=seed,
        )

    def subsample_labels(
        self, labels: Tensor, group_idxs: Tensor, bg_label: int, losses: Tensor | None = None, seed=None
    ) -> tuple[Tensor, Tensor]:
        """Samples class labels and returns indices, as Detectron2's ``subsample_labels`` does.

        Args:
            labels (integer Tensor[N]): -1 is ignored, `bg_label` is background, any other value is foreground.
            group_idxs, losses, seed: as in a call of the sampler.
            bg_label (int): the number of classes in ROI heads, 0 in an RPN.

        Returns:
            pos_idx, neg_idx (int64 Tensors): rows of the samples, ascending. Their number depends on the labels, so
            this waits for the GPU. A call of the sampler does not wait.
        """
        match_labels = torch.where(labels == -1, -1, (labels != bg_label).to(torch.int8)).to(torch.int8)
        sampled = self(match_labels, group_idxs, losses, seed)
        return torch.nonzero(sampled == 1)[:, 0], torch.nonzero(sampled == 0)[:, 0]
