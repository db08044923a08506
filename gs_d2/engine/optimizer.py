"""The optimizer of a config: Detectron2's SGD or AdamW, and a rate of its own for a pretrained backbone."""

import torch
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

OPTIMIZERS = ("sgd", "adamw")
_OF_STATE = ("params", "lr", "initial_lr")  # of a parameter group: what is no option


def build_optimizer(cfg, model: nn.Module) -> torch.optim.Optimizer:
    """SOLVER.GS.OPTIMIZER, with Detectron2's parameter groups (weight decay of norms and biases, rate of biases) and
    gradient clipping. SOLVER.GS.BACKBONE_MULTIPLIER scales the rates of what `model.backbone.bottom_up` holds (of
    `model.backbone` where it has no such part)."""
    solver = cfg.SOLVER
    if solver.GS.OPTIMIZER == "sgd" and solver.GS.BACKBONE_MULTIPLIER == 1:
        return build_detectron2_optimizer(cfg, model)
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    groups = _slow_down(groups, _pretrained_part(model), solver.GS.BACKBONE_MULTIPLIER)
    if solver.GS.OPTIMIZER == "sgd":
        optimizer = torch.optim.SGD(groups, solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    else:
        optimizer = torch.optim.AdamW(groups, solver.BASE_LR, betas=(solver.MOMENTUM, 0.999))
    return maybe_add_gradient_clipping(cfg, optimizer)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict):
    """Loads what `optimizer.state_dict()` gave, but keeps the optimizer's own options (weight decay, momentum, ...), so
    that those of a resumed run's config count. The rates are the state's: they are the scheduler's to set.

    Raises:
        ValueError: the state is of other groups of parameters.
    """
    before, now = (
        [len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)
    )
    if before != now:
        raise ValueError(
            f"--resume: the checkpoint's run trained {sum(before)} parameters in {len(before)} groups, and this run "
            f"trains {sum(now)} in {len(now)}. Set what decides this as it was (MODEL.BACKBONE.FREEZE_AT, "
            "SOLVER.GS.BACKBONE_MULTIPLIER, SOLVER.BIAS_LR_FACTOR, SOLVER.WEIGHT_DECAY_NORM), or begin with the "
            "weights alone: MODEL.WEIGHTS path/to/checkpoint.pth without --resume"
        )
    own = [{key: value for key, value in group.items() if key not in _OF_STATE} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)


def _pretrained_part(model: nn.Module) -> set[nn.Parameter]:
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        return set()
    return set(getattr(backbone, "bottom_up", backbone).parameters())


def _slow_down(groups: list[dict], parameters: set[nn.Parameter], factor: float) -> list[dict]:
    """The groups, those of `parameters` apart and with `factor` times the rate."""
    split = []
    for group in groups:
        for is_slow in (False, True):
            members = [parameter for parameter in group["params"] if (parameter in parameters) == is_slow]
            if members:
                split.append({**group, "params": members, "lr": group["lr"] * (factor if is_slow else 1)})
    return split
