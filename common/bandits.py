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


# Sum of rewards over a trial of n pulls, {arms: {n: {player: return}}}, for players that know the prior and
# learn within the trial. python -m benchmark.baselines bandits: 10,000 held-out bandits, corrected to the
# mean over all bandits; standard errors at most .02 for n = 10, .15 for n = 100, .6 for n = 500. "random"
# and "bayes_optimal" are exact; "finite_horizon_gittins" is within a thousandth of optimal where that can be
# computed.
TRIAL_REFERENCES = {
    5: {
        10: {
            "random": 5.0, "greedy": 6.559, "epsilon_greedy": 6.559, "ucb1": 6.655,
            "thompson": 5.815, "optimistic_thompson": 5.977, "gittins": 6.657,
            "finite_horizon_gittins": 6.661, "bayes_optimal": 6.66
        },
        100: {
            "random": 50.0, "greedy": 75.03, "epsilon_greedy": 75.07, "ucb1": 78.36,
            "thompson": 75.04, "optimistic_thompson": 75.91, "gittins": 78.54,
            "finite_horizon_gittins": 78.6
        },
        500: {
            "random": 250.0, "greedy": 383.45, "epsilon_greedy": 390.94, "ucb1": 406.7,
            "thompson": 402.63, "optimistic_thompson": 403.83, "gittins": 408.56,
            "finite_horizon_gittins": 408.62
        },
    },
    10: {
        10: {
            "random": 5.0, "greedy": 6.601, "epsilon_greedy": 6.601, "ucb1": 6.713,
            "thompson": 5.579, "optimistic_thompson": 5.623, "gittins": 6.713,
            "finite_horizon_gittins": 6.714, "bayes_optimal": 6.714
        },
        100: {
            "random": 50.0, "greedy": 77.9, "epsilon_greedy": 77.97, "ucb1": 83.25,
            "thompson": 77.1, "optimistic_thompson": 78.26, "gittins": 83.72,
            "finite_horizon_gittins": 83.77
        },
        500: {
            "random": 250.0, "greedy": 400.53, "epsilon_greedy": 411.43, "ucb1": 439.24,
            "thompson": 431.05, "optimistic_thompson": 433.03, "gittins": 442.18,
            "finite_horizon_gittins": 442.26
        },
    },
    50: {
        10: {
            "random": 5.0, "greedy": 6.615, "epsilon_greedy": 6.615, "ucb1": 6.719,
            "thompson": 5.151, "optimistic_thompson": 5.151, "gittins": 6.721,
            "finite_horizon_gittins": 6.724, "bayes_optimal": 6.714
        },
        100: {
            "random": 50.0, "greedy": 78.31, "epsilon_greedy": 78.56, "ucb1": 84.73,
            "thompson": 64.46, "optimistic_thompson": 64.5, "gittins": 85.36,
            "finite_horizon_gittins": 85.47
        },
        500: {
            "random": 250.0, "greedy": 403.5, "epsilon_greedy": 416.66, "ucb1": 457.34,
            "thompson": 426.24, "optimistic_thompson": 428.51, "gittins": 464.22,
            "finite_horizon_gittins": 464.84
        },
    },
}  # fmt: skip
