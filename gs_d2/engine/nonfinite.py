"""The batch whose loss was not finite, as a file to look into."""

import numpy as np
import torch
from detectron2.structures import Instances


def save_batches(path: str, batches: list[list[dict]], **about):
    """Writes a file that `torch.load(path, weights_only=True)` reads.

    It holds `about`, `file_names` (of all batches' images) and `batches`, in which Instances are dicts of their fields
    with `image_size`, Boxes are their tensors, and what is neither tensor, number nor text is its `repr`.
    """
    file_names = [str(image.get("file_name", "?")) for batch in batches for image in batch]
    torch.save({**_plain(about), "file_names": file_names, "batches": _plain(batches)}, path)


def _plain(value):
    if isinstance(value, Instances):
        return {"image_size": list(value.image_size), **_plain(value.get_fields())}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.as_tensor(value)
    value = getattr(value, "tensor", value)  # Boxes and its relatives
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    return value if isinstance(value, (str, bool, int, float, type(None))) else repr(value)
