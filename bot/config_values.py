"""The kinds of values that keys of the config have, with their limits and errors. `bot.config` has the keys."""

import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from bot.environment import expand_home

SECRET = "secret"  # the type of errors whose value must not be shown
MOST_CANDIDATES = 64  # answers that are sampled for one message


def _check_plain(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise PydanticCustomError("plain", "use true, false, a number or a text")
    return value


def _check_variable(value: str) -> str:
    if value and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise PydanticCustomError(SECRET, "name an environment variable here, and put the secret into that variable")
    return value


def _normalize_address(value: str) -> str:
    """Return a server's address without /v1 and what follows it, because our client adds the paths."""
    parts = urlsplit(value.strip())
    if not value.strip():
        return ""
    if parts.username or parts.password:
        raise PydanticCustomError(SECRET, "holds a password; leave it out, and name the variable of a key in api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PydanticCustomError("address", "write http://HOST:PORT")
    _ = parts.port  # raises ValueError if it is not a port
    path = re.sub(r"/v1(/.*)?$", "", parts.path).rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"


Plain = Annotated[bool | int | float | str, BeforeValidator(_check_plain)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Candidates = Annotated[int, Field(ge=1, le=MOST_CANDIDATES)]
Hours = Annotated[float, Field(ge=0, le=24 * 365)]
Address = Annotated[str, AfterValidator(_normalize_address)]
Variable = Annotated[str, AfterValidator(_check_variable)]  # the name of an environment variable that holds a secret
PathName = Annotated[str, AfterValidator(expand_home)]  # a path, or a name that does not begin with ~
