"""fineweb.py: exact tokens, interruptions at any moment, damaged files, and a Hub that misbehaves.

Most tests run the script in its own process, as a user would. RANDOM_KILLS=20 repeats the test with a random
SIGKILL 20 times instead of twice.
"""

import glob
import hashlib
import http.server
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import ROOT, SHARED, call, load

SCRIPT = ROOT / "fineweb.py"
BOOKS = sorted(glob.glob(str(SHARED / "data/books/*.parquet")))
CACHE = str(SHARED / "tiktoken_cache")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
END_OF_TEXT = 256  # of --tokenizer bytes
SHARD_SIZE = 20011  # of the data set that most tests make

has_gpt2 = pytest.mark.skipif(not os.path.isdir(CACHE), reason="GPT-2's vocabulary is not in ../shared")
has_books = pytest.mark.skipif(not BOOKS or not os.path.isdir(CACHE), reason="no ../shared/data/books")
has_simulations = pytest.mark.skipif(not (SHARED / "sim").is_dir(), reason="no ../shared/sim")
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals, pipes and limits")


# ------------------------------------------------------------------------------------ helpers
def process_arguments(*flags, script=SCRIPT, **variables):
    """Return subprocess arguments that run fineweb.py with flags, in an environment without ranks or HF_*."""
    environment = {}
    for name, value in os.environ.items():
        if name not in ("RANK", "WORLD_SIZE") and not name.startswith(("SLURM_", "HF_")):
            environment[name] = value
    environment["TIKTOKEN_CACHE_DIR"] = CACHE
    environment.update(variables)
    return {"args": [sys.executable, str(script), *map(str, flags)], "env": environment, "text": True}


def run(*flags, code=0, script=SCRIPT, **variables):
    """Run fineweb.py to its end in its own process.

    Returns its standard output. If code is not 0, asserts that it fails with one line on stderr, and returns that.
    """
    arguments = process_arguments(*flags, script=script, **variables)
    done = subprocess.run(**arguments, capture_output=True, timeout=100)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code == 0:
        assert done.stderr == ""
        return done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def error_of(*flags):
    """Run main() with flags in this process, assert that it fails with one line on stderr, and return the line."""
    done = call("fineweb", *flags)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def make_texts(seed, number):
    """Return documents of many sizes, some of them None, empty, foreign or with the text of a special token."""
    generator = random.Random(seed)
    words = ["the", "of", "naïve", "東京", "<|endoftext|>", "\n\n", "x" * 50, "🙂"]
    texts = []
    for i in range(number):
        text = " ".join(generator.choice(words) for _ in range(i % 97))
        texts.append(generator.choice([text] * 8 + [None, ""]))
    return texts


def write_parquet(path, texts, column="text", kind=None):
    """Write a parquet file with the columns id and text, in row groups of 100."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    table = pa.table({"id": list(range(len(texts))), column: pa.array(texts, kind or pa.string())})
    pq.write_table(table, path, row_group_size=100)


def reference(texts, encode, end_of_text=END_OF_TEXT):
    """Return all tokens in order, computed one document at a time."""
    tokens = []
    for text in texts:
        if text:
            tokens += [end_of_text, *encode(text)]
    return tokens


def encode_bytes(text):
    return list(text.encode())


def read_shards(directory, shard_size, world_size=1):
    """Check names, sizes, headers and checksums of a finished directory. Returns all tokens in order."""
    meta = json.loads((directory / "meta.json").read_text())
    names = [shard["file"] for shard in meta["shards"]]
    assert sorted(os.listdir(directory)) == sorted([*names, "meta.json", "vocab.json", "merges.txt"])
    tokens = []
    for i, shard in enumerate(meta["shards"]):
        split = "train" if i else "val"
        path = directory / shard["file"]
        assert shard["split"] == split
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        assert array.dtype == np.dtype("<u2")
        assert array.shape == (shard["tokens"],)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        if world_size == 1:
            assert shard["file"] == f"edufineweb_{split}_{i:06d}.npy"
            assert len(array) == shard_size or i + 1 == len(meta["shards"])
        tokens += array.tolist()
    # the files are exactly those that NumPy writes
    np.save(directory.parent / "same.npy", array)
    assert (directory.parent / "same.npy").read_bytes() == path.read_bytes()
    return tokens


def contents(directory, ending=""):
    """Return {name: bytes} of the files in a directory whose names have this ending."""
    files = [path for path in directory.iterdir() if path.is_file() and path.name.endswith(ending)]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three parquet files (the second has no rows), their texts, and the finished shards of an undisturbed run."""
    folder = tmp_path_factory.mktemp("data")
    parts = [make_texts(1, 700), [], make_texts(2, 400)]
    for i, texts in enumerate(parts):
        write_parquet(f"{folder}/in/{i:03d}.parquet", texts)
    flags = ["--tokenizer", "bytes", "--source", f"{folder}/in/*.parquet", "--shard_size", SHARD_SIZE]
    printed = run(*flags, "--local_dir", folder / "out", "--workers", 1)
    return {
        "folder": folder,
        "flags": flags,
        "texts": parts[0] + parts[1] + parts[2],
        "shards": contents(folder / "out"),
        "printed": printed,
    }


@pytest.fixture
def unfinished(data, tmp_path):
    """A directory in which a run ended with an error, after several shards, and its flags.

    The second parquet file is damaged in the middle; its footer and its first rows are sound. The fixture's
    third value repairs it.
    """
    good, bad = tmp_path / "in/000.parquet", tmp_path / "in/001.parquet"
    write_parquet(str(good), data["texts"])
    content = good.read_bytes()
    third = len(content) // 3
    bad.write_bytes(content[:third] + bytes(5000) + content[third + 5000 :])
    directory = tmp_path / "out"
    flags = ["--tokenizer", "bytes", "--source", good, bad, "--local_dir", directory, "--shard_size", 15000]
    assert "001.parquet" in error_of(*flags)
    assert len(list(directory.glob("*.npy"))) >= 3

    def repair():
        bad.write_bytes(content)

    return directory, flags, repair


# ------------------------------------------------------------------------------- exact tokens
def test_tokens_equal_the_reference_for_any_number_of_workers(data, tmp_path):
    expected = reference(data["texts"], encode_bytes)
    assert len(expected) % SHARD_SIZE  # the last shard is shorter
    assert read_shards(data["folder"] / "out", SHARD_SIZE) == expected
    run(*data["flags"], "--local_dir", tmp_path / "out", "--workers", 3)
    assert contents(tmp_path / "out") == data["shards"]


def test_the_summary_counts_documents_bytes_and_tokens(data):
    texts = [text for text in data["texts"] if text]
    empty = len(data["texts"]) - len(texts)
    num_bytes = len("".join(texts).encode())
    assert f"{len(texts):,} documents ({empty:,} empty ones skipped), {num_bytes:,} bytes" in data["printed"]
    assert f"{num_bytes + len(texts):,} tokens" in data["printed"]


@has_gpt2
@pytest.mark.parametrize(("flag", "value", "expected"), [("--max_tokens", 5555, 5555), ("--max_shards", 3, 3000)])
def test_gpt2_tokens_equal_encode_ordinary_up_to_the_limit(data, tmp_path, flag, value, expected):
    enc = tiktoken.get_encoding("gpt2")
    tokens = reference(data["texts"], enc.encode_ordinary, enc.eot_token)
    paths = sorted(glob.glob(f"{data['folder']}/in/*.parquet"))
    directory = tmp_path / "out"
    run("--source", *paths, "--shard_size", 1000, flag, value, "--local_dir", directory, "--workers", 2)
    assert read_shards(directory, 1000) == tokens[:expected]


def all_spaces():
    """Return every character that \\s matches, by asking tiktoken's regular expressions about all of Unicode."""
    bytes_only = {bytes([i]): i for i in range(256)}
    spaces = tiktoken.Encoding("spaces", pat_str=r"\s", mergeable_ranks=bytes_only, special_tokens={})
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    return spaces.decode(spaces.encode_ordinary("".join(characters)))


def test_space_is_every_character_that_the_pattern_calls_a_space():
    spaces = all_spaces()
    assert len(spaces) == 25
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    matched = re.findall(f"[{load('fineweb').SPACE}]", "".join(characters))
    assert "".join(matched) == spaces


# characters that GPT-2's pattern, the placeholders of the script or Python's str methods treat specially
SYMBOLS = ["\r\n", *"\x1c\x1d\x1e\x1f\x00\x01\x7f\u200b\u180e\ufeff\ufffd", "<|endoftext|>"]
SYMBOLS += [*"aBéßЖ中のا1٣½Ⅷ!?_-<", " of", "े", "\u0301", "🙂", "👨‍👩‍👧", "'", "'s", "'ll", "'S", "’"]


def random_text(generator, symbols):
    """Return a text of up to 60 symbols; every second one is any character of Unicode."""
    text = []
    for _ in range(generator.randrange(60)):
        if generator.random() < 0.1:
            code = generator.choice([generator.randrange(0x20, 0xD800), generator.randrange(0xE000, 0x110000)])
            text.append(chr(code))
        else:
            text.append(generator.choice(symbols))
    return "".join(text)


@has_gpt2
def test_tokens_without_look_ahead_equal_encode_ordinary():
    """All strings of up to 4 of ten characters that matter, and 20,000 random texts full of spaces."""
    fineweb = load("fineweb")
    enc = tiktoken.get_encoding("gpt2")
    fast = fineweb.without_look_ahead(enc)
    batches = []
    for length in range(5):
        batches.append(["".join(part) for part in itertools.product(" \n\xa0a1!'s\x1c", repeat=length)])
    generator = random.Random(0)
    spaces = list(all_spaces())
    symbols = SYMBOLS + spaces + 12 * [" "] + 6 * ["\n"]
    without_placeholders = [symbol for symbol in symbols if symbol not in "\x00\x01"]
    for _ in range(100):
        for candidates in (symbols, without_placeholders):
            few = [*generator.sample(candidates, 4), " "]
            chosen = generator.choice([candidates, few])
            batches.append([random_text(generator, chosen) for _ in range(100)] + [None])
    for texts in batches:
        batch = fineweb.tokenize(fast, pa.array(texts, pa.string()))
        assert batch.tokens.dtype == np.dtype("<u2")
        assert batch.tokens.tolist() == reference(texts, enc.encode_ordinary, enc.eot_token)
        assert batch.rows == len(texts)
        assert batch.empty == sum(not text for text in texts)
        assert batch.text_bytes == len("".join(filter(None, texts)).encode())


@has_gpt2
@pytest.mark.parametrize("placeholder", ["", "\x00", "\x01"])
def test_a_million_spaces_are_tokenized(placeholder):
    """tiktoken itself fails here, because looking ahead exceeds a limit of its regular expressions."""
    fineweb = load("fineweb")
    enc = tiktoken.get_encoding("gpt2")
    text = placeholder + " " * 10**6 + "x"
    tokens = fineweb.tokenize(fineweb.without_look_ahead(enc), pa.array([text])).tokens
    assert tokens[0] == enc.eot_token
    assert enc.decode(tokens[1:].tolist()) == text
    assert tokens[-1] == enc.encode_ordinary(" x")[0]


@has_books
def test_real_documents_have_the_tokens_of_encode_ordinary(tmp_path):
    enc = tiktoken.get_encoding("gpt2")
    texts = pq.ParquetFile(BOOKS[0]).read_row_group(0, columns=["text"]).column(0).to_pylist()
    directory = tmp_path / "out"
    flags = ["--max_tokens", 400_000, "--shard_size", 150_000, "--local_dir", directory, "--workers", 2]
    run("--source", *BOOKS, *flags)
    expected = reference(texts[:400], enc.encode_ordinary, enc.eot_token)
    assert len(expected) >= 400_000
    assert read_shards(directory, 150_000) == expected[:400_000]


def test_text_columns_of_every_type_give_the_same_tokens(data, tmp_path):
    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
    shards = []
    for i, kind in enumerate(kinds):
        texts = pa.array(data["texts"], pa.string())
        column = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
        path = tmp_path / f"{i}.parquet"
        pq.write_table(pa.table({"text": column}), path)
        assert pq.ParquetFile(path).schema_arrow.field("text").type == kind
        flags = ["--tokenizer", "bytes", "--shard_size", SHARD_SIZE, "--source", path]
        done = call("fineweb", *flags, "--local_dir", tmp_path / f"out{i}")
        assert done.returncode == 0, done.stderr
        shards.append(contents(tmp_path / f"out{i}", ".npy"))
    assert all(shard == contents(data["folder"] / "out", ".npy") for shard in shards)


# ------------------------------------------------------------------------------ interruptions
def run_and_kill(arguments, seconds):
    """Start a process and send it SIGKILL after some seconds, or let it end if it is faster."""
    process = subprocess.Popen(**arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return process.returncode


@posix
@pytest.mark.parametrize("seed", range(int(os.environ.get("RANDOM_KILLS", "2"))))
def test_a_run_killed_at_a_random_moment_continues_to_the_same_shards(data, tmp_path, seed):
    """Kill the run three times, at moments between its start and the time that a whole run takes."""
    flags = ["--tokenizer", "bytes", "--shard_size", 15013, "--workers", 2]
    flags += ["--source", *8 * [data["folder"] / "in/000.parquet"]]
    started = time.perf_counter()
    run(*flags, "--local_dir", tmp_path / "whole")
    duration = time.perf_counter() - started
    generator = random.Random(seed)
    for _ in range(3):
        arguments = process_arguments(*flags, "--local_dir", tmp_path / "out")
        run_and_kill(arguments, duration * generator.uniform(0.3, 1))
    run(*flags, "--local_dir", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@posix
def test_a_run_killed_around_the_writing_of_shards_continues_to_the_same_shards(data, tmp_path):
    flags = ["--tokenizer", "bytes", "--shard_size", 15013, "--workers", 2]
    flags += ["--source", *4 * [data["folder"] / "in/000.parquet"]]
    run(*flags, "--local_dir", tmp_path / "whole")
    generator = random.Random(5)
    shards = 0
    for _ in range(4):
        arguments = process_arguments(*flags, "--local_dir", tmp_path / "out")
        process = subprocess.Popen(**arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shards += generator.randrange(1, 4)
        while len(list(tmp_path.glob("out/*.npy"))) < shards and process.poll() is None:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.03))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    run(*flags, "--local_dir", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# A script that runs fineweb.py and dies before its n-th call of a function that changes names or flushes files.
DIE = """
import os, sys
sys.path.insert(0, {root!r})
import fineweb

remaining = int(sys.argv.pop(1))

def dying(function):
    def wrapper(*arguments):
        global remaining
        remaining -= 1
        if remaining == 0:
            os._exit(9)
        function(*arguments)
    return wrapper

os.replace, os.fsync, os.remove = dying(os.replace), dying(os.fsync), dying(os.remove)
fineweb.run_script(fineweb.main)
"""


def run_dying(tmp_path, n, *flags):
    """Run fineweb.py so that it dies before its n-th step that changes the disk. Returns its exit status."""
    script = tmp_path / "die.py"
    script.write_text(DIE.format(root=str(ROOT)))
    return subprocess.run(**process_arguments(n, *flags, script=script), capture_output=True).returncode


def test_a_run_may_die_between_any_two_steps_that_change_the_disk(data, tmp_path):
    """Each run dies a step later than the one before it, until one does not."""
    flags = [*data["flags"], "--local_dir", tmp_path / "out", "--workers", 1]
    for n in range(1, 100):
        status = run_dying(tmp_path, n, *flags)
        if status == 0:
            break
        assert status == 9
    assert n >= 6
    assert contents(tmp_path / "out") == data["shards"]


def test_a_run_may_die_at_any_step_after_the_last_shard(data, tmp_path):
    """Two shards, so that few steps come before the files of a finished run are put in order."""
    shard_size = len(reference(data["texts"], encode_bytes)) // 2 + 1
    flags = [*data["flags"][:-1], shard_size, "--workers", 1]
    run(*flags, "--local_dir", tmp_path / "whole")
    for n in range(1, 100):
        directory = tmp_path / f"out{n}"
        status = run_dying(tmp_path, n, *flags, "--local_dir", directory)
        run(*flags, "--local_dir", directory)
        assert contents(directory) == contents(tmp_path / "whole")
        if status == 0:
            break
        assert status == 9
    assert n >= 10


@posix
def test_ctrl_c_ends_the_run_at_once_and_it_continues(tmp_path):
    big = tmp_path / "big.parquet"
    write_parquet(str(big), ["word " * 2000] * 5000)  # seconds of work, because a busy machine signals late
    flags = ["--tokenizer", "bytes", "--source", big, "--shard_size", 200_000, "--max_tokens", 40_000_000]
    arguments = process_arguments(*flags, "--local_dir", tmp_path / "out", "--workers", 2)
    process = subprocess.Popen(**arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while not list(tmp_path.glob("out/edufineweb_train_000002.npy")):
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # to the whole process group, as a terminal does
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert stderr == ""
    with pytest.raises(ProcessLookupError):  # no process of the run remains
        os.killpg(process.pid, 0)
    run(*flags, "--local_dir", tmp_path / "out", "--workers", 2)
    assert len(read_shards(tmp_path / "out", 200_000)) == 40_000_000


@posix
def test_a_full_disk_is_one_line_and_the_run_continues(data, tmp_path):
    """A limit on the size of files stands in for the full disk: both are errors of the same system call."""
    flags = ["--tokenizer", "bytes", "--source", f"{data['folder']}/in/*.parquet", "--shard_size", 60000]
    arguments = process_arguments(*flags, "--local_dir", tmp_path / "out", "--workers", 1)
    arguments["args"] = ["bash", "-c", 'ulimit -f 80; exec "$@"', "bash", *arguments["args"]]  # 80 KiB
    done = subprocess.run(**arguments, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "same command again" in done.stderr
    run(*flags, "--local_dir", tmp_path / "out", "--workers", 1)
    assert read_shards(tmp_path / "out", 60000) == reference(data["texts"], encode_bytes)


def test_an_unfinished_directory_has_a_state_file_before_its_first_shard(tmp_path):
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"not parquet")
    directory = tmp_path / "out"
    assert "bad.parquet" in error_of("--tokenizer", "bytes", "--source", bad, "--local_dir", directory)
    assert not list(directory.glob("*.npy"))
    assert list(directory.glob("state_*.json"))


# -------------------------------------------------------------------------------- user errors
def test_other_settings_are_refused_with_both_values(data, tmp_path):
    directory = tmp_path / "out"
    shutil.copytree(data["folder"] / "out", directory)
    changes = [["--shard_size", 20012], ["--max_tokens", 7], ["--text_column", "id"], ["--world_size", 2]]
    if os.path.isdir(CACHE):
        changes.append(["--tokenizer", "gpt2"])
    old_values = {"shard_size": "20011", "max_tokens": "0", "text_column": "text", "world_size": "1"}
    old_values["tokenizer"] = "bytes"
    for flag, value in changes:
        name = flag.removeprefix("--")
        error = error_of(*data["flags"], "--local_dir", directory, flag, value)
        assert f"{name} {old_values[name]}, not {value}" in error
    few_files = ["--source", f"{data['folder']}/in/000.parquet"]
    assert "3 parquet files, not 1" in error_of(*data["flags"], "--local_dir", directory, *few_files)
    assert "already contains" in run(*data["flags"], "--local_dir", directory)
    assert contents(directory) == data["shards"]


def test_a_directory_with_other_files_is_refused(data, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "thesis.txt" in error_of(*data["flags"], "--local_dir", tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]
    assert "is a file" in error_of(*data["flags"], "--local_dir", tmp_path / "thesis.txt")


def test_bad_input_is_one_line(data, tmp_path):
    flags = ["--tokenizer", "bytes", "--local_dir", tmp_path / "out"]
    source = ["--source", data["folder"] / "in/000.parquet"]
    assert "nowhere" in error_of(*flags, "--source", tmp_path / "nowhere/*.parquet")
    assert "column body" in error_of(*flags, *source, "--text_column", "body")
    shutil.rmtree(tmp_path / "out")
    assert "int64" in error_of(*flags, *source, "--text_column", "id")
    shutil.rmtree(tmp_path / "out")
    assert "--shard_size is 0" in error_of(*flags, *source, "--shard_size", 0)
    assert "--shard_size" in error_of(*flags, *source, "--shard_size", 10**17)
    assert "--rank 3" in error_of(*flags, *source, "--rank", 3, "--world_size", 3)
    assert "--rank" in run(*flags, *source, RANK="first", code=2)
    (tmp_path / "empty").mkdir()
    assert "no .npy or .bin files" in error_of("--verify", tmp_path / "empty")
    assert "is not a directory" in error_of("--verify", tmp_path / "nowhere")
    for name in ("empty", "nowhere"):
        error = error_of("--finish", "--local_dir", tmp_path / name)
        assert f"{name} does not contain a started data set" in error


def test_two_columns_of_the_same_name_are_one_line(tmp_path):
    path = tmp_path / "twice.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    error = error_of("--tokenizer", "bytes", "--source", path, "--local_dir", tmp_path / "out")
    assert "2 columns called text" in error


def test_a_damaged_parquet_file_is_named_and_finished_shards_stay(data, unfinished):
    directory, flags, repair = unfinished
    finished = {path: path.stat().st_mtime_ns for path in directory.glob("*.npy")}
    repair()
    run(*flags)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in finished.items())
    assert read_shards(directory, 15000) == 2 * reference(data["texts"], encode_bytes)


def test_a_truncated_parquet_file_is_named(data, tmp_path):
    bad = tmp_path / "001.parquet"
    bad.write_bytes((data["folder"] / "in/000.parquet").read_bytes()[:1000])
    assert "001.parquet" in error_of("--tokenizer", "bytes", "--source", bad, "--local_dir", tmp_path / "out")


@pytest.mark.parametrize("when", ["unfinished", "finished"])
def test_a_parquet_file_replaced_by_one_of_the_same_name_and_size_is_noticed(data, tmp_path, when):
    path, other = tmp_path / "texts.parquet", tmp_path / "other.parquet"
    changed_texts = [text and text.replace("the", "THE") for text in data["texts"]]
    for file, texts in ((path, data["texts"]), (other, changed_texts)):
        pq.write_table(pa.table({"text": texts}), file, compression="none", use_dictionary=False)
    assert path.stat().st_size == other.stat().st_size
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    source = ["--source", path] if when == "finished" else ["--source", path, tmp_path / "broken.parquet"]
    flags = ["--tokenizer", "bytes", "--shard_size", SHARD_SIZE, "--local_dir", tmp_path / "out", *source]
    call("fineweb", *flags)
    before = contents(tmp_path / "out")
    assert len(before) > 3
    assert ("meta.json" in before) == (when == "finished")
    other.replace(path)
    assert "another texts.parquet" in error_of(*flags)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["lost", "shortened"])
def test_a_finished_shard_that_is_lost_or_shortened_is_noticed_when_the_run_continues(unfinished, damage):
    directory, flags, repair = unfinished
    repair()
    shard = directory / "edufineweb_train_000001.npy"
    if damage == "lost":
        shard.unlink()
    else:
        os.truncate(shard, 5000)
    error = error_of(*flags)
    assert shard.name in error and "missing or damaged" in error
    assert not (directory / "meta.json").exists()


def nested(depth):
    """Return JSON of lists within lists."""
    return "[" * depth + "]" * depth


def replace_values(text, path, value):
    """Return the JSON text with the value at a path of keys replaced, or removed if the value is None."""
    content = json.loads(text)
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(content)


DAMAGED_STATES = {
    "an empty file": lambda text: "",
    "a list": lambda text: "[]",
    "an empty object": lambda text: "{}",
    "nested lists": lambda text: nested(10_000),
    "a nested value": lambda text: '{"settings": ' + nested(10_000) + "}",
    "not UTF-8": lambda text: "\udcff",
    "no settings": lambda text: replace_values(text, ["settings"], None),
    "no source": lambda text: replace_values(text, ["settings", "source"], None),
    "no files": lambda text: replace_values(text, ["settings", "source", "files"], None),
    "no shards": lambda text: replace_values(text, ["shards"], None),
    "no row": lambda text: replace_values(text, ["row"], None),
    "another tokenizer": lambda text: replace_values(text, ["settings", "tokenizer"], "gpt3"),
    "a list as tokenizer": lambda text: replace_values(text, ["settings", "tokenizer"], ["bytes"]),
    "files of numbers": lambda text: replace_values(text, ["settings", "source", "files"], [1]),
    "a text as world_size": lambda text: replace_values(text, ["settings", "source", "world_size"], "1"),
    "a negative row": lambda text: replace_values(text, ["row"], -1),
    "a fractional file": lambda text: replace_values(text, ["file"], 0.5),
    "infinite tokens": lambda text: replace_values(text, ["tokens"], float("inf")),
    "done as a text": lambda text: replace_values(text, ["done"], "yes"),
    "another rank": lambda text: replace_values(text, ["rank"], 1),
    "shards of numbers": lambda text: replace_values(text, ["shards"], [1, 2]),
    "a shard without tokens": lambda text: replace_values(text, ["shards", 0, "tokens"], None),
    "a shard with a wrong checksum": lambda text: replace_values(text, ["shards", 0, "sha256"], 5),
    "a shard elsewhere": lambda text: replace_values(text, ["shards", 0, "file"], "../victim.npy"),
    "a download elsewhere": lambda text: replace_values(
        replace_values(text, ["settings", "source", "repo_id"], "some/texts"),
        ["settings", "source", "files", 0, 0],
        "../../victim.parquet",
    ),
}


def test_damaged_states_are_one_line_and_nothing_is_touched(unfinished):
    directory, flags, repair = unfinished
    repair()
    state = directory / "state_00000.json"
    text = state.read_text()
    victims = [directory.parent / "victim.npy", directory.parent / "victim.parquet"]
    for victim in victims:
        victim.write_text("precious")
    for name, damage in DAMAGED_STATES.items():
        state.write_text(damage(text), encoding="utf-8", errors="surrogateescape")
        before = contents(directory)
        for action in (flags, ["--finish", "--local_dir", directory], ["--verify", directory]):
            assert "state_00000.json" in error_of(*action), name
        assert contents(directory) == before, name
    assert all(victim.read_text() == "precious" for victim in victims)
    state.write_text(text)
    run(*flags)


@posix  # Windows does not allow these names
def test_local_files_may_have_any_name(tmp_path):
    texts = make_texts(5, 60)
    write_parquet(f"{tmp_path}/in/2024-01-01T00:00 \\.parquet", texts)
    flags = ["--tokenizer", "bytes", "--source", f"{tmp_path}/in/*.parquet", "--local_dir", tmp_path / "out"]
    flags += ["--shard_size", 1000]
    run(*flags)
    assert read_shards(tmp_path / "out", 1000) == reference(texts, encode_bytes)
    assert "already contains" in run(*flags)


@posix
def test_named_pipes_in_place_of_files_do_not_hang(data, tmp_path):
    flags = ["--tokenizer", "bytes", "--local_dir", tmp_path]
    source = ["--source", data["folder"] / "in/000.parquet"]
    for name in ("state_00000.json", "meta.json"):
        os.mkfifo(tmp_path / name)
        assert f"{name} is not a regular file" in run(*flags, *source, code=2)
        os.remove(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.parquet")
    assert "pipe.parquet" in run(*flags, "--source", tmp_path / "pipe.parquet", code=2)


@has_gpt2
@posix
def test_a_named_pipe_in_place_of_a_shard_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe_val_000000.npy")
    assert "pipe_val_000000.npy is not a regular file" in run("--verify", tmp_path, code=2, TIKTOKEN_CACHE_DIR=CACHE)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        nested(10_000),
        "{}",
        '{"tokenizer": "bytes", "vocab_size": 257, "shards": []}',
        '{"tokenizer": "bytes", "vocab_size": 257, "source": {"world_size": 1, "files": 3}, "shards": []}',
    ],
    ids=["list", "nested", "empty", "no source", "files is a number"],
)
def test_a_damaged_meta_json_is_one_line(data, tmp_path, content):
    (tmp_path / "meta.json").write_text(content)
    assert "meta.json" in error_of(*data["flags"], "--local_dir", tmp_path)
    assert os.listdir(tmp_path) == ["meta.json"]


# ------------------------------------------------------------------------------------- splits
def test_a_data_set_that_is_too_small_for_a_training_shard_is_an_error_that_names_a_shard_size(data, tmp_path):
    directory = tmp_path / "out"
    num_tokens = len(reference(data["texts"], encode_bytes))
    flags = ["--tokenizer", "bytes", "--source", f"{data['folder']}/in/*.parquet", "--local_dir", directory]
    for _ in range(2):  # the same command again has the same result
        error = error_of(*flags)
        assert f"{num_tokens} tokens" in error and "none for training" in error
        assert not (directory / "meta.json").exists()
    shard_size = re.search(r"--shard_size (\d+)", error)[1]
    shutil.rmtree(directory)
    run(*flags, "--shard_size", shard_size)
    assert read_shards(directory, int(shard_size)) == reference(data["texts"], encode_bytes)
    assert len(list(directory.glob("*_train_*"))) in (9, 10)


@pytest.mark.parametrize(("flag", "value"), [("--max_shards", 1), ("--max_tokens", 7), ("--max_tokens", SHARD_SIZE)])
def test_a_limit_that_leaves_no_tokens_for_training_is_found_at_once(data, tmp_path, flag, value):
    error = error_of(*data["flags"], "--local_dir", tmp_path / "out", flag, value)
    assert flag in error and f"--shard_size {SHARD_SIZE}" in error
    assert not (tmp_path / "out").exists()


def test_a_limit_that_leaves_one_token_for_training_is_allowed(data, tmp_path):
    run(*data["flags"], "--local_dir", tmp_path / "out", "--max_tokens", SHARD_SIZE + 1)
    assert len(np.load(tmp_path / "out/edufineweb_train_000001.npy")) == 1


def test_several_machines_without_a_training_or_a_validation_shard_are_an_error(data, tmp_path):
    """Shard 0, which is for validation, is the first shard of rank 0."""
    write_parquet(f"{tmp_path}/empty.parquet", [None, ""])
    full, empty = data["folder"] / "in/000.parquet", tmp_path / "empty.parquet"
    flags = ["--tokenizer", "bytes", "--world_size", 2]
    cases = {"none for training": [full, empty], "no validation shard": [empty, full]}
    for problem, files in cases.items():
        directory = tmp_path / problem.split()[-1]
        for rank in (0, 1):
            run(*flags, "--rank", rank, "--source", *files, "--local_dir", directory)
        assert problem in error_of("--finish", "--local_dir", directory)
        assert not (directory / "meta.json").exists()


def test_parquet_files_without_any_text_are_an_error(tmp_path):
    write_parquet(f"{tmp_path}/empty.parquet", [None, ""])
    flags = ["--tokenizer", "bytes", "--source", tmp_path / "empty.parquet", "--local_dir", tmp_path / "out"]
    assert "contain no text" in error_of(*flags)
    assert not (tmp_path / "out/meta.json").exists()


# -------------------------------------------------------------------- machines and operating systems
def test_several_machines_make_one_data_set(data, tmp_path):
    directory = tmp_path / "out"
    flags = [*data["flags"], "--local_dir", directory, "--workers", 1]
    assert "rank 1 of 2: this process tokenizes 1 of 3 parquet files" in run(*flags, "--world_size", 2, "--rank", 1)
    assert "1 of 2 ranks" in run("--finish", "--local_dir", directory, code=2)
    assert "world_size 2, not 3" in run(*flags, "--world_size", 3, "--rank", 2, code=2)
    assert not list(directory.glob("*_val_*"))
    run(*flags, RANK="0", WORLD_SIZE="2")
    run("--finish", "--local_dir", directory)
    tokens = read_shards(directory, SHARD_SIZE, world_size=2)
    expected = reference(data["texts"], encode_bytes)
    assert np.bincount(tokens).tolist() == np.bincount(expected).tolist()
    assert len(list(directory.glob("*_val_*"))) == 1
    assert "no problems" in run("--verify", directory)
    assert "is finished" in run("--finish", "--local_dir", directory)


@pytest.mark.parametrize("step", [None, "", "4294967291", "4294967290", "4294967294"])
def test_slurm_variables_of_a_batch_script_are_ignored(data, tmp_path, step):
    """A batch script runs once, on one node, although it sees the number of tasks."""
    variables = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    if step is not None:
        variables["SLURM_STEP_ID"] = step
    printed = run(*data["flags"], "--local_dir", tmp_path / "out", **variables)
    assert "rank" not in printed
    assert contents(tmp_path / "out") == data["shards"]


def test_slurm_variables_of_an_srun_step_are_used(data, tmp_path):
    variables = {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_STEP_ID": "0"}
    printed = run(*data["flags"], "--local_dir", tmp_path / "out", **variables)
    assert "rank 2 of 3: this process tokenizes 1 of 3 parquet files" in printed
    assert [path.name for path in tmp_path.glob("out/state_*.json")] == ["state_00002.json"]


@posix
def test_a_directory_in_use_is_refused(data, tmp_path):
    import filelock

    directory = tmp_path / "out"
    directory.mkdir()
    with filelock.FileLock(directory / "state_00000.lock"):
        assert "another run of rank 0" in run(*data["flags"], "--local_dir", directory, code=2)
    run(*data["flags"], "--local_dir", directory)
    assert contents(directory) == data["shards"]


@has_simulations
def test_a_file_system_without_locks_gives_one_warning(data, tmp_path):
    flags = [*data["flags"], "--local_dir", tmp_path / "out"]
    arguments = process_arguments(*flags, PYTHONPATH=str(SHARED / "sim/noflock"))
    done = subprocess.run(**arguments, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("warning: ") and "cannot be locked" in done.stderr
    assert contents(tmp_path / "out") == data["shards"]


@has_simulations
def test_windows_does_not_delete_or_rename_files_that_are_open(data, tmp_path):
    """The simulation has no fcntl, few signals, and refuses to delete or rename open files."""
    flags = [*data["flags"], "--local_dir", tmp_path / "out", "--max_tokens", 50_000]
    arguments = process_arguments(*flags, PYTHONPATH=str(SHARED / "sim/win"), PYTHONWARNINGS="ignore")
    done = subprocess.run(**arguments, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert read_shards(tmp_path / "out", SHARD_SIZE) == reference(data["texts"], encode_bytes)[:50_000]


@has_simulations
def test_a_wrong_page_in_place_of_the_vocabulary_is_one_line(data, tmp_path):
    flags = ["--source", data["folder"] / "in/000.parquet", "--local_dir", tmp_path / "out"]
    variables = {"PYTHONPATH": str(SHARED / "sim/badvocab"), "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")}
    assert "GPT-2's vocabulary" in run(*flags, code=2, **variables)


def in_shell(tail, *flags, **variables):
    """Run fineweb.py in bash with a redirection or pipe behind it. Returns the exit status and stderr."""
    arguments = process_arguments(*flags, **variables)
    arguments["args"] = ["bash", "-c", f'set -o pipefail; "$@" {tail}', "bash", *arguments["args"]]
    done = subprocess.run(**arguments, capture_output=True, timeout=100)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    return done.returncode, done.stderr


@posix
def test_verify_may_have_no_reader_no_space_and_no_streams(data):
    flags = ["--verify", data["folder"] / "out"]
    assert in_shell("| true", *flags) == (0, "")
    assert in_shell("| head -n 1 > /dev/null", *flags) == (0, "")
    assert in_shell(">&-", *flags) == (0, "")
    assert in_shell("2>&-", *flags) == (0, "")
    if os.path.exists("/dev/full"):
        status, stderr = in_shell("> /dev/full", *flags)
        assert status != 0
        assert stderr.startswith("error: ") and stderr.count("\n") == 1


@posix
@pytest.mark.parametrize("tail", ["| true", "> /dev/full", ">&-", "2>&-", ">&- 2>&-"])
def test_shards_are_finished_even_if_the_summary_cannot_be_printed(data, tmp_path, tail):
    in_shell(tail, *data["flags"], "--local_dir", tmp_path / "out")
    assert contents(tmp_path / "out") == data["shards"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_verify_prints_any_text_on_any_terminal(tmp_path, encoding):
    text = "東京 🙂 naïve"
    write_parquet(f"{tmp_path}/in.parquet", [text, text])
    flags = ["--tokenizer", "bytes", "--source", tmp_path / "in.parquet", "--local_dir", tmp_path / "out"]
    run(*flags, "--shard_size", 1 + len(text.encode()))  # each document is a shard
    arguments = process_arguments("--verify", tmp_path / "out", PYTHONIOENCODING=encoding)
    done = subprocess.run(**arguments, capture_output=True, encoding=encoding)
    assert done.returncode == 0, done.stderr
    assert "1 documents" in done.stdout


# ---------------------------------------------------------------------------------- verifying
def test_verify_counts_the_shards_of_this_script(data):
    printed = run("--verify", data["folder"] / "out")
    expected = reference(data["texts"], encode_bytes)
    validation, training = expected[:SHARD_SIZE], expected[SHARD_SIZE:]
    assert f"val: 1 shards, {SHARD_SIZE:,} tokens, {validation.count(END_OF_TEXT):,} documents" in printed
    assert f"{len(training):,} tokens, {training.count(END_OF_TEXT):,} documents" in printed
    assert "compared with meta.json" in printed
    assert "no problems" in printed
    assert printed.count("\n") < 25


def test_verify_names_every_damaged_shard(data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(data["folder"] / "out", broken)
    with open(broken / "edufineweb_train_000001.npy", "r+b") as file:
        file.seek(1000)
        file.write(b"\x01\x00\x02")
    os.truncate(broken / "edufineweb_train_000002.npy", 5000)
    os.remove(broken / "edufineweb_val_000000.npy")
    np.save(broken / "edufineweb_train_000009.npy", np.zeros(5, np.uint16))
    error = run("--verify", broken, code=2)
    assert "4 problems" in error
    for number in ("train_000001", "train_000002", "val_000000", "train_000009"):
        assert f"{number}.npy" in error


def test_verify_compares_an_unfinished_directory_with_its_states(unfinished):
    directory, _, _ = unfinished
    assert "unfinished" in run("--verify", directory)
    with open(directory / "edufineweb_train_000001.npy", "r+b") as file:
        file.seek(1000)
        file.write(b"\x01\x00\x02")
    assert "train_000001.npy does not match its checksum" in run("--verify", directory, code=2)


@has_gpt2
def test_verify_reads_shards_of_other_projects(tmp_path):
    tokens = np.array([50256, 15496, 995, 50256, 15496], "<u2")  # <|endoftext|>Hello world<|endoftext|>Hello
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy/edufineweb_val_000000.npy", tokens)
    np.save(tmp_path / "npy/edufineweb_train_000001.npy", tokens[:3])
    (tmp_path / "npy/._edufineweb_train_000001.npy").write_bytes(b"macOS")
    printed = run("--verify", tmp_path / "npy")
    assert "val: 1 shards, 5 tokens, 2 documents" in printed
    assert "train: 1 shards, 3 tokens, 1 documents" in printed
    assert "Hello world" in printed
    assert "meta.json is missing" in printed
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    header = header.tobytes()
    (tmp_path / "bin").mkdir()
    shard = tmp_path / "bin/fineweb_train_000001.bin"
    shard.write_bytes(header + tokens.tobytes())
    assert "train: 1 shards, 5 tokens, 2 documents" in run("--verify", tmp_path / "bin")
    shard.rename(tmp_path / "bin/tiny_shakespeare_val.bin")  # llm.c's name, without a number
    assert "val: 1 shards, 5 tokens, 2 documents" in run("--verify", tmp_path / "bin")
    for bad in (header + tokens.tobytes()[:-2], bytes(1034), b"", header + b"\xff" * 10):
        shard.write_bytes(bad)
        assert shard.name in run("--verify", tmp_path / "bin", code=2)


# --------------------------------------------------------------------------- a Hub on 127.0.0.1
class Hub(http.server.BaseHTTPRequestHandler):
    """The three addresses of a data set that huggingface_hub asks for.

    server.trouble is a list of (kind of request, what goes wrong once): an HTTP status, "drop" (the connection
    breaks in the middle of the body) or "truncated" (half of the file with a header that says it is all).
    server.refuses(request) returns whether a request is answered with 503.
    server.hangs(request) returns whether a request is never answered.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", send=None, **headers):
        """Send a response; only the first `send` bytes of the body, if given."""
        if self.server.refuses(self):
            status = 503
        self.send_response(status)
        headers = {"Content-Length": len(body), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if send is None else body[:send])
            if send is not None and send < len(body):
                self.close_connection = True

    def do_GET(self):
        server = self.server
        path = urllib.parse.unquote(self.path.split("?")[0])
        if "/tree/" in path:
            kind = "tree"
        elif "/api/" in path:
            kind = "info"
        else:
            kind = self.command
        server.log.append((kind, path))
        if server.hangs(self):
            time.sleep(1000)
        trouble = next((what for which, what in server.trouble if which == kind), None)
        if trouble is not None:
            server.trouble.remove((kind, trouble))
        if isinstance(trouble, int):
            return self.reply(trouble, b"busy")
        if not path.removeprefix("/api").startswith("/datasets/me/texts"):
            return self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if kind == "info":
            return self.reply(200, json.dumps({"id": "me/texts", "sha": COMMIT}).encode())
        name = path.split(COMMIT, 1)[1].strip("/")
        if kind == "tree":
            return self.reply_tree(name)
        return self.reply_file(name, trouble)

    do_HEAD = do_GET

    def not_found(self):
        self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="not found")

    def reply_tree(self, folder):
        prefix = f"{folder}/" if folder else ""
        entries = []
        for path, content in self.server.files.items():
            if path.startswith(prefix):
                entries.append({"type": "file", "path": path, "size": len(content), "oid": "0"})
        if not entries:
            return self.not_found()
        self.reply(200, json.dumps(entries).encode(), Content_Type="application/json")

    def reply_file(self, name, trouble):
        if name not in self.server.files:
            return self.not_found()
        body = self.server.files[name]
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        first = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if first:
            first = int(first[1])
            content_range = f"bytes {first}-{len(body) - 1}/{len(body)}"
            self.reply(206, body[first:], Content_Range=content_range, **headers)
        elif trouble == "truncated":
            self.reply(200, body[: len(body) // 2], **headers)
        elif trouble == "drop":
            self.reply(200, body, send=len(body) // 2, **headers)
        else:
            self.reply(200, body, **headers)


@pytest.fixture
def hub(data):
    """A server with the parquet files of the fixture data in the folder of sample-10BT."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.log, server.trouble = [], []
    server.refuses = lambda request: False
    server.hangs = lambda request: False
    server.files = {"README.md": b"hello"}
    for i, path in enumerate(sorted(glob.glob(f"{data['folder']}/in/*.parquet"))):
        server.files[f"sample/10BT/{i:03d}.parquet"] = Path(path).read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


# A script that runs fineweb.py without patience.
IMPATIENT = """
import sys
sys.path.insert(0, {root!r})
import fineweb

fineweb.DOWNLOAD_ATTEMPTS = 1
fineweb.run_script(fineweb.main)
"""


def run_with_hub(hub, directory, *flags, patient=True, **options):
    """Run fineweb.py on the data set of the server."""
    script = SCRIPT
    if not patient:
        script = directory.parent / "impatient.py"
        script.write_text(IMPATIENT.format(root=str(ROOT)))
    flags = ["--repo_id", "me/texts", "--tokenizer", "bytes", "--shard_size", SHARD_SIZE, "--workers", 1, *flags]
    variables = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(directory.parent / "hf")}
    variables.update(options)
    return run(*flags, "--local_dir", directory, script=script, **variables)


def test_every_trouble_of_the_hub_that_passes_is_waited_for(hub, data, tmp_path):
    hub.trouble = [("info", 503), ("info", 429), ("tree", 503), ("GET", 429), ("GET", "drop"), ("GET", "drop")]
    hub.trouble += [("GET", "truncated"), ("HEAD", 503)]
    run_with_hub(hub, tmp_path / "out")
    assert not hub.trouble
    assert contents(tmp_path / "out", ".npy") == contents(data["folder"] / "out", ".npy")
    read_shards(tmp_path / "out", SHARD_SIZE)  # asserts also that there are no other files


def test_a_finished_directory_does_not_ask_the_hub(hub, tmp_path):
    run_with_hub(hub, tmp_path / "out")
    hub.log.clear()
    assert "already contains" in run_with_hub(hub, tmp_path / "out")
    assert not hub.log


def test_a_rank_without_files_downloads_nothing(hub, tmp_path):
    printed = run_with_hub(hub, tmp_path / "out", "--rank", 3, "--world_size", 4)
    assert "this process tokenizes 0 of 3 parquet files" in printed
    assert "0 tokens in 0 shards" in printed
    assert {kind for kind, _ in hub.log} == {"info", "tree"}


def test_a_hub_that_stays_away_is_one_line_and_the_run_continues(hub, data, tmp_path):
    directory = tmp_path / "out"
    hub.refuses = lambda request: "002" in request.path and request.command == "GET"
    error = run_with_hub(hub, directory, patient=False, code=2)
    assert "002.parquet" in error and "--source" in error
    hub.refuses = lambda request: False
    hub.log.clear()
    run_with_hub(hub, directory)
    assert contents(directory, ".npy") == contents(data["folder"] / "out", ".npy")
    # a file that has been downloaded is not downloaded again
    assert not any("000.parquet" in path for _, path in hub.log)


@posix
def test_a_run_killed_after_a_file_continues_with_its_download(hub, data, tmp_path):
    directory = tmp_path / "out"
    hub.hangs = lambda request: "002" in request.path
    arguments = process_arguments("--repo_id", "me/texts", "--tokenizer", "bytes", "--shard_size", SHARD_SIZE)
    arguments["args"] += ["--local_dir", str(directory)]
    arguments["env"]["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"
    process = subprocess.Popen(**arguments)
    while not any("002.parquet" in path for _, path in hub.log):
        time.sleep(0.01)
    process.kill()
    process.wait()
    hub.hangs = lambda request: False
    hub.log.clear()
    run_with_hub(hub, directory)
    assert contents(directory, ".npy") == contents(data["folder"] / "out", ".npy")
    assert not any("000.parquet" in path for _, path in hub.log)


def test_a_hub_without_the_data_set_or_no_hub_is_one_line(hub, tmp_path):
    directory = tmp_path / "out"
    assert "data set me/nothing" in run_with_hub(hub, directory, "--repo_id", "me/nothing", code=2)
    assert "data set a/b/c" in run_with_hub(hub, directory, "--repo_id", "a/b/c", code=2)
    assert "subset sample-350BT" in run_with_hub(hub, directory, "--remote_name", "sample-350BT", code=2)
    started = time.perf_counter()
    assert "--source" in run_with_hub(hub, directory, HF_ENDPOINT="http://127.0.0.1:9", code=2)
    assert time.perf_counter() - started < 10
    assert not directory.exists()


def test_a_download_that_hangs_does_not_keep_a_failed_run_alive(hub, tmp_path):
    # The first file is damaged near its end. It is long, so that the download of the next one begins
    # before the run reaches the damage.
    write_parquet(str(tmp_path / "long.parquet"), make_texts(1, 20_000))
    content = (tmp_path / "long.parquet").read_bytes()
    damage = len(content) * 9 // 10
    hub.files["sample/10BT/000.parquet"] = content[:damage] + bytes(5000) + content[damage + 5000 :]
    hub.hangs = lambda request: "001" in request.path
    started = time.perf_counter()
    assert "000.parquet" in run_with_hub(hub, tmp_path / "out", "--shard_size", 50_000, code=2)
    assert any("001.parquet" in path for _, path in hub.log)
    assert time.perf_counter() - started < 20


def test_at_most_two_parquet_files_are_on_the_disk(hub, tmp_path):
    hub.files = {f"sample/10BT/{i:03d}.parquet": hub.files["sample/10BT/002.parquet"] for i in range(6)}
    counts = set()
    stop = threading.Event()

    def watch():
        while not stop.wait(0.001):
            counts.add(len(glob.glob(f"{tmp_path}/out/parquet_00000/sample/10BT/*.parquet")))

    threading.Thread(target=watch, daemon=True).start()
    run_with_hub(hub, tmp_path / "out")
    stop.set()
    assert counts & {1, 2}
    assert counts <= {0, 1, 2}
    run_with_hub(hub, tmp_path / "kept", "--keep_parquet", "--remote_name", "")
    assert len(list(tmp_path.glob("kept/parquet_00000/sample/10BT/*.parquet"))) == 6
    assert contents(tmp_path / "kept", ".npy") == contents(tmp_path / "out", ".npy")
