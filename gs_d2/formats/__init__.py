"""The files of the benchmarks, annotations and detections, and pictures, read and written with numpy, scipy and Pillow.

Below `gs_d2.data`, `gs_d2.evaluation` and `gs_d2.inference`, which share what is here: the data sets make dicts of the
annotations, and tools/evaluate.py reads the same without Detectron2.
"""
