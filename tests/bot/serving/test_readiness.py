"""Whether kibitz can answer now: what is looked at, and that asking costs nothing."""

import asyncio
import os
import sqlite3

from conftest import until
from fake_vllm import FakeVllm

from bot.serving import readiness
from bot.serving.policy import Policy
from bot.serving.readiness import Readiness, make_checks


async def test_readiness_says_what_is_wrong_with_vllm_the_database_or_the_disk(config, database, tokenizer, monkeypatch):
    monkeypatch.setattr(readiness, "CHECK_SECONDS", 300.0)  # as long as this machine needs
    vllm = FakeVllm(tokenizer)
    policy = Policy(await vllm.start(), config.policy)
    found = Readiness(make_checks(policy, database, config.data))
    assert found.list_faults() == ["kibitz has not checked itself for 10 s"]
    await found.check()
    assert found.list_faults() == []

    full = config.data / f".writable-{os.getpid()}"
    full.symlink_to("/dev/full")  # the real error of a full disk
    await found.check()
    assert len(found.list_faults()) == 1
    assert "No space left on device" in found.list_faults()[0]
    await found.check()
    assert found.list_faults() == [], "it recovers by itself"

    policy.is_asleep, asked = True, len(vllm.paths)
    await found.check()
    assert found.list_faults() == ["vLLM sleeps while a version is trained"]
    assert len(vllm.paths) == asked
    policy.is_asleep = False
    await vllm.stop()
    await found.check()
    assert found.list_faults() == ["vLLM generates nothing"]

    database.engine.dispose()
    with sqlite3.connect(config.data / "kibitz.db") as opened:
        opened.execute("ALTER TABLE conversations RENAME TO elsewhere")
    opened.close()
    await found.check()
    assert any("the database fails" in fault and "\n" not in fault for fault in found.list_faults())
    await policy.close()


async def test_what_does_not_answer_is_a_fault_and_an_old_look_is_none(monkeypatch):
    monkeypatch.setattr(readiness, "CHECK_SECONDS", 0.05)
    found = Readiness({"the disk": asyncio.Event().wait, "the rest": lambda: asyncio.sleep(0)})
    await found.check()
    assert found.list_faults() == ["the disk did not answer within 0.05 s"]
    monkeypatch.setattr(readiness, "MAX_AGE_SECONDS", 0.0)
    assert found.list_faults() == ["kibitz has not checked itself for 0 s"]


def test_a_look_is_never_older_than_it_may_be():
    assert readiness.PAUSE_SECONDS + readiness.CHECK_SECONDS < readiness.MAX_AGE_SECONDS <= 10


async def test_who_asks_looks_at_nothing(monkeypatch):
    monkeypatch.setattr(readiness, "PAUSE_SECONDS", 0.01)
    looks = 0

    async def count() -> None:
        nonlocal looks
        looks += 1

    found = Readiness({"all": count})
    assert found.list_faults()
    assert looks == 0
    watching = asyncio.create_task(found.watch())
    await until(lambda: looks >= 2)  # the control: it is looked at in the background
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
