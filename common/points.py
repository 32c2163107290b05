"""A point in the plane that must find its goal: three versions from the papers. A task row is the goal.

PointGoal-v0        MAML's 2D navigation (Finn et al. 2017, arXiv:1703.03400): goal ~ U[-.5, .5]^2, start
                    (0, 0), action clipped to +-.1 a component, reward = -distance after the step, done when
                    both |dx| and |dy| < .01, at most 100 steps.
PointRobot-v0       PEARL's dense one (Rakelly et al. 2019, arXiv:1903.08254): goal ~ U[-1, 1]^2, start
                    ~ U[-1, 1]^2, 20 steps, never done, reward = -distance after the step.
SparsePointGoal-v0  PEARL's sparse one: goal on the upper half of the unit circle, start (0, 0), 20 steps;
                    reward 1 - distance within .2 of the goal and 0 outside. info["dense_reward"] = -distance,
                    for algorithms that train on it (PEARL does; its context stays sparse).

The goal is not observed: obs is the position. PEARL's two take actions in [-1, 1] and move .1 of them.
"""

import math

import torch

from common.base import TaskVectorEnv, box


class Point(TaskVectorEnv):
    """What the three have in common: a task row is the goal, and so is the place where the point is."""

    def __init__(self, num_envs, obs_space, action_space, goals, horizon, device, seed):
        super().__init__(num_envs, obs_space, action_space, goals, horizon, device, seed)
        self.goal_space = self.task_space

    def _observe(self, state):
        return state.clone()

    def achieved_goal(self, obs):
        return obs

    def compute_reward(self, achieved, goal):
        return torch.hypot(*(achieved - goal).unbind(-1)).neg_()

    def compute_terminated(self, achieved, goal):
        return torch.zeros(achieved.shape[:-1], dtype=torch.bool, device=achieved.device)


class PointGoal(Point):
    """MAML's 2D navigation. task_dim 2, obs [B, 2], actions Box(-.1, .1, (2,)), horizon 100."""

    terminates, has_success = True, True

    def __init__(self, num_envs, horizon=100, device="cpu", seed=None):
        # a point cannot leave this square; one step more than it can go, for rounding
        reach = 0.1 * (horizon + 1)
        obs_space, action_space, goals = box(-reach, reach, (2,)), box(-0.1, 0.1, (2,)), box(-0.5, 0.5, (2,))
        super().__init__(num_envs, obs_space, action_space, goals, horizon, device, seed)
        self._near = torch.tensor(0.01, device=self.device)
        if horizon == 100:
            self.references = REFERENCES["PointGoal-v0"]

    def _draw_tasks(self, n, generator):
        return torch.rand(n, 2, generator=generator, device=generator.device) - 0.5

    def _start(self):
        return torch.zeros(self.num_envs, 2, device=self.device)

    def _transition(self, state, action):
        state = state + action.clamp(-0.1, 0.1)
        # by columns: on a CPU a reduction over two numbers costs four times as much
        dx, dy = (state - self._task).abs_().unbind(1)
        near = torch.maximum(dx, dy) < self._near
        return state, torch.hypot(dx, dy).neg_(), near, {"success": near.clone()}

    def compute_terminated(self, achieved, goal):
        return torch.maximum(*(achieved - goal).abs_().unbind(-1)) < self._near


class PointRobot(Point):
    """PEARL's dense one. task_dim 2, obs [B, 2], actions in [-1, 1]^2 (a step moves .1 of it), horizon 20."""

    def __init__(self, num_envs, horizon=20, device="cpu", seed=None):
        reach = 1 + 0.1 * (horizon + 1)
        obs_space, square = box(-reach, reach, (2,)), box(-1, 1, (2,))
        super().__init__(num_envs, obs_space, square, square, horizon, device, seed)
        if horizon == 20:
            self.references = REFERENCES["PointRobot-v0"]

    def _draw_tasks(self, n, generator):
        return 2 * torch.rand(n, 2, generator=generator, device=generator.device) - 1

    def _start(self):
        return 2 * torch.rand(self.num_envs, 2, generator=self._generator, device=self.device) - 1

    def _transition(self, state, action):
        state = torch.add(state, action.clamp(-1, 1), alpha=0.1)
        return state, torch.hypot(*(state - self._task).unbind(1)).neg_(), None, {}


class SparsePointGoal(PointRobot):
    """PEARL's sparse one: goals on the unit half-circle, start (0, 0), reward only within .2 of the goal."""

    has_success = True

    def __init__(self, num_envs, horizon=20, device="cpu", seed=None):
        super().__init__(num_envs, horizon, device, seed)
        self._edge, self._nothing = torch.tensor([-0.2, 0.0], device=self.device)
        self.references = REFERENCES["SparsePointGoal-v0"] if horizon == 20 else {}

    def _draw_tasks(self, n, generator, test=0):
        step = 2 * torch.randint(2**22, (n,), generator=generator, device=generator.device) + test
        # a line is short of numbers: even ones train, odd ones are held out
        angle = step.float() * (math.pi / 2**23)
        return torch.stack([angle.cos(), angle.sin()], 1)

    def _draw_test_tasks(self, generator):
        return self._draw_tasks(self.num_test_tasks, generator, test=1)

    def _start(self):
        return torch.zeros(self.num_envs, 2, device=self.device)

    def _transition(self, state, action):
        state, dense_reward, _, _ = super()._transition(state, action)
        reward, near = self._sparse(dense_reward)
        return state, reward, None, {"dense_reward": dense_reward, "success": near}

    def compute_reward(self, achieved, goal):
        return self._sparse(super().compute_reward(achieved, goal))[0]

    def _sparse(self, dense_reward):
        near = dense_reward >= self._edge
        return torch.where(near, 1 + dense_reward, self._nothing), near


# python -m benchmark.baselines points: 1,000 held-out goals, 10 starts each, one episode.
# "optimal" is told the goal; "stay" and "middle" (go to the origin) know only the distribution.
REFERENCES = {
    "PointGoal-v0": {"random": -61.36, "stay": -37.81, "optimal": -0.488},
    "PointRobot-v0": {"random": -21.31, "stay": -20.77, "middle": -15.71, "optimal": -5.132},
    "SparsePointGoal-v0": {"random": 0.001, "optimal": 13.393},
}
