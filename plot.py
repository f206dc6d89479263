"""
Draw the curves of a run, or of several runs over each other, as one picture.

    python plot.py log                                 # writes log/curves.png
    python plot.py log log2 log3 --output three.png    # three runs in one picture
    python plot.py log --show                          # opens the picture, too
    python plot.py log_bng --tokens_per_step 524288 --reference    # build-nanogpt's log.txt, on FineWeb-Edu

Reads DIR/log.txt, the "step kind value" lines of train_gpt2.py or build-nanogpt, and DIR/run.json, the flags of
train_gpt2.py, for the tokens of a step and the data set. Thin lines are as logged, thick ones means over 2 % of a
run; dashed lines are what OpenAI's models reach. Takes two seconds, at any time of a run.
"""

import argparse
import json
import os
import re
import signal
import sys
import webbrowser
from contextlib import suppress
from itertools import cycle

import numpy as np

LABELS = {  # of panels, by what they show; val stands in train's
    "train": "loss (nats per token)",
    "hella": "HellaSwag accuracy",
    "lr": "learning rate",
    "norm": "gradient norm",
    "tok/s": "tokens/s",
}
# (panel, model of OpenAI's, value, line): the loss is that on build-nanogpt's validation shard of FineWeb-Edu; endings
# are chosen by likelihood a token; GPT-3's figure is table H.1 of "Language Models are Few-Shot Learners" (2020).
REFERENCES = [
    ("train", "GPT-2 124M", 3.2924, "--"),
    ("hella", "GPT-3 124M", 0.337, ":"),
    ("hella", "GPT-2 124M", 0.2955, "--"),
]
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito's, for all eyes
STYLE = {
    **{"font.size": 12, "axes.grid": True, "grid.color": "#e5e5e5", "axes.xmargin": 0.02, "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 11, "legend.handlelength": 1.5},
    **{"lines.markersize": 5, "lines.markeredgewidth": 0.5, "lines.markeredgecolor": "white"},
}


def fail(message):
    """Report a user's mistake in one line on stderr and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_run(log_dir):
    """The figures in log.txt, {kind: (steps (N,), values (N,))}, and the flags in run.json, {} if none can be read.

    Lines that are no "step kind value" are skipped and counted on stderr; other kinds, and values that are not finite
    or too large for an axis, are left out; of two for a step the later one holds.
    """
    found, wrong = {}, []
    with open(f"{log_dir}/log.txt", encoding="utf-8", errors="replace") as file:
        lines = file.read().split("\n")[:-1]  # what no newline ends was cut, or is being written
    for number, line in enumerate(lines, 1):
        try:
            step, kind, value = line.split()
            if kind in {*LABELS, "val"} and abs(float(value)) < 1e30:
                found.setdefault(kind, {})[int(step)] = float(value)
        except ValueError:
            wrong.append(number)
    if wrong:
        what = f"skipped {len(wrong)} of {len(lines)} lines that are no 'step kind value', the first is line {wrong[0]}"
        print(f"warning: {log_dir}/log.txt: {what}", file=sys.stderr)
    log = {kind: np.array(sorted(figures.items()), float).T for kind, figures in found.items()}  # (2, N)
    try:
        with open(f"{log_dir}/run.json", encoding="utf-8") as file:
            return log, dict(json.load(file))
    except (OSError, ValueError, TypeError):
        return log, {}


def smooth(values):
    """Means over windows of about 2 % of values (N,): (N,)."""
    reach = [min(i, len(values) // 100) for i in range(len(values))]  # symmetric at the start, too: its fall is steep
    return np.array([values[i - n : i + n + 1].mean() for i, n in enumerate(reach)])


def draw(log_dirs, path, tokens_per_step=None, reference=None):
    """Draw the runs in log_dirs to the file path, which appears whole or not at all; returns the figure.

    tokens_per_step is for runs without a run.json. reference says whether to draw REFERENCES; None means where a
    run.json tells of FineWeb-Edu in GPT-2's tokens, and none of other data. Raises ValueError where there is nothing
    to draw, OSError where a file cannot be read or written.
    """
    from matplotlib import rc_context, ticker  # not above: it takes a second and writes a cache
    from matplotlib.figure import Figure

    logs, flags = zip(*map(read_run, log_dirs), strict=True)
    kinds = {kind for log in logs for kind in log}
    if not kinds:
        raise ValueError(f"{log_dirs[0]}/log.txt has nothing to draw yet")
    names = [os.path.basename(os.path.abspath(one)) for one in log_dirs]
    names = [name.replace("$", r"\$") for name in (names if len(set(names)) == len(names) else log_dirs)]
    if reference is None:
        data = [f"{one['tokenizer']} {one.get('source')}" for one in flags if "tokenizer" in one]
        reference = bool(data) and all(re.match(r"gpt2 .*HuggingFaceFW/fineweb-edu(?![\w-])", one) for one in data)
    sizes = [one.get("total_batch_size", tokens_per_step) for one in flags]  # tokens a step
    if None in sizes:
        sizes, unit, x_label = [1] * len(logs), 1, "steps (for tokens: --tokens_per_step)"
    else:
        most = max(size * x[-1] for size, log in zip(sizes, logs, strict=True) for x, _ in log.values())
        unit, x_label = (1e9, "tokens (billions)") if most >= 1e9 else (1e6, "tokens (millions)")

    below = [kind for kind in ("lr", "norm", "tok/s") if kind in kinds]
    rows = [["train"] * 4 + ["hella"] * 2 if "hella" in kinds else ["train"] * 6]
    rows += [[kind for kind in below for _ in range(6 // len(below))]] if below else []
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 7), dpi=160, layout="constrained")  # inches
        panels = figure.subplot_mosaic(rows, height_ratios=[3, 2][: len(rows)])
        figure.supxlabel(x_label, size=12)
        late = []  # losses after the first twentieth of their run: the fall before would flatten all the rest
        for log, name, size, color in zip(logs, names, sizes, cycle(COLORS), strict=False):
            for kind, (x, y) in log.items():
                axes = panels["train" if kind == "val" else kind]
                if kind in ("train", "val"):
                    late.extend(y[x >= x[-1] / 20])
                if kind == "val":
                    name = f"{name}: val loss {y[-1]:.4f}"
                x = x * size / unit
                if kind in ("val", "hella"):
                    axes.plot(x, y, "o", color=color, zorder=3)
                else:
                    axes.plot(x, y, color=color, lw=0.6, alpha=0.35)
                    mean = y if kind == "lr" else smooth(y)
                    axes.plot(x, mean, color=color, lw=1.8, marker="o" if len(x) < 20 else None)
            panels["train"].plot([], [], color=color, lw=4, label=name)
        panels["train"].plot([], [], color="#555555", lw=1.8, label="train")
        panels["train"].plot([], [], "o", color="#555555", label="validation")
        for kind, model, value, line in REFERENCES if reference else []:
            if kind in panels:
                panels[kind].axhline(value, color="#555555", lw=1.2, ls=line, label=f"{model}: {value}")
                late.extend([value] if kind == "train" else [])
        for kind, axes in panels.items():
            axes.set_ylabel(LABELS[kind])
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="upper right" if kind == "train" else "lower right")
        if late:
            margin = 0.05 * (max(late) - min(late)) or 0.1
            panels["train"].set_ylim(min(late) - margin, max(late) + margin)
        if "norm" in panels:
            panels["norm"].set_yscale("log", subs=[2, 5])
            panels["norm"].yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        if "tok/s" in panels:
            panels["tok/s"].set_ylim(0, 1.05 * panels["tok/s"].get_ylim()[1])
            panels["tok/s"].yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            figure.savefig(temporary, format=os.path.splitext(path)[1][1:])
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                os.remove(temporary)
    return figure


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see --help")  # argparse's own errors in one line, too
    add = parser.add_argument
    add("log_dirs", nargs="+", metavar="DIR", help="directories of runs, each with a log.txt")
    add("--tokens_per_step", type=int, metavar="N", help="tokens a step of runs without a run.json (x shows steps)")
    add("--output", metavar="FILE", help="picture to write, .png, .svg or .pdf (curves.png in the first DIR)")
    switch = argparse.BooleanOptionalAction
    add("--reference", action=switch, help="draw OpenAI's figures (where a run.json tells of FineWeb-Edu)")
    add("--show", action="store_true", help="open the picture in the system's viewer, too")
    args = parser.parse_args()
    if args.tokens_per_step is not None and args.tokens_per_step < 1:
        fail(f"--tokens_per_step is {args.tokens_per_step}: it must be above 0")
    path = args.output or f"{args.log_dirs[0]}/curves.png"
    if not path.endswith((".png", ".svg", ".pdf")):
        fail(f"--output {path} is no picture: name a .png, .svg or .pdf file")
    try:
        draw(args.log_dirs, path, args.tokens_per_step, args.reference)
    except ImportError as error:
        fail(f"cannot draw ({error}): pip install -r requirements.txt")
    except (OSError, ValueError) as error:
        fail(f"{error}: name directories with a log.txt, and an --output that can be written")
    print(path)
    if args.show and not webbrowser.open(f"file://{os.path.abspath(path)}"):
        fail(f"--show finds no viewer: look at {path}")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has enough
        os._exit(0)
    except OSError as error:  # a full disk, say, under standard output
        print(f"error: {error}", file=sys.stderr)
        os._exit(1)
