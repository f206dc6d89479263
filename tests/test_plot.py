"""plot.py: the picture shows the values of the logs, and incomplete or odd logs do no harm."""

import json
import math
import os
import re
import subprocess
import sys
import time

import matplotlib
import numpy as np
import pytest
from conftest import SHARED, TINY, call, command, load, losses, run

matplotlib.use("Agg")
from matplotlib import image, pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

FINEWEB_EDU = {"repo_id": "HuggingFaceFW/fineweb-edu", "remote_name": "sample-10BT", "files": [["a.parquet", 7]]}
FOREIGN = "0 val 10.9482\n0 hella 0.2466\n0 train 10.955029\n250 val 6.1631\n250 hella 0.2434\n250 train 6.152315\n"


@pytest.fixture(autouse=True)
def close_figures():
    """Close the figures of a test at its end."""
    yield
    pyplot.close("all")


def write_run(log_dir, log=None, flags=None):
    """Write a run's log.txt (by default 200 steps of every kind) and run.json. Returns its directory."""
    rng = np.random.default_rng(len(log_dir.name))
    log_dir.mkdir(parents=True)
    if log is None:
        lines = []
        for step in range(200):
            loss = 3 + 8 / (1 + step / 4)
            lines.append(f"{step} train {loss + 0.1 * rng.normal():.6f}")
            lines.append(f"{step} lr {6e-4 * (step + 1) / 200:.4e}")
            lines.append(f"{step} norm {rng.uniform(0.2, 4):.4f}")
            lines.append(f"{step} tok/s {rng.uniform(9e3, 1e4):.1f}")
            if step % 50 == 0:
                lines.append(f"{step} val {loss + 0.1:.4f}")
                lines.append(f"{step} hella {0.25 + step / 9e3:.4f}")
        log = "\n".join(lines) + "\n"
    (log_dir / "log.txt").write_text(log)
    if flags is not None:
        (log_dir / "run.json").write_text(json.dumps(flags))
    return str(log_dir)


def panel(figure, label):
    """Return the axes whose y label starts with label."""
    return next(axes for axes in figure.axes if axes.get_ylabel().startswith(label))


def series(figure, label):
    """Return the data of the lines of a panel, except legend entries: arrays (2, N)."""
    lines = [line for line in panel(figure, label).lines if len(line.get_xdata())]
    return [np.array(line.get_data(), float) for line in lines]


def legend(figure):
    """Return the labels in the legend of the losses, as they are shown."""
    return [text.get_text() for text in panel(figure, "loss").get_legend().get_texts()]


def references(figure):
    """Return the heights of the dashed and dotted lines across the panels."""
    heights = []
    for axes in figure.axes:
        heights += [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    return sorted(heights)


def draw(log_dirs, tmp_path, pixels=False, **options):
    """Return plot.py's figure. With pixels, it is also written to tmp_path/picture.png, which is slow."""
    with pytest.MonkeyPatch.context() as patch:
        if not pixels:
            patch.setattr(Figure, "savefig", lambda self, path, **_: open(path, "w").close())
        return load("plot").draw([str(one) for one in log_dirs], str(tmp_path / "picture.png"), **options)


# --------------------------------------------------------------------------------- what is drawn
def test_the_curves_show_the_values_of_the_log(tmp_path):
    log_dir = write_run(tmp_path / "log", flags={"total_batch_size": 1000})
    figure = draw([log_dir], tmp_path)
    assert figure.get_supxlabel() == "tokens (millions)"
    labels = {"train": "loss", "hella": "HellaSwag", "lr": "learning rate", "norm": "gradient", "tok/s": "tokens per"}
    assert len(figure.axes) == len(labels)
    for kind, label in labels.items():
        expected = np.array([(step * 1000 / 1e6, value) for step, value in losses(log_dir, kind).items()]).T
        assert np.allclose(series(figure, label)[0], expected), kind
    val = np.array([(step / 1e3, value) for step, value in losses(log_dir, "val").items()]).T
    assert any(np.array_equal(one, val) for one in series(figure, "loss"))
    low, high = panel(figure, "loss").get_ylim()
    train = losses(log_dir)
    assert train[0] > high, "the fall of the first steps would flatten the rest"
    assert all(low < train[step] < high for step in range(10, 200))
    assert panel(figure, "tokens per").get_ylim()[0] == 0
    assert panel(figure, "gradient").get_yscale() == "log"


def test_smoothing_is_a_mean_around_each_point():
    values = np.random.default_rng(0).normal(size=1000)
    indices, means = load("plot").smooth(values)
    assert indices.tolist() == list(range(1000))
    for i, mean in enumerate(means):
        reach = min(i, 10)
        window = values[i - reach : i + reach + 1]
        assert math.isclose(mean, sum(window) / min(2 * reach + 1, 1010 - i), abs_tol=1e-12)


def test_a_spike_does_not_blur_the_mean_of_later_steps():
    values = np.ones(1000)
    values[100] = 1e30
    _, means = load("plot").smooth(values)
    assert np.array_equal(means[111:], np.ones(889))


@pytest.mark.parametrize("num_values", [0, 1, 2, 99, 100, 101, 399, 1000, 2345, 5000, 5001, 12345])
def test_smoothing_equals_plain_means_for_every_length(num_values):
    values = np.random.default_rng(num_values).normal(size=num_values)
    indices, means = load("plot").smooth(values)
    reach = num_values // 100
    expected = []
    for i in indices.tolist():
        before = min(i, reach)
        window = values[i - before : i + before + 1].tolist()
        expected.append(math.fsum(window) / len(window))
    assert means.shape == indices.shape
    assert np.allclose(means, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_values", [5001, 12345, 600_000])
def test_the_means_of_a_long_run_are_spread_evenly_from_its_first_to_its_last_step(num_values):
    indices, _ = load("plot").smooth(np.zeros(num_values))
    assert len(indices) == 5000
    assert (indices[0], indices[-1]) == (0, num_values - 1)
    steps_between = np.diff(indices)
    assert steps_between.min() >= 1
    assert steps_between.max() - steps_between.min() <= 1


def test_smoothing_takes_linear_time():
    """Plain means over windows of 12,000 values around each of 600,000 values would take seconds."""
    plot = load("plot")
    values = np.random.default_rng(0).normal(size=600_000)
    start = time.process_time()
    plot.smooth(values)
    assert time.process_time() - start < 1.0


def test_the_thick_line_of_a_long_run_is_at_the_right_steps(tmp_path):
    log = "".join(f"{step} train {step / 1000}\n" for step in range(20_000))
    figure = draw([write_run(tmp_path / "log", log)], tmp_path)
    (x, y), (mean_x, mean_y) = series(figure, "loss")
    assert len(x) == 20_000 and len(mean_x) == 5000
    middle = mean_x < 19_000  # the last windows are cut off
    assert np.allclose(mean_y[middle], mean_x[middle] / 1000)


def test_runs_are_drawn_in_different_colors(tmp_path):
    runs = [write_run(tmp_path / name, flags={"total_batch_size": 10**9}) for name in ("a", "bb", "ccc")]
    runs[0] += "/"
    figure = draw(runs, tmp_path)
    assert figure.get_supxlabel() == "tokens (billions)"
    handles, labels = panel(figure, "loss").get_legend_handles_labels()
    last = losses(runs[1], "val")[150]
    assert [label.split(":")[0] for label in labels] == ["a", "bb", "ccc", "train", "validation"]
    assert labels[1] == f"bb: val loss {last:.4f}"
    assert len({handle.get_color() for handle in handles[:3]}) == 3
    for i, log_dir in enumerate(runs):
        raw = series(figure, "learning rate")[2 * i]
        assert np.allclose(raw[1], list(losses(log_dir, "lr").values()))
        color = panel(figure, "learning rate").lines[2 * i].get_color()
        assert color == handles[i].get_color(), "a run has one color in every panel"


def test_runs_with_the_same_name_are_labeled_with_their_paths(tmp_path):
    runs = [write_run(tmp_path / name / "log") for name in "ab"]
    labels = panel(draw(runs, tmp_path), "loss").get_legend_handles_labels()[1]
    assert [label.split(": val")[0] for label in labels[:2]] == runs


@pytest.mark.parametrize("name", ["_run", "__", "a$b$c", "$", "_$x$", "-1"])
def test_every_name_of_a_run_is_in_the_legend(name, tmp_path):
    log_dir = write_run(tmp_path / name, "0 train 5\n1 train 4\n1 val 4.2\n")
    figure = draw([log_dir], tmp_path, pixels=True)
    label = legend(figure)[0]
    assert label.replace("\\$", "$").strip() == f"{name}: val loss 4.2000"


def test_log_of_build_nanogpt(tmp_path):
    """It has no information on tokens and data, and neither learning rates nor norms."""
    log_dir = write_run(tmp_path / "log", FOREIGN)
    figure = draw([log_dir], tmp_path)
    assert "steps" in figure.get_supxlabel() and "--tokens_per_step" in figure.get_supxlabel()
    assert len(figure.axes) == 2 and references(figure) == []
    assert np.array_equal(series(figure, "HellaSwag")[0], [[0, 250], [0.2466, 0.2434]])
    figure = draw([log_dir], tmp_path, tokens_per_step=524288, reference=True)
    assert figure.get_supxlabel() == "tokens (millions)"
    assert np.allclose(series(figure, "HellaSwag")[0][0], [0, 131.072])
    assert references(figure) == [0.2955, 0.337, 3.2924]
    low, high = panel(figure, "loss").get_ylim()
    assert low < 3.2924 < high


def test_steps_are_shown_where_the_tokens_of_one_run_are_unknown(tmp_path):
    runs = [write_run(tmp_path / "a", FOREIGN, {"total_batch_size": 524288}), write_run(tmp_path / "b", FOREIGN)]
    assert "steps" in draw(runs, tmp_path).get_supxlabel()
    assert draw(runs, tmp_path, tokens_per_step=1).get_supxlabel() == "tokens (millions)"


# ------------------------------------------------------------------------------------ references
EDU = {"tokenizer": "gpt2", "source": FINEWEB_EDU}
BOOKS = {"tokenizer": "gpt2", "source": {"repo_id": None, "files": [["books.parquet", 7]]}}
SCORE_2 = {"tokenizer": "gpt2", "source": {"repo_id": "HuggingFaceFW/fineweb-edu-score-2"}}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([EDU], True),
        ([EDU | {"source": str(FINEWEB_EDU)}], True),
        ([EDU | {"source": json.dumps(FINEWEB_EDU)}], True),
        ([EDU, None], True),  # compared with a log of build-nanogpt
        ([EDU, BOOKS], False),
        ([BOOKS], False),
        ([SCORE_2], False),
        ([EDU | {"tokenizer": "bytes"}], False),
        ([{"tokenizer": "gpt2"}], False),
        ([{"total_batch_size": 8}], False),
        ([[1, 2]], False),
        ([None], False),
    ],
)
def test_references_are_drawn_for_fineweb_edu_only(tmp_path, flags, expected):
    runs = [write_run(tmp_path / str(i), "0 train 3.5\n", one) for i, one in enumerate(flags)]
    assert bool(references(draw(runs, tmp_path))) == expected
    assert not references(draw(runs, tmp_path, reference=False))


def test_the_name_of_fineweb_edu_is_that_of_fineweb_py():
    default = re.search(r"--repo_id .*?\(default:\s+(\S+)\)", call("fineweb", "--help").stdout, re.S)[1]
    assert default == FINEWEB_EDU["repo_id"]


# ---------------------------------------------------------------- incomplete and odd logs
def test_a_log_cut_in_the_middle_of_a_line_is_drawn_without_it(tmp_path, capsys):
    log_dir = write_run(tmp_path / "log", "0 train 5.5\n1 train 5.4\n2 train 5.3\n3 train 4")  # perhaps 4.9
    assert np.array_equal(series(draw([log_dir], tmp_path), "loss")[0], [[0, 1, 2], [5.5, 5.4, 5.3]])
    assert capsys.readouterr().err == ""


def test_lines_of_another_form_are_skipped_and_counted(tmp_path, capsys):
    lines = ["0 train 5.5", "", "1 train", "one train 5", "1 train five", "\0\0\0", "1 train 5.4", "2 odd 1", "\xff x"]
    log_dir = write_run(tmp_path / "log", "\n".join(lines) + "\n")
    assert np.array_equal(series(draw([log_dir], tmp_path), "loss")[0], [[0, 1], [5.5, 5.4]])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{log_dir}/log.txt: skipped 6 of 9 lines" in err and "line 2" in err


@pytest.mark.parametrize("kind", ["train", "val", "hella", "norm"])
def test_fractional_steps_are_skipped_and_the_rest_is_drawn(kind, tmp_path, capsys):
    """Also if all steps of a kind are fractional."""
    log_dir = write_run(tmp_path / "log", f"0 train 5\n0.5 {kind} 4\n1 train 4\n1 lr 1e-3\n")
    figure = draw([log_dir], tmp_path, pixels=True)
    assert np.array_equal(series(figure, "loss")[0], [[0, 1], [5, 4]])
    assert "skipped 1 of 4 lines" in capsys.readouterr().err


def test_numbers_of_thousands_of_digits_are_left_out(tmp_path, capsys):
    many = "9" * 5000
    log = f"{many} train 4\n0 train 5\n1 train {many}\n{'9' * 4000} train 4\n2 {many} 4\n3 train 4\n-1 train 4\n"
    figure = draw([write_run(tmp_path / "log", log)], tmp_path, pixels=True)
    assert np.array_equal(series(figure, "loss")[0], [[0, 3], [5, 4]])
    assert "skipped 1 of 7 lines" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 2**62])
def test_the_largest_values_can_be_drawn(size, tmp_path):
    big = 9.9e29
    log = f"0 train {big}\n1 train {-big}\n{10**15 - 1} val {big}\n0 lr {big}\n0 norm {big}\n"
    log += f"0 hella {big}\n0 tok/s {big}\n1 tok/s 1e-300\n"
    log_dir = write_run(tmp_path / "log", log, flags={"total_batch_size": size})
    figure = draw([log_dir], tmp_path, pixels=True)
    assert len(figure.axes) == 5


@pytest.mark.parametrize("log", ["0 train 9e29\n", "0 norm 0\n1 norm -1\n", "0 tok/s 0\n", "0 train 0\n"])
@pytest.mark.filterwarnings("error")
def test_constant_and_zero_values_give_no_warning(log, tmp_path):
    draw([write_run(tmp_path / "log", log)], tmp_path, pixels=True)


WRONG_FLAGS = {
    "empty": "",
    "list": "[1, 2]",
    "text": '{"total_batch_size": "many"}',
    "infinite": '{"total_batch_size": Infinity}',
    "too large for a float": '{"total_batch_size": 1' + "0" * 400 + "}",
    "number of 5,000 digits": '{"total_batch_size": ' + "9" * 5000 + "}",
    "negative": '{"total_batch_size": -3}',
    "boolean": '{"total_batch_size": true}',
    "null": '{"total_batch_size": null}',
    "deeply nested": '{"a":' * 100_000,
}


@pytest.mark.parametrize("kind", [*WRONG_FLAGS, "pipe"])
def test_damaged_run_json_gives_a_warning_and_a_picture_with_steps(kind, tmp_path, capsys):
    log_dir = write_run(tmp_path / "log")
    path = tmp_path / "log" / "run.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(WRONG_FLAGS[kind])
    figure = draw([log_dir], tmp_path)
    assert figure.get_supxlabel().startswith("steps")
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and err.count("\n") == 1 and str(path) in err


@pytest.mark.parametrize("flags", [{}, {"tokenizer": ["gpt2"], "source": 7}, {"tokenizer": "gpt2", "source": [[1]]}])
def test_run_json_without_the_fields_that_are_used(flags, tmp_path, capsys):
    figure = draw([write_run(tmp_path / "log", flags=flags)], tmp_path)
    assert figure.get_supxlabel().startswith("steps")
    assert references(figure) == []
    assert capsys.readouterr().err == ""


def test_a_step_that_is_logged_twice_counts_once(tmp_path):
    log_dir = write_run(tmp_path / "log", "0 train 5\n1 train 4\n2 train 3\n1 train 4.5\n")
    assert np.array_equal(series(draw([log_dir], tmp_path), "loss")[0], [[0, 1, 2], [5, 4.5, 3]])


def test_values_that_cannot_be_drawn_are_left_out(tmp_path, capsys):
    log = "0 train 5\n1 train nan\n2 train inf\n3 train 4\n4 train 1e308\n5 train -1e308\n0 hella nan\n0 norm nan\n"
    figure = draw([write_run(tmp_path / "log", log)], tmp_path, pixels=True)
    assert np.array_equal(series(figure, "loss")[0], [[0, 3], [5, 4]])
    assert len(figure.axes) == 1, "a panel for nothing"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["train", "val"])
def test_a_single_point_is_visible(tmp_path, kind):
    """Each panel has pixels in the color of the run."""
    log = f"0 {kind} 5.5\n0 hella 0.25\n0 lr 3e-4\n0 norm 2.5\n0 tok/s 1e4\n"
    figure = draw([write_run(tmp_path / "log", log)], tmp_path, pixels=True)
    colors = image.imread(tmp_path / "picture.png")[::-1, :, :3]  # from the bottom up
    blue = np.abs(colors - [0, 0x72 / 255, 0xB2 / 255]).sum(axis=2) < 0.1
    assert len(figure.axes) == 5
    for axes in figure.axes:
        (left, bottom), (right, top) = axes.get_window_extent().get_points().astype(int)
        below = bottom + (top - bottom) * 3 // 4 if axes.get_legend() else top
        assert blue[bottom:below, left:right].sum() > 10, axes.get_ylabel()


def test_a_run_without_values_can_be_drawn_with_another(tmp_path):
    runs = [write_run(tmp_path / "a", FOREIGN), write_run(tmp_path / "b", "")]
    assert len(series(draw(runs, tmp_path), "loss")) == 3


# ----------------------------------------------------------------------------------- command line
def test_the_picture_of_a_real_run(tmp_path, byte_shards):
    log_dir = tmp_path / "log"
    done = call("train_gpt2", "--data_dir", byte_shards, "--log_dir", log_dir, *TINY, "--no-compile")
    assert done.returncode == 0, done.stderr
    environment = {"MPLBACKEND": "tkagg", "DISPLAY": ""}  # a backend that could not open here
    done = run("plot", "log", "--tokens_per_step", 128, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "log/curves.png\n", "")
    picture = image.imread(log_dir / "curves.png")
    assert picture.shape[:2] == (1120, 1600)
    assert not list(log_dir.glob("*.tmp"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nosuch"], ["nosuch/log.txt", "log.txt"]),
        (["empty"], ["empty/log.txt", "nothing to draw"]),
        (["nan"], ["nan/log.txt", "nothing to draw"]),
        (["odd"], ["odd/log.txt", "nothing to draw"]),
        (["good", "nosuch"], ["nosuch/log.txt"]),
        (["empty", "nan"], ["nothing to draw", "empty/log.txt, nan/log.txt"]),
        (["good", "--output", "nosuch/a.png"], ["nosuch/a.png", "--output"]),
        (["good", "--output", "good"], ["good"]),
        (["good", "--output", "a.foo"], ["foo", "png"]),
        (["good", "--output", "a.pgf"], ["pgf", "png"]),
        (["good", "--output", ".png"], [".png"]),
        (["good", "--tokens_per_step", "0"], ["--tokens_per_step is 0"]),
        (["good", "--tokens_per_step", "1" + "0" * 400], ["--tokens_per_step is 1"]),
        (["pipe"], ["pipe/log.txt", "not a regular file"]),
        (["good", "--tokens_per_step", "many"], ["--tokens_per_step", "--help"]),
        ([], ["DIR", "--help"]),
    ],
)
def test_user_errors_are_reported_in_one_line(tmp_path, monkeypatch, flags, words):
    for name, log in {"empty": "", "nan": "0 train nan\n", "odd": "0 skipped 1\n", "good": "0 train 5\n"}.items():
        write_run(tmp_path / name, log)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "log.txt")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    done = call("plot", *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    for word in words:
        assert word in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_the_last_picture_stays_when_the_next_cannot_be_written(tmp_path, monkeypatch):
    def half(self, path, **_):
        with open(path, "w") as file:
            file.write("half a pict")
        raise OSError(28, "No space left on device")

    log_dir = write_run(tmp_path / "log", "0 train 5\n")
    (tmp_path / "log" / "curves.png").write_text("the last picture")
    monkeypatch.setattr(Figure, "savefig", half)
    done = call("plot", log_dir)
    assert done.returncode == 2 and "No space left" in done.stderr
    assert (tmp_path / "log" / "curves.png").read_text() == "the last picture"
    assert sorted(one.name for one in (tmp_path / "log").iterdir()) == ["curves.png", "log.txt"]


@pytest.mark.parametrize("redirection, status", [("| true", 0), (">/dev/full", 1), (">&-", 0), ("2>&-", 0)])
def test_closed_and_full_outputs_give_no_traceback(redirection, status, tmp_path):
    write_run(tmp_path / "log", "0 train 5\n")
    line = " ".join(f"'{word}'" for word in command("plot", "log"))
    line = ["bash", "-c", f"set -o pipefail; {line} {redirection}"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr.count("\n")) == (status, status)
    assert ("No space left" in done.stderr) == (status == 1)
    assert (tmp_path / "log" / "curves.png").exists()


def test_path_that_the_terminal_cannot_show_is_printed_with_question_marks(tmp_path):
    log_dir = write_run(tmp_path / "grün", "0 train 5\n")
    done = run("plot", log_dir, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("gr?n/curves.png\n")


def test_plot_on_simulated_windows(tmp_path):
    if not (SHARED / "sim" / "win").is_dir():
        pytest.skip("the simulation win is not in ../shared/sim")
    log_dir = write_run(tmp_path / "log", "0 train 5\n")
    for _ in range(2):  # the second picture replaces the first
        done = run("plot", log_dir, env={"PYTHONPATH": str(SHARED / "sim" / "win")})
        assert (done.returncode, done.stderr) == (0, "")


def test_without_matplotlib_a_line_says_how_to_get_it(tmp_path, monkeypatch):
    log_dir = write_run(tmp_path / "log", "0 train 5\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = call("plot", log_dir)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "matplotlib" in done.stderr and "pip install -r requirements.txt" in done.stderr


def test_show_opens_the_picture(tmp_path):
    log_dir = write_run(tmp_path / "log", "0 train 5\n")
    viewer = tmp_path / "viewer"
    seen = tmp_path / "seen"
    viewer.write_text(f'#!/bin/sh\necho "$1" > {seen}\n')
    viewer.chmod(0o755)
    done = run("plot", log_dir, "--show", env={"BROWSER": f"{viewer} %s"})
    assert (done.returncode, done.stderr) == (0, "")
    assert seen.read_text() == f"file://{log_dir}/curves.png\n"


def test_show_without_a_viewer_still_writes(tmp_path):
    log_dir = write_run(tmp_path / "log", "0 train 5\n")
    done = run("plot", log_dir, "--show", env={"BROWSER": "", "PATH": "", "DISPLAY": ""})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "viewer" in done.stderr
    assert (tmp_path / "log" / "curves.png").exists()
