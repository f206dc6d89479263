"""train_gpt2.py's GPT against transformers' GPT2LMHeadModel."""

import json
import math

import pytest
import torch
import transformers
from conftest import load
from safetensors import safe_open
from safetensors.torch import load_file, save_file

train_gpt2 = load("train_gpt2")
GPT, GPTConfig = train_gpt2.GPT, train_gpt2.GPTConfig

# Vocabularies below, at and just above a multiple of 128; every activation; other inner sizes.
SHAPES = {
    "bytes": dict(vocab_size=257, block_size=20, n_layer=2, n_head=2, n_embd=32),
    "no padding": dict(vocab_size=256, block_size=16, n_layer=1, n_head=4, n_embd=16, activation_function="gelu"),
    "narrow relu": dict(vocab_size=65, block_size=9, n_layer=3, n_head=1, n_embd=24, n_inner=40)
    | dict(activation_function="relu", layer_norm_epsilon=1e-3),
    "deep and wide": dict(vocab_size=1000, block_size=32, n_layer=4, n_head=3, n_embd=48, n_inner=200),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def tiny_config(**changes):
    return GPTConfig(**dict(SHAPES["bytes"], tokenizer="bytes") | changes)


def randomize(model):
    """Every weight, bias and gain random and large: no term of the computation is small enough to hide."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3).add_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
    return model


def tempt(model):
    """Give the padded rows the direction of the output, so that they would win if they were let."""
    with torch.no_grad():
        model.ln_f.bias += 1
        model.wte.weight[model.config.vocab_size :] = 5
    return model


def reference(directory, shape):
    """A random GPT2LMHeadModel of a shape, also saved into directory."""
    names = {"block_size": "n_positions"}
    config = transformers.GPT2Config(
        **{names.get(name, name): value for name, value in shape.items()},
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = randomize(transformers.GPT2LMHeadModel(config))
    model.save_pretrained(directory)
    return model


# ---------------------------------------------------------------------- equal to transformers'
@shapes
def test_logits_equal_transformers(tmp_path, shape):
    theirs, ours = reference(tmp_path, shape), GPT.from_pretrained(tmp_path)
    for B, T in ((1, 1), (3, shape["block_size"])):
        idx = torch.randint(shape["vocab_size"], (B, T))
        logits, loss = ours(idx)
        assert loss is None
        assert logits.shape == (B, T, shape["vocab_size"])
        torch.testing.assert_close(logits, theirs(idx).logits, rtol=1e-5, atol=1e-5)


@shapes
def test_loss_and_gradients_equal_transformers(tmp_path, shape):
    theirs, ours = reference(tmp_path, shape), GPT.from_pretrained(tmp_path)
    window = torch.randint(shape["vocab_size"], (3, shape["block_size"]))
    expected = theirs(window, labels=window).loss  # transformers shifts the labels itself
    loss = ours(window[:, :-1], window[:, 1:])[1]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    grads = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        grad = parameter.grad.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else parameter.grad
        if name == "wte.weight":
            assert not grad[shape["vocab_size"] :].any(), "the padding has a gradient"
            grad = grad[: shape["vocab_size"]]
        torch.testing.assert_close(
            grad, grads[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_dropout_of_the_config_is_used_in_training_alone():
    model = randomize(GPT(tiny_config(dropout=0.4)))
    idx = torch.randint(257, (2, 8))
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


# --------------------------------------------------------------------------------- checkpoints
@shapes
def test_saved_model_opens_in_transformers(tmp_path, shape):
    ours = randomize(GPT(GPTConfig(**shape)))
    with torch.no_grad():
        ours.wte.weight[shape["vocab_size"] :] = 0
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert isinstance(theirs, transformers.GPT2LMHeadModel)
    idx = torch.randint(shape["vocab_size"], (2, shape["block_size"]))
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=1e-5, atol=1e-5)


@shapes
def test_round_trip_through_transformers_is_bit_identical(tmp_path, shape):
    """Their file, our model, our file, their model, their file: the same tensors under the same names."""
    reference(tmp_path / "0", shape)
    GPT.from_pretrained(tmp_path / "0").save_pretrained(tmp_path / "1")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "1").save_pretrained(tmp_path / "2")
    first, second, third = (load_file(tmp_path / n / "model.safetensors") for n in "012")
    assert first.keys() == second.keys() == third.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) and torch.equal(tensor, third[name]), name


def test_file_holds_fp32_without_padding_or_a_second_head(tmp_path):
    model = GPT(tiny_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == model.num_params
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors["transformer.wte.weight"].shape == (257, 32)
    assert not [name for name in tensors if "lm_head" in name]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_our_round_trip_keeps_config_and_padding(tmp_path):
    config = tiny_config(n_inner=72, activation_function="relu", dropout=0.25, layer_norm_epsilon=1e-4)
    model = GPT(config)
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == config
    for (name, before), after in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(before, after), name
    assert again.wte.num_embeddings == 384
    assert not again.wte.weight[257:].any()


def test_config_file_names_what_other_tools_need(tmp_path):
    GPT(tiny_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tokenizer"] == "bytes"
    assert config["bos_token_id"] == config["eos_token_id"] == 256
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.vocab_size, theirs.n_positions, theirs.n_layer) == (257, 20, 2)
    assert theirs.tie_word_embeddings


def test_bare_names_of_the_hub_files_load(tmp_path):
    """The gpt2 files on the hub have no "transformer." before the names, and carry attention masks."""
    theirs = reference(tmp_path, SHAPES["bytes"])
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 20, 20).tril() for i in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    idx = torch.randint(257, (2, 20))
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(idx)[0], theirs(idx).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damage", ["no config", "no weights", "truncated", "other type", "other shape", "no tensor"])
def test_directory_that_holds_no_gpt2_raises_a_line_that_names_it(tmp_path, damage):
    GPT(tiny_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = tmp_path / "model.safetensors"
    if damage == "no config":
        (tmp_path / "config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no tensor":
        (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    else:
        changes = {"model_type": "llama"} if damage == "other type" else {"n_embd": 64}
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_unknown_activation_raises_a_line_that_names_it(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9, activation_function="silu")
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="silu"):
        GPT.from_pretrained(tmp_path)


def test_name_that_cannot_be_fetched_raises_oserror():
    with pytest.raises(OSError):
        GPT.from_pretrained("no-such-owner/no-such-model")


# ----------------------------------------------------------------------------------- parameters
PUBLISHED = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


@pytest.mark.parametrize("preset, count", PUBLISHED.items())
def test_presets_have_the_published_parameter_counts(preset, count):
    values = train_gpt2.PRESETS[preset]
    shape = {name: values[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape))
        theirs = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**{k: v for k, v in shape.items() if k != "block_size"}, n_positions=1024)
        )
    assert model.num_params == count == theirs.num_parameters()
    assert sum(p.numel() for p in model.parameters()) == count + (50304 - 50257) * values["n_embd"]


def test_default_config_is_gpt2():
    with torch.device("meta"):
        assert GPT(GPTConfig()).num_params == 124_439_808


def test_weights_start_as_gpt2s():
    """N(0, 0.02), the two projections of a block scaled by (2 n_layer)^-0.5, biases 0, gains 1."""
    model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=2, n_embd=64))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert parameter[:500].std().item() == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize("vocab_size", [257, 50257])
def test_first_loss_is_that_of_a_blind_guess(vocab_size):
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=32, n_layer=2, n_head=2, n_embd=64))
    x, y = torch.randint(vocab_size, (2, 8, 32))
    assert model(x, y)[1].item() == pytest.approx(math.log(vocab_size), abs=0.05)


# ------------------------------------------------------------------------------------- behaviour
def test_future_tokens_change_no_earlier_logits():
    model = randomize(GPT(tiny_config())).eval()
    idx = torch.randint(257, (2, 20))
    logits = model(idx)[0]
    for t in range(20):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 257
        new = model(changed)[0]
        torch.testing.assert_close(new[:, :t], logits[:, :t], rtol=0, atol=1e-5)
        assert (new[:, t] - logits[:, t]).abs().max() > 1e-2


both = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


def optimizers_of(model, name, learning_rate, weight_decay):
    return train_gpt2.make_optimizers(model, name, learning_rate, weight_decay, torch.device("cpu"), 0, 1)


def one_step(model, optimizers, x, y):
    model.zero_grad()
    loss = model(x, y)[1]
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


@both
def test_two_layers_overfit_one_batch(optimizer):
    model = GPT(tiny_config())
    optimizers = optimizers_of(model, optimizer, 1e-2, 0.1)
    x, y = torch.randint(257, (2, 4, 20))
    assert [one_step(model, optimizers, x, y) for _ in range(100)][-1] < 0.05


@both
def test_padding_stays_zero_through_training(optimizer):
    """Through weight decay, momentum and large steps the padded rows keep every bit of zero."""
    model = GPT(tiny_config(dropout=0.1))
    optimizers = optimizers_of(model, optimizer, 0.1, 0.5)
    before = model.wte.weight[:257].detach().clone()
    for _ in range(10):
        one_step(model, optimizers, *torch.randint(257, (2, 4, 20)))
    assert (model.wte.weight[:257] - before).abs().min() > 0
    assert not model.wte.weight[257:].any()


def test_padding_counts_neither_in_loss_nor_in_logits():
    model = randomize(GPT(tiny_config()))
    idx, targets = torch.randint(257, (2, 3, 20))
    model.wte.weight.data[257:] = 0
    plain = model(idx, targets)[1], model(idx)[0]
    tempt(model)
    model.ln_f.bias.data -= 1  # only the padded rows have changed now
    torch.testing.assert_close((model(idx, targets)[1], model(idx)[0]), plain)


@pytest.mark.parametrize("top_k", [1, 50, 10_000])
def test_no_sampled_id_is_beyond_the_vocabulary(top_k):
    model = tempt(GPT(tiny_config(vocab_size=129)))
    idx = model.generate(torch.zeros(64, 1, dtype=torch.long), 40, torch.Generator().manual_seed(0), top_k=top_k)
    assert idx.shape == (64, 41)
    assert idx.max() < 129
    if top_k == 10_000:
        assert len(idx.unique()) > 120, "the real tokens should all be sampled"


def test_generate_takes_only_the_top_k():
    model = randomize(GPT(tiny_config())).eval()
    out = model.generate(torch.randint(257, (8, 3)), 30, torch.Generator().manual_seed(0), top_k=4)
    for t in range(3, 33):
        logits = model(out[:, max(0, t - 20) : t])[0][:, -1]
        ranks = (logits > logits.gather(1, out[:, t : t + 1])).sum(dim=1)  # how many tokens were likelier
        assert ranks.max() < 4
    assert len({tuple(row) for row in out[:, 3:].tolist()}) > 1


def test_generate_follows_the_softmax():
    """Over many draws of one next token, frequencies match the renormalized probabilities of the top 3."""
    model = randomize(GPT(tiny_config())).eval()
    out = model.generate(torch.zeros(20_000, 1, dtype=torch.long), 1, torch.Generator().manual_seed(0), top_k=3)[:, 1]
    probs, ids = model(torch.zeros(1, 1, dtype=torch.long))[0][0, -1].softmax(0).topk(3)
    for expected, token in zip((probs / probs.sum()).tolist(), ids.tolist(), strict=True):
        assert (out == token).float().mean().item() == pytest.approx(expected, abs=0.015)


def test_weight_decay_reaches_matrices_alone():
    model = GPT(tiny_config())
    (optimizer,) = optimizers_of(model, "adamw", 1e-3, 0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        small = name.endswith("bias") or "ln_" in name
        assert decay.pop(id(parameter)) == (0.0 if small else 0.1), name
    assert not decay
    for group in optimizer.param_groups:
        assert (tuple(group["betas"]), group["eps"]) == ((0.9, 0.95), 1e-8)


# ----------------------------------------------------------------------------------------- muon
@pytest.mark.parametrize("shape", [(3, 40, 40), (1, 24, 80), (1, 80, 24)], ids=str)
def test_orthogonalize_brings_singular_values_near_one_and_keeps_their_vectors(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    y = train_gpt2.orthogonalize(u @ torch.diag(torch.logspace(1, -1, u.shape[-1])) @ v)  # from 10 down to 0.1
    rotated = u.mT @ y @ v.mT  # diagonal where singular vectors are the same
    diagonal = rotated.diagonal(dim1=-2, dim2=-1)
    assert (rotated - torch.diag_embed(diagonal)).abs().max() < 1e-3
    assert diagonal.min() > 0.5 and diagonal.max() < 1.3


def test_muon_is_torchs_on_every_matrix_with_q_k_and_v_apart():
    """Three steps against torch.optim.Muon, which computes in bfloat16, step by step."""
    model = randomize(GPT(tiny_config(n_inner=48)))
    theirs = {}  # our parameter: its matrices, q, k and v apart
    for name, p in model.h.named_parameters():
        if p.dim() == 2:
            theirs[p] = [torch.nn.Parameter(part.clone()) for part in p.detach().chunk(3 if "c_attn" in name else 1)]
    settings = dict(lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    reference = torch.optim.Muon([part for parts in theirs.values() for part in parts], **settings)
    muon, adamw = optimizers_of(model, "muon", 0.1, 0.2)
    assert {id(p) for p in theirs} == {id(p) for p in muon.param_groups[0]["params"]}
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert rest == {id(p) for p in model.parameters()} - {id(p) for p in theirs}
    for _ in range(3):
        for p, parts in theirs.items():
            p.grad = torch.randn_like(p)
            for part, grad in zip(parts, p.grad.chunk(len(parts)), strict=True):
                part.grad = grad
        before = {p: p.detach().clone() for p in theirs}
        muon.step()
        reference.step()
        for p, parts in theirs.items():
            moved = (p - before[p]).norm()
            assert (p - torch.cat(parts)).norm() < 0.03 * moved  # bfloat16 has 8 bits
            with torch.no_grad():
                p.copy_(torch.cat(parts))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_warm_up_to_the_peak_and_end_low(schedule):
    get = train_gpt2.SCHEDULES[schedule]
    rates = [get(step, 2.0, 10, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(rates) == 2.0 and all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[-1] == pytest.approx({"cosine": 0.2, "linear": 0.0}[schedule])
    if schedule == "linear":
        assert set(rates[10:41]) == {2.0} and rates[70] == pytest.approx(1.0)
