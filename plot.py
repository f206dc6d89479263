"""
Plot the curves of one or more runs as one picture.

    python plot.py log                                 # writes log/curves.png
    python plot.py log log2 log3 --output three.pdf    # three runs in one picture
    python plot.py log_bng --tokens_per_step 524288 --reference    # a log of build-nanogpt

Reads DIR/log.txt, which has one "step kind value" line per metric, as train_gpt2.py and
build-nanogpt write it. The settings of train_gpt2.py in DIR/run.json give the tokens per step, the
tokenizer and the training data. Takes two seconds, and can be used while a run is training.

Thin lines show the logged values, thick lines their means over 2% of a run. Dashed and dotted lines
show OpenAI's models.
"""

import argparse
import json
import os
import sys

import numpy as np

# The panels with their y labels, by the kind of metric. The kind "val" is drawn in panel "train".
PANEL_LABELS = {
    "train": "loss (nats per token)",
    "hella": "HellaSwag accuracy",
    "lr": "learning rate",
    "norm": "gradient norm",
    "tok/s": "tokens per second",
}

# Results of OpenAI's models: panel, model, value, line style. The loss is measured on the
# validation shard of FineWeb-Edu that build-nanogpt uses. HellaSwag is acc_norm. GPT-3's result is
# from table H.1 of "Language Models are Few-Shot Learners" (2020).
REFERENCES = [
    ("train", "GPT-2 124M", 3.2924, "--"),
    ("hella", "GPT-3 124M", 0.337, ":"),
    ("hella", "GPT-2 124M", 0.2955, "--"),
]

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
    "lines.markersize": 5,
}


# ---------------------------------------------------------------------------------- reading runs
def read_log(log_dir):
    """Read log.txt. Returns {kind: (steps (N,), values (N,))} with increasing steps.

    If a step is logged twice, the later value counts. Leaves out values that are not finite, and
    lines of another form, such as the last one while it is being written.
    """
    values_by_kind = {}  # {kind: {step: value}}
    with open(f"{log_dir}/log.txt", encoding="utf-8") as file:
        for line in file:
            try:
                step, kind, value = line.split()
                step, value = int(step), float(value)
            except ValueError:
                continue
            is_known = kind in PANEL_LABELS or kind == "val"
            if is_known and np.isfinite(value) and line.endswith("\n"):
                values_by_kind.setdefault(kind, {})[step] = value
    log = {}
    for kind, values in values_by_kind.items():
        steps = sorted(values)
        log[kind] = np.array(steps), np.array([values[step] for step in steps])
    return log


def read_settings(log_dir):
    """Read run.json. Returns {} for a run of another program, which has no such file."""
    if not os.path.exists(f"{log_dir}/run.json"):
        return {}
    with open(f"{log_dir}/run.json", encoding="utf-8") as file:
        return json.load(file)


def is_fineweb_edu(settings):
    """Return whether a run trains on FineWeb-Edu in GPT-2's tokens, so that references make sense."""
    source = settings.get("source") or {}  # None for shards without a meta.json
    return settings.get("tokenizer") == "gpt2" and source.get("repo_id") == "HuggingFaceFW/fineweb-edu"


# --------------------------------------------------------------------------------------- drawing
def smooth(values):
    """Return the means of values (N,) over windows of about 2%, (N,).

    At the start the windows are smaller, so that the steep start of a loss curve is not distorted.
    At the end they are cut off.
    """
    means = []
    for i in range(len(values)):
        side = min(i, len(values) // 100)  # values on each side of the middle
        means.append(values[i - side : i + side + 1].mean())
    return np.array(means)


def shorten(number, position=None):
    """Return a number as a short text, such as 250M or 1.5B. matplotlib also passes a position."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def make_panels(figure, kinds):
    """Create a panel for each kind of metric. Returns {kind: axes}."""
    # The grid has six columns. In the first row are loss and HellaSwag, in the second the others.
    # A name that is repeated is a panel of several columns.
    rows = [["train"] * 4 + ["hella"] * 2 if "hella" in kinds else ["train"] * 6]
    others = [kind for kind in ("lr", "norm", "tok/s") if kind in kinds]
    if others:
        rows.append(np.repeat(others, 6 // len(others)).tolist())
    panels = figure.subplot_mosaic(rows, height_ratios=[3, 2][: len(rows)])
    for kind, axes in panels.items():
        axes.set_ylabel(PANEL_LABELS[kind])
    return panels


def draw_run(panels, log, tokens_per_step, color, label):
    """Draw all curves of a run, and its entry in the legend."""
    for kind, (steps, values) in log.items():
        x = steps * tokens_per_step
        axes = panels["train" if kind == "val" else kind]
        if kind in ("val", "hella"):  # evaluated every few hundred steps: draw points
            axes.plot(x, values, "o", color=color, zorder=3)
            continue
        # logged at every step: draw a thin line, and a thick line through the means
        axes.plot(x, values, color=color, lw=0.6, alpha=0.35)
        # few points are clearer with marks, and a line through a single point is invisible
        marker = "o" if len(x) < 20 else None
        means = values if kind == "lr" else smooth(values)
        axes.plot(x, means, color=color, lw=1.8, marker=marker)
    if "val" in log:
        label = f"{label}: val loss {log['val'][1][-1]:.4f}"
    panels["train"].plot([], [], color=color, lw=4, label=label)


def finish_panels(panels, logs, reference):
    """Add OpenAI's results (if reference is true) and legends to the panels, and set their axes."""
    # legend entries for the two ways in which losses are drawn
    panels["train"].plot([], [], color=GRAY, lw=1.8, label="train")
    panels["train"].plot([], [], "o", color=GRAY, label="validation")
    if reference:
        for kind, model, value, line_style in REFERENCES:
            if kind in panels:
                label = f"{model}: {value}"
                panels[kind].axhline(value, color=GRAY, lw=1.2, ls=line_style, label=label)
        if "hella" in panels:
            panels["hella"].legend(loc="lower right")
    panels["train"].legend(loc="upper right")

    # losses: leave out the first twentieth of each run, whose steep fall would make the rest flat
    losses = [REFERENCES[0][2]] if reference else []
    for log in logs:
        for kind in {"train", "val"} & set(log):
            steps, values = log[kind]
            losses.extend(values[steps >= steps[-1] / 20])
    if losses:
        margin = 0.05 * (max(losses) - min(losses)) or 0.1
        panels["train"].set_ylim(min(losses) - margin, max(losses) + margin)
    # gradient norms: a linear axis would be flat, because they have spikes
    if "norm" in panels:
        panels["norm"].set_yscale("log", subs=[2, 5])
        panels["norm"].yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    # throughput: start at 0, so that small changes look small
    if "tok/s" in panels:
        panels["tok/s"].set_ylim(bottom=0)
        panels["tok/s"].yaxis.set_major_formatter(shorten)
    # All panels have the x axis of the longest run. With one of its own, the labels of a panel in
    # which only a short run has values would overlap.
    right = max(1, *(axes.get_xlim()[1] for axes in panels.values()))
    for axes in panels.values():
        axes.set_xlim(-0.02 * right, right)
        axes.xaxis.set_major_formatter(shorten)


def draw(log_dirs, tokens_per_step=None, reference=None):
    """Draw the runs in the directories log_dirs. Returns the figure.

    tokens_per_step is used for runs without a run.json. If it is unknown, the x axis shows steps.
    reference says whether to draw OpenAI's results; None means if all runs that have a run.json
    train on FineWeb-Edu.
    """
    from matplotlib import rc_context  # imported here because it is slow
    from matplotlib.figure import Figure

    # read the runs
    logs = [read_log(log_dir) for log_dir in log_dirs]
    if not any(logs):
        raise ValueError(f"{log_dirs[0]}/log.txt has no values yet: wait for the first steps")
    settings = [read_settings(log_dir) for log_dir in log_dirs]
    known_settings = [values for values in settings if values]

    # decide what to show
    if reference is None:
        reference = len(known_settings) > 0 and all(map(is_fineweb_edu, known_settings))
    x_label = "tokens"
    sizes = [values.get("total_batch_size", tokens_per_step) for values in settings]
    if None in sizes:
        x_label = "steps (to show tokens, pass --tokens_per_step)"
        sizes = [1] * len(sizes)
    labels = [os.path.normpath(log_dir) for log_dir in log_dirs]
    # losses per token of different tokenizers cannot be compared, so the legend names them
    if len({values.get("tokenizer") for values in known_settings}) > 1:
        for i, values in enumerate(settings):
            labels[i] += f" (tokenizer {values.get('tokenizer', 'unknown')})"

    # draw it
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 7), dpi=160, layout="constrained")  # inches
        figure.supxlabel(x_label, size=12)
        panels = make_panels(figure, set().union(*logs))
        for i, log in enumerate(logs):
            draw_run(panels, log, sizes[i], COLORS[i % len(COLORS)], labels[i])
        finish_panels(panels, logs, reference)
    return figure


# ---------------------------------------------------------------------------------- command line
def fail(message):
    """Report a user error in one line on stderr and exit with status 2."""
    print("error:", *str(message).split(), file=sys.stderr)  # some messages have several lines
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.error = fail  # argparse's errors in one line
    add = parser.add_argument
    add("log_dirs", nargs="+", metavar="DIR", help="directory of a run, which contains log.txt")
    add("--tokens_per_step", type=int, metavar="N", help="tokens per step of runs without a run.json")
    add("--output", metavar="FILE", help="picture: .png, .svg or .pdf (default: DIR/curves.png)")
    reference_help = "draw the results of OpenAI's models (default: for runs on FineWeb-Edu)"
    add("--reference", action=argparse.BooleanOptionalAction, help=reference_help)
    args = parser.parse_args()
    if args.tokens_per_step is not None and args.tokens_per_step <= 0:
        fail(f"--tokens_per_step {args.tokens_per_step} is too small: use a larger value")

    path = args.output or f"{args.log_dirs[0]}/curves.png"
    try:
        draw(args.log_dirs, args.tokens_per_step, args.reference).savefig(path)
    except (OSError, ValueError) as error:
        fail(f"cannot draw --output {path} ({error}): pass directories with a log.txt and a file to write")
    print(path)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # "?" for what a terminal cannot show
    main()
