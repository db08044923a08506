"""Faces of an exported file are paired with those of its model; tests/tools/test_export_model.py compares real ones."""

import torch

from gs_d2.inference.exported import matched


def test_matched_pairs_each_face_once():
    face = torch.tensor([[10.0, 10.0, 20.0, 20.0, 0.9]])
    moved = [face + torch.tensor([[dx, 0, 0, 0, ds]]) for dx, ds in ((0.005, 0.0), (0.02, 0.0), (0.0, 5e-4))]
    other = face + 50
    assert matched(torch.cat([other, face]), torch.cat([moved[0], other])).tolist() == [[0, 1], [1, 0]]
    assert matched(torch.cat([face, face]), face).tolist() == [[0, 0]]  # found twice: one is alone
    for wrong in moved[1:]:
        assert matched(face, wrong).tolist() == []
    assert matched(face[:0], face).tolist() == matched(face, face[:0]).tolist() == []
