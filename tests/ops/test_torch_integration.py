"""What torch promises of a registered op: opcheck, compile, autograd, autocast, threads and instruction sets."""

import os
import subprocess
import sys

import pytest
import torch
from cases import grid_anchors, random_boxes, random_losses

from gs_d2 import ops


def sample_inputs(device):
    generator = torch.Generator().manual_seed(0)
    gts, anchors = random_boxes(6, generator).to(device), random_boxes(300, generator).to(device)
    offsets = torch.tensor([0, 2, 6], device=device)
    labels = torch.randint(-1, 2, (2, 300), generator=generator, dtype=torch.int8).to(device)
    groups = torch.randint(0, 3, (300,), generator=generator).to(device)
    losses = random_losses(600, generator).view(2, 300).to(device)
    seed = torch.tensor(3, device=device)
    match = torch.ops.gs_d2.two_pass_match.default
    draw = torch.ops.gs_d2.group_subsample.default
    return [
        (torch.ops.gs_d2.box_iou.default, (gts, anchors)),
        (match, (gts, anchors, None, None, None, 0.4, 0.6, 1, 0.5)),
        (match, (gts, anchors, offsets, gts, offsets, 0.4, 0.6, 2, 0.5)),
        (match, (gts, anchors.expand(2, -1, -1), offsets, None, None, 0.4, 0.6, 0, 0.5)),
        (draw, (labels, groups, None, None, 1, 0, 3, 20, 0.25, 0)),
        (draw, (labels, groups, losses, seed, 0, 2, 3, 20, 0.25, 1)),
        (draw, (labels[0], groups, losses[0], None, 1, 0, 3, 20, 0.25, 2)),
        (draw, (labels, groups, losses, None, 1, 0, 3, 20, 0.25, 3)),
    ]


@pytest.mark.parametrize("case", range(8))
def test_opcheck(device, case):
    op, arguments = sample_inputs(device)[case]
    torch.library.opcheck(op, arguments)


def match_and_sample(gts, anchors, groups, losses, seed, method="wrs"):
    match = ops.two_pass_match(gts, anchors)
    sampled = ops.group_subsample(
        match.match_labels, groups, num_groups=4, num_per_group=32, method=method, losses=losses, seed=seed
    )
    return match.matched_idxs, sampled, (sampled >= 0).sum()


@pytest.mark.parametrize("method", ["wrs", "ohem_all"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_gives_eagers_result(dynamic, method):
    compiled = torch.compile(match_and_sample, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    generator = torch.Generator().manual_seed(1)
    for rows in (20, 24):
        anchors = grid_anchors(rows, 20)
        groups = torch.arange(len(anchors)) % 4
        losses = torch.rand(len(anchors), generator=generator)
        arguments = (random_boxes(9, generator), anchors, groups, losses, torch.tensor(5), method)
        for a, e in zip(compiled(*arguments), match_and_sample(*arguments), strict=True):
            assert torch.equal(a, e)


def test_no_gradient(device):
    boxes = random_boxes(5, torch.Generator().manual_seed(0)).to(device).requires_grad_()
    assert not ops.box_iou(boxes, boxes).requires_grad
    assert not ops.two_pass_match(boxes, boxes).max_ious.requires_grad


def test_autocast_does_not_change_results(device):
    generator = torch.Generator().manual_seed(2)
    gts, anchors = random_boxes(9, generator).to(device), random_boxes(500, generator).to(device)
    groups, losses = torch.arange(500, device=device) % 4, torch.rand(500, generator=generator).to(device)
    expected = match_and_sample(gts, anchors, groups, losses, 3)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = match_and_sample(gts, anchors, groups, losses, 3)
        half = ops.box_iou(gts.bfloat16(), anchors)
    assert half.dtype == torch.float32
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


DIGEST = """
import hashlib, torch
from gs_d2 import ops
from cases import grid_anchors, nasty_boxes, random_losses
torch.set_num_threads({threads})
generator = torch.Generator().manual_seed(4)
digest = hashlib.sha256()
for anchors in (grid_anchors(90, 90), nasty_boxes(5001, generator)):
    gts = nasty_boxes(70, generator)
    results = [*ops.two_pass_match(gts, anchors, low=0.3, second_pass="all", ignore_boxes=gts[:9])]
    results.append(ops.box_iou(gts, anchors))
    labels = torch.randint(-1, 2, (len(anchors),), generator=generator, dtype=torch.int8)
    for method in ("random", "wrs", "ohem", "ohem_all"):
        losses = None if method == "random" else random_losses(len(anchors), generator)
        results.append(ops.group_subsample(labels, torch.arange(len(anchors)) % 5, num_groups=4, num_per_group=300,
                                           method=method, losses=losses, seed=9))
    for result in results:
        digest.update(result.contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def test_same_bits_for_every_instruction_set_and_number_of_threads():
    digests = {}
    for capability in ("baseline", "avx2", "avx512"):  # one that the machine lacks falls back to what it has
        for threads in (1, 2, 3):
            output = subprocess.run(
                [sys.executable, "-c", DIGEST.format(threads=threads)],
                env={
                    **os.environ,
                    "GS_D2_CPU_CAPABILITY": capability,
                    "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]),
                },
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            digests[capability, threads] = output
    assert len(set(digests.values())) == 1, digests
