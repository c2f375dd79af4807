"""Read the process's environment: secrets, paths, standard streams, home directory, user name, proxy, ports.

It does not depend on the config. Callers pass the config key that an error message should name.
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
    """Return the value of the environment variable that a config key names, stripped of white space.

    Raises ConfigError if it is not set.
    """
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError(f"config key {key} has value '{variable}', a variable that is not set; set it, or remove the key")
    return value


def read_secret(key: str, variable: str) -> str:
    """Return the value of an environment variable that is sent in a header. Raises ConfigError if it is not one word."""
    value = read_variable(key, variable)
    if any(character.isspace() or not character.isprintable() for character in value):
        raise ConfigError(f"config key {key}: the value of ${variable} contains white space; put only the secret there")
    return value


def expand_home(path: str) -> str:
    """Expand a leading `~` of a path. Raises ConfigError if there is no such home directory."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(f"the path '{path}' begins with ~, but there is no such home directory; write the whole path")
    return expanded


def cache_directory() -> Path:
    """Return the directory of what is made once for this user, outside every data directory.

    Raises ConfigError if `~` in `KIBITZ_CACHE` names an unknown user.
    """
    if named := os.environ.get("KIBITZ_CACHE"):
        return Path(expand_home(named)).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kibitz"


def read_path(text: str) -> Path:
    """Return a path from the command line, with a leading `~` expanded.

    Raises ConfigError if the text is empty, which would be the working directory, or if the system refuses the path.
    """
    if not text:
        raise ConfigError("a path is empty; name a file or a directory, '.' is the working directory")
    path = Path(expand_home(text))
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # callers that need the file report it
    except OSError as error:
        raise ConfigError(f"the path '{text}' cannot be used ({error.strerror}); name another") from error
    return path


def check_arguments(arguments: Iterable[str]) -> None:
    """Raise ConfigError if an argument is not UTF-8 text, because no database takes it."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"the argument {os.fsencode(argument)!r} is not UTF-8 text; write it in UTF-8") from error


def open_standard_streams() -> None:
    """Open /dev/null in place of each closed standard stream, so that no other file gets its descriptor.

    Characters that the encoding of an output lacks are printed as "?", because messages contain any character.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (it stays open until we end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def ensure_user(data: Path) -> None:
    """Set a user name and a home directory (below `data`) if this process has none, as in many containers.

    Some libraries need both when they are imported.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user-{os.getuid()}"
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)  # an empty value would mean the root directory
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
    """Return a socket that listens on an IPv4 or IPv6 host and a port (0 for any free one).

    Raises ConfigError if the address cannot be used. The message names the port's `key` and ends with `otherwise`.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512)
    except (OSError, ValueError) as error:  # ValueError: the name cannot be a host's
        why = (
            "which is in use"
            if getattr(error, "errno", None) == errno.EADDRINUSE
            else (f"which cannot be used ({getattr(error, 'strerror', None) or error})")
        )
        raise ConfigError(
            f"config key {key} has value {port}, {why} on {host}; free it, or choose another{otherwise}"
        ) from error


def http_url(host: str, port: int) -> str:
    """Return the URL of a server, with brackets around an IPv6 host."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
