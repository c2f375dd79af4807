"""Policy: the async client of vLLM's OpenAI API. It asks for a version by name and returns a Reply with all that made it.

Prompts are token ids, made with the chat template by `bot.models.tokenizer`: what the policy saw is then known exactly, the
budget is exact, and vLLM answers sooner than through its chat endpoint (docs/experiments.md).

`version` is the one pointer that a swap flips; requests in flight are counted for each version, so that a swap can wait
for the last of them. `weights` is the version whose whole weights the server holds, which is the base model unless a version
with weights of its own took their place. It knows no conversation, no database and no registry.
"""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import aiohttp

from bot.config import PolicyConfig
from bot.errors import Asleep, ReplyInterrupted, ServingError, Unavailable
from bot.models.stops import StopFilter
from bot.models.thoughts import ThoughtFilter, Thoughts
from bot.store.registry import BASE
from bot.types import Reply

STOPPED = "stopped"  # a finish reason of ours: somebody asked for the end
FRESH = "default"  # what vLLM calls the weights that it was started with
LONGEST_EVENT = 2**23  # bytes: the first one repeats the prompt's token ids
TOP_LOGPROBS = 20  # as many as vLLM gives unless it is told otherwise
RESETS = 50  # of the prefix cache that are tried, a tenth of a second apart
LULL_SECONDS = 5.0  # how long a moment without requests is waited for, before requests are made to wait
IDLE_SECONDS = 2.0  # after which a connection is closed: vLLM closes its own after 5, and a request may meet that moment
MISSHAPEN = (ValueError, LookupError, TypeError, AttributeError)  # of JSON that is not what was expected

T = TypeVar("T")
OnText = Callable[[str], Awaitable[None] | None]


class Policy:
    """One vLLM server, seen as something that answers chat messages."""

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
        """`end_ids` end an answer beside what the server knows; `thoughts` says what of an answer is not for people; `base`
        is the version that is the server's own model.
        """
        self.url = url.rstrip("/")
        self.log = ""  # where a server that we started writes its log
        self.config = config
        self.end_ids = sorted(end_ids)
        self.thoughts = thoughts
        self.name_base(base)
        self.takes_weights = False
        self.is_asleep = False
        self.exact_tokens: int | None = None  # see `exactly`
        self.base_name = BASE  # as the server calls it
        # A reply that fails is tried again here, before its first token only; never behind our back.
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=reply_seconds, sock_read=reply_seconds),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
            read_bufsize=LONGEST_EVENT // 2,
        )
        self._in_flight: Counter[str] = Counter()
        self._is_held = False
        self._changed = asyncio.Condition()  # of the two above

    def name_base(self, base: str) -> None:
        """Say which version the server's own model is. Only before anybody is answered."""
        self.base = base
        self.version = base
        self.weights: str | None = base  # None: not known

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
        """Stream one answer to the prompt, handing each piece of text to `on_text`, until it ends or `stop` is set.

        `max_tokens` may make it shorter than `policy.max_tokens`, and it ends before the first of `stops`; both are in the
        reply's `sampling`. They change when sampling ends and not what is sampled: ids and log-probabilities are of all
        tokens until then. Thoughts are neither handed over nor in the reply's text; its ids and log-probabilities hold them.

        Raises Asleep while vLLM sleeps, ServingError before the first token (after one more try), ReplyInterrupted after it.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self.is_asleep or not self._is_held)
            if self.is_asleep:
                raise Asleep
            version = version or self.version
            self._in_flight[version] += 1
        try:
            try:
                return await self._stream(
                    prompt_ids, version, seed, temperature, cache_salt, on_text, stop, max_tokens, stops
                )
            except ReplyInterrupted:
                raise
            except ServingError:
                return await self._stream(
                    prompt_ids, version, seed, temperature, cache_salt, on_text, stop, max_tokens, stops
                )
        finally:
            self._in_flight[version] -= 1
            async with self._changed:
                self._changed.notify_all()

    async def _stream(
        self,
        prompt_ids: Sequence[int],
        version: str,
        seed: int | None,
        temperature: float | None,
        cache_salt: str | None,
        on_text: OnText | None,
        stop: asyncio.Event | None,
        max_tokens: int | None,
        stops: Sequence[str],
    ) -> Reply:
        most = min(max_tokens or self.config.max_tokens, self.config.max_tokens)
        sampling: dict[str, Any] = {
            **self.config.sampling,
            **({} if temperature is None else {"temperature": temperature}),
            "max_tokens": self.exact_tokens or most,
        }
        if seed is not None:
            sampling["seed"] = seed
        body = {"model": self.served_name(version), "prompt": list(prompt_ids), "return_token_ids": True, **sampling}
        body["logprobs"] = 0  # of the sampled token alone
        if self.exact_tokens:
            body["ignore_eos"] = True
        elif self.end_ids:
            body["stop_token_ids"] = self.end_ids
        if self.thoughts is not None and self.thoughts.is_special:
            body["skip_special_tokens"] = False  # else nobody could tell thoughts from the answer
        if cache_salt:
            body["cache_salt"] = cache_salt
        said, wanted, text, finish_reason = ThoughtFilter(self.thoughts), StopFilter(stops), "", ""
        completion_ids: list[int] = []
        logprobs: list[float] = []
        started = time.monotonic()
        try:
            async with contextlib.aclosing(self.stream("/v1/completions", body)) as events:
                async for event in events:
                    if stop is not None and stop.is_set():
                        finish_reason = STOPPED
                        break  # vLLM ends the request when nobody listens
                    for choice in event["choices"]:
                        completion_ids += choice.get("token_ids") or []
                        logprobs += (choice["logprobs"] or {}).get("token_logprobs") or []
                        finish_reason = choice["finish_reason"] or finish_reason
                        piece = wanted.add(said.add(choice["text"]) + (said.end() if choice["finish_reason"] else ""))
                        piece += wanted.end() if choice["finish_reason"] else ""
                        if piece:
                            text += piece
                            if on_text is not None:
                                pending = on_text(piece)
                                if pending is not None:
                                    await pending
                    if wanted.is_hit:
                        finish_reason = "stop"
                        break
        except ServingError as error:
            raise _translated(str(error), text, version) from error
        except (aiohttp.ClientError, TimeoutError, *MISSHAPEN) as error:
            raise _translated(str(error) or type(error).__name__, text, version) from error
        if not finish_reason:
            raise _translated("the stream ended early", text, version)
        return Reply(
            text=text,
            policy_version=version,
            prompt_ids=tuple(prompt_ids),
            completion_ids=tuple(completion_ids),
            logprobs=tuple(logprobs),
            finish_reason=finish_reason,
            sampling={**sampling, "stop": list(stops)} if stops else sampling,
            latency_ms=1000 * (time.monotonic() - started),
        )

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The server-sent events of one streamed request. Raises ServingError where the server refuses or fails."""
        async with self._http.post(f"{self.url}{path}", json={**body, "stream": True}) as response:
            if response.status != 200:
                raise ServingError(f"vLLM refused {path} ({response.status}): {(await response.text())[:300]}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise ServingError(f"vLLM failed: {event['error']}")
                    yield event

    @contextlib.contextmanager
    def exactly(self, tokens: int) -> Iterator[None]:
        """Inside, all answers have so many tokens, whatever was sampled: benchmarks compare the same work."""
        self.exact_tokens = tokens
        try:
            yield
        finally:
            self.exact_tokens = None

    async def drain(self, version: str, seconds: float = 60) -> bool:
        """Wait until no request for `version` is in flight; False if some still are after `seconds`."""
        async with self._changed:
            return await self._until(lambda: self._in_flight[version] <= 0, seconds)

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for a change of what is in flight after which `condition` holds; whether it came in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait_for(condition)
        return condition()

    @contextlib.asynccontextmanager
    async def held(self, seconds: float) -> AsyncIterator[None]:
        """Inside, no reply is in flight: those that come wait. Raises ServingError where one takes more than `seconds`.

        A moment at which nothing is in flight anyway is waited for first: then nobody notices.
        """
        async with self._changed:
            await self._until(lambda: not self._in_flight.total(), LULL_SECONDS)
            self._is_held = True
        try:
            async with self._changed:
                if not await self._until(lambda: not self._in_flight.total(), seconds):
                    raise Unavailable(f"answers were still being given after {seconds:g} s (serving.reply_seconds)")
            yield
        finally:
            async with self._changed:
                self._is_held = False
                self._changed.notify_all()

    async def connect(self) -> None:
        """Learn the name under which the server knows the base model, and whose weights it holds."""
        bases = [name for name, parent in (await self._models()).items() if not parent]
        if not bases:
            raise ServingError(f"the server at {self.url} lists no base model; check serving.url")
        self.base_name = bases[0]
        try:
            self.weights = await self._weights()
            self.takes_weights = True
        except ServingError:  # a server that does not let its weights be changed
            self.weights, self.takes_weights = self.base, False

    def lost(self) -> None:
        """Forget whose weights the server holds: it is gone."""
        self.weights = None

    async def holds(self, version: str) -> bool:
        """Whether the server can answer as `version` does."""
        if version == self.weights:
            return not self.takes_weights or await self._weights() == version
        return version in await self.loaded()

    async def _weights(self) -> str:
        version = await self._ask("GET", "/weight_info", None, lambda told: str(told["weight_version"]))
        return self.base if version == FRESH else version

    async def replace(self, version: str, path: str) -> None:
        """Put the weights of a whole model in the place of the server's. Nobody may be answered: see `held`."""
        self.weights = None
        body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        await self._admin("POST", "/collective_rpc", body)
        for _ in range(RESETS):  # it is refused while any request runs, such as one that asks whether the server is well
            if await self._ask("POST", "/reset_prefix_cache", None, lambda told: bool(told["success"])):
                break
            await asyncio.sleep(0.1)
        else:
            raise Unavailable("vLLM keeps its cache of the weights before: somebody else is using it; let kibitz be alone")
        await self._admin("POST", "/update_weight_version", {"new_version": version})
        self.weights = version

    async def ready(self, seconds: float = 10) -> bool:
        """Tell whether the server generates one token within `seconds`: /health may say 200 while the engine is dead.

        It asks for what an answer asks for, so that no kernel is compiled while somebody waits.
        """
        body = {"model": self.base_name, "prompt": [1], "max_tokens": 1, "logprobs": 0, "return_token_ids": True}
        try:
            async with asyncio.timeout(seconds):
                await self._ask("POST", "/v1/completions", body, lambda told: told["choices"][0])
        except (ServingError, TimeoutError):
            return False
        return True

    async def sleep(self) -> None:
        """Have vLLM give its GPU memory away: its weights wait in main memory. Nobody may be answered: see `held`."""
        await self._admin("POST", "/sleep?level=1")

    async def wake(self) -> None:
        """Have vLLM take its memory back and answer again."""
        await self._admin("POST", "/wake_up")

    async def load(self, name: str, path: str) -> None:
        """Load an adapter under its own name."""
        await self._admin("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    async def unload(self, name: str) -> None:
        """Forget an adapter."""
        await self._admin("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def loaded(self) -> set[str]:
        """The names of the adapters that the server holds."""
        return {name for name, parent in (await self._models()).items() if parent}

    async def _models(self) -> dict[str, str | None]:
        """What the server lists: base models with None, adapters with what they adapt."""
        return await self._ask(
            "GET", "/v1/models", None, lambda told: {model["id"]: model.get("parent") for model in told["data"]}
        )

    async def next_logprobs(self, version: str, prompt_ids: Sequence[int], temperature: float) -> dict[int, float]:
        """The server's log-probabilities (nats) of the likeliest tokens to follow `prompt_ids`, at a temperature.

        Nothing is cut away, as in the trainer. Asked by generating one token, as every answer is: `prompt_logprobs` beside
        other requests that use an adapter ends vLLM's CPU engine (0.32), and would pass by the prefix cache.
        """
        body = {
            "model": self.served_name(version),
            "prompt": list(prompt_ids),
            "max_tokens": 1,
            "logprobs": TOP_LOGPROBS,
            "temperature": temperature,
            "return_tokens_as_token_ids": True,
        }

        def read(told: Any) -> dict[int, float]:
            listed = told["choices"][0]["logprobs"]["top_logprobs"][0]
            return {int(token.removeprefix("token_id:")): float(logprob) for token, logprob in listed.items()}

        return await self._ask("POST", "/v1/completions", body, read)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        """Return what `read` finds in the server's answer. Raises ServingError where it is not there: that is no vLLM."""
        told = await self._admin(method, path, body)
        try:
            return read(told)
        except MISSHAPEN as error:
            advice = f"see {self.log}" if self.log else "check serving.url"
            came = " ".join(str(told).split())[:100]
            raise ServingError(f"{self.url}{path} gave '{came}', which is no answer of vLLM's; {advice}") from error

    async def _admin(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers: JSON, or its text where it is not."""
        try:
            async with self._http.request(method, f"{self.url}{path}", json=body) as response:
                said = await response.text()
                if response.status >= 500:
                    raise Unavailable(f"vLLM failed at {path} ({response.status}): {said[:300]}")
                if response.status != 200:
                    raise ServingError(f"vLLM refused {path} ({response.status}): {said[:300]}")
                return json.loads(said) if response.content_type == "application/json" else said
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            advice = f"see {self.log}" if self.log else "check that it runs, and serving.url"
            raise Unavailable(f"vLLM at {self.url} does not answer ({type(error).__name__}); {advice}") from error

    def served_name(self, version: str) -> str:
        """The name under which the server knows a version. Raises ServingError where it has other weights in their place."""
        if version == self.weights:
            return self.base_name
        if version == self.base:
            holder = self.weights or "nobody knows which version"
            raise ServingError(f"{self.base} is not served: the weights of {holder} are")
        return version


def _translated(cause: str, text: str, version: str) -> ServingError:
    cause = cause.splitlines()[0][:300]
    return ReplyInterrupted(text, version, cause) if text else ServingError(f"{version} did not answer: {cause}")
