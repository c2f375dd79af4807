"""A vLLM of our own on loopback that says what it is told to say.

For tests of what stands around an answer: the rest of kibitz is the real one. It speaks as much of vLLM's API as
`bot.policy` needs to answer people, and refuses the rest as a vLLM does whose weights cannot be changed.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web


class ScriptedVllm:
    """One server with one base model. `say` makes the text of an answer of the prompt's token ids."""

    def __init__(self) -> None:
        self.say: Callable[[list[int]], str] = lambda prompt: "Hello!"
        self.cut: Callable[[str], list[str]] = lambda text: text.replace(" ", "\0 ").split("\0")  # what comes at once
        self.ends = "stop"  # why an answer ends
        self.prompts: list[list[int]] = []
        self.goes_on = asyncio.Event()  # answers wait for it
        self.goes_on.set()

    async def start(self) -> None:
        """Listen."""
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        self._runner = web.AppRunner(app, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Close everything."""
        await self._runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "base", "parent": None}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": "", "token_ids": [1], "logprobs": {"token_logprobs": [0.0]}}]})
        self.prompts.append(body["prompt"])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        first, *rest = self.cut(self.say(body["prompt"]))
        await self._send(response, first, None)
        await self.goes_on.wait()
        for piece in rest:
            await self._send(response, piece, None)
        await self._send(response, "", self.ends)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response: web.StreamResponse, text: str, finish_reason: str | None) -> None:
        logprobs = {"token_logprobs": [-0.5]}
        choice: dict[str, Any] = {"text": text, "token_ids": [1], "logprobs": logprobs, "finish_reason": finish_reason}
        await response.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
