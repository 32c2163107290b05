"""What the tests of the soft actor-critics share: checks of their shared text, and traps to put into it."""

import math

import gymnasium as gym
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import common
from common.points import PointRobot

BOX = gym.spaces.Box(-1, 1, (2,), dtype="float32")
N, M = 3, 5  # tasks of a batch and transitions of each


def close(a, b, tolerance=1e-9):
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), (a, b)


TWIN_COPIES = (
    "nn.init.uniform_(torch.empty(2, fan_in, fan_out), -bound, bound)",
    "nn.init.uniform_(torch.empty(1, fan_in, fan_out), -bound, bound).repeat(2, 1, 1)",
    "nn.init.uniform_(torch.empty(2, 1, fan_out), -bound, bound)",
    "nn.init.uniform_(torch.empty(1, 1, fan_out), -bound, bound).repeat(2, 1, 1)",
)
JACOBIAN = "jacobian = 2 * (math.log(2) - u - F.softplus(-2 * u))"
NO_JACOBIANS = ("jacobian = torch.zeros_like(u)", "jacobian = (1 - u.tanh() ** 2).log()")


def check_twins_differ(module):
    torch.manual_seed(0)
    critic = module.TwinCritic(4, 8, 2)
    values = critic(torch.randn(N, M, 2), torch.randn(N, M, 2))
    assert values.shape == (2, N, M) and (values[0] - values[1]).abs().min() > 1e-4


def check_log_probability(module):
    torch.manual_seed(0)
    actor = module.Actor(4, BOX, 8, 2).double()
    x = 3 * torch.randn(N, M, 4).double()
    action, logprob = module.sample_action(actor, x)
    mean, log_std = actor(x)
    squashed = TransformedDistribution(
        Independent(Normal(mean, log_std.exp()), 1), TanhTransform(cache_size=1)
    )
    close(logprob, squashed.log_prob(action), 1e-6)
    with torch.no_grad():
        actor.net[-1].bias[:2] = torch.tensor([15.0, -15.0])  # where tanh is flat
    actor, x = actor.float(), x.float()  # as trained: 1 - tanh(u)^2 is 0 there, its logarithm is not
    _, logprob = module.sample_action(actor, x)
    assert torch.isfinite(logprob).all()
    # log (1 - tanh(u)^2) = log 4 - 2 |u| there
    expected = 2 * actor(x)[0].abs().sum(-1) - 2 * math.log(4)
    assert (logprob - expected).abs().max() < 40


def coded_replay(module, rows=4, capacity=12, horizon=6, episodes=17, seed=0):
    """obs = (row, episode, step) of what is stored; episodes of all lengths. Padding is -1."""
    generator = torch.Generator().manual_seed(seed)
    replay = module.ReplayBuffer(rows, capacity, horizon, 3, 1, "cpu")
    lengths = torch.randint(1, horizon + 1, (episodes, rows), generator=generator)
    for number in range(episodes):
        steps = torch.arange(horizon + 1)
        row, step = torch.meshgrid(torch.arange(rows), steps, indexing="ij")
        obs = torch.stack([row, torch.full_like(row, number), step], -1).float()
        valid = (step[:, :-1] < lengths[number][:, None]).float()
        obs[:, 1:][valid == 0] = -1
        code = obs[:, :-1, 2]
        episode = {"obs": obs, "action": code[..., None], "reward": 10 * code, "train_reward": 100 * code}
        replay.add({**episode, "terminated": torch.zeros_like(code), "valid": valid})
    return replay, lengths


class OneGoal(PointRobot):
    """PointRobot of one goal, which is trained on and tested: what is left of PEARL is SAC."""

    def _draw_tasks(self, n, generator):
        return torch.tensor([[0.5, -0.3]]).expand(n, 2).clone()


def one_goal(**kwargs):
    return OneGoal(**kwargs)


one_goal.is_task_distribution = True
gym.register("OneGoal-v0", vector_entry_point=one_goal)


def one_goals_optimum():
    """What the straight way to the known goal earns from 1,000 random starts."""
    env = common.make("OneGoal-v0", 1000, seed=0)
    obs, _ = env.reset(seed=0)
    total = 0.0
    for _ in range(20):
        obs, reward, *_ = env.step(((env._task - obs) * 10).clamp(-1, 1))
        total += reward.mean().item()
    return total
