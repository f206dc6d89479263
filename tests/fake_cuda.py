"""Run scripts on a pretended GPU in a CPU build of PyTorch. Started by test_fake_cuda.py.

    python fake_cuda.py LIBRARY RUNS

LIBRARY is the compiled fake_cuda.cpp. RUNS is a JSON file with a dict for each run: "command", a
script and its flags, and "memory", the number of sequences that fit into the memory of the GPU.
Prints a dict for each run as JSON:

    status, stdout, stderr: as of a process
    mixed: operations that got a tensor on the CPU and one on the GPU
    waits: the lines of the script that wait for the GPU, because they need a value, each with the
        number of optimizer steps before it

A tensor on the pretended GPU says that its device is cuda, and PyTorch believes it. Its data are in
a tensor on the CPU, which computes all operations.
"""

import contextlib
import ctypes
import io
import json
import runpy
import sys
import traceback
from unittest.mock import patch

# before torch is imported: it looks for a GPU once
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)

import torch  # noqa: E402 (after the library)
from torch.optim.optimizer import register_optimizer_step_pre_hook  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

BYTES = 10**8  # that the GPU needs for a sequence, forward and backward
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class GPUTensor(torch.Tensor):
    """A tensor on the pretended GPU. data_on_cpu is where its data really are."""

    @staticmethod
    def __new__(cls, data_on_cpu):
        options = {"dtype": data_on_cpu.dtype, "device": CUDA, "strides": data_on_cpu.stride()}
        options["storage_offset"] = data_on_cpu.storage_offset()
        tensor = torch.Tensor._make_wrapper_subclass(cls, data_on_cpu.shape, **options)
        tensor.data_on_cpu = data_on_cpu
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function} outside of PretendedGPU")


class PretendedGPU(TorchDispatchMode):
    """Computes the operations of GPUTensors on the CPU, and watches them."""

    def __init__(self, script, memory):
        super().__init__()
        self.script = script
        self.memory = memory  # in sequences
        self.largest_batch = 0
        self.steps = 0  # of the optimizer
        self.mixed = []
        self.waits = []

    def wait(self):
        """Record the line of the script that waits for the GPU."""
        frames = [frame for frame in traceback.extract_stack() if frame.filename == self.script]
        self.waits.append((self.steps, frames[-1].line))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.name(), dict(kwargs or {})
        device = kwargs.get("device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_on_gpu = any(isinstance(tensor, GPUTensor) for tensor in tensors)
        # a scalar on the CPU may be combined with tensors on any device
        if is_on_gpu and "copy" not in name:
            if not all(isinstance(tensor, GPUTensor) for tensor in tensors if tensor.dim() > 0):
                self.mixed.append(name)
        # what needs a value, or the number of true elements of a mask, which is the size of a result
        is_read = name == "aten::_local_scalar_dense" or (name == "aten::_to_copy" and device == CPU)
        is_masked = name in ("aten::index.Tensor", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if is_on_gpu and (is_read or is_masked or name in ("aten::nonzero", "aten::equal")):
            self.wait()
        # a forward pass begins with the embedding of its sequences
        if name == "aten::embedding" and args[1].dim() == 2:
            self.largest_batch = max(self.largest_batch, len(args[1]))
            if len(args[1]) > self.memory:
                raise torch.OutOfMemoryError("CUDA out of memory")

        # compute on the CPU
        if device is not None:
            kwargs["device"] = CPU
        cpu_args, cpu_kwargs = tree_map_only(GPUTensor, lambda tensor: tensor.data_on_cpu, (args, kwargs))
        result = function(*cpu_args, **cpu_kwargs)
        if not (is_on_gpu or device == CUDA or str(device) == "cuda") or is_read:
            return result
        result = tree_map_only(torch.Tensor, GPUTensor, result)
        return return_and_correct_aliasing(function, args, kwargs, result)

    def tolist(self, tensor, tolist=torch.Tensor.tolist):
        """Stand in for Tensor.tolist."""
        if isinstance(tensor, GPUTensor):
            self.wait()
            tensor = tensor.data_on_cpu
        return tolist(tensor)

    def count_step(self, optimizer, args, kwargs):
        """Count the steps of AdamW, which every run has."""
        self.steps += isinstance(optimizer, torch.optim.AdamW)

    def forget_peak(self, device=None):
        """Stand in for torch.cuda.reset_peak_memory_stats."""
        self.largest_batch = 0


def move(module, device):
    """Stand in for Module.to, which cannot replace parameters by GPUTensors."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, torch.nn.Parameter(parameter.detach().to(device)))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))
    return module


def make_tensor(data, device=CPU, make_tensor=torch.tensor, **options):
    """Stand in for torch.tensor, which copies numbers to a GPU without an operation."""
    return make_tensor(data, **options).to(device)


class CPUGenerator(torch.Generator):
    """Stands in for the random generator of the GPU."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def save(content, path, save=torch.save):
    """Stand in for torch.save."""
    save(tree_map_only(GPUTensor, lambda tensor: tensor.data_on_cpu, content), path)


def run(command, memory):
    """Run a script with flags on the pretended GPU. Returns its result."""
    gpu = PretendedGPU(command[0], memory)
    functions = {
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_name": lambda device=None: "pretended GPU",
        "_lazy_init": lambda: None,
        "mem_get_info": lambda device=None: (memory * BYTES, memory * BYTES),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: gpu.largest_batch * BYTES,
        "reset_peak_memory_stats": gpu.forget_peak,
        "empty_cache": lambda: None,
    }
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    status = 0
    hook = register_optimizer_step_pre_hook(gpu.count_step)
    with (
        patch.multiple(torch.cuda, **functions),
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.inference_mode", lambda: torch.no_grad()),  # operations would not reach gpu
        patch("torch.tensor", make_tensor),
        patch("torch.Generator", CPUGenerator),
        patch("torch.Tensor.pin_memory", lambda tensor: tensor),
        patch("torch.Tensor.tolist", lambda tensor: gpu.tolist(tensor)),
        patch("torch.nn.Module.to", move),
        patch("torch.save", save),
        patch("sys.argv", command),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        gpu,
    ):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        except Exception:
            status = 1
            traceback.print_exc()
    hook.remove()
    texts = {}
    for name, stream in (("stdout", out), ("stderr", err)):
        stream.flush()
        texts[name] = stream.buffer.getvalue().decode()
    return {"status": status, "mixed": gpu.mixed, "waits": gpu.waits, **texts}


if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8") as file:
        runs = json.load(file)
    print(json.dumps({name: run(**options) for name, options in runs.items()}))
