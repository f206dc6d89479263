"""hellaswag.py: predictions and losses of the plain method, what it writes, and everything that can be wrong."""

import http.server
import json
import os
import random
import shutil
import subprocess
import threading

import huggingface_hub
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, call, command, load, run
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

hellaswag = load("hellaswag")
BYTES = hellaswag.get_tokenizer("bytes")


# ------------------------------------------------------------------------------------ the plain method
def encode(example, enc):
    """The (context, four endings) of a line of HellaSwag as lists of ids."""
    return enc.encode(example["ctx"]), [enc.encode(" " + ending) for ending in example["endings"]]


@torch.no_grad()
def plain(model, example, enc):
    """Four summed and four mean losses by transformers: a row for each ending, the context in all of them."""
    context, endings = encode(example, enc)
    n = model.config.n_positions
    rows = [torch.tensor(context + ending)[-n:] for ending in endings]
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (4, T); no id sees the padding to its right
    logits = model(idx).logits[:, :-1].flatten(0, 1)  # (4 (T - 1), V)
    losses = F.cross_entropy(logits, idx[:, 1:].flatten(), reduction="none").view(4, -1)
    of_endings = [row[: len(ids) - 1][-len(ending) :] for row, ids, ending in zip(losses, rows, endings, strict=True)]
    return [row.double().sum().item() for row in of_endings], [row.double().mean().item() for row in of_endings]


def check(result, model, examples, enc):
    """The content of --output is what the plain method finds for examples."""
    assert result["n"] == len(result["predictions"]) == len(examples)
    right = right_norm = 0
    for prediction, example in zip(result["predictions"], examples, strict=True):
        assert (prediction["ind"], prediction["label"]) == (example["ind"], example["label"])
        sums, means = plain(model, example, enc)
        assert prediction["losses"] == pytest.approx(sums, abs=1e-4)
        assert prediction["mean_losses"] == pytest.approx(means, abs=1e-4)
        assert prediction["pred"] == sums.index(min(sums))
        assert prediction["pred_norm"] == means.index(min(means))
        right += sums.index(min(sums)) == example["label"]
        right_norm += means.index(min(means)) == example["label"]
    assert (result["acc"], result["acc_norm"]) == (right / len(examples), right_norm / len(examples))


# ---------------------------------------------------------------------------------- models and examples
def make_examples(text, n, unit, seed=0):
    """n examples cut from text: contexts of 10 to 90 units (words or letters), endings of 5 to 60."""
    rng, pieces = random.Random(seed), text.split() if unit == "words" else text

    def span(start, length):
        part = pieces[start : start + length]
        return " ".join(part) if unit == "words" else part

    examples = []
    for _ in range(n):
        start, length, label = rng.randrange(len(pieces) - 200), rng.randint(10, 90), rng.randrange(4)
        endings = [span(rng.randrange(len(pieces) - 60), rng.randint(5, 60)) for _ in range(4)]
        endings[label] = span(start + length, rng.randint(5, 60))
        example = {"ind": rng.randrange(10**6), "label": label, "ctx": span(start, length), "endings": endings}
        examples.append(example | {"split": "val", "activity_label": "Drama"})
    return examples


def make_model(directory, tokenizer="bytes", seed=0, **shape):
    """A random transformers GPT-2, opinionated enough that its losses differ, and its checkpoint in directory."""
    torch.manual_seed(seed)
    shape = dict(n_layer=2, n_head=2, n_embd=32, n_positions=160) | shape
    vocab_size = {"bytes": 257, "gpt2": 50257}[tokenizer]
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    change_config(directory, tokenizer=tokenizer)
    return model


def change_config(directory, **changes):
    """Set values in a checkpoint's config.json; None drops them."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def write_lines(path, examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def letters():
    """500 examples of input.txt, measured in letters: tokens of bytes."""
    return make_examples((ROOT / "input.txt").read_text(encoding="utf-8"), 500, "letters")


@pytest.fixture
def tiny(tmp_path, letters):
    """(a model, flags for it and for 20 examples in tmp_path, the examples)."""
    model, data = make_model(tmp_path / "model"), write_lines(tmp_path / "val.jsonl", letters[:20])
    return model, ["--model", tmp_path / "model", "--data", data, "--device", "cpu"], letters[:20]


def score(tmp_path, *flags):
    """The content of --output after a run with flags, and the lines it printed."""
    done = call("hellaswag", *flags, "--output", tmp_path / "out.json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads((tmp_path / "out.json").read_text()), done.stdout.splitlines()


# -------------------------------------------------------------------------------- the same as the plain way
SHAPES = [
    dict(),
    dict(n_layer=1, n_head=4, n_embd=48, n_inner=40, activation_function="relu"),
    dict(n_layer=3, n_head=1, n_embd=16, activation_function="gelu", layer_norm_epsilon=1e-3),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_500_examples_as_one_at_a_time(tmp_path, letters, shape):
    model, data = make_model(tmp_path / "model", **shape), write_lines(tmp_path / "val.jsonl", letters)
    result, lines = score(tmp_path, "--model", tmp_path / "model", "--data", data, "--device", "cpu")
    check(result, model, letters, BYTES)
    assert lines == [f"500 acc: {result['acc']:.4f} acc_norm: {result['acc_norm']:.4f}"]
    assert len({prediction["pred"] for prediction in result["predictions"]}) == 4
    assert any(prediction["pred"] != prediction["pred_norm"] for prediction in result["predictions"])


def test_gpt2_tokens_of_books_as_one_at_a_time(tmp_path, tiktoken_cache):
    books = sorted((SHARED / "data" / "books").glob("*.parquet"))
    if not books:
        pytest.skip("the books are not in ../shared/data/books")
    text = " ".join(pq.ParquetFile(books[0]).read_row_group(0, columns=["text"]).column(0).to_pylist()[:200])
    examples, enc = make_examples(text, 12, "words"), hellaswag.get_tokenizer("gpt2")
    model = make_model(tmp_path / "model", "gpt2", n_embd=8, n_positions=256)
    change_config(tmp_path / "model", tokenizer=None)  # as Hugging Face's: known by its size
    data = write_lines(tmp_path / "val.jsonl", examples)
    result, _ = score(tmp_path, "--model", tmp_path / "model", "--data", data, "--device", "cpu")
    check(result, model, examples, enc)


@pytest.mark.parametrize("n_positions", [12, 40, 100])
def test_too_long_examples_lose_the_beginning(tmp_path, letters, n_positions):
    """Some by a part of the context, some by all of it and more, some with one ending of the four alone."""
    examples = letters[:60]
    model = make_model(tmp_path / "model", n_positions=n_positions)
    data = write_lines(tmp_path / "val.jsonl", examples)
    result, lines = score(tmp_path, "--model", tmp_path / "model", "--data", data, "--device", "cpu")
    check(result, model, examples, BYTES)
    long = sum(
        max(len(example["ctx"]) + 1 + len(ending) for ending in example["endings"]) > n_positions
        for example in examples
    )
    assert lines[0].startswith(f"{long} of 60 examples are longer than {n_positions} tokens") and long
    assert len(lines) == 2


def test_an_example_that_just_fits_is_not_cut(tmp_path):
    example = {"ind": 1, "label": 0, "ctx": "x" * 20, "endings": ["a" * 10, "b" * 10, "c" * 10, "d"]}
    data = write_lines(tmp_path / "val.jsonl", [example])
    for n_positions in (31, 30):
        model = make_model(tmp_path / f"{n_positions}", n_positions=n_positions)
        result, lines = score(tmp_path, "--model", tmp_path / f"{n_positions}", "--data", data, "--device", "cpu")
        check(result, model, [example], BYTES)
        assert len(lines) == 1 + (n_positions == 30)


def test_letters_of_several_bytes_and_the_name_of_a_special_token_are_text(tmp_path):
    example = {
        "ind": "a",
        "label": 3,
        "ctx": "Grüße, 世界 <|endoftext|>",
        "endings": ["🙂", "", "<|endoftext|>", "é\n"],
    }
    model, data = make_model(tmp_path / "model"), write_lines(tmp_path / "val.jsonl", [example])
    result, _ = score(tmp_path, "--model", tmp_path / "model", "--data", data, "--device", "cpu")
    texts = {name: value for name, value in example.items()}
    encoding = type("Ordinary", (), {"encode": staticmethod(lambda text: list(text.encode()))})
    check(result, model, [texts], encoding)


@pytest.mark.parametrize("batch_tokens", [1, 700, 10**6])
def test_batch_tokens_change_nothing(tmp_path, tiny, batch_tokens):
    model, flags, examples = tiny
    result, _ = score(tmp_path, *flags, "--batch_tokens", batch_tokens)
    check(result, model, examples, BYTES)


def test_batches_keep_to_batch_tokens_and_hold_what_is_alike_in_length(letters):
    shapes = []

    class Spy:
        def hidden(self, idx, pos, mask):
            shapes.append((len(idx), idx.shape[1]))
            assert mask.shape == (len(idx), 1, idx.shape[1], idx.shape[1])
            assert pos.max() < 160
            return torch.zeros(*idx.shape, 4)

        def logits(self, hidden):
            rows.append(len(hidden))
            return torch.zeros(*hidden.shape[:-1], 257)

    rows, examples = [], [(0, 0, *encode(example, BYTES)) for example in letters]
    scores = list(hellaswag.score_hellaswag(Spy(), examples, 160, 4000, torch.device("cpu")))
    assert sorted(i for i, _, _ in scores) == list(range(500))
    assert all(B * T <= 4000 for B, T in shapes)
    assert [T for _, T in shapes] == sorted((T for _, T in shapes), reverse=True)
    tokens = sum(len(context) + sum(len(ending) - 1 for ending in endings) for _, _, context, endings in examples)
    assert sum(B * T for B, T in shapes) < 1.1 * tokens, "padding is less than a tenth"
    assert sum(rows) == sum(1 + sum(len(ending) - 1 for ending in endings) for *_, endings in examples), "logits"


def test_16_bits_differ_by_rounding(tmp_path, tiny):
    model, flags, examples = tiny
    result, _ = score(tmp_path, *flags, "--dtype", "bfloat16")
    sums = [plain(model, example, BYTES)[0] for example in examples]
    errors = torch.tensor([prediction["losses"] for prediction in result["predictions"]]) - torch.tensor(sums)
    assert 1e-4 < (errors.abs() / torch.tensor(sums)).max() < 0.1


# ----------------------------------------------------------------------------------------- command line
def test_limit_takes_the_first(tmp_path, tiny):
    model, flags, examples = tiny
    result, lines = score(tmp_path, *flags, "--limit", 7)
    check(result, model, examples[:7], BYTES)
    assert lines[-1].startswith("7 acc: ")
    assert score(tmp_path, *flags, "--limit", 1000)[0]["n"] == 20


def test_output_holds_what_is_promised_and_nothing_else_is_written(tmp_path, tiny):
    before = {path.name for path in tmp_path.iterdir()}
    result, _ = score(tmp_path, *tiny[1])
    assert {path.name for path in tmp_path.iterdir()} - before == {"out.json"}
    assert sorted(result) == ["acc", "acc_norm", "model", "n", "predictions"]
    assert result["model"] == str(tmp_path / "model")
    for prediction in result["predictions"]:
        assert sorted(prediction) == ["ind", "label", "losses", "mean_losses", "pred", "pred_norm"]
        assert [len(prediction[name]) for name in ("losses", "mean_losses")] == [4, 4]


def test_newest_checkpoint_of_log_by_default_in_a_process(tmp_path, tiny):
    _, flags, examples = tiny
    steps = {
        f"step_{step:06d}": make_model(tmp_path / "log" / f"step_{step:06d}", seed=step) for step in (500, 1000000)
    }
    make_model(tmp_path / "log" / "tmp_step_2000000")
    (tmp_path / "log" / "log.txt").touch()
    done = run("hellaswag", *flags[2:], "--output", "out.json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), "no bar where there is no terminal"
    result = json.loads((tmp_path / "out.json").read_text())
    check(result, steps["step_1000000"], examples, BYTES)
    assert result["model"] == "log/step_1000000"
    older, _ = score(tmp_path, "--model", tmp_path / "log" / "step_000500", *flags[2:])
    check(older, steps["step_000500"], examples, BYTES)


def test_a_checkpoint_of_train_gpt2_scores_as_transformers_says(tmp_path, letters):
    trainer = load("train_gpt2")
    trainer.GPT(trainer.GPTConfig(257, 160, 2, 2, 32, tokenizer="bytes")).save_pretrained(tmp_path / "model")
    data = write_lines(tmp_path / "val.jsonl", letters[:20])
    result, _ = score(tmp_path, "--model", tmp_path / "model", "--data", data, "--device", "cpu")
    check(result, GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval(), letters[:20], BYTES)


# -------------------------------------------------------------------------------------------- bad input
def check_error(done, *words):
    """A user's mistake: status 2 and one line on stderr with these words; no last line that looks like a result."""
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "acc" not in done.stdout
    for word in words:
        assert str(word) in done.stderr


def test_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_error(call("hellaswag", "--device", "cpu"), "log", "train_gpt2.py", "--model")
    (tmp_path / "log").mkdir()
    check_error(call("hellaswag", "--device", "cpu"), "log", "nothing", "--model")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_directory_that_is_no_gpt2_names_what_it_holds(tmp_path, tiny):
    flags = tiny[1][2:]
    (tmp_path / "empty").mkdir()
    check_error(call("hellaswag", "--model", tmp_path / "empty", *flags), tmp_path / "empty", "nothing")
    (tmp_path / "empty" / "notes.txt").touch()
    check_error(call("hellaswag", "--model", tmp_path / "empty", *flags), tmp_path / "empty", "notes.txt")


def change_tensors(path, head=False, dtype=None):
    """Give the model at path a head that is not its embedding, or tensors of another dtype."""
    tensors = load_file(path / "model.safetensors")
    if head:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path / "model.safetensors")


DAMAGE = {
    "another model": (lambda path: change_config(path, model_type="llama"), ["model_type", "llama"]),
    "another activation": (lambda path: change_config(path, activation_function="silu"), ["silu"]),
    "untied head": (lambda path: change_config(path, tie_word_embeddings=False), ["tie_word_embeddings"]),
    "wider": (lambda path: change_config(path, n_embd=64), ["wte.weight", "(257, 32)", "(257, 64)"]),
    "deeper": (lambda path: change_config(path, n_layer=3), ["2 blocks", "n_layer is 3"]),
    "heads": (lambda path: change_config(path, n_head=5), ["n_head 5", "n_embd 32"]),
    "nonsense": (lambda path: change_config(path, n_layer="two"), []),
    "no JSON": (lambda path: (path / "config.json").write_text("{"), []),
    "a list": (lambda path: (path / "config.json").write_text("[]"), []),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), ["model.safetensors"]),
    "half the weights": (lambda path: os.truncate(path / "model.safetensors", 9999), []),
    "another tokenizer": (lambda path: change_config(path, tokenizer="gpt2"), ["257", "gpt2"]),
    "an unknown tokenizer": (lambda path: change_config(path, tokenizer=["sentencepiece"]), ["sentencepiece"]),
    "fewer blocks": (lambda path: change_config(path, n_layer=1), ["2 blocks", "n_layer is 1"]),
    "a text for a number": (lambda path: change_config(path, n_head="2"), ["n_head", "'2'"]),
    "a text for epsilon": (lambda path: change_config(path, layer_norm_epsilon="1e-5"), ["layer_norm_epsilon"]),
    "a head of its own": (lambda path: change_tensors(path, head=True), ["lm_head.weight"]),
    "whole numbers": (lambda path: change_tensors(path, dtype=torch.int8), ["torch.int8"]),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_model(tmp_path, tiny, what):
    damage, words = DAMAGE[what]
    damage(tmp_path / "model")
    check_error(call("hellaswag", *tiny[1]), tmp_path / "model", *words)


def test_weights_that_overflow(tmp_path, tiny):
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor.fill_(float("nan")) for name, tensor in tensors.items()}, path, {"format": "pt"})
    check_error(call("hellaswag", *tiny[1], "--output", tmp_path / "out.json"), "nan", "--model")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_name_without_a_network_names_the_directory_form(tiny, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    done = call("hellaswag", "--model", "gpt2", *tiny[1][2:])
    check_error(done, "gpt2", "hub", "directory", "config.json", "model.safetensors")


def test_a_name_that_no_hub_takes(tiny):
    check_error(call("hellaswag", "--model", "no/such/directory", *tiny[1][2:]), "no/such/directory")


GOOD = {"ind": 5, "label": 1, "ctx": "a", "endings": ["b", "c", "d", "e"]}
LINES = {
    "no JSON": ("{'ind': 5", []),
    "cut off": (json.dumps(GOOD)[:-5], []),
    "no object": ("[1, 2]", []),
    "empty line": ("", []),
    "not UTF-8": (b'{"ind": 5, "ctx": "\xff"}', []),
    "no label": (json.dumps({name: value for name, value in GOOD.items() if name != "label"}), ["'label'"]),
    "label 4": (json.dumps(GOOD | {"label": 4}), ["label", "4"]),
    "label of text": (json.dumps(GOOD | {"label": "1"}), ["label", "'1'"]),
    "label true": (json.dumps(GOOD | {"label": True}), ["label", "True"]),
    "label below 0": (json.dumps(GOOD | {"label": -1}), ["label", "-1"]),
    "three endings": (json.dumps(GOOD | {"endings": ["b", "c", "d"]}), ["endings"]),
    "an ending of numbers": (json.dumps(GOOD | {"endings": ["b", "c", "d", [1]]}), ["endings"]),
    "endings in one text": (json.dumps(GOOD | {"endings": "bcde"}), ["endings"]),
    "no context": (json.dumps(GOOD | {"ctx": ""}), ["ctx"]),
    "a context of numbers": (json.dumps(GOOD | {"ctx": 7}), ["ctx"]),
}


@pytest.mark.parametrize("what", LINES)
def test_a_malformed_line_is_named(tmp_path, tiny, what):
    line, words = LINES[what]
    line = line if isinstance(line, bytes) else line.encode()
    data = tmp_path / "val.jsonl"
    data.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n" + json.dumps(GOOD).encode() + b"\n")
    check_error(call("hellaswag", *tiny[1]), "line 2", data, "--data", *words)


def test_data_that_is_not_there_or_empty(tmp_path, tiny):
    flags = tiny[1][:2]
    check_error(call("hellaswag", *flags, "--data", tmp_path / "nowhere"), tmp_path / "nowhere", "--data")
    check_error(call("hellaswag", *flags, "--data", tmp_path), tmp_path, "--data")
    (tmp_path / "empty").touch()
    check_error(call("hellaswag", *flags, "--data", tmp_path / "empty"), tmp_path / "empty", "--data")


@pytest.mark.parametrize("flag", ["--limit", "--batch_tokens"])
@pytest.mark.parametrize("value", [0, -3, "many"])
def test_numbers_that_cannot_be(tiny, flag, value):
    check_error(call("hellaswag", *tiny[1], flag, value), flag, value)


def test_output_that_cannot_be_written(tmp_path, tiny):
    for path in (tmp_path, tmp_path / "nowhere" / "out.json"):
        check_error(call("hellaswag", *tiny[1], "--output", path), "--output", path)
    shutil.rmtree(tmp_path / "model")
    done = call("hellaswag", *tiny[1], "--output", tmp_path / "nowhere" / "out.json")
    check_error(done, "--output")  # said before anything slow begins


def test_standard_output_that_is_full(tmp_path, tiny):
    with open("/dev/full", "w") as full:
        line = command("hellaswag", *tiny[1])
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "No space left" in done.stderr


def test_device_that_is_not_there(tiny):
    check_error(call("hellaswag", *tiny[1][:4], "--device", "cuda:99"), "--device", "cuda:99")


# --------------------------------------------------------------------------------------------- download
@pytest.fixture
def server():
    """A web server on this machine that answers with server.body, promising server.length bytes; it keeps count."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.count += 1
            self.send_response(server.status)
            self.send_header("Content-Length", str(server.length or len(server.body)))
            self.end_headers()
            self.wfile.write(server.body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.count, server.status, server.length = 0, 200, None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def download(tmp_path, tiny, server, monkeypatch):
    """A function that runs hellaswag.py in tmp_path against the server, where a validation set has 20 examples."""
    server.body = (tmp_path / "val.jsonl").read_bytes()
    script = load("hellaswag")
    assert script.HELLASWAG_SIZE == 10042
    monkeypatch.setattr(script, "HELLASWAG_SIZE", 20)
    monkeypatch.setattr(script, "HELLASWAG_URL", f"http://127.0.0.1:{server.server_port}/val.jsonl")
    monkeypatch.chdir(tmp_path)
    return lambda: call(script, *tiny[1][:2], "--device", "cpu", "--output", "out.json")


def test_download_happens_once(tmp_path, tiny, server, download):
    for _ in range(2):
        assert download().returncode == 0
        check(json.loads((tmp_path / "out.json").read_text()), tiny[0], tiny[2], BYTES)
    assert server.count == 1
    assert [path.name for path in (tmp_path / "hellaswag").iterdir()] == ["hellaswag_val.jsonl"]
    assert (tmp_path / "hellaswag" / "hellaswag_val.jsonl").read_bytes() == server.body


def break_body(server, what):
    lines = server.body.splitlines(keepends=True)
    if what == "breaks off":
        server.length, server.body = len(server.body), server.body[:-700]
    elif what == "too few":
        server.body = b"".join(lines[:-1])
    elif what == "too many":
        server.body += lines[0]
    elif what == "cut in a line":
        server.body = server.body[:-30]
    elif what == "a page":
        server.body = b"<html>Sign in</html>"
    elif what == "not found":
        server.status = 404
    elif what == "nobody":
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "what", ["breaks off", "too few", "too many", "cut in a line", "a page", "not found", "nobody"]
)
def test_a_download_that_fails_leaves_nothing(tmp_path, server, download, what):
    break_body(server, what)
    check_error(download(), f"http://127.0.0.1:{server.server_port}/val.jsonl", "--data")
    assert not (tmp_path / "hellaswag").exists() or not list((tmp_path / "hellaswag").iterdir())
    assert not (tmp_path / "out.json").exists()


def test_a_validation_set_with_lines_missing_is_refused(tmp_path, server, download):
    (tmp_path / "hellaswag").mkdir()
    path = tmp_path / "hellaswag" / "hellaswag_val.jsonl"
    path.write_bytes(server.body[: server.body.index(b"\n") + 1])
    check_error(download(), "hellaswag/hellaswag_val.jsonl", "1 examples", "20")
    assert server.count == 0
