"""The configuration: the keys of `config.toml`, their defaults, and their errors.

An unknown key is an error that names the nearest known key. Secrets are given by the name of an environment variable, never
by value.

Use ``config = load(Path("config.toml"))``. `config.example.toml` shows every key.
"""

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import sqlalchemy as sa
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from bot.config_values import SECRET, Address, Candidates, Hours, PathName, Plain, Positive, Share, Variable
from bot.environment import read_secret, read_variable
from bot.errors import ConfigError
from bot.types import SamplingParams

VLLM_HOST = "127.0.0.1"  # our own vLLM must not be reachable from elsewhere: its --api-key guards only /v1
DEFAULT_PERSONA = (
    "You are kibitz, a friendly regular of this chat."  # for every model but the toy, if dialogue.persona is not set
)


class Section(BaseModel):
    """A part of the config. It is immutable and refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def fill(self, values: Mapping[str, Any]) -> Self:
        """Return the section with `values` for the keys that were not set."""
        return self.model_copy(update={key: value for key, value in values.items() if key not in self.model_fields_set})


class PolicyConfig(Section):
    """The model that answers, and how its answers are sampled."""

    model: PathName = "builtin"
    context_tokens: Annotated[int, Field(ge=64)] = 1024
    max_tokens: Positive = 128
    thought_tokens: Positive = 512
    template_args: dict[str, Plain] = {}
    temperature: Annotated[float, Field(ge=0.01, le=2)] = 1.0  # below that vLLM samples as at 0.01, and a trainer does not
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def truncation(self) -> SamplingParams:
        """The sampling parameters that cut off unlikely tokens."""
        return SamplingParams(top_p=self.top_p, top_k=self.top_k, min_p=self.min_p)

    @property
    def sampling(self) -> SamplingParams:
        """All sampling parameters."""
        return self.truncation | SamplingParams(temperature=self.temperature)


class ServingConfig(Section):
    """The vLLM server."""

    url: Address = ""
    api_key_env: Variable = ""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    memory_share: Annotated[float, Field(ge=0, le=0.98)] = 0.0
    sleep_while_training: bool = False
    max_loras: Annotated[int, Field(ge=3)] = 4
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    startup_seconds: Positive = 300
    reply_seconds: Positive = 120
    candidates: Candidates = 8
    extra_args: list[str] = []

    def read_key(self) -> str:
        """Return the API key of the vLLM at `url`. Raises ConfigError if its variable is not set."""
        return read_secret("serving.api_key_env", self.api_key_env) if self.api_key_env else "none"


class DialogueConfig(Section):
    """What the policy gets in its prompt."""

    persona: str = ""
    embedder: PathName = "all-MiniLM-L6-v2"
    remembered: Annotated[int, Field(ge=0)] = 8
    across_channels: bool = False
    retrieval_weights: PathName = ""
    recent: Positive = 32


class ReactionsConfig(Section):
    """The emoji that are opinions. All others are neutral."""

    approval: list[str] = ["👍", "❤️", "🎉", "😂", "🔥", "💯", "🙏", "🥰", "😍", "👏", "✅"]
    disapproval: list[str] = ["👎", "😡", "🤮", "💩", "😠", "❌"]


class RewardsConfig(Section):
    """How feedback becomes a reward in [-1, 1]."""

    approval: Annotated[float, Field(ge=-1, le=1)] = 1.0
    disapproval: Annotated[float, Field(ge=-1, le=1)] = -1.0
    regenerate: Annotated[float, Field(ge=-1, le=1)] = -0.5
    correction: Annotated[float, Field(ge=-1, le=1)] = -0.5
    followup: Share = 0.0
    asker_weight: Annotated[float, Field(gt=0)] = 2.0
    bystander_weight: Annotated[float, Field(gt=0)] = 1.0
    person_cap: Annotated[float, Field(gt=0, le=1)] = 0.25
    prior: Annotated[float, Field(ge=0)] = 8.0
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.0


class RewardModelConfig(Section):
    """The model that judges answers without feedback, for reports."""

    kind: Literal["embedding", "head", "lm"] = "embedding"


class PrivacyConfig(Section):
    """Whom kibitz may learn from, and how long messages are kept."""

    consent: Literal["assumed", "asked"] = "assumed"
    retention_days: Annotated[int, Field(ge=0, le=36_500)] = 0


class LearningConfig(Section):
    """When to train, and on what."""

    enabled: bool = True
    # "min_reactions" is its older name
    distil_every: Positive = Field(default=20, validation_alias=AliasChoices("distil_every", "min_reactions"))
    distil_prompts: Annotated[int, Field(ge=0)] = 20
    distil_rate: Annotated[float, Field(gt=0)] = 4.0
    own_answers: Annotated[int, Field(ge=0, le=16)] = 4
    check_seconds: Annotated[float, Field(gt=0)] = 5.0
    wait_reactions: Annotated[int, Field(ge=0)] = 24
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.25
    max_turns: Positive = 512
    fresh: Share = 0.5
    detect_drift: bool = True
    max_age: Positive = 8
    from_base_every: Annotated[int, Field(ge=0)] = 0


class TrainingConfig(Section):
    """One training run."""

    objective: Literal["kto", "bco", "dpo", "sft", "pg", "mixed"] = "kto"
    weights: Literal["lora", "full"] = "lora"
    anchor: Annotated[float, Field(ge=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 20.0
    lora_rank: Literal[1, 8, 16, 32, 64, 128, 256] = 16
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    full_learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-5
    beta: Annotated[float, Field(gt=0)] = 0.5
    batch_size: Annotated[int, Field(ge=4, le=4096)] = 16
    epochs: Positive = 8
    max_steps: Positive = 30
    max_length: Annotated[int, Field(ge=32)] = 1024
    processes: Positive = 1


class GateConfig(Section):
    """The evidence that a candidate needs to go live."""

    min_held_out: Annotated[int, Field(ge=2)] = 6
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    kl_budget: Annotated[float, Field(gt=0)] = 0.5
    well_formed: Share = 0.95
    samples: Positive = 192
    probe_tolerance: Annotated[float, Field(gt=0)] = 0.05


class AccessConfig(Section):
    """Who may talk to kibitz and teach it."""

    allow_users: list[str] = []
    deny_users: list[str] = []
    allow_channels: list[str] = []
    deny_channels: list[str] = []
    allow_roles: list[str] = []
    deny_roles: list[str] = []
    operators: list[str] = []
    operator_roles: list[str] = []
    messages_per_minute: Positive = 20
    opinions_per_minute: Positive = 60
    source_messages_per_minute: Positive = Field(default_factory=lambda found: 10 * found["messages_per_minute"])
    source_opinions_per_minute: Positive = Field(default_factory=lambda found: 10 * found["opinions_per_minute"])


class WebConfig(Section):
    """The OpenAI-compatible API and the chat page."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    tokens_env: Variable = ""
    trust_user_names: bool = False
    candidates: Candidates = 1
    cors_origins: list[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]] = []


class DiscordConfig(Section):
    """The Discord bot; off without a token."""

    token_env: Variable = ""
    message_content: bool = False
    edits: Positive = 4
    edit_seconds: Annotated[float, Field(gt=0)] = 5.0
    waiting: Positive = 8
    reconcile_hours: Hours = 24.0


class SlackConfig(Section):
    """The Slack app, in Socket Mode or by HTTP; off without tokens."""

    bot_token_env: Variable = ""
    app_token_env: Variable = ""
    signing_secret_env: Variable = ""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8081
    follow_threads: bool = False
    streams: Positive = 18
    edits: Positive = 40
    waiting: Positive = 8
    reconcile_hours: Hours = 24.0


class LogConfig(Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    text: bool = False


class DatabaseConfig(Section):
    """Where conversations and feedback are kept."""

    url: str = ""
    url_env: Variable = ""


class Config(Section):
    """The whole config. Relative paths are relative to the working directory."""

    data_dir: PathName = "kibitz-data"
    seed: Annotated[int, Field(ge=0)] = 0
    policy: PolicyConfig = PolicyConfig()
    serving: ServingConfig = ServingConfig()
    dialogue: DialogueConfig = DialogueConfig()
    reactions: ReactionsConfig = ReactionsConfig()
    rewards: RewardsConfig = RewardsConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    learning: LearningConfig = LearningConfig()
    training: TrainingConfig = TrainingConfig()
    gate: GateConfig = GateConfig()
    database: DatabaseConfig = DatabaseConfig()
    access: AccessConfig = AccessConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    web: WebConfig = WebConfig()
    discord: DiscordConfig = DiscordConfig()
    slack: SlackConfig = SlackConfig()
    log: LogConfig = LogConfig()

    @property
    def data(self) -> Path:
        """The data directory, which contains everything that kibitz writes."""
        return Path(self.data_dir)

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL of the database. Raises ConfigError if its variable is not set."""
        if self.database.url_env:
            return read_variable("database.url_env", self.database.url_env)
        file = sa.URL.create("sqlite", database=str(self.data / "kibitz.db"))
        return self.database.url or file.render_as_string(hide_password=False)

    @property
    def addresses(self) -> dict[str, tuple[str, int]]:
        """The host and port of each server that is turned on, by the config key of the port."""
        found = {} if self.serving.url else {"serving.port": (VLLM_HOST, self.serving.port)}
        if self.web.enabled:
            found["web.port"] = (self.web.host, self.web.port)
        if self.slack.signing_secret_env:
            found["slack.port"] = (self.slack.host, self.slack.port)
        return found

    def without_secrets(self) -> Self:
        """Return the config without the database's URL, which may contain a password."""
        return self.model_copy(update={"database": self.database.model_copy(update={"url": ""})})

    def save(self, path: Path) -> None:
        """Write the resolved config as JSON, without secrets. `load` reads it back."""
        path.write_text(json.dumps(self.without_secrets().model_dump(), indent=1, sort_keys=True))


def load(path: Path | None = None, **overrides: Any) -> Config:
    """Return the config of a TOML (or resolved JSON) file, or the defaults. `overrides` that are not None come first.

    Raises ConfigError with one line that names the key, the value and the fix.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8-sig")  # Windows editors write a BOM
            values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except OSError as error:
            raise ConfigError(f"--config {path}: cannot be read ({error.strerror}); name an existing file") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"--config {path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
        except ValueError as error:
            raise ConfigError(f"--config {path}: is not valid TOML ({error}); fix it") from error
    values.update({key: value for key, value in overrides.items() if value is not None})
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_describe_first_error(error)) from None  # the cause may quote a secret
    if config.database.url and config.database.url_env:
        raise ConfigError("config keys database.url and database.url_env are both set; remove one of them")
    keys: dict[int, str] = {}
    for key, (_, port) in config.addresses.items():
        if port and keys.setdefault(port, key) != key:
            raise ConfigError(f"config keys {keys[port]} and {key} both have value {port}; use two different ports")
    if config.training.lora_rank > config.serving.max_lora_rank:
        raise ConfigError(
            f"config key training.lora_rank has value {config.training.lora_rank}, above serving.max_lora_rank "
            f"({config.serving.max_lora_rank}); raise serving.max_lora_rank or lower training.lora_rank"
        )
    if config.training.batch_size < 2 * config.training.processes:
        raise ConfigError(
            f"config key training.processes has value {config.training.processes}, too many for training.batch_size "
            f"({config.training.batch_size}), each needs 2 answers per step; lower the first or raise the second"
        )
    return config


def list_known_keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Return every dotted key of the config with its default."""
    keys: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.default, Section):
            keys.update(list_known_keys(type(info.default), f"{prefix}{name}."))
        else:
            keys[prefix + name] = info.default
    return keys


OLDER_NAMES = {"learning.min_reactions": "learning.distil_every"}


def _describe_first_error(error: ValidationError) -> str:
    detail = error.errors()[0]
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden" and key in OLDER_NAMES:
        return f"config key '{key}' is the older name of '{OLDER_NAMES[key]}', which is set too; remove one of them"
    if detail["type"] == "extra_forbidden":
        known = [*list_known_keys(), *{name.split(".")[0] for name in list_known_keys()}]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        tail = key.split(".")[-1]
        near = near or [name for name in known if name.split(".")[-1] == tail][:1]
        hint = f"did you mean '{near[0]}'?" if near else "config.example.toml shows every key"
        return f"config key '{key}' is not known; {hint}"
    wanted = detail["msg"][0].lower() + detail["msg"][1:]
    if detail["type"] == SECRET or key.startswith("database"):
        return f"config key '{key}': {wanted}"
    return f"config key '{key}' has value {detail['input']!r}; {wanted}"
