"""Training runs of train_gpt2.py: output, processes, evaluation, dtypes, checkpoints and resume."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
import transformers
from conftest import (
    NO_SHAPE,
    ROOT,
    SHARED,
    TINY,
    assert_user_error,
    call,
    command,
    load,
    losses,
    random_gpt2,
    read_log,
    read_windows,
    reproducible,
    run,
    sign,
    tiny_flags,
    torchrun,
    weights_file,
    write_data_set,
)
from safetensors.torch import load_file
from two_ranks import CompileCounter

STEP_LINE = re.compile(
    r"step +(\d+) \| loss: \d+\.\d{3} \| lr \d\.\de-\d\d \| norm: \S+ \| dt: \d+\.\dms \| "
    r"tok/s: \d+\.\d \| eta \d+:\d\d:\d\d"
)
LOG_LINE = {
    "train": r"\d+\.\d{6}",
    "val": r"\d+\.\d{4}",
    "lr": r"\d\.\d{4}e-\d\d",
    "norm": r"\d+\.\d{4}",
    "tok/s": r"\d+\.\d",
}
HAS_GPT2_VOCABULARY = (SHARED / "tiktoken_cache").is_dir()


def try_to_train(data_dir, log_dir, *flags, **changes):
    """Run train_gpt2.py in this process with TINY flags, some of them changed."""
    return call("train_gpt2", *tiny_flags(**changes), *paths(data_dir, log_dir), *flags)


def train(data_dir, log_dir, *flags, **changes):
    """Run train_gpt2.py as try_to_train does, and check that it succeeds without a warning."""
    done = try_to_train(data_dir, log_dir, *flags, **changes)
    assert (done.returncode, done.stderr) == (0, "")
    return done


def fine_tune(model, data_dir, log_dir, *flags):
    """Run train_gpt2.py with --init_from in this process, and check that it succeeds."""
    done = call("train_gpt2", *NO_SHAPE, *paths(data_dir, log_dir), "--init_from", model, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    return done


def paths(data_dir, log_dir):
    """Return the flags for these two directories."""
    return ["--data_dir", data_dir, "--log_dir", log_dir]


def weights(log_dir, step=5):
    """Return the bytes of the weights in a checkpoint."""
    return weights_file(log_dir, step).read_bytes()


def comparable_weights(log_dir, step=5):
    """Return the tensors of a checkpoint, without the biases of the keys.

    These biases add the same number to all attention scores of a query, so their true gradient is 0.
    AdamW turns the rounding errors of their gradients into steps of full size.
    """
    tensors = load_file(weights_file(log_dir, step))
    for name in list(tensors):
        if name.endswith("c_attn.bias"):
            q_bias, _, v_bias = tensors.pop(name).chunk(3)
            tensors[f"{name} of q"] = q_bias
            tensors[f"{name} of v"] = v_bias
    return tensors


def assert_same_weights(log_dir, expected_log_dir):
    """Check that two runs of five steps end with the same weights, except for rounding."""
    actual, expected = comparable_weights(log_dir), comparable_weights(expected_log_dir)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (actual[name] - tensor).abs().max().item()
        assert difference <= 2e-5, name  # five steps of AdamW move a weight by about 3e-3


def assert_same_losses(log_dir, expected_log_dir):
    """Check that two runs logged the same losses and norms, except for rounding."""
    for kind, tolerance in (("train", 2e-6), ("norm", 1.01e-4)):
        expected = losses(expected_log_dir, kind)
        assert len(expected) == 5
        assert losses(log_dir, kind) == pytest.approx(expected, abs=tolerance), kind
    actual, expected = losses(log_dir, "val"), losses(expected_log_dir, "val")
    assert expected.keys() == {0, 5}
    for step, loss in expected.items():  # the other run may have more validations
        assert actual[step] == pytest.approx(loss, abs=1.01e-4)


def remove_checkpoint(log_dir, step):
    """Delete a checkpoint, as if the run had been killed before it."""
    shutil.rmtree(log_dir / f"step_{step:06d}")


def directories(log_dir):
    """Return the names of the directories in a run directory, sorted."""
    return sorted(path.name for path in log_dir.iterdir() if path.is_dir())


def trainer_state(log_dir, step=5):
    """Return the content of a checkpoint's trainer.pt."""
    return torch.load(log_dir / f"step_{step:06d}" / "trainer.pt", weights_only=True)


def lines_with(text, output):
    """Return the lines of the output that contain a text."""
    return [line for line in output.splitlines() if text in line]


def windows_of(data_dir, split):
    """Return all windows of a split in file order, as lists of 17 tokens."""
    return read_windows(data_dir / f"excerpt_{split}_000000.npy", 16)


def transformers_loss(model, windows):
    """Return the mean loss of a transformers model over windows, lists of T + 1 tokens."""
    windows = torch.tensor(windows)
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


# --------------------------------------------------------------------------------------- output
@pytest.fixture(scope="module")
def one_run(byte_shards, tmp_path_factory):
    """(stdout, log directory) of five steps, with validations and checkpoints at 0, 2, 4 and 5."""
    log_dir = tmp_path_factory.mktemp("one_run") / "log"
    done = train(byte_shards, log_dir, eval_interval=2, checkpoint_interval=2, keep_checkpoints=0)
    return done.stdout, log_dir


def test_every_step_prints_a_line_in_the_documented_form(one_run):
    lines = lines_with("| loss", one_run[0])
    assert [int(STEP_LINE.fullmatch(line)[1]) for line in lines] == [0, 1, 2, 3, 4]
    assert [line[:10] for line in lines] == [f"step {step:5d}" for step in range(5)]


def test_log_file_has_one_metric_per_line(one_run):
    """Each line is "step kind value", as in build-nanogpt, and no metric of a step is missing."""
    text = (one_run[1] / "log.txt").read_text()
    for line in text.splitlines():
        step, kind, value = line.split(" ")
        assert re.fullmatch(LOG_LINE[kind], value), line
        assert step == str(int(step))
    expected = {(step, "val") for step in (0, 2, 4, 5)}
    for kind in ("train", "lr", "norm", "tok/s"):
        expected |= {(step, kind) for step in range(5)}
    assert read_log(one_run[1]).keys() == expected


def test_screen_and_log_file_show_the_same_losses(one_run):
    for step, loss in losses(one_run[1]).items():
        assert f"step {step:5d} | loss: {loss:.3f} " in one_run[0]
    for step, loss in losses(one_run[1], "val").items():
        assert f"step {step:5d} | val loss: {loss:.4f}" in one_run[0]


def test_header_shows_all_settings(one_run, byte_shards):
    header = one_run[0].partition("\nstep ")[0]
    parameters = (257 + 16) * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    train_windows = len(windows_of(byte_shards, "train"))
    val_windows = len(windows_of(byte_shards, "val"))
    for needle in (
        "n_layer=2",
        "weight_decay=0.1",
        "dtype=float32",
        "compile=False",
        f"torch {torch.__version__}, 1 x cpu, {torch.get_num_threads()} CPU threads each",
        f"train: {train_windows:,} windows in 1 shards, val: {val_windows:,} windows",
        f"{parameters:,} parameters",
        "128 tokens per step = 1 micro-steps x 1 processes x 8 sequences x 16 tokens",
        "attention kernel: Flash",
    ):
        assert needle in header


def test_samples_continue_the_prompt_at_every_validation(one_run):
    assert one_run[0].count("> KING") == 2 * 4


def test_two_samples_of_a_validation_differ(one_run):
    first, second = one_run[0].split("> KING")[-2:]
    assert first.strip() != second.strip()


def test_samples_contain_no_control_characters():
    module = load("train_gpt2")
    model = module.GPT(module.GPTConfig(257, 16, 1, 1, 8, tokenizer="bytes"))
    enc = SimpleNamespace(
        encode_ordinary=lambda text: list(text.encode()),
        decode=lambda tokens: "\x1b[31m red\x07\n\x9b\u202e end\r",
    )
    args = SimpleNamespace(prompt="KING", max_new_tokens=1)
    for_all = (args, torch.device("cpu"), module.nullcontext())
    samples = module.generate_samples(model, enc, *for_all, rank=0, val_loss=1.0)
    assert samples == ["\ufffd[31m red\ufffd\n\ufffd\ufffd end\ufffd"] * 2
    # other ranks, a run without a tokenizer, and a model that diverged have none
    assert module.generate_samples(model, enc, *for_all, rank=1, val_loss=1.0) == []
    assert module.generate_samples(model, None, *for_all, rank=0, val_loss=1.0) == []
    assert module.generate_samples(model, enc, *for_all, rank=0, val_loss=math.nan) == []


def test_empty_prompt_samples_from_the_end_of_text_token(byte_shards, tmp_path):
    done = train(byte_shards, tmp_path / "log", prompt="", max_steps=1)
    assert done.stdout.count("> <|endoftext|>") == 4


def test_first_loss_is_that_of_random_guessing(one_run):
    for kind in ("train", "val"):
        assert losses(one_run[1], kind)[0] == pytest.approx(math.log(257), abs=0.05)


def test_learning_rates_follow_warmup_and_cosine(one_run):
    # Warmup to 1e-3 in two steps, then half a cosine from 1e-3 to 1e-4 in three steps. After one third
    # and two thirds of it the cosine is 1/2 and -1/2, so that 3/4 and 1/4 of the difference are left.
    expected = {0: 5e-4, 1: 1e-3, 2: 1e-3, 3: 1e-4 + 9e-4 * 3 / 4, 4: 1e-4 + 9e-4 / 4}
    assert losses(one_run[1], "lr") == pytest.approx(expected, rel=1e-3)


def test_log_interval_concerns_the_screen_and_not_the_log_file(one_run, byte_shards, tmp_path):
    done = train(byte_shards, tmp_path / "log", log_interval=2)
    lines = lines_with("| loss", done.stdout)
    assert [int(STEP_LINE.fullmatch(line)[1]) for line in lines] == [0, 2, 4]
    assert losses(tmp_path / "log") == losses(one_run[1])


def test_step_lines_show_duration_speed_mfu_and_the_time_left(byte_shards, tmp_path, monkeypatch):
    """On this clock a step takes 10 s, the first step 100 s more, and a validation 5 s."""
    module = load("train_gpt2")
    clock = SimpleNamespace(now=1000)
    original_update, original_evaluate = module.update_parameters, module.evaluate

    def slow_update(*args):
        clock.now += 110 if clock.now == 1005 else 10
        original_update(*args)

    def slow_evaluate(*args):
        clock.now += 5
        return original_evaluate(*args)

    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    module.update_parameters, module.evaluate = slow_update, slow_evaluate
    # There are 6 N + 12 n_layer n_embd T floating-point operations per token. With a peak of one step
    # per second, a step of 10 s has an MFU of 10 %.
    parameters = (257 + 16) * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    flops_per_step = 128 * (6 * parameters + 12 * 2 * 32 * 16)
    module.peak_flops = lambda device, dtype, world_size: flops_per_step
    done = call(module, *tiny_flags(eval_interval=2), *paths(byte_shards, tmp_path / "log"))
    assert (done.returncode, done.stderr) == (0, "")
    # The time left includes validations: after the first step, the steps take 10, 15, 10 and 15 s.
    assert [line.partition("dt: ")[2] for line in lines_with("| loss", done.stdout)] == [
        "110000.0ms | tok/s: 1.2 | mfu: 0.9% | eta 0:07:20",
        "10000.0ms | tok/s: 12.8 | mfu: 10.0% | eta 0:00:30",
        "10000.0ms | tok/s: 12.8 | mfu: 10.0% | eta 0:00:25",
        "10000.0ms | tok/s: 12.8 | mfu: 10.0% | eta 0:00:11",
        "10000.0ms | tok/s: 12.8 | mfu: 10.0% | eta 0:00:00",
    ]


def test_a_small_model_learns_more_than_character_frequencies(byte_shards, tmp_path):
    changes = {"max_steps": 400, "eval_interval": 400, "learning_rate": 1e-2, "warmup_steps": 20}
    train(byte_shards, tmp_path / "log", **changes)
    tokens = np.load(byte_shards / "excerpt_val_000000.npy")
    frequencies = np.unique(tokens, return_counts=True)[1] / len(tokens)
    entropy = -(frequencies * np.log(frequencies)).sum()
    assert losses(tmp_path / "log", "val")[400] < entropy - 0.3


def test_plot_flag_is_gone(byte_shards, tmp_path):
    assert_user_error(try_to_train(byte_shards, tmp_path / "log", "--no-plot"), "--no-plot")


# ------------------------------------------------------------ terminals that cannot show the output
def train_with_stdout(stdout, *flags):
    """Run train_gpt2.py in this process with another stdout, under run_script."""
    module = load("train_gpt2")
    run_rank = module.run_rank

    def run_rank_with_stdout():
        sys.stdout = stdout  # call() restores it
        module.run_script(run_rank)

    module.run_rank = run_rank_with_stdout
    return call(module, *TINY, *flags)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_terminal_that_is_not_utf8_shows_question_marks(one_run, byte_shards, tmp_path, encoding):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    flags = [*paths(byte_shards, tmp_path / "log"), "--prompt", "caf\u00e9 \u65e5\u672c"]
    done = train_with_stdout(stdout, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    text = stdout.buffer.getvalue().decode(encoding)
    cafe = "caf?" if encoding == "ascii" else "caf\u00e9"
    assert text.count(f"> {cafe} ??") == 4
    assert losses(tmp_path / "log") == losses(one_run[1])


def test_ascii_terminal_does_not_end_a_process(byte_shards, tmp_path):
    flags = [*paths(byte_shards, tmp_path / "log"), "--prompt", "caf\u00e9"]
    done = run("train_gpt2", *TINY, *flags, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii() and done.stdout.count("> caf?") == 4


@pytest.mark.parametrize("kind", ["closed", "full", "without a reader"])
def test_run_outlives_its_standard_output(one_run, byte_shards, tmp_path, kind, monkeypatch):
    """The shell writes these as >&- (closed), >/dev/full (full) and | true (without a reader)."""
    monkeypatch.setattr(os, "_exit", sys.exit)  # run_script ends the process with it
    stdout = None
    if kind == "full":
        stdout = open("/dev/full", "w")  # noqa: SIM115 (closing it would raise again)
    if kind == "without a reader":
        reader, writer = os.pipe()
        os.close(reader)
        stdout = open(writer, "w")  # noqa: SIM115 (closing it would raise again)
    done = train_with_stdout(stdout, *paths(byte_shards, tmp_path / "log"))
    assert "Traceback" not in done.stderr
    assert losses(tmp_path / "log") == losses(one_run[1])
    assert weights(tmp_path / "log") == weights(one_run[1])
    if kind == "full":  # the output is lost, and the status says so
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1 and "No space left" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "")


# --------------------------------------------------------- gradient accumulation and several processes
@pytest.fixture(scope="module")
def same_steps(byte_shards, tmp_path_factory):
    """{name: log directory} of the same five steps at once, in four micro-steps, and on two ranks."""
    root = tmp_path_factory.mktemp("same_steps")
    train(byte_shards, root / "at once", micro_batch_size=8)
    train(byte_shards, root / "four micro-steps", micro_batch_size=2)
    flags = [*paths(byte_shards, root / "two ranks")]
    done = torchrun(2, "train_gpt2", *tiny_flags(micro_batch_size=2), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step     0 | loss") == 1, "both ranks printed"
    assert done.stdout.count("step     0 | val loss") == 1, "both ranks printed"
    assert "= 2 micro-steps x 2 processes x 2 sequences x 16 tokens" in done.stdout
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def two_ranks(byte_shards, request, tmp_path_factory):
    """The directory of several runs on two ranks, which share one torchrun (tests/two_ranks.py).

    NAME is the log directory of a run, and NAME_rank_R.json tells what was compiled and seeded in it.
    """
    root = tmp_path_factory.mktemp("two_ranks")
    train(byte_shards, root / "resumed", checkpoint_interval=3)
    remove_checkpoint(root / "resumed", 5)
    # The 25 windows of validation data are six batches of 4 and one of 1, or twelve of 2 and one of 1.
    flags = {
        "compiled inside DDP": [*tiny_flags(micro_batch_size=2, eval_interval=1), "--compile"],
        "compiled outside DDP": [*tiny_flags(micro_batch_size=4, eval_interval=1), "--compile"],
        "resumed": [*tiny_flags(micro_batch_size=2), "--resume"],
        "muon": tiny_flags(micro_batch_size=4, optimizer="muon", schedule="linear"),
        "dropout": tiny_flags(micro_batch_size=4, dropout=0.1, max_steps=3),
    }
    data_dirs = dict.fromkeys(flags, byte_shards)
    directory = root
    if HAS_GPT2_VOCABULARY:
        directory = request.getfixturevalue("hellaswag_data")  # HellaSwag is read from the current directory
        flags["hellaswag"] = hellaswag_flags(micro_batch_size=2, dropout=0)
        data_dirs["hellaswag"] = directory / "data"
    runs = []
    for name, run_flags in flags.items():
        run_flags = [*run_flags, *paths(data_dirs[name], root / name)]
        run_flags = [str(flag) for flag in run_flags]
        runs.append({"name": name, "directory": str(directory), "flags": run_flags})
    (root / "runs.json").write_text(json.dumps(runs))
    done = torchrun(2, ROOT / "tests" / "two_ranks", root / "runs.json")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr
    assert done.stdout.count("resuming at step 3") == 1
    assert done.stdout.count("HellaSwag acc_norm") == (3 if HAS_GPT2_VOCABULARY else 0)
    return root


@pytest.mark.parametrize("name", ["four micro-steps", "two ranks"])
def test_gradient_accumulation_and_ddp_give_the_same_weights_and_losses(same_steps, name):
    assert_same_weights(same_steps[name], same_steps["at once"])
    assert_same_losses(same_steps[name], same_steps["at once"])


@pytest.mark.parametrize("name", ["compiled inside DDP", "compiled outside DDP"])
def test_compiled_ddp_gives_the_same_weights_and_losses(same_steps, two_ranks, name):
    assert_same_weights(two_ranks / name, same_steps["at once"])
    assert_same_losses(two_ranks / name, same_steps["at once"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "name, compiled",
    [
        ("compiled inside DDP", ["function", "GPT"]),
        ("compiled outside DDP", ["function", "GPT", "DistributedDataParallel"]),
    ],
)
def test_ddp_compiles_one_graph_each_for_training_and_validation(two_ranks, name, compiled, rank):
    """compile_error() compiles a function. A smaller last batch of a validation compiles nothing."""
    result = json.loads((two_ranks / f"{name}_rank_{rank}.json").read_text())
    assert result["compiled"] == compiled
    assert result["graphs"] == 3
    assert len(losses(two_ranks / name, "val")) == 6


def test_every_rank_and_step_has_its_own_dropout(two_ranks):
    seeds = []
    for rank in (0, 1):
        result = json.loads((two_ranks / f"dropout_rank_{rank}.json").read_text())
        assert result["seeds"][0] == 1337  # the initial weights are the same on all ranks
        seeds += result["seeds"][-3:]
    assert len(set(seeds)) == 2 * 3


def test_resume_on_another_number_of_processes_sees_the_same_data(same_steps, two_ranks):
    """Three steps on one rank and two steps on two ranks, compared to five steps on one rank."""
    assert losses(two_ranks / "resumed") == pytest.approx(losses(same_steps["at once"]), abs=2e-6)
    assert_same_weights(two_ranks / "resumed", same_steps["at once"])


@pytest.mark.parametrize(
    "world_size, block_size, num_windows, expected",
    [
        (1, 64, 16, 16),
        (1, 64, 48, 16),
        (2, 16, 6, 1),
        (2, 16, 12, 2),
        (1, 256, 512, 4),
        (1, 256, 2, 2),
    ],
)
def test_default_micro_batch_divides_the_windows_of_a_rank(world_size, block_size, num_windows, expected):
    module = load("train_gpt2")
    args = SimpleNamespace(
        micro_batch_size=None,
        block_size=block_size,
        total_batch_size=num_windows * block_size,
    )
    cpu = torch.device("cpu")
    grad_accum_steps = module.set_micro_batch_size(None, None, args, cpu, None, world_size)
    assert args.micro_batch_size == expected
    assert grad_accum_steps * expected * world_size == num_windows


def test_header_shows_the_default_micro_batch(byte_shards, tmp_path):
    done = train(byte_shards, tmp_path / "log", micro_batch_size=None, total_batch_size=96)
    assert "= 3 micro-steps x 1 processes x 2 sequences x 16 tokens" in done.stdout


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_world_size_without_torchrun_is_a_user_error(byte_shards, tmp_path, monkeypatch, missing):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name != missing:
            monkeypatch.setenv(name, "0")
    done = try_to_train(byte_shards, tmp_path / "log")
    assert_user_error(done, "WORLD_SIZE is 2", missing, "torchrun", "unset WORLD_SIZE")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("device", ["meta", "cuda:99", "no-such-device"])
def test_device_that_cannot_compute_is_a_user_error(byte_shards, tmp_path, device):
    done = try_to_train(byte_shards, tmp_path / "log", device=device)
    assert_user_error(done, f"--device {device}", "--device cpu")


# ---------------------------------------------------------------------------------------- compile
def compile_and_count(monkeypatch, *flags):
    """Run train_gpt2.py with --compile in this process; returns its output and a CompileCounter."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", counter.compile)
    torch.compiler.reset()
    done = call("train_gpt2", *flags, "--compile")
    torch.compiler.reset()
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, counter


def test_run_compiles_one_graph_each_for_training_and_validation(same_steps, byte_shards, tmp_path, monkeypatch):
    """25 windows of validation data are three batches of 8, and one of 1, which is not compiled."""
    flags = [*tiny_flags(eval_interval=1), *paths(byte_shards, tmp_path / "log")]
    stdout, counter = compile_and_count(monkeypatch, *flags)
    assert "compile=True" in stdout
    assert counter.compiled == ["function", "GPT"]  # compile_error() compiles the function
    assert counter.graphs == 3
    assert len(losses(tmp_path / "log", "val")) == 6
    assert_same_weights(tmp_path / "log", same_steps["at once"])
    assert_same_losses(tmp_path / "log", same_steps["at once"])


def test_training_continues_without_a_compiler_and_says_so_once(byte_shards, tmp_path):
    environment = {
        "CXX": "no-such-compiler",
        "PATH": "",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    flags = [*TINY, *paths(byte_shards, tmp_path / "log"), "--compile"]
    done = run("train_gpt2", *flags, env=environment)
    assert done.returncode == 0, done.stderr
    (line,) = lines_with("no torch.compile", done.stdout)
    assert "no-such-compiler" in line and "compile=False" in done.stdout
    assert len(losses(tmp_path / "log")) == 5


# ----------------------------------------------------------------------------------- validation
def test_validation_loss_is_that_of_transformers_over_the_first_windows(byte_shards, tmp_path):
    """It covers the first --val_tokens of the split, in file order, in batches of any size."""
    all_windows = windows_of(byte_shards, "val")
    sizes = {
        400: 25,  # three batches of 8 and one of 1
        10**9: len(all_windows),
        1: 1,  # at least one window
    }
    for val_tokens, num_windows in sizes.items():
        log_dir = tmp_path / str(val_tokens)
        train(byte_shards, log_dir, val_tokens=val_tokens, learning_rate=1e-2, dropout=0.2)
        model = transformers.AutoModelForCausalLM.from_pretrained(log_dir / "step_000005").eval()
        expected = transformers_loss(model, all_windows[:num_windows])
        assert losses(log_dir, "val")[5] == pytest.approx(expected, abs=6e-5)


def test_evaluation_and_sampling_do_not_change_training(byte_shards, tmp_path):
    """Runs that evaluate often or rarely, much or little, end with the same bytes."""
    often = {"eval_interval": 1, "prompt": "Some longer prompt: ", "val_tokens": 1600}
    rarely = {"eval_interval": 100, "prompt": "A", "val_tokens": 16}
    train(byte_shards, tmp_path / "often", dropout=0.1, **often)
    train(byte_shards, tmp_path / "rarely", dropout=0.1, **rarely)
    assert weights(tmp_path / "often") == weights(tmp_path / "rarely")
    assert losses(tmp_path / "often") == losses(tmp_path / "rarely")
    assert len(losses(tmp_path / "often", "val")) == 6
    assert len(losses(tmp_path / "rarely", "val")) == 2


@pytest.mark.parametrize("flag", ["--no-shuffle", "--seed=7", "--dropout=0.2", "--weight_decay=0.9", "--grad_clip=0.1"])
def test_training_flags_change_the_weights(same_steps, byte_shards, tmp_path, flag):
    train(byte_shards, tmp_path / "log", flag)
    assert weights(tmp_path / "log") != weights(same_steps["at once"])


def test_logged_norm_is_that_before_clipping(same_steps, byte_shards, tmp_path):
    train(byte_shards, tmp_path / "log", grad_clip=0.01)
    expected = losses(same_steps["at once"], "norm")
    assert losses(tmp_path / "log", "norm")[0] == expected[0] > 0.1


def test_run_without_gpt2s_vocabulary_trains_without_samples(tmp_path):
    """With GPT-2 shards, no network and an empty cache, one line says why there are no samples."""
    write_data_set(tmp_path / "data", [np.arange(400)], [np.arange(100)], 50257)
    flags = [*tiny_flags(max_steps=1), *paths(tmp_path / "data", tmp_path / "log")]
    environment = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty")}
    done = run("train_gpt2", *flags, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = lines_with("TIKTOKEN_CACHE_DIR", done.stdout)
    assert "no samples" in line
    assert weights_file(tmp_path / "log", 1).exists()


# ---------------------------------------------------------------------------------------- dtypes
HUNDRED_STEPS = {
    "max_steps": 100,
    "learning_rate": 3e-3,
    "checkpoint_interval": 50,
    "eval_interval": 50,
}


@pytest.fixture(scope="module")
def hundred_steps(byte_shards, tmp_path_factory):
    """{dtype: log directory} of 100 steps on the same data, with a checkpoint in the middle."""
    root = tmp_path_factory.mktemp("hundred_steps")
    for dtype in ("float32", "bfloat16"):
        train(byte_shards, root / dtype, dtype=dtype, **HUNDRED_STEPS)
    return {path.name: path for path in root.iterdir()}


def test_bfloat16_and_float32_losses_agree_over_100_steps(hundred_steps):
    expected, actual = losses(hundred_steps["float32"]), losses(hundred_steps["bfloat16"])
    assert len(expected) == 100 and expected[99] < expected[0] - 1
    assert actual == pytest.approx(expected, abs=0.02)
    assert actual != expected


def test_resumed_bfloat16_run_keeps_its_dtype_and_ends_with_the_same_bytes(hundred_steps, byte_shards, tmp_path):
    shutil.copytree(hundred_steps["bfloat16"], tmp_path / "log")
    remove_checkpoint(tmp_path / "log", 100)
    done = train(byte_shards, tmp_path / "log", "--resume", **HUNDRED_STEPS)
    assert "dtype=bfloat16" in done.stdout and "resuming at step 50" in done.stdout
    assert "dtype bfloat16: the run was started with it" in done.stdout.splitlines()
    assert weights(tmp_path / "log", 100) == weights(hundred_steps["bfloat16"], 100)
    assert reproducible(tmp_path / "log") == reproducible(hundred_steps["bfloat16"])


def grow_scale_often(monkeypatch):
    """Let new gradient scalers start with the factor 1024, and double it every second step."""
    original_scaler = torch.amp.GradScaler

    def scaler_that_grows_often(*args, **kwargs):
        return original_scaler(*args, init_scale=1024, growth_interval=2, **kwargs)

    monkeypatch.setattr(torch.amp, "GradScaler", scaler_that_grows_often)


@pytest.fixture(scope="module")
def run_in_dtype(byte_shards, tmp_path_factory):
    """{dtype: log directory} of five steps, with a checkpoint at step 3, in each of the dtypes."""
    root = tmp_path_factory.mktemp("run_in_dtype")
    with pytest.MonkeyPatch.context() as monkeypatch:
        grow_scale_often(monkeypatch)
        for dtype in ("float32", "bfloat16", "float16"):
            done = train(byte_shards, root / dtype, dtype=dtype, checkpoint_interval=3)
            assert f"dtype {dtype}: chosen with --dtype" in done.stdout.splitlines()
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_matches_float32(run_in_dtype, dtype):
    actual, expected = losses(run_in_dtype[dtype]), losses(run_in_dtype["float32"])
    assert actual == pytest.approx(expected, abs=0.02)
    assert actual != expected


def test_resumed_float16_run_restores_the_gradient_scaler(run_in_dtype, byte_shards, tmp_path, monkeypatch):
    grow_scale_often(monkeypatch)
    shutil.copytree(run_in_dtype["float16"], tmp_path / "log")
    remove_checkpoint(tmp_path / "log", 5)
    train(byte_shards, tmp_path / "log", "--resume", checkpoint_interval=3)
    scaler = trainer_state(tmp_path / "log")["scaler"]
    # The factor was doubled after steps 1 and 3, and one step has passed since then.
    assert (scaler["scale"], scaler["_growth_tracker"]) == (1024 * 2 * 2, 1)
    assert scaler == trainer_state(run_in_dtype["float16"])["scaler"]
    assert weights(tmp_path / "log") == weights(run_in_dtype["float16"])


@pytest.mark.parametrize(
    "saved, chosen",
    [
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("bfloat16", "float16"),
        ("bfloat16", "float32"),
        ("float16", "bfloat16"),
        ("float16", "float32"),
    ],
)
def test_resuming_in_another_dtype_warns_and_works(run_in_dtype, byte_shards, tmp_path, saved, chosen):
    shutil.copytree(run_in_dtype[saved], tmp_path / "log")
    remove_checkpoint(tmp_path / "log", 5)
    changes = {"dtype": chosen, "checkpoint_interval": 3}
    done = try_to_train(byte_shards, tmp_path / "log", "--resume", **changes)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: ") and done.stderr.count("\n") == 1
    assert f"resuming a {saved} run in {chosen}" in done.stderr
    assert losses(tmp_path / "log") == pytest.approx(losses(run_in_dtype[saved]), abs=0.02)
    assert weights(tmp_path / "log") != weights(run_in_dtype[saved])
    # the resumed run's checkpoint has the new dtype, and only float16 has a gradient scaler
    state = trainer_state(tmp_path / "log")
    assert state["args"]["dtype"] == chosen
    assert bool(state["scaler"]) == (chosen == "float16")


@pytest.mark.parametrize(
    "capabilities, n_embd, expected",
    [
        ({"amx_bf16": True}, 768, "bfloat16"),
        ({"avx512_bf16": True}, 256, "bfloat16"),
        ({"amx_bf16": True}, 128, "float32"),  # too small to gain
        ({"avx512_f": True, "amx_bf16": False}, 768, "float32"),
        ({}, 768, "float32"),
    ],
)
def test_default_dtype_of_a_cpu_depends_on_its_matmuls(monkeypatch, capabilities, n_embd, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert load("train_gpt2").default_dtype(torch.device("cpu"), n_embd)[0] == expected


@pytest.mark.parametrize("n_embd, expected", [(256, "bfloat16"), (32, "float32")])
def test_run_without_dtype_uses_the_default_for_its_width(byte_shards, tmp_path, monkeypatch, n_embd, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    done = train(byte_shards, tmp_path / "log", n_layer=1, n_embd=n_embd, max_steps=1)
    assert f"dtype={expected}" in done.stdout
    assert trainer_state(tmp_path / "log", 1)["args"]["dtype"] == expected


@pytest.mark.parametrize("is_supported, expected", [(True, "bfloat16"), (False, "float16")])
def test_default_dtype_of_a_gpu_depends_on_its_hardware(monkeypatch, is_supported, expected):
    """Emulated bfloat16 does not count: PyTorch offers it on old GPUs, where it is slow."""

    def is_bf16_supported(including_emulation=True):
        return is_supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    module = load("train_gpt2")
    assert module.default_dtype(torch.device("cuda"), 128)[0] == expected
    assert module.default_dtype(torch.device("mps"), 768)[0] == "float32"


@pytest.mark.parametrize(
    "gpu_name, dtype, expected",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "float32", 494e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H100 NVL", "float16", 835e12),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312e12),
        ("NVIDIA B200", "bfloat16", 2250e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("Tesla T4", "float16", 65e12),
        ("Tesla T4", "bfloat16", None),
        ("Tesla V100-SXM2-16GB", "float16", 125e12),
        ("NVIDIA GeForce GTX 1080", "float32", None),
        ("NVIDIA L400", "bfloat16", None),
    ],
)
def test_mfu_is_relative_to_the_data_sheet_of_the_gpu(monkeypatch, gpu_name, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu_name)
    peak_flops = load("train_gpt2").peak_flops
    assert peak_flops(torch.device("cuda"), dtype, 1) == expected
    if expected is not None:
        assert peak_flops(torch.device("cuda"), dtype, 8) == 8 * expected
    assert peak_flops(torch.device("cpu"), dtype, 1) is None


# ---------------------------------------------------------------------------------- checkpoints
MODEL_FILES = ["config.json", "model.safetensors", "sha256.json", "trainer.pt"]


def test_transformers_computes_the_same_logits_from_a_checkpoint(one_run):
    path = one_run[1] / "step_000005"
    names = [file.name for file in path.iterdir()]
    assert sorted(names) == sorted([*MODEL_FILES, "merges.txt", "vocab.json"])
    expected = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    model = load("train_gpt2").GPT.from_pretrained(path).eval()
    idx = torch.randint(257, (2, 16))
    torch.testing.assert_close(model(idx)[0], expected(idx).logits, rtol=1e-5, atol=1e-5)
    tensors = load_file(path / "model.safetensors")
    assert tensors["transformer.wte.weight"].shape == (257, 32)
    assert not [name for name in tensors if "lm_head" in name]
    assert json.loads((path / "config.json").read_text())["tokenizer"] == "bytes"


def test_transformers_pipeline_continues_text_from_a_checkpoint(one_run):
    path = one_run[1] / "step_000005"
    pipeline = transformers.pipeline("text-generation", str(path), device="cpu")
    text = pipeline("KING", max_new_tokens=9, do_sample=False)[0]["generated_text"]
    module = load("train_gpt2")
    enc = module.get_tokenizer("bytes")
    model = module.GPT.from_pretrained(path).eval()
    idx = model.generate(torch.tensor([enc.encode("KING")]), 9, torch.Generator(), top_k=1)
    assert text == enc.decode(idx[0].tolist()).removesuffix("<|endoftext|>")


def assert_same_tokenizer(checkpoint, enc):
    """Check that transformers tokenizes difficult texts with a checkpoint's files as enc does."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert (len(tokenizer), tokenizer.eos_token_id) == (enc.n_vocab, enc.eot_token)
    first_characters = "".join(map(chr, range(1, 400)))
    other_scripts = "caf\u00e9 \u65e5\u672c \U0001f600\n\n "
    for text in ("KING:\n  What's 12 x 34?", first_characters, other_scripts):
        assert tokenizer(text)["input_ids"] == enc.encode_ordinary(text)
        assert tokenizer.decode(enc.encode_ordinary(text)) == text


def test_checkpoint_of_a_byte_model_contains_its_tokenizer(one_run):
    assert_same_tokenizer(one_run[1] / "step_000005", load("train_gpt2").get_tokenizer("bytes"))


def test_checkpoint_of_a_gpt2_model_contains_gpt2s_tokenizer(tiktoken_cache, text_file, tmp_path):
    flags = ["--input", text_file, "--tokenizer", "gpt2", "--out_dir", tmp_path / "data"]
    prepared = call("prepare_shakespeare", *flags)
    assert prepared.returncode == 0, prepared.stderr
    train(tmp_path / "data", tmp_path / "log", max_steps=1, hellaswag_interval=0)
    assert_same_tokenizer(tmp_path / "log" / "step_000001", tiktoken.get_encoding("gpt2"))


def test_data_without_tokenizer_files_gives_checkpoints_without_them(random_shards, one_run, tmp_path):
    done = train(random_shards, tmp_path / "log", max_steps=1)
    (line,) = lines_with("vocab.json", done.stdout)
    assert "merges.txt" in line and str(random_shards) in line
    assert "checkpoints will have no tokenizer" in line
    checkpoint = tmp_path / "log" / "step_000001"
    assert sorted(file.name for file in checkpoint.iterdir()) == MODEL_FILES
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not lines_with("vocab.json", one_run[0])


def test_trainer_state_contains_no_pickled_code(one_run):
    state = trainer_state(one_run[1])  # loads it with weights_only=True
    assert state["step"] == 5
    (adamw,) = state["optimizers"]
    assert len(adamw["state"]) == 2 + 2 * 12 + 2


@pytest.mark.parametrize("keep, expected", [(2, [6, 7]), (0, [2, 4, 6, 7]), (1, [7])])
def test_newest_checkpoints_are_kept(byte_shards, tmp_path, keep, expected):
    train(byte_shards, tmp_path / "log", max_steps=7, checkpoint_interval=2, keep_checkpoints=keep)
    assert directories(tmp_path / "log") == [f"step_{step:06d}" for step in expected]


# --------------------------------------------------------------------------------------- resume
def kill_when(process, condition):
    """Wait until the condition holds, then kill the process with SIGKILL."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"the run ended by itself: {process.stderr.read().decode()}"
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("dropout, progress", [(0.0, "a checkpoint"), (0.1, "a log line")])
def test_killed_run_resumes_to_the_same_bytes(byte_shards, tmp_path, dropout, progress):
    changes = {
        "max_steps": 120,
        "checkpoint_interval": 20,
        "eval_interval": 15,
        "dropout": dropout,
        "learning_rate": 1e-2,
    }
    train(byte_shards, tmp_path / "whole", **changes)

    log_dir = tmp_path / "killed"
    log_file = log_dir / "log.txt"
    line = command("train_gpt2", *tiny_flags(**changes), *paths(byte_shards, log_dir))
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if progress == "a checkpoint":
        kill_when(process, lambda: (log_dir / "step_000020").exists())
    else:  # step 27 has neither a checkpoint nor a validation
        kill_when(process, lambda: log_file.exists() and "\n27 train" in log_file.read_text())
    process.stderr.close()
    assert directories(log_dir), "killed before its first checkpoint"
    assert not (log_dir / "step_000120").exists(), "the run was not killed in time"

    done = train(byte_shards, log_dir, "--resume", **changes)
    assert "step     0 | loss" not in done.stdout, "it started over"
    assert weights(log_dir, 120) == weights(tmp_path / "whole", 120)
    assert reproducible(log_dir) == reproducible(tmp_path / "whole")
    kept = [name for name in directories(log_dir) if name.startswith("step_")]
    assert kept == directories(tmp_path / "whole")


def test_resume_removes_what_a_crash_left(byte_shards, tmp_path):
    """It removes lines after the checkpoint, half a line and half a checkpoint, and nothing else."""
    changes = {"checkpoint_interval": 3, "eval_interval": 3}
    train(byte_shards, tmp_path / "whole", **changes)
    log_dir = tmp_path / "log"
    shutil.copytree(tmp_path / "whole", log_dir)
    before = (log_dir / "log.txt").read_text().splitlines()
    remove_checkpoint(log_dir, 5)
    (log_dir / "tmp_step_000005").mkdir()
    (log_dir / "tmp_step_000005" / "model.safetensors").write_bytes(b"half")
    (log_dir / "notes.md").write_text("mine")
    with open(log_dir / "log.txt", "a") as file:
        file.write("4 tra")
    train(byte_shards, log_dir, "--resume", **changes)
    assert reproducible(log_dir) == reproducible(tmp_path / "whole")
    kept = [line for line in before if int(line.split()[0]) < 3]
    assert (log_dir / "log.txt").read_text().splitlines()[: len(kept)] == kept
    assert sorted(path.name for path in log_dir.iterdir()) == [
        "lock",
        "log.txt",
        "notes.md",
        "run.json",
        "step_000003",
        "step_000005",
    ]


def test_resume_from_an_earlier_checkpoint_sets_the_later_ones_aside(one_run, byte_shards, tmp_path):
    changes = {"checkpoint_interval": 2, "keep_checkpoints": 1}
    train(byte_shards, tmp_path / "log", checkpoint_interval=2)
    earlier = tmp_path / "log" / "step_000002"
    train(byte_shards, tmp_path / "log", "--resume", earlier, "--max_hours", 1e-9, **changes)
    set_aside = ["former_step_000004", "former_step_000005"]
    assert directories(tmp_path / "log") == [*set_aside, "step_000003"]
    train(byte_shards, tmp_path / "log", "--resume", **changes)
    assert directories(tmp_path / "log") == [*set_aside, "step_000005"]
    assert losses(tmp_path / "log") == losses(one_run[1])


def test_resume_of_a_finished_run_changes_nothing_and_repeats_its_samples(byte_shards, tmp_path):
    first = train(byte_shards, tmp_path / "log")
    weights_before, log_before = weights(tmp_path / "log"), read_log(tmp_path / "log")
    again = train(byte_shards, tmp_path / "log", "--resume")
    assert weights(tmp_path / "log") == weights_before
    assert read_log(tmp_path / "log") == log_before
    last_validation = first.stdout.partition("step     5 | val loss: ")[2]
    assert "> KING" in last_validation
    assert again.stdout.partition("step     5 | val loss: ")[2] == last_validation


def test_resume_without_a_checkpoint_starts_at_step_0(same_steps, byte_shards, tmp_path):
    train(byte_shards, tmp_path / "log", "--resume")
    assert weights(tmp_path / "log") == weights(same_steps["at once"])


@pytest.fixture
def finished_run(one_run, tmp_path):
    """A copy of one_run's directory with its last checkpoint only; tests may change it."""
    shutil.copytree(one_run[1], tmp_path / "log")
    for name in directories(tmp_path / "log"):
        if name != "step_000005":
            shutil.rmtree(tmp_path / "log" / name)
    return tmp_path / "log"


def test_pickled_code_in_a_checkpoint_is_refused_and_not_run(byte_shards, finished_run, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "the code ran"),)

    state = trainer_state(finished_run)
    state["extra"] = Code()
    checkpoint = finished_run / "step_000005"
    torch.save(state, checkpoint / "trainer.pt")
    sign(checkpoint)
    assert_user_error(try_to_train(byte_shards, finished_run, "--resume"), "step_000005")
    assert not (tmp_path / "the code ran").exists()


def test_checkpoint_of_an_earlier_version_is_refused(byte_shards, finished_run, tmp_path):
    """Checkpoints of earlier versions have no "format". Their weights can still be used."""
    checkpoint = finished_run / "step_000005"
    state = trainer_state(finished_run)
    del state["format"]
    torch.save(state, checkpoint / "trainer.pt")
    sign(checkpoint)
    before = (finished_run / "log.txt").read_text()
    for resume in (["--resume"], ["--resume", checkpoint]):
        done = try_to_train(byte_shards, finished_run, *resume)
        assert_user_error(done, "step_000005", "earlier version of train_gpt2.py", "--init_from")
    assert (finished_run / "log.txt").read_text() == before
    fine_tune(checkpoint, byte_shards, tmp_path / "new", "--max_steps", 1)


def test_resume_with_other_max_steps_names_the_ways_to_train_longer(byte_shards, finished_run):
    done = try_to_train(byte_shards, finished_run, "--resume", max_steps=9)
    assert_user_error(done, "--max_steps is 9", "has 5", "--schedule linear", "--init_from")


# ------------------------------------------------------------------------------ the whole chain
def test_quick_start_works_in_an_empty_directory(tmp_path, text_file):
    """The two commands of the quick start, and transformers with the model that they make."""
    prepared = run("prepare_shakespeare", "--input", text_file, cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    flags = ["--preset", "shakespeare", "--max_steps", 3, "--device", "cpu"]
    trained = run("train_gpt2", *flags, cwd=tmp_path)
    assert (trained.returncode, trained.stderr) == (0, "")
    assert trained.stdout.count("val loss") == 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "log" / "step_000003")
    prompt = torch.tensor([[*b"KING"]])
    out = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=256)
    assert out.shape == (1, 9) and torch.equal(out[:, :4], prompt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "shakespeare"]


def test_gpt2_tokens_of_tiny_shakespeare_start_at_10_82(tiny_shakespeare, tiktoken_cache, tmp_path):
    data_dir = tmp_path / "data"
    flags = ["--input", tiny_shakespeare, "--tokenizer", "gpt2", "--out_dir", data_dir]
    done = call("prepare_shakespeare", *flags)
    assert done.returncode == 0, done.stderr
    done = train(data_dir, tmp_path / "log", max_steps=1, hellaswag_interval=0)
    assert losses(tmp_path / "log")[0] == pytest.approx(10.82, abs=0.05)
    assert done.stdout.count("> KING") == 4
    config = json.loads((tmp_path / "log" / "step_000001" / "config.json").read_text())
    assert config["eos_token_id"] == 50256


# ----------------------------------------------------------------------------------- fine-tuning
@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """(directory, model) of a random GPT2LMHeadModel over bytes with 40 positions and 3 layers."""
    directory = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    return directory, random_gpt2(directory)


def test_fine_tuning_starts_from_the_models_own_loss_and_lowers_it(pretrained, byte_shards, tmp_path):
    """Positions are cropped from 40 to 16; the checkpoint keeps the other shapes.

    Dropout is the flag's, 0, and not that of the model's config.json, 0.1.
    """
    directory, model = pretrained
    fine_tune(directory, byte_shards, tmp_path / "log", "--max_steps", 20, "--learning_rate", 1e-2)
    expected = transformers_loss(model, windows_of(byte_shards, "val")[:25])
    val = losses(tmp_path / "log", "val")
    assert val[0] == pytest.approx(expected, abs=6e-5)
    assert val[20] < val[0] - 0.5
    config = json.loads((tmp_path / "log" / "step_000020" / "config.json").read_text())
    names = ("n_layer", "n_head", "n_embd", "n_inner", "activation_function", "n_positions")
    assert [config[name] for name in names] == [3, 3, 48, 100, "relu", 16]
    assert model.config.resid_pdrop == 0.1
    assert [config[name] for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")] == [0, 0, 0]


def test_fine_tuning_resumes_to_the_same_bytes(pretrained, byte_shards, tmp_path):
    for name in ("whole", "log"):
        fine_tune(pretrained[0], byte_shards, tmp_path / name, "--checkpoint_interval", 3)
    remove_checkpoint(tmp_path / "log", 5)
    flags = ["--checkpoint_interval", 3, "--resume"]
    done = fine_tune(pretrained[0], byte_shards, tmp_path / "log", *flags)
    assert "resuming at step 3" in done.stdout
    assert weights(tmp_path / "log") == weights(tmp_path / "whole")


def test_fine_tuning_from_a_run_directory_takes_its_newest_checkpoint(one_run, byte_shards, tmp_path):
    """The newest checkpoint has the largest step; alphabetical order is different."""
    shutil.copytree(one_run[1], tmp_path / "run")
    for old_name, new_name in (("step_000005", "step_1000000"), ("step_000002", "step_999999")):
        (tmp_path / "run" / old_name).rename(tmp_path / "run" / new_name)
    fine_tune(tmp_path / "run", byte_shards, tmp_path / "log", "--max_steps", 1)
    val = losses(one_run[1], "val")
    assert losses(tmp_path / "log", "val")[0] == val[5]
    assert len(set(val.values())) == 4


# ----------------------------------------------------------------------------------------- muon
def test_muon_on_two_ranks_or_resumed_ends_where_one_process_does(byte_shards, two_ranks, tmp_path):
    changes = {"optimizer": "muon", "schedule": "linear", "checkpoint_interval": 3}
    train(byte_shards, tmp_path / "one", **changes)
    shutil.copytree(tmp_path / "one", tmp_path / "resumed")
    remove_checkpoint(tmp_path / "resumed", 5)
    train(byte_shards, tmp_path / "resumed", "--resume", **changes)
    assert weights(tmp_path / "resumed") == weights(tmp_path / "one")
    assert_same_weights(two_ranks / "muon", tmp_path / "one")
    assert losses(two_ranks / "muon") == pytest.approx(losses(tmp_path / "one"), abs=2e-6)


def test_linear_schedule_allows_a_longer_run_until_the_decay_begins(byte_shards, tmp_path):
    """A run of ten steps, whose decay begins at step 4, can become a run of twelve steps there."""
    changes = {"schedule": "linear", "checkpoint_interval": 4, "keep_checkpoints": 0}
    train(byte_shards, tmp_path / "twelve", max_steps=12, **changes)
    train(byte_shards, tmp_path / "ten", max_steps=10, **changes)
    for step in (10, 8):
        remove_checkpoint(tmp_path / "ten", step)
    train(byte_shards, tmp_path / "ten", "--resume", max_steps=12, **changes)
    assert weights(tmp_path / "ten", 12) == weights(tmp_path / "twelve", 12)
    done = try_to_train(byte_shards, tmp_path / "twelve", "--resume", max_steps=14, **changes)
    assert_user_error(done, "--max_steps is 14", "12")


# ------------------------------------------------------------------------------------ hellaswag
def hellaswag_flags(**changes):
    """Return flags of four steps on GPT-2 tokens, with HellaSwag scores at steps 0, 3 and 4."""
    settings = {
        "n_layer": 1,
        "n_embd": 16,
        "block_size": 72,  # above 64: the lengths of batches are rounded up to multiples of 64
        "total_batch_size": 4 * 72,
        "micro_batch_size": 4,
        "max_steps": 4,
        "eval_interval": 4,
        "hellaswag_interval": 3,
        "learning_rate": 1e-2,
        "dropout": 0.2,
        "max_new_tokens": 4,
    }
    return tiny_flags(**{**settings, **changes})


def write_examples(path, labels):
    """Write a HellaSwag example per label as JSON lines, with words of input.txt. Returns them."""
    rng = np.random.default_rng(0)
    words = (ROOT / "input.txt").read_text(encoding="utf-8").split()[:5000]
    examples = []
    for ind, label in enumerate(labels):
        context_words = 30 if ind % 5 == 0 else 3  # every fifth example is longer
        texts = []
        for num_words in (context_words, 9, 1, 4, 12):
            start = rng.integers(4900)
            texts.append(" ".join(words[start : start + num_words]))
        examples.append({"ind": ind, "label": int(label), "ctx": texts[0], "endings": texts[1:]})
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return examples


def prepare_hellaswag(directory, monkeypatch):
    """Let hellaswag.py --prepare write hellaswag/ in a directory from its examples.jsonl."""
    monkeypatch.chdir(directory)
    done = call("hellaswag", "--prepare", "--data", "examples.jsonl")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def hellaswag_data(tmp_path_factory):
    """A directory with shards of random GPT-2 tokens in data/, and 10 prepared examples."""
    if not HAS_GPT2_VOCABULARY:
        pytest.skip("GPT-2's vocabulary is not in ../shared/tiktoken_cache")
    directory = tmp_path_factory.mktemp("hellaswag")
    rng = np.random.default_rng(0)
    train_tokens, val_tokens = rng.integers(50257, size=1500), rng.integers(50257, size=400)
    write_data_set(directory / "data", [train_tokens], [val_tokens], 50257)
    write_examples(directory / "examples.jsonl", rng.integers(4, size=10))
    with pytest.MonkeyPatch.context() as monkeypatch:
        prepare_hellaswag(directory, monkeypatch)
    return directory


def train_with_hellaswag(log_dir, *flags, **changes):
    """Train on data/ of the current directory, which may contain HellaSwag examples."""
    flags = [*hellaswag_flags(**changes), *paths("data", log_dir), *flags]
    done = call("train_gpt2", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    return done


@pytest.fixture(scope="module")
def hellaswag_run(hellaswag_data, tmp_path_factory):
    """(stdout, log directory) of a run with HellaSwag scores and checkpoints at 0, 3 and 4."""
    log_dir = tmp_path_factory.mktemp("hellaswag_run") / "log"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(hellaswag_data)
        done = train_with_hellaswag(log_dir, checkpoint_interval=3)
    return done.stdout, log_dir


def test_hellaswag_in_training_is_hellaswag_py_on_the_checkpoint(hellaswag_run, hellaswag_data):
    stdout, log_dir = hellaswag_run
    scores = losses(log_dir, "hella")
    assert list(scores) == [0, 3, 4]
    for step, score in scores.items():
        assert f"step {step:5d} | HellaSwag acc_norm: {score:.4f}" in stdout
    for step in (3, 4):
        examples = hellaswag_data / "examples.jsonl"
        flags = ["--model", log_dir / f"step_{step:06d}", "--data", examples, "--device", "cpu"]
        done = call("hellaswag", *flags)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.split()[-1]) == scores[step]


def transformers_choices(checkpoint, examples):
    """Return the number of the ending with the lowest mean loss per token for each example."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    enc = tiktoken.get_encoding("gpt2")
    choices = []
    for example in examples:
        context = enc.encode_ordinary(example["ctx"])
        mean_losses = []
        for ending in example["endings"]:
            tokens = torch.tensor([context + enc.encode_ordinary(f" {ending}")])
            with torch.no_grad():
                logits = model(tokens).logits
            # the logits at each position predict the next token
            ending_logits, ending_tokens = logits[0, len(context) - 1 : -1], tokens[0, len(context) :]
            loss = torch.nn.functional.cross_entropy(ending_logits, ending_tokens)
            mean_losses.append(loss.item())
        choices.append(int(np.argmin(mean_losses)))
    return choices


@pytest.mark.parametrize("shift, expected", [(0, 1.0), (1, 0.0)])
def test_hellaswag_choices_are_those_of_transformers(hellaswag_run, tmp_path, monkeypatch, shift, expected):
    """Labels that are transformers' choices give an accuracy of 1, and the labels after them 0."""
    checkpoint = hellaswag_run[1] / "step_000004"
    examples = write_examples(tmp_path / "examples.jsonl", np.zeros(10))
    choices = transformers_choices(checkpoint, examples)
    assert len(set(choices)) > 1
    write_examples(tmp_path / "examples.jsonl", [(choice + shift) % 4 for choice in choices])
    prepare_hellaswag(tmp_path, monkeypatch)
    module = load("train_gpt2")
    data = module.load_hellaswag("hellaswag/hellaswag_val.npz", 72)
    model = module.GPT.from_pretrained(checkpoint)
    stop = SimpleNamespace(reason=None)
    for_all = (0, 1, torch.device("cpu"), module.nullcontext(), stop)
    # a micro-batch of 16 windows has room for several examples, a micro-batch of one window for one
    for micro_batch_size in (16, 1):
        accuracy = module.evaluate_hellaswag(model, data, micro_batch_size, *for_all)
        assert accuracy == expected


def test_longest_hellaswag_example_may_fill_the_block_size(hellaswag_data):
    module = load("train_gpt2")
    path = str(hellaswag_data / "hellaswag" / "hellaswag_val.npz")
    longest = int(np.load(path)["length"].max())
    assert longest == module.load_hellaswag(path, longest)["tokens"].shape[2]
    with pytest.raises(ValueError, match=f"{longest} tokens, but --block_size is {longest - 1}"):
        module.load_hellaswag(path, longest - 1)


def test_hellaswag_does_not_change_training(hellaswag_run, hellaswag_data, tmp_path, monkeypatch):
    monkeypatch.chdir(hellaswag_data)
    done = train_with_hellaswag(tmp_path / "log", hellaswag_interval=0)
    assert not losses(tmp_path / "log", "hella")
    assert "HellaSwag" not in done.stdout
    assert weights(tmp_path / "log", 4) == weights(hellaswag_run[1], 4)


def test_hellaswag_on_two_ranks_gives_the_scores_of_one(hellaswag_data, two_ranks, tmp_path, monkeypatch):
    """Without dropout, which depends on the number of ranks."""
    monkeypatch.chdir(hellaswag_data)
    train_with_hellaswag(tmp_path / "log", dropout=0)
    scores = losses(tmp_path / "log", "hella")
    assert list(scores) == [0, 3, 4]
    assert losses(two_ranks / "hellaswag", "hella") == scores


@pytest.mark.parametrize(
    "reason, needles",
    [
        ("bytes", ["GPT-2's tokenizer"]),
        ("missing", ["hellaswag/hellaswag_val.npz is missing", "python hellaswag.py --prepare"]),
        ("damaged", ["is damaged", "hellaswag.py --prepare"]),
        ("too long", ["longest example", "--block_size is 16"]),
    ],
)
def test_training_continues_without_hellaswag_and_says_so_once(
    reason, needles, hellaswag_data, byte_shards, tmp_path, monkeypatch
):
    shutil.copytree(hellaswag_data, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    flags = ["--data_dir", byte_shards] if reason == "bytes" else []
    if reason == "missing":
        shutil.rmtree("hellaswag")
    if reason == "damaged":
        os.truncate("hellaswag/hellaswag_val.npz", 500)
    done = train_with_hellaswag(tmp_path / "log", *flags, block_size=16, total_batch_size=128)
    (line,) = lines_with("no HellaSwag", done.stdout)
    for needle in needles:
        assert needle in line
    assert not losses(tmp_path / "log", "hella")
    assert len(losses(tmp_path / "log")) == 4
    assert os.path.exists("hellaswag") == (reason != "missing")


def test_hellaswag_and_samples_do_not_use_the_compiled_model(hellaswag_data, tmp_path, monkeypatch):
    """Their shapes vary: compiled code would be compiled again for each of them."""
    monkeypatch.chdir(hellaswag_data)
    flags = hellaswag_flags(eval_interval=1, hellaswag_interval=1, max_steps=2)
    _, counter = compile_and_count(monkeypatch, *flags, *paths("data", tmp_path / "log"))
    assert len(losses(tmp_path / "log", "hella")) == 3
    assert counter.graphs == 3  # compile_error()'s function, training and validation
