"""
Kill training runs with SIGKILL at random moments, and check that the resumed runs end with the same bytes.

    python tests/torture.py --runs 50             # one process; about ten minutes on two CPU cores
    python tests/torture.py --runs 20 --ranks 3   # three ranks, one of which is killed; about ten minutes

Each run trains a small model with dropout. It is killed once or twice: while a checkpoint is written, between two
checkpoints, or during start-up. The same command is then started again, until the run is complete. It must end with
the model.safetensors of an uninterrupted run, byte for byte, and with its train, val and lr lines in log.txt.

Prints one line per run and a summary. The exit status is 1 if a run differs.
"""

import argparse
import glob
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
MAX_STEPS = 60
FLAGS = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "dropout": 0.1,
    "max_steps": MAX_STEPS,
    "warmup_steps": 5,
    "total_batch_size": 768,  # 24 windows per step
    "micro_batch_size": 8,
    "learning_rate": 1e-2,
    "checkpoint_interval": 3,
    "eval_interval": 10,
    "val_tokens": 640,
    "log_interval": 1,
    "max_new_tokens": 8,
    "prompt": "A",
    "device": "cpu",
}


def make_data(directory):
    """Write a data set of the bytes of input.txt: two training shards and a validation shard."""
    with open(f"{ROOT}/input.txt", "rb") as file:
        tokens = np.frombuffer(file.read(), dtype=np.uint8).astype("<u2")
    shards = {
        "text_train_000000.npy": tokens[:9000],
        "text_train_000001.npy": tokens[9000:20000],
        "text_val_000000.npy": tokens[-4000:],
    }
    meta = {"tokenizer": "bytes", "vocab_size": 257, "eot_token": 256, "source": {}, "shards": []}
    for name, shard in shards.items():
        np.save(f"{directory}/{name}", shard)
        with open(f"{directory}/{name}", "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        meta["shards"].append({"file": name, "tokens": len(shard), "sha256": digest})
    with open(f"{directory}/meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file)


class Run:
    """A run of train_gpt2.py in the background, in one or several processes."""

    def __init__(self, data_dir, log_dir, num_ranks):
        self.log_dir = log_dir
        line = [sys.executable, f"{ROOT}/train_gpt2.py", "--resume", "--data_dir", data_dir, "--log_dir", log_dir]
        for name, value in FLAGS.items():
            line += [f"--{name}", str(value)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # with one thread the order of summation is fixed
        if num_ranks > 1:  # what torchrun sets
            environment["WORLD_SIZE"] = str(num_ranks)
            environment["MASTER_ADDR"] = "127.0.0.1"
            environment["MASTER_PORT"] = str(free_port())
        self.processes = []
        for rank in range(num_ranks):
            if num_ranks > 1:
                environment["RANK"] = environment["LOCAL_RANK"] = str(rank)
            process = subprocess.Popen(
                line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, text=True
            )
            self.processes.append(process)

    def is_running(self):
        """Return whether none of the processes has ended."""
        return all(process.poll() is None for process in self.processes)

    def wait_for(self, condition):
        """Wait until condition() holds. Returns False if the run has ended before."""
        while self.is_running():
            if condition():
                return True
            time.sleep(0.0005)  # a checkpoint of this model is written in a few milliseconds
        return False

    def wait(self, grace=None):
        """Wait until all processes have ended. Returns (exit statuses, error messages).

        After grace seconds the rest is killed: torchrun does that with ranks that wait in vain for one that was
        killed before it had joined the others.
        """
        errors = []
        for process in self.processes:
            try:
                _, error = process.communicate(timeout=grace)
            except subprocess.TimeoutExpired:
                process.kill()
                _, error = process.communicate()
            errors.append(error.strip())
        statuses = [process.returncode for process in self.processes]
        return statuses, "; ".join(error for error in errors if error)

    def last_step(self):
        """Return the step of the last line in log.txt, or -1 if there is none."""
        try:
            with open(f"{self.log_dir}/log.txt", "rb") as file:
                return int(file.read().rsplit(b"\n", 2)[-2].split()[0])
        except (OSError, IndexError, ValueError):
            return -1

    def is_writing(self):
        """Return whether a checkpoint is incomplete."""
        return bool(glob.glob(f"{self.log_dir}/tmp_step_*"))

    def kill(self, rng):
        """Kill one process at a random moment. Returns a description, or None if the run was complete before.

        The other ranks notice it and end by themselves, unless they still wait for the victim to join them.
        """
        kind = rng.choices(["write", "training", "start-up"], [6, 3, 1])[0]
        victim = rng.choice(self.processes)
        if kind == "write":
            victim = self.processes[0]  # rank 0 writes
        if kind == "start-up":
            time.sleep(rng.uniform(0, 4))
        else:
            goal = self.last_step() + rng.randrange(1, 30)
            if not self.wait_for(lambda: self.last_step() >= goal):
                return None
            if kind == "write":
                self.wait_for(self.is_writing)
            time.sleep(rng.uniform(0, 0.006))  # about the duration of a write
        victim.send_signal(signal.SIGKILL)
        if victim.wait() != -signal.SIGKILL:
            return None
        place = "in a write" if self.is_writing() else "between writes"
        return f"rank {self.processes.index(victim)} {place} after step {self.last_step()}"


def free_port():
    """Return a port that no other process uses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def outcome(log_dir):
    """Return (bytes of the final model, train, val and lr lines) of a complete run."""
    with open(f"{log_dir}/step_{MAX_STEPS:06d}/model.safetensors", "rb") as file:
        weights = file.read()
    with open(f"{log_dir}/log.txt", encoding="utf-8") as file:
        lines = [line for line in file if line.split()[1] in ("train", "val", "lr")]
    return weights, lines


def compare(log_dir, expected):
    """Return how the outcome of a run differs from the expected one, or None."""
    weights, lines = outcome(log_dir)
    if (weights, lines) == expected:
        return None
    verdict = "equal" if weights == expected[0] else "DIFFERENT"
    num_lines = len(set(lines) ^ set(expected[1]))
    return f"weights {verdict}, {num_lines} lines different"


def torture(data_dir, log_dir, num_ranks, expected, rng):
    """Kill a run once or twice and restart it until it is complete. Returns (kills, problem or None)."""
    kills = []
    num_kills = rng.randint(1, 2)
    while True:
        run = Run(data_dir, log_dir, num_ranks)
        moment = run.kill(rng) if len(kills) < num_kills else None
        statuses, errors = run.wait(grace=None if moment is None else 20)
        if moment is None:
            break
        kills.append(moment)
        # The other ranks of a killed run say that they lost contact. Nothing else may be reported.
        if "Traceback" in errors or (num_ranks == 1 and errors):
            return kills, errors
    if any(statuses) or errors:
        return kills, f"exit statuses {statuses}: {errors}"
    return kills, compare(log_dir, expected)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="number of runs that are killed (default: 50)")
    parser.add_argument("--ranks", type=int, default=1, help="processes per run: 1, 2 or 3 (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    num_good, num_kills, num_in_write = 0, 0, 0
    with tempfile.TemporaryDirectory() as directory:
        data_dir, log_dir = f"{directory}/data", f"{directory}/log"
        os.mkdir(data_dir)
        make_data(data_dir)

        # the run that all others must agree with
        statuses, errors = Run(data_dir, f"{directory}/whole", args.ranks).wait()
        if any(statuses):
            sys.exit(errors)
        expected = outcome(f"{directory}/whole")
        print(f"uninterrupted run: {len(expected[0]):,} bytes of weights, {len(expected[1])} lines", flush=True)

        for number in range(1, args.runs + 1):
            shutil.rmtree(log_dir, ignore_errors=True)
            kills, problem = torture(data_dir, log_dir, args.ranks, expected, rng)
            num_good += problem is None
            num_kills += len(kills)
            num_in_write += sum("in a write" in kill for kill in kills)
            print(f"run {number:3d}: {problem or 'identical'} | killed {', '.join(kills) or 'never'}", flush=True)
    print(f"{num_good} of {args.runs} runs identical after {num_kills} kills, {num_in_write} of them in a write")
    sys.exit(num_good < args.runs)


if __name__ == "__main__":
    main()
