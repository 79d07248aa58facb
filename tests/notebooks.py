"""Runs the notebooks and writes them with what they show.

python -m tests.notebooks [out=runs/notebooks] [NAME ...]

A notebook is a percent script, `notebooks/NAME.py`, which Jupytext opens as one; beside it lies the
same with outputs, `NAME.ipynb`, which `out=notebooks` writes anew. `tests/test_notebooks.py` holds
the two together.
"""

import concurrent.futures
import os
import pathlib
import sys
import tempfile
import time

import rich
import rich.progress

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
LONGEST = 600  # seconds of a cell, on a machine that does other work too


def main(arguments: list[str]) -> None:
    out = next((a.removeprefix("out=") for a in arguments if a.startswith("out=")), None)
    out = pathlib.Path(out or "runs/notebooks")
    names = [a for a in arguments if not a.startswith("out=")]
    out.mkdir(parents=True, exist_ok=True)
    files = [FOLDER / f"{n}.py" for n in names or all_names()]
    with tempfile.TemporaryDirectory() as programs:
        # outputs are of any machine: no warnings with its paths, no file that is shown by its own
        os.environ |= {"PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "2"}
        os.environ["JAX_COMPILATION_CACHE_DIR"] = programs  # two generate with the same model
        # a kernel a core: most of a notebook's time is compiling, which uses one
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            runs = [pool.submit(run, file, out / f"{file.stem}.ipynb") for file in files]
            done = concurrent.futures.as_completed(runs)
            for one in rich.progress.track(done, "notebooks", len(runs)):
                rich.print(one.result())
    rich.print(f"with their outputs: {out}")


def all_names() -> list[str]:
    """The notebooks there are."""
    return sorted(file.stem for file in FOLDER.glob("*.py"))


def run(file: pathlib.Path, out: pathlib.Path) -> str:
    """Executes a percent script in a kernel of its own, and says how long that took. Raises what a
    cell raises."""
    import jupytext
    import nbclient

    began = time.monotonic()
    notebook = jupytext.read(file)
    own = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": own, "language_info": {"name": "python"}}
    settings = dict(timeout=LONGEST, kernel_name="python3", record_timing=False)
    resources = {"metadata": {"path": str(file.parent)}}
    nbclient.NotebookClient(notebook, resources=resources, **settings).execute()
    for i, cell in enumerate(notebook.cells):
        cell["id"], cell["metadata"] = f"{file.stem}-{i}", {}  # the same at every run
        if cell.cell_type == "code":
            cell["outputs"] = joined(cell["outputs"])
    jupytext.write(notebook, out, fmt="ipynb")
    return f"{file.stem}: {time.monotonic() - began:.0f} s"


def joined(outputs: list[dict]) -> list[dict]:
    """What is printed comes in parts that differ from run to run; as one."""
    whole: list[dict] = []
    for output in outputs:
        if whole and output["output_type"] == "stream" and whole[-1].get("name") == output["name"]:
            whole[-1]["text"] += output["text"]
        else:
            whole.append(output)
    return whole


if __name__ == "__main__":
    main(sys.argv[1:])
