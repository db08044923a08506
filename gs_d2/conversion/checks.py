"""Whether published tensors are those that a network has: by name, shape and value."""

from pathlib import Path

import torch

from gs_d2.weights import read_weights

_SHOWN = 6  # names listed in one message


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file (.pth). Nothing in it is executed.

    Raises:
        FileNotFoundError, ValueError: as :func:`gs_d2.weights.read_weights`.
    """
    return {name: torch.as_tensor(value) for name, value in read_weights(path)["model"].items()}


def problems_of(found: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """What keeps tensors from being those expected by name and shape; each must be of finite floating-point numbers."""
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"missing {listed(missing)}")
    if unknown := [name for name in found if name not in expected]:
        problems.append(f"unknown {listed(unknown)}")
    both = [name for name in expected if name in found]
    if misshapen := [
        f"{name} {tuple(found[name].shape)} instead of {expected[name]}"
        for name in both
        if tuple(found[name].shape) != expected[name]
    ]:
        problems.append(f"of another shape {listed(misshapen)}")
    elif unusable := [name for name in both if not is_finite(found[name])]:
        problems.append(f"not finite floating-point numbers {listed(unusable)}")
    return problems


def is_finite(tensor) -> bool:
    """Whether a tensor is plain, on the CPU, and of floating-point numbers that are all finite."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
    return plain and bool(torch.isfinite(tensor.detach().float()).all())


def listed(names) -> str:
    """The first few, and how many more."""
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
