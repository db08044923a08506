"""`FDDBEvaluator` and `FaceEvalEvaluator` on made-up outputs: equal to tools/evaluate.py on the files they wrote."""

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

import gs_d2.modeling  # noqa: F401  (registers the detectors)
from gs_d2.config import add_gs_config
from gs_d2.data import register_face_eval, register_fddb
from gs_d2.evaluation import FaceEvalEvaluator, FDDBEvaluator
from gs_d2.formats.face_eval import read_annotations, read_detections

ROOT = Path(__file__).parents[2]
NAMES = {"fddb": "evaluator_test_fddb", "afw": "evaluator_test_afw", "pascal_face": "evaluator_test_pascal_face"}
IMAGES = {"fddb": "originalPics", "afw": "testimages", "pascal_face": "images"}


def register(root):
    register_fddb(NAMES["fddb"], root / "fddb/FDDB-folds", root / "fddb/originalPics")
    for benchmark in ("afw", "pascal_face"):
        folder = root / benchmark
        register_face_eval(NAMES[benchmark], benchmark, folder / "annotations", folder / IMAGES[benchmark])


@pytest.fixture
def datasets(made_up_benchmarks):
    register(made_up_benchmarks)
    yield made_up_benchmarks
    for name in NAMES.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def evaluator_of(benchmark, *args, **kwargs):
    return (FDDBEvaluator if benchmark == "fddb" else FaceEvalEvaluator)(NAMES[benchmark], *args, **kwargs)


def inputs_and_outputs(benchmark):
    """As the mapper and a detector give them; scores are equal across images, and the last image has no detection."""
    rng = np.random.default_rng(1)
    inputs, outputs = [], []
    dicts = DatasetCatalog.get(NAMES[benchmark])
    for i, image in enumerate(dicts):
        with Image.open(image["file_name"]) as picture:
            width, height = picture.size
        inputs.append({"image_id": image["image_id"], "height": height, "width": width})
        near = image["gt_boxes"].repeat(3, axis=0)
        near = near + rng.normal(size=near.shape) * 3
        near[::2] = np.floor(near[::2]) + 0.4996  # the files have .500, which is another pixel of FDDB's masks
        far = rng.uniform(0, 50, (4, 2))
        boxes = np.concatenate([near, np.concatenate([far, far + rng.uniform(15, 40, (4, 2))], axis=1)])
        boxes = boxes if i < len(dicts) - 1 else boxes[:0]
        instances = Instances((height, width), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
        instances.scores = torch.tensor(rng.integers(1, 6, len(boxes)) / 7.0, dtype=torch.float32)
        outputs.append({"instances": instances})
    return inputs, outputs


def run_tool(benchmark, root, output, *arguments):
    metrics = output / "tool.json"
    command = [benchmark, "--predictions", output / "detections.txt", "--json", metrics, *arguments]
    command += ["--ground-truth", root / benchmark / ("FDDB-folds" if benchmark == "fddb" else "annotations")]
    evaluate.main([str(argument) for argument in command])
    return json.loads(metrics.read_text())


def percents(summary):
    """The metrics of `evaluate` from those of a JSON."""
    if "ap" in summary:
        return {"ap": 100 * summary["ap"]}
    return {f"{kind}@{count}": 100 * rate for kind in ("disc_tpr", "cont_tpr") for count, rate in summary[kind].items()}


CASES = [
    ("fddb", {}, []),
    ("fddb", {"fit_ellipses": True}, ["--fit-ellipses"]),
    ("afw", {}, []),
    ("afw", {"y_shift": 0.2}, ["--y-shift", "0.2"]),
    ("pascal_face", {}, []),
]


@pytest.mark.parametrize(("benchmark", "options", "arguments"), CASES)
def test_metrics_are_those_of_the_tool(datasets, tmp_path, caplog, benchmark, options, arguments):
    evaluator = evaluator_of(benchmark, str(tmp_path), setting={"test size": "original"}, **options)
    inputs, outputs = inputs_and_outputs(benchmark)
    with caplog.at_level(logging.INFO):
        evaluator.process([{"image_id": "stale"}], outputs[:1])
        evaluator.reset()
        for image, output in zip(inputs, outputs, strict=True):
            evaluator.process([image], [output])
        results = evaluator.evaluate()
        assert evaluator.evaluate() == results
    assert list(results) == [benchmark]
    metrics = results[benchmark]
    if benchmark == "fddb":
        arguments = [*arguments, "--images", datasets / "fddb" / "originalPics"]
    again = run_tool(benchmark, datasets, tmp_path, *arguments)
    saved = json.loads((tmp_path / "results.json").read_text())
    setting = saved.pop("setting")
    assert setting == {"test size": "original", **again.pop("setting")}
    assert saved == again
    assert metrics == percents(saved)
    assert all(5 < value < 95 for value in metrics.values())

    line = "setting: " + ", ".join(f"{name} {value}" for name, value in setting.items())
    assert line.startswith("setting: test size original, ") and line in caplog.text
    assert "1 of" not in caplog.text, "no image is missing"
    expected = {"fddb": "sizes of 5 of 5 images known", "afw": "y-shift 0", "pascal_face": "refinement scale"}
    assert expected[benchmark] in line
    if benchmark == "fddb":
        assert ("fitted ellipses" in line) == bool(options)
    curve = "roc_curve" if benchmark == "fddb" else "pr_curve"
    assert (tmp_path / f"{curve}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / f"{curve}s.npz").is_file()


def test_image_sizes_clip(datasets, tmp_path):
    """With the true sizes the rates differ from those of estimated ones, each as the tool's with and without images."""
    inputs, outputs = inputs_and_outputs("fddb")
    metrics = {}
    for known in (True, False):
        output = tmp_path / str(known)
        evaluator = evaluator_of("fddb", str(output))
        keys = ("image_id", "height", "width") if known else ("image_id",)
        evaluator.process([{key: image[key] for key in keys} for image in inputs], outputs)
        metrics[known] = evaluator.evaluate()["fddb"]
        arguments = ["--images", datasets / "fddb" / "originalPics"] if known else []
        assert metrics[known] == percents(run_tool("fddb", datasets, output, *arguments))
        assert ("estimated" in (output / "results.json").read_text()) != known
    assert metrics[True]["cont_tpr@2000"] != metrics[False]["cont_tpr@2000"]


def test_official_formats(datasets, tmp_path):
    boxes = Boxes(torch.tensor([[1.25, 2.0, 11.5, 32.125], [3.0, 4.0, 50.0, 60.0]]))
    instances = Instances((100, 100), pred_boxes=boxes, scores=torch.tensor([0.25, 0.5]))
    for benchmark, image_id in (("fddb", "2003/1/big/img_2"), ("afw", "2_afw")):
        evaluator = evaluator_of(benchmark, str(tmp_path / benchmark))
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
        evaluator.evaluate()
    assert (tmp_path / "fddb" / "detections.txt").read_text().splitlines() == [
        "2003/1/big/img_2",
        "2",
        "3.000 4.000 47.000 56.000 0.50000000",
        "1.250 2.000 10.250 30.125 0.25000000",
    ]
    assert (tmp_path / "afw" / "detections.txt").read_text().splitlines() == [
        "2_afw 0.50000000 3.000 4.000 50.000 60.000",
        "2_afw 0.25000000 1.250 2.000 11.500 32.125",
    ]


@pytest.mark.parametrize("benchmark", NAMES)
def test_images_not_processed_and_nothing_detected(datasets, caplog, benchmark):
    inputs, outputs = inputs_and_outputs(benchmark)
    evaluator = evaluator_of(benchmark)
    evaluator.process([*inputs[:2], {"image_id": "unknown"}], [*outputs[:2], outputs[0]])
    partly = evaluator.evaluate()[benchmark]
    assert f"{len(inputs) - 2} of {len(inputs)} images of {NAMES[benchmark]} were not processed" in caplog.text
    assert "1 images are not in the ground truth, the first is unknown" in caplog.text
    full = evaluator_of(benchmark)
    full.process(inputs, outputs)
    metric = "ap" if benchmark != "fddb" else "disc_tpr@2000"
    assert partly[metric] < full.evaluate()[benchmark][metric]

    empty = Instances((100, 100), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    evaluator.reset()
    evaluator.process(inputs, [{"instances": empty}] * len(inputs))
    assert set(evaluator.evaluate()[benchmark].values()) == {0.0}


@pytest.mark.parametrize("benchmark", ["fddb", "afw"])
def test_nan_is_refused_with_the_image(datasets, benchmark):
    inputs, outputs = inputs_and_outputs(benchmark)
    outputs[0]["instances"].scores[3] = float("nan")
    with pytest.raises(ValueError, match=f"{inputs[0]['image_id']}: 1 detections"):
        evaluator_of(benchmark).process(inputs[:1], outputs[:1])


def test_published_detector(shared_data, tmp_path):
    """Through data set and evaluator, the published detections give the published metric."""
    name, annotations = "evaluator_test_published", shared_data / "afw_pascal" / "new_annotations_AFW.mat"
    detections = read_detections(shared_data / "afw_pascal" / "detections" / "AFW" / "DPM.txt")
    register_face_eval(name, "afw", annotations, tmp_path)
    try:
        for image in read_annotations(annotations, "afw").boxes:
            (tmp_path / f"{image}.jpg").touch()
        evaluator = FaceEvalEvaluator(name, distributed=False)
        for image, rows in detections.items():
            instances = Instances((1, 1), pred_boxes=Boxes(torch.tensor(rows[:, :4])), scores=torch.tensor(rows[:, 4]))
            evaluator.process([{"image_id": image}], [{"instances": instances}])
        assert round(evaluator.evaluate()["afw"]["ap"], 2) == 97.21
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _run_process(rank, port, root, output_dir, queue):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    register(root)
    results = {}
    for benchmark in NAMES:
        evaluator = evaluator_of(benchmark, str(output_dir / benchmark))
        inputs, outputs = inputs_and_outputs(benchmark)
        evaluator.process(inputs[rank::2], outputs[rank::2])
        results[benchmark] = evaluator.evaluate()
    queue.put((rank, results))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads, which Detectron2 keeps a group of, now and then abort an orderly exit


def test_two_processes_give_the_metrics_of_one(datasets, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (port, datasets, tmp_path / "two", queue)
    torch.multiprocessing.start_processes(_run_process, arguments, nprocs=2, start_method="spawn")
    results = dict(queue.get() for _ in range(2))
    assert results[1] == {benchmark: {} for benchmark in NAMES}
    for benchmark in NAMES:
        evaluator = evaluator_of(benchmark, str(tmp_path / "one" / benchmark))
        evaluator.process(*inputs_and_outputs(benchmark))
        assert results[0][benchmark] == evaluator.evaluate()
        for name in ("detections.txt", "results.json"):
            one, two = (tmp_path / folder / benchmark / name for folder in ("one", "two"))
            assert one.read_bytes() == two.read_bytes()


def test_train_net_evaluates_all_three(made_up_benchmarks, tmp_path):
    """From the command line, with the weights of an untrained model."""
    config = "configs/quick/demo.yaml"
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file(str(ROOT / config))
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    command = f"train_net.py --config-file {config} --eval-only MODEL.WEIGHTS {tmp_path / 'model.pth'} OUTPUT_DIR"
    command += f" {tmp_path / 'out'} DATALOADER.NUM_WORKERS 0 TEST.GS.SCORE_THRESH 0.0 DATASETS.TEST"
    done = subprocess.run(
        [sys.executable, *command.split(), "('fddb', 'afw', 'pascal_face')"],
        cwd=ROOT,
        env={**os.environ, "DETECTRON2_DATASETS": str(made_up_benchmarks), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-3000:]
    for benchmark, title in (("fddb", "FDDB"), ("afw", "AFW"), ("pascal_face", "PASCAL faces")):
        output = tmp_path / "out" / "inference" / benchmark
        saved = json.loads((output / "results.json").read_text())
        assert saved["num_detections"] > 0 and saved["num_unknown"] == 0
        assert saved["setting"]["test size"] == "original"
        assert f"{title} " in printed and f"copypaste: Task: {benchmark}" in printed
        arguments = ["--images", made_up_benchmarks / "fddb" / "originalPics"] if benchmark == "fddb" else []
        again = run_tool(benchmark, made_up_benchmarks, output, *arguments)
        assert again.pop("setting").items() <= saved.pop("setting").items()
        assert saved == again
