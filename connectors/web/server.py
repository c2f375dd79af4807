"""The HTTP server: an OpenAI-compatible API, feedback on its completions, a chat page, health and metrics.

`POST /v1/chat/completions` shows the policy the messages that the client sends, as any OpenAI server does. With
`conversation` in the body, kibitz keeps the history itself and reads only the last message. A completion's id is that of
its turn, so `POST /v1/feedback` may come days later.

Run: ``kibitz serve``, then http://127.0.0.1:8080/.
"""

import asyncio
import contextlib
import json
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from bot.chat.dialogue import ReplyOptions, render_answer
from bot.config import WebConfig
from bot.environment import http_url
from bot.errors import ConfigError
from bot.types import Conversation, Feedback, Message, Pick, Turn, new_id
from connectors.access import TOO_FAST
from connectors.base import Services, open_listener
from connectors.web import metrics
from connectors.web.http_errors import ErrorMiddleware, KnownHosts, KnownOrigins, describe_error, respond_with_refusal
from connectors.web.openai_api import (
    MODEL,
    UNSEEN,
    CompletionRequest,
    FeedbackRequest,
    PersonQuery,
    PrivacyDecision,
    make_chunk,
    make_completion,
    model_card,
    parse,
)
from connectors.web.request_body import read_json

Pieces = asyncio.Queue[str | Turn | None]  # pieces of an answer, then its turn, then None

LONGEST_NAME = 48  # characters of a user's name, which prefixes the names of its people
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PAGE = Path(__file__).with_name("page.html")
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)


@dataclass(frozen=True)
class Endpoint:
    """The listening socket, the users' names by token, the other origins whose pages may use the API, and how many
    candidates a streamed answer may have.

    It is opened before anything else starts.
    """

    users: dict[str, str]
    socket: socket.socket
    origins: tuple[str, ...] = ()
    candidates: int = WebConfig().candidates

    @classmethod
    def open(cls, config: WebConfig) -> "Endpoint":
        """Listen. Raises ConfigError if the address is not available, or others could connect without a token."""
        known = read_users(config)
        if "*" in config.cors_origins and not known:
            raise ConfigError(
                "config key web.cors_origins has value '*', with which any page could talk to kibitz without a token; "
                "name the origins, or set web.tokens_env"
            )
        return cls(known, open_listener("web", config.host, config.port), tuple(config.cors_origins), config.candidates)

    @property
    def url(self) -> str:
        """The URL of the server."""
        host, port = self.socket.getsockname()[:2]
        return http_url(host, port)


class Web:
    """One HTTP server in kibitz's event loop."""

    name = "web"

    def __init__(self, services: Services, door: Endpoint):
        self.dialogue = services.dialogue
        self.access = services.access
        self.desk = services.desk
        self.users = services.users
        self._users, self._socket, self._origins = door.users, door.socket, door.origins
        self._candidates = door.candidates
        self._answering: set[asyncio.Task[Turn]] = set()
        self._server = _Server(
            uvicorn.Config(
                self._app(),
                log_config=None,  # bot.logs configures the log
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=10,
            )
        )

    async def run(self) -> None:
        """Serve until `stop`."""
        await self._server.serve(sockets=[self._socket])

    async def stop(self) -> None:
        """Accept nothing new, let answers end, and close."""
        self._server.should_exit = True
        if self._answering:
            await asyncio.wait(self._answering, timeout=10)

    def _app(self) -> Starlette:
        routes = [
            Route("/", self._page),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/v1/chat/completions/{completion_id}", self._delete, methods=["DELETE"]),
            Route("/v1/privacy", self._privacy, methods=["GET", "PUT", "DELETE"]),
            Route("/v1/feedback", self._feedback, methods=["POST"]),
            Route("/v1/feedback/{feedback_id}", self._retract, methods=["DELETE"]),
            Route("/healthz", self._health),
            Route("/readyz", self._ready),
            Route("/metrics", self._metrics),
        ]
        middleware = [Middleware(KnownOrigins, origins=self._origins), Middleware(ErrorMiddleware)]
        if not self._users:
            middleware.insert(1, Middleware(KnownHosts, hosts=LOOPBACK))
        return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: respond_with_refusal})

    async def _page(self, request: Request) -> Response:
        return FileResponse(
            PAGE, headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY, "Referrer-Policy": "no-referrer"}
        )

    async def _models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [model_card()]})

    async def _model(self, request: Request) -> Response:
        self._authorize(request)
        if request.path_params["model"] != MODEL:
            raise HTTPException(404, f"there is no model '{request.path_params['model']}'; the one here is '{MODEL}'")
        return JSONResponse(model_card())

    async def _complete(self, request: Request) -> Response:
        user = self._authorize(request)
        asked = parse(CompletionRequest, await read_json(request))
        author = _make_author_id(user, asked.user)
        self._check_limit(self.access.may_write, author, request, user)
        pieces: Pieces = asyncio.Queue()
        options = ReplyOptions(
            on_text=pieces.put_nowait,
            on_turn=pieces.put,
            stop=asyncio.Event(),
            turn_id=new_id(),
            seed=asked.seed,
            max_tokens=asked.token_limit,
            stops=asked.stops,
            has_client_history=True,
            candidates=self._candidates if asked.stream else None,
        )
        answering = asyncio.create_task(self._answer(asked, user, author, options))
        answering.add_done_callback(lambda _: pieces.put_nowait(None))
        self._track(answering)
        if asked.stream:
            events = self._stream_events(asked, options, pieces, answering)
            first = await anext(events)  # an error before the first token can still set the status
            return StreamingResponse(_prepend(first, events), media_type="text/event-stream")
        return JSONResponse(make_completion(await asyncio.shield(answering), UNSEEN if asked.has_unseen else ""))

    async def _answer(self, asked: CompletionRequest, user: str, author: str, options: ReplyOptions) -> Turn:
        if asked.regenerates:
            turn_id = asked.regenerates.removeprefix("chatcmpl-")
            await self._find_own_turn(turn_id, user)
            return await self.dialogue.regenerate(turn_id, author, options)
        place = Conversation(self.name, asked.conversation or new_id(), space=user)
        question, history = asked.split_question()
        message = Message("", author, question)
        if asked.conversation:
            return await self.dialogue.respond(message, options, place)
        return await self.dialogue.respond_to_history(message, history, place, options)

    async def _stream_events(
        self, asked: CompletionRequest, options: ReplyOptions, pieces: Pieces, answering: asyncio.Task[Turn]
    ) -> AsyncIterator[str]:
        """Yield the server-sent events of one answer. A client that disconnects stops the answer."""
        assert options.turn_id is not None
        assert options.stop is not None
        said = False
        try:
            while (piece := await pieces.get()) is not None:
                if not said and asked.has_unseen:
                    yield make_chunk(options.turn_id, {"role": "assistant", "content": UNSEEN})
                    said = True
                opening = {} if said else {"role": "assistant", "content": ""}
                if isinstance(piece, Turn):
                    if not piece.text.strip():
                        yield make_chunk(options.turn_id, {**opening, "content": render_answer(piece)})
                        opening = {}
                    yield make_chunk(options.turn_id, opening, piece)
                else:
                    yield make_chunk(options.turn_id, {**opening, "content": piece})
                said = True
            try:
                turn = await asyncio.shield(answering)
            except Exception as error:  # the status was sent: the error goes into the stream
                if not said:
                    raise
                _, told = describe_error(error)
                yield f"data: {json.dumps(told)}\n\n"
                return
            if asked.stream_options.include_usage:
                yield f"data: {json.dumps({**make_completion(turn), 'object': 'chat.completion.chunk', 'choices': []})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            options.stop.set()

    async def _feedback(self, request: Request) -> Response:
        user = self._authorize(request)
        given = parse(FeedbackRequest, await read_json(request))
        if given.episode_id:
            turn = await self._find_last_turn(given.episode_id, user)
        else:
            turn = await self._find_own_turn(given.inference_id.removeprefix("chatcmpl-"), user)
        # Without a name, the opinion is the asker's: one of somebody who took no part would not count.
        author = _make_author_id(user, given.user) if given.user else turn.asker_id
        self._check_limit(self.access.may_judge, author, request, user)
        if given.is_pick and not given.dryrun:
            acts = await self.dialogue.record_pick(Pick(turn.id, author, bool(given.value)))
            return JSONResponse({"feedback_id": acts[-1].id})
        feedback = given.make_feedback(turn.id, author)
        if not given.dryrun:
            await self.dialogue.record_feedback(feedback)
        return JSONResponse({"feedback_id": feedback.id})

    async def _retract(self, request: Request) -> Response:
        user = self._authorize(request)
        feedback_id, person = request.path_params["feedback_id"], _read_person(request)
        given = await self.dialogue.store.database.call(self.dialogue.store.find_feedback, feedback_id)
        unknown = HTTPException(404, f"you gave no feedback with the id '{feedback_id}'")
        if given is None or not _may_speak_for(user, person, given):
            raise unknown
        self._check_limit(self.access.may_judge, given.user_id, request, user)
        if not await self.dialogue.retract(feedback_id, given.user_id):
            raise unknown
        return JSONResponse({"feedback_id": feedback_id, "retracted": True})

    async def _delete(self, request: Request) -> Response:
        """Forget a completion and its question."""
        user, completion_id = self._authorize(request), request.path_params["completion_id"]
        turn = await self._find_own_turn(completion_id.removeprefix("chatcmpl-"), user)
        await self.dialogue.forget(turn.message_id)
        return JSONResponse({"object": "chat.completion.deleted", "id": completion_id, "deleted": True})

    async def _privacy(self, request: Request) -> Response:
        """Return whether kibitz may learn from the caller (GET), record their decision (PUT), or forget them (DELETE)."""
        user = self._authorize(request)
        author, call = _make_author_id(user, _read_person(request)), self.dialogue.store.database.call
        if request.method == "DELETE":
            self._check_limit(self.access.may_write, author, request, user)
            return JSONResponse({"consent": False, "told": await self.desk.forget_person(self.name, author)})
        if request.method == "PUT":
            decision = parse(PrivacyDecision, await read_json(request))
            self._check_limit(self.access.may_write, author, request, user)
            await call(self.users.record_consent, self.name, author, decision.consent)
        return JSONResponse({"consent": await call(self.users.has_consent, self.name, author)})

    async def _find_own_turn(self, turn_id: str, user: str) -> Turn:
        """Return a turn of this user. Raises 404 for all others, so that nobody learns whether a turn exists."""
        call, store = self.dialogue.store.database.call, self.dialogue.store
        turn = await call(store.find_turn, turn_id)
        place = None if turn is None else await call(store.read_conversation, turn.conversation_id)
        if turn is None or place is None or (place.platform, place.space) != ("web", user):
            raise HTTPException(404, f"you have no completion with the id '{turn_id}'")
        return turn

    async def _find_last_turn(self, episode_id: str, user: str) -> Turn:
        """Return the last answer in a conversation of this user, by its id or the user's own name for it."""
        call, store = self.dialogue.store.database.call, self.dialogue.store
        turn = await call(store.find_last_turn_at, Conversation(self.name, episode_id, space=user))
        turn = turn or await call(store.find_last_turn, episode_id)
        if turn is None:
            raise HTTPException(404, f"you have no conversation with the id '{episode_id}'")
        return await self._find_own_turn(turn.id, user)

    async def _health(self, request: Request) -> Response:
        return PlainTextResponse("ok")

    async def _ready(self, request: Request) -> Response:
        faults, failing = self.desk.find_faults(), self.desk.list_failing_tasks()
        lines = [*(faults or ["ready"]), *(f"failing: {name}" for name in failing)]
        return PlainTextResponse("\n".join(lines), 503 if faults else 200)

    async def _metrics(self, request: Request) -> Response:
        self._authenticate(request)
        store = self.dialogue.store
        counts = await store.database.call(store.count_rows) | {"shed_opinions": self.access.shed_count}
        return Response(metrics.render(counts, self.dialogue.policy.version), media_type=metrics.MEDIA_TYPE)

    def _authorize(self, request: Request) -> str:
        """Return the name of the user, by bearer token. Raises 401 or 403."""
        user = self._authenticate(request)
        if not self.access.admits(user):
            raise HTTPException(403, f"{user} may not talk to this kibitz")
        return user

    def _authenticate(self, request: Request) -> str:
        if not self._users:
            return "local"
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        for known, name in self._users.items():
            if scheme.lower() == "bearer" and secrets.compare_digest(known.encode(), token.strip().encode()):
                return name
        raise HTTPException(401, "no known token was sent; send Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    def _check_limit(self, admit: Callable[[str, str, list[str]], bool], author: str, request: Request, user: str) -> None:
        """Count an act of `author` with `admit`. Raises 429 if it is over the limit."""
        sources = [f"token {user}", *([f"address {request.client.host}"] if request.client else [])]  # not forgeable
        if not admit(self.name, author, sources):
            raise HTTPException(429, TOO_FAST, {"Retry-After": "60"})

    def _track(self, task: asyncio.Task[Turn]) -> None:
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: kibitz has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def read_users(config: WebConfig) -> dict[str, str]:
    """Return users' names by token. Raises ConfigError if they are malformed, or others could connect without one."""
    found: dict[str, str] = {}
    listed = os.environ.get(config.tokens_env, "") if config.tokens_env else ""
    for entry in filter(None, (part.strip() for part in listed.split(","))):
        name, colon, token = entry.partition(":")
        if not (name and colon and token):
            raise ConfigError(f"config key web.tokens_env: ${config.tokens_env} holds no NAME:TOKEN,NAME:TOKEN; fix it")
        if "/" in name or len(name) > LONGEST_NAME:
            raise ConfigError(
                f"config key web.tokens_env: ${config.tokens_env} holds the name '{name[:LONGEST_NAME]}'; "
                f"choose one of at most {LONGEST_NAME} characters, without a slash"
            )
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


def _make_author_id(user: str, person: str) -> str:
    """Return the author's id: that of a token's holder, or of one of the people that its client tells apart."""
    return f"{user}/{person}" if person else user


def _read_person(request: Request) -> str:
    """Return the person that a query names, "" for the client itself."""
    return parse(PersonQuery, dict(request.query_params)).user


def _may_speak_for(user: str, person: str, given: Feedback) -> bool:
    """Return whether feedback was given by `person` of a client, or by anybody of the client if `person` is ""."""
    return given.user_id == _make_author_id(user, person) or (not person and given.user_id.startswith(f"{user}/"))


async def _prepend(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for event in rest:
        yield event
