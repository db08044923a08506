"""train_net.py from its command line: train, stop and resume, evaluate, and refuse what cannot work."""

import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gs_d2.config import load_config

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/quick/demo.yaml"
OVERRIDES = """
    SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 4 SOLVER.STEPS (3,) SOLVER.CHECKPOINT_PERIOD 2 TEST.EVAL_PERIOD 0
    INPUT.GS.SCALES [1.0,1.5] INPUT.GS.MAX_CROP_SIZE 128 DATALOADER.NUM_WORKERS 0
    MODEL.RPN.BATCH_SIZE_PER_IMAGE 64 TEST.GS.SCORE_THRESH 0.3
""".split()
SCALES = (16, 32, 64, 128)
NUM_PER_GROUP = 64


def train_net(datasets, output, *arguments):
    command = [sys.executable, "train_net.py", "--config-file", CONFIG, *arguments]
    # One thread: on images of 128 x 96 threads wait for each other more than they compute.
    environment = {**os.environ, "DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "OUTPUT_DIR", str(output), *OVERRIDES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def metrics(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def latest(output, key) -> dict:
    """Iteration -> value, the last written for each."""
    return {record["iteration"]: record[key] for record in metrics(output) if key in record}


@pytest.fixture(scope="module")
def trained(drawn_datasets, tmp_path_factory):
    """The output folder of four iterations, and what was printed."""
    output = tmp_path_factory.mktemp("trained")
    result = train_net(drawn_datasets, output)
    assert result.returncode == 0, result.stderr[-3000:]
    return output, result.stdout + result.stderr


@pytest.fixture(scope="module")
def inference(trained):
    return trained[0] / "inference" / "wider_face_val"


def test_training_writes_its_checkpoints_and_metrics(trained):
    output, _ = trained
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 3
    assert torch.load(output / "model_0000001.pth", weights_only=True)["iteration"] == 1
    losses = latest(output, "total_loss")
    assert 3 in losses and losses[3] > 0
    for key in ("loss_rpn_cls", "loss_rpn_loc", "lr"):
        assert latest(output, key)[3] > 0


def test_training_counts_its_samples_by_group(trained):
    output, _ = trained
    (matched, drawn) = (
        {kind: [latest(output, f"groups/{kind}_{stage}@{s}")[0] for s in SCALES] for kind in ("pos", "neg")}
        for stage in ("matched", "sampled")
    )
    assert sum(matched["pos"]) > 0
    for positives, negatives, pos_drawn, neg_drawn in zip(
        matched["pos"], matched["neg"], drawn["pos"], drawn["neg"], strict=True
    ):
        # N of every group, a quarter of it positives at most; means over two images.
        assert pos_drawn <= min(positives, NUM_PER_GROUP // 4) and neg_drawn <= negatives
        assert pos_drawn + neg_drawn == min(NUM_PER_GROUP, positives + negatives)


def test_tensorboard_has_the_groups_and_losses(trained):
    events = EventAccumulator(str(trained[0]))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    for stage in ("pos_matched", "neg_matched", "pos_sampled", "neg_sampled", "loss_cls"):
        assert {f"groups/{stage}@{scale}" for scale in SCALES} <= scalars
    assert {"loss_rpn_cls", "loss_rpn_loc", "total_loss", "lr", "wider_face/all"} <= scalars
    (count,) = {event.step for event in events.Scalars("groups/pos_sampled@16")}
    assert count == 0


def test_training_ends_with_an_evaluation(trained, inference):
    output, printed = trained
    results = json.loads((inference / "results.json").read_text())
    assert results["num_images"] == 4 and results["num_missing"] == 0
    assert all(0 <= results[name] <= 1 for name in ("easy", "medium", "hard", "all", "all_valid"))
    (metric,) = latest(output, "wider_face/all").values()
    assert metric == pytest.approx(100 * results["all"])
    assert (inference / "pr_curve.png").read_bytes().startswith(b"\x89PNG")
    # The metrics are printed with what they depend on.
    assert "WIDER FACE AP of wider_face_val" in printed
    for setting in ("test size original", "score threshold 0.3", "NMS IoU 0.5", "boxes per image 2000"):
        assert setting in printed
    assert re.search(r"\beta: ", printed), "time left"


def test_detections_are_official_files(inference, drawn_datasets):
    files = sorted(path.relative_to(inference / "predictions") for path in (inference / "predictions").rglob("*.txt"))
    images = (drawn_datasets / "widerface" / "WIDER_val" / "images").rglob("*.jpg")
    assert [str(file.with_suffix("")) for file in files] == sorted(f"{p.parent.name}/{p.stem}" for p in images)
    for file in files:
        name, count, *rows = (inference / "predictions" / file).read_text().splitlines()
        assert name == file.stem and int(count) == len(rows) > 0
        values = [[float(value) for value in row.split()] for row in rows]
        assert all(len(row) == 5 and row[0] >= 0 and row[1] >= 0 for row in values)
        assert all(x + w <= 128.001 and y + h <= 96.001 for x, y, w, h, _ in values)
        scores = [row[4] for row in values]
        assert scores == sorted(scores, reverse=True) and scores[-1] >= 0.3


def test_eval_only_gives_the_same_figures(trained, inference, drawn_datasets, tmp_path):
    weights = trained[0] / "model_final.pth"
    result = train_net(drawn_datasets, tmp_path, "--eval-only", "MODEL.WEIGHTS", str(weights))
    assert result.returncode == 0, result.stderr[-3000:]
    again = tmp_path / "inference" / "wider_face_val"
    assert (again / "results.json").read_text() == (inference / "results.json").read_text()
    for file in (inference / "predictions").rglob("*.txt"):
        assert (again / file.relative_to(inference)).read_bytes() == file.read_bytes()
    assert not (tmp_path / "model_final.pth").exists()


def test_eval_only_with_weights_of_another_model_is_refused(trained, drawn_datasets, tmp_path):
    """No metric of random layers; and a pickle is not opened before its flag is given."""
    model = torch.load(trained[0] / "model_final.pth", weights_only=True)["model"]
    backbone = {key: value.numpy() for key, value in model.items() if key.startswith("backbone")}
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"model": backbone, "__author__": "somebody"}))
    for flags, message in (
        ((), "weights.pkl is a pickle, which can run any code: pass allow_pickle=True (train_net.py: --allow-pickle)"),
        (("--allow-pickle",), "weights.pkl does not fit the config's model: it has the weights of a backbone alone"),
    ):
        output = tmp_path / f"output{len(flags)}"
        weights = ("MODEL.WEIGHTS", str(tmp_path / "weights.pkl"))
        result = train_net(drawn_datasets, output, "--eval-only", *flags, *weights)
        assert result.returncode != 0
        assert message in result.stderr.strip().splitlines()[-1]
        assert not (output / "inference").exists()


def test_resume_passes_over_half_a_checkpoint(trained, drawn_datasets, tmp_path):
    for name in ("model_0000001.pth", "last_checkpoint"):
        shutil.copy(trained[0] / name, tmp_path)
    whole = (trained[0] / "model_final.pth").read_bytes()
    (tmp_path / "model_final.pth").write_bytes(whole[: len(whole) // 2])
    result = train_net(drawn_datasets, tmp_path, "--resume")
    assert result.returncode == 0, result.stderr[-3000:]
    printed = result.stdout + result.stderr
    assert re.search(r"model_final\.pth cannot be read.*Resuming from .*model_0000001\.pth", printed)
    assert "Starting training from iteration 2" in printed
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 3
    assert not list(tmp_path.glob("*.part"))


LATERAL = "backbone.fpn_lateral2.weight"


def test_resume_continues_where_a_killed_run_was(trained, drawn_datasets, tmp_path):
    output, _ = trained
    # What is left of a run that was killed in its third iteration: the checkpoint after the second. One weight's
    # momentum is made so large that the two iterations left must show it.
    checkpoint = torch.load(output / "model_0000001.pth", weights_only=True)
    before = checkpoint["model"][LATERAL]
    (momentum,) = (
        state["momentum_buffer"]
        for state in checkpoint["trainer"]["_trainer"]["optimizer"]["state"].values()
        if state["momentum_buffer"].shape == before.shape
    )
    assert momentum.abs().sum() > 0
    momentum[0, 0] = 1000
    torch.save(checkpoint, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")

    result = train_net(drawn_datasets, tmp_path, "--resume")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Starting training from iteration 2" in result.stdout + result.stderr
    assert min(record["iteration"] for record in metrics(tmp_path)) >= 2
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    resumed, whole = (torch.load(folder / "model_final.pth", weights_only=True) for folder in (tmp_path, output))
    assert resumed["iteration"] == whole["iteration"] == 3
    assert latest(tmp_path, "lr")[3] == latest(output, "lr")[3]
    rate = checkpoint["trainer"]["_trainer"]["optimizer"]["param_groups"][0]["lr"]
    moved = (resumed["model"][LATERAL] - before).abs()
    assert moved[0, 0].item() > 0.9 * 1000 * rate
    assert 0 < moved[1:].max().item() < rate * 100


def test_a_missing_data_set_names_the_folder(tmp_path):
    result = train_net(tmp_path / "nowhere", tmp_path / "output")
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert str(tmp_path / "nowhere" / "widerface" / "wider_face_split" / "wider_face_train_bbx_gt.txt") in last
    assert last.startswith("train_net.py: error: DATASETS.TRAIN wider_face_train: There is no list ")
    assert "DETECTRON2_DATASETS" in last and "tools/prepare_wider_face.py" in last
    assert "Traceback" not in result.stderr and not (tmp_path / "output").exists()


def run_here(monkeypatch, *arguments):
    """The command line in this process, for what ends before any work begins."""
    monkeypatch.setattr(sys, "argv", ["train_net.py", *arguments])
    runpy.run_path(str(ROOT / "train_net.py"), run_name="__main__")


@pytest.fixture
def nowhere(tmp_path):
    """Two registered data sets whose files are missing."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from gs_d2.data import register_wider_face

    names = ["nowhere_train", "nowhere_val"]
    for name in names:
        register_wider_face(name, tmp_path / f"{name}.txt", tmp_path / "images")
    yield ("DATASETS.TRAIN", "('nowhere_train',)", "DATASETS.TEST", "('nowhere_val',)")
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("flags", "opts", "message"),
    [
        ((), (), r"DATASETS\.TRAIN nowhere_train: There is no list .*nowhere_train\.txt"),
        (("--num-gpus", "2"), (), r"DATASETS\.TRAIN nowhere_train: There is no list .*nowhere_train\.txt"),
        (("--resume",), ("DATASETS.TRAIN", "('nowher_train',)"), "DATASETS.TRAIN: .*did you mean nowhere_train"),
        (("--eval-only",), (), r"DATASETS\.TEST nowhere_val: There is no list .*nowhere_val\.txt"),
        (("--eval-only",), ("DATASETS.TEST", "()"), r"DATASETS\.TEST is empty: name a data set"),
    ],
)
def test_data_sets_are_looked_at_before_any_process(monkeypatch, tmp_path, nowhere, flags, opts, message, refused):
    monkeypatch.setattr("gs_d2.engine.launch", lambda *args: pytest.fail("started"))
    output = tmp_path / "output"
    with refused(message + r"[^\n]*\n$"):
        run_here(
            monkeypatch,
            *("--config-file", str(ROOT / CONFIG), *flags, "MODEL.WEIGHTS", "x.pth", *nowhere, *opts),
            *("OUTPUT_DIR", str(output)),
        )
    assert not output.exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_read_ends_an_evaluation_in_one_line(
    monkeypatch, drawn_datasets, register, tmp_path, num_workers, refused
):
    shutil.copytree(drawn_datasets / "widerface", tmp_path / "widerface")
    images = tmp_path / "widerface" / "WIDER_val" / "images"
    for image in images.rglob("*.jpg"):
        image.write_bytes(image.read_bytes()[:300])
    name = f"damaged_val_{num_workers}"
    register(name, tmp_path / "widerface/wider_face_split/wider_face_val_bbx_gt.txt", images)
    scope = runpy.run_path(str(ROOT / "train_net.py"), run_name="train_net")
    opts = ["DATASETS.TEST", f"('{name}',)", "DATALOADER.NUM_WORKERS", num_workers, "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config(ROOT / CONFIG, opts)
    with refused(r"WIDER_val/images/\S+\.jpg: cannot be read as an image \([^\n]*\n$"):
        scope["evaluated"](cfg, scope["Trainer"].build_model(cfg))


def test_no_config_file(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, "--num-gpus", "1")
    assert end.value.code == 2
    assert "--config-file is needed, for example configs/quick/demo.yaml" in capsys.readouterr().err


def test_cuda_without_a_gpu(monkeypatch, tmp_path, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused(r"MODEL\.DEVICE is cuda and torch sees no GPU\. Add MODEL\.DEVICE cpu"):
        run_here(
            monkeypatch,
            *("--config-file", str(ROOT / "configs/wider/fpn_finest_sampling.yaml"), "OUTPUT_DIR", str(tmp_path / "x")),
        )
    assert not (tmp_path / "x").exists()


def test_eval_only_minds_no_setting_of_training(monkeypatch, tmp_path, refused):
    """256 samples a group are refused in training, and at test come as far as the missing weights."""
    command = ("--config-file", str(ROOT / CONFIG))
    opts = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "256", "OUTPUT_DIR", str(tmp_path / "x"))
    with refused(r"BATCH_SIZE_PER_IMAGE is Detectron2's default 256"):
        run_here(monkeypatch, *command, *opts)
    with refused("--eval-only needs weights"):
        run_here(monkeypatch, *command, "--eval-only", *opts)
    with refused(r"MODEL\.RPN\.BOUNDARY_THRESH 0: anchors that cross"):
        run_here(monkeypatch, *command, "--eval-only", *opts, "MODEL.RPN.BOUNDARY_THRESH", "0")


def test_eval_only_without_weights(monkeypatch, tmp_path, refused):
    with refused(r"--eval-only needs weights: add MODEL\.WEIGHTS path/to/model_final\.pth"):
        run_here(monkeypatch, "--config-file", str(ROOT / CONFIG), "--eval-only", "OUTPUT_DIR", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_eval_only_with_the_weights_that_training_begins_with(monkeypatch, tmp_path, refused):
    weights = ("MODEL.WEIGHTS", "detectron2://ImageNetPretrained/torchvision/R-50.pkl")
    with refused(r"--eval-only with MODEL\.WEIGHTS detectron2://.*R-50\.pkl, which are a backbone's alone"):
        run_here(monkeypatch, "--config-file", str(ROOT / CONFIG), "--eval-only", *weights)


def test_weights_that_cannot_be_had_are_said_once(monkeypatch, drawn_datasets, tmp_path, generated_train, refused):
    """In one line, before any process; not where a checkpoint is resumed from."""
    monkeypatch.setattr("gs_d2.engine.launch", lambda *_: None)
    data = ("DATASETS.TRAIN", f"('{generated_train}',)", "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path))
    command = ("--config-file", str(ROOT / CONFIG))
    for weights, message in (
        ("detectron2://nowhere/R-50.pkl", r"cannot be downloaded .*tools/convert_torchvision\.py[^\n]*\n$"),
        ("nowhere/R-50.pth", r"MODEL\.WEIGHTS: no such weights: nowhere/R-50\.pth is not there"),
    ):
        opts = (*data, "MODEL.WEIGHTS", weights)
        with refused(message), monkeypatch.context() as offline:
            offline.setattr("gs_d2.checkpoint.PathManager.get_local_path", fail)
            run_here(monkeypatch, *command, *opts)
    (tmp_path / "model_0000001.pth").touch()
    run_here(monkeypatch, *command, "--resume", *opts)


def fail(*_, **__):
    raise OSError("Network is unreachable")


@pytest.mark.parametrize("flag", [(), ("--eval-only",), ("--resume",)])
def test_breaking_defaults_are_refused(monkeypatch, tmp_path, flag, refused):
    with refused(r"MODEL\.RPN\.NMS_THRESH is Detectron2's default 0\.7"):
        run_here(
            monkeypatch,
            *("--config-file", str(ROOT / "configs/wider/fpn_finest_sampling.yaml"), *flag),
            *("MODEL.DEVICE", "cpu", "MODEL.RPN.NMS_THRESH", "0.7", "OUTPUT_DIR", str(tmp_path / "x")),
        )
    assert not (tmp_path / "x").exists()


def test_an_unknown_key_is_named(monkeypatch, refused):
    with refused(r"MODEL\.GS\.SAMPLERS"):
        run_here(monkeypatch, "--config-file", str(ROOT / CONFIG), "MODEL.GS.SAMPLERS", "wrs")


def test_a_config_runs_no_code(monkeypatch, tmp_path, refused):
    (tmp_path / "x.yaml").write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{tmp_path / 'trap'}']\n")
    with refused(r"x\.yaml: .*python/object/apply"):
        run_here(monkeypatch, "--config-file", str(tmp_path / "x.yaml"))
    assert not (tmp_path / "trap").exists()


def test_a_missing_config_file_is_named(monkeypatch, refused):
    with refused(r"configs/none\.yaml"):
        run_here(monkeypatch, "--config-file", "configs/none.yaml")


def test_a_data_set_of_another_benchmark_is_refused():
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog

    from gs_d2.config import add_gs_config
    from gs_d2.engine import Trainer

    cfg = get_cfg()
    add_gs_config(cfg)
    name = next(name for name in DatasetCatalog.list() if name.startswith("lvis"))
    with pytest.raises(ValueError, match=f"no evaluator for {name}, of evaluator_type 'lvis'"):
        Trainer.build_evaluator(cfg, name)
