"""Mistakes of a user of train_gpt2.py: each ends with status 2 and one line that says what is wrong and what to do."""

import json
import shutil

import pytest
import torch
from conftest import (
    NO_SHAPE,
    ROOT,
    TINY,
    assert_user_error,
    call,
    load,
    random_gpt2,
    run,
    tiny_flags,
    torchrun,
    write_npy,
)

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def assert_refused(done, *needles):
    """Check the error of a run, and that it was found before any training."""
    assert_user_error(done, *needles)
    assert "loss" not in done.stdout, "the mistake was found after slow work"


def files_in(directory):
    """Return {path: content} of all files below a directory."""
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------- in processes of their own
def test_missing_data_is_reported_with_two_commands_that_create_some(tmp_path):
    done = run("train_gpt2", "--device", "cpu", cwd=tmp_path)
    assert_refused(done, "edu_fineweb10B", "prepare_shakespeare.py", "fineweb.py")
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_under_torchrun_is_reported_once(tmp_path):
    done = torchrun(2, "train_gpt2", "--data_dir", "nowhere", "--device", "cpu", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: --data_dir nowhere") == 1
    assert f'File "{ROOT}/train_gpt2.py' not in done.stderr


# --------------------------------------------------------------------------------------- flags
WRONG_FLAGS = [
    ("--preset", "gpt5"),
    ("--dtype", "int8"),
    ("--device", "toaster"),
    ("--optimizer", "sgd"),
    ("--schedule", "constant"),
    ("--hellaswag_interval", -1),
    ("--dropout", 1.0),
    ("--dropout", -0.1),
    ("--max_steps", 0),
    ("--max_steps", 1.5),
    ("--max_steps", 2**62),
    ("--val_tokens", -5),
    ("--keep_checkpoints", -1),
    ("--learning_rate", "nan"),
    ("--learning_rate", 0),
    ("--weight_decay", -0.1),
    ("--grad_clip", 0),
    ("--warmup_steps", -1),
    ("--seed", -1),
    ("--max_hours", 0),
    ("--micro_batch_size", 0),
    ("--micro_batch_size", "many"),
    ("--n_embd", 30),
    ("--no_such_flag", 1),
]


@pytest.mark.parametrize("flag, value", WRONG_FLAGS)
def test_a_wrong_value_of_a_flag_is_refused(flag, value, byte_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("train_gpt2", "--data_dir", byte_shards, "--n_head", 4, flag, value)
    assert_refused(done, flag, value)
    assert list(tmp_path.iterdir()) == []


def test_an_n_embd_that_n_head_does_not_divide_is_refused_with_both_values(byte_shards):
    flags = tiny_flags(n_embd=30, n_head=4)
    assert_refused(call("train_gpt2", *flags, "--data_dir", byte_shards), "--n_embd 30", "--n_head 4", "multiple of 4")


def test_a_model_of_a_trillion_parameters_is_refused(byte_shards):
    flags = tiny_flags(n_embd=100_000, n_head=4, n_layer=12)
    assert_refused(call("train_gpt2", *flags, "--data_dir", byte_shards), "--n_embd 100000", "smaller model")


def test_zero_is_accepted_where_it_has_a_meaning(monkeypatch):
    module = load("train_gpt2")
    flags = ["seed", "dropout", "warmup_steps", "weight_decay", "keep_checkpoints", "hellaswag_interval"]
    arguments = []
    for name in flags:
        arguments += [f"--{name}", "0"]
    monkeypatch.setattr("sys.argv", ["train_gpt2.py", *arguments])
    args = module.parse_args()
    assert [getattr(args, name) for name in flags] == [0] * len(flags)


def test_flags_override_the_preset_and_presets_set_the_others(monkeypatch):
    module = load("train_gpt2")
    monkeypatch.setattr("sys.argv", ["train_gpt2.py", "--preset", "gpt2-xl", "--n_layer", "3"])
    args = module.parse_args()
    assert (args.n_layer, args.n_head, args.n_embd, args.learning_rate) == (3, 25, 1600, 2e-4)
    assert (args.total_batch_size, args.max_steps, args.warmup_steps) == (524288, 19073, 715)


@pytest.mark.parametrize("total, micro, processes", [(100, 8, 1), (128, 3, 1), (128, 8, 3)])
def test_a_batch_that_cannot_be_divided_is_refused(total, micro, processes, byte_shards, tmp_path, monkeypatch):
    """By the block size, by the micro-batch and by the processes, in this order."""
    module = load("train_gpt2")
    module.init_distributed = lambda device_name: (0, processes, torch.device("cpu"))
    flags = tiny_flags(total_batch_size=total, micro_batch_size=micro)
    done = call(module, *flags, "--data_dir", byte_shards, "--log_dir", tmp_path / "log")
    divisor = micro * 16 * processes
    assert_refused(
        done,
        f"--total_batch_size {total} is not divisible by {divisor}",
        f"--micro_batch_size {micro}",
        "--block_size 16",
        f"{processes} process",
    )
    assert not (tmp_path / "log").exists()


# -------------------------------------------------------------------------------------- devices
@needs_no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "meta", "toaster", ""])
def test_a_device_that_is_not_available_is_refused(device, byte_shards):
    done = call("train_gpt2", *tiny_flags(device=device), "--data_dir", byte_shards)
    assert_refused(done, f"--device {device}", "--device cpu")


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_variables_of_torchrun_without_torchrun_are_refused(missing, byte_shards, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv(missing)
    done = call("train_gpt2", *TINY, "--data_dir", byte_shards)
    assert_refused(done, "WORLD_SIZE is 2", missing, "torchrun", "unset WORLD_SIZE")


def test_a_device_that_processes_cannot_share_is_refused(byte_shards, monkeypatch):
    """As torchrun on a Mac, whose device is mps."""
    module = load("train_gpt2")
    module.pick_device = lambda name: torch.device("mps")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = call(module, *tiny_flags(device="auto"), "--data_dir", byte_shards)
    assert_refused(done, "--device mps", "2 processes", "--device cpu")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused(device, byte_shards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # the first rank of the second machine reports it: the first machine may have enough GPUs
    for name, value in (("RANK", 4), ("LOCAL_RANK", 0), ("WORLD_SIZE", 8), ("MASTER_ADDR", 0), ("MASTER_PORT", 0)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    done = call("train_gpt2", *tiny_flags(device=device), "--data_dir", byte_shards)
    assert_refused(done, "2 GPUs", "--nproc_per_node", "--device cpu")


# ---------------------------------------------------------------------------------- --init_from
def init_from(model, data_dir, tmp_path, *flags):
    """Start a run from a model that is expected to be refused. Nothing of a run may be left behind."""
    log_dir = tmp_path / "log"
    done = call("train_gpt2", *NO_SHAPE, "--init_from", model, "--data_dir", data_dir, "--log_dir", log_dir, *flags)
    if log_dir.exists():
        assert [path.name for path in log_dir.iterdir()] == ["lock"]
    return done


def save_gpt2(directory, **changes):
    """Save a random GPT2LMHeadModel of bytes with 16 positions, unless changes say something else."""
    shape = {"n_positions": 16, "n_layer": 1, "n_head": 1, "n_embd": 8, "n_inner": None}
    return random_gpt2(directory, **{**shape, **changes})


def test_a_directory_without_a_model_to_start_from_is_refused(byte_shards, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(init_from(tmp_path / "empty", byte_shards, tmp_path), tmp_path / "empty", "config.json")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    assert_refused(init_from(tmp_path / "other", byte_shards, tmp_path), tmp_path / "other", "llama")


def test_a_model_to_start_from_whose_shapes_disagree_is_refused(byte_shards, tmp_path):
    save_gpt2(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "n_embd": 16}))
    done = init_from(tmp_path / "model", byte_shards, tmp_path)
    assert_refused(done, tmp_path / "model", "wte.weight", "257", "16")


def test_a_model_to_start_from_with_too_few_positions_is_refused(byte_shards, tmp_path):
    save_gpt2(tmp_path / "model", n_positions=15)
    assert_refused(init_from(tmp_path / "model", byte_shards, tmp_path), "15 positions", "--block_size 16")


def test_a_model_to_start_from_with_another_tokenizer_is_refused(byte_shards, tmp_path):
    save_gpt2(tmp_path / "model", vocab_size=50257)
    done = init_from(tmp_path / "model", byte_shards, tmp_path)
    assert_refused(done, tmp_path / "model", byte_shards, "gpt2", "bytes", "--tokenizer gpt2")
    save_gpt2(tmp_path / "other", vocab_size=1000)
    assert_refused(init_from(tmp_path / "other", byte_shards, tmp_path), "1000", "50257", "257")


@pytest.mark.parametrize("flag", ["--n_layer", "--n_head", "--n_embd"])
def test_a_model_size_beside_a_model_to_start_from_is_refused(flag, byte_shards, tmp_path):
    save_gpt2(tmp_path / "model")
    assert_refused(init_from(tmp_path / "model", byte_shards, tmp_path, flag, 2), flag, "--init_from")


def test_a_name_to_start_from_without_a_network_is_refused(byte_shards, tmp_path):
    assert_refused(init_from("gpt2", byte_shards, tmp_path), "gpt2", "Hugging Face Hub", "local directory")


def test_a_file_or_a_mistyped_path_to_start_from_is_refused_without_the_hub(byte_shards, tmp_path):
    save_gpt2(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    assert_refused(init_from(path, byte_shards, tmp_path), path, "is a file")
    done = init_from(tmp_path / "modle", byte_shards, tmp_path)
    assert_refused(done, tmp_path / "modle", "does not exist")
    assert "Hub" not in done.stderr


def test_after_a_refused_model_the_corrected_command_works(byte_shards, tmp_path):
    save_gpt2(tmp_path / "model")
    assert_refused(init_from(tmp_path / "modle", byte_shards, tmp_path), "modle")
    flags = [*NO_SHAPE, "--max_steps", 1, "--init_from", tmp_path / "model", "--data_dir", byte_shards]
    done = call("train_gpt2", *flags, "--log_dir", tmp_path / "log")
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------- --log_dir
@pytest.mark.parametrize("kind", ["log.txt", "checkpoint"])
def test_a_log_dir_that_contains_a_run_is_refused_and_left_as_it_is(kind, byte_shards, tmp_path):
    log_dir = tmp_path / "log"
    log_dir.mkdir()
    if kind == "log.txt":
        (log_dir / "log.txt").write_text("0 train 5.5\n")
    else:
        (log_dir / "step_000005").mkdir()
        (log_dir / "step_000005" / "model.safetensors").write_text("weights")
    before = files_in(log_dir)
    done = call("train_gpt2", *TINY, "--data_dir", byte_shards, "--log_dir", log_dir)
    assert_refused(done, "--log_dir", log_dir, "--resume")
    after = files_in(log_dir)
    after.pop(log_dir / "lock", None)
    assert after == before


def test_a_log_dir_that_is_a_file_is_refused(byte_shards, tmp_path):
    (tmp_path / "log").write_text("mine")
    done = call("train_gpt2", *TINY, "--data_dir", byte_shards, "--log_dir", tmp_path / "log")
    assert_refused(done, "--log_dir", tmp_path / "log")
    assert (tmp_path / "log").read_text() == "mine"


# --------------------------------------------------------------------------------------- --resume
@pytest.fixture(scope="module")
def finished_run(byte_shards, tmp_path_factory):
    """The log directory of a run of one step."""
    log_dir = tmp_path_factory.mktemp("finished") / "log"
    done = call("train_gpt2", *tiny_flags(max_steps=1), "--data_dir", byte_shards, "--log_dir", log_dir)
    assert done.returncode == 0, done.stderr
    return log_dir


CHANGED_FLAGS = [
    ("max_steps", 1, 9),
    ("n_layer", 2, 3),
    ("seed", 1337, 7),
    ("block_size", 16, 8),
    ("dropout", 0.0, 0.1),
    ("total_batch_size", 128, 256),
    ("optimizer", "adamw", "muon"),
    ("learning_rate", 0.001, 0.002),
    ("schedule", "cosine", "linear"),
    ("warmup_steps", 2, 3),
    ("weight_decay", 0.1, 0.2),
    ("grad_clip", 1.0, 2.0),
]


@pytest.mark.parametrize("name, saved, current", CHANGED_FLAGS)
def test_resuming_with_another_value_is_refused_with_both_values(finished_run, byte_shards, name, saved, current):
    flags = tiny_flags(**{"max_steps": 1, name: current})
    done = call("train_gpt2", *flags, "--resume", "--data_dir", byte_shards, "--log_dir", finished_run)
    assert_refused(done, f"--{name} is {current}", f"has {saved}", finished_run / "step_000001", "use the same value")


def test_resuming_without_shuffling_is_refused(finished_run, byte_shards):
    flags = [*tiny_flags(max_steps=1), "--resume", "--no-shuffle", "--data_dir", byte_shards]
    done = call("train_gpt2", *flags, "--log_dir", finished_run)
    assert_refused(done, "--shuffle is False", "has True")


def test_refusing_another_max_steps_names_the_ways_to_train_longer(finished_run, byte_shards):
    flags = [*tiny_flags(max_steps=9), "--resume", "--data_dir", byte_shards, "--log_dir", finished_run]
    assert_refused(call("train_gpt2", *flags), "to train longer", "--schedule linear", "--init_from")


@pytest.mark.parametrize("change", ["tokenizer", "tokens"])
def test_resuming_on_other_data_is_refused(byte_shards, finished_run, tmp_path, change):
    """The data directory has the same name, but other tokens or another tokenizer."""
    data_dir = tmp_path / "data"
    shutil.copytree(byte_shards, data_dir)
    meta = json.loads((data_dir / "meta.json").read_text())
    if change == "tokenizer":
        meta["vocab_size"] = 50257
        meta["tokenizer"] = "gpt2"
    else:
        path = data_dir / meta["shards"][0]["file"]
        write_npy(path, [65] * meta["shards"][0]["tokens"])
        meta["shards"][0]["sha256"] = ""
    (data_dir / "meta.json").write_text(json.dumps(meta))
    shutil.copytree(finished_run, tmp_path / "log")
    flags = [*tiny_flags(max_steps=1), "--resume", "--data_dir", data_dir, "--log_dir", tmp_path / "log"]
    current = "gpt2-" if change == "tokenizer" else "bytes-"
    assert_refused(call("train_gpt2", *flags), "the data in --data_dir", f"is {current}", "has bytes-")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "trainer.pt"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_resuming_from_the_only_checkpoint_is_refused_if_it_is_damaged(
    finished_run, byte_shards, tmp_path, file, damage
):
    shutil.copytree(finished_run, tmp_path / "log")
    path = tmp_path / "log" / "step_000001" / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    else:
        path.write_bytes(b"")
    flags = [*tiny_flags(max_steps=1), "--resume", "--data_dir", byte_shards, "--log_dir", tmp_path / "log"]
    done = call("train_gpt2", *flags)
    assert_refused(done, tmp_path / "log" / "step_000001", "damaged", file, "undamaged", "another --log_dir")


@pytest.mark.parametrize("target", ["nowhere", "file"])
def test_resuming_from_what_is_not_a_directory_is_refused(byte_shards, tmp_path, target):
    (tmp_path / "file").write_text("mine")
    flags = [*TINY, "--resume", tmp_path / target, "--data_dir", byte_shards, "--log_dir", tmp_path / "log"]
    assert_refused(call("train_gpt2", *flags), f"--resume {tmp_path / target}", "step_NNNNNN")


# ----------------------------------------------------------------------------------------- data
def test_faults_of_the_data_are_found_before_the_log_directory_is_created(random_shards, tmp_path):
    path = random_shards / "tiny_train_000001.npy"
    path.write_bytes(path.read_bytes()[:-1])
    done = call("train_gpt2", *TINY, "--data_dir", random_shards, "--log_dir", tmp_path / "log")
    assert_refused(done, path, "regenerate it")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_shards_or_windows_is_refused_before_the_log_directory_is_created(
    random_shards, tmp_path, split
):
    flags = [*TINY, "--data_dir", random_shards, "--log_dir", tmp_path / "log"]
    block_size = 16 * 64
    longer = tiny_flags(block_size=block_size, total_batch_size=block_size, micro_batch_size=1)
    assert_refused(call("train_gpt2", *longer, *flags[-4:]), f"--block_size {block_size}", "smaller --block_size")
    (random_shards / "meta.json").unlink()
    for path in random_shards.glob(f"*_{split}_*"):
        path.unlink()
    assert_refused(call("train_gpt2", *flags), random_shards, f"*_{split}_000000.npy")
    assert not (tmp_path / "log").exists()
