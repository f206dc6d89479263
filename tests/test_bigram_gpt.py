"""bigram.py and gpt.py: data, models against transformers, training against a plain loop, sampling, saving, errors."""

import math
import os
import re
import signal
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Run, call, load

bigram = load("bigram")
gpt = load("gpt")
STEP = re.compile(r"step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})")
SMALL = ["--max_steps", 20, "--eval_iters", 4, "--max_new_tokens", 20]
SHAPE = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
SMALL_GPT = [*SMALL, "--device", "cpu", "--batch_size", 4]
for flag, size in SHAPE.items():
    SMALL_GPT += [f"--{flag}", size]
both_scripts = pytest.mark.parametrize("script", ["bigram", "gpt"])
both_scripts_small = pytest.mark.parametrize(
    "script, flags",
    [("bigram", SMALL), ("gpt", [*SMALL_GPT, "--dropout", 0.2])],
)


def make_gpt(vocab_size=11, **changes):
    """Return a small GPT of gpt.py."""
    shape = {**SHAPE, "block_size": 8, "n_embd": 16, **changes}
    return gpt.GPT(gpt.GPTConfig(vocab_size, **shape))


def randomize(model):
    """Give a model weights that are large enough for clear differences between its logits."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def estimates_of(done):
    """Return the printed loss estimates as [(step, train loss, val loss)]."""
    assert done.returncode == 0, done.stderr
    return [(int(step), float(train), float(val)) for step, train, val in STEP.findall(done.stdout)]


def sample_of(done):
    """Return what a script printed after its last loss estimate."""
    return done.stdout.rsplit("loss ", 1)[1].split("\n", 1)[1]


# ---------------------------------------------------------------------------------------- bigram
def test_bigram_trains_and_samples_as_a_plain_loop_does(text_file):
    flags = "--batch_size 3 --block_size 5 --max_steps 40 --learning_rate 0.05 --eval_iters 7 --seed 5"
    done = call("bigram", "--input", text_file, *flags.split(), "--max_new_tokens", 30)

    text = text_file.read_text(encoding="utf-8")
    chars = sorted(set(text))
    data = torch.tensor([chars.index(char) for char in text[: int(0.9 * len(text))]])
    torch.manual_seed(5)
    table = torch.nn.Parameter(bigram.Bigram(len(chars)).wte.weight.detach().clone())
    optimizer = torch.optim.AdamW([table], lr=0.05)

    def loss_of_batch(generator):
        start = torch.randint(len(data) - 5, (3, 1), generator=generator)
        windows = data[start + torch.arange(6)]
        return F.cross_entropy(table[windows[:, :-1]].flatten(0, 1), windows[:, 1:].flatten())

    generator = torch.Generator().manual_seed(5)
    for _ in range(40):
        optimizer.zero_grad()
        loss_of_batch(generator).backward()
        optimizer.step()
    generator = torch.Generator().manual_seed(0)
    expected = sum(loss_of_batch(generator).item() for _ in range(7)) / 7
    assert estimates_of(done)[-1][1] == pytest.approx(expected, abs=1e-4)
    generator = torch.Generator().manual_seed(5)
    ids = [0]
    for _ in range(30):
        ids.append(torch.multinomial(table[ids[-1]].softmax(-1), 1, generator=generator).item())
    assert sample_of(done) == "".join(chars[i] for i in ids) + "\n"


def test_bigram_on_tiny_shakespeare_ends_below_2_50(tiny_shakespeare):
    flags = ["--input", tiny_shakespeare, "--eval_interval", 3000, "--max_new_tokens", 1]
    done = call("bigram", *flags)
    assert "4,225 parameters" in done.stdout
    first, last = estimates_of(done)
    assert first[2] == pytest.approx(math.log(65), abs=0.02)
    assert last[2] <= 2.50


# ------------------------------------------------------------------------------------- gpt model
def transformers_gpt2(model, dropout=0.0):
    """Return a GPT-2 of transformers with the weights of a GPT of gpt.py."""
    import transformers  # imported here because it is slow

    config = transformers.GPT2Config(
        vocab_size=model.config.vocab_size,
        n_positions=model.config.block_size,
        n_layer=model.config.n_layer,
        n_head=model.config.n_head,
        n_embd=model.config.n_embd,
        activation_function=model.config.activation,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        tie_word_embeddings=False,
    )
    reference = transformers.GPT2LMHeadModel(config)
    # unlike GPT-2's, the head of gpt.py has a bias, and c_attn has none
    reference.lm_head = torch.nn.Linear(model.config.n_embd, model.config.vocab_size)
    weights = {}
    for name, weight in model.state_dict().items():
        if re.search(r"(c_attn|c_proj|c_fc)\.weight", name):
            weight = weight.T  # transformers stores them as (in, out)
        weights[name if name.startswith("lm_head") else f"transformer.{name}"] = weight
    for i in range(model.config.n_layer):
        weights[f"transformer.h.{i}.attn.c_attn.bias"] = torch.zeros(3 * model.config.n_embd)
    reference.load_state_dict(weights)
    return reference.eval()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_model_equals_gpt2_of_transformers_with_an_untied_head(activation):
    model = randomize(make_gpt(activation=activation, n_layer=3, n_head=4))
    reference = transformers_gpt2(model)
    idx, targets = torch.randint(11, (2, 3, 8))
    logits, loss = model(idx, targets)
    expected_logits = reference(idx).logits
    expected_loss = F.cross_entropy(expected_logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    for name, parameter in model.named_parameters():
        path = name if name.startswith("lm_head") else f"transformer.{name}"
        expected = reference.get_parameter(path).grad
        if re.search(r"(c_attn|c_proj|c_fc)\.weight", name):
            expected = expected.T
        torch.testing.assert_close(parameter.grad, expected, msg=name)
    assert model(idx)[1] is None


def test_weights_start_from_a_normal_distribution_with_std_0_02():
    for name, parameter in make_gpt(n_embd=96, n_head=4, vocab_size=65).named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert parameter.mean().abs() < 2e-3, name
        elif name.endswith("bias"):
            assert not parameter.any(), name


# -------------------------------------------------------------------------------------- training
def test_training_equals_a_plain_loop_around_transformers(text_file, tmp_path):
    """With the same random numbers, dropout drops the same activations and attention weights."""
    flags = [*SMALL_GPT, "--max_steps", 130, "--learning_rate", 0.01, "--seed", 7]
    flags += ["--activation", "gelu", "--dropout", 0.1]
    done = call("gpt", "--input", text_file, *flags, "--save", tmp_path / "model.pt")
    model, chars = gpt.load_model(tmp_path / "model.pt", "cpu")
    val_losses = [val_loss for _, _, val_loss in estimates_of(done)]
    assert min(val_losses) == val_losses[-1], "the saved model is not the last one"

    # the same weights and random numbers at the start, and the same batches
    torch.manual_seed(7)
    start_model = gpt.GPT(gpt.GPTConfig(len(chars), **SHAPE, activation="gelu"))
    random_state = torch.get_rng_state()
    reference = transformers_gpt2(start_model, dropout=0.1).train()
    torch.set_rng_state(random_state)
    text = text_file.read_text(encoding="utf-8")
    data = torch.tensor([chars.index(char) for char in text[: int(0.9 * len(text))]])
    generator = torch.Generator().manual_seed(7)
    parameters = [parameter for name, parameter in reference.named_parameters() if "c_attn.bias" not in name]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99))
    for step in range(130):
        start = torch.randint(len(data) - 16, (4, 1), generator=generator)
        windows = data[start + torch.arange(17)]
        logits = reference(windows[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 100) / 30))
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1) / 100 if step < 100 else 0.001 + 0.009 * cosine
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        idx = data[:1600].view(100, 16)
        difference = model.eval()(idx)[0] - reference.eval()(idx).logits
    # Rounding makes a difference of 0.00001. Without clipping, or with other betas or learning
    # rates, the difference is above 0.2.
    assert difference.abs().mean() < 0.01


@both_scripts_small
def test_the_seed_determines_everything_and_evaluation_changes_nothing(script, flags, text_file, tmp_path, monkeypatch):
    """Runs with one seed end with the same losses and the same sample, no matter how often they are evaluated."""
    monkeypatch.chdir(tmp_path)
    ends = []
    for seed, interval in ((1, 20), (1, 3), (2, 20)):
        done = call(script, "--input", text_file, *flags, "--seed", seed, "--eval_interval", interval)
        estimates = estimates_of(done)
        assert [step for step, _, _ in estimates] == [*range(0, 20, interval), 20]
        ends.append((estimates[-1], sample_of(done)))
    assert ends[0] == ends[1]
    assert ends[0] != ends[2]
    text = text_file.read_text(encoding="utf-8")
    assert estimates[0][1:] == pytest.approx([math.log(len(set(text)))] * 2, abs=0.05)  # a uniform guess
    sample = ends[0][1]
    assert len(sample) == 1 + 20 + 1 and sample[0] == min(text), "one character, 20 new ones, a newline"
    assert list(tmp_path.iterdir()) == [], "a script without --save wrote a file"


def test_full_preset_has_10788929_parameters(tmp_path):
    flags = ["--preset", "full", "--device", "cpu", "--batch_size", 1, "--max_steps", 1, "--eval_iters", 1]
    done = call("gpt", "--input", ROOT / "input.txt", *flags, "--max_new_tokens", 1)
    assert "10,788,929 parameters, 65 characters" in done.stdout
    assert "preset full" in done.stdout


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


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 3), (1.5, 100), (0, 0), (1.0, 1)])
def test_sampling_equals_plain_python(temperature, top_k):
    model = randomize(make_gpt(dropout=0.5)).train()  # generate must switch dropout off
    idx = torch.tensor([[5, 3, 8]])
    actual = model.generate(idx, 20, torch.Generator().manual_seed(9), temperature, top_k)
    assert actual[0].tolist() == plain_generate(model.eval(), idx, 20, 9, temperature, top_k)


def test_saved_model_is_the_best_one_and_gives_the_same_text_when_loaded(tmp_path):
    """On random text the validation loss gets worse. The saved and sampled model has the lowest loss."""
    generator = torch.Generator().manual_seed(0)
    text = "".join("abcdefgh"[i] for i in torch.randint(8, (400,), generator=generator))
    (tmp_path / "noise.txt").write_text(text)
    path = tmp_path / "model.pt"
    sampling = ["--device", "cpu", "--prompt", "abba", "--max_new_tokens", 100, "--temperature", 0.9, "--top_k", 4]
    flags = [*SMALL_GPT, "--max_steps", 200, "--eval_interval", 50, "--learning_rate", 0.01, "--save", path]
    trained = call("gpt", "--input", tmp_path / "noise.txt", *flags, *sampling)
    val_losses = [val_loss for _, _, val_loss in estimates_of(trained)]
    assert min(val_losses) < val_losses[-1] - 0.1, "the loss of this run should have got worse"
    model, chars = gpt.load_model(path, "cpu")
    val_data = torch.tensor([chars.index(char) for char in text[360:]])
    assert gpt.estimate_loss(model, val_data, 4, 4, 16) == pytest.approx(min(val_losses), abs=1e-4)

    # the flags of sampling count, and another run prints the same text, or its beginning
    idx = torch.tensor([gpt.encode("abba", chars)])
    idx = model.generate(idx, 100, torch.Generator().manual_seed(1337), 0.9, 4)
    sample = gpt.decode(idx[0].tolist(), chars) + "\n"
    assert sample_of(trained) == sample
    assert call("gpt", "--load", path, *sampling).stdout.endswith("\n" + sample)
    stopped = call("gpt", "--load", path, *sampling, "--stop", "ba")  # the prompt does not count
    assert stopped.stdout.endswith("\n" + sample[: sample.index("ba", 4) + 2] + "\n")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pt", "noise.txt"]


def test_ctrl_c_keeps_the_best_model_and_each_loss_is_printed_at_once(text_file, tmp_path):
    flags = ["--input", text_file, *SMALL_GPT, "--max_steps", 10**6, "--eval_interval", 50]
    run = Run(*flags, "--save", tmp_path / "model.pt", script="gpt")
    output = run.folder / "0.out"
    while not output.exists() or "step 100:" not in output.read_text():
        assert run.processes[0].is_alive()
        time.sleep(0.01)
    os.kill(run.processes[0].pid, signal.SIGINT)
    [done] = run.wait()
    model, chars = gpt.load_model(tmp_path / "model.pt", "cpu")
    val_data = torch.tensor([chars.index(char) for char in text_file.read_text(encoding="utf-8")[27_000:]])
    best = min(float(val_loss) for _, _, val_loss in STEP.findall(done.stdout))
    assert best < 3.5, "the model did not learn"
    assert gpt.estimate_loss(model, val_data, 4, 4, 16) <= best + 1e-4


# ------------------------------------------------------------------------------ terminals and errors
@both_scripts_small
def test_a_terminal_that_lacks_a_character_shows_a_question_mark(script, flags, tmp_path):
    """The byte order mark with which the file begins is not a character of the text."""
    (tmp_path / "text.txt").write_text("世界ö" * 200, encoding="utf-8-sig")

    def use_ascii(rank):
        sys.stdout.reconfigure(encoding="ascii")

    [done] = Run("--input", tmp_path / "text.txt", *flags, script=script, before=use_ascii).wait()
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 characters" in done.stdout
    assert "?" in sample_of(done)


# test_errors.py has the mistakes of all scripts; here are those that only these two have
@both_scripts
@pytest.mark.parametrize("num_lines, status", [(53, 2), (54, 0)])
def test_the_validation_part_must_be_longer_than_a_sequence(script, num_lines, status, tmp_path):
    """53 lines are 159 characters, of which 16 are for validation: one too few for block_size 16."""
    (tmp_path / "text.txt").write_text("ab\n" * num_lines)
    flags = ["--block_size", 16, "--max_steps", 1, "--eval_iters", 1, "--max_new_tokens", 1]
    done = call(script, "--input", tmp_path / "text.txt", *flags)
    assert done.returncode == status
