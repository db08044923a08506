"""Every config's model on a CUDA device that is only pretended: where would the host wait for it, or copy to it?

PyTorch's fake tensors have shapes, types and a device, but no values. With them the forward half of a training step and
inference run here as on a GPU, except for kernels. A mixture of devices is an error. Whatever needs a value from the
device, which the host would wait for, is recorded and gets a made-up answer; so are copies between host and device.
"""

import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model, poolers
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gs_d2.config import load_config
from gs_d2.modeling import GroupLoss

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
QUICK = (
    "wider/fpn_finest_sampling.yaml",
    "coco/retinanet_sampling_wrs.yaml",
    "wider_gs.yaml",
    "pipelines/centernet.yaml",
)
SIZE = (192, 256)
COUNT = 2  # images, and rows of what the device would have counted: so that counts by image add up
aten = torch.ops.aten

# Where the host waits for the device, in training of two stages and in inference, and what for.
OF_PROPOSALS = {
    "gs_d2/decoding.py:top_boxes": "how many boxes are above the threshold",
    "gs_d2/nms.py:_kept_by_chunks": "how many boxes NMS has left, and whether that is enough",
    "gs_d2/nms.py:top_nms_of_groups": "whether each scale has its number of boxes",
    "gs_d2/sampling.py:first_of_each_group": "how many boxes each scale has",
}
OF_SECOND_STAGE = {
    "gs_d2/roi_heads.py:GroupedHeads.losses": "how many samples there are: the head looks at no other proposals",
    "gs_d2/roi_heads.py:_boxes_of_rows": "how many samples each image has, which RoIAlign is told",
}
OF_INFERENCE = {
    **OF_PROPOSALS,
    "gs_d2/roi_heads.py:GroupedHeads.predict_candidates": "how many boxes are above the threshold",
    "gs_d2/retinanet.py:GroupSamplingRetinaNet._best_of_map": "how many boxes are above the threshold",
    "gs_d2/centernet.py:heat_peaks": "how many cells are peaks",
    "detectron2/boxes.py:Boxes.clip": "Detectron2 asserts that boxes are finite",
    "detectron2/boxes.py:Boxes.__getitem__": "Detectron2 drops empty boxes at the end",
    "detectron2/instances.py:Instances.__getitem__": "as Boxes.__getitem__",
}


class PretendedDevice(TorchDispatchMode):
    """Records waits and copies as (what, function of gs_d2 or Detectron2 that asked for it)."""

    def __init__(self):
        super().__init__()
        self.waits, self.copies = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func is aten._local_scalar_dense.default:
            if on_device(args[0]):
                self.waits.add(("item", caller()))
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        if func is torch.ops.torchvision.nms.default:
            self.waits.add(("nms", caller()))
            return args[0].new_empty(min(COUNT, len(args[0])), dtype=torch.int64)
        if func is aten.nonzero.default and on_device(args[0]):
            self.waits.add(("nonzero", caller()))
            return args[0].new_empty((min(COUNT, args[0].numel()), args[0].dim()), dtype=torch.int64)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            indices = [self._as_rows(x) for x in args[1]]
            args = (args[0], [x for rows in indices for x in rows], *args[2:])
        if func in (aten.bincount.default, aten._unique2.default, aten.masked_select.default, aten.equal.default):
            if any(map(on_device, args)):
                self.waits.add((name, caller()))
            if func is aten.bincount.default:
                return args[0].new_empty(max(kwargs.get("minlength", 0), *args[2:], 1), dtype=torch.int64)
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if func is aten.copy_.default else args[0]
            target = args[0].device if func is aten.copy_.default else kwargs.get("device", source.device)
            waits_not = kwargs.get("non_blocking", False) or (func is aten.copy_.default and len(args) > 2 and args[2])
            if source.device.type != target.type:
                if on_device(source):
                    self.waits.add(("copy to host", caller()))
                elif not waits_not:
                    self.copies.add(("copy to device", caller()))
        return func(*args, **kwargs)

    def _as_rows(self, index):
        """A mask as the rows that it selects, some number of them."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        if on_device(index):
            self.waits.add(("mask", caller()))
        return [index.new_zeros(min(COUNT, index.shape[0]), dtype=torch.int64) for _ in range(index.dim())]


def on_device(x):
    return isinstance(x, torch.Tensor) and x.device.type == "cuda"


def caller():
    """The innermost function of gs_d2 or Detectron2 on the stack, as file:function."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "gs_d2" in path.parts[-4:-1] or "detectron2" in path.parts:
            if path.name != Path(__file__).name:
                package = "detectron2" if "detectron2" in path.parts else "gs_d2"
                return f"{package}/{path.name}:{getattr(frame.f_code, 'co_qualname', frame.f_code.co_name)}"
        frame = frame.f_back
    return "test"


def pad_and_stack(tensors, size_divisibility=0, pad_value=0.0, **_):
    """Detectron2's ImageList.from_tensors for images of one size; that of 0.5 reads sizes from tensors."""
    height, width = tensors[0].shape[-2:]
    step = max(size_divisibility, 1)
    padding = (0, -width % step, 0, -height % step)
    batch = torch.stack([torch.nn.functional.pad(x, padding, value=pad_value) for x in tensors])
    return ImageList(batch, [(height, width)] * len(tensors))


def boxes_with_image_indices(box_lists):
    """What Detectron2's pooler gives to RoIAlign; that of the official main branch waits for the device itself, in
    torch.repeat_interleave, which pretended tensors cannot."""
    rows = [torch.cat([x.tensor.new_full((len(x), 1), i), x.tensor], dim=1) for i, x in enumerate(box_lists)]
    return torch.cat(rows)


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(poolers, "convert_boxes_to_pooler_format", boxes_with_image_indices)
    monkeypatch.setattr(ImageList, "from_tensors", staticmethod(pad_and_stack))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    for name in ("normal_", "uniform_"):  # weights have no values here, so none are drawn
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, **kwargs: self)


def pretended(config, *opts):
    """The config's model with fake weights on a pretended device, and the mode that it lives in."""
    model = build_model(load_config(ROOT / config, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *opts]))
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(x):
        with mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    for module in model.modules():
        for name, x in list(module._parameters.items()):
            if x is not None:
                module._parameters[name] = torch.nn.Parameter(fake(x), requires_grad=x.requires_grad)
        for name, x in list(module._buffers.items()):
            if x is not None:
                module._buffers[name] = fake(x)
    return model, mode


def images(training):
    batch = []
    for _ in range(COUNT):
        image = {"image": torch.empty(3, *SIZE, dtype=torch.uint8, device="cuda")}
        if training:
            instances = Instances(SIZE)
            instances.gt_boxes = Boxes(torch.empty(4, 4, device="cuda"))
            instances.gt_classes = torch.empty(4, dtype=torch.int64, device="cuda")
            image |= {"instances": instances, "ignore_boxes": Boxes(torch.empty(2, 4, device="cuda"))}
        batch.append(image)
    return batch


def training(model, mode):
    with mode, PretendedDevice() as device, EventStorage(1):  # statistics are logged every 20 iterations
        losses = model.train()(images(training=True))
        assert losses and all(on_device(x) and x.dim() == 0 for x in losses.values())
    return device


@pytest.mark.parametrize(
    "config", [pytest.param(x, marks=() if x.removeprefix("configs/") in QUICK else pytest.mark.slow) for x in CONFIGS]
)
def test_waits_and_copies(config, stand_ins):
    model, mode = pretended(config)
    device = training(model, mode)
    assert not device.copies
    allowed = {**OF_PROPOSALS, **OF_SECOND_STAGE} if hasattr(model, "roi_heads") else {}
    assert {function for _, function in device.waits} <= set(allowed)
    with mode, PretendedDevice() as device, torch.no_grad():
        results = model.eval()(images(training=False))
        assert len(results) == COUNT and on_device(results[0]["instances"].scores)
    assert not device.copies
    assert {function for _, function in device.waits} <= set(OF_INFERENCE)


@pytest.mark.parametrize(
    ("fault", "kind", "what"),
    [
        (lambda labels: labels.cpu(), "waits", "copy to host"),
        (lambda labels: labels.sum().item(), "waits", "item"),
        (lambda labels: labels.nonzero(), "waits", "nonzero"),
        (lambda labels: labels[labels == 1], "waits", "mask"),
        (lambda labels: torch.tensor([1.0, 2.0], device="cpu").to(labels.device), "copies", "copy to device"),
    ],
    ids=["cpu", "item", "nonzero", "mask", "to"],
)
def test_a_fault_in_the_label_path_is_seen(fault, kind, what, stand_ins, monkeypatch):
    model, mode = pretended("configs/wider/fpn_finest_sampling_r18.yaml")
    match = GroupLoss.match

    def faulty(self, *args):
        matches = match(self, *args)
        fault(matches.labels)
        return matches

    monkeypatch.setattr(GroupLoss, "match", faulty)
    device = training(model, mode)
    assert [x for x, _ in getattr(device, kind)] == [what]


def test_devices_that_do_not_match_are_an_error(stand_ins, monkeypatch):
    model, mode = pretended("configs/wider/fpn_finest_sampling_r18.yaml")
    match = GroupLoss.match
    moved = lambda self, *args: match(self, *args)._replace(labels=torch.ones(1, 1, dtype=torch.int8, device="cpu"))  # noqa: E731
    monkeypatch.setattr(GroupLoss, "match", moved)
    with pytest.raises(RuntimeError, match="device"):
        training(model, mode)
