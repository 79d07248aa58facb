"""Thoughts and answers: "<think>\\n...\\n</think>\\n\\n..." of a reasoning model, in its two parts.

DeepSeek-R1 (arXiv 2501.12948) and its distills think aloud between two tags; the parts are named as
in DeepSeek's API, `reasoning_content` and `content`. The opening tag may be missing from what the
model says, because newer chat templates of R1 end the prompt with it; the text then begins within
the thoughts, and only the prompt tells.
"""

from collections.abc import Iterator
from typing import NamedTuple

from llmprep_jax.text.stream import overlap

OPEN, CLOSE = "<think>", "</think>"
TAGS = (OPEN, CLOSE)


class Reply(NamedTuple):
    """What a model says, or a piece of it: its thoughts and its answer; either may be empty."""

    reasoning_content: str = ""
    content: str = ""


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends with the opening tag, so that the model goes on thinking."""
    return prompt.rstrip("\n").endswith(OPEN)


def split_thoughts(text: str, opened: bool = False) -> Reply:
    """Thoughts and answer of a finished text; `opened` says that the prompt opened the thoughts.

    An opening tag counts at the start of the text only (white space before it is dropped), and of
    closing tags the first: any others are text. Without an opening tag all is answer, as it stands.
    Thoughts that nothing closes, cut off by max_new_tokens, run to the end and the answer is empty.

    The tags are in neither part, nor are the newlines beside them, however many: those at both ends
    of the thoughts, and those before the answer. Other white space stays (the indent of code, say).
    """
    if text.lstrip().startswith(OPEN):
        opened, text = True, text.lstrip().removeprefix(OPEN)
    if not opened:
        return Reply(content=text)
    thoughts, _, answer = text.partition(CLOSE)
    return Reply(thoughts.strip("\n"), answer.lstrip("\n"))


class ThoughtSplitter:
    """`split_thoughts` of a text that arrives in pieces, cut anywhere.

    `push` returns what is now certain of each part, often nothing; `flush` the rest. For all
    pieces, the parts joined are those of `split_thoughts` of the pieces joined. Held back is only
    what may still become a tag, and newlines that a closing tag may follow.
    """

    def __init__(self, opened: bool = False):
        self._opened = opened
        self._part = "start"  # then "thoughts", then "answer"
        self._held = ""
        self._is_bare = True  # no text of the part yet: newlines at its start are dropped

    def push(self, text: str) -> Reply:
        """Takes a piece of text and returns what it makes certain."""
        self._held += text
        if self._part == "start":
            self._begin()
        thoughts = self._take_thoughts() if self._part == "thoughts" else ""
        return Reply(thoughts, self._take_answer() if self._part == "answer" else "")

    def flush(self) -> Reply:
        """Returns what was held back, at the end of the text."""
        if self._part == "start":
            self._turn_to("thoughts" if self._opened else "answer", is_bare=self._opened)
        rest, self._held = self._held, ""
        if self._part == "answer":
            return Reply(content=rest)
        return Reply(rest.strip("\n") if self._is_bare else rest.rstrip("\n"))

    def _begin(self) -> None:
        """Leaves the start, unless what is held may still become an opening tag."""
        head = self._held.lstrip()
        if head.startswith(OPEN):
            self._held = head.removeprefix(OPEN)
            self._turn_to("thoughts", is_bare=True)
        elif not OPEN.startswith(head):
            self._turn_to("thoughts" if self._opened else "answer", is_bare=self._opened)

    def _turn_to(self, part: str, is_bare: bool) -> None:
        self._part, self._is_bare = part, is_bare

    def _take_thoughts(self) -> str:
        if self._is_bare:
            self._held = self._held.lstrip("\n")
        thoughts, tag, rest = self._held.partition(CLOSE)
        if tag:
            self._held = rest
            self._turn_to("answer", is_bare=True)
            return thoughts.rstrip("\n")
        thoughts = self._held[: len(self._held) - overlap(self._held, [CLOSE])].rstrip("\n")
        self._held = self._held[len(thoughts) :]
        self._is_bare = self._is_bare and not thoughts
        return thoughts

    def _take_answer(self) -> str:
        answer = self._held.lstrip("\n") if self._is_bare else self._held
        self._held, self._is_bare = "", self._is_bare and not answer
        return answer


def parts_of(reply: Reply) -> Iterator[Reply]:
    """A piece in pieces that are of one part each, none of them empty."""
    if reply.reasoning_content:
        yield Reply(reasoning_content=reply.reasoning_content)
    if reply.content:
        yield Reply(content=reply.content)
