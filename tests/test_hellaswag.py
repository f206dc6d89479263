"""hellaswag.py: losses and predictions of the plain method, its files, downloads and errors."""

import contextlib
import hashlib
import http.server
import json
import os
import random
import shutil
import subprocess
import threading
import types
import urllib.parse

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, assert_user_error, call, command, load, run
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

hellaswag = load("hellaswag")


# --------------------------------------------------------------------------- the plain method
class BytesTokenizer:
    """A second implementation of the tokenizer "bytes": the tokens of a text are its UTF-8 bytes."""

    def encode(self, text):
        return list(text.encode())


BYTES = BytesTokenizer()


@torch.no_grad()
def score_plainly(model, example, tokenizer):
    """Return total and mean losses of the four endings by transformers, one complete row per ending."""
    context = tokenizer.encode(example["ctx"])
    totals = []
    means = []
    for ending in example["endings"]:
        ending = tokenizer.encode(" " + ending)
        row = torch.tensor(context + ending)[-model.config.n_positions :]
        logits = model(row[None]).logits[0, :-1]  # (T - 1, V)
        losses = F.cross_entropy(logits, row[1:], reduction="none").double()
        losses = losses[-len(ending) :]  # without the context
        totals.append(losses.sum().item())
        means.append(losses.mean().item())
    return totals, means


def assert_equals_plain_method(result, model, examples, tokenizer):
    """Assert that the content of --output is what the plain method computes for examples."""
    assert result["n"] == len(result["predictions"]) == len(examples)
    num_correct = num_correct_norm = 0
    for prediction, example in zip(result["predictions"], examples, strict=True):
        label = int(example["label"])
        assert (prediction["ind"], prediction["label"]) == (example["ind"], label)
        totals, means = score_plainly(model, example, tokenizer)
        assert prediction["losses"] == pytest.approx(totals, abs=1e-4)
        assert prediction["mean_losses"] == pytest.approx(means, abs=1e-4)
        assert prediction["pred"] == totals.index(min(totals))
        assert prediction["pred_norm"] == means.index(min(means))
        num_correct += totals.index(min(totals)) == label
        num_correct_norm += means.index(min(means)) == label
    assert result["acc"] == num_correct / len(examples)
    assert result["acc_norm"] == num_correct_norm / len(examples)


# ------------------------------------------------------------------------- models and examples
def make_examples(pieces, n, separator=" ", seed=0):
    """Return n examples of spans of pieces: contexts of 10 to 90 pieces, endings of 5 to 60."""
    rng = random.Random(seed)
    examples = []
    for _ in range(n):
        start = rng.randrange(len(pieces) - 200)
        length = rng.randint(10, 90)
        label = rng.randrange(4)
        endings = []
        for i in range(4):
            begin = start + length if i == label else rng.randrange(len(pieces) - 60)
            endings.append(separator.join(pieces[begin : begin + rng.randint(5, 60)]))
        example = {
            "ind": rng.randrange(10**6),
            "activity_label": "Drama",
            "ctx": separator.join(pieces[start : start + length]),
            "endings": endings,
            "split": "val",
            "label": label,
        }
        examples.append(example)
    return examples


def make_model(directory, tokenizer="bytes", seed=0, **shape):
    """Save a random GPT-2 whose losses differ much between endings. Returns transformers' model."""
    torch.manual_seed(seed)
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 160}
    settings.update(shape)
    vocab_size = {"bytes": 257, "gpt2": 50257}[tokenizer]
    config = GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **settings)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return model


def edit_config(directory, **changes):
    """Change values in the config.json of a model."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def write_jsonl(path, examples):
    """Write examples as JSON lines, as the authors' repository had them. Returns path."""
    lines = [json.dumps(example) for example in examples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(path, examples):
    """Write examples as parquet, with labels as text, as the Hub has them. Returns path."""
    columns = {}
    for name in examples[0]:
        columns[name] = [example[name] for example in examples]
    columns["label"] = [str(label) for label in columns["label"]]
    table = pa.table(columns)
    pq.write_table(table.set_column(0, "ind", table["ind"].cast(pa.int32())), path)
    return path


@pytest.fixture(scope="module")
def examples():
    """Return 500 examples of input.txt whose pieces are characters, that is, byte tokens."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    return make_examples(text, 500, separator="")


@pytest.fixture
def tiny(tmp_path, examples):
    """Return a model, the flags for it and for 20 examples in a file, and these examples."""
    model = make_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "val.jsonl", examples[:20])
    flags = ["--model", tmp_path / "model", "--data", data, "--device", "cpu"]
    return model, flags, examples[:20]


def evaluate(tmp_path, *flags):
    """Run hellaswag.py. Returns the content of --output and the printed lines."""
    done = call("hellaswag", *flags, "--output", tmp_path / "out.json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads((tmp_path / "out.json").read_text()), done.stdout.splitlines()


# ----------------------------------------------------------------- the same as the plain method
SHAPES = [
    {},
    {"n_layer": 1, "n_head": 4, "n_embd": 48, "n_inner": 40, "activation_function": "relu"},
    {"n_layer": 3, "n_head": 1, "n_embd": 16, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_500_examples_equal_the_plain_method(tmp_path, examples, shape):
    model = make_model(tmp_path / "model", **shape)
    data = write_jsonl(tmp_path / "val.jsonl", examples)
    flags = ["--model", tmp_path / "model", "--data", data, "--device", "cpu"]
    result, lines = evaluate(tmp_path, *flags)
    assert_equals_plain_method(result, model, examples, BYTES)
    assert lines == [f"500 acc: {result['acc']:.4f} acc_norm: {result['acc_norm']:.4f}"]
    predictions = result["predictions"]
    assert {prediction["pred"] for prediction in predictions} == {0, 1, 2, 3}
    assert any(prediction["pred"] != prediction["pred_norm"] for prediction in predictions)


def test_gpt2_tokens_of_books_equal_the_plain_method(tmp_path, tiktoken_cache):
    books = sorted((SHARED / "data" / "books").glob("*.parquet"))
    if not books:
        pytest.skip("the books are not in ../shared/data/books")
    texts = pq.ParquetFile(books[0]).read_row_group(0, columns=["text"]).column(0).to_pylist()
    examples = make_examples(" ".join(texts[:200]).split(), 12)
    model = make_model(tmp_path / "model", "gpt2", n_embd=8, n_positions=256)
    data = write_jsonl(tmp_path / "val.jsonl", examples)
    flags = ["--model", tmp_path / "model", "--data", data, "--device", "cpu"]
    result, _ = evaluate(tmp_path, *flags)
    assert_equals_plain_method(result, model, examples, hellaswag.get_tokenizer("gpt2"))


@pytest.mark.parametrize("n_positions", [12, 40, 100])
def test_contexts_of_long_examples_are_cut_from_the_left(tmp_path, examples, n_positions):
    # Some examples lose a part of the context, some all of it and a part of the ending; in some
    # only one of the four endings is too long.
    examples = examples[:60]
    model = make_model(tmp_path / "model", n_positions=n_positions)
    data = write_jsonl(tmp_path / "val.jsonl", examples)
    flags = ["--model", tmp_path / "model", "--data", data, "--device", "cpu"]
    result, lines = evaluate(tmp_path, *flags)
    assert_equals_plain_method(result, model, examples, BYTES)
    num_long = 0
    for example in examples:
        longest = max(len(example["ctx"]) + 1 + len(ending) for ending in example["endings"])
        num_long += longest > n_positions
    assert num_long > 0
    assert len(lines) == 2
    assert lines[0].startswith(f"{num_long} of 60 examples are longer than {n_positions} tokens")


@pytest.mark.parametrize("n_positions, num_messages", [(31, 0), (30, 1)])
def test_an_example_that_just_fits_is_not_cut(tmp_path, n_positions, num_messages):
    endings = ["a" * 10, "b" * 10, "c" * 10, "d"]
    example = {"ind": 1, "label": 0, "ctx": "x" * 20, "endings": endings}
    data = write_jsonl(tmp_path / "val.jsonl", [example])
    model = make_model(tmp_path / "model", n_positions=n_positions)
    flags = ["--model", tmp_path / "model", "--data", data, "--device", "cpu"]
    result, lines = evaluate(tmp_path, *flags)
    assert_equals_plain_method(result, model, [example], BYTES)
    assert len(lines) == 1 + num_messages


def test_endings_of_a_single_token_equal_the_plain_method(tmp_path):
    example = {"ind": 1, "label": 0, "ctx": "abc", "endings": ["", "", "", ""]}  # " " is a token
    data = write_jsonl(tmp_path / "val.jsonl", [example])
    model = make_model(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--data", data, "--device", "cpu"]
    result, _ = evaluate(tmp_path, *flags)
    assert_equals_plain_method(result, model, [example], BYTES)


def test_characters_of_several_bytes_and_special_tokens_are_ordinary_text(tmp_path):
    example = {
        "ind": 7,
        "label": 3,
        "ctx": "Grüße, 世界 <|endoftext|>",
        "endings": ["🙂", "", "<|endoftext|>", "é\n"],
    }
    data = write_jsonl(tmp_path / "val.jsonl", [example])
    model = make_model(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--data", data, "--device", "cpu"]
    result, _ = evaluate(tmp_path, *flags)
    assert_equals_plain_method(result, model, [example], BYTES)


@pytest.mark.parametrize("batch_size", [1, 3, 10**6])
def test_results_do_not_depend_on_the_batch_size(tmp_path, examples, batch_size):
    same_length = [example for example in examples if len(example["ctx"]) in (30, 50)]
    assert len(same_length) > 6
    model = make_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "val.jsonl", same_length)
    flags = ["--model", tmp_path / "model", "--data", data, "--batch_size", batch_size]
    result, _ = evaluate(tmp_path, *flags, "--device", "cpu")
    assert_equals_plain_method(result, model, same_length, BYTES)


def test_padding_of_a_batch_changes_nothing(tmp_path, examples):
    # The same example alone, and in a batch with one whose endings are much longer.
    model = make_model(tmp_path / "model")
    short = {"ind": 1, "label": 1, "ctx": "x" * 30, "endings": ["ab", "cde", "f", "gh"]}
    long = {"ind": 2, "label": 2, "ctx": "y" * 30, "endings": ["i" * 90, "j" * 80, "k", "l" * 70]}
    results = []
    for name, examples in (("alone", [short]), ("together", [short, long])):
        data = write_jsonl(tmp_path / f"{name}.jsonl", examples)
        flags = ["--model", tmp_path / "model", "--data", data, "--device", "cpu"]
        results.append(evaluate(tmp_path, *flags)[0]["predictions"][0])
    assert results[0]["losses"] == pytest.approx(results[1]["losses"], abs=1e-5)
    assert_equals_plain_method(evaluate(tmp_path, *flags)[0], model, [short, long], BYTES)


@pytest.mark.parametrize("group_size", [1, 3, 10**6])  # the last one as on a GPU
def test_results_do_not_depend_on_the_size_of_groups(tmp_path, tiny, monkeypatch, group_size):
    model, flags, examples = tiny
    script = load("hellaswag")
    monkeypatch.setattr(script, "CPU_GROUP_SIZE", group_size)
    assert call(script, *flags, "--output", tmp_path / "out.json").returncode == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert_equals_plain_method(result, model, examples, BYTES)


def test_a_batch_has_contexts_of_one_length_and_little_padding(examples):
    tokenizer = hellaswag.get_tokenizer("bytes")
    tokenized = [hellaswag.tokenize(example, tokenizer) for example in examples]
    batches = hellaswag.make_batches(dict(enumerate(tokenized)), batch_size=4)
    assert sorted(sum(batches, [])) == list(range(500))
    lengths = []
    for batch in batches:
        rows = [hellaswag.row_length(tokenized[i]) for i in batch]
        contexts = {len(tokenized[i].context) for i in batch}
        assert len(contexts) == 1
        assert len(batch) <= 4
        assert rows == sorted(rows, reverse=True)
        lengths += contexts
    assert lengths == sorted(lengths, reverse=True)
    assert sum(len(batch) > 1 for batch in batches) > 50


def test_the_context_is_computed_once_and_the_head_only_for_the_tokens_of_endings(examples):
    num_processed = []
    num_logits = []

    class Spy:
        config = {"n_positions": 160}
        wte = torch.nn.Embedding(1, 1)

        def new_cache(self, batch_size, max_length):
            return hellaswag.KVCache((1, batch_size, 1, max_length, 1), "cpu", torch.float32)

        def __call__(self, idx, cache):
            num_processed.append(idx.numel())
            return torch.zeros(*idx.shape, 4)

        def logits(self, x):
            num_logits.append(len(x))
            return torch.zeros(len(x), 257)

    tokenizer = hellaswag.get_tokenizer("bytes")
    tokenized = [hellaswag.tokenize(example, tokenizer) for example in examples]
    results = list(hellaswag.evaluate(Spy(), tokenized, batch_size=8))
    assert sorted(i for i, _, _ in results) == list(range(500))
    num_ending_tokens = 0
    num_tokens_of_plain_method = 0
    for example in tokenized:
        num_ending_tokens += sum(len(ending) for ending in example.endings)
        num_tokens_of_plain_method += 4 * hellaswag.row_length(example)
    assert sum(num_logits) == num_ending_tokens
    assert sum(num_processed) < 0.55 * num_tokens_of_plain_method


def test_bfloat16_differs_from_float32_by_rounding_only(tmp_path, tiny):
    model, flags, examples = tiny
    result, _ = evaluate(tmp_path, *flags, "--dtype", "bfloat16")
    ours = torch.tensor([prediction["losses"] for prediction in result["predictions"]])
    exact = torch.tensor([score_plainly(model, example, BYTES)[0] for example in examples])
    error = ((ours - exact).abs() / exact).max()
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("is_supported", [True, False])
def test_the_default_dtype_is_bfloat16_only_on_gpus_that_support_it(is_supported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **settings: is_supported)
    assert hellaswag.pick_dtype(None, torch.device("cpu")) == "float32"
    assert hellaswag.pick_dtype("float16", torch.device("cuda")) == "float16"
    expected = "bfloat16" if is_supported else "float32"
    assert hellaswag.pick_dtype(None, torch.device("cuda")) == expected


def test_attention_that_plans_for_each_length_is_off(tiny):
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert call("hellaswag", *tiny[1]).returncode == 0
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# -------------------------------------------------------------------------------- command line
def test_limit_takes_the_first_examples(tmp_path, tiny):
    model, flags, examples = tiny
    result, lines = evaluate(tmp_path, *flags, "--limit", 7)
    assert_equals_plain_method(result, model, examples[:7], BYTES)
    assert lines[-1].startswith("7 acc: ")
    assert evaluate(tmp_path, *flags, "--limit", 1000)[0]["n"] == 20


def test_output_has_the_promised_fields_and_nothing_else_is_written(tmp_path, tiny):
    before = {path.name for path in tmp_path.iterdir()}
    result, _ = evaluate(tmp_path, *tiny[1])
    assert {path.name for path in tmp_path.iterdir()} - before == {"out.json"}
    assert sorted(result) == ["acc", "acc_norm", "model", "n", "predictions"]
    assert result["model"] == str(tmp_path / "model")
    for prediction in result["predictions"]:
        names = ["ind", "label", "losses", "mean_losses", "pred", "pred_norm"]
        assert sorted(prediction) == names
        assert len(prediction["losses"]) == len(prediction["mean_losses"]) == 4


def test_the_newest_checkpoint_of_log_is_the_default(tmp_path, tiny):
    _, flags, examples = tiny
    old = make_model(tmp_path / "log" / "step_000500", seed=1)
    new = make_model(tmp_path / "log" / "step_1000000", seed=2)
    make_model(tmp_path / "log" / "tmp_step_2000000")
    (tmp_path / "log" / "log.txt").touch()
    done = run("hellaswag", *flags[2:], "--output", "out.json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar without a terminal
    result = json.loads((tmp_path / "out.json").read_text())
    assert_equals_plain_method(result, new, examples, BYTES)
    assert result["model"] == os.path.join("log", "step_1000000")
    result, _ = evaluate(tmp_path, "--model", tmp_path / "log" / "step_000500", *flags[2:])
    assert_equals_plain_method(result, old, examples, BYTES)


def test_a_checkpoint_of_the_trainer_scores_as_transformers_says(tmp_path, examples):
    trainer = load("train_gpt2")
    config = trainer.GPTConfig(257, 160, 2, 2, 32, tokenizer="bytes")
    trainer.GPT(config).save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "val.jsonl", examples[:20])
    flags = ["--model", tmp_path / "model", "--data", data, "--device", "cpu"]
    result, _ = evaluate(tmp_path, *flags)
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    assert_equals_plain_method(result, model, examples[:20], BYTES)


# ----------------------------------------------------------------------------------- data files
def test_parquet_with_labels_as_text_equals_json_lines(tmp_path, tiny):
    model, flags, examples = tiny
    data = write_parquet(tmp_path / "val.parquet", examples)
    result, _ = evaluate(tmp_path, *flags, "--data", data)
    assert_equals_plain_method(result, model, examples, BYTES)


def test_labels_may_be_digits_and_files_may_have_a_byte_order_mark_and_blank_lines_at_the_end(tmp_path, tiny):
    model, flags, examples = tiny
    examples = [{**example, "label": str(example["label"])} for example in examples]
    data = write_jsonl(tmp_path / "digits.jsonl", examples)
    data.write_bytes(b"\xef\xbb\xbf" + data.read_bytes() + b"\n  \r\n")
    result, _ = evaluate(tmp_path, *flags, "--data", data)
    assert_equals_plain_method(result, model, examples, BYTES)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_prepare_writes_the_arrays_that_the_trainer_reads(form, tmp_path, examples, monkeypatch, tiktoken_cache):
    monkeypatch.chdir(tmp_path)
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[form]
    data = write(tmp_path / f"val.{form}", examples)
    done = call("hellaswag", "--prepare", "--data", data)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "wrote 500 examples to hellaswag/hellaswag_val.npz\n"
    assert [path.name for path in (tmp_path / "hellaswag").iterdir()] == ["hellaswag_val.npz"]

    # Expected rows, sorted by the length of the longest row.
    tokenizer = hellaswag.get_tokenizer("gpt2")
    expected = []
    for example in examples:
        context = tokenizer.encode(example["ctx"])
        rows = [context + tokenizer.encode(" " + ending) for ending in example["endings"]]
        expected.append((max(map(len, rows)), len(context), rows, example))
    expected.sort(key=lambda item: item[0])  # stable
    with np.load(tmp_path / "hellaswag" / "hellaswag_val.npz", allow_pickle=False) as arrays:
        arrays = dict(arrays)
    assert sorted(arrays) == ["context_length", "label", "length", "tokens"]
    assert arrays["tokens"].dtype == np.uint16
    assert arrays["tokens"].shape == (500, 4, expected[-1][0])
    for name in ("context_length", "label", "length"):
        assert arrays[name].dtype == np.int64
    for i, (_, context_length, rows, example) in enumerate(expected):
        assert arrays["context_length"][i] == context_length
        assert arrays["label"][i] == example["label"]
        for j, row in enumerate(rows):
            assert arrays["length"][i, j] == len(row)
            assert arrays["tokens"][i, j, : len(row)].tolist() == row
            assert not arrays["tokens"][i, j, len(row) :].any()


def test_the_trainer_finds_the_same_accuracy_in_the_prepared_file(tmp_path, examples, monkeypatch, tiktoken_cache):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model", "gpt2", n_embd=8)
    data = write_jsonl(tmp_path / "val.jsonl", examples[:60])
    assert call("hellaswag", "--prepare", "--data", data).returncode == 0
    flags = ["--model", tmp_path / "model", "--data", data, "--device", "cpu"]
    result, _ = evaluate(tmp_path, *flags)

    trainer = load("train_gpt2")
    model = trainer.GPT.from_pretrained(tmp_path / "model")
    arrays = trainer.load_hellaswag("hellaswag/hellaswag_val.npz", block_size=160)
    stop = types.SimpleNamespace(reason=None)
    one_process = {"rank": 0, "world_size": 1, "device": torch.device("cpu"), "stop": stop}
    settings = {"micro_batch_size": 8, "autocast": contextlib.nullcontext(), **one_process}
    assert trainer.evaluate_hellaswag(model, arrays, **settings) == pytest.approx(result["acc_norm"])


def test_prepare_keeps_the_old_file_if_it_fails(tmp_path, examples, monkeypatch, tiktoken_cache):
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "val.jsonl", examples[:5])
    assert call("hellaswag", "--prepare", "--data", data).returncode == 0
    before = (tmp_path / "hellaswag" / "hellaswag_val.npz").read_bytes()

    def fill_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fill_disk)
    with pytest.raises(OSError, match="No space"):  # run_script reports it in one line
        call("hellaswag", "--prepare", "--data", data)
    assert [path.name for path in (tmp_path / "hellaswag").iterdir()] == ["hellaswag_val.npz"]
    assert (tmp_path / "hellaswag" / "hellaswag_val.npz").read_bytes() == before


# ------------------------------------------------------------------------------------ bad input
def assert_refused(done, *words):
    """Assert that a script ended with a one-line error that contains words, and without a result."""
    assert_user_error(done, *words)
    assert "acc" not in done.stdout


def test_no_checkpoint_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(call("hellaswag", "--device", "cpu"), "log", "train_gpt2.py", "--model")
    (tmp_path / "log").mkdir()
    assert_refused(call("hellaswag", "--device", "cpu"), "log", "config.json", "--model")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def edit_weights(directory, head=False, dtype=None):
    """Store an output head that differs from the embedding, or weights of another dtype."""
    weights = load_file(directory / "model.safetensors")
    if head:
        weights["lm_head.weight"] = weights["transformer.wte.weight"] + 1
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    save_file(weights, directory / "model.safetensors")


CHANGES = {  # of config.json, and words of the message
    "another model": ({"model_type": "llama"}, ["model_type", "llama"]),
    "another activation": ({"activation_function": "silu"}, ["silu"]),
    "an untied head": ({"tie_word_embeddings": False}, ["tie_word_embeddings"]),
    "wider": ({"n_embd": 64}, ["wte.weight", "257 rows of 64 numbers"]),
    "deeper": ({"n_layer": 3}, ["h.2."]),
    "fewer blocks": ({"n_layer": 1}, ["h.1."]),
    "heads": ({"n_head": 5}, ["n_head 5", "n_embd 32"]),
    "a text for n_layer": ({"n_layer": "two"}, ["n_layer", "'two'"]),
    "a text for n_head": ({"n_head": "2"}, ["n_head", "'2'"]),
    "a text for epsilon": ({"layer_norm_epsilon": "1e-5"}, ["layer_norm_epsilon"]),
    "another tokenizer": ({"tokenizer": "gpt2"}, ["257", "gpt2"]),
    "an unknown tokenizer": ({"tokenizer": ["sentencepiece"]}, ["sentencepiece"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_config_that_does_not_fit_is_one_line(tmp_path, tiny, change):
    values, words = CHANGES[change]
    edit_config(tmp_path / "model", **values)
    assert_refused(call("hellaswag", *tiny[1]), tmp_path / "model", *words)


DAMAGE = {
    "invalid JSON": (lambda path: (path / "config.json").write_text("{"), ["config.json"]),
    "a list": (lambda path: (path / "config.json").write_text("[]"), ["config.json"]),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), ["model.safetensors"]),
    "half the weights": (lambda path: os.truncate(path / "model.safetensors", 9999), []),
    "another head": (lambda path: edit_weights(path, head=True), ["lm_head.weight"]),
    "integers": (lambda path: edit_weights(path, dtype=torch.int8), ["torch.int8"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_one_line(tmp_path, tiny, damage):
    change, words = DAMAGE[damage]
    change(tmp_path / "model")
    assert_refused(call("hellaswag", *tiny[1]), tmp_path / "model", *words)


def test_losses_that_are_nan_are_one_line(tmp_path, tiny):
    path = tmp_path / "model" / "model.safetensors"
    weights = {name: weight.fill_(float("nan")) for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    done = call("hellaswag", *tiny[1], "--output", tmp_path / "out.json")
    assert_refused(done, "nan", "--model", "--dtype float32")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_name_without_a_network_is_one_line(tiny, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    done = call("hellaswag", "--model", "gpt2", *tiny[1][2:])
    assert_refused(done, "gpt2", "Hub", "local directory")


def test_a_mistyped_path_is_one_line(tiny):
    done = call("hellaswag", "--model", "no/such/directory", *tiny[1][2:])
    assert_refused(done, "no/such/directory does not exist")


GOOD = {"ind": 5, "label": 1, "ctx": "a", "endings": ["b", "c", "d", "e"]}


def without(name):
    """Return an example without one of its fields."""
    return {key: value for key, value in GOOD.items() if key != name}


BAD_LINES = {
    "invalid JSON": ("{'ind': 5", ["JSON"]),
    "cut off": (json.dumps(GOOD)[:-5], ["JSON"]),
    "not an object": ("[1, 2]", ["object"]),
    "nested too deeply": ("[" * 100_000, ["JSON"]),
    "a blank line in the middle": ("", ["JSON"]),
    "not UTF-8": (b'{"ind": 5, "ctx": "\xff"}', ["JSON"]),
    "no ind": (without("ind"), ["'ind'", "None"]),
    "ind of text": ({**GOOD, "ind": "5"}, ["'ind'", "'5'"]),
    "no label": (without("label"), ["'label'", "None"]),
    "label 4": ({**GOOD, "label": 4}, ["'label'", "4"]),
    "label of words": ({**GOOD, "label": "one"}, ["'label'", "'one'"]),
    "label with a blank": ({**GOOD, "label": "1 "}, ["'label'", "'1 '"]),
    "label true": ({**GOOD, "label": True}, ["'label'", "True"]),
    "label 1.0": ({**GOOD, "label": 1.0}, ["'label'", "1.0"]),
    "label below 0": ({**GOOD, "label": -1}, ["'label'", "-1"]),
    "three endings": ({**GOOD, "endings": ["b", "c", "d"]}, ["four", "there are 3"]),
    "five endings": ({**GOOD, "endings": ["b", "c", "d", "e", "f"]}, ["four", "there are 5"]),
    "an ending of numbers": ({**GOOD, "endings": ["b", "c", "d", [1]]}, ["'endings'"]),
    "endings in one text": ({**GOOD, "endings": "bcde"}, ["'endings'"]),
    "an empty context": ({**GOOD, "ctx": ""}, ["'ctx'"]),
    "a context of numbers": ({**GOOD, "ctx": 7}, ["'ctx'"]),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_malformed_line_is_named(tmp_path, tiny, name):
    line, words = BAD_LINES[name]
    if isinstance(line, dict):
        line = json.dumps(line)
    if isinstance(line, str):
        line = line.encode()
    good = json.dumps(GOOD).encode()
    data = tmp_path / "val.jsonl"
    data.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    assert_refused(call("hellaswag", *tiny[1]), "line 2", data, "--data FILE", *words)


def test_a_malformed_row_of_parquet_is_named(tmp_path, tiny, examples):
    rows = [*examples[:3], {**examples[3], "label": 7}]
    data = write_parquet(tmp_path / "val.parquet", rows)
    done = call("hellaswag", *tiny[1], "--data", data)
    assert_refused(done, f"row 4 of {data}", "'label'", "'7'")


def test_a_damaged_or_foreign_parquet_file_is_one_line(tmp_path, tiny, examples):
    data = write_parquet(tmp_path / "val.parquet", examples)
    os.truncate(data, 5000)
    assert_refused(call("hellaswag", *tiny[1], "--data", data), data)
    pq.write_table(pa.table({"text": ["a", "b"]}), data)
    assert_refused(call("hellaswag", *tiny[1], "--data", data), data)


def test_data_that_is_missing_or_empty_is_one_line(tmp_path, tiny):
    flags = tiny[1][:2]
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_text("\n\n")
    os.mkfifo(tmp_path / "pipe")
    for path in ("nowhere", "", "empty", "blank", "pipe"):
        data = tmp_path / path
        assert_refused(call("hellaswag", *flags, "--data", data), data, "--data FILE")


def test_a_million_blanks_are_one_line(tmp_path, monkeypatch, tiktoken_cache):
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "val.jsonl", [{**GOOD, "ctx": "a" + " " * 1_100_000 + "b"}])
    done = call("hellaswag", "--prepare", "--data", data)
    assert_refused(done, "whitespace characters in a row", "--data FILE")
    assert not (tmp_path / "hellaswag").exists()


@pytest.mark.parametrize("flag", ["--limit", "--batch_size"])
@pytest.mark.parametrize("value", [0, -3, "many"])
def test_invalid_numbers_are_one_line(tiny, flag, value):
    assert_refused(call("hellaswag", *tiny[1], flag, value), flag, value)


def test_output_that_cannot_be_written_is_one_line_before_anything_slow_begins(tmp_path, tiny):
    for path in (tmp_path, tmp_path / "nowhere" / "out.json"):
        assert_refused(call("hellaswag", *tiny[1], "--output", path), "--output", path)
    shutil.rmtree(tmp_path / "model")
    done = call("hellaswag", *tiny[1], "--output", tmp_path / "nowhere" / "out.json")
    assert_refused(done, "--output")


def test_a_device_that_is_not_there_is_one_line(tiny):
    done = call("hellaswag", *tiny[1][:4], "--device", "cuda:99")
    assert_refused(done, "--device", "cuda:99")


def test_a_batch_that_does_not_fit_into_memory_is_one_line(tiny, monkeypatch):
    script = load("hellaswag")

    def new_cache(self, batch_size, max_length):
        return torch.empty(2**50)  # a petabyte: PyTorch's own error

    monkeypatch.setattr(script.GPT, "new_cache", new_cache)
    assert_refused(call(script, *tiny[1]), "memory", "--batch_size")


# ------------------------------------------------------------------------------------- streams
def test_a_full_disk_under_standard_output_is_one_line(tiny):
    with open("/dev/full", "w") as full:
        line = command("hellaswag", *tiny[1])
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_closed_streams_do_not_lose_the_result(closed, tmp_path, tiny):
    model, flags, examples = tiny
    line = command("hellaswag", *flags, "--output", tmp_path / "out.json")
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *line]
    done = subprocess.run(shell, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("20 acc: ") or closed == ">&-"
    result = json.loads((tmp_path / "out.json").read_text())
    assert_equals_plain_method(result, model, examples, BYTES)


# ------------------------------------------------------------------------------------- download
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES_PATH = f"/datasets/Rowan/hellaswag/resolve/{COMMIT}/"
HUB_NAME = "data/validation-00000-of-00001.parquet"


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hugging Face Hub that sends the files of a data set.

    server.files are its files by name, and server.status is the status of its answers.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = urllib.parse.unquote(self.path.split("?")[0])
        self.server.log.append((self.command, path))
        if self.server.status != 200:
            self.answer(self.server.status, b"")
        elif path == "/api/datasets/Rowan/hellaswag":
            digest = self.server.digest or hashlib.sha256(self.server.files.get(HUB_NAME, b"")).hexdigest()
            large_file = {"size": 1, "pointerSize": 1, "sha256": digest}
            siblings = [{"rfilename": "README.md"}, {"rfilename": HUB_NAME, "lfs": large_file}]
            self.answer(200, json.dumps({"id": "Rowan/hellaswag", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.removeprefix(FILES_PATH) not in self.server.files:
            self.answer(404, b"", **{"X-Error-Code": "EntryNotFound"})
        else:
            content = self.server.files[path.removeprefix(FILES_PATH)]
            etag = hashlib.sha1(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            self.answer(200, content, **headers)

    do_HEAD = do_GET

    def answer(self, status, content, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: self.server.limit])
            self.close_connection = self.server.limit is not None

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, examples, monkeypatch):
    """Run a Hub on this machine. Its validation set has 20 examples in a parquet file."""
    content = write_parquet(tmp_path / "hub.parquet", examples[:20]).read_bytes()
    (tmp_path / "hub.parquet").unlink()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.log = []
    server.status = 200
    server.digest = None  # SHA-256 of the validation set that the Hub tells, if it is not the right one
    server.limit = None  # bytes of each answer that are sent
    server.files = {"README.md": b"hello", "data/train-00000-of-00001.parquet": b"", HUB_NAME: content}
    url = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def download(tmp_path, tiny, hub, monkeypatch):
    """Return a function that runs hellaswag.py without --data, for a validation set of 20 examples."""
    script = load("hellaswag")
    assert script.NUM_EXAMPLES == 10042
    monkeypatch.setattr(script, "NUM_EXAMPLES", 20)
    monkeypatch.chdir(tmp_path)
    flags = [*tiny[1][:2], "--device", "cpu", "--output", "out.json"]
    return lambda: call(script, *flags)


def test_the_validation_set_is_downloaded_once(tmp_path, tiny, hub, download):
    for _ in range(2):
        done = download()
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "out.json").read_text())
        assert_equals_plain_method(result, tiny[0], tiny[2], BYTES)
    requests = [path for method, path in hub.log if method == "GET" and "/resolve/" in path]
    assert len(requests) == 1
    assert [path.name for path in (tmp_path / "hellaswag").iterdir()] == ["hellaswag_val.parquet"]
    path = tmp_path / "hellaswag" / "hellaswag_val.parquet"
    assert path.read_bytes() == hub.files[HUB_NAME]


def test_a_download_with_another_checksum_is_refused(tmp_path, hub, download):
    hub.digest = "0" * 64
    assert_user_error(download(), "does not match its SHA-256", "--data FILE")
    assert not (tmp_path / "hellaswag").exists()


def damage_hub(hub, damage, examples, path):
    """Make a download fail in one of several ways."""
    if damage == "too few examples":
        hub.files[HUB_NAME] = write_parquet(path, examples[:19]).read_bytes()
    elif damage == "a login page":
        hub.files[HUB_NAME] = b"<html>Sign in</html>"
    elif damage == "half of the file":
        hub.limit = len(hub.files[HUB_NAME]) // 2
    elif damage == "no validation file":
        hub.files[HUB_NAME.replace("validation", "test")] = hub.files.pop(HUB_NAME)
    elif damage == "not found":
        hub.status = 404
    elif damage == "nobody answers":
        hub.shutdown()
        hub.server_close()


@pytest.mark.parametrize(
    "damage",
    [
        "too few examples",
        "a login page",
        "half of the file",
        "no validation file",
        "not found",
        "nobody answers",
    ],
)
def test_a_failed_download_leaves_nothing_and_says_where_to_put_the_file(tmp_path, examples, hub, download, damage):
    damage_hub(hub, damage, examples, tmp_path / "damaged.parquet")
    places = ["hellaswag/hellaswag_val.jsonl", "hellaswag/hellaswag_val.parquet", "--data FILE"]
    assert_refused(download(), "Rowan/hellaswag", *places)
    assert not (tmp_path / "hellaswag").exists()
    assert not (tmp_path / "out.json").exists()


def test_a_download_that_stalls_is_one_line(tmp_path, hub, download, monkeypatch):
    class ReadTimeout(Exception):  # as in the Hub's HTTP library: neither OSError nor ValueError
        pass

    def stall(*args, **settings):
        raise ReadTimeout("The read operation timed out\nmore lines")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stall)
    assert_refused(download(), "timed out", "run the same command again")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_file_put_by_hand_is_used_without_the_hub(form, tmp_path, tiny, hub, download):
    (tmp_path / "hellaswag").mkdir()
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[form]
    write(tmp_path / "hellaswag" / f"hellaswag_val.{form}", tiny[2])
    assert download().returncode == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert_equals_plain_method(result, tiny[0], tiny[2], BYTES)
    assert hub.log == []


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_validation_set_with_missing_examples_is_refused(form, tmp_path, tiny, hub, download):
    (tmp_path / "hellaswag").mkdir()
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[form]
    write(tmp_path / "hellaswag" / f"hellaswag_val.{form}", tiny[2][:1])
    assert_refused(download(), f"hellaswag/hellaswag_val.{form}", "1 examples", "20")
    assert hub.log == []
