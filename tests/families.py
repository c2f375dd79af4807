"""Chat templates in the manner of well-known families of models: their markers and their rules, in our own words.

Each is put on a copy of the demo policy's tokenizer, with the family's special tokens.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer

CHATML_OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML_TURN = "<|im_start|>{{ said.role }}\n{{ said.content }}<|im_end|>\n"

TURNS = (
    "{% if (said.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns, and the user begins') }}{% endif %}"
)

LLAMA_3 = (
    "{{ bos_token }}{% for said in messages %}<|start_header_id|>{{ said.role }}<|end_header_id|>\n\n"
    "{{ said.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# The system text goes into the user's message if that is the last one of all, and is lost otherwise.
MISTRAL = (
    "{% set ns = namespace(rules='', chat=messages) %}"
    "{% if messages[0].role == 'system' %}{% set ns.rules = messages[0].content %}{% set ns.chat = messages[1:] %}"
    "{% endif %}{{ bos_token }}{% for said in ns.chat %}"
    + TURNS
    + "{% if said.role == 'user' %}[INST] {% if loop.last and ns.rules %}{{ ns.rules }}\n\n{% endif %}"
    "{{ said.content }}[/INST]{% else %} {{ said.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_OLD = (
    "{{ bos_token }}{% for said in messages %}"
    + TURNS
    + "{% if said.role == 'user' %}[INST] {{ said.content }} [/INST]{% else %}{{ said.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
    "{% for said in messages %}"
    + TURNS
    + "<start_of_turn>{{ 'model' if said.role == 'assistant' else said.role }}\n{{ said.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_3 = (
    "{{ bos_token }}{% set ns = namespace(before='', chat=messages) %}{% if messages[0].role == 'system' %}"
    "{% set ns.before = messages[0].content ~ '\n\n' %}{% set ns.chat = messages[1:] %}{% endif %}"
    "{% for said in ns.chat %}"
    + TURNS
    + "<start_of_turn>{{ 'model' if said.role == 'assistant' else said.role }}\n{{ ns.before if loop.first }}"
    "{{ said.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN_2_5 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a model named Qwen.<|im_end|>\n{% endif %}"
    "{% for said in messages %}" + CHATML_TURN + "{% endfor %}" + CHATML_OPEN
)
# Thoughts stay in what is said after the last question only; the last answer has a thought, an empty one if need be.
QWEN_3 = (
    "{% set ns = namespace(last=-1) %}{% for said in messages %}{% if said.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for said in messages %}<|im_start|>{{ said.role }}\n"
    "{% if said.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ said.content.split('</think>')[-1].lstrip('\n') if said.role == 'assistant' else said.content }}<|im_end|>\n"
    "{% endfor %}" + CHATML_OPEN + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
QWEN_3_5 = (
    "{% set ns = namespace(last=-1) %}{% for said in messages %}{% if said.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{ raise_exception('nobody asks anything') }}{% endif %}{% for said in messages %}"
    "{% if said.role == 'system' and not loop.first %}{{ raise_exception('the system speaks first') }}{% endif %}"
    "<|im_start|>{{ said.role }}\n"
    "{% if said.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ said.content | trim }}<|im_end|>\n{% endfor %}"
    + CHATML_OPEN
    + "{% if add_generation_prompt %}{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)
PHI = (
    "{% for said in messages %}<|{{ said.role }}|>\n{{ said.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
SMOLLM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are SmolLM, a small model.<|im_end|>\n{% endif %}"
    "{% for said in messages %}" + CHATML_TURN + "{% endfor %}" + CHATML_OPEN
)
# It always opens a thought, and writes answers without one.
THINKER = (
    "{{ bos_token }}{% for said in messages %}{% if said.role == 'assistant' %}<|bot|>{{ said.content }}{{ eos_token }}"
    "{% elif said.role == 'user' %}<|person|>{{ said.content }}{% else %}{{ said.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|><think>\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template, its tokens, and a chat (roles, in short) that it refuses as it is."""

    template: str
    ends_with: str  # the token that ends an answer
    eos: str
    bos: str | None = None
    special: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)  # added tokens that are no special ones
    refuses: str = ""  # s, u and a for system, user and assistant
    drops_system_of: str = ""


THINK = ["<think>", "</think>"]
FAMILIES = {
    "Llama 3": Family(
        LLAMA_3, "<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>"]
    ),
    "Mistral": Family(MISTRAL, "</s>", "</s>", "<s>", ["[INST]", "[/INST]"], refuses="uu", drops_system_of="sua"),
    "Mistral without system": Family(MISTRAL_OLD, "</s>", "</s>", "<s>", ["[INST]", "[/INST]"], refuses="su"),
    "Gemma 2": Family(GEMMA_2, "<end_of_turn>", "<eos>", "<bos>", ["<start_of_turn>"], refuses="su"),
    "Gemma 3": Family(GEMMA_3, "<end_of_turn>", "<eos>", "<bos>", ["<start_of_turn>"], refuses="uu"),
    "Qwen 2.5": Family(QWEN_2_5, "<|im_end|>", "<|im_end|>", None, ["<|endoftext|>"]),
    "Qwen 3": Family(QWEN_3, "<|im_end|>", "<|im_end|>", None, ["<|endoftext|>"], THINK),
    "Qwen 3.5": Family(QWEN_3_5, "<|im_end|>", "<|im_end|>", None, ["<|endoftext|>"], THINK, refuses="us"),
    "Phi": Family(PHI, "<|end|>", "<|endoftext|>", None, ["<|system|>", "<|user|>", "<|assistant|>"]),
    "SmolLM": Family(SMOLLM, "<|im_end|>", "<|im_end|>", "<|im_start|>"),
    "a thinker": Family(THINKER, "<｜end｜>", "<｜end｜>", "<｜begin｜>", ["<|bot|>", "<|person|>", *THINK]),
}


def make_tokenizer(demo_model: str, family: Family, directory: Path) -> str:
    """Write a tokenizer of the family to `directory` and return it."""
    shutil.rmtree(directory, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    special = [*family.special, family.ends_with, family.eos, *([family.bos] if family.bos else [])]
    tokenizer.add_tokens(list(dict.fromkeys(special)), special_tokens=True)
    tokenizer.add_tokens(family.plain)
    tokenizer.eos_token, tokenizer.bos_token = family.eos, family.bos
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(directory)
    return str(directory)
