"""The model and the optimizers of train_gpt2.py, and the directories from which models are loaded.

All scripts load them with the same copied block. Comparisons run on the CPU and, on a machine with a
GPU, also there (-m gpu). Tests with the mark gpt2 hold for GPT-2's architecture only; the others must hold after a
change of the model as well.
"""

import math
from functools import partial

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
import transformers
from conftest import (
    DEVICES,
    NO_SHAPE,
    assert_user_error,
    call,
    edit_json,
    load,
    random_gpt2,
    read_log,
    succeed,
    tiny_flags,
    truncate,
    write_data_set,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

train_gpt2 = load("train_gpt2")
GPT = train_gpt2.GPT
GPTConfig = train_gpt2.GPTConfig

gpt2 = pytest.mark.gpt2
SHAPES = {
    "bytes": {"vocab_size": 257, "n_positions": 20, "n_layer": 2, "n_head": 2, "n_embd": 32},
    "gpt2 tokens": {"vocab_size": 50257, "n_positions": 16, "n_layer": 1, "n_head": 1, "n_embd": 16},
    "deep": {"vocab_size": 257, "n_positions": 32, "n_layer": 4, "n_head": 3, "n_embd": 48},
}
if torch.cuda.is_available():
    SHAPES["124M"] = {"vocab_size": 50257, "n_positions": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
# largest relative difference of logits and losses
TOLERANCES = {
    ("cpu", "float32"): 1e-5,
    ("cpu", "bfloat16"): 4e-2,
    ("cpu", "float16"): 1e-2,
    ("cuda", "float32"): 1e-4,
    ("cuda", "bfloat16"): 4e-2,
    ("cuda", "float16"): 1e-2,
}
DTYPES = ["float32", "bfloat16", "float16"]
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as (in, out) by transformers

both_scripts = pytest.mark.parametrize("script", ["train_gpt2", "sample"])


@pytest.fixture(params=DEVICES)
def device(request):
    """The CPU and, if there is one, a GPU."""
    return request.param


@pytest.fixture(params=SHAPES)
def shape(request, device):
    """A shape of GPT-2 with transformers' names."""
    if request.param == "124M" and device == "cpu":
        pytest.skip("too slow on a CPU")
    return SHAPES[request.param]


def tiny_config(**changes):
    """A GPTConfig with 257 tokens, 20 positions, 2 layers, 2 heads and 32 channels."""
    shape = {"vocab_size": 257, "block_size": 20, "n_layer": 2, "n_head": 2, "n_embd": 32, "tokenizer": "bytes"}
    return GPTConfig(**{**shape, **changes})


def randomize(model):
    """Make every weight, bias and gain random and large, so that no term of the computation is too small to see."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "ln_" in name and name.endswith("weight"):
                parameter.add_(1.0)
            parameter.copy_(parameter.bfloat16())  # so that a file in 16 bits has the same weights
    return model


def random_reference(directory, **shape):
    """Save a GPT2LMHeadModel with large random weights in directory, and return it."""
    model = randomize(random_gpt2(directory, **{**SHAPES["bytes"], **shape}))
    model.save_pretrained(directory)
    return model


def relative_difference(actual, expected):
    """Return |actual - expected| / |expected|, with the norms of the whole tensors."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


# -------------------------------------------------------------------- the same as transformers
@gpt2
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_loss_and_gradients_equal_those_of_transformers(tmp_path, shape, dtype, device):
    theirs = random_reference(tmp_path, **shape).to(device)
    ours = GPT.from_pretrained(str(tmp_path)).to(device).eval()
    tokens = torch.randint(shape["vocab_size"], (3, shape["n_positions"] + 1)).to(device)
    scale = 1024 if dtype == "float16" else 1  # small float16 numbers become 0
    with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
        logits, no_loss = ours(tokens[:, :-1])
        _, loss = ours(tokens[:, :-1], tokens[:, 1:])
        expected_logits = theirs(tokens[:, :-1]).logits.float()
    assert no_loss is None
    assert relative_difference(logits, expected_logits) < TOLERANCES[device, dtype]
    expected = F.cross_entropy(expected_logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCES[device, dtype])
    (scale * loss).backward()
    (scale * expected).backward()
    expected_grads = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    assert expected_grads.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        grad = parameter.grad.T if name.endswith(TRANSPOSED) else parameter.grad
        if name == "wte.weight":
            assert not grad[theirs.config.vocab_size :].any(), "the padding has a gradient"
            grad = grad[: theirs.config.vocab_size]
        difference = relative_difference(grad, expected_grads[name])
        assert difference < (10 * TOLERANCES[device, dtype] if dtype == "float32" else 0.15), name


@gpt2
def test_dropout_drops_the_same_elements_as_in_transformers(tmp_path):
    """Embeddings, attention and both projections draw their masks in the same order from the same generator."""
    ours = randomize(GPT(tiny_config(dropout=0.3)))
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    tokens = torch.randint(257, (3, 20))
    torch.manual_seed(7)
    _, loss = ours(tokens[:, :-1], tokens[:, 1:])
    torch.manual_seed(7)
    expected = F.cross_entropy(theirs(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(ours.eval()(tokens[:, :-1], tokens[:, 1:])[1].item() - loss.item()) > 1e-3


# --------------------------------------------------------------------------------- checkpoints
@gpt2
def test_a_round_trip_through_transformers_changes_no_bit(tmp_path):
    """A model in 16 bits is saved as float32, without padding rows and without a second head."""
    random_reference(tmp_path / "theirs")
    GPT.from_pretrained(str(tmp_path / "theirs")).bfloat16().save_pretrained(tmp_path / "ours")
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(reopened, transformers.GPT2LMHeadModel)
    reopened.save_pretrained(tmp_path / "theirs again")
    first, *others = [load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours", "theirs again")]
    for other in others:
        assert first.keys() == other.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, msg=name)  # and the same dtype
    config = reopened.config
    assert (config.tokenizer, config.bos_token_id, config.eos_token_id) == ("bytes", 256, 256)
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # earlier versions of transformers need it


def test_a_model_in_16_bits_is_saved_in_float32(tmp_path):
    """Also after a change of the architecture."""
    GPT(tiny_config()).bfloat16().save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


# ---------------------------------------------------------------------------- loading models
def edit_config(**changes):
    """Return a function that changes the config.json in a directory."""
    return lambda directory: edit_json(directory / "config.json", **changes)


def edit_weights(change):
    """Return a function that changes the weights in a directory with change(tensors), where tensors is a dict."""

    def edit(directory):
        path = directory / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def split_into_files(directory):
    """Store the weights in several files with an index, as transformers does with large models."""
    model = transformers.GPT2LMHeadModel.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="40KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2


def store_as_on_the_hub(tensors):
    """The gpt2 files on the Hub have no "transformer." before the names, and contain attention masks."""
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 20, 20).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)


def store_the_head(tensors, difference=0.0):
    """Store the output head as well."""
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + difference


def store_in_16_bits(tensors):
    for name, tensor in tensors.items():
        tensors[name] = tensor.bfloat16()


def put_into_a_run(directory):
    """Make directory that of a run, whose newest checkpoint is not the last one in alphabetical order."""
    files = list(directory.iterdir())
    for name in ("step_000090", "step_1000000", "step_999999", "tmp_step_3000000"):
        (directory / name).mkdir()
    for path in files:
        path.rename(directory / "step_1000000" / path.name)


# directories as people have them: (changes of the shape, function that changes the directory)
LAYOUTS = {
    "several files": ({}, split_into_files),
    "the Hub's gpt2": ({}, edit_weights(store_as_on_the_hub)),
    "a stored head": ({}, edit_weights(store_the_head)),
    "16 bits": ({}, edit_weights(store_in_16_bits)),
    "missing fields": ({}, edit_config(activation_function=None, layer_norm_epsilon=None)),
    "n_inner of 4 n_embd": ({}, edit_config(n_inner=128)),
    "a padding token": ({"vocab_size": 258}, lambda directory: None),
    "rows up to a multiple of 128": ({"vocab_size": 384}, lambda directory: None),
    "a run": ({}, put_into_a_run),
}


@gpt2
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_directory_as_people_have_it_loads(tmp_path, layout):
    changes, change = LAYOUTS[layout]
    theirs = random_reference(tmp_path, **changes)
    change(tmp_path)
    idx = torch.randint(257, (1, 20))
    logits, _ = GPT.from_pretrained(str(tmp_path)).eval()(idx)
    assert relative_difference(logits, theirs(idx).logits[:, :, :257]) < 1e-5


@gpt2
def test_only_what_is_needed_is_downloaded(tmp_path, monkeypatch):
    patterns = []

    def snapshot_download(name, allow_patterns):
        patterns.append((name, allow_patterns))
        return str(tmp_path)

    random_reference(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    GPT.from_pretrained("openai-community/gpt2")
    [(name, allow_patterns)] = patterns
    assert name == "openai-community/gpt2"
    needed = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"]
    others = ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/decoder_model.onnx"]
    kept = huggingface_hub.utils.filter_repo_objects(needed + others, allow_patterns=allow_patterns)
    assert sorted(kept) == sorted(needed)


# damage: (what the message must contain, function that damages a directory)
DAMAGES = {
    "no config": ("config.json", lambda directory: (directory / "config.json").unlink()),
    "text as config": ("", lambda directory: (directory / "config.json").write_text("{")),
    "another model type": ("llama", edit_config(model_type="llama")),
    "another vocabulary": ("vocab_size", edit_config(vocab_size=65)),
    "other attention": ("scale_attn_weights", edit_config(scale_attn_weights=False)),
    "no weights": ("model.safetensors", lambda directory: (directory / "model.safetensors").unlink()),
    "truncated weights": ("", lambda directory: truncate(directory / "model.safetensors")),
    "a missing tensor": ("h.0.ln_1.bias", edit_weights(lambda tensors: tensors.pop("transformer.h.0.ln_1.bias"))),
    "an unknown tensor": ("surprise", edit_weights(lambda tensors: tensors.update(surprise=torch.ones(3)))),
    "another shape": (
        "wpe.weight",
        edit_weights(lambda tensors: tensors.update({"transformer.wpe.weight": torch.ones(20, 31)})),
    ),
    "an untied head": ("lm_head.weight", edit_weights(partial(store_the_head, difference=0.1))),
}


@both_scripts
@pytest.mark.parametrize("damage", DAMAGES)
@gpt2
def test_a_directory_without_a_complete_gpt2_is_refused(tmp_path, script, damage):
    needle, inflict = DAMAGES[damage]
    directory = tmp_path / "model"
    random_gpt2(directory, **SHAPES["bytes"])
    inflict(directory)
    if script == "train_gpt2":
        data_dir = write_data_set(tmp_path / "data", [range(99)], [range(99)])
        flags = ["--init_from", directory, "--data_dir", data_dir, "--log_dir", tmp_path / "log"]
        flags += tiny_flags(**NO_SHAPE)
    else:
        flags = ["--model", directory, "--device", "cpu"]
    assert_user_error(call(script, *flags), directory, needle)


# ----------------------------------------------------------------------------------- parameters
# preset: its published number of parameters, and its learning rate in table 2.1 of GPT-3's paper
PUBLISHED = {
    "gpt2": (124_439_808, 6e-4),
    "gpt2-medium": (354_823_168, 3e-4),
    "gpt2-large": (774_030_080, 2.5e-4),
    "gpt2-xl": (1_557_611_200, 2e-4),
}


@gpt2
@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_parameter_counts_and_heads_of_64_channels(preset):
    count, _ = PUBLISHED[preset]
    values = train_gpt2.PRESETS[preset]
    shape = {name: values[name] for name in ("block_size", "n_layer", "n_head", "n_embd")}
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape))
    assert model.num_params == count
    assert shape["n_embd"] == 64 * shape["n_head"]
    assert sum(p.numel() for p in model.parameters()) == count + (50304 - 50257) * values["n_embd"]
    if preset == "gpt2":
        assert model.config == GPTConfig()


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_follow_the_recipe_of_gpt3(preset):
    """All sizes have batches of 2**19 tokens, and 10B tokens in total."""
    values = train_gpt2.PRESETS[preset]
    assert values["learning_rate"] == PUBLISHED[preset][1]
    assert values["total_batch_size"] == 2**19
    assert values["warmup_steps"] == 375e6 // 2**19
    assert values["max_steps"] == 10e9 // 2**19
    assert (values["optimizer"], values["schedule"]) == ("adamw", "cosine")
    assert (values["weight_decay"], values["grad_clip"], values["dropout"]) == (0.1, 1.0, 0.0)


@gpt2
def test_mfu_of_gpt2_on_two_h100s(monkeypatch):
    """A token takes 860 MFLOP, and the peak of an H100 is 989 TFLOP/s (docs/performance.md)."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    process = train_gpt2.Process(0, 2, torch.device("cuda"), None)
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert train_gpt2.mfu(model, 1e6, process) == pytest.approx(860e12 / (2 * 989e12), rel=1e-3)


@gpt2
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


@pytest.mark.parametrize("num_rows, dtype", [(4, torch.bfloat16), (5, torch.float32)])
def test_the_loss_of_a_few_rows_at_a_time_equals_that_of_all_rows(num_rows, dtype):
    """A vocabulary of a million tokens makes chunks of four rows on a CPU."""
    logits = (4 * torch.randn(num_rows, 2**20)).to(dtype).requires_grad_()
    targets = torch.randint(2**20, (num_rows,))
    loss = train_gpt2.cross_entropy(logits, targets)
    (grad,) = torch.autograd.grad(loss, logits)
    expected = F.cross_entropy(logits.double(), targets)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    rtol = 1e-2 if dtype == torch.bfloat16 else 5e-4  # over a million terms, float32 has about four digits
    torch.testing.assert_close(grad, expected_grad, rtol=rtol, atol=1e-9)


# ----------------------------------------------------------------------------------- sampling
def test_no_sampled_token_is_beyond_the_vocabulary():
    model = GPT(tiny_config(vocab_size=129))
    with torch.no_grad():  # one of the padding rows would win if it were allowed to
        model.wte.weight[129], model.wte.weight[130] = 5, -5
    idx = model.generate(torch.zeros(64, 1, dtype=torch.long), 40, torch.Generator().manual_seed(0), top_k=10_000)
    assert idx.shape == (64, 41)
    assert idx.max() < 129
    assert len(idx.unique()) > 120, "nearly all of the 129 tokens should be sampled"


def test_generate_samples_from_the_softmax_of_the_top_k_tokens():
    """Also beyond the context, and without dropout."""
    model = randomize(GPT(tiny_config(dropout=0.5)))
    idx = model.generate(torch.zeros(500, 1, dtype=torch.long), 22, torch.Generator().manual_seed(0), top_k=3)
    model.eval()
    last = idx[-8:]
    for t in range(1, 23):
        logits = model(last[:, max(0, t - 20) : t])[0][:, -1]  # at most block_size tokens of context
        chosen = logits.gather(1, last[:, t : t + 1])
        assert (logits > chosen).sum(dim=1).max() < 3
    probs, tokens = model(idx[:1, :1])[0][0, -1].softmax(dim=0).topk(3)
    for prob, token in zip((probs / probs.sum()).tolist(), tokens.tolist(), strict=True):
        assert (idx[:, 1] == token).float().mean().item() == pytest.approx(prob, abs=0.08)


# ---------------------------------------------------------------------------------- optimizers
def train(tmp_path, record=lambda optimizer: None, **changes):
    """Train on eight random windows, all of them in each step. record(optimizer) is called before an optimizer's step.

    Returns log.txt as {(step, kind): value}.
    """
    tokens = np.random.default_rng(0).integers(256, size=8 * 16 + 1)
    data_dir = write_data_set(tmp_path / "data", [tokens], [tokens])
    flags = tiny_flags(**{"max_new_tokens": 1, "val_tokens": 1, **changes})
    hook = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: record(optimizer))
    try:
        succeed("train_gpt2", *flags, "--data_dir", data_dir, "--log_dir", tmp_path / "log")
    finally:
        hook.remove()
    return {key: float(value) for key, value in read_log(tmp_path / "log").items()}


def parameters_of(optimizer):
    """Return the parameters of an optimizer, and the group of each."""
    return [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_optimized_once_and_only_matrices_decay(tmp_path, optimizer):
    groups = {}

    def record(optimizer):
        for parameter, group in parameters_of(optimizer):
            assert parameter not in groups
            groups[parameter] = (type(optimizer).__name__, group)

    train(tmp_path, record, optimizer=optimizer, max_steps=1, weight_decay=0.3)
    assert sum(parameter.numel() for parameter in groups) == GPT(tiny_config(block_size=16)).num_params + 127 * 32
    for parameter, (name, group) in groups.items():
        assert group["weight_decay"] == (0.3 if parameter.dim() == 2 else 0.0)
        if name == "AdamW":
            assert (tuple(group["betas"]), group["eps"]) == ((0.9, 0.95), 1e-8)
        is_matrix_of_a_block = parameter.dim() == 2 and parameter.shape[0] not in (16, 384)
        assert name == ("Muon" if optimizer == "muon" and is_matrix_of_a_block else "AdamW")


def test_scaled_gradients_of_float16_are_clipped_together_to_the_given_norm(tmp_path):
    """Look at the gradients when the optimizers use them. test_train_gpt2_recipe.py does so in float32."""
    squares = []

    def record(optimizer):
        grads = [parameter.grad.double() for parameter, _ in parameters_of(optimizer)]
        squares.append(sum(grad.pow(2).sum().item() for grad in grads))

    log = train(tmp_path, record, dtype="float16", optimizer="muon", grad_clip=0.7, max_steps=20, learning_rate=3e-3)
    norms = [value for (_, kind), value in log.items() if kind == "norm" and math.isfinite(value)]
    actual = [math.sqrt(a + b) for a, b in zip(squares[::2], squares[1::2], strict=True)]  # Muon's and AdamW's
    assert actual == pytest.approx([min(norm, 0.7) for norm in norms], rel=1e-3)
    assert max(norms) > 1


def test_wsd_is_a_warmup_a_constant_rate_and_a_line_to_zero():
    """The recipe's plain loop has the same schedules, but only for GPT-2."""
    rates = [train_gpt2.SCHEDULES["wsd"](step, 2.0, 10, 100) for step in range(101)]
    expected = np.interp(range(101), [0, 9, 40, 100], [0.2, 2.0, 2.0, 0.0])
    assert rates == pytest.approx(expected.tolist())


# ----------------------------------------------------------------------------------------- muon
@pytest.mark.parametrize("shape", [(3, 40, 40), (1, 24, 80), (1, 80, 24)], ids=str)
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_singular_vectors(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    singular_values = torch.logspace(1, -1, u.shape[-1])  # from 10 down to 0.1
    matrices = u @ torch.diag(singular_values) @ v
    with FlopCounterMode(display=False) as counter:
        result = train_gpt2.orthogonalize(matrices)
    rotated = u.mT @ result @ v.mT  # diagonal if the singular vectors are the same
    diagonal = rotated.diagonal(dim1=-2, dim2=-1)
    assert (rotated - torch.diag_embed(diagonal)).abs().max() < 1e-3
    assert diagonal.min() > 0.5
    assert diagonal.max() < 1.3
    # the smaller of the products x x^T and x^T x is enough
    m, n = sorted(shape[1:])
    assert counter.get_total_flops() == shape[0] * 5 * 2 * (2 * m * m * n + m**3)


def muon_steps(rank, world_size, directory):
    """Make three Muon steps on fixed random weights and gradients as one rank of a gloo group. Saves the result."""
    if world_size > 1:
        store = f"file://{directory}/store"
        torch.distributed.init_process_group("gloo", store, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = randomize(GPT(tiny_config()))
    muon = train_gpt2.Muon(model.h, 0.1, 0.2)
    with FlopCounterMode(display=False) as counter:
        for _ in range(3):
            for parameter in model.h.parameters():
                parameter.grad = torch.randn_like(parameter)
            muon.step()
    result = {"flops": counter.get_total_flops(), "weights": dict(model.h.named_parameters())}
    torch.save(result, f"{directory}/{rank}_of_{world_size}.pt")
    if world_size > 1:
        torch.distributed.destroy_process_group()


def test_muon_shares_its_work_among_ranks_without_changing_the_result(tmp_path):
    """There are 8, 2 and 2 matrices of equal shape: 3 ranks cannot divide them evenly."""
    muon_steps(0, 1, tmp_path)
    torch.multiprocessing.start_processes(muon_steps, (3, tmp_path), nprocs=3, start_method="fork")
    expected = torch.load(tmp_path / "0_of_1.pt", weights_only=False)
    results = [torch.load(tmp_path / f"{rank}_of_3.pt", weights_only=False) for rank in range(3)]
    for result in results:
        assert result["flops"] <= expected["flops"] / 2
        for name, tensor in expected["weights"].items():
            torch.testing.assert_close(result["weights"][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
            assert torch.equal(result["weights"][name], results[0]["weights"][name]), "ranks must not drift apart"


def test_muon_multiplies_matrices_of_equal_shape_together():
    """One matrix after the other would take 15 products for each of the 6 matrices of a layer."""
    model = GPT(tiny_config())
    muon = train_gpt2.Muon(model.h, 0.1, 0.2)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        muon.step()
    products = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
    count = sum(event.count for event in profile.key_averages() if event.key in products)
    assert count == 3 * 15  # three shapes, 5 iterations of 3 products


# -------------------------------------------------------------------------------------- devices
def test_hellaswag_and_samples_use_no_attention_that_plans_for_each_length(tmp_path, monkeypatch, tiktoken_cache):
    """cuDNN's attention is switched off for lengths other than --block_size, and is left as it was for training."""
    seen = {}
    attention = F.scaled_dot_product_attention

    def recording_attention(q, *arguments, **options):
        if q.shape[2] <= 16:
            seen.setdefault(q.shape[2], set()).add(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(q, *arguments, **options)

    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", recording_attention)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hellaswag").mkdir()
    arrays = {"tokens": np.ones((2, 4, 12), np.uint16), "context_length": np.array([3, 3]), "label": np.array([0, 1])}
    np.savez(tmp_path / "hellaswag" / "hellaswag_val.npz", **arrays, length=np.full((2, 4), 12))
    write_data_set("data", [range(200)], [range(99)], 50257)
    flags = tiny_flags(prompt="A B", max_new_tokens=2, max_steps=2, eval_interval=2, hellaswag_interval=2)
    succeed("train_gpt2", *flags, "--data_dir", "data", "--log_dir", "log")
    assert seen == {16: {True}, 12: {False}, 2: {False}, 3: {False}}
    assert torch.backends.cuda.cudnn_sdp_enabled()
