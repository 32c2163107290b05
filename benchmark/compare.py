"""All algorithms on the same held-out tasks, after the same number of environment steps.

    python -m benchmark.reproduce 'compare_pointgoal_*' --jobs 2   train the runs, or go on with them
    python -m benchmark.compare pointgoal                          evaluate them: results/compare_pointgoal.*

The checkpoints that lie in RUN_DIR/compare_TASK_METHOD/ are evaluated by their own scripts (--evaluate). The
CSV has a row for each method, seed and stage of adaptation, with the return on every held-out task; the
tables of the README are made from it alone. The picture, left: held-out return in the last stage as training
goes on, from metrics.jsonl, mean over seeds, bands as in benchmark.plot. Right: return by environment steps
spent on the new task.

Numbers are interquartile means over seeds and held-out tasks (the mean of the middle half) with 95 %
bootstrap intervals (Agarwal et al. 2021, arXiv:2108.13264). There tasks are fixed and only runs are drawn
again, apart for each task; here all tasks of a seed share one network and are a sample themselves, so whole
seeds are drawn with replacement, and tasks with replacement.
"""

import argparse
import contextlib
import csv
import importlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import common
from benchmark import plot
from benchmark.reproduce import RESULTS

ENV_IDS = {"pointgoal": "PointGoal-v0", "sparse": "SparsePointGoal-v0", "cheetah_vel": "HalfCheetahVel-v0"}
NUM_TASKS = 100  # the first of the held-out ones
STAGES = 4  # episodes of RL^2 and PEARL; of MAML, those before and after 1, 2, 3 gradient steps
# rows of a table: label, entry compare_TASK_<second>, flags beside --evaluate
METHODS = [
    ("told its task", "told", ""),
    ("RL^2", "rl2", ""),
    ("PEARL", "pearl", f"--eval-episodes {STAGES}"),
    ("MAML, gradient steps of 40 episodes", "maml", "--eval-episodes 40"),
    ("MAML, gradient steps of one episode", "maml", "--eval-episodes 1"),
    ("told nothing", "nothing", ""),
]


def returns_by_task(run, flags):
    """Evaluate a run's checkpoint by its own script. Returns returns and steps [NUM_TASKS, stages], and args.

    steps: environment steps spent on the task before the stage.
    """
    module, seen = importlib.import_module(Path(run).name.split("__")[0]), {}
    summarize = module.summarize

    def listen(returns, lengths, success=None):
        seen.update(returns=returns.double(), steps=(lengths.cumsum(1) - lengths).double())
        return summarize(returns, lengths, success)

    words = ["--evaluate", str(run), "--eval-tasks", str(NUM_TASKS), *flags.split()]
    with mock.patch.object(module, "summarize", listen), contextlib.redirect_stdout(io.StringIO()):
        module.main(words)
    return seen["returns"].numpy(), seen["steps"].numpy()


def random_player(env_id, seed):
    """Returns [NUM_TASKS, 1] of one episode of uniformly random actions on each of the held-out tasks."""
    env = common.make(env_id, NUM_TASKS, seed=seed)
    env.set_tasks(env.sample_tasks(NUM_TASKS, split="test"))
    env.reset(seed=seed)
    env.action_space.seed(seed)
    total, inside = torch.zeros(NUM_TASKS), torch.ones(NUM_TASKS)
    for _ in range(env.horizon):
        _, reward, terminated, truncated, _ = env.step(torch.as_tensor(env.action_space.sample()))
        total += reward * inside
        inside = inside * ~(terminated | truncated)
    return total[:, None].double().numpy()


def runs_of(task, method, run_dir):
    """The run folders of an entry, one a seed, the youngest of each."""
    found = sorted(Path(run_dir).glob(f"compare_{task}_{method}/*__*/checkpoint.pt"))
    return list({file.parent.name.split("__")[2]: file.parent for file in found}.values())


def measure(task, run_dir):
    """Rows of the CSV: every method, seed and stage, with its returns on the held-out tasks."""
    rows = []

    def add(label, seed, trained, returns, steps):
        for stage in range(returns.shape[1]):
            row = {"task": ENV_IDS[task], "method": label, "seed": seed, "stage": stage}
            row |= {"adapt_steps": round(steps[:, stage].mean(), 1), "trained_steps": trained}
            rows.append(row | {f"task{i}": f"{value:.6g}" for i, value in enumerate(returns[:, stage])})

    for label, method, flags in METHODS:
        runs = runs_of(task, method, run_dir)
        if not runs:
            print(f"{label}: no run in {run_dir}/compare_{task}_{method}, left out")
        for run in runs:
            log = (run / "metrics.jsonl").read_text().splitlines()
            seed, trained = json.loads((run / "args.json").read_text())["seed"], json.loads(log[-1])
            add(label, seed, trained["global_step"], *returns_by_task(run, flags))
    for seed in (1, 2, 3):
        returns = random_player(ENV_IDS[task], seed)
        add("random", seed, 0, returns, np.zeros_like(returns))
    return rows


def read(task):
    """The CSV of a comparison -> {method: {stage: (adapt_steps, trained_steps, returns [seeds, tasks])}}."""
    with open(RESULTS / f"compare_{task}.csv") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        returns = [float(value) for key, value in row.items() if key.startswith("task") and key != "task"]
        steps = float(row["adapt_steps"]), int(row["trained_steps"])
        found.setdefault(row["method"], {}).setdefault(int(row["stage"]), []).append((*steps, returns))
    return {
        method: {
            stage: tuple(np.array(x) for x in zip(*seeds, strict=True)) for stage, seeds in stages.items()
        }
        for method, stages in found.items()
    }


def interquartile_mean(values, axis=None):
    """The mean of the middle half of all values, whatever their shape; a quarter is rounded down.

    axis -1: of those along the last axis, [..., n] -> [...].
    """
    values = np.sort(values, axis)  # None: flattened
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(-1)


def bootstrap(returns, repeats=2000):
    """95 % interval of the interquartile mean. returns [seeds, tasks]; seeds and tasks are drawn again."""
    random = np.random.default_rng(0)
    seeds, tasks = (random.integers(count, size=(repeats, count)) for count in returns.shape)
    drawn = returns[seeds[:, :, None], tasks[:, None, :]]
    return np.percentile(interquartile_mean(drawn.reshape(repeats, -1), -1), [2.5, 97.5])


def curve(runs, stage):
    """Mean over the runs of the held-out return in a stage (or the last there is), against steps."""
    logs = [[row for row in plot.read_run(run)[1] if "eval/return_ep0" in row] for run in runs]
    shortest = min(map(len, logs))
    names = [max(n for n in range(stage + 1) if f"eval/return_ep{n}" in log[0]) for log in logs]
    values, errors = (
        [
            [row[f"eval/return{kind}_ep{n}"] for row in log[:shortest]]
            for log, n in zip(logs, names, strict=True)
        ]
        for kind in ("", "_se")
    )
    steps = [sum(log[i]["global_step"] for log in logs) / len(logs) for i in range(shortest)]
    return steps, *plot.mean_and_error(values, errors)


def draw(task, run_dir, out):
    """Draw the two panels into the file out."""
    plt = plot.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    found = read(task)
    for number, (label, method, flags) in enumerate(METHODS):
        if label not in found:
            continue
        color, stages = f"C{number}", found[label]
        if "--eval-episodes 1" not in flags:  # the same runs evaluated otherwise have no curve of their own
            steps, mean, band = map(np.array, curve(runs_of(task, method, run_dir), STAGES - 1))
            left.plot(steps, mean, color=color, label=label)
            left.fill_between(steps, mean - band, mean + band, color=color, alpha=0.15, linewidth=0)
        points = [(steps.mean(), interquartile_mean(x), *bootstrap(x)) for steps, _, x in stages.values()]
        x, middle, low, high = np.array(points).T
        if len(points) == 1:
            right.axhline(middle[0], color=color, linestyle=":")
        else:
            bars = np.abs(np.stack([middle - low, high - middle]))
            right.errorbar(
                x, middle, yerr=bars, color=color, marker="o", markersize=3, capsize=2, label=label
            )
    middle = interquartile_mean(found["random"][0][2])
    for axes in (left, right):
        axes.axhline(middle, color="gray", linestyle="--", linewidth=1)
    left.annotate("random", (left.get_xlim()[0], middle), fontsize=7, color="gray", va="bottom")
    left.set(xscale="log", xlabel="environment steps of training", ylabel="held-out return")
    left.set_title(f"after adaptation: episode {STAGES}, MAML {STAGES - 1} gradient steps", fontsize=9)
    right.set_xscale("symlog", linthresh=20)
    right.set(xlabel="environment steps spent on the new task", xlim=(-4, None))
    right.set_title("interquartile mean at the end", fontsize=9)
    handles = {
        label: handle
        for axes in (left, right)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, fontsize=7, loc="outside lower center", ncols=3)
    plot.save(figure, out, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=ENV_IDS, help="which comparison")
    parser.add_argument("--run-dir", default="runs", help="where the entries' run folders lie")
    options = parser.parse_args()
    rows = measure(options.task, options.run_dir)
    if len({row["method"] for row in rows}) == 1:
        sys.exit(f"error: no runs of compare_{options.task}_* in {options.run_dir}")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"compare_{options.task}.csv"
    with open(file, "w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {file}")
    draw(options.task, options.run_dir, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
