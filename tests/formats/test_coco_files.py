"""COCO's files: completed, or refused in one line with file and entry; every key of every wrong kind is tried."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gs_d2.formats.coco import check_coco, read_coco


def content():
    return {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 96, "width": 128, "license": None} for i in (7, 3)],
        "annotations": [
            {"id": 5, "image_id": 3, "category_id": 9, "bbox": [1, 2, 30.5, 4], "area": 100, "iscrowd": 0},
            {"id": 2, "image_id": 3, "category_id": 2, "bbox": [5, 6, 0, 8], "area": 1.5, "iscrowd": 1},
        ],
        "categories": [{"id": 9, "name": "cat", "supercategory": "animal"}, {"id": 2, "name": "dog"}],
    }


def refusal(changed) -> str:
    with pytest.raises(ValueError) as error:
        check_coco(changed, "a.json")
    assert str(error.value).startswith("a.json: ") and "\n" not in str(error.value)
    return str(error.value)


def test_a_good_file_is_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content()))
    found = read_coco(path)
    expected = content()
    assert (found.images, found.annotations, found.categories) == (
        expected["images"],
        expected["annotations"],
        expected["categories"],
    )
    assert found.notes == [] and {k: len(v) for k, v in found.of_images().items()} == {7: 0, 3: 2}


def test_what_has_a_default_is_completed():
    given = content()
    for annotation in given["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    before = copy.deepcopy(given)
    found = check_coco(given, "a.json")
    assert [x["area"] for x in found.annotations] == [122.0, 0] and [x["iscrowd"] for x in found.annotations] == [0, 0]
    assert given == before and len(found.notes) == 2
    for key in ("area", "iscrowd", "ignore", "id"):
        given = content()
        given["annotations"][0][key] = None
        assert check_coco(given, "a.json").annotations[0] | {"id": 5} == (
            content()["annotations"][0] | ({"area": 122.0} if key == "area" else {})
        )


@pytest.mark.parametrize("ids", [(0, 1), (4, 4), (-1, 3), ("a", "b"), (None, 2), (1.5, 2), ([], {}), (True, 2), (1,)])
def test_annotations_are_numbered_again(ids):
    given = content()
    for annotation in given["annotations"]:
        del annotation["id"]
    for annotation, new_id in zip(given["annotations"], ids, strict=False):
        annotation["id"] = new_id
    found = check_coco(given, "a.json")
    assert [x["id"] for x in found.annotations] == [1, 2] and "numbered again" in found.notes[0]


@pytest.mark.parametrize(("flag", "crowd"), [(0, 0), (False, 0), (1, 1), (True, 1)])
def test_a_flag_to_ignore_makes_a_crowd(flag, crowd):
    given = content()
    given["annotations"][0]["ignore"] = flag
    found = check_coco(given, "a.json")
    assert found.annotations[0]["iscrowd"] == crowd and "ignore" not in found.annotations[0]
    assert any("ignore" in note for note in found.notes) == bool(crowd)


def test_without_annotations():
    given = content()
    del given["annotations"]
    assert check_coco(given, "a.json").annotations is None
    given["annotations"] = []
    assert check_coco(given, "a.json").annotations == []


def test_ids_of_images_may_be_text():
    given = content()
    for image in given["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in given["annotations"]:
        annotation["image_id"] = "image 3"
    assert list(check_coco(given, "a.json").of_images()) == ["image 7", "image 3"]
    given["images"][0]["id"] = 7
    assert "some images have a number as id and others text" in refusal(given)


@pytest.mark.parametrize("value", [[], "x", 3, None, True])
def test_top_level(value):
    assert ("files of results" if value == [] else "must be an object with images") in refusal(value)


BAD = {
    ("images", "id"): ([None, True, 1.5, [], {}, 2**63, 3], "id"),
    ("images", "file_name"): ([None, "", 3, [], ["a.jpg"]], "file_name must be text"),
    ("images", "height"): ([None, 0, -1, "96", 1.5, [], True, float("nan")], "height must be a whole number above 0"),
    ("images", "width"): ([None, 0, -1, "96", 1.5, [], 1e300], "width must be a whole number above 0"),
    ("annotations", "image_id"): ([None, 4, "3", [3], {}, True], "image_id must be the id of one of the images"),
    ("annotations", "category_id"): ([None, 1, "9", [9], {}], "category_id must be the id of one of the categories"),
    ("annotations", "bbox"): (
        [
            *(None, [], {}, 5, "1 2 3 4", [[1, 2], [3, 4]], [1, 2, 3], [1, 2, 3, 4, 0.5], ["1", "2", "3", "4"]),
            *([None, 1, 5, 5], [1, 2, -3, 4], [1, 2, 3, float("nan")], [1, 2, float("inf"), 4], [1, 2, 3, 10**400]),
        ],
        "bbox must be four numbers",
    ),
    ("annotations", "area"): (["100", -1, [], float("nan"), True], "area must be a number that is not negative"),
    ("annotations", "iscrowd"): ([2, "0", "yes", [], {}, -1, 0.5], "iscrowd must be 0 or 1"),
    ("annotations", "ignore"): ([2, "0", [], {}], "ignore must be 0 or 1"),
    ("categories", "id"): ([None, "9", 1.5, [], True, 2], "id"),
    ("categories", "name"): ([None, 3, [], {}], "name must be text"),
}


@pytest.mark.parametrize(("part", "key"), BAD)
def test_wrong_values_are_named(part, key):
    values, message = BAD[part, key]
    for value in values:
        given = content()
        given[part][0][key] = value
        said = refusal(given)
        assert message in said and f"{part}[" in said, (value, said)
    if key not in ("area", "iscrowd", "ignore"):
        given = content()
        del given[part][0][key]
        assert message in refusal(given) and "got none" in refusal(given)


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
def test_wrong_parts(part):
    for value in (None, {}, "x", 3, [None], [[]], ["x"], [content()[part][0], 3]):
        assert part in refusal({**content(), part: value})
    if part != "annotations":
        given = content()
        del given[part]
        assert refusal(given) == f"a.json: {part} is missing"
    assert "categories is empty" in refusal({**content(), "categories": []})


def test_two_categories_of_one_name():
    given = content()
    given["categories"] = [{"id": 9, "name": "face"}, {"id": 2, "name": "face"}]
    for annotation in given["annotations"]:
        annotation["category_id"] = 9
    assert refusal(given) == "a.json: categories[1]: name 'face' for the second time"


def test_parts_of_the_image_are_no_pixels():
    given = content()
    for annotation in given["annotations"]:
        annotation["bbox"] = [0.25, 0.5, 0.5, 0.125]
    assert "a.json: no bbox leaves the first pixel: they must be in pixels" in refusal(given)
    given["annotations"][0]["bbox"] = [0.25, 0.5, 20, 0.125]
    assert len(check_coco(given, "a.json").annotations) == 2


def test_whole_numbers_may_be_floats():
    given = content()
    given["images"][1] |= {"id": 3.0, "height": 96.0}
    given["annotations"][0] |= {"image_id": 3.0, "category_id": 9.0, "iscrowd": 0.0}
    found = check_coco(given, "a.json")
    assert found.images[1]["height"] == 96 and type(found.annotations[0]["image_id"]) is int


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from([0, 1, 2, 3, 7, 9]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["id", "file_name", "height", "width", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "name"]
CHANGES = st.lists(
    st.tuples(st.sampled_from(["images", "annotations", "categories"]), st.integers(0, 1), st.sampled_from(KEYS), ANY),
    min_size=1,
    max_size=3,
)


@given(changes=CHANGES, removed=st.booleans())
def test_any_value_of_any_key_is_right_or_refused(changes, removed):
    given = content()
    for part, index, key, value in changes:
        given[part][index].pop(key, None)
        if not removed:
            given[part][index][key] = value
    try:
        found = check_coco(given, "a.json")
    except ValueError as error:
        assert str(error).startswith("a.json: ") and "\n" not in str(error)
        return
    ids = [x["id"] for x in found.annotations]
    assert len(set(ids)) == 2 and min(ids) >= 1
    assert {x["image_id"] for x in found.annotations} <= {x["id"] for x in found.images}
    assert {x["category_id"] for x in found.annotations} <= {x["id"] for x in found.categories}
    for annotation, original in zip(found.annotations, given["annotations"], strict=True):
        assert annotation["bbox"] == original["bbox"] and len(annotation["bbox"]) == 4
        assert annotation["area"] >= 0 and annotation["iscrowd"] in (0, 1)
    assert all(type(x["height"]) is int and x["height"] > 0 for x in found.images)


@given(ANY)
def test_any_value_is_right_or_refused(value):
    try:
        check_coco(value, "a.json")
    except ValueError as error:
        assert str(error).startswith("a.json: ") and "\n" not in str(error)
