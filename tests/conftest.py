"""What tests of several folders share."""

import contextlib
import json
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from scipy.io import savemat

from gs_d2.data.generated_faces import synthesize

ROOT = Path(__file__).resolve().parent.parent

# A busy machine is slow at times; and `pytest --hypothesis-profile fuzz` is for hours (CONTRIBUTING.md).
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fuzz", settings.get_profile("suite"), max_examples=4_000)
settings.load_profile("suite")
_SHARED_DATA = Path(os.environ.get("GS_D2_SHARED_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Runs a test on the CPU and, where there is one, on the GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return request.param


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Research data that is no part of the project: ../shared/data, or the folder that GS_D2_SHARED_DATA names."""
    if not _SHARED_DATA.is_dir():
        pytest.skip(f"the research data is not at {_SHARED_DATA}; GS_D2_SHARED_DATA can name another folder")
    return _SHARED_DATA


@pytest.fixture
def refused(capsys):
    """A context in which a script ends as on bad input: exit code 2, and a message (regular expression) on stderr."""

    @contextlib.contextmanager
    def refused(message: str):
        with pytest.raises(SystemExit) as end:
            yield
        assert end.value.code == 2
        assert re.search(f"error: .*{message}", capsys.readouterr().err, re.DOTALL)

    return refused


@pytest.fixture
def run_command(capsys):
    """Calls a script's `main` with arguments, as a shell would: returns the exit code, stdout and stderr."""

    def run_command(main, *arguments) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in arguments]) or 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run_command


@pytest.fixture(scope="session")
def drawn_datasets(tmp_path_factory) -> Path:
    """A DETECTRON2_DATASETS folder with six training and four validation images of 128 x 96 generated faces."""
    root = tmp_path_factory.mktemp("datasets")
    synthesize(root, {"train": 6, "val": 4}, (128, 96), seed=0)
    return root


@pytest.fixture(scope="module")
def register():
    """Registers a data set in WIDER FACE's layout for as long as a module's tests run."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from gs_d2.data import register_wider_face

    names = []

    def register(name, list_file, image_root) -> str:
        register_wider_face(name, list_file, image_root)
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


@pytest.fixture(scope="module")
def generated_train(register, drawn_datasets) -> str:
    """Name of the training set of `drawn_datasets`."""
    base = drawn_datasets / "widerface"
    lists = base / "wider_face_split"
    return register("generated_train", lists / "wider_face_train_bbx_gt.txt", base / "WIDER_train" / "images")


def write_face_eval_annotations(path, objects_of):
    """face-eval's .mat: image file name -> rows (x1, y1, x2, y2, a flag that nothing reads, ignore)."""
    records = np.zeros((len(objects_of), 1), dtype=[("imgname", "O"), ("objects", "O")])
    for i, (name, objects) in enumerate(objects_of.items()):
        records[i, 0] = (name, np.asarray(objects, dtype=np.int16).reshape(-1, 6))
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"Annotations": records})


@pytest.fixture(scope="session")
def made_up_benchmarks(tmp_path_factory) -> Path:
    """A DETECTRON2_DATASETS folder with fddb (two folds, five images), afw and pascal_face (four images each)."""
    root, rng = tmp_path_factory.mktemp("benchmarks"), np.random.default_rng(0)

    def draw(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)

    for fold, images in (("01", ["2002/07/19/big/img_1", "2002/07/20/big/img_1", "2003/1/big/img_2"]), ("02", "ab")):
        lines = []
        for image in images:
            draw(root / f"fddb/originalPics/{image}.jpg", rng.integers(60, 130, 2))
            low, high = [14, 8, -2, 20, 20], [30, 14, 2, 90, 90]  # some reach beyond the image, as in FDDB
            faces = rng.uniform(low, high, (3, 5))
            lines += [image, "3", *(" ".join(f"{value:.6f}" for value in face) + "  1" for face in faces)]
        path = root / f"fddb/FDDB-folds/FDDB-fold-{fold}-ellipseList.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        path.with_name(f"FDDB-fold-{fold}.txt").write_text("\n".join(images) + "\n")
    for benchmark, folder, mat in (
        ("afw", "testimages", "new_annotations_AFW"),
        ("pascal_face", "images", "Annotations_Face_PASCALLayout_large_fixed"),
    ):
        objects_of = {}
        for i in range(4):
            draw(root / benchmark / folder / f"{i}_{benchmark}.jpg", (128, 96))
            corners = rng.integers(0, 60, (3, 2))
            boxes = np.concatenate([corners, corners + rng.integers(25, 60, (3, 2))], axis=1)
            ignored = rng.random((3, 1)) < 0.2
            objects_of[f"{i}_{benchmark}.jpg"] = np.concatenate([boxes, 0 * ignored, ignored], axis=1) if i < 3 else []
        write_face_eval_annotations(root / benchmark / "annotations" / f"{mat}.mat", objects_of)
    return root


@pytest.fixture(scope="session")
def coco_toy(tmp_path_factory):
    """Two data sets in COCO's format, coco_toy_train and coco_toy_val: drawn rectangles of three classes (category ids
    2, 5 and 9), a crowd, and an image without any object."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    root, rng, names = tmp_path_factory.mktemp("coco_toy"), np.random.default_rng(0), []
    for split, count in (("train", 6), ("val", 5)):
        images, annotations = [], []
        for i in range(1, count + 1):
            canvas = rng.integers(0, 60, (120, 160, 3), dtype=np.uint8)
            for j in range(0 if i == count else 3):
                x, y = (int(rng.integers(0, limit)) for limit in (90, 60))
                w, h = (int(side) for side in rng.integers(12, 60, 2))
                category = (2, 5, 9)[j]
                canvas[y : y + h, x : x + w, j] = 255
                crowd = int(i == 1 and j == 2)
                rle = {"counts": [120 * 160], "size": [120, 160]}
                polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i,
                        "category_id": category,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": crowd,
                        "segmentation": rle if crowd else polygon,
                    }
                )
            file_name = f"{split}_{i}.png"
            Image.fromarray(canvas).save(root / file_name)
            images.append({"id": i, "file_name": file_name, "height": 120, "width": 160})
        categories = [{"id": n, "name": f"class_{n}"} for n in (2, 5, 9)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps({**content, "info": {}, "licenses": []}))
        names.append(f"coco_toy_{split}")
        register_coco_instances(names[-1], {}, str(root / f"{split}.json"), str(root))
        MetadataCatalog.get(names[-1]).evaluator_type = "coco"
    yield root
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(autouse=True)
def handlers_end_with_the_test():
    """Detectron2's handlers write to the streams of the test that set them up, which are closed afterwards."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "gs_d2", "d2")]
    before = [list(logger.handlers) for logger in loggers]
    yield
    for logger, handlers in zip(loggers, before, strict=True):
        for handler in logger.handlers:
            if handler not in handlers:
                handler.close()
        logger.handlers[:] = handlers
