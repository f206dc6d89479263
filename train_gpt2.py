"""
Lesson 3: pre-train GPT-2 (124M to 1.6B parameters) on one CPU, one GPU or many.

    python prepare_shakespeare.py && python train_gpt2.py --preset shakespeare   # 2 CPU cores, minutes
    python fineweb.py && python train_gpt2.py                                    # GPT-2 124M, one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py                       # the same on eight
    torchrun --standalone --nproc_per_node=8 --max-restarts=3 train_gpt2.py --resume   # whatever happens

Reads the token shards of --data_dir. Writes --log_dir: log.txt (a "step kind value" line for every
figure) and step_NNNNNN/, checkpoints that transformers' AutoModelForCausalLM opens as they are. Which
windows a step learns from depends on the seed and the step alone, not on the number of processes.
Expect a loss of about ln(vocab_size) + n_embd * 0.02^2 / 2 at step 0 (10.98 for GPT-2 124M, 5.58 for
--preset shakespeare, which ends at 1.67 nats a byte), and about 3.29 on FineWeb-Edu after 19,073 steps.
"""

import argparse
import ctypes
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cache, lru_cache

import numpy as np
import requests
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiktoken.load import read_file_cached
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

# Presets are defaults of flags. Learning rates are GPT-3's for models of these sizes (table 2.1 of
# "Language Models are Few-Shot Learners", 2020), as are the batch of half a million tokens and the
# 375M tokens of warmup; 19,073 steps are one pass over 10B tokens.
GPT2 = (
    dict(data_dir="edu_fineweb10B", block_size=1024, total_batch_size=524288, log_interval=1)
    | dict(max_steps=19073, warmup_steps=715, eval_interval=250, val_tokens=10485760, checkpoint_interval=1000)
    | dict(hellaswag_interval=250, prompt="Hello, I'm a language model,", max_new_tokens=48)
    | dict(optimizer="adamw", schedule="cosine")
)
PRESETS = {
    "gpt2": GPT2 | dict(n_layer=12, n_head=12, n_embd=768, learning_rate=6e-4),
    "gpt2-medium": GPT2 | dict(n_layer=24, n_head=16, n_embd=1024, learning_rate=3e-4),
    "gpt2-large": GPT2 | dict(n_layer=36, n_head=20, n_embd=1280, learning_rate=2.5e-4),
    "gpt2-xl": GPT2 | dict(n_layer=48, n_head=25, n_embd=1600, learning_rate=2e-4),
    # Half the tokens, Muon: tuned on small models, not yet tried at this size (docs/performance.md).
    "gpt2-fast": GPT2
    | dict(n_layer=12, n_head=12, n_embd=768, learning_rate=2e-3, optimizer="muon", schedule="linear")
    | dict(max_steps=9537, warmup_steps=250),
    "shakespeare": dict(data_dir="shakespeare", block_size=64, total_batch_size=1024)
    | dict(max_steps=1500, warmup_steps=100, eval_interval=250, val_tokens=48000, checkpoint_interval=500)
    | dict(log_interval=10, hellaswag_interval=0, prompt="\n", max_new_tokens=192)
    | dict(optimizer="adamw", schedule="cosine")
    | dict(n_layer=4, n_head=4, n_embd=128, learning_rate=3e-3),
}


# ---------------------------------------------------------------------------------------- model
# --- copied block: read_pretrained ---
# By Hugging Face's names, GPT-2's first, which has two.
ACTIVATIONS = {"gelu_new": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "relu": F.relu}
ACTIVATIONS["gelu_pytorch_tanh"] = ACTIVATIONS["gelu_new"]
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face stores these transposed: (in, out)


def read_pretrained(directory_or_name):
    """The (config, tensors by name) of a GPT-2 in a directory, ours or Hugging Face's, or of a name on its hub.

    config is config.json's object with GPT-2's values for what it leaves out, tensors are as the file holds
    them, without their prefix "transformer.". Raises ValueError, in one line, where there is no GPT-2 that
    these scripts can compute, and OSError where a name cannot be fetched.
    """
    directory = directory_or_name
    if not os.path.isdir(directory):
        from huggingface_hub import snapshot_download

        directory = snapshot_download(directory, allow_patterns=["config.json", "model.safetensors"])
    numbers = dict(vocab_size=50257, n_positions=1024, n_layer=12, n_head=12, n_embd=768, layer_norm_epsilon=1e-5)
    choices = {"model_type": ["gpt2"], "activation_function": list(ACTIVATIONS), "tie_word_embeddings": [True]}
    choices |= {"scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False]}
    config = numbers | {name: values[0] for name, values in choices.items()} | {"n_inner": None}
    try:
        with open(f"{directory}/config.json", encoding="utf-8") as file:
            config |= json.load(file)
        for name, values in choices.items():
            if config[name] not in values:
                raise ValueError(f"its {name} is {config[name]!r}, and not one of {values}")
        for name, value in numbers.items():
            if type(config[name]) is not type(value) or config[name] <= 0:
                raise ValueError(f"its {name} is {config[name]!r}, and no number like {value}")
        n_layer, n_head, C = config["n_layer"], config["n_head"], config["n_embd"]
        if C % n_head:
            raise ValueError(f"its n_embd {C} is not divisible by its n_head {n_head}")
        tensors = {k.removeprefix("transformer."): v for k, v in load_file(f"{directory}/model.safetensors").items()}
        blocks = {name.split(".")[1] for name in tensors if name.startswith("h.")}
        if len(blocks) != n_layer:
            raise ValueError(f"it has {len(blocks)} blocks, its n_layer is {n_layer}")
        n_inner = config["n_inner"] or 4 * C
        block = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C)}
        block |= {"ln_2": (C,), "mlp.c_fc": (C, n_inner), "mlp.c_proj": (n_inner, C)}
        layers = {f"h.{i}.{name}": shape for i in range(n_layer) for name, shape in block.items()} | {"ln_f": (C,)}
        shapes = {"wte.weight": (config["vocab_size"], C), "wpe.weight": (config["n_positions"], C)}
        for name, shape in layers.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
        for name, shape in shapes.items():
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            if found != shape:
                raise ValueError(f"{name} is {found}, config.json asks for {shape}")
            if not tensors[name].is_floating_point():
                raise ValueError(f"{name} holds {tensors[name].dtype}, not floating-point numbers")
        if "lm_head.weight" in tensors and not torch.equal(tensors["lm_head.weight"], tensors["wte.weight"]):
            raise ValueError("its lm_head.weight is not its wte.weight, as GPT-2's is")
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{directory} holds no GPT-2: {error}") from None
    return config, {name: tensors[name] for name in shapes}


# --- end of copied block: read_pretrained ---
@dataclass
class GPTConfig:
    """The shape of a GPT-2; the defaults are the 124M model's."""

    vocab_size: int = 50257
    block_size: int = 1024  # tokens a sequence at most; n_positions in Hugging Face's config
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None  # hidden channels of the MLP; None means 4 * n_embd
    activation_function: str = "gelu_new"
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    tokenizer: str = "gpt2"  # "gpt2" or "bytes"; what token ids mean


class MultiHeadAttention(nn.Module):
    """n_head causal attentions side by side, each on its own n_embd / n_head channels."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k, v of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, 3C) -> 3 x (B, T, C)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return F.dropout(self.c_proj(y), dropout_p)


class FeedForward(nn.Module):
    """Two linear layers and a nonlinearity, on every position by itself."""

    def __init__(self, config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, n_inner)
        self.activation = ACTIVATIONS[config.activation_function]
        self.c_proj = nn.Linear(n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C) -> (B, T, n_inner) -> (B, T, C)
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    """Communication, then computation; each adds its result to x, a road for the gradient."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = MultiHeadAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = FeedForward(config)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019).

    The token embedding is also the output head. Inside the model it has rows up to the next multiple of
    128, a size that matmuls like: the extra ones are zero, their logits -inf, and no file contains them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        padded_vocab_size = -(-config.vocab_size // 128) * 128
        self.wte = nn.Embedding(padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        padding = torch.arange(padded_vocab_size) >= config.vocab_size
        self.register_buffer("head_bias", torch.zeros(len(padding)).masked_fill(padding, -math.inf), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # each block adds twice to x: keep the sum's variance that of one
                std = 0.02 * (2 * config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.wte.weight[config.vocab_size :])

    def forward(self, idx, targets=None):
        """For ids idx (B, T): (logits (B, T, vocab_size), None), or (None, mean loss in nats) with targets (B, T)."""
        x = self.wte(idx) + self.wpe.weight[: idx.shape[1]]  # (B, T, C) + (T, C) -> (B, T, C)
        x = self.drop(x)
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight, self.head_bias)  # (B, T, C) -> (B, T, padded V)
        if targets is None:
            return logits[..., : self.config.vocab_size], None
        return None, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, generator, top_k=50):
        """Extend idx (B, T) by max_new_tokens tokens sampled from the top_k likeliest: (B, T + max_new_tokens)."""
        self.eval()
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1].float()  # (B, V)
            top, top_idx = logits.topk(min(top_k, logits.shape[-1]))  # (B, k)
            choice = torch.multinomial(F.softmax(top, dim=-1), 1, generator=generator)  # (B, 1)
            idx = torch.cat((idx, top_idx.gather(1, choice)), dim=1)  # (B, T + 1)
        return idx

    @property
    def num_params(self):
        """Parameters as published, without the padding of the vocabulary: 124,439,808 for the default config."""
        padding = self.wte.num_embeddings - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd

    def save_pretrained(self, directory):
        """Write model.safetensors and config.json into directory as transformers' GPT2LMHeadModel does (fp32)."""
        config, eot_token = self.config, {"gpt2": 50256, "bytes": 256}[self.config.tokenizer]
        tensors = {}
        for name, tensor in self.state_dict().items():
            tensor = tensor[: config.vocab_size] if name == "wte.weight" else tensor
            tensor = tensor.T if name.endswith(CONV1D) else tensor
            tensors[f"transformer.{name}"] = tensor.detach().float().cpu().contiguous()
        os.makedirs(directory, exist_ok=True)
        save_file(tensors, f"{directory}/model.safetensors", metadata={"format": "pt"})
        hugging_face = {k: v for k, v in asdict(config).items() if k not in ("block_size", "dropout")}
        hugging_face |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32"}
        hugging_face |= {"n_positions": config.block_size, "bos_token_id": eot_token, "eos_token_id": eot_token}
        hugging_face |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        with open(f"{directory}/config.json", "w", encoding="utf-8") as file:
            json.dump(hugging_face, file, indent=2)

    @classmethod
    def from_pretrained(cls, directory_or_name, **overrides):
        """The GPT-2 in a directory, ours or Hugging Face's, or of a name on its hub; raises as read_pretrained.

        overrides are fields of GPTConfig: another dropout, or a smaller block_size, which crops the positions.
        """
        config, tensors = read_pretrained(directory_or_name)
        config = {"tokenizer": "bytes" if config["vocab_size"] == VOCAB_SIZES["bytes"] else "gpt2"} | config
        config |= {"block_size": config["n_positions"], "dropout": config.get("resid_pdrop", 0.1)} | overrides
        if config["block_size"] > config["n_positions"]:
            most = f"{directory_or_name} has {config['n_positions']} positions"
            raise ValueError(f"{most}, too few for block_size {config['block_size']}: shorten it")
        tensors["wpe.weight"] = tensors["wpe.weight"][: config["block_size"]]
        model = cls(GPTConfig(**{name: config[name] for name in GPTConfig.__annotations__ if name in config}))
        for name, parameter in model.named_parameters():
            target = parameter[: model.config.vocab_size] if name == "wte.weight" else parameter
            with torch.no_grad():
                target.copy_(tensors[name].T if name.endswith(CONV1D) else tensors[name])
        return model


# ----------------------------------------------------------------------------------------- data
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VOCAB_SIZES = {"gpt2": 50257, "bytes": 257}


# --- copied block: get_tokenizer ---
def get_tokenizer(name):
    """The tiktoken.Encoding called name.

    "gpt2" has 50,257 tokens; tiktoken fetches its vocabulary once, or finds it in TIKTOKEN_CACHE_DIR, and
    raises requests.RequestException where it cannot. "bytes" has 257, the 256 bytes and <|endoftext|>, and
    never needs a network.
    """
    if name == "gpt2":
        return tiktoken.get_encoding("gpt2")
    ranks = {bytes([i]): i for i in range(256)}
    pieces = r"(?s:.{1,1000})"  # how text is cut before merging: with no merges any cut gives the same
    return tiktoken.Encoding(name, pat_str=pieces, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})


# --- end of copied block: get_tokenizer ---
def tokenizer_files(name):
    """What a checkpoint holds so that transformers finds its tokenizer: {file: bytes}; raises as get_tokenizer."""
    if name == "gpt2":  # tiktoken has the two files of OpenAI's release in its cache
        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
        names = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
        return {file: read_file_cached(f"{url}/{theirs}") for file, theirs in names.items()}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes these bytes as they are
    others = [byte for byte in range(256) if byte not in printable]  # and these as the characters from 256 on
    vocab = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return {"vocab.json": json.dumps(vocab | {"<|endoftext|>": 256}).encode(), "merges.txt": b"#version: 0.2\n"}


# --- copied block: read_shard ---
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '<u2', 'fortran_order': False, 'shape': \((\d+),\), \}", re.S
)
BIN_MAGIC, BIN_VERSION, BIN_HEADER = 20240520, 1, 1024  # llm.c's shards: 256 int32, then uint16 tokens


def read_header(path):
    """(bytes before the tokens, number of tokens) of a shard; raises ValueError if it is none."""
    with open(path, "rb") as file:
        head = file.read(BIN_HEADER)
        size = file.seek(0, os.SEEK_END)
    npy = NPY_HEADER.match(head)
    if npy:
        offset, count = 10 + int.from_bytes(npy[1], "little"), int(npy[2])
    elif len(head) == BIN_HEADER and struct.unpack("<2i", head[:8]) == (BIN_MAGIC, BIN_VERSION):
        offset, count = BIN_HEADER, struct.unpack("<i", head[8:12])[0]
    else:
        raise ValueError(f"{path} is no token shard: neither a one-dimensional uint16 .npy nor llm.c's .bin")
    if size != offset + 2 * count:
        raise ValueError(f"{path} has {size:,} bytes, its header promises {offset + 2 * count:,}: make it again")
    return offset, count


@lru_cache(maxsize=16)
def open_shard(path):
    """The tokens of a shard, mapped into memory: a read-only uint16 array (N,)."""
    offset, count = read_header(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(count,))


# --- end of copied block: read_shard ---
# --- copied block: sha256_of ---
def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- end of copied block: sha256_of ---
def read_meta(data_dir):
    """The meta.json of a data set, or, for foreign shards that have none, what GPT-2's would say."""
    try:
        with open(f"{data_dir}/meta.json", encoding="utf-8") as file:
            meta = json.load(file)
        sizes = {shard["file"]: int(shard["tokens"]) for shard in meta["shards"]}
        checksums = {shard["file"]: shard["sha256"] for shard in meta["shards"]}
        tokenizer, vocab_size = meta["tokenizer"], meta["vocab_size"]
        if VOCAB_SIZES.get(tokenizer) != vocab_size:
            raise ValueError(f"no tokenizer {tokenizer!r} has {vocab_size} tokens")
        source = meta.get("source")
        return dict(tokenizer=tokenizer, vocab_size=vocab_size, source=source, sizes=sizes, checksums=checksums)
    except FileNotFoundError:
        return dict(tokenizer="gpt2", vocab_size=VOCAB_SIZES["gpt2"], source=None, sizes={}, checksums={})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{data_dir}/meta.json cannot be read ({error!r}): make the shards again") from None


class Windows:
    """The shards of one split as windows of block_size + 1 tokens, in an order that depends on the seed alone.

    Windows tile a shard: each begins with the token that the one before ended with, so that every token but a
    shard's first is a target once an epoch. An epoch visits the shards, and the windows of each shard, in a
    random order that is drawn anew from (seed, epoch). Memory is O(shards) and one shard's order.

    Raises ValueError for a shard that is damaged, disagrees with meta.json or holds an id >= vocab_size.
    """

    def __init__(self, data_dir, split, meta, block_size, seed, shuffle):
        pattern = re.compile(rf".*_{split}_\d+\.(npy|bin)")
        found = set(os.listdir(data_dir))
        names = sorted(name for name in found.union(meta["sizes"]) if pattern.fullmatch(name))
        missing = [name for name in names if name not in found]
        if missing or not names:
            raise ValueError(f"{data_dir} has no {missing[0] if missing else f'{split} shard'}: make the shards again")
        self.paths = [os.path.join(data_dir, name) for name in names]
        self.block_size, self.seed, self.shuffle = block_size, seed, shuffle
        self.vocab_size, self.checksums = meta["vocab_size"], meta["checksums"]
        counts = np.array([read_header(path)[1] for path in self.paths])
        for name, count in zip(names, counts, strict=True):
            promised = meta["sizes"].get(name, "nothing") if meta["sizes"] else count
            if count != promised:
                raise ValueError(f"{data_dir}/{name} has {count} tokens, meta.json says {promised}: make it again")
        self.identity = (split, names, counts.tolist())  # what a resumed run must find again
        self.per_shard = np.maximum(counts - 1, 0) // block_size  # windows in each shard
        self.total = int(self.per_shard.sum())  # windows in an epoch
        if not self.total:
            raise ValueError(f"{data_dir}: no {split} shard is longer than --block_size {block_size}: shorten it")
        probed = self.paths[:: -(-len(self.paths) // 1024)]  # 64M tokens of 1,024 shards: start-up stays short
        for path in probed:
            largest = int(open_shard(path)[: 2**26 // len(probed)].max(initial=0))
            if largest >= self.vocab_size:
                raise ValueError(f"{path} has token id {largest}, its vocabulary {self.vocab_size}: make it again")

    @lru_cache(maxsize=2)  # noqa: B019, the object lives as long as the process
    def _shard_order(self, epoch):
        order = np.arange(len(self.paths))
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        return order, np.cumsum(self.per_shard[order])

    @lru_cache(maxsize=2)  # noqa: B019
    def _window_order(self, epoch, shard):
        return np.random.default_rng((self.seed, epoch, shard)).permutation(self.per_shard[shard])

    def locate(self, index):
        """Where the index-th window of the whole run is: (number of its shard, offset of its first token)."""
        epoch, index = divmod(index, self.total)
        order, ends = self._shard_order(epoch)
        place = int(np.searchsorted(ends, index, side="right"))
        shard = int(order[place])
        window = index - (int(ends[place - 1]) if place else 0)
        if self.shuffle:
            window = int(self._window_order(epoch, shard)[window])
        return shard, window * self.block_size

    @cache  # noqa: B019
    def _verify(self, path):  # when a shard's turn comes: start-up would take minutes for all of them
        promised = self.checksums.get(os.path.basename(path))
        if promised and sha256_of(path) != promised:
            fail(f"{path} is not as it was written: make it again and --resume", only_here=True)

    def batch(self, indices):
        """Inputs and targets, each int64 (B, T), of the windows whose indices are given."""
        rows = []
        for index in indices:
            shard, start = self.locate(index)
            self._verify(self.paths[shard])
            rows.append(open_shard(self.paths[shard])[start : start + self.block_size + 1])
            if rows[-1].max() >= self.vocab_size:  # where the probe did not look
                place = f"{self.paths[shard]} has token id {rows[-1].max()} near token {start}"
                fail(f"{place}, its vocabulary {self.vocab_size}: make it again and --resume", only_here=True)
        windows = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]


# ------------------------------------------------------------------------------------ evaluation
def to_device(batch, device):
    """The tensors of a batch on device; on a GPU the copy overlaps what runs there."""
    if device.type == "cuda":
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in batch]
    return [tensor.to(device) for tensor in batch]


@torch.no_grad()
def evaluate(model, windows, val_tokens, batch_size, rank, world_size, device, autocast, caught=()):
    """Mean loss in nats over the first val_tokens of a split, the same windows whatever the world size.

    None if any rank has caught a signal: it leaves its share undone.
    """
    model.eval()
    n = max(1, min(val_tokens // windows.block_size, windows.total))
    total = torch.zeros(2, device=device)  # the sum of the losses, and how many ranks are to stop
    for first in range(rank * batch_size, n, world_size * batch_size):
        if caught:
            total[1] = 1
            break
        indices = range(first, min(first + batch_size, n))
        x, y = to_device(windows.batch(indices), device)
        with autocast:
            total[0] += model(x, y)[1] * len(indices)
    if world_size > 1:
        dist.all_reduce(total)
    loss, stopped = total.tolist()
    return None if stopped else loss / n


# --- copied block: read_hellaswag ---
HELLASWAG_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
HELLASWAG_PATH = "hellaswag/hellaswag_val.jsonl"
HELLASWAG_SIZE = 10042  # examples


def read_hellaswag(path, enc, size=None):
    """The examples of a file, tokenised: (ind, label, context, endings), the last a list of ids and four lists.

    A line is a JSON object with the authors' number of the example ("ind"), the number of the right ending
    ("label", 0 to 3), the context ("ctx") and "endings". Raises ValueError, in one line, where there is
    another line or not size of them, and OSError where there is no file.
    """
    examples = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                ind, label, context, endings = map(dict(json.loads(line)).get, ("ind", "label", "ctx", "endings"))
                types = [type(label), type(context), type(endings), *map(type, endings)]
                if types != [int, str, list, str, str, str, str] or label not in range(4) or not context:
                    raise ValueError(f"its 'label' must be 0 to 3, not {label!r}, its 'ctx' a text, its 'endings' four")
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"line {number} of {path} is no HellaSwag example: {error}") from None
            endings = [enc.encode_ordinary(f" {ending}") for ending in endings]
            examples.append((ind, label, enc.encode_ordinary(context), endings))
    if not examples or size and len(examples) != size:
        raise ValueError(f"{path} has {len(examples)} examples, not {size or 'one or more'}")
    return examples


def fetch_hellaswag(enc):
    """read_hellaswag of the validation set, after downloading it to HELLASWAG_PATH if it is not there.

    The file gets there when it is whole, which its number of examples tells: there is no published checksum.
    Raises as read_hellaswag does, and ValueError where it cannot be fetched.
    """
    if os.path.exists(HELLASWAG_PATH):
        return read_hellaswag(HELLASWAG_PATH, enc, HELLASWAG_SIZE)
    temporary = f"{HELLASWAG_PATH}.{os.getpid()}.tmp"
    try:
        with requests.get(HELLASWAG_URL, stream=True, timeout=30) as response:
            response.raise_for_status()
            os.makedirs(os.path.dirname(HELLASWAG_PATH), exist_ok=True)
            with open(temporary, "wb") as file:
                for chunk in tqdm(response.iter_content(2**20), unit="MiB", disable=None):
                    file.write(chunk)
        examples = read_hellaswag(temporary, enc, HELLASWAG_SIZE)
        os.replace(temporary, HELLASWAG_PATH)
        return examples
    except (requests.RequestException, ValueError) as error:
        raise ValueError(f"{HELLASWAG_URL} cannot be fetched, or came damaged ({error})") from None
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


# --- end of copied block: read_hellaswag ---
@torch.no_grad()
def evaluate_hellaswag(model, examples, rank, world_size, device, autocast, caught=()):
    """The share of examples whose right ending has the smallest mean loss of its tokens (acc_norm), over all ranks.

    examples are read_hellaswag's; hellaswag.py says more of them. None if any rank has caught a signal.
    """
    model.eval()
    total = torch.zeros(2, device=device)  # right answers, and how many ranks are to stop
    for first in range(8 * rank, len(examples), 8 * world_size):
        if caught:
            total[1] = 1
            break
        batch = examples[first : first + 8]
        rows = [(context, ending) for _, _, context, endings in batch for ending in endings]
        T = min(max(len(context + ending) for context, ending in rows), model.config.block_size)
        idx, is_ending = torch.zeros(2, len(rows), T, dtype=torch.long)  # (B, T) each; what fills a row up is no matter
        for i, (context, ending) in enumerate(rows):
            ids = (context + ending)[-T:]
            idx[i, : len(ids)] = torch.tensor(ids)
            is_ending[i, max(0, len(ids) - len(ending)) : len(ids)] = 1
        idx, is_ending = to_device((idx, is_ending[:, 1:]), device)
        with autocast:
            logits = model(idx)[0][:, :-1]  # (B, T - 1, V)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), idx[:, 1:].flatten(), reduction="none")
        means = (losses.view_as(is_ending) * is_ending).sum(1) / is_ending.sum(1)  # (B,)
        labels = torch.tensor([label for _, label, _, _ in batch], device=device)
        total[0] += (means.view(-1, 4).argmin(1) == labels).sum()
    if world_size > 1:
        dist.all_reduce(total)
    right, stopped = total.tolist()
    return None if stopped else right / len(examples)


def sample(model, enc, prompt, max_new_tokens, device, autocast):
    """Two continuations of prompt, as text that is safe to print; the random numbers are the sampler's own."""
    ids = enc.encode_ordinary(prompt) or [enc.eot_token]
    idx = torch.tensor([ids] * 2, device=device)  # (2, T)
    generator = torch.Generator(device).manual_seed(42)
    with autocast:
        idx = model.generate(idx, max_new_tokens, generator)
    texts = (enc.decode(row) for row in idx.tolist())
    return ["".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text) for text in texts]


# ---------------------------------------------------------------------------------- optimization
# --- copied block: get_lr ---
def get_lr(step, learning_rate, warmup_steps, max_steps):
    """The learning rate of a step: a linear warmup, then half a cosine down to a tenth at max_steps."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))  # 0 to 1
    return learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))  # the factor goes 1 to 0.1


# --- end of copied block: get_lr ---
def get_linear_lr(step, learning_rate, warmup_steps, max_steps):
    """The learning rate of a step: a linear warmup, a plateau, then over the last 60 % of steps straight to zero."""
    return learning_rate * min(1.0, (step + 1) / max(1, warmup_steps), (max_steps - step) / (0.6 * max_steps))


SCHEDULES = {"cosine": get_lr, "linear": get_linear_lr}


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is made orthogonal, for the matrices of the blocks ("Muon", Jordan et al., 2024).

    The numbers are torch.optim.Muon's with adjust_lr_fn="match_rms_adamw" (which takes AdamW's learning rates).
    Beyond it, q, k and v are matrices of their own, the ranks share the work, and a CPU, whose bfloat16
    is slow, computes in float32. The momentum stands on every rank: checkpoints fit any number of them.
    """

    def __init__(self, blocks, learning_rate, weight_decay, rank, world_size):
        matrices = {name: p for name, p in blocks.named_parameters() if p.dim() == 2}
        self.parts = {p: 3 if name.endswith("c_attn.weight") else 1 for name, p in matrices.items()}  # q, k and v
        self.rank, self.world_size = rank, world_size
        super().__init__(matrices.values(), dict(lr=learning_rate, weight_decay=weight_decay, momentum=0.95))

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        sent = []
        for i, p in enumerate(group["params"]):
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"]
            momentum.lerp_(p.grad, 1 - group["momentum"])
            owner = i % self.world_size
            if owner == self.rank:
                update = p.grad.lerp(momentum, group["momentum"])  # Nesterov's
                update = orthogonalize(update.view(self.parts[p], -1, p.shape[1]))  # (parts, out, in)
                scale = 0.2 * max(update.shape[1:]) ** 0.5  # the RMS of AdamW's updates is about 0.2
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)
            if self.world_size > 1:
                sent.append(dist.broadcast(p, src=owner, async_op=True))
        for work in sent:
            work.wait()


def orthogonalize(x, steps=5):
    """The matrices x (..., m, n) with all singular values moved near 1, by Newton and Schulz's iteration.

    A quintic whose coefficients are chosen to lift small singular values fast; they end between 0.7 and 1.2.
    """
    x = x.bfloat16() if x.device.type == "cuda" else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    x = x.mT if (tall := x.shape[-2] > x.shape[-1]) else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizers(model, name, learning_rate, weight_decay, device, rank, world_size):
    """AdamW as GPT-3's for all parameters, or for those that Muon is not for; biases and norms do not decay."""
    optimizers, parameters = [], list(model.parameters())
    if name == "muon":
        optimizers = [Muon(model.h, learning_rate, weight_decay, rank, world_size)]
        parameters = [p for p in parameters if p not in optimizers[0].parts]
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")
    return [*optimizers, torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)]


def matmul_peak(device, dtype):
    """FLOP/s of a large square matrix product, the best of half a second: what the device can really do."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds, begin = math.inf, time.perf_counter()
    while time.perf_counter() < begin + 0.5:
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the result
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * n**3 / seconds


def try_compile(device):
    """Why torch.compile does not work on device, None if it does: it needs a C++ compiler, on GPUs Triton."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    except Exception as error:  # its parts fail in many ways
        return " ".join(str(error).split("\n\n")[0].split())
    return None


def keep_freed_memory():
    """Have the C library keep memory that is freed, where it can be told to (glibc).

    A step of a large model on a CPU takes and frees gigabytes; new pages from the system cost a tenth of its time.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def draw_curves(log_dir):
    """Start plot.py, where it stands beside this file, on the run so far; whatever becomes of it, the run goes on."""
    plot = os.path.join(os.path.dirname(os.path.abspath(__file__)), "plot.py")
    if os.path.exists(plot) and importlib.util.find_spec("matplotlib"):
        silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        with suppress(OSError):
            subprocess.Popen(["nice", sys.executable, plot, log_dir], start_new_session=True, **silent)


# ----------------------------------------------------------------------------------- checkpoints
SHAPE_FLAGS = ("n_layer", "n_head", "n_embd")  # which --init_from decides
RESULT_FLAGS = (  # what a resumed run must share with its beginning: they decide what the model becomes
    *("data", "shuffle", "seed", *SHAPE_FLAGS, "block_size"),
    *("dropout", "total_batch_size", "max_steps", "learning_rate", "warmup_steps", "weight_decay", "grad_clip"),
    *("optimizer", "schedule"),
)
DISK_ERRORS = (OSError, RuntimeError, SafetensorError)  # what Python, torch.save and save_file raise on a full disk


def list_checkpoints(log_dir):
    """The directories of the checkpoints in log_dir, oldest first."""
    names = os.listdir(log_dir) if os.path.isdir(log_dir) else []
    names = [name for name in names if re.fullmatch(r"step_\d{6,}", name)]
    return [f"{log_dir}/{name}" for name in sorted(names, key=lambda name: int(name[5:]))]


def save_checkpoint(log_dir, step, model, tokenizer, optimizers, scaler, args):
    """Write log_dir/step_NNNNNN, whole or not at all, and drop the oldest beyond args.keep_checkpoints.

    model.safetensors, config.json and tokenizer, the content of files by name, are a Hugging Face model,
    trainer.pt holds what only training needs, and sha256.json tells whether all of it is still what was written.
    Raises one of DISK_ERRORS.
    """
    final, temporary = f"{log_dir}/step_{step:06d}", f"{log_dir}/tmp_step_{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        for name, content in tokenizer.items():
            with open(f"{temporary}/{name}", "wb") as file:
                file.write(content)
        states = [optimizer.state_dict() for optimizer in optimizers]
        trainer = {"step": step, "optimizers": states, "scaler": scaler.state_dict(), "args": vars(args)}
        torch.save(trainer, f"{temporary}/trainer.pt")
        checksums = {name: sha256_of(f"{temporary}/{name}") for name in sorted(os.listdir(temporary))}
        with open(f"{temporary}/sha256.json", "w", encoding="utf-8") as file:
            json.dump(checksums, file, indent=1)
        for path in (*(f"{temporary}/{name}" for name in os.listdir(temporary)), temporary):
            fsync(path)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that the run has passed again
        os.replace(temporary, final)
        fsync(log_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(log_dir)[: -args.keep_checkpoints] if args.keep_checkpoints else []:
        shutil.rmtree(old, ignore_errors=True)


def fsync(path):
    """Wait until a file or directory is on the disk, not just in the system's memory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def load_checkpoint(path, args):
    """The (model, content of trainer.pt) of a checkpoint; raises ValueError, in one line, if it is damaged.

    Exits if the checkpoint is of a run with other flags, other data or another tokenizer.
    """
    try:
        with open(f"{path}/sha256.json", encoding="utf-8") as file:
            checksums = json.load(file)
        for name in ("config.json", "model.safetensors", "trainer.pt"):
            if sha256_of(f"{path}/{name}") != checksums[name]:
                raise ValueError(f"{name} is not as it was written")
        trainer = torch.load(f"{path}/trainer.pt", map_location="cpu", weights_only=True)
        was = {name: trainer["args"][name] for name in RESULT_FLAGS}
        model = GPT.from_pretrained(path, dropout=args.dropout)
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(f"{path} is damaged ({error!r})") from None
    was_plateau = args.schedule == "linear" and trainer["step"] <= 0.4 * min(args.max_steps, was["max_steps"])
    if was_plateau:  # nothing that was done depends on where the plateau ends
        del was["max_steps"]
    for name, value in was.items():
        if value != getattr(args, name) and not (args.init_from and name in SHAPE_FLAGS):
            seen, what = getattr(args, name), "the data in --data_dir" if name == "data" else f"--{name}"
            fail(f"{what} is {seen}, the run in {path} has {value}: use that, or another --log_dir")
    return model, trainer


def lock_run(log_dir):
    """The open file that marks log_dir as in use until this process ends, however it ends; exits if it is already."""
    try:
        os.makedirs(log_dir, exist_ok=True)
        lock = open(f"{log_dir}/lock", "a", encoding="utf-8")  # noqa: SIM115, held open
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        fail(f"--log_dir {log_dir} is in use by another run: wait for its end, or name another directory")
    except OSError as error:
        fail(f"cannot write to --log_dir {log_dir} ({error.strerror}): name another directory")


def open_log(args, meta, step):
    """log.txt, to append to, without the lines from step on or cut in the middle; exits if it cannot be written.

    Writes run.json, the flags and where the data are from, sets aside the checkpoints after the one that --resume
    names, and removes those that a crash left half-written: a full disk may need the room.
    """
    path, kept = f"{args.log_dir}/log.txt", []
    try:
        passed = list_checkpoints(args.log_dir) if args.resume not in (None, "newest") else []
        for later in [path for path in passed if int(path.rpartition("_")[2]) > step]:
            former = f"{args.log_dir}/former_{os.path.basename(later)}"  # the run goes another way from here
            shutil.rmtree(former, ignore_errors=True)
            os.rename(later, former)
        for entry in os.scandir(args.log_dir):
            if entry.name.startswith("tmp_step_"):
                shutil.rmtree(entry.path) if entry.is_dir() else os.remove(entry.path)
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                kept = [line for line in file if re.fullmatch(r"\d+ \S+ \S+\n", line) and int(line.split()[0]) < step]
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.writelines(kept)
        os.replace(f"{path}.tmp", path)
        with open(f"{args.log_dir}/run.json.tmp", "w", encoding="utf-8") as file:
            json.dump(vars(args) | {"tokenizer": meta["tokenizer"], "source": meta["source"]}, file, indent=1)
        os.replace(f"{args.log_dir}/run.json.tmp", f"{args.log_dir}/run.json")
        return open(path, "a", buffering=2**24, encoding="utf-8")  # what a full disk refuses waits in the buffer
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror}): make room, or name another --log_dir")


# --------------------------------------------------------------------------------- command line
def say(*lines, file=None):
    """Print lines at once; a screen that is gone, or a file in its place on a full disk, does not end a run."""
    with suppress(OSError):
        print(*lines, sep="\n", file=file, flush=True)


def warn(message):
    """Say in one line on stderr what went wrong where the run goes on."""
    say(f"warning: {message}", file=sys.stderr)


def fail(message, only_here=False):
    """Report a user's mistake in one line on stderr and exit with status 2.

    Under torchrun all processes find most mistakes and the first reports them; only_here: this one alone did.
    """
    if not only_here and os.environ.get("RANK", "0") != "0":
        time.sleep(20)  # the first one's exit ends this process meanwhile, unless it found nothing
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


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
ZERO_IS_FINE = ("seed", "dropout", "warmup_steps", "weight_decay", "keep_checkpoints", "hellaswag_interval")


def size_or_auto(text):
    """An argparse type: a whole number, or None for "auto"."""
    return None if text == "auto" else int(text)


def parse_args():
    """The flags, with the preset's values for those not given; exits at one that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see --help")  # argparse's own errors in one line, too
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--preset", choices=list(PRESETS), default="gpt2", help="where flags without a default take it from (gpt2)")
    add("--data_dir", help="directory of token shards")
    add("--shuffle", action=switch, default=True, help="visit windows in random, not in file order (on)")
    add("--seed", type=int, default=1337, help="of weights, data order and dropout (1337)")
    add = parser.add_argument_group("model").add_argument
    add("--n_layer", type=int, help="blocks")
    add("--n_head", type=int, help="attention heads a block")
    add("--n_embd", type=int, help="channels, a multiple of n_head")
    add("--block_size", type=int, help="tokens a sequence")
    add("--init_from", metavar="DIR|NAME", help="start from a checkpoint or a Hugging Face GPT-2; its shape is taken")
    add("--dropout", type=float, default=0.0, help="share of activations zeroed in training (0.0)")
    add = parser.add_argument_group("optimization").add_argument
    add("--total_batch_size", type=int, help="tokens a step, over all processes")
    micro = "sequences in memory at a time, a process (auto: what fits on a GPU, a few on a CPU)"
    add("--micro_batch_size", type=size_or_auto, metavar="N", help=micro)
    add("--max_steps", type=int, help="training steps")
    add("--optimizer", choices=["adamw", "muon"], help="muon: for the blocks' matrices, AdamW for the rest")
    add("--learning_rate", type=float, help="its peak")
    add("--schedule", choices=list(SCHEDULES), help="cosine: to a tenth of the peak; linear: a plateau, then to zero")
    add("--warmup_steps", type=int, help="steps of linear warmup")
    add("--weight_decay", type=float, default=0.1, help="of matrices and embeddings (0.1)")
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient (1.0)")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_interval", type=int, help="steps between validations and samples")
    add("--val_tokens", type=int, help="validation tokens, at most all there are")
    add("--hellaswag_interval", type=int, help="steps between HellaSwag evaluations (0: none)")
    add("--prompt", help="text that the two samples continue")
    add("--max_new_tokens", type=int, help="tokens a sample")
    add = parser.add_argument_group("system").add_argument
    add("--log_dir", default="log", help="directory of the run's log and checkpoints (log)")
    add("--log_interval", type=int, help="steps between lines on the screen")
    add("--plot", action=switch, default=True, help="draw log_dir/curves.png at every validation (on)")
    add("--checkpoint_interval", type=int, help="steps between checkpoints")
    add("--keep_checkpoints", type=int, default=3, help="newest checkpoints that stay (3; 0: all)")
    resume = "go on from the checkpoint DIR (from log_dir's newest)"
    add("--resume", nargs="?", const="newest", metavar="DIR", help=resume)
    add("--max_hours", type=float, help="hours after which to save and stop (no limit)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (auto)")
    add("--dtype", choices=list(DTYPES), help="of matmuls (the best that the device has; float32 on a CPU)")
    add("--compile", action=switch, help="torch.compile the model (on GPUs)")
    args = parser.parse_args()
    shape = [f"--{name}" for name in SHAPE_FLAGS if getattr(args, name)]
    if args.init_from and shape:
        fail(f"{shape[0]} comes from the model that --init_from names: leave it out")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, value in vars(args).items():
        zero_is_fine = name in ZERO_IS_FINE
        if type(value) in (int, float) and not (value > 0 or value == 0 and zero_is_fine):
            fail(f"--{name} is {value}: it must be {'0 or more' if zero_is_fine else 'above 0'}")
        if type(value) in (int, float) and value >= 2**62 and name not in ("grad_clip", "max_hours"):
            fail(f"--{name} is {value}: that is too large")
    args.prompt = args.prompt.encode(errors="surrogateescape").decode(errors="replace")  # an argument can be any bytes
    if args.n_embd % args.n_head:
        fail(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}: change either")
    if args.dropout >= 1:
        fail(f"--dropout is {args.dropout}: it must be below 1")
    return args


def catch_signals():
    """A list to which SIGTERM, SIGINT and SIGUSR1 are added as they come; a second SIGINT ends the process at once."""
    caught = []

    def handler(number, frame):
        if number == signal.SIGINT and caught and time.monotonic() > caught[0][1] + 1:  # torchrun repeats the first
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        caught.append((signal.Signals(number).name, time.monotonic()))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, handler)
    return caught


def largest_micro_batch(model, limit, device, autocast):
    """The largest power of two of sequences, at most limit, whose step leaves a tenth of a GPU's memory free."""
    states = 8 * sum(p.numel() for p in model.parameters())  # bytes that AdamW will want for its two averages
    size, fits = 1, 0
    while size <= limit:
        idx = torch.randint(model.config.vocab_size, (size, model.config.block_size), device=device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            with autocast:
                loss = model(idx, idx)[1]
            loss.backward()
        except torch.OutOfMemoryError:
            break
        if torch.cuda.max_memory_allocated(device) + states > 0.9 * torch.cuda.mem_get_info(device)[1]:
            break
        size, fits = 2 * size, size
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    if not fits:
        what = f"one sequence of --block_size {model.config.block_size}"
        fail(f"not even {what} fits into the memory of {device}: shorten it, or take a smaller model", only_here=True)
    return fits


def open_data(args):
    """The meta.json of --data_dir and the windows of its two splits; exits if it is not as it should be."""
    try:
        if not os.path.isdir(args.data_dir):
            make = "python prepare_shakespeare.py (seconds) or python fineweb.py (hours)"
            raise ValueError(f"--data_dir {args.data_dir} does not exist: make one with {make}")
        meta = read_meta(args.data_dir)
        train_windows, val_windows = (
            Windows(args.data_dir, split, meta, args.block_size, args.seed, args.shuffle and split == "train")
            for split in ("train", "val")
        )
        return meta, train_windows, val_windows
    except (OSError, ValueError) as error:
        fail(error)


def new_model(args, meta):
    """A GPT-2 of the flags' shape with random weights, or the one that --init_from names; exits if that cannot be."""
    tokens = {"vocab_size": meta["vocab_size"], "tokenizer": meta["tokenizer"]}
    if not args.init_from:
        return GPT(GPTConfig(**tokens, **{k: getattr(args, k) for k in GPTConfig.__annotations__ if hasattr(args, k)}))
    try:
        model = GPT.from_pretrained(args.init_from, block_size=args.block_size, dropout=args.dropout)
    except (OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        if os.path.isdir(args.init_from):
            fail(f"--init_from: {why}")
        fail(f"--init_from {args.init_from} cannot be fetched ({why}): without a network name a directory")
    for name, value in tokens.items():
        theirs = getattr(model.config, name)
        if theirs != value:
            what = f"{args.init_from} has {name} {theirs}, the shards in {args.data_dir} have {value}"
            fail(f"{what}: make them again with the model's tokenizer")
    return model


def open_hellaswag(enc, tokenizer, rank, world_size):
    """(examples, "") for evaluate_hellaswag, or (None, why there are none): what the first rank got, on every rank."""
    found = [None, "it takes GPT-2's tokens and vocabulary"]
    if rank == 0 and enc and tokenizer == "gpt2":
        try:
            found = [fetch_hellaswag(enc), ""]
        except (OSError, ValueError) as error:
            found[1] = str(error).splitlines()[0]
    if world_size > 1:
        dist.broadcast_object_list(found)
    return found


def open_run(args, meta, rank):
    """The (lock, model, content of trainer.pt or None) with which a run starts; exits if --log_dir forbids it.

    A resumed run starts from --resume's checkpoint or from the newest one in --log_dir that is as it was written.
    """
    if args.resume not in (None, "newest") and not os.path.isdir(args.resume):
        fail(f"--resume {args.resume} does not exist: name a checkpoint, or none to take the newest in --log_dir")
    resume_dir = None if args.resume in (None, "newest") else os.path.realpath(args.resume)
    holds_run = list_checkpoints(args.log_dir) or os.path.exists(f"{args.log_dir}/log.txt")
    if holds_run and (not args.resume or resume_dir and os.path.dirname(resume_dir) != os.path.realpath(args.log_dir)):
        fail(f"--log_dir {args.log_dir} holds a run: --resume it, name another directory, or delete it")
    candidates = [resume_dir] if resume_dir else list_checkpoints(args.log_dir)[::-1] if args.resume else []
    model = None if candidates else new_model(args, meta)
    lock, damaged = lock_run(args.log_dir) if rank == 0 else None, []
    for path in candidates:
        try:
            model, trainer = load_checkpoint(path, args)
        except ValueError as error:
            damaged.append(str(error))
            continue
        if damaged and rank == 0:
            warn(f"{'; '.join(damaged)}: resuming from the one before")
        return lock, model, trainer
    if resume_dir:
        fail(f"--resume: {damaged[0]}: name a checkpoint that a run wrote; --init_from starts from any GPT-2")
    if damaged:
        fail(f"{damaged[0]}, and there is none before it: delete it, or name another --log_dir, to start again")
    return lock, model, None


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    args, started = parse_args(), time.monotonic()

    # One process a device; torchrun tells each which it is.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    if world_size > 1 and device.type == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    micro_tokens = (args.micro_batch_size or 1) * args.block_size * world_size
    if args.total_batch_size % micro_tokens:
        sizes = f"--micro_batch_size {args.micro_batch_size or 1} * --block_size {args.block_size}"
        whole = f"{micro_tokens} = {sizes} * {world_size} processes"
        fail(f"--total_batch_size {args.total_batch_size} is not divisible by {whole}: change one of them")
    meta, train_windows, val_windows = open_data(args)
    identity = hashlib.sha256(repr((meta, train_windows.identity, val_windows.identity)).encode()).hexdigest()
    windows_per_rank = args.total_batch_size // args.block_size // world_size
    if args.micro_batch_size is None and device.type != "cuda":
        args.micro_batch_size = math.gcd(windows_per_rank, 16 if args.preset == "shakespeare" else 4)
    args.data = f"{meta['tokenizer']}-{identity[:12]}"  # changes with the tokens or their order

    # Numbers: 16 bits in matmuls where the device is fast at them, float32 everywhere else.
    if args.dtype is None:
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if has_bfloat16 else "float16" if device.type == "cuda" else "float32"
    dtype = DTYPES[args.dtype]
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    if device.type == "cpu":
        keep_freed_memory()

    # The model and the optimizers, new or as a checkpoint has them.
    torch.manual_seed(args.seed)
    lock, raw_model, trainer = open_run(args, meta, rank)
    args.n_layer, args.n_head, args.n_embd = (getattr(raw_model.config, name) for name in SHAPE_FLAGS)
    start_step = trainer["step"] if trainer else 0
    raw_model.to(device)
    optimizer_args = (args.optimizer, args.learning_rate, args.weight_decay, device, rank, world_size)
    optimizers = make_optimizers(raw_model, *optimizer_args)
    if trainer:
        for optimizer, state in zip(optimizers, trainer["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(trainer["scaler"])

    # What wraps the model shares its weights; evaluation and sampling use raw_model.
    notes = []  # what this run does without
    if args.compile is None:
        args.compile = device.type == "cuda"
    if args.compile and (why := try_compile(device)):
        args.compile = False
        notes.append(f"no torch.compile: {why}")
    if world_size > 1:
        backend, store = "nccl" if device.type == "cuda" else "gloo", None
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun's store keeps dead processes' addresses at a restart
            store = next(dist.rendezvous("env://"))[0]
            store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    log_file = open_log(args, meta, start_step) if rank == 0 else None  # now that no rank looks for a run any more
    if args.micro_batch_size is None:
        limit = math.gcd(windows_per_rank, 64)  # a power of two; beyond it GPUs gain no speed
        fits = torch.tensor(largest_micro_batch(raw_model, limit, device, autocast), device=device)
        if world_size > 1:
            dist.all_reduce(fits, op=dist.ReduceOp.MIN)
        args.micro_batch_size = fits.item()
    grad_accum_steps = windows_per_rank // args.micro_batch_size
    model = raw_model
    if world_size > 1:
        model = DDP(model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    if args.compile:  # outside DDP: its graph is cut where a bucket of gradients is full, whose sum starts there
        model = torch.compile(model)

    # What is about to run, everything resolved.
    flops_per_token = 6 * raw_model.num_params + 12 * args.n_layer * args.n_embd * args.block_size
    peak = matmul_peak(device, dtype)
    enc, tokenizer, examples = None, {}, None
    try:
        enc, tokenizer = get_tokenizer(meta["tokenizer"]), tokenizer_files(meta["tokenizer"])
    except requests.RequestException:
        notes.append("no samples: GPT-2's vocabulary cannot be fetched; TIKTOKEN_CACHE_DIR can name a folder with it")
    if args.hellaswag_interval:
        examples, why = open_hellaswag(enc, meta["tokenizer"], rank, world_size)
        notes += [f"no HellaSwag: {why}"] if why else []
    if rank == 0:
        say(
            " ".join(f"--{name} {value}" for name, value in vars(args).items()),
            f"torch {torch.__version__}, {world_size} x {device}, {torch.get_num_threads()} CPU threads each",
            f"train: {train_windows.total:,} windows in {len(train_windows.paths)} shards, val: {val_windows.total:,}",
            f"{raw_model.num_params:,} parameters, {args.total_batch_size:,} tokens a step = {grad_accum_steps} x "
            f"{world_size} x {args.micro_batch_size} x {args.block_size}",
            *notes,
            f"matmul peak {peak / 1e12:.3g} TFLOP/s in {args.dtype}, measured: mfu is the share of it",
            *([f"resuming at step {start_step}"] if trainer else []),
        )

    def log(step, **values):
        try:
            if log_file:
                log_file.writelines(f"{step} {kind} {value}\n" for kind, value in values.items())
                log_file.flush()
        except OSError as error:
            warn(f"{args.log_dir}/log.txt cannot be written ({error.strerror}); the run goes on")

    def save(step):
        nonlocal saved_step
        try:
            if rank == 0 and step > saved_step:
                save_checkpoint(args.log_dir, step, raw_model, tokenizer, optimizers, scaler, args)
                saved_step = step
        except DISK_ERRORS as error:
            warn(f"no checkpoint at step {step} ({str(error).splitlines()[0]}); the run goes on")

    def windows_of(micro_step):  # counted from the first step of the run: which they are hangs on nothing else
        first = (micro_step * world_size + rank) * args.micro_batch_size
        return range(first, first + args.micro_batch_size)

    def next_batch(micro_step):
        return to_device(train_windows.batch(windows_of(micro_step)), device)

    caught = catch_signals()
    stopping, saved_step, skipped_steps = False, start_step, 0
    x, y = next_batch(start_step * grad_accum_steps)
    for step in range(start_step, args.max_steps + 1):
        last_step = step == args.max_steps
        if last_step or stopping or step % args.checkpoint_interval == 0:
            save(step)
        if not stopping and (last_step or step % args.eval_interval == 0):
            val_args = (args.val_tokens, args.micro_batch_size, rank, world_size, device, autocast, caught)
            val_loss = evaluate(raw_model, val_windows, *val_args)
            stopping = val_loss is None  # the resumed run evaluates this step again
            if rank == 0 and not stopping:
                log(step, val=f"{val_loss:.4f}")
                say(f"step {step:5d} | val loss: {val_loss:.4f}")
                sample_args = (enc, args.prompt, args.max_new_tokens, device, autocast)
                for text in sample(raw_model, *sample_args) if enc and math.isfinite(val_loss) else []:
                    say(f"> {text}".replace("\n", "\n> "))
        if examples and not stopping and (last_step or step % args.hellaswag_interval == 0):
            acc_norm = evaluate_hellaswag(raw_model, examples, rank, world_size, device, autocast, caught)
            stopping = acc_norm is None
            if rank == 0 and not stopping:
                log(step, hella=f"{acc_norm:.4f}")
                say(f"step {step:5d} | HellaSwag acc_norm: {acc_norm:.4f}")
        if rank == 0 and args.plot and (last_step or stopping or step % args.eval_interval == 0):
            draw_curves(args.log_dir)
        if last_step or stopping:
            save(step)
            break

        # One step: the gradient of the mean loss over all its windows, a micro-batch at a time.
        start = time.perf_counter()
        model.train()
        torch.manual_seed(args.seed + step * world_size + rank)  # of dropout: it follows from the step, too
        loss = torch.zeros((), device=device)
        micro_steps = range(step * grad_accum_steps, (step + 1) * grad_accum_steps)
        for micro_step in micro_steps:
            # DDP adds up the ranks' gradients in the last backward alone; the flag covers the forward pass too.
            with model.no_sync() if world_size > 1 and micro_step != micro_steps[-1] else nullcontext():
                with autocast:
                    micro_loss = model(x, y)[1] / grad_accum_steps
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
            x, y = next_batch(micro_step + 1)  # while a GPU still computes this one
        lr = SCHEDULES[args.schedule](step, args.learning_rate, args.warmup_steps, args.max_steps)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), args.grad_clip)
        stop = caught or args.max_hours and time.monotonic() - started > 3600 * args.max_hours
        totals = torch.stack((loss, norm, torch.full_like(loss, bool(stop)))) / world_size
        if world_size > 1:
            dist.all_reduce(totals)  # all ranks agree on the loss, and on stopping
        if not scaler.is_enabled() or math.isfinite(norm):  # a gradient that overflows float16 moves no parameter
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        raw_model.zero_grad(set_to_none=True)
        mean_loss, norm, stopping = totals.tolist()  # the one wait for the device in a step, but for float16's
        dt = time.perf_counter() - start
        if not math.isfinite(mean_loss + norm):
            if not scaler.is_enabled() or not math.isfinite(mean_loss):
                if rank == 0 or not math.isfinite(loss.item()):
                    indices = [index for micro_step in micro_steps for index in windows_of(micro_step)]
                    places = [(train_windows.paths[shard], at) for shard, at in map(train_windows.locate, indices)]
                    warn(f"step {step}, rank {rank}: loss {loss.item()}, norm {norm} on (shard, offset) {places}")
                sys.exit(1)  # without saving: the newest checkpoint is from before this loss
            skipped_steps += 1  # float16 overflowed: the scaler scales less from here on
            log(step, skipped=skipped_steps)
        tokens_per_second = args.total_batch_size / dt
        log(step, train=f"{mean_loss:.6f}", lr=f"{lr:.4e}", norm=f"{norm:.4f}", **{"tok/s": f"{tokens_per_second:.1f}"})
        if rank == 0 and step % args.log_interval == 0:
            mfu = 100 * flops_per_token * tokens_per_second / world_size / peak
            say(
                f"step {step:5d} | loss: {mean_loss:.3f} | lr {lr:.1e} | norm: {norm:.3g} | dt: {1000 * dt:.1f}ms | "
                f"tok/s: {tokens_per_second:.1f} | mfu: {mfu:.1f}%"
            )

    if rank == 0 and stopping:
        say(f"stopped by {caught[0][0] if caught else 'the clock'} at step {step}: --resume goes on")
    if world_size > 1:
        del model  # DDP holds the process group: freed by anything but the next line, gloo can deadlock at exit
        dist.destroy_process_group()
    if rank == 0 and saved_step < step:
        warn(f"the last state, of step {step}, could not be saved")
        sys.exit(1)
    del lock  # held until here


if __name__ == "__main__":
    try:
        main()
    except (SystemExit, Exception) as error:
        if isinstance(error, torch.OutOfMemoryError):
            say("error: out of memory on the device: take a smaller --micro_batch_size and --resume", file=sys.stderr)
            error = SystemExit(2)
        if "RANK" not in os.environ:
            raise error
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            cause = str(error).partition(". ")[0]
            if os.environ["RANK"] in ("0", "1"):  # not all of them, and not the first alone: it may be the dead one
                say(f"error: rank {os.environ['RANK']} lost another ({cause}): --resume goes on", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            sys.excepthook(*sys.exc_info())
        os._exit(error.code if isinstance(error, SystemExit) else 1)  # an orderly exit could wait for a dead rank
