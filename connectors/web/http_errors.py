"""Turn the errors of a request into JSON in OpenAI's shape, with one line that says what to do.

A fault of ours has an id, which the response and one line of the log name. Browsers are refused here too, if the Host is not
ours or the page belongs to another site.
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
    """Return the status and the JSON of an error. Log a fault of ours in one line."""
    if isinstance(error, KibitzError) and not isinstance(error, DatabaseUnavailable):
        if isinstance(error, DataError):
            return 400, make_error_body(str(error))
        return 503 if isinstance(error, ServingError) else 500, make_error_body(str(error), "server_error")
    fault = new_id()
    is_safe = isinstance(error, DBAPIError | DatabaseUnavailable | OSError)  # other errors may quote people
    log.error(
        "a request failed (%s): %s%s",
        fault,
        quote_error(error) if is_safe else type(error).__name__,
        _describe_location(error),
    )
    if isinstance(error, DatabaseUnavailable):
        told = f"kibitz cannot use its database now; ask again later, or give the operator the id {fault}"
        return 503, make_error_body(told, "server_error")
    return 500, make_error_body(f"kibitz failed; ask again, or give the operator the id {fault}", "server_error")


def _describe_location(error: Exception) -> str:
    """Return where an error was raised: " (at FILE:LINE)"."""
    return "".join(f" (at {place.filename}:{place.lineno})" for place in traceback.extract_tb(error.__traceback__)[-1:])


async def respond_with_refusal(request: Request, error: Exception) -> Response:
    """Return the response to a request that a route refused."""
    assert isinstance(error, HTTPException)
    kind = "authentication_error" if error.status_code == 401 else "invalid_request_error"
    return JSONResponse(make_error_body(error.detail, kind), error.status_code, headers=error.headers)


class ErrorMiddleware:
    """Give each request an id in the log, and respond to every error with JSON, unless the response has begun."""

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
                return  # nobody reads the response
            except Exception as error:  # a bug or a full disk: this request ends, and the others do not
                status, told = describe_error(error)
                if not has_begun:
                    await JSONResponse(told, status)(scope, receive, send)


class KnownHosts:
    """Refuse requests for hosts other than `hosts`: a page of another site could reach us under its own name."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        host = Headers(scope=scope).get("host", "")
        if _read_hostname(host) in self.hosts:
            await self.app(scope, receive, send)
            return
        line = (
            f"without tokens kibitz answers only to {', '.join(self.hosts)}: the Host of this request is '{host[:100]}'; "
            "use one of these, or set web.tokens_env"
        )
        await JSONResponse(make_error_body(line), 400)(scope, receive, send)


class KnownOrigins(CORSMiddleware):
    """Let pages of the configured origins use the API in a browser, and tell other pages which setting would."""

    def __init__(self, app: ASGIApp, origins: Collection[str]):
        methods = ("GET", "POST", "PUT", "DELETE")
        super().__init__(app, list(origins), methods, allow_headers=["*"], allow_private_network=True)

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser that asks whether a page may send a request."""
        origin = request_headers["origin"]
        if self.is_allowed_origin(origin):
            return super().preflight_response(request_headers)
        line = f"origin '{origin[:100]}' is not in web.cors_origins; add it to let its pages use this API"
        return JSONResponse(make_error_body(line), 403)


def _read_hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
