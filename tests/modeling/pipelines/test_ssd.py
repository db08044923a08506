"""SSD's own parts; test_all_pipelines.py has what it shares with others."""

import torch
from detectron2.modeling import build_model
from small_pipelines import PIPELINES
from test_all_pipelines import feature_maps, small_model

from gs_d2.modeling import PerMapRPNHead

PIPELINE = next(pipeline for pipeline in PIPELINES if pipeline.name == "ssd")


def test_six_maps():
    shapes = small_model(PIPELINE).backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == {
        "res2": 4, "res3": 8, "res4": 16, "res5": 32, "extra1": 64, "extra2": 128,
    }  # fmt: skip
    maps = feature_maps(small_model(PIPELINE), 130, 257)
    assert [tuple(x.shape[-2:]) for x in maps] == [(33, 65), (17, 33), (9, 17), (5, 9), (3, 5), (2, 3)]


def test_no_map_hears_of_a_coarser_one():
    """No lateral connections: what a map predicts comes from the layers up to it and from its own predictors."""
    torch.manual_seed(0)
    model = build_model(PIPELINE.cfg(sampling=True, small=True)).train()
    features = model.backbone(torch.rand(1, 3, 128, 128))
    names = model.proposal_generator.in_features
    logits, deltas = model.proposal_generator.rpn_head([features[name] for name in names])
    stages = {name: f"backbone.bottom_up.{name}." for name in names[:4]}
    stages |= {name: f"backbone.{name}." for name in names[4:]}
    for i in range(len(names)):
        model.zero_grad()
        (logits[i].sum() + deltas[i].sum()).backward(retain_graph=True)
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        stages_reached = [any(x.startswith(stages[name]) for x in reached) for name in names]
        assert stages_reached == [j <= i for j in range(len(names))]
        predictors = {x for x in reached if "rpn_head" in x}
        head = "proposal_generator.rpn_head"
        assert {x.split(".")[2] for x in reached if "branches" in x} == {names[i]}
        assert predictors == {
            f"{head}.{layers}.{i}.{kind}"
            for layers in ("objectness_logits", "anchor_deltas")
            for kind in ("weight", "bias")
        }


def test_maps_may_differ_in_channels_and_anchors():
    head = PerMapRPNHead(in_channels=[4, 6], num_anchors=[1, 3])
    logits, deltas = head([torch.rand(2, 4, 8, 9), torch.rand(2, 6, 4, 5)])
    assert [tuple(x.shape) for x in logits] == [(2, 2, 8, 9), (2, 6, 4, 5)]
    assert [tuple(x.shape) for x in deltas] == [(2, 4, 8, 9), (2, 12, 4, 5)]


def test_the_finest_map_is_trained():
    """Nothing but its branch comes after it: too little to find faces in frozen ImageNet features."""
    model = build_model(PIPELINE.cfg(sampling=True))
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert any(".res2." in name for name in trained) and not any(".stem." in name for name in trained)
