"""AccumulatingTrainer: accumulated gradients, and losses that are not finite; on a model of two weights."""

import json
import math

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from runs import Processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gs_d2.engine import AccumulatingTrainer


class Model(nn.Module):
    """Its loss is the mean of the images' numbers, weighed: not finite where a number is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, batch):
        x = torch.stack([image["x"] for image in batch])
        return {"loss_a": (x * self.weight).sum(dim=1).square().mean(), "loss_b": (x * self.weight).sum(dim=1).mean()}


def image(number, name="good.jpg"):
    instances = Instances((4, 6), gt_boxes=Boxes(torch.tensor([[0.0, 1, 2, 3]])), gt_classes=torch.zeros(1).long())
    return {"file_name": name, "height": 4, "x": torch.tensor([number, 0.5]), "instances": instances, "odd": {1, 2}}


BAD = image(math.nan, "bad.jpg")


def trainer_of(batches, output, model=None, **options):
    model = model or Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return AccumulatingTrainer(model, batches, optimizer, output_dir=str(output), seed=0, **options)


def run(trainer, iterations, first=0):
    """Weights after each iteration, and the metrics of the last."""
    weights = []
    with EventStorage(first) as storage:
        for trainer.iter in range(first, first + iterations):
            storage.iter = trainer.iter
            trainer.run_step()
            weights.append(next(trainer.model.parameters()).detach().clone())
    return weights, {name: value for name, (value, _) in storage.latest().items()}


def test_batches_can_be_taken_by_detectron2s_name(tmp_path):
    """Overrides of run_step call next(self._data_loader_iter)."""
    trainer = trainer_of([["first"], ["second"]], tmp_path)
    assert [next(trainer._data_loader_iter), next(trainer._data_loader_iter)] == [["first"], ["second"]]


@pytest.mark.parametrize("steps", [2, 3])
def test_accumulated_batches_are_one_large_batch(tmp_path, steps):
    images = [image(float(i)) for i in range(4 * steps)]
    large = [images[i * steps : (i + 1) * steps] for i in range(4)]
    expected, metrics = run(trainer_of(large, tmp_path), 4)
    found, of_passes = run(trainer_of([[x] for x in images], tmp_path, accumulation_steps=steps), 4)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(expected[0], expected[3])
    for name in ("loss_a", "loss_b", "total_loss"):
        assert of_passes[name] == pytest.approx(metrics[name])
    assert metrics["total_loss"] == pytest.approx(metrics["loss_a"] + metrics["loss_b"])


def test_losses_of_one_element_or_their_sum_alone(tmp_path):
    class Sum(Model):
        def forward(self, batch):
            return sum(super().forward(batch).values())

    class Odd(Model):
        def forward(self, batch):
            losses = {name: loss.reshape(1) for name, loss in super().forward(batch).items()}
            return losses if batch[0]["x"][0] < 1 else dict(reversed(losses.items()))

    images = [[image(0.0)], [image(1.0)]]
    _, metrics = run(trainer_of(images, tmp_path, accumulation_steps=2), 1)
    _, of_sum = run(trainer_of(images, tmp_path, Sum(), accumulation_steps=2), 1)
    _, of_odd = run(trainer_of(images, tmp_path, Odd(), accumulation_steps=2), 1)
    assert of_sum["total_loss"] == pytest.approx(metrics["total_loss"]) and "loss_a" not in of_sum
    assert [of_odd[name] for name in ("loss_a", "loss_b")] == [metrics[name] for name in ("loss_a", "loss_b")]


def test_losses_that_differ_between_passes_are_refused(tmp_path):
    class Other(Model):
        def forward(self, batch):
            losses = super().forward(batch)
            return losses if batch[0]["x"][0] < 1 else {"loss_c": losses["loss_a"]}

    with pytest.raises(ValueError, match="the model's losses differ between the passes"):
        run(trainer_of([[image(0.0)], [image(1.0)]], tmp_path, Other(), accumulation_steps=2), 1)


def test_skipped_steps_are_counted_across_a_resume(tmp_path):
    trainer = trainer_of([[BAD]] * 3, tmp_path, nonfinite_loss="skip")
    run(trainer, 2)
    resumed = trainer_of([[BAD]] * 2, tmp_path, nonfinite_loss="skip")
    resumed.load_state_dict(trainer.state_dict())
    _, metrics = run(resumed, 1, first=2)
    assert metrics["skipped_steps"] == 3


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_leaves_its_batch(tmp_path, number):
    bad = [image(number, "bad.jpg"), image(1.0, "beside.jpg")]
    trainer = trainer_of([[image(1.0)], bad], tmp_path)
    (before,), metrics = run(trainer, 1, first=6)
    assert {"data_time", "rank_data_time", "total_loss"} <= set(metrics)
    with pytest.raises(FloatingPointError) as error:
        run(trainer, 1, first=7)
    path = tmp_path / "nonfinite_7_rank0.pth"
    for part in ("iteration 7", "bad.jpg, beside.jpg", str(path), "SOLVER.GS.NONFINITE_LOSS skip", "loss_a"):
        assert part in str(error.value)
    assert torch.equal(trainer.model.weight, before), "the step was made"
    saved = torch.load(path, weights_only=True)
    assert saved["iteration"] == 7 and saved["file_names"] == ["bad.jpg", "beside.jpg"]
    assert not math.isfinite(saved["losses"]["loss_a"])
    ((first, second),) = saved["batches"]
    torch.testing.assert_close(first["x"], bad[0]["x"], equal_nan=True)
    assert second["instances"]["gt_boxes"].tolist() == [[0, 1, 2, 3]] and second["instances"]["image_size"] == [4, 6]
    assert second["height"] == 4 and second["odd"] == "{1, 2}"


def test_a_batch_that_cannot_be_saved_is_named_all_the_same(tmp_path):
    with pytest.raises(FloatingPointError, match=r"bad\.jpg\n  the batch could not be saved: .*no_such_folder"):
        run(trainer_of([[BAD]], tmp_path / "no_such_folder"), 1)


def test_skipping_is_as_if_the_batch_had_not_been(tmp_path, caplog):
    good = [[image(1.0)], [image(2.0)]]
    expected, _ = run(trainer_of(good, tmp_path), 2)
    batches = [good[0], [BAD], good[1]]
    found, metrics = run(trainer_of(batches, tmp_path, nonfinite_loss="skip"), 3)
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], expected[1])
    assert metrics["skipped_steps"] == 1 and math.isfinite(metrics["total_loss"])
    assert "iteration 1" in caplog.text and "bad.jpg" in caplog.text
    assert not list(tmp_path.iterdir())


def test_skipping_drops_all_passes_of_the_iteration(tmp_path):
    batches = [[image(1.0)], [BAD], [image(1.0)], [image(2.0)]]
    start = Model().weight.detach()
    found, _ = run(trainer_of(batches, tmp_path, nonfinite_loss="skip", accumulation_steps=2), 2)
    assert torch.equal(found[0], start) and not torch.equal(found[1], start)
    with pytest.raises(FloatingPointError, match=r"its images: good\.jpg, bad\.jpg"):
        run(trainer_of(batches, tmp_path, accumulation_steps=2), 1)


def test_skipping_ends_when_training_has_diverged(tmp_path):
    trainer = trainer_of([[BAD]] * 10 + [[image(1.0)]] + [[BAD]] * 30, tmp_path, nonfinite_loss="skip")
    run(trainer, 31)  # 20 in a row are let through, after one that was good
    with pytest.raises(FloatingPointError, match=r"the last of 21 such iterations in a row: training has diverged"):
        run(trainer, 1, first=31)
    assert (tmp_path / "nonfinite_31_rank0.pth").exists()


def test_an_error_in_the_forward_pass_saves_the_batch_too(tmp_path):
    class Diverged(Model):
        def forward(self, batch):
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")

    with pytest.raises(FloatingPointError, match=r"contain Inf/NaN[\s\S]*good\.jpg[\s\S]*nonfinite_0_rank0\.pth"):
        run(trainer_of([[image(1.0)]], tmp_path, model=Diverged()), 1)
    assert torch.load(tmp_path / "nonfinite_0_rank0.pth", weights_only=True)["file_names"] == ["good.jpg"]


def test_a_model_left_in_eval_mode_is_not_trained(tmp_path):
    trainer = trainer_of([[image(1.0)]], tmp_path)
    trainer.model.eval()
    with pytest.raises(RuntimeError, match=r"call model\.train\(\)"):
        run(trainer, 1)


def in_two_processes(output):
    """Rank 1 meets a bad batch in iteration 1; of each rank its weights when skipping, and the error when not."""
    rank = torch.distributed.get_rank()
    batches = [[image(1.0 + rank)], [BAD if rank else image(1.0)], [image(2.0)]]
    skipping = trainer_of(batches, output, DistributedDataParallel(Model()), nonfinite_loss="skip")
    weights, metrics = run(skipping, 3)
    stopping = trainer_of(batches, output, DistributedDataParallel(Model()))
    try:
        run(stopping, 3)
    except FloatingPointError as error:
        return [w.tolist() for w in weights], str(error), stopping.iter, metrics.get("total_loss")


def test_all_processes_decide_alike(tmp_path):
    (weights, error, iteration, loss), (others, same_error, same_iteration, no_loss) = Processes(
        in_two_processes, str(tmp_path), world_size=2
    ).wait()
    assert json.dumps(weights) == json.dumps(others)
    assert weights[1] == weights[0] != weights[2]
    assert error == same_error and iteration == same_iteration == 1
    assert "rank 1" in error and "rank 0" not in error and "bad.jpg" in error and "good.jpg" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["nonfinite_1_rank1.pth"]
    assert math.isfinite(loss) and no_loss is None, "the main process alone writes metrics"
