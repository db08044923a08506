"""GroupCriterion against eq. 2 written out as loops over images, groups and samples."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils.events import EventStorage

from gs_d2.modeling.criterion import CLS_LOSS_TYPES, GroupCriterion, log_group_statistics
from gs_d2.modeling.losses import focal_weights, group_sums

TRANSFORM = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
NUM_IMAGES, NUM_GROUPS = 2, 4


def criterion(**arguments):
    return GroupCriterion(TRANSFORM, **arguments)


def samples(num=300, seed=0):
    """Logits [S, 2], labels in {-1, 0, 1} and groups [S], numbered through both images; group 2 is empty, group 5 has
    no positives, group 6 none drawn."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num, 2, generator=generator)
    labels = torch.randint(-1, 2, (num,), generator=generator).to(torch.int8)
    groups = torch.randint(0, NUM_IMAGES * NUM_GROUPS, (num,), generator=generator)
    groups[groups == 2] = 3
    labels[(groups == 5) & (labels == 1)] = 0
    labels[groups == 6] = -1
    return logits, labels, groups


def cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels.clamp(min=0).long(), reduction="none")


def textbook_focal(logits, label, alpha=0.25, gamma=2.0):
    """(factor, loss) of one sample from its probability, in float64."""
    p_face = float(logits.double().softmax(dim=0)[1])
    p_t, alpha_t = (p_face, alpha) if label == 1 else (1 - p_face, 1 - alpha)
    factor = alpha_t * (1 - p_t) ** gamma
    return factor, -factor * math.log(p_t)


def literal_classification(cls_loss_type, logits, labels, groups):
    total = 0.0
    for image in range(NUM_IMAGES):
        for group in range(NUM_GROUPS):
            members = [i for i in range(len(labels)) if groups[i] == image * NUM_GROUPS + group and labels[i] in (0, 1)]
            if not members:
                continue
            pairs = [textbook_focal(logits[i], int(labels[i])) for i in members]
            if cls_loss_type == "softmax":
                log_p = logits.double().log_softmax(dim=1)
                total += sum(-float(log_p[i, int(labels[i])]) for i in members) / len(members)
            elif cls_loss_type == "focal":
                total += sum(loss for _, loss in pairs) / max(1, sum(int(labels[i]) == 1 for i in members))
            else:
                total += sum(loss for _, loss in pairs) / sum(factor for factor, _ in pairs)
    return total / NUM_IMAGES


@pytest.mark.parametrize("cls_loss_type", CLS_LOSS_TYPES)
def test_classification_is_eq_2(cls_loss_type, device):
    logits, labels, groups = samples()
    assert not (groups == 2).any() and not (labels[groups == 5] == 1).any() and (labels[groups == 6] == -1).all()
    loss = criterion(cls_loss_type=cls_loss_type).classification(
        cross_entropy(logits, labels).to(device),
        labels.to(device),
        groups.to(device),
        NUM_IMAGES * NUM_GROUPS,
        NUM_IMAGES,
    )
    assert loss.shape == () and loss.dtype == torch.float32
    assert float(loss) == pytest.approx(literal_classification(cls_loss_type, logits, labels, groups), rel=1e-4)


@pytest.mark.parametrize("cls_loss_type", CLS_LOSS_TYPES)
def test_gradient_is_that_of_the_literal_loss(cls_loss_type):
    """Focal loss's gradient goes through its factor; only the sum that Focal* divides by is a constant."""
    logits, labels, groups = samples(60, seed=3)
    logits.requires_grad_()
    criterion(cls_loss_type=cls_loss_type).classification(
        cross_entropy(logits, labels), labels, groups, NUM_IMAGES * NUM_GROUPS, NUM_IMAGES
    ).backward()

    expected = logits.detach().double().requires_grad_()
    p = expected.softmax(dim=1)
    total = 0.0
    for group in range(NUM_IMAGES * NUM_GROUPS):
        members = torch.nonzero((groups == group) & (labels >= 0))[:, 0]
        if not len(members):
            continue
        positive = labels[members] == 1
        p_t = torch.where(positive, p[members, 1], p[members, 0])
        factor = torch.where(positive, 0.25, 0.75).double() * (1 - p_t) ** 2
        if cls_loss_type == "softmax":
            total = total - p_t.log().mean()
        elif cls_loss_type == "focal":
            total = total - (factor * p_t.log()).sum() / positive.sum().clamp(min=1)
        else:
            total = total - (factor * p_t.log()).sum() / factor.sum().detach()
    (total / NUM_IMAGES).backward()
    torch.testing.assert_close(logits.grad.double(), expected.grad, rtol=1e-4, atol=1e-6)
    assert (logits.grad[labels == -1] == 0).all()


def test_focal_weights_are_the_textbooks():
    logits, labels, _ = samples()
    drawn = labels >= 0
    logits, labels = logits[drawn], labels[drawn]
    for alpha, gamma in ((0.25, 2.0), (0.5, 0.0), (0.1, 5.0)):
        weights = focal_weights(cross_entropy(logits, labels), labels == 1, alpha, gamma)
        expected = [textbook_focal(x, int(y), alpha, gamma)[0] for x, y in zip(logits, labels, strict=True)]
        torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cls_loss_type", CLS_LOSS_TYPES)
def test_without_loss_the_gradient_is_finite(cls_loss_type):
    """Perfect predictions: every focal factor, and their sum, is 0."""
    losses = torch.zeros(8, requires_grad=True)
    labels = torch.tensor([1, 0, 0, 0, 1, 0, 0, -1], dtype=torch.int8)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    total = criterion(cls_loss_type=cls_loss_type).classification(losses, labels, groups, 2, 1)
    total.backward()
    assert total == 0 and torch.isfinite(losses.grad).all()


@pytest.mark.parametrize("cls_loss_type", CLS_LOSS_TYPES)
def test_nothing_drawn_costs_nothing_but_stays_in_the_graph(cls_loss_type):
    for num in (0, 5):
        losses = torch.ones(num, requires_grad=True)
        labels, groups = torch.full((num,), -1, dtype=torch.int8), torch.zeros(num, dtype=torch.int64)
        total = criterion(cls_loss_type=cls_loss_type).classification(losses, labels, groups, 4, 1)
        total.backward()
        assert total == 0 and (losses.grad == 0).all()


@pytest.mark.parametrize("cls_loss_type", CLS_LOSS_TYPES)
@pytest.mark.parametrize("num_classes", [None, 3])
def test_losses_of_boxes_that_were_not_drawn_may_be_infinite(cls_loss_type, num_classes):
    """They change neither the loss nor the gradient of those that were."""
    _, labels, groups = samples()
    generator = torch.Generator().manual_seed(1)
    losses = torch.rand((len(labels),) if num_classes is None else (len(labels), num_classes), generator=generator)
    targets = None if num_classes is None else torch.rand(losses.shape, generator=generator) < 0.3
    found = []
    for value in (1.0, math.inf, math.nan):
        given = losses.clone()
        given[labels == -1] = value
        given.requires_grad_()
        total = criterion(cls_loss_type=cls_loss_type).classification(
            given, labels, groups, NUM_IMAGES * NUM_GROUPS, NUM_IMAGES, targets
        )
        total.backward()
        assert (given.grad[labels == -1] == 0).all()
        found.append((total, given.grad))
    for total, gradient in found[1:]:
        assert torch.equal(total, found[0][0]) and torch.equal(gradient, found[0][1])
    assert found[0][0] > 0


@pytest.mark.parametrize("kind", ["smooth_l1", "iou", "least_square_iou"])
def test_deltas_of_rows_that_only_fill_up_may_be_infinite(kind):
    boxes, targets, deltas = boxes_and_targets(20)
    valid, groups = torch.arange(20) < 7, torch.arange(20) % 4
    found = []
    for value in (0.1, math.inf, math.nan):
        given = torch.where(valid[:, None], deltas, value).requires_grad_()
        loss = criterion(box_reg_loss_type=kind).box_regression(given, boxes, targets, valid, groups, 4, 1)
        loss.backward()
        found.append((loss, given.grad))
    for loss, gradient in found:
        assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])
        assert loss > 0 and (gradient[~valid] == 0).all()


def boxes_and_targets(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xy = torch.rand(num, 2, generator=generator) * 50
    boxes = torch.cat([xy, xy + 10 + 30 * torch.rand(num, 2, generator=generator)], dim=1)
    return boxes, boxes + 4 * torch.rand(num, 4, generator=generator), 0.1 * torch.randn(num, 4, generator=generator)


def test_quality_is_the_iou_of_the_predicted_box():
    """Linear between the two IoUs, without a gradient; 1 for rows that only fill up, whatever their deltas."""
    boxes = torch.tensor([[10.0, 20, 20, 40]]).repeat(8, 1)
    gt_boxes = boxes.clone()
    gt_boxes[:, 3] = 20 + 20 * torch.tensor([0.2, 0.4, 0.45, 0.5, 0.6, 1.0, 0.3, 0.3])
    deltas = torch.zeros(8, 4)
    deltas[6], deltas[7] = math.nan, math.inf
    valid = torch.arange(8) < 6
    quality = criterion(iou_aware=[0.4, 0.6]).quality(deltas.requires_grad_(), boxes, gt_boxes, valid)
    torch.testing.assert_close(quality, torch.tensor([0.0, 0, 0.25, 0.5, 1, 1, 1, 1]), atol=1e-5, rtol=0)
    assert not quality.requires_grad

    moved = torch.tensor([[0.0, 0.5, 0.0, 0.0]])  # half a height down
    quality = criterion(iou_aware=[0.0, 1.0]).quality(moved, boxes[:1], boxes[:1], valid[:1])
    assert float(quality) == pytest.approx(1 / 3)
    assert criterion(iou_aware=[0.4, 0.6]).quality(deltas[:0], boxes[:0], boxes[:0], valid[:0]).shape == (0,)


def literal_box_loss(kind, deltas, box, target, beta):
    wanted = TRANSFORM.get_deltas(box[None], target[None])[0]
    if kind == "smooth_l1":
        distances = [abs(float(x)) for x in deltas - wanted]
        return sum(0.5 * d * d / beta if d < beta else d - beta / 2 for d in distances)
    x1, y1, x2, y2 = TRANSFORM.apply_deltas(deltas[None], box[None])[0].tolist()
    u1, v1, u2, v2 = target.tolist()
    inter = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
    iou = inter / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - inter)
    return (1 - iou) ** 2 if kind == "least_square_iou" else -math.log(iou)


@pytest.mark.parametrize("kind", ["smooth_l1", "iou", "least_square_iou"])
@pytest.mark.parametrize("num_valid", [0, 1, 30])
def test_box_regression_is_eq_2(kind, num_valid, device):
    """A group's mean is over its positives alone, whatever the rows that only fill up hold."""
    num, beta = 40, 0.1111
    boxes, targets, deltas = boxes_and_targets(num)
    valid = torch.arange(num) < num_valid
    targets[~valid] = 0.0  # the row that stands for no ground truth
    groups = torch.randint(0, 8, (num,), generator=torch.Generator().manual_seed(1))
    groups[groups == 4] = 5  # an empty group
    on_device = deltas.to(device).requires_grad_()
    loss = criterion(box_reg_loss_type=kind, smooth_l1_beta=beta).box_regression(
        on_device, boxes.to(device), targets.to(device), valid.to(device), groups.to(device), 8, NUM_IMAGES
    )
    loss.backward()
    expected = 0.0
    for group in range(8):
        members = [i for i in range(num) if valid[i] and groups[i] == group]
        if members:
            costs = [literal_box_loss(kind, deltas[i].detach(), boxes[i], targets[i], beta) for i in members]
            expected += sum(costs) / len(members)
    assert loss.item() == pytest.approx(expected / NUM_IMAGES, rel=1e-4)
    assert torch.isfinite(on_device.grad).all()
    assert (on_device.grad[~valid] == 0).all()
    assert (on_device.grad[valid] != 0).any(dim=1).all()


@pytest.mark.parametrize("kind", ["smooth_l1", "iou", "least_square_iou"])
def test_box_regression_of_no_rows(kind):
    deltas = torch.zeros(0, 4, requires_grad=True)
    rows = torch.zeros(0, dtype=torch.int64)
    empty = torch.zeros(0, 4)
    loss = criterion(box_reg_loss_type=kind).box_regression(deltas, empty, empty, rows.bool(), rows, 4, 1)
    loss.backward()
    assert loss == 0 and deltas.grad.shape == (0, 4)


def test_group_sums():
    values = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]])
    assert group_sums(values, torch.tensor([0, 2, 0, 2]), 4).tolist() == [[4, 0, 6, 0], [40, 0, 60, 0]]
    own = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    assert group_sums(values, own, 2).tolist() == [[6, 4], [0, 100]]
    assert group_sums(values > 2, own, 2).tolist() == [[1, 1], [0, 4]]
    assert group_sums(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_a_wrong_type_is_named():
    with pytest.raises(
        ValueError, match="CLS_LOSS_TYPE must be one of softmax, focal, focal_normalized, got 'sigmoid'"
    ):
        criterion(cls_loss_type="sigmoid")
    with pytest.raises(
        ValueError, match="BBOX_REG_LOSS_TYPE must be one of smooth_l1, least_square_iou, iou, got 'diou'"
    ):
        criterion(box_reg_loss_type="diou")


@pytest.mark.parametrize("ious", [[0.5], [0.4, 0.5, 0.6], [0.6, 0.4], [0.5, 0.5], [-0.1, 0.5], [0.5, 1.1]])
def test_two_rising_ious(ious):
    with pytest.raises(ValueError, match=r"IOU_AWARE must be empty or two rising IoUs in \[0, 1\], got \["):
        criterion(iou_aware=ious)


@pytest.mark.parametrize("cls_loss_type", ["focal", "focal_normalized"])
def test_focal_loss_is_not_iou_aware(cls_loss_type):
    with pytest.raises(ValueError, match=f"IOU_AWARE needs CLS_LOSS_TYPE \"softmax\", got '{cls_loss_type}'"):
        criterion(iou_aware=[0.4, 0.6], cls_loss_type=cls_loss_type)


def test_scores_of_a_scale_are_logged():
    """Against the probabilities that the losses come from; a scale without samples, or without faces, has no value."""
    generator = torch.Generator().manual_seed(0)
    logits, scale_idxs = torch.randn(2, 60, 2, generator=generator), torch.arange(60) % 4
    sampled = torch.randint(-1, 2, (2, 60), generator=generator).to(torch.int8)
    sampled[:, scale_idxs == 1] = -1
    sampled[:, scale_idxs == 2] = -sampled[:, scale_idxs == 2].abs() + 0
    logits[:, scale_idxs == 3] = torch.tensor([1.0, -0.5])
    losses = cross_entropy(logits.view(-1, 2), sampled.view(-1)).view(2, 60)
    for idxs in (scale_idxs, scale_idxs.expand(2, 60)):
        with EventStorage(0) as storage:
            log_group_statistics("groups", [16.0, 32.0, 64.0, 90.5], idxs, sampled, sampled, losses)
            found = {name: value for name, (value, _) in storage.latest().items() if "score" in name}
        expected = {}
        for i, scale in enumerate(("16", "32", "64", "90.5")):
            scores = {label: [] for label in (-1, 0, 1)}
            for image in range(2):
                for box in range(60):
                    if scale_idxs[box] == i:
                        scores[int(sampled[image, box])].append(float(logits[image, box].double().softmax(dim=0)[1]))
            if scores[0] or scores[1]:
                drawn = scores[0] + scores[1]
                expected[f"groups/distinct_scores@{scale}"] = len({round(score, 6) for score in drawn}) / len(drawn)
            for label, name in ((0, "neg_score"), (1, "pos_score")):
                if scores[label]:
                    expected[f"groups/{name}@{scale}"] = sum(scores[label]) / len(scores[label])
        assert found == pytest.approx(expected, abs=1e-6)
        assert found["groups/distinct_scores@16"] > 0.9 > 0.1 > found["groups/distinct_scores@90.5"]
        assert "groups/pos_score@64" not in found and "groups/neg_score@64" in found
        assert "groups/distinct_scores@32" not in found


def test_statistics_are_logged_now_and_then():
    for iteration, count in ((0, 1), (18, 0), (19, 1), (20, 0)):
        with EventStorage(iteration) as storage:
            log_group_statistics(
                "groups", [16.0], torch.zeros(4).long(), *torch.zeros(2, 1, 4, dtype=torch.int8), torch.ones(1, 4)
            )
            assert len(storage.latest()) == 7 * count
