"""
Training runs killed with SIGKILL at random moments and started again with the same command, until they are done.

    python benchmarks/torture.py                 # 50 runs; about ten minutes on two CPU cores
    python benchmarks/torture.py --runs 5 --seed 7

Each run is of a small model with dropout and is killed once or twice: while a checkpoint is being written, in the
middle of training, or while it starts. It must end with the model.safetensors of an uninterrupted run, byte for
byte, and with its train, val and lr lines in log.txt. Prints one line a run and a count; exits 1 at a difference.
"""

import argparse
import glob
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
STEPS = 60
FLAGS = f"--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --dropout 0.1 --max_steps {STEPS} --warmup_steps 5 "
FLAGS += "--total_batch_size 512 --micro_batch_size 8 --learning_rate 1e-2 --checkpoint_interval 3 --eval_interval 10 "
FLAGS += "--val_tokens 640 --log_interval 1 --max_new_tokens 8 --prompt A --device cpu --no-plot --resume"


def make_data(directory):
    """A data set of input.txt's bytes: two shards to train on and one for validation."""
    with open(f"{ROOT}/input.txt", "rb") as file:
        tokens = np.frombuffer(file.read(), dtype=np.uint8).astype("<u2")
    meta = {"tokenizer": "bytes", "vocab_size": 257, "eot_token": 256, "source": {}, "shards": []}
    for name, part in (
        ("train_000000", tokens[:9000]),
        ("train_000001", tokens[9000:20000]),
        ("val_000000", tokens[-4000:]),
    ):
        path = f"{directory}/text_{name}.npy"
        np.save(path, part)
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        meta["shards"].append({"file": os.path.basename(path), "tokens": len(part), "sha256": digest})
    with open(f"{directory}/meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file)


def start(data_dir, log_dir):
    """The command that every start of a run uses, in a process of its own."""
    line = [sys.executable, f"{ROOT}/train_gpt2.py", *FLAGS.split(), "--data_dir", data_dir, "--log_dir", log_dir]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # one thread adds in one order
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, text=True)


def wait_for(process, condition):
    """Wait until condition holds or the process has ended by itself; returns whether it still runs."""
    while process.poll() is None and not condition():
        time.sleep(0.0005)  # a checkpoint of a small model is written in a few milliseconds
    return process.poll() is None


def steps_logged(log_dir):
    """The number of the newest step in log.txt, -1 where there is none."""
    try:
        with open(f"{log_dir}/log.txt", "rb") as file:
            return int(file.read().rsplit(b"\n", 2)[-2].split()[0])
    except (OSError, IndexError, ValueError):
        return -1


def kill(process, log_dir, rng):
    """SIGKILL at a random moment; returns what it met, or None if the run was done before."""
    kind = rng.choices(["write", "training", "start"], [6, 3, 1])[0]
    if kind == "start":
        time.sleep(rng.uniform(0, 4))
    else:
        goal = steps_logged(log_dir) + rng.randrange(1, 30)
        if not wait_for(process, lambda: steps_logged(log_dir) >= goal):
            return None
        if kind == "write":
            wait_for(process, lambda: glob.glob(f"{log_dir}/tmp_step_*"))
        time.sleep(rng.uniform(0, 0.006))  # milliseconds: about what a write takes
    process.send_signal(signal.SIGKILL)
    if process.wait() == 0:
        return None
    inside = glob.glob(f"{log_dir}/tmp_step_*")
    return f"{'inside a write' if inside else 'outside one'} after step {steps_logged(log_dir)}"


def outcome(log_dir):
    """(bytes of the final model, train, val and lr lines) of a run."""
    with open(f"{log_dir}/step_{STEPS:06d}/model.safetensors", "rb") as file:
        weights = file.read()
    with open(f"{log_dir}/log.txt", encoding="utf-8") as file:
        return weights, [line for line in file if line.split()[1] in ("train", "val", "lr")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="runs to kill (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the machine's speed matters, too (0)")
    args = parser.parse_args()
    rng, same, kills, inside = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as directory:
        data_dir, log_dir = f"{directory}/data", f"{directory}/log"
        os.mkdir(data_dir)
        make_data(data_dir)
        whole = start(data_dir, f"{directory}/whole")
        if whole.wait():
            sys.exit(whole.stderr.read())
        expected = outcome(f"{directory}/whole")
        print(f"uninterrupted: {len(expected[0]):,} bytes of weights, {len(expected[1])} lines", flush=True)
        for run in range(1, args.runs + 1):
            shutil.rmtree(log_dir, ignore_errors=True)
            met, planned, problem = [], rng.randint(1, 2), None
            while True:
                process = start(data_dir, log_dir)
                moment = kill(process, log_dir, rng) if len(met) < planned else None
                errors = process.communicate()[1]
                if errors:
                    problem = errors.strip()
                if moment is None:
                    break
                met.append(moment)
            if process.returncode:
                problem = f"exit status {process.returncode}: {errors.strip()}"
            elif outcome(log_dir) != expected:
                weights, lines = outcome(log_dir)
                problem = f"weights {'equal' if weights == expected[0] else 'DIFFER'}, "
                problem += f"{len(set(lines) ^ set(expected[1]))} lines differ"
            same, kills, inside = same + (not problem), kills + len(met), inside + sum("inside" in m for m in met)
            print(
                f"run {run:3d}: {problem or 'the same'} | killed {'; '.join(met) or 'never'}",
                flush=True,
            )
    print(f"{same} of {args.runs} the same, byte for byte, after {kills} kills, {inside} of them inside a write")
    sys.exit(same < args.runs)


if __name__ == "__main__":
    main()
