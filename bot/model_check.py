"""ModelCheck: whether a model can be served and trained here, found out before anything starts or connects.

Each check raises ConfigError with one line: what is wrong, what was found, what to do. It knows no commands: those that
chat, serve, simulate, measure or look (`kibitz doctor`) all ask here.
"""

import json
import shutil
from pathlib import Path

from bot.accelerator import GIB, Card, free_memory, has_gpu, read_card
from bot.architectures import is_served, is_trained, takes_adapters
from bot.config import Config
from bot.errors import ConfigError, KibitzError
from bot.memory_budget import MemoryPlan, plan_memory, weights_bytes
from bot.model_shape import BITS, ModelShape, read_shape, tensor_shapes
from bot.tokenizer import ChatTokenizer
from bot.vllm_server import served_dtype

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
KEPT_VERSIONS = 8  # that there should be room for
LEAST_DISK = GIB // 4  # for the database, logs and the embedding model


def check_model(config: Config, model: str, serves: bool = True) -> MemoryPlan | None:
    """Check that a model can be trained on this machine and, if it is to be, served.

    Returns how the GPU's memory is shared, or None where it is not. Raises ConfigError for the first thing that is wrong.
    """
    check_weights(config, model)
    shape = read_shape(model)
    check_architecture(config, model)
    tokenizer = check_tokenizer(config, model, shape)
    served = config.model_copy(update={"policy": tokenizer.with_thoughts(config.policy)})
    check_context(served, shape)
    check_disk(config, shape)
    check_download(config, model, shape)
    return check_memory(served, model, shape) if serves else None


def explain_refusal(name: str, error: Exception) -> None:
    """Raise ConfigError where a hub refused a model for a reason that its error names; otherwise return."""
    said = str(error)
    if "gated" in said.lower() or "401 Client Error" in said:
        raise ConfigError(
            f"config key policy.model has value '{name}', a gated model; accept its terms on its page, and set "
            "HF_TOKEN to a token that may read it"
        ) from error
    if "does not recognize this architecture" in said:
        raise ConfigError(
            f"config key policy.model has value '{name}', whose architecture the installed transformers does not know "
            f"({said.splitlines()[0][:120]}); name another model, or update transformers"
        ) from error


def check_weights(config: Config, model: str) -> None:
    """Refuse a directory without whole weights. Of a hub model, whoever loads it finds out."""
    directory = Path(model)
    if not directory.is_dir():
        return
    name = config.policy.model
    files = sorted(directory.glob("*.safetensors"))
    if not files and not list(directory.glob("pytorch_model*.bin")):
        raise ConfigError(f"policy.model '{name}': there are no weights (*.safetensors) in {directory}; download it again")
    for file in files:
        try:
            tensor_shapes(file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"policy.model '{name}': {file.name} cannot be read ({error}); download it again") from error


def check_architecture(config: Config, model: str) -> None:
    """Refuse a model that vLLM does not serve with adapters, or that transformers does not train."""
    name = config.policy.model
    settings = _settings(model)
    architecture = str((settings.get("architectures") or [""])[0])
    kind = str(settings.get("model_type") or "")
    if not is_trained(kind) and "auto_map" not in settings:
        raise ConfigError(
            f"policy.model '{name}' has model_type '{kind}', of which the installed transformers has no decoder to train; "
            "name a causal language model, or update transformers"
        )
    if config.serving.url:
        return  # that server has its model already
    if not is_served(architecture, model):
        raise ConfigError(
            f"policy.model '{name}' has the architecture '{architecture}', which the installed vLLM does not serve; "
            "name another model (https://docs.vllm.ai lists them), or update vLLM"
        )
    if not takes_adapters(architecture):
        raise ConfigError(
            f"policy.model '{name}' has the architecture '{architecture}', on which the installed vLLM serves no LoRA "
            "adapters; name another model, such as one of the Llama, Qwen or Gemma families"
        )


def check_context(config: Config, shape: ModelShape) -> None:
    """Refuse prompts and answers that are longer than a model can read."""
    policy = config.policy
    longest = policy.context_tokens + policy.max_tokens
    if shape.positions and longest > shape.positions:
        raise ConfigError(
            f"policy.context_tokens and policy.max_tokens are {policy.context_tokens} + {policy.max_tokens}, and "
            f"'{policy.model}' reads {shape.positions} tokens; lower policy.context_tokens to "
            f"{max(shape.positions - policy.max_tokens, 64)}"
        )


def check_tokenizer(config: Config, model: str, shape: ModelShape) -> ChatTokenizer:
    """Refuse a model without a chat template, with one that raises, or whose tokenizer has tokens that it does not know.

    Returns the tokenizer otherwise.
    """
    name = config.policy.model
    tokenizer = ChatTokenizer(model, config.policy.template_args)
    rows = _embedding_rows(Path(model)) or shape.vocabulary
    tokens = len(tokenizer.hf)
    if tokens > rows:
        raise ConfigError(
            f"policy.model '{name}': its tokenizer has {tokens} tokens, its embedding {rows} rows; take the tokenizer that "
            "belongs to it, or grow the model with resize_token_embeddings"
        )
    try:
        ids = tokenizer.prompt_ids([{"role": "user", "content": "hello"}])
        _ = tokenizer.end_ids  # it raises where nothing ends an answer
    except KibitzError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise ConfigError(
            f"policy.model '{name}': its chat template fails on a single message ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:200]}); correct chat_template.jinja, or take another model"
        ) from error
    if not ids:
        raise ConfigError(
            f"policy.model '{name}': its chat template makes nothing of a message; correct chat_template.jinja, or take "
            "another model"
        )
    return tokenizer


def check_memory(config: Config, model: str, shape: ModelShape, card: Card | None = None) -> MemoryPlan | None:
    """Refuse a model that the GPU, or without one the main memory, has no room for; how a GPU is shared."""
    if config.serving.sleep_while_training and not config.serving.url and not has_gpu():
        raise ConfigError(
            "config key serving.sleep_while_training has value true, and there is no GPU here whose memory vLLM could give "
            "away; set it to false"
        )
    dtype = served_dtype(config, model)
    element = BITS.get(dtype, 2)
    card = card or read_card()
    if card is not None:
        return None if config.serving.url else plan_memory(shape, config, card, element)
    free = free_memory()
    need = weights_bytes(shape, element) * (1 if config.serving.url else 2)
    if free and not has_gpu() and need > free:
        raise ConfigError(
            f"policy.model '{config.policy.model}' needs {need / GIB:.1f} GiB of memory (its weights twice, to serve and to "
            f"train), {free / GIB:.1f} GiB are free; take a smaller model, or free some"
        )
    return None


def check_disk(config: Config, shape: ModelShape) -> None:
    """Refuse a data directory without room for a few versions."""
    whole = config.training.weights == "full"
    version = weights_bytes(shape, 2) if whole else shape.adapter_parameters(config.training.lora_rank) * 4
    need = LEAST_DISK + (2 if whole else KEPT_VERSIONS) * version
    free = _free_disk(config.data)
    if free < need:
        raise ConfigError(
            f"data_dir '{config.data}' has {free / GIB:.2f} GiB of disk left, and kibitz needs {need / GIB:.2f} GiB for "
            f"'{config.policy.model}' and its versions; free some, or give another with --data-dir"
        )


def check_download(config: Config, model: str, shape: ModelShape) -> None:
    """Refuse a hub model that is not here yet and for which the hub's cache has no room."""
    if Path(model).is_dir():
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(model, file), str) for file in files):
        return
    need = int(1.05 * weights_bytes(shape, BITS.get(shape.saved_as, 2)))
    place = Path(HF_HUB_CACHE)
    free = _free_disk(place)
    if free < need:
        raise ConfigError(
            f"policy.model '{config.policy.model}' is {need / GIB:.1f} GiB to download, and {place} has "
            f"{free / GIB:.1f} GiB of disk left; free some, or name another place with HF_HUB_CACHE"
        )


def _free_disk(place: Path) -> int:
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def _settings(model: str) -> dict:
    file = Path(model) / "config.json"
    if file.is_file():
        return json.loads(file.read_text())
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).to_dict()


def _embedding_rows(directory: Path) -> int:
    """The rows of the embedding in a directory's weights; 0 where it cannot be found."""
    for file in sorted(directory.glob("*.safetensors")):
        for name, dimensions in tensor_shapes(file).items():
            if name.endswith(EMBEDDINGS):
                return dimensions[0]
    return 0
