"""train_net.py on a data set of which one image in five is bad, each in another way."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/quick/demo.yaml"
OVERRIDES = """
    SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 24 SOLVER.STEPS (23,) SOLVER.CHECKPOINT_PERIOD 100 TEST.EVAL_PERIOD 0
    INPUT.GS.SCALES [1.0,0.5] INPUT.GS.MAX_CROP_SIZE 64 DATALOADER.NUM_WORKERS 2
    MODEL.RPN.BATCH_SIZE_PER_IMAGE 64 TEST.GS.SCORE_THRESH 0.3 DATASETS.GS.MAX_MISSING 0.2
""".split()
TURNED = Image.Exif()
TURNED[0x0112] = 6  # the orientation
FACE = "20 20 30 30 0 0 0 0 0 0"


def blank():
    return Image.new("RGB", (128, 96), (90, 120, 60))


def truncated(path):
    Image.effect_noise((128, 96), 50).save(path)
    path.write_bytes(path.read_bytes()[:-500])


# Images that cannot be used: name -> what makes the file.
BAD_IMAGES = {
    "truncated": truncated,
    "zero_bytes": lambda path: path.write_bytes(b""),
    "no_image": lambda path: path.write_text("no image"),
    "folder": lambda path: path.mkdir(),
    "missing": lambda path: None,
}
# Images that look bad and are used.
ODD_IMAGES = {
    "cmyk": lambda path: blank().convert("CMYK").save(path),
    "grey": lambda path: blank().convert("L").save(path),
    "palette": lambda path: blank().quantize().save(path, format="PNG"),
    "alpha": lambda path: blank().convert("RGBA").save(path, format="PNG"),
    "deep": lambda path: Image.fromarray(np.full((96, 128), 40_000, np.uint16)).save(path, format="PNG"),
    "turned": lambda path: blank().save(path, exif=TURNED),
    "one_pixel": lambda path: blank().resize((1, 1)).save(path),
    "long": lambda path: blank().resize((20_000, 30)).save(path),
}
# Boxes: name -> rows of the list.
ODD_BOXES = {
    "beyond": ["300 20 30 30 0 0 0 0 0 0", FACE],
    "negative_place": ["-60 -60 30 30 0 0 0 0 0 0", FACE],
    "huge": ["-90000 -90000 180000 180000 0 0 0 0 0 0", FACE],
    "zero": ["20 20 0 0 0 0 0 0 0 0", FACE],
    "negative": ["20 20 -9 30 0 0 0 0 0 0", FACE],
    "crowd": [f"{i % 120} {i % 88} {9 + i % 7} {9 + i % 5} 0 0 0 0 0 0" for i in range(2000)],
}
REPORTED_BOXES = ("beyond", "huge", "negative_place", "one_pixel")


def write_split(base, split, images):
    """`images`: name -> (what makes the file, rows of the list)."""
    folder = base / f"WIDER_{split}" / "images" / "e"
    folder.mkdir(parents=True)
    lines = []
    for name, (make, rows) in images.items():
        make(folder / f"{name}.jpg")
        lines += [f"e/{name}.jpg", str(len(rows)), *rows]
    (base / "wider_face_split").mkdir(exist_ok=True)
    (base / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    good = {f"good_{i}": (lambda path: blank().save(path), [FACE]) for i in range(6)}
    bad = {name: (make, [FACE]) for name, make in BAD_IMAGES.items()}
    odd = {name: (make, [FACE]) for name, make in ODD_IMAGES.items()}
    boxes = {name: (lambda path: blank().save(path), rows) for name, rows in ODD_BOXES.items()}
    write_split(root / "widerface", "train", good | bad | odd | boxes)
    short = {name: image for name, image in (odd | boxes).items() if name != "long"}
    write_split(root / "widerface", "val", short)
    return root


def train_net(datasets, output, *arguments):
    return subprocess.run(
        [sys.executable, "train_net.py", "--config-file", CONFIG, *arguments, "OUTPUT_DIR", str(output), *OVERRIDES],
        cwd=ROOT,
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def trained(datasets, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    result = train_net(datasets, output)
    assert result.returncode == 0, result.stderr[-3000:]
    return output


def test_training_ends_and_has_named_each_bad_image_once(trained):
    assert (trained / "model_final.pth").is_file()
    log = (trained / "log.txt").read_text()
    reports = [line for line in log.splitlines() if "Left out of training" in line]
    missing = {"folder", "missing"}  # said in one line, with the first
    for name in (*(BAD_IMAGES.keys() - missing), *REPORTED_BOXES):
        assert sum(f"/e/{name}.jpg" in line for line in reports) == 1, name
    assert len(reports) == len(BAD_IMAGES) - len(missing) + len(REPORTED_BOXES) + 1
    total = 6 + len(BAD_IMAGES) + len(ODD_IMAGES) + len(ODD_BOXES)
    (line,) = (line for line in reports if "images are missing" in line)
    assert f"2 of {total} images are missing, first " in line and "/e/folder.jpg" in line
    assert f"So far {len(BAD_IMAGES)} of {total} images cannot be trained on" in log
    losses = [json.loads(line).get("total_loss") for line in (trained / "metrics.json").read_text().splitlines()]
    assert losses and all(np.isfinite(loss) for loss in losses if loss is not None)


def test_every_test_image_is_evaluated(trained):
    folder = trained / "inference" / "wider_face_val"
    results = json.loads((folder / "results.json").read_text())
    names = sorted({*ODD_IMAGES, *ODD_BOXES} - {"long"})
    assert results["num_images"] == len(names) and results["num_missing"] == 0
    assert sorted(path.stem for path in (folder / "predictions").rglob("*.txt")) == names


def test_an_evaluation_with_a_bad_image_stops_by_name(trained, datasets, tmp_path):
    images = {"good": (lambda path: blank().save(path), [FACE]), "broken": (truncated, [FACE])}
    write_split(tmp_path / "widerface", "val", images)
    result = train_net(tmp_path, tmp_path / "out", "--eval-only", "MODEL.WEIGHTS", str(trained / "model_final.pth"))
    assert result.returncode != 0
    assert "WIDER_val/images/e/broken.jpg: cannot be read as an image (image file is truncated" in result.stderr
    assert not list((tmp_path / "out").rglob("results.json"))


def test_memory_of_a_crowd_is_bounded():
    """No matrix of anchors by faces: here that would be 176 MB for float32."""
    program = """
        import resource
        import torch
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model
        from detectron2.structures import Boxes, Instances
        from detectron2.utils.events import EventStorage
        import gs_d2.modeling
        from gs_d2.config import add_gs_config

        torch.manual_seed(0)
        cfg = get_cfg()
        add_gs_config(cfg)
        cfg.merge_from_file("configs/quick/demo.yaml")
        model = build_model(cfg).train()

        def step(num_faces):
            corners = torch.rand(num_faces, 2) * 480
            image = Instances((512, 512))
            image.gt_boxes = Boxes(torch.cat([corners, corners + 9 + 20 * torch.rand(num_faces, 2)], dim=1))
            image.gt_classes = torch.zeros(num_faces, dtype=torch.int64)
            batch = [{"image": torch.zeros(3, 512, 512, dtype=torch.uint8), "instances": image,
                      "ignore_boxes": Boxes(torch.zeros(0, 4)), "height": 512, "width": 512}]
            with EventStorage():
                losses = model(batch)
                sum(losses.values()).backward()
            assert all(torch.isfinite(loss) for loss in losses.values())
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        for _ in range(2):
            few = step(10)
        print("MB", step(2000) - few)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    growth = float(result.stdout.split("MB")[1])
    assert growth < 60, f"{growth} MB more for 2,000 faces than for 10"
