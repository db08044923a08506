"""One training iteration: its forward and backward passes, and one optimizer step unless a loss is not finite."""

import contextlib
import logging
import math
import time
from collections.abc import Callable

import torch
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch.nn.parallel import DistributedDataParallel

from gs_d2.data.workers import explained
from gs_d2.engine.nonfinite import save_batches
from gs_d2.engine.optimizer import load_optimizer_state
from gs_d2.engine.seeding import STEP, seed_generators
from gs_d2.engine.weight_average import WeightAverage

_MOST_SKIPPED_IN_A_ROW = 20
_logger = logging.getLogger(__name__)


class AccumulatingTrainer(TrainerBase):
    """What `DefaultTrainer` calls its `_trainer`, in place of Detectron2's SimpleTrainer and AMPTrainer.

    Each iteration runs `accumulation_steps` batches forward and backward and averages their gradients. Before each
    pass the random generators are set by (seed, iteration, pass, rank), so that a resumed run gets the random
    numbers of an uninterrupted one. The losses are read once an iteration, in one transfer, and all processes see those
    of all.
    """

    def __init__(
        self,
        model,
        data_loader,
        optimizer,
        *,
        output_dir: str,
        seed: int,
        accumulation_steps: int = 1,
        amp: bool = False,
        nonfinite_loss: str = "stop",
        ema_decay: float = 0.0,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        """
        Args:
            model: returns a dict of losses of one element, or their sum alone; possibly wrapped by
                DistributedDataParallel.
            data_loader: iterable over batches; its `seek(iteration)` is called before the first, if it has one.
            output_dir: where a batch with a non-finite loss is saved.
            seed: >= 0, the same in all processes.
            amp: forward passes in float16 with a scaled loss; needs a GPU.
            nonfinite_loss: "stop", or "skip" to leave such an iteration's step out, in all processes.
            ema_decay: in [0, 1), of the average of the weights (:class:`WeightAverage`); 0 keeps none.
            should_stop: asked in every iteration; where any process's says yes, `stop_agreed` is True in all.
        """
        super().__init__()
        model.train()
        self.model, self.data_loader, self.optimizer = model, data_loader, optimizer
        self.seed, self.accumulation_steps, self.amp = seed, accumulation_steps, amp
        self.output_dir, self.nonfinite_loss = output_dir, nonfinite_loss
        self.grad_scaler = torch.amp.GradScaler("cuda", enabled=amp)
        self.weight_average = WeightAverage(_unwrapped(model), ema_decay) if ema_decay > 0 else None
        self.should_stop, self.stop_agreed = should_stop, False
        self._batches = None
        self._skipped = self._skipped_in_a_row = 0

    def run_step(self):
        """
        Raises:
            FloatingPointError: a loss is infinite or NaN, in every process; it names the images and the file that
                holds the batch. With "skip" only after 20 such iterations in a row.
            RuntimeError: a loader worker has died, or cannot hand over what it loaded; says what to do.
        """
        with explained():
            self._run_step()

    def _run_step(self):
        if not self.model.training:
            raise RuntimeError("the model was put into eval mode during training; call model.train() after evaluating")
        self.optimizer.zero_grad()
        batches, losses, data_time = [], [], 0.0
        for index in range(self.accumulation_steps):
            start = time.perf_counter()
            batches.append(next(self._data_loader_iter))
            data_time += time.perf_counter() - start
            # After loading, which without workers seeds this process's generators for each image.
            seed_generators(self.seed, STEP, self.iter, index, comm.get_rank())
            with self._synchronized(index + 1 == self.accumulation_steps):
                losses.append(self._forward_backward(batches))
        everyone = comm.all_gather((_mean_losses(losses), data_time, self.should_stop()))
        of_ranks = [means for means, _, _ in everyone]
        self.stop_agreed = any(stop for _, _, stop in everyone)
        if not all(math.isfinite(value) for means in of_ranks for value in means.values()):
            self._handle_nonfinite(batches, of_ranks)
            return
        self._skipped_in_a_row = 0
        _write_metrics(of_ranks, max(seconds for _, seconds, _ in everyone), data_time)
        self._step()

    def _step(self):
        scale = self.grad_scaler.get_scale() if self.weight_average is not None else None
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        # A scaler that lowers its scale has found infinite gradients and left the step out.
        if self.weight_average is not None and self.grad_scaler.get_scale() >= scale:
            self.weight_average.update()

    @property
    def _data_loader_iter(self):
        """Detectron2's name, which overrides of its `run_step` use."""
        if self._batches is None:
            if hasattr(self.data_loader, "seek"):
                self.data_loader.seek(self.iter)
            self._batches = iter(self.data_loader)
        return self._batches

    def _synchronized(self, yes: bool):
        """Gradients travel between processes with the last backward pass of an iteration only."""
        if yes or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _forward_backward(self, batches) -> dict:
        """One pass over the last batch; its losses, detached."""
        try:
            with torch.autocast("cuda", torch.float16) if self.amp else contextlib.nullcontext():
                losses = self.model(batches[-1])
        except FloatingPointError as error:  # Detectron2's own RPN looks at its boxes; other processes cannot know
            raise FloatingPointError(f"{error}\n{self._save(batches, {})}") from error
        if isinstance(losses, torch.Tensor):
            losses = {"total_loss": losses}
        total = sum(losses.values()) / self.accumulation_steps
        self.grad_scaler.scale(total).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _handle_nonfinite(self, batches, of_ranks: list[dict]):
        """Skips or stops; every process has the same `of_ranks` and so decides alike."""
        self._skipped += 1
        self._skipped_in_a_row += 1
        stop = self.nonfinite_loss == "stop" or self._skipped_in_a_row > _MOST_SKIPPED_IN_A_ROW
        own = of_ranks[comm.get_rank()]
        report = None
        if not all(math.isfinite(value) for value in own.values()):
            report = f"  rank {comm.get_rank()}: {own}\n"
            report += self._save(batches, own) if stop else f"  its images: {_file_names(batches)}"
        reports = "\n".join(text for text in comm.all_gather(report) if text)
        message = f"The loss became infinite or NaN in iteration {self.iter}:\n{reports}"
        if not stop:
            _logger.warning(f"{message}\nThis iteration's step is left out (SOLVER.GS.NONFINITE_LOSS skip).")
            if comm.is_main_process():
                get_event_storage().put_scalar("skipped_steps", self._skipped, smoothing_hint=False)
            return
        if self.nonfinite_loss == "skip":
            message += f"\nIt is the last of {self._skipped_in_a_row} such iterations in a row: training has diverged."
        else:
            message += (
                "\nA lower SOLVER.BASE_LR or gradient clipping may help. SOLVER.GS.NONFINITE_LOSS skip leaves out such "
                "steps."
            )
        raise FloatingPointError(message)

    def _save(self, batches, losses: dict) -> str:
        """Saves what this iteration has loaded, and says where."""
        path = f"{self.output_dir}/nonfinite_{self.iter}_rank{comm.get_rank()}.pth"
        names = f"  its images: {_file_names(batches)}\n"
        try:
            save_batches(path, batches, iteration=self.iter, losses=losses)
        except (OSError, RuntimeError) as error:
            return f"{names}  the batch could not be saved: {error}"
        return f"{names}  saved in {path}; read it with torch.load(path, weights_only=True)"

    def state_dict(self):
        state = {
            **super().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped": [self._skipped, self._skipped_in_a_row],
        }
        if self.amp:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        if self.weight_average is not None:
            state["weight_average"] = self.weight_average.state_dict()
        return state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        load_optimizer_state(self.optimizer, state_dict["optimizer"])
        self._skipped, self._skipped_in_a_row = state_dict.get("skipped", (0, 0))
        if self.amp and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self._load_weight_average(state_dict.get("weight_average"))

    def _load_weight_average(self, state: dict | None):
        if state is None:
            if self.weight_average is not None:
                _logger.info("The checkpoint has no average of the weights: it begins with the weights as they are now")
            return
        average = self.weight_average
        if average is None:
            _logger.warning(
                "The checkpoint has an average of the weights, and SOLVER.GS.EMA_DECAY is 0: training continues "
                "without it, from the weights that were averaged"
            )
            average = WeightAverage(_unwrapped(self.model), 0.0)
        average.load_state_dict(state)


def _unwrapped(model):
    return model.module if isinstance(model, DistributedDataParallel) else model


def _mean_losses(passes: list[dict]) -> dict:
    """Each loss, averaged over the passes, as a float. The training loop's only wait for the GPU in an iteration."""
    names = list(passes[0])
    if any(losses.keys() != passes[0].keys() for losses in passes):
        raise ValueError(f"the model's losses differ between the passes: {[sorted(losses) for losses in passes]}")
    values = torch.stack([torch.stack([losses[name].float().reshape(()) for name in names]) for losses in passes])
    return dict(zip(names, values.mean(dim=0).tolist(), strict=True))


def _write_metrics(of_ranks: list[dict], data_time: float, own_data_time: float):
    storage = get_event_storage()
    storage.put_scalar("rank_data_time", own_data_time)  # as Detectron2 main does: to see which process is slow
    if not comm.is_main_process():
        return
    means = {name: sum(losses[name] for losses in of_ranks) / len(of_ranks) for name in of_ranks[0]}
    storage.put_scalar("data_time", data_time)  # the slowest process's, for which the others wait
    storage.put_scalar("total_loss", sum(means.values()))
    if len(means) > 1:
        storage.put_scalars(**means)


def _file_names(batches) -> str:
    return ", ".join(str(image.get("file_name", "?")) for batch in batches for image in batch)
