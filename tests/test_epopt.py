"""EPOpt's claims. Each trap T1 to T12 of the docstring is put into a mutant, and its test must go red."""

import json
import math
import re
import tempfile

import gymnasium as gym
import pytest
import torch
from conftest import gaussian_kl, mutant, script
from torch.distributions import Categorical, Independent, Normal, kl_divergence

import common

epopt = script("epopt")
CONTINUOUS = gym.spaces.Box(-1, 1, (2,))
both_kinds = pytest.mark.parametrize("space", [CONTINUOUS, gym.spaces.Discrete(3)], ids=["box", "discrete"])
T, N = 7, 12


def red(check, *edits):
    """The claim fails on the script with these edits."""
    broken = mutant("epopt", *edits)
    with pytest.raises(AssertionError):
        check(broken)


def close(left, right, tolerance=1e-9):
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


def make_policy(module, space=CONTINUOUS, obs_dim=2, hidden_size=4, seed=0):
    """A float64 policy that is far from indifferent."""
    torch.manual_seed(seed)
    policy = module.TanhPolicy(obs_dim, space, hidden_size, 0.7).double()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return policy


def make_episodes(space=CONTINUOUS, seed=0, obs_dim=2):
    """What rollout returns, made up: episodes of random lengths, and noise in the padding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(T, N, *shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(2, T + 1, (N,), generator=generator)
    lengths[0] = T
    valid = (torch.arange(T)[:, None] < lengths).double()
    discrete = isinstance(space, gym.spaces.Discrete)
    action = torch.randint(int(space.n), (T, N), generator=generator) if discrete else normal(*space.shape)
    names = ("obs", "action", "logprob", "reward", "success", "valid")
    return dict(zip(names, (normal(obs_dim), action, normal() / 9, normal(), normal(), valid), strict=True))


def played_by(policy, episodes):
    """The same episodes, as if this policy had played them."""
    with torch.no_grad():
        logprob = policy.distribution(policy(episodes["obs"])).log_prob(episodes["action"])
    return {**episodes, "logprob": logprob}


# ---- selection


def check_the_worst_are_exactly_so_many(module):
    for count, epsilon, expected in (
        (100, 0.07, 7),
        (100, 0.1, 10),
        (30, 0.1, 3),
        (240, 0.1, 24),
        (101, 0.1, 11),
        (10, 0.1, 1),
        (7, 0.29, 3),
        (50, 0.58, 29),
        (5, 1.0, 5),
        (3, 0.01, 1),
    ):
        assert len(module.worst(torch.arange(count).float(), epsilon)) == expected, (count, epsilon)
    returns = torch.tensor([3.0, -1, 3, 7, -1, 0, 3, -5, 2, 2])
    assert module.worst(returns, 0.3).tolist() == [7, 1, 4]
    assert module.worst(returns, 0.2).tolist() == [7, 1]  # of two equal ones the first
    for epsilon in (0.1, 0.37, 1.0):
        assert module.worst(torch.ones(1000), epsilon).tolist() == list(range(round(1000 * epsilon)))


def test_the_worst_are_exactly_so_many_and_of_equals_the_first():
    check_the_worst_are_exactly_so_many(epopt)


def test_selection_goes_red_when_epsilon_n_is_rounded_or_ties_are_random():  # T5
    right = "math.ceil(round(epsilon * len(returns), 9))"
    red(check_the_worst_are_exactly_so_many, right, "math.ceil(epsilon * len(returns))")
    red(check_the_worst_are_exactly_so_many, right, "round(epsilon * len(returns))")
    shuffled = "returns[torch.randperm(len(returns))].sort(stable=True).indices[:count]"
    red(check_the_worst_are_exactly_so_many, "returns.sort(stable=True).indices[:count]", shuffled)


def check_what_ranks_a_trajectory_is_the_sum_of_its_own_rewards(module):
    episodes = make_episodes()
    returns = module.trajectory_returns(episodes)
    for n in range(N):
        steps = int(episodes["valid"][:, n].sum())
        close(returns[n], sum(episodes["reward"][:steps, n]))


def test_what_ranks_a_trajectory_is_the_sum_of_its_own_rewards():
    check_what_ranks_a_trajectory_is_the_sum_of_its_own_rewards(epopt)


def test_ranking_goes_red_with_padding_means_or_normalised_rewards():  # T11
    right = '(episodes["reward"] * episodes["valid"]).sum(0)'
    for trap in (
        'episodes["reward"].sum(0)',
        f'{right} / episodes["valid"].sum(0)',
        '((episodes["reward"] - episodes["reward"].mean()) * episodes["valid"]).sum(0)',
    ):
        red(check_what_ranks_a_trajectory_is_the_sum_of_its_own_rewards, right, trap)


# ---- models


def check_a_heavier_torso_turns_as_much_more_slowly():
    """Twice the mass, twice the moments of inertia."""
    env = common.make("HopperEnsemble-v0", 2, seed=0).unwrapped
    models = env.named_tasks["mean"].repeat(2, 1)
    models[1, 0] *= 2
    env.set_tasks(models)
    env.reset(seed=0)
    light, heavy = (env._batch.get_model(world).body("torso") for world in range(2))
    assert heavy.mass == pytest.approx(2 * light.mass)
    assert heavy.inertia == pytest.approx(2 * light.inertia)


def test_a_mass_comes_with_its_moments_of_inertia_and_goes_red_without(monkeypatch):  # T10
    pytest.importorskip("mujoco")
    from common.mujoco_ensembles import BodyEnsemble

    check_a_heavier_torso_turns_as_much_more_slowly()
    shipped = BodyEnsemble._write

    def mass_alone(self, batch, tasks):
        shipped(self, batch, tasks)
        batch.expand("body_inertia")[:] = self.model.body_inertia

    monkeypatch.setattr(BodyEnsemble, "_write", mass_alone)
    with pytest.raises(AssertionError):
        check_a_heavier_torso_turns_as_much_more_slowly()


# ---- baseline and advantages


def check_padding_says_nothing(module):
    chosen, policy, batches = torch.tensor([3, 0, 7]), make_policy(module), []
    for noise in (0.0, 100.0):
        episodes = make_episodes()
        for name in ("obs", "reward", "logprob", "action"):
            padding = (1 - episodes["valid"]).view(T, N, *[1] * (episodes[name].dim() - 2))
            episodes[name] = episodes[name] + noise * padding
        batch = module.select(module.add_values(episodes, 0.9, 0.8), chosen)
        assert len(batch["obs"]) == int(episodes["valid"][:, chosen].sum())
        batches.append(batch)
    for name in ("obs", "action", "advantage", "weight"):
        close(batches[0][name], batches[1][name])
    losses = [module.surrogate_loss(policy, policy(batch["obs"]), batch) for batch in batches]
    close(*losses)


def test_padding_says_nothing():
    check_padding_says_nothing(epopt)


def test_padding_goes_red_when_it_counts_as_data():  # T4
    red(check_padding_says_nothing, 'inside = episodes["valid"] > 0  # T4', 'inside = episodes["valid"] > -1')
    red(
        check_padding_says_nothing,
        '(episodes["obs"], ret, valid))  # [T, 1, N, ...]',
        '(episodes["obs"], ret, 0 * valid + 1))',
    )


def check_the_baseline_is_that_of_all_models(module):
    """So what the worst have earned is less than it expects."""
    episodes = make_episodes()
    episodes["reward"][:, :3] -= 10.0
    episodes = module.add_values(episodes, 0.9, 1.0)
    expected = module.linear_baseline(*(episodes[name][:, None] for name in ("obs", "ret", "valid")))[:, 0]
    close(episodes["value"], expected)
    inside = episodes["valid"][:, :3] > 0
    assert (episodes["advantage"][:, :3][inside] < 0).double().mean() > 0.8  # they did worse than expected


def test_the_baseline_is_fitted_to_all_trajectories():
    check_the_baseline_is_that_of_all_models(epopt)


def test_the_baseline_goes_red_when_fitted_to_the_worst():  # T2
    right = "value = linear_baseline(*one_task)[:, 0]  # D4"
    trap = (
        "bad = worst(trajectory_returns(episodes), 0.25)\n"
        "    value = linear_baseline(*(x[:, None] for x in (episodes['obs'], ret, valid * 0 + "
        "valid * torch.zeros_like(valid).index_fill(1, bad, 1))))[:, 0]"
    )
    red(check_the_baseline_is_that_of_all_models, right, trap)


def check_the_clock_of_the_baseline_starts_with_every_episode(module):
    """Returns that are a cubic of the time in the episode are predicted exactly, whatever the trajectory."""
    time = torch.arange(T, dtype=torch.float64)[:, None, None].expand(T, 1, N) / 100
    ret = 1 + 2 * time - 300 * time**2 + 4000 * time**3
    obs = torch.zeros(T, 1, N, 2, dtype=torch.float64)
    value = module.linear_baseline(obs, ret, torch.ones_like(ret), ridge=1e-12)
    close(value, ret, 1e-5)


def test_the_clock_of_the_baseline_starts_with_every_episode():
    check_the_clock_of_the_baseline_starts_with_every_episode(epopt)


def test_the_clock_goes_red_when_it_runs_over_the_batch():  # T3
    right = "time = time.expand(*valid.shape, 1)  #"
    trap = "time = torch.arange(valid.numel()).view(*valid.shape, 1).to(obs) / 100  #"
    red(check_the_clock_of_the_baseline_starts_with_every_episode, right, trap)


def check_advantages_are_standardised_over_the_worst_together(module):
    episodes = module.add_values(make_episodes(), 0.9, 0.8)
    chosen = torch.tensor([5, 2, 9])
    batch = module.select(episodes, chosen)
    raw = torch.cat([episodes["advantage"][t, chosen][episodes["valid"][t, chosen] > 0] for t in range(T)])
    close(batch["advantage"], (raw - raw.mean()) / raw.std(correction=0), 1e-6)


def test_advantages_are_standardised_over_the_worst_together():
    check_advantages_are_standardised_over_the_worst_together(epopt)


def test_advantages_go_red_when_standardised_for_each_trajectory():  # T6
    trap = (
        "episodes = {name: x[:, chosen] for name, x in episodes.items()}\n"
        '    ends = episodes["valid"].sum(0)\n'
        '    middle = (episodes["advantage"] * episodes["valid"]).sum(0) / ends\n'
        '    episodes["advantage"] = episodes["advantage"] - middle'
    )
    red(
        check_advantages_are_standardised_over_the_worst_together,
        "episodes = {name: x[:, chosen] for name, x in episodes.items()}",
        trap,
    )


# ---- the step


def check_the_gradient_is_the_policy_gradient_of_the_worst(module, space=CONTINUOUS):
    policy = make_policy(module, space)
    episodes = module.add_values(played_by(policy, make_episodes(space)), 0.9, 0.8)
    chosen = module.worst(module.trajectory_returns(episodes), 0.3)
    assert len(chosen) == 4
    batch = module.select(episodes, chosen)
    theta = list(policy.parameters())
    shipped = torch.autograd.grad(module.surrogate_loss(policy, policy(batch["obs"]), batch), theta)
    raw, scores = [], []
    for n in chosen.tolist():  # by hand, step by step
        for t in range(int(episodes["valid"][:, n].sum())):
            output, action = policy.net(episodes["obs"][t, n]), episodes["action"][t, n]
            if isinstance(space, gym.spaces.Discrete):
                logprob = output.log_softmax(-1)[action]
            else:
                std = policy.log_std.exp()
                density = torch.exp(-(((action - output) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
                logprob = density.prod().log()
            scores.append(torch.cat([g.flatten() for g in torch.autograd.grad(logprob, theta)]))
            raw.append(episodes["advantage"][t, n])
    advantage = torch.stack(raw)
    advantage = (advantage - advantage.mean()) / advantage.std(correction=0)
    expected = -(advantage[:, None] * torch.stack(scores)).mean(0)
    close(torch.cat([g.flatten() for g in shipped]), expected, 1e-6)


@both_kinds
def test_the_gradient_is_the_policy_gradient_of_the_worst(space):
    check_the_gradient_is_the_policy_gradient_of_the_worst(epopt, space)


def test_the_gradient_goes_red_when_action_dimensions_are_averaged():  # T1
    red(
        check_the_gradient_is_the_policy_gradient_of_the_worst,
        "Independent(normal, 1, validate_args=False)  # T1: log-probs and KL SUM over action dimensions",
        "type('Mean', (), {'log_prob': lambda self, x: normal.log_prob(x).mean(-1)})()",
    )


def test_the_subset_gradient_is_not_that_of_the_conditional_value_at_risk():
    """D1 in closed form: a bandit whose arm a pays a on average. Both gradients by adding up all outcomes."""
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    pay = torch.tensor([[1.0, -4], [0, 0.5], [2, -1]], dtype=torch.float64).flatten()  # two outcomes an arm

    def joint(x):
        return (x.softmax(0)[:, None] / 2).expand(3, 2).flatten()

    def value_at_risk(x, epsilon):
        """E[R | the worst epsilon of outcomes], the last of them taken in part."""
        order, left, total = pay.argsort(), epsilon, 0.0
        for probability, value in zip(joint(x)[order].tolist(), pay[order].tolist(), strict=True):
            total, left = total + min(probability, left) * value, left - min(probability, left)
        return total / epsilon

    bad = pay.argsort()[:2]
    epsilon = float(joint(logits)[bad].sum().detach()) + 0.05  # and a part of the third worst
    y = pay.sort().values[2]
    weight = joint(logits).detach()[bad] / epsilon
    slopes = []
    for k in range(3):
        step = torch.eye(3, dtype=torch.float64)[k] * 1e-6
        ends = [value_at_risk(logits.detach() + sign * step, epsilon) for sign in (1, -1)]
        slopes.append((ends[0] - ends[1]) / 2e-6)

    def gradient(baseline):
        score = (weight * (pay[bad] - baseline) * joint(logits).log()[bad]).sum()
        return torch.autograd.grad(score, logits)[0]

    assert gradient(y).tolist() == pytest.approx(slopes, abs=1e-6)
    for baseline in ((joint(logits) * pay).sum().detach(), (weight * pay[bad]).sum() / weight.sum()):
        assert (gradient(baseline) - gradient(y)).norm() > 0.05 * gradient(y).norm()


def check_the_kl_is_from_the_old_to_the_new(module):
    policy, old, new = make_policy(module), *torch.randn(2, 2, 5, 2).double()  # mean and log_std of each
    batch = {"weight": torch.rand(5).double()}
    close(module.mean_kl(policy, tuple(new), tuple(old), batch), gaussian_kl(old, new, batch["weight"]))


def test_the_kl_is_from_the_old_to_the_new_policy():
    check_the_kl_is_from_the_old_to_the_new(epopt)


def test_the_kl_goes_red_the_other_way_round():
    old_to_new = "kl_divergence(policy.distribution(old_output), policy.distribution(output))"
    new_to_old = "kl_divergence(policy.distribution(output), policy.distribution(old_output))"
    red(check_the_kl_is_from_the_old_to_the_new, old_to_new, new_to_old)


def check_fisher_products(module, space=CONTINUOUS):
    policy = make_policy(module, space, hidden_size=3)
    episodes = played_by(policy, make_episodes(space))
    batch = module.select(module.add_values(episodes, 0.9, 0.8), torch.tensor([1, 4]))
    theta = list(policy.parameters())
    with torch.no_grad():
        old = [x.clone() for x in policy(batch["obs"])]

    def kl():
        new, before = policy(batch["obs"]), old
        if isinstance(space, gym.spaces.Discrete):
            return kl_divergence(Categorical(logits=before[0]), Categorical(logits=new[0])).mean()
        normals = (Independent(Normal(mean, log_std.exp()), 1) for mean, log_std in (before, new))
        return kl_divergence(*normals).mean()

    slope = module.flatten(torch.autograd.grad(kl(), theta, create_graph=True))
    rows = [module.flatten(torch.autograd.grad(x, theta, retain_graph=True)) for x in slope]
    hessian = torch.stack(rows)
    product = module.fisher_product(policy, policy(batch["obs"]), batch)
    for vector in torch.randn(3, len(hessian), generator=torch.Generator().manual_seed(0)).double():
        close(product(vector), hessian @ vector)


@both_kinds
def test_fisher_products_equal_the_explicit_hessian_of_the_mean_kl(space):
    check_fisher_products(epopt, space)


def check_fisher_products_see_all_trajectories(module):
    """Twenty of equal length, whose steps say whose they are, and a tenth of the steps."""
    horizon, count, seen = 1000, 20, []
    whose = torch.arange(float(count)).expand(horizon, count)
    one = torch.ones(horizon, count)
    torch.manual_seed(0)
    names = {
        "action": torch.randn(horizon, count, 2),
        "logprob": one,
        "valid": one,
        "advantage": torch.randn(one.shape),
    }
    batch = module.select({"obs": torch.stack([whose, one], -1), **names}, torch.arange(count))
    shipped = module.fisher_product

    def look(policy, output, batch):
        seen.append(batch["obs"][:, 0])
        return shipped(policy, output, batch)

    module.fisher_product = look
    try:
        module.update(module.TanhPolicy(2, CONTINUOUS, 4, 1.0), batch, module.Args(fisher_fraction=0.1))
    finally:
        module.fisher_product = shipped
    (steps,) = seen
    assert len(steps) == 2000 and torch.bincount(steps.long(), minlength=count).min() > 50


def test_fisher_products_see_all_trajectories():
    check_fisher_products_see_all_trajectories(epopt)


def test_fisher_products_go_red_when_they_see_every_tenth_step():
    stride = "torch.arange(count, device=gradient.device) * total // count"
    right = "torch.randperm(total, device=gradient.device)[:count]"
    red(check_fisher_products_see_all_trajectories, right, stride)


def check_conjugate_gradient(module):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(6, dtype=torch.float64)
    b = torch.randn(6, generator=generator, dtype=torch.float64)
    kept = b.clone()
    close(module.conjugate_gradient(lambda v: matrix @ v, b, 20), torch.linalg.solve(matrix, kept), 1e-5)
    assert torch.equal(b, kept)


def test_conjugate_gradient_solves_and_leaves_its_argument_alone():
    check_conjugate_gradient(epopt)


def test_conjugate_gradient_goes_red_in_place():  # T9
    red(check_conjugate_gradient, "residual = residual - step * image", "residual -= step * image")


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_a_step_lowers_the_loss_and_keeps_the_bound(monkeypatch, fraction):
    policy = make_policy(epopt)
    args = epopt.Args(max_kl=0.02, fisher_fraction=fraction)
    monkeypatch.setattr(epopt, "FISHER_STEPS", 2)
    episodes = epopt.add_values(played_by(policy, make_episodes()), 0.9, 0.8)
    batch = epopt.select(episodes, epopt.worst(epopt.trajectory_returns(episodes), 0.5))
    old = [x.detach().clone() for x in policy(batch["obs"])]
    loss = epopt.surrogate_loss(policy, old, batch)
    metrics = epopt.update(policy, batch, args)
    output = policy(batch["obs"])
    kl = epopt.mean_kl(policy, output, old, batch).item()
    assert epopt.surrogate_loss(policy, output, batch) < loss and metrics["debug/step"] > 0
    assert 0.002 < kl <= 0.02 and kl == pytest.approx(metrics["debug/kl"])


def test_equal_returns_move_nothing_far():
    """No signal at all: a step may be made of noise, but the bound holds and nothing is nan."""
    policy = make_policy(epopt)
    episodes = played_by(policy, make_episodes())
    episodes["reward"] = torch.zeros_like(episodes["reward"])
    batch = epopt.select(epopt.add_values(episodes, 0.9, 0.8), torch.tensor([0, 1]))
    metrics = epopt.update(policy, batch, epopt.Args())
    assert all(math.isfinite(value) for value in metrics.values()) and metrics["debug/kl"] <= 0.01


# ---- adapting the source distribution


class Linear:
    """s' = s + (p a, 0): a mean that is linear in the parameter, so that with Gaussian noise and a Gaussian
    prior the posterior is known."""

    def simulate(self, tasks, state, action):
        return state + torch.cat([tasks[:, :1].double() * action.double(), torch.zeros(len(state), 1)], 1)


def linear_data(slope, noise, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    action = torch.randn(steps, 1, generator=generator, dtype=torch.float64)
    state = torch.randn(steps, 2, generator=generator, dtype=torch.float64)
    wiggle = noise * torch.randn(steps, 2, generator=generator, dtype=torch.float64)
    after = state + torch.cat([slope * action, torch.zeros(steps, 1)], 1) + wiggle
    return {"state": state, "action": action, "next_state": after}


def test_a_change_that_is_always_the_same_is_no_exact_measurement():
    state = torch.zeros(4, 2, dtype=torch.float64)
    played = {"state": state, "action": torch.ones(4, 1, dtype=torch.float64), "next_state": state + 2}
    particles = torch.tensor([[1.8, 1.0], [2.0, 1.0]])
    log_weights = epopt.log_likelihood(Linear(), particles, played, 0.2)
    assert -10 < (log_weights[0] - log_weights[1]).item() < 0  # .2 of a change of 2, with a noise of .4


def test_a_simulation_of_another_shape_is_refused():
    class Narrow(Linear):
        def simulate(self, tasks, state, action):
            return super().simulate(tasks, state, action)[:, :1]  # which would fit by broadcasting

    played = linear_data(slope=2.0, noise=1.0, steps=4)
    with pytest.raises(common.ContractError, match=r"simulate returns \[8, 1\], expected \[8, 2\]"):
        epopt.log_likelihood(Narrow(), torch.ones(2, 2), played, 0.2)


def check_the_posterior_of_a_linear_gaussian_system(module):
    torch.manual_seed(0)
    played = linear_data(slope=2.7, noise=1.0, steps=12)
    prior_mean, prior_std, count = 2.0, 0.5, 20_000
    particles = torch.cat([prior_mean + prior_std * torch.randn(count, 1), torch.ones(count, 1)], 1)
    spread = (played["next_state"] - played["state"]).square().mean(0).sqrt()
    noise = 0.8
    sigma = noise * spread[0].item()
    log_weights = module.log_likelihood(Linear(), particles, played, noise)
    weights, beta = module.tempered_weights(log_weights, 0.05)
    assert beta == 1.0
    low, high = torch.tensor([-9.0, 1], dtype=torch.float64), torch.tensor([9.0, 1], dtype=torch.float64)
    after = module.resample(particles, weights, low, high).double()
    change = (played["next_state"] - played["state"])[:, 0]
    precision = 1 / prior_std**2 + (played["action"] ** 2).sum().item() / sigma**2
    mean = (prior_mean / prior_std**2 + (played["action"][:, 0] * change).sum().item() / sigma**2) / precision
    assert abs(mean - prior_mean) > 0.1 and precision > 1.5 / prior_std**2  # the data say something
    assert after[:, 0].mean().item() == pytest.approx(mean, abs=0.01)
    assert after[:, 0].std().item() == pytest.approx(precision**-0.5, rel=0.03)
    assert (after[:, 1] == 1).all()


def test_on_a_linear_gaussian_system_the_posterior_is_the_known_one():
    check_the_posterior_of_a_linear_gaussian_system(epopt)


def test_the_posterior_goes_red_with_a_mean_over_steps_or_without_the_half():
    right = ".double() ** 2).sum((1, 2)) / 2"
    for wrong in (".double() ** 2).mean((1, 2))", ".double() ** 2).sum((1, 2))"):
        red(check_the_posterior_of_a_linear_gaussian_system, right, wrong)


def check_thousands_of_exact_steps_do_not_underflow(module):
    torch.manual_seed(0)
    for offset in (0.0, -1e5, -1e12):
        log_weights = -1e4 * torch.rand(500, dtype=torch.float64) + offset
        weights, beta = module.tempered_weights(log_weights, 0.1)
        assert weights.isfinite().all() and weights.sum().item() == pytest.approx(1)
        assert module.effective_sample_size(weights).item() == pytest.approx(50, rel=1e-3)
        assert 0 < beta < 1 and weights.argmax() == log_weights.argmax()


def test_thousands_of_exact_steps_do_not_underflow_and_the_floor_is_kept():
    check_thousands_of_exact_steps_do_not_underflow(epopt)


def test_weights_go_red_without_logarithms():  # T8
    right = "(beta * log_weights).masked_fill(~known, -math.inf).softmax(0)"
    trap = "(beta * log_weights).exp() / (beta * log_weights).exp().sum()"
    red(check_thousands_of_exact_steps_do_not_underflow, right, trap)


def test_a_likelihood_that_leaves_enough_particles_is_taken_as_it_is():
    log_weights = torch.tensor([0.0, -1, -2, -0.5], dtype=torch.float64)
    weights, beta = epopt.tempered_weights(log_weights, 0.5)
    assert beta == 1.0
    close(weights, log_weights.softmax(0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_particles_whose_simulation_failed_get_nothing_and_all_failing_is_no_news(bad):
    log_weights = torch.tensor([bad, -1e9, -1e9 - 1, bad, -1e9], dtype=torch.float64)
    weights, _ = epopt.tempered_weights(log_weights, 0.2)
    assert (
        weights.isfinite().all() and weights[0] == weights[3] == 0 and weights[1] == weights[4] > weights[2]
    )
    weights, beta = epopt.tempered_weights(torch.full((5,), bad, dtype=torch.float64), 0.2)
    assert beta == 0 and (weights == 0.2).all()
    few = torch.full((50,), bad, dtype=torch.float64)
    assert epopt.tempered_weights(torch.zeros(10, dtype=torch.float64), 1.0)[1] == 1.0  # equal: all is said
    few[7] = -3.0  # a share of those that are known is asked for: one of one is enough
    weights, beta = epopt.tempered_weights(few, 0.2)
    assert weights[7] == 1 and weights.isfinite().all() and beta == 1


def check_resampling(module):
    torch.manual_seed(0)
    low, high = torch.tensor([0.0, 2, 1], dtype=torch.float64), torch.tensor([1.0, 3, 1], dtype=torch.float64)
    particles = torch.cat([low[:2] + torch.rand(4000, 2).double(), torch.ones(4000, 1)], 1)
    weights = (-8 * ((particles[:, :2] - torch.tensor([0.4, 2.6])) ** 2).sum(1) * 5).softmax(0)
    after = module.resample(particles, weights, low, high)
    mean = weights @ particles
    covariance = (weights[:, None] * (particles - mean)).T @ (particles - mean)
    close(after.mean(0), mean, 0.01)
    close(torch.cov(after.T, correction=0), covariance, 2e-3)
    assert (after[:, 2] == 1).all() and len(after[:, 0].unique()) == 4000  # none is a mere copy
    for corner in (low, high):  # all weight in a corner, again and again
        particles = low + (high - low) * torch.rand(300, 3).double()
        for _ in range(30):
            weights = (-100 * ((particles - corner) ** 2).sum(1)).softmax(0)
            particles = module.resample(particles, weights, low, high)
            assert ((particles >= low) & (particles <= high)).all()
        assert (particles - corner).abs().max() < 0.2 and particles[:, 0].std() > 0
    one = torch.zeros(300, dtype=torch.float64)
    one[5] = 1
    lonely = module.resample(particles, one, low, high)
    assert lonely.isfinite().all() and ((lonely >= low) & (lonely <= high)).all()


def test_resampling_keeps_mean_and_covariance_and_the_range():
    check_resampling(epopt)


def test_resampling_goes_red_when_particles_leave_or_are_mere_copies():  # T12
    red(
        check_resampling,
        "return torch.maximum(torch.minimum(x, high), low).to(particles.dtype)",
        "return x.to(particles.dtype)",
        "    x = low + (x - low).abs()  # what would leave is thrown back\n",
        "",
        "    x = high - (high - x).abs()\n",
        "",
    )
    red(check_resampling, "(1 - keep**2) ** 0.5 * torch.randn_like(x)", "0 * torch.randn_like(x)")


def test_a_range_that_was_set_is_the_range_of_adaptation(tmp_path, capsys):
    flags = f"{SMALL} --adapt-to-target --particles 60 --transitions 20 --total-timesteps 3000"
    heavy = (
        "--source-mean 3 0.3 0.6 1 --source-low 2.5 0.1 0.2 1 --source-high 4 0.5 1 1 --target 3.8 0.2 0.8 1"
    )
    epopt.main([*flags.split(), *heavy.split(), "--run-dir", str(tmp_path)])
    (run,) = tmp_path.glob("epopt__*")
    source = torch.load(run / "checkpoint.pt")["modules"]["source"]
    mass = source["particles"][:, 0]
    assert source["rounds"] == 3 and mass.min() >= 2.5 and mass.max() <= 4.0 and mass.mean() > 3.4
    table = capsys.readouterr().out.split("adapted to")[1]  # what was found, beside what was to be found
    assert re.search(rf"cart mass +{mass.mean():.3f} +{mass.std():.3f} +3.800\n", table)


def check_recorded_steps_are_those_of_the_simulator(module):
    """What is recorded the true model explains to the last digit, episodes' ends included."""
    torch.manual_seed(0)
    env = common.make("CartPoleRunEnsemble-v0", 20, seed=0)
    policy = module.TanhPolicy(3, env.single_action_space, 8, 1.0)
    models = env.sample_tasks(20)
    episodes = module.rollout(policy, module.draw_action, env, models, record=True)
    inside = episodes["valid"] > 0
    assert (inside.sum(0) < env.horizon).all()  # they fell
    tasks = models.expand(len(inside), -1, -1)[inside]
    action = policy.to_env(episodes["action"][inside])
    after = env.simulate(tasks, episodes["state"][inside], action)
    assert torch.equal(after, episodes["next_state"][inside])


def test_recorded_steps_are_those_of_the_simulator():
    check_recorded_steps_are_those_of_the_simulator(epopt)


def test_recording_goes_red_when_padding_or_the_wrong_state_is_taken():  # T7
    red(
        check_recorded_steps_are_those_of_the_simulator,
        'steps[-1] |= {"state": state, "next_state": info["state"]}\n            state = info["state"]',
        'state = info["state"]\n            steps[-1] |= {"state": state, "next_state": info["state"]}',
    )
    red(
        check_recorded_steps_are_those_of_the_simulator,
        "valid = valid * ~(terminated | truncated)  # T4: the environment begins anew, but that is no data",
        "valid = valid * ~truncated",
    )


def check_particles_are_judged_by_all_trajectories(module):
    """Pendulums never fall, so every trajectory has as many steps; their starts tell them apart."""
    env, judged = common.make("PendulumEnsemble-v0", 4, seed=0), []
    policy = module.TanhPolicy(3, env.single_action_space, 8, 1.0)
    source = module.Source(env, 50)
    shipped, played = module.log_likelihood, []

    def look(env, particles, steps, noise):
        judged.append(steps["state"])
        return shipped(env, particles, steps, noise)

    def record(*args, **kwargs):
        played.append(module_rollout(*args, **kwargs))
        return played[-1]

    module_rollout, module.rollout, module.log_likelihood = module.rollout, record, look
    try:
        torch.manual_seed(0)
        args = module.Args(particles=50, transitions=100)
        module.adapt(policy, module.draw_action, env, source, env.named_tasks["target"], args)
    finally:
        module.rollout, module.log_likelihood = module_rollout, shipped
    states = played[0]["state"]  # [T, 4, state]
    counts = [(judged[0][:, None] == states[None, :, n]).all(2).any(1).sum().item() for n in range(4)]
    assert sum(counts) == 100 and min(counts) > 10


def test_particles_are_judged_by_all_trajectories():
    check_particles_are_judged_by_all_trajectories(epopt)


def test_judging_goes_red_when_it_takes_every_so_manyth_step():
    right = "torch.randperm(total, device=inside.device)[: args.transitions]"
    stride = "torch.arange(args.transitions, device=inside.device) * total // args.transitions"
    red(check_particles_are_judged_by_all_trajectories, right, stride)


def test_what_is_drawn_for_training_does_not_depend_on_the_particles(tmp_path):
    rows = []
    for count in ("50", "200"):
        flags = f"{SMALL} --total-timesteps 1500 --particles {count} --run-dir {tmp_path / count}"
        epopt.main(flags.split())
        rows.append([row["charts/return"] for row in rows_of(tmp_path / count)])
    assert rows[0] == rows[1]


ADAPTABLE = ["CartPoleRunEnsemble-v0", "CartPoleEnsemble-v0", "PendulumEnsemble-v0", "HopperEnsemble-v0"]


@pytest.mark.parametrize("env_id", ADAPTABLE)
def test_three_rounds_find_the_target_and_never_leave_the_range(env_id):
    if env_id.startswith("Hopper"):
        pytest.importorskip("mujoco")
    torch.manual_seed(0)
    env = common.make(env_id, 10, seed=0)
    args = epopt.Args(particles=200, transitions=40)
    policy = epopt.TanhPolicy(env.single_observation_space.shape[0], env.single_action_space, 8, 1.0)
    source, target = epopt.Source(env, args.particles), env.named_tasks["target"]
    mean, std, low, high = env.ensemble.float()
    first = (source.particles.mean(0) - target)[0].abs()
    for _ in range(3):
        metrics, steps = epopt.adapt(policy, epopt.draw_action, env, source, target, args)
        assert steps > 0 and metrics["adapt/ess"] >= 0.299 and metrics["adapt/beta"] == 1
        assert ((source.particles >= low - 1e-6) & (source.particles <= high + 1e-6)).all()
    after = source.particles
    assert metrics["adapt/misfit"] < 0.5  # some particle predicts within half of model_noise
    off = (after.mean(0) - target)[:-1].abs()
    assert off[0] < 0.45 * first and off[0] < std[0]
    assert (after.std(0)[:-1] < 0.8 * std[:-1]).any() and source.rounds == 3
    drawn = source.sample(env, 500)
    assert (drawn[:, None] == after[None]).all(2).any(1).all()


def test_what_the_ensemble_does_not_vary_misleads_it_but_breaks_nothing():
    """A target whose motor is weaker than any model's: all particles fit badly."""
    torch.manual_seed(0)
    env = common.make("CartPoleRunEnsemble-v0", 10, seed=0)
    policy = epopt.TanhPolicy(3, env.single_action_space, 8, 1.0)
    source, target = epopt.Source(env, 200), env.named_tasks["mean"].clone()
    target[-1] = 0.3
    args = epopt.Args(particles=200, model_noise=1e-6)
    for _ in range(5):
        metrics, _ = epopt.adapt(policy, epopt.draw_action, env, source, target, args)
        assert all(math.isfinite(value) for value in metrics.values())
    _, _, low, high = env.ensemble.float()
    assert ((source.particles >= low - 1e-6) & (source.particles <= high + 1e-6)).all()
    assert source.particles[:, 0].mean() > 1.5  # a weak motor looks like a heavy cart


# ---- evaluation and flags


def test_evaluation_reports_the_tail_of_every_group(tmp_path):
    env = common.make("CartPoleRunEnsemble-v0", 1, seed=0)
    args = epopt.Args(eval_episodes=2)
    models, groups = epopt.held_out_models(env, args)
    assert list(groups) == ["inside", "beyond", "unmodelled", "target"]
    assert groups["inside"].stop == groups["beyond"].start and len(models) == groups["target"].stop
    torch.manual_seed(1)
    policy = epopt.TanhPolicy(3, env.single_action_space, 8, 1.0)
    eval_env = common.make("CartPoleRunEnsemble-v0", 2 * len(models), seed=0)
    report = epopt.evaluate(policy, eval_env, models, groups, epopt.draw_action, args)
    torch.manual_seed(epopt.EVAL_SEED)
    episodes = epopt.rollout(
        policy, epopt.draw_action, eval_env, models.repeat_interleave(2, 0), epopt.EVAL_SEED, True
    )
    returns = epopt.trajectory_returns(episodes).view(-1, 2)
    for group, suffix in (("inside", ""), ("beyond", "_beyond"), ("target", "_target")):
        x = returns[groups[group]].flatten().sort().values
        assert report[f"eval/return{suffix}"] == pytest.approx(x.mean().item())
        assert report[f"eval/return_std{suffix}"] == pytest.approx(x.std(correction=0).item(), rel=1e-4)
        assert report[f"eval/return_cvar10{suffix}"] == pytest.approx(
            x[: math.ceil(len(x) / 10)].mean().item()
        )
        place = 0.1 * (len(x) - 1)
        below, above = x[math.floor(place)], x[math.ceil(place)]
        assert report[f"eval/return_p10{suffix}"] == pytest.approx(
            (below + (place - math.floor(place)) * (above - below)).item(), rel=1e-5
        )
    assert report["eval/return_ep0"] == pytest.approx(report["eval/return"], rel=1e-5)
    heavy = (models[:, 0] - 2.1).abs() < 1e-5
    inside = torch.arange(len(models)) < groups["inside"].stop
    assert report["eval/return_at_2.1"] == pytest.approx(returns[heavy & inside].mean().item())
    assert sum(key.startswith("eval/return_at_") for key in report) == 9


def test_models_that_are_close_are_told_apart():
    env, args = common.make("CartPoleRunEnsemble-v0", 1, seed=0), epopt.Args(eval_episodes=1)
    models, groups = epopt.held_out_models(env, args)
    models = models[groups["inside"]].clone()
    models[:, 0] = 1 + torch.arange(len(models)) % 7 / 1000
    policy = epopt.TanhPolicy(3, env.single_action_space, 8, 1.0)
    env = common.make("CartPoleRunEnsemble-v0", len(models), seed=0)
    groups = {"inside": slice(0, len(models))}
    report = epopt.evaluate(policy, env, models, groups, epopt.draw_action, args)
    found = {key[15:] for key in report if key.startswith("eval/return_at_")}
    assert found == {"1", "1.001", "1.002", "1.003", "1.004", "1.005", "1.006"}


def test_a_target_that_no_particle_is_like_shows_in_the_misfit():
    torch.manual_seed(0)
    env = common.make("CartPoleRunEnsemble-v0", 10, seed=0)
    args = epopt.Args(particles=200, transitions=40)
    policy = epopt.TanhPolicy(env.single_observation_space.shape[0], env.single_action_space, 8, 1.0)
    source, target = epopt.Source(env, args.particles), env.named_tasks["target"].clone()
    target[0] = 5.0  # kg; no model is heavier than 2.1
    metrics, _ = epopt.adapt(policy, epopt.draw_action, env, source, target, args)
    assert 1 < metrics["adapt/misfit"] < 10
    played = {"state": torch.zeros(3, 4), "action": torch.zeros(3, 1), "next_state": torch.ones(3, 4)}
    off = torch.full((2,), -0.5 * 12 * 4.0)  # an error of 2 in each of 3 x 4 numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epopt, "log_likelihood", lambda *args: off.double())
        patch.setattr(epopt, "rollout", lambda *args, **named: {"valid": torch.ones(3), **played})
        source = epopt.Source(env, 2)
        metrics, _ = epopt.adapt(policy, epopt.draw_action, env, source, target, args)
        assert metrics["adapt/misfit"] == pytest.approx(2.0)
        for failed in (math.nan, -math.inf):  # every simulation did
            off[:] = failed
            assert 1e9 < epopt.adapt(policy, None, env, source, target, args)[0]["adapt/misfit"] < math.inf


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--epsilon 0", "--epsilon 0.0: expected more than 0, at most 1"),
        ("--epsilon 1.5", "--epsilon 1.5: expected more than 0, at most 1"),
        ("--num-models 9", "--num-models 9: expected at least 1 / epsilon"),
        ("--ensemble gamma", "--ensemble gamma: expected one of normal uniform single"),
        ("--ensemble uniform --source-std 1 1 1 0", "--source-std .*: expected nothing"),
        ("--ensemble uniform --source-mean 1 0.2 0.8 1", "--source-mean .*: expected nothing"),
        ("--adapt-to-target --particles 10", "--particles 10: expected at least 5 / min_ess"),
        ("--ensemble single --adapt-to-target", "--ensemble single: expected normal or uniform"),
        ("--source-low 1 2", "--source-low .*: expected a number for each of cart mass, pole mass"),
        ("--source-low 3 0.1 0.2 1", "--source-low: cart mass: expected 0 < low <= mean"),
        ("--source-std -1 0 0 0", "--source-std: cart mass: expected 0 < low"),
        ("--target 1 2 3", "--target .*: expected a positive number for each of cart mass"),
        ("--target 1 -2 3 1", "--target .*: expected a positive number for each of cart mass"),
        (
            "--adapt-to-target --target 5 0.2 0.8 1",
            r"--target .*: expected \[0.3, .*where --adapt-to-target looks for it",
        ),
        ("--adapt-to-target --target 0.1 0.2 0.8 1", r"--target .*: expected \[0.3, .*looks for it"),
        ("--adapt-to-target --source-std 0 0 0 0", "--source-std .*: expected a positive number"),
        (
            "--adapt-to-target --source-low 1.2 0.3 0.6 1 --source-high 1.2 0.3 0.6 1",
            "--source-std .*: expected a positive number where low < high",
        ),
        ("--env-id HopperEnsemble-v0 --target 1e-9 2 1e-9 1e-9 1", "--target .*: MuJoCo is not stable with"),
        ("--env-id PointGoal-v0 --ensemble uniform", "--env-id PointGoal-v0: has no ensemble"),
        ("--env-id PointGoal-v0 --adapt-to-target", "--env-id PointGoal-v0: has no ensemble"),
        ("--eval-tasks 1000", "--eval-tasks 1000: expected at most"),
        ("--min-ess 0", "--min-ess 0.0: expected more than 0, at most 1"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, monkeypatch, flags, complaint):
    monkeypatch.setattr(epopt, "rollout", lambda *args: pytest.fail("training began"))
    with pytest.raises(SystemExit, match=f"error: {complaint}"):
        epopt.main([*flags.split(), "--run-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags", ["--target 1.25 0.7 1", "--target 1.25 1.3 1", "--source-low 0.9 0.5 1 --target 0.9 0.5 1"]
)
def test_a_target_on_a_limit_is_within_it(flags):
    """.7 in float32 is below .7 in float64, 1.3 above 1.3."""
    flags = f"--env-id PendulumEnsemble-v0 --adapt-to-target {flags}".split()
    args, _ = epopt.parse_args(epopt.Args, flags)
    env = common.make("PendulumEnsemble-v0", 1, seed=0)
    epopt.set_ensemble(env, args)
    models, groups = epopt.held_out_models(env, args)
    assert models[groups["target"]].unique(dim=0).tolist() == [pytest.approx(args.target, rel=1e-6)]


def test_adapting_an_ensemble_that_cannot_simulate_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(epopt, "rollout", lambda *args: pytest.fail("training began"))
    monkeypatch.delattr("common.ensembles.CartPoleEnsemble.simulate")
    with pytest.raises(SystemExit, match="error: --env-id .*: expected an ensemble with simulate"):
        epopt.main(["--adapt-to-target", "--run-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    env = common.make("CartPoleRunEnsemble-v0", 1, seed=0)
    epopt.set_ensemble(env, epopt.Args())  # nothing else needs it


def test_uniform_limits_need_not_hold_the_mean_of_the_environment():
    env = common.make("CartPoleRunEnsemble-v0", 1, seed=0)  # whose mean is 1.2 kg
    epopt.set_ensemble(env, epopt.Args(ensemble="uniform", source_low=(1.5, 0.1, 0.2, 1.0)))
    masses = env.sample_tasks(500)[:, 0]
    assert 1.5 <= masses.min() < 1.55 and 2.05 < masses.max() <= 2.1


def test_models_that_mujoco_cannot_simulate_are_one_line(tmp_path):
    pytest.importorskip("mujoco")
    flags = "--env-id HopperEnsemble-v0 --source-low 0.01 1.5 0.00001 0.00001 1"
    with pytest.raises(SystemExit, match="error: --source-low.*MuJoCo is not stable with torso mass 0.01"):
        epopt.main([*flags.split(), "--run-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


SMALL = "--hidden-size 8 --num-models 10 --eval-episodes 1 --eval-every 2 --device cpu"


def rows_of(folder):
    (log,) = folder.glob("*/metrics.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_run_with_adaptation_resumes_exactly(tmp_path):
    flags = f"{SMALL} --adapt-to-target --particles 60 --transitions 20 --warmup-iterations 2"
    epopt.main([*flags.split(), "--total-timesteps", "4000", "--run-dir", str(tmp_path / "whole")])
    rows = rows_of(tmp_path / "whole")
    assert sum("adapt/ess" in row for row in rows) == 3
    for cut in (1500, 2500):  # in the middle of a run; then from its checkpoint, as if killed
        folder = tmp_path / str(cut)
        module = mutant(
            "epopt",
            "        while global_step < total:\n",
            "        while global_step < total:\n"
            f"            if global_step > {cut}: raise KeyboardInterrupt\n",
        )
        module.SCRIPT = "epopt"
        save = ["--save-every", "1", "--total-timesteps", "4000", "--run-dir", str(folder)]
        with pytest.raises(KeyboardInterrupt):
            module.main([*flags.split(), *save])
        (run,) = folder.glob("*__*")
        epopt.main(["--resume", str(run)])
        again = rows_of(folder)
        assert [{k: v for k, v in row.items() if "time/" not in k and "SPS" not in k} for row in again] == [
            {k: v for k, v in row.items() if "time/" not in k and "SPS" not in k} for row in rows
        ]


def check_what_is_played_and_what_is_learned_from(module):
    """Once the warm-up is over the worst; once the source distribution is adapted, its particles."""
    kept, played, source = [], [], []

    def select(episodes, chosen, shipped=module.select):
        kept.append(len(chosen))
        return shipped(episodes, chosen)

    def rollout(*args, shipped=module.rollout, **kwargs):
        if len(args[3]) == 10:  # of training: evaluation has more, the target fewer
            known = source[0].particles if source else args[3]
            played.append((bool(source), bool((args[3][:, None] == known).all(-1).any(1).all())))
        return shipped(*args, **kwargs)

    def adapt(*args, shipped=module.adapt):
        source[:] = [args[3]]
        return shipped(*args)

    flags = f"{SMALL} --adapt-to-target --particles 60 --transitions 20 --epsilon 0.3 --warmup-iterations 2"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, spy in (("select", select), ("rollout", rollout), ("adapt", adapt)):
            patch.setattr(module, name, spy)
        module.main([*flags.split(), "--total-timesteps", "5000", "--run-dir", folder])
    assert kept[:2] == [10, 10] and set(kept[2:]) == {3}
    assert all(of_particles for _, of_particles in played) and any(adapted for adapted, _ in played)


def test_the_worst_are_learned_from_and_the_adapted_source_is_played():
    check_what_is_played_and_what_is_learned_from(epopt)


@pytest.mark.parametrize(
    ("edit", "trap"),
    [
        ("args.warmup_iterations else args.epsilon", "args.warmup_iterations else 1.0"),
        ("1.0 if iteration < args.warmup_iterations else args.epsilon", "args.epsilon"),
        ("source.sample(env, args.num_models)", "env.sample_tasks(args.num_models)"),
    ],
)
def test_the_main_loop_goes_red(edit, trap):
    red(check_what_is_played_and_what_is_learned_from, edit, trap)


def test_an_adapted_policy_is_evaluated_on_any_target(tmp_path, capsys):
    flags = f"{SMALL} --adapt-to-target --particles 60 --transitions 20 --total-timesteps 2000"
    epopt.main([*flags.split(), "--run-dir", str(tmp_path)])
    (run,) = tmp_path.glob("epopt__*")
    epopt.main(["--evaluate", str(run), *"--target 0.1 0.2 0.8 1".split()])  # beyond where it was looked for
    assert "target" in capsys.readouterr().out.split("cvar10")[-1]


def test_the_bound_on_the_kl_falls_to_zero(tmp_path):  # D8
    flags = f"{SMALL} --max-kl 0.02 --warmup-iterations 100 --total-timesteps 6000 --run-dir {tmp_path}"
    epopt.main(flags.split())
    rows, before, near = rows_of(tmp_path), 0, 0
    for row in rows:
        bound = 0.02 * (1 - before / 6000)
        assert row["debug/kl"] <= bound + 1e-6
        near += row["debug/kl"] > 0.6 * bound
        before = row["global_step"]
    assert near > len(rows) / 2


def test_any_task_distribution_will_do(tmp_path):
    """Without an ensemble: the worst tasks of a distribution, discrete actions included."""
    for env_id in ("PointGoal-v0", "Bandit5-v0"):
        flags = (
            f"{SMALL} --env-id {env_id} --total-timesteps 3000 --eval-tasks 20 --run-dir {tmp_path / env_id}"
        )
        epopt.main(flags.split())
        assert "eval/return_p10" in rows_of(tmp_path / env_id)[-1]


# ---- learning


@pytest.mark.slow
def test_the_tail_of_the_ensemble_gets_better(tmp_path, full):
    """Short: a few iterations. Full: the README's run, against one model only."""
    short = ["--total-timesteps", "500000", "--eval-every", "100", "--warmup-iterations", "10"]
    tails = {}
    for name, flags in (("epopt", []), ("single", ["--epsilon", "1", "--ensemble", "single"])):
        epopt.main([*flags, *([] if full else short), "--run-dir", str(tmp_path / name), "--device", "cpu"])
        last = rows_of(tmp_path / name)[-1]
        tails[name] = last["eval/return_p10"]
    assert tails["epopt"] > 250 and (not full or tails["epopt"] > 700 and tails["single"] < 150)
