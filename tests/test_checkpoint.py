"""Checkpoints: files that run code or do not fit are refused, and no crash or full disk costs the last good one."""

import logging
import os
import pickle
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gs_d2.checkpoint import Checkpointer, read_weights

ROOT = Path(__file__).resolve().parent.parent


class Progress:
    """Stands for a trainer: something besides the model that is saved and resumed."""

    def __init__(self, iteration=0, **more):
        self.state = {"iteration": iteration, **more}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class Code:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def net(value=0.0):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def values(model):
    return {value.item() for parameter in model.parameters() for value in parameter.flatten()}


def saved(folder, name, iteration, **arguments):
    """A whole checkpoint whose weights are all `iteration`."""
    Checkpointer(net(iteration), str(folder), trainer=Progress(iteration), **arguments).save(name, iteration=iteration)
    return folder / f"{name}.pth"


def resumed(folder, weights="", **arguments):
    """The weights' value and the progress after --resume."""
    model, progress = net(-1), Progress()
    checkpointer = Checkpointer(model, str(folder), trainer=progress, **arguments)
    checkpointer.resume_or_load(str(weights), resume=True)
    (value,) = values(model)
    return value, progress.state["iteration"], checkpointer.has_checkpoint()


# Reading


@pytest.mark.parametrize("kind", ["pth", "bare.pth", "old.pth", "safetensors"])
def test_weights_of_every_safe_format(tmp_path, kind):
    state, path = net(7).state_dict(), tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        content = state if kind == "bare.pth" else {"model": state, "note": "n"}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old.pth")
    model = net()
    rest = Checkpointer(model, strict=True).load(path, checkpointables=[])
    assert values(model) == {7.0}
    assert rest == ({"note": "n"} if kind in ("pth", "old.pth") else {})


@pytest.mark.parametrize("kind", ["pkl", "pyth", "pth", "old.pth"])
def test_no_file_runs_code_unless_allowed(tmp_path, kind):
    trap, path = tmp_path / "trap", tmp_path / f"weights.{kind}"
    content = {"model": net(7).state_dict(), "__author__": "somebody", "trap": Code(trap)}
    if kind == "pkl":
        path.write_bytes(pickle.dumps({**content, "model": {k: v.numpy() for k, v in content["model"].items()}}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old.pth")
    for strict in (False, True):
        with pytest.raises(ValueError, match=r"can run any code: pass allow_pickle=True .*--allow-pickle") as error:
            Checkpointer(net(), strict=strict).load(str(path), checkpointables=[])
        assert str(path) in str(error.value)
        assert not trap.exists()
    if kind == "pyth":  # Detectron2 itself reads them by weights_only
        return
    model = net()
    Checkpointer(model, strict=True, allow_pickle=True).load(str(path), checkpointables=[])
    assert values(model) == {7.0} and trap.is_dir()


def test_resuming_runs_no_code(tmp_path):
    saved(tmp_path, "model_0", 1)
    content = torch.load(tmp_path / "model_0.pth", weights_only=True)
    torch.save({**content, "iteration": 9, "trap": Code(tmp_path / "trap")}, tmp_path / "model_9.pth")
    (tmp_path / "last_checkpoint").write_text("model_9.pth")
    assert resumed(tmp_path) == (1.0, 1, True)
    assert not (tmp_path / "trap").exists()


@pytest.fixture
def downloads(tmp_path):
    """Makes checkpointers to which one pickle is served under any address; and the addresses that were asked for."""
    path, asked = tmp_path / "R.pkl", []
    state = {key: value.numpy() for key, value in net(7).state_dict().items()}
    path.write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2"}))

    class Manager:
        def get_local_path(self, address):
            asked.append(address)
            return str(path)

    def build(model, **arguments):
        checkpointer = Checkpointer(model, **arguments)
        checkpointer.path_manager = Manager()
        return checkpointer

    return build, asked


def test_detectron2s_own_pickles_are_read(downloads):
    build, asked = downloads
    model = net()
    build(model).load("detectron2://ImageNetPretrained/torchvision/R-50.pkl", checkpointables=[])
    assert values(model) == {7.0}
    assert "detectron2://ImageNetPretrained/torchvision/R-50.pkl" in asked


@pytest.mark.parametrize(
    "address",
    ["https://example.com/detectron2/R-50.pkl", "detectron2://%2e%2e/R-50.pkl", "file://detectron2://R-50.pkl"],
)
def test_pickles_of_other_places_are_not(downloads, address):
    with pytest.raises(ValueError, match="is a pickle"):
        downloads[0](net()).load(address, checkpointables=[])


def test_a_machine_without_a_network_says_what_to_do():
    class Offline:
        def get_local_path(self, address):
            raise OSError("Name or service not known\nand more")

    checkpointer = Checkpointer(net())
    checkpointer.path_manager = Offline()
    with pytest.raises(
        ValueError, match=r"R-50\.pkl cannot be downloaded \(Name .* known\)\. .*convert_torchvision\.py"
    ):
        checkpointer.load("detectron2://ImageNetPretrained/torchvision/R-50.pkl", checkpointables=[])


@pytest.mark.parametrize("address", ["detectron2://../../tmp/x.pkl", "https://example.com/../../../home/x.pth"])
def test_addresses_that_climb_out_of_the_cache(downloads, address):
    build, asked = downloads
    with pytest.raises(ValueError, match=r"must not have '\.\.'"):
        build(net(), allow_pickle=True).load(address, checkpointables=[])
    assert not asked


def compressed(path):
    """Like torch's file, but its numbers are zeros that compress a thousandfold."""
    torch.save({"w": torch.zeros(500_000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)


def cut(path, size=None):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 if size is None else size])


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("size", [0, 5, None])
def test_files_that_are_cut_short(tmp_path, ending, size):
    path = tmp_path / f"weights.{ending}"
    (save_file if ending == "safetensors" else torch.save)(net(7).state_dict(), path)
    cut(path, size)
    with pytest.raises(ValueError, match="cannot be read as weights") as error:
        Checkpointer(net()).load(str(path), checkpointables=[])
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (compressed, "it unpacks to .* far above its size"),
        (lambda path: torch.save(3, path), "holds no model"),
        (lambda path: torch.save({"model": [torch.zeros(2)]}, path), "holds no model"),
        (lambda path: torch.save({"w": "text"}, path), "holds no model"),
        (lambda path: torch.save({1: torch.zeros(2)}, path), "holds no model"),
        (lambda path: torch.save({"w": torch.zeros(2, 2).to_sparse()}, path), "holds no model"),
        (lambda path: torch.save({"w": torch.zeros(2, device="meta")}, path), "holds no model"),
        (lambda path: path.write_text("<html>"), "cannot be read as weights"),
    ],
    ids=["bomb", "number", "list", "text", "keys", "sparse", "meta", "html"],
)
def test_files_that_hold_no_weights(tmp_path, write, message):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        read_weights(str(path))
    assert str(path) in str(error.value)


def test_safetensors_without_its_package(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_file(net().state_dict(), path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        read_weights(str(path))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such weights: .*none\.pth"):
        Checkpointer(net()).load(str(tmp_path / "none.pth"), checkpointables=[])


# What must fit


def of_net(**changes):
    return {key: value for key, value in {**net(7).state_dict(), **changes}.items() if value is not None}


MISFITS = {
    "missing": (of_net(**{"1.bias": None}), r"1 missing: 1\.bias$"),
    "unexpected": (of_net(**{"2.bias": torch.zeros(2)}), r"1 unexpected: 2\.bias$"),
    "shape": (of_net(**{"1.bias": torch.zeros(3)}), r"1 of another shape: 1\.bias \(3,\) \(the model's is \(2,\)\)$"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_weights_to_evaluate_fit_both_ways(tmp_path, kind):
    state, message = MISFITS[kind]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth does not fit the config's model\. Keys " + message):
        Checkpointer(net(), strict=True).resume_or_load(str(tmp_path / "weights.pth"), resume=False)


def test_weights_of_a_backbone_are_not_evaluated(tmp_path):
    model = torch.nn.ModuleDict({"backbone": net(1), "head": net(2)})
    backbone = {key: value for key, value in model.state_dict().items() if key.startswith("backbone.")}
    torch.save(backbone, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"it has the weights of a backbone alone, which training begins with\. Keys"):
        Checkpointer(model, strict=True).load(str(tmp_path / "weights.pth"))
    Checkpointer(model).load(str(tmp_path / "weights.pth"), checkpointables=[])


@pytest.mark.parametrize("kind", MISFITS)
def test_training_starts_from_part_of_a_model_and_says_so(tmp_path, kind, caplog):
    state, _ = MISFITS[kind]
    torch.save(state, tmp_path / "weights.pth")
    model = net()
    with caplog.at_level(logging.WARNING):
        Checkpointer(model).load(str(tmp_path / "weights.pth"), checkpointables=[])
    assert 7.0 in values(model)
    assert ("2.bias" if kind == "unexpected" else "1.") in caplog.text  # Detectron2 writes 1.{bias} in colour


def test_training_does_not_start_from_weights_of_which_nothing_fits(tmp_path):
    for state in ({"other.weight": torch.zeros(2)}, {"0.weight": torch.zeros(9)}, {}):
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=r"does not fit the config's model, nor any part of it"):
            Checkpointer(net()).load(str(tmp_path / "weights.pth"), checkpointables=[])


def test_a_resumed_checkpoint_must_fit(tmp_path):
    saved(tmp_path, "model_0", 1)
    content = torch.load(tmp_path / "model_0.pth", weights_only=True)
    del content["model"]["1.bias"]
    torch.save(content, tmp_path / "model_0.pth")
    with pytest.raises(ValueError, match=r"model_0\.pth does not fit"):
        resumed(tmp_path)


def test_nothing_to_evaluate(tmp_path):
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty and there is no checkpoint"):
        Checkpointer(net(), str(tmp_path), strict=True).resume_or_load("", resume=True)
    Checkpointer(net(), str(tmp_path)).resume_or_load("", resume=True)  # training from scratch


# Which checkpoint is resumed


def test_resumes_where_last_checkpoint_says(tmp_path, caplog):
    for iteration in (1, 2, 3):
        saved(tmp_path, f"model_{iteration}", iteration)
    assert (tmp_path / "last_checkpoint").read_text() == "model_3.pth"
    assert resumed(tmp_path) == (3.0, 3, True)
    (tmp_path / "last_checkpoint").write_text("model_2.pth")
    assert resumed(tmp_path) == (2.0, 2, True)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def flip(path):
    content = bytearray(path.read_bytes())
    at = content.index(np.float32([3, 3]).tobytes())  # in the weights
    content[at] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "spoil",
    [
        cut,
        flip,
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: torch.save(net(9).state_dict(), path),  # weights alone
        lambda path: path.with_name("last_checkpoint").write_text(""),
        lambda path: path.with_name("last_checkpoint").write_bytes(b"\0" * 12),
        lambda path: path.with_name("last_checkpoint").write_text("../other/model_9.pth"),
        lambda path: path.with_name("last_checkpoint").write_text(str(path.parents[1] / "other" / "model_9.pth")),
    ],
    ids=["half", "bit", "empty", "gone", "weights", "no tag", "zeros", "climbs", "absolute"],
)
def test_what_is_not_whole_is_passed_over_with_a_warning(tmp_path, caplog, spoil):
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir(), other.mkdir()
    saved(other, "model_9", 9)
    for name, iteration in (("a", 1), ("model_2", 2), ("z", 0), ("b", 1), ("y", 1)):  # the newest has not the most
        saved(folder, name, iteration)
    last = saved(folder, "model_3", 3)
    spoil(last)
    expected = 2 if last.is_file() is False or (folder / "last_checkpoint").read_text() == "model_3.pth" else 3
    with caplog.at_level(logging.WARNING):
        assert resumed(folder) == (expected, expected, True)
    assert re.search(rf"Resuming from .*model_{expected}\.pth", caplog.text)
    assert "model_3.pth" in caplog.text or "last_checkpoint holds no name" in caplog.text


def test_a_crash_between_checkpoint_and_tag(tmp_path):
    saved(tmp_path, "model_1", 1)
    (tmp_path / "last_checkpoint").unlink()
    assert resumed(tmp_path) == (1.0, 1, True)


def test_the_furthest_is_that_of_the_most_images(tmp_path):
    """Iterations of two processes and of one are not alike; a checkpoint that does not say comes last."""

    class Trainer(Progress):
        def __init__(self, iteration, images_seen):
            super().__init__(iteration)
            self.state["run"] = {"images_seen": images_seen}

    for iteration, images in ((30, 120), (50, 100)):  # batches of 4, then of 2
        trainer = Trainer(iteration, images)
        Checkpointer(net(iteration), str(tmp_path), trainer=trainer).save(f"model_{iteration}", iteration=iteration)
    saved(tmp_path, "old", 70)
    (tmp_path / "last_checkpoint").unlink()
    assert resumed(tmp_path) == (30.0, 30, True)


def test_nothing_that_is_whole(tmp_path):
    cut(saved(tmp_path, "model_1", 1))
    with pytest.raises(ValueError, match=r"cannot resume: .*model_1\.pth.*remove last_checkpoint there to start over"):
        resumed(tmp_path)
    torch.save(net(7).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "last_checkpoint").unlink()
    assert resumed(tmp_path, tmp_path / "weights.pth") == (7.0, 0, False)


def test_objects_that_are_allowed_are_passed_over_to_as_well(tmp_path):
    for iteration in (1, 2):
        path = saved(tmp_path, f"model_{iteration}", iteration)
        torch.save({**torch.load(path, weights_only=True), "where": PurePosixPath("a")}, path)
    cut(saved(tmp_path, "model_3", 3))
    with pytest.raises(ValueError, match="there is no other checkpoint"):
        resumed(tmp_path)
    assert Checkpointer(net(), str(tmp_path), allow_pickle=True).get_checkpoint_file().endswith("model_2.pth")


# Writing


def test_what_is_saved_is_read_back_without_pickles(tmp_path):
    optimizer = torch.optim.SGD(net().parameters(), 0.1, momentum=0.9)
    state = {
        "optimizer": optimizer.state_dict(),
        "best": np.float64(0.5),
        "rng": [np.arange(3, dtype=np.int64), torch.get_rng_state(), (1, "MT", None)],
        "flags": {"a": np.bool_(True), 3: b"x"},
    }
    model = net(5)
    Checkpointer(model, str(tmp_path), trainer=Progress(4, **state)).save("m", iteration=np.int64(4))
    content = torch.load(tmp_path / "m.pth", weights_only=True)
    assert content["iteration"] == 4 and type(content["iteration"]) is int
    found = content["trainer"]
    assert found["best"] == 0.5 and type(found["best"]) is float
    assert found["rng"][0].tolist() == [0, 1, 2] and found["rng"][2] == (1, "MT", None)
    assert found["flags"] == {"a": True, 3: b"x"} and found["optimizer"] == optimizer.state_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "m.pth"]


@pytest.mark.parametrize("value", [Path("x"), {1}, np.array([None]), lambda: 0])
def test_what_could_not_be_read_back_is_not_saved(tmp_path, value):
    saved(tmp_path, "model", 1)
    with pytest.raises(ValueError, match=r"trainer\.hooks\[0\]\.x is a .*, which a checkpoint cannot hold"):
        Checkpointer(net(2), str(tmp_path), trainer=Progress(2, hooks=[{"x": value}])).save("model")
    assert resumed(tmp_path) == (1.0, 1, True)


def test_only_the_main_process_writes(tmp_path):
    saved(tmp_path, "model", 1, save_to_disk=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("full", ["model_2.pth", "model_1.pth", "last_checkpoint"])
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, full):
    saved(tmp_path, "model_1", 1)
    (tmp_path / f"{full}.part").symlink_to("/dev/full")
    name = full if full != "last_checkpoint" else "model_2.pth"
    message = (
        rf"cannot write .*{re.escape(full)} \(No space left on device\): it needs \d+\.\d MB, and \d+\.\d MB are free"
    )
    with pytest.raises(OSError, match=message) as error:
        saved(tmp_path, name.removesuffix(".pth"), 2)
    assert error.value.errno == 28
    assert not list(tmp_path.glob("*.part"))
    assert resumed(tmp_path) == (1.0, 1, True)


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*model\.pth"):
        saved(tmp_path / "none", "model", 1)


CRASHES = """
    import os, random, resource, signal, sys, time, warnings
    import torch
    from gs_d2.checkpoint import Checkpointer

    folder, random_numbers = sys.argv[1], random.Random(0)
    SIZE = 300  # 360 kB of weights

    def save(value):
        model = torch.nn.Linear(SIZE, SIZE)
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, value)
        Checkpointer(model, folder).save("model", iteration=value)  # always over the last one

    def saved():
        name = open(os.path.join(folder, "last_checkpoint")).read()
        content = torch.load(os.path.join(folder, name), weights_only=True)
        assert all((tensor == content["iteration"]).all() for tensor in content["model"].values())
        return content["iteration"]

    def in_child(work):
        pid = os.fork()
        if pid == 0:
            try:
                work()
            except OSError as error:
                os._exit(7 if "cannot write" in str(error) else 8)
            except BaseException:
                os._exit(9)
            os._exit(0)
        return pid

    def limited(value, size, action):
        def work():
            signal.signal(signal.SIGXFSZ, action)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            save(value)
        return work

    save(0)
    last, whole = 0, os.path.getsize(os.path.join(folder, "model.pth"))
    started = time.monotonic()
    os.waitpid(in_child(lambda: save(0)), 0)
    duration = time.monotonic() - started
    ends = {"died": 0, "refused": 0, "killed": 0, "saved": 0}
    for trial in range(1, 61):
        kind = trial % 3
        if kind < 2:  # the kernel ends the process, or refuses to write on, at that very byte
            size = random_numbers.choice([0, 1, random_numbers.randrange(whole), whole - 1, whole])
            status = os.waitpid(in_child(limited(trial, size, signal.SIG_DFL if kind else signal.SIG_IGN)), 0)[1]
            assert (status == 0) == (size == whole), (size, whole, status)
        else:
            pid = in_child(lambda: save(trial))
            time.sleep(random_numbers.random() * duration)
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        now = saved()
        if status == 0:
            ends["saved"] += 1
            assert now == trial
        elif os.WIFEXITED(status):
            ends["refused"] += 1
            assert os.WEXITSTATUS(status) == 7 and now == last, (status, now)
            assert "model.pth.part" not in os.listdir(folder)  # what a killed one left may be there
        else:
            ends["died" if kind == 1 else "killed"] += 1
            assert now == last or kind == 2 and now == trial, (now, last)
        last = now
    print(ends)
    assert ends["died"] >= 5 and ends["refused"] >= 5 and ends["killed"] >= 1
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and limits of a process")
@pytest.mark.slow
def test_a_checkpoint_is_there_whatever_happens_while_the_next_is_written(tmp_path):
    """Killed (SIGKILL, or by the kernel at a byte of the file) or refused to write on, sixty times."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CRASHES), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
