#!/usr/bin/env python
"""Finds faces in pictures, a video or a webcam's images, and marks them.

python demo/demo.py --input picture.jpg --output faces.jpg
python demo/demo.py --input holidays/ 'more/*.jpg' --output pictures/
python demo/demo.py --config-file configs/quick/demo.yaml --input ... --opts MODEL.WEIGHTS output/demo/model_final.pth

Without --config-file it is the detector that comes with gs_d2, on the file's own size. A config of your own that has a
single scale is run at 0.25, 0.5 and 1 x the file's size, since large faces would be missed otherwise; --opts
TEST.GS.PYRAMID False keeps it at one, TEST.GS.SCALES [0.5,1.0] names others.
The exit code is 1 if a picture could not be read; the others are done all the same.
"""

import argparse
import glob
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageShow
from tqdm import tqdm

from gs_d2 import model_zoo
from gs_d2.command_line import bad_input_ends, parser_of
from gs_d2.config import load_config
from gs_d2.formats.images import as_rgb
from gs_d2.inference import FaceDetector
from gs_d2.visualization import FACE, draw

SCALES = [0.25, 0.5, 1.0]
WRITTEN_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")  # others are written as .png


def main(argv=None) -> int:
    args = parse(argv)
    with bad_input_ends():
        if not args.config_file:
            args.config_file = model_zoo.get_config(model_zoo.DEFAULT, trained="MODEL.WEIGHTS" not in args.opts)
            args.opts = ["TEST.GS.PYRAMID", False, *args.opts]
        config = load_config(args.config_file, args.opts)
        if not config.TEST.GS.PYRAMID and "TEST.GS.PYRAMID" not in args.opts:
            several = ["INPUT.MIN_SIZE_TEST", 0, "TEST.GS.PYRAMID", True, "TEST.GS.SCALES", SCALES]
            config = load_config(args.config_file, [*several, *args.opts])
        jobs = pictures_to_write(args.input, args.output) if args.input else None
        if not args.output:
            need_screen()
        cv2 = import_cv2() if jobs is None else None
        detector = FaceDetector(config, confidence_threshold=args.confidence_threshold)
        if jobs is None:
            return run_video(cv2, detector, 0 if args.webcam else args.video_input, args.output)
    return run_pictures(detector, jobs)


def parse(argv):
    parser = parser_of(__doc__)
    parser.add_argument("--config-file", help="the config that weights of your own were trained with")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", help="pictures, folders of pictures, or 'glob' patterns")
    source.add_argument("--video-input", help="a video file (needs opencv-python)")
    source.add_argument("--webcam", action="store_true", help="the first camera (needs opencv-python)")
    parser.add_argument("--output", help="folder, or file for one picture or video; without it pictures are shown")
    parser.add_argument("--confidence-threshold", type=float, default=0.5, help="lowest score drawn (default 0.5)")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config keys and values, MODEL.WEIGHTS ..."
    )
    return parser.parse_args(argv)


def find_pictures(inputs: list[str]) -> list[str]:
    """Files as named, whether or not they exist; those that patterns match; and the pictures in folders."""
    suffixes = tuple(Image.registered_extensions())
    found = []
    for name in inputs:
        if os.path.isdir(name):
            paths = [
                path for path in glob.glob(os.path.join(glob.escape(name), "*")) if path.lower().endswith(suffixes)
            ]
        elif not os.path.exists(name) and glob.has_magic(name):
            paths = [path for path in glob.glob(name, recursive=True) if os.path.isfile(path)]
        else:
            paths = [name]
        if not paths:
            raise FileNotFoundError(f"no pictures: {name}")
        found += sorted(paths)
    return list(dict.fromkeys(found))


def pictures_to_write(inputs: list[str], output: str | None) -> list[tuple[str, Path | None]]:
    """Each picture with the file that its drawing goes to (None is the screen); no two are the same."""
    pictures = find_pictures(inputs)
    if output is None:
        return [(path, None) for path in pictures]
    target = Path(output)
    if not target.is_dir() and target.suffix:
        if len(pictures) > 1:
            raise ValueError(f"--output {output} is one file for {len(pictures)} pictures: name a folder")
        if target.suffix.lower() not in WRITTEN_SUFFIXES:
            raise ValueError(f"--output {output} must end in {', '.join(WRITTEN_SUFFIXES)}, or be a folder")
        jobs = [(pictures[0], target)]
    else:
        jobs, taken = [], set()
        for path in pictures:
            stem, suffix = os.path.splitext(os.path.basename(path))
            suffix = suffix if suffix.lower() in WRITTEN_SUFFIXES else ".png"
            name, i = stem + suffix, 1
            while name in taken:
                i += 1
                name = f"{stem}_{i}{suffix}"
            taken.add(name)
            jobs.append((path, target / name))
    inputs = {os.path.realpath(path) for path in pictures}
    for _, written in jobs:
        if os.path.realpath(written) in inputs:
            raise ValueError(f"--output would overwrite the input {written}: name another folder or file")
    return jobs


def run_pictures(detector: FaceDetector, jobs) -> int:
    failed = 0
    progress = tqdm(jobs, desc="pictures", unit="image", disable=len(jobs) == 1)
    for path, output in progress:
        start = time.perf_counter()
        try:
            image = as_rgb(path)
            boxes, scores = detector.detect(image)
            drawn = draw(image, boxes, [FACE] * len(boxes), scores)
            seconds = time.perf_counter() - start
            if output is None:
                show(drawn)
            else:
                output.parent.mkdir(parents=True, exist_ok=True)
                drawn.save(output, quality=92)
        except (OSError, ValueError) as error:
            failed += 1
            progress.write(f"demo: {error}" if path in str(error) else f"demo: {path}: {error}", file=sys.stderr)
            continue
        faces = "1 face" if len(boxes) == 1 else f"{len(boxes)} faces"
        progress.write(f"{path}: {faces} in {seconds:.2f} s" + (f" -> {output}" if output else ""))
    if failed:
        print(f"demo: {failed} of {len(jobs)} pictures failed", file=sys.stderr)
    return int(failed > 0)


def need_screen():
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ValueError("there is no screen to show pictures on: add --output with a folder or file")


def show(image: Image.Image):
    if not ImageShow.show(image):
        raise ValueError("no program that shows pictures was found: add --output with a folder or file")


def import_cv2():
    try:
        import cv2
    except ImportError as error:
        raise ValueError(f"videos and webcams need OpenCV ({error}): pip install opencv-python") from error
    return cv2


def run_video(cv2, detector: FaceDetector, source: str | int, output: str | None) -> int:
    """Draws on every frame; on the screen until the video ends or Esc is pressed."""
    name = "webcam" if source == 0 else source
    if source != 0 and not os.path.isfile(source):
        raise FileNotFoundError(f"no such video: {source}")
    target = output
    if output and (os.path.isdir(output) or not os.path.splitext(output)[1]):
        os.makedirs(output, exist_ok=True)
        target = os.path.join(output, os.path.splitext(os.path.basename(name))[0] + ".mp4")
    if target and source != 0 and os.path.realpath(target) == os.path.realpath(source):
        raise ValueError(f"--output would overwrite the input {source}: name another folder or file")
    video = cv2.VideoCapture(source)
    if not video.isOpened():
        raise ValueError(f"{name}: cannot be opened as a video")
    writer, num_frames, num_faces, start = None, 0, 0, time.perf_counter()
    with tqdm(desc=name, unit="frame", total=max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT))) or None) as progress:
        while True:
            success, frame = video.read()  # BGR
            if not success:
                break
            image = Image.fromarray(np.ascontiguousarray(frame[:, :, ::-1]))
            boxes, scores = detector.detect(image)
            drawn = np.ascontiguousarray(np.asarray(draw(image, boxes, [FACE] * len(boxes), scores))[:, :, ::-1])
            num_frames, num_faces = num_frames + 1, num_faces + len(boxes)
            progress.update()
            if not target:
                cv2.imshow(name, drawn)
                if cv2.waitKey(1) == 27:
                    break
                continue
            if writer is None:
                codec = cv2.VideoWriter_fourcc(*"mp4v")
                writer = cv2.VideoWriter(target, codec, video.get(cv2.CAP_PROP_FPS) or 25, image.size)
                if not writer.isOpened():
                    raise ValueError(f"{target}: cannot be written as a video")
            writer.write(drawn)
    video.release()
    if writer is not None:
        writer.release()
    if not num_frames:
        raise ValueError(f"{name}: has no frame that can be read")
    seconds = time.perf_counter() - start
    print(f"{name}: {num_faces} faces in {num_frames} frames in {seconds:.1f} s" + (f" -> {target}" if target else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
