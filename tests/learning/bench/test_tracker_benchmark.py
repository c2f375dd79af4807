"""The benchmark of the tracker: what it measures, and that it would notice a leak."""

import pytest

from bot.config import DialogueConfig
from bot.errors import ConfigError
from bot.memory.embedder import Embedder
from bot.memory.recall import load_retrieval_weights
from bot.memory.scope import Memory
from bot.store.conversations import ConversationStore
from learning.bench import tracker


@pytest.mark.parametrize("scope", ["own", "wide"])
async def test_the_benchmark_of_the_tracker_asks_one_conversation_a_mention_and_counts_what_leaks(
    embedder, tokenizer, monkeypatch, scope
):
    monkeypatch.setattr(tracker, "SIZES", {"1e3": 400})
    monkeypatch.setattr(tracker, "CHANNELS", {"2k": 60})
    monkeypatch.setattr(tracker, "SMALL", 20)
    monkeypatch.setattr(tracker, "QUESTIONS", 80)
    if scope == "wide":  # the control: a memory that sees all channels
        monkeypatch.setattr("bot.memory.scope.compute_scope", lambda *channel: 0)
        monkeypatch.setattr("bot.store.tables.compute_scope", lambda *channel: 0)
        monkeypatch.setattr(
            Memory, "find_visible", lambda self, place, ids: ConversationStore(self.database).find_messages(ids)
        )
    told: list[tuple[str, int, int]] = []
    own = Embedder(embedder.name, embedder._data)  # the benchmark closes its own
    figures = await tracker.measure(own, tokenizer, load_retrieval_weights(), ["1e3", "2k"], lambda *one: told.append(one))
    assert (figures.pop("leaks") > 0) == (scope == "wide")
    assert set(figures) == {
        *("added_p50_ms_1e3", "added_p99_ms_1e3", "file_mb_1e3", "memory_mb_1e3", "inserts_per_s"),
        *("first_message_s_2k", "later_message_p99_ms_2k", "delete_message_s_2k", "later_message_p99_ratio_2k"),
    }
    assert all(value > 0 for name, value in figures.items() if not name.startswith("added"))
    assert [(done, total) for _, done, total in told] == [(400, 400), (40, 40), (120, 120)]


def test_each_size_of_the_benchmark_is_measured_in_a_process_of_its_own(config, monkeypatch, tmp_path):
    told: list[tuple[str, int, int]] = []
    model = config.policy.model
    plain = DialogueConfig(embedder="none")
    figures = tracker.measure_apart(config.policy, plain, config.data, model, ["1e3"], lambda *one: told.append(one))
    assert told[-1][1:] == (1000, 1000)
    assert figures["leaks"] == 0
    assert 0 < figures["memory_mb_1e3"] < 400, "the libraries of training are not loaded there"
    wrong = DialogueConfig(embedder="/nowhere/model")
    with pytest.raises(ConfigError, match=r"dialogue\.embedder"):
        tracker.measure_apart(config.policy, wrong, config.data, model, ["1e3"], lambda *_: None)
    wrong = DialogueConfig(embedder="none", retrieval_weights="/nowhere/weights")  # read only in that process
    with pytest.raises(ConfigError, match=r"dialogue\.retrieval_weights"):
        tracker.measure_apart(config.policy, wrong, config.data, model, ["1e3"], lambda *_: None)
