"""Channel history: convert the posts of a channel to questions and answers with reactions.

An exported channel has all its posts. Only exchanges with a bot are kept: its answers, and the posts that they reply to. It
does not depend on a file format or a platform.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from bot.types import Role
from learning.importers.message_trees import Node, add_tree
from learning.importers.recorded_files import RecordedRow
from learning.importers.recording import Recording

PAUSE = 3600.0  # seconds of silence that end an exchange


@dataclass(frozen=True)
class Reaction:
    """An emoji on a post, and the people who reacted with it."""

    symbol: str
    people: tuple[str, ...]
    unnamed: int = 0  # number of people whom the file does not name


@dataclass(frozen=True)
class Post:
    """One message of a channel.

    `at` is in seconds. `reply_to` is the post that it explicitly replies to. `mentions` are the people and bots that it
    mentions. `thread` is its thread. In threads and direct messages (`is_dialogue`) a post replies to the one before.
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
    """The reply structure of some posts.

    `parents` maps a post to the one that it replies to. `answers` has the complete answers of bots. `part_of` maps a further
    part of an answer to its first post.
    """

    parents: dict[str, str | None] = field(default_factory=dict)
    answers: dict[str, Post] = field(default_factory=dict)
    part_of: dict[str, str] = field(default_factory=dict)

    def find_answer(self, post: Post | None) -> Post | None:
        """Return the complete answer that a post belongs to, or None."""
        return None if post is None else self.answers.get(self.part_of.get(post.id, post.id))


def read_channel(key: str, found: Iterable[Post], row: RecordedRow, recording: Recording) -> None:
    """Read one channel; each exchange with a bot is a conversation of its own."""
    posts: dict[str, Post] = {}
    for post in sorted(found, key=lambda one: (one.at, one.id)):
        if not post.text.strip():
            recording.leave_out("message without text", row.place)
        elif post.id in posts:
            recording.leave_out("message with a duplicate id", row.place, post.id)
        else:
            posts[post.id] = post
    order = {name: at for at, name in enumerate(posts)}
    links = link_replies(posts)
    exchanges: dict[str, set[str]] = defaultdict(set)  # by their first post
    for answer in links.answers:
        chain = [answer]
        while (parent := links.parents[chain[-1]]) is not None:
            chain.append(parent)
        exchanges[chain[-1]].update(chain)
    used = set().union(*exchanges.values()) | links.part_of.keys()
    recording.leave_out("message outside of exchanges with a bot", row.place, count=len(posts.keys() - used))
    for root, names in exchanges.items():
        with recording.leaving_out(row.place, "exchange"):
            draft = recording.start_draft(f"{key} {root}")
            said = [links.answers.get(name, posts[name]) for name in sorted(names, key=order.__getitem__)]
            turns = add_tree(draft, [_make_node(one, links) for one in said], recording, row.place)
            for post in said:
                for reaction in post.reactions:
                    kind = recording.reactions.classify(reaction.symbol)
                    if post.id not in turns or kind is None:
                        reason = (
                            "reaction that is not an opinion"
                            if kind is None
                            else "reaction to a message that is not an answer"
                        )
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
    """Find the post that each post replies to. `posts` are ordered from the oldest.

    A person's post replies to the post that it names, or in a dialogue to the one before. A bot's post replies to the post
    that it names; otherwise in a dialogue to the last person's post, elsewhere to the last mention of the bot. A bot's post
    right after its own answer is a further part of that answer.
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
        is_earlier = post.reply_to in links.parents or post.reply_to in links.part_of  # or two could form a cycle
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
        if (again := links.find_answer(named)) is not None:  # a second answer to the same question
            question = posts[links.parents[again.id] or ""]
        elif named is None:
            question = spoke.get(post.thread) if post.is_dialogue else asked.pop((post.thread, post.author), None)
        links.parents[post.id] = None if question is None or question.is_bot else question.id
        if links.parents[post.id] is not None:
            links.answers[post.id] = post
    return links
