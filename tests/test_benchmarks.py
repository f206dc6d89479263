"""The benchmarks at tiny sizes on the CPU: what they print and compare, not their figures.

Where a benchmark starts other programs, most tests let it call them in this process, which is faster.
"""

import argparse
import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call, load, losses, read_log, tiny_flags
from test_documentation import DOCUMENTS

BENCHMARKS = ROOT / "benchmarks"
# common.py and gpu_common.py are imported only, and check.py starts gloo_rank.py
NOT_PROGRAMS = ("common", "gpu/gpu_common", "gpu/gloo_rank")
NAMES = sorted(path.relative_to(BENCHMARKS).with_suffix("").as_posix() for path in BENCHMARKS.rglob("*.py"))
PROGRAMS = [name for name in NAMES if name not in NOT_PROGRAMS]
GPU_SCRIPTS = ("check", "speed", "run", "recipe")
TINY_TRAINING = tiny_flags(max_steps=None, warmup_steps=None, learning_rate=None, eval_interval=None)


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    """Benchmarks import from the directory they are started in; the list of directories is restored afterwards."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS / "gpu"), str(BENCHMARKS), *sys.path])


@pytest.fixture(autouse=True)
def matmul_precision():
    """Restore the matmul precision, which some benchmarks change for the whole process."""
    yield
    torch.set_float32_matmul_precision("highest")


def load_benchmark(name):
    """Return a fresh copy of a benchmark, such as "bench_step" or "gpu/check"."""
    path = BENCHMARKS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def call_benchmark(name, *args):
    """Run main() of a benchmark in this process; returns its CompletedProcess."""
    return call(load_benchmark(name), *args)


def run_here(command, cwd=None, stdout=None, **options):
    """Stand in for subprocess.run: run a Python program of this repository in this process."""
    program = Path(command[1])
    directory = os.getcwd()
    os.chdir(cwd or directory)
    try:
        if program.parent == ROOT:
            done = call(program.stem, *command[2:])
        else:
            done = call_benchmark(program.relative_to(BENCHMARKS).with_suffix("").as_posix(), *command[2:])
    finally:
        os.chdir(directory)
    if hasattr(stdout, "write"):
        stdout.write(done.stdout + done.stderr)
    return done


def without_processes(module):
    """Let a loaded benchmark run other programs in this process."""
    module.subprocess = SimpleNamespace(
        run=run_here,
        PIPE=subprocess.PIPE,
        DEVNULL=subprocess.DEVNULL,
        STDOUT=subprocess.STDOUT,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    return module


def rows(text):
    """Return the rows of the last table in a text, each a list of cells, without its header."""
    table = text.rpartition("|---|")[2].partition("\n\n")[0]
    cells = []
    for line in table.splitlines()[1:]:
        cells.append([cell.strip() for cell in line.split("|")[1:-1]])
    return cells


# -------------------------------------------------------------------------------------- run_all
def test_run_all_joins_the_rows_of_the_benchmarks(tiktoken_cache):
    run_all = without_processes(load_benchmark("run_all"))

    def run(command, **options):
        # bench_fineweb.py starts processes, which import it by its name
        if command[1].endswith("bench_fineweb.py"):
            return subprocess.run(command, **options)
        return run_here(command)

    run_all.subprocess.run = run
    done = call(run_all, "--quick", "--dtypes", "float32")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout.splitlines()[0]
    table = rows(done.stdout)
    assert [task.split(",")[0] for _, task, *_ in table] == [
        "training step", "sampling", "sampling", "HellaSwag", "tokenizing",
    ]  # fmt: skip
    for machine, task, ours, peer, ratio, limit in table:
        assert machine.endswith(" threads") and task and limit
        assert re.match(r"[\d,.]+ \S+/s", ours)
        assert re.search(r": [\d,.]+ \S+/s$", peer)
        assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", ratio)
    assert all("tokens equal" in row[-1] for row in table if row[1].startswith("sampling"))
    assert "4 of 4 predictions equal" in table[3][-1]


def test_run_all_has_a_row_for_a_benchmark_that_fails(tmp_path, monkeypatch):
    """Without a network GPT-2's vocabulary cannot be downloaded."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    done = call_benchmark("run_all", "--quick", "--only", "fineweb")
    assert done.returncode == 1
    (row,) = rows(done.stdout)
    assert row[1].startswith("bench_fineweb.py")
    assert row[2].startswith("failed: exit status 1")
    assert row[3:] == ["", "", ""]


@pytest.mark.parametrize(("device", "dtypes"), [("cpu", ["float32", "bfloat16"]), ("cuda", ["bfloat16"])])
def test_run_all_measures_each_task_in_each_dtype(device, dtypes, monkeypatch, tmp_path):
    run_all = load_benchmark("run_all")
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--device", device, "--source", "a.parquet"])
    commands = run_all.make_commands(run_all.parse_args(), tmp_path)
    expected = []
    for name in ("step", "sample", "hellaswag"):
        expected += [(name, dtype) for dtype in dtypes]
    names_and_dtypes = [(name, flags[flags.index("--dtype") + 1]) for name, flags in commands[:-1]]
    assert names_and_dtypes == expected
    assert commands[-1] == ("fineweb", ["--source", "a.parquet"])


# ----------------------------------------------------------------------------------- bench_step
@pytest.fixture(scope="module")
def bench_step():
    before = list(sys.path)
    sys.path[:0] = [str(BENCHMARKS)]
    module = load_benchmark("bench_step")
    sys.path[:] = before
    return module


def step_args(**changes):
    """Return bench_step.py's flags for a model of 100,000 parameters."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 2, "block_size": 8, "micro_batch_size": 2, "grad_accum_steps": 1}
    return argparse.Namespace(**{**sizes, "device": "cpu", "dtype": "float32", **changes})


def losses_of_contestant(bench_step, name, dtype):
    """Return the losses of three steps."""
    contestant = bench_step.Contestant(name, step_args(dtype=dtype))
    three = []
    for _ in range(3):
        contestant.step()
        three.append(contestant.last_loss)
    return three


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_a_variant_of_the_step_changes_no_loss(dtype, tolerance, bench_step):
    originals = bench_step.train_gpt2.cross_entropy, torch.nn.functional.scaled_dot_product_attention
    expected = losses_of_contestant(bench_step, "ours", dtype)
    assert expected[2] < expected[0]
    variants = [name for name in bench_step.PEERS if name.startswith("ours, ")]
    assert len(variants) == 4
    if dtype == "float32":
        variants.remove("ours, bfloat16 residual")  # it is a variant of autocast
    for name in variants:
        assert losses_of_contestant(bench_step, name, dtype) == pytest.approx(expected, abs=tolerance), name
        # a variant that replaces a function puts it back
        assert (bench_step.train_gpt2.cross_entropy, torch.nn.functional.scaled_dot_product_attention) == originals


def test_the_bfloat16_residual_variant_has_a_residual_stream_in_bfloat16(bench_step):
    contestant = bench_step.Contestant("ours, bfloat16 residual", step_args(dtype="bfloat16"))
    dtypes = []
    for block in contestant.model.h:
        block.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    contestant.step()
    assert dtypes == [torch.bfloat16]


def test_plain_attention_equals_the_fused_one(bench_step):
    q, k, v = torch.randn(3, 2, 4, 7, 5)  # (B, nh, T, hs) each
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(bench_step.plain_attention(q, k, v, 0.0, True), expected, atol=1e-6)


def test_a_contestant_that_fails_is_a_row(bench_step, monkeypatch):
    def fail(self):
        raise MemoryError("a | b\nc")

    monkeypatch.setattr(bench_step.Contestant, "make_theirs", fail)
    sizes = ["--n_layer", 1, "--n_head", 2, "--n_embd", 2, "--micro_batch_size", 1, "--block_size", 8, "--steps", 1]
    done = call(bench_step, *sizes, "--only", "ours")
    assert done.returncode == 0, done.stderr
    theirs, ours = rows(done.stdout)
    assert theirs[0].endswith(": transformers")
    assert theirs[1:] == ["failed: MemoryError: a / b c", "", "", ""]
    assert ours[0].endswith(": ours")
    assert ours[1].endswith(" tokens/s")
    assert ours[2] == "none: transformers failed"


# ---------------------------------------------------------------------------- loader, whole runs
def test_bench_loader_reports_memory_and_time():
    done = call_benchmark("bench_loader", "--num_shards", 3, "--steps", 200, "--batch_size", 2, "--block_size", 32)
    assert done.returncode == 0, done.stderr
    start, *lines = done.stdout.splitlines()
    assert start.startswith("start-up: 3 shards, ")
    assert [int(re.match(r"step +(\d+): ", line)[1]) for line in lines] == [20 * i for i in range(1, 11)]
    assert all(re.search(r"[\d.]+ MB own, [\d.]+ MB mapped, \d+ us per batch$", line) for line in lines)


def test_bench_run_compares_settings(byte_shards):
    settings = ["--setting=", "--setting=--no_such_flag", "--setting=--optimizer muon --schedule linear"]
    flags = ["--preset", "shakespeare", "--data_dir", byte_shards, *TINY_TRAINING]
    done = call_benchmark("bench_run", "--steps", 4, "--skip", 1, *settings, "--", *flags)
    assert done.returncode == 1
    first, failed, muon = rows(done.stdout)
    assert first[0] == "default"
    assert first[-1] == "1.00"
    assert failed[1].startswith("failed with exit status 2")
    assert muon[0] == "--optimizer muon --schedule linear"
    seconds, speed, memory, ratio = (float(cell.replace(",", "")) for cell in muon[1:])
    assert seconds > 0.5  # importing torch alone takes longer
    assert 0.05 < memory < 10
    assert ratio == pytest.approx(speed / float(first[2].replace(",", "")), abs=0.01)


def test_bench_recipe_reports_what_the_logs_say_and_trains_once(byte_shards, tmp_path):
    out_dir = tmp_path / "runs"
    command = ["--steps", 6, "--adamw_rates", 1e-4, 1e-2, "--muon_rates", 2e-2, "--fractions", 0.5, "--seeds", 1, 2]
    command += ["--out_dir", out_dir, "--", "--preset", "shakespeare", "--data_dir", byte_shards, *TINY_TRAINING]
    done = call(without_processes(load_benchmark("bench_recipe")), *command)
    assert done.returncode == 0, done.stderr
    adamw, muon = rows(done.stdout)

    def mean(optimizer, rate, steps):
        runs = [out_dir / f"{optimizer}_rate_{rate}_steps_{steps}_seed_{seed}" for seed in (1, 2)]
        each = [losses(run, "val")[steps] for run in runs]
        return f"{sum(each) / 2:.4f} ({min(each):.4f} to {max(each):.4f})"

    # a rate of 1e-4 learns nothing in 6 steps, so 1e-2 is the best
    assert adamw == ["adamw, 0.01", "1.00", "6", mean("adamw", "0.01", 6)]
    assert muon == ["muon, 0.02", "0.50", "3", mean("muon", "0.02", 3)]
    reached = float(muon[3].split()[0]) <= float(adamw[3].split()[0])
    assert done.stdout.rstrip().endswith(": 0.5" if reached else ": none of these")
    # warmup and schedule are scaled to the length of the run
    log = read_log(out_dir / "muon_rate_0.02_steps_3_seed_1")
    assert (log[0, "lr"], log[2, "lr"]) == ("2.0000e-02", "1.1111e-02")

    # the same command reads the losses of the finished runs
    before = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
    again = call_benchmark("bench_recipe", *command)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")} == before

    # with other flags the directory is refused
    other = call_benchmark("bench_recipe", *command, "--dropout", 0.1)
    assert str(other.returncode).startswith("error: ")
    assert "another --out_dir" in other.returncode


# -------------------------------------------------------------------------------- gpu/check.py
def check_lines(done):
    """Return {check: "ok" or "FAIL"} from what check.py printed; every line must be one of these."""
    lines = {}
    for line in done.stdout.splitlines():
        match = re.fullmatch(r"(ok|FAIL) +(\w+): .+ \([\d.]+ s\)", line)
        assert match, line
        lines[match[2]] = match[1]
    return lines


def test_all_gpu_checks_pass_on_the_cpu(byte_shards, tiktoken_cache):
    check = load_benchmark("gpu/check")
    done = call(check, "--device", "cpu", "--tiny", "--data_dir", byte_shards)
    assert check_lines(done) == {function.__name__: "ok" for function in check.CHECKS}, done.stdout
    assert done.returncode == 0


def plant_wrong_loss(check):
    original = check.train_gpt2.cross_entropy
    check.train_gpt2.cross_entropy = lambda logits, targets: 1.001 * original(logits, targets)
    return {"loss_in_float32": "FAIL", "logits_of_sample": "ok"}


def plant_wrong_gradient(check):
    # the loss is right, but its gradient is a thousandth too large
    original = check.train_gpt2.cross_entropy

    def cross_entropy(logits, targets):
        loss = original(logits, targets)
        return loss + 0.002 * (loss - loss.detach())

    check.train_gpt2.cross_entropy = cross_entropy
    return {"loss_in_float32": "ok", "gradients_in_float32": "FAIL"}


def plant_wrong_logits(check):
    original = check.sample.GPT.logits
    check.sample.GPT.logits = lambda self, x: 1.001 * original(self, x)
    return {"logits_of_sample": "FAIL", "logits_of_hellaswag": "ok"}


def plant_wrong_text(check):
    original = check.sample.GPT.logits
    check.sample.GPT.logits = lambda self, x: -original(self, x)
    return {"greedy_text_in_float32": "FAIL", "greedy_text_in_16_bits": "FAIL"}


def plant_wrong_hellaswag(check):
    original = check.train_gpt2.evaluate_hellaswag
    check.train_gpt2.evaluate_hellaswag = lambda *args: original(*args) / 2
    return {"hellaswag_in_training": "FAIL"}


def plant_lost_optimizer_state(check):
    def load_optimizers(model, trainer_state, device, rank, world_size):
        return check.train_gpt2.configure_optimizers(model, "adamw", 1e-3, 0.1, device)

    check.train_gpt2.load_optimizers = load_optimizers
    return {"run_eager": "ok", "run_resumed": "FAIL"}


def plant_failing_run(check):
    def init_precision(*args):
        raise RuntimeError("no\nfloat")

    check.train_gpt2.init_precision = init_precision
    return {"run_with_muon": "FAIL"}


FAULTS = [
    plant_wrong_loss,
    plant_wrong_gradient,
    plant_wrong_logits,
    plant_wrong_text,
    plant_wrong_hellaswag,
    plant_lost_optimizer_state,
    plant_failing_run,
]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_gpu_checks_find_a_planted_fault(plant, byte_shards, tiktoken_cache):
    # fresh copies of the scripts, so that the fault is gone afterwards
    scripts = {script: load(script) for script in ("train_gpt2", "sample", "hellaswag")}
    check = load_benchmark("gpu/check")
    assert {name: getattr(check, name) for name in scripts} == scripts
    expected = plant(check)
    try:
        done = call(check, "--device", "cpu", "--tiny", "--data_dir", byte_shards, "--only", *expected)
    finally:
        for script in scripts:
            load(script)
    assert check_lines(done) == expected, done.stdout
    assert done.returncode == 1


# ------------------------------------------------------------- gpu/speed.py, run.py and recipe.py
def test_gpu_speed_prints_a_row_for_each_variant(byte_shards, tiktoken_cache):
    names = ["compiled", "bfloat16 residual, tuned", "split for DDP", "eager"]
    flags = ["--device", "cpu", "--tiny", "--data_dir", byte_shards]
    done = call_benchmark("gpu/speed", *flags, "--only", "limits", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    table = {}
    for line in done.stdout.splitlines():
        if line.startswith("| ") and not line.startswith("| variant"):
            name, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
            table[name] = cells
    assert set(table) == set(names)
    # every variant computes the same loss
    expected = float(table["eager"][-1])
    assert all(float(cells[-1]) == pytest.approx(expected, abs=0.01) for cells in table.values())
    for text in ("memory: ", "no step can be faster than", "attention, flash", "validation, compiled", "Muon for"):
        assert text in done.stdout
    assert "10,042 examples take" in done.stdout


def test_gpu_speed_skips_what_it_has_no_time_for_and_reports_what_fails(byte_shards, monkeypatch):
    flags = ["--device", "cpu", "--tiny", "--data_dir", byte_shards, "--only", "eager"]
    speed = load_benchmark("gpu/speed")
    done = call(speed, *flags, "--seconds", 0)
    assert done.returncode == 0
    assert "| eager | skipped: --seconds 0 are over |" in done.stdout

    def fail(variant, setup):
        raise ValueError("no such option\nin this version")

    monkeypatch.setattr(speed, "measure", fail)
    done = call(speed, *flags)
    assert done.returncode == 1
    assert "| eager | failed: ValueError: no such option |" in done.stdout


def test_gpu_run_runs_the_scripts(byte_shards, tiktoken_cache, tmp_path):
    run = without_processes(load_benchmark("gpu/run"))
    steps = ["train", "hellaswag", "sample", "shakespeare", "gpt"]
    done = call(run, "--device", "cpu", "--tiny", "--only", *steps, "--out_dir", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok", "FAIL"))]
    expected = [
        "prepare",
        "train",
        "hellaswag",
        "hellaswag",
        "sample",
        "sample",
        "sample",
        "sample",
        "shakespeare",
        "gpt",
    ]
    assert [line.split(":")[0] for line in lines] == [f"ok   {step}" for step in expected]
    assert "HellaSwag acc_norm: " in done.stdout
    assert re.search(r"^     8 acc: [\d.]+ acc_norm: [\d.]+$", done.stdout, re.M)
    assert len(list((tmp_path / "out").iterdir())) == 10


def test_gpu_run_reports_a_command_that_fails_and_stops_in_time(byte_shards):
    run = without_processes(load_benchmark("gpu/run"))
    run.subprocess.run = lambda *args, **options: SimpleNamespace(returncode=7)
    flags = ["--device", "cpu", "--tiny", "--data_dir", byte_shards, "--only", "bench_run"]
    done = call(run, *flags)
    assert done.returncode == 1
    assert "FAIL bench_run: " in done.stdout
    assert "exit status 7" in done.stdout
    done = call(run, *flags, "--seconds", 0)
    assert done.returncode == 1
    assert "FAIL bench_run: not started" in done.stdout


@pytest.mark.parametrize("tiny", [False, True], ids=["full size", "tiny"])
def test_the_commands_of_gpu_run_parse(tiny, monkeypatch, tmp_path):
    run = load_benchmark("gpu/run")
    commands = run.Commands(argparse.Namespace(device="cpu", tiny=tiny, data_dir=None), str(tmp_path))
    commands.add_scripts()
    commands.add_benchmarks()
    assert len(commands.commands) == 15
    for _, command, _, _ in commands.commands:
        check_parses(command, monkeypatch)


def test_gpu_recipe_compares_optimizers_and_residuals(byte_shards, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[__name__], "load_benchmark", load_without_processes)
    recipe = without_processes(load_benchmark("gpu/recipe"))
    out_dir = tmp_path / "runs"
    done = call(recipe, "--device", "cpu", "--tiny", "--data_dir", byte_shards, "--out_dir", out_dir)
    load("train_gpt2")  # without what bfloat16_residual.py changed
    assert done.returncode == 0, done.stdout + done.stderr
    usual = losses(out_dir / "adamw_rate_0.0006_steps_5_seed_1337", "val")[5]
    changed = losses(out_dir / "adamw_bfloat16_residual", "val")[5]
    assert f"val {changed:.4f}, in float32 {usual:.4f}" in done.stdout
    assert changed == pytest.approx(usual, abs=0.01)
    assert losses(out_dir / "muon_rate_0.001_steps_3_seed_1337", "val")


original_load_benchmark = load_benchmark


def load_without_processes(name):
    """Return a fresh copy of a benchmark that runs other programs in this process."""
    module = original_load_benchmark(name)
    if hasattr(module, "subprocess"):
        without_processes(module)
    return module


# -------------------------------------------------------------------------------- command lines
class Parsed(BaseException):
    """Raised in place of running a program whose flags argparse accepts."""


def check_parses(command, monkeypatch):
    """Check that the program in a command line accepts its flags."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args):
        raise Parsed(parse_args(self, *args))

    with monkeypatch.context() as patches:
        patches.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            done = run_here(command)
            pytest.fail(f"{shlex.join(map(str, command))}: {done.stderr}")


def find_benchmark_commands(text):
    """Return (name, arguments) of every `python benchmarks/NAME.py ...` in a text."""
    found = re.findall(r"python benchmarks/([\w/]+)\.py([^`\n#;|]*)", text.replace("\\\n", " "))
    return [(name, shlex.split(re.sub(r" 2?> ?\S+", "", arguments))) for name, arguments in found]


PLACES = [*DOCUMENTS, *sorted(BENCHMARKS.rglob("README.md")), *(BENCHMARKS / f"{name}.py" for name in PROGRAMS)]


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_commands_of_benchmarks_parse(path, monkeypatch):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text))
        name = path.relative_to(BENCHMARKS).with_suffix("").as_posix()
        assert name in [shown for shown, _ in find_benchmark_commands(text)], "a docstring shows how to run its script"
    for name, arguments in find_benchmark_commands(text):
        assert name in PROGRAMS, f"benchmarks/{name}.py does not exist"
        check_parses([sys.executable, BENCHMARKS / f"{name}.py", *arguments], monkeypatch)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_help_of_a_benchmark_explains_every_flag(name, monkeypatch):
    helps = {}
    add_argument = argparse.ArgumentParser.add_argument

    def remember(self, *names, **options):
        helps[names[-1]] = options.get("help")
        return add_argument(self, *names, **options)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", remember)
    done = call_benchmark(name, "--help")
    load("train_gpt2")  # without what bfloat16_residual.py changed
    assert done.returncode == 0
    assert "python " in done.stdout
    assert all(helps.values()), helps


def test_every_benchmark_is_in_the_index():
    index = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for name in PROGRAMS:
        if "/" not in name:
            assert f"`{name}.py`" in index
    gpu_index = (BENCHMARKS / "gpu" / "README.md").read_text(encoding="utf-8")
    for name in GPU_SCRIPTS:
        assert f"python benchmarks/gpu/{name}.py" in gpu_index
