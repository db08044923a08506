"""Official annotation files of FDDB, AFW and PASCAL faces, read with numpy and scipy only.

Below both `gs_d2.data` and `gs_d2.evaluation`, which do not know each other: the data sets make dicts of what is read
here, and tools/evaluate.py reads the same without Detectron2. A format that only one of them needs stays there.
"""
