"""
Lesson 1: a bigram model predicts the next character from the current one with a lookup table.

    python bigram.py                         # 3,000 steps, about 5 seconds on a CPU
    python bigram.py --input my_text.txt     # learn from another UTF-8 text

Trains on the first 90% of the text, prints the loss on both parts, and then a sample. On input.txt
the validation loss ends at 2.44 nats per character, on Tiny Shakespeare at 2.49. A uniform guess
among 65 characters gives ln 65 = 4.17. Compare with lesson 2: diff bigram.py gpt.py
"""

import argparse
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F


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
class Bigram(nn.Module):
    """A table of V x V logits: row i scores the characters that may follow character i."""

    def __init__(self, vocab_size):
        super().__init__()
        # wte is GPT-2's name for a table that is indexed with ids ("word token embedding").
        self.wte = nn.Embedding(vocab_size, vocab_size)
        # At first all logits are nearly equal, so the first loss is that of a uniform guess, ln(V).
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, idx, targets=None):
        """Return (logits (B, T, V), loss) for ids idx (B, T). Without targets, the loss is None."""
        logits = self.wte(idx)  # (B, T) -> (B, T, V)
        if targets is None:
            return logits, None
        # cross-entropy: -ln of the probability of each target, averaged over all B * T positions
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, generator):
        """Append max_new_tokens sampled characters to each row of idx (B, T)."""
        for _ in range(max_new_tokens):
            # only the last character matters
            logits, _ = self(idx[:, -1:])  # (B, 1) -> (B, 1, V)
            # turn its scores into probabilities, and draw the next character from them
            probs = F.softmax(logits[:, -1], dim=-1)  # (B, V)
            next_idx = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
            idx = torch.cat((idx, next_idx), dim=1)  # (B, T + 1)
        return idx


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
def train(model, train_data, val_data, args):
    """Train the model. Prints the loss on both parts of the data every eval_interval steps."""
    sizes = (args.batch_size, args.block_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    generator = torch.Generator().manual_seed(args.seed)  # for get_batch
    for step in range(args.max_steps + 1):
        # estimate the loss every eval_interval steps, and at the end
        if step % args.eval_interval == 0 or step == args.max_steps:
            train_loss = estimate_loss(model, train_data, args.eval_iters, *sizes)
            val_loss = estimate_loss(model, val_data, args.eval_iters, *sizes)
            print(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}", flush=True)
        if step == args.max_steps:
            break

        # predict the next characters of a batch, and measure how wrong the predictions are
        x, y = get_batch(train_data, *sizes, generator)
        _, loss = model(x, y)

        # compute the gradients of the loss, and move the weights a little against them
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ---------------------------------------------------------------------------------- command line
def fail(message):
    """Report a user error in one line on stderr and exit with status 2."""
    print("error:", *str(message).split(), file=sys.stderr)  # some messages have several lines
    sys.exit(2)


def parse_args():
    """Parse and check the flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.error = fail  # argparse's errors in one line
    add = parser.add_argument
    add("--input", default="input.txt", help="UTF-8 text (default: input.txt)")
    add("--block_size", type=int, default=8, help="characters per sequence (default: 8)")
    add("--batch_size", type=int, default=32, help="sequences per step (default: 32)")
    add("--max_steps", type=int, default=3000, help="training steps (default: 3000)")
    add("--learning_rate", type=float, default=1e-2, help="learning rate (default: 0.01)")
    add("--eval_interval", type=int, default=300, help="steps between losses (default: 300)")
    add("--eval_iters", type=int, default=200, help="batches per loss (default: 200)")
    add("--max_new_tokens", type=int, default=500, help="characters to sample (default: 500)")
    add("--seed", type=int, default=1337, help="random seed (default: 1337)")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if name not in ("input", "seed") and value <= 0:
            fail(f"--{name} {value} is too small: use a larger value")
    return args


def main():
    args = parse_args()

    # read the text
    try:
        chars, train_data, val_data = load_data(args.input)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {args.input} as UTF-8 text ({error}): pass another file with --input")
    if len(val_data) <= args.block_size:
        fail(f"{args.input} is too short for --block_size {args.block_size}: use a longer text")

    # train the model
    torch.manual_seed(args.seed)
    model = Bigram(len(chars))
    num_params = sum(p.numel() for p in model.parameters())
    print(f"{num_params:,} parameters, {len(chars)} characters")
    train(model, train_data, val_data, args)

    # sample a text, which begins with the first character of the vocabulary, often a newline
    generator = torch.Generator().manual_seed(args.seed)
    idx = torch.tensor([[0]])  # (1, 1)
    idx = model.generate(idx, args.max_new_tokens, generator)  # (1, 1 + max_new_tokens)
    print(decode(idx[0].tolist(), chars))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # "?" for what a terminal cannot show
    main()
