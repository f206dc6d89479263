"""
Lesson 2: a Transformer writes text one character at a time. The loop is bigram.py's, the model is new.

    python gpt.py                                   # "full" on an accelerator, "cpu" (2 minutes) otherwise
    python gpt.py --preset full --save model.pt     # 10.8M parameters, 5,000 steps, the best model kept
    python gpt.py --load model.pt --prompt "What "  # a sample from it, without training

Trains on the first 90 % of input.txt (or --input FILE), prints the loss on both parts, then a sample of
the model with the lowest validation loss: 1.76 nats a character on Tiny Shakespeare with "cpu".
"""

import argparse
import math
import os
import signal
import sys
from copy import deepcopy

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from tqdm import tqdm
except ImportError:  # the evaluation lines are the progress then
    tqdm = None

WARMUP_STEPS = 100
PRESETS = {
    "full": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2)
    | dict(batch_size=64, max_steps=5000, learning_rate=1e-3),
    "cpu": dict(n_layer=4, n_head=4, n_embd=128, block_size=64, dropout=0.0)
    | dict(batch_size=16, max_steps=1600, learning_rate=3e-3),
}


# ---------------------------------------------------------------------------------------- model
def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(hs)) v without the future, "Attention Is All You Need" (2017), equation 1.

    q, k, v and the result: (B, nh, T, hs). Each position averages the values up to its own, weighted by how
    well its query fits their keys. F.scaled_dot_product_attention(is_causal=True) computes the same, but
    never stores the (T, T) scores: that is why the model calls it instead.
    """
    T, hs = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(hs)  # (B, nh, T, hs) @ (B, nh, hs, T) -> (B, nh, T, T)
    is_future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)  # True above the diagonal
    weights = F.softmax(scores.masked_fill(is_future, float("-inf")), dim=-1)  # each row sums to 1
    return weights @ v  # (B, nh, T, T) @ (B, nh, T, hs) -> (B, nh, T, hs)


class MultiHeadAttention(nn.Module):
    """n_head attentions side by side, each on its own n_embd / n_head channels."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # q, k, v of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)  # of the result alone: a CPU's fused kernel cannot drop weights

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, 3C) -> 3 x (B, T, C)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # causal_attention(q, k, v), fused
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, nh, T, hs) -> (B, T, nh * hs): heads side by side
        return self.dropout(self.c_proj(y))


class FeedForward(nn.Module):
    """Two linear layers and a nonlinearity, on every position by itself."""

    def __init__(self, config):
        super().__init__()
        d_ff = config.d_ff or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, d_ff)
        self.activation = {"relu": nn.ReLU(), "gelu": nn.GELU()}[config.activation]
        self.c_proj = nn.Linear(d_ff, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C) -> (B, T, d_ff) -> (B, T, C)
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    """Communication, then computation; each adds to x (a residual connection), so gradients flow past it unchanged."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = MultiHeadAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = FeedForward(config)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token and position embeddings (wte, wpe), n_layer blocks (h), a final norm, a linear head; names as in GPT-2."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.Sequential(*(Block(config) for _ in range(config.n_layer)))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)  # small logits: the first loss is ln(V)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) for ids idx (B, T), and the mean loss in nats if targets (B, T) are given."""
        position = torch.arange(idx.shape[1], device=idx.device)  # (T,)
        x = self.drop(self.wte(idx) + self.wpe(position))  # (B, T, C) + (T, C) -> (B, T, C)
        logits = self.lm_head(self.ln_f(self.h(x)))  # (B, T, C) -> (B, T, V)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, generator, temperature=1.0, top_k=0, stop=None):
        """Extend idx (1, T) by n <= max_new_tokens characters to (1, T + n), fewer once the new ones end with stop."""
        self.eval()
        T = idx.shape[1]
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1]  # (1, V)
            if top_k:  # the k likeliest characters stay possible
                top_logits, _ = logits.topk(min(top_k, logits.shape[-1]))  # (1, k), largest first
                logits = logits.masked_fill(logits < top_logits[:, -1:], float("-inf"))
            if temperature:  # below 1 the likely become likelier still
                probs = F.softmax(logits / temperature, dim=-1)  # (1, V)
                next_idx = torch.multinomial(probs, 1, generator=generator)  # (1, 1)
            else:
                next_idx = logits.argmax(dim=-1, keepdim=True)  # (1, 1)
            idx = torch.cat((idx, next_idx), dim=1)  # (1, T + 1)
            if stop and idx[0, T:][-len(stop) :].tolist() == stop:
                break
        return idx


# -------------------------------------------------------------------------- data and evaluation
# --- copied block: batches ---
def get_batch(data, batch_size, block_size, generator):
    """Random windows of data (N,): inputs x (B, T), and targets y (B, T), one character later."""
    start = torch.randint(len(data) - block_size, (batch_size, 1), generator=generator)  # (B, 1)
    position = (start + torch.arange(block_size)).to(data.device)  # (B, T)
    return data[position], data[position + 1]


@torch.no_grad()
def estimate_loss(model, data, eval_iters, batch_size, block_size):
    """Mean loss in nats over eval_iters batches of data (N,), the same batches at every call."""
    model.eval()  # no dropout, in models that have it
    generator = torch.Generator().manual_seed(0)  # its own: evaluating never changes training
    batches = (get_batch(data, batch_size, block_size, generator) for _ in range(eval_iters))
    losses = torch.stack([model(x, y)[1] for x, y in batches])
    model.train()
    return losses.mean().item()


# --- end of copied block: batches ---
# --- copied block: get_lr ---
def get_lr(step, learning_rate, warmup_steps, max_steps):
    """The learning rate of a step: a linear warmup, then half a cosine down to a tenth at max_steps."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))  # 0 to 1
    return learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))  # the factor goes 1 to 0.1


# --- end of copied block: get_lr ---
# --------------------------------------------------------------------------------- command line
# --- copied block: text ---
def fail(message):
    """Report a user's mistake in one line on stderr and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_text(path):
    """The text of a UTF-8 file, its line ends as they are; exits if there is none."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read() or fail(f"{path!r} is empty: name another text with --input")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path!r} as UTF-8 text ({error}): name another with --input")


# --- end of copied block: text ---
# --- copied block: pick_device ---
def pick_device(name):
    """The torch.device called name; "auto" is the accelerator if there is one, else the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.zeros(1, device=name).device
    except (AssertionError, ImportError, NotImplementedError, RuntimeError):
        fail(f"--device {name} is not available here: leave it out, or use --device cpu")


# --- end of copied block: pick_device ---
def encode(text, chars, flag):
    """The ids of text's characters; exits at one that is not in chars."""
    unknown = "".join(sorted(set(text) - set(chars)))
    if unknown:
        fail(f"{flag} has {unknown!r}, which the model has never seen: use only {''.join(chars)!r}")
    return [chars.index(char) for char in text]


def load_model(path, device):
    """The (model, chars) that --save wrote to path."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        model = GPT(argparse.Namespace(**saved["config"])).to(device)
        model.load_state_dict(saved["model"])
        return model, saved["chars"]
    except Exception as error:  # files of another kind fail in many ways
        fail(f"cannot take a model from --load {path} ({type(error).__name__}): make one with --save")


def train(args):
    """Train on args.input; returns the model of the lowest validation loss and its alphabet."""
    text = read_text(args.input)
    chars = sorted(set(text))  # the vocabulary: a character's id is its place in it
    encode(args.prompt, chars, "--prompt"), encode(args.stop, chars, "--stop")  # fail now, not after training
    stoi = {char: i for i, char in enumerate(chars)}
    data = torch.tensor([stoi[char] for char in text], device=args.device)  # (N,)
    train_data, val_data = data.tensor_split([int(0.9 * len(data))])
    if len(val_data) <= args.block_size:
        fail(f"--block_size {args.block_size} is too long for the {len(val_data)} characters kept for validation")

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    args.vocab_size = len(chars)
    model = GPT(args).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), fused=True)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(chars)} characters")
    generator = torch.Generator().manual_seed(args.seed)
    best_loss, best_state = math.inf, None
    steps = range(args.max_steps + 1)
    steps, write = (tqdm(steps, disable=None), tqdm.write) if tqdm else (steps, print)
    for step in steps:
        if step % args.eval_interval == 0 or step == args.max_steps:
            sizes = args.eval_iters, args.batch_size, args.block_size
            train_loss, val_loss = (estimate_loss(model, part, *sizes) for part in (train_data, val_data))
            write(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
            if val_loss < best_loss:
                best_loss, best_state = val_loss, deepcopy(model.state_dict())
        if step == args.max_steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, args.learning_rate, WARMUP_STEPS, args.max_steps)
        _, loss = model(*get_batch(train_data, args.batch_size, args.block_size, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # one bad batch cannot throw the model far
        optimizer.step()
    model.load_state_dict(best_state)
    print(f"best val loss {best_loss:.4f}; that model's sample:")
    return model, chars


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see --help")  # argparse's own errors in one line, too
    add = parser.add_argument_group("data and device").add_argument
    add("--input", default="input.txt", help="UTF-8 text to learn from (input.txt)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (auto)")
    add("--seed", type=int, default=1337, help="of all random numbers (1337)")
    add("--save", metavar="FILE", help="keep the best model in FILE")
    add("--load", metavar="FILE", help="sample from the model in FILE, without training")
    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=["full", "cpu"], help="flags as in PRESETS (full on an accelerator, else cpu)")
    add("--block_size", type=int, help="characters a sequence (preset)")
    add("--n_layer", type=int, help="blocks (preset)")
    add("--n_head", type=int, help="attention heads a block (preset)")
    add("--n_embd", type=int, help="channels, a multiple of n_head (preset)")
    add("--d_ff", type=int, default=0, help="hidden channels of FeedForward (0: 4 * n_embd)")
    add("--activation", choices=["relu", "gelu"], default="relu", help="of FeedForward (relu)")
    add("--dropout", type=float, help="share of activations zeroed in training (preset)")
    add = parser.add_argument_group("training").add_argument
    add("--batch_size", type=int, help="sequences a step (preset)")
    add("--max_steps", type=int, help="training steps (preset)")
    add("--learning_rate", type=float, help="highest rate of AdamW (preset)")
    add("--eval_interval", type=int, default=250, help="steps between loss estimates (250)")
    add("--eval_iters", type=int, default=40, help="batches a loss estimate (40)")
    add = parser.add_argument_group("sampling").add_argument
    add("--prompt", default="", help="text to continue (the first character of the alphabet, a line end)")
    add("--max_new_tokens", type=int, default=500, help="characters to sample (500)")
    add("--temperature", type=float, default=1.0, help="below 1 safer, above 1 wilder, 0 the likeliest (1.0)")
    add("--top_k", type=int, default=0, help="choose among the k likeliest characters (0: all)")
    add("--stop", default="", help="text that ends the sample")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    preset = args.preset or ("cpu" if args.device.type == "cpu" else "full")
    given = {name: value for name, value in vars(args).items() if value is not None}
    args = argparse.Namespace(**vars(args) | PRESETS[preset] | given)
    for name, value in vars(args).items():
        zero_is_fine = name in ("seed", "d_ff", "dropout", "temperature", "top_k")
        if type(value) in (int, float) and not (value > 0 or value == 0 and zero_is_fine):
            fail(f"--{name} is {value}: it must be {'0 or more' if zero_is_fine else 'above 0'}")
    if args.dropout >= 1:
        fail(f"--dropout is {args.dropout}: it must be below 1")
    if args.save and (os.path.isdir(args.save) or not os.access(os.path.dirname(args.save) or ".", os.W_OK)):
        fail(f"--save {args.save} cannot be written: name a file in a folder that exists")
    if args.n_embd % args.n_head:
        fail(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}: change either")

    print(f"{args.device}: " + (f"model {args.load}" if args.load else f"preset {preset}"), flush=True)
    model, chars = load_model(args.load, args.device) if args.load else train(args)
    if args.save:
        config = {name: value for name, value in vars(model.config).items() if name != "device"}
        try:
            torch.save({"model": model.state_dict(), "config": config, "chars": chars}, f"{args.save}.tmp")
            os.replace(f"{args.save}.tmp", args.save)  # whole or not at all
        except (OSError, RuntimeError) as error:
            print(f"error: cannot write --save {args.save} ({type(error).__name__})", file=sys.stderr)
    prompt, stop = encode(args.prompt or chars[0], chars, "--prompt"), encode(args.stop, chars, "--stop")
    idx = torch.tensor([prompt], device=args.device)  # (1, T)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    idx = model.generate(idx, args.max_new_tokens, generator, args.temperature, args.top_k, stop)
    print("".join(chars[i] for i in idx[0].tolist()))


if __name__ == "__main__":
    main()
