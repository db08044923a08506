#!/usr/bin/env python
"""Finds faces in pictures, a video or a webcam's images, and marks them, or makes them unrecognisable.

python demo/demo.py --input picture.jpg --output faces.jpg
python demo/demo.py --input holidays/ 'more/*.jpg' --output pictures/
python demo/demo.py --input holidays/ --output pictures/ --anonymize blur
python demo/demo.py --input holidays/ --json faces.json --save-crops crops/
python demo/demo.py --config-file configs/quick/demo.yaml --input ... --opts MODEL.WEIGHTS output/demo/model_final.pth

Without --config-file it is the detector that comes with gs_d2, on the file's own size. A config of your own that has a
single scale is run at 0.25, 0.5 and 1 x the file's size, since large faces would be missed otherwise; --opts
TEST.GS.PYRAMID False keeps it at one, TEST.GS.SCALES [0.5,1.0] names others.
Pictures and videos are written without metadata, and videos without sound. A face that is not found stays visible with
--anonymize: check the result.
The exit code is 1 if a picture, or a video to its end, could not be read; the rest is done all the same.
"""

import argparse
import glob
import os
import sys
import time
from pathlib import Path

from PIL import Image, ImageShow
from tqdm import tqdm

from gs_d2 import model_zoo
from gs_d2.anonymization import STYLES, anonymize
from gs_d2.anonymization import THRESHOLD as ANONYMIZE_THRESHOLD
from gs_d2.command_line import bad_input_ends, file_for, folder_for, parser_of
from gs_d2.config import load_config
from gs_d2.formats.folders import is_system_file
from gs_d2.formats.found_faces import TABLE, FoundFaces, free_path
from gs_d2.formats.images import as_rgb, picture_suffixes, save_picture
from gs_d2.formats.videos import Video, VideoWriter, as_bgr, count_frames, import_cv2
from gs_d2.inference import FaceDetector
from gs_d2.inference.tracks import GaplessBoxes
from gs_d2.visualization import FACE, draw

SCALES = [0.25, 0.5, 1.0]
THRESHOLD = 0.5
GAP_SECONDS = 0.5  # for which a face that is not found in a video stays covered
MAX_GAP = 30  # frames; as many are in memory
END_TOLERANCE = 0.01  # of the frames that a container names; it may count a few too many
WRITTEN_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")  # others are written as .png


def main(argv=None) -> int:
    args = parse(argv)
    with bad_input_ends(RuntimeError):  # torch's, of a device that there is not
        threshold = args.confidence_threshold
        if threshold is None:
            threshold = ANONYMIZE_THRESHOLD if args.anonymize else THRESHOLD
        if not 0 <= threshold <= 1:
            raise ValueError(f"--confidence-threshold must be in 0 to 1, got {threshold}")
        config = config_of(args)
        has_pictures = bool(args.output or args.anonymize or not (args.json or args.save_crops))
        jobs = pictures_to_write(args.input, args.output) if args.input else None
        if has_pictures and not args.output:
            need_screen()
        elif jobs and args.output:
            folder_for("--output", jobs[0][1].parent)
        if jobs is None:
            import_cv2()
            jobs = [(args.video_input or "webcam", video_to_write(args.video_input, args.output))]
        found = found_faces(args.json, args.save_crops, jobs)
        video = None if args.input else Video(0 if args.webcam else args.video_input)
        detector = FaceDetector(config, confidence_threshold=threshold)
        marks = None
        if has_pictures:
            max_gap = min(max(round(GAP_SECONDS * video.rate), 1), MAX_GAP) if video else 0
            marks = Anonymized(args.anonymize, max_gap) if args.anonymize else Boxes()
        try:
            if video is None:
                return run_pictures(detector, jobs, marks, found)
            return run_video(detector, video, *jobs[0], marks, found)
        finally:
            found.write()


def parse(argv):
    parser = parser_of(__doc__)
    parser.add_argument("--config-file", help="the config that weights of your own were trained with")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", help="pictures, folders of pictures, or 'glob' patterns")
    source.add_argument("--video-input", help="a video file (needs opencv-python)")
    source.add_argument("--webcam", action="store_true", help="the first camera (needs opencv-python)")
    parser.add_argument(
        "--output",
        help="folder, or file for one picture or video; without it pictures are shown, unless only --json or "
        "--save-crops is wanted",
    )
    parser.add_argument(
        "--anonymize", choices=STYLES, help="make faces unrecognisable instead of drawing boxes; solid keeps nothing"
    )
    parser.add_argument("--save-crops", metavar="FOLDER", help=f"write each face as a picture, and {TABLE} beside them")
    parser.add_argument("--json", metavar="FILE", help="write the boxes and scores of all pictures, or frames")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        help=f"lowest score of a face (default {THRESHOLD}; with --anonymize {ANONYMIZE_THRESHOLD})",
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config keys and values, MODEL.WEIGHTS ..."
    )
    return parser.parse_args(argv)


def config_of(args):
    if not args.config_file:
        args.config_file = model_zoo.get_config(model_zoo.DEFAULT, trained="MODEL.WEIGHTS" not in args.opts)
        args.opts = ["TEST.GS.PYRAMID", False, *args.opts]
    config = load_config(args.config_file, args.opts)
    if not config.TEST.GS.PYRAMID and "TEST.GS.PYRAMID" not in args.opts:
        several = ["INPUT.MIN_SIZE_TEST", 0, "TEST.GS.PYRAMID", True, "TEST.GS.SCALES", SCALES]
        config = load_config(args.config_file, [*several, *args.opts])
    return config


class Boxes:
    """Draws boxes and scores on pictures and on the frames of a video."""

    def picture(self, image: Image.Image, boxes, scores) -> Image.Image:
        return draw(image, boxes, [FACE] * len(boxes), scores)

    def frames(self, image: Image.Image, boxes, scores) -> list[Image.Image]:
        """Takes the next frame, and returns those that are done."""
        return [self.picture(image, boxes, scores)]

    def last_frames(self) -> list[Image.Image]:
        return []


class Anonymized:
    """Makes the faces of pictures unrecognisable, and of a video's frames also those that are missed in between."""

    def __init__(self, style: str, max_gap: int):
        self._style, self._gapless = style, GaplessBoxes(max_gap)

    def picture(self, image: Image.Image, boxes, scores) -> Image.Image:
        return anonymize(image, boxes, self._style)

    def frames(self, image: Image.Image, boxes, scores) -> list[Image.Image]:
        return [anonymize(*frame, self._style) for frame in self._gapless.push(image, boxes)]

    def last_frames(self) -> list[Image.Image]:
        return [anonymize(*frame, self._style) for frame in self._gapless.finish()]


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
    """Each picture with the file that its drawing goes to (None where there is none); no two are the same."""
    pictures = find_pictures(inputs)
    if not output:
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
            jobs.append((path, free_path(target, stem, suffix, taken)))
    for _, written in jobs:
        keep_inputs("--output", written, pictures)
    return jobs


def video_to_write(source: str | None, output: str | None) -> str | None:
    """The file that a video goes to; None where there is none. `source` is None for a webcam."""
    if not output:
        return None
    if os.path.isdir(output) or not os.path.splitext(output)[1]:
        folder_for("--output", output)
        output = os.path.join(output, os.path.splitext(os.path.basename(source or "webcam"))[0] + ".mp4")
    else:
        file_for("--output", output)
    keep_inputs("--output", output, [source] if source else [])
    return output


def keep_inputs(flag: str, path, inputs) -> None:
    if os.path.realpath(path) in {os.path.realpath(name) for name in inputs}:
        raise ValueError(f"{flag} would overwrite the input {path}: name another folder or file")


def found_faces(json: str | None, crops: str | None, jobs) -> FoundFaces:
    inputs, outputs = [path for path, _ in jobs], [path for _, path in jobs if path]
    if json is not None:
        json = file_for("--json", json)
        keep_inputs("--json", json, inputs)
        if os.path.realpath(json) in map(os.path.realpath, outputs):
            raise ValueError(f"--json {json} is a file of --output: name another")
    if crops is not None:
        crops = folder_for("--save-crops", crops)
        table = crops / TABLE
        if json is not None and os.path.realpath(json) == os.path.realpath(table):
            raise ValueError(f"--json {json} is the table of --save-crops: name another")
        keep_inputs("--save-crops", table, inputs)
    return FoundFaces(json, crops, keep=[*inputs, *outputs, *([json] if json is not None else [])])


def run_pictures(detector: FaceDetector, jobs, marks: Boxes | Anonymized | None, found: FoundFaces) -> int:
    failed = 0
    progress = tqdm(jobs, desc="pictures", unit="image", disable=len(jobs) == 1)
    for path, output in progress:
        start = time.perf_counter()
        try:
            image = as_rgb(path)
            boxes, scores = detector.detect(image)
            marked = marks.picture(image, boxes, scores) if marks else None
            seconds = time.perf_counter() - start
            if output is not None:
                save_picture(marked, output)
            elif marked is not None:
                show(marked)
            found.add(path, image, boxes, scores)
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


def run_video(
    detector: FaceDetector,
    video: Video,
    name: str,
    target: str | None,
    marks: Boxes | Anonymized | None,
    found: FoundFaces,
) -> int:
    """Marks every frame until the video ends, or Ctrl-C or, on the screen, Esc is pressed."""
    cv2, expected = import_cv2(), video.num_frames
    writer = VideoWriter(target, video.rate) if target else None
    num_frames, num_faces, stopped, start = 0, 0, False, time.perf_counter()

    def put(images) -> bool:
        """Writes or shows frames; whether the user wants no more."""
        for image in images:
            if writer is not None:
                writer.write(image)
            else:
                cv2.imshow(name, as_bgr(image))
                if cv2.waitKey(1) == 27:
                    return True
        return False

    try:
        try:
            with tqdm(desc=name, unit="frame", total=expected) as progress:
                for image in video:
                    boxes, scores = detector.detect(image)
                    found.add(name, image, boxes, scores, frame=num_frames)
                    num_frames, num_faces = num_frames + 1, num_faces + len(boxes)
                    progress.update()
                    stopped = marks is not None and put(marks.frames(image, boxes, scores))
                    if stopped:
                        break
        except KeyboardInterrupt:
            stopped = True
        if marks is not None and not (stopped and writer is None):
            put(marks.last_frames())
    except Exception as error:  # OpenCV and its codecs raise kinds of their own
        raise ValueError(f"{name}: stopped after {num_frames} frames: {error}") from error
    finally:
        video.close()
        if writer is not None:
            writer.close()
    if not num_frames:
        raise ValueError(f"{name}: has no frame that can be read")
    seconds = time.perf_counter() - start
    count = f"{num_frames} of {expected}" if expected and num_frames < expected and not stopped else f"{num_frames}"
    print(f"{name}: {num_faces} faces in {count} frames in {seconds:.1f} s" + (f" -> {target}" if target else ""))
    problems = []
    if expected and not stopped and num_frames < (1 - END_TOLERANCE) * expected:
        problems.append(f"{name}: ends early, or cannot be decoded further: {num_frames} of {expected} frames are done")
    if target and (num_written := count_frames(target)) is not None and num_written < num_frames:
        problems.append(f"{target}: only {num_written} of {num_frames} frames could be written; is the disk full?")
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
