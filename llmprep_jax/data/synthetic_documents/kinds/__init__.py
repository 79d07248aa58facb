"""Kinds of documents, a module each: `compose` says what stands there, `draw` where and how."""

from types import ModuleType

from llmprep_jax.data.synthetic_documents.kinds import chart, letter, menu, receipt, sign, table

MODULES: dict[str, ModuleType] = {
    "letter": letter,
    "table": table,
    "chart": chart,
    "receipt": receipt,
    "sign": sign,
    "menu": menu,
}
