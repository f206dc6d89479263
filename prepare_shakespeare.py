"""
Turn a UTF-8 text into the token shards that train_gpt2.py reads.

    python prepare_shakespeare.py                            # input.txt, one token per byte
    python prepare_shakespeare.py --tokenizer gpt2 --out_dir plays_gpt2    # GPT-2's 50,257 tokens
    python prepare_shakespeare.py --download --out_dir tiny  # the real Tiny Shakespeare
    python prepare_shakespeare.py --input book.txt --out_dir book

Takes a second, and writes five files to OUT_DIR. NAME is the last part of OUT_DIR.

    NAME_train_000000.npy   the first 90% of the text, a one-dimensional uint16 array of tokens
    NAME_val_000000.npy     the last 10%, for validation
    meta.json               describes the data set: tokenizer, source, sizes, checksums
    vocab.json, merges.txt  the tokenizer in Hugging Face's format, for checkpoints

With the default tokenizer, input.txt gives 432,828 training tokens and 48,093 validation tokens.
Each of the two parts is one document, which begins with the end-of-text token. A literal
<|endoftext|> in the text is tokenized like any other text: it does not become that token.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import tempfile

import numpy as np
import requests
import tiktoken

# The 40,000 lines of Shakespeare on which char-rnn and nanoGPT train their character-level models.
TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_PATH = "data/tinyshakespeare/input.txt"


# -------------------------------------------------------------------------------------- the text
def download(url, path, sha256):
    """Download url to path atomically. Exits with an error if the content has another SHA-256.

    Raises OSError if the file cannot be written.
    """
    advice = f"download it by hand to {path}, or pass another text with --input"
    try:
        response = requests.get(url, timeout=30)
        response.raise_for_status()
    except requests.RequestException as error:
        fail(f"cannot download {url} ({type(error).__name__}): {advice}")
    # a proxy may return an error page instead of the file, so verify the checksum
    actual = hashlib.sha256(response.content).hexdigest()
    if actual != sha256:
        fail(f"{url} has SHA-256 {actual} instead of {sha256}: {advice}")
    # write to another name first, so that path never has half of the file
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.tmp", "wb") as file:
        file.write(response.content)
    os.replace(f"{path}.tmp", path)


def download_tiny_shakespeare():
    """Download Tiny Shakespeare, unless it is already there. Returns the path of the file."""
    path = TINY_SHAKESPEARE_PATH
    try:
        # a file that is damaged, for example by an interrupted copy, is replaced
        if not os.path.isfile(path) or sha256_of(path) != TINY_SHAKESPEARE_SHA256:
            download(TINY_SHAKESPEARE_URL, path, TINY_SHAKESPEARE_SHA256)
    except OSError as error:
        fail(f"cannot write {path} ({error.strerror}): change to a writable directory")
    return path


# --- copied block: read_text ---
def read_text(path):
    """Return the text of a UTF-8 file with its line endings unchanged.

    Exits with an error if the file cannot be read, is empty or is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # utf-8-sig drops a byte order mark
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path!r} as UTF-8 text ({error}): pass another file with --input")
    if not text:
        fail(f"{path!r} is empty: pass another file with --input")
    return text


# --- end of copied block: read_text ---


# --- copied block: sha256_of ---
def sha256_of(path):
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- end of copied block: sha256_of ---


# ------------------------------------------------------------------------------------- tokenizer
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


def tokenize(tokenizer, text):
    """Return the tokens of a document, a uint16 array (N,) that starts with the end-of-text token.

    Raises ValueError if tiktoken cannot tokenize the text.
    """
    # tiktoken crashes on about a million whitespace characters in a row, because GPT-2's regular
    # expression then overflows its stack. 999,000 is a safe limit.
    if tokenizer.name == "gpt2":
        longest_run = max(map(len, re.findall(r"\s+", text)), default=0)
        if longest_run >= 999_000:
            raise ValueError(
                f"the text has {longest_run:,} whitespace characters in a row, more than tiktoken can "
                "tokenize: remove some of them"
            )
    # encode_ordinary knows no special tokens: <|endoftext|> in the text is text like any other
    tokens = tokenizer.encode_ordinary(text)
    return np.array([tokenizer.eot_token, *tokens], dtype="<u2")


# --- copied block: write_tokenizer_files ---
GPT2_FILES = {  # Hugging Face's file name: (OpenAI's file name, SHA-256)
    "vocab.json": ("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "merges.txt": ("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"


def write_tokenizer_files(name, directory):
    """Write the tokenizer files of transformers, vocab.json and merges.txt, into directory.

    For "gpt2" they are OpenAI's files. tiktoken has them in its cache once get_tokenizer("gpt2")
    has been called.
    """
    if name == "gpt2":
        for file_name, (original_name, sha256) in GPT2_FILES.items():
            content = tiktoken.load.read_file_cached(f"{GPT2_URL}/{original_name}", sha256)
            with open(f"{directory}/{file_name}", "wb") as file:
                file.write(content)
        return
    # vocab.json maps characters to ids. GPT-2 represents each byte by one character: the printable
    # bytes of Latin-1 by themselves, the others by the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(others):
        vocab[chr(256 + i)] = byte
    vocab["<|endoftext|>"] = 256
    with open(f"{directory}/vocab.json", "w", encoding="utf-8") as file:
        json.dump(vocab, file)
    with open(f"{directory}/merges.txt", "w", encoding="utf-8") as file:
        file.write("#version: 0.2\n")  # no merges


# --- end of copied block: write_tokenizer_files ---


# -------------------------------------------------------------------------------------- data set
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


def check_out_dir(out_dir, tokenizer_name, source):
    """Exit with an error if out_dir contains other files: they must not be overwritten."""
    if not os.path.isdir(out_dir) or not os.listdir(out_dir):
        return
    try:
        # read_meta checks all names and types: meta.json may have been edited or damaged
        meta = read_meta(out_dir)
    except (OSError, ValueError) as error:
        fail(f"--out_dir {out_dir} contains other files ({error}): choose another --out_dir")
    if meta["tokenizer"] != tokenizer_name or meta.get("source") != source:
        fail(
            f"--out_dir {out_dir} contains a data set with another text or file name, --tokenizer or "
            "--val_fraction: choose another --out_dir, or delete it"
        )


def is_complete(out_dir):
    """Return whether out_dir contains a data set with all its files and correct checksums.

    Call check_out_dir first, which makes sure that out_dir contains nothing else.
    """
    if not os.path.exists(f"{out_dir}/meta.json"):
        return False
    shards = read_meta(out_dir)["shards"]
    if [shard.get("split") for shard in shards] != ["train", "val"]:
        return False
    for shard in shards:
        path = f"{out_dir}/{shard['file']}"
        if not os.path.isfile(path) or sha256_of(path) != shard.get("sha256"):
            return False
    tokenizer_files = (f"{out_dir}/vocab.json", f"{out_dir}/merges.txt")
    return all(os.path.isfile(path) for path in tokenizer_files)


def write_data_set(out_dir, parts, tokenizer_name, source):
    """Write a data set with one shard per split: parts is {"train": text, "val": text}.

    Returns the content of meta.json. Raises ValueError if a text cannot be tokenized, OSError if a
    file cannot be written.
    """
    # The tokenizer comes first: if it cannot be loaded, nothing is written.
    tokenizer = get_tokenizer(tokenizer_name)
    out_dir = os.path.abspath(out_dir)
    # The name of a shard consists of letters, digits and the characters _ . -
    name = re.sub(r"[^\w.-]|^[.-]", "_", os.path.basename(out_dir))
    meta = {
        "tokenizer": tokenizer_name,
        "vocab_size": tokenizer.n_vocab,
        "eot_token": tokenizer.eot_token,
        "source": source,
        "shards": [],
    }
    # All files are written to a temporary directory, which is deleted at the end. It is next to
    # out_dir, because files cannot be renamed from one file system to another.
    parent_dir = os.path.dirname(out_dir)
    os.makedirs(parent_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}.", suffix=".tmp", dir=parent_dir) as temporary_dir:
        # a directory inside it, which can be renamed while TemporaryDirectory still deletes its own
        new_dir = f"{temporary_dir}/{name}"
        os.mkdir(new_dir)

        # write the shards and the tokenizer, then meta.json
        for split, text in parts.items():
            tokens = tokenize(tokenizer, text)  # (N,)
            file_name = f"{name}_{split}_000000.npy"
            np.save(f"{new_dir}/{file_name}", tokens)
            shard = {
                "file": file_name,
                "split": split,
                "tokens": len(tokens),
                "sha256": sha256_of(f"{new_dir}/{file_name}"),
            }
            meta["shards"].append(shard)
        write_tokenizer_files(tokenizer_name, new_dir)
        with open(f"{new_dir}/meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)

        move_files(new_dir, out_dir)
    return meta


def move_files(source_dir, out_dir):
    """Rename source_dir to out_dir atomically.

    If that is impossible, move the files one by one. This happens if out_dir exists (a damaged data
    set is repaired), or if directories cannot be renamed, as on some cloud file systems.
    """
    try:
        os.replace(source_dir, out_dir)
        return
    except OSError:
        pass  # continue below
    # No file of out_dir is deleted: it may contain files that are not part of the data set.
    os.makedirs(out_dir, exist_ok=True)
    # meta.json comes first. Until all files are there, readers then report a missing shard or a
    # wrong checksum. Without meta.json, they would take the directory for GPT-2 tokens of another
    # project.
    file_names = [name for name in sorted(os.listdir(source_dir)) if name != "meta.json"]
    for file_name in ["meta.json", *file_names]:
        os.replace(f"{source_dir}/{file_name}", f"{out_dir}/{file_name}")


# ---------------------------------------------------------------------------------- command line
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


def parse_args():
    """Parse and check the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(f"{message}: see --help")  # argparse's own errors in one line
    text_group = parser.add_mutually_exclusive_group()
    text_group.add_argument("--input", default="input.txt", help="UTF-8 text file (default: input.txt)")
    text_group.add_argument(
        "--download",
        action="store_true",
        help=f"download Tiny Shakespeare (1.1 MB) to {TINY_SHAKESPEARE_PATH} and use it",
    )
    parser.add_argument("--out_dir", default="shakespeare", help="directory to write to (default: shakespeare)")
    parser.add_argument(
        "--tokenizer",
        choices=["bytes", "gpt2"],
        default="bytes",
        help="bytes: one token per byte; gpt2: GPT-2's tokens (default: bytes)",
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=0.1,
        help="fraction of the text that is kept for validation (default: 0.1)",
    )
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        fail(f"--val_fraction is {args.val_fraction}: it must be between 0 and 1")
    return args


def main():
    args = parse_args()

    # read the text, and download it first if asked to
    path = download_tiny_shakespeare() if args.download else args.input
    text = read_text(path)

    # split it: the first part is for training, the rest for validation
    n = int((1 - args.val_fraction) * len(text))
    parts = {"train": text[:n], "val": text[n:]}
    if not parts["train"] or not parts["val"]:
        fail(
            f"{path} has {len(text)} characters, not enough to split with --val_fraction "
            f"{args.val_fraction}: use a longer text"
        )

    # the source goes into meta.json, so that a later run can see whether out_dir contains the data
    # set of the same text
    source = {
        "input": os.path.basename(path),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "val_fraction": args.val_fraction,
    }

    # do nothing if an earlier run has already written this data set
    check_out_dir(args.out_dir, args.tokenizer, source)
    if is_complete(args.out_dir):
        print(f"{args.out_dir} already contains this data set")
        return

    # tokenize the parts, and write them
    try:
        meta = write_data_set(args.out_dir, parts, args.tokenizer, source)
    except ValueError as error:
        fail(f"{error}, or use --tokenizer bytes")
    except OSError as error:
        fail(f"cannot write --out_dir {args.out_dir} ({error}): choose another --out_dir")
    # print what was written
    for shard in meta["shards"]:
        print(f"{args.out_dir}/{shard['file']}: {shard['tokens']:,} tokens")


if __name__ == "__main__":
    run_script(main)
