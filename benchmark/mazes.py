"""Paths through the point maze of mtl_contextual.py runs, a panel a run, on the same held-out goals.

    python -m benchmark.mazes RUN_DIR... [--tasks 12] [--out mazes.png]

The episode begins in the upper left cell; a cross is a goal, in the colour of the path that was meant for it.
"""

import argparse

import torch

import common
import mtl_contextual
from benchmark import plot
from common.pointmaze import SIZE, WALLS


def play(run_dir, num_tasks):
    """An episode of mtl_contextual.rollout on the first held-out goals, and these goals [N, 2]."""
    checkpoint = mtl_contextual.load_checkpoint(run_dir)
    args = mtl_contextual.Args(**checkpoint["args"])
    env = common.make(args.env_id, num_tasks, seed=0)
    obs_dim, space = env.single_observation_space.shape[0], env.single_action_space
    known = checkpoint["modules"]["agent"]["tasks"]
    agent = mtl_contextual.make_contextual_agent(obs_dim, known, space, args)
    mtl_contextual.restore(checkpoint, {"agent": agent})
    tasks = env.sample_tasks(num_tasks, split="test")
    env.set_tasks(tasks)
    context, seed = mtl_contextual.adapt(tasks, agent.tasks, args.context), mtl_contextual.EVAL_SEED
    torch.manual_seed(seed)
    act, still = mtl_contextual.sample_action, args.deterministic_eval
    return mtl_contextual.rollout(agent, act, env, context, seed, still), tasks, args


def draw(run_dirs, num_tasks, out):
    """Draw a panel for each of these run folders into the file out."""
    plt = plot.pyplot()
    figure, panels = plt.subplots(1, len(run_dirs), figsize=(3.6 * len(run_dirs), 3.8), squeeze=False)
    for run_dir, axes in zip(run_dirs, panels[0], strict=True):
        episode, tasks, args = play(run_dir, num_tasks)
        half = SIZE / 2
        for row, cells in enumerate(WALLS):
            for column, cell in enumerate(cells):
                if cell == "#":
                    corner = (column - half, half - row - 1)
                    axes.add_patch(plt.Rectangle(corner, 1, 1, color="0.85"))
        for task in range(num_tasks):
            steps = int(episode["valid"][task].sum())
            path = episode["obs"][task, : steps + 1]
            (line,) = axes.plot(path[:, 0], path[:, 1], linewidth=1)
            axes.plot(*tasks[task], "x", markersize=8, color=line.get_color())
        solved = (episode["success"] * episode["valid"]).amax(1).mean()
        plot.square_panel(axes, f"her={args.her}: {solved:.0%} of these {num_tasks}", reach=half)
    figure.tight_layout()
    plot.save(figure, out, dpi=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", help="run folders of mtl_contextual.py on PointMaze-v0")
    parser.add_argument("--tasks", type=int, default=12, help="goals in a panel")
    parser.add_argument("--out", default="mazes.png", help="picture to write")
    arguments = parser.parse_args()
    draw(arguments.run_dirs, arguments.tasks, arguments.out)
