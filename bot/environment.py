"""Environment: what kibitz takes from where it runs: secrets, standard streams, a home, a user name, a proxy, a port.

It knows no config: whoever asks names the key that an error should speak of.
"""

import errno
import getpass
import io
import os
import socket
import sys
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from bot.errors import ConfigError


def read_variable(key: str, variable: str) -> str:
    """Return what the environment variable that a config key names holds, without blanks and line ends around it.

    Raises ConfigError where it is not set.
    """
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError(f"config key {key} has value '{variable}', a variable that is not set; set it, or remove the key")
    return value


def read_secret(key: str, variable: str) -> str:
    """As `read_variable`, of what is sent in a header: one word. Raises ConfigError where it is not."""
    value = read_variable(key, variable)
    if any(character.isspace() or not character.isprintable() for character in value):
        raise ConfigError(
            f"config key {key}: ${variable} holds blanks or line ends within its value; put the secret there alone"
        )
    return value


def expand_home(path: str) -> str:
    """Replace a `~` at the beginning of a path. Raises ConfigError where there is no such home directory."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(f"the path '{path}' begins with ~, but there is no such home directory; write the whole path")
    return expanded


def read_path(text: str) -> Path:
    """Return the path that a command line names, with the home directory for a `~`.

    Raises ConfigError for an empty name, which would be the working directory, and for one that the system refuses.
    """
    if not text:
        raise ConfigError("an empty path was given; name a file or a directory, '.' is this one")
    path = Path(expand_home(text))
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # whoever needs it says so
    except OSError as error:
        raise ConfigError(f"the path '{text}' cannot be used ({error.strerror}); name another") from error
    return path


def check_arguments(arguments: Iterable[str]) -> None:
    """Check that the arguments of a command line are text, as no database takes others. Raises ConfigError."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"the argument {os.fsencode(argument)!r} is not UTF-8 text; write it in UTF-8") from error


def open_standard_streams() -> None:
    """Open /dev/null in place of each standard stream that is closed, so that no other file gets its number.

    A character that the encoding of an output does not have is shown as "?", as what people say has all kinds.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (it stays open as long as we run)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def ensure_user(data: Path) -> None:
    """Give this process a user name and a home directory (below `data`) where it has none, as in many containers.

    Libraries ask for both while they are imported, and end where there are none.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user-{os.getuid()}"
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)  # an empty one would be the root directory
        try:
            Path.home()
        except RuntimeError:
            home = (data / "home").absolute()
            home.mkdir(mode=0o700, exist_ok=True)
            os.environ["HOME"] = str(home)


def find_proxy(url: str) -> str | None:
    """Return the proxy that the environment names for a URL (HTTPS_PROXY, ALL_PROXY, not NO_PROXY), or None."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    named = urllib.request.getproxies()
    return named.get(parts.scheme) or named.get("all")


def listen(key: str, host: str, port: int, otherwise: str = "") -> socket.socket:
    """Open a socket that listens on an IPv4 or IPv6 host and a port; 0 is any free one.

    Raises ConfigError that names the port's `key` where the address cannot be had, and what can be done `otherwise`.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512)
    except (OSError, ValueError) as error:  # ValueError: of a name that no host can have
        why = (
            "which is in use"
            if getattr(error, "errno", None) == errno.EADDRINUSE
            else (f"which cannot be used ({getattr(error, 'strerror', None) or error})")
        )
        raise ConfigError(
            f"config key {key} has value {port}, {why} on {host}; free it, or choose another{otherwise}"
        ) from error


def http_url(host: str, port: int) -> str:
    """Return the URL of a server; an IPv6 host stands in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
