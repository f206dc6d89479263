"""Runs that meet signals, dying processes, full disks and damaged files: they end as promised, or as if nothing was."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, command, load, losses, read_log, write_npy
from safetensors.torch import load_file, save_file

FORK = get_context("fork")  # children that need no three seconds for imports
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def fresh(prepare=None, rank=0):
    """train_gpt2 as a module that does not measure the machine; prepare(module, rank) may change it more."""
    module = load("train_gpt2")
    module.matmul_peak = lambda *_: 1e12
    if prepare:
        prepare(module, rank)
    return module


def train(data_dir, log_dir, *flags, prepare=None):
    """A run in this process, its signal handlers put back; returns its CompletedProcess."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        return call(fresh(prepare), *TINY, "--data_dir", data_dir, "--log_dir", log_dir, *flags)
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


class Ranks:
    """A run in world_size forked processes; wait() gives each one's (exit status, stdout, stderr)."""

    def __init__(self, world_size, data_dir, log_dir, *flags, prepare=None):
        meeting = tempfile.mktemp()  # a file: a port that is free now may not be when the ranks meet there
        flags = [*TINY, "--data_dir", data_dir, "--log_dir", log_dir, *flags]
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            reader, writer = FORK.Pipe(duplex=False)
            process = FORK.Process(target=self.work, args=(writer, meeting, rank, world_size, flags, prepare))
            process.start()
            writer.close()
            self.pipes.append(reader)
            self.processes.append(process)

    @staticmethod
    def work(writer, meeting, rank, world_size, flags, prepare):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        module, kept = fresh(prepare, rank), []
        main, init = module.main, module.dist.init_process_group

        def init_process_group(backend, **options):
            init(backend, **options | {"store": module.dist.FileStore(meeting, world_size)})

        module.dist.init_process_group = init_process_group

        def guarded():
            try:
                main()
            except SystemExit as stop:
                kept.append(stop)  # and with it main's objects: gloo may hang where they are freed, see __main__
                raise

        module.main = guarded
        try:
            done = call(module, *flags)
            writer.send((done.returncode, done.stdout, done.stderr))
        except BaseException:
            writer.send((99, "", traceback.format_exc()))

    def wait(self):
        results = []
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            try:
                assert pipe.poll(50), "a process neither ended nor reported"
                results.append(pipe.recv())
                process.join(20)
                assert process.exitcode is not None, "a process did not end"
            except EOFError:  # it was killed
                process.join(20)
                results.append((process.exitcode, "", ""))
            finally:
                process.kill()
        return results


def at_step(goal, action):
    """For prepare: call action(rank) in step goal, while train_gpt2 reads the data of the one after it."""

    def prepare(module, rank):
        class Watched(module.Windows):
            def batch(self, indices):
                if self.shuffle and min(indices) // 8 == goal + 1:  # TINY has 8 windows a step
                    action(rank)
                return super().batch(indices)

        module.Windows = Watched

    return prepare


def send(number):
    return lambda rank: os.kill(os.getpid(), number)


def weights(log_dir, step=5):
    return (Path(log_dir) / f"step_{step:06d}" / "model.safetensors").read_bytes()


def shown(log_dir):
    """The figures of log.txt that a run must reproduce: all but the speed."""
    return {key: value for key, value in read_log(log_dir).items() if key[1] != "tok/s"}


def sign(checkpoint):
    """Make sha256.json agree with what is in a checkpoint now."""
    files = [path for path in checkpoint.iterdir() if path.name != "sha256.json"]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (checkpoint / "sha256.json").write_text(json.dumps(sums))


@pytest.fixture(scope="module")
def whole(byte_shards, tmp_path_factory):
    """The log directory of an uninterrupted run: checkpoints at 2, 4 and 5."""
    log_dir = tmp_path_factory.mktemp("whole") / "log"
    assert train(byte_shards, log_dir, *EVERY_2).returncode == 0
    return log_dir


EVERY_2 = ["--checkpoint_interval", 2, "--eval_interval", 2, "--dropout", 0.1]


# --------------------------------------------------------------------- other numbers of processes
def test_run_of_one_then_two_then_four_processes(byte_shards, tmp_path):
    """20 steps, stopped at 10 and at 15: the windows of each step, the losses and the final loss are one run's."""

    def recorder(name):
        def prepare(module, rank):
            class Recorder(module.Windows):
                def batch(self, indices):
                    if self.shuffle:
                        with open(tmp_path / f"{name}_{rank}", "a") as file:
                            file.writelines(f"{i // 8} {self.locate(i)}\n" for i in indices)
                        if (name, min(indices) // 8) in (("one", 10), ("two", 15)):  # read ahead, in steps 9 and 14
                            os.kill(os.getpid(), signal.SIGTERM)  # the step is finished and saved
                    return super().batch(indices)

            module.Windows = Recorder

        return prepare

    flags = ["--max_steps", 20, "--micro_batch_size", 2, "--eval_interval", 20, "--max_new_tokens", 4]
    for name, world_size, log_dir in (("whole", 1, "whole"), ("one", 1, "log"), ("two", 2, "log"), ("four", 4, "log")):
        run = Ranks(world_size, byte_shards, tmp_path / log_dir, *flags, "--resume", prepare=recorder(name))
        for code, _, err in run.wait():
            assert (code, err) == (0, "")
        if name in ("one", "two"):
            assert (tmp_path / "log" / ("step_000010" if name == "one" else "step_000015")).is_dir()
    # The last two windows are read ahead, for a step that this process does not come to.
    seen = {path.name: path.read_text().splitlines()[:-2] for path in tmp_path.glob("*_[0-3]")}
    straight = seen.pop("whole_0")
    assert len(straight) == 160 and len(seen) == 7
    assert sorted(line for lines in seen.values() for line in lines) == sorted(straight)
    expected, found = (losses(tmp_path / name) for name in ("whole", "log"))
    assert len(expected) == 20 and found == pytest.approx(expected, abs=1e-5)
    assert losses(tmp_path / "log", "val") == pytest.approx(losses(tmp_path / "whole", "val"), abs=1e-4)


# ------------------------------------------------------------------------------ under torchrun
LONG = ["--max_steps", 100_000, "--eval_interval", 100_000, "--max_new_tokens", 4, "--micro_batch_size", 4]


class Torchrun:
    """A run under torchrun with two processes, in the background."""

    def __init__(self, data_dir, log_dir, *flags, max_restarts=0):
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        line += [f"--max-restarts={max_restarts}", *command("train_gpt2", *TINY, "--micro_batch_size", 4)[1:]]
        line += map(str, ["--data_dir", data_dir, "--log_dir", log_dir, "--resume", *flags])
        self.log_dir = log_dir
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def worker(self, rank):
        """The process id of a rank."""
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
                environment = (status.parent / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError):
                continue  # it ended meanwhile
            if parent == self.process.pid and b"RANK=%d" % rank in environment:
                return int(status.parent.name)
        raise AssertionError(f"no process of rank {rank}")

    def signal_when_trained(self, steps, rank, number):
        """Send a signal to a rank once log.txt has so many steps; returns its process id."""
        deadline = time.monotonic() + 60
        while not (self.log_dir / "log.txt").exists() or (self.log_dir / "log.txt").read_text().count("norm") < steps:
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline, "the run made no progress"
            time.sleep(0.02)
        pid = self.worker(rank)
        os.kill(pid, number)
        return pid

    def wait(self):
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@LINUX
def test_signal_to_a_worker_saves_the_very_step(byte_shards, tmp_path):
    run = Torchrun(byte_shards, tmp_path / "log", *LONG)
    run.signal_when_trained(20, 1, signal.SIGTERM)
    code, out, err = run.wait()
    assert code == 0, err
    steps = len(losses(tmp_path / "log"))
    checkpoint = tmp_path / "log" / f"step_{steps:06d}"
    assert torch.load(checkpoint / "trainer.pt", weights_only=True)["step"] == steps
    assert f"at step {steps}: --resume goes on" in out
    assert "stopped by" in out and "Traceback" not in err
    run = Ranks(2, byte_shards, tmp_path / "log", *LONG, "--resume", prepare=at_step(steps + 2, send(signal.SIGUSR1)))
    assert [code for code, *_ in run.wait()] == [0, 0]
    assert (tmp_path / "log" / f"step_{steps + 3:06d}").is_dir()


@LINUX
def test_killed_rank_ends_the_run_with_one_message(byte_shards, tmp_path, rank=0):
    run = Torchrun(byte_shards, tmp_path / "log", *LONG)
    run.signal_when_trained(20, rank, signal.SIGKILL)
    code, _, err = run.wait()
    assert code == 1
    with pytest.raises(AssertionError):
        run.worker(1 - rank)
    ours = [line for line in err.splitlines() if "error: " in line and "--resume" in line]
    assert len(ours) == 1 and f"rank {1 - rank}" in ours[0], err
    assert 'train_gpt2.py", line' not in err, "our own traceback"


@LINUX
def test_killed_rank_and_restarts_end_with_the_right_weights(byte_shards, tmp_path):
    flags = ["--max_steps", 120, "--checkpoint_interval", 20, "--dropout", 0.1, "--micro_batch_size", 4]
    flags += ["--eval_interval", 100, "--max_new_tokens", 4, "--log_interval", 100]
    run = Torchrun(byte_shards, tmp_path / "log", *flags, max_restarts=2)
    run.signal_when_trained(30, 1, signal.SIGKILL)
    whole = Ranks(2, byte_shards, tmp_path / "whole", *flags)
    assert [code for code, *_ in whole.wait()] == [0, 0]
    code, out, err = run.wait()
    assert code == 0, err
    assert "resuming at step" in out
    assert weights(tmp_path / "log", 120) == weights(tmp_path / "whole", 120)
    assert shown(tmp_path / "log") == shown(tmp_path / "whole")


# ------------------------------------------------------------------------------------- one process
def test_clock_stops_a_run_that_then_goes_on(byte_shards, tmp_path, whole):
    done = train(byte_shards, tmp_path / "log", *EVERY_2, "--max_hours", 1e-9)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stopped by the clock at step 1" in done.stdout
    assert train(byte_shards, tmp_path / "log", *EVERY_2, "--resume").returncode == 0
    assert weights(tmp_path / "log") == weights(whole)
    assert shown(tmp_path / "log") == shown(whole)


def test_signal_to_one_rank_ends_a_validation_on_both(byte_shards, tmp_path):
    """In the second of the two that come: nothing of it is logged, the state is saved, and the resumed run does it."""

    def prepare(module, rank):
        class Watched(module.Windows):
            def batch(self, indices):
                if not self.shuffle:
                    calls.append(indices)
                    if rank == 1 and len(calls) == 5:  # 25 windows are four batches a rank
                        os.kill(os.getpid(), signal.SIGTERM)
                return super().batch(indices)

        calls, module.Windows = [], Watched

    flags = [*EVERY_2, "--micro_batch_size", 4]
    run = Ranks(2, byte_shards, tmp_path / "log", *flags, prepare=prepare)
    assert [code for code, *_ in run.wait()] == [0, 0]
    assert (2, "val") not in read_log(tmp_path / "log") and (1, "train") in read_log(tmp_path / "log")
    assert (tmp_path / "log" / "step_000002").is_dir()
    for name, resume in (("log", ["--resume"]), ("whole", [])):
        run = Ranks(2, byte_shards, tmp_path / name, *flags, *resume)
        assert [code for code, *_ in run.wait()] == [0, 0]
    assert weights(tmp_path / "log") == weights(tmp_path / "whole")
    assert shown(tmp_path / "log") == shown(tmp_path / "whole")


def test_second_interrupt_stops_at_once(byte_shards, tmp_path):
    def twice(rank):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.1)
        (tmp_path / "waited").touch()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    start = time.monotonic()
    run = Ranks(1, byte_shards, tmp_path / "log", prepare=at_step(2, twice))
    assert run.wait()[0][0] == -signal.SIGINT
    assert (tmp_path / "waited").exists() and time.monotonic() < start + 30


def test_interrupt_in_the_last_step_still_ends_with_the_last_validation(byte_shards, tmp_path, whole):
    done = train(byte_shards, tmp_path / "log", *EVERY_2, prepare=at_step(4, send(signal.SIGINT)))
    assert (done.returncode, done.stderr) == (0, "")
    assert train(byte_shards, tmp_path / "log", *EVERY_2, "--resume").returncode == 0
    assert weights(tmp_path / "log") == weights(whole) and shown(tmp_path / "log") == shown(whole)


def test_second_run_is_refused_and_a_dead_ones_lock_is_not(byte_shards, tmp_path, whole):
    first = Ranks(1, byte_shards, tmp_path / "log", *EVERY_2, prepare=at_step(3, lambda rank: time.sleep(60)))
    deadline = time.monotonic() + 30
    while not (tmp_path / "log" / "step_000002").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = train(byte_shards, tmp_path / "log", *EVERY_2, "--resume")
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1 and "in use" in second.stderr and str(tmp_path / "log") in second.stderr
    first.processes[0].kill()
    assert first.wait()[0][0] == -signal.SIGKILL
    assert (tmp_path / "log" / "lock").exists()
    third = train(byte_shards, tmp_path / "log", *EVERY_2, "--resume")
    assert (third.returncode, third.stderr) == (0, "")
    assert weights(tmp_path / "log") == weights(whole)


# ------------------------------------------------------------------------------ numbers that are none
def no_number(when, value):
    """For prepare: the loss is value at one step on the last rank."""

    def prepare(module, rank):
        forward, calls = module.GPT.forward, []

        def wrong(self, idx, targets=None):
            logits, loss = forward(self, idx, targets)
            if self.training:
                calls.append(rank)
                if len(calls) == when + 1 and rank == int(os.environ.get("WORLD_SIZE", 1)) - 1:
                    loss = loss * value
            return logits, loss

        module.GPT.forward = wrong

    return prepare


def test_poisoned_weights_stop_the_run_before_they_are_used(byte_shards, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "log")
    shutil.rmtree(tmp_path / "log" / "step_000005")
    checkpoint = tmp_path / "log" / "step_000004"
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["transformer.wpe.weight"][3, 0] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    sign(checkpoint)
    done = train(byte_shards, tmp_path / "log", *EVERY_2, "--resume")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "step 4, rank 0: loss nan" in done.stderr
    module = load("train_gpt2")
    windows = module.Windows(str(byte_shards), "train", module.read_meta(str(byte_shards)), 16, 1337, True)
    for shard, offset in map(windows.locate, range(32, 40)):
        assert f"('{windows.paths[shard]}', {offset})" in done.stderr
    assert not (tmp_path / "log" / "step_000005").exists()


def test_loss_that_is_none_on_one_of_two_ranks_ends_both(byte_shards, tmp_path, whole):
    flags = [*EVERY_2, "--micro_batch_size", 4]
    run = Ranks(2, byte_shards, tmp_path / "log", *flags, prepare=no_number(3, float("nan")))
    results = run.wait()
    assert [code for code, *_ in results] == [1, 1], results
    assert "step 3, rank 1: loss nan" in results[1][2] and "Traceback" not in results[0][2] + results[1][2]
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["lock", "log.txt", "run.json", "step_000002"]
    assert max(step for step, kind in read_log(tmp_path / "log") if kind == "train") == 2
    resumed = Ranks(2, byte_shards, tmp_path / "log", *flags, "--resume")  # without the cause, it goes on
    assert [code for code, *_ in resumed.wait()] == [0, 0]


def overflow(module, rank):
    """For prepare: the gradient of one parameter, which AdamW has with either optimizer, is inf at step 2."""
    forward, calls = module.GPT.forward, []

    def wrong(self, idx, targets=None):
        if self.training:
            calls.append(self.ln_f.weight.register_hook(lambda grad: grad * (float("inf") if len(calls) == 3 else 1)))
        return forward(self, idx, targets)

    module.GPT.forward = wrong


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_skips_a_step_that_overflows_and_counts_it(optimizer, byte_shards, tmp_path):
    flags = ["--dtype", "float16", "--checkpoint_interval", 1, "--keep_checkpoints", 0, "--optimizer", optimizer]
    done = train(byte_shards, tmp_path / "log", *flags, prepare=overflow)
    assert (done.returncode, done.stderr) == (0, "")
    assert weights(tmp_path / "log", 2) == weights(tmp_path / "log", 3) != weights(tmp_path / "log", 4)
    skipped = {key: value for key, value in read_log(tmp_path / "log").items() if key[1] == "skipped"}
    assert skipped == {(2, "skipped"): "1"}
    scaler = [torch.load(tmp_path / "log" / f"step_00000{i}" / "trainer.pt")["scaler"]["scale"] for i in (2, 3)]
    assert scaler[1] == scaler[0] / 2


def test_float16_stops_at_a_loss_that_no_scale_mends(byte_shards, tmp_path):
    done = train(byte_shards, tmp_path / "log", "--dtype", "float16", prepare=no_number(2, float("inf")))
    assert done.returncode == 1 and "step 2" in done.stderr and "loss inf" in done.stderr
    assert not list((tmp_path / "log").glob("step_*"))


# ---------------------------------------------------------------------------------- damaged files
def flip(path):
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def replace_by_directory(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": flip,
    "of another type": lambda path: path.write_text("[1, 2, 3]\n"),
    "a directory": replace_by_directory,
}


@pytest.fixture
def broken(byte_shards, tmp_path, whole):
    """(data directory, log directory) of a run to go on from, with checkpoints at 2 and 4; tests damage it."""
    shutil.copytree(byte_shards, tmp_path / "data")
    shutil.copytree(whole, tmp_path / "log")
    shutil.rmtree(tmp_path / "log" / "step_000005")
    return tmp_path / "data", tmp_path / "log"


def refused(done, *needles):
    """Status 2 and one line with the needles."""
    assert done.returncode == 2, done.stdout[-500:] + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for needle in needles:
        assert str(needle) in done.stderr, done.stderr


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "trainer.pt", "sha256.json"])
def test_damaged_newest_checkpoint_is_reported_and_the_one_before_taken(broken, whole, file, damage):
    data_dir, log_dir = broken
    DAMAGE[damage](log_dir / "step_000004" / file)
    done = train(data_dir, log_dir, *EVERY_2, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: ") and done.stderr.count("\n") == 1, done.stderr
    assert "step_000004 is damaged" in done.stderr and "the one before" in done.stderr
    assert "resuming at step 2" in done.stdout
    assert weights(log_dir, 4) == weights(whole, 4) and weights(log_dir) == weights(whole)
    assert shown(log_dir) == shown(whole)


@pytest.mark.parametrize("content", ["a file", "nothing"])
def test_checkpoint_that_is_none(broken, whole, content):
    data_dir, log_dir = broken
    shutil.rmtree(log_dir / "step_000004")
    if content == "a file":
        (log_dir / "step_000004").write_text("mine")
    else:
        (log_dir / "step_000004").mkdir()
    done = train(data_dir, log_dir, *EVERY_2, "--resume")
    assert done.returncode == 0 and "step_000004 is damaged" in done.stderr
    assert weights(log_dir) == weights(whole) and shown(log_dir) == shown(whole)


def test_all_checkpoints_damaged(broken):
    data_dir, log_dir = broken
    for step in (2, 4):
        flip(log_dir / f"step_00000{step}" / "model.safetensors")
    refused(train(data_dir, log_dir, *EVERY_2, "--resume"), "step_000004 is damaged", "--log_dir")


@pytest.mark.parametrize("kind", ["a file", "a directory"])
def test_rest_of_a_crash_is_removed_whatever_it_is(broken, whole, kind):
    data_dir, log_dir = broken
    if kind == "a file":
        (log_dir / "tmp_step_000005").write_text("half")
    else:
        (log_dir / "tmp_step_000004" / "deep").mkdir(parents=True)
    done = train(data_dir, log_dir, *EVERY_2, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert weights(log_dir) == weights(whole)
    assert not list(log_dir.glob("tmp*"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_log_changes_no_weight(broken, whole, damage):
    """What can be read of it stays, what cannot goes; a directory in its place is refused."""
    data_dir, log_dir = broken
    DAMAGE[damage](log_dir / "log.txt")
    done = train(data_dir, log_dir, *EVERY_2, "--resume")
    if damage == "a directory":
        return refused(done, log_dir / "log.txt")
    assert (done.returncode, done.stderr) == (0, "")
    assert weights(log_dir) == weights(whole)
    found, expected = shown(log_dir), shown(whole)
    assert {key for key in expected if key[0] >= 4} <= found.keys()
    assert len(set(found.items()) - set(expected.items())) <= 1  # the flipped bit itself may be read as a figure


@pytest.mark.parametrize("content", [None, b"", bytes(range(100)), "a directory"])
def test_damaged_lock(broken, whole, content):
    data_dir, log_dir = broken
    (log_dir / "lock").unlink()
    if content == "a directory":
        (log_dir / "lock").mkdir()
        return refused(train(data_dir, log_dir, *EVERY_2, "--resume"), "--log_dir", log_dir)
    if content is not None:
        (log_dir / "lock").write_bytes(content)
    done = train(data_dir, log_dir, *EVERY_2, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert weights(log_dir) == weights(whole)


SHARD = "excerpt_train_000000.npy"
DATA_DAMAGE = {
    "shard missing": (SHARD, Path.unlink),
    "shard empty": (SHARD, DAMAGE["empty"]),
    "shard truncated": (SHARD, DAMAGE["truncated"]),
    "shard of another type": (SHARD, DAMAGE["of another type"]),
    "shard a directory": (SHARD, replace_by_directory),
    "shard with a flipped bit": (SHARD, flip),
    "shard with other tokens": (SHARD, lambda path: write_npy(path, np.load(path)[::-1])),
    "meta.json missing": ("meta.json", Path.unlink),
    "meta.json truncated": ("meta.json", DAMAGE["truncated"]),
    "meta.json a directory": ("meta.json", replace_by_directory),
    "meta.json of bytes that are no text": ("meta.json", lambda path: path.write_bytes(b"\xff\xfe{}")),
    "meta.json with another vocabulary": ("meta.json", lambda path: change(path, r'("vocab_size": )257', r"\g<1>457")),
    "meta.json with another token count": ("meta.json", lambda path: change(path, r'("tokens": )\d+', r"\g<1>12345")),
    "meta.json with another checksum": (
        "meta.json",
        lambda path: change(path, r'("tokens": .*?"sha256": ").', r"\g<1>x"),
    ),
    "meta.json without a shard": ("meta.json", lambda path: change(path, "excerpt_train", "excerpt_trail")),
}


def change(path, pattern, by):
    text, n = re.subn(pattern, by, path.read_text(), count=1, flags=re.S)
    assert n == 1
    path.write_text(text)


@pytest.mark.parametrize("resume", [True, False], ids=["resume", "new run"])
@pytest.mark.parametrize("damage", DATA_DAMAGE)
def test_damaged_data(broken, damage, resume):
    """Found with or without a run that knew the data before, in one line that names the directory or the file."""
    data_dir, log_dir = broken
    if damage == "meta.json missing" and not resume:
        pytest.skip("shards without meta.json are foreign ones, of GPT-2's tokens")
    file, spoil = DATA_DAMAGE[damage]
    spoil(data_dir / file)
    flags = [*EVERY_2, "--resume"] if resume else [*EVERY_2, "--log_dir", log_dir.parent / "new"]
    done = train(data_dir, log_dir, *flags)
    refused(done, "--data_dir" if "data in --data_dir" in done.stderr else data_dir)
    assert "| loss" not in done.stdout


def test_pickled_code_in_a_shard_is_refused_and_not_run(broken):
    data_dir, log_dir = broken

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(data_dir.parent / "the code ran"),)

    np.save(data_dir / SHARD, np.array([Code()], dtype=object), allow_pickle=True)
    refused(train(data_dir, log_dir, *EVERY_2, "--resume"), data_dir / SHARD)
    assert not (data_dir.parent / "the code ran").exists()


@pytest.mark.parametrize("file", ["trainer.pt", "sha256.json", "config.json", "model.safetensors"])
def test_pickled_code_in_a_checkpoint_is_not_run_and_the_one_before_taken(broken, whole, file):
    """A stranger's checkpoint, its checksums in order; test_training.py has the one with none before it."""
    data_dir, log_dir = broken

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(data_dir.parent / "the code ran"),)

    checkpoint = log_dir / "step_000004"
    torch.save({"step": 4, "extra": Code()}, checkpoint / file)
    if file != "sha256.json":
        sign(checkpoint)
    done = train(data_dir, log_dir, *EVERY_2, "--resume")
    assert done.returncode == 0 and "step_000004 is damaged" in done.stderr
    assert not (data_dir.parent / "the code ran").exists()
    assert weights(log_dir) == weights(whole)


# --------------------------------------------------------------------------------------- full disks
@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, for as long as a test runs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk, leave):
    """Fill a disk up to so many bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    with open(disk / "filler", "wb") as file:
        file.write(bytes(free - leave))


@pytest.mark.parametrize("leave", [0, 100_000, 200_000], ids=["at once", "in the model", "in the trainer"])
def test_full_disk_for_a_while(byte_shards, whole, small_disk, leave):
    """Checkpoints fail half-way and are tried again, lines of the log wait, and in the end nothing is missing."""

    def at(module, rank):
        class Watched(module.Windows):
            def batch(self, indices):
                if self.shuffle and min(indices) // 8 == 2:  # read ahead, in step 1
                    fill(small_disk, leave)
                if self.shuffle and min(indices) // 8 == 5:
                    (small_disk / "filler").unlink()
                return super().batch(indices)

        module.Windows = Watched

    done = train(byte_shards, small_disk / "log", *EVERY_2, prepare=at)
    assert done.returncode == 0, done.stderr
    warnings = done.stderr.splitlines()
    assert [line for line in warnings if "no checkpoint at step 2" in line and "the run goes on" in line]
    assert [line for line in warnings if "no checkpoint at step 4" in line]
    assert all(line.startswith("warning: ") for line in warnings), done.stderr
    assert sorted(path.name for path in (small_disk / "log").iterdir()) == [
        "lock",
        "log.txt",
        "run.json",
        "step_000005",
    ]
    assert weights(small_disk / "log") == weights(whole)
    assert shown(small_disk / "log") == shown(whole)


def test_full_disk_to_the_end_fails_and_keeps_the_last_good_checkpoint(byte_shards, whole, small_disk):
    prepare = at_step(3, lambda rank: fill(small_disk, 150_000))
    done = train(byte_shards, small_disk / "log", *EVERY_2, prepare=prepare)
    assert done.returncode == 1
    assert "the last state, of step 5, could not be saved" in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in (small_disk / "log").iterdir() if path.is_dir()) == ["step_000002"]
    (small_disk / "filler").unlink()
    done = train(byte_shards, small_disk / "log", *EVERY_2, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert weights(small_disk / "log") == weights(whole) and shown(small_disk / "log") == shown(whole)


def test_full_disk_keeps_a_thousand_lines_of_the_log_waiting(byte_shards, small_disk):
    """More than a file's usual buffer holds."""
    flags = ["--max_steps", 400, "--checkpoint_interval", 1000, "--log_interval", 1000, "--eval_interval", 400]

    def at(module, rank):
        class Watched(module.Windows):
            def batch(self, indices):
                if self.shuffle and min(indices) // 8 == 5:
                    fill(small_disk, 0)
                if self.shuffle and min(indices) // 8 == 395:
                    (small_disk / "filler").unlink()
                return super().batch(indices)

        module.Windows = Watched

    done = train(byte_shards, small_disk / "log", *flags, prepare=at)
    assert done.returncode == 0, done.stderr[-500:]
    assert len(losses(small_disk / "log")) == 400
    assert "log.txt cannot be written (No space left on device); the run goes on" in done.stderr


def test_resume_on_a_full_disk_ends_in_a_line_or_goes_on(byte_shards, whole, small_disk):
    shutil.copytree(whole, small_disk / "log")
    shutil.rmtree(small_disk / "log" / "step_000005")
    before = (small_disk / "log" / "log.txt").read_text()
    fill(small_disk, 0)
    refused(train(byte_shards, small_disk / "log", *EVERY_2, "--resume"), "log", "space")
    assert (small_disk / "log" / "log.txt").read_text() == before
    (small_disk / "filler").unlink()
    assert train(byte_shards, small_disk / "log", *EVERY_2, "--resume").returncode == 0
    assert weights(small_disk / "log") == weights(whole) and shown(small_disk / "log") == shown(whole)


# --------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("fits, limit, expected", [(1, 64, 1), (7, 64, 4), (8, 64, 8), (1000, 16, 16)])
def test_micro_batch_is_the_largest_power_of_two_that_fits(monkeypatch, fits, limit, expected):
    """A GPU played by a model that takes so many sequences, and by counters of its memory."""
    micro_batch, tried = find_micro_batch(monkeypatch, fits, limit)
    assert micro_batch == expected
    assert max(tried) == min(2 * expected, limit) and all(shape[1] == 16 for shape in tried.values())


def find_micro_batch(monkeypatch, fits, limit):
    module, tried = fresh(), {}
    for name, value in (("reset_peak_memory_stats", 0), ("max_memory_allocated", 0), ("mem_get_info", (10**9, 10**9))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    forward = module.GPT.forward

    def limited(model, idx, targets=None):
        tried[len(idx)] = idx.shape
        if len(idx) > fits:
            raise torch.OutOfMemoryError
        return forward(model, idx, targets)

    module.GPT.forward = limited
    model = module.GPT(module.GPTConfig(257, 16, 1, 1, 8))
    micro_batch = module.largest_micro_batch(model, limit, torch.device("cpu"), contextlib.nullcontext())
    assert all(p.grad is None for p in model.parameters())
    return micro_batch, tried


def test_model_of_which_not_one_sequence_fits_is_a_line(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        find_micro_batch(monkeypatch, 0, 64)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "--block_size 16" in err


def test_running_out_of_memory_in_a_step_is_a_line(byte_shards, tmp_path):
    code = """import runpy, sys, torch
def full(*_, **__): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
torch.nn.functional.cross_entropy, sys.argv = full, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""
    flags = [*TINY, "--data_dir", byte_shards, "--log_dir", tmp_path / "log"]
    line = [sys.executable, "-c", code, *command("train_gpt2", *flags)[1:]]
    for environment in ({}, {"RANK": "0", "LOCAL_RANK": "0"}):
        done = subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "memory" in done.stderr and "--micro_batch_size" in done.stderr
        shutil.rmtree(tmp_path / "log")


# ---------------------------------------------------------------------------------------- slurm
@LINUX
def test_slurm_script_saves_at_the_warning_and_queues_itself_again(byte_shards, tmp_path):
    """docs/train.sbatch with srun and scontrol played by two small scripts, warned once, then run to the end."""
    for name, text in {
        "bin/srun": '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
        "bin/scontrol": f'#!/bin/bash\n[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/requeued\n',
        "bin/torchrun": f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n',
        ".venv/bin/activate": f'export PATH="{tmp_path}/bin:$PATH"\n',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copy(ROOT / "train_gpt2.py", tmp_path)
    slurm = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "localhost"}
    environment = {**os.environ, **slurm, "RDZV_PORT": "0"}
    log = tmp_path / "log" / "log.txt"
    for warned in (True, False):
        flags = [*TINY, "--max_steps", 200, "--micro_batch_size", 4, "--eval_interval", 200, "--log_interval", 100]
        line = ["bash", ROOT / "docs" / "train.sbatch", *flags, "--data_dir", byte_shards, "--max_new_tokens", 2]
        job = subprocess.Popen([*map(str, line)], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while warned and (not log.exists() or log.read_text().count("norm") < 10):
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        if warned:
            job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 0, job.stderr.read()
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"
        steps = len(losses(tmp_path / "log"))
        assert (tmp_path / "log" / f"step_{steps:06d}").is_dir() and (steps < 200) == warned
