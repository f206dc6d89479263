"""
Lesson 2: a character-level GPT. The model is new. The training loop is that of bigram.py, with a
learning rate schedule and gradient clipping, and it keeps the best weights.

    python gpt.py                                   # "full" on a GPU, else "cpu" (1 to 2 minutes)
    python gpt.py --preset full --save model.pt     # 10.8M parameters, 2,000 steps
    python gpt.py --load model.pt --prompt "What "  # sample from a saved model without training

Trains on the first 90% of the text, prints the loss on both parts, and then a sample of the model
with the lowest validation loss. With the preset "cpu", this loss is 1.66 nats per character on
input.txt, and 1.76 on Tiny Shakespeare. With the preset "full", it is 1.46 on Tiny Shakespeare.
"""

import argparse
import math
import os
import sys
from copy import deepcopy
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

WARMUP_STEPS = 100
# values with --preset full (10.8M parameters) and --preset cpu (0.8M), and the help text
PRESET_FLAGS = {
    "block_size": (256, 64, "characters per sequence"),
    "n_layer": (6, 4, "number of blocks"),
    "n_head": (6, 4, "attention heads per block"),
    "n_embd": (384, 128, "channels, a multiple of n_head"),
    "dropout": (0.2, 0.0, "fraction of activations set to 0 in training"),
    "batch_size": (64, 16, "sequences per step"),
    "max_steps": (2000, 1600, "training steps"),
    "learning_rate": (1e-3, 3e-3, "peak learning rate"),
}


# ------------------------------------------------------------------------------------------ data
# --- copied block: data ---
def encode(text, chars):
    """Return the list of ids of a text. The id of a character is its index in the list chars."""
    char_to_id = {char: i for i, char in enumerate(chars)}
    return [char_to_id[char] for char in text]


def decode(ids, chars):
    """Return the text of a list of ids: the inverse of encode."""
    return "".join(chars[i] for i in ids)


def load_data(path):
    """Read a UTF-8 text. Returns (chars, train_data, val_data): vocabulary and two id tensors."""
    with open(path, encoding="utf-8-sig") as file:  # drops a byte order mark
        text = file.read()
    # The vocabulary is the sorted list of all V different characters. A model computes with
    # numbers, so each character is replaced by its id from 0 to V - 1.
    chars = sorted(set(text))
    data = torch.tensor(encode(text, chars))  # (N,)
    # The last 10% are for validation. The model never trains on them, so their loss shows
    # whether it has learned the language or only memorized the text.
    n = int(0.9 * len(data))
    return chars, data[:n], data[n:]


def get_batch(data, batch_size, block_size, generator):
    """Cut random windows out of data (N,). Returns x and y (B, T): y is x, shifted by one."""
    # the last possible start leaves room for block_size inputs and one more target
    start = torch.randint(len(data) - block_size, (batch_size, 1), generator=generator)  # (B, 1)
    position = start + torch.arange(block_size)  # (B, 1) + (T,) -> (B, T)
    return data[position], data[position + 1]


# --- end of copied block: data ---
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


class CausalSelfAttention(nn.Module):
    """Run n_head attentions in parallel, each on its own hs = n_embd / n_head channels.

    Each position averages the values v of itself and of earlier positions, weighted by how well its
    query q matches their keys k: softmax(q k^T / sqrt(hs)) v. See equation 1 of "Attention Is All
    You Need" (2017).
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # One linear layer computes q, k and v of all heads. Different from GPT-2: it has no bias.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        hs = C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, 3C) -> three times (B, T, C)
        # each head gets its own hs channels
        q = q.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        k = k.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        v = v.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        # softmax(q k^T / sqrt(hs)) v with future positions masked out, in one fused kernel, which
        # never stores the (T, T) weights. Lesson 2 of docs/lessons computes it step by step.
        dropout_p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        # concatenate the results of the heads
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, nh, T, hs) -> (B, T, nh, hs) -> (B, T, C)
        return self.dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them, applied to each position separately."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        # Different from GPT-2, which approximates GELU: the default is ReLU, the simplest one.
        self.activation = nn.GELU() if config.activation == "gelu" else nn.ReLU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        x = self.activation(self.c_fc(x))  # (B, T, C) -> (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """Attention moves information between positions, then an MLP processes it at each position.

    Both add their results to x (residual connections), so that gradients also flow past them
    unchanged.
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
        # Different from GPT-2, whose head has no bias and shares its weights with wte: this saves
        # 38.6M parameters in the 124M model, and few with the small vocabulary of characters.
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
        """Return (logits (B, T, V), loss) for ids idx (B, T). Without targets, the loss is None."""
        position = torch.arange(idx.shape[1], device=idx.device)  # (T,)
        x = self.wte(idx) + self.wpe(position)  # (B, T, C) + (T, C) -> (B, T, C)
        x = self.drop(x)
        for block in self.h:
            x = block(x)  # (B, T, C)
        logits = self.lm_head(self.ln_f(x))  # (B, T, C) -> (B, T, V)
        if targets is None:
            return logits, None
        # cross-entropy: -ln of the probability of each target, averaged over all B * T positions
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
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
            # only the last block_size characters matter
            logits, _ = self(idx[:, -self.config.block_size :])  # (1, T) -> (1, T, V)
            logits = logits[:, -1].float()  # (1, V); on some GPUs they are bfloat16
            # keep the k most likely characters: the others get logits of -inf, and probability 0
            if top_k > 0:
                top_logits, _ = logits.topk(min(top_k, logits.shape[-1]))  # (1, k), largest first
                logits = logits.masked_fill(logits < top_logits[:, -1:], float("-inf"))
            # choose the next character
            if temperature == 0:
                next_idx = logits.argmax(dim=-1, keepdim=True)  # (1, 1)
            else:
                probs = F.softmax(logits / temperature, dim=-1)  # (1, V)
                next_idx = torch.multinomial(probs, 1, generator=generator)  # (1, 1)
            idx = torch.cat((idx, next_idx), dim=1)  # (1, T + 1)
            # end early if the last new characters are those of stop
            if stop and idx[0, T:][-len(stop) :].tolist() == stop:
                break
        return idx


def save_model(path, model, chars):
    """Write a model and its vocabulary to a file, which gets its name when it is complete."""
    contents = {"model": model.state_dict(), "config": asdict(model.config), "chars": chars}
    try:
        torch.save(contents, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch.save raises both
        fail(f"cannot write --save {path} ({error}): choose another directory, or make space")


def load_model(path, device):
    """Load what save_model wrote. Returns (model, chars)."""
    saved = torch.load(path, map_location=device, weights_only=True)
    model = GPT(GPTConfig(**saved["config"])).to(device)
    model.load_state_dict(saved["model"])
    return model, saved["chars"]


# -------------------------------------------------------------------------------------- training
# --- copied block: estimate_loss ---
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
        _, loss = model(x, y)
        losses.append(loss)
    model.train()
    return torch.stack(losses).mean().item()


# --- end of copied block: estimate_loss ---
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
def train(model, train_data, val_data, args, chars):
    """Train the model. Prints the loss on both parts of the data every eval_interval steps.

    The model ends with the weights that had the lowest validation loss. --save writes them as soon
    as they are found, so that Ctrl-C does not lose them.
    """
    sizes = (args.batch_size, args.block_size)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(0.9, 0.99),  # for momentum and squared gradients; AdamW's default is (0.9, 0.999)
        fused=True,  # updates all weights in one kernel
    )
    generator = torch.Generator().manual_seed(args.seed)  # for get_batch
    best_loss = math.inf
    for step in range(args.max_steps + 1):
        # estimate the loss every eval_interval steps, and at the end
        if step % args.eval_interval == 0 or step == args.max_steps:
            train_loss = estimate_loss(model, train_data, args.eval_iters, *sizes)
            val_loss = estimate_loss(model, val_data, args.eval_iters, *sizes)
            # remember the best weights: a model that trains for too long memorizes its text, and
            # its validation loss increases again
            if val_loss < best_loss:
                best_loss = val_loss
                best_weights = deepcopy(model.state_dict())
                if args.save:
                    save_model(args.save, model, chars)
            print(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}", flush=True)
        if step == args.max_steps:
            break

        # predict the next characters of a batch, and measure how wrong the predictions are
        x, y = get_batch(train_data, *sizes, generator)
        _, loss = model(x, y)

        # compute the gradients of the loss, and limit them: one unusual batch makes no huge step
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        # move the weights against the gradients, as far as the learning rate of this step says
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, args.learning_rate, WARMUP_STEPS, args.max_steps)
        optimizer.step()

    model.load_state_dict(best_weights)
    print(f"best val loss {best_loss:.4f}")


# ---------------------------------------------------------------------------------- command line
def fail(message):
    """Report a user error in one line on stderr and exit with status 2."""
    print("error:", *str(message).split(), file=sys.stderr)  # some messages have several lines
    sys.exit(2)


def pick_device(name):
    """Return the torch.device with this name. "auto" is the accelerator if there is one."""
    if name == "auto":
        device = torch.accelerator.current_accelerator(check_available=True)
        return device or torch.device("cpu")
    try:
        return torch.zeros(1, device=name).device
    except Exception as error:  # a wrong name and a missing GPU raise errors of different types
        fail(f"--device {name} is not available here ({error}): omit it, or use --device cpu")


def parse_args():
    """Parse and check the flags. The preset gives the values of those that are omitted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.error = fail  # argparse's errors in one line
    add = parser.add_argument
    add("--input", default="input.txt", help="UTF-8 text (default: input.txt)")
    add("--device", default="auto", help="cpu, cuda, mps, ... (default: auto, a GPU if there is one)")
    add("--seed", type=int, default=1337, help="random seed (default: 1337)")
    add("--save", metavar="FILE", help="write the best model to this new file")
    add("--load", metavar="FILE", help="sample from this model without training")
    add("--preset", choices=["full", "cpu"], help="set of defaults (full on a GPU, else cpu)")
    add("--activation", choices=["relu", "gelu"], default="relu", help="of the MLP (default: relu)")
    add("--eval_interval", type=int, default=250, help="steps between losses (default: 250)")
    add("--eval_iters", type=int, default=40, help="batches per loss (default: 40)")

    add = parser.add_argument_group("model and training").add_argument
    for name, (full, cpu, meaning) in PRESET_FLAGS.items():
        add(f"--{name}", type=type(full), help=f"{meaning} (default: full {full}, cpu {cpu})")

    add = parser.add_argument_group("sampling").add_argument
    add("--prompt", default="", help="text to continue, $'\\n' is a line break (default: first character)")
    add("--max_new_tokens", type=int, default=500, help="characters to sample (default: 500)")
    add("--temperature", type=float, default=1.0, help="randomness, at least 0 (default: 1.0)")
    add("--top_k", type=int, default=0, help="keep the k most likely characters (default: 0, all)")
    add("--stop", default="", help="text that ends the sample, $'\\n' is a line break")
    args = parser.parse_args()

    # find the device and the preset, and take omitted values from the preset
    args.device = pick_device(args.device)
    args.preset = args.preset or ("cpu" if args.device.type == "cpu" else "full")
    for name, (full, cpu, _) in PRESET_FLAGS.items():
        if getattr(args, name) is None:
            setattr(args, name, full if args.preset == "full" else cpu)

    # all numbers except for the seed must be positive, or 0 where 0 has a meaning
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and name != "seed":
            may_be_0 = name in ("dropout", "temperature", "top_k")
            if value < 0 or (value == 0 and not may_be_0):
                fail(f"--{name} {value} is too small: use a larger value")
    if args.dropout >= 1:
        fail(f"--dropout {args.dropout} is too large: use a value below 1")
    if args.n_embd % args.n_head:
        fail(f"--n_embd {args.n_embd} is not a multiple of --n_head {args.n_head}: change one of them")
    if args.save and os.path.exists(args.save):
        fail(f"--save {args.save} already exists: choose another name, or delete the file")
    return args


def main():
    args = parse_args()
    device = args.device

    # load a model, or read a text and create a model for its characters
    if args.load:
        try:
            model, chars = load_model(args.load, device)
        except Exception as error:  # damaged files raise many types of errors
            fail(f"cannot load a model from --load {args.load} ({type(error).__name__}): create one with --save")
    else:
        try:
            chars, train_data, val_data = load_data(args.input)
        except (OSError, UnicodeDecodeError) as error:
            fail(f"cannot read {args.input} as UTF-8 text ({error}): pass another file with --input")
        if len(val_data) <= args.block_size:
            fail(f"{args.input} is too short for --block_size {args.block_size}: use a longer text")
        torch.manual_seed(args.seed)
        config = GPTConfig(
            vocab_size=len(chars),
            block_size=args.block_size,
            n_layer=args.n_layer,
            n_head=args.n_head,
            n_embd=args.n_embd,
            dropout=args.dropout,
            activation=args.activation,
        )
        model = GPT(config).to(device)
    for name in ("prompt", "stop"):
        unknown = set(getattr(args, name)) - set(chars)
        if unknown:
            fail(f"--{name} contains {sorted(unknown)}: the model knows only {''.join(chars)!r}")

    # On GPUs that have bfloat16, matmuls use it. Weights and losses stay float32.
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16)
    model.forward = autocast(model.forward)

    # train the model
    num_params = sum(p.numel() for p in model.parameters())
    source = args.load or f"preset {args.preset}"
    print(f"{num_params:,} parameters, {len(chars)} characters, {device}, {source}")
    if not args.load:
        try:
            train(model, train_data.to(device), val_data.to(device), args, chars)
        except RuntimeError as error:  # PyTorch raises it if the memory is full
            if "memory" not in str(error):
                raise
            fail(f"not enough memory on {device}: use a smaller --batch_size, --block_size or --n_embd")

    # continue the prompt, by default the first character of the vocabulary
    generator = torch.Generator(device).manual_seed(args.seed)
    idx = torch.tensor([encode(args.prompt or chars[0], chars)], device=device)  # (1, T)
    stop = encode(args.stop, chars)
    idx = model.generate(idx, args.max_new_tokens, generator, args.temperature, args.top_k, stop)
    print(decode(idx[0].tolist(), chars))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # "?" for what a terminal cannot show
    main()
