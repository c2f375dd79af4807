"""A chat on standard input and output: one person talks with kibitz, reacts, and watches it learn.

On a terminal it streams answers and keeps a prompt at the bottom (prompt_toolkit). Otherwise it reads and prints lines,
so that it can be scripted.
"""

import asyncio
import contextlib
import getpass
import os
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future

from prompt_toolkit import PromptSession
from prompt_toolkit.patch_stdout import patch_stdout

from bot.chat.dialogue import DialogueManager, ReplyOptions, render_answer
from bot.errors import DataError, KibitzError, ServingError, TemplateError
from bot.logs import working_on
from bot.store.feedback import find_reasons
from bot.types import Conversation, Feedback, FeedbackKind, Message, Pick, Reason, Turn, new_id
from connectors.base import Desk
from connectors.commands import CONSENT_CHOICES, ask_for_choice
from connectors.reasons import make_acts

PLATFORM = SIGNAL = "terminal"
STANDARD_INPUT = 0  # its file descriptor
READ_SIZE = 2**16  # bytes
HELP = """say something, or:
  /good               👍 the last answer
  /bad                👎 the last answer
  /bad LETTERS        the same, and why: {why}
  /undo               take back what you said about the last answer
  /regenerate         get another answer
  /better earlier     after /regenerate: the answer before was better
  /better this        after /regenerate: this answer is better
  /correct TEXT       say what the answer should have been
  /why                show what made the last answer
  /status             show what is live and what was learned
  /privacy on|off     allow or forbid kibitz to learn from you
  /forget-me          erase what you wrote and reacted to, and every version that learned from it
  /quit"""
LETTERS = {"l": Reason.TOO_LONG, "w": Reason.WRONG, "o": Reason.OFF_TOPIC, "t": Reason.TONE, "u": Reason.UNSAFE}
WHY = ", ".join(f"{letter} {reason}" for letter, reason in LETTERS.items())
CHOICES = {"earlier": False, "this": True}  # of /better -> whether the new answer is better
WHICH = "which is better? /better earlier or /better this"


class Terminal:
    """A chat on standard input and output."""

    def __init__(self, dialogue: DialogueManager, desk: Desk):
        self.dialogue = dialogue
        self.desk = desk
        self.user = getpass.getuser()
        self._reply_options = ReplyOptions(on_text=self._print)
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()

    async def run(self) -> None:
        """Talk until the end of input or /quit."""
        place = await self.dialogue.open(Conversation(PLATFORM, channel=self.user))
        turn = await self.dialogue.store.database.call(self.dialogue.store.find_last_turn, place.id)
        print("Talk to kibitz. /help lists the commands." if self.is_interactive else "", end="\n" * self.is_interactive)
        async with contextlib.aclosing(_prompt_for_lines() if self.is_interactive else read_lines(STANDARD_INPUT)) as lines:
            async for line in lines:
                text = line.strip()
                if text == "/quit":
                    break
                if text and not self.is_interactive:
                    print(f"you: {text}", flush=True)  # a terminal shows it already
                if text:
                    with working_on(request=new_id()):
                        turn = await self._handle(text, place, turn)

    async def _handle(self, text: str, place: Conversation, turn: Turn | None) -> Turn | None:
        command, _, rest = text.partition(" ")
        try:
            if not command.startswith("/"):
                return await self._stream(
                    lambda: self.dialogue.respond(Message(place.id, self.user, text), self._reply_options)
                )
            if command == "/help":
                print(HELP.format(why=WHY))
            elif command == "/status":
                print(await self.desk.describe_status())
            elif command == "/privacy":
                choice = rest.strip().lower() or CONSENT_CHOICES[0]
                is_known = choice in CONSENT_CHOICES
                print(
                    await self.desk.manage_consent(PLATFORM, self.user, choice)
                    if is_known
                    else ask_for_choice(CONSENT_CHOICES)
                )
            elif command == "/forget-me":
                print(await self.desk.forget_person(PLATFORM, self.user))
                return None
            elif turn is None:
                print("there is no answer yet")
            elif command == "/regenerate":
                before = turn.id
                turn = await self._stream(lambda: self.dialogue.regenerate(before, self.user, self._reply_options))
                print(WHICH, flush=True)
            elif command == "/why":
                print(await self.desk.explain_turn(turn.id))
            else:
                print(await self._react(command, rest.strip(), turn))
        except (ServingError, TemplateError) as error:
            print(f"sorry, I cannot answer now: {error}", flush=True)
        except KibitzError as error:  # the answer was forgotten elsewhere, or nothing can be stored now
            print(f"sorry, that did not work: {error}", flush=True)
        return turn

    async def _react(self, command: str, text: str, turn: Turn) -> str:
        if command == "/better":
            return await self._pick(text.lower(), turn)
        if command == "/correct":
            if not text:
                return "say what the answer should have been: /correct TEXT"
            given = [Feedback(turn.id, self.user, FeedbackKind.CORRECTION, SIGNAL, text=text)]
        elif command == "/good":
            given = [Feedback(turn.id, self.user, FeedbackKind.APPROVAL, SIGNAL)]
        elif command == "/bad":
            return await self._dislike(text, turn)
        elif command == "/undo":
            kinds = (FeedbackKind.APPROVAL, FeedbackKind.DISAPPROVAL, FeedbackKind.CORRECTION)
            given = [Feedback(turn.id, self.user, kind, SIGNAL, retracts=True) for kind in kinds]
            await self.dialogue.retract_pick(Pick(turn.id, self.user, prefers_new=False))
            await self._set_reasons(set(), turn)
        else:
            return f"there is no command {command}; /help lists them all"
        for one in given:
            await self.dialogue.record_feedback(one)
        return "taken back" if command == "/undo" else f"noted ({turn.policy_version})"

    async def _dislike(self, text: str, turn: Turn) -> str:
        """Record 👎, and why if `text` has letters of LETTERS."""
        await self.dialogue.record_feedback(Feedback(turn.id, self.user, FeedbackKind.DISAPPROVAL, SIGNAL))
        letters = set("".join(text.lower().split()))
        if not letters <= LETTERS.keys():
            return f"noted ({turn.policy_version}), but not why: say it in letters ({WHY})"
        if letters:
            await self._set_reasons({LETTERS[letter] for letter in letters}, turn)
        return f"noted ({turn.policy_version})"

    async def _set_reasons(self, reasons: set[Reason], turn: Turn) -> None:
        standing = find_reasons((await self.dialogue.explain(turn.id)).feedback, self.user)
        for act in make_acts(standing, reasons, turn.id, self.user):
            await self.dialogue.record_feedback(act)

    async def _pick(self, choice: str, turn: Turn) -> str:
        if choice not in CHOICES:
            return ask_for_choice(CHOICES)
        await self.dialogue.record_pick(Pick(turn.id, self.user, CHOICES[choice]))
        return f"noted ({turn.policy_version})"

    async def _stream(self, answer: Callable[[], Awaitable[Turn]]) -> Turn:
        print("kibitz: ", end="", flush=True)
        turn = await answer()
        if not turn.text.strip():
            print(render_answer(turn), end="")
        if turn.finish_reason not in ("stop", ""):
            print(f" […] ({turn.finish_reason})", end="")
        print(flush=True)
        return turn

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)


async def _prompt_for_lines() -> AsyncGenerator[str, None]:
    session: PromptSession[str] = PromptSession()
    with patch_stdout(raw=True):
        while True:
            try:
                yield await session.prompt_async("you: ")
            except (EOFError, KeyboardInterrupt):
                return


async def read_lines(descriptor: int) -> AsyncGenerator[str, None]:
    """Yield the lines of a file, a pipe, a terminal or a device, until its end. Bytes that are not UTF-8 become U+FFFD.

    Raises DataError if it cannot be read.
    """
    unread = b""
    while True:
        *lines, unread = unread.split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
        try:
            more = await asyncio.wrap_future(_start_reading(descriptor))
        except OSError as error:
            raise DataError(f"the input cannot be read ({error.strerror}); give another, or use a terminal") from error
        if not more:
            break
        unread += more
    if unread:
        yield unread.decode(errors="replace")


def _start_reading(descriptor: int) -> Future[bytes]:
    """Read what comes next in a thread that does not keep the process alive, because nothing can end its read.

    It does not use sys.stdin, which has a lock that the interpreter needs to end.
    """
    done: Future[bytes] = Future()
    done.set_running_or_notify_cancel()  # cancelling it has no effect from now on

    def read() -> None:
        try:
            done.set_result(os.read(descriptor, READ_SIZE))
        except OSError as error:
            done.set_exception(error)

    threading.Thread(target=read, daemon=True).start()
    return done
