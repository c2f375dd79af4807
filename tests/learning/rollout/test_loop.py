"""The whole loop on the real vLLM: say, react, train, prove, swap, roll back. One server serves every test here."""

import asyncio
import contextlib
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from conftest import until

from bot import app
from bot.chat.dialogue import DialogueManager, ReplyOptions
from bot.config import PrivacyConfig, TrainingConfig
from bot.errors import DataError, ReplyInterrupted, ServerAsleep, ServingError, VerdictOutdated
from bot.serving.policy import Policy
from bot.serving.vllm_server import VllmServer
from bot.store.registry import BASE
from bot.types import Conversation, Feedback, FeedbackKind, Message, PolicyState, new_id
from learning.bench import overhead, simulated_people, simulation, simulation_figures, swap
from learning.judging.evaluation import answer_logprobs
from learning.judging.probe import mean_distance
from learning.models import toy
from learning.rollout.deployment import Deployment
from learning.rollout.loop import OnlineLearner


async def say(live, text: str, person: str = "ann", **details) -> object:
    place = await live.dialogue.open(Conversation("test", new_id()))
    # Single answers: people dislike hardly any that a reward head chose, and the gate needs those too.
    return await live.dialogue.respond(Message(place.id, person, text, **details), ReplyOptions(seed=1, candidates=1))


async def version_of(live, source: Path, seed: int, kind: str = "lora") -> str:
    """A candidate of random weights; they stay in `source` too."""
    config = live.config.model_copy(update={"training": TrainingConfig(weights=kind)})
    await asyncio.to_thread(swap.save_random_version, config, live.registry.get(BASE).base_model, source, seed)
    return swap.register_copy(live.registry, source).name


async def swapped_in(live, tmp_path: Path, seed: int, kind: str = "lora") -> str:
    """A version of random weights, live by the real deployment."""
    name = await version_of(live, tmp_path / f"weights-{seed}", seed, kind)
    await live.deployment.deploy(name)
    return name


async def test_a_reply_knows_what_made_it(live, tokenizer):
    heard = []
    place = await live.dialogue.open(Conversation("test", new_id()))
    turn = await live.dialogue.respond(Message(place.id, "ann", "hello"), ReplyOptions(heard.append, seed=3))
    assert "".join(heard) == turn.text
    assert list(turn.prompt_ids) == tokenizer.prompt_ids([{"role": "user", "content": "hello"}])
    assert tokenizer.hf.decode(turn.completion_ids, skip_special_tokens=True) == turn.text
    assert turn.completion_ids[-1] == tokenizer.hf.eos_token_id
    assert len(turn.logprobs) == len(turn.completion_ids)
    assert turn.policy_version == live.policy.version
    assert turn.sampling.seed == 3
    assert live.store.find_turn(turn.id) == turn


async def test_the_recorded_log_probabilities_are_those_of_the_trainer(live, demo_model):
    from transformers import AutoModelForCausalLM

    turn = await say(live, "tell me a joke")
    assert turn.policy_version == BASE
    model = AutoModelForCausalLM.from_pretrained(demo_model)
    (own,) = answer_logprobs(model, [(turn.prompt_ids, turn.completion_ids)])
    assert mean_distance(own.tolist(), turn.logprobs) < 1e-4
    (other,) = answer_logprobs(model, [(turn.prompt_ids[3:], turn.completion_ids)])
    assert mean_distance(other.tolist(), turn.logprobs) > 1e-3, "the check could not fail"


async def test_the_same_message_twice_is_answered_once(live):
    first = await say(live, "hello", event_id="event-1")
    message = Message(first.conversation_id, "ann", "hello", event_id="event-1")
    assert (await live.dialogue.respond(message)).id == first.id


async def test_an_answer_can_be_regenerated_and_the_first_one_is_marked(live):
    first = await say(live, "tell me a joke")
    second = await live.dialogue.regenerate(first.id, "ann", ReplyOptions(seed=2))
    assert second.replaces == first.id
    assert second.prompt_ids == first.prompt_ids
    (given,) = live.store.read_feedback_on([first.id])[first.id]
    assert given.kind == FeedbackKind.REGENERATE


async def test_feedback_on_a_turn_that_is_not_there_is_refused(live):
    with pytest.raises(DataError, match="no turn"):
        await live.dialogue.record_feedback(Feedback("nowhere", "ann", FeedbackKind.APPROVAL))


async def test_reactions_train_a_version_that_answers_next_and_is_taken_back(live):
    """The loop, once: DialogueManager -> feedback -> TRL -> gate -> probe -> swap -> the next answer -> rollback.

    Others spoke with this kibitz in other tests, and had other tastes. Only the people of this test consent.
    """
    rng = random.Random(0)
    config = live.config.model_copy(update={"privacy": PrivacyConfig(consent="asked")})
    people = [f"person{number}" for number in range(8)]
    for person in people:
        await app.make_desk(live).manage_consent("test", person, "on")

    together = asyncio.Semaphore(32)  # more prompts than vLLM reads in one step end its CPU engine, where they have seeds

    async def one(number: int) -> None:
        person = people[number % len(people)]
        async with together:
            turn = await say(live, rng.choice(toy.list_prompts())[0], person)
        kind = FeedbackKind.APPROVAL if simulated_people.emoji("", turn.text) > 0 else FeedbackKind.DISAPPROVAL
        await live.dialogue.record_feedback(Feedback(turn.id, person, kind, signal="test"))

    told: list[str] = []
    stages: list[str] = []
    await asyncio.gather(*(one(number) for number in range(192)))
    before = await say(live, "hello")
    learner = OnlineLearner(
        live.store, live.deployment, config, told.append, lambda stage, done, total: stages.append(stage)
    )
    outcome = await learner.learn_once()
    assert outcome.passed, outcome.reasons
    assert "train" in stages
    after = await say(live, "hello")
    assert (before.policy_version, after.policy_version) == (BASE, outcome.policy)
    assert await live.policy.admin.list_adapters() == {outcome.policy}
    assert live.registry.get(outcome.policy).state == PolicyState.LIVE
    live.registry.roll_back()  # as another process would: `kibitz rollback`
    await until(lambda: live.policy.version == BASE)
    assert (await say(live, "hello")).policy_version == BASE
    await until(lambda: live.registry.get(outcome.policy).state == PolicyState.RETIRED)


async def test_enough_new_reactions_start_a_run_by_themselves_and_a_failed_one_does_not_end_the_chat(live):
    told: list[str] = []
    learner = OnlineLearner(live.store, live.deployment, live.config, told.append)
    looks, look = 0, learner._read_counts

    def counted():
        nonlocal looks
        looks += 1
        return look()

    learner._read_counts = counted
    task = asyncio.create_task(learner.run())
    await until(lambda: looks >= 4)
    assert told == [], "what was learned from before is not learned from again"
    base = Path(live.registry.get(BASE).base_model)
    aside = base.with_name("aside")
    turn = await say(live, "hello")
    for number in range(live.config.learning.distil_every):
        await live.dialogue.record_feedback(Feedback(turn.id, f"user {number}", FeedbackKind.APPROVAL))
    base.rename(aside)  # training must fail: its base model is gone
    try:
        await until(lambda: any("training failed (the chat is not affected)" in text for text in told))
    finally:
        aside.rename(base)
        task.cancel()
    assert (await say(live, "hello")).finish_reason == "stop"


async def test_a_candidate_that_the_server_serves_differently_is_rejected(live, tmp_path):
    source = tmp_path / "weights"
    await asyncio.to_thread(swap.save_random_version, live.config, live.registry.get(BASE).base_model, source, 5)
    other = tmp_path / "other"
    await asyncio.to_thread(swap.save_random_version, live.config, live.registry.get(BASE).base_model, other, 6)
    shutil.copy(other / "probe.json", source / "probe.json")  # the trainer's figures are of other weights
    version = swap.register_copy(live.registry, source)
    before = live.policy.version
    with pytest.raises(ServingError, match="failed its probe"):
        await live.deployment.deploy(version.name)
    assert live.policy.version == before
    assert live.registry.get(version.name).state == PolicyState.REJECTED
    assert version.name not in await live.policy.admin.list_adapters()


async def test_a_version_is_proven_at_the_temperature_that_it_was_trained_for(live, tmp_path):
    """An operator may change policy.temperature: that must not make the live version fail its probe at the next start."""
    warm = live.config.model_copy(update={"policy": live.config.policy.model_copy(update={"temperature": 0.6})})
    base = live.registry.get_base().base_model
    await asyncio.to_thread(swap.save_random_version, warm, base, tmp_path / "warm", 41)
    version = swap.register_copy(live.registry, tmp_path / "warm")
    assert live.policy.config.temperature == 1.0
    await live.deployment.deploy(version.name)
    places = json.loads((Path(version.path) / "probe.json").read_text())
    assert {place["temperature"] for place in places} == {0.6}
    (Path(version.path) / "probe.json").write_text(json.dumps([{**place, "temperature": 1.0} for place in places]))
    with pytest.raises(ServingError, match="failed its probe"):  # the control
        await live.deployment._probe(live.registry.get(version.name))


async def test_a_version_whose_files_changed_after_it_was_registered_is_refused(live, tmp_path):
    sources = [tmp_path / "one", tmp_path / "two"]
    for seed, source in enumerate(sources):
        await asyncio.to_thread(swap.save_random_version, live.config, live.registry.get(BASE).base_model, source, seed)
    version = swap.register_copy(live.registry, sources[0])
    shutil.copy(sources[1] / "adapter_model.safetensors", version.path)
    with pytest.raises(ServingError, match="differ from those that were registered"):
        await live.deployment.deploy(version.name)


@pytest.mark.parametrize("kind", ["lora", "full"])
async def test_swaps_under_load_fail_and_mix_nothing(live, tokenizer, tmp_path, kind, monkeypatch):
    monkeypatch.setattr("bot.serving.policy.LULL_SECONDS", 0.5)
    sources = [tmp_path / "one", tmp_path / "two"]
    for seed, source in enumerate(sources):
        await version_of(live, source, seed, kind)
    figures = await swap.measure_swaps(live.deployment, tokenizer, sources, 2, 96, 8, lambda *_: None)
    assert (figures["swaps"], figures["failed"], figures["mixed"]) == (2, 0, 0)
    assert figures["requests"] >= 96


async def test_adapters_and_whole_weights_make_way_for_each_other(live, tmp_path):
    """Each is proven by its probe, which would not pass on the weights of another; what is taken back is served again."""
    adapter = await swapped_in(live, tmp_path, 31)
    assert live.policy.admin.weights_version == BASE
    whole = await swapped_in(live, tmp_path, 32, "full")
    assert (live.policy.admin.weights_version, (await say(live, "hello")).policy_version) == (whole, whole)
    with pytest.raises(ServingError, match=f"{BASE} is not served: the server has the weights of {whole}"):
        await live.policy.reply([1, 2, 3], version=BASE)
    other = await swapped_in(live, tmp_path, 33, "full")
    with pytest.raises(ServingError, match="failed its probe"):
        live.policy.admin.weights_version = whole  # the control: they are those of the other
        await live.deployment._probe(live.registry.get(whole))
    live.policy.admin.weights_version = other
    again = await swapped_in(live, tmp_path, 34)
    assert (live.policy.admin.weights_version, live.policy.version) == (BASE, again)
    for expected, weights in ((other, other), (whole, whole), (adapter, BASE)):
        live.registry.roll_back()
        await until(lambda expected=expected: live.policy.version == expected)
        assert live.policy.admin.weights_version == weights
        await live.deployment._probe(live.registry.get(expected))


async def test_whole_weights_that_fail_their_probe_give_way_to_those_before_and_replies_only_wait(live, tmp_path):
    before = await swapped_in(live, tmp_path, 41, "full")
    name = await version_of(live, tmp_path / "candidate", 42, "full")
    shutil.copy(tmp_path / "weights-41" / "probe.json", live.registry.get(name).path)  # the trainer's are of other weights
    talk = [asyncio.create_task(say(live, "hello")) for _ in range(16)]
    with pytest.raises(ServingError, match="failed its probe"):
        await live.deployment.deploy(name)
    assert {turn.policy_version for turn in await asyncio.gather(*talk)} == {before}
    assert (live.policy.admin.weights_version, live.policy.version) == (before, before)
    await live.deployment._probe(live.registry.get(before))
    assert live.registry.get(name).state == PolicyState.REJECTED


async def test_weights_are_not_changed_under_an_answer_that_does_not_end(live, monkeypatch):
    monkeypatch.setattr("bot.serving.policy.LULL_SECONDS", 0.05)
    goes_on = asyncio.Event()
    prompt = live.dialogue.tracker.tokenizer.prompt_ids([{"role": "user", "content": "tell me a joke"}])
    begun = asyncio.Event()

    async def slowly(text: str) -> None:
        begun.set()
        await goes_on.wait()

    busy = asyncio.create_task(live.policy.reply(prompt, on_text=slowly))
    await begun.wait()
    with pytest.raises(ServingError, match=r"still in flight after 0\.2 s"):
        async with live.policy.pause_replies(0.2):
            pytest.fail("an answer is in flight")
    goes_on.set()
    await busy
    async with live.policy.pause_replies(0.2):
        waiting = asyncio.create_task(live.policy.reply(prompt))
        await asyncio.sleep(0.2)
        assert not waiting.done()
    assert (await waiting).completion_ids, "the control: it only waited"


async def test_a_server_that_was_started_again_by_somebody_else_is_given_its_weights_again(live, tmp_path):
    name = await swapped_in(live, tmp_path, 51, "full")
    elsewhere = live.config.serving.model_copy(update={"url": live.policy.admin.url})
    deployment = Deployment(live.policy, live.registry, elsewhere, live.config.training, live.config.gate)
    assert not await deployment.follow_registry(), "nothing has changed"
    await live.policy.admin.replace_weights("default", live.registry.get(BASE).base_model)  # as a fresh one would be
    live.policy.admin.weights_version = name
    with pytest.raises(ServingError, match="failed its probe"):
        await deployment._probe(live.registry.get(name))
    assert await deployment.follow_registry()
    assert live.policy.version == name
    await deployment._probe(live.registry.get(name))
    adapter = await swapped_in(live, tmp_path, 52)
    await live.policy.admin.unload_adapter(adapter)
    assert await deployment.follow_registry()
    assert (await say(live, "hello")).policy_version == adapter


async def test_what_cannot_be_served_is_tried_again_later_and_later(live, tmp_path, monkeypatch):
    good = await swapped_in(live, tmp_path, 71)
    bad = live.registry.get(await version_of(live, tmp_path / "bad", 72))
    (Path(bad.path) / "manifest.json").unlink()
    tries, told, really = [], [], Deployment._find_faults
    monkeypatch.setattr(Deployment, "_find_faults", lambda self, version: tries.append(self) or really(self, version))
    sections = live.config.serving, live.config.training, live.config.gate
    watcher = Deployment(live.policy, live.registry, *sections, told.append)
    live.registry.promote(bad.name)
    task = asyncio.create_task(watcher.watch(0.02))
    await until(lambda: sum(one is watcher for one in tries) >= 2)
    await asyncio.sleep(1)
    task.cancel()
    live.registry.roll_back()
    assert sum(one is watcher for one in tries) < 12, "it could have been fifty"
    assert [f"{good} still answers" in text for text in told] == [True]
    assert (await say(live, "hello")).policy_version == good


async def test_a_running_kibitz_deploys_what_another_process_asks_for_and_no_outdated_candidate(live, tmp_path):
    """As `kibitz deploy` does, and what a crash between the end of a run and its deployment left behind."""
    wanted, outdated = [await version_of(live, tmp_path / str(seed), seed) for seed in (91, 92)]
    before = live.registry.get_live().name
    for name in (wanted, outdated):
        live.registry.request_deployment(name)
    await until(lambda: live.registry.get(outdated).state == PolicyState.REJECTED)
    assert live.registry.get_live().name == live.policy.version == wanted
    assert (await say(live, "hello")).policy_version == wanted
    later = await version_of(live, tmp_path / "93", 93)
    await live.deployment.rollback()
    with pytest.raises(VerdictOutdated):
        await live.deployment.deploy(later)
    assert live.registry.get_live().name == live.policy.version == before
    assert not {wanted, outdated, later} & await live.policy.admin.list_adapters()


async def test_a_server_that_keeps_its_weights_is_an_error_for_people(live, tmp_path, monkeypatch):
    name = await version_of(live, tmp_path / "candidate", 61, "full")
    live.policy.admin.can_replace_weights = False
    try:
        with pytest.raises(ServingError, match="does not allow its weights to be replaced"):
            await live.deployment.deploy(name)
    finally:
        await live.policy.admin.connect()
    assert live.policy.admin.can_replace_weights
    monkeypatch.delenv("VLLM_SERVER_DEV_MODE")
    serving, policy, data = live.config.serving, live.config.policy, live.config.data
    whole = VllmServer(serving, policy, TrainingConfig(weights="full"), data, "model")
    assert whole._environment()["VLLM_SERVER_DEV_MODE"] == "1"
    own = VllmServer(serving, policy, live.config.training, data, "model")
    assert "VLLM_SERVER_DEV_MODE" not in own._environment(), "not without need"


async def test_a_reload_under_one_name_is_caught(live, tokenizer, tmp_path):
    """Law 3's control: kibitz never does this; where somebody does, the check for mixed answers must see it."""
    name = await swapped_in(live, tmp_path, seed=11)
    prompts = swap.make_long_prompts(tokenizer, 8)
    expected = {name: await swap.ask_greedily(live.policy, name, prompts)}
    answers, _, _ = await swap.run_load(live.policy, iter(prompts), 4, lambda: None)
    limit = max(swap.compute_distances(answers, expected)) + 0.01
    assert limit < 0.1, "float32 rounds less than that"
    other = tmp_path / "weights-12"
    await asyncio.to_thread(swap.save_random_version, live.config, live.registry.get(BASE).base_model, other, 12)
    body = {"lora_name": name, "lora_path": str(other), "load_inplace": True}
    async with httpx.AsyncClient(base_url=live.policy.admin.url, timeout=300) as client:
        (await client.post("/v1/load_lora_adapter", json=body)).raise_for_status()
    answers, _, _ = await swap.run_load(live.policy, iter(prompts), 4, lambda: None)
    assert swap.count_mixed(answers, expected, limit) > 0
    with pytest.raises(ServingError, match="failed its probe"):
        await live.deployment._probe(live.registry.get(name))


async def test_a_server_that_is_not_there_is_an_error_for_people_and_a_broken_stream_keeps_what_was_said(live):
    nobody = Policy("http://127.0.0.1:9", live.config.policy)
    assert not await nobody.admin.is_ready(1)
    with pytest.raises(ServingError, match="did not answer"):
        await nobody.reply([1, 2, 3])
    await nobody.close()

    async def cut(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        chunk = b'data: {"id":"1","object":"text_completion","created":1,"model":"m","choices":'
        chunk += b'[{"index":0,"text":"Half an","logprobs":null,"finish_reason":null}]}\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + chunk)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(cut, "127.0.0.1", 0)
    broken = Policy(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", live.config.policy)
    with pytest.raises(ReplyInterrupted) as error:
        await broken.reply([1, 2, 3])
    assert error.value.text == "Half an"
    dialogue = DialogueManager(live.store, live.dialogue.tracker, broken)
    place = await dialogue.open(Conversation("test", new_id()))
    turn = await dialogue.respond(Message(place.id, "ann", "hello"))
    assert (turn.text, turn.finish_reason) == ("Half an", "interrupted")
    await broken.close()
    server.close()


async def test_overhead_is_measured_against_the_same_prompts(live, monkeypatch):
    monkeypatch.setattr(overhead, "LENGTH", 8)
    figures = await overhead.measure_overhead(live.dialogue, live.policy, 16, 1, 0, lambda *_: None)
    wanted = {"throughput_ratio_1", "throughput_ratio_16", "p50_added_ms_1", "p50_added_ms_16", "p99_added_ms_16"}
    assert wanted <= set(figures)
    assert all(figures[name] > 0 for name in wanted if name.startswith("throughput"))
    assert not any("candidates" in name for name in figures)
    figures = await overhead.measure_candidates(live.dialogue, [1, 3], 4, 1, 0, lambda *_: None)
    assert set(figures) == {f"candidates_3_{name}_ratio" for name in ("throughput", "first_text", "final_text")}
    assert min(figures.values()) > 0
    turns = live.store.find_turns_with_feedback()  # nobody judged these
    assert not any(turn.is_selected for turn in turns)


@pytest.mark.slow
async def test_a_simulation_judges_every_version_beside_a_frozen_control(live):
    learner = OnlineLearner(live.store, live.deployment, live.config)
    people = simulated_people.People(simulated_people.emoji, reaction_rate=1.0, noise=0.0, seed=0)
    shown: list[simulation.CurveRow] = []
    asked = simulated_people.read_prompts(is_toy=True)
    asked = replace(asked, held_out=asked.held_out[:8])
    parts = live.dialogue, live.policy, learner, live.selector
    play = simulation.Simulation(*parts, people, asked, lambda *_: None)
    rows = await play.run(rounds=1, messages=32, samples=1, show=shown.append)
    assert rows == shown
    figures = simulation_figures.compute_figures(play, "toy")
    assert figures["reactions"] >= 32
    assert figures["promoted"] == figures["versions"] - 1
    assert figures["refused_by_probe"] == 0
    assert not figures["promoted"] or figures["probe_distance"] < figures["probe_from_parent"] / 2
    for name, most in (
        ("first_utility", 1),
        ("last_utility", 1),
        ("frozen_utility", 1),
        ("utility_gain", 2),
        ("last_served_utility", 1),
        ("served_gain", 2),
    ):
        assert -most <= figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"] <= most


@pytest.mark.usefixtures("owns_vllm")
async def test_a_server_that_dies_is_restarted_and_serves_the_live_version_again(live, tmp_path):
    """Last in this file: it ends the vLLM that the others use, and waits for its successor."""
    name = await swapped_in(live, tmp_path, seed=21)
    process = live.server._process
    process.kill()
    await until(lambda: live.server._process not in (process, None))
    async with asyncio.timeout(600):
        while not (
            await live.policy.admin.is_ready(5)
            and live.policy.version == name
            and name in await live.policy.admin.list_adapters()
        ):
            await asyncio.sleep(0.5)
    assert (await say(live, "hello")).policy_version == name


async def test_a_connection_that_the_server_may_be_closing_is_not_used_again(live, monkeypatch):
    """vLLM closes what is idle for 5 s; a request that meets that moment fails, and with several such the next try too."""
    connections = 0

    async def serve(reader, writer):
        nonlocal connections
        connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head).group(1)))
                event = b'data: {"choices":[{"index":0,"text":"Hi","logprobs":null,"finish_reason":"stop"}]}\n\n'
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(event) + event)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    for idle_seconds, wanted in ((0.05, 2), (600.0, 1)):  # the second is the control: it is used again
        monkeypatch.setattr("bot.serving.admin.IDLE_SECONDS", idle_seconds)
        policy = Policy(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", live.config.policy)
        connections = 0
        assert (await policy.reply([1, 2, 3])).text == "Hi"
        await asyncio.sleep(0.2)
        assert (await policy.reply([1, 2, 3])).text == "Hi"
        assert connections == wanted
        await policy.close()
    server.close()


async def test_while_vllm_sleeps_nobody_is_answered_and_what_it_serves_is_proven_afterwards(live, tmp_path, monkeypatch):
    """vLLM's CPU build takes the requests and keeps its memory: what kibitz makes of them is the same."""
    monkeypatch.setattr("bot.serving.policy.LULL_SECONDS", 0.5)
    name = await swapped_in(live, tmp_path, 11)
    told: list[str] = []
    monkeypatch.setattr(live.deployment, "announce", told.append)
    async with live.deployment.sleeping():
        with pytest.raises(ServerAsleep, match="ask again in a few minutes"):
            await say(live, "hello")
        assert live.policy.is_asleep
    assert (await say(live, "hello")).policy_version == name
    assert told == [
        "vLLM sleeps while a version is trained; nobody is answered until the training ends",
        f"vLLM is awake; {name} answers again",
    ]
    # The control: other weights under its name are noticed, and nobody is answered by them.
    other = tmp_path / "other"
    await version_of(live, other, 12)
    async with live.deployment.sleeping():
        await live.policy.admin.unload_adapter(name)
        await live.policy.admin.load_adapter(name, str(other))
    assert any(f"{name} is not the same after sleeping" in text for text in told), told
    await until(lambda: live.policy.version == name)  # the watcher loads what was registered, and proves it
    await live.deployment.rollback()


async def test_a_run_that_fails_wakes_vllm(live, monkeypatch):
    monkeypatch.setattr("bot.serving.policy.LULL_SECONDS", 0.5)
    with pytest.raises(ZeroDivisionError):
        async with live.deployment.sleeping():
            raise ZeroDivisionError
    assert (await say(live, "hello")).finish_reason == "stop"
