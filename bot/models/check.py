"""ModelCheck: checks whether a model can be served and trained here, before anything starts or connects.

Each check raises ConfigError with one line: what is wrong, what was found, what to do.
"""

import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bot.accelerator import GIB, Card, has_gpu, read_card, read_free_memory
from bot.config import Config, PolicyConfig, ServingConfig, TrainingConfig
from bot.errors import ConfigError, KibitzError, quote_error
from bot.models.architectures import can_serve, can_serve_adapters, can_train
from bot.models.dtype import choose_dtype
from bot.models.hashes import has_written_files
from bot.models.memory_budget import MemoryPlan, plan_memory, weights_bytes
from bot.models.purpose import Purpose
from bot.models.shape import (
    DTYPE_BYTES,
    ModelShape,
    has_output_bias,
    list_weight_files,
    make_config_error,
    make_unreadable_error,
    read_all_tensor_shapes,
    read_settings,
    read_shape,
    read_tensor_shapes,
)
from bot.models.thoughts import CHANNEL_MARK
from bot.models.tokenizer import ChatTokenizer

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
LEAST_CONTEXT = 64  # tokens, the least policy.context_tokens
KEPT_VERSIONS = 8  # versions that the disk must have room for
LEAST_DISK = GIB // 4  # bytes, for the database, logs and the embedding model


def check_model(config: Config, model: str, purpose: Purpose = Purpose.SERVE) -> MemoryPlan | None:
    """Check that a model can be trained on this machine and, if `purpose` says so, served. Call `check_files` first.

    Returns the plan for the GPU's memory, or None if there is nothing to share. Raises ConfigError for the first fault.
    """
    shape = read_shape(model)
    check_architecture(config.policy, config.serving, model)
    check_weights(config.policy, model)
    if config.learning.enabled or not purpose.is_served:
        check_temperature(config.policy, model)
    tokenizer = check_tokenizer(config.policy, model, shape)
    served = config.model_copy(update={"policy": tokenizer.with_thought_tokens(config.policy)})
    check_context(served.policy, shape)
    check_disk(config.policy, config.training, config.data, shape)
    check_download(config.policy, model, shape)
    return check_memory(served, model, shape) if purpose.is_served else None


def raise_if_refused(name: str, error: Exception) -> None:
    """Raise ConfigError if `error` says that a model is gated or its architecture unknown; otherwise return."""
    said = str(error)
    if "gated" in said.lower() or "401 Client Error" in said:
        raise ConfigError(
            f"config key policy.model has value '{name}', a gated model; accept its terms on its page, and set "
            "HF_TOKEN to a token with access"
        ) from error
    if "does not recognize this architecture" in said:
        raise ConfigError(
            f"config key policy.model has value '{name}', whose architecture the installed transformers does not know "
            f"({said.splitlines()[0][:120]}); name another model, or update transformers"
        ) from error


def check_files(policy: PolicyConfig, model: str) -> None:
    """Raise ConfigError if transformers cannot use a config.json, or a directory lacks weights that it describes.

    Only the headers of the weights are read. Weights of a hub model are checked when they are loaded. A model whose files
    are as kibitz wrote them needs no checks.
    """
    directory = Path(model)
    if _is_ours(directory):
        return
    _check_config(policy.model, model)
    if not directory.is_dir():
        return
    files = list_weight_files(directory)
    if not files:
        raise ConfigError(f"policy.model '{policy.model}' has no weights (*.safetensors) in {directory}; download it again")
    for file in files:
        if file.suffix == ".safetensors":
            read_tensor_shapes(file)
        elif not _is_saved_by_torch(file):
            raise make_unreadable_error(
                file, "torch did not write it, or it is cut off" if file.is_file() else "no such file"
            )
    if all(file.suffix == ".safetensors" for file in files):
        _check_tensors(policy.model, directory)


def _is_ours(directory: Path) -> bool:
    try:
        return has_written_files(directory)
    except PermissionError:
        return False  # the checks tell which file


def _check_config(name: str, model: str) -> None:
    from transformers import AutoConfig

    read_settings(model)
    try:
        AutoConfig.from_pretrained(model)
    except Exception as error:  # the checks of an architecture may raise anything
        raise_if_refused(name, error)
        raise make_config_error(name, error) from error


def _is_saved_by_torch(file: Path) -> bool:
    """Tell whether a file is a complete archive of torch.save, or a pickle of an older one."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return zipfile.is_zipfile(opened) or (opened.seek(0) == 0 and opened.read(1) == b"\x80")


def _check_tensors(name: str, directory: Path) -> None:
    """Raise ConfigError if vocabulary, width or number of layers of the weights differ from config.json."""
    tensors, settings = read_all_tensor_shapes(directory), read_settings(str(directory))
    if not tensors:
        raise ConfigError(f"policy.model '{name}': the weights in {directory} have no tensors; download it again")
    found = next(((one, shape) for one, shape in tensors.items() if one.endswith(EMBEDDINGS)), None)
    if found is None:  # an architecture with other names
        return
    (embedding, rows), shape = found, read_shape(str(directory))
    start = embedding.removesuffix(next(ending for ending in EMBEDDINGS if embedding.endswith(ending)))
    numbers = (re.match(r"(?:layers|h)\.(\d+)\.", one.removeprefix(start)) for one in tensors if one.startswith(start))
    layers = len({number[1] for number in numbers if number})
    text = settings.get("text_config") or settings
    extra = int(text.get("num_nextn_predict_layers") or 0)  # layers that draft tokens, after the model's own
    compared = [
        ("vocab_size", shape.vocabulary, rows[0], rows[0] == shape.vocabulary),
        ("hidden_size", shape.hidden, rows[1], rows[1] in (shape.hidden, text.get("word_embed_proj_dim"))),
        ("num_hidden_layers", shape.layers, layers, not layers or shape.layers <= layers <= shape.layers + extra),
    ]
    for key, said, has, is_equal in compared:
        if not is_equal:
            raise ConfigError(
                f"policy.model '{name}': its config.json has {key} {said}, its weights have {has}; use the config.json "
                "that belongs to the weights, or download both again"
            )


def check_weights(policy: PolicyConfig, model: str) -> None:
    """Raise ConfigError if transformers finds that a directory's weights are not those that config.json describes.

    It loads the model onto torch's meta device: this reads the headers and maps names as for training, but keeps no weights.
    Weights of a hub model are checked when they are loaded. A model whose files are as kibitz wrote them needs no checks.
    """
    directory = Path(model)
    if not directory.is_dir() or _is_ours(directory):
        return
    from transformers import AutoModelForCausalLM

    name = policy.model
    try:
        with _quiet_transformers():
            _, found = AutoModelForCausalLM.from_pretrained(
                model, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # the code of an architecture may raise anything
        raise ConfigError(
            f"policy.model '{name}': transformers cannot make the model that its config.json describes "
            f"({quote_error(error)}); "
            "use the config.json that belongs to the weights"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"policy.model '{name}': its weights lack {missing[0]}{_and_more(missing)}, which its config.json requires; "
            "use the config.json that belongs to the weights, or download both again"
        )
    if mismatched := sorted(found["mismatched_keys"]):
        key, has, wanted = mismatched[0]
        raise ConfigError(
            f"policy.model '{name}': its weights have {key}{_and_more(mismatched)} with the shape {_dimensions(has)}, its "
            f"config.json describes {_dimensions(wanted)}; use the config.json that belongs to the weights, or download "
            "both again"
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Within the context, make transformers draw no progress bar and log nothing."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _and_more(found: Sequence[object]) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""


def _dimensions(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def check_architecture(policy: PolicyConfig, serving: ServingConfig, model: str) -> None:
    """Raise ConfigError if vLLM does not serve a model with adapters, or transformers does not train it."""
    name = policy.model
    settings = read_settings(model)
    named = settings.get("architectures") or [""]
    if not isinstance(named, list):
        raise ConfigError(
            f"policy.model '{name}': its config.json has architectures {named!r}, which is no list; put it in brackets"
        )
    quantized = settings.get("quantization_config") or (settings.get("text_config") or {}).get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "in some way") if isinstance(quantized, dict) else quantized
        raise ConfigError(
            f"policy.model '{name}' is quantized ({method}), and training needs the original weights; name the original "
            "model (its page names it)"
        )
    architecture = str(named[0])
    kind = str(settings.get("model_type") or "")
    if not can_train(kind) and "auto_map" not in settings:
        raise ConfigError(
            f"policy.model '{name}' has model_type '{kind}', for which the installed transformers has no causal language "
            "model; name a causal language model, or update transformers"
        )
    if serving.url:
        return  # that server has loaded its model already
    if not can_serve(architecture, model):
        raise ConfigError(
            f"policy.model '{name}' has the architecture '{architecture}', which the installed vLLM does not serve; "
            "name another model (https://docs.vllm.ai lists them), or update vLLM"
        )
    if not can_serve_adapters(architecture):
        raise ConfigError(
            f"policy.model '{name}' has the architecture '{architecture}', for which the installed vLLM serves no LoRA "
            "adapters; name another model, for example of the Llama, Qwen or Gemma family"
        )


def check_temperature(policy: PolicyConfig, model: str) -> None:
    """Raise ConfigError if training cannot reproduce the temperature for this model (`learning.models.trainable`)."""
    if policy.temperature != 1.0 and has_output_bias(model):
        raise ConfigError(
            f"config key policy.temperature has value {policy.temperature:g}, which training cannot reproduce for "
            f"'{policy.model}': its output layer has a bias; set policy.temperature = 1.0, use another model, or set "
            "learning.enabled = false to serve without learning"
        )


def check_context(policy: PolicyConfig, shape: ModelShape) -> None:
    """Raise ConfigError if prompt and answer together exceed a model's positions, or the model has very few of them."""
    if shape.positions and shape.positions <= LEAST_CONTEXT:
        raise ConfigError(
            f"policy.model '{policy.model}': its config.json has {shape.positions} positions (max_position_embeddings), and "
            f"kibitz needs more than {LEAST_CONTEXT}; correct it, or name another model"
        )
    longest = policy.context_tokens + policy.max_tokens
    if shape.positions and longest > shape.positions:
        context, answer = shape.positions - policy.max_tokens, shape.positions - policy.context_tokens
        if context >= LEAST_CONTEXT:
            way = f"lower policy.context_tokens to {context}"
        elif answer >= 1:
            way = f"lower policy.max_tokens to {answer}"
        else:
            way = f"lower both to {shape.positions // 2}"
        raise ConfigError(
            f"policy.context_tokens and policy.max_tokens are {policy.context_tokens} + {policy.max_tokens}, and "
            f"'{policy.model}' reads {shape.positions} tokens; {way}"
        )


def check_tokenizer(policy: PolicyConfig, model: str, shape: ModelShape) -> ChatTokenizer:
    """Return a model's tokenizer. Raises ConfigError if its ids exceed the model's vocabulary, or if its chat template is
    missing, fails, or writes in channels.
    """
    name = policy.model
    tokenizer = ChatTokenizer(model, policy.template_args)
    token, last = max(tokenizer.hf.get_vocab().items(), key=lambda one: one[1], default=("", -1))  # ids may have gaps
    if last >= shape.vocabulary:
        raise ConfigError(
            f"policy.model '{name}': its tokenizer has the id {last} ({token!r}), its embedding {shape.vocabulary} rows, "
            "counted from 0; use the tokenizer that belongs to it, or grow the model with resize_token_embeddings"
        )
    try:
        ids = tokenizer.prompt_ids([{"role": "user", "content": "hello"}])
        _ = tokenizer.end_ids  # raises ConfigError if no token ends an answer
    except KibitzError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise ConfigError(
            f"policy.model '{name}': its chat template fails on a single message ({quote_error(error)}); "
            "correct chat_template.jinja, or use another model"
        ) from error
    if tokenizer.has_channels:
        raise ConfigError(
            f"policy.model '{name}' answers in channels ({CHANNEL_MARK}), in which kibitz cannot tell thoughts from the "
            "answer; name a model that thinks between two marks, such as <think>, or not at all"
        )
    if not ids:
        raise ConfigError(
            f"policy.model '{name}': its chat template renders a message as nothing; correct chat_template.jinja, or use "
            "another model"
        )
    return tokenizer


def check_memory(config: Config, model: str, shape: ModelShape, card: Card | None = None) -> MemoryPlan | None:
    """Return the plan for the GPU's memory, or None if there is nothing to share.

    Raises ConfigError if the model does not fit in the GPU's memory, or without a GPU in the main memory.
    """
    if config.serving.sleep_while_training and not config.serving.url and not has_gpu():
        raise ConfigError(
            "config key serving.sleep_while_training has value true, and there is no GPU here whose memory vLLM could free; "
            "set it to false"
        )
    dtype = choose_dtype(config.serving, model)
    element = DTYPE_BYTES.get(dtype, 2)
    card = card or read_card()
    if card is not None:
        return None if config.serving.url else plan_memory(shape, config, card, element)
    free = read_free_memory()
    need = weights_bytes(shape, element) * (1 if config.serving.url else 2)
    if free and not has_gpu() and need > free:
        raise ConfigError(
            f"policy.model '{config.policy.model}' needs {need / GIB:.1f} GiB of memory (its weights twice, to serve and to "
            f"train), {free / GIB:.1f} GiB are free; use a smaller model, or free memory"
        )
    return None


def check_disk(policy: PolicyConfig, training: TrainingConfig, data: Path, shape: ModelShape) -> None:
    """Raise ConfigError if the data directory has no room for a few versions."""
    whole = training.weights == "full"
    version = weights_bytes(shape, 2) if whole else shape.count_adapter_parameters(training.lora_rank) * 4
    need = LEAST_DISK + (2 if whole else KEPT_VERSIONS) * version
    free = _measure_free_disk(data)
    if free < need:
        raise ConfigError(
            f"data_dir '{data}' has {free / GIB:.2f} GiB of disk left, and kibitz needs {need / GIB:.2f} GiB for "
            f"'{policy.model}' and its versions; free disk space, or name another directory with --data-dir"
        )


def check_download(policy: PolicyConfig, model: str, shape: ModelShape) -> None:
    """Raise ConfigError if a hub model is not downloaded yet and the hub's cache has no room for it."""
    if Path(model).is_dir():
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(model, file), str) for file in files):
        return
    need = int(1.05 * weights_bytes(shape, DTYPE_BYTES.get(shape.saved_dtype, 2)))
    place = Path(HF_HUB_CACHE)
    free = _measure_free_disk(place)
    if free < need:
        raise ConfigError(
            f"policy.model '{policy.model}' is {need / GIB:.1f} GiB to download, and {place} has "
            f"{free / GIB:.1f} GiB of disk left; free disk space, or name another directory with HF_HUB_CACHE"
        )


def _measure_free_disk(place: Path) -> int:
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
