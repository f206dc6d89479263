"""Run train_gpt2.py several times in the two processes of one torchrun, which starts them only once.

    torchrun --standalone --nproc_per_node=2 two_ranks.py runs.json

runs.json is a list of runs: {"name": ..., "directory": the current directory of the run, "flags": [...]}.
Every rank writes NAME_rank_R.json next to runs.json: what CompileCounter counted, and the random seeds that
the run set. The tests of train_gpt2.py also use CompileCounter in their own process.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd  # as PyTorch documents it for custom backends

ROOT = Path(__file__).resolve().parents[1]


class CompileCounter:
    """A replacement for torch.compile that counts. It compiles as torch.compile does, but generates no C++ code.

    compiled: class names of what torch.compile was called with, in order.
    graphs: number of forward graphs that were compiled.
    """

    def __init__(self):
        self.original_compile = torch.compile
        self.backend = aot_autograd(fw_compiler=self.compile_forward, bw_compiler=self.compile_backward)
        self.compiled = []
        self.graphs = 0

    def compile(self, model):
        """Stand in for torch.compile."""
        self.compiled.append(type(model).__name__)
        return self.original_compile(model, backend=self.backend)

    def compile_forward(self, graph, inputs):
        """Count a forward graph, and return it as it is."""
        self.graphs += 1
        return make_boxed_func(graph.forward)

    def compile_backward(self, graph, inputs):
        """Return a backward graph as it is."""
        return make_boxed_func(graph.forward)


def load_train_gpt2():
    """Return train_gpt2.py as a module."""
    spec = importlib.util.spec_from_file_location("train_gpt2", ROOT / "train_gpt2.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt2"] = module
    spec.loader.exec_module(module)
    return module


def main():
    path = Path(sys.argv[1])
    module = load_train_gpt2()
    original_compile, original_seed = torch.compile, torch.manual_seed
    for number, run in enumerate(json.loads(path.read_text())):
        # With another restart count, train_gpt2.py does not see the addresses of the run before.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        os.chdir(run["directory"])
        torch.compiler.reset()
        torch.compile = original_compile
        counter = CompileCounter()
        torch.compile = counter.compile
        seeds = []

        def set_seed(seed, seeds=seeds):
            seeds.append(seed)
            return original_seed(seed)

        torch.manual_seed = set_seed
        sys.argv = ["train_gpt2.py", *run["flags"]]
        module.main()
        result = {"compiled": counter.compiled, "graphs": counter.graphs, "seeds": seeds}
        (path.parent / f"{run['name']}_rank_{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
