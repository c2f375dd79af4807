"""The files of reward heads: read as they were written, or refused with one line."""

import contextlib
import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bot import output_files
from bot.errors import DataError
from bot.store.forgetting import remove_heads
from learning.data.experience import Experience
from learning.data.feature_space import FeatureExtractor
from learning.judging.taught_head import TaughtHead, fit_head
from learning.models import toy
from learning.rollout import heads
from learning.rollout.heads import HeadFile, list_heads, locate_heads, read_head, save_head

WORD = "zyxquon"


def make_head(extractor: FeatureExtractor, seed: int = 0) -> TaughtHead:
    """Fit a head to the reactions of two people who like answers with an emoji, and give one of them it as their own."""
    rng = random.Random(seed)
    said = []
    for number in range(30):
        style = rng.choice(toy.STYLES)
        one = Experience(f"{number}", "", (), (), None, 1.0 if style.emoji else -1.0, (), opinion_holders=("ann", "bob"))
        said.append(replace(one, answer=f"{WORD} {toy.compose_answer(rng.choice(toy.INTENTS), style)}"))
    found = fit_head(said, (), extractor, 1.0)
    assert found is not None
    return replace(found, own={"ann": found.head})


@pytest.fixture(params=[True, False], ids=["with an embedder", "without an embedder"])
def head(request) -> TaughtHead:
    return make_head(FeatureExtractor(request.getfixturevalue("embedder") if request.param else None))


def test_a_head_is_read_as_it_was_written_and_predicts_the_same(head, tmp_path):
    directory = locate_heads(tmp_path)
    save_head(head, directory)
    file = directory / f"{head.name}.json"
    again = read_head(file)
    assert (again.name, again.teachers) == (head.name, ("ann", "bob"))
    places = np.random.default_rng(0).normal(size=(5, len(head.space.names)))
    assert (again.head.predict(places)[0] == head.head.predict(places)[0]).all()
    assert set(again.own) == {"ann"}
    assert (again.own["ann"].predict(places)[0] == head.own["ann"].predict(places)[0]).all()
    [listed] = list_heads(directory)
    assert listed == HeadFile(head.name, listed.written_at, 2, head.head.e_value)
    written = file.stat()
    save_head(again, directory)
    assert file.stat() == written, "a file never changes"
    assert file.stat().st_mode & 0o077 == 0, "only its owner may read who taught it"


@pytest.fixture(scope="module")
def plain() -> TaughtHead:
    """Return a head without an embedder, which is made at once."""
    return make_head(FeatureExtractor(None))


def test_a_file_holds_numbers_and_the_ids_of_teachers_and_no_word_of_an_answer(plain, tmp_path):
    save_head(plain, tmp_path)
    [file] = tmp_path.iterdir()
    assert WORD not in file.read_text()
    assert "ann" in file.read_text(), "the control"

    def texts(value: object) -> set[str]:
        if isinstance(value, dict):
            return set().union(*map(texts, value.values()))
        return set().union(*map(texts, value)) if isinstance(value, list) else {value} & {str(value)}

    assert texts(json.loads(file.read_text())) == {"ann", "bob", *plain.space.names}


DAMAGES = {
    "empty": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "no JSON": lambda text: "head",
    "bytes": lambda text: "\ufffd\0",
    "a list": lambda text: "[]",
    "a number": lambda text: "5",
    "nothing in it": lambda text: "{}",
    "nulls": lambda text: '{"head": null, "space": null, "teachers": null}',
    "a number beyond all": lambda text: text.replace('"mean": [', f'"mean": [{10**400}, ', 1),
    "very deep": lambda text: "[" * 100_000,
    "a teacher less": lambda text: text.replace('"ann", ', ""),
    "another e-value": lambda text: text.replace('"e_value": ', '"e_value": 1'),
    "a place without a component": lambda text: text.replace('"centre": [', '"centre": [0.5, ', 1),
    "texts as means": lambda text: text.replace('"sd": [', '"sd": ["a", ', 1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_edited_file_is_refused_with_one_line_and_the_others_are_listed(damage, plain, tmp_path):
    whole, other = plain, make_head(FeatureExtractor(None), seed=1)
    save_head(whole, tmp_path)
    save_head(other, tmp_path)
    file = tmp_path / f"{whole.name}.json"
    text = file.read_text()
    assert damage(text) != text
    file.write_text(damage(text))
    with pytest.raises(DataError, match=f"{whole.name}.json: .*; delete it, a new one is fitted") as refused:
        read_head(file)
    assert len(str(refused.value).splitlines()) == 1
    found = {type(one): one for one in list_heads(tmp_path)}
    assert found[HeadFile].name == other.name
    assert str(found[DataError]) == str(refused.value)
    file.write_text(text)
    assert read_head(file).name == whole.name, "the control"


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_put_into_a_file_it_is_as_it_was_or_refused(plain, tmp_path, data):
    values = plain.as_json()
    spoiled = values[data.draw(st.sampled_from(["head", "space"]))]
    anything = st.recursive(st.none() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=5)
    spoiled[data.draw(st.sampled_from(sorted(spoiled)))] = data.draw(anything)
    file = tmp_path / f"{plain.name}.json"
    file.write_text(json.dumps(values))
    with contextlib.suppress(DataError):
        assert read_head(file).as_json() == plain.as_json()


def test_a_file_that_is_not_there_or_cannot_be_written_is_told_in_one_line(plain, tmp_path):
    assert list(list_heads(tmp_path / "none")) == []
    with pytest.raises(DataError, match="is no reward head"):
        read_head(tmp_path / "head-1.json")
    (tmp_path / f"{plain.name}.json.unfinished").mkdir()
    (tmp_path / "file").touch()
    for directory in (tmp_path, tmp_path / "file"):
        with pytest.raises(DataError, match="cannot be written"):
            save_head(plain, directory)


def test_what_is_forgotten_while_a_head_is_written_leaves_no_file_and_no_error(plain, tmp_path, monkeypatch):
    def write_while_somebody_is_forgotten(path, text):
        with output_files.replace(path) as unfinished:
            unfinished.write_text(text)
            assert list(tmp_path.iterdir()) == [unfinished]
            remove_heads(tmp_path)

    monkeypatch.setattr(heads, "write_text", write_while_somebody_is_forgotten)
    save_head(plain, tmp_path)
    assert list(list_heads(tmp_path)) == []


def test_only_the_newest_files_are_kept_and_forgetting_removes_all(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "KEPT", 2)
    extractor, names = FeatureExtractor(None), []
    for seed in range(4):
        head = make_head(extractor, seed)
        save_head(head, tmp_path)
        names.append(head.name)
        os.utime(tmp_path / f"{head.name}.json", (seed, seed))
    assert [one.name for one in list_heads(tmp_path)] == names[:1:-1]
    (tmp_path / f"{names[0]}.json.unfinished").touch()  # as a crash leaves it
    (tmp_path / "notes.txt").touch()
    remove_heads(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
