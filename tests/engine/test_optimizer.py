"""The optimizer: AdamW's steps, and which parameters have which rate."""

import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from gs_d2.config import add_gs_config
from gs_d2.engine.optimizer import build_optimizer


def config(*opts):
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_list(list(opts))
    return cfg


class Detector(nn.Module):
    """Five layers: two pretrained ones, a lateral convolution, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.bottom_up = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
        self.backbone.lateral, self.backbone.norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)
        self.head = nn.Conv2d(4, 2, 1)
        self.backbone.bottom_up[0].requires_grad_(False)


def test_adamw_steps_as_torchs_own_with_the_weight_decays_and_clipping_of_the_config():
    opts = "SOLVER.GS.OPTIMIZER adamw SOLVER.BASE_LR 0.01 SOLVER.WEIGHT_DECAY 0.1 SOLVER.WEIGHT_DECAY_NORM 0.0".split()
    clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value")
    cfg = config(*opts, *clip, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    weight, norm = (torch.nn.Parameter(layer.weight.detach().clone()) for layer in model)
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, before, decay in ((model[0].weight, weight, 0.1), (model[1].weight, norm, 0.0)):
        before.grad = torch.full_like(before, 0.5)
        torch.optim.AdamW([before], 0.01, weight_decay=decay).step()
        assert torch.equal(parameter, before)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_pretrained_part_has_a_rate_of_its_own(optimizer):
    model = Detector()
    opts = ("SOLVER.GS.OPTIMIZER", optimizer, "SOLVER.BASE_LR", 0.01, "SOLVER.GS.BACKBONE_MULTIPLIER", 0.2)
    built = build_optimizer(config(*opts, "SOLVER.BIAS_LR_FACTOR", 2.0), model)
    rates = {parameter: group["lr"] for group in built.param_groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert rates.keys() == set(trained.values())
    for name, parameter in trained.items():
        expected = 0.01 * (0.2 if "bottom_up" in name else 1) * (2 if name.endswith("bias") else 1)
        assert rates[parameter] == pytest.approx(expected), name


def test_without_bottom_up_the_whole_backbone_is_meant():
    model = nn.Module()
    model.backbone, model.head = nn.Linear(2, 2), nn.Linear(2, 2)
    built = build_optimizer(config("SOLVER.BASE_LR", 1.0, "SOLVER.GS.BACKBONE_MULTIPLIER", 0.5), model)
    rates = {parameter: group["lr"] for group in built.param_groups for parameter in group["params"]}
    assert rates[model.backbone.weight] == 0.5 and rates[model.head.weight] == 1


def test_by_default_it_is_detectron2s_own():
    model = Detector()
    built = build_optimizer(config(), model)
    assert type(built) is torch.optim.SGD
    assert all(group["momentum"] == 0.9 for group in built.param_groups)
