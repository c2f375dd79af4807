"""A vLLM on loopback that says what it is told to, as exact token ids, in vLLM's own events. No model, no GPU.

It refuses what vLLM refuses of what kibitz sends: seeds outside 64 bits, no room for a token, a version that is not loaded,
more answers than it allows.
Of an adapter it serves the log-probabilities that the adapter's own probe holds, as a sound server does.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from aiohttp import web

from bot.models.tokenizer import ChatTokenizer
from bot.store.registry import BASE
from learning.judging import probe

FITS = 2**63
Says = str | Callable[[str], str] | list[str]


@dataclass
class FakeVllm:
    """One server. `says` is the next answer, makes it of the prompt's text, or lists the answers to a request for several,
    of which at most `most` may be asked for. It fails at the `broken` paths, and has none of those that it `lacks`. `cut`
    makes the pieces of an answer's text that are sent at once, instead of tokens.

    `asked` holds the body of every answer that was asked for, `paths` every path. While `goes_on` is not set, answers wait
    after their first token.
    """

    tokenizer: ChatTokenizer
    says: Says = "Hey there!"
    broken: set[str] = field(default_factory=set)
    lacks: set[str] = field(default_factory=set)
    cut: Callable[[str], list[str]] | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    adapters: dict[str, Path] = field(default_factory=dict)
    url: str = ""
    goes_on: asyncio.Event = field(default_factory=asyncio.Event)
    most: int = 64

    async def start(self) -> str:
        """Listen on a free port; return the URL."""
        self.goes_on.set()
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self.url

    async def stop(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    @property
    def prompt(self) -> str:
        """What the last request showed the policy."""
        return self.tokenizer.hf.decode(self.asked[-1]["prompt"])

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(request.path)
        if request.path in self.broken:
            return web.Response(status=500, text="EngineDeadError")
        if request.path in self.lacks:
            return web.Response(status=404)
        body = await request.json() if request.can_read_body else {}
        match request.path:
            case "/v1/models":
                loaded = [{"id": name, "parent": BASE} for name in self.adapters]
                return web.json_response({"data": [{"id": BASE, "parent": None}, *loaded]})
            case "/v1/load_lora_adapter":
                self.adapters[body["lora_name"]] = Path(body["lora_path"])
                return web.Response(text="done")
            case "/v1/unload_lora_adapter":
                del self.adapters[body["lora_name"]]
                return web.Response(text="done")
            case "/v1/completions":
                return await self._complete(request, body)
        return web.Response(status=404)

    async def _complete(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body["model"] not in {BASE, *self.adapters}:
            return web.json_response({"error": {"message": f"{body['model']} is not loaded"}}, status=404)
        if not -FITS <= body.get("seed", 0) < FITS or body["max_tokens"] < 1:
            return web.json_response({"error": {"message": "out of range"}}, status=400)
        if body.get("n", 1) > self.most:
            return web.json_response({"error": {"message": f"n must be at most {self.most}"}}, status=400)
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": "", "logprobs": {"top_logprobs": [self.likely(body)]}}]})
        self.asked.append(body)
        choices = [self.make_choice(body, index) for index in range(body.get("n", 1))]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for choice in interleave(choices):
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            await self.goes_on.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    def make_choice(self, body: dict[str, Any], index: int) -> list[dict[str, Any]]:
        """One of the answers, in pieces. Log-probabilities tell which one it is."""
        says = self.says[index % len(self.says)] if isinstance(self.says, list) else self.says
        says = says if isinstance(says, str) else says(self.tokenizer.hf.decode(body["prompt"]))
        pieces = [[token] for token in self.tokenizer.completion_ids(says)]
        if self.cut is not None:
            pieces = [self.tokenizer.hf.encode(text, add_special_tokens=False) for text in self.cut(says)]
        sampled = pieces[: body["max_tokens"]]
        choice = []
        for count, ids in enumerate(sampled, start=1):
            text = self.tokenizer.hf.decode([token for token in ids if token not in self.tokenizer.end_ids])
            reason = None if count < len(sampled) else "stop" if len(sampled) == len(pieces) else "length"
            logprobs = {"token_logprobs": [-0.5 - index] * len(ids)}
            choice.append({"index": index, "text": text, "token_ids": ids, "logprobs": logprobs, "finish_reason": reason})
        return choice

    def likely(self, body: dict[str, Any]) -> dict[str, float]:
        """The log-probabilities of the likeliest next tokens, as an adapter's probe has them."""
        if body["model"] not in self.adapters:
            return {"token_id:1": -1.0}
        place = next(one for one in probe.read(self.adapters[body["model"]]) if one.prompt_ids == body["prompt"])
        return {f"token_id:{token}": value for token, value in zip(place.tokens, place.candidate, strict=True)}


def interleave(choices: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The pieces of all answers in turns, the last answer first."""
    for pieces in zip_longest(*reversed(choices)):
        yield from (one for one in pieces if one is not None)
