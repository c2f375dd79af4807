"""Reporter: report and time the steps of a training run."""

import time
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from bot.types import Progress


class Reporter(TrainerCallback):
    """Reports steps, and sums up the seconds spent in them."""

    def __init__(self, stage: str, progress: Progress):
        self.stage, self.progress = stage, progress
        self.seconds = 0.0
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the step's time, and report the step."""
        self.seconds += time.monotonic() - self._began
        self.progress(self.stage, state.global_step, state.max_steps)


def report_progress(trainer: Trainer, stage: str, progress: Progress) -> Reporter:
    """Report the steps of `trainer` to `progress(stage, done, total)` instead of printing them."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    reporter = Reporter(stage, progress)
    trainer.add_callback(reporter)
    return reporter
