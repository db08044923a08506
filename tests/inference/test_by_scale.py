"""`by_scale`: what each anchor scale finds alone, for one and two stages, at one scale and on a pyramid."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from small_detector import SCALES, build, build_two_stage, image
from torchvision.ops import nms

from gs_d2.inference import PyramidDetector
from gs_d2.inference.box_voting import vote_boxes

FACTORS = [0.5, 1.0, 1.5]
CAP = 60


def detectors(builder, factors=None, **pyramid):
    model = builder(max_detections=CAP)
    return model, PyramidDetector(model=model, scales=factors, **pyramid) if factors else model


def outputs(model, detector, inputs, by_scale=True):
    model.by_scale = by_scale
    return detector(inputs)


def assert_equal(a: Instances, b: Instances):
    assert a.image_size == b.image_size and a.get_fields().keys() == b.get_fields().keys() and len(a) == len(b) > 0
    for name, value in a.get_fields().items():
        x, y = (v.tensor if isinstance(v, Boxes) else v for v in (value, b.get(name)))
        assert torch.equal(x, y), name


def all_candidates(model, inputs, factors, **pyramid):
    """What the NMS chooses from: of a pyramid, the detections where it drops nothing."""
    if factors is None:
        return model.predict_candidates(inputs)
    limits = model.nms_thresh, model.max_detections
    model.nms_thresh, model.max_detections, model.by_scale = 1.0, 10**9, False
    detector = PyramidDetector(model=model, scales=factors, **pyramid)
    found = [x["instances"] for x in detector(inputs)]
    model.nms_thresh, model.max_detections = limits
    return found


@pytest.mark.parametrize("factors", [None, FACTORS], ids=["one scale", "pyramid"])
@pytest.mark.parametrize("builder", [build, build_two_stage], ids=["one stage", "two stages"])
def test_each_scale_has_an_nms_and_a_limit_of_its_own(builder, factors, device):
    pyramid = {"flip": True} if factors else {}
    model, detector = detectors(builder, factors, **pyramid)
    model.to(device)
    inputs = [image(96, 128), image(90, 100, seed=1)]
    sizes = []
    candidates = all_candidates(model, inputs, factors, **pyramid)
    for result, found in zip(outputs(model, detector, inputs), candidates, strict=True):
        ours = result["instances_by_scale"]
        assert ours.get_fields().keys() == result["instances"].get_fields().keys()
        assert ours.scores.device.type == device and ours.image_size == result["instances"].image_size
        assert ours.anchor_scales.tolist() == sorted(ours.anchor_scales.tolist())
        for scale in SCALES:
            alone = found[found.anchor_scales == scale]
            kept = nms(alone.pred_boxes.tensor, alone.scores, 0.5)
            sizes.append(len(kept))
            ours_alone = ours[ours.anchor_scales == scale]
            # Candidates of equal scores may come in another order than before.
            torch.testing.assert_close(ours_alone.scores, alone.scores[kept[:CAP]])
            torch.testing.assert_close(
                ours_alone.pred_boxes.tensor.sum(dim=0), alone.pred_boxes.tensor[kept[:CAP]].sum(dim=0)
            )
        assert len(ours) > CAP >= len(result["instances"])
    assert max(sizes) > CAP, "the limit decides somewhere"


@pytest.mark.parametrize("factors", [None, FACTORS], ids=["one scale", "pyramid"])
@pytest.mark.parametrize("builder", [build, build_two_stage], ids=["one stage", "two stages"])
def test_detections_stay_as_they_are_and_nobody_pays_who_has_not_asked(builder, factors):
    model, detector = detectors(builder, factors)
    inputs = [image(96, 128) | {"height": 192, "width": 256}, image(60, 60, seed=1)]
    assert model.by_scale is False
    plain = detector(inputs)
    for before, after in zip(plain, outputs(model, detector, inputs), strict=True):
        assert set(before) == {"instances"} and set(after) == {"instances", "instances_by_scale"}
        assert_equal(after["instances"], before["instances"])
        assert after["instances_by_scale"].image_size == before["instances"].image_size


@pytest.mark.parametrize("factors", [None, FACTORS], ids=["one scale", "pyramid"])
def test_of_a_single_scale_it_is_everything(factors):
    """Its anchors' sides need not be whole pixels, nor equal to the last bit."""
    model, detector = detectors(build, factors)
    decode = model.proposal_generator._decode

    def one_scale(*args):
        results = decode(*args)
        for x in results:
            x.anchor_scales = 16 + 1e-5 * torch.rand(len(x))
        return results

    model.proposal_generator._decode = one_scale
    (result,) = outputs(model, detector, [image(96, 128)])
    assert_equal(result["instances_by_scale"], result["instances"])


def test_one_level_of_a_pyramid_is_the_plain_detector():
    model, detector = detectors(build, [1.0])
    inputs = [image(96, 128)]
    (ours,), (plain,) = outputs(model, detector, inputs), outputs(model, model, inputs)
    assert_equal(ours["instances_by_scale"], plain["instances_by_scale"])


def test_only_boxes_of_a_scale_vote_on_its_detections():
    model, detector = detectors(build, FACTORS, voting_thresh=0.5)
    inputs = [image(96, 128)]
    (candidates,) = all_candidates(model, inputs, FACTORS)
    (voted,) = outputs(model, detector, inputs)
    (plain,) = outputs(model, PyramidDetector(model=model, scales=FACTORS), inputs)
    for scale in SCALES:
        ours, before, alone = (
            x[x.anchor_scales == scale] for x in (voted["instances_by_scale"], plain["instances_by_scale"], candidates)
        )
        expected = vote_boxes(before.pred_boxes.tensor, alone.pred_boxes.tensor, alone.scores, 0.5)
        torch.testing.assert_close(ours.pred_boxes.tensor, expected, rtol=1e-5, atol=1e-3)
        assert not torch.allclose(expected, before.pred_boxes.tensor, atol=0.1)


@pytest.mark.parametrize("factors", [None, FACTORS], ids=["one scale", "pyramid"])
@pytest.mark.parametrize("builder", [build, build_two_stage], ids=["one stage", "two stages"])
def test_nothing_found(builder, factors):
    model, detector = detectors(builder, factors)
    model.predict_candidates = lambda inputs, predict=model.predict_candidates: [x[:0] for x in predict(inputs)]
    (result,) = outputs(model, detector, [image(96, 128)])
    assert len(result["instances"]) == len(result["instances_by_scale"]) == 0
    assert result["instances_by_scale"].has("anchor_scales") and result["instances_by_scale"].has("pred_boxes")


def test_a_detector_that_knows_no_scales_still_runs_on_a_pyramid():
    class Foreign(torch.nn.Module):
        device = torch.device("cpu")
        size_divisibility, tile_geometry = 1, (1, 1)

        def predict_candidates(self, inputs):
            found = Instances((50, 60), pred_boxes=Boxes(torch.tensor([[1.0, 2, 20, 30]])), scores=torch.ones(1))
            return [found for _ in inputs]

        def select_detections(self, candidates):
            return candidates

    (result,) = PyramidDetector(model=Foreign().eval(), scales=[1.0])([image(50, 60)])
    assert set(result) == {"instances"} and len(result["instances"]) == 1
