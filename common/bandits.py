"""Bernoulli bandits (Duan et al. 2016, arXiv:1611.02779, Sec 3.1): arm i pays 1 with chance p_i ~ U[0, 1].

One pull is one episode, so a trial of n pulls is n episodes of one step. The task row is p. There is nothing
to see: obs is the one-hot of a single state. The pull ends its episode for good (terminated): no method
bootstraps past it.
"""

import gymnasium as gym
import torch

from common.base import TaskVectorEnv, box


class Bandit(TaskVectorEnv):
    """k-armed Bernoulli bandit. task_dim = k, obs [B, 1] = 1, Discrete(k) actions, horizon 1."""

    num_test_tasks = 100_000  # cheap; and players differ by 1 % of a return that scatters by 30 %

    def __init__(self, num_envs, arms=5, device="cpu", seed=None):
        self.arms = arms
        super().__init__(
            num_envs, box(0, 1, (1,)), gym.spaces.Discrete(arms), box(0, 1, (arms,)), 1, device, seed
        )
        self.references = {"random": 0.5, "optimal": arms / (arms + 1)}  # E[p] and E[max_i p_i], closed forms
        self.trial_references = TRIAL_REFERENCES.get(arms, {})

    def _draw_tasks(self, n, generator):
        return torch.rand(n, self.arms, generator=generator, device=generator.device)

    def _prepare(self):
        self._chance = self._task.flatten()  # [B*k]: one index into one row is the quickest look-up there is
        self._one = torch.ones(self.num_envs, 1, device=self.device)
        # [B] where each environment's arms begin
        self._row = torch.arange(0, self._task.numel(), self.arms, device=self.device)

    def _start(self):
        return torch.ones_like(self._one)

    def _observe(self, state):
        return state.clone()

    def step(self, action):  # the general step would spend most of its time on a clock that is always 1
        self._require_reset()
        chance = self._chance.index_select(0, self._row + action)
        reward = torch.rand(self.num_envs, generator=self._generator, device=self.device)
        reward.lt_(chance)  # in place, so 0. or 1.
        truncated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        return self._start(), reward, torch.ones_like(truncated), truncated, {"final_obs": self._start()}


# Sum of rewards over a trial of n pulls, for players that know the prior and learn within the trial.
TRIAL_REFERENCES = {}
