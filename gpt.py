"""
Lesson 2: a character-level GPT. The model is new. The training loop is that of bigram.py, with a
learning rate schedule and gradient clipping, and it keeps the best weights.

    python gpt.py                                   # "full" on a GPU, else "cpu" (2 minutes)
    python gpt.py --preset full --save model.pt     # 10.8M parameters, 2,000 steps
    python gpt.py --load model.pt --prompt "What "  # sample from a saved model without training

Reads input.txt, trains on its first 90%, and prints the loss on the training and the validation
part. Then it prints a sample of the model with the lowest validation loss. Writes that model to a
file if --save is given, and nothing otherwise. With the preset "cpu", the validation loss reaches
1.66 nats per character on input.txt, and 1.76 on Tiny Shakespeare. With the preset "full", it
reaches 1.46 on Tiny Shakespeare.

Sections: data, model, evaluation, optimizer, saving and loading, training loop, command line.
"""

import argparse
import math
import os
import shutil
import signal
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.nn as nn
import torch.nn.functional as F

WARMUP_STEPS = 100
PRESETS = {
    "full": {  # 10.8M parameters, for a GPU
        "block_size": 256,  # characters
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "dropout": 0.2,
        "batch_size": 64,  # sequences per step
        "max_steps": 2000,
        "learning_rate": 1e-3,
    },
    "cpu": {  # 0.8M parameters, two minutes on two CPU cores
        "block_size": 64,
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "dropout": 0.0,
        "batch_size": 16,
        "max_steps": 1600,
        "learning_rate": 3e-3,
    },
}


# ------------------------------------------------------------------------------------------ data
# --- copied block: load_data ---
def encode(text, chars):
    """Return the list of ids of a text. The id of a character is its index in the list chars."""
    char_to_id = {char: i for i, char in enumerate(chars)}
    return [char_to_id[char] for char in text]


def decode(ids, chars):
    """Return the text of a list of ids: the inverse of encode."""
    return "".join(chars[i] for i in ids)


def load_data(path, device):
    """Read a text file. Returns (chars, train_data, val_data): vocabulary and two id tensors."""
    text = read_text(path)
    # The vocabulary is the sorted list of all different characters, V of them. A model cannot
    # compute with characters, so each is replaced by its id, a number from 0 to V - 1.
    chars = sorted(set(text))
    data = torch.tensor(encode(text, chars), device=device)  # (N,)
    # The last 10% are for validation. The model never trains on them, so their loss shows
    # whether it has learned the language or only memorized the text.
    n = int(0.9 * len(data))
    train_data = data[:n]
    val_data = data[n:]
    return chars, train_data, val_data


# --- end of copied block: load_data ---


# ----------------------------------------------------------------------------------------- model
@dataclass
class GPTConfig:
    """The shape of a GPT."""

    vocab_size: int
    block_size: int  # longest sequence in characters
    n_layer: int
    n_head: int
    n_embd: int  # channels, a multiple of n_head
    dropout: float = 0.0  # fraction of activations and attention weights set to 0 in training
    activation: str = "relu"  # or "gelu"


def causal_attention(q, k, v):
    """Compute softmax(q k^T / sqrt(hs)) v with future positions masked out.

    This is the reference implementation. The model does not call it: it calls PyTorch's
    F.scaled_dot_product_attention(is_causal=True), which computes the same in one fused kernel and
    never stores the (T, T) scores. The tests check that both agree.

    q, k, v and the result have shape (B, nh, T, hs). Each position averages the values of itself
    and of earlier positions, weighted by how well its query matches their keys. See equation 1 of
    "Attention Is All You Need" (2017).
    """
    T, hs = q.shape[-2:]
    # scores[i, j] says how well the query of position i matches the key of position j
    scores = q @ k.transpose(-2, -1)  # (B, nh, T, hs) @ (B, nh, hs, T) -> (B, nh, T, T)
    scores = scores / math.sqrt(hs)
    # a position must not look at later ones: their scores become -inf, and their weights 0
    is_future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)  # True above diagonal
    scores = scores.masked_fill(is_future, float("-inf"))
    weights = F.softmax(scores, dim=-1)  # each row sums to 1
    return weights @ v  # (B, nh, T, T) @ (B, nh, T, hs) -> (B, nh, T, hs)


class CausalSelfAttention(nn.Module):
    """Run n_head attentions in parallel, each on its own n_embd / n_head channels."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.attn_dropout = config.dropout
        # One linear layer computes q, k and v of all heads. On two CPU cores, this makes a training
        # step 1.2x faster than with one small layer per head. Different from GPT-2: c_attn has no
        # bias, as in "Attention Is All You Need".
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        hs = C // self.n_head  # head size
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, 3C) -> three times (B, T, C)
        # each head gets its own hs channels
        q = q.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        k = k.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        v = v.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        # The same as causal_attention(q, k, v), in one fused kernel. In training, dropout also sets
        # random attention weights to 0; PyTorch has no fused kernel for that on CPUs.
        dropout_p = self.attn_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        # concatenate the results of the heads
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, nh, T, hs) -> (B, T, nh, hs) -> (B, T, C)
        return self.dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them, applied to each position separately."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        # Different from GPT-2: ReLU is the default, because it is the simplest. GPT-2 has an
        # approximation of GELU.
        self.activation = nn.GELU() if config.activation == "gelu" else nn.ReLU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        x = self.c_fc(x)  # (B, T, C) -> (B, T, 4C)
        x = self.activation(x)
        x = self.c_proj(x)  # (B, T, 4C) -> (B, T, C)
        return self.dropout(x)


class Block(nn.Module):
    """Attention, then an MLP.

    Attention moves information between positions, and the MLP processes it at each position. Both
    add their results to x (residual connections), so that gradients also flow past them unchanged.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        # The layer norms come before attention and MLP, as in GPT-2. They give both an input of
        # constant scale, although x grows from block to block.
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """Token and position embeddings, n_layer blocks, a final layer norm and an output head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # what each character is
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # where it is in the sequence
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # Different from GPT-2: the head has a bias and weights of its own. GPT-2's head has no bias
        # and shares its weights with wte, which saves 38.6M parameters in the 124M model. With 65
        # characters it would save 25 thousand of 10.8M parameters.
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        # Small random weights make all logits nearly equal, so the first loss is close to ln(V).
        # Different from GPT-2: the layers that end in a residual connection (c_proj) start like all
        # others. GPT-2 makes them smaller, which matters for deep models only.
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None):
        """Return (logits (B, T, V), loss) for ids idx (B, T).

        The loss is the mean cross-entropy in nats, or None if no targets (B, T) are given.
        """
        position = torch.arange(idx.shape[1], device=idx.device)  # (T,)
        x = self.wte(idx) + self.wpe(position)  # (B, T, C) + (T, C) -> (B, T, C)
        x = self.drop(x)
        for block in self.h:
            x = block(x)  # (B, T, C)
        x = self.ln_f(x)
        logits = self.lm_head(x)  # (B, T, C) -> (B, T, V)
        if targets is None:
            return logits, None
        # -log of the probability of each target, averaged over all B * T positions. cross_entropy
        # takes one row of logits per prediction.
        loss = F.cross_entropy(
            logits.flatten(0, 1),  # (B, T, V) -> (B * T, V)
            targets.flatten(),  # (B, T) -> (B * T,)
        )
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, generator, temperature=1.0, top_k=0, stop=None):
        """Append up to max_new_tokens sampled characters to idx (1, T).

        A temperature below 1 makes likely characters more likely, and 0 always takes the most
        likely one. With top_k above 0, only the top_k most likely characters can be sampled.
        Sampling ends early when the new characters end with the ids in the list stop.
        """
        self.eval()  # switches dropout off
        T = idx.shape[1]
        for _ in range(max_new_tokens):
            # the model can see the last block_size characters
            logits, _ = self(idx[:, -self.config.block_size :])  # (1, T) -> (1, T, V)
            logits = logits[:, -1]  # (1, V), the scores of the next character
            # keep the k most likely characters: the others get logits of -inf, and probability 0
            if top_k > 0:
                top_logits, _ = logits.topk(min(top_k, logits.shape[-1]))  # (1, k), largest first
                logits = logits.masked_fill(logits < top_logits[:, -1:], float("-inf"))
            # choose the next character
            if temperature < 1e-6:  # 0, or so close to 0 that sampling would not differ from argmax
                next_idx = logits.argmax(dim=-1, keepdim=True)  # (1, 1)
            else:
                probs = F.softmax(logits / temperature, dim=-1)  # (1, V)
                next_idx = torch.multinomial(probs, 1, generator=generator)  # (1, 1)
            idx = torch.cat((idx, next_idx), dim=1)  # (1, T + 1)
            # end early if the last new characters are those of stop
            if stop and idx[0, T:][-len(stop) :].tolist() == stop:
                break
        return idx


# ------------------------------------------------------------------------------------ evaluation
# --- copied block: batches ---
def get_batch(data, batch_size, block_size, generator):
    """Cut random windows out of data (N,). Returns inputs x (B, T) and targets y (B, T).

    The target of each position is the next character: y is x, shifted by one.
    """
    # Each row of the batch is a window of block_size characters that starts anywhere in the data.
    # The last possible start leaves room for block_size inputs and one more target.
    start = torch.randint(len(data) - block_size, (batch_size, 1), generator=generator)  # (B, 1)
    position = start + torch.arange(block_size)  # (B, 1) + (T,) -> (B, T)
    position = position.to(data.device)
    x = data[position]  # (B, T)
    y = data[position + 1]  # (B, T)
    return x, y


@torch.no_grad()
def estimate_loss(model, data, eval_iters, batch_size, block_size):
    """Return the mean loss in nats per character over eval_iters random batches of data (N,)."""
    model.eval()  # switches dropout off, in models that have it
    # A separate generator with a fixed seed: every call uses the same batches, and the random
    # numbers of training are not affected.
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(eval_iters):
        x, y = get_batch(data, batch_size, block_size, generator)
        logits, loss = model(x, y)
        losses.append(loss)
    model.train()
    return torch.stack(losses).mean().item()


# --- end of copied block: batches ---


# ------------------------------------------------------------------------------------- optimizer
# --- copied block: get_lr ---
def get_lr(step, learning_rate, warmup_steps, max_steps):
    """Return the learning rate of a step: linear warmup, then cosine decay to 10% of the peak."""
    min_lr = 0.1 * learning_rate
    # 1) linear warmup; step 0 already has a learning rate above 0
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    # 2) after the last step
    if step >= max_steps:
        return min_lr
    # 3) in between: the factor falls from 1 to 0 along half a cosine
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr + factor * (learning_rate - min_lr)


# --- end of copied block: get_lr ---


# ---------------------------------------------------------------------------- saving and loading
def check_save_path(path):
    """Exit with an error if path cannot be written.

    Call this before training, so that no training is lost.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        fail(f"--save {path} is not a regular file: use another file name")
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb"):
            pass
        os.remove(temporary)
    except OSError as error:
        reason = error.strerror
        fail(f"--save {path} cannot be written ({reason}): use a file in a writable directory")


def save_model(path, model, chars):
    """Write a model and its vocabulary to path atomically. Raises OSError if that fails."""
    contents = {"model": model.state_dict(), "config": asdict(model.config), "chars": chars}
    # The file is written under another name, and renamed when it is complete.
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        torch.save(contents, temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save's error if the disk is full
        raise OSError(str(error)) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load_model(path, device):
    """Load what save_model wrote. Returns (model, chars). Exits with an error if that fails."""
    if os.path.exists(path) and not os.path.isfile(path):
        fail(f"--load {path} is not a regular file: use a file created with --save")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        config = GPTConfig(**saved["config"])
        model = GPT(config).to(device)
        model.load_state_dict(saved["model"])
        chars = saved["chars"]
        if len(chars) != config.vocab_size:
            raise ValueError("the number of characters differs from vocab_size")
    except Exception as error:  # damaged files raise many types of errors
        reason = type(error).__name__
        fail(f"cannot load a model from --load {path} ({reason}): create one with --save")
    return model, chars


# --------------------------------------------------------------------------------- training loop
def print_or_continue(line, args):
    """Print a line. With --save, a failed print does not end the run: the model would be lost.

    Printing fails if the disk is full, or if the program that reads the output has ended, as in
    "| head".
    """
    try:
        print(line)
    except OSError:
        if not args.save:
            raise


def train(model, train_data, val_data, args):
    """Train the model, and leave it with the weights that had the lowest validation loss.

    Prints the loss on both parts of the data and the time left every eval_interval steps.
    """
    batch_size = args.batch_size
    block_size = args.block_size
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(0.9, 0.99),  # for momentum and squared gradients; AdamW's default is (0.9, 0.999)
        fused=True,  # updates all weights in one kernel
    )
    generator = torch.Generator().manual_seed(args.seed)  # for get_batch
    best_loss = math.inf
    best_weights = None
    start_time = time.monotonic()
    for step in range(args.max_steps + 1):
        last_step = step == args.max_steps

        # estimate the loss every eval_interval steps, and at the end
        if step % args.eval_interval == 0 or last_step:
            train_loss = estimate_loss(model, train_data, args.eval_iters, batch_size, block_size)
            val_loss = estimate_loss(model, val_data, args.eval_iters, batch_size, block_size)
            line = f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
            if step > 0:
                seconds_per_step = (time.monotonic() - start_time) / step
                seconds_left = seconds_per_step * (args.max_steps - step)
                line += f", eta {timedelta(seconds=round(seconds_left))}"
            print_or_continue(line, args)
            # remember the best weights: a model that trains for too long memorizes its text, and
            # its validation loss increases again
            if val_loss < best_loss:
                best_loss = val_loss
                best_weights = deepcopy(model.state_dict())
        if last_step:
            break

        # predict the next characters of a batch, and measure how wrong the predictions are
        x, y = get_batch(train_data, batch_size, block_size, generator)
        logits, loss = model(x, y)

        # compute the gradients of the loss, and limit them, so that one unusual batch cannot make a
        # huge step
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        # move the weights against the gradients, as far as the learning rate of this step says
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, args.learning_rate, WARMUP_STEPS, args.max_steps)
        optimizer.step()

    # continue with the best weights
    if best_weights is None:
        print_or_continue("every val loss was NaN: the weights are those of the last step", args)
    else:
        model.load_state_dict(best_weights)
        print_or_continue(f"best val loss {best_loss:.4f}", args)


# ---------------------------------------------------------------------------------- command line
# --- copied block: fail ---
def fail(message):
    """Report a user error in one line on stderr and exit with status 2."""
    one_line = " ".join(str(message).split())  # some messages have several lines
    print(f"error: {one_line}", file=sys.stderr)
    sys.exit(2)


# --- end of copied block: fail ---


# --- copied block: read_text ---
def read_text(path):
    """Return the text of a UTF-8 file with its line endings unchanged.

    Exits with an error if the file cannot be read, is empty or is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # utf-8-sig drops a byte order mark
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path!r} as UTF-8 text ({error}): pass another file with --input")
    if not text:
        fail(f"{path!r} is empty: pass another file with --input")
    return text


# --- end of copied block: read_text ---


# --- copied block: pick_device ---
def pick_device(name):
    """Return the torch.device with this name.

    "auto" is the accelerator if there is one, otherwise the CPU. Exits with an error if the device
    is not available.
    """
    if name == "auto":
        device = torch.accelerator.current_accelerator(check_available=True)
        if device is None and shutil.which("nvidia-smi"):  # the NVIDIA driver is installed
            print(
                "warning: PyTorch cannot use this machine's NVIDIA GPU, so the CPU is used. "
                "The README says which driver PyTorch needs.",
                file=sys.stderr,
            )
        return device or torch.device("cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # fails on the device "meta", which has no memory
        return probe.device
    except (AssertionError, ImportError, NotImplementedError, RuntimeError):
        # unknown names, missing drivers and missing back ends raise different errors
        fail(f"--device {name} is not available here: omit it, or use --device cpu")


# --- end of copied block: pick_device ---


# --- copied block: run_script ---
def run_script(main):
    """Call main() with output that suits terminals, pipes and files.

    Each line appears at once, and "?" replaces characters that the terminal cannot encode. If the
    program that reads the output has ended, as in "| head", the script ends silently. Any other
    OSError, for example a full disk, is reported in one line.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the script without a traceback
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, as in ">&-"
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (stays open)
        elif hasattr(stream, "reconfigure"):  # Jupyter's streams have no such method
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(0)  # a normal exit would write to the closed pipe again
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        os._exit(1)  # a normal exit would try to flush stdout again


# --- end of copied block: run_script ---


def parse_args():
    """Parse the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(f"{message}: see --help")  # argparse's own errors in one line

    group = parser.add_argument_group("data and device")
    group.add_argument("--input", default="input.txt", help="UTF-8 text to learn from (default: input.txt)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    group.add_argument("--seed", type=int, default=1337, help="random seed (default: 1337)")
    group.add_argument("--save", metavar="FILE", help="write the best model to FILE (default: do not write it)")
    group.add_argument("--load", metavar="FILE", help="sample from the model in FILE without training")

    group = parser.add_argument_group("model")
    group.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="set of defaults (default: full on a GPU, else cpu)",
    )
    group.add_argument("--block_size", type=int, help="sequence length in characters (default: from --preset)")
    group.add_argument("--n_layer", type=int, help="number of blocks (default: from --preset)")
    group.add_argument("--n_head", type=int, help="attention heads per block (default: from --preset)")
    group.add_argument("--n_embd", type=int, help="channels, a multiple of n_head (default: from --preset)")
    group.add_argument(
        "--dropout",
        type=float,
        help="fraction of activations and attention weights set to 0 in training (default: from --preset)",
    )
    group.add_argument(
        "--activation",
        choices=["relu", "gelu"],
        default="relu",
        help="nonlinearity of the MLP (default: relu; GPT-2 has an approximation of gelu)",
    )

    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=int, help="sequences per step (default: from --preset)")
    group.add_argument("--max_steps", type=int, help="training steps (default: from --preset)")
    group.add_argument("--learning_rate", type=float, help="peak learning rate (default: from --preset)")
    group.add_argument(
        "--eval_interval",
        type=int,
        default=250,
        help="steps between loss estimates (default: 250)",
    )
    group.add_argument("--eval_iters", type=int, default=40, help="batches per loss estimate (default: 40)")

    group = parser.add_argument_group("sampling")
    group.add_argument("--prompt", default="", help="text to continue (default: the vocabulary's first character)")
    group.add_argument("--max_new_tokens", type=int, default=500, help="characters to sample (default: 500)")
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="randomness; 0 always takes the most likely character (default: 1.0)",
    )
    group.add_argument(
        "--top_k",
        type=int,
        default=0,
        help="sample from the k most likely characters only (default: 0, all)",
    )
    group.add_argument("--stop", default="", help="text that ends the sample early (default: none)")
    return parser.parse_args()


def resolve_args(args, device):
    """Set the flags that were not given to the preset's values. Exits if a value is invalid."""
    if args.preset is None:
        args.preset = "cpu" if device.type == "cpu" else "full"
    for name, default in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, default)

    # check the ranges; "not 0 <= nan" is true, so nan is also refused
    for name in ("dropout", "temperature", "top_k"):
        value = getattr(args, name)
        if not 0 <= value < 2**31:
            fail(f"--{name} is {value}: it must be 0 or more, and below 2^31")
    for name in (
        "block_size",
        "n_layer",
        "n_head",
        "n_embd",
        "batch_size",
        "max_steps",
        "learning_rate",
        "eval_interval",
        "eval_iters",
        "max_new_tokens",
    ):
        value = getattr(args, name)
        if not 0 < value < 2**31:
            fail(f"--{name} is {value}: it must be above 0 and below 2^31")
    if not -(2**63) <= args.seed < 2**63:
        fail(f"--seed is {args.seed}: it must fit in 64 bits")
    if args.dropout >= 1:
        fail(f"--dropout is {args.dropout}: it must be below 1")
    if args.n_embd % args.n_head:
        n_head = args.n_head
        reason = f"--n_embd {args.n_embd} is not divisible by --n_head {n_head}"
        fail(f"{reason}: choose a multiple of {n_head}")

    # find out now, not after training, if the model cannot be saved
    if args.save:
        check_save_path(args.save)


def check_characters(text, chars, flag):
    """Exit with an error if a text has a character that is not in the vocabulary."""
    unknown = sorted(set(text) - set(chars))
    if unknown:
        fail(
            f"{flag} contains {''.join(unknown)!r}, which the model has never seen: "
            f"use only characters of {''.join(chars)!r}"
        )


def train_new_model(args, device):
    """Create a model for the text in args.input, and train it. Returns (model, chars)."""
    # read the data, and refuse what cannot be trained on
    chars, train_data, val_data = load_data(args.input, device)
    if len(val_data) <= args.block_size:
        fail(
            f"--block_size {args.block_size} needs more than the {len(val_data)} characters that "
            f"{args.input!r} has for validation: use a smaller --block_size or a longer text"
        )
    # before training, which takes minutes
    check_characters(args.prompt, chars, "--prompt")
    check_characters(args.stop, chars, "--stop")

    # train the model
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # allows TF32, which is faster, on GPUs that have it
    config = GPTConfig(
        vocab_size=len(chars),
        block_size=args.block_size,
        n_layer=args.n_layer,
        n_head=args.n_head,
        n_embd=args.n_embd,
        dropout=args.dropout,
        activation=args.activation,
    )
    try:
        model = GPT(config).to(device)
        num_params = sum(p.numel() for p in model.parameters())
        print_or_continue(f"{num_params:,} parameters, {len(chars)} characters", args)
        train(model, train_data, val_data, args)
    except RuntimeError as error:
        # On a CPU, PyTorch reports a failed allocation as a plain RuntimeError, not as an
        # OutOfMemoryError, so only the message tells.
        if "memory" not in str(error):
            raise
        fail(f"not enough memory on {device}: use a smaller --batch_size, --block_size or --n_embd")
    return model, chars


def main():
    args = parse_args()
    device = pick_device(args.device)
    resolve_args(args, device)

    # train a model, or load one
    if args.load:
        print_or_continue(f"{device}: model {args.load}", args)
        model, chars = load_model(args.load, device)
        check_characters(args.prompt, chars, "--prompt")
        check_characters(args.stop, chars, "--stop")
    else:
        print_or_continue(f"{device}: preset {args.preset}", args)
        model, chars = train_new_model(args, device)

    # save it
    save_error = None
    if args.save:
        try:
            save_model(args.save, model, chars)
        except OSError as error:
            save_error = error  # reported after the sample, so that not all of the training is lost

    # sample a text that begins with the prompt, by default the first character of the vocabulary
    prompt = encode(args.prompt or chars[0], chars)
    stop = encode(args.stop, chars)
    idx = torch.tensor([prompt], device=device)  # (1, T)
    generator = torch.Generator(device).manual_seed(args.seed)
    idx = model.generate(idx, args.max_new_tokens, generator, args.temperature, args.top_k, stop)
    try:
        print(decode(idx[0].tolist(), chars))
    finally:  # a failed save is an error even if nobody reads the sample
        if save_error is not None:
            fail(f"cannot write --save {args.save} ({save_error}): make room for the file")


if __name__ == "__main__":
    run_script(main)
