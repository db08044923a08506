"""sample_distribution.py: its tables and pictures, and what it cannot use; the counts are in tests/analysis."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from sample_distribution import main

ROOT = Path(__file__).resolve().parents[2]
FIG_2 = ["RPN", "FPN", "FPN-finest-stride", "FPN-finest", "FPN-finest-sampling"]


def record(iteration):
    return json.dumps({"iteration": iteration, "total_loss": 1.0})


def group_record(iteration, factor=1.0):
    names = ("pos_matched", "neg_matched", "pos_sampled", "neg_sampled")
    values = {
        f"groups/{name}@{scale}": factor * (10 * i + k)
        for i, name in enumerate(names)
        for k, scale in enumerate((128, 16, 32))
    }
    return json.dumps({"iteration": iteration, "groups/loss_cls@16": 0.5} | values)


@pytest.fixture
def run_tool(run_command, tmp_path):
    def run_tool(metrics):
        path = tmp_path / "metrics.json"
        if metrics is not None:
            path.write_bytes(metrics.encode() if isinstance(metrics, str) else metrics)
        return run_command(main, path, "--output", tmp_path / "out.png")

    return run_tool


def test_table_and_picture(run_tool, tmp_path):
    (status, printed, _), picture = run_tool(group_record(0) + "\n"), tmp_path / "out.png"
    assert status == 0
    with Image.open(picture) as image:
        assert image.size[0] > image.size[1] > 100
        assert len(image.convert("RGB").getcolors(10**6)) > 10
    lines = printed.splitlines()
    assert lines[0].split() == ["anchors", "per", "image", "16", "32", "128"]
    assert lines[1].split() == ["positive,", "matched", "1.0", "2.0", "0.0"]
    assert lines[4].split() == ["negative,", "sampled", "31.0", "32.0", "30.0"]
    assert f"Written: {picture}" in printed


@pytest.mark.parametrize(
    "write",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.replace("\n", "\r\n\r\n").encode(),
        lambda text: text.replace("0.5", "null").encode(),  # a loss that was not finite
    ],
    ids=["mark", "UTF-16", "blank lines", "null"],
)
def test_records_as_other_programs_write_them(run_tool, write):
    text = group_record(0) + "\n" + group_record(20) + "\n"
    assert run_tool(write(text))[:2] == run_tool(text)[:2] and run_tool(write(text))[0] == 0


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, r"No such file or directory: '.*metrics\.json'"),
        ("", r"metrics\.json: no group statistics; is it the metrics\.json of a training run"),
        (record(0) + "\n", r"metrics\.json: no group statistics"),
        (group_record(0) + "\n" + group_record(20)[:40] + "\n", r"metrics\.json:2: not a record of metrics"),
        (group_record(0) + "\n[1, 2]\n", r"metrics\.json:2: not a record of metrics"),
        (b"\x80\x81\n", r"metrics\.json:1: not UTF-8 text"),
        (bytes(8), r"metrics\.json: not a text file"),
        (json.dumps({"groups/pos_sampled@16": 1.0}) + "\n", r"metrics\.json: no group statistics"),
        (json.dumps({"groups/pos_sampled@big": 1.0}) + "\n", r"metrics\.json:1: not a record of metrics"),
        (json.dumps({"groups/pos_sampled@16": None}) + "\n", r"metrics\.json:1: not a record of metrics"),
        (group_record(0, float("nan")), r"metrics\.json:1: not a record of metrics \(nan is no number of anchors"),
        (group_record(0, float("inf")), r"metrics\.json:1: not a record of metrics"),
        ("[" * 100_000, r"metrics\.json:1: not a record of metrics"),
        (group_record(0).replace("neg_sampled@16", "neg_sampled@64"), r"metrics\.json: .*not of the same scales"),
    ],
)
def test_what_it_cannot_use(run_tool, tmp_path, metrics, message):
    status, _, err = run_tool(metrics)
    assert status == 2 and re.search("error: .*" + message, err) and err.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_several_runs_side_by_side(run_command, tmp_path):
    paths = []
    for name, factor in (("fpn", 1.0), ("fpn_finest", 2.0)):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "metrics.json")
        paths[-1].write_text(group_record(0, factor) + "\n")
    status, out, _ = run_command(main, *paths, "--output", tmp_path / "out.png")
    assert status == 0 and (tmp_path / "out.png").exists()
    detectors = json.loads((tmp_path / "out.json").read_text())["detectors"]
    assert list(detectors) == ["fpn", "fpn_finest"]
    assert detectors["fpn_finest"]["pos_sampled"] == {"16.0": 42.0, "32.0": 44.0, "128.0": 40.0}
    lines = out.splitlines()
    assert lines[0].split() == ["percent", "of", "all", "samples", "16", "32", "128", "all"]
    # 20 + 21 + 22 positives and 30 + 31 + 32 negatives
    assert lines[1].split() == ["fpn", "positive", "13.46", "14.10", "12.82", "40.38"]
    assert lines[4].split() == ["fpn_finest", "negative", "19.87", "20.51", "19.23", "59.62"]


def test_command_counts_annotations(generated_train, tmp_path, run_command):
    outputs = [tmp_path / "a" / "fig2.png", tmp_path / "b.png", tmp_path / "c.png"]
    printed = ""
    for output, seed in zip(outputs, "001", strict=True):
        arguments = ["--dataset", generated_train, "--num-images", 4, "--seed", seed]
        printed += run_command(main, *arguments, "--output", output)[1]
    counted = [json.loads(output.with_suffix(".json").read_text()) for output in outputs]
    assert counted[0] == counted[1] != counted[2]
    assert counted[0]["image_sizes"]["read"] == 4 == counted[0]["images"]
    assert list(counted[0]["detectors"]) == FIG_2
    with Image.open(outputs[0]) as image:
        assert image.size[0] > image.size[1] > 100
    assert printed.count("FPN-finest-sampling  positive") == 3
    assert "image sizes: 4 read from the files" in printed


def test_what_cannot_be_counted(generated_train, tmp_path, register, run_command):
    def message(*arguments):
        status, _, err = run_command(main, *arguments, "--output", tmp_path / "out.png")
        assert status == 2 and not (tmp_path / "out.png").exists() and not (tmp_path / "out.json").exists()
        return err.splitlines()[-1]

    quick = ROOT / "configs" / "quick" / "demo.yaml"
    assert "demo.yaml: what is sampled by loss cannot be known without a net" in message("--config-file", quick)
    assert "no_such_set" in message("--dataset", "no_such_set")
    assert "none.yaml" in message("--config-file", tmp_path / "none.yaml")
    base = ROOT / "configs/wider/rpn.yaml"
    assert "same name" in message("--config-file", base, base)
    (tmp_path / "list.txt").write_text("0--Parade/a.jpg\n")
    name = register("sample_distribution_no_faces", tmp_path / "list.txt", "no images")
    assert f"{name} has no annotated faces" in message("--dataset", name)
    assert "needs none of --config-file" in message("metrics.json", "--dataset", generated_train)
    for wrong in (["--num-images", 0], ["--seed", -1]):
        assert "--num-images must be at least 1 and --seed at least 0" in message(*wrong)


def test_it_names_the_file_that_it_wrote(tmp_path, run_command):
    """Also where the name has no ending, to which matplotlib adds its own."""
    (tmp_path / "metrics.json").write_text(group_record(0) + "\n")
    status, printed, _ = run_command(main, tmp_path / "metrics.json", "--output", tmp_path / "new" / "fig2")
    assert status == 0 and f"Written: {tmp_path}/new/fig2.png, {tmp_path}/new/fig2.json" in printed
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["fig2.json", "fig2.png"]
    before = (tmp_path / "metrics.json").read_text()
    status, _, err = run_command(main, tmp_path / "metrics.json", "--output", tmp_path / "metrics.json")
    assert status == 2 and "metrics.json: must end in .png" in err
    status, _, err = run_command(main, tmp_path / "metrics.json", "--output", tmp_path / "metrics.png")
    assert status == 2 and "metrics.json would be overwritten by the numbers" in err
    assert (tmp_path / "metrics.json").read_text() == before
