"""Policy: asks vLLM for one or several answers by one version, and returns Replies that record how they were made.

Prompts are token ids, which `bot.models.tokenizer` makes with the chat template. So the prompt and the budget are exact, and
vLLM answers sooner than through its chat endpoint (docs/experiments.md).

A swap changes `version`, the default of new requests. Requests in flight are counted for each version, so that a swap can
wait for the last of them.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from bot.config import PolicyConfig
from bot.errors import ReplyInterrupted, RequestRefused, ServerAsleep, ServerUnavailable, ServingError
from bot.models.stops import StopFilter
from bot.models.thoughts import ThoughtFilter, Thoughts
from bot.serving.admin import MALFORMED_ERRORS, ServerAdmin
from bot.store.registry import BASE
from bot.types import Reply, SamplingParams

STOPPED = "stopped"  # our own finish reason: somebody stopped the answer
LULL_SECONDS = 5.0  # the longest wait for a moment without requests, before new requests have to wait

OnText = Callable[[str], Awaitable[None] | None]


@dataclass(frozen=True)
class _Request:
    """A request for `count` answers by one version."""

    version: str
    prompt_ids: tuple[int, ...]
    body: dict[str, Any]
    sampling: SamplingParams
    count: int

    def find_sampling(self, index: int) -> SamplingParams:
        """Return the sampling parameters of one of the answers: vLLM adds its index to the seed."""
        seed = self.sampling.seed
        return self.sampling if seed is None or not index else self.sampling | SamplingParams(seed=seed + index)


class _GrowingReply:
    """An answer while it is streamed: its tokens so far, and the text for people."""

    def __init__(self, thoughts: Thoughts | None, stops: Sequence[str]):
        self.text = self.finish_reason = ""
        self.completion_ids: list[int] = []
        self.logprobs: list[float] = []
        self.is_cut = False  # it ends before one of the `stops`
        self._thoughts, self._stops = ThoughtFilter(thoughts), StopFilter(stops)

    def add(self, choice: dict[str, Any]) -> str:
        """Add a piece of the stream, and return the text to show now. After the end of the answer nothing is added."""
        if self.finish_reason:
            return ""
        self.completion_ids += choice.get("token_ids") or []
        self.logprobs += (choice["logprobs"] or {}).get("token_logprobs") or []
        piece = self._thoughts.add(choice["text"])
        if choice["finish_reason"]:
            self.finish_reason = choice["finish_reason"]
            piece = self._stops.add(piece + self._thoughts.flush()) + self._stops.flush()
        else:
            piece = self._stops.add(piece)
        if self._stops.is_hit:
            self.is_cut, self.finish_reason = True, "stop"
        self.text += piece
        return piece


async def hand_over(piece: str, on_text: OnText | None) -> None:
    """Pass a piece of text to `on_text`, if there is one, unless the piece is empty."""
    if piece and on_text is not None:
        pending = on_text(piece)
        if pending is not None:
            await pending


class Policy:
    """One vLLM server as a source of answers."""

    def __init__(
        self,
        url: str,
        config: PolicyConfig,
        reply_seconds: float = 120,
        api_key: str = "none",
        end_ids: Iterable[int] = (),
        thoughts: Thoughts | None = None,
        base: str = BASE,
    ):
        """`end_ids` end an answer, in addition to those that the server knows; `thoughts` are the marks of text that is not
        shown; `base` is the version that is the server's own model.
        """
        self.admin = ServerAdmin(url, reply_seconds, api_key, base)
        self.version = base
        self.config = config
        self.end_ids = sorted(end_ids)
        self.thoughts = thoughts
        self.is_asleep = False
        self.fixed_tokens: int | None = None  # see `fixed_length`
        self._in_flight: Counter[str] = Counter()
        self._is_paused = False
        self._changed = asyncio.Condition()  # protects the two above

    def set_base(self, base: str) -> None:
        """Set the version that is the server's own model. Call it before the first reply."""
        self.admin.set_base(base)
        self.version = base

    async def reply(
        self,
        prompt_ids: Sequence[int],
        *,
        version: str | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        cache_salt: str | None = None,
        on_text: OnText | None = None,
        stop: asyncio.Event | None = None,
        max_tokens: int | None = None,
        stops: Sequence[str] = (),
    ) -> Reply:
        """Stream one answer to the prompt, and pass each piece of text to `on_text`, until it ends or `stop` is set.

        The answer has at most `max_tokens`, if that is less than `policy.max_tokens`, and ends before the first of `stops`.
        The reply's `sampling` records both; its ids and log-probabilities are those of all sampled tokens. Thoughts are in
        these, but neither in the reply's text nor passed to `on_text`.

        Raises ServerAsleep while vLLM sleeps, ServingError if it fails twice before the first text (RequestRefused at once
        if it does not accept the request), and ReplyInterrupted if it fails later.
        """
        limits = seed, temperature, cache_salt, max_tokens, stops
        [reply] = await self._ask(version, lambda name: self._make_request(prompt_ids, name, 1, *limits), on_text, stop)
        return reply

    async def sample_replies(
        self,
        prompt_ids: Sequence[int],
        count: int,
        *,
        version: str | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        cache_salt: str | None = None,
        stop: asyncio.Event | None = None,
        max_tokens: int | None = None,
        stops: Sequence[str] = (),
    ) -> list[Reply]:
        """Sample `count` answers to the prompt in one request, and return them in vLLM's order once all have ended.

        The limits hold for each answer, and the errors are those of `reply`. If `stop` is set, answers that have not ended
        have the finish reason STOPPED. `latency_ms` is the time until the last answer ended.
        """
        limits = seed, temperature, cache_salt, max_tokens, stops
        return await self._ask(version, lambda name: self._make_request(prompt_ids, name, count, *limits), None, stop)

    async def _ask(
        self,
        version: str | None,
        make_request: Callable[[str], _Request],
        on_text: OnText | None,
        stop: asyncio.Event | None,
    ) -> list[Reply]:
        """Ask `version`, or the current one, when replies are not paused. Try again if nothing was answered yet."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.is_asleep or not self._is_paused)
            if self.is_asleep:
                raise ServerAsleep
            version = version or self.version
            self._in_flight[version] += 1
        try:
            asked = make_request(version)
            try:
                return await self._stream(asked, on_text, stop)
            except (ReplyInterrupted, RequestRefused):
                raise
            except ServingError:
                return await self._stream(asked, on_text, stop)
        finally:
            self._in_flight[version] -= 1
            async with self._changed:
                self._changed.notify_all()

    def _make_request(
        self,
        prompt_ids: Sequence[int],
        version: str,
        count: int,
        seed: int | None,
        temperature: float | None,
        cache_salt: str | None,
        max_tokens: int | None,
        stops: Sequence[str],
    ) -> _Request:
        most = min(max_tokens or self.config.max_tokens, self.config.max_tokens)
        asked: dict[str, Any] = {"max_tokens": self.fixed_tokens or most}
        if temperature is not None:
            asked["temperature"] = temperature
        if seed is not None:
            asked["seed"] = seed
        if stops:
            asked["stop"] = list(stops)
        sampling = self.config.sampling | SamplingParams(**asked)
        body = {
            "model": self.admin.find_served_name(version),
            "prompt": list(prompt_ids),
            "return_token_ids": True,
            **sampling.model_dump(exclude_unset=True, exclude={"stop"}),  # StopFilter cuts the answer
        }
        body["logprobs"] = 0  # only the sampled token's
        if count > 1:
            body["n"] = count
        if self.fixed_tokens:
            body["ignore_eos"] = True
        elif self.end_ids:
            body["stop_token_ids"] = self.end_ids
        if self.thoughts is not None and self.thoughts.is_special:
            body["skip_special_tokens"] = False  # otherwise the marks around thoughts are missing
        if cache_salt:
            body["cache_salt"] = cache_salt
        return _Request(version, tuple(prompt_ids), body, sampling, count)

    async def _stream(self, asked: _Request, on_text: OnText | None, stop: asyncio.Event | None) -> list[Reply]:
        growing = [_GrowingReply(self.thoughts, asked.sampling.stop) for _ in range(asked.count)]
        started = time.monotonic()
        try:
            async with contextlib.aclosing(self.admin.stream("/v1/completions", asked.body)) as events:
                async for event in events:
                    if stop is not None and stop.is_set():
                        for one in growing:
                            one.finish_reason = one.finish_reason or STOPPED
                        break  # vLLM ends a request when its connection closes
                    for choice in event["choices"]:  # of several answers, in any order
                        await hand_over(growing[choice["index"]].add(choice), on_text)
                    # Without a cut vLLM ends the stream itself, and the connection can be used again.
                    if any(one.is_cut for one in growing) and all(one.finish_reason for one in growing):
                        break
        except (ServingError, aiohttp.ClientError, TimeoutError, *MALFORMED_ERRORS) as error:
            raise _make_error(error, growing, asked.version) from error
        if not all(one.finish_reason for one in growing):
            raise _make_error(ServingError("the stream ended early"), growing, asked.version)
        latency_ms = 1000 * (time.monotonic() - started)
        return [
            Reply(
                text=one.text,
                policy_version=asked.version,
                prompt_ids=asked.prompt_ids,
                completion_ids=tuple(one.completion_ids),
                logprobs=tuple(one.logprobs),
                finish_reason=one.finish_reason,
                sampling=asked.find_sampling(index),
                latency_ms=latency_ms,
            )
            for index, one in enumerate(growing)
        ]

    @contextlib.contextmanager
    def fixed_length(self, tokens: int) -> Iterator[None]:
        """Within the context, make all answers exactly `tokens` long, so that benchmarks compare equal work."""
        self.fixed_tokens = tokens
        try:
            yield
        finally:
            self.fixed_tokens = None

    async def drain(self, version: str, seconds: float = 60) -> bool:
        """Wait until no request for `version` is in flight. Return False if some still are after `seconds`."""
        async with self._changed:
            return await self._until(lambda: self._in_flight[version] <= 0, seconds)

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for at most `seconds` until `condition` holds. Return whether it holds. Needs the lock of `_changed`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait_for(condition)
        return condition()

    @contextlib.asynccontextmanager
    async def pause_replies(self, seconds: float) -> AsyncIterator[None]:
        """Within the context, no reply is in flight, and new ones wait.

        It first waits at most LULL_SECONDS for a moment without requests, so that nobody notices the pause. Raises
        ServerUnavailable if a reply takes longer than `seconds`.
        """
        async with self._changed:
            await self._until(lambda: not self._in_flight.total(), LULL_SECONDS)
            self._is_paused = True
        try:
            async with self._changed:
                if not await self._until(lambda: not self._in_flight.total(), seconds):
                    raise ServerUnavailable(f"answers are still in flight after {seconds:g} s (serving.reply_seconds)")
            yield
        finally:
            async with self._changed:
                self._is_paused = False
                self._changed.notify_all()

    async def close(self) -> None:
        """Close the connections."""
        await self.admin.close()


def _make_error(error: Exception, growing: Sequence[_GrowingReply], version: str) -> ServingError:
    """Return the error to raise: an interruption with the first text, if there is some."""
    cause = (str(error) or type(error).__name__).splitlines()[0][:300]
    if text := next((one.text for one in growing if one.text), ""):
        return ReplyInterrupted(text, version, cause)
    kind = RequestRefused if isinstance(error, RequestRefused) else ServingError
    return kind(f"{version} did not answer: {cause}")
