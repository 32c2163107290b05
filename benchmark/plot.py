"""Learning and adaptation curves from the metrics.jsonl of one or more runs, and nothing else.

    python -m benchmark.plot RUN_DIR...  [--out curves.png]

Runs of one script on one task distribution are the seeds of one curve. Left: held-out return against
environment steps. Right: held-out return by episode on a new task, at the end. Bands are 95 %
intervals: over seeds (Student's t) where there are several, over held-out tasks where there
is one; the legend says which.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import common

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # of n seeds


def read_run(folder):
    """A run folder -> (args, rows of metrics). Exits with one line if it is not a run folder."""
    folder = Path(folder)
    try:
        args = json.loads((folder / "args.json").read_text())
        rows = [
            json.loads(row)
            for row in (folder / "metrics.jsonl").read_text().splitlines()
            if row.endswith("}")
        ]
    except OSError as error:
        sys.exit(f"error: {folder} is not a run folder ({error.strerror}: {Path(error.filename).name})")
    return args, rows


def mean_and_error(values, errors):
    """values, errors: one list a seed. Returns the mean over seeds and half its 95 % interval, as lists."""
    count = len(values)
    length = min(len(value) for value in values)
    means = [sum(value[i] for value in values) / count for i in range(length)]
    if count == 1:
        return means, [1.96 * error for error in errors[0][:length]]
    spread = [
        (sum((value[i] - means[i]) ** 2 for value in values) / (count - 1)) ** 0.5 for i in range(length)
    ]
    student = T_95.get(count, 1.96)  # three seeds are too few for the normal factor
    return means, [student * s / count**0.5 for s in spread]


def group_runs(folders):
    """Run folders -> {(script, env_id, episodes or None): [evaluated rows of one seed, ...]}."""
    groups = defaultdict(list)
    for folder in folders:
        args, rows = read_run(folder)
        rows = [row for row in rows if "eval/return_ep0" in row]
        if not rows:
            print(f"{folder}: no evaluation yet, left out")
            continue
        groups[Path(folder).name.split("__")[0], args["env_id"], args.get("episodes_per_trial")].append(rows)
    return groups


def draw_references(axes, players, at, align):
    """Grey lines for the references; of several that nearly coincide, the last listed."""
    drawn, span = [], max(players.values(), default=1) - min(players.values(), default=0)
    for player, value in reversed(players.items()):
        if all(abs(value - other) > 0.04 * span for other in drawn):
            axes.axhline(value, color="gray", linestyle="--", linewidth=1)
            axes.annotate(player, (at, value), fontsize=7, color="gray", ha=align, va="bottom")
            drawn.append(value)


def draw(folders, out):
    """Draw the two panels for these run folders into the file out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = group_runs(folders)
    if not groups:
        sys.exit("error: nothing to draw, no run has been evaluated yet")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for (script, env_id, episodes), seeds in groups.items():
        label = f"{script} on {env_id}, " + (
            f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed, band over tasks"
        )
        steps = [row["global_step"] for row in min(seeds, key=len)]
        curve, band = mean_and_error(
            [[row["eval/return_trial"] for row in rows] for rows in seeds],
            [[row["eval/return_trial_se"] for row in rows] for rows in seeds],
        )
        (line,) = left.plot(steps, curve, label=label)
        low, high = zip(*[(c - b, c + b) for c, b in zip(curve, band, strict=True)], strict=True)
        left.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
        numbers = sorted(int(key[14:]) for key in seeds[0][-1] if key.startswith("eval/return_ep"))
        curve, band = mean_and_error(
            [[rows[-1][f"eval/return_ep{number}"] for number in numbers] for rows in seeds],
            [[rows[-1][f"eval/return_se_ep{number}"] for number in numbers] for rows in seeds],
        )
        style = {"marker": "o", "markersize": 3, "capsize": 2, "color": line.get_color(), "label": label}
        right.errorbar(numbers, curve, yerr=band, **style)
        env = common.make(env_id, num_envs=1, seed=0)
        draw_references(left, env.trial_references.get(episodes, {}), at=steps[-1], align="right")
        draw_references(right, env.references, at=numbers[0], align="left")
    left.set(xlabel="environment steps (all of them)", ylabel="held-out return, sum over the trial")
    right.set(xlabel="episode on a new task", ylabel="held-out return of the episode")
    left.legend(fontsize=7, loc="center right")
    figure.savefig(out, dpi=130)
    print(f"wrote {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", help="run folders, each with args.json and metrics.jsonl")
    parser.add_argument("--out", default="curves.png", help="picture to write")
    arguments = parser.parse_args()
    draw(arguments.run_dirs, arguments.out)
