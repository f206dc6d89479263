"""
sample.py: tokens and logits of transformers, the cache, the distribution of tokens, text, errors.

The section "models as people have them" tests the copied block `pretrained`, which sample.py,
hellaswag.py and train_gpt2.py have in common.
"""

import collections
import io
import json
import math
import os
import pty
import random
import re
import resource
import runpy
import select
import signal
import struct
import subprocess
import sys
import time

import huggingface_hub
import pytest
import torch
from conftest import ROOT, TINY, assert_user_error, call, command, load
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

sample = load("sample")
BYTES = {"vocab_size": 257, "tokenizer": "bytes", "bos_token_id": 256, "eos_token_id": 256}
GREEDY = ["--temperature", 0, "--device", "cpu"]
TOKENIZER = sample.get_tokenizer("bytes")


# ------------------------------------------------------------------------------------- helpers
def make_model(directory, seed=0, **config):
    """Save a random GPT-2 whose next token depends on all earlier tokens. Returns transformers' model."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "wpe" in name or "wte" in name:
                parameter.normal_(std=0.4)
            elif "ln_" not in name:
                parameter.normal_(std=1.5 * model.config.n_embd**-0.5)
    model.save_pretrained(directory)
    return model


@pytest.fixture
def small(tmp_path):
    """Return transformers' model and its directory: 257 tokens, 24 positions."""
    config = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 24}
    return make_model(tmp_path / "small", **config, **BYTES), tmp_path / "small"


def make_scripted_model(directory, script, prompt_length=1):
    """Save a model that continues any prompt of prompt_length tokens with script, then with token 256.

    Its logits depend on the position only: the position embedding of the i-th new token points to
    the token embedding of script[i].
    """
    script = [*script, 256]
    n_positions = prompt_length + len(script)
    config = GPT2Config(n_layer=1, n_head=1, n_embd=320, n_positions=n_positions, **BYTES)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_layer_norm_weight = "ln_" in name and "weight" in name
            parameter.fill_(1.0 if is_layer_norm_weight else 0.0)
        model.transformer.wte.weight.copy_(torch.eye(257, 320) * 30**0.5)
        for i, token in enumerate(script):
            model.transformer.wpe.weight[prompt_length - 1 + i, token] = 100.0
    model.save_pretrained(directory)
    return directory


def edit_config(directory, **changes):
    """Change values in the config.json of a model."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def generate(model, prompt, max_new_tokens, num_samples=1, **settings):
    """Return the new tokens of sample.generate, num_samples lists. Without settings, it is greedy."""
    settings = settings or {"temperature": 0}

    def sampler(logits):
        return sample.sample_token(logits, **settings)

    steps = sample.generate(model, prompt, num_samples, max_new_tokens, sampler)
    return torch.stack(list(steps), dim=1).tolist()


def printable(text):
    """Return text as sample.py prints it: with U+FFFD instead of control characters."""
    is_control = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
    return is_control.sub("\ufffd", text)


def assert_refused(*args, words):
    """Assert that sample.py ends with a one-line error that contains words, and without output."""
    done = call("sample", *args)
    assert_user_error(done, *words)
    assert done.stdout == ""


# --------------------------------------------------------------------------- tokens and logits
NAMES = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions", "n_inner", "activation_function")
SHAPES = [
    (1, 1, 8, 11, 16, None, "gelu_new"),
    (1, 2, 16, 257, 32, None, "gelu_new"),
    (1, 4, 64, 1000, 64, 32, "relu"),
    (2, 1, 24, 50, 20, None, "gelu"),
    (2, 2, 32, 257, 33, 100, "gelu_new"),
    (2, 3, 48, 127, 40, None, "gelu_new"),
    (2, 8, 64, 513, 64, None, "relu"),
    (3, 1, 17, 33, 24, 5, "gelu_new"),
    (3, 3, 30, 257, 48, None, "gelu"),
    (3, 4, 32, 300, 17, 129, "gelu_new"),
    (3, 5, 40, 64, 30, None, "relu"),
    (4, 2, 34, 257, 64, None, "gelu_new"),
    (4, 4, 64, 2048, 32, 256, "gelu_new"),
    (4, 6, 96, 97, 50, None, "gelu"),
    (5, 1, 16, 257, 64, None, "gelu_new"),
    (5, 7, 56, 129, 32, 7, "relu"),
    (6, 2, 32, 71, 100, None, "gelu_new"),
    (6, 6, 48, 257, 64, None, "gelu"),
    (7, 3, 33, 500, 30, 64, "gelu_pytorch_tanh"),
    (8, 4, 128, 5003, 64, None, "gelu_new"),
]


def load_any_vocabulary(directory, monkeypatch):
    """Load a model whose vocab_size belongs to no tokenizer, which read_config would refuse."""
    saved = json.loads((directory / "config.json").read_text())

    def read_config(path):
        edit_config(directory, vocab_size=257)
        config = original(path)
        config["vocab_size"] = saved["vocab_size"]
        return config

    original = sample.read_config
    monkeypatch.setattr(sample, "read_config", read_config)
    return sample.GPT.from_pretrained(directory)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_greedy_tokens_equal_those_of_transformers(shape, tmp_path, monkeypatch):
    config = dict(zip(NAMES, shape, strict=True))
    theirs = make_model(tmp_path, seed=sum(shape[:5]), **config, bos_token_id=0, eos_token_id=0)
    theirs.generation_config.eos_token_id = None
    ours = load_any_vocabulary(tmp_path, monkeypatch)
    seen = set()
    for length in (1, 2, 5, config["n_positions"] - 8):
        prompt = torch.randint(config["vocab_size"], (1, length))
        n = min(40, config["n_positions"] + 1 - length)  # all that fit, and the one after
        output = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=n,
            pad_token_id=0,
        )
        expected = output[0, length:].tolist()
        assert generate(ours, prompt[0].tolist(), n) == [expected]
        seen.update(expected)
    assert len(seen) >= min(8, config["vocab_size"] // 3)  # such models do not repeat themselves


@pytest.mark.parametrize("prompt_length", [1, 7, 24])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_logits_equal_those_without_a_cache_at_every_length(prompt_length, num_samples, small):
    theirs, directory = small
    n_positions = theirs.config.n_positions
    ours = sample.GPT.from_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    seen = []

    def sampler(logits):
        seen.append(logits)
        return sample.sample_token(logits, generator=generator)

    prompt = torch.randint(257, (prompt_length,)).tolist()
    steps = sample.generate(ours, prompt, num_samples, 2 * n_positions, sampler)
    new = torch.stack(list(steps), dim=1)  # (B, T)
    assert len(set(map(tuple, new.tolist()))) == num_samples  # the samples differ
    idx = torch.cat((torch.tensor([prompt] * num_samples), new), dim=1)
    assert len(seen) == 2 * n_positions
    for i, logits in enumerate(seen):
        window = idx[:, : prompt_length + i][:, -n_positions:]
        with torch.no_grad():
            expected = theirs(window).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_logits_without_a_cache_equal_those_of_transformers(small):
    theirs, directory = small
    ours = sample.GPT.from_pretrained(directory)
    idx = torch.randint(257, (2, 9))
    torch.testing.assert_close(ours.logits(ours(idx)), theirs(idx).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[9], [4, 5], [1, 1, 7], [3, 1, 4, 1]])
def test_tokens_can_be_added_to_the_cache_in_pieces_of_any_length(pieces, small):
    theirs, directory = small
    ours = sample.GPT.from_pretrained(directory)
    idx = torch.randint(257, (3, 9))
    cache = ours.new_cache(3, 9)
    outputs = [ours(piece, cache) for piece in idx.split(pieces, dim=1)]
    logits = ours.logits(torch.cat(outputs, dim=1))
    torch.testing.assert_close(logits, theirs(idx).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sequences_of_a_cache_can_be_continued_several_times(small):
    theirs, directory = small
    ours = sample.GPT.from_pretrained(directory)
    context = torch.randint(257, (2, 5))
    endings = torch.randint(257, (6, 4))
    cache = ours.new_cache(2, 5)
    ours(context, cache)
    logits = ours.logits(ours(endings, cache.select(torch.tensor([0, 0, 0, 1, 1, 1]), 9)))
    rows = torch.cat((context.repeat_interleave(3, dim=0), endings), dim=1)
    torch.testing.assert_close(logits, theirs(rows).logits[:, 5:], rtol=1e-4, atol=1e-4)


def test_greedy_samples_in_parallel_equal_a_single_one(small):
    ours = sample.GPT.from_pretrained(small[1])
    (single,) = generate(ours, [1, 2, 3], 60)
    assert generate(ours, [1, 2, 3], 60, num_samples=4) == [single] * 4


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.2), (torch.float16, 0.05)])
def test_16_bit_dtypes_are_close_to_float32(dtype, tolerance, small):
    theirs, directory = small
    idx = torch.randint(257, (1, 12))
    expected = theirs(idx).logits.softmax(-1)
    ours = sample.GPT.from_pretrained(directory, dtype=dtype)
    logits = ours.logits(ours(idx))
    assert logits.dtype == dtype
    assert (logits.float().softmax(-1) - expected).abs().max() < tolerance


@torch.no_grad()
def test_bfloat16_logits_are_as_close_to_float32_as_those_of_transformers_in_bfloat16(small):
    theirs, directory = small
    idx = torch.randint(257, (4, 20))
    exact = theirs(idx).logits
    ours = sample.GPT.from_pretrained(directory, dtype=torch.bfloat16)
    our_error = (ours.logits(ours(idx)).float() - exact).pow(2).mean()
    their_error = (theirs.bfloat16()(idx).logits.float() - exact).pow(2).mean()
    assert 0 < our_error < 1.5 * their_error


# ------------------------------------------------------------------------------ random choices
def chi_square(counts, probs):
    """Return Pearson's statistic, and the value that it exceeds once in 10,000 times if counts follow probs.

    Tokens that are expected fewer than 5 times share one bin.
    """
    n = sum(counts)
    bins = []
    rest_count = rest_expected = 0
    for count, prob in zip(counts, probs, strict=True):
        if n * prob >= 5:
            bins.append((count, n * prob))
        else:
            rest_count += count
            rest_expected += n * prob
    if rest_expected > 1:
        bins.append((rest_count, rest_expected))
    statistic = sum((count - expected) ** 2 / expected for count, expected in bins)
    df = max(1, len(bins) - 1)
    spread = 2 / (9 * df)
    limit = df * (1 - spread + 3.719 * math.sqrt(spread)) ** 3  # Wilson and Hilferty, 1931
    return statistic, limit


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.6},
    {"top_k": 5},
    {"top_k": 10_000, "temperature": 1.3},
    {"top_p": 0.9},
    {"top_p": 0.5, "temperature": 1.2},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 40, "top_p": 0.95, "temperature": 0.8},
]


def reference_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Return the probabilities (V,) of the next token by transformers' own processors, for logits (V,)."""
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.double().softmax(-1)[0]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_next_token_is_distributed_as_transformers_says(settings, small):
    theirs, directory = small
    prompt = [7, 77, 177]
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt])).logits[0, -1]
    ours = sample.GPT.from_pretrained(directory)
    generator = torch.Generator().manual_seed(5)
    samples = generate(ours, prompt, 1, num_samples=20_000, generator=generator, **settings)
    counter = collections.Counter(tokens[0] for tokens in samples)
    counts = [counter[token] for token in range(257)]
    probs = reference_probs(logits, **settings)
    assert all(prob > 0 for token, prob in enumerate(probs.tolist()) if counts[token])
    statistic, limit = chi_square(counts, probs.tolist())
    assert statistic < limit
    # The test is sharp enough to distinguish the settings.
    for other in SETTINGS:
        other_probs = reference_probs(logits, **other)
        if (other_probs - probs).abs().sum() > 0.1:
            statistic, limit = chi_square(counts, other_probs.clamp(min=1e-9).tolist())
            assert statistic > limit


def test_rows_are_drawn_independently_and_each_from_its_own_logits():
    logits = torch.randn(4, 50) * 2
    generator = torch.Generator().manual_seed(0)
    draws = [sample.sample_token(logits, top_p=0.9, generator=generator) for _ in range(3000)]
    draws = torch.stack(draws)  # (3000, 4)
    for row in range(4):
        counts = draws[:, row].bincount(minlength=50).tolist()
        statistic, limit = chi_square(counts, reference_probs(logits[row], top_p=0.9).tolist())
        assert statistic < limit
    same = (draws[:, 0] == draws[:, 1]).double().mean()
    p = reference_probs(logits[0], top_p=0.9)
    q = reference_probs(logits[1], top_p=0.9)
    assert abs(same - (p * q).sum()) < 0.05


def test_extreme_settings_take_the_most_likely_token():
    logits = torch.tensor([[0.0, 3.0, 2.9, -5.0]])
    assert sample.sample_token(logits, temperature=1e-30).item() == 1
    assert sample.sample_token(logits * 1e37, temperature=1e-5).item() == 1
    assert sample.sample_token(logits, temperature=0, top_k=3, top_p=0.1).item() == 1
    assert sample.sample_token(logits, top_p=1e-9).item() == 1
    assert sample.sample_token(logits, top_p=1e-300).item() == 1
    assert sample.sample_token(logits, top_k=1).item() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_raise_an_error(bad):
    with pytest.raises(ValueError, match="NaN"):
        sample.sample_token(torch.tensor([[0.0, bad, 1.0]]))


# ---------------------------------------------------------------------------------------- text
def decode_pieces(data, stops=()):
    """Return the pieces of text that StreamDecoder returns for bytes, one token each, and for their end."""
    decoder = sample.StreamDecoder(TOKENIZER, stops)
    return [decoder.add(token) for token in [*data, None]]


def test_characters_are_returned_complete_and_at_once():
    pieces = decode_pieces("aß€🙂z".encode())
    assert pieces == ["a", "", "ß", "", "", "€", "", "", "", "🙂", "z", ""]


def test_any_bytes_give_the_same_text_as_decoding_them_at_once():
    rng = random.Random(0)
    alphabet = [65, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0x82, 0xFF, 0xED, 0xA0]
    for _ in range(300):
        data = bytes(rng.choices(alphabet, k=12))
        assert "".join(decode_pieces(data)) == printable(data.decode(errors="replace"))


def test_control_characters_are_never_returned():
    text = "".join(decode_pieces(bytes(range(256)) + "\x80\x9b31m\u00a0\u3000".encode()))
    assert {c for c in text if ord(c) < 32 or 127 <= ord(c) < 160} == {"\n", "\t"}
    assert text.endswith("\ufffd\ufffd31m\u00a0\u3000")


def cut_at_stop(text, stops):
    """Return text up to the stop text that is complete first, by brute force."""
    for end in range(len(text) + 1):
        beginning = text[:end]
        positions = [beginning.find(stop) for stop in stops if stop in beginning]
        if positions:
            return text[: min(positions)]
    return text


def test_stop_texts_cut_as_brute_force_does_and_delay_only_what_may_begin_one():
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("abé", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("abé", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        expected = cut_at_stop(text, stops)
        pieces = decode_pieces(text.encode(), stops)
        assert "".join(pieces) == expected
        for n in range(1, len(text.encode()) + 1):
            returned = "".join(pieces[:n])
            arrived = text.encode()[:n].decode(errors="ignore")
            pending = arrived[len(returned) :]
            if len(returned) < len(expected) and pending:
                assert any(stop.startswith(pending) for stop in stops)


def test_end_of_text_ends_a_text_and_flushes_half_a_character():
    decoder = sample.StreamDecoder(TOKENIZER, ["xyz"])
    pieces = [decoder.add(token) for token in (97, 120, 0xC3, 256, 98)]
    assert pieces == ["a", "", "", "x\ufffd", ""]
    assert decoder.done


def test_a_million_blanks_are_refused_and_other_long_texts_are_not(tiktoken_cache):
    tokenizer = sample.get_tokenizer("gpt2")
    with pytest.raises(ValueError, match="whitespace characters in a row"):
        sample.encode(tokenizer, "a" + " " * 1_100_000 + "b")
    text = ("a" + " " * 899_999) * 2
    assert tokenizer.decode(sample.encode(tokenizer, text)) == text


# -------------------------------------------------------------------------------- command line
@pytest.mark.parametrize("prompt", ["ROMEO", "é", "x" * 20])
def test_the_text_is_that_of_transformers_tokens(prompt, small):
    theirs, directory = small
    idx = torch.tensor([list(prompt.encode())])
    n = 24 - idx.shape[1]
    output = theirs.generate(idx, do_sample=False, max_new_tokens=n, pad_token_id=256)
    new = [token for token in output[0, idx.shape[1] :].tolist() if token != 256]
    text = bytes(new).decode(errors="replace")
    done = call("sample", "--model", directory, "--prompt", prompt, "--max_new_tokens", n, *GREEDY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == prompt + printable(text) + "\n"


def test_gpt2_tokens_give_the_text_of_transformers(tmp_path, tiktoken_cache):
    theirs = make_model(tmp_path, n_layer=1, n_head=2, n_embd=16, n_positions=64)
    tokenizer = sample.get_tokenizer("gpt2")
    prompt = "Hello, I'm a language model,"
    idx = torch.tensor([tokenizer.encode(prompt)])
    output = theirs.generate(idx, do_sample=False, max_new_tokens=40, pad_token_id=50256)
    expected = printable(tokenizer.decode(output[0].tolist()))
    done = call("sample", "--model", tmp_path, "--prompt", prompt, "--max_new_tokens", 40, *GREEDY)
    assert done.stdout == expected + "\n"


def test_the_text_is_written_character_by_character(tmp_path, monkeypatch):
    written = []

    class Recorder(io.StringIO):
        def write(self, text):
            written.append(text)
            return super().write(text)

    text = "naïve — 日本語 🙂!"
    make_scripted_model(tmp_path, text.encode())
    monkeypatch.setattr(io, "StringIO", Recorder)  # in which call() collects the output
    done = call("sample", "--model", tmp_path, *GREEDY)
    assert done.stdout == text + "\n"
    assert [piece for piece in written if piece] == [*text, "\n"]


def test_a_character_cut_by_max_new_tokens_is_marked(tmp_path):
    make_scripted_model(tmp_path, "né".encode())
    args = ["--model", tmp_path, *GREEDY]
    assert call("sample", *args, "--max_new_tokens", 2).stdout == "n\ufffd\n"
    assert call("sample", *args, "--max_new_tokens", 3).stdout == "né\n"


def test_several_samples_are_printed_one_after_the_other_and_equal_the_stream(tmp_path):
    text = "one\ntwo 🙂 three"
    make_scripted_model(tmp_path, text.encode(), prompt_length=2)
    args = ["--model", tmp_path, "--prompt", "> ", *GREEDY]
    assert call("sample", *args).stdout == f"> {text}\n"
    several = call("sample", *args, "--num_samples", 2).stdout
    assert several == f"--- sample 1 of 2 ---\n> {text}\n--- sample 2 of 2 ---\n> {text}\n"


def test_each_sample_ends_at_its_own_end_of_text(tmp_path):
    theirs = make_model(tmp_path, n_layer=1, n_head=2, n_embd=32, n_positions=64, **BYTES)
    with torch.no_grad():  # end-of-text after about 8 tokens
        theirs.transformer.ln_f.bias.copy_(theirs.transformer.wte.weight[256] * 0.9)
    theirs.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(11)
    ours = sample.GPT.from_pretrained(tmp_path)
    tokens = generate(ours, [65], 50, num_samples=6, generator=generator)
    expected = []
    for row in tokens:
        end = row.index(256) if 256 in row else len(row)
        expected.append(printable(bytes(row[:end]).decode(errors="replace")) + "\n")
    assert len(set(map(len, expected))) > 2
    args = ["--num_samples", 6, "--max_new_tokens", 50, "--seed", 11, "--top_k", 0, "--prompt", "A"]
    done = call("sample", "--model", tmp_path, *args, "--device", "cpu")
    assert re.split(r"--- sample \d of 6 ---\nA", done.stdout)[1:] == expected


def test_stop_texts_end_a_sample_on_the_command_line(tmp_path):
    make_scripted_model(tmp_path, b"alpha beta. gamma\n\ndelta")
    args = ["--model", tmp_path, *GREEDY]
    assert call("sample", *args, "--stop", "\n\n").stdout == "alpha beta. gamma\n"
    assert call("sample", *args, "--stop", "\n\n", "--stop", "a. g").stdout == "alpha bet\n"
    assert call("sample", *args, "--stop", "delta!").stdout == "alpha beta. gamma\n\ndelta\n"


def test_the_seed_decides_the_text(small):
    args = ["--model", small[1], "--prompt", "a", "--device", "cpu", "--seed"]
    first = call("sample", *args, 1).stdout
    assert call("sample", *args, 1).stdout == first
    assert call("sample", *args, 2).stdout != first


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_dtypes_work_on_the_command_line(dtype, tmp_path):
    make_scripted_model(tmp_path, b"sixteen bits")
    assert call("sample", "--model", tmp_path, "--dtype", dtype, *GREEDY).stdout == "sixteen bits\n"


def test_a_tiny_top_p_takes_the_most_likely_tokens(tmp_path):
    make_scripted_model(tmp_path, b"most likely")
    args = ["--model", tmp_path, "--device", "cpu", "--top_p", "1e-300", "--temperature", 5]
    assert call("sample", *args).stdout == "most likely\n"


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"abc", "abc!"),
        (b"ab\n\n", "ab\n!"),
        (b"abc\r\n", "abc!"),
        (b"\xef\xbb\xbfabc\r\n", "abc!"),
        (b"ab\xff", "ab\ufffd"),
    ],
)
def test_a_prompt_from_standard_input_loses_byte_order_mark_and_line_end(data, expected, tmp_path, monkeypatch):
    make_scripted_model(tmp_path, b"!" * 8, prompt_length=3)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    done = call("sample", "--model", tmp_path, "--prompt", "-", "--max_new_tokens", 1, *GREEDY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(expected)


def test_a_prompt_that_is_not_utf8_is_replaced(tmp_path):
    make_scripted_model(tmp_path, b"!", prompt_length=4)
    done = call("sample", "--model", tmp_path, "--prompt", "a\udcff", "--max_new_tokens", 1, *GREEDY)
    assert done.stdout == "a\ufffd!\n"


def test_a_run_directory_means_its_newest_checkpoint(tmp_path, monkeypatch):
    for step, text in ((9, "old"), (999_999, "newer"), (1_000_000, "newest")):
        make_scripted_model(tmp_path / "log" / f"step_{step:06d}", text.encode())
    (tmp_path / "log" / "tmp_step_2000000").mkdir()
    monkeypatch.chdir(tmp_path)
    assert call("sample", *GREEDY).stdout == "newest\n"
    assert call("sample", "--model", tmp_path / "log", *GREEDY).stdout == "newest\n"
    assert call("sample", "--model", "log/step_000009", *GREEDY).stdout == "old\n"


def test_a_checkpoint_of_the_trainer_continues_as_the_trainer_says(tmp_path, byte_shards):
    log_dir = tmp_path / "log"
    done = call("train_gpt2", *TINY, "--data_dir", byte_shards, "--log_dir", log_dir)
    assert done.returncode == 0, done.stderr
    trained = load("train_gpt2").GPT.from_pretrained(log_dir / "step_000005").eval()
    idx = torch.tensor([list(b"KING")])
    with torch.no_grad():
        for _ in range(30):  # more than block_size, 16
            logits, _ = trained(idx[:, -16:])
            idx = torch.cat((idx, logits[:, -1:].argmax(-1)), dim=1)
    args = ["--model", log_dir, "--prompt", "KING", "--max_new_tokens", 30]
    done = call("sample", *args, *GREEDY)
    assert done.stdout == printable(TOKENIZER.decode(idx[0].tolist())) + "\n"


def test_attention_that_plans_for_each_length_is_off(tmp_path):
    make_scripted_model(tmp_path, b"text")
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert call("sample", "--model", tmp_path, *GREEDY).returncode == 0
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# ----------------------------------------------------------------------- terminals and streams
def test_a_closed_pipe_is_not_an_error(small):
    line = command("sample", "--model", small[1], "--max_new_tokens", 2000, "--device", "cpu")
    writer = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert len(writer.stdout.read(1)) == 1
    writer.stdout.close()
    assert writer.wait(60) == 0
    assert writer.stderr.read() == b""


def test_a_full_disk_under_standard_output_is_one_line(small):
    with open("/dev/full", "w") as full:
        line = command("sample", "--model", small[1], "--device", "cpu")
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams_end_without_an_error(closed, tmp_path):
    make_scripted_model(tmp_path, b"streams")
    line = command("sample", "--model", tmp_path, *GREEDY)
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *line]
    done = subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("" if closed == ">&-" else "streams\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_a_terminal_lacks_become_question_marks(encoding, tmp_path):
    make_scripted_model(tmp_path, "日本 ok".encode())
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    line = command("sample", "--model", tmp_path, *GREEDY)
    done = subprocess.run(line, env=environment, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"?? ok\n", b"")


def test_streams_without_reconfigure_work_as_in_jupyter(tmp_path, monkeypatch):
    make_scripted_model(tmp_path, b"cell output")
    output = io.StringIO()  # like Jupyter's streams, it has no method reconfigure
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(tmp_path), *map(str, GREEDY)])
    handler = signal.getsignal(signal.SIGINT)
    try:
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")  # what %run does
    finally:
        signal.signal(signal.SIGINT, handler)
    assert output.getvalue() == "cell output\n"


class Terminal:
    """sample.py on a pseudo-terminal."""

    def __init__(self, *args):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            line = command("sample", *args)
            os.execv(line[0], line)
        self.shown = ""

    def type(self, keys):
        """Type keys, a string or bytes."""
        os.write(self.fd, keys.encode() if isinstance(keys, str) else keys)

    def read_until(self, text, seconds=60):
        """Return and consume what is shown up to text; all until the end if text is None."""
        deadline = time.monotonic() + seconds
        while text is None or text not in self.shown:
            readable, _, _ = select.select([self.fd], [], [], deadline - time.monotonic())
            assert readable, self.shown
            try:
                self.shown += os.read(self.fd, 1000).decode(errors="replace")
            except OSError:  # the other end is closed
                assert text is None, self.shown
                return self.shown
        before, self.shown = self.shown.split(text, 1)
        return before

    def exit_status(self):
        """Return the exit status, or the negative number of the signal that ended the script."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_the_terminal_continues_prompts_until_ctrl_d(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")  # stdin is strict, as in most locales
    make_scripted_model(tmp_path, b"<answer>", prompt_length=2)
    terminal = Terminal("--model", tmp_path, *GREEDY)
    terminal.read_until("> ")
    terminal.type("ab\n")
    assert terminal.read_until("> ").endswith("ab\r\n<answer>\r\n")
    terminal.type("x" * 50 + "\n")
    message = "error: the prompt has 50 tokens, but the model takes at most 11"
    assert message in terminal.read_until("> ")
    terminal.type(b"\xff\n")  # not UTF-8
    assert "Traceback" not in terminal.read_until("> ")
    terminal.type("cd\n")
    assert terminal.read_until("> ").endswith("cd\r\n<answer>\r\n")
    terminal.type("\x04")
    end = terminal.read_until(None)
    assert "Traceback" not in end
    assert terminal.exit_status() == 0


def test_ctrl_c_on_the_terminal_ends_without_a_traceback(tmp_path):
    make_scripted_model(tmp_path, b"<answer>", prompt_length=2)
    terminal = Terminal("--model", tmp_path, *GREEDY)
    terminal.read_until("> ")
    terminal.type("ab\n")
    terminal.read_until("> ")
    terminal.type("\x03")
    end = terminal.read_until(None)
    assert "Traceback" not in end and "Interrupt" not in end
    assert terminal.exit_status() == -signal.SIGINT


# --------------------------------------------------------------------- models as people have them
def save_weights(directory, weights):
    """Replace the weights of a saved model."""
    copies = {name: weight.contiguous().clone() for name, weight in weights.items()}
    save_file(copies, directory / "model.safetensors", {"format": "pt"})


def shard(directory):
    """Save the model again in several files with an index, as large models are stored."""
    GPT2LMHeadModel.from_pretrained(directory).save_pretrained(directory / "new", max_shard_size="20KB")
    (directory / "model.safetensors").unlink()
    for path in (directory / "new").glob("model*"):
        path.rename(directory / path.name)
    assert len(list(directory.glob("model-*.safetensors"))) > 1


def add_rows(directory, num_rows):
    """Add rows to the token embedding, as resize_token_embeddings and padding do."""
    weights = load_file(directory / "model.safetensors")
    embedding = weights["transformer.wte.weight"]
    extra = 10 * torch.randn(num_rows, embedding.shape[1])  # a visible error if they were used
    weights["transformer.wte.weight"] = torch.cat((embedding, extra))
    save_weights(directory, weights)
    edit_config(directory, vocab_size=len(embedding) + num_rows)


def drop_prefix(directory):
    """Remove "transformer." from all names, as in OpenAI's gpt2 on the Hub."""
    weights = load_file(directory / "model.safetensors")
    save_weights(directory, {name.removeprefix("transformer."): weight for name, weight in weights.items()})


def add_buffers(directory):
    """Add the causal masks that older versions of transformers stored."""
    weights = load_file(directory / "model.safetensors")
    for i in range(2):
        weights[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
        weights[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_weights(directory, weights)


def store_head(directory):
    """Store the output head although it is the token embedding."""
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    save_weights(directory, weights)


def forget_config(directory):
    """Leave out of config.json what has GPT-2's default value."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    names = ("model_type", "vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    path.write_text(json.dumps({name: config[name] for name in names}))


def convert_to_float16(directory):
    """Store the weights in float16."""
    weights = load_file(directory / "model.safetensors")
    save_weights(directory, {name: weight.half() for name, weight in weights.items()})


VARIANTS = {
    "several files with an index": shard,
    "one extra row, a padding token": lambda directory: add_rows(directory, 1),
    "rows up to a multiple of 128": lambda directory: add_rows(directory, 384 - 257),
    "no prefix": drop_prefix,
    "causal masks": add_buffers,
    "a stored head": store_head,
    "a short config.json": forget_config,
    "a step directory of a run": lambda directory: None,
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_directory_as_people_have_it_gives_the_same_logits(variant, small):
    theirs, directory = small
    VARIANTS[variant](directory)
    ours = sample.GPT.from_pretrained(directory)
    idx = torch.randint(257, (2, 24))
    logits = ours.logits(ours(idx))
    torch.testing.assert_close(logits, theirs(idx).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_float16_weights_are_computed_in_float32(small):
    theirs, directory = small
    convert_to_float16(directory)
    ours = sample.GPT.from_pretrained(directory)
    idx = torch.randint(257, (2, 24))
    logits = ours.logits(ours(idx))
    assert logits.dtype == torch.float32
    rounded = theirs.half().float()
    torch.testing.assert_close(logits, rounded(idx).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("vocab_size", [50258, 50304])
def test_gpt2_with_extra_rows_is_gpt2(vocab_size, tmp_path, tiktoken_cache):
    theirs = make_model(tmp_path, n_layer=1, n_head=2, n_embd=8, n_positions=16)
    add_rows(tmp_path, vocab_size - 50257)
    model, tokenizer, _ = sample.load_model(str(tmp_path), torch.device("cpu"), torch.float32)
    assert (model.config["vocab_size"], tokenizer.n_vocab) == (50257, 50257)
    idx = torch.randint(50257, (1, 16))
    logits = model.logits(model(idx))
    torch.testing.assert_close(logits, theirs(idx).logits, rtol=1e-4, atol=1e-4)


def test_a_directory_with_only_pytorch_model_bin_says_how_to_convert_it(small):
    directory = small[1]
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert_refused("--model", directory, words=["pytorch_model.bin", "save_pretrained"])


def test_a_file_is_not_a_model(small):
    path = small[1] / "model.safetensors"
    assert_refused("--model", path, words=[f"{path} is a file", "directory"])


@pytest.mark.parametrize("name", ["no/such/directory", "./odd name", "../log", "log/step_7/"])
def test_a_mistyped_path_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused("--model", name, words=[f"{name} does not exist"])


@pytest.mark.parametrize("name", ["gpt2", "log/step_000007"])
@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_name_without_a_network_is_one_line(name, offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    words = [f"{name} is not a directory here", "Hugging Face Hub", "local directory"]
    assert_refused("--model", name, words=words)


def test_a_hub_download_that_stalls_is_one_line(monkeypatch):
    class ReadTimeout(Exception):  # as in the Hub's HTTP library: neither OSError nor ValueError
        pass

    def stall(*args, **settings):
        raise ReadTimeout("The read operation timed out\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stall)
    assert_refused("--model", "gpt2", words=["timed out", "run the same command again"])


def test_no_checkpoint_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(words=["found no checkpoint in log", "train_gpt2.py", "--model"])
    (tmp_path / "log").mkdir()
    assert_refused(words=["log contains neither config.json nor step_"])


# ---------------------------------------------------------------------------------- bad values
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num_samples", 0], ["--num_samples is 0", "above 0"]),
        (["--num_samples", 10**12], ["--num_samples is 1000000000000", "at most"]),
        (["--max_new_tokens", -1], ["--max_new_tokens is -1"]),
        (["--temperature", -0.5], ["--temperature is -0.5", "0 or more"]),
        (["--temperature", "nan"], ["--temperature is nan"]),
        (["--top_k", -2], ["--top_k is -2"]),
        (["--top_p", 0], ["--top_p is 0.0"]),
        (["--top_p", 1.5], ["--top_p is 1.5", "at most 1"]),
        (["--top_p", "nan"], ["--top_p is nan"]),
        (["--stop", ""], ["--stop is empty"]),
        (["--seed", 2**64], ["--seed is"]),
        (["--device", "abacus"], ["--device abacus is not available"]),
        (["--device", "meta"], ["--device meta is not available"]),
        (["--dtype", "int4"], ["int4"]),
        (["--prompt", "x" * 25], ["the prompt has 25 tokens", "at most 24"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:30],
)
def test_bad_flags_are_one_line(flags, words, small):
    assert_refused("--model", small[1], "--device", "cpu", *flags, words=words)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "llama"}, ["llama", "gpt2"]),
        ({"n_embd": 64}, ["wte.weight", "257 rows of 64 numbers"]),
        ({"n_layer": 3}, ["h.2.ln_1.weight"]),
        ({"n_layer": 1}, ["h.1.ln_1.weight"]),
        ({"n_head": 5}, ["n_embd 32", "n_head 5"]),
        ({"n_positions": 32}, ["wpe.weight", "[24, 32]"]),
        ({"activation_function": "silu"}, ["silu"]),
        ({"tokenizer": "gpt2"}, ["257", "gpt2"]),
        ({"tokenizer": "cl100k_base"}, ["257", "cl100k_base"]),
        ({"vocab_size": 300_000}, ["300000", "50257"]),
        ({"n_layer": 10**30}, ["n_layer"]),
        ({"layer_norm_epsilon": math.inf}, ["layer_norm_epsilon"]),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_one_line(changes, words, small):
    edit_config(small[1], **changes)
    assert_refused("--model", small[1], words=words)


def test_a_config_nested_too_deeply_is_one_line(small):
    (small[1] / "config.json").write_text("[" * 100_000)
    assert_refused("--model", small[1], words=["config.json"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_named_pipe_in_place_of_a_file_does_not_hang(name, small):
    (small[1] / name).unlink()
    os.mkfifo(small[1] / name)
    assert_refused("--model", small[1], words=[f"{name} is not a regular file"])


def test_gpt2_vocabulary_that_cannot_be_downloaded_is_one_line(tmp_path, monkeypatch):
    make_model(tmp_path / "model", n_layer=1, n_head=2, n_embd=16, n_positions=8)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    assert_refused("--model", tmp_path / "model", words=["vocabulary", "TIKTOKEN_CACHE_DIR"])


def test_a_login_page_in_place_of_gpt2_vocabulary_is_one_line(tmp_path, monkeypatch):
    make_model(tmp_path / "model", n_layer=1, n_head=2, n_embd=16, n_positions=8)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", lambda *args: b"<html>log in first</html>")
    assert_refused("--model", tmp_path / "model", words=["vocabulary", "TIKTOKEN_CACHE_DIR"])


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_that_computes_nan_is_one_line(temperature, small):
    theirs, directory = small
    with torch.no_grad():
        theirs.transformer.ln_f.weight[3] = math.nan
    theirs.save_pretrained(directory)
    edit_config(directory, tokenizer="bytes")
    args = ["--model", directory, "--temperature", temperature, "--num_samples", 2]
    assert_refused(*args, words=["NaN"])


# ------------------------------------------------------------------------------------- memory
def test_samples_that_do_not_fit_into_memory_are_one_line(small, monkeypatch):
    def select(self, sequences, max_length):
        return torch.empty(2**50)  # a petabyte: PyTorch's own error

    script = load("sample")
    monkeypatch.setattr(script.KVCache, "select", select)
    done = call(script, "--model", small[1], "--num_samples", 100, "--device", "cpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: --num_samples 100 [^\n]*memory[^\n]*\n", done.stderr)


def write_sparse_model(directory, n_positions):
    """Write a model of zeros with one small layer whose file takes no space on most disks."""
    config = GPT2Config(n_layer=1, n_head=1, n_embd=1024, n_positions=1, **BYTES)
    shapes = {name: list(p.shape) for name, p in GPT2LMHeadModel(config).named_parameters()}
    shapes["transformer.wpe.weight"] = [n_positions, 1024]
    header = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(header).encode()
    directory.mkdir()
    config.save_pretrained(directory)
    edit_config(directory, n_positions=n_positions)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset)


@pytest.mark.parametrize("gigabytes", [3, 6])  # too little to read the file, too little to use it
def test_a_model_larger_than_memory_is_one_line(gigabytes, tmp_path):
    write_sparse_model(tmp_path / "model", n_positions=1_000_000)  # 4 GB

    def limit_memory():
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes * 10**9, gigabytes * 10**9))

    line = command("sample", "--model", tmp_path / "model", "--device", "cpu")
    done = subprocess.run(line, capture_output=True, text=True, preexec_fn=limit_memory)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]*does not fit into the memory[^\n]*\n", done.stderr)
