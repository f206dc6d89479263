"""train_gpt2.py's data: windows and their order, directories of other projects, what is refused, damaged shards."""

import json
import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    assert_user_error,
    call,
    edit_json,
    load,
    losses,
    read_windows,
    succeed,
    tiny_flags,
    truncate,
    write_bin,
    write_data_set,
    write_npy,
)

train_gpt2 = load("train_gpt2")
GPT2_VOCAB = 50257  # large enough that each token of a small data set can be unique and tells its place
TRAIN_0, TRAIN_1, VAL = "tiny_train_000000.npy", "tiny_train_000001.npy", "tiny_val_000000.npy"


def unique_shards(*sizes):
    """Return shards of the given sizes in which no token occurs twice, counted over all of them."""
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def open_dataset(directory, block_size=16, seed=1, shuffle=True, split="train"):
    data_set = train_gpt2.read_data_set(str(directory))
    return train_gpt2.TokenDataset(str(directory), split, data_set, block_size, seed, shuffle)


def rows(dataset, indices):
    """Return the windows with these indices as lists of block_size + 1 tokens."""
    windows = dataset.batch(indices)
    assert windows.shape == (len(indices), dataset.block_size + 1)
    return windows.tolist()


def epoch_rows(directory, epoch, **options):
    """Return the windows of an epoch in their order."""
    dataset = open_dataset(directory, **options)
    return rows(dataset, range(epoch * dataset.num_windows, (epoch + 1) * dataset.num_windows))


def all_windows(directory, block_size):
    """Return all training windows in file order, cut by brute force."""
    windows = []
    for path in sorted(directory.glob("*_train_*.npy")):
        windows += read_windows(path, block_size)
    return windows


def edit_shards(directory, change):
    """Replace the list of shards in meta.json by change(shards)."""
    path = directory / "meta.json"
    edit_json(path, shards=change(json.loads(path.read_text())["shards"]))


def change_token(path, place, token):
    """Replace a token of a shard."""
    tokens = np.load(path)
    tokens[place] = token
    write_npy(path, tokens)


# ------------------------------------------------------------------------------------- windows
@pytest.mark.parametrize(
    "block_size, sizes", [(16, (200,)), (16, (17, 16, 18, 1, 100)), (7, (33, 2, 250)), (1, (1, 40))]
)
def test_an_epoch_has_each_window_once_in_the_documented_order(tmp_path, sizes, block_size):
    """The order follows from the seed, the epoch and the shard, so that a later version can resume a run."""
    directory = write_data_set(tmp_path, unique_shards(*sizes), [range(50)], GPT2_VOCAB)
    shards = [read_windows(path, block_size) for path in sorted(directory.glob("*_train_*"))]
    for seed, epoch in ((1, 0), (1, 1), (7, 3)):
        expected = []
        for shard in np.random.default_rng((seed, epoch)).permutation(len(shards)):
            order = np.random.default_rng((seed, epoch, shard)).permutation(len(shards[shard]))
            expected += [shards[shard][i] for i in order]
        assert epoch_rows(directory, epoch, block_size=block_size, seed=seed) == expected
        assert epoch_rows(directory, epoch, block_size=block_size, shuffle=False) == sum(shards, [])


@pytest.mark.parametrize("micro_batch_size", [4, 12])
def test_each_step_trains_on_the_next_windows_whatever_the_micro_batch(tmp_path, micro_batch_size):
    """12 windows per step, and two steps are an epoch. The inputs are what the token embedding is given."""
    inputs = []

    def record(module, args):
        if isinstance(module, torch.nn.Embedding) and module.training and args[0].dim() == 2:
            inputs.extend(args[0].tolist())

    directory = write_data_set(tmp_path / "data", unique_shards(150, 17, 10, 240), [range(50)], GPT2_VOCAB)
    flags = tiny_flags(total_batch_size=12 * 16, micro_batch_size=micro_batch_size, max_steps=4, max_new_tokens=1)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(record)
    try:
        succeed("train_gpt2", *flags, "--data_dir", directory, "--log_dir", tmp_path / "log", "--seed", 5)
    finally:
        hook.remove()
    expected = [row[:-1] for row in rows(open_dataset(directory, seed=5), range(48))]
    assert inputs == expected
    assert sorted(inputs[:24]) == sorted(inputs[24:]) == [row[:-1] for row in all_windows(directory, 16)]


# --------------------------------------------------------------------------------------- order
def test_file_order_is_the_order_of_the_names_whatever_meta_json_says(tmp_path):
    directory = write_data_set(tmp_path, unique_shards(50, 50, 50), [range(50)], GPT2_VOCAB)
    expected = epoch_rows(directory, 0, shuffle=False), epoch_rows(directory, 0)
    edit_shards(directory, lambda shards: shards[::-1])
    assert (epoch_rows(directory, 0, shuffle=False), epoch_rows(directory, 0)) == expected


def test_the_tokens_of_a_window_depend_on_its_index_alone(tmp_path):
    """Looked up at random, far ahead or backwards, in more shards than are kept open."""
    directory = write_data_set(tmp_path, unique_shards(*[33] * 40), [range(50)], GPT2_VOCAB)
    dataset = open_dataset(directory)
    in_order = rows(dataset, range(200))
    indices = np.random.default_rng(0).permutation(200).tolist()
    assert rows(dataset, indices) == [in_order[i] for i in indices]
    for i in indices[:5]:
        assert rows(open_dataset(directory), [i]) == [in_order[i]]


def write_sparse_bin(path, num_tokens):
    """A shard in llm.c's format whose tokens are all 0 and take no space on the disk."""
    write_bin(path, [])
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(np.array([num_tokens], "<i4").tobytes())
        file.truncate(1024 + 2 * num_tokens)


def test_memory_does_not_grow_with_the_number_of_tokens(tmp_path):
    """A billion tokens in 40 sparse files need memory neither for them nor for all of their windows."""
    for split, num_files in (("train", 40), ("val", 1)):
        for i in range(num_files):
            write_sparse_bin(tmp_path / f"big_{split}_{i:06d}.bin", 25_000_000)
    data_set = train_gpt2.read_data_set(str(tmp_path))
    tracemalloc.start()
    dataset = train_gpt2.TokenDataset(str(tmp_path), "train", data_set, 1024, 1, True)
    num_windows = dataset.num_windows
    rows(dataset, (0, num_windows // 2, num_windows - 1, 10**9, 10**12))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_windows == 40 * ((25_000_000 - 1) // 1024)
    assert peak < 3e6  # one int64 per window would be 7.8 MB


# --------------------------------------------------------------------- data sets of other projects
def test_directories_of_other_projects_train_as_our_own_shards_do(tmp_path):
    """build-nanogpt's .npy and llm.c's .bin files, both without meta.json, give the losses of the same tokens."""
    rng = np.random.default_rng(0)
    train = [np.append(rng.integers(50257, size=n), 50256) for n in (300, 420)]
    val = rng.integers(50257, size=200)
    write_data_set(tmp_path / "ours", train, [val], GPT2_VOCAB)
    (tmp_path / "build-nanogpt").mkdir()
    write_npy(tmp_path / "build-nanogpt" / "edufineweb_val_000000.npy", val)
    (tmp_path / "llm.c").mkdir()
    write_bin(tmp_path / "llm.c" / "fineweb_val_000000.bin", val)
    for i, tokens in enumerate(train, start=1):
        write_npy(tmp_path / "build-nanogpt" / f"edufineweb_train_{i:06d}.npy", tokens)
        write_bin(tmp_path / "llm.c" / f"fineweb_train_{i:06d}.bin", tokens)
    logs = []
    for name in ("ours", "build-nanogpt", "llm.c"):
        directories = ["--data_dir", tmp_path / name, "--log_dir", tmp_path / f"log_{name}"]
        succeed("train_gpt2", *tiny_flags(max_steps=3, max_new_tokens=1), *directories)
        logs.append((losses(tmp_path / f"log_{name}"), losses(tmp_path / f"log_{name}", "val")))
    assert len(logs[0][0]) == 3
    assert logs[0] == logs[1] == logs[2]


@pytest.mark.parametrize(
    "name, split",
    [
        ("edufineweb_train_000001.npy", "train"),
        ("fineweb_val_000000.bin", "val"),
        ("TinyStories_train.bin", "train"),  # llm.c's small data sets are single files
        ("a_train_val_000000.npy", "val"),
        ("._x_train_000000.npy", None),  # macOS leaves such files next to the real ones
        ("x_train_000000.npy.tmp", None),
        ("x_test_000000.npy", None),
        ("train.bin", None),  # nanoGPT's, which has no header
    ],
)
def test_the_name_of_a_shard_tells_its_split(tmp_path, name, split):
    for other in ("train", "val"):
        write_npy(tmp_path / f"other_{other}_000000.npy", range(17))
    write = write_bin if name.endswith(".bin") and split else write_npy
    write(tmp_path / "shard.npy", range(17))
    (tmp_path / "shard.npy").rename(tmp_path / name)
    for each in ("train", "val"):
        assert open_dataset(tmp_path, split=each).num_windows == 1 + (each == split)


def test_files_that_meta_json_does_not_list_are_not_read(random_shards):
    expected = open_dataset(random_shards).num_windows
    write_npy(random_shards / "tiny_train_000002.npy", np.full(99, 50_000))
    (random_shards / "._meta.json").write_bytes(b"\x00\x05\x16\x07")
    assert open_dataset(random_shards).num_windows == expected


# ---------------------------------------------------------------------------------- fingerprint
def fingerprint(directory):
    return train_gpt2.read_data_set(str(directory))["fingerprint"]


def test_the_fingerprint_changes_with_the_tokens(random_shards, tmp_path):
    """Here it is made from the tokens, because meta.json has no checksums. It does not depend on the directory."""
    before = fingerprint(random_shards)
    directory = random_shards.rename(tmp_path / "moved")
    assert fingerprint(directory) == before
    change_token(directory / TRAIN_1, 100, (np.load(directory / TRAIN_1)[100] + 1) % 256)
    assert fingerprint(directory) != before


def test_the_fingerprint_changes_with_the_name_of_a_shard(random_shards):
    """The names decide the order of the tokens. test_train_gpt2_faults.py changes a checksum."""
    before = fingerprint(random_shards)
    (random_shards / TRAIN_0).rename(random_shards / "tiny_train_000002.npy")
    edit_shards(random_shards, lambda shards: [{**shards[0], "file": "tiny_train_000002.npy"}, *shards[1:]])
    assert fingerprint(random_shards) != before


# ------------------------------------------------------------------------ directories that are refused
def assert_refused(directory, *needles, flags=()):
    """Check that a run on a data set ends in one line that contains the needles."""
    done = call("train_gpt2", *TINY, *flags, "--data_dir", directory, "--log_dir", directory.parent / "log")
    assert_user_error(done, *needles)


def edit(name, change):
    """Return a function that changes a file of a directory with change(path)."""
    return lambda directory: change(directory / name)


def move_outside(directory):
    """Let meta.json name training shards that are outside of the directory."""
    (directory / TRAIN_0).rename(directory.parent / TRAIN_0)
    (directory / TRAIN_1).rename(directory.parent / TRAIN_1)
    edit_shards(directory, lambda shards: [{**shard, "file": f"../{shard['file']}"} for shard in shards])


def replace_by_bin(*header):
    """Return a function that replaces a training shard by a .bin file with these numbers at its beginning."""

    def replace(directory):
        (directory / "meta.json").unlink()
        (directory / TRAIN_1).unlink()
        content = np.array([*header, *[0] * 400], "<i4").tobytes()
        (directory / "tiny_train_000001.bin").write_bytes(content)

    return replace


# damage: (what the message must contain, function that damages a data set)
DAMAGES = {
    "no training shards": ("train", partial(edit_shards, change=lambda shards: shards[2:])),
    "no validation shards": ("val", partial(edit_shards, change=lambda shards: shards[:2])),
    "shorter than a window": ("--block_size", lambda folder: write_data_set(folder, [range(99)], [range(16)])),
    # shards of fineweb.py without meta.json, which is written last, could be taken for another project's
    "unfinished": ("", edit("meta.json", lambda path: path.rename(path.with_name("state_0.json")))),
    "another tokenizer": ("words", edit("meta.json", partial(edit_json, tokenizer="words"))),
    "names outside of the directory": ("train", move_outside),
    "another length than meta.json says": (TRAIN_1, edit(TRAIN_1, lambda path: write_npy(path, range(99)))),
    "a truncated shard": (TRAIN_1, edit(TRAIN_1, truncate)),
    "an empty shard": (VAL, edit(VAL, lambda path: path.write_bytes(b""))),
    "text as a shard": (TRAIN_0, edit(TRAIN_0, lambda path: path.write_text("First Citizen:\n" * 200))),
    "int64 tokens": (TRAIN_0, edit(TRAIN_0, lambda path: np.save(path, np.arange(700)))),
    "pickled objects": (TRAIN_0, edit(TRAIN_0, lambda path: np.save(path, np.array([{}] * 700), allow_pickle=True))),
    "another magic number": ("tiny_train_000001.bin", replace_by_bin(20240801, 1, 288)),
    "fewer tokens than the header says": ("tiny_train_000001.bin", replace_by_bin(20240520, 1, 2**30)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_data_set_that_cannot_be_used_is_refused(random_shards, damage):
    needle, inflict = DAMAGES[damage]
    inflict(random_shards)
    assert_refused(random_shards, random_shards, needle)


@pytest.mark.parametrize("name, place", [(TRAIN_1, 320), (VAL, 96)])
def test_a_token_beyond_the_vocabulary_is_refused(random_shards, name, place):
    change_token(random_shards / name, place, 257)
    assert_refused(random_shards, random_shards / name, 257, flags=["--max_steps", 9, "--val_tokens", 99])


def test_a_shard_that_changed_is_found_when_it_is_opened_again(tmp_path):
    """With more than 16 shards, those that were not used for long are closed."""
    directory = write_data_set(tmp_path, unique_shards(*[33] * 20), [range(50)], GPT2_VOCAB)
    dataset = open_dataset(directory, shuffle=False)
    rows(dataset, range(dataset.num_windows))
    write_npy(directory / TRAIN_0, range(17))
    with pytest.raises(Exception, match=TRAIN_0):
        dataset.batch([0])
