"""Models that cannot be served or trained: the demo policy with one thing broken, and one line for each."""

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

from bot.accelerator import GIB, Card
from bot.config import Config, load
from bot.errors import ConfigError, TrainingError
from bot.models import check as model_check
from bot.models.architectures import can_serve, can_serve_adapters, can_train, read_vllm_table
from bot.models.check import (
    check_architecture,
    check_disk,
    check_download,
    check_files,
    check_memory,
    check_model,
    check_weights,
    raise_if_refused,
)
from bot.models.purpose import Purpose
from bot.models.shape import read_shape
from learning.models.trainable import divide_logits
from learning.models.trainable import load_served as load_served
from learning.training.choice import prepare_model, resolve_model
from learning.training.pretrain import is_toy

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


def check(config: Config, model: str) -> None:
    """As every command does."""
    check_files(config.policy, model)
    check_model(config, model)


def refused(model: Path, wanted: str, **keys) -> None:
    with pytest.raises(ConfigError, match=wanted) as error:
        check(configured(model, **keys), str(model))
    assert "\n" not in str(error.value)
    assert ";" in str(error.value), "it says what to do"


CONFIGS = {
    "a list": "[1]",
    "no JSON": "{",
    "a dtype that torch does not have": {"dtype": "bf17"},
    "a number as a text": {"num_hidden_layers": "three"},
    "heads that do not divide the width": {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 640},
        **{"num_attention_heads": 9, "num_key_value_heads": 9, "head_dim": None},
    },
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_cannot_be_used_is_one_line_whoever_reads_it_first(model, what):
    made = CONFIGS[what]
    if isinstance(made, str):
        (model / "config.json").write_text(made)
    else:
        change(model / "config.json", **made)
    refused(model, r"config\.json cannot be used")
    with pytest.raises(ConfigError, match=r"config\.json cannot be used"):
        resolve_model(configured(model), lambda line: None)


def test_an_architecture_that_is_a_text(model):
    change(model / "config.json", architectures="Qwen3ForCausalLM")
    refused(model, "architectures 'Qwen3ForCausalLM', which is no list")


@pytest.mark.parametrize(("file", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[]")])
def test_a_tokenizer_that_cannot_be_loaded(model, file, content):
    (model / file).write_text(content)
    refused(model, "whose tokenizer cannot be loaded")


def test_the_demo_policy_is_served_and_trained_here(model):
    check(configured(model), str(model))


def test_weights_that_are_gone_or_cut_off(model):
    file = next(model.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    refused(model, r"model\.safetensors cannot be read .*download it again")
    file.unlink()
    refused(model, "has no weights")


def cut(file: Path, count: int) -> None:
    file.write_bytes(file.read_bytes()[:count])


def shard(model: Path, kind: str = "safetensors") -> list[Path]:
    """Put an index with two shards, of which the second is not there, in the place of the weights."""
    whole, name = model / "model.safetensors", "model" if kind == "safetensors" else "pytorch_model"
    parts = [model / f"{name}-{number}-of-2.{kind}" for number in (1, 2)]
    index = {"weight_map": {str(number): part.name for number, part in enumerate(parts)}}
    name = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    (model / f"{name}.index.json").write_text(json.dumps(index))
    whole.rename(parts[0])
    return parts


def header(file: Path, content: str) -> None:
    file.write_bytes(len(content).to_bytes(8, "little") + content.encode())


DAMAGES = {
    "half": (lambda file: cut(file, file.stat().st_size // 2), "download it again"),
    "without its last byte": (lambda file: cut(file, file.stat().st_size - 1), "download it again"),
    "empty": (lambda file: cut(file, 0), "download it again"),
    "a link that leads nowhere": (lambda file: (file.unlink(), file.symlink_to("nowhere")), "download it again"),
    "a pointer of Git LFS": (
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "it is a Git LFS pointer.*run git lfs pull",
    ),
    "a header that is a list": (lambda file: header(file, "[1]     "), "download it again"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_are_not_whole_are_told_as_such_whoever_reads_them_first(model, damage):
    harm, wanted = DAMAGES[damage]
    harm(model / "model.safetensors")
    refused(model, rf"model\.safetensors cannot be read .*{wanted}")
    with pytest.raises(ConfigError, match=rf"model\.safetensors cannot be read .*{wanted}"):
        resolve_model(configured(model), lambda line: None)


def test_shards_that_are_missing_and_weights_without_tensors(model):
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    parts = shard(model)
    refused(model, r"model-2-of-2\.safetensors cannot be read .*download it again")
    parts[0].unlink()
    (model / "model.safetensors.index.json").write_text("[]")
    refused(model, r"index\.json cannot be read .*download it again")
    header(weights, '{"__metadata__":{}} ')
    refused(model, "have no tensors; download it again")
    weights.unlink()
    (model / "model.safetensors.index.json").unlink()
    (model / "adapter_model.safetensors").write_bytes(whole)
    refused(model, "has no weights")


def test_weights_that_torch_saved_are_whole_archives(model):
    import torch

    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    file = model / "pytorch_model.bin"
    torch.save({one: value for one, value in weights.items() if one != "model.norm.weight"}, file)
    refused(model, r"its weights lack model\.norm\.weight")
    torch.save(weights, file)
    check(configured(model), str(model))
    cut(file, file.stat().st_size - 1)
    refused(model, r"pytorch_model\.bin cannot be read .*cut off")
    cut(file, 0)
    refused(model, r"pytorch_model\.bin cannot be read .*cut off")


@pytest.mark.parametrize(
    ("key", "value", "has"), [("vocab_size", 1600, 1536), ("hidden_size", 256, 128), ("num_hidden_layers", 5, 3)]
)
def test_a_config_that_belongs_to_other_weights(model, key, value, has):
    layers = {"layer_types": ["full_attention"] * value} if key == "num_hidden_layers" else {}
    change(model / "config.json", **{key: value}, **layers)
    refused(model, f"has {key} {value}, its weights have {has}; use the config")


@pytest.mark.parametrize("gone", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_lack_a_tensor(model, gone):
    file = model / "model.safetensors"
    tensors = load_file(file)
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    refused(model, rf"its weights lack {gone}, which its config\.json requires; use the config")


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"intermediate_size": 512}, r"mlp\.down_proj\.weight and 8 more with the shape 128 x \d+, its .* 128 x 512;"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, r"self_attn\.k_proj\.weight and \d+ more with the shape"),
        ({"head_dim": 64}, r"self_attn\.k_norm\.weight and \d+ more with the shape 32, its config\.json describes 64;"),
        ({"tie_word_embeddings": False}, r"its weights lack lm_head\.weight, which"),
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 10000}}, "the model that its .* describes .*nonsense"),
    ],
)
def test_a_config_that_describes_other_tensors_than_the_weights_have(model, wrong, found, capfd):
    change(model / "config.json", **wrong)
    refused(model, found)
    said = capfd.readouterr().err
    assert "LOAD REPORT" not in said
    assert "Loading weights" not in said


KINDS = {
    "Llama, its output layer apart": ("Llama", {"tie_word_embeddings": False}),
    "Gemma 2": ("Gemma2", {"head_dim": 16}),
    "Phi 3, which joins its projections": ("Phi3", {}),
    "Mixtral, whose experts are saved one by one": ("Mixtral", {"num_local_experts": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_pass_under_whatever_names_an_architecture_saves_them(model, kind):
    import transformers

    name, settings = KINDS[kind]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1536, "pad_token_id": 0}
    made = getattr(transformers, f"{name}Config")(**sizes, **heads, **settings)
    getattr(transformers, f"{name}ForCausalLM")(made).save_pretrained(model)
    check_weights(configured(model).policy, str(model))
    tensors = load_file(model / "model.safetensors")
    tensors.pop(max(one for one in tensors if "layers.1" in one and ("experts" in one or name != "Mixtral")))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"download both again|transformers cannot make"):  # the control
        check_weights(configured(model).policy, str(model))


def test_a_config_that_says_nothing(model):
    change(model / "config.json", hidden_size=None)
    refused(model, r"config\.json cannot be used")


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "bitsandbytes", "compressed-tensors"])
def test_a_quantized_model_is_refused_before_anything_starts(model, method):
    change(model / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ConfigError, match=rf"is quantized \({method}\), .*; name the original model"):
        check_architecture(configured(model).policy, configured(model).serving, str(model))


def test_a_package_that_a_model_needs_to_be_trained_is_one_line(model):
    change(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(TrainingError, match=r"cannot be loaded \(ImportError: .*\); put it back"):
        load_served(configured(model).policy, configured(model).serving, str(model))


def test_an_architecture_that_transformers_does_not_train(model):
    change(model / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])
    refused(model, "model_type 't5', for which the installed transformers has no causal language model")


def test_an_architecture_that_vllm_serves_without_adapters(model):
    change(model / "config.json", architectures=["GPT2LMHeadModel"])
    refused(model, "architecture 'GPT2LMHeadModel', for which the installed vLLM serves no LoRA")
    url = {"url": "http://127.0.0.1:1"}
    check_model(configured(model, serving=url), str(model))  # the server that is there knows what it serves


def test_an_architecture_that_vllm_does_not_know(model):
    change(model / "config.json", architectures=["NobodysForCausalLM"])
    refused(model, "architecture 'NobodysForCausalLM', which the installed vLLM does not serve")


def test_a_temperature_that_training_cannot_reproduce_is_refused_where_something_is_trained(model, tmp_path):
    import torch

    warm = {"temperature": 0.7}
    sizes = {"vocab_size": 1536, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    for folder in ("phi", "older"):
        phi = Path(shutil.copytree(model, tmp_path / folder))
        made = transformers.PhiForCausalLM(transformers.PhiConfig(**sizes, num_attention_heads=4))
        torch.nn.init.normal_(made.lm_head.bias)
        made.save_pretrained(phi)
        if folder == "older":
            torch.save(made.state_dict(), phi / "pytorch_model.bin")
            (phi / "model.safetensors").unlink()
        with pytest.raises(TrainingError, match=r"value 0\.7, which training cannot reproduce"):
            divide_logits(made, 0.7)  # what is refused would fail
        refused(
            phi,
            r"policy\.temperature has value 0\.7, .*output layer has a bias; set policy\.temperature = 1\.0",
            policy=warm,
        )
        check(configured(phi, policy={"temperature": 1.0}), str(phi))
        still = configured(phi, policy=warm, learning={"enabled": False})
        check(still, str(phi))  # it only serves
        with pytest.raises(ConfigError, match="output layer has a bias"):
            check_model(still, str(phi), Purpose.TRAIN)  # it only trains


def test_a_context_that_is_longer_than_the_model_reads(model):
    refused(model, "reads 4096 tokens; lower policy.context_tokens to 3968", policy={"context_tokens": 8000})
    refused(model, "; lower policy.max_tokens to 3072$", policy={"max_tokens": 10**6})
    check_model(configured(model, policy={"max_tokens": 3072}), str(model))
    refused(model, "; lower both to 2048$", policy={"max_tokens": 10**6, "context_tokens": 10**6})
    for nothing in (-1, 8):
        change(model / "config.json", max_position_embeddings=nothing)
        refused(model, rf"has {nothing} positions \(max_position_embeddings\).*; correct it")


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
    change(model / "config.json", vocab_size=len(tensors[name]))
    refused(model, r"tokenizer has the id 1535 \('.*'\), its embedding 1436 rows, counted from 0; use the tokenizer")


def test_a_tokenizer_whose_ids_have_a_gap(model):
    file = model / "tokenizer.json"
    settings = json.loads(file.read_text())
    words = settings["model"]["vocab"]
    words[max(words, key=words.get)] = 9999  # as many tokens as before
    file.write_text(json.dumps(settings))
    refused(model, r"tokenizer has the id 9999 \('.*'\), its embedding 1536 rows, .*; use the tokenizer")


def test_float32_on_a_gpu_and_cards_that_are_small_or_full(model, monkeypatch):
    monkeypatch.setattr("bot.models.dtype.has_gpu", lambda: True)
    monkeypatch.setattr("bot.models.dtype.read_card", lambda: None)
    monkeypatch.setattr(model_check, "read_card", lambda: Card("a GPU", 8 * GIB, 8 * GIB))
    assert check_model(configured(model), str(model)) is not None
    refused(model, "float32", serving={"dtype": "float32"})
    monkeypatch.setattr(model_check, "read_card", lambda: Card("a GPU", 8 * GIB, GIB))
    refused(model, "the GPU has 1.0 GiB of 8.0 GiB free")
    monkeypatch.setattr(model_check, "read_card", lambda: Card("a GPU", 2 * GIB, 2 * GIB))
    refused(model, r"to be served, and the GPU has 2\.0 GiB")


def test_a_model_that_is_larger_than_the_memory(model, monkeypatch):
    monkeypatch.setattr(model_check, "read_free_memory", lambda: 2**20)
    with pytest.raises(ConfigError, match=r"needs 0\.0 GiB of memory .*use a smaller model"):
        check_memory(configured(model), str(model), read_shape(str(model)))


def test_too_little_disk(model, monkeypatch):
    monkeypatch.setattr(model_check, "LEAST_DISK", 2**60)
    with pytest.raises(ConfigError, match=r"of disk left, and kibitz needs .*--data-dir"):
        check_disk(configured(model).policy, configured(model).training, configured(model).data, read_shape(str(model)))


def test_a_hub_model_that_the_disk_has_no_room_for(model, monkeypatch):
    shape = replace(read_shape(str(model)), parameters=10**15)
    check_download(configured(model).policy, str(model), shape)  # it is here already
    with pytest.raises(ConfigError, match=r"GiB to download, and .* of disk left; .*HF_HUB_CACHE"):
        check_download(configured(model).policy, "nobody/nothing", shape)


def test_what_is_read_from_vllms_source_is_what_vllm_says():
    """The real vLLM is asked which of its classes take adapters."""
    code = (
        "import importlib, sys\nfrom vllm.model_executor.models.interfaces import supports_lora\n"
        "for pair in sys.argv[1:]:\n    module, name = pair.split(':')\n"
        "    found = importlib.import_module('vllm.model_executor.models.' + module)\n"
        "    print('told', int(bool(supports_lora(getattr(found, name)))))\n"
    )
    pairs = [":".join(read_vllm_table()[name]) for name in ASKED]
    done = subprocess.run([sys.executable, "-c", code, *pairs], capture_output=True, text=True, check=True)
    told = [line == "told 1" for line in done.stdout.splitlines() if line.startswith("told ")]
    assert told == [can_serve_adapters(name) for name in ASKED] == [True, True, True, True, False, False]


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
        raise_if_refused("owner/name", OSError(said))
    assert "\n" not in str(error.value)
    raise_if_refused("owner/name", OSError("no network"))  # the control: that is for others to say


def test_what_transformers_trains():
    assert can_train("llama")
    assert can_train("qwen3")
    assert not can_train("t5")
    assert can_serve("LlamaForCausalLM", "not asked")


@pytest.mark.parametrize("name", ["~nobody-has-this-name/x", "x" * 300, "a\0b"])
def test_a_name_that_is_no_path_is_told_in_a_line(tmp_path, name):
    with pytest.raises(ConfigError, match=r"(policy\.model has value|the path) '.*; ") as error:
        prepare_model(load(data_dir=str(tmp_path), policy={"model": name}), lambda line: None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "headers", "said"),
    [(429, {}, "429"), (404, {}, "404"), (403, {"X-Error-Code": "GatedRepo"}, "a gated model; accept its terms")],
)
def test_what_a_hub_answers_is_quoted(tmp_path, answer, headers, said):
    """A server on this machine stands for the hub; transformers and huggingface_hub are the real ones."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answer)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        code = (
            "import time\ntime.sleep = lambda seconds: None\n"  # huggingface_hub waits longer after each 429
            "from bot.config import load\nfrom bot.errors import ConfigError\n"
            "from learning.training.choice import find_base_model\n"
            "try:\n    find_base_model(load(policy={'model': 'owner/name'}), print)\n"
            "except ConfigError as error:\n    print('told', error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | place, cwd=tmp_path
        )
        hub.shutdown()
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("told ")]
    assert said in told
    assert "owner/name" in told


def test_a_model_that_only_has_a_name_like_the_toys_is_no_toy(model, demo_model):
    other = model.rename(model.with_name("demo-of-mine"))
    assert is_toy(demo_model)
    assert is_toy("toy")
    change(other / "config.json", vocab_size=32000)
    assert not is_toy(str(other))
    assert not is_toy("demo-of-nobody")
