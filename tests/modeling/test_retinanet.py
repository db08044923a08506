"""GroupSamplingRetinaNet: Detectron2's focal loss where it should be, eq. 2, and N at 1:3 in every group."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

from gs_d2.config import add_gs_config
from gs_d2.data import load_wider_face
from gs_d2.inference import PyramidDetector
from gs_d2.modeling import DilatedRPNHead, GroupSampler, description_of
from gs_d2.modeling.rpn_heads import num_octaves
from gs_d2.ops import reference

K = 3
SMALL = f"""
    MODEL.WEIGHTS '' MODEL.DEVICE cpu MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64
    MODEL.FPN.OUT_CHANNELS 16 MODEL.RETINANET.NUM_CLASSES {K}
""".split()


def load(name, *opts):
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file(f"configs/coco/{name}.yaml")
    cfg.merge_from_list([*SMALL, *opts])
    return cfg


def build(name="retinanet_focal", *opts):
    cfg = load(name, *opts)
    torch.manual_seed(0)
    return build_model(cfg)


def feature_maps(size=128, num_images=2):
    return [torch.zeros(num_images, 16, size // stride, size // stride) for stride in (8, 16, 32, 64, 128)]


def predictions(anchors, num_images=2):
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(num_images, len(x), K, generator=generator) for x in anchors]
    deltas = [0.1 * torch.randn(num_images, len(x), 4, generator=generator) for x in anchors]
    return logits, deltas


def objects(*rows_of_images):
    """Instances from rows (x1, y1, x2, y2, class) of each image."""
    images = []
    for rows in rows_of_images:
        rows = torch.tensor(rows).reshape(-1, 5)
        images.append(Instances((128, 128), gt_boxes=Boxes(rows[:, :4]), gt_classes=rows[:, 4].long()))
    return images


OBJECTS = objects([[10.0, 10, 44, 40, 2], [60, 20, 120, 110, 0]], [[30.0, 50, 70, 90, 1]])


def detectron2(*opts):
    return build("retinanet_focal", "MODEL.META_ARCHITECTURE", "RetinaNet", *opts)


def detectron2_losses(arguments, num_positives):
    """Detectron2's own, its moving average standing at the batch's number of positives."""
    model = detectron2()
    model.loss_normalizer = max(num_positives, 1)
    with EventStorage():
        return model.losses(*arguments)


def detections(model, logits, deltas, size=(128, 128)):
    maps = feature_maps(num_images=len(logits[0]))
    candidates = model.decode(model.anchor_generator(maps), logits, deltas, [size] * len(logits[0]))
    return [model.select_detections(x) for x in candidates]


def detecting(*opts):
    """A detector of random weights whose detections are of several classes, at two scores above 0.3."""
    model = build("retinanet_focal", "MODEL.RETINANET.SCORE_THRESH_TEST", 0.3, *opts).eval()
    torch.manual_seed(1)
    for module in model.head.modules():
        if isinstance(module, torch.nn.Conv2d) and module is not model.head.bbox_pred:
            torch.nn.init.normal_(module.weight, std=0.1)
    torch.nn.init.constant_(model.head.cls_score.bias, -1.0)
    return model


def pictures(*sizes):
    generator = torch.Generator().manual_seed(2)
    return [{"image": torch.randint(0, 256, (3, *s), generator=generator, dtype=torch.uint8)} for s in sizes]


def assert_same(found, expected, **tolerance):
    """Detections may come in another order where their scores are nearly equal."""
    assert len(found) == len(expected) > 10 and len(found.pred_classes.unique()) > 1
    assert found.get_fields().keys() == expected.get_fields().keys()
    torch.testing.assert_close(found.scores, expected.scores, **tolerance)
    order = [(x.pred_boxes.tensor.double() @ torch.tensor([1.0, 1e3, 1e-3, 1e-6]).double()) for x in (found, expected)]
    order = [x.argsort(stable=True) for x in order]
    torch.testing.assert_close(found.pred_boxes.tensor[order[0]], expected.pred_boxes.tensor[order[1]], **tolerance)


def test_detections_are_detectron2s():
    """Where no score rounds to 1."""
    ours, theirs = detecting(), detectron2("MODEL.RETINANET.SCORE_THRESH_TEST", 0.3).eval()
    theirs.load_state_dict(ours.state_dict())  # by the same names
    inputs = pictures((128, 128), (128, 96))
    with torch.no_grad():
        results = zip(ours(inputs), theirs(inputs), strict=True)
    for found, expected in results:
        assert_same(found["instances"], expected["instances"], rtol=1e-4, atol=1e-4)


def test_channels_last_changes_nothing_but_the_memory_order():
    plain, ours = (detecting("MODEL.GS.CHANNELS_LAST", x) for x in (False, True))
    ours.load_state_dict(plain.state_dict())  # random numbers fill tensors in their memory order
    seen = []
    ours.head.register_forward_hook(lambda module, inputs, outputs: seen.append(inputs[0][0]))
    inputs = pictures((128, 128), (96, 128))
    with torch.no_grad():
        for found, expected in zip(ours(inputs), plain(inputs), strict=True):
            assert_same(found["instances"], expected["instances"], rtol=1e-3, atol=1e-3)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    assert ours.head.cls_score.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["retinanet_sampling_wrs", "retinanet_p3_dc_sampling"])
def test_autocast_computes_in_its_format_and_is_close(name):
    plain, ours = build(name), build(name, "MODEL.GS.AUTOCAST_DTYPE", "bfloat16")
    seen = []
    ours.head.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0][0].dtype))
    inputs = [{**x, "instances": y} for x, y in zip(pictures((128, 128), (128, 128)), OBJECTS, strict=True)]
    losses = []
    for model in (ours, plain):
        torch.manual_seed(0)
        with EventStorage():
            losses.append(model.train()(inputs))
    assert all(x.dtype == torch.float32 for x in losses[0].values())
    for key, expected in losses[1].items():
        assert losses[0][key].item() == pytest.approx(expected.item(), rel=0.05)
    sum(losses[0].values()).backward()
    assert all(torch.isfinite(x.grad).all() for x in ours.parameters() if x.grad is not None)
    predictions = []
    for model in (ours, plain):
        with torch.no_grad(), model.eval()._autocast():
            predictions.append(model.predict(model.preprocess_image(inputs)))
    for maps, expected in zip(predictions[0][1:], predictions[1][1:], strict=True):
        for found, wanted in zip(maps, expected, strict=True):
            assert found.dtype == torch.float32
            assert (found - wanted).abs().max() < 0.02 * max(1.0, wanted.abs().max())
    assert seen == [torch.bfloat16] * 2


def test_a_pyramid_of_factor_one_is_the_detector():
    """Also for boxes that cross the border: they are clipped after NMS, as Detectron2 does."""
    model, (image,) = detecting(), pictures((120, 100))
    pyramid = PyramidDetector(model=model, scales=[1.0])
    with torch.no_grad():
        (expected,), (candidates,) = (x["instances"] for x in model([image])), model.predict_candidates([image])
    assert (candidates.pred_boxes.tensor < 0).any()
    (found,) = (x["instances"] for x in pyramid([image]))
    assert found.get_fields().keys() == expected.get_fields().keys() and len(found) == len(expected) > 10
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.pred_classes, expected.pred_classes)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_levels_of_a_pyramid_are_merged_within_each_class():
    """By the same NMS over the candidates of both levels, mapped to the image."""
    model, (image,) = detecting("TEST.DETECTIONS_PER_IMAGE", 1000), pictures((128, 128))
    pyramid = PyramidDetector(model=model, scales=[0.5, 1.0])
    levels = []
    predict = model.predict_candidates
    model.predict_candidates = lambda inputs: levels.extend(predict(inputs)) or levels[-len(inputs) :]
    (found,) = (x["instances"] for x in pyramid([image]))
    assert [x.image_size for x in levels] == [(128, 128), (64, 64)]
    boxes = torch.cat([levels[0].pred_boxes.tensor, 2 * levels[1].pred_boxes.tensor])
    scores, classes = (torch.cat([x.get(name) for x in levels]) for name in ("scores", "pred_classes"))
    kept = []
    for i in scores.sort(descending=True, stable=True).indices.tolist():  # greedy, written out
        rivals = [j for j in kept if classes[j] == classes[i]]
        if not rivals or reference.box_iou(boxes[i : i + 1], boxes[rivals]).max() <= model.nms_thresh:
            kept.append(i)
    expected = Boxes(boxes[kept])
    expected.clip((128, 128))
    assert len(found) == len(kept) > 10 and len(set(classes[kept].tolist())) > 1
    torch.testing.assert_close(found.scores, scores[kept])
    assert torch.equal(found.pred_classes, classes[kept])
    torch.testing.assert_close(found.pred_boxes.tensor, expected.tensor, rtol=1e-4, atol=1e-3)


def test_tiles_of_an_image_are_cut_where_its_anchors_are():
    model = build("retinanet_focal")
    alignment, reach = model.tile_geometry
    assert alignment == 128, "the coarsest map's stride"
    assert reach >= 812.749 * math.sqrt(2) + 5 * 128, "an anchor's longest side, and what the head sees"
    cfg = load("retinanet_focal", "INPUT.MIN_SIZE_TEST", 0, "TEST.GS.SCALES", [1.0])
    assert PyramidDetector(cfg, model)._predict.topk == model.max_candidates == 5 * 1000


def test_it_is_tested_as_it_says():
    opts = "MODEL.RETINANET.SCORE_THRESH_TEST 0.3 MODEL.RETINANET.NMS_THRESH_TEST 0.4 TEST.DETECTIONS_PER_IMAGE 7"
    opts += " MODEL.RETINANET.TOPK_CANDIDATES_TEST 9"
    model, cfg = build("retinanet_focal", *opts.split()), load("retinanet_focal", *opts.split())
    description = description_of(cfg.MODEL.META_ARCHITECTURE)
    settings = description.test_settings(cfg)
    assert settings == (0.3, "9 of each feature map", 0.4, 7) and not description.class_agnostic
    assert settings.score_thresh == model.score_thresh and model.topk_candidates == 9
    assert (settings.nms_thresh, settings.max_detections) == (model.nms_thresh, model.max_detections)


def test_what_it_does_not_read_is_refused():
    with pytest.raises(ValueError, match=r"own stride: set MODEL\.GS\.ANCHOR_STRIDES"):
        build("retinanet_focal", "MODEL.GS.ANCHOR_STRIDES", [[8]])


def test_detections_are_ranked_by_logits():
    """Of boxes one over the other NMS keeps that of the highest logit, though all of their scores are 1."""
    model = build("retinanet_focal", "MODEL.RETINANET.TOPK_CANDIDATES_TEST", 4)
    anchors = model.anchor_generator(feature_maps(num_images=1))
    logits = [torch.full((1, len(x), K), -20.0) for x in anchors]
    deltas = [torch.zeros(1, len(x), 4) for x in anchors]
    # Of the finest map's 16 x 16 cells of 9 anchors: three neighbours, the middle one last, and two far away.
    rows = [(y * 16 + x) * 9 + 1 for x, y in ((4, 6), (6, 6), (5, 6), (0, 0), (8, 12))]
    logits[0][0, rows, 1] = torch.tensor([18.0, 19, 25, 40, 17.5])
    (found,) = detections(model, logits, deltas)
    expected = anchors[0].tensor[rows]
    assert (reference.box_iou(expected[2:3], expected[:2]) > 0.5).all()
    assert (found.scores == 1).all() and found.pred_classes.tolist() == [1] * len(found)
    assert torch.equal(found.pred_boxes.tensor, expected[[3, 2]]), "the fifth is beyond the map's limit of candidates"


@pytest.mark.parametrize("num_images", [1, 2])
def test_focal_loss_without_sampling_is_detectron2s(num_images):
    """They differ in what they divide by: here each image's positives, there a moving average of the batch's."""
    model = build()
    anchors = model.anchor_generator(feature_maps(num_images=num_images))
    logits, deltas = predictions(anchors, num_images)
    gt_labels, gt_boxes = model.label_anchors(anchors, OBJECTS[:num_images])
    with EventStorage():
        ours = model.losses(anchors, logits, gt_labels, deltas, gt_boxes)
    expected = {"loss_cls": 0.0, "loss_box_reg": 0.0}
    for i in range(num_images):
        image = [[x[i : i + 1] for x in maps] for maps in (logits, deltas)]
        positives = int(((gt_labels[i] >= 0) & (gt_labels[i] < K)).sum())
        assert positives > 3
        theirs = detectron2_losses((anchors, image[0], [gt_labels[i]], image[1], [gt_boxes[i]]), positives)
        for name in expected:
            expected[name] += float(theirs[name]) / num_images
    assert {name: float(loss) for name, loss in ours.items()} == pytest.approx(expected, rel=1e-5)


def test_labels_are_detectron2s_where_the_second_pass_adds_nothing():
    """Anchors equal to the objects: every object has its first-pass match, and no low-quality match is wanted."""
    model = build()
    anchors = model.anchor_generator(feature_maps())
    rows = torch.cat([Boxes.cat(anchors).tensor[[500, 900]], torch.tensor([[1.0], [2.0]])], dim=1)
    instances = objects(rows.tolist(), [])
    ours = model.label_anchors(anchors, instances)
    theirs = detectron2().label_anchors(anchors, instances)
    for labels, boxes, their_labels, their_boxes in zip(*ours, *theirs, strict=True):
        assert torch.equal(labels, their_labels)
        positive = (labels >= 0) & (labels < K)
        assert torch.equal(boxes[positive], their_boxes[positive])
    assert (ours[0][0] == 1).any() and (ours[0][0] == 2).any() and (ours[0][1] == K).all()


class Recorder(GroupSampler):
    def __call__(self, match_labels, group_idxs, losses=None, seed=None):
        self.asked, self.drawn = losses, super().__call__(match_labels, group_idxs, losses, seed)
        self.group_idxs = group_idxs
        return self.drawn


def recorded(model) -> Recorder:
    sampler = model.group_loss.sampler
    model.group_loss.sampler = Recorder(
        sampler.num_groups, sampler.num_per_group, sampler.positive_fraction, sampler.method
    )
    return model.group_loss.sampler


@pytest.mark.parametrize("name", ["retinanet", "retinanet_sampling", "retinanet_sampling_wrs", "retinanet_ohem"])
@pytest.mark.parametrize("iou_aware", [[], [0.0, 0.75]])
def test_loss_is_eq_2_written_out(name, iou_aware):
    model = build(name, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 16, "MODEL.GS.IOU_AWARE", iou_aware)
    sampler = recorded(model)
    anchors = model.anchor_generator(feature_maps())
    logits, deltas = predictions(anchors)
    gt_labels, gt_boxes = model.label_anchors(anchors, OBJECTS)
    if sampler.labels_compete:  # objects that the model misses have the highest losses of all
        missed = ((gt_labels >= 0) & (gt_labels < K)).split([x.shape[1] for x in logits], dim=1)
        logits = [x - 8.0 * of_map[..., None] for x, of_map in zip(logits, missed, strict=True)]
    with EventStorage():
        losses = model.losses(anchors, logits, gt_labels, deltas, gt_boxes)

    all_anchors, all_logits, all_deltas = Boxes.cat(anchors).tensor, torch.cat(logits, 1), torch.cat(deltas, 1)
    assert sampler.drawn.shape == gt_labels.shape and sampler.num_groups == (4 if "sampling" in name else 1)
    loss_cls, loss_box_reg, fits = 0.0, 0.0, []
    for b in range(2):
        for group in range(sampler.num_groups):
            rows = torch.nonzero((sampler.drawn[b] >= 0) & (sampler.group_idxs == group))[:, 0].tolist()
            costs, distances = [], []
            for i in rows:
                label = int(gt_labels[b, i])
                assert (label < K) == bool(sampler.drawn[b, i] == 1)
                p = all_logits[b, i].double().sigmoid()
                cost = -sum(float(torch.log(p[k] if k == label else 1 - p[k])) for k in range(K))
                if label < K and iou_aware:  # so much of its class as its predicted box fits
                    box = model.box2box_transform.apply_deltas(all_deltas[b, i][None], all_anchors[i][None])
                    fit = min(1.0, float(pairwise_iou(Boxes(box), Boxes(gt_boxes[b, i][None]))) / 0.75)
                    fits.append(fit)
                    cost += (1 - fit) * float(torch.log(p[label]) - torch.log(1 - p[label]))
                if sampler.needs_losses:
                    assert float(sampler.asked[b, i]) == pytest.approx(cost, rel=1e-4)
                costs.append(cost)
                if label < K:
                    x, y, w, h = _centre(all_anchors[i])
                    gx, gy, gw, gh = _centre(gt_boxes[b, i])
                    wanted = torch.tensor([(gx - x) / w, (gy - y) / h, (gw / w).log(), (gh / h).log()])
                    error = (all_deltas[b, i] - wanted).abs()
                    distances.append(float(torch.where(error < 0.1, 5 * error**2, error - 0.05).sum()))
            loss_cls += sum(costs) / max(len(costs), 1) / 2
            loss_box_reg += sum(distances) / max(len(distances), 1) / 2
    assert not iou_aware or min(fits) < max(fits)
    assert float(losses["loss_cls"]) == pytest.approx(loss_cls, rel=1e-4)
    assert float(losses["loss_box_reg"]) == pytest.approx(loss_box_reg, rel=1e-4) and loss_box_reg > 0


def _centre(box):
    w, h = box[2] - box[0], box[3] - box[1]
    return box[0] + w / 2, box[1] + h / 2, w, h


def test_anchors_in_ignore_regions_cost_nothing():
    model = build("retinanet_sampling").train()
    seen = {}
    label_anchors = model.label_anchors
    model.label_anchors = lambda *arguments: seen.setdefault("labels", label_anchors(*arguments))
    image = {"image": torch.zeros(3, 128, 128), "instances": OBJECTS[0]}
    crowd = Boxes(torch.tensor([[64.0, 64, 128, 128]]))
    for ignore_boxes in (None, crowd):
        seen.clear()
        extra = {} if ignore_boxes is None else {"ignore_boxes": ignore_boxes}
        with EventStorage():
            losses = model([{**image, **extra}])
        assert all(torch.isfinite(loss) for loss in losses.values())
        centres = Boxes.cat(model.anchor_generator(feature_maps(num_images=1))).tensor
        # Small anchors wholly inside the crowd, and away from the objects, which are positives.
        inside = (centres[:, 0] >= 64) & (centres[:, 1] >= 64) & (centres[:, 2] <= 128) & (centres[:, 3] <= 128)
        labels = seen["labels"][0][0][inside]
        assert len(labels) > 20
        assert (labels == K).any() == (ignore_boxes is None)
    assert len(image["instances"]) == 2, "the mapper's instances are left alone"


def test_a_crowd_smaller_than_the_smallest_anchor_ignores_those_near_it():
    model = build("retinanet_sampling")
    anchors = model.anchor_generator(feature_maps(num_images=1))
    crowd = Boxes(torch.tensor([[60.0, 60, 66, 65]]))
    labels, _ = model.label_anchors(anchors, objects([]), [crowd])
    ignored = Boxes.cat(anchors).area().sqrt()[labels[0] == -1]
    assert len(ignored) >= 12 and ignored.max() < 64, "of every ratio, and of no larger octave"


@pytest.mark.parametrize("name", ["retinanet_sampling", "retinanet_sampling_wrs", "retinanet_p3_dc_sampling_ohem"])
def test_n_per_group_at_1_to_3_on_real_annotations(name, shared_data):
    """Paper, section 4.2: every group has N samples, a quarter positive, shortages filled with negatives."""
    data = shared_data / "mini_wider" / "widerface"
    records = load_wider_face(data / "wider_face_split" / "wider_face_train_bbx_gt.txt", "")
    num_per_group = 64
    model = build(name, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", num_per_group)
    sampler, size = recorded(model), 384
    maps = feature_maps(size, num_images=1)[: 1 if "p3_dc" in name else None]
    anchors = model.anchor_generator(maps)
    logits, deltas = predictions(anchors, num_images=1)
    full = short = 0
    for record in records[::150]:
        boxes = torch.from_numpy(record["gt_boxes"]).float()
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
        instances = Instances((size, size), gt_boxes=Boxes(boxes), gt_classes=torch.arange(len(boxes)) % K)
        gt_labels, gt_boxes = model.label_anchors(anchors, [instances])
        with EventStorage():
            model.losses(anchors, logits, gt_labels, deltas, gt_boxes)
        for group in range(4):
            of_group = sampler.group_idxs == group
            available = int(((gt_labels[0] >= 0) & (gt_labels[0] < K) & of_group).sum())
            positives = int(((sampler.drawn[0] == 1) & of_group).sum())
            negatives = int(((sampler.drawn[0] == 0) & of_group).sum())
            assert positives == min(available, num_per_group // 4)
            assert positives + negatives == num_per_group
            full += positives * 3 == negatives
            short += 0 < available < num_per_group // 4
    assert full > 0 and short > 0  # both cases occurred


def test_anchors_are_retinanets():
    """Rounded to a thousandth of a pixel in the YAML, as the paper tiles them: 9 a cell, three octave fractions."""
    octaves = [[size * 2 ** (i / 3) for i in range(3)] for size in (32, 64, 128, 256, 512)]
    for name, expected in (
        ("retinanet", octaves),
        ("retinanet_p3_dc", [[size for octave in octaves for size in octave]]),
    ):
        cfg = get_cfg()
        add_gs_config(cfg)
        cfg.merge_from_file(f"configs/coco/{name}.yaml")
        assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == len(expected)
        for sizes, wanted in zip(cfg.MODEL.ANCHOR_GENERATOR.SIZES, expected, strict=True):
            assert sizes == pytest.approx(wanted, abs=1e-3)


def test_the_dilated_head_has_a_branch_for_each_octave_and_begins_at_the_prior():
    head = build("retinanet_p3_dc").head
    assert isinstance(head, DilatedRPNHead)
    assert [branch.dilation[0] for branch in head.branches] == [1, 2, 4, 8, 16]
    assert [layer.out_channels for layer in head.objectness_logits] == [9 * K] * 5
    assert [layer.out_channels for layer in head.anchor_deltas] == [9 * 4] * 5
    for layer in head.objectness_logits:
        torch.testing.assert_close(layer.bias.sigmoid(), torch.full_like(layer.bias, 0.01))


@pytest.mark.parametrize(
    ("sizes", "number"), [([16], 1), ([16, 32, 64, 128], 4), ([32, 40.317, 50.797, 64, 80.635, 101.594], 2)]
)
def test_num_octaves(sizes, number):
    assert num_octaves(sizes) == number


@pytest.mark.parametrize("sizes", [[32, 40, 64], [64, 32], [16, 64]])
def test_sizes_without_equal_octaves_are_refused(sizes):
    with pytest.raises(ValueError, match="needs rising anchor sizes, the same number in every octave"):
        num_octaves(sizes)


def test_anchors_on_padding_are_no_negatives():
    """The second image has 60 x 48 pixels of the batch's 128 x 128."""
    model = build("retinanet_sampling").train()
    seen = {}
    label_anchors = model.label_anchors
    model.label_anchors = lambda *arguments: seen.setdefault("labels", label_anchors(*arguments))
    small = Instances((48, 60), gt_boxes=Boxes(torch.tensor([[10.0, 10, 40, 40]])), gt_classes=torch.tensor([1]))
    small = {"image": torch.zeros(3, 48, 60), "instances": small}
    with EventStorage():
        model([{"image": torch.zeros(3, 128, 128), "instances": OBJECTS[0]}, small])
    centres = Boxes.cat(model.anchor_generator(feature_maps())).get_centers()
    beyond = (centres[:, 0] >= 60) | (centres[:, 1] >= 48)
    labels = seen["labels"][0]
    assert (labels[0, beyond] == K).any() and (labels[1, ~beyond] == K).any()
    assert not (labels[1, beyond] == K).any()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["retinanet_sampling", "retinanet_sampling_wrs", "retinanet_ohem", "retinanet_focal"])
def test_predictions_for_ignored_anchors_may_be_infinite(name, bad):
    """They change neither the losses nor any gradient."""
    model = build(name)
    anchors = model.anchor_generator(feature_maps())
    instances = objects([[10.0, 10, 44, 40, 2]], [[30.0, 50, 70, 90, 1]])
    crowds = [Boxes(torch.tensor([x])) for x in ([60.0, 20, 120, 110], [0.0, 0, 50, 128])]
    gt_labels, gt_boxes = model.label_anchors(anchors, instances, crowds)
    ignored = (gt_labels == -1).split([len(x) for x in anchors], dim=1)
    found = []
    for value in (None, bad):
        given = predictions(anchors)
        if value is not None:
            given = [[x.masked_fill(y[..., None], value) for x, y in zip(maps, ignored, strict=True)] for maps in given]
        leaves = [x.requires_grad_() for maps in given for x in maps]
        torch.manual_seed(0)
        with EventStorage():
            losses = model.losses(anchors, given[0], gt_labels, given[1], gt_boxes)
        sum(losses.values()).backward()
        found.append((losses, [x.grad for x in leaves]))
    assert found[0][0] == found[1][0] and all(loss > 0 for loss in found[0][0].values())
    assert all(torch.equal(x, y) for x, y in zip(found[0][1], found[1][1], strict=True))
