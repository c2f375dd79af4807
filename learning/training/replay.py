"""Replay: train offline on recorded conversations, and report what was read, learned and left out.

Replay imports a file, trains a new version from the base model on that file alone, and measures held-out answers before and
after. The same file, config and seed give the same manifest and the same adapter bytes. Replay needs no server.

Run: ``kibitz replay FILE_OR_DIRECTORY``.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bot.config import Config
from bot.errors import NothingToLearn
from bot.memory.embedder import make_embedder
from bot.store.conversations import ConversationStore
from bot.types import Progress
from learning.data.experience import Experience
from learning.importers.recording import Recording, format_counts
from learning.judging.evaluation import Manner
from learning.judging.gate import Evidence
from learning.judging.head_comparison import compare_head
from learning.judging.reward_model import make_reward_model
from learning.judging.reward_scores import score
from learning.judging.statistics import accuracy, margin, unit_bootstrap
from learning.judging.taught_head import NEWEST
from learning.training.run import train_version


def tokenizer_fingerprint(model: str) -> str:
    """Return the sha256 of a tokenizer's file, or of the hub name of its model."""
    file = Path(model) / "tokenizer.json"
    return hashlib.sha256(file.read_bytes() if file.is_file() else model.encode()).hexdigest()


def replay(
    recording: Recording, store: ConversationStore, base_model: str, config: Config, progress: Progress
) -> dict[str, Any]:
    """Store a recording, train on it, and return the figures of the report.

    Raises NothingToLearn if there is no usable reward. If nobody judged an answer at all, nothing is stored.
    """
    read = recording.counts
    if not any(given for *_, given in recording.dialogues):
        raise NothingToLearn(
            f"no usable reward: no answer has feedback ({format_counts(read)}){_describe_left_out(recording)}"
        )
    if recording.tokenizer_sha256 and recording.tokenizer_sha256 != tokenizer_fingerprint(base_model):
        recording.drop_token_ids()
        recording.dropped["recorded token ids of another tokenizer (tokenized anew)"] = recording.answer_count
    store.add_dialogues(recording.dialogues)
    try:
        outcome = train_version(config, progress, space=recording.space)
    except NothingToLearn as error:
        raise NothingToLearn(f"{error} ({format_counts(read)}){_describe_left_out(recording)}") from error
    snapshot = outcome.snapshot
    dropped = {**recording.dropped, **snapshot.dropped}
    silent = recording.answer_count - snapshot.turns
    if silent:
        dropped["answer without any feedback"] = silent
    return {
        **read,
        "format": recording.format,
        "scale": recording.scale_summary,
        "dropped": dropped,
        "dropped_first": {reason: place for reason, (place, _) in recording.first_dropped.items()},
        "trained_on": len(snapshot.trained_on),
        "held_out": len(snapshot.held_out),
        "without_logprobs": snapshot.without_logprobs,
        **_compute_held_out_figures(outcome.figures.evidence, [one.unit for one in snapshot.judged], config.seed),
        "kl": outcome.figures.kl,
        "well_formed": outcome.figures.well_formed,
        "gain": outcome.figures.gain,
        "gain_low": outcome.figures.gain_low,
        "gain_high": outcome.figures.gain_high,
        **_manner(outcome.figures.answers_before, "before"),
        **_manner(outcome.figures.answers_after, "after"),
        "policy": outcome.policy,
        "passed": outcome.passed,
        "reasons": outcome.reasons,
        **_measure_reward_models(snapshot.rated, config, base_model),
        "manifest_sha256": outcome.manifest_sha256,
        "adapter_sha256": outcome.adapter_sha256,
    }


def _describe_left_out(recording: Recording) -> str:
    """Describe what was left out, as the end of an error message."""
    return "".join(f"; left out: {recording.explain(reason)}" for reason in recording.first_dropped)


def _measure_reward_models(judged: Sequence[Experience], config: Config, base_model: str) -> dict[str, Any]:
    """Return the scores of the config's reward model, and the reward head's, on conversations that they did not see."""
    embedder = make_embedder(config.dialogue, config.data)
    model = make_reward_model(config, embedder, base_model)
    scored = None if model is None else model.fit(judged)
    found = {"reward_model_auc": None} if scored is None else asdict(score(scored, config.seed))
    compared = compare_head(judged[-NEWEST:], embedder, config.rewards.person_cap, config.seed)
    return found | ({"head_auc": None} if compared is None else asdict(compared))


def _manner(answers: Manner, when: str) -> dict[str, float]:
    return {f"{name}_{when}": value for name, value in asdict(answers).items()}


def _compute_held_out_figures(evidence: Evidence, units: Sequence[str], seed: int) -> dict[str, Any]:
    """Compute liked-over-disliked accuracy and margin (nats a token), before and after, with 95% intervals over
    conversations.
    """
    signs = np.array(evidence.opinions.signs)
    found: dict[str, Any] = {"held_out_liked": int((signs > 0).sum()), "held_out_disliked": int((signs < 0).sum())}
    for name, statistic in (("accuracy", accuracy), ("margin", margin)):
        for when, logprobs in (("before", evidence.live), ("after", evidence.candidate)):
            value, low, high = unit_bootstrap(statistic, np.array(logprobs), signs, units, seed)
            label = f"held_out_{name}_{when}"
            found |= {label: value, f"{label}_low": low, f"{label}_high": high}
    return found


def plot(figures: dict[str, Any], path: Path) -> None:
    """Plot held-out accuracy and margin before and after, with their intervals, to an image file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(7.5, 3.6), layout="constrained")
    for axes, name, chance in zip(panels, ("accuracy", "margin"), (0.5, 0.0), strict=True):
        labels = [f"held_out_{name}_{when}" for when in ("before", "after")]
        if figures[labels[0]] is None:
            axes.text(0.5, 0.5, "held-out answers are all of one kind", ha="center", transform=axes.transAxes)
            continue
        values = [figures[label] for label in labels]
        below = [value - (figures[f"{label}_low"]) for value, label in zip(values, labels, strict=True)]
        above = [figures[f"{label}_high"] - value for value, label in zip(values, labels, strict=True)]
        axes.errorbar(["before", "after"], values, yerr=[below, above], fmt="o", capsize=6)
        axes.axhline(chance, color="tab:gray", linestyle=":")
        axes.set(title=f"liked over disliked: {name}", xlim=(-0.5, 1.5))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
