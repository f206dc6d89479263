"""train_gpt2.py's model and optimizers, compared with transformers' GPT2LMHeadModel and PyTorch's optimizers."""

import argparse
import contextlib
import json
import math
import types

import numpy as np
import pytest
import torch
import torch.multiprocessing
import transformers
from conftest import load, random_gpt2
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

train_gpt2 = load("train_gpt2")
GPT = train_gpt2.GPT
GPTConfig = train_gpt2.GPTConfig

# Shapes of GPT2Config: both tokenizers, every activation, other inner sizes, one head and many layers.
SHAPES = {
    "bytes": {
        "vocab_size": 257,
        "n_positions": 20,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "n_inner": None,
        "activation_function": "gelu_new",
    },
    "gpt2 tokens": {
        "vocab_size": 50257,
        "n_positions": 16,
        "n_layer": 1,
        "n_head": 4,
        "n_embd": 16,
        "n_inner": None,
        "activation_function": "gelu",
    },
    "one head and relu": {
        "vocab_size": 257,
        "n_positions": 9,
        "n_layer": 3,
        "n_head": 1,
        "n_embd": 24,
        "n_inner": 40,
        "activation_function": "relu",
        "layer_norm_epsilon": 1e-3,
    },
    "deep and wide": {
        "vocab_size": 257,
        "n_positions": 32,
        "n_layer": 4,
        "n_head": 3,
        "n_embd": 48,
        "n_inner": 200,
        "activation_function": "gelu_pytorch_tanh",
    },
}
all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
both_optimizers = pytest.mark.parametrize("optimizer", ["adamw", "muon"])
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as (in, out) by transformers
CPU = torch.device("cpu")


def tiny_config(**changes):
    """A GPTConfig with 257 tokens, 20 positions, 2 layers, 2 heads and 32 channels."""
    shape = {"vocab_size": 257, "block_size": 20, "n_layer": 2, "n_head": 2, "n_embd": 32, "tokenizer": "bytes"}
    return GPTConfig(**{**shape, **changes})


def randomize(model):
    """Make every weight, bias and gain random and large, so that no term of the computation is too small to see."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "ln_" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def random_reference(directory, shape):
    """Save a GPT2LMHeadModel with large random weights in directory, and return it."""
    model = randomize(random_gpt2(directory, **shape))
    model.save_pretrained(directory)
    return model


def reference_of(model, directory):
    """Return the GPT2LMHeadModel that transformers loads from our model's checkpoint."""
    model.save_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def assert_same_loss_and_gradients(ours, theirs, tokens):
    """Compare our model with transformers' on windows of tokens (B, T + 1), through the backward pass."""
    vocab_size = theirs.config.vocab_size
    expected = theirs(tokens, labels=tokens).loss  # transformers shifts the labels itself
    _, loss = ours(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    expected_grads = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    assert expected_grads.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        grad = parameter.grad
        if name.endswith(TRANSPOSED):
            grad = grad.T
        if name == "wte.weight":
            assert not grad[vocab_size:].any(), "the padding has a gradient"
            grad = grad[:vocab_size]
        difference = (grad - expected_grads[name]).abs().max().item()
        assert difference <= 1e-5 * (1 + expected_grads[name].abs().max().item()), name


# -------------------------------------------------------------------- the same as transformers
@all_shapes
def test_logits_equal_those_of_transformers(tmp_path, shape):
    theirs = random_reference(tmp_path, shape)
    ours = GPT.from_pretrained(tmp_path).eval()
    for B, T in ((1, 1), (3, shape["n_positions"])):
        idx = torch.randint(shape["vocab_size"], (B, T))
        logits, loss = ours(idx)
        assert loss is None
        assert logits.shape == (B, T, shape["vocab_size"])
        torch.testing.assert_close(logits, theirs(idx).logits, rtol=1e-5, atol=1e-5)


@all_shapes
def test_loss_and_gradients_equal_those_of_transformers(tmp_path, shape):
    theirs = random_reference(tmp_path, shape)
    ours = GPT.from_pretrained(tmp_path).eval()
    tokens = torch.randint(shape["vocab_size"], (3, shape["n_positions"]))
    assert_same_loss_and_gradients(ours, theirs, tokens)


@pytest.mark.parametrize("vocab_size", [65, 256, 1000])
def test_vocabularies_below_at_and_above_a_multiple_of_128_equal_transformers(tmp_path, vocab_size):
    ours = randomize(GPT(tiny_config(vocab_size=vocab_size)))
    theirs = reference_of(ours, tmp_path)
    tokens = torch.randint(vocab_size, (3, 20))
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    assert_same_loss_and_gradients(ours, theirs, tokens)


def test_dropout_drops_the_same_elements_as_in_transformers(tmp_path):
    """Embeddings, attention and both projections draw their masks in the same order from the same generator."""
    ours = randomize(GPT(tiny_config(dropout=0.3)))
    theirs = reference_of(ours, tmp_path).train()
    tokens = torch.randint(257, (3, 20))
    torch.manual_seed(7)
    _, loss = ours(tokens[:, :-1], tokens[:, 1:])
    torch.manual_seed(7)
    expected = theirs(tokens[:, :-1]).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(expected, tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert abs(ours.eval()(tokens[:, :-1], tokens[:, 1:])[1].item() - loss.item()) > 1e-3


def test_dropout_is_off_in_evaluation():
    model = randomize(GPT(tiny_config(dropout=0.4)))
    idx = torch.randint(257, (2, 8))
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


# --------------------------------------------------------------------------------- checkpoints
@all_shapes
def test_a_saved_model_opens_in_transformers(tmp_path, shape):
    shape = dict(shape)
    shape["block_size"] = shape.pop("n_positions")
    shape["tokenizer"] = {257: "bytes", 50257: "gpt2"}[shape["vocab_size"]]
    ours = randomize(GPT(GPTConfig(**shape)))
    with torch.no_grad():
        ours.wte.weight[shape["vocab_size"] :] = 0
    theirs = reference_of(ours, tmp_path)
    assert isinstance(theirs, transformers.GPT2LMHeadModel)
    idx = torch.randint(shape["vocab_size"], (2, shape["block_size"]))
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=1e-5, atol=1e-5)


@all_shapes
def test_a_round_trip_through_transformers_changes_no_bit(tmp_path, shape):
    """Their file, our model, our file, their model, their file: the same tensors under the same names."""
    random_reference(tmp_path / "theirs", shape)
    GPT.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs again")
    first = load_file(tmp_path / "theirs" / "model.safetensors")
    second = load_file(tmp_path / "ours" / "model.safetensors")
    third = load_file(tmp_path / "theirs again" / "model.safetensors")
    assert first.keys() == second.keys() == third.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.equal(tensor, third[name]), name


def test_a_checkpoint_contains_float32_weights_without_padding_and_without_a_second_head(tmp_path):
    model = GPT(tiny_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == model.num_params
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors["transformer.wte.weight"].shape == (257, 32)
    assert not [name for name in tensors if "lm_head" in name]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_saving_and_loading_keeps_the_config_the_weights_and_the_padding(tmp_path):
    config = tiny_config(n_inner=72, activation_function="relu", dropout=0.25, layer_norm_epsilon=1e-4)
    model = GPT(config)
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert loaded.wte.num_embeddings == 384
    assert not loaded.wte.weight[257:].any()


def test_config_json_says_what_other_tools_need(tmp_path):
    GPT(tiny_config(dropout=0.25)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tokenizer"] == "bytes"
    assert config["bos_token_id"] == config["eos_token_id"] == 256
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.vocab_size, theirs.n_positions, theirs.n_layer) == (257, 20, 2)
    assert (theirs.resid_pdrop, theirs.embd_pdrop, theirs.attn_pdrop) == (0.25, 0.25, 0.25)
    assert theirs.tie_word_embeddings


# ----------------------------------------------------------------------------------- parameters
PUBLISHED = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


@pytest.mark.parametrize("preset, count", PUBLISHED.items())
def test_presets_have_the_published_parameter_counts(preset, count):
    values = train_gpt2.PRESETS[preset]
    shape = {name: values[name] for name in ("n_layer", "n_head", "n_embd")}
    with torch.device("meta"):
        model = GPT(GPTConfig(block_size=values["block_size"], **shape))
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=1024, **shape))
    assert model.num_params == count == theirs.num_parameters()
    assert sum(p.numel() for p in model.parameters()) == count + (50304 - 50257) * values["n_embd"]


def test_the_default_config_is_gpt2():
    with torch.device("meta"):
        assert GPT(GPTConfig()).num_params == 124_439_808


def test_weights_start_as_those_of_gpt2():
    """N(0, 0.02), the two projections of a block scaled by (2 n_layer)^-0.5, biases 0, gains 1, padding 0."""
    model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=2, n_embd=64))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert parameter[:500].std().item() == pytest.approx(std, rel=0.05), name
            assert parameter[:500].mean().item() == pytest.approx(0, abs=0.05 * std), name
    assert not model.wte.weight[500:].any()


@pytest.mark.parametrize("vocab_size", [257, 50257])
def test_the_first_loss_is_that_of_a_blind_guess(vocab_size):
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=32, n_layer=2, n_head=2, n_embd=64))
    x, y = torch.randint(vocab_size, (2, 8, 32))
    _, loss = model(x, y)
    assert loss.item() == pytest.approx(math.log(vocab_size), abs=0.05)


# -------------------------------------------------------------------------------- computation
def test_future_tokens_do_not_change_earlier_logits():
    model = randomize(GPT(tiny_config())).eval()
    idx = torch.randint(257, (2, 20))
    logits, _ = model(idx)
    for t in range(20):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 257
        new_logits, _ = model(changed)
        torch.testing.assert_close(new_logits[:, :t], logits[:, :t], rtol=0, atol=1e-5)
        assert (new_logits[:, t] - logits[:, t]).abs().max() > 1e-2


def test_the_loss_is_computed_in_float32_under_autocast():
    """In bfloat16, a loss has three significant digits; only the logits may be rounded."""
    model = randomize(GPT(tiny_config())).eval()
    idx = torch.randint(257, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(idx)
        _, loss = model(idx, idx)
    assert loss.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), idx.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 4, 9])
def test_the_loss_of_a_few_rows_at_a_time_equals_that_of_all_rows(num_rows, dtype):
    """A vocabulary of a million tokens makes chunks of four rows on a CPU."""
    logits = (4 * torch.randn(num_rows, 2**20)).to(dtype).requires_grad_()
    targets = torch.randint(2**20, (num_rows,))
    loss = train_gpt2.cross_entropy(logits, targets)
    (grad,) = torch.autograd.grad(loss, logits)
    expected = torch.nn.functional.cross_entropy(logits.double(), targets)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    rtol = 1e-2 if dtype == torch.bfloat16 else 5e-4  # over a million terms, float32 has about four digits
    torch.testing.assert_close(grad, expected_grad, rtol=rtol, atol=1e-9)


def test_padding_rows_count_neither_in_the_loss_nor_in_the_logits():
    model = randomize(GPT(tiny_config()))
    idx, targets = torch.randint(257, (2, 3, 20))
    with torch.no_grad():
        model.wte.weight[257:] = 0
    loss, logits = model(idx, targets)[1], model(idx)[0]
    with torch.no_grad():
        model.wte.weight[257:] = 5
    torch.testing.assert_close(model(idx, targets)[1], loss)
    torch.testing.assert_close(model(idx)[0], logits)


# ----------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("top_k", [1, 50, 10_000])
def test_no_sampled_token_is_beyond_the_vocabulary(top_k):
    model = GPT(tiny_config(vocab_size=129))
    with torch.no_grad():  # the padding rows would win if they were allowed to
        model.ln_f.bias += 1
        model.wte.weight[129:] = 5
    generator = torch.Generator().manual_seed(0)
    idx = model.generate(torch.zeros(64, 1, dtype=torch.long), 40, generator, top_k=top_k)
    assert idx.shape == (64, 41)
    assert idx.max() < 129
    if top_k == 10_000:
        assert len(idx.unique()) > 120, "nearly all of the 129 tokens should be sampled"


def test_generate_samples_only_from_the_top_k_tokens():
    model = randomize(GPT(tiny_config())).eval()
    idx = model.generate(torch.randint(257, (8, 3)), 30, torch.Generator().manual_seed(0), top_k=4)
    for t in range(3, 33):
        logits = model(idx[:, max(0, t - 20) : t])[0][:, -1]  # at most block_size tokens of context
        chosen = logits.gather(1, idx[:, t : t + 1])
        rank = (logits > chosen).sum(dim=1)  # number of tokens that were more likely
        assert rank.max() < 4
    assert len({tuple(row) for row in idx[:, 3:].tolist()}) > 1


def test_generate_uses_no_dropout():
    model = randomize(GPT(tiny_config(dropout=0.5)))
    prompt = torch.randint(257, (4, 3))
    samples = [model.generate(prompt, 20, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(samples[0], samples[1])


def test_generate_follows_the_softmax():
    """Over many draws of one next token, frequencies match the renormalized probabilities of the top 3."""
    model = randomize(GPT(tiny_config())).eval()
    prompt = torch.zeros(20_000, 1, dtype=torch.long)
    choices = model.generate(prompt, 1, torch.Generator().manual_seed(0), top_k=3)[:, 1]
    probs, tokens = model(prompt[:1])[0][0, -1].softmax(dim=0).topk(3)
    probs = probs / probs.sum()
    for prob, token in zip(probs.tolist(), tokens.tolist(), strict=True):
        assert (choices == token).float().mean().item() == pytest.approx(prob, abs=0.015)


# ---------------------------------------------------------------------------------- optimizers
def configure_optimizers(model, name, learning_rate, weight_decay):
    return train_gpt2.configure_optimizers(model, name, learning_rate, weight_decay, CPU)


def optimizer_step(model, optimizers, x, y):
    """Train on one batch; returns the loss before the step."""
    model.zero_grad()
    _, loss = model(x, y)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


@both_optimizers
def test_a_model_of_two_layers_overfits_one_batch(optimizer):
    model = GPT(tiny_config())
    optimizers = configure_optimizers(model, optimizer, 1e-2, 0.1)
    x, y = torch.randint(257, (2, 4, 20))
    losses = [optimizer_step(model, optimizers, x, y) for _ in range(100)]
    assert losses[-1] < 0.05


@both_optimizers
def test_padding_rows_stay_zero_in_training(optimizer):
    """Through weight decay, momentum and large steps the padding rows keep every bit of zero."""
    model = GPT(tiny_config(dropout=0.1))
    optimizers = configure_optimizers(model, optimizer, 0.1, 0.5)
    before = model.wte.weight[:257].detach().clone()
    for _ in range(10):
        x, y = torch.randint(257, (2, 4, 20))
        optimizer_step(model, optimizers, x, y)
    assert (model.wte.weight[:257] - before).abs().min() > 0
    assert not model.wte.weight[257:].any()


def test_adamw_decays_only_matrices_and_embeddings():
    model = GPT(tiny_config())
    (optimizer,) = configure_optimizers(model, "adamw", 1e-3, 0.1)
    weight_decay = {}
    for group in optimizer.param_groups:
        assert (tuple(group["betas"]), group["eps"], group["lr"]) == ((0.9, 0.95), 1e-8, 1e-3)
        for parameter in group["params"]:
            assert parameter not in weight_decay
            weight_decay[parameter] = group["weight_decay"]
    for name, parameter in model.named_parameters():
        is_small = name.endswith("bias") or "ln_" in name
        assert weight_decay.pop(parameter) == (0.0 if is_small else 0.1), name
    assert not weight_decay


def test_gradients_are_clipped_together_to_the_given_norm():
    model = GPT(tiny_config())
    optimizers = configure_optimizers(model, "muon", 1e-3, 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = torch.cat([p.grad.flatten() for p in model.parameters()])
    norm = train_gpt2.clip_gradients(model, optimizers, scaler, 2.5)
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert norm.item() == pytest.approx(before.norm().item(), rel=1e-5)
    torch.testing.assert_close(after, 2.5 * before / before.norm())
    assert train_gpt2.clip_gradients(model, optimizers, scaler, 100.0).item() == pytest.approx(2.5, rel=1e-5)


def test_every_optimizer_steps_with_the_given_learning_rate():
    """From equal gradients, ten times the rate moves every parameter ten times as far."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    moves = []
    for lr in (1e-4, 1e-3):
        torch.manual_seed(0)
        model = GPT(tiny_config())
        optimizers = configure_optimizers(model, "muon", 123.0, 0.0)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        train_gpt2.update_parameters(optimizers, scaler, lr, torch.tensor(1.0))
        moves.append([p.detach() - old for p, old in zip(model.parameters(), before, strict=True)])
    for small, large in zip(*moves, strict=True):
        assert small.abs().max() > 0
        torch.testing.assert_close(large, 10 * small, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_warm_up_to_the_peak_and_end_low(schedule):
    rates = [train_gpt2.SCHEDULES[schedule](step, 2.0, 10, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(rates) == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    if schedule == "cosine":
        assert rates[55] == pytest.approx((2.0 + 0.2) / 2)  # the middle between warmup and end
        assert rates[100] == pytest.approx(0.2)
    else:
        assert set(rates[10:41]) == {2.0}
        assert rates[70] == pytest.approx(1.0)
        assert rates[100] == pytest.approx(0.0)


# ----------------------------------------------------------------------------------------- muon
@pytest.mark.parametrize("shape", [(3, 40, 40), (1, 24, 80), (1, 80, 24)], ids=str)
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_singular_vectors(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    singular_values = torch.logspace(1, -1, u.shape[-1])  # from 10 down to 0.1
    result = train_gpt2.orthogonalize(u @ torch.diag(singular_values) @ v)
    rotated = u.mT @ result @ v.mT  # diagonal if the singular vectors are the same
    diagonal = rotated.diagonal(dim1=-2, dim2=-1)
    assert (rotated - torch.diag_embed(diagonal)).abs().max() < 1e-3
    assert diagonal.min() > 0.5
    assert diagonal.max() < 1.3


def test_orthogonalize_computes_as_much_for_a_tall_matrix_as_for_a_wide_one():
    """The smaller of the two products x x^T and x^T x is enough."""
    counts = []
    for shape in ((1, 24, 80), (1, 80, 24)):
        with FlopCounterMode(display=False) as counter:
            train_gpt2.orthogonalize(torch.randn(shape))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 5 * 2 * (24 * 24 * 80 + 24 * 24 * 24 + 24 * 24 * 80)


def split_matrices(blocks):
    """Return {parameter: its matrices as separate parameters}: c_attn has three, q, k and v."""
    matrices = {}
    for name, parameter in blocks.named_parameters():
        if parameter.dim() == 2:
            num_parts = 3 if "c_attn" in name else 1
            parts = parameter.detach().chunk(num_parts)
            matrices[parameter] = [torch.nn.Parameter(part.clone()) for part in parts]
    return matrices


def test_muon_equals_torch_muon_on_every_matrix_with_q_k_and_v_apart():
    """Three steps, each from the same weights: PyTorch's computes in bfloat16, so differences would add up."""
    model = randomize(GPT(tiny_config(n_inner=48)))
    matrices = split_matrices(model.h)
    all_parts = []
    for parts in matrices.values():
        all_parts += parts
    expected = torch.optim.Muon(
        all_parts,
        lr=0.1,
        weight_decay=0.2,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    muon, adamw = configure_optimizers(model, "muon", 0.1, 0.2)
    assert set(muon.param_groups[0]["params"]) == set(matrices)
    adamw_parameters = set()
    for group in adamw.param_groups:
        adamw_parameters |= set(group["params"])
    assert adamw_parameters == set(model.parameters()) - set(matrices)
    for _ in range(3):
        before = {}
        for parameter, parts in matrices.items():
            before[parameter] = parameter.detach().clone()
            parameter.grad = torch.randn_like(parameter)
            for part, grad in zip(parts, parameter.grad.chunk(len(parts)), strict=True):
                part.grad = grad
        muon.step()
        expected.step()
        for parameter, parts in matrices.items():
            distance = (parameter - before[parameter]).norm()
            assert (parameter - torch.cat(parts)).norm() < 0.03 * distance  # bfloat16 has 8 bits
            with torch.no_grad():
                parameter.copy_(torch.cat(parts))


def muon_steps(rank, world_size):
    """Make three Muon steps on fixed random weights and gradients, and return the weights of the blocks."""
    torch.manual_seed(0)
    model = randomize(GPT(tiny_config(n_inner=48)))
    muon = train_gpt2.Muon(model.h, 0.1, 0.2, rank, world_size)
    for _ in range(3):
        for parameter in model.h.parameters():
            parameter.grad = torch.randn_like(parameter)
        muon.step()
    return {name: p.detach() for name, p in model.h.named_parameters()}


def muon_process(rank, world_size, directory):
    """Call muon_steps as one rank of a gloo group, and save the weights in directory."""
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=world_size)
    torch.save(muon_steps(rank, world_size), f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_muon_shares_its_work_among_ranks_without_changing_the_result(world_size, tmp_path):
    """There are 8, 2 and 2 matrices of equal shape: neither 2 nor 3 ranks divide all of them evenly."""
    expected = muon_steps(0, 1)
    arguments = (world_size, tmp_path)
    torch.multiprocessing.start_processes(muon_process, arguments, nprocs=world_size, start_method="fork")
    weights = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
        for other in weights[1:]:
            assert torch.equal(weights[0][name], other[name]), name  # ranks must never drift apart


def test_muon_orthogonalizes_only_its_own_part_of_the_matrices(monkeypatch):
    """Two ranks of a model with 8, 2 and 2 matrices of equal shape each take half of every stack."""
    counts = []
    orthogonalize = train_gpt2.orthogonalize

    def counted(matrices):
        counts.append(len(matrices))
        return orthogonalize(matrices)

    monkeypatch.setattr(train_gpt2, "orthogonalize", counted)
    monkeypatch.setattr(train_gpt2.dist, "all_gather", lambda parts, own: [part.zero_() for part in parts])
    model = GPT(tiny_config(n_inner=48))
    muon = train_gpt2.Muon(model.h, 0.1, 0.2, rank=1, world_size=2)
    for parameter in model.h.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon.step()
    assert sorted(counts) == [1, 1, 4]


@pytest.mark.parametrize("n_layer", [2, 12])
def test_muon_multiplies_matrices_of_equal_shape_together(n_layer):
    """One matrix after the other would take 15 products for each of the 6 matrices of a layer."""
    model = GPT(tiny_config(n_layer=n_layer))
    (muon, _) = configure_optimizers(model, "muon", 0.1, 0.2)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        muon.step()
    products = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
    count = sum(event.count for event in profile.key_averages() if event.key in products)
    assert count == 3 * 15  # three shapes, 5 iterations of 3 products


# -------------------------------------------------------------------------------------- devices
# Peak TFLOP/s of dense matmuls in NVIDIA's data sheets: (name that the driver reports, 16 bits, TF32 or float32).
GPUS = [
    ("NVIDIA B200", 2250, 1125),
    ("NVIDIA H200", 989, 494),
    ("NVIDIA H200 NVL", 835, 417),
    ("NVIDIA H100 80GB HBM3", 989, 494),
    ("NVIDIA H100 PCIe", 756, 378),
    ("NVIDIA H100 NVL", 835, 417),
    ("NVIDIA A100-SXM4-80GB", 312, 156),
    ("NVIDIA A100-PCIE-40GB", 312, 156),
    ("NVIDIA L40S", 362, 183),
    ("NVIDIA L4", 121, 60),
    ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
    ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ("NVIDIA GeForce RTX 3090", 71, 35.6),
]
UNKNOWN_GPUS = [
    "NVIDIA GH200 480GB",
    "NVIDIA H20",
    "NVIDIA L40",
    "NVIDIA A10",
    "NVIDIA T400 4GB",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 4080",
    "AMD Instinct MI300X",
]


def peak_tflops(monkeypatch, gpu_name, dtype, world_size=1):
    """Return peak_flops() of a GPU with this name in TFLOP/s, or None."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu_name)
    peak = train_gpt2.peak_flops(torch.device("cuda"), dtype, world_size)
    return None if peak is None else peak / 1e12


@pytest.mark.parametrize("gpu_name, peak_16_bit, peak_32_bit", GPUS, ids=lambda value: str(value))
def test_the_peak_of_a_gpu_is_that_of_its_data_sheet(monkeypatch, gpu_name, peak_16_bit, peak_32_bit):
    assert peak_tflops(monkeypatch, gpu_name, "bfloat16") == pytest.approx(peak_16_bit)
    assert peak_tflops(monkeypatch, gpu_name, "float16") == pytest.approx(peak_16_bit)
    assert peak_tflops(monkeypatch, gpu_name, "float32") == pytest.approx(peak_32_bit)
    assert peak_tflops(monkeypatch, gpu_name, "bfloat16", world_size=8) == pytest.approx(8 * peak_16_bit)


@pytest.mark.parametrize(
    "gpu_name, peak_16_bit, peak_32_bit", [("Tesla T4", 65, 8.1), ("Tesla V100-SXM2-16GB", 125, 15.7)]
)
def test_older_gpus_have_no_peak_in_bfloat16(monkeypatch, gpu_name, peak_16_bit, peak_32_bit):
    assert peak_tflops(monkeypatch, gpu_name, "float16") == pytest.approx(peak_16_bit)
    assert peak_tflops(monkeypatch, gpu_name, "float32") == pytest.approx(peak_32_bit)
    assert peak_tflops(monkeypatch, gpu_name, "bfloat16") is None


@pytest.mark.parametrize("gpu_name", UNKNOWN_GPUS)
def test_the_peak_of_other_gpus_is_unknown(monkeypatch, gpu_name):
    for dtype in ("bfloat16", "float16", "float32"):
        assert peak_tflops(monkeypatch, gpu_name, dtype) is None


def test_the_peak_of_a_cpu_is_unknown():
    assert train_gpt2.peak_flops(CPU, "float32", 1) is None
    assert train_gpt2.peak_flops(torch.device("mps"), "float32", 1) is None


def test_a_gpu_uses_bfloat16_where_its_hardware_has_it(monkeypatch):
    calls = []

    def set_hardware(has_bfloat16):
        def is_bf16_supported(including_emulation=True):
            calls.append(including_emulation)
            return has_bfloat16

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)

    set_hardware(has_bfloat16=True)
    assert train_gpt2.default_dtype(torch.device("cuda"), 768)[0] == "bfloat16"
    set_hardware(has_bfloat16=False)
    assert train_gpt2.default_dtype(torch.device("cuda"), 768)[0] == "float16"
    assert calls == [False, False]  # emulated bfloat16 is slow


def test_a_cpu_uses_bfloat16_where_it_is_fast_and_the_model_is_wide(monkeypatch):
    for feature in ("amx_bf16", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda feature=feature: {feature: True})
        assert train_gpt2.default_dtype(CPU, 768)[0] == "bfloat16"
        assert train_gpt2.default_dtype(CPU, 256)[0] == "bfloat16"
        assert train_gpt2.default_dtype(CPU, 255)[0] == "float32"
    for capabilities in ({}, {"avx512_bf16": False, "amx_bf16": False, "avx2": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda result=capabilities: result)
        assert train_gpt2.default_dtype(CPU, 768)[0] == "float32"


def test_other_devices_use_float32():
    assert train_gpt2.default_dtype(torch.device("mps"), 768)[0] == "float32"


def test_the_attention_kernel_is_named_as_pytorch_runs_it():
    backends = torch.nn.attention.SDPBackend
    for dtype in ("float32", "bfloat16"):
        assert train_gpt2.attention_backend(CPU, dtype) == "Flash"
        with torch.nn.attention.sdpa_kernel(backends.MATH):
            assert train_gpt2.attention_backend(CPU, dtype) == "Math"


# ----------------------------------------------------------------------------- attention kernels
def test_hellaswag_and_samples_use_no_attention_that_plans_for_each_length(monkeypatch):
    """cuDNN's attention is switched off inside, and left as it was for training."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def recording_attention(*arguments, **options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording_attention)
    model = GPT(tiny_config())
    block_size = model.config.block_size
    data = {
        "tokens": np.ones((2, 4, block_size), dtype=np.uint16),
        "context_length": np.array([2, 2]),
        "length": np.full((2, 4), block_size),
        "label": np.array([0, 1]),
    }
    stop = types.SimpleNamespace(reason=None)
    train_gpt2.evaluate_hellaswag(model, data, 1, 0, 1, CPU, contextlib.nullcontext(), stop)
    num_hellaswag = len(seen)
    args = argparse.Namespace(prompt="A", max_new_tokens=2)
    enc = train_gpt2.get_tokenizer("bytes")
    train_gpt2.generate_samples(model, enc, args, CPU, contextlib.nullcontext(), rank=0, val_loss=1.0)
    assert 0 < num_hellaswag < len(seen)
    assert not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


# ------------------------------------------------------------------------------------- processes
@pytest.mark.parametrize("script", ["bigram", "gpt", "hellaswag", "sample", "train_gpt2"])
def test_an_nvidia_gpu_that_pytorch_cannot_use_is_reported(script, monkeypatch, capsys):
    module = load(script)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert module.pick_device("auto") == CPU
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and err.count("\n") == 1 and "NVIDIA" in err
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert module.pick_device("auto") == CPU
    assert capsys.readouterr().err == ""


def test_ranks_wait_an_hour_for_a_checkpoint_on_a_slow_disk(monkeypatch):
    options = {}
    monkeypatch.setattr(train_gpt2.dist, "init_process_group", lambda backend, **given: options.update(given))
    for name, value in {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    assert train_gpt2.init_distributed("cpu") == (1, 2, CPU)
    assert options["timeout"].total_seconds() >= 3600
