"""Lesson: the input of a run: rows to learn from, rows to be judged by, and the version to continue."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bot.config import Config, LearningConfig, TrainingConfig
from bot.errors import NothingToLearn
from bot.store.registry import PolicyRegistry
from bot.types import PolicyVersion, Progress
from bot.wording import count_noun
from learning.data.experience import Experience, Snapshot
from learning.data.manifest import Manifest, read_since
from learning.data.replay_buffer import ReplayBuffer, UnjudgedPrompt
from learning.judging.evidence import Measurement, choose_prompts, measure_model
from learning.judging.gate import HEADROOM, compute_allowed_p, select_newest_sufficient
from learning.judging.waiting import read_earlier_verdicts
from learning.models.trainable import load_served, silence_libraries
from learning.models.version_files import fingerprint, is_whole
from learning.training.distillation import USUAL, is_proven, order_prompts
from learning.training.drift import detect_drift

if TYPE_CHECKING:
    from learning.models.trainable import Model

LIMITS = ("learning.max_turns", "training.max_length")  # that reasons for leaving turns out name


@dataclass(frozen=True)
class Lesson:
    """The input of a run.

    `parent` is the version to continue and `model` its model. `snapshot` holds the feedback since the turn `since` ("" for
    all). The gate scores the `judged` answers and samples the `asked` prompts; `before` is the live version's measurement of
    both. `earlier` are the gate's earlier verdicts. A reward head is fitted to the answers `for_head`; there are none unless
    it is or was proven. The policy answers the `unjudged` prompts for it, beside those that people judged.
    """

    parent: PolicyVersion
    model: "Model"
    snapshot: Snapshot
    since: str
    live: PolicyVersion
    before: Measurement
    judged: list[Experience]
    asked: list[Experience]
    earlier: list[bool]
    for_head: list[Experience]
    unjudged: list[UnjudgedPrompt]

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The prompts that the policy answers for the reward head: the newest that were judged, then the others."""
        return order_prompts(self.snapshot.training, [one.prompt_ids for one in self.unjudged])

    @property
    def feedback_ids(self) -> list[str]:
        """The ids of the feedback that the weights depend on. Forgetting any of it withdraws the version."""
        behind_labels = {one for experience in self.for_head for one in experience.feedback_ids}
        return sorted({*self.snapshot.feedback_ids, *behind_labels})

    @property
    def followup_ids(self) -> list[str]:
        """The ids of the follow-ups that the weights depend on. Forgetting any of them withdraws the version."""
        behind_labels = {one.followup_id for one in self.for_head if one.followup_id is not None}
        return sorted({*self.snapshot.followup_ids, *behind_labels})


def prepare_lesson(
    config: Config, registry: PolicyRegistry, buffer: ReplayBuffer, space: str | None, progress: Progress
) -> Lesson:
    """Read the feedback, load the version to continue, and measure the live version.

    After a change of taste (`drift`) only the feedback since then is read, and the run may begin again from the base.
    `space` restricts it to one import, and then the run begins from the base. Raises NothingToLearn if there is no usable
    reward, or no difference between them.
    """
    policy, serving, rewards = config.policy, config.serving, config.rewards
    live = registry.get_live()
    chosen = _choose_parent(config.learning, config.training, registry, live)
    parent = chosen if space is None else registry.get_base()
    looks_for_drift = config.learning.detect_drift and space is None
    since = read_since(Path(live.path)) if looks_for_drift else ""
    snapshot = buffer.snapshot(space, since)
    _refuse_empty(snapshot)
    progress("loading the model", 0, 1)
    silence_libraries()
    model = load_served(policy, serving, live.base_model, live.weights)
    change = (
        detect_drift(policy, serving, rewards, live.base_model, model, snapshot.training_and_held_out)
        if looks_for_drift and not live.is_base
        else None
    )
    if change is not None:
        progress(f"people came to want the opposite: {count_noun(change.since, 'older answer')} left out", 0, 1)
        since = snapshot.training_and_held_out[change.since].turn_id
        snapshot = buffer.snapshot(since=since)
        _refuse_empty(snapshot)
        parent = registry.get_base() if change.against else parent
    earlier = read_earlier_verdicts(registry)
    judged = snapshot.judged
    if space is None:
        wanted = config.gate, compute_allowed_p(config.gate, earlier) / HEADROOM, rewards.person_cap
        judged = select_newest_sufficient(judged, live.judged_at, *wanted)
    asked = choose_prompts([*snapshot.held_out, *snapshot.training], config.gate.samples)
    before = measure_model(policy, config.seed, model, buffer.tokenizer, judged, asked)
    if parent != live:
        del model  # there may be no memory for both
        model = load_served(policy, serving, parent.base_model, parent.weights)
    # Those that are held out teach the head too, since few reactions must do. A head is proven by luck in one case of
    # MANY_E_VALUE at most; docs/architecture.md, "Few reactions", counts that beside the gate's own errors.
    said = [] if space is not None else [one for one in snapshot.training_and_held_out if not one.is_correction]
    for_head = said if is_proven(config, said, buffer.embedder) else []
    unjudged = buffer.find_unjudged(USUAL.rounds * config.learning.distil_prompts) if for_head else []
    return Lesson(parent, model, snapshot, since, live, before, judged, asked, earlier, for_head, unjudged)


def _choose_parent(
    learning: LearningConfig, training: TrainingConfig, registry: PolicyRegistry, live: PolicyVersion
) -> PolicyVersion:
    """Return the version that a run on all feedback continues if there is no change of taste."""
    every = learning.from_base_every
    is_due = every > 0 and len(registry.list_runs()) % every == every - 1
    # An adapter is served on the base model, so it cannot continue a version that has whole weights.
    cannot = training.weights == "lora" and is_whole(Path(live.path))
    return registry.get_base() if is_due or cannot else live


def _refuse_empty(snapshot: Snapshot) -> None:
    if snapshot.training:
        rewards = {one.reward for one in snapshot.training}
        if len(rewards) == 1 and not any(one.rejected_ids for one in snapshot.training):
            raise NothingToLearn(
                f"every reward is {rewards.pop():+.2f} ({count_noun(len(snapshot.training), 'answer')}): there is no "
                "difference to learn from; collect more reactions first"
            )
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(snapshot.dropped.items()))
    limits = "".join(f", or raise {key}" for key in LIMITS if key in reasons)
    raise NothingToLearn(
        f"no usable reward: {count_noun(snapshot.turns, 'turn')} with feedback, {len(snapshot.held_out)} held out"
        f"{', left out: ' + reasons if reasons else ''}; collect more reactions first{limits}"
    )


def make_manifest(config: Config, lesson: Lesson) -> Manifest:
    """Return all that the weights depend on, and nothing else: no time, no path, no version number."""
    snapshot, base_model = lesson.snapshot, lesson.parent.base_model
    manifest = Manifest(
        base_sha256=fingerprint(Path(base_model)) if Path(base_model).is_dir() else base_model,
        parent_sha256=lesson.parent.sha256,
        training=config.training.model_dump(),
        rewards=config.rewards.model_dump(),
        embedder=config.dialogue.embedder,
        seed=config.seed,
        since=lesson.since,
        rows=[experience.make_manifest_row() for experience in snapshot.trained_on],
        held_out=[experience.make_manifest_row() for experience in snapshot.held_out],
        head_rows=[experience.make_manifest_row() for experience in lesson.for_head],
        distil_prompts=config.learning.distil_prompts if lesson.for_head else 0,
        unjudged=[one.turn_id for one in lesson.unjudged],
        own_answers=config.learning.own_answers if any(one.is_correction for one in snapshot.training) else 0,
        dropped=dict(sorted(snapshot.dropped.items())),
    )
    return manifest.sign()
