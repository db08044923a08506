#!/usr/bin/env python
"""Shows detections beside the ground truth: hits, misses and false alarms, one picture an image.

tools/visualize_results.py --predictions results.zip --output pictures
"""

import math
import sys

import numpy as np
from detectron2.data import MetadataCatalog
from tqdm import tqdm

from gs_d2.analysis.hits import match_detections, why_none_is_shown
from gs_d2.command_line import bad_input_ends, folder_for, parser_of
from gs_d2.data.catalog import load_records
from gs_d2.data.records import faces_of, name_of
from gs_d2.formats import face_eval, fddb
from gs_d2.formats.images import as_rgb
from gs_d2.formats.wider_predictions import read_wider_predictions
from gs_d2.visualization import FALSE_ALARM, HIT, IGNORED, MISS, beside, draw


@bad_input_ends()
def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("--dataset", default="wider_face_val", help="default: %(default)s")
    parser.add_argument("--predictions", required=True, help="result files of the benchmark: folder, zip or file")
    parser.add_argument("--output", required=True, help="folder for the pictures")
    parser.add_argument("--confidence-threshold", type=float, default=0.5, help="lowest score shown")
    parser.add_argument("--num-images", type=int, default=20, help="how many, evenly spread; 0 is all")
    args = parser.parse_args(argv)
    if args.num_images < 0 or not math.isfinite(args.confidence_threshold):
        parser.error("--num-images must be at least 0, and --confidence-threshold a number")
    visualize(args.dataset, args.predictions, args.output, args.confidence_threshold, args.num_images)


def visualize(dataset, predictions, output, lowest_score, num_images):
    """Writes `<output>/<image>.jpg`: on the left the ground truth, on the right the detections."""
    records = load_records(dataset, for_training=False)
    detections = read_detections(dataset, predictions, [record["image_id"] for record in records])
    short_names = len({name_of(record) for record in records}) == len(records)
    if num_images and num_images < len(records):
        records = [records[i] for i in np.linspace(0, len(records) - 1, num_images).round().astype(int)]
    output = folder_for("--output", output)
    if problem := why_none_is_shown(detections, [str(record["image_id"]) for record in records], lowest_score):
        print(f"visualize_results: WARNING: {predictions}: {problem}", file=sys.stderr)
    for record in tqdm(records, desc="pictures", unit="image"):
        rows = detections.get(str(record["image_id"]), np.zeros((0, 5)))
        rows = rows[rows[:, 4] >= lowest_score]
        rows = rows[np.argsort(-rows[:, 4], kind="stable")]
        boxes = rows[:, :4]
        image = as_rgb(record["file_name"])
        faces, ignore, _ = faces_of(record)
        found, hits = match_detections(faces, boxes)
        colours = np.where(ignore, "ignored", np.where(found, "hit", "miss"))
        left = draw(image, faces, [{"ignored": IGNORED, "hit": HIT, "miss": MISS}[c] for c in colours])
        right = draw(image, boxes, [HIT if hit else FALSE_ALARM for hit in hits], rows[:, 4])
        num_faces = int((~ignore).sum())
        num_found = int((found & ~ignore).sum())
        titles = [
            f"ground truth: {num_found} of {num_faces} faces found (green), {num_faces - num_found} missed (red)",
            f"score >= {lowest_score:g}: {int(hits.sum())} right (green), {int((~hits).sum())} false alarms (orange)",
        ]
        picture = beside([left, right], titles)
        name = name_of(record) if short_names else str(record["image_id"]).replace("/", "_")
        picture.save(output / f"{name}.jpg", quality=92)


def read_detections(dataset, path, image_ids):
    """Image id as text -> float64 [n, 5] `x1 y1 x2 y2 score`, read in the format of the data set's benchmark."""
    evaluator_type = MetadataCatalog.get(dataset).get("evaluator_type")
    if evaluator_type == "face_eval":
        return face_eval.read_detections(path)  # its ids are text
    if evaluator_type == "fddb":
        rows_of = fddb.read_detections(path)
    else:
        rows_of = read_wider_predictions(path, image_ids).detections
    return {str(i): np.concatenate([corners_of(rows[:, :-1]), rows[:, -1:]], axis=1) for i, rows in rows_of.items()}


def corners_of(regions):
    """`x1 y1 x2 y2` of rectangles `x y w h`, or around ellipses of five numbers."""
    if regions.shape[1] == 5:
        return fddb.bounding_boxes(regions)
    return np.concatenate([regions[:, :2], regions[:, :2] + regions[:, 2:]], axis=1)


if __name__ == "__main__":
    main()
