"""What detectors are trained on, by label and anchor scale: from runs' metrics.json, or from annotations alone.

Counts are dicts {"pos_sampled": {16.0: anchors, ...}, ...} with the keys of TITLES.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes
from tqdm import tqdm

from gs_d2 import model_zoo
from gs_d2.analysis.views import SIZE_RULE, ViewAnchors, annotated_records, blank_image
from gs_d2.formats.text import decoded, lines_of
from gs_d2.modeling.losses import group_sums

TITLES = {
    "pos_matched": "positive, matched",
    "neg_matched": "negative, matched",
    "pos_sampled": "positive, sampled",
    "neg_sampled": "negative, sampled",
}
FIG_2 = ("rpn", "fpn", "fpn_finest_stride", "fpn_finest", "fpn_finest_sampling")  # (a) to (e)
LABELS = ("pos_sampled", "neg_sampled")


def read_runs(metrics_files) -> dict[str, dict]:
    """The counts of several runs by the names of their folders; by their paths, where two folders have one name."""
    paths = [Path(path) for path in metrics_files]
    names = [path.resolve().parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return {name: read_counts(path) for name, path in zip(names, paths, strict=True)}


def read_counts(metrics_file: Path) -> dict[str, dict[float, float]]:
    """Mean anchors per image over the run: {"pos_sampled": {16.0: 12.3, ...}, ...}, all of the same scales.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no metrics.json of a training here; names file and line.
    """
    values = defaultdict(lambda: defaultdict(list))
    for number, line in enumerate(lines_of(decoded(metrics_file.read_bytes(), str(metrics_file))), 1):
        if not line:
            continue
        try:
            for key, value in json.loads(line).items():
                if key.startswith("groups/") and "@" in key:
                    name, scale = key.removeprefix("groups/").split("@")
                    if name in TITLES:
                        values[name][_finite(scale)].append(_finite(value))
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{metrics_file}:{number}: not a record of metrics ({error})") from error
    if not values.keys() >= TITLES.keys():
        raise ValueError(f"{metrics_file}: no group statistics; is it the metrics.json of a training run of gs_d2?")
    if len({frozenset(by_scale) for by_scale in values.values()}) > 1:
        raise ValueError(f"{metrics_file}: its group statistics are not of the same scales")
    return {name: {s: float(np.mean(v)) for s, v in sorted(by.items())} for name, by in values.items()}


def _finite(value) -> float:
    value = float(value)
    if not abs(value) < 1e15:  # nor is NaN
        raise ValueError(f"{value} is no number of anchors")
    return value


class TrainedAnchors(ViewAnchors):
    """Which anchors of an image a config's detector is trained on."""

    def __init__(self, config_file):
        super().__init__(config_file)
        if self.rpn.group_loss.sampler.method != "random":
            raise ValueError(
                f"{config_file}: what is sampled by loss cannot be known without a net; "
                "only MODEL.GS.SAMPLER random can be counted. Read a run's metrics.json instead"
            )

    def count(self, image_size, faces, ignore_boxes, seed) -> dict[str, np.ndarray]:
        """Anchors of one view by label and scale: int64 [G] for each of TITLES.

        Args:
            image_size: height and width of the view.
            faces, ignore_boxes (float32 [n, 4]): as :meth:`FaceDatasetMapper.augment`.
            seed (int): of the sampling.
        """
        anchors, group_loss = self.anchors(image_size), self.rpn.group_loss
        faces, ignore_boxes = Boxes(torch.from_numpy(faces)), Boxes(torch.from_numpy(ignore_boxes))
        match_labels = group_loss.match(anchors, [faces], [ignore_boxes], [image_size]).labels
        scale_idxs, group_idxs = group_loss.group(anchors)
        sampled_labels = group_loss.sampler(match_labels, group_idxs, seed=seed)
        masks = (match_labels == 1, match_labels == 0, sampled_labels == 1, sampled_labels == 0)
        num_scales = len(group_loss.group_scales)
        return {
            name: group_sums(mask, scale_idxs, num_scales)[0].numpy().astype(np.int64)
            for name, mask in zip(TITLES, masks, strict=True)
        }


def count_annotations(config_files=None, dataset="wider_face_train", num_images=None, seed=0) -> dict:
    """Sums the anchors of one augmented view of each image, the same view for detectors of the same augmentation.

    Returns:
        dict: dataset, images, seed, image_sizes {read, assumed, assumption}, detectors {name: {"pos_sampled": {16.0:
        anchors of all images, ...}, ...}}; equal for equal arguments.
    """
    config_files = [
        Path(path) for path in config_files or [model_zoo.get_config_file(f"wider/{name}.yaml") for name in FIG_2]
    ]
    detectors = {detector_name(path): TrainedAnchors(path) for path in config_files}
    if len(detectors) < len(config_files):
        raise ValueError("Two of the config files have the same name")
    records, idxs = annotated_records(dataset, num_images, seed)
    totals = {name: defaultdict(int) for name in detectors}
    num_read = 0
    for i in tqdm(idxs, desc="counting", unit="image", mininterval=0.1 if sys.stderr.isatty() else 10):
        blank, was_read = blank_image(records[i])
        num_read += was_read
        for name, detector in detectors.items():
            np.random.seed([seed, i])  # Detectron2's augmentations take from numpy's own state
            view, faces, ignore_boxes = detector.augment(blank, records[i])
            sampling_seed = np.random.randint(2**62)
            for label, counts in detector.count(view.shape[:2], faces, ignore_boxes, sampling_seed).items():
                totals[name][label] += counts
    return {
        "dataset": dataset,
        "images": len(idxs),
        "seed": seed,
        "image_sizes": {"read": num_read, "assumed": len(idxs) - num_read, "assumption": SIZE_RULE},
        "unit": "anchors, in one view of each image",
        "detectors": {
            name: {
                label: dict(zip(map(float, detectors[name].rpn.group_loss.group_scales), counts.tolist(), strict=True))
                for label, counts in by_label.items()
            }
            for name, by_label in totals.items()
        },
    }


def detector_name(config_file: Path) -> str:
    """ "FPN-finest-stride" of `.../fpn_finest_stride.yaml`: the paper's names."""
    words = config_file.stem.split("_")
    return "-".join(word.upper() if word in ("rpn", "fpn", "dc", "wrs", "ohem") else word for word in words)


def shares(by_scale):
    total = sum(by_scale.values())
    return {scale: value / total if total else 0.0 for scale, value in by_scale.items()}


def shares_of_samples(counts) -> dict[str, dict[float, float]]:
    """Fig. 2: both labels "normalized by the total amount of training samples"; all shares together are 1."""
    samples = {(label, scale): count for label in LABELS for scale, count in counts[label].items()}
    result = {label: {} for label in LABELS}
    for (label, scale), share in shares(samples).items():
        result[label][scale] = share
    return result
