"""Purpose: what a base model is prepared for. It decides what is checked and which defaults apply."""

from enum import StrEnum


class Purpose(StrEnum):
    """What a command does with a model."""

    SERVE = "serve"  # vLLM answers with it, and runs beside the chat train it
    TRAIN = "train"  # a run trains it, and no server of ours is needed
    REPLAY = "replay"  # as TRAIN, on recorded conversations
    SIMULATE = "simulate"  # as SERVE, but nobody needs the versions: runs may be short
    READ = "read"  # its tokenizer or weights are used, and nothing is sampled or trained as [policy] and [training] say

    @property
    def is_served(self) -> bool:
        """Whether vLLM answers with the model."""
        return self in (Purpose.SERVE, Purpose.SIMULATE)
