"""sample.py: the ids of transformers, the cache, the distribution of tokens, text in all its forms, bad input."""

import collections
import io
import json
import math
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY, call, command, load
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

sample = load("sample")
BYTES = dict(vocab_size=257, tokenizer="bytes", bos_token_id=256, eos_token_id=256)
GREEDY = ["--temperature", 0, "--device", "cpu"]


def make_model(directory, seed=0, **config):
    """A random GPT-2 in directory whose next token depends on all that came before; returns transformers' model."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name:
                parameter.normal_(std=0.4 if "wpe" in name or "wte" in name else 1.5 * model.config.n_embd**-0.5)
    model.save_pretrained(directory)
    return model


@pytest.fixture
def small(tmp_path):
    """(transformers' model, its directory): 257 tokens, 24 positions."""
    config = dict(n_layer=2, n_head=4, n_embd=32, n_positions=24)
    return make_model(tmp_path / "small", **config, **BYTES), tmp_path / "small"


def scripted(directory, script, prompt_length=1, n_positions=None, sure=30.0):
    """A model whose likeliest token after position prompt_length - 1 + i is script[i] (bytes, or ids), and 256 then."""
    script = [*script, 256]
    n_positions = n_positions or prompt_length + len(script)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=320, n_positions=n_positions, **BYTES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("ln_" in name and "weight" in name))
        model.transformer.wte.weight.copy_(torch.eye(257, 320) * sure**0.5)
        for i, token in enumerate(script[: n_positions - prompt_length + 1]):
            model.transformer.wpe.weight[prompt_length - 1 + i, token] = 100.0
    model.save_pretrained(directory)
    return directory


def ids_of(model, prompt, max_new_tokens, num_samples=1, **settings):
    """What sample.generate adds to the ids of prompt: lists (num_samples, max_new_tokens); greedy without settings."""

    def pick(logits):
        return sample.choose(logits, **(settings or {"temperature": 0}))

    return torch.stack([*sample.generate(model, prompt, num_samples, max_new_tokens, pick)], dim=1).tolist()


# ------------------------------------------------------------------------------- ids and logits
SHAPES = [  # n_layer, n_head, n_embd, vocab_size, n_positions, n_inner, activation_function
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
    (7, 3, 33, 500, 30, 64, "gelu_new"),
    (8, 4, 128, 5003, 64, None, "gelu_new"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_greedy_ids_equal_those_of_transformers(shape, tmp_path):
    names = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions", "n_inner", "activation_function")
    config = dict(zip(names, shape, strict=True))
    theirs = make_model(tmp_path, seed=sum(shape[:5]), **config, bos_token_id=0, eos_token_id=0)
    theirs.generation_config.eos_token_id = None
    ours, seen = sample.GPT(tmp_path), set()
    for length in (1, 2, 5, config["n_positions"] - 8):
        prompt = torch.randint(config["vocab_size"], (1, length))
        n = min(40, config["n_positions"] + 1 - length)  # all that fit, and the one after
        expected = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=n, pad_token_id=0
        )[0, length:].tolist()
        assert ids_of(ours, prompt[0].tolist(), n) == [expected]
        seen.update(expected)
    assert len(seen) >= min(8, config["vocab_size"] // 3)  # such models do not repeat themselves


@pytest.mark.parametrize("prompt_length", [1, 7, 24])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_logits_equal_those_without_a_cache_at_every_length(prompt_length, num_samples, small):
    theirs, directory = small
    block_size = theirs.config.n_positions
    ours, generator, seen = sample.GPT(directory), torch.Generator().manual_seed(0), []
    if num_samples > 1:  # as main() does
        ours.pack()

    def pick(logits):
        seen.append(logits)
        return sample.choose(logits, generator=generator)

    prompt = torch.randint(257, (prompt_length,)).tolist()
    ids = torch.stack([*sample.generate(ours, prompt, num_samples, 2 * block_size, pick)], dim=1)  # (B, T)
    assert len({*map(tuple, ids.tolist())}) == num_samples  # the rows differ
    ids = torch.cat((torch.tensor([prompt] * num_samples), ids), dim=1)
    assert len(seen) == 2 * block_size
    for i, logits in enumerate(seen):
        window = ids[:, : prompt_length + i][:, -block_size:]
        with torch.no_grad():
            expected = theirs(window).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_model_without_a_cache_takes_positions_and_masks(small):
    theirs, directory = small
    ours = sample.GPT(directory)
    idx, pos = torch.randint(257, (2, 9)), torch.arange(9).expand(2, 9)
    with torch.no_grad():
        expected = theirs(idx).logits
    torch.testing.assert_close(ours.logits(ours.hidden(idx, pos)), expected, rtol=1e-4, atol=1e-4)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(ours.logits(ours.hidden(idx, pos, mask)), expected, rtol=1e-4, atol=1e-4)


def test_greedy_samples_side_by_side_equal_one_alone(small):
    ours = sample.GPT(small[1])
    (alone,) = ids_of(ours, [1, 2, 3], 60)
    ours.pack()
    assert ids_of(ours, [1, 2, 3], 60, num_samples=4) == [alone] * 4


def test_reduced_precision_is_close(small):
    theirs, directory = small
    idx = torch.randint(257, (1, 12))
    expected = theirs(idx).logits.softmax(-1)
    for dtype, most in ((torch.bfloat16, 0.2), (torch.float16, 0.05)):
        ours = sample.GPT(directory, dtype=dtype)
        probs = ours.logits(ours.hidden(idx, torch.arange(12)))
        assert probs.dtype == dtype
        assert (probs.float().softmax(-1) - expected).abs().max() < most


# ------------------------------------------------------------------------------- random choices
def chi_square(counts, probs):
    """(Pearson's statistic, the value that one draw in 10,000 exceeds), ids expected fewer than 5 times in one bin."""
    n, expected = sum(counts), [sum(counts) * p for p in probs]
    bins = [(c, e) for c, e in zip(counts, expected, strict=True) if e >= 5]
    rest = (n - sum(c for c, _ in bins), n - sum(e for _, e in bins))
    bins += [rest] if rest[1] > 1 else []
    df = max(1, len(bins) - 1)
    limit = df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df))) ** 3  # Wilson and Hilferty, 1931
    return sum((c - e) ** 2 / e for c, e in bins), limit


SETTINGS = [
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.6),
    dict(top_k=5),
    dict(top_k=10_000, temperature=1.3),
    dict(top_p=0.9),
    dict(top_p=0.5, temperature=1.2),
    dict(top_k=20, top_p=0.8),
    dict(top_k=40, top_p=0.95, temperature=0.8),
]


def reference(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The probabilities (V,) of the next token by transformers' own processors, for logits (V,)."""
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    return scores.double().softmax(-1)[0]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_next_token_is_distributed_as_it_should(settings, small):
    theirs, directory = small
    prompt, n = [7, 77, 177], 20_000
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt])).logits[0, -1]
    generator = torch.Generator().manual_seed(5)
    ids = ids_of(sample.GPT(directory), prompt, 1, n, **{"generator": generator, **settings})
    counter = collections.Counter(i for (i,) in ids)
    counts = [counter[i] for i in range(257)]
    probs = reference(logits, **settings).tolist()
    assert not any(c for c, p in zip(counts, probs, strict=True) if p == 0)
    statistic, limit = chi_square(counts, probs)
    assert statistic < limit
    for other in SETTINGS:  # the test tells the settings apart
        if (reference(logits, **other) - torch.tensor(probs)).abs().sum() > 0.1:
            statistic, limit = chi_square(counts, [max(p, 1e-9) for p in reference(logits, **other).tolist()])
            assert statistic > limit


def test_rows_are_drawn_independently_and_each_from_its_own_logits():
    logits = torch.randn(4, 50) * 2
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sample.choose(logits, top_p=0.9, generator=generator) for _ in range(3000)])  # (3000, 4)
    for row in range(4):
        counts = draws[:, row].bincount(minlength=50).tolist()
        statistic, limit = chi_square(counts, reference(logits[row], top_p=0.9).tolist())
        assert statistic < limit
    same = sum((draws[:, 0] == draws[:, 1]).tolist()) / 3000
    p, q = (reference(logits[row], top_p=0.9) for row in (0, 1))
    assert abs(same - (p * q).sum().item()) < 0.05


def test_extreme_temperatures_and_logits():
    logits = torch.tensor([[0.0, 3.0, 2.9, -5.0]])
    assert sample.choose(logits, temperature=1e-30).item() == 1
    assert sample.choose(logits * 1e37, temperature=1e-5).item() == 1
    assert sample.choose(logits, temperature=0, top_k=3, top_p=0.1).item() == 1
    assert sample.choose(logits, top_p=1e-9).item() == 1
    with pytest.raises(ValueError, match="NaN"):
        sample.choose(logits * math.nan)


# ------------------------------------------------------------------------------------------ text
ENC = load("sample").get_tokenizer("bytes")


def add_all(data, stops=()):
    """The pieces that sample.Text makes of bytes, a token each, and of their end."""
    text = sample.Text(ENC, stops)
    return [text.add(token) for token in [*data, None]]


def test_characters_come_whole_and_at_once():
    pieces = add_all("aß€🙂z".encode())
    assert pieces == ["a", "", "ß", "", "", "€", "", "", "", "🙂", "z", ""]


def test_any_bytes_give_what_decoding_all_at_once_gives():
    rng = random.Random(0)
    for _ in range(300):
        data = bytes(rng.choices([65, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0x82, 0xFF, 0xED, 0xA0], k=12))
        whole = "".join(c if ord(c) >= 160 or c == "A" else "\ufffd" for c in data.decode(errors="replace"))
        assert "".join(add_all(data)) == whole


def test_control_characters_never_come_out():
    text = "".join(add_all(bytes(range(256)) + "\x80\x9b31m\u00a0\u3000".encode()))
    assert {c for c in text if ord(c) < 32 or 127 <= ord(c) < 160} == {"\n", "\t"}
    assert text.endswith("\ufffd\ufffd31m\u00a0\u3000")


def test_stop_texts_against_brute_force():
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("abé", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("abé", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        ends = [n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)]
        seen = text[: ends[0]] if ends else text
        expected = seen[: min(seen.find(stop) for stop in stops if stop in seen)] if ends else text
        pieces = add_all(text.encode(), stops)
        assert "".join(pieces) == expected
        for n in range(len(text.encode())):  # nothing waits that no stop text could begin with
            waiting = expected[len("".join(pieces[: n + 1])) :]
            arrived = text.encode()[: n + 1].decode(errors="ignore")
            held = arrived[len("".join(pieces[: n + 1])) :]
            assert not waiting or not held or any(stop.startswith(held) for stop in stops)


def test_end_of_text_ends_a_text_and_flushes_half_a_character():
    text = sample.Text(ENC, ["xyz"])
    assert [text.add(i) for i in (97, 120, 0xC3, 256, 98)] == ["a", "", "", "x\ufffd", ""]
    assert text.done


# ---------------------------------------------------------------------------------- command line
def test_text_equals_that_of_transformers_ids(small):
    theirs, directory = small
    for prompt in ("ROMEO", "é", "x" * 20):
        ids = torch.tensor([list(prompt.encode())])
        n = 24 - ids.shape[1]
        expected = theirs.generate(ids, do_sample=False, max_new_tokens=n, pad_token_id=256)[0, ids.shape[1] :]
        text = bytes(i for i in expected.tolist() if i != 256).decode(errors="replace")
        done = call("sample", "--model", directory, "--prompt", prompt, "--max_new_tokens", n, *GREEDY)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == prompt + sample.CONTROL.sub("\ufffd", text) + "\n"


def test_gpt2_tokens(tmp_path, tiktoken_cache):
    theirs = make_model(tmp_path, n_layer=1, n_head=2, n_embd=16, n_positions=64)
    enc = sample.get_tokenizer("gpt2")
    prompt = "Hello, I'm a language model,"
    ids = torch.tensor([enc.encode(prompt)])
    expected = theirs.generate(ids, do_sample=False, max_new_tokens=40, pad_token_id=50256)[0].tolist()
    done = call("sample", "--model", tmp_path, "--prompt", prompt, "--max_new_tokens", 40, *GREEDY)
    assert done.stdout == sample.CONTROL.sub("\ufffd", enc.decode(expected)) + "\n"


def test_text_comes_character_by_character(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        written = []

        def write(self, text):
            self.written.append(text)
            return super().write(text)

    text = "naïve — 日本語 🙂!"
    scripted(tmp_path, text.encode())
    monkeypatch.setattr(io, "StringIO", Terminal)
    done = call("sample", "--model", tmp_path, *GREEDY)
    assert done.stdout == text + "\n"
    assert [piece for piece in Terminal.written if piece] == [*text, "\n"]


def test_a_character_cut_by_max_new_tokens_is_marked(tmp_path):
    scripted(tmp_path, "né".encode())
    assert call("sample", "--model", tmp_path, "--max_new_tokens", 2, *GREEDY).stdout == "n\ufffd\n"
    assert call("sample", "--model", tmp_path, "--max_new_tokens", 3, *GREEDY).stdout == "né\n"


def test_samples_are_printed_whole_and_equal_the_stream(tmp_path):
    text = "one\ntwo 🙂 three"
    scripted(tmp_path, text.encode(), prompt_length=2)
    args = ["--model", tmp_path, "--prompt", "> ", *GREEDY]
    assert call("sample", *args).stdout == f"> {text}\n"
    several = call("sample", *args, "--num_samples", 2).stdout
    assert several == f"--- sample 1 of 2 ---\n> {text}\n--- sample 2 of 2 ---\n> {text}\n"


def test_each_sample_ends_by_itself(tmp_path):
    theirs = make_model(tmp_path, n_layer=1, n_head=2, n_embd=32, n_positions=64, **BYTES)
    with torch.no_grad():  # end-of-text after about 8 tokens
        theirs.transformer.ln_f.bias.copy_(theirs.transformer.wte.weight[256] * 0.9)
    theirs.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(11)
    ids = ids_of(sample.GPT(tmp_path), [65], 50, 6, generator=generator)
    ends = [row.index(256) if 256 in row else len(row) for row in ids]
    assert len(set(ends)) > 2, ends
    expected = [bytes(row[:end]).decode(errors="replace") for row, end in zip(ids, ends, strict=True)]
    flags = ["--num_samples", 6, "--max_new_tokens", 50, "--seed", 11, "--top_k", 0, "--prompt", "A", "--device", "cpu"]
    done = call("sample", "--model", tmp_path, *flags)
    texts = re.split(r"--- sample \d of 6 ---\nA", done.stdout)[1:]
    assert texts == [sample.CONTROL.sub("\ufffd", text) + "\n" for text in expected]


def test_stop_texts_on_the_command_line(tmp_path):
    scripted(tmp_path, b"alpha beta. gamma\n\ndelta")
    assert call("sample", "--model", tmp_path, "--stop", "\n\n", *GREEDY).stdout == "alpha beta. gamma\n"
    assert call("sample", "--model", tmp_path, "--stop", "\n\n", "--stop", "a. g", *GREEDY).stdout == "alpha bet\n"
    assert call("sample", "--model", tmp_path, "--stop", "delta!", *GREEDY).stdout == "alpha beta. gamma\n\ndelta\n"


def test_seed_decides_the_text(small):
    args = ["--model", small[1], "--prompt", "a", "--device", "cpu", "--seed"]
    first, again, other = (call("sample", *args, seed).stdout for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(dtype, tmp_path):
    scripted(tmp_path, b"sixteen bits")
    assert call("sample", "--model", tmp_path, "--dtype", dtype, *GREEDY).stdout == "sixteen bits\n"


def test_prompt_from_standard_input(tmp_path, monkeypatch):
    scripted(tmp_path, b"!", prompt_length=3)
    for data, shown in ((b"ab\n\n", "ab\n"), (b"abc", "abc"), (b"ab\xff", "ab\ufffd")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        done = call("sample", "--model", tmp_path, "--prompt", "-", "--max_new_tokens", 1, *GREEDY)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(shown)
    assert (
        call("sample", "--model", tmp_path, "--prompt", "a\udcff", "--max_new_tokens", 1, *GREEDY).stdout[1] == "\ufffd"
    )


def test_newest_checkpoint_of_a_run(tmp_path, monkeypatch):
    for step, text in ((9, "old"), (999_999, "newer"), (1_000_000, "newest")):
        scripted(tmp_path / "log" / f"step_{step:06d}", text.encode())
    (tmp_path / "log" / "tmp_step_2000000").mkdir()
    monkeypatch.chdir(tmp_path)
    assert call("sample", *GREEDY).stdout == "newest\n"
    assert call("sample", "--model", tmp_path / "log", *GREEDY).stdout == "newest\n"
    assert call("sample", "--model", "log/step_000009", *GREEDY).stdout == "old\n"


def test_a_checkpoint_of_the_trainer(tmp_path, byte_shards):
    log_dir = tmp_path / "log"
    assert call("train_gpt2", *TINY, "--data_dir", byte_shards, "--log_dir", log_dir).returncode == 0
    trained = load("train_gpt2").GPT.from_pretrained(log_dir / "step_000005").eval()
    idx = torch.tensor([list(b"KING")])
    with torch.no_grad():
        for _ in range(30):  # past block_size, 16
            idx = torch.cat((idx, trained(idx[:, -16:])[0][:, -1:].argmax(-1)), dim=1)
    done = call("sample", "--model", log_dir, "--prompt", "KING", "--max_new_tokens", 30, *GREEDY)
    assert done.stdout == sample.CONTROL.sub("\ufffd", ENC.decode(idx[0].tolist())) + "\n"


def test_a_reader_that_leaves_is_no_error(small):
    line = command("sample", "--model", small[1], "--max_new_tokens", 2000, "--device", "cpu")
    writer = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert len(writer.stdout.read(1)) == 1
    writer.stdout.close()
    assert writer.wait(60) == 0
    assert writer.stderr.read() == b""


def test_standard_output_that_is_full_is_told_in_a_line(small):
    with open("/dev/full", "w") as full:
        line = command("sample", "--model", small[1], "--device", "cpu")
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "No space left" in done.stderr


class Terminal:
    """sample.py on a pseudo-terminal."""

    def __init__(self, *args):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            line = command("sample", *args)
            os.execv(line[0], line)
        self.seen = ""

    def type(self, keys):
        os.write(self.fd, keys.encode())

    def wait_for(self, text, seconds=60):
        """What it shows up to text, which is consumed; with text None, up to its end."""
        deadline = time.monotonic() + seconds
        while text is None or text not in self.seen:
            assert select.select([self.fd], [], [], deadline - time.monotonic())[0], self.seen
            try:
                self.seen += os.read(self.fd, 1000).decode()
            except OSError:  # the other end is closed
                assert text is None, self.seen
                return self.seen
        before, self.seen = self.seen.split(text, 1)
        return before

    def status(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.parametrize("key", ["\x04", "\x03"], ids=["Ctrl-D", "Ctrl-C"])
def test_interactive_loop(key, tmp_path):
    scripted(tmp_path, b"<answer>", prompt_length=2)
    terminal = Terminal("--model", tmp_path, *GREEDY)
    terminal.wait_for("> ")
    terminal.type("ab\n")
    assert terminal.wait_for("> ").endswith("ab\r\n<answer>\r\n")
    if key == "\x04":
        terminal.type("x" * 50 + "\n")
        assert "error: the prompt has 50 tokens, the model takes 11" in terminal.wait_for("> ")
        terminal.type("cd\n")
        assert terminal.wait_for("> ").endswith("cd\r\n<answer>\r\n")
    terminal.type(key)
    end = terminal.wait_for(None)
    assert "Traceback" not in end and "Interrupt" not in end
    assert terminal.status() == (0 if key == "\x04" else -signal.SIGINT)


# ------------------------------------------------------------------------------------- bad input
def refused(*args, words, script="sample"):
    """The script ends with status 2, nothing on stdout and one line on stderr that has all words."""
    done = call(script, *args)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num_samples", 0], ["--num_samples is 0", "above 0"]),
        (["--max_new_tokens", -1], ["--max_new_tokens is -1"]),
        (["--temperature", -0.5], ["--temperature is -0.5", "0 or more"]),
        (["--temperature", "nan"], ["--temperature is nan"]),
        (["--top_k", -2], ["--top_k is -2"]),
        (["--top_p", 0], ["--top_p is 0.0"]),
        (["--top_p", 1.5], ["--top_p is 1.5", "1 at most"]),
        (["--stop", ""], ["--stop is empty"]),
        (["--seed", 2**64], ["--seed is"]),
        (["--device", "abacus"], ["--device abacus is not available"]),
        (["--dtype", "int4"], ["int4"]),
        (["--prompt", "x" * 25], ["the prompt has 25 tokens", "takes 24"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:30],
)
def test_bad_flags(flags, words, small):
    refused("--model", small[1], "--device", "cpu", *flags, words=words)


def test_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(words=["no checkpoint in log", "train_gpt2.py", "--model"])
    (tmp_path / "log").mkdir()
    refused(words=["log holds no config.json", "nothing"])


@pytest.mark.parametrize("name", ["gpt2", "log/step_000007", "no/such/directory", "./odd name"])
def test_hub_name_offline(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("--model", name, words=[f"--model {name} is no directory", "name a directory"])


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="llama"), ["llama", "gpt2"]),
        (dict(n_embd=64), ["(257, 32)", "(257, 64)"]),
        (dict(n_layer=3), ["2 blocks", "n_layer is 3"]),
        (dict(n_head=5), ["n_embd 32", "n_head 5"]),
        (dict(n_positions=32), ["wpe.weight", "(24, 32)"]),
        (dict(activation_function="silu"), ["silu"]),
        (dict(tokenizer="gpt2"), ["257", "gpt2"]),
        (dict(tokenizer="cl100k_base"), ["257", "cl100k_base"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_models_that_do_not_fit(changes, words, small):
    edit_config(small[1], **changes)
    refused("--model", small[1], words=words)


def test_vocabulary_without_a_name(tmp_path):
    make_model(tmp_path, n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=300)
    refused("--model", tmp_path, words=["300 tokens", "50257"])


def test_gpt2_vocabulary_out_of_reach(tmp_path, monkeypatch):
    make_model(tmp_path / "model", n_layer=1, n_head=2, n_embd=16, n_positions=8)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    refused("--model", tmp_path / "model", words=["vocabulary", "TIKTOKEN_CACHE_DIR"])


def test_a_model_of_nans(small):
    theirs, directory = small
    with torch.no_grad():
        theirs.transformer.ln_f.weight[3] = math.nan
    theirs.save_pretrained(directory)
    edit_config(directory, tokenizer="bytes")
    for temperature in (0, 1):
        done = call("sample", "--model", directory, "--temperature", temperature, "--num_samples", 2)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"error: [^\n]*NaN[^\n]*\n", done.stderr)
