"""What the GPU scripts share: their flags, the tiny sizes, and what they make of input.txt."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
BENCHMARKS = os.path.dirname(HERE)
if BENCHMARKS not in sys.path:
    sys.path.insert(0, BENCHMARKS)

from bench_hellaswag import make_examples, read_source  # noqa: E402 (BENCHMARKS must be in the path first)
from common import ROOT, machine_name, synchronize  # noqa: E402, F401 (used by the scripts)

TINY_SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 256}
INPUT = os.path.join(ROOT, "input.txt")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a network


def make_parser(description, data_help):
    """Return an argument parser with the flags that all GPU scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda", help="device (default: cuda)")
    add("--tiny", action="store_true", help="tiny sizes, to try the script on a CPU: the figures mean nothing")
    add("--data_dir", help=data_help)
    return parser


def make_data(directory, tokenizer):
    """Tokenize input.txt with prepare_shakespeare.py. Returns directory. Exits if that fails."""
    command = [sys.executable, f"{ROOT}/prepare_shakespeare.py", "--input", INPUT]
    command += ["--tokenizer", tokenizer, "--out_dir", directory]
    status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if status:
        sys.exit(status)  # prepare_shakespeare.py has printed the reason
    return directory


def write_hellaswag(path, tokenizer, num_examples):
    """Write examples in the form of HellaSwag, cut from input.txt, as JSON lines."""
    with open(path, "w", encoding="utf-8") as file:
        for example in make_examples(read_source(INPUT), tokenizer, num_examples):
            endings = [tokenizer.decode(ending).removeprefix(" ") for ending in example.endings]
            line = {"ind": example.ind, "label": example.label}
            line["ctx"] = tokenizer.decode(example.context)
            line["endings"] = endings
            file.write(json.dumps(line) + "\n")


def call_script(function, flags, output_path):
    """Call the main function of an imported script with flags. Its output goes to a file. Returns the exit status."""
    arguments = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [function.__module__, *flags]
    try:
        with (
            open(output_path, "w", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            function()
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = arguments
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def seconds_of(function, device, repeats=10, warmup=3):
    """Return the mean seconds of a call, after some calls that do not count."""
    for _ in range(warmup):
        function()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / repeats
