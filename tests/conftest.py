"""Helpers that several test files need: running scripts, tiny data sets, reading logs and checkpoints.

Everything here runs on the CPU with one thread and without a network.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))

# A network that always fails at once, on every machine: nothing listens on port 9 ("discard").
for name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ[name] = os.environ[name.upper()] = "http://127.0.0.1:9"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp(prefix="hf_home_")}
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models are fastest so, and one thread adds in one order
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TIKTOKEN_CACHE_DIR"):
    os.environ.pop(name, None)
os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "tiktoken_cache")  # see the fixture of the same name

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

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
    "device": "cpu",
}


def tiny_flags(**changes):
    """TINY_FLAGS as a list of arguments, with some of them changed; None leaves a flag out."""
    flags = []
    for name, value in {**TINY_FLAGS, **changes}.items():
        if value is not None:
            flags += [f"--{name}", value]
    return flags


TINY = tiny_flags()
NO_SHAPE = tiny_flags(n_layer=None, n_head=None, n_embd=None)  # for --init_from


# ------------------------------------------------------------------------------------- scripts
def load(script):
    """A fresh copy of a script, imported by path under the script's name."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module
    spec.loader.exec_module(module)
    return module


def call(script, *args):
    """Run main() of a script (a name, or a module from load) with flags args, in this process.

    Returns what subprocess.run would: exit status, stdout and stderr. train_gpt2.py reports its errors in
    run_rank(). An exception of another script passes through.
    """
    module = load(script) if isinstance(script, str) else script
    main = getattr(module, "run_rank", module.main)
    module.exit_process = sys.exit  # under torchrun's variables it would end this process at once
    out, err = io.StringIO(), io.StringIO()
    argv, environment = sys.argv, dict(os.environ)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    status = 0
    sys.argv = [f"{module.__name__}.py", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():  # so that Ctrl-C still ends the tests
            signal.signal(number, handler)
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


def assert_user_error(done, *needles):
    """Check that a script ended with status 2 and one line on stderr that contains the needles."""
    assert done.returncode == 2, done.stdout[-500:] + done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for needle in needles:
        assert str(needle) in done.stderr, done.stderr


def command(script, *args):
    """The command line of a script in a process of its own."""
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, args)]


def run(script, *args, env=None, cwd=None):
    """Run a script with flags args in a process of its own; returns its CompletedProcess."""
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command(script, *args), env=environment, cwd=cwd, capture_output=True, text=True, timeout=100)


def torchrun(n, script, *args, cwd=None):
    """Run a script in n processes on this machine; returns torchrun's CompletedProcess."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    line += command(script, *args)[1:]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=100)


def read_log(log_dir):
    """log.txt as {(step, kind): value as text}; fails at a figure that stands there twice."""
    log = {}
    for line in (Path(log_dir) / "log.txt").read_text().splitlines():
        step, kind, value = line.split(" ")
        assert (int(step), kind) not in log, f"twice in log.txt: {line}"
        log[int(step), kind] = value
    return log


def losses(log_dir, kind="train"):
    """The values of one kind in log.txt as {step: value}."""
    return {step: float(value) for (step, name), value in read_log(log_dir).items() if name == kind}


def reproducible(log_dir):
    """What log.txt must contain again after a resumed run: everything except the speed."""
    return {key: value for key, value in read_log(log_dir).items() if key[1] != "tok/s"}


def weights_file(log_dir, step=5):
    """The path of the weights in a checkpoint."""
    return Path(log_dir) / f"step_{step:06d}" / "model.safetensors"


def sign(checkpoint):
    """Make sha256.json of a checkpoint agree with its files as they are now."""
    files = [path for path in checkpoint.iterdir() if path.name != "sha256.json"]
    checksums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (checkpoint / "sha256.json").write_text(json.dumps(checksums))


def random_gpt2(directory, **changes):
    """Save a random GPT2LMHeadModel of transformers over bytes in directory, and return it."""
    import transformers  # imported here because it is slow

    shape = {"vocab_size": 257, "n_positions": 40, "n_layer": 3, "n_head": 3, "n_embd": 48, "n_inner": 100}
    config = transformers.GPT2Config(**{**shape, "activation_function": "relu", **changes})
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(directory)
    return model


# -------------------------------------------------------------------------------------- shards
def write_npy(path, tokens):
    """A shard in NumPy's format, as build-nanogpt writes it."""
    np.save(path, np.asarray(tokens, dtype=np.uint16))


def write_bin(path, tokens):
    """A shard in llm.c's format: 256 int32 (magic, version, count, zeros), then the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def write_data_set(directory, train, val, vocab_size=257):
    """A data set with meta.json from lists of token arrays, one a shard; returns its directory."""
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
    """The windows of a .npy shard, by brute force: rows of block_size + 1 tokens that share their ends."""
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
    """The data set that prepare_shakespeare.py makes of text_file, a token a byte."""
    directory = tmp_path_factory.mktemp("data") / "excerpt"
    done = call("prepare_shakespeare", "--input", text_file, "--out_dir", directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def random_shards(tmp_path):
    """A data set of random bytes: two training shards and one for validation; tests may damage it."""
    rng = np.random.default_rng(0)
    return write_data_set(
        tmp_path / "data", [rng.integers(256, size=n) for n in (700, 333)], [rng.integers(256, size=99)]
    )


# ------------------------------------------------------------------------------ optional things
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
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)
