"""Paths in the plane before and after gradient steps, for a maml_trpo.py run on a navigation task.

    python -m benchmark.trajectories RUN_DIR [--tasks 3] [--out trajectories.png]

One row a held-out task, one column a number of gradient steps; ten episodes each, the cross is the goal.
"""

import argparse

import torch

import common
import maml_trpo
from benchmark import plot


def play(run_dir, num_tasks):
    """Batches of maml_trpo.adapt around each gradient step on the first held-out tasks, and these tasks."""
    checkpoint = maml_trpo.load_checkpoint(run_dir)
    args = maml_trpo.Args(**checkpoint["args"])
    env = common.make(args.env_id, num_tasks * args.eval_episodes, seed=0)
    obs_dim = env.single_observation_space.shape[0] + args.oracle * env.task_space.shape[0]
    policy = maml_trpo.Policy(obs_dim, env.single_action_space, args.hidden_size, args.init_std)
    maml_trpo.restore(checkpoint, {"policy": policy})
    torch.manual_seed(maml_trpo.EVAL_SEED)
    tasks = env.sample_tasks(num_tasks, split="test")
    sizes, seed = maml_trpo.eval_step_sizes(args, args.inner_steps), maml_trpo.EVAL_SEED
    return maml_trpo.adapt(policy, maml_trpo.act, env, tasks, sizes, args, seed=seed), tasks


def draw(run_dir, num_tasks, out):
    """Draw the panels for this run folder into the file out."""
    batches, tasks = play(run_dir, num_tasks)
    size = (2.6 * len(batches), 2.6 * num_tasks)
    figure, panels = plot.pyplot().subplots(
        num_tasks, len(batches), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    for stage, batch in enumerate(batches):
        returns = maml_trpo.returns_of(batch).mean(1)
        for task, axes in enumerate(panels[:, stage]):
            for episode in range(min(10, batch["valid"].shape[2])):
                inside = batch["valid"][task, :, episode] > 0
                path = batch["obs"][task, inside, episode, :2]
                axes.plot(path[:, 0], path[:, 1], linewidth=0.8, alpha=0.7)
            axes.plot(*tasks[task, :2], "kx", markersize=9)
            plot.square_panel(axes, f"{stage} gradient steps: {returns[task]:.1f}", reach=0.75)
    figure.tight_layout()
    plot.save(figure, out, dpi=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", help="run folder of maml_trpo.py on PointGoal-v0")
    parser.add_argument("--tasks", type=int, default=3, help="rows of the picture")
    parser.add_argument("--out", default="trajectories.png", help="picture to write")
    arguments = parser.parse_args()
    draw(arguments.run_dir, arguments.tasks, arguments.out)
