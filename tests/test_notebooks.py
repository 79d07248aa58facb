"""The notebooks beside their scripts: the same cells, run to their end, and nothing private."""

import ast
import json
import re

import pytest

from tests.notebooks import FOLDER, all_names

# beside llmprep_jax: what a reader has
MAY_IMPORT = {"flax", "jax", "matplotlib", "numpy", "optax", "PIL", "tokenizers"}


def cells_of_script(text):
    """(kind, source) of the cells of a percent script."""
    cells = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        body = body.strip("\n")
        if "[markdown]" in head:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        cells.append(("markdown" if "[markdown]" in head else "code", body))
    return cells


@pytest.mark.parametrize("name", all_names())
def test_a_notebook_is_its_script_and_has_run(name):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    script = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    cells = [(c["cell_type"], "".join(c["source"]).strip("\n")) for c in notebook["cells"]]
    assert cells == cells_of_script(script)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert len(outputs) > 2
    shown = json.dumps([x for x in outputs if "image/png" not in x.get("data", {})])
    assert not re.search(r"/(tmp|work|root|home)/|Warning|Traceback", shown)
    assert len(json.dumps(notebook)) < 1_000_000


@pytest.mark.parametrize("name", all_names())
def test_a_notebook_takes_what_a_reader_may_take(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    import sys

    others = {n.partition(".")[0] for n in found} - set(sys.stdlib_module_names)
    assert others - {"llmprep_jax"} <= MAY_IMPORT
    assert not [n for n in found if any(part.startswith("_") for part in n.split("."))]
