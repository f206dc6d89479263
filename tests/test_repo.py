"""The repository as a whole: copied blocks, imports, --help, requirements, documents."""

import argparse
import ast
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import EXAMPLE, ROOT, SCRIPTS, call, random_gpt2

BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
BENCHMARKS = [name for name in BENCHMARKS if name not in ("common", "bfloat16_residual")]  # without flags of their own
DOCUMENTS = []
for folder in (".", "docs", "docs/lessons", "benchmarks", "tests"):
    DOCUMENTS += sorted((ROOT / folder).glob("*.md"))
BLOCK = r"^# --- copied block: (\S+) ---\n(.*?)^# --- end of copied block: (\S+) ---\n"


def source_of(script):
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------- scripts
def test_a_copied_block_is_the_same_in_all_scripts_that_have_it():
    blocks = {}
    for script in SCRIPTS:
        found = re.findall(BLOCK, source_of(script), re.MULTILINE | re.DOTALL)
        assert source_of(script).count("copied block") == 2 * len(found), script
        for name, text, end_name in found:
            assert name == end_name, f"{script}.py: block {name} ends as {end_name}"
            blocks.setdefault(name, {})[script] = text
    for name, copies in blocks.items():
        assert len(copies) >= 2, f"only {', '.join(copies)} has block {name}"
        assert len(set(copies.values())) == 1, f"block {name} differs in {', '.join(copies)}"


def imported_packages(script):
    """Return the names of the top-level packages that a script imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source_of(script))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_scripts_import_the_required_packages_and_nothing_else():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line.split("==")[0] for line in lines if not line.startswith("#")}
    used = set()
    for script in SCRIPTS:
        third_party = imported_packages(script) - sys.stdlib_module_names
        # wandb is optional, and imported only if --wandb is given
        optional = {"wandb"} if script == "train_gpt2" else set()
        assert third_party - optional <= required, script  # so no script imports another
        if script in ("bigram", "gpt"):
            assert third_party == {"torch"}, script
        assert not imported_packages(script) & {"ctypes", "fcntl"}, script  # not on every system
        used |= third_party
    assert required <= used


def test_importing_a_script_does_nothing(tmp_path):
    """No flag is read, nothing is printed or written, and there is no network."""
    code = f"import sys; sys.dont_write_bytecode = True; sys.path.append({str(ROOT)!r})\n"
    code += "import " + ", ".join(SCRIPTS)
    line = [sys.executable, "-c", code, "--no_such_flag"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_pinned_exactly(file):
    lines = (ROOT / file).read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    if file == "requirements-dev.txt":
        assert lines.pop(0) == "-r requirements.txt"
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_-]+==\d+(\.\d+)+", line), line


def test_the_corpus_is_the_published_one():
    content = (ROOT / "input.txt").read_bytes()
    checksum = "34a79dc2642bd1c1b01907ad2fd1b480384741cf14f39cb7b0571770efcf490b"
    assert hashlib.sha256(content).hexdigest() == checksum


def test_files_are_checked_out_with_lf_on_every_system():
    """Git on Windows converts line endings, which would change the tokens of input.txt."""
    names = ["input.txt", "train_gpt2.py", "README.md"]
    line = ["git", "check-attr", "eol", *names]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this copy is not a git checkout")
    assert done.stdout.splitlines() == [f"{name}: eol: lf" for name in names]


# ---------------------------------------------------------------------------------- command lines
class Parsed(BaseException):
    """Raised in place of running a program. No script catches a BaseException."""


@pytest.fixture
def parse(monkeypatch):
    """Return a function that parses the flags of a program. It returns the parser."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args):
        parse_args(self, *args)
        raise Parsed(self)

    def parse_flags(name, arguments):
        with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
            call(name, *arguments)
        return parsed.value.args[0]

    return parse_flags


@pytest.mark.parametrize("name", [*SCRIPTS, *BENCHMARKS])
def test_help_explains_every_flag(name, parse):
    required = {"plot": ["log"], "bench_fineweb": ["--source", "books.parquet"]}
    parser = parse(name, required.get(name, []))
    for action in parser._actions:
        assert action.help, action.option_strings
    text = parser.format_help()  # also finds a stray percent sign
    assert "python " in text


COMPUTE = {
    "gpt": "--input input.txt --preset cpu --max_steps 1 --eval_iters 1 --max_new_tokens 1",
    "hellaswag": "--model model --data examples.jsonl",
    "sample": "--model model",
}


@pytest.mark.parametrize("script", COMPUTE)
def test_the_flag_device_counts(script, tmp_path, text_file, monkeypatch):
    """Tensors on PyTorch's device meta have a shape, but no values, so a script that uses it fails."""
    monkeypatch.chdir(tmp_path)
    random_gpt2("model")
    shutil.copy(text_file, "input.txt")
    (tmp_path / "examples.jsonl").write_text(json.dumps(EXAMPLE))
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
        call(script, *COMPUTE[script].split(), "--device", "meta")


# python PROGRAM.py or torchrun [flags] PROGRAM.py, perhaps after variables or a time limit
COMMAND = re.compile(
    r"\s*(?:\w+=\S+ )*(?:timeout \d+ )?(?:\S*python3?|torchrun)\s"
    r"(?:[^#]*?\s)?(?:benchmarks/)?(\w+)\.py\b(.*)"
)


def find_commands(text):
    """Return (program, list of arguments) of every command in a text that runs one of ours."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;|\||`", line):
            match = COMMAND.match(part)
            if match:
                arguments = shlex.split(re.sub(r" 2?>\S+", "", match[2]), comments=True)
                commands.append((match[1], arguments))
    return commands


def short_name(path):
    return path.relative_to(ROOT).as_posix()


PROGRAMS = [ROOT / f"{name}.py" for name in SCRIPTS]
PROGRAMS += [ROOT / "benchmarks" / f"{name}.py" for name in BENCHMARKS]


@pytest.mark.parametrize("path", [*DOCUMENTS, *PROGRAMS], ids=short_name)
def test_the_commands_of_a_document_or_docstring_parse(path, parse):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text))
        assert path.stem in [name for name, _ in find_commands(text)]  # it shows how to run it
    for name, arguments in find_commands(text):
        parse(name, arguments)
        if "--" in arguments:  # benchmarks pass what follows to the trainer
            parse("train_gpt2", arguments[arguments.index("--") + 1 :])


# -------------------------------------------------------------------------------------- documents
def anchors_of(path):
    """Return the anchors of the headings in a Markdown file."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=short_name)
def test_links_lead_to_files_and_headings(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            linked = path.parent / file if file else path
            assert linked.exists(), target
            assert not anchor or anchor in anchors_of(linked), target
    for name in re.findall(r"\b(?:tests|docs|benchmarks)/[\w/]+\.\w+", text):
        assert (ROOT / name).exists(), name


def test_the_documents_name_every_file_once_in_their_index():
    for folder, names in ((ROOT, SCRIPTS), (ROOT / "benchmarks", BENCHMARKS)):
        index = (folder / "README.md").read_text(encoding="utf-8")
        for name in names:
            assert len(re.findall(rf"^\| `{name}.py` \|", index, re.M)) == 1, name


# Flags that are added to a command of the README, so that it takes seconds.
SHORTER = {
    "bigram": "--max_steps 20 --eval_iters 2",
    "gpt": "--preset cpu --max_steps 2 --eval_iters 1 --max_new_tokens 4",
    "train_gpt2": "--n_layer 1 --n_head 2 --n_embd 32 --block_size 64 --total_batch_size 128 "
    "--max_steps 2 --val_tokens 640 --max_new_tokens 4 --device cpu",
    "sample": "--max_new_tokens 4",
}
# Commands with one of these words are left out: they need a network, hours, or the result of such a command.
NOT_HERE = ["init_from gpt2", "model gpt2", "log_gpt2", "log_plays", "tinyshakespeare"]
NOT_HERE += ["--download", "hellaswag.py"]


@pytest.mark.gpt2
def test_the_readme_runs_in_its_order(tmp_path, text_file, tiktoken_cache, monkeypatch):
    """All commands run in one directory, with the flags of SHORTER added; then the examples in Python."""
    shutil.copy(ROOT / "input.txt", tmp_path)
    shutil.copy(text_file, tmp_path / "my_text.txt")  # the reader's own text
    (tmp_path / "my_data").mkdir()
    lines = [json.dumps({"text": line}) for line in text_file.read_text().splitlines() if line]
    (tmp_path / "my_data" / "texts.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    done_before = set()
    for script, arguments in find_commands((ROOT / "README.md").read_text(encoding="utf-8")):
        line = re.sub(r"step_\d{6}", "step_000002", f"{script}.py {shlex.join(arguments)}")
        if script not in SCRIPTS or line in done_before or any(part in line for part in NOT_HERE):
            continue
        if line == "fineweb.py ":  # ten billion tokens
            continue
        done = call(script, *shlex.split(line)[1:], *SHORTER.get(script, "").split())
        assert done.returncode == 0, f"{line}: {done.stderr}"
        done_before.add(line)
    assert {line.split(".")[0] for line in done_before} == {*SCRIPTS} - {"hellaswag"}

    for path in (ROOT / "README.md", ROOT / "docs" / "formats.md"):
        text = path.read_text(encoding="utf-8")
        for example in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
            exec(re.sub(r"step_\d{6}", "step_000002", example), {})
