"""One training run, top to bottom: snapshot -> dataset -> train -> measure -> save -> register a candidate -> verdict.

Meant to run in a process of its own (`kibitz train`), so that memory comes back when it ends and a crash is an exit code.
It reads the database and writes one directory under `policies/`, whose manifest is written last. It knows no server.
"""

import hashlib
import json
import shutil
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot.config import Config
from bot.data_directory import held
from bot.errors import NothingToLearn
from bot.memory.embedder import Embedder, embedder_of
from bot.models.tokenizer import ChatTokenizer
from bot.output import interruptible
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.forgetting import SAMPLES, UNFINISHED
from bot.store.registry import PolicyRegistry
from bot.types import PolicyState, PolicyVersion, Progress
from learning.data.experience import Experience, Snapshot
from learning.data.replay_buffer import ReplayBuffer
from learning.judging import probe
from learning.judging.evaluation import kl_to_base, manner
from learning.judging.evidence import Measured, answer, choose_prompts, compare, measure
from learning.judging.gate import ROOM, Evidence, Verdict, allowed_p, judge, newest_that_suffice
from learning.judging.off_policy import estimated
from learning.judging.report import write_samples
from learning.judging.reward_model import reward_model
from learning.judging.waiting import earlier_verdicts, reject_unjudged
from learning.models.trainable import as_base, not_finite, quiet, save, served, settle, to_train
from learning.models.version_files import discard_weights, faults, fingerprint, is_whole, read_since, remove_unfinished
from learning.training.drift import changed
from learning.training.processes import teach_together
from learning.training.teaching import teach

if TYPE_CHECKING:
    from learning.models.trainable import Model

ENOUGH = 64  # samples for a share of well-formed answers, or for a KL


@dataclass(frozen=True)
class Outcome:
    """What a run left behind: the version, the verdict on it (or that it waits for one), and figures for a report."""

    policy: str
    passed: bool
    waits: bool
    reasons: list[str]
    figures: dict[str, Any]
    manifest_sha256: str
    adapter_sha256: str
    turns: int
    training: int
    held_out: int
    dropped: dict[str, int]
    without_logprobs: int


@dataclass(frozen=True)
class Lesson:
    """What a run begins with: the version that it goes on from, as a model; what was said, since a turn or ever; the
    `judged` answers that the gate asks, and the prompts that candidates are `asked`, with what the live version makes of
    both; and the `earlier` verdicts of the gate.
    """

    parent: PolicyVersion
    model: "Model"
    snapshot: Snapshot
    since: str
    live: PolicyVersion
    before: Measured
    judged: list[Experience]
    asked: list[Experience]
    earlier: list[bool]


def run(
    config: Config, progress: Progress, space: str | None = None, from_base: bool = False, deploys: bool = False
) -> Outcome:
    """Train a new version on all feedback (or on one imported `space`), continuing the live version unless `from_base`,
    or unless it is time to begin anew (`learning.from_base_every`). With `deploys`, what passes is to be deployed.

    Raises NothingToLearn where there is no usable reward; nothing is registered then.
    """
    with (
        held(config.data, "train"),
        closing(Database(config.database_url)) as database,
        interruptible(progress) as report,
    ):
        return _run(config, database, report, space, from_base, deploys)


def _run(
    config: Config, database: Database, progress: Progress, space: str | None, from_base: bool, deploys: bool
) -> Outcome:
    began = time.monotonic()
    registry = PolicyRegistry(database)
    for name in registry.abandon_unfinished():
        discard_weights(Path(registry.get(name).path))
    remove_unfinished(config.data / "policies")
    live = registry.live()
    parent = _parent(config, registry, live, from_base)
    tokenizer = ChatTokenizer(parent.base_model, config.policy.template_args)
    progress("reading feedback", 0, 1)
    embedding = embedder_of(config)
    buffer = ReplayBuffer(ConversationStore(database), tokenizer, config, embedding)
    thinking = config.model_copy(update={"policy": tokenizer.with_thoughts(config.policy)})
    lesson = _lesson(thinking, registry, live, parent, buffer, space, progress)
    snapshot = lesson.snapshot
    may_wait = config.learning.wait_reactions > 0 and space is None  # nobody adds to what was recorded
    manifest = _manifest(config, lesson)
    sha256 = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    version = registry.reserve(lesson.parent, config.data / "policies")
    taught = snapshot.feedback_ids, snapshot.followup_ids
    run_id = registry.begin_run(version.name, config.without_secrets().model_dump(), sha256, *taught)
    directory = Path(version.path)
    unfinished = directory.with_name(directory.name + UNFINISHED)
    try:
        unfinished.mkdir(parents=True)
        verdict, metrics = _train(thinking, lesson, tokenizer, embedding, may_wait, unfinished, progress)
        metrics |= {"judged_against": live.name, "steps_share_of_run": metrics["step_seconds"] / (time.monotonic() - began)}
        metrics |= dict.fromkeys(("drawn_at", "judged_at"), snapshot.drawn_at.isoformat())
        metrics["waits_for"] = min(verdict.wanted, config.learning.wait_reactions) if may_wait else 0
        waits = metrics["waits_for"] > 0
        config.save(unfinished / "config.json")
        (unfinished / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True))
        (unfinished / "manifest.json").write_text(json.dumps(manifest | {"sha256": sha256}, indent=1, sort_keys=True))
        unfinished.rename(directory)
        if _is_any_forgotten(registry, buffer.store, lesson):
            (directory / SAMPLES).unlink(missing_ok=True)
        adapter_sha256 = fingerprint(directory)
        with database.begin():
            superseded = registry.waiting() if space is None else []
            registry.complete(version.name, adapter_sha256, metrics)
            if waits:
                registry.move(version.name, PolicyState.WAITING)
            elif not verdict.passed:
                registry.reject(version.name)
            if deploys and (waits or verdict.passed):
                registry.request_deployment(version.name)
            for other in superseded:
                reject_unjudged(registry, other, f"{version.name} was trained after it")
        for gone in [Path(other.path) for other in superseded] + [directory] * (not (waits or verdict.passed)):
            discard_weights(gone)
        registry.end_run(run_id, "passed" if verdict.passed else "; ".join(verdict.reasons))
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error}"
        why = str(error) if isinstance(error, NothingToLearn) else why
        if registry.get(version.name).state == PolicyState.PURGED:  # somebody who taught it was forgotten meanwhile
            shutil.rmtree(directory, ignore_errors=True)
            why = "purged: what it was learning from was forgotten"
        elif not directory.exists():
            registry.reject(version.name, {"outcome": why})
        registry.end_run(run_id, why)
        raise
    return Outcome(
        policy=version.name,
        passed=verdict.passed,
        waits=waits,
        reasons=verdict.reasons,
        figures=metrics,
        manifest_sha256=sha256,
        adapter_sha256=adapter_sha256,
        turns=snapshot.turns,
        training=len(snapshot.learned),
        held_out=len(snapshot.held_out),
        dropped=dict(snapshot.dropped),
        without_logprobs=snapshot.without_logprobs,
    )


def _is_any_forgotten(registry: PolicyRegistry, store: ConversationStore, lesson: Lesson) -> bool:
    """Whether anything that samples may spell was forgotten since it was read: their questions, or what the live version
    learned from.
    """
    is_any_gone = any(store.turn(turn_id) is None for turn_id in {one.turn_id for one in lesson.asked})
    return is_any_gone or registry.get(lesson.live.name).state == PolicyState.PURGED


def _parent(config: Config, registry: PolicyRegistry, live: PolicyVersion, from_base: bool) -> PolicyVersion:
    """The version that a run goes on from, as long as people want what they wanted."""
    every = config.learning.from_base_every
    is_due = every > 0 and len(registry.runs()) % every == every - 1
    # An adapter is served on the base model alone: it does not go on from a live version with weights of its own.
    cannot = config.training.weights == "lora" and is_whole(Path(live.path))
    return registry.base() if from_base or is_due or cannot else live


def _lesson(
    config: Config,
    registry: PolicyRegistry,
    live: PolicyVersion,
    parent: PolicyVersion,
    buffer: ReplayBuffer,
    space: str | None,
    progress: Progress,
) -> Lesson:
    """All that was said; or, where people came to want the opposite, what was said since, to begin anew with."""
    looks_for_drift = config.learning.detect_drift and space is None
    since = read_since(Path(live.path)) if looks_for_drift else ""
    snapshot = buffer.snapshot(space, since)
    _refuse_empty(snapshot)
    progress("loading the model", 0, 1)
    quiet()
    found = served(config, live.base_model, live.weights)
    change = changed(config, live.base_model, found, snapshot.drawn) if looks_for_drift and not live.is_base else None
    if change is not None:
        progress(f"people came to want the opposite: {change.since} older answers count no more", 0, 1)
        since = snapshot.drawn[change.since].turn_id
        snapshot = buffer.snapshot(since=since)
        _refuse_empty(snapshot)
        parent = registry.base() if change.against else parent
    earlier = earlier_verdicts(registry)
    judged = snapshot.judged
    if space is None:
        wanted = config.gate, allowed_p(config.gate, earlier) / ROOM, config.rewards.person_cap
        judged = newest_that_suffice(judged, live.judged_at, *wanted)
    asked = choose_prompts([*snapshot.held_out, *snapshot.training], config.gate.samples)
    before = measure(config, found, buffer.tokenizer, judged, asked)
    if parent != live:
        del found  # there may be no room for both
        found = served(config, parent.base_model, parent.weights)
    return Lesson(parent, found, snapshot, since, live, before, judged, asked, earlier)


def _refuse_empty(snapshot: Snapshot) -> None:
    if snapshot.training:
        rewards = {one.reward for one in snapshot.training}
        if len(rewards) == 1 and not any(one.rejected_ids for one in snapshot.training):
            raise NothingToLearn(
                f"all {len(snapshot.training)} rewards are {rewards.pop():+.2f}: nothing says what people like less, or "
                "more; collect more reactions first"
            )
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(snapshot.dropped.items()))
    raise NothingToLearn(
        f"no usable reward: {snapshot.turns} turns with feedback were read, {len(snapshot.held_out)} are held out"
        f"{', left out: ' + reasons if reasons else ''}; collect more reactions first, or raise the limit that is named"
    )


def _manifest(config: Config, lesson: Lesson) -> dict[str, Any]:
    """All that the weights depend on, and nothing else: no time, no path, no version number."""
    snapshot, base_model = lesson.snapshot, lesson.parent.base_model
    return {
        "base_sha256": fingerprint(Path(base_model)) if Path(base_model).is_dir() else base_model,
        "parent_sha256": lesson.parent.sha256,
        "training": config.training.model_dump(),
        "rewards": config.rewards.model_dump(),
        "embedder": config.dialogue.embedder,
        "seed": config.seed,
        "since": lesson.since,
        "rows": [experience.digest() for experience in snapshot.learned],
        "held_out": [experience.digest() for experience in snapshot.held_out],
        "dropped": dict(sorted(snapshot.dropped.items())),
    }


def _train(
    config: Config,
    lesson: Lesson,
    tokenizer: ChatTokenizer,
    embedding: Embedder | None,
    may_wait: bool,
    directory: Path,
    progress: Progress,
) -> tuple[Verdict, dict[str, Any]]:
    from transformers import set_seed

    parent, snapshot, before, judged = lesson.parent, lesson.snapshot, lesson.before, lesson.judged
    said = before.samples
    set_seed(config.seed)  # of a fresh adapter
    model = to_train(config, parent.base_model, lesson.model)
    prompts = [one.prompt_ids for one in lesson.asked]
    with as_base(model):
        base_samples = said if lesson.live.is_base else answer(config, model, tokenizer, lesson.asked[:ENOUGH])
        prefixes = probe.prefixes(model, tokenizer, config.policy.max_tokens, config.seed)
    is_live = lesson.live == parent
    of_parent = probe.measure(model, prefixes)
    rows = snapshot.training, snapshot.held_out, prompts, progress
    if config.training.processes > 1:
        trained = teach_together(config, model, parent.base_model, *rows)
    else:
        trained = teach(config, model, tokenizer, *rows, said if is_live else ())
    harm = [f"what was learned did only harm: {trained['stopped']}"] if trained["stopped"] and not trained["kept"] else []
    progress("measuring", 0, 1)
    settle(model)
    after = measure(config, model, tokenizer, judged, lesson.asked)
    samples = after.samples
    kl = kl_to_base(model, samples[:ENOUGH])
    save(model, directory)
    write_samples(directory, [one.question for one in lesson.asked], said, samples)
    change = probe.distances(
        probe.write(directory, prefixes, probe.measure(model, prefixes), of_parent, config.policy.temperature)
    )
    answers = manner(samples)
    evidence = Evidence(
        **compare(config, judged, snapshot.training, before, after, embedding),
        kl=kl,
        well_formed=answers["well_formed"],
        base_well_formed=manner(base_samples)["well_formed"],
        faults=[
            *harm,
            *faults(directory, parent.base_model, config.serving.max_lora_rank),
            *(f"{name}: not finite" for name in not_finite(model)),
        ],
        change=change.change,
        rounding=change.rounding,
        is_no_change=change.is_no_change,
    )
    verdict = judge(evidence, config.gate, config.seed, lesson.earlier, may_wait)
    metrics = {**verdict.figures, **trained, "taken_back": snapshot.taken_back}
    metrics |= {"answers_before": manner(said), "answers_after": answers}
    judge_of = reward_model(config, embedding, parent.base_model)
    if judge_of is not None and is_live:
        policies = {
            when: (dict(zip(prompts, own, strict=True)), logprobs)
            for when, own, logprobs in (("before", said, before.logprobs), ("after", samples, after.logprobs))
        }
        metrics |= estimated(snapshot.training, judged, judge_of, policies, config.seed)
    return verdict, metrics | {"reasons": verdict.reasons, "evidence": asdict(evidence)}
