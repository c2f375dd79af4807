"""Channel history: what people and bots posted in a channel, made into questions and answers with their reactions.

An exported channel holds everything that anybody said there. Kept is what a bot answered, with what was said before in that
exchange. It knows no file format and no platform.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from bot.types import Role
from learning.importers.message_trees import Node, add_tree
from learning.importers.recorded_files import RecordedRow
from learning.importers.recording import Recording

PAUSE = 3600.0  # seconds of silence after which people talk of something else


@dataclass(frozen=True)
class Reaction:
    """An emoji on a post, and the people who chose it."""

    symbol: str
    people: tuple[str, ...]
    unnamed: int = 0  # people whom the file counts and does not name


@dataclass(frozen=True)
class Post:
    """One message of a channel.

    `at`: seconds. `reply_to`: the post that it says it replies to. `asks`: whom it mentions. `thread` is the thread that it
    is in; there, and in direct messages, posts answer the one before (`is_dialogue`).
    """

    id: str
    author: str
    text: str
    at: float
    is_bot: bool = False
    reply_to: str = ""
    mentions: frozenset[str] = frozenset()
    thread: str = ""
    is_dialogue: bool = False
    reactions: tuple[Reaction, ...] = ()


@dataclass
class ReplyLinks:
    """Which post replies to which.

    `answers` are what bots answered, whole; `part_of` names the answer that a further post is a part of.
    """

    parents: dict[str, str | None] = field(default_factory=dict)
    answers: dict[str, Post] = field(default_factory=dict)
    part_of: dict[str, str] = field(default_factory=dict)

    def find_answer(self, post: Post | None) -> Post | None:
        """Return the answer that a post is, or is a part of."""
        return None if post is None else self.answers.get(self.part_of.get(post.id, post.id))


def read_channel(key: str, found: Iterable[Post], row: RecordedRow, recording: Recording) -> None:
    """Read one channel; each exchange with a bot is a conversation of its own."""
    posts: dict[str, Post] = {}
    for post in sorted(found, key=lambda one: (one.at, one.id)):
        if not post.text.strip():
            recording.leave_out("message without text", row.place)
        elif post.id in posts:
            recording.leave_out("message whose id came before", row.place, post.id)
        else:
            posts[post.id] = post
    order = {name: at for at, name in enumerate(posts)}
    links = link_replies(posts)
    exchanges: dict[str, set[str]] = defaultdict(set)  # by what began them
    for answer in links.answers:
        chain = [answer]
        while (parent := links.parents[chain[-1]]) is not None:
            chain.append(parent)
        exchanges[chain[-1]].update(chain)
    used = set().union(*exchanges.values()) | links.part_of.keys()
    recording.leave_out("message that is no part of an exchange with a bot", row.place, count=len(posts.keys() - used))
    for root, names in exchanges.items():
        with recording.leaving_out(row.place, "exchange"):
            draft = recording.start_draft(f"{key} {root}")
            said = [links.answers.get(name, posts[name]) for name in sorted(names, key=order.__getitem__)]
            turns = add_tree(draft, [_make_node(one, links) for one in said], recording, row.place)
            for post in said:
                for reaction in post.reactions:
                    kind = recording.reactions.classify(reaction.symbol)
                    if post.id not in turns or kind is None:
                        reason = "reaction that is no opinion" if kind is None else "reaction to a message that is no answer"
                        recording.leave_out(reason, row.place, reaction.symbol, len(reaction.people) + reaction.unnamed)
                        continue
                    for person in reaction.people:
                        draft.add_feedback(turns[post.id], person, kind, reaction.symbol)
                    draft.add_unnamed_feedback(turns[post.id], reaction.unnamed, kind, reaction.symbol)
            recording.add(draft, row)


def _make_node(post: Post, links: ReplyLinks) -> Node:
    role = Role.ASSISTANT if post.is_bot else Role.USER
    return Node(post.id, links.parents[post.id], role, post.text, post.author)


def link_replies(posts: dict[str, Post]) -> ReplyLinks:
    """Find out what each of some posts, oldest first, replies to.

    A person's post replies to what it says; in a dialogue to the one before. A bot answers what it says, else in a dialogue
    what a person said last, elsewhere who mentioned it last. What it posts right after its answer is a further part of it.
    """
    links = ReplyLinks()
    before: dict[str, Post] = {}  # by thread
    spoke: dict[str, Post] = {}  # by thread: the last person
    asked: dict[tuple[str, str], Post] = {}  # by thread and bot: who mentioned it last
    for post in posts.values():
        last = before.get(post.thread)
        before[post.thread] = post
        if last is not None and post.at - last.at > PAUSE and not post.thread:
            last = None
            spoke.pop(post.thread, None)
        is_earlier = post.reply_to in links.parents or post.reply_to in links.part_of  # or two could reply to each other
        named = posts[post.reply_to] if is_earlier else None
        if not post.is_bot:
            follows = named or (last if post.is_dialogue else None)
            links.parents[post.id] = links.part_of.get(follows.id, follows.id) if follows else None
            spoke[post.thread] = post
            asked.update({(post.thread, bot): post for bot in post.mentions})
            continue
        whole = links.find_answer(last)
        if named is None and last is not None and whole is not None and last.author == post.author:
            links.part_of[post.id] = whole.id
            text, reactions = f"{whole.text}\n{post.text}", whole.reactions + post.reactions
            links.answers[whole.id] = replace(whole, text=text, reactions=reactions)
            continue
        question = named
        if (again := links.find_answer(named)) is not None:  # the same question is answered anew
            question = posts[links.parents[again.id] or ""]
        elif named is None:
            question = spoke.get(post.thread) if post.is_dialogue else asked.pop((post.thread, post.author), None)
        links.parents[post.id] = None if question is None or question.is_bot else question.id
        if links.parents[post.id] is not None:
            links.answers[post.id] = post
    return links
