"""Numbers and nouns in messages for people."""

import pytest

from bot.store.backups import RestoreReport
from bot.store.forgetting import ErasureCounts
from bot.wording import count_noun


@pytest.mark.parametrize(
    ("count", "told"), [(0, "0 versions"), (1, "1 version"), (2, "2 versions"), (1000, "1,000 versions")]
)
def test_a_noun_is_in_the_plural_unless_there_is_one(count, told):
    assert count_noun(count, "version") == told


def test_a_noun_may_have_a_plural_of_its_own():
    assert (count_noun(1, "reply", "replies"), count_noun(2, "reply", "replies")) == ("1 reply", "2 replies")


def test_what_is_forgotten_is_counted_in_words_that_fit_the_numbers():
    assert str(ErasureCounts(1, 2, 1, 0)) == "gone: 1 message, 2 answers, 1 opinion and 0 policy versions"
    assert "1 person or message" in str(RestoreReport(1, []))
    assert "2 people and messages" in str(RestoreReport(2, []))
