"""The list of breaks fits the code that it breaks."""

import shutil

import pytest

from tests.mutations import MUTATIONS, ROOT, apply


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}: {m.broken}")
def test_every_break_has_its_place(mutation, tmp_path):
    path = tmp_path / "llmprep_jax" / mutation.file
    path.parent.mkdir(parents=True)
    shutil.copy(ROOT / "llmprep_jax" / mutation.file, path)
    before = path.read_text()
    apply(mutation, tmp_path)
    assert path.read_text() != before
    compile(path.read_text(), str(path), "exec")
