"""sample_distribution.py: what detectors are trained on, from runs' metrics.json and from annotations alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_backbone
from PIL import Image

from gs_d2.config import add_gs_config
from gs_d2.data import FaceDatasetMapper, register_wider_face

ROOT = Path(__file__).resolve().parents[2]
FIG_2 = ["RPN", "FPN", "FPN-finest-stride", "FPN-finest", "FPN-finest-sampling"]


@pytest.fixture(scope="module")
def tool(load_script):
    return load_script("tools/sample_distribution.py")


def record(iteration):
    return json.dumps({"iteration": iteration, "total_loss": 1.0})


def group_record(iteration, factor=1.0):
    names = ("pos_matched", "neg_matched", "pos_sampled", "neg_sampled")
    values = {
        f"groups/{name}@{scale}": factor * (10 * i + k)
        for i, name in enumerate(names)
        for k, scale in enumerate((128, 16, 32))
    }
    return json.dumps({"iteration": iteration, "groups/loss_cls@16": 0.5} | values)


@pytest.fixture
def run_tool(tool, tmp_path, monkeypatch):
    def run_tool(metrics):
        path = tmp_path / "metrics.json"
        if metrics is not None:
            path.write_bytes(metrics.encode() if isinstance(metrics, str) else metrics)
        monkeypatch.setattr("sys.argv", ["sample_distribution.py", str(path), "--output", str(tmp_path / "out.png")])
        tool.main()
        return tmp_path / "out.png"

    return run_tool


def test_means_over_the_run(tool, tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("\n".join([group_record(0, 1.0), record(19), group_record(20, 3.0)]) + "\n")
    counts = tool.read_counts(path)
    assert counts["pos_matched"] == {16.0: 2.0, 32.0: 4.0, 128.0: 0.0}
    assert list(counts["neg_sampled"]) == [16.0, 32.0, 128.0], "by scale, not in the order of the file"
    assert counts["neg_sampled"] == {16.0: 62.0, 32.0: 64.0, 128.0: 60.0}
    assert counts["loss_cls"] == {16.0: 0.5}


def test_shares(tool):
    assert tool.shares({16.0: 3.0, 32.0: 1.0}) == {16.0: 0.75, 32.0: 0.25}
    assert tool.shares({16.0: 0.0, 32.0: 0.0}) == {16.0: 0.0, 32.0: 0.0}


def test_table_and_picture(run_tool, capsys):
    picture = run_tool(group_record(0) + "\n")
    with Image.open(picture) as image:
        assert image.size[0] > image.size[1] > 100
        assert len(image.convert("RGB").getcolors(10**6)) > 10
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].split() == ["anchors", "per", "image", "16", "32", "128"]
    assert lines[1].split() == ["positive,", "matched", "1.0", "2.0", "0.0"]
    assert lines[4].split() == ["negative,", "sampled", "31.0", "32.0", "30.0"]
    assert f"Written: {picture}" in printed


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, r"No such file or directory: '.*metrics\.json'"),
        ("", r"metrics\.json: no group statistics; is it the metrics\.json of a training run"),
        (record(0) + "\n", r"metrics\.json: no group statistics"),
        (group_record(0) + "\n" + group_record(20)[:40] + "\n", r"metrics\.json:2: not a record of metrics"),
        (group_record(0) + "\n[1, 2]\n", r"metrics\.json:2: not a record of metrics"),
        (b"\x80\x81\n", r"metrics\.json: not a text file"),
        (json.dumps({"groups/pos_sampled@16": 1.0}) + "\n", r"metrics\.json: no group statistics"),
        (json.dumps({"groups/pos_sampled@big": 1.0}) + "\n", r"metrics\.json:1: not a record of metrics"),
        (json.dumps({"groups/pos_sampled@16": None}) + "\n", r"metrics\.json:1: not a record of metrics"),
    ],
)
def test_what_it_cannot_use(run_tool, tmp_path, metrics, message):
    with pytest.raises(SystemExit, match=r"^sample_distribution: .*" + message):
        run_tool(metrics)
    assert not (tmp_path / "out.png").exists()


def test_several_runs_side_by_side(tool, tmp_path, capsys):
    paths = []
    for name, factor in (("fpn", 1.0), ("fpn_finest", 2.0)):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "metrics.json")
        paths[-1].write_text(group_record(0, factor) + "\n")
    tool.main([*map(str, paths), "--output", str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").exists()
    detectors = json.loads((tmp_path / "out.json").read_text())["detectors"]
    assert list(detectors) == ["fpn", "fpn_finest"]
    assert detectors["fpn_finest"]["pos_sampled"] == {"16.0": 42.0, "32.0": 44.0, "128.0": 40.0}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["percent", "of", "all", "samples", "16", "32", "128", "all"]
    # 20 + 21 + 22 positives and 30 + 31 + 32 negatives
    assert lines[1].split() == ["fpn", "positive", "13.46", "14.10", "12.82", "40.38"]
    assert lines[4].split() == ["fpn_finest", "negative", "19.87", "20.51", "19.23", "59.62"]


def test_shares_of_samples_are_of_both_labels_together(tool):
    counts = {"pos_sampled": {16.0: 1, 32.0: 0}, "neg_sampled": {16.0: 2, 32.0: 1}, "neg_matched": {16.0: 9, 32.0: 9}}
    assert tool.shares_of_samples(counts) == {
        "pos_sampled": {16.0: 0.25, 32.0: 0.0},
        "neg_sampled": {16.0: 0.5, 32.0: 0.25},
    }


# From annotations


@pytest.fixture(scope="module")
def trained_anchors(tool):
    """The five detectors of Fig. 2 by name."""
    paths = [ROOT / f"configs/wider/{name}.yaml" for name in tool.FIG_2]
    return {tool.detector_name(path): tool.TrainedAnchors(path) for path in paths}


@pytest.fixture(scope="module")
def register():
    """Registers a data set for as long as this module's tests run."""
    names = []

    def register(name, list_file, image_root):
        register_wider_face(name, list_file, image_root)
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


@pytest.fixture(scope="module")
def drawn(register, drawn_datasets):
    base = drawn_datasets / "widerface"
    lists = base / "wider_face_split"
    return register("sample_distribution_drawn", lists / "wider_face_train_bbx_gt.txt", base / "WIDER_train" / "images")


@pytest.fixture(scope="module")
def real(tool, register, shared_data):
    """Counts on a subset of WIDER FACE's real training annotations; its images are not there."""
    list_file = shared_data / "wider_face" / "wider_face_split" / "wider_face_train_bbx_gt.txt"
    name = register("sample_distribution_real", list_file, "no images")
    return tool.count_annotations(dataset=name, num_images=200, seed=0)


def test_names(tool, trained_anchors):
    assert list(trained_anchors) == FIG_2
    assert tool.detector_name(Path("x/fpn_finest_dc_wrs.yaml")) == "FPN-finest-DC-WRS"


@pytest.mark.parametrize("name", FIG_2)
@pytest.mark.parametrize("size", [(64, 64), (1, 33), (97, 130), (257, 191)])
def test_feature_maps_are_as_large_as_the_nets(trained_anchors, tool, name, size):
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file(str(ROOT / f"configs/wider/{tool.FIG_2[FIG_2.index(name)]}.yaml"))
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
def test_as_many_are_drawn_as_the_config_says(trained_anchors, name, faces):
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


def test_fig_2_on_real_annotations(tool, real):
    assert list(real["detectors"]) == FIG_2
    assert real["images"] == 200 and real["image_sizes"]["assumed"] == 200
    positive, negative = {}, {}
    for name, counts in real["detectors"].items():
        assert list(counts) == list(tool.TITLES) and list(counts["pos_sampled"]) == [16.0, 32.0, 64.0, 128.0]
        shares = tool.shares_of_samples(counts)
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


def test_command_counts_annotations(tool, drawn, tmp_path, capsys):
    outputs = [tmp_path / "a" / "fig2.png", tmp_path / "b.png", tmp_path / "c.png"]
    for output, seed in zip(outputs, "001", strict=True):
        tool.main(["--dataset", drawn, "--images", "4", "--seed", seed, "--output", str(output)])
    printed = capsys.readouterr().out
    figures = [json.loads(output.with_suffix(".json").read_text()) for output in outputs]
    assert figures[0] == figures[1] != figures[2]
    assert figures[0]["image_sizes"]["read"] == 4 == figures[0]["images"]
    assert list(figures[0]["detectors"]) == FIG_2
    with Image.open(outputs[0]) as image:
        assert image.size[0] > image.size[1] > 100
    assert printed.count("FPN-finest-sampling  positive") == 3
    assert "image sizes: 4 read from the files" in printed


def test_one_config(tool, drawn):
    (path,) = (ROOT / "configs/wider").glob("fpn_finest_sampling.yaml")
    counts = tool.count_annotations([path], drawn)
    assert counts["images"] == 6 and list(counts["detectors"]) == ["FPN-finest-sampling"]


def test_a_configs_views_around_a_face_are_counted(tool, drawn, tmp_path):
    text = f"_BASE_: {ROOT / 'configs/wider/fpn_finest_sampling.yaml'}\nINPUT: {{GS: "
    for name, keys in (("plain", "{}"), ("jitter", "{COLOR_JITTER: 0.4}"), ("crops", "{FACE_CROP_PROB: 1.0}")):
        (tmp_path / f"{name}.yaml").write_text(f"{text}{keys}}}\n")
    paths = [tmp_path / f"{name}.yaml" for name in ("plain", "jitter", "crops")]
    plain, jitter, crops = tool.count_annotations(paths, drawn)["detectors"].values()
    assert plain == jitter != crops, "colours have no part in it"


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_boxes_of_a_blank_image_are_those_of_the_real_one(tool, drawn, prob):
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.INPUT.GS.FACE_CROP_PROB = prob
    mapper = FaceDatasetMapper(cfg, is_train=True)
    for i, record in enumerate(DatasetCatalog.get(drawn)):
        np.random.seed(i)
        expected = mapper(record)
        np.random.seed(i)
        view, faces, ignored = mapper.augment(np.zeros(tool.file_size(record["file_name"]), np.uint8), record)
        assert view.shape == tuple(expected["image"].shape[1:])
        np.testing.assert_array_equal(faces, expected["instances"].gt_boxes.tensor)
        np.testing.assert_array_equal(ignored, expected["ignore_boxes"].tensor)


def test_file_sizes(tool, tmp_path):
    image = Image.new("L", (40, 30))
    image.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter when it is read
    image.save(tmp_path / "b.jpg", exif=exif)
    assert tool.file_size(tmp_path / "a.png") == (30, 40)
    assert tool.file_size(tmp_path / "b.jpg") == (40, 30)
    assert tool.file_size(tmp_path / "c.jpg") is None
    assert tool.assumed_size(NOTHING) == (768, 1024)
    assert tool.assumed_size(np.array([[0, 0, 10, 767.5], [0, 0, 10, 20]])) == (768, 1024)
    assert tool.assumed_size(np.array([[0, 0, 10, 1000.5], [0, 0, 10, 20]])) == (1001, 1024)


def test_what_cannot_be_counted(tool, drawn, tmp_path, register):
    def message(*arguments):
        with pytest.raises(SystemExit) as error:
            tool.main([*map(str, arguments), "--output", str(tmp_path / "out.png")])
        assert not (tmp_path / "out.png").exists()
        return error.value.code

    quick = ROOT / "configs" / "quick" / "demo.yaml"
    assert "demo.yaml: what is drawn by loss cannot be known without a net" in message("--config-file", quick)
    assert "no_such_set" in message("--dataset", "no_such_set")
    assert "none.yaml" in message("--config-file", tmp_path / "none.yaml")
    base = ROOT / "configs/wider/rpn.yaml"
    assert "same name" in message("--config-file", base, base)
    (tmp_path / "list.txt").write_text("0--Parade/a.jpg\n")
    name = register("sample_distribution_no_faces", tmp_path / "list.txt", "no images")
    assert f"{name} has no annotated faces" in message("--dataset", name)
    for wrong in (["metrics.json", "--dataset", drawn], ["--images", "0"], ["--seed", "-1"]):
        assert message(*wrong) == 2
