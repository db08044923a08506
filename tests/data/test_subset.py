"""register_subset: which images, under which name, with which metadata."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from gs_d2.data import register_subset


@pytest.fixture
def registered():
    """Registers data sets of a number of images; removes them and what was registered besides."""
    before = set(DatasetCatalog.list())
    loads = []

    def register(size):
        def load():
            loads.append(size)
            MetadataCatalog.get(f"subset_test_{size}").thing_classes = ["set while loading, as COCO's"]
            return [{"image_id": f"image {i}", "file_name": f"{i}.jpg"} for i in range(size)]

        DatasetCatalog.register(f"subset_test_{size}", load)
        MetadataCatalog.get(f"subset_test_{size}").set(evaluator_type="fddb")
        return f"subset_test_{size}"

    register.loads = loads
    yield register
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_evenly_spaced_images_with_the_metadata(registered):
    name = register_subset(registered(10), 4)
    assert name == "subset_test_10_subset_4"
    assert [record["file_name"] for record in DatasetCatalog.get(name)] == ["0.jpg", "2.jpg", "5.jpg", "7.jpg"]
    metadata = MetadataCatalog.get(name)
    assert metadata.name == name and metadata.evaluator_type == "fddb"
    assert metadata.thing_classes == ["set while loading, as COCO's"]
    assert metadata.image_ids == ["image 0", "image 2", "image 5", "image 7"]
    assert metadata.subset_of == "4 of the 10 images of subset_test_10"
    assert "image_ids" not in MetadataCatalog.get("subset_test_10").as_dict()
    assert register_subset("subset_test_10", 4) == name and registered.loads == [10], "registered and loaded once"


@pytest.mark.parametrize("num_images", [3, 4])
def test_a_data_set_of_no_more_images_is_its_own_subset(registered, num_images):
    assert register_subset(registered(3), num_images) == "subset_test_3"


@pytest.mark.parametrize(("size", "num_images"), [(7, 1), (7, 6), (50, 7), (200, 199), (201, 100)])
def test_gaps_differ_by_one_at_most(registered, size, num_images):
    chosen = DatasetCatalog.get(register_subset(registered(size), num_images))
    rows = [int(record["image_id"].split()[1]) for record in chosen]
    gaps = [b - a for a, b in zip(rows, [*rows[1:], size], strict=True)]
    assert len(rows) == num_images and rows[0] == 0 and max(gaps) - min(gaps) <= 1
