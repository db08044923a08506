"""Whether a detector has the classes that it is trained on."""


def check_gt_classes(batched_inputs: list[dict], num_classes: int, key: str) -> None:
    """Refuses objects of a class from `num_classes` on, which would be trained as background.

    Args:
        batched_inputs: with `instances` and their `gt_classes`; those on a GPU are not looked at, as that would wait.
        key: of the config, for the message.

    Raises:
        ValueError: naming the image, the class and the key.
    """
    for image in batched_inputs:
        classes = image["instances"].gt_classes
        if not classes.is_cuda and len(classes) and int(classes.max()) >= num_classes:
            raise ValueError(
                f"{image.get('file_name', 'an image')} has an object of class {int(classes.max())} (from 0 on), and "
                f"{key} is {num_classes}"
            )
