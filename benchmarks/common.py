"""What the benchmarks share: their table, the machine's name, and the speed of its matmuls."""

import argparse
import os
import statistics
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)  # so that benchmarks can import the scripts

HEADER = "| task | ours | peer | ratio (range) | fraction of the limit |\n|---|---|---|---|---|"


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and shows the defaults."""


def make_parser(description):
    """Return a parser whose help shows a benchmark's docstring and the defaults of its flags."""
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)


def row(task, ours, peer="", ratios=(), limit=""):
    """Return a row of the table.

    ratios are those of the single rounds: their median and their range are shown.
    """
    ratio = ""
    if ratios:
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {task} | {ours} | {peer} | {ratio} | {limit} |"


def environment(device):
    """Return one line about what was measured: the version of PyTorch, the machine and the date."""
    return f"torch {torch.__version__}, {machine_name(device)}, {time.strftime('%Y-%m-%d')}"


def machine_name(device):
    """Return the name of the GPU, or of the CPU with its threads and its fast bfloat16 units."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = "CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    capabilities = torch.cpu.get_capabilities()
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if capabilities.get(unit)]
    return f"{name} ({', '.join(units) or 'no bfloat16 units'}), {torch.get_num_threads()} threads"


def synchronize(device):
    """Wait until a GPU has finished everything."""
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_peak(device, dtype):
    """Return the FLOP/s of a large square matmul, the best within half a second."""
    n = 8192 if device == "cuda" else 2048
    # repeat, because other programs and the clock of the processor disturb single measurements
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = 0.0
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best
