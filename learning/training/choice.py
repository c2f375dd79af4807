"""ModelChoice: the base model of a command, made or found, checked, and the config as suits it.

Every command that chats, serves, simulates, measures or trains begins here, before anything starts or connects.
"""

from collections.abc import Callable

from bot.config import DEFAULT_PERSONA, Config
from bot.models.check import check_files, check_model
from bot.models.sampling import apply_sampling_defaults, describe_sampling
from bot.models.sizes import apply_size_defaults, describe_sizes
from bot.output import announce, progress_bar
from bot.serving.vllm_arguments import check_extra_args
from learning.models import builtin
from learning.training import pretrain as pretraining

Announce = Callable[[str], None]


def find_base_model(config: Config, tell: Announce = announce) -> str:
    """The base model that the config names, as something that transformers and vLLM load; the toy is made on first use."""
    with progress_bar() as progress:
        return pretraining.find_or_make_base_model(config, tell, progress)


def resolve_model(config: Config, tell: Announce = announce, replays: bool = False) -> tuple[Config, str]:
    """Return the config with what it leaves open set as suits the base model, and the model, as vLLM loads it.

    Raises ConfigError where the model is not there, or its files are not whole.
    """
    model = find_base_model(config, tell)
    check_files(config, model)
    if pretraining.is_toy(model):  # the config's own defaults are the toy's
        return config, model
    suits = {"persona": DEFAULT_PERSONA, **(builtin.DIALOGUE if model == str(builtin.locate_model()) else {})}
    config = config.model_copy(update={"dialogue": config.dialogue.fill(suits)})
    return apply_size_defaults(apply_sampling_defaults(config, model), model, replays), model


def prepare_model(
    config: Config, tell: Announce = announce, serves: bool = True, replays: bool = False
) -> tuple[Config, str]:
    """As `resolve_model`, of a model that is checked, with the share of the GPU that vLLM takes.

    Raises ConfigError, before anything starts or connects, where it cannot be trained here or, if it `serves`, be served.
    """
    found, model = resolve_model(config, tell, replays)
    check_extra_args(config)
    plan = check_model(found, model, serves)
    if not pretraining.is_toy(model):
        tell(describe_sampling(config, model))
        tell(describe_sizes(found, model, config))
    if plan is not None:
        tell(plan.description)
        found = found.model_copy(update={"serving": found.serving.model_copy(update={"memory_share": plan.share})})
    return found, model
