"""Generated documents: letters, tables, charts, receipts, signs and menus, and what they say.

`generate(settings, index)` makes one as a picture with its text, the boxes of its words, and
questions with answers and their boxes; `write(folder, count, settings)` a data set. Pages and
questions are in English, simplified and traditional Chinese. Fonts are those of the machine
(`fonts`). Everything follows from the seed and the index, so a data set is a line of settings.
"""

from llmprep_jax.data.synthetic_documents.folder import write
from llmprep_jax.data.synthetic_documents.generator import (
    Document,
    Question,
    Run,
    Word,
    generate,
)
from llmprep_jax.data.synthetic_documents.pdf import to_pdf
from llmprep_jax.data.synthetic_documents.settings import KINDS, Settings
from llmprep_jax.data.synthetic_documents.sheet import contact_sheet

__all__ = [
    "KINDS",
    "Document",
    "Question",
    "Run",
    "Settings",
    "Word",
    "contact_sheet",
    "generate",
    "to_pdf",
    "write",
]
