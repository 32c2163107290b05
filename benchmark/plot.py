"""Learning and adaptation curves from the metrics.jsonl of one or more runs, and nothing else.

    python -m benchmark.plot RUN_DIR...  [--out curves.png]

Runs that differ in nothing but their seed are one curve. Left: held-out return against environment steps:
of the trial, of its last episode, or where an agent adapts by gradient steps, after as many as it was
trained for.
Right: held-out return by episode or gradient step on a new task, at the end; a dotted level for a policy that
is told its task. Bands are 95 % intervals: over seeds (Student's t) where there are several, which share
their held-out tasks, whose luck is not in it; over held-out tasks where there is one seed, says the legend.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import common

# What may differ between the seeds of one curve; the rest of the flags is the experiment.
NOT_THE_EXPERIMENT = "seed run_dir resume evaluate device compile track wandb_project wandb_entity save_every"
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
    student = (
        T_95[count] if count in T_95 else 1.96 + 2.5 / (count - 2)
    )  # three seeds are too few for the normal factor
    return means, [student * s / count**0.5 for s in spread]


def group_runs(folders):
    """Run folders -> [(script, args, [evaluated rows of one seed, ...]), ...], a group an experiment.

    Exits with one line if a seed is there twice: it would be counted as two.
    """
    groups, seeds = {}, set()
    for folder in folders:
        args, rows = read_run(folder)
        rows = [row for row in rows if "eval/return_ep0" in row]
        if not rows:
            print(f"{folder}: no evaluation yet, left out")
            continue
        script = Path(folder).name.split("__")[0]
        flags = {name: value for name, value in args.items() if name not in NOT_THE_EXPERIMENT.split()}
        key = (script, json.dumps(flags, sort_keys=True))
        if (key, args["seed"]) in seeds:
            sys.exit(f"error: {folder} is seed {args['seed']} of an experiment that has it already")
        seeds.add((key, args["seed"]))
        groups.setdefault(key, (script, args, []))[2].append(rows)
    return list(groups.values())


def differing_flags(all_args):
    """What tells a script's experiments apart: for each its flags that are not the same in all, as words."""
    names = [name for name in all_args[0] if name not in NOT_THE_EXPERIMENT.split()]
    names = [name for name in names if len({str(args.get(name)) for args in all_args}) > 1]
    names = [name for name in names if name != "env_id"]  # the label has it anyway
    return [" ".join(f"{name}={args.get(name)}" for name in names) for args in all_args]


def draw_references(axes, players, at, align):
    """Grey lines for the references; of several that nearly coincide, the last listed."""
    drawn, span = [], max(players.values(), default=1) - min(players.values(), default=0)
    for player, value in reversed(players.items()):
        if all(abs(value - other) > 0.04 * span for other in drawn):
            axes.axhline(value, color="gray", linestyle="--", linewidth=1)
            axes.annotate(player, (at, value), fontsize=7, color="gray", ha=align, va="bottom")
            drawn.append(value)


def stage_numbers(row):
    """The numbers of the stages that a row reports; eval/return_epsilon is a task of somebody's."""
    return sorted(int(key[14:]) for key in row if re.fullmatch(r"eval/return_ep\d+", key))


def headline(args, row):
    """What a run is judged by: key of the return, of its standard error, and in words."""
    if "eval/return_trial" in row:
        return "eval/return_trial", "eval/return_trial_se", "sum over the trial"
    if "inner_steps" not in args:
        last = max(stage_numbers(row))
        words = f"in episode {last + 1}" if last else "of an episode"
        return f"eval/return_ep{last}", f"eval/return_se_ep{last}", words
    steps = args["inner_steps"]
    return f"eval/return_ep{steps}", f"eval/return_se_ep{steps}", "after the gradient steps trained for"


def pyplot():
    """matplotlib.pyplot without a screen, imported only where something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def square_panel(axes, title, reach):
    """A map of the plane from -reach to reach in both directions."""
    axes.set_title(title, fontsize=9)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")


def save(figure, out, dpi):
    try:
        figure.savefig(out, dpi=dpi)
    except (OSError, ValueError) as error:
        sys.exit(f"error: --out {out}: {error}")
    print(f"wrote {out}")


def draw(folders, out):
    """Draw the two panels for these run folders into the file out."""
    plt = pyplot()
    groups = group_runs(folders)
    if not groups:
        sys.exit("error: nothing to draw, no run has been evaluated yet")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    flags = [""] * len(groups)
    for script in {script for script, _, _ in groups}:
        same = [number for number, group in enumerate(groups) if group[0] == script]
        for number, words in zip(same, differing_flags([groups[number][1] for number in same]), strict=True):
            flags[number] = words
    last_rows = [seeds[0][-1] for _, _, seeds in groups]
    judgements = {headline(args, seeds[0][-1])[2] for _, args, seeds in groups}  # scripts have their own
    one_task = len({args["env_id"] for _, args, _ in groups}) == 1
    # none adapts: there is nothing to draw by episode
    zero_shot = all("eval/return_ep1" not in row and "eval/success_ep0" in row for row in last_rows)
    for (script, args, seeds), differs in zip(groups, flags, strict=True):
        env_id, episodes = args["env_id"], args.get("episodes_per_trial")
        many = f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed, band over tasks"
        key, error, words = headline(args, seeds[0][-1])
        judged_by = words if len(judgements) > 1 else ""
        label = ", ".join(part for part in (f"{script} on {env_id}", judged_by, differs, many) if part)
        shortest = min(len(rows) for rows in seeds)  # where episodes end early seeds differ in steps a little
        steps = [sum(rows[i]["global_step"] for rows in seeds) / len(seeds) for i in range(shortest)]
        curve, band = mean_and_error(
            [[row[key] for row in rows] for rows in seeds], [[row[error] for row in rows] for rows in seeds]
        )
        (line,) = left.plot(steps, curve, label=label, marker="o", markersize=3 if len(curve) < 10 else 0)
        low, high = zip(*[(c - b, c + b) for c, b in zip(curve, band, strict=True)], strict=True)
        left.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
        numbers = stage_numbers(seeds[0][-1])
        if zero_shot:
            solved = [[row["eval/success_ep0"] for row in rows] for rows in seeds]
            curve, band = mean_and_error(solved, [[0.0 for _ in rows] for rows in seeds])
            right.plot(steps, curve, color=line.get_color())
            low, high = zip(*[(c - b, c + b) for c, b in zip(curve, band, strict=True)], strict=True)
            right.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
            continue
        if args.get("oracle") or len(numbers) == 1:  # told its task, it adapts to nothing: a level
            right.axhline(curve[-1], color=line.get_color(), linestyle=":")
            continue
        curve, band = mean_and_error(
            [[rows[-1][f"eval/return_ep{number}"] for number in numbers] for rows in seeds],
            [[rows[-1][f"eval/return_se_ep{number}"] for number in numbers] for rows in seeds],
        )
        style = {"marker": "o", "markersize": 3, "capsize": 2, "color": line.get_color(), "label": label}
        right.errorbar(numbers, curve, yerr=band, **style)
        env = common.make(env_id, num_envs=1, seed=0)
        if one_task:  # of several it would not show whose they are
            draw_references(left, env.trial_references.get(episodes, {}), at=steps[-1], align="right")
            draw_references(right, env.references, at=numbers[0], align="left")
    judged_by = words if len(judgements) == 1 else "which one: see below"
    left.set(xlabel="environment steps (all of them)", ylabel=f"held-out return,\n{judged_by}")
    stages = {"gradient steps" if "gradient" in words else "episode" for words in judgements}
    stage = " or ".join(sorted(stages))
    if zero_shot:
        right.set(
            xlabel="environment steps (all of them)", ylabel="held-out episodes with success", ylim=(0, 1)
        )
    else:
        right.set(xlabel=f"{stage} on a new task", ylabel="held-out return of an episode")
        right.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*left.get_legend_handles_labels(), fontsize=7, loc="outside lower center")
    save(figure, out, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", help="run folders, each with args.json and metrics.jsonl")
    parser.add_argument("--out", default="curves.png", help="picture to write")
    arguments = parser.parse_args()
    draw(arguments.run_dirs, arguments.out)
