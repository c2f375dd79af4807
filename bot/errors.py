"""The errors that kibitz raises for people.

    KibitzError                one line that names the key, the value and the fix
    |-- ConfigError            a config key or a command-line value cannot be used
    |-- TemplateError          the model's chat template refuses a conversation
    |-- DataError              a file or a database that kibitz was given cannot be read
    |   '-- Forgotten          what was to be answered is forgotten; nobody waits for it
    |-- ServingError           vLLM cannot be started, reached or used
    |   |-- ReplyInterrupted   an answer broke off; what was said so far is kept
    |   |-- Asleep             vLLM sleeps while a version is trained
    |   '-- ProbeFailed        a server does not serve what was trained
    |-- ConnectorError         a platform cannot be served until the operator does something
    |-- TrainingError          a run has nothing to train on, or did not train
    |   '-- NothingToLearn     no usable reward: not a fault, only nothing to do
    '-- RegistryError          a policy version cannot make the transition that was asked for

The command line shows the message and exits with code 2; everything else is a bug and keeps its traceback.
"""


class KibitzError(Exception):
    """Something that the person at the keyboard can put right; its text is one line."""


class ConfigError(KibitzError):
    """A config key or a command-line value cannot be used."""


class TemplateError(KibitzError):
    """The model's chat template refuses a conversation."""


class DataError(KibitzError):
    """A file or a database that kibitz was given cannot be read."""


class Forgotten(DataError):
    """What was to be answered was forgotten, before its answer or meanwhile; nobody waits for it."""


class ServingError(KibitzError):
    """vLLM cannot be started, reached or used."""


class ReplyInterrupted(ServingError):
    """An answer of a version broke off after its first token; `text` is what had been said."""

    def __init__(self, text: str, version: str, cause: str):
        super().__init__(f"the answer broke off: {cause}")
        self.text = text
        self.version = version


class Asleep(ServingError):
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
