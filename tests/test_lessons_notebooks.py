"""The notebooks of docs/lessons: each runs offline from top to bottom and prints what is committed.

    python tests/test_lessons_notebooks.py [NAME ...]   # runs notebooks (all) and writes their outputs anew

A cell with the tag "varies" prints what differs from machine to machine (samples, timings), one with the tag
"gpt2" prints another line where GPT-2's vocabulary is absent: these outputs are not compared.
"""

import ast
import asyncio
import os
import re
import sys

import nbformat
import pytest
from conftest import ROOT, SCRIPTS, SHARED
from nbclient import NotebookClient

LESSONS = ROOT / "docs" / "lessons"
NOTEBOOKS = sorted(path.stem for path in LESSONS.glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
notebooks = pytest.mark.parametrize("name", NOTEBOOKS)


def read(name):
    return nbformat.read(LESSONS / f"{name}.ipynb", as_version=4)


async def execute(name, slots, **environment):
    """The notebook as a fresh kernel in docs/lessons leaves it, without what only that run knows.

    Waits for one of slots. Raises nbclient.exceptions.CellExecutionError at a cell that fails.
    """
    notebook = read(name)
    options = {"timeout": 300, "startup_timeout": 300, "record_timing": False, "coalesce_streams": True}
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": LESSONS}}, **options)
    async with slots:
        await client.async_execute(env={**os.environ, **environment})
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
            cell.execution_count = None
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
    return notebook


async def execute_all(runs):
    """What execute returns or raises for each (name, environment), two at a time."""
    slots = asyncio.Semaphore(2)
    return await asyncio.gather(*(execute(name, slots, **env) for name, env in runs), return_exceptions=True)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """{name: the executed notebook, or what it raised}; "no vocabulary" is lesson 5 where GPT-2's is absent."""
    empty = str(tmp_path_factory.mktemp("empty"))
    runs = {name: (name, {"IPYTHONDIR": empty}) for name in NOTEBOOKS}
    runs["no vocabulary"] = ("05_tokenization", {"IPYTHONDIR": empty, "TIKTOKEN_CACHE_DIR": empty})
    return dict(zip(runs, asyncio.run(execute_all(runs.values())), strict=True))


def result(executed, name):
    if isinstance(executed[name], Exception):
        raise executed[name]
    return executed[name]


def printed(cell):
    """All text that a cell's outputs hold; of a picture just that there is one."""
    parts = []
    for output in cell.outputs:
        data = {"text/plain": output.text} if output.output_type == "stream" else output.get("data", {})
        parts += [kind if kind.startswith("image/") else "".join(data[kind]) for kind in sorted(data)]
    return "\n".join(parts)


def agree(old, new):
    """Whether two texts have the same words, and numbers that differ by rounding or a little of training."""
    numbers = [[float(x.replace(",", "")) for x in NUMBER.findall(text)] for text in (old, new)]
    return NUMBER.sub("#", old) == NUMBER.sub("#", new) and all(
        abs(a - b) <= 0.05 * max(abs(a), abs(b)) + 0.011 for a, b in zip(*numbers, strict=True)
    )


def compare(name, executed, excluded):
    """Fail where a cell without one of the excluded tags prints other than what is committed of notebook name."""
    for i, (old, new) in enumerate(zip(read(name).cells, executed.cells, strict=True)):
        if old.cell_type == "code" and not excluded & set(old.metadata.get("tags", [])):
            assert agree(printed(old), printed(new)), (
                f"{name}, cell {i}: python tests/test_lessons_notebooks.py {name} writes its output anew\n"
                f"--- committed\n{printed(old)}\n--- now\n{printed(new)}"
            )


# ------------------------------------------------------------------------------------------ running
@notebooks
def test_a_notebook_runs_and_prints_what_is_committed(name, executed):
    has_gpt2 = (SHARED / "tiktoken_cache").is_dir()
    compare(name, result(executed, name), {"varies"} if has_gpt2 else {"varies", "gpt2"})


def test_lesson_5_runs_without_gpt2s_vocabulary_and_says_so(executed):
    notebook = result(executed, "no vocabulary")
    compare("05_tokenization", notebook, {"varies", "gpt2"})
    cells = [cell for cell in notebook.cells if "gpt2" in cell.metadata.get("tags", [])]
    assert cells
    assert all("GPT-2's vocabulary is not here" in printed(cell) for cell in cells)


def test_outputs_are_compared_by_words_and_roughly_by_numbers():
    assert agree("loss 2.4512 after 1,000 steps", "loss 2.4498 after 1,000 steps")
    assert not agree("loss 2.45", "loss 2.75")
    assert not agree("loss 2.45", "lost 2.45")
    assert not agree("1 2", "1 2 3")


# ---------------------------------------------------------------------------------- what is committed
def test_the_index_lists_every_notebook_in_order():
    index = (LESSONS / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\((\w+)\.ipynb\)", index) == NOTEBOOKS
    assert [int(name[:2]) for name in NOTEBOOKS] == list(range(1, len(NOTEBOOKS) + 1))


@notebooks
def test_a_notebook_is_committed_with_outputs_and_no_trace_of_a_machine(name):
    notebook, text = read(name), (LESSONS / f"{name}.ipynb").read_text(encoding="utf-8")
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not any(output.get("name") == "stderr" for output in outputs), "a warning is committed"
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not re.search(r'(?<![\w.>])/(home|root|tmp|work|usr|Users|mnt|opt)/|"execution_count": \d|iopub', text)
    assert len(text) < 400_000, "smaller figures, or fewer"


@notebooks
def test_functions_that_a_notebook_names_exist(name):
    """Of `f()` and `script.f()` in the prose; a plain name may also be one that the notebook defines."""

    def defined(source):
        kinds = (ast.FunctionDef, ast.ClassDef)
        return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)}

    cells = read(name).cells
    in_scripts = {script: defined((ROOT / f"{script}.py").read_text(encoding="utf-8")) for script in SCRIPTS}
    here = set().union(*in_scripts.values(), *(defined(cell.source) for cell in cells if cell.cell_type == "code"))
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    named = re.findall(r"`(\w+(?:\.\w+)*)\(\)`", prose)
    assert named, "a lesson names what it is about"
    for path in named:
        first, *rest = path.split(".")
        if first in in_scripts:
            assert set(rest) <= in_scripts[first], f"{first}.py has no {'.'.join(rest)}"
        elif not rest:
            assert first in here, f"{first}() is neither in a script nor in this notebook"


if __name__ == "__main__":
    names = sys.argv[1:] or NOTEBOOKS
    for name, notebook in zip(names, asyncio.run(execute_all([(name, {}) for name in names])), strict=True):
        if isinstance(notebook, Exception):
            raise notebook
        nbformat.write(notebook, LESSONS / f"{name}.ipynb")
        print(name)
