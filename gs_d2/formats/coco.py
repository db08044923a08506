"""COCO's annotation files, checked and completed once, when they are read."""

import os
from dataclasses import dataclass, field

from gs_d2.formats.json_text import read_json

_MAX_NUMBER = 1e9  # pixels; far above any image
_MAX_ID = 2**63  # numpy, in which pycocotools counts, has no more


@dataclass(frozen=True)
class CocoAnnotations:
    """The content of a file that training and pycocotools can rely on.

    Attributes:
        images: dicts with `id` (all int or all str, unique), `file_name`, `height`, `width` (int > 0) and what else the
            file has; in the file's order.
        annotations: dicts with `id` (unique, from 1 on, as pycocotools takes 0 for "no match"), `image_id`,
            `category_id` (of `images` and `categories`), `bbox` (x, y, w, h; w and h not negative), `area` and
            `iscrowd` (0 or 1). None where the file has no such list: the annotations of a test set are not public.
        categories: dicts with `id` (int) and `name`, both unique; at least one.
        notes: in words what was completed; for a log.
    """

    images: list[dict]
    annotations: list[dict] | None
    categories: list[dict]
    notes: list[str] = field(default_factory=list)

    def of_images(self) -> dict:
        """image id -> its annotations, [] where it has none, in the order of the file."""
        grouped = {image["id"]: [] for image in self.images}
        for annotation in self.annotations or ():
            grouped[annotation["image_id"]].append(annotation)
        return grouped


def read_coco(path: str | os.PathLike) -> CocoAnnotations:
    """Reads a file of COCO's format for detection.

    Completed is what has a default: `area` w * h, `iscrowd` 0. An annotation with an `ignore` flag becomes a crowd: it
    neither counts nor costs. Annotations get new ids where one is missing, comes twice or is no whole number above 0.
    Masks and keypoints are not kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no JSON, or anything else is missing or wrong; in one line the file and the entry.
    """
    return check_coco(read_json(path), str(path))


def check_coco(content, where: str) -> CocoAnnotations:
    """:func:`read_coco` of what a file holds; `where` names it in messages. The content is not changed."""
    if isinstance(content, list):
        raise ValueError(
            f"{where}: a list, as files of results have it; COCO's annotations are an object with images, annotations "
            "and categories"
        )
    if not isinstance(content, dict):
        raise ValueError(f"{where}: must be an object with images, annotations and categories, got {_shown(content)}")
    images = [_image(image, at) for image, at in _entries(content, "images", where)]
    if len({type(image["id"]) for image in images}) > 1:
        raise ValueError(f"{where}: some images have a number as id and others text; make them of one kind")
    _check_unique(images, f"{where}: images")
    categories = [_category(category, at) for category, at in _entries(content, "categories", where)]
    if not categories:
        raise ValueError(f"{where}: categories is empty: name at least one class")
    _check_unique(categories, f"{where}: categories")
    _check_unique(categories, f"{where}: categories", "name")  # of two, an evaluation would report one
    if "annotations" not in content:
        return CocoAnnotations(images, None, categories)
    counts = {"area": 0, "iscrowd": 0, "ignore": 0}
    image_ids, category_ids = {image["id"] for image in images}, {category["id"] for category in categories}
    annotations = [
        _annotation(annotation, at, image_ids, category_ids, counts)
        for annotation, at in _entries(content, "annotations", where)
    ]
    if annotations and all(map(_is_fraction, annotations)):
        raise ValueError(f"{where}: no bbox leaves the first pixel: they must be in pixels, not parts of the image")
    notes = [f"{counts['area']} annotations without area have w * h"] if counts["area"] else []
    notes += [f"{counts['iscrowd']} without iscrowd are no crowds"] if counts["iscrowd"] else []
    notes += [f"{counts['ignore']} with the flag ignore are ignored, as crowds are"] if counts["ignore"] else []
    ids = [_whole(annotation["id"]) for annotation in annotations]
    if any(x is None or x < 1 for x in ids) or len(set(ids)) < len(ids):
        ids = range(1, len(ids) + 1)
        notes.append("annotations are numbered again, since their ids are not unique numbers from 1 on")
    for annotation, new_id in zip(annotations, ids, strict=True):
        annotation["id"] = new_id
    return CocoAnnotations(images, annotations, categories, notes)


def _entries(content: dict, key: str, where: str):
    """The objects of one of the lists, each with how a message names it."""
    if key not in content:
        raise ValueError(f"{where}: {key} is missing")
    if not isinstance(content[key], list):
        raise ValueError(f"{where}: {key} must be a list, got {_shown(content[key])}")
    for i, entry in enumerate(content[key]):
        at = _Place(where, key, i, entry)
        if not isinstance(entry, dict):
            raise ValueError(f"{at} must be an object, got {_shown(entry)}")
        yield entry, at


class _Place:
    """An entry in words, which are made only for a message."""

    def __init__(self, where, key, index, entry):
        self._parts = where, key, index, entry

    def __str__(self):
        where, key, index, entry = self._parts
        known = isinstance(entry, dict) and entry.get("id") is not None
        return f"{where}: {key}[{index}]" + (f" (id {_shown(entry['id'])})" if known else "")


def _image(image: dict, at: _Place) -> dict:
    image_id = image.get("id")
    if not isinstance(image_id, str):
        image_id = _whole(image_id)
    if image_id is None:
        raise _wrong(at, image, "id", "a whole number or text")
    if not isinstance(image.get("file_name"), str) or not image["file_name"]:
        raise _wrong(at, image, "file_name", "text")
    checked = {**image, "id": image_id}
    for key in ("height", "width"):
        checked[key] = _whole(image.get(key))
        if checked[key] is None or not 0 < checked[key] < _MAX_NUMBER:
            raise _wrong(at, image, key, "a whole number above 0")
    return checked


def _category(category: dict, at: _Place) -> dict:
    category_id = _whole(category.get("id"))
    if category_id is None:
        raise _wrong(at, category, "id", "a whole number")
    if not isinstance(category.get("name"), str):
        raise _wrong(at, category, "name", "text")
    return {**category, "id": category_id}


def _annotation(annotation: dict, at: _Place, image_ids: set, category_ids: set, counts: dict) -> dict:
    ids = {}
    for key, known, of in (("image_id", image_ids, "images"), ("category_id", category_ids, "categories")):
        value = annotation.get(key)
        ids[key] = value if isinstance(value, str) else _whole(value)
        if ids[key] is None or ids[key] not in known:
            raise _wrong(at, annotation, key, f"the id of one of the {of}")
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or box[2] < 0 or box[3] < 0:
        raise _wrong(at, annotation, "bbox", "four numbers x, y, w, h, the last two not negative")
    area, crowd, ignore = (annotation.get(key) for key in ("area", "iscrowd", "ignore"))
    if area is None:
        area = box[2] * box[3]
        counts["area"] += 1
    elif not _is_number(area, 1e18) or area < 0:
        raise _wrong(at, annotation, "area", "a number that is not negative")
    counts["iscrowd"] += crowd is None
    flags = {}
    for key, value in (("iscrowd", crowd), ("ignore", ignore)):
        if value is not None and value not in (0, 1):
            raise _wrong(at, annotation, key, "0 or 1")
        flags[key] = bool(value)
    counts["ignore"] += flags["ignore"] and not flags["iscrowd"]
    return {
        "id": annotation.get("id"),
        **ids,
        "bbox": box,
        "area": area,
        "iscrowd": int(flags["iscrowd"] or flags["ignore"]),
    }


def _is_fraction(annotation: dict) -> bool:
    x, y, w, h = annotation["bbox"]
    return w > 0 and h > 0 and min(x, y) >= 0 and x + w <= 1 and y + h <= 1


def _check_unique(entries: list[dict], where: str, key: str = "id"):
    seen = set()
    for i, entry in enumerate(entries):
        if entry[key] in seen:
            raise ValueError(f"{where}[{i}]: {key} {_shown(entry[key])} for the second time")
        seen.add(entry[key])


def _whole(value) -> int | None:
    """The whole number that a value is, also as a float; None of anything else."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and -_MAX_ID <= value < _MAX_ID else None


def _is_number(value, below: float = _MAX_NUMBER) -> bool:
    return type(value) in (int, float) and -below < value < below  # NaN is not


def _wrong(at: _Place, entry: dict, key: str, expected: str) -> ValueError:
    got = _shown(entry[key]) if key in entry else "none"
    return ValueError(f"{at}: {key} must be {expected}, got {got}")


def _shown(value) -> str:
    """A value in a message: short, in one line."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(x, (dict, list)) for x in value)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} with {len(value)} entries"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
