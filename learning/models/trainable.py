"""The model that a run trains: a LoRA adapter on the base model, or weights of its own (`training.weights`).

Either way the base is at hand, as what a policy is held to: the model without its adapter, or with the weights that the base
has. Of a model with weights of its own the token embeddings are not trained: what is tied to them, vLLM's CPU build does not
renew with them (docs/experiments.md).

The logits of every model made here are divided by the policy's temperature, so that its log-probabilities are those that
answers are sampled with: the output of the final norm is, which no fused head passes by. It knows no objective, no database
and no server.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from bot.config import Config
from bot.errors import TrainingError, quote_error
from bot.models.dtype import choose_dtype
from learning.models.prefix import share_prefixes
from learning.models.version_files import WHOLE, find_missing_files, find_weights_folder, is_whole

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model: TypeAlias = PeftModel | PreTrainedModel

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")  # what architectures call it
CAP = "final_logit_softcapping"


def load_for_training(config: Config, base_model: str, version: str | None = None) -> "Model":
    """The base model, or the version in a directory, to be trained: with an adapter (a fresh one, if it has none), or whole.

    A whole model is in float32 until `settle`: steps as small as its own would be lost in 16 bits. It goes on from an
    adapter too, which is merged into it; an adapter does not go on from a whole model.
    """
    return make_trainable(config, base_model, load_served(config, base_model, version))


def make_trainable(config: Config, base_model: str, found: "Model") -> "Model":
    """As `load`, of a model that `served` gave."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if config.training.weights == "full":
        return _make_whole(config, base_model, found)
    if isinstance(found, PeftModel):
        return found
    rank = config.training.lora_rank
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", bias="none")
    model = get_peft_model(found, settings)
    model.peft_config["default"].base_model_name_or_path = base_model
    return model


def load_served(config: Config, base_model: str, version: str | None = None) -> "Model":
    """The base model, or the version in a directory, as it is served."""
    from peft import PeftModel
    from safetensors import SafetensorError

    if version is None:
        return _load_pretrained(config, base_model)
    directory = Path(version)
    if is_whole(directory):
        return _load_pretrained(config, str(find_weights_folder(directory)), _advise_restoring(directory))
    if missing := find_missing_files(directory):
        raise TrainingError(f"{directory.name} cannot be loaded, {missing[0]} is missing; {_advise_restoring(directory)}")
    base = _load_pretrained(config, base_model)
    try:
        return PeftModel.from_pretrained(base, version, is_trainable=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"{directory.name} cannot be loaded ({quote_error(error)}); {_advise_restoring(directory)}"
        ) from error


def _advise_restoring(version: Path) -> str:
    return f"restore its directory {version}, or take the version back with `kibitz rollback`"


def as_base(model: "Model") -> AbstractContextManager[Any]:
    """Inside, a model that `load` made is the base model."""
    from peft import PeftModel

    return model.disable_adapter() if isinstance(model, PeftModel) else _with_base_weights(model)


@contextmanager
def base_of(config: Config, base_model: str, model: "Model") -> Iterator["Model"]:
    """Inside, the base model of one that `load` made or `served` gave."""
    from peft import PeftModel

    if isinstance(model, PeftModel) or hasattr(model, "base_weights"):
        with as_base(model):
            yield model
    else:
        yield _load_pretrained(config, base_model)


def copy_weights(model: "Model") -> dict[str, Any]:
    """A copy of the weights that are trained, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def restore_weights(model: "Model", kept: dict[str, Any]) -> None:
    """Set a model's weights back to a copy that `weights` made."""
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data.copy_(kept[name])


def draw_to_base(model: Any, share: float) -> None:
    """Take a whole model's weights that share of the way back to the base's: to an adapter, weight decay does it."""
    for name, parameter in model.named_parameters():
        if name in model.base_weights:
            parameter.data.lerp_(model.base_weights[name], share)


def cast_for_serving(model: Any) -> None:
    """Bring a trained model to the numbers that it is served in, so that what is measured is what is served.

    An adapter is trained in float32 and served in the number format of its base: it is rounded to that.
    """
    if not hasattr(model, "base_weights"):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(model.dtype).to(parameter.dtype)
    else:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(model.served_dtype)
        model.base_weights = {name: value.to(model.served_dtype) for name, value in model.base_weights.items()}


def save(model: Any, directory: Path) -> None:
    """Write what was trained into the directory of a version."""
    if hasattr(model, "base_weights"):
        with _undivided_cap(model):
            model.save_pretrained(directory / WHOLE)
        return
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)


def load_state(model: Any, directory: Path) -> None:
    """Give a model the weights that `save` wrote of one like it."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    files = sorted(find_weights_folder(directory).glob("*.safetensors"))
    found = {name: value for file in files for name, value in load_file(file, device=str(model.device)).items()}
    if hasattr(model, "base_weights"):
        restore_weights(model, found)
    else:
        set_peft_model_state_dict(model, found)


@contextmanager
def _undivided_cap(model: Any) -> Iterator[None]:
    """Inside, the config of a model whose logits are divided is that of the model itself."""
    settings = model.config.get_text_config()
    divided, own = getattr(settings, CAP, None), settings.__dict__.pop("undivided_cap", None)
    if own is None:
        yield
        return
    setattr(settings, CAP, own)
    try:
        yield
    finally:
        setattr(settings, CAP, divided)
        settings.undivided_cap = own


@contextmanager
def as_served(model: Any) -> Iterator[None]:
    """Inside, an adapter, which is trained in float32, has the number format of its base: that of the server, and faster."""
    parameters = [] if hasattr(model, "base_weights") else [one for one in model.parameters() if one.dtype != model.dtype]
    kept = [one.data for one in parameters]
    try:
        for one in parameters:
            one.data = one.data.to(model.dtype)
        yield
    finally:
        for one, data in zip(parameters, kept, strict=True):
            one.data = data


@contextmanager
def as_float32(model: "Model") -> Iterator[None]:
    """Inside, a model computes in float32: the reference for what a server gives. Its weights come back exactly."""
    narrow = [(value, value.dtype) for value in model.parameters() if value.dtype.itemsize < 4]
    try:
        for value, _ in narrow:
            value.data = value.data.float()
        yield
    finally:
        for value, dtype in narrow:
            value.data = value.data.to(dtype)


def find_not_finite(model: "Model") -> list[str]:
    """The names of weights that hold what is no number."""
    return [name for name, value in model.named_parameters() if not value.isfinite().all()]


def _load_pretrained(config: Config, source: str, advice: str = "put it back, or name another") -> "PreTrainedModel":
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        found = AutoModelForCausalLM.from_pretrained(source, dtype=choose_dtype(config, source))
        divide_logits(found, config.policy.temperature)
        share_prefixes(found)
        return found.to("cuda") if torch.cuda.is_available() else found
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingError(
            f"out of memory while loading '{source}'; lower serving.memory_share so that vLLM leaves room for it, end what "
            "else uses the GPU, or set serving.sleep_while_training = true"
        ) from error
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise TrainingError(f"the model '{source}' cannot be loaded ({quote_error(error)}); {advice}") from error


def divide_logits(model: "PreTrainedModel", temperature: float) -> None:
    """Have a model give its logits divided by `temperature`. Raises TrainingError for an architecture where that fails."""
    import torch

    if temperature == 1.0:
        return
    decoder = model.get_decoder()
    norm = next((getattr(decoder, name) for name in FINAL_NORMS if hasattr(decoder, name)), None)
    settings = model.config.get_text_config()
    capped = getattr(settings, CAP, None)
    ids = torch.arange(3, 11, device=model.device)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        if norm is not None:
            norm.register_forward_hook(lambda module, given, output: output / temperature)
        if capped is not None:  # cap · tanh(x / cap), of x and of the cap divided alike
            setattr(settings, CAP, capped / temperature)
            settings.undivided_cap = capped
        after = model(input_ids=ids).logits.float()
    if not (after * temperature - before).abs().mean() <= 0.02 * before.abs().mean():
        raise TrainingError(
            f"config key policy.temperature has value {temperature:g}, which training cannot reproduce for the architecture "
            f"{type(model).__name__}; set policy.temperature = 1.0, or use another model"
        )


def _make_whole(config: Config, base_model: str, model: Any) -> "PreTrainedModel":
    from peft import PeftModel

    served_dtype = next(model.parameters()).dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.served_dtype = served_dtype
    model.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    base = _load_pretrained(config, base_model).named_parameters()
    model.base_weights = {name: value.detach().float() for name, value in base if name in trained}
    return model


@contextmanager
def _with_base_weights(model: Any) -> Iterator[None]:
    parameters = dict(model.named_parameters())
    own = {name: parameters[name].data for name in model.base_weights}
    try:
        for name, value in model.base_weights.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in own.items():
            parameters[name].data = value


def silence_libraries() -> None:
    """Keep the libraries' own progress bars and warnings out of ours."""
    os.environ["TQDM_DISABLE"] = "1"  # read when a library makes its bars: before it is imported
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
