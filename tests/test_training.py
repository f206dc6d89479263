"""Training runs of train_gpt2.py: what they log, save, resume and share with more processes."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, TINY, call, command, load, losses, read_log, read_windows, run, torchrun, write_data_set
from safetensors.torch import load_file

STEP_LINE = re.compile(
    r"step +(\d+) \| loss: \d+\.\d{3} \| lr \d\.\de-\d\d \| norm: \S+ \| dt: \d+\.\dms \| "
    r"tok/s: \d+\.\d \| mfu: \d+\.\d%"
)
LOG_LINE = {
    "train": r"\d+\.\d{6}",
    "val": r"\d+\.\d{4}",
    "lr": r"\d\.\d+e-\d\d",
    "norm": r"\d+\.\d+",
    "tok/s": r"\d+\.\d",
}


def train(data_dir, log_dir, *flags):
    """A run in this process; returns its CompletedProcess."""
    module = load("train_gpt2")
    module.matmul_peak = lambda *_: 1e12  # measured in the runs of their own processes; it takes its time
    done = call(module, *TINY, "--data_dir", data_dir, "--log_dir", log_dir, *flags)
    assert done.returncode == 0, done.stderr
    return done


def changed(folder, line):
    """A copy of train_gpt2.py in folder that runs a line of code before main(): its path, for torchrun."""
    (folder / "changed.py").write_text(
        (ROOT / "train_gpt2.py").read_text().replace("\nif __name__", f"\n{line}\nif __name__")
    )
    return folder / "changed"


def weights_file(log_dir, step=5):
    return log_dir / f"step_{step:06d}" / "model.safetensors"


def comparable_weights(log_dir, step=5):
    """The tensors of a checkpoint, without the biases of the keys.

    These shift all scores of a query alike, so their true gradient is 0 and what AdamW makes of it is noise.
    """
    tensors = load_file(weights_file(log_dir, step))
    for name in [name for name in tensors if name.endswith("c_attn.bias")]:
        q, _, v = tensors.pop(name).chunk(3)
        tensors |= {f"{name} of q": q, f"{name} of v": v}
    return tensors


def checkpoints(log_dir):
    return sorted(path.name for path in log_dir.iterdir() if path.is_dir())


def shown(log_dir):
    """The figures of log.txt that a run must reproduce: all but the speed."""
    return {key: value for key, value in read_log(log_dir).items() if key[1] != "tok/s"}


# --------------------------------------------------------------------------------------- output
@pytest.fixture(scope="module")
def one_run(byte_shards, tmp_path_factory):
    """(stdout, log directory) of five steps with a validation at 0, 2, 4 and 5."""
    log_dir = tmp_path_factory.mktemp("one_run") / "log"
    return train(byte_shards, log_dir, "--eval_interval", 2).stdout, log_dir


def test_step_lines_have_the_promised_form(one_run):
    lines = [line for line in one_run[0].splitlines() if "| loss" in line]
    assert [STEP_LINE.fullmatch(line) and line[:10] for line in lines] == [f"step {step:5d}" for step in range(5)]


def test_log_file_has_one_figure_a_line(one_run):
    """build-nanogpt's format, the right digits, and every figure of every step."""
    text = (one_run[1] / "log.txt").read_text()
    for line in text.splitlines():
        step, kind, value = line.split(" ")
        assert re.fullmatch(LOG_LINE[kind], value), line
        assert step == str(int(step))
    expected = {(step, kind) for step in range(5) for kind in ("train", "lr", "norm", "tok/s")}
    assert read_log(one_run[1]).keys() == expected | {(step, "val") for step in (0, 2, 4, 5)}


def test_screen_and_log_file_agree(one_run):
    for step, loss in losses(one_run[1]).items():
        assert f"step {step:5d} | loss: {loss:.3f} " in one_run[0]
    for step, loss in losses(one_run[1], "val").items():
        assert f"step {step:5d} | val loss: {loss:.4f}" in one_run[0]


def test_header_shows_everything_resolved(one_run):
    header = one_run[0].split("step ")[0]
    for needle in ("--n_layer 2", "--weight_decay 0.1", "--dtype float32", f"torch {torch.__version__}", "cpu"):
        assert needle in header
    parameters = (257 + 16) * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    assert f"{parameters:,} parameters" in header


def test_samples_continue_the_prompt_at_every_validation(one_run):
    assert one_run[0].count("> KING") == 2 * 4


def test_first_loss_is_that_of_a_blind_guess(one_run):
    for kind in ("train", "val"):
        assert losses(one_run[1], kind)[0] == pytest.approx(math.log(257), abs=0.05)


def test_learning_rates_are_the_schedules(one_run):
    module = load("train_gpt2")
    for step, lr in losses(one_run[1], "lr").items():
        assert lr == pytest.approx(module.get_lr(step, 1e-3, 2, 5), rel=1e-3)


def test_a_small_model_learns_the_text(byte_shards, tmp_path):
    train(
        byte_shards,
        tmp_path / "log",
        "--eval_interval",
        400,
        "--max_steps",
        400,
        "--learning_rate",
        1e-2,
        "--warmup_steps",
        20,
    )
    tokens = np.load(byte_shards / "excerpt_val_000000.npy")
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert losses(tmp_path / "log", "val")[400] < -(share * np.log(share)).sum() - 0.3  # better than frequencies


# ---------------------------------------------------------------- accumulation and more processes
@pytest.fixture(scope="module")
def same_steps(byte_shards, tmp_path_factory):
    """{name: log directory} of five same steps: at once, in four parts, and in two processes, plain and compiled."""
    root = tmp_path_factory.mktemp("same_steps")
    train(byte_shards, root / "at once", "--micro_batch_size", 8)
    train(byte_shards, root / "in four", "--micro_batch_size", 2)
    flags = [*TINY, "--micro_batch_size", 2, "--data_dir", byte_shards, "--log_dir", root / "two processes"]
    done = torchrun(2, "train_gpt2", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step     0 | loss") == 1, "every process printed"
    aot_eager = "torch.compile = lambda model, compile=torch.compile: compile(model, backend='aot_eager')"
    script = changed(tmp_path_factory.mktemp("aot_eager"), aot_eager)  # as compiled, without the C++ compiler's minute
    done = torchrun(2, script, *flags[:-1], root / "two compiled", "--compile")
    assert done.returncode == 0 and "--compile True" in done.stdout, done.stderr
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("other", ["in four", "two processes", "two compiled"])
def test_sharing_out_a_step_keeps_the_weights(same_steps, other):
    expected, found = (comparable_weights(same_steps[name]) for name in ("at once", other))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():  # five steps of AdamW move a weight by about 3e-3
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("other", ["in four", "two processes", "two compiled"])
def test_sharing_out_a_step_keeps_the_logged_losses(same_steps, other):
    for kind, tolerance in (("train", 2e-6), ("val", 1.01e-4), ("norm", 1.01e-4)):
        expected, found = (losses(same_steps[name], kind) for name in ("at once", other))
        assert len(expected) == (2 if kind == "val" else 5)
        assert found == pytest.approx(expected, abs=tolerance), kind


def test_resume_on_another_number_of_processes_sees_the_same_data(same_steps, byte_shards, tmp_path):
    """Three steps in one process, the last two in two, against five in one."""
    train(byte_shards, tmp_path / "log", "--checkpoint_interval", 3)
    shutil.rmtree(tmp_path / "log" / "step_000005")
    flags = [*TINY, "--micro_batch_size", 2, "--data_dir", byte_shards, "--log_dir", tmp_path / "log", "--resume"]
    done = torchrun(2, "train_gpt2", *flags)
    assert done.returncode == 0, done.stderr
    assert "step     3 | loss" in done.stdout and "step     2 | loss" not in done.stdout
    assert losses(tmp_path / "log") == pytest.approx(losses(same_steps["at once"]), abs=2e-6)


# ----------------------------------------------------------------------------------- validation
def test_validation_loss_is_transformers_over_the_first_windows(byte_shards, tmp_path):
    """The first --val_tokens of the split in file order, however they are cut into batches."""
    for val_tokens, n in ((400, 25), (10**9, None)):  # 25 windows are three batches of 8 and one of 1
        log_dir = tmp_path / str(val_tokens)
        train(byte_shards, log_dir, "--val_tokens", val_tokens, "--learning_rate", 1e-2)
        model = transformers.AutoModelForCausalLM.from_pretrained(log_dir / "step_000005").eval()
        windows = torch.tensor(read_windows(byte_shards / "excerpt_val_000000.npy", 16)[:n])
        with torch.no_grad():
            logits = model(windows[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
        assert losses(log_dir, "val")[5] == pytest.approx(expected, abs=6e-5)


def test_evaluation_and_sampling_do_not_change_training(byte_shards, tmp_path):
    """Runs that look often and far, or seldom, end with the same bytes, dropout or not."""
    runs = {"often": (1, "Some longer prompt: ", 1600), "seldom": (100, "A", 16)}
    for name, (interval, prompt, val_tokens) in runs.items():
        flags = ["--eval_interval", interval, "--prompt", prompt, "--val_tokens", val_tokens, "--dropout", 0.1]
        train(byte_shards, tmp_path / name, *flags)
    often, seldom = (weights_file(tmp_path / name).read_bytes() for name in runs)
    assert often == seldom
    assert losses(tmp_path / "often") == losses(tmp_path / "seldom")
    assert len(losses(tmp_path / "often", "val")) == 6 and len(losses(tmp_path / "seldom", "val")) == 2


@pytest.mark.parametrize("flag", ["--no-shuffle", "--seed=7", "--dropout=0.2", "--weight_decay=0.9", "--grad_clip=0.1"])
def test_flags_of_training_reach_it(same_steps, byte_shards, tmp_path, flag):
    train(byte_shards, tmp_path / "log", flag)
    assert weights_file(tmp_path / "log").read_bytes() != weights_file(same_steps["at once"]).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_train_nearly_as_thirty_two(same_steps, byte_shards, tmp_path, dtype):
    train(byte_shards, tmp_path / "log", "--dtype", dtype)
    found, expected = losses(tmp_path / "log"), losses(same_steps["at once"])
    assert found == pytest.approx(expected, abs=0.02)
    assert found != expected, "these were 32 bits"


def test_run_without_the_vocabulary_trains_without_samples(tmp_path):
    """GPT-2 shards, no network and an empty cache: one line says why there are no samples."""
    write_data_set(tmp_path / "data", [np.arange(400)], [np.arange(100)], 50257)
    flags = [*TINY, "--max_steps", 1, "--data_dir", tmp_path / "data", "--log_dir", tmp_path / "log"]
    done = run("train_gpt2", *flags, env={"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty")})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if "TIKTOKEN_CACHE_DIR" in line]
    assert "sample" in line
    assert weights_file(tmp_path / "log", 1).exists()


# ---------------------------------------------------------------------------------- checkpoints
def test_checkpoint_opens_in_transformers_with_the_same_logits(one_run):
    path = one_run[1] / "step_000005"
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "sha256.json",
        "trainer.pt",
        "vocab.json",
    ]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    ours = load("train_gpt2").GPT.from_pretrained(path).eval()
    idx = torch.randint(257, (2, 16))
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=1e-5, atol=1e-5)
    tensors = load_file(path / "model.safetensors")
    assert tensors["transformer.wte.weight"].shape == (257, 32)
    assert not [name for name in tensors if "lm_head" in name]
    assert json.loads((path / "config.json").read_text())["tokenizer"] == "bytes"


def test_checkpoint_continues_text_in_transformers_pipeline(one_run):
    path = one_run[1] / "step_000005"
    pipeline = transformers.pipeline("text-generation", str(path), device="cpu")
    text = pipeline("KING", max_new_tokens=9, do_sample=False)[0]["generated_text"]
    model, enc = load("train_gpt2").GPT.from_pretrained(path).eval(), load("train_gpt2").get_tokenizer("bytes")
    idx = model.generate(torch.tensor([enc.encode("KING")]), 9, torch.Generator(), top_k=1)
    assert text == enc.decode(idx[0].tolist()).removesuffix("<|endoftext|>")


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_tokenizer_of_a_checkpoint_is_ours_in_transformers(name, tmp_path, request):
    if name == "gpt2":
        request.getfixturevalue("tiktoken_cache")
    module = load("train_gpt2")
    enc = module.get_tokenizer(name)
    module.GPT(module.GPTConfig(enc.n_vocab, 16, 1, 1, 8, tokenizer=name)).save_pretrained(tmp_path)
    for file, content in module.tokenizer_files(name).items():
        (tmp_path / file).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.eos_token_id) == (enc.n_vocab, enc.eot_token)
    for text in (
        "KING:\n  What's 12 x 34?",
        "".join(map(chr, range(1, 400))),
        "caf\u00e9 \u65e5\u672c \U0001f600\n\n ",
    ):
        assert theirs(text)["input_ids"] == enc.encode_ordinary(text)
        assert theirs.decode(enc.encode_ordinary(text)) == text


def test_trainer_file_needs_no_pickled_code(one_run):
    trainer = torch.load(one_run[1] / "step_000005" / "trainer.pt", weights_only=True)
    assert trainer["step"] == 5
    (adamw,) = trainer["optimizers"]
    assert len(adamw["state"]) == 2 + 2 * 12 + 2


@pytest.mark.parametrize("keep, left", [(2, [6, 7]), (0, [2, 4, 6, 7]), (1, [7])])
def test_newest_checkpoints_stay(byte_shards, tmp_path, keep, left):
    flags = ["--max_steps", 7, "--checkpoint_interval", 2, "--keep_checkpoints", keep]
    train(byte_shards, tmp_path / "log", *flags)
    assert checkpoints(tmp_path / "log") == [f"step_{step:06d}" for step in left]


# --------------------------------------------------------------------------------------- resume
def kill_when(process, condition):
    """Wait for condition, then kill the process with SIGKILL."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"the run ended by itself: {process.stderr.read().decode()}"
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("dropout, progress", [(0.0, "a checkpoint"), (0.1, "a log line")])
def test_killed_run_resumes_to_the_same_bytes(byte_shards, tmp_path, dropout, progress):
    flags = ["--max_steps", 120, "--checkpoint_interval", 20, "--eval_interval", 15, "--dropout", dropout]
    flags += ["--learning_rate", 1e-2]
    train(byte_shards, tmp_path / "whole", *flags)

    log_dir = tmp_path / "killed"
    line = command("train_gpt2", *TINY, *flags, "--data_dir", byte_shards, "--log_dir", log_dir)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if progress == "a checkpoint":
        kill_when(process, lambda: (log_dir / "step_000020").exists())
    else:  # 27 is neither a checkpoint nor a validation
        kill_when(process, lambda: (log_dir / "log.txt").exists() and "\n27 train" in (log_dir / "log.txt").read_text())
    process.stderr.close()
    assert checkpoints(log_dir), "killed before its first checkpoint"
    assert not (log_dir / "step_000120").exists(), "the run was not killed in time"

    done = train(byte_shards, log_dir, *flags, "--resume")
    assert "step     0 | loss" not in done.stdout, "it began anew"
    assert weights_file(log_dir, 120).read_bytes() == weights_file(tmp_path / "whole", 120).read_bytes()
    assert shown(log_dir) == shown(tmp_path / "whole")
    assert [name for name in checkpoints(log_dir) if name.startswith("step_")] == checkpoints(tmp_path / "whole")


def test_resume_cleans_up_what_a_crash_left(byte_shards, tmp_path):
    """Lines after the checkpoint, half a line and half a checkpoint are gone; nothing else is."""
    flags = ["--checkpoint_interval", 3, "--eval_interval", 3]
    train(byte_shards, tmp_path / "whole", *flags)
    log_dir = tmp_path / "log"
    shutil.copytree(tmp_path / "whole", log_dir)
    before = (log_dir / "log.txt").read_text().splitlines()
    shutil.rmtree(log_dir / "step_000005")
    (log_dir / "tmp_step_000005").mkdir()
    (log_dir / "tmp_step_000005" / "model.safetensors").write_bytes(b"half")
    (log_dir / "notes.md").write_text("mine")
    with open(log_dir / "log.txt", "a") as file:
        file.write("4 tra")
    train(byte_shards, log_dir, *flags, "--resume")
    assert shown(log_dir) == shown(tmp_path / "whole")
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


def test_resume_from_an_earlier_checkpoint_sets_the_later_ones_aside(same_steps, byte_shards, tmp_path):
    flags = ["--checkpoint_interval", 2, "--keep_checkpoints", 1]
    train(byte_shards, tmp_path / "log", *flags[:2])
    train(byte_shards, tmp_path / "log", *flags, "--resume", tmp_path / "log" / "step_000002", "--max_hours", 1e-9)
    assert checkpoints(tmp_path / "log") == ["former_step_000004", "former_step_000005", "step_000003"]
    train(byte_shards, tmp_path / "log", *flags, "--resume")
    assert checkpoints(tmp_path / "log")[2:] == ["step_000005"]
    assert losses(tmp_path / "log") == losses(same_steps["at once"])


def test_default_micro_batch_fits_whatever_a_process_has_of_the_batch(byte_shards, tmp_path):
    flags = [*TINY[: TINY.index("--micro_batch_size")], *TINY[TINY.index("--micro_batch_size") + 2 :]]
    done = call(
        "train_gpt2", *flags, "--total_batch_size", 96, "--data_dir", byte_shards, "--log_dir", tmp_path / "log"
    )
    assert done.returncode == 0 and "96 tokens a step = 3 x 1 x 2 x 16" in done.stdout, done.stderr


def test_resume_of_a_finished_run_changes_nothing(byte_shards, tmp_path):
    train(byte_shards, tmp_path / "log")
    before, figures = weights_file(tmp_path / "log").read_bytes(), read_log(tmp_path / "log")
    train(byte_shards, tmp_path / "log", "--resume")
    assert weights_file(tmp_path / "log").read_bytes() == before
    assert read_log(tmp_path / "log") == figures


def test_resume_without_a_checkpoint_starts_at_step_0(same_steps, byte_shards, tmp_path):
    train(byte_shards, tmp_path / "log", "--resume")
    assert weights_file(tmp_path / "log").read_bytes() == weights_file(same_steps["at once"]).read_bytes()


def test_pickled_code_in_a_checkpoint_is_refused_and_not_run(byte_shards, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "the code ran"),)

    train(byte_shards, tmp_path / "log")
    trainer = tmp_path / "log" / "step_000005" / "trainer.pt"
    torch.save({**torch.load(trainer, weights_only=True), "extra": Code()}, trainer)
    checksums = json.loads((trainer.parent / "sha256.json").read_text())
    checksums["trainer.pt"] = hashlib.sha256(trainer.read_bytes()).hexdigest()
    (trainer.parent / "sha256.json").write_text(json.dumps(checksums))
    done = call("train_gpt2", *TINY, "--data_dir", byte_shards, "--log_dir", tmp_path / "log", "--resume")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "step_000005" in done.stderr
    assert not (tmp_path / "the code ran").exists()


# ------------------------------------------------------------------------------- the whole chain
def test_prepare_train_and_open_elsewhere(tmp_path, text_file):
    """The two commands of a newcomer, in an empty folder, and transformers on what they made."""
    prepared = run("prepare_shakespeare", "--input", text_file, cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    flags = ["--preset", "shakespeare", "--max_steps", 3, "--device", "cpu"]
    trained = run("train_gpt2", *flags, cwd=tmp_path)
    assert (trained.returncode, trained.stderr) == (0, "")
    assert trained.stdout.count("val loss") == 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "log" / "step_000003")
    out = model.generate(torch.tensor([[*b"KING"]]), max_new_tokens=5, do_sample=False, pad_token_id=256)
    assert out.shape == (1, 9) and out[0, :4].tolist() == [*b"KING"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "shakespeare"]


def test_gpt2_tokens_of_tiny_shakespeare_start_at_10_82(tiny_shakespeare, tiktoken_cache, tmp_path):
    done = call("prepare_shakespeare", "--input", tiny_shakespeare, "--tokenizer", "gpt2", "--out_dir", tmp_path / "t")
    assert done.returncode == 0, done.stderr
    done = train(tmp_path / "t", tmp_path / "log", "--max_steps", 1)
    assert losses(tmp_path / "log")[0] == pytest.approx(10.82, abs=0.05)
    assert done.stdout.count("> KING") == 4
    assert json.loads((tmp_path / "log" / "step_000001" / "config.json").read_text())["eos_token_id"] == 50256


# ----------------------------------------------------------------------------------- fine-tuning
NO_SHAPE = TINY[6:]  # TINY without --n_layer, --n_head and --n_embd


@pytest.fixture
def pretrained(tmp_path):
    """A directory with a random GPT2LMHeadModel over bytes, and the model."""
    shape = dict(vocab_size=257, n_positions=40, n_layer=3, n_head=3, n_embd=48, n_inner=100)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, activation_function="relu")).eval()
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", model


def train_from(directory, data_dir, log_dir, *flags):
    module = load("train_gpt2")
    module.matmul_peak = lambda *_: 1e12
    given = [*NO_SHAPE, "--data_dir", data_dir, "--log_dir", log_dir, "--init_from", directory, *flags]
    return call(module, *given)


def test_fine_tuning_starts_from_the_models_own_loss_and_lowers_it(pretrained, byte_shards, tmp_path):
    """Positions are cropped from 40 to 16; the checkpoint keeps the other shapes."""
    directory, theirs = pretrained
    done = train_from(directory, byte_shards, tmp_path / "log", "--max_steps", 20, "--learning_rate", 1e-2)
    assert done.returncode == 0, done.stderr
    windows = torch.tensor(read_windows(byte_shards / "excerpt_val_000000.npy", 16)[:25])
    with torch.no_grad():
        logits = theirs(windows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    val = losses(tmp_path / "log", "val")
    assert val[0] == pytest.approx(expected, abs=6e-5)
    assert val[20] < val[0] - 0.5
    config = json.loads((tmp_path / "log" / "step_000020" / "config.json").read_text())
    names = ("n_layer", "n_head", "n_embd", "n_inner", "activation_function", "n_positions")
    assert [config[name] for name in names] == [3, 3, 48, 100, "relu", 16]


def test_fine_tuning_resumes_without_starting_over(pretrained, byte_shards, tmp_path):
    for name in ("whole", "log"):
        done = train_from(pretrained[0], byte_shards, tmp_path / name, "--checkpoint_interval", 3)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "log" / "step_000005")
    done = train_from(pretrained[0], byte_shards, tmp_path / "log", "--checkpoint_interval", 3, "--resume")
    assert done.returncode == 0 and "resuming at step 3" in done.stdout
    assert weights_file(tmp_path / "log").read_bytes() == weights_file(tmp_path / "whole").read_bytes()


# ----------------------------------------------------------------------------------------- muon
def test_muon_shared_by_two_processes_and_resumed_ends_where_one_process_does(byte_shards, tmp_path):
    muon = ["--optimizer", "muon", "--schedule", "linear", "--checkpoint_interval", 3]
    train(byte_shards, tmp_path / "one", *muon)
    shutil.copytree(tmp_path / "one", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "step_000005")
    train(byte_shards, tmp_path / "resumed", *muon, "--resume")
    assert weights_file(tmp_path / "resumed").read_bytes() == weights_file(tmp_path / "one").read_bytes()
    flags = [*TINY, *muon, "--micro_batch_size", 4, "--data_dir", byte_shards, "--log_dir", tmp_path / "two"]
    done = torchrun(2, "train_gpt2", *flags)
    assert done.returncode == 0, done.stderr
    expected, found = (comparable_weights(tmp_path / name) for name in ("one", "two"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-6)


def test_linear_schedule_lets_a_run_be_prolonged_before_its_end_begins(byte_shards, tmp_path):
    """Ten steps' plateau ends at step 4: from step 4 the run may become one of twelve, and is its very twin."""
    linear = ["--schedule", "linear", "--checkpoint_interval", 4, "--keep_checkpoints", 0]
    for name, steps in (("twelve", 12), ("ten", 10)):
        train(byte_shards, tmp_path / name, *linear, "--max_steps", steps)
    for step in (10, 8):
        shutil.rmtree(tmp_path / "ten" / f"step_{step:06d}")
    train(byte_shards, tmp_path / "ten", *linear, "--max_steps", 12, "--resume")
    assert weights_file(tmp_path / "ten", 12).read_bytes() == weights_file(tmp_path / "twelve", 12).read_bytes()
    module = load("train_gpt2")
    flags = [*TINY, *linear, "--data_dir", byte_shards, "--log_dir", tmp_path / "twelve", "--max_steps", 14, "--resume"]
    done = call(module, *flags)
    assert done.returncode == 2 and "--max_steps is 14" in done.stderr and "12" in done.stderr


# ------------------------------------------------------------------------------------ hellaswag
GPT2_TOKENS = [*TINY, "--hellaswag_interval", 3, "--max_steps", 4, "--eval_interval", 4]


@pytest.fixture
def hellaswag(tmp_path, tiktoken_cache, monkeypatch):
    """The current directory, with GPT-2 shards of random tokens in data/ and 37 examples where HellaSwag's are."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    write_data_set("data", [rng.integers(50257, size=700)], [rng.integers(50257, size=99)], 50257)
    (tmp_path / "hellaswag").mkdir()
    words = (ROOT / "input.txt").read_text(encoding="utf-8").split()[:5000]
    with open("hellaswag/hellaswag_val.jsonl", "w") as file:
        for ind in range(37):
            context, *endings = (
                " ".join(words[at : at + n]) for at, n in zip(rng.integers(4900, size=5), (3, 9, 1, 4, 12), strict=True)
            )
            example = {"ind": ind, "label": int(rng.integers(4)), "ctx": context, "endings": endings}
            file.write(json.dumps(example) + "\n")
    return tmp_path


def train_with_hellaswag(log_dir, *flags):
    module = load("train_gpt2")
    module.matmul_peak, module.HELLASWAG_SIZE = lambda *_: 1e12, 37
    done = call(module, *GPT2_TOKENS, "--data_dir", "data", "--log_dir", log_dir, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    return done


def test_hellaswag_in_training_is_hellaswag_py_on_the_checkpoint(hellaswag):
    """At every interval and at the end; some rows are longer than the 16 positions; training is not changed."""
    done = train_with_hellaswag("log", "--checkpoint_interval", 3)
    found = losses("log", "hella")
    assert list(found) == [0, 3, 4]
    assert f"step     4 | HellaSwag acc_norm: {found[4]:.4f}" in done.stdout
    for step in (3, 4):
        scores = ["--model", f"log/step_{step:06d}", "--data", "hellaswag/hellaswag_val.jsonl", "--device", "cpu"]
        scored = call("hellaswag", *scores)
        assert scored.returncode == 0, scored.stderr
        assert float(scored.stdout.split()[-1]) == found[step]
    train_with_hellaswag("without", "--hellaswag_interval", 0)
    assert not losses("without", "hella")
    assert weights_file(hellaswag / "without", 4).read_bytes() == weights_file(hellaswag / "log", 4).read_bytes()


def test_hellaswag_shared_by_two_processes_is_that_of_one(hellaswag):
    train_with_hellaswag("one")
    flags = [*GPT2_TOKENS, "--micro_batch_size", 4, "--data_dir", "data", "--log_dir", "two"]
    done = torchrun(2, changed(hellaswag, "HELLASWAG_SIZE = 37"), *flags)
    assert done.returncode == 0, done.stderr
    assert losses("two", "hella") == losses("one", "hella")


@pytest.mark.parametrize("why", ["other tokens", "no network", "damaged"])
def test_training_goes_on_without_hellaswag_and_says_so_once(why, hellaswag, byte_shards):
    if why == "no network":
        shutil.rmtree(hellaswag / "hellaswag")
    if why == "damaged":
        with open("hellaswag/hellaswag_val.jsonl", "a") as file:
            file.write("{}\n")
    done = train_with_hellaswag("log", *(["--data_dir", byte_shards] if why == "other tokens" else []))
    lines = [line for line in done.stdout.splitlines() if "no HellaSwag" in line]
    assert len(lines) == 1 and not losses("log", "hella") and len(losses("log")) == 4
    assert {"other tokens": "GPT-2's tokens", "no network": "HTTPSConnectionPool", "damaged": "line 38"}[why] in lines[
        0
    ]
    assert not (hellaswag / "hellaswag").exists() or why != "no network"


def test_evaluations_leave_a_compiled_model_as_it_is(hellaswag, monkeypatch):
    """One graph forward through a whole run with validations, samples and HellaSwag at other shapes."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, compile=torch.compile: compile(model, backend=count))
    train_with_hellaswag("log", "--compile", "--eval_interval", 1, "--hellaswag_interval", 1)
    assert len(losses("log", "hella")) == 5
    assert len(graphs) == 2  # try_compile's addition, and the model


def test_training_goes_on_where_nothing_compiles_and_says_so_once(byte_shards, tmp_path):
    nowhere = {"CXX": "no-such-compiler", "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    line = command("train_gpt2", *TINY, "--data_dir", byte_shards, "--log_dir", tmp_path / "log", "--compile")
    done = subprocess.run(line, env=os.environ | nowhere, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (why,) = (line for line in done.stdout.splitlines() if "no torch.compile" in line)
    assert "no-such-compiler" in why and "--compile False" in done.stdout
    assert len(losses(tmp_path / "log")) == 5
