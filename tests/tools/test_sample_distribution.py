"""sample_distribution.py: reads metrics.json of a run, and says what is wrong with one that it cannot use."""

import json

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def tool(load_script):
    return load_script("tools/sample_distribution.py")


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
def run_tool(tool, tmp_path, monkeypatch):
    def run_tool(metrics):
        path = tmp_path / "metrics.json"
        if metrics is not None:
            path.write_bytes(metrics.encode() if isinstance(metrics, str) else metrics)
        monkeypatch.setattr("sys.argv", ["sample_distribution.py", str(path), "--output", str(tmp_path / "out.png")])
        tool.main()
        return tmp_path / "out.png"

    return run_tool


def test_means_over_the_run(tool, tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("\n".join([group_record(0, 1.0), record(19), group_record(20, 3.0)]) + "\n")
    counts = tool.read_counts(path)
    assert counts["pos_matched"] == {16.0: 2.0, 32.0: 4.0, 128.0: 0.0}
    assert list(counts["neg_sampled"]) == [16.0, 32.0, 128.0], "by scale, not in the order of the file"
    assert counts["neg_sampled"] == {16.0: 62.0, 32.0: 64.0, 128.0: 60.0}
    assert counts["loss_cls"] == {16.0: 0.5}


def test_shares(tool):
    assert tool.shares({16.0: 3.0, 32.0: 1.0}) == {16.0: 0.75, 32.0: 0.25}
    assert tool.shares({16.0: 0.0, 32.0: 0.0}) == {16.0: 0.0, 32.0: 0.0}


def test_table_and_picture(run_tool, capsys):
    picture = run_tool(group_record(0) + "\n")
    with Image.open(picture) as image:
        assert image.size[0] > image.size[1] > 100
        assert len(image.convert("RGB").getcolors(10**6)) > 10
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].split() == ["anchors", "per", "image", "16", "32", "128"]
    assert lines[1].split() == ["positive,", "matched", "1.0", "2.0", "0.0"]
    assert lines[4].split() == ["negative,", "sampled", "31.0", "32.0", "30.0"]
    assert f"Written: {picture}" in printed


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, r"No such file or directory: '.*metrics\.json'"),
        ("", r"metrics\.json: no group statistics; is it the metrics\.json of a training run"),
        (record(0) + "\n", r"metrics\.json: no group statistics"),
        (group_record(0) + "\n" + group_record(20)[:40] + "\n", r"metrics\.json:2: not a record of metrics"),
        (group_record(0) + "\n[1, 2]\n", r"metrics\.json:2: not a record of metrics"),
        (b"\x80\x81\n", r"metrics\.json: not a text file"),
        (json.dumps({"groups/pos_sampled@16": 1.0}) + "\n", r"metrics\.json: no group statistics"),
        (json.dumps({"groups/pos_sampled@big": 1.0}) + "\n", r"metrics\.json:1: not a record of metrics"),
        (json.dumps({"groups/pos_sampled@16": None}) + "\n", r"metrics\.json:1: not a record of metrics"),
    ],
)
def test_what_it_cannot_use(run_tool, tmp_path, metrics, message):
    with pytest.raises(SystemExit, match=r"^sample_distribution: .*" + message):
        run_tool(metrics)
    assert not (tmp_path / "out.png").exists()
