"""Training in several processes: pass the rows and the weights to `torchrun`, and read the trained weights back.

Each process gets a share of every batch. Gradients are averaged, so that the result is that of the whole batch up to
rounding. The first process decides for all whether to stop.

Run: ``[training] processes = N``; `torchrun` runs this module.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bot.config import Config
from bot.errors import KibitzError, NothingToLearn, TrainingError
from bot.models.tokenizer import ChatTokenizer
from bot.serving.children import end_with_parent
from bot.types import Progress
from learning.data.experience import Experience
from learning.judging.metrics import TrainingMetrics
from learning.models.ranks import is_first_process


def train_in_processes(
    config: Config,
    model: Any,
    base_model: str,
    training: Sequence[Experience],
    held_out: Sequence[Experience],
    prompts: Sequence[Sequence[int]],
    progress: Progress,
) -> TrainingMetrics:
    """Train as `teaching.train_with_guard` does, in `training.processes` processes. Raises their KibitzErrors."""
    from learning.models.trainable import load_state, save

    policies = config.data / "policies"
    policies.mkdir(parents=True, exist_ok=True)
    # The job holds what people said. As an "unfinished version", what a killed run leaves is removed by the next run.
    with tempfile.TemporaryDirectory(dir=policies, suffix=".unfinished") as place:
        job = Path(place)
        save(model, job / "start")
        (job / "job").write_bytes(pickle.dumps((config.without_secrets(), base_model, training, held_out, prompts)))
        _run_processes(job, config.training.processes, progress)
        told = json.loads((job / "result.json").read_text())
        if "error" in told:
            raise (NothingToLearn if told["is_nothing"] else TrainingError)(told["error"])
        load_state(model, job / "taught")
    return TrainingMetrics.from_json(told)


def _run_processes(job: Path, processes: int, progress: Progress) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with (
        (job / "errors").open("w+") as errors,
        subprocess.Popen(
            [*launcher, "-m", "learning.training.processes", str(job)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=end_with_parent,
        ) as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                if line.startswith("{"):
                    told = json.loads(line)
                    progress(told["stage"], told["done"], told["total"])
        except BaseException:
            child.terminate()
            raise
        if child.wait() != 0:
            errors.seek(0)
            said = [line.strip() for line in errors if "Error" in line]
            why = said[-1] if said else f"code {child.returncode}"
            raise TrainingError(f"training in {processes} processes failed ({why}); lower training.batch_size or processes")


def _run_worker(job: Path) -> None:
    import torch

    from learning.models.trainable import load_for_training, save, silence_libraries
    from learning.training.teaching import train_with_guard

    silence_libraries()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    tempfile.tempdir = str(job)  # temporary files are deleted with the job
    config, base_model, training, held_out, prompts = pickle.loads((job / "job").read_bytes())
    model = load_for_training(config.policy, config.serving, config.training, base_model, str(job / "start"))

    def report(stage: str, done: int, total: int) -> None:
        if is_first_process():
            sys.stdout.write(json.dumps({"stage": stage, "done": done, "total": total}) + "\n")
            sys.stdout.flush()

    try:
        tokenizer = ChatTokenizer(base_model, config.policy.template_args)
        told = train_with_guard(config, model, tokenizer, training, held_out, prompts, report).as_json()
    except KibitzError as error:
        told = {"error": str(error), "is_nothing": isinstance(error, NothingToLearn)}
    if is_first_process():
        save(model, job / "taught")
        (job / "result.json").write_text(json.dumps(told))


if __name__ == "__main__":
    _run_worker(Path(sys.argv[1]))
