"""The published precision-recall curves of WIDER FACE, and files that only look like them."""

import h5py
import numpy as np
import pytest

from gs_d2.evaluation.precision_recall import all_points_ap
from gs_d2.formats.wider_curves import read_official_curves


@pytest.mark.parametrize(
    ("method", "aps"),
    [("HR", (0.9257, 0.9105, 0.8060)), ("SSH", (0.9312, 0.9211, 0.8458)), ("SFD", (0.9378, 0.9256, 0.8590))],
)
def test_published_curves(shared_data, method, aps):
    curves = read_official_curves(shared_data / "wider_face" / "pr_curves")[method]
    assert [all_points_ap(*curves[subset]) for subset in ("easy", "medium", "hard")] == pytest.approx(aps, abs=1e-4)


def test_no_official_curves(tmp_path):
    with pytest.raises(FileNotFoundError, match="wider_pr_info"):
        read_official_curves(tmp_path)
    (tmp_path / "wider_pr_info_X_easy_val.mat").write_bytes(b"not HDF5")
    with pytest.raises(ValueError, match="wider_pr_info_X_easy_val"):
        read_official_curves(tmp_path)


def test_hostile_official_curves(tmp_path):
    """A tiny file that claims billions of numbers, and ones that would read the bytes of other files."""
    secret, path = tmp_path / "secret", tmp_path / "wider_pr_info_X_easy_val.mat"
    secret.write_bytes(np.ones(2000).tobytes())
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["pr_cruve"] = np.ones((2, 1000))

    def huge(file):
        file.create_dataset("pr_cruve", (2, 10**12), "f8", chunks=(2, 1000))

    def external(file):
        file.create_dataset("pr_cruve", (2, 1000), "f8", external=[(str(secret), 0, 16000)])

    def linked(file):
        file["pr_cruve"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "pr_cruve")

    def virtual(file):
        layout = h5py.VirtualLayout((2, 1000), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "pr_cruve", (2, 1000))
        file.create_virtual_dataset("pr_cruve", layout)

    def group(file):
        file.create_group("pr_cruve")

    def text(file):
        file["pr_cruve"] = "text"

    for make in (huge, external, linked, virtual, group, text):
        with h5py.File(path, "w") as file:
            make(file)
        with pytest.raises(ValueError, match=r"wider_pr_info_X_easy_val\.mat: not a precision-recall curve"):
            read_official_curves(tmp_path)
    with h5py.File(path, "w") as file:
        file["pr_cruve"] = np.ones((2, 1000))
    assert [values.shape for values in read_official_curves(tmp_path)["X"]["easy"]] == [(1000,), (1000,)]
