"""What all rows of a batch begin with is read once, and nothing else changes."""

import pytest
import torch
import transformers

from learning.judging.evaluation import batched_logprobs, generate_greedily, pad_batch
from learning.models import prefix
from learning.models.prefix import LEAST, count_common_tokens, share_prefixes

TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
BEGINNING = [*range(5, 5 + 2 * LEAST)]
ROWS = [
    ([*BEGINNING, *range(40 + asked, 40 + 2 * asked)], [*range(60, 60 + said)])
    for asked, said in ((3, 9), (7, 2), (5, 5), (1, 4))
]


def model_of(family: str, **changes):
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**TINY | changes))
    return made.float().eval()


def read(model) -> list[int]:
    """How many tokens each pass of a model reads from now on."""
    found: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, output: found.append(given[0].numel()))
    return found


def gradient(model, mask: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    inputs = pad_batch(ROWS, model.device)
    logits = model(**inputs, use_cache=False).logits
    (logits.float().log_softmax(-1)[..., 7] * mask).sum().backward()
    return torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None])


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "Phi3", "Olmo2"])
def test_log_probabilities_and_gradients_are_the_same_and_fewer_tokens_are_read(family):
    model = model_of(family, **({"sliding_window": None} if family in ("Mistral", "Phi3") else {}))
    mask = pad_batch(ROWS, model.device)["attention_mask"]
    plain, slopes = torch.cat(batched_logprobs(model, ROWS)), gradient(model, mask)
    share_prefixes(model)
    passes = read(model)
    assert torch.allclose(torch.cat(batched_logprobs(model, ROWS)), plain, atol=1e-5)
    longest = max(len(prompt) + len(said) for prompt, said in ROWS)
    assert sum(passes) == len(BEGINNING) + len(ROWS) * (longest - len(BEGINNING))
    assert torch.allclose(gradient(model, mask), slopes, atol=1e-4)
    assert not torch.allclose(gradient(model, mask.roll(1, 1)), slopes, atol=1e-2), "the control"


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "Phi3", "Olmo2"])
def test_answers_are_the_same_and_the_prefix_is_read_once(family, tokenizer, monkeypatch):
    model = model_of(family, **({"sliding_window": None} if family in ("Mistral", "Phi3") else {}))
    prompts = [prompt for prompt, _ in ROWS]
    passes = read(model)
    found = generate_greedily(model, tokenizer, prompts, 6)
    assert passes[0] == len(BEGINNING)
    assert passes[1] == len(ROWS) * max(len(prompt) - len(BEGINNING) for prompt in prompts)
    monkeypatch.setattr(prefix, "LEAST", 1000)  # the control
    passes.clear()
    assert generate_greedily(model, tokenizer, prompts, 6) == found
    assert passes[0] == len(ROWS) * max(map(len, prompts))
    alone = [generate_greedily(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert alone == found, "nor does padding change an answer"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Gemma2", {}),
        ("Mistral", {"sliding_window": 8}),
        ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_where_layers_do_not_see_all_nothing_changes(family, changes):
    model = model_of(family, **changes | ({"sliding_window": 8, "use_sliding_window": True} if family == "Qwen3" else {}))
    share_prefixes(model)
    passes = read(model)
    batched_logprobs(model, ROWS)
    assert len(passes) == 1


def test_generating_and_single_rows_are_left_alone():
    model = model_of("Llama")
    share_prefixes(model)
    passes = read(model)
    batched_logprobs(model, ROWS[:1])
    assert len(passes) == 1
    ids = torch.tensor([BEGINNING, BEGINNING])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert passes[1] == ids.numel()


def test_a_common_beginning_ends_before_padding_and_before_the_last_token():
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
    assert count_common_tokens(ids, None) == 3
    assert count_common_tokens(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])) == 2
    assert count_common_tokens(ids[[0, 0]], None) == 3
    assert count_common_tokens(ids[:1], None) == 0
    assert count_common_tokens(torch.tensor([[1, 2], [2, 2]]), None) == 0
