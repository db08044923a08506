"""Which faces are found and which detections are right: one to one, in the order of the scores."""

import numpy as np

from gs_d2.analysis.hits import match_detections


def test_matches_are_one_to_one():
    faces = np.array([[0.0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 60, 60]])
    detections = np.array([[0.0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 5], [21, 6, 30, 10], [50, 50, 60, 54.9]])
    found, hits = match_detections(faces, detections)
    assert found.tolist() == [True, True, False]
    assert hits.tolist() == [True, False, True, False, False]
    for some_faces, some_detections in ((3, 0), (0, 4), (0, 0)):
        found, hits = match_detections(faces[:some_faces], detections[:some_detections])
        assert found.tolist() == [False] * some_faces and hits.tolist() == [False] * some_detections
