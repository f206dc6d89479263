"""Fault injection for tests/test_train_gpt2_faults.py: processes, signals, bad numbers, bad file systems, bad files.

train(...)      a run in this process
Ranks(...)      a run in one or more forked processes, which can be killed
Torchrun(...)   a run under torchrun in the background

Each of them takes flags of train_gpt2.py, which follow TINY. train and Ranks also take prepare: a function
prepare(module, rank) that changes the module train_gpt2 before the run, for example at_step(3, action).
"""

import contextlib
import fcntl
import importlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing import get_context
from pathlib import Path

import torch
from conftest import TINY, call, command, load

FORK = get_context("fork")  # forked processes do not import torch again, which takes seconds
WINDOWS_PER_STEP = 8  # of TINY


# ------------------------------------------------------------------------------------ processes
def train(data_dir, log_dir, *flags, prepare=None):
    """Run train_gpt2.py in this process. Returns its CompletedProcess."""
    module = load("train_gpt2")
    if prepare:
        prepare(module, 0)
    return call(module, *TINY, "--data_dir", data_dir, "--log_dir", log_dir, *flags)


class Ranks:
    """A run in world_size forked processes, as torchrun starts them. wait() returns their CompletedProcesses.

    before_import() is called in each process before train_gpt2.py is imported.
    """

    def __init__(self, world_size, data_dir, log_dir, *flags, prepare=None, before_import=None):
        flags = [*TINY, "--data_dir", data_dir, "--log_dir", log_dir, *flags]
        # The ranks meet at a file: a port that is free now may be taken when they use it.
        meeting_point = tempfile.mktemp()
        self.pipes = []
        self.processes = []
        for rank in range(world_size):
            reader, writer = FORK.Pipe(duplex=False)
            arguments = (writer, meeting_point, rank, world_size, flags, prepare, before_import)
            process = FORK.Process(target=self.work, args=arguments)
            process.start()
            writer.close()
            self.pipes.append(reader)
            self.processes.append(process)

    @staticmethod
    def work(writer, meeting_point, rank, world_size, flags, prepare, before_import):
        """Run one rank, and send its exit status, stdout and stderr to the parent process."""
        if world_size > 1:
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
            os.environ["WORLD_SIZE"] = str(world_size)
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", "0"
        init_process_group = torch.distributed.init_process_group

        def meet_at_file(backend, store, **options):
            store = torch.distributed.FileStore(meeting_point, world_size)
            init_process_group(backend, store=store, **options)

        torch.distributed.init_process_group = meet_at_file
        try:
            if before_import:
                before_import()
            module = load("train_gpt2")
            if prepare:
                prepare(module, rank)
            done = call(module, *flags)
            writer.send((done.returncode, done.stdout, done.stderr))
        except BaseException:
            writer.send((99, "", traceback.format_exc()))

    def wait(self):
        """Wait until all ranks have ended. The status of a killed rank is the negative signal number."""
        results = []
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            try:
                assert pipe.poll(50), "a rank neither ended nor reported"
                status, out, err = pipe.recv()
                process.join(20)
                assert process.exitcode is not None, "a rank did not end"
            except EOFError:  # it was killed
                process.join(20)
                status, out, err = process.exitcode, "", ""
            finally:
                process.kill()
            results.append(subprocess.CompletedProcess([], status, out, err))
        return results

    def statuses(self):
        """Wait until all ranks have ended, and return their exit statuses."""
        return [done.returncode for done in self.wait()]


class Torchrun:
    """A run under torchrun with two processes in the background."""

    def __init__(self, data_dir, log_dir, *flags, max_restarts=0):
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        line += [f"--max-restarts={max_restarts}"]
        line += command("train_gpt2", *TINY, "--micro_batch_size", 4)[1:]
        line += ["--data_dir", data_dir, "--log_dir", log_dir, "--resume", *flags]
        self.log_dir = Path(log_dir)
        self.process = subprocess.Popen(
            [str(part) for part in line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def find_worker(self, rank):
        """Return the process id of a rank, or None if there is no such process."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
                environment = (path / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError):
                continue  # the process has ended meanwhile
            if parent == self.process.pid and b"RANK=%d" % rank in environment:
                return int(path.name)
        return None

    def wait_for_steps(self, steps):
        """Wait until log.txt has so many steps."""
        deadline = time.monotonic() + 60
        while count_steps(self.log_dir) < steps:
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline, "the run made no progress"
            time.sleep(0.02)

    def signal_after_steps(self, steps, rank, number):
        """Send a signal to a rank once log.txt has so many steps."""
        self.wait_for_steps(steps)
        os.kill(self.find_worker(rank), number)

    def wait(self):
        """Wait until torchrun and all processes that share its output have ended. Returns its CompletedProcess."""
        out, err = self.process.communicate(timeout=60)
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, out, err)


def count_steps(log_dir):
    """Return the number of training steps in log.txt so far."""
    path = Path(log_dir) / "log.txt"
    return path.read_text().count("norm") if path.exists() else 0


def wait_until(condition, seconds=30):
    """Wait until condition() holds. Fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.02)


# ---------------------------------------------------------------------------- events during a run
def at_step(goal, action, windows_per_step=WINDOWS_PER_STEP):
    """For prepare: call action(rank) in step goal, when train_gpt2.py has read the data of the step after it."""

    def prepare(module, rank):
        class WatchedDataset(module.TokenDataset):
            def batch(self, indices):
                windows = super().batch(indices)
                if self.shuffle and min(indices) // windows_per_step == goal + 1:
                    action(rank)
                return windows

        module.TokenDataset = WatchedDataset

    return prepare


def at_steps(actions):
    """For prepare: as at_step, with a dict {step: action(rank)}."""

    def prepare(module, rank):
        for step, action in actions.items():
            at_step(step, action)(module, rank)

    return prepare


def send_signal(number, to_rank=None):
    """For at_step: an action that sends this process a signal; with to_rank on this rank only."""

    def action(rank):
        if to_rank in (None, rank):
            os.kill(os.getpid(), number)

    return action


def multiply_loss(at_micro_step, factor):
    """For prepare: multiply one training loss of the last rank by factor, which may be infinite or NaN."""

    def prepare(module, rank):
        forward = module.GPT.forward
        last_rank = int(os.environ.get("WORLD_SIZE", 1)) - 1
        num_calls = 0

        def faulty_forward(self, idx, targets=None):
            nonlocal num_calls
            logits, loss = forward(self, idx, targets)
            if self.training and idx.any():  # the warm-up of DDP has zeros only
                if num_calls == at_micro_step and rank == last_rank:
                    loss = loss * factor
                num_calls += 1
            return logits, loss

        module.GPT.forward = faulty_forward

    return prepare


def overflow_gradient(at_micro_step):
    """For prepare: make one gradient infinite. With either optimizer it is AdamW that updates this parameter."""

    def prepare(module, rank):
        forward = module.GPT.forward
        num_calls = 0

        def faulty_forward(self, idx, targets=None):
            nonlocal num_calls
            if self.training:
                if num_calls == at_micro_step:
                    self.hook = self.ln_f.weight.register_hook(lambda gradient: gradient * float("inf"))
                if num_calls == at_micro_step + 1:
                    self.hook.remove()
                num_calls += 1
            return forward(self, idx, targets)

        module.GPT.forward = faulty_forward

    return prepare


# --------------------------------------------------------------------------------- file systems
@contextlib.contextmanager
def mount_small_disk(directory):
    """Mount a file system of 2 MB on directory. Raises OSError if this process may not."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def fill_disk(disk, bytes_left):
    """Fill a disk with a file named filler, except for so many bytes."""
    status = os.statvfs(disk)
    with open(disk / "filler", "wb") as file:
        file.write(bytes(status.f_bavail * status.f_bsize - bytes_left))


def empty_disk(disk):
    """Delete the file of fill_disk."""
    (disk / "filler").unlink()


class BadFileSystem:
    """Replaces a function of the operating system by one that fails as on some file systems.

    Used with pytest's monkeypatch. num_failures tells whether the program really called it.
    """

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.num_failures = 0

    def fail(self, number):
        """Raise the OSError with this number."""
        self.num_failures += 1
        raise OSError(number, os.strerror(number))

    def without_locks(self, number):
        """Refuse flock, as Lustre does without its mount option flock, and as some network file systems do."""
        self.monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: self.fail(number))

    def without_flushing_directories(self, number):
        """Refuse fsync of directories, as CIFS, Ceph and WSL do."""
        fsync = os.fsync

        def faulty_fsync(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                self.fail(number)
            fsync(descriptor)

        self.monkeypatch.setattr(os, "fsync", faulty_fsync)

    def without_renaming_directories(self, number):
        """Refuse to rename directories, as object storage does that is mounted with gcsfuse or mountpoint-s3."""
        replace = os.replace

        def faulty_replace(source, destination):
            if os.path.isdir(source):
                self.fail(number)
            replace(source, destination)

        self.monkeypatch.setattr(os, "replace", faulty_replace)


# -------------------------------------------------------------------------------------- Windows
class MissingModules:
    """An import hook that hides the modules that Windows does not have."""

    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "pwd", "grp", "termios"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def simulate_windows():
    """Make this process look like one on Windows, as far as Linux allows it. For before_import of Ranks.

    There is no fcntl and no SIGUSR1; directories cannot be opened; open files, and directories that contain
    them, cannot be renamed or deleted.
    """
    # filelock must be imported again, now without fcntl
    for name in list(sys.modules):
        if name == "fcntl" or name.partition(".")[0] == "filelock":
            del sys.modules[name]
    sys.meta_path.insert(0, MissingModules())
    for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGPIPE"):
        delattr(signal, name)
    original_open = os.open

    def open_file(path, flags, *args, **options):
        if not isinstance(path, int) and os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return original_open(path, flags, *args, **options)

    os.open = open_file
    for name in ("remove", "unlink", "rmdir", "rename", "replace"):
        setattr(os, name, refuse_open_files(getattr(os, name)))
    importlib.reload(shutil)  # it notices that os has other functions, and works as on Windows


def refuse_open_files(function):
    """Return a function that refuses a path if it is an open file, or a directory that contains one."""

    def guarded(path, *args, **options):
        full_path = os.path.realpath(path)
        for open_path in open_paths():
            if open_path == full_path or open_path.startswith(f"{full_path}/"):
                raise PermissionError(13, "The file is being used by another process", str(path))
        return function(path, *args, **options)

    return guarded


def open_paths():
    """Return the paths of all regular files that this process has open or mapped into its memory."""
    paths = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if os.path.isfile(path):
                paths.add(path)
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6:
            paths.add(fields[5])
    return paths


# -------------------------------------------------------------------------------- damaged files
def empty(path):
    """Leave a file without content."""
    path.write_bytes(b"")


def truncate(path):
    """Drop the second half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def write_other_type(path):
    """Write a JSON list in place of any other content."""
    path.write_text("[1, 2, 3]\n")


def replace_by_directory(path):
    """Put a directory in the place of a file."""
    path.unlink()
    path.mkdir()


def replace_by_fifo(path):
    """Put a named pipe in the place of a file: opening it would wait forever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


DAMAGES = {
    "missing": Path.unlink,
    "empty": empty,
    "truncated": truncate,
    "flipped bit": flip_bit,
    "other type": write_other_type,
    "a directory": replace_by_directory,
    "a named pipe": replace_by_fifo,
}


def edit(path, pattern, replacement):
    """Replace the first match of a regular expression in a text file. Fails if there is none."""
    text, num_changes = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.DOTALL)
    assert num_changes == 1
    path.write_text(text)


def nested_json(depth):
    """Return the text of a JSON object that is nested so deeply."""
    return '{"a": ' * depth + "1" + "}" * depth
