#!/usr/bin/env python
"""Shows what a detector is trained on: the annotations, or the augmented views that the data loader makes of them.

    tools/visualize_data.py --source annotation --output-dir pictures
    tools/visualize_data.py --source dataloader --config-file configs/quick/demo.yaml --output-dir pictures

Faces are green, regions to ignore grey and crossed. The flags are Detectron2's. The data set is DATASETS.TRAIN of the
config; another one: DATASETS.TRAIN "('wider_face_val',)" at the end of the command. Images that cannot be read
are named and left out.
"""

import argparse
import collections
import secrets
import sys
from pathlib import Path

import numpy as np
from detectron2.data import detection_utils as utils
from PIL import Image
from tqdm import tqdm

from gs_d2 import model_zoo
from gs_d2.command_line import bad_input_ends, folder_for, parser_of
from gs_d2.config import load_config
from gs_d2.data import catalog
from gs_d2.data.records import faces_of, name_of
from gs_d2.data.workers import explained
from gs_d2.engine import Trainer
from gs_d2.formats.images import as_rgb
from gs_d2.visualization import draw_annotations


@bad_input_ends(RuntimeError)  # of the loader, which gives up on many bad images
def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("--source", choices=["annotation", "dataloader"], required=True, help="what is shown")
    parser.add_argument("--config-file", metavar="FILE", help="default: configs/Base-WIDER.yaml")
    parser.add_argument("--output-dir", default="./", help="folder for the pictures")
    parser.add_argument("--show", action="store_true", help="open each picture instead of saving it")
    parser.add_argument(
        "--num-images", type=int, default=20, help="how many; annotations are evenly spread; 0 is as many as there are"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    args = parser.parse_args(argv)
    cfg = load_config(args.config_file or model_zoo.get_config_file("Base-WIDER.yaml"), args.opts)
    if args.num_images < 0:
        parser.error("--num-images must be at least 0")
    if not args.show:
        folder_for("--output-dir", args.output_dir)
    visualize = from_annotations if args.source == "annotation" else from_dataloader
    write(visualize(cfg, args.num_images), Path(args.output_dir), args.show)


def write(pictures, output_dir, show):
    """Saves (or shows) pictures as `<image>.jpg`; further ones of the same image as `<image>_2.jpg`, ..."""
    seen = collections.Counter()
    for name, picture in pictures:
        seen[name] += 1
        if show:
            picture.show(title=name)
            continue
        suffix = "" if seen[name] == 1 else f"_{seen[name]}"
        picture.save(output_dir / f"{name}{suffix}.jpg", quality=92)


def load_records(cfg):
    return [record for name in cfg.DATASETS.TRAIN for record in catalog.load_records(name, for_training=True)]


def from_annotations(cfg, num_images):
    """(name, picture) of the files, with the boxes as listed."""
    records = load_records(cfg)
    if num_images and num_images < len(records):
        records = [records[i] for i in np.linspace(0, len(records) - 1, num_images).round().astype(int)]
    for record in tqdm(records, desc="pictures", unit="image"):
        boxes, ignore, _ = faces_of(record)
        try:
            image = as_rgb(record["file_name"])
        except (FileNotFoundError, ValueError) as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        yield name_of(record), draw_annotations(image, boxes[~ignore], boxes[ignore])


def from_dataloader(cfg, num_images):
    """(name, picture) of what the training loop would get."""
    num_images = num_images or len(load_records(cfg))
    if cfg.SEED < 0:
        cfg.SEED = secrets.randbelow(2**31)  # other views with every start
    loader = Trainer.build_train_loader(cfg)
    with explained(), tqdm(total=num_images, desc="pictures", unit="image") as bar:
        for batch in loader:
            for view in batch:
                if bar.n == num_images:
                    return
                image = utils.convert_image_to_rgb(view["image"].permute(1, 2, 0).numpy(), cfg.INPUT.FORMAT)
                faces, ignore_boxes = view["instances"].gt_boxes.tensor.numpy(), view["ignore_boxes"].tensor.numpy()
                yield name_of(view), draw_annotations(Image.fromarray(image), faces, ignore_boxes)
                bar.update()


if __name__ == "__main__":
    main()
