"""A user's mistakes: each ends with status 2 and one line that names what is wrong, the value and what mends it."""

import pickle

import pytest
import torch
from conftest import call, run

SMALL_GPT = [
    "--device",
    "cpu",
    "--n_layer",
    2,
    "--n_head",
    2,
    "--n_embd",
    32,
    "--block_size",
    16,
    "--max_steps",
    2,
    "--eval_iters",
    2,
    "--max_new_tokens",
    5,
]
scripts = pytest.mark.parametrize("script", ["bigram", "gpt", "prepare_shakespeare"])
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def check(done, *needles):
    """One line on stderr that has every needle, status 2, and no training before it."""
    assert done.returncode == 2, done.stdout[-500:] + done.stderr[-500:]
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for needle in needles:
        assert str(needle) in done.stderr, f"{needle} is not in: {done.stderr}"
    assert "loss" not in done.stdout, "the mistake was found after slow work"


# ----------------------------------------------------------------------------- processes of their own
def test_missing_input_in_a_process(tmp_path):
    check(run("bigram", "--input", "nowhere.txt", cwd=tmp_path), "nowhere.txt", "--input")


def test_unknown_prompt_in_a_process(tmp_path, text_file):
    check(run("gpt", "--input", text_file, *SMALL_GPT, "--prompt", "naïve", cwd=tmp_path), "--prompt", "ï")


# ------------------------------------------------------------------------------------ texts and flags
@scripts
def test_missing_input(script, tmp_path):
    check(call(script, "--input", tmp_path / "nowhere.txt"), tmp_path / "nowhere.txt", "--input")


@scripts
def test_directory_as_input(script, tmp_path):
    check(call(script, "--input", tmp_path), tmp_path, "--input")


@scripts
def test_empty_input(script, tmp_path):
    (tmp_path / "empty.txt").touch()
    check(call(script, "--input", tmp_path / "empty.txt"), tmp_path / "empty.txt", "empty", "--input")


@scripts
def test_input_that_is_not_utf8(script, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Ein schöner Text. ".encode("latin-1") * 100)
    done = call(script, "--input", tmp_path / "latin.txt", "--out_dir", tmp_path / "out")
    if script != "prepare_shakespeare":
        done = call(script, "--input", tmp_path / "latin.txt")
    check(done, tmp_path / "latin.txt", "UTF-8", "--input")
    assert [path.name for path in tmp_path.iterdir()] == ["latin.txt"]


@pytest.mark.parametrize("script", ["bigram", "gpt"])
@pytest.mark.parametrize("length", [1, 9, 159])
def test_text_whose_validation_part_is_shorter_than_a_window(script, tmp_path, length):
    """160 characters leave 16 for validation: a window of 16 and its target do not fit."""
    (tmp_path / "short.txt").write_text("ab\n" * 53 if length == 159 else "ab\nabcdef"[:length])
    check(call(script, "--input", tmp_path / "short.txt", "--device", "cpu", "--block_size", 16), "--block_size", 16)


def test_text_too_short_to_split(tmp_path):
    (tmp_path / "short.txt").write_text("a")
    done = call("prepare_shakespeare", "--input", tmp_path / "short.txt", "--out_dir", tmp_path / "out")
    check(done, tmp_path / "short.txt", "--val_fraction", 0.1)
    assert not (tmp_path / "out").exists()


FLAGS = [
    ("bigram", ["--block_size", 0]),
    ("bigram", ["--learning_rate", -1]),
    ("bigram", ["--learning_rate", "nan"]),
    ("bigram", ["--max_steps", "ten"]),
    ("bigram", ["--device", "toaster"]),
    ("gpt", ["--n_embd", 30]),
    ("gpt", ["--n_head", 0]),
    ("gpt", ["--preset", "huge"]),
    ("gpt", ["--activation", "tanh"]),
    ("gpt", ["--dropout", 1.5]),
    ("gpt", ["--temperature", -1]),
    ("gpt", ["--top_k", -3]),
    ("gpt", ["--eval_interval", 0]),
    ("gpt", ["--device", "toaster"]),
    ("prepare_shakespeare", ["--tokenizer", "words"]),
    ("prepare_shakespeare", ["--val_fraction", 1.0]),
    ("prepare_shakespeare", ["--val_fraction", 0]),
]


@pytest.mark.parametrize("script, flags", FLAGS, ids=[f"{s} {f[0]} {f[1]}" for s, f in FLAGS])
def test_wrong_value_of_a_flag(script, flags, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(call(script, "--input", text_file, *flags), flags[0], flags[1])
    assert list(tmp_path.iterdir()) == []


@needs_no_gpu
@pytest.mark.parametrize("script", ["bigram", "gpt"])
def test_cuda_where_there_is_none(script):
    check(call(script, "--device", "cuda"), "--device cuda", "--device cpu")


# --------------------------------------------------------------------------------------------- gpt.py
@pytest.mark.parametrize("flag", ["--prompt", "--stop"])
def test_text_that_the_model_has_never_seen(flag, text_file, tmp_path):
    """Found before training, and again when a saved model is asked."""
    check(call("gpt", "--input", text_file, *SMALL_GPT, flag, "ABC ß"), flag, "ß")
    assert call("gpt", "--input", text_file, *SMALL_GPT, "--save", tmp_path / "model.pt").returncode == 0
    check(call("gpt", "--load", tmp_path / "model.pt", "--device", "cpu", flag, "ABC ß"), flag, "ß")


@pytest.mark.parametrize("target", ["missing/model.pt", "folder"])
def test_save_where_no_file_can_be(target, text_file, tmp_path):
    """Found before training, not after an hour of it."""
    (tmp_path / "folder").mkdir()
    check(call("gpt", "--input", text_file, *SMALL_GPT, "--save", tmp_path / target), "--save", tmp_path / target)


@pytest.mark.parametrize("content", ["nothing", "text", "other tensors", "code"])
def test_load_of_what_is_no_model(content, tmp_path):
    path = tmp_path / "model.pt"
    if content == "text":
        path.write_text("KING: no model am I")
    elif content == "other tensors":
        torch.save({"weight": torch.zeros(3)}, path)
    elif content == "code":
        path.write_bytes(pickle.dumps(print, protocol=2))
    check(call("gpt", "--load", path, "--device", "cpu"), "--load", path, "--save")


# ----------------------------------------------------------------------------- prepare_shakespeare.py
def test_vocabulary_that_cannot_be_fetched(text_file, tmp_path):
    flags = ["--input", text_file, "--tokenizer", "gpt2", "--out_dir", "out"]
    done = run("prepare_shakespeare", *flags, cwd=tmp_path, env={"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")})
    check(done, "--tokenizer bytes", "TIKTOKEN_CACHE_DIR")
    assert not (tmp_path / "out").exists()


def test_out_dir_that_is_a_file(text_file, tmp_path):
    (tmp_path / "out").write_text("mine")
    check(
        call("prepare_shakespeare", "--input", text_file, "--out_dir", tmp_path / "out"), tmp_path / "out", "--out_dir"
    )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out", "mine")]
