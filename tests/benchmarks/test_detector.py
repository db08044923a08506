"""benchmarks/detector.py: every row is measured, and both networks do the same work."""

import json

import detector
import torch
from common import random_model

from gs_d2.config import load_config


def test_measures_every_row(tmp_path, capsys):
    detector.main(["--quick", "--device", "cpu", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "detector.json").read_text())
    who = [detector.STOCK, *detector.OURS]
    assert set(record["entries"]) == {f"{what}: {x}" for what in ("training step", "inference") for x in who}
    for name, entry in record["entries"].items():
        assert 0 < entry["min_ms"] <= entry["median_ms"] <= entry["max_ms"] and entry["repeats"] == 1
        parts = record["parts_ms"][name]
        assert min(parts["backbone"], parts["head"], parts["labelling"]) > 0
        assert (parts["backward"] > 0 and parts["losses"] > 0) == name.startswith("training")
        assert (parts["proposals"] > 0) == (name.startswith("inference") or name.endswith(detector.STOCK))
    table = (tmp_path / "detector.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("| training step |") == table.count("| inference     |") == 2 * len(who)


def test_both_networks_have_the_same_anchors_and_samples():
    stock, ours = detector.stock_config(), load_config(detector.CONFIG)
    assert stock.MODEL.RPN.BATCH_SIZE_PER_IMAGE == 4 * ours.MODEL.RPN.BATCH_SIZE_PER_IMAGE
    for key in ("IN_FEATURES", "IOU_THRESHOLDS", "POSITIVE_FRACTION", "NMS_THRESH"):
        assert stock.MODEL.RPN[key] == ours.MODEL.RPN[key]
    for key in ("PRE_NMS_TOPK_TEST", "POST_NMS_TOPK_TEST"):
        assert stock.MODEL.RPN[key] == ours.MODEL.RPN[key]
    assert ours.MODEL.GS.GROUP_SAMPLING and ours.MODEL.GS.AUTOCAST_DTYPE == ""
    features = torch.zeros(1, 256, 4, 6)
    anchors = []
    for cfg in (stock, ours):
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", *detector.QUICK])
        anchors += random_model(cfg).proposal_generator.anchor_generator([features])
    assert len(anchors) == 2 and torch.equal(anchors[0].tensor, anchors[1].tensor)
