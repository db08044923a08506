"""The paper's training augmentations (section 5) as Detectron2 augmentations."""

import math

import numpy as np
from detectron2.data import transforms as T


class ScaleJitterCrop(T.Augmentation):
    """Resizes by a factor drawn from `scales`, then crops at random so that no side exceeds `max_size`.

    The crop is taken first, from the source pixels, so that no pixel is resized only to be cut off.
    """

    def __init__(self, scales, max_size):
        """
        Args:
            scales (sequence of float): positive factors, drawn uniformly; the paper's are 0.25 n, n = 1..8.
            max_size (int): pixels.
        """
        super().__init__()
        self.scales = [float(scale) for scale in scales]
        self.max_size = int(max_size)
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales) or self.max_size < 1:
            raise ValueError(f"scales must be positive and max_size at least 1, got {scales} and {max_size}")

    def get_transform(self, image):
        height, width = image.shape[:2]
        return self._crop_and_resize(height, width, self.scales[np.random.randint(len(self.scales))])

    def _crop_and_resize(self, height, width, scale):
        crop_h, crop_w = (min(side, max(1, int(self.max_size / scale))) for side in (height, width))
        y = np.random.randint(height - crop_h + 1)
        x = np.random.randint(width - crop_w + 1)
        new_h, new_w = (min(self.max_size, max(1, round(side * scale))) for side in (crop_h, crop_w))
        transforms = []
        if (crop_h, crop_w) != (height, width):
            transforms.append(T.CropTransform(x, y, crop_w, crop_h))
        if (new_h, new_w) != (crop_h, crop_w):
            transforms.append(T.ResizeTransform(crop_h, crop_w, new_h, new_w))
        return T.TransformList(transforms)


class ShortSideCrop(ScaleJitterCrop):
    """COCO's (section 5, "COCO"): :class:`ScaleJitterCrop` by the factor that brings the short side to a size."""

    def __init__(self, short_sides, max_size):
        """
        Args:
            short_sides (sequence of int): pixels, drawn uniformly; the paper's is 800.
            max_size (int): pixels, of the crop's sides; the paper's is 1200.
        """
        super().__init__(short_sides, max_size)

    def get_transform(self, image):
        height, width = image.shape[:2]
        short_side = self.scales[np.random.randint(len(self.scales))]
        return self._crop_and_resize(height, width, short_side / min(height, width))
