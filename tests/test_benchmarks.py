"""The benchmarks at tiny sizes, as a user starts them: their rows, not their figures."""

import argparse
import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_MODEL, losses, read_log
from test_repo import DOCUMENTS

BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
SMALL = [*TINY_MODEL, "--total_batch_size", 128, "--micro_batch_size", 8, "--val_tokens", 400]


def benchmark(name, *args, env=None):
    """Run a benchmark in a process of its own; returns its CompletedProcess."""
    line = [sys.executable, ROOT / "benchmarks" / f"{name}.py", *map(str, args)]
    return subprocess.run(line, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=200)


def rows(text):
    """The rows of the last table in a text, each a list of its cells, without its head."""
    table = text.rpartition("|---|")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[1:]]


def load_benchmark(name):
    """A fresh copy of a benchmark, imported by path; sys.path, to which it adds the scripts, stays as it was."""
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


# --------------------------------------------------------------------------------------- the table
def test_table_joins_the_rows_of_benchmarks(tiktoken_cache):
    done = benchmark("table", "--quick", "--only", "sample", "hellaswag", "fineweb")
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert [what.split(",")[0] for what, *_ in found] == ["sampling", "sampling", "HellaSwag", "tokenising"]
    for _, here, peer, ratio, limit in found:
        assert re.match(r"[\d,.]+ \S+/s", here) and re.search(r" [\d,.]+ \S+/s$", peer) and limit
        assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", ratio)
    assert all("ids equal" in limit for what, *_, limit in found if what.startswith("sampling"))
    assert "4 of 4 predictions the same" in found[2][-1]
    assert torch.__version__ in done.stdout.splitlines()[0]


def test_table_has_a_row_for_a_benchmark_that_fails(tmp_path):
    """Without a network GPT-2's vocabulary cannot be fetched."""
    done = benchmark("table", "--quick", "--only", "fineweb", env={"TIKTOKEN_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 1
    (row,) = rows(done.stdout)
    assert row[0] == "fineweb" and row[1].startswith("failed: exit status 1") and row[2:] == ["", "", ""]


# ------------------------------------------------------------------------------- the training step
@pytest.fixture(scope="module")
def bench_step():
    return load_benchmark("bench_step")


def step_args(**values):
    """bench_step.py's flags for a model of 100,000 parameters."""
    sizes = dict(n_layer=1, n_head=2, n_embd=2, block_size=8, micro_batch_size=2, grad_accum_steps=1)
    return argparse.Namespace(**sizes | dict(device="cpu", dtype="float32", data_dir=None) | values)


def test_a_trick_turned_off_changes_no_loss(bench_step, monkeypatch):
    found = {}
    for name in ["ours", *(f"ours, {trick}" for trick in bench_step.TRICKS)]:
        for owner, what in (
            (torch.nn.functional, "scaled_dot_product_attention"),
            (bench_step.train_gpt2.GPT, "forward"),
        ):
            monkeypatch.setattr(owner, what, getattr(owner, what))  # is put back below, whatever a trick put there
        step, park = bench_step.make_step(name, step_args())
        found[name] = []
        for _ in range(3):
            found[name].append(step(2))
            park("cpu")
        monkeypatch.undo()
        assert found[name] == pytest.approx(found["ours"], abs=1e-5), name
    torch.set_float32_matmul_precision("highest")
    assert found["ours"][2] < found["ours"][0]


def test_attention_by_hand_is_the_fused_one(bench_step):
    qkv = torch.randn(3, 2, 4, 7, 5)  # (B, nh, T, hs) each
    theirs = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
    assert torch.allclose(bench_step.attention_by_hand(*qkv, 0.0, True), theirs, atol=1e-6)


def test_a_contestant_that_fails_is_a_row(byte_shards, tmp_path):
    (tmp_path / "transformers.py").write_text("raise MemoryError('a | b\\nc')")
    sizes = ["--n_layer", 1, "--n_head", 2, "--n_embd", 2, "--micro_batch_size", 1, "--block_size", 8, "--steps", 1]
    flags = [*sizes, "--data_dir", byte_shards, "--only", "ours"]
    done = benchmark("bench_step", *flags, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    theirs, ours = rows(done.stdout)
    assert theirs[0].endswith(": transformers") and theirs[1:] == ["failed: MemoryError: a / b", "", "", ""]
    assert ours[0].endswith(": ours") and ours[1].endswith(" tokens/s") and ours[2] == "none: transformers failed"


# -------------------------------------------------------------------------------------- whole runs
def test_bench_run_compares_settings(byte_shards):
    settings = ["--setting=", "--setting=--no_such_flag", "--setting=--optimizer muon --schedule linear"]
    flags = ["--preset", "shakespeare", "--data_dir", byte_shards, *SMALL]
    done = benchmark("bench_run", "--steps", 4, "--skip", 1, *settings, "--", *flags)
    assert done.returncode == 1 and "--no_such_flag" in done.stderr
    first, failed, muon = rows(done.stdout)
    assert first[0] == "as it is" and first[-1] == "1.00" and muon[0] == "--optimizer muon --schedule linear"
    assert failed[1].startswith("failed: exit status 2")
    seconds, speed, share, memory, ratio = (float(cell.replace(",", "").rstrip("%")) for cell in muon[1:])
    assert seconds > 0.5 and share > 0 and 0.05 < memory < 10  # torch's start alone takes longer, and more room
    assert ratio == pytest.approx(speed / float(first[2].replace(",", "")), abs=0.01)


def test_bench_recipe_says_what_the_logs_say_and_trains_once(byte_shards, tmp_path):
    flags = ["--preset", "shakespeare", "--data_dir", byte_shards, *SMALL, "--device", "cpu"]
    sizes = ["--adamw_rates", 1e-4, 1e-2, "--muon_rates", 2e-2, "--shares", 0.5, "--seeds", 1, 2]
    command = ["bench_recipe", "--steps", 6, *sizes, "--out_dir", tmp_path / "runs", "--", *flags]
    done = benchmark(*command)
    assert done.returncode == 0, done.stderr
    adamw, muon = rows(done.stdout)

    def mean(optimizer, rate, steps):
        runs = [tmp_path / "runs" / f"{optimizer}_rate_{rate}_steps_{steps}_seed_{seed}" for seed in (1, 2)]
        each = [losses(run, "val")[steps] for run in runs]
        return f"{sum(each) / 2:.4f} ({min(each):.4f} to {max(each):.4f})"

    assert adamw == ["adamw, 0.01", "1.00", "6", mean("adamw", "0.01", 6)]  # 1e-4 learns nothing in 6 steps
    assert muon == ["muon, 0.02", "0.50", "3", mean("muon", "0.02", 3)]
    reached = float(muon[3].split()[0]) <= float(adamw[3].split()[0])
    assert done.stdout.rstrip().endswith(": 0.5" if reached else ": none of these")
    log = read_log(tmp_path / "runs" / "muon_rate_0.02_steps_3_seed_1")
    assert (log[0, "lr"], log[2, "lr"]) == ("2.0000e-02", "1.1111e-02")  # a warmup and a schedule of its own length

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    again = benchmark(*command)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")} == before

    other = benchmark(*command, "--dropout", 0.1)
    assert other.returncode == 1 and other.stderr.startswith("error: ") and "another --out_dir" in other.stderr


# ------------------------------------------------------------------------------------ command lines
def commands(text):
    """The (benchmark, arguments) of every `python benchmarks/X.py ...` in a text."""
    found = re.findall(r"python benchmarks/(\w+)\.py([^`\n#;|]*)", text.replace("\\\n", " "))
    return [(name, shlex.split(arguments)) for name, arguments in found]


@pytest.mark.parametrize("path", [*DOCUMENTS, *(ROOT / "benchmarks").glob("*.py")], ids=lambda path: path.name)
def test_commands_of_benchmarks_parse(path, monkeypatch):
    class Parsed(Exception):
        pass

    def parse_and_stop(self, *args):
        raise Parsed(parse_args(self, *args))

    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text))
        assert path.stem in [name for name, _ in commands(text)], "a docstring shows how to run its script"
    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for name, arguments in commands(text):
        assert name in BENCHMARKS, f"there is no benchmarks/{name}.py"
        module = load_benchmark(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(Parsed):
            module.main()
