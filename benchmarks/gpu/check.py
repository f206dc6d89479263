"""
Check on a GPU that the scripts compute the right numbers, before anything is timed.

    python benchmarks/gpu/check.py                                 # one GPU; 6 minutes
    python benchmarks/gpu/check.py --only loss_in_float32 copies_do_not_wait
    python benchmarks/gpu/check.py --device cpu --tiny             # tries the script itself; a minute

Every check prints one line, which begins with "ok" or "FAIL" and says what was compared and how much it differs. The
exit status is 1 if a check failed. Expected values come from transformers, or from the same computation done in another
way: eager, uninterrupted, on one rank, or in float32 on the CPU. Models have random weights. The training runs use
--data_dir or, without it, input.txt in bytes. Nothing is written except to a temporary directory.

Sections: tools, comparisons with transformers, comparisons with another way, training runs, several ranks, waiting.
"""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import cached_property
from types import SimpleNamespace

from gpu_common import HERE, INPUT, TINY_SHAPE, call_script, machine_name, make_data, make_parser, synchronize

# isort: split
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_hellaswag import make_examples, read_source
from torch.nn.attention import sdpa_kernel

import hellaswag
import sample
import train_gpt2

DTYPES_16_BIT = (torch.bfloat16, torch.float16)


# ---------------------------------------------------------------------------------------- tools
class Mismatch(Exception):
    """A check failed. The message says what differs."""


def require(condition, message):
    """Raise Mismatch unless the condition holds. A NaN must make the condition false: write it as a < b."""
    if not condition:
        raise Mismatch(message)


def relative_difference(actual, expected):
    """Return |actual - expected| / |expected|, with the norms of the whole tensors."""
    # compare in float32 on the CPU, so that the comparison itself adds nothing
    expected = expected.detach().float().cpu()
    difference = actual.detach().float().cpu() - expected
    return (difference.norm() / expected.norm()).item()


def name_of(dtype):
    """Return the name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def autocast(device, dtype):
    """Return a context in which matmuls are computed in a dtype."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


class Setup:
    """What the checks share: sizes, a model and the same one in transformers, and training runs."""

    def __init__(self, args, directory):
        self.device = torch.device(args.device)
        self.tiny = args.tiny
        self.directory = directory
        self.data_dir = args.data_dir or make_data(f"{directory}/shakespeare", "bytes")
        self.runs = {}  # name of a training run -> its directory
        self.shape = TINY_SHAPE if args.tiny else {}
        # sequences and tokens per sequence of a comparison
        self.B = 2 if args.tiny else 8
        self.T = 64 if args.tiny else 1024
        # how much the losses of equal runs may differ: hardly on a CPU, more on a GPU, where the order of sums varies
        self.tolerance = 1e-3 if args.tiny else 0.01
        # "inductor" is the default of torch.compile. At tiny size the graph is captured but not turned into code,
        # which would take long on a CPU.
        self.backend = "aot_eager" if args.tiny else "inductor"

    @cached_property
    def model(self):
        """GPT-2 124M with random weights, three times as large as at the start of training: its logits differ."""
        torch.manual_seed(0)
        model = train_gpt2.GPT(train_gpt2.GPTConfig(**self.shape))
        # initial weights give nearly equal logits, which would hide mistakes
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(3)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.to(self.device).eval()

    @cached_property
    def checkpoint(self):
        """A directory with the model."""
        self.model.save_pretrained(f"{self.directory}/model")
        return f"{self.directory}/model"

    @cached_property
    def peer(self):
        """The same model in transformers."""
        return self.load_peer(torch.float32)

    def load_peer(self, dtype):
        """Load the model with transformers."""
        import transformers  # imported here because it is slow

        transformers.utils.logging.disable_progress_bar()
        return transformers.GPT2LMHeadModel.from_pretrained(self.checkpoint, dtype=dtype).to(self.device).eval()

    @cached_property
    def batch(self):
        """Random inputs and targets, each (B, T)."""
        generator = torch.Generator().manual_seed(1)
        idx = torch.randint(50257, (self.B, self.T + 1), generator=generator).to(self.device)
        return idx[:, :-1], idx[:, 1:]

    def peer_loss(self):
        """Compute the loss of the batch with transformers' logits."""
        x, y = self.batch
        logits = self.peer(x).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


# ------------------------------------------------------------------- comparisons with transformers
def environment(setup):
    """Name the versions and the attention kernels. This check cannot fail: README.md says what to expect."""
    kernels = []
    for dtype in (torch.float32, *DTYPES_16_BIT):
        kernels.append(f"{name_of(dtype)} {train_gpt2.attention_backend(setup.device, name_of(dtype))}")
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    text = f"{machine_name(setup.device.type)}, {versions}, attention kernels: {', '.join(kernels)}"
    if setup.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        text += f", {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    return text


def loss_in_float32(setup):
    """Compare the loss with that of transformers."""
    x, y = setup.batch
    with torch.no_grad():
        actual = setup.model(x, y)[1].item()
        expected = setup.peer_loss().item()
    text = f"loss {actual:.6f}, transformers {expected:.6f}"
    require(abs(actual - expected) < 2e-5 * expected, text)
    return text


def loss_in_16_bits(setup):
    """Compare the losses under autocast with those of transformers."""
    x, y = setup.batch
    texts = []
    for dtype in DTYPES_16_BIT:
        # both losses have the rounding errors of 16 bits, in different places
        with torch.no_grad(), autocast(setup.device, dtype):
            actual = setup.model(x, y)[1].item()
            expected = setup.peer_loss().item()
        texts.append(f"{name_of(dtype)} {actual:.5f}, transformers {expected:.5f}")
        require(abs(actual - expected) < 0.01 * expected, texts[-1])
    return "; ".join(texts)


def gradients_of(setup, dtype):
    """Return {name: (our gradient, transformers' gradient)} and the largest gradient of a padding row."""
    x, y = setup.batch
    # a small float16 number would become 0, so the loss is scaled up
    vocab_size = setup.model.config.vocab_size
    scale = 1024 if dtype == torch.float16 else 1
    # the forward pass under autocast, the backward pass outside, as in training
    with autocast(setup.device, dtype):
        loss = setup.model(x, y)[1]
        peer_loss = setup.peer_loss()
    (scale * loss).backward()
    (scale * peer_loss).backward()
    peer_parameters = dict(setup.peer.transformer.named_parameters())
    # transformers has transposed matrices, and no padding rows in the embedding
    pairs = {}
    for name, parameter in setup.model.named_parameters():
        expected = peer_parameters[name].grad
        if name.endswith(train_gpt2.TRANSPOSED):
            expected = expected.T
        pairs[name] = (parameter.grad[: len(expected)], expected)
    padding = setup.model.wte.weight.grad[vocab_size:].abs().max().item()
    setup.model.zero_grad()
    setup.peer.zero_grad()
    return pairs, padding


def compare_gradients(setup, dtype, tolerance):
    """Compare the gradients of all parameters with those of transformers."""
    pairs, padding = gradients_of(setup, dtype)
    differences = {name: relative_difference(*pair) for name, pair in pairs.items()}
    worst = max(differences, key=differences.get)
    text = f"{name_of(dtype)}: largest relative difference {differences[worst]:.1e}, of {worst}"
    require(differences[worst] < tolerance, text)
    require(padding == 0, f"{name_of(dtype)}: padding rows have a gradient of {padding}")
    return text


def gradients_in_float32(setup):
    """Compare all gradients with those of transformers; padding rows must have none."""
    return compare_gradients(setup, torch.float32, 1e-3)


def gradients_in_16_bits(setup):
    """Compare all gradients under autocast with those of transformers."""
    return "; ".join(compare_gradients(setup, dtype, 0.15) for dtype in DTYPES_16_BIT)


def compare_logits(setup, script):
    """Compare the logits of sample.py or hellaswag.py with those of transformers in three dtypes."""
    x, _ = setup.batch
    texts = []
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 4e-2), (torch.float16, 1e-2)):
        # here the weights themselves are in the dtype, in both implementations
        model = script.GPT.from_pretrained(setup.checkpoint, setup.device, dtype)
        with torch.no_grad():
            actual = model.logits(model(x))
            expected = setup.load_peer(dtype)(x).logits
        difference = relative_difference(actual, expected)
        texts.append(f"{name_of(dtype)} {difference:.1e}")
        require(difference < tolerance, f"relative difference in {texts[-1]}")
    return f"relative differences: {', '.join(texts)}"


def logits_of_sample(setup):
    """Compare the logits of sample.py with those of transformers."""
    return compare_logits(setup, sample)


def logits_of_hellaswag(setup):
    """Compare the logits of hellaswag.py with those of transformers."""
    return compare_logits(setup, hellaswag)


def greedy_tokens(setup, dtype, max_new_tokens):
    """Return the prompt (T,) and the tokens (2, max_new_tokens) with which two samples of sample.py continue it."""
    prompt = setup.batch[0][0, :8]
    model = sample.GPT.from_pretrained(setup.checkpoint, setup.device, dtype)
    steps = sample.generate(model, prompt.tolist(), 2, max_new_tokens, lambda logits: logits.argmax(dim=-1))
    return prompt, torch.stack(list(steps), dim=1)


def greedy_text_in_float32(setup):
    """Compare the most likely continuation with that of transformers' generate."""
    prompt, actual = greedy_tokens(setup, torch.float32, 24)
    prompts = prompt.expand(2, -1)
    setup.peer.generation_config.eos_token_id = None  # never stop early
    expected = setup.peer.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=24, pad_token_id=0
    )[:, len(prompt) :]
    require(torch.equal(actual, expected), f"{actual.tolist()}, transformers {expected.tolist()}")
    return "24 tokens of 2 samples are equal to those of transformers"


def greedy_text_in_16_bits(setup):
    """Check that transformers in float32 finds each token of a 16-bit continuation about as likely as its best one.

    The tokens themselves may differ: in 16 bits many logits are equal.
    """
    texts = []
    for dtype in DTYPES_16_BIT:
        prompt, tokens = greedy_tokens(setup, dtype, 24)
        idx = torch.cat((prompt.expand(2, -1), tokens), dim=1)  # (2, 32)
        # what transformers thinks of each token, given the tokens before it
        with torch.no_grad():
            logits = setup.peer(idx).logits[:, len(prompt) - 1 : -1]  # (2, 24, V)
        chosen = logits.gather(2, tokens[:, :, None])[:, :, 0]  # (2, 24)
        gap = ((logits.max(dim=2).values - chosen) / logits.std(dim=2)).max().item()
        num_best = (logits.argmax(dim=2) == tokens).sum().item()
        texts.append(f"{name_of(dtype)}: {num_best} of 48 tokens are transformers' best, largest gap {gap:.3f}")
        require(gap < 0.1, f"{texts[-1]} standard deviations of the logits")
    return "; ".join(texts)


# --------------------------------------------------------------------- comparisons with another way
def losses_of_steps(setup, wrap, dtype):
    """Return the 12 losses of 6 AdamW steps of 2 micro-batches, from the same weights and data in each call."""
    torch.manual_seed(1)
    shape = {**TINY_SHAPE, "vocab_size": 1000} if setup.tiny else {"n_layer": 4}
    raw_model = train_gpt2.GPT(train_gpt2.GPTConfig(**shape)).to(setup.device)
    model = wrap(raw_model)
    optimizers = train_gpt2.configure_optimizers(raw_model, "adamw", 1e-3, 0.1, setup.device)
    scaler = torch.amp.GradScaler(setup.device.type, enabled=dtype == torch.float16)
    losses = []
    for step in range(6):
        # two micro-batches, then one optimizer step, as in the trainer's loop
        for i in range(2):
            generator = torch.Generator().manual_seed(10 * (step % 2) + i)  # two steps of data, three times
            size = (setup.B, setup.T + 1)
            windows = torch.randint(raw_model.config.vocab_size, size, generator=generator).to(setup.device)
            with autocast(setup.device, dtype):
                _, loss = model(windows[:, :-1], windows[:, 1:])
            scaler.scale(loss / 2).backward()
            losses.append(loss.item())
        norm = train_gpt2.clip_gradients(raw_model, optimizers, scaler, 1.0)
        train_gpt2.update_parameters(optimizers, scaler, 1e-3, norm)
        raw_model.zero_grad(set_to_none=True)
    return losses


def largest_difference(losses, expected):
    """Return the largest difference of two lists of losses."""
    return max(abs(a - b) for a, b in zip(losses, expected, strict=True))


def compiled_as_eager(setup):
    """Compare training steps of the compiled model with those of the eager one."""
    texts = []
    for dtype in DTYPES_16_BIT:
        torch.compiler.reset()
        eager = losses_of_steps(setup, lambda model: model, dtype)
        compiled = losses_of_steps(setup, lambda model: torch.compile(model, backend=setup.backend), dtype)
        difference = largest_difference(compiled, eager)
        texts.append(f"{name_of(dtype)}: largest difference {difference:.1e}, loss {eager[0]:.3f} to {eager[-1]:.3f}")
        require(difference < 0.02, texts[-1])
        require(eager[-1] < eager[0], f"{texts[-1]}: the loss did not fall")
    return "; ".join(texts)


def muon_as_on_the_cpu(setup):
    """Compare Muon's update on this device with that in float32 on the CPU."""
    # two models with the same weights, one here and one on the CPU
    shape = setup.shape or {"n_layer": 2}
    reference = train_gpt2.GPT(train_gpt2.GPTConfig(**shape))
    model = train_gpt2.GPT(train_gpt2.GPTConfig(**shape))
    model.load_state_dict(reference.state_dict())
    model.to(setup.device)
    before = {name: parameter.detach().clone() for name, parameter in reference.h.named_parameters()}
    # the same random gradients, and one step
    for parameter, copy in zip(reference.parameters(), model.parameters(), strict=True):
        parameter.grad = torch.randn_like(parameter)
        copy.grad = parameter.grad.to(setup.device)
    for each in (reference, model):
        train_gpt2.Muon(each.h, 1e-2, 0.1, rank=0, world_size=1).step()
    # compare what the step added to each matrix
    actual = dict(model.h.named_parameters())
    worst = 0.0
    for name, parameter in reference.h.named_parameters():
        if parameter.dim() == 2:
            update = actual[name].detach().cpu() - before[name]
            worst = max(worst, relative_difference(update, parameter.detach() - before[name]))
    text = f"largest relative difference of an update {worst:.1e}"
    require(worst < 0.05, text)
    return text


def hellaswag_in_training(setup):
    """Compare the accuracy that the trainer computes with that of hellaswag.py, on examples from input.txt."""
    # the trainer reads a prepared file
    num_examples = 16 if setup.tiny else 200
    examples = make_examples(read_source(INPUT), train_gpt2.get_tokenizer("gpt2"), num_examples)
    path = f"{setup.directory}/hellaswag/hellaswag_val.npz"
    hellaswag.write_prepared(path, examples)
    data = train_gpt2.load_hellaswag(path, setup.model.config.block_size)
    never_stop = SimpleNamespace(reason=None)
    actual = train_gpt2.evaluate_hellaswag(setup.model, data, 8, 0, 1, setup.device, nullcontext(), never_stop)
    # hellaswag.py computes the losses of the endings in another way, with a cache of the context
    num_correct = 0
    model = hellaswag.GPT.from_pretrained(setup.checkpoint, setup.device, torch.float32)
    for i, _, mean_losses in hellaswag.evaluate(model, examples, 8):
        num_correct += mean_losses.index(min(mean_losses)) == examples[i].label
    text = f"acc_norm {actual:.4f}, hellaswag.py {num_correct / num_examples:.4f}, {num_examples} examples"
    require(round(actual * num_examples) == num_correct, text)
    return text


# -------------------------------------------------------------------------------- training runs
def run_flags(setup, log_dir, *flags):
    """Return the flags of a short training run on the data of setup."""
    # 0.8M parameters, 4 micro-steps per step
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "total_batch_size": 1024}
    steps = 40
    if setup.tiny:
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "total_batch_size": 128}
        steps = 10
    values = {
        **shape,
        "preset": "shakespeare",
        "data_dir": setup.data_dir,
        "log_dir": log_dir,
        "device": setup.device.type,
        "dtype": "bfloat16",
        "optimizer": "adamw",
        "schedule": "cosine",
        "learning_rate": 1e-3,
        "micro_batch_size": shape["total_batch_size"] // shape["block_size"] // 4,
        "max_steps": steps,
        "warmup_steps": steps // 4,
        "checkpoint_interval": steps // 2,
        "eval_interval": steps,
        "val_tokens": 4096,
        "max_new_tokens": 4,
    }
    line = []
    for name, value in values.items():
        line += [f"--{name}", str(value)]
    return [*line, *flags]  # the last value of a flag counts


def train(setup, name, *flags):
    """Train in this process, unless the run of this name is there already. Returns its directory."""
    if name not in setup.runs:
        log_dir = f"{setup.directory}/run_{name}"
        output = f"{setup.directory}/run_{name}.txt"
        torch.compiler.reset()
        status = call_script(train_gpt2.run_rank, run_flags(setup, log_dir, *flags), output)
        with open(output, encoding="utf-8") as file:
            last_lines = file.read().splitlines()[-3:]
        require(status == 0, f"the run {name} ended with status {status}: {' / '.join(last_lines)}")
        setup.runs[name] = log_dir
    return setup.runs[name]


def read_losses(log_dir):
    """Return {(step, kind): loss} of a run, with the kinds train and val."""
    losses = {}
    with open(f"{log_dir}/log.txt", encoding="utf-8") as file:
        for line in file:
            step, kind, value = line.split()
            if kind in ("train", "val"):
                losses[int(step), kind] = float(value)
    return losses


def compare_runs(log_dir, reference, tolerance):
    """Compare the losses of two runs at all steps of both. Returns a description of the difference."""
    # a resumed run has fewer steps in common with the other one if it was stopped
    losses = read_losses(log_dir)
    expected = read_losses(reference)
    common = sorted(losses.keys() & expected.keys())
    require(common, "the two runs do not share a step")
    differences = [abs(losses[key] - expected[key]) for key in common]
    last = max(step for step, _ in common)
    text = f"largest difference {max(differences):.1e} in {len(common)} losses, val {losses[last, 'val']:.4f}"
    # written in this way, NaN is a failure as well
    require(max(differences) < tolerance and not any(map(math.isnan, differences)), text)
    return text


def run_eager(setup):
    """Compare a run without torch.compile with one that has it, or with itself where nothing is compiled."""
    whole = train(setup, "whole")
    return compare_runs(train(setup, "eager", "--no-compile"), whole, setup.tolerance)


def run_in_float32(setup):
    """Compare a run in float32 with one in bfloat16."""
    whole = train(setup, "whole")
    return compare_runs(train(setup, "float32", "--dtype", "float32"), whole, 0.02)


def run_in_float16(setup):
    """Compare the end of a run in float16 with bfloat16. It is behind: the scaler skips some of the first steps."""
    losses = read_losses(train(setup, "float16", "--dtype", "float16"))
    expected = read_losses(train(setup, "whole"))
    last = max(expected)
    text = f"val {losses[last]:.4f}, bfloat16 {expected[last]:.4f}"
    require(abs(losses[last] - expected[last]) < (1.0 if setup.tiny else 0.15), text)
    return text


def copy_half(setup, name, reference):
    """Copy a finished run without its last checkpoint, as if it had been stopped at half of its steps."""
    log_dir = f"{setup.directory}/run_{name}"
    shutil.rmtree(log_dir, ignore_errors=True)
    shutil.copytree(reference, log_dir)
    checkpoints = sorted(entry for entry in os.listdir(log_dir) if entry.startswith("step_"))
    shutil.rmtree(f"{log_dir}/{checkpoints[-1]}")


def run_resumed(setup):
    """Compare a run that was stopped at half of its steps and resumed with the uninterrupted one."""
    whole = train(setup, "whole")
    copy_half(setup, "resumed", whole)
    return compare_runs(train(setup, "resumed", "--resume"), whole, setup.tolerance)


def run_resumed_in_float16(setup):
    """Resume a bfloat16 run in float16, as on an older GPU."""
    whole = train(setup, "whole")
    copy_half(setup, "resumed_in_float16", whole)
    return compare_runs(train(setup, "resumed_in_float16", "--resume", "--dtype", "float16"), whole, 0.1)


def run_with_muon(setup):
    """Compare a run with Muon in bfloat16 with one in float32."""
    flags = ("--optimizer", "muon", "--schedule", "linear")
    reference = train(setup, "muon_float32", *flags, "--dtype", "float32")
    return compare_runs(train(setup, "muon", *flags), reference, 0.03)


# ------------------------------------------------------------------------------- several ranks
def free_port():
    """Return a port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_two_ranks(setup, runs):
    """Run the trainer on two ranks, which share one device over gloo. runs is {name: flags}."""
    path = f"{setup.directory}/two_ranks.json"
    lines = []
    for name, flags in runs.items():
        lines.append({"port": free_port(), "flags": run_flags(setup, f"{setup.directory}/run_{name}", *flags)})
    with open(path, "w", encoding="utf-8") as file:
        json.dump(lines, file)
    # start both ranks, as torchrun would
    processes = []
    for rank in range(2):
        variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        with open(f"{setup.directory}/rank_{rank}.txt", "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, f"{HERE}/gloo_rank.py", path],
                env={**os.environ, **variables, "MASTER_PORT": "0"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
    # wait for them; if one fails, the other one must not stay behind
    try:
        statuses = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, status in enumerate(statuses):
        with open(f"{setup.directory}/rank_{rank}.txt", encoding="utf-8") as file:
            last_lines = file.read().splitlines()[-3:]
        require(status == 0, f"rank {rank} ended with status {status}: {' / '.join(last_lines)}")


def two_ranks_on_one_gpu(setup):
    """Compare runs on two ranks with those on one rank, with AdamW and with Muon."""
    muon = ("--optimizer", "muon", "--schedule", "linear")
    start_two_ranks(setup, {"two_ranks_adamw": (), "two_ranks_muon": muon})
    adamw = compare_runs(f"{setup.directory}/run_two_ranks_adamw", train(setup, "whole"), setup.tolerance)
    muon = compare_runs(f"{setup.directory}/run_two_ranks_muon", train(setup, "muon", *muon), 2 * setup.tolerance)
    return f"AdamW: {adamw}; Muon: {muon}"


def check_collectives(setup):
    """Check every collective that the trainer uses, in a group of one rank."""
    size = torch.tensor(8, device=setup.device)
    dist.all_reduce(size, op=dist.ReduceOp.MIN)
    require(size.item() == 8, f"all_reduce changed 8 to {size.item()}")
    # Python objects are sent as bytes
    result = train_gpt2.on_rank_0(sorted, [2, 1])
    require(result == [1, 2], f"broadcast_object_list returned {result}")
    require(train_gpt2.any_rank("SIGTERM", setup.device, 2), "any_rank lost a request to stop")
    # Muon gathers the results of all ranks
    matrices = torch.randn(3, 4, 5, device=setup.device)
    gathered = [torch.empty_like(matrices)]
    dist.all_gather(gathered, matrices)
    require(torch.equal(gathered[0], matrices), "all_gather changed the matrices")


def nccl_with_one_rank(setup):
    """Compare training steps through DDP, in both ways of compiling it, with those of the bare model."""
    # a group of this process alone needs no network
    store = dist.PrefixStore("check", dist.HashStore())
    if setup.device.type == "cuda":
        torch.cuda.set_device(0)
    backend = "nccl" if setup.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    texts = []
    try:
        check_collectives(setup)
        expected = losses_of_steps(setup, lambda model: model, torch.bfloat16)
        # with one micro-step per step torch.compile is around DDP, otherwise DDP is around the compiled model
        for grad_accum_steps in (1, 2):

            def wrap(model, grad_accum_steps=grad_accum_steps):
                args = SimpleNamespace(micro_batch_size=setup.B, block_size=setup.T, compile=not setup.tiny)
                context = autocast(setup.device, torch.bfloat16)
                return train_gpt2.wrap_model(model, args, setup.device, context, 2, grad_accum_steps)[0]

            torch.compiler.reset()
            difference = largest_difference(losses_of_steps(setup, wrap, torch.bfloat16), expected)
            texts.append(f"{grad_accum_steps} micro-steps {difference:.1e}")
            require(difference < 0.02, f"largest difference of a loss: {texts[-1]}")
    finally:
        dist.destroy_process_group()
    return f"{backend}, collectives, largest difference of a loss: {', '.join(texts)}"


# -------------------------------------------------------------------------------------- waiting
def copies_do_not_wait(setup):
    """Measure how long to_device holds the host while the GPU is busy: not at all if the copies overlap."""
    if setup.device.type != "cuda":
        return "no GPU, nothing to measure"
    windows = torch.randint(50257, (64, 1025))
    matrix = torch.randn(8192, 8192, device=setup.device, dtype=torch.bfloat16)
    for _ in range(2):  # the second time counts: pinned memory has been allocated
        synchronize("cuda")
        for _ in range(40):
            matrix @ matrix
        # the GPU has work for about 60 ms; a copy that waits returns only then
        start = time.perf_counter()
        train_gpt2.to_device(windows, setup.device)
        held = time.perf_counter() - start
        synchronize("cuda")
        total = time.perf_counter() - start
    text = f"the copy held the host for {1000 * held:.2f} ms of {1000 * total:.0f} ms"
    require(held < 0.2 * total, text)
    return text


def milliseconds_of_lengths(setup, lengths, q_len):
    """Return the median milliseconds of 16-bit attention over these key lengths. q_len None: as many queries."""
    milliseconds = []
    for S in lengths:
        q = torch.randn(2, 12, q_len or S, 64, device=setup.device, dtype=torch.bfloat16)
        k = torch.randn(2, 12, S, 64, device=setup.device, dtype=torch.bfloat16)
        # only the attention is timed, not the random numbers
        synchronize("cuda")
        start = time.perf_counter()
        F.scaled_dot_product_attention(q, k, k, is_causal=q_len is None)
        synchronize("cuda")
        milliseconds.append(1000 * (time.perf_counter() - start))
    return sorted(milliseconds)[len(milliseconds) // 2]


def attention_at_new_lengths(setup):
    """Measure attention at lengths that come for the first time, and again. cuDNN makes a plan for each.

    sample.py, hellaswag.py and the trainer's evaluations use the other kernels, which must not be slower then.
    """
    if setup.device.type != "cuda":
        return "no GPU, nothing to measure"
    texts = []
    for name, context in (("default", nullcontext()), ("others", sdpa_kernel(train_gpt2.ANY_LENGTH_BACKENDS))):
        with context:
            # other lengths first, so that loading the kernels does not count
            milliseconds_of_lengths(setup, range(190, 193), None)
            milliseconds_of_lengths(setup, range(190, 193), 1)
            for kind, q_len in (("prompts", None), ("tokens", 1)):
                first = milliseconds_of_lengths(setup, range(201, 211), q_len)
                again = milliseconds_of_lengths(setup, range(201, 211), q_len)
                texts.append(f"{name}, {kind}: {first:.2f} ms, again {again:.2f} ms")
                require(name == "default" or first < 5, texts[-1])
    return "; ".join(texts)


# --------------------------------------------------------------------------------- command line
CHECKS = [
    environment,
    loss_in_float32,
    gradients_in_float32,
    loss_in_16_bits,
    gradients_in_16_bits,
    logits_of_sample,
    logits_of_hellaswag,
    greedy_text_in_float32,
    greedy_text_in_16_bits,
    hellaswag_in_training,
    compiled_as_eager,
    muon_as_on_the_cpu,
    copies_do_not_wait,
    attention_at_new_lengths,
    run_eager,
    run_in_float32,
    run_in_float16,
    run_resumed,
    run_resumed_in_float16,
    run_with_muon,
    two_ranks_on_one_gpu,
    nccl_with_one_rank,
]


def parse_args():
    parser = make_parser(__doc__, "token shards for the training runs (default: input.txt in bytes)")
    names = [function.__name__ for function in CHECKS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="CHECK", help=f"(default: all of {', '.join(names)})"
    )
    return parser.parse_args()


def run_check(function, setup):
    """Run a check and print its line. Returns whether it passed."""
    name = function.__name__
    start = time.perf_counter()
    torch.set_float32_matmul_precision("highest")  # a training run changes it
    try:
        text = function(setup)
        status = "ok  "
    except Exception as error:  # whatever it is, the other checks can still run
        text = " ".join(f"{type(error).__name__}: {error}".split())[:1000]
        status = "FAIL"
    print(f"{status} {name}: {text} ({time.perf_counter() - start:.1f} s)", flush=True)
    return status != "FAIL"


def main():
    args = parse_args()
    any_failed = False
    with tempfile.TemporaryDirectory() as directory:
        setup = Setup(args, directory)
        for function in CHECKS:
            if function.__name__ in args.only and not run_check(function, setup):
                any_failed = True
    sys.exit(any_failed)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    main()
