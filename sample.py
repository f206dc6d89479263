"""
Generate text with a GPT-2: a checkpoint of train_gpt2.py, or any Hugging Face GPT-2.

    python sample.py                                     # the newest checkpoint in log/
    python sample.py --model gpt2 --prompt "Hello, I'm a language model,"
    python sample.py --model log/step_019073 --num_samples 4 --temperature 0.8 --top_p 0.9
    cat prompt.txt | python sample.py --model gpt2 --prompt - --stop "." --max_new_tokens 100

For each token of its vocabulary, a language model computes the probability that it comes next. One
token is drawn at random with these probabilities and appended to the text. Then the model computes
the probabilities for the token after it, and so on.

The prompt and its continuation are printed token by token. Without --prompt, the script asks for
prompts if it runs on a terminal, and starts a new document otherwise. On the same machine, the same
flags produce the same text every time. The model is read from a directory or the Hugging Face Hub.
No file is written, except for the Hub's downloads. Expect about 30 tokens per second from GPT-2
124M on two CPU cores. On CPUs with bfloat16 instructions, --dtype bfloat16 is two to three times
as fast.

Sections: sampling, text, model, loading, command line.
"""

import argparse
import codecs
import json
import os
import re
import shutil
import signal
import sys
from functools import partial

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # except newline and tab


# ------------------------------------------------------------------------------------ sampling
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


@torch.inference_mode()
def generate(model, prompt_tokens, num_samples, max_new_tokens, sampler):
    """Continue a prompt. Yields max_new_tokens tensors (B,): the next tokens of B samples.

    prompt_tokens is a list of 1 to n_positions tokens, and B is num_samples. sampler is a function
    that maps logits (B, V) to tokens (B,), such as sample_token. V is the size of the vocabulary.
    """
    n_positions = model.config["n_positions"]
    device = model.wte.weight.device

    # Process the prompt once. It is the same for all samples.
    idx = torch.tensor([prompt_tokens], device=device)  # (1, T)
    cache = model.new_cache(1, len(prompt_tokens))
    x = model(idx, cache)[:, -1]  # (1, T) -> (1, T, C) -> (1, C)
    logits = model.logits(x)  # (1, C) -> (1, V)

    # Copy the results for B = num_samples samples.
    idx = idx.expand(num_samples, -1)  # (1, T) -> (B, T)
    logits = logits.expand(num_samples, -1)  # (1, V) -> (B, V)
    indices = torch.zeros(num_samples, dtype=torch.int64, device=device)  # sequence 0, B times
    max_length = min(n_positions, len(prompt_tokens) + max_new_tokens)
    cache = cache.select(indices, max_length)

    # The logits of the prompt give the first new token. In each step after that, the newest token
    # is processed, and the cache supplies the tokens before it.
    next_token = sampler(logits)  # (B, V) -> (B,)
    yield next_token
    for _ in range(max_new_tokens - 1):
        idx = torch.cat((idx, next_token[:, None]), dim=1)  # (B, T) -> (B, T + 1)
        if idx.shape[1] <= n_positions:
            x = model(idx[:, -1:], cache)[:, -1]  # (B, 1) -> (B, 1, C) -> (B, C)
        else:
            # The text is longer than the model's context, so the oldest token is dropped. All other
            # tokens move to another position and get another position embedding. This changes
            # their keys and values. So the cache cannot be used any more, and each step processes
            # n_positions tokens.
            idx = idx[:, 1:]  # (B, n_positions)
            x = model(idx)[:, -1]  # (B, n_positions) -> (B, n_positions, C) -> (B, C)
        next_token = sampler(model.logits(x))  # (B, C) -> (B, V) -> (B,)
        yield next_token


# ---------------------------------------------------------------------------------------- text
def partial_stop_length(text, stops):
    """Return how many characters at the end of text may be the beginning of a stop text.

    For the text "one. T" and the stop text "The end" it is 1.
    """
    longest = 0
    for stop in stops:
        for length in range(longest + 1, len(stop)):
            if text.endswith(stop[:length]):
                longest = length
    return longest


class StreamDecoder:
    """Turn the tokens of one sample into text as they arrive, up to <|endoftext|> or a stop text.

    A token is a sequence of bytes, and the bytes of one UTF-8 character can be spread over several
    tokens. A character is returned when all of its bytes have arrived. Invalid bytes become U+FFFD.
    So do control characters except newline and tab, because they could send commands to a terminal.
    """

    def __init__(self, tokenizer, stops):
        self.tokenizer = tokenizer
        self.stops = stops
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # keeps incomplete characters
        self.pending = ""  # text that may turn out to be the beginning of a stop text
        self.done = False

    def add(self, token):
        """Add a token and return the text that can be printed now. The token None ends the text."""
        if self.done:
            return ""

        # Decode the bytes of the token. utf8 returns an incomplete character when the rest of its
        # bytes arrive, or as U+FFFD at the end.
        self.done = token is None or token == self.tokenizer.eot_token
        data = b"" if self.done else self.tokenizer.decode_single_token_bytes(token)
        text = self.pending + self.utf8.decode(data, final=self.done)

        # A stop text ends the sample. If there are several, the first one counts.
        stop_positions = [text.find(stop) for stop in self.stops if stop in text]
        if stop_positions:
            text = text[: min(stop_positions)]
            self.done = True

        # Keep what may be the beginning of a stop text until more tokens decide.
        num_pending = 0 if self.done else partial_stop_length(text, self.stops)
        end = len(text) - num_pending
        self.pending = text[end:]
        return CONTROL_CHARACTER.sub("\ufffd", text[:end])


def stream_texts(model, tokenizer, prompt_tokens, args):
    """Yield the new text of every sample, a list of num_samples strings, after each token."""
    generator = torch.Generator(model.wte.weight.device).manual_seed(args.seed)
    sampler = partial(
        sample_token,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        generator=generator,
    )
    decoders = [StreamDecoder(tokenizer, args.stop) for _ in range(args.num_samples)]
    steps = generate(model, prompt_tokens, args.num_samples, args.max_new_tokens, sampler)
    for tokens in steps:  # (num_samples,)
        texts = []
        for decoder, token in zip(decoders, tokens.tolist(), strict=True):
            texts.append(decoder.add(token))
        yield texts
        if all(decoder.done for decoder in decoders):
            return
    # max_new_tokens is reached: yield the text that the decoders still hold.
    yield [decoder.add(None) for decoder in decoders]


def print_samples(model, tokenizer, prompt, args, echo=True):
    """Print args.num_samples continuations of prompt.

    A single sample is printed token by token while it is generated. Several samples are printed one
    after the other at the end. With echo, the prompt is printed before each sample. Raises
    ValueError if the prompt is too long, if the model computes NaN, or if the samples need too much
    memory.
    """
    # Tokenize the prompt. <|endoftext|> is the beginning of a document.
    prompt_tokens = encode(tokenizer, prompt) or [tokenizer.eot_token]
    n_positions = model.config["n_positions"]
    if len(prompt_tokens) > n_positions:
        n = len(prompt_tokens)
        limit = f"the model takes at most {n_positions}"
        raise ValueError(f"the prompt has {n} tokens, but {limit}: use a shorter prompt")

    shown_prompt = prompt if echo else ""
    steps = stream_texts(model, tokenizer, prompt_tokens, args)
    try:
        # A single sample is printed while it is generated.
        if args.num_samples == 1:
            print(shown_prompt, end="", flush=True)
            for texts in steps:
                print(texts[0], end="", flush=True)
            print()
            return
        # Several samples are generated in parallel and printed at the end.
        samples = [shown_prompt] * args.num_samples
        for texts in steps:
            samples = [sample + text for sample, text in zip(samples, texts, strict=True)]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"--num_samples {args.num_samples} with --max_new_tokens {args.max_new_tokens} does not fit "
            "into the memory: use smaller values"
        ) from None
    for i, sample in enumerate(samples, 1):
        print(f"--- sample {i} of {args.num_samples} ---", sample, sep="\n", flush=True)


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
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="log",
        help="directory of a model, directory of a run (its newest checkpoint is used),\n"
        "or name of a GPT-2 on the Hugging Face Hub (default: log)",
    )
    group.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:1, mps, ... (default: auto, the GPU if there is one)",
    )
    group.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="dtype for weights and activations (default: float32)",
    )
    group = parser.add_argument_group("text")
    group.add_argument(
        "--prompt",
        help="text to continue; - reads it from standard input, without a newline at its end\n"
        "(default: ask for prompts on a terminal, otherwise start a new document)",
    )
    group.add_argument(
        "--num_samples",
        type=int,
        default=1,
        help="number of samples to generate in parallel (default: 1)",
    )
    group.add_argument(
        "--max_new_tokens",
        type=int,
        default=200,
        help="largest number of new tokens per sample; tokens beyond the model's context\n"
        "length are slow (default: 200)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a sample before this text; can be given several times (default: none)",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="number that divides the logits: below 1 the text is less random, above 1 more\n"
        "random, and 0 always takes the most likely token (default: 1.0)",
    )
    group.add_argument(
        "--top_k",
        type=int,
        default=50,
        help="sample from the top_k most likely tokens; 0 means all (default: 50)",
    )
    group.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the smallest set of most likely tokens with a total probability\n"
        "of at least top_p; 1.0 means all tokens (default: 1.0)",
    )
    group.add_argument("--seed", type=int, default=1337, help="random seed (default: 1337)")
    args = parser.parse_args()
    check_args(args)
    return args


def check_args(args):
    """Exit if a flag has an invalid value."""
    # The conditions are written so that NaN fails: every comparison with NaN is False.
    for name in ("num_samples", "max_new_tokens", "top_p"):
        value = getattr(args, name)
        if not value > 0:
            fail(f"--{name} is {value}: it must be above 0")
    for name in ("temperature", "top_k", "seed"):
        value = getattr(args, name)
        if not value >= 0:
            fail(f"--{name} is {value}: it must be 0 or more")

    # A typing error in num_samples must not fill the memory, and PyTorch's seeds have 64 bits.
    limits = {"top_p": 1, "seed": 2**64 - 1, "num_samples": 100_000}
    for name, limit in limits.items():
        value = getattr(args, name)
        if value > limit:
            fail(f"--{name} is {value}: it must be at most {limit}")
    if "" in args.stop:
        fail("--stop is empty: pass a text that ends a sample")


def replace_invalid(text):
    """Replace the bytes of a command-line argument that are not valid UTF-8 with U+FFFD."""
    # Python represents such bytes by lone surrogates, which cannot be printed. Turn them back into
    # bytes, and decode these again.
    return text.encode(errors="surrogateescape").decode(errors="replace")


def read_prompt():
    """Return the prompt for "--prompt -": all of standard input.

    The byte order mark and the newline at the end, which many editors add, are not part of it.
    """
    if sys.stdin is None:  # closed by the shell, as in "<&-"
        return ""
    prompt = sys.stdin.buffer.read().decode(errors="replace").removeprefix("\ufeff")
    return prompt.removesuffix("\n").removesuffix("\r")  # Windows ends lines with "\r\n"


def ask_for_prompts(model, tokenizer, directory, args):
    """Continue each prompt that is typed on the terminal, until Ctrl-D."""
    print(f"{directory}: type a prompt; press Ctrl-D to quit")
    sys.stdin.reconfigure(errors="replace")  # invalid bytes become U+FFFD, as in --prompt
    while True:
        try:
            prompt = input("> ")
        except EOFError:  # Ctrl-D
            print()
            return
        # After an error, for example a prompt that is too long, another prompt can be typed.
        try:
            print_samples(model, tokenizer, prompt, args, echo=False)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)


def main():
    args = get_args()
    # Do not use cuDNN's attention: it builds a new plan for each new length, which takes longer
    # than the attention itself, and the length changes with every token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = pick_device(args.device)
    model, tokenizer, directory = load_model(args.model, device, DTYPES[args.dtype])

    # Without --prompt: ask for prompts if someone can answer, otherwise start a new document.
    on_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if args.prompt is None and on_terminal:
        ask_for_prompts(model, tokenizer, directory, args)
        return

    prompt = read_prompt() if args.prompt == "-" else replace_invalid(args.prompt or "")
    try:
        print_samples(model, tokenizer, prompt, args)
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    run_script(main)
