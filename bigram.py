"""
Lesson 1: a bigram model predicts the next character from the current one with a lookup table.

    python bigram.py                         # 3,000 steps, about 10 seconds on two CPU cores
    python bigram.py --input my_text.txt     # learn from another UTF-8 text

Reads input.txt, trains on its first 90%, and prints the loss on the training and the validation
part. Then it prints a sample. Writes no files. On input.txt the validation loss ends at 2.44 nats
per character (2.49 on Tiny Shakespeare). A uniform guess among 65 characters gives ln 65 = 4.17.

Sections: data, model, evaluation, training loop, command line. gpt.py has the same sections, and
two more.
"""

import argparse
import os
import shutil
import signal
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

# Training needs 16 bytes per entry of the table: the weight, its gradient and the two moments of
# AdamW, each in float32. A table of this size needs 6.4 GB.
MAX_VOCAB_SIZE = 20_000


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
class Bigram(nn.Module):
    """A table of V x V logits: row i scores the characters that may follow character i."""

    def __init__(self, vocab_size):
        super().__init__()
        # wte is GPT-2's name for a table that is indexed with ids ("word token embedding").
        self.wte = nn.Embedding(vocab_size, vocab_size)
        # At first all logits are nearly equal, so the first loss is that of a uniform guess, ln(V).
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, idx, targets=None):
        """Return (logits (B, T, V), loss) for ids idx (B, T).

        The loss is the mean cross-entropy in nats, or None if no targets (B, T) are given.
        """
        logits = self.wte(idx)  # (B, T) -> (B, T, V)
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
    def generate(self, idx, max_new_tokens, generator):
        """Append max_new_tokens sampled characters to idx (B, T). Returns (B, T + max_new_tokens)."""
        for _ in range(max_new_tokens):
            # only the last character matters
            logits, _ = self(idx[:, -1:])  # (B, 1) -> (B, 1, V)
            logits = logits[:, -1]  # (B, V), the scores of the next character
            # turn the logits into probabilities, and draw the next character from them
            probs = F.softmax(logits, dim=-1)  # (B, V)
            next_idx = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
            idx = torch.cat((idx, next_idx), dim=1)  # (B, T + 1)
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


# --------------------------------------------------------------------------------- training loop
def train(model, train_data, val_data, args):
    """Train the model. Prints the loss on both parts of the data every eval_interval steps."""
    batch_size = args.batch_size
    block_size = args.block_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    generator = torch.Generator().manual_seed(args.seed)  # for get_batch
    for step in range(args.max_steps + 1):
        last_step = step == args.max_steps

        # estimate the loss every eval_interval steps, and at the end
        if step % args.eval_interval == 0 or last_step:
            train_loss = estimate_loss(model, train_data, args.eval_iters, batch_size, block_size)
            val_loss = estimate_loss(model, val_data, args.eval_iters, batch_size, block_size)
            print(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        if last_step:
            break

        # predict the next characters of a batch, and measure how wrong the predictions are
        x, y = get_batch(train_data, batch_size, block_size, generator)
        logits, loss = model(x, y)

        # compute the gradients of the loss, and move the weights a little against them
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


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
    """Parse and check the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(f"{message}: see --help")  # argparse's own errors in one line
    parser.add_argument("--input", default="input.txt", help="UTF-8 text to learn from (default: input.txt)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    parser.add_argument("--seed", type=int, default=1337, help="random seed (default: 1337)")
    parser.add_argument("--block_size", type=int, default=8, help="sequence length in characters (default: 8)")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences per step (default: 32)")
    parser.add_argument("--max_steps", type=int, default=3000, help="training steps (default: 3000)")
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="learning rate (default: 0.01)")
    parser.add_argument("--eval_interval", type=int, default=300, help="steps between loss estimates (default: 300)")
    parser.add_argument("--eval_iters", type=int, default=200, help="batches per loss estimate (default: 200)")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="characters to sample (default: 500)")
    args = parser.parse_args()
    for name, value in vars(args).items():
        is_number = isinstance(value, (int, float)) and name != "seed"
        if is_number and not 0 < value < 2**31:
            fail(f"--{name} is {value}: it must be above 0 and below 2^31")
    if not -(2**63) <= args.seed < 2**63:
        fail(f"--seed is {args.seed}: it must fit in 64 bits")
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)

    # read the data, and refuse what cannot be trained on
    chars, train_data, val_data = load_data(args.input, device)
    if len(val_data) <= args.block_size:
        fail(
            f"--block_size {args.block_size} needs more than the {len(val_data)} characters that "
            f"{args.input!r} has for validation: use a smaller --block_size or a longer text"
        )
    if len(chars) > MAX_VOCAB_SIZE:
        fail(
            f"{args.input!r} has {len(chars):,} different characters, and their table would need "
            f"{16 * len(chars) ** 2 / 1e9:.0f} GB: use a text with at most {MAX_VOCAB_SIZE:,}"
        )

    # train the model
    torch.manual_seed(args.seed)
    model = Bigram(len(chars)).to(device)
    num_params = sum(p.numel() for p in model.parameters())
    print(f"{num_params:,} parameters, {len(chars)} characters, {device}")
    try:
        train(model, train_data, val_data, args)
    except RuntimeError as error:
        # On a CPU, PyTorch reports a failed allocation as a plain RuntimeError, not as an
        # OutOfMemoryError, so only the message tells.
        if "memory" not in str(error):
            raise
        fail(f"not enough memory on {device}: use a smaller --batch_size or --block_size")

    # sample a text that begins with the first character of the vocabulary, in most texts a newline
    generator = torch.Generator(device).manual_seed(args.seed)
    idx = torch.tensor([[0]], device=device)  # (1, 1)
    idx = model.generate(idx, args.max_new_tokens, generator)  # (1, 1 + max_new_tokens)
    print(decode(idx[0].tolist(), chars))


if __name__ == "__main__":
    run_script(main)
