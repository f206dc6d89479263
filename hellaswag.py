"""
Score a GPT-2 on HellaSwag: which of four endings does it find likeliest?

    python hellaswag.py                                     # the newest checkpoint in log/
    python hellaswag.py --model gpt2                        # OpenAI's, from the Hugging Face hub
    python hellaswag.py --model log/step_019073 --output scores.json    # any directory, ours or Hugging Face's

Fetches the 10,042 examples of the validation set to hellaswag/ once (--data FILE: none), and scores them as
build-nanogpt and llm.c do: context and " " + ending are tokenised apart, acc counts the examples whose right
ending has the smallest sum of losses, acc_norm those where it has the smallest mean. The last line is

    10042 acc: 0.2859 acc_norm: 0.2955

for gpt2, as published with build-nanogpt; guessing has 0.25. --output writes every loss as JSON.
"""

import argparse
import json
import math
import os
import re
import signal
import sys
from contextlib import suppress
from itertools import chain, pairwise

import numpy as np
import requests
import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
# --- copied block: GPT ---
class GPT:
    """A GPT-2 for inference: the tensors of a checkpoint and the equations between them, no training.

    The same function as train_gpt2.py's GPT and transformers' GPT2LMHeadModel. Raises as read_pretrained does.
    """

    def __init__(self, directory_or_name, device="cpu", dtype=torch.float32):
        self.config, tensors = read_pretrained(directory_or_name)
        tensors = {name: t.T if name.endswith(CONV1D) else t for name, t in tensors.items()}  # linears: (out, in)
        self.tensors = {name: t.to(device, dtype).contiguous() for name, t in tensors.items()}
        self.tensors["lm_head.weight"] = self.tensors["wte.weight"]  # tied

    def pack(self):
        """Give the matrices oneDNN's own layout, as torch.compile does, where that is a CPU's and float32.

        Four rows times it are 1.3 to 2.6 times as fast, depending on the CPU; one row is slower.
        """
        wte = self.tensors["wte.weight"]
        if wte.device.type == "cpu" and wte.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            for name, tensor in self.tensors.items():
                if name.endswith((*CONV1D, "lm_head.weight")):
                    self.tensors[name] = torch.ops.mkldnn._reorder_linear_weight(tensor)

    def linear(self, x, name):
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        if weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return F.linear(x, weight, bias)

    def norm(self, x, name):
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.config["layer_norm_epsilon"])

    def hidden(self, idx, pos, mask=None, cache=None, start=0):
        """What the head sees, (B, T, C), for ids idx (B, T) at positions pos, broadcastable to (B, T).

        mask, bool and broadcastable to (B, n_head, T, T), is True where a query (row) may see a key (column);
        without it every token sees itself and all before it. cache, (n_layer, 2, B, n_head, S, head size), is where
        keys and values are kept, of idx behind those of the start tokens before; if there are any, T is 1.
        """
        (B, T), n_head = idx.shape, self.config["n_head"]
        activation = ACTIVATIONS[self.config["activation_function"]]
        x = self.tensors["wte.weight"][idx] + self.tensors["wpe.weight"][pos]  # (B, T, C)
        for i in range(self.config["n_layer"]):
            qkv = self.linear(self.norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")  # (B, T, 3C)
            q, k, v = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)  # 3 x (B, nh, T, hs)
            if cache is not None:
                cache[i, 0, :, :, start : start + T], cache[i, 1, :, :, start : start + T] = k, v
                k, v = cache[i, :, :B, :, : start + T]  # 2 x (B, nh, start + T, hs)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)  # (B, nh, T, hs)
            x = x + self.linear(y.transpose(1, 2).reshape(B, T, -1), f"h.{i}.attn.c_proj")
            y = activation(self.linear(self.norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"))  # (B, T, n_inner)
            x = x + self.linear(y, f"h.{i}.mlp.c_proj")
        return self.norm(x, "ln_f")

    def logits(self, hidden):
        """The head: hidden (..., C) to logits (..., vocab_size)."""
        return self.linear(hidden, "lm_head")


# --- end of copied block: GPT ---
# ----------------------------------------------------------------------------------------- data
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
# --------------------------------------------------------------------------------------- scores
def make_rows(examples, block_size):
    """The rows that score examples, the longest first: (length, number of the example, context, endings).

    endings, {number: ids}, are all four of an example, unless with the context one is longer than block_size: of
    these the last block_size ids stay, so that the ending has a context, and a row, of its own.
    """
    rows = []
    for i, (_, _, context, endings) in enumerate(examples):
        endings_of = {}  # by context
        for number, ending in enumerate(endings):
            ids = (context + ending)[-block_size:]
            n = max(1, len(ids) - len(ending))  # nothing predicts the first id, be it of the context or of an ending
            endings_of.setdefault(tuple(ids[:n]), {})[number] = ids[n:]
        for ids, parts in endings_of.items():
            length = len(ids) + sum(len(part) - 1 for part in parts.values())  # without last ids: nothing answers them
            rows.append((-(-length // 8) * 8, i, ids, parts))  # a multiple of 8 for GPUs
    return sorted(rows, key=lambda row: -row[0])


@torch.no_grad()
def score_rows(model, rows, device):
    """The losses of B rows in nats, (B, T, 4) on the device: of what comes next in each ending, 0 where nothing does.

    All endings of a row stand behind its context, at the same positions, each seeing it and itself alone.
    """
    B, T = len(rows), rows[0][0]
    idx, pos = np.zeros((2, B, T), int)
    branch = np.full((B, T), 5)  # 0 in the context, 1 to 4 in an ending, 5 in the padding
    targets = np.full((B, T, 4), -1)  # what comes next in each of the endings, -1 where that is none of it
    for b, (_, _, context, endings) in enumerate(rows):
        n = end = len(context)
        idx[b, :n], pos[b, :n], branch[b, :n] = context, range(n), 0
        for number, ending in endings.items():
            here = slice(end, end := end + len(ending) - 1)
            idx[b, here], pos[b, here], branch[b, here] = ending[:-1], range(n, n + len(ending) - 1), number + 1
            targets[b, n - 1, number], targets[b, here, number] = ending[0], ending[1:]
    scored = (targets >= 0).any(-1).ravel().nonzero()[0]  # (N,), the places from which an ending goes on
    targets = targets.reshape(-1, 4)[scored]  # (N, 4)
    idx, pos, branch, scored, targets = (torch.from_numpy(x).to(device) for x in (idx, pos, branch, scored, targets))
    query, key = branch[:, :, None], branch[:, None, :]
    mask = ((key == 0) | (key == query)).tril()  # (B, T, T): all see the context and their own branch, to their left
    hidden = model.hidden(idx, pos, mask[:, None]).flatten(0, 1)[scored]  # (N, C)
    losses = torch.zeros(B, T, 4, device=device)
    for at, h, target in zip(scored.split(1024), hidden.split(1024), targets.split(1024), strict=True):
        log_probs = F.log_softmax(model.logits(h), dim=-1, dtype=torch.float32)  # 1024 of GPT-2's: 206 MB
        losses.view(-1, 4)[at] = -log_probs.gather(-1, target.clamp(min=0)).where(target >= 0, 0.0)
    return losses


def score_hellaswag(model, examples, block_size, batch_tokens, device):
    """Yield (number, summed losses, mean losses) of the examples, two lists of 4 in nats, the longest example first.

    examples are read_hellaswag's; model.hidden(idx, pos, mask) and model.logits(hidden) are all that is used of
    model. Rows of about equal length make batches of at most batch_tokens (or one row).
    """
    batches = []
    for row in make_rows(examples, block_size):
        if not batches or (len(batches[-1]) + 1) * batches[-1][0][0] > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    sums, means = ([[None] * 4 for _ in examples] for _ in range(2))
    results = ((batch, score_rows(model, batch, device)) for batch in batches)
    # A batch is read when the next one is under way, so that a GPU never waits.
    for (batch, losses), _ in pairwise(chain(results, [None])):
        losses = losses.cpu().double().sum(1).tolist()  # (B, T, 4) -> (B, 4)
        for (_, i, _, endings), row in zip(batch, losses, strict=True):
            for number, ending in endings.items():
                sums[i][number], means[i][number] = row[number], row[number] / len(ending)
            if None not in sums[i]:
                yield i, sums[i], means[i]


# --------------------------------------------------------------------------------- command line
def fail(message):
    """Report a user's mistake in one line on stderr and exit with status 2."""
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
# --- copied block: load_model ---
def load_model(name, device, dtype):
    """The (GPT, tiktoken.Encoding, directory or name) of --model; exits where there is none, or of unknown tokens.

    name is a model's directory, a run's, whose newest checkpoint counts, or else a name on the Hugging Face hub.
    """
    path, remedy = name, "name a directory that holds config.json and model.safetensors"
    if os.path.isdir(name) and not os.path.exists(f"{name}/config.json"):
        steps = [entry for entry in os.listdir(name) if re.fullmatch(r"step_\d{6,}", entry)]
        if not steps:
            found = ", ".join(sorted(os.listdir(name))[:5]) or "nothing"
            fail(f"--model {name} holds no config.json and no step_NNNNNN, but {found}: {remedy}, or a run")
        path = f"{name}/{max(steps, key=lambda entry: int(entry[5:]))}"
    elif name == "log" and not os.path.isdir(name):
        fail("there is no checkpoint in log/: make one with python train_gpt2.py, or name a model with --model")
    try:
        model = GPT(path, device, dtype)
    except (OSError, ValueError) as error:
        where = "" if os.path.isdir(path) else " is no directory, and not to be had from the Hugging Face hub"
        fail(f"--model {name}{where}: {str(error).splitlines()[0]}: {remedy}")
    vocab_size, known = model.config["vocab_size"], {50257: "gpt2", 257: "bytes"}
    tokenizer = model.config.get("tokenizer", known.get(vocab_size))
    if vocab_size not in known or tokenizer != known[vocab_size]:
        fail(f"--model {name} has {vocab_size} tokens of the tokenizer {tokenizer!r}, which is not one of {known}")
    try:
        return model, get_tokenizer(tokenizer), path
    except requests.RequestException as error:
        remedy = "point TIKTOKEN_CACHE_DIR at a folder that holds it"
        fail(f"cannot fetch the GPT-2 vocabulary ({type(error).__name__}): {remedy}")


# --- end of copied block: load_model ---
def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see --help")  # argparse's own errors in one line, too
    add = parser.add_argument
    add("--model", default="log", help="directory of a GPT-2, of a run of train_gpt2.py, or a name on the hub (log)")
    add("--data", metavar="FILE", help="examples as JSON lines (the validation set, downloaded once)")
    add("--limit", type=int, metavar="N", help="score the first N examples alone (all)")
    add("--output", metavar="FILE", help="JSON file for the losses and predictions (none)")
    add("--batch_tokens", type=int, metavar="N", help="tokens a batch, padding included (2048 on a CPU, else 65536)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (auto)")
    add("--dtype", choices=list(DTYPES), help="of weights and activations (bfloat16 on GPUs that have it, or float32)")
    args = parser.parse_args()
    for name in ("limit", "batch_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} is {getattr(args, name)}: it must be above 0")
    is_new = args.output and not os.path.isfile(args.output)
    if is_new and (os.path.exists(args.output) or not os.path.isdir(os.path.dirname(args.output) or ".")):
        fail(f"--output {args.output} cannot be written: name a file in a directory that exists")
    device = pick_device(args.device)
    if args.dtype is None:
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if has_bfloat16 else "float32"
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    model, enc, name = load_model(args.model, device, DTYPES[args.dtype])
    model.pack()
    try:
        examples = (read_hellaswag(args.data, enc) if args.data else fetch_hellaswag(enc))[: args.limit]
    except (OSError, ValueError) as error:
        fail(f"{error}: name another file with --data")

    block_size, n, right, right_norm, predictions = model.config["n_positions"], len(examples), 0, 0, {}
    cut = sum(len(context) + max(map(len, endings)) > block_size for _, _, context, endings in examples)
    if cut:
        print(f"{cut} of {n} examples are longer than {block_size} tokens: their contexts lose their beginnings")
    batch_tokens = args.batch_tokens or (2048 if device.type == "cpu" else 65536)
    scores = score_hellaswag(model, examples, block_size, batch_tokens, device)
    bar = tqdm(scores, total=n, unit="examples", disable=None)
    for i, sums, means in bar:
        ind, label, *_ = examples[i]
        if not math.isfinite(sum(sums)):
            fail(f"the losses of example {ind} are {sums}: --model {name} is broken, or try --dtype float32")
        pred, pred_norm = sums.index(min(sums)), means.index(min(means))
        right, right_norm = right + (pred == label), right_norm + (pred_norm == label)
        predictions[i] = {"ind": ind, "label": label, "pred": pred, "pred_norm": pred_norm}
        predictions[i] |= {"losses": sums, "mean_losses": means}
        bar.set_postfix_str(f"acc_norm: {right_norm / len(predictions):.4f}", refresh=False)
    print(f"{n} acc: {right / n:.4f} acc_norm: {right_norm / n:.4f}", flush=True)  # whatever becomes of --output
    if args.output:
        result = {"model": name, "n": n, "acc": right / n, "acc_norm": right_norm / n}
        result["predictions"] = [predictions[i] for i in range(n)]
        with open(f"{args.output}.tmp", "w", encoding="utf-8") as file:
            json.dump(result, file)
        os.replace(f"{args.output}.tmp", args.output)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, head say, has enough
        os._exit(0)
    except OSError as error:  # a full disk, say, under --output or standard output
        print(f"error: {error}", file=sys.stderr)
        os._exit(1)
