"""fineweb.py, run as a user would: tokens against the plain reference, interruptions, a hub that misbehaves."""

import glob
import hashlib
import http.server
import importlib.util
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import load

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "fineweb.py"
BOOKS = sorted(glob.glob(str(ROOT.parent / "shared/data/books/*.parquet")))
CACHE = os.environ.get("TIKTOKEN_CACHE_DIR", str(ROOT.parent / "shared/tiktoken_cache"))
has_gpt2 = pytest.mark.skipif(not os.path.isdir(CACHE), reason="no GPT-2 vocabulary in TIKTOKEN_CACHE_DIR")
has_books = pytest.mark.skipif(not BOOKS or not os.path.isdir(CACHE), reason="no ../shared/data/books")
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
EOT = 256  # of --tokenizer bytes


def command(*flags, **env):
    """The subprocess arguments of fineweb.py with these flags, without any rank of the surrounding machine."""
    keep = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    keep = {key: value for key, value in keep.items() if not key.startswith(("SLURM_", "HF_"))}
    flags = [sys.executable, str(SCRIPT), *map(str, flags)]
    return {"args": flags, "env": keep | {"TIKTOKEN_CACHE_DIR": CACHE} | env, "text": True}


def run(*flags, code=0, **env):
    """Run fineweb.py to its end and return what it printed; a failure has to be one line on stderr."""
    done = subprocess.run(**command(*flags, **env), capture_output=True, timeout=100)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == (code != 0), done.stderr
    return done.stderr if code else done.stdout


def make_texts(seed, number):
    """Documents of many sizes, some of them null, empty, foreign or with the text of a special token in them."""
    rng = random.Random(seed)
    texts = []
    for i in range(number):
        words = [
            rng.choice(["the", "of", "naïve", "東京", "<|endoftext|>", "\n\n", "x" * 50, "🙂"]) for _ in range(i % 97)
        ]
        texts.append(rng.choice([" ".join(words)] * 8 + [None, ""]))
    return texts


def write_parquet(path, texts, column="text"):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    table = pa.table({"id": list(range(len(texts))), column: pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=100)


def reference(texts, encode, eot):
    """All tokens in order, the plain way."""
    return [token for text in texts if text for token in [eot, *encode(text)]]


def plain_bytes(text):
    return list(text.encode())


def read_shards(directory, shard_size, world_size=1):
    """Check names, sizes, header and meta.json of a finished directory; return all tokens in order."""
    meta = json.loads((directory / "meta.json").read_text())
    assert sorted(os.listdir(directory)) == sorted([shard["file"] for shard in meta["shards"]] + ["meta.json"])
    tokens = []
    for i, shard in enumerate(meta["shards"]):
        split, path = "train" if i else "val", directory / shard["file"]
        assert world_size > 1 or shard["file"] == f"edufineweb_{split}_{i:06d}.npy"
        assert shard["split"] == split
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        assert array.dtype == np.dtype("<u2") and array.shape == (shard["tokens"],)
        assert world_size > 1 or len(array) == shard_size or i + 1 == len(meta["shards"])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        tokens += array.tolist()
    np.save(directory.parent / "same.npy", array)
    assert (directory.parent / "same.npy").read_bytes() == path.read_bytes()
    return tokens


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three parquet files (the middle one has no rows), their texts, and the finished shards of an undisturbed run."""
    folder = tmp_path_factory.mktemp("data")
    parts = [make_texts(1, 700), [], make_texts(2, 400)]
    for i, texts in enumerate(parts):
        write_parquet(f"{folder}/in/{i:03d}.parquet", texts)
    flags = ["--tokenizer", "bytes", "--source", f"{folder}/in/*.parquet", "--shard_size", 20011]
    out = run(*flags, "--local_dir", folder / "out", "--workers", 1)
    texts = [text for part in parts for text in part]
    return {"folder": folder, "flags": flags, "texts": texts, "shards": contents(folder / "out"), "printed": out}


def test_tokens_equal_the_reference_for_any_number_of_workers(data, tmp_path):
    expected = reference(data["texts"], plain_bytes, EOT)
    assert len(expected) % 20011  # the last shard is a short one
    assert read_shards(data["folder"] / "out", 20011) == expected
    run(*data["flags"], "--local_dir", tmp_path / "out", "--workers", 2)
    assert contents(tmp_path / "out") == data["shards"]
    empty = sum(not text for text in data["texts"])
    assert f"{len(data['texts']) - empty:,} documents ({empty:,} empty ones skipped)" in data["printed"]
    assert f"{len(expected):,} tokens" in data["printed"]


@has_gpt2
def test_gpt2_tokens_and_limits(data, tmp_path):
    import tiktoken

    os.environ.setdefault("TIKTOKEN_CACHE_DIR", CACHE)
    enc = tiktoken.get_encoding("gpt2")
    expected = reference(data["texts"], enc.encode_ordinary, enc.eot_token)
    for limit, number in ((["--max_tokens", 5555], 5555), (["--max_shards", 3], 3000)):
        directory = tmp_path / str(number) / "out"
        flags = ["--source", *sorted(glob.glob(f"{data['folder']}/in/*.parquet")), "--shard_size", 1000, *limit]
        run(*flags, "--local_dir", directory, "--workers", 2)
        assert read_shards(directory, 1000) == expected[:number]


SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000"
SYMBOLS = [
    *SPACES,
    *12 * " ",
    *6 * "\n",
    "\r\n",
    *"\x1c\x1d\x1e\x1f\x00\x01\x7f\u200b\u180e\ufeff\ufffd",
    "<|endoftext|>",
]
SYMBOLS += [*"aBéßЖ中のا1٣½Ⅷ!?_-<", " of", "े", "\u0301", "🙂", "👨‍👩‍👧", "'", "'s", "'ll", "'S", "’"]


@has_gpt2
def test_tokens_without_look_ahead_equal_encode_ordinary():
    """Every string of up to 4 of nine characters that matter, and 20,000 random ones of up to 60 symbols."""
    import tiktoken

    fineweb, rng = load("fineweb"), random.Random(0)
    enc = tiktoken.get_encoding("gpt2")
    batches = [["".join(part) for part in itertools.product(" \n\xa0a1!'s\x1c", repeat=n)] for n in range(5)]
    for marks in (True, False) * 100:  # with and without the characters that stand for something else
        symbols = [one for one in SYMBOLS if marks or one not in "\x00\x01"]
        symbols = rng.choice([symbols, [*rng.sample(symbols, 4), " "]])
        batches.append(["".join(rng.choices(symbols, k=rng.randrange(60))) for _ in range(100)] + [None])
    for texts in batches:
        tokens, rows, size, skipped = fineweb.tokenize("gpt2", pa.array(texts, pa.string()))
        assert tokens.dtype == np.dtype("<u2")
        assert tokens.tolist() == reference(texts, enc.encode_ordinary, enc.eot_token)
        assert (rows, skipped) == (len(texts), sum(not text for text in texts))
        assert size == len("".join(filter(None, texts)).encode())
    million = fineweb.tokenize("gpt2", pa.array([" " * 10**6 + "x"]))[0]  # tiktoken itself panics at this one
    assert enc.decode(million[1:].tolist()) == " " * 10**6 + "x"


@has_books
def test_real_documents(tmp_path):
    import tiktoken

    os.environ.setdefault("TIKTOKEN_CACHE_DIR", CACHE)
    enc = tiktoken.get_encoding("gpt2")
    texts = pq.ParquetFile(BOOKS[0]).read_row_group(0, columns=["text"]).column(0).to_pylist()
    directory = tmp_path / "out"
    run("--source", *BOOKS, "--max_tokens", 400_000, "--shard_size", 150_000, "--local_dir", directory, "--workers", 2)
    expected = reference(texts[:400], enc.encode_ordinary, enc.eot_token)
    assert len(expected) >= 400_000
    assert read_shards(directory, 150_000) == expected[:400_000]


@posix
def test_killed_at_random_moments(data, tmp_path):
    flags = ["--tokenizer", "bytes", "--shard_size", 15013, "--workers", 2]
    flags += ["--source", *4 * [data["folder"] / "in/000.parquet"]]
    run(*flags, "--local_dir", tmp_path / "whole")
    rng, shards = random.Random(5), 0
    for _ in range(4):
        settings = command(*flags, "--local_dir", tmp_path / "out")
        process = subprocess.Popen(**settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shards += rng.randrange(1, 4)
        while len(list(tmp_path.glob("out/*.npy"))) < shards and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    run(*flags, "--local_dir", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


DIE = """
import os, sys
sys.path.insert(0, {root!r})
import fineweb

def dying(step):
    def call(*args):
        global left
        left -= 1
        if left == 0:
            os._exit(9)
        step(*args)
    return call

if __name__ == "__main__":
    left = int(sys.argv.pop(1))
    os.replace, os.fsync, os.remove = dying(os.replace), dying(os.fsync), dying(os.remove)
    fineweb.main()
"""


def test_interrupted_between_any_two_steps(data, tmp_path):
    """Runs that die before their n-th step that changes names or the disk, n from 2 to 7, and one that does not."""
    script, directory = tmp_path / "die.py", tmp_path / "out"
    script.write_text(DIE.format(root=str(ROOT)))
    for n in (2, 3, 4, 5, 6, 7, 1000):
        settings = command(*data["flags"], "--local_dir", directory, "--workers", 1)
        settings["args"][1:2] = [str(script), str(n)]
        assert subprocess.run(**settings, capture_output=True, timeout=100).returncode == (9 if n < 1000 else 0)
    assert contents(directory) == data["shards"]


@posix
def test_ctrl_c_is_one_line_and_the_run_continues(data, tmp_path):
    big = tmp_path / "big.parquet"
    write_parquet(str(big), ["word " * 2000] * 5000)  # seconds of work: a busy machine signals late
    flags = ["--tokenizer", "bytes", "--source", big, "--shard_size", 200_000, "--max_tokens", 40_000_000]
    settings = command(*flags, "--local_dir", tmp_path / "out", "--workers", 2)
    process = subprocess.Popen(**settings, stdout=-1, stderr=-1, start_new_session=True)
    while not list(tmp_path.glob("out/edufineweb_train_000002.npy")):
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert re.fullmatch(r"interrupted: .* continues\n", err)
    with pytest.raises(ProcessLookupError):  # no process of the run is left
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    run(*flags, "--local_dir", tmp_path / "out", "--workers", 2)
    assert len(read_shards(tmp_path / "out", 200_000)) == 40_000_000


HALF = """
import multiprocessing.connection, os, signal, struct, sys
sys.path.insert(0, {root!r})
import fineweb

def send_bytes(pipe, message):
    global left
    left -= 1
    if left == 0:
        os.write(pipe.fileno(), struct.pack("!i", len(message)) + bytes(message[: len(message) // 2]))
        os.kill(os.getpid(), signal.SIGKILL)
    plain(pipe, message)

left, plain = int(os.environ["LEFT"]), multiprocessing.connection.Connection._send_bytes
if __name__ == "__mp_main__":  # in a worker
    multiprocessing.connection.Connection._send_bytes = send_bytes
if __name__ == "__main__":
    fineweb.main()
"""


@posix
def test_a_worker_killed_in_the_middle_of_a_message_is_one_line(data, tmp_path, monkeypatch):
    script, flags = tmp_path / "half.py", [*data["flags"], "--local_dir", tmp_path / "out", "--workers", 2]
    script.write_text(HALF.format(root=str(ROOT)))
    for left in (1, 3):  # the first result of each worker, the third one
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "SCRIPT", script)
            assert "worker process was killed" in run(*flags, LEFT=str(left), code=2)
    assert contents(tmp_path / "out") != data["shards"]
    run(*flags)
    assert contents(tmp_path / "out") == data["shards"]


def test_other_settings_and_other_directories_are_refused(data, tmp_path):
    directory = tmp_path / "out"
    shutil.copytree(data["folder"] / "out", directory)
    for flags in (["--shard_size", 20012], ["--max_tokens", 7], ["--text_column", "id"], ["--tokenizer", "gpt2"]):
        if flags[1] != "gpt2" or os.path.isdir(CACHE):
            err = run(*data["flags"], "--local_dir", directory, *flags, code=2)
            assert flags[0][2:] in err and str(flags[1]) in err
    assert "already holds" in run(*data["flags"], "--local_dir", directory)
    assert contents(directory) == data["shards"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    assert "something else" in run(*data["flags"], "--local_dir", tmp_path / "other", code=2)
    assert os.listdir(tmp_path / "other") == ["thesis.txt"]


def test_bad_input_is_one_line(data, tmp_path):
    flags, to = (
        ["--tokenizer", "bytes", "--local_dir", tmp_path / "out"],
        ["--source", data["folder"] / "in/000.parquet"],
    )
    assert "nowhere" in run(*flags, "--source", tmp_path / "nowhere/*.parquet", code=2)
    assert "column body" in run(*flags, *to, "--text_column", "body", code=2)
    assert "int64" in run(*flags, *to, "--text_column", "id", code=2)
    assert "--shard_size is 0" in run(*flags, *to, "--shard_size", 0, code=2)
    assert "--shard_size" in run(*flags, *to, "--shard_size", 10**17, code=2)
    assert "--rank 3" in run(*flags, *to, "--rank", 3, "--world_size", 3, code=2)
    assert "--rank" in run(*flags, *to, RANK="first", code=2)
    assert "no shard" in run("--verify", tmp_path, code=2)
    assert "0 of 1 ranks" in run("--finish", "--local_dir", tmp_path, code=2)


def test_a_corrupt_file_is_named_and_what_was_finished_stays(data, tmp_path):
    good, bad = tmp_path / "in/000.parquet", tmp_path / "in/001.parquet"
    write_parquet(str(good), data["texts"])
    raw = good.read_bytes()
    bad.write_bytes(raw[: len(raw) // 3] + bytes(5000) + raw[len(raw) // 3 + 5000 :])  # a sound footer, not sound pages
    flags = ["--tokenizer", "bytes", "--source", good, bad, "--local_dir", tmp_path / "out", "--shard_size", 15000]
    assert "001.parquet" in run(*flags, code=2)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npy")}
    assert len(finished) >= 3
    bad.write_bytes(raw)  # the same size, and now right
    run(*flags)
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert read_shards(tmp_path / "out", 15000) == 2 * reference(data["texts"], plain_bytes, EOT)
    bad.write_bytes(raw[:1000])
    flags[flags.index("--local_dir") + 1] = tmp_path / "out2"
    assert "001.parquet" in run(*flags, code=2)


@posix
def test_a_full_disk_is_one_line_and_the_run_continues(data, tmp_path):
    """A limit on the size of files stands in for the full disk: both are errors of the same system call."""
    flags = ["--tokenizer", "bytes", "--source", f"{data['folder']}/in/*.parquet", "--shard_size", 60000]
    settings = command(*flags, "--local_dir", tmp_path / "out", "--workers", 1)
    settings["args"] = ["bash", "-c", 'ulimit -f 80; exec "$@"', "bash", *settings["args"]]  # 80 KiB
    done = subprocess.run(**settings, capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "File too large" in done.stderr
    run(*flags, "--local_dir", tmp_path / "out", "--workers", 1)
    assert read_shards(tmp_path / "out", 60000) == reference(data["texts"], plain_bytes, EOT)


def test_several_machines_make_one_data_set(data, tmp_path):
    directory = tmp_path / "out"
    flags = [*data["flags"], "--local_dir", directory, "--workers", 1]
    run(*flags, "--world_size", 2, "--rank", 1)
    assert "1 of 2 ranks" in run("--finish", "--local_dir", directory, code=2)
    assert "world_size" in run(*flags, "--world_size", 3, "--rank", 2, code=2)
    assert not list(directory.glob("*_val_*"))
    run(*flags, RANK="0", WORLD_SIZE="2")
    run("--finish", "--local_dir", directory)
    tokens = read_shards(directory, 20011, world_size=2)
    assert np.bincount(tokens).tolist() == np.bincount(reference(data["texts"], plain_bytes, EOT)).tolist()
    assert len(list(directory.glob("*_val_*"))) == 1
    assert "SHA-256 compared" in run("--verify", directory)


def test_verify_ours_and_foreign(data, tmp_path):
    out = run("--verify", data["folder"] / "out")
    expected = reference(data["texts"], plain_bytes, EOT)
    assert f"val: 1 shards, 20,011 tokens, {expected[:20011].count(EOT):,} documents" in out
    assert f"{len(expected) - 20011:,} tokens, {expected[20011:].count(EOT):,} documents" in out
    assert out.count("\n") < 25
    broken = tmp_path / "broken"
    shutil.copytree(data["folder"] / "out", broken)
    with open(broken / "edufineweb_train_000001.npy", "r+b") as file:
        file.seek(1000)
        file.write(b"\x01\x00\x02")
    os.truncate(broken / "edufineweb_train_000002.npy", 5000)
    os.remove(broken / "edufineweb_val_000000.npy")
    err = run("--verify", broken, code=2)
    assert all(name in err for name in ("train_000001.npy", "train_000002.npy", "val_000000.npy", "3 faults"))


@has_gpt2
def test_verify_foreign_shards(tmp_path):
    tokens = np.array([50256, 15496, 995, 50256, 15496], "<u2")  # Hello world, Hello
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy/edufineweb_val_000000.npy", tokens)
    np.save(tmp_path / "npy/edufineweb_train_000001.npy", tokens[:3])
    out = run("--verify", tmp_path / "npy")
    assert "val: 1 shards, 5 tokens, 2 documents" in out and "train: 1 shards, 3 tokens, 1 documents" in out
    assert "Hello world" in out
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    (tmp_path / "bin").mkdir()
    shard = tmp_path / "bin/fineweb_train_000001.bin"
    shard.write_bytes(header.tobytes() + tokens.tobytes())
    assert "train: 1 shards, 5 tokens, 2 documents" in run("--verify", tmp_path / "bin")
    for bad in (header.tobytes() + tokens.tobytes()[:-2], bytes(1034), b"", header.tobytes() + b"\xff" * 10):
        shard.write_bytes(bad)
        assert shard.name in run("--verify", tmp_path / "bin", code=2)


# -------------------------------------------------------------------------------- a hub on 127.0.0.1
class Hub(http.server.BaseHTTPRequestHandler):
    """The three addresses of a data set that huggingface_hub asks for, and ways to go wrong from server.trouble."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", send=None, **headers):
        self.send_response(status)
        for key, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if send is None else body[:send])
            if send is not None and send < len(body):
                self.close_connection = True

    def do_GET(self):
        server, path = self.server, urllib.parse.unquote(self.path.split("?")[0])
        kind = "info" if "/api/" in path and "/tree/" not in path else "tree" if "/tree/" in path else self.command
        server.log.append((kind, path))
        trouble = next((one for one in server.trouble if one[0] == kind), None)
        if trouble:
            server.trouble.remove(trouble)
        if trouble and isinstance(trouble[1], int):
            return self.reply(trouble[1], b"busy")
        if not path.removeprefix("/api").startswith("/datasets/me/texts"):
            return self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if kind == "info":
            return self.reply(200, json.dumps({"id": "me/texts", "sha": COMMIT}).encode())
        name = path.split(COMMIT, 1)[1].strip("/")
        if kind == "tree":
            found = [key for key in server.files if key.startswith(f"{name}/" if name else "")]
            entries = [{"type": "file", "path": key, "size": len(server.files[key]), "oid": "0"} for key in found]
            if found:
                return self.reply(200, json.dumps(entries).encode(), Content_Type="application/json")
        if kind == "tree" or name not in server.files:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="not found")
        body = server.files[name]
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        begin = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if begin:
            at, whole = int(begin[1]), len(body)
            return self.reply(206, body[at:], Content_Range=f"bytes {at}-{whole - 1}/{whole}", **headers)
        if trouble and trouble[1] == "truncated":  # a proxy that takes half of the file for the whole
            return self.reply(200, body[: len(body) // 2], **headers)
        self.reply(200, body, send=len(body) // 2 if trouble else None, **headers)

    do_HEAD = do_GET


@pytest.fixture
def hub(data):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.log, server.trouble = [], []
    server.files = {"README.md": b"hello"}
    for i, path in enumerate(sorted(glob.glob(f"{data['folder']}/in/*.parquet"))):
        server.files[f"sample/10BT/{i:03d}.parquet"] = pathlib.Path(path).read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def hub_run(hub, directory, *flags, **how):
    flags = ["--repo_id", "me/texts", "--tokenizer", "bytes", "--shard_size", 20011, "--workers", 1, *flags]
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(directory.parent / "hf")}
    return run(*flags, "--local_dir", directory, **env | how)


def npy(files):
    return {name: content for name, content in files.items() if name.endswith(".npy")}


def test_hub_with_every_trouble_that_passes(hub, data, tmp_path):
    hub.trouble = [("info", 503), ("info", 429), ("tree", 503), ("GET", 429), ("GET", "drop"), ("GET", "drop")]
    hub.trouble += [("GET", "truncated"), ("HEAD", 503)]
    hub_run(hub, tmp_path / "out")
    assert not hub.trouble
    assert npy(contents(tmp_path / "out")) == npy(data["shards"])
    read_shards(tmp_path / "out", 20011)  # and nothing else is there
    log = list(hub.log)
    assert "already holds" in hub_run(hub, tmp_path / "out")
    assert hub.log == log  # without asking the hub
    assert "0 tokens in 0 shards" in hub_run(hub, tmp_path / "more", "--rank", 3, "--world_size", 4)  # no file is left
    assert {kind for kind, _ in hub.log[len(log) :]} == {"info", "tree"}  # and it fetches none


IMPATIENT = """
import sys
sys.path.insert(0, {root!r})
import fineweb

fineweb.TRIES = 1  # in the workers, too, which import this file
if __name__ == "__main__":
    fineweb.main()
"""


def test_hub_that_stays_away_is_one_line_and_the_run_continues(hub, data, tmp_path, monkeypatch):
    directory, script = tmp_path / "out", tmp_path / "impatient.py"
    script.write_text(IMPATIENT.format(root=str(ROOT)))
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", script)
    broken = threading.Event()
    original = Hub.reply
    try:
        Hub.reply = lambda self, status, *args, **how: original(
            self, 503 if "002" in self.path and self.command == "GET" and not broken.is_set() else status, *args, **how
        )
        err = hub_run(hub, directory, code=2)
        assert "002.parquet" in err and "--source" in err
        broken.set()
        hub.log.clear()
        hub_run(hub, directory)
    finally:
        Hub.reply = original
    assert npy(contents(directory)) == npy(data["shards"])
    assert not any("000.parquet" in path for _, path in hub.log)  # what was used up is not fetched again


def test_hub_without_the_data_set_or_no_hub_at_all(hub, tmp_path):
    directory = tmp_path / "out"
    assert "data set me/nothing" in hub_run(hub, directory, "--repo_id", "me/nothing", code=2)
    assert "data set a/b/c" in hub_run(hub, directory, "--repo_id", "a/b/c", code=2)
    assert "subset sample-350BT" in hub_run(hub, directory, "--remote_name", "sample-350BT", code=2)
    began = time.perf_counter()
    assert "--source" in hub_run(hub, directory, HF_ENDPOINT="http://127.0.0.1:9", code=2)
    assert time.perf_counter() - began < 10
    assert not directory.exists()


def test_at_most_two_parquet_files_at_a_time(hub, data, tmp_path):
    hub.files = {f"sample/10BT/{i:03d}.parquet": hub.files["sample/10BT/002.parquet"] for i in range(6)}
    seen, stop = set(), threading.Event()

    def watch():
        while not stop.wait(0.001):
            seen.add(len(glob.glob(f"{tmp_path}/out/parquet_00000/sample/10BT/*.parquet")))

    threading.Thread(target=watch, daemon=True).start()
    hub_run(hub, tmp_path / "out")
    stop.set()
    assert {1, 2} >= seen - {0} > set()
    hub_run(hub, tmp_path / "kept", "--keep_parquet", "--remote_name", "")
    assert len(list(tmp_path.glob("kept/parquet_00000/sample/10BT/*.parquet"))) == 6
    assert npy(contents_of_files(tmp_path / "kept")) == npy(contents(tmp_path / "out"))


def contents_of_files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_import_does_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--no-such-flag"])
    spec = importlib.util.spec_from_file_location("fineweb_imported", ROOT / "fineweb.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert capfd.readouterr() == ("", "") and not os.listdir(tmp_path)
