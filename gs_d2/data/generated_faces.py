"""A small data set in WIDER FACE's layout: generated faces of 8 to 160 px on clutter, with things that look like faces.

One seed decides everything, so the same call gives the same files. For demos and tests; a detector trained on it knows
drawings, not people.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.io import savemat
from tqdm import tqdm

EVENTS = ("0--Street", "1--Crowd")
MIN_SCALE, MAX_SCALE = 8, 160  # sqrt(w * h) of a face, pixels
SUPERSAMPLING = 3
SUBSET_MIN_HEIGHT = {"easy": 48, "medium": 24, "hard": 10}  # nested, as WIDER FACE's are


def synthesize(root: Path, counts: dict[str, int], size: tuple[int, int], seed: int):
    """Writes images, their lists, and the ground truth of "val" in the official .mat layout.

    Args:
        root: folder that receives widerface/.
        counts: images of "train" and of "val"; more of them keep the first ones.
        size: (width, height) of each, in pixels.
    """
    base = root / "widerface"
    (base / "wider_face_split").mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(counts.items()):
        annotations = {event: [] for event in EVENTS}
        for index in tqdm(range(count), desc=f"generating {split}", unit="image"):
            rng = np.random.default_rng([seed, number, index])
            event = EVENTS[index % len(EVENTS)]
            image, boxes = draw_scene(rng, size, crowded=event == "1--Crowd")
            name = f"{event.replace('--', '_')}_{split}_{index}.jpg"
            path = base / f"WIDER_{split}" / "images" / event / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=90)
            annotations[event].append((name, boxes))
        write_list(base / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt", annotations)
        if split == "val":
            write_ground_truth(base / "ground_truth", annotations)


def draw_scene(rng, size, crowded):
    """An image and its face boxes, int [n, 4] as x, y, w, h."""
    width, height = size
    canvas = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING), random_colour(rng))
    draw_clutter(rng, canvas)
    occupied, boxes = [], []
    num_faces = int(rng.integers(15, 50)) if crowded else int(rng.integers(2, 8))
    kinds = ["face"] * num_faces + ["distractor"] * (4 + num_faces // 3)
    low, high = (MIN_SCALE, 64) if crowded else (24, MAX_SCALE)
    scales = np.exp(rng.uniform(math.log(low), math.log(high), len(kinds)))
    # Large ones first: small ones then find the room that is left.
    for scale, kind in sorted(zip(scales, rng.permutation(kinds), strict=True), reverse=True):
        aspect = rng.uniform(1.1, 1.4)
        w, h = scale / math.sqrt(aspect), scale * math.sqrt(aspect)
        if w >= width or h >= height:
            continue
        for _ in range(30):
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            if not any(overlap((x, y, w, h), other) for other in occupied):
                occupied.append((x, y, w, h))
                (draw_face if kind == "face" else draw_distractor)(rng, canvas, x, y, w, h)
                if kind == "face":
                    boxes.append([round(x), round(y), round(w), round(h)])
                break
    image = canvas.resize(size, Image.LANCZOS)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    noise = rng.normal(0, rng.uniform(2, 10), (height, width, 3))
    image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    return image, np.array(boxes, dtype=int).reshape(-1, 4)


def overlap(a, b, margin=2):
    return all(a[i] < b[i] + b[i + 2] + margin and b[i] < a[i] + a[i + 2] + margin for i in (0, 1))


def random_colour(rng, low=0, high=256):
    return tuple(int(v) for v in rng.integers(low, high, 3))


def skin_colour(rng):
    """From dark to light, always with red above green above blue, as skin has."""
    light = rng.uniform(0.25, 1.0)
    return tuple(int(np.clip(light * c + rng.normal(0, 8), 0, 255)) for c in (245, 200, 165))


def draw_clutter(rng, canvas):
    draw = ImageDraw.Draw(canvas)
    w, h = canvas.size
    for _ in range(int(rng.integers(15, 45))):
        x, y = rng.uniform(-0.1, 1.0, 2) * (w, h)
        dx, dy = rng.uniform(0.02, 0.35, 2) * (w, h)
        colour = random_colour(rng)
        shape = rng.integers(4)
        if shape == 0:
            draw.rectangle((x, y, x + dx, y + dy), fill=colour)
        elif shape == 1:
            draw.line((x, y, x + rng.uniform(-1, 1) * w, y + dy), fill=colour, width=int(rng.integers(2, 20)))
        elif shape == 2:
            points = [tuple(rng.uniform(0, 1, 2) * (dx, dy) + (x, y)) for _ in range(int(rng.integers(3, 7)))]
            draw.polygon(points, fill=colour)
        else:
            end = int(rng.integers(90, 360))
            draw.arc((x, y, x + dx, y + dy), 0, end, fill=colour, width=int(rng.integers(2, 14)))


def box_of(x, y, w, h, cx, cy, rx, ry):
    """Pixels of the canvas around a centre, with radii; these are shares of a face."""
    corners = x + w * (cx - rx), y + h * (cy - ry), x + w * (cx + rx), y + h * (cy + ry)
    return tuple(SUPERSAMPLING * v for v in corners)


def draw_face(rng, canvas, x, y, w, h):
    skin = skin_colour(rng)
    dark = tuple(int(c * rng.uniform(0.1, 0.35)) for c in skin)
    layer = Image.new("RGBA", canvas.size)
    draw = ImageDraw.Draw(layer)
    box = partial(box_of, x, y, w, h)
    draw.ellipse(box(0.5, 0.5, 0.5, 0.5), fill=skin)
    if rng.random() < 0.8:
        start, end = 195 + rng.uniform(-10, 15), 345 + rng.uniform(-15, 10)
        draw.chord(box(0.5, 0.5, 0.5, 0.5), start, end, fill=random_colour(rng, 0, 110))
    turn = rng.uniform(-0.08, 0.08)
    eye_y, eye_r = rng.uniform(0.4, 0.47), rng.uniform(0.07, 0.1)
    for eye_x in (0.3 + turn, 0.7 + turn):
        draw.ellipse(box(eye_x, eye_y, eye_r * 1.3, eye_r * 0.8), fill=(240, 240, 240))
        draw.ellipse(box(eye_x + turn / 2, eye_y, eye_r * 0.7, eye_r * 0.7), fill=dark)
        brow = (*box(eye_x - 0.1, eye_y - 0.12, 0, 0)[:2], *box(eye_x + 0.1, eye_y - 0.12, 0, 0)[:2])
        draw.line(brow, fill=dark, width=max(1, int(SUPERSAMPLING * h * 0.025)))
    nose = tuple(int(c * 0.75) for c in skin)
    corners = ((0.5, 0.48), (0.43, 0.65), (0.57, 0.65))
    draw.polygon([box(cx + turn, cy, 0, 0)[:2] for cx, cy in corners], fill=nose)
    mouth = (int(rng.integers(120, 200)), 50, 60)
    draw.chord(box(0.5 + turn, 0.74, rng.uniform(0.14, 0.22), rng.uniform(0.05, 0.1)), 0, 180, fill=mouth)
    canvas.paste(layer, (0, 0), layer)


def draw_distractor(rng, canvas, x, y, w, h):
    """Ovals that are no faces: balls and heads from behind, clocks, sockets, faces without order."""
    draw = ImageDraw.Draw(canvas)
    box = partial(box_of, x, y, w, h)
    kind = rng.integers(4)
    colour = skin_colour(rng) if rng.random() < 0.6 else random_colour(rng)
    (draw.rectangle if kind == 3 else draw.ellipse)(box(0.5, 0.5, 0.5, 0.5), fill=colour)
    if kind == 0:  # from behind: hair everywhere but a rim
        draw.ellipse(box(0.5, 0.42, 0.46, 0.4), fill=random_colour(rng, 0, 110))
    elif kind == 1:  # a clock
        for _ in range(2):
            end = box(0.5 + rng.uniform(-0.35, 0.35), 0.5 + rng.uniform(-0.35, 0.35), 0, 0)[:2]
            hand = (*box(0.5, 0.5, 0, 0)[:2], *end)
            draw.line(hand, fill=(20, 20, 20), width=max(1, int(SUPERSAMPLING * h * 0.04)))
    else:  # spots where no eyes and mouth belong
        for _ in range(int(rng.integers(1, 5))):
            cx, cy = rng.uniform(0.2, 0.8), rng.choice([rng.uniform(0.1, 0.3), rng.uniform(0.55, 0.9)])
            r = rng.uniform(0.05, 0.12)
            draw.ellipse(box(cx, cy, r, r), fill=random_colour(rng, 0, 120))


def write_list(path, annotations):
    lines = []
    for event, images in annotations.items():
        for name, boxes in images:
            lines += [f"{event}/{name}", str(len(boxes))]
            lines += [f"{x} {y} {w} {h} 0 0 0 0 0 0" for x, y, w, h in boxes] or ["0 0 0 0 0 0 0 0 0 0"]
    path.write_text("\n".join(lines) + "\n")


def write_ground_truth(folder, annotations):
    """The four .mat files of the official evaluation tools: nested cells, indices from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "event_list": cells(annotations),
        "file_list": cells(cells(name[:-4] for name, _ in images) for images in annotations.values()),
        "face_bbx_list": cells(cells(boxes.astype(float) for _, boxes in images) for images in annotations.values()),
    }
    labels = {
        f"{key}_label_list": cells(
            cells(np.zeros((len(boxes), 1), np.uint8) for _, boxes in images) for images in annotations.values()
        )
        for key in ("blur", "expression", "illumination", "invalid", "occlusion", "pose")
    }
    write_mat(folder / "wider_face_val.mat", {**common, **labels})
    for subset, min_height in SUBSET_MIN_HEIGHT.items():
        kept = cells(
            cells((np.flatnonzero(boxes[:, 3] >= min_height) + 1).reshape(-1, 1) for _, boxes in images)
            for images in annotations.values()
        )
        write_mat(folder / f"wider_{subset}_val.mat", {**common, "gt_list": kept})


def write_mat(path, content):
    savemat(path, content)
    with open(path, "r+b") as file:
        file.write(b"MATLAB 5.0 MAT-file, generated faces".ljust(116))  # in place of a text with the time of day


def cells(values):
    """A MATLAB cell column."""
    values = list(values)
    out = np.empty((len(values), 1), dtype=object)
    for i, value in enumerate(values):
        out[i, 0] = value
    return out
