"""Training runs of train_gpt2.py: log, samples, processes, dtypes, checkpoints, HellaSwag."""

import importlib.machinery
import json
import os
import re
import shutil
import sys
import time
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import (
    NO_SHAPE,
    ROOT,
    Run,
    assert_user_error,
    at_loss,
    call,
    files_in,
    load,
    losses,
    names_in,
    random_gpt2,
    read_log,
    read_windows,
    reproducible,
    run,
    sign,
    succeed,
    tiny_flags,
    weights_file,
    write_data_set,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

STEP_LINE = re.compile(
    r"step +(\d+) \| loss: (\S+) \| lr \S+ \| norm: \S+ \| dt: (\S+)ms \| tok/s: (\S+) \| .*eta (\S+)"
)
LOG_LINE = {
    "train": r"\d+\.\d{6}",
    "val": r"\d+\.\d{4}",
    "lr": r"\d\.\d{4}e-\d\d",
    "norm": r"\d+\.\d{4}",
    "tok/s": r"\d+\.\d",
}


def try_to_train(data_dir, log_dir, *flags, **changes):
    """Run train_gpt2.py in this process with TINY flags, some of them changed."""
    return call("train_gpt2", *tiny_flags(**changes), "--data_dir", data_dir, "--log_dir", log_dir, *flags)


def train(data_dir, log_dir, *flags, **changes):
    """Run train_gpt2.py as try_to_train does. It must succeed without a warning. Returns its output."""
    done = try_to_train(data_dir, log_dir, *flags, **changes)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def train_on_ranks(ranks, data_dir, log_dir, *flags, before=None, **changes):
    """Run train_gpt2.py in several processes. Returns the output of rank 0, the only one with output."""
    flags = [*tiny_flags(**changes), "--data_dir", data_dir, "--log_dir", log_dir, *flags]
    results = Run(*flags, ranks=ranks, before=before).wait()
    assert [(done.returncode, done.stderr) for done in results] == [(0, "")] * ranks
    assert [done.stdout for done in results[1:]] == [""] * (ranks - 1)
    return results[0].stdout


def weights(log_dir, step=5):
    """Return the bytes of the weights in a checkpoint."""
    return weights_file(log_dir, step).read_bytes()


def assert_same_losses(log_dir, expected_log_dir):
    """Check that two runs logged the same losses and norms, except for rounding.

    Equal later losses mean equal updates. One run may have more validations.
    """
    for kind, tolerance in (("train", 2e-6), ("norm", 1.01e-4), ("val", 1.01e-4)):
        actual, expected = losses(log_dir, kind), losses(expected_log_dir, kind)
        steps = actual.keys() & expected.keys()
        assert len(steps) >= 2
        for step in steps:
            assert actual[step] == pytest.approx(expected[step], abs=tolerance), (kind, step)


def remove_checkpoint(log_dir, step=5):
    """Delete a checkpoint, as if the run had been killed before it."""
    shutil.rmtree(log_dir / f"step_{step:06d}")


def lines_with(text, output):
    """Return the lines of the output that contain a text."""
    return [line for line in output.splitlines() if text in line]


def transformers_loss(model, windows):
    """Return the mean loss of a transformers model over windows, lists of T + 1 tokens."""
    windows = torch.tensor(windows)
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


@pytest.fixture(scope="module")
def one_run(byte_shards, tmp_path_factory):
    """(stdout, log directory) of five steps, with validations and checkpoints at 0, 2, 4 and 5."""
    log_dir = tmp_path_factory.mktemp("one_run") / "log"
    stdout = train(byte_shards, log_dir, eval_interval=2, checkpoint_interval=2, keep_checkpoints=0)
    return stdout, log_dir


# --------------------------------------------------------------------------------------- output
def test_lines_on_the_screen_and_in_the_log_have_the_documented_form(one_run):
    """Lines of the log are "step kind value", as in build-nanogpt. Other kinds may be added."""
    stdout, log_dir = one_run
    matches = [STEP_LINE.fullmatch(line) for line in lines_with("| loss", stdout)]
    expected = {step: f"{loss:.3f}" for step, loss in losses(log_dir).items()}
    assert {int(match[1]): match[2] for match in matches} == expected
    assert list(expected) == [0, 1, 2, 3, 4]
    for step, loss in losses(log_dir, "val").items():
        assert f"step {step:5d} | val loss: {loss:.4f}" in stdout
    for (_, kind), value in read_log(log_dir).items():
        assert re.fullmatch(LOG_LINE.get(kind, r"\S+"), value), (kind, value)
    names = {(step, "val") for step in (0, 2, 4, 5)}
    for kind in ("train", "lr", "norm", "tok/s"):
        names |= {(step, kind) for step in range(5)}
    assert names <= read_log(log_dir).keys()


def test_two_different_samples_continue_the_prompt_at_every_validation(one_run):
    samples = one_run[0].split("> KING")[1:]
    assert len(samples) == 2 * 4
    assert samples[-2].strip() != samples[-1].strip()


def test_an_empty_prompt_samples_from_the_end_of_text_token(byte_shards, tmp_path):
    stdout = train(byte_shards, tmp_path / "log", prompt="", max_steps=1)
    assert stdout.count("> <|endoftext|>") == 4


def test_samples_contain_no_control_characters(byte_shards, tmp_path):
    """A model that has learned nothing samples all bytes."""
    stdout = train(byte_shards, tmp_path / "log", prompt="\x1b[31m\x9b", max_steps=1, max_new_tokens=100)
    assert stdout.count("> \ufffd[31m\ufffd") == 4
    samples = stdout.partition("val loss")[2]
    assert all(character.isprintable() or character == "\n" for character in samples)


def test_an_ascii_terminal_shows_question_marks(byte_shards, tmp_path):
    def before(rank):
        sys.stdout.reconfigure(encoding="ascii")

    stdout = train_on_ranks(1, byte_shards, tmp_path / "log", before=before, prompt="caf\u00e9", max_steps=1)
    assert stdout.isascii() and stdout.count("> caf?") == 4


def test_step_lines_show_duration_speed_and_the_time_left(one_run, byte_shards, tmp_path):
    """On this clock a step takes 10 s, the first one 100 s more, and evaluation takes no time.

    --log_interval concerns the screen and not the log file.
    """

    def before(rank):
        durations = iter([0, 110, 10, 10, 10, 10])
        now = next(durations)

        def take_time(optimizer, args, kwargs):
            nonlocal now
            now += next(durations)

        register_optimizer_step_pre_hook(take_time)
        time.perf_counter = time.monotonic = lambda: now

    stdout = train_on_ranks(1, byte_shards, tmp_path / "log", before=before, log_interval=2)
    rows = []
    for line in lines_with("| loss", stdout):
        step, _, *figures = STEP_LINE.fullmatch(line).groups()
        rows.append((step, *figures))
    assert rows == [
        ("0", "110000.0", "1.2", "0:07:20"),
        ("2", "10000.0", "12.8", "0:00:20"),
        ("4", "10000.0", "12.8", "0:00:00"),
    ]
    assert losses(tmp_path / "log") == losses(one_run[1])


def test_a_small_model_learns_more_than_character_frequencies(byte_shards, tmp_path):
    changes = {"max_steps": 200, "eval_interval": 200, "learning_rate": 2e-2, "optimizer": "muon"}
    train(byte_shards, tmp_path / "log", log_interval=200, **changes)
    tokens = np.load(byte_shards / "excerpt_val_000000.npy")
    frequencies = np.unique(tokens, return_counts=True)[1] / len(tokens)
    entropy = -(frequencies * np.log(frequencies)).sum()
    assert losses(tmp_path / "log", "val")[200] < entropy - 0.3


# ----------------------------------------------------------- gradient accumulation and processes
@pytest.mark.parametrize("ranks, micro_batch_size", [(1, 2), (2, 2), (2, 4)])
def test_any_split_of_a_batch_gives_the_same_losses(one_run, byte_shards, tmp_path, ranks, micro_batch_size):
    """A step has 8 windows. The 25 windows of validation data do not divide evenly."""
    train_on_ranks(ranks, byte_shards, tmp_path / "log", micro_batch_size=micro_batch_size)
    assert_same_losses(tmp_path / "log", one_run[1])


def test_the_ranks_communicate_in_the_last_of_four_micro_steps_only(byte_shards, tmp_path):
    def before(rank):
        no_sync = DistributedDataParallel.no_sync

        def recording_no_sync(model):
            with open(tmp_path / str(rank), "a") as file:
                file.write(".")
            return no_sync(model)

        DistributedDataParallel.no_sync = recording_no_sync

    train_on_ranks(2, byte_shards, tmp_path / "log", before=before, micro_batch_size=1, max_steps=2)
    assert [(tmp_path / rank).read_text() for rank in "01"] == 2 * ["......"]


def test_the_default_micro_batch_divides_the_windows_of_a_rank(byte_shards, tmp_path):
    """Three windows per rank: on a CPU, micro-batches have a power of two of them."""
    changes = {"total_batch_size": 96, "max_steps": 2}
    train(byte_shards, tmp_path / "expected", micro_batch_size=6, **changes)
    train_on_ranks(2, byte_shards, tmp_path / "log", micro_batch_size=None, **changes)
    assert_same_losses(tmp_path / "log", tmp_path / "expected")


def test_muon_on_two_ranks_or_resumed_ends_where_one_process_does(byte_shards, tmp_path):
    changes = {"optimizer": "muon", "checkpoint_interval": 3}
    train(byte_shards, tmp_path / "one", **changes)
    shutil.copytree(tmp_path / "one", tmp_path / "resumed")
    remove_checkpoint(tmp_path / "resumed")
    train(byte_shards, tmp_path / "resumed", "--resume", **changes)
    assert weights(tmp_path / "resumed") == weights(tmp_path / "one")
    train_on_ranks(2, byte_shards, tmp_path / "two", micro_batch_size=4, **changes)
    assert_same_losses(tmp_path / "two", tmp_path / "one")


def test_every_rank_and_step_has_its_own_dropout(tmp_path):
    """All windows of these data are equal and the weights stay, so only dropout makes a difference."""
    tokens = np.tile(np.arange(16), 20)
    data_dir = write_data_set(tmp_path / "data", [tokens], [tokens])

    def before(rank):
        def record(loss):
            with open(tmp_path / "losses", "a") as file:
                file.write(f"{loss.item():.5f}\n")
            return loss

        # record the losses of five micro-batches
        for number in range(5):
            at_loss(number, record)(rank)

    changes = {"micro_batch_size": 4, "dropout": 0.2, "learning_rate": 1e-12, "weight_decay": 0}
    train_on_ranks(2, data_dir, tmp_path / "log", before=before, **changes)
    values = (tmp_path / "losses").read_text().split()
    assert len(values) == len(set(values)) == 2 * 5


# --------------------------------------------------------------------------------- torch.compile
def count_graphs(path):
    """Return a function for Run(before=...) that compiles without generating code, and counts the graphs.

    Each graph adds a line to path. The trainer's probe of the compiler has one input and is not counted.
    """

    def before(rank):
        compile_graph = torch._dynamo.lookup_backend("aot_eager")

        def count_graph(graph, inputs):
            if len(inputs) > 1:
                with open(f"{path}_{rank}", "a") as file:
                    file.write("graph\n")
            return compile_graph(graph, inputs)

        torch.compile = partial(torch.compile, backend=count_graph)

    return before


def test_compiled_ddp_without_accumulation_is_split_at_its_buckets(byte_shards, tmp_path):
    """This model of 2 MB has two buckets. The smaller last batch of a validation compiles nothing."""

    def before(rank):
        count_graphs(tmp_path / "graphs")(rank)
        ddp = torch.nn.parallel.DistributedDataParallel
        torch.nn.parallel.DistributedDataParallel = partial(ddp, bucket_cap_mb=1)

    changes = {"n_layer": 1, "n_embd": 192, "max_steps": 2}
    train(byte_shards, tmp_path / "expected", **changes)
    changes["micro_batch_size"] = 4
    train_on_ranks(2, byte_shards, tmp_path / "log", "--compile", before=before, **changes)
    for rank in (0, 1):
        assert (tmp_path / f"graphs_{rank}").read_text().count("graph") == 2 + 1
    assert_same_losses(tmp_path / "log", tmp_path / "expected")


@pytest.mark.skipif("INDUCTOR" not in os.environ, reason="takes a minute and a C++ compiler: set INDUCTOR=1")
def test_compiled_code_gives_the_same_losses(byte_shards, tmp_path):
    """With inductor, PyTorch's default."""
    changes = {"n_layer": 1, "max_steps": 3}
    train(byte_shards, tmp_path / "expected", **changes)
    flags = [*tiny_flags(**changes), "--data_dir", byte_shards, "--log_dir", tmp_path / "log", "--compile"]
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = run("train_gpt2", *flags, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert list((tmp_path / "cache").rglob("*.cpp")), "nothing was compiled"
    assert_same_losses(tmp_path / "log", tmp_path / "expected")


def test_a_missing_compiler_is_one_line(byte_shards, tmp_path, monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    done = try_to_train(byte_shards, tmp_path / "log", "--compile")
    assert_user_error(done, "no C++ compiler", "--no-compile")
    assert not (tmp_path / "log" / "log.txt").exists()


# ----------------------------------------------------------------------------------- validation
@pytest.mark.gpt2
@pytest.mark.parametrize("val_tokens, num_windows", [(400, 25), (10**9, None), (1, 1)])
def test_the_validation_loss_is_that_of_transformers(byte_shards, tmp_path, val_tokens, num_windows):
    """It covers the first --val_tokens of the split, at least one window, in batches of any size."""
    train(byte_shards, tmp_path / "log", val_tokens=val_tokens, learning_rate=1e-2, dropout=0.2)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "log" / "step_000005").eval()
    windows = read_windows(byte_shards / "excerpt_val_000000.npy", 16)[:num_windows]
    assert losses(tmp_path / "log", "val")[5] == pytest.approx(transformers_loss(model, windows), abs=6e-5)


def test_evaluation_and_sampling_do_not_change_training(byte_shards, tmp_path):
    """Runs that evaluate often or rarely, much or little, end with the same bytes."""
    often = {"eval_interval": 1, "prompt": "Some longer prompt: ", "val_tokens": 1600}
    rarely = {"eval_interval": 100, "prompt": "A", "val_tokens": 16}
    train(byte_shards, tmp_path / "often", dropout=0.1, **often)
    train(byte_shards, tmp_path / "rarely", dropout=0.1, **rarely)
    assert weights(tmp_path / "often") == weights(tmp_path / "rarely")
    assert len(losses(tmp_path / "often", "val")) == 6
    assert len(losses(tmp_path / "rarely", "val")) == 2


def test_a_run_without_gpt2s_vocabulary_trains_without_samples(tmp_path, monkeypatch):
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    write_data_set(tmp_path / "data", [np.arange(400)], [np.arange(100)], 50257)
    done = try_to_train("data", "log", max_steps=1)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: ") and done.stderr.count("\n") == 1
    assert weights_file(tmp_path / "log", 1).exists()


@pytest.mark.parametrize("source", ["--resume", "--init_from"])
def test_eval_only_prints_the_loss_of_a_checkpoint_and_writes_nothing(one_run, byte_shards, tmp_path, source):
    shutil.copytree(one_run[1], tmp_path / "log")
    before = files_in(tmp_path)
    flags = ["--resume"] if source == "--resume" else ["--init_from", tmp_path / "log", "--block_size", 16]
    flags += ["--val_tokens", 400, "--data_dir", byte_shards, "--log_dir", tmp_path / "log", "--device", "cpu"]
    done = call("train_gpt2", "--eval_only", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{losses(one_run[1], 'val')[5]:.4f}" in done.stdout
    assert "| loss" not in done.stdout
    assert files_in(tmp_path) == before


# ---------------------------------------------------------------------------------------- dtypes
TWENTY_STEPS = {"max_steps": 20, "learning_rate": 3e-3, "checkpoint_interval": 19, "eval_interval": 20}


@pytest.fixture(scope="module")
def run_in_dtype(byte_shards, tmp_path_factory):
    """{dtype: log directory} of 20 steps, with a checkpoint at step 19, in each of the dtypes."""
    root = tmp_path_factory.mktemp("run_in_dtype")
    with pytest.MonkeyPatch.context() as monkeypatch:
        grow_scale_often(monkeypatch)
        for dtype in ("float32", "bfloat16", "float16"):
            train(byte_shards, root / dtype, dtype=dtype, **TWENTY_STEPS)
    return {path.name: path for path in root.iterdir()}


def grow_scale_often(monkeypatch):
    """Let new gradient scalers start with the factor 1024, and double it after 10 steps."""
    scaler = partial(torch.amp.GradScaler, init_scale=1024, growth_interval=10)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_matches_float32(run_in_dtype, dtype):
    actual, expected = losses(run_in_dtype[dtype]), losses(run_in_dtype["float32"])
    assert len(expected) == 20 and expected[19] < expected[0] - 0.5
    assert actual == pytest.approx(expected, abs=0.02)
    assert actual != expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_resumed_run_keeps_its_dtype_and_ends_with_the_same_bytes(
    run_in_dtype, byte_shards, tmp_path, monkeypatch, dtype
):
    """The factor of float16 was doubled twice, after 10 and 20 steps."""
    grow_scale_often(monkeypatch)
    shutil.copytree(run_in_dtype[dtype], tmp_path / "log")
    remove_checkpoint(tmp_path / "log", 20)
    train(byte_shards, tmp_path / "log", "--resume", **TWENTY_STEPS)
    assert weights(tmp_path / "log", 20) == weights(run_in_dtype[dtype], 20)
    assert reproducible(tmp_path / "log") == reproducible(run_in_dtype[dtype])
    state = torch.load(tmp_path / "log" / "step_000020" / "trainer.pt", weights_only=True)
    assert state["scaler"].get("scale") == (4096 if dtype == "float16" else None)


@pytest.mark.parametrize("saved, chosen", [("bfloat16", "float16"), ("float16", "float32")])
def test_resuming_in_another_dtype_warns_and_works(run_in_dtype, byte_shards, tmp_path, saved, chosen):
    shutil.copytree(run_in_dtype[saved], tmp_path / "log")
    remove_checkpoint(tmp_path / "log", 20)
    done = try_to_train(byte_shards, tmp_path / "log", "--resume", dtype=chosen, **TWENTY_STEPS)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: ") and done.stderr.count("\n") == 1
    assert saved in done.stderr and chosen in done.stderr
    assert losses(tmp_path / "log") == pytest.approx(losses(run_in_dtype[saved]), abs=0.02)
    assert weights(tmp_path / "log", 20) != weights(run_in_dtype[saved], 20)


@pytest.mark.parametrize(
    "capabilities, n_embd, expected",
    [
        ({"amx_bf16": True}, 256, "bfloat16"),
        ({"avx512_bf16": True}, 256, "bfloat16"),
        ({"amx_bf16": True}, 128, "float32"),  # too small to gain
        ({"avx512_f": True, "amx_bf16": False}, 256, "float32"),
    ],
)
def test_the_default_dtype_of_a_cpu_depends_on_its_matmuls(
    byte_shards, tmp_path, monkeypatch, capabilities, n_embd, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    train(byte_shards, tmp_path / "log", n_layer=1, n_embd=n_embd, max_steps=1)
    assert json.loads((tmp_path / "log" / "run.json").read_text())["dtype"] == expected


# ---------------------------------------------------------------------------------- checkpoints
@pytest.mark.gpt2
def test_transformers_pipeline_continues_text_from_a_checkpoint(one_run):
    """The call without further arguments ends at the model's 16 positions. The tokenizer is in the checkpoint."""
    path = one_run[1] / "step_000005"
    pipeline = transformers.pipeline("text-generation", str(path), device="cpu")
    tokenizer = pipeline.tokenizer
    assert (len(tokenizer), tokenizer.eos_token_id) == (257, 256)
    assert tokenizer("caf\u00e9\n")["input_ids"] == [*"caf\u00e9\n".encode()]
    assert pipeline("KING")[0]["generated_text"].startswith("KING")
    text = pipeline("KING", max_new_tokens=9, do_sample=False)[0]["generated_text"]
    model = load("train_gpt2").GPT.from_pretrained(path).eval()
    idx = model.generate(torch.tensor([[*b"KING"]]), 9, torch.Generator(), top_k=1)
    tokens = idx[0].tolist()
    if 256 in tokens:  # transformers stops at the end of text
        tokens = tokens[: tokens.index(256)]
    assert text == bytes(tokens).decode(errors="replace")


@pytest.mark.gpt2
def test_a_run_on_gpt2_tokens_starts_at_10_82_and_saves_gpt2s_tokenizer(tiny_shakespeare, tiktoken_cache, tmp_path):
    flags = ["--input", tiny_shakespeare, "--tokenizer", "gpt2", "--out_dir", tmp_path / "data"]
    succeed("prepare_shakespeare", *flags)
    stdout = train(tmp_path / "data", tmp_path / "log", max_steps=1, hellaswag_interval=0)
    assert losses(tmp_path / "log")[0] == pytest.approx(10.82, abs=0.05)
    assert stdout.count("> KING") == 4
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "log" / "step_000001")
    assert (len(tokenizer), tokenizer.eos_token_id) == (50257, 50256)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "log" / "step_000001" / name).read_bytes() == (tmp_path / "data" / name).read_bytes()


@pytest.mark.parametrize("keep, expected", [(2, [6, 7]), (0, [2, 4, 6, 7])])
def test_the_newest_checkpoints_are_kept(byte_shards, tmp_path, keep, expected):
    train(byte_shards, tmp_path / "log", max_steps=7, checkpoint_interval=2, keep_checkpoints=keep)
    assert names_in(tmp_path / "log", "step_") == [f"step_{step:06d}" for step in expected]


# --------------------------------------------------------------------------------------- resume
def test_resuming_a_finished_run_changes_nothing_and_repeats_its_samples(byte_shards, tmp_path):
    first = train(byte_shards, tmp_path / "log")
    before = weights(tmp_path / "log"), read_log(tmp_path / "log")
    again = train(byte_shards, tmp_path / "log", "--resume")
    assert (weights(tmp_path / "log"), read_log(tmp_path / "log")) == before
    last_validation = first.partition("step     5 | val loss: ")[2]
    assert "> KING" in last_validation
    assert again.partition("step     5 | val loss: ")[2] == last_validation


def test_a_checkpoint_of_an_earlier_version_is_refused_and_its_model_can_be_used(one_run, byte_shards, tmp_path):
    """trainer.pt had another format then."""
    shutil.copytree(one_run[1], tmp_path / "log")
    checkpoint = tmp_path / "log" / "step_000005"
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)
    torch.save({**state, "format": 1}, checkpoint / "trainer.pt")
    sign(checkpoint)
    before = (tmp_path / "log" / "log.txt").read_text()
    assert_user_error(try_to_train(byte_shards, tmp_path / "log", "--resume"), "step_000005", "--init_from")
    assert (tmp_path / "log" / "log.txt").read_text() == before
    train(byte_shards, tmp_path / "new", "--init_from", checkpoint, "--seed", 7, **NO_SHAPE)


def test_the_best_model_is_kept_across_a_resume(byte_shards, tmp_path):
    """With this learning rate the loss falls once and then rises, also after the stop at step 6."""
    changes = {"learning_rate": 1, "max_steps": 12, "warmup_steps": 6, "eval_interval": 1}
    changes |= {"checkpoint_interval": 6, "keep_checkpoints": 0}
    train(byte_shards, tmp_path / "log", "--save_best", **changes)
    best = (tmp_path / "log" / "best" / "model.safetensors").read_bytes()
    val = losses(tmp_path / "log", "val")
    lowest = min(val, key=val.get)
    assert 0 < lowest < 6
    remove_checkpoint(tmp_path / "log", 12)
    train(byte_shards, tmp_path / "log", "--resume", "--save_best", **changes)
    assert (tmp_path / "log" / "best" / "model.safetensors").read_bytes() == best
    assert "trainer.pt" not in names_in(tmp_path / "log" / "best")
    train(byte_shards, tmp_path / "short", **{**changes, "checkpoint_interval": 1})
    assert best == weights(tmp_path / "short", lowest)


@pytest.fixture
def wandb(monkeypatch):
    """A mock in place of the module wandb."""
    wandb = mock.MagicMock(__spec__=importlib.machinery.ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_wandb_gets_the_metrics_and_a_resumed_run_continues_there(wandb, one_run, byte_shards, tmp_path):
    train(byte_shards, tmp_path / "log", "--wandb", "mine", checkpoint_interval=3)
    remove_checkpoint(tmp_path / "log")
    train(byte_shards, tmp_path / "log", "--resume", "--wandb", "mine", checkpoint_interval=3)
    first, second = [started.kwargs for started in wandb.init.call_args_list]
    assert first["project"] == second["project"] == "mine"
    assert first["id"] == second["id"] and second["resume"] == "allow"
    wandb_run = wandb.init.return_value
    train_losses = {}
    for logged in wandb_run.log.call_args_list:
        if "train" in logged.args[0]:
            train_losses[logged.kwargs["step"]] = logged.args[0]["train"]
    assert train_losses == losses(tmp_path / "log") == losses(one_run[1])
    assert wandb_run.finish.call_count == 2
    assert wandb_run.method_calls[-1] == mock.call.finish()


@pytest.mark.parametrize("broken", ["init", "log"])
def test_errors_of_wandb_do_not_end_a_run(wandb, one_run, byte_shards, tmp_path, broken):
    function = wandb.init if broken == "init" else wandb.init.return_value.log
    function.side_effect = ConnectionError("no route to host")
    done = try_to_train(byte_shards, tmp_path / "log", "--wandb", "mine")
    assert done.returncode == 0
    # log fails without a sign: a line for each step would hide the output
    assert done.stderr.count("warning: ") == done.stderr.count("\n") == (broken == "init")
    assert weights(tmp_path / "log") == weights(one_run[1])


def test_a_warmup_of_more_than_half_of_the_steps_gives_one_warning(byte_shards, tmp_path):
    done = try_to_train(byte_shards, tmp_path / "log", warmup_steps=3)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: ") and done.stderr.count("\n") == 1
    assert "--warmup_steps 3" in done.stderr and "--max_steps 5" in done.stderr


def test_wsd_allows_a_longer_run_until_the_decay_begins(byte_shards, tmp_path):
    """A run of ten steps, whose decay begins at step 4, can become a run of twelve steps there."""
    changes = {"schedule": "wsd", "checkpoint_interval": 4, "keep_checkpoints": 0}
    train(byte_shards, tmp_path / "twelve", max_steps=12, **changes)
    train(byte_shards, tmp_path / "ten", max_steps=10, **changes)
    for step in (10, 8):
        remove_checkpoint(tmp_path / "ten", step)
    train(byte_shards, tmp_path / "ten", "--resume", max_steps=12, **changes)
    assert weights(tmp_path / "ten", 12) == weights(tmp_path / "twelve", 12)
    done = try_to_train(byte_shards, tmp_path / "twelve", "--resume", max_steps=14, **changes)
    assert_user_error(done, "--max_steps", "14", "12")


# ---------------------------------------------------------------------------------- fine-tuning
@pytest.mark.gpt2
def test_fine_tuning_lowers_the_models_own_loss_and_resumes_to_the_same_bytes(byte_shards, tmp_path):
    """Positions are cropped from 40 to 16. Dropout is the flag's, 0, not the model's."""
    model = random_gpt2(tmp_path / "model")
    line = [byte_shards, tmp_path / "log", "--init_from", tmp_path / "model"]
    changes = {**NO_SHAPE, "max_steps": 20, "learning_rate": 1e-2, "checkpoint_interval": 10}
    train(*line, **changes)
    windows = read_windows(byte_shards / "excerpt_val_000000.npy", 16)[:25]
    val = losses(tmp_path / "log", "val")
    assert val[0] == pytest.approx(transformers_loss(model, windows), abs=6e-5)
    assert val[20] < val[0] - 0.5
    config = json.loads((tmp_path / "log" / "step_000020" / "config.json").read_text())
    assert [config[name] for name in ("n_layer", "n_head", "n_embd", "n_positions")] == [3, 3, 48, 16]
    assert (model.config.resid_pdrop, config["resid_pdrop"]) == (0.1, 0)
    whole = weights(tmp_path / "log", 20)
    remove_checkpoint(tmp_path / "log", 20)
    train(*line, "--resume", **changes)
    assert weights(tmp_path / "log", 20) == whole


# ------------------------------------------------------------------------------------ hellaswag
HELLASWAG = {  # two steps on GPT-2 tokens, with HellaSwag scores at steps 0 and 2
    "n_layer": 1,
    "n_embd": 16,
    "block_size": 72,  # above 64: the lengths of batches are rounded up to multiples of 64
    "total_batch_size": 4 * 72,
    "micro_batch_size": 4,
    "max_steps": 2,
    "eval_interval": 2,
    "hellaswag_interval": 2,
    "learning_rate": 1e-2,
    "max_new_tokens": 4,
}


@pytest.fixture
def hellaswag_folder(tiktoken_cache, tmp_path, monkeypatch):
    """The current directory, with shards of random GPT-2 tokens in data/, and ten prepared examples."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    write_data_set("data", [rng.integers(50257, size=1500)], [rng.integers(50257, size=400)], 50257)
    words = (ROOT / "input.txt").read_text(encoding="utf-8").split()
    with open("examples.jsonl", "w") as file:
        for ind in range(10):
            texts = []
            for num_words in (30 if ind % 5 == 0 else 3, 9, 1, 4, 12):  # context and endings
                start = rng.integers(5000)
                texts.append(" ".join(words[start : start + num_words]))
            example = {"ind": ind, "label": ind % 4, "ctx": texts[0], "endings": texts[1:]}
            file.write(json.dumps(example) + "\n")
    succeed("hellaswag", "--prepare", "--data", "examples.jsonl")
    return tmp_path


def test_two_compiled_ranks_give_the_losses_and_the_hellaswag_scores_of_one_process(hellaswag_folder):
    """There is one graph each for training and validation. test_hellaswag.py proves the scores.

    The shapes of HellaSwag's batches and of samples vary: each would be compiled again.
    """
    train("data", "one", **HELLASWAG)
    before = count_graphs(hellaswag_folder / "graphs")
    train_on_ranks(2, "data", "two", "--compile", before=before, **{**HELLASWAG, "micro_batch_size": 1})
    for rank in (0, 1):
        assert (hellaswag_folder / f"graphs_{rank}").read_text().count("graph") == 2
    assert losses("two", "hella") == losses("one", "hella")
    assert len(losses("two", "hella")) == 2
    assert_same_losses("two", "one")


@pytest.mark.parametrize("reason", ["bytes", "missing", "too long"])
def test_training_continues_without_hellaswag(reason, hellaswag_folder, byte_shards):
    data_dir = byte_shards if reason == "bytes" else "data"
    if reason == "missing":
        os.remove("hellaswag/hellaswag_val.npz")
    stdout = train(data_dir, "log", **{**HELLASWAG, "block_size": 16, "total_batch_size": 128})
    needles = {"bytes": [], "missing": ["hellaswag.py --prepare"], "too long": ["--block_size"]}
    lines = lines_with("HellaSwag", stdout)
    assert len(lines) == len(needles[reason])
    for line, needle in zip(lines, needles[reason], strict=True):
        assert needle in line
    assert not losses("log", "hella")
    assert len(losses("log")) == 2


def test_damaged_hellaswag_examples_are_refused(hellaswag_folder):
    os.truncate("hellaswag/hellaswag_val.npz", 500)
    done = try_to_train("data", "log", **HELLASWAG)
    assert_user_error(done, "hellaswag_val.npz", "hellaswag.py --prepare")
    assert not os.path.exists("log/log.txt")
