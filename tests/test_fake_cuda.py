"""train_gpt2.py, sample.py and hellaswag.py on a pretended GPU: their CUDA branches, without a GPU.

fake_cuda.py runs the scripts with --device cuda. It computes on the CPU, so the numbers are those of a CPU.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_user_error, losses, random_gpt2, succeed, tiny_flags, write_data_set

HERE = Path(__file__).parent
DTYPES = ["bfloat16", "float16"]
STEPS = 3
NEW_TOKENS = 3
# Two micro-steps per step, several batches in both evaluations, and AdamW besides Muon.
TRAINING = {
    "n_layer": 1,
    "micro_batch_size": 4,
    "val_tokens": 144,
    "max_steps": STEPS,
    "optimizer": "muon",
    "eval_interval": STEPS,
    "hellaswag_interval": STEPS,
    "max_new_tokens": NEW_TOKENS,
    "device": "cuda",
}
# sequences for which the GPU has memory -> micro-batch size. A tenth of the memory must stay free: of 8.89, that leaves
# 8.001, which is enough for 8 sequences, but not for the averages of AdamW as well.
MEMORY = {8.89: 4, 9: 8, 1000: 64}

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of PyTorch"),
]


def write_hellaswag(path):
    """Write ten prepared examples, for the trainer."""
    path.parent.mkdir()
    tokens = np.ones((10, 4, 12), dtype=np.uint16)
    lengths = np.full((10, 4), 12)
    np.savez(path, tokens=tokens, context_length=np.full(10, 5), length=lengths, label=np.zeros(10, dtype=np.int64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with what the scripts read: GPT-2 tokens, HellaSwag in both forms, and a model."""
    folder = tmp_path_factory.mktemp("fake")
    write_data_set(folder / "data", [range(2000)], [range(500)], 50257)
    write_data_set(folder / "bytes", [np.arange(2000) % 256], [range(200)])
    write_hellaswag(folder / "hellaswag" / "hellaswag_val.npz")
    example = {"ind": 0, "label": 1, "ctx": "A man", "endings": ["sits", "falls down", "is", "was here"]}
    (folder / "examples.jsonl").write_text(f"{json.dumps(example)}\n" * 3)
    random_gpt2(folder / "model", n_layer=1)
    return folder


def training(folder, name, **changes):
    """Return the command of a training run with --log_dir name."""
    flags = tiny_flags(**{**TRAINING, "data_dir": folder / "data", "log_dir": folder / name, **changes})
    return ["train_gpt2", *flags, "--no-compile"]


@pytest.fixture(scope="module")
def results(folder):
    """Run all commands in one process. Returns {name: result of fake_cuda.py}."""
    # compile the fake GPU
    torch_dir = Path(torch.__file__).parent
    line = ["g++", "-std=c++20", "-shared", "-fPIC", HERE / "fake_cuda.cpp", "-o", folder / "fake_cuda.so"]
    line += [f"-I{torch_dir}/include", f"-L{torch_dir}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_dir}/lib"]
    subprocess.run(line, check=True)
    # the commands, and the memory of the GPU for some of them
    commands, memory = {}, {}
    for dtype in DTYPES:
        commands[f"training {dtype}"] = training(folder, f"log_{dtype}", dtype=dtype)
        flags = ["--model", folder / "model", "--device", "cuda", "--dtype", dtype]
        sampling = ["--num_samples", 2, "--max_new_tokens", NEW_TOKENS, "--top_p", 0.9]
        commands[f"sampling {dtype}"] = ["sample", *flags, *sampling]
        examples = ["--data", folder / "examples.jsonl"]
        commands[f"hellaswag {dtype}"] = ["hellaswag", *flags, *examples]
    for sequences in (0, *MEMORY):
        changes = {"micro_batch_size": None, "total_batch_size": 64 * 16, "max_steps": 1, "data_dir": folder / "bytes"}
        commands[f"memory {sequences}"] = training(folder, f"log_{sequences}", **changes)
        memory[f"memory {sequences}"] = sequences
    # run them
    runs = {}
    for name, (script, *flags) in commands.items():
        command = [str(ROOT / f"{script}.py"), *map(str, flags)]
        runs[name] = {"command": command, "memory": memory.get(name, 1000)}
    (folder / "runs.json").write_text(json.dumps(runs))
    line = [sys.executable, HERE / "fake_cuda.py", folder / "fake_cuda.so", folder / "runs.json"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["training", "sampling", "hellaswag"])
def test_no_operation_mixes_devices(results, name, dtype):
    result = results[f"{name} {dtype}"]
    assert (result["status"], result["mixed"]) == (0, []), result["stderr"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_computes_the_losses_of_the_cpu(results, folder, tmp_path, monkeypatch, dtype):
    """Muon runs in bfloat16 on GPUs only, and float16 on GPUs only skips steps in which a gradient overflows."""
    monkeypatch.chdir(folder)
    script, *flags = training(folder, tmp_path / "log", dtype=dtype, device="cpu")
    succeed(script, *flags)
    for kind in ("train", "val", "hella"):
        expected = losses(tmp_path / "log", kind)
        assert losses(folder / f"log_{dtype}", kind) == pytest.approx(expected, abs=0.01)


WAITS = {  # (command, step): most waits for the GPU with bfloat16 and with float16
    # the loss and the norm; float16 also reads, in two places, whether a gradient overflowed
    ("training", 1): (1, 3),
    # a probe of the device, the validation, HellaSwag and both samples, whatever the number of batches and tokens;
    # float16's first step adds two
    ("training", 0): (4, 6),
    # for each token its text, and whether the logits are numbers
    ("sampling", 0): (2 * NEW_TOKENS + 1, 2 * NEW_TOKENS + 1),
    # the losses, and the number of tokens that have one, of one batch
    ("hellaswag", 0): (5, 5),
}


@pytest.mark.parametrize("name, step", WAITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scripts_wait_for_the_gpu_in_few_places(results, name, step, dtype):
    lines = [line for number, line in results[f"{name} {dtype}"]["waits"] if number == step]
    assert 1 <= len(lines) <= WAITS[name, step][DTYPES.index(dtype)], lines


@pytest.mark.parametrize("sequences", MEMORY)
def test_the_micro_batch_fits_into_the_memory(results, sequences):
    """The micro-batch is the largest power of two that fits, up to 64."""
    result = results[f"memory {sequences}"]
    assert result["status"] == 0, result["stderr"]
    assert f" x {MEMORY[sequences]} sequences" in result["stdout"]


def test_a_single_sequence_that_does_not_fit_is_a_user_error(results):
    result = results["memory 0"]
    assert_user_error(subprocess.CompletedProcess([], result["status"], result["stdout"], result["stderr"]), "--")
