"""The commands that fit weights for the tracker: of retrieval, of topics and of follow-ups."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bot import output_files
from bot.cli.options import JsonFile, command, path_argument, path_option
from bot.config import Config
from bot.errors import ConfigError
from bot.memory.embedder import Embedder, make_embedder
from bot.models.purpose import Purpose
from bot.output import check_writable, print_figures, progress_bar, write_json
from bot.store.stores import open_stores
from learning.training.choice import prepare_model


def _require_embedder(config: Config) -> Embedder:
    """Return the configured embedding model. Raises ConfigError if there is none."""
    found = make_embedder(config.dialogue, config.data)
    if found is None:
        raise ConfigError("config key dialogue.embedder has value 'none'; name an embedding model")
    return found


@command("fit-retrieval")
def fit_retrieval(
    config: Config,
    out: Annotated[Path | None, path_option("--out", help="Write the weights to this file.")] = None,
    dialogues: Annotated[int, typer.Option(min=1, help="How many synthetic dialogues to learn from.")] = 24,
    from_feedback: Annotated[
        bool, typer.Option("--from-feedback", help="Learn from the answers that people judged.")
    ] = False,
) -> None:
    """Fit the weights of the retrieval signals, on synthetic dialogues or on the answers that your people judged."""
    from learning.fitting import retrieval
    from learning.fitting.dialogues import make_dialogue

    check_writable(out)
    embedder = _require_embedder(config)
    setup: dict[str, Any] = {"seed": config.seed, "embedder": config.dialogue.embedder}
    with progress_bar() as progress:
        if from_feedback:
            learned, setup["judged"] = _fit_from_feedback(config, embedder, progress)
        else:
            made = (make_dialogue(1000 * config.seed + number, people=(2, 6, 12)[number % 3]) for number in range(dialogues))
            learned = retrieval.fit(list(retrieval.make_examples(made, embedder, progress)))
            setup["dialogues"] = dialogues
    print_figures(learned)
    if out is not None:
        output_files.write_text(out, json.dumps({"weights": learned, "setup": setup}, indent=2) + "\n")


def _fit_from_feedback(config: Config, embedder: Embedder, progress: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """Fit the weights in use to what people judged. Return them with their figures on held-out examples."""
    from bot.memory.recall import load_retrieval_weights
    from bot.memory.scope import Memory
    from bot.models.tokenizer import ChatTokenizer
    from learning.data.replay_buffer import ReplayBuffer
    from learning.fitting import reminders, retrieval

    database, store, _ = open_stores(config)
    config, model = prepare_model(config, purpose=Purpose.READ)
    rated = ReplayBuffer(store, ChatTokenizer(model, config.policy.template_args), config).read_rated()
    memory = Memory(database, config.dialogue.across_channels)
    judged = list(reminders.read_judged_examples(rated, store, memory, embedder, progress))
    return retrieval.fit_and_validate(judged, load_retrieval_weights(config.dialogue.retrieval_weights))


@command("fit-topics")
def fit_topics(
    config: Config,
    train: Annotated[Path, path_argument("Dialogues with marked topics, in TIAGE's format.")],
    test: Annotated[Path, path_option("--test", help="Other such dialogues, to evaluate on.")],
    out: Annotated[Path | None, path_option("--out", help="Write the weights to this file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Fit the detection of topic changes on dialogues in which people marked them."""
    from learning.fitting import topics

    check_writable(out, json_file)
    embedder = _require_embedder(config)
    known, unknown = topics.read(train), topics.read(test)
    with progress_bar() as progress:
        learned, figures = topics.fit_and_judge(known, unknown, embedder, progress)
    print_figures(figures)
    write_json(json_file, "fit-topics", figures, {"train": train.name, "test": test.name})
    if out is not None:
        output_files.write_text(out, json.dumps(learned, indent=2) + "\n")


@command("fit-followups")
def fit_followups(
    config: Config,
    out: Annotated[Path | None, path_option("--out", help="Write the weights to this file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Fit the classifier of follow-ups on the phrases that come with kibitz."""
    from learning.fitting import followups

    check_writable(out, json_file)
    embedder = _require_embedder(config)
    with progress_bar() as progress:
        learned, figures = followups.fit(config.seed, embedder, progress)
    print_figures(figures)
    write_json(json_file, "fit-followups", figures, {"seed": config.seed, "embedder": config.dialogue.embedder})
    if out is not None:
        output_files.write_text(out, json.dumps(learned) + "\n")
