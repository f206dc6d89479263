"""
Evaluate a GPT-2 on HellaSwag: how often does it find the correct one of four endings?

    python hellaswag.py                               # the newest checkpoint in log/
    python hellaswag.py --model gpt2                  # OpenAI's GPT-2, from the Hugging Face Hub
    python hellaswag.py --model log/step_019073 --output scores.json
    python hellaswag.py --prepare                     # write the file that train_gpt2.py reads

HellaSwag asks how everyday scenes continue. An example has a context, four endings and a label,
which is the number of the correct ending. This one is invented, in the form of the data set:

    {"ind": 24,
     "ctx": "A man kneels on the kitchen floor next to an open toolbox. He",
     "endings": ["sings to the audience and bows.",
                 "throws the toolbox over the garden fence and laughs.",
                 "loosens the pipe under the sink with a large wrench.",
                 "paints the dog's nails."],
     "label": 2}

A language model computes the probability of each token given the tokens before it. So we can
measure how likely each ending is after the context, and take the most likely one as the answer.
The loss of a token is -ln of its probability: the lower, the more likely. The losses could be

    ending   tokens   total loss   mean loss per token
         0        7         24.5                  3.50
         1       11         41.8                  3.80
         2       12         34.8                  2.90    <- the correct ending
         3        6         23.4                  3.90

acc picks the ending with the lowest total loss. Here it is ending 3, which is wrong: a short ending
has an advantage, because its total has fewer terms. acc_norm picks the ending with the lowest mean
loss per token. Here it is ending 2, which is correct. Both are reported as the fraction of examples
that are answered correctly. Random guessing gives 0.25. The last line for --model gpt2 is

    10042 acc: 0.2859 acc_norm: 0.2955

as in build-nanogpt. As there and in llm.c, the context and " " + ending are tokenized separately,
and the losses of the context do not count.

The validation set (10,042 examples) is downloaded once, to hellaswag/. For GPT-2 124M, an
evaluation takes about an hour on two CPU cores.

Sections: errors, data, scoring, model, loading, command line.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

REPO_ID = "Rowan/hellaswag"  # the authors' data set on the Hugging Face Hub
HUB_PATH = "data/validation-00000-of-00001.parquet"  # the validation set in that data set
DATA_PATH = "hellaswag/hellaswag_val.parquet"  # where the download is stored
PREPARED_PATH = "hellaswag/hellaswag_val.npz"  # written by --prepare and read by train_gpt2.py


# -------------------------------------------------------------------------------------- errors
# --- copied block: errors ---
def fail(message):
    """Report a user error in one line on stderr and exit with status 2."""
    print("error:", *str(message).split(), file=sys.stderr)  # some messages have several lines
    sys.exit(2)


@contextmanager
def explain(problem, advice):
    """Turn any error in the with block into one line: what failed, why, and what to do."""
    try:
        yield
    except Exception as error:  # damaged files raise errors of many types
        # other messages, such as that of a KeyError, say nothing without the type
        is_clear = isinstance(error, (OSError, ValueError)) and str(error)
        reason = error if is_clear else f"{type(error).__name__}: {error}"
        fail(f"{problem} ({reason}): {advice}")


# --- end of copied block: errors ---
# ---------------------------------------------------------------------------------------- data
@dataclass
class Example:
    """One tokenized HellaSwag example."""

    ind: int  # number of the example in the original data set
    label: int  # number of the correct ending, 0 to 3
    context: list  # token ids
    endings: list  # four lists of token ids

    @property
    def length(self):
        """The number of tokens in the longest of the four rows "context + ending"."""
        return len(self.context) + max(len(ending) for ending in self.endings)


def tokenize(row, tokenizer):
    """Return an Example for a dict with the fields of HellaSwag."""
    label = int(row["label"])  # the Hub's file has labels as text
    if label not in (0, 1, 2, 3):
        raise ValueError(f"the label is {label}, not 0 to 3")
    if len(row["endings"]) != 4:
        raise ValueError(f"it has {len(row['endings'])} endings, not 4")
    if not row["ctx"]:
        raise ValueError("its context is empty")
    # GPT-2's tokens of words begin with a space, so each ending gets one. Context and endings are
    # tokenized separately, so that the tokens of the context are the same for all endings.
    return Example(
        ind=row["ind"],
        label=label,
        context=tokenizer.encode_ordinary(row["ctx"]),
        endings=[tokenizer.encode_ordinary(" " + ending) for ending in row["endings"]],
    )


def download(path):
    """Download the validation set, and move it to path if its checksum is that of the Hub."""
    from huggingface_hub import HfApi, hf_hub_download  # imported here because it is slow

    # Ask for the newest commit and its checksums. Without a network, this fails at once.
    info = HfApi().dataset_info(REPO_ID, files_metadata=True)
    checksums = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as directory:
        downloaded = hf_hub_download(REPO_ID, HUB_PATH, repo_type="dataset", revision=info.sha, local_dir=directory)
        with open(downloaded, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != checksums[HUB_PATH]:
            raise ValueError(f"{HUB_PATH} does not match its SHA-256")
        os.replace(downloaded, path)


def load_examples(path, tokenizer, limit):
    """Read and tokenize the first limit examples of a parquet file or a file of JSON lines.

    The default file is downloaded if it is missing.
    """
    if path == DATA_PATH and not os.path.exists(path):
        advice = "run the same command again, or pass --data FILE"
        with explain(f"cannot download {REPO_ID} from the Hugging Face Hub", advice):
            download(path)
    is_parquet = path.endswith(".parquet")
    advice = "choose another file, or delete this one if it was downloaded"
    with explain(f"cannot use --data {path}", advice):
        if is_parquet:
            rows = pq.read_table(path, columns=["ind", "label", "ctx", "endings"]).to_pylist()
        else:
            with open(path, encoding="utf-8-sig") as file:
                rows = file.read().rstrip().split("\n")
    examples = []
    for number, row in enumerate(rows[:limit], 1):
        problem = f"line {number} of {path} is not a HellaSwag example"
        with explain(problem, "correct it, or choose another --data"):
            if not is_parquet:
                row = json.loads(row)
            examples.append(tokenize(row, tokenizer))
    return examples


def prepare(path, limit):
    """Tokenize examples for train_gpt2.py. Writes a NumPy file with these arrays:

    tokens          (N, 4, T) uint16, rows "context + ending", padded with zeros at the end
    context_length  (N,) int64, number of tokens in the context
    length          (N, 4) int64, number of tokens in each row
    label           (N,) int64, number of the correct ending

    The examples are sorted by their longest row, the shortest first, so that batches of neighbors
    need little padding. T is the length of the longest row of all.
    """
    examples = load_examples(path, load_tokenizer("gpt2"), limit)
    examples.sort(key=lambda example: example.length)
    N = len(examples)
    tokens = np.zeros((N, 4, examples[-1].length), dtype=np.uint16)
    length = np.zeros((N, 4), dtype=np.int64)
    for i, example in enumerate(examples):
        for j, ending in enumerate(example.endings):
            row = example.context + ending
            tokens[i, j, : len(row)] = row
            length[i, j] = len(row)
    arrays = {
        "tokens": tokens,
        "context_length": np.array([len(example.context) for example in examples], dtype=np.int64),
        "length": length,
        "label": np.array([example.label for example in examples], dtype=np.int64),
    }
    with explain(f"cannot write {PREPARED_PATH}", "free some space, or make it writable"):
        os.makedirs(os.path.dirname(PREPARED_PATH), exist_ok=True)
        with open(f"{PREPARED_PATH}.tmp", "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(f"{PREPARED_PATH}.tmp", PREPARED_PATH)
    print(f"wrote {N:,} examples to {PREPARED_PATH}")


# ------------------------------------------------------------------------------------- scoring
# The simplest method processes four rows "context + ending". Here the context is processed once,
# and the four endings follow it in the same row. For the model, each ending comes directly after
# the context: its positions continue those of the context, and it attends to the context and to
# itself, but not to the other endings. The losses are the same, with about half the work.
#
#     index       0   1      2 3  4 |     5   6    7 |      8   9      10 | ...
#     tokens      A man kneels . He | sings and bows | throws the toolbox | ...
#     positions   0   1      2 3  4 |     5   6    7 |      5   6       7 | ...
#     part        4   4      4 4  4 |     0   0    0 |      1   1       1 | ...
#     predictor  -1  -1     -1 -1 -1|     4   5    6 |      4   8       9 | ...
#
# part is the number of the ending that a token belongs to, or CONTEXT. predictor is the index of
# the token that predicts a token, or -1 if the loss of the token does not count.
CONTEXT = 4


def pack(example, n_positions):
    """Put an example into one row of T tokens. Returns the four columns above as a tensor (T, 4).

    n_positions is the largest number of tokens that the model can process.
    """
    # If an example is too long for the model, each ending gets as much of the end of the context as
    # fits in front of it. Then the four contexts differ, and each is a part of its ending.
    is_shared = example.length <= n_positions
    tokens, positions, part, predictor = [], [], [], []
    for i, ending in enumerate(example.endings):
        row = (example.context + ending)[-n_positions:]
        # add the n tokens of the context, once if it is shared
        n = max(1, len(row) - len(ending))  # nothing predicts the first token, so it never counts
        if i == 0 or not is_shared:
            tokens += row[:n]
            positions += range(n)
            part += [CONTEXT if is_shared else i] * n
            predictor += [-1] * n
            last = len(tokens) - 1  # index of the last token of the context
        # add the ending, whose first token is predicted by the context
        start = len(tokens)
        tokens += row[n:]
        positions += range(n, len(row))
        part += [i] * (len(row) - n)
        predictor += [last, *range(start, len(tokens) - 1)]
    return torch.tensor([tokens, positions, part, predictor]).T  # (4, T) -> (T, 4)


@torch.inference_mode()
def score(model, examples):
    """Compute the losses of the endings of B examples in nats.

    Returns the total loss and the mean loss per token of each ending, two float64 tensors (B, 4).
    """
    # Put the examples into one tensor, padded with -1 at the end. No other token attends to padding.
    device = model.wte.weight.device
    n_positions = model.config["n_positions"]
    rows = [pack(example, n_positions) for example in examples]
    batch = pad_sequence(rows, batch_first=True, padding_value=-1).to(device)  # (B, T, 4)
    tokens, positions, part, predictor = batch.unbind(dim=2)  # four of (B, T)

    # Token t attends to token s if s is not later, and is in the context or in the same part.
    T = tokens.shape[1]
    not_later = torch.ones(T, T, dtype=torch.bool, device=device).tril()  # (t, s)
    part_of_t = part[:, :, None]  # (B, T, 1)
    part_of_s = part[:, None, :]  # (B, 1, T)
    mask = not_later & ((part_of_s == CONTEXT) | (part_of_s == part_of_t))  # (B, T, T)
    mask = mask[:, None]  # (B, 1, T, T), the same for all heads

    def attend(layer, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    # the embeddings have no row -1: padding gets row 0
    x = model(tokens.clamp(min=0), positions.clamp(min=0), attend)  # (B, T) -> (B, T, C)

    # Compute the losses of the M tokens that count. Logits are large, 206 MB per 1,024 tokens with
    # GPT-2's vocabulary, so they are computed in chunks.
    b, t = (predictor >= 0).nonzero(as_tuple=True)  # (M,) and (M,)
    x = x[b, predictor[b, t]]  # (B, T, C) -> (M, C)
    y = tokens[b, t]  # (B, T) -> (M,)
    losses = []
    for x_chunk, y_chunk in zip(x.split(1024), y.split(1024), strict=True):
        logits = model.logits(x_chunk).float()  # (1024, C) -> (1024, vocab_size)
        losses.append(F.cross_entropy(logits, y_chunk, reduction="none"))

    # Add up the losses of each ending in float64, so that rounding cannot decide between two
    # endings. Apple's GPUs do not have float64, so the CPU does this.
    losses = torch.cat(losses).cpu().double()  # (M,)
    ending = (4 * b + part[b, t]).cpu()  # (M,), the number of the ending among all B * 4 endings
    totals = torch.bincount(ending, weights=losses, minlength=4 * len(examples))  # (B * 4,)
    lengths = torch.bincount(ending, minlength=4 * len(examples))  # (B * 4,)
    return totals.view(-1, 4), (totals / lengths).view(-1, 4)


def evaluate(model, examples, batch_size):
    """Return a list with one dict per example: its losses and predictions, as in --output.

    Shows a progress bar on a terminal. Raises ValueError if a loss is NaN or infinite.
    """
    # The longest come first: if the memory is too small, the error comes at once. Neighbors have
    # similar lengths, so that they need little padding.
    lengths = [len(example.context) + sum(map(len, example.endings)) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: lengths[i], reverse=True)
    predictions = [None] * len(examples)
    for start in tqdm(range(0, len(order), batch_size), unit="batch", disable=None):
        batch = order[start : start + batch_size]  # indices of examples
        totals, means = score(model, [examples[i] for i in batch])
        if not totals.isfinite().all():
            raise ValueError(f"the losses of some examples are {totals.sum().item()}")
        for i, total, mean in zip(batch, totals.tolist(), means.tolist(), strict=True):
            predictions[i] = {
                "ind": examples[i].ind,
                "label": examples[i].label,
                "pred": total.index(min(total)),  # the lowest total loss
                "pred_norm": mean.index(min(mean)),  # the lowest mean loss per token
                "losses": total,
                "mean_losses": mean,
            }
    return predictions


# --------------------------------------------------------------------------------------- model
# --- copied block: GPT ---
# GPT-2 for inference. Modules and parameters have the same names as in train_gpt2.py and in
# transformers. Evaluation and sampling differ only in what a token attends to. So forward() is
# given attend(layer, q, k, v), a function that computes the attention of a layer.
#
# Shapes: B is the batch size, T the number of tokens, C the number of channels (768 in GPT-2 124M),
# nh the number of heads (12), hs = C / nh the size of a head (64).
class CausalSelfAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config, layer):
        super().__init__()
        C = config["n_embd"]
        self.n_head = config["n_head"]
        self.layer = layer  # index of this layer, for attend
        self.c_attn = nn.Linear(C, 3 * C)  # queries, keys and values of all heads in one matmul
        self.c_proj = nn.Linear(C, C)

    def forward(self, x, attend):
        B, T, C = x.shape
        nh = self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) -> (B, T, 3C) -> three of (B, T, C)
        q = q.view(B, T, nh, C // nh).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        k = k.view(B, T, nh, C // nh).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        v = v.view(B, T, nh, C // nh).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        y = attend(self.layer, q, k, v)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, nh, T, hs) -> (B, T, nh, hs) -> (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """A two-layer MLP that is applied to each position independently."""

    def __init__(self, config):
        super().__init__()
        C = config["n_embd"]
        self.c_fc = nn.Linear(C, 4 * C)
        self.c_proj = nn.Linear(4 * C, C)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, C) -> (B, T, 4C)
        return self.c_proj(x)  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """Attention, then the MLP, each behind a LayerNorm and with a residual connection."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config["n_embd"])
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config["n_embd"])
        self.mlp = MLP(config)

    def forward(self, x, attend):
        x = x + self.attn(self.ln_1(x), attend)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2. config is the content of a config.json as read_pretrained returns it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config["vocab_size"], config["n_embd"])  # tokens; also the head
        self.wpe = nn.Embedding(config["n_positions"], config["n_embd"])  # positions
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config["n_layer"])])
        self.ln_f = nn.LayerNorm(config["n_embd"])

    def forward(self, idx, positions, attend):
        """Return the final hidden states (B, T, C) of the tokens idx (B, T) at these positions."""
        x = self.wte(idx) + self.wpe(positions)  # (B, T, C)
        for block in self.h:
            x = block(x, attend)
        return self.ln_f(x)

    def logits(self, x):
        """Return the logits (..., vocab_size) of the next token for hidden states x (..., C)."""
        return F.linear(x, self.wte.weight)  # the output head is the token embedding


# --- end of copied block: GPT ---
# ------------------------------------------------------------------------------------- loading
# --- copied block: pretrained ---
VOCAB_SIZES = {"gpt2": 50257, "bytes": 257}
# fields of config.json that must have GPT-2's values, which are meant if they are missing
GPT2_FIELDS = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
# Hugging Face stores these weights as (in, out), because GPT-2's linear layers were written as
# convolutions.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def checkpoints_in(directory):
    """Return the paths of the checkpoints step_NNNNNN in a directory, oldest first."""
    names = [name for name in os.listdir(directory) if re.fullmatch(r"step_\d{6,}", name)]
    names.sort(key=lambda name: int(name.removeprefix("step_")))
    return [os.path.join(directory, name) for name in names]


def find_pretrained(name):
    """Return the directory of a model: name itself, its newest checkpoint, or a download."""
    if os.path.isdir(name):
        return (checkpoints_in(name) or [name])[-1]
    from huggingface_hub import snapshot_download  # imported here because it is slow

    try:
        return snapshot_download(name, allow_patterns=["config.json", "model*.safetensors"])
    except Exception as error:  # errors of the Hub share no base class
        raise ValueError(f"it is not a directory here, and the Hub's answer is: {error}") from None


def read_pretrained(directory):
    """Return config.json, a dict, and the weights by name, with matrices (out, in) as in nn.Linear.

    Rows of the embedding that only pad the vocabulary are dropped. Raises ValueError if the model
    is not a GPT-2 with one of the two tokenizers.
    """
    with open(f"{directory}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    for name, value in GPT2_FIELDS.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]}, but only {value} is supported")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise ValueError(f"n_inner is {config['n_inner']}, but only 4 * n_embd is supported")
    # The size of the vocabulary tells the tokenizer. Some tools pad it by up to 511 rows.
    sizes = {name: size for name, size in VOCAB_SIZES.items() if size <= config["vocab_size"] < size + 512}
    if not sizes:
        raise ValueError(f"vocab_size {config['vocab_size']} is neither GPT-2's 50257 nor 257 for bytes")
    config["tokenizer"], config["vocab_size"] = sizes.popitem()

    # the weights are in one file, or in several with numbers
    paths = sorted(Path(directory).glob("model.safetensors")) or sorted(Path(directory).glob("model-*.safetensors"))
    if not paths:
        raise ValueError("it contains no model.safetensors")
    weights = {}
    for path in paths:
        for name, weight in load_file(path).items():
            name = name.removeprefix("transformer.")
            weights[name] = weight.T if name.endswith(TRANSPOSED) else weight
    # the output head is the embedding; older files also contain the causal masks
    embedding = weights["wte.weight"]
    if not torch.equal(weights.pop("lm_head.weight", embedding), embedding):
        raise ValueError("its output head lm_head.weight differs from its embedding wte.weight")
    weights["wte.weight"] = embedding[: config["vocab_size"]]
    masks = (".attn.bias", ".attn.masked_bias")
    return config, {name: weight for name, weight in weights.items() if not name.endswith(masks)}


# --- end of copied block: pretrained ---
# --- copied block: get_tokenizer ---
def get_tokenizer(name):
    """Return the tokenizer "gpt2" (50,257 tokens) or "bytes" (the 256 bytes and <|endoftext|>).

    tiktoken downloads GPT-2's vocabulary on first use, or reads it from TIKTOKEN_CACHE_DIR.
    """
    if name == "gpt2":
        return tiktoken.get_encoding("gpt2")
    return tiktoken.Encoding(
        name,
        pat_str=r"(?s:.{1,1000})",  # where text is split does not matter: no tokens are merged
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )


# --- end of copied block: get_tokenizer ---
# --- copied block: pick_device ---
def pick_device(name):
    """Return the torch.device with this name. "auto" is the accelerator if there is one."""
    if name == "auto":
        device = torch.accelerator.current_accelerator(check_available=True)
        return device or torch.device("cpu")
    with explain(f"--device {name} is not available here", "omit it, or use --device cpu"):
        return torch.zeros(1, device=name).device


# --- end of copied block: pick_device ---
# --- copied block: load_tokenizer ---
def load_tokenizer(name):
    """Return the tokenizer with this name. Exits with an error if it cannot be loaded."""
    advice = "connect to the network once, or set TIKTOKEN_CACHE_DIR to a directory that contains it"
    with explain(f"cannot load the tokenizer {name}", advice):
        return get_tokenizer(name)


# --- end of copied block: load_tokenizer ---
# --- copied block: load_model ---
def load_model(name, device, dtype):
    """Load a model and its tokenizer. Returns (model, tokenizer, directory).

    name is the directory of a model or of a run, or the name of a model on the Hugging Face Hub.
    """
    advice = "train a model, or pass a directory of a model or a GPT-2 on the Hugging Face Hub"
    with explain(f"cannot load --model {name}", advice):
        directory = find_pretrained(name)
        config, weights = read_pretrained(directory)
        for key, weight in weights.items():
            weight = weight.to(device, dtype)
            # The matrices are views of Hugging Face's (in, out) layout, with which CPUs sample
            # faster in float32. In 16 bits they are faster with nn.Linear's (out, in).
            weights[key] = weight if dtype == torch.float32 else weight.contiguous()
        # Create the model without memory for its weights (on the device "meta"), and make the
        # loaded tensors its parameters (assign=True). So the weights exist only once.
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict(weights, assign=True)
    return model, load_tokenizer(config["tokenizer"]), directory


# --- end of copied block: load_model ---
# -------------------------------------------------------------------------------- command line
def parse_args():
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(f"{message}: see --help")  # one line, as all errors
    add = parser.add_argument
    add("--model", default="log", help="model, run or GPT-2 on the Hugging Face Hub (default: log)")
    add(
        "--data",
        default=DATA_PATH,
        metavar="FILE",
        help="examples as parquet or JSON lines (default: %(default)s)",
    )
    add("--limit", type=int, metavar="N", help="use only the first N examples (default: all)")
    add("--output", metavar="FILE", help="JSON file for all losses and predictions (default: none)")
    add("--prepare", action="store_true", help=f"only tokenize the examples, and write {PREPARED_PATH}")
    add("--batch_size", type=int, help="examples per batch (default: 8 on a CPU, 32 on a GPU)")
    add("--device", default="auto", help="cpu, cuda, mps, ... (default: auto, the GPU if there is one)")
    dtypes = ["float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, help="default: bfloat16 on GPUs that have it, else float32")
    args = parser.parse_args()
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            fail(f"--{name} {value} is too small: use at least 1")
    # an evaluation may take an hour, so check now that its result can be written
    if args.output and not os.path.isdir(os.path.dirname(args.output) or "."):
        fail(f"cannot write --output {args.output}: choose a file in a directory that exists")
    return args


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the script without a traceback
    args = parse_args()
    if args.prepare:
        prepare(args.data, args.limit)
        return

    # Do not use cuDNN's attention: it builds a new plan for each new length, which takes longer
    # than the attention itself, and the length changes with nearly every batch. Use TF32 for
    # float32 matmuls, which is faster, on GPUs that support it.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high")

    # Load the model and the examples.
    device = pick_device(args.device)
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = args.dtype or ("bfloat16" if has_bfloat16 else "float32")
    model, tokenizer, directory = load_model(args.model, device, getattr(torch, dtype))
    examples = load_examples(args.data, tokenizer, args.limit)
    n = len(examples)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {directory}, {num_parameters:,} parameters", file=sys.stderr)

    # Report how many examples are too long for the model. GPT-2 has 1,024 positions, enough for all.
    n_positions = model.config["n_positions"]
    num_long = sum(example.length > n_positions for example in examples)
    if num_long:
        print(f"{num_long} of {n} examples are longer than {n_positions} tokens: their contexts are cut")

    # Compute the losses of all examples.
    batch_size = args.batch_size or (8 if device.type == "cpu" else 32)
    try:
        predictions = evaluate(model, examples, batch_size)
    except ValueError as error:
        fail(f"{error}: try --dtype float32, or choose another --model")
    except RuntimeError as error:
        if "allocate" not in str(error):  # PyTorch's errors of full memory contain this word
            raise
        fail(f"a batch does not fit into the memory of {device} ({error}): use a smaller --batch_size")

    # Print the result before writing --output, so that it is not lost if writing fails.
    acc = sum(example["pred"] == example["label"] for example in predictions) / n
    acc_norm = sum(example["pred_norm"] == example["label"] for example in predictions) / n
    print(f"{n} acc: {acc:.4f} acc_norm: {acc_norm:.4f}", flush=True)
    if args.output:
        # a run means its newest checkpoint; the Hub's name says more than a directory of downloads
        name = directory if os.path.isdir(args.model) else args.model
        result = {
            "model": name,
            "n": n,
            "acc": acc,
            "acc_norm": acc_norm,
            "predictions": predictions,
        }
        with explain(f"cannot write --output {args.output}", "choose another file"):
            with open(f"{args.output}.tmp", "w") as file:
                json.dump(result, file, indent=1)
            os.replace(f"{args.output}.tmp", args.output)


if __name__ == "__main__":
    main()
