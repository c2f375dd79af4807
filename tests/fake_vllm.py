"""A vLLM on loopback that says what it is told to, as exact token ids, in vLLM's own events. No model, no GPU.

It refuses what vLLM refuses of what kibitz sends: seeds outside 64 bits, and no room for a token.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from bot.tokenizer import ChatTokenizer

FITS = 2**63


@dataclass
class FakeVllm:
    """One server. `says` is the next answer; `asked` holds the body of every request that was answered."""

    tokenizer: ChatTokenizer
    says: str = "Hey there!"
    asked: list[dict[str, Any]] = field(default_factory=list)

    async def start(self) -> str:
        """Listen on a free port; return the URL."""
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    @property
    def prompt(self) -> str:
        """What the last request showed the policy."""
        return self.tokenizer.hf.decode(self.asked[-1]["prompt"])

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not -FITS <= body.get("seed", 0) < FITS or body["max_tokens"] < 1:
            return web.json_response({"error": {"message": "out of range"}}, status=400)
        self.asked.append(body)
        ids = self.tokenizer.completion_ids(self.says)
        sampled = ids[: body["max_tokens"]]
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": self.says}]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for count, token in enumerate(sampled, start=1):
            text = "" if token in self.tokenizer.end_ids else self.tokenizer.hf.decode([token])
            reason = None if count < len(sampled) else "stop" if len(sampled) == len(ids) else "length"
            choice = {"text": text, "token_ids": [token], "logprobs": {"token_logprobs": [-0.5]}, "finish_reason": reason}
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response
