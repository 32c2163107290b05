"""An arm of two joints in the plane that must bring its fingertip to a goal: Gymnasium's Reacher-v5, sparse.

ReacherGoal-v0  Body, starts, goals and physics of Reacher-v5, to the last bit: the goal is uniform in the
                disc of radius .2 m, an episode lasts 50 steps of .02 s. The task row is the goal (x, y).
                Reward -1 a step, and 0 at steps that end with the fingertip within .02 m of it, as in HER's
                tasks (Andrychowicz et al. 2017, arXiv:1707.01495); info["success"] says which. The arm
                should come and stay.

DIFFERS from Reacher-v5: the reward (there minus the distance, minus |a|^2), and the goal is not observed.
obs is the cosines and sines of the two angles, their velocities, and the fingertip's place.
"""

import mujoco
import numpy as np
import torch

from common.locomotion import Locomotion

RADIUS = 0.02  # m, how near is at the goal


class Reacher(Locomotion):
    """The body of Reacher-v5. Hook: _goals(worlds) -> [n, 2], where the goals of new episodes are, in m."""

    xml, frame_skip = "reacher.xml", 2
    fresh_stage = mujoco.mjtStage.mjSTAGE_POS  # the fingertip's place after a reset

    def _find(self):
        tip = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_BODY, "fingertip")
        return self._batch.bind("xpos")[:, tip, :2].copy()

    def _furnish(self, worlds):
        self._qvel[worlds, :2] *= 0.05  # U[-.005, .005]; angles keep U[-.1, .1]
        self._qvel[worlds, 2:] = 0
        self._qpos[worlds, 2:] = self._goals(worlds)  # the goal is a body that never moves


def in_the_disc(u):
    """[n, 2] uniform on [0, 1) -> [n, 2] uniform in the disc of radius .2 m."""
    radius, angle = 0.2 * u[:, :1].sqrt(), 2 * torch.pi * u[:, 1:]
    return radius * torch.cat([angle.cos(), angle.sin()], 1)


class ReacherGoal(Reacher):
    """task_dim 2, in m; obs [B, 8], actions in [-1, 1]^2, horizon 50."""

    obs_dim = 8
    low, high, task_dim = -0.2, 0.2, 2
    has_success = True

    def __init__(self, num_envs, horizon=50, nthread=None, device="cpu", seed=None):
        super().__init__(num_envs, horizon, nthread, device, seed)
        self.goal_space = self.task_space
        self.references = REFERENCES["ReacherGoal-v0"] if horizon == 50 else {}

    def _to_task(self, u):
        return in_the_disc(u)

    def _goals(self, worlds):
        return self._goal[worlds]

    def _look(self, worlds=slice(None)):
        angle, velocity = self._qpos[worlds, :2], self._qvel[worlds, :2]
        parts = [np.cos(angle), np.sin(angle), velocity, self._place[worlds]]
        return torch.from_numpy(np.concatenate(parts, 1).astype(np.float32))

    def _pay(self, velocity, place):
        self._near = self._reached(torch.from_numpy(place.astype(np.float32)), self._task.cpu()).numpy()
        return self._near - 1.0

    def step(self, action):
        *out, info = super().step(action)
        return *out, {**info, "success": torch.from_numpy(self._near).to(self.device)}

    def _reached(self, achieved, goal):
        return torch.hypot(*(achieved - goal).unbind(-1)) < RADIUS

    def achieved_goal(self, obs):
        return obs[..., 6:8]

    def compute_reward(self, achieved, goal):
        return self._reached(achieved, goal).float() - 1

    def compute_terminated(self, achieved, goal):
        return torch.zeros(achieved.shape[:-1], dtype=torch.bool, device=achieved.device)


# python -m benchmark.baselines goals: 1,000 held-out goals, 5 starts each, one episode
REFERENCES = {"ReacherGoal-v0": {"random": -49.65, "still": -49.93}}
