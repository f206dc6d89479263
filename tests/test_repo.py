"""The repository as a whole: copied blocks, imports, --help, the commands of the documents, pins."""

import argparse
import ast
import hashlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, call, load

scripts = pytest.mark.parametrize("script", SCRIPTS)
BLOCK = re.compile(r"^# --- copied block: (\S+) ---\n(.*?)^# --- end of copied block: (\S+) ---\n", re.M | re.S)


def source(script):
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


def blocks():
    """{name of a copied block: {script: its text there}}."""
    found = {}
    for script in SCRIPTS:
        for name, text, end in BLOCK.findall(source(script)):
            assert name == end, f"{script}.py: block {name} ends as {end}"
            assert script not in found.setdefault(name, {}), f"{script}.py has block {name} twice"
            found[name][script] = text
    return found


def imports(script):
    """The top-level packages that a script imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


# --------------------------------------------------------------------------------- copied blocks
@pytest.mark.parametrize("name", sorted(blocks()))
def test_copied_block_is_the_same_wherever_it_stands(name):
    copies = blocks()[name]
    assert len(copies) >= 2, f"only {', '.join(copies)} has it"
    assert len(set(copies.values())) == 1, f"the copies in {', '.join(copies)} differ"


@scripts
def test_every_mark_belongs_to_a_block(script):
    marks = re.findall(r"copied block", source(script))
    assert len(marks) == 2 * len(BLOCK.findall(source(script)))


# --------------------------------------------------------------------------------------- imports
@scripts
def test_no_script_imports_another(script):
    assert not imports(script) & set(SCRIPTS)


@scripts
def test_what_a_script_imports_is_pinned(script):
    pins = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    third_party = imports(script) - sys.stdlib_module_names
    assert third_party <= pins
    if script in ("bigram", "gpt"):
        assert third_party - {"tqdm"} == {"torch"}  # tqdm is used only where it is installed


def test_importing_a_script_does_nothing(tmp_path):
    """No output, no file, no flags read, no device looked for, no network and no process."""
    code = f"""
import argparse, importlib.util, os, socket, subprocess, sys
import numpy, requests, tiktoken, torch
sys.dont_write_bytecode = True
def forbidden(name):
    def stop(*args, **kwargs):
        raise SystemExit(f"{{script}}.py calls {{name}} when imported")
    return stop
argparse.ArgumentParser.parse_args = forbidden("parse_args")
argparse.ArgumentParser.parse_known_args = forbidden("parse_known_args")
for module, names in ((torch.cuda, "is_available device_count current_device init get_device_properties"),
                      (torch.accelerator, "is_available current_accelerator device_count"),
                      (torch.backends.mps, "is_available"), (torch.distributed, "init_process_group"),
                      (torch, "manual_seed set_float32_matmul_precision"), (tiktoken, "get_encoding Encoding"),
                      (requests, "get"), (socket, "socket create_connection"), (subprocess, "Popen"), (os, "makedirs")):
    for name in names.split():
        setattr(module, name, forbidden(f"{{module.__name__}}.{{name}}"))
for script in {SCRIPTS!r}:
    spec = importlib.util.spec_from_file_location(script, os.path.join({str(ROOT)!r}, script + ".py"))
    sys.modules[script] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[script])
    assert callable(sys.modules[script].main)
"""
    line = [sys.executable, "-c", code, "--no_such_flag"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------- command lines
@scripts
def test_help_explains_the_script_and_every_flag(script, monkeypatch):
    parsers, parse_args = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self: parsers.append(self) or parse_args(self))
    done = call(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert ast.get_docstring(ast.parse(source(script)), clean=False).strip() in done.stdout
    for action in parsers[0]._actions:
        assert action.help, action.option_strings
        assert action.help.split()[0] in done.stdout
        assert (action.option_strings or [action.metavar])[-1] in done.stdout


def commands(text):
    """The (script, arguments) of every `python X.py ...` and `torchrun ... X.py ...` in a text."""
    text = text.replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        for part in re.split(r"&&|;|\||`", line):
            match = re.match(r"\s*(?:\$ )?(?:\w+=\S+ )*(?:\S*python3?|torchrun)\s(?:[^#]*?\s)?(\w+)\.py\b(.*)", part)
            if match:
                found.append((match[1], shlex.split(match[2], comments=True)))
    return found


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def check_commands(found, monkeypatch):
    """Every command is of a script that is there, with flags and values that it takes."""

    class Parsed(Exception):
        pass

    def parse_and_stop(self, *args):
        raise Parsed(parse_args(self, *args))

    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for script, arguments in found:
        assert script in SCRIPTS, f"there is no {script}.py"
        with pytest.raises(Parsed):
            done = call(script, *arguments)
            pytest.fail(f"{script}.py {' '.join(arguments)}: {done.stderr}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_the_documents_parse(path, monkeypatch):
    if not path.exists():
        pytest.skip(f"there is no {path.name} yet")
    found = commands(path.read_text(encoding="utf-8"))
    assert found or path.name != "README.md", "README.md shows no command"
    check_commands(found, monkeypatch)


@scripts
def test_commands_of_the_docstrings_parse(script, monkeypatch):
    found = [pair for pair in commands(ast.get_docstring(ast.parse(source(script)))) if pair[0] in SCRIPTS]
    assert script in [name for name, _ in found], "a docstring shows how to run its script"
    check_commands(found, monkeypatch)


def test_commands_are_found_in_text():
    text = "Run `python gpt.py --seed 3` or\n$ A=b torchrun --standalone x.py --a \\\n  'b c' && python3 y.py # z\n"
    assert commands(text) == [("gpt", ["--seed", "3"]), ("x", ["--a", "b c"]), ("y", [])]


# ------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_pinned_exactly(file):
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    if file == "requirements-dev.txt":
        assert lines.pop(0) == "-r requirements.txt"
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_-]+==\d+(\.\d+)+", line), line


def test_the_corpus_is_the_published_one():
    digest = "34a79dc2642bd1c1b01907ad2fd1b480384741cf14f39cb7b0571770efcf490b"
    assert hashlib.sha256((ROOT / "input.txt").read_bytes()).hexdigest() == digest
    assert len(set((ROOT / "input.txt").read_text(encoding="utf-8"))) == 65


@scripts
def test_a_loaded_script_bears_its_name(script):
    assert load(script).__name__ == script


# --------------------------------------------------------------------- the commands of the documents
SHORTER = {  # added to a command of the documents, so that it takes seconds
    "bigram": ["--max_steps", 20, "--eval_iters", 2],
    "gpt": ["--max_steps", 2, "--eval_iters", 1, "--max_new_tokens", 4],
    "train_gpt2": ["--max_steps", 2, "--val_tokens", 640, "--max_new_tokens", 4, "--device", "cpu"],
    "sample": ["--max_new_tokens", 4],
}


def offline(script, arguments):
    """Whether a command needs no network, no second machine, no GPU and no file that only its reader has."""
    others = {"--download", "--preset full", "gpt2", "-", "data/tinyshakespeare/input.txt", "log_build_nanogpt"}
    if script == "train_gpt2":
        return "shakespeare" in arguments and "--block_size" not in arguments
    return script not in ("fineweb", "hellaswag") and not others & {*arguments, " ".join(arguments)}


def test_offline_commands_of_the_readme_run_as_printed(tmp_path, monkeypatch):
    """In their order in one directory, each shortened by flags behind it alone; the model they train opens later."""
    for script in SCRIPTS:
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    shutil.copy(ROOT / "input.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    found = {str(command): command for command in commands(DOCUMENTS[0].read_text(encoding="utf-8"))}  # each once
    found = [command for command in found.values() if offline(*command)]
    assert {script for script, _ in found} >= {"prepare_shakespeare", "train_gpt2", "bigram", "gpt", "sample"}
    for script, arguments in found:
        done = call(script, *arguments, *SHORTER.get(script, []))
        assert (done.returncode, done.stderr.count("error")) == (0, 0), f"{script}.py {arguments}: {done.stderr}"
    assert (tmp_path / "log" / "step_000002" / "model.safetensors").exists()
