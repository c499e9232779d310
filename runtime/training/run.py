"""One training run: where it is, what it has seen, and how it goes on from a checkpoint."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import NoReturn

import torch
from torch import Tensor

from ...ir.errors import TrainingError
from ..data import Batch, Loader, images_in
from .callbacks import Callback
from .checkpoint import Checkpoints
from .ema import snapshot
from .feed import make_feed
from .learner import Learner, NotFinite
from .log import Log
from .progress import TrainBar
from .results import EpochResult
from .seeds import seed_of
from .share import agree, agree_on_buffers, evaluate_shared, mean

_PLAIN = ("epoch", "batch", "step", "kept", "scores", "stopped", "sums", "window", "batches_per_epoch", "good")


class Run:
    """The state of one call of `train`.

    Args:
        learner: the student and all that changes it.
        loader: what to learn from.
        val: what each epoch is judged by; None keeps the last.
        seed: of the whole run.
        callbacks: told of epochs and steps.
        store: where checkpoints are kept, if they are.
    """

    def __init__(
        self,
        learner: Learner,
        loader: Loader,
        val: Loader | None,
        seed: int,
        callbacks: Sequence[Callback],
        store: Checkpoints | None,
    ) -> None:
        self.learner, self.val, self.seed, self.callbacks, self.store = learner, val, seed, callbacks, store
        self.settings, self.student, self.accelerator = learner.settings, learner.student, learner.accelerator
        self.rank = self.accelerator.process_index
        self.feed = make_feed(loader, seed, self.rank, self.accelerator.num_processes)
        self.batches_per_epoch = self.feed.length
        self.log: Log | None = None
        self.epoch, self.batch, self.step, self.kept = 0, 0, 0, -1
        self.results: list[EpochResult] = []
        self.scores: list[float] = []
        self.stopped = False
        # sums of the epoch: loss, right, predictions; since the last row of the log: the same, batches and images
        self.sums, self.window = torch.zeros(3, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
        self.good = snapshot(self.student)
        self.best: dict[str, Tensor] | None = None
        self.seconds, self._began, self._row_began = 0.0, time.perf_counter(), time.perf_counter()

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimiser steps, None while the length of the loader is not known."""
        return None if self.batches_per_epoch is None else -(-self.batches_per_epoch // self.settings.accumulate)

    @property
    def elapsed(self) -> float:
        """Seconds, those before an interruption included."""
        return self.seconds + time.perf_counter() - self._began

    def all_epochs(self, bar: TrainBar) -> None:
        """Run what is left of every epoch, and leave the student in the state to keep."""
        while self.epoch < self.settings.epochs and not (self.batch == 0 and self._wants_to_stop()):
            self._one_epoch(bar)
            self._finish_epoch()
        if self.best is not None and (self.kept < len(self.results) - 1 or self.learner.ema is not None):
            self.student.load_state_dict(self.best)

    def _one_epoch(self, bar: TrainBar) -> None:
        """Learn from the batches of one epoch, from `self.batch` on."""
        self.learner.model.train()
        batches = self.feed.epoch(self.epoch, self.batch)  # seeds the random states for this epoch
        if self.batch == 0:
            for callback in self.callbacks:
                callback.before_epoch(self.epoch)
        for group in _in_groups(batches, self.settings.accumulate):
            sums = self._learn(group)
            images = sum(images_in(inputs) for inputs, _ in group)
            self.batch, self.step, self.sums = self.batch + len(group), self.step + 1, self.sums + sums
            bar.step(self.epoch, images, float(self.sums[0]) / self.batch, float(self.sums[1] / self.sums[2]))
            self._log_step(sums, len(group), images)
            every = self.settings.checkpoint_every
            if every is not None and self.step % every == 0:
                self._checkpoint()
        if self.batches_per_epoch != self.batch:
            self.batches_per_epoch = self.batch
            bar.know_steps(self.steps_per_epoch or 0)

    def _learn(self, group: list[Batch]) -> Tensor:
        """One step of the optimiser; what `Learner.step` gives."""
        numbers = range(self.batch, self.batch + len(group))
        seeds = [seed_of(self.seed, "model", self.epoch, number, self.rank) for number in numbers]
        # the middle of this step; without a known length, an epoch is one flat stair of the schedule
        done = self.batch // self.settings.accumulate
        inside = (done + 0.5) / self.steps_per_epoch if self.steps_per_epoch else 0.5
        middle = self.epoch + min(inside, 1.0)
        try:
            sums = self.learner.step(group, seeds, [f"batch {number} of train" for number in numbers], middle)
        except NotFinite as error:
            self._give_up(f"the loss is {error.value} at", self.step + 1)
        for callback in self.callbacks:
            callback.after_step(self.learner.lr, middle)
        return sums

    def _finish_epoch(self) -> None:
        """Evaluate, choose what to keep, tell the callbacks, and write it all down."""
        accelerator, ema = self.accelerator, self.learner.ema
        agree_on_buffers(accelerator, self.student, ema)
        self._check_weights()
        self.learner.cache.share(accelerator)
        sums = mean(accelerator, self.sums.to(accelerator.device))
        with nullcontext() if ema is None else ema.applied():
            found = None if self.val is None else evaluate_shared(accelerator, self.student, self.val)
            self.good = snapshot(self.student)
        val = (None, None) if found is None else (found.loss, found.accuracy)
        result = EpochResult(float(sums[0]) / self.batch, float(sums[1] / sums[2]), *val)
        self.results.append(result)
        self.scores.append(float(self.epoch) if found is None else found.accuracy)
        if self.scores[-1] >= max(self.scores):
            self.best, self.kept = self.good, self.epoch
        wishes = [
            callback.after_epoch(result) for callback in self.callbacks
        ]  # each hears of it, whichever ends the run
        self.stopped = True in wishes
        if self.log is not None:
            self.log.epoch({"step": self.step, "epoch": self.epoch + 1, **asdict(result), "seconds": self.elapsed})
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, torch.zeros_like(self.sums)
        self._checkpoint()

    def _wants_to_stop(self) -> bool:
        """Whether a callback or a lack of patience ends the run here; all processes agree."""
        patience = self.settings.patience
        tired = False
        if patience is not None and self.scores:
            tired = len(self.scores) - 1 - self.scores.index(max(self.scores)) >= patience
        return agree(self.accelerator, self.stopped or tired)

    def _log_step(self, sums: Tensor, batches: int, images: int) -> None:
        self.window += torch.cat([sums, torch.tensor([batches, images], dtype=torch.float64)])
        if self.log is None or self.step % self.settings.log_every:
            return
        loss, right, predictions, count, seen = self.window.tolist()
        now = time.perf_counter()
        rate = seen * self.accelerator.num_processes / max(now - self._row_began, 1e-9)
        epoch = self.epoch + self.batch / self.batches_per_epoch if self.batches_per_epoch else float(self.epoch)
        row = {"step": self.step, "epoch": epoch, "lr": self.learner.lr, "loss": loss / count}
        self.log.step({**row, "accuracy": right / predictions, "images_per_second": rate})
        self.window, self._row_began = torch.zeros_like(self.window), now

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one."""
        state = None if self.store is None else self.store.load()
        self.accelerator.wait_for_everyone()  # nobody writes before all have read
        if self.store is None or state is None:
            return
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.best = self.good if state["best"] is None else state["best"]
        self.results = [EpochResult(**result) for result in state["results"]]
        self.seconds, self._began = state["seconds"], time.perf_counter()
        self.learner.load_state_dict(state["learner"])
        self.learner.cache.load_state_dict(self.store.load_cache(state["cached"]), state["cached"])
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(saved)
        self.feed.load_state_dict(state["feed"], within=self.batch > 0)

    def _checkpoint(self) -> None:
        """Write down everything that the rest of the run depends on."""
        if self.store is None:
            return
        cache = self.learner.cache
        cache.share(self.accelerator)
        self._check_weights()
        if not self.accelerator.is_main_process:
            return
        if self.log is not None:
            self.log.flush()
        self.store.save_cache(len(cache.keys), cache.state_dict)
        state = {name: getattr(self, name) for name in _PLAIN}
        state |= {
            "best": None if self.best is self.good else self.best,
            "results": [asdict(result) for result in self.results],
            "seconds": self.elapsed,
            "learner": self.learner.state_dict(),
            "cached": len(cache.keys),
            "callbacks": [callback.state_dict() for callback in self.callbacks],
            "feed": self.feed.state_dict(),
        }
        self.store.save(self.step, state)

    def _check_weights(self) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.student.parameters()):
            self._give_up("a weight is NaN or infinite behind", self.step)

    def _give_up(self, what: str, step: int) -> NoReturn:
        """Put the student back to the end of the last good epoch, and say what happened."""
        self.student.load_state_dict(self.good)
        done = len(self.results)
        kept = f"after epoch {done}" if done else "before training"
        last = None if self.store is None else self.store.last()
        file = "" if last is None else f"; the last good checkpoint is {last}"
        raise TrainingError(
            f"{what} step {step} (epoch {self.epoch + 1}, learning rate {self.learner.lr:.3g}); "
            f"the network was put back to its state {kept}{file}",
            hint="Lower lr, set clip_norm (for example 1.0), or lengthen warmup.",
        )


def _in_groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of so many batches; the last may be shorter."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group
