"""Models that cannot be served or trained: the demo policy with one thing broken, and one line for each."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bot import model_check
from bot.accelerator import GIB, Card
from bot.architectures import is_served, is_trained, takes_adapters, vllm_table
from bot.config import Config, load
from bot.errors import ConfigError
from bot.model_check import check_disk, check_download, check_memory, check_model, explain_refusal
from bot.model_shape import read_shape

ASKED = [
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "GPT2LMHeadModel",
    "BloomForCausalLM",
]


@pytest.fixture
def model(demo_model, tmp_path) -> Path:
    """A copy of the demo policy, to break."""
    return Path(shutil.copytree(demo_model, tmp_path / "model"))


def configured(model: Path, **keys) -> Config:
    return load(data_dir=str(model.parent / "data"), policy={"model": str(model)} | keys.pop("policy", {}), **keys)


def change(file: Path, **values: object) -> None:
    """Set or (None) remove keys of a JSON file."""
    settings = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def refused(model: Path, wanted: str, **keys) -> None:
    with pytest.raises(ConfigError, match=wanted) as error:
        check_model(configured(model, **keys), str(model))
    assert "\n" not in str(error.value)
    assert ";" in str(error.value), "it says what to do"


def test_the_demo_policy_is_served_and_trained_here(model):
    check_model(configured(model), str(model))


def test_weights_that_are_gone_or_cut_off(model):
    file = next(model.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    refused(model, r"model\.safetensors cannot be read .*download it again")
    file.unlink()
    refused(model, "there are no weights")


def test_a_config_that_says_nothing(model):
    change(model / "config.json", hidden_size=None)
    refused(model, r"config\.json cannot be used")


def test_an_architecture_that_transformers_does_not_train(model):
    change(model / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])
    refused(model, "model_type 't5', of which the installed transformers has no decoder")


def test_an_architecture_that_vllm_serves_without_adapters(model):
    change(model / "config.json", architectures=["GPT2LMHeadModel"])
    refused(model, "architecture 'GPT2LMHeadModel', on which the installed vLLM serves no LoRA")
    url = {"url": "http://127.0.0.1:1"}
    check_model(configured(model, serving=url), str(model))  # the server that is there knows what it serves


def test_an_architecture_that_vllm_does_not_know(model):
    change(model / "config.json", architectures=["NobodysForCausalLM"])
    refused(model, "architecture 'NobodysForCausalLM', which the installed vLLM does not serve")


def test_a_context_that_is_longer_than_the_model_reads(model):
    refused(model, "reads 4096 tokens; lower policy.context_tokens to 3968", policy={"context_tokens": 8000})


def test_a_tokenizer_without_a_chat_template_and_with_one_that_fails(model):
    (model / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    refused(model, "chat template")
    (model / "chat_template.jinja").write_text("{% broken")
    refused(model, "chat template")
    (model / "chat_template.jinja").unlink()
    refused(model, "chat template")


def test_a_tokenizer_that_has_grown(model):
    file = next(model.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name] = tensors[name][:-100].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    refused(model, r"tokenizer has \d+ tokens, its embedding \d+ rows; take the tokenizer")


def test_float32_on_a_gpu_and_cards_that_are_small_or_full(model, monkeypatch):
    monkeypatch.setattr("bot.vllm_server.has_gpu", lambda: True)
    monkeypatch.setattr("bot.vllm_server.read_card", lambda: None)
    monkeypatch.setattr(model_check, "read_card", lambda: Card("a GPU", 8 * GIB, 8 * GIB))
    assert check_model(configured(model), str(model)) is not None
    refused(model, "float32", serving={"dtype": "float32"})
    monkeypatch.setattr(model_check, "read_card", lambda: Card("a GPU", 8 * GIB, GIB))
    refused(model, "the GPU has 1.0 GiB of 8.0 GiB free")
    monkeypatch.setattr(model_check, "read_card", lambda: Card("a GPU", 2 * GIB, 2 * GIB))
    refused(model, r"to be served, and the GPU has 2\.0 GiB")


def test_a_model_that_is_larger_than_the_memory(model, monkeypatch):
    monkeypatch.setattr(model_check, "free_memory", lambda: 2**20)
    with pytest.raises(ConfigError, match=r"needs 0\.0 GiB of memory .*take a smaller model"):
        check_memory(configured(model), str(model), read_shape(str(model)))


def test_too_little_disk(model, monkeypatch):
    monkeypatch.setattr(model_check, "LEAST_DISK", 2**60)
    with pytest.raises(ConfigError, match=r"of disk left, and kibitz needs .*--data-dir"):
        check_disk(configured(model), read_shape(str(model)))


def test_a_hub_model_that_the_disk_has_no_room_for(model, monkeypatch):
    shape = replace(read_shape(str(model)), parameters=10**15)
    check_download(configured(model), str(model), shape)  # it is here already
    with pytest.raises(ConfigError, match=r"GiB to download, and .* of disk left; .*HF_HUB_CACHE"):
        check_download(configured(model), "nobody/nothing", shape)


def test_what_is_read_from_vllms_source_is_what_vllm_says():
    """The real vLLM is asked which of its classes take adapters."""
    code = (
        "import importlib, sys\nfrom vllm.model_executor.models.interfaces import supports_lora\n"
        "for pair in sys.argv[1:]:\n    module, name = pair.split(':')\n"
        "    found = importlib.import_module('vllm.model_executor.models.' + module)\n"
        "    print('told', int(bool(supports_lora(getattr(found, name)))))\n"
    )
    pairs = [":".join(vllm_table()[name]) for name in ASKED]
    done = subprocess.run([sys.executable, "-c", code, *pairs], capture_output=True, text=True, check=True)
    told = [line == "told 1" for line in done.stdout.splitlines() if line.startswith("told ")]
    assert told == [takes_adapters(name) for name in ASKED] == [True, True, True, True, False, False]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("You are trying to access a gated repo.\nMake sure to have access", "a gated model; accept its terms .*HF_TOKEN"),
        (
            "has model type `new` but Transformers does not recognize this architecture.",
            "does not know .*update transformers",
        ),
    ],
)
def test_what_a_hub_refuses_is_told_in_one_line(said, wanted):
    with pytest.raises(ConfigError, match=wanted) as error:
        explain_refusal("owner/name", OSError(said))
    assert "\n" not in str(error.value)
    explain_refusal("owner/name", OSError("no network"))  # the control: that is for others to say


def test_what_transformers_trains():
    assert is_trained("llama")
    assert is_trained("qwen3")
    assert not is_trained("t5")
    assert is_served("LlamaForCausalLM", "not asked")
