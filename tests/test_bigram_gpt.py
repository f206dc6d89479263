"""bigram.py and gpt.py: the models, sampling, the training loop that they share, and user errors."""

import collections
import math
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, command, load, run

bigram = load("bigram")
gpt = load("gpt")
STEP = re.compile(r"step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})")
SMALL = ["--device", "cpu", "--max_steps", 20, "--eval_iters", 4, "--max_new_tokens", 20]
SMALL_GPT = [*SMALL, "--n_layer", 2, "--n_head", 2, "--n_embd", 32, "--block_size", 16, "--batch_size", 4]
both_scripts = pytest.mark.parametrize("script, flags", [("bigram", SMALL), ("gpt", SMALL_GPT)])
both_with_dropout = pytest.mark.parametrize(
    "script, flags", [("bigram", SMALL), ("gpt", [*SMALL_GPT, "--dropout", 0.2])]
)


def make_gpt(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, **others):
    """Return a small GPT of gpt.py."""
    config = gpt.GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd, **others)
    return gpt.GPT(config)


def randomize(model, std=0.5):
    """Give a model weights that are large enough for clear differences between its logits."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def steps_of(done):
    """Return the printed loss estimates as [(step, train loss, val loss)]."""
    assert done.returncode == 0, done.stderr
    return [(int(step), float(train), float(val)) for step, train, val in STEP.findall(done.stdout)]


def without_eta(output):
    """Return a script's output without the time left, which differs from run to run."""
    return re.sub(r", eta [\d:]+", "", output)


def assert_user_error(done, *words):
    """Check for status 2, one line on stderr that contains all words, and no training before it."""
    assert done.returncode == 2, done.stdout[-500:] + done.stderr[-500:]
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert str(word) in done.stderr, f"{word} is not in: {done.stderr}"
    assert "loss" not in done.stdout, "the error was found after slow work"


# ------------------------------------------------------------------------------------------ data
@pytest.mark.parametrize("script", ["bigram", "gpt"])
def test_vocabulary_is_sorted_and_ids_decode_to_the_text(script, tmp_path):
    module = load(script)
    text = "hello\r\nwörld 世 " * 10  # 10 times 15 characters
    (tmp_path / "text.txt").write_bytes(text.encode())
    chars, train_data, val_data = module.load_data(tmp_path / "text.txt", torch.device("cpu"))
    assert chars == ["\n", "\r", " ", "d", "e", "h", "l", "o", "r", "w", "ö", "世"]
    assert module.decode(train_data.tolist(), chars) == text[:135]
    assert module.decode(val_data.tolist(), chars) == text[135:]
    assert module.encode("lo 世", chars) == [6, 7, 2, 11]


@pytest.mark.parametrize("script", ["bigram", "gpt", "prepare_shakespeare"])
def test_byte_order_mark_is_not_part_of_the_text(script, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfROMEO\r\n")
    assert load(script).read_text(tmp_path / "text.txt") == "ROMEO\r\n"


def test_get_batch_takes_any_window_and_shifts_the_targets_by_one():
    data = torch.arange(100, 120)
    x, y = bigram.get_batch(data, 2000, 5, torch.Generator().manual_seed(0))
    assert torch.equal(x[:, 1:], y[:, :-1])
    windows = torch.cat((x, y[:, -1:]), dim=1)
    expected = {tuple(range(start, start + 6)) for start in range(100, 115)}
    assert {tuple(window) for window in windows.tolist()} == expected


# ---------------------------------------------------------------------------------------- bigram
def test_bigram_of_65_characters_has_4225_parameters():
    assert sum(p.numel() for p in bigram.Bigram(65).parameters()) == 4225


def test_bigram_logits_depend_on_the_last_character_only():
    model = bigram.Bigram(7)
    long_logits, _ = model(torch.tensor([[1, 2, 3, 6]]))
    short_logits, _ = model(torch.tensor([[5, 6]]))
    assert torch.equal(long_logits[:, -1], short_logits[:, -1])
    assert not torch.equal(long_logits[:, 0], short_logits[:, 0])


def test_bigram_learns_the_conditional_entropy_of_its_text(tmp_path):
    """No table can do better than the counted frequencies, and training must come close to them."""
    rng = torch.Generator().manual_seed(3)
    successors = {"a": "aab", "b": "ccca", "c": "ab"}
    text = "a"
    for number in torch.randint(12, (4000,), generator=rng).tolist():
        choices = successors[text[-1]]
        text += choices[number % len(choices)]
    (tmp_path / "text.txt").write_text(text)
    train_text = text[: int(0.9 * len(text))]
    pair_counts = collections.Counter(zip(train_text, train_text[1:], strict=False))
    first_counts = collections.Counter(train_text[:-1])
    entropy = 0.0
    for (first, _), count in pair_counts.items():
        entropy -= count / (len(train_text) - 1) * math.log(count / first_counts[first])
    flags = ["--input", tmp_path / "text.txt", "--max_steps", 400, "--learning_rate", 0.05]
    done = call("bigram", *flags, "--device", "cpu")
    _, train_loss, _ = steps_of(done)[-1]
    assert train_loss == pytest.approx(entropy, abs=0.02)


def test_bigram_trained_on_a_cycle_writes_the_cycle(tmp_path):
    (tmp_path / "text.txt").write_text("the quick" * 60)  # every character has one successor
    flags = ["--input", tmp_path / "text.txt", "--max_steps", 300, "--learning_rate", 0.5]
    done = call("bigram", *flags, "--max_new_tokens", 30, "--device", "cpu")
    # the sample begins with the first character of the vocabulary, the space
    assert done.stdout.endswith("\n" + (" quickthe" * 4)[:31] + "\n")


def test_bigram_prints_the_parameter_count_then_the_losses_then_a_sample(text_file):
    done = call("bigram", "--input", text_file, *SMALL, "--eval_interval", 8)
    text = text_file.read_text(encoding="utf-8")
    assert f"{len(set(text)) ** 2:,} parameters" in done.stdout.splitlines()[0]
    assert [step for step, _, _ in steps_of(done)] == [0, 8, 16, 20]
    last_estimate = list(STEP.finditer(done.stdout))[-1]
    sample = done.stdout[last_estimate.end() + 1 :]
    assert len(sample) == 1 + 20 + 1  # the first character of the vocabulary, 20 new ones, a newline
    assert sample[0] == min(text)


def test_bigram_on_tiny_shakespeare_ends_below_2_50(tiny_shakespeare):
    flags = ["--input", tiny_shakespeare, "--eval_interval", 3000, "--max_new_tokens", 1]
    done = call("bigram", *flags, "--device", "cpu")
    assert "4,225 parameters" in done.stdout
    first, last = steps_of(done)
    assert first[2] == pytest.approx(math.log(65), abs=0.02)
    assert last[2] <= 2.50


# ------------------------------------------------------------------------------------ evaluation
def test_estimate_loss_is_close_to_the_mean_over_all_windows():
    data = torch.randint(11, (300,), generator=torch.Generator().manual_seed(1))
    model = randomize(make_gpt())
    positions = torch.arange(len(data) - 8)[:, None] + torch.arange(8)  # all windows
    with torch.no_grad():
        logits, _ = model(data[positions])
    expected = F.cross_entropy(logits.flatten(0, 1), data[positions + 1].flatten())
    assert gpt.estimate_loss(model, data, 100, 32, 8) == pytest.approx(expected.item(), rel=0.03)


def test_estimate_loss_switches_dropout_off_and_back_on():
    model = make_gpt(dropout=0.5).train()
    modes = []
    model.h[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    data = torch.randint(11, (100,))
    estimates = {gpt.estimate_loss(model, data, 3, 4, 8) for _ in range(2)}
    assert modes == [False] * 6
    assert len(estimates) == 1, "two estimates of one model differ"
    assert model.training


@both_with_dropout
def test_evaluation_does_not_change_training(script, flags, text_file):
    """A run ends with bit-identical losses, no matter how often it is evaluated."""
    final_losses = []
    for interval in (20, 3):
        module = load(script)
        estimates = []
        estimate_loss = module.estimate_loss

        def recorded(*args, estimates=estimates, estimate_loss=estimate_loss):
            estimates.append(estimate_loss(*args))
            return estimates[-1]

        module.estimate_loss = recorded
        done = call(module, "--input", text_file, *flags, "--eval_interval", interval)
        assert done.returncode == 0, done.stderr
        evaluated_steps = {*range(0, 20, interval), 20}
        assert len(estimates) == 2 * len(evaluated_steps)
        final_losses.append(estimates[-2:])
    assert final_losses[0] == final_losses[1]


@both_with_dropout
def test_the_seed_determines_everything(script, flags, text_file):
    outputs = []
    for seed in (1, 1, 2):
        done = call(script, "--input", text_file, *flags, "--seed", seed)
        outputs.append(without_eta(done.stdout))
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


@both_scripts
def test_first_loss_is_that_of_a_uniform_guess(script, flags, text_file):
    num_chars = len(set(text_file.read_text(encoding="utf-8")))
    _, train_loss, val_loss = steps_of(call(script, "--input", text_file, *flags))[0]
    assert train_loss == pytest.approx(math.log(num_chars), abs=0.05)
    assert val_loss == pytest.approx(math.log(num_chars), abs=0.05)


# ------------------------------------------------------------------------------------- gpt model
def test_full_preset_has_10788929_parameters_with_65_characters():
    fields = ("block_size", "n_layer", "n_head", "n_embd", "dropout")
    shape = {name: gpt.PRESETS["full"][name] for name in fields}
    with torch.device("meta"):
        model = make_gpt(vocab_size=65, **shape)
    assert sum(p.numel() for p in model.parameters()) == 10_788_929


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 3, 17, 8), (1, 6, 64, 64)])
def test_causal_attention_equals_the_fused_kernel(shape):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in "qkv"]
    upstream = torch.randn(shape, dtype=torch.float64)
    actual = gpt.causal_attention(*inputs)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(actual, expected)
    actual_grads = torch.autograd.grad(actual, inputs, upstream)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(actual_grads, expected_grads)


def test_attention_of_the_model_equals_the_reference_implementation():
    attn = randomize(make_gpt()).h[0].attn
    x = torch.randn(3, 8, 16)
    q, k, v = attn.c_attn(x).chunk(3, dim=2)
    heads = [part.unflatten(2, (2, 8)).transpose(1, 2) for part in (q, k, v)]
    expected = attn.c_proj(gpt.causal_attention(*heads).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x), expected)


def test_dropout_is_applied_to_the_attention_weights_in_training():
    """With one position, the attention weight is 1. Dropout makes it 0 or 1 / (1 - p)."""
    attn = make_gpt(dropout=0.25).h[0].attn
    attn.c_proj = attn.dropout = torch.nn.Identity()
    x = torch.randn(2000, 1, 16)
    v = attn.c_attn(x).chunk(3, dim=2)[2].unflatten(2, (2, 8))  # (B, T, nh, hs)
    y = attn.train()(x).unflatten(2, (2, 8))
    dropped = (y == 0).all(dim=-1, keepdim=True)
    torch.testing.assert_close(y, torch.where(dropped, 0, v / 0.75))
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(attn.eval()(x).unflatten(2, (2, 8)), v)


def test_later_characters_do_not_change_earlier_logits():
    model = randomize(make_gpt())
    idx = torch.randint(11, (2, 8))
    logits, _ = model(idx)
    for t in range(8):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        new_logits, _ = model(changed)
        torch.testing.assert_close(new_logits[:, :t], logits[:, :t])
        assert (new_logits[:, t] - logits[:, t]).abs().max() > 1e-3


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_mlp_has_four_times_the_channels_and_the_requested_activation(activation):
    mlp = randomize(make_gpt(activation=activation)).h[0].mlp
    assert mlp.c_fc.out_features == 64
    x = torch.randn(5, 16)
    hidden = x @ mlp.c_fc.weight.T + mlp.c_fc.bias
    relu = hidden.clamp(min=0)
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    hidden = {"relu": relu, "gelu": gelu}[activation]
    torch.testing.assert_close(mlp(x), hidden @ mlp.c_proj.weight.T + mlp.c_proj.bias)


def test_weights_start_from_a_normal_distribution_with_std_0_02():
    model = make_gpt(n_embd=96, n_head=4, vocab_size=65)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert parameter.mean().abs() < 2e-3, name
        elif name.endswith("bias"):
            assert not parameter.any(), name


def test_loss_is_the_mean_over_all_positions():
    model = randomize(make_gpt())
    idx, targets = torch.randint(11, (2, 3, 8))
    logits, loss = model(idx, targets)
    total = 0.0
    for b in range(3):
        for t in range(8):
            probs = logits[b, t].softmax(0)
            total -= math.log(probs[targets[b, t]].item())
    assert loss.item() == pytest.approx(total / 24, rel=1e-4)
    assert model(idx)[1] is None


def test_two_layers_overfit_one_batch():
    model = make_gpt(n_embd=32)
    x, y = torch.randint(11, (2, 4, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        _, loss = model(x, y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_learning_rate_warms_up_then_follows_a_cosine_to_10_percent():
    for step in range(130):
        if step < 10:
            expected = 3.0 * (step + 1) / 10
        else:
            ratio = min(1, (step - 10) / 90)
            expected = 0.3 + 0.5 * (1 + math.cos(math.pi * ratio)) * (3.0 - 0.3)
        assert gpt.get_lr(step, 3.0, 10, 100) == pytest.approx(expected), step
    assert gpt.get_lr(0, 3.0, 0, 100) == pytest.approx(3.0)  # no warmup


# ------------------------------------------------------------------------------------- sampling
def plain_generate(model, idx, max_new_tokens, seed, temperature, top_k):
    """Do what generate does in plain Python: probabilities from math.exp and sorted lists."""
    ids = idx[0].tolist()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids[-8:]]))[0][0, -1].tolist()
        ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
        if temperature == 0:
            ids.append(ranked[0])
            continue
        weights = [0.0] * len(logits)
        for i in ranked[: top_k or len(logits)]:
            weights[i] = math.exp((logits[i] - logits[ranked[0]]) / temperature)
        probs = torch.tensor([[weight / sum(weights) for weight in weights]])
        ids.append(torch.multinomial(probs, 1, generator=generator).item())
    return ids


@pytest.mark.parametrize(
    "temperature, top_k",
    [(1.0, 0), (0.5, 0), (2.0, 0), (1.0, 1), (1.0, 3), (1.5, 99), (0.0, 0), (0.0, 5)],
)
def test_generate_equals_sampling_in_plain_python(temperature, top_k):
    model = randomize(make_gpt())
    idx = torch.tensor([[3, 1, 4]])
    for seed in range(3):
        actual = model.generate(idx, 20, torch.Generator().manual_seed(seed), temperature, top_k)
        assert actual[0].tolist() == plain_generate(model, idx, 20, seed, temperature, top_k), seed


@pytest.mark.parametrize("options", [{"top_k": 1}, {"temperature": 1e-9}, {"temperature": 1e-300}])
def test_top_k_of_one_and_tiny_temperatures_are_greedy(options):
    model = randomize(make_gpt())
    idx = torch.tensor([[3]])
    actual = model.generate(idx, 20, torch.Generator(), **options)
    expected = model.generate(idx, 20, torch.Generator(), temperature=0.0)
    assert torch.equal(actual, expected)


def test_generate_ends_at_the_first_stop_in_the_new_text():
    model = randomize(make_gpt(), std=0.2)
    idx = torch.tensor([[5, 7]])
    full = model.generate(idx, 200, torch.Generator().manual_seed(1))[0].tolist()
    # The prompt [5, 7] does not count, and neither does a match that begins in it.
    for stop in ([5, 7], full[1:3], full[30:32], [full[2]], full[-3:]):
        actual = model.generate(idx, 200, torch.Generator().manual_seed(1), stop=stop)[0].tolist()
        matches = [i for i in range(2, len(full) - len(stop) + 1) if full[i : i + len(stop)] == stop]
        expected = full[: matches[0] + len(stop)] if matches else full
        assert actual == expected


def test_generate_switches_dropout_off():
    model = make_gpt(dropout=0.9).train()
    idx = torch.tensor([[1]])
    first = model.generate(idx, 30, torch.Generator().manual_seed(0))
    second = model.generate(idx, 30, torch.Generator().manual_seed(0))
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------- runs of gpt.py
@both_scripts
def test_scripts_need_no_package_but_torch(script, flags, text_file, tmp_path):
    others = ["numpy", "tqdm", "tiktoken", "requests", "safetensors", "transformers"]
    others += ["huggingface_hub", "pyarrow", "matplotlib"]
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys({others!r}))\n"
    code += f"runpy.run_path({str(ROOT / (script + '.py'))!r}, run_name='__main__')"
    line = [sys.executable, "-c", code, "--input", text_file, *flags]
    done = subprocess.run([*map(str, line)], cwd=tmp_path, capture_output=True, text=True)
    assert [step for step, _, _ in steps_of(done)] == [0, 20]
    assert list(tmp_path.iterdir()) == [], "a script without --save wrote a file"


def test_gpt_prints_its_preset_first(text_file):
    done = call("gpt", "--input", text_file, *SMALL_GPT)
    assert "preset cpu" in done.stdout.splitlines()[0]
    done = call("gpt", "--input", text_file, *SMALL_GPT, "--preset", "full")
    assert "preset full" in done.stdout.splitlines()[0]


def test_each_estimate_after_the_first_shows_the_time_left(text_file):
    done = call("gpt", "--input", text_file, *SMALL_GPT, "--eval_interval", 10)
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(lines) == 3
    assert "eta" not in lines[0]
    assert re.search(r", eta \d+:\d\d:\d\d$", lines[1])
    assert lines[2].endswith(", eta 0:00:00")


def test_the_time_left_is_proportional_to_the_steps_left(text_file, monkeypatch):
    """With a clock that moves on by 60 s per loss estimate, the times can be computed by hand."""
    module = load("gpt")
    estimate_loss = module.estimate_loss
    clock = [1000.0]

    def slow_estimate_loss(*args):
        clock[0] += 30.0  # there are two estimates per line, so one line takes 60 s
        return estimate_loss(*args)

    monkeypatch.setattr(module, "estimate_loss", slow_estimate_loss)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    done = call(module, "--input", text_file, *SMALL_GPT, "--eval_interval", 5)
    # After 120 s there are 5 steps done and 15 to go, after 180 s 10 and 10, after 240 s 15 and 5.
    assert re.findall(r"eta (\S+)", done.stdout) == ["0:06:00", "0:03:00", "0:01:20", "0:00:00"]


@both_scripts
def test_lines_appear_at_once_when_the_output_is_a_pipe(script, flags, text_file):
    """The first line can be read while the script is still training."""
    line = command(script, "--input", text_file, *flags, "--max_steps", 10**9, "--eval_interval", 10**9)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        output = ""
        while "step 0: train loss" not in output:
            output = process.stdout.readline()
            assert output, "the script ended"
    finally:
        process.kill()
        process.communicate()


def test_best_model_is_saved_and_sampled(tmp_path):
    """On random text the validation loss gets worse. The saved model has the lowest loss."""
    generator = torch.Generator().manual_seed(0)
    text = "".join("abcdefgh"[i] for i in torch.randint(8, (400,), generator=generator))
    (tmp_path / "noise.txt").write_text(text)
    flags = [*SMALL_GPT, "--max_steps", 200, "--eval_interval", 50, "--learning_rate", 1e-2]
    flags += ["--prompt", "a", "--save", tmp_path / "best.pt"]
    done = call("gpt", "--input", tmp_path / "noise.txt", *flags)
    val_losses = [val_loss for _, _, val_loss in steps_of(done)]
    assert min(val_losses) < val_losses[-1] - 0.1, "the loss of this run should have got worse"
    model, chars = gpt.load_model(tmp_path / "best.pt", torch.device("cpu"))
    val_data = torch.tensor([chars.index(char) for char in text[360:]])
    assert gpt.estimate_loss(model, val_data, 4, 4, 16) == pytest.approx(min(val_losses), abs=1e-4)
    idx = torch.tensor([[chars.index("a")]])
    sample = model.generate(idx, 20, torch.Generator().manual_seed(1337))
    assert done.stdout.endswith("".join(chars[i] for i in sample[0]) + "\n")


def test_loaded_model_gives_the_same_sample_as_the_training_run(text_file, tmp_path):
    sampling = ["--device", "cpu", "--prompt", "KING", "--max_new_tokens", 100]
    sampling += ["--temperature", 0.9, "--top_k", 9]
    shape = ["--activation", "gelu", "--dropout", 0.1]
    path = tmp_path / "model.pt"
    trained = call("gpt", "--input", text_file, *SMALL_GPT, *shape, *sampling, "--save", path)
    loaded = run("gpt", "--load", path, *sampling, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    _, sample = loaded.stdout.split("\n", 1)
    assert trained.stdout.endswith(sample)
    assert sample.startswith("KING")
    assert len(sample) == 4 + 100 + 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_stop_ends_the_sample(text_file, tmp_path):
    path = tmp_path / "model.pt"
    call("gpt", "--input", text_file, *SMALL_GPT, "--save", path)
    flags = ["--load", path, "--device", "cpu", "--prompt", "KING", "--max_new_tokens", 300]
    _, full = call("gpt", *flags).stdout.split("\n", 1)
    _, stopped = call("gpt", *flags, "--stop", "e").stdout.split("\n", 1)
    assert "e" in full
    assert stopped == full[: full.index("e") + 1] + "\n"


def test_gpt_learns_a_text_without_newlines(tmp_path):
    """The default of --prompt is not refused on a text that does not contain a newline."""
    (tmp_path / "line.txt").write_text("one line, no end; " * 40)
    assert call("gpt", "--input", tmp_path / "line.txt", *SMALL_GPT).returncode == 0


# ------------------------------------------------------------------------------ output and --save
def shell(script, flags, redirection, cwd, first="", **environment):
    """Run a script in bash, with a redirection, after the shell command first.

    Returns the CompletedProcess, with its output as bytes. The status is that of the script, not that of
    a command behind a pipe.
    """
    line = " ".join(f"'{word}'" for word in command(script, *flags))
    line = ["bash", "-c", f"set -o pipefail; {first}\n{line} {redirection}"]
    environment = {**os.environ, **environment}
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, timeout=100)


@pytest.mark.parametrize(
    "redirection, status",
    [("| head -n 1", 0), (">/dev/full", 1), (">&-", 0), ("2>&-", 0)],
)
def test_model_is_saved_even_if_nobody_reads_the_output(redirection, status, text_file, tmp_path):
    flags = ["--input", text_file, *SMALL_GPT, "--eval_interval", 5, "--save", "model.pt"]
    done = shell("gpt", flags, redirection, tmp_path)
    assert done.returncode == status
    assert done.stderr.count(b"\n") == status, "one line for a full disk, silence otherwise"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    model, _ = gpt.load_model(tmp_path / "model.pt", torch.device("cpu"))
    assert model.lm_head.bias.any(), "the saved model was not trained"


@pytest.mark.parametrize("redirection, status", [("| true", 0), (">/dev/full", 1), (">&-", 0), ("2>&-", 0)])
def test_closed_and_full_outputs_of_bigram_give_no_traceback(redirection, status, text_file, tmp_path):
    done = shell("bigram", ["--input", text_file, *SMALL], redirection, tmp_path)
    assert done.returncode == status
    assert done.stderr.count(b"\n") == status
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("script, flags, encoding", [("bigram", SMALL, "ascii"), ("gpt", SMALL_GPT, "cp1252")])
def test_terminal_that_cannot_show_a_character_shows_a_question_mark(script, flags, encoding, tmp_path):
    (tmp_path / "text.txt").write_text("世界ö" * 200, encoding="utf-8")
    flags = ["--input", "text.txt", *flags]
    done = shell(script, flags, "", tmp_path, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos")])
def test_failed_save_is_an_error_after_the_sample(error, text_file, tmp_path, monkeypatch):
    module = load("gpt")
    path = tmp_path / "model.pt"
    path.write_text("an older model")

    def save_half(contents, file_name):
        with open(file_name, "w") as file:
            file.write("half of a model")
        raise error

    monkeypatch.setattr(module.torch, "save", save_half)
    done = call(module, "--input", text_file, *SMALL_GPT, "--save", path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert f"--save {path}" in done.stderr and str(error) in done.stderr
    _, sample = re.split(r"best val loss \d+\.\d{4}\n", done.stdout)
    assert len(sample) == 1 + 20 + 1, "the sample is lost"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.pt", "an older model")]


@pytest.mark.parametrize("target", ["missing/model.pt", "folder", "pipe", "/dev/null", "readonly/model.pt"])
def test_save_to_a_path_that_cannot_be_written_is_found_before_training(target, text_file, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    if target.startswith("readonly"):
        if os.geteuid() == 0:
            pytest.skip("root can write everywhere")
        (tmp_path / "readonly").mkdir(mode=0o500)
    path = tmp_path / target
    done = call("gpt", "--input", text_file, *SMALL_GPT, "--save", path)
    assert_user_error(done, f"--save {path}")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ----------------------------------------------------------------------------------- user errors
def test_missing_input_in_a_process(tmp_path):
    assert_user_error(run("bigram", "--input", "nowhere.txt", cwd=tmp_path), "nowhere.txt", "--input")


def test_unknown_prompt_in_a_process(tmp_path, text_file):
    done = run("gpt", "--input", text_file, *SMALL_GPT, "--prompt", "naïve", cwd=tmp_path)
    assert_user_error(done, "--prompt", "ï")


@pytest.mark.parametrize("script", ["bigram", "gpt"])
@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "not UTF-8"])
def test_input_that_is_not_a_text_is_an_error(script, kind, tmp_path):
    path = tmp_path / "text.txt"
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "not UTF-8":
        path.write_bytes("Ein schöner Text. ".encode("latin-1") * 100)
    word = {"empty": "empty", "not UTF-8": "UTF-8"}.get(kind, "cannot read")
    before = list(tmp_path.iterdir())
    assert_user_error(call(script, "--input", path), path, word, "--input")
    assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize("script", ["bigram", "gpt"])
@pytest.mark.parametrize("text", ["a", "ab\nabcdef", "ab\n" * 53])
def test_validation_part_shorter_than_a_window_is_an_error(script, tmp_path, text):
    """The longest text has 159 characters, of which 16 are for validation: one too few."""
    (tmp_path / "short.txt").write_text(text)
    done = call(script, "--input", tmp_path / "short.txt", "--device", "cpu", "--block_size", 16)
    assert_user_error(done, "--block_size", 16)


WRONG_FLAGS = [
    ("bigram", ["--block_size", 0]),
    ("bigram", ["--learning_rate", -1]),
    ("bigram", ["--learning_rate", "nan"]),
    ("bigram", ["--learning_rate", "inf"]),
    ("bigram", ["--max_steps", "ten"]),
    ("bigram", ["--batch_size", 10**30]),
    ("bigram", ["--seed", 10**30]),
    ("bigram", ["--device", "toaster"]),
    ("bigram", ["--device", "meta"]),
    ("gpt", ["--n_embd", 30]),
    ("gpt", ["--n_head", 0]),
    ("gpt", ["--preset", "huge"]),
    ("gpt", ["--activation", "tanh"]),
    ("gpt", ["--dropout", 1.5]),
    ("gpt", ["--dropout", "nan"]),
    ("gpt", ["--temperature", -1]),
    ("gpt", ["--top_k", -3]),
    ("gpt", ["--eval_interval", 0]),
    ("gpt", ["--batch_size", 10**30]),
    ("gpt", ["--seed", 10**30]),
    ("gpt", ["--device", "toaster"]),
    ("gpt", ["--device", "meta"]),
]


@pytest.mark.parametrize("script, flags", WRONG_FLAGS, ids=[f"{s} {f[0]} {f[1]}" for s, f in WRONG_FLAGS])
def test_wrong_value_of_a_flag_is_an_error(script, flags, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_user_error(call(script, "--input", text_file, *flags), flags[0], flags[1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("script", ["bigram", "gpt"])
def test_cuda_on_a_machine_without_a_gpu_is_an_error(script):
    assert_user_error(call(script, "--device", "cuda"), "--device cuda", "--device cpu")


def test_bigram_refuses_a_vocabulary_whose_table_would_not_fit_in_memory(tmp_path):
    chars = map(chr, range(0x20000, 0x20000 + 100_000))
    (tmp_path / "text.txt").write_text("".join(chars), encoding="utf-8")
    done = call("bigram", "--input", tmp_path / "text.txt", "--device", "cpu")
    assert_user_error(done, "100,000 different characters", "160 GB")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process reliably")
@pytest.mark.parametrize(
    "script, flag, value",
    [
        ("bigram", "--batch_size", 2**31 - 1),
        ("gpt", "--batch_size", 2**31 - 1),
        ("gpt", "--n_embd", 10**6),
    ],
)
def test_run_that_needs_too_much_memory_is_an_error(script, flag, value, text_file, tmp_path):
    """The process may use 8 GB, so that these runs fail at once on every machine and do no harm."""
    flags = {"bigram": SMALL, "gpt": SMALL_GPT}[script]
    flags = ["--input", text_file, *flags, flag, value]
    done = shell(script, flags, "", tmp_path, first="ulimit -v 8000000")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: not enough memory") and done.stderr.count(b"\n") == 1
    assert flag.encode() in done.stderr


@pytest.mark.parametrize("flag", ["--prompt", "--stop"])
def test_text_that_the_model_has_never_seen_is_an_error(flag, text_file, tmp_path):
    """The error is found before training, and again when a saved model is loaded."""
    path = tmp_path / "model.pt"
    assert_user_error(call("gpt", "--input", text_file, *SMALL_GPT, flag, "ABC ß"), flag, "ß")
    assert call("gpt", "--input", text_file, *SMALL_GPT, "--save", path).returncode == 0
    assert_user_error(call("gpt", "--load", path, "--device", "cpu", flag, "ABC ß"), flag, "ß")


@pytest.mark.parametrize("content", ["nothing", "text", "other tensors", "code", "pipe", "wrong chars"])
def test_load_of_a_file_that_is_not_a_model_is_an_error(content, tmp_path):
    path = tmp_path / "model.pt"
    if content == "text":
        path.write_text("KING: this is a text")
    elif content == "other tensors":
        torch.save({"weight": torch.zeros(3)}, path)
    elif content == "code":
        path.write_bytes(pickle.dumps(print, protocol=2))
    elif content == "pipe":
        os.mkfifo(path)
    elif content == "wrong chars":
        model = make_gpt()
        contents = {"model": model.state_dict(), "config": vars(model.config), "chars": 7}
        torch.save(contents, path)
    assert_user_error(call("gpt", "--load", path, "--device", "cpu"), "--load", path, "--save")
