"""The errors that kibitz raises for people.

    KibitzError                    one line that says what is wrong, what was found, and what to do
    |-- ConfigError                a config key or a command-line value cannot be used
    |-- TemplateError              the model's chat template refuses a conversation
    |-- DataError                  a file or a database cannot be used
    |   |-- DatabaseUnavailable    the database is locked, full, gone or broken; nothing was stored
    |   '-- ForgottenError         the message to answer was forgotten; nobody waits for an answer
    |-- ServingError               vLLM cannot be started, reached or used
    |   |-- ReplyInterrupted       an answer broke off; its beginning is kept
    |   |-- RequestRefused         vLLM does not accept the request, and would not accept it again
    |   |-- ServerUnavailable      vLLM does not answer at the moment; a new try may succeed
    |   |-- ServerAsleep           vLLM sleeps while a version is trained
    |   '-- ProbeFailed            a server does not serve the version that was trained
    |-- ConnectorError             a platform cannot be served until the operator does something
    |-- TrainingError              a run has nothing to train on, or did not train
    |   '-- NothingToLearn         there is no usable reward yet, which is no fault
    '-- RegistryError              a policy version cannot make the transition
        '-- VerdictOutdated        a candidate was judged against a version that is no longer live

The command line shows the message and exits with code 2. Any other error is a bug and shows a traceback. `quote_error`
quotes any error in one line.
"""


class KibitzError(Exception):
    """An error that the user can fix. Its text is one line."""


class ConfigError(KibitzError):
    """A config key or a command-line value cannot be used."""


class TemplateError(KibitzError):
    """The model's chat template refuses a conversation."""


class DataError(KibitzError):
    """A file or a database cannot be used."""


class DatabaseUnavailable(DataError):
    """The database is locked, full, gone or broken. Nothing was stored, and a new try may succeed."""


class ForgottenError(DataError):
    """The message to answer was forgotten, before its answer or meanwhile. Nobody waits for an answer."""


class ServingError(KibitzError):
    """vLLM cannot be started, reached or used."""


class ReplyInterrupted(ServingError):
    """An answer of a version broke off after its first token. `text` is its beginning."""

    def __init__(self, text: str, version: str, cause: str):
        super().__init__(f"the answer broke off: {cause}")
        self.text = text
        self.version = version


class RequestRefused(ServingError):
    """vLLM does not accept the request itself (HTTP 400). A new try would fail too."""


class ServerUnavailable(ServingError):
    """vLLM is away, failing or busy at the moment. The request itself may be fine."""


class ServerAsleep(ServingError):
    """vLLM sleeps while a version is trained. Nobody is answered until that ends."""

    def __init__(self) -> None:
        super().__init__("I am learning and cannot answer meanwhile; ask again in a few minutes")


class ProbeFailed(ServingError):
    """A server's log-probabilities are not those of the version that it loaded."""


class ConnectorError(KibitzError):
    """A platform cannot be served until the operator does something."""


class TrainingError(KibitzError):
    """A run has nothing to train on, or did not train."""


class NothingToLearn(TrainingError):
    """There is no usable reward yet. This is no fault."""


class RegistryError(KibitzError):
    """A policy version cannot make the transition."""


class VerdictOutdated(RegistryError):
    """A candidate was judged against a version that is no longer live."""

    def __init__(self, name: str, judged_against: str | None, live: str):
        super().__init__(
            f"{name} was judged against {judged_against}, but {live} is live now; make a candidate that is judged against "
            "it with `kibitz train`"
        )


def quote_error(error: BaseException) -> str:
    """Return an error's text in one line. Errors of others begin with their type and are cut to 240 characters.

    Of a database's error only the driver's first line is used, because the others quote rows.
    """
    if isinstance(error, KibitzError):
        return " ".join(str(error).split())
    return _quote_foreign(error, str(error))


def quote_first_line(error: BaseException) -> str:
    """Return the first line of an error's text, as `quote_error` does. Further lines may quote people's messages."""
    if isinstance(error, KibitzError):
        return quote_error(error)
    return _quote_foreign(error, str(error).partition("\n")[0])


def _quote_foreign(error: BaseException, text: str) -> str:
    if driver := str(getattr(error, "orig", None) or ""):  # SQLAlchemy wraps the driver's error in one of its own
        return driver.partition("\n")[0][:240]
    return f"{type(error).__name__}: {' '.join(text.split())}"[:240].rstrip(": ")
