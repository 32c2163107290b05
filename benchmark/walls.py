"""Paths of darc_offdynamics.py runs on PointWall-v0, a column a run: in the source, and below in the target.

    python -m benchmark.walls RUN_DIR... [--episodes 12] [--out walls.png]

The grey block is the wall, dashed where it is not there; a dot is a start and the circle is the goal. Steps
in the source are the redder, the more the correction holds against them.
"""

import argparse

import torch

import darc_offdynamics
from benchmark import plot
from common.pairs import GOAL, LEFT, RADIUS, RIGHT


def play(run_dir, episodes):
    """Episodes of darc_offdynamics.rollout from the first frozen starts, by domain, with delta r [B, T]."""
    checkpoint = darc_offdynamics.load_checkpoint(run_dir)
    args = darc_offdynamics.Args(**checkpoint["args"])
    envs = darc_offdynamics.make_domains(args, episodes, torch.device("cpu"), (0, 0))
    space = envs["source"].single_action_space
    agent = darc_offdynamics.make_domain_agent(envs["source"].single_observation_space.shape[0], space, args)
    darc_offdynamics.restore(checkpoint, {"agent": agent})
    torch.manual_seed(darc_offdynamics.EVAL_SEED)
    played = {}
    for name, env in envs.items():
        settings = (darc_offdynamics.sample_action, env, darc_offdynamics.EVAL_SEED, args.deterministic_eval)
        episode = darc_offdynamics.rollout(agent, *settings)
        steps = (episode["obs"][:, :-1], episode["action"], episode["obs"][:, 1:])
        episode["correction"] = darc_offdynamics.reward_correction(agent.classifiers, *steps)
        played[name] = (episode, float(env.state_dict()["_task"][0]))
    return played, args


def draw(run_dirs, episodes, out):
    """Draw a column for each of these run folders into the file out."""
    plt = plot.pyplot()
    size = (3.2 * len(run_dirs), 6.4)
    figure, panels = plt.subplots(2, len(run_dirs), figsize=size, squeeze=False)
    for column, run_dir in enumerate(run_dirs):
        played, args = play(run_dir, episodes)
        reach = max(wall for _, wall in played.values())
        for axes, (name, (episode, wall)) in zip(panels[:, column], played.items(), strict=True):
            block = {"facecolor": "0.8"} if wall else {"fill": False, "edgecolor": "0.6", "linestyle": "--"}
            axes.add_patch(plt.Rectangle((LEFT, -reach), RIGHT - LEFT, 2 * reach, **block))
            axes.add_patch(plt.Circle(GOAL, RADIUS, color="tab:green", alpha=0.4))
            for row in range(episodes):
                steps = int(episode["valid"][row].sum())
                path = episode["obs"][row, : steps + 1]
                axes.plot(path[:, 0], path[:, 1], color="tab:blue", linewidth=1)
                axes.plot(*path[0], ".", color="tab:blue")
                against = (-episode["correction"][row, :steps] / 4).clamp(0, 1)
                if name == "source" and args.method == "darc":
                    axes.scatter(path[1:, 0], path[1:, 1], s=9, c="tab:red", alpha=against.numpy(), zorder=3)
            solved = (episode["success"] * episode["valid"]).amax(1).mean()
            plot.square_panel(axes, f"{args.method}, in the {name}: {solved:.0%} of {episodes}", reach=1)
    figure.tight_layout()
    plot.save(figure, out, dpi=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", help="run folders of darc_offdynamics.py on PointWall-v0")
    parser.add_argument("--episodes", type=int, default=12, help="paths in a panel")
    parser.add_argument("--out", default="walls.png", help="picture to write")
    arguments = parser.parse_args()
    draw(arguments.run_dirs, arguments.episodes, arguments.out)
