"""The paper's training augmentations (section 5) and crops around a face, as Detectron2 augmentations."""

import math

import numpy as np
from detectron2.data import transforms as T


class ScaleJitterCrop(T.Augmentation):
    """Resizes by a factor sampled from `scales`, then crops at random so that no side exceeds `max_size`.

    The crop is taken first, from the source pixels, so that no pixel is resized only to be cut off.
    """

    def __init__(self, scales, max_size):
        """
        Args:
            scales (sequence of float): positive factors, sampled uniformly; the paper's are 0.25 n, n = 1..8.
            max_size (int): pixels.
        """
        super().__init__()
        self.scales = [float(scale) for scale in scales]
        self.max_size = int(max_size)
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales) or self.max_size < 1:
            raise ValueError(f"scales must be positive and max_size at least 1, got {scales} and {max_size}")

    def get_transform(self, image):
        return self._anywhere(image, self.scales[np.random.randint(len(self.scales))])

    def _anywhere(self, image, scale):
        size = image.shape[:2]
        crop = _crop_size(size, scale, self.max_size)
        y, x = (np.random.randint(side - kept + 1) for side, kept in zip(size, crop, strict=True))
        return _crop_and_resize(size, (y, x), crop, scale, self.max_size)


class ShortSideCrop(ScaleJitterCrop):
    """COCO's (section 5, "COCO"): :class:`ScaleJitterCrop` by the factor that brings the short side to a size."""

    def __init__(self, short_sides, max_size):
        """
        Args:
            short_sides (sequence of int): pixels, sampled uniformly; the paper's is 800.
            max_size (int): pixels, of the crop's sides; the paper's is 1200.
        """
        super().__init__(short_sides, max_size)

    def get_transform(self, image):
        short_side = self.scales[np.random.randint(len(self.scales))]
        return self._anywhere(image, short_side / min(image.shape[:2]))


class FaceCrop(T.Augmentation):
    """Brings a random face near a random anchor scale and crops around it, so that small scales get faces too.

    This is data-anchor-sampling (PyramidBox, Tang et al. 2018), but for the range around a scale and the limit on
    enlarging:


    1. A face is sampled uniformly from those that can be used: its centre is in the image, and enlarged by at most
       `max_upscale` it comes within a factor of sqrt(2) of one of the scales.
    2. A scale s is sampled uniformly from those that it can come so near to: with scales that are powers of two and
       `max_upscale` 2, from those up to the next larger than its own.
    3. sqrt(w * h) of the face becomes a size sampled log-uniformly from [s / sqrt(2), s * sqrt(2)], the sizes whose
       nearest scale is s; where `max_upscale` does not reach the upper end, from [s / sqrt(2), what it reaches]. The
       sides of the view are whole pixels, so that the face's size is off by half a pixel's share of the view.
    4. The crop lies anywhere in the image as long as the face's centre is in it, all such places alike. It is taken
       first, from the source pixels. Where the image ends, the view is smaller than `size`; nothing is padded.

    It needs an AugInput with `boxes` and `is_face`, as :class:`gs_d2.data.FaceDatasetMapper` makes it.
    """

    def __init__(self, otherwise, prob, scales, size, max_upscale):
        """
        Args:
            otherwise (Augmentation): of the image alone; makes all other views, and those without a usable face.
            prob (float): probability in [0, 1] of a view around a face.
            scales (sequence of float): pixels, positive.
            size (int): pixels, of the view's sides at most.
            max_upscale (float): largest factor by which an image is enlarged; positive.

        Raises:
            ValueError: naming the argument.
        """
        super().__init__()
        self.otherwise = otherwise
        self.prob = float(prob)
        self.scales = [float(scale) for scale in scales]
        self.size = int(size)
        self.max_upscale = float(max_upscale)
        if not 0 <= self.prob <= 1:
            raise ValueError(f"FaceCrop: prob must be in [0, 1], got {prob}")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"FaceCrop: scales must be positive pixels, at least one, got {scales}")
        if self.size < 1:
            raise ValueError(f"FaceCrop: size must be at least 1, got {size}")
        if not 0 < self.max_upscale < math.inf:
            raise ValueError(f"FaceCrop: max_upscale must be positive, got {max_upscale}")
        self._lowest = np.array(self.scales) / math.sqrt(2)

    def get_transform(self, image, boxes, is_face):
        """
        Args:
            image (ndarray): [H, W] or [H, W, C].
            boxes (ndarray): [n, 4], XYXY in pixels of `image`.
            is_face (ndarray): bool [n]; the others are never chosen.
        """
        if np.random.rand() >= self.prob:
            return self.otherwise.get_transform(image)
        height, width = image.shape[:2]
        boxes = np.asarray(boxes, dtype=np.float64)[is_face]
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        sizes = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
        usable = ((centres >= 0) & (centres < [width, height])).all(axis=1)
        usable &= sizes * self.max_upscale > self._lowest.min()
        if not usable.any():
            return self.otherwise.get_transform(image)
        chosen = np.random.choice(np.flatnonzero(usable))
        scale = self._factor(sizes[chosen])
        crop = _crop_size((height, width), scale, self.size)
        corner = []
        for side, kept, centre in zip((height, width), crop, centres[chosen].astype(int)[::-1], strict=True):
            corner.append(np.random.randint(max(0, centre - kept + 1), min(centre, side - kept) + 1))
        return _crop_and_resize((height, width), corner, crop, scale, self.size)

    def _factor(self, face_size):
        reached = face_size * self.max_upscale
        low = np.random.choice(self._lowest[self._lowest < reached])
        target = low * (min(2 * low, reached) / low) ** np.random.rand()
        return min(target / face_size, self.max_upscale)


def _crop_size(size, scale, max_size):
    """Source pixels (height, width) of an image of that `size` that fit into `max_size` after resizing by `scale`."""
    return tuple(min(side, max(1, int(max_size / scale))) for side in size)


def _crop_and_resize(size, corner, crop, scale, max_size):
    """The crop whose first pixel is `corner`, resized by `scale`; all pairs are (height or y, width or x)."""
    new_size = tuple(min(max_size, max(1, round(side * scale))) for side in crop)
    transforms = []
    if crop != size:
        transforms.append(T.CropTransform(corner[1], corner[0], crop[1], crop[0]))
    if new_size != crop:
        transforms.append(T.ResizeTransform(*crop, *new_size))
    return T.TransformList(transforms)
