"""A part of a data set as a data set of its own, for evaluations while training."""

from detectron2.data import DatasetCatalog, MetadataCatalog

from gs_d2.data.catalog import load_records


def register_subset(dataset_name: str, num_images: int) -> str:
    """Registers `<dataset_name>_subset_<num_images>`: evenly spaced images in the order of the data set; once.

    Its metadata are the data set's, with `image_ids`, which evaluators that read annotations from a file keep to, and
    `subset_of`, a text. Loads the data set's dicts.

    Args:
        dataset_name: a registered data set whose dicts have `image_id`.
        num_images: at least 1.

    Returns:
        The subset's name; `dataset_name` itself where the data set has no more images.
    """
    name = f"{dataset_name}_subset_{num_images}"
    if name in DatasetCatalog.list():
        return name
    dataset_dicts = load_records(dataset_name, for_training=False)
    if len(dataset_dicts) <= num_images:
        return dataset_name
    chosen = [dataset_dicts[i * len(dataset_dicts) // num_images] for i in range(num_images)]
    metadata = MetadataCatalog.get(dataset_name).as_dict()  # after loading, which for COCO sets some of it
    metadata.pop("name")
    DatasetCatalog.register(name, lambda: chosen)
    MetadataCatalog.get(name).set(
        **metadata,
        image_ids=[dataset_dict["image_id"] for dataset_dict in chosen],
        subset_of=f"{num_images} of the {len(dataset_dicts)} images of {dataset_name}",
    )
    return name
