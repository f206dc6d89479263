"""The repository as a whole: copied blocks, imports, --help, pinned requirements."""

import argparse
import ast
import hashlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, call, load

every_script = pytest.mark.parametrize("script", SCRIPTS)
BLOCK = re.compile(
    r"^# --- copied block: (\S+) ---\n(.*?)^# --- end of copied block: (\S+) ---\n", re.MULTILINE | re.DOTALL
)


def source_of(script):
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


def find_blocks():
    """Return {name of a copied block: {script: its text there}}."""
    blocks = {}
    for script in SCRIPTS:
        for name, text, end_name in BLOCK.findall(source_of(script)):
            assert name == end_name, f"{script}.py: block {name} ends as {end_name}"
            copies = blocks.setdefault(name, {})
            assert script not in copies, f"{script}.py has block {name} twice"
            copies[script] = text
    return blocks


def imported_packages(script):
    """Return the names of the top-level packages that a script imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source_of(script))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def required_packages():
    """Return the names of the packages in requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {line.split("==")[0] for line in lines}


# -------------------------------------------------------------------------------- copied blocks
@pytest.mark.parametrize("name", sorted(find_blocks()))
def test_a_copied_block_is_the_same_in_all_scripts_that_have_it(name):
    copies = find_blocks()[name]
    assert len(copies) >= 2, f"only {', '.join(copies)} has it"
    assert len(set(copies.values())) == 1, f"the copies in {', '.join(copies)} differ"


@every_script
def test_every_mark_of_a_copied_block_belongs_to_a_block(script):
    marks = re.findall(r"copied block", source_of(script))
    assert len(marks) == 2 * len(BLOCK.findall(source_of(script)))


# -------------------------------------------------------------------------------------- imports
@every_script
def test_no_script_imports_another(script):
    assert not imported_packages(script) & set(SCRIPTS)


@every_script
def test_every_package_that_a_script_imports_is_required(script):
    third_party = imported_packages(script) - sys.stdlib_module_names
    assert third_party <= required_packages()
    if script in ("bigram", "gpt"):
        assert third_party == {"torch"}


def test_every_required_package_is_imported_by_a_script():
    imported = set()
    for script in SCRIPTS:
        imported |= imported_packages(script)
    assert required_packages() <= imported


@every_script
def test_no_script_uses_ctypes_or_a_private_name_of_another_package(script):
    assert not imported_packages(script) & {"ctypes", "fcntl"}
    allowed = {"_exit"}  # os._exit is documented
    for node in ast.walk(ast.parse(source_of(script))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id != "self":
            is_private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not is_private or node.attr in allowed, f"{node.value.id}.{node.attr} in line {node.lineno}"


# Imports every script after the functions that a script must not call at import were made to fail.
IMPORT_ALL = f"""
import argparse, importlib.util, os, signal, socket, subprocess, sys
import filelock, numpy, requests, tiktoken, torch

sys.dont_write_bytecode = True

def forbidden(name):
    def stop(*args, **kwargs):
        raise SystemExit(f"{{script}}.py calls {{name}} when it is imported")
    return stop

argparse.ArgumentParser.parse_args = forbidden("parse_args")
argparse.ArgumentParser.parse_known_args = forbidden("parse_known_args")
FORBIDDEN = [
    (torch.cuda, "is_available device_count current_device init get_device_properties get_device_name"),
    (torch.accelerator, "is_available current_accelerator device_count"),
    (torch.backends.mps, "is_available"),
    (torch.distributed, "init_process_group"),
    (torch, "manual_seed set_float32_matmul_precision"),
    (tiktoken, "get_encoding Encoding"),
    (filelock, "FileLock"),
    (requests, "get"),
    (signal, "signal"),
    (socket, "socket create_connection"),
    (subprocess, "Popen"),
    (os, "makedirs mkdir"),
]
for module, names in FORBIDDEN:
    for name in names.split():
        setattr(module, name, forbidden(f"{{module.__name__}}.{{name}}"))
for script in {SCRIPTS!r}:
    spec = importlib.util.spec_from_file_location(script, os.path.join({str(ROOT)!r}, script + ".py"))
    sys.modules[script] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[script])
    assert callable(sys.modules[script].main)
"""


def test_importing_a_script_does_nothing(tmp_path):
    """No output, no file, no flags read, no device probed, no network, no process and no signal handler."""
    line = [sys.executable, "-c", IMPORT_ALL, "--no_such_flag"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@every_script
def test_a_loaded_script_has_its_own_name(script):
    assert load(script).__name__ == script


# -------------------------------------------------------------------------------- command lines
@every_script
def test_help_explains_the_script_and_every_flag(script, monkeypatch):
    parsers = []
    parse_args = argparse.ArgumentParser.parse_args

    def remember_and_parse(parser):
        parsers.append(parser)
        return parse_args(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", remember_and_parse)
    done = call(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert ast.get_docstring(ast.parse(source_of(script)), clean=False).strip() in done.stdout
    for action in parsers[0]._actions:
        assert action.help, action.option_strings
        assert action.help.split()[0] in done.stdout
        name = action.option_strings[-1] if action.option_strings else action.metavar
        assert name in done.stdout


# ---------------------------------------------------------------------------------------- files
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
    assert hashlib.sha256(content).hexdigest() == "34a79dc2642bd1c1b01907ad2fd1b480384741cf14f39cb7b0571770efcf490b"
    assert len(set(content.decode("utf-8"))) == 65


def test_files_are_checked_out_with_lf_on_every_system():
    """Git on Windows converts line endings, which would change the tokens of input.txt."""
    names = ["input.txt", "train_gpt2.py", "README.md"]
    done = subprocess.run(["git", "check-attr", "eol", *names], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this copy is not a git checkout")
    assert done.stdout.splitlines() == [f"{name}: eol: lf" for name in names]
