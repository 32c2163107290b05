"""maml_trpo.py: the mathematics, and every trap of its docstring.

A claim is a function check_xxx(module). It must hold on the shipped script and fail on a mutant, the script
with the trap put in. Derivatives are compared in float64.
"""

import itertools
import json
import math
import re
import tempfile
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import FuseTask, gaussian_kl, mutant, script

import common

maml = script("maml_trpo")
N, T, E = 3, 5, 4  # tasks, steps, episodes
CONTINUOUS, DISCRETE = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(3)
both_kinds = pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE], ids=["continuous", "discrete"])


def red(check, *edits):
    """The claim fails on the script with these edits."""
    broken = mutant("maml_trpo", *edits)
    with pytest.raises(AssertionError):
        check(broken)


def make_policy(module, space=CONTINUOUS, obs_dim=2, hidden_size=4, seed=0):
    """A float64 policy that is far from indifferent."""
    torch.manual_seed(seed)
    policy = module.Policy(obs_dim, space, hidden_size, 0.7).double()
    with torch.no_grad():
        for p in policy.theta:
            p.add_(0.4 * torch.randn_like(p))
    return policy


def make_episodes(space=CONTINUOUS, seed=0, obs_dim=2, ends=True):
    """What rollout returns, made up: episodes of random lengths, and noise in the padding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, T + 1, (N, E), generator=generator) if ends else torch.full((N, E), T)
    action = normal(T, N, E, 2)
    if isinstance(space, gym.spaces.Discrete):
        action = torch.randint(3, (T, N, E), generator=generator)
    valid = (torch.arange(T)[:, None, None] < lengths).double()
    episodes = {"obs": normal(T, N, E, obs_dim), "action": action, "reward": normal(T, N, E), "valid": valid}
    return {**episodes, "success": torch.zeros(T, N, E, dtype=torch.float64)}


def make_batches(module, count, policy, args, space=CONTINUOUS, seed=0):
    """Batches as adapt returns them: played after 0, 1, ... gradient steps of this policy."""
    phi, batches = policy.per_task(N), []
    for k in range(count):
        batch = maml.add_advantage(make_episodes(space, 10 * seed + k), 0.9, 0.8)
        output = policy(batch["obs"].flatten(1, 2), phi)
        logprob = policy.distribution(output).log_prob(batch["action"].flatten(1, 2))
        batch["logprob"] = logprob.detach().view_as(batch["weight"])
        phi = maml.inner_step(policy, phi, batch, args.inner_lr, args)
        phi = [p.detach().requires_grad_() for p in phi]
        batches.append(batch)
    return batches


def small_args(module, **changes):
    return module.Args(**{"inner_lr": 0.3, "gamma": 0.9, "gae_lambda": 0.8, **changes})


def close(left, right, tolerance=1e-9):
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


# ---- data


def check_baseline_is_least_squares_on_every_task(module):
    episodes = make_episodes()
    obs, valid, ret = 8 * episodes["obs"], episodes["valid"], episodes["reward"]
    value = module.linear_baseline(obs, ret, valid, ridge=0.01)
    for n in range(N):
        rows, target, place = [], [], []
        for e, t in itertools.product(range(E), range(T)):
            if valid[t, n, e]:
                x = obs[t, n, e].numpy().clip(-10, 10)
                rows.append([*x, *x**2, t / 100, (t / 100) ** 2, (t / 100) ** 3, 1.0])
                target.append(ret[t, n, e].item()), place.append((t, n, e))
        rows = np.array(rows)
        ridge = 0.1 * np.eye(rows.shape[1])  # as that many more rows, whose target is 0
        solution = np.linalg.lstsq(np.vstack([rows, ridge]), np.append(target, 0 * ridge[0]))[0]
        assert [value[at].item() for at in place] == pytest.approx((rows @ solution).tolist(), abs=1e-6)


def check_baseline_knows_the_time_within_the_episode(module):
    """Returns that are a cubic in time alone are predicted exactly, whatever the order of the episodes."""
    time = torch.arange(T, dtype=torch.float64).view(T, 1, 1).expand(T, N, E)
    ret = 3 - 2 * time + 0.5 * time**2 - 0.1 * time**3
    value = module.linear_baseline(torch.zeros(T, N, E, 2).double(), ret, torch.ones(T, N, E).double(), 1e-14)
    close(value, ret, 1e-3)


def test_the_baseline_is_least_squares_on_every_task():
    check_baseline_is_least_squares_on_every_task(maml)
    check_baseline_knows_the_time_within_the_episode(maml)


def test_the_baseline_goes_red_when_its_clock_runs_over_the_whole_batch():  # T3
    clock = "torch.arange(len(obs), device=obs.device).view(-1, 1, 1, 1) / 100"
    whole = "torch.arange(valid.numel()).view(*valid.shape[1:], -1, 1).permute(2, 0, 1, 3) / 100"
    red(check_baseline_knows_the_time_within_the_episode, clock, whole)


@pytest.mark.parametrize("steps", [1, 2])
def test_fewer_steps_than_features_are_no_trouble(steps):
    obs = torch.randn(steps, N, 1, 17)
    value = maml.linear_baseline(obs, torch.randn(steps, N, 1), torch.ones(steps, N, 1))
    assert torch.isfinite(value).all()
    same_everywhere = maml.linear_baseline(
        torch.ones(steps, N, 1, 17), torch.ones(steps, N, 1), torch.ones(steps, N, 1)
    )
    close(same_everywhere, torch.ones(steps, N, 1), 1e-3)


def check_advantages(module):
    """By hand, an episode at a time; then standardised over all steps of the task that were played."""
    gamma, gae_lambda = 0.9, 0.8
    episodes = make_episodes()
    batch = module.add_advantage(episodes, gamma, gae_lambda)
    for n in range(N):
        advantages, count = {}, 0
        for e in range(E):
            length = int(episodes["valid"][:, n, e].sum())
            value = [*batch["value"][n, :length, e].tolist(), 0.0]  # nothing comes after the end
            reward = episodes["reward"][:length, n, e].tolist()
            delta = [reward[t] + gamma * value[t + 1] - value[t] for t in range(length)]
            for t in range(length):
                terms = [(gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, length)]
                advantages[t, e] = sum(terms)
                ret = sum(gamma ** (k - t) * reward[k] for k in range(t, length))
                assert batch["ret"][n, t, e].item() == pytest.approx(ret)
            count += length
        mean = sum(advantages.values()) / count
        std = math.sqrt(sum((x - mean) ** 2 for x in advantages.values()) / count)
        for t, e in itertools.product(range(T), range(E)):
            expected = (advantages[t, e] - mean) / std if (t, e) in advantages else 0.0
            assert batch["advantage"][n, t, e].item() == pytest.approx(expected, abs=1e-6)
            assert batch["weight"][n, t, e].item() == pytest.approx((1 / count) * ((t, e) in advantages))


def test_advantages_are_those_of_the_definition():
    check_advantages(maml)


def test_advantages_go_red_when_short_episodes_weigh_more():  # T4
    weight = "weight = valid / valid.sum((0, 2), keepdim=True)"
    red(check_advantages, weight, "weight = valid / valid.sum(0, keepdim=True) / valid.shape[2]")


def check_what_follows_an_episode_is_no_data(module):
    """FuseTask begins anew where an episode ends, and its rewards tell when they were earned."""
    env = FuseTask(N * E, actions=CONTINUOUS)
    policy = module.Policy(3, CONTINUOUS, 4, 0.7)
    episodes = module.rollout(policy, module.act, env, env.sample_tasks(N), policy.per_task(N), False)
    horizon = len(episodes["valid"])
    ends = env.ends[:horizon].view(horizon, N, E)
    expected = torch.ones(N, E)
    for step in range(horizon):
        assert torch.equal(episodes["valid"][step], expected)
        expected = expected * ~ends[step]
    assert 0 < episodes["valid"].mean() < 1
    batch = module.add_advantage(episodes, 0.9, 0.8)
    rewards = (1 + torch.arange(horizon)[:, None, None] + torch.arange(N * E).view(N, E) / 8) * episodes[
        "valid"
    ]
    close(module.returns_of(batch), rewards.sum(0))


def test_what_follows_an_episode_in_its_row_is_no_data():
    check_what_follows_an_episode_is_no_data(maml)
    for space in (CONTINUOUS, DISCRETE):
        clean, noisy = make_episodes(space), make_episodes(space)
        padding = noisy["valid"] == 0
        noisy["obs"][padding], noisy["reward"][padding], noisy["action"][padding] = 7.0, 70.0, 2
        policy, args = make_policy(maml, space), small_args(maml, inner_objective="dice")
        clean, noisy = (maml.add_advantage(episodes, 0.9, 0.8) for episodes in (clean, noisy))
        for batch in (clean, noisy):
            policies = policy.distribution(policy(batch["obs"].flatten(1, 2), policy.per_task(N)))
            logprob = policies.log_prob(batch["action"].flatten(1, 2)).detach()
            batch["logprob"] = logprob.view_as(batch["weight"])
        steps = [maml.inner_step(policy, policy.per_task(N), batch, 0.3, args) for batch in (clean, noisy)]
        for one, two in zip(*steps, strict=True):
            close(one, two)


def test_padding_goes_red_when_it_is_taken_for_data():  # T4
    red(check_what_follows_an_episode_is_no_data, "valid = valid * ~(terminated | truncated)", "pass")


def check_a_row_plays_the_task_of_its_policy(module):
    """PointGoal pays minus the distance to the goal, which tells whose goal it was."""
    env = common.make("PointGoal-v0", N * E, seed=0)
    tasks, policy = env.sample_tasks(N), module.Policy(2, CONTINUOUS, 4, 0.7)
    phi = [p + torch.randn(N, *p.shape) for p in policy.theta]
    torch.manual_seed(0)
    episodes = module.rollout(policy, module.act, env, tasks, phi, False)
    place = episodes["obs"][1] if len(episodes["obs"]) > 1 else None
    distance = (place - tasks[:, None]).norm(dim=-1)  # [N, E]
    close(episodes["reward"][0], -distance, 1e-5)
    told = module.rollout(
        policy := module.Policy(4, CONTINUOUS, 4, 0.7), module.act, env, tasks, policy.per_task(N), True
    )
    assert torch.equal(told["obs"][..., 2:], tasks[None, :, None].expand(len(told["obs"]), N, E, 2))


def test_a_row_plays_the_task_of_its_policy():
    check_a_row_plays_the_task_of_its_policy(maml)


def test_tasks_go_red_when_they_are_repeated_in_the_wrong_order():  # T6
    right = "tasks.repeat_interleave(env.num_envs // num_tasks, 0)"
    red(check_a_row_plays_the_task_of_its_policy, right, "tasks.repeat(env.num_envs // num_tasks, 1)")


def check_noise_differs_between_tasks(module):
    for space in (CONTINUOUS, gym.spaces.Discrete(50)):
        policy = module.Policy(2, space, 4, 0.7)
        action = module.act(policy, torch.zeros(6, 5, 2), policy.per_task(6))[0].flatten(
            0, 1
        )  # 30 like states
        assert len(torch.unique(action, dim=0)) > 10


def test_action_noise_differs_between_tasks_and_episodes():
    check_noise_differs_between_tasks(maml)


def test_noise_goes_red_when_tasks_share_it():  # T2
    sample = "action = policies.sample()"
    red(check_noise_differs_between_tasks, sample, f"{sample}[:1].repeat_interleave(len(obs), 0)")


# ---- the inner step


def check_action_dimensions_are_summed(module):
    policy = make_policy(module)
    (batch,) = make_batches(module, 1, policy, small_args(module))
    obs, action = batch["obs"].flatten(1, 2), batch["action"].flatten(1, 2)
    mean, log_std = policy(obs, policy.per_task(N))
    density = torch.exp(-0.5 * ((action - mean) / log_std.exp()) ** 2) / (
        log_std.exp() * math.sqrt(2 * math.pi)
    )
    distribution = policy.distribution((mean, log_std))
    close(distribution.log_prob(action), density.prod(-1).log())
    moved = (mean + 0.3, log_std - 0.2)
    ratio, shift = (
        (-0.4 * torch.ones(2).double()).exp(),
        0.09 / log_std.exp()[0, 0] ** 2,
    )  # of the variances; squared
    kl = module.kl_divergence(policy.distribution(moved), distribution)  # closed form, a dimension at a time
    close(kl, 0.5 * (ratio + shift - 1 - ratio.log()).sum().expand_as(kl))


def test_log_probabilities_and_kl_are_sums_over_action_dimensions():
    check_action_dimensions_are_summed(maml)


def test_log_probabilities_go_red_when_averaged_over_action_dimensions():  # T1
    whole = "return Independent(normal, 1, validate_args=False)"
    averaged = "log_prob = normal.log_prob; normal.log_prob = lambda a: log_prob(a).mean(-1); return normal"
    red(check_action_dimensions_are_summed, whole, averaged)


def alone(policy, n, batch, objective="logprob"):
    """The loss of one task, with plain matrices and a loop over its steps, as a function of one theta."""
    discrete = policy.discrete

    def output(theta, obs):
        x = torch.tanh(torch.tanh(obs @ theta[0] + theta[1]) @ theta[2] + theta[3]) @ theta[4] + theta[5]
        return (x.log_softmax(-1),) if discrete else (x, theta[6])

    def logprob(out, action):
        if discrete:
            return out[0][action]
        mean, log_std = out
        return (-0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum()

    def loss(theta):
        total, count = 0.0, 0
        for e in range(E):
            for t in range(int(batch["valid"][n, :, e].sum())):
                out = output(theta, batch["obs"][n, t, e].unsqueeze(0))
                out = tuple(x[0] for x in out)
                total = total - logprob(out, batch["action"][n, t, e]) * batch["advantage"][n, t, e]
                count += 1
        return total / count

    return loss, output, logprob


@both_kinds
def test_a_gradient_step_is_each_tasks_own(space):
    policy = make_policy(maml, space)
    (batch,) = make_batches(maml, 1, policy, small_args(maml), space)
    stepped = maml.inner_step(policy, policy.per_task(N), batch, 0.3, small_args(maml))
    for n in range(N):
        theta = [p.detach().clone().requires_grad_() for p in policy.theta]
        grads = torch.autograd.grad(alone(policy, n, batch)[0](theta), theta)
        for found, p, grad in zip(stepped, theta, grads, strict=True):
            close(found[n], p - 0.3 * grad)


# ---- the meta-gradient


def meta_gradient(module, policy, inner, outer, args):
    output = module.adapted_output(policy, inner, outer, args)
    loss = module.surrogate_loss(policy, output, outer)
    return module.flatten(torch.autograd.grad(loss, list(policy.theta)))


def meta_gradient_by_a_loop(policy, inner, outer, args):
    """Task by task: inner steps with create_graph, then the surrogate by its definition."""
    total = 0.0
    for n in range(N):
        theta = [p.detach().clone().requires_grad_() for p in policy.theta]
        phi = theta
        for batch in inner:
            loss, _, _ = alone(policy, n, batch)
            grads = torch.autograd.grad(loss(phi), phi, create_graph=True)
            phi = [p - args.inner_lr * grad for p, grad in zip(phi, grads, strict=True)]
        loss, _, _ = alone(policy, n, outer)  # at pi_old the ratio's gradient is the log-probability's
        total = total + torch.cat([grad.flatten() for grad in torch.autograd.grad(loss(phi), theta)]) / N
    return total


def check_meta_gradient(module, space=CONTINUOUS):
    for inner_steps in (0, 1, 2):
        policy, args = make_policy(module, space), small_args(module, inner_steps=inner_steps)
        *inner, outer = make_batches(module, inner_steps + 1, policy, args, space, seed=inner_steps)
        found = meta_gradient(module, policy, inner, outer, args)
        close(found, meta_gradient_by_a_loop(policy, inner, outer, args))


@both_kinds
def test_the_meta_gradient_equals_a_loop_over_tasks(space):
    check_meta_gradient(maml, space)


def test_the_meta_gradient_goes_red_when_the_inner_step_is_cut_off():  # T5
    red(
        check_meta_gradient,
        "differentiable = create_graph and not args.first_order",
        "differentiable = False",
    )


@both_kinds
@pytest.mark.parametrize(
    ("inner_steps", "objective"), [(0, "logprob"), (1, "logprob"), (2, "logprob"), (1, "dice")]
)
def test_the_meta_gradient_equals_finite_differences_of_what_the_line_search_sees(
    space, inner_steps, objective
):
    policy, args = make_policy(maml, space), small_args(maml, inner_objective=objective)
    *inner, outer = make_batches(maml, inner_steps + 1, policy, args, space)
    gradient = meta_gradient(maml, policy, inner, outer, args)
    theta = maml.flatten(policy.theta).detach()

    def loss_at(vector):
        maml.vector_to_parameters(vector, policy.theta)
        output = maml.adapted_output(policy, inner, outer, args, create_graph=False)
        return maml.surrogate_loss(policy, output, outer).item()

    slopes = []
    for unit in 1e-6 * torch.eye(len(theta), dtype=torch.float64):
        slopes.append((loss_at(theta + unit) - loss_at(theta - unit)) / 2e-6)
    close(torch.tensor(slopes, dtype=torch.float64), gradient, 2e-6)


def test_first_order_leaves_out_what_the_inner_step_adds():
    policy = make_policy(maml)
    inner, outer = make_batches(maml, 2, policy, small_args(maml))
    exact, first = (
        meta_gradient(maml, policy, [inner], outer, small_args(maml, first_order=flag))
        for flag in (False, True)
    )
    # first order takes the gradient at theta' for that at theta
    phi = maml.inner_step(policy, policy.per_task(N), inner, 0.3, small_args(maml))
    phi = [p.detach().requires_grad_() for p in phi]
    output = policy(outer["obs"], phi)
    loss = maml.surrogate_loss(policy, output, outer)
    expected = torch.cat([grad.sum(0).flatten() for grad in torch.autograd.grad(loss, phi)])
    close(first, expected)
    assert (exact - first).norm() > 0.05 * exact.norm()


# ---- the second derivative of the inner objective, against a world small enough to enumerate


class Enumerated:
    """A deterministic world of 2 states, 2 actions, 3 steps, and a policy that starts uniform.

    All 8 action sequences are then equally likely: a batch of each of them once is an exact expectation, and
    J(theta) = sum over sequences of probability times return can be differentiated as it stands.
    """

    def __init__(self):
        self.policy = make_policy(maml, gym.spaces.Discrete(2), obs_dim=2, hidden_size=3, seed=4)
        with torch.no_grad():
            self.policy.theta[4].zero_(), self.policy.theta[5].zero_()  # logits 0 everywhere
        self.plans = torch.tensor(list(itertools.product((0, 1), repeat=3)))  # [8, 3]
        state = torch.zeros(8, dtype=torch.int64)
        obs, reward = [], []
        for t in range(3):
            obs.append(torch.nn.functional.one_hot(state, 2).double())
            reward.append(
                torch.tensor([[1.0, 0.2], [-0.5, 2.0]], dtype=torch.float64)[state, self.plans[:, t]]
            )
            state = (state + self.plans[:, t]) % 2
        self.obs, self.reward = torch.stack(obs, 1), torch.stack(reward, 1)  # [8, 3, 2], [8, 3]

    def true_return(self, theta):
        logits = (
            torch.tanh(torch.tanh(self.obs @ theta[0] + theta[1]) @ theta[2] + theta[3]) @ theta[4] + theta[5]
        )
        logprob = logits.log_softmax(-1).gather(-1, self.plans[..., None])[..., 0]
        return (logprob.sum(1).exp() * self.reward.sum(1)).sum()

    def inner_loss(self, theta, objective, baseline):
        to_go = self.reward.flip(1).cumsum(1).flip(1)  # [8, 3]
        advantage = to_go - baseline * (1 + self.obs[..., 0]) * torch.tensor([1.0, -2.0, 0.5])
        logits = (
            torch.tanh(torch.tanh(self.obs @ theta[0] + theta[1]) @ theta[2] + theta[3]) @ theta[4] + theta[5]
        )
        logprob = logits.log_softmax(-1).gather(-1, self.plans[..., None])[..., 0]
        shape = (1, 3, 8)  # one task, three steps, eight episodes
        weight = torch.full(shape, 1 / 8, dtype=torch.float64)  # summed over steps, as the return is
        logprob, advantage = logprob.T.reshape(shape), advantage.T.reshape(shape)
        return maml.inner_loss(logprob, logprob.detach(), advantage, weight, objective).sum()


def derivatives(function, theta):
    first = maml.flatten(torch.autograd.grad(function(theta), theta, create_graph=True))
    second = [
        maml.flatten(torch.autograd.grad(x, theta, retain_graph=True, allow_unused=False)) for x in first
    ]
    return first.detach(), torch.stack(second)


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_dice_has_the_true_second_derivative_and_the_log_probability_has_not(baseline, capsys):  # D1
    world = Enumerated()
    theta = list(world.policy.theta)
    gradient, hessian = derivatives(lambda theta: -world.true_return(theta), theta)
    gaps = {}
    for objective in ("dice", "logprob"):
        first, second = derivatives(lambda theta, o=objective: world.inner_loss(theta, o, baseline), theta)
        close(first, gradient)
        gaps[objective] = ((second - hessian).norm() / hessian.norm()).item()
    with capsys.disabled():
        print(f"\nerror of the second derivative: {gaps['dice']:.0e} (dice), {gaps['logprob']:.0%} (logprob)")
    assert gaps["dice"] < 1e-12 and gaps["logprob"] > 0.1


def test_with_dice_the_meta_gradient_of_the_expected_return_is_exact():
    world = Enumerated()
    theta, step = list(world.policy.theta), 0.3

    def after_a_step(loss_of):
        grads = torch.autograd.grad(loss_of(theta), theta, create_graph=True)
        value = world.true_return([p - step * grad for p, grad in zip(theta, grads, strict=True)])
        return maml.flatten(torch.autograd.grad(value, theta))

    exact = after_a_step(lambda theta: -world.true_return(theta))
    close(after_a_step(lambda theta: world.inner_loss(theta, "dice", 0.5)), exact)
    published = after_a_step(lambda theta: world.inner_loss(theta, "logprob", 0.5))
    assert (published - exact).norm() > 0.05 * exact.norm()


# ---- TRPO


def explicit_hessian(module, policy, inner, outer, args):
    output = module.adapted_output(policy, inner, outer, args)
    kl = module.mean_kl(policy, output, [x.detach() for x in output], outer)
    theta = list(policy.theta)
    slope = module.flatten(torch.autograd.grad(kl, theta, create_graph=True))
    assert slope.abs().max() < 1e-12  # the KL is least here
    rows = [module.flatten(torch.autograd.grad(x, theta, retain_graph=True)) for x in slope]
    return torch.stack(rows)


def check_the_kl_is_from_the_old_to_the_new(module):
    policy, old, new = make_policy(module), *torch.randn(2, 2, 5, 2).double()  # mean and log_std of each
    batch = {"weight": torch.rand(5).double()}
    close(module.mean_kl(policy, tuple(new), tuple(old), batch), gaussian_kl(old, new, batch["weight"]))


def test_the_kl_is_from_the_old_to_the_new_policy():
    check_the_kl_is_from_the_old_to_the_new(maml)


def test_the_kl_goes_red_the_other_way_round():
    old_to_new = "kl_divergence(policy.distribution(old_output), policy.distribution(output))"
    new_to_old = "kl_divergence(policy.distribution(output), policy.distribution(old_output))"
    red(check_the_kl_is_from_the_old_to_the_new, old_to_new, new_to_old)


def check_fisher_products(module, space=CONTINUOUS):
    for inner_steps, objective in ((0, "logprob"), (1, "logprob"), (2, "logprob"), (1, "dice")):
        policy, args = (
            make_policy(module, space, hidden_size=3),
            small_args(module, inner_objective=objective),
        )
        *inner, outer = make_batches(module, inner_steps + 1, policy, args, space)
        # the shipped functions for the reference: they have been compared with a loop over tasks above
        hessian = explicit_hessian(maml, policy, inner, outer, args)
        product = module.fisher_product(policy, module.adapted_output(policy, inner, outer, args), outer)
        for vector in torch.randn(3, len(hessian), generator=torch.Generator().manual_seed(0)).double():
            close(product(vector), hessian @ vector)
        assert torch.linalg.eigvalsh(hessian).min() > -1e-12


@both_kinds
def test_fisher_products_equal_the_explicit_hessian_of_the_mean_kl(space):
    check_fisher_products(maml, space)


def test_fisher_products_go_red_when_of_the_policy_before_adaptation():  # T8
    red(
        check_fisher_products,
        "    for batch in inner:\n        phi = inner_step",
        "    for batch in []:\n        phi = inner_step",
    )


def check_conjugate_gradient(module):
    generator = torch.Generator().manual_seed(0)
    for size in (1, 3, 12):
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        matrix = root @ root.T + torch.eye(size, dtype=torch.float64)
        b = torch.randn(size, generator=generator, dtype=torch.float64)
        kept = b.clone()
        x = module.conjugate_gradient(lambda v, matrix=matrix: matrix @ v, b, 3 * size)
        close(matrix @ x, kept, 1e-4)
        assert torch.equal(b, kept)
        few = module.conjugate_gradient(lambda v, matrix=matrix: matrix @ v, b, 2)
        assert (few @ matrix @ few).item() == pytest.approx(
            (few @ kept).item()
        )  # what update's step length uses


def test_conjugate_gradient_solves_and_leaves_its_input_alone():
    check_conjugate_gradient(maml)


def test_conjugate_gradient_solves_for_small_and_for_no_gradients():
    for size in (1e-9, 0.0):
        b = torch.full((3,), size, dtype=torch.float64)
        close(maml.conjugate_gradient(lambda v: 2 * v, b, 10), b / 2, 1e-15)


def test_conjugate_gradient_goes_red_when_it_works_in_place():  # T9
    red(check_conjugate_gradient, "residual = residual - step * image", "residual -= step * image")


def check_line_search(module):
    """Steps that are short and much too long, and one in the wrong direction; tasks in parts of 2 and 1."""
    taken = 0
    for seed, length in itertools.product(range(4), (-1.0, 0.001, 0.01, 0.1, 1.0)):
        policy, args = make_policy(module, seed=seed), small_args(module, max_kl=0.02)
        *inner, outer = make_batches(module, 2, policy, args, seed=seed)
        old = [x.detach() for x in module.adapted_output(policy, inner, outer, args)]
        before = module.flatten(policy.theta).detach().clone()
        loss = module.surrogate_loss(policy, old, outer)
        step = -length * meta_gradient(module, policy, inner, outer, args)
        parts = module.split_tasks([*inner, outer], 2)
        new_loss, kl, share = module.line_search(
            policy, parts, [[x[:2] for x in old], [x[2:] for x in old]], loss, step, args
        )
        after = module.flatten(policy.theta).detach()
        close(after, before + share * step)
        output = module.adapted_output(policy, inner, outer, args)
        assert maml.mean_kl(policy, output, old, outer) <= 0.02
        assert new_loss <= loss and (new_loss < loss) == (share > 0)
        close(module.surrogate_loss(policy, output, outer).detach(), new_loss)
        taken += share > 0
    assert 8 <= taken < 20


def test_the_line_search_never_accepts_a_step_over_the_bound_or_a_worse_one():
    check_line_search(maml)


def test_the_line_search_goes_red_when_it_looks_at_the_loss_alone():  # T8
    red(check_line_search, "if loss < old_loss and kl <= args.max_kl:", "if loss < old_loss:")


@both_kinds
def test_an_update_improves_the_surrogate_within_the_bound(space):
    for seed in range(3):
        policy, args = make_policy(maml, space, seed=seed), small_args(maml, max_kl=0.01)
        *inner, outer = make_batches(maml, 2, policy, args, space, seed=seed)
        old = [x.detach() for x in maml.adapted_output(policy, inner, outer, args)]
        metrics = maml.update(policy, inner, outer, args)
        output = maml.adapted_output(policy, inner, outer, args)
        assert metrics["losses/policy"] < maml.surrogate_loss(policy, old, outer).item()
        kl = maml.mean_kl(policy, output, old, outer).item()
        assert metrics["debug/kl"] == pytest.approx(kl) and 0.002 < kl <= 0.01
        assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("reward", [0.0, -1.0])
def test_rewards_that_say_nothing_stop_no_run(reward):
    policy, args = make_policy(maml), small_args(maml)
    episodes = make_episodes(ends=False)
    episodes["reward"] = torch.full_like(episodes["reward"], reward)
    inner, outer = make_batches(maml, 2, policy, args)
    outer |= {
        k: v for k, v in maml.add_advantage(episodes, 0.9, 0.8).items() if k in ("ret", "value", "advantage")
    }
    assert all(math.isfinite(value) for value in maml.update(policy, [inner], outer, args).values())


@both_kinds
def test_an_update_is_the_same_in_whatever_parts_tasks_are_taken(space):
    results = []
    for size in (0, 1, 2, 3, 7):
        policy, args = make_policy(maml, space), small_args(maml, tasks_at_once=size, fisher_fraction=0.5)
        *inner, outer = make_batches(maml, 2, policy, args, space)
        metrics = maml.update(policy, inner, outer, args)
        results.append((maml.flatten(policy.theta).detach(), metrics))
    for theta, metrics in results[1:]:
        close(theta, results[0][0], 1e-6)
        assert metrics == pytest.approx(results[0][1], abs=1e-6)


def test_nothing_to_learn_moves_nothing():
    policy = make_policy(maml)
    inner, outer = make_batches(maml, 2, policy, small_args(maml))
    outer["advantage"] = torch.zeros_like(outer["advantage"])
    before = maml.flatten(policy.theta).detach().clone()
    metrics = maml.update(policy, [inner], outer, small_args(maml))
    assert torch.equal(before, maml.flatten(policy.theta)) and metrics["debug/step"] == 0


def test_a_fraction_of_the_episodes_gives_the_fisher_products_of_these_episodes():
    policy, args = make_policy(maml), small_args(maml, fisher_fraction=0.5, max_kl=1e-12, tasks_at_once=0)
    inner, outer = make_batches(maml, 2, policy, args)
    half = {name: x[:, :, : E // 2] for name, x in outer.items()}
    half["weight"] = half["valid"] / half["valid"].sum((1, 2), keepdim=True)
    expected = explicit_hessian(maml, policy, [inner], half, args)
    products, shipped = [], maml.fisher_product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maml, "fisher_product", lambda *a: products.append(shipped(*a)) or products[-1])
        maml.update(policy, [inner], outer, args)
    vector = torch.randn(len(expected), dtype=torch.float64)
    close(products[0](vector), expected @ vector)


# ---- adaptation and evaluation


def test_adaptation_takes_each_tasks_step_on_its_own_episodes_and_plays_again():
    env = common.make("PointGoal-v0", N * E, seed=0)
    policy, args = maml.Policy(2, CONTINUOUS, 4, 0.7), small_args(maml)
    batches = maml.adapt(policy, maml.act, env, env.sample_tasks(N), [0.3, 0.1], args, seed=3)
    assert len(batches) == 3
    phi = policy.per_task(N)
    played = []
    shipped = maml.rollout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            maml, "rollout", lambda *a: played.append([p.detach().clone() for p in a[4]]) or shipped(*a)
        )
        torch.manual_seed(0)
        batches = maml.adapt(policy, maml.act, env, env.sample_tasks(N), [0.3, 0.1], args, seed=3)
    for batch, weights, size in zip(batches, played, (0.3, 0.1, None), strict=True):
        for p, w in zip(phi, weights, strict=True):
            close(p.detach(), w, 1e-6)
        if size:
            phi = maml.inner_step(policy, phi, batch, size, args)


def check_what_an_update_is_given(module):
    """inner was played by theta and outer after the step; conjugate gradient's product is damped."""
    seen = []

    def update(policy, inner, outer, args, shipped=module.update):
        for batch in (*inner, outer):
            output = policy(batch["obs"], policy.per_task(len(batch["obs"])))
            logprob = policy.distribution(output).log_prob(batch["action"])
            seen.append(float((logprob - batch["logprob"]).detach().abs().max()))
        return shipped(policy, inner, outer, args)

    def conjugate_gradient(product, gradient, steps, shipped=module.conjugate_gradient):
        vector = torch.zeros_like(gradient)
        vector[-1] = 1  # the derivative of the KL's is 2 for a log deviation
        seen.append(float(product(vector)[-1]))
        return shipped(product, gradient, steps)

    flags = "--num-tasks 2 --episodes-per-task 2 --eval-tasks 2 --eval-episodes 1 --device cpu"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "update", update)
        patch.setattr(module, "conjugate_gradient", conjugate_gradient)
        module.main([*flags.split(), "--total-timesteps", "1", "--cg-damping", "7", "--run-dir", folder])
    before, after, damped = seen
    assert before < 1e-4 < after and damped > 7


def test_an_update_is_given_what_was_played_before_and_after_the_step():
    check_what_an_update_is_given(maml)


@pytest.mark.parametrize(
    ("edit", "trap"),
    [("*inner, outer = adapt(", "outer, *inner = adapt("), (" + args.cg_damping * vector", "")],
)
def test_an_update_goes_red(edit, trap):
    red(check_what_an_update_is_given, edit, trap)


def quick_evaluate(module, env_id="PointGoal-v0", num_tasks=5, trained=1, **changes):
    env = common.make(env_id, num_tasks * 4, seed=0)
    torch.manual_seed(0)
    obs_dim, space = env.single_observation_space.shape[0], env.single_action_space
    policy = module.Policy(obs_dim, space, 4, 0.7)
    args = small_args(module, **changes)
    return module.evaluate(policy, env, num_tasks, module.act, args, trained), env


def check_evaluation_is_on_frozen_held_out_tasks(module):
    set_tasks, seen = common.TaskVectorEnv.set_tasks, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common.TaskVectorEnv, "set_tasks", lambda env, tasks: seen.append(tasks) or set_tasks(env, tasks)
        )
        state = torch.get_rng_state()
        first, env = quick_evaluate(module)
        torch.set_rng_state(state), torch.rand(7)
        again, _ = quick_evaluate(module)
    held_out = env.sample_tasks(5, split="test").repeat_interleave(4, 0)
    assert len(seen) == 8 and all(torch.equal(tasks, held_out) for tasks in seen)
    assert first == again


def test_before_and_after_are_on_the_same_frozen_held_out_tasks():
    check_evaluation_is_on_frozen_held_out_tasks(maml)


def test_evaluation_goes_red_on_training_tasks():  # T7
    red(check_evaluation_is_on_frozen_held_out_tasks, 'split="test"', 'split="train"')


def test_more_gradient_steps_than_trained_with():
    report, _ = quick_evaluate(maml, inner_steps=0)
    assert "eval/return_ep3" in report and "eval/return_ep4" not in report
    report, _ = quick_evaluate(maml, inner_steps=6)
    assert "eval/return_ep6" in report and report["eval/adapt_steps_ep1"] <= 400
    assert report["eval/adapt_steps_ep0"] == 0 and "eval/return_trial" not in report


def test_a_checkpoint_is_evaluated_with_any_number_of_steps(tmp_path, capsys):
    flags = "--env-id Bandit5-v0 --num-tasks 2 --episodes-per-task 3 --eval-tasks 5 --total-timesteps 20"
    maml.main([*flags.split(), "--run-dir", str(tmp_path), "--device", "cpu"])
    (run,) = tmp_path.iterdir()
    capsys.readouterr()
    maml.main(["--evaluate", str(run), "--inner-steps", "10"])
    printed = capsys.readouterr().out
    assert "Bandit5-v0: 5 held-out tasks" in printed and "gradient steps" in printed
    assert re.search(r"^ +10 +400.000 ", printed, re.MULTILINE)  # after ten steps of forty episodes


def check_steps_that_were_trained_with_are_evaluated_whole(module):
    args = small_args(module, inner_lr=0.4, eval_lr_factor=0.25)
    for given, trained, sizes in (
        (1, 1, [0.4, 0.1, 0.1]),
        (0, 0, [0.4, 0.1, 0.1]),
        (3, 3, [0.4, 0.4, 0.4]),
        (2, 2, [0.4, 0.4, 0.1]),
        (5, 2, [0.4, 0.4, 0.1, 0.1, 0.1]),
    ):
        args.inner_steps = given
        assert module.eval_step_sizes(args, trained) == pytest.approx(sizes)
    used, adapt = [], module.adapt
    listen = lambda *given, **named: used.append(given[4]) or adapt(*given, **named)  # noqa: E731
    with mock.patch.object(module, "adapt", listen), tempfile.TemporaryDirectory() as folder:
        flags = "--env-id Bandit5-v0 --num-tasks 2 --episodes-per-task 3 --eval-tasks 5 --inner-steps 2"
        flags += " --total-timesteps 10 --eval-lr-factor 0.5 --inner-lr 0.2"
        module.main([*flags.split(), "--run-dir", folder])
        assert used == [pytest.approx([0.2, 0.2]), pytest.approx([0.2, 0.2, 0.1])]
        module.main(["--evaluate", *map(str, Path(folder).iterdir()), "--inner-steps", "4"])
        assert used[2] == pytest.approx([0.2, 0.2, 0.1, 0.1])


def test_steps_that_were_trained_with_are_evaluated_whole():
    check_steps_that_were_trained_with_are_evaluated_whole(maml)


@pytest.mark.parametrize(
    "edit", [("step < whole", "step < 1"), ('checkpoint["args"]["inner_steps"])', "args.inner_steps)")]
)
def test_step_sizes_of_evaluation_go_red(edit):
    red(check_steps_that_were_trained_with_are_evaluated_whole, *edit)


def test_the_bar_shows_what_the_steps_trained_with_are_worth(tmp_path, capsys):
    flags = "--num-tasks 2 --episodes-per-task 2 --eval-tasks 3 --eval-episodes 2 --inner-steps 2"
    maml.main([*flags.split(), "--total-timesteps", "1000", "--run-dir", str(tmp_path)])
    shown = re.findall(r"held_out=(\S+) -> ([-.0-9]+)", capsys.readouterr().err)[-1]
    (log,) = tmp_path.glob("*/metrics.jsonl")
    row = json.loads(log.read_text().splitlines()[-1])
    before, one, two = (f"{row[f'eval/return_ep{stage}']:.2f}" for stage in range(3))
    assert shown == (before, two) and one != two


@pytest.mark.parametrize("env_id", ["Bandit5-v0", "TabularMDP-v0", "GridNavi-v0"])
def test_discrete_tasks_run_too(env_id):
    report, _ = quick_evaluate(maml, env_id)
    assert all(math.isfinite(value) for value in report.values())


@pytest.mark.slow
def test_it_learns_2d_navigation(tmp_path, full):
    """Short: ten meta-iterations of smaller batches. Full: the README's run."""
    short = [
        "--num-tasks",
        "10",
        "--fisher-fraction",
        "0.25",
        "--total-timesteps",
        "300000",
        "--eval-tasks",
        "40",
    ]
    maml.main(["--run-dir", str(tmp_path), "--device", "cpu", *([] if full else short)])
    (log,) = tmp_path.glob("*/metrics.jsonl")
    last = json.loads(log.read_text().splitlines()[-1])
    before, one, three = (last[f"eval/return_ep{k}"] for k in (0, 1, 3))
    assert one > before + 8 and (not full or (one > -13.5 and three > -4.5))


@pytest.mark.slow
def test_one_task_is_solved_by_the_policy_gradient_alone(tmp_path):
    """With inner_steps 0 and the task told it is TRPO."""
    flags = (
        "--inner-steps 0 --oracle --num-tasks 5 --total-timesteps 150000 --eval-tasks 20 --eval-episodes 4"
    )
    maml.main([*flags.split(), "--run-dir", str(tmp_path), "--device", "cpu", "--gae-lambda", "0.9"])
    (log,) = tmp_path.glob("*/metrics.jsonl")
    rows = [json.loads(row) for row in log.read_text().splitlines()]
    assert rows[-1]["eval/return_ep0"] > rows[0]["charts/return_before"] + 10


def test_by_default_no_more_tasks_are_evaluated_than_are_held_out(tmp_path, capsys):
    pytest.importorskip("mujoco")
    flags = "--env-id HalfCheetahDir-v0 --num-tasks 2 --episodes-per-task 2 --eval-episodes 1 --hidden-size 8"
    maml.main([*flags.split(), "--total-timesteps", "1", "--run-dir", str(tmp_path), "--device", "cpu"])
    assert "HalfCheetahDir-v0: 40 held-out tasks" in capsys.readouterr().out
