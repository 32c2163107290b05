"""Pairs of domains in pure torch: the same task under two dynamics, for transfer across them.

A domain is a task row. sample_tasks draws the source, where practice is cheap, and split="test" is the
target, where the policy will have to act; named_tasks has one row of each.

PointWall-v0     A room, [-1, 1]^2. The point starts anywhere but in the strip .45 < x < .65, and within .1 of
                 (.85, 0) its episode ends, or after 50 steps. obs is the position, an action in [-1, 1]^2
                 moves it by a tenth of itself. Reward = -distance to (.85, 0) after the step. The task row is
                 how far a wall in that strip reaches to both sides of its middle: not at all in the source,
                 .6 in the target. What runs into the wall slides along it. It is the picture by which the
                 problem is taught (DARC: Eysenbach et al. 2021, arXiv:2006.13916).
PointDoor-v0     The other way round: the wall is in the source, and the target has none.
GaussianPair-v0  s' = (s + a) / 2 + shift + std * N(0, 1): the task row is (shift, std), (0, 1) in the source
                 and (.5, .8) in the target. The log-density of a step is known, and so is what a pair of
                 classifiers should say. Start N(0, 1), reward = -|s'|, 20 steps.
"""

import math

import torch

from common.base import TaskVectorEnv, box

GOAL, RADIUS = (0.85, 0.0), 0.1
LEFT, RIGHT = 0.45, 0.65  # faces of the wall
STRIDE = 0.1  # the longest move along an axis
GAP = 0.001  # to a wall that was run into, so that rounding never puts a point inside it


class Pair(TaskVectorEnv):
    """Two task rows, `rows` = {"source": row, "target": row}: one is trained on, the other is tested."""

    num_test_tasks = 100  # the target again and again, from fresh starts
    rows = {}

    @property
    def named_tasks(self):
        return {name: torch.tensor(row, device=self.device) for name, row in self.rows.items()}

    def _draw_tasks(self, n, generator, name="source"):
        return torch.tensor(self.rows[name], device=generator.device).repeat(n, 1)

    def _draw_test_tasks(self, generator):
        return self._draw_tasks(self.num_test_tasks, generator, name="target")


class PointWall(Pair):
    """task_dim 1, obs [B, 2], actions in [-1, 1]^2, horizon 50 or the goal."""

    terminates, has_success = True, True
    rows = {"source": [0.0], "target": [0.6]}

    def __init__(self, num_envs, horizon=50, device="cpu", seed=None):
        square = box(-1, 1, (2,))
        super().__init__(num_envs, square, square, box(0, 1, (1,)), horizon, device, seed)
        self._goal = torch.tensor(GOAL, device=self.device)
        self.references = REFERENCES[f"{type(self).__name__}-v0"] if horizon == 50 else {}

    def _start(self):
        u = torch.rand(self.num_envs, 2, generator=self._generator, device=self.device)
        x, y = (2 - (RIGHT - LEFT)) * u[:, 0] - 1, 2 * u[:, 1] - 1
        return torch.stack([torch.where(x < LEFT, x, x + RIGHT - LEFT), y], 1)

    def _observe(self, state):
        return state.clone()

    def _transition(self, state, action):
        (x, y), reach = state.unbind(1), self._task[:, 0]
        new_x, new_y = (state + STRIDE * action.clamp(-1, 1)).clamp(-1, 1).unbind(1)
        # first along x, then along y: so it slides
        inside = (new_x > LEFT) & (new_x < RIGHT) & (y.abs() < reach)
        new_x = torch.where(inside, torch.where(x < (LEFT + RIGHT) / 2, LEFT - GAP, RIGHT + GAP), new_x)
        inside = (new_x > LEFT) & (new_x < RIGHT) & (new_y.abs() < reach)
        new_y = torch.where(inside, (reach + GAP).copysign(y), new_y)
        place = torch.stack([new_x, new_y], 1)
        distance = torch.hypot(*(place - self._goal).unbind(1))
        near = distance < RADIUS
        return place, -distance, near, {"success": near.clone()}


class PointDoor(PointWall):
    """The same, of which the source is the harder half: what the target allows cannot be practised."""

    rows = {"source": [0.6], "target": [0.0]}


class GaussianPair(Pair):
    """task_dim 2, obs [B, 1], actions in [-1, 1], horizon 20."""

    rows = {"source": [0.0, 1.0], "target": [0.5, 0.8]}

    def __init__(self, num_envs, horizon=20, device="cpu", seed=None):
        spaces = box(-math.inf, math.inf, (1,)), box(-1, 1, (1,)), box(-2, 2, (2,))
        super().__init__(num_envs, *spaces, horizon, device, seed)
        self.references = REFERENCES["GaussianPair-v0"] if horizon == 20 else {}

    def _start(self):
        return torch.randn(self.num_envs, 1, generator=self._generator, device=self.device)

    def _observe(self, state):
        return state.clone()

    def _transition(self, state, action):
        noise = torch.randn(state.shape, generator=self._generator, device=self.device)
        shift, std = self._task.split(1, 1)
        state = (state + action.clamp(-1, 1)) / 2 + shift + std * noise
        return state, -state[:, 0].abs(), None, {}

    @staticmethod
    def log_prob(task, obs, action, next_obs):
        """log p(s' | s, a) in the domain `task` [..., 2]. obs, action, next_obs: [..., 1] -> [...]"""
        shift, std = task.split(1, -1)
        error = (next_obs - (obs + action.clamp(-1, 1)) / 2 - shift) / std
        return (-0.5 * error**2 - std.log() - 0.5 * math.log(2 * math.pi))[..., 0]


# python -m benchmark.baselines pairs: the target, 2,000 starts, one episode. "straight" goes to the goal, as
# is best in the source, "around" by the nearer end of the wall, as is nearly best in the target
REFERENCES = {
    "PointWall-v0": {"random": -55.75, "straight": -18.24, "around": -9.39},
    "PointDoor-v0": {"random": -55.51, "straight": -6.03, "around": -9.39},
    "GaussianPair-v0": {"random": -22.69, "still": -22.16},
}
