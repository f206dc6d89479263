"""train_gpt2.py's data: shards, windows and their order."""

import contextlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import ROOT, TINY, call, load, losses, read_windows, write_bin, write_data_set, write_npy

train_gpt2 = load("train_gpt2")
VOCAB = 50257  # of GPT-2: every token of a small data set can be another, so that its value tells its place


def unique_shards(*sizes):
    """Shards of the given sizes in which no token occurs twice, over all of them."""
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def open_windows(directory, block_size=16, seed=1, shuffle=True, split="train"):
    return train_gpt2.Windows(str(directory), split, train_gpt2.read_meta(str(directory)), block_size, seed, shuffle)


def rows(windows, indices):
    """The windows with the given indices as rows of block_size + 1 tokens."""
    x, y = windows.batch(indices)
    assert x.shape == y.shape == (len(indices), windows.block_size)
    assert x[:, 1:].tolist() == y[:, :-1].tolist()
    return [[*a, b] for a, b in zip(x.tolist(), y[:, -1].tolist(), strict=True)]


def brute_force(directory, block_size, split="train"):
    """All windows of all shards of a split, in file order."""
    return [row for path in sorted(directory.glob(f"*_{split}_*.npy")) for row in read_windows(path, block_size)]


# -------------------------------------------------------------------------------------- tiling
@pytest.mark.parametrize("block_size", [1, 7, 16])
@pytest.mark.parametrize("sizes", [(200,), (17, 16, 18, 1, 100), (33, 2, 250), (1, 1, 40)])
def test_an_epoch_has_each_window_once(tmp_path, sizes, block_size):
    directory = write_data_set(tmp_path, unique_shards(*sizes), [range(50)], VOCAB)
    expected = brute_force(directory, block_size)
    ordered, shuffled = (open_windows(directory, block_size, shuffle=shuffle) for shuffle in (False, True))
    n = len(expected)
    assert ordered.total == shuffled.total == n == sum((size - 1) // block_size for size in sizes)
    assert rows(ordered, range(n)) == expected
    for epoch in range(3):
        assert sorted(rows(shuffled, range(epoch * n, (epoch + 1) * n))) == expected
    assert rows(ordered, range(n, 2 * n)) == expected


def test_every_token_but_the_first_of_a_shard_is_a_target_once(tmp_path):
    directory = write_data_set(tmp_path, unique_shards(33, 65), [range(50)], VOCAB)
    windows = open_windows(directory)
    targets = [token for row in rows(windows, range(windows.total)) for token in row[1:]]
    assert sorted(targets) == [*range(1, 33), *range(34, 98)]


def test_splits_do_not_mix(tmp_path):
    directory = write_data_set(tmp_path, [range(100)], [range(300, 400)], VOCAB)
    assert max(map(max, rows(open_windows(directory), range(6)))) < 100
    assert min(map(min, rows(open_windows(directory, split="val"), range(6)))) >= 300


def simulate_rank(monkeypatch, directory, log_dir, rank, world_size, micro_batch_size):
    """Run four steps of main() as one rank of many; returns the micro-batches it trained on, each a list of rows.

    The other ranks are pretended: collectives do nothing, so the weights mean nothing, but the data is what
    this rank would read.
    """
    module, seen = load("train_gpt2"), []

    class Recorder(module.Windows):
        def __init__(self, data_dir, split, *rest):
            super().__init__(data_dir, split, *rest)
            self.split = split

        def batch(self, indices):
            x, y = super().batch(indices)
            if self.split == "train":
                seen.append([[*a, b] for a, b in zip(x.tolist(), y[:, -1].tolist(), strict=True)])
            return x, y

    class Alone:
        def __init__(self, model, **_):
            self.model, self.train, self.no_sync = model, model.train, contextlib.nullcontext

        def __call__(self, *args):
            return self.model(*args)

    module.Windows, module.DDP = Recorder, Alone
    module.matmul_peak, module.sample = lambda *_: 1.0, lambda *_: []
    for name in ("init_process_group", "all_reduce", "broadcast_object_list", "destroy_process_group"):
        monkeypatch.setattr(module.dist, name, lambda *_, **__: None)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    flags = [*TINY, "--total_batch_size", 12 * 16, "--micro_batch_size", micro_batch_size, "--max_steps", 4]
    done = call(module, *flags, "--data_dir", directory, "--log_dir", log_dir)
    assert done.returncode == 0, done.stderr
    return seen[:-1]  # the last is loaded ahead, for a step that does not come


def test_windows_of_a_step_depend_on_neither_ranks_nor_micro_batches(tmp_path, monkeypatch):
    """Ranks share a step's 12 windows out among themselves; two steps are an epoch of the awkward shards."""
    sizes = (16 * 9 + 6, 16 + 1, 10, 16 * 14 + 16)  # 9 + 1 + 0 + 14 = 24 windows
    directory = write_data_set(tmp_path / "data", unique_shards(*sizes), [range(50)], VOCAB)
    expected = brute_force(directory, 16)
    layouts = []
    for world_size, micro_batch_size in ((1, 12), (1, 1), (2, 3), (3, 4)):
        steps = [[] for _ in range(4)]
        for rank in range(world_size):
            log_dir = tmp_path / f"{world_size}_{micro_batch_size}_{rank}"
            seen = simulate_rank(monkeypatch, directory, log_dir, rank, world_size, micro_batch_size)
            assert len(seen) == 4 * 12 / (world_size * micro_batch_size)
            for i, micro_batch in enumerate(seen):
                assert len(micro_batch) == micro_batch_size
                steps[4 * i // len(seen)] += micro_batch
        assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == expected
        layouts.append([sorted(step) for step in steps])
    assert layouts[0] == layouts[1] == layouts[2] == layouts[3]


# --------------------------------------------------------------------------------------- order
def order(directory, epoch=0, **options):
    windows = open_windows(directory, **options)
    return rows(windows, range(epoch * windows.total, (epoch + 1) * windows.total))


def test_order_differs_between_epochs_and_seeds(tmp_path):
    directory = write_data_set(tmp_path, unique_shards(200, 150, 90), [range(50)], VOCAB)
    orders = [order(directory, epoch, seed=seed) for epoch in (0, 1, 2) for seed in (1, 2)]
    assert len({str(found) for found in orders}) == 6
    assert order(directory, 2, seed=2) == orders[-1]


def test_shards_are_visited_one_after_another_in_random_order(tmp_path):
    """Whole shards, so that a run reads few files at a time, but which comes first changes with the epoch."""
    shards = unique_shards(50, 50, 50, 50, 50, 50)
    directory = write_data_set(tmp_path, shards, [range(50)], VOCAB)
    visits = []
    for epoch in range(4):
        found = [row[0] // 50 for row in order(directory, epoch)]
        visits.append(found[::3])
        assert found == [shard for shard in found[::3] for _ in range(3)]
    assert len({str(visit) for visit in visits}) > 1


def test_order_is_the_same_in_another_process(tmp_path):
    directory = write_data_set(tmp_path, unique_shards(200, 150, 90), [range(50)], VOCAB)
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True
import train_gpt2
windows = train_gpt2.Windows({str(directory)!r}, "train", train_gpt2.read_meta({str(directory)!r}), 16, 7, True)
print([windows.locate(i) for i in range(200)])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    windows = open_windows(directory, seed=7)
    assert done.stdout.strip() == str([windows.locate(i) for i in range(200)]), done.stderr


def test_a_window_depends_on_its_index_alone(tmp_path):
    """Looked up at random, far ahead or backwards, an index gives what it gives in order."""
    directory = write_data_set(tmp_path, unique_shards(200, 1, 150, 90), [range(50)], VOCAB)
    windows = open_windows(directory)
    in_order = [windows.locate(i) for i in range(150)]
    for i in np.random.default_rng(0).permutation(150).tolist():
        assert open_windows(directory).locate(i) == in_order[i] == windows.locate(i)


def test_memory_does_not_grow_with_the_tokens(tmp_path):
    """A data set of a billion tokens (40 files of holes) costs neither memory for them nor for its windows."""
    (tmp_path / "data").mkdir()
    for split, n in (("train", 40), ("val", 1)):
        for i in range(n):
            path = tmp_path / "data" / f"big_{split}_{i:06d}.bin"
            write_bin(path, [])
            with open(path, "r+b") as file:
                file.seek(8)
                file.write(np.array([25_000_000], "<i4").tobytes())
                file.truncate(1024 + 2 * 25_000_000)
    tracemalloc.start()
    windows = open_windows(tmp_path / "data", block_size=1024)
    places = {windows.locate(i) for i in (0, windows.total // 2, windows.total - 1, 10**9, 10**12)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert windows.total == 40 * ((25_000_000 - 1) // 1024)
    assert len(places) == 5
    assert peak < 2e6  # one int64 a window would be 7.8 MB


# ------------------------------------------------------------------------------- foreign shards
def test_foreign_directories_train_as_our_own_shards_do(tmp_path):
    """build-nanogpt's .npy and llm.c's .bin, both without meta.json, give the losses of the same tokens."""
    rng = np.random.default_rng(0)
    train = [np.append(rng.integers(50257, size=n), 50256) for n in (300, 420)]
    val = [rng.integers(50257, size=200)]
    write_data_set(tmp_path / "ours", train, val, 50257)
    for name, write, prefix in (("nanogpt", write_npy, "edufineweb"), ("llmc", write_bin, "fineweb")):
        (tmp_path / name).mkdir()
        for split, shards in (("val", val), ("train", train)):
            for i, tokens in enumerate(shards, start=split == "train"):
                suffix = "npy" if write is write_npy else "bin"
                write(tmp_path / name / f"{prefix}_{split}_{i:06d}.{suffix}", tokens)
    logs = {}
    for name in ("ours", "nanogpt", "llmc"):
        flags = [*TINY, "--max_steps", 3, "--data_dir", tmp_path / name, "--log_dir", tmp_path / f"log_{name}"]
        done = call("train_gpt2", *flags)
        assert done.returncode == 0, done.stderr
        logs[name] = losses(tmp_path / f"log_{name}"), losses(tmp_path / f"log_{name}", "val")
    assert len(logs["ours"][0]) == 3
    assert logs["ours"] == logs["nanogpt"] == logs["llmc"]


def test_a_shard_is_mapped_not_read(tmp_path):
    write_npy(tmp_path / "a.npy", range(100))
    write_bin(tmp_path / "a.bin", range(100))
    for path in (tmp_path / "a.npy", tmp_path / "a.bin"):
        tokens = train_gpt2.open_shard(str(path))
        assert isinstance(tokens, np.memmap) and not tokens.flags.writeable
        assert tokens.tolist() == list(range(100))
