"""prepare_shakespeare.py: text to token shards, the download, and mistakes."""

import hashlib
import http.server
import json
import os
import shlex
import threading

import numpy as np
import pytest
import tiktoken
import transformers
from conftest import SHARED, Run, assert_user_error, at_disk_change, call, load, names_in, run

TEXT = "Grüße, Raíz, 世界 🙂!\r\n\x00\ttabs\n\n<|endoftext|> " + "a" * 2500 + "\n" * 1200 + "end"
FILES = ["merges.txt", "meta.json", "out_train_000000.npy", "out_val_000000.npy", "vocab.json"]


@pytest.fixture
def flags(tmp_path, text_file):
    """Flags that make a data set of text_file in tmp_path / "out"."""
    return ["--input", text_file, "--out_dir", tmp_path / "out"]


def read_split(directory, split):
    """Return the tokens of the only shard of a split."""
    [path] = directory.glob(f"*_{split}_000000.npy")
    return np.load(path, allow_pickle=False)


def contents(directory):
    """Return the bytes and the time of the last change of every file below a directory, by path."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# --------------------------------------------------------------------------------------- shards
@pytest.mark.parametrize(("tokenizer", "val_fraction"), [("bytes", 0.5), ("gpt2", 0.3)])
def test_the_tokens_of_both_splits_decode_to_the_text(tmp_path, tiktoken_cache, tokenizer, val_fraction):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    flags = ["--input", tmp_path / "text.txt", "--out_dir", tmp_path / "out"]
    done = call("prepare_shakespeare", *flags, "--tokenizer", tokenizer, "--val_fraction", val_fraction)
    assert (done.returncode, done.stderr) == (0, "")
    end_of_text = {"bytes": 256, "gpt2": 50256}[tokenizer]
    parts = []
    for split in ("train", "val"):
        tokens = read_split(tmp_path / "out", split)
        assert tokens.dtype == np.dtype("<u2")
        # each part is one document; the text <|endoftext|> in it is text like any other
        assert tokens[0] == end_of_text
        assert end_of_text not in tokens[1:]
        if tokenizer == "bytes":
            parts.append(bytes(tokens[1:].tolist()).decode())
        else:
            encoding = tiktoken.get_encoding("gpt2")
            assert tokens[1:].tolist() == encoding.encode_ordinary(encoding.decode(tokens[1:].tolist()))
            parts.append(encoding.decode(tokens[1:].tolist()))
    assert "".join(parts) == TEXT
    assert len(parts[1]) == pytest.approx(val_fraction * len(TEXT), abs=1)


def test_meta_json_describes_the_shards(byte_shards):
    meta = json.loads((byte_shards / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot_token"]) == ("bytes", 257, 256)
    assert "excerpt.txt" in json.dumps(meta["source"])
    names = []
    for shard in meta["shards"]:
        path = byte_shards / shard["file"]
        names.append(path.name)
        assert shard["tokens"] == len(np.load(path, allow_pickle=False))
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert names_in(byte_shards) == sorted([*names, "meta.json", "vocab.json", "merges.txt"])


def test_shards_of_tiny_shakespeare_have_the_published_token_counts(tiny_shakespeare, tiktoken_cache, tmp_path):
    """nanoGPT's data/shakespeare has 301,966 and 36,059 tokens. Ours begin with one more."""
    flags = ["--input", tiny_shakespeare, "--out_dir", tmp_path / "tiny", "--tokenizer", "gpt2"]
    call("prepare_shakespeare", *flags)
    counts = [len(read_split(tmp_path / "tiny", split)) for split in ("train", "val")]
    assert counts == [301_966 + 1, 36_059 + 1]


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_transformers_builds_the_same_tokenizer_from_the_files(flags, name, tmp_path, tiktoken_cache):
    assert call("prepare_shakespeare", *flags, "--tokenizer", name).returncode == 0
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(tmp_path / "out")
    text = TEXT.replace("<|endoftext|>", "")  # transformers makes it a special token
    encode = {"bytes": str.encode, "gpt2": tiktoken.get_encoding("gpt2").encode_ordinary}[name]
    assert tokenizer.encode(text) == list(encode(text))
    assert tokenizer.encode("<|endoftext|>") == [{"bytes": 256, "gpt2": 50256}[name]]


def test_shards_are_named_after_the_directory(tmp_path, text_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out_dir, name in (("my data", "my_data"), (".hidden", "_hidden"), ("a/b/", "b")):
        assert call("prepare_shakespeare", "--input", text_file, "--out_dir", out_dir).returncode == 0
        assert f"{name}_train_000000.npy" in names_in(tmp_path / out_dir)


# ------------------------------------------------------------------------- existing directories
def test_a_second_run_changes_nothing(flags, tmp_path):
    call("prepare_shakespeare", *flags)
    before = contents(tmp_path)
    done = call("prepare_shakespeare", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(tmp_path) == before


def test_a_directory_with_other_files_is_refused_and_kept(flags, tmp_path, tiktoken_cache):
    call("prepare_shakespeare", *flags)
    (tmp_path / "other.txt").write_text("another text " * 100)

    def assert_refused(*others):
        before = contents(tmp_path)
        assert_user_error(call("prepare_shakespeare", *flags, *others), tmp_path / "out", "--out_dir")
        assert contents(tmp_path) == before

    assert_refused("--input", tmp_path / "other.txt")
    assert_refused("--val_fraction", 0.2)
    assert_refused("--tokenizer", "gpt2")
    (tmp_path / "out/meta.json").write_text("[]")
    assert_refused()
    (tmp_path / "out/meta.json").unlink()
    assert_refused()


# ----------------------------------------------------------------------------------- interruptions
@pytest.mark.skipif(os.name != "posix", reason="needs forks")
def test_a_data_set_is_complete_or_absent_whenever_the_script_dies(flags, tmp_path):
    for n in range(1, 100):

        def die(number, last=n):
            if number == last:
                os._exit(9)

        [done] = Run(*flags, script="prepare_shakespeare", before=at_disk_change(tmp_path, die)).wait()
        if done.returncode == 0:
            break
        assert done.returncode == 9
        assert not (tmp_path / "out").exists() or names_in(tmp_path / "out") == FILES
    assert n >= 8
    assert names_in(tmp_path / "out") == FILES


@pytest.mark.skipif(os.name != "posix", reason="needs forks and limits")
def test_a_full_disk_is_an_error_and_leaves_nothing(flags, tmp_path):
    """A limit on the size of files stands in for the full disk."""
    import resource  # Windows does not have it

    def limit_files(rank):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    [done] = Run(*flags, script="prepare_shakespeare", before=limit_files).wait()
    assert_user_error(done, tmp_path / "out", "--out_dir")
    assert names_in(tmp_path) == []


@pytest.mark.skipif(not (SHARED / "sim").is_dir(), reason="no ../shared/sim")
def test_windows_does_not_rename_over_a_directory_or_a_file_that_is_open(flags, tmp_path):
    (tmp_path / "out").mkdir()
    done = run("prepare_shakespeare", *flags, env={"PYTHONPATH": str(SHARED / "sim/win")})
    assert (done.returncode, done.stderr) == (0, "")
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == FILES


# -------------------------------------------------------------------------------------- download
@pytest.fixture
def download(tmp_path, monkeypatch):
    """Return run(status, body, length): run --download, with a server that answers this once.

    Only the text BODY has the right checksum.
    """
    answers = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, length = answers.pop()
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.chdir(tmp_path)
    module = load("prepare_shakespeare")
    module.TINY_SHAKESPEARE_URL = f"http://127.0.0.1:{server.server_port}/input.txt"
    module.TINY_SHAKESPEARE_SHA256 = hashlib.sha256(BODY).hexdigest()

    def run_download(*answer, flags=()):
        answers[:] = [answer]
        done = call(module, "--download", *flags)
        return done, len(answers) == 0  # whether the server was asked

    yield run_download
    server.shutdown()
    server.server_close()


BODY = b"First Citizen:\n" * 50
DOWNLOADED = "data/tinyshakespeare/input.txt"


def test_download_fetches_the_text_once_and_makes_shards(download, tmp_path):
    done, was_asked = download(200, BODY, len(BODY))
    assert (done.returncode, was_asked) == (0, True), done.stderr
    assert (tmp_path / DOWNLOADED).read_bytes() == BODY
    assert bytes(read_split(tmp_path / "shakespeare", "train")[1:].tolist()) == BODY[:675]
    done, was_asked = download(200, BODY, len(BODY), flags=["--out_dir", "second"])
    assert (done.returncode, was_asked) == (0, False), done.stderr
    assert (tmp_path / "second/meta.json").exists()


@pytest.mark.parametrize(
    "answer",
    [(200, BODY + b"?", len(BODY) + 1), (404, BODY, len(BODY)), (200, BODY, 2 * len(BODY))],
    ids=["another text", "an error page", "half of it"],
)
def test_a_failed_download_is_an_error_and_keeps_the_file_that_was_there(download, tmp_path, answer):
    path = tmp_path / DOWNLOADED
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY[:100])
    done, _ = download(*answer)
    assert_user_error(done, "http://127.0.0.1", DOWNLOADED, "--input")
    assert names_in(tmp_path) == ["data"]
    assert names_in(path.parent) == ["input.txt"]
    assert path.read_bytes() == BODY[:100]
    # a complete download replaces the damaged file
    done, was_asked = download(200, BODY, len(BODY))
    assert (done.returncode, was_asked) == (0, True), done.stderr
    assert path.read_bytes() == BODY


def test_download_has_the_checksum_of_tiny_shakespeare(tiny_shakespeare):
    sha256 = hashlib.sha256(tiny_shakespeare.read_bytes()).hexdigest()
    assert sha256 == load("prepare_shakespeare").TINY_SHAKESPEARE_SHA256


# -------------------------------------------------------------------------------------- mistakes
# test_errors.py has the mistakes of all scripts; here are those that only this one has
MISTAKES = [  # flags, words of the one line on stderr
    ("--input folder", ["folder", "--input"]),
    ("--input texts.jsonl", ["texts.jsonl", "fineweb.py"]),
    ("--input texts.parquet", ["texts.parquet", "fineweb.py"]),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES, ids=[flags for flags, _ in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_written(flags, words, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    for name in ("texts.jsonl", "texts.parquet", "text.txt"):
        (tmp_path / name).write_text("a text " * 100)
    monkeypatch.chdir(tmp_path)
    before = names_in(tmp_path)
    assert_user_error(call("prepare_shakespeare", *shlex.split(flags)), *words)
    assert names_in(tmp_path) == before
