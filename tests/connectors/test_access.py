"""Who may talk, where, and how fast."""

import pytest

from bot.config import AccessConfig
from connectors.access import Access, MovingWindow


@pytest.mark.parametrize(
    ("lists", "admitted"),
    [
        ({}, True),
        ({"deny_users": ["ann"]}, False),
        ({"deny_users": ["bob"]}, True),
        ({"allow_users": ["bob"]}, False),
        ({"allow_users": ["bob", "ann"]}, True),
        ({"allow_users": ["bob"], "allow_roles": ["friends"]}, True),
        ({"allow_roles": ["staff"]}, False),
        ({"deny_roles": ["friends"], "allow_users": ["ann"]}, False),
        ({"allow_channels": ["lobby"]}, True),
        ({"allow_channels": ["attic"]}, False),
        ({"deny_channels": ["lobby"], "allow_channels": ["lobby"]}, False),
    ],
)
def test_a_denial_beats_an_allowance_and_an_empty_list_allows_all(lists, admitted):
    assert Access(AccessConfig(**lists)).admits("ann", "lobby", ["friends"]) == admitted


@pytest.mark.parametrize(
    ("lists", "admitted"),
    [
        ({"allow_channels": ["lobby"]}, True),
        ({"allow_channels": ["thread"]}, True),
        ({"allow_channels": ["attic"]}, False),
        ({"deny_channels": ["lobby"]}, False),
        ({"deny_channels": ["lobby"], "allow_channels": ["thread"]}, False),
        ({"deny_channels": ["thread"]}, False),
        ({"deny_channels": ["attic"]}, True),
    ],
)
def test_a_thread_belongs_to_its_channel(lists, admitted):
    assert Access(AccessConfig(**lists)).admits("ann", "thread", parent="lobby") == admitted


def test_each_user_has_a_limit_of_their_own_on_each_platform():
    access = Access(AccessConfig(messages_per_minute=3))
    assert [access.may_write("discord", "ann") for _ in range(5)] == [True, True, True, False, False]
    assert access.may_write("discord", "bob")
    assert access.may_write("slack", "ann")


def test_a_source_has_a_limit_of_its_own_whatever_users_it_names():
    access = Access(AccessConfig(messages_per_minute=2, opinions_per_minute=1))
    through = ["token app", "address 192.0.2.1"]
    assert sum(access.may_write("web", f"app/{number}", through) for number in range(1000)) == 20
    assert sum(access.may_judge("web", f"app/{number}", through) for number in range(1000)) == 10
    assert not access.may_write("web", "other", ["token other", "address 192.0.2.1"]), "the address is the same"
    assert access.may_write("web", "other", ["token other", "address 192.0.2.2"])
    assert sum(access.may_write("web", f"app/{number}") for number in range(1000)) == 1000  # the control


def test_who_is_refused_uses_up_nothing_of_their_source():
    access = Access(AccessConfig(messages_per_minute=1, source_messages_per_minute=3))
    assert [access.may_write("web", "ann", ["token app"]) for _ in range(5)] == [True, False, False, False, False]
    assert [access.may_write("web", user, ["token app"]) for user in ("bob", "cleo", "dan")] == [True, True, False]


def test_a_window_moves_and_forgets_who_acted_least_lately(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("connectors.access.time.monotonic", lambda: clock[0])
    window = MovingWindow(2, seconds=10, keys=2)
    found = []
    for clock[0] in (0, 6, 9, 11, 15, 17):
        found.append(window.try_acquire("ann"))
    assert found == [True, True, False, True, False, True]
    assert [window.try_acquire(name) for name in ("bob", "cleo")] == [True, True]
    assert window.try_acquire("ann")  # forgotten meanwhile: memory is bounded
