"""The data map: a picture of each training example by the mean and variance of its gold-token probability."""

import warnings
from pathlib import Path

import numpy as np

from infra.cli import check_output_folder


def check_plot_path(path: str, others) -> None:
    """Raise ValueError or FileNotFoundError unless a picture can be written to `path`, which is no other file."""
    if any(other is not None and Path(other).resolve() == Path(path).resolve() for other in others):
        raise ValueError(f"--plot {path}: is another file of this command; choose another name")
    check_output_folder(path)
    kinds = sorted(require_matplotlib().figure().canvas.get_supported_filetypes().keys() - {"pgf"})  # which needs LaTeX
    if Path(path).suffix.lower().removeprefix(".") not in kinds:
        raise ValueError(f"--plot {path}: must end in one of .{', .'.join(kinds)}")


def require_matplotlib():
    """Import pyplot for drawing to files; ValueError says how to install it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot_data_map(dynamics, halves, by: str, path, labels: dict[int, str]) -> None:
    """Draw the data map; if the halves are those by `probability`, with the line at which the split cuts.

    `dynamics` is a `confidence.TrainingDynamics`, `halves` are the indices (confident, unconfident) of its examples,
    split by the measure `by`, and `labels` names some of the most and least confident of them.
    """
    plt = require_matplotlib()
    warnings.filterwarnings("ignore", "Glyph .* missing")  # characters that the font lacks are drawn as boxes
    figure, axes = plt.subplots(figsize=(7, 6), layout="constrained")
    size = float(np.clip(20000 / len(dynamics.ids), 1, 25))
    for half, colour, name in zip(halves, ("#2a6f97", "#d1495b"), ("confident", "unconfident"), strict=True):
        label = f"{name} half{' by perplexity' * (by == 'perplexity')}, {len(half):,} examples"
        axes.scatter(dynamics.variance[half], dynamics.confidence[half], size, colour, alpha=0.35, lw=0, label=label)
    if by == "probability":
        cut = np.median(dynamics.confidence)
        axes.axhline(cut, color="black", lw=1, ls="--", label=f"the cut, at the median {cut:.3f}")
    axes.set(xlabel="variance of the gold-token probability", ylabel="confidence (its mean)")
    axes.set_title(f"Data map over {len(dynamics.probability)} checkpoints")
    axes.spines[["top", "right"]].set_visible(False)
    _write_labels(axes, dynamics, labels)
    for handle in figure.legend(loc="outside lower center", ncols=2, frameon=False).legend_handles:
        handle.set_alpha(1)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _write_labels(axes, dynamics, labels: dict[int, str]) -> None:
    """Name examples, with a line from each name to its point. The names are above and below all points, one a line."""
    from matplotlib.text import Text

    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    spacing = (high - low) / 20
    rows = sorted(labels, key=lambda row: dynamics.confidence[row])  # so that the lines do not cross
    below = [row for row in rows if dynamics.confidence[row] < np.median(dynamics.confidence)]
    above = rows[len(below) :]
    heights = [low - spacing * n for n in range(len(below), 0, -1)]
    heights += [high + spacing * n for n in range(1, len(above) + 1)]
    names = [
        axes.annotate(
            labels[row],
            (dynamics.variance[row], dynamics.confidence[row]),
            (axes.get_xlim()[0], height),
            verticalalignment="center",
            fontsize=9,
            parse_math=False,  # a dollar sign is one
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "gray", "relpos": (0, 0.5)},
        )
        for row, height in zip(rows, heights, strict=True)
    ]
    axes.set(yticks=ticks, ylim=(low - spacing * (len(below) + 0.5), high + spacing * (len(above) + 0.5)))
    axes.figure.draw_without_rendering()  # from here on, the width of a text is known
    width = max((Text.get_window_extent(name).width for name in names), default=0)
    left, _ = axes.transData.inverted().transform((axes.bbox.x1 - width, 0))
    for name in names:  # all start at one place, or a line would touch another name
        name.xyann = left, name.xyann[1]
