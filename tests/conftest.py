"""Helpers that several test files need: runs, faults, a Hub, logs, checkpoints and data sets.

Everything here runs with one thread and without a network.
"""

import contextlib
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import os
import py_compile
import re
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
sys.path.append(str(ROOT / "benchmarks"))  # so that benchmarks can import common.py

# What the helpers here need on the disk. It is deleted when the tests end.
SCRATCH = tempfile.TemporaryDirectory(prefix="tests_of_gpt2_")

# No network: requests to other hosts go to a proxy on port 9, where nothing listens.
for name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ[name] = os.environ[name.upper()] = "http://127.0.0.1:9"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{SCRATCH.name}/hf_home"}
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models run fastest on one thread, which also adds in a fixed order
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(name, None)
os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "tiktoken_cache")  # see the fixture of the same name
# A shell's background job ignores SIGINT, and so do the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np  # noqa: E402 (after the variables of the environment)
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_pre_hook  # noqa: E402

# Flags of train_gpt2.py for a model of about 30,000 parameters, 8 windows per step, 5 steps.
TINY_FLAGS = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "total_batch_size": 128,
    "micro_batch_size": 8,
    "max_steps": 5,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "eval_interval": 5,
    "val_tokens": 400,
    "checkpoint_interval": 100,
    "log_interval": 1,
    "prompt": "KING",
    "max_new_tokens": 8,
    "device": "cpu",
}


def tiny_flags(**changes):
    """Return TINY_FLAGS as a list of arguments, with some of them changed. None leaves a flag out."""
    if (changes.get("max_steps") or 5) < 4:  # a warmup of more than half of the steps gives a warning
        changes = {"warmup_steps": 0, **changes}
    flags = []
    for name, value in {**TINY_FLAGS, **changes}.items():
        if value is not None:
            flags += [f"--{name}", value]
    return flags


# An example of HellaSwag for the tokenizer "bytes".
EXAMPLE = {"ind": 5, "label": 1, "ctx": "a", "endings": ["b", "c", "d", "e"]}

TINY = tiny_flags()
NO_SHAPE = dict.fromkeys(("n_layer", "n_head", "n_embd"))  # for --init_from


# ------------------------------------------------------------------------------------- scripts
def load(script):
    """Return a fresh copy of a script or a benchmark as a module with its name."""
    folder = ROOT if script in SCRIPTS else ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(script, folder / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module
    spec.loader.exec_module(module)
    return module


def call(script, *args):
    """Run a script (its name, or a module from load) with flags args in this process.

    Returns what subprocess.run would: exit status, stdout and stderr. An exception passes through.
    """
    module = load(script) if isinstance(script, str) else script
    main = module.main
    if module.__name__ == "train_gpt2":  # its errors are reported by a function around main()
        main = partial(module.run, main)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    status = 0
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", [f"{module.__name__}.py", *map(str, args)]),
            mock.patch.object(os, "_exit", sys.exit),  # train_gpt2.py ends a rank with it
            mock.patch.dict(os.environ),  # restores the environment
        ):
            main()
    except SystemExit as stop:
        status = stop.code or 0
        if isinstance(status, str):  # sys.exit("error: ...") prints it
            err.write(f"{status}\n")
            status = 1
    finally:
        for number, handler in handlers.items():  # so that Ctrl-C still ends the tests
            signal.signal(number, handler)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return subprocess.CompletedProcess(args, status, *texts)


def succeed(script, *args):
    """Run a script as call does. It must end with status 0. Returns its CompletedProcess."""
    done = call(script, *args)
    assert done.returncode == 0, done.stderr
    return done


def assert_user_error(done, *needles):
    """Check that a script ended with status 2 and one line on stderr that contains the needles."""
    assert done.returncode == 2, done.stdout[-500:] + done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for needle in needles:
        assert str(needle) in done.stderr, done.stderr


def assert_late_error(done, *needles):
    """Check for a user error after the line on stderr that names the model, and for no output."""
    model, error = done.stderr.split("\n", 1)
    assert model.startswith("model: ")
    done.stderr = error
    assert_user_error(done, *needles)
    assert done.stdout == ""


def command(script, *args):
    """Return the command line of a script in a process of its own."""
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, args)]


def run(script, *args, env=None, cwd=None):
    """Run a script with flags args in a process of its own. Returns its CompletedProcess."""
    environment = {**os.environ, **(env or {})}
    line = command(script, *args)
    return subprocess.run(line, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


# --------------------------------------------------------------------- runs in forked processes
class Run:
    """A run of a script in one forked process for each rank.

    before(rank) is called in each process, for example to inject a fault. A fork starts in a fraction
    of a second if this process has run the script before, because everything is imported then.
    """

    def __init__(self, *flags, script="train_gpt2", ranks=1, before=None):
        self.folder = Path(tempfile.mkdtemp(dir=SCRATCH.name))
        compiled(script)
        self.processes = []
        for rank in range(ranks):
            arguments = (self.folder, script, rank, ranks, flags, before)
            process = get_context("fork").Process(target=run_rank, args=arguments)
            process.start()
            self.processes.append(process)

    def wait(self):
        """Return a CompletedProcess for each rank. The status is negative if a signal ended it."""
        results = []
        for rank, process in enumerate(self.processes):
            process.join(180)  # busy machines are slow
            assert not process.is_alive(), f"rank {rank} hangs"
            out = (self.folder / f"{rank}.out").read_text()
            err = (self.folder / f"{rank}.err").read_text()
            results.append(subprocess.CompletedProcess([], process.exitcode, out, err))
        return results


def run_rank(folder, script, rank, ranks, flags, before):
    """Run a script as python does, with its output in folder."""
    sys.stdout = open(folder / f"{rank}.out", "w")  # noqa: SIM115 (open until the process ends)
    sys.stderr = open(folder / f"{rank}.err", "w")  # noqa: SIM115
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        # the ranks find each other through a file: another program could take a port
        store = torch.distributed.FileStore(str(folder / "store"), ranks)
        init = torch.distributed.init_process_group

        def meet_at_file(backend, timeout, **options):
            assert timeout.total_seconds() >= 3600  # a rank waits for evaluations and checkpoints of others
            init(backend, timeout=timeout, **{**options, "store": store})

        torch.distributed.init_process_group = meet_at_file
    if before:
        before(rank)
    sys.argv = [f"{script}.py", *map(str, flags)]
    runpy.run_path(compiled(script), run_name="__main__")


@cache
def compiled(script):
    """Compile a script once, so that its runs start faster. Returns the path of the bytecode."""
    return py_compile.compile(str(ROOT / f"{script}.py"), f"{SCRATCH.name}/{script}.pyc", doraise=True)


# --------------------------------------------------------------------------------------- faults
def at_step(step, action, rank=None):
    """Return a function for Run(before=...) that calls action() in this optimizer step of a process."""

    def before(this_rank):
        steps = itertools.count()

        def hook(optimizer, args, kwargs):
            if isinstance(optimizer, torch.optim.AdamW):
                if next(steps) == step and rank in (None, this_rank):
                    action()

        register_optimizer_step_pre_hook(hook)

    return before


def at_loss(number, change, training=True, rank=None):
    """Return a function for Run(before=...) that replaces the loss of one micro-batch by change(loss)."""

    def before(this_rank):
        calls = itertools.count()
        cross_entropy = F.cross_entropy

        def faulty_cross_entropy(logits, targets, **options):
            loss = cross_entropy(logits, targets, **options)
            # leaves out the warm-up of DDP, whose targets are all 0
            if logits.requires_grad == training and targets.any():
                if next(calls) == number and rank in (None, this_rank):
                    loss = change(loss)
            return loss

        F.cross_entropy = faulty_cross_entropy

    return before


def at_disk_change(directory, action):
    """Return a function for Run(before=...) that calls action(n) before the n-th change below a directory."""
    changes = {"os.mkdir", "os.remove", "os.rename", "os.rmdir"}

    def before(rank):
        numbers = itertools.count(1)

        def hook(event, args):
            if event == "open":
                is_change = args[2] & (os.O_WRONLY | os.O_RDWR)
            else:
                is_change = event in changes
            if is_change and str(args[0]).startswith(str(directory)):
                action(next(numbers))

        sys.addaudithook(hook)

    return before


def send(*names):
    """Return an action that sends this process signals, 0.7 seconds apart."""

    def action():
        for i, name in enumerate(names):
            time.sleep(0.7 if i else 0)
            signal.raise_signal(getattr(signal, name))

    return action


def limit_files(num_bytes):
    """Let no file become larger, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def wait_until(condition):
    """Wait until condition() holds. Fails after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def truncate(path):
    """Drop the second half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {"missing": Path.unlink, "truncated": truncate, "one bit": flip_bit}


def edit_json(path, **changes):
    """Change fields of a JSON file. None deletes a field."""
    content = {**json.loads(Path(path).read_text()), **changes}
    content = {name: value for name, value in content.items() if value is not None}
    Path(path).write_text(json.dumps(content))


def names_in(directory, prefix=""):
    """Return the sorted names in a directory that begin with prefix."""
    return sorted(path.name for path in Path(directory).glob(f"{prefix}*"))


# --------------------------------------------------------------------------- a Hub on this machine
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hugging Face Hub from which models and data sets are downloaded.

    server.files:    {repository: {file name: content}}
    server.log:      the requests so far, for example "GET /datasets/me/texts/resolve/COMMIT/a.parquet"
    server.trouble:  a list of (text, trouble): one request that contains the text has this trouble

    A trouble is an HTTP status or one of these words: "missing" (there is no such file), "hang" (no
    answer), "drop" (the connection breaks after half of the file), "truncated" (half of the file, with
    a Content-Length that fits it), "damaged" (one bit has changed).
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        path = urllib.parse.unquote(self.path.split("?")[0])
        # for example /me/model/resolve/COMMIT/NAME or /api/datasets/me/texts
        parts = re.sub("^(/api)?(/datasets|/models)?/", "", path).split("/")
        repository, action, name = "/".join(parts[:2]), "".join(parts[2:3]), "/".join(parts[4:])
        request = f"{self.command} {path}"
        server.log.append(request)
        if repository not in server.files:
            self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return
        # the branch main may change while files are downloaded
        if action == "resolve" and parts[3] != COMMIT:
            self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message="Ask for a commit")
            return
        troubles = [trouble for trouble in server.trouble if trouble[0] in request]
        what = None
        if troubles:
            server.trouble.remove(troubles[0])
            what = troubles[0][1]
        if what == "hang":
            time.sleep(1000)
        if isinstance(what, int):
            self.reply(what, b"busy")
        elif action != "resolve":
            self.reply_info(repository)
        else:
            self.reply_file(server.files[repository].get(name), what)

    do_HEAD = do_GET

    def reply(self, status, body=b"", num_bytes=None, **headers):
        """Send a response, with only the first num_bytes of its body if this is given."""
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:num_bytes])
            self.close_connection = num_bytes is not None

    def reply_info(self, repository):
        siblings = []
        for name, content in self.server.files[repository].items():
            sha256 = hashlib.sha256(content).hexdigest()
            large_file = {"size": len(content), "pointerSize": 1, "sha256": sha256}
            siblings.append({"rfilename": name, "size": len(content), "lfs": large_file})
        info = {"id": repository, "sha": COMMIT, "siblings": siblings}
        self.reply(200, json.dumps(info).encode(), Content_Type="application/json")

    def reply_file(self, body, what):
        if body is None or what == "missing":
            self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="not found")
            return
        # the Hub's ETag of a large file is its SHA-256
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": COMMIT}
        if what == "damaged":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 4]) + body[middle + 1 :]
        if what == "truncated":
            self.reply(200, body[: len(body) // 2], **headers)
        else:
            self.reply(200, body, len(body) // 2 if what == "drop" else None, **headers)


@pytest.fixture
def hub(monkeypatch):
    """A Hub without repositories, which this process and its forks use."""
    from huggingface_hub import constants  # imported here because it is slow

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.files, server.log, server.trouble = {}, [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# ------------------------------------------------------------------------- logs and checkpoints
def read_log(log_dir):
    """Return log.txt as {(step, kind): value as text}. Fails at a value that is logged twice."""
    log = {}
    for line in (Path(log_dir) / "log.txt").read_text().splitlines():
        step, kind, value = line.split(" ")
        assert (int(step), kind) not in log, f"twice in log.txt: {line}"
        log[int(step), kind] = value
    return log


def losses(log_dir, kind="train"):
    """Return the values of one kind in log.txt as {step: value}."""
    return {step: float(value) for (step, name), value in read_log(log_dir).items() if name == kind}


def reproducible(log_dir):
    """Return what log.txt must contain again after a resumed run: everything except the speed."""
    return {key: value for key, value in read_log(log_dir).items() if key[1] != "tok/s"}


def weights_file(log_dir, step=5):
    """Return the path of the weights in a checkpoint."""
    return Path(log_dir) / f"step_{step:06d}" / "model.safetensors"


def files_in(directory):
    """Return {path: content} of all files below a directory except for locks."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != "lock"]
    return {path: path.read_bytes() for path in paths}


def sign(checkpoint):
    """Make sha256.json of a checkpoint agree with its files as they are now."""
    files = [path for path in checkpoint.iterdir() if path.name != "sha256.json"]
    checksums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (checkpoint / "sha256.json").write_text(json.dumps(checksums))


def random_gpt2(directory, **changes):
    """Save a random GPT2LMHeadModel of transformers over bytes in directory, and return it."""
    import transformers  # imported here because it is slow

    shape = {"vocab_size": 257, "n_positions": 40, "n_layer": 3, "n_head": 3, "n_embd": 48}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **changes})).eval()
    model.save_pretrained(directory)
    return model


# -------------------------------------------------------------------------------------- shards
def write_npy(path, tokens):
    """Write a shard in NumPy's format, as build-nanogpt does."""
    np.save(path, np.asarray(tokens, dtype=np.uint16))


def write_bin(path, tokens):
    """Write a shard in llm.c's format: 256 int32 (magic, version, count, zeros), then the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def write_data_set(directory, train, val, vocab_size=257):
    """Write a data set with meta.json from lists of token arrays, one per shard. Returns its directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = {257: "bytes", 50257: "gpt2"}[vocab_size]
    meta = {"tokenizer": tokenizer, "vocab_size": vocab_size, "eot_token": vocab_size - 1, "source": {}, "shards": []}
    for split, shards in (("train", train), ("val", val)):
        for i, tokens in enumerate(shards):
            file = f"tiny_{split}_{i:06d}.npy"
            write_npy(directory / file, tokens)
            meta["shards"].append({"file": file, "split": split, "tokens": len(tokens), "sha256": ""})
    (directory / "meta.json").write_text(json.dumps(meta))
    return directory


def read_windows(path, block_size):
    """Return the windows of a .npy shard, by brute force: lists of block_size + 1 tokens.

    Each begins with the last token of the one before.
    """
    tokens = np.load(path, allow_pickle=False).tolist()
    return [tokens[i : i + block_size + 1] for i in range(0, len(tokens) - block_size, block_size)]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """The first 30,000 characters of input.txt."""
    path = tmp_path_factory.mktemp("text") / "excerpt.txt"
    path.write_text((ROOT / "input.txt").read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def byte_shards(tmp_path_factory, text_file):
    """The data set that prepare_shakespeare.py makes of text_file, one token per byte."""
    directory = tmp_path_factory.mktemp("data") / "excerpt"
    succeed("prepare_shakespeare", "--input", text_file, "--out_dir", directory)
    return directory


@pytest.fixture
def random_shards(tmp_path):
    """A data set of random bytes: two training shards and one for validation; tests may damage it."""
    rng = np.random.default_rng(0)
    train = [rng.integers(256, size=700), rng.integers(256, size=333)]
    return write_data_set(tmp_path / "data", train, [rng.integers(256, size=99)])


def replace_tokens(path):
    """Write other tokens to the first shard, with their checksum in meta.json: nothing is damaged."""
    write_npy(path, np.load(path)[::-1])
    shards = json.loads((path.parent / "meta.json").read_text())["shards"]
    shards[0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_json(path.parent / "meta.json", shards=shards)


# ------------------------------------------------------------------------------ optional things
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]


@pytest.fixture
def tiktoken_cache():
    """The folder with GPT-2's vocabulary, which TIKTOKEN_CACHE_DIR names in every test."""
    if not (SHARED / "tiktoken_cache").is_dir():
        pytest.skip("GPT-2's vocabulary is not in ../shared/tiktoken_cache")
    return SHARED / "tiktoken_cache"


@pytest.fixture(scope="session")
def tiny_shakespeare():
    """The real Tiny Shakespeare."""
    path = SHARED / "data" / "tinyshakespeare" / "input.txt"
    if not path.exists():
        pytest.skip("Tiny Shakespeare is not in ../shared/data/tinyshakespeare")
    return path


@pytest.fixture(autouse=True)
def same_state():
    """Every test starts from the same random numbers, and with exact matmuls: scripts switch TF32 on."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
