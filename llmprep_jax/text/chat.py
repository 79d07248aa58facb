"""Chat templates: messages to the text a model was trained on, and which of its tokens are answers.

Templates are Jinja programs that come with the weights, so they run in jinja2's sandbox over plain
data, with what transformers gives them (trim_blocks, lstrip_blocks, loop controls, raise_exception,
strftime_now, tojson). The one thing a reader would get wrong: answers cannot be found by tokenising
a conversation piece by piece, since BPE merges across the cuts. The conversation is rendered and
tokenised once, answers are found as character spans, and the tokenizer's offsets carry the spans
over to tokens.
"""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmprep_jax.text.messages import Conversation, check_messages, join_parts, plain_values
from llmprep_jax.text.vocab import one_line

if TYPE_CHECKING:
    from llmprep_jax.text.tokenizer import Tokenizer

Span = tuple[int, int]
Messages = list[dict[str, Any]]
Render = Callable[..., str]
Ends = tuple[tuple[str, ...], tuple[str, ...]]
_OPEN, _CLOSE = "\U000f5a5a", "\U000fa5a5"  # private use: they mark {% generation %} blocks
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """A compiled chat template.

    `tokens` are the variables such as bos_token that it may use; `source` names its file in errors.
    Raises ValueError when the template does not compile.
    """

    def __init__(
        self, text: str, tokens: Mapping[str, str] | None = None, source: str = "chat template"
    ):
        self.text = text
        self.source = source
        self._tokens = dict(tokens or {})
        self._template = self._compile(text, marked=False)

    def __reduce__(self) -> tuple[type, tuple]:
        """Pickles as its text, for data workers; what is compiled does not pickle."""
        return ChatTemplate, (self.text, self._tokens, self.source)

    def apply(
        self,
        messages: Conversation,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation, [{"role": ..., "content": ...}, ...].

        `add_generation_prompt` ends it with the header of the answer to come; `variables` (tools,
        ...) reach the template. Raises ValueError, on one line, on malformed messages or when the
        template refuses them (a role out of order, say).
        """
        return self._renderer(variables)(self._plain(messages), add_generation_prompt)

    def find_answers(
        self,
        messages: Conversation,
        stop_tokens: Iterable[str] = (),
        special_tokens: Iterable[str] = (),
        **variables: Any,
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and the [start, end) characters of each assistant turn in it.

        A turn runs from where the generation prompt ends, through the token that ends it (the first
        of `stop_tokens` after the answer, else the last of `special_tokens` that the template puts
        there). Where the template itself marks answers by {% generation %}, its marks are taken as
        they are.

        Raises ValueError when a template rewrites the conversation so that an answer cannot be told
        from what surrounds it.
        """
        messages = self._plain(messages)
        render = self._renderer(variables)
        text = render(messages)
        if self._marked is not None:
            return text, self._marked_spans(self._renderer(variables, self._marked)(messages), text)
        ends = (tuple(stop_tokens), tuple(special_tokens))
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [self._find_turn(render, messages, i, text, ends) for i in turns]
        return text, [span for span in spans if span is not None]

    def _compile(self, text: str, marked: bool) -> jinja2.Template:
        try:
            return _environment(marked).from_string(text)
        except (jinja2.TemplateError, RecursionError) as error:
            line = getattr(error, "lineno", "?")
            raise ValueError(
                f"{self.source}: chat template does not compile, line {line}: {one_line(error)};"
                " correct it or put another in chat_template.jinja"
            ) from None

    @functools.cached_property
    def _marked(self) -> jinja2.Template | None:
        """The template with its {% generation %} blocks marked; None when it has no such block."""
        return self._compile(self.text, marked=True) if _GENERATION.search(self.text) else None

    def _plain(self, messages: Conversation) -> list[dict[str, Any]]:
        plain = check_messages(messages)
        if any(isinstance(message["content"], list) for message in plain) and not self._takes_parts:
            plain = [message | {"content": join_parts(message["content"])} for message in plain]
        return plain

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads content as a list of parts; else it gets their joined text."""
        probe = _sentinel()
        parts = [{"type": "text", "text": probe}]
        try:
            text = self._renderer({})([{"role": "user", "content": parts}])
        except ValueError:
            return False
        return probe in text and repr(probe) not in text

    def _renderer(
        self, variables: Mapping[str, Any], template: jinja2.Template | None = None
    ) -> Render:
        """Rendering with one clock for all calls, for templates that write the date."""
        template = template or self._template
        now = datetime.datetime.now()
        fixed = {"tools": None, "documents": None, **self._tokens, "strftime_now": now.strftime}
        fixed |= plain_values("the template's variables", variables)

        def render(messages: Messages, add_generation_prompt: bool = False) -> str:
            try:
                return template.render(
                    messages=messages, add_generation_prompt=add_generation_prompt, **fixed
                )
            except Exception as error:  # a template may raise anything Python can: str + None, say
                raise ValueError(
                    f"{self.source}: the chat template refuses these messages: {one_line(error)};"
                    " check the order of roles and that each message has what the template reads"
                ) from None

        return render

    def _marked_spans(self, marked: str, text: str) -> list[Span]:
        """The spans between marks, in the text without them."""
        spans, at = [], 0
        pieces = marked.replace(_CLOSE, _OPEN).split(_OPEN)
        for i, piece in enumerate(pieces):
            if i % 2 and piece:
                spans.append((at, at + len(piece)))
            at += len(piece)
        if "".join(pieces) != text or len(pieces) != 1 + 2 * marked.count(_OPEN):
            raise ValueError(
                f"{self.source}: the chat template rewrites its generation blocks, so that answers"
                " cannot be located; put the blocks around what is written out"
            )
        return spans

    def _find_turn(
        self, render: Render, messages: Messages, i: int, text: str, ends: Ends
    ) -> Span | None:
        """The span of assistant turn `i`; None when the template does not show it.

        With a probe in place of the answer, what surrounds the probe surrounds the answer in
        `text`. Where the template looks into answers (for </think>, say), so that the surroundings
        differ, the probe is put beside the answer instead.
        """
        probe, content = _sentinel(), messages[i]["content"]
        around = _cut_at(probe, render, messages, i, probe)
        if around is None and _render_with(render, messages, i, probe) == text:
            return None
        beside = content.strip() if isinstance(content, str) else ""
        head, tail = around or (None, None)
        if beside and (tail is None or not text.endswith(tail)):
            _, tail = _cut_at(probe, render, messages, i, content.rstrip() + probe) or (None, None)
        if beside and (head is None or not text.startswith(head)):
            head, _ = _cut_at(probe, render, messages, i, probe + content.lstrip()) or (None, None)
        start = _find_prompt_end(render, messages, i, text)
        if start is None and head is not None and text.startswith(head):
            start = len(head)
        if tail is None or not text.endswith(tail):
            start = None
        if start is None or start + len(tail) > len(text):
            raise ValueError(
                f"{self.source}: the chat template rewrites message {i} so that its answer is not"
                " to be found; mark answers in the template by {% generation %} blocks"
            )
        own = _cut_at(probe, render, messages[: i + 1], i, probe)
        closing = _closing(own[1], *ends) if own else ""
        end = len(text) - len(tail)
        return start, end + (len(closing) if tail.startswith(closing) else 0)


def encode_chat(
    tokenizer: "Tokenizer", messages: Conversation, **variables: Any
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and, for each, whether the model must learn to say it.

    True are the tokens of the assistant's turns: what follows the generation prompt, through the
    token that ends the turn. The ids are those of transformers' apply_chat_template. A token that
    spans the start of an answer (a space that SentencePiece keeps with the next word) belongs to
    the answer.

    Raises ValueError, on one line: no template, malformed messages, a template that refuses them.
    """
    stops = [text for text in map(tokenizer.token_of, tokenizer.stop_ids) if text]
    text, spans = tokenizer.chat.find_answers(messages, stops, tokenizer.special_texts, **variables)
    ids, offsets = tokenizer.encode_with_offsets(text, add_special=False)
    return ids, _in_spans(offsets, spans)


def _in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens overlap a span; both lists are in order."""
    inside, at = [], 0
    for start, end in offsets:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        inside.append(at < len(spans) and max(end, start + 1) > spans[at][0])
    return inside


def _find_prompt_end(render: Render, messages: Messages, i: int, text: str) -> int | None:
    """Where the generation prompt of turn `i` ends in `text`; None when it is not there."""
    try:
        prompt = render(messages[:i], True)
        supported = prompt != render(messages[:i], False)
    except ValueError:  # a conversation may open with the assistant; templates refuse an empty one
        return None
    return len(prompt) if supported and text.startswith(prompt) else None


def _render_with(render: Render, messages: Messages, i: int, content: str) -> str:
    """The text with the content of message `i` replaced."""
    if isinstance(messages[i]["content"], list):
        content = [{"type": "text", "text": content}]
    return render([*messages[:i], messages[i] | {"content": content}, *messages[i + 1 :]])


def _cut_at(
    probe: str, render: Render, messages: Messages, i: int, content: str
) -> tuple[str, str] | None:
    """The text around `probe` when message `i` says `content`; None unless it is there once."""
    try:
        pieces = _render_with(render, messages, i, content).split(probe)
    except ValueError:
        return None
    return (pieces[0], pieces[1]) if len(pieces) == 2 else None


def _closing(tail: str, stop_tokens: Sequence[str], special_tokens: Sequence[str]) -> str:
    """The part that the model must say itself of `tail`, which follows a last answer."""
    stops = [tail.index(token) + len(token) for token in stop_tokens if token in tail]
    if stops:
        return tail[: min(stops)]
    others = [tail.rindex(token) + len(token) for token in special_tokens if token in tail]
    return tail[: max(others)] if others else tail.rstrip()


def _sentinel() -> str:
    """A word that no conversation holds and no template splits, trims or puts in capitals."""
    return f"\ue000{secrets.randbelow(10**18)}\ue001"


class _Generation(Extension):
    """The {% generation %} tag: its body, between marks where the environment asks for them."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_write")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _write(self, caller: jinja2.runtime.Macro) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}" if self.environment.mark_answers else caller()


@functools.cache
def _environment(marked: bool) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.extend(mark_answers=marked)
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _to_json
    return environment


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as it is; jinja2's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
