"""The benchmarks at tiny sizes on the CPU: what they print and compare, not their figures."""

import argparse
import os
import re
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, call, load, succeed, tiny_flags
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

MODEL = "--n_layer 1 --n_head 2 --n_embd 32"
STEP = f"{MODEL} --micro_batch_size 2 --block_size 16 --grad_accum_steps 2 --steps 2"


@pytest.fixture(autouse=True)
def compiler_caches():
    """Switch the caches of torch.compile on again, which a benchmark switches off."""
    yield
    torch.compiler.config.force_disable_caches = False


def rows(text):
    """Return the rows of the last table in a text, each a list of cells, without its header."""
    table = text.rpartition("|---|")[2].partition("\n\n")[0]
    cells = []
    for line in table.splitlines()[1:]:
        cells.append([cell.strip() for cell in line.split("|")[1:-1]])
    return cells


# ------------------------------------------------------------------------- comparisons with others
SAMPLE = f"{MODEL} --prompt_tokens 4 --max_new_tokens 4 --rounds 1 --batch_sizes"
HELLASWAG = f"{MODEL} --source {ROOT}/input.txt --examples 2 --parts 1"
COMPARISONS = {  # flags, number of rows, what the last column says
    "bench_step": (f"{STEP} --only transformers ours", 2, "of the matmul peak"),
    "bench_sample": (f"{SAMPLE} 1 2", 2, "tokens equal"),
    "bench_hellaswag": (HELLASWAG, 1, "2 of 2 predictions equal"),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_benchmark_compares_with_its_peer(name, tiktoken_cache):
    flags, number, words = COMPARISONS[name]
    table = rows(succeed(name, *flags.split(), "--device", "cpu").stdout)
    assert len(table) == number
    task, ours, peer, ratio, limit = table[-1]
    assert re.match(r"[\d,.]+ \S+/s", ours)
    assert re.search(r": [\d,.]+ \S+/s$", peer)
    assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", ratio)
    assert words in limit


# -------------------------------------------------------------------------- variants of the step
def step_args(**changes):
    """Return the arguments of bench_step.py for a model of 400,000 parameters."""
    args = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "micro_batch_size": 2}
    args |= {"grad_accum_steps": 1, "device": "cpu", "dtype": "float32"}
    return argparse.Namespace(**{**args, **changes})


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_every_variant_of_a_step_has_the_same_losses(dtype, tolerance):
    bench_step = load("bench_step")
    losses = {}
    for name, variant in bench_step.VARIANTS.items():
        needs_autocast = variant.bfloat16_residual and dtype == "float32"
        if variant.is_ours and not variant.compile and not needs_autocast:
            contestant = bench_step.Contestant(variant, step_args(dtype=dtype))
            losses[name] = [contestant.step()[1] for _ in range(3)]
    assert len(losses) >= 4
    assert losses["ours"][2] < losses["ours"][0]
    for name, values in losses.items():
        assert values == pytest.approx(losses["ours"], abs=tolerance), name


@pytest.mark.skipif("INDUCTOR" not in os.environ, reason="takes a minute and a C++ compiler: set INDUCTOR=1")
def test_a_compiled_variant_computes_with_its_own_attention_kernel():
    """Without OWN_CODE, torch.compile reuses the code of a model of equal structure, with the kernel of that model."""
    bench_step = load("bench_step")
    torch.compiler.config.force_disable_caches = True  # as main() does
    usual = bench_step.VARIANTS["ours compiled"]
    other = bench_step.Variant(compile=True, options=bench_step.OWN_CODE, attention=[SDPBackend.MATH])
    kernels = []
    for variant in (usual, other):
        contestant = bench_step.Contestant(variant, step_args())
        with torch.no_grad():  # compiling the forward pass is enough
            contestant.loss()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                contestant.loss()
        kernels.append({event.key for event in profiler.key_averages()})
    assert "flash_attention" in str(kernels[0])
    assert "flash_attention" not in str(kernels[1])


# ------------------------------------------------------------------------------------ other tables
def test_bench_fineweb_compares_with_a_pool(text_file, tmp_path, tiktoken_cache):
    path = tmp_path / "documents.parquet"
    pq.write_table(pa.table({"text": [text_file.read_text()[:5000]] * 50}), path)
    done = succeed("bench_fineweb", "--source", path, "--rounds", 1)
    assert rows(done.stdout)[0][0].startswith("tokenizing")


def test_bench_loader_reports_memory_and_time():
    flags = "--num_shards 3 --steps 200 --batch_size 2 --block_size 32"
    done = succeed("bench_loader", *flags.split())
    first, *lines = done.stdout.splitlines()
    assert first.startswith("start-up: 3 shards, ")
    assert [int(re.match(r"step +(\d+): ", line)[1]) for line in lines] == [20 * i for i in range(1, 11)]


def test_bench_run_compares_settings_and_measures_pauses(byte_shards):
    changes = dict.fromkeys(("max_steps", "eval_interval", "checkpoint_interval", "log_interval"))
    flags = ["--", "--preset", "shakespeare", "--data_dir", byte_shards, *tiny_flags(**changes)]
    settings = ["--setting=", "--setting=--no_such_flag"]
    done = call("bench_run", "--steps", 4, "--skip", 1, *settings, *flags)
    assert done.returncode == 1
    usual, failed = rows(done.stdout)
    values = [float(cell.replace(",", "")) for cell in usual[1:]]
    seconds, speed, memory, ratio = values
    assert seconds > 0.5  # importing torch alone takes longer
    assert speed > 0 and 0.05 < memory < 10 and ratio == 1
    assert failed[1].startswith("failed with exit status 2")
    # a checkpoint and a validation take time, and HellaSwag does not happen with bytes
    done = call("bench_run", "--pauses", *flags)
    seconds = {what: float(value) for what, value in rows(done.stdout)}
    assert list(seconds) == ["checkpoint", "validation", "HellaSwag"]
    assert seconds["checkpoint"] > 0.005 and seconds["validation"] > 0.005


def test_bench_recipe_reports_what_the_logs_say(byte_shards, tmp_path, monkeypatch):
    def run_here(command, **options):
        return call(Path(command[1]).stem, *command[2:])

    monkeypatch.setattr(subprocess, "run", run_here)  # a new process needs seconds for its imports
    changes = dict.fromkeys(("max_steps", "warmup_steps", "learning_rate"))
    flags = ["--steps", 6, "--adamw_rates", 1e-4, 1e-2, "--muon_rates", 2e-2, "--fractions", 0.5]
    flags += ["--seeds", 1, "--bfloat16_residual", "--out_dir", tmp_path, "--", "--data_dir", byte_shards]
    done = succeed("bench_recipe", *flags, *tiny_flags(**changes, dtype="bfloat16"))

    def loss(run, steps):
        log = (tmp_path / f"{run}_steps_{steps}_seed_1" / "log.txt").read_text()
        value = re.search(rf"^{steps} val (\S+)$", log, re.M)[1]
        return f"{value} ({value} to {value})"

    # a rate of 1e-4 learns nothing in 6 steps, so 1e-2 is the best
    assert rows(done.stdout) == [
        ["adamw, 0.01", "1.00", "6", loss("adamw_rate_0.01", 6)],
        ["adamw_bfloat16_residual, 0.01", "1.00", "6", loss("adamw_bfloat16_residual_rate_0.01", 6)],
        ["muon, 0.02", "0.50", "3", loss("muon_rate_0.02", 3)],
    ]
