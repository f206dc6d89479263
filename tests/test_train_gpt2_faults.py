"""Fault tolerance of train_gpt2.py: signals, killed processes, full disks, and damaged or hostile files.

After each fault a run ends as docs/reliability.md promises: with a one-line message, or with the same bytes as a
run without the fault. The faults themselves are in faults.py.
"""

import argparse
import contextlib
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    assert_user_error,
    command,
    load,
    losses,
    read_log,
    reproducible,
    run,
    sign,
    weights_file,
    write_npy,
)
from faults import (
    DAMAGES,
    BadFileSystem,
    Ranks,
    Torchrun,
    at_step,
    at_steps,
    count_steps,
    edit,
    empty_disk,
    fill_disk,
    flip_bit,
    mount_small_disk,
    multiply_loss,
    nested_json,
    overflow_gradient,
    replace_by_directory,
    replace_by_fifo,
    send_signal,
    simulate_windows,
    train,
    truncate,
    wait_until,
)
from safetensors.torch import load_file, save_file

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

# A run of five steps that saves checkpoints at steps 2, 4 and 5, and uses random numbers.
EVERY_2 = ["--checkpoint_interval", 2, "--eval_interval", 2, "--dropout", 0.1, "--max_new_tokens", 4]
# A run that lasts until it is stopped.
ENDLESS = ["--max_steps", 100_000, "--eval_interval", 100_000, "--max_new_tokens", 4]
TWO_RANKS = ["--micro_batch_size", 4]
THREE_RANKS = ["--total_batch_size", 144, "--micro_batch_size", 3]  # 9 windows per step


@pytest.fixture(scope="module")
def whole(byte_shards, tmp_path_factory):
    """The log directory of an uninterrupted run with EVERY_2."""
    log_dir = tmp_path_factory.mktemp("whole") / "log"
    done = train(byte_shards, log_dir, *EVERY_2)
    assert (done.returncode, done.stderr) == (0, "")
    return log_dir


@pytest.fixture
def stopped(byte_shards, tmp_path, whole):
    """(data directory, log directory) of a run with EVERY_2 that was stopped after step 4. Tests may damage them."""
    data_dir, log_dir = tmp_path / "data", tmp_path / "log"
    shutil.copytree(byte_shards, data_dir)
    shutil.copytree(whole, log_dir)
    shutil.rmtree(log_dir / "step_000005")
    return data_dir, log_dir


def weights(log_dir, step=5):
    """Return the bytes of model.safetensors in a checkpoint."""
    return weights_file(log_dir, step).read_bytes()


def assert_same_run(log_dir, expected_log_dir, step=5):
    """Check that two runs ended with the same bytes, and logged the same numbers except for the speed."""
    assert weights(log_dir, step) == weights(expected_log_dir, step)
    assert reproducible(log_dir) == reproducible(expected_log_dir)


def assert_success(done):
    """Check that a run ended with status 0 and without any warning."""
    assert (done.returncode, done.stderr) == (0, "")


def assert_uses_previous_checkpoint(done, log_dir, whole):
    """Check that a run reported a damaged step_000004 in one line, and continued from step_000002 to the end."""
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: ") and done.stderr.count("\n") == 1, done.stderr
    assert "step_000004 is damaged" in done.stderr
    assert "resuming from the checkpoint before it" in done.stderr
    assert "resuming at step 2" in done.stdout
    assert weights(log_dir, 4) == weights(whole, 4)
    assert_same_run(log_dir, whole)


def resume(stopped):
    """Resume the run of the fixture stopped. Returns its CompletedProcess."""
    data_dir, log_dir = stopped
    return train(data_dir, log_dir, *EVERY_2, "--resume")


def names_in(directory, prefix=""):
    """Return the sorted names in a directory that begin with prefix."""
    return sorted(path.name for path in directory.iterdir() if path.name.startswith(prefix))


# ------------------------------------------------------------------------- number of processes
def test_a_run_continues_on_another_number_of_processes(byte_shards, tmp_path):
    """20 steps, stopped at steps 10 and 15: data, losses and the final loss are those of one process."""

    def record_windows(name):
        """For prepare: write each window that is read to a file, and stop run "one" at 10 and run "two" at 15."""

        def prepare(module, rank):
            class RecordingDataset(module.TokenDataset):
                def batch(self, indices):
                    if self.shuffle:
                        with open(tmp_path / f"{name}_{rank}", "a") as file:
                            file.writelines(f"{index // 8} {self.locate(index)}\n" for index in indices)
                        # The data of step 10 is read in step 9, which is then completed and saved.
                        if (name, min(indices) // 8) in (("one", 10), ("two", 15)):
                            os.kill(os.getpid(), signal.SIGTERM)
                    return super().batch(indices)

            module.TokenDataset = RecordingDataset

        return prepare

    flags = ["--max_steps", 20, "--micro_batch_size", 2, "--eval_interval", 20, "--max_new_tokens", 4]
    runs = (("whole", 1, "whole"), ("one", 1, "log"), ("two", 2, "log"), ("four", 4, "log"))
    for name, world_size, log_dir in runs:
        ranks = Ranks(world_size, byte_shards, tmp_path / log_dir, *flags, "--resume", prepare=record_windows(name))
        for done in ranks.wait():
            assert_success(done)
        if name == "one":
            assert (tmp_path / "log" / "step_000010").is_dir()
        if name == "two":
            assert (tmp_path / "log" / "step_000015").is_dir()

    # The last two windows of each file were read for a step that this process did not reach.
    windows = {path.name: path.read_text().splitlines()[:-2] for path in tmp_path.glob("*_[0-3]")}
    expected_windows = windows.pop("whole_0")
    assert len(expected_windows) == 160
    assert len(windows) == 7
    assert sorted(sum(windows.values(), [])) == sorted(expected_windows)
    expected = losses(tmp_path / "whole")
    assert len(expected) == 20
    assert losses(tmp_path / "log") == pytest.approx(expected, abs=1e-5)
    assert losses(tmp_path / "log", "val") == pytest.approx(losses(tmp_path / "whole", "val"), abs=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_three_ranks_end_with_the_same_bytes_after_an_interruption(byte_shards, tmp_path, number):
    """DDP must sum the gradients in the same order in the first step of a resumed run as in any other step."""
    flags = [*EVERY_2, *THREE_RANKS, "--max_steps", 8]
    expected = Ranks(3, byte_shards, tmp_path / "whole", *flags)
    prepare = at_step(4, send_signal(number, to_rank=1), windows_per_step=9)
    interrupted = Ranks(3, byte_shards, tmp_path / "log", *flags, prepare=prepare)
    assert expected.statuses() == [0, 0, 0]
    assert interrupted.statuses() == ([0, 0, 0] if number == signal.SIGTERM else [1, -number, 1])
    newest = "step_000005" if number == signal.SIGTERM else "step_000004"
    assert names_in(tmp_path / "log", "step_")[-1] == newest
    assert Ranks(3, byte_shards, tmp_path / "log", *flags, "--resume").statuses() == [0, 0, 0]
    assert_same_run(tmp_path / "log", tmp_path / "whole", step=8)


# ------------------------------------------------------------------------------------- torchrun
@LINUX
def test_a_signal_to_one_worker_stops_all_ranks_and_saves_that_step(byte_shards, tmp_path):
    torchrun = Torchrun(byte_shards, tmp_path / "log", *ENDLESS)
    torchrun.signal_after_steps(20, rank=1, number=signal.SIGTERM)
    done = torchrun.wait()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    steps = len(losses(tmp_path / "log"))
    checkpoint = tmp_path / "log" / f"step_{steps:06d}"
    assert torch.load(checkpoint / "trainer.pt", weights_only=True)["step"] == steps
    assert f"stopped by a signal to another rank at step {steps}: continue with --resume" in done.stdout

    # SIGUSR1 does the same
    prepare = at_step(steps + 2, send_signal(signal.SIGUSR1))
    ranks = Ranks(2, byte_shards, tmp_path / "log", *ENDLESS, *TWO_RANKS, "--resume", prepare=prepare)
    assert ranks.statuses() == [0, 0]
    assert (tmp_path / "log" / f"step_{steps + 3:06d}").is_dir()


@LINUX
def test_a_killed_rank_ends_the_run_with_one_message(byte_shards, tmp_path):
    torchrun = Torchrun(byte_shards, tmp_path / "log", *ENDLESS)
    torchrun.signal_after_steps(20, rank=0, number=signal.SIGKILL)
    done = torchrun.wait()
    assert done.returncode == 1
    assert torchrun.find_worker(1) is None
    lines = [line for line in done.stderr.splitlines() if "error: " in line and "--resume" in line]
    assert len(lines) == 1 and "rank 1" in lines[0], done.stderr
    assert 'train_gpt2.py", line' not in done.stderr, "train_gpt2.py printed a traceback"


@LINUX
def test_a_run_that_torchrun_restarts_ends_with_the_same_bytes(byte_shards, tmp_path):
    flags = ["--max_steps", 120, "--checkpoint_interval", 20, "--dropout", 0.1, *TWO_RANKS]
    flags += ["--eval_interval", 100, "--max_new_tokens", 4, "--log_interval", 100]
    torchrun = Torchrun(byte_shards, tmp_path / "log", *flags, max_restarts=2)
    torchrun.signal_after_steps(30, rank=1, number=signal.SIGKILL)
    assert Ranks(2, byte_shards, tmp_path / "whole", *flags).statuses() == [0, 0]
    done = torchrun.wait()
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    assert_same_run(tmp_path / "log", tmp_path / "whole", step=120)


@LINUX
def test_workers_end_when_torchrun_is_killed(byte_shards, tmp_path):
    torchrun = Torchrun(byte_shards, tmp_path / "log", *ENDLESS)
    torchrun.wait_for_steps(20)
    workers = [torchrun.find_worker(0), torchrun.find_worker(1)]
    steps_before = count_steps(tmp_path / "log")
    torchrun.process.kill()
    done = torchrun.wait()  # until the workers have closed the output
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers))
    steps = len(losses(tmp_path / "log"))
    assert f"stopped by the end of torchrun at step {steps}: continue with --resume" in done.stdout
    assert steps < steps_before + 200  # steps take about a millisecond each
    # the state is saved, and the lock is free
    assert names_in(tmp_path / "log", "step_") == [f"step_{steps:06d}"]
    prepare = at_step(steps + 1, send_signal(signal.SIGTERM))
    ranks = Ranks(2, byte_shards, tmp_path / "log", *ENDLESS, *TWO_RANKS, "--resume", prepare=prepare)
    for done in ranks.wait():
        assert_success(done)


# -------------------------------------------------------------------------------------- signals
def test_a_run_stopped_by_max_hours_can_be_resumed(byte_shards, tmp_path, whole):
    done = train(byte_shards, tmp_path / "log", *EVERY_2, "--max_hours", 1e-9)
    assert_success(done)
    assert "stopped by --max_hours at step 1: continue with --resume" in done.stdout
    assert_success(train(byte_shards, tmp_path / "log", *EVERY_2, "--resume"))
    assert_same_run(tmp_path / "log", whole)


def test_max_hours_are_hours(byte_shards, tmp_path):
    """1e-4 hours are 0.36 seconds."""
    start = time.monotonic()
    done = train(byte_shards, tmp_path / "log", *ENDLESS, "--log_interval", 1000, "--max_hours", 1e-4)
    assert_success(done)
    assert 0.36 < time.monotonic() - start < 60
    assert "stopped by --max_hours" in done.stdout


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_the_step_and_ends_with_status_0(byte_shards, tmp_path, whole, name):
    prepare = at_step(2, send_signal(getattr(signal, name)))
    [done] = Ranks(1, byte_shards, tmp_path / "log", *EVERY_2, prepare=prepare).wait()
    assert_success(done)
    assert f"stopped by {name} at step 3: continue with --resume" in done.stdout
    assert names_in(tmp_path / "log", "step_") == ["step_000002", "step_000003"]
    assert_success(train(byte_shards, tmp_path / "log", *EVERY_2, "--resume"))
    assert_same_run(tmp_path / "log", whole)


def test_a_signal_to_one_rank_ends_an_evaluation_on_both(byte_shards, tmp_path):
    """The second evaluation is abandoned: nothing of it is logged, and the resumed run repeats it."""

    def prepare(module, rank):
        class WatchedDataset(module.TokenDataset):
            def batch(self, indices):
                if not self.shuffle:
                    evaluated.append(indices)
                    if rank == 1 and len(evaluated) == 5:  # an evaluation of 25 windows has four batches per rank
                        os.kill(os.getpid(), signal.SIGTERM)
                return super().batch(indices)

        evaluated = []
        module.TokenDataset = WatchedDataset

    flags = [*EVERY_2, *TWO_RANKS]
    assert Ranks(2, byte_shards, tmp_path / "log", *flags, prepare=prepare).statuses() == [0, 0]
    assert (1, "train") in read_log(tmp_path / "log")
    assert (2, "val") not in read_log(tmp_path / "log")
    assert (tmp_path / "log" / "step_000002").is_dir()
    assert Ranks(2, byte_shards, tmp_path / "log", *flags, "--resume").statuses() == [0, 0]
    assert Ranks(2, byte_shards, tmp_path / "whole", *flags).statuses() == [0, 0]
    assert_same_run(tmp_path / "log", tmp_path / "whole")


def test_a_second_ctrl_c_ends_the_process_at_once(byte_shards, tmp_path):
    def interrupt_twice(rank):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.1)
        (tmp_path / "waited").touch()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    start = time.monotonic()
    ranks = Ranks(1, byte_shards, tmp_path / "log", prepare=at_step(2, interrupt_twice))
    assert ranks.statuses() == [-signal.SIGINT]
    assert (tmp_path / "waited").exists()
    assert time.monotonic() < start + 30


def test_pressing_ctrl_c_again_and_again_ends_the_process_one_second_after_the_first(byte_shards, tmp_path):
    """Each further Ctrl-C within that second does not make it longer."""

    def interrupt_three_times(rank):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.7)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.7)
        os.kill(os.getpid(), signal.SIGINT)

    ranks = Ranks(1, byte_shards, tmp_path / "log", prepare=at_step(2, interrupt_three_times))
    assert ranks.statuses() == [-signal.SIGINT]


def test_a_ctrl_c_that_torchrun_repeats_at_once_counts_as_one(byte_shards, tmp_path, whole):
    """torchrun passes on a Ctrl-C that the terminal has sent to all processes already."""

    def interrupt_twice(rank):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    [done] = Ranks(1, byte_shards, tmp_path / "log", *EVERY_2, prepare=at_step(2, interrupt_twice)).wait()
    assert_success(done)
    assert "stopped by SIGINT at step 3" in done.stdout
    assert_success(train(byte_shards, tmp_path / "log", *EVERY_2, "--resume"))
    assert_same_run(tmp_path / "log", whole)


def test_a_ctrl_c_after_other_signals_does_not_end_the_process(byte_shards, tmp_path):
    """Only a second SIGINT does: torchrun may send SIGTERM first."""

    def send_both(rank):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)

    [done] = Ranks(1, byte_shards, tmp_path / "log", *EVERY_2, prepare=at_step(2, send_both)).wait()
    assert_success(done)
    assert "stopped by SIGTERM at step 3" in done.stdout


def test_an_interrupt_in_the_last_step_leaves_the_last_evaluation_to_the_resumed_run(byte_shards, tmp_path, whole):
    prepare = at_step(4, send_signal(signal.SIGINT))
    [done] = Ranks(1, byte_shards, tmp_path / "log", *EVERY_2, prepare=prepare).wait()
    assert_success(done)
    assert_success(train(byte_shards, tmp_path / "log", *EVERY_2, "--resume"))
    assert_same_run(tmp_path / "log", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["read_data_set", "open_run_directory", "init_model", "load_batch"])
def test_a_signal_during_start_up_does_no_harm(stopped, whole, moment, number):
    """The run ends, by the signal or after one step, and the next start continues it."""
    data_dir, log_dir = stopped

    def prepare(module, rank):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as run_script does
        function = getattr(module, moment)

        def interrupted(*args):
            result = function(*args)
            os.kill(os.getpid(), number)
            return result

        setattr(module, moment, interrupted)

    [status] = Ranks(1, data_dir, log_dir, *EVERY_2, "--resume", prepare=prepare).statuses()
    assert status == (0 if moment == "load_batch" else -number)
    assert_success(resume(stopped))
    assert_same_run(log_dir, whole)


# ----------------------------------------------------------------------------------------- lock
def test_a_second_run_is_refused_but_the_lock_of_a_killed_run_is_not_in_the_way(byte_shards, tmp_path, whole):
    log_dir = tmp_path / "log"
    first = Ranks(1, byte_shards, log_dir, *EVERY_2, prepare=at_step(3, lambda rank: time.sleep(60)))
    wait_until(lambda: count_steps(log_dir) == 3)  # it sleeps in the fourth step
    log_before = (log_dir / "log.txt").read_bytes()
    assert_user_error(train(byte_shards, log_dir, *EVERY_2, "--resume"), "in use", log_dir)
    assert (log_dir / "log.txt").read_bytes() == log_before
    first.processes[0].kill()
    assert first.statuses() == [-signal.SIGKILL]
    assert (log_dir / "lock").exists()
    assert_success(train(byte_shards, log_dir, *EVERY_2, "--resume"))
    assert weights(log_dir) == weights(whole)


@pytest.mark.parametrize("content", [None, b"", bytes(range(100))], ids=["missing", "empty", "binary"])
def test_the_content_of_the_lock_file_does_not_matter(stopped, whole, content):
    _, log_dir = stopped
    (log_dir / "lock").unlink()
    if content is not None:
        (log_dir / "lock").write_bytes(content)
    assert_success(resume(stopped))
    assert weights(log_dir) == weights(whole)


def test_a_directory_in_place_of_the_lock_is_a_user_error(stopped):
    _, log_dir = stopped
    replace_by_directory(log_dir / "lock")
    assert_user_error(resume(stopped), "--log_dir", log_dir)


# ------------------------------------------------------------------- return to an earlier checkpoint
def contents(directory):
    """Return the bytes of each file in a checkpoint."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("restart_count", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restarted_return_to_a_checkpoint_continues_from_the_newest_one(
    byte_shards, tmp_path, whole, monkeypatch, restart_count
):
    log_dir = tmp_path / "log"
    shutil.copytree(whole, log_dir)
    set_aside = {name: contents(log_dir / name) for name in ("step_000004", "step_000005")}
    command_line = [*EVERY_2, "--resume", log_dir / "step_000002"]

    # return to step 2, and stop at step 3
    done = train(byte_shards, log_dir, *command_line, prepare=at_step(2, send_signal(signal.SIGTERM)))
    assert_success(done)
    assert "resuming at step 2" in done.stdout
    former = ["former_step_000004", "former_step_000005"]
    assert names_in(log_dir, "former") == former
    assert names_in(log_dir, "step") == ["step_000002", "step_000003"]

    # the same command, restarted, continues
    monkeypatch.setenv(restart_count, "1")
    done = train(byte_shards, log_dir, *command_line)
    assert_success(done)
    assert "resuming at step 3" in done.stdout
    assert names_in(log_dir, "former") == former
    assert_same_run(log_dir, whole)

    # a second return keeps what the first one set aside
    monkeypatch.delenv(restart_count)
    second = {name: contents(log_dir / name) for name in ("step_000004", "step_000005")}
    assert_success(train(byte_shards, log_dir, *EVERY_2, "--resume", log_dir / "step_000003"))
    assert names_in(log_dir, "former") == sorted([*former, "former_step_000004_2", "former_step_000005_2"])
    for name, expected in set_aside.items():
        assert contents(log_dir / f"former_{name}") == expected
        assert contents(log_dir / f"former_{name}_2") == second[name]
    assert_same_run(log_dir, whole)


def test_a_return_that_is_refused_changes_nothing(stopped):
    data_dir, log_dir = stopped
    before = names_in(log_dir)
    done = train(data_dir, log_dir, *EVERY_2, "--resume", log_dir / "step_000002", "--learning_rate", 0.5)
    assert_user_error(done, "--learning_rate is 0.5")
    assert names_in(log_dir) == before


def test_a_checkpoint_that_was_set_aside_is_not_called_damaged(stopped):
    data_dir, log_dir = stopped
    os.rename(log_dir / "step_000004", log_dir / "former_step_000004")
    done = train(data_dir, log_dir, *EVERY_2, "--resume", log_dir / "former_step_000004")
    assert_user_error(done, "former_step_000004 is not named step_NNNNNN", "rename")
    assert "damaged" not in done.stderr


def test_a_damaged_checkpoint_to_return_to_is_an_error_although_others_are_intact(stopped):
    data_dir, log_dir = stopped
    truncate(log_dir / "step_000002" / "model.safetensors")
    before = names_in(log_dir)
    done = train(data_dir, log_dir, *EVERY_2, "--resume", log_dir / "step_000002")
    assert_user_error(done, "step_000002 is damaged", "--resume DIR")
    assert names_in(log_dir) == before


def test_a_restart_before_the_first_checkpoint_starts_from_the_given_one_again(stopped, tmp_path, whole, monkeypatch):
    """The run continues the checkpoint of another run, in a directory of its own."""
    data_dir, log_dir = stopped
    command_line = [*EVERY_2, "--resume", log_dir / "step_000002"]
    ranks = Ranks(1, data_dir, tmp_path / "new", *command_line, prepare=at_step(2, send_signal(signal.SIGKILL)))
    assert ranks.statuses() == [-signal.SIGKILL]
    assert names_in(tmp_path / "new", "step") == []
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    done = train(data_dir, tmp_path / "new", *command_line)
    assert_success(done)
    assert "resuming at step 2" in done.stdout
    assert weights(tmp_path / "new") == weights(whole)


def test_resume_with_the_run_directory_means_its_newest_checkpoint(stopped, whole):
    data_dir, log_dir = stopped
    done = train(data_dir, log_dir, *EVERY_2, "--resume", log_dir)
    assert_success(done)
    assert "resuming at step 4" in done.stdout
    assert names_in(log_dir, "former") == []
    assert_same_run(log_dir, whole)


@pytest.mark.parametrize("remains", ["log.txt", "step_000004"])
def test_a_directory_with_a_run_is_not_overwritten(stopped, remains):
    """A log without checkpoints, and checkpoints without a log, are runs as well."""
    data_dir, log_dir = stopped
    for path in log_dir.iterdir():
        if path.is_dir() and path.name != remains:
            shutil.rmtree(path)
        elif path.is_file() and path.name != remains:
            path.unlink()
    assert_user_error(train(data_dir, log_dir, *EVERY_2), "already contains a run", "--resume")
    assert names_in(log_dir) == sorted(["lock", remains])


def test_a_checkpoint_of_another_run_does_not_continue_in_the_directory_of_a_run(stopped, tmp_path):
    data_dir, log_dir = stopped
    shutil.copytree(log_dir, tmp_path / "other")
    done = train(data_dir, log_dir, *EVERY_2, "--resume", tmp_path / "other" / "step_000002")
    assert_user_error(done, "already contains a run", "belongs to another one", log_dir)
    assert names_in(log_dir, "step") == ["step_000002", "step_000004"]


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path):
    module = load("train_gpt2")
    for name in ("step_1000000", "step_999999", "step_000007", "step_12", "former_step_000001", "step_000003_2"):
        (tmp_path / name).mkdir()
    paths = module.RunDirectory(str(tmp_path)).checkpoints()
    assert [Path(path).name for path in paths] == ["step_000007", "step_999999", "step_1000000"]


# ------------------------------------------------------------------------------ NaN and infinity
def test_nan_weights_stop_the_run_before_they_are_used(stopped):
    data_dir, log_dir = stopped
    checkpoint = log_dir / "step_000004"
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["transformer.wpe.weight"][3, 0] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    sign(checkpoint)
    done = resume(stopped)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "step 4, rank 0: loss nan" in done.stderr
    # the message lists the data of the step
    module = load("train_gpt2")
    data_set = module.read_data_set(str(data_dir))
    dataset = module.TokenDataset(str(data_dir), "train", data_set, block_size=16, seed=1337, shuffle=True)
    for index in range(32, 40):
        shard, offset = dataset.locate(index)
        assert f"('{dataset.paths[shard]}', {offset})" in done.stderr
    assert not (log_dir / "step_000005").exists()


def test_a_nan_loss_on_one_of_two_ranks_stops_both(byte_shards, tmp_path):
    flags = [*EVERY_2, *TWO_RANKS]
    prepare = multiply_loss(at_micro_step=3, factor=float("nan"))
    results = Ranks(2, byte_shards, tmp_path / "log", *flags, prepare=prepare).wait()
    assert [done.returncode for done in results] == [1, 1], results
    assert "step 3, rank 1: loss nan" in results[1].stderr
    # rank 0 does not blame its own data
    own_loss = re.search(r"step 3, rank 0: loss (\S+) on", results[0].stderr)[1]
    assert math.isfinite(float(own_loss))
    assert "norm over all ranks nan" in results[0].stderr
    assert "Traceback" not in results[0].stderr + results[1].stderr
    assert names_in(tmp_path / "log") == ["lock", "log.txt", "run.json", "step_000002"]
    assert max(losses(tmp_path / "log")) == 2
    # without the cause, the run can be resumed
    assert Ranks(2, byte_shards, tmp_path / "log", *flags, "--resume").statuses() == [0, 0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_skips_and_counts_a_step_whose_gradients_overflow(optimizer, byte_shards, tmp_path):
    flags = ["--dtype", "float16", "--checkpoint_interval", 1, "--keep_checkpoints", 0, "--optimizer", optimizer]
    assert_success(train(byte_shards, tmp_path / "log", *flags, prepare=overflow_gradient(at_micro_step=2)))
    assert weights(tmp_path / "log", 2) == weights(tmp_path / "log", 3)
    assert weights(tmp_path / "log", 3) != weights(tmp_path / "log", 4)
    skipped = {key: value for key, value in read_log(tmp_path / "log").items() if key[1] == "skipped"}
    assert skipped == {(2, "skipped"): "1"}
    scales = []
    for step in (2, 3):
        trainer_state = torch.load(tmp_path / "log" / f"step_{step:06d}" / "trainer.pt", weights_only=True)
        scales.append(trainer_state["scaler"]["scale"])
    assert scales[1] == scales[0] / 2


def test_float16_stops_at_an_infinite_loss_that_no_scale_can_fix(byte_shards, tmp_path):
    prepare = multiply_loss(at_micro_step=2, factor=float("inf"))
    done = train(byte_shards, tmp_path / "log", "--dtype", "float16", prepare=prepare)
    assert done.returncode == 1
    assert "step 2" in done.stderr and "loss inf" in done.stderr
    assert names_in(tmp_path / "log", "step") == []


# --------------------------------------------------------------------------- damaged checkpoints
CHECKPOINT_FILES = ["model.safetensors", "config.json", "trainer.pt", "sha256.json"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", CHECKPOINT_FILES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_is_used(stopped, whole, file, damage):
    _, log_dir = stopped
    DAMAGES[damage](log_dir / "step_000004" / file)
    assert_uses_previous_checkpoint(resume(stopped), log_dir, whole)


def test_a_changed_config_is_noticed_even_if_it_fits_the_weights(stopped, whole):
    """Four heads have the same weights as two heads, but compute something else."""
    _, log_dir = stopped
    edit(log_dir / "step_000004" / "config.json", r'"n_head": 2', '"n_head": 4')
    assert_uses_previous_checkpoint(resume(stopped), log_dir, whole)


@pytest.mark.parametrize("content", ["a file", "an empty directory"])
def test_something_else_in_place_of_the_newest_checkpoint_is_reported(stopped, whole, content):
    _, log_dir = stopped
    shutil.rmtree(log_dir / "step_000004")
    if content == "a file":
        (log_dir / "step_000004").write_text("mine")
    else:
        (log_dir / "step_000004").mkdir()
    done = resume(stopped)
    assert done.returncode == 0, done.stderr
    assert "step_000004 is damaged" in done.stderr
    assert weights(log_dir) == weights(whole)
    assert reproducible(log_dir) == reproducible(whole)


def test_a_run_with_only_damaged_checkpoints_is_refused(stopped):
    _, log_dir = stopped
    before = (log_dir / "log.txt").read_bytes()
    for name in ("step_000002", "step_000004"):
        flip_bit(log_dir / name / "model.safetensors")
    assert_user_error(resume(stopped), "step_000004 is damaged", "--log_dir")
    assert (log_dir / "log.txt").read_bytes() == before
    assert names_in(log_dir, "step") == ["step_000002", "step_000004"]


class MakeDirectory:
    """An object whose pickle makes a directory when it is loaded, to show that code has run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", CHECKPOINT_FILES)
def test_pickled_code_in_a_checkpoint_is_not_run(stopped, whole, tmp_path, file):
    """The checksums are correct, as in a checkpoint from a stranger. The checkpoint before it is used."""
    _, log_dir = stopped
    checkpoint = log_dir / "step_000004"
    torch.save({"step": 4, "extra": MakeDirectory(tmp_path / "the code ran")}, checkpoint / file)
    if file != "sha256.json":
        sign(checkpoint)
    done = resume(stopped)
    assert not (tmp_path / "the code ran").exists()
    assert_uses_previous_checkpoint(done, log_dir, whole)


# ----------------------------------------------------------------------------- hostile trainer.pt
def optimizer_tensors(trainer_state):
    """Return the tensors of the first parameter of AdamW, a dict."""
    return trainer_state["optimizers"][-1]["state"][0]


def set_tensor(name, change):
    """Return a function that replaces a tensor of the optimizer by change(tensor)."""

    def damage(trainer_state):
        tensors = optimizer_tensors(trainer_state)
        tensors[name] = change(tensors[name])

    return damage


def set_value(*keys, value):
    """Return a function that sets trainer_state[keys[0]][keys[1]]... to value."""

    def damage(trainer_state):
        content = trainer_state
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return damage


def delete(*keys):
    """Return a function that deletes trainer_state[keys[0]][keys[1]]..."""

    def damage(trainer_state):
        content = trainer_state
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return damage


def nested_list(depth):
    """Return a list in a list in a list ..., so deeply."""
    content = []
    for _ in range(depth):
        content = [content]
    return content


TRAINER_DAMAGES = {
    # optimizer states that do not fit the model: the fused kernels would read and write beyond them
    "tensor too short": set_tensor("exp_avg", lambda tensor: torch.zeros(1)),
    "tensor transposed": set_tensor("exp_avg", lambda tensor: tensor.T.contiguous()),
    "tensor without dimensions": set_tensor("exp_avg_sq", lambda tensor: torch.tensor(0.0)),
    "tensor in float64": set_tensor("exp_avg_sq", lambda tensor: tensor.double()),
    "tensor in bfloat16": set_tensor("exp_avg", lambda tensor: tensor.bfloat16()),
    "tensor of integers": set_tensor("exp_avg", lambda tensor: tensor.long()),
    "tensor on no device": set_tensor("exp_avg", lambda tensor: torch.empty_like(tensor, device="meta")),
    "tensor that is sparse": set_tensor("exp_avg", lambda tensor: tensor.to_sparse()),
    "tensor with strides of 0": set_tensor("exp_avg", lambda tensor: torch.zeros(1, 1).expand(tensor.shape)),
    "tensor a number": set_tensor("exp_avg", lambda tensor: 0.0),
    "tensor a list": set_tensor("exp_avg", lambda tensor: [0.0]),
    "tensor None": set_tensor("exp_avg", lambda tensor: None),
    "step too long": set_tensor("step", lambda tensor: torch.zeros(2)),
    "step an integer": set_tensor("step", lambda tensor: 4),
    "tensor missing": delete("optimizers", 0, "state", 0, "exp_avg"),
    "tensor extra": set_value("optimizers", 0, "state", 0, "max_exp_avg_sq", value=torch.zeros(1)),
    "parameter missing": delete("optimizers", 0, "state", 0),
    "parameter extra": set_value("optimizers", 0, "state", 1000, value={}),
    "parameter with a name": set_value("optimizers", 0, "state", "x", value={}),
    "parameter a list": set_value("optimizers", 0, "state", 0, value=[]),
    "state a list": set_value("optimizers", 0, "state", value=[]),
    "state missing": delete("optimizers", 0, "state"),
    "optimizer a list": set_value("optimizers", 0, value=[]),
    "optimizers empty": set_value("optimizers", value=[]),
    "optimizers a number": set_value("optimizers", value=1),
    "optimizers missing": delete("optimizers"),
    # values of other types, and missing keys
    "step missing": delete("step"),
    "step of another checkpoint": set_value("step", value=2),
    "step a float": set_value("step", value=4.0),
    "step true": set_value("step", value=True),
    "step infinite": set_value("step", value=float("inf")),
    "step a tensor": set_value("step", value=torch.tensor([4, 4])),
    "scaler missing": delete("scaler"),
    "scaler a list": set_value("scaler", value=[1]),
    "scaler with missing keys": set_value("scaler", value={"scale": 1.0}),
    "args missing": delete("args"),
    "args a list": set_value("args", value=["seed"]),
    "optimizer name missing": delete("args", "optimizer"),
    "learning rate missing": delete("args", "learning_rate"),
    "learning rate a string": set_value("args", "learning_rate", value="1e-3"),
    "learning rate NaN": set_value("args", "learning_rate", value=float("nan")),
    "dtype a list": set_value("args", "dtype", value=["float32"]),
    "seed a tensor": set_value("args", "seed", value=torch.zeros(2)),
    "seed a nested list": set_value("args", "seed", value=nested_list(400)),
    "max_steps below the step": set_value("args", "max_steps", value=3),
}


def rewrite_trainer_state(checkpoint, damage):
    """Apply damage(trainer_state) to trainer.pt of a checkpoint, and make the checksums agree with it."""
    trainer_state = torch.load(checkpoint / "trainer.pt", weights_only=True)
    damage(trainer_state)
    torch.save(trainer_state, checkpoint / "trainer.pt")
    sign(checkpoint)


@pytest.mark.parametrize("damage", TRAINER_DAMAGES)
def test_a_trainer_state_that_does_not_fit_counts_as_damaged(stopped, whole, damage):
    """In a process of its own, because a tensor that is too short may crash the process."""
    data_dir, log_dir = stopped
    rewrite_trainer_state(log_dir / "step_000004", TRAINER_DAMAGES[damage])
    [done] = Ranks(1, data_dir, log_dir, *EVERY_2, "--resume").wait()
    assert_uses_previous_checkpoint(done, log_dir, whole)


@pytest.mark.parametrize("damage", [set_value("format", value=1), delete("format")], ids=["format 1", "no format"])
def test_a_checkpoint_of_an_earlier_version_is_a_user_error(stopped, damage):
    """Older checkpoints have the same format: using one of them silently would lose steps."""
    _, log_dir = stopped
    rewrite_trainer_state(log_dir / "step_000004", damage)
    assert_user_error(resume(stopped), "step_000004", "earlier version", "--init_from")


# ---------------------------------------------------------------------------- hostile JSON files
def set_json(**values):
    """Return a function that sets keys of a JSON file."""

    def damage(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


def write_text(text):
    """Return a function that writes a text to a file."""
    return lambda path: path.write_text(text)


CONFIG_DAMAGES = {
    "n_layer a string": set_json(n_layer="2"),
    "n_layer true": set_json(n_layer=True),
    "n_layer infinite": set_json(n_layer=float("inf")),
    "n_layer a fraction": set_json(n_layer=1.5),
    "n_layer null": set_json(n_layer=None),
    "n_layer negative": set_json(n_layer=-2),
    "n_layer too large": set_json(n_layer=3),
    "n_head zero": set_json(n_head=0),
    "n_embd a list": set_json(n_embd=[32]),
    "n_embd of 400 digits": set_json(n_embd=10**399),
    "n_positions a number of other rows": set_json(n_positions=15),
    "vocab_size a string": set_json(vocab_size="257"),
    "vocab_size too large": set_json(vocab_size=1000),
    "tokenizer a list": set_json(tokenizer=["bytes"]),
    "tokenizer of another size": set_json(tokenizer="gpt2"),
    "activation a list": set_json(activation_function=[]),
    "activation unknown": set_json(activation_function="tanh"),
    "epsilon a string": set_json(layer_norm_epsilon="1e-5"),
    "epsilon NaN": set_json(layer_norm_epsilon=float("nan")),
    "dropout infinite": set_json(resid_pdrop=float("inf")),
    "model_type a dict": set_json(model_type={}),
    "no keys": write_text("{}"),
    "a number of 5,000 digits": write_text('{"n_layer": ' + "9" * 5000 + "}"),
    "nested 10,000 deep": write_text(nested_json(10_000)),
    "a nested list in n_inner": write_text('{"model_type": "gpt2", "n_inner": ' + nested_json(900) + "}"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGES)
def test_a_config_that_does_not_fit_counts_as_damaged(stopped, whole, damage):
    _, log_dir = stopped
    CONFIG_DAMAGES[damage](log_dir / "step_000004" / "config.json")
    sign(log_dir / "step_000004")
    assert_uses_previous_checkpoint(resume(stopped), log_dir, whole)


CHECKSUM_DAMAGES = {
    "checksums that are numbers": set_json(**{name: 1 for name in CHECKPOINT_FILES}),
    "checksums that are lists": set_json(**{"trainer.pt": [[]]}),
    "no checksums": write_text("{}"),
    "nested 10,000 deep": write_text(nested_json(10_000)),
}


@pytest.mark.parametrize("damage", CHECKSUM_DAMAGES)
def test_a_checksum_file_with_other_content_counts_as_damaged(stopped, whole, damage):
    _, log_dir = stopped
    CHECKSUM_DAMAGES[damage](log_dir / "step_000004" / "sha256.json")
    assert_uses_previous_checkpoint(resume(stopped), log_dir, whole)


@pytest.mark.parametrize("damage", [*DAMAGES, "nested 10,000 deep", "a number"])
def test_the_content_of_run_json_does_not_matter(stopped, whole, damage):
    """Only plot.py and people read it. A directory in its place is a user error."""
    _, log_dir = stopped
    damages = {**DAMAGES, "nested 10,000 deep": write_text(nested_json(10_000)), "a number": write_text("1")}
    damages[damage](log_dir / "run.json")
    done = resume(stopped)
    if damage == "a directory":
        return assert_user_error(done, "run.json")
    assert_success(done)
    assert_same_run(log_dir, whole)
    assert json.loads((log_dir / "run.json").read_text())["max_steps"] == 5


# --------------------------------------------------------------------------------- damaged logs
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_log_does_not_change_the_weights(stopped, whole, damage):
    """Readable lines are kept. Something else than a file in its place is a user error."""
    _, log_dir = stopped
    DAMAGES[damage](log_dir / "log.txt")
    done = resume(stopped)
    if damage in ("a directory", "a named pipe"):
        return assert_user_error(done, log_dir / "log.txt")
    assert_success(done)
    assert weights(log_dir) == weights(whole)
    actual, expected = reproducible(log_dir), reproducible(whole)
    for key, value in expected.items():
        if key[0] >= 4:  # the steps that the resumed run has logged
            assert actual[key] == value
    unexpected = set(actual.items()) - set(expected.items())
    assert len(unexpected) <= 1  # a number with a flipped bit may still be a number


STRANGE_LINES = {
    "5,000 digits": "9" * 5000 + " train 5.5\n",
    "5,000 digits in a small step": "0" * 5000 + "3 train 5.5\n",
    "negative step": "-1 train 5.5\n",
    "fraction of a step": "0.5 train 5.5\n",
    "two words": "1 train\n",
    "four words": "1 train 5.5 5.5\n",
    "empty": "\n",
    "zero bytes": "\0" * 50 + "\n",
    "later step": "4 other 5.5\n",
    "much later step": "999999999999999999 other 5.5\n",
    "cut by a crash": "3 other 5.",
}


@pytest.mark.parametrize("name", STRANGE_LINES)
def test_strange_lines_of_the_log_are_dropped(stopped, whole, name):
    _, log_dir = stopped
    with open(log_dir / "log.txt", "a") as file:
        file.write(STRANGE_LINES[name])
    assert_success(resume(stopped))
    assert_same_run(log_dir, whole)


def test_lines_of_other_kinds_are_kept(stopped):
    _, log_dir = stopped
    with open(log_dir / "log.txt", "a") as file:
        file.write("3 hella 0.2504\n")
    assert_success(resume(stopped))
    assert read_log(log_dir)[3, "hella"] == "0.2504"


# ------------------------------------------------------------------------- leftovers of a crash
@pytest.mark.parametrize("name", ["tmp_step_000005", "tmp_step_000004", "tmp_step_test", "tmp_step_renamed"])
@pytest.mark.parametrize("kind", ["a file", "a directory"])
def test_leftovers_of_a_crash_are_removed(stopped, whole, kind, name):
    _, log_dir = stopped
    if kind == "a file":
        (log_dir / name).write_text("half")
    else:
        (log_dir / name / "deep").mkdir(parents=True)
        (log_dir / name / "test.json").write_text("{}")
    assert_success(resume(stopped))
    assert weights(log_dir) == weights(whole)
    assert names_in(log_dir, "tmp") == []


def test_old_checkpoints_are_deleted_but_files_of_others_are_not(byte_shards, tmp_path, whole):
    log_dir = tmp_path / "log"
    for name in ("step_12", "step_000001_mine", "former_step_000001", "notes"):
        (log_dir / name).mkdir(parents=True)
    done = train(byte_shards, log_dir, *EVERY_2, "--checkpoint_interval", 1, "--keep_checkpoints", 2)
    assert_success(done)
    assert names_in(log_dir, "step_0") == ["step_000001_mine", "step_000004", "step_000005"]
    assert {"step_12", "former_step_000001", "notes"} <= set(names_in(log_dir))
    assert weights(log_dir) == weights(whole)


# --------------------------------------------------------------------------------- damaged data
SHARD = "excerpt_train_000000.npy"
VALIDATION_SHARD = "excerpt_val_000000.npy"


def reverse_tokens(path):
    """Write the tokens of a shard in reverse order."""
    write_npy(path, np.load(path)[::-1])


def edit_meta(pattern, replacement):
    """Return a function that replaces a pattern in meta.json."""
    return lambda path: edit(path, pattern, replacement)


def set_in_shard(**values):
    """Return a function that sets values in meta.json's description of the first shard."""

    def damage(path):
        meta = json.loads(path.read_text())
        meta["shards"][0].update(values)
        path.write_text(json.dumps(meta))

    return damage


DATA_DAMAGES = {
    "shard missing": (SHARD, Path.unlink),
    "shard empty": (SHARD, DAMAGES["empty"]),
    "shard truncated": (SHARD, truncate),
    "shard of another type": (SHARD, DAMAGES["other type"]),
    "shard a directory": (SHARD, replace_by_directory),
    "shard a named pipe": (SHARD, replace_by_fifo),
    "shard with a flipped bit": (SHARD, flip_bit),
    "shard with other tokens": (SHARD, reverse_tokens),
    "validation shard with a flipped bit": (VALIDATION_SHARD, flip_bit),
    "meta.json missing": ("meta.json", Path.unlink),
    "meta.json empty": ("meta.json", DAMAGES["empty"]),
    "meta.json truncated": ("meta.json", truncate),
    "meta.json a list": ("meta.json", DAMAGES["other type"]),
    "meta.json a directory": ("meta.json", replace_by_directory),
    "meta.json a named pipe": ("meta.json", replace_by_fifo),
    "meta.json of bytes that are not text": ("meta.json", lambda path: path.write_bytes(b"\xff\xfe{}")),
    "meta.json nested 10,000 deep": ("meta.json", write_text(nested_json(10_000))),
    "meta.json with a number of 5,000 digits": ("meta.json", write_text('{"vocab_size": ' + "9" * 5000 + "}")),
    "meta.json without keys": ("meta.json", write_text("{}")),
    "meta.json with another vocabulary": ("meta.json", edit_meta(r'("vocab_size": )257', r"\g<1>457")),
    "meta.json with an infinite vocabulary": ("meta.json", edit_meta(r'("vocab_size": )257', r"\g<1>Infinity")),
    "meta.json with a list as tokenizer": ("meta.json", set_json(tokenizer=["bytes"])),
    "meta.json with an unknown tokenizer": ("meta.json", set_json(tokenizer="words")),
    "meta.json with a number as shards": ("meta.json", set_json(shards=1)),
    "meta.json with null as shards": ("meta.json", set_json(shards=None)),
    "meta.json without shards": ("meta.json", set_json(shards=[])),
    "meta.json with strings as shards": ("meta.json", set_json(shards=[SHARD])),
    "meta.json with another token count": ("meta.json", edit_meta(r'("tokens": )\d+', r"\g<1>12345")),
    "meta.json with a string as token count": ("meta.json", set_in_shard(tokens="12345")),
    "meta.json with an infinite token count": ("meta.json", set_in_shard(tokens=float("inf"))),
    "meta.json with a negative token count": ("meta.json", set_in_shard(tokens=-1)),
    "meta.json with another checksum": ("meta.json", edit_meta(r'("tokens": .*?"sha256": ").', r"\g<1>x")),
    "meta.json with a list as checksum": ("meta.json", set_in_shard(sha256=["0" * 64])),
    "meta.json without a shard": ("meta.json", edit_meta("excerpt_train", "excerpt_trail")),
    "meta.json with a number as file name": ("meta.json", set_in_shard(file=7)),
    "meta.json with a file of another directory": ("meta.json", set_in_shard(file=f"../data/{SHARD}")),
}


@pytest.mark.parametrize("is_resumed", [True, False], ids=["resume", "new run"])
@pytest.mark.parametrize("damage", DATA_DAMAGES)
def test_damaged_data_is_a_user_error(stopped, damage, is_resumed):
    """The message names the directory or the file. That does not need the knowledge of an earlier run."""
    data_dir, log_dir = stopped
    if damage == "meta.json missing" and not is_resumed:
        pytest.skip("shards without meta.json are taken as GPT-2 tokens")
    file, inflict = DATA_DAMAGES[damage]
    inflict(data_dir / file)
    if is_resumed:
        done = resume(stopped)
    else:
        done = train(data_dir, log_dir.parent / "new", *EVERY_2)
    assert_user_error(done)
    assert str(data_dir) in done.stderr or "the data in --data_dir" in done.stderr
    assert "| loss" not in done.stdout


@pytest.mark.parametrize("depth", [400, 900])
def test_a_deeply_nested_source_in_meta_json_trains_or_is_a_user_error(stopped, tmp_path, depth):
    """The source is copied into run.json."""
    data_dir, _ = stopped
    edit(data_dir / "meta.json", r'"source": \{.*?\}', f'"source": {nested_json(depth)}')
    done = run("train_gpt2", *TINY, "--data_dir", data_dir, "--log_dir", tmp_path / "new")
    if done.returncode == 0:
        assert done.stderr == ""
        assert json.loads((tmp_path / "new" / "run.json").read_text())["source"]
    else:
        assert_user_error(done, data_dir)


def test_pickled_code_in_a_shard_is_not_run(stopped, tmp_path):
    data_dir, _ = stopped
    code = np.array([MakeDirectory(tmp_path / "the code ran")], dtype=object)
    np.save(data_dir / SHARD, code, allow_pickle=True)
    assert_user_error(resume(stopped), data_dir / SHARD)
    assert not (tmp_path / "the code ran").exists()


def shorten(path, num_bytes):
    """Return an action for at_step that cuts bytes off the end of a file."""
    return lambda rank: os.truncate(path, path.stat().st_size - num_bytes)


@pytest.mark.parametrize("num_bytes", [2, 20_000 // 8 * 2], ids=["one token", "many tokens"])
@pytest.mark.parametrize("file", [SHARD, VALIDATION_SHARD])
def test_a_shard_that_is_truncated_during_a_run_ends_it_at_the_next_evaluation(stopped, whole, file, num_bytes):
    data_dir, log_dir = stopped
    shutil.rmtree(log_dir)
    original = (data_dir / file).read_bytes()
    [done] = Ranks(1, data_dir, log_dir, *EVERY_2, prepare=at_step(1, shorten(data_dir / file, num_bytes))).wait()
    assert_user_error(done, data_dir / file, "--resume")
    assert names_in(log_dir, "step") == ["step_000002"]
    assert (2, "val") not in read_log(log_dir)
    (data_dir / file).write_bytes(original)
    assert_success(resume(stopped))
    assert_same_run(log_dir, whole)


def test_a_shard_that_is_damaged_during_a_run_ends_all_ranks(stopped, tmp_path):
    """The validation shard is first read at step 0: it is damaged before, after the data set was checked."""
    data_dir, _ = stopped

    def prepare(module, rank):
        read_data_set = module.read_data_set

        def read_and_damage(path):
            data_set = read_data_set(path)
            flip_bit(data_dir / VALIDATION_SHARD)
            return data_set

        module.read_data_set = read_and_damage

    results = Ranks(2, data_dir, tmp_path / "new", *EVERY_2, *TWO_RANKS, prepare=prepare).wait()
    for done in results:
        assert_user_error(done, data_dir / VALIDATION_SHARD, "SHA-256")


# ----------------------------------------------------------------------------------- full disks
@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(mount_small_disk(disk))
        except OSError as error:
            pytest.skip(f"cannot mount a small file system here: {error}")
        yield disk


@pytest.mark.parametrize("bytes_left", [0, 100_000, 200_000], ids=["at once", "in the model", "in trainer.pt"])
def test_a_disk_that_is_full_for_a_while_loses_nothing(byte_shards, whole, small_disk, bytes_left):
    """Two checkpoints fail and the third succeeds. Lines of the log wait until they can be written."""
    log_dir = small_disk / "log"
    actions = {
        1: lambda rank: fill_disk(small_disk, bytes_left),
        4: lambda rank: empty_disk(small_disk),
    }
    done = train(byte_shards, log_dir, *EVERY_2, prepare=at_steps(actions))
    assert done.returncode == 0, done.stderr
    warnings = done.stderr.splitlines()
    assert all(line.startswith("warning: ") for line in warnings), done.stderr
    for step in (2, 4):
        [line] = [line for line in warnings if f"cannot save a checkpoint at step {step} " in line]
        assert line.endswith("training continues")
    assert names_in(log_dir) == ["lock", "log.txt", "run.json", "step_000005"]
    assert_same_run(log_dir, whole)


def test_a_disk_that_stays_full_ends_with_status_1_and_the_last_good_checkpoint(byte_shards, whole, small_disk):
    log_dir = small_disk / "log"
    prepare = at_step(3, lambda rank: fill_disk(small_disk, 150_000))
    done = train(byte_shards, log_dir, *EVERY_2, prepare=prepare)
    assert done.returncode == 1
    assert "the final checkpoint (step 5) could not be saved" in done.stderr.splitlines()[-1]
    assert names_in(log_dir) == ["lock", "log.txt", "run.json", "step_000002"]
    empty_disk(small_disk)
    assert_success(train(byte_shards, log_dir, *EVERY_2, "--resume"))
    assert_same_run(log_dir, whole)


def test_a_full_disk_keeps_a_thousand_lines_of_the_log_waiting(byte_shards, small_disk):
    """They are more than the buffer of a file usually holds."""
    flags = ["--max_steps", 400, "--checkpoint_interval", 1000, "--log_interval", 1000, "--eval_interval", 400]
    actions = {
        4: lambda rank: fill_disk(small_disk, 0),
        394: lambda rank: empty_disk(small_disk),
    }
    done = train(byte_shards, small_disk / "log", *flags, prepare=at_steps(actions))
    assert done.returncode == 0, done.stderr[-500:]
    assert len(losses(small_disk / "log")) == 400
    message = f"cannot write to {small_disk}/log/log.txt (No space left on device); training continues"
    assert message in done.stderr


def test_resuming_on_a_full_disk_is_a_user_error_that_changes_nothing(whole, small_disk, byte_shards):
    log_dir = small_disk / "log"
    shutil.copytree(whole, log_dir)
    shutil.rmtree(log_dir / "step_000005")
    before = (log_dir / "log.txt").read_bytes()
    fill_disk(small_disk, 0)
    assert_user_error(train(byte_shards, log_dir, *EVERY_2, "--resume"), log_dir, "free some space")
    assert (log_dir / "log.txt").read_bytes() == before
    assert names_in(log_dir, "step") == ["step_000002", "step_000004"]
    empty_disk(small_disk)
    assert_success(train(byte_shards, log_dir, *EVERY_2, "--resume"))
    assert_same_run(log_dir, whole)


def test_a_half_written_checkpoint_is_removed_when_it_fills_the_disk(whole, small_disk, byte_shards):
    log_dir = small_disk / "log"
    shutil.copytree(whole, log_dir)
    shutil.rmtree(log_dir / "step_000005")
    (log_dir / "tmp_step_000005").mkdir()
    fill_disk(small_disk, 0)
    (small_disk / "filler").rename(log_dir / "tmp_step_000005" / "trainer.pt")
    assert_success(train(byte_shards, log_dir, *EVERY_2, "--resume"))
    assert_same_run(log_dir, whole)


# --------------------------------------------------------------------------------- file systems
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_gives_a_warning(stopped, whole, monkeypatch, number):
    data_dir, log_dir = stopped
    file_system = BadFileSystem(monkeypatch)
    file_system.without_locks(number)
    done = resume(stopped)
    assert file_system.num_failures > 0
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: ") and done.stderr.count("\n") == 1, done.stderr
    assert str(log_dir) in done.stderr and "has no locks" in done.stderr
    assert_same_run(log_dir, whole)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_checkpoints_are_saved_where_directories_cannot_be_flushed(byte_shards, tmp_path, whole, monkeypatch, number):
    file_system = BadFileSystem(monkeypatch)
    file_system.without_flushing_directories(number)
    assert_success(train(byte_shards, tmp_path / "log", *EVERY_2))
    assert file_system.num_failures >= 3  # checkpoints at steps 2, 4 and 5
    assert names_in(tmp_path / "log", "step") == ["step_000002", "step_000004", "step_000005"]
    assert_same_run(tmp_path / "log", whole)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EIO, errno.EPERM])
def test_a_file_system_that_cannot_rename_directories_is_an_error_at_the_start(
    byte_shards, tmp_path, monkeypatch, number
):
    file_system = BadFileSystem(monkeypatch)
    file_system.without_renaming_directories(number)
    done = train(byte_shards, tmp_path / "log", *EVERY_2)
    assert_user_error(done, "cannot save checkpoints", tmp_path / "log", os.strerror(number))
    assert file_system.num_failures == 1
    assert "| loss" not in done.stdout
    assert not (tmp_path / "log" / "log.txt").exists()


def test_files_are_flushed_before_the_renaming_makes_them_visible(byte_shards, tmp_path, monkeypatch):
    """Otherwise a crash of the machine could leave a checkpoint whose files are empty."""
    events = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recording_replace(source, destination):
        events.append(f"rename {os.path.basename(source)} to {os.path.basename(destination)}")
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    assert_success(train(byte_shards, tmp_path / "log", "--checkpoint_interval", 100))
    position = events.index("rename tmp_step_000005 to step_000005")
    assert set(CHECKPOINT_FILES) <= set(events[:position])
    assert events[position - 1] == "tmp_step_000005"  # the directory, with the names of the files
    assert events[position + 1] == "log"  # the directory, with the new name of the checkpoint


@LINUX
def test_training_and_resuming_work_on_a_simulated_windows(byte_shards, tmp_path, whole):
    """There is no fcntl and no SIGUSR1, and files that are open cannot be deleted or renamed."""
    flags = [*EVERY_2, "--keep_checkpoints", 1]
    prepare = at_step(3, send_signal(signal.SIGINT))
    for changes in ({"prepare": prepare}, {}):
        ranks = Ranks(1, byte_shards, tmp_path / "log", *flags, "--resume", before_import=simulate_windows, **changes)
        [done] = ranks.wait()
        assert done.returncode == 0, done.stderr
        assert "warning: " not in done.stderr
        assert len(names_in(tmp_path / "log", "step")) == 1
    assert "resuming at step 4" in done.stdout
    assert names_in(tmp_path / "log", "tmp") == []
    assert_same_run(tmp_path / "log", whole)


# --------------------------------------------------------------------------------------- memory
def find_micro_batch_size(monkeypatch, max_sequences, limit, **options):
    """Call find_micro_batch_size on a simulated GPU that has memory for so many sequences.

    Returns (micro-batch size, shape of the batch of each trial).
    """
    module = load("train_gpt2")
    model = module.GPT(module.GPTConfig(257, 16, 1, 1, 8))
    shapes = []
    forward = module.GPT.forward

    def limited_forward(model, idx, targets=None):
        shapes.append(idx.shape)
        if len(idx) > max_sequences:
            raise torch.OutOfMemoryError
        return forward(model, idx, targets)

    simulate_gpu_memory(monkeypatch, **options)
    monkeypatch.setattr(module.GPT, "forward", limited_forward)
    size = module.find_micro_batch_size(
        model, limit, torch.device("cpu"), contextlib.nullcontext(), has_optimizer_state=True
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    return size, shapes


def simulate_gpu_memory(monkeypatch, free=10**9, reserved=0, peak=0):
    """Replace the functions that measure the memory of a GPU, in bytes."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.parametrize(
    "max_sequences, limit, expected", [(1, 64, 1), (7, 64, 4), (8, 64, 8), (1000, 16, 16), (64, 64, 64)]
)
def test_the_micro_batch_is_the_largest_power_of_two_that_fits(monkeypatch, max_sequences, limit, expected):
    size, shapes = find_micro_batch_size(monkeypatch, max_sequences, limit)
    assert size == expected
    assert max(shape[0] for shape in shapes) == min(2 * expected, limit)
    assert all(shape[1] == 16 for shape in shapes)


def test_a_tenth_of_the_gpu_memory_stays_free(monkeypatch):
    """Memory that this process has reserved counts as available."""
    assert find_micro_batch_size(monkeypatch, 64, 64, free=600, reserved=400, peak=900)[0] == 64
    assert find_micro_batch_size(monkeypatch, 64, 64, free=600, reserved=400, peak=901)[0] == 0


def test_a_single_sequence_that_does_not_fit_into_memory_is_a_user_error(monkeypatch):
    assert find_micro_batch_size(monkeypatch, 0, 64)[0] == 0
    module = load("train_gpt2")
    monkeypatch.setattr(module, "find_micro_batch_size", lambda *arguments: 0)
    args = argparse.Namespace(micro_batch_size=None, total_batch_size=1024, block_size=16)
    gpu = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch, "tensor", lambda value, device: types.SimpleNamespace(item=lambda: value))
    with pytest.raises(module.UserError, match="--block_size 16"):
        module.set_micro_batch_size(None, None, args, gpu, None, world_size=1)


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "LOCAL_RANK": "0"}], ids=["python", "torchrun"])
def test_running_out_of_gpu_memory_in_a_step_is_a_user_error(byte_shards, tmp_path, environment):
    code = """
import runpy, sys, torch
def no_memory(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
torch.nn.functional.cross_entropy = no_memory
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    line = command("train_gpt2", *TINY, "--data_dir", byte_shards, "--log_dir", tmp_path / "log")
    line = [sys.executable, "-c", code, *line[1:]]
    done = subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    assert_user_error(done, "memory", "--micro_batch_size")


def test_a_model_that_is_larger_than_the_memory_is_a_user_error(byte_shards, tmp_path):
    flags = ["--n_layer", 1, "--n_head", 1, "--n_embd", 300_000]  # 360 billion parameters per block
    done = train(byte_shards, tmp_path / "log", *flags)
    assert_user_error(done, "out of memory", "smaller")
    assert not (tmp_path / "log" / "log.txt").exists()


@pytest.mark.parametrize("error_type", [MemoryError, RuntimeError])
def test_running_out_of_memory_while_a_checkpoint_is_loaded_does_not_count_as_damage(stopped, whole, error_type):
    """An earlier checkpoint would need as much memory, and steps would be lost."""
    data_dir, log_dir = stopped

    def prepare(module, rank):
        def no_memory(*args, **options):
            raise error_type("DefaultCPUAllocator: can't allocate memory")

        module.load_optimizers = no_memory

    assert_user_error(train(data_dir, log_dir, *EVERY_2, "--resume", prepare=prepare), "out of memory")
    assert_success(resume(stopped))
    assert_same_run(log_dir, whole)


# ---------------------------------------------------------------------------------------- Slurm
@LINUX
def test_the_slurm_script_saves_when_it_is_warned_and_requeues_the_job(byte_shards, tmp_path):
    """docs/train.sbatch runs with small scripts in place of srun and scontrol: once with a warning, once to the end."""
    scripts = {
        "bin/srun": '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
        "bin/scontrol": f'#!/bin/bash\n[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/requeued\n',
        "bin/torchrun": f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n',
        ".venv/bin/activate": f'export PATH="{tmp_path}/bin:$PATH"\n',
    }
    for name, text in scripts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    shutil.copy(ROOT / "train_gpt2.py", tmp_path)
    environment = {
        **os.environ,
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "localhost",
        "RDZV_PORT": "0",
    }
    flags = [*TINY, "--max_steps", 200, *TWO_RANKS, "--eval_interval", 200, "--log_interval", 100]
    flags += ["--data_dir", byte_shards, "--max_new_tokens", 2]
    line = [str(part) for part in ("bash", ROOT / "docs" / "train.sbatch", *flags)]
    for is_warned in (True, False):
        job = subprocess.Popen(line, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        if is_warned:
            wait_until(lambda: count_steps(tmp_path / "log") >= 10, seconds=60)
            job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 0, job.stderr.read()
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"
        steps = len(losses(tmp_path / "log"))
        assert (tmp_path / "log" / f"step_{steps:06d}").is_dir()
        assert (steps < 200) == is_warned
