#!/usr/bin/env python
"""Finds faces in pictures, a video or a webcam's images, and marks them.

python demo/demo.py --input picture.jpg --output faces.jpg
python demo/demo.py --input holidays/ 'more/*.jpg' --output pictures/
python demo/demo.py --config-file configs/quick/demo.yaml --input ... --opts MODEL.WEIGHTS output/demo/model_final.pth

Without --config-file it is the detector that comes with gs_d2, on the file's own size. A config of your own that has a
single scale is run at 0.25, 0.5 and 1 x the file's size, since large faces would be missed otherwise; --opts
TEST.GS.PYRAMID False keeps it at one, TEST.GS.SCALES [0.5,1.0] names others.
The exit code is 1 if a picture, or a video to its end, could not be read; the rest is done all the same.
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
from gs_d2.command_line import bad_input_ends, file_for, folder_for, parser_of
from gs_d2.config import load_config
from gs_d2.formats.folders import is_system_file
from gs_d2.formats.images import as_rgb, picture_suffixes
from gs_d2.inference import FaceDetector
from gs_d2.visualization import FACE, draw

SCALES = [0.25, 0.5, 1.0]
MOST_FRAMES = 1e9  # a container that says more does not know
END_TOLERANCE = 0.01  # of the frames that a container names; it may count a few too many
WRITTEN_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")  # others are written as .png


def main(argv=None) -> int:
    args = parse(argv)
    with bad_input_ends(RuntimeError):  # torch's, of a device that there is not
        if not 0 <= args.confidence_threshold <= 1:
            raise ValueError(f"--confidence-threshold must be in 0 to 1, got {args.confidence_threshold}")
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
        elif jobs:
            folder_for("--output", jobs[0][1].parent)
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
    """Files as named, whether or not they exist; and the pictures that patterns match, or that are in folders.

    What a pattern matches is taken for a picture where no other name of it looks like one.
    """
    suffixes = picture_suffixes()
    found = []
    for name in inputs:
        if os.path.isdir(name):
            paths = [os.path.join(name, entry) for entry in os.listdir(name)]
            paths = [path for path in paths if path.lower().endswith(suffixes) and not os.path.isdir(path)]
        elif not os.path.exists(name) and glob.has_magic(name):
            paths = [path for path in glob.glob(name, recursive=True) if os.path.isfile(path)]
            paths = [path for path in paths if path.lower().endswith(suffixes)] or paths
        else:
            found.append(name)
            continue
        paths = [path for path in paths if not is_system_file(os.path.basename(path))]
        if not paths:
            more = "; folders in it are not searched: name them" if os.path.isdir(name) else ""
            raise FileNotFoundError(f"no pictures: {name}{more}")
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
        folder_for("--output", output)
        target = os.path.join(output, os.path.splitext(os.path.basename(name))[0] + ".mp4")
    elif output:
        file_for("--output", output)
    if target and source != 0 and os.path.realpath(target) == os.path.realpath(source):
        raise ValueError(f"--output would overwrite the input {source}: name another folder or file")
    video = cv2.VideoCapture(source)
    if not video.isOpened():
        raise ValueError(f"{name}: cannot be opened as a video: damaged, cut short, or of a kind that OpenCV lacks")
    expected = video.get(cv2.CAP_PROP_FRAME_COUNT)
    expected = int(expected) if source != 0 and 0 < expected < MOST_FRAMES else None
    writer, num_frames, num_faces, stopped, start = None, 0, 0, False, time.perf_counter()
    try:
        with tqdm(desc=name, unit="frame", total=expected) as progress:
            while not stopped:
                success, frame = video.read()  # BGR
                if not success:
                    break
                image = Image.fromarray(np.ascontiguousarray(frame[:, :, ::-1]))
                boxes, scores = detector.detect(image)
                drawn = np.ascontiguousarray(np.asarray(draw(image, boxes, [FACE] * len(boxes), scores))[:, :, ::-1])
                if not target:
                    cv2.imshow(name, drawn)
                    stopped = cv2.waitKey(1) == 27
                else:
                    writer = writer or open_writer(cv2, target, video.get(cv2.CAP_PROP_FPS) or 25, image.size)
                    writer.write(drawn)
                num_frames, num_faces = num_frames + 1, num_faces + len(boxes)
                progress.update()
    except Exception as error:  # OpenCV and its codecs raise kinds of their own
        raise ValueError(f"{name}: stopped after {num_frames} frames: {error}") from error
    finally:  # the file is whole up to here
        video.release()
        if writer is not None:
            writer.release()
    if not num_frames:
        raise ValueError(f"{name}: has no frame that can be read")
    seconds = time.perf_counter() - start
    count = f"{num_frames} of {expected}" if expected and num_frames < expected and not stopped else f"{num_frames}"
    print(f"{name}: {num_faces} faces in {count} frames in {seconds:.1f} s" + (f" -> {target}" if target else ""))
    problems = []
    if expected and not stopped and num_frames < (1 - END_TOLERANCE) * expected:
        problems.append(f"{name}: ends early, or cannot be decoded further: {num_frames} of {expected} frames are done")
    if target and (num_written := frames_of(cv2, target)) is not None and num_written < num_frames:
        problems.append(f"{target}: only {num_written} of {num_frames} frames could be written; is the disk full?")
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return int(bool(problems))


def open_writer(cv2, target: str, rate: float, size: tuple[int, int]):
    writer = cv2.VideoWriter(target, cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
    if not writer.isOpened():
        raise ValueError(f"{target}: cannot be written as a video; .mp4 and .avi can")
    return writer


def frames_of(cv2, path: str) -> int | None:
    """How many frames a video that was written has; None where its format does not say. OpenCV writes no errors."""
    video = cv2.VideoCapture(path)
    try:
        count = video.get(cv2.CAP_PROP_FRAME_COUNT) if video.isOpened() else 0
    finally:
        video.release()
    return int(count) if 0 <= count < MOST_FRAMES else None


if __name__ == "__main__":
    sys.exit(main())
