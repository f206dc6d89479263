"""
Lesson 3: pre-train GPT-2 (124M to 1.6B parameters) on a CPU, one GPU or many GPUs.

    python prepare_shakespeare.py
    python train_gpt2.py --preset shakespeare                # 0.8M parameters, a minute on two CPU cores

    python fineweb.py
    python hellaswag.py --prepare                            # optional: HellaSwag scores during training
    python train_gpt2.py                                     # GPT-2 124M on one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py   # the same on eight GPUs
    torchrun --standalone --nproc_per_node=8 --max-restarts=3 train_gpt2.py --resume
                                                             # the same, restarted after a crash

Reads the token shards in --data_dir and, if it exists, hellaswag/hellaswag_val.npz. Writes to
--log_dir: log.txt with one "step kind value" line per metric (train, val, hella, lr, norm, tok/s
and, for each float16 step that was skipped, skipped), run.json with the settings, checkpoints
step_NNNNNN/, and with --save_best the best model, best/. transformers'
AutoModelForCausalLM.from_pretrained loads both. A step sees the same tokens on any number of
processes.

The loss at step 0 is about ln(vocab_size) + n_embd * 0.02^2 / 2 (half the variance of the logits):
10.98 for GPT-2 124M, 5.58 for --preset shakespeare, which ends at 1.55 nats per byte. The full run
of the 124M model has not been made with this script yet (docs/reproduce.md).

Sections: errors, model, data, optimizer, evaluation, run directory, resuming, stopping, command
line, setup, training loop. In a hurry, read main() at the end.
"""

import argparse
import errno
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
import uuid
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP

HELLASWAG_PATH = "hellaswag/hellaswag_val.npz"  # written by hellaswag.py --prepare


# --------------------------------------------------------------------------------------- errors
class UserError(Exception):
    """A mistake that the user can correct. run() prints it in one line."""


class RankError(UserError):
    """A UserError that may occur on one rank only, such as a damaged shard."""


def fail(message):
    """Raise UserError."""
    raise UserError(message)


@contextmanager
def explain(problem, advice, error_class=UserError):
    """Turn any error in the with block into one line: what failed, why, and what to do."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files raise errors of many types
        # other messages, such as that of a KeyError, say nothing without the type
        is_clear = isinstance(error, (OSError, ValueError)) and str(error)
        reason = str(error) if is_clear else f"{type(error).__name__}: {error}"
        raise error_class(f"{problem} ({reason[:300]}): {advice}") from error


def say(message, file=None):
    """Print on rank 0. A closed terminal or a full disk must not end a run."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            print(message, file=file, flush=True)


def warn(message):
    """Print a warning on rank 0."""
    say(f"warning: {message}", file=sys.stderr)


# ---------------------------------------------------------------------------------------- model
class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention: each of the n_head heads has n_embd / n_head channels."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.attn_dropout = config.dropout
        self.resid_dropout = nn.Dropout(config.dropout)
        # one matmul computes the queries, keys and values of all heads
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        # mixes the outputs of the heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        # B is the batch size, T the sequence length, C the number of channels, nh the number of
        # heads and hs the size of a head. In GPT-2 124M, C = nh * hs = 12 * 64 = 768.
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, 3C) -> 3 x (B, T, C)
        # The heads become a batch dimension, so that each head attends by itself.
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        # softmax(q k^T / sqrt(hs)) v with the future masked out. The fused kernel (FlashAttention)
        # never stores the (T, T) attention matrix, which makes it several times faster than
        # separate matmuls.
        dropout_p = self.attn_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, nh, T, hs) -> (B, T, C): concatenate the heads
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """A two-layer MLP, applied to each position independently."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C) -> (B, T, 4C) -> (B, T, C)
        x = self.gelu(self.c_fc(x))
        return self.resid_dropout(self.c_proj(x))


class Block(nn.Module):
    """Attention (communication), then the MLP (computation), each with a residual connection."""

    def __init__(self, config):
        super().__init__()
        # Pre-norm: each sublayer normalizes its input, and the residual stream itself is never
        # normalized, so that gradients flow through it unchanged.
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


@dataclass
class GPTConfig:
    """Hyperparameters of a GPT-2. The defaults are those of the 124M model."""

    vocab_size: int = 50257
    block_size: int = 1024  # maximum sequence length (n_positions in Hugging Face configs)
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    tokenizer: str = "gpt2"  # the tokenizer that the token ids belong to: "gpt2" or "bytes"


def cross_entropy(logits, targets):
    """Return F.cross_entropy(logits.float(), targets) for logits (N, V) and targets (N,)."""
    # On a CPU, the rows are processed in chunks of 16 MiB: the C library returns freed tensors
    # above 32 MiB to the operating system, and getting the memory again takes several times as
    # long as the computation. PyTorch keeps the freed memory of a GPU.
    chunk_size = len(logits)
    if logits.device.type == "cpu":
        chunk_size = max(1, 2**22 // logits.shape[1])  # rows of float32 in 16 MiB
    chunks = zip(logits.split(chunk_size), targets.split(chunk_size), strict=True)
    losses = [F.cross_entropy(x.float(), y, reduction="sum") for x, y in chunks]
    return sum(losses) / len(targets)


class GPT(nn.Module):
    """GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # The vocabulary is padded to a multiple of 128, which makes matmuls faster: 50,257 rows
        # become 50,304. Padding rows are zero, and checkpoints do not contain them.
        padded_vocab_size = math.ceil(config.vocab_size / 128) * 128
        # GPT-2's names: wte and wpe embed tokens and positions, h are the blocks
        self.wte = nn.Embedding(padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # logits of -inf give the padding rows a probability of zero
        head_bias = torch.zeros(padded_vocab_size)
        head_bias[config.vocab_size :] = -math.inf
        self.register_buffer("head_bias", head_bias, persistent=False)
        self.init_weights()

    def init_weights(self):
        """Initialize weights with standard deviation 0.02 and biases with zeros.

        As in GPT-2, except that OpenAI's code uses 0.01 for the position embedding.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # Each block adds two such projections to the residual stream. Scaling them down
                # keeps its variance from growing with depth.
                std = 0.02 * (2 * self.config.n_layer) ** -0.5
                nn.init.normal_(parameter, std=std)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.wte.weight[self.config.vocab_size :])

    def forward(self, idx, targets=None):
        """Compute logits, or the loss if targets are given, for token ids idx (B, T).

        Returns (logits, None) with logits (B, T, vocab_size), or (None, loss) with the mean
        cross-entropy in nats over targets (B, T). Training does not need the logits.
        """
        # embed the tokens and their positions
        T = idx.shape[1]
        x = self.wte(idx) + self.wpe.weight[:T]  # (B, T, C) + (T, C) -> (B, T, C)
        x = self.drop(x)
        # transform them in n_layer blocks
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        # wte is also the output layer: compare x with the embedding of each of the V tokens
        logits = F.linear(x, self.wte.weight, self.head_bias)  # (B, T, C) -> (B, T, V)
        if targets is None:
            return logits[..., : self.config.vocab_size], None
        return None, cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, generator, top_k=50):
        """Append max_new_tokens tokens to idx (B, T), each one of the top_k most likely ones.

        Each token recomputes the whole sequence. sample.py has a cache.
        """
        self.eval()
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])  # (B, T, vocab_size)
            logits = logits[:, -1].float()  # the last position predicts the next token
            # sample one of the k most likely tokens
            top_logits, top_idx = logits.topk(min(top_k, logits.shape[-1]))  # (B, k), (B, k)
            probs = F.softmax(top_logits, dim=-1)
            choice = torch.multinomial(probs, 1, generator=generator)  # (B, 1), an index into the k
            idx = torch.cat((idx, top_idx.gather(1, choice)), dim=1)  # (B, T + 1)
        return idx

    @property
    def num_params(self):
        """Number of parameters without the vocabulary padding: 124,439,808 in GPT-2 124M."""
        num_padding_rows = self.wte.num_embeddings - self.config.vocab_size
        num_with_padding = sum(parameter.numel() for parameter in self.parameters())
        return num_with_padding - num_padding_rows * self.config.n_embd

    def save_pretrained(self, directory):
        """Write float32 weights and config.json as transformers' GPT2LMHeadModel does.

        A model that differs from GPT-2, for example in its norms or positions, needs a model_type
        of its own in GPT2_FIELDS: with "gpt2", transformers would load it and compute something
        else.
        """
        # no padding rows, matrices as (in, out), and a prefix of the names
        weights = {}
        for name, weight in self.state_dict().items():
            if name == "wte.weight":
                weight = weight[: self.config.vocab_size]
            if name.endswith(TRANSPOSED):
                weight = weight.T
            weights[f"transformer.{name}"] = weight.float().cpu().contiguous()
        eot_token = VOCAB_SIZES[self.config.tokenizer] - 1  # <|endoftext|> has the last id
        config = {
            **GPT2_FIELDS,
            "architectures": ["GPT2LMHeadModel"],
            "dtype": "float32",
            "tokenizer": self.config.tokenizer,
            "vocab_size": self.config.vocab_size,
            "n_positions": self.config.block_size,
            "n_layer": self.config.n_layer,
            "n_head": self.config.n_head,
            "n_embd": self.config.n_embd,
            "resid_pdrop": self.config.dropout,
            "embd_pdrop": self.config.dropout,
            "attn_pdrop": self.config.dropout,
            "bos_token_id": eot_token,
            "eos_token_id": eot_token,
        }
        os.makedirs(directory, exist_ok=True)
        save_file(weights, f"{directory}/model.safetensors", metadata={"format": "pt"})
        write_json(f"{directory}/config.json", config)
        # without it, transformers' pipeline generates up to 256 tokens, even beyond block_size
        generation_config = {
            "max_length": self.config.block_size,
            "bos_token_id": eot_token,
            "eos_token_id": eot_token,
        }
        write_json(f"{directory}/generation_config.json", generation_config)

    @classmethod
    def from_pretrained(cls, name, block_size=None, dropout=0.0):
        """Load a GPT-2 from a checkpoint, a run directory (its newest checkpoint), or the Hub.

        A block_size that is smaller than the model's crops the position embeddings.
        """
        with explain(f"cannot load {name}", "pass a model, a run or the name of a GPT-2 on the Hub"):
            saved, weights = read_pretrained(find_pretrained(name))
            config = GPTConfig(
                vocab_size=saved["vocab_size"],
                block_size=block_size or saved["n_positions"],
                n_layer=saved["n_layer"],
                n_head=saved["n_head"],
                n_embd=saved["n_embd"],
                dropout=dropout,
                tokenizer=saved["tokenizer"],
            )
            if config.block_size > saved["n_positions"]:
                problem = f"--block_size {block_size} is above the {saved['n_positions']} positions"
                fail(f"{problem} of {name}: use a smaller one")
            model = cls(config)
            # add the padding rows, which the files do not contain, and drop unused positions
            padding = model.wte.weight[config.vocab_size :].detach()
            weights["wte.weight"] = torch.cat((weights["wte.weight"].float(), padding))
            weights["wpe.weight"] = weights["wpe.weight"][: config.block_size]
            model.load_state_dict(weights)  # refuses wrong names and shapes
        return model


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
# ----------------------------------------------------------------------------------------- data
# --- copied block: files ---
@contextmanager
def atomic_write(path):
    """Open a binary file that gets its name only when it is complete and on the disk."""
    with open(f"{path}.tmp", "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def write_json(path, content):
    """Write a JSON file atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def sha256_of(path):
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- end of copied block: files ---
# --- copied block: load_shard ---
def load_shard(path):
    """Memory-map a token shard, a .npy file or a .bin file of llm.c. Returns a uint16 array (N,)."""
    if path.endswith(".npy"):
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    else:  # 256 int32: magic number, version, number of tokens, zeros
        magic, _, num_tokens = np.fromfile(path, "<i4", count=3).tolist()
        if magic != 20240520:
            raise ValueError("it does not begin with llm.c's number 20240520")
        tokens = np.memmap(path, "<u2", mode="r", offset=1024, shape=(num_tokens,))
    if tokens.dtype != np.dtype("<u2") or tokens.ndim != 1:
        raise ValueError(f"it contains {tokens.dtype} in {tokens.ndim} dimensions, not uint16 in one")
    return tokens


# --- end of copied block: load_shard ---
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
def split_of(name):
    """Return "train" or "val" for a shard's name, such as fineweb_train_000001.bin, or None."""
    # a name with a slash or a drive would lead out of the directory
    match = re.fullmatch(r"[^./\\:][^/\\:]*_(train|val)(_\d+)?\.(npy|bin)", name)
    return match[1] if match else None


def read_data_set(data_dir):
    """Return meta.json with the size of each shard and a fingerprint of the tokens and their order."""
    advice = "create it with prepare_shakespeare.py (seconds) or fineweb.py (hours)"
    with explain(f"cannot use --data_dir {data_dir}", advice):
        names = os.listdir(data_dir)
        if "meta.json" in names:
            with open(f"{data_dir}/meta.json", encoding="utf-8") as file:
                meta = json.load(file)
        elif any(name.startswith("state_") for name in names):
            raise ValueError("fineweb.py has not finished it")
        else:  # a data set of build-nanogpt or llm.c
            shards = [{"file": name} for name in names if split_of(name)]
            meta = {"tokenizer": "gpt2", "shards": shards}
        if meta["tokenizer"] not in VOCAB_SIZES:
            raise ValueError(f"its tokenizer {meta['tokenizer']} is unknown")
        digest = hashlib.sha256(meta["tokenizer"].encode())
        for shard in sorted(meta["shards"], key=lambda shard: shard["file"]):
            if split_of(shard["file"]) is None:
                raise ValueError(f"meta.json lists {shard['file']}, which is not a shard's name")
            path = os.path.join(data_dir, shard["file"])
            with explain(f"cannot use {path}", "regenerate it"):
                tokens = load_shard(path)
                if shard.get("tokens", len(tokens)) != len(tokens):
                    raise ValueError(f"it has {len(tokens)} tokens, in meta.json {shard['tokens']}")
            shard["tokens"] = len(tokens)
            # a shard without a checksum is identified by its first tokens, 64M tokens in all
            beginning = tokens[: 2**26 // len(meta["shards"])]
            identity = shard.get("sha256") or hashlib.sha256(beginning.tobytes()).hexdigest()
            digest.update(f"{shard['file']} {len(tokens)} {identity}\n".encode())
    return {"source": None, **meta, "fingerprint": f"{meta['tokenizer']}-{digest.hexdigest()[:12]}"}


class TokenDataset:
    """One split of a data set, cut into windows of block_size + 1 tokens.

    A window holds block_size inputs and their targets, which are the same tokens shifted by one.
    Consecutive windows share one token, so that every token is a target once per epoch, except the
    first token of a shard and the last ones that do not fill a window.

    Windows are numbered from the start of training. The number alone determines the tokens, on any
    number of processes: with shuffle, an epoch visits the shards, and the windows of each shard, in
    an order that depends on the seed and the epoch only; otherwise in file order.
    """

    def __init__(self, data_dir, split, meta, block_size, seed, shuffle):
        shards = [shard for shard in meta["shards"] if split_of(shard["file"]) == split]
        shards = sorted(shards, key=lambda shard: shard["file"])
        self.paths = [os.path.join(data_dir, shard["file"]) for shard in shards]
        self.checksums = [shard.get("sha256") for shard in shards]
        self.num_tokens = np.array([shard["tokens"] for shard in shards], dtype=np.int64)
        self.vocab_size = VOCAB_SIZES[meta["tokenizer"]]
        self.block_size = block_size
        self.seed = seed
        self.shuffle = shuffle
        self.windows_per_shard = np.maximum(self.num_tokens - 1, 0) // block_size
        self.num_windows = int(self.windows_per_shard.sum())  # per epoch
        if self.num_windows == 0:
            problem = f"{data_dir} has no shard *_{split}_* with more than {block_size} tokens"
            fail(f"{problem}: use a smaller --block_size, or create it with prepare_shakespeare.py")
        self.open_shards = {}  # shard number -> memory-mapped tokens

    def locate(self, index):
        """Return (shard number, offset of the first token) of the window with this index."""
        epoch, index = divmod(index, self.num_windows)
        # the shard that contains the window: the first one that ends after it
        order, ends = self.shard_order(epoch)
        position = int(np.searchsorted(ends, index, side="right"))
        shard = int(order[position])
        # the number of the window in the shard
        window = index - int(ends[position] - self.windows_per_shard[shard])
        if self.shuffle:
            window = int(self.window_order(epoch, shard)[window])
        return shard, window * self.block_size

    @lru_cache(maxsize=4)  # noqa: B019, a data set lives as long as the process
    def shard_order(self, epoch):
        """Return the order of the shards in an epoch, and their cumulative numbers of windows."""
        order = np.arange(len(self.paths))
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        return order, np.cumsum(self.windows_per_shard[order])

    @lru_cache(maxsize=4)  # noqa: B019
    def window_order(self, epoch, shard):
        """Return the order in which an epoch visits the windows of a shard."""
        rng = np.random.default_rng((self.seed, epoch, shard))
        return rng.permutation(self.windows_per_shard[shard])

    def open_shard(self, shard):
        """Return the tokens of a shard, and verify its checksum when it is opened."""
        # hashing all shards when the run starts would take minutes
        if shard not in self.open_shards:
            path, checksum = self.paths[shard], self.checksums[shard]
            with explain(f"cannot use {path}", "regenerate it and use --resume", RankError):
                tokens = load_shard(path)
                if checksum and sha256_of(path) != checksum:
                    raise ValueError("it does not match its SHA-256 in meta.json")
                if len(tokens) != self.num_tokens[shard]:
                    raise ValueError("it has changed since the run started")
            if len(self.open_shards) == 16:  # close the one that was opened first
                self.open_shards.pop(next(iter(self.open_shards)))
            self.open_shards[shard] = tokens
        return self.open_shards[shard]

    def check_open_shards(self):
        """Raise RankError if an open shard is missing or has become shorter."""
        # the missing end would read as zeros, or end the process with SIGBUS
        for shard, tokens in self.open_shards.items():
            path = self.paths[shard]
            with explain(f"cannot use {path}", "regenerate it and use --resume", RankError):
                if os.path.getsize(path) < tokens.offset + tokens.nbytes:
                    raise ValueError("it was truncated while the run was using it")

    def batch(self, indices):
        """Return the windows with these indices as an int64 tensor (B, block_size + 1)."""
        windows = []
        for index in indices:
            shard, start = self.locate(index)
            window = self.open_shard(shard)[start : start + self.block_size + 1]
            # a wrong tokenizer would read beyond the embedding's rows
            if window.max() >= self.vocab_size:
                problem = f"{self.paths[shard]} contains token id {window.max()}"
                raise RankError(f"{problem}, but ids are below {self.vocab_size}: regenerate it")
            windows.append(window)
        return torch.from_numpy(np.stack(windows).astype(np.int64))


def to_device(tensor, device):
    """Copy a tensor to the device. Copies to a GPU run while the GPU computes."""
    if device.type == "cuda":
        # only copies from pinned memory are asynchronous, and only contiguous tensors are pinned
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def load_batch(dataset, indices, device):
    """Return inputs x (B, T) and targets y (B, T), which are one token later, on the device."""
    windows = to_device(dataset.batch(indices), device)  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


def load_micro_batch(dataset, micro_step, micro_batch_size, process):
    """Return the inputs and targets of this rank in a micro-step.

    A training step has grad_accum_steps micro-steps, numbered from the start of training. In each,
    every rank computes the gradients of one micro-batch of micro_batch_size windows.
    """
    first = (micro_step * process.world_size + process.rank) * micro_batch_size
    return load_batch(dataset, range(first, first + micro_batch_size), process.device)


# ------------------------------------------------------------------------------------ optimizer
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
DECAY_FRACTION = 0.6  # of the steps, as in modded-nanogpt's recipes for Muon


def get_wsd_lr(step, learning_rate, warmup_steps, max_steps):
    """Return the learning rate of a step: warmup, stable, then linear decay to zero (WSD)."""
    # warmup reaches 1 at the end of the warmup, and decay is above 1 until the decay begins
    warmup = (step + 1) / max(1, warmup_steps)
    decay = (max_steps - step) / (DECAY_FRACTION * max_steps)
    return learning_rate * min(1.0, warmup, decay)


SCHEDULES = {"cosine": get_lr, "wsd": get_wsd_lr}


class Muon(torch.optim.Optimizer):
    """Muon: SGD with momentum whose updates are orthogonalized (Keller Jordan et al., 2024).

    The update of a weight matrix is usually dominated by a few directions. Muon replaces it by the
    nearest matrix whose singular values are all about 1, so that rare directions are learned as
    fast as common ones. It is meant for the matrices of the blocks, not for vectors and not for
    embeddings, which are lookup tables.
    """

    def __init__(self, blocks, learning_rate, weight_decay):
        # c_attn stacks three matrices, for queries, keys and values, to orthogonalize separately
        self.num_parts = {}  # parameter -> number of matrices in it
        for name, parameter in blocks.named_parameters():
            if parameter.dim() == 2:
                self.num_parts[parameter] = 3 if name.endswith("c_attn.weight") else 1
        defaults = {"lr": learning_rate, "weight_decay": weight_decay, "momentum": 0.95}
        super().__init__(list(self.num_parts), defaults)

    @torch.no_grad()
    def step(self):
        """Update all parameters from their gradients."""
        group = self.param_groups[0]
        # compute each matrix's update, and stack updates of equal shape
        stacks = {}  # shape of a matrix -> [(parameter, updates of its parts)]
        for parameter in group["params"]:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            # Nesterov momentum: look one step ahead of the running average of the gradients.
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(state["momentum"], group["momentum"])
            # (parts * out, in) -> (parts, out, in)
            update = update.view(self.num_parts[parameter], -1, parameter.shape[1])
            stacks.setdefault(update.shape[1:], []).append((parameter, update))

        # orthogonalize each stack, and apply its updates
        for shape, members in stacks.items():
            updates = torch.cat([update for _, update in members])  # (matrices, out, in)
            updates = orthogonalize_in_parallel(updates)
            # An orthogonal matrix has an RMS of max(shape) ** -0.5. Scale it to that of AdamW's
            # updates, about 0.2, so that AdamW's learning rates are a good start ("Muon is Scalable
            # for LLM Training", 2025, equation 4).
            scale = 0.2 * max(shape) ** 0.5
            sizes = [len(update) for _, update in members]
            for (parameter, _), update in zip(members, updates.split(sizes), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)


def orthogonalize_in_parallel(matrices):
    """Return orthogonalize(matrices), matrices (N, m, n): each rank computes a part of it."""
    if not dist.is_initialized():
        return orthogonalize(matrices)
    # every rank takes the same number of matrices: zero matrices pad the stack
    world_size = dist.get_world_size()
    per_rank = math.ceil(len(matrices) / world_size)
    padding = matrices.new_zeros(per_rank * world_size - len(matrices), *matrices.shape[1:])
    parts = torch.cat((matrices, padding)).split(per_rank)
    own = orthogonalize(parts[dist.get_rank()]).contiguous()
    results = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(results, own)
    return torch.cat(results)[: len(matrices)]


def orthogonalize(x):
    """Replace the singular values of matrices x (N, m, n) by values near 1. Returns (N, m, n).

    Runs five Newton-Schulz iterations with a polynomial of degree 5, after which nearly all
    singular values are between 0.7 and 1.2.
    """
    # bfloat16 is precise enough, but slow on most CPUs
    if x.device.type == "cuda":
        x = x.bfloat16()
    # x x^T is smaller than x^T x if x has fewer rows than columns
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    # the iteration needs singular values of at most 1: none is larger than the Frobenius norm
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    # these coefficients raise small singular values quickly, and do not converge exactly
    for _ in range(5):
        # x <- 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x
        gram = x @ x.mT  # (N, m, m)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if is_tall else x


OPTIMIZERS = ("adamw", "muon")  # the choices of --optimizer


def configure_optimizers(model, optimizer, learning_rate, weight_decay, device):
    """Return [AdamW], or [Muon, AdamW] with Muon for the matrices of the blocks.

    To add an optimizer, add its name above and its parameters here.
    """
    optimizers = []
    parameters = list(model.parameters())
    if optimizer == "muon":
        muon = Muon(model.h, learning_rate, weight_decay)
        optimizers.append(muon)
        parameters = [p for p in parameters if p not in muon.num_parts]
    # AdamW takes the other parameters, with the settings of GPT-3. Biases and layer norms are not
    # decayed: pulling these few parameters to zero would only limit what the model can express.
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")  # one kernel for all parameters
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)
    optimizers.append(adamw)
    return optimizers


def update_parameters(model, optimizers, scaler, lr, grad_clip):
    """Clip the gradients and run the optimizers. Returns the norm of all gradients before clipping."""
    # float16 only: divide the gradients by the factor by which the loss was multiplied
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    # float16 only: if a gradient overflowed, skip the step of all optimizers, and scaler.update()
    # halves its factor. scaler.step checks each optimizer by itself, so it could skip AdamW alone.
    # Reading the norm makes the CPU wait for the GPU, which other dtypes avoid.
    skip = scaler.is_enabled() and not math.isfinite(norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not skip:
            scaler.step(optimizer)
    scaler.update()
    return norm


# ----------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(compiled_model, model, val_data, val_tokens, batch_size, process, autocast, stop_request):
    """Return the mean loss in nats per token over the first val_tokens tokens of a split.

    All ranks share the work and return the same value, or None if a rank was asked to stop.
    """
    model.eval()
    # at least one window, at most the whole split
    num_windows = max(1, min(val_tokens // val_data.block_size, val_data.num_windows))
    totals = torch.zeros(2, device=process.device)  # loss, ranks that were asked to stop
    # the ranks take turns: rank r evaluates the batches r, r + world_size, ...
    for first in range(process.rank * batch_size, num_windows, process.world_size * batch_size):
        if stop_request.requested():
            break
        indices = range(first, min(first + batch_size, num_windows))
        x, y = load_batch(val_data, indices, process.device)
        # a smaller last batch would compile the model again
        forward = compiled_model if len(indices) == batch_size else model
        with autocast:
            _, loss = forward(x, y)
        totals[0] += loss * len(indices)
    totals[1] = stop_request.requested()
    total_loss, num_stopped = sum_over_ranks(totals).tolist()
    return None if num_stopped else total_loss / num_windows


def load_hellaswag(args, tokenizer):
    """Return a dict of int64 tensors that hellaswag.py --prepare wrote, or None without HellaSwag.

    tokens (N, 4, T) are the context and each of the four endings, padded with zeros; length (N, 4)
    is the number of tokens of both together, and context_length (N,) of the context alone; label
    (N,) is the number of the correct ending. Examples are sorted by length, which saves padding.
    """
    if args.hellaswag_interval == 0 or tokenizer != "gpt2":
        return None
    if not os.path.exists(HELLASWAG_PATH):
        say(f"no HellaSwag: create {HELLASWAG_PATH} with python hellaswag.py --prepare")
        return None
    names = ("tokens", "context_length", "length", "label")
    advice = "repeat python hellaswag.py --prepare, or pass --hellaswag_interval 0"
    with explain(f"cannot use {HELLASWAG_PATH}", advice):
        with np.load(HELLASWAG_PATH, allow_pickle=False) as file:
            examples = {name: torch.from_numpy(file[name].astype(np.int64)) for name in names}
        longest = int(examples["length"].max())
    if longest > args.block_size:
        say(f"no HellaSwag: it needs a --block_size of {longest}, not {args.block_size}")
        return None
    return examples


# cuDNN's attention is the fastest one for training, but it builds a new plan for each sequence
# length, which takes longer than the attention itself. HellaSwag and samples have many lengths, for
# which these kernels are faster.
ANY_LENGTH_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.no_grad()
def evaluate_hellaswag(model, examples, micro_batch_size, process, autocast, stop_request):
    """Return the HellaSwag accuracy acc_norm, or None if a rank was asked to stop.

    The model's choice among four endings is the one with the lowest mean loss per token; acc_norm
    is the fraction of correct choices. hellaswag.py explains it with an example.
    """
    model.eval()
    device = process.device
    num_examples = len(examples["label"])
    # at most 32 examples, and no more tokens than in a micro-batch of training
    batch_size = micro_batch_size * model.config.block_size // (4 * int(examples["length"].max()))
    batch_size = max(1, min(32, batch_size))
    totals = torch.zeros(2, device=device)  # correct choices, ranks that were asked to stop
    for first in range(process.rank * batch_size, num_examples, process.world_size * batch_size):
        if stop_request.requested():
            break
        rows = slice(first, first + batch_size)
        # Padding to multiples of 64 keeps the number of different lengths small.
        T = math.ceil(int(examples["length"][rows].max()) / 64) * 64
        T = min(T, model.config.block_size, examples["tokens"].shape[2])
        tokens = to_device(examples["tokens"][rows, :, :T], device)  # (B, 4, T)
        context_length = to_device(examples["context_length"][rows], device)  # (B,)
        length = to_device(examples["length"][rows], device)  # (B, 4)
        label = to_device(examples["label"][rows], device)  # (B,)

        # the loss of each token given the tokens before it
        with autocast, sdpa_kernel(ANY_LENGTH_BACKENDS):
            logits, _ = model(tokens.flatten(0, 1))  # (4B, T, V)
        logits = logits[:, :-1].flatten(0, 1).float()  # (4B * (T - 1), V)
        targets = tokens[:, :, 1:]  # (B, 4, T - 1)
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)

        # the mean over the tokens of each ending, without context and padding
        position = torch.arange(1, T, device=device)  # of the targets
        is_ending = (position >= context_length[:, None, None]) & (position < length[:, :, None])
        mean_loss = (losses * is_ending).sum(dim=2) / is_ending.sum(dim=2)  # (B, 4)
        totals[0] += (mean_loss.argmin(dim=1) == label).sum()
    totals[1] = stop_request.requested()
    num_correct, num_stopped = sum_over_ranks(totals).tolist()
    return None if num_stopped else num_correct / num_examples


def load_tokenizer(name):
    """Return the tokenizer for the samples, or None if it cannot be loaded."""
    try:
        return get_tokenizer(name)
    except Exception as error:  # errors of the network, the disk and tiktoken share no base class
        warn(f"no samples, because GPT-2's vocabulary cannot be loaded ({type(error).__name__})")
        return None


def print_samples(model, enc, args, device, autocast):
    """Print two continuations of args.prompt, sampled with a random generator of their own."""
    # an empty prompt becomes <|endoftext|>, which starts every document
    tokens = enc.encode_ordinary(args.prompt) or [enc.eot_token]
    idx = torch.tensor([tokens, tokens], device=device)  # (2, T)
    generator = torch.Generator(device).manual_seed(42)
    with autocast, sdpa_kernel(ANY_LENGTH_BACKENDS):
        idx = model.generate(idx, args.max_new_tokens, generator)
    for row in idx.tolist():
        # control characters could confuse a terminal
        text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in enc.decode(row))
        say("> " + text.replace("\n", "\n> "))


def print_evaluations(model, val_data, hellaswag, args, process, autocast):
    """Print the validation loss and the HellaSwag score, for --eval_only."""
    # signals are not handled: they end the process, because there is nothing to save
    evaluation_args = (args.micro_batch_size or 8, process, autocast, StopRequest(process))
    val_loss = evaluate(model, model, val_data, args.val_tokens, *evaluation_args)
    say(f"val loss: {val_loss:.4f}")
    if hellaswag:
        accuracy = evaluate_hellaswag(model, hellaswag, *evaluation_args)
        say(f"HellaSwag acc_norm: {accuracy:.4f}")


# -------------------------------------------------------------------------------- run directory
CHECKPOINT_FORMAT = 3  # increase it when older checkpoints can no longer be resumed
RESUME_FILES = ("config.json", "model.safetensors", "trainer.pt")
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # as on Lustre without flock
DISK_ERRORS = (OSError, RuntimeError, SafetensorError)  # of Python, torch.save and save_file


class RunDirectory:
    """A run's --log_dir: a lock, log.txt, run.json, checkpoints step_NNNNNN, and the best model.

    A model is written to the directory tmp, flushed to disk and renamed, so that it is either
    complete or absent. A checkpoint's sha256.json lets a later run detect damage. Only rank 0 opens
    the directory; on other ranks, the methods do nothing.
    """

    def __init__(self, path):
        self.path = path
        self.log_path = f"{path}/log.txt"
        self.best = f"{path}/best"
        self.tmp = f"{path}/tmp"
        self.lock = None
        self.log_file = None
        self.wandb_run = None
        self.saved_step = None  # the newest step that need not be saved
        self.best_loss = math.inf  # the lowest validation loss so far

    def open(self, args):
        """Lock the directory if it exists. Returns the checkpoint to resume from, or None.

        Damaged checkpoints after it are set aside, so that they are never counted again.
        """
        if not os.path.isdir(self.path):
            return None  # start() creates it when everything else has been checked
        if not args.eval_only:
            self.acquire_lock()
        checkpoints = checkpoints_in(self.path)
        if not args.resume:
            if not args.eval_only and (checkpoints or os.path.exists(self.log_path)):
                fail(f"--log_dir {self.path} contains a run: pass --resume, or choose another")
            return None
        # find the newest checkpoint that is intact
        damaged = []
        while checkpoints and not is_intact(checkpoints[-1]):
            damaged.append(checkpoints.pop())
        if damaged and not checkpoints:
            fail(f"all checkpoints are damaged ({', '.join(damaged)}): choose another --log_dir")
        for path in damaged:
            warn(f"{path} is damaged: {checkpoints[-1]} is used instead")
            if not args.eval_only:
                target = f"{self.path}/damaged_{os.path.basename(path)}"
                with explain(f"cannot rename {path}", "move it away"):
                    shutil.rmtree(target, ignore_errors=True)  # of an earlier attempt
                    os.replace(path, target)
        return checkpoints[-1] if checkpoints else None

    def acquire_lock(self):
        """Lock the directory, and create it if necessary."""
        # The operating system releases the lock when this process ends, even if it is killed.
        # filelock's fallback, a file without a lock, would remain and block --resume.
        with explain(f"cannot write to --log_dir {self.path}", "choose another --log_dir"):
            os.makedirs(self.path, exist_ok=True)
            self.lock = filelock.FileLock(f"{self.path}/lock", fallback_to_soft=False)
            try:
                self.lock.acquire(timeout=0)
            except filelock.Timeout:
                fail(f"--log_dir {self.path} is in use by another run: wait, or choose another")
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                warn(f"the disk of --log_dir {self.path} has no locks: start only one run in it")

    def start(self, step, args, settings):
        """Write run.json, and drop the lines of log.txt that this run will write again."""
        if self.lock is None:
            self.acquire_lock()
        self.saved_step = step  # a resumed run has this checkpoint, and step 0 is not saved
        with explain(f"cannot write to --log_dir {self.path}", "free space, or choose another"):
            # remove what a run that crashed has left
            shutil.rmtree(self.tmp, ignore_errors=True)
            if step == 0:
                shutil.rmtree(self.best, ignore_errors=True)
            # keep the lines of completed steps; a crash can leave half a line or zeros
            lines = []
            if os.path.exists(self.log_path):
                with open(self.log_path, encoding="utf-8", errors="replace") as file:
                    matches = [re.fullmatch(r"(\d+) (\S+) (\S+)\n", line) for line in file]
                lines = [match for match in matches if match and int(match[1]) < step]
            with atomic_write(self.log_path) as file:
                file.writelines(line[0].encode() for line in lines)
            val_losses = [float(line[3]) for line in lines if line[2] == "val"]
            self.best_loss = min(val_losses, default=math.inf)
            # a buffer of 16 MiB holds the lines while the disk is full
            self.log_file = open(self.log_path, "a", 2**24, encoding="utf-8")  # noqa: SIM115, kept
            if args.wandb:
                self.start_wandb(args.wandb, settings)
            write_json(f"{self.path}/run.json", settings)  # for plot.py and for people

    def start_wandb(self, project, settings):
        """Start a wandb run, or continue the one in run.json. Adds its id to settings."""
        settings["wandb_id"] = uuid.uuid4().hex
        with suppress(OSError, ValueError, KeyError):  # a new run has no run.json
            settings["wandb_id"] = json.loads(Path(self.path, "run.json").read_text())["wandb_id"]
        run = {"project": project, "id": settings["wandb_id"], "resume": "allow"}
        try:
            import wandb  # optional

            self.wandb_run = wandb.init(**run, dir=self.path, config=settings)
        except Exception as error:
            warn(f"no metrics go to Weights & Biases ({error}); training continues")

    def close(self, step):
        """Finish the log. Raises UserError if the last step could not be saved."""
        if self.wandb_run:
            with suppress(Exception):
                self.wandb_run.finish()
        if self.log_file and self.saved_step < step:
            fail(f"step {step} could not be saved: free some space, then continue with --resume")

    def log(self, step, **metrics):
        """Append a "step kind value" line for each of the metrics, and send them to wandb."""
        if self.log_file is None:
            return
        with self.continue_after_disk_errors(f"cannot write to {self.log_path}"):
            for kind, value in metrics.items():
                self.log_file.write(f"{step} {kind} {value}\n")
            self.log_file.flush()
        if self.wandb_run:
            with suppress(Exception):
                numbers = {kind: float(value) for kind, value in metrics.items()}
                self.wandb_run.log(numbers, step=step)

    def save(self, step, model, optimizers, scaler, args):
        """Save a checkpoint, unless it exists. A full disk is only reported."""
        if self.log_file is None or step <= self.saved_step:
            return
        with self.continue_after_disk_errors(f"cannot save a checkpoint at step {step}"):
            self.write_model(model, args.data_dir)
            # the data order and the random numbers follow from the seed and the step
            trainer_state = {
                "format": CHECKPOINT_FORMAT,
                "step": step,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "scaler": scaler.state_dict(),
                "args": vars(args),
            }
            torch.save(trainer_state, f"{self.tmp}/trainer.pt")
            checksums = {name: sha256_of(f"{self.tmp}/{name}") for name in RESUME_FILES}
            write_json(f"{self.tmp}/sha256.json", checksums)
            self.publish(f"step_{step:06d}")
            self.saved_step = step
            # delete old checkpoints only now that the new one is complete
            if args.keep_checkpoints:
                for path in checkpoints_in(self.path)[: -args.keep_checkpoints]:
                    shutil.rmtree(path, ignore_errors=True)

    def save_best(self, val_loss, model, args):
        """Save the model as best if its validation loss is the lowest so far."""
        if self.log_file is None or not val_loss < self.best_loss:
            return
        with self.continue_after_disk_errors("cannot save the best model"):
            self.write_model(model, args.data_dir)
            weights = f"{self.tmp}/model.safetensors"
            if os.path.isdir(self.best):  # its other files do not change
                flush_to_disk(weights)
                os.replace(weights, f"{self.best}/model.safetensors")
                shutil.rmtree(self.tmp)
            else:
                self.publish("best")
            self.best_loss = val_loss

    @contextmanager
    def continue_after_disk_errors(self, problem):
        """Turn a disk error in the with block, such as a full disk, into a warning."""
        try:
            yield
        except DISK_ERRORS as error:
            reason = str(error).partition("\n")[0]
            warn(f"{problem} ({reason}); training continues")
            shutil.rmtree(self.tmp, ignore_errors=True)

    def write_model(self, model, data_dir):
        """Write a Hugging Face model with its tokenizer to tmp."""
        shutil.rmtree(self.tmp, ignore_errors=True)
        model.save_pretrained(self.tmp)
        tokenizer_config = {"model_max_length": model.config.block_size}
        write_json(f"{self.tmp}/tokenizer_config.json", tokenizer_config)
        for name in ("vocab.json", "merges.txt"):
            if os.path.exists(f"{data_dir}/{name}"):
                shutil.copyfile(f"{data_dir}/{name}", f"{self.tmp}/{name}")

    def publish(self, name):
        """Flush tmp to the disk, then rename it, which makes it visible."""
        for file in os.listdir(self.tmp):
            flush_to_disk(f"{self.tmp}/{file}")
        flush_to_disk(self.tmp)
        os.replace(self.tmp, f"{self.path}/{name}")
        flush_to_disk(self.path)


def is_intact(checkpoint):
    """Return whether the files that resuming needs match the checksums in sha256.json."""
    try:
        with open(f"{checkpoint}/sha256.json", encoding="utf-8") as file:
            checksums = json.load(file)
        return all(sha256_of(f"{checkpoint}/{name}") == checksums[name] for name in RESUME_FILES)
    except (OSError, ValueError, KeyError):  # missing files, damaged JSON, missing checksums
        return False


def flush_to_disk(path):
    """Wait until a file or directory is on the disk, not only in the system's memory."""
    is_directory = os.path.isdir(path)
    # Windows and some network file systems cannot flush directories
    with suppress(OSError) if is_directory else nullcontext():
        descriptor = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ------------------------------------------------------------------------------------- resuming
# A resumed run may have other values of these flags. Those of the first line, and the number of
# processes, change the rounding and the dropout masks. The others do not change the weights.
FREE_FLAGS = {
    "device", "dtype", "micro_batch_size", "compile",
    "data_dir", "log_dir", "resume", "checkpoint_interval", "keep_checkpoints",
    "save_best", "eval_only", "eval_interval", "val_tokens", "hellaswag_interval",
    "prompt", "max_new_tokens", "log_interval", "wandb",
}  # fmt: skip


def load_trainer_state(checkpoint):
    """Return the content of trainer.pt."""
    with explain(f"cannot load {checkpoint}", "move it away to use the checkpoint before it"):
        # weights_only: the file cannot run code
        state = torch.load(f"{checkpoint}/trainer.pt", map_location="cpu", weights_only=True)
        if state["format"] != CHECKPOINT_FORMAT:
            fail(f"{checkpoint} is of an earlier version: start a new run from it with --init_from")
    return state


def resolve_flags(args, checkpoint, trainer_state):
    """Give flags that were not given the value of the checkpoint, the loaded model or the preset.

    Refuses flags that would change the result of a resumed run, or that do not fit together.
    """
    # a checkpoint has all flags, and the model of --init_from has those of its shape
    source, saved_flags = None, {}
    if checkpoint:
        source, saved_flags = checkpoint, trainer_state["args"]
    elif args.init_from:
        source, saved_flags = args.init_from, shape_of(args.init_from)
        if args.block_size:  # the block size may be smaller than that of the model
            saved_flags["block_size"] = args.block_size
    for name, saved in saved_flags.items():
        given = getattr(args, name, None)
        if given is None:
            setattr(args, name, saved)
        elif name == "dtype" and given != saved:
            warn(f"{source} was trained in {saved}: in {given}, the result differs by rounding")
        elif given != saved and name not in FREE_FLAGS and not args.eval_only:
            other = "choose another --log_dir" if checkpoint else "omit --init_from"
            advice = f"omit --{name}, or {other}"
            if name == "max_steps":
                # until the decay of wsd begins, the learning rate does not depend on max_steps
                decay_start = (1 - DECAY_FRACTION) * min(saved, given)
                if saved_flags["schedule"] == "wsd" and trainer_state["step"] <= decay_start:
                    continue
                advice = "to train longer, start a new run with --init_from and another --seed"
            fail(f"--{name} is {given}, but {source} has {saved}: {advice}")
    # the preset has the remaining flags
    args.preset = args.preset or "gpt2"
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    # refuse values that do not fit together
    if args.n_embd % args.n_head:
        fail(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}: choose a multiple")
    if args.wandb and find_spec("wandb") is None:
        fail("--wandb needs the package wandb: pip install wandb, or pass --wandb ''")
    if args.eval_only and not source:
        fail("--eval_only needs a model: pass --init_from, or --resume with the --log_dir of a run")
    if args.warmup_steps > args.max_steps / 2 and not checkpoint:
        problem = f"--warmup_steps {args.warmup_steps} is over half of --max_steps {args.max_steps}"
        warn(f"{problem}: use a smaller one, for example {args.max_steps // 10}")


def shape_of(name):
    """Return the flags that a model determines, from its config.json."""
    with explain(f"cannot load {name}", "pass a model, a run or the name of a GPT-2 on the Hub"):
        with open(f"{find_pretrained(name)}/config.json", encoding="utf-8") as file:
            config = json.load(file)
        if config["model_type"] != GPT2_FIELDS["model_type"]:
            raise ValueError(f"its model_type is {config['model_type']}")
        shape = {flag: config[flag] for flag in ("n_layer", "n_head", "n_embd")}
        return {**shape, "block_size": config["n_positions"]}


def restore_optimizers(trainer_state, optimizers, scaler):
    """Load the saved state of the optimizers and the gradient scaler. Returns the step."""
    for optimizer, saved in zip(optimizers, trainer_state["optimizers"], strict=True):
        # the settings of the groups, such as betas, come from the flags and this program
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    if trainer_state["scaler"]:  # empty if the run did not use float16 before
        scaler.load_state_dict(trainer_state["scaler"])
    return trainer_state["step"]


def resume_command(args, world_size):
    """Return the command that continues this run. All other flags are in the checkpoint."""
    launcher = "python"
    if world_size > 1:
        launcher = f"torchrun --standalone --nproc_per_node={world_size}"
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        launcher = "torchrun ..."  # on several machines, as before
    flags = ["--resume", "--log_dir", args.log_dir]
    if args.device != "auto":
        flags += ["--device", args.device]
    return f"{launcher} {shlex.join([sys.argv[0], *flags])}"


# ------------------------------------------------------------------------------------- stopping
class StopRequest:
    """Records a request to stop. The training loop then saves a checkpoint and ends with status 0.

    The request comes from SIGTERM, SIGINT (Ctrl-C) or SIGUSR1, or because torchrun was killed and
    left its processes behind. A second Ctrl-C ends the process at once.
    """

    def __init__(self, process):
        self.reason = None
        self.first_interrupt = math.inf  # time of the first SIGINT
        self.torchrun_pid = process.torchrun_pid

    def handle_signals(self):
        """Record signals from now on, instead of ending the process."""
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self.handle)

    def handle(self, number, frame):
        """Record a signal."""
        # torchrun repeats the first Ctrl-C at once, which does not count as the second one
        if number == signal.SIGINT and time.monotonic() > self.first_interrupt + 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        if number == signal.SIGINT:
            self.first_interrupt = min(self.first_interrupt, time.monotonic())
        self.reason = self.reason or signal.Signals(number).name

    def requested(self):
        """Return whether this rank was asked to stop."""
        # torchrun is the parent of the ranks. If it is killed, they get another parent.
        if self.torchrun_pid not in (None, os.getppid()):
            self.reason = self.reason or "the end of torchrun"
        return self.reason is not None


# --------------------------------------------------------------------------------- command line
# A preset has the values of flags that are not given. The learning rates and the warmup (375M
# tokens) of gpt2 to gpt2-xl follow GPT-3 ("Language Models are Few-Shot Learners", 2020, table 2.1
# and appendix B). All four use batches of 0.5M tokens; GPT-3 used 1M for its XL model.
GPT2 = {
    "data_dir": "edu_fineweb10B",
    "shuffle": True,
    "seed": 1337,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "block_size": 1024,  # tokens
    "dropout": 0.0,
    "total_batch_size": 524288,  # tokens per step, about 0.5M
    "max_steps": 19073,  # one epoch over 10B tokens
    "optimizer": "adamw",
    "learning_rate": 6e-4,
    "schedule": "cosine",
    "warmup_steps": 715,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "eval_interval": 250,  # steps
    "val_tokens": 10485760,
    "hellaswag_interval": 1000,  # steps
    "prompt": "Hello, I'm a language model,",
    "max_new_tokens": 48,
    "log_interval": 1,  # steps
    "checkpoint_interval": 1000,  # steps
    "keep_checkpoints": 3,
    "save_best": False,
}
PRESETS = {
    "gpt2": GPT2,
    "gpt2-medium": {**GPT2, "n_layer": 24, "n_head": 16, "n_embd": 1024, "learning_rate": 3e-4},
    "gpt2-large": {**GPT2, "n_layer": 36, "n_head": 20, "n_embd": 1280, "learning_rate": 2.5e-4},
    "gpt2-xl": {**GPT2, "n_layer": 48, "n_head": 25, "n_embd": 1600, "learning_rate": 2e-4},
    # Muon, with half of the tokens. This recipe was tuned on small models only and has not been
    # tried at this size (docs/performance.md).
    "gpt2-fast": {
        **GPT2,
        "max_steps": 9537,
        "optimizer": "muon",
        "learning_rate": 2e-3,
        "schedule": "wsd",
        "warmup_steps": 250,
    },
    "shakespeare": {
        **GPT2,
        "data_dir": "shakespeare",
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "block_size": 64,
        "total_batch_size": 1024,
        "max_steps": 1100,
        "optimizer": "muon",
        "learning_rate": 8e-3,
        "schedule": "wsd",
        "warmup_steps": 100,
        "val_tokens": 48000,
        "hellaswag_interval": 0,
        "checkpoint_interval": 500,
        "save_best": True,
        "log_interval": 10,
        "prompt": "\n",
        "max_new_tokens": 192,
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def number(kind, is_valid, requirement):
    """Return an argparse type: an int or float for which is_valid returns True."""

    def convert(text):
        value = kind(text)
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text} is not {requirement}")
        return value

    convert.__name__ = kind.__name__  # for argparse's "invalid int value"
    return convert


def parse_args():
    """Parse the command line. Flags that are not given are None until resolve_flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.error = fail  # in one line

    def add(name, help_text, **options):
        if name in GPT2:
            help_text += f" (gpt2: {GPT2[name]})"
        group.add_argument(f"--{name}", help=help_text, **options)

    count = number(int, lambda value: value > 0, "above 0")
    count_or_0 = number(int, lambda value: value >= 0, "0 or more")
    positive = number(float, lambda value: value > 0, "above 0")
    positive_or_0 = number(float, lambda value: value >= 0, "0 or more")
    probability = number(float, lambda value: 0 <= value < 1, "at least 0 and below 1")
    switch = argparse.BooleanOptionalAction

    group = parser.add_argument_group("data")
    add("preset", "values of the other flags (default: gpt2, see below)", choices=[*PRESETS])
    add("data_dir", "directory of token shards")
    add("shuffle", "shuffle the training data, or read it in file order", action=switch)
    add("seed", "random seed", type=count_or_0)

    group = parser.add_argument_group("model")
    add("n_layer", "number of blocks", type=count)
    add("n_head", "attention heads per block", type=count)
    add("n_embd", "channels, a multiple of n_head", type=count)
    add("block_size", "context length in tokens", type=count)
    add("dropout", "dropout probability", type=probability)
    add("init_from", "fine-tune a checkpoint, a run or a GPT-2 on the Hub", metavar="MODEL")

    group = parser.add_argument_group("optimization")
    add("total_batch_size", "tokens per step, over all processes", type=count)
    add("micro_batch_size", "sequences per forward pass (default: what fits)", type=count)
    add("max_steps", "training steps", type=count)
    add("optimizer", "muon for the blocks' matrices, or adamw for all", choices=OPTIMIZERS)
    add("learning_rate", "peak learning rate", type=positive)
    add("schedule", "cosine, or wsd (warmup, stable, linear decay to 0)", choices=[*SCHEDULES])
    add("warmup_steps", "steps of linear warmup", type=count_or_0)
    add("weight_decay", "weight decay of matrices and embeddings", type=positive_or_0)
    add("grad_clip", "clip the norm of all gradients together to this", type=positive)

    group = parser.add_argument_group("evaluation")
    add("eval_interval", "steps between validations and samples", type=count)
    add("val_tokens", "tokens per validation, at most the whole split", type=count)
    add("hellaswag_interval", "steps between HellaSwag scores; 0: never", type=count_or_0)
    add("prompt", "text that the two samples continue; type a line break as $'\\n' in bash")
    add("max_new_tokens", "tokens per sample", type=count)
    add("eval_only", "only print the validation loss and HellaSwag score", action="store_true")

    group = parser.add_argument_group("system")
    add("log_dir", "directory of the log and the checkpoints (default: log)", default="log")
    add("log_interval", "steps between lines on the screen", type=count)
    add("checkpoint_interval", "steps between checkpoints", type=count)
    add("keep_checkpoints", "number of checkpoints to keep; 0: all", type=count_or_0)
    add("save_best", "keep the model with the lowest loss in log_dir/best", action=switch)
    add("resume", "continue the run in --log_dir, or start it there", action="store_true")
    add("wandb", "send the metrics to this project of Weights & Biases", metavar="PROJECT")
    add("device", "auto (one GPU per process), cpu, cuda, cuda:1, mps, ...", default="auto")
    add("dtype", "dtype of matmuls (default: bfloat16 where fast)", choices=[*DTYPES])
    add("compile", "use torch.compile (default: on GPUs only)", action=switch)
    parser.set_defaults(fingerprint=None)  # of the data, saved with the flags
    return parser.parse_args()


# ---------------------------------------------------------------------------------------- setup
class Process(NamedTuple):
    """This process among those that torchrun started."""

    rank: int
    world_size: int
    device: torch.device
    torchrun_pid: int | None


# --- copied block: pick_device ---
def pick_device(name):
    """Return the torch.device with this name. "auto" is the accelerator if there is one."""
    if name == "auto":
        device = torch.accelerator.current_accelerator(check_available=True)
        return device or torch.device("cpu")
    with explain(f"--device {name} is not available here", "omit it, or use --device cpu"):
        return torch.zeros(1, device=name).device


# --- end of copied block: pick_device ---
def init_process(device_name):
    """Join the process group that torchrun prepared, if any. Returns a Process."""
    torchrun_pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if device_name == "auto" and not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        advice = "see the section Requirements of the README, or use --device cpu"
        report = fail if world_size > 1 else warn
        report(f"PyTorch cannot use this machine's NVIDIA driver: {advice}")
    if world_size == 1:
        return Process(0, 1, pick_device(device_name), torchrun_pid)
    # torchrun tells each process which one it is, and each takes one GPU
    rank = int(os.environ["RANK"])
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # on this machine
    num_gpus = torch.cuda.device_count()
    if device_name == "cpu" or (device_name == "auto" and num_gpus == 0):
        device, backend = torch.device("cpu"), "gloo"
    elif num_processes <= num_gpus:
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "nccl"
        torch.cuda.set_device(device)
    else:
        problem = f"{num_processes} processes need as many GPUs, but there are {num_gpus}"
        fail(f"{problem}: use a smaller --nproc_per_node, or --device cpu")
    # The others wait while rank 0 saves a model, which takes minutes on a slow disk.
    timeout = timedelta(hours=1)
    # The processes find each other through a key-value store in torchrun. After a restart on one
    # machine, it still has the addresses of the dead processes, which a prefix hides. On several
    # machines, an environment variable does (docs/reliability.md).
    store = None
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return Process(rank, world_size, device, torchrun_pid)


def on_rank_0(function, *args):
    """Call function(*args) on rank 0. Every rank returns its result, or raises its UserError."""
    outcome = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome[0] = function(*args)
        except UserError as error:
            outcome[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    result, error = outcome
    if error:
        raise UserError(error)
    return result


def sum_over_ranks(tensor):
    """Add a tensor over all ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def open_data(args):
    """Return (meta.json, training data, validation data). Sets args.fingerprint."""
    meta = on_rank_0(read_data_set, args.data_dir)
    # a resumed run must have the same data as before
    if args.fingerprint not in (None, meta["fingerprint"]) and not args.eval_only:
        problem = f"--data_dir {args.data_dir} has the data {meta['fingerprint']}, but the run"
        fail(f"{problem} has {args.fingerprint}: use the same data, or another --log_dir")
    args.fingerprint = meta["fingerprint"]
    train_data = TokenDataset(args.data_dir, "train", meta, args.block_size, args.seed, args.shuffle)
    val_data = TokenDataset(args.data_dir, "val", meta, args.block_size, args.seed, shuffle=False)
    return meta, train_data, val_data


def init_model(args, tokenizer, checkpoint):
    """Return the model: from the checkpoint, from --init_from, or with random weights."""
    torch.manual_seed(args.seed)  # the same on all ranks: they start from the same weights
    source = checkpoint or args.init_from
    if source is None:
        config = GPTConfig(
            vocab_size=VOCAB_SIZES[tokenizer],
            block_size=args.block_size,
            n_layer=args.n_layer,
            n_head=args.n_head,
            n_embd=args.n_embd,
            dropout=args.dropout,
            tokenizer=tokenizer,
        )
        return GPT(config)
    model = GPT.from_pretrained(source, args.block_size, args.dropout)
    if model.config.tokenizer != tokenizer:
        expected = model.config.tokenizer
        problem = f"{source} uses the tokenizer {expected}, but the shards in {args.data_dir}"
        fail(f"{problem} use {tokenizer}: regenerate them with --tokenizer {expected}")
    return model


def default_dtype(device, n_embd):
    """Return the fastest dtype for a model of this width on this device."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has_bfloat16 else "float16"
    if device.type == "cpu" and n_embd >= 256:  # conversions slow small models down
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"):
            return "bfloat16"
    return "float32"


def init_precision(dtype, device):
    """Return (autocast context, gradient scaler) for a dtype.

    Matmuls and attention run in dtype. Weights, gradients, optimizer state and the loss stay in
    float32: a small update would vanish in a bfloat16 weight, which has only 8 significant bits.
    """
    # float32 matmuls use TF32 on GPUs that have it, which has only 10 mantissa bits
    torch.set_float32_matmul_precision("high")
    autocast = nullcontext()
    if dtype != "float32":
        autocast = torch.autocast(device.type, DTYPES[dtype])
    # float16 gradients underflow unless the loss is scaled up; other dtypes do not need it
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == "float16")


def choose_micro_batch_size(model, args, process, autocast):
    """Return (micro_batch_size, grad_accum_steps), the micro-steps per step."""
    size = args.micro_batch_size or 1
    tokens = size * args.block_size * process.world_size
    if args.total_batch_size % tokens:
        fail(
            f"--total_batch_size {args.total_batch_size} is not divisible by {tokens} = "
            f"--micro_batch_size {size} * --block_size {args.block_size} * {process.world_size} "
            "processes: change one of them"
        )
    # windows per step and rank
    num_windows = args.total_batch_size // args.block_size // process.world_size
    if args.micro_batch_size is None and process.device.type == "cuda":
        # try 2, 4, 8, ... sequences, up to 64, that divide num_windows
        while size < math.gcd(num_windows, 64) and fits_on_gpu(model, 2 * size, process, autocast):
            size = 2 * size
    elif args.micro_batch_size is None:
        limit = 16 if args.block_size < 256 else 4  # more do not fit into the caches of a CPU
        size = math.gcd(num_windows, limit)
    return size, num_windows // size


def fits_on_gpu(model, size, process, autocast):
    """Return whether a micro-batch of size sequences fits on the GPU of every rank."""
    device = process.device
    # Leave 10% of the memory free that other programs do not use. The optimizers do not exist yet:
    # AdamW keeps two float32 averages, 8 bytes per parameter.
    free, _ = torch.cuda.mem_get_info(device)
    limit = 0.9 * (free + torch.cuda.memory_allocated(device)) - 8 * model.num_params
    torch.cuda.reset_peak_memory_stats(device)
    idx = torch.zeros(size, model.config.block_size, dtype=torch.long, device=device)
    try:
        with autocast:
            _, loss = model(idx, idx)
        loss.backward()
        fits = torch.cuda.max_memory_allocated(device) <= limit
    except torch.OutOfMemoryError:
        fits = False
    model.zero_grad()
    torch.cuda.empty_cache()  # others need memory too, such as NCCL
    count = torch.tensor(float(fits), device=device)
    return sum_over_ranks(count).item() == process.world_size


def wrap_model(model, args, process, autocast, micro_batch_size, grad_accum_steps):
    """Return (training_model, compiled_model), which share the weights of model.

    training_model averages gradients over the ranks. compiled_model is for validation. Compiled
    code is made for one shape, so model itself is used where lengths vary.
    """
    compiled_model = model
    if args.compile or (args.compile is None and process.device.type == "cuda"):
        # a missing C++ compiler or Triton can raise almost any type of error
        with explain("torch.compile does not work here", "pass --no-compile"):
            torch.compile(lambda x: x + 1)(torch.ones(1, device=process.device))
        compiled_model = torch.compile(model)
    if process.world_size == 1:
        return compiled_model, compiled_model
    # DistributedDataParallel (DDP) averages the gradients over the ranks during the backward pass.
    # torch.compile can split the model at DDP's buckets of gradients, so that the all-reduce of one
    # bucket overlaps with the computation of the next. The parts run slower than one graph, so it
    # is worthwhile only if every backward pass communicates.
    torch._dynamo.config.optimize_ddp = grad_accum_steps == 1
    # Gradients are stored in the buckets that are all-reduced, not copied to them.
    training_model = DDP(compiled_model, gradient_as_bucket_view=True)
    # DDP regroups its gradients after its first backward pass, which changes the order of
    # summation. Without this pass, the first step of a resumed run would differ in the last bit
    # from the same step of an uninterrupted run.
    windows = torch.zeros(micro_batch_size, args.block_size + 1, dtype=torch.long)
    windows = windows.to(process.device)
    training_model.train()
    with autocast:
        _, loss = training_model(windows[:, :-1], windows[:, 1:])  # views, as in load_batch
    loss.backward()
    model.zero_grad(set_to_none=False)
    return training_model, compiled_model


# Peak FLOP/s of dense bfloat16 matmuls according to NVIDIA's data sheets, by the GPU's name
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


def name_of(device):
    """Return the name of a GPU, such as NVIDIA H200, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def print_header(args, model, train_data, val_data, process, micro_batch_size, grad_accum_steps):
    """Print what is about to run, with every setting resolved."""
    world_size, device_name = process.world_size, name_of(process.device)
    say("settings: " + " ".join(f"{name}={value!r}" for name, value in vars(args).items()))
    say(f"torch {torch.__version__}, {world_size} x {device_name}, {model.num_params:,} parameters")
    say(f"train: {train_data.num_windows:,} windows in {len(train_data.paths)} shards")
    say(f"val: {val_data.num_windows:,} windows in {len(val_data.paths)} shards")
    say(
        f"{args.total_batch_size:,} tokens per step = {grad_accum_steps} micro-steps x {world_size} "
        f"processes x {micro_batch_size} sequences x {args.block_size} tokens"
    )


def average_over_ranks(loss, norm, stop_requested, world_size):
    """Return (mean loss, mean norm, whether any rank was asked to stop)."""
    # one copy to the CPU for all three, because each copy makes the CPU wait for the GPU
    values = torch.stack((loss, norm, torch.full_like(loss, stop_requested))) / world_size
    if world_size > 1:
        dist.all_reduce(values)
    mean_loss, mean_norm, stopping = values.tolist()
    return mean_loss, mean_norm, stopping > 0


def fail_at_bad_step(step, loss, norm, device):
    """Report a loss or gradient norm that is NaN or infinite. Nothing of this step is saved."""
    advice = "start a new run with --init_from and a lower --learning_rate"
    if math.isfinite(loss) and device.type == "cuda":
        # In some versions of cuDNN, the backward pass of attention overflows. The cache of compiled
        # code does not notice that another kernel was chosen.
        variables = "TORCH_CUDNN_SDPA_DEPRIORITIZED=1 TORCHINDUCTOR_FORCE_DISABLE_CACHES=1"
        advice = f"try --resume with {variables} in the environment, or {advice}"
    fail(f"step {step}: the loss is {loss} and the gradient norm {norm}: {advice}")


def mfu(model, tokens_per_second, process):
    """Return the model FLOPs utilization, or None if the peak of the device is not known.

    A token takes 6 FLOPs per parameter, forward and backward, and 12 * n_layer * n_embd *
    block_size for attention (PaLM, 2022, appendix B), which includes what the causal mask hides.
    """
    peak = PEAK_FLOPS.get(name_of(process.device))
    if peak is None:
        return None
    config = model.config
    flops_per_token = 6 * model.num_params + 12 * config.n_layer * config.n_embd * config.block_size
    return flops_per_token * tokens_per_second / (peak * process.world_size)


def report_step(run_directory, model, args, process, step, loss, lr, norm, dt):
    """Report an optimizer step of dt seconds: in log.txt, and on the screen if it is due."""
    speed = args.total_batch_size / dt
    metrics = {"train": f"{loss:.6f}", "lr": f"{lr:.4e}", "norm": f"{norm:.4f}"}
    metrics["tok/s"] = f"{speed:.1f}"
    if not math.isfinite(norm):  # float16 only: update_parameters skipped this step
        metrics["skipped"] = 1
    run_directory.log(step, **metrics)
    if step % args.log_interval == 0:
        utilization = mfu(model, speed, process)
        utilization = f" | mfu: {utilization:.1%}" if utilization else ""
        eta = timedelta(seconds=int(dt * (args.max_steps - step - 1)))  # without evaluations
        say(
            f"step {step:5d} | loss: {loss:.3f} | lr {lr:.1e} | norm: {norm:.3g} | dt: {1000 * dt:.1f}ms | "
            f"tok/s: {speed:.1f}{utilization} | eta {eta}"
        )


def report_validation(run_directory, model, enc, args, device, autocast, step, val_loss):
    """Report a validation: write log.txt and the best model, and print two samples."""
    run_directory.log(step, val=f"{val_loss:.4f}")
    say(f"step {step:5d} | val loss: {val_loss:.4f}")
    if args.save_best:
        run_directory.save_best(val_loss, model, args)
    if enc and math.isfinite(val_loss):
        print_samples(model, enc, args, device, autocast)


# -------------------------------------------------------------------------------- training loop
def main():
    """Train: in each step save and evaluate if due, compute gradients, update, and report."""
    args = parse_args()
    process = init_process(args.device)
    rank, world_size, device, _ = process

    # Rank 0 locks the run directory, chooses a checkpoint and checks the data, for all ranks.
    run_directory = RunDirectory(args.log_dir)
    checkpoint = on_rank_0(run_directory.open, args)
    trainer_state = load_trainer_state(checkpoint) if checkpoint else None
    resolve_flags(args, checkpoint, trainer_state)
    meta, train_data, val_data = open_data(args)
    hellaswag = on_rank_0(load_hellaswag, args, meta["tokenizer"])

    # The model and the optimizers, new or from the checkpoint, then torch.compile and DDP.
    model = init_model(args, meta["tokenizer"], checkpoint).to(device)
    args.dtype = args.dtype or default_dtype(device, args.n_embd)
    autocast, scaler = init_precision(args.dtype, device)
    if args.eval_only:
        print_evaluations(model, val_data, hellaswag, args, process, autocast)
        return
    micro_batch_size, grad_accum_steps = choose_micro_batch_size(model, args, process, autocast)
    optimizers = configure_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay, device)
    start_step = restore_optimizers(trainer_state, optimizers, scaler) if checkpoint else 0
    del trainer_state  # frees the CPU's copy of the optimizer state
    training_model, compiled_model = wrap_model(model, args, process, autocast, micro_batch_size, grad_accum_steps)

    # Rank 0 writes the settings to run.json, opens the log and prints what is about to run.
    settings = {**vars(args), "tokenizer": meta["tokenizer"], "source": meta["source"]}
    on_rank_0(run_directory.start, start_step, args, settings)
    print_header(args, model, train_data, val_data, process, micro_batch_size, grad_accum_steps)
    if checkpoint:
        say(f"resuming at step {start_step} from {checkpoint}")
    enc = load_tokenizer(meta["tokenizer"]) if rank == 0 else None
    stop_request = StopRequest(process)
    stop_request.handle_signals()
    all_ranks_stop = False  # set in the same step on all ranks, if one of them was asked to stop
    evaluation_args = (micro_batch_size, process, autocast, stop_request)  # of both evaluations

    x, y = load_micro_batch(train_data, start_step * grad_accum_steps, micro_batch_size, process)
    for step in range(start_step, args.max_steps + 1):
        last_step = step == args.max_steps
        save_now = step % args.checkpoint_interval == 0 or last_step or all_ranks_stop
        evaluate_now = (step % args.eval_interval == 0 or last_step) and not all_ranks_stop

        # At fixed intervals and at the end: save a checkpoint, then evaluate, which might fail.
        if save_now or evaluate_now:
            train_data.check_open_shards()
            val_data.check_open_shards()
        if save_now:
            run_directory.save(step, model, optimizers, scaler, args)
        if evaluate_now:
            val_loss = evaluate(compiled_model, model, val_data, args.val_tokens, *evaluation_args)
            all_ranks_stop = val_loss is None  # incomplete: the resumed run repeats the evaluation
            if not all_ranks_stop:
                report_validation(run_directory, model, enc, args, device, autocast, step, val_loss)
        if hellaswag and not all_ranks_stop and (step % args.hellaswag_interval == 0 or last_step):
            accuracy = evaluate_hellaswag(model, hellaswag, *evaluation_args)
            all_ranks_stop = accuracy is None
            if not all_ranks_stop:
                run_directory.log(step, hella=f"{accuracy:.4f}")
                say(f"step {step:5d} | HellaSwag acc_norm: {accuracy:.4f}")
        if last_step or all_ranks_stop:
            # an evaluation may have been stopped at a step that is not saved yet
            run_directory.save(step, model, optimizers, scaler, args)
            break

        # one optimizer step: accumulate the gradients of grad_accum_steps micro-batches
        start = time.perf_counter()
        training_model.train()
        # Seed the dropout masks from the step, so that a resumed run draws the same ones.
        torch.manual_seed(args.seed + step * world_size + rank)
        loss = torch.zeros((), device=device)  # reading it would wait for the computation
        for i in range(grad_accum_steps):
            # DDP averages the gradients over the ranks during a backward pass. Once per step, in
            # the last one, is enough. no_sync must also cover the forward pass, which prepares it.
            gradient_sync = nullcontext()
            if world_size > 1 and i < grad_accum_steps - 1:
                gradient_sync = training_model.no_sync()
            with gradient_sync:
                with autocast:
                    _, micro_loss = training_model(x, y)
                # gradients add up: dividing makes their sum a mean
                micro_loss = micro_loss / grad_accum_steps
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
            # load the next batch while a GPU computes
            next_micro_step = step * grad_accum_steps + i + 1
            x, y = load_micro_batch(train_data, next_micro_step, micro_batch_size, process)

        # clip the gradients, which limits the effect of a bad batch, and update the parameters
        lr = SCHEDULES[args.schedule](step, args.learning_rate, args.warmup_steps, args.max_steps)
        norm = update_parameters(model, optimizers, scaler, lr, args.grad_clip)
        # DDP's gradients are views of its buckets, so they are set to zero instead of freed
        model.zero_grad(set_to_none=world_size == 1)

        # report the step; its loss is the mean over all micro-batches and ranks
        stop_requested = stop_request.requested()
        mean_loss, mean_norm, all_ranks_stop = average_over_ranks(loss, norm, stop_requested, world_size)
        dt = time.perf_counter() - start
        # in float16, update_parameters has skipped a step whose gradients overflowed
        if not math.isfinite(mean_loss) or not (math.isfinite(mean_norm) or scaler.is_enabled()):
            fail_at_bad_step(step, mean_loss, mean_norm, device)
        report_step(run_directory, model, args, process, step, mean_loss, lr, mean_norm, dt)

    if all_ranks_stop:
        reason = stop_request.reason or "a signal to another rank"
        say(f"stopped by {reason} at step {step}: continue with {resume_command(args, world_size)}")
    # DDP refers to the process group, and gloo can deadlock if the group is destroyed first
    del training_model
    if world_size > 1:
        dist.destroy_process_group()
    run_directory.close(step)


def run(main):
    """Call main() and end the process. Expected failures print one line instead of a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the script until handle_signals
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace", line_buffering=True)
    status, message = 0, None
    try:
        main()
    except UserError as error:
        status = 2
        # one rank of a machine reports what occurs on all of them
        if isinstance(error, RankError) or os.environ.get("LOCAL_RANK", "0") == "0":
            message = " ".join(str(error).split())
    except Exception as error:
        status = 1
        # PyTorch raises a RuntimeError if the CPU's memory is full, and gloo if it loses a rank
        memory_errors = (MemoryError, torch.OutOfMemoryError)
        if isinstance(error, memory_errors) or "can't allocate memory" in str(error):
            status, message = 2, "out of memory: use a smaller --micro_batch_size or model"
        elif not isinstance(error, dist.DistError) and "gloo" not in str(error):
            traceback.print_exc()
        elif os.environ["RANK"] in ("0", "1"):  # rank 0 may have crashed
            message = "lost contact with another rank: continue with --resume"
    if message:
        print(f"error: {message}", file=sys.stderr)
    if "RANK" in os.environ:
        # a normal exit could wait forever for a rank that has crashed
        with suppress(OSError):  # the terminal may be closed
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run(main)
