"""The supervised warm start: make a base model from prompt-response pairs.

`make_demo` builds the toy policy (a small Qwen3 with its own byte-level tokenizer, trained from random weights on
`learning.models.toy`). `warm_start` fine-tunes any other base model on the operator's own pairs. Both use TRL's SFTTrainer.

Run: ``kibitz pretrain`` for the toy policy, ``kibitz pretrain PAIRS`` for your own.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bot.config import TrainingConfig
from bot.data_directory import lock_directory
from bot.errors import ConfigError, quote_error
from bot.models.check import raise_if_refused
from bot.models.hashes import write_hashes
from bot.models.tokenizer import ChatTokenizer
from bot.types import Progress
from learning.models import builtin, toy
from learning.models.trainable import silence_libraries

Dialogue = list[dict[str, str]]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOY = ("toy", "demo")  # its names in policy.model
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class DemoRecipe:
    """All that the toy policy depends on. Its hash names the directory in which the policy is cached."""

    seed: int = 0
    dialogues: int = 10_000
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    vocabulary: int = 1536
    batch_size: int = 16
    learning_rate: float = 3e-3
    initializer_range: float = 0.1  # with 0.02, the default, a minute of training makes a much worse policy

    def locate_model(self, data: Path) -> Path:
        """Return the directory of this recipe's policy under the data directory."""
        recipe = json.dumps(asdict(self), sort_keys=True) + toy.TEXTS
        return data / "models" / f"demo-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def is_toy(model: str) -> bool:
    """Tell whether a base model, named as in a config or given as a path, is the toy policy."""
    directory = Path(model)
    return model in TOY or (directory.name.startswith("demo-") and _has_dimensions_of(directory, DemoRecipe()))


def _has_dimensions_of(directory: Path, recipe: DemoRecipe) -> bool:
    """Tell whether a model has the dimensions of a recipe. Another model's name may also begin with "demo-"."""
    try:
        settings = json.loads((directory / "config.json").read_text())
        found = [settings[key] for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return found == ["qwen3", recipe.vocabulary, recipe.hidden, recipe.layers]


def find_or_make_base_model(name: str, data: Path, seed: int, tell: Callable[[str], None], progress: Progress) -> str:
    """Return the base model that `policy.model` names, as a path or hub name. "builtin" is converted, and "toy" (its older
    name is "demo") made, on first use.

    Raises ConfigError if there is no such model.
    """
    if name == "builtin":
        return str(builtin.find_or_convert(tell, progress))
    if name in TOY:
        recipe = DemoRecipe(seed=seed)
        directory = recipe.locate_model(data).absolute()
        if not (directory / "config.json").exists():
            tell("making the toy policy (once, about a minute)")
            with lock_directory(data, "train"):
                make_demo(recipe, data, progress)
        return str(directory)
    try:
        path = Path(name).expanduser()
        has_config = (path / "config.json").is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, an unknown user's home, or not a path
        raise ConfigError(
            f"config key policy.model has value '{name[:80]}', which is not a path ({quote_error(error)}); name a model's "
            "directory, a hub model (owner/name), 'builtin' or 'toy'"
        ) from error
    if has_config:
        return str(path.absolute())
    if path.is_absolute() or name.startswith(".") or path.exists() or name.count("/") > 1:
        raise ConfigError(
            f"config key policy.model has value '{name}', but there is no model (no config.json); "
            "name a model's directory, a hub model (owner/name), 'builtin' or 'toy'"
        )
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name)
    except Exception as error:  # from the hub, the network, or the checks of an architecture
        raise_if_refused(name, error)
        raise ConfigError(
            f"config key policy.model has value '{name}', which is neither a directory nor a hub model that can be "
            f"used ({_first_cause(error)}); check the name and the network, download it first, or use 'builtin'"
        ) from error
    return name


def _first_cause(error: BaseException) -> str:
    """Quote the first error of a chain: the last one of transformers often says only that it could not connect."""
    while error.__cause__ is not None:
        error = error.__cause__
    return quote_error(error)


def make_demo(recipe: DemoRecipe, data: Path, progress: Progress) -> Path:
    """Build the toy policy unless it exists already, and return its directory.

    This takes about a minute on two cores. The directory appears complete or not at all. The same recipe gives the same
    bytes.
    """
    directory = recipe.locate_model(data)
    if (directory / "config.json").exists():
        return directory
    silence_libraries()
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    dialogues = toy.make_dialogues(recipe.dialogues, recipe.seed)
    _train_tokenizer([message["content"] for dialogue in dialogues for message in dialogue], recipe, unfinished)
    tokenizer = ChatTokenizer(str(unfinished))
    set_seed(recipe.seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=3 * recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            head_dim=recipe.hidden // recipe.heads,
            max_position_embeddings=4096,
            initializer_range=recipe.initializer_range,
            tie_word_embeddings=True,
            dtype=torch.float32,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=2,
        )
    )
    fine_tune(model, tokenizer, dialogues, recipe.seed, recipe.learning_rate, recipe.batch_size, 1, unfinished, progress)
    model.save_pretrained(unfinished)
    write_hashes(unfinished)
    unfinished.rename(directory)
    return directory


def check_output_directory(directory: Path) -> None:
    """Check that a model can be written to a directory: it is new or empty, or holds a model to replace.

    Raises ConfigError if it holds anything else, because that would be deleted.
    """
    if not directory.absolute().parent.is_dir():
        raise ConfigError(f"--out {directory}: there is no directory {directory.absolute().parent}; make it first")
    is_model = (directory / "config.json").is_file()
    if directory.exists() and not is_model and not (directory.is_dir() and not any(directory.iterdir())):
        raise ConfigError(f"--out {directory}: the path exists and holds no model; name a new directory")


def warm_start(
    model_path: str,
    dialogues: list[Dialogue],
    directory: Path,
    seed: int,
    epochs: int,
    learning_rate: float,
    progress: Progress,
    template_args: Mapping[str, bool | int | float | str] | None = None,
) -> dict[str, float]:
    """Fine-tune all weights of a model on `dialogues`, save it to `directory`, and return its held-out figures.

    A tenth of the dialogues (at least one) is held out. Returns `bleu` and `rouge_l` (0-100), `perplexity`,
    `perplexity_before`, and the counts `pairs` and `held_out`.
    """
    silence_libraries()
    from transformers import AutoModelForCausalLM, set_seed

    from learning.judging.evaluation import answer_logprobs, generate_greedily, perplexity

    shuffled = list(dialogues)
    random.Random(seed).shuffle(shuffled)
    cut = max(1, len(shuffled) // 10)
    held_out, training = shuffled[:cut], shuffled[cut:]
    set_seed(seed)
    tokenizer = ChatTokenizer(model_path, template_args)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    rows = [_split_before_first_answer(_tokenize_dialogue(tokenizer, dialogue)) for dialogue in held_out]
    before = perplexity(answer_logprobs(model, rows))
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    fine_tune(model, tokenizer, training, seed, learning_rate, 16, epochs, unfinished, progress)
    prompts = [tokenizer.prompt_ids(dialogue[:-1]) for dialogue in held_out[:200]]
    said = generate_greedily(model, tokenizer, prompts, max_tokens=64)
    measures = text_overlap([reply.text for reply in said], [dialogue[-1]["content"] for dialogue in held_out[:200]])
    measures |= {"perplexity_before": before, "perplexity": perplexity(answer_logprobs(model, rows))}
    model.save_pretrained(unfinished)
    tokenizer.hf.save_pretrained(unfinished)
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.rename(directory)
    return measures | {"pairs": len(training), "held_out": len(held_out)}


def text_overlap(said: list[str], wanted: list[str]) -> dict[str, float]:
    """Return corpus BLEU (sacrebleu) and mean ROUGE-L F1 (rouge-score) of answers against references, both 0-100."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [scorer.score(target, text)["rougeL"].fmeasure for text, target in zip(said, wanted, strict=True)]
    return {"bleu": sacrebleu.corpus_bleu(said, [wanted]).score, "rouge_l": 100 * sum(rouge) / len(rouge)}


def fine_tune(
    model: object,
    tokenizer: ChatTokenizer,
    dialogues: list[Dialogue],
    seed: int,
    learning_rate: float,
    batch_size: int,
    epochs: int,
    workspace: Path,
    progress: Progress,
) -> None:
    """Fine-tune a model in place with TRL's SFTTrainer on the answers in dialogues."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from learning.models.batching import fit_to_machine, machine_arguments
    from learning.models.reporter import report_progress
    from learning.training.objectives import scoring_answers_alone

    rows = [_tokenize_dialogue(tokenizer, dialogue) for dialogue in dialogues]
    longest = min(1024, max(len(row["input_ids"]) for row in rows))
    fit = fit_to_machine(model, TrainingConfig(objective="sft", weights="full"), batch_size, longest)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(workspace),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            adam_beta2=0.98,
            max_length=1024,
            seed=seed,
            **machine_arguments(fit),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer.hf,
    )
    report_progress(trainer, "pretrain", progress)
    with scoring_answers_alone():
        trainer.train()


def _split_before_first_answer(row: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """Split a row's ids into those before its first answer and the rest."""
    start = next(index for index, label in enumerate(row["labels"]) if label != -100)
    return row["input_ids"][:start], row["input_ids"][start:]


def _tokenize_dialogue(tokenizer: ChatTokenizer, dialogue: Dialogue) -> dict[str, list[int]]:
    """Return the ids of a dialogue, with the assistant's answers as labels and the rest masked (-100)."""
    ids: list[int] = []
    labels: list[int] = []
    for index, message in enumerate(dialogue):
        if message["role"] == "assistant":
            prompt = tokenizer.prompt_ids(dialogue[:index])
            answer = tokenizer.completion_ids(message["content"])
            if prompt[: len(ids)] != ids:  # the template renders earlier messages differently: mask their answers
                labels = []
            labels += [-100] * (len(prompt) - len(labels)) + answer
            ids = prompt + answer
    return {"input_ids": ids, "labels": labels}


def _train_tokenizer(texts: list[str], recipe: DemoRecipe, directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", model_max_length=4096
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
