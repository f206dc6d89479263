"""prepare_shakespeare.py: text to token shards, and the download."""

import errno
import hashlib
import http.server
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, call, load, run

prepare = load("prepare_shakespeare")
TRICKY = "Grüße, 世界 🙂!\r\n\x00\ttabs\n\n<|endoftext|> " + "a" * 2500 + "\n" * 1200 + "end"


def read_split(directory, split):
    """(meta.json, the tokens of the one shard of a split)."""
    meta = json.loads((directory / "meta.json").read_text())
    (shard,) = [shard for shard in meta["shards"] if shard["split"] == split]
    return meta, np.load(directory / shard["file"], allow_pickle=False)


def content(directory):
    """Every file below a directory with its bytes and the time of its last change."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def server():
    """A web server on this machine; server.answers[path] = (status, body, length that it promises)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, length = server.answers[self.path]
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers = {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# -------------------------------------------------------------------------------------- shards
def check_round_trip(path, out_dir, tokenizer, enc, val_fraction):
    """The shards of a text file decode back to it, cut where val_fraction says."""
    flags = ["--input", path, "--out_dir", out_dir, "--tokenizer", tokenizer, "--val_fraction", val_fraction]
    done = call("prepare_shakespeare", *flags)
    assert done.returncode == 0, done.stderr
    text, parts = path.read_bytes().decode("utf-8"), {}
    for split in ("train", "val"):
        meta, tokens = read_split(out_dir, split)
        assert tokens.dtype == np.dtype("<u2") and tokens.ndim == 1
        assert tokens[0] == enc.eot_token, "a document begins with the end-of-text token"
        assert enc.eot_token not in tokens[1:]
        parts[split] = enc.decode(tokens[1:].tolist())
    assert parts["train"] + parts["val"] == text
    assert len(parts["val"]) == pytest.approx(val_fraction * len(text), abs=1)
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot_token"]) == (tokenizer, enc.n_vocab, enc.eot_token)


@pytest.mark.parametrize("val_fraction", [0.1, 0.5])
def test_bytes_decode_back_to_the_text(tmp_path, val_fraction):
    (tmp_path / "tricky.txt").write_bytes(TRICKY.encode())
    check_round_trip(tmp_path / "tricky.txt", tmp_path / "out", "bytes", prepare.get_tokenizer("bytes"), val_fraction)


def test_gpt2_tokens_decode_back_to_the_text(tmp_path, tiktoken_cache):
    (tmp_path / "tricky.txt").write_bytes(TRICKY.encode())
    check_round_trip(tmp_path / "tricky.txt", tmp_path / "out", "gpt2", tiktoken.get_encoding("gpt2"), 0.3)


def test_byte_tokens_are_the_bytes_of_the_text(byte_shards, text_file):
    tokens = [read_split(byte_shards, split)[1] for split in ("train", "val")]
    assert b"".join(bytes(part[1:].tolist()) for part in tokens) == text_file.read_bytes()


def test_bytes_tokenizer_has_257_tokens():
    enc = prepare.get_tokenizer("bytes")
    assert (enc.n_vocab, enc.eot_token) == (257, 256)
    assert enc.encode_ordinary("<|endoftext|>é") == [*b"<|endoftext|>", 0xC3, 0xA9]
    assert enc.decode_single_token_bytes(200) == bytes([200])


def test_meta_describes_the_shards(byte_shards):
    meta = json.loads((byte_shards / "meta.json").read_text())
    assert sorted(path.name for path in byte_shards.iterdir()) == sorted(
        ["meta.json", "excerpt_train_000000.npy", "excerpt_val_000000.npy"]
    )
    for shard in meta["shards"]:
        path = byte_shards / shard["file"]
        assert shard["tokens"] == len(np.load(path))
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "excerpt.txt" in json.dumps(meta["source"])


def test_shards_of_tiny_shakespeare_have_the_published_token_counts(tiny_shakespeare, tiktoken_cache, tmp_path):
    """nanoGPT's data/shakespeare: 301,966 and 36,059 tokens; ours begin with one more."""
    call("prepare_shakespeare", "--input", tiny_shakespeare, "--out_dir", tmp_path / "tiny", "--tokenizer", "gpt2")
    counts = [len(read_split(tmp_path / "tiny", split)[1]) for split in ("train", "val")]
    assert counts == [301_966 + 1, 36_059 + 1]


# ------------------------------------------------------------------------- whole or not at all
def test_second_run_changes_nothing(tmp_path, text_file):
    flags = ["--input", text_file, "--out_dir", tmp_path / "out"]
    call("prepare_shakespeare", *flags)
    before = content(tmp_path)
    again = call("prepare_shakespeare", *flags)
    assert (again.returncode, again.stderr) == (0, "")
    assert content(tmp_path) == before


@pytest.mark.parametrize("change", ["input", "val_fraction", "no meta.json"])
def test_other_data_in_the_way_is_refused_and_kept(tmp_path, text_file, change):
    flags = {"--input": text_file, "--out_dir": tmp_path / "out", "--val_fraction": 0.1}
    call("prepare_shakespeare", *[part for pair in flags.items() for part in pair])
    if change == "input":
        (tmp_path / "other.txt").write_text("another text " * 100)
        flags["--input"] = tmp_path / "other.txt"
    elif change == "val_fraction":
        flags["--val_fraction"] = 0.2
    else:
        (tmp_path / "out" / "meta.json").unlink()
    before = content(tmp_path)
    done = call("prepare_shakespeare", *[part for pair in flags.items() for part in pair])
    assert done.returncode == 2
    assert str(tmp_path / "out") in done.stderr and "--out_dir" in done.stderr
    assert content(tmp_path) == before


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_shards_are_not_called_complete(tmp_path, text_file, damage):
    """The trainer says "make it again" of such a shard; doing so must mend it, or say what will."""
    flags = ["--input", text_file, "--out_dir", tmp_path / "out"]
    call("prepare_shakespeare", *flags)
    shard = tmp_path / "out" / "out_train_000000.npy"
    whole = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(whole[:-100])
    done = call("prepare_shakespeare", *flags)
    mended = shard.exists() and shard.read_bytes() == whole
    assert mended or (done.returncode == 2 and "--out_dir" in done.stderr), done.stdout


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_stays_behind_after_a_failure(tmp_path, text_file, monkeypatch, failure):
    save = np.save

    def save_then_fail(path, tokens):
        if "_val_" in str(path):
            raise failure
        save(path, tokens)

    module = load("prepare_shakespeare")
    monkeypatch.setattr(module.np, "save", save_then_fail)
    flags = ["--input", text_file, "--out_dir", tmp_path / "out"]
    if isinstance(failure, OSError):
        done = call(module, *flags)
        assert done.returncode == 2
        assert "No space left" in done.stderr and len(done.stderr.splitlines()) == 1
    else:
        with pytest.raises(KeyboardInterrupt):
            call(module, *flags)
    assert list(tmp_path.iterdir()) == []


def test_run_after_a_killed_one_is_clean(tmp_path, text_file):
    """What lies beside the data set, of a killed run or of a stranger, neither gets into it nor is lost."""
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "out_train_000007.npy").write_bytes(b"half a sh")
    assert call("prepare_shakespeare", "--input", text_file, "--out_dir", tmp_path / "out").returncode == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["meta.json", "out_train_000000.npy", "out_val_000000.npy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.tmp"]
    assert (tmp_path / "out.tmp" / "out_train_000007.npy").read_bytes() == b"half a sh"


def test_shards_appear_in_one_rename(tmp_path, text_file):
    """Whenever the run is killed: under its final name nothing is ever opened for writing."""
    code = f"""
import os, runpy, sys
def watch(event, args):
    if event == "open" and str(args[0]).startswith("out" + os.sep) and args[2] & (os.O_WRONLY | os.O_RDWR):
        print("writes", args[0])
sys.addaudithook(watch)
runpy.run_path({str(ROOT / "prepare_shakespeare.py")!r}, run_name="__main__")"""
    line = [sys.executable, "-c", code, "--input", text_file, "--out_dir", "out"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "writes" not in done.stdout
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_nested_out_dir_with_a_slash_at_its_end(tmp_path, text_file):
    done = run("prepare_shakespeare", "--input", text_file, "--out_dir", "a/b/", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_split(tmp_path / "a" / "b", "train")[0]["shards"][0]["file"] == "b_train_000000.npy"


# ------------------------------------------------------------------------------------- download
def test_download_writes_the_file_with_the_right_checksum(server, tmp_path):
    body = b"To be, or not to be"
    server.answers["/input.txt"] = (200, body, len(body))
    path = tmp_path / "new" / "folder" / "input.txt"
    prepare.download(f"{server.url}/input.txt", str(path), hashlib.sha256(body).hexdigest())
    assert content(tmp_path).keys() == {path}
    assert path.read_bytes() == body


@pytest.mark.parametrize("answer", ["another text", "an error page", "half of it", "no server"])
def test_failed_download_writes_nothing(server, tmp_path, capsys, answer):
    body = b"To be, or not to be"
    url = f"{server.url}/input.txt" if answer != "no server" else "http://127.0.0.1:9/input.txt"
    server.answers["/input.txt"] = {
        "another text": (200, body + b"?", len(body) + 1),
        "an error page": (404, body, len(body)),
        "half of it": (200, body, 2 * len(body)),
        "no server": None,
    }[answer]
    with pytest.raises(SystemExit) as stop:
        prepare.download(url, str(tmp_path / "input.txt"), hashlib.sha256(body).hexdigest())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert url in error and "--input" in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_failed_download_keeps_the_file_that_was_there(server, tmp_path, capsys):
    (tmp_path / "input.txt").write_text("mine")
    server.answers["/input.txt"] = (200, b"other", 5)
    with pytest.raises(SystemExit):
        prepare.download(f"{server.url}/input.txt", str(tmp_path / "input.txt"), "0" * 64)
    assert "0" * 64 in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("input.txt", "mine")]


def test_download_flag_fetches_once_and_makes_shards(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, body = load("prepare_shakespeare"), b"First Citizen:\n" * 50
    assert module.TINY_SHAKESPEARE_SHA256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    module.TINY_SHAKESPEARE_URL = f"{server.url}/tiny"
    module.TINY_SHAKESPEARE_SHA256 = hashlib.sha256(body).hexdigest()
    server.answers["/tiny"] = (200, body, len(body))
    done = call(module, "--download")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "tinyshakespeare" / "input.txt").read_bytes() == body
    assert bytes(read_split(tmp_path / "shakespeare", "train")[1][1:].tolist()) == body[:675]
    server.answers.clear()  # a second request would fail
    done = call(module, "--download", "--out_dir", "second")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "second" / "meta.json").exists()


def test_download_replaces_a_damaged_file(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, body = load("prepare_shakespeare"), b"First Citizen:\n" * 50
    module.TINY_SHAKESPEARE_URL = f"{server.url}/tiny"
    module.TINY_SHAKESPEARE_SHA256 = hashlib.sha256(body).hexdigest()
    server.answers["/tiny"] = (200, body, len(body))
    path = tmp_path / "data" / "tinyshakespeare" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(body[:100])
    assert call(module, "--download").returncode == 0
    assert path.read_bytes() == body
