"""A user's mistakes: each ends with status 2 and one line that names what is wrong, the value and what mends it."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, TINY, call, load, run, torchrun, write_bin, write_data_set, write_npy

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def check(done, *needles):
    """One line on stderr that has every needle, status 2, and no training before it."""
    assert done.returncode == 2, done.stdout[-500:] + done.stderr[-500:]
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for needle in needles:
        assert str(needle) in done.stderr, f"{needle} is not in: {done.stderr}"
    assert "loss" not in done.stdout, "the mistake was found after slow work"


def check_training(data_dir, *needles, flags=(), log_dir="log"):
    """train_gpt2.py refuses these flags on a data set before it makes a log directory."""
    log_dir = data_dir.parent / log_dir
    check(call("train_gpt2", *TINY, "--data_dir", data_dir, "--log_dir", log_dir, *flags), *needles)
    assert not log_dir.exists(), "a refused run left a log directory"


# ----------------------------------------------------------------------------- processes of their own
def test_missing_data_in_a_process_names_two_commands_that_make_some(tmp_path):
    done = run("train_gpt2", "--device", "cpu", cwd=tmp_path)
    check(done, "edu_fineweb10B", "prepare_shakespeare.py", "fineweb.py")
    assert list(tmp_path.iterdir()) == []


def test_mistake_under_torchrun_is_reported_once(tmp_path):
    done = torchrun(2, "train_gpt2", "--data_dir", "nowhere", "--device", "cpu", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: --data_dir nowhere") == 1
    assert not any(line.strip().startswith('File "' + str(ROOT)) for line in done.stderr.splitlines())


# ------------------------------------------------------------------------------------ texts and flags
FLAGS = [
    ("train_gpt2", ["--preset", "gpt5"]),
    ("train_gpt2", ["--dtype", "int8"]),
    ("train_gpt2", ["--device", "toaster"]),
    ("train_gpt2", ["--n_embd", 30, "--n_head", 4]),
    ("train_gpt2", ["--optimizer", "sgd"]),
    ("train_gpt2", ["--schedule", "constant"]),
    ("train_gpt2", ["--hellaswag_interval", -1]),
    ("train_gpt2", ["--dropout", 1.0]),
    ("train_gpt2", ["--max_steps", 0]),
    ("train_gpt2", ["--val_tokens", -5]),
    ("train_gpt2", ["--keep_checkpoints", -1]),
    ("train_gpt2", ["--learning_rate", "nan"]),
    ("train_gpt2", ["--max_steps", 1.5]),
    ("train_gpt2", ["--no_such_flag", 1]),
]


@pytest.mark.parametrize("script, flags", FLAGS, ids=[f"{s} {f[0]} {f[1]}" for s, f in FLAGS])
def test_wrong_value_of_a_flag(script, flags, byte_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(call(script, "--data_dir", byte_shards, *flags), flags[0], flags[1])
    assert list(tmp_path.iterdir()) == []


@needs_no_gpu
def test_cuda_where_there_is_none(byte_shards):
    flags = [*TINY, "--data_dir", byte_shards]
    check(call("train_gpt2", *flags, "--device", "cuda"), "--device cuda", "--device cpu")


# ------------------------------------------------------------------------------------ --init_from
NO_SHAPE = TINY[6:]  # TINY without --n_layer, --n_head and --n_embd


def init_from(what, data_dir, tmp_path, *flags):
    flags = [*NO_SHAPE, "--init_from", what, "--data_dir", data_dir, "--log_dir", tmp_path / "log", *flags]
    done = call("train_gpt2", *flags)
    assert not (tmp_path / "log").exists()
    return done


def save_gpt2(directory, **shape):
    """A random GPT2LMHeadModel of bytes, with 16 positions unless shape says more."""
    shape = dict(vocab_size=257, n_positions=16, n_layer=1, n_head=1, n_embd=8) | shape
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(directory)


def test_model_to_start_from_that_is_none(byte_shards, tmp_path):
    (tmp_path / "empty").mkdir()
    check(init_from(tmp_path / "empty", byte_shards, tmp_path), "--init_from", tmp_path / "empty", "config.json")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    check(init_from(tmp_path / "other", byte_shards, tmp_path), "--init_from", tmp_path / "other", "llama")


def test_model_to_start_from_whose_shapes_disagree(byte_shards, tmp_path):
    save_gpt2(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"n_embd": 16}))
    check(init_from(tmp_path / "model", byte_shards, tmp_path), tmp_path / "model", "wte.weight", "(257, 16)")


def test_model_to_start_from_that_is_too_short_or_of_other_tokens(byte_shards, tmp_path):
    save_gpt2(tmp_path / "short", n_positions=15)
    check(init_from(tmp_path / "short", byte_shards, tmp_path), "15 positions", "block_size 16")
    save_gpt2(tmp_path / "other", vocab_size=300)
    check(init_from(tmp_path / "other", byte_shards, tmp_path), "300", "257", byte_shards)


def test_shape_beside_a_model_to_start_from(byte_shards, tmp_path):
    save_gpt2(tmp_path / "model")
    check(init_from(tmp_path / "model", byte_shards, tmp_path, "--n_layer", 2), "--n_layer", "--init_from")


def test_name_to_start_from_without_a_network(byte_shards, tmp_path):
    check(init_from("gpt2", byte_shards, tmp_path), "--init_from gpt2", "directory")


# ------------------------------------------------------------------------------------ batches and runs
@pytest.mark.parametrize("batch", [[100, 8, 1], [128, 3, 1], [128, 8, 3]])
def test_batch_that_does_not_divide(batch, byte_shards, tmp_path, monkeypatch):
    """Not by the block size, not by the micro-batch, not by the processes."""
    total, micro, processes = batch
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    flags = ["--total_batch_size", total, "--micro_batch_size", micro]
    done = call("train_gpt2", *TINY, *flags, "--data_dir", byte_shards, "--log_dir", tmp_path / "log")
    check(done, f"--total_batch_size {total}", "--micro_batch_size", "--block_size", f"{processes} process")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("kind", ["log.txt", "checkpoint"])
def test_log_dir_that_holds_a_run(kind, byte_shards, tmp_path):
    log_dir = tmp_path / "log"
    if kind == "log.txt":
        log_dir.mkdir()
        (log_dir / "log.txt").write_text("0 train 5.5\n")
    else:
        (log_dir / "step_000005").mkdir(parents=True)
    before = {path: path.is_file() and path.read_text() for path in log_dir.rglob("*")}
    check(call("train_gpt2", *TINY, "--data_dir", byte_shards, "--log_dir", log_dir), "--log_dir", log_dir, "--resume")
    assert {path: path.is_file() and path.read_text() for path in log_dir.rglob("*")} == before


def test_log_dir_that_is_a_file(byte_shards, tmp_path):
    (tmp_path / "log").write_text("mine")
    done = call("train_gpt2", *TINY, "--data_dir", byte_shards, "--log_dir", tmp_path / "log")
    check(done, "--log_dir", tmp_path / "log")
    assert (tmp_path / "log").read_text() == "mine"


@pytest.fixture(scope="module")
def finished_run(byte_shards, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("finished") / "log"
    assert call("train_gpt2", *TINY, "--max_steps", 1, "--data_dir", byte_shards, "--log_dir", log_dir).returncode == 0
    return log_dir


RESUMED = [*TINY, "--max_steps", 1, "--resume"]


@pytest.mark.parametrize("flag, was, now", [("--max_steps", 1, 9), ("--n_layer", 2, 3), ("--seed", 1337, 7)])
def test_resume_with_other_flags_lists_both_values(finished_run, byte_shards, flag, was, now):
    done = call("train_gpt2", *RESUMED, flag, now, "--data_dir", byte_shards, "--log_dir", finished_run)
    check(done, flag, was, now, finished_run / "step_000001")


def test_resume_on_other_tokens(finished_run, random_shards):
    """The same directory name, but other tokens in it: the model does not know them."""
    meta = json.loads((random_shards / "meta.json").read_text()) | {"vocab_size": 50257, "tokenizer": "gpt2"}
    (random_shards / "meta.json").write_text(json.dumps(meta))
    log_dir = random_shards.parent / "log"
    shutil.copytree(finished_run, log_dir)
    check(call("train_gpt2", *RESUMED, "--data_dir", random_shards, "--log_dir", log_dir), "gpt2", "bytes")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "trainer.pt"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_resume_from_a_damaged_checkpoint(finished_run, byte_shards, tmp_path, file, damage):
    shutil.copytree(finished_run, tmp_path / "log")
    path = tmp_path / "log" / "step_000001" / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 3] if damage == "truncated" else b"")
    done = call("train_gpt2", *RESUMED, "--data_dir", byte_shards, "--log_dir", tmp_path / "log")
    check(done, tmp_path / "log" / "step_000001", "damaged", "delete it")


# ---------------------------------------------------------------------------------------------- shards
def test_data_dir_that_is_missing(tmp_path):
    check_training(tmp_path / "nowhere", tmp_path / "nowhere", "prepare_shakespeare.py", "fineweb.py")


@pytest.mark.parametrize("split", ["train", "val"])
def test_split_without_shards(random_shards, split):
    for path in random_shards.glob(f"*_{split}_*"):
        path.unlink()
    (random_shards / "meta.json").unlink()
    check_training(random_shards, random_shards, f"no {split} shard")


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_shorter_than_a_window(tmp_path, split):
    shards = {"train": [range(99)], "val": [range(99)]} | {split: [range(16), range(3)]}
    write_data_set(tmp_path / "data", **shards)
    check_training(tmp_path / "data", tmp_path / "data", split, "--block_size 16")


@pytest.mark.parametrize("shard", ["tiny_train_000001.npy", "tiny_val_000000.npy"])
@pytest.mark.parametrize("with_meta", [True, False])
@pytest.mark.parametrize("cut", [-1, -64, 1])
def test_shard_whose_size_is_not_its_headers(random_shards, shard, with_meta, cut):
    """Truncated by a byte, by 32 tokens, or with a byte too many."""
    path = random_shards / shard
    path.write_bytes(path.read_bytes() + b"x" if cut > 0 else path.read_bytes()[:cut])
    if not with_meta:
        (random_shards / "meta.json").unlink()
    size = path.stat().st_size
    check_training(random_shards, path, f"{size:,}")


def test_bin_shard_that_is_truncated(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        write_bin(tmp_path / "data" / f"x_{split}_000000.bin", range(100))
    path = tmp_path / "data" / "x_train_000000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    check_training(tmp_path / "data", path)


WRONG = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("First Citizen:\n" * 200),
    "int64": lambda path: np.save(path, np.arange(333)),
    "big-endian": lambda path: np.save(path, np.arange(333, dtype=">u2")),
    "two dimensions": lambda path: np.save(path, np.zeros((3, 111), dtype=np.uint16)),
    "pickled objects": lambda path: np.save(path, np.array([{}] * 333, dtype=object), allow_pickle=True),
    "other magic": lambda path: path.write_bytes(np.array([20240801, 1, 333] + [0] * 419, "<i4").tobytes()),
    "other version": lambda path: path.write_bytes(np.array([20240520, 7, 333] + [0] * 419, "<i4").tobytes()),
    "negative count": lambda path: path.write_bytes(np.array([20240520, 1, -5] + [0] * 419, "<i4").tobytes()),
}


@pytest.mark.parametrize("with_meta", [True, False])
@pytest.mark.parametrize("kind", WRONG)
def test_file_that_is_no_shard(random_shards, kind, with_meta):
    WRONG[kind](random_shards / "tiny_train_000001.npy")
    if not with_meta:
        (random_shards / "meta.json").unlink()
    check_training(random_shards, random_shards / "tiny_train_000001.npy")


@pytest.mark.parametrize("split, place", [("train", 0), ("train", 332), ("val", 50), ("val", 98)])
def test_token_id_beyond_the_vocabulary(random_shards, split, place):
    path = sorted(random_shards.glob(f"*_{split}_*"))[-1]
    tokens = np.load(path)
    tokens[place] = 257
    write_npy(path, tokens)
    check_training(random_shards, path, "257")


def test_token_id_beyond_gpt2s_vocabulary(random_shards):
    (random_shards / "meta.json").unlink()
    write_npy(random_shards / "tiny_train_000001.npy", np.append(np.arange(332), 50257))
    check_training(random_shards, random_shards / "tiny_train_000001.npy", "50257")


def test_token_id_beyond_the_vocabulary_in_any_of_many_shards(tmp_path):
    shards = [np.arange(40) for _ in range(130)]
    shards[77] = np.append(np.arange(39), 300)
    write_data_set(tmp_path / "data", shards, [np.arange(40)])
    check_training(tmp_path / "data", tmp_path / "data" / "tiny_train_000077.npy", "300")


def test_shard_that_differs_from_meta(random_shards):
    write_npy(random_shards / "tiny_train_000001.npy", np.arange(99))
    check_training(random_shards, random_shards / "tiny_train_000001.npy", "99", "333", "meta.json")


def test_shard_that_meta_names_and_is_missing(random_shards):
    (random_shards / "tiny_train_000000.npy").unlink()
    check_training(random_shards, "tiny_train_000000.npy", "make")


def test_shard_that_meta_does_not_name(random_shards):
    write_npy(random_shards / "tiny_train_000002.npy", np.arange(99))
    check_training(random_shards, random_shards / "tiny_train_000002.npy", "meta.json")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"tokenizer": "bytes", "vocab_size": 257, "shards": 3}'])
def test_meta_that_cannot_be_read(random_shards, content):
    (random_shards / "meta.json").write_text(content)
    check_training(random_shards, random_shards / "meta.json", "again")


def test_meta_with_an_unknown_tokenizer(random_shards):
    meta = json.loads((random_shards / "meta.json").read_text()) | {"tokenizer": "words"}
    (random_shards / "meta.json").write_text(json.dumps(meta))
    check_training(random_shards, random_shards, "words")


def test_bad_token_that_the_first_look_missed_ends_in_a_line(random_shards, tmp_path):
    """A token beyond the vocabulary that turns up late still ends a run as a user's mistake."""
    module = load("train_gpt2")

    class Late(module.Windows):
        """Windows over shards in which, after the first look, a token is damaged."""

        def __init__(self, data_dir, split, *rest):
            super().__init__(data_dir, split, *rest)
            if split == "train":
                for path in self.paths:
                    write_npy(path, np.full(len(module.open_shard(path)), 999))
                module.open_shard.cache_clear()

    module.Windows = Late
    done = call(module, *TINY, "--data_dir", random_shards, "--log_dir", tmp_path / "log")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "tiny_train_" in done.stderr and "999" in done.stderr
