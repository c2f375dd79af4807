"""The slices of the learning benchmark: each is found by its name, and what is no slice is refused."""

import pytest

from bot.config import Config
from bot.errors import ConfigError
from learning.bench.slices import find_slice


@pytest.mark.parametrize(
    ("part", "arms"), [("few", None), ("corrections", None), ("hacking", None), ("ci", None), ("full", "kto,frozen")]
)
def test_every_slice_is_found(part, arms):
    assert callable(find_slice(part, None, arms, Config(), is_toy=True).run)


@pytest.mark.parametrize(
    ("part", "arms", "wanted"),
    [
        ("many", None, "--slice has value 'many'; choose one of few, corrections, hacking, ci, rates, regimes, full"),
        ("few", "kto", "--slice few has its own arms; leave --arms out"),
        ("hacking", "kto", "--slice hacking has its own arms; leave --arms out"),
        ("ci", "ppo", "--arms has value 'ppo'"),
    ],
)
def test_what_is_no_slice_is_refused(part, arms, wanted):
    with pytest.raises(ConfigError, match=wanted):
        find_slice(part, None, arms, Config(), is_toy=True)
