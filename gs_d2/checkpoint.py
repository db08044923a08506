"""Checkpoints: read without running what is in them, written whole, and resumed from the last that is."""

import logging
import os
import re
import zipfile

import numpy as np
import torch

from gs_d2 import compat  # noqa: F401  isort: skip

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from gs_d2.formats.whole_file import write_whole
from gs_d2.weights import read_weights

_logger = logging.getLogger(__name__)

_MAX_NAMED = 5  # keys of a list that a message spells out
_REBUILT_KEYS = ("pixel_mean", "pixel_std")  # set from the config; old files hold them, too
_REBUILT_PART = "anchor_generator.cell_anchors"
# Detectron2's own server. A name of other characters could climb out of it, and out of the local cache.
_CATALOG = re.compile(r"(detectron2|catalog)://[\w./-]+")
_HEURISTICS = "?matching_heuristics=True"  # of Detectron2: match the names of the weights by their ends
_PICKLES = (".pkl", ".pyth")


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer for files that nobody vouches for and machines that stop at any moment.

    Reading. A `.pth` may hold tensors and plain values (``torch.load(weights_only=True)``), a `.safetensors` only
    tensors. Pickles (`.pkl`, `.pyth`, a `.pth` that holds objects) can run any code and are refused, but for those that
    `detectron2://` or `catalog://` names, which come from Detectron2's own server.

    Writing. A file appears whole or not at all, and `last_checkpoint` names it only then. Values that
    ``weights_only`` could not read back are refused: they would be noticed only when somebody resumes.

    Args:
        model: the weights go into it.
        save_dir: a local folder; "" writes nothing.
        allow_pickle: read pickles, too.
        strict: the weights that :meth:`load` reads must be all of the model's, and no others; so that nothing is
            evaluated with random layers. False, for training from a backbone: at least one must fit, and those that do
            not are logged. A checkpoint that training is resumed from must fit in any case.
        save_to_disk: None is "in the main process only".
        weights: gives the state dict that is saved as the model's; None is `model.state_dict`.
        checkpointables: what is saved and resumed besides the model, by name.
    """

    def __init__(
        self,
        model,
        save_dir="",
        *,
        allow_pickle=False,
        strict=False,
        save_to_disk=None,
        weights=None,
        **checkpointables,
    ):
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.allow_pickle = allow_pickle
        self.strict = strict
        self._weights = weights or self.model.state_dict
        self._resumed_from = ""
        self._source, self._must_fit = "", strict  # of the load that is going on

    # Reading

    def load(self, path, checkpointables=None):
        """Loads weights, and of the checkpointables those named (None: all that the file has).

        Args:
            path: a file, a `detectron2://` name, or "" for nothing.

        Returns:
            dict: what the file holds besides.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is a pickle, damaged, cannot be downloaded, holds no model or one that does not fit, or is ""
                though `strict`.
        """
        self._source = path = os.fspath(path or "")
        if not path and self.strict:
            raise ValueError("no weights: MODEL.WEIGHTS is empty and there is no checkpoint to resume from")
        path = path.removesuffix(_HEURISTICS)
        if "://" in path and ".." in path:  # downloads go to a folder of the cache that is named after the address
            raise ValueError(f"{path}: an address of weights must not have '..'")
        if path:
            fetch_weights(path, self.path_manager)
        self._must_fit = self.strict or checkpointables is None
        try:
            return super().load(path, checkpointables)
        finally:
            if hasattr(self, "_parsed_url_during_load"):  # else Detectron2 refuses to load again after an error
                self._parsed_url_during_load = None

    def _load_file(self, filename):
        if filename.endswith(_PICKLES):
            if not self._may_unpickle():
                raise ValueError(
                    f"{filename} is a pickle, which can run any code: pass allow_pickle=True (train_net.py: "
                    "--allow-pickle) if you trust where it is from"
                )
            return super()._load_file(filename)
        loaded = read_weights(filename, allow_pickle=self._may_unpickle())
        if self._source.endswith(_HEURISTICS):
            loaded["matching_heuristics"] = True
        return loaded

    def _may_unpickle(self) -> bool:
        return self.allow_pickle or _CATALOG.fullmatch(self._source.removesuffix(_HEURISTICS)) is not None

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        missing, unexpected, shapes = incompatible
        of_other_shape = {key for key, _, _ in shapes}
        missing = [key for key in missing if key not in of_other_shape and key not in _REBUILT_KEYS]
        unexpected = [key for key in unexpected if key not in _REBUILT_KEYS and _REBUILT_PART not in key]
        own = self.model.state_dict().keys() - set(_REBUILT_KEYS)
        nothing_fits = bool(own) and own <= {*missing, *of_other_shape}
        if self._must_fit or nothing_fits:
            shapes = [f"{key} {tuple(theirs)} (the model's is {tuple(ours)})" for key, theirs, ours in shapes]
            problems = [
                f"{len(keys)} {what}: {', '.join(keys[:_MAX_NAMED])}{', ...' if len(keys) > _MAX_NAMED else ''}"
                for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
                if keys
            ]
            if problems:
                whose = ", nor any part of it" * nothing_fits
                others = {key for key in own if not key.startswith("backbone.")}
                if others and others != own and others == set(missing):
                    whose = ": it has the weights of a backbone alone, which training begins with"
                raise ValueError(f"{self._source} does not fit the config's model{whose}. Keys {'; '.join(problems)}")
        return incompatible

    # Resuming

    def resume_or_load(self, path, *, resume=True):
        """Resumes from :meth:`get_checkpoint_file`, all processes from the main one's; if there is none, or not
        `resume`, loads only the weights of `path`."""
        found, error = "", None
        if resume and comm.is_main_process():
            try:
                found = self.get_checkpoint_file()
            except Exception as problem:  # the other processes wait for an answer, whatever it is
                error = str(problem) or repr(problem)
        found, error = comm.all_gather((found, error))[0]
        if error is not None:
            raise ValueError(error)
        self._resumed_from = found
        return self.load(found) if found else self.load(path, checkpointables=[])

    def has_checkpoint(self) -> bool:
        """Whether the last :meth:`resume_or_load` resumed, or would."""
        return bool(self._resumed_from or self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The checkpoint to resume from: the one that `last_checkpoint` names, and where that is not whole, the one of
        most images seen that is, with a warning. "" if there is neither a `last_checkpoint` nor a checkpoint.

        Raises:
            ValueError: `last_checkpoint` is there but no checkpoint can be read.
        """
        tag = os.path.join(self.save_dir, "last_checkpoint")
        name, problem = None, f"there is no {tag}"
        if os.path.isfile(tag):
            with open(tag, encoding="utf-8", errors="replace") as file:
                name = file.read(4096).strip()
            if name and "\0" not in name and name == os.path.basename(name) and name not in (".", ".."):
                path = os.path.join(self.save_dir, name)
                problem = self._why_not(path)
                if problem is None:
                    return path
            else:
                problem = f"{tag} holds no name of a file of this folder: {name[:80]!r}"
        best, furthest = "", (-2, -2)
        for path in self.get_all_checkpoint_files() if os.path.isdir(self.save_dir) else []:
            if os.path.basename(path) != name and self._why_not(path) is None:
                progress = _progress(path, self.allow_pickle)
                if progress > furthest:
                    best, furthest = path, progress
        if best:
            _logger.warning(f"{problem}. Resuming from {best}, the last checkpoint that is whole")
        elif name is not None:
            raise ValueError(
                f"cannot resume: {problem}, and there is no other checkpoint in {self.save_dir} that is whole; "
                "remove last_checkpoint there to start over"
            )
        return best

    def _why_not(self, path) -> str | None:
        """What keeps a file from being resumed from; None if nothing does."""
        try:
            loaded = read_weights(path, allow_pickle=self.allow_pickle, mmap=True)
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    if damaged := archive.testzip():
                        return f"{path} is damaged at {damaged}"
        except (FileNotFoundError, ValueError, zipfile.BadZipFile) as error:
            return str(error)
        absent = [key for key in self.checkpointables if key not in loaded]
        return f"{path} is no checkpoint of a training: it has no {', '.join(absent)}" if absent else None

    # Writing

    def save(self, name, **kwargs):
        """Writes `<save_dir>/<name>.pth`, then `last_checkpoint`.

        Args:
            kwargs: more to save: tensors, numbers, text, None, and lists, tuples and dicts of them.

        Raises:
            OSError: it cannot be written, say for want of space; what was there is kept.
            ValueError: something is of another type.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        others = {key: value.state_dict() for key, value in self.checkpointables.items()} | kwargs
        self._write(name, others)
        self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name, **kwargs):
        """Writes `<save_dir>/<name>.pth` with the weights and `kwargs` alone: nothing resumes from it."""
        if self.save_dir and self.save_to_disk:
            self._write(name, kwargs)

    def _write(self, name, others: dict):
        data = {"model": self._weights()} | {key: _plain(value, key) for key, value in others.items()}
        file_name = f"{name}.pth"
        if file_name != os.path.basename(file_name):
            raise ValueError(f"the name of a checkpoint must not have folders, got {name!r}")
        path = os.path.join(self.save_dir, file_name)
        _logger.info(f"Saving checkpoint to {path}")
        write_whole(path, lambda file: torch.save(data, file))

    def tag_last_checkpoint(self, last_filename_basename):
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_whole(path, lambda file: file.write(last_filename_basename.encode()))


def fetch_weights(path: str, path_manager=PathManager) -> None:
    """Downloads what an address (`detectron2://`, `https://`) names, unless the cache has it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be downloaded; in one line, with what to do on a machine without a network.
    """
    path = path.removesuffix(_HEURISTICS)
    if "://" not in path:
        if not os.path.isfile(path):
            what = "is a folder" if os.path.isdir(path) else "is not there"
            raise FileNotFoundError(
                f"MODEL.WEIGHTS: no such weights: {path} {what}; name a file of weights, or '' for none"
            )
        return
    try:
        path_manager.get_local_path(path)
    except Exception as error:  # of the network, the disk or the server; iopath raises nearly anything
        reason = (str(error).splitlines() or [""])[0] or repr(error)
        raise ValueError(
            f"MODEL.WEIGHTS {path} cannot be downloaded ({reason}). On a machine without a network make a file with "
            "tools/convert_torchvision.py, from torchvision's weights of a ResNet, and set MODEL.WEIGHTS to it"
        ) from error


def _progress(path, allow_pickle) -> tuple[int, int]:
    """(images seen, iteration) of a checkpoint, -1 where it does not say: iterations of another number of processes
    are of other batches."""
    checkpoint = read_weights(path, allow_pickle=allow_pickle, mmap=True)
    trainer = checkpoint.get("trainer")
    run = trainer.get("run") if isinstance(trainer, dict) else None
    images = run.get("images_seen", -1) if isinstance(run, dict) else -1
    iteration = checkpoint.get("iteration", -1)
    return tuple(x if isinstance(x, int) else -1 for x in (images, iteration))


def _plain(value, where):
    """The same of types that weights_only reads: NumPy's numbers as Python's, its arrays as tensors."""
    if isinstance(value, np.generic):  # before float, which np.float64 is
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.Tensor)):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.ascontiguousarray(value)).clone()
    if isinstance(value, dict):
        return {_plain(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise ValueError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: its state_dict() must be of tensors, "
        "numbers, text and lists and dicts of them"
    )
