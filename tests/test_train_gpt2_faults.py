"""Faults during training: signals, kills, full disks, damaged files.

One promise is tested again and again: whatever happens to a run, the same command with --resume
ends with the bytes of an undisturbed run.

Faults are injected through public functions of PyTorch and Python, not through names of
train_gpt2.py. Every run is a forked process, or one for each rank: a fault can kill it, and
nothing has to be restored.
"""

import errno
import importlib
import itertools
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    DAMAGES,
    ROOT,
    TINY,
    Run,
    assert_user_error,
    at_disk_change,
    at_loss,
    at_step,
    call,
    command,
    edit_json,
    flip_bit,
    limit_files,
    losses,
    names_in,
    read_log,
    replace_tokens,
    reproducible,
    send,
    sign,
    truncate,
    wait_until,
    weights_file,
)

SHARD, VAL_SHARD = "excerpt_train_000000.npy", "excerpt_val_000000.npy"
CHECKPOINT_FILES = ["model.safetensors", "config.json", "trainer.pt", "sha256.json"]

# five steps with random numbers, and checkpoints at steps 2, 4 and 5
FLAGS = ["--checkpoint_interval", 2, "--eval_interval", 2, "--dropout", 0.1]
FLAGS += ["--max_new_tokens", 4]
# a run that lasts until it is stopped
ENDLESS = ["--max_steps", 100_000, "--eval_interval", 100_000]
TWO_RANKS = ["--micro_batch_size", 4]
THREE_RANKS = ["--total_batch_size", 144, "--micro_batch_size", 3]


# ------------------------------------------------------------------------------------ processes
def start(data_dir, log_dir, *flags, **options):
    """Start a Run with the flags TINY and these."""
    return Run(*TINY, "--data_dir", data_dir, "--log_dir", log_dir, *flags, **options)


def train(*args, **options):
    """Run on one rank to the end. Returns its CompletedProcess."""
    [done] = start(*args, **options).wait()
    return done


def statuses(*args, **options):
    """Run to the end. Returns the exit status of each rank."""
    return [done.returncode for done in start(*args, **options).wait()]


def succeed(*args, **options):
    """Run on one rank. It must end with status 0 and no warning. Returns its output."""
    done = train(*args, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def wait_for_steps(log_dir, steps):
    """Wait until log.txt has so many training steps."""
    log = log_dir / "log.txt"
    wait_until(lambda: log.exists() and log.read_text().count("norm") >= steps)


# --------------------------------------------------------------------------- an undisturbed run
@pytest.fixture(scope="module")
def whole(byte_shards, tmp_path_factory):
    """The log directory of an undisturbed run.

    It runs in this process, so that the forks have imported everything: they are then fast.
    """
    log_dir = tmp_path_factory.mktemp("whole") / "log"
    done = call("train_gpt2", *TINY, "--data_dir", byte_shards, "--log_dir", log_dir, *FLAGS)
    assert (done.returncode, done.stderr) == (0, "")
    return log_dir


@pytest.fixture
def stopped(byte_shards, tmp_path, whole):
    """(data directory, log directory) of a run that stopped at step 4."""
    shutil.copytree(byte_shards, tmp_path / "data")
    shutil.copytree(whole, tmp_path / "log")
    shutil.rmtree(tmp_path / "log" / "step_000005")
    return tmp_path / "data", tmp_path / "log"


def assert_same_run(log_dir, expected, step=5):
    """Check for the same bytes, and for the same log except for the speed."""
    assert weights_file(log_dir, step).read_bytes() == weights_file(expected, step).read_bytes()
    assert reproducible(log_dir) == reproducible(expected)


# -------------------------------------------------------------------------------- interruptions
STOPS = {  # (what happens, exit status, step that is saved, if any)
    "SIGTERM": (at_step(2, send("SIGTERM")), 0, 3),
    "SIGINT": (at_step(2, send("SIGINT")), 0, 3),
    "SIGUSR1": (at_step(2, send("SIGUSR1")), 0, 3),
    "last step": (at_step(4, send("SIGTERM")), 0, 5),
    # the terminal sends Ctrl-C to all processes, and torchrun sends it to them again
    "Ctrl-C twice at once": (at_step(2, send("SIGINT", "SIGINT")), 0, 3),
    "Ctrl-C after SIGTERM": (at_step(2, send("SIGTERM", "SIGINT")), 0, 3),
    "SIGKILL": (at_step(3, send("SIGKILL")), -signal.SIGKILL, 2),
    "SIGKILL in the first step": (at_step(0, send("SIGKILL")), -signal.SIGKILL, None),
    # the third one comes more than a second after the first
    "Ctrl-C again": (at_step(3, send(*3 * ["SIGINT"])), -signal.SIGINT, 2),
}


@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_run_ends_with_the_same_bytes(byte_shards, tmp_path, whole, stop):
    before, status, saved_step = STOPS[stop]
    log_dir = tmp_path / "log"
    done = train(byte_shards, log_dir, *FLAGS, before=before)
    assert (done.returncode, done.stderr) == (status, "")
    if status == 0:
        assert f"step {saved_step}" in done.stdout.splitlines()[-1]
    assert names_in(log_dir, "step_")[-1:] == ([f"step_{saved_step:06d}"] if saved_step else [])
    succeed(byte_shards, log_dir, *FLAGS, "--resume")
    assert_same_run(log_dir, whole)


def test_the_command_that_a_stopped_run_prints_continues_it(byte_shards, tmp_path, whole):
    """It has no flags of the run: they are in the checkpoint."""
    done = train(byte_shards, tmp_path / "log", *FLAGS, before=at_step(2, send("SIGTERM")))
    python, script, *flags = shlex.split(done.stdout.splitlines()[-1].partition("continue with ")[2])
    assert python == "python" and "--resume" in flags and "--n_layer" not in flags
    assert flags[flags.index("--device") + 1] == "cpu"
    [done] = Run(*flags).wait()
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_run(tmp_path / "log", whole)


def test_a_signal_ends_eval_only_at_once(byte_shards, whole):
    before = at_loss(0, lambda loss: send("SIGTERM")(), training=False)
    done = train(byte_shards, whole, "--eval_only", "--resume", before=before)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_three_ranks_end_with_the_same_bytes(byte_shards, tmp_path, whole, name):
    """DDP must sum in the same order in the first step of a resumed run. Rank 1 gets the signal."""
    flags = [*FLAGS, *THREE_RANKS, "--max_steps", 8]
    line = [byte_shards, tmp_path / "log", *flags]
    expected = {"SIGTERM": [0, 0, 0], "SIGKILL": [1, -signal.SIGKILL, 1]}
    before = at_step(4, send(name), rank=1)
    assert statuses(*line, ranks=3, before=before) == expected[name]
    assert statuses(*line, "--resume", ranks=3) == [0, 0, 0]
    assert statuses(byte_shards, tmp_path / "whole", *flags, ranks=3) == [0, 0, 0]
    assert_same_run(tmp_path / "log", tmp_path / "whole", step=8)


def test_a_run_continues_on_another_number_of_ranks(byte_shards, tmp_path, whole):
    """It is stopped at steps 10 and 15. Equal losses mean equal data."""
    flags = ["--max_steps", 20, "--micro_batch_size", 2, "--eval_interval", 20, "--resume"]
    assert statuses(byte_shards, tmp_path / "whole", *flags) == [0]
    log_dir = tmp_path / "log"
    for ranks, last_step in ((1, 9), (2, 4), (4, None)):
        before = at_step(last_step, send("SIGTERM"))
        run = start(byte_shards, log_dir, *flags, ranks=ranks, before=before)
        assert [done.returncode for done in run.wait()] == [0] * ranks
    assert names_in(log_dir, "step_")[:2] == ["step_000010", "step_000015"]
    for kind, num_values, tolerance in (("train", 20, 1e-5), ("val", 2, 1e-4)):
        expected = losses(tmp_path / "whole", kind)
        assert len(expected) == num_values
        assert losses(log_dir, kind) == pytest.approx(expected, abs=tolerance)


def test_a_signal_to_one_rank_ends_an_evaluation_on_both(byte_shards, tmp_path, whole):
    """The resumed run repeats the evaluation at step 2."""

    def stop(loss):
        signal.raise_signal(signal.SIGTERM)
        return loss

    # an evaluation of 25 windows has four batches on each rank
    before = at_loss(5, stop, training=False, rank=1)
    line = [byte_shards, tmp_path / "log", *FLAGS, *TWO_RANKS]
    assert statuses(*line, ranks=2, before=before) == [0, 0]
    assert (1, "train") in read_log(tmp_path / "log")
    assert (2, "val") not in read_log(tmp_path / "log")
    assert statuses(*line, "--resume", ranks=2) == [0, 0]
    assert statuses(byte_shards, tmp_path / "whole", *line[2:], ranks=2) == [0, 0]
    assert_same_run(tmp_path / "log", tmp_path / "whole")


# -------------------------------------------------------------------------------- at any moment
def test_a_run_may_die_before_any_change_of_the_disk(stopped, tmp_path, whole):
    """One run dies before its first change, the next one before its second, and so on.

    Each saves step 5 and deletes the checkpoints of steps 2 and 4.
    """
    data_dir, log_dir = stopped
    for number in itertools.count(1):
        copy = tmp_path / str(number)
        shutil.copytree(log_dir, copy)
        line = [data_dir, copy, *FLAGS, "--resume", "--keep_checkpoints", 1]

        def die(n, number=number):
            if n == number:
                os._exit(9)

        died = train(*line, before=at_disk_change(copy, die))
        assert names_in(copy, "step_")[-1] in ("step_000004", "step_000005")
        succeed(*line)
        assert names_in(copy, "tmp") == []
        assert_same_run(copy, whole)
        if died.returncode == 0:
            break
        assert died.returncode == 9
    assert number > 25


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("seed", range(int(os.environ.get("RANDOM_KILLS", "1"))))
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(byte_shards, tmp_path, whole, ranks, seed):
    """The machine fails three times. RANDOM_KILLS=50 repeats this 50 times."""
    flags = [*FLAGS, *THREE_RANKS, "--max_steps", 40]
    started = time.monotonic()
    assert statuses(byte_shards, tmp_path / "whole", *flags, ranks=ranks) == [0] * ranks
    duration = time.monotonic() - started
    line = [byte_shards, tmp_path / "log", *flags, "--resume"]
    rng = np.random.default_rng(seed)
    for _ in range(3):
        run = start(*line, ranks=ranks)
        time.sleep(duration * rng.uniform(0.2, 0.8))
        for process in run.processes:
            process.kill()
        run.wait()
    assert statuses(*line, ranks=ranks) == [0] * ranks
    assert_same_run(tmp_path / "log", tmp_path / "whole", step=40)


@pytest.mark.parametrize("length", [4, 1000], ids=["for a while", "to the end"])
def test_a_full_disk_at_any_moment_loses_nothing(stopped, tmp_path, whole, length):
    """From the 1st, 5th, ... or 29th change on, no file can be created, renamed or opened for writing."""
    data_dir, log_dir = stopped
    for number in range(1, 33, 4):
        copy = tmp_path / str(number)
        shutil.copytree(log_dir, copy)

        def fail(n, number=number):
            if number <= n < number + length:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        done = train(data_dir, copy, *FLAGS, "--resume", before=at_disk_change(copy, fail))
        assert "Traceback" not in done.stderr, done.stderr
        is_saved = (copy / "step_000005").exists()
        assert (done.returncode == 0) == is_saved, number
        succeed(data_dir, copy, *FLAGS, "--resume")
        assert_same_run(copy, whole)


@pytest.mark.parametrize("limit", [0, 100_000, 200_000], ids=["log", "model", "optimizer"])
def test_a_disk_that_is_full_for_a_while_loses_nothing(byte_shards, tmp_path, whole, limit):
    """In steps 1 to 4 no file can grow beyond the limit. The last checkpoint succeeds."""

    def before(rank):
        at_step(1, partial(limit_files, limit))(rank)
        at_step(4, partial(limit_files, resource.RLIM_INFINITY))(rank)

    log_dir = tmp_path / "log"
    done = train(byte_shards, log_dir, *FLAGS, before=before)
    assert done.returncode == 0, done.stderr
    for step in (2, 4):
        assert f"step {step} " in done.stderr
    assert names_in(log_dir, "step_") == ["step_000005"]
    assert names_in(log_dir, "tmp_") == []
    assert_same_run(log_dir, whole)


def test_a_full_disk_keeps_a_thousand_lines_of_the_log_waiting(byte_shards, tmp_path, whole):
    """They are more than the buffer of a file usually holds."""

    def before(rank):
        at_step(4, partial(limit_files, 0))(rank)
        at_step(290, partial(limit_files, resource.RLIM_INFINITY))(rank)

    flags = ["--max_steps", 300, "--eval_interval", 300, "--log_interval", 300]
    done = train(byte_shards, tmp_path / "log", *flags, before=before)
    assert done.returncode == 0, done.stderr[-500:]
    assert len(losses(tmp_path / "log")) == 300


def test_files_are_flushed_before_they_become_visible(byte_shards, tmp_path, monkeypatch):
    """Otherwise a power failure could leave a checkpoint of empty files."""
    events = []  # names of what is flushed, and (old name, new name) of what is renamed
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recording_replace(source, target):
        events.append((os.path.basename(source), os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    paths = ["--data_dir", byte_shards, "--log_dir", tmp_path / "log"]
    flags = ["--save_best", "--eval_interval", 1]
    assert call("train_gpt2", *TINY, *flags, *paths).returncode == 0
    [renaming] = [event for event in events if event[1] == "step_000005"]
    position = events.index(renaming)
    assert set(CHECKPOINT_FILES) <= set(events[:position])
    # the directories, with the names in them, are flushed as well
    assert events[position - 1] == renaming[0]
    assert events[position + 1] == "log"
    # the weights of a better model replace those of the best one so far
    replacements = [i for i, event in enumerate(events) if event == 2 * ("model.safetensors",)]
    assert replacements and {events[i - 1] for i in replacements} == {"model.safetensors"}


# ------------------------------------------------------------------------------------- torchrun
def test_a_killed_rank_restarts_a_run_and_a_killed_torchrun_ends_it(byte_shards, tmp_path, whole):
    """Both ranks restart after one message in place of a traceback. They save when torchrun is gone."""
    log_dir = tmp_path / "log"
    flags = [*TWO_RANKS, *ENDLESS, "--resume", "--dropout", 0.1]
    flags += ["--checkpoint_interval", 10, "--keep_checkpoints", 0]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += ["--nproc_per_node=2", "--max-restarts=1"]
    line += command("train_gpt2", *TINY, *flags, "--data_dir", byte_shards, "--log_dir", log_dir)[1:]
    pipe = subprocess.PIPE
    torchrun = subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True)
    wait_for_steps(log_dir, 15)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text()
    killed, other = map(int, children.split())
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{other}").exists())
    saved_step = 10 * len(names_in(log_dir, "step_"))
    wait_for_steps(log_dir, saved_step + 15)
    torchrun.kill()
    out, err = torchrun.communicate(timeout=60)  # until the ranks have ended
    assert f"{log_dir}/step_{saved_step:06d}" in out, "it started over"
    lines = [line for line in err.splitlines() if "error: " in line and "--resume" in line]
    assert len(lines) == 1, err
    assert 'train_gpt2.py", line' not in err, "a traceback"
    steps = len(losses(log_dir))
    assert f"step {steps}" in out.splitlines()[-1] and "--resume" in out.splitlines()[-1]
    # the lock is free, and nothing was lost
    before = at_step(2, send("SIGTERM"))
    assert statuses(byte_shards, log_dir, *flags, ranks=2, before=before) == [0, 0]
    before = at_step(steps + 2, send("SIGTERM"))
    assert statuses(byte_shards, tmp_path / "whole", *flags, ranks=2, before=before) == [0, 0]
    assert_same_run(log_dir, tmp_path / "whole", step=steps + 3)


def test_the_slurm_script_saves_and_requeues_its_job(byte_shards, tmp_path):
    """docs/train.sbatch runs with small scripts in place of Slurm's."""
    scripts = {
        "bin/srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
        "bin/scontrol": f'[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/requeued',
        "bin/torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        ".venv/bin/activate": f'export PATH="{tmp_path}/bin:$PATH"',
    }
    for name, line in scripts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)
    shutil.copy(ROOT / "train_gpt2.py", tmp_path)
    slurm = {"SLURM_NNODES": "1", "SLURM_JOB_ID": "17", "SLURM_GPUS_ON_NODE": "2"}
    slurm |= {"SLURM_JOB_NODELIST": "localhost", "RDZV_PORT": "0"}
    line = ["bash", ROOT / "docs" / "train.sbatch", *TINY, *TWO_RANKS, *ENDLESS]
    line += ["--data_dir", byte_shards]
    job = subprocess.Popen([*map(str, line)], cwd=tmp_path, env={**os.environ, **slurm})
    wait_for_steps(tmp_path / "log", 10)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    steps = len(losses(tmp_path / "log"))
    assert (tmp_path / "log" / f"step_{steps:06d}").is_dir()
    # a job that ends by itself is not requeued
    (tmp_path / "bin" / "torchrun").write_text("#!/bin/bash\nexit 3")
    assert subprocess.run([*map(str, line)], cwd=tmp_path, env={**os.environ, **slurm}).returncode == 3
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


# ------------------------------------------------------------------------ one run in a directory
def test_a_second_run_is_refused_until_the_first_is_dead(byte_shards, tmp_path, whole):
    log_dir = tmp_path / "log"
    before = at_step(3, partial(time.sleep, 60))
    first = start(byte_shards, log_dir, *FLAGS, before=before)
    wait_for_steps(log_dir, 3)
    log = (log_dir / "log.txt").read_bytes()
    second = train(byte_shards, log_dir, *FLAGS, "--resume")
    assert_user_error(second, log_dir)
    assert (log_dir / "log.txt").read_bytes() == log
    first.processes[0].kill()
    first.wait()
    succeed(byte_shards, log_dir, *FLAGS, "--resume")
    assert_same_run(log_dir, whole)


@pytest.mark.parametrize("remains", ["log.txt", "step_000004"])
def test_a_directory_with_a_run_is_not_overwritten(stopped, tmp_path, remains):
    data_dir, log_dir = stopped
    (tmp_path / "new").mkdir()
    (log_dir / remains).rename(tmp_path / "new" / remains)
    done = train(data_dir, tmp_path / "new", *FLAGS)
    assert_user_error(done, tmp_path / "new", "--resume")
    assert names_in(tmp_path / "new") == sorted(["lock", remains])


# ------------------------------------------------------------------------------ NaN and infinity
def test_a_nan_loss_on_one_rank_stops_both(byte_shards, tmp_path, whole):
    before = at_loss(3, lambda loss: loss * float("nan"), rank=1)
    line = [byte_shards, tmp_path / "log", *FLAGS, *TWO_RANKS]
    results = start(*line, ranks=2, before=before).wait()
    assert [done.returncode for done in results] == [2, 2]
    err = "".join(done.stderr for done in results)
    assert "step 3" in err and "nan" in err and err.count("\n") == 1
    assert names_in(tmp_path / "log", "step_") == ["step_000002"]
    assert max(losses(tmp_path / "log")) == 2
    assert statuses(*line, "--resume", ranks=2) == [0, 0]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_infinite_loss_stops_the_run(byte_shards, tmp_path, whole, dtype):
    before = at_loss(2, lambda loss: loss * float("inf"))
    done = train(byte_shards, tmp_path / "log", "--dtype", dtype, before=before)
    assert done.returncode != 0
    assert "step 2" in done.stderr and "inf" in done.stderr
    assert names_in(tmp_path / "log", "step_") == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_skips_a_step_that_overflows(byte_shards, tmp_path, whole, optimizer):
    """Only the gradient of a vector overflows. Muon does not update it, but must skip as well."""

    def before(rank):
        calls = itertools.count()

        def overflow(grad):
            return grad * float("inf") if next(calls) == 2 else grad

        def add_hook(model, args):
            hook.remove()
            vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
            vectors[0].register_hook(overflow)

        hook = torch.nn.modules.module.register_module_forward_pre_hook(add_hook)

    log_dir = tmp_path / "log"
    flags = ["--dtype", "float16", "--optimizer", optimizer]
    flags += ["--checkpoint_interval", 1, "--keep_checkpoints", 0]
    succeed(byte_shards, log_dir, *flags, before=before)
    models = {step: weights_file(log_dir, step).read_bytes() for step in (1, 2, 3, 4)}
    assert models[1] != models[2] == models[3] != models[4]
    assert losses(log_dir, "skipped") == {2: 1}
    scales = []
    for step in (2, 3):
        state = torch.load(log_dir / f"step_{step:06d}" / "trainer.pt", weights_only=True)
        scales.append(state["scaler"]["scale"])
    assert scales[1] == scales[0] / 2


# -------------------------------------------------------------------------------- damaged files
CHECKPOINT_DAMAGES = [*itertools.product(CHECKPOINT_FILES, DAMAGES.values())]
CHECKPOINT_DAMAGES += [("sha256.json", lambda path: path.write_text("{}"))]


@pytest.mark.parametrize("file, damage", CHECKPOINT_DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(stopped, whole, file, damage):
    data_dir, log_dir = stopped
    damage(log_dir / "step_000004" / file)
    done = train(data_dir, log_dir, *FLAGS, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: ") and done.stderr.count("\n") == 1, done.stderr
    assert "step_000004" in done.stderr
    assert str(log_dir / "step_000002") in done.stdout
    assert_same_run(log_dir, whole)


def test_a_run_with_only_damaged_checkpoints_is_refused(stopped):
    """The names are sorted by step, not by letter: the newest one is tried first."""
    data_dir, log_dir = stopped
    before = (log_dir / "log.txt").read_bytes()
    for old_name, new_name in (("step_000004", "step_1000000"), ("step_000002", "step_999999")):
        path = (log_dir / old_name).rename(log_dir / new_name)
        flip_bit(path / "model.safetensors")
    done = train(data_dir, log_dir, *FLAGS, "--resume")
    assert done.returncode == 2
    assert done.stderr.index("step_1000000") < done.stderr.index("step_999999")
    assert (log_dir / "log.txt").read_bytes() == before
    assert names_in(log_dir, "step") == ["step_1000000", "step_999999"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_after_a_damaged_checkpoint_loses_nothing(stopped, whole, keep):
    """Two faults in a row. The new checkpoints have lower numbers than the damaged one."""
    data_dir, log_dir = stopped
    flip_bit(weights_file(log_dir, 4))
    line = [data_dir, log_dir, *FLAGS, "--resume"]
    line += ["--keep_checkpoints", keep, "--checkpoint_interval", 1]
    before = at_step(1, send("SIGKILL"))  # it resumes at step 2, and saves step 3
    assert train(*line, before=before).returncode == -signal.SIGKILL
    assert names_in(log_dir, "step_")[-1] == "step_000003"
    succeed(*line)
    assert_same_run(log_dir, whole)


def test_pickled_code_in_a_checkpoint_is_not_run(stopped, tmp_path):
    """The checksums are right, as in a checkpoint of a stranger."""

    class MakeDirectory:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "the code ran"),)

    checkpoint = stopped[1] / "step_000004"
    torch.save({"step": 4, "extra": MakeDirectory()}, checkpoint / "trainer.pt")
    sign(checkpoint)
    assert_user_error(train(*stopped, *FLAGS, "--resume"), checkpoint)
    assert not (tmp_path / "the code ran").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_log_does_not_change_the_weights(stopped, whole, damage):
    data_dir, log_dir = stopped
    DAMAGES[damage](log_dir / "log.txt")
    succeed(data_dir, log_dir, *FLAGS, "--resume")
    assert weights_file(log_dir).read_bytes() == weights_file(whole).read_bytes()
    # every line that the resumed run has logged is right
    new_lines = {key: value for key, value in reproducible(whole).items() if key[0] >= 4}
    assert new_lines.items() <= reproducible(log_dir).items()


def test_a_log_loses_the_lines_of_repeated_steps_and_no_others(stopped, whole):
    """read_log fails at a figure that is logged twice."""
    data_dir, log_dir = stopped
    with open(log_dir / "log.txt", "a") as file:
        file.write("3 hella 0.2504\n4 other 5.5\n3 other 5.")  # the last line is cut off
    succeed(data_dir, log_dir, *FLAGS, "--resume")
    log = reproducible(log_dir)
    assert log.pop((3, "hella")) == "0.2504"
    assert log == reproducible(whole)


def test_data_from_another_source_with_the_same_tokens_resume(stopped, whole):
    """For example shards that were regenerated after their text was moved."""
    data_dir, log_dir = stopped
    edit_json(data_dir / "meta.json", source={"path": "another/place.txt"})
    succeed(data_dir, log_dir, *FLAGS, "--resume")
    assert_same_run(log_dir, whole)


DATA_DAMAGES = [(SHARD, damage) for damage in [*DAMAGES.values(), replace_tokens]]
DATA_DAMAGES += [(VAL_SHARD, flip_bit), ("meta.json", Path.unlink), ("meta.json", truncate)]


@pytest.mark.parametrize("file, damage", DATA_DAMAGES)
def test_changed_data_is_refused(stopped, file, damage):
    data_dir, log_dir = stopped
    damage(data_dir / file)
    done = train(data_dir, log_dir, *FLAGS, "--resume")
    assert_user_error(done)
    assert "| loss" not in done.stdout


@pytest.mark.parametrize("shard", [SHARD, VAL_SHARD])
def test_a_shard_that_is_truncated_during_a_run_ends_it(stopped, whole, shard):
    data_dir, log_dir = stopped
    shutil.rmtree(log_dir)
    path = data_dir / shard
    content = path.read_bytes()
    before = at_step(1, partial(os.truncate, path, len(content) - 2))
    done = train(data_dir, log_dir, *FLAGS, before=before)
    assert_user_error(done, path, "--resume")
    assert (2, "val") not in read_log(log_dir)
    path.write_bytes(content)
    succeed(data_dir, log_dir, *FLAGS, "--resume")
    assert_same_run(log_dir, whole)


# ---------------------------------------------------------------------- file systems and memory
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_running_out_of_memory_is_one_line(byte_shards, tmp_path, whole, error):
    def no_memory(loss):
        raise error("CUDA out of memory. Tried to allocate 1 GiB")

    done = train(byte_shards, tmp_path / "log", before=at_loss(2, no_memory))
    assert_user_error(done, "out of memory", "--micro_batch_size")


def test_a_file_system_without_locks_gives_one_warning(byte_shards, tmp_path, whole):
    """For example, Lustre mounted without the option flock."""

    def before(rank):
        import fcntl

        def flock(descriptor, operation):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        fcntl.flock = flock

    done = train(byte_shards, tmp_path / "log", *FLAGS, before=before)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: ") and done.stderr.count("\n") == 1
    assert_same_run(tmp_path / "log", whole)


def test_a_system_like_windows_can_train_and_resume(byte_shards, tmp_path, whole):
    """It has neither fcntl nor SIGUSR1, and directories cannot be opened."""

    def before(rank):
        for name in [name for name in sys.modules if name.startswith("filelock")]:
            del sys.modules[name]  # it is imported again, now without fcntl
        sys.modules["fcntl"] = None
        del signal.SIGUSR1
        open_file = os.open

        def refuse_directories(path, *args, **options):
            if isinstance(path, str | Path) and os.path.isdir(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return open_file(path, *args, **options)

        os.open = refuse_directories
        importlib.reload(shutil)  # it sees that os.open was replaced, and deletes trees as on Windows
        at_step(2, send("SIGTERM"))(rank)

    for _ in range(2):
        done = train(byte_shards, tmp_path / "log", *FLAGS, "--resume", before=before)
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "log", whole)
