"""What only a GPU can show: training runs in all dtypes, compiled code, several ranks, nccl, waiting.

    python -m pytest -q -m gpu                                   # these tests, and comparisons of other files
    TEST_DEVICE=cpu python -m pytest -q tests/test_gpu.py        # tries the tests themselves, without a GPU

Without a GPU, the tests are skipped.
"""

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from conftest import losses, succeed, write_data_set

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
TOLERANCE = 0.01  # of a loss: the order of sums varies on a GPU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]

# 0.8M parameters, 40 steps with 4 micro-steps each
FLAGS = {
    "preset": "shakespeare",
    "optimizer": "adamw",
    "schedule": "cosine",
    "learning_rate": 1e-3,
    "dtype": "bfloat16",
    "micro_batch_size": 4,
    "max_steps": 40,
    "warmup_steps": 10,
    "checkpoint_interval": 20,
    "eval_interval": 40,
    "val_tokens": 4096,
    "max_new_tokens": 4,
    "device": DEVICE,
}
MUON = {"optimizer": "muon"}


def flags(data_dir, log_dir, **changes):
    """Return the flags of a run. True and False are those of a switch, and None leaves a flag out."""
    line = []
    for name, value in {**FLAGS, "data_dir": data_dir, "log_dir": log_dir, **changes}.items():
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            line += [f"--{name}", str(value)]
    return line


@pytest.fixture(scope="module")
def train(tmp_path_factory, byte_shards):
    """A function that trains and returns the directory of the run. The same run is made once only."""
    folder = tmp_path_factory.mktemp("gpu")
    runs = {}

    def train(**changes):
        key = str(changes)
        if key not in runs:
            runs[key] = folder / str(len(runs))
            torch.compiler.reset()
            succeed("train_gpt2", *flags(byte_shards, runs[key], **changes))
        return runs[key]

    train.data_dir = byte_shards
    return train


def assert_same_losses(log_dir, expected, tolerance=TOLERANCE, first=0):
    """Compare the losses of two runs from step first on."""
    for kind in ("train", "val"):
        reference = {step: loss for step, loss in losses(expected, kind).items() if step >= first}
        actual = {step: loss for step, loss in losses(log_dir, kind).items() if step >= first}
        assert actual == pytest.approx(reference, abs=tolerance)


# -------------------------------------------------------------------------------- training runs
def test_compiled_code_computes_the_same(train):
    assert_same_losses(train(compile=True), train(compile=False))


@pytest.mark.parametrize("dtype, first", [("float32", 0), ("float16", 30)])
def test_dtypes_agree(train, dtype, first):
    """float16 is behind at first: the scaler skips some steps until it has found its factor."""
    assert_same_losses(train(dtype=dtype), train(), 0.1 if first else 0.02, first)


@pytest.mark.parametrize("changes", [{}, {"dtype": "float16"}], ids=str)
def test_a_resumed_run_ends_as_the_uninterrupted_one(train, tmp_path, changes):
    """Also in another dtype, as on an older GPU."""
    shutil.copytree(train(), tmp_path / "log")
    shutil.rmtree(tmp_path / "log" / "step_000040")
    succeed("train_gpt2", *flags(train.data_dir, tmp_path / "log", **changes), "--resume")
    assert_same_losses(tmp_path / "log", train(), 0.1 if changes else TOLERANCE)


def test_muon_in_bfloat16_agrees_with_float32(train):
    assert_same_losses(train(**MUON), train(**MUON, dtype="float32"), 0.03)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU does not wait")
def test_a_step_waits_for_the_gpu_once(train, tmp_path):
    """PyTorch warns of each operation that waits. 20 more steps may add 20 warnings."""
    counts = []
    for steps in (10, 30):
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            changes = {"max_steps": steps, "checkpoint_interval": 100, "compile": False}
            succeed("train_gpt2", *flags(train.data_dir, tmp_path / str(steps), **changes))
        torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
    assert counts[1] - counts[0] <= 20


def test_the_chosen_micro_batch_is_as_large_as_the_step(train, tmp_path):
    """16 sequences of this small model fit into any GPU."""
    changes = {"micro_batch_size": None, "max_steps": 1, "warmup_steps": 0}
    done = succeed("train_gpt2", *flags(train.data_dir, tmp_path / "log", **changes))
    assert " x 16 sequences" in done.stdout


# ------------------------------------------------------------------------------- several ranks
def run_rank(rank, world_size, backend, folder, changes):
    """Train as one of several ranks that share a GPU. Writes the number of compiled graphs to folder.

    nccl refuses two ranks on one GPU. So its group has this rank only, and the other one is
    pretended: with equal windows, its losses would be the same.
    """
    folder = Path(folder)
    graphs = []
    compile_graph = torch._dynamo.lookup_backend("inductor" if DEVICE == "cuda" else "aot_eager")
    compile_model = torch.compile
    init, all_reduce = torch.distributed.init_process_group, torch.distributed.all_reduce
    is_pretended = backend == "nccl"
    size = 1 if is_pretended else world_size

    def init_group(_, **options):
        store = torch.distributed.FileStore(str(folder / f"store_{rank if is_pretended else ''}"), size)
        name = backend if DEVICE == "cuda" else "gloo"
        init(name, store=store, rank=0 if is_pretended else rank, world_size=size, timeout=options["timeout"])

    def add_the_other_rank(tensor, **options):
        all_reduce(tensor, **options)
        return tensor.mul_(world_size)

    def count_graph(graph, inputs):
        graphs.append(torch.is_grad_enabled())  # a validation compiles another one
        return compile_graph(graph, inputs)

    def compile_and_count(model):
        is_model = isinstance(model, torch.nn.Module)  # and not the trainer's probe
        return compile_model(model, backend=count_graph if is_model else "eager")

    torch.distributed.init_process_group = init_group
    if is_pretended:
        torch.distributed.all_reduce = add_the_other_rank
    torch.compile = compile_and_count
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    succeed("train_gpt2", *changes)
    (folder / f"graphs_{rank}").write_text(str(sum(graphs)))


def run_ranks(world_size, backend, folder, line):
    """Train on ranks in processes of their own. nccl runs rank 0 only."""
    count = 1 if backend == "nccl" else world_size
    arguments = (world_size, backend, str(folder), line)
    torch.multiprocessing.spawn(run_rank, arguments, nprocs=count)


@pytest.mark.parametrize("changes", [{}, MUON], ids=["adamw", "muon"])
def test_two_ranks_on_one_gpu_train_as_one(train, tmp_path, changes):
    """With gloo, which also has GPU tensors."""
    run_ranks(2, "gloo", tmp_path, flags(train.data_dir, tmp_path / "log", compile=False, **changes))
    assert_same_losses(tmp_path / "log", train(compile=False, **changes), 0.02)


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_nccl_trains_as_one_rank_and_splits_the_graph_only_if_each_backward_pass_communicates(
    tmp_path, grad_accum_steps
):
    """With 28M parameters, DDP has several buckets. All windows are equal."""
    tokens = np.tile(np.arange(65, 65 + 64), 100)
    data_dir = write_data_set(tmp_path / "data", [tokens], [tokens])
    changes = {"n_layer": 4, "n_head": 12, "n_embd": 768, "max_steps": 3, "eval_interval": 3}
    changes["total_batch_size"] = grad_accum_steps * 2 * FLAGS["micro_batch_size"] * 64
    run_ranks(2, "nccl", tmp_path, flags(data_dir, tmp_path / "log", compile=True, **changes))
    succeed("train_gpt2", *flags(data_dir, tmp_path / "one", compile=False, **changes))
    assert_same_losses(tmp_path / "log", tmp_path / "one", 0.02)
    num_graphs = int((tmp_path / "graphs_0").read_text())
    if grad_accum_steps > 1:
        assert num_graphs == 1
    else:
        assert num_graphs > 2
