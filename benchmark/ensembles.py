"""Pictures of epopt.py's runs: return against the first parameter, and the source distribution as it adapted.

    python -m benchmark.ensembles RUN_DIR_OR_CSV... [--out ensembles.png]

A CSV is one of benchmark/results, whose rows are runs. Left: runs with the same flags but for the seed are
one line, the mean over them, from their last evaluation; its band reaches from the 10th to the 90th
percentile of episodes, and the grey part is beyond the training range. Right, where a run folder used
--adapt-to-target: draws of the first two parameters before any round and after the last one, for the first
such run, and the target as a star.
"""

import argparse
import csv
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import tyro

import common
import epopt
from benchmark import plot


def name_of(args):
    """What tells this run's method from the others."""
    if args["ensemble"] == "single":
        return "one model"
    words = "randomised" if args["epsilon"] == 1 else f"EPOpt({args['epsilon']:g})"
    words += ", uniform" if args["ensemble"] == "uniform" else ""
    return words + (", adapted" if args["adapt_to_target"] else "")


def read(path):
    """A run folder, or a CSV of runs -> [(its flags, its last evaluation), ...]."""
    if Path(path).suffix == ".csv":
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        flags = [tyro.cli(epopt.Args, args=row["command"].split()[1:]) for row in rows]
        return [(asdict(args), row) for args, row in zip(flags, rows, strict=True)]
    folder = Path(path)
    args = json.loads((folder / "args.json").read_text())
    if "epsilon" not in args:
        sys.exit(f"error: {folder} is not a run folder of epopt.py")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval/return_p10" in row][-1]
    return [(args, last)]


def curves(runs):
    """What read returns -> {method: [(value, mean, p10, p90), ...] for each of its runs}."""
    found = {}
    names = ("return_at", "return_p10_at", "return_p90_at")
    for args, last in runs:
        values = [match[1] for match in (re.fullmatch(r"eval/return_at_(.+)", key) for key in last) if match]
        points = [[float(x) for x in (v, *(last[f"eval/{name}_{v}"] for name in names))] for v in values]
        found.setdefault(name_of(args), []).append(sorted(points))
    return found


def draw_curves(axes, env, found):
    """Return against the first parameter of a model, a line a method."""
    for method, runs in found.items():
        values, mean, low, high = torch.tensor(runs).mean(0).T.tolist()
        line = axes.plot(values, mean, ".-", label=f"{method} ({len(runs)})")[0]
        axes.fill_between(values, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    low, high = env.ensemble[2:, 0].tolist()
    ends = axes.get_xlim()
    for start, end in ((ends[0], low), (high, ends[1])):
        axes.axvspan(start, end, color="0.9", zorder=0)
    axes.set(xlabel=env.parameter_names[0], ylabel="return", xlim=ends)
    axes.legend(fontsize=8)


def draw_source(axes, env, run_dir):
    """Where models came from before and after adaptation, in their first two parameters."""
    checkpoint = epopt.load_checkpoint(run_dir)
    args, particles = checkpoint["args"], checkpoint["modules"]["source"]["particles"]
    target = torch.tensor(args["target"]) if args["target"] else env.named_tasks["target"]
    for points, label in ((env.sample_tasks(len(particles)), "before"), (particles, "after")):
        axes.plot(points[:, 0], points[:, 1], ".", markersize=3, alpha=0.5, label=label)
    axes.plot(*target[:2], "k*", markersize=12, label="the target")
    axes.set(xlabel=env.parameter_names[0], ylabel=env.parameter_names[1])
    axes.legend(fontsize=8)


def draw(paths, out):
    """Draw these run folders and CSVs into the file out."""
    plt = plot.pyplot()
    runs = [run for path in paths for run in read(path)]
    env_id = runs[0][0]["env_id"]
    env = common.make(env_id, 1, seed=0)
    folders = [path for path in paths if Path(path).is_dir()]
    adapted = [folder for folder in folders if read(folder)[0][0]["adapt_to_target"]]
    columns = 1 + bool(adapted)
    figure, panels = plt.subplots(1, columns, figsize=(5 * columns, 3.6), squeeze=False)
    draw_curves(panels[0, 0], env, curves(runs))
    panels[0, 0].set_title(env_id, fontsize=10)
    if adapted:
        draw_source(panels[0, 1], env, adapted[0])
        rounds = int(epopt.load_checkpoint(adapted[0])["modules"]["source"]["rounds"])
        panels[0, 1].set_title(f"the source distribution, {rounds} rounds", fontsize=10)
    figure.tight_layout()
    plot.save(figure, out, dpi=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", help="run folders of epopt.py on one environment, or their CSVs")
    parser.add_argument("--out", default="ensembles.png", help="picture to write")
    arguments = parser.parse_args()
    draw(arguments.paths, arguments.out)
