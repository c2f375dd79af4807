"""The errors that kibitz raises for people.

    KibitzError                one line that names the key, the value and the fix
    |-- ConfigError            a config key or a command-line value cannot be used
    |-- TemplateError          the model's chat template refuses a conversation
    |-- DataError              a file or a database that kibitz was given cannot be read
    |   |-- DatabaseUnavailable    the database is locked, full or gone; nothing was stored
    |   '-- Forgotten          what was to be answered is forgotten; nobody waits for it
    |-- ServingError           vLLM cannot be started, reached or used
    |   |-- ReplyInterrupted   an answer broke off; what was said so far is kept
    |   |-- Unavailable        vLLM could not be asked just now; the same may succeed in a moment
    |   |-- Asleep             vLLM sleeps while a version is trained
    |   '-- ProbeFailed        a server does not serve what was trained
    |-- ConnectorError         a platform cannot be served until the operator does something
    |-- TrainingError          a run has nothing to train on, or did not train
    |   '-- NothingToLearn     no usable reward: not a fault, only nothing to do
    '-- RegistryError          a policy version cannot make the transition that was asked for
        '-- VerdictOutdated    a candidate was judged against a version that is not live any more

The command line shows the message and exits with code 2; everything else is a bug with a traceback. `quote_error` quotes
any error in one line.
"""


class KibitzError(Exception):
    """Something that the person at the keyboard can put right; its text is one line."""


class ConfigError(KibitzError):
    """A config key or a command-line value cannot be used."""


class TemplateError(KibitzError):
    """The model's chat template refuses a conversation."""


class DataError(KibitzError):
    """A file or a database that kibitz was given cannot be read."""


class DatabaseUnavailable(DataError):
    """The database is locked, full, gone or broken. Nothing was stored; the same may succeed later."""


class ForgottenError(DataError):
    """What was to be answered was forgotten, before its answer or meanwhile; nobody waits for it."""


class ServingError(KibitzError):
    """vLLM cannot be started, reached or used."""


class ReplyInterrupted(ServingError):
    """An answer of a version broke off after its first token; `text` is what had been said."""

    def __init__(self, text: str, version: str, cause: str):
        super().__init__(f"the answer broke off: {cause}")
        self.text = text
        self.version = version


class ServerUnavailable(ServingError):
    """vLLM could not be asked just now: it is away, failing or busy. It says nothing about what was asked."""


class ServerAsleep(ServingError):
    """vLLM sleeps while a version is trained: nobody is answered until that ends."""

    def __init__(self) -> None:
        super().__init__("I am learning and cannot answer meanwhile; ask again in a few minutes")


class ProbeFailed(ServingError):
    """A server's log-probabilities are not those of the version that it was given."""


class ConnectorError(KibitzError):
    """A platform cannot be served until the operator does something."""


class TrainingError(KibitzError):
    """A run has nothing to train on, or did not train."""


class NothingToLearn(TrainingError):
    """There is no usable reward: not a fault, only nothing to do yet."""


class RegistryError(KibitzError):
    """A policy version cannot make the transition that was asked for."""


class VerdictOutdated(RegistryError):
    """A candidate was judged against a version that is not live any more."""

    def __init__(self, name: str, judged_against: str | None, live: str):
        super().__init__(
            f"{name} was judged against {judged_against}, but {live} is live now; `kibitz train` makes a candidate that is "
            "judged against it"
        )


def quote_error(error: BaseException, only_first_line: bool = False) -> str:
    """Return what an error says, in one line: ours whole, anybody else's with its kind and cut to 240 characters.

    `only_first_line` is for errors whose further lines may quote what people wrote. Of a database's error it is what the
    driver says in its first line, since rows follow.
    """
    if isinstance(error, KibitzError):
        return " ".join(str(error).split())
    if driver := str(getattr(error, "orig", None) or ""):  # SQLAlchemy wraps the driver's error in one of its own
        return driver.partition("\n")[0][:240]
    said = str(error).partition("\n")[0] if only_first_line else str(error)
    return f"{type(error).__name__}: {' '.join(said.split())}"[:240].rstrip(": ")
