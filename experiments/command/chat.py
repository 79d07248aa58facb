"""Answers on a terminal as they are said, and a chat of them."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import rich.console
import rich.prompt
import rich.style
from flax import nnx

import llmprep_jax as lp
from llmprep_jax import interrupts
from llmprep_jax.text.processor import Processor

console = rich.console.Console(highlight=False)


def user(text: str, images: Sequence[str] = ()) -> dict[str, Any]:
    """A turn of the user's, with files of images before the text."""
    if not images:
        return {"role": "user", "content": text}
    parts = [{"type": "image", "image": name} for name in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def say(
    model: nnx.Module,
    processor: Processor,
    prompt: str | list,
    is_over: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> str:
    """Streams an answer to the terminal, its thoughts dim, and returns it without them.

    Args:
      is_over: asked between pieces whether the answer is to end there.
    """
    thoughts, answer, accounts = "", "", []
    settings |= dict(stream=True, reasoning=True, report=accounts.append)
    # where the terminal has styles
    dim = rich.style.Style(dim=True).render if console.color_system else str
    for thought, text in lp.generate(model, processor, prompt, **settings):
        before = "<think>\n" if thought and not thoughts else ""
        after = "\n</think>\n\n" if text and thoughts and not answer else ""
        # by print: rich would expand tabs and draw :smile: as an emoji
        print(dim(before + thought + after) + text, end="", flush=True)
        thoughts, answer = thoughts + thought, answer + text
        if is_over():
            break
    print(flush=True)
    if thoughts and not answer and not is_over():
        print("the thoughts did not end; a larger max_new_tokens gives them room", file=sys.stderr)
    for account in accounts:
        print(account, file=sys.stderr)
    return answer


def chat(
    model: nnx.Module, processor: Processor, images: Sequence[str] = (), **settings: Any
) -> None:
    """Turns of a conversation until /quit or the end of the input; Ctrl-C ends an answer.

    Args:
      images: files that go with the first turn, and with the first after /reset.
    """
    console.print("[dim]/reset begins anew, /system TEXT sets the system message, /quit ends[/]")
    if settings.get("draft") is None:
        settings["prompt_cache"] = lp.PromptCache()
    system, turns = [], []
    while True:
        try:
            text = rich.prompt.Prompt.ask("[bold]you[/]", console=console).strip()
        except EOFError:
            console.print()  # the shell's prompt goes on a line of its own
            return
        command, _, rest = text.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            turns = []
        elif command == "/system":
            system, turns = [{"role": "system", "content": rest}] if rest else [], []
        elif text.startswith("/"):
            print(f"unknown command {command}; there are /reset, /system TEXT, /quit")
        elif text:
            turn = user(text, () if turns else images)
            turns = _answer(model, processor, system, [*turns, turn], settings)


def _answer(
    model: nnx.Module, processor: Processor, system: list, turns: list, settings: dict
) -> list:
    """The turns with an answer, or without the question where there is none."""
    with interrupts.held() as is_over:
        try:
            reply = say(model, processor, system + turns, is_over, **settings)
        except ValueError as error:  # beyond the context, say: the chat so far is not lost for it
            print(f"error: {error}, or begin anew by /reset")
            return turns[:-1]
        if is_over() and not reply:
            return turns[:-1]
    return [*turns, {"role": "assistant", "content": reply}]
