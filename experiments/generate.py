"""Generate text: one answer, or a chat at the terminal.

    python -m experiments.generate MODEL "What is the capital of France?" [name=value ...]
    python -m experiments.generate MODEL [name=value ...]

The second is a chat: /reset begins anew, /system TEXT sets the system message, /quit or Ctrl-D
ends; it does not remember thoughts. MODEL is a folder, a .gguf file, a run of ours or a hub id.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.generate:Settings")

import dataclasses
import sys
from typing import Literal

import rich.console
import rich.prompt
import rich.style
from flax import nnx
from rich.markup import escape

import llmprep_jax as lp
from llmprep_jax import cli
from llmprep_jax.config import UsageError, override, split_arguments
from llmprep_jax.generate.sampler import Sampling
from llmprep_jax.generate.speculative import check_draft
from llmprep_jax.text.processor import Processor

console = rich.console.Console(highlight=False)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be said on the command line."""

    temperature: float = 0.0  # 0 takes the most likely token
    top_k: int | None = None  # the so many most likely tokens alone
    top_p: float | None = None  # the most likely tokens that together have this probability
    min_p: float | None = None  # tokens at least this share as likely as the most likely one
    repetition_penalty: float = 1.0  # above 1: tokens that are there already are less likely
    max_new_tokens: int = 256  # of an answer, at most
    seed: int = 0  # of what is drawn
    stop: tuple[str, ...] = ()  # texts that end the answer: a,b
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: as stored
    adapter: str | None = None  # a PEFT folder
    raw: bool = False  # the prompt as it is, without the chat template
    draft: Literal["mtp"] | None = None  # the model's own prediction modules draft

    def __post_init__(self):  # here, so that a slip is told before the model is loaded
        Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if abs(self.seed) >= 2**63:
            raise ValueError(f"seed is {self.seed}; it must fit in 64 bits")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which would end every answer")

    def generation(self) -> dict:
        """The part that `lp.generate` takes."""
        return {k: v for k, v in vars(self).items() if k not in ("dtype", "adapter", "raw")}


def main(arguments: list[str]) -> None:
    positional, overrides = split_arguments(arguments)
    if not 1 <= len(positional) <= 2:
        raise UsageError("give a model, and a prompt unless you want to chat")
    settings = override(Settings(), overrides)
    path, *prompts = positional
    if settings.raw and not prompts:
        raise UsageError("raw=true is for a prompt; a chat goes through the chat template")
    with console.status(f"loading {escape(path)}"):
        processor = lp.load_processor(path)
        if not settings.raw:
            _ = processor.chat  # refuses a model without a chat template before it is loaded
        model = lp.load_model(path, dtype=settings.dtype)
        processor.tokenizer.check_vocab(model.cfg.vocab_size)
        check_draft(model, settings.draft)
        if settings.adapter is not None:
            model = lp.peft.merge(lp.peft.load(model, settings.adapter))
    for prompt in prompts:
        say(model, processor, prompt if settings.raw else [user(prompt)], settings)
    if not prompts:
        chat(model, processor, settings)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def say(model: nnx.Module, processor: Processor, prompt: str | list, settings: Settings) -> str:
    """Streams an answer to the terminal, its thoughts dim, and returns it without them."""
    thoughts, answer, accounts = "", "", []
    wanted = settings.generation() | dict(stream=True, reasoning=True, report=accounts.append)
    dim = (
        rich.style.Style(dim=True).render if console.color_system else str
    )  # where the terminal has styles
    for thought, text in lp.generate(model, processor, prompt, **wanted):
        before = "<think>\n" if thought and not thoughts else ""
        after = "\n</think>\n\n" if text and thoughts and not answer else ""
        # by print: rich would expand tabs and draw :smile: as an emoji
        print(dim(before + thought + after) + text, end="", flush=True)
        thoughts, answer = thoughts + thought, answer + text
    print(flush=True)
    if thoughts and not answer:
        print("the thoughts did not end; a larger max_new_tokens gives them room", file=sys.stderr)
    for account in accounts:
        print(account, file=sys.stderr)
    return answer


def chat(model: nnx.Module, processor: Processor, settings: Settings) -> None:
    """Turns of a conversation until /quit or the end of the input."""
    console.print("[dim]/reset begins anew, /system TEXT sets the system message, /quit ends[/]")
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
            turns = answer(model, processor, system, [*turns, user(text)], settings)


def answer(
    model: nnx.Module, processor: Processor, system: list, turns: list, settings: Settings
) -> list:
    """The turns with an answer; without the question when it cannot be read."""
    try:
        said = say(model, processor, system + turns, settings)
    except ValueError as error:  # beyond the context, say: the chat so far is not lost for it
        print(f"error: {error}, or begin anew by /reset")
        return turns[:-1]
    return [*turns, {"role": "assistant", "content": said}]


if __name__ == "__main__":
    cli.run(main)
