"""What importing the package does and does not do, and that its public names are as other projects hold them."""

import inspect
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Stands before each program: hides modules, and makes any use of CUDA an error, also where there is no GPU.
PRELUDE = """
import sys

class Hide:
    names = ()
    def find_spec(self, name, path=None, target=None):
        if any(name == hidden or name.startswith(hidden + ".") for hidden in self.names):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())

def message_of(module):
    try:
        __import__(module)
    except ImportError as error:
        return str(error)
    return f"{module} was imported"
"""


def run(program: str) -> list[str]:
    """Lines printed by a fresh Python."""
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_ops_need_torch_only():
    loaded, used_cuda, reference, known = run("""
        import gs_d2
        assert "torch" not in sys.modules and "detectron2" not in sys.modules
        import torch
        def refuse(*args):
            raise AssertionError("CUDA is used")
        torch.cuda._lazy_init = torch._C._cuda_init = refuse
        try:
            torch.zeros(1, device="cuda")
        except AssertionError as error:  # the trap works
            print(error, file=sys.stderr)
        else:
            raise SystemExit("the trap for CUDA does not work")
        before = set(sys.modules)
        from gs_d2 import ops
        new = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
        print(sorted(new - {"torch"}))
        print(torch.cuda.is_initialized())
        print("gs_d2.ops.reference" in sys.modules)
        print(ops.box_iou(torch.tensor([[0., 0, 2, 2]]), torch.tensor([[0., 0, 2, 1]])).item())
    """)
    assert loaded == "['gs_d2']"
    assert used_cuda == "False"
    assert reference == "False"
    assert known == "0.5"


def test_sampling_needs_torch_only():
    loaded, drawn, groups = run("""
        Hide.names = ("detectron2", "fvcore", "torchvision")
        import torch
        before = set(sys.modules)
        from gs_d2.sampling import GroupSampler, first_of_each_group, group_by_scale
        print(sorted(name for name in set(sys.modules) - before if name.startswith(("gs_d2.modeling", "detectron2"))))
        labels = torch.tensor([1, 0, 0, 0], dtype=torch.int8)
        print((GroupSampler(1, 4)(labels, torch.zeros(4, dtype=torch.int64)) >= 0).sum().item())
        groups = group_by_scale(torch.tensor([16.0, 31.0, 33.0]), [16, 32])
        print(groups.tolist(), first_of_each_group(groups, 2, 1).tolist())
    """)
    assert (loaded, drawn, groups) == ("[]", "4", "[0, 1, 1] [0, 1]")


def test_the_sampler_is_the_same_under_both_names():
    from gs_d2 import modeling, sampling

    assert modeling.GroupSampler is sampling.GroupSampler and modeling.group_by_scale is sampling.group_by_scale


def test_a_stock_program_needs_add_gs_config_only():
    """Detectron2's own functions find our models and data sets by name, whatever else was not imported."""
    loaded, built, data_sets, classes, predictor, found = run("""
        from detectron2.config import get_cfg
        from gs_d2.config import add_gs_config
        print([name for name in ("detectron2.modeling", "gs_d2.data", "gs_d2.modeling") if name in sys.modules])

        import numpy
        from detectron2.data import DatasetCatalog, MetadataCatalog
        from detectron2.engine import DefaultPredictor
        from detectron2.modeling import build_model
        cfg = get_cfg()
        add_gs_config(cfg)
        cfg.MODEL.DEVICE = "cpu"
        cfg.merge_from_file("configs/wider_gs.yaml")
        print(type(build_model(cfg)).__name__)
        print("wider_face_train" in DatasetCatalog.list())
        print(MetadataCatalog.get("wider_face_train").thing_classes)
        cfg.merge_from_file("configs/quick/demo.yaml")
        cfg.MODEL.WEIGHTS = ""
        cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 64
        predict = DefaultPredictor(cfg)
        print(type(predict.model).__name__)
        print(sorted(predict(numpy.zeros((64, 48, 3), numpy.uint8))))
    """)
    assert loaded == "[]"  # the import alone waits for no models
    assert (built, predictor) == ("GroupedFastRCNN", "RPNDetector")
    assert (data_sets, classes) == ("True", "['face']")
    assert found == "['instances']"


def test_what_is_imported_first_does_not_matter():
    """No cycle: after each module alone, a config can be made."""
    printed = run("""
        import os
        import detectron2.engine, detectron2.evaluation
        from detectron2.config import get_cfg
        names = ("checkpoint", "config", "data", "engine", "inference", "model_zoo", "modeling", "sampling")
        for name in names:  # each in a fork, which has of gs_d2 nothing yet
            assert not any(module.startswith("gs_d2") for module in sys.modules)
            pid = os.fork()
            if pid == 0:
                __import__(f"gs_d2.{name}")
                from gs_d2.config import add_gs_config
                add_gs_config(get_cfg())
                os._exit(0 if "gs_d2.modeling" in sys.modules and "gs_d2.data" in sys.modules else 1)
            assert os.waitpid(pid, 0)[1] == 0, name
            print(name)
    """)
    assert len(printed) == 8


def test_weights_need_no_detectron2_and_scripts_share_no_torch():
    (loaded,) = run("""
        import gs_d2.command_line, gs_d2.formats.whole_file
        loaded = [name for name in ("numpy", "torch", "detectron2") if name in sys.modules]
        Hide.names = ("detectron2", "fvcore")
        import gs_d2.weights, gs_d2.conversion.timm, gs_d2.conversion.torchvision
        print(loaded)
    """)
    assert loaded == "[]"


def test_without_detectron2_there_is_one_message():
    *messages, evaluator, script, ops = run("""
        Hide.names = ("detectron2",)
        for name in ("gs_d2.config", "gs_d2.data", "gs_d2.engine", "gs_d2.inference", "gs_d2.modeling"):
            print(message_of(name))
        import gs_d2.evaluation
        gs_d2.evaluation.evaluate_wider_face  # the protocols do without
        try:
            gs_d2.evaluation.WiderFaceEvaluator
        except ImportError as error:
            print(error)
        import runpy
        try:
            runpy.run_path("train_net.py", run_name="__main__")
        except ImportError as error:
            print(error)
        import gs_d2.ops
        print(gs_d2.ops.__name__)
    """)
    assert len(set(messages)) == 1 and len(messages) == 5
    assert "need Detectron2, which does not import here (No module named 'detectron2')" in messages[0]
    assert "python tools/install_detectron2.py" in messages[0]
    tool = runpy.run_path(str(ROOT / "tools" / "install_detectron2.py"))
    official = f"git+{tool['OFFICIAL_REPOSITORY']}@{tool['OFFICIAL_COMMIT']}"
    assert f"pip install --no-build-isolation '{official}'" in messages[0]  # for whoever has a wheel, and no tools
    assert evaluator == messages[0]
    assert script == messages[0]
    assert ops == "gs_d2.ops"


def test_timm_is_loaded_by_its_backbones_only():
    loaded, *messages = run("""
        Hide.names = ("timm",)
        import gs_d2.modeling, gs_d2.inference
        print("timm" in sys.modules)
        for build in (lambda: gs_d2.modeling.TimmBackbone("resnet18", ["stride8"]), gs_d2.inference.FaceDetector):
            try:
                build()
            except ImportError as error:
                print(error)
    """)
    assert loaded == "False"
    assert len(messages) == 2 and len(set(messages)) == 1
    assert messages[0] == "a backbone of timm needs that package (No module named 'timm'): pip install timm"


def test_without_the_extension_the_message_says_how_to_build_it():
    (message,) = run("""
        Hide.names = ("gs_d2._C",)
        print(message_of("gs_d2.ops"))
    """)
    assert message.startswith("gs_d2's extension is not built or does not load (")
    assert "pip install --no-build-isolation -e ." in message


def test_signatures_of_the_ops():
    from gs_d2 import ops

    def parameters(function):
        keyword_only = inspect.Parameter.KEYWORD_ONLY
        found = inspect.signature(function).parameters.values()
        positional = [p.name for p in found if p.kind is not keyword_only]
        return positional, {p.name: p.default for p in found if p.kind is keyword_only}

    empty = inspect.Parameter.empty
    assert parameters(ops.box_iou) == (["boxes1", "boxes2"], {})
    positional, keywords = parameters(ops.two_pass_match)
    assert positional == ["gt_boxes", "anchors"]
    frozen = {"low": 0.4, "high": 0.6, "second_pass": "best", "ignore_boxes": None, "ignore_thresh": 0.5}
    assert {name: keywords.pop(name) for name in frozen} == frozen
    assert keywords == {"gt_offsets": None, "ignore_offsets": None}  # what only batches need
    positional, keywords = parameters(ops.group_subsample)
    assert positional == ["match_labels", "group_idxs"]
    frozen = {
        "num_groups": empty,
        "num_per_group": empty,
        "positive_fraction": 0.25,
        "method": "random",
        "losses": None,
        "seed": None,
    }
    assert {name: keywords.pop(name) for name in frozen} == frozen
    assert keywords == {"first_image": 0}


def test_results_of_the_ops():
    from gs_d2 import ops

    boxes = torch.tensor([[0.0, 0, 10, 10]])
    match = ops.two_pass_match(boxes, boxes)
    assert match._fields == ("matched_idxs", "match_labels", "max_ious")
    assert [tensor.dtype for tensor in match] == [torch.int64, torch.int8, torch.float32]
    drawn = ops.group_subsample(match.match_labels, match.matched_idxs, num_groups=1, num_per_group=4)
    assert drawn.dtype == torch.int8


@pytest.mark.parametrize("name", ["box_iou", "two_pass_match", "group_subsample"])
def test_the_reference_is_there_under_its_public_name(name):
    from gs_d2 import ops

    assert callable(getattr(ops.reference, name))


def test_ops_have_no_other_names():
    from gs_d2 import ops

    with pytest.raises(AttributeError, match=r"'gs_d2\.ops' has no attribute 'nms'"):
        _ = ops.nms


def test_registered_names():
    from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
    from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
    from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN_HEAD_REGISTRY

    from gs_d2 import modeling

    for registry, name in (
        (META_ARCH_REGISTRY, "RPNDetector"),
        (META_ARCH_REGISTRY, "GroupSamplingRetinaNet"),
        (PROPOSAL_GENERATOR_REGISTRY, "GroupSamplingRPN"),
        (RPN_HEAD_REGISTRY, "SoftmaxRPNHead"),
        (BACKBONE_REGISTRY, "build_resnet_topdown_backbone"),
        (BACKBONE_REGISTRY, "build_resnet_topdown_p6_backbone"),
        (BACKBONE_REGISTRY, "build_timm_topdown_backbone"),
        (ANCHOR_GENERATOR_REGISTRY, "ScaleStrideAnchorGenerator"),
    ):
        assert registry.get(name) is getattr(modeling, name)


def test_parts_for_models_of_others():
    """TwoPassMatcher and GroupSampler stand in for Detectron2's Matcher and subsample_labels."""
    from gs_d2.modeling import GroupSampler, TwoPassMatcher, group_by_scale

    assert group_by_scale(torch.tensor([20.0, 30.0]), [16, 32]).tolist() == [0, 1]
    matches, labels = TwoPassMatcher([0.4, 0.6], [0, -1, 1])(torch.tensor([[0.7, 0.1]]))
    assert matches.tolist() == [0, 0] and labels.tolist() == [1, 0]
    drawn = GroupSampler(1, 2)(labels, torch.zeros(2, dtype=torch.int64))
    assert drawn.tolist() == [-1, 0]  # floor(2 * 0.25) = 0 positives, one negative to be had


def test_config_keys():
    from detectron2.config import get_cfg

    from gs_d2.config import add_gs_config

    cfg = get_cfg()
    add_gs_config(cfg)
    for node, keys in (
        (
            cfg.MODEL.GS,
            "GROUP_SAMPLING GROUP_SCALES SAMPLER SECOND_PASS IGNORE_THRESH ANCHOR_STRIDES KEEP_DEFAULTS "
            "RETINANET_DILATED_HEAD",
        ),
        (cfg.MODEL.GS.TIMM, "NAME OPTIONS WEIGHTS BN"),
        (cfg.INPUT.GS, "SCALES MAX_CROP_SIZE MIN_FACE_SIZE"),
        (cfg.SOLVER.GS, "ACCUMULATION_STEPS NONFINITE_LOSS OPTIMIZER BACKBONE_MULTIPLIER"),
        (cfg.TEST.GS, "SCORE_THRESH PYRAMID SCALES MAX_SIZE FLIP BOX_VOTING LEVEL_BOX_SIZE"),
    ):
        assert set(keys.split()) <= set(node)


def test_data_sets():
    from detectron2.data import DatasetCatalog, MetadataCatalog

    import gs_d2.data  # noqa: F401

    for split in ("train", "val", "test"):
        assert f"wider_face_{split}" in DatasetCatalog.list()
        metadata = MetadataCatalog.get(f"wider_face_{split}")
        assert metadata.thing_classes == ["face"]
        assert metadata.evaluator_type == "wider_face"
        assert metadata.thing_dataset_id_to_contiguous_id == {1: 0}  # Detectron2's visualisers ask for it
