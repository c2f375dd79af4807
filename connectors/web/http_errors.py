"""HTTP errors: whatever goes wrong in a request becomes JSON in OpenAI's shape, with one line that says what to do.

A fault of ours is told with an id, and one line with that id goes to the log. Here too is what browsers are refused for: a
Host that is not ours, a page of another site. It knows no route.
"""

import logging
import traceback
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy.exc import DBAPIError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bot.errors import DatabaseUnavailable, DataError, KibitzError, ServingError, quote_error
from bot.logs import working_on
from bot.types import new_id

log = logging.getLogger(__name__)


def make_error_body(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """Return the JSON of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def describe_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status and the JSON that tell of an error. A fault of ours goes to the log, in one line."""
    if isinstance(error, KibitzError) and not isinstance(error, DatabaseUnavailable):
        if isinstance(error, DataError):
            return 400, make_error_body(str(error))
        return 503 if isinstance(error, ServingError) else 500, make_error_body(str(error), "server_error")
    fault = new_id()
    is_safe = isinstance(error, DBAPIError | DatabaseUnavailable | OSError)  # the texts of others may quote people
    log.error(
        "a request failed (%s): %s%s",
        fault,
        quote_error(error) if is_safe else type(error).__name__,
        _describe_location(error),
    )
    if isinstance(error, DatabaseUnavailable):
        told = f"kibitz can store nothing now; ask again in a while, or tell its operator of {fault}"
        return 503, make_error_body(told, "server_error")
    return 500, make_error_body(f"kibitz failed; ask again, or tell its operator of {fault}", "server_error")


def _describe_location(error: Exception) -> str:
    """Where an error was raised."""
    return "".join(f" (at {place.filename}:{place.lineno})" for place in traceback.extract_tb(error.__traceback__)[-1:])


async def respond_with_refusal(request: Request, error: Exception) -> Response:
    """Answer a request that a route refused."""
    assert isinstance(error, HTTPException)
    kind = "authentication_error" if error.status_code == 401 else "invalid_request_error"
    return JSONResponse(make_error_body(error.detail, kind), error.status_code, headers=error.headers)


class ErrorMiddleware:
    """Give each request an id in the log, and tell of every error while it is handled, if the answer has not begun."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        with working_on(request=new_id()):
            try:
                await self.app(scope, receive, watched)
            except ClientDisconnect:
                return  # nobody listens
            except Exception as error:  # a bug or a full disk: this request ends, and the others do not
                status, told = describe_error(error)
                if not has_begun:
                    await JSONResponse(told, status)(scope, receive, send)


class KnownHosts:
    """Answer only to the names of this machine that are given: a page of another site could reach us under its own."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        host = Headers(scope=scope).get("host", "")
        if _read_hostname(host) in self.hosts:
            await self.app(scope, receive, send)
            return
        line = (
            f"the Host of this request is '{host[:100]}'; without tokens kibitz answers to {', '.join(self.hosts)} alone: "
            "use one of these, or set web.tokens_env"
        )
        await JSONResponse(make_error_body(line), 400)(scope, receive, send)


class KnownOrigins(CORSMiddleware):
    """Let the pages of known other sites use the API in a browser, and say to others which setting lets them."""

    def __init__(self, app: ASGIApp, origins: Collection[str]):
        methods = ("GET", "POST", "PUT", "DELETE")
        super().__init__(app, list(origins), methods, allow_headers=["*"], allow_private_network=True)

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser that asks whether a page may send a request."""
        origin = request_headers["origin"]
        if self.is_allowed_origin(origin):
            return super().preflight_response(request_headers)
        line = f"web.cors_origins does not hold '{origin[:100]}'; add it to let pages from there use this API"
        return JSONResponse(make_error_body(line), 403)


def _read_hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
