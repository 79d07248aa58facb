"""Where the assistant's turns are in a rendered conversation.

A chat template is a program, so a turn is found by what the program does to a probe: a word put in
the place of the answer, beside it, or in the place of a tool's name. What surrounds the probe
surrounds the turn. A template may show the content, the tool calls, both or neither, and white
space around one that it does not put around the other, so the header is found by a plain answer and
the end by what the message holds.
"""

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Span = tuple[int, int]
Messages = list[dict[str, Any]]
Render = Callable[..., str]


@dataclasses.dataclass(frozen=True)
class Ends:
    """Texts of tokens that end a turn: those that stop generation, and all special ones."""

    stops: tuple[str, ...]
    specials: tuple[str, ...]

    def closing(self, tail: str) -> str:
        """The part that the model must say itself of `tail`, which follows a last answer."""
        stops = [tail.index(token) + len(token) for token in self.stops if token in tail]
        if stops:
            return tail[: min(stops)]
        others = [tail.rindex(token) + len(token) for token in self.specials if token in tail]
        return tail[: max(others)] if others else tail.rstrip()


def find_turn(render: Render, messages: Messages, i: int, text: str, ends: Ends) -> Span:
    """The [start, end) characters in `text` of assistant turn `i`: what the model must say.

    Raises:
      ValueError: the template does not show the turn, or so that it cannot be told from what
        surrounds it; the message has its number.
    """
    turn = _Turn(render, messages, i, text, sentinel())
    start = turn.start()
    end = None
    if start is not None:
        end = turn.end_of_calls(ends) if turn.calls else turn.end_of_answer(ends, start)
    if start is None or end is None or start > end:
        shown = "tool calls" if turn.calls else "answer"
        raise ValueError(
            f"the {shown} of message {i} cannot be found in what the chat template writes; leave "
            'the message out of the loss by "train": false, mark answers in the template by '
            "{% generation %} blocks, or give the fields that it needs (tools, say)"
        )
    return start, end


@dataclasses.dataclass(frozen=True)
class _Turn:
    """Assistant message `i` of a conversation that is rendered as `text`."""

    render: Render
    messages: Messages
    i: int
    text: str
    probe: str

    @property
    def message(self) -> dict[str, Any]:
        return self.messages[self.i]

    @property
    def calls(self) -> bool:
        return bool(self.message.get("tool_calls"))

    @property
    def content(self) -> str:
        """The content where it is a string that is not blank; else ""."""
        content = self.message.get("content")
        return content if isinstance(content, str) and content.strip() else ""

    def start(self) -> int | None:
        """Where the generation prompt of the turn ends in the text, or else its header.

        Where the template looks into answers (for </think>, say), so that the surroundings of a
        probe alone differ, the probe is put before the answer. Some templates put white space
        after the header of a plain answer and none before calls or an empty one.
        """
        start = self._prompt_end()
        if start is not None:
            return start
        plain = self._saying(self.probe)
        plain.pop("tool_calls", None)
        beside = [self._saying(self.probe + self.content.lstrip())] if self.content else []
        for message in (plain, *beside, *([self._saying(self.probe)] if self.calls else [])):
            for alone in (False, True)[: 1 + self.calls]:
                head, _ = self._cut(message, alone) or (None, None)
                if head is None:
                    continue
                common = _common_prefix(head, self.text)
                is_lenient = self.calls or not self.content
                if common == len(head) or (is_lenient and not head[common:].strip()):
                    return common
        return None

    def end_of_answer(self, ends: Ends, start: int) -> int | None:
        """Past the token that ends the turn."""
        contents = [self.probe, *([self.content.rstrip() + self.probe] if self.content else [])]
        for content in contents:
            _, tail = self._cut(self._saying(content)) or (None, None)
            if tail is None or not self.text.endswith(tail):
                continue
            end = len(self.text) - len(tail)
            own = self._cut(self._saying(self.probe), alone=True)
            closing = ends.closing(own[1]) if own else ""
            if start <= end:
                return end + (len(closing) if tail.startswith(closing) else 0)
        return None

    def end_of_calls(self, ends: Ends) -> int | None:
        """Past the token that ends the turn, whichever of calls and content comes last.

        The probe stands for a tool's name, without arguments, which may hold anything.
        """
        first = self.message["tool_calls"][0]
        end = self._end_after(self.message | {"tool_calls": [_bare_call(first, self.probe)]}, ends)
        if end is None or not self.content:
            return end
        bare = self._saying(self.probe) | {"tool_calls": [_bare_call(first, "f")]}
        return max(end, self._end_after(bare, ends) or end)

    def _end_after(self, message: dict[str, Any], ends: Ends) -> int | None:
        """Where the turn ends in the text, when in its place `message` ends with its closing."""
        around, own = self._cut(message), self._cut(message, alone=True)
        if around is None or own is None:
            return None
        closing = ends.closing(own[1])
        rest = around[1].removeprefix(closing)
        is_there = around[1].startswith(closing) and self.text.endswith(rest)
        return len(self.text) - len(rest) if is_there else None

    def _prompt_end(self) -> int | None:
        """Where the generation prompt of the turn ends in the text; None when it is not there."""
        before = self.messages[: self.i]
        try:
            prompt = self.render(before, True)
            is_supported = prompt != self.render(before, False)
        except ValueError:  # a conversation may open with the assistant; templates refuse none
            return None
        return len(prompt) if is_supported and self.text.startswith(prompt) else None

    def _saying(self, content: str) -> dict[str, Any]:
        """The message with other content."""
        if isinstance(self.message.get("content"), list):
            return self.message | {"content": [{"type": "text", "text": content}]}
        return self.message | {"content": content}

    def _cut(self, message: dict[str, Any], alone: bool = False) -> tuple[str, str] | None:
        """The text around the probe with `message` in place; None unless the probe is there once.

        `alone`: nothing follows the message.
        """
        after = [] if alone else self.messages[self.i + 1 :]
        try:
            pieces = self.render([*self.messages[: self.i], message, *after]).split(self.probe)
        except ValueError:
            return None
        return (pieces[0], pieces[1]) if len(pieces) == 2 else None


def _bare_call(call: Any, name: str) -> Any:
    """A tool call with another name and no arguments, of the same form."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _bare_call(call["function"], name)}
    if "arguments" in call:
        call = call | {"arguments": "{}" if isinstance(call["arguments"], str) else {}}
    return call | {"name": name}


def _common_prefix(left: str, right: str) -> int:
    """The length of what two texts begin with alike."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low


def sentinel() -> str:
    """A word that no conversation holds and no template splits, trims or puts in capitals."""
    return f"\ue000{secrets.randbelow(10**18)}\ue001"


def in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens overlap a span; both lists are in order."""
    inside, at = [], 0
    for start, end in offsets:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        inside.append(at < len(spans) and max(end, start + 1) > spans[at][0])
    return inside


def outside(spans: Sequence[Span], silent: Sequence[Span]) -> Iterator[Span]:
    """The spans that overlap none of `silent`."""
    for start, end in spans:
        if not any(start < last and first < end for first, last in silent):
            yield start, end
