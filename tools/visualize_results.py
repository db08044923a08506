"""Draws detections beside the ground truth: hits, misses and false alarms, one picture an image."""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gs_d2 import ops
from gs_d2.visualization import FALSE_ALARM, HIT, IGNORED, MISS, beside, draw

import gs_d2.data  # noqa: F401  isort: skip  (registers the data sets)
from gs_d2.formats import face_eval, fddb  # isort: skip
from gs_d2.formats.images import as_rgb  # isort: skip
from gs_d2.formats.wider_predictions import read_wider_predictions  # isort: skip

from detectron2.data import DatasetCatalog, MetadataCatalog


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="wider_face_val")
    parser.add_argument("--predictions", required=True, help="result files of the benchmark: folder, zip or file")
    parser.add_argument("--output", required=True, help="folder for the pictures")
    parser.add_argument("--score-thresh", type=float, default=0.5, help="lowest score drawn")
    parser.add_argument("--num-images", type=int, default=20, help="how many, evenly spread; 0 is all")
    args = parser.parse_args()
    try:
        visualize(args.dataset, args.predictions, Path(args.output), args.score_thresh, args.num_images)
    except (FileNotFoundError, KeyError, ValueError) as error:
        sys.exit(f"visualize_results: {error}")


def visualize(dataset, predictions, output, score_thresh, num_images):
    """Writes `<output>/<image>.jpg`: on the left the ground truth, on the right the detections."""
    records = DatasetCatalog.get(dataset)
    detections = read_detections(dataset, predictions, [record["image_id"] for record in records])
    short_names = len({os.path.basename(record["image_id"]) for record in records}) == len(records)
    if num_images and num_images < len(records):
        records = [records[i] for i in np.linspace(0, len(records) - 1, num_images).round().astype(int)]
    output.mkdir(parents=True, exist_ok=True)
    for record in tqdm(records, desc="drawing", unit="image"):
        rows = detections.get(record["image_id"], np.zeros((0, 5)))
        rows = rows[rows[:, 4] >= score_thresh]
        rows = rows[np.argsort(-rows[:, 4], kind="stable")]
        boxes = rows[:, :4]
        image = as_rgb(record["file_name"])
        found, hits = match(record["gt_boxes"], boxes)
        colours = np.where(record["gt_ignore"], "ignored", np.where(found, "hit", "miss"))
        left = draw(image, record["gt_boxes"], [{"ignored": IGNORED, "hit": HIT, "miss": MISS}[c] for c in colours])
        right = draw(image, boxes, [HIT if hit else FALSE_ALARM for hit in hits], rows[:, 4])
        num_faces = int((~record["gt_ignore"]).sum())
        num_found = int((found & ~record["gt_ignore"]).sum())
        titles = [
            f"ground truth: {num_found} of {num_faces} faces found (green), {num_faces - num_found} missed (red)",
            f"score >= {score_thresh:g}: {int(hits.sum())} right (green), {int((~hits).sum())} false alarms (orange)",
        ]
        picture = beside([left, right], titles)
        name = os.path.basename(record["image_id"]) if short_names else record["image_id"].replace("/", "_")
        picture.save(output / f"{name}.jpg", quality=92)


def read_detections(dataset, path, image_ids):
    """Image id -> float64 [n, 5] `x1 y1 x2 y2 score`, read in the format of the data set's benchmark."""
    evaluator_type = MetadataCatalog.get(dataset).get("evaluator_type")
    if evaluator_type == "face_eval":
        return face_eval.read_detections(path)
    if evaluator_type == "fddb":
        rows_of = fddb.read_detections(path)
    else:
        rows_of = read_wider_predictions(path, image_ids).detections
    return {i: np.concatenate([corners_of(rows[:, :-1]), rows[:, -1:]], axis=1) for i, rows in rows_of.items()}


def corners_of(regions):
    """`x1 y1 x2 y2` of rectangles `x y w h`, or around ellipses of five numbers."""
    if regions.shape[1] == 5:
        return fddb.bounding_boxes(regions)
    return np.concatenate([regions[:, :2], regions[:, :2] + regions[:, 2:]], axis=1)


def match(gt_boxes, boxes):
    """Which faces are found and which detections (by falling score) are right: IoU >= 0.5, one to one."""
    found, hits = np.zeros(len(gt_boxes), bool), np.zeros(len(boxes), bool)
    ious = ops.box_iou(torch.from_numpy(np.float32(boxes)), torch.from_numpy(np.float32(gt_boxes))).numpy()
    for i, row in enumerate(ious):
        row = np.where(found, 0, row)
        if len(row) and row.max() >= 0.5:
            found[row.argmax()] = hits[i] = True
    return found, hits


if __name__ == "__main__":
    main()
