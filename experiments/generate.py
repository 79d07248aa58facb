"""Generate text: one answer, or a chat at the terminal.

python -m experiments.generate MODEL "What is the capital of France?" [name=value ...] python -m
experiments.generate MODEL                      a chat; /reset, /system TEXT, /quit

MODEL is a Hugging Face folder, a .gguf file, a run folder of ours or a hub id. Settings:
temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens, seed, stop, dtype, adapter (a
PEFT folder), raw=true (the prompt as it is, without the chat template).
"""

import dataclasses
from typing import Literal

import rich.console
import rich.prompt
from flax import nnx

import llmprep_jax as lp
from llmprep_jax import cli
from llmprep_jax.config import UsageError, override, split_arguments
from llmprep_jax.text.processor import Processor

console = rich.console.Console(highlight=False)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be said on the command line; temperature 0 takes the most likely token."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    stop: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    adapter: str | None = None
    raw: bool = False

    def generation(self) -> dict:
        """The part that `lp.generate` takes."""
        apart = ("dtype", "adapter", "raw")
        return {name: value for name, value in vars(self).items() if name not in apart}


def main(arguments: list[str]) -> None:
    positional, overrides = split_arguments(arguments)
    if not 1 <= len(positional) <= 2:
        raise UsageError("give a model, and a prompt unless you want to chat")
    settings = override(Settings(), overrides)
    with console.status(f"loading {positional[0]}"):
        processor = lp.load_processor(positional[0])
        model = lp.load_model(positional[0], dtype=settings.dtype)
        processor.tokenizer.check_vocab(model.cfg.vocab_size)
        if settings.adapter is not None:
            model = lp.peft.merge(lp.peft.load(model, settings.adapter))
    if len(positional) == 2:
        prompt = positional[1]
        say(model, processor, prompt if settings.raw else [user(prompt)], settings)
    else:
        chat(model, processor, settings)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def say(model: nnx.Module, processor: Processor, prompt: str | list, settings: Settings) -> str:
    """Streams an answer to the terminal and returns it."""
    pieces = []
    for piece in lp.generate(model, processor, prompt, stream=True, **settings.generation()):
        console.print(piece, end="", markup=False, soft_wrap=True)
        pieces.append(piece)
    console.print()
    return "".join(pieces)


def chat(model: nnx.Module, processor: Processor, settings: Settings) -> None:
    """Turns of a conversation until /quit or the end of the input."""
    console.print("[dim]/reset begins anew, /system TEXT sets the system message, /quit ends[/]")
    system, turns = [], []
    while True:
        try:
            text = rich.prompt.Prompt.ask("[bold]you[/]", console=console).strip()
        except EOFError:
            return
        command, _, rest = text.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            turns = []
        elif command == "/system":
            system, turns = [{"role": "system", "content": rest}] if rest else [], []
        elif text.startswith("/"):
            console.print(f"unknown command {command}; there are /reset, /system TEXT, /quit")
        elif text:
            turns.append(user(text))
            answer = say(model, processor, system + turns, settings)
            turns.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    cli.run(main)
