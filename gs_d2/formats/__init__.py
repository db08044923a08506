"""Official annotation files of FDDB, AFW and PASCAL faces, and pictures, read with numpy, scipy and Pillow only.

Below `gs_d2.data`, `gs_d2.evaluation` and `gs_d2.inference`, which share what is here: the data sets make dicts of the
annotations, and tools/evaluate.py reads the same without Detectron2. A format that only one of them needs stays there.
"""
