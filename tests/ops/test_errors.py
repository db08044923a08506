"""What the ops say when they refuse their arguments, and what they raise where memory runs out."""

import re

import pytest
import torch

from gs_d2 import ops

BOXES = torch.tensor([[0.0, 0, 4, 4], [2, 2, 8, 8]])
LABELS, GROUPS = torch.zeros(5, dtype=torch.int8), torch.zeros(5, dtype=torch.int64)
OFFSETS = torch.tensor([0, 2])
MANY = torch.zeros(1, 4).expand(2**31, 4)  # takes no memory


def iou(boxes1=BOXES, boxes2=BOXES):
    return ops.box_iou(boxes1, boxes2)


def match(gt_boxes=BOXES, anchors=BOXES, **arguments):
    return ops.two_pass_match(gt_boxes, anchors, **arguments)


def sample(match_labels=LABELS, group_idxs=GROUPS, **arguments):
    return ops.group_subsample(match_labels, group_idxs, **{"num_groups": 1, "num_per_group": 2, **arguments})


NAMES = {iou: "box_iou", match: "two_pass_match", sample: "group_subsample"}
# Every check of csrc/ops/check.h and of the Python around it, but for those of devices (test_cuda.py).
REFUSED = [
    *((iou, name, bad) for name in ("boxes1", "boxes2") for bad in (BOXES[0], BOXES[:, :3], BOXES.int(), MANY)),
    *((match, "gt_boxes", bad) for bad in (BOXES[0], BOXES[:, :3], BOXES.bool(), MANY)),
    *((match, "anchors", bad) for bad in (BOXES[0], BOXES[:, :3], BOXES.short(), MANY, BOXES[None], BOXES[None, None])),
    *((match, "gt_offsets", bad) for bad in (OFFSETS.int(), OFFSETS[0], OFFSETS[:0], OFFSETS[None], OFFSETS + 1)),
    *((match, "gt_offsets", bad) for bad in (torch.tensor([0, 2, 1, 2]), torch.tensor([0, 1]), torch.tensor([-1, 2]))),
    *((match, "ignore_boxes", bad) for bad in (BOXES[0], BOXES.to(torch.uint8), BOXES.to(torch.complex64), MANY)),
    *((match, "ignore_offsets", bad) for bad in (OFFSETS, OFFSETS.int())),
    *((match, name, bad) for name in ("low", "high", "ignore_thresh") for bad in (0.0, 1.1, -1.0, float("nan"), 1e-50)),
    (match, "low", 0.7),
    *((match, "second_pass", bad) for bad in ("low", 1, ["best"])),
    *((sample, "match_labels", bad) for bad in (LABELS.long(), LABELS.float(), LABELS[0], LABELS[None, None])),
    *((sample, "match_labels", LABELS[0].expand(shape)) for shape in ((2**31,), (2**31, 5))),
    *((sample, "group_idxs", bad) for bad in (GROUPS.int(), GROUPS.double(), GROUPS[:4], GROUPS[None], GROUPS[0])),
    *((sample, "num_groups", bad) for bad in (0, 1025)),
    *((sample, "num_per_group", bad) for bad in (-1, 2**31)),
    *((sample, "positive_fraction", bad) for bad in (-0.1, 1.1, float("nan"))),
    *((sample, "method", bad) for bad in ("focal", 1, ["wrs"])),
    *((sample, "losses", bad) for bad in (torch.ones(5),)),
    *((sample, "seed", bad) for bad in (torch.tensor(1.0), torch.tensor([1]), 2**63, -(2**63) - 1)),
    *((sample, "first_image", bad) for bad in (-1, 2**31 - 1, 2**63 - 1)),
]


def assert_plain(message, op, argument):
    assert re.match(rf"{op}: {argument} .*(must|need) .*", message), message
    assert not re.search(r"Byte|Char|Short|Int|Long|Float|Double|Bool|Complex", message), message
    assert not re.search(r"csrc|\.h\b|\.cpp\b|/", message), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("call", "argument", "value"),
    REFUSED,
    ids=[f"{NAMES[call]}-{argument}-{i}" for i, (call, argument, _) in enumerate(REFUSED)],
)
def test_a_message_names_op_and_argument_and_no_source(call, argument, value):
    with pytest.raises((RuntimeError, ValueError)) as error:
        call(**{argument: value})
    assert_plain(str(error.value), NAMES[call], argument)


@pytest.mark.parametrize(
    ("call", "argument", "arguments"),
    [
        (match, "ignore_offsets", {"ignore_boxes": BOXES, "gt_offsets": OFFSETS}),
        (match, "ignore_offsets", {"ignore_boxes": BOXES, "gt_offsets": OFFSETS, "ignore_offsets": OFFSETS.float()}),
        (match, "ignore_offsets", {"ignore_boxes": BOXES, "gt_offsets": OFFSETS, "ignore_offsets": OFFSETS[:1]}),
        (match, "ignore_offsets", {"ignore_boxes": BOXES, "gt_offsets": OFFSETS, "ignore_offsets": OFFSETS + 1}),
        (match, "anchors", {"anchors": BOXES.expand(3, 2, 4), "gt_offsets": OFFSETS}),
        *((sample, "losses", {"method": method}) for method in ("wrs", "ohem", "ohem_all")),
        *((sample, "losses", {"method": "wrs", "losses": bad}) for bad in (LABELS, torch.ones(4), torch.ones(1, 5))),
        (sample, "group_idxs", {"match_labels": LABELS[None], "group_idxs": GROUPS.expand(2, 5)}),
    ],
)
def test_a_message_about_arguments_that_do_not_fit_each_other(call, argument, arguments):
    with pytest.raises(RuntimeError) as error:
        call(**arguments)
    assert_plain(str(error.value), NAMES[call], argument)


def test_a_wrong_second_pass_or_method_number():
    """Of which the functions know the names only: from those who call torch.ops themselves."""
    for number in (-1, 3):
        with pytest.raises(RuntimeError) as error:
            torch.ops.gs_d2.two_pass_match(BOXES, BOXES, None, None, None, 0.4, 0.6, number, 0.5)
        assert_plain(str(error.value), "two_pass_match", "second_pass")
    for number in (-1, 4):
        with pytest.raises(RuntimeError) as error:
            torch.ops.gs_d2.group_subsample(LABELS, GROUPS, None, None, 0, 0, 1, 1, 0.25, number)
        assert_plain(str(error.value), "group_subsample", "method")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.bool, torch.complex128])
def test_dtypes_are_called_as_in_python(dtype):
    for refused in (BOXES.to(dtype), torch.zeros(2, 4, dtype=dtype, device="meta")):
        with pytest.raises(RuntimeError, match=f"^box_iou: boxes1 must be float32, got {dtype}$"):
            iou(refused)


@pytest.mark.parametrize(
    ("call", "argument", "arguments"),
    [
        (iou, "boxes1", {"boxes1": BOXES.long()}),
        (iou, "boxes2", {"boxes2": BOXES[0]}),
        (match, "gt_boxes", {"gt_boxes": BOXES.long()}),
        (match, "anchors", {"anchors": BOXES[0]}),
        (match, "anchors", {"anchors": BOXES.long()}),
        (sample, "match_labels", {"match_labels": LABELS.long()}),
        (sample, "match_labels", {"match_labels": LABELS[0]}),
        (sample, "group_idxs", {"group_idxs": GROUPS.int()}),
    ],
)
def test_meta_tensors_are_refused_in_the_words_of_the_kernels(call, argument, arguments):
    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError) as error:
            call(**{name: value.to(device) for name, value in arguments.items()})
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert_plain(messages[0], NAMES[call], argument)


@pytest.mark.parametrize(
    "call",
    [
        lambda: iou([[0.0, 0, 1, 1]]),
        lambda: match(ignore_boxes=[[0.0, 0, 1, 1]]),
        lambda: sample(method="wrs", losses=[1.0] * 5),
        lambda: sample(num_per_group=1.5),
        lambda: sample(seed=1.5),
    ],
)
def test_what_is_no_tensor_or_integer_is_torchs_to_refuse(call):
    with pytest.raises(RuntimeError, match=r"^gs_d2::\w+\(\) Expected a value of type '.*' for argument '\w+'"):
        call()


# Memory


def torch_error(shape, dtype):
    with pytest.raises(RuntimeError) as error:
        torch.empty(shape, dtype=dtype)
    return error.value


LARGE = torch.zeros(1, 4).expand(10**9, 4)
LARGE_LABELS, LARGE_GROUPS = LABELS[0].expand(2**30, 2**31 - 1), GROUPS[0].expand(2**31 - 1)


@pytest.mark.parametrize(
    ("call", "what", "shape", "dtype"),
    [
        (lambda: iou(LARGE, LARGE), "box_iou: IoUs", (10**9, 10**9), torch.float32),
        (
            lambda: match(BOXES[:0], LARGE, gt_offsets=OFFSETS[0].expand(10**8)),
            "two_pass_match: matched_idxs",
            (10**8 - 1, 10**9),
            torch.int64,
        ),
        (  # a copy of what is not contiguous
            lambda: sample(LARGE_LABELS, LARGE_GROUPS),
            "group_subsample: match_labels",
            (2**30, 2**31 - 1),
            torch.int8,
        ),
    ],
)
def test_memory_that_runs_out_is_torchs_own_error(call, what, shape, dtype):
    expected = torch_error(shape, dtype)
    with pytest.raises(RuntimeError) as error:
        call()
    assert type(error.value) is type(expected)
    words = re.search(r"DefaultCPUAllocator: can't allocate memory: you tried to allocate \d+ bytes", str(expected))[0]
    assert str(error.value) == f"{what} of shape {shape}: {words}"


def test_results_that_no_memory_can_hold():
    boxes = MANY[: 2**31 - 1]
    assert "overflowed" in str(torch_error((2**31 - 1, 2**31 - 1), torch.float32))
    with pytest.raises(RuntimeError, match=r"^box_iou: IoUs of shape \(2147483647, 2147483647\) must take less than 2"):
        iou(boxes, boxes)


def test_compiled_code_runs_out_of_memory_in_the_same_words():
    with pytest.raises(RuntimeError) as expected:
        iou(LARGE, LARGE)
    with pytest.raises(RuntimeError) as error:
        torch.compile(ops.box_iou, fullgraph=True, backend="aot_eager")(LARGE, LARGE)
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize(("call", "op"), [(iou, "box_iou"), (match, "two_pass_match"), (sample, "group_subsample")])
def test_cuda_memory_that_runs_out_is_recognised(call, op, monkeypatch):
    """What the CUDA kernels throw (csrc/ops/errors.h) stood in for: no GPU is needed to see what becomes of it."""
    packet, failures = getattr(torch.ops.gs_d2, op), []
    kernel, message = packet.default, f"{op}: scratch of shape (7,): CUDA out of memory. Tried to allocate 28.00 GiB."

    def fails_once(*arguments):
        if not failures:
            failures.append(arguments)
            raise RuntimeError(message)
        return kernel(*arguments)

    monkeypatch.setattr(packet, "default", fails_once)
    with pytest.raises(torch.OutOfMemoryError) as error:
        call()
    assert str(error.value) == message
    failures.clear()
    result = pytest.importorskip("detectron2.utils.memory").retry_if_cuda_oom(call)()
    assert len(failures) == 1 and result is not None


def test_other_errors_stay_what_they_are(monkeypatch):
    for raised in (
        RuntimeError("box_iou: CUDA error: an illegal memory access"),
        torch.OutOfMemoryError("CUDA out of memory. "),
    ):

        def fails(*arguments, raised=raised):
            raise raised

        monkeypatch.setattr(torch.ops.gs_d2.box_iou, "default", fails)
        with pytest.raises(RuntimeError) as error:
            iou()
        assert error.value is raised
