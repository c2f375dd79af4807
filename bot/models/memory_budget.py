"""MemoryBudget: computes how much GPU memory vLLM and a training run need, and plans shares, batches and checkpointing.

It computes all in bytes from a model's shape, so that nothing has to fail first. A training run needs the weights, the
adapter with its float32 gradients and Adam's two moments, and the larger of two peaks: a step (activations of every layer,
or with gradient checkpointing of one layer and the inputs of the others), and an evaluation (logits over the vocabulary for
`EVALUATION_TOKENS` positions, of the policy and its base). A step needs no logits: TRL projects them in tiles.
`tests/test_memory_budget.py` compares the activations with those that torch keeps.
"""

from dataclasses import dataclass

from bot.accelerator import GIB, Card
from bot.config import Config, PolicyConfig, ServingConfig, TrainingConfig
from bot.errors import ConfigError
from bot.models.shape import ModelShape
from bot.wording import count_noun

ALLOCATOR_FACTOR = 1.15  # torch's allocator keeps more memory than is in use
CUDA_CONTEXT_BYTES = int(0.8 * GIB)  # CUDA's context and kernels, in each process
EVALUATION_TOKENS = 2048  # learning.judging.evaluation.BATCH_TOKENS
LEAST_PARALLEL_ANSWERS = 32  # answers that a run can always sample at once (learning.judging.evaluation.generate)
TILE = 4096 * 32768  # logits that TRL's output layer holds at once, at most
CONCURRENT = 8  # answers that vLLM must be able to generate at once
CUDA_GRAPH_BYTES = int(1.0 * GIB)  # CUDA graphs, which vLLM takes in addition to its share
LARGE_CARD = 70 * GIB  # from this size vLLM reads 8,192 tokens and 1,024 answers at once, otherwise 2,048 and 256
LARGEST_SHARE = 0.92  # vLLM's default
SPARE_BYTES = int(0.5 * GIB)  # of every card, for displays and other processes' contexts
SLEEPING_BYTES = int(2.5 * GIB)  # that a sleeping vLLM keeps: its context and graphs
LEAST_FOR_KTO = 4  # answers at once; with fewer the KL term is poor


@dataclass(frozen=True)
class BatchFit:
    """How a step reads its batch: the answers at once, the accumulation steps, gradient checkpointing, and its peak memory
    in bytes.
    """

    answers: int
    accumulation_steps: int
    gradient_checkpointing: bool
    peak_bytes: int = 0

    def shrink(self) -> "BatchFit":
        """Return a fit that needs less memory: half the answers at once (at least four), with gradient checkpointing."""
        answers = max(min(self.answers, LEAST_FOR_KTO), self.answers // 2)
        return BatchFit(answers, -(-self.answers * self.accumulation_steps // answers), True)


@dataclass(frozen=True)
class MemoryPlan:
    """The share of the card that vLLM takes, the batches of a training run beside it, and both described in one line."""

    share: float
    batch: BatchFit | None
    description: str


def weights_bytes(shape: ModelShape, element: int) -> int:
    """Count the bytes of a model's weights, with `element` bytes each."""
    return shape.parameters * element


def training_state_bytes(shape: ModelShape, training: TrainingConfig, element: int) -> int:
    """Count the bytes that a run holds besides the served model: trained weights, gradients, moments, references."""
    if training.weights == "full":
        # In float32: weights, gradients, two moments and the base's weights; and with autocast a copy in 16 bits.
        return shape.parameters * (5 * 4 + (2 if element == 2 else 0))
    # In float32: weights, gradients, two moments; and, if training continues an adapter, TRL's copy until it is dropped.
    return shape.count_adapter_parameters(training.lora_rank) * 5 * 4


def layer_activation_bytes(shape: ModelShape, training: TrainingConfig, tokens: int, element: int) -> int:
    """Count the bytes that one layer keeps of `tokens` tokens for its backward pass."""
    h, q, k, i = shape.hidden, shape.query_width, shape.key_width, shape.intermediate
    if element == 2:
        token = 16 * h + 12 * q + 14 * k + 10 * i + 20 * training.lora_rank
    else:
        token = 24 * h + 16 * q + 16 * k + 16 * i + 28 * training.lora_rank
    return int(tokens * token * (1.15 if training.weights == "full" else 1.0))


def step_bytes(
    shape: ModelShape, training: TrainingConfig, answers: int, length: int, element: int, checkpointing: bool
) -> int:
    """Count the peak bytes of one forward and backward pass over `answers` answers of `length` tokens."""
    tokens = answers * length
    layer = layer_activation_bytes(shape, training, tokens, element)
    kept = layer + shape.layers * tokens * 3 * element * shape.hidden // 2 if checkpointing else layer * shape.layers
    head = 2 * min(TILE, min(tokens, 4096) * min(shape.vocabulary, 32768)) * element + tokens * shape.hidden * 8
    return int(ALLOCATOR_FACTOR * (kept + head + answers * length * length * element))


def evaluation_bytes(shape: ModelShape, length: int, context: int, element: int) -> int:
    """Count the peak bytes of an evaluation: logits of a policy and its base, answers sampled at once, or a probe."""
    logits = 2 * EVALUATION_TOKENS * shape.vocabulary * element + 3 * 4 * length * shape.vocabulary
    sampled = (
        LEAST_PARALLEL_ANSWERS * context * token_cache_bytes(shape, element)
        + 3 * 4 * LEAST_PARALLEL_ANSWERS * shape.vocabulary
    )
    in_float32 = weights_bytes(shape, max(4 - element, 0))  # the probe's reference, computed in float32
    return int(ALLOCATOR_FACTOR * max(logits, sampled, in_float32))


def training_bytes(shape: ModelShape, policy: PolicyConfig, training: TrainingConfig, fit: BatchFit, element: int) -> int:
    """Count the peak bytes of one training run."""
    context = policy.context_tokens + policy.max_tokens
    step = step_bytes(
        shape, training, _count_sequences(training, fit.answers), training.max_length, element, fit.gradient_checkpointing
    )
    moment = max(step, evaluation_bytes(shape, training.max_length, context, element))
    return CUDA_CONTEXT_BYTES + weights_bytes(shape, element) + training_state_bytes(shape, training, element) + moment


def token_cache_bytes(shape: ModelShape, element: int) -> int:
    """Count the bytes that vLLM caches for one token: a key and a value in each layer."""
    return 2 * shape.layers * shape.key_width * element


def count_parallel_answers(shape: ModelShape, tokens: int, free: int, element: int) -> int:
    """Count the answers, of `tokens` tokens with their prompts, to sample at once in `free` bytes.

    At least LEAST_PARALLEL_ANSWERS, which the plan has room for, and at most eight times as many.
    """
    each = tokens * token_cache_bytes(shape, element) + 3 * 4 * shape.vocabulary
    return max(LEAST_PARALLEL_ANSWERS, min(8 * LEAST_PARALLEL_ANSWERS, int(free / ALLOCATOR_FACTOR) // each))


def serving_bytes(shape: ModelShape, policy: PolicyConfig, serving: ServingConfig, total: int, element: int) -> int:
    """Count the bytes that vLLM needs at least on a card of `total` bytes: weights, adapters, a few answers, activations."""
    context = policy.context_tokens + policy.max_tokens
    adapters = serving.max_loras * shape.count_adapter_parameters(serving.max_lora_rank) * element
    tokens, answers = (8192, 1024) if total >= LARGE_CARD else (2048, 256)
    computing = tokens * (4 * shape.hidden + 2 * shape.query_width + 3 * shape.intermediate) * element
    sampling = 3 * 4 * answers * shape.vocabulary
    cache = CONCURRENT * context * token_cache_bytes(shape, element)
    return (
        CUDA_CONTEXT_BYTES
        + weights_bytes(shape, element)
        + adapters
        + cache
        + int(ALLOCATOR_FACTOR * max(computing, sampling))
    )


def fit_batch(
    shape: ModelShape, training: TrainingConfig, batch: int, length: int, room: int, element: int
) -> BatchFit | None:
    """Choose how to read a batch in `room` bytes: whole, or with gradient checkpointing, or in parts. None if nothing fits.

    For KTO a part has at least four answers.
    """
    least = min(batch, LEAST_FOR_KTO if training.objective == "kto" else 1)
    for times, checkpointing in [(1, False), *((times, True) for times in range(1, batch + 1))]:
        answers = -(-batch // times)
        if answers < least:
            break
        if answers * times - batch > max(1, batch // 10):  # the parts together would be a larger batch
            continue
        need = step_bytes(shape, training, _count_sequences(training, answers), length, element, checkpointing)
        if need <= room:
            return BatchFit(answers, times, checkpointing, need)
    return None


def plan_memory(shape: ModelShape, config: Config, card: Card, element: int = 2) -> MemoryPlan:
    """Share a card between vLLM and one training run. Raises ConfigError if they do not fit."""
    policy, serving, training = config.policy, config.serving, config.training
    least = serving_bytes(shape, policy, serving, card.total, element)
    usable = card.total - SPARE_BYTES - CUDA_GRAPH_BYTES
    if least > usable:
        raise ConfigError(
            f"policy.model '{policy.model}' needs at least {_format_gib(least)} to be served, and the GPU has "
            f"{_format_gib(card.total)}; use a smaller model, or lower policy.context_tokens or serving.max_loras"
        )
    share = serving.memory_share
    if share and share * card.total < least:
        raise ConfigError(
            f"config key serving.memory_share has value {share:g}, {_format_gib(share * card.total)} of this GPU, and "
            f"'{policy.model}' needs at least {_format_gib(least)}; raise it to {_round_up(least / card.total):g}"
        )
    if not config.learning.enabled:
        share = share or LARGEST_SHARE
        return _check_free(card, MemoryPlan(share, None, f"{_describe_card(card, share)}; nothing is trained"))
    taken = SLEEPING_BYTES if serving.sleep_while_training else share * card.total if share else least
    context = policy.context_tokens + policy.max_tokens
    held = CUDA_CONTEXT_BYTES + weights_bytes(shape, element) + training_state_bytes(shape, training, element)
    measuring = evaluation_bytes(shape, training.max_length, context, element)
    fit = None
    # If a run fits in half of the card, vLLM gets the other half: memory that it does not need to compute caches answers.
    for room in (int(min(usable / 2, usable - taken) - held), int(usable - taken - held)):
        if fit is None and measuring <= room:
            fit = fit_batch(shape, training, training.batch_size, training.max_length, room, element)
    if fit is None:
        smallest = BatchFit(min(training.batch_size, LEAST_FOR_KTO), 1, True)
        need = training_bytes(shape, policy, training, smallest, element)
        other = "serving.memory_share" if share else "policy.context_tokens"
        ways = f"lower {'' if measuring > room else 'training.max_length or '}{other}, set learning.enabled = false"
        if not serving.sleep_while_training:
            ways += ", or serving.sleep_while_training = true"
        raise ConfigError(
            f"'{policy.model}' and one training run do not fit on this GPU together: vLLM takes "
            f"{_format_gib(taken)}, a run needs {_format_gib(need)}, the GPU has {_format_gib(card.total)}; {ways}"
        )
    run = held + max(fit.peak_bytes, measuring)
    if not share:
        free = usable if serving.sleep_while_training else usable - run
        share = int(100 * min(LARGEST_SHARE, free / card.total)) / 100
        share = max(share, _round_up(least / card.total))
    line = f"{_describe_card(card, share)}, a training run {_format_gib(run)}: {describe_fit(fit)}"
    if serving.sleep_while_training:
        line += "; vLLM sleeps meanwhile"
    return _check_free(card, MemoryPlan(share, fit, line))


def describe_fit(fit: BatchFit) -> str:
    """Describe how a step reads its batch."""
    parts = f"{count_noun(fit.answers, 'answer')} at once" + (
        f", {fit.accumulation_steps} times a step" if fit.accumulation_steps > 1 else ""
    )
    return f"{parts}, {'with' if fit.gradient_checkpointing else 'without'} gradient checkpointing"


def _check_free(card: Card, plan: MemoryPlan) -> MemoryPlan:
    """Raise ConfigError if other programs fill the card. vLLM would fail too, but a minute later and less clearly."""
    wanted = plan.share * card.total
    if card.free < wanted:
        raise ConfigError(
            f"the GPU has {_format_gib(card.free)} of {_format_gib(card.total)} free, vLLM would take {_format_gib(wanted)} "
            f"(serving.memory_share {plan.share:g}); end other programs that use it (see nvidia-smi), or lower that share"
        )
    return plan


def _count_sequences(training: TrainingConfig, answers: int) -> int:
    """Count the sequences of `answers` answers: two each if the objective trains on pairs."""
    return answers * (2 if training.objective in ("dpo", "mixed") else 1)


def _describe_card(card: Card, share: float) -> str:
    taken = _format_gib(share * card.total)
    return f"GPU memory {_format_gib(card.total)}: vLLM takes {taken} (serving.memory_share {share:g})"


def _round_up(share: float) -> float:
    return -int(-100 * share // 1) / 100


def _format_gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
