"""Find, make and check the base model of a command, and fill in the config's defaults for it.

Every command that chats, serves, simulates, measures or trains calls this first, before anything starts or connects.
"""

from collections.abc import Callable

from bot.config import DEFAULT_PERSONA, Config
from bot.models.check import check_files, check_model
from bot.models.purpose import Purpose
from bot.models.sampling import apply_sampling_defaults, describe_sampling
from bot.models.sizes import apply_size_defaults, describe_sizes
from bot.output import announce, progress_bar
from bot.serving.vllm_arguments import check_extra_args
from learning.models import builtin
from learning.training import pretrain as pretraining

Announce = Callable[[str], None]


def find_base_model(config: Config, tell: Announce = announce) -> str:
    """Return the config's base model, as a path or hub name. The toy is made, and "builtin" converted, on first use.

    Raises ConfigError if there is no such model.
    """
    with progress_bar() as progress:
        return pretraining.find_or_make_base_model(config.policy.model, config.data, config.seed, tell, progress)


def resolve_model(config: Config, tell: Announce = announce, purpose: Purpose = Purpose.SERVE) -> tuple[Config, str]:
    """Return the config with its unset values filled in for the base model, and the model's path or hub name.

    Raises ConfigError if the model does not exist or its files are incomplete.
    """
    model = find_base_model(config, tell)
    check_files(config.policy, model)
    if pretraining.is_toy(model):  # the config's defaults were chosen for the toy
        return config, model
    suits = {"persona": DEFAULT_PERSONA, **(builtin.DIALOGUE if model == str(builtin.locate_model()) else {})}
    filled = {"dialogue": config.dialogue.fill(suits), "policy": apply_sampling_defaults(config.policy, model)}
    return apply_size_defaults(config.model_copy(update=filled), model, purpose), model


def prepare_model(config: Config, tell: Announce = announce, purpose: Purpose = Purpose.SERVE) -> tuple[Config, str]:
    """Resolve and check the base model. As `resolve_model`, with vLLM's share of the GPU memory in the config.

    Raises ConfigError if the model cannot be trained on this machine or, if `purpose` says so, not be served.
    """
    found, model = resolve_model(config, tell, purpose)
    check_extra_args(config.serving, config.policy)
    plan = check_model(found, model, purpose)
    if not pretraining.is_toy(model) and purpose != Purpose.READ:
        tell(describe_sampling(config.policy, model))
        tell(describe_sizes(found, model, config))
    if plan is not None:
        tell(plan.description)
        found = found.model_copy(update={"serving": found.serving.model_copy(update={"memory_share": plan.share})})
    return found, model
