"""Views of annotated images without pixels, and a config's anchors on them."""

from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from PIL import Image

from gs_d2.analysis import views
from gs_d2.config import add_gs_config
from gs_d2.data import FaceDatasetMapper

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NOTHING = np.zeros((0, 4), np.float32)


def test_anchors_are_those_of_the_config_and_its_overrides():
    """100 x 90 is padded to 128 x 96: 32 x 24 cells of four scales, or of two."""
    opts = ["MODEL.ANCHOR_GENERATOR.SIZES", [[8, 24]], "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[4.0]]]
    for overrides, num_scales, first in (([], 4, [-6, -6, 10, 10]), (opts, 2, [0, -6, 4, 10])):
        anchors = views.ViewAnchors(CONFIGS / "wider_gs.yaml", overrides).anchors((100, 90))
        assert tuple(anchors.shape) == (32 * 24 * num_scales, 4) and anchors[0].tolist() == first


@pytest.mark.parametrize(
    ("config", "name"), [("coco/retinanet", "GroupSamplingRetinaNet"), ("pipelines/centernet", "CenterNet")]
)
def test_detectors_without_our_rpn(config, name):
    with pytest.raises(ValueError, match=rf"{config}\.yaml: only detectors with a GroupSamplingRPN .*, not {name}"):
        views.ViewAnchors(CONFIGS / f"{config}.yaml")
    with pytest.raises(ValueError, match="only detectors with a GroupSamplingRPN"):
        views.ViewAnchors(CONFIGS / "wider_gs.yaml", ["MODEL.PROPOSAL_GENERATOR.NAME", "RPN"])


def test_a_subset_is_random_and_repeatable(generated_train):
    records, all_idxs = views.annotated_records(generated_train, None, 0)
    assert len(records) == 6 and all_idxs == views.annotated_records(generated_train, 99, 0)[1] == list(range(6))
    subsets = [views.annotated_records(generated_train, 3, seed)[1] for seed in (0, 0, 1, 2, 3)]
    assert subsets[0] == subsets[1] == sorted(subsets[0]) and len(set(map(tuple, subsets))) > 1
    blank, was_read = views.blank_image(records[0])
    assert blank.shape == (96, 128) and was_read and not blank.any()
    assert views.blank_image({**records[0], "file_name": "nothing.jpg"})[0].shape == (768, 1024)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_boxes_of_a_blank_image_are_those_of_the_real_one(generated_train, prob):
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.INPUT.GS.FACE_CROP_PROB = prob
    mapper = FaceDatasetMapper(cfg, is_train=True)
    for i, record in enumerate(DatasetCatalog.get(generated_train)):
        np.random.seed(i)
        expected = mapper(record)
        np.random.seed(i)
        view, faces, ignored = mapper.augment(np.zeros(views.file_size(record["file_name"]), np.uint8), record)
        assert view.shape == tuple(expected["image"].shape[1:])
        np.testing.assert_array_equal(faces, expected["instances"].gt_boxes.tensor)
        np.testing.assert_array_equal(ignored, expected["ignore_boxes"].tensor)


def test_file_sizes(tmp_path):
    image = Image.new("L", (40, 30))
    image.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter when it is read
    image.save(tmp_path / "b.jpg", exif=exif)
    assert views.file_size(tmp_path / "a.png") == (30, 40)
    assert views.file_size(tmp_path / "b.jpg") == (40, 30)
    assert views.file_size(tmp_path / "c.jpg") is None
    assert views.assumed_size(NOTHING) == (768, 1024)
    assert views.assumed_size(np.array([[0, 0, 10, 767.5], [0, 0, 10, 20]])) == (768, 1024)
    assert views.assumed_size(np.array([[0, 0, 10, 1000.5], [0, 0, 10, 20]])) == (1001, 1024)
