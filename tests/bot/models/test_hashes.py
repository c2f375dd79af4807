"""Hashes of a model's files: a model that is as kibitz wrote it is not checked again, and every other one is."""

import shutil
import subprocess
import sys

import pytest

from bot.models import hashes
from bot.models.hashes import has_written_files, write_hashes

PREPARE = """
import sys
from bot.config import load
from learning.training.choice import prepare_model
prepare_model(load(data_dir=sys.argv[1], policy={"model": sys.argv[2]}), lambda text: None)
print("torch" in sys.modules)
"""


def test_files_that_are_missing_changed_or_never_hashed_are_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert not has_written_files(tmp_path), "nobody hashed them"
    write_hashes(tmp_path)
    assert has_written_files(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert not has_written_files(tmp_path)
    (tmp_path / "config.json").unlink()
    assert not has_written_files(tmp_path)
    assert not has_written_files(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "[]", "null", '"text"', "{}", '{"config.json": 1}'])
def test_hashes_that_cannot_be_read_vouch_for_nothing(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / hashes.FILE).write_text(content)
    assert not has_written_files(tmp_path)


@pytest.mark.parametrize("is_changed", [False, True])
def test_a_model_that_kibitz_made_starts_without_torch(tmp_path, demo_model, is_changed):
    model = shutil.copytree(demo_model, tmp_path / "model")
    if is_changed:  # the control
        (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "data"), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(is_changed)
