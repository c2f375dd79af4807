"""Dtype: chooses the number format that server and trainer share."""

from bot.accelerator import has_gpu, read_card
from bot.config import ServingConfig
from bot.errors import ConfigError
from bot.models.shape import find_saved_dtype, read_settings


def choose_dtype(serving: ServingConfig, model: str) -> str:
    """Return the number format for server and trainer: the configured one, or that of the saved model.

    A model saved in another format than 16 bits gets float32 on processors. On a GPU it gets 16 bits, because vLLM's LoRA
    kernels take no others. Raises ConfigError if float32 is configured on a GPU.
    """
    on_gpu = has_gpu()
    wanted = serving.dtype
    if wanted == "float32" and on_gpu:
        raise ConfigError(
            "config key serving.dtype has value 'float32', which vLLM's LoRA kernels do not take on a GPU; "
            'set it to "auto" or "bfloat16"'
        )
    if wanted != "auto":
        return wanted
    saved = find_saved_dtype(read_settings(model)) or "auto"
    if saved in ("bfloat16", "float16"):
        return saved
    if not on_gpu:
        return saved if saved == "auto" else "float32"
    card = read_card()
    return "float16" if card is not None and card.capability < 8 else "bfloat16"
