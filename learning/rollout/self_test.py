"""SelfTest: the checks of `kibitz doctor` that use a model: its files, one token from the real vLLM, one training step, and
whether that vLLM serves the result of the step.

The step runs in a child process beside vLLM, as a training run does, so that a step that fits in memory here fits in a run
too. Nothing is stored.

Run: ``kibitz doctor``, which runs this module in the child process.
"""

import asyncio
import contextlib
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from bot.checks import Check, Skipped
from bot.config import Config, load
from bot.data_directory import is_locked
from bot.errors import KibitzError, ServingError, TrainingError, quote_error
from bot.models.check import check_architecture, check_context, check_disk, check_memory, check_tokenizer, check_weights
from bot.models.dtype import choose_dtype
from bot.models.shape import read_shape
from bot.models.tokenizer import ChatTokenizer
from bot.serving.children import end_with_parent
from bot.serving.policy import Policy
from bot.serving.vllm_server import VllmServer
from bot.types import new_id
from bot.wording import count_noun

if TYPE_CHECKING:
    from learning.data.experience import Experience

QUESTION = [{"role": "user", "content": "hello"}]
STEP_SECONDS = 1800
LENGTH_ON_CPUS = 64  # tokens of a row without a GPU, where rows of the full length take minutes


class SelfTest:
    """The checks of one config's model. Leaving it as a context manager stops the vLLM that a check started."""

    def __init__(self, config: Config, find_model: Callable[[], tuple[Config, str]]):
        self.config = config
        self._find = find_model
        self._model = ""
        self._runner = asyncio.Runner()
        self._server: VllmServer | None = None
        self._url = ""
        self._scratch = contextlib.ExitStack()
        self._version: Path | None = None  # the version that the step made

    def __enter__(self) -> "SelfTest":
        self._runner.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._scratch:
            try:
                if self._server is not None:
                    self._runner.run(self._server.stop())
            finally:
                self._runner.__exit__(kind, error, trace)

    def list_quick_checks(self) -> list[Check]:
        """List the checks of the model that do not run it."""
        return [
            ("model", self.check_files),
            ("chat template", self.check_template),
            ("room for the model", self.check_room),
        ]

    def list_checks(self) -> list[Check]:
        """List all checks of the model."""
        return [
            *self.list_quick_checks(),
            ("one token", self.check_answer),
            ("one training step", self.check_step),
            ("one version", self.check_version),
        ]

    @property
    def model(self) -> str:
        """The model's path or hub name. Raises Skipped if `check_files` found none."""
        if not self._model:
            raise Skipped("there is no model to check")
        return self._model

    def check_files(self) -> str:
        """Check that the model exists, its weights are complete, and its architecture can be served and trained."""
        self.config, model = self._find()
        shape = read_shape(model)
        check_architecture(self.config.policy, self.config.serving, model)
        check_weights(self.config.policy, model)
        self._model = model
        dtype = choose_dtype(self.config.serving, model)
        return f"{self.config.policy.model}: {shape.family}, {shape.size_label} parameters, as {dtype}"

    def check_template(self) -> str:
        """Check the tokenizer and its chat template."""
        shape = read_shape(self.model)
        tokenizer = check_tokenizer(self.config.policy, self.model, shape)
        check_context(tokenizer.with_thought_tokens(self.config.policy), shape)
        return f"a greeting is {count_noun(len(tokenizer.prompt_ids(QUESTION)), 'token')}"

    def check_room(self) -> str:
        """Check that memory and disk suffice to serve and train the model."""
        shape = read_shape(self.model)
        check_disk(self.config.policy, self.config.training, self.config.data, shape)
        if is_locked(self.config.data, "serve"):
            raise Skipped("a kibitz runs on this data directory and uses the memory")
        plan = check_memory(self.config, self.model, shape)
        if plan is None:
            return "enough to serve it and to train it"
        serving = self.config.serving.model_copy(update={"memory_share": plan.share})
        self.config = self.config.model_copy(update={"serving": serving})
        return plan.description

    def check_answer(self) -> str:
        """Ask the real vLLM for one token and its log-probability."""
        if is_locked(self.config.data, "serve") and not self.config.serving.url:
            raise Skipped("a kibitz runs on this data directory with its own vLLM")
        return self._runner.run(self._ask_one_token(self.model))

    async def _ask_one_token(self, model: str) -> str:
        began = time.monotonic()
        config = self.config
        policy_config = config.policy.model_copy(update={"max_tokens": 1})
        url, waited = config.serving.url, ""
        if not url:
            self._server = VllmServer(config.serving, config.policy, config.training, config.data, model)
            url = self._server.url
        self._url = ""
        policy = Policy(url, policy_config, config.serving.reply_seconds, config.serving.read_key())
        try:
            if self._server is not None:
                await self._server.start(policy)
                waited = f"; vLLM was ready after {time.monotonic() - began:.0f} s"
            await policy.admin.connect()
            reply = await policy.reply(ChatTokenizer(model, config.policy.template_args).prompt_ids(QUESTION))
        finally:
            await policy.close()
        if len(reply.logprobs) != len(reply.completion_ids) or not all(map(math.isfinite, reply.logprobs)):
            raise ServingError(
                f"vLLM at {url} returned {count_noun(len(reply.completion_ids), 'token')} with "
                f"{count_noun(len(reply.logprobs), 'log-probability', 'log-probabilities')}; "
                "start it with --logprobs-mode processed_logprobs, or let kibitz start its own"
            )
        self._url = url
        return f"{reply.text!r} in {reply.latency_ms:.0f} ms, log-probability {sum(reply.logprobs):.2f}{waited}"

    def check_step(self) -> str:
        """Take one real training step in a child process."""
        model = self.model
        if is_locked(self.config.data, "train"):
            raise Skipped("a training run is in progress")
        # Below the data directory, because vLLM can read versions there.
        place = Path(self._scratch.enter_context(tempfile.TemporaryDirectory(dir=self.config.data, prefix="doctor-")))
        self.config.save(place / "config.json")
        version = place / "version"
        command = [sys.executable, "-m", "learning.rollout.self_test", str(place / "config.json"), model, str(version)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=STEP_SECONDS, check=False, preexec_fn=end_with_parent
            )
        except subprocess.TimeoutExpired as error:
            raise TrainingError(f"one step took more than {STEP_SECONDS} s; use a smaller model, or a GPU") from error
        told = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0 or not told:
            said = done.stderr.strip().splitlines() or [f"the child ended with code {done.returncode}"]
            raise TrainingError(said[-1].removeprefix("kibitz: ")[:400])
        figures = json.loads(told[-1])
        self._version = version
        return (
            f"{figures['seconds']:.1f} s with {count_noun(figures['rows'], 'answer')} of "
            f"{count_noun(figures['length'], 'token')}, loss {figures['loss']:.3f}, "
            f"at most {figures['memory'] / 2**30:.1f} GiB"
        )

    def check_version(self) -> str:
        """Check that vLLM can load the version that the step made, then unload it."""
        if not self._url or self._version is None:
            raise Skipped("no vLLM answered, or no step was taken")
        return self._runner.run(self._load_and_unload(self._url, str(self._version.absolute())))

    async def _load_and_unload(self, url: str, version: str) -> str:
        serving, rank, name = self.config.serving, self.config.training.lora_rank, f"doctor-{new_id()}"
        policy = Policy(url, self.config.policy, serving.reply_seconds, serving.read_key())
        try:
            await policy.admin.connect()
            if self.config.training.weights == "full":
                if not policy.admin.can_replace_weights:
                    raise ServingError(
                        f"the vLLM at {url} does not allow its weights to be replaced, and training.weights is 'full'; "
                        "start it with VLLM_SERVER_DEV_MODE=1, or train adapters"
                    )
                return "its weights can be replaced"
            try:
                await policy.admin.load_adapter(name, version)
                try:
                    await policy.admin.read_next_logprobs(name, [1], 1.0)
                finally:
                    await policy.admin.unload_adapter(name)
            except ServingError as error:
                raise ServingError(
                    f"the vLLM at {url} cannot serve a version ({quote_error(error).replace(';', ',')}); start it with "
                    f"--enable-lora --max-lora-rank {rank} and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, able to read {version}"
                ) from error
        finally:
            await policy.close()
        return "an adapter was loaded, asked and unloaded"


def make_rows(tokenizer: ChatTokenizer, count: int, length: int) -> list["Experience"]:
    """Make `count` experiences of about `length` tokens that every objective can learn from; every other one is liked."""
    from learning.data.experience import Experience

    prompt = tuple(tokenizer.prompt_ids(QUESTION))
    room = max(2, length - len(prompt))
    answers = []
    for text in ("Yes, that is a good idea. ", "No, I would rather not do it. "):
        ids = tokenizer.completion_ids(text)
        answers.append(tuple(([*ids[:-1]] * room)[: room - 1] + ids[-1:]))
    found = []
    for number in range(count):
        likes = number % 2 == 0
        own, other = answers if likes else answers[::-1]
        sign = 1.0 if likes else -1.0
        found.append(
            Experience(
                *(str(number), str(number), prompt, own, (-1.0,) * len(own), sign, ()),
                advantage=sign,
                rejected_ids=other if likes else None,
            )
        )
    return found


def _step(config: Config, model: str, version: Path) -> dict[str, float]:
    from learning.models.trainable import silence_libraries

    silence_libraries()
    import torch

    from learning.models.trainable import cast_for_serving, save
    from learning.models.trainable import load_for_training as load_model
    from learning.training.objectives import train

    on_gpu = torch.cuda.is_available()
    length = min(config.training.max_length, 10**6 if on_gpu else LENGTH_ON_CPUS)
    tokenizer = ChatTokenizer(model, config.policy.template_args)
    rows = make_rows(tokenizer, 2 * config.training.batch_size, length)
    training = config.training.model_copy(update={"max_steps": 1, "processes": 1})
    made = load_model(config.policy, config.serving, config.training, model)
    began = time.monotonic()
    figures = train(made, tokenizer.hf, rows, training, config.seed, lambda *_: None)
    seconds = time.monotonic() - began
    if config.training.weights == "lora":
        cast_for_serving(made)
        version.mkdir()
        save(made, version)
    memory = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = min(config.training.batch_size, len(rows))
    return {"seconds": seconds, "loss": figures.train_loss, "rows": size, "length": length, "memory": memory}


def _main(config: str, model: str, version: str) -> None:
    try:
        told = _step(load(Path(config)), model, Path(version))
    except KibitzError as error:
        sys.stderr.write(f"kibitz: {quote_error(error)}\n")
        raise SystemExit(2) from None
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
