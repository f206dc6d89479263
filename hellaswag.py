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

A model that only continues text cannot answer a multiple-choice question. But it computes the
probability of each token given the tokens before it. So we can measure how likely each ending is
after the context, and take the most likely ending as the answer. The loss of a token is -ln of its
probability: the lower, the more likely. The losses of the four endings could be

    ending   tokens   total loss   mean loss per token
         0        7         24.5                  3.50
         1       11         41.8                  3.80
         2       12         34.8                  2.90    <- the correct ending
         3        6         23.4                  3.90

acc picks the ending with the lowest total loss. Here it is ending 3, which is wrong: a short ending
has an advantage, because its total has fewer terms. acc_norm picks the ending with the lowest mean
loss per token. Here it is ending 2, which is correct. Both are reported as the fraction of examples
that are answered correctly. Random guessing gives 0.25.

As in build-nanogpt and llm.c, the context and " " + ending are tokenized separately, and the losses
of the context do not count. With --model gpt2 --dtype float32, the last line of the output is

    10042 acc: 0.2859 acc_norm: 0.2955

These are the values that build-nanogpt reports. bfloat16, the default on most GPUs, may change the
last digits. Larger models, and models trained on more tokens, reach higher values.

The validation set (10,042 examples) is downloaded once, to hellaswag/hellaswag_val.parquet. --data
FILE reads another file. --output FILE writes the losses of every ending as JSON. --prepare writes
hellaswag/hellaswag_val.npz. For GPT-2 124M, an evaluation takes about an hour on two CPU cores in
float32. On a GPU it should take about a minute, which has not been measured.

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
from collections import defaultdict
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
HUB_PATH = "data/validation-00000-of-00001.parquet"  # the validation set in that data set
PARQUET_PATH = "hellaswag/hellaswag_val.parquet"  # where the download is stored
JSONL_PATH = "hellaswag/hellaswag_val.jsonl"  # the same as JSON lines, used if it exists
PREPARED_PATH = "hellaswag/hellaswag_val.npz"  # written by --prepare and read by train_gpt2.py
NUM_EXAMPLES = 10042  # in the validation set
CPU_GROUP_SIZE = 8  # number of endings that a CPU processes together


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
    """Compute the losses of endings in nats.

    contexts is a list of B contexts, each a list of n tokens. endings[b] is a list of the k endings
    of contexts[b], which may have different lengths. Returns the total loss and the mean loss per
    token of each ending, two float64 tensors (B, k) on the CPU.

    The simplest method would process k complete rows "context + ending" per example. But these
    rows begin with the same context. So each context is processed once, and its attention keys and
    values are copied for the k endings. The losses are the same. With four endings, this is two to
    three times less work.
    """
    B = len(contexts)
    k = len(endings[0])
    n = len(contexts[0])
    device = model.wte.weight.device

    # 1. Process the contexts. The hidden state of the last token of a context predicts the first
    # token of each of its endings.
    cache = model.new_cache(B, n)
    x = model(torch.tensor(contexts, device=device), cache)  # (B, n) -> (B, n, C)
    x = x[:, -1:]  # (B, n, C) -> (B, 1, C)

    # 2. Put the B * k endings into one list: rows[i] belongs to context i // k. The order of
    # processing is from the shortest to the longest ending.
    rows = []
    for endings_of_example in endings:
        rows += endings_of_example
    order = sorted(range(B * k), key=lambda i: len(rows[i]))

    # 3. Process the endings in groups. On a CPU, small groups of similar length save time, because
    # they need little padding. On a GPU, one large group is faster in spite of its padding.
    group_size = CPU_GROUP_SIZE if device.type == "cpu" else B * k
    totals = torch.zeros(B * k, dtype=torch.float64)
    for start in range(0, B * k, group_size):
        group = order[start : start + group_size]  # N indices of rows
        rows_of_group = [rows[i] for i in group]
        longest = max(len(row) for row in rows_of_group)
        context_of_row = torch.tensor([i // k for i in group], device=device)  # (N,)
        # The last token of an ending predicts nothing that we need, so the cache has no room for it.
        copies = cache.select(context_of_row, n + longest - 1)
        losses = compute_losses(model, copies, x[context_of_row], rows_of_group)  # (N, longest)
        totals[group] = losses.sum(dim=1)

    lengths = torch.tensor([len(row) for row in rows])  # (B * k,)
    means = totals / lengths
    return totals.view(B, k), means.view(B, k)


def compute_losses(model, cache, x, rows):
    """Compute the loss of each token of N rows. Returns float64, (N, T), with zeros at padding.

    rows are lists of at most T tokens. Row i continues sequence i of the cache, and x (N, 1, C) is
    the last hidden state of that sequence.
    """
    # Pad the rows at the end. Causal attention looks at earlier tokens only, so padding does not
    # change the losses of the tokens before it.
    N = len(rows)
    T = max(len(row) for row in rows)
    tokens = torch.zeros(N, T, dtype=torch.int64)
    is_token = torch.zeros(N, T, dtype=torch.bool)  # False at padding
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        is_token[i, : len(row)] = True
    tokens = tokens.to(x.device)
    is_token = is_token.to(x.device)

    # Compute the hidden states that predict the tokens: x predicts the first token of each row.
    # The last token of a row predicts nothing that we need.
    if T > 1:
        rest = model(tokens[:, :-1], cache)  # (N, T - 1) -> (N, T - 1, C)
        x = torch.cat((x, rest), dim=1)  # (N, 1, C) -> (N, T, C): x[:, t] predicts tokens[:, t]

    # Compute logits and losses in chunks of 1,024 tokens, because logits are large: 206 MB per
    # chunk with GPT-2's vocabulary. Padding is left out.
    x = x[is_token]  # (N, T, C) -> (M, C) for M tokens in all rows
    y = tokens[is_token]  # (N, T) -> (M,)
    losses = []
    for x_chunk, y_chunk in zip(x.split(1024), y.split(1024), strict=True):
        logits = model.logits(x_chunk).float()  # (1024, C) -> (1024, vocab_size)
        losses.append(F.cross_entropy(logits, y_chunk, reduction="none"))

    # Put the M losses back where their tokens are.
    loss_of_token = torch.zeros(N, T, device=x.device)
    loss_of_token[is_token] = torch.cat(losses)
    # float64, so that rounding in the sums cannot decide between two endings. Apple's GPUs do not
    # have it, so the CPU converts.
    return loss_of_token.cpu().double()


def score_long_example(model, example):
    """Score an example that is longer than the model's n_positions. Returns (totals, means).

    Only the last n_positions tokens of each row "context + ending" are used. So the rows have
    different parts of the context, and each ending is scored by itself.
    """
    totals = []
    means = []
    for ending in example.endings:
        tokens = (example.context + ending)[-model.config["n_positions"] :]
        # Nothing predicts the first token. It counts as context even if it is part of the ending.
        n = max(1, len(tokens) - len(ending))
        total, mean = score_endings(model, [tokens[:n]], [[tokens[n:]]])  # two (1, 1) tensors
        totals.append(total.item())
        means.append(mean.item())
    return totals, means


def row_length(example):
    """Return the number of tokens in the longest of the four rows "context + ending"."""
    return len(example.context) + max(len(ending) for ending in example.endings)


def make_batches(examples, batch_size):
    """Group examples whose contexts have the same length, as score_endings needs them.

    examples is a dict {index: Example}. Returns lists of at most batch_size indices.
    """
    # Sort by the longest row, so that the endings of a batch have similar lengths and need little
    # padding.
    order = sorted(examples, key=lambda i: row_length(examples[i]), reverse=True)
    indices_by_length = defaultdict(list)  # length of the context -> indices
    for i in order:
        indices_by_length[len(examples[i].context)].append(i)

    # Begin with the longest contexts: if the memory is too small for them, the error comes at once.
    batches = []
    for length in sorted(indices_by_length, reverse=True):
        indices = indices_by_length[length]
        for start in range(0, len(indices), batch_size):
            batches.append(indices[start : start + batch_size])
    return batches


def evaluate(model, examples, batch_size):
    """Yield (index, total losses, mean losses) for each example, in the order of computation.

    The losses are lists of four numbers in nats.
    """
    n_positions = model.config["n_positions"]
    short_examples = {}
    for i, example in enumerate(examples):
        if row_length(example) > n_positions:
            totals, means = score_long_example(model, example)
            yield i, totals, means
        else:
            short_examples[i] = example

    for batch in make_batches(short_examples, batch_size):
        contexts = [examples[i].context for i in batch]
        endings = [examples[i].endings for i in batch]
        totals, means = score_endings(model, contexts, endings)  # two (B, 4) tensors
        yield from zip(batch, totals.tolist(), means.tolist(), strict=True)


# ---------------------------------------------------------------------------------------- data
def check_example(example):
    """Raise ValueError with the reason if example is not a dict with the fields of HellaSwag."""
    if not isinstance(example, dict):
        raise ValueError("it is not a JSON object")
    ind = example.get("ind")
    label = example.get("label")
    context = example.get("ctx")
    endings = example.get("endings")

    # bool is a subclass of int in Python, so isinstance would accept true.
    if type(ind) is not int:
        raise ValueError(f"'ind' must be the number of the example, but it is {ind!r}")
    # The Hub's file has labels as text. str makes 1 and "1" equal, but not true or 1.0.
    if str(label) not in ("0", "1", "2", "3"):
        raise ValueError(f"'label' must be 0 to 3, but it is {label!r}")
    if not isinstance(context, str) or not context:
        raise ValueError("'ctx' must be a text that is not empty")
    if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings):
        raise ValueError("'endings' must be a list of texts")
    if len(endings) != 4:
        raise ValueError(f"'endings' must be four texts, but there are {len(endings)}")


def read_json_lines(path):
    """Read a file with one JSON value per line. Raises ValueError if a line is not valid JSON."""
    with open(path, "rb") as file:
        lines = file.read().rstrip().split(b"\n")
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {path} is not valid JSON ({error})") from None
    return values


def read_parquet(path):
    """Read the rows of a parquet file as dicts. Raises ValueError if the file is damaged."""
    try:
        table = pq.read_table(path, columns=["ind", "label", "ctx", "endings"])
        return table.to_pylist()
    except Exception as error:  # damaged files raise many types of errors
        raise ValueError(f"{path} does not contain HellaSwag examples ({error})") from None


def read_hellaswag(path, num_examples=None):
    """Read the examples of a JSON-lines or parquet file. Returns a list of dicts.

    Each has the fields of HellaSwag ("ind", "label", "ctx" and "endings") with valid values. Raises
    ValueError if an example is malformed, or if the number of examples is not num_examples (None:
    any number but 0). Raises OSError if the file cannot be read.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file")  # opening a named pipe would wait forever
    with open(path, "rb") as file:
        is_parquet = file.read(4) == b"PAR1"  # every parquet file begins with these bytes
    examples = read_parquet(path) if is_parquet else read_json_lines(path)

    # Check every example. An error names the row or the line.
    unit = "row" if is_parquet else "line"
    for number, example in enumerate(examples, 1):
        try:
            check_example(example)
        except ValueError as error:
            where = f"{unit} {number} of {path}"
            raise ValueError(f"{where} is not a HellaSwag example: {error}") from None

    # Check the number of examples.
    if num_examples is not None and len(examples) != num_examples:
        counts = f"{len(examples)} examples, but the validation set has {num_examples}"
        raise ValueError(f"{path} contains {counts}")
    if not examples:
        raise ValueError(f"{path} contains no examples")
    return examples


@contextmanager
def open_atomically(path):
    """Open a temporary file for writing bytes, and rename it to path when it is complete.

    If writing fails, path stays as it was.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):  # it does not exist any more if it was renamed
            os.remove(temporary)


def download_hellaswag():
    """Download the validation set to PARQUET_PATH. Returns its examples. Exits if that fails."""
    from huggingface_hub import HfApi, hf_hub_download  # imported here because it is slow

    try:
        # Ask for the newest commit. Without a network, this question fails at once, but
        # hf_hub_download would try again for 20 seconds.
        info = HfApi().dataset_info(REPO_ID, files_metadata=True)
        checksums = {}
        for file in info.siblings or []:
            if file.lfs is not None:  # the Hub knows the SHA-256 of large files
                checksums[file.rfilename] = file.lfs.sha256

        # Download the file to a temporary directory and check it, so that a damaged file is not
        # kept.
        with tempfile.TemporaryDirectory() as directory:
            path = hf_hub_download(
                REPO_ID,
                HUB_PATH,
                repo_type="dataset",
                revision=info.sha,
                local_dir=directory,
            )
            with open(path, "rb") as file:
                content = file.read()
            actual = hashlib.sha256(content).hexdigest()
            if checksums.get(HUB_PATH, actual) != actual:
                raise ValueError(f"{HUB_PATH} does not match its SHA-256")
            examples = read_hellaswag(path, NUM_EXAMPLES)
    except Exception as error:  # the errors of the Hub and of its HTTP client share no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        fail(
            f"cannot download HellaSwag (data set {REPO_ID} of the Hugging Face Hub): {reason}: "
            "run the same command again, put the validation set at "
            f"{JSONL_PATH} or {PARQUET_PATH} by hand, or pass it with --data FILE"
        )
    os.makedirs(os.path.dirname(PARQUET_PATH), exist_ok=True)
    with open_atomically(PARQUET_PATH) as file:
        file.write(content)
    return examples


def load_examples(path, tokenizer, limit=None):
    """Read and tokenize the first limit examples. Exits if they cannot be read.

    path is the value of --data. None means the validation set.
    """
    advice = "choose another file with --data FILE"
    try:
        if path is not None:
            examples = read_hellaswag(path)
        elif os.path.exists(PARQUET_PATH):
            advice = f"delete {PARQUET_PATH} to download it again, or {advice}"
            examples = read_hellaswag(PARQUET_PATH, NUM_EXAMPLES)
        elif os.path.exists(JSONL_PATH):
            advice = f"delete {JSONL_PATH} to download the examples, or {advice}"
            examples = read_hellaswag(JSONL_PATH, NUM_EXAMPLES)
        else:
            examples = download_hellaswag()
        return [tokenize(example, tokenizer) for example in examples[:limit]]
    except (OSError, ValueError) as error:
        fail(f"{error}: {advice}")


def tokenize(example, tokenizer):
    """Return an Example for a dict with the fields of HellaSwag."""
    # GPT-2's tokens of words begin with a space, so each ending gets one. Context and endings are
    # tokenized separately, so that the tokens of the context are the same for all endings.
    return Example(
        ind=example["ind"],
        label=int(example["label"]),
        context=encode(tokenizer, example["ctx"]),
        endings=[encode(tokenizer, f" {ending}") for ending in example["endings"]],
    )


def write_prepared(path, examples):
    """Write tokenized examples for train_gpt2.py as a NumPy file with these arrays:

    tokens          (N, 4, T) uint16, rows "context + ending", padded with zeros at the end
    context_length  (N,) int64, number of tokens in the context
    length          (N, 4) int64, number of tokens in each row
    label           (N,) int64, number of the correct ending

    The examples are sorted by their longest row, the shortest first, so that batches of neighbors
    need little padding. T is the length of the longest row of all.
    """
    examples = sorted(examples, key=row_length)
    N = len(examples)
    T = row_length(examples[-1])
    tokens = np.zeros((N, 4, T), dtype=np.uint16)
    context_length = np.zeros(N, dtype=np.int64)
    length = np.zeros((N, 4), dtype=np.int64)
    label = np.zeros(N, dtype=np.int64)
    # fill the arrays, one example after the other
    for i, example in enumerate(examples):
        context_length[i] = len(example.context)
        label[i] = example.label
        for j, ending in enumerate(example.endings):
            row = example.context + ending
            tokens[i, j, : len(row)] = row
            length[i, j] = len(row)

    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open_atomically(path) as file:
        np.savez_compressed(
            file,
            tokens=tokens,
            context_length=context_length,
            length=length,
            label=label,
        )


# --- copied block: encode ---
def encode(tokenizer, text):
    """Return the tokens of a text. Special tokens in it are treated as ordinary text.

    Raises ValueError if tiktoken cannot tokenize it.
    """
    # tiktoken crashes if a text has about a million whitespace characters in a row. A text that is
    # shorter than the limit cannot contain such a run.
    limit = 900_000
    if len(text) > limit:
        longest = max(map(len, re.findall(r"\s+", text)), default=0)
        if longest > limit:
            raise ValueError(f"a text has {longest:,} whitespace characters in a row: use at most {limit:,}")
    return tokenizer.encode_ordinary(text)


# --- end of copied block: encode ---


# --------------------------------------------------------------------------------------- model
# --- copied block: GPT ---
# GPT-2 for inference. Modules and parameters have the same names as in train_gpt2.py and in
# transformers. Differences from train_gpt2.py:
# - a key/value cache: each token is processed once, and not again for every token after it
# - forward() returns hidden states, and logits() computes the logits that are needed
# - no loss, no dropout, no initialization of weights, no padding of the vocabulary
#
# Shapes: B is the batch size, T the number of new tokens, S the number of all tokens so far, C the
# number of channels (768 in GPT-2 124M), nh the number of heads (12), hs = C / nh the size of a
# head (64).
class KVCache:
    """The attention keys and values of all tokens that the model has processed so far.

    In causal attention, the keys and values of a token do not depend on later tokens. So they are
    computed once and kept, and a forward pass processes only the new tokens.
    """

    def __init__(self, shape, device, dtype):
        """Allocate an empty cache of shape (n_layer, B, nh, max_length, hs)."""
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # number of tokens in the cache

    def append(self, layer, k, v):
        """Store k and v (B, nh, T, hs) of T new tokens in a layer.

        Returns the keys and values of all S tokens, two tensors (B, nh, S, hs). GPT.forward
        increases self.length when all layers have stored theirs.
        """
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, sequences, max_length):
        """Return a cache with copies of some sequences, and memory for max_length tokens of each.

        sequences (N,) are indices from 0 to B - 1. An index may occur several times: then several
        continuations of this sequence can be computed.
        """
        n_layer, _, n_head, _, head_size = self.keys.shape
        shape = (n_layer, len(sequences), n_head, max_length, head_size)
        copy = KVCache(shape, self.keys.device, self.keys.dtype)
        copy.length = self.length
        copy.keys[:, :, :, : self.length] = self.keys[:, sequences, :, : self.length]
        copy.values[:, :, :, : self.length] = self.values[:, sequences, :, : self.length]
        return copy


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config, layer):
        super().__init__()
        C = config["n_embd"]
        self.n_head = config["n_head"]
        self.layer = layer  # index of this layer's keys and values in the cache
        self.c_attn = nn.Linear(C, 3 * C)  # queries, keys and values of all heads in one matmul
        self.c_proj = nn.Linear(C, C)

    def forward(self, x, mask, cache):
        B, T, C = x.shape
        nh = self.n_head

        # queries, keys and values of the new tokens
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) -> (B, T, 3C) -> three of (B, T, C)
        q = q.view(B, T, nh, C // nh).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        k = k.view(B, T, nh, C // nh).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        v = v.view(B, T, nh, C // nh).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)

        # add the keys and values of the earlier tokens
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, nh, T, hs) -> (B, nh, S, hs)

        # attention, in three cases:
        # - no earlier tokens: is_causal hides later tokens, which is faster than a mask
        # - earlier tokens and one new token: it attends to all of them, so mask is None
        # - earlier tokens and several new tokens: mask (T, S) hides later tokens
        is_causal = k.shape[2] == T
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)

        # concatenate the heads
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, nh, T, hs) -> (B, T, nh, hs) -> (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """A two-layer MLP that is applied to each position independently."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config["n_embd"], config["n_inner"])
        self.activation = ACTIVATIONS[config["activation_function"]]
        self.c_proj = nn.Linear(config["n_inner"], config["n_embd"])

    def forward(self, x):
        x = self.activation(self.c_fc(x))  # (B, T, C) -> (B, T, n_inner)
        return self.c_proj(x)  # (B, T, n_inner) -> (B, T, C)


class Block(nn.Module):
    """Attention, then the MLP, each behind a LayerNorm and with a residual connection."""

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
    """GPT-2. config is a dict as read_config returns it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config["vocab_size"], config["n_embd"])  # tokens; also the head
        self.wpe = nn.Embedding(config["n_positions"], config["n_embd"])  # positions
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config["n_layer"])])
        self.ln_f = nn.LayerNorm(config["n_embd"], eps=config["layer_norm_epsilon"])

    @classmethod
    def from_pretrained(cls, directory, device="cpu", dtype=torch.float32):
        """Load a model from a directory with config.json and safetensors files.

        Raises ValueError if there is no GPT-2 in it, or if its files are damaged.
        """
        config = read_config(directory)
        weights = read_weights(directory, config)
        for name, weight in weights.items():
            # Some weights are transposed views. Contiguous weights are faster.
            weights[name] = weight.to(device, dtype).contiguous()

        # Create the model without memory for its weights (on the device "meta"), and make the
        # loaded tensors its parameters (assign=True). So the weights exist only once.
        with torch.device("meta"):
            model = cls(config)
        try:
            model.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            # The message lists missing names, unexpected names and wrong shapes, one per line.
            reason = " ".join(str(error).split())
            raise ValueError(f"{directory} does not match its config.json: {reason}") from None
        return model

    def new_cache(self, batch_size, max_length):
        """Return an empty cache for batch_size sequences of at most max_length tokens."""
        n_head = self.config["n_head"]
        head_size = self.config["n_embd"] // n_head
        shape = (self.config["n_layer"], batch_size, n_head, max_length, head_size)
        return KVCache(shape, self.wte.weight.device, self.wte.weight.dtype)

    def forward(self, idx, cache=None):
        """Return the final hidden states (B, T, C) of the tokens idx (B, T).

        With a cache, idx continues the sequences in the cache. The keys and values of idx are
        added to the cache.
        """
        T = idx.shape[1]
        start = 0 if cache is None else cache.length  # position of the first new token

        # If there are earlier tokens and several new ones, attention needs a mask (T, S): new token
        # i is at position start + i and attends to the positions 0 to start + i. A single new token
        # attends to all positions.
        mask = None
        if start > 0 and T > 1:
            mask = torch.ones(T, start + T, dtype=torch.bool, device=idx.device).tril(start)

        # token embeddings plus position embeddings
        positions = torch.arange(start, start + T, device=idx.device)  # (T,)
        x = self.wte(idx) + self.wpe(positions)  # (B, T, C) + (T, C) -> (B, T, C)

        # all blocks, the final LayerNorm
        for block in self.h:
            x = block(x, mask, cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def logits(self, x):
        """Return the logits (..., vocab_size) of the next token for hidden states x (..., C)."""
        return F.linear(x, self.wte.weight)  # the output head is the token embedding


# --- end of copied block: GPT ---


# ------------------------------------------------------------------------------------- loading
# --- copied block: fail ---
def fail(message):
    """Report a user error in one line on stderr and exit with status 2."""
    one_line = " ".join(str(message).split())  # some messages have several lines
    print(f"error: {one_line}", file=sys.stderr)
    sys.exit(2)


# --- end of copied block: fail ---


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


# --- copied block: read_json ---
def read_json(path):
    """Return the JSON object in a file as a dict.

    Raises ValueError if the content is not a JSON object, OSError if the file cannot be read.
    """
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
# Hugging Face stores these weights as (in, out), because GPT-2's linear layers were written as
# convolutions.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def find_pretrained(name):
    """Return the directory of a model: name itself, the newest checkpoint in it, or a download.

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
    """Return the config.json of a GPT-2, with GPT-2's values for missing fields.

    The field tokenizer, "gpt2" or "bytes", is added, and vocab_size is that of the tokenizer: rows
    of the token embedding beyond it are padding, which some tools add. Raises ValueError if the
    file cannot be read or describes a model that is not supported.
    """
    path = f"{directory}/config.json"
    try:
        saved = read_json(path)
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): it is not the directory of a model") from None
    if saved.get("model_type") != "gpt2":
        raise ValueError(f"{path}: model_type is {saved.get('model_type')!r}, but only gpt2 is supported")
    # fields that the file lacks get these values
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
    # a file may contain anything: check the types and the ranges
    for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "n_inner"):
        if type(config[name]) is not int or not 0 < config[name] < 2**31:
            raise ValueError(f"{path}: {name} is {config[name]!r}, but it must be a positive integer")
    for name in ("layer_norm_epsilon", "resid_pdrop"):
        if type(config[name]) not in (int, float) or not 0 <= config[name] < 1:
            raise ValueError(f"{path}: {name} is {config[name]!r}, but it must be a number, at least 0 and below 1")
    if config["n_embd"] % config["n_head"]:
        raise ValueError(f"{path}: n_embd {config['n_embd']} is not divisible by n_head {config['n_head']}")
    if config["activation_function"] not in list(ACTIVATIONS):
        raise ValueError(f"{path}: activation_function {config['activation_function']!r} is not supported")
    # variants of GPT-2 that transformers supports and this script does not
    for name in ("tie_word_embeddings", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
        if config[name] is not defaults[name]:
            raise ValueError(f"{path}: {name} {config[name]!r} is not supported")
    # The size of the vocabulary tells which tokenizer it is. Some tools pad the vocabulary to a
    # multiple of a number, of 512 at most, so up to 511 more rows are accepted.
    for tokenizer, vocab_size in (("gpt2", 50257), ("bytes", 257)):
        if vocab_size <= config["vocab_size"] < vocab_size + 512 and config["tokenizer"] in (None, tokenizer):
            config["tokenizer"], config["vocab_size"] = tokenizer, vocab_size
            return config
    raise ValueError(
        f"{path}: vocab_size {config['vocab_size']} with tokenizer {config['tokenizer']!r} is not supported: "
        "use 50257 (gpt2) or 257 (bytes)"
    )


def read_weights(directory, config):
    """Return the parameters of a GPT-2 by name, with weights of shape (out, in) as in nn.Linear.

    The weights may be stored with or without the prefix "transformer.", in one file or in shards
    with an index file. Raises ValueError if they are damaged or not a GPT-2's.
    """
    # find the files: those that the index lists, or model.safetensors
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
    # read the files
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
    # older versions of transformers stored the causal mask of each block: drop it
    buffers = (".attn.bias", ".attn.masked_bias")
    weights = {name: weight for name, weight in weights.items() if not name.endswith(buffers)}
    # check the embedding, and drop its rows of padding
    embedding = weights.get("wte.weight")
    if embedding is None or embedding.shape[1:] != (config["n_embd"],) or len(embedding) < config["vocab_size"]:
        raise ValueError(
            f"{directory} does not match its config.json: wte.weight must have at least {config['vocab_size']} rows "
            f"of {config['n_embd']} numbers"
        )
    weights["wte.weight"] = embedding[: config["vocab_size"]]
    # the output head, if it is stored, must be the embedding
    head = weights.pop("lm_head.weight", embedding)
    if head is not embedding and not torch.equal(head, embedding):
        raise ValueError(f"{directory}: lm_head.weight differs from wte.weight, but GPT-2's head is its embedding")
    # check the types, and transpose the matrices from (in, out) to (out, in)
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise ValueError(f"{directory}: {name} has dtype {weight.dtype}, but it must be floating point")
        if name.endswith(TRANSPOSED) and weight.dim() == 2:
            weights[name] = weight.T
    return weights


# --- end of copied block: pretrained ---


# --- copied block: get_tokenizer ---
def get_tokenizer(name):
    """Return the tokenizer "gpt2" (50,257 tokens) or "bytes" (the 256 bytes and <|endoftext|>).

    tiktoken downloads GPT-2's vocabulary on first use, or reads it from TIKTOKEN_CACHE_DIR. "bytes"
    needs no network. Raises ValueError if the vocabulary cannot be loaded.
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


# --- copied block: load_model ---
def is_out_of_memory(error):
    """Return whether an exception says that the memory of the CPU or of the GPU is used up."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "allocate memory" in str(error)  # PyTorch's RuntimeError on a CPU


def load_model(name, device, dtype):
    """Load --model. Returns (model, tokenizer, directory). Exits if it cannot be loaded.

    name is the directory of a model, the directory of a run (its newest checkpoint is used), or
    the name of a model on the Hugging Face Hub.
    """
    # The default is log/. A newcomer who has not trained a model yet needs other advice than
    # someone who mistyped a name.
    if name == "log" and not os.path.isdir(name):
        advice = "train a model with python train_gpt2.py, or choose a model with --model"
        fail(f"found no checkpoint in log/: {advice}")
    try:
        directory = find_pretrained(name)
        model = GPT.from_pretrained(directory, device, dtype)
        tokenizer = get_tokenizer(model.config["tokenizer"])
    except ValueError as error:
        fail(f"--model {name}: {error}")
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "use a smaller model, or --dtype bfloat16"
        fail(f"--model {name} does not fit into the memory of {device}: {advice}")
    return model, tokenizer, directory


# --- end of copied block: load_model ---


# -------------------------------------------------------------------------------- command line
def get_args():
    """Parse the command line. Exits on invalid values."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.error = lambda message: fail(f"{message}: see --help")  # one line, as all errors

    group = parser.add_argument_group("what to evaluate")
    group.add_argument(
        "--model",
        default="log",
        help="directory of a model, directory of a run (its newest checkpoint is used),\n"
        "or name of a GPT-2 on the Hugging Face Hub (default: log)",
    )
    group.add_argument(
        "--data",
        metavar="FILE",
        help="HellaSwag examples as JSON lines or parquet (default: the validation set,\n"
        f"from {PARQUET_PATH} or {JSONL_PATH}\nif one of them exists, otherwise downloaded)",
    )
    group.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="use only the first N examples (default: all)",
    )

    group = parser.add_argument_group("what to write")
    group.add_argument(
        "--output",
        metavar="FILE",
        help="JSON file for the losses and predictions of all examples (default: none)",
    )
    group.add_argument(
        "--prepare",
        action="store_true",
        help="tokenize the examples for train_gpt2.py instead of evaluating a model,\n"
        f"and write them to {PREPARED_PATH}",
    )

    group = parser.add_argument_group("how to compute")
    group.add_argument(
        "--batch_size",
        type=int,
        metavar="N",
        help="number of examples per batch; affects speed and memory, not results\n"
        "(default: 8 on a CPU, 32 on other devices)",
    )
    group.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:1, mps, ... (default: auto, the GPU if there is one)",
    )
    group.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="dtype for weights and activations (default: bfloat16 on CUDA GPUs that\nsupport it, otherwise float32)",
    )

    args = parser.parse_args()
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            fail(f"--{name} is {value}: it must be at least 1")
    # An evaluation may take an hour, so check now that its result can be written.
    if args.output:
        directory = os.path.dirname(args.output) or "."
        is_other = os.path.exists(args.output) and not os.path.isfile(args.output)
        if is_other or not os.path.isdir(directory):
            fail(f"cannot write --output {args.output}: choose a file in a directory that exists")
    return args


def pick_dtype(name, device):
    """Return the name of the dtype to use. name is the value of --dtype, None for the default."""
    if name is not None:
        return name
    # Older GPUs only emulate bfloat16, which is slow.
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"


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
    """Return a list with one dict per example: its losses and predictions, as in --output.

    Shows a progress bar on a terminal. Raises ValueError if a loss is NaN or infinite.
    """
    predictions = [None] * len(examples)
    # disable=None means: no progress bar if stderr is not a terminal.
    with tqdm(total=len(examples), unit="examples", disable=None) as progress:
        for i, totals, means in evaluate(model, examples, batch_size):
            example = examples[i]
            if not math.isfinite(sum(totals)):
                raise ValueError(f"the losses of example {example.ind} are {totals}")
            predictions[i] = {
                "ind": example.ind,
                "label": example.label,
                "pred": totals.index(min(totals)),  # the lowest total loss
                "pred_norm": means.index(min(means)),  # the lowest mean loss per token
                "losses": totals,
                "mean_losses": means,
            }
            progress.update()
    return predictions


def accuracy(predictions, name):
    """Return the fraction of correct predictions.

    name is "pred" for acc, and "pred_norm" for acc_norm.
    """
    num_correct = sum(prediction[name] == prediction["label"] for prediction in predictions)
    return num_correct / len(predictions)


def main():
    args = get_args()
    if args.prepare:
        prepare(args)
        return

    # Do not use cuDNN's attention: it builds a new plan for each new length, which takes longer
    # than the attention itself, and the length changes with nearly every batch. Use TF32 for
    # float32 matmuls, which is faster, on GPUs that support it.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high")

    # Load the model and the examples.
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer, directory = load_model(args.model, device, DTYPES[dtype])
    # If --model is a run, the output names the checkpoint that was used. For a model on the Hub,
    # directory is a folder in the cache of its downloads, and --model says more.
    model_name = directory if os.path.isdir(args.model) else args.model
    examples = load_examples(args.data, tokenizer, args.limit)
    n = len(examples)

    # Report how many examples are too long for the model. GPT-2 has 1,024 positions, enough for all.
    n_positions = model.config["n_positions"]
    num_long = sum(row_length(example) > n_positions for example in examples)
    if num_long:
        print(
            f"{num_long} of {n} examples are longer than {n_positions} tokens: "
            "the beginnings of their contexts are not used"
        )

    # Compute the losses of all examples.
    batch_size = args.batch_size or (8 if device.type == "cpu" else 32)
    try:
        predictions = predict(model, examples, batch_size)
    except ValueError as error:
        fail(f"{error}: try --dtype float32, or choose another model than --model {model_name}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"a batch of {batch_size} examples does not fit into the memory of {device}"
        fail(f"{reason}: use a smaller --batch_size")
    acc = accuracy(predictions, "pred")
    acc_norm = accuracy(predictions, "pred_norm")

    # Print the result before writing --output, so that it is not lost if writing fails.
    print(f"{n} acc: {acc:.4f} acc_norm: {acc_norm:.4f}", flush=True)
    if args.output:
        result = {
            "model": model_name,
            "n": n,
            "acc": acc,
            "acc_norm": acc_norm,
            "predictions": predictions,
        }
        with open_atomically(args.output) as file:
            file.write(json.dumps(result).encode())


if __name__ == "__main__":
    run_script(main)
