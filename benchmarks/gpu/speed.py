"""
Measure on a GPU how fast a training step of GPT-2 124M is in several variants, and what its time goes into.

    python benchmarks/gpu/speed.py                                       # one GPU; 8 minutes
    python benchmarks/gpu/speed.py --data_dir edu_fineweb10B
    python benchmarks/gpu/speed.py --only limits compiled "bfloat16 residual"
    python benchmarks/gpu/speed.py --device cpu --tiny                   # tries the script itself; a minute

A step is 524,288 tokens under bfloat16 autocast: micro-batches from the data set, clipping, and fused AdamW. First come
the limits of the machine: memory bandwidth, matmuls, and attention. Then every variant has a row: tokens/s, TFLOP/s of
the model (6 N + 12 n_layer n_embd T per token), milliseconds per micro-step, peak memory, seconds of the first
micro-step with compilation, and the loss after five steps. "compiled" is the trainer's default. Each of the others
changes one thing. After "compiled" come a profile of its kernels, evaluations and the optimizers. A variant that cannot
run here, for example because this version of PyTorch lacks something, is a line that says so. After --seconds no new
variant starts. Without --data_dir the data are the GPT-2 tokens of input.txt, again and again.
"""

import gc
import re
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

from gpu_common import INPUT, TINY_SHAPE, machine_name, make_data, make_parser, seconds_of, synchronize

# isort: split
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_hellaswag import make_examples, read_source
from bench_step import ToBFloat16
from common import matmul_peak
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.profiler import ProfilerActivity, profile

import hellaswag
import train_gpt2


# -------------------------------------------------------------------------------------- variants
@dataclass
class Variant:
    """One way to compute the step."""

    name: str
    batch_size: int = 64  # sequences per micro-batch
    compile: bool = True
    residual_bfloat16: bool = False  # keep the residual stream in bfloat16
    flash_attention: bool = False  # FlashAttention instead of the default kernel, on Hopper cuDNN's
    ddp: bool = False  # torch.compile around DDP, which splits the graph at DDP's buckets
    options: dict = field(default_factory=dict)  # of torch.compile


VARIANTS = [
    Variant("compiled"),
    Variant("compiled, B=32", batch_size=32),
    Variant("bfloat16 residual", residual_bfloat16=True),
    Variant("flash attention", flash_attention=True),
    Variant("eager", compile=False),
    Variant("tuned", options={"coordinate_descent_tuning": True}),
    Variant("bfloat16 residual, B=32", batch_size=32, residual_bfloat16=True),
    Variant("split for DDP", ddp=True),
    Variant("bfloat16 residual, tuned", residual_bfloat16=True, options={"coordinate_descent_tuning": True}),
]


class Trainer:
    """A model with its optimizer and data, which makes steps as train_gpt2.py does."""

    def __init__(self, variant, setup):
        self.setup = setup
        self.batch_size = 1 if setup.tiny else variant.batch_size
        self.grad_accum_steps = setup.tokens_per_step // (self.batch_size * setup.T)
        torch.manual_seed(0)
        self.raw_model = train_gpt2.GPT(train_gpt2.GPTConfig(**setup.shape)).to(setup.device)
        if variant.residual_bfloat16:
            self.raw_model.drop = ToBFloat16()
        # wrap the model as the trainer does
        self.model = self.raw_model
        if variant.ddp:
            self.model = DDP(self.raw_model, gradient_as_bucket_view=True)
        if variant.compile:
            self.model = torch.compile(self.model, backend=setup.backend, options=variant.options or None)
        self.optimizers = train_gpt2.configure_optimizers(self.raw_model, "adamw", 6e-4, 0.1, setup.device)
        # windows are taken in the data set's order, from one epoch to the next
        self.next_window = 0

    def load(self):
        """Return the next inputs and targets."""
        indices = range(self.next_window, self.next_window + self.batch_size)
        self.next_window += self.batch_size
        return train_gpt2.load_batch(self.setup.train_data, indices, self.setup.device)

    def micro_step(self):
        """Add the gradients of a micro-batch. Returns the loss, a tensor."""
        x, y = self.load()
        with torch.autocast(self.setup.device.type, torch.bfloat16):
            _, loss = self.model(x, y)
        loss = loss / self.grad_accum_steps
        loss.backward()
        return loss.detach()

    def step(self):
        """Make an optimizer step. Returns its loss."""
        # accumulate the gradients of all micro-batches
        loss = 0.0
        for _ in range(self.grad_accum_steps):
            loss = loss + self.micro_step()
        # clip and update, as in the trainer; reading the loss is the only wait
        torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.raw_model.zero_grad(set_to_none=True)
        return loss.item()


class Setup:
    """What the measurements share: sizes and data."""

    def __init__(self, args, directory):
        self.device = torch.device(args.device)
        self.tiny = args.tiny
        self.directory = directory
        self.shape = TINY_SHAPE if args.tiny else {}
        self.T = TINY_SHAPE["block_size"] if args.tiny else 1024
        # 0.5M tokens, as in the preset gpt2
        self.tokens_per_step = 2 * self.T if args.tiny else 524288
        self.backend = "aot_eager" if args.tiny else "inductor"  # generating code takes long on a CPU
        self.data_dir = args.data_dir or make_data(f"{directory}/data", "gpt2")
        data_set = train_gpt2.read_data_set(self.data_dir)
        self.train_data = train_gpt2.TokenDataset(self.data_dir, "train", data_set, self.T, 1337, True)


def measure(variant, setup):
    """Print the row of a variant, and what belongs to it."""
    # free everything that the variant before has left
    torch.compiler.reset()
    gc.collect()
    is_cuda = setup.device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # the settings of the variant hold until its end
    with ExitStack() as stack:
        if variant.flash_attention:
            stack.enter_context(sdpa_kernel([SDPBackend.FLASH_ATTENTION]))
        if variant.ddp:
            stack.enter_context(group_of_one(setup.device))
        measure_steps(variant, setup)


def measure_steps(variant, setup):
    """Time the steps of a variant. The model is freed on return, before its process group is."""
    trainer = Trainer(variant, setup)
    # the first micro-step compiles
    start = time.perf_counter()
    trainer.micro_step()
    synchronize(setup.device.type)
    first = time.perf_counter() - start
    trainer.raw_model.zero_grad(set_to_none=True)
    # five steps, of which the first two do not count
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        loss = trainer.step()
        seconds.append(time.perf_counter() - start)
    median = sorted(seconds[2:])[1]
    print_row(variant, trainer, median, first, loss)
    if variant.name == "compiled":
        measure_kernels(trainer, setup)
        measure_validation(trainer, setup)
        measure_hellaswag(trainer, setup)
        measure_optimizers(trainer, setup)


def print_row(variant, trainer, seconds, first, loss):
    """Print a row of the table from the seconds of a step and of the first micro-step."""
    config = trainer.raw_model.config
    setup = trainer.setup
    tokens_per_second = setup.tokens_per_step / seconds
    flops = 6 * trainer.raw_model.num_params + 12 * config.n_layer * config.n_embd * setup.T  # per token
    memory = "" if setup.device.type == "cpu" else f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    milliseconds = 1000 * seconds / trainer.grad_accum_steps
    print(
        f"| {variant.name} | {trainer.batch_size} | {tokens_per_second:,.0f} | {flops * tokens_per_second / 1e12:.0f} "
        f"| {milliseconds:.1f} | {memory} | {first:.0f} | {loss:.4f} |",
        flush=True,
    )


@contextmanager
def group_of_one(device):
    """Provide a process group of this process alone, so that DDP can be used."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------- limits of the machine
def measure_limits(setup):
    """Print what memory, matmuls and attention reach by themselves."""
    kind = setup.device.type
    # memory: copy a tensor
    n = 2**20 if setup.tiny else 2**30  # bytes
    source = torch.zeros(n, dtype=torch.uint8, device=setup.device)
    copy = torch.empty_like(source)
    seconds = seconds_of(lambda: copy.copy_(source), kind, 20)
    print(f"memory: {2 * n / seconds / 1e12:.2f} TB/s read and written")
    # matmuls: a short burst, and four seconds in which the GPU becomes warm and slower
    n = 128 if setup.tiny else 8192
    matrix = torch.randn(n, n, device=setup.device, dtype=torch.bfloat16)
    sustained = 2 * n**3 / seconds_of(lambda: matrix @ matrix, kind, 10 if setup.tiny else 2800)
    if not setup.tiny:
        print(f"matmul of {n} x {n}, best: {matmul_peak(kind, torch.bfloat16) / 1e12:.0f} TFLOP/s")
    print(f"matmul of {n} x {n}, sustained: {sustained / 1e12:.3g} TFLOP/s")
    measure_matmuls(setup)
    measure_attention(setup)


def measure_matmuls(setup):
    """Print the speed of each matmul of a micro-batch, and the tokens/s that all of them together allow."""
    C = 64 if setup.tiny else 768
    num_tokens = 128 if setup.tiny else 65536
    vocab_size = 256 if setup.tiny else 50304
    layers = [  # name, inputs, outputs, how often
        ("attn.c_attn", C, 3 * C, 12),
        ("attn.c_proj", C, C, 12),
        ("mlp.c_fc", C, 4 * C, 12),
        ("mlp.c_proj", 4 * C, C, 12),
        ("head", C, vocab_size, 1),
    ]
    total_seconds = 0.0
    total_flops = 0.0
    for name, num_inputs, num_outputs, count in layers:
        x = torch.randn(num_tokens, num_inputs, device=setup.device, dtype=torch.bfloat16)
        weight = torch.randn(num_outputs, num_inputs, device=setup.device, dtype=torch.bfloat16)
        grad = torch.randn(num_tokens, num_outputs, device=setup.device, dtype=torch.bfloat16)
        # the backward pass has two matmuls for each one of the forward pass
        seconds = [
            seconds_of(lambda x=x, weight=weight: F.linear(x, weight), setup.device.type, 5),
            seconds_of(lambda grad=grad, weight=weight: grad @ weight, setup.device.type, 5),
            seconds_of(lambda grad=grad, x=x: grad.T @ x, setup.device.type, 5),
        ]
        flops = 2 * num_tokens * num_inputs * num_outputs
        speeds = ", ".join(f"{flops / each / 1e12:.3g}" for each in seconds)
        print(f"  {name}: {speeds} TFLOP/s (forward, gradient of the input, gradient of the weight)")
        # all layers together
        total_seconds += count * sum(seconds)
        total_flops += count * 3 * flops
    print(
        f"all matmuls of {num_tokens:,} tokens: {1000 * total_seconds:.1f} ms, "
        f"{total_flops / total_seconds / 1e12:.3g} TFLOP/s: no step can be faster than "
        f"{num_tokens / total_seconds:,.0f} tokens/s"
    )


def measure_attention(setup):
    """Print the time of the attention of 12 layers in the kernels that this GPU has."""
    # the sizes of a micro-batch, with the memory layout that the model has
    B, nh, T = (2, 2, 64) if setup.tiny else (64, 12, 1024)
    qkv = torch.randn(B, T, 3, nh, 64, device=setup.device, dtype=torch.bfloat16, requires_grad=True)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, nh, T, hs) each
    grad = torch.randn(B, T, nh, 64, device=setup.device, dtype=torch.bfloat16).transpose(1, 2)

    def forward():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward_and_backward():
        return torch.autograd.grad(forward(), (q, k, v), grad)

    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        try:
            with sdpa_kernel([backend]):
                milliseconds = [
                    12_000 * seconds_of(each, setup.device.type) for each in (forward, forward_and_backward)
                ]
        except RuntimeError as error:
            print(f"attention, {name}: skipped, {first_line(error)}")
            continue
        print(
            f"attention, {name}: 12 layers {milliseconds[0]:.1f} ms forward, "
            f"{milliseconds[1]:.1f} ms forward and backward"
        )


# ------------------------------------------------------------------- what belongs to "compiled"
def measure_kernels(trainer, setup):
    """Print the milliseconds that the kinds of kernels take in a micro-step."""
    activity = ProfilerActivity.CUDA if setup.device.type == "cuda" else ProfilerActivity.CPU
    # two micro-steps, so that one odd kernel does not matter
    with profile(activities=[activity]) as profiler:
        trainer.micro_step()
        trainer.micro_step()
        synchronize(setup.device.type)
    events = profiler.key_averages()
    milliseconds = {"matmul": 0.0, "attention": 0.0, "triton": 0.0, "other": 0.0}
    for event in events:
        microseconds = event.self_device_time_total if setup.device.type == "cuda" else event.self_cpu_time_total
        milliseconds[kind_of_kernel(event.key)] += microseconds / 2000
    shares = ", ".join(f"{kind} {value:.1f}" for kind, value in milliseconds.items())
    print(f"  milliseconds of a micro-step: {shares}")
    # the table of single kernels is long, so it goes to stderr
    order = "self_device_time_total" if setup.device.type == "cuda" else "self_cpu_time_total"
    print(events.table(sort_by=order, row_limit=5 if setup.tiny else 40, max_name_column_width=100), file=sys.stderr)
    trainer.raw_model.zero_grad(set_to_none=True)


def kind_of_kernel(name):
    """Return the kind of a kernel by its name."""
    patterns = {
        "triton": r"triton",
        "attention": r"flash|fmha|sdpa|attn|attention",
        "matmul": r"gemm|nvjet|cutlass|xmma|splitk|::mm|addmm|bmm",
    }
    for kind, pattern in patterns.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def measure_validation(trainer, setup):
    """Print the seconds of a validation with the eager and with the compiled model."""
    # whole micro-batches only: for another size the model would be compiled again
    num_windows = 4 if setup.tiny else min(1024, setup.train_data.num_windows)
    num_windows -= num_windows % trainer.batch_size
    tokens = num_windows * setup.T
    for name, model in (("eager", trainer.raw_model), ("compiled", trainer.model)):
        seconds = []
        for _ in range(2):  # the first time may compile
            start = time.perf_counter()
            arguments = (tokens, trainer.batch_size, 0, 1, *evaluation_arguments(setup))
            loss = train_gpt2.evaluate(model, trainer.raw_model, setup.train_data, *arguments)
            seconds.append(time.perf_counter() - start)
        print(
            f"  validation, {name}: {tokens:,} tokens in {seconds[1]:.2f} s (first {seconds[0]:.1f} s), loss "
            f"{loss:.4f}; 10,485,760 tokens take {seconds[1] * 10485760 / tokens:.1f} s",
            flush=True,
        )


def evaluation_arguments(setup):
    """Return the last arguments of the trainer's evaluations: device, autocast and a stop request that never comes."""
    return setup.device, torch.autocast(setup.device.type, torch.bfloat16), SimpleNamespace(reason=None)


def measure_hellaswag(trainer, setup):
    """Print the seconds of HellaSwag as in training, on examples cut from input.txt."""
    num_examples = 8 if setup.tiny else 2000
    examples = make_examples(read_source(INPUT), train_gpt2.get_tokenizer("gpt2"), num_examples)
    # the trainer reads a prepared file
    path = f"{setup.directory}/hellaswag/hellaswag_val.npz"
    hellaswag.write_prepared(path, examples)
    data = train_gpt2.load_hellaswag(path, setup.T)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        train_gpt2.evaluate_hellaswag(trainer.raw_model, data, trainer.batch_size, 0, 1, *evaluation_arguments(setup))
        seconds.append(time.perf_counter() - start)
    print(
        f"  HellaSwag in training: {num_examples:,} examples in {seconds[1]:.2f} s (first {seconds[0]:.2f} s); "
        f"10,042 examples take {seconds[1] * 10042 / num_examples:.1f} s",
        flush=True,
    )


def measure_optimizers(trainer, setup):
    """Print the milliseconds of clipping and of a step of each optimizer, for all parameters."""
    # random gradients of the usual shapes
    model = trainer.raw_model
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    # a learning rate of 1e-6 leaves the model as it is
    functions = {"clipping": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)}
    (adamw,) = train_gpt2.configure_optimizers(model, "adamw", 1e-6, 0.1, setup.device)
    functions["AdamW for all parameters"] = adamw.step
    muon, adamw_of_the_rest = train_gpt2.configure_optimizers(model, "muon", 1e-6, 0.1, setup.device)
    functions["Muon for the blocks"] = muon.step
    functions["AdamW for the rest"] = adamw_of_the_rest.step
    for name, function in functions.items():
        print(f"  {name}: {1000 * seconds_of(function, setup.device.type, 5):.2f} ms", flush=True)
    model.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------- command line
def first_line(error):
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def parse_args():
    parser = make_parser(__doc__, "token shards of GPT-2's tokenizer (default: made from input.txt)")
    names = ["limits", *(variant.name for variant in VARIANTS)]
    add = parser.add_argument
    add("--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"(default: all of {names})")
    add("--seconds", type=float, default=400, help="start no new variant after this time (default: 400)")
    return parser.parse_args()


def main():
    begin = time.perf_counter()
    args = parse_args()
    torch.set_float32_matmul_precision("high")
    any_failed = False
    print(f"{machine_name(args.device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        setup = Setup(args, directory)
        print(f"attention kernel: {train_gpt2.attention_backend(setup.device, 'bfloat16')}")
        if "limits" in args.only:
            measure_limits(setup)
        print("\n| variant | B | tokens/s | TFLOP/s | ms per micro-step | peak memory | first, s | loss |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for variant in VARIANTS:
            if variant.name not in args.only:
                continue
            if time.perf_counter() - begin > args.seconds:
                print(f"| {variant.name} | skipped: --seconds {args.seconds:g} are over |")
                continue
            try:
                measure(variant, setup)
            except Exception as error:  # whatever it is, the other variants can still be measured
                any_failed = True
                print(f"| {variant.name} | failed: {first_line(error)} |", flush=True)
    print(f"\n{time.perf_counter() - begin:.0f} s")
    sys.exit(any_failed)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    main()
