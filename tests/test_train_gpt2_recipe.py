"""train_gpt2.py's whole recipe, compared with a plain training loop around transformers' GPT2LMHeadModel."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NO_SHAPE,
    ROOT,
    random_gpt2,
    read_log,
    read_windows,
    succeed,
    tiny_flags,
    weights_file,
    write_data_set,
)
from safetensors.torch import load_file

BLOCK_SIZE = 16
WINDOWS_PER_STEP = 8
MICRO_BATCH_SIZE = 4
MAX_STEPS = 45
WARMUP_STEPS = 7
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.2
GRAD_CLIP = 1.5
VAL_WINDOWS = 25  # not a multiple of the micro-batch
EVAL_INTERVAL = 10
FLAGS = tiny_flags(
    **NO_SHAPE,
    block_size=BLOCK_SIZE,
    total_batch_size=WINDOWS_PER_STEP * BLOCK_SIZE,
    micro_batch_size=MICRO_BATCH_SIZE,
    max_steps=MAX_STEPS,
    warmup_steps=WARMUP_STEPS,
    learning_rate=LEARNING_RATE,
    weight_decay=WEIGHT_DECAY,
    grad_clip=GRAD_CLIP,
    eval_interval=EVAL_INTERVAL,
    val_tokens=VAL_WINDOWS * BLOCK_SIZE + 5,
    max_new_tokens=1,
    dtype="float32",
)


def text_shards(directory):
    """A data set of English bytes. Step 25 takes its windows from both training shards, step 39 from two epochs."""
    tokens = np.frombuffer((ROOT / "input.txt").read_bytes(), dtype=np.uint8)
    train = [tokens[: 203 * BLOCK_SIZE + 9], tokens[5000 : 5000 + 110 * BLOCK_SIZE + 1]]
    val = [tokens[-40 * BLOCK_SIZE :]]
    return write_data_set(directory, train, val)


def loss_of(model, windows):
    """Return the mean loss of transformers' model on windows (B, BLOCK_SIZE + 1)."""
    logits = model(windows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def learning_rate(schedule, step):
    """Linear warmup. Then cosine: half a cosine to a tenth; wsd: the peak, and a line to 0 in the last 60% of steps."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    if schedule == "cosine":
        angle = math.pi * (step - WARMUP_STEPS) / (MAX_STEPS - WARMUP_STEPS)
        return LEARNING_RATE * (0.1 + 0.9 * (1 + math.cos(angle)) / 2)
    return LEARNING_RATE * min(1, (MAX_STEPS - step) / (0.6 * MAX_STEPS))


def muon_step(parameter, momentum, lr, num_parts):
    """Update the matrices in a parameter as Muon does, one after another. transformers stores them as (in, out)."""
    momentum.lerp_(parameter.grad, 0.05)
    update = parameter.grad.lerp(momentum, 0.95)
    parts = []
    for part in update.chunk(num_parts, dim=1):
        x = part / part.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        parts.append(0.2 * max(part.shape) ** 0.5 * x)
    parameter.mul_(1 - lr * WEIGHT_DECAY).sub_(lr * torch.cat(parts, dim=1))


def train_reference(model, directory, optimizer_name, schedule):
    """Train transformers' model with a plain loop. Returns {(step, kind): value}, the metrics of log.txt."""
    windows = {"train": [], "val": []}
    for split, rows in windows.items():
        for path in sorted(directory.glob(f"*_{split}_*")):
            rows += read_windows(path, BLOCK_SIZE)
    train, val = torch.tensor(windows["train"]), torch.tensor(windows["val"])
    muon = {}  # matrix of a block -> its momentum and its number of matrices
    if optimizer_name == "muon":
        for name, parameter in model.transformer.h.named_parameters():
            if parameter.dim() == 2:
                muon[parameter] = torch.zeros_like(parameter), 3 if "c_attn" in name else 1
    matrices = [p for p in model.parameters() if p.dim() == 2 and p not in muon]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    metrics = {}
    for step in range(MAX_STEPS + 1):
        if step % EVAL_INTERVAL == 0 or step == MAX_STEPS:
            with torch.no_grad():
                metrics[step, "val"] = np.mean([loss_of(model, val[i : i + 1]).item() for i in range(VAL_WINDOWS)])
        if step == MAX_STEPS:
            return metrics
        # accumulate the gradients of the micro-batches
        model.zero_grad()
        num_micro_batches = WINDOWS_PER_STEP // MICRO_BATCH_SIZE
        total = 0.0
        for i in range(num_micro_batches):
            first = step * WINDOWS_PER_STEP + i * MICRO_BATCH_SIZE
            indices = torch.arange(first, first + MICRO_BATCH_SIZE) % len(train)
            loss = loss_of(model, train[indices]) / num_micro_batches
            loss.backward()
            total += loss.item()
        # clip the norm of all gradients together
        norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, GRAD_CLIP / (norm + 1e-6))
        lr = learning_rate(schedule, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            for parameter, (momentum, num_parts) in muon.items():
                muon_step(parameter, momentum, lr, num_parts)
        metrics[step, "train"] = total
        metrics[step, "lr"] = lr
        metrics[step, "norm"] = norm


@pytest.fixture(scope="module", params=[("adamw", "cosine"), ("muon", "wsd")], ids=str)
def both_runs(request, tmp_path_factory):
    """Train both from the same initial weights. Returns (log_dir, metrics and model of the plain loop)."""
    folder = tmp_path_factory.mktemp("recipe")
    directory = text_shards(folder / "data")
    torch.manual_seed(0)
    shape = {"n_positions": BLOCK_SIZE, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = random_gpt2(folder / "initial", **shape, attn_implementation="eager")
    optimizer, schedule = request.param
    flags = [*FLAGS, "--no-shuffle", "--init_from", folder / "initial"]
    flags += ["--optimizer", optimizer, "--schedule", schedule]
    succeed("train_gpt2", *flags, "--data_dir", directory, "--log_dir", folder / "log")
    return folder / "log", train_reference(model, directory, optimizer, schedule), model


@pytest.mark.gpt2
def test_every_logged_value_equals_that_of_a_plain_loop_around_transformers(both_runs):
    """45 steps in file order from equal weights, over the end of a shard and the end of an epoch."""
    log_dir, expected, _ = both_runs
    actual = {key: float(value) for key, value in read_log(log_dir).items() if key[1] != "tok/s"}
    assert actual.keys() >= expected.keys()
    for (step, kind), value in expected.items():
        if kind == "lr":
            tolerance = 0.5e-4 * value + 1e-8  # log.txt has five significant digits
        elif kind == "train":
            tolerance = 0.5e-6 + 1e-5  # six decimals
        else:
            tolerance = 0.5e-4 + 1e-5  # four decimals
        assert abs(actual[step, kind] - value) <= tolerance, (step, kind, actual[step, kind], value)

    # the run learned something, and some gradients were clipped and others were not
    assert expected[MAX_STEPS, "val"] < expected[0, "val"] - 1
    norms = [value for (_, kind), value in expected.items() if kind == "norm"]
    assert min(norms) < GRAD_CLIP - 0.1
    assert max(norms) > GRAD_CLIP + 0.1


@pytest.mark.gpt2
def test_the_final_weights_equal_those_of_a_plain_loop_around_transformers(both_runs):
    """Except the biases of the keys: they shift all scores of a query equally, so their gradients are rounding."""
    log_dir, _, model = both_runs
    saved = load_file(weights_file(log_dir, MAX_STEPS))
    for name, expected in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        actual = saved[name]
        if name.endswith("c_attn.bias"):
            expected = torch.cat((expected[:32], expected[64:]))
            actual = torch.cat((actual[:32], actual[64:]))
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=3e-5, msg=name)
