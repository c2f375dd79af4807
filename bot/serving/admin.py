"""ServerAdmin: manages the versions that a vLLM server holds, and reads its log-probabilities.

`weights_version` is the version whose whole weights the server holds: the base model, until a version with weights of its
own replaces it.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, TypeVar

import aiohttp

from bot.errors import RequestRefused, ServerUnavailable, ServingError
from bot.store.registry import BASE

FRESH = "default"  # vLLM's name for the weights that it started with
LONGEST_EVENT = 2**23  # bytes: the first event repeats the prompt's token ids
TOP_LOGPROBS = 20  # vLLM's default limit
RESETS = 50  # attempts to reset the prefix cache, a tenth of a second apart
IDLE_SECONDS = 2.0  # until an idle connection is closed: vLLM closes it after 5 s, and a request may meet that moment
MALFORMED_ERRORS = (ValueError, LookupError, TypeError, AttributeError)  # raised by reading unexpected JSON

T = TypeVar("T")


class ServerAdmin:
    """The administration of one vLLM server: its adapters, weights and memory."""

    def __init__(self, url: str, reply_seconds: float = 120, api_key: str = "none", base: str = BASE):
        """`base` is the version that is the server's own model."""
        self.url = url.rstrip("/")
        self.log_path = ""  # of a server that kibitz started
        self.can_replace_weights = False
        self.base_name = BASE  # the server's name for it
        self.set_base(base)
        # No automatic retries: Policy.reply tries again itself, and only before the first token.
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=reply_seconds, sock_read=reply_seconds),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
            read_bufsize=LONGEST_EVENT // 2,
        )

    def set_base(self, base: str) -> None:
        """Set the version that is the server's own model. Call it before the first reply."""
        self.base = base
        self.weights_version: str | None = base  # None: unknown

    async def connect(self) -> None:
        """Read the server's name for the base model, and the version whose weights it holds.

        Raises ServingError if the server lists no base model.
        """
        bases = [name for name, parent in (await self._list_models()).items() if not parent]
        if not bases:
            raise ServingError(f"the server at {self.url} lists no base model; check serving.url")
        self.base_name = bases[0]
        try:
            self.weights_version = await self._read_weights_version()
            self.can_replace_weights = True
        except ServingError:  # this server does not replace weights
            self.weights_version, self.can_replace_weights = self.base, False

    def mark_lost(self) -> None:
        """Mark the server's weights as unknown, because the server is gone."""
        self.weights_version = None

    async def has_version(self, version: str) -> bool:
        """Tell whether the server can answer with `version`."""
        if version == self.weights_version:
            return not self.can_replace_weights or await self._read_weights_version() == version
        return version in await self.list_adapters()

    async def _read_weights_version(self) -> str:
        version = await self._ask("GET", "/weight_info", None, lambda told: str(told["weight_version"]))
        return self.base if version == FRESH else version

    async def replace_weights(self, version: str, path: str) -> None:
        """Replace the server's weights by those of the model at `path`. Call it within `Policy.pause_replies`."""
        self.weights_version = None
        body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        await self._request("POST", "/collective_rpc", body)
        for _ in range(RESETS):  # vLLM refuses it while any request runs, such as a readiness check
            if await self._ask("POST", "/reset_prefix_cache", None, lambda told: bool(told["success"])):
                break
            await asyncio.sleep(0.1)
        else:
            raise ServerUnavailable(
                "vLLM cannot reset its prefix cache: another client is using the server; let only kibitz use it"
            )
        await self._request("POST", "/update_weight_version", {"new_version": version})
        self.weights_version = version

    async def is_ready(self, seconds: float = 10) -> bool:
        """Tell whether the server generates one token within `seconds`. (/health may return 200 while the engine is dead.)

        The request has the options of an answer, so that no kernel is compiled while somebody waits.
        """
        body = {"model": self.base_name, "prompt": [1], "max_tokens": 1, "logprobs": 0, "return_token_ids": True}
        try:
            async with asyncio.timeout(seconds):
                await self._ask("POST", "/v1/completions", body, lambda told: told["choices"][0])
        except (ServingError, TimeoutError):
            return False
        return True

    async def sleep(self) -> None:
        """Make vLLM free its GPU memory and keep its weights in main memory. Call it within `Policy.pause_replies`."""
        await self._request("POST", "/sleep?level=1")

    async def wake(self) -> None:
        """Make vLLM take its GPU memory back and answer again."""
        await self._request("POST", "/wake_up")

    async def load_adapter(self, name: str, path: str) -> None:
        """Load an adapter under its own name."""
        await self._request("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter."""
        await self._request("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def list_adapters(self) -> set[str]:
        """Return the names of the adapters that the server holds."""
        return {name for name, parent in (await self._list_models()).items() if parent}

    async def _list_models(self) -> dict[str, str | None]:
        """Return the models that the server lists, each with its parent; a base model has None."""
        return await self._ask(
            "GET", "/v1/models", None, lambda told: {model["id"]: model.get("parent") for model in told["data"]}
        )

    async def read_next_logprobs(self, version: str, prompt_ids: Sequence[int], temperature: float) -> dict[int, float]:
        """Return the server's log-probabilities (nats) of the likeliest next tokens after `prompt_ids`, at a temperature.

        There is no truncation, as in the trainer. The request generates one token, because `prompt_logprobs` beside other
        requests that use an adapter ends vLLM's CPU engine (0.32), and bypasses the prefix cache.
        """
        body = {
            "model": self.find_served_name(version),
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

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the server-sent events of one streamed request.

        Raises RequestRefused if the server answers with 400, and ServingError if it fails otherwise.
        """
        async with self._http.post(f"{self.url}{path}", json={**body, "stream": True}) as response:
            if response.status != 200:
                refused = RequestRefused if response.status == 400 else ServingError
                raise refused(f"vLLM refused {path} ({response.status}): {(await response.text())[:300]}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise ServingError(f"vLLM failed: {event['error']}")
                    yield event

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        """Send a request and return `read(answer)`. Raises ServingError if `read` fails: then the server is no vLLM."""
        told = await self._request(method, path, body)
        try:
            return read(told)
        except MALFORMED_ERRORS as error:
            advice = f"see {self.log_path}" if self.log_path else "check serving.url"
            came = " ".join(str(told).split())[:100]
            raise ServingError(f"{self.url}{path} returned '{came}', which is no answer from vLLM; {advice}") from error

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request; return the answer as JSON, or as text if it is not JSON."""
        try:
            async with self._http.request(method, f"{self.url}{path}", json=body) as response:
                said = await response.text()
                if response.status >= 500:
                    raise ServerUnavailable(f"vLLM failed at {path} ({response.status}): {said[:300]}")
                if response.status != 200:
                    raise ServingError(f"vLLM refused {path} ({response.status}): {said[:300]}")
                return json.loads(said) if response.content_type == "application/json" else said
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            advice = f"see {self.log_path}" if self.log_path else "check that it runs, and serving.url"
            raise ServerUnavailable(f"vLLM at {self.url} does not answer ({type(error).__name__}); {advice}") from error

    def find_served_name(self, version: str) -> str:
        """Return the server's name for a version. Raises ServingError if other weights replaced those of the base."""
        if version == self.weights_version:
            return self.base_name
        if version == self.base:
            holder = self.weights_version or "an unknown version"
            raise ServingError(f"{self.base} is not served: the server has the weights of {holder}")
        return version
