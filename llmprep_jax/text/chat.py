"""Chat templates: messages to the text a model was trained on, and which of its tokens are answers.

Templates are Jinja programs that come with the weights, so they run in jinja2's sandbox over plain
data, with what transformers gives them (trim_blocks, lstrip_blocks, loop controls, raise_exception,
strftime_now, tojson). The one thing a reader would get wrong: answers cannot be found by tokenising
a conversation piece by piece, since BPE merges across the cuts. The conversation is rendered and
tokenised once, answers are found as character spans (`answers.py`), and the tokenizer's offsets
carry the spans over to tokens.
"""

import datetime
import difflib
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmprep_jax.text.answers import (
    Ends,
    Messages,
    Render,
    Span,
    find_turn,
    in_spans,
    outside,
    sentinel,
)
from llmprep_jax.text.messages import (
    TEXT,
    Conversation,
    check_messages,
    insert_after,
    is_trained,
    join_parts,
    plain_values,
    without_marks,
)
from llmprep_jax.text.vocab import one_line

if TYPE_CHECKING:
    from llmprep_jax.text.tokenizer import Tokenizer

# where text that spells a special token becomes that token: as in transformers; in what goes
# through a chat template; only where the template itself writes it
# a text and the places of literals to the text as it is written, and where a place of it is then
Edit = Callable[[str, Sequence[int]], tuple[str, Callable[[int], int]]]
SpecialTokens = Literal["everywhere", "chat", "template"]
_OPEN, _CLOSE = "\U000f5a5a", "\U000fa5a5"  # private use: they mark {% generation %} blocks
_GUARD = "\U000f5aa5"  # within what messages spell like a special token
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_GIVEN = {"messages", "add_generation_prompt", "strftime_now"}  # what every template gets


class ChatTemplate:
    """A compiled chat template.

    `tokens` are the variables such as bos_token that it may use; `source` names its file in errors;
    `kinds` are the types of content parts that messages may have ("image", of models that see);
    with `opens_as_text` a conversation gets what the tokenizer adds to a text, unless the template
    writes BOS itself, as processors of models that see have it.
    Raises ValueError when the template does not compile.
    """

    def __init__(
        self,
        text: str,
        tokens: Mapping[str, str] | None = None,
        source: str = "chat template",
        kinds: tuple[str, ...] = TEXT,
        opens_as_text: bool = False,
    ):
        self.text = text
        self.source, self.kinds, self.opens_as_text = source, kinds, opens_as_text
        self._tokens = dict(tokens or {})
        self._template = self._compile(text, marked=False)

    def __reduce__(self) -> tuple[type, tuple]:
        """Pickles as its text, for data workers; what is compiled does not pickle."""
        kind = (self.source, self.kinds, self.opens_as_text)
        return ChatTemplate, (self.text, self._tokens, *kind)

    @functools.cached_property
    def fields(self) -> frozenset[str]:
        """The variables that the template reads beyond the messages: tools, enable_thinking, ..."""
        environment = _environment(marked=False)
        names = jinja2.meta.find_undeclared_variables(environment.parse(self.text))
        return frozenset(names - _GIVEN - self._tokens.keys() - environment.globals.keys())

    def adds_special(self, text: str) -> bool:
        """Whether the tokenizer adds to a conversation's text what it adds to others."""
        bos = self._tokens.get("bos_token")
        return self.opens_as_text and not (bos and text.startswith(bos))

    def apply(
        self,
        messages: Conversation,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        now: datetime.datetime | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, [{"role": ..., "content": ...}, ...].

        `add_generation_prompt` ends it with the header of the answer to come;
        `continue_final_message` ends it with the text of the last message, so that the model goes
        on with it. `now` is the time that strftime_now tells; None: the clock's. `variables`
        (tools, ...) reach the template.

        Raises:
          ValueError: on one line: malformed messages, a variable that the template does not read,
            both ends at once, or the template refuses the messages (a role out of order, say).
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt opens a new message and continue_final_message goes on with"
                " the last; give one of them"
            )
        render, messages = self._renderer(variables, now), self._plain(messages)
        if continue_final_message:
            return self._left_open(render, messages)
        return render(messages, add_generation_prompt)

    def find_answers(
        self,
        messages: Conversation,
        stop_tokens: Iterable[str] = (),
        special_tokens: Iterable[str] = (),
        now: datetime.datetime | None = None,
        **variables: Any,
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and the [start, end) characters of each answer in it.

        An answer is a turn of the assistant, content and tool calls, that is not left out by
        "train": false or "weight": 0. It runs from where the generation prompt ends, through the
        token that ends the turn (the first of `stop_tokens` after the answer, else the last of
        `special_tokens` that the template puts there). Where the template itself marks answers by
        {% generation %}, its marks are taken as they are.

        Raises:
          ValueError: as `apply`, and where an answer is not shown, or cannot be told from what
            surrounds it.
        """
        messages = check_messages(messages, self.kinds)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        learnt = [i for i, message in enumerate(messages) if is_trained(i, message)]
        messages = self._plain(messages)
        render = self._renderer(variables, now)
        text = render(messages)
        ends = Ends(tuple(stop_tokens), tuple(special_tokens))

        def find(numbers: list[int]) -> list[Span]:
            try:
                return [find_turn(render, messages, i, text, ends) for i in numbers]
            except ValueError as error:
                raise ValueError(f"{self.source}: {error}") from None

        if self._marked is None:
            return text, find(learnt)
        marked = self._renderer(variables, now, self._marked)(messages)
        spans = self._marked_spans(marked, text)
        if learnt and not spans:
            raise ValueError(
                f"{self.source}: the {{% generation %}} blocks of the chat template mark nothing in"
                f" these messages, though message {learnt[0]} is the assistant's; put them around"
                " its answers"
            )
        return text, list(outside(spans, find([i for i in turns if i not in learnt])))

    def find_literals(
        self,
        messages: Conversation,
        spellings: re.Pattern[str],
        now: datetime.datetime | None = None,
        **variables: Any,
    ) -> list[int]:
        """Where the text of a conversation spells special tokens that its messages bring along.

        Returns the first character of each in what `apply` gives; those that the template writes
        are not among them. Raises ValueError where the template rewrites such a spelling.
        """
        messages = self._plain(messages)
        guarded = insert_after(spellings, _GUARD, {"messages": messages, **variables})
        if guarded == {"messages": messages, **variables}:
            return []
        text = self._renderer(variables, now)(messages)
        guarded_messages = guarded.pop("messages")
        pieces = self._renderer(guarded, now)(guarded_messages).split(_GUARD)
        if "".join(pieces) != text:
            raise ValueError(
                f"{self.source}: the chat template changes what a message spells like a special"
                " token; take it out of the messages, or let it be that token by"
                " special_tokens='everywhere'"
            )
        places, at = [], 0
        for piece in pieces[:-1]:
            at += len(piece)
            places.append(at - 1)
        return places

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

    def _plain(self, messages: Conversation) -> Messages:
        plain = without_marks(check_messages(messages, self.kinds))
        if any(isinstance(message["content"], list) for message in plain) and not self._takes_parts:
            return [message | {"content": join_parts(message["content"])} for message in plain]
        if any(isinstance(message["content"], str) for message in plain) and not self._takes_text:
            return [message | {"content": _as_parts(message["content"])} for message in plain]
        return plain

    def _left_open(self, render: Render, messages: Messages) -> str:
        """The text of messages through the content of the last, without what ends its turn."""
        content, probe = messages[-1]["content"], sentinel() + " "
        if content is None:
            raise ValueError("the last message has no content to go on with; give it a text")
        if isinstance(content, list):
            open_content = [*content[:-1], content[-1] | {"text": content[-1]["text"] + probe}]
        else:
            open_content = content + probe
        text = render([*messages[:-1], messages[-1] | {"content": open_content}])
        if text.count(probe.strip()) != 1:
            raise ValueError(
                f"{self.source}: the chat template rewrites the last message so that there is no"
                " going on with it; begin the answer in a text, without the template"
            )
        before, _, after = text.partition(probe.strip())
        # a template that trims contents trims this one at its end too
        return before if after.startswith(" ") else before.rstrip()

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads content as a list of parts; else it gets their joined text."""
        probe = sentinel()
        parts = [{"type": "text", "text": probe}]
        try:
            text = self._renderer({})([{"role": "user", "content": parts}])
        except ValueError:
            return False
        return probe in text and repr(probe) not in text

    @functools.cached_property
    def _takes_text(self) -> bool:
        """Whether the template shows content that is a text; else it gets parts, if it reads
        these (DeepSeek-VL's and LLaVA's show nothing of a text)."""
        probe = sentinel()
        try:
            text = self._renderer({})([{"role": "user", "content": probe}])
        except ValueError:
            text = ""
        return probe in text or not self._takes_parts

    def _renderer(
        self,
        variables: Mapping[str, Any],
        now: datetime.datetime | None = None,
        template: jinja2.Template | None = None,
    ) -> Render:
        """Rendering with one clock for all calls, for templates that write the date."""
        plain = plain_values("the template's variables", variables)
        unread = [name for name in plain if plain[name] is not None and name not in self.fields]
        if unread:
            near = difflib.get_close_matches(unread[0], self.fields, n=1)
            known = ", ".join(sorted(self.fields)) or "the messages alone"
            hint = f"did you mean {near[0]}?" if near else f"it reads {known}"
            raise ValueError(f"{self.source}: the chat template does not read {unread[0]}; {hint}")
        template = template or self._template
        clock = (now or datetime.datetime.now()).strftime
        fixed = {"tools": None, "documents": None, **self._tokens, "strftime_now": clock}
        fixed |= plain

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


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def encode_chat(
    tokenizer: "Tokenizer",
    messages: Conversation,
    *,
    special_tokens: SpecialTokens = "everywhere",
    now: datetime.datetime | None = None,
    edit: Edit | None = None,
    **variables: Any,
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and, for each, whether the model must learn to say it.

    True are the tokens of the assistant's turns: what follows the generation prompt, through the
    token that ends the turn. The ids are those of transformers' apply_chat_template, but for
    `special_tokens="template"`: what messages spell like a special token is plain text then. A
    token that spans the start of an answer (a space that SentencePiece keeps with the next word)
    belongs to the answer. `edit` rewrites the text, as what is written around images, before it is
    tokenised.

    Raises:
      ValueError: on one line: no template, or what `ChatTemplate.find_answers` raises.
    """
    chat = tokenizer.chat
    stops = [text for text in map(tokenizer.token_of, tokenizer.stop_ids) if text]
    text, spans = chat.find_answers(messages, stops, tokenizer.special_texts, now, **variables)
    literals = []
    if special_tokens == "template" and tokenizer.spellings is not None:
        literals = chat.find_literals(messages, tokenizer.spellings, now, **variables)
    if edit is not None:
        text, moved = edit(text, literals)
        literals = list(map(moved, literals))
        spans = [(moved(start), moved(end)) for start, end in spans]
    adds = chat.adds_special(text)
    ids, offsets = tokenizer.encode_with_offsets(text, add_special=adds, literals=literals)
    return ids, in_spans(offsets, spans)


def encode_completion(
    tokenizer: "Tokenizer", text: str, start: int, parse_special: bool = True
) -> tuple[list[int], list[bool]]:
    """Ids of a text and, for each, whether it is of the completion, which begins at `start`."""
    ids, offsets = tokenizer.encode_with_offsets(text, parse_special=parse_special)
    return ids, in_spans(offsets, [(start, len(text) + 1)])


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
