"""What detectors are trained on: means over runs' metrics.json, and counts from annotations alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone

from gs_d2.analysis import samples
from gs_d2.config import add_gs_config

ROOT = Path(__file__).resolve().parents[2]
FIG_2 = ["RPN", "FPN", "FPN-finest-stride", "FPN-finest", "FPN-finest-sampling"]


def test_means_over_the_run(tmp_path):
    values = {f"groups/{name}@{scale}": i + scale for i, name in enumerate(samples.TITLES) for scale in (128, 16)}
    thrice = {key: 3 * value for key, value in values.items()}
    records = [{"groups/loss_cls@16": 0.5} | values, {"iteration": 19, "total_loss": 1.0}, thrice]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, records)) + "\n")
    counts = samples.read_counts(tmp_path / "metrics.json")
    assert counts["pos_matched"] == {16.0: 32.0, 128.0: 256.0}
    assert list(counts["neg_sampled"].items()) == [(16.0, 38.0), (128.0, 262.0)], "by scale, not as in the file"
    assert counts.keys() == samples.TITLES.keys()


def test_shares():
    assert samples.shares({16.0: 3.0, 32.0: 1.0}) == {16.0: 0.75, 32.0: 0.25}
    assert samples.shares({16.0: 0.0, 32.0: 0.0}) == {16.0: 0.0, 32.0: 0.0}


def test_shares_of_samples_are_of_both_labels_together():
    counts = {"pos_sampled": {16.0: 1, 32.0: 0}, "neg_sampled": {16.0: 2, 32.0: 1}, "neg_matched": {16.0: 9, 32.0: 9}}
    assert samples.shares_of_samples(counts) == {
        "pos_sampled": {16.0: 0.25, 32.0: 0.0},
        "neg_sampled": {16.0: 0.5, 32.0: 0.25},
    }


# From annotations


@pytest.fixture(scope="module")
def trained_anchors():
    """The five detectors of Fig. 2 by name."""
    paths = [ROOT / f"configs/wider/{name}.yaml" for name in samples.FIG_2]
    return {samples.detector_name(path): samples.TrainedAnchors(path) for path in paths}


@pytest.fixture(scope="module")
def real(register, shared_data):
    """Counts on a subset of WIDER FACE's real training annotations; its images are not there."""
    list_file = shared_data / "wider_face" / "wider_face_split" / "wider_face_train_bbx_gt.txt"
    name = register("sample_distribution_real", list_file, "no images")
    return samples.count_annotations(dataset=name, num_images=200, seed=0)


def test_names(trained_anchors):
    assert list(trained_anchors) == FIG_2
    assert samples.detector_name(Path("x/fpn_finest_dc_wrs.yaml")) == "FPN-finest-DC-WRS"


@pytest.mark.parametrize("name", FIG_2)
@pytest.mark.parametrize("size", [(64, 64), (1, 33), (97, 130), (257, 191)])
def test_feature_maps_are_as_large_as_the_nets(trained_anchors, name, size):
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file(str(ROOT / f"configs/wider/{samples.FIG_2[FIG_2.index(name)]}.yaml"))
    with torch.device("meta"):
        backbone = build_backbone(cfg)
        step = max(backbone.size_divisibility, 1)
        features = backbone(torch.zeros(1, 3, *(-(-side // step) * step for side in size)))
    expected = [tuple(features[name].shape[-2:]) for name in cfg.MODEL.RPN.IN_FEATURES]
    assert trained_anchors[name].map_sizes(size) == expected


def crowd(side, step=136):
    """Faces of a side in a grid over 1200 x 1200."""
    corners = np.stack(np.meshgrid(*[np.arange(4, 1200 - side, step)] * 2), axis=-1).reshape(-1, 2)
    return np.concatenate([corners, corners + side], axis=1).astype(np.float32)


NOTHING = np.zeros((0, 4), np.float32)


@pytest.mark.parametrize("name", FIG_2)
@pytest.mark.parametrize("faces", [crowd(128), crowd(16, 20), NOTHING], ids=["large", "small", "none"])
def test_as_many_are_sampled_as_the_config_says(trained_anchors, name, faces):
    counts = trained_anchors[name].count((1200, 1200), faces, NOTHING, seed=0)
    matched = np.stack([counts["pos_matched"], counts["neg_matched"]])
    sampled = np.stack([counts["pos_sampled"], counts["neg_sampled"]])
    assert matched.shape == (2, 4) and (sampled <= matched).all()
    if name != "FPN-finest-sampling":
        matched, sampled = matched.sum(axis=1, keepdims=True), sampled.sum(axis=1, keepdims=True)
    positives = np.minimum(matched[0], 512)
    np.testing.assert_array_equal(sampled[0], positives)
    np.testing.assert_array_equal(sampled[1], np.minimum(matched[1], 2048 - positives))
    if name == "FPN-finest-sampling":
        np.testing.assert_array_equal(sampled.sum(axis=0), 2048)
        if len(faces):  # positives suffice at the faces' scale
            group = 3 if faces[0, 2] - faces[0, 0] > 100 else 0
            assert sampled[:, group].tolist() == [512, 1536]


def test_ignored_regions_and_seed(trained_anchors):
    detector = trained_anchors["FPN-finest"]
    whole = np.array([[-99, -99, 355, 355]], np.float32)  # anchors that cross the border included
    assert not any(values.any() for values in detector.count((256, 256), NOTHING, whole, 0).values())
    draws = [detector.count((256, 256), crowd(16, 20)[:40], NOTHING, seed) for seed in (0, 0, 1)]
    for label in draws[0]:
        np.testing.assert_array_equal(draws[0][label], draws[1][label])
    assert (draws[0]["neg_sampled"] != draws[2]["neg_sampled"]).any()


def test_no_anchor_on_padding_is_counted_as_a_negative(trained_anchors):
    """As in training, where an image is padded to the network's stride: 100 x 90 to 128 x 96."""
    counts = trained_anchors["FPN-finest"].count((100, 90), NOTHING, NOTHING, 0)
    assert trained_anchors["FPN-finest"].map_sizes((100, 90)) == [(32, 24)]
    np.testing.assert_array_equal(counts["neg_matched"], 25 * 22)


def total(counts, label):
    return np.array(list(counts[label].values()))


def test_fig_2_on_real_annotations(real):
    assert list(real["detectors"]) == FIG_2
    assert real["images"] == 200 and real["image_sizes"]["assumed"] == 200
    positive, negative = {}, {}
    for name, counts in real["detectors"].items():
        assert list(counts) == list(samples.TITLES) and list(counts["pos_sampled"]) == [16.0, 32.0, 64.0, 128.0]
        shares = samples.shares_of_samples(counts)
        positive[name], negative[name] = (np.array(list(by_scale.values())) for by_scale in shares.values())
        assert positive[name].sum() + negative[name].sum() == pytest.approx(1)

    # One stride for all scales: as many anchors of each, and large faces match more of them.
    for name in ("RPN", "FPN-finest"):
        assert positive[name][3] > 1.5 * positive[name][0]
        assert negative[name].max() < 1.05 * negative[name].min()
    assert (np.diff(positive["FPN-finest"]) > 0).all()
    # A stride for each scale: four times the anchors of the next scale, and small ones prevail among both labels.
    for name in ("FPN", "FPN-finest-stride"):
        np.testing.assert_allclose(negative[name], np.array([64, 16, 4, 1]) / 85, rtol=0.05)
        assert (np.diff(positive[name]) < 0).all()
    # Group sampling: N of each scale, whatever matched.
    sampled = real["detectors"]["FPN-finest-sampling"]
    of_scale = total(sampled, "pos_sampled") + total(sampled, "neg_sampled")
    assert (of_scale <= 200 * 2048).all() and (of_scale > 0.99 * 200 * 2048).all()
    np.testing.assert_allclose(positive["FPN-finest-sampling"] + negative["FPN-finest-sampling"], 0.25, rtol=0.01)


def test_detectors_with_the_same_anchors_see_the_same_views(real):
    detectors = real["detectors"]
    for one, other in (("FPN", "FPN-finest-stride"), ("FPN-finest", "FPN-finest-sampling")):
        for label in ("pos_matched", "neg_matched"):
            assert detectors[one][label] == detectors[other][label]


def test_one_config(generated_train):
    (path,) = (ROOT / "configs/wider").glob("fpn_finest_sampling.yaml")
    counts = samples.count_annotations([path], generated_train)
    assert counts["images"] == 6 and list(counts["detectors"]) == ["FPN-finest-sampling"]


def test_a_configs_views_around_a_face_are_counted(generated_train, tmp_path):
    text = f"_BASE_: {ROOT / 'configs/wider/fpn_finest_sampling.yaml'}\nINPUT: {{GS: "
    for name, keys in (("plain", "{}"), ("jitter", "{COLOR_JITTER: 0.4}"), ("crops", "{FACE_CROP_PROB: 1.0}")):
        (tmp_path / f"{name}.yaml").write_text(f"{text}{keys}}}\n")
    paths = [tmp_path / f"{name}.yaml" for name in ("plain", "jitter", "crops")]
    plain, jitter, crops = samples.count_annotations(paths, generated_train)["detectors"].values()
    assert plain == jitter != crops, "colours have no part in it"
