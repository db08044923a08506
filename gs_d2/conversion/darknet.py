"""Darknet's weights of Darknet-53 or YOLOv3, by the names of our detector (configs/pipelines/yolov3.yaml).

Which net a file holds is told by its size, to the byte: Darknet-53 without (darknet53.conv.74) or with its ImageNet
classifier (darknet53.weights), or YOLOv3 (yolov3.weights) of any number of classes. The classifier and YOLOv3's
predictions are left out, for ours are of another meaning; YOLOv3's neck is taken.
"""

import struct
from pathlib import Path

import numpy as np
import torch

from gs_d2.conversion.checks import listed
from gs_d2.conversion.converted import Converted
from gs_d2.modeling.pipelines.darknet import Darknet53
from gs_d2.modeling.pipelines.yolov3 import YOLOv3Neck

MAPS = ["res3", "res4", "res5"]
NUM_CLASSES = 1000  # of ImageNet
_LEAST_VARIANCE = -1e-6  # a variance that rounding made negative is none

CONFIG = """\
MODEL:
  WEIGHTS: {{weights}}
  PIXEL_MEAN: [0.0, 0.0, 0.0]  # Darknet's images are in [0, 1]
  PIXEL_STD: [255.0, 255.0, 255.0]
  RESNETS:
    STEM_OUT_CHANNELS: {stem_channels}
INPUT:
  FORMAT: "RGB\""""


def convert_file(path: Path, stem_channels: int = 32) -> Converted:
    """
    Args:
        path: a file of Darknet's.
        stem_channels: channels of the net's first convolution.

    Raises:
        FileNotFoundError, ValueError: naming the file, if its size is of neither net, or what in it is not usable.
    """
    if stem_channels < 2 or stem_channels % 2:
        raise ValueError(f"--stem-channels must be even and at least 2, got {stem_channels}")
    values = read(path)
    with torch.device("meta"):  # only names and shapes are wanted of it
        bottom_up = Darknet53(MAPS, stem_channels, norm="BN")
        neck = YOLOv3Neck(bottom_up, MAPS, norm="BN")
    levels = neck.output_shape()
    backbone_convs = [("bottom_up", bottom_up)]
    neck_convs = [(name, getattr(neck, name)) for name in sorted(levels, reverse=True)]  # Darknet begins at the coarse
    in_backbone, in_neck = (_size(modules) for modules in (backbone_convs, neck_convs))
    classifier = NUM_CLASSES * (32 * stem_channels + 1)
    per_output = sum(shape.channels + 1 for shape in levels.values())
    num_outputs, rest = divmod(len(values) - in_backbone - in_neck, per_output)
    if len(values) in (in_backbone, in_backbone + classifier):
        kind, modules, num_outputs = "Darknet-53", backbone_convs, 0
        left_out = "" if len(values) == in_backbone else f"the classifier ({NUM_CLASSES} classes)"
    elif rest == 0 and num_outputs > 0:
        kind, modules = "YOLOv3", backbone_convs + neck_convs
        left_out = f"the predictions ({num_outputs} channels at each stride)"
    else:
        sizes = {
            "Darknet-53": in_backbone,
            "with its classifier": in_backbone + classifier,
            "YOLOv3 of COCO": in_backbone + in_neck + 255 * per_output,
        }
        raise ValueError(
            f"{path}: holds {len(values):,} numbers behind its header, which is neither net's: "
            + ", ".join(f"{name} has {size:,}" for name, size in sizes.items())
            + "; is it cut short, or of another net or width (--stem-channels)?"
        )
    if not_finite := len(values) - int(np.isfinite(values).sum()):
        raise ValueError(f"{path}: {not_finite:,} of its numbers are NaN or infinite")

    tensors, position = {}, 0
    for name, module in modules:
        for parameter, shape in _layers(module):
            size = int(np.prod(shape))
            value = torch.from_numpy(values[position : position + size].reshape(shape).copy())
            tensors[f"backbone.{name}.{parameter}"] = value
            position += size
        if name != "bottom_up":  # behind each level stand the biases and weights of its predictions
            position += num_outputs * (levels[name].channels + 1)
    variances = {name: value for name, value in tensors.items() if name.endswith("running_var")}
    if negative := [name for name, value in variances.items() if value.min() < _LEAST_VARIANCE]:
        raise ValueError(f"{path}: negative variances in {listed(negative)}; are these weights of this net?")
    return Converted(
        title=kind,
        content={"model": tensors},
        config=CONFIG.format(stem_channels=stem_channels),
        file_name="yolov3.pth" if kind == "YOLOv3" else "darknet53.pth",
        left_out=left_out,
    )


def read(path: Path) -> np.ndarray:
    """The numbers of a file of Darknet's, little-endian: float32 [n], without its header.

    The header is three int32, major, minor and revision, and the number of images seen in training, an int64 since
    version 0.2 and an int32 before.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = path.read_bytes()
    try:
        major, minor, _ = struct.unpack_from("<3i", content)
        seen = "q" if major * 10 + minor >= 2 and major < 1000 and minor < 1000 else "i"
        header = struct.calcsize(f"<3i{seen}")
        if not (0 <= major < 1000 and 0 <= minor < 1000):
            raise ValueError(f"{path}: not Darknet's: its first numbers say version {major}.{minor}")
        struct.unpack_from(f"<{seen}", content, 12)
    except struct.error as error:
        raise ValueError(f"{path}: ends within its header, after {len(content)} bytes") from error
    if (len(content) - header) % 4:
        raise ValueError(
            f"{path}: {len(content):,} bytes, of which {header} are the header, are no whole number of float32; "
            "is it cut short?"
        )
    return np.frombuffer(content, dtype="<f4", offset=header)


def _layers(module):
    """Names and shapes in the order of a file: for each convolution BatchNorm's values, then the weights."""
    convs = [(name, conv) for name, conv in module.named_modules() if isinstance(conv, torch.nn.Conv2d)]
    for name, conv in convs:
        prefix, values = f"{name}." if name else "", conv.state_dict()
        for parameter in ("norm.bias", "norm.weight", "norm.running_mean", "norm.running_var", "weight"):
            yield prefix + parameter, tuple(values[parameter].shape)


def _size(modules):
    return sum(int(np.prod(shape)) for _, module in modules for _, shape in _layers(module))
