"""
Text from a GPT-2: a checkpoint of train_gpt2.py, or any of Hugging Face's in a directory or on its hub.

    python sample.py                                                        # the newest checkpoint in log/
    python sample.py --model gpt2 --prompt "Hello, I'm a language model,"
    python sample.py --model log/step_019073 --prompt "The" --num_samples 4 --temperature 0.8 --top_p 0.9
    cat prompt.txt | python sample.py --model gpt2 --prompt - --stop "." --max_new_tokens 100

Prints the prompt and what follows, a token at a time; without --prompt it asks for prompts on a terminal, and
elsewhere starts a document. The same flags give the same text. Reads a directory or the hub, writes nothing.
Expect 35 to 40 tokens a second from GPT-2 124M on two CPU cores: every token reads all weights from memory.
"""

import argparse
import codecs
import json
import os
import re
import signal
import sys
from contextlib import suppress
from functools import partial

import requests
import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters that could command a terminal


def fail(message):
    """Report a user's mistake in one line on stderr and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


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
# ------------------------------------------------------------------------------------- sampling
def choose(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One id a row, (B,), drawn from softmax(logits / temperature), logits (B, V); temperature 0 takes the likeliest.

    top_k leaves the k likeliest ids (0: all), then top_p the fewest likeliest whose probabilities add up to it
    ("The Curious Case of Neural Text Degeneration", 2019). Raises ValueError for logits that are no numbers.
    """
    best, likeliest = logits.float().max(dim=-1)  # (B,), (B,)
    if not best.isfinite().all():
        raise ValueError("the model computes infinities or NaN: try --dtype float32, or another checkpoint")
    if temperature < 1e-6:  # 0, or too little to divide by
        return likeliest
    logits, idx = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))  # (B, k), the likeliest first
    probs = F.softmax((logits.float() - best[:, None]) / temperature, dim=-1)  # of 0 at most: nothing overflows
    if top_p < 1:
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)  # those before are enough
    return idx.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


@torch.inference_mode()
def generate(model, prompt, num_samples, max_new_tokens, pick):
    """Yield max_new_tokens times the next ids, (num_samples,), which pick makes of logits (num_samples, V).

    prompt, a list of ids, is continued by all samples. The next token follows from the last block_size ones. Before
    there are as many, keys and values are kept; afterwards each step moves all tokens to other positions, which
    are learned, so that it has to compute all of them anew.
    """
    config, wte, block_size = model.config, model.tensors["wte.weight"], model.config["n_positions"]
    length = min(block_size, len(prompt) + max_new_tokens)
    sizes = (num_samples, config["n_head"], length, config["n_embd"] // config["n_head"])
    cache = torch.empty(config["n_layer"], 2, *sizes, device=wte.device, dtype=wte.dtype)
    idx, start = torch.tensor([prompt], device=wte.device), 0  # (1, T): one row fills the cache of all samples
    for _ in range(max_new_tokens):
        pos = torch.arange(start, idx.shape[1], device=wte.device)  # (T,) or (1,)
        hidden = model.hidden(idx[:, start:], pos, cache=cache, start=start)[:, -1]  # (1 or B, C)
        token = pick(model.logits(hidden).expand(num_samples, -1))  # (B,)
        yield token
        start = idx.shape[1]
        idx = torch.cat((idx.expand(num_samples, -1), token[:, None]), dim=1)  # (B, T + 1)
        if start == block_size:
            idx, start = idx[:, 1:], 0


class Text:
    """The text of one sample as its tokens come, up to end-of-text or the first of the texts stops.

    Characters come whole, bytes that are none as U+FFFD, and so do control characters but newline and tab.
    """

    def __init__(self, enc, stops):
        self.enc, self.stops, self.held, self.done = enc, stops, "", False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token):
        """The text, maybe none, that is settled now that token has come; token None says that no more will."""
        if self.done:
            return ""
        self.done = token in (None, self.enc.eot_token)
        data = b"" if self.done else self.enc.decode_single_token_bytes(token)
        text = self.held + self.decoder.decode(data, final=self.done)
        begins = [text.find(stop) for stop in self.stops if stop in text]
        if begins:
            text, self.done = text[: min(begins)], True
        begun = [n for stop in self.stops for n in range(len(stop)) if text.endswith(stop[:n])]  # characters of a stop
        settled = len(text) - (0 if self.done else max(begun, default=0))
        self.held = text[settled:]
        return CONTROL.sub("\ufffd", text[:settled])


def continuations(model, enc, ids, args, generator):
    """Yield, step by step, what to append to the text of each sample: lists (num_samples,) of str."""
    texts = [Text(enc, args.stop) for _ in range(args.num_samples)]
    pick = partial(choose, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, generator=generator)
    for tokens in generate(model, ids, args.num_samples, args.max_new_tokens, pick):
        yield [text.add(token) for text, token in zip(texts, tokens.tolist(), strict=True)]
        if all(text.done for text in texts):
            return
    yield [text.add(None) for text in texts]


def sample(model, enc, prompt, args, generator, echo=True):
    """Print a sample as it comes, or several one after the other, behind the prompt; raises ValueError in one line."""
    ids, block_size = enc.encode_ordinary(prompt) or [enc.eot_token], model.config["n_positions"]
    if len(ids) > block_size:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model takes {block_size}: shorten it")
    steps, shown = continuations(model, enc, ids, args, generator), prompt if echo else ""
    if args.num_samples == 1:
        print(shown, end="", flush=True)
        for (piece,) in steps:
            print(piece, end="", flush=True)
        print()
    else:
        for i, pieces in enumerate(zip(*steps, strict=True), 1):
            print(f"--- sample {i} of {args.num_samples} ---", shown + "".join(pieces), sep="\n", flush=True)


# --------------------------------------------------------------------------------- command line
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
    add = parser.add_argument_group("model").add_argument
    add("--model", default="log", help="directory of a model or a run, whose last one counts, or hub name (log)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (auto)")
    add("--dtype", choices=list(DTYPES), default="float32", help="of weights and all they meet (float32)")
    add = parser.add_argument_group("text").add_argument
    add("--prompt", help="text to continue; - reads it from standard input, without a newline at its end")
    add("--num_samples", type=int, default=1, help="continuations of it, side by side (1)")
    add("--max_new_tokens", type=int, default=200, help="tokens a sample; slow beyond the model's block_size (200)")
    add("--stop", action="append", default=[], metavar="TEXT", help="text that ends a sample; may be given repeatedly")
    add = parser.add_argument_group("choice of a token").add_argument
    add("--temperature", type=float, default=1.0, help="below 1 safer, above 1 wilder, 0 the likeliest (1.0)")
    add("--top_k", type=int, default=50, help="choose among the k likeliest tokens (50; 0: all)")
    add("--top_p", type=float, default=1.0, help="choose among the likeliest of this share in all (1.0: all)")
    add("--seed", type=int, default=1337, help="of all random numbers (1337)")
    args = parser.parse_args()
    for name, value in vars(args).items():
        zero_is_fine = name in ("temperature", "top_k", "seed")
        if type(value) in (int, float) and not (value > 0 or value == 0 and zero_is_fine):
            fail(f"--{name} is {value}: it must be {'0 or more' if zero_is_fine else 'above 0'}")
    for name, most in (("top_p", 1), ("seed", 2**64 - 1)):
        if getattr(args, name) > most:
            fail(f"--{name} is {getattr(args, name)}: it must be {most} at most")
    if "" in args.stop:
        fail("--stop is empty: give it a text")
    device = pick_device(args.device)
    model, enc, path = load_model(args.model, device, DTYPES[args.dtype])
    if args.num_samples > 1:
        model.pack()
    generator = torch.Generator(device).manual_seed(args.seed)

    if args.prompt is None and sys.stdin and sys.stdin.isatty() and sys.stdout.isatty():
        print(f"{path}: type a text to continue; Ctrl-D leaves")
        with suppress(EOFError):
            while True:
                try:
                    sample(model, enc, input("> "), args, generator, echo=False)
                except ValueError as error:
                    print(f"error: {error}", file=sys.stderr)
        print()
        return
    prompt = args.prompt or ""
    if prompt == "-" and sys.stdin:
        prompt = sys.stdin.buffer.read().decode(errors="replace").removesuffix("\n")
    prompt = prompt.encode(errors="surrogateescape").decode(errors="replace")  # an argument can be any bytes
    try:
        sample(model, enc, prompt, args, generator)
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows ? for what it lacks
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, head say, has enough
        os._exit(0)
    except OSError as error:  # a full disk, say, under standard output
        print(f"error: {error}", file=sys.stderr)
        os._exit(1)
