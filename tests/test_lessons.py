"""bigram.py and gpt.py: models, sampling and the training loop they share."""

import collections
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, load, run

bigram, gpt = load("bigram"), load("gpt")
STEP = re.compile(r"step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})")
SMALL = ["--device", "cpu", "--max_steps", 20, "--eval_iters", 4, "--max_new_tokens", 20]
SMALL_GPT = [*SMALL, "--n_layer", 2, "--n_head", 2, "--n_embd", 32, "--block_size", 16, "--batch_size", 4]


def make_gpt(**changes):
    """A GPT of gpt.py of two layers, and 11 characters unless told otherwise."""
    shape = dict(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, d_ff=0, activation="relu", dropout=0.0)
    return gpt.GPT(SimpleNamespace(**(shape | changes)))


def randomize(model, std=0.5):
    """Weights large enough that the model has clear opinions."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def steps_of(done):
    """The printed estimates as [(step, train loss, val loss)]."""
    assert done.returncode == 0, done.stderr
    return [(int(step), float(train), float(val)) for step, train, val in STEP.findall(done.stdout)]


# -------------------------------------------------------------------------------------- bigram
def test_bigram_of_65_characters_has_4225_parameters():
    assert sum(p.numel() for p in bigram.Bigram(65).parameters()) == 4225


def test_bigram_logits_depend_on_the_last_character_alone():
    model = bigram.Bigram(7)
    long, short = torch.tensor([[1, 2, 3, 6]]), torch.tensor([[5, 6]])
    assert torch.equal(model(long)[0][:, -1], model(short)[0][:, -1])
    assert not torch.equal(model(long)[0][:, 0], model(short)[0][:, 0])


def test_bigram_learns_the_conditional_entropy_of_its_text(tmp_path):
    """No table can do better than the counted frequencies, and training must come close to them."""
    rng = torch.Generator().manual_seed(3)
    text, successors = "a", {"a": "aab", "b": "ccca", "c": "ab"}
    for draw in torch.randint(12, (4000,), generator=rng).tolist():
        text += successors[text[-1]][draw % len(successors[text[-1]])]
    (tmp_path / "text.txt").write_text(text)
    train = text[: int(0.9 * len(text))]
    pairs = collections.Counter(zip(train, train[1:], strict=False))
    firsts = collections.Counter(train[:-1])
    entropy = -sum(n / (len(train) - 1) * math.log(n / firsts[a]) for (a, _), n in pairs.items())
    done = call(
        "bigram", "--input", tmp_path / "text.txt", "--max_steps", 400, "--learning_rate", 0.05, "--device", "cpu"
    )
    assert steps_of(done)[-1][1] == pytest.approx(entropy, abs=0.02)


def test_bigram_trained_on_a_cycle_writes_the_cycle(tmp_path):
    (tmp_path / "text.txt").write_text("the quick" * 60)  # each character but "k" has one successor
    flags = ["--input", tmp_path / "text.txt", "--max_steps", 300, "--learning_rate", 0.5, "--max_new_tokens", 30]
    done = call("bigram", *flags, "--device", "cpu")
    assert done.stdout.rstrip("\n").endswith(("the quick" * 4)[:31])


def test_bigram_prints_the_count_then_steps_then_the_sample(text_file):
    done = call("bigram", "--input", text_file, *SMALL, "--eval_interval", 8)
    characters = len(set(text_file.read_text(encoding="utf-8")))
    assert f"{characters**2:,} parameters" in done.stdout.splitlines()[0]
    assert [step for step, _, _ in steps_of(done)] == [0, 8, 16, 20]
    sample = done.stdout[list(STEP.finditer(done.stdout))[-1].end() + 1 :]
    assert len(sample) == 1 + 20 + 1  # the first character of the text, 20 new ones, a line end
    assert sample[0] == text_file.read_text(encoding="utf-8")[0]


def test_bigram_on_tiny_shakespeare_ends_under_2_50(tiny_shakespeare):
    done = call(
        "bigram", "--input", tiny_shakespeare, "--eval_interval", 3000, "--max_new_tokens", 1, "--device", "cpu"
    )
    assert "4,225 parameters" in done.stdout
    first, last = steps_of(done)
    assert first[2] == pytest.approx(math.log(65), abs=0.02)
    assert last[2] <= 2.50


# --------------------------------------------------------------------------- data and evaluation
def test_get_batch_takes_any_window_and_shifts_the_targets_by_one():
    data = torch.arange(100, 120)
    x, y = bigram.get_batch(data, 2000, 5, torch.Generator().manual_seed(0))
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert {tuple(row) for row in torch.cat((x, y[:, -1:]), 1).tolist()} == {
        tuple(range(s, s + 6)) for s in range(100, 115)
    }


def test_estimate_loss_is_near_the_mean_over_all_windows():
    data = torch.randint(11, (300,), generator=torch.Generator().manual_seed(1))
    model = randomize(make_gpt())
    starts = torch.arange(len(data) - 8)[:, None] + torch.arange(8)
    with torch.no_grad():
        exact = F.cross_entropy(model(data[starts])[0].flatten(0, 1), data[starts + 1].flatten())
    assert gpt.estimate_loss(model, data, 100, 32, 8) == pytest.approx(exact.item(), rel=0.03)


def test_estimate_loss_switches_dropout_off_and_back_on():
    model = make_gpt(dropout=0.5).train()
    modes = []
    model.h[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    data = torch.randint(11, (100,))
    estimates = {gpt.estimate_loss(model, data, 3, 4, 8) for _ in range(2)}
    assert modes == [False] * 6
    assert len(estimates) == 1, "two estimates of one model differ"
    assert model.training


@pytest.mark.parametrize("script, flags", [("bigram", SMALL), ("gpt", [*SMALL_GPT, "--dropout", 0.2])])
def test_evaluation_does_not_change_training(script, flags, text_file):
    """However often it is evaluated, a run ends with the same losses to the last bit."""
    ends = []
    for interval in (20, 3):
        module = load(script)
        estimates, estimate_loss = [], module.estimate_loss

        def recorded(*args, estimates=estimates, estimate_loss=estimate_loss):
            estimates.append(estimate_loss(*args))
            return estimates[-1]

        module.estimate_loss = recorded
        assert call(module, "--input", text_file, *flags, "--eval_interval", interval).returncode == 0
        ends.append(estimates[-2:])
        assert len(estimates) == 2 * len({*range(0, 20, interval), 20})
    assert ends[0] == ends[1]


@pytest.mark.parametrize("script, flags", [("bigram", SMALL), ("gpt", [*SMALL_GPT, "--dropout", 0.2])])
def test_seed_decides_everything(script, flags, text_file):
    first, again, other = (call(script, "--input", text_file, *flags, "--seed", s).stdout for s in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("script, flags", [("bigram", SMALL), ("gpt", SMALL_GPT)])
def test_first_loss_is_that_of_a_blind_guess(script, flags, text_file):
    characters = len(set(text_file.read_text(encoding="utf-8")))
    _, train, val = steps_of(call(script, "--input", text_file, *flags))[0]
    assert (train, val) == pytest.approx((math.log(characters),) * 2, abs=0.05)


@pytest.mark.parametrize("script, flags", [("bigram", SMALL), ("gpt", SMALL_GPT)])
def test_lessons_need_torch_alone(script, flags, text_file, tmp_path):
    """With every other package missing the lesson still trains, and prints plain lines in place of a bar."""
    others = ("numpy", "tqdm", "tiktoken", "requests", "safetensors", "transformers", "huggingface_hub", "pyarrow")
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys({others!r}))\n"
    code += f"runpy.run_path({str(ROOT / (script + '.py'))!r}, run_name='__main__')"
    line = [sys.executable, "-c", code, "--input", text_file, *flags]
    done = subprocess.run([*map(str, line)], cwd=tmp_path, capture_output=True, text=True)
    assert [step for step, _, _ in steps_of(done)] == [0, 20]
    assert list(tmp_path.iterdir()) == [], "a lesson without --save wrote a file"


# ------------------------------------------------------------------------------------------ gpt
def test_full_preset_has_10788929_parameters_at_65_characters():
    with torch.device("meta"):
        model = make_gpt(vocab_size=65, **gpt.PRESETS["full"])
    assert sum(p.numel() for p in model.parameters()) == 10_788_929


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 3, 17, 8), (1, 6, 64, 64)])
def test_causal_attention_equals_the_fused_kernel(shape):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in "qkv"]
    out, upstream = gpt.causal_attention(*inputs), torch.randn(shape, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(y, inputs, upstream) for y in (out, expected))
    torch.testing.assert_close(ours, theirs)


def test_model_attention_is_the_written_out_one():
    """The fast path of the model gives what its projections around causal_attention give."""
    attn = randomize(make_gpt()).h[0].attn
    x = torch.randn(3, 8, 16)
    q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in attn.c_attn(x).chunk(3, dim=2))
    torch.testing.assert_close(attn(x), attn.c_proj(gpt.causal_attention(q, k, v).transpose(1, 2).flatten(2)))


def test_future_characters_change_no_earlier_logits():
    model = randomize(make_gpt())
    idx = torch.randint(11, (2, 8))
    logits = model(idx)[0]
    for t in range(8):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        new = model(changed)[0]
        torch.testing.assert_close(new[:, :t], logits[:, :t])
        assert (new[:, t] - logits[:, t]).abs().max() > 1e-3


@pytest.mark.parametrize("activation, d_ff", [("relu", 0), ("gelu", 24)])
def test_feed_forward_has_the_size_and_activation_asked_for(activation, d_ff):
    mlp = randomize(make_gpt(activation=activation, d_ff=d_ff)).h[0].mlp
    x = torch.randn(5, 16)
    up, down = mlp.c_fc, mlp.c_proj
    assert up.out_features == (d_ff or 64)
    hidden = x @ up.weight.T + up.bias
    hidden = hidden.clamp(min=0) if activation == "relu" else hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(mlp(x), hidden @ down.weight.T + down.bias)


def test_weights_start_normal_with_deviation_0_02():
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
    log_probs = [math.log(logits[b, t].softmax(0)[targets[b, t]].item()) for b in range(3) for t in range(8)]
    assert loss.item() == pytest.approx(-sum(log_probs) / 24, rel=1e-4)
    assert model(idx)[1] is None


def test_two_layers_overfit_one_batch():
    model = make_gpt(n_embd=32)
    x, y = torch.randint(11, (2, 4, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(x, y)[1]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_learning_rate_warms_up_then_follows_the_cosine_to_a_tenth():
    for step in range(130):
        if step < 10:
            expected = 3.0 * (step + 1) / 10
        else:
            ratio = min(1, (step - 10) / 90)
            expected = 0.3 + 0.5 * (1 + math.cos(math.pi * ratio)) * (3.0 - 0.3)
        assert gpt.get_lr(step, 3.0, 10, 100) == pytest.approx(expected), step
    assert gpt.get_lr(0, 3.0, 0, 100) == pytest.approx(3.0)  # no warmup


# ------------------------------------------------------------------------------------- sampling
def brute_force(model, idx, n, seed, temperature, top_k):
    """generate in plain Python: one character at a time, probabilities from exp and sorted lists."""
    ids, generator = idx[0].tolist(), torch.Generator().manual_seed(seed)
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids[-8:]]))[0][0, -1].tolist()
        ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
        if temperature == 0:
            ids.append(ranked[0])
            continue
        weights = [0.0] * len(logits)
        for i in ranked[: top_k or len(logits)]:
            weights[i] = math.exp((logits[i] - logits[ranked[0]]) / temperature)
        probs = torch.tensor([[w / sum(weights) for w in weights]])
        ids.append(torch.multinomial(probs, 1, generator=generator).item())
    return ids


@pytest.mark.parametrize(
    "temperature, top_k", [(1.0, 0), (0.5, 0), (2.0, 0), (1.0, 1), (1.0, 3), (1.5, 99), (0.0, 0), (0.0, 5)]
)
def test_generate_equals_plain_sampling(temperature, top_k):
    model, idx = randomize(make_gpt()), torch.tensor([[3, 1, 4]])
    for seed in range(3):
        out = model.generate(idx, 20, torch.Generator().manual_seed(seed), temperature, top_k)
        assert out[0].tolist() == brute_force(model, idx, 20, seed, temperature, top_k), seed


def test_top_k_of_one_is_greedy():
    model, idx = randomize(make_gpt()), torch.tensor([[3]])
    one, greedy = (model.generate(idx, 20, torch.Generator(), temperature=t, top_k=k) for t, k in ((1.0, 1), (0.0, 0)))
    assert torch.equal(one, greedy)


def test_generate_stops_at_the_first_stop_in_the_new_text():
    model, idx = randomize(make_gpt(), std=0.2), torch.tensor([[5, 7]])
    full = model.generate(idx, 200, torch.Generator().manual_seed(1))[0].tolist()
    # The prompt [5, 7] does not count, nor what begins in it.
    for stop in ([5, 7], full[1:3], full[30:32], [full[2]], full[-3:]):
        out = model.generate(idx, 200, torch.Generator().manual_seed(1), stop=stop)[0].tolist()
        places = [i for i in range(2, len(full) - len(stop) + 1) if full[i : i + len(stop)] == stop]
        assert out == (full[: places[0] + len(stop)] if places else full)


def test_generate_leaves_dropout_off():
    model = make_gpt(dropout=0.9).train()
    out = [model.generate(torch.tensor([[1]]), 30, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*out)


# ------------------------------------------------------------------------------- runs of gpt.py
def test_gpt_says_its_preset_first(text_file):
    done = call("gpt", "--input", text_file, *SMALL_GPT)
    assert "preset cpu" in done.stdout.splitlines()[0]
    done = call("gpt", "--input", text_file, *SMALL_GPT, "--preset", "full")
    assert "preset full" in done.stdout.splitlines()[0]


def test_best_model_is_saved_and_sampled(tmp_path):
    """On a text too small to learn from, validation gets worse; the saved model is that of the best estimate."""
    generator = torch.Generator().manual_seed(0)
    text = "".join("abcdefgh"[i] for i in torch.randint(8, (400,), generator=generator))
    (tmp_path / "noise.txt").write_text(text)
    flags = [*SMALL_GPT, "--max_steps", 200, "--eval_interval", 50, "--learning_rate", 1e-2, "--prompt", "a"]
    done = call("gpt", "--input", tmp_path / "noise.txt", *flags, "--save", tmp_path / "best.pt")
    vals = [val for _, _, val in steps_of(done)]
    assert min(vals) < vals[-1] - 0.1, "this run should have got worse"
    model, chars = gpt.load_model(tmp_path / "best.pt", torch.device("cpu"))
    data = torch.tensor([chars.index(c) for c in text[360:]])
    assert gpt.estimate_loss(model, data, 4, 4, 16) == pytest.approx(min(vals), abs=1e-4)
    sample = model.generate(torch.tensor([[chars.index("a")]]), 20, torch.Generator().manual_seed(1337))
    assert done.stdout.endswith("".join(chars[i] for i in sample[0]) + "\n")


def test_loaded_model_samples_what_the_training_run_did(text_file, tmp_path):
    sampling = ["--device", "cpu", "--prompt", "KING", "--max_new_tokens", 100, "--temperature", 0.9, "--top_k", 9]
    shape = ["--activation", "gelu", "--d_ff", 40, "--dropout", 0.1]
    trained = call("gpt", "--input", text_file, *SMALL_GPT, *shape, *sampling, "--save", tmp_path / "model.pt")
    loaded = run("gpt", "--load", tmp_path / "model.pt", *sampling, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    assert trained.stdout.endswith(loaded.stdout.split("\n", 1)[1])
    assert loaded.stdout.split("\n", 1)[1].startswith("KING")
    assert len(loaded.stdout.split("\n", 1)[1]) == 4 + 100 + 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_stop_ends_the_sample(text_file, tmp_path):
    flags = ["--device", "cpu", "--prompt", "KING", "--max_new_tokens", 300]
    call("gpt", "--input", text_file, *SMALL_GPT, "--save", tmp_path / "model.pt")
    full, stopped = (
        call("gpt", "--load", tmp_path / "model.pt", *flags, *more).stdout.split("\n", 1)[1]
        for more in ([], ["--stop", "e"])
    )
    assert "e" in full
    assert stopped == full[: full.index("e") + 1] + "\n"


def test_gpt_learns_a_text_without_line_ends(tmp_path):
    """--prompt has a default; it must not be refused on a text that the user did choose."""
    (tmp_path / "line.txt").write_text("one line, no end; " * 40)
    assert call("gpt", "--input", tmp_path / "line.txt", *SMALL_GPT).returncode == 0
