"""prepare_shakespeare.py: text to token shards, the download, and user errors."""

import errno
import hashlib
import http.server
import itertools
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tiktoken
import transformers
from conftest import ROOT, SHARED, call, command, load, run

prepare = load("prepare_shakespeare")
TRICKY = "Grüße, 世界 🙂!\r\n\x00\ttabs\n\n<|endoftext|> " + "a" * 2500 + "\n" * 1200 + "end"


FILES = ["merges.txt", "meta.json", "{}_train_000000.npy", "{}_val_000000.npy", "vocab.json"]


def files_of(name):
    """Return the sorted names of the files of a data set."""
    return sorted(file.format(name) for file in FILES)


def names_in(directory):
    """Return the sorted names in a directory."""
    return sorted(path.name for path in directory.iterdir())


def assert_user_error(done, *words):
    """Check for status 2 and one line on stderr that contains all words."""
    assert done.returncode == 2, done.stdout[-500:] + done.stderr[-500:]
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert str(word) in done.stderr, f"{word} is not in: {done.stderr}"


def read_split(directory, split):
    """Return meta.json and the tokens of the only shard of a split."""
    meta = json.loads((directory / "meta.json").read_text())
    (shard,) = [shard for shard in meta["shards"] if shard["split"] == split]
    return meta, np.load(directory / shard["file"], allow_pickle=False)


def content(directory):
    """Return the bytes and the time of the last change of every file below a directory, by path."""
    contents = {}
    for path in directory.rglob("*"):
        if path.is_file():
            contents[path] = (path.read_bytes(), path.stat().st_mtime_ns)
    return contents


@pytest.fixture
def server():
    """Run a local web server. server.answers[path] is (status, body, announced length)."""

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
    """Check that the shards of a text file decode to it, and are split where val_fraction says."""
    flags = ["--input", path, "--out_dir", out_dir, "--tokenizer", tokenizer, "--val_fraction", val_fraction]
    done = call("prepare_shakespeare", *flags)
    assert done.returncode == 0, done.stderr
    text = path.read_bytes().decode("utf-8")
    parts = {}
    for split in ("train", "val"):
        meta, tokens = read_split(out_dir, split)
        assert tokens.dtype == np.dtype("<u2") and tokens.ndim == 1
        assert tokens[0] == enc.eot_token, "a document starts with the end-of-text token"
        assert enc.eot_token not in tokens[1:]
        parts[split] = enc.decode(tokens[1:].tolist())
    assert parts["train"] + parts["val"] == text
    assert len(parts["val"]) == pytest.approx(val_fraction * len(text), abs=1)
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot_token"]) == (tokenizer, enc.n_vocab, enc.eot_token)


@pytest.mark.parametrize("val_fraction", [0.1, 0.5])
def test_byte_tokens_decode_to_the_text(tmp_path, val_fraction):
    (tmp_path / "tricky.txt").write_bytes(TRICKY.encode())
    enc = prepare.get_tokenizer("bytes")
    check_round_trip(tmp_path / "tricky.txt", tmp_path / "out", "bytes", enc, val_fraction)


def test_gpt2_tokens_decode_to_the_text(tmp_path, tiktoken_cache):
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
    assert names_in(byte_shards) == files_of("excerpt")
    for shard in meta["shards"]:
        path = byte_shards / shard["file"]
        assert shard["tokens"] == len(np.load(path))
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "excerpt.txt" in json.dumps(meta["source"])


def test_shards_of_tiny_shakespeare_have_the_published_token_counts(tiny_shakespeare, tiktoken_cache, tmp_path):
    """nanoGPT's data/shakespeare has 301,966 and 36,059 tokens. Ours start with one more."""
    call("prepare_shakespeare", "--input", tiny_shakespeare, "--out_dir", tmp_path / "tiny", "--tokenizer", "gpt2")
    counts = [len(read_split(tmp_path / "tiny", split)[1]) for split in ("train", "val")]
    assert counts == [301_966 + 1, 36_059 + 1]


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_transformers_builds_the_same_tokenizer_from_the_files(name, tmp_path, tiktoken_cache):
    (tmp_path / "tricky.txt").write_bytes(TRICKY.encode())
    flags = ["--input", tmp_path / "tricky.txt", "--out_dir", tmp_path / "out", "--tokenizer", name]
    assert call("prepare_shakespeare", *flags, "--val_fraction", 0.5).returncode == 0
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(tmp_path / "out")
    text = TRICKY.replace("<|endoftext|>", "")  # transformers makes it a special token
    expected = prepare.get_tokenizer(name).encode_ordinary(text)
    assert tokenizer.encode(text) == expected
    assert tokenizer.encode("<|endoftext|>") == [prepare.get_tokenizer(name).eot_token]


def test_literal_end_of_text_is_ordinary_text_and_the_help_says_so(tmp_path):
    (tmp_path / "text.txt").write_text("a<|endoftext|>b" * 2)
    flags = ["--input", tmp_path / "text.txt", "--out_dir", tmp_path / "out", "--val_fraction", 0.5]
    assert call("prepare_shakespeare", *flags).returncode == 0
    _, tokens = read_split(tmp_path / "out", "train")
    assert tokens.tolist() == [256, *b"a<|endoftext|>b"]
    assert "<|endoftext|>" in call("prepare_shakespeare", "--help").stdout


def test_name_of_a_directory_that_cannot_be_the_name_of_a_shard(tmp_path, text_file):
    """File names in meta.json are plain names. A second run accepts what the first one wrote."""
    for name, shard_name in (("my data", "my_data"), (".hidden", "_hidden"), ("a+b", "a_b")):
        flags = ["--input", text_file, "--out_dir", tmp_path / name]
        assert call("prepare_shakespeare", *flags).returncode == 0
        assert names_in(tmp_path / name) == files_of(shard_name)
        assert "already contains" in call("prepare_shakespeare", *flags).stdout


# ------------------------------------------------------------------------- a directory that exists
def test_second_run_changes_nothing(tmp_path, text_file):
    flags = ["--input", text_file, "--out_dir", tmp_path / "out"]
    call("prepare_shakespeare", *flags)
    before = content(tmp_path)
    again = call("prepare_shakespeare", *flags)
    assert (again.returncode, again.stderr) == (0, "")
    assert content(tmp_path) == before


@pytest.mark.parametrize("change", ["input", "val_fraction", "no meta.json"])
def test_other_files_in_the_directory_are_refused_and_kept(tmp_path, text_file, change):
    flags = {"--input": text_file, "--out_dir": tmp_path / "out", "--val_fraction": 0.1}
    call("prepare_shakespeare", *itertools.chain.from_iterable(flags.items()))
    if change == "input":
        (tmp_path / "other.txt").write_text("another text " * 100)
        flags["--input"] = tmp_path / "other.txt"
    elif change == "val_fraction":
        flags["--val_fraction"] = 0.2
    else:
        (tmp_path / "out" / "meta.json").unlink()
    before = content(tmp_path)
    done = call("prepare_shakespeare", *itertools.chain.from_iterable(flags.items()))
    assert done.returncode == 2
    assert str(tmp_path / "out") in done.stderr and "--out_dir" in done.stderr
    assert content(tmp_path) == before


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_shards_are_regenerated(tmp_path, text_file, damage):
    flags = ["--input", text_file, "--out_dir", tmp_path / "out"]
    call("prepare_shakespeare", *flags)
    shard = tmp_path / "out" / "out_train_000000.npy"
    whole = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(whole[:-100])
    done = call("prepare_shakespeare", *flags)
    assert done.returncode == 0, done.stderr
    assert shard.read_bytes() == whole
    assert names_in(tmp_path / "out") == files_of("out")


def test_data_set_of_an_earlier_version_gets_the_files_of_its_tokenizer(tmp_path, text_file):
    flags = ["--input", text_file, "--out_dir", tmp_path / "out"]
    call("prepare_shakespeare", *flags)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "out" / name).unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert call("prepare_shakespeare", *flags).returncode == 0
    assert names_in(tmp_path / "out") == files_of("out")
    for name, old_bytes in before.items():
        assert (tmp_path / "out" / name).read_bytes() == old_bytes


@pytest.mark.parametrize("name", ["../victim.npy", "../victim", "{tmp_path}/victim.npy", "..", "", "a/b.npy"])
def test_file_names_in_meta_json_cannot_reach_other_directories(name, tmp_path, text_file):
    flags = ["--input", text_file, "--out_dir", tmp_path / "out"]
    call("prepare_shakespeare", *flags)
    for victim in ("victim", "victim.npy"):
        (tmp_path / victim).write_text("mine")
    meta_path = tmp_path / "out" / "meta.json"
    meta = json.loads(meta_path.read_text())
    meta["shards"][0]["file"] = name.format(tmp_path=tmp_path)
    meta_path.write_text(json.dumps(meta))
    before = content(tmp_path)
    assert_user_error(call("prepare_shakespeare", *flags), meta_path, "--out_dir")
    assert content(tmp_path) == before


def test_nothing_is_deleted_when_a_data_set_is_regenerated(tmp_path, text_file):
    flags = ["--input", text_file, "--out_dir", tmp_path / "out"]
    call("prepare_shakespeare", *flags)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "out_val_000000.npy").write_bytes(b"")
    assert call("prepare_shakespeare", *flags).returncode == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert len(read_split(tmp_path / "out", "val")[1]) > 1000


WRONG_META = {
    "empty": "",
    "list": "[1, 2]",
    "no keys": "{}",
    "deeply nested": "[" * 100_000,
    "tokenizer of the wrong type": '{"tokenizer": ["bytes"], "vocab_size": 257, "shards": []}',
    "infinite number": '{"tokenizer": "bytes", "vocab_size": Infinity, "shards": []}',
    "shards of the wrong type": '{"tokenizer": "bytes", "vocab_size": 257, "shards": 7}',
    "shard of the wrong type": '{"tokenizer": "bytes", "vocab_size": 257, "shards": [7]}',
    "source of the wrong type": '{"tokenizer": "bytes", "vocab_size": 257, "shards": [], "source": 7}',
    "number of 5,000 digits": '{"tokenizer": "bytes", "vocab_size": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("kind", [*WRONG_META, "pipe"])
def test_meta_json_that_is_not_ours_is_refused_in_one_line(kind, tmp_path, text_file):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "meta.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(WRONG_META[kind])
    before = content(tmp_path)
    done = call("prepare_shakespeare", "--input", text_file, "--out_dir", tmp_path / "out")
    assert_user_error(done, f"--out_dir {tmp_path / 'out'}")
    assert content(tmp_path) == before


def test_meta_json_without_its_shards_is_not_a_complete_data_set(tmp_path, text_file):
    flags = ["--input", text_file, "--out_dir", tmp_path / "out"]
    call("prepare_shakespeare", *flags)
    meta_path = tmp_path / "out" / "meta.json"
    whole = meta_path.read_text()
    meta_path.write_text(json.dumps({**json.loads(whole), "shards": []}))
    assert call("prepare_shakespeare", *flags).returncode == 0
    assert meta_path.read_text() == whole


# ------------------------------------------------------------------------------- atomic writing
@pytest.mark.parametrize("simulation", ["nodirrename", "win"])
def test_data_set_is_written_where_directories_cannot_be_renamed(simulation, tmp_path, text_file):
    directory = SHARED / "sim" / simulation
    if not directory.is_dir():
        pytest.skip(f"the simulation {simulation} is not in ../shared/sim")
    flags = ["--input", text_file, "--out_dir", "out"]
    for output in ("out/out_val_000000.npy", "already contains"):
        done = run("prepare_shakespeare", *flags, cwd=tmp_path, env={"PYTHONPATH": str(directory)})
        assert (done.returncode, done.stderr) == (0, "")
        assert output in done.stdout
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == files_of("out")


def move_at_most(module, count, monkeypatch):
    """Make module move files one by one, and fail with a disk error after count of them."""
    replace = os.replace
    moved = []

    def replace_files_only(source, target):
        if os.path.isdir(source):
            raise OSError(errno.ENOSYS, "Function not implemented")
        if len(moved) == count:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)
        moved.append(os.path.basename(target))

    monkeypatch.setattr(module.os, "replace", replace_files_only)
    return moved


def test_meta_json_comes_first_where_directories_cannot_be_renamed(tmp_path, text_file, monkeypatch):
    module = load("prepare_shakespeare")
    moved = move_at_most(module, 5, monkeypatch)
    done = call(module, "--input", text_file, "--out_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(moved) == files_of("out")
    assert moved[0] == "meta.json"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_data_set_that_is_moved_in_part_is_not_read_and_is_completed(count, tmp_path, text_file, monkeypatch):
    """train_gpt2.py refuses the directory until both shards are there, and a second run adds the other files."""
    flags = ["--input", text_file, "--out_dir", tmp_path / "out"]
    with monkeypatch.context() as patch:
        module = load("prepare_shakespeare")
        moved = move_at_most(module, count, patch)
        assert_user_error(call(module, *flags), "Input/output error", "--out_dir")
    assert names_in(tmp_path / "out") == sorted(moved)
    if not {"out_train_000000.npy", "out_val_000000.npy"} <= set(moved):
        with pytest.raises(ValueError, match="is missing, but meta.json lists it"):
            load("train_gpt2").read_data_set(str(tmp_path / "out"))
    assert call("prepare_shakespeare", *flags).returncode == 0
    assert names_in(tmp_path / "out") == files_of("out")
    assert "already contains" in call("prepare_shakespeare", *flags).stdout


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_no_files(tmp_path, text_file, monkeypatch, failure):
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
    """Files next to the data set, of a killed run or of a user, are neither used nor deleted."""
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "out_train_000007.npy").write_bytes(b"half a sh")
    assert call("prepare_shakespeare", "--input", text_file, "--out_dir", tmp_path / "out").returncode == 0
    assert names_in(tmp_path / "out") == files_of("out")
    assert names_in(tmp_path) == ["out", "out.tmp"]
    assert (tmp_path / "out.tmp" / "out_train_000007.npy").read_bytes() == b"half a sh"


def test_shards_appear_in_one_rename(tmp_path, text_file):
    """No file is opened for writing under its final name, so a kill cannot leave half of one."""
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
    assert names_in(tmp_path / "out") == files_of("out")


def test_nested_out_dir_may_end_with_a_slash(tmp_path, text_file):
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
    assert f"by hand to {tmp_path}/input.txt" in error
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


# ----------------------------------------------------------------------------------- user errors
@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "not UTF-8"])
def test_input_that_is_not_a_text_is_an_error(kind, tmp_path):
    path = tmp_path / "text.txt"
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "not UTF-8":
        path.write_bytes("Ein schöner Text. ".encode("latin-1") * 100)
    before = names_in(tmp_path)
    done = call("prepare_shakespeare", "--input", path, "--out_dir", tmp_path / "out")
    word = {"empty": "empty", "not UTF-8": "UTF-8"}.get(kind, "cannot read")
    assert_user_error(done, path, word, "--input")
    assert names_in(tmp_path) == before


def test_text_too_short_to_split_is_an_error(tmp_path):
    (tmp_path / "short.txt").write_text("a")
    done = call("prepare_shakespeare", "--input", tmp_path / "short.txt", "--out_dir", tmp_path / "out")
    assert_user_error(done, tmp_path / "short.txt", "--val_fraction 0.1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag, value", [("--tokenizer", "words"), ("--val_fraction", 1.0), ("--val_fraction", 0)])
def test_wrong_value_of_a_flag_is_an_error(flag, value, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_user_error(call("prepare_shakespeare", "--input", text_file, flag, value), flag, value)
    assert names_in(tmp_path) == []


def test_out_dir_that_is_a_file_is_an_error(text_file, tmp_path):
    (tmp_path / "out").write_text("mine")
    done = call("prepare_shakespeare", "--input", text_file, "--out_dir", tmp_path / "out")
    assert_user_error(done, tmp_path / "out", "--out_dir")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out", "mine")]


@pytest.mark.parametrize("reason", ["no network", "badvocab"])
def test_vocabulary_that_cannot_be_loaded_is_an_error(reason, text_file, tmp_path):
    """There is no network, or a proxy answers with a page of its own."""
    environment = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")}
    if reason == "badvocab":
        if not (SHARED / "sim" / reason).is_dir():
            pytest.skip("the simulation badvocab is not in ../shared/sim")
        environment["PYTHONPATH"] = str(SHARED / "sim" / reason)
    flags = ["--input", text_file, "--tokenizer", "gpt2", "--out_dir", "out"]
    done = run("prepare_shakespeare", *flags, cwd=tmp_path, env=environment)
    assert_user_error(done, "--tokenizer bytes", "TIKTOKEN_CACHE_DIR")
    assert not (tmp_path / "out").exists()


def test_a_million_whitespace_characters_in_a_row_are_an_error_with_gpt2_tokens_only(tmp_path, tiktoken_cache):
    (tmp_path / "text.txt").write_text("a" + "\n" * 1_100_000 + "b" * 10_000)
    flags = ["--input", "text.txt", "--val_fraction", 0.001]
    done = run("prepare_shakespeare", *flags, "--tokenizer", "gpt2", cwd=tmp_path)
    assert_user_error(done, "1,100,000 whitespace characters", "--tokenizer bytes")
    assert names_in(tmp_path) == ["text.txt"]
    assert run("prepare_shakespeare", *flags, cwd=tmp_path).returncode == 0


def test_the_longest_allowed_run_of_whitespace_can_be_tokenized(tiktoken_cache):
    enc = prepare.get_tokenizer("gpt2")
    text = "a" + "\n" * 998_999 + "b"
    assert enc.decode(prepare.tokenize(enc, text)[1:].tolist()) == text


@pytest.mark.parametrize("redirection, status", [("| true", 0), (">/dev/full", 1), (">&-", 0), ("2>&-", 0)])
def test_closed_and_full_outputs_give_no_traceback(redirection, status, text_file, tmp_path):
    """The data set is written even if the output cannot be."""
    words = command("prepare_shakespeare", "--input", text_file, "--out_dir", "out")
    line = " ".join(f"'{word}'" for word in words)
    line = ["bash", "-c", f"set -o pipefail; {line} {redirection}"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == status
    assert done.stderr.count("\n") == status and "Traceback" not in done.stderr
    assert names_in(tmp_path / "out") == files_of("out")
