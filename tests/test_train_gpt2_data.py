"""train_gpt2.py's data: which directories it accepts, windows and their order, faults of files."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import (
    ROOT,
    TINY,
    call,
    load,
    losses,
    pretend_to_be_a_rank,
    read_windows,
    tiny_flags,
    write_bin,
    write_data_set,
    write_npy,
)

train_gpt2 = load("train_gpt2")
GPT2_VOCAB = 50257  # large enough that each token of a small data set can be unique and tells its place


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


def all_windows(directory, block_size, split="train"):
    """Return all windows of a split in file order, cut by brute force."""
    windows = []
    for path in sorted(directory.glob(f"*_{split}_*.npy")):
        windows += read_windows(path, block_size)
    return windows


def change_meta(directory, **changes):
    """Change fields of meta.json; the function of a field gets its old value."""
    meta = json.loads((directory / "meta.json").read_text())
    for name, change in changes.items():
        meta[name] = change(meta[name]) if callable(change) else change
    (directory / "meta.json").write_text(json.dumps(meta))


# ------------------------------------------------------------------------------------- windows
@pytest.mark.parametrize("block_size", [1, 7, 16])
@pytest.mark.parametrize("sizes", [(200,), (17, 16, 18, 1, 100), (33, 2, 250), (1, 1, 40)])
def test_an_epoch_contains_each_window_once(tmp_path, sizes, block_size):
    directory = write_data_set(tmp_path, unique_shards(*sizes), [range(50)], GPT2_VOCAB)
    expected = all_windows(directory, block_size)
    n = len(expected)
    ordered = open_dataset(directory, block_size, shuffle=False)
    shuffled = open_dataset(directory, block_size, shuffle=True)
    assert ordered.num_windows == shuffled.num_windows == n == sum((size - 1) // block_size for size in sizes)
    assert rows(ordered, range(n)) == expected
    assert rows(ordered, range(n, 2 * n)) == expected
    for epoch in range(3):
        assert sorted(rows(shuffled, range(epoch * n, (epoch + 1) * n))) == expected


def test_every_token_except_the_first_of_a_shard_is_a_target_once(tmp_path):
    directory = write_data_set(tmp_path, unique_shards(33, 65), [range(50)], GPT2_VOCAB)
    dataset = open_dataset(directory)
    _, y = train_gpt2.load_batch(dataset, range(dataset.num_windows), train_gpt2.torch.device("cpu"))
    assert sorted(y.flatten().tolist()) == [*range(1, 33), *range(34, 98)]


def test_targets_are_the_inputs_one_token_later(tmp_path):
    directory = write_data_set(tmp_path, unique_shards(33, 65), [range(50)], GPT2_VOCAB)
    dataset = open_dataset(directory)
    x, y = train_gpt2.load_batch(dataset, [3, 0, 4], train_gpt2.torch.device("cpu"))
    assert x.shape == y.shape == (3, 16)
    assert x[:, 1:].tolist() == y[:, :-1].tolist()
    assert (y == x + 1).all()  # the tokens of these shards count up


def test_splits_do_not_mix(tmp_path):
    directory = write_data_set(tmp_path, [range(100)], [range(300, 400)], GPT2_VOCAB)
    assert np.max(rows(open_dataset(directory), range(6))) < 100
    assert np.min(rows(open_dataset(directory, split="val"), range(6))) >= 300


def train_as_rank(monkeypatch, directory, log_dir, rank, world_size, micro_batch_size):
    """Run four steps of main() as one of several ranks. Returns the micro-batches it trained on, as lists of rows."""
    module = load("train_gpt2")
    micro_batches = []

    class RecordingDataset(module.TokenDataset):
        def __init__(self, data_dir, split, *rest, **options):
            super().__init__(data_dir, split, *rest, **options)
            self.split = split

        def batch(self, indices):
            windows = super().batch(indices)
            if self.split == "train":
                micro_batches.append(windows.tolist())
            return windows

    module.TokenDataset = RecordingDataset
    pretend_to_be_a_rank(monkeypatch, module, rank, world_size)
    flags = tiny_flags(total_batch_size=12 * 16, micro_batch_size=micro_batch_size, max_steps=4, max_new_tokens=1)
    done = call(module, *flags, "--data_dir", directory, "--log_dir", log_dir)
    assert done.returncode == 0, done.stderr
    return micro_batches[:-1]  # the last one is loaded ahead, for a step that does not come


def test_the_windows_of_a_step_depend_neither_on_ranks_nor_on_micro_batches(tmp_path, monkeypatch):
    """Ranks divide the 12 windows of a step among themselves. Two steps are an epoch of four uneven shards."""
    sizes = (16 * 9 + 6, 16 + 1, 10, 16 * 14 + 16)  # 9 + 1 + 0 + 14 = 24 windows
    directory = write_data_set(tmp_path / "data", unique_shards(*sizes), [range(50)], GPT2_VOCAB)
    expected = all_windows(directory, 16)
    layouts = []
    for world_size, micro_batch_size in ((1, 12), (1, 1), (2, 3), (3, 4)):
        steps = [[], [], [], []]
        for rank in range(world_size):
            log_dir = tmp_path / f"{world_size}_{micro_batch_size}_{rank}"
            micro_batches = train_as_rank(monkeypatch, directory, log_dir, rank, world_size, micro_batch_size)
            assert len(micro_batches) == 4 * 12 / (world_size * micro_batch_size)
            for i, micro_batch in enumerate(micro_batches):
                assert len(micro_batch) == micro_batch_size
                steps[4 * i // len(micro_batches)] += micro_batch
        assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == expected
        layouts.append([sorted(step) for step in steps])
    assert layouts[0] == layouts[1] == layouts[2] == layouts[3]


# --------------------------------------------------------------------------------------- order
def epoch_rows(directory, epoch, **options):
    """Return the windows of an epoch in their order."""
    dataset = open_dataset(directory, **options)
    return rows(dataset, range(epoch * dataset.num_windows, (epoch + 1) * dataset.num_windows))


def test_the_order_differs_between_epochs_and_between_seeds(tmp_path):
    directory = write_data_set(tmp_path, unique_shards(200, 150, 90), [range(50)], GPT2_VOCAB)
    orders = []
    for epoch in (0, 1, 2):
        for seed in (1, 2):
            orders.append(epoch_rows(directory, epoch, seed=seed))
    assert len({str(order) for order in orders}) == 6
    assert epoch_rows(directory, 2, seed=2) == orders[-1]


def test_the_windows_of_a_shard_are_shuffled_anew_in_each_epoch_and_shard(tmp_path):
    """With a single shard, and for two shards of equal size, the order of the shards alone is not enough."""
    directory = write_data_set(tmp_path / "one", unique_shards(400), [range(50)], GPT2_VOCAB)
    assert epoch_rows(directory, 0) != epoch_rows(directory, 1) != sorted(epoch_rows(directory, 1))
    directory = write_data_set(tmp_path / "two", unique_shards(401, 401), [range(50)], GPT2_VOCAB)
    places = {0: [], 1: []}
    dataset = open_dataset(directory)
    for index in range(dataset.num_windows):
        shard, offset = dataset.locate(index)
        places[shard].append(offset)
    assert sorted(places[0]) == sorted(places[1]) == list(range(0, 400, 16))
    assert places[0] != places[1]


def test_shards_are_visited_one_after_another_in_random_order(tmp_path):
    """A run reads few files at a time, and which shard comes first changes with the epoch."""
    directory = write_data_set(tmp_path, unique_shards(50, 50, 50, 50, 50, 50), [range(50)], GPT2_VOCAB)
    visits = []
    for epoch in range(4):
        shards = [row[0] // 50 for row in epoch_rows(directory, epoch)]
        visit = shards[::3]
        assert shards == [shard for shard in visit for _ in range(3)]
        visits.append(visit)
    assert len({str(visit) for visit in visits}) > 1


def test_the_order_is_the_same_in_another_process(tmp_path):
    directory = str(write_data_set(tmp_path, unique_shards(200, 150, 90), [range(50)], GPT2_VOCAB))
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.dont_write_bytecode = True
import train_gpt2
data_set = train_gpt2.read_data_set({directory!r})
dataset = train_gpt2.TokenDataset({directory!r}, "train", data_set, 16, 7, True)
print([dataset.locate(i) for i in range(200)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    dataset = open_dataset(directory, seed=7)
    assert done.stdout.strip() == str([dataset.locate(i) for i in range(200)]), done.stderr


def test_the_place_of_a_window_depends_on_its_index_alone(tmp_path):
    """Looked up at random, far ahead or backwards, an index gives the same place as in order."""
    directory = write_data_set(tmp_path, unique_shards(200, 1, 150, 90), [range(50)], GPT2_VOCAB)
    dataset = open_dataset(directory)
    in_order = [dataset.locate(i) for i in range(150)]
    for i in np.random.default_rng(0).permutation(150).tolist():
        assert open_dataset(directory).locate(i) == in_order[i] == dataset.locate(i)


def test_more_shards_than_are_kept_open_are_read_correctly(tmp_path):
    """An epoch over 40 shards in file order, then windows of all of them at random."""
    directory = write_data_set(tmp_path, unique_shards(*[33] * 40), [range(50)], GPT2_VOCAB)
    expected = all_windows(directory, 16)
    dataset = open_dataset(directory, shuffle=False)
    assert rows(dataset, range(80)) == expected
    indices = np.random.default_rng(0).integers(80, size=200).tolist()
    assert rows(dataset, indices) == [expected[i] for i in indices]
    assert len(dataset.open_shards) == 16


def test_memory_does_not_grow_with_the_number_of_tokens(tmp_path):
    """A data set of a billion tokens (40 sparse files) needs memory neither for them nor for its windows."""
    for split, num_files in (("train", 40), ("val", 1)):
        for i in range(num_files):
            write_sparse_bin(tmp_path / f"big_{split}_{i:06d}.bin", 25_000_000)
    data_set = train_gpt2.read_data_set(str(tmp_path))
    tracemalloc.start()
    dataset = train_gpt2.TokenDataset(str(tmp_path), "train", data_set, 1024, 1, True)
    indices = (0, dataset.num_windows // 2, dataset.num_windows - 1, 10**9, 10**12)
    places = {dataset.locate(i) for i in indices}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert dataset.num_windows == 40 * ((25_000_000 - 1) // 1024)
    assert len(places) == 5
    assert peak < 2e6  # one int64 per window would be 7.8 MB


def write_sparse_bin(path, num_tokens):
    """A shard in llm.c's format whose tokens are all 0 and take no space on the disk."""
    write_bin(path, [])
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(np.array([num_tokens], "<i4").tobytes())
        file.truncate(1024 + 2 * num_tokens)


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
        log_dir = tmp_path / f"log_{name}"
        done = call(
            "train_gpt2",
            *tiny_flags(max_steps=3, max_new_tokens=1),
            "--data_dir",
            tmp_path / name,
            "--log_dir",
            log_dir,
        )
        assert done.returncode == 0, done.stderr
        logs.append((losses(log_dir), losses(log_dir, "val")))
    assert len(logs[0][0]) == 3
    assert logs[0] == logs[1] == logs[2]


@pytest.mark.parametrize("prefix", ["tiny_shakespeare", "TinyStories", "a.b-c_train"])
def test_shards_without_an_index_in_their_name_are_found(tmp_path, prefix):
    """llm.c's small data sets are single files, such as TinyStories_val.bin."""
    write_bin(tmp_path / f"{prefix}_train.bin", range(100))
    write_bin(tmp_path / f"{prefix}_val.bin", range(200, 300))
    assert rows(open_dataset(tmp_path), range(6)) != []
    assert np.min(rows(open_dataset(tmp_path, split="val"), range(6))) >= 200
    data_set = train_gpt2.read_data_set(str(tmp_path))
    assert (data_set["tokenizer"], data_set["vocab_size"]) == ("gpt2", GPT2_VOCAB)


@pytest.mark.parametrize(
    "name, split",
    [
        ("edufineweb_train_000001.npy", "train"),
        ("fineweb_val_000000.bin", "val"),
        ("tiny_shakespeare_train.bin", "train"),
        ("a_train_val_000000.npy", "val"),
        ("._x_train_000000.npy", None),
        ("train_000000.npy", None),
        ("train.bin", None),
        ("x_train_000000.npy.tmp", None),
        ("x_test_000000.npy", None),
        ("x_train_a.npy", None),
        ("x_train_000000_npy", None),
    ],
)
def test_the_name_of_a_shard_tells_its_split(name, split):
    assert train_gpt2.split_of(name) == split


def test_files_whose_names_begin_with_a_dot_do_not_count(random_shards):
    """macOS leaves such files beside the real ones, with and without meta.json."""
    (random_shards / "._tiny_train_000000.npy").write_bytes(b"\x00\x05\x16\x07")
    (random_shards / "._meta.json").write_bytes(b"\x00\x05\x16\x07")
    assert open_dataset(random_shards).num_windows == 699 // 16 + 332 // 16
    (random_shards / "meta.json").unlink()
    assert open_dataset(random_shards).num_windows == 699 // 16 + 332 // 16


def test_files_that_meta_json_does_not_list_are_not_read(random_shards):
    expected = open_dataset(random_shards).num_windows
    write_npy(random_shards / "tiny_train_000002.npy", np.full(99, 50_000))
    (random_shards / "notes.txt").write_text("mine")
    assert open_dataset(random_shards).num_windows == expected


def test_a_shard_is_mapped_and_not_read(tmp_path):
    write_npy(tmp_path / "a.npy", range(100))
    write_bin(tmp_path / "a.bin", range(100))
    for path in (tmp_path / "a.npy", tmp_path / "a.bin"):
        tokens = train_gpt2.load_shard(str(path))
        assert isinstance(tokens, np.memmap)
        assert not tokens.flags.writeable
        assert tokens.tolist() == list(range(100))


# ---------------------------------------------------------------------------------- fingerprint
def fingerprint(directory):
    return train_gpt2.read_data_set(str(directory))["fingerprint"]


@pytest.mark.parametrize("sha256", ["", None, "no meta.json"])
def test_the_fingerprint_changes_if_a_shard_without_a_checksum_is_replaced(random_shards, sha256):
    if sha256 == "no meta.json":
        (random_shards / "meta.json").unlink()
    else:
        change_meta(random_shards, shards=lambda shards: [{**shard, "sha256": sha256} for shard in shards])
    before = fingerprint(random_shards)
    assert fingerprint(random_shards) == before
    path = random_shards / "tiny_train_000001.npy"
    tokens = np.load(path)
    tokens[100] = (tokens[100] + 1) % 256
    write_npy(path, tokens)
    assert fingerprint(random_shards) != before


def test_the_fingerprint_changes_with_checksums_order_names_and_source(random_shards):
    def set_checksums(shards):
        return [{**shard, "sha256": f"{i:064x}"} for i, shard in enumerate(shards)]

    fingerprints = [fingerprint(random_shards)]
    change_meta(random_shards, shards=set_checksums)
    fingerprints.append(fingerprint(random_shards))
    change_meta(random_shards, source={"text": "another"})
    fingerprints.append(fingerprint(random_shards))
    first, second = random_shards / "tiny_train_000000.npy", random_shards / "tiny_train_000002.npy"
    first.rename(second)
    change_meta(random_shards, shards=lambda shards: [{**shards[0], "file": second.name}, *shards[1:]])
    fingerprints.append(fingerprint(random_shards))
    assert len(set(fingerprints)) == 4
    assert all(value.startswith("bytes-") for value in fingerprints)


def test_the_fingerprint_does_not_depend_on_the_directory(random_shards, tmp_path):
    before = fingerprint(random_shards)
    assert fingerprint(random_shards.rename(tmp_path / "moved")) == before


# ------------------------------------------------------------------------ directories that are refused
def assert_refused(directory, *needles, block_size=16):
    """Check that opening a data set raises an error that contains the needles; returns its message."""
    with pytest.raises((ValueError, train_gpt2.UserError)) as error:
        for split in ("train", "val"):
            open_dataset(directory, block_size=block_size, split=split)
    for needle in needles:
        assert str(needle) in str(error.value)
    return str(error.value)


def test_a_missing_directory_is_refused_with_two_commands_that_create_one(tmp_path):
    assert_refused(tmp_path / "nowhere", tmp_path / "nowhere", "prepare_shakespeare.py", "fineweb.py")


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_an_unfinished_directory_of_fineweb_is_refused(random_shards, tokenizer):
    """It has shards, but no meta.json, which is written last: it could be taken for another project's."""
    (random_shards / "meta.json").unlink()
    (random_shards / "state_0.json").write_text(json.dumps({"tokenizer": tokenizer}))
    assert_refused(random_shards, random_shards, "not finished", "fineweb.py")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_shards_is_refused_with_what_the_directory_contains(random_shards, split):
    (random_shards / "meta.json").unlink()
    for path in random_shards.glob(f"*_{split}_*"):
        path.unlink()
    (random_shards / "README.txt").write_text("mine")
    assert_refused(random_shards, random_shards, f"*_{split}_000000.npy", f"*_{split}.bin", "README.txt")


def test_an_empty_directory_is_refused(tmp_path):
    assert_refused(tmp_path, tmp_path, "nothing")


def test_the_format_of_nanogpt_is_named(tmp_path):
    """nanoGPT's train.bin and val.bin contain tokens without a header, here token 0."""
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(bytes(2000))
    assert_refused(tmp_path, tmp_path / "train.bin", "nanoGPT", "header", "prepare_shakespeare.py")


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_that_are_shorter_than_a_window_are_refused(tmp_path, split):
    shards = {"train": [range(99)], "val": [range(99)]}
    shards[split] = [range(16), range(3)]
    write_data_set(tmp_path, **shards)
    assert_refused(tmp_path, tmp_path, split, "--block_size 16", "smaller --block_size")
    shards[split] = [range(17), range(3)]
    write_data_set(tmp_path, **shards)
    assert open_dataset(tmp_path, split=split).num_windows == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "NaN", "[" * 10_000, '{"a":' * 10_000, "\x00", "é"])
def test_a_meta_json_that_is_not_a_json_object_is_refused(random_shards, content):
    (random_shards / "meta.json").write_bytes(content.encode("latin-1"))
    assert_refused(random_shards, random_shards / "meta.json", "regenerate")


@pytest.mark.parametrize(
    "field, value",
    [
        ("tokenizer", "words"),
        ("tokenizer", None),
        ("tokenizer", ["bytes"]),
        ("tokenizer", {}),
        ("tokenizer", "gpt2"),
        ("vocab_size", 258),
        ("vocab_size", "257"),
        ("vocab_size", float("inf")),
        ("shards", None),
        ("shards", 3),
        ("shards", {}),
        ("shards", ["tiny_train_000000.npy"]),
        ("shards", [None]),
        ("shards", [{}]),
    ],
)
def test_a_meta_json_with_wrong_values_is_refused(random_shards, field, value):
    change_meta(random_shards, **{field: value})
    assert_refused(random_shards, random_shards / "meta.json", "regenerate")


@pytest.mark.parametrize("field", ["tokenizer", "vocab_size", "shards"])
def test_a_meta_json_that_lacks_a_field_is_refused(random_shards, field):
    meta = json.loads((random_shards / "meta.json").read_text())
    del meta[field]
    (random_shards / "meta.json").write_text(json.dumps(meta))
    assert_refused(random_shards, random_shards / "meta.json", "regenerate")


@pytest.mark.parametrize(
    "field, value",
    [
        ("file", "../victim_train_000000.npy"),
        ("file", "/etc/passwd"),
        ("file", "sub/x_train_000000.npy"),
        ("file", "..\\victim_train_000000.npy"),
        ("file", "C:x_train_000000.npy"),
        ("file", ".x_train_000000.npy"),
        ("file", "x_train_000000.npy\n"),
        ("file", "x_train_000000.txt"),
        ("file", ""),
        ("file", None),
        ("file", 7),
        ("tokens", None),
        ("tokens", -1),
        ("tokens", 700.0),
        ("tokens", "700"),
        ("tokens", True),
        ("tokens", float("inf")),
        ("tokens", 10**30),
        ("sha256", "../x"),
        ("sha256", 3),
        ("sha256", ["a"]),
        ("sha256", "A" * 64),
    ],
)
def test_a_shard_with_wrong_values_in_meta_json_is_refused(random_shards, field, value):
    write_npy(random_shards.parent / "victim_train_000000.npy", range(700))
    change_meta(random_shards, shards=lambda shards: [{**shards[0], field: value}, *shards[1:]])
    assert_refused(random_shards, random_shards / "meta.json", "regenerate")


def test_a_shard_that_meta_json_lists_and_is_missing_is_refused(random_shards):
    (random_shards / "tiny_train_000000.npy").unlink()
    assert_refused(random_shards, "tiny_train_000000.npy", "missing", "regenerate")


def test_a_shard_whose_length_differs_from_meta_json_is_refused(random_shards):
    write_npy(random_shards / "tiny_train_000001.npy", np.arange(99))
    assert_refused(random_shards, random_shards / "tiny_train_000001.npy", "99", "333", "meta.json", "regenerate")


@pytest.mark.parametrize("shard", ["tiny_train_000001.npy", "tiny_val_000000.npy"])
@pytest.mark.parametrize("with_meta", [True, False])
@pytest.mark.parametrize("cut", [-1, -64, 1])
def test_a_shard_whose_size_is_not_that_of_its_header_is_refused(random_shards, shard, with_meta, cut):
    """It lacks a byte or 32 tokens, or has a byte too many."""
    path = random_shards / shard
    content = path.read_bytes()
    path.write_bytes(content + b"x" if cut > 0 else content[:cut])
    if not with_meta:
        (random_shards / "meta.json").unlink()
    assert_refused(random_shards, path, "regenerate it")


@pytest.mark.parametrize("cut", [-2, -1, 1, 2])
def test_a_bin_shard_whose_size_is_not_that_of_its_header_is_refused(tmp_path, cut):
    write_bin(tmp_path / "x_val_000000.bin", range(100))
    path = tmp_path / "x_train_000000.bin"
    write_bin(path, range(100))
    content = path.read_bytes()
    path.write_bytes(content + bytes(cut) if cut > 0 else content[:cut])
    assert_refused(tmp_path, path, "regenerate it")


def write_header(path, magic, version, num_tokens):
    """Write a .bin file of 1,680 bytes with these numbers in its header."""
    path.write_bytes(np.array([magic, version, num_tokens] + [0] * 417, "<i4").tobytes())


def write_npz(path):
    """Write an archive of arrays. np.savez itself would add ".npz" to the path."""
    with open(path, "wb") as file:
        np.savez(file, a=np.arange(333, dtype=np.uint16))


# kind of file: (suffix, function that writes it)
NOT_SHARDS = {
    "empty": ("npy", lambda path: path.write_bytes(b"")),
    "text": ("npy", lambda path: path.write_text("First Citizen:\n" * 200)),
    "int64": ("npy", lambda path: np.save(path, np.arange(333))),
    "big-endian": ("npy", lambda path: np.save(path, np.arange(333, dtype=">u2"))),
    "two dimensions": ("npy", lambda path: np.save(path, np.zeros((3, 111), dtype=np.uint16))),
    "no dimension": ("npy", lambda path: np.save(path, np.uint16(3))),
    "pickled objects": ("npy", lambda path: np.save(path, np.array([{}] * 333, dtype=object), allow_pickle=True)),
    "several arrays": ("npy", lambda path: write_npz(path)),
    "an empty bin": ("bin", lambda path: path.write_bytes(b"")),
    "a short bin": ("bin", lambda path: path.write_bytes(b"\x01\x02\x03")),
    "other magic": ("bin", lambda path: write_header(path, 20240801, 1, 328)),
    "other version": ("bin", lambda path: write_header(path, 20240520, 7, 328)),
    "negative count": ("bin", lambda path: write_header(path, 20240520, 1, -5)),
    "a count of zero": ("bin", lambda path: write_header(path, 20240520, 1, 0)),
    "a count too large": ("bin", lambda path: write_header(path, 20240520, 1, 2**31 - 1)),
}


@pytest.mark.parametrize("with_meta", [True, False])
@pytest.mark.parametrize("kind", NOT_SHARDS)
def test_a_file_that_is_not_a_shard_is_refused(random_shards, kind, with_meta):
    suffix, write = NOT_SHARDS[kind]
    (random_shards / "tiny_train_000001.npy").unlink()
    path = random_shards / f"tiny_train_000001.{suffix}"
    write(path)
    change_meta(random_shards, shards=lambda shards: [shards[0], {**shards[1], "file": path.name}, shards[2]])
    if not with_meta:
        (random_shards / "meta.json").unlink()
    assert_refused(random_shards, path, "regenerate it")


def test_a_directory_in_place_of_a_shard_is_refused(random_shards):
    path = random_shards / "tiny_train_000001.npy"
    path.unlink()
    path.mkdir()
    assert_refused(random_shards, path, "not a regular file")


@pytest.fixture
def time_limit():
    """Interrupt a test that hangs in a system call after 20 seconds."""

    def interrupt(number, frame):
        raise TimeoutError("still waiting after 20 seconds")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("name", ["meta.json", "tiny_train_000000.npy", "tiny_val_000000.bin"])
def test_a_named_pipe_in_place_of_a_file_does_not_hang(random_shards, name, time_limit):
    (random_shards / name).unlink(missing_ok=True)
    os.mkfifo(random_shards / name)
    if name.endswith(".bin"):
        (random_shards / "tiny_val_000000.npy").unlink()
        change_meta(random_shards, shards=lambda shards: [*shards[:2], {**shards[2], "file": name}])
    assert_refused(random_shards, random_shards / name, "not a regular file")


# ---------------------------------------------------------------------------------- wrong tokens
@pytest.mark.parametrize("split, place", [("train", 0), ("train", 332), ("val", 50), ("val", 98)])
def test_a_token_id_beyond_the_vocabulary_is_refused(random_shards, split, place):
    path = sorted(random_shards.glob(f"*_{split}_*"))[-1]
    tokens = np.load(path)
    tokens[place] = 257
    write_npy(path, tokens)
    assert_refused(random_shards, path, "token id 257", "257 tokens", "regenerate it")


def test_the_last_token_id_of_the_vocabulary_is_accepted(random_shards):
    path = random_shards / "tiny_train_000001.npy"
    write_npy(path, np.full(333, 256))
    assert 256 in np.array(rows(open_dataset(random_shards), range(60)))


def test_a_token_id_beyond_the_vocabulary_of_gpt2_is_refused_without_meta_json(random_shards):
    (random_shards / "meta.json").unlink()
    write_npy(random_shards / "tiny_train_000001.npy", np.append(np.arange(332), 50257))
    assert_refused(random_shards, random_shards / "tiny_train_000001.npy", "50257")


def test_a_token_id_beyond_the_vocabulary_is_found_in_any_of_many_shards(tmp_path):
    shards = [np.arange(40) for _ in range(130)]
    shards[77] = np.append(np.arange(39), 300)
    write_data_set(tmp_path, shards, [np.arange(40)])
    assert_refused(tmp_path, tmp_path / "tiny_train_000077.npy", "300")


def test_all_shards_are_probed_with_at_most_64m_tokens_and_at_least_1024_each(tmp_path, monkeypatch):
    """Start-up reads little, whatever the number of shards."""
    lengths = []

    def check_token_ids(tokens, vocab_size, path):
        lengths.append(len(tokens))

    monkeypatch.setattr(train_gpt2, "check_token_ids", check_token_ids)
    for i in range(3):
        write_sparse_bin(tmp_path / f"x_{'train' if i else 'val'}_{i:06d}.bin", 2**25)
    train_gpt2.read_data_set(str(tmp_path))
    assert lengths == [2**26 // 3] * 3


# --------------------------------------------------------------------- files that change during a run
def test_a_token_beyond_the_vocabulary_behind_the_probe_is_found_when_it_is_read(random_shards, monkeypatch):
    dataset = open_dataset(random_shards, shuffle=False)
    path = random_shards / "tiny_train_000001.npy"
    tokens = np.load(path)
    tokens[320] = 999  # the last target of the last of 20 windows
    write_npy(path, tokens)
    rows(dataset, range(dataset.num_windows - 1))
    with pytest.raises(train_gpt2.DataError, match="tiny_train_000001.npy contains token id 999.*--resume"):
        dataset.batch([dataset.num_windows - 1])


def set_checksums(directory):
    """Add the SHA-256 of each shard to meta.json."""

    def with_checksums(shards):
        return [{**shard, "sha256": train_gpt2.sha256_of(directory / shard["file"])} for shard in shards]

    change_meta(directory, shards=with_checksums)


def test_a_shard_that_does_not_match_its_checksum_is_found_at_its_first_use(random_shards):
    set_checksums(random_shards)
    dataset = open_dataset(random_shards, shuffle=False)
    path = random_shards / "tiny_train_000001.npy"
    tokens = np.load(path)
    tokens[5] += 1
    write_npy(path, tokens % 256)
    rows(dataset, range(699 // 16))
    with pytest.raises(train_gpt2.DataError, match="tiny_train_000001.npy does not match its SHA-256.*--resume"):
        dataset.batch([699 // 16])


def test_the_checksum_of_a_shard_is_computed_once(tmp_path, monkeypatch):
    """Also if the shard is closed and opened again, as happens with many shards."""
    write_data_set(tmp_path, unique_shards(*[33] * 20), [range(50)], GPT2_VOCAB)
    set_checksums(tmp_path)
    paths = []
    sha256_of = train_gpt2.sha256_of

    def counted(path):
        paths.append(path)
        return sha256_of(path)

    monkeypatch.setattr(train_gpt2, "sha256_of", counted)
    dataset = open_dataset(tmp_path)
    assert paths == []
    for epoch in range(3):
        rows(dataset, range(epoch * 40, (epoch + 1) * 40))
    assert len(paths) == len(set(paths)) == 20


@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
def test_a_shard_that_changed_is_found_when_it_is_opened_again(random_shards, change):
    dataset = open_dataset(random_shards, shuffle=False)
    rows(dataset, range(dataset.num_windows))
    dataset.open_shards.clear()
    path = random_shards / "tiny_train_000000.npy"
    if change == "gone":
        path.unlink()
    else:
        write_npy(path, np.zeros(600 if change == "shorter" else 800))
    with pytest.raises(train_gpt2.DataError, match="tiny_train_000000.npy.*regenerate it.*--resume"):
        dataset.batch([0])


@pytest.mark.parametrize("change", ["truncated", "gone"])
def test_an_open_shard_that_was_truncated_is_found_before_it_is_read(random_shards, change):
    dataset = open_dataset(random_shards, shuffle=False)
    rows(dataset, range(dataset.num_windows))
    dataset.check_open_shards()
    path = random_shards / "tiny_train_000000.npy"
    if change == "gone":
        path.unlink()
    else:
        os.truncate(path, 1000)
    with pytest.raises(train_gpt2.DataError, match="tiny_train_000000.npy is missing or truncated.*--resume"):
        dataset.check_open_shards()


@pytest.mark.parametrize("damage", ["wrong token", "truncated validation shard"])
def test_damage_during_a_run_ends_it_with_one_line(random_shards, tmp_path, damage):
    """The shards change after the check at the start: at once, or between two validations."""
    module = load("train_gpt2")

    class DamagedDataset(module.TokenDataset):
        def __init__(self, data_dir, split, *rest, **options):
            super().__init__(data_dir, split, *rest, **options)
            self.is_damaged = split == "train"
            if damage == "wrong token" and split == "train":
                for path in self.paths:
                    write_npy(path, np.full(len(np.load(path)), 999))

        def batch(self, indices):
            windows = super().batch(indices)
            if damage.startswith("truncated") and not self.is_damaged:
                os.truncate(self.paths[0], 100)
                self.is_damaged = True
            return windows

    module.TokenDataset = DamagedDataset
    done = call(module, *TINY, "--data_dir", random_shards, "--log_dir", tmp_path / "log")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    needles = ("tiny_train_", "999") if damage == "wrong token" else ("tiny_val_000000.npy", "truncated")
    for needle in (*needles, "error: ", "regenerate it", "--resume"):
        assert needle in done.stderr
