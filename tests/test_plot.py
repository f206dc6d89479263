"""plot.py: the picture shows the values of the logs, also of logs that are being written and of build-nanogpt's."""

import json

import matplotlib
import numpy as np
import pytest
from conftest import call, losses, run
from matplotlib import image
from matplotlib.figure import Figure

matplotlib.use("Agg")
LABELS = {"train": "loss", "hella": "HellaSwag", "lr": "learning rate", "norm": "gradient", "tok/s": "tokens per"}
BUILD_NANOGPT = (
    "0 val 10.9482\n0 hella 0.2466\n0 train 10.955029\n250 val 6.1631\n250 hella 0.2434\n250 train 6.152315\n"
)
FINEWEB_EDU = {"tokenizer": "gpt2", "source": {"repo_id": "HuggingFaceFW/fineweb-edu"}}
BOOKS = {"tokenizer": "gpt2", "source": {"repo_id": None, "files": [["books.parquet", 7]]}}


def write_run(log_dir, log=None, **settings):
    """Write a run's log.txt (by default 1,000 steps of every kind) and run.json. Returns its directory."""
    rng = np.random.default_rng(len(log_dir.name))
    log_dir.mkdir(parents=True)
    if log is None:
        log = ""
        for step in range(1000):
            loss = 3 + 8 / (1 + step / 4)
            log += f"{step} train {loss + 0.1 * rng.normal():.6f}\n{step} lr {6e-4 * (step + 1) / 1000:.4e}\n"
            log += f"{step} norm {rng.uniform(0.2, 4):.4f}\n{step} tok/s {rng.uniform(9e3, 1e4):.1f}\n"
            if step % 50 == 0:
                log += f"{step} val {loss + 0.1:.4f}\n{step} hella {0.25 + step / 9e3:.4f}\n"
    (log_dir / "log.txt").write_text(log)
    if settings:
        (log_dir / "run.json").write_text(json.dumps(settings))
    return str(log_dir)


@pytest.fixture
def draw(monkeypatch):
    """Return a function that runs plot.py and returns its figure. The figure is not saved, which would take seconds."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))

    def run_plot(*flags):
        done = call("plot", *flags)
        assert (done.returncode, done.stderr) == (0, "")
        return figures[-1]

    return run_plot


def panel(figure, kind):
    """Return the axes of a kind of metric."""
    return next(axes for axes in figure.axes if axes.get_ylabel().startswith(LABELS[kind]))


def curves(figure, kind):
    """Return (x, y) of each line of a panel, without entries of the legend, and with x from 0 to 1."""
    lines = [line for line in panel(figure, kind).lines if len(line.get_xdata())]
    longest = max(np.max(line.get_xdata()) for line in lines)
    return [(np.array(line.get_xdata()) / longest, np.array(line.get_ydata())) for line in lines]


def legend(figure):
    """Return the labels in the legend of the losses."""
    return [text.get_text() for text in panel(figure, "train").get_legend().get_texts()]


def references(figure):
    """Return the values of the horizontal reference lines."""
    lines = [line for axes in figure.axes for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    return sorted(line.get_ydata()[0] for line in lines)


def test_the_curves_show_the_values_of_the_log(draw, tmp_path):
    log_dir = write_run(tmp_path / "log", total_batch_size=1000)
    figure = draw(log_dir)
    assert len(figure.axes) == 5 and figure.get_supxlabel().startswith("tokens")
    for kind in LABELS:
        x, y = curves(figure, kind)[0]
        expected = losses(log_dir, kind)
        np.testing.assert_allclose(x, np.array(list(expected)) / max(expected))
        np.testing.assert_allclose(y, list(expected.values()))
    val = list(losses(log_dir, "val").values())
    assert any(y.tolist() == val for _, y in curves(figure, "train"))
    assert f"val loss {val[-1]:.4f}" in legend(figure)[0]

    # the thick line is a mean over 2% of the run, less at the start and at the end
    values = list(losses(log_dir).values())
    _, means = curves(figure, "train")[1]
    for i in range(1000):
        before = min(i, 10)
        window = values[i - before : i + before + 1]
        assert means[i] == pytest.approx(sum(window) / len(window))

    # the y axes: the fall of the first steps would flatten the rest, and small changes of speed are small
    low, high = panel(figure, "train").get_ylim()
    assert values[0] > high and low < min(values[50:]) and max(values[50:]) < high
    assert panel(figure, "tok/s").get_ylim()[0] == 0
    assert panel(figure, "norm").get_yscale() == "log"


def test_runs_have_different_colors_which_are_the_same_in_every_panel(draw, tmp_path):
    runs = [write_run(tmp_path / name, total_batch_size=10**9) for name in ("a", "bb", "ccc")]
    figure = draw(*runs)
    handles, labels = panel(figure, "train").get_legend_handles_labels()
    for name, log_dir, label in zip(("a", "bb", "ccc"), runs, labels, strict=False):
        assert f"{name}: val loss {losses(log_dir, 'val')[950]:.4f}" in label
    colors = [handle.get_color() for handle in handles[:3]]
    assert len(set(colors)) == 3
    for i, log_dir in enumerate(runs):
        thin = panel(figure, "lr").lines[2 * i]
        assert thin.get_color() == colors[i]
        np.testing.assert_allclose(thin.get_ydata(), list(losses(log_dir, "lr").values()))


def test_log_of_build_nanogpt(draw, tmp_path):
    """It has no information on tokens and data, and neither learning rates nor norms."""
    log_dir = write_run(tmp_path / "log", BUILD_NANOGPT)
    figure = draw(log_dir)
    assert len(figure.axes) == 2 and references(figure) == []
    assert "--tokens_per_step" in figure.get_supxlabel()
    assert panel(figure, "hella").lines[0].get_xdata().tolist() == [0, 250]
    assert curves(figure, "hella")[0][1].tolist() == [0.2466, 0.2434]
    assert legend(figure)[1:] == ["train", "validation"]
    figure = draw(log_dir, "--tokens_per_step", 524288, "--reference")
    assert figure.get_supxlabel().startswith("tokens")
    assert references(figure) == [0.2955, 0.337, 3.2924]
    low, high = panel(figure, "train").get_ylim()
    assert 2 < low < 3.2924 < high


def test_runs_are_compared_by_tokens_if_all_have_tokens_per_step(draw, tmp_path):
    runs = [write_run(tmp_path / "a", BUILD_NANOGPT, total_batch_size=100), write_run(tmp_path / "b", BUILD_NANOGPT)]
    assert "steps" in draw(*runs).get_supxlabel()
    figure = draw(*runs, "--tokens_per_step", 50)
    assert [x.tolist() for x, _ in curves(figure, "hella")] == [[0, 1], [0, 0.5]]


def test_the_legend_names_the_tokenizers_of_runs_that_differ(draw, tmp_path):
    """Nats per byte and nats per token of GPT-2 cannot be compared."""
    runs = []
    for name, tokenizer in (("one", "gpt2"), ("two", "bytes"), ("three", "gpt2")):
        runs.append(write_run(tmp_path / name, "0 train 3\n", tokenizer=tokenizer))
    foreign = write_run(tmp_path / "foreign", "0 train 3\n")
    labels = legend(draw(*runs, foreign))
    for label, tokenizer in zip(labels, ("gpt2", "bytes", "gpt2"), strict=False):
        assert tokenizer in label
    assert "gpt2" not in labels[3] and "bytes" not in labels[3]
    assert not any("gpt2" in label for label in legend(draw(runs[0], runs[2], foreign)))


@pytest.mark.parametrize("total_batch_size, end", [(524288, "10B"), (524, "10M")])
def test_the_x_axes_are_readable_with_a_long_and_a_short_run(draw, tmp_path, total_batch_size, end):
    """Only the short run has values of HellaSwag, close to the origin of the long run."""
    long_run = write_run(tmp_path / "long", "0 train 9\n19073 train 3\n", total_batch_size=total_batch_size)
    short_run = write_run(tmp_path / "short", "0 hella 0.25\n70 hella 0.3\n", total_batch_size=128)
    figure = draw(long_run, short_run)
    figure.draw_without_rendering()
    for axes in figure.axes:
        left, right = axes.get_xlim()
        ticks = [tick.label1.get_text() for tick in axes.xaxis.get_major_ticks() if left <= tick.get_loc() <= right]
        assert len(ticks) >= 3 and max(map(len, ticks)) <= 5
        assert ticks[0] == "0" and ticks[-1] == end


@pytest.mark.parametrize(
    "settings, expected",
    [
        ([FINEWEB_EDU], True),
        ([FINEWEB_EDU, {}], True),  # compared with a log of build-nanogpt
        ([FINEWEB_EDU, BOOKS], False),
        ([{"tokenizer": "gpt2", "source": {"repo_id": "HuggingFaceFW/fineweb-edu-score-2"}}], False),
        ([{**FINEWEB_EDU, "tokenizer": "bytes"}], False),
        ([{"tokenizer": "gpt2", "source": None}], False),
    ],
)
def test_references_are_drawn_for_fineweb_edu_only(settings, expected, draw, tmp_path):
    runs = [write_run(tmp_path / str(i), "0 train 3.5\n", **one) for i, one in enumerate(settings)]
    assert bool(references(draw(*runs))) == expected
    assert not references(draw(*runs, "--no-reference"))


def test_odd_logs_are_drawn_as_far_as_they_can_be(draw, tmp_path):
    """Values that are not finite, other kinds and a line that is being written are left out; later values count."""
    log = "0 train 5\n1 train nan\n2 train 3\n0 hella nan\n3 odd 1\n2 train 4.5\n4 train 4\n"
    log += "5 train 3"  # may still become 3.9
    runs = [write_run(tmp_path / "a", log), write_run(tmp_path / "just_started", "")]
    figure = draw(*runs)
    assert len(figure.axes) == 1, "a panel for nothing"
    assert [one.tolist() for one in curves(figure, "train")[0]] == [[0, 0.5, 1], [5, 4.5, 4]]


def test_the_picture_of_a_run_shows_a_single_point_in_each_panel(tmp_path):
    """Each panel has pixels in the color of the run."""
    write_run(tmp_path / "log", "0 train 5.5\n0 hella 0.25\n0 lr 3e-4\n0 norm 2.5\n0 tok/s 1e4\n")
    # a backend that needs a display, which plot.py must not use
    environment = {"MPLBACKEND": "tkagg", "DISPLAY": "", "PYTHONWARNINGS": "error"}
    done = run("plot", "log", env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "log/curves.png\n", "")
    colors = image.imread(tmp_path / "log" / "curves.png")[:, :, :3]
    blue = np.abs(colors - [0, 0x72 / 255, 0xB2 / 255]).sum(axis=2) < 0.1
    height, width = blue.shape
    assert (height, width) == (1120, 1600)
    lower = blue[height * 11 // 20 :]
    upper = blue[height // 5 : height * 11 // 20]  # without the legend
    for part in [upper[:, : width * 3 // 5], upper[:, width * 3 // 5 :], *np.array_split(lower, 3, axis=1)]:
        assert part.sum() > 10
