"""Every flag of every script, given wrong values: a message and exit code 2, or it works; never a traceback."""

import argparse
import importlib
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
DEMO = "configs/quick/demo.yaml"


@pytest.fixture
def files(tmp_path, drawn_datasets):
    """A folder with one of each that the scripts read; commands name what is in it as {name}."""
    root = tmp_path / "files"
    root.mkdir()
    (root / "binary").write_bytes(bytes(range(256)))
    (root / "empty").touch()
    (root / "text.txt").write_text("some text\n")
    (root / "folder").mkdir()
    (root / "ellipseList.txt").write_text("".join(f"a{i}\n1\n{50 + i} {40 - i} 0.{i} 60 70 1\n" for i in range(9)))
    base = drawn_datasets / "widerface"
    for path in sorted((base / "WIDER_val/images").rglob("*.jpg")):
        predictions = root / "predictions" / path.parent.name / f"{path.stem}.txt"
        predictions.parent.mkdir(parents=True, exist_ok=True)
        predictions.write_text(f"{path.stem}\n1\n10 10 30 30 0.9\n")
    labels = [f"groups/{sign}_{stage}" for sign in ("pos", "neg") for stage in ("matched", "sampled")]
    record = ", ".join(f'"{label}@{scale}": 3.0' for label in labels for scale in (16, 32))
    shutil.copy(min((base / "WIDER_val/images").rglob("*.jpg")), root / "picture.jpg")  # some flags write over it
    (root / "metrics.json").write_text("{" + record + "}\n")
    return {
        "root": root,
        "datasets": drawn_datasets,
        "mats": base / "ground_truth",
        "predictions": root / "predictions",
        "metrics": root / "metrics.json",
        "ellipses": root / "ellipseList.txt",
        "picture": root / "picture.jpg",
    }


# Script -> a command of it that works, or that fails for nothing but a file of weights.
COMMANDS = {
    "analyze_model": ["--config-file", DEMO, "--size", "64", "64"],
    "calibrate_scores": [
        *("--config-file", DEMO, "--dataset", "generated_val", "--images", "2", "--output", "{out}/x.pth"),
        *("MODEL.WEIGHTS", "{root}/binary"),
    ],
    "check_anchors": ["--config-file", DEMO, "--dataset", "generated_val", "--num-images", "2"],
    "cuda_check": ["--package-index", "--folder", "{out}"],
    "convert_darknet": ["{root}/binary", "--output", "{out}/x.pth"],
    "convert_to_timm": ["{root}/binary", "--output", "{out}/x.pth"],
    "convert_torchvision": ["{root}/binary", "--output", "{out}/x.pth"],
    "detector": ["--output", "{out}", "--device", "cpu", "--repeats", "1"],
    "face_detectors": ["--output", "{out}", "--dataset", "generated_val", "--detectors", "yunet"],
    "demo": ["--config-file", DEMO, "--input", "{picture}", "--output", "{out}"],
    "evaluate": ["wider_face", "--predictions", "{predictions}", "--ground-truth", "{mats}"],
    "export_model": [
        *("--config-file", DEMO, "--format", "torchscript", "--output", "{out}", "MODEL.WEIGHTS", "{root}/binary"),
    ],
    "fit_fddb_ellipse": ["--ground-truth", "{ellipses}"],
    "ops": ["--output", "{out}", "--device", "cpu", "--quick", "--cases", "W1"],
    "prepare_wider_face": ["{datasets}", "--output", "{out}"],
    "profile_step": ["--config-file", DEMO, "--steps", "1", "--faces", "2", "--size", "64", "64"],
    "provoke_out_of_memory": ["--device", "cpu", "--copies", "1"],
    "quickstart": ["--output", "{out}"],
    "sample_distribution": ["{metrics}", "--output", "{out}/x.png"],
    "sweep_samples prepare": [
        *("--config-file", DEMO, "--values", "16", "--output", "{out}", "--", "SOLVER.MAX_ITER", "9"),
        *("SOLVER.STEPS", "(7,)"),
    ],
    "sweep_samples plot": ["--input", "{root}/folder"],
    "synthesize_faces": ["--output", "{out}", "--train", "1", "--val", "1", "--size", "64", "64"],
    "visualize_data": [
        *("--source", "annotation", "--config-file", DEMO, "--output-dir", "{out}", "--num-images", "1"),
        *("DATASETS.TRAIN", "('generated_train',)"),
    ],
    "visualize_results": [
        *("--dataset", "generated_val", "--predictions", "{predictions}", "--output", "{out}", "--num-images", "1"),
    ],
    "web": [],
}
VALUES = [
    *("", "-1", "0", "nan", "1e400", "\udce9", "{root}/nothing/there", "{root}/text.txt/below", "{root}/text.txt"),
    *("{root}/binary", "{root}/empty", "{root}/folder", "{picture}", "a\0b"),
]
# Scripts whose work is of minutes, and their functions that would take them.
SLOW = {
    "detector.measure": {},
    "detector.entries": ({}, {}),
    "detector.measure_parts": {},
    "ops.in_own_process": {},
    "ops.measure": {},
    "provoke_out_of_memory.FaceDetector": argparse.Namespace(
        detect=lambda picture: (np.zeros((0, 4), np.float32), None)
    ),
    "provoke_out_of_memory.limit_memory": None,
    "profile_step.profile_steps": [{"backbone": 1.0, "other": 1.0}],
    "profile_step.profile_loading": [1.0],
}
# Need what a test has not, other programs or the network: they say so.
OUTSIDE = ("cuda_check", "provoke_out_of_memory", "quickstart")


def parser_of_script(name, monkeypatch) -> list[argparse.Action]:
    """The actions of a script's parser, and of its sub-command's."""
    found = []

    def parse_args(self, *_):
        found.append(self)
        raise SystemExit(0)

    script, _, command = name.partition(" ")
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(SystemExit):
            importlib.import_module(script).main([])
    actions = found[0]._actions
    if command:
        (choice,) = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
        actions = choice.choices[command]._actions
    return [action for action in actions if not isinstance(action, argparse._HelpAction)]


def with_value(command, action, value):
    """The command with a flag's values replaced by one, or the flag added; or the place of a positional argument."""
    count = action.nargs if isinstance(action.nargs, int) else 1
    if not action.option_strings:
        return [value, *command[1:]] if not command[0].startswith("-") else [*command, value]
    for flag in action.option_strings:
        if flag in command:
            at = command.index(flag) + 1
            end = at + count
            return [*command[:at], *[value] * count, *command[end:]]
    rest = len(command) - (2 if "MODEL.WEIGHTS" in command or "DATASETS.TRAIN" in command else 0)
    rest = command.index("--") if "--" in command else rest
    return [*command[:rest], action.option_strings[0], *[value] * count, *command[rest:]]


def outcome(main, arguments, capsys):
    """Calls a script; anything but an end with an exit code, or none, is a traceback."""
    try:
        status = main(arguments) or 0
    except SystemExit as end:
        status = end.code or 0
    err = capsys.readouterr().err
    if isinstance(status, str):  # as Python prints it
        status, err = 1, f"{err}{status}\n"
    assert status in (0, 1, 2), (arguments, status)
    if status == 2:
        last = err.strip().splitlines()[-1]
        assert ": error: " in last and len(last) > len("x.py: error: "), (arguments, err)
    assert "Traceback" not in err, arguments
    return status, err


@pytest.fixture
def surroundings(files, monkeypatch, tmp_path, register, drawn_datasets):
    """What the scripts find around them: no screen, no network, no detector that takes time, and the generated data."""
    from detectron2.data import DatasetCatalog

    base = drawn_datasets / "widerface"
    for split in ("train", "val"):
        if f"generated_{split}" not in DatasetCatalog.list():
            lists = base / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt"
            register(f"generated_{split}", lists, base / f"WIDER_{split}" / "images")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "train_net.py"):
        (tmp_path / folder).symlink_to(ROOT / folder)

    class Detector:
        def __init__(self, cfg, confidence_threshold):
            pass

        def detect(self, image):
            return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)

    monkeypatch.setattr("demo.FaceDetector", Detector)
    monkeypatch.setattr("web.serve", lambda host, port: None)
    for name, result in SLOW.items():
        monkeypatch.setattr(name, lambda *_, result=result, **__: result)
    monkeypatch.setattr("fit_fddb_ellipse.write_text", lambda *_: None)  # a file of the package
    monkeypatch.setattr("subprocess.run", lambda *_, **__: argparse.Namespace(returncode=1, stdout="", stderr=""))
    return {**{key: str(value) for key, value in files.items()}, "out": str(tmp_path / "out")}


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_values(name, surroundings, monkeypatch, capsys):
    main = importlib.import_module(name.partition(" ")[0]).main
    words = name.split()[1:]
    command = [word.format(**surroundings) for word in COMMANDS[name]]
    status, err = outcome(main, [*words, *command], capsys)
    assert status == 0 or "binary" in err or "No finished run" in err or "is not whole" in err or name in OUTSIDE, err
    for action in parser_of_script(name, monkeypatch):
        assert action.help, f"{name} {action.dest} says nothing of itself"
        if action.nargs == 0:
            outcome(main, [*words, *with_value(command, action, "")[: len(command) + 1]], capsys)
            continue
        for value in VALUES:
            outcome(main, [*words, *with_value(command, action, value.format(**surroundings))], capsys)
    outcome(main, [*words, *command, "NO.SUCH", "1"], capsys)
    assert outcome(main, [*words, "--no-such-flag"], capsys)[0] == 2


OUTPUTS = {  # script -> the flags that name what it writes
    "detector": "--output",
    "ops": "--output",
    "face_detectors": "--output",
    "quickstart": "--output",
    "demo": "--output --json --save-crops",
    "evaluate": "--output",
    "calibrate_scores": "--output",
    "export_model": "--output",
    "prepare_wider_face": "--output",
    "sample_distribution": "--output",
    "sweep_samples prepare": "--output",
    "synthesize_faces": "--output",
    "visualize_data": "--output-dir",
    "visualize_results": "--output",
}


@pytest.mark.parametrize(("name", "flag"), [(name, flag) for name in OUTPUTS for flag in OUTPUTS[name].split()])
def test_an_output_that_cannot_be(name, flag, surroundings, capsys):
    """A path below a file, for those who write folders also a file: refused, naming the flag; the file is kept."""
    main = importlib.import_module(name.partition(" ")[0]).main
    command = [word.format(**surroundings) for word in COMMANDS[name]]
    file = Path(surroundings["root"]) / "text.txt"
    if flag not in command:
        command += [flag, ""]
    at = command.index(flag) + 1
    below = {"sample_distribution": "below/x.png", "calibrate_scores": "below/x.pth", "export_model": "below/"}.get(
        name, "below/x.json" if flag == "--json" else "below"
    )
    command[at] = str(file / below)
    if name == "prepare_wider_face":
        command[0] = surroundings["datasets"]
    status, err = outcome(main, [*name.split()[1:], *command], capsys)
    assert status == 2 and f"{flag} " in err and "cannot be made a folder" in err, err
    assert file.read_text() == "some text\n"


def test_the_scripts_are_all_here():
    paths = [
        path for folder in ("tools", "demo", "benchmarks", "dev", "examples") for path in ROOT.glob(f"{folder}/*.py")
    ]
    with_flags = {path.stem for path in paths if re.search(r"(?<!def )\w*([Pp]arser|parser_of)\(", path.read_text())}
    assert with_flags - {"common"} == {name.partition(" ")[0] for name in COMMANDS} | {"install_detectron2"}


def test_install(surroundings, capsys):
    import install_detectron2

    for value in VALUES:
        assert outcome(install_detectron2.main, ["--route", value.format(**surroundings)], capsys)[0] == 2


# What is added to a working command of train_net.py -> what the message says.
TRAINING = {
    "DATASETS.TRAIN ('my_faces',)": r"DATASETS\.TRAIN: no data set is registered as 'my_faces'",
    "DATASETS.TRAIN ()": r"DATASETS\.TRAIN is empty",
    "DATASETS.TRAIN (3,)": r"DATASETS\.TRAIN",
    "DATASETS.TRAIN generated_train": r"DATASETS\.TRAIN; it must be a list, such as .*\('my_faces',\)",
    "DATASETS.TEST ('generated_vall',)": "did you mean generated_val",
    "OUTPUT_DIR {root}/text.txt/x": r"OUTPUT_DIR .*text\.txt/x: cannot be made a folder",
    "OUTPUT_DIR {root}/text.txt": r"OUTPUT_DIR .*text\.txt: cannot be made a folder",
    "MODEL.WEIGHTS nothere.pth": r"MODEL\.WEIGHTS: no such weights: nothere\.pth",
    "MODEL.WEIGHTS {root}/folder": r"MODEL\.WEIGHTS: .*is a folder",
    "MODEL.WEIGHTS {root}/binary": "binary.*cannot be read as weights",
    "SOLVER.MAX_ITER 0": r"SOLVER\.MAX_ITER must be a whole number of at least 1, got 0",
    "SOLVER.MAX_ITER -5": r"SOLVER\.MAX_ITER must be",
    "SOLVER.MAX_ITER many": r"SOLVER\.MAX_ITER; it must be a whole number",
    "SOLVER.STEPS ('a',)": r"SOLVER\.STEPS must be a list of whole numbers",
    "SOLVER.STEPS text": r"SOLVER\.STEPS; it must be a list",
    "TEST.GS.FLIP 3": r"TEST\.GS\.FLIP; it must be True or False",
    "SOLVER.STEPS (3,2)": r"SOLVER\.STEPS must rise",
    "SOLVER.STEPS (-1,)": r"SOLVER\.STEPS must be",
    "SOLVER.IMS_PER_BATCH 0": r"SOLVER\.IMS_PER_BATCH must be",
    "SOLVER.BASE_LR -0.1": r"SOLVER\.BASE_LR must be",
    "SOLVER.CHECKPOINT_PERIOD 0": r"SOLVER\.CHECKPOINT_PERIOD must be",
    "SOLVER.LR_SCHEDULER_NAME Cosine": r"SOLVER\.LR_SCHEDULER_NAME must be one of 'WarmupMultiStepLR'",
    "SOLVER.WARMUP_METHOD none": r"SOLVER\.WARMUP_METHOD must be",
    "MODEL.DEVICE gpu": r"MODEL\.DEVICE 'gpu' cannot be used .*set MODEL\.DEVICE cpu, cuda or cuda:0",
    "MODEL.DEVICE meta": r"MODEL\.DEVICE 'meta' cannot be used",
    "MODEL.DEVICE ''": r"MODEL\.DEVICE",
    "INPUT.FORMAT GRAY": r"INPUT\.FORMAT must be one of 'RGB', 'BGR', got 'GRAY'",
    "INPUT.MIN_SIZE_TEST -1": r"INPUT\.MIN_SIZE_TEST must be",
    "INPUT.MAX_SIZE_TEST -1": r"INPUT\.MAX_SIZE_TEST must be",
    "INPUT.GS.MAX_CROP_SIZE -1": r"INPUT\.GS\.MAX_CROP_SIZE must be",
    "INPUT.GS.SCALES []": r"INPUT\.GS\.SCALES must be a list of numbers above 0",
    "INPUT.GS.SCALES [-1.0]": r"INPUT\.GS\.SCALES must be",
    "INPUT.GS.SCALES ['x']": r"INPUT\.GS\.SCALES must be",
    "INPUT.RANDOM_FLIP both": r"INPUT\.RANDOM_FLIP must be",
    "MODEL.ANCHOR_GENERATOR.SIZES [[-16]]": r"MODEL\.ANCHOR_GENERATOR\.SIZES must be",
    "MODEL.PIXEL_MEAN [1.0]": r"MODEL\.PIXEL_MEAN must be three numbers",
    "MODEL.PIXEL_STD [1.0,0.0,1.0]": r"MODEL\.PIXEL_STD must be",
    "MODEL.BACKBONE.NAME build_nothing": r"MODEL\.BACKBONE\.NAME 'build_nothing' is not registered",
    "MODEL.META_ARCHITECTURE None": r"MODEL\.META_ARCHITECTURE",
    "MODEL.META_ARCHITECTURE Nothing": r"MODEL\.META_ARCHITECTURE 'Nothing' is not registered",
    "MODEL.RPN.HEAD_NAME Nothing": "Nothing",
    "MODEL.FPN.OUT_CHANNELS -3": r"MODEL\.FPN\.OUT_CHANNELS must be",
    "DATALOADER.NUM_WORKERS -1": r"DATALOADER\.NUM_WORKERS must be",
    "SEED -7": "SEED must be",
    "MODEL.GS.KEEP_DEFAULTS [[1],3]": r"MODEL\.GS\.KEEP_DEFAULTS names \[1\], which is no key",
    "MODEL.FPN.NORM nonsense": r"MODEL\.FPN\.NORM must be one of '', 'BN'",
    "MODEL.FPN.FUSE_TYPE max": r"MODEL\.FPN\.FUSE_TYPE must be one of 'sum', 'avg'",
    "MODEL.FPN.IN_FEATURES []": "list index out of range",
    "MODEL.FPN.IN_FEATURES ['x']": r"something is named that is not there \(KeyError: 'x'\)",
    "MODEL.GS.GROUP_SCALES ['x']": r"MODEL\.GS\.GROUP_SCALES must be a list of numbers above 0",
    "MODEL.GS.ANCHOR_STRIDES [-1]": r"MODEL\.GS\.ANCHOR_STRIDES must be",
    "MODEL.GS.SECOND_PASS some": r"MODEL\.GS\.SECOND_PASS must be one of 'best', 'all', 'none'",
    "INPUT.GS.FACE_CROP_SIZE -1": r"INPUT\.GS\.FACE_CROP_SIZE must be",
    "INPUT.GS.FACE_CROP_SCALES []": r"INPUT\.GS\.FACE_CROP_SCALES must be",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING all": r"INPUT\.MIN_SIZE_TRAIN_SAMPLING must be one of 'choice', 'range'",
    "NO.SUCH 1": r"NO\.SUCH",
    "SEED": "opts",
}


@pytest.mark.parametrize("opts", TRAINING)
def test_train_net(opts, surroundings, monkeypatch, capsys, tmp_path):
    key, _, value = opts.format(**surroundings).partition(" ")
    value = "" if value == "''" else value
    command = ["--config-file", DEMO, "DATASETS.TRAIN", "('generated_train',)"]
    command += ["DATASETS.TEST", "('generated_val',)", "OUTPUT_DIR", str(tmp_path / "out")]
    command += [key, value] if " " in opts else [key]
    status, err = run_train_net(monkeypatch, capsys, *command)
    assert status == 2, err
    assert re.search(TRAINING[opts], err.strip().splitlines()[-1]), err


def run_train_net(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_net.py", *arguments])
    return outcome(lambda _: runpy.run_path(str(ROOT / "train_net.py"), run_name="__main__") and 0, [], capsys)


def test_flags_of_train_net(surroundings, monkeypatch, capsys):
    """Of a command that would train: all but the training itself."""
    command = ["--config-file", DEMO, "DATASETS.TRAIN", "('generated_train',)", "DATASETS.TEST", "('generated_val',)"]
    monkeypatch.setattr("gs_d2.engine.launch", lambda *_: None)
    assert run_train_net(monkeypatch, capsys, *command, "OUTPUT_DIR", surroundings["out"])[0] == 0
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self: found.append(self) or sys.exit(2))
        patch.setattr(sys, "argv", ["train_net.py"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "train_net.py"), run_name="__main__")
    actions = [action for action in found[0]._actions if action.option_strings and action.dest != "help"]
    assert {action.dest for action in actions} >= {"config_file", "resume", "eval_only", "num_gpus", "allow_pickle"}
    for action in actions:
        for value in VALUES if action.nargs != 0 else [None]:
            arguments = (
                [action.option_strings[0]]
                if value is None
                else [action.option_strings[0], value.format(**surroundings)]
            )
            if action.dest == "config_file":
                status, err = run_train_net(monkeypatch, capsys, *arguments, *command[2:])
                assert status == 2 and (not value or err), value
            else:
                run_train_net(monkeypatch, capsys, *command[:2], *arguments, *command[2:])
    for flags in (
        ("--num-gpus", "-1"),
        ("--num-machines", "0"),
        ("--machine-rank", "3"),
        ("--num-gpus", "x"),
        ("--none",),
    ):
        assert run_train_net(monkeypatch, capsys, "--config-file", DEMO, *flags)[0] == 2
