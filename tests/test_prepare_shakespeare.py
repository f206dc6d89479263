"""prepare_shakespeare.py: text to token shards, interruptions, and the download."""

import hashlib
import json
import os
from functools import partial

import numpy as np
import pytest
import tiktoken
import transformers
from conftest import (
    COMMIT,
    SHARED,
    Run,
    assert_user_error,
    at_disk_change,
    call,
    limit_files,
    load,
    names_in,
    run,
    succeed,
)

TEXT = "Grüße, Raíz, 世界 🙂!\r\n\x00\ttabs\n\n<|endoftext|> " + "a" * 2500 + "\n" * 1200 + "ending"
FILES = ["merges.txt", "meta.json", "out_train_000000.npy", "out_val_000000.npy", "vocab.json"]


@pytest.fixture
def flags(tmp_path, text_file):
    """Flags that make a data set of text_file in tmp_path / "out"."""
    return ["--input", text_file, "--out_dir", tmp_path / "out"]


def read_split(directory, split):
    """Return the tokens of the only shard of a split."""
    [path] = directory.glob(f"*_{split}_000000.npy")
    return np.load(path, allow_pickle=False)


def tokenizer_of(name):
    """Return (function that encodes a text, end-of-text token) of a tokenizer."""
    if name == "bytes":
        return str.encode, 256
    encoding = tiktoken.get_encoding("gpt2")
    return encoding.encode_ordinary, encoding.eot_token


def contents(directory):
    """Return the bytes and the time of the last change of every file below a directory, by path."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# --------------------------------------------------------------------------------------- shards
@pytest.mark.parametrize(("tokenizer", "val_fraction"), [("bytes", 0.5), ("gpt2", 0.25)])
def test_each_split_is_a_part_of_the_text(tmp_path, tiktoken_cache, tokenizer, val_fraction):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    flags = ["--input", tmp_path / "text.txt", "--out_dir", tmp_path / "out"]
    done = call("prepare_shakespeare", *flags, "--tokenizer", tokenizer, "--val_fraction", val_fraction)
    assert (done.returncode, done.stderr) == (0, "")
    encode, end_of_text = tokenizer_of(tokenizer)
    n = int((1 - val_fraction) * len(TEXT))
    for split, text in (("train", TEXT[:n]), ("val", TEXT[n:])):
        tokens = read_split(tmp_path / "out", split)
        assert tokens.dtype == np.dtype("<u2")
        # each part is one document; the text <|endoftext|> in it is text like any other
        assert tokens.tolist() == [end_of_text, *encode(text)]


def test_meta_json_describes_the_shards(byte_shards):
    meta = json.loads((byte_shards / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot_token"]) == ("bytes", 257, 256)
    assert "excerpt.txt" in json.dumps(meta["source"])
    assert [shard["file"] for shard in meta["shards"]] == ["excerpt_train_000000.npy", "excerpt_val_000000.npy"]
    for shard in meta["shards"]:
        path = byte_shards / shard["file"]
        assert shard["tokens"] == len(np.load(path, allow_pickle=False))
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_shards_of_tiny_shakespeare_have_the_published_token_counts(tiny_shakespeare, tiktoken_cache, tmp_path):
    """nanoGPT's data/shakespeare has 301,966 and 36,059 tokens. Ours begin with one more."""
    flags = ["--input", tiny_shakespeare, "--out_dir", tmp_path / "tiny", "--tokenizer", "gpt2"]
    call("prepare_shakespeare", *flags)
    counts = [len(read_split(tmp_path / "tiny", split)) for split in ("train", "val")]
    assert counts == [301_966 + 1, 36_059 + 1]


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_transformers_builds_the_same_tokenizer_from_the_files(flags, name, tmp_path, tiktoken_cache):
    succeed("prepare_shakespeare", *flags, "--tokenizer", name)
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(tmp_path / "out")
    text = TEXT.replace("<|endoftext|>", "")  # transformers makes it a special token
    encode, end_of_text = tokenizer_of(name)
    assert tokenizer.encode(text) == list(encode(text))
    assert tokenizer.encode("<|endoftext|>") == [end_of_text]


def test_shards_are_named_after_the_directory(tmp_path, text_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out_dir, name in (("my data", "my_data"), (".hidden", "_hidden"), ("a/b/", "b")):
        succeed("prepare_shakespeare", "--input", text_file, "--out_dir", out_dir)
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


def test_a_full_disk_is_an_error_and_leaves_nothing(flags, tmp_path):
    [done] = Run(*flags, script="prepare_shakespeare", before=lambda rank: limit_files(10_000)).wait()
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
BODY = b"First Citizen:\n" * 50
DOWNLOADED = "data/tinyshakespeare/input.txt"


@pytest.fixture
def download(hub, tmp_path, monkeypatch):
    """Return a function that runs --download with flags. The server has the text BODY."""
    monkeypatch.chdir(tmp_path)
    hub.files["me/texts"] = {"input.txt": BODY}
    module = load("prepare_shakespeare")
    module.TINY_SHAKESPEARE_URL = f"{hub.url}/me/texts/resolve/{COMMIT}/input.txt"
    module.TINY_SHAKESPEARE_SHA256 = hashlib.sha256(BODY).hexdigest()
    return partial(call, module, "--download")


def test_download_fetches_the_text_once_and_makes_shards(hub, download, tmp_path):
    done = download()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / DOWNLOADED).read_bytes() == BODY
    assert bytes(read_split(tmp_path / "shakespeare", "train")[1:].tolist()) == BODY[:675]
    done = download("--out_dir", "second")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "second/meta.json").exists()
    assert len(hub.log) == 1


@pytest.mark.parametrize("trouble", ["damaged", "drop", 404])
def test_a_failed_download_is_an_error_and_keeps_the_file_that_was_there(trouble, hub, download, tmp_path):
    path = tmp_path / DOWNLOADED
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY[:100])
    hub.trouble = [("GET", trouble)]
    assert_user_error(download(), hub.url, DOWNLOADED, "--input", 404 if trouble == 404 else "")
    assert names_in(tmp_path) == ["data"]
    assert names_in(path.parent) == ["input.txt"]
    assert path.read_bytes() == BODY[:100]
    # a complete download replaces the damaged file
    done = download()
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == BODY


def test_download_has_the_checksum_of_tiny_shakespeare(tiny_shakespeare):
    sha256 = hashlib.sha256(tiny_shakespeare.read_bytes()).hexdigest()
    assert sha256 == load("prepare_shakespeare").TINY_SHAKESPEARE_SHA256
