"""
Plot the curves of one or more runs as one picture.

    python plot.py log                                 # writes log/curves.png
    python plot.py log log2 log3 --output three.png    # three runs in one picture
    python plot.py log --show                          # also opens the picture
    python plot.py log_bng --tokens_per_step 524288 --reference    # a log of build-nanogpt

Reads DIR/log.txt, which has one "step kind value" line per metric, as train_gpt2.py and
build-nanogpt write it. The settings of train_gpt2.py in DIR/run.json give the tokens per step and
the training data. Takes two seconds, and can be used while a run is training.

Thin lines show the logged values, thick lines their means over 2% of a run. Dashed and dotted lines
show OpenAI's models.
"""

import argparse
import json
import math
import os
import re
import signal
import sys
import webbrowser
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

# The panels with their y labels, by the kind of metric. The kind "val" is drawn in panel "train".
PANEL_LABELS = {
    "train": "loss (nats per token)",
    "hella": "HellaSwag accuracy",
    "lr": "learning rate",
    "norm": "gradient norm",
    "tok/s": "tokens per second",
}
KINDS = {*PANEL_LABELS, "val"}

# Results of OpenAI's models: panel, model, value, line style. The loss is measured on the
# validation shard of FineWeb-Edu that build-nanogpt uses. HellaSwag is acc_norm. GPT-3's result is
# from table H.1 of "Language Models are Few-Shot Learners" (2020).
REFERENCES = [
    ("train", "GPT-2 124M", 3.2924, "--"),
    ("hella", "GPT-3 124M", 0.337, ":"),
    ("hella", "GPT-2 124M", 0.2955, "--"),
]

# The thick line of a long run has this many points, about three per column of pixels.
SMOOTH_POINTS = 5000

# the palette of Okabe and Ito, which color-blind readers can also tell apart
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
GRAY = "#555555"
STYLE = {
    "agg.path.chunksize": 10_000,  # points drawn at a time: long lines take much less time
    "font.size": 12,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.xmargin": 0.02,
    "grid.color": "#e5e5e5",
    "legend.fontsize": 11,
    "legend.frameon": False,
    "legend.handlelength": 1.5,
    "lines.markeredgecolor": "white",
    "lines.markeredgewidth": 0.5,
    "lines.markersize": 5,
}


# ---------------------------------------------------------------------------------- reading runs
@dataclass
class Run:
    """The log and the settings of a run."""

    name: str
    log: dict  # {kind: (steps (N,), values (N,))}
    settings: dict  # the content of run.json, {} if there is none


# --- copied block: read_json ---
def read_json(path):
    """Return the JSON object in a file as a dict.

    Raises ValueError if the content is not a JSON object, OSError if the file cannot be read.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file")  # opening a named pipe would wait forever
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    return content


# --- end of copied block: read_json ---


def read_log(log_dir):
    """Read log.txt. Returns {kind: (steps (N,), values (N,))} with increasing steps.

    Lines that are not "step kind value" are skipped, and a warning counts them. Other kinds, and
    values that are infinite, NaN or too large for an axis, are left out. If a step is logged twice,
    the later value counts. Raises OSError or ValueError if the file cannot be read.
    """
    path = f"{log_dir}/log.txt"
    if os.path.exists(path) and not os.path.isfile(path):
        # opening a named pipe would wait forever
        raise ValueError(f"{path} is not a regular file: pass the directory of a run")
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().split("\n")
    lines.pop()  # what follows the last newline: nothing, or a line that is still being written

    # collect the values
    values_by_kind = {}  # {kind: {step: value}}
    skipped = []  # line numbers
    for number, line in enumerate(lines, 1):
        try:
            step, kind, value = line.split()
            step = int(step)
            value = float(value)
        except ValueError:
            skipped.append(number)
            continue
        # Larger numbers would overflow when Matplotlib computes the axes. NaN fails every
        # comparison, so it is also left out.
        if kind in KINDS and 0 <= step < 1e15 and abs(value) < 1e30:
            values_by_kind.setdefault(kind, {})[step] = value
    if skipped:
        print(
            f"warning: {path}: skipped {len(skipped)} of {len(lines)} lines that are not "
            f"'step kind value', the first is line {skipped[0]}",
            file=sys.stderr,
        )

    # sort them by step
    log = {}
    for kind, values in values_by_kind.items():
        steps = sorted(values)
        log[kind] = np.array(steps, float), np.array([values[step] for step in steps])
    return log


def read_settings(log_dir):
    """Read run.json. Returns {} if there is no such file, or, with a warning, if it is damaged."""
    path = f"{log_dir}/run.json"
    try:
        settings = read_json(path)
        # Only total_batch_size is used in computations, so only its value is checked.
        size = settings.get("total_batch_size", 1)
        if type(size) is not int or not 0 < size < 2**63:
            raise ValueError(f"{path}: total_batch_size is {size!r}, not a positive integer")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        print(f"warning: {error}: the file is ignored", file=sys.stderr)
        return {}
    return settings


def read_runs(log_dirs):
    """Read the runs in log_dirs. Raises OSError or ValueError if one of them cannot be read."""
    # The name of a run is that of its directory, or the whole path if two names are the same.
    names = [os.path.basename(os.path.abspath(log_dir)) for log_dir in log_dirs]
    if len(set(names)) < len(names):
        names = log_dirs
    runs = []
    for name, log_dir in zip(names, log_dirs, strict=True):
        runs.append(Run(name, read_log(log_dir), read_settings(log_dir)))
    return runs


# ------------------------------------------------------------------------------------- smoothing
def smooth(values):
    """Compute means of windows of about 2% of values (N,). Returns (indices (M,), means (M,)).

    means[i] is the mean around values[indices[i]]. M is N, or SMOOTH_POINTS for longer runs. At the
    start the windows are smaller and symmetric, so that the steep start of a loss curve is not
    distorted. At the end they are cut off.
    """
    N = len(values)
    reach = N // 100  # values on each side
    indices = np.linspace(0, N - 1, min(N, SMOOTH_POINTS)).round().astype(int)
    means = []
    for i in indices:
        before = min(i, reach)
        means.append(values[i - before : i + before + 1].mean())
    return indices, np.array(means)


# --------------------------------------------------------------------------------------- drawing
def choose_x_axis(runs, tokens_per_step):
    """Return the label of the x axis, and for each run the factor from steps to x."""
    # tokens per step of each run
    sizes = [run.settings.get("total_batch_size", tokens_per_step) for run in runs]
    if None in sizes:  # not all are known
        return "steps (to show tokens, pass --tokens_per_step)", [1] * len(runs)
    # the unit depends on the longest run
    most_tokens = 0
    for run, size in zip(runs, sizes, strict=True):
        for steps, _ in run.log.values():
            most_tokens = max(most_tokens, steps[-1] * size)
    if most_tokens >= 1e9:
        return "tokens (billions)", [size / 1e9 for size in sizes]
    return "tokens (millions)", [size / 1e6 for size in sizes]


def is_fineweb_edu(settings):
    """Return whether the settings of a run say that it trains on FineWeb-Edu in GPT-2's tokens."""
    pattern = r"HuggingFaceFW/fineweb-edu(?![\w-])"  # not fineweb-edu-score-2, which is another data set
    source = str(settings.get("source"))
    return settings.get("tokenizer") == "gpt2" and bool(re.search(pattern, source))


def want_references(runs):
    """Return whether OpenAI's results are comparable, so that they are drawn by default.

    They are if the data set of at least one run is known, and all known ones are FineWeb-Edu.
    """
    known = [run.settings for run in runs if "tokenizer" in run.settings]
    return len(known) > 0 and all(is_fineweb_edu(settings) for settings in known)


def make_panels(figure, runs):
    """Create a panel for each kind of metric. Returns {kind: axes}."""
    kinds = set()
    for run in runs:
        kinds.update(run.log)
    # The grid has six columns. In the first row are loss and HellaSwag, in the second the others.
    # A name that is repeated is a panel of several columns.
    rows = [["train"] * 6]
    if "hella" in kinds:
        rows = [["train"] * 4 + ["hella"] * 2]
    second_row = [kind for kind in ("lr", "norm", "tok/s") if kind in kinds]
    if second_row:
        width = 6 // len(second_row)
        rows.append(np.repeat(second_row, width).tolist())  # ["lr", "lr", "norm", "norm", ...]
    height_ratios = [3, 2][: len(rows)]
    return figure.subplot_mosaic(rows, height_ratios=height_ratios)


def draw_run(panels, run, scale, color):
    """Draw all curves of a run, with x = scale * step, and its entry in the legend."""
    for kind, (steps, values) in run.log.items():
        x = steps * scale
        axes = panels["train" if kind == "val" else kind]
        if kind in ("val", "hella"):  # evaluated every few hundred steps: draw points
            axes.plot(x, values, "o", color=color, zorder=3)
        else:  # logged at every step: draw a thin line, and a thick line through the means
            axes.plot(x, values, color=color, lw=0.6, alpha=0.35)
            if kind != "lr":
                indices, values = smooth(values)
                x = x[indices]
            # a line through a single point would be invisible, and few points are clearer with
            # marks
            marker = "o" if len(x) < 20 else None
            axes.plot(x, values, color=color, lw=1.8, marker=marker)

    # the entry in the legend
    label = run.name
    if "val" in run.log:
        _, values = run.log["val"]
        label = f"{label}: val loss {values[-1]:.4f}"
    # In Matplotlib, $ begins a formula, and labels that begin with _ are not shown.
    label = label.replace("$", r"\$")
    if label.startswith("_"):
        label = f" {label}"
    panels["train"].plot([], [], color=color, lw=4, label=label)


def draw_references(panels):
    """Draw the results of OpenAI's models as horizontal lines."""
    for kind, model, value, line_style in REFERENCES:
        if kind in panels:
            label = f"{model}: {value}"
            panels[kind].axhline(value, color=GRAY, lw=1.2, ls=line_style, label=label)


def loss_limits(runs, reference):
    """Return (low, high), the y range of the losses, or None if there are no losses.

    The first twentieth of each run is left out: with its steep fall in the picture, the rest of the
    curve would be flat.
    """
    losses = []
    for run in runs:
        for kind in ("train", "val"):
            if kind in run.log:
                steps, values = run.log[kind]
                losses.extend(values[steps >= steps[-1] / 20])
    if not losses:
        return None
    if reference:
        losses.extend(value for kind, _, value, _ in REFERENCES if kind == "train")
    low = min(losses)
    high = max(losses)
    if low == high:  # a single value
        margin = 0.1 * max(1.0, abs(high))
    else:
        margin = 0.05 * (high - low)
    return low - margin, high + margin


def finish_panels(panels, limits, reference):
    """Add labels, reference lines and legends to the panels, and set their y axes."""
    from matplotlib import ticker  # imported here because it is slow

    # legend entries for the two ways in which losses are drawn
    panels["train"].plot([], [], color=GRAY, lw=1.8, label="train")
    panels["train"].plot([], [], "o", color=GRAY, label="validation")
    if reference:
        draw_references(panels)

    # labels and legends
    for kind, axes in panels.items():
        axes.set_ylabel(PANEL_LABELS[kind])
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            axes.legend(loc="upper right" if kind == "train" else "lower right")

    # y axes
    if limits:
        panels["train"].set_ylim(limits)
    # Gradient norms have spikes, which would flatten a linear axis. A logarithmic axis needs at
    # least one value above 0; dataLim.minposy is the smallest of them, or infinite.
    if "norm" in panels and math.isfinite(panels["norm"].dataLim.minposy):
        panels["norm"].set_yscale("log", subs=[2, 5])
        panels["norm"].yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    # throughput starts at 0, so that small changes look small
    if "tok/s" in panels:
        _, top = panels["tok/s"].get_ylim()
        panels["tok/s"].set_ylim(0, 1.05 * top)
        panels["tok/s"].yaxis.set_major_formatter(ticker.EngFormatter(sep=""))


def save_figure(figure, path):
    """Write a figure to path atomically, in the format that the ending of path says."""
    # write to another name first, so that an error leaves an older picture as it is
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        figure.savefig(temporary, format=os.path.splitext(path)[1][1:])
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def draw(log_dirs, path, tokens_per_step=None, reference=None):
    """Draw the runs in the directories log_dirs, and write the picture to path. Returns the figure.

    tokens_per_step is used for runs without a run.json. reference says whether to draw OpenAI's
    results; None means yes if all runs that have a run.json train on FineWeb-Edu. Raises ValueError
    if there is nothing to draw, OSError if a file cannot be read or written.
    """
    from matplotlib import rc_context  # imported here because it is slow, and writes a cache
    from matplotlib.figure import Figure

    # read the runs, and decide what to draw
    runs = read_runs(log_dirs)
    if not any(run.log for run in runs):
        paths = ", ".join(f"{log_dir}/log.txt" for log_dir in log_dirs)
        raise ValueError(f"there is nothing to draw yet in {paths}: wait for the first training steps")
    if reference is None:
        reference = want_references(runs)
    x_label, scales = choose_x_axis(runs, tokens_per_step)

    # draw it
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 7), dpi=160, layout="constrained")  # inches
        figure.supxlabel(x_label, size=12)
        panels = make_panels(figure, runs)
        for i, run in enumerate(runs):
            draw_run(panels, run, scales[i], COLORS[i % len(COLORS)])
        finish_panels(panels, loss_limits(runs, reference), reference)
        save_figure(figure, path)
    return figure


# ---------------------------------------------------------------------------------- command line
# --- copied block: fail ---
def fail(message):
    """Report a user error in one line on stderr and exit with status 2."""
    one_line = " ".join(str(message).split())  # some messages have several lines
    print(f"error: {one_line}", file=sys.stderr)
    sys.exit(2)


# --- end of copied block: fail ---


# --- copied block: run_script ---
def run_script(main):
    """Call main() with output that suits terminals, pipes and files.

    Each line appears at once, and "?" replaces characters that the terminal cannot encode. If the
    program that reads the output has ended, as in "| head", the script ends silently. Any other
    OSError, for example a full disk, is reported in one line.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the script without a traceback
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, as in ">&-"
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (stays open)
        elif hasattr(stream, "reconfigure"):  # Jupyter's streams have no such method
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(0)  # a normal exit would write to the closed pipe again
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        os._exit(1)  # a normal exit would try to flush stdout again


# --- end of copied block: run_script ---


def parse_args():
    """Parse and check the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(f"{message}: see --help")  # argparse's own errors in one line
    parser.add_argument("log_dirs", nargs="+", metavar="DIR", help="directory of a run, which contains log.txt")
    parser.add_argument(
        "--tokens_per_step",
        type=int,
        metavar="N",
        help="tokens per step of runs without a run.json (default: unknown, show steps)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="picture to write, .png, .svg or .pdf (default: curves.png in the first DIR)",
    )
    parser.add_argument(
        "--reference",
        action=argparse.BooleanOptionalAction,
        help="draw the results of OpenAI's models (default: for runs on FineWeb-Edu)",
    )
    parser.add_argument("--show", action="store_true", help="also open the picture in the system's viewer")
    args = parser.parse_args()
    size = args.tokens_per_step
    if size is not None and not 0 < size < 2**63:
        fail(f"--tokens_per_step is {size}: it must be above 0 and below 2^63")
    return args


def main():
    args = parse_args()
    # check what can be checked before the slow work
    path = args.output or f"{args.log_dirs[0]}/curves.png"
    if os.path.splitext(path)[1] not in (".png", ".svg", ".pdf"):
        fail(f"--output {path} is not a picture file: use a name that ends with .png, .svg or .pdf")
    try:
        draw(args.log_dirs, path, args.tokens_per_step, args.reference)
    except ImportError as error:
        fail(f"cannot draw ({error}): run pip install -r requirements.txt")
    except ValueError as error:
        fail(error)
    except OSError as error:
        fail(f"{error}: pass directories with a log.txt, and an --output that can be written")
    print(path)
    if args.show and not webbrowser.open(f"file://{os.path.abspath(path)}"):
        fail(f"--show found no viewer: open {path} yourself")


if __name__ == "__main__":
    run_script(main)
