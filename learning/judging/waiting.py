"""Waiting: judge a candidate that had too little evidence once there are enough opinions, or give it up.

It is judged by held-out answers, and by answers to new questions that came after its training rows were drawn; neither it
nor its parent learned from those. The opinions alone decide when there are enough, never the candidate's figures
(`learning.judging.gate`), so it is judged once and earlier looks cost nothing. After `learning.wait_reactions` it is judged
by whatever evidence there is. This runs in the training process and does not depend on a server.
"""

import json
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from bot.config import Config, ServingConfig
from bot.data_directory import lock_directory
from bot.errors import RegistryError, VerdictOutdated
from bot.memory.embedder import Embedder, make_embedder
from bot.models.tokenizer import ChatTokenizer
from bot.output import interruptible
from bot.output_files import write_text
from bot.records import Record
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.registry import PolicyRegistry
from bot.store.weights import discard_weights
from bot.types import Metrics, PolicyState, PolicyVersion, Progress, now
from bot.wording import count_noun
from learning.data.experience import Experience
from learning.data.manifest import read_since
from learning.data.replay_buffer import ReplayBuffer
from learning.judging.evidence import Measurement, choose_prompts, compare_with_live, measure_model
from learning.judging.gate import (
    HEADROOM,
    Evidence,
    Soundness,
    Verdict,
    can_suffice,
    collect_opinions,
    compute_allowed_p,
    count_wanted,
    explain_too_little,
    judge,
    select_newest_sufficient,
)
from learning.judging.judgement import Judgement
from learning.judging.metrics import EvidenceMetrics
from learning.models.trainable import load_served, silence_libraries
from learning.models.version_files import find_faults, fingerprint

BEFORE_ALL = datetime.min.replace(tzinfo=UTC)  # for verdicts without a recorded time


class _Measured(Record):
    """The metrics of a version that are not measured again."""

    evidence: Soundness


def read_earlier_verdicts(registry: PolicyRegistry) -> list[bool]:
    """Return the verdicts that had enough evidence, oldest first: True for each that found its version better."""
    metrics = sorted((version.metrics for version in registry.all()), key=lambda one: one.judged_at or BEFORE_ALL)
    return [one.is_better for one in metrics if one.had_enough_evidence]


def reject_unjudged(registry: PolicyRegistry, version: PolicyVersion, reason: str) -> None:
    """Reject a waiting version. No test was made on the opinions, so this spends nothing of the error budget."""
    metrics = version.metrics | Metrics(reasons=[reason], waits_for=0)
    registry.record_verdict(version.name, PolicyState.REJECTED, metrics, reason)


def give_up(registry: PolicyRegistry, version: PolicyVersion, reason: str) -> None:
    """Reject a waiting version and delete its weights."""
    reject_unjudged(registry, version, reason)
    registry.database.run_after_commit(partial(discard_weights, Path(version.path)))


def judge_waiting(config: Config, progress: Progress) -> Judgement:
    """Judge the waiting version if there is enough evidence.

    Raises RegistryError if no version is waiting.
    """
    with (
        lock_directory(config.data, "train"),
        closing(Database(config.database_url, config.data)) as database,
        interruptible(progress) as report,
    ):
        registry = PolicyRegistry(database)
        waiting = registry.find_waiting()
        if not waiting:
            raise RegistryError("no version is waiting to be judged; `kibitz policies` lists all versions")
        return _judge(config, database, registry, waiting[-1], report)


def _judge(
    config: Config, database: Database, registry: PolicyRegistry, version: PolicyVersion, progress: Progress
) -> Judgement:
    live, drawn_at, path = registry.get_live(), version.drawn_at, Path(version.path)
    if reason := _find_obstacle(config.serving, version, live):
        return _give_up_for(registry, version, reason)
    assert drawn_at is not None  # every waiting version has it
    progress("reading feedback", 0, 1)
    store, tokenizer = ConversationStore(database), ChatTokenizer(version.base_model, config.policy.template_args)
    embedding = make_embedder(config.dialogue, config.data)
    rows = ReplayBuffer(store, tokenizer, config, embedding).find_unseen(read_since(path), drawn_at)
    judged_at, came = now(), store.count_reactions(drawn_at)
    is_last = came >= config.learning.wait_reactions
    earlier, cap = read_earlier_verdicts(registry), config.rewards.person_cap
    allowed = compute_allowed_p(config.gate, earlier)
    least = allowed if is_last else allowed / HEADROOM
    judged = select_newest_sufficient(rows, live.judged_at, config.gate, allowed / HEADROOM, cap)
    opinions = collect_opinions(judged, [0] * len(judged), cap)
    if not can_suffice(opinions, config.gate, least):
        reason = explain_too_little(opinions, config.gate, least)
        if is_last:
            waited = f"it has waited for {count_noun(came, 'reaction')} (learning.wait_reactions)"
            return _give_up_for(registry, version, f"{reason}; {waited}")
        most = max(config.learning.wait_reactions, came + 1)
        waits_for = min(came + count_wanted(opinions, config.gate, least), most)
        metrics = version.metrics | Metrics(reasons=[reason], waits_for=waits_for)
        registry.record_verdict(version.name, PolicyState.WAITING, metrics, reason)
        return Judgement(version.name, passed=False, waits=True, reasons=[reason])
    thinking = config.model_copy(update={"policy": tokenizer.with_thought_tokens(config.policy)})
    evidence, verdict = _measure_and_judge(thinking, tokenizer, version, live, judged, earlier, embedding, progress)
    metrics = version.metrics | verdict.figures | EvidenceMetrics(evidence=evidence)
    metrics |= Metrics(reasons=verdict.reasons, judged_at=judged_at, waits_for=0)
    state = PolicyState.CANDIDATE if verdict.passed else PolicyState.REJECTED
    registry.record_verdict(version.name, state, metrics, "passed" if verdict.passed else "; ".join(verdict.reasons))
    write_text(path / "metrics.json", json.dumps(metrics.as_json(), indent=1, sort_keys=True))  # the report reads it
    if not verdict.passed:
        discard_weights(path)
    return Judgement(version.name, verdict.passed, waits=False, reasons=verdict.reasons)


def _find_obstacle(serving: ServingConfig, version: PolicyVersion, live: PolicyVersion) -> str | None:
    """Return why a version can no longer be judged, or None if it can."""
    if live.name != version.judged_against:
        return str(VerdictOutdated(version.name, version.judged_against, live.name))
    if not (Path(version.path) / "manifest.json").is_file():
        return "its files are gone"
    found = find_faults(Path(version.path), version.base_model, serving.max_lora_rank)
    if not found and fingerprint(Path(version.path)) != version.sha256:
        found = ["its weights are not those that were registered"]
    return found[0] if found else None


def _give_up_for(registry: PolicyRegistry, version: PolicyVersion, reason: str) -> Judgement:
    give_up(registry, version, reason)
    return Judgement(version.name, passed=False, waits=False, reasons=[reason])


def _measure_and_judge(
    config: Config,
    tokenizer: ChatTokenizer,
    version: PolicyVersion,
    live: PolicyVersion,
    judged: list[Experience],
    earlier: list[bool],
    embedding: Embedder | None,
    progress: Progress,
) -> tuple[Evidence, Verdict]:
    """Measure a version and the live one on the `judged` answers. The rest was measured by the version's run."""
    progress("measuring", 0, 1)
    silence_libraries()
    asked = choose_prompts(judged, config.gate.samples)
    policy, seed = config.policy, config.seed

    def measure(one: PolicyVersion) -> Measurement:
        model = load_served(policy, config.serving, one.base_model, one.weights)
        return measure_model(policy, seed, model, tokenizer, judged, asked)

    of_live, of_version = measure(live), measure(version)
    kept = _Measured.from_json(version.metrics.as_json()).evidence
    evidence = compare_with_live(config.rewards, seed, judged, [], of_live, of_version, embedding, kept)
    return evidence, judge(evidence, config.gate, seed, earlier)
