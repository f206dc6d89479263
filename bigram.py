"""
Lesson 1: a bigram model writes text from a table of which character follows which.

    python bigram.py                         # 3,000 steps, about 10 seconds on two CPU cores
    python bigram.py --input my_text.txt     # any UTF-8 text

Trains on the first 90 % of the text, prints the loss on both parts, then a sample. Writes no file.
Tiny Shakespeare ends at a validation loss of 2.49 nats a character (blind guesses: ln 65 = 4.17).
"""

import argparse
import signal
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------- model
class Bigram(nn.Module):
    """A table of V x V logits: row i scores the characters that may follow character i."""

    def __init__(self, vocab_size):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, vocab_size)
        nn.init.normal_(self.wte.weight, std=0.02)  # nearly equal logits: the first loss is ln(V)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) for ids idx (B, T), and the mean loss in nats if targets (B, T) are given."""
        logits = self.wte(idx)  # (B, T) -> (B, T, V)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, generator):
        """Extend idx (B, T) by sampled characters to (B, T + max_new_tokens)."""
        for _ in range(max_new_tokens):
            probs = F.softmax(self(idx[:, -1])[0], dim=-1)  # only the last character counts: (B,) -> (B, V)
            next_idx = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
            idx = torch.cat((idx, next_idx), dim=1)  # (B, T + 1)
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
def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--input", default="input.txt", help="UTF-8 text to learn from (input.txt)")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences a step (32)")
    parser.add_argument("--block_size", type=int, default=8, help="characters a sequence (8)")
    parser.add_argument("--max_steps", type=int, default=3000, help="training steps (3000)")
    parser.add_argument("--eval_interval", type=int, default=300, help="steps between loss estimates (300)")
    parser.add_argument("--eval_iters", type=int, default=200, help="batches a loss estimate (200)")
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="of AdamW (0.01)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (auto)")
    parser.add_argument("--seed", type=int, default=1337, help="of all random numbers (1337)")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="characters to sample (500)")
    parser.error = lambda message: fail(f"{message}; see --help")  # argparse's own errors in one line, too
    args = parser.parse_args()
    for name, value in vars(args).items():
        if type(value) in (int, float) and name != "seed" and not value > 0:
            fail(f"--{name} is {value}: it must be above 0")
    text, device = read_text(args.input), pick_device(args.device)

    chars = sorted(set(text))  # the vocabulary: a character's id is its place in it
    stoi = {char: i for i, char in enumerate(chars)}
    data = torch.tensor([stoi[char] for char in text], device=device)  # (N,)
    train_data, val_data = data.tensor_split([int(0.9 * len(data))])
    if len(val_data) <= args.block_size:
        fail(f"--block_size {args.block_size} is too long for the {len(val_data)} characters kept for validation")

    torch.manual_seed(args.seed)
    model = Bigram(len(chars)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(chars)} characters, {device}")
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(args.max_steps + 1):
        if step % args.eval_interval == 0 or step == args.max_steps:
            sizes = args.eval_iters, args.batch_size, args.block_size
            train_loss, val_loss = (estimate_loss(model, part, *sizes) for part in (train_data, val_data))
            print(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}", flush=True)
        if step == args.max_steps:
            break
        _, loss = model(*get_batch(train_data, args.batch_size, args.block_size, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generator = torch.Generator(device).manual_seed(args.seed)
    sample = model.generate(data[None, :1], args.max_new_tokens, generator)  # from the first character
    print("".join(chars[i] for i in sample[0].tolist()))


if __name__ == "__main__":
    main()
