"""The web: an OpenAI-compatible API, feedback on its completions, a chat page, and what operators scrape.

`POST /v1/chat/completions` shows the policy the messages that the client sends, as any OpenAI server does; with
`conversation` in the body kibitz keeps the history itself and takes the last message only. A completion's id is the
turn's, so `POST /v1/feedback` may come days later. It knows no model and no training.

Run: ``kibitz serve``, then http://127.0.0.1:8080/.
"""

import asyncio
import contextlib
import json
import os
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from bot.config import WebConfig
from bot.dialogue import ReplyOptions, spoken
from bot.errors import ConfigError, DataError, KibitzError, ServingError
from bot.types import Conversation, Message, Turn, new_id
from connectors.access import TOO_FAST
from connectors.base import Shared, listening
from connectors.openai_api import Completion, FeedbackRequest, Privacy, chunk, completion, parsed

Pieces = asyncio.Queue[str | Turn | None]  # of an answer, then all of it, then the end

LARGEST_BODY = 2_000_000  # bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


@dataclass(frozen=True)
class Door:
    """Where the server listens, and the names of its users by token: opened before anything else starts."""

    users: dict[str, str]
    socket: socket.socket

    @classmethod
    def open(cls, config: WebConfig) -> "Door":
        """Raises ConfigError where the address cannot be had, or others could come in without a token."""
        return cls(users(config), listening("web", config.host, config.port))

    @property
    def url(self) -> str:
        """Where the server listens."""
        host, port = self.socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Web:
    """One HTTP server in the event loop of kibitz."""

    name = "web"

    def __init__(self, shared: Shared, door: Door):
        self.dialogue = shared.dialogue
        self.access = shared.access
        self.desk = shared.desk
        self.users = shared.users
        self._users, self._socket = door.users, door.socket
        self._answering: set[asyncio.Task[Turn]] = set()
        self._server = _Server(
            uvicorn.Config(self._app(), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=10)
        )

    async def run(self) -> None:
        """Serve until `stop`."""
        await self._server.serve(sockets=[self._socket])

    async def stop(self) -> None:
        """Take nothing new in, let what is under way end, and close."""
        self._server.should_exit = True
        if self._answering:
            await asyncio.wait(self._answering, timeout=10)

    def _app(self) -> Starlette:
        routes = [
            Route("/", self._page),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/v1/chat/completions/{completion_id}", self._delete, methods=["DELETE"]),
            Route("/v1/privacy", self._privacy, methods=["GET", "PUT", "DELETE"]),
            Route("/v1/feedback", self._feedback, methods=["POST"]),
            Route("/v1/feedback/{feedback_id}", self._retract, methods=["DELETE"]),
            Route("/healthz", self._health),
            Route("/readyz", self._ready),
            Route("/metrics", self._metrics),
        ]
        # Without tokens, a page of another site could reach us under a name of its own (DNS rebinding).
        hosts = ["*"] if self._users else [*LOOPBACK, "[::1]"]
        middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
        handlers: Any = {HTTPException: _refused, KibitzError: _failed}
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)

    async def _page(self, request: Request) -> Response:
        return FileResponse(PAGE, headers={"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"})

    async def _models(self, request: Request) -> Response:
        self._user(request)
        model = {"id": "kibitz", "object": "model", "created": 0, "owned_by": "kibitz"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _complete(self, request: Request) -> Response:
        user = self._user(request)
        asked = parsed(Completion, await _body(request))
        author = _author(user, asked.user)
        if not self.access.in_time("web", author):
            raise HTTPException(429, TOO_FAST, {"Retry-After": "60"})
        pieces: Pieces = asyncio.Queue()
        options = ReplyOptions(pieces.put_nowait, pieces.put, asyncio.Event(), new_id(), asked.seed)
        answering = asyncio.create_task(self._answer(asked, user, author, options))
        answering.add_done_callback(lambda _: pieces.put_nowait(None))
        self._keep(answering)
        if asked.stream:
            events = self._events(asked, options, pieces, answering)
            first = await anext(events)  # what goes wrong before the first token is told by the status
            return StreamingResponse(_with_first(first, events), media_type="text/event-stream")
        return JSONResponse(completion(await asyncio.shield(answering)))

    async def _answer(self, asked: Completion, user: str, author: str, options: ReplyOptions) -> Turn:
        if asked.regenerates:
            turn_id = asked.regenerates.removeprefix("chatcmpl-")
            await self._own(turn_id, user)
            return await self.dialogue.regenerate(turn_id, author, options)
        place = Conversation("web", asked.conversation or new_id(), space=user)
        shown = None if asked.conversation else [{"role": said.role, "content": said.text} for said in asked.messages]
        return await self.dialogue.respond(Message("", author, asked.messages[-1].text), options, shown, place)

    async def _events(
        self, asked: Completion, options: ReplyOptions, pieces: Pieces, answering: asyncio.Task[Turn]
    ) -> AsyncIterator[str]:
        """Server-sent events of one answer; whoever goes away before its end has stopped it."""
        assert options.turn_id is not None
        assert options.stop is not None
        said = False
        try:
            while (piece := await pieces.get()) is not None:
                opening = {} if said else {"role": "assistant", "content": ""}
                if isinstance(piece, Turn):
                    if not piece.text.strip():
                        yield chunk(options.turn_id, {**opening, "content": spoken(piece)})
                        opening = {}
                    yield chunk(options.turn_id, opening, piece)
                else:
                    yield chunk(options.turn_id, {**opening, "content": piece})
                said = True
            try:
                turn = await asyncio.shield(answering)
            except KibitzError as error:
                if not said:
                    raise
                yield f"data: {json.dumps(_error(str(error), 'server_error'))}\n\n"
                return
            if asked.stream_options.include_usage:
                yield f"data: {json.dumps({**completion(turn), 'object': 'chat.completion.chunk', 'choices': []})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            options.stop.set()

    async def _feedback(self, request: Request) -> Response:
        user = self._user(request)
        given = parsed(FeedbackRequest, await _body(request))
        turn_id = given.inference_id.removeprefix("chatcmpl-")
        await self._own(turn_id, user)
        feedback = given.feedback(turn_id, _author(user, given.user))
        if not self.access.may_judge(self.name, feedback.user_id):
            raise HTTPException(429, TOO_FAST, {"Retry-After": "60"})
        await self.dialogue.record_feedback(feedback)
        return JSONResponse({"feedback_id": feedback.id})

    async def _retract(self, request: Request) -> Response:
        user = self._user(request)
        author = _author(user, request.query_params.get("user", ""))
        feedback_id = request.path_params["feedback_id"]
        if not await self.dialogue.retract(feedback_id, author):
            raise HTTPException(404, f"you gave no feedback with the id '{feedback_id}'")
        return JSONResponse({"feedback_id": feedback_id, "retracted": True})

    async def _delete(self, request: Request) -> Response:
        """A completion and the question to it are forgotten."""
        user, completion_id = self._user(request), request.path_params["completion_id"]
        turn = await self._own(completion_id.removeprefix("chatcmpl-"), user)
        await self.dialogue.forget(turn.message_id)
        return JSONResponse({"object": "chat.completion.deleted", "id": completion_id, "deleted": True})

    async def _privacy(self, request: Request) -> Response:
        """Whether we may learn from who asks (GET), their decision (PUT), and forgetting them (DELETE)."""
        user = _author(self._user(request), request.query_params.get("user", ""))
        if request.method == "DELETE":
            return JSONResponse({"consent": False, "told": await self.desk.forget(self.name, user)})
        call = self.dialogue.store.database.call
        if request.method == "PUT":
            await call(self.users.decide, self.name, user, parsed(Privacy, await _body(request)).consent)
        return JSONResponse({"consent": await call(self.users.consents, self.name, user)})

    async def _own(self, turn_id: str, user: str) -> Turn:
        """That a turn was answered to this user; who cannot see a turn does not learn whether it is there."""
        call, store = self.dialogue.store.database.call, self.dialogue.store
        turn = await call(store.turn, turn_id)
        place = None if turn is None else await call(store.conversation, turn.conversation_id)
        if turn is None or place is None or (place.platform, place.space) != ("web", user):
            raise HTTPException(404, f"you have no completion with the id '{turn_id}'")
        return turn

    async def _health(self, request: Request) -> Response:
        return PlainTextResponse("ok")

    async def _ready(self, request: Request) -> Response:
        ready = await self.dialogue.policy.ready()
        return PlainTextResponse("ready" if ready else "vLLM generates nothing", 200 if ready else 503)

    async def _metrics(self, request: Request) -> Response:
        store = self.dialogue.store
        counts = await store.database.call(store.counts)
        registry = CollectorRegistry()
        registry.register(_Counts(counts | {"shed_opinions": self.access.shed}, self.dialogue.policy.version))
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    def _user(self, request: Request) -> str:
        """Who asks, by bearer token."""
        user = self._named(request)
        if not self.access.admits(user):
            raise HTTPException(403, f"{user} may not talk to this kibitz")
        return user

    def _named(self, request: Request) -> str:
        if not self._users:
            return "local"
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        for known, name in self._users.items():
            if scheme.lower() == "bearer" and secrets.compare_digest(known.encode(), token.strip().encode()):
                return name
        raise HTTPException(401, "give a token of this kibitz: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    def _keep(self, task: asyncio.Task[Turn]) -> None:
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: kibitz has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Counts:
    """What there is in the database, as Prometheus reads it."""

    def __init__(self, counts: dict[str, int], live: str):
        self.counts, self.live = counts, live

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for table, count in self.counts.items():
            yield GaugeMetricFamily(f"kibitz_{table}", f"How many {table.replace('_', ' ')} there are.", value=count)
        live = GaugeMetricFamily("kibitz_live", "The version that answers.", labels=["version"])
        live.add_metric([self.live], 1)
        yield live


def users(config: WebConfig) -> dict[str, str]:
    """The names of users by token. Raises ConfigError where others than this machine could come in without one."""
    found: dict[str, str] = {}
    listed = os.environ.get(config.tokens_env, "") if config.tokens_env else ""
    for entry in filter(None, (part.strip() for part in listed.split(","))):
        name, colon, token = entry.partition(":")
        if not (name and colon and token):
            raise ConfigError(f"config key web.tokens_env: ${config.tokens_env} holds no NAME:TOKEN,NAME:TOKEN; mend it")
        found[token] = name
    if config.tokens_env and not found:
        raise ConfigError(
            f"config key web.tokens_env has value '{config.tokens_env}', a variable that is not set; set it to NAME:TOKEN"
        )
    if not found and config.host not in LOOPBACK:
        raise ConfigError(
            f"config key web.host has value '{config.host}', which others can reach without a token; "
            "set web.tokens_env, or use 127.0.0.1"
        )
    return found


def _author(user: str, person: str) -> str:
    """Who speaks: the holder of a token, or one of the people that its client tells apart."""
    return f"{user}/{person}" if person else user


async def _body(request: Request) -> bytes:
    """The body of a JSON request, of bounded size."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send Content-Type: application/json")  # which a page of another site cannot
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise HTTPException(413, f"the body is larger than {LARGEST_BODY} bytes; send less")
    return bytes(body)


async def _with_first(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for event in rest:
        yield event


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "authentication_error" if error.status_code == 401 else "invalid_request_error"
    return JSONResponse(_error(error.detail, kind), error.status_code, headers=error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, DataError):
        return JSONResponse(_error(str(error), "invalid_request_error"), 400)
    return JSONResponse(_error(str(error), "server_error"), 503 if isinstance(error, ServingError) else 500)
