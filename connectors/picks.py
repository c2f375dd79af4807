"""The buttons under a second answer that ask which of the two is better, the same on every chat platform."""

from bot.store.picks import PICK, find_pick, prefers_new
from bot.types import Feedback, FeedbackKind, Pick
from connectors.answers import NOT_ADMITTED, NOT_RECORDED, NOTED, TAKEN_BACK, Answers

EARLIER, NEWER = "earlier", "newer"  # the acts of the buttons
PICKS = {EARLIER: "The earlier one is better", NEWER: "This one is better"}  # act -> label


async def press_pick(answers: Answers, pick: Pick, is_admitted: bool) -> str:
    """Record a pick, or take it back if it stands already. Return what to tell the person.

    Whoever is not admitted may still take their pick back.
    """
    dialogue = answers.dialogue
    standing = await dialogue.store.database.call(find_pick, dialogue.store, pick.turn_id, pick.user_id)
    again = bool(standing) and prefers_new(standing) == pick.prefers_new
    if not (is_admitted or again):
        return NOT_ADMITTED
    given = Feedback(pick.turn_id, pick.user_id, FeedbackKind.APPROVAL, PICK, retracts=again, event_id=pick.event_id)
    store = dialogue.retract_pick if again else dialogue.record_pick
    if not await answers.record_opinion(given, lambda: store(pick)):
        return NOT_RECORDED
    return TAKEN_BACK if again else NOTED
