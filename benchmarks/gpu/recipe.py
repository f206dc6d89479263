"""
Compare Muon with AdamW on GPT-2 124M in a short training run, and the residual stream in bfloat16 with float32.

    python benchmarks/gpu/recipe.py --data_dir edu_fineweb10B --out_dir log_recipe    # one GPU; 9 minutes
    python benchmarks/gpu/recipe.py --device cpu --tiny                               # tries the script itself

First runs bench_recipe.py: AdamW with learning rates 6e-4 and 1.8e-3 for 430 steps of 65,536 tokens, 28M tokens in all,
and Muon with 1e-3 and 2e-3 for 0.6 and 0.4 of these steps. Then trains once more with AdamW at 6e-4 and the residual
stream in bfloat16, unless --seconds are over. So short a run can reject a setting, but not prove it. Without --data_dir
the data are the GPT-2 tokens of input.txt, far too few to learn from. The same command continues where it was stopped,
if it has an --out_dir.
"""

import re
import signal
import subprocess
import sys
import tempfile
import time

from gpu_common import BENCHMARKS, HERE, make_data, make_parser


def training_flags(args, data_dir):
    """Return the flags of train_gpt2.py for all runs."""
    values = {
        "data_dir": data_dir,
        "device": args.device,
        "dtype": "bfloat16",
        "total_batch_size": 65536,
        "micro_batch_size": 64,
        "val_tokens": 1966080,
        "eval_interval": 1000,  # only at the end, and at step 0
        "checkpoint_interval": 1000,
        "log_interval": 50,
    }
    # the same names with tiny values
    if args.tiny:
        tiny = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32}
        values.update(tiny, total_batch_size=128, micro_batch_size=2, val_tokens=128, max_new_tokens=1)
    flags = []
    for name, value in values.items():
        flags += [f"--{name}", str(value)]
    return flags


def compare_optimizers(args, out_dir, flags):
    """Run bench_recipe.py. Returns its exit status."""
    # one seed and a longer warmup: the run is short
    command = [sys.executable, f"{BENCHMARKS}/bench_recipe.py", "--out_dir", out_dir, "--seeds", "1337"]
    if args.tiny:
        command += ["--steps", "5", "--adamw_rates", "6e-4", "--muon_rates", "1e-3", "--fractions", "0.6"]
    else:
        command += ["--steps", "430", "--adamw_rates", "6e-4", "1.8e-3"]
        command += ["--muon_rates", "1e-3", "2e-3", "--fractions", "0.4", "0.6"]
    command += ["--warmup", "0.1", "--", *flags]
    return subprocess.run(command).returncode


def read_final_loss(log_dir):
    """Return the last validation loss of a run."""
    with open(f"{log_dir}/log.txt", encoding="utf-8") as file:
        return float(re.findall(r"^\d+ val (\S+)$", file.read(), re.M)[-1])


def compare_residuals(args, out_dir, flags):
    """Repeat the AdamW run at 6e-4 with the residual stream in bfloat16. Returns the exit status."""
    # the same flags as bench_recipe.py passes for the run to compare with
    steps = 5 if args.tiny else 430
    warmup_steps = max(1, round(0.1 * steps))
    log_dir = f"{out_dir}/adamw_bfloat16_residual"
    command = [sys.executable, f"{HERE}/bfloat16_residual.py", *flags, "--resume", "--log_dir", log_dir]
    command += ["--optimizer", "adamw", "--schedule", "cosine", "--learning_rate", "6e-4", "--seed", "1337"]
    command += ["--max_steps", str(steps), "--warmup_steps", str(warmup_steps), "--hellaswag_interval", "0"]
    status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    # compare the final losses
    if status == 0:
        usual = read_final_loss(f"{out_dir}/adamw_rate_0.0006_steps_{steps}_seed_1337")
        changed = read_final_loss(log_dir)
        print(
            f"\nresidual stream in bfloat16: val {changed:.4f}, in float32 {usual:.4f}, "
            f"difference {changed - usual:+.4f}"
        )
    return status


def parse_args():
    parser = make_parser(__doc__, "token shards of GPT-2's tokenizer (default: made from input.txt)")
    add = parser.add_argument
    add("--out_dir", help="directory of the runs (default: they are not kept)")
    add("--seconds", type=float, default=420, help="do not start the last run after this time (default: 420)")
    return parser.parse_args()


def main():
    begin = time.perf_counter()
    args = parse_args()
    with tempfile.TemporaryDirectory() as directory:
        out_dir = args.out_dir or f"{directory}/runs"
        flags = training_flags(args, args.data_dir or make_data(f"{directory}/data", "gpt2"))
        status = compare_optimizers(args, out_dir, flags)
        if status == 0 and time.perf_counter() - begin < args.seconds:
            status = compare_residuals(args, out_dir, flags)
        elif status == 0:
            print(f"\nresidual stream in bfloat16: not tried, --seconds {args.seconds:g} are over")
    sys.exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    main()
