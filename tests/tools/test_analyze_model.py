"""analyze_model.py: the paper's figures to within 0.5 %, counts made by hand, and nothing skipped unsaid."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import RPN_HEAD_REGISTRY
from torch import nn

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


@pytest.fixture(scope="module")
def tool(load_script):
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_script("tools/analyze_model.py")
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def analysed(tool):
    names = dict.fromkeys(name for name, _ in PAPER)
    return {name: tool.analyze(load_config(CONFIGS / "wider" / f"{name}.yaml"), (800, 800)) for name in names}


@pytest.mark.parametrize(("name", "figure"), PAPER)
def test_the_papers_figures(analysed, name, figure):
    assert analysed[name].figures[figure] == pytest.approx(PAPER[name, figure], rel=0.005)
    assert analysed[name].not_counted == {}


def test_finest_is_cheaper_than_fpn_by_the_heads_difference(analysed):
    """The paper's S1 - S2 (section 6), whose 1026 - 189 c' is of c' = c = 256 and of heads without biases."""
    difference = analysed["fpn_finest_sampling"].figures["RPN head"] - analysed["fpn"].figures["RPN head"]
    assert difference == pytest.approx((1026 - 189 * 256) * 256 * 200 * 200 / 64 / 1e9)


def test_prints_the_papers_tables(tool, analysed, monkeypatch, capsys):
    by_depth = {(50, 1): "fpn_finest_sampling", (50, 4): "fpn", (18, 1): "fpn_finest_sampling_r18"}
    by_depth[152, 1] = "fpn_finest_sampling_r152"

    def analyze(cfg, size):
        assert size == (800, 800)
        if cfg.MODEL.META_ARCHITECTURE == "CenterNet":
            return analysed["../pipelines/centernet"]
        return analysed[by_depth[cfg.MODEL.RESNETS.DEPTH, len(cfg.MODEL.RPN.IN_FEATURES)]]

    monkeypatch.setattr(tool, "analyze", analyze)
    assert tool.main([]) == 0
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines()]
    assert ["11", "FPN", "RPN", "head", "36.5", "G", "36.38", "G", "-0.32%"] in lines
    assert ["15", "Ours(R152)", "parameters", "61.7", "M", "61.71", "M", "+0.01%"] in lines
    assert "unused ImageNet fc layer: centernet 0.513 M, fpn_finest_sampling_r18 0.513 M, fpn 2.049 M" in printed.out
    assert ["10", "CenterNet", "(R18)", "total,", "output", "size", "98.61", "G", "98.60", "G", "-0.01%"] in lines
    assert printed.out.count("output size") == printed.out.count("centernet: 98.60 G where") == 1
    assert "55.35 G at that of their input" in printed.out
    assert printed.err == ""

    monkeypatch.setattr(tool, "PAPER", [("11", "FPN", "wider/fpn.yaml", {"total": 90.0})])
    assert tool.main([]) == 2
    assert "table 11, FPN: total is not the paper's, to within 0.5%" in capsys.readouterr().err


def test_a_config_at_a_size_with_overrides(tool, capsys):
    """The ResNet's first convolution alone is 64 x 32 x 48 x 147; the size is padded to the detector's stride of 32."""
    assert tool.main(["--config-file", str(R18), "--size", "60", "70", "MODEL.FPN.OUT_CHANNELS", "32"]) == 0
    printed = capsys.readouterr().out
    assert "64 x 96 (height x width)" in printed and "fc layer: 0.513 M" in printed
    found = tool.analyze(load_config(R18, ["MODEL.FPN.OUT_CHANNELS", "32"]), (60, 70))
    cells = 8 * 12
    head = cells * (9 * 32 * 32 + 24 * 32)
    laterals = 32 * cells * (128 + 256 / 4 + 512 / 16)
    upsampling = 4 * 32 * cells * (1 + 1 / 4)
    assert found.figures["RPN head"] * 1e9 == pytest.approx(head + laterals + upsampling)
    assert [line.split()[-2] for line in printed.splitlines()[:4]] == [f"{x:.2f}" for x in found.figures.values()]


def test_transposed_convolutions_are_counted_at_both_sizes(tool, capsys):
    """3 x 2 cells at stride 32: 16 C C' multiply-adds for each cell of a transposed convolution's input."""
    config, opts = CONFIGS / "pipelines" / "centernet.yaml", ["MODEL.FPN.OUT_CHANNELS", "32"]
    found = tool.analyze(load_config(config, opts), (64, 96))
    transposed = 16 * 6 * (512 * 32 + 4 * 32 * 32 + 16 * 32 * 32)
    norms = 2 * 6 * 32 * (4 + 16 + 64)
    heads = 6 * 64 * (3 * 9 * 32 * 64 + 5 * 64)
    assert found.not_counted == {}
    assert found.figures["RPN head"] * 1e9 == pytest.approx(transposed + norms + heads)
    more = found.figures["total, output size"] - found.figures["total"]
    assert more * 1e9 == pytest.approx(3 * transposed)
    assert tool.main(["--config-file", str(config), "--size", "64", "96", *opts]) == 0
    printed = capsys.readouterr().out
    assert f"{found.figures['total']:.2f} G at that of their input, where they multiply" in printed
    assert "output size" not in "".join(tool.analyze(load_config(R18), (64, 96)).figures)


def test_frozen_or_not_is_the_same(tool):
    """BatchNorm counts alike whether it is frozen, and whichever of the net's stages are."""
    frozen, trained = (
        tool.analyze(load_config(R18, ["MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", freeze]), (64, 64))
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


def test_what_is_not_counted_is_said(tool, unseen_head, capsys):
    assert tool.main(["--config-file", QUICK, "--size", "64", "64", "MODEL.RPN.HEAD_NAME", unseen_head]) == 2
    assert "demo.yaml: too low, for nothing counts aten::" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "nowhere.yaml"], "nowhere.yaml"),
        (["--config-file", QUICK, "MODEL.DEPHT", "1"], "Non-existent key: MODEL.DEPHT"),
        (["--config-file", QUICK, "--size", "0", "64"], "--size must be positive, got 0 64"),
        (
            ["--config-file", QUICK, "MODEL.META_ARCHITECTURE", "SemanticSegmentor"],
            "only CenterNet and models with an RPN can be analysed, not SemanticSegmentor here",
        ),
    ],
    ids=["no such config", "unknown key", "size", "no RPN"],
)
def test_what_cannot_be_analysed(tool, capsys, arguments, message):
    assert tool.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("analyze_model: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--size", "64", "64"], ["MODEL.FPN.OUT_CHANNELS", "64"]])
def test_the_papers_tables_take_no_settings(tool, capsys, arguments):
    with pytest.raises(SystemExit):
        tool.main(arguments)
    assert "need --config-file" in capsys.readouterr().err
