"""
Evaluate a GPT-2 on HellaSwag: does it find the correct one of four endings the most likely?

    python hellaswag.py                                     # the newest checkpoint in log/
    python hellaswag.py --model gpt2                        # OpenAI's GPT-2, from the Hugging Face Hub
    python hellaswag.py --model log/step_019073 --output scores.json
    python hellaswag.py --prepare                           # write the file that train_gpt2.py evaluates on

HellaSwag asks how everyday scenes continue. An example has a context, four endings and a label, the number of the
correct ending. This one is invented, in the form of the data set:

    {"ind": 24,
     "ctx": "A man kneels on the kitchen floor next to an open toolbox. He",
     "endings": ["sings to the audience and bows.",
                 "throws the toolbox over the garden fence and laughs.",
                 "loosens the pipe under the sink with a large wrench.",
                 "paints the dog's nails."],
     "label": 2}

A language model cannot be asked to choose. It can compute the probability of each ending after the context. The
loss of a token is -ln(its probability); the four rows "context + ending" give losses such as

    ending   tokens   total loss   mean loss per token
         0        7         24.5                  3.50
         1       11         41.8                  3.80
         2       12         34.8                  2.90    <- the correct ending
         3        6         23.4                  3.90

acc picks the ending with the lowest total loss, here 3, which is wrong: short endings have an advantage. acc_norm
picks the ending with the lowest mean loss, here 2, which is correct. Both are fractions of examples that are
answered correctly. Random guessing gives 0.25. As in build-nanogpt and llm.c, the context and " " + ending are
tokenized separately, and the losses of the context do not count. The last line of the output for gpt2 is

    10042 acc: 0.2859 acc_norm: 0.2955

as published with build-nanogpt. Larger GPT-2 models and training on more tokens give more.

The validation set (10,042 examples) is downloaded once, to hellaswag/hellaswag_val.parquet. --data FILE uses another
file. --output writes the losses of every ending as JSON. --prepare writes hellaswag/hellaswag_val.npz. With GPT-2
124M, two CPU cores take about an hour, and a GPU takes less than a minute.

Sections: scoring, data, model, loading, command line.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPO_ID = "Rowan/hellaswag"  # the authors' data set on the Hugging Face Hub
PARQUET_PATH = "hellaswag/hellaswag_val.parquet"  # the validation set, downloaded from the Hub
JSONL_PATH = "hellaswag/hellaswag_val.jsonl"  # the same in the format of the authors' repository, used if present
PREPARED_PATH = "hellaswag/hellaswag_val.npz"  # written by --prepare and read by train_gpt2.py
NUM_EXAMPLES = 10042  # in the validation set


# ------------------------------------------------------------------------------------- scoring
@dataclass
class Example:
    """One tokenized HellaSwag example."""

    ind: int  # number of the example in the original data set
    label: int  # number of the correct ending, 0 to 3
    context: list  # token ids
    endings: list  # four lists of token ids


@torch.inference_mode()
def score_endings(model, contexts, endings):
    """Return the loss of each ending in nats: total losses and mean losses per token, two (B, k) tensors.

    contexts are B lists of n tokens, all of the same length n. endings[b] are the k endings of contexts[b].
    The k rows "context + ending" of an example have the context in common. So the model processes the context once,
    and its attention keys and values are copied for the k endings. For four endings, this is about three times less
    work than processing four complete rows, with the same result.
    """
    B, k = len(contexts), len(endings[0])
    device = model.wte.weight.device

    # 1. The contexts. Their last hidden state predicts the first token of each ending.
    n = len(contexts[0])
    cache = model.new_cache(B, n)
    x = model(torch.tensor(contexts, device=device), cache)  # (B, n) -> (B, n, C)
    first = x[:, -1:].repeat_interleave(k, dim=0)  # (B, n, C) -> (B * k, 1, C)

    # 2. The endings, one per row, padded at the end. Causal attention looks at earlier tokens only, so padding does
    # not change the hidden states of the tokens before it.
    rows = [ending for endings_of_example in endings for ending in endings_of_example]
    T = max(len(row) for row in rows)
    tokens = torch.zeros(B * k, T, dtype=torch.int64)
    is_token = torch.zeros(B * k, T, dtype=torch.bool)  # False at padding
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        is_token[i, : len(row)] = True
    tokens = tokens.to(device)
    is_token = is_token.to(device)
    if T > 1:
        cache = cache.repeat(k, n + T - 1)
        rest = model(tokens[:, :-1], cache)  # (B * k, T - 1) -> (B * k, T - 1, C); the last token predicts nothing
        x = torch.cat((first, rest), dim=1)  # (B * k, T, C): x[:, t] predicts tokens[:, t]
    else:
        x = first

    # 3. The losses. Logits are large (1,024 tokens of GPT-2: 206 MB), so they are computed in chunks, and not at all
    # for padding.
    losses = []
    for hidden, targets in zip(x[is_token].split(1024), tokens[is_token].split(1024), strict=True):
        logits = model.logits(hidden).float()  # (N, C) -> (N, vocab_size)
        losses.append(F.cross_entropy(logits, targets, reduction="none"))  # (N,)
    loss_of_token = torch.zeros(B * k, T, device=device)
    loss_of_token[is_token] = torch.cat(losses)

    # 4. Total and mean over the tokens of each ending.
    totals = loss_of_token.cpu().double().sum(dim=1)  # (B * k,)
    means = totals / is_token.cpu().sum(dim=1)
    return totals.view(B, k), means.view(B, k)


def score_long_example(model, example):
    """Return what score_endings does, (1, 4), for an example that is longer than the model's n_positions.

    Of each row "context + ending" only the last n_positions tokens are used. That removes the beginning of the context,
    by a different number of tokens for each ending. So each ending is scored by itself.
    """
    totals = []
    means = []
    for ending in example.endings:
        tokens = (example.context + ending)[-model.config["n_positions"] :]
        # The first token has no loss, because nothing predicts it: it counts as context, even if it is of the ending.
        n = max(1, len(tokens) - len(ending))
        total, mean = score_endings(model, [tokens[:n]], [[tokens[n:]]])
        totals.append(total)
        means.append(mean)
    return torch.cat(totals, dim=1), torch.cat(means, dim=1)


def row_length(example):
    """Return the number of tokens in the longest of the four rows "context + ending"."""
    return len(example.context) + max(len(ending) for ending in example.endings)


def make_batches(examples, n_positions, batch_size):
    """Return lists of at most batch_size indices of examples that score_endings can process together.

    The contexts of a batch have the same length. Examples with similar endings are neighbors, so that there is
    little padding. An example longer than n_positions is a batch of its own. The longest come first: if memory is too
    small, the error comes at once.
    """
    order = sorted(
        range(len(examples)),
        key=lambda i: (len(examples[i].context), row_length(examples[i])),
        reverse=True,
    )
    batches = []
    for i in order:
        previous = examples[batches[-1][0]] if batches else None
        if (
            previous is None
            or len(previous.context) != len(examples[i].context)
            or len(batches[-1]) == batch_size
            or row_length(previous) > n_positions
        ):
            batches.append([])
        batches[-1].append(i)
    return batches


def evaluate(model, examples, batch_size):
    """Yield (index, total losses, mean losses) of each example, two lists of 4 numbers in nats per example."""
    n_positions = model.config["n_positions"]
    for batch in make_batches(examples, n_positions, batch_size):
        if row_length(examples[batch[0]]) > n_positions:
            totals, means = score_long_example(model, examples[batch[0]])
        else:
            contexts = [examples[i].context for i in batch]
            endings = [examples[i].endings for i in batch]
            totals, means = score_endings(model, contexts, endings)
        yield from zip(batch, totals.tolist(), means.tolist(), strict=True)


# ---------------------------------------------------------------------------------------- data
def check_example(example, where):
    """Raise ValueError if an object is not a HellaSwag example. where says where it is from."""
    if not isinstance(example, dict):
        raise ValueError(f"{where} is not a HellaSwag example: it is not a JSON object")
    ind, label = example.get("ind"), example.get("label")
    context, endings = example.get("ctx"), example.get("endings")
    reason = None
    if type(ind) is not int or not 0 <= ind < 2**31:
        reason = f"'ind' must be the number of the example, but it is {ind!r}"
    elif type(label) not in (int, str) or str(label) not in ("0", "1", "2", "3"):  # a str in the Hub's file
        reason = f"'label' must be 0 to 3, but it is {label!r}"
    elif not isinstance(context, str) or not context:
        reason = "'ctx' must be a text that is not empty"
    elif not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings):
        reason = "'endings' must be a list of texts"
    elif len(endings) != 4:
        reason = f"'endings' must be four texts, but there are {len(endings)}"
    if reason:
        raise ValueError(f"{where} is not a HellaSwag example: {reason}")


def read_rows(path):
    """Return [(where, object), ...] for the lines of a JSON-lines file or the rows of a parquet file."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file")  # opening a named pipe would wait forever
    with open(path, "rb") as file:
        content = file.read()
    rows = []
    if content[:4] == b"PAR1":  # the first bytes of every parquet file
        try:
            table = pq.read_table(path, columns=["ind", "label", "ctx", "endings"])
            objects = table.to_pylist()
        except Exception as error:  # damaged files raise many types of errors
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is not a parquet file with HellaSwag examples ({reason})") from None
        for number, example in enumerate(objects, 1):
            rows.append((f"row {number} of {path}", example))
        return rows
    for number, line in enumerate(content.rstrip().split(b"\n"), 1):
        where = f"line {number} of {path}"
        try:
            rows.append((where, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not a HellaSwag example: it is not valid JSON ({error})") from None
    return rows


def read_hellaswag(path, num_examples=None):
    """Return the examples of a JSON-lines or parquet file as a list of checked dicts: ind, label, ctx, endings.

    Raises ValueError if one is malformed or there are not num_examples (None: at least one), OSError if there is no
    such file.
    """
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise ValueError(f"{path} is empty")
    rows = read_rows(path)
    for where, example in rows:
        check_example(example, where)
    if num_examples is not None and len(rows) != num_examples:
        raise ValueError(f"{path} has {len(rows)} examples, but the validation set has {num_examples}")
    if not rows:
        raise ValueError(f"{path} contains no examples")
    return [example for _, example in rows]


@contextmanager
def open_atomically(path):
    """Open a temporary file for writing bytes, which becomes path when it is complete. Errors leave path unchanged."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def download_hellaswag():
    """Download the validation set to PARQUET_PATH. Returns its examples. Raises ValueError if the download fails."""
    from huggingface_hub import HfApi, hf_hub_download  # imported here because it is slow

    try:
        info = HfApi().dataset_info(REPO_ID, files_metadata=True)
        # The file is data/validation-00000-of-00001.parquet, but the Hub may rename it.
        pattern = r"(.*/)?validation[^/]*\.parquet"
        files = [file for file in info.siblings if re.fullmatch(pattern, file.rfilename)]
        if len(files) != 1:
            raise ValueError(f"it has {len(files)} files named validation*.parquet instead of one")
        with tempfile.TemporaryDirectory() as directory:
            path = hf_hub_download(
                REPO_ID, files[0].rfilename, repo_type="dataset", revision=info.sha, local_dir=directory
            )
            with open(path, "rb") as file:
                content = file.read()
            # Two checks: the checksum, if the Hub has one, and the number of examples.
            expected = files[0].lfs.sha256 if files[0].lfs else None
            if expected and hashlib.sha256(content).hexdigest() != expected:
                raise ValueError(f"{files[0].rfilename} does not match its SHA-256 {expected}")
            examples = read_hellaswag(path, NUM_EXAMPLES)
    except Exception as error:  # the Hub, its HTTP client and its transfer library share no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"cannot download HellaSwag from the data set {REPO_ID} of the Hugging Face Hub ({reason}): run the same "
            f"command again, or put the validation set at {JSONL_PATH} or {PARQUET_PATH}, or pass it with --data FILE"
        ) from None
    os.makedirs(os.path.dirname(PARQUET_PATH), exist_ok=True)
    with open_atomically(PARQUET_PATH) as file:
        file.write(content)
    return examples


def load_examples(path, tokenizer, limit=None):
    """Return the first limit examples, tokenized, of the file path (None: of the validation set). Exits on errors."""
    try:
        if path is not None:
            examples = read_hellaswag(path)
        elif os.path.exists(PARQUET_PATH):
            examples = read_hellaswag(PARQUET_PATH, NUM_EXAMPLES)
        elif os.path.exists(JSONL_PATH):
            examples = read_hellaswag(JSONL_PATH, NUM_EXAMPLES)
        else:
            examples = download_hellaswag()
        return [tokenize(example, tokenizer) for example in examples[:limit]]
    except (OSError, ValueError) as error:
        advice = "" if "--data FILE" in str(error) else ": choose another file with --data FILE"
        fail(f"{error}{advice}")


def tokenize(example, tokenizer):
    """Return an Example. The context and each " " + ending are tokenized separately, as in build-nanogpt."""
    return Example(
        ind=example["ind"],
        label=int(example["label"]),
        context=encode(tokenizer, example["ctx"]),
        endings=[encode(tokenizer, f" {ending}") for ending in example["endings"]],
    )


def write_prepared(path, examples):
    """Write tokenized examples for train_gpt2.py, shortest first, as a NumPy file with these arrays:

    tokens          (N, 4, T) uint16, the rows "context + ending" with zeros at the end, T tokens in the longest row
    context_length  (N,) int64, number of tokens in the context
    length          (N, 4) int64, number of tokens in each row
    label           (N,) int64, number of the correct ending
    ind             (N,) int64, number of the example in the original data set
    """
    examples = sorted(examples, key=row_length)
    tokens = np.zeros((len(examples), 4, row_length(examples[-1])), dtype=np.uint16)
    length = np.zeros((len(examples), 4), dtype=np.int64)
    for i, example in enumerate(examples):
        for j, ending in enumerate(example.endings):
            row = example.context + ending
            tokens[i, j, : len(row)] = row
            length[i, j] = len(row)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open_atomically(path) as file:
        np.savez_compressed(
            file,
            tokens=tokens,
            context_length=np.array([len(example.context) for example in examples], dtype=np.int64),
            length=length,
            label=np.array([example.label for example in examples], dtype=np.int64),
            ind=np.array([example.ind for example in examples], dtype=np.int64),
        )


# --- copied block: encode ---
def encode(tokenizer, text):
    """Return the tokens of a text. Special tokens in it are ordinary text. Raises ValueError if tiktoken cannot."""
    limit = 900_000  # tiktoken crashes at a million blanks in a row
    if len(text) > limit and max(map(len, re.findall(r"\s+", text)), default=0) > limit:
        raise ValueError(f"a text has more than {limit:,} blanks in a row, which the tokenizer cannot handle")
    return tokenizer.encode_ordinary(text)


# --- end of copied block: encode ---


# --------------------------------------------------------------------------------------- model
# --- copied block: GPT ---
# An inference-only GPT-2. Modules and parameters have the names of train_gpt2.py and of transformers, but there is
# no dropout and no initialization. What train_gpt2.py does not have is the key/value cache.
class KVCache:
    """The attention keys and values of all tokens that the model has processed so far.

    Causal attention never changes the keys and values of earlier tokens, so that new tokens need only their own
    computed. Memory for max_length tokens is allocated once.
    """

    def __init__(self, shape, device, dtype):
        """Allocate an empty cache of shape (n_layer, B, nh, max_length, hs)."""
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # number of tokens in the cache

    def append(self, layer, k, v):
        """Store k and v (B, nh, T, hs) of T new tokens. Returns those of all tokens, (B, nh, length + T, hs)."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def repeat(self, n, max_length):
        """Return a cache with each of the B sequences n times, (n * B) in all, and memory for max_length tokens."""
        n_layer, B, n_head, _, head_size = self.keys.shape
        shape = (n_layer, n * B, n_head, max_length, head_size)
        copy = KVCache(shape, self.keys.device, self.keys.dtype)
        copy.length = self.length
        copy.keys[:, :, :, : self.length] = self.keys[:, :, :, : self.length].repeat_interleave(n, dim=1)
        copy.values[:, :, :, : self.length] = self.values[:, :, :, : self.length].repeat_interleave(n, dim=1)
        return copy


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention; each of the n_head heads has n_embd / n_head channels."""

    def __init__(self, config, layer):
        super().__init__()
        self.n_head = config["n_head"]
        self.layer = layer  # index of this layer's keys and values in the cache
        self.c_attn = nn.Linear(config["n_embd"], 3 * config["n_embd"])  # queries, keys and values in one matmul
        self.c_proj = nn.Linear(config["n_embd"], config["n_embd"])

    def forward(self, x, mask, cache):
        B, T, C = x.shape  # batch, new tokens, channels (GPT-2 124M: C = 768)
        q, k, v = self.c_attn(x).split(C, dim=2)  # 3 x (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # 2 x (B, nh, S, hs), S tokens so far
        # Without earlier tokens the kernel masks the future by itself (is_causal), which is faster than a mask.
        no_earlier_tokens = k.shape[2] == T
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=no_earlier_tokens)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, nh, T, hs) -> (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """A two-layer MLP that is applied to each position independently."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config["n_embd"], config["n_inner"])
        self.activation = ACTIVATIONS[config["activation_function"]]
        self.c_proj = nn.Linear(config["n_inner"], config["n_embd"])

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))  # (B, T, C) -> (B, T, n_inner) -> (B, T, C)


class Block(nn.Module):
    """Attention (communication), then the MLP (computation), each with a residual connection."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config["n_embd"], eps=config["layer_norm_epsilon"])
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config["n_embd"], eps=config["layer_norm_epsilon"])
        self.mlp = MLP(config)

    def forward(self, x, mask, cache):
        x = x + self.attn(self.ln_1(x), mask, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2. The model computes hidden states; logits() turns those that are needed into logits."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config["vocab_size"], config["n_embd"])  # token embedding, also the output head
        self.wpe = nn.Embedding(config["n_positions"], config["n_embd"])  # position embedding
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config["n_layer"])])
        self.ln_f = nn.LayerNorm(config["n_embd"], eps=config["layer_norm_epsilon"])

    @classmethod
    def from_pretrained(cls, directory, device="cpu", dtype=torch.float32):
        """Load a model from a directory with config.json and safetensors. Raises ValueError if that is impossible."""
        config = read_config(directory)
        weights = read_weights(directory, config)
        for name, weight in weights.items():
            weights[name] = weight.to(device, dtype).contiguous()  # contiguous: some are transposed views
        # Parameters on the device "meta" have no memory; assign=True replaces them by the tensors in weights.
        with torch.device("meta"):
            model = cls(config)
        try:
            model.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:  # it lists missing and unexpected names and wrong shapes, one per line
            reason = " ".join(str(error).split())
            raise ValueError(f"{directory}: config.json and the weights do not fit together: {reason}") from None
        return model.eval()

    def new_cache(self, batch_size, max_length):
        """Return an empty cache for batch_size sequences of at most max_length tokens."""
        n_head = self.config["n_head"]
        head_size = self.config["n_embd"] // n_head
        shape = (self.config["n_layer"], batch_size, n_head, max_length, head_size)
        return KVCache(shape, self.wte.weight.device, self.wte.weight.dtype)

    def forward(self, idx, cache=None):
        """Return the final hidden states (B, T, C) of the tokens idx (B, T).

        With a cache, idx continues the tokens in the cache, and its keys and values are added to the cache.
        """
        T = idx.shape[1]
        start = 0 if cache is None else cache.length
        mask = None
        if start > 0 and T > 1:
            # Token i of idx is at position start + i and attends to positions 0 to start + i.
            mask = torch.ones(T, start + T, dtype=torch.bool, device=idx.device).tril(start)
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.wte(idx) + self.wpe(positions)  # (B, T, C) + (T, C) -> (B, T, C)
        for block in self.h:
            x = block(x, mask, cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def logits(self, x):
        """Return the logits (..., vocab_size) for hidden states (..., C), by multiplying with the token embedding."""
        return F.linear(x, self.wte.weight)


# --- end of copied block: GPT ---


# ------------------------------------------------------------------------------------- loading
# --- copied block: fail ---
def fail(message):
    """Report a user error in one line on stderr and exit with status 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


# --- end of copied block: fail ---


# --- copied block: run_script ---
def run_script(main):
    """Call main() with output that suits terminals, pipes and files.

    Each line appears at once, and "?" replaces characters that the terminal cannot encode. If the reader of the
    output has ended, as in "| head", the script ends silently; if a disk is full, it ends with a one-line error.
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
        os._exit(1)


# --- end of copied block: run_script ---


# --- copied block: read_json ---
def read_json(path):
    """Return the JSON object in a file as a dict. Raises ValueError if there is no such object, OSError if no file."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file")  # opening a named pipe would wait forever
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    return content


# --- end of copied block: read_json ---


# --- copied block: pretrained ---
ACTIVATIONS = {  # by their Hugging Face names; the first two are both GPT-2's
    "gelu_new": nn.GELU(approximate="tanh"),
    "gelu_pytorch_tanh": nn.GELU(approximate="tanh"),
    "gelu": nn.GELU(),
    "relu": nn.ReLU(),
}
# Hugging Face stores these weights as (in, out), because GPT-2's linear layers were written as convolutions.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def find_pretrained(name):
    """Return the directory of a model: a directory, a run's newest checkpoint, or a download from the Hub.

    Raises ValueError if there is no such model, or it cannot be downloaded.
    """
    if os.path.isdir(name) and not os.path.exists(f"{name}/config.json"):
        checkpoints = [entry for entry in os.listdir(name) if re.fullmatch(r"step_\d{6,}", entry)]
        if not checkpoints:
            raise ValueError(f"{name} contains neither config.json nor step_NNNNNN: pass the directory of a model")
        newest = max(checkpoints, key=lambda entry: int(entry.removeprefix("step_")))
        return os.path.join(name, newest)
    if os.path.isdir(name):
        return name
    if os.path.exists(name):
        raise ValueError(f"{name} is a file: pass the directory that contains config.json and model.safetensors")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ValueError(f"{name} does not exist")
    from huggingface_hub import snapshot_download  # imported here because it is slow

    patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        return snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # the Hub, its HTTP client and its transfer library share no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{name} is not a directory here, and cannot be downloaded from the Hugging Face Hub ({reason}): "
            "check the name, run the same command again, or pass a local directory"
        ) from None


def read_config(directory):
    """Return the config.json of a GPT-2, with GPT-2's values for missing fields. Raises ValueError if unsupported.

    The field tokenizer, "gpt2" or "bytes", is added, and vocab_size is that of the tokenizer: rows of the token
    embedding beyond it are padding, which some tools add.
    """
    path = f"{directory}/config.json"
    try:
        saved = read_json(path)
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): it is not the directory of a model") from None
    if saved.get("model_type") != "gpt2":
        raise ValueError(f"{path}: model_type is {saved.get('model_type')!r}, but only gpt2 is supported")
    defaults = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "n_inner": None,  # None means 4 * n_embd
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.1,
        "activation_function": "gelu_new",
        "tokenizer": None,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    config = {name: saved.get(name, default) for name, default in defaults.items()}
    if config["n_inner"] is None:
        config["n_inner"] = 4 * config["n_embd"] if type(config["n_embd"]) is int else 0
    for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "n_inner"):
        if type(config[name]) is not int or not 0 < config[name] < 2**31:
            raise ValueError(f"{path}: {name} is {config[name]!r}, but it must be a positive integer")
    for name in ("layer_norm_epsilon", "resid_pdrop"):
        if type(config[name]) not in (int, float) or not 0 <= config[name] < 1:
            raise ValueError(f"{path}: {name} is {config[name]!r}, but it must be a number from 0 to 1")
    if config["n_embd"] % config["n_head"]:
        raise ValueError(f"{path}: n_embd {config['n_embd']} is not divisible by n_head {config['n_head']}")
    if config["activation_function"] not in list(ACTIVATIONS):
        raise ValueError(f"{path}: activation_function {config['activation_function']!r} is not supported")
    for name in ("tie_word_embeddings", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
        if config[name] is not defaults[name]:
            raise ValueError(f"{path}: {name} {config[name]!r} is not supported")
    for tokenizer, vocab_size in (("gpt2", 50257), ("bytes", 257)):
        # At most 511 rows of padding: vocabularies are padded to multiples of 512 at most.
        if vocab_size <= config["vocab_size"] < vocab_size + 512 and config["tokenizer"] in (None, tokenizer):
            config["tokenizer"], config["vocab_size"] = tokenizer, vocab_size
            return config
    raise ValueError(
        f"{path}: vocab_size {config['vocab_size']} with tokenizer {config['tokenizer']!r} is not supported: "
        "use 50257 (gpt2) or 257 (bytes)"
    )


def read_weights(directory, config):
    """Return the parameters of a GPT-2 by name, with the shapes of nn.Linear and the tokenizer's vocab_size rows.

    The weights may be stored with or without the prefix "transformer.", in one file or in shards with an index
    file. Raises ValueError if they are damaged or not a GPT-2's.
    """
    file_names = ["model.safetensors"]
    if os.path.exists(f"{directory}/model.safetensors.index.json"):
        weight_map = read_json(f"{directory}/model.safetensors.index.json").get("weight_map")
        file_names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        if not file_names or not all(re.fullmatch(r"model[\w.-]*\.safetensors", name) for name in file_names):
            raise ValueError(f"{directory}/model.safetensors.index.json does not list files of this directory")
    elif not os.path.exists(f"{directory}/model.safetensors"):
        if os.path.exists(f"{directory}/pytorch_model.bin"):
            raise ValueError(
                f"{directory} has its weights in pytorch_model.bin, a format that can run code: convert it with "
                "transformers (AutoModelForCausalLM.from_pretrained(...).save_pretrained(...))"
            )
        raise ValueError(f"{directory} contains no model.safetensors: pass the directory of a model")
    weights = {}
    for file_name in file_names:
        path = f"{directory}/{file_name}"
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path} is not a regular file")  # opening a named pipe would wait forever
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {path} ({error})") from None
        for name, tensor in tensors.items():
            weights[name.removeprefix("transformer.")] = tensor
    # transformers once stored each block's causal mask, and may store the output head, which is the embedding.
    buffers = (".attn.bias", ".attn.masked_bias")
    weights = {name: weight for name, weight in weights.items() if not name.endswith(buffers)}
    embedding = weights.get("wte.weight")
    head = weights.pop("lm_head.weight", embedding)
    if embedding is None or (head is not embedding and not torch.equal(head, embedding)):
        raise ValueError(f"{directory}: lm_head.weight differs from wte.weight, but GPT-2's head is its embedding")
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise ValueError(f"{directory}: {name} has dtype {weight.dtype}, but it must be floating point")
        if name.endswith(TRANSPOSED) and weight.dim() == 2:
            weights[name] = weight.T
    weights["wte.weight"] = embedding[: config["vocab_size"]]
    return weights


# --- end of copied block: pretrained ---


# --- copied block: get_tokenizer ---
def get_tokenizer(name):
    """Return the tokenizer "gpt2" (50,257 tokens) or "bytes" (the 256 bytes and <|endoftext|>).

    tiktoken downloads GPT-2's vocabulary on first use, or reads it from TIKTOKEN_CACHE_DIR. "bytes" needs no
    network. Raises ValueError if the vocabulary cannot be loaded.
    """
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # network, disk or a wrong file: these errors share no base class
            raise ValueError(
                f"cannot load GPT-2's vocabulary ({type(error).__name__}): connect to the network once, "
                "or set TIKTOKEN_CACHE_DIR to a directory that contains it"
            ) from None
    byte_ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding(
        name,
        pat_str=r"(?s:.{1,1000})",  # where text is split does not matter, because no tokens are merged
        mergeable_ranks=byte_ranks,
        special_tokens={"<|endoftext|>": 256},
    )


# --- end of copied block: get_tokenizer ---


# --- copied block: pick_device ---
def pick_device(name):
    """Return the torch.device with this name. "auto" is the accelerator if there is one, otherwise the CPU."""
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
        fail(f"--device {name} is not available here: omit it, or use --device cpu")


# --- end of copied block: pick_device ---


# --- copied block: load_model ---
def is_out_of_memory(error):
    """Return whether an exception says that the memory of the CPU or of the GPU is used up."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def load_model(name, device, dtype):
    """Load --model. Returns (model, tokenizer, directory). Exits if it cannot be loaded.

    name is a directory with a model, the directory of a run (its newest checkpoint is used), or the name of a model
    on the Hugging Face Hub.
    """
    if name == "log" and not os.path.isdir(name):
        fail("there is no checkpoint in log/: train a model with python train_gpt2.py, or choose one with --model")
    try:
        directory = find_pretrained(name)
        model = GPT.from_pretrained(directory, device, dtype)
        tokenizer = get_tokenizer(model.config["tokenizer"])
    except ValueError as error:
        fail(f"--model {name}: {error}")
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail(f"--model {name} does not fit into the memory of {device}: use a smaller model, or --dtype bfloat16")
    return model, tokenizer, directory


# --- end of copied block: load_model ---


# -------------------------------------------------------------------------------- command line
def get_args():
    """Parse the command line. Exits on invalid values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see --help")  # one line, as for all other errors
    parser.add_argument(
        "--model",
        default="log",
        help="directory of a model, directory of a run (its newest checkpoint is used),\n"
        "or name of a GPT-2 on the Hugging Face Hub (default: log)",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="HellaSwag examples as JSON lines or parquet (default: the validation set,\n"
        f"in {PARQUET_PATH} or {JSONL_PATH},\nor downloaded on first use)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N examples (default: all examples)")
    parser.add_argument(
        "--output", metavar="FILE", help="write all losses and predictions to this JSON file (default: no file)"
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help=f"evaluate nothing, but tokenize the examples for train_gpt2.py\nand write them to {PREPARED_PATH}",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        metavar="N",
        help="examples per batch; results do not depend on it\n(default: 8 on a CPU, 32 on other devices)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="dtype of weights and activations (default: bfloat16 on GPUs that support it,\nfloat32 elsewhere)",
    )
    args = parser.parse_args()
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            fail(f"--{name} is {value}: it must be at least 1")
    if args.output:
        directory = os.path.dirname(args.output) or "."
        is_other = os.path.exists(args.output) and not os.path.isfile(args.output)
        if is_other or not os.path.isdir(directory):
            fail(f"--output {args.output} cannot be written: choose a file in a directory that exists")
    return args


def prepare(args):
    """Tokenize the examples for train_gpt2.py (--prepare)."""
    try:
        tokenizer = get_tokenizer("gpt2")
    except ValueError as error:
        fail(error)
    examples = load_examples(args.data, tokenizer, args.limit)
    write_prepared(PREPARED_PATH, examples)
    print(f"wrote {len(examples):,} examples to {PREPARED_PATH}")


def predict(model, examples, batch_size):
    """Return one dict per example with its losses and predictions, as in --output. Shows a progress bar.

    Raises ValueError if a loss is NaN or infinite.
    """
    predictions = [None] * len(examples)
    num_done = 0
    num_correct = 0
    with tqdm(total=len(examples), unit="examples", disable=None) as progress:  # None: only on a terminal
        for i, totals, means in evaluate(model, examples, batch_size):
            example = examples[i]
            if not math.isfinite(sum(totals)):
                raise ValueError(f"the losses of example {example.ind} are {totals}")
            predictions[i] = {
                "ind": example.ind,
                "label": example.label,
                "pred": totals.index(min(totals)),
                "pred_norm": means.index(min(means)),
                "losses": totals,
                "mean_losses": means,
            }
            num_done += 1
            num_correct += predictions[i]["pred_norm"] == example.label
            progress.set_postfix_str(f"acc_norm: {num_correct / num_done:.4f}", refresh=False)
            progress.update()
    return predictions


def main():
    args = get_args()
    # cuDNN's attention builds a new plan for every new length, which takes longer than the attention itself. Here
    # nearly every batch has another length, so PyTorch's other attention kernels are used.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if args.prepare:
        prepare(args)
        return

    # The model and the examples.
    device = pick_device(args.device)
    dtype = args.dtype
    if dtype is None:
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float32"
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that support it
    model, tokenizer, directory = load_model(args.model, device, DTYPES[dtype])
    model_name = directory if os.path.isdir(args.model) else args.model
    examples = load_examples(args.data, tokenizer, args.limit)
    n = len(examples)
    n_positions = model.config["n_positions"]
    num_long = sum(row_length(example) > n_positions for example in examples)
    if num_long:
        print(f"{num_long} of {n} examples are longer than {n_positions} tokens: their contexts are cut from the left")

    batch_size = args.batch_size or (8 if device.type == "cpu" else 32)
    try:
        predictions = predict(model, examples, batch_size)
    except ValueError as error:
        fail(f"{error}: try --dtype float32, or choose another model than --model {model_name}")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fail(f"{batch_size} examples do not fit into the memory of {device}: use a smaller --batch_size")
    acc = sum(prediction["pred"] == prediction["label"] for prediction in predictions) / n
    acc_norm = sum(prediction["pred_norm"] == prediction["label"] for prediction in predictions) / n

    # Printed before --output is written, so that the result is not lost if that fails.
    print(f"{n} acc: {acc:.4f} acc_norm: {acc_norm:.4f}", flush=True)
    if args.output:
        result = {"model": model_name, "n": n, "acc": acc, "acc_norm": acc_norm, "predictions": predictions}
        with open_atomically(args.output) as file:
            file.write(json.dumps(result).encode())


if __name__ == "__main__":
    run_script(main)
