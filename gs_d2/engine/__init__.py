"""Training: the `Trainer` behind train_net.py, the order of its data, its steps, and how its processes start."""

from gs_d2 import compat  # noqa: F401  (first: says how to install Detectron2 where it is missing)

from gs_d2.engine.launch import launch  # isort: skip
from gs_d2.engine.step import AccumulatingTrainer
from gs_d2.engine.train_data import TrainLoader
from gs_d2.engine.trainer import Trainer, test_setting

__all__ = ["AccumulatingTrainer", "TrainLoader", "Trainer", "launch", "test_setting"]
