"""analyze_model.py: the paper's metrics to within 0.5 %, counts made by hand, and nothing skipped unsaid."""

from pathlib import Path

import pytest
import torch
from analyze_model import main
from detectron2.modeling import RPN_HEAD_REGISTRY
from torch import nn

from gs_d2.analysis.complexity import analyze
from gs_d2.config import load_config
from gs_d2.modeling import SoftmaxRPNHead

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICK = str(CONFIGS / "quick" / "demo.yaml")
R18 = CONFIGS / "wider" / "fpn_finest_sampling_r18.yaml"

# Tables 10, 11 and 15, in G multiply-adds and M parameters.
PAPER = {
    ("fpn", "feature extraction"): 52.42,
    ("fpn", "RPN head"): 36.50,
    ("fpn", "total"): 88.92,
    ("fpn_finest_sampling", "feature extraction"): 52.42,
    ("fpn_finest_sampling", "RPN head"): 28.91,
    ("fpn_finest_sampling", "total"): 81.33,
    ("fpn_finest_sampling", "parameters"): 27.1,
    ("../pipelines/centernet", "total, output size"): 98.61,
    ("fpn_finest_sampling_r18", "total"): 29.73,
    ("fpn_finest_sampling_r18", "parameters"): 12.5,
    ("fpn_finest_sampling_r152", "total"): 155.7,
    ("fpn_finest_sampling_r152", "parameters"): 61.7,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def analysed():
    names = dict.fromkeys(name for name, _ in PAPER)
    return {name: analyze(load_config(CONFIGS / "wider" / f"{name}.yaml"), (800, 800)) for name in names}


@pytest.mark.parametrize(("name", "metric"), PAPER)
def test_the_papers_metrics(analysed, name, metric):
    assert analysed[name].metrics[metric] == pytest.approx(PAPER[name, metric], rel=0.005)
    assert analysed[name].not_counted == {}


def test_finest_is_cheaper_than_fpn_by_the_heads_difference(analysed):
    """The paper's S1 - S2 (section 6), whose 1026 - 189 c' is of c' = c = 256 and of heads without biases."""
    difference = analysed["fpn_finest_sampling"].metrics["RPN head"] - analysed["fpn"].metrics["RPN head"]
    assert difference == pytest.approx((1026 - 189 * 256) * 256 * 200 * 200 / 64 / 1e9)


def test_prints_the_papers_tables(analysed, monkeypatch, run_command):
    by_depth = {(50, 1): "fpn_finest_sampling", (50, 4): "fpn", (18, 1): "fpn_finest_sampling_r18"}
    by_depth[152, 1] = "fpn_finest_sampling_r152"

    def known(cfg, size):
        assert size == (800, 800)
        if cfg.MODEL.META_ARCHITECTURE == "CenterNet":
            return analysed["../pipelines/centernet"]
        return analysed[by_depth[cfg.MODEL.RESNETS.DEPTH, len(cfg.MODEL.RPN.IN_FEATURES)]]

    monkeypatch.setattr("analyze_model.analyze", known)
    status, out, err = run_command(main)
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["11", "FPN", "RPN", "head", "36.5", "G", "36.38", "G", "-0.32%"] in lines
    assert ["15", "Ours(R152)", "parameters", "61.7", "M", "61.71", "M", "+0.01%"] in lines
    assert "unused ImageNet fc layer: centernet 0.513 M, fpn_finest_sampling_r18 0.513 M, fpn 2.049 M" in out
    assert ["10", "CenterNet", "(R18)", "total,", "output", "size", "98.61", "G", "98.60", "G", "-0.01%"] in lines
    assert out.count("output size") == out.count("centernet: 98.60 G where") == 1
    assert "55.35 G at that of their input" in out
    _, out, _ = run_command(main, "--tasks", "parameter")
    assert [line.split()[-6] for line in out.splitlines()[1:4]] == ["parameters"] * 3 and "88.92" not in out

    monkeypatch.setattr("analyze_model.PAPER", [("11", "FPN", "wider/fpn.yaml", {"total": 90.0})])
    status, _, err = run_command(main)
    assert status == 1 and "table 11, FPN: total is not the paper's, to within 0.5%" in err


def test_a_config_at_a_size_with_overrides(run_command):
    """The ResNet's first convolution alone is 64 x 32 x 48 x 147; the size is padded to the detector's stride of 32."""
    status, printed, _ = run_command(main, "--config-file", R18, "--size", 60, 70, "MODEL.FPN.OUT_CHANNELS", 32)
    assert status == 0
    assert "64 x 96 (height x width)" in printed and "fc layer: 0.513 M" in printed
    found = analyze(load_config(R18, ["MODEL.FPN.OUT_CHANNELS", "32"]), (60, 70))
    cells = 8 * 12
    head = cells * (9 * 32 * 32 + 24 * 32)
    laterals = 32 * cells * (128 + 256 / 4 + 512 / 16)
    upsampling = 4 * 32 * cells * (1 + 1 / 4)
    assert found.metrics["RPN head"] * 1e9 == pytest.approx(head + laterals + upsampling)
    assert [line.split()[-2] for line in printed.splitlines()[:4]] == [f"{x:.2f}" for x in found.metrics.values()]


def test_transposed_convolutions_are_counted_at_both_sizes(run_command):
    """3 x 2 cells at stride 32: 16 C C' multiply-adds for each cell of a transposed convolution's input."""
    config, opts = CONFIGS / "pipelines" / "centernet.yaml", ["MODEL.FPN.OUT_CHANNELS", "32"]
    found = analyze(load_config(config, opts), (64, 96))
    transposed = 16 * 6 * (512 * 32 + 4 * 32 * 32 + 16 * 32 * 32)
    norms = 2 * 6 * 32 * (4 + 16 + 64)
    heads = 6 * 64 * (3 * 9 * 32 * 64 + 5 * 64)
    assert found.not_counted == {}
    assert found.metrics["RPN head"] * 1e9 == pytest.approx(transposed + norms + heads)
    more = found.metrics["total, output size"] - found.metrics["total"]
    assert more * 1e9 == pytest.approx(3 * transposed)
    status, printed, _ = run_command(main, "--config-file", config, "--size", 64, 96, *opts)
    assert status == 0 and f"{found.metrics['total']:.2f} G at that of their input, where they multiply" in printed
    assert "output size" not in "".join(analyze(load_config(R18), (64, 96)).metrics)


def test_frozen_or_not_is_the_same():
    """BatchNorm counts alike whether it is frozen, and whichever of the net's stages are."""
    frozen, trained = (
        analyze(load_config(R18, ["MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", freeze]), (64, 64))
        for norm, freeze in (("FrozenBN", 2), ("BN", 0))
    )
    assert frozen == trained


class _Unseen(nn.Module):
    def forward(self, x):
        return torch.matrix_exp(x)


@pytest.fixture
def unseen_head():
    """A head with an operation that fvcore has no count for."""

    class UnseenHead(SoftmaxRPNHead):
        def forward(self, features):
            return super().forward([_Unseen()(feature) for feature in features])

    UnseenHead.__name__ = "TestAnalyzeUnseenHead"
    RPN_HEAD_REGISTRY.register(UnseenHead)
    yield UnseenHead.__name__
    RPN_HEAD_REGISTRY._obj_map.pop(UnseenHead.__name__)


def test_what_is_not_counted_is_said(unseen_head, run_command):
    status, _, err = run_command(main, "--config-file", QUICK, "--size", 64, 64, "MODEL.RPN.HEAD_NAME", unseen_head)
    assert status == 1 and "demo.yaml: too low, for nothing counts aten::" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "nowhere.yaml"], "nowhere.yaml"),
        (["--config-file", QUICK, "MODEL.DEPHT", "1"], "Non-existent key: MODEL.DEPHT"),
        (["--config-file", QUICK, "--size", "0", "64"], "the size must be positive, got 0 64"),
        (
            ["--config-file", QUICK, "MODEL.META_ARCHITECTURE", "SemanticSegmentor"],
            "only CenterNet and models with an RPN can be analysed, not SemanticSegmentor here",
        ),
    ],
    ids=["no such config", "unknown key", "size", "no RPN"],
)
def test_what_cannot_be_analysed(run_command, arguments, message):
    status, _, err = run_command(main, *arguments)
    assert status == 2 and ": error: " in err and message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--size", "64", "64"], ["MODEL.FPN.OUT_CHANNELS", "64"]])
def test_the_papers_tables_take_no_settings(run_command, arguments):
    status, _, err = run_command(main, *arguments)
    assert status == 2 and "need --config-file" in err
