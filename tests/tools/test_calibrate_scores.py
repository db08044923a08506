"""calibrate_scores.py: what it writes can be loaded, and differs in the layer of logits alone."""

import re
from pathlib import Path

import pytest
import torch
from calibrate_scores import main
from detectron2.modeling import build_model

from gs_d2.config import load_config
from gs_d2.weights import read_weights

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "quick" / "demo.yaml")
OPTS = ["TEST.GS.PYRAMID", "False", "INPUT.MIN_SIZE_TEST", "0", "TEST.GS.SCORE_THRESH", "0.0"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": build_model(load_config(CONFIG, ["MODEL.DEVICE", "cpu"])).state_dict()}, path)
    return str(path)


@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_only_the_logits_change(weights, generated_train, tmp_path, capsys, name):
    output = str(tmp_path / name)
    half = name.endswith("safetensors")
    main([
        "--config-file", CONFIG, "--dataset", generated_train, "--output", output, *["--half"] * half,
        "MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cpu", *OPTS,
    ])  # fmt: skip
    before, after = read_weights(weights)["model"], read_weights(output)["model"]
    assert before.keys() == after.keys()
    changed = {k for k in before if not torch.allclose(before[k].float(), after[k].float(), rtol=1e-2, atol=1e-3)}
    assert changed and all(k.startswith("proposal_generator.rpn_head.objectness_logits") for k in changed)
    assert (after["backbone.fpn_lateral2.weight"].dtype == torch.float16) == half
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["scale", "detections", "faces", "gain", "offset"]
    assert [line.split()[0] for line in lines[1:5]] == ["16", "32", "64", "128"]
    assert sum(int(line.split()[2]) for line in lines[1:5]) > 0


def test_balanced_scales(weights, generated_train, tmp_path, capsys):
    output = str(tmp_path / "c.pth")
    arguments = ["--config-file", CONFIG, "--dataset", generated_train, "--output", output, "--balance", "16", "0"]
    main([*arguments, "--images", "3", "MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cpu", *OPTS])
    lines = capsys.readouterr().out.splitlines()
    before, after = map(float, re.fullmatch(r"Balanced scales: mean AP (\S+) % -> (\S+) %", lines[0]).groups())
    assert before <= after
    assert re.fullmatch(r"Score threshold 0\.5: precision \S+ %, recall \S+ %", lines[1])
    assert lines[2].split() == ["scale", "detections", "faces", "gain", "offset"]


@pytest.mark.parametrize("heights", [["-1"], ["nan"], ["10", "inf"], ["5000"]])
def test_heights_that_cannot_be(weights, generated_train, tmp_path, capsys, heights):
    arguments = ["--config-file", CONFIG, "--dataset", generated_train, "--output", str(tmp_path / "c.pth")]
    with pytest.raises(SystemExit) as end:
        main([
            *arguments, "--balance", *heights, "--images", "2", "MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cpu", *OPTS
        ])  # fmt: skip
    assert end.value.code == 2
    assert re.search(r"--balance must be heights|no face that is at least 5000 px high", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TEST.GS.PYRAMID", "True"], "calibrated at one scale: set TEST.GS.PYRAMID False"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_what_cannot_be_calibrated(weights, generated_train, tmp_path, capsys, opts, message):
    arguments = ["--config-file", CONFIG, "--dataset", generated_train, "--output", str(tmp_path / "c.pth")]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cpu", *OPTS, *opts])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_two_stages_cannot_be_calibrated(tmp_path, capsys):
    config = CONFIG.replace("demo.yaml", "two_stage.yaml")
    with pytest.raises(SystemExit):
        main(["--config-file", config, "--dataset", "x", "--output", "c.pth", "MODEL.DEVICE", "cpu", *OPTS])
    assert "only single-stage detectors with anchors can be calibrated, not GroupedFastRCNN" in capsys.readouterr().err
