#!/usr/bin/env python
"""Exports a trained single-stage detector as one file that runs without gs_d2: ONNX or TorchScript.

    tools/export_model.py --config-file configs/quick/demo.yaml --output output/demo/model.onnx \\
        --sample-image picture.jpg MODEL.WEIGHTS output/demo/model_final.pth

The graph takes the pixels of one image of any size and gives the boxes and scores of its faces: normalisation, padding,
anchors, decoding, TEST.GS.SCORE_THRESH and, unless --nms outside, NMS are in it. docs/export.md describes inputs,
outputs and limits. What was written is run on several sizes and compared with the model itself: of --sample-image,
resized, or else of noise, in which a good model finds few faces to compare. Exit code 1 if any face differs (the file
stays, and the faces are printed), 2 if nothing was written.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gs_d2.command_line import bad_input_ends, file_for, parser_of
from gs_d2.config import load_config
from gs_d2.formats.images import as_rgb
from gs_d2.formats.whole_file import write_whole
from gs_d2.inference import FaceDetector
from gs_d2.inference.export import INPUT, OUTPUTS, ExportableDetector, to_onnx, to_torchscript
from gs_d2.inference.exported import BOX_TOLERANCE, SCORE_TOLERANCE, Comparison, compare, load_exported

SUFFIXES = {"onnx": ".onnx", "torchscript": ".ts"}
MAX_PRINTED = 10  # faces that differ
SIZES = ((224, 320), (161, 203), (97, 355))  # (height, width) of the images compared, the sample's own apart
DTYPES = {"uint8": torch.uint8, "float32": torch.float32}
PACKAGES = "pip install -c constraints.txt onnx onnxruntime onnxscript"


@bad_input_ends()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    path = file_for("--output", output_path(args.output, args.format))
    if args.format == "onnx":
        need_packages()
    sample = as_rgb(args.sample_image) if args.sample_image else None
    cfg = load_config(args.config_file, args.opts)
    if cfg.MODEL.GS.AUTOCAST_DTYPE:
        print(f"MODEL.GS.AUTOCAST_DTYPE {cfg.MODEL.GS.AUTOCAST_DTYPE} is left out: the graph computes in float32")
        cfg.MODEL.GS.AUTOCAST_DTYPE = ""
    cfg.MODEL.GS.COMPILE = False  # a graph is recorded from the modules themselves
    detector = FaceDetector(cfg, device="cpu", confidence_threshold=cfg.TEST.GS.SCORE_THRESH)
    graph = ExportableDetector(detector.model, with_nms=args.nms == "inside")
    write(graph, path, args.format, DTYPES[args.input_dtype], settings(detector, args.nms))
    describe(path, args.format, args.input_dtype, detector, args.nms)
    compared_on = images(sample, detector.cfg.INPUT.FORMAT, args.input_dtype)
    return report(compare(load_exported(path), graph, compared_on), compared_on)


def parse(argv):
    parser = parser_of(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the config that was trained with")
    parser.add_argument("--output", required=True, metavar="PATH", help="the file to write, or a folder for model.*")
    parser.add_argument("--format", choices=SUFFIXES, default="onnx", help="default: onnx")
    parser.add_argument("--sample-image", metavar="FILE", help="a picture with faces, to compare on")
    parser.add_argument(
        "--nms", choices=("inside", "outside"), default="inside", help="whether the graph ends after or before NMS"
    )
    parser.add_argument("--input-dtype", choices=DTYPES, default="uint8", help="of the pixels 0..255 (default: uint8)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, MODEL.WEIGHTS ...")
    return parser.parse_args(argv)


def output_path(output: str, format: str) -> Path:
    path, suffix = Path(output), SUFFIXES[format]
    if path.is_dir() or not path.suffix or output.endswith(("/", os.sep)):
        return path / f"model{suffix}"
    if path.suffix != suffix:
        raise ValueError(f"--output {output} must end in {suffix} for --format {format}, or be a folder")
    return path


def need_packages():
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--format onnx needs packages that gs_d2 itself does not ({error}): {PACKAGES}") from error


def settings(detector: FaceDetector, nms: str) -> dict[str, str]:
    """What the file's user must know and its shapes do not say."""
    cfg = detector.cfg
    facts = {"channels": cfg.INPUT.FORMAT, "score_threshold": cfg.TEST.GS.SCORE_THRESH, "nms": nms}
    facts |= {"nms_iou_threshold": cfg.MODEL.RPN.NMS_THRESH, "max_detections": detector.model.max_detections}
    return {key: str(value) for key, value in facts.items()}


def write(graph: ExportableDetector, path: Path, format: str, dtype: torch.dtype, facts: dict[str, str]):
    """All of the file or nothing: what stood there before is kept until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "onnx":
        program = to_onnx(graph, dtype)
        program.model.metadata_props.update(facts)
        write_whole(path, lambda file: file.write(program.model_proto.SerializeToString()))
    else:
        script = to_torchscript(graph, dtype)
        write_whole(path, lambda file: torch.jit.save(script, file, _extra_files=facts))


def describe(path: Path, format: str, dtype: str, detector: FaceDetector, nms: str):
    print(f"Wrote {path}: {format}, {os.path.getsize(path) / 1e6:.1f} MB")
    inputs, outputs = [f"{INPUT} {dtype} [1, 3, height, width]"], ["float32 [faces, 4]", "float32 [faces]"]
    outputs = [f"{name} {shape}" for name, shape in zip(OUTPUTS, outputs, strict=True)]
    if format == "onnx":
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        inputs, outputs = ([as_text(value) for value in values] for values in (model.graph.input, model.graph.output))
        print("Opset: " + ", ".join(f"{opset.domain or 'ai.onnx'} {opset.version}" for opset in model.opset_import))
    print(f"Input: {'; '.join(inputs)}\nOutputs: {'; '.join(outputs)}")
    print("Settings: " + ", ".join(f"{key} {value}" for key, value in settings(detector, nms).items()))
    if detector.cfg.INPUT.MIN_SIZE_TEST:
        print(
            f"The config resizes images before (INPUT.MIN_SIZE_TEST {detector.cfg.INPUT.MIN_SIZE_TEST}, MAX_SIZE_TEST "
            f"{detector.cfg.INPUT.MAX_SIZE_TEST}), which the graph does not: do it yourself, and scale the boxes back"
        )


def as_text(value) -> str:
    import onnx

    tensor = value.type.tensor_type
    sizes = ", ".join(str(size.dim_param or size.dim_value) for size in tensor.shape.dim)
    return f"{value.name} {onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)} [{sizes}]"


def images(sample: Image.Image | None, channels: str, dtype: str) -> list[np.ndarray]:
    """[1, 3, H, W] of several sizes: the sample at its own and resized, or noise."""
    rng, arrays = np.random.default_rng(0), []
    for size in SIZES if sample is None else (sample.size[::-1], *SIZES):
        if sample is None:
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        else:
            pixels = np.asarray(sample.resize(size[::-1]))
        pixels = pixels[:, :, ::-1] if channels == "BGR" else pixels
        arrays.append(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]).astype(dtype))
    return arrays


def report(found: Comparison, images: list[np.ndarray]) -> int:
    """Prints the comparison; 1 if any face differs."""
    sizes = ", ".join(f"{image.shape[3]} x {image.shape[2]}" for image in images)
    print(
        f"Compared with the model on {len(images)} images ({sizes}): {found.num_faces} faces; those found by both "
        f"differ by at most {found.box_error:.1g} px and {found.score_error:.1g} in score; "
        f"{len(found.unlike)} found by one alone"
    )
    if not found.num_faces:
        print("There was no face to compare: name a picture that has some with --sample-image")
    if found.unlike:
        lines = [
            f"export_model: {len(found.unlike)} faces differ by more than {BOX_TOLERANCE} px or {SCORE_TOLERANCE}:"
        ]
        print("\n  ".join(lines + found.unlike[:MAX_PRINTED]), file=sys.stderr)
    return int(bool(found.unlike))


if __name__ == "__main__":
    sys.exit(main())
