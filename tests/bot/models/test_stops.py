"""An answer ends before the texts that a client names."""

from hypothesis import given
from hypothesis import strategies as st

from bot.models.stops import StopFilter


def shown(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    found = StopFilter(stops)
    text = "".join(found.add(piece) for piece in pieces)
    return text + found.flush(), found.is_hit


def test_an_answer_ends_before_the_first_stop_and_one_without_stays_whole():
    assert shown(["one, tw", "o, three"], ["two", "three"]) == ("one, ", True)
    assert shown(["one, tw"], ["two"]) == ("one, tw", False)
    assert shown(["a", "b", "c"], ["abc", "b"]) == shown(["abc"], ["abc", "b"]) == ("a", True)


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3), st.data())
def test_how_an_answer_is_cut_into_pieces_makes_no_difference(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    said, is_hit = shown(pieces, stops)
    assert (said, is_hit) == shown([text], stops)
    assert text.startswith(said)
    assert is_hit == any(stop in text for stop in stops)
    assert not any(stop in said for stop in stops)


def test_nothing_that_can_be_shown_is_kept_back():
    found = StopFilter(["\n\n"])
    assert found.add("hello ") == "hello "
    assert found.add("you\n") == "you"
    assert found.add("there") == "\nthere"
