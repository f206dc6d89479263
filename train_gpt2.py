"""
Lesson 3: pre-train GPT-2 (124M to 1.6B parameters) on a CPU, one GPU or many GPUs.

    python prepare_shakespeare.py
    python train_gpt2.py --preset shakespeare                # 0.8M parameters, about a minute on two CPU cores

    python fineweb.py
    python hellaswag.py --prepare                            # optional: evaluate on HellaSwag during training
    python train_gpt2.py                                     # GPT-2 124M on one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py   # the same on eight GPUs
    torchrun --standalone --nproc_per_node=8 --max-restarts=3 train_gpt2.py --resume
                                                             # the same, restarted after a crash

Reads the token shards in --data_dir and, if it exists, hellaswag/hellaswag_val.npz. Writes to --log_dir:
log.txt with one "step kind value" line per metric, run.json with the settings, and checkpoints
step_NNNNNN/, which transformers' AutoModelForCausalLM.from_pretrained loads. The kinds of metrics are
train, val, hella (HellaSwag), lr, norm, tok/s and skipped (number of float16 steps that were skipped since
this process started). A step sees the same tokens on any number of processes.

The loss at step 0 is about ln(vocab_size) + n_embd * 0.02^2 / 2 (half the variance of the logits):
10.98 for GPT-2 124M, 5.58 for --preset shakespeare. --preset shakespeare ends at 1.55 nats per byte, after
71 seconds on two CPU cores. The full run of the 124M model has not been made with this script yet.
build-nanogpt reached a validation loss below 3.29 on FineWeb-Edu with this recipe, and published runs of
this size took 45 minutes to 3 hours on eight GPUs (docs/reproduce.md).

Sections: model, data, optimizer, evaluation, run directory, resuming, stopping, command line, setup,
reporting, training loop.
In a hurry, read main() at the end.
"""

import argparse
import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

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
TOKENIZER_FILES = ("vocab.json", "merges.txt")  # from which transformers builds the tokenizer


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
        # B is the batch size, T the sequence length and C the number of channels. nh is the number
        # of heads and hs the size of a head: in GPT-2 124M, C = nh * hs = 12 * 64 = 768.
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, 3C) -> 3 x (B, T, C)
        # The heads become a batch dimension, so that each head attends by itself.
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        # softmax(q k^T / sqrt(hs)) v with the future masked out. The fused kernel (FlashAttention)
        # never stores the (T, T) attention matrix, which makes it several times faster than
        # separate matmuls. On CPUs, PyTorch has no fused kernel with dropout.
        dropout_p = self.attn_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, nh, T, hs) -> (B, T, C): concatenate the heads
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """A two-layer MLP, applied to each position independently."""

    def __init__(self, config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, n_inner)
        self.activation = ACTIVATIONS[config.activation_function]  # defined below; GPT-2 has GELU
        self.c_proj = nn.Linear(n_inner, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C) -> (B, T, n_inner) -> (B, T, C)
        x = self.activation(self.c_fc(x))
        return self.resid_dropout(self.c_proj(x))


class Block(nn.Module):
    """Attention (communication), then the MLP (computation), each with a residual connection."""

    def __init__(self, config):
        super().__init__()
        # Pre-norm: each sublayer normalizes its input, and the residual stream itself is never
        # normalized, so that gradients flow through it unchanged.
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
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
    n_inner: int | None = None  # hidden channels of the MLP; None means 4 * n_embd
    activation_function: str = "gelu_new"
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    tokenizer: str = "gpt2"  # the tokenizer that the token ids belong to: "gpt2" or "bytes"


def cross_entropy(logits, targets):
    """Return the mean cross-entropy in nats of logits (N, V) and targets (N,), computed in float32.

    Equals F.cross_entropy(logits.float(), targets) up to rounding. On a CPU, the rows are processed
    in chunks of 16 MiB: the C library returns freed tensors above 32 MiB to the operating system,
    and getting the memory again takes several times as long as the computation. On a GPU, PyTorch
    keeps freed memory, so one chunk is best.
    """
    chunk_size = len(logits)
    if logits.device.type == "cpu":
        chunk_size = max(1, 2**22 // logits.shape[1])  # as many rows as fit into 16 MiB in float32
    loss = 0.0
    for chunk, chunk_targets in zip(logits.split(chunk_size), targets.split(chunk_size), strict=True):
        loss = loss + F.cross_entropy(chunk.float(), chunk_targets, reduction="sum")
    return loss / len(targets)


class GPT(nn.Module):
    """GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019).

    The token embedding wte is also the weight of the output layer. Inside the model the vocabulary
    is padded to a multiple of 128, which makes matmuls faster: 50,257 rows become 50,304. Padding
    rows are zero, their logits are -inf, and checkpoints do not contain them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # The names are GPT-2's: wte and wpe are the embeddings of tokens and positions, h are the
        # blocks.
        padded_vocab_size = math.ceil(config.vocab_size / 128) * 128
        self.wte = nn.Embedding(padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        # a bias of -inf gives the padding rows a probability of zero
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
        cross-entropy in nats over targets (B, T). Training needs the loss only, and the logits are
        the largest tensor.
        """
        # embed the tokens and their positions
        T = idx.shape[1]
        x = self.wte(idx) + self.wpe.weight[:T]  # (B, T, C) + (T, C) -> (B, T, C)
        x = self.drop(x)
        # transform them in n_layer blocks
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        # compare the result with the embedding of each token
        logits = F.linear(x, self.wte.weight, self.head_bias)  # (B, T, C) -> (B, T, padded vocab_size)
        if targets is None:
            return logits[..., : self.config.vocab_size], None
        return None, cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, generator, top_k=50):
        """Append max_new_tokens tokens to idx (B, T), each sampled from the top_k most likely ones.

        Returns (B, T + max_new_tokens). Every token recomputes the whole sequence; sample.py has a
        key/value cache.
        """
        self.eval()
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])  # (B, T, vocab_size)
            logits = logits[:, -1].float()  # the last position predicts the next token: (B, vocab_size)
            # sample one of the k most likely tokens
            top_logits, top_idx = logits.topk(min(top_k, logits.shape[-1]))  # (B, k), (B, k)
            probs = F.softmax(top_logits, dim=-1)
            choice = torch.multinomial(probs, 1, generator=generator)  # (B, 1), an index into the k
            idx = torch.cat((idx, top_idx.gather(1, choice)), dim=1)  # (B, T + 1)
        return idx

    @property
    def num_params(self):
        """Number of parameters without the vocabulary padding: 124,439,808 for the default config."""
        num_padding_rows = self.wte.num_embeddings - self.config.vocab_size
        num_with_padding = sum(parameter.numel() for parameter in self.parameters())
        return num_with_padding - num_padding_rows * self.config.n_embd

    def save_pretrained(self, directory):
        """Write float32 weights and config.json as transformers' GPT2LMHeadModel does."""
        # Hugging Face's layout differs in three points: the padding rows, the orientation of the
        # matrices and a prefix of the names.
        weights = {}
        for name, weight in self.state_dict().items():
            if name == "wte.weight":
                weight = weight[: self.config.vocab_size]
            if name.endswith(TRANSPOSED):
                weight = weight.T
            weights[f"transformer.{name}"] = weight.float().cpu().contiguous()
        eot_token = VOCAB_SIZES[self.config.tokenizer] - 1  # <|endoftext|> has the last id
        config = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "dtype": "float32",
            "tokenizer": self.config.tokenizer,
            "vocab_size": self.config.vocab_size,
            "n_positions": self.config.block_size,
            "n_layer": self.config.n_layer,
            "n_head": self.config.n_head,
            "n_embd": self.config.n_embd,
            "n_inner": self.config.n_inner,
            "activation_function": self.config.activation_function,
            "layer_norm_epsilon": self.config.layer_norm_epsilon,
            "resid_pdrop": self.config.dropout,
            "embd_pdrop": self.config.dropout,
            "attn_pdrop": self.config.dropout,
            "bos_token_id": eot_token,
            "eos_token_id": eot_token,
        }
        os.makedirs(directory, exist_ok=True)
        save_file(weights, f"{directory}/model.safetensors", metadata={"format": "pt"})
        write_json(f"{directory}/config.json", config)

    @classmethod
    def from_pretrained(cls, name, block_size=None, dropout=None):
        """Load a GPT-2 from a checkpoint, a run directory (its newest checkpoint), or the Hub.

        block_size may be smaller than the model's, which crops the position embeddings; dropout
        replaces the stored value. Raises ValueError if there is no such model, if it is not a
        supported GPT-2, or if block_size is larger than the model's.
        """
        directory = find_pretrained(name)
        # config.json tells the shape of the model
        saved = read_config(directory)
        config = GPTConfig(
            vocab_size=saved["vocab_size"],
            block_size=block_size or saved["n_positions"],
            n_layer=saved["n_layer"],
            n_head=saved["n_head"],
            n_embd=saved["n_embd"],
            n_inner=saved["n_inner"],
            activation_function=saved["activation_function"],
            dropout=saved["resid_pdrop"] if dropout is None else dropout,
            layer_norm_epsilon=saved["layer_norm_epsilon"],
            tokenizer=saved["tokenizer"],
        )
        if config.block_size > saved["n_positions"]:
            raise ValueError(
                f"--block_size {config.block_size} is larger than the {saved['n_positions']} positions "
                f"of {name}: use a smaller --block_size"
            )
        weights = read_weights(directory, saved)
        model = cls(config)
        # Add the padding rows, which the files do not contain.
        padding = model.wte.weight[config.vocab_size :].detach()
        weights["wte.weight"] = torch.cat((weights["wte.weight"].float(), padding))
        # Drop the positions beyond block_size. If wpe.weight is missing or has a wrong shape,
        # load_state_dict reports it below.
        if "wpe.weight" in weights and weights["wpe.weight"].shape[:1] == (saved["n_positions"],):
            weights["wpe.weight"] = weights["wpe.weight"][: config.block_size]
        try:
            model.load_state_dict(weights, strict=True)
        except RuntimeError as error:  # lists missing and unexpected names and wrong shapes, line by line
            raise ValueError(f"{directory} does not match its config.json: {error}") from None
        return model


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
# ----------------------------------------------------------------------------------------- data
# --- copied block: sha256_of ---
def sha256_of(path):
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- end of copied block: sha256_of ---
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
# --- copied block: read_meta ---
VOCAB_SIZES = {"gpt2": 50257, "bytes": 257}


def check_shards(shards, path):
    """Raise ValueError unless shards is a list that describes shards, as meta.json has it."""
    if not isinstance(shards, list):
        raise ValueError(f"{path}: shards is not a list")
    for shard in shards:
        if not isinstance(shard, dict):
            raise ValueError(f"{path}: {shard!r} does not describe a shard")
        name, tokens, sha256 = shard.get("file"), shard.get("tokens"), shard.get("sha256")
        # A plain name cannot point to a file outside the directory.
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.(npy|bin)", name):
            raise ValueError(f"{path}: {name!r} is not the name of a shard")
        if type(tokens) is not int or not 0 <= tokens < 2**62:
            raise ValueError(f"{path}: {name} has {tokens!r} tokens")
        if sha256 and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
            raise ValueError(f"{path}: {sha256!r} is not a SHA-256")


def read_meta(directory):
    """Return the checked content of a data set's meta.json.

    Raises ValueError if the content is wrong, OSError if the file cannot be read.
    """
    path = f"{directory}/meta.json"
    meta = read_json(path)
    tokenizer, vocab_size = meta.get("tokenizer"), meta.get("vocab_size")
    if not isinstance(tokenizer, str) or VOCAB_SIZES.get(tokenizer) != vocab_size:
        raise ValueError(f"{path}: tokenizer {tokenizer!r} with vocab_size {vocab_size!r} is not supported")
    check_shards(meta.get("shards"), path)
    return meta


# --- end of copied block: read_meta ---
# --- copied block: load_shard ---
def load_shard(path):
    """Memory-map a token shard, a .npy file or a .bin file in llm.c's format.

    Returns a uint16 array (N,). Raises ValueError if the file is not a shard, or is shorter or
    longer than its header says.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file")  # opening a named pipe would wait forever
    try:
        if path.endswith(".npy"):
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            offset = getattr(tokens, "offset", 0)
        else:  # 256 int32 (magic number, version, number of tokens, zeros), then the tokens
            offset = 1024
            magic, version, num_tokens = np.fromfile(path, dtype="<i4", count=3).tolist()
            if (magic, version) != (20240520, 1):
                raise ValueError("its first numbers are not 20240520 and 1")
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(num_tokens,))
    except Exception as error:  # damaged headers raise many types of errors
        raise ValueError(f"{path} is not a token shard ({error}): regenerate it") from None
    if not isinstance(tokens, np.ndarray) or tokens.dtype != np.dtype("<u2") or tokens.ndim != 1:
        raise ValueError(f"{path} is not a token shard (a one-dimensional uint16 array): regenerate it")
    if os.path.getsize(path) != offset + tokens.nbytes:
        raise ValueError(f"{path} is longer than its header says: regenerate it")
    return tokens


# --- end of copied block: load_shard ---
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
class UserError(Exception):
    """An error that the user can correct.

    The run ends with its message in one line and exit status 2.
    """


class DataError(Exception):
    """A shard was damaged or changed while the run was using it."""


def read_data_set(data_dir):
    """Check a directory of token shards and return its description, a dict with these keys:

    tokenizer, vocab_size and source as in meta.json; shards, a list of dicts with file, tokens and
    sha256; fingerprint, a short string that changes with the tokens and their order. Directories
    without meta.json, such as build-nanogpt's and llm.c's, are taken to contain GPT-2 tokens.
    Raises ValueError or OSError.
    """
    if not os.path.isdir(data_dir):
        raise ValueError(
            f"--data_dir {data_dir} does not exist: create it with python prepare_shakespeare.py (seconds) "
            "or python fineweb.py (hours)"
        )
    # Read meta.json. Files whose names begin with a dot are the operating system's (macOS writes
    # ._NAME.npy).
    names = {name for name in os.listdir(data_dir) if not name.startswith(".")}
    if os.path.lexists(f"{data_dir}/meta.json"):
        try:
            meta = read_meta(data_dir)
        except ValueError as error:
            raise ValueError(f"{error}: regenerate the shards") from None
    # fineweb.py keeps a state file of each rank until the data set is complete
    elif any(re.fullmatch(r"state_\d+\.json", name) for name in names):
        raise ValueError(f"--data_dir {data_dir} is not finished: run the same fineweb.py command again")
    else:
        shards = [{"file": name} for name in sorted(names) if re.fullmatch(r".+\.(npy|bin)", name)]
        meta = {"tokenizer": "gpt2", "vocab_size": VOCAB_SIZES["gpt2"], "shards": shards}

    # Compare each shard with its description, and look for impossible token ids, which a wrong
    # tokenizer or a damaged file causes. 64M tokens are enough for that: start-up must be fast.
    probe_size = max(1024, 2**26 // max(1, len(meta["shards"])))  # tokens per shard
    digest = hashlib.sha256(f"{meta['tokenizer']} {meta.get('source')}".encode())
    for shard in meta["shards"]:
        if split_of(shard["file"]) is None:
            continue
        path = os.path.join(data_dir, shard["file"])
        if shard["file"] not in names:
            raise ValueError(f"{path} is missing, but meta.json lists it: regenerate the shards")
        tokens = load_shard(path)
        if "tokens" not in shard:  # a directory without meta.json
            shard["tokens"] = len(tokens)
        if shard["tokens"] != len(tokens):
            raise ValueError(f"{path} has {len(tokens)} tokens, but meta.json says {shard['tokens']}: regenerate it")
        probe = tokens[:probe_size]
        check_token_ids(probe, meta["vocab_size"], path)
        # A shard without a checksum is identified by its first tokens, so that a replaced shard is
        # noticed.
        identity = shard.get("sha256") or hashlib.sha256(probe.tobytes()).hexdigest()
        digest.update(f"{shard['file']} {len(tokens)} {identity}\n".encode())
    return {
        "tokenizer": meta["tokenizer"],
        "vocab_size": meta["vocab_size"],
        "source": meta.get("source"),
        "shards": meta["shards"],
        "fingerprint": f"{meta['tokenizer']}-{digest.hexdigest()[:12]}",
    }


def split_of(name):
    """Return "train" or "val" for a shard's name, such as fineweb_train_000001.bin, or None."""
    match = re.fullmatch(r"[^.].*_(train|val)(_\d+)?\.(npy|bin)", name)
    return match[1] if match else None


def check_token_ids(tokens, vocab_size, path):
    """Raise ValueError if tokens (N,) contain an id that the vocabulary does not have."""
    largest = int(tokens.max(initial=0))
    if largest >= vocab_size:
        raise ValueError(
            f"{path} contains token id {largest}, but the vocabulary has {vocab_size} tokens: regenerate it"
        )


class TokenDataset:
    """One split of a data set, cut into windows of block_size + 1 tokens, in a reproducible order.

    A window holds block_size inputs and their targets, which are the same tokens shifted by one.
    Consecutive windows share one token. So every token is a target exactly once per epoch, except
    the first token of a shard and the last ones that do not fill a window.

    With shuffle, each epoch visits the shards, and the windows of each shard, in a random order
    that is computed from the seed and the epoch. Without shuffle, it visits them in file order.
    Windows are numbered from the start of training, and the number of a window alone determines its
    tokens: a resumed run sees the same data on any number of processes. Only the permutation of one
    shard is in memory.

    data_set is the dict from read_data_set. Raises UserError if the split has no window.
    """

    def __init__(self, data_dir, split, data_set, block_size, seed, shuffle):
        shards = [shard for shard in data_set["shards"] if split_of(shard["file"]) == split]
        shards = sorted(shards, key=lambda shard: shard["file"])
        self.check_split(data_dir, split, shards)
        self.paths = [os.path.join(data_dir, shard["file"]) for shard in shards]
        self.checksums = [shard.get("sha256") for shard in shards]
        self.num_tokens = np.array([shard["tokens"] for shard in shards])
        self.vocab_size = data_set["vocab_size"]
        self.block_size = block_size
        self.seed = seed
        self.shuffle = shuffle
        self.windows_per_shard = np.maximum(self.num_tokens - 1, 0) // block_size
        self.num_windows = int(self.windows_per_shard.sum())  # per epoch
        if self.num_windows == 0:
            raise UserError(
                f"{data_dir}: no {split} shard is longer than --block_size {block_size}: use a smaller --block_size"
            )
        self.open_shards = {}  # shard number -> memory-mapped tokens
        self.verified = set()  # numbers of the shards that match their checksums
        self.epoch = None  # the epoch that shard_order and shard_ends belong to
        self.permutation_key = None  # the (epoch, shard) that permutation belongs to

    @staticmethod
    def check_split(data_dir, split, shards):
        """Raise UserError if a split has no shards; the message says what the directory contains."""
        if shards:
            return
        names = sorted(os.listdir(data_dir))
        if f"{split}.bin" in names:
            raise UserError(
                f"{data_dir}/{split}.bin looks like nanoGPT's format, which has no header: create shards "
                "from the text with prepare_shakespeare.py or fineweb.py"
            )
        listing = ", ".join(names[:5]) or "nothing"
        raise UserError(
            f"{data_dir} contains no shard named *_{split}.bin, *_{split}_000000.npy or similar (it contains "
            f"{listing}): regenerate the shards, or pass another --data_dir"
        )

    def locate(self, index):
        """Return (shard number, offset of the first token) of the window with this index."""
        epoch, index = divmod(index, self.num_windows)
        # compute the order of the shards once per epoch
        if epoch != self.epoch:
            order = np.arange(len(self.paths))
            if self.shuffle:
                order = np.random.default_rng((self.seed, epoch)).permutation(order)
            self.epoch = epoch
            self.shard_order = order
            self.shard_ends = np.cumsum(self.windows_per_shard[order])  # windows up to each shard's end
        # find the shard that contains the index-th window of the epoch, then the window's number in
        # that shard
        position = int(np.searchsorted(self.shard_ends, index, side="right"))
        shard = int(self.shard_order[position])
        window = index - int(self.shard_ends[position] - self.windows_per_shard[shard])
        if self.shuffle:
            window = int(self.shuffled_windows(epoch, shard)[window])
        return shard, window * self.block_size

    def shuffled_windows(self, epoch, shard):
        """Return the order in which an epoch visits the windows of a shard."""
        if self.permutation_key != (epoch, shard):
            rng = np.random.default_rng((self.seed, epoch, shard))
            self.permutation = rng.permutation(self.windows_per_shard[shard])
            self.permutation_key = (epoch, shard)
        return self.permutation

    def open_shard(self, shard):
        """Return the tokens of a shard. Its checksum is verified when the shard is first used.

        Hashing all shards when the run starts would take minutes. Raises DataError.
        """
        if shard not in self.open_shards:
            path = self.paths[shard]
            # the file may have changed since read_data_set saw it
            try:
                tokens = load_shard(path)
                if len(tokens) != self.num_tokens[shard]:
                    raise ValueError(f"{path} has changed since the run started")
                checksum = self.checksums[shard]
                if checksum and shard not in self.verified and sha256_of(path) != checksum:
                    raise ValueError(f"{path} does not match its SHA-256 in meta.json")
            except (OSError, ValueError) as error:
                raise DataError(f"{error}: regenerate it, then continue with --resume") from None
            self.verified.add(shard)
            # keep 16 files open: close the one that was opened first
            if len(self.open_shards) == 16:
                self.open_shards.pop(next(iter(self.open_shards)))
            self.open_shards[shard] = tokens
        return self.open_shards[shard]

    def check_open_shards(self):
        """Raise DataError if an open shard is missing or truncated.

        Reading beyond the end of a memory-mapped file would kill the process (SIGBUS).
        """
        for shard, tokens in self.open_shards.items():
            path = self.paths[shard]
            if not os.path.exists(path) or os.path.getsize(path) < tokens.offset + tokens.nbytes:
                raise DataError(f"{path} is missing or truncated: regenerate it, then continue with --resume")

    def batch(self, indices):
        """Return the windows with these indices as an int64 tensor (B, block_size + 1).

        Raises DataError.
        """
        windows = []
        for index in indices:
            shard, start = self.locate(index)
            window = self.open_shard(shard)[start : start + self.block_size + 1]
            # read_data_set looked only at the beginning of the shard
            try:
                check_token_ids(window, self.vocab_size, self.paths[shard])
            except ValueError as error:
                raise DataError(f"{error}, then continue with --resume") from None
            windows.append(window)
        return torch.from_numpy(np.stack(windows).astype(np.int64))


def to_device(tensor, device):
    """Copy a tensor to the device. Copies to a GPU run while the GPU computes."""
    if device.type == "cuda":
        # Only copies from pinned memory are asynchronous, and pinning needs a contiguous tensor.
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def load_batch(dataset, indices, device):
    """Return inputs x (B, T) and targets y (B, T), which are one token later, on the device."""
    windows = to_device(dataset.batch(indices), device)  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


class BatchLoader:
    """Loads this rank's micro-batches of the training data onto the device.

    A training step consists of grad_accum_steps micro-steps. In a micro-step, every rank computes
    the gradients of one micro-batch, micro_batch_size windows. Micro-steps are numbered from the
    start of training.
    """

    def __init__(self, dataset, micro_batch_size, rank, world_size, device):
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.device = device

    def indices(self, micro_step):
        """Return the indices of the windows that this rank takes in a micro-step."""
        first = (micro_step * self.world_size + self.rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def load(self, micro_step):
        """Return inputs and targets, each (micro_batch_size, T)."""
        return load_batch(self.dataset, self.indices(micro_step), self.device)


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
def get_linear_lr(step, learning_rate, warmup_steps, max_steps):
    """Return the learning rate of a step: linear warmup, constant, then linear decay to zero.

    The decay takes the last 60% of the steps, as in modded-nanogpt's recipes for Muon.
    """
    # warmup rises to 1 at the end of the warmup; decay falls below 1 in the last 60% of the steps
    warmup = (step + 1) / max(1, warmup_steps)
    decay = (max_steps - step) / (0.6 * max_steps)
    return learning_rate * min(1.0, warmup, decay)


SCHEDULES = {"cosine": get_lr, "linear": get_linear_lr}


class Muon(torch.optim.Optimizer):
    """Muon: SGD with momentum whose updates are orthogonalized (Keller Jordan et al., 2024).

    The update of a weight matrix is usually dominated by a few directions. Muon replaces it by the
    nearest matrix whose singular values are all about 1, so that rare directions are learned as
    fast as common ones. It is meant for the weight matrices of the blocks. AdamW optimizes the
    rest: embeddings are lookup tables whose rows are updated independently, and biases and layer
    norms are vectors. c_attn stacks three matrices, for queries, keys and values, and each of the
    three is orthogonalized separately.

    Matrices of equal shape are stacked and orthogonalized together. Each rank orthogonalizes its
    part of every stack, and the results are gathered, so that all ranks make the same update. Every
    rank keeps all momentum buffers, so a checkpoint can be resumed with any world size.

    Arguments:
        blocks: the module whose two-dimensional parameters are optimized.
        learning_rate: step size. Updates are scaled to the RMS of AdamW's, about 0.2 ("Muon is Scalable
            for LLM Training", 2025, equation 4), so that AdamW's learning rates are a good start.
        weight_decay: decoupled weight decay, as in AdamW.
        rank, world_size: which part of the work this process does.
    """

    def __init__(self, blocks, learning_rate, weight_decay, rank, world_size):
        self.num_parts = {}  # parameter -> number of matrices in it
        for name, parameter in blocks.named_parameters():
            if parameter.dim() == 2:
                self.num_parts[parameter] = 3 if name.endswith("c_attn.weight") else 1
        self.rank = rank
        self.world_size = world_size
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
            update = update.view(self.num_parts[parameter], -1, parameter.shape[1])  # (parts, out, in)
            stacks.setdefault(update.shape[1:], []).append((parameter, update))

        # orthogonalize each stack, and apply its updates
        for shape, members in stacks.items():
            updates = torch.cat([update for _, update in members])  # (matrices, out, in)
            updates = self.orthogonalize_in_parallel(updates)
            scale = 0.2 * max(shape) ** 0.5  # an orthogonal matrix has an RMS of max(shape) ** -0.5
            sizes = [len(update) for _, update in members]
            for (parameter, _), update in zip(members, updates.split(sizes), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def orthogonalize_in_parallel(self, matrices):
        """Return orthogonalize(matrices), matrices (N, m, n), with the work shared by all ranks."""
        if self.world_size == 1:
            return orthogonalize(matrices)
        # Each rank takes an equal number of matrices; zero matrices pad the stack.
        per_rank = math.ceil(len(matrices) / self.world_size)
        padding = per_rank * self.world_size - len(matrices)
        padded = torch.cat((matrices, matrices.new_zeros(padding, *matrices.shape[1:])))
        own = orthogonalize(padded[self.rank * per_rank : (self.rank + 1) * per_rank]).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own)
        return torch.cat(parts)[: len(matrices)]


def orthogonalize(x):
    """Replace the singular values of matrices x (N, m, n) by values near 1. Returns (N, m, n).

    Runs five Newton-Schulz iterations with a polynomial of degree 5, after which nearly all
    singular values are between 0.7 and 1.2. The coefficients are chosen to raise small singular
    values quickly rather than to converge exactly (Jordan et al., 2024). On GPUs the iterations run
    in bfloat16, which is precise enough; most CPUs are slow in bfloat16.
    """
    if x.device.type == "cuda":
        x = x.bfloat16()
    # x x^T is smaller than x^T x if x has fewer rows than columns
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    # the iteration needs singular values of at most 1, and none of them is larger than the
    # Frobenius norm
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        # x <- 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x
        gram = x @ x.mT  # (N, m, m)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if is_tall else x


# The state that each optimizer keeps per parameter, which checkpoints contain.
OPTIMIZER_STATE = {
    "Muon": {"momentum"},
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
}


def configure_optimizers(model, optimizer, learning_rate, weight_decay, device, rank=0, world_size=1):
    """Return [AdamW], or [Muon, AdamW] with Muon for the matrices of the blocks.

    AdamW has the settings of GPT-3. Biases and layer norms are not decayed: they have few
    parameters, and pulling them to zero would only limit what the model can express. All groups get
    the learning rate of the schedule in each step, in update_parameters.

    To add an optimizer, extend this function, --optimizer in parse_args, and OPTIMIZER_STATE.
    """
    optimizers = []
    # Muon takes the matrices of the blocks
    muon_parameters = set()
    if optimizer == "muon":
        muon = Muon(model.h, learning_rate, weight_decay, rank, world_size)
        muon_parameters = set(muon.num_parts)
        optimizers.append(muon)
    # AdamW takes the other parameters, in two groups
    parameters = [parameter for parameter in model.parameters() if parameter not in muon_parameters]
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")  # one kernel for all parameters
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)
    optimizers.append(adamw)
    return optimizers


def clip_gradients(model, optimizers, scaler, grad_clip):
    """Scale all gradients down together if their norm is above grad_clip.

    Returns the norm before clipping, a scalar tensor. It may be NaN or infinite.
    """
    # float16 only: divide the gradients by the factor by which the loss was multiplied
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    return nn.utils.clip_grad_norm_(model.parameters(), grad_clip)


def update_parameters(optimizers, scaler, lr, norm):
    """Set the learning rate lr and run one step of each optimizer.

    norm is the gradient norm from clip_gradients.
    """
    # float16 only: if a gradient overflowed, skip the step of all optimizers, and scaler.update()
    # halves its factor. scaler.step checks each optimizer by itself, so it could skip AdamW and not
    # Muon. Reading the norm makes the CPU wait for the GPU, which other dtypes avoid.
    skip = scaler.is_enabled() and not math.isfinite(norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not skip:
            scaler.step(optimizer)
    scaler.update()


# ----------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model, raw_model, dataset, val_tokens, batch_size, rank, world_size, device, autocast, stop):
    """Return the mean loss in nats per token over the first val_tokens tokens of a split.

    All ranks share the work and return the same value, over the same windows for any world size.
    model may be compiled. It gets batches of batch_size windows only, because another size would
    compile it again; raw_model, the same model uncompiled, takes a smaller last batch. If stop has
    a reason afterwards, on any rank, the result is incomplete and must be discarded.
    """
    raw_model.eval()
    dataset.check_open_shards()
    # at least one window, at most the whole split
    num_windows = max(1, min(val_tokens // dataset.block_size, dataset.num_windows))
    total = torch.zeros((), device=device)
    # the ranks take turns: rank r evaluates the batches r, r + world_size, ...
    for first in range(rank * batch_size, num_windows, world_size * batch_size):
        if stop.reason:
            break
        indices = range(first, min(first + batch_size, num_windows))
        x, y = load_batch(dataset, indices, device)
        forward = model if len(indices) == batch_size else raw_model
        with autocast:
            _, loss = forward(x, y)
        total += loss * len(indices)
    if world_size > 1:
        dist.all_reduce(total)
    return total.item() / num_windows


def load_hellaswag(path, block_size):
    """Load the arrays that hellaswag.py --prepare wrote. Returns a dict with N examples.

    tokens (N, 4, T): the context and each of the four endings, padded with zeros.
    context_length (N,): number of tokens in the context.
    length (N, 4): number of tokens in the context and the ending together.
    label (N,): number of the correct ending.

    The examples are sorted by length, so that batches need little padding. Raises ValueError if the
    file is missing or damaged, or if an example is longer than block_size.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing: create it with python hellaswag.py --prepare")
    # damaged files raise many types of errors
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in ("tokens", "context_length", "length", "label")}
        N, num_endings, T = data["tokens"].shape
        shapes = [data[name].shape for name in ("context_length", "length", "label")]
        if num_endings != 4 or shapes != [(N,), (N, 4), (N,)] or data["length"].max() > T:
            raise ValueError("the shapes of its arrays do not fit together")
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}): create it with hellaswag.py --prepare") from None
    longest = data["length"].max()
    if longest > block_size:
        raise ValueError(f"the longest example of {path} has {longest} tokens, but --block_size is {block_size}")
    return data


# cuDNN's attention is the fastest one for training, but it builds a new plan for each sequence
# length, which takes longer than the attention itself. HellaSwag and samples have many lengths, for
# which these kernels are faster.
ANY_LENGTH_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.no_grad()
def evaluate_hellaswag(model, data, micro_batch_size, rank, world_size, device, autocast, stop):
    """Return the HellaSwag accuracy acc_norm, computed by all ranks together.

    Each example has a context and four endings, one of them correct. The model's choice is the
    ending with the lowest mean loss per token; acc_norm is the fraction of examples with the
    correct choice. hellaswag.py explains it with an example. data is the dict of load_hellaswag.
    Batches have at most 32 examples, and no more tokens than a training micro-batch. If a stop is
    requested meanwhile, the result is incomplete: discard it.
    """
    model.eval()
    block_size = model.config.block_size
    batch_size = micro_batch_size * block_size // (4 * int(data["length"].max()))  # examples of 4 endings each
    batch_size = max(1, min(32, batch_size))
    num_correct = torch.zeros((), device=device)
    for first in range(rank * batch_size, len(data["label"]), world_size * batch_size):
        if stop.reason:
            break
        batch = slice(first, first + batch_size)
        # Padding to multiples of 64 keeps the number of different lengths small.
        T = math.ceil(data["length"][batch].max() / 64) * 64
        T = min(T, block_size, data["tokens"].shape[2])
        tokens = torch.from_numpy(data["tokens"][batch, :, :T].astype(np.int64))
        tokens = to_device(tokens, device)  # (B, 4, T)
        context_length = to_device(torch.from_numpy(data["context_length"][batch]), device)  # (B,)
        length = to_device(torch.from_numpy(data["length"][batch]), device)  # (B, 4)
        label = to_device(torch.from_numpy(data["label"][batch]), device)  # (B,)

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
        num_correct += (mean_loss.argmin(dim=1) == label).sum()
    if world_size > 1:
        dist.all_reduce(num_correct)
    return num_correct.item() / len(data["label"])


def generate_samples(model, enc, args, device, autocast, rank, val_loss):
    """Return a list of two continuations of args.prompt as printable text.

    The list is empty on ranks other than 0, without a tokenizer, and if val_loss is not finite:
    sampling from probabilities that are NaN is an error. Uses its own random generator, so sampling
    does not affect training. Leaves the model in eval mode.
    """
    if enc is None or rank != 0 or not math.isfinite(val_loss):
        return []
    # an empty prompt becomes <|endoftext|>, which starts every document
    tokens = enc.encode_ordinary(args.prompt) or [enc.eot_token]
    idx = torch.tensor([tokens, tokens], device=device)  # (2, T)
    generator = torch.Generator(device).manual_seed(42)
    with autocast, sdpa_kernel(ANY_LENGTH_BACKENDS):
        idx = model.generate(idx, args.max_new_tokens, generator)
    # control characters could confuse a terminal
    samples = []
    for row in idx.tolist():
        text = enc.decode(row)
        text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
        samples.append(text)
    return samples


# -------------------------------------------------------------------------------- run directory
# A resumed run must have the same data and the same values of these flags. check_same_settings
# makes two exceptions. --dtype, --micro_batch_size, --device, --compile and the number of processes
# may change: they change the result by rounding only, and with --dropout by other dropout masks.
# --init_from matters only when a run starts. No other flag affects the weights.
RESULT_FLAGS = (
    "seed",
    "shuffle",
    "n_layer",
    "n_head",
    "n_embd",
    "block_size",
    "dropout",
    "total_batch_size",
    "max_steps",
    "optimizer",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "weight_decay",
    "grad_clip",
)
CHECKPOINT_FORMAT = 2  # increase it when older checkpoints can no longer be resumed
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # as on Lustre without flock, and on some network disks
DISK_ERRORS = (OSError, RuntimeError, SafetensorError)  # what Python, torch.save and save_file raise on a full disk


class RunDirectory:
    """A run's --log_dir: a lock, log.txt, run.json, and checkpoints named step_NNNNNN.

    A checkpoint is written to a temporary directory, flushed to disk and renamed, so that it is
    either complete or absent, whenever the process is killed. Its sha256.json lets a later run
    detect damage. Only rank 0 writes.
    """

    def __init__(self, path):
        self.path = path
        self.lock = None
        self.log_file = None  # open on rank 0 only
        self.saved_step = None  # the last saved step, or the first step of this run
        self.tokenizer_files = {}  # file name -> content (bytes), copied into each checkpoint

    def acquire(self):
        """Lock the directory until this process ends, and check that it can be written to.

        The operating system releases the lock of a killed process. Raises UserError.
        """
        try:
            os.makedirs(self.path, exist_ok=True)
            # a soft lock, which is only a file, would survive a crash and block --resume
            self.lock = filelock.FileLock(f"{self.path}/lock", fallback_to_soft=False)
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(
                f"--log_dir {self.path} is in use by another run: wait for it, or choose another --log_dir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(
                    f"cannot write to --log_dir {self.path} ({error.strerror}): choose another --log_dir"
                ) from None
            warn(f"the file system of --log_dir {self.path} has no locks: start only one run in it")
        # Find out now, not at the first checkpoint, whether files can be written and directories
        # renamed.
        try:
            self.remove_incomplete()
            temporary = f"{self.path}/tmp_step_test"
            os.makedirs(temporary)
            write_json(f"{temporary}/test.json", {})
            flush_to_disk(temporary)
            os.replace(temporary, f"{self.path}/tmp_step_renamed")
            shutil.rmtree(f"{self.path}/tmp_step_renamed")
        except OSError as error:
            raise UserError(
                f"cannot save checkpoints in --log_dir {self.path} ({error.strerror}): free some space, or "
                "choose a --log_dir on a file system that can rename directories"
            ) from None

    def checkpoints(self):
        """Return the paths of all checkpoints, oldest first."""
        names = os.listdir(self.path) if os.path.isdir(self.path) else []
        names = [name for name in names if re.fullmatch(r"step_\d{6,18}", name)]
        return [f"{self.path}/{name}" for name in sorted(names, key=step_of)]

    def set_aside_after(self, step):
        """Rename the checkpoints after this step to former_step_NNNNNN.

        Called if the run returns to an earlier checkpoint. To resume one of them, rename it back.
        open_log drops the log's lines after that step.
        """
        for path in self.checkpoints():
            if step_of(path) > step:
                former = f"{self.path}/former_{os.path.basename(path)}"
                number = 1
                while os.path.exists(former):  # do not overwrite what was set aside before
                    number += 1
                    former = f"{self.path}/former_{os.path.basename(path)}_{number}"
                os.replace(path, former)

    def remove_incomplete(self):
        """Delete what a crash left of a checkpoint; a full disk may need the room."""
        for entry in os.scandir(self.path):
            if entry.name.startswith("tmp_step_"):
                if entry.is_dir():
                    shutil.rmtree(entry.path)
                else:
                    os.remove(entry.path)

    def start(self, step, args, data_set):
        """Prepare the directory for training from this step. Called on rank 0. Raises OSError.

        Returns a note for the header if checkpoints will lack the tokenizer's files, otherwise
        None.
        """
        # A resumed run has a checkpoint of this step, and a new run has nothing to save yet.
        self.saved_step = step
        # run.json is for plot.py and for people
        run = {**vars(args), "tokenizer": data_set["tokenizer"], "source": data_set["source"]}
        write_json(f"{self.path}/run.json.tmp", run)
        os.replace(f"{self.path}/run.json.tmp", f"{self.path}/run.json")
        # keep the tokenizer's files in memory, so that saving does not depend on the data directory
        for name in TOKENIZER_FILES:
            if os.path.isfile(f"{args.data_dir}/{name}"):
                with open(f"{args.data_dir}/{name}", "rb") as file:
                    self.tokenizer_files[name] = file.read()
        self.open_log(step)
        if self.tokenizer_files:
            return None
        return f"no {' or '.join(TOKENIZER_FILES)} in {args.data_dir}: checkpoints will have no tokenizer"

    def open_log(self, step):
        """Open log.txt for appending.

        Incomplete lines, and lines of steps that are run again, are dropped.
        """
        path = f"{self.path}/log.txt"
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(f"{path} is not a regular file")
        # the lines of steps that are done; a line without a newline at its end was cut by a crash
        complete_lines = []
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    if re.fullmatch(r"\d{1,18} \S+ \S+\n", line) and int(line.split()[0]) < step:
                        complete_lines.append(line)
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.writelines(complete_lines)
        os.replace(f"{path}.tmp", path)
        # A large buffer holds the lines while the disk is full.
        self.log_file = open(path, "a", buffering=2**24, encoding="utf-8")  # noqa: SIM115, open until the run ends

    def log(self, step, metrics):
        """Append a "step kind value" line for each of the metrics, a dict.

        Does nothing on ranks other than 0.
        """
        if self.log_file is None:
            return
        try:
            for kind, value in metrics.items():
                self.log_file.write(f"{step} {kind} {value}\n")
            self.log_file.flush()
        except OSError as error:
            warn(f"cannot write to {self.path}/log.txt ({error.strerror}); training continues")

    def save(self, step, model, optimizers, scaler, args):
        """Save a checkpoint if step is later than the last saved step.

        A failure does not end the run. Does nothing on ranks other than 0, which have no open log.
        """
        if self.log_file is None or step <= self.saved_step:
            return
        try:
            self.write_checkpoint(step, model, optimizers, scaler, args)
            self.saved_step = step
        except DISK_ERRORS as error:
            reason = str(error).partition("\n")[0]
            warn(f"cannot save a checkpoint at step {step} ({reason}); training continues")

    def write_checkpoint(self, step, model, optimizers, scaler, args):
        """Write step_NNNNNN, then delete the oldest checkpoints beyond args.keep_checkpoints.

        model.safetensors, config.json and the tokenizer's files are a Hugging Face model.
        trainer.pt holds what only training needs. Raises one of DISK_ERRORS.
        """
        final = f"{self.path}/step_{step:06d}"
        temporary = f"{self.path}/tmp_step_{step:06d}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            # 1) a model that other tools load
            model.save_pretrained(temporary)
            for name, content in self.tokenizer_files.items():
                with open(f"{temporary}/{name}", "wb") as file:
                    file.write(content)
            # 2) what a resumed run needs; the data order and the random numbers follow from the
            # seed and the step
            trainer_state = {
                "format": CHECKPOINT_FORMAT,
                "step": step,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "scaler": scaler.state_dict(),
                "args": vars(args),
            }
            torch.save(trainer_state, f"{temporary}/trainer.pt")
            # 3) checksums of these files
            checksums = {name: sha256_of(f"{temporary}/{name}") for name in sorted(os.listdir(temporary))}
            write_json(f"{temporary}/sha256.json", checksums)
            # 4) Flush everything to the disk before the renaming, which makes the checkpoint
            # visible.
            for name in os.listdir(temporary):
                flush_to_disk(f"{temporary}/{name}")
            flush_to_disk(temporary)
            shutil.rmtree(final, ignore_errors=True)  # a damaged checkpoint of the same step
            os.replace(temporary, final)
            flush_to_disk(self.path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        # delete old checkpoints only now that the new one is complete
        if args.keep_checkpoints:
            for path in self.checkpoints()[: -args.keep_checkpoints]:
                shutil.rmtree(path, ignore_errors=True)


def step_of(path):
    """Return the step of a checkpoint from its name, step_NNNNNN."""
    return int(os.path.basename(path).removeprefix("step_"))


def write_json(path, content):
    """Write a dict to a JSON file."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def flush_to_disk(path):
    """Wait until a file or directory is on the disk, not only in the system's memory."""
    if os.path.isdir(path):
        # Some network file systems and Windows cannot flush directories. A crash of the whole
        # machine could then lose the newest checkpoint, but not damage it unnoticed.
        with suppress(OSError):
            flush_descriptor(os.open(path, os.O_RDONLY))
    else:
        flush_descriptor(os.open(path, os.O_RDWR))


def flush_descriptor(descriptor):
    """Flush an open file to the disk and close it."""
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------- resuming
def choose_checkpoint(run_directory, args):
    """Return the path of the checkpoint to resume from, or None to start from scratch.

    With --resume, that is the newest undamaged checkpoint in --log_dir. With --resume DIR, it is DIR,
    or the newest checkpoint in DIR if that is the directory of another run. goes_back says when DIR
    is ignored. Raises UserError or ValueError.
    """
    # without --resume the directory must not contain a run
    checkpoints = run_directory.checkpoints()
    has_run = bool(checkpoints) or os.path.exists(f"{args.log_dir}/log.txt")
    if args.resume is None:
        if has_run:
            raise UserError(
                f"--log_dir {args.log_dir} already contains a run: pass --resume to continue it, or choose "
                "another --log_dir"
            )
        return None
    # With --resume DIR, try only the checkpoint that DIR stands for. Otherwise try all checkpoints,
    # the newest first.
    candidates = checkpoints[::-1]
    if goes_back(args, checkpoints):
        if not os.path.isdir(args.resume):
            raise UserError(f"--resume {args.resume} is not a directory: pass a checkpoint, log/step_NNNNNN")
        path = os.path.realpath(find_pretrained(args.resume))
        if not re.fullmatch(r"step_\d+", os.path.basename(path)):
            raise UserError(
                f"--resume {args.resume} is not named step_NNNNNN: pass a checkpoint (rename former_step_NNNNNN to "
                "step_NNNNNN first)"
            )
        # another run's checkpoint can start a new run, but not replace a run that is in --log_dir
        is_other_run = os.path.dirname(path) != os.path.realpath(args.log_dir)
        if has_run and is_other_run and restart_count() == 0:
            raise UserError(
                f"--log_dir {args.log_dir} already contains a run, and --resume {args.resume} belongs to another one: "
                "choose another --log_dir"
            )
        candidates = [path]
    # take the first one that is undamaged
    damages = []
    for path in candidates:
        damage = find_damage(path)
        if damage is None:
            if damages:
                warn(f"{'; '.join(damages)}: resuming from the checkpoint before it")
            return path
        damages.append(f"{path} is damaged ({damage})")
    if damages:
        raise UserError(
            f"{'; '.join(damages)}: pass an undamaged checkpoint with --resume DIR, or start a new run in another "
            "--log_dir"
        )
    return None


def restart_count():
    """Return how often torchrun or Slurm has restarted this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) + int(os.environ.get("SLURM_RESTART_COUNT", 0))


def goes_back(args, checkpoints):
    """Return whether to go back to the one checkpoint that --resume names.

    False without DIR, and if DIR is --log_dir itself: then the newest checkpoint is used. Also
    False if torchrun or Slurm has restarted this command and --log_dir has a checkpoint: the first
    start has gone back already, and the progress since then must not be lost.
    """
    if args.resume in (None, "newest") or os.path.realpath(args.resume) == os.path.realpath(args.log_dir):
        return False
    return restart_count() == 0 or not checkpoints


def find_damage(path):
    """Return in a few words what is wrong with a checkpoint, or None.

    Loads it completely, as a run would: files can match their checksums and still be unusable.
    """
    # damaged files raise many types of errors
    try:
        checksums = read_json(f"{path}/sha256.json")
        for name in ("config.json", "model.safetensors", "trainer.pt"):
            if not os.path.isfile(f"{path}/{name}"):  # opening a named pipe would wait forever
                return f"{name} is missing"
            if sha256_of(f"{path}/{name}") != checksums.get(name):
                return f"{name} does not match its checksum"
        model = GPT.from_pretrained(path)
        trainer_state = load_trainer_state(path)
        load_optimizers(model, trainer_state, torch.device("cpu"), rank=0, world_size=1)
    except UserError:  # the checkpoint of an earlier version is not damaged
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"
    return None


def load_trainer_state(path):
    """Return the dict in a checkpoint's trainer.pt.

    Raises ValueError if it is damaged, UserError if it is too old.
    """
    # weights_only: the file cannot run code
    trainer_state = torch.load(f"{path}/trainer.pt", map_location="cpu", weights_only=True)
    if not isinstance(trainer_state, dict) or not isinstance(trainer_state.get("args"), dict):
        raise ValueError("trainer.pt does not contain the state of a run")
    # it must have the current format, and its step must be that of the directory
    if trainer_state.get("format") != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} was written by an earlier version of train_gpt2.py and cannot be resumed: continue with that "
            "version, or start a new run from its weights with --init_from"
        )
    if type(trainer_state.get("step")) is not int or trainer_state["step"] != step_of(path):
        raise ValueError(f"trainer.pt belongs to step {trainer_state.get('step')!r}, not to the step of its directory")
    if trainer_state["step"] > trainer_state["args"]["max_steps"]:
        raise ValueError(
            f"trainer.pt belongs to step {trainer_state['step']}, which is later than the last step of its run"
        )
    # flags are plain values, and the state of a gradient scaler is empty or consists of numbers
    for name, value in trainer_state["args"].items():
        if not isinstance(value, (str, int, float, type(None))):
            raise ValueError(f"trainer.pt contains --{name} with a wrong type, {type(value).__name__}")
    scaler = trainer_state["scaler"]
    if scaler != {} and scaler.keys() != torch.amp.GradScaler("cpu").state_dict().keys():
        raise ValueError("trainer.pt contains an invalid state of the gradient scaler")
    if not all(isinstance(value, (int, float)) for value in scaler.values()):
        raise ValueError("trainer.pt contains an invalid state of the gradient scaler")
    return trainer_state


def load_optimizers(model, trainer_state, device, rank, world_size):
    """Return the optimizers of a run with their saved state.

    The fused optimizers read and write memory without checking sizes, so every tensor is checked
    first. Raises ValueError if the state does not fit the model.
    """
    args = trainer_state["args"]
    optimizers = configure_optimizers(
        model, args["optimizer"], args["learning_rate"], args["weight_decay"], device, rank, world_size
    )
    saved_states = trainer_state["optimizers"]
    if not isinstance(saved_states, list) or len(saved_states) != len(optimizers):
        raise ValueError("trainer.pt contains the state of other optimizers")
    for optimizer, saved in zip(optimizers, saved_states, strict=True):
        # the saved states are numbered in the order of the parameters
        parameters = []
        for group in optimizer.param_groups:
            parameters += group["params"]
        expected = OPTIMIZER_STATE[type(optimizer).__name__]
        # the state is empty if float16 has skipped all steps so far
        numbers = sorted(saved["state"])
        if numbers and numbers != list(range(len(parameters))):
            raise ValueError("trainer.pt does not contain the optimizer state of all parameters")
        for number, tensors in saved["state"].items():
            if set(tensors) != expected:
                raise ValueError(f"the optimizer state has {sorted(tensors)} instead of {sorted(expected)}")
            for name, tensor in tensors.items():
                shape = () if name == "step" else parameters[number].shape
                is_dense = tensor.layout == torch.strided and tensor.is_contiguous()
                if tensor.shape != shape or tensor.dtype != torch.float32 or not is_dense:
                    raise ValueError(f"{name} of the optimizer state has shape {tuple(tensor.shape)}, {tensor.dtype}")
        # Take the saved state only. The settings of the groups (betas, weight decay, ...) come from
        # this program and its flags.
        optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    return optimizers


def check_same_settings(path, trainer_state, args):
    """Raise UserError if the data or the RESULT_FLAGS differ from those of the checkpoint."""
    saved_args = trainer_state["args"]
    for name in ("data", *RESULT_FLAGS):
        saved, current = saved_args.get(name), getattr(args, name)
        # with --init_from, the flags of the shape still have the preset's values
        if saved == current or (args.init_from and name in SHAPE_FLAGS):
            continue
        if name == "max_steps" and args.schedule == "linear" and type(saved) is int:
            # Until the decay begins after 40% of the steps, the learning rate does not depend on
            # max_steps.
            if trainer_state["step"] <= 0.4 * min(saved, current):
                continue
        subject = "the data in --data_dir" if name == "data" else f"--{name}"
        advice = "use the same value, or another --log_dir"
        if name == "max_steps":
            advice = (
                "use the same value; to train longer, choose --schedule linear from the start, whose --max_steps may "
                "change until the decay begins, or start a new run from this model with --init_from"
            )
        raise UserError(f"{subject} is {current}, but the run in {path} has {saved}: {advice}")


# ------------------------------------------------------------------------------------- stopping
class StopRequest:
    """Records a request to stop. The training loop then saves a checkpoint and ends with status 0.

    The request comes from SIGTERM, SIGINT (Ctrl-C) or SIGUSR1, from --max_hours, or because
    torchrun was killed and left its processes behind. A second Ctrl-C ends the process at once.
    """

    def __init__(self, max_hours, parent):
        self.reason = None
        self.deadline = time.monotonic() + 3600 * (max_hours or math.inf)
        self.first_interrupt = math.inf  # time of the first SIGINT
        # torchrun is the parent of the ranks. If it is killed, they get another parent.
        self.parent = parent if "TORCHELASTIC_RUN_ID" in os.environ else None
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self.handle)

    def handle(self, number, frame):
        """Record a signal."""
        # A second Ctrl-C ends the process. torchrun repeats the first one at once, which does not
        # count.
        now = time.monotonic()
        if number == signal.SIGINT and now > self.first_interrupt + 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        if number == signal.SIGINT:
            self.first_interrupt = min(self.first_interrupt, now)
        if self.reason is None:
            self.reason = signal.Signals(number).name

    def requested(self):
        """Return whether to stop at the end of this step."""
        if self.reason is None and time.monotonic() > self.deadline:
            self.reason = "--max_hours"
        if self.reason is None and self.parent is not None and os.getppid() != self.parent:
            self.reason = "the end of torchrun"
        return self.reason is not None


# --------------------------------------------------------------------------------- command line
# Presets set the defaults of flags. The learning rates and the warmup (375M tokens) of gpt2 to
# gpt2-xl follow GPT-3 ("Language Models are Few-Shot Learners", 2020, table 2.1 and appendix B).
# All four use batches of 0.5M tokens; GPT-3 used 1M for its XL model.
GPT2 = {
    "data_dir": "edu_fineweb10B",
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "block_size": 1024,  # tokens
    "total_batch_size": 524288,  # tokens per step, about 0.5M
    "max_steps": 19073,  # one epoch over 10B tokens
    "optimizer": "adamw",
    "learning_rate": 6e-4,
    "schedule": "cosine",
    "warmup_steps": 715,
    "eval_interval": 250,  # steps
    "val_tokens": 10485760,
    "hellaswag_interval": 250,  # steps
    "checkpoint_interval": 1000,  # steps
    "log_interval": 1,  # steps
    "prompt": "Hello, I'm a language model,",
    "max_new_tokens": 48,
}
GPT2_MEDIUM = {**GPT2, "n_layer": 24, "n_head": 16, "n_embd": 1024, "learning_rate": 3e-4}
GPT2_LARGE = {**GPT2, "n_layer": 36, "n_head": 20, "n_embd": 1280, "learning_rate": 2.5e-4}
GPT2_XL = {**GPT2, "n_layer": 48, "n_head": 25, "n_embd": 1600, "learning_rate": 2e-4}
# Muon, with half of the tokens. This recipe was tuned on small models only and has not been tried
# at this size (docs/performance.md).
GPT2_FAST = {
    **GPT2,
    "max_steps": 9537,
    "optimizer": "muon",
    "learning_rate": 2e-3,
    "schedule": "linear",
    "warmup_steps": 250,
}
SHAKESPEARE = {
    "data_dir": "shakespeare",
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "block_size": 64,
    "total_batch_size": 1024,
    "max_steps": 1100,
    "optimizer": "muon",
    "learning_rate": 8e-3,
    "schedule": "linear",
    "warmup_steps": 100,
    "eval_interval": 250,
    "val_tokens": 48000,
    "hellaswag_interval": 0,
    "checkpoint_interval": 500,
    "log_interval": 10,
    "prompt": "\n",
    "max_new_tokens": 192,
}
PRESETS = {
    "gpt2": GPT2,
    "gpt2-medium": GPT2_MEDIUM,
    "gpt2-large": GPT2_LARGE,
    "gpt2-xl": GPT2_XL,
    "gpt2-fast": GPT2_FAST,
    "shakespeare": SHAKESPEARE,
}
SHAPE_FLAGS = ("n_layer", "n_head", "n_embd")  # with --init_from, these come from the loaded model
ZERO_ALLOWED = ("seed", "dropout", "warmup_steps", "weight_decay", "keep_checkpoints", "hellaswag_interval")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def say(*lines, file=None):
    """Print lines.

    A closed terminal, or a file on a full disk in its place, must not end a training run.
    """
    with suppress(OSError):
        print(*lines, sep="\n", file=file, flush=True)


def warn(message):
    """Print a one-line warning to stderr."""
    say(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def report_error(message):
    """Print a one-line error to stderr."""
    say(f"error: {' '.join(str(message).split())}", file=sys.stderr)


def fail(message):
    """Report a user error and exit with status 2. Only the first rank of each machine prints it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        report_error(message)
    sys.exit(2)


def integer_or_auto(text):
    """Convert the argument of --micro_batch_size: an integer, or None for "auto"."""
    return None if text == "auto" else int(text)


def parse_args():
    """Parse the command line, with defaults from --preset. Exits on invalid values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(f"{message}: see --help")
    from_preset = "(default: from --preset)"

    group = parser.add_argument_group("data")
    group.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="gpt2",
        help="model size and recipe: the values of the flags that are not given (default: gpt2)",
    )
    group.add_argument("--data_dir", help=f"directory of token shards {from_preset}")
    group.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="shuffle the training data; otherwise it is read in file order (default: on)",
    )
    group.add_argument("--seed", type=int, default=1337, help="random seed (default: 1337)")

    group = parser.add_argument_group("model")
    group.add_argument("--n_layer", type=int, help=f"number of blocks {from_preset}")
    group.add_argument("--n_head", type=int, help=f"attention heads per block {from_preset}")
    group.add_argument("--n_embd", type=int, help=f"channels, a multiple of n_head {from_preset}")
    group.add_argument("--block_size", type=int, help=f"context length in tokens {from_preset}")
    group.add_argument(
        "--init_from",
        metavar="MODEL",
        help="fine-tune: start from a checkpoint, a run directory or a GPT-2 on the Hugging Face Hub,\n"
        "which also sets the model size (default: random weights)",
    )
    group.add_argument("--dropout", type=float, default=0.0, help="dropout probability (default: 0.0)")

    group = parser.add_argument_group("optimization")
    group.add_argument("--total_batch_size", type=int, help=f"tokens per step, over all processes {from_preset}")
    group.add_argument(
        "--micro_batch_size",
        type=integer_or_auto,
        metavar="N",
        help="sequences per forward pass and process\n(default: auto, as many as fit on a GPU, or a few on a CPU)",
    )
    group.add_argument("--max_steps", type=int, help=f"training steps {from_preset}")
    group.add_argument(
        "--optimizer",
        choices=["adamw", "muon"],
        help=f"adamw, or muon for the blocks' matrices and adamw for the rest {from_preset}",
    )
    group.add_argument("--learning_rate", type=float, help=f"peak learning rate {from_preset}")
    group.add_argument(
        "--schedule",
        choices=list(SCHEDULES),
        help=f"learning rate: cosine decay to 10 %%, or constant, then linear decay to 0 {from_preset}",
    )
    group.add_argument("--warmup_steps", type=int, help=f"steps of linear warmup {from_preset}")
    group.add_argument(
        "--weight_decay", type=float, default=0.1, help="weight decay of matrices and embeddings (default: 0.1)"
    )
    group.add_argument("--grad_clip", type=float, default=1.0, help="clip the gradient norm to this (default: 1.0)")

    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval_interval", type=int, help=f"steps between validations and samples {from_preset}")
    group.add_argument("--val_tokens", type=int, help=f"tokens per validation, at most the whole split {from_preset}")
    group.add_argument("--hellaswag_interval", type=int, help=f"steps between HellaSwag scores; 0: never {from_preset}")
    group.add_argument("--prompt", help=f"text that the two samples continue {from_preset}")
    group.add_argument("--max_new_tokens", type=int, help=f"tokens per sample {from_preset}")

    group = parser.add_argument_group("system")
    group.add_argument("--log_dir", default="log", help="directory of the log and the checkpoints (default: log)")
    group.add_argument("--log_interval", type=int, help=f"steps between lines on the screen {from_preset}")
    group.add_argument("--checkpoint_interval", type=int, help=f"steps between checkpoints {from_preset}")
    group.add_argument(
        "--keep_checkpoints", type=int, default=3, help="number of checkpoints to keep; 0: all (default: 3)"
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        metavar="DIR",
        help="continue a run. Without DIR: from the newest checkpoint in --log_dir, or from scratch if it has\n"
        "none. With DIR: from the checkpoint DIR; later checkpoints in --log_dir are renamed to\n"
        "former_step_NNNNNN, and later lines of log.txt are deleted. The data and the flags that change the\n"
        "result must be the same as before (default: start a new run)",
    )
    group.add_argument(
        "--max_hours",
        type=float,
        help="save and stop after this many hours, counted from the end of the start-up (default: no limit)",
    )
    group.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:1, mps, ...; under torchrun each process takes a GPU of its own\n"
        "(default: auto, a GPU if there is one)",
    )
    group.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="precision of matmuls (default: bfloat16 where the GPU or CPU is fast at it, else float16 on a GPU,\n"
        "float32 on a CPU; a resumed run keeps its dtype)",
    )
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="use torch.compile (default: on GPUs only)"
    )
    args = parser.parse_args()
    resolve_args(args)
    return args


def resolve_args(args):
    """Set the flags that were not given to the preset's values. Exits if a value is invalid."""
    # --init_from sets the model size
    for name in SHAPE_FLAGS:
        if args.init_from and getattr(args, name):
            fail(f"--{name} cannot be combined with --init_from, which sets the model size: omit --{name}")
    # flags that are not given take their values from the preset
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    # numbers must be positive; written as "not value > 0", this also refuses NaN
    for name, value in vars(args).items():
        if type(value) not in (int, float):
            continue
        if name in ZERO_ALLOWED and not value >= 0:
            fail(f"--{name} is {value}: it must be 0 or more")
        if name not in ZERO_ALLOWED and not value > 0:
            fail(f"--{name} is {value}: it must be above 0")
        # larger integers overflow in PyTorch; --grad_clip and --max_hours may be infinite
        if name not in ("grad_clip", "max_hours") and value >= 2**62:
            fail(f"--{name} is {value}: it must be below 2^62")
    # values that do not fit together
    if args.n_embd % args.n_head:
        fail(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}: choose a multiple of {args.n_head}")
    if args.n_layer * args.n_embd**2 > 1e11:
        fail(f"--n_layer {args.n_layer} and --n_embd {args.n_embd} make a trillion parameters: choose a smaller model")
    if args.dropout >= 1:
        fail(f"--dropout is {args.dropout}: it must be below 1")
    # command-line arguments may contain bytes that are not UTF-8
    args.prompt = args.prompt.encode(errors="surrogateescape").decode(errors="replace")


# ---------------------------------------------------------------------------------------- setup
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
def init_distributed(device_name):
    """Join the process group that torchrun prepared, if any. Returns (rank, world_size, device)."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return 0, 1, pick_device(device_name)
    # torchrun tells each process which one it is
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            fail(f"WORLD_SIZE is {world_size}, but {name} is not set: use torchrun, or unset WORLD_SIZE")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    # one process per GPU
    is_cuda = device_name.startswith("cuda") or (device_name == "auto" and torch.cuda.is_available())
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # on this machine
    if is_cuda and num_processes > torch.cuda.device_count():
        fail(
            f"--nproc_per_node starts {num_processes} processes, but PyTorch can use {torch.cuda.device_count()} GPUs "
            "here: use a smaller --nproc_per_node, or --device cpu"
        )
    if is_cuda:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = pick_device(device_name)
    if device.type not in ("cpu", "cuda"):
        fail(f"--device {device.type} cannot be shared by {world_size} processes: start one, or use --device cpu")
    # The processes find each other through a key-value store in torchrun. After a restart on one
    # machine, it still holds the addresses of the dead processes, which a prefix hides. On several
    # machines, an environment variable does (docs/reliability.md).
    store = None
    is_one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
    if is_one_machine:
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    # The other ranks wait while rank 0 saves a checkpoint, which takes minutes for a large model on
    # a slow disk. The price of the long timeout: if a rank hangs without crashing, the others
    # notice it after an hour.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(hours=1))
    return rank, world_size, device


def on_rank_0(function, *args):
    """Call function(*args) on rank 0 and return its result on every rank.

    Its errors end every rank.
    """
    # call it on rank 0
    result, error = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = function(*args)
        except (OSError, ValueError, UserError) as caught:
            error = str(caught)
    # tell the other ranks
    if dist.is_initialized():
        result_and_error = [result, error]
        dist.broadcast_object_list(result_and_error)
        result, error = result_and_error
    if error is not None:
        raise UserError(error)
    return result


def any_rank(condition, device, world_size):
    """Return whether the condition holds on any rank."""
    if world_size == 1:
        return bool(condition)
    count = torch.tensor(float(bool(condition)), device=device)
    dist.all_reduce(count)
    return count.item() > 0


def open_run_directory(run_directory, args):
    """Lock the run directory and return the checkpoint to resume from, or None. Called on rank 0.

    Sets later checkpoints aside if --resume goes back to an earlier one. Raises UserError.
    """
    run_directory.acquire()
    checkpoint = choose_checkpoint(run_directory, args)
    if checkpoint and goes_back(args, run_directory.checkpoints()):
        # check the flags before renaming: a refused command must not change the directory
        check_same_settings(checkpoint, load_trainer_state(checkpoint), args)
        run_directory.set_aside_after(step_of(checkpoint))
    return checkpoint


def open_hellaswag(args, data_set):
    """Return (HellaSwag arrays or None, note for the header or None). Called on rank 0."""
    if args.hellaswag_interval == 0:
        return None, None
    if data_set["tokenizer"] != "gpt2":
        return None, "no HellaSwag: it needs GPT-2's tokenizer"
    try:
        return load_hellaswag(HELLASWAG_PATH, args.block_size), None
    except ValueError as error:
        return None, f"no HellaSwag: {error}"


def check_batch_size(args, world_size):
    """Exit unless the tokens of a step can be divided evenly among processes and micro-batches."""
    sequences = args.micro_batch_size or 1
    tokens = sequences * args.block_size * world_size
    if args.total_batch_size % tokens:
        fail(
            f"--total_batch_size {args.total_batch_size} is not divisible by {tokens} = "
            f"--micro_batch_size {sequences} * --block_size {args.block_size} * {world_size} processes: "
            "change one of them"
        )


def default_dtype(device, n_embd):
    """Return (fastest dtype for a model of this width on this device, reason)."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU supports it"
        return "float16", "the GPU does not support bfloat16"
    if device.type != "cpu":
        return "float32", "the safe choice on this device"
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")):
        return "float32", "the CPU has no fast bfloat16 matmuls"
    if n_embd < 256:
        return "float32", "conversions would cost a small model more than bfloat16 matmuls gain"
    return "bfloat16", "the CPU has fast bfloat16 matmuls"


def init_precision(args, trainer_state, device):
    """Set args.dtype, and return (autocast context, gradient scaler, note for the header).

    Matmuls and attention run in args.dtype. Weights, gradients, optimizer state and the loss stay
    in float32: a small update would vanish in a bfloat16 weight, which has only 8 significant bits.
    The dtype belongs to the run: a resumed run keeps it, on any device, unless --dtype says
    otherwise.
    """
    # choose the dtype: the flag, the resumed run's, or the device's best
    saved_dtype = trainer_state["args"].get("dtype") if trainer_state else None
    reason = "chosen with --dtype"
    if args.dtype is None and saved_dtype in DTYPES:
        args.dtype = saved_dtype
        reason = "the run was started with it"
    elif args.dtype is None:
        args.dtype, reason = default_dtype(device, args.n_embd)
    elif saved_dtype not in (None, args.dtype) and os.environ.get("RANK", "0") == "0":
        warn(
            f"resuming a {saved_dtype} run in {args.dtype}: the result will differ slightly from an uninterrupted "
            f"{saved_dtype} run"
        )
    # float32 matmuls use TF32 on GPUs that have it: 8 exponent bits as in float32, 10 mantissa bits
    torch.set_float32_matmul_precision("high")
    autocast = nullcontext()
    if args.dtype != "float32":
        autocast = torch.autocast(device.type, DTYPES[args.dtype])
    # float16 gradients underflow unless the loss is scaled up. For other dtypes the scaler does
    # nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")
    return autocast, scaler, f"dtype {args.dtype}: {reason}"


def init_model(args, data_set, checkpoint, device):
    """Return (model, trainer state): from the checkpoint, from --init_from, or new.

    Also sets the flags of the model's shape if the model comes from a file. Raises UserError.
    """
    source = checkpoint or args.init_from
    # a new model with random weights
    if source is None:
        config = GPTConfig(
            vocab_size=data_set["vocab_size"],
            block_size=args.block_size,
            n_layer=args.n_layer,
            n_head=args.n_head,
            n_embd=args.n_embd,
            dropout=args.dropout,
            tokenizer=data_set["tokenizer"],
        )
        return GPT(config).to(device), None
    # a model from a file, which must fit the data and, if the run is resumed, the flags
    trainer_state = None
    if checkpoint:
        trainer_state = load_trainer_state(checkpoint)
        check_same_settings(checkpoint, trainer_state, args)
    try:
        model = GPT.from_pretrained(source, args.block_size, args.dropout)
    except ValueError as error:
        raise UserError(f"cannot start from {source}: {error}") from None
    if model.config.tokenizer != data_set["tokenizer"]:
        raise UserError(
            f"{source} uses the tokenizer {model.config.tokenizer}, but the shards in {args.data_dir} use "
            f"{data_set['tokenizer']}: regenerate the shards with --tokenizer {model.config.tokenizer}"
        )
    for name in SHAPE_FLAGS:
        setattr(args, name, getattr(model.config, name))
    return model.to(device), trainer_state


def init_optimizers(model, trainer_state, scaler, args, device, rank, world_size):
    """Return (optimizers, first step), new or as the checkpoint has them."""
    if trainer_state is None:
        optimizers = configure_optimizers(
            model, args.optimizer, args.learning_rate, args.weight_decay, device, rank, world_size
        )
        return optimizers, 0
    optimizers = load_optimizers(model, trainer_state, device, rank, world_size)
    if scaler.is_enabled() and trainer_state["scaler"]:  # empty if the run did not use float16 before
        scaler.load_state_dict(trainer_state["scaler"])
    return optimizers, trainer_state["step"]


def set_micro_batch_size(model, trainer_state, args, device, autocast, world_size):
    """Set args.micro_batch_size if it is None, and return grad_accum_steps, the micro-steps per step.

    Raises UserError if not even one sequence fits on the GPU.
    """
    num_windows = args.total_batch_size // args.block_size // world_size  # per step and rank
    if args.micro_batch_size is None and device.type == "cuda":
        limit = math.gcd(num_windows, 64)  # the largest power of two, up to 64, that divides num_windows
        size = find_micro_batch_size(model, limit, device, autocast, trainer_state is not None)
        size = torch.tensor(size, device=device)
        if world_size > 1:
            dist.all_reduce(size, op=dist.ReduceOp.MIN)  # the GPUs may have different amounts of free memory
        args.micro_batch_size = size.item()
        if args.micro_batch_size == 0:
            raise UserError(
                f"one sequence of --block_size {args.block_size} does not fit into the memory of {device}: "
                "use a smaller --block_size or model"
            )
    elif args.micro_batch_size is None:
        limit = 16 if args.block_size < 256 else 4  # larger ones do not fit into the caches of a CPU
        args.micro_batch_size = math.gcd(num_windows, limit)
    return num_windows // args.micro_batch_size


def find_micro_batch_size(model, limit, device, autocast, has_optimizer_state):
    """Return how many sequences fit into a micro-batch on the GPU: a power of two up to limit.

    Returns 0 if not even one fits. Each trial runs the forward and the backward pass of the
    uncompiled model. 10% of the available memory stays free. Memory that other programs use does
    not count as available.
    """
    # A new run allocates AdamW's two float32 averages in its first step, 8 bytes per parameter. A
    # resumed run has them already.
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer_bytes = 0 if has_optimizer_state else 8 * num_parameters
    free, _ = torch.cuda.mem_get_info(device)
    available = free + torch.cuda.memory_reserved(device)  # this process can use what it has reserved
    # try 1, 2, 4, ... sequences
    best, size = 0, 1
    while size <= limit:
        idx = torch.zeros(size, model.config.block_size, dtype=torch.long, device=device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            with autocast:
                _, loss = model(idx, idx)
            loss.backward()
        except torch.OutOfMemoryError:
            break
        if torch.cuda.max_memory_allocated(device) + optimizer_bytes > 0.9 * available:
            break
        best = size
        size = 2 * size
    # free the gradients and the memory of the trials
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return best


def compile_error(device):
    """Return None if torch.compile works on this device, otherwise the reason."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    except Exception as error:  # a missing C++ compiler or Triton can raise almost any type of error
        return str(error).partition("\n\n")[0]
    return None


def wrap_model(raw_model, args, device, autocast, world_size, grad_accum_steps):
    """Return (model for training, model for validation, note for the header or None).

    All share raw_model's weights. raw_model itself is used where lengths vary, because compiled
    code is made for one shape.
    """
    # torch.compile needs a C++ compiler or Triton; without them, the model runs uncompiled
    note = None
    if args.compile is None:
        args.compile = device.type == "cuda"
    if args.compile:
        error = compile_error(device)
        if error:
            args.compile = False
            note = f"no torch.compile: {error}"
    compiled_model = raw_model
    if args.compile:
        compiled_model = torch.compile(raw_model)
    if world_size == 1:
        return compiled_model, compiled_model, note
    # DistributedDataParallel (DDP) averages the gradients over the ranks during the backward pass
    ddp_options = {
        "broadcast_buffers": False,  # the only buffer is constant
        "gradient_as_bucket_view": True,  # gradients are stored in the buckets that are all-reduced
    }
    # PyTorch 2.13 prefers forward_sync_buffers, which 2.11 does not have
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    if args.compile and grad_accum_steps == 1:
        # torch.compile around DDP splits the backward pass at DDP's buckets, so that the all-reduce
        # of one part overlaps with the computation of the next. The parts together run slower than
        # one graph, so this is worthwhile only if every backward pass communicates.
        model = torch.compile(DDP(raw_model, **ddp_options))
    else:
        model = DDP(compiled_model, **ddp_options)
    warm_up_ddp(model, raw_model, args, device, autocast)
    return model, compiled_model, note


def warm_up_ddp(model, raw_model, args, device, autocast):
    """Run one backward pass and drop its gradients.

    DDP regroups its gradient buckets after its first backward pass, which changes the order of
    summation. Without this pass, the first step of a resumed run would differ in the last bit from
    the same step of an uninterrupted run.
    """
    # Views as in load_batch: for tensors with another layout, torch.compile would compile another
    # graph.
    windows = torch.zeros(args.micro_batch_size, args.block_size + 1, dtype=torch.long, device=device)
    model.train()
    with autocast:
        _, loss = model(windows[:, :-1], windows[:, 1:])
    loss.backward()
    raw_model.zero_grad(set_to_none=False)


def average_over_ranks(loss, norm, stop_requested, world_size):
    """Return (mean loss, gradient norm, whether any rank wants to stop) over all ranks.

    All three share one all-reduce and one copy to the CPU, because each copy makes the CPU wait for
    the GPU. It is the only wait in a step, except that float16 also waits in update_parameters.
    """
    values = torch.stack((loss, norm, torch.full_like(loss, stop_requested))) / world_size
    if world_size > 1:
        dist.all_reduce(values)
    mean_loss, mean_norm, stopping = values.tolist()
    return mean_loss, mean_norm, stopping > 0


def open_tokenizer(name):
    """Return (tokenizer for the samples or None, note for the header or None)."""
    try:
        return get_tokenizer(name), None
    except ValueError as error:
        return None, f"no samples: {error}"


def attention_backend(device, dtype):
    """Return the name of the attention kernel that PyTorch chooses, such as "Cudnn" or "Flash".

    Tries it with 128 tokens and heads of 64 channels, without dropout. For other shapes, PyTorch
    may choose another kernel.
    """
    q = torch.ones(1, 1, 128, 64, device=device, dtype=DTYPES[dtype], requires_grad=True)
    y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    # the function of the backward pass is named after the kernel
    match = re.match(r"ScaledDotProduct(.+)Attention", y.grad_fn.name())
    return match[1] if match else "Math"


# Peak FLOP/s of dense matmuls according to NVIDIA's data sheets. The columns are:
# 1) a part of the GPU's name (the first row that fits counts)
# 2) the peak in bfloat16 or float16, with float32 accumulation
# 3) the peak in TF32, or in float32 on GPUs without TF32
PEAK_FLOPS = (
    ("B200", 2250e12, 1125e12),
    ("H200 NVL", 835e12, 417e12),
    ("H200", 989e12, 494e12),
    ("H100 NVL", 835e12, 417e12),
    ("H100 PCIe", 756e12, 378e12),
    ("H100", 989e12, 494e12),
    ("A100", 312e12, 156e12),
    ("L40S", 362e12, 183e12),
    ("L4", 121e12, 60e12),
    ("T4", 65e12, 8.1e12),
    ("V100-PCIE", 112e12, 14e12),
    ("V100", 125e12, 15.7e12),
    ("RTX 5090", 209.5e12, 104.8e12),
    ("RTX 4090", 165.2e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
)


def peak_flops(device, dtype, world_size):
    """Return the peak FLOP/s of world_size GPUs of this kind, or None if it is not known."""
    if device.type != "cuda":
        return None
    gpu_name = torch.cuda.get_device_name(device)
    # The names of laptop GPUs, of the RTX 4090 D and of the RTX 3090 Ti contain the name of another
    # GPU, which has another peak.
    if re.search(r"\b(Laptop|Ti|D)\b", gpu_name):
        return None
    for name, peak_16_bit, peak_32_bit in PEAK_FLOPS:
        if re.search(rf"\b{name}\b", gpu_name):
            if dtype == "float32":
                return world_size * peak_32_bit
            # these two do not have bfloat16
            if dtype == "bfloat16" and name in ("T4", "V100-PCIE", "V100"):
                return None
            return world_size * peak_16_bit
    return None


# ------------------------------------------------------------------------------------- reporting
class Reporter:
    """Prints the progress of a run and writes it to log.txt. Does nothing on ranks other than 0."""

    def __init__(self, run_directory, model, args, device, rank, world_size):
        self.run_directory = run_directory
        self.args = args
        self.device = device
        self.num_params = model.num_params
        self.is_silent = rank != 0
        # FLOPs per token, forward and backward (PaLM, 2022, appendix B): 6 per parameter, and 12 *
        # n_layer * n_embd * block_size for attention. As usual, the half of attention that the
        # causal mask makes unnecessary is counted too.
        self.flops_per_token = 6 * model.num_params + 12 * args.n_layer * args.n_embd * args.block_size
        self.peak_flops = peak_flops(device, args.dtype, world_size)
        self.first_step = None
        self.first_step_end = None  # time when it ended
        self.skipped_steps = 0

    def header(self, train_data, val_data, world_size, grad_accum_steps, checkpoint, notes):
        """Print what is about to run, with every setting resolved.

        Notes that are None are left out.
        """
        if self.is_silent:
            return
        args = self.args
        device_name = self.device.type
        if self.device.type == "cuda":
            device_name = torch.cuda.get_device_name(self.device)
        say(
            "settings: " + " ".join(f"{name}={value}" for name, value in vars(args).items()),
            f"torch {torch.__version__}, {world_size} x {device_name}, {torch.get_num_threads()} CPU threads each",
            f"train: {train_data.num_windows:,} windows in {len(train_data.paths)} shards, "
            f"val: {val_data.num_windows:,} windows",
            f"{self.num_params:,} parameters",
            f"{args.total_batch_size:,} tokens per step = {grad_accum_steps} micro-steps x {world_size} processes x "
            f"{args.micro_batch_size} sequences x {args.block_size} tokens",
            f"attention kernel: {attention_backend(self.device, args.dtype)}",
            *[note for note in notes if note],
        )
        if checkpoint:
            say(f"resuming at step {step_of(checkpoint)} from {checkpoint}")

    def validation(self, step, val_loss, samples):
        """Report the validation loss and the samples."""
        if self.is_silent:
            return
        self.run_directory.log(step, {"val": f"{val_loss:.4f}"})
        say(f"step {step:5d} | val loss: {val_loss:.4f}")
        for sample in samples:
            say("> " + sample.replace("\n", "\n> "))

    def hellaswag(self, step, accuracy):
        """Report the HellaSwag accuracy."""
        if self.is_silent:
            return
        self.run_directory.log(step, {"hella": f"{accuracy:.4f}"})
        say(f"step {step:5d} | HellaSwag acc_norm: {accuracy:.4f}")

    def step(self, step, loss, lr, norm, dt):
        """Report an optimizer step of dt seconds: in log.txt, and on the screen if it is due."""
        if self.is_silent:
            return
        if not math.isfinite(norm):  # a gradient overflowed in float16, and no parameter moved
            self.skipped_steps += 1
            self.run_directory.log(step, {"skipped": self.skipped_steps})
        tokens_per_second = self.args.total_batch_size / dt
        metrics = {
            "train": f"{loss:.6f}",
            "lr": f"{lr:.4e}",
            "norm": f"{norm:.4f}",
            "tok/s": f"{tokens_per_second:.1f}",
        }
        self.run_directory.log(step, metrics)
        time_left = self.time_left(step, dt)  # call it in every step: it remembers when the first one ended
        if step % self.args.log_interval:
            return
        mfu = ""  # model FLOPs utilization, the fraction of the GPUs' peak that is used
        if self.peak_flops is not None:
            mfu = f" | mfu: {100 * self.flops_per_token * tokens_per_second / self.peak_flops:.1f}%"
        say(
            f"step {step:5d} | loss: {loss:.3f} | lr {lr:.1e} | norm: {norm:.3g} | dt: {1000 * dt:.1f}ms | "
            f"tok/s: {tokens_per_second:.1f}{mfu} | eta {time_left}"
        )

    def time_left(self, step, dt):
        """Estimate the time to the end of the run from the mean duration of the steps so far.

        Evaluations and checkpoints count. The first step is left out as soon as there is a second
        one, because it may include compilation. So the first estimate can be far too high.
        """
        now = time.monotonic()
        seconds_per_step = dt
        if self.first_step is None:
            self.first_step, self.first_step_end = step, now
        else:
            seconds_per_step = (now - self.first_step_end) / (step - self.first_step)
        return timedelta(seconds=int(seconds_per_step * (self.args.max_steps - step - 1)))


def stop_at_bad_loss(step, loss, norm, loader, grad_accum_steps):
    """Report a loss or gradient norm that is NaN or infinite, and exit with status 1.

    loss is the loss of this rank, and norm is the gradient norm over all ranks. Rank 0 and every
    rank with a bad loss print theirs, with their data. Nothing of this step is saved: the newest
    checkpoint is from before it. torchrun cannot tell this exit from a crash. With --max-restarts,
    it repeats the steps since that checkpoint, which will usually fail again.
    """
    if loader.rank == 0 or not math.isfinite(loss):
        places = []
        for micro_step in range(step * grad_accum_steps, (step + 1) * grad_accum_steps):
            for index in loader.indices(micro_step):
                shard, offset = loader.dataset.locate(index)
                places.append((loader.dataset.paths[shard], offset))
        report_error(
            f"step {step}, rank {loader.rank}: loss {loss} on (shard, offset) {places}, norm over all ranks {norm}: "
            "inspect the data of ranks whose loss is not finite, or start a new run from the newest checkpoint with "
            "--init_from and a lower --learning_rate"
        )
    sys.exit(1)


def finish(run_directory, step, stop, stopping, rank, world_size):
    """Print why the run ends if it was stopped, and leave the process group.

    Exits with status 1 if the last step could not be saved.
    """
    if rank == 0 and stopping:
        reason = stop.reason or "a signal to another rank"
        say(f"stopped by {reason} at step {step}: continue with --resume")
    if world_size > 1:
        dist.destroy_process_group()
    if rank == 0 and run_directory.saved_step < step:
        warn(f"the final checkpoint (step {step}) could not be saved: free some space and continue with --resume")
        sys.exit(1)


# -------------------------------------------------------------------------------- training loop
def main():
    """Train: in each step save and evaluate if due, compute gradients, update, and report."""
    args = parse_args()
    parent = os.getppid()  # torchrun, if there is one: StopRequest watches whether it still runs
    rank, world_size, device = init_distributed(args.device)
    check_batch_size(args, world_size)

    # Rank 0 checks the data, locks the run directory and chooses a checkpoint; all ranks use its
    # results.
    data_set = on_rank_0(read_data_set, args.data_dir)
    args.data = data_set["fingerprint"]  # saved with the flags: a resumed run must have the same data
    train_data = TokenDataset(args.data_dir, "train", data_set, args.block_size, args.seed, args.shuffle)
    val_data = TokenDataset(args.data_dir, "val", data_set, args.block_size, args.seed, shuffle=False)
    hellaswag, hellaswag_note = on_rank_0(open_hellaswag, args, data_set)
    run_directory = RunDirectory(args.log_dir)
    checkpoint = on_rank_0(open_run_directory, run_directory, args)

    # The model and the optimizers, new or from the checkpoint, then torch.compile and DDP around
    # the model.
    torch.manual_seed(args.seed)  # the same on all ranks: they start from the same weights
    raw_model, trainer_state = init_model(args, data_set, checkpoint, device)
    autocast, scaler, dtype_note = init_precision(args, trainer_state, device)
    optimizers, start_step = init_optimizers(raw_model, trainer_state, scaler, args, device, rank, world_size)
    grad_accum_steps = set_micro_batch_size(raw_model, trainer_state, args, device, autocast, world_size)
    del trainer_state  # has a copy of the optimizer state in the CPU's memory
    model, eval_model, compile_note = wrap_model(raw_model, args, device, autocast, world_size, grad_accum_steps)

    # Rank 0 opens the log and prints what is about to run.
    enc, samples_note = open_tokenizer(data_set["tokenizer"])
    tokenizer_note = on_rank_0(run_directory.start, start_step, args, data_set)
    reporter = Reporter(run_directory, raw_model, args, device, rank, world_size)
    notes = [dtype_note, compile_note, samples_note, hellaswag_note, tokenizer_note]
    reporter.header(train_data, val_data, world_size, grad_accum_steps, checkpoint, notes)
    loader = BatchLoader(train_data, args.micro_batch_size, rank, world_size, device)
    stop = StopRequest(args.max_hours, parent)
    stopping = False  # becomes True on all ranks in the same step
    evaluation_args = (args.micro_batch_size, rank, world_size, device, autocast, stop)  # of both evaluations

    x, y = loader.load(start_step * grad_accum_steps)
    for step in range(start_step, args.max_steps + 1):
        last_step = step == args.max_steps

        # At fixed intervals and at the end: save a checkpoint, then evaluate, which might fail.
        if step % args.checkpoint_interval == 0 or last_step or stopping:
            run_directory.save(step, raw_model, optimizers, scaler, args)
        if not stopping and (step % args.eval_interval == 0 or last_step):
            # Reading a truncated shard would kill the process. Checking now and then is cheap.
            train_data.check_open_shards()
            val_loss = evaluate(eval_model, raw_model, val_data, args.val_tokens, *evaluation_args)
            stopping = any_rank(stop.reason, device, world_size)
            if not stopping:  # otherwise the evaluation is incomplete, and the resumed run repeats it
                samples = generate_samples(raw_model, enc, args, device, autocast, rank, val_loss)
                reporter.validation(step, val_loss, samples)
        if hellaswag and not stopping and (step % args.hellaswag_interval == 0 or last_step):
            accuracy = evaluate_hellaswag(raw_model, hellaswag, *evaluation_args)
            stopping = any_rank(stop.reason, device, world_size)
            if not stopping:
                reporter.hellaswag(step, accuracy)
        if last_step or stopping:
            # an evaluation may have been stopped at a step that is not saved yet
            run_directory.save(step, raw_model, optimizers, scaler, args)
            break

        # one optimizer step: accumulate the gradients of grad_accum_steps micro-batches
        start = time.perf_counter()
        model.train()
        # Seed the dropout masks from the step, so that a resumed run draws the same ones.
        torch.manual_seed(args.seed + step * world_size + rank)
        loss = torch.zeros((), device=device)  # stays on the device: reading it would wait for the computation
        for i in range(grad_accum_steps):
            # DDP averages the gradients over the ranks during a backward pass. Doing it once per
            # step, in the last backward pass, is enough. no_sync must also cover the forward pass,
            # which prepares it.
            gradient_sync = nullcontext()
            if world_size > 1 and i < grad_accum_steps - 1:
                gradient_sync = model.no_sync()
            with gradient_sync:
                with autocast:
                    _, micro_loss = model(x, y)
                micro_loss = micro_loss / grad_accum_steps  # gradients add up: dividing makes their sum a mean
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
            x, y = loader.load(step * grad_accum_steps + i + 1)  # load the next batch while a GPU computes

        # clip the gradients, which limits the effect of a bad batch, and update the parameters
        norm = clip_gradients(raw_model, optimizers, scaler, args.grad_clip)
        lr = SCHEDULES[args.schedule](step, args.learning_rate, args.warmup_steps, args.max_steps)
        update_parameters(optimizers, scaler, lr, norm)
        # DDP's gradients are views of its buckets, which must stay: they are filled with zeros
        # instead of freed.
        raw_model.zero_grad(set_to_none=world_size == 1)

        # report the step; its loss is the mean over all micro-batches and ranks
        mean_loss, mean_norm, stopping = average_over_ranks(loss, norm, stop.requested(), world_size)
        dt = time.perf_counter() - start
        # a gradient may overflow in float16: update_parameters has skipped such a step
        norm_is_bad = not math.isfinite(mean_norm) and not scaler.is_enabled()
        if norm_is_bad or not math.isfinite(mean_loss):
            stop_at_bad_loss(step, loss.item(), norm.item(), loader, grad_accum_steps)
        reporter.step(step, mean_loss, lr, mean_norm, dt)

    # Free DDP, which has a reference to the process group, before finish() destroys the group.
    # Otherwise gloo can deadlock.
    del model
    finish(run_directory, step, stop, stopping, rank, world_size)


def run_rank():
    """Call main() and end the process.

    User errors and expected failures, such as a lost process or a full memory, print one line
    instead of a traceback.
    """
    status = 1
    try:
        main()
        status = 0
    except SystemExit as error:
        status = error.code
    except UserError as error:  # it occurs on every rank, or at least on all ranks of a machine
        status = 2
        if os.environ.get("LOCAL_RANK", "0") == "0":
            report_error(error)
    except DataError as error:  # it may occur on this rank only
        status = 2
        report_error(error)
    except Exception as error:
        rank = os.environ.get("RANK")
        if is_out_of_memory(error):
            status = 2
            report_error("out of memory: use a smaller --micro_batch_size or model (with --resume to continue)")
        # NCCL raises DistError, and gloo a RuntimeError that contains its name
        elif rank is not None and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            # Two ranks report it, because rank 0 may be the one that has crashed.
            if rank in ("0", "1"):
                cause = str(error).partition(". ")[0]
                report_error(f"rank {rank} lost contact with another rank ({cause}): continue with --resume")
        elif isinstance(error, OSError):
            report_error(error)
        else:
            traceback.print_exc()
    if status != 0 or "RANK" in os.environ:
        exit_process(status)


def is_out_of_memory(error):
    """Return whether an exception means that the GPU or the machine is out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error)  # PyTorch's RuntimeError on a CPU


def exit_process(status):
    """Exit. Under torchrun, do it at once.

    A normal exit could wait forever for a rank that has crashed, and a thread of gloo that is still
    running could abort the process while Python shuts down.
    """
    if "RANK" not in os.environ:
        sys.exit(status)
    with suppress(OSError):  # the terminal may be closed
        sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    run_script(run_rank)
