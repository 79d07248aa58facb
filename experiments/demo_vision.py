"""Two small models that see, trained from nothing, and pictures of what they find and read.

    python -m experiments.demo_vision [out=runs/demo-vision] [steps=1.0]

First a CLIP on real photographs: captions find crops, and crops captions, before and after. Then a
model of DeepSeek-VL2's shape, which learns to read generated pages and, by LoRA, to answer
questions about pages that it has not seen. Both are the first seeds of `contrastive_study` and
`document_study`; `steps` is the share of their steps. Released weights are loaded in the same way
from a folder or a hub, and the last lines say how.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.demo_vision:Settings")

import dataclasses
import pathlib
from collections.abc import Sequence

import rich

from experiments import contrastive_study, document_study
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override
from llmprep_jax.data.synthetic_documents.fonts import find_families
from llmprep_jax.data.synthetic_documents.lexicon import Language

RELEASED = """
These two models were made here, and are small. Released weights come from a folder, or from
huggingface.co where this machine reaches it; with DeepSeek-VL2 Tiny's on the same pages:

    python -m experiments.evaluate deepseek-ai/deepseek-vl2-tiny {questions} task=docvqa
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the demo.

    Attributes:
      steps: of those of the studies, the share that is trained; below 1 nothing need be learnt.
      pages: that are generated. questions: that are asked.
    """

    steps: float = 1.0
    pages: int = 4000
    questions: int = 128
    out: pathlib.Path = pathlib.Path("runs/demo-vision")  # a folder

    def of(self, steps: int) -> int:
        return max(2, round(steps * self.steps))


def main(arguments: list[str]) -> cli.Outputs:
    cfg = override(Settings(), only_overrides(arguments))
    must_learn = cfg.steps >= 1
    rich.print("[bold]1. Find[/]: a small CLIP on real photographs and their captions")
    clip = contrastive_study.Settings(kinds=("clip",), seeds=1, out=cfg.out / "clip")
    clip = dataclasses.replace(clip, steps=cfg.of(clip.steps), least=clip.least * must_learn)
    found = contrastive_study.study_all(clip)
    rich.print("[bold]2. Read[/]: a tiny DeepSeek-VL2 on generated pages, then LoRA on questions")
    pages = document_study.Settings(out=cfg.out / "documents")
    pages = dataclasses.replace(
        pages,
        pages=cfg.pages,
        questions=cfg.questions,
        language=find_languages(pages.language),
        read_steps=cfg.of(pages.read_steps),
        ask_steps=cfg.of(pages.ask_steps),
        least=pages.least if must_learn else -1,
        margin=pages.margin if must_learn else -1,
    )
    read = document_study.study(pages)
    print(RELEASED.format(questions=pages.out / "pages" / "heldout_ask.jsonl"))
    return {
        "what CLIP finds": found["what clip finds"],
        "pages with answers": read["pages"],
        "the worst answers": read["worst"],
        "the base, a folder": read["base"],
        "its adapter": read["adapter"],
    }


def find_languages(wanted: Sequence[Language]) -> tuple[Language, ...]:
    """Those whose fonts are here; English is always among them."""
    found = []
    for language in wanted:
        try:
            find_families(language)
            found.append(language)
        except ValueError as error:
            rich.print(f"   pages are not in {language}: {error}")
    return tuple(found)


if __name__ == "__main__":
    cli.run(main)
