"""fineweb.py: exact tokens, interruptions at any moment, damaged files, and a Hub that misbehaves.

Expected tokens come from tiktoken, or from the bytes of the texts, one document at a time. One
promise is tested again and again: whatever happens to a run, the same command ends with the bytes
of an undisturbed run. RANDOM_KILLS=20 repeats the test with random SIGKILLs 20 times.
"""

import glob
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import threading
import time

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import (
    SHARED,
    Run,
    assert_user_error,
    at_disk_change,
    call,
    flip_bit,
    limit_files,
    run,
    truncate,
    wait_until,
    write_bin,
)

END_OF_TEXT = 256  # of the tokenizer bytes
BYTES = ["--tokenizer", "bytes", "--workers", 2]
SHARD_SIZE = 20011  # tokens per shard of the data set that most tests make

has_simulations = pytest.mark.skipif(not (SHARED / "sim").is_dir(), reason="no ../shared/sim")


# ------------------------------------------------------------------------------------ documents
def make_texts(seed, number):
    """Return documents of many sizes: some None or empty, some with the text <|endoftext|>."""
    generator = random.Random(seed)
    words = ["the", "of", "naïve", "東京", "<|endoftext|>", "\n\n", "x" * 50, "🙂"]
    texts = []
    for i in range(number):
        text = " ".join(generator.choice(words) for _ in range(i % 97))
        texts.append(generator.choice([text] * 8 + [None, ""]))
    return texts


def write_parquet(path, texts, kind=None, **options):
    """Write a parquet file with the columns id and text, in row groups of 100."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, kind or pa.string())})
    pq.write_table(table, path, row_group_size=100, **options)


def write_json_lines(path, texts):
    """Write JSON lines, compressed as the name says, with fields that differ from line to line."""
    with pa.output_stream(path, compression="detect") as file:
        for i, text in enumerate(texts):
            line = {"text": text, "id": str(i) if i % 2 else i, "meta": {"tags": ["a"]}}
            file.write(json.dumps(line).encode() + b"\n")


def reference(texts, encode=str.encode, end_of_text=END_OF_TEXT):
    """Return all tokens in order, computed one document at a time."""
    tokens = []
    for text in texts:
        if text:
            tokens += [end_of_text, *encode(text)]
    return tokens


def contents(directory, ending=""):
    """Return {name: bytes} of the files in a directory whose names have this ending."""
    paths = [path for path in directory.iterdir() if path.name.endswith(ending)]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def read_shards(directory, shard_size, name="shard"):
    """Check the files of a finished directory. Returns the tokens of all shards in order."""
    meta = json.loads((directory / "meta.json").read_text())
    names = [shard["file"] for shard in meta["shards"]]
    assert sorted(os.listdir(directory)) == sorted([*names, "meta.json", "vocab.json", "merges.txt"])
    tokens = []
    for i, shard in enumerate(meta["shards"]):
        split = "train" if i else "val"
        assert shard["split"] == split
        assert shard["file"] == f"{name}_{split}_{i:06d}.npy"
        path = directory / shard["file"]
        array = np.load(path, allow_pickle=False)
        assert array.dtype == np.dtype("<u2")
        assert array.shape == (shard["tokens"],)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        is_last = i + 1 == len(names)
        assert len(array) == shard_size or (is_last and len(array) < shard_size)
        tokens += array.tolist()
    return tokens


# ----------------------------------------------------------------------------------------- runs
def succeed(*flags):
    """Run fineweb.py in this process to its end. Returns what it prints."""
    done = call("fineweb", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def run_forked(*flags, before):
    """Run fineweb.py in a forked process in which before(0) injects a fault."""
    [done] = Run(*flags, script="fineweb", before=before).wait()
    return done


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three parquet files (the second has no rows), and the shards of an undisturbed run."""
    folder = tmp_path_factory.mktemp("data")
    parts = [make_texts(1, 700), [], make_texts(2, 400)]
    paths = [folder / "in" / name for name in ("000.parquet", "001[empty].parquet", "002.parquet")]
    for path, texts in zip(paths, parts, strict=True):
        write_parquet(path, texts)
    flags = [*BYTES, "--source", *paths, "--shard_size", SHARD_SIZE]
    printed = succeed(*flags, "--local_dir", folder / "out")
    return {
        "folder": folder,
        "paths": paths,
        "flags": flags,
        "texts": parts[0] + parts[2],
        "files": contents(folder / "out"),
        "shards": contents(folder / "out", ".npy"),
        "printed": printed,
    }


@pytest.fixture
def unfinished(data, tmp_path):
    """A directory in which a run ended after several shards, at a file that is not parquet, and its flags."""
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"not parquet")
    directory = tmp_path / "out"
    flags = [*BYTES, "--source", data["paths"][0], bad, "--local_dir", directory, "--shard_size", 15000]
    assert_user_error(call("fineweb", *flags), bad)
    assert len(list(directory.glob("*.npy"))) >= 3
    return directory, flags


# --------------------------------------------------------------------------------- exact tokens
def at_the_same_time(n, function):
    """Return function, but each of its first n calls waits until all n have begun. That takes n threads.

    Fails after 10 seconds.
    """
    all_calls = threading.Barrier(n)
    numbers = itertools.count()

    def wait_and_call(*args, **options):
        if next(numbers) < n:
            all_calls.wait(10)
        return function(*args, **options)

    return wait_and_call


def test_tokens_equal_the_reference_for_any_number_of_workers(data, tmp_path, monkeypatch):
    expected = reference(data["texts"])
    assert len(expected) % SHARD_SIZE  # the last shard is shorter
    assert read_shards(data["folder"] / "out", SHARD_SIZE) == expected
    assert f"{len(expected):,}" in data["printed"]
    # a pattern instead of paths, and other numbers of threads
    source = ["--source", f"{data['folder']}/in/*.parquet"]
    encode = tiktoken.Encoding.encode_to_numpy
    for workers in (1, 5):
        monkeypatch.setattr(tiktoken.Encoding, "encode_to_numpy", at_the_same_time(workers, encode))
        directory = tmp_path / str(workers)
        succeed(*data["flags"], *source, "--local_dir", directory, "--workers", workers)
        assert contents(directory) == data["files"]


def test_a_shard_may_end_at_the_end_of_a_batch(data, tmp_path):
    """fineweb.py tokenizes 64 documents at once."""
    shard_size = len(reference(data["texts"][:64]))
    succeed(*data["flags"], "--shard_size", shard_size, "--local_dir", tmp_path / "out")
    assert read_shards(tmp_path / "out", shard_size) == reference(data["texts"])


def test_gpt2_tokens_equal_encode_ordinary_up_to_the_limit(data, tmp_path, tiktoken_cache):
    enc = tiktoken.get_encoding("gpt2")
    expected = reference(data["texts"], enc.encode_ordinary, enc.eot_token)
    flags = ["--source", *data["paths"], "--shard_size", 1000, "--local_dir", tmp_path / "out"]
    succeed(*flags, "--max_tokens", 5555)
    assert read_shards(tmp_path / "out", 1000) == expected[:5555]
    # the file from which transformers builds the tokenizer
    vocab = json.loads((tmp_path / "out/vocab.json").read_text(encoding="utf-8"))
    assert vocab["Hello"] == enc.encode_ordinary("Hello")[0]


def random_text(generator, symbols):
    """Return a text of up to 60 symbols; every tenth one is any character of Unicode."""
    text = []
    for _ in range(generator.randrange(60)):
        if generator.random() < 0.1:
            ranges = [(0x20, 0xD800), (0xE000, 0x110000)]
            text.append(chr(generator.randrange(*generator.choice(ranges))))
        else:
            text.append(generator.choice(symbols))
    return "".join(text)


def difficult_texts():
    """Return texts full of whitespace and other characters that GPT-2's pattern treats specially."""
    # Python's isspace() is true for the 25 characters that \s matches, and for four others
    spaces = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    texts = [f"a {space}{space}b{space}c" for space in spaces]
    # all strings of up to four of ten characters that matter
    for length in range(5):
        texts += ["".join(part) for part in itertools.product(" \n\xa0a1!'s\x1c", repeat=length)]
    # random texts of many or of few symbols
    symbols = ["\r\n", *"\x1c\x1d\x1e\x1f\x7f\u200b\u180e\ufeff\ufffd", "<|endoftext|>", "’"]
    symbols += [*"aBéßЖ中のا1٣½Ⅷ!?_-<'", " of", "े", "\u0301", "🙂", "👨‍👩‍👧", "'s", "'ll", "'S"]
    symbols += spaces + 12 * [" "] + 6 * ["\n"]
    generator = random.Random(0)
    for _ in range(100):
        few = [*generator.sample(symbols, 4), " "]
        chosen = generator.choice([symbols, few])
        texts += [random_text(generator, chosen) for _ in range(100)]
    return texts


@pytest.mark.parametrize("placeholders", ["", "\x00\x01"])
def test_difficult_texts_have_the_tokens_of_encode_ordinary(tmp_path, tiktoken_cache, placeholders):
    """fineweb.py itself uses the characters 0 and 1 as placeholders."""
    texts = difficult_texts()
    if placeholders:
        generator = random.Random(1)
        texts = [text + generator.choice(["", *placeholders]) + text[::-1] for text in texts[::5]]
    write_parquet(tmp_path / "in.parquet", texts)
    flags = ["--source", tmp_path / "in.parquet", "--local_dir", tmp_path / "out"]
    succeed(*flags, "--shard_size", 10_000)
    enc = tiktoken.get_encoding("gpt2")
    expected = reference(texts, enc.encode_ordinary, enc.eot_token)
    assert read_shards(tmp_path / "out", 10_000) == expected


def test_a_million_spaces_are_tokenized(tmp_path, tiktoken_cache):
    """tiktoken itself fails here, because looking ahead exceeds a limit of its pattern matching."""
    text = " " * 10**6 + "x"
    write_parquet(tmp_path / "in.parquet", [text])
    flags = ["--source", tmp_path / "in.parquet", "--local_dir", tmp_path / "out"]
    succeed(*flags, "--shard_size", 30_000)
    enc = tiktoken.get_encoding("gpt2")
    tokens = read_shards(tmp_path / "out", 30_000)
    assert tokens[0] == enc.eot_token
    assert enc.decode(tokens[1:]) == text
    assert tokens[-1] == enc.encode_ordinary(" x")[0]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view()], ids=str)
def test_text_columns_of_every_type_give_the_same_tokens(data, tmp_path, kind):
    path = tmp_path / "in.parquet"
    write_parquet(path, data["texts"], kind)
    assert pq.ParquetFile(path).schema_arrow.field("text").type == kind
    succeed(*data["flags"], "--source", path, "--local_dir", tmp_path / "out")
    assert contents(tmp_path / "out", ".npy") == data["shards"]


def test_json_lines_give_the_tokens_of_their_texts(data, tmp_path):
    texts = [*data["texts"], "a long document " * 200_000]
    parts = {"jsonl": texts[:400], "jsonl.gz": texts[400:800], "jsonl.zst": texts[800:]}
    paths = [tmp_path / f"{i}.{ending}" for i, ending in enumerate(parts)]
    for path, part in zip(paths, parts.values(), strict=True):
        write_json_lines(path, part)
    flags = [*BYTES, "--source", *paths, "--shard_size", 100_003]
    succeed(*flags, "--local_dir", tmp_path / "out")
    assert read_shards(tmp_path / "out", 100_003) == reference(texts)


# ----------------------------------------------------------------------------------- small data
@pytest.mark.parametrize("extra, max_tokens", [(0, 0), (1, 0), (1, 50_000)])
def test_the_last_tenth_of_small_data_is_for_validation(data, tmp_path, extra, max_tokens):
    """The shard size is the number of tokens, or one more, so that all fit into one shard."""
    expected = reference(data["texts"])
    flags = [*BYTES, "--source", *data["paths"], "--shard_size", len(expected) + extra]
    flags += ["--max_tokens", max_tokens]
    expected = expected[: max_tokens or None]
    printed = succeed(*flags, "--local_dir", tmp_path / "out")
    val = np.load(tmp_path / "out/shard_val_000000.npy").tolist()
    train = np.load(tmp_path / "out/shard_train_000001.npy").tolist()
    assert train + val == expected
    assert val[0] == END_OF_TEXT
    # validation begins with the first document of the last tenth
    longest = max(len((text or "").encode()) for text in data["texts"])
    assert 0.1 * len(expected) - longest - 1 <= len(val) <= 0.1 * len(expected)
    assert f"{len(val):,}" in printed
    # the same command again, and --verify, accept the directory
    before = contents(tmp_path / "out")
    succeed(*flags, "--local_dir", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    succeed("--verify", tmp_path / "out")


@pytest.mark.parametrize("texts", [["a", "b" * 1000], ["a" * 1000, "b"]])
def test_small_data_have_at_least_one_document_for_validation(tmp_path, texts):
    write_json_lines(tmp_path / "in.jsonl", texts)
    succeed(*BYTES, "--source", tmp_path / "in.jsonl", "--local_dir", tmp_path / "out")
    shards = [np.load(tmp_path / "out" / name) for name in ("shard_train_000001.npy", "shard_val_000000.npy")]
    assert [shard.tolist() for shard in shards] == [reference([text]) for text in texts]


# -------------------------------------------------------------------------------- interruptions
@pytest.mark.parametrize("seed", range(int(os.environ.get("RANDOM_KILLS", "1"))))
def test_a_run_killed_at_random_moments_continues_to_the_same_shards(data, tmp_path, seed):
    """Kill the run four times, each time a random while after some more shards. Then let it end."""
    flags = [*BYTES, "--shard_size", 15013, "--source", *8 * [data["paths"][0]]]
    succeed(*flags, "--local_dir", tmp_path / "whole")
    num_shards = len(list(tmp_path.glob("whole/*.npy")))
    generator = random.Random(seed)
    directory = tmp_path / "out"
    shards = 0
    for _ in range(4):
        run = Run(*flags, "--local_dir", directory, script="fineweb")
        shards += generator.randrange(num_shards // 4)
        wait_until(lambda goal=shards: len(list(directory.glob("*.npy"))) >= goal)
        time.sleep(generator.uniform(0, 0.03))
        run.processes[0].kill()
        assert run.wait()[0].returncode in (0, -signal.SIGKILL)
    succeed(*flags, "--local_dir", directory)
    assert contents(directory) == contents(tmp_path / "whole")


@pytest.mark.parametrize("num_shards", [3, 1])
def test_a_run_may_die_between_any_two_changes_of_the_disk(data, tmp_path, num_shards):
    """If all tokens fit into one shard, both shards are written at the end.

    One run copies its directory before each change. A run that dies there leaves the same files.
    """
    paths = [tmp_path / "0.parquet", tmp_path / "1.jsonl"]
    write_parquet(paths[0], data["texts"][:500])
    write_json_lines(paths[1], data["texts"][500:])
    shard_size = len(reference(data["texts"])) // num_shards + 1
    flags = [*BYTES, "--source", *paths, "--shard_size", shard_size]
    whole = tmp_path / "whole"

    def copy_directory(number):
        if whole.exists():
            shutil.copytree(whole, tmp_path / f"died_{number}")

    done = run_forked(*flags, "--local_dir", whole, before=at_disk_change(whole, copy_directory))
    assert done.returncode == 0
    copies = list(tmp_path.glob("died_*"))
    assert len(copies) >= 10
    for directory in copies:
        succeed(*flags, "--local_dir", directory)
        assert contents(directory) == contents(whole), directory


def test_ctrl_c_ends_the_run_at_once_and_it_continues(data, tmp_path):
    directory = tmp_path / "out"

    def press_ctrl_c(number):
        if number == 20:  # after several shards
            signal.raise_signal(signal.SIGINT)

    flags = [*data["flags"], "--local_dir", directory]
    done = run_forked(*flags, before=at_disk_change(directory, press_ctrl_c))
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    assert 2 <= len(list(directory.glob("*.npy"))) < len(data["shards"])
    succeed(*flags)
    assert contents(directory) == data["files"]


def test_a_full_disk_is_one_line_and_the_run_continues(data, tmp_path):
    flags = [*BYTES, "--source", *data["paths"], "--shard_size", 60_000]
    flags += ["--local_dir", tmp_path / "out"]
    assert_user_error(run_forked(*flags, before=lambda rank: limit_files(80_000)))
    succeed(*flags)
    assert read_shards(tmp_path / "out", 60_000) == reference(data["texts"])


def test_a_damaged_parquet_file_is_named_and_finished_shards_stay(data, unfinished):
    directory, flags = unfinished
    times = {path: path.stat().st_mtime_ns for path in directory.glob("*.npy")}
    assert_user_error(call("fineweb", *flags), "bad.parquet")
    assert {path: path.stat().st_mtime_ns for path in directory.glob("*.npy")} == times


# ------------------------------------------------------------------------------------- mistakes
def test_other_settings_and_files_are_refused(data, tmp_path, tiktoken_cache):
    directory = tmp_path / "out"
    shutil.copytree(data["folder"] / "out", directory)
    flags = [*data["flags"], "--local_dir", directory]
    changes = [
        ("shard_size", SHARD_SIZE, 20012),
        ("max_tokens", 0, 50_000),
        ("text_column", "text", "id"),
        ("tokenizer", "bytes", "gpt2"),
    ]
    for name, old, new in changes:
        assert_user_error(call("fineweb", *flags, f"--{name}", new), directory, name, old, new)
    assert_user_error(call("fineweb", *flags, "--source", data["paths"][0]), directory)
    succeed(*flags)
    assert contents(directory) == data["files"]


@pytest.mark.parametrize("finished", [False, True])
def test_one_changed_bit_of_a_local_file_is_noticed(data, tmp_path, finished):
    path, broken = tmp_path / "in.parquet", tmp_path / "broken.parquet"
    write_parquet(path, data["texts"], compression="none", use_dictionary=False)
    broken.write_bytes(b"not parquet")
    source = [path] if finished else [path, broken]
    flags = [*data["flags"], "--source", *source, "--local_dir", tmp_path / "out"]
    call("fineweb", *flags)
    before = contents(tmp_path / "out")
    assert len(before) > 3 and ("meta.json" in before) == finished
    flip_bit(path)  # of a page: the file remains a valid parquet file
    assert reference(pq.read_table(path)["text"].to_pylist()) != reference(data["texts"])
    assert_user_error(call("fineweb", *flags), tmp_path / "out", "in.parquet")
    assert contents(tmp_path / "out") == before


def test_a_directory_with_other_shards_is_refused(data, tmp_path):
    (tmp_path / "mine_train_000000.npy").write_bytes(b"mine")
    assert_user_error(call("fineweb", *data["flags"], "--local_dir", tmp_path), tmp_path)
    assert contents(tmp_path) == {"mine_train_000000.npy": b"mine"}


@pytest.mark.parametrize("name", ["state_00000.json", "meta.json"])
def test_a_damaged_state_or_meta_json_is_one_line(unfinished, name):
    directory, flags = unfinished
    for damage in ("", '{"settings": {}}'):
        (directory / name).write_text(damage)
        before = contents(directory)
        assert_user_error(call("fineweb", *flags), directory)
        assert contents(directory) == before


def test_a_directory_in_use_is_refused(data, tmp_path):
    directory = tmp_path / "out"

    def hang(number):
        if number == 20:
            time.sleep(1000)

    flags = [*data["flags"], "--local_dir", directory]
    run = Run(*flags, script="fineweb", before=at_disk_change(directory, hang))
    wait_until(lambda: list(directory.glob("*.npy")))
    done = call("fineweb", *flags)
    run.processes[0].kill()
    assert_user_error(done, directory)


@has_simulations
@pytest.mark.parametrize("simulation", ["win", "noflock"])
def test_windows_and_file_systems_without_locks(data, tmp_path, simulation):
    """The simulated Windows has few signals, and refuses to delete or rename files that are open."""
    simulated = {"PYTHONPATH": str(SHARED / "sim" / simulation), "PYTHONWARNINGS": "ignore"}
    flags = [*data["flags"], "--local_dir", tmp_path / "out", "--max_tokens", 50_000]
    done = run("fineweb", *flags, env=simulated)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == done.stderr.count("warning: ") <= 1
    if simulation == "noflock":
        assert str(tmp_path / "out") in done.stderr
    assert read_shards(tmp_path / "out", SHARD_SIZE) == reference(data["texts"])[:50_000]


# ------------------------------------------------------------------------------------ verifying
def test_verify_counts_tokens_and_documents(data):
    printed = succeed("--verify", data["folder"] / "out")
    expected = reference(data["texts"])
    validation, training = expected[:SHARD_SIZE], expected[SHARD_SIZE:]
    for name, tokens in (("val", validation), ("train", training)):
        [line] = [line for line in printed.splitlines() if line.startswith(f"{name}: ")]
        assert f"{len(tokens):,} tokens, {tokens.count(END_OF_TEXT):,} documents" in line
    beginning = "".join("<|endoftext|>" + text for text in data["texts"] if text)
    assert repr(beginning[:20])[1:-1] in printed


def test_verify_names_every_damaged_shard(data, tmp_path):
    directory = tmp_path / "out"
    shutil.copytree(data["folder"] / "out", directory)
    val, *train = sorted(data["shards"], key=lambda name: name[-10:])
    # other tokens, with the same length and without an id beyond the vocabulary
    np.save(directory / train[0], np.load(directory / train[0])[::-1])
    truncate(directory / train[1])
    (directory / val).unlink()
    assert_user_error(call("fineweb", "--verify", directory), val, *train[:2])


def test_verify_refuses_an_unfinished_directory(unfinished):
    directory, _ = unfinished
    assert_user_error(call("fineweb", "--verify", directory), directory)


def test_verify_reads_shards_of_other_projects(tmp_path, tiktoken_cache):
    tokens = np.array([50256, 15496, 995, 50256, 15496], "<u2")  # <|endoftext|>Hello world ...
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy/edufineweb_val_000000.npy", tokens)
    np.save(tmp_path / "npy/edufineweb_train_000001.npy", tokens[:3])
    (tmp_path / "npy/._edufineweb_train_000001.npy").write_bytes(b"macOS")
    printed = succeed("--verify", tmp_path / "npy")
    assert "val: 1 shards, 5 tokens, 2 documents" in printed
    assert "train: 1 shards, 3 tokens, 1 documents" in printed
    assert "Hello world" in printed
    # llm.c's shards; the name of the second one has no number
    (tmp_path / "bin").mkdir()
    write_bin(tmp_path / "bin/fineweb_train_000001.bin", tokens)
    write_bin(tmp_path / "bin/tiny_shakespeare_val.bin", tokens[:3])
    printed = succeed("--verify", tmp_path / "bin")
    assert "train: 1 shards, 5 tokens, 2 documents" in printed
    assert "val: 1 shards, 3 tokens, 1 documents" in printed
    # a token id that GPT-2 does not have
    shard = tmp_path / "bin/fineweb_train_000001.bin"
    write_bin(shard, [65535])
    assert_user_error(call("fineweb", "--verify", tmp_path / "bin"), shard.name)


def test_verify_prints_any_text_on_an_ascii_terminal(tmp_path):
    text = "東京 🙂 naïve"
    write_parquet(tmp_path / "in.parquet", [text, text])
    flags = [*BYTES, "--source", tmp_path / "in.parquet", "--local_dir", tmp_path / "out"]
    succeed(*flags, "--shard_size", 1 + len(text.encode()))  # each document is a shard
    done = run("fineweb", "--verify", tmp_path / "out", env={"PYTHONIOENCODING": "ascii"})
    assert "na?ve" in done.stdout and "1 documents" in done.stdout


# ---------------------------------------------------------------------- a Hub on this machine
@pytest.fixture
def texts_hub(hub, data):
    """The Hub with the parquet files of the fixture data in the folder of sample-10BT."""
    files = {"README.md": b"hello"}
    for i, path in enumerate(data["paths"]):
        files[f"sample/10BT/{i:03d}.parquet"] = path.read_bytes()
    hub.files["me/texts"] = files
    return hub


HUB_FLAGS = [*BYTES, "--repo_id", "me/texts", "--shard_size", SHARD_SIZE, "--local_dir"]


@pytest.fixture
def impatient(monkeypatch):
    """Skip the pauses between attempts."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_short_failures_of_the_hub_are_retried(texts_hub, data, tmp_path, impatient):
    troubles = [429, "drop", "truncated", "damaged", "damaged"]
    texts_hub.trouble = [("HEAD", 503), *[("GET /datasets", trouble) for trouble in troubles]]
    succeed(*HUB_FLAGS, tmp_path / "out")
    assert not texts_hub.trouble
    assert read_shards(tmp_path / "out", SHARD_SIZE) == reference(data["texts"])
    # a finished directory does not ask the Hub
    texts_hub.log.clear()
    succeed(*HUB_FLAGS, tmp_path / "out")
    assert not texts_hub.log


def test_a_hub_that_stays_away_is_one_line_and_the_run_continues(texts_hub, data, tmp_path, impatient):
    texts_hub.trouble = 99 * [("002", 503)]
    assert_user_error(call("fineweb", *HUB_FLAGS, tmp_path / "out"), "002.parquet")
    texts_hub.trouble.clear()
    texts_hub.log.clear()
    succeed(*HUB_FLAGS, tmp_path / "out")
    assert read_shards(tmp_path / "out", SHARD_SIZE) == reference(data["texts"])
    # a file that is here already is not downloaded again
    assert not any("000.parquet" in request for request in texts_hub.log)


def test_a_file_that_the_hub_refuses_is_asked_for_once(texts_hub, tmp_path, impatient):
    """Waiting does not help if a file is missing or gated. Here, a second request would find it."""
    texts_hub.trouble = [("002", "missing")]
    assert_user_error(call("fineweb", *HUB_FLAGS, tmp_path / "out"), "002.parquet")
    assert sum("002.parquet" in request for request in texts_hub.log) == 1


def test_a_run_killed_during_a_download_continues(texts_hub, data, tmp_path):
    texts_hub.trouble = 99 * [("002", "hang")]
    run = Run(*HUB_FLAGS, tmp_path / "out", script="fineweb")
    wait_until(lambda: any("002.parquet" in request for request in texts_hub.log))
    run.processes[0].kill()
    run.wait()
    texts_hub.trouble.clear()
    # a download that is damaged meanwhile is noticed
    [downloaded] = (tmp_path / "out").rglob("000.parquet")
    flip_bit(downloaded)
    texts_hub.log.clear()
    succeed(*HUB_FLAGS, tmp_path / "out")
    assert any("000.parquet" in request for request in texts_hub.log)
    assert read_shards(tmp_path / "out", SHARD_SIZE) == reference(data["texts"])


def test_shards_of_fineweb_edu_have_its_name(texts_hub, data, tmp_path):
    texts_hub.files["HuggingFaceFW/fineweb-edu"] = texts_hub.files["me/texts"]
    succeed(*BYTES, "--shard_size", SHARD_SIZE, "--local_dir", tmp_path / "out")
    tokens = read_shards(tmp_path / "out", SHARD_SIZE, name="edufineweb")
    assert tokens == reference(data["texts"])


def test_a_data_set_that_cannot_be_found_is_one_line(texts_hub, tmp_path, monkeypatch):
    flags = [*HUB_FLAGS, tmp_path / "out"]
    assert_user_error(call("fineweb", *flags, "--repo_id", "me/nothing"), "me/nothing")
    done = call("fineweb", *flags, "--remote_name", "sample-350BT")
    assert_user_error(done, "me/texts", "sample-350BT", "--remote_name")
    # no network
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert_user_error(call("fineweb", *flags), "me/texts", "--source")


def test_a_download_that_hangs_does_not_keep_a_failed_run_alive(texts_hub, tmp_path):
    # The first file is damaged near its end. It is long, so that the download of the next one
    # begins before the run reaches the damage.
    write_parquet(tmp_path / "long.parquet", make_texts(1, 10_000))
    content = (tmp_path / "long.parquet").read_bytes()
    damage = len(content) * 9 // 10
    damaged = content[:damage] + bytes(5000) + content[damage + 5000 :]
    texts_hub.files["me/texts"]["sample/10BT/000.parquet"] = damaged
    texts_hub.trouble = 99 * [("001", "hang")]
    started = time.perf_counter()
    [done] = Run(*HUB_FLAGS, tmp_path / "out", "--shard_size", 50_000, script="fineweb").wait()
    assert_user_error(done, "000.parquet")
    # only one file is downloaded in advance
    assert any("001.parquet" in request for request in texts_hub.log)
    assert not any("002.parquet" in request for request in texts_hub.log)
    assert time.perf_counter() - started < 20


def test_few_downloads_are_on_the_disk(texts_hub, data, tmp_path, monkeypatch):
    """The file being tokenized, the next one, and the one before if a shard still needs it."""
    body = data["paths"][2].read_bytes()
    texts_hub.files["me/texts"] = {f"sample/10BT/{i:03d}.parquet": body for i in range(8)}
    counts = []
    download = huggingface_hub.hf_hub_download

    def download_and_count(*args, **options):
        path = download(*args, **options)
        counts.append(len(glob.glob(f"{tmp_path}/out/*/sample/10BT/*.parquet")))
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download_and_count)
    succeed(*HUB_FLAGS, tmp_path / "out")
    assert 1 <= max(counts) <= 3
    assert read_shards(tmp_path / "out", SHARD_SIZE) == 8 * reference(make_texts(2, 400))
