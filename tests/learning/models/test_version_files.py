"""The files of a version: what is sound is taken, and nothing else reaches a server."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from bot.config import Config
from learning.bench.swap import save_random_version
from learning.models.version_files import find_faults, find_weights_folder, fingerprint, is_whole


@pytest.fixture(scope="module")
def sound(demo_model, tmp_path_factory):
    """A version of each kind."""
    found = {}
    for kind in ("lora", "full"):
        found[kind] = tmp_path_factory.mktemp("versions") / kind
        save_random_version(Config(training={"weights": kind}), demo_model, found[kind], seed=0)
    return found


def _file(directory):
    (found,) = find_weights_folder(directory).glob("*.safetensors")
    return found


def _truncate(directory):
    _file(directory).write_bytes(_file(directory).read_bytes()[:-100])


def _weights(change):
    def apply(directory):
        from safetensors.numpy import load_file, save_file

        save_file(change(load_file(_file(directory))), _file(directory))

    return apply


def _setting(**values):
    def apply(directory):
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


OF_ADAPTER = {
    "truncated": (_truncate, "cannot be read"),
    "pickle": (lambda d: (d / "adapter_model.bin").write_bytes(b"x"), "pickle"),
    "missing": (lambda d: (d / "adapter_config.json").unlink(), "is missing"),
    "link": (lambda d: (d / "more").symlink_to("/etc/hosts"), "is a link"),
    "rank": (_setting(r=64), "rank 64 is above"),
    "dora": (_setting(use_dora=True), "use_dora"),
    "modules": (_setting(modules_to_save=["lm_head"]), "modules_to_save"),
    "base": (
        _weights(
            lambda t: {n: np.repeat(v, 2, 1) if n.endswith("1.mlp.up_proj.lora_A.weight") else v for n, v in t.items()}
        ),
        "made for another base model, whose model.layers.1.mlp.up_proj has other dimensions",
    ),
    "nan": (_weights(lambda t: {name: value * np.nan for name, value in t.items()}), "not finite"),
    "zero": (_weights(lambda t: {name: value * 0 for name, value in t.items()}), "all weights are zero"),
    "half": (_weights(lambda t: dict(list(t.items())[1:])), "half of a LoRA pair"),
    "layers": (_weights(lambda t: {n: v for n, v in t.items() if ".layers.1." not in n}), "layers are missing"),
}


OF_WHOLE = {
    "truncated": (_truncate, "cannot be read"),
    "pickle": (lambda d: (d / "model" / "model.bin").write_bytes(b"x"), "pickle"),
    "link": (lambda d: (d / "model" / "more").symlink_to("/etc/hosts"), "is a link"),
    "missing": (
        _weights(lambda t: {n: v for n, v in t.items() if "layers.1.mlp.up" not in n}),
        "up_proj.weight: is missing",
    ),
    "shape": (_weights(lambda t: {n: v[:-1] if "layers.1.mlp.up" in n else v for n, v in t.items()}), "another shape"),
    "more": (_weights(lambda t: {**t, "model.layers.9.mlp.up_proj.weight": np.ones(2)}), "another shape"),
}
FAULTS = [("lora", name, *fault) for name, fault in OF_ADAPTER.items()]
FAULTS += [("full", name, *fault) for name, fault in OF_WHOLE.items()]


def test_sound_weights_have_no_faults_and_a_kind_and_a_name_of_their_own(sound, demo_model):
    for kind, directory in sound.items():
        assert find_faults(directory, demo_model, max_rank=16) == []
        assert is_whole(directory) == (kind == "full")
        assert fingerprint(directory) == hashlib.sha256(_file(directory).read_bytes()).hexdigest()


def test_an_adapter_is_sound_wherever_its_base_model_is_now(sound, demo_model, tmp_path):
    moved = shutil.copytree(demo_model, tmp_path / "under another name")
    assert find_faults(sound["lora"], str(moved), max_rank=16) == []


def test_of_a_base_model_that_is_no_folder_the_layers_are_looked_at(sound, tmp_path):
    directory = tmp_path / "version"
    shutil.copytree(sound["full"], directory)
    assert find_faults(directory, "somebody/model", max_rank=16) == []
    _weights(lambda t: {n: v for n, v in t.items() if ".layers.1." not in n})(directory)
    assert find_faults(directory, "somebody/model", max_rank=16) == ["some layers are missing"]


@pytest.mark.parametrize(("kind", "fault", "spoil", "wanted"), FAULTS, ids=[f"{one[0]}-{one[1]}" for one in FAULTS])
def test_unsound_weights_are_refused_before_a_server_sees_them(sound, demo_model, tmp_path, kind, fault, spoil, wanted):
    directory = tmp_path / "version"
    shutil.copytree(sound[kind], directory)
    spoil(directory)
    assert any(wanted in found for found in find_faults(directory, demo_model, max_rank=16))
