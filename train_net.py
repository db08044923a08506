#!/usr/bin/env python
"""Trains and evaluates, with Detectron2's own flags. docs/training.md has several machines, Slurm and more.

python train_net.py --config-file configs/wider/fpn_finest_sampling.yaml --num-gpus 8
torchrun --nproc_per_node 8 train_net.py --config-file configs/wider/fpn_finest_sampling.yaml
python train_net.py --config-file ... --resume
python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/.../model_final.pth
"""

import os
from glob import glob

from gs_d2 import compat  # noqa: F401  isort: skip  (says how to install Detectron2 where it is missing)

from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from gs_d2.checkpoint import fetch_weights
from gs_d2.command_line import bad_input_ends, folder_for, print_any_name
from gs_d2.config import load_config
from gs_d2.data import check_data_sets
from gs_d2.data.dataset_mapper import BadDataError
from gs_d2.engine import Trainer, launch
from gs_d2.engine.checks import check_classes, check_config, check_trained_weights, check_training
from gs_d2.engine.value_checks import check_device
from gs_d2.modeling import fuse


@bad_input_ends(one_line=False)
def checked_config(args):
    """The config of a command line."""
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg, training=not args.eval_only)
    if not args.eval_only:
        check_training(cfg)
    cfg.freeze()
    check_device(cfg.MODEL.DEVICE)
    if args.eval_only and not args.resume:
        check_trained_weights(cfg.MODEL.WEIGHTS)
    train_names = None if args.eval_only else cfg.DATASETS.TRAIN
    check_data_sets(train_names, cfg.DATASETS.TEST, cfg.DATASETS.GS.MAX_MISSING)
    check_classes(cfg, training=not args.eval_only)
    if cfg.MODEL.WEIGHTS and not (args.resume and glob(os.path.join(cfg.OUTPUT_DIR, "*.pth"))):
        fetch_weights(cfg.MODEL.WEIGHTS)  # what goes wrong is said once, before any process
    folder_for("OUTPUT_DIR", cfg.OUTPUT_DIR)
    return cfg


def setup(cfg, args):
    """In each process."""
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="gs_d2")


@bad_input_ends(AttributeError, IndexError, RuntimeError, TypeError)  # of layers that cannot be made
def built(cfg, args):
    """The model to evaluate, or the trainer, with its weights."""
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = Trainer.build_checkpointer(model, cfg.OUTPUT_DIR, allow_pickle=args.allow_pickle, strict=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return fuse(model)
    trainer = Trainer(cfg)
    trainer.checkpointer.allow_pickle = args.allow_pickle
    trainer.resume_or_load(resume=args.resume)
    return trainer


def evaluated(cfg, model):
    try:
        return Trainer.test(cfg, model)
    except BadDataError:  # an image cannot be read, whatever read it
        with bad_input_ends():
            raise


def main(cfg, args):
    setup(cfg, args)
    if args.eval_only:
        results = evaluated(cfg, built(cfg, args))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    return built(cfg, args).train()


if __name__ == "__main__":
    print_any_name()
    parser = default_argument_parser()
    parser.add_argument("--allow-pickle", action="store_true", help="read pickled weights, which can run any code")
    args = parser.parse_args()
    if not args.config_file:
        parser.error("--config-file is needed, for example configs/quick/demo.yaml")
    if args.num_gpus < 0 or args.num_machines < 1 or not 0 <= args.machine_rank < args.num_machines:
        parser.error("--num-gpus must be at least 0, --num-machines at least 1, and --machine-rank below it")
    cfg = checked_config(args)
    launch(main, args, cfg.MODEL.DEVICE, (cfg, args))
