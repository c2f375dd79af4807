"""Training in several processes: the rows and the weights go to `torchrun`, and the weights come back taught.

Each process is given a share of every batch; gradients are averaged, so that the result is that of the whole batch but for
rounding. What is decided (whether to stop) is decided by the first process, for all. It knows no database and no gate.

Run: ``[training] processes = N``; this module is what `torchrun` starts.
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
    """As `teaching.train_with_guard`, in `training.processes` processes of their own. Raises what they raise."""
    from learning.models.trainable import load_state, save

    policies = config.data / "policies"
    policies.mkdir(parents=True, exist_ok=True)
    # What people said is in it: as an unfinished version, a killed run's leftover goes with the next run.
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
    tempfile.tempdir = str(job)  # goes with the job
    config, base_model, training, held_out, prompts = pickle.loads((job / "job").read_bytes())
    model = load_for_training(config, base_model, str(job / "start"))

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
