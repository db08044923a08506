"""Which part may use which: the import table of the project, enforced by parsing every source file.

Python imports are found anywhere in a file, inside functions too; C++ includes by their text. Each rule is shown to
catch a violation in `VIOLATIONS`.
"""

import ast
import re
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Rule:
    """What the files of one part may use.

    Attributes:
        files: patterns of paths; the first rule that fits a file is the file's only one.
        may: what is importable: a Python module with everything below it, or a pattern of C++ headers. The standard
            library of either language always is.
        never: regular expressions that must not be found in the code, comments and strings apart.
        cfg: the functions that may touch a name `cfg` (Python): "builders" are BUILDERS and registered functions.
    """

    files: tuple[str, ...]
    may: tuple[str, ...]
    never: tuple[str, ...] = ()
    cfg: str = "nowhere"


# from_config, and what a detector says of itself (gs_d2.modeling.description.Description).
BUILDERS = ("from_config", "test_settings", "breaking_defaults", "contradictions", "unread_keys")
TORCH_OPS_DIRECTLY = r"\btorch\s*\.\s*ops\s*\.\s*gs_d2\b"
MESSAGES_WITH_PATHS = r"\bSTD_TORCH_CHECK"  # errors.h has a check without
DETECTRON2_MODELING = (
    "detectron2.config.configurable",
    "detectron2.layers",
    "detectron2.modeling",
    "detectron2.structures",
    "detectron2.utils.events",
)

RULES = {
    # Python
    "gs_d2": Rule(files=("gs_d2/__init__.py",), may=()),
    "compat": Rule(files=("gs_d2/compat.py",), may=("detectron2", "torch.distributed")),
    "collect_env": Rule(
        files=("gs_d2/collect_env.py",),
        may=(
            "torch",
            "detectron2._C",
            "detectron2.utils.collect_env",
            "gs_d2.__version__",
            "gs_d2.compat",
            "gs_d2.ops",
        ),
    ),
    "config": Rule(
        files=("gs_d2/config.py",),
        # data and modeling to register them, the checks when they are asked for
        may=(
            "yaml",
            "detectron2.config",
            "gs_d2.compat",
            "gs_d2.data",
            "gs_d2.engine.checks",
            "gs_d2.formats.text",
            "gs_d2.modeling",
        ),
        cfg="anywhere",
    ),
    "unread keys": Rule(files=("gs_d2/unread_keys.py",), may=()),
    "command line": Rule(files=("gs_d2/command_line.py",), may=()),
    "weights": Rule(  # without Detectron2
        files=("gs_d2/weights.py",),
        may=("numpy", "torch", "safetensors", "gs_d2.formats.files", "gs_d2.formats.whole_file"),
        never=(TORCH_OPS_DIRECTLY,),
    ),
    "checkpoint": Rule(
        files=("gs_d2/checkpoint.py",),
        may=(
            "numpy",
            "torch",
            "detectron2.checkpoint.DetectionCheckpointer",
            "detectron2.utils.comm",
            "detectron2.utils.file_io.PathManager",
            "gs_d2.compat",
            "gs_d2.formats.whole_file",
            "gs_d2.weights",
        ),
        never=(TORCH_OPS_DIRECTLY,),
    ),
    "ops": Rule(files=("gs_d2/ops/*.py",), may=("torch", "gs_d2._C", "gs_d2.ops")),
    "sampling": Rule(files=("gs_d2/sampling.py",), may=("torch", "gs_d2.ops"), never=(TORCH_OPS_DIRECTLY,)),
    "modeling without cfg": Rule(
        files=("gs_d2/modeling/matcher.py", "gs_d2/modeling/losses.py"),
        may=("torch", "gs_d2.ops", "detectron2.structures"),
        never=(TORCH_OPS_DIRECTLY,),
    ),
    "networks alone": Rule(  # detectors that differ in their network, and have nothing of their own to say of sampling
        files=("gs_d2/modeling/pipelines/retinaface.py", "gs_d2/modeling/pipelines/ssd.py"),
        may=("torch", "fvcore.nn", "gs_d2.modeling.rpn_heads", "gs_d2.unread_keys", *DETECTRON2_MODELING),
        never=(r"(?i)sampl|match|group|loss|iou|nms",),
        cfg="builders",
    ),
    "detector without samples": Rule(
        files=("gs_d2/modeling/pipelines/centernet.py",),
        may=(
            "torch",
            "fvcore.nn",
            "gs_d2.modeling.box_detector",
            "gs_d2.modeling.decoding",
            "gs_d2.modeling.description",
            "gs_d2.unread_keys",
            *DETECTRON2_MODELING,
        ),
        never=(TORCH_OPS_DIRECTLY, r"(?i)sampler|match|group|anchor|paired_iou"),
        cfg="builders",
    ),
    "timm backbone": Rule(  # reads a file of weights when it is built, before BatchNorm is folded
        files=("gs_d2/modeling/timm_backbone.py",),
        may=(
            "timm",
            "torch",
            "gs_d2.weights.read_weights",
            "gs_d2.modeling.backbone",
            "gs_d2.modeling.bn_folding",
            *DETECTRON2_MODELING,
        ),
        never=(TORCH_OPS_DIRECTLY,),
        cfg="builders",
    ),
    "description": Rule(  # knows no detector
        files=("gs_d2/modeling/description.py",),
        may=("detectron2.modeling.META_ARCH_REGISTRY",),
        cfg="builders",
    ),
    "box detector": Rule(  # knows no anchors, no samples and no losses
        files=("gs_d2/modeling/box_detector.py",),
        may=(
            "torch",
            "gs_d2.modeling.description.DetectionSettings",
            "gs_d2.modeling.nms",
            *DETECTRON2_MODELING,
        ),
        never=(r"(?i)sampl|match|anchor|iou",),
        cfg="builders",
    ),
    "modeling": Rule(
        files=("gs_d2/modeling/*.py",),
        may=(
            "torch",
            "torchvision.ops",
            "fvcore.nn",
            "gs_d2.compat",
            "gs_d2.modeling",
            "gs_d2.ops",
            "gs_d2.sampling",
            "gs_d2.unread_keys",
            *DETECTRON2_MODELING,
        ),
        never=(TORCH_OPS_DIRECTLY,),
        cfg="builders",
    ),
    "videos": Rule(files=("gs_d2/formats/videos.py",), may=("numpy", "cv2", "PIL")),
    "formats": Rule(
        files=("gs_d2/formats/*.py",), may=("numpy", "scipy", "h5py", "PIL", "pillow_heif", "tqdm", "gs_d2.formats")
    ),
    "data loaders": Rule(
        files=("gs_d2/data/loaders.py",),
        may=("numpy", "torch", "detectron2.data", "gs_d2.data", "gs_d2.formats.images.TransientReadError"),
        never=(TORCH_OPS_DIRECTLY,),
        cfg="anywhere",
    ),
    "generated faces": Rule(files=("gs_d2/data/generated_faces.py",), may=("numpy", "scipy.io.savemat", "PIL", "tqdm")),
    "data": Rule(
        files=("gs_d2/data/*.py",),
        may=(
            "numpy",
            "torch",
            "detectron2.config.configurable",
            "detectron2.data",
            "detectron2.structures",
            "PIL",
            "gs_d2.compat",
            "gs_d2.data",
            "gs_d2.formats",
        ),
        never=(TORCH_OPS_DIRECTLY,),
        cfg="builders",
    ),
    "evaluation arithmetic": Rule(  # what the protocols stand on
        files=("gs_d2/evaluation/precision_recall.py", "gs_d2/evaluation/report.py"),
        may=("numpy", "gs_d2.formats.json_text", "gs_d2.formats.whole_file"),
    ),
    "curves": Rule(
        files=("gs_d2/evaluation/curves.py",),
        may=("numpy", "matplotlib", "gs_d2.evaluation.precision_recall", "gs_d2.formats.files"),
    ),
    "protocols": Rule(  # of one benchmark each: none knows another, or Detectron2
        files=tuple(
            f"gs_d2/evaluation/{name}.py"
            for name in ("wider_face", "fddb", "fddb_regions", "fddb_ellipse_fit", "face_eval")
        ),
        may=(
            "numpy",
            "scipy",
            "PIL",
            "gs_d2.evaluation.curves",
            "gs_d2.evaluation.fddb_ellipse_fit",
            "gs_d2.evaluation.fddb_regions",
            "gs_d2.evaluation.precision_recall",
            "gs_d2.evaluation.report",
            "gs_d2.formats",
        ),
    ),
    "evaluators": Rule(
        files=("gs_d2/evaluation/*.py",),
        may=(
            "numpy",
            "pycocotools",
            "detectron2.data",
            "detectron2.evaluation",
            "detectron2.utils.comm",
            "gs_d2.compat",
            "gs_d2.data.catalog",  # the records that are evaluated are those that were checked
            "gs_d2.data.coco.has_coco_file",
            "gs_d2.data.coco.set_classes",
            "gs_d2.data.records",
            "gs_d2.evaluation",
            "gs_d2.formats",
        ),
    ),
    "model zoo": Rule(
        files=("gs_d2/model_zoo/*.py",),
        may=(
            "detectron2.config",
            "detectron2.modeling.build_model",
            "gs_d2.checkpoint",
            "gs_d2.config",
        ),
        never=(TORCH_OPS_DIRECTLY,),
        cfg="anywhere",
    ),
    "face detector": Rule(  # puts the others together, for users
        files=("gs_d2/inference/face_detector.py",),
        may=(
            "numpy",
            "torch",
            "PIL",
            "detectron2.config",
            "detectron2.data.detection_utils",
            "detectron2.data.transforms",
            "detectron2.modeling.build_model",
            "gs_d2.checkpoint",
            "gs_d2.config",
            "gs_d2.formats",
            "gs_d2.inference",
            "gs_d2.model_zoo",
            "gs_d2.modeling",
        ),
        never=(TORCH_OPS_DIRECTLY,),
        cfg="anywhere",
    ),
    "export": Rule(  # knows the parts of a detector, so that a graph is made of the same
        files=("gs_d2/inference/export.py",),
        may=(
            "torch",
            "torchvision.ops.nms",
            "onnxscript.opset20",
            "gs_d2.inference.pyramid.PyramidDetector",
            "gs_d2.modeling.RPNDetector",
        ),
        never=(TORCH_OPS_DIRECTLY,),
    ),
    "exported files": Rule(
        files=("gs_d2/inference/exported.py",),
        may=("numpy", "torch", "onnxruntime", "gs_d2.inference.export", "gs_d2.modeling.nms.top_nms"),
        never=(TORCH_OPS_DIRECTLY,),
    ),
    "inference": Rule(
        files=("gs_d2/inference/*.py",),
        may=(
            "numpy",
            "torch",
            "detectron2.config.configurable",
            "detectron2.data.transforms",
            "detectron2.structures",
            "gs_d2.compat",
            "gs_d2.config.check_pyramid",
            "gs_d2.inference",
            "gs_d2.ops",
        ),
        never=(TORCH_OPS_DIRECTLY,),
        cfg="builders",
    ),
    "engine without cfg": Rule(  # what other trainers can use
        files=tuple(
            f"gs_d2/engine/{name}.py"
            for name in (
                "keeping",
                "launch",
                "left_out",
                "nonfinite",
                "schedule",
                "seeding",
                "step",
                "stopping",
                "train_data",
                "watchdog",
                "weight_average",
                "writers",
            )
        ),
        may=(
            "numpy",
            "torch",
            "fvcore.common.history_buffer",
            "fvcore.common.param_scheduler",
            "detectron2.data",
            "detectron2.engine",
            "detectron2.evaluation",
            "detectron2.structures",
            "detectron2.utils",
            "gs_d2.compat",
            "gs_d2.data.workers",
            "gs_d2.engine",
            "gs_d2.formats.json_text",
            "gs_d2.weights",
        ),
        never=(TORCH_OPS_DIRECTLY,),
    ),
    "optimizer": Rule(
        files=("gs_d2/engine/optimizer.py",),
        may=("torch", "detectron2.solver"),
        never=(TORCH_OPS_DIRECTLY,),
        cfg="anywhere",
    ),
    "checks": Rule(
        files=("gs_d2/engine/checks.py",),
        may=(
            "detectron2.config.get_cfg",
            "detectron2.data.MetadataCatalog",
            "gs_d2.config.add_gs_config",
            "gs_d2.config.check_pyramid",
            "gs_d2.engine.schedule.FLAT_DECAY",
            "gs_d2.engine.value_checks.check_values",
            "gs_d2.modeling.description_of",
            "gs_d2.unread_keys",
        ),
        cfg="anywhere",
    ),
    "value checks": Rule(  # of keys and values alone
        files=("gs_d2/engine/value_checks.py",),
        may=(
            "torch",
            "detectron2.config.get_cfg",
            "detectron2.modeling.BACKBONE_REGISTRY",
            "gs_d2.engine.schedule.FLAT_DECAY",
        ),
        cfg="anywhere",
    ),
    "engine": Rule(  # puts the others together, for training
        files=("gs_d2/engine/*.py",),
        may=(
            "detectron2.data",
            "detectron2.engine",
            "detectron2.evaluation",
            "detectron2.solver",
            "detectron2.utils",
            "gs_d2.checkpoint",
            "gs_d2.compat",
            "gs_d2.config",
            "gs_d2.data",
            "gs_d2.engine",
            "gs_d2.evaluation",
            "gs_d2.inference",
            "gs_d2.modeling",
            "torch.nn.parallel.DistributedDataParallel",
        ),
        never=(TORCH_OPS_DIRECTLY,),
        cfg="anywhere",
    ),
    "conversion": Rule(  # of weights; the networks are asked for names and shapes
        files=("gs_d2/conversion/*.py",),
        may=(
            "numpy",
            "torch",
            "torchvision.models.resnet",
            "timm",
            "onnx",
            "gs_d2.conversion",
            "gs_d2.modeling.pipelines",
            "gs_d2.weights",
        ),
        never=(TORCH_OPS_DIRECTLY,),
    ),
    "hits": Rule(files=("gs_d2/analysis/hits.py",), may=("numpy", "torch", "gs_d2.ops")),
    "score calibration": Rule(
        files=("gs_d2/analysis/score_calibration.py",),
        may=(
            "numpy",
            "torch",
            "gs_d2.data.records",
            "gs_d2.analysis.hits",
            "gs_d2.modeling.calibration",
            "gs_d2.ops",
            "gs_d2.sampling",
        ),
    ),
    "scale balance": Rule(
        files=("gs_d2/analysis/scale_balance.py",),
        may=(
            "numpy",
            "torch",
            "gs_d2.analysis.score_calibration",
            "gs_d2.evaluation.wider_face",
            "gs_d2.formats.wider_face",
            "gs_d2.modeling.calibration",
            "gs_d2.sampling",
        ),
    ),
    "analysis": Rule(  # of a config: builds its parts, trains none
        files=("gs_d2/analysis/*.py",),
        may=(
            "fvcore.nn",
            "numpy",
            "PIL",
            "torch",
            "tqdm",
            "detectron2.data.DatasetCatalog",
            "detectron2.layers",
            "detectron2.modeling",
            "detectron2.structures",
            "gs_d2.analysis.views",
            "gs_d2.config",
            "gs_d2.data",
            "gs_d2.formats.text",
            "gs_d2.model_zoo",
            "gs_d2.modeling",
            "gs_d2.ops",
        ),
        never=(TORCH_OPS_DIRECTLY,),
        cfg="anywhere",
    ),
    "visualization": Rule(files=("gs_d2/visualization.py",), may=("numpy", "PIL")),
    "web page": Rule(  # is given gradio
        files=("gs_d2/web_page.py",),
        may=(
            "numpy",
            "PIL",
            "gs_d2.anonymization",
            "gs_d2.formats",
            "gs_d2.inference.FaceDetector",
            "gs_d2.visualization",
        ),
    ),
    "anonymization": Rule(files=("gs_d2/anonymization.py",), may=("numpy", "PIL", "gs_d2.formats.images")),
    # C++ and CUDA
    "csrc/math": Rule(
        files=("csrc/math/*",),
        may=("csrc/math/*.h",),
        never=(r"\bnew\b", r"\bmalloc\b", r"\btorch\b", r"__global__"),
    ),
    "csrc/cpu": Rule(
        files=("csrc/cpu/*",),
        may=("csrc/math/*.h", "csrc/cpu/*.h"),
        never=(r"\btorch\b", r"\bexit\s*\("),
    ),
    "csrc/cuda": Rule(
        files=("csrc/cuda/*",),
        may=("csrc/math/*.h", "csrc/cuda/*.h", "<cuda_runtime.h>", "<cub/*/*.cuh>"),  # never all of <cub/cub.cuh>
        never=(r"\btorch\b", r"\bexit\s*\("),
    ),
    "csrc/ops for CUDA": Rule(
        files=("csrc/ops/*_cuda.cpp", "csrc/ops/cuda_*.h"),
        may=(
            "csrc/ops/check.h",
            "csrc/ops/errors.h",
            "csrc/ops/tensors.h",
            "csrc/ops/cuda_*.h",
            "csrc/cuda/kernels.h",
            "csrc/math/*.h",
            "<cuda_runtime.h>",
            "<torch/csrc/stable/*>",
            "<torch/csrc/inductor/aoti_torch/c/shim.h>",  # the stable ABI itself
            "<torch/headeronly/*>",
        ),
        never=(r"<<<", MESSAGES_WITH_PATHS),
    ),
    "csrc/ops": Rule(
        files=("csrc/ops/*",),
        may=(
            "csrc/ops/check.h",
            "csrc/ops/errors.h",
            "csrc/ops/tensors.h",
            "csrc/cpu/kernels.h",
            "csrc/math/*.h",
            "<Python.h>",
            "<torch/csrc/stable/*>",
            "<torch/csrc/inductor/aoti_torch/c/shim.h>",  # the stable ABI itself
            "<torch/headeronly/*>",
        ),
        never=(r"<<<", MESSAGES_WITH_PATHS),
    ),
}

# The oracle of the tests: only ops/__init__.py may name it, which loads it when somebody asks for ops.reference
# (test_import.py shows that it does not load it otherwise).
REFERENCE = "gs_d2.ops.reference"
MAY_NAME_REFERENCE = ("gs_d2/ops/__init__.py",)


# What breaks a rule: (rule, file, source, what the report must name).
VIOLATIONS = [
    ("gs_d2", "gs_d2/__init__.py", "import detectron2", "detectron2"),
    ("gs_d2", "gs_d2/__init__.py", "from . import modeling", "gs_d2.modeling"),
    ("compat", "gs_d2/compat.py", "from gs_d2 import ops", "gs_d2.ops"),
    ("collect_env", "gs_d2/collect_env.py", "import gs_d2.modeling", "gs_d2.modeling"),
    ("config", "gs_d2/config.py", "from detectron2.modeling import build_model", "detectron2.modeling.build_model"),
    ("config", "gs_d2/config.py", "import gs_d2.engine", "gs_d2.engine"),
    ("unread keys", "gs_d2/unread_keys.py", "from detectron2.config import get_cfg", "detectron2.config.get_cfg"),
    ("command line", "gs_d2/command_line.py", "import torch", "torch"),
    ("weights", "gs_d2/weights.py", "from detectron2.checkpoint import DetectionCheckpointer", "detectron2.checkpoint"),
    ("checkpoint", "gs_d2/checkpoint.py", "from gs_d2.config import load_config", "gs_d2.config.load_config"),
    ("checkpoint", "gs_d2/checkpoint.py", "def f(cfg):\n    return cfg.OUTPUT_DIR", "cfg"),
    ("ops", "gs_d2/ops/x.py", "from detectron2.structures import Boxes", "detectron2.structures.Boxes"),
    ("ops", "gs_d2/ops/x.py", "def f():\n    import detectron2.config as c", "detectron2.config"),
    ("ops", "gs_d2/ops/x.py", "def f(cfg):\n    return 1", "cfg"),
    ("ops", "gs_d2/ops/x.py", "from ..modeling import rpn", "gs_d2.modeling.rpn"),
    ("ops", "gs_d2/ops/fake.py", "from gs_d2.ops.reference import box_iou", REFERENCE),
    ("sampling", "gs_d2/sampling.py", "from detectron2.structures import Boxes", "detectron2.structures.Boxes"),
    ("sampling", "gs_d2/sampling.py", "from gs_d2.modeling import TwoPassMatcher", "gs_d2.modeling.TwoPassMatcher"),
    ("modeling without cfg", "gs_d2/modeling/losses.py", "def from_config(cls, cfg):\n    pass", "cfg"),
    (
        "modeling without cfg",
        "gs_d2/modeling/matcher.py",
        "from detectron2.utils.events import get_event_storage",
        "detectron2.utils.events.get_event_storage",
    ),
    ("modeling without cfg", "gs_d2/modeling/losses.py", "from .rpn import x", "gs_d2.modeling.rpn.x"),
    ("modeling without cfg", "gs_d2/modeling/matcher.py", "torch.ops.gs_d2.box_iou(a, b)", "torch.ops.gs_d2"),
    ("networks alone", "gs_d2/modeling/pipelines/ssd.py", "x = cfg.MODEL", "cfg"),
    ("networks alone", "gs_d2/modeling/pipelines/ssd.py", "from gs_d2.modeling import rpn", "gs_d2.modeling.rpn"),
    ("networks alone", "gs_d2/modeling/pipelines/retinaface.py", "x = self.GroupSampler()", "Group"),
    (
        "description",
        "gs_d2/modeling/description.py",
        "from gs_d2.modeling.meta_arch import RPNDetector",
        "gs_d2.modeling.meta_arch.RPNDetector",
    ),
    ("detector without samples", "gs_d2/modeling/pipelines/centernet.py", "x = self.matcher", "match"),
    (
        "detector without samples",
        "gs_d2/modeling/pipelines/centernet.py",
        "from gs_d2.modeling.group_loss import GroupLoss",
        "gs_d2.modeling.group_loss.GroupLoss",
    ),
    ("description", "gs_d2/modeling/description.py", "def ask(detector, cfg):\n    pass", "cfg"),
    ("box detector", "gs_d2/modeling/box_detector.py", "from gs_d2.modeling import rpn", "gs_d2.modeling.rpn"),
    ("box detector", "gs_d2/modeling/box_detector.py", "class A:\n    anchors = None", "anchor"),
    ("modeling", "gs_d2/modeling/anchors.py", "def __init__(self, cfg):\n    self.x = 1", "cfg"),
    ("modeling", "gs_d2/modeling/rpn.py", "class A:\n    def f(self):\n        return self.cfg.MODEL", "cfg"),
    ("modeling", "gs_d2/modeling/backbone.py", "def build_x(cfg):\n    return cfg.MODEL", "cfg"),
    ("modeling", "gs_d2/modeling/rpn.py", "y = torch.ops.gs_d2.box_iou(a, b)", "torch.ops.gs_d2"),
    ("modeling", "gs_d2/modeling/rpn.py", "from torch.ops import gs_d2", "torch.ops"),
    ("modeling", "gs_d2/modeling/rpn.py", "from torch import ops", "torch.ops"),
    ("modeling", "gs_d2/modeling/rpn.py", "import importlib\nimportlib.import_module('gs_d2.data')", "gs_d2.data"),
    ("timm backbone", "gs_d2/modeling/timm_backbone.py", "from gs_d2.checkpoint import Checkpointer", "Checkpointer"),
    ("modeling", "gs_d2/modeling/rpn.py", "import timm", "timm"),
    ("modeling", "gs_d2/modeling/meta_arch.py", "from gs_d2 import evaluation", "gs_d2.evaluation"),
    ("modeling", "gs_d2/modeling/meta_arch.py", "from detectron2.config import get_cfg", "detectron2.config.get_cfg"),
    ("modeling", "gs_d2/modeling/rpn.py", "from gs_d2.ops import reference", REFERENCE),
    ("modeling", "gs_d2/modeling/rpn.py", "from gs_d2 import ops\nops.reference.box_iou(a, b)", REFERENCE),
    ("modeling", "gs_d2/modeling/x.py", "from gs_d2.config import add_gs_config", "gs_d2.config.add_gs_config"),
    ("data", "gs_d2/data/x.py", "from gs_d2.config import add_gs_config", "gs_d2.config.add_gs_config"),
    ("formats", "gs_d2/formats/x.py", "from gs_d2.data import load_wider_face", "gs_d2.data.load_wider_face"),
    ("formats", "gs_d2/formats/x.py", "from ..evaluation.report import percent", "gs_d2.evaluation.report.percent"),
    ("formats", "gs_d2/formats/x.py", "import torch", "torch"),
    ("formats", "gs_d2/formats/x.py", "import cv2", "cv2"),
    ("videos", "gs_d2/formats/videos.py", "from gs_d2.visualization import draw", "gs_d2.visualization.draw"),
    ("data loaders", "gs_d2/data/loaders.py", "from gs_d2.evaluation import WiderFaceEvaluator", "gs_d2.evaluation"),
    ("data", "gs_d2/data/x.py", "from gs_d2.modeling import GroupSampler", "gs_d2.modeling.GroupSampler"),
    ("data", "gs_d2/data/x.py", "from .. import ops", "gs_d2.ops"),
    ("data", "gs_d2/data/x.py", "import gs_d2.evaluation.wider_face", "gs_d2.evaluation.wider_face"),
    ("data", "gs_d2/data/x.py", "def __call__(self, cfg):\n    pass", "cfg"),
    ("evaluators", "gs_d2/evaluation/x.py", "from gs_d2.data import load_wider_face", "gs_d2.data.load_wider_face"),
    ("evaluators", "gs_d2/evaluation/x.py", "from gs_d2.data.loaders import build_test_loader", "gs_d2.data.loaders"),
    ("evaluators", "gs_d2/evaluation/x.py", "import gs_d2.ops", "gs_d2.ops"),
    ("evaluators", "gs_d2/evaluation/x.py", "def from_config(cls, cfg):\n    pass", "cfg"),
    ("evaluators", "gs_d2/evaluation/x.py", "import matplotlib", "matplotlib"),
    (
        "evaluation arithmetic",
        "gs_d2/evaluation/report.py",
        "from gs_d2.evaluation.fddb import FddbResult",
        "gs_d2.evaluation.fddb.FddbResult",
    ),
    ("curves", "gs_d2/evaluation/curves.py", "from gs_d2.evaluation.report import percent", "gs_d2.evaluation.report"),
    ("protocols", "gs_d2/evaluation/fddb.py", "from detectron2.data import MetadataCatalog", "detectron2.data"),
    (
        "protocols",
        "gs_d2/evaluation/wider_face.py",
        "from gs_d2.evaluation.face_eval import FaceEvalResult",
        "gs_d2.evaluation.face_eval.FaceEvalResult",
    ),
    ("inference", "gs_d2/inference/x.py", "from gs_d2.modeling import RPNDetector", "gs_d2.modeling.RPNDetector"),
    ("inference", "gs_d2/inference/x.py", "from gs_d2.data import FaceDatasetMapper", "gs_d2.data.FaceDatasetMapper"),
    ("inference", "gs_d2/inference/x.py", "def forward(self, cfg):\n    pass", "cfg"),
    (
        "face detector",
        "gs_d2/inference/face_detector.py",
        "from gs_d2.data import FaceDatasetMapper",
        "gs_d2.data.FaceDatasetMapper",
    ),
    ("model zoo", "gs_d2/model_zoo/__init__.py", "from gs_d2.inference import FaceDetector", "gs_d2.inference"),
    ("face detector", "gs_d2/inference/face_detector.py", "from gs_d2 import visualization", "gs_d2.visualization"),
    (
        "engine without cfg",
        "gs_d2/engine/step.py",
        "from gs_d2.config import check_config",
        "gs_d2.config.check_config",
    ),
    ("engine without cfg", "gs_d2/engine/train_data.py", "def build(cfg):\n    pass", "cfg"),
    ("optimizer", "gs_d2/engine/optimizer.py", "from detectron2 import data", "detectron2.data"),
    ("checks", "gs_d2/engine/checks.py", "from gs_d2.modeling import RPNDetector", "gs_d2.modeling.RPNDetector"),
    ("value checks", "gs_d2/engine/value_checks.py", "from gs_d2.modeling import ops", "gs_d2.modeling.ops"),
    ("engine", "gs_d2/engine/trainer.py", "from gs_d2 import ops", "gs_d2.ops"),
    ("engine", "gs_d2/engine/__init__.py", "from gs_d2 import visualization", "gs_d2.visualization"),
    ("export", "gs_d2/inference/export.py", "import onnx", "onnx"),
    (
        "export",
        "gs_d2/inference/export.py",
        "from gs_d2.modeling.rpn import best_boxes",
        "gs_d2.modeling.rpn.best_boxes",
    ),
    ("exported files", "gs_d2/inference/exported.py", "import onnx", "onnx"),
    ("conversion", "gs_d2/conversion/x.py", "from gs_d2.checkpoint import Checkpointer", "gs_d2.checkpoint"),
    ("hits", "gs_d2/analysis/hits.py", "import gs_d2.evaluation", "gs_d2.evaluation"),
    ("score calibration", "gs_d2/analysis/score_calibration.py", "import gs_d2.evaluation", "gs_d2.evaluation"),
    ("scale balance", "gs_d2/analysis/scale_balance.py", "import gs_d2.data", "gs_d2.data"),
    ("analysis", "gs_d2/analysis/x.py", "from gs_d2.engine import Trainer", "gs_d2.engine.Trainer"),
    ("generated faces", "gs_d2/data/generated_faces.py", "from detectron2.data import x", "detectron2.data.x"),
    ("visualization", "gs_d2/visualization.py", "from detectron2.data import DatasetCatalog", "DatasetCatalog"),
    ("web page", "gs_d2/web_page.py", "import gradio", "gradio"),
    ("anonymization", "gs_d2/anonymization.py", "from gs_d2.inference import FaceDetector", "gs_d2.inference"),
    ("csrc/math", "csrc/math/x.h", "#include <torch/torch.h>", "<torch/torch.h>"),
    ("csrc/math", "csrc/math/x.h", "#  include <cuda_runtime.h>", "<cuda_runtime.h>"),
    ("csrc/math", "csrc/math/x.h", '#include "../cpu/kernels.h"', "csrc/cpu/kernels.h"),
    ("csrc/math", "csrc/math/x.h", "float* f() { return new float[3]; }", "new"),
    ("csrc/cpu", "csrc/cpu/x.cpp", "#include <torch/csrc/stable/tensor.h>", "<torch/csrc/stable/tensor.h>"),
    ("csrc/cpu", "csrc/cpu/x.cpp", '#include "../cuda/kernels.h"', "csrc/cuda/kernels.h"),
    ("csrc/cpu", "csrc/cpu/x.cpp", "void f() { std::exit(1); }", "exit"),
    ("csrc/cuda", "csrc/cuda/x.cu", "#include <ATen/ATen.h>", "<ATen/ATen.h>"),
    ("csrc/cuda", "csrc/cuda/x.cu", "#include <cub/cub.cuh>", "<cub/cub.cuh>"),
    ("csrc/cuda", "csrc/cuda/x.cu", "torch::stable::Tensor f();", "torch"),
    ("csrc/ops for CUDA", "csrc/ops/x_cuda.cpp", '#include "../cpu/kernels.h"', "csrc/cpu/kernels.h"),
    ("csrc/ops for CUDA", "csrc/ops/x_cuda.cpp", "kernel<<<1, 2>>>();", "<<<"),
    ("csrc/ops", "csrc/ops/x_cpu.cpp", '#include "../cuda/kernels.h"', "csrc/cuda/kernels.h"),
    ("csrc/ops", "csrc/ops/check.h", '#include "../cuda/kernels.h"', "csrc/cuda/kernels.h"),
    ("csrc/ops", "csrc/ops/x_cpu.cpp", '#include "cuda_launch.h"', "csrc/ops/cuda_launch.h"),
    ("csrc/ops", "csrc/ops/x_cpu.cpp", "#include <ATen/ATen.h>", "<ATen/ATen.h>"),
    ("csrc/ops", "csrc/ops/library.cpp", "kernel<<<1, 2>>>();", "<<<"),
    ("csrc/ops", "csrc/ops/check.h", 'void f() { STD_TORCH_CHECK(false, "no"); }', "STD_TORCH_CHECK"),
    ("csrc/ops for CUDA", "csrc/ops/x_cuda.cpp", 'void f() { STD_TORCH_CHECK(false, "no"); }', "STD_TORCH_CHECK"),
]

# What looks like a violation and is none.
ALLOWED = [
    ("gs_d2/ops/x.py", '"""Not import detectron2."""\nimport math, torch.library\nfrom . import fake'),
    ("gs_d2/ops/__init__.py", "from gs_d2.ops import reference"),
    ("gs_d2/modeling/pipelines/ssd.py", '"""Groups are sampled elsewhere."""\nimport torch  # not losses'),
    (
        "gs_d2/modeling/rpn.py",
        "class A:\n    @classmethod\n    def from_config(cls, cfg, shape):\n        x = cfg.MODEL",
    ),
    (
        "gs_d2/modeling/retinanet.py",
        "class A:\n    @classmethod\n    def test_settings(cls, cfg):\n        x = cfg.MODEL",
    ),
    ("gs_d2/modeling/backbone.py", "@BACKBONE_REGISTRY.register()\ndef build_x(cfg, shape):\n    return cfg.MODEL"),
    ("gs_d2/modeling/rpn.py", "from gs_d2 import ops  # not torch.ops.gs_d2\nops.box_iou(a, b)"),
    ("gs_d2/config.py", "def check_config(cfg):\n    return cfg.MODEL"),
    ("csrc/math/x.h", '// a new #include <torch/torch.h>\n#include <cmath>\n#include "box_iou.h"'),
    ("csrc/cuda/x.cu", "#include <cub/block/block_reduce.cuh>\nkernel<<<1, 2>>>();"),
    ("csrc/ops/x_cuda.cpp", '/* <<< */\n#include "../cuda/kernels.h"\n#include <torch/csrc/stable/ops.h>'),
]


def source_files() -> list[str]:
    paths = [path for pattern in ("gs_d2/**/*.py", "csrc/**/*.*") for path in ROOT.glob(pattern)]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths if path.is_file())


def rule_of(path: str) -> str | None:
    return next((name for name, rule in RULES.items() if any(fnmatch(path, p) for p in rule.files)), None)


def violations(path: str, source: str) -> list[str]:
    """One line for each thing that breaks the rule of the file."""
    rule = RULES[rule_of(path)]
    if not path.endswith(".py"):
        return cpp_violations(path, source, rule)
    tree = ast.parse(source, path)
    found = [
        f"imports {name}"
        for name in imported_names(tree, path)
        if name.split(".")[0] not in sys.stdlib_module_names and not any(is_below(name, part) for part in rule.may)
    ]
    found += [f"imports {name}" for name in imported_names(tree, path) if is_below(name, "torch.ops")]
    if path not in MAY_NAME_REFERENCE:
        found += [f"imports {name}" for name in imported_names(tree, path) if is_below(name, REFERENCE)]
        found += [f"uses {REFERENCE}" for node in ast.walk(tree) if dotted(node).endswith("ops.reference")]
    code = ast.unparse(without_strings(tree))
    found += [f"has {match.group()}" for text in rule.never for match in re.finditer(text, code)]
    return found + [f"touches cfg in line {line}" for line in cfg_outside_builders(tree, rule.cfg)]


def imported_names(tree, path):
    """Every module or name imported, absolute: `from a import b` is a.b, import_module("a.b") is a.b."""
    package = PurePosixPath(path).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value


def is_below(name, part):
    return name == part or name.startswith(part + ".")


def dotted(node) -> str:
    """`a.b.c` of an attribute chain, else ""."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def without_strings(tree):
    class Blank(ast.NodeTransformer):
        def visit_Constant(self, node):
            return ast.Constant("") if isinstance(node.value, str) else node

        def visit_JoinedStr(self, node):
            return ast.Constant("")

    return Blank().visit(tree)


def cfg_outside_builders(tree, where) -> list[int]:
    lines = []

    def visit(node):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and where == "builders":
            registered = any(dotted(getattr(d, "func", d)).endswith("REGISTRY.register") for d in node.decorator_list)
            if node.name in BUILDERS or registered:
                return
        name = getattr(node, "id", getattr(node, "arg", getattr(node, "attr", None)))
        if isinstance(node, (ast.Name, ast.arg, ast.Attribute)) and name == "cfg":
            lines.append(node.lineno)
        for child in ast.iter_child_nodes(node):
            visit(child)

    if where != "anywhere":
        visit(tree)
    return lines


def cpp_violations(path, source, rule):
    code = re.sub(r"//[^\n]*|/\*.*?\*/", " ", source, flags=re.DOTALL)
    found = []
    for header in re.findall(r'^[ \t]*#[ \t]*include[ \t]*(<[^>]+>|"[^"]+")', code, flags=re.MULTILINE):
        if header.startswith('"'):
            header = normalised(PurePosixPath(path).parent / header.strip('"'))
        standard = re.fullmatch(r"<[a-z_0-9]+>", header)
        if not standard and not any(fnmatch(header, pattern) for pattern in rule.may):
            found.append(f"includes {header}")
    code = re.sub(r"^[ \t]*#[ \t]*include[^\n]*", "", code, flags=re.MULTILINE)
    return found + [f"has {match.group()}" for text in rule.never for match in re.finditer(text, code)]


def normalised(path: PurePosixPath) -> str:
    parts = []
    for part in path.parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


@cache
def text_of(path):
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", source_files())
def test_every_file_keeps_to_its_rule(path):
    assert rule_of(path) is not None, f"{path} is of no part that the table knows: add it to RULES"
    assert violations(path, text_of(path)) == []


@pytest.mark.parametrize(("rule", "path", "source", "named"), VIOLATIONS)
def test_a_violation_is_found(rule, path, source, named):
    assert rule_of(path) == rule
    found = violations(path, source)
    assert found, "the rule lets it through"
    assert any(named in line for line in found), found


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_what_is_allowed_is_not_found(path, source):
    assert violations(path, source) == []


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_shown_to_bite_and_has_files(name):
    assert any(rule == name for rule, *_ in VIOLATIONS)
    if "cuda" in name.lower() and not (ROOT / "csrc/cuda").exists():
        pytest.skip("the CUDA kernels are not part of this checkout")
    assert any(rule_of(path) == name for path in source_files())


def names_of_detectors() -> dict[str, str]:
    """Of every class that this project registers as a meta-architecture, and Detectron2's own: the file that has it."""
    from detectron2.modeling import META_ARCH_REGISTRY

    import gs_d2.modeling  # noqa: F401

    return {name: detector.__module__.replace(".", "/") + ".py" for name, detector in META_ARCH_REGISTRY}


def strings_of_code(tree) -> set[str]:
    """The words of all strings but docstrings and those of a raised message."""
    left_out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            left_out |= {id(x) for x in ast.walk(node)}
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.add(id(node.value))
    constants = (x for x in ast.walk(tree) if isinstance(x, ast.Constant) and id(x) not in left_out)
    return {word for x in constants if isinstance(x.value, str) for word in re.findall(r"\w+", x.value)}


@pytest.mark.parametrize("path", [path for path in source_files() if path.endswith(".py")])
def test_no_file_knows_a_detectors_name(path):
    """But its own: others ask the class that is registered."""
    names = {name for name, file in names_of_detectors().items() if file != path}
    assert {"RPNDetector", "GroupedFastRCNN", "GroupSamplingRetinaNet", "GeneralizedRCNN"} & names
    exported = path.endswith("__init__.py")  # __all__
    assert exported or not names & strings_of_code(ast.parse(text_of(path)))


SCRIPT_FOLDERS = (".", "benchmarks", "demo", "dev", "examples", "tools")
# The modules of these folders that are no scripts.
SHARED_MODULES = {"adapters", "common", "toy"}
# Scripts that tests use otherwise than by `main`, and why.
TESTED_WHOLE = {
    "install_detectron2": "runs before gs_d2 is installed",
    "preflight": "runs before anything is installed",
    "detector": "the networks that it compares",
    "faster_rcnn": "an example, whose parts are what it shows",
    "train_net": "its trainer",
    "setup": "no script of ours",
}


def script_files() -> list[str]:
    paths = sorted(path for folder in SCRIPT_FOLDERS for path in ROOT.glob(f"{folder}/*.py"))
    return [path.relative_to(ROOT).as_posix() for path in paths]


def script_names() -> set[str]:
    return {PurePosixPath(path).stem for path in script_files()} - SHARED_MODULES


def test_the_project_does_not_depend_on_its_scripts():
    """gs_d2 is installed without them."""
    scripts = (script_names() | SHARED_MODULES | {*SCRIPT_FOLDERS, "tests"}) - {"setup"}
    for path in source_files():
        if path.endswith(".py"):
            assert not {name.split(".")[0] for name in imported_names(ast.parse(text_of(path)), path)} & scripts, path


@pytest.mark.parametrize("path", script_files())
def test_a_script_is_thin(path):
    """It imports no other script, and gs_d2 as it is installed."""
    tree = ast.parse(text_of(path))
    assert not {name.split(".")[0] for name in imported_names(tree, path)} & script_names()
    assert not re.search(r"sys\s*\.\s*path\s*\.\s*(insert|append)", ast.unparse(without_strings(tree)))


def names_used_of_scripts(tree, path) -> set[str]:
    """script.name of all that a file takes from scripts: imported, or as an attribute."""
    scripts = script_names() - TESTED_WHOLE.keys()
    used = {name for name in imported_names(tree, path) if "." in name}
    used |= {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = {name.split(".")[0] for name in imported_names(tree, path)} & scripts
    return {name for name in used if name.split(".")[0] in imported and name.count(".") == 1}


TESTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py"))


def test_every_file_says_in_its_first_line_what_it_is():
    paths = [path for path in {*source_files(), *script_files(), *TESTS} if path.endswith(".py")]
    assert [path for path in sorted(paths) if not ast.get_docstring(ast.parse(text_of(path)))] == []


@pytest.mark.parametrize("path", TESTS)
def test_tests_use_of_a_script_its_command_line_alone(path):
    used = names_used_of_scripts(ast.parse(text_of(path)), path)
    assert {name for name in used if not name.endswith(".main")} == set()


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("from evaluate import main", "evaluate.main"),
        ("from evaluate import run_fddb", "evaluate.run_fddb"),
        ("import evaluate\nevaluate.run_fddb(1)", "evaluate.run_fddb"),
    ],
)
def test_what_a_test_uses_of_a_script_is_found(source, used):
    assert names_used_of_scripts(ast.parse(source), "tests/test_x.py") == {used}


# Scripts of features that came after their size was limited.
NEW_SCRIPTS = {
    "benchmarks/adapters.py",
    "benchmarks/face_detector_process.py",
    "benchmarks/face_detectors.py",
    "dev/provoke_out_of_memory.py",
    "tools/calibrate_scores.py",
    "tools/check_anchors.py",
}


def test_the_scripts_stay_small():
    lines = {path: text_of(path).count("\n") for path in {*script_files()} - NEW_SCRIPTS}
    assert sum(lines[path] for path in lines if path.startswith(("benchmarks/", "dev/", "tools/"))) <= 2600
