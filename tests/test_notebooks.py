"""Test the notebooks of docs/lessons: each runs offline from top to bottom, with the outputs that are committed.

    python tests/test_notebooks.py                 # run all notebooks and save their new outputs
    python tests/test_notebooks.py 01_bigram ...   # only these

Two tags exclude a cell from the comparison of outputs. The output of a "varies" cell differs from machine to
machine, for example a sample. A "gpt2" cell has another output if GPT-2's vocabulary is not available.
"""

import os
import re
import sys

import nbformat
import pytest
from conftest import ROOT, SHARED
from nbclient import NotebookClient

LESSONS = ROOT / "docs" / "lessons"
NOTEBOOKS = sorted(path.stem for path in LESSONS.glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
MACHINE_PATH = re.compile(r"(?<![\w.>])/(home|root|tmp|work|usr|Users|mnt|opt)/")
for_each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


# ---------------------------------------------------------------------------------- run notebooks
def read(name):
    """Return the committed notebook with this name."""
    return nbformat.read(LESSONS / f"{name}.ipynb", as_version=4)


def execute(name, **environment):
    """Run a notebook in a new kernel in docs/lessons. Returns it with its new outputs.

    Raises CellExecutionError if a cell fails.
    """
    notebook = read(name)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": LESSONS}},
        timeout=300,  # seconds per cell
        startup_timeout=300,
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env={**os.environ, **environment})

    # remove what differs from run to run
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
            cell.execution_count = None
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.execution_count = None
    return notebook


# ------------------------------------------------------------------------------- compare outputs
def output_text(cell):
    """Return all text in the outputs of a cell. Of an image, only its type is included."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            parts.append(output.text)
            continue
        data = output.get("data", {})
        for kind in sorted(data):
            parts.append(kind if kind.startswith("image/") else "".join(data[kind]))
    return "\n".join(parts)


def agree(old, new):
    """Tell whether two texts have the same words, and numbers that differ by 5 % + 0.011 at most."""
    if NUMBER.sub("#", old) != NUMBER.sub("#", new):
        return False
    for a, b in zip(NUMBER.findall(old), NUMBER.findall(new), strict=True):
        a, b = float(a.replace(",", "")), float(b.replace(",", ""))
        if not abs(a - b) <= 0.05 * max(abs(a), abs(b)) + 0.011:
            return False
    return True


def check_outputs(name, executed, excluded_tags):
    """Fail if a cell without an excluded tag has another output than the committed notebook."""
    for i, (old, new) in enumerate(zip(read(name).cells, executed.cells, strict=True)):
        if old.cell_type == "code" and not excluded_tags & set(old.metadata.get("tags", [])):
            assert agree(output_text(old), output_text(new)), (
                f"the output of {name}, cell {i} has changed: python tests/test_notebooks.py {name} saves the new one\n"
                f"--- committed\n{output_text(old)}\n--- now\n{output_text(new)}"
            )


@for_each_notebook
def test_a_notebook_runs_and_has_the_committed_outputs(name, tmp_path):
    has_vocabulary = (SHARED / "tiktoken_cache").is_dir()
    executed = execute(name, IPYTHONDIR=str(tmp_path))
    check_outputs(name, executed, {"varies"} if has_vocabulary else {"varies", "gpt2"})


def test_lesson_5_runs_without_gpt2s_vocabulary(tmp_path):
    executed = execute("05_tokenization", IPYTHONDIR=str(tmp_path), TIKTOKEN_CACHE_DIR=str(tmp_path))
    check_outputs("05_tokenization", executed, {"varies", "gpt2"})
    gpt2_cells = [cell for cell in executed.cells if "gpt2" in cell.metadata.get("tags", [])]
    assert gpt2_cells and all("TIKTOKEN_CACHE_DIR" in output_text(cell) for cell in gpt2_cells)


# --------------------------------------------------------------------------- committed notebooks
def test_the_index_lists_every_notebook_in_order():
    index = (LESSONS / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\((\w+)\.ipynb\)", index) == NOTEBOOKS
    assert [int(name[:2]) for name in NOTEBOOKS] == list(range(1, len(NOTEBOOKS) + 1))


@for_each_notebook
def test_a_notebook_is_committed_with_outputs_and_without_traces_of_a_machine(name):
    notebook = read(name)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not any(output.get("name") == "stderr" for output in outputs), "a warning is committed"
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    text = (LESSONS / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not MACHINE_PATH.search(text)
    assert not re.search(r'"execution_count": \d|iopub', text)
    assert len(text) < 400_000, "use smaller or fewer figures"


if __name__ == "__main__":
    for name in sys.argv[1:] or NOTEBOOKS:
        nbformat.write(execute(name), LESSONS / f"{name}.ipynb")
        print(name)
