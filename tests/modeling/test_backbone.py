"""P6 on top of the top-down path: where it comes from and what it is not allowed to change."""

import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone

from gs_d2.config import add_gs_config


def build(name):
    cfg = get_cfg()
    add_gs_config(cfg)
    opts = "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.FPN.OUT_CHANNELS 8"
    cfg.merge_from_list([*opts.split(), "MODEL.BACKBONE.NAME", name])
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    torch.manual_seed(0)
    return build_backbone(cfg).eval()


def test_p6_is_pooled_and_convolved_from_p5_and_leaves_the_rest_alone():
    with_p6, without = build("build_resnet_topdown_p6_backbone"), build("build_resnet_topdown_backbone")
    missing, unexpected = with_p6.load_state_dict(without.state_dict(), strict=False)
    assert unexpected == [] and all(key.startswith("top_block.") for key in missing) and len(missing) == 4
    assert (with_p6.size_divisibility, without.size_divisibility) == (64, 32)
    shapes = with_p6.output_shape()
    assert list(shapes) == ["p2", "p3", "p4", "p5", "p6"] and (shapes["p6"].stride, shapes["p6"].channels) == (64, 8)
    with torch.no_grad():
        maps, plain = (
            net(torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(1))) for net in (with_p6, without)
        )
        assert all(torch.equal(maps[name], plain[name]) for name in plain)
        first, second = (x for x in with_p6.top_block if isinstance(x, torch.nn.Conv2d))
        hidden = F.conv2d(F.max_pool2d(maps["p5"], 2, 2), first.weight, first.bias, padding=1).relu()
        torch.testing.assert_close(maps["p6"], F.conv2d(hidden, second.weight, second.bias, padding=1))
    assert maps["p6"].shape == (1, 8, 2, 3) and (hidden == 0).any()
