"""A policy with one weight, which a run trains in an instant: how much likelier answers with an exclamation mark are.

It takes the place of the model and of the optimisation alone. What is read, held out, judged, written, registered and
deployed is the real code: `learn_in_an_instant` replaces the functions of runs and verdicts that need torch, and none else.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from bot.models.shape import read_all_tensor_shapes
from bot.models.tokenizer import ChatTokenizer
from learning.data.replay_buffer import Experience
from learning.judging import evidence, waiting
from learning.judging.evaluation import Rows, Sample
from learning.judging.metrics import TrainingMetrics
from learning.judging.probe import ProbeLogprobs
from learning.training import demonstrations, distillation, lesson, run

LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
VOCABULARY = 16  # tokens that a probe looks at
PACE = 0.5  # how far a run moves the weight
EXCLAIMS = "Great!"
STATES = "Poor."


@dataclass
class OneWeight:
    """The model: `weight` is 0 in the base."""

    base_model: str
    tokenizer: ChatTokenizer
    weight: float = 0.0

    def logprob(self, completion: Sequence[int]) -> float:
        """Nats a token of an answer."""
        exclaims = "!" in self.tokenizer.hf.decode(list(completion))
        return -1.0 + self.weight * (1 if exclaims else -1)

    def likely(self) -> torch.Tensor:
        """The log-probabilities of the next token, wherever it stands."""
        return (torch.linspace(0, 1, VOCABULARY) * (1 + self.weight)).log_softmax(-1)


def weight_of(adapter: Path) -> float:
    """Return the weight of a saved version."""
    return float(load_file(adapter / "adapter_model.safetensors")[LAYER.format("B")][0, 0])


@contextlib.contextmanager
def learn_in_an_instant(tokenizer: ChatTokenizer) -> Iterator[pytest.MonkeyPatch]:
    """Inside, runs train a policy with one weight. More can be replaced with what is yielded."""

    def served(policy: Any, serving: Any, base_model: str, version: str | None = None) -> OneWeight:
        return OneWeight(base_model, tokenizer, 0.0 if version is None else weight_of(Path(version)))

    def teach(
        config: Any, model: OneWeight, tokenizer: ChatTokenizer, training: Sequence[Experience], *_: Any
    ) -> TrainingMetrics:
        exclaims = np.array([1.0 if "!" in one.answer else -1.0 for one in training])
        worth = np.array([one.advantage * one.weight for one in training])
        model.weight += PACE * float(np.tanh(exclaims @ worth))
        return TrainingMetrics(stopped=None, kept=1, checks=[], step_seconds=0.0)

    def answer_in_both_ways(
        model: OneWeight, tokenizer: ChatTokenizer, prompts: Sequence[Sequence[int]], *_: Any
    ) -> list[Sample]:
        ways = [(text, tuple(tokenizer.completion_ids(text))) for text in (EXCLAIMS, STATES)]
        said = zip(prompts, itertools.cycle(ways), strict=False)
        return [Sample(tuple(prompt), ids, text, is_finished=True) for prompt, (text, ids) in said]

    def generate(model: OneWeight, tokenizer: ChatTokenizer, prompts: Sequence[Sequence[int]], *_: Any) -> list[Sample]:
        said = EXCLAIMS if model.weight > 0 else STATES
        ids = tuple(tokenizer.completion_ids(said))
        return [Sample(tuple(prompt), ids, said, is_finished=True) for prompt in prompts]

    def save(model: OneWeight, directory: Path) -> None:
        (directory / "adapter_config.json").write_text(
            json.dumps({"r": 1, "bias": "none", "base_model_name_or_path": model.base_model})
        )
        rows, columns = read_all_tensor_shapes(Path(model.base_model))[
            LAYER.removeprefix("base_model.model.").replace("lora_{}.", "")
        ]
        halves = {
            LAYER.format(half): np.full(shape, model.weight, np.float32)
            for half, shape in (("A", (1, columns)), ("B", (rows, 1)))
        }
        save_file(halves, directory / "adapter_model.safetensors")

    def logprobs(model: OneWeight, rows: Rows) -> list[torch.Tensor]:
        return [torch.full((len(completion),), model.logprob(completion)) for _, completion in rows]

    @contextlib.contextmanager
    def as_base(model: OneWeight) -> Iterator[None]:
        own, model.weight = model.weight, 0.0
        yield
        model.weight = own

    stand_ins = {
        "load_served": served,
        "make_trainable": lambda policy, serving, training, base_model, model: model,
        "train_with_guard": teach,
        "generate": generate,
        "save": save,
        "batched_logprobs": logprobs,
        "as_base": as_base,
        "kl_to_base": lambda model, samples: abs(model.weight) / 100,
        "cast_for_serving": lambda model: None,
        "find_not_finite": lambda model: [],
        "silence_libraries": lambda: None,
        "copy_weights": lambda model: model.weight,
        "restore_weights": lambda model, weight: setattr(model, "weight", weight),
        "ChatTokenizer": lambda *_: tokenizer,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            users = lesson, run, evidence, waiting, distillation, demonstrations
            places = [module for module in users if hasattr(module, name)]
            assert places, f"nothing uses {name} any more"
            for module in places:
                patch.setattr(module, name, stand_in)
        patch.setattr(distillation, "generate", answer_in_both_ways)
        patch.setattr("learning.judging.probe.sample_prefixes", lambda model, *_: [[1, 2, 3]])
        patch.setattr(
            "learning.judging.probe.measure", lambda model, places: ProbeLogprobs([model.likely()], [model.likely()])
        )
        yield patch
