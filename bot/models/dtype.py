"""Dtype: the number format that server and trainer share. It loads no model."""

from bot.accelerator import has_gpu, read_card
from bot.config import Config
from bot.errors import ConfigError


def choose_dtype(config: Config, model: str) -> str:
    """Return the number format of server and trainer alike: as configured, or as the model was saved.

    What was saved in a format that vLLM does not compute in, such as float64, has float32. On a GPU it has 16 bits: vLLM's
    LoRA kernels take no others. Raises ConfigError where float32 is asked for there.
    """
    on_gpu = has_gpu()
    wanted = config.serving.dtype
    if wanted == "float32" and on_gpu:
        raise ConfigError(
            "config key serving.dtype has value 'float32', which vLLM's LoRA kernels do not take on a GPU; "
            'set it to "auto" or "bfloat16"'
        )
    if wanted != "auto":
        return wanted
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(model).dtype
    saved = str(dtype).removeprefix("torch.") if dtype is not None else "auto"
    if saved in ("bfloat16", "float16"):
        return saved
    if not on_gpu:
        return saved if saved == "auto" else "float32"
    card = read_card()
    return "float16" if card is not None and card.capability < 8 else "bfloat16"
