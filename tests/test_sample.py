"""sample.py: tokens and logits of transformers, the distribution of tokens, text, prompts, terminals."""

import contextlib
import io
import math
import os
import pty
import random
import re
import signal
import sys
from unittest import mock

import pytest
import torch
from conftest import DEVICES, TINY, Run, assert_late_error, call, load, succeed
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

sample = load("sample")
BYTES = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}
GREEDY = ["--temperature", 0, "--device", "cpu"]
TOKENIZER = sample.get_tokenizer("bytes")


# ------------------------------------------------------------------------------------- helpers
def make_model(directory, **config):
    """Save a random GPT-2 whose next token depends on all earlier tokens. Returns transformers' model."""
    model = GPT2LMHeadModel(GPT2Config(**{**BYTES, **config})).eval()
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
    return make_model(tmp_path / "small", n_layer=2, n_head=4, n_embd=32, n_positions=24), tmp_path / "small"


def make_scripted_model(directory, script, prompt_length=1):
    """Save a model that continues any prompt of prompt_length tokens with script, then with token 256.

    Its logits depend on the position only: the position embedding of the i-th new token points to
    the token embedding of script[i].
    """
    script = [*script, 256]
    n_positions = prompt_length + len(script)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=320, n_positions=n_positions, **BYTES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_layer_norm_weight = "ln_" in name and "weight" in name
            parameter.fill_(1.0 if is_layer_norm_weight else 0.0)
        model.transformer.wte.weight.copy_(torch.eye(257, 320) * 30**0.5)
        for i, token in enumerate(script):
            model.transformer.wpe.weight[prompt_length - 1 + i, token] = 100.0
    model.save_pretrained(directory)
    return directory


def load_gpt(directory, dtype=torch.float32, device="cpu"):
    """Return sample.py's model."""
    return sample.load_model(str(directory), torch.device(device), dtype)[0]


def generate(model, prompt, max_new_tokens, num_samples=1, **settings):
    """Return the new tokens of sample.generate, num_samples lists. Without settings, it is greedy."""
    settings = settings or {"temperature": 0}

    def sampler(logits):
        return sample.sample_token(logits, **settings)

    steps = sample.generate(model, prompt, num_samples, max_new_tokens, sampler)
    return torch.stack(list(steps), dim=1).tolist()


def printable(text):
    """Return text as sample.py prints it: with U+FFFD instead of control characters."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


# --------------------------------------------------------------------------- tokens and logits
@pytest.mark.gpt2
@pytest.mark.parametrize("prompt_length, num_samples", [(1, 3), (7, 1), (24, 3)])
def test_logits_equal_those_without_a_cache_at_every_length(prompt_length, num_samples, small):
    model, directory = small
    gpt = load_gpt(directory)
    generator = torch.Generator().manual_seed(0)
    seen = []

    def sampler(logits):
        seen.append(logits)
        return sample.sample_token(logits, generator=generator)

    # twice as many tokens as the model has positions: later ones see the last 24 tokens
    prompt = torch.randint(257, (prompt_length,)).tolist()
    new = torch.stack(list(sample.generate(gpt, prompt, num_samples, 48, sampler)), dim=1)  # (B, T)
    assert len(set(map(tuple, new.tolist()))) == num_samples  # the samples differ
    idx = torch.cat((torch.tensor([prompt] * num_samples), new), dim=1)
    assert len(seen) == 48
    for i, logits in enumerate(seen):
        window = idx[:, : prompt_length + i][:, -24:]
        with torch.no_grad():
            expected = model(window).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpt2
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_as_close_to_float32_as_those_of_transformers(dtype, device, small):
    model, directory = small
    gpt = load_gpt(directory, dtype, device)
    seen = []

    def sampler(logits):
        seen.append(logits)
        return logits.argmax(dim=-1)

    prompt = list(b"First Citizen:")
    new = torch.cat(list(sample.generate(gpt, prompt, 1, 10, sampler))).tolist()
    idx = torch.tensor([prompt + new[:-1]])
    with torch.no_grad():
        exact = model(idx).logits[0, -10:]
        expected = model.to(device, dtype)(idx.to(device)).logits[0, -10:].float().cpu()
    actual = torch.cat(seen)
    assert actual.dtype == dtype
    error = (actual.float().cpu() - exact).pow(2).mean()
    assert 0 < error < 2 * (expected - exact).pow(2).mean()


def test_a_model_that_is_stored_in_16_bits_computes_in_float32(small):
    model, directory = small
    model.bfloat16().save_pretrained(directory)
    assert {parameter.dtype for parameter in load_gpt(directory).parameters()} == {torch.float32}


# ------------------------------------------------------------------------------ random choices
def are_plausible(counts, probs):
    """Tell whether no count (V,) is further from its expected value than 5 standard deviations plus 3."""
    expected = counts.sum() * probs
    return bool(((counts - expected).abs() <= 5 * expected.sqrt() + 3).all())


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 10_000, "temperature": 1.3},
    {"top_p": 0.9},
    {"top_k": 40, "top_p": 0.8, "temperature": 1.2},
]


def reference_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Return the probabilities (V,) of the next token by transformers' own processors, for logits (V,)."""
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.double().softmax(-1)[0]


@pytest.mark.gpt2
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_next_token_is_distributed_as_transformers_says(settings, small):
    model, directory = small
    prompt = [7, 77, 177]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    generator = torch.Generator().manual_seed(5)
    samples = generate(load_gpt(directory), prompt, 1, num_samples=20_000, generator=generator, **settings)
    counts = torch.tensor(samples)[:, 0].bincount(minlength=257)
    probs = reference_probs(logits, **settings)
    assert are_plausible(counts, probs)
    assert not counts[probs == 0].any()
    # the test is sharp enough to distinguish the settings
    for other in SETTINGS:
        other_probs = reference_probs(logits, **other)
        if (other_probs - probs).abs().sum() > 0.1:
            assert not are_plausible(counts, other_probs)


def test_a_low_temperature_still_samples():
    logits = torch.tensor([[0.0, 0.01]]).expand(1000, 2)  # divided by 0.05, a difference of 0.2
    tokens = sample.sample_token(logits, temperature=0.05, generator=torch.Generator().manual_seed(0))
    assert tokens.float().mean().item() == pytest.approx(1 / (1 + math.exp(-0.2)), abs=0.05)


def test_extreme_settings_take_the_most_likely_token_of_each_row():
    logits = torch.tensor([[0.0, 3.0, 2.9, -5.0], [7.0, 6.9, 0.0, 1.0]])
    extreme = [
        {"temperature": 1e-30},
        {"temperature": 0, "top_k": 3, "top_p": 0.1},
        {"top_p": 1e-9},
        {"top_p": 1e-300},
        {"top_k": 1},
    ]
    for settings in extreme:
        assert sample.sample_token(logits, **settings).tolist() == [1, 0]
    assert sample.sample_token(logits * 1e37, temperature=1e-5).tolist() == [1, 0]


def test_each_row_is_drawn_from_its_own_probabilities():
    logits = torch.zeros(40, 4)
    logits[1::2, 2] = 99  # a sure token in every second row
    tokens = sample.sample_token(logits).tolist()
    assert set(tokens[1::2]) == {2}
    assert set(tokens[::2]) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_raise_an_error(bad, temperature):
    with pytest.raises(ValueError, match="NaN"):
        sample.sample_token(torch.tensor([[0.0, bad, 1.0]]), temperature)


# ---------------------------------------------------------------------------------------- text
def decode_pieces(data, stops=()):
    """Decode bytes, the end of the text and one more byte. Returns the text that StreamDecoder returns for each."""
    decoder = sample.StreamDecoder(TOKENIZER, stops)
    return [decoder.add(token) for token in [*data, 256, 98]]


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
        positions = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if positions:
            return text[: min(positions)]
    return text


def test_text_is_cut_at_stop_texts_as_by_brute_force_and_is_not_held_back_for_long():
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
            if len(returned) < len(expected):
                assert len(arrived) - len(returned) < max(map(len, stops))


# -------------------------------------------------------------------------------- command line
@pytest.mark.gpt2
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prompt", ["Ré", "x" * 24, None])
def test_the_text_is_that_of_transformers_tokens(prompt, device, small):
    """The longest prompt that fits has 24 tokens. Without a prompt, a new document begins."""
    model, directory = small
    tokens = list(prompt.encode()) if prompt else [256]
    n = 25 - len(tokens)
    output = model.generate(torch.tensor([tokens]), do_sample=False, max_new_tokens=n, pad_token_id=256)
    expected = TOKENIZER.decode([token for token in output[0].tolist() if token != 256])
    flags = ["--prompt", prompt] if prompt else []
    flags += ["--max_new_tokens", n, "--temperature", 0, "--device", device]
    done = succeed("sample", "--model", directory, *flags)
    assert done.stdout == printable(expected) + "\n"


@pytest.mark.gpt2
def test_gpt2_tokens_give_the_text_of_transformers(tmp_path, tiktoken_cache):
    model = make_model(tmp_path, vocab_size=50257, n_layer=1, n_head=2, n_embd=16, n_positions=64)
    tokenizer = sample.get_tokenizer("gpt2")
    prompt = "Hello, I'm a language model,"
    idx = torch.tensor([tokenizer.encode(prompt)])
    output = model.generate(idx, do_sample=False, max_new_tokens=40, pad_token_id=50256, eos_token_id=50256)
    expected = printable(tokenizer.decode(output[0].tolist()))
    done = call("sample", "--model", tmp_path, "--prompt", prompt, "--max_new_tokens", 40, *GREEDY)
    assert done.stdout == expected + "\n"


def main_with(stdout, *flags):
    """Run sample.py in this process with another sys.stdout."""
    handler = signal.getsignal(signal.SIGINT)
    with contextlib.redirect_stdout(stdout), mock.patch.object(sys, "argv", ["sample.py", *map(str, flags)]):
        sample.main()
    signal.signal(signal.SIGINT, handler)


def test_the_text_is_shown_character_by_character_also_in_jupyter(tmp_path):
    shown = []

    class Stream(io.StringIO):  # like Jupyter's streams, it has no method reconfigure
        def flush(self):
            shown.append(self.getvalue())

    text = "naïve — 日本語 🙂!"
    make_scripted_model(tmp_path, text.encode())
    stream = Stream()
    main_with(stream, "--model", tmp_path, *GREEDY)
    assert stream.getvalue() == text + "\n"
    for length in range(1, len(text) + 1):
        assert text[:length] in shown


def test_a_character_cut_by_max_new_tokens_is_marked(tmp_path):
    make_scripted_model(tmp_path, "né".encode())
    for max_new_tokens, text in ((2, "n\ufffd\n"), (3, "né\n")):
        done = call("sample", "--model", tmp_path, *GREEDY, "--max_new_tokens", max_new_tokens)
        assert done.stdout == text


def test_several_samples_are_printed_one_after_the_other_and_equal_a_single_one(tmp_path):
    text = "one\ntwo 🙂 three"
    make_scripted_model(tmp_path, text.encode(), prompt_length=2)
    args = ["--model", tmp_path, "--prompt", "> ", *GREEDY]
    assert call("sample", *args).stdout == f"> {text}\n"
    several = call("sample", *args, "--num_samples", 2).stdout
    assert several == f"--- sample 1 of 2 ---\n> {text}\n--- sample 2 of 2 ---\n> {text}\n"


def test_every_flag_counts_and_each_sample_ends_at_its_own_end_of_text(tmp_path):
    model = make_model(tmp_path, n_layer=1, n_head=2, n_embd=32, n_positions=64)
    with torch.no_grad():  # end-of-text after about 8 tokens
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[256] * 0.9)
    model.save_pretrained(tmp_path)

    def texts(seed=11, dtype="bfloat16", **changes):
        generator = torch.Generator().manual_seed(seed)
        settings = {"temperature": 1.2, "top_k": 30, "top_p": 0.9, **changes}
        gpt = load_gpt(tmp_path, getattr(torch, dtype))
        for tokens in generate(gpt, [65], 50, num_samples=6, generator=generator, **settings):
            end = tokens.index(256) if 256 in tokens else len(tokens)
            yield printable(bytes(tokens[:end]).decode(errors="replace")) + "\n"

    flags = "--seed 11 --dtype bfloat16 --temperature 1.2 --top_k 30 --top_p 0.9 --num_samples 6 --max_new_tokens 50"
    done = call("sample", "--model", tmp_path, *flags.split(), "--prompt", "A", "--device", "cpu")
    expected = list(texts())
    assert re.split(r"--- sample \d of 6 ---\nA", done.stdout)[1:] == expected
    assert len(set(map(len, expected))) > 2
    # with the default value of any of these flags, the texts would be different
    for default in ({"seed": 1337}, {"dtype": "float32"}, {"temperature": 1.0}, {"top_k": 50}, {"top_p": 1.0}):
        assert list(texts(**default)) != expected, default


def test_stop_texts_end_a_sample_on_the_command_line(tmp_path):
    make_scripted_model(tmp_path, b"alpha beta. gamma\n\ndelta")
    args = ["--model", tmp_path, *GREEDY]
    assert call("sample", *args, "--stop", "\n\n").stdout == "alpha beta. gamma\n"
    assert call("sample", *args, "--stop", "\n\n", "--stop", "a. g").stdout == "alpha bet\n"
    assert call("sample", *args, "--stop", "delta!").stdout == "alpha beta. gamma\n\ndelta\n"


STDIN = [(b"abc", "abc!"), (b"ab\n\n", "ab\n!"), (b"\xef\xbb\xbfabc\r\n", "abc!"), (b"ab\xff", "ab\ufffd")]


@pytest.mark.parametrize("data, expected", STDIN, ids=str)
def test_a_prompt_from_standard_input_loses_byte_order_mark_and_line_end(data, expected, tmp_path, monkeypatch):
    make_scripted_model(tmp_path, b"!" * 8, prompt_length=3)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    done = succeed("sample", "--model", tmp_path, "--prompt", "-", "--max_new_tokens", 1, *GREEDY)
    assert done.stdout.startswith(expected)


def test_one_line_on_stderr_says_which_model_it_is(tmp_path):
    model = make_model(tmp_path / "step_000007", n_layer=1, n_head=1, n_embd=8, n_positions=16)
    torch.backends.cuda.enable_cudnn_sdp(True)
    done = call("sample", "--model", tmp_path, "--max_new_tokens", 1, *GREEDY)
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "step_000007") in done.stderr
    assert f"{model.num_parameters():,}" in done.stderr
    # cuDNN's attention makes a new plan for each length, which is slow
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.gpt2
def test_a_checkpoint_of_the_trainer_continues_as_the_trainer_says(tmp_path, byte_shards):
    log_dir = tmp_path / "log"
    succeed("train_gpt2", *TINY, "--data_dir", byte_shards, "--log_dir", log_dir)
    trained = load("train_gpt2").GPT.from_pretrained(log_dir / "step_000005").eval()
    idx = torch.tensor([list(b"KING")])
    with torch.no_grad():
        for _ in range(30):  # more than block_size, 16
            logits, _ = trained(idx[:, -16:])
            idx = torch.cat((idx, logits[:, -1:].argmax(-1)), dim=1)
    args = ["--model", log_dir, "--prompt", "KING", "--max_new_tokens", 30]
    done = call("sample", *args, *GREEDY)
    assert done.stdout == printable(TOKENIZER.decode(idx[0].tolist())) + "\n"


# ----------------------------------------------------------------------- terminals and streams
def start_endless(model):
    """Start a run that never stops printing to a pipe. Returns the run and the pipe, after its first byte."""
    read_end, write_end = os.pipe()

    def use_pipe(rank):
        os.close(read_end)
        sys.stdout = open(write_end, "w")  # noqa: SIM115 (open until the process ends)
        sys.stderr.reconfigure(line_buffering=True)  # a process that a signal ends does not flush its buffers

    flags = ["--model", model, "--max_new_tokens", 10**6, "--device", "cpu"]
    run = Run(*flags, script="sample", before=use_pipe)
    os.close(write_end)
    assert len(os.read(read_end, 1)) == 1
    return run, read_end


def test_a_closed_pipe_is_not_an_error(small):
    run, pipe = start_endless(small[1])
    os.close(pipe)
    [done] = run.wait()
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1  # which model it is, and no traceback


def test_characters_that_a_terminal_lacks_become_question_marks(tmp_path):
    make_scripted_model(tmp_path, "日本 ok".encode())
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    main_with(terminal, "--model", tmp_path, *GREEDY)
    terminal.flush()
    assert terminal.buffer.getvalue().split() == [b"??", b"ok"]


def test_the_terminal_continues_prompts_until_ctrl_d(tmp_path):
    make_scripted_model(tmp_path, b"<answer>", prompt_length=2)
    keyboard, terminal = pty.openpty()

    def use_terminal(rank):
        os.close(keyboard)
        for number, name in enumerate(["stdin", "stdout", "stderr"]):
            os.dup2(terminal, number)
            setattr(sys, name, open(number, "w" if number else "r"))  # noqa: SIM115
        os.close(terminal)

    run = Run("--model", tmp_path, *GREEDY, script="sample", before=use_terminal)
    os.close(terminal)
    keys = [b"ab\n", b"x" * 50 + b"\n", b"cd\n", b"\x04"]
    shown = b""
    with contextlib.suppress(OSError):  # raised when the script has ended
        for chunk in iter(lambda: os.read(keyboard, 1000), b""):
            shown += chunk
            if shown.endswith(b"> "):
                os.write(keyboard, keys.pop(0))
    os.close(keyboard)
    assert b"ab\r\n<answer>\r\n" in shown
    assert b"cd\r\n<answer>\r\n" in shown  # also after a prompt that is too long
    assert b"Traceback" not in shown
    assert run.wait()[0].returncode == 0


def test_ctrl_c_ends_without_a_traceback(small):
    run, pipe = start_endless(small[1])
    os.kill(run.processes[0].pid, signal.SIGINT)
    [done] = run.wait()
    os.close(pipe)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.count("\n") == 1


def test_a_model_that_computes_nan_is_one_line(small):
    model, directory = small
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = math.nan
    model.save_pretrained(directory)
    assert_late_error(call("sample", "--model", directory, "--num_samples", 2), "NaN", "--dtype float32")


def test_samples_that_do_not_fit_into_memory_are_one_line(tmp_path):
    make_model(tmp_path, n_layer=2, n_head=2, n_embd=32, n_positions=100_000)
    args = ["--num_samples", 100_000, "--max_new_tokens", 99_000]  # a cache of 5 terabytes
    done = call("sample", "--model", tmp_path, *args, "--device", "cpu")
    assert_late_error(done, "--num_samples", "--max_new_tokens")
