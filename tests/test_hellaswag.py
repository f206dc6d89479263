"""hellaswag.py: the losses of the plain method, the file for the trainer, downloads and bad input.

The plain method scores each ending by itself, with transformers: one row "context + ending".
"""

import json
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from conftest import (
    DEVICES,
    EXAMPLE,
    NO_SHAPE,
    ROOT,
    Run,
    assert_late_error,
    assert_user_error,
    call,
    limit_files,
    losses,
    random_gpt2,
    succeed,
    tiny_flags,
    write_data_set,
)

HUB_NAME = "data/validation-00000-of-00001.parquet"
REPOSITORY = "Rowan/hellaswag"


# --------------------------------------------------------------------------- the plain method
def encode_bytes(text):
    """Return the tokens of a text for the tokenizer "bytes"."""
    return list(text.encode())


@torch.no_grad()
def score_plainly(model, example, encode):
    """Return the total and mean losses of the four endings by transformers, one row per ending."""
    context = encode(example["ctx"])
    totals = []
    means = []
    for ending in example["endings"]:
        ending = encode(" " + ending)
        row = torch.tensor(context + ending)[-model.config.n_positions :]
        logits = model(row[None]).logits[0, :-1]  # (T - 1, V)
        losses_of_row = F.cross_entropy(logits, row[1:], reduction="none").double()
        losses_of_ending = losses_of_row[-len(ending) :]
        totals.append(losses_of_ending.sum().item())
        means.append(losses_of_ending.mean().item())
    return totals, means


def assert_equals_plain_method(result, model, examples, encode=encode_bytes, tolerance=1e-4):
    """Assert that the content of --output is what the plain method computes for examples."""
    num_correct = num_correct_norm = 0
    for prediction, example in zip(result["predictions"], examples, strict=True):
        label = int(example["label"])
        assert (prediction["ind"], prediction["label"]) == (example["ind"], label)
        totals, means = score_plainly(model, example, encode)
        assert prediction["losses"] == pytest.approx(totals, abs=tolerance)
        assert prediction["mean_losses"] == pytest.approx(means, abs=tolerance)
        assert prediction["pred"] == totals.index(min(totals))
        assert prediction["pred_norm"] == means.index(min(means))
        num_correct += prediction["pred"] == label
        num_correct_norm += prediction["pred_norm"] == label
    assert result["n"] == len(examples)
    assert result["acc"] == num_correct / len(examples)
    assert result["acc_norm"] == num_correct_norm / len(examples)


# ------------------------------------------------------------------------- models and examples
def make_model(directory, **changes):
    """Save a random GPT-2 whose losses differ much between endings. Returns transformers' model."""
    model = random_gpt2(directory, **{"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 160, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return model


def write_jsonl(path, examples):
    """Write examples as JSON lines, as the authors' repository had them. Returns path."""
    lines = [json.dumps(example) + "\n" for example in examples]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_parquet(path, examples):
    """Write examples as parquet with labels as text, as the Hub has them. Returns path."""
    rows = [{**example, "label": str(example["label"])} for example in examples]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def examples():
    """Return 200 examples cut from input.txt: contexts of 10 to 90 characters, endings of 5 to 60."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    rng = random.Random(0)
    examples = []
    for _ in range(200):
        start = rng.randrange(len(text) - 200)
        length = rng.randint(10, 90)
        label = rng.randrange(4)
        endings = []
        for i in range(4):
            begin = start + length if i == label else rng.randrange(len(text) - 60)
            endings.append(text[begin : begin + rng.randint(5, 60)])
        context = text[start : start + length]
        examples.append({"ind": rng.randrange(10**6), "label": label, "ctx": context, "endings": endings})
    return examples


@pytest.fixture
def tiny(tmp_path, examples):
    """Return a model, the flags for it and for 20 examples in a file, and these examples."""
    model = make_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "val.jsonl", examples[:20])
    return model, ["--model", tmp_path / "model", "--device", "cpu", "--data", data], examples[:20]


def evaluate(tmp_path, *flags):
    """Run hellaswag.py. Returns the content of --output and the printed lines."""
    done = succeed("hellaswag", *flags, "--output", tmp_path / "out.json")
    return json.loads((tmp_path / "out.json").read_text()), done.stdout.splitlines()


# ----------------------------------------------------------------- the same as the plain method
@pytest.mark.gpt2
@pytest.mark.parametrize("device", DEVICES)
def test_200_examples_equal_the_plain_method(device, tmp_path, examples):
    model = make_model(tmp_path / "model", n_layer=3, n_head=3, n_embd=48)
    data = write_jsonl(tmp_path / "val.jsonl", examples)
    flags = ["--model", tmp_path / "model", "--data", data]
    result, lines = evaluate(tmp_path, *flags, "--device", device, "--dtype", "float32")
    tolerance = 1e-4 if device == "cpu" else 0.2  # on GPUs, hellaswag.py multiplies with TF32
    assert_equals_plain_method(result, model, examples, tolerance=tolerance)
    assert lines == [f"200 acc: {result['acc']:.4f} acc_norm: {result['acc_norm']:.4f}"]
    predictions = result["predictions"]
    assert {prediction["pred"] for prediction in predictions} == {0, 1, 2, 3}
    assert any(prediction["pred"] != prediction["pred_norm"] for prediction in predictions)


@pytest.mark.gpt2
@pytest.mark.parametrize("n_positions", [12, "a length"])
def test_contexts_of_long_examples_are_cut_from_the_left(n_positions, tmp_path, examples):
    # Some examples lose a part of the context, some all of it and a part of an ending. In some only
    # one of the four endings is too long. Each ending keeps as much context as fits in front of it.
    examples = examples[:60]
    lengths = []
    for example in examples:
        lengths.append(max(len(example["ctx"]) + 1 + len(ending) for ending in example["endings"]))
    if n_positions == "a length":  # one example just fits, and one is a token too long
        n_positions = next(length for length in sorted(lengths) if length + 1 in lengths)
    num_long = sum(length > n_positions for length in lengths)
    model = make_model(tmp_path / "model", n_positions=n_positions)
    data = write_jsonl(tmp_path / "val.jsonl", examples)
    result, lines = evaluate(tmp_path, "--model", tmp_path / "model", "--data", data, "--device", "cpu")
    assert_equals_plain_method(result, model, examples)
    assert len(lines) == 2
    assert f"{num_long} of 60" in lines[0] and f" {n_positions} " in lines[0]


DIFFICULT = [
    {"ctx": "abc", "endings": ["", "b", "cd", "e"]},  # " " is the only token of an ending
    {"ctx": "a", "endings": ["first " * 10, "second", "third", "fourth"]},  # one token of context
    {"ctx": "Grüße, 世界 <|endoftext|>", "endings": ["🙂", "é\n", "<|endoftext|>", "日本"]},
    {"ctx": "x" * 30, "endings": ["ab", "cde", "f", "gh"]},
    {"ctx": "y" * 30, "endings": ["i" * 90, "j" * 80, "k", "l" * 70]},
]


@pytest.mark.gpt2
@pytest.mark.parametrize("batch_size", [1, 3, 10**6])
def test_difficult_examples_equal_the_plain_method_in_batches_of_any_size(batch_size, tmp_path, examples, monkeypatch):
    difficult = [{"ind": i, "label": i % 4, **example} for i, example in enumerate(DIFFICULT)]
    examples = examples[:10] + difficult
    model = make_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "val.jsonl", examples)
    attention = F.scaled_dot_product_attention
    batch_sizes = []

    def remember_batch_size(q, *args, **options):
        batch_sizes.append(len(q))
        return attention(q, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", remember_batch_size)
    flags = ["--model", tmp_path / "model", "--data", data, "--device", "cpu"]
    result, _ = evaluate(tmp_path, *flags, "--batch_size", batch_size)
    assert max(batch_sizes) == min(batch_size, len(examples))
    assert_equals_plain_method(result, model, examples)


@pytest.mark.gpt2
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_differ_from_float32_by_rounding_only(dtype, device, tmp_path, tiny):
    model, flags, examples = tiny
    result, _ = evaluate(tmp_path, *flags, "--device", device, "--dtype", dtype)
    actual = torch.tensor([prediction["losses"] for prediction in result["predictions"]])
    expected = torch.tensor([score_plainly(model, example, encode_bytes)[0] for example in examples])
    error = ((actual - expected).abs() / expected).max()
    assert 1e-5 < error < 0.1


@pytest.mark.gpt2
@pytest.mark.parametrize("device", DEVICES)
def test_the_trainer_finds_the_same_accuracy_in_the_prepared_file(
    device, tmp_path, examples, monkeypatch, tiktoken_cache
):
    monkeypatch.chdir(tmp_path)
    model = make_model("model", vocab_size=50257, n_embd=8)
    data = write_jsonl(tmp_path / "val.jsonl", examples[:20])
    succeed("hellaswag", "--prepare", "--data", data)
    result, _ = evaluate(tmp_path, "--model", "model", "--data", data, "--device", device, "--dtype", "float32")
    tolerance = 1e-4 if device == "cpu" else 0.2
    assert_equals_plain_method(result, model, examples[:20], tiktoken.get_encoding("gpt2").encode, tolerance)

    # one step with a learning rate so small that no prediction changes
    tokens = np.random.default_rng(0).integers(50256, size=500)
    write_data_set("data", [tokens], [tokens], vocab_size=50257)
    from_model = {**NO_SHAPE, "block_size": 160, "init_from": "model"}
    one_step = {"total_batch_size": 160, "micro_batch_size": 1, "max_steps": 1, "learning_rate": 1e-9}
    paths = {"data_dir": "data", "log_dir": "log", "prompt": None}
    flags = tiny_flags(**from_model, **one_step, **paths, val_tokens=160, hellaswag_interval=1, device=device)
    succeed("train_gpt2", *flags, "--dtype", "float32", "--no-compile")
    # on a GPU, rounding may decide one example
    tolerance = 1e-4 if device == "cpu" else 1.5 / 20
    assert losses("log", "hella")[1] == pytest.approx(result["acc_norm"], abs=tolerance)


# ------------------------------------------------------------------------------ flags and files
def test_limit_takes_the_first_examples(tmp_path, tiny):
    model, flags, examples = tiny
    torch.backends.cuda.enable_cudnn_sdp(True)
    result, lines = evaluate(tmp_path, *flags, "--limit", 7)
    # cuDNN's attention makes a new plan for each length, which is slow
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert_equals_plain_method(result, model, examples[:7])
    assert lines[-1].startswith("7 acc: ")
    assert evaluate(tmp_path, *flags, "--limit", 1000)[0]["n"] == 20


def test_the_newest_checkpoint_of_log_is_the_default(tmp_path, tiny, monkeypatch):
    _, flags, examples = tiny
    make_model(tmp_path / "log" / "step_000500")
    newest = make_model(tmp_path / "log" / "step_1000000")
    make_model(tmp_path / "log" / "tmp_step_2000000")
    monkeypatch.chdir(tmp_path)
    done = succeed("hellaswag", *flags[2:], "--output", "out.json")
    assert done.stderr.count("\n") == 1  # which model it is, and no progress bar without a terminal
    assert os.path.join("log", "step_1000000") in done.stderr
    assert f"{newest.num_parameters():,}" in done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert_equals_plain_method(result, newest, examples)
    assert result["model"] == os.path.join("log", "step_1000000")


def test_json_lines_may_have_a_byte_order_mark_windows_line_ends_and_blank_lines_at_the_end(tmp_path, tiny):
    model, flags, examples = tiny
    path = flags[-1]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\n  \r\n")
    result, _ = evaluate(tmp_path, *flags)
    assert_equals_plain_method(result, model, examples)


def test_prepare_writes_the_arrays_that_the_trainer_reads(tmp_path, examples, monkeypatch, tiktoken_cache):
    monkeypatch.chdir(tmp_path)
    data = write_parquet(tmp_path / "val.parquet", examples)
    os.mkdir("hellaswag")  # exists if the examples were downloaded
    succeed("hellaswag", "--prepare", "--data", data, "--limit", 150)
    assert os.listdir("hellaswag") == ["hellaswag_val.npz"]

    # the expected rows, sorted by the length of the longest row
    encode = tiktoken.get_encoding("gpt2").encode
    expected = []
    for example in examples[:150]:
        context = encode(example["ctx"])
        rows = [context + encode(" " + ending) for ending in example["endings"]]
        expected.append((max(map(len, rows)), len(context), rows, example["label"]))
    expected.sort(key=lambda item: item[0])  # stable

    with np.load("hellaswag/hellaswag_val.npz", allow_pickle=False) as file:
        arrays = dict(file)
    dtypes = {name: array.dtype for name, array in arrays.items()}
    assert dtypes == {"tokens": np.uint16, "context_length": np.int64, "length": np.int64, "label": np.int64}
    assert arrays["tokens"].shape == (150, 4, expected[-1][0])
    assert arrays["context_length"].tolist() == [item[1] for item in expected]
    assert arrays["label"].tolist() == [item[3] for item in expected]
    for i, (_, _, rows, _) in enumerate(expected):
        assert arrays["length"][i].tolist() == [len(row) for row in rows]
        for j, row in enumerate(rows):
            assert arrays["tokens"][i, j, : len(row)].tolist() == row
            assert not arrays["tokens"][i, j, len(row) :].any()


def test_prepare_keeps_the_old_file_if_the_disk_is_full(tmp_path, examples, monkeypatch, tiktoken_cache):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hellaswag" / "hellaswag_val.npz"
    data = write_jsonl(tmp_path / "val.jsonl", examples[:5])
    succeed("hellaswag", "--prepare", "--data", data)
    before = path.read_bytes()
    write_jsonl(data, examples)
    [done] = Run("--prepare", "--data", data, script="hellaswag", before=lambda rank: limit_files(5000)).wait()
    assert_user_error(done, path.name)
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------ bad input
BAD_LINES = {
    "cut off": json.dumps(EXAMPLE)[:-5],
    "no label": json.dumps({name: value for name, value in EXAMPLE.items() if name != "label"}),
    "label -1": json.dumps({**EXAMPLE, "label": -1}),
    "three endings": json.dumps({**EXAMPLE, "endings": ["b", "c", "d"]}),
    "an empty context": json.dumps({**EXAMPLE, "ctx": ""}),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_malformed_line_is_named(name, tmp_path, tiny):
    data = tmp_path / "bad.jsonl"
    data.write_text("\n".join([json.dumps(EXAMPLE), BAD_LINES[name], json.dumps(EXAMPLE)]))
    assert_user_error(call("hellaswag", *tiny[1], "--data", data), "line 2", data)


def test_a_malformed_row_of_parquet_is_named(tmp_path, tiny):
    data = write_parquet(tmp_path / "bad.parquet", [EXAMPLE, EXAMPLE, {**EXAMPLE, "label": 4}])
    assert_user_error(call("hellaswag", *tiny[1], "--data", data), "line 3", data, 4)


def test_losses_that_are_nan_are_one_line(tmp_path, tiny):
    model, flags, _ = tiny
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    done = call("hellaswag", *flags, "--output", tmp_path / "out.json")
    assert_late_error(done, "nan", "--dtype float32")
    assert not (tmp_path / "out.json").exists()


def test_a_batch_that_does_not_fit_into_memory_is_one_line(tiny, monkeypatch):
    def attention(*args, **options):
        return torch.empty(2**50)  # a petabyte: PyTorch's own error

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    assert_late_error(call("hellaswag", *tiny[1]), "--batch_size")


# ------------------------------------------------------------------------------------- download
@pytest.fixture
def download(tmp_path, hub, monkeypatch):
    """Let the Hub have a validation set. Returns the flags to use it."""
    monkeypatch.chdir(tmp_path)
    make_model("model")
    examples = [{**EXAMPLE, "ind": i, "label": i % 4} for i in range(50)]
    content = write_parquet(tmp_path / "hub.parquet", examples).read_bytes()
    hub.files[REPOSITORY] = {"README.md": b"hello", HUB_NAME: content}
    return ["--model", "model", "--device", "cpu", "--limit", 5, "--output", "out.json"]


def test_the_validation_set_is_downloaded_once(hub, download):
    succeed("hellaswag", *download)
    requests = list(hub.log)
    succeed("hellaswag", *download)
    assert hub.log == requests
    with open("out.json", encoding="utf-8") as file:
        assert [prediction["ind"] for prediction in json.load(file)["predictions"]] == [0, 1, 2, 3, 4]
    assert sum(request.startswith("GET /datasets") for request in hub.log) == 1
    assert os.listdir("hellaswag") == ["hellaswag_val.parquet"]
    with open("hellaswag/hellaswag_val.parquet", "rb") as file:
        assert file.read() == hub.files[REPOSITORY][HUB_NAME]


@pytest.mark.parametrize("trouble", ["damaged", 404, "offline"])
def test_a_failed_download_leaves_nothing_and_the_next_one_works(trouble, tmp_path, hub, download, monkeypatch):
    with monkeypatch.context() as patch:
        if trouble == "offline":
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        else:
            hub.trouble = [("GET /datasets", trouble)]
        assert_user_error(call("hellaswag", *download), REPOSITORY, "--data")
    assert list((tmp_path / "hellaswag").glob("*")) == []
    succeed("hellaswag", *download)
