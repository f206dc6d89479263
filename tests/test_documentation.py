"""The commands that README.md, docs/ and the scripts' docstrings show: they parse, and those of README.md run."""

import argparse
import ast
import re
import shlex
import shutil

import pytest
from conftest import ROOT, SCRIPTS, call

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# python SCRIPT.py or torchrun [flags] SCRIPT.py, perhaps after "$ " and variables such as OMP_NUM_THREADS=1
COMMAND = re.compile(r"\s*(?:\$ )?(?:\w+=\S+ )*(?:\S*python3?|torchrun)\s(?:[^#]*?\s)?(\w+)\.py\b(.*)")


def find_commands(text):
    """Return (script, list of arguments) of every command in a text that runs a script."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;|\||`", line):
            match = COMMAND.match(part)
            if match:
                commands.append((match[1], shlex.split(match[2], comments=True)))
    return commands


class Parsed(BaseException):
    """Raised in place of running a command whose flags argparse accepts. No script catches a BaseException."""


def check_commands(commands, monkeypatch):
    """Check that every command runs an existing script, with flags and values that the script accepts."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args):
        raise Parsed(parse_args(self, *args))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for script, arguments in commands:
        assert script in SCRIPTS, f"there is no {script}.py"
        with pytest.raises(Parsed):
            done = call(script, *arguments)
            pytest.fail(f"{script}.py {' '.join(arguments)}: {done.stderr}")


def test_commands_are_found_in_a_text():
    text = "Run `python gpt.py --seed 3` or\n$ A=b torchrun --standalone x.py --a \\\n  'b c' && python3 y.py # z\n"
    assert find_commands(text) == [("gpt", ["--seed", "3"]), ("x", ["--a", "b c"]), ("y", [])]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_of_a_document_parse(path, monkeypatch):
    commands = find_commands(path.read_text(encoding="utf-8"))
    if path.name == "README.md":
        assert commands, "README.md shows no command"
    check_commands(commands, monkeypatch)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_of_a_docstring_parse(script, monkeypatch):
    docstring = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8")))
    commands = [command for command in find_commands(docstring) if command[0] in SCRIPTS]
    assert script in [name for name, _ in commands], "the docstring must show how to run its script"
    check_commands(commands, monkeypatch)


# --------------------------------------------------------------------- the commands of README.md run
# Flags that are added to a command, so that it takes seconds.
SHORTER = {
    "bigram": ["--max_steps", 20, "--eval_iters", 2],
    "gpt": ["--max_steps", 2, "--eval_iters", 1, "--max_new_tokens", 4],
    "train_gpt2": ["--max_steps", 2, "--val_tokens", 640, "--max_new_tokens", 4, "--device", "cpu"],
    "sample": ["--max_new_tokens", 4],
}
# Arguments that need a network, a long time, a terminal, or something that such a command makes.
NOT_HERE = {
    "--download",
    "-",
    "data/tinyshakespeare/input.txt",
    "gpt2",
    "log_build_nanogpt",
    "log_gpt2",
    "log_plays",
}


def runs_here(script, arguments):
    """Return whether a command needs no network, no second machine, no GPU and no file that only its reader has."""
    if script == "train_gpt2":
        return "shakespeare" in arguments and "--block_size" not in arguments
    if script in ("fineweb", "hellaswag"):
        return False
    return not NOT_HERE & set(arguments) and "--preset full" not in " ".join(arguments)


def test_the_commands_of_the_readme_run_in_their_order(tmp_path, text_file, monkeypatch):
    """In one directory, each shortened only by flags behind it. sample.py loads the model that train_gpt2.py saved."""
    for script in SCRIPTS:
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    shutil.copy(ROOT / "input.txt", tmp_path)
    shutil.copy(text_file, tmp_path / "my_text.txt")  # the reader's own text
    monkeypatch.chdir(tmp_path)
    commands = []
    for command in find_commands((ROOT / "README.md").read_text(encoding="utf-8")):
        if command not in commands and runs_here(*command):
            commands.append(command)
    assert {script for script, _ in commands} >= {"prepare_shakespeare", "train_gpt2", "bigram", "gpt", "sample"}
    for script, arguments in commands:
        done = call(script, *arguments, *SHORTER.get(script, []))
        assert done.returncode == 0, f"{script}.py {arguments}: {done.stderr}"
        assert "error" not in done.stderr, f"{script}.py {arguments}: {done.stderr}"
    assert (tmp_path / "log" / "step_000002" / "model.safetensors").exists()
