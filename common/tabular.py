"""Random tabular MDPs (Duan et al. 2016, arXiv:1611.02779, Sec 3.2; the prior of Osband et al. 2013).

10 states, 5 actions, episodes of 10 steps, each from state 0. P(.|s, a) ~ Dirichlet(1, ..., 1); the mean
reward of (s, a) ~ N(1, 1), paid with N(0, 1) noise. The task row is the tables: transitions [S, A, S], then
mean rewards [S, A], flattened.
"""

import gymnasium as gym
import numpy as np
import torch

from common.base import TaskVectorEnv, box


class TabularMDP(TaskVectorEnv):
    """task_dim = S*A*S + S*A (550), obs = one-hot state [B, S], Discrete(A) actions, horizon 10."""

    def __init__(self, num_envs, states=10, actions=5, horizon=10, device="cpu", seed=None):
        self.states, self.actions = states, actions
        tables = states * actions * states
        low = np.concatenate([np.zeros(tables), np.full(states * actions, -np.inf)]).astype(np.float32)
        high = np.concatenate([np.ones(tables), np.full(states * actions, np.inf)]).astype(np.float32)
        task_space = gym.spaces.Box(low, high, dtype=np.float32)
        super().__init__(
            num_envs, box(0, 1, (states,)), gym.spaces.Discrete(actions), task_space, horizon, device, seed
        )
        self._one_hot = torch.eye(states, device=self.device)
        # [B] where each environment's tables begin
        self._first = torch.arange(num_envs, device=self.device) * (states * actions)
        if (states, actions, horizon) == (10, 5, 10):
            self.references, self.trial_references = REFERENCES, TRIAL_REFERENCES

    def tables(self, tasks):
        """Task rows [N, task_dim] -> transitions [N, S, A, S], mean rewards [N, S, A]."""
        split = self.states * self.actions * self.states
        transitions = tasks[:, :split].view(-1, self.states, self.actions, self.states)
        return transitions, tasks[:, split:].view(-1, self.states, self.actions)

    def _draw_tasks(self, n, generator):
        device, pairs = generator.device, self.states * self.actions
        # Exponential(1)
        gaps = -torch.log1p(-torch.rand(n, pairs, self.states, generator=generator, device=device))
        transitions = gaps / gaps.sum(-1, keepdim=True)  # normalised exponentials are Dirichlet(1, ..., 1)
        rewards = 1.0 + torch.randn(n, pairs, generator=generator, device=device)
        return torch.cat([transitions.flatten(1), rewards], 1)

    def _prepare(self):
        transitions, rewards = self.tables(self._task)
        self._cumulative = transitions.cumsum(-1).flatten(0, 2)  # [B*S*A, S]
        self._cumulative[:, -1] = 2.0  # rounding must not leave a gap at the top
        self._mean_reward = rewards.flatten()  # [B*S*A]

    def _start(self):
        return torch.zeros(self.num_envs, dtype=torch.int32, device=self.device)

    def _observe(self, state):
        return self._one_hot.index_select(0, state)

    def _transition(self, state, action):
        pair = (self._first + action).add_(state, alpha=self.actions)  # [B] into the flattened tables
        reward = torch.randn(self.num_envs, generator=self._generator, device=self.device)
        reward += self._mean_reward.index_select(0, pair)
        chance = torch.rand(self.num_envs, 1, generator=self._generator, device=self.device)
        # how many of the sums chance has passed
        next_state = (self._cumulative.index_select(0, pair) <= chance).sum(-1, dtype=torch.int32)
        return next_state, reward, None, {}


# python -m benchmark.baselines tabular: the 1,000 held-out MDPs. One episode, exactly; "optimal" is told all.
REFERENCES = {"random": 10.0, "optimal": 21.79}
# Sum of rewards over a trial of n episodes, {n: {player: return}}; standard errors .8 to 7.
# All but "optimal" know the prior alone: transitions Dirichlet(1), rewards N(1, 1).
TRIAL_REFERENCES = {
    10: {
        "random": 100.0, "greedy": 150.7, "epsilon_greedy": 150.5, "psrl": 134.3,
        "optimistic_psrl": 134.3, "beb": 152.3, "optimal": 217.9
    },
    25: {
        "random": 249.9, "greedy": 425.0, "epsilon_greedy": 424.9, "psrl": 404.2,
        "optimistic_psrl": 406.7, "beb": 442.4, "optimal": 544.8
    },
    50: {
        "random": 499.8, "greedy": 898.0, "epsilon_greedy": 899.9, "psrl": 902.3,
        "optimistic_psrl": 905.7, "beb": 960.0, "optimal": 1089.6
    },
    75: {
        "random": 749.6, "greedy": 1375.9, "epsilon_greedy": 1382.9, "psrl": 1418.7,
        "optimistic_psrl": 1421.8, "beb": 1484.2, "optimal": 1634.5
    },
    100: {
        "random": 999.5, "greedy": 1854.6, "epsilon_greedy": 1875.8, "psrl": 1941.5,
        "optimistic_psrl": 1944.6, "beb": 2019.0, "optimal": 2179.3
    },
}  # fmt: skip
