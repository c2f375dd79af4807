"""Run: one training run: read -> train -> measure -> judge -> save -> register the version with its verdict.

It is meant for a process of its own (`kibitz train`): the system frees its memory when it ends, and a crash is an exit code.
It reads the database and writes one directory under `policies/`, whose manifest is written last. It needs no server.
"""

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bot.config import Config
from bot.data_directory import lock_directory
from bot.errors import NothingToLearn
from bot.memory.embedder import make_embedder
from bot.models.tokenizer import ChatTokenizer
from bot.output import interruptible
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.forgetting import SAMPLES_FILE, UNFINISHED_SUFFIX
from bot.store.registry import PolicyRegistry
from bot.store.weights import discard_weights
from bot.types import Metrics, PolicyState, PolicyVersion, Progress
from learning.data.experience import Experience, Snapshot
from learning.data.manifest import Manifest
from learning.data.replay_buffer import ReplayBuffer
from learning.judging import probe
from learning.judging.evaluation import Sample, kl_to_base, summarize_samples
from learning.judging.evidence import (
    Measurement,
    compare_with_live,
    measure_model,
    sample_answers,
    with_mean_logprobs,
)
from learning.judging.gate import HEADROOM, Soundness, Verdict, judge
from learning.judging.judgement import Judgement
from learning.judging.metrics import AllMetrics, DistillationMetrics, TrainingMetrics
from learning.judging.off_policy import Answers, Estimate, estimate_worth
from learning.judging.report import write_samples
from learning.judging.reward_model import make_reward_model
from learning.judging.taught_head import NEWEST
from learning.judging.waiting import reject_unjudged
from learning.models.trainable import as_base, cast_for_serving, find_not_finite, make_trainable, save
from learning.models.version_files import find_faults, fingerprint, remove_unfinished
from learning.training.demonstrations import prefer_to_own_answers
from learning.training.distillation import distil
from learning.training.lesson import Lesson, make_manifest, prepare_lesson
from learning.training.processes import train_in_processes
from learning.training.teaching import train_with_guard

if TYPE_CHECKING:
    from learning.models.trainable import Model

ENOUGH_SAMPLES = 64  # samples that suffice for the share of well-formed answers, and for the KL


@dataclass(frozen=True)
class Outcome(Judgement):
    """The outcome of a run: the version, its verdict (or that it waits for one), and figures for a report.

    After a run on an import, the `rated` answers of the snapshot are those that people judged, without corrections. The
    newest have their mean log-probability under the base model.
    """

    figures: AllMetrics
    manifest_sha256: str
    adapter_sha256: str
    snapshot: Snapshot


@dataclass(frozen=True)
class TrainingResult:
    """The figures of the training steps, and the measurements of the trained model."""

    figures: TrainingMetrics
    distilled: DistillationMetrics
    rated: list[Experience]
    faults: list[str]  # reasons to reject it whatever the feedback
    base_samples: list[Sample]
    after: Measurement
    kl: float  # nats a token, to the base
    distances: probe.Distances


def train_version(
    config: Config, progress: Progress, space: str | None = None, *, is_deployment_requested: bool = False
) -> Outcome:
    """Train a new version on all feedback, or from the base model on one imported `space`.

    On all feedback it continues the live version, or starts from the base model as `learning.from_base_every` says. With
    `is_deployment_requested` it is deployed if it passes. Raises NothingToLearn, before anything is registered, if there
    is no usable reward.
    """
    with (
        lock_directory(config.data, "train"),
        closing(Database(config.database_url, config.data)) as database,
        interruptible(progress) as report,
    ):
        return Run(config, database, report, space).train(is_deployment_requested=is_deployment_requested)


class Run:
    """One run: makes a version from feedback and registers it as a candidate, waiting or rejected."""

    def __init__(self, config: Config, database: Database, progress: Progress, space: str | None):
        self.config, self.database, self.progress, self.space = config, database, progress, space
        self.began = time.monotonic()
        self.registry, self.store = PolicyRegistry(database), ConversationStore(database)
        self.embedder = make_embedder(config.dialogue, config.data)
        self.tokenizer = ChatTokenizer(self.registry.get_live().base_model, config.policy.template_args)
        self.thinking = config.model_copy(update={"policy": self.tokenizer.with_thought_tokens(config.policy)})
        # Nobody adds feedback to an import.
        self.may_wait = config.learning.wait_reactions > 0 and space is None

    def train(self, *, is_deployment_requested: bool) -> Outcome:
        """Make and register a version. If anything fails, only its name and the reason are kept."""
        self._remove_abandoned()
        self.progress("reading feedback", 0, 1)
        buffer = ReplayBuffer(self.store, self.tokenizer, self.config, self.embedder)
        lesson = prepare_lesson(self.thinking, self.registry, buffer, self.space, self.progress)
        manifest = make_manifest(self.config, lesson)
        version = self.registry.reserve(lesson.parent)
        settings = self.config.without_secrets().model_dump()
        behind = lesson.feedback_ids, lesson.followup_ids, [one.turn_id for one in lesson.unjudged]
        run_id = self.registry.begin_run(version.name, settings, manifest.sha256, *behind)
        unfinished = Path(version.path + UNFINISHED_SUFFIX)
        try:
            unfinished.mkdir(parents=True)
            trained = self._train_and_measure(lesson, unfinished)
            verdict, metrics = self._judge(lesson, trained)
            self._save(lesson, version, unfinished, metrics, manifest)
            adapter_sha256 = self._register(version, verdict, metrics, is_deployment_requested)
            self.registry.end_run(run_id, "passed" if verdict.passed else "; ".join(verdict.reasons))
        except BaseException as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            self.registry.end_run(run_id, self._give_up(version, error))
            raise
        return Outcome(
            policy=version.name,
            passed=verdict.passed,
            waits=metrics.waits_for > 0,
            reasons=verdict.reasons,
            figures=metrics,
            manifest_sha256=manifest.sha256,
            adapter_sha256=adapter_sha256,
            snapshot=replace(lesson.snapshot, rated=trained.rated),
        )

    def _remove_abandoned(self) -> None:
        """Remove what killed runs left behind."""
        for name in self.registry.reject_unfinished():
            discard_weights(Path(self.registry.get(name).path))
        remove_unfinished(self.registry.directory)

    def _train_and_measure(self, lesson: Lesson, directory: Path) -> TrainingResult:
        """Train the model, measure it, and write its weights, samples and probe to a directory."""
        from transformers import set_seed

        config, parent, said = self.thinking, lesson.parent, lesson.before.samples
        set_seed(config.seed)  # a new adapter begins with random weights
        model = make_trainable(config.policy, config.serving, config.training, parent.base_model, lesson.model)
        told = config.policy, config.seed, model, self.tokenizer
        with as_base(model):
            first = lesson.asked[:ENOUGH_SAMPLES]
            base_samples = said if lesson.live.is_base else sample_answers(*told, first)
            rated = self._measure_rated(model, lesson.snapshot.rated)
            prefixes = probe.sample_prefixes(model, self.tokenizer, config.policy.max_tokens, config.seed)
        of_parent = probe.measure(model, prefixes)
        rows = lesson.snapshot.training
        rows = [*prefer_to_own_answers(config, model, self.tokenizer, rows), *rows]  # the first are left out first
        figures = self._teach(lesson, model, config, rows, said if lesson.live == parent else ())
        distilled = DistillationMetrics() if figures.is_harmed else self._distil(lesson, model)
        self.progress("measuring", 0, 1)
        cast_for_serving(model)
        after = measure_model(*told, lesson.judged, lesson.asked)
        kl = kl_to_base(model, after.samples[:ENOUGH_SAMPLES])
        save(model, directory)
        write_samples(directory, [one.question for one in lesson.asked], said, after.samples)
        written = probe.write(directory, prefixes, probe.measure(model, prefixes), of_parent, config.policy.temperature)
        found = [f"training only harmed the policy: {figures.stopped}"] if figures.is_harmed else []
        found += find_faults(directory, parent.base_model, config.serving.max_lora_rank)
        found += [f"{name}: not finite" for name in find_not_finite(model)]
        return TrainingResult(figures, distilled, rated, found, base_samples, after, kl, probe.compute_distances(written))

    def _measure_rated(self, base: "Model", rated: list[Experience]) -> list[Experience]:
        """Return the judged answers of an import, the newest ones with their log-probabilities, which it does not tell."""
        if self.space is None:
            return rated
        self.progress("reading rated answers", 0, 1)
        judged = [one for one in rated if not one.is_correction]
        longest = self.thinking.policy.context_tokens + self.thinking.policy.max_tokens
        return [*judged[:-NEWEST], *with_mean_logprobs(base, judged[-NEWEST:], longest)]

    def _distil(self, lesson: Lesson, model: "Model") -> DistillationMetrics:
        """Train the model on answers of its own that a reward head judges, if the head is proven."""
        if not lesson.for_head:
            return DistillationMetrics()
        self.progress("answering prompts, for the reward head to judge", 0, 1)
        told = self.tokenizer, lesson.for_head, lesson.prompts, self.embedder
        return distil(self.thinking, model, *told, partial(self._teach, lesson, model))

    def _teach(
        self,
        lesson: Lesson,
        model: "Model",
        config: Config,
        rows: Sequence[Experience],
        earlier: Sequence[Sample] = (),
    ) -> TrainingMetrics:
        """Train the model on rows, in one process or in several. `earlier` are samples of it, if there are any."""
        watched = lesson.snapshot.held_out, [one.prompt_ids for one in lesson.asked], self.progress
        if config.training.processes > 1:
            return train_in_processes(config, model, lesson.parent.base_model, rows, *watched)
        return train_with_guard(config, model, self.tokenizer, rows, *watched, earlier)

    def _judge(self, lesson: Lesson, trained: TrainingResult) -> tuple[Verdict, AllMetrics]:
        """Judge the trained model by the feedback. Returns the verdict, and all figures of the run."""
        config, snapshot, before, after = self.thinking, lesson.snapshot, lesson.before, trained.after
        answers, change = summarize_samples(after.samples), trained.distances
        soundness = Soundness(
            kl=trained.kl,
            well_formed=answers.well_formed,
            base_well_formed=summarize_samples(trained.base_samples).well_formed,
            change=change.change,
            rounding=change.rounding,
            is_no_change=change.is_no_change,
        )
        rows = lesson.judged, snapshot.training
        evidence = compare_with_live(
            config.rewards, config.seed, *rows, before, after, self.embedder, soundness, trained.faults
        )
        verdict = judge(evidence, config.gate, config.seed, lesson.earlier, HEADROOM if self.may_wait else 1.0)
        estimate = self._estimate(lesson, after)
        metrics = AllMetrics(
            taken_back=snapshot.taken_back,
            answers_before=summarize_samples(before.samples),
            answers_after=answers,
            reasons=verdict.reasons,
            evidence=evidence,
            judged_against=lesson.live.name,
            drawn_at=snapshot.drawn_at,
            judged_at=snapshot.drawn_at,
            waits_for=min(verdict.answers_wanted, config.learning.wait_reactions) if self.may_wait else 0,
            steps_share_of_run=trained.figures.step_seconds / (time.monotonic() - self.began),
        )
        return verdict, metrics | verdict.figures | trained.figures | trained.distilled | estimate

    def _estimate(self, lesson: Lesson, after: Measurement) -> Estimate:
        """Estimate with a reward model what people would think of the answers before and after."""
        config, base_model = self.config, lesson.parent.base_model
        judge_of = make_reward_model(config, self.embedder, base_model)
        if judge_of is None or lesson.live != lesson.parent:
            return Estimate()
        prompts = [one.prompt_ids for one in lesson.asked]
        old, new = (
            Answers(dict(zip(prompts, found.samples, strict=True)), found.logprobs) for found in (lesson.before, after)
        )
        return estimate_worth(lesson.snapshot.training, lesson.judged, judge_of, old, new, config.seed)

    def _save(
        self, lesson: Lesson, version: PolicyVersion, unfinished: Path, metrics: AllMetrics, manifest: Manifest
    ) -> None:
        """Write the run's records beside the weights, the manifest last, then rename the directory to its final name."""
        directory = Path(version.path)
        self.config.save(unfinished / "config.json")
        (unfinished / "metrics.json").write_text(json.dumps(metrics.as_json(), indent=1, sort_keys=True))
        manifest.write(unfinished)
        unfinished.rename(directory)
        if self._is_any_forgotten(lesson):
            (directory / SAMPLES_FILE).unlink(missing_ok=True)

    def _is_any_forgotten(self, lesson: Lesson) -> bool:
        """Tell whether texts that the samples may contain were forgotten since they were read: their questions, or the texts
        that the live version learned from.
        """
        is_any_gone = any(self.store.find_turn(turn_id) is None for turn_id in {one.turn_id for one in lesson.asked})
        return is_any_gone or self.registry.get(lesson.live.name).state == PolicyState.PURGED

    def _register(self, version: PolicyVersion, verdict: Verdict, metrics: AllMetrics, is_deployment_requested: bool) -> str:
        """Register the version as waiting, candidate or rejected, in one transaction. Returns its weights' fingerprint."""
        directory, registry, waits = Path(version.path), self.registry, metrics.waits_for > 0
        sha256 = fingerprint(directory)
        with self.database.begin():
            superseded = registry.find_waiting() if self.space is None else []
            registry.complete(version.name, sha256, metrics)
            if waits:
                registry.move(version.name, PolicyState.WAITING)
            elif not verdict.passed:
                registry.reject(version.name)
            if is_deployment_requested and (waits or verdict.passed):
                registry.request_deployment(version.name)
            for other in superseded:
                reject_unjudged(registry, other, f"{version.name} was trained after it")
        for gone in [Path(other.path) for other in superseded] + [directory] * (not (waits or verdict.passed)):
            discard_weights(gone)
        return sha256

    def _give_up(self, version: PolicyVersion, error: BaseException) -> str:
        """Reject a version that cannot be finished, and return the reason."""
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error}"
        why = str(error) if isinstance(error, NothingToLearn) else why
        directory = Path(version.path)
        if self.registry.get(version.name).state == PolicyState.PURGED:
            shutil.rmtree(directory, ignore_errors=True)
            return "purged: a person whose texts or feedback it was learning from was forgotten"
        if not directory.exists():
            self.registry.reject(version.name, Metrics(outcome=why))
        return why
