"""What a pearl_sac.py run on a task in the plane believes and does, episode by episode, on held-out tasks.

    python -m benchmark.posteriors RUN_DIR [--episodes 4] [--tasks 4] [--out posteriors.png]

Above: the paths of a few tasks, a colour each; the crosses are their goals. Below: the mean of the belief
q(z | context) that the episode is played with, of all tasks, in its two directions of largest variance after
the last episode, coloured by the goal (red grows with its x, blue with its y).
"""

import argparse

import torch

import common
import pearl_sac
from benchmark import plot


def play(run_dir, episodes):
    """Episodes and beliefs of pearl_sac.adapt as in the run's own evaluation, and its tasks [N, task_dim]."""
    checkpoint = pearl_sac.load_checkpoint(run_dir)
    args = pearl_sac.Args(**checkpoint["args"])
    env = common.make(args.env_id, 1, seed=0)
    num_tasks = args.eval_tasks or min(10_000, env.num_test_tasks)
    env = common.make(args.env_id, num_tasks, seed=0)
    agent = pearl_sac.make_agent(env.single_observation_space.shape[0], env.single_action_space, args)
    pearl_sac.restore(checkpoint, {"agent": agent})
    seed = pearl_sac.EVAL_SEED
    torch.manual_seed(seed)
    tasks = env.sample_tasks(num_tasks, split="test")
    env.set_tasks(tasks)
    number = (episodes or args.eval_episodes, args.eval_prior_episodes)
    act, still = pearl_sac.sample_action, args.deterministic_eval
    return *pearl_sac.adapt(agent, act, env, *number, args, seed, still), tasks


def principal_plane(points):
    """points: [N, latent] -> the two directions of their largest variance, [latent, 2]."""
    return torch.pca_lowrank(points, q=min(2, points.shape[1]))[2]


def draw(run_dir, episodes, num_tasks, out):
    """Draw the panels for this run folder into the file out."""
    episodes, beliefs, tasks = play(run_dir, episodes)
    figure, (above, below) = plot.pyplot().subplots(
        2, len(episodes), figsize=(2.7 * len(episodes), 5.6), squeeze=False
    )
    plane = principal_plane(beliefs[-1][0])
    span = (tasks - tasks.amin(0)) / (tasks.amax(0) - tasks.amin(0))
    colours = torch.stack([span[:, 0], 0.3 + 0 * span[:, 0], span[:, 1]], 1).numpy()
    for number, (episode, (mean, _)) in enumerate(zip(episodes, beliefs, strict=True)):
        returns = (episode["reward"] * episode["valid"]).sum(1)
        for task in range(num_tasks):
            last = int(episode["valid"][task].sum())
            path, colour = episode["obs"][task, : last + 1], f"C{task}"
            above[number].plot(path[:, 0], path[:, 1], color=colour, linewidth=1.2)
            above[number].plot(*path[0, :2], "o", color=colour, markersize=3)
            above[number].plot(*tasks[task, :2], "x", color=colour, markersize=9)
        plot.square_panel(above[number], f"episode {number + 1}: {returns.mean():.1f}", reach=1.4)
        below[number].scatter(*(mean @ plane).T.numpy(), c=colours, s=3)
    limits = [float(x) for x in (beliefs[-1][0] @ plane).abs().amax(0) * 1.1]
    for axes in below:
        axes.set(xlim=(-limits[0], limits[0]), ylim=(-limits[-1], limits[-1]), xticks=[], yticks=[])
    figure.tight_layout()
    plot.save(figure, out, dpi=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", help="run folder of pearl_sac.py on PointRobot-v0 or SparsePointGoal-v0")
    parser.add_argument("--episodes", type=int, default=0, help="columns; 0: as many as the run evaluates")
    parser.add_argument("--tasks", type=int, default=4, help="tasks whose paths are drawn")
    parser.add_argument("--out", default="posteriors.png", help="picture to write")
    arguments = parser.parse_args()
    draw(arguments.run_dir, arguments.episodes, arguments.tasks, arguments.out)
