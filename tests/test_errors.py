"""Mistakes that people make, for all scripts.

Each ends with one line on stderr that says what is wrong and what to do, and writes nothing. Models and data sets that
cannot be used are in test_train_gpt2_model.py and test_train_gpt2_data.py.
"""

import gzip
import json
import os
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    EXAMPLE,
    NO_SHAPE,
    TINY,
    Run,
    assert_user_error,
    call,
    files_in,
    random_gpt2,
    replace_tokens,
    succeed,
    tiny_flags,
)

SHAPE = "--n_layer 2 --n_head 2 --n_embd 32"
RESUME = f"{SHAPE} --log_dir run --resume"  # run is a run of SHAPE on data
FROM_MODEL = "--log_dir new --init_from"

MISTAKES = [  # script, flags, words that the line contains
    ("bigram", "--input nowhere.txt", "nowhere.txt --input"),
    ("bigram", "--input empty", "empty --input"),
    ("bigram", "--input empty.txt", "empty.txt"),
    ("bigram", "--input latin1.txt", "latin1.txt UTF-8"),
    ("bigram", "--input short.txt --block_size 16", "--block_size 16"),
    ("bigram", "--block_size 0", "--block_size 0"),
    ("bigram", "--max_steps ten", "--max_steps ten"),
    ("bigram", "--learning_rate -1", "--learning_rate -1"),
    ("gpt", "--input nowhere.txt", "nowhere.txt --input"),
    ("gpt", "--input short.txt --block_size 16", "--block_size 16"),
    ("gpt", "--n_embd 30 --n_head 4", "--n_embd 30 --n_head 4"),
    ("gpt", "--dropout 1", "--dropout 1"),
    ("gpt", "--preset huge", "--preset huge"),
    ("gpt", "--activation tanh", "--activation tanh"),
    ("gpt", "--temperature -1", "--temperature -1"),
    ("gpt", "--top_k -3", "--top_k -3"),
    ("gpt", "--eval_interval 0", "--eval_interval 0"),
    ("gpt", "--device toaster", "--device toaster"),
    ("gpt", "--input text.txt --prompt naïve", "--prompt ï"),
    ("gpt", "--input text.txt --stop ß", "--stop ß"),
    ("gpt", "--input text.txt --save text.txt", "--save text.txt"),
    ("gpt", "--input text.txt --save nowhere/model.pt --eval_iters 1", "--save nowhere/model.pt"),
    ("gpt", "--input text.txt --batch_size 1000000000000000", "--batch_size"),
    ("gpt", "--load nowhere.pt", "nowhere.pt"),
    ("gpt", "--load text.txt", "text.txt --load"),
    ("gpt", "--load weights.pt", "weights.pt --load"),
    ("gpt", "--load code.pt", "code.pt --load"),
    ("prepare_shakespeare", "--input nowhere.txt", "nowhere.txt --input"),
    ("prepare_shakespeare", "--input empty", "empty --input"),
    ("prepare_shakespeare", "--input empty.txt", "empty.txt --input"),
    ("prepare_shakespeare", "--input latin1.txt", "latin1.txt UTF-8"),
    ("prepare_shakespeare", "--input short.txt", "short.txt --val_fraction"),
    ("prepare_shakespeare", "--input good.jsonl", "good.jsonl fineweb.py"),
    ("prepare_shakespeare", "--input texts.parquet", "texts.parquet fineweb.py"),
    ("prepare_shakespeare", "--input text.txt --val_fraction 1.0", "--val_fraction 1.0"),
    ("prepare_shakespeare", "--input text.txt --tokenizer words", "--tokenizer words"),
    ("prepare_shakespeare", "--input text.txt --out_dir text.txt", "text.txt --out_dir"),
    ("prepare_shakespeare", "--input text.txt --out_dir model", "model --out_dir"),
    ("fineweb", "--source nowhere/*.parquet", "nowhere/*.parquet --source"),
    ("fineweb", "--source broken.parquet", "broken.parquet"),
    ("fineweb", "--source texts.parquet --text_column body", "body texts.parquet"),
    ("fineweb", "--source texts.parquet --text_column id", "id texts.parquet"),
    ("fineweb", "--source texts.parquet --shard_size 0", "--shard_size 0"),
    ("fineweb", "--source texts.parquet --shard_size 100000000000000000", "--shard_size"),
    ("fineweb", "--source no_texts.parquet", "--source --text_column"),
    ("fineweb", "--source one.jsonl", "--source prepare_shakespeare.py"),
    ("fineweb", "--source one.jsonl --text_column body", "one.jsonl body --text_column"),
    ("fineweb", "--source one.jsonl --text_column id", "one.jsonl id"),
    ("fineweb", "--source truncated.jsonl", "truncated.jsonl"),
    ("fineweb", "--source truncated.jsonl.gz", "truncated.jsonl.gz"),
    ("fineweb", "--source latin1.jsonl", "latin1.jsonl"),
    ("fineweb", "--source text.txt", "text.txt --source .jsonl"),
    ("fineweb", "--source texts.parquet --local_dir text.txt", "text.txt"),
    ("fineweb", "--verify empty", "empty"),
    ("fineweb", "--verify nowhere", "nowhere"),
    ("hellaswag", "--model model --data nowhere.jsonl", "nowhere.jsonl --data"),
    ("hellaswag", "--model model --data empty.txt", "empty.txt --data"),
    ("hellaswag", "--model model --data latin1.txt", "latin1.txt --data"),
    ("hellaswag", "--model model --data texts.parquet", "texts.parquet --data"),
    ("hellaswag", "--model model --data good.jsonl --limit 0", "--limit 0"),
    ("hellaswag", "--model model --data good.jsonl --batch_size 0", "--batch_size 0"),
    ("hellaswag", "--model model --data good.jsonl --device abacus", "--device abacus"),
    ("hellaswag", "--model nowhere --output nowhere/a.json", "--output nowhere/a.json"),
    ("sample", "", "log --model"),
    ("sample", "--model nowhere/model", "nowhere/model"),
    ("sample", "--model model --device abacus", "--device abacus"),
    ("sample", "--model model --num_samples 0", "--num_samples 0"),
    ("sample", "--model model --max_new_tokens -1", "--max_new_tokens -1"),
    ("sample", "--model model --temperature -0.5", "--temperature -0.5"),
    ("sample", "--model model --temperature nan", "--temperature nan"),
    ("sample", "--model model --top_k -2", "--top_k -2"),
    ("sample", "--model model --top_p 1.5", "--top_p 1.5"),
    ("sample", "--model model --seed -1", "--seed -1"),
    ("sample", f"--model model --seed {2**64}", f"--seed {2**64}"),
    ("sample", "--model model --stop ''", "--stop"),
    ("sample", "--model model --dtype int4", "--dtype int4"),
    ("sample", f"--model model --prompt {'x' * 17}", "17 16"),
    ("plot", "nowhere", "nowhere/log.txt"),
    ("plot", "run nowhere", "nowhere/log.txt"),
    ("plot", "empty_log", "empty_log/log.txt"),
    ("plot", "run --output nowhere/a.png", "nowhere/a.png --output"),
    ("plot", "run --output a.foo", "a.foo"),
    ("plot", "run --tokens_per_step 0", "--tokens_per_step 0"),
    ("train_gpt2", "--data_dir nowhere", "nowhere prepare_shakespeare.py fineweb.py"),
    ("train_gpt2", "--data_dir empty", "empty"),
    ("train_gpt2", f"{SHAPE} --block_size 4096 --total_batch_size 32768", "--block_size 4096"),
    ("train_gpt2", f"{SHAPE} --total_batch_size 100", "--total_batch_size 100 --micro_batch_size --block_size 16"),
    ("train_gpt2", f"{SHAPE} --total_batch_size 192 --micro_batch_size 8", "--total_batch_size 192 8"),
    ("train_gpt2", "--n_embd 30 --n_head 4", "--n_embd 30 --n_head 4"),
    ("train_gpt2", "--preset gpt5", "--preset gpt5"),
    ("train_gpt2", "--dtype int8", "--dtype int8"),
    ("train_gpt2", "--optimizer sgd", "--optimizer sgd"),
    ("train_gpt2", "--schedule constant", "--schedule constant"),
    ("train_gpt2", "--device toaster", "--device toaster"),
    ("train_gpt2", "--dropout 1.0", "--dropout 1.0"),
    ("train_gpt2", "--max_steps 0", "--max_steps 0"),
    ("train_gpt2", "--max_steps 1.5", "--max_steps 1.5"),
    ("train_gpt2", "--learning_rate nan", "--learning_rate nan"),
    ("train_gpt2", "--weight_decay -0.1", "--weight_decay -0.1"),
    ("train_gpt2", "--grad_clip 0", "--grad_clip 0"),
    ("train_gpt2", "--no_such_flag 1", "--no_such_flag 1"),
    ("train_gpt2", f"{SHAPE} --log_dir text.txt", "text.txt"),
    ("train_gpt2", f"{RESUME} --n_layer 3", "--n_layer 3 2"),
    ("train_gpt2", f"{RESUME} --block_size 8", "--block_size 8 16"),
    ("train_gpt2", f"{RESUME} --seed 7", "--seed 7 1337"),
    ("train_gpt2", f"{RESUME} --no-shuffle", "--shuffle False True"),
    ("train_gpt2", f"{RESUME} --dropout 0.1", "--dropout 0.1 0.0"),
    ("train_gpt2", f"{RESUME} --total_batch_size 256", "--total_batch_size 256 128"),
    ("train_gpt2", f"{RESUME} --optimizer muon", "--optimizer muon adamw"),
    ("train_gpt2", f"{RESUME} --learning_rate 0.002", "--learning_rate 0.002 0.001"),
    ("train_gpt2", f"{RESUME} --schedule wsd", "--schedule wsd cosine"),
    ("train_gpt2", f"{RESUME} --warmup_steps 3", "--warmup_steps 3 2"),
    ("train_gpt2", f"{RESUME} --max_steps 9", "--max_steps 9 5 --init_from"),
    ("train_gpt2", f"{RESUME} --weight_decay 0.2", "--weight_decay 0.2 0.1"),
    ("train_gpt2", f"{RESUME} --grad_clip 2", "--grad_clip 2.0 1.0"),
    ("train_gpt2", f"{RESUME} --data_dir other_data", "--data_dir"),
    ("train_gpt2", f"{FROM_MODEL} nowhere/model", "nowhere/model"),
    ("train_gpt2", f"{FROM_MODEL} model --n_layer 3", "--n_layer 3 1"),
    ("train_gpt2", f"{FROM_MODEL} model --block_size 32 --total_batch_size 256", "16 --block_size"),
]


class Code:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("made_by_a_pickle"),)


@pytest.fixture(scope="module")
def folder(byte_shards, text_file, tmp_path_factory):
    """A directory with data, models, a run, and files that cannot be used."""
    folder = tmp_path_factory.mktemp("folder")
    for name in ("empty", "empty_log"):
        (folder / name).mkdir()
    (folder / "empty_log" / "log.txt").touch()
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("a")
    (folder / "text.txt").write_text(text_file.read_text())
    (folder / "latin1.txt").write_bytes("Ein schöner Text. ".encode("latin-1") * 100)
    (folder / "good.jsonl").write_text(json.dumps(EXAMPLE))
    pq.write_table(pa.table({"id": [1, 2], "text": ["one", "two"]}), folder / "texts.parquet")
    pq.write_table(pa.table({"text": [None, ""]}), folder / "no_texts.parquet")
    line = b'{"text": "a text", "id": 1}\n'
    for name, content in (
        ("one.jsonl", line),
        ("truncated.jsonl", line[:12]),
        ("truncated.jsonl.gz", gzip.compress(line)[:-12]),
        ("latin1.jsonl", b'{"text": "\xe9"}\n'),
    ):
        (folder / name).write_bytes(content)
    content = (folder / "texts.parquet").read_bytes()
    (folder / "broken.parquet").write_bytes(content[: len(content) // 2])
    torch.save({"weight": torch.zeros(3)}, folder / "weights.pt")
    torch.save(Code(), folder / "code.pt")

    random_gpt2(folder / "model", n_positions=16, n_layer=1, n_head=1, n_embd=8)
    random_gpt2(folder / "gpt2_model", vocab_size=50257, n_positions=16, n_layer=1, n_head=1, n_embd=8)

    shutil.copytree(byte_shards, folder / "data")
    shutil.copytree(byte_shards, folder / "other_data")
    replace_tokens(folder / "other_data" / "excerpt_train_000000.npy")
    succeed("train_gpt2", *TINY, "--data_dir", folder / "data", "--log_dir", folder / "run")
    return folder


@pytest.mark.parametrize("script, flags, words", MISTAKES, ids=[f"{script} {flags}" for script, flags, _ in MISTAKES])
def test_a_mistake_is_one_line(script, flags, words, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    before = files_in(folder)
    flags = shlex.split(flags)
    if script == "train_gpt2":
        flags = [*tiny_flags(**NO_SHAPE), "--log_dir", "new", "--data_dir", "data", *flags]
    if script == "fineweb":
        flags = ["--local_dir", tmp_path.name, "--tokenizer", "bytes", *flags]
    done = call(script, *flags)
    assert_user_error(done, *words.split())
    assert "loss" not in done.stdout, "the mistake was found after slow work"
    assert files_in(folder) == before


@pytest.mark.gpt2
def test_a_model_with_another_tokenizer_than_the_data_is_refused(folder, tmp_path):
    flags = [*tiny_flags(**NO_SHAPE), "--init_from", folder / "gpt2_model", "--data_dir", folder / "data"]
    done = call("train_gpt2", *flags, "--log_dir", tmp_path / "log")
    assert_user_error(done, folder / "gpt2_model", folder / "data", "gpt2", "bytes")


# --------------------------------------------------------------------- mistakes of an environment
@pytest.mark.parametrize("script", ["prepare_shakespeare", "fineweb", "hellaswag", "sample"])
def test_a_vocabulary_that_cannot_be_downloaded_is_one_line(script, folder, tmp_path, monkeypatch):
    flags = {
        "prepare_shakespeare": "--input text.txt --tokenizer gpt2",
        "fineweb": "--source texts.parquet --tokenizer gpt2",
        "hellaswag": "--prepare --data good.jsonl",
        "sample": "--model gpt2_model",
    }
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.chdir(folder)
    before = files_in(folder)
    assert_user_error(call(script, *shlex.split(flags[script])), "TIKTOKEN_CACHE_DIR")
    assert files_in(folder) == before


def test_missing_data_is_one_line_without_any_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_user_error(call("train_gpt2"), "edu_fineweb10B", "prepare_shakespeare.py", "fineweb.py")
    assert list(tmp_path.iterdir()) == []


def pretend_to_be_under_torchrun(monkeypatch, **variables):
    """Set the variables of torchrun's environment."""
    settings = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, **variables}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused(device, folder, monkeypatch):
    """The first rank of the second machine reports it: the first machine may have enough GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    pretend_to_be_under_torchrun(monkeypatch, RANK=4, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4)
    done = call("train_gpt2", *tiny_flags(device=device), "--data_dir", folder / "data")
    assert_user_error(done, "--nproc_per_node", "--device cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_driver_that_pytorch_cannot_use_is_noticed(world_size, folder, tmp_path, monkeypatch):
    """A run of several processes ends, because it would be slow on a CPU. One process only gets a warning."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if world_size > 1:
        pretend_to_be_under_torchrun(monkeypatch)
    flags = [*tiny_flags(device="auto", max_steps=1), "--data_dir", folder / "data"]
    done = call("train_gpt2", *flags, "--log_dir", tmp_path / "log")
    if world_size > 1:
        assert_user_error(done, "--device cpu", "README")
    else:
        assert done.returncode == 0
        assert done.stderr.startswith("warning: ") and "--device cpu" in done.stderr


def test_a_mistake_on_three_ranks_is_reported_once(folder, tmp_path):
    """A batch of 128 tokens cannot be divided by 3 processes."""
    flags = [*TINY, "--data_dir", folder / "data", "--log_dir", tmp_path / "log"]
    results = Run(*flags, ranks=3).wait()
    assert [done.returncode for done in results] == [2, 2, 2]
    err = "".join(done.stderr for done in results)
    assert err.startswith("error: ") and err.count("\n") == 1 and "--total_batch_size 128" in err
    assert not (tmp_path / "log").exists()
