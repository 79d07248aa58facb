"""Generate text: one answer, or a chat at the terminal; or draw a picture.

    python -m experiments.generate MODEL "What is the capital of France?" [name=value ...]
    python -m experiments.generate MODEL "What is in the picture?" image=cat.png [name=value ...]
    python -m experiments.generate MODEL [name=value ...]
    python -m experiments.generate MODEL "a red house by a lake" out=house.png [name=value ...]

The third is a chat: /reset begins anew, /system TEXT sets the system message, Ctrl-C ends an
answer, /quit or Ctrl-D the chat; it does not remember thoughts. The fourth draws, with a model that
does (Janus). MODEL is a folder, a .gguf file, a run of ours or a hub id.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.generate:Settings")

import dataclasses
import pathlib
from typing import Literal

import rich.console
from rich.markup import escape

import llmprep_jax as lp
from configs.meshes import get_mesh
from experiments.command.chat import chat, say, user
from experiments.command.draw import check_ending, draw
from llmprep_jax import cli
from llmprep_jax.config import UsageError, override, split_arguments
from llmprep_jax.generate.images import check_draws
from llmprep_jax.generate.sampler import Sampling
from llmprep_jax.generate.speculative import check_draft
from llmprep_jax.pretrained import Dtype
from llmprep_jax.sharding import MeshSizes
from llmprep_jax.text.image_text import ImageTextProcessor


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be said on the command line."""

    image: tuple[
        str, ...
    ] = ()  # files that go with the prompt, or with a chat's first: a.png,b.png
    out: str | None = None  # the file that a picture is drawn to, in place of an answer
    guidance: float = 5.0  # of a picture: how closely it follows its prompt; 1 is half the work
    temperature: float | None = None  # 0 takes the most likely; None: 0 for text, 1 for pictures
    top_k: int | None = None  # the so many most likely tokens alone
    top_p: float | None = None  # the most likely tokens that together have this probability
    min_p: float | None = None  # tokens at least this share as likely as the most likely one
    repetition_penalty: float = 1.0  # above 1: tokens that are there already are less likely
    max_new_tokens: int = 256  # of an answer, at most
    seed: int = 0  # of what is drawn
    stop: tuple[str, ...] = ()  # texts that end the answer: a,b
    dtype: Dtype | None = None  # None: as stored; the last five pack linear layers
    mesh: str | MeshSizes | None = None  # a name in configs/meshes.py, or sizes: mesh.tensor=2
    adapter: str | None = None  # a PEFT folder
    ema: bool = False  # of a run that kept one, the running average in place of the weights
    raw: bool = False  # the prompt as it is, without the chat template
    draft: Literal["mtp"] | None = None  # the model's own prediction modules draft

    def __post_init__(self):  # here, so that a slip is told before the model is loaded
        Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        missing = [name for name in self.image if not pathlib.Path(name).is_file()]
        if missing:
            raise ValueError(f"image {missing[0]} is no file; give paths of pictures")
        if self.out is not None:
            check_ending(self.out)
        if self.out is not None and self.image:
            raise ValueError("image is looked at and out is drawn; give one of them")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if abs(self.seed) >= 2**63:
            raise ValueError(f"seed is {self.seed}; it must fit in 64 bits")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which would end every answer")

    def generation(self) -> dict:
        """The part that `lp.generate` takes."""
        others = ("dtype", "mesh", "adapter", "ema", "raw", "image", "out", "guidance")
        return {name: value for name, value in vars(self).items() if name not in others}

    def drawing(self) -> dict:
        """The part that `lp.generate_images` takes."""
        names = ("guidance", "seed", "top_k", "top_p", "min_p")
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            **{name: getattr(self, name) for name in names},
        }


def main(arguments: list[str]) -> cli.Outputs | None:
    positional, overrides = split_arguments(arguments)
    if not 1 <= len(positional) <= 2:
        raise UsageError("give a model, and a prompt unless you want to chat")
    settings = override(Settings(), overrides)
    path, *prompts = positional
    if settings.raw and not prompts:
        raise UsageError("raw=true is for a prompt; a chat goes through the chat template")
    if settings.out is not None and (settings.raw or not prompts):
        raise UsageError("out is for a prompt that goes through the chat template; give one")
    mesh = get_mesh(settings.mesh)
    with rich.console.Console().status(f"loading {escape(path)}"):
        processor = lp.load_processor(path)
        if not settings.raw:
            _ = processor.chat  # refuses a model without a chat template before it is loaded
        model = lp.load_model(path, dtype=settings.dtype, mesh=mesh, ema=settings.ema)
        processor.tokenizer.check_vocab(model.decoder.cfg.vocab_size)
        check_draft(model.decoder, settings.draft)
        if settings.out is not None:
            check_draws(model)
        if settings.image and not isinstance(processor, ImageTextProcessor):
            raise ValueError(f"{path} reads text only; leave image out")
        if settings.adapter is not None:
            model = lp.peft.load(model, settings.adapter)
            if not lp.quant.packed_layers(model):  # which a merge would make dense
                model = lp.peft.merge(model)
    if settings.out is not None:
        return {"picture": draw(model, processor, prompts[0], settings.out, settings.drawing())}
    for prompt in prompts:
        if settings.raw:
            images = dict(images=list(settings.image)) if settings.image else {}
            say(model, processor, prompt, **images, **settings.generation())
        else:
            say(model, processor, [user(prompt, settings.image)], **settings.generation())
    if not prompts:
        chat(model, processor, settings.image, **settings.generation())
    return None


if __name__ == "__main__":
    cli.run(main)
