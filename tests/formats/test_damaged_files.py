"""Files of every kind with bytes taken out, put in and changed: read, or refused in one line that names the file."""

import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from gs_d2.analysis.samples import read_counts
from gs_d2.config import load_config
from gs_d2.conversion.darknet import read as read_darknet
from gs_d2.evaluation.curves import load_curves, save_curves
from gs_d2.evaluation.precision_recall import PrecisionRecallCurve
from gs_d2.formats import face_eval
from gs_d2.formats.coco import read_coco
from gs_d2.formats.images import as_rgb
from gs_d2.formats.wider_face import LABELS, WiderGroundTruth, add_labels, read_list
from gs_d2.formats.wider_predictions import read_wider_predictions
from gs_d2.weights import read_weights


def cells(*values):
    array = np.empty((len(values), 1), dtype=object)
    for i, value in enumerate(values):
        array[i, 0] = value
    return array


def write_mat(path, **variables):
    with open(path, "wb") as file:  # uncompressed, so that the damage is of what is read
        savemat(file, variables, do_compression=False)


def write_wider_mat(path):
    boxes = np.array([[1, 2, 30, 40], [5, 6, 7, 8]], dtype=np.float64)
    labels = {f"{label}_label_list": cells(cells(np.zeros((2, 1), dtype=np.uint8))) for label in LABELS}
    files = {"event_list": cells("0--P"), "file_list": cells(cells("a")), "face_bbx_list": cells(cells(boxes))}
    write_mat(path, **files, **labels)


def write_face_eval_mat(path):
    image = np.zeros((1, 1), dtype=[("imgname", object), ("objects", object)])
    image[0, 0] = ("a.jpg", np.array([[1.0, 2, 50, 60, 0, 0]]))
    write_mat(path, Annotations=image)


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/0--P/a.txt", "a\n2\n1 2 3 4 0.5\n5 6 7 8 0.25\n")
        archive.writestr("x/0--P/b.txt", "b\n0\n", compress_type=zipfile.ZIP_DEFLATED)


def write_coco(path):
    image = {"id": 3, "file_name": "a.jpg", "height": 96, "width": 128}
    box = {"id": 1, "image_id": 3, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 9, "name": "face"}]}
    path.write_text(json.dumps(content))


def write_metrics(path):
    names = [f"groups/{sign}_{stage}" for sign in ("pos", "neg") for stage in ("matched", "sampled")]
    record = {f"{name}@{scale}": 3.5 for name in names for scale in (16, 32)}
    path.write_text(f"{json.dumps(record)}\n{json.dumps(record)}\n")


def write_curves(path):
    save_curves({"all": PrecisionRecallCurve(np.linspace(0, 1, 5), np.linspace(1, 0, 5))}, path)


def write_picture(path):
    image = Image.fromarray(np.arange(24 * 16 * 3, dtype=np.uint8).reshape(16, 24, 3))
    image.save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")


def read_labels(path):
    images = read_list(path.with_name("list.txt"))
    add_labels(images, path)
    return images[0].labels["blur"]


# The file's name -> what writes a whole one, and what reads it.
FILES = {
    "wider_face_val.mat": (write_wider_mat, lambda path: WiderGroundTruth.from_mat_files(path.parent).boxes),
    "wider_face_train.mat": (write_wider_mat, read_labels),
    "new_annotations_AFW.mat": (
        write_face_eval_mat,
        lambda path: np.concatenate([*face_eval.read_annotations(path, "afw").boxes.values(), np.zeros((0, 4))]),
    ),
    "predictions.zip": (
        write_zip,
        lambda path: np.concatenate([*read_wider_predictions(path, ["0--P/a", "0--P/b"]).detections.values()]),
    ),
    "annotations.json": (write_coco, lambda path: np.array([x["bbox"] for x in read_coco(path).annotations or ()])),
    "metrics.json": (
        write_metrics,
        lambda path: np.array([value for by_scale in read_counts(path).values() for value in by_scale.values()]),
    ),
    "curves.npz": (write_curves, lambda path: load_curves(path)["all"].recall),
    "config.yaml": (
        lambda path: path.write_text("MODEL:\n  GS:\n    SAMPLER: random\nSEED: 3\nINPUT: {FORMAT: RGB}\n"),
        lambda path: load_config(path).SEED,
    ),
    "weights.pth": (
        lambda path: torch.save({"model": {"a": torch.ones(3), "b": torch.zeros(2, 2)}}, path),
        lambda path: len(read_weights(path)["model"]),
    ),
    "weights.safetensors": (
        lambda path: pytest.importorskip("safetensors.torch").save_file({"a": torch.ones(3)}, path),
        lambda path: len(read_weights(path)["model"]),
    ),
    "yolo.weights": (
        lambda path: path.write_bytes(np.array([0, 2, 0, 0, 0, 0, 0], dtype="<i4").tobytes()),
        lambda path: read_darknet(path).nbytes,
    ),
    **{
        f"picture{ending}": (write_picture, lambda path: np.asarray(as_rgb(path)))
        for ending in (".jpg", ".png", ".webp", ".tif")
    },
    **{
        f"picture{ending}": (
            lambda path: Image.new("RGB", (9, 7), (1, 2, 3)).save(path),
            lambda path: np.asarray(as_rgb(path)),
        )
        for ending in (".gif", ".bmp", ".ppm", ".tga", ".jp2", ".ico", ".pcx")
    },
}
BITS = [b"", b"\0", b"\xff", b"\xff\xff\xff\x7f", b"\n", b"-", b"NaN", b"1e999", b"[", b"{", b'"', b"0" * 9, b"9" * 25]
CHANGE = st.tuples(st.floats(0, 1), st.integers(0, 6), st.binary(max_size=4) | st.sampled_from(BITS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(folder):
    """By name the bytes of a whole file of each kind."""
    contents = {}
    for name, (write, _) in FILES.items():
        write(folder / name)
        contents[name] = (folder / name).read_bytes()
        (folder / name).unlink()
    (folder / "list.txt").write_text("0--P/a.jpg\n2\n1 2 30 40\n5 6 7 8\n")
    return contents


@pytest.mark.parametrize("name", FILES)
def test_whole_files_are_read(name, whole, folder):
    (folder / name).write_bytes(whole[name])
    try:
        assert np.size(FILES[name][1](folder / name)) > 0
    finally:
        (folder / name).unlink()


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged pictures that can be read
@pytest.mark.parametrize("name", FILES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(changes=st.lists(CHANGE, min_size=1, max_size=4), end=st.just(1.0) | st.floats(0, 1))
def test_damaged_files_are_read_or_named(name, whole, folder, changes, end):
    content = bytearray(whole[name])
    for place, removed, put_in in changes:
        at = int(place * len(content))
        content[at : at + removed] = put_in
    path = folder / name
    path.write_bytes(content[: int(end * len(content))])
    try:
        found = FILES[name][1](path)
    except (KeyError, IndexError) as error:  # of this test, which asks for a name that is another now
        assert str(error) in ("'all'", "list index out of range"), error
    except ValueError as error:
        said = str(error)
        assert str(path) in said or str(path.parent) in said, said
        assert name == "config.yaml" or "\n" not in said, said
    except FileNotFoundError as error:
        assert str(path) in str(error)
    else:
        if isinstance(found, np.ndarray) and found.dtype.kind == "f":
            assert np.isfinite(found).all(), found
    finally:
        path.unlink()
