"""
Generate text with a GPT-2: a checkpoint of train_gpt2.py, or any Hugging Face GPT-2.

    python sample.py                                     # the newest checkpoint in log/
    python sample.py --model gpt2 --prompt "Hello, I'm a language model,"
    python sample.py --model log/step_019073 --num_samples 4 --temperature 0.8 --top_p 0.9
    cat prompt.txt | python sample.py --model gpt2 --prompt - --stop "." --max_new_tokens 100

For each token of its vocabulary, a language model computes the probability that it comes next. One
token is drawn at random with these probabilities and appended to the text. Then the model computes
the probabilities for the token after it, and so on.

A single sample is printed token by token, several at the end. Without --prompt, the script asks for
prompts on a terminal, and starts a new document otherwise. On the same machine, the same flags
produce the same text every time. Expect about 30 tokens per second from GPT-2 124M on two CPU
cores. On some CPUs, --dtype bfloat16 is two to four times as fast.

Sections: errors, sampling, text, model, loading, command line.
"""

import argparse
import codecs
import json
import math
import os
import re
import signal
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # except newline and tab


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
# ------------------------------------------------------------------------------------ sampling
class KVCache:
    """The attention keys and values of all tokens that the model has processed so far.

    In causal attention, the keys and values of a token do not depend on later tokens. So they are
    computed once and kept, and a forward pass processes only the new tokens.
    """

    def __init__(self, model, batch_size, max_length):
        """Allocate memory for batch_size sequences of at most max_length tokens."""
        config = model.config
        head_size = config["n_embd"] // config["n_head"]
        shape = (config["n_layer"], batch_size, config["n_head"], max_length, head_size)
        self.keys = model.wte.weight.new_empty(shape)
        self.values = model.wte.weight.new_empty(shape)
        self.length = 0  # number of tokens in the cache

    def attend(self, layer, q, k, v):
        """Store the keys and values of T new tokens, and let their queries attend to all tokens.

        q, k and v have the shape (B, nh, T, hs). T is 1, or the cache is empty.
        """
        end = self.length + k.shape[2]
        # The keys and values of the prompt, a single sequence, are copied to all sequences.
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        # Tokens of the prompt attend to themselves and earlier ones, a single new token to all.
        k = self.keys[layer, : len(q), :, :end]  # (B, nh, end, hs)
        v = self.values[layer, : len(q), :, :end]  # (B, nh, end, hs)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.length == 0)


def attend_without_cache(layer, q, k, v):
    """Let each token attend to itself and the earlier tokens."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@torch.inference_mode()
def generate(model, prompt_tokens, num_samples, max_new_tokens, sampler):
    """Continue a prompt. Yields max_new_tokens tensors (B,): the next tokens of B samples.

    prompt_tokens is a list of 1 to n_positions tokens, and B is num_samples. sampler is a function
    that maps logits (B, V) to tokens (B,), such as sample_token. V is the size of the vocabulary.
    """
    device = model.wte.weight.device
    n_positions = model.config["n_positions"]
    positions = torch.arange(n_positions, device=device)
    cache = KVCache(model, num_samples, min(n_positions, len(prompt_tokens) + max_new_tokens))

    # The prompt is the same for all samples, so it is processed once, as a batch of one.
    idx = torch.tensor([prompt_tokens], device=device)  # (1, T)
    new = idx  # tokens that the model has not processed yet
    for _ in range(max_new_tokens):
        length = idx.shape[1]
        if length <= n_positions:
            x = model(new, positions[cache.length : length], cache.attend)
            cache.length = length
        else:
            # The text is longer than the model's context, so the oldest token is dropped. All other
            # tokens move to another position and get another position embedding. This changes
            # their keys and values. So the cache cannot be used any more, and each step processes
            # n_positions tokens.
            idx = idx[:, 1:]  # (B, n_positions)
            x = model(idx, positions, attend_without_cache)
        logits = model.logits(x[:, -1])  # (1 or B, C) -> (1 or B, V)
        next_token = sampler(logits.expand(num_samples, -1))  # (B, V) -> (B,)
        yield next_token
        new = next_token[:, None]  # (B, 1)
        idx = torch.cat((idx.expand(num_samples, -1), new), dim=1)  # (B, T) -> (B, T + 1)


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Sample one token per row from softmax(logits / temperature). Returns (B,) for logits (B, V).

    temperature below 1 makes likely tokens more likely. 0 always takes the most likely token. top_k
    keeps only the top_k most likely tokens (0: all). top_p then keeps the smallest set of most
    likely tokens with a total probability of at least top_p ("nucleus sampling", from "The Curious
    Case of Neural Text Degeneration", 2019). Raises ValueError if logits are NaN or infinite.
    """
    # Greedy sampling needs no random numbers.
    highest, most_likely = logits.float().max(dim=-1)  # (B, V) -> (B,) and (B,)
    if not highest.isfinite().all():
        raise ValueError("the logits are NaN or infinite: try --dtype float32 or another --model")
    if temperature < 1e-6:  # 0, or too small to divide by
        return most_likely

    # top_k: keep the k most likely tokens, the most likely one first.
    vocab_size = logits.shape[-1]
    k = min(top_k, vocab_size) if top_k else vocab_size
    logits, tokens = logits.topk(k)  # (B, V) -> (B, k) and (B, k)

    # Softmax with a temperature. Subtracting the highest logit does not change the result, and
    # avoids overflow.
    logits = logits.float() - highest[:, None]  # (B, k)
    probs = F.softmax(logits / temperature, dim=-1)  # (B, k)

    # top_p: drop a token if the more likely tokens have a total probability of top_p already. The
    # most likely token is kept even if top_p is so small that float32 rounds it to 0.
    if top_p < 1:
        before = probs.cumsum(dim=-1) - probs  # (B, k), total probability of more likely tokens
        dropped = before >= top_p
        dropped[:, 0] = False
        probs = probs.masked_fill(dropped, 0)

    # Draw one of the k tokens. multinomial does not need probabilities that add up to 1.
    choice = torch.multinomial(probs, 1, generator=generator)  # (B, k) -> (B, 1), indices of tokens
    return tokens.gather(1, choice)[:, 0]  # (B, k) -> (B, 1) -> (B,)


# ---------------------------------------------------------------------------------------- text
class StreamDecoder:
    """Turn the tokens of one sample into text as they arrive, up to <|endoftext|> or a stop text.

    A token is a sequence of bytes, and the bytes of one UTF-8 character can be spread over several
    tokens. A character is returned when all of its bytes have arrived. Invalid bytes become U+FFFD.
    So do control characters except newline and tab, because they could send commands to a terminal.
    """

    def __init__(self, tokenizer, stops):
        self.tokenizer = tokenizer
        self.stops = stops
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # A stop text may begin in the last characters of the text, so they are not returned yet.
        self.num_pending = max(map(len, stops), default=1) - 1
        self.pending = ""
        self.done = False

    def add(self, token):
        """Add a token and return the text that can be printed now. The token None ends the text."""
        if self.done:
            return ""
        # utf8 keeps the bytes of an incomplete character. At the end, they become U+FFFD.
        self.done = token is None or token == self.tokenizer.eot_token
        data = b"" if self.done else self.tokenizer.decode_single_token_bytes(token)
        text = self.pending + self.utf8.decode(data, final=self.done)

        # A stop text ends the sample. If there are several, the first one counts.
        stop_positions = [text.find(stop) for stop in self.stops if stop in text]
        if stop_positions:
            text = text[: min(stop_positions)]
            self.done = True

        end = len(text) if self.done else max(0, len(text) - self.num_pending)
        self.pending = text[end:]
        return CONTROL_CHARACTER.sub("\ufffd", text[:end])


def encode_prompt(prompt, tokenizer, n_positions):
    """Return the tokens of a prompt. Raises ValueError if it is too long for the model."""
    # <|endoftext|> is the beginning of a document
    tokens = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    if len(tokens) > n_positions:
        advice = f"the model takes at most {n_positions}: use a shorter prompt"
        raise ValueError(f"the prompt has {len(tokens)} tokens, but {advice}")
    return tokens


def print_samples(model, tokenizer, prompt_tokens, shown_prompt, args):
    """Print shown_prompt and a continuation of prompt_tokens, args.num_samples times.

    A single sample is printed token by token while it is generated. Several samples are printed one
    after the other at the end. Raises ValueError if the model computes NaN.
    """
    # Prepare the random numbers, the generation, and the text of each sample.
    n = args.num_samples
    settings = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    generator = torch.Generator(model.wte.weight.device).manual_seed(args.seed)
    sampler = partial(sample_token, **settings, generator=generator)
    steps = generate(model, prompt_tokens, n, args.max_new_tokens, sampler)
    decoders = [StreamDecoder(tokenizer, args.stop) for _ in range(n)]
    samples = [shown_prompt] * n
    if n == 1:
        print(shown_prompt, end="", flush=True)

    # Add tokens to all samples until each has reached its end.
    while not all(decoder.done for decoder in decoders):
        tokens = next(steps, None)  # (B,), or None if max_new_tokens is reached
        tokens = [None] * n if tokens is None else tokens.tolist()
        for i, token in enumerate(tokens):
            text = decoders[i].add(token)
            samples[i] += text
            if n == 1:
                print(text, end="", flush=True)
    if n == 1:
        print()
        return
    for i, sample in enumerate(samples, 1):
        print(f"--- sample {i} of {n} ---", sample, sep="\n", flush=True)


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
def number(kind, lowest, highest=math.inf):
    """Return a function that converts the text of a flag to a number in a range."""

    def convert(text):
        value = kind(text)
        if not lowest <= value <= highest:  # also true for NaN
            raise argparse.ArgumentTypeError(f"{text} is not between {lowest} and {highest}")
        return value

    convert.__name__ = kind.__name__  # for the message "invalid int value"
    return convert


def parse_args():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(f"{message}: see --help")  # one line, as all errors
    add = parser.add_argument_group("model").add_argument
    add("--model", default="log", help="model, run or GPT-2 on the Hugging Face Hub (default: log)")
    add("--device", default="auto", help="cpu, cuda, mps, ... (default: auto, the GPU if there is one)")
    dtypes = ["float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, default="float32", help="dtype of the model (default: float32)")

    add = parser.add_argument_group("text (a line break is $'\\n' in most shells)").add_argument
    add(
        "--prompt",
        help="text to continue, or - to read it from standard input\n"
        "(default: ask for prompts on a terminal, otherwise start a new document)",
    )
    add("--num_samples", type=number(int, 1), default=1, help="samples in parallel (default: 1)")
    add(
        "--max_new_tokens",
        type=number(int, 1),
        default=200,
        help="new tokens per sample, slow beyond the model's context length (default: 200)",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="end a sample before this text; may be repeated")

    add = parser.add_argument_group("sampling").add_argument
    add(
        "--temperature",
        type=number(float, 0),
        default=1.0,
        help="below 1 the text is less random, above 1 more random, and 0 always takes the most\n"
        "likely token (default: 1.0)",
    )
    add("--top_k", type=number(int, 0), default=50, help="most likely tokens to sample from; 0: all (default: 50)")
    add(
        "--top_p",
        type=number(float, 0, 1),
        default=1.0,
        help="sample from the most likely tokens with this total probability (default: 1.0, all)",
    )
    add("--seed", type=number(int, 0, 2**64 - 1), default=1337, help="random seed (default: 1337)")
    args = parser.parse_args()
    if "" in args.stop:
        fail("--stop is empty: pass a text that ends a sample")
    return args


def ask_for_prompts(model, tokenizer, args):
    """Continue each prompt that is typed on the terminal, until Ctrl-D."""
    print("type a prompt; press Ctrl-D to quit")
    while True:
        try:
            prompt_tokens = encode_prompt(input("> "), tokenizer, model.config["n_positions"])
        except EOFError:  # Ctrl-D
            print()
            return
        except ValueError as error:  # the prompt is too long: another one can be typed
            print(f"error: {error}", file=sys.stderr)
            continue
        print_samples(model, tokenizer, prompt_tokens, "", args)


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the script without a traceback
    if hasattr(sys.stdout, "reconfigure"):  # Jupyter's stdout has no such method
        sys.stdout.reconfigure(errors="replace")  # "?" for what a terminal cannot show
    args = parse_args()
    # Do not use cuDNN's attention: it builds a new plan for each new length, which takes longer
    # than the attention itself, and the length changes with every token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Load the model and tokenize the prompt.
    device = pick_device(args.device)
    model, tokenizer, directory = load_model(args.model, device, getattr(torch, args.dtype))
    prompt = args.prompt or ""
    if prompt == "-":
        # many editors add a byte order mark, and "\n" or, on Windows, "\r\n" at the end
        prompt = sys.stdin.buffer.read().decode("utf-8-sig", errors="replace")
        prompt = prompt.removesuffix("\n").removesuffix("\r")
    try:
        prompt_tokens = encode_prompt(prompt, tokenizer, model.config["n_positions"])
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"model: {directory}, {num_parameters:,} parameters", file=sys.stderr)
        if args.prompt is None and sys.stdin.isatty() and sys.stdout.isatty():
            ask_for_prompts(model, tokenizer, args)
        else:
            print_samples(model, tokenizer, prompt_tokens, prompt, args)
    except ValueError as error:
        fail(error)
    except RuntimeError as error:
        if "allocate" not in str(error):  # PyTorch's errors of full memory contain this word
            raise
        fail(f"{error}: use smaller values of --num_samples and --max_new_tokens")
    except BrokenPipeError:  # the program that reads the output has ended, as in "| head"
        os._exit(0)  # a normal exit would write to the closed pipe again


if __name__ == "__main__":
    main()
