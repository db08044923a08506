"""CUDA against CPU: the same bits for every op, on random and nasty inputs, in graphs, on any stream."""

import pytest
import torch

from gs_d2 import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NASTY = torch.tensor([0.0, -0.0, 1.0, 1e-20, 1e-45, 1e10, -1e19, 3e38, float("inf"), -float("inf"), float("nan")])


def random_boxes(kind, n, generator):
    if kind == "grid":  # anchors of four scales on a grid: many ties, much to cull
        i = torch.arange(n)
        x, y = i // 4 % 200 * 4.0, i // 800 * 4.0
        half = torch.tensor([8.0, 16.0, 32.0, 64.0])[i % 4]
        return torch.stack([x - half, y - half, x + half, y + half], dim=1)
    if kind == "integers":
        corner, size = torch.randint(0, 30, (2, n, 2), generator=generator).float()
        return torch.cat([corner, corner + size], dim=1)
    boxes = torch.rand(n, 4, generator=generator) * 800
    boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:] / 8
    if kind == "nasty":
        bad = torch.rand(n, 4, generator=generator) < 0.2
        boxes[bad] = NASTY[torch.randint(0, len(NASTY), (int(bad.sum()),), generator=generator)]
    return boxes


def near(boxes, m, generator):
    """Ground truth that overlaps some of `boxes`."""
    chosen = boxes[torch.randint(0, len(boxes), (m,), generator=generator)]
    return chosen + torch.randint(-3, 4, (m, 4), generator=generator)


def to_cuda(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def assert_same(op, *args, **kwargs):
    """Runs `op` on the CPU and on the GPU and compares every result bit for bit."""
    want = op(*args, **kwargs)
    got = op(*map(to_cuda, args), **{name: to_cuda(value) for name, value in kwargs.items()})
    for w, g in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (want, got)), strict=True):
        assert g.is_cuda and g.dtype == w.dtype and torch.equal(g.cpu(), w)


def subsample_inputs(batch, n, num_groups, generator):
    labels = torch.randint(-2, 6, (batch, n), generator=generator).clamp(max=1).to(torch.int8)
    labels[torch.rand(batch, n, generator=generator) < 0.6] = 0
    groups = torch.randint(-1, num_groups + 1, (batch, n), generator=generator)
    losses = torch.rand(batch, n, generator=generator) * 5
    return labels, groups, losses


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("kind", ["grid", "integers", "free", "nasty"])
@pytest.mark.parametrize("m, n", [(1, 1), (7, 1000), (300, 257), (1000, 3), (0, 5), (5, 0), (64, 5000)])
def test_box_iou(kind, m, n, generator):
    boxes1, boxes2 = random_boxes(kind, m, generator), random_boxes(kind, n, generator)
    assert_same(ops.box_iou, boxes1, boxes2)
    assert_same(ops.box_iou, boxes1[::2], boxes2.flip(0))


def test_box_iou_of_more_than_2_to_31_pairs(generator):
    if torch.cuda.get_device_properties(0).total_memory < 2**34:
        pytest.skip("needs 16 GB")
    boxes = random_boxes("free", 70_000, generator)
    ious = ops.box_iou(boxes.cuda(), boxes[:40_000].cuda())
    rows = torch.tensor([0, 1, 35_000, 60_000, 69_999])
    assert torch.equal(ious[rows.cuda()].cpu(), ops.box_iou(boxes[rows], boxes[:40_000]))


@pytest.mark.parametrize("kind", ["grid", "integers", "free", "nasty"])
@pytest.mark.parametrize("second_pass", ["none", "best", "all"])
@pytest.mark.parametrize("m, n", [(0, 100), (1, 1), (40, 255), (300, 5000), (1000, 100_000)])
def test_two_pass_match(kind, second_pass, m, n, generator):
    anchors = random_boxes(kind, n, generator)
    gts = near(anchors, m, generator)
    ignores = random_boxes(kind, 20, generator)
    assert_same(ops.two_pass_match, gts, anchors, second_pass=second_pass)
    assert_same(ops.two_pass_match, gts, anchors, second_pass=second_pass, low=0.1, ignore_boxes=ignores)


@pytest.mark.parametrize("anchors_per_image", [False, True])
def test_two_pass_match_of_a_batch(anchors_per_image, generator):
    anchors = torch.stack([random_boxes("free", 3000, generator) for _ in range(4)])
    gts = torch.cat([near(a, m, generator) for a, m in zip(anchors, (0, 3, 400, 20), strict=True)])
    arguments = {
        "gt_offsets": torch.tensor([0, 0, 3, 403, 423]),
        "ignore_boxes": random_boxes("free", 30, generator),
        "ignore_offsets": torch.tensor([0, 10, 10, 29, 30]),
    }
    assert_same(ops.two_pass_match, gts, anchors if anchors_per_image else anchors[0], **arguments)


def test_two_pass_match_of_more_images_than_a_grid_has_rows(generator):
    anchors = random_boxes("integers", 5, generator)
    gts = near(anchors, 70_000, generator)
    assert_same(ops.two_pass_match, gts, anchors, gt_offsets=torch.arange(70_001))


def test_two_pass_match_of_more_than_2_to_31_pairs(generator):
    anchors = random_boxes("free", 500_000, generator)
    assert_same(ops.two_pass_match, near(anchors, 5000, generator), anchors)


def test_two_pass_match_of_boxes_that_are_not_aligned(generator):
    flat = torch.rand(4001, generator=generator) * 50
    boxes = flat[1:].view(-1, 4)  # starts 4 bytes after a 16-byte boundary
    boxes[:, 2:] += boxes[:, :2]
    on_gpu = flat.cuda()[1:].view(-1, 4)
    want, got = ops.two_pass_match(boxes[:9], boxes), ops.two_pass_match(on_gpu[:9], on_gpu)
    assert all(torch.equal(w, g.cpu()) for w, g in zip(want, got, strict=True))


def test_offsets_that_lie_are_harmless(generator):
    anchors = random_boxes("integers", 1000, generator).cuda()
    gts = near(anchors.cpu(), 50, generator).cuda()
    for lies in ([5, -7, 2**62], [-(2**63), 2**63 - 1, 3], [50, 0, 50], [0, 10**9, 1]):
        offsets = torch.tensor(lies).cuda()
        for second_pass in ("best", "all"):
            arguments = {"gt_offsets": offsets, "ignore_boxes": gts, "ignore_offsets": offsets}
            result = ops.two_pass_match(gts, anchors, second_pass=second_pass, **arguments)
            assert 0 <= int(result.matched_idxs.min()) and int(result.matched_idxs.max()) < 50


@pytest.mark.parametrize("method", ["random", "wrs", "ohem", "ohem_all"])
@pytest.mark.parametrize(
    "batch, n, num_groups, num_per_group",
    [
        (1, 1, 1, 1),
        (2, 257, 3, 8),
        (3, 10_000, 4, 512),
        (1, 20_000, 1024, 4),
        (1, 1000, 2, 2**31 - 1),
        (2, 500, 3, 0),
    ],
)
def test_group_subsample(method, batch, n, num_groups, num_per_group, generator):
    labels, groups, losses = subsample_inputs(batch, n, num_groups, generator)
    losses[:, ::7] = torch.tensor(float("nan"))
    arguments = {"num_groups": num_groups, "num_per_group": num_per_group, "method": method}
    arguments["losses"] = None if method == "random" else losses
    for seed in (0, -1, 2**63 - 1, torch.tensor(12345)):
        assert_same(ops.group_subsample, labels, groups, seed=seed, first_image=3, **arguments)
    assert_same(ops.group_subsample, labels, groups[0], seed=1, positive_fraction=1.0, **arguments)


def test_group_subsample_where_all_losses_are_equal(generator):
    labels, groups, losses = subsample_inputs(2, 200_000, 2, generator)
    losses.fill_(0.25)
    arguments = {"num_groups": 2, "num_per_group": 5000, "losses": losses, "seed": 0}
    assert_same(ops.group_subsample, labels, groups, method="ohem", **arguments)
    assert_same(ops.group_subsample, labels, groups, method="ohem_all", **arguments)
    assert_same(ops.group_subsample, labels, groups, method="wrs", **arguments)


def test_group_subsample_of_many_images(generator):
    labels, groups, _ = subsample_inputs(70_000, 5, 1, generator)
    assert_same(ops.group_subsample, labels, groups, num_groups=1, num_per_group=2, seed=7)


def test_devices_must_agree(generator):
    boxes = random_boxes("free", 8, generator)
    labels, groups, losses = subsample_inputs(1, 8, 1, generator)
    sample = {"num_groups": 1, "num_per_group": 2, "seed": 0}
    with pytest.raises(RuntimeError, match=r"^box_iou: boxes2 must be on the same device as boxes1, cuda:0, got cpu$"):
        ops.box_iou(boxes.cuda(), boxes)
    with pytest.raises(
        RuntimeError, match=r"^two_pass_match: anchors must be on the same device as gt_boxes, cuda:0, got cpu$"
    ):
        ops.two_pass_match(boxes.cuda(), boxes)
    with pytest.raises(RuntimeError, match="gt_offsets must be on the same device"):
        ops.two_pass_match(boxes.cuda(), boxes.cuda(), gt_offsets=torch.tensor([0, 8]))
    with pytest.raises(RuntimeError, match="group_idxs must be on the same device"):
        ops.group_subsample(labels.cuda(), groups, **sample)
    with pytest.raises(RuntimeError, match="losses must be on the same device"):
        ops.group_subsample(labels.cuda(), groups.cuda(), method="wrs", losses=losses, **sample)
    with pytest.raises(RuntimeError, match="seed must be on the same device"):
        ops.group_subsample(labels.cuda(), groups.cuda(), **{**sample, "seed": torch.tensor(0)})


def test_memory_that_runs_out_is_torchs_own_error():
    boxes = torch.zeros(1, 4, device="cuda").expand(10**6, 4)
    with pytest.raises(torch.OutOfMemoryError, match=r"^box_iou: IoUs .*: CUDA out of memory\. Tried to allocate 3725"):
        ops.box_iou(boxes, boxes)
    with pytest.raises(RuntimeError, match=r"CUDA out of memory\. "):
        torch.compile(ops.box_iou, fullgraph=True, backend="aot_eager")(boxes, boxes)


def match_and_sample(gts, anchors, offsets, groups, losses, seed):
    match = ops.two_pass_match(gts, anchors, gt_offsets=offsets, ignore_boxes=gts, ignore_offsets=offsets)
    sampling = {"num_groups": 4, "num_per_group": 64, "method": "wrs", "losses": losses, "seed": seed}
    return (
        *match,
        ops.group_subsample(match.match_labels, groups, **sampling),
        ops.box_iou(gts, anchors[:50]),
    )


def pipeline_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    anchors = random_boxes("grid", 6000, generator)
    gts = near(anchors, 40, generator)
    groups = torch.arange(6000) % 4
    return (
        gts,
        anchors,
        torch.tensor([0, 25, 40]),
        groups,
        torch.rand(2, 6000, generator=generator),
        torch.tensor(seed),
    )


def assert_pipeline(results, seed):
    for got, want in zip(results, match_and_sample(*pipeline_inputs(seed)), strict=True):
        assert torch.equal(got.cpu(), want)


def test_nothing_waits_for_the_device():
    inputs = [t.cuda() for t in pipeline_inputs(1)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = match_and_sample(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_pipeline(results, 1)


def test_graph_capture_and_replay():
    inputs = [t.cuda() for t in pipeline_inputs(1)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        match_and_sample(*inputs)  # warm-up
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = match_and_sample(*inputs)
    for seed in (2, 3, 2):
        for on_gpu, fresh in zip(inputs, pipeline_inputs(seed), strict=True):
            on_gpu.copy_(fresh)
        graph.replay()
        assert_pipeline(results, seed)


def test_work_goes_to_the_current_stream():
    fresh = [t.cuda() for t in pipeline_inputs(5)]
    inputs = [torch.zeros_like(t) for t in fresh]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # on any other stream the kernels would run before the copies
        for target, source in zip(inputs, fresh, strict=True):
            target.copy_(source)
        results = match_and_sample(*inputs)
    stream.synchronize()
    assert_pipeline(results, 5)


def test_results_repeat():
    inputs = [t.cuda() for t in pipeline_inputs(6)]
    first = match_and_sample(*inputs)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, match_and_sample(*inputs), strict=True))


def test_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert_pipeline(match_and_sample(*(t.to("cuda:1") for t in pipeline_inputs(7))), 7)


def test_opcheck_and_autocast():
    gts, anchors, offsets, groups, losses, seed = (t.cuda() for t in pipeline_inputs(8))
    torch.library.opcheck(torch.ops.gs_d2.box_iou.default, (gts, anchors))
    arguments = (gts, anchors, offsets, gts, offsets, 0.4, 0.6, 1, 0.5)
    torch.library.opcheck(torch.ops.gs_d2.two_pass_match.default, arguments)
    labels = torch.randint(-1, 2, (2, 6000)).to(torch.int8).cuda()
    arguments = (labels, groups, losses, seed, 0, 0, 4, 64, 0.25, 1)
    torch.library.opcheck(torch.ops.gs_d2.group_subsample.default, arguments)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert_pipeline(match_and_sample(gts, anchors, offsets, groups, losses, seed), 8)
