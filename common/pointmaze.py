"""A point in a maze of walls that must find its goal, with a sparse reward: for hindsight (HER).

PointMaze-v0  The walls are D4RL's medium maze (Fu et al. 2020, arXiv:2004.07219), cells of width 1, the
              middle of the maze at (0, 0). The episode begins somewhere in the upper left cell; the goal,
              which is the task row and is not observed, lies anywhere in the free cells. obs is the position,
              an action in [-1, 1]^2 moves the point by a quarter of it, and where a wall is in the way it
              slides along. Reward -1 a step, 0 at the step that comes within .1 of the goal, which ends the
              episode; at most 100 steps.

DIFFERS from D4RL and Gymnasium-Robotics: their ball has a mass and is pushed, it has to come within .5 or .45
of a goal, and it starts anywhere.
"""

import torch

from common.base import TaskVectorEnv, box

WALLS = """
########
#..##..#
#..#...#
##...###
#..#...#
#.#..#.#
#...#..#
########
""".split()
SIZE = len(WALLS)
RADIUS = 0.1  # of the goal
GAP = 0.001  # to a wall that was run into, so that rounding never puts a point inside it
STRIDE = 0.25  # the longest move along an axis: shorter than a wall is thick


class PointMaze(TaskVectorEnv):
    """task_dim 2, obs [B, 2], actions in [-1, 1]^2, horizon 100 or the goal."""

    terminates, has_success = True, True

    def __init__(self, num_envs, horizon=100, device="cpu", seed=None):
        half = SIZE / 2
        square = box(-half, half, (2,))
        super().__init__(num_envs, square, box(-1, 1, (2,)), square, horizon, device, seed)
        self.goal_space = self.task_space
        free = [[cell == "." for cell in row] for row in WALLS]  # row 0 is the top: y falls from row to row
        self._free = torch.tensor(free, device=self.device).flip(0).T.contiguous()  # [x, y]
        self._cells = self._free.nonzero().float()  # [free cells, 2], lower left corners
        self.references = REFERENCES["PointMaze-v0"] if horizon == 100 else {}

    def _draw_tasks(self, n, generator):
        draw = {"generator": generator, "device": generator.device}
        cells = self._cells.to(generator.device)
        return cells[torch.randint(len(cells), (n,), **draw)] + torch.rand(n, 2, **draw) - SIZE / 2

    def _start(self):
        corner = torch.tensor([1.0, SIZE - 2.0], device=self.device)
        inside = torch.rand(self.num_envs, 2, generator=self._generator, device=self.device)
        return corner + inside.clamp(GAP, 1 - GAP)

    def _observe(self, state):
        return state - SIZE / 2  # the state counts from the corner

    def _transition(self, state, action):
        place = state
        for axis in range(2):  # first along x, then along y: so it slides
            before = place[:, axis]
            cell = place.long()
            after = before + STRIDE * action[:, axis].clamp(-1, 1)
            cell[:, axis] = after.long()
            low = before.floor()
            stopped = after.clamp(low + GAP, low + 1 - GAP)
            moved = torch.where(self._free[cell[:, 0], cell[:, 1]], after, stopped)
            place = torch.stack([moved, place[:, 1]] if axis == 0 else [place[:, 0], moved], 1)
        near = self.compute_terminated(place - SIZE / 2, self._task)
        return place, near.float() - 1, near, {"success": near.clone()}

    def achieved_goal(self, obs):
        return obs

    def compute_reward(self, achieved, goal):
        return self.compute_terminated(achieved, goal).float() - 1

    def compute_terminated(self, achieved, goal):
        return torch.hypot(*(achieved - goal).unbind(-1)) < RADIUS


# python -m benchmark.baselines goals: 1,000 held-out goals, 5 starts each, one episode
REFERENCES = {"PointMaze-v0": {"random": -97.21, "still": -99.9}}
