"""Test the notebooks of docs/lessons: each runs offline from top to bottom, with the outputs that are committed.

    python tests/test_notebooks.py                 # run all notebooks and save their new outputs
    python tests/test_notebooks.py 01_bigram ...   # only these

Two tags exclude a cell from the comparison of outputs. The output of a "varies" cell differs from machine to
machine, for example a sample. A "gpt2" cell has another output if GPT-2's vocabulary is not available.
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
MACHINE_PATH = re.compile(r"(?<![\w.>])/(home|root|tmp|work|usr|Users|mnt|opt)/")
for_each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


# ---------------------------------------------------------------------------------- run notebooks
def read(name):
    """Return the committed notebook with this name."""
    return nbformat.read(LESSONS / f"{name}.ipynb", as_version=4)


async def execute(name, slots, extra_environment):
    """Run a notebook in a new kernel in docs/lessons, and return it with its new outputs.

    Waits until the semaphore slots allows one more notebook. Metadata that differs from run to run is
    removed. Raises nbclient.exceptions.CellExecutionError if a cell fails.
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
    async with slots:
        await client.async_execute(env={**os.environ, **extra_environment})

    # remove what differs from run to run
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        cell.execution_count = None
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
    return notebook


async def execute_all(runs):
    """Run several notebooks, two at a time. runs is a list of (name, extra environment variables).

    Returns for each run the executed notebook, or the exception that it raised.
    """
    slots = asyncio.Semaphore(2)
    executions = [execute(name, slots, extra_environment) for name, extra_environment in runs]
    return await asyncio.gather(*executions, return_exceptions=True)


@pytest.fixture(scope="module")
def executions(tmp_path_factory):
    """Run all notebooks once. Returns {name: executed notebook or exception}.

    The entry "no vocabulary" is lesson 5 on a machine without GPT-2's vocabulary.
    """
    empty_directory = str(tmp_path_factory.mktemp("empty"))
    environment = {"IPYTHONDIR": empty_directory}
    runs = {name: (name, environment) for name in NOTEBOOKS}
    runs["no vocabulary"] = ("05_tokenization", {**environment, "TIKTOKEN_CACHE_DIR": empty_directory})
    results = asyncio.run(execute_all(runs.values()))
    return dict(zip(runs, results, strict=True))


def get_executed(executions, name):
    """Return an executed notebook. Raises the exception that ended its execution, if any."""
    result = executions[name]
    if isinstance(result, Exception):
        raise result
    return result


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


def numbers_in(text):
    """Return all numbers of a text as floats."""
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def agree(old, new):
    """Tell whether two texts have the same words, and numbers that differ by 5 % + 0.011 at most."""
    if NUMBER.sub("#", old) != NUMBER.sub("#", new):
        return False
    for a, b in zip(numbers_in(old), numbers_in(new), strict=True):
        if not abs(a - b) <= 0.05 * max(abs(a), abs(b)) + 0.011:
            return False
    return True


def check_outputs(name, executed, excluded_tags):
    """Fail if a cell without an excluded tag has another output than the committed notebook."""
    for i, (old, new) in enumerate(zip(read(name).cells, executed.cells, strict=True)):
        tags = set(old.metadata.get("tags", []))
        if old.cell_type != "code" or tags & excluded_tags:
            continue
        assert agree(output_text(old), output_text(new)), (
            f"the output of {name}, cell {i} has changed: python tests/test_notebooks.py {name} saves the new one\n"
            f"--- committed\n{output_text(old)}\n--- now\n{output_text(new)}"
        )


@for_each_notebook
def test_a_notebook_runs_and_has_the_committed_outputs(name, executions):
    excluded_tags = {"varies"}
    if not (SHARED / "tiktoken_cache").is_dir():
        excluded_tags.add("gpt2")
    check_outputs(name, get_executed(executions, name), excluded_tags)


def test_lesson_5_runs_without_gpt2s_vocabulary_and_says_so(executions):
    notebook = get_executed(executions, "no vocabulary")
    check_outputs("05_tokenization", notebook, {"varies", "gpt2"})
    gpt2_cells = [cell for cell in notebook.cells if "gpt2" in cell.metadata.get("tags", [])]
    assert gpt2_cells
    for cell in gpt2_cells:
        assert "GPT-2's vocabulary is not available" in output_text(cell)


def test_outputs_agree_if_their_words_are_equal_and_their_numbers_are_close():
    assert agree("loss 2.4512 after 1,000 steps", "loss 2.4498 after 1,000 steps")
    assert not agree("loss 2.45", "loss 2.75")
    assert not agree("loss 2.45", "loss nan")
    assert not agree("loss 2.45", "lost 2.45")
    assert not agree("1 2", "1 2 3")


# --------------------------------------------------------------------------- committed notebooks
def test_the_index_lists_every_notebook_in_order():
    index = (LESSONS / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\((\w+)\.ipynb\)", index) == NOTEBOOKS
    lesson_numbers = [int(name[:2]) for name in NOTEBOOKS]
    assert lesson_numbers == list(range(1, len(NOTEBOOKS) + 1))


@for_each_notebook
def test_a_notebook_is_committed_with_outputs_and_without_traces_of_a_machine(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}

    # all outputs are text and images, and none is a warning
    outputs = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            outputs += cell.outputs
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not any(output.get("name") == "stderr" for output in outputs), "a warning is committed"
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) >= 2

    # nothing tells on which machine, or when, the notebook ran
    text = (LESSONS / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not MACHINE_PATH.search(text)
    assert not re.search(r'"execution_count": \d|iopub', text)
    assert len(text) < 400_000, "use smaller or fewer figures"


def definitions(source):
    """Return the names of all functions and classes that are defined in Python source code."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    return names


@for_each_notebook
def test_functions_named_in_the_text_of_a_notebook_exist(name):
    """Check names like `script.f()`, and like `f()`, which a script or the notebook itself must define."""
    # the names that exist, and the text of the notebook
    script_names = {}  # script -> names that it defines
    for script in SCRIPTS:
        script_names[script] = definitions((ROOT / f"{script}.py").read_text(encoding="utf-8"))
    known_names = set().union(*script_names.values())
    text = ""
    for cell in read(name).cells:
        if cell.cell_type == "code":
            known_names |= definitions(cell.source)
        else:
            text += cell.source + "\n"

    # all names in the text that end with ()
    paths = re.findall(r"`(\w+(?:\.\w+)*)\(\)`", text)
    assert paths, "a lesson names the functions that it is about"
    for path in paths:
        first, *rest = path.split(".")
        if first in script_names:
            assert set(rest) <= script_names[first], f"{first}.py does not define {'.'.join(rest)}"
        elif not rest:
            assert first in known_names, f"neither a script nor this notebook defines {first}()"
        elif first in known_names:  # a class and its method; others, such as loss.backward(), are PyTorch's
            assert set(rest) <= known_names, f"no script defines {path}()"


# --------------------------------------------------------------------------------- save outputs
def save_outputs(names):
    """Run notebooks and write their new outputs into docs/lessons."""
    results = asyncio.run(execute_all([(name, {}) for name in names]))
    for name, result in zip(names, results, strict=True):
        if isinstance(result, Exception):
            raise result
        nbformat.write(result, LESSONS / f"{name}.ipynb")
        print(name)


if __name__ == "__main__":
    save_outputs(sys.argv[1:] or NOTEBOOKS)
