"""The model that a run trains: a LoRA adapter on the base model, or whole weights (`training.weights`).

Either way the base model stays available as the reference: the model without its adapter, or with the base's weights. The
token embeddings of a whole model are not trained, because vLLM's CPU build does not update the weights tied to them
(docs/experiments.md).

The logits of every model made here are divided by the policy's temperature, so that its log-probabilities are those with
which answers are sampled. The division is applied to the output of the final norm, because every fused head reads that.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from bot.config import PolicyConfig, ServingConfig, TrainingConfig
from bot.errors import TrainingError, quote_error
from bot.models.dtype import choose_dtype
from bot.store.weights import WHOLE
from learning.models.prefix import share_prefixes
from learning.models.version_files import find_missing_files, find_weights_folder, is_whole

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model: TypeAlias = PeftModel | PreTrainedModel

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")  # its names in different architectures
CAP = "final_logit_softcapping"


def load_for_training(
    policy: PolicyConfig,
    serving: ServingConfig,
    training: TrainingConfig,
    base_model: str,
    version: str | None = None,
) -> "Model":
    """Load the base model, or the version in a directory, for training: with an adapter (new if it has none), or whole.

    A whole model is in float32 until `cast_for_serving`, because 16 bits would lose its small steps. It can continue an
    adapter, which is merged into it; an adapter cannot continue a whole model. Raises TrainingError if loading fails.
    """
    return make_trainable(policy, serving, training, base_model, load_served(policy, serving, base_model, version))


def make_trainable(
    policy: PolicyConfig, serving: ServingConfig, training: TrainingConfig, base_model: str, found: "Model"
) -> "Model":
    """Make a model from `load_served` trainable, as `load_for_training` does."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if training.weights == "full":
        return _make_whole(policy, serving, base_model, found)
    if isinstance(found, PeftModel):
        return found
    rank = training.lora_rank
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", bias="none")
    model = get_peft_model(found, settings)
    model.peft_config["default"].base_model_name_or_path = base_model
    return model


def load_served(policy: PolicyConfig, serving: ServingConfig, base_model: str, version: str | None = None) -> "Model":
    """Load the base model, or the version in a directory, as it is served. Raises TrainingError."""
    from peft import PeftModel
    from safetensors import SafetensorError

    if version is None:
        return _load_pretrained(policy, serving, base_model)
    directory = Path(version)
    if is_whole(directory):
        return _load_pretrained(policy, serving, str(find_weights_folder(directory)), _advise_restoring(directory))
    if missing := find_missing_files(directory):
        raise TrainingError(f"{directory.name} cannot be loaded, {missing[0]} is missing; {_advise_restoring(directory)}")
    base = _load_pretrained(policy, serving, base_model)
    try:
        return PeftModel.from_pretrained(base, version, is_trainable=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"{directory.name} cannot be loaded ({quote_error(error)}); {_advise_restoring(directory)}"
        ) from error


def _advise_restoring(version: Path) -> str:
    return f"restore its directory {version}, or take the version back with `kibitz rollback`"


def as_base(model: "Model") -> AbstractContextManager[Any]:
    """Turn a model from `load_for_training` into the base model for the block."""
    from peft import PeftModel

    return model.disable_adapter() if isinstance(model, PeftModel) else _with_base_weights(model)


@contextmanager
def base_of(policy: PolicyConfig, serving: ServingConfig, base_model: str, model: "Model") -> Iterator["Model"]:
    """Give the base model of a model from `load_for_training` or `load_served` for the block."""
    from peft import PeftModel

    if isinstance(model, PeftModel) or hasattr(model, "base_weights"):
        with as_base(model):
            yield model
    else:
        yield _load_pretrained(policy, serving, base_model)


def copy_weights(model: "Model") -> dict[str, Any]:
    """Return a copy of the trained weights, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def restore_weights(model: "Model", kept: dict[str, Any]) -> None:
    """Restore a model's weights from a copy that `copy_weights` made."""
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data.copy_(kept[name])


def draw_to_base(model: Any, share: float) -> None:
    """Move a whole model's weights a share of the way to the base's. For an adapter, weight decay does this."""
    for name, parameter in model.named_parameters():
        if name in model.base_weights:
            parameter.data.lerp_(model.base_weights[name], share)


def cast_for_serving(model: Any) -> None:
    """Round a trained model's weights to the number format that it is served in, so that measurements are of what serves.

    An adapter is trained in float32 and served in the number format of its base.
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
    """Save the trained weights in the directory of a version."""
    if hasattr(model, "base_weights"):
        with _undivided_cap(model):
            model.save_pretrained(directory / WHOLE)
        return
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)


def load_state(model: Any, directory: Path) -> None:
    """Load the weights that `save` wrote into a model of the same kind."""
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
    """Restore the original logit cap in a model's config for the block, so that it is the one that is saved."""
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
    """Cast an adapter, which is trained in float32, to the number format of its base and of the server for the block."""
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
    """Make a model compute in float32 for the block, as the reference for a server. Its weights are restored exactly."""
    narrow = [(value, value.dtype) for value in model.parameters() if value.dtype.itemsize < 4]
    try:
        for value, _ in narrow:
            value.data = value.data.float()
        yield
    finally:
        for value, dtype in narrow:
            value.data = value.data.to(dtype)


def find_not_finite(model: "Model") -> list[str]:
    """Return the names of weights that hold NaN or infinity."""
    return [name for name, value in model.named_parameters() if not value.isfinite().all()]


def _load_pretrained(
    policy: PolicyConfig, serving: ServingConfig, source: str, advice: str = "put it back, or name another"
) -> "PreTrainedModel":
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        found = AutoModelForCausalLM.from_pretrained(source, dtype=choose_dtype(serving, source))
        divide_logits(found, policy.temperature)
        share_prefixes(found)
        return found.to("cuda") if torch.cuda.is_available() else found
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingError(
            f"out of memory while loading '{source}'; lower serving.memory_share so that vLLM leaves room for it, end other "
            "programs on the GPU, or set serving.sleep_while_training = true"
        ) from error
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise TrainingError(f"the model '{source}' cannot be loaded ({quote_error(error)}); {advice}") from error


def divide_logits(model: "PreTrainedModel", temperature: float) -> None:
    """Divide a model's logits by `temperature`. Raises TrainingError for an architecture where that is not possible."""
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
        if capped is not None:  # logits are cap · tanh(x / cap), so x and the cap must be divided alike
            setattr(settings, CAP, capped / temperature)
            settings.undivided_cap = capped
        after = model(input_ids=ids).logits.float()
    if not (after * temperature - before).abs().mean() <= 0.02 * before.abs().mean():
        raise TrainingError(
            f"config key policy.temperature has value {temperature:g}, which training cannot reproduce for the architecture "
            f"{type(model).__name__}; set policy.temperature = 1.0, or use another model"
        )


def _make_whole(policy: PolicyConfig, serving: ServingConfig, base_model: str, model: Any) -> "PreTrainedModel":
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
    base = _load_pretrained(policy, serving, base_model).named_parameters()
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
    """Suppress the libraries' own progress bars and warnings."""
    os.environ["TQDM_DISABLE"] = "1"  # must be set before a library that makes bars is imported
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
