"""Selecting: gives the policy's one answer, or the one that a selector chooses from several.

A failure of the selector costs its choice and never the answer (law 9).
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bot.errors import ReplyInterrupted, RequestRefused, quote_error, quote_first_line
from bot.serving.policy import STOPPED, OnText, Policy, hand_over
from bot.serving.selection import SamplingPlan, Selector
from bot.types import Reply, Selection, Turn

log = logging.getLogger(__name__)

CHOICE_SECONDS = 10.0  # how long a choice may take
IS_REFUSED = "vLLM refuses several answers in one request"
IS_STOPPED = "it was stopped before one was chosen"


class AnswerSampler:
    """Samples answers, at most `candidates` for a message, and gives one of them. Without a selector it samples one."""

    def __init__(self, policy: Policy, selector: Selector | None, candidates: int):
        self.policy = policy
        self.selector = selector
        self.candidates = candidates
        self._is_refused = False  # vLLM accepts a request for one answer, and not for several

    async def sample(
        self,
        prompt_ids: Sequence[int],
        asker_id: str,
        *,
        rival: Turn | None = None,
        most: int | None = None,
        on_text: OnText | None = None,
        stop: asyncio.Event | None = None,
        **limits: Any,
    ) -> tuple[Reply, Selection | None]:
        """Return the answer, and how it was selected: None if nothing was planned.

        A single answer is passed to `on_text` as it grows, a chosen one as a whole. At most `most` answers are sampled, if
        given; `limits` are those of `Policy.reply`. `rival` is the turn that the answer replaces. Raises as `Policy.reply`.
        """
        plan = self._plan(asker_id, self.candidates if most is None else min(most, self.candidates))
        if plan.count > 1:
            try:
                replies = await self.policy.sample_replies(prompt_ids, plan.count, stop=stop, **limits)
            except ReplyInterrupted as broken:
                await hand_over(broken.text, on_text)
                raise
            except RequestRefused as error:
                reply = await self.policy.reply(prompt_ids, on_text=on_text, stop=stop, **limits)
                self._note_refusal(plan.count, error)  # only now: it may have refused the prompt
                return reply, Selection(why=IS_REFUSED)
            reply, selection = await self._choose(replies, rival, asker_id)
            await hand_over(reply.text, on_text)
            return reply, selection
        reply = await self.policy.reply(prompt_ids, on_text=on_text, stop=stop, **limits)
        is_noted = plan.is_plain or plan.why
        return reply, Selection(is_plain=plan.is_plain, why=plan.why) if is_noted else None

    def notice_feedback(self) -> None:
        """Tell the selector that feedback was committed."""
        if self.selector is not None:
            try:
                self.selector.notice_feedback()
            except Exception as error:  # whatever it raises: the feedback is stored
                _log_failure("feedback is stored, but the selector does not learn from it", error)

    def _plan(self, asker_id: str, most: int) -> SamplingPlan:
        if self.selector is None or most <= 1:
            return SamplingPlan()
        if self._is_refused:
            return SamplingPlan(why=IS_REFUSED)
        try:
            plan = self.selector.plan(asker_id, most)
        except Exception as error:  # whatever it raises: the message gets an answer
            _log_failure("the selector has no plan, so one answer is sampled", error)
            return SamplingPlan(why=f"the selector has no plan ({type(error).__name__})")
        return replace(plan, count=min(plan.count, most))

    async def _choose(self, replies: Sequence[Reply], rival: Turn | None, asker_id: str) -> tuple[Reply, Selection]:
        """Return one of the replies, and how it was chosen. Blank ones are not chosen from."""
        usable = [one for one in replies if one.text.strip()]
        first = (usable or replies)[0]
        if any(one.finish_reason == STOPPED for one in replies):
            return first, Selection(why=IS_STOPPED)
        if len(usable) < 2:
            return first, Selection(why=f"of {len(replies)} answers {len(usable) or 'none'} had text")
        assert self.selector is not None
        try:
            async with asyncio.timeout(CHOICE_SECONDS):
                selection = await self.selector.choose(usable, rival, asker_id)
            if len(selection.candidates) != len(usable):
                raise ValueError(f"{len(selection.candidates)} candidates for {len(usable)} answers")
            return usable[selection.chosen], selection
        except Exception as error:  # whatever it raises: the message gets an answer
            _log_failure("the choice failed, so the first answer is given", error)
            return first, Selection(why=f"the choice failed ({type(error).__name__})")

    def _note_refusal(self, count: int, error: RequestRefused) -> None:
        if not self._is_refused:
            self._is_refused = True
            log.warning(
                "vLLM refuses %d answers in one request, so one is sampled for each message until kibitz restarts; "
                "set serving.candidates to what it accepts: %s",
                *(count, quote_error(error)),
            )


def _log_failure(what: str, error: Exception) -> None:
    log.error("%s: %s", what, quote_first_line(error), exc_info=log.isEnabledFor(logging.DEBUG))
