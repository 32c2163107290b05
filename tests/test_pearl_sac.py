"""pearl_sac.py: posterior, replay and context, SAC against its definitions, every trap of the docstring."""

import dataclasses
import json
import math

import gymnasium as gym
import pytest
import torch
from conftest import FuseTask, mutant, script
from sac_checks import (
    BOX,
    JACOBIAN,
    NO_JACOBIANS,
    TWIN_COPIES,
    M,
    N,
    check_log_probability,
    check_twins_differ,
    close,
    coded_replay,
    one_goals_optimum,
)
from torch.distributions import Independent, Normal, kl_divergence

import common
from common.points import PointRobot

pearl = script("pearl_sac")
LATENT = 2


def small_args(module, **changes):
    small = {"train_tasks": 4, "num_tasks": N, "batch_size": M, "latent_size": LATENT, "hidden_size": 8}
    return dataclasses.replace(module.Args(), **{**small, "replay_episodes": 30, **changes})


def red(check, old, new, *more):
    """The check passes as shipped and fails once the trap is put in."""
    check(pearl)
    broken = mutant("pearl_sac", old, new, *more)  # outside: a text that is no longer there is no trap
    with pytest.raises((AssertionError, RuntimeError)):  # autograd objects to some of them, too
        check(broken)


def make_agent(module, args, obs_dim=2, space=BOX, seed=0):
    torch.manual_seed(seed)
    return module.make_agent(obs_dim, space, args)


# ---- the posterior


def check_product_of_gaussians(module):
    """As the product of densities, which is what it is: their logarithms differ by a constant."""
    torch.manual_seed(0)
    mean, var = torch.randn(N, 7, LATENT).double(), torch.rand(N, 7, LATENT).double() + 0.1
    found_mean, found_var = module.product_of_gaussians(mean, var)
    assert found_mean.shape == found_var.shape == (N, LATENT)
    points = torch.linspace(-2, 2, 50).double().view(-1, 1, 1)
    factors = Normal(mean.unsqueeze(1), var.sqrt().unsqueeze(1)).log_prob(points).sum(2)  # [N, 50, LATENT]
    product = Normal(found_mean.unsqueeze(1), found_var.sqrt().unsqueeze(1)).log_prob(points.view(1, -1, 1))
    difference = factors - product
    close(difference, difference[:, :1].expand_as(difference), 1e-9)


def test_the_posterior_is_the_normalised_product_of_its_factors():
    check_product_of_gaussians(pearl)


def test_the_product_goes_red_as_a_mean_of_factors():
    red(check_product_of_gaussians, "total = precision.sum(1)", "total = precision.mean(1)")


def test_the_order_of_context_does_not_matter():
    encoder = pearl.Encoder(6, LATENT, 8, 2).double()
    context, weight = torch.randn(N, 9, 6).double(), (torch.rand(N, 9) < 0.7).double()
    order = torch.randperm(9)
    for one, two in zip(
        pearl.infer(encoder, context, weight),
        pearl.infer(encoder, context[:, order], weight[:, order]),
        strict=True,
    ):
        close(one, two)


def test_factors_of_weight_zero_are_left_out_and_nothing_known_is_the_prior():
    mean, var = torch.randn(N, 6, LATENT).double(), torch.rand(N, 6, LATENT).double()
    weight = torch.ones(N, 6).double()
    weight[:, 4:] = 0
    for one, two in zip(
        pearl.product_of_gaussians(mean, var, weight),
        pearl.product_of_gaussians(mean[:, :4], var[:, :4]),
        strict=True,
    ):
        close(one, two)
    for nothing in (
        pearl.product_of_gaussians(mean, var, 0 * weight),
        pearl.product_of_gaussians(mean[:, :0], var[:, :0]),
    ):
        assert torch.equal(nothing[0], torch.zeros(N, LATENT).double())
        assert torch.equal(nothing[1], torch.ones(N, LATENT).double())


def test_the_posterior_narrows_with_context():
    mean, var = torch.randn(N, 20, LATENT), torch.rand(N, 20, LATENT) + 0.1
    widths = [pearl.product_of_gaussians(mean[:, :count], var[:, :count])[1] for count in (1, 5, 20)]
    assert (widths[0] > widths[1]).all() and (widths[1] > widths[2]).all()


def check_a_factor_without_variance(module):
    var = torch.rand(N, 4, LATENT) + 0.1
    var[:, 2] = 0
    mean = torch.randn(N, 4, LATENT, requires_grad=True)
    found = module.product_of_gaussians(mean, var)
    found[0].sum().backward()
    assert all(torch.isfinite(x).all() for x in (*found, mean.grad)) and (found[1] > 0).all()


def test_a_factor_whose_variance_rounds_to_zero():
    check_a_factor_without_variance(pearl)


def test_it_goes_red_without_the_clamp():  # T3
    red(check_a_factor_without_variance, "1 / var.clamp(min=1e-7)", "1 / var")


def test_the_kl_is_that_of_torch():
    mean, var = torch.randn(N, LATENT).double(), torch.rand(N, LATENT).double() + 0.1
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    close(pearl.kl_to_prior(mean, var), kl_divergence(Normal(mean, var.sqrt()), prior).sum(-1))


def test_samples_of_z_have_the_beliefs_mean_and_variance():
    torch.manual_seed(0)
    mean, var = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.25, 4.0]])
    z = pearl.sample_z(mean.expand(100_000, -1), var.expand(100_000, -1))
    close(z.mean(0), mean[0], 0.02)
    close(z.var(0), var[0], 0.02)


# ---- networks


def test_the_two_critics_begin_apart():
    check_twins_differ(pearl)


def test_twins_go_red_as_copies():  # T2
    red(check_twins_differ, *TWIN_COPIES)


def test_each_critic_is_a_network_of_its_own():
    critic = pearl.TwinCritic(4, 8, 3).double()
    x, action = torch.randn(N, M, 2).double(), torch.randn(N, M, 2).double()
    for k in range(2):
        y = torch.cat([x, action], -1)
        for layer, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            y = y @ weight[k] + bias[k]
            y = y.relu() if layer < 3 else y
        close(critic(x, action)[k], y[..., 0])


def test_the_log_probability_of_a_squashed_action_is_that_of_torch():
    check_log_probability(pearl)


def test_log_probabilities_go_red_without_the_squashing_or_with_a_rounded_jacobian():  # T10
    for trap in NO_JACOBIANS:
        red(check_log_probability, JACOBIAN, trap)


def test_a_deterministic_action_is_the_squashed_mean_and_gradients_reach_the_actor_through_a_sample():
    actor, x = pearl.Actor(4, BOX, 8, 2), torch.randn(M, 4)
    action, _ = pearl.sample_action(actor, x, deterministic=True)
    assert torch.equal(action, actor(x)[0].tanh())
    pearl.sample_action(actor, x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in actor.parameters())


def test_the_policys_deviation_is_kept_between_e_to_the_minus_20_and_e_squared():
    actor = pearl.Actor(4, BOX, 8, 2)
    for bias, bound in ((-100.0, -20.0), (100.0, 2.0)):
        torch.nn.init.constant_(actor.net[-1].bias, bias)
        assert torch.equal(actor(torch.randn(M, 4))[1], torch.full((M, 2), bound))


def test_actions_are_stretched_to_the_environments_box():
    space = gym.spaces.Box(torch.tensor([-0.1, 0.0]).numpy(), torch.tensor([0.1, 4.0]).numpy())
    actor = pearl.Actor(4, space, 8, 2)
    close(
        actor.to_env(torch.tensor([[-1.0, 1.0], [0.0, 0.0]])), torch.tensor([[-0.1, 4.0], [0.0, 2.0]]), 1e-6
    )


# ---- playing


def play(module, env, z=None, **options):
    args = small_args(module)
    agent = make_agent(module, args, env.single_observation_space.shape[0])
    z = torch.randn(env.num_envs, LATENT) if z is None else z
    torch.manual_seed(1)
    return module.rollout(agent, module.sample_action, env, z, **options)


def check_an_episode_is_recorded_as_it_was(module):
    """FuseTask's observations count the steps since an episode began, and its rewards tell the time."""
    env = FuseTask(24, actions=BOX)
    episode = play(module, env)
    horizon = episode["reward"].shape[1]
    assert episode["obs"].shape == (24, horizon + 1, 3)
    ends = env.ends[:horizon].T  # [B, T]
    some_truncated = False
    for b in range(24):
        length = int(ends[b].nonzero()[0]) + 1 if ends[b].any() else horizon
        expected = torch.arange(horizon) < length
        assert torch.equal(episode["valid"][b], expected.float())
        count = torch.arange(length + 1).float()
        assert torch.equal(episode["obs"][b, : length + 1, 1], count)  # the last observation included
        assert torch.equal(episode["reward"][b, :length], 1 + torch.arange(length) + b / 8)
        assert torch.equal(episode["terminated"][b, :length], ends[b, :length].float())
        some_truncated |= not bool(ends[b, :length].any())
    assert some_truncated and 0 < episode["valid"].mean() < 1


def test_an_episode_is_recorded_as_it_was():
    check_an_episode_is_recorded_as_it_was(pearl)


def check_beliefs_are_of_the_steps_before_an_episode_ended(module):
    args = small_args(module, context_stride=2)
    agent = make_agent(module, args, obs_dim=3)
    episodes, beliefs = module.adapt(agent, module.sample_action, FuseTask(24, actions=BOX), 2, 1, args)
    first, (found_mean, found_var) = episodes[0], beliefs[1]
    assert 0 < first["valid"].mean() < 1
    for b in range(24):
        steps = range(0, int(first["valid"][b].sum()), 2)
        told = [
            torch.cat(
                [
                    first["obs"][b, t],
                    first["action"][b, t],
                    first["reward"][b, t, None],
                    first["obs"][b, t + 1],
                ]
            )
            for t in steps
        ]
        mean, var = agent.encoder(torch.stack(told))
        total = (1 / var).sum(0)
        close(found_var[b], 1 / total, 1e-5)
        close(found_mean[b], (mean / var).sum(0) / total, 1e-4)


def test_beliefs_are_of_the_steps_before_an_episode_ended_and_go_red_when_padding_is_evidence():  # T9
    old = 'episode["valid"][:, :: args.context_stride]'
    red(check_beliefs_are_of_the_steps_before_an_episode_ended, old, f"torch.ones_like({old})")


def test_recording_goes_red_with_the_wrong_end_or_the_wrong_next_observation():
    red(
        check_an_episode_is_recorded_as_it_was,
        '"terminated": terminated.float()',
        '"terminated": (terminated | truncated).float()',
    )  # T6
    red(
        check_an_episode_is_recorded_as_it_was,
        'observations.append(info["final_obs"])',
        "observations.append(obs)",
    )  # T7
    red(check_an_episode_is_recorded_as_it_was, "valid = valid * ~(terminated | truncated)", "pass")  # T9


def check_z_is_held(module):
    env, seen = common.make("PointRobot-v0", 5, seed=0), []
    z = torch.randn(5, LATENT)

    def act(actor, x, deterministic):
        seen.append(x[:, 2:].clone())
        return module.sample_action(actor, x, deterministic)

    module.rollout(make_agent(module, small_args(module)), act, env, z)
    assert len(seen) == 20 and all(torch.equal(x, z) for x in seen)


def test_z_is_held_through_an_episode():
    check_z_is_held(pearl)


def test_z_goes_red_when_drawn_at_every_step():  # T8
    red(check_z_is_held, "torch.cat([obs, z], 1)", "torch.cat([obs, torch.randn_like(z)], 1)")


def test_a_dense_reward_trains_and_the_sparse_one_is_what_is_seen():
    env = common.make("SparsePointGoal-v0", 50, seed=0)
    episode = play(pearl, env)
    distance = (episode["obs"][:, 1:] - env._task[:, None]).norm(dim=-1)
    close(episode["train_reward"], -distance, 1e-5)
    sparse = torch.where(distance <= 0.2, 1 - distance, 0.0)
    close(episode["reward"], sparse, 1e-5)


# ---- replay


def check_draws(module):
    """Every stored step of a row equally often, and nothing else."""
    replay, lengths = coded_replay(module)
    rows = torch.tensor([2, 0])
    torch.manual_seed(0)
    batch = replay.take(rows, *replay.draw(rows, 60_000))
    for n, row in enumerate(rows.tolist()):
        assert (batch["obs"][n, :, 0] == row).all()
        number, step = batch["obs"][n, :, 1].long(), batch["obs"][n, :, 2].long()
        assert number.min() == 5 and number.max() == 16  # the last twelve of seventeen
        assert (step < lengths[number, row]).all() and (step >= 0).all()
        stored = int(lengths[5:, row].sum())
        counts = torch.bincount(number * 10 + step)
        counts = counts[counts > 0]
        assert len(counts) == stored
        assert (counts - 60_000 / stored).abs().max() < 6 * (60_000 / stored) ** 0.5


def test_draws_are_uniform_over_what_is_stored_and_padding_is_not():
    check_draws(pearl)


def test_draws_go_red_when_padding_is_data():  # T9
    old = 'self.length[:, slot] = episode["valid"].sum(1).long()'
    red(check_draws, old, "self.length[:, slot] = self.horizon")


def test_a_transition_comes_whole():
    replay, _ = coded_replay(pearl)
    rows = torch.arange(4)
    batch = replay.take(rows, *replay.draw(rows, 50))
    step = batch["obs"][..., 2]
    assert batch["action"].shape == (4, 50, 1) and batch["reward"].shape == (4, 50)
    assert torch.equal(batch["action"][..., 0], step) and torch.equal(batch["train_reward"], 100 * step)
    last = batch["next_obs"][..., 2]
    assert torch.equal(last[last >= 0], (step + 1)[last >= 0])


def test_a_restored_replay_goes_on_as_if_nothing_had_happened():
    for episodes in (0, 5, 17):
        replay, _ = coded_replay(pearl, episodes=episodes)
        again = pearl.ReplayBuffer(4, 12, 6, 3, 1, "cpu")
        again.load_state_dict(replay.state_dict())
        assert again.count == replay.count and torch.equal(again.length, replay.length)
        assert all(torch.equal(again.data[name], ring) for name, ring in replay.data.items())
    with pytest.raises(ValueError, match="obs"):
        pearl.ReplayBuffer(4, 12, 7, 3, 1, "cpu").load_state_dict(replay.state_dict())


# ---- context


def context_args(module, **changes):
    three = {"episodes_per_task": 3, "context_episodes": 3, "context_rounds": 2}
    return small_args(module, **{**three, **changes})


def check_context_is_the_first_episodes_of_a_recent_round(module):
    """Seventeen episodes with rounds of three: only whole rounds count from the end."""
    replay, lengths = coded_replay(module, episodes=15)
    tasks, seen = torch.tensor([3, 1, 0]), set()
    torch.manual_seed(0)
    for _ in range(200):
        context, weight = module.sample_context(replay, tasks, context_args(module))
        assert context.shape[:2] == weight.shape and context.shape[1] % 6 == 0
        known = context.shape[1] // 6
        for n, task in enumerate(tasks.tolist()):
            kept = context[n][weight[n] > 0]
            assert (kept[:, 0] == task).all()  # its own
            numbers = kept[:, 1].unique().long().tolist()
            assert numbers[0] in (9, 12) and numbers == list(range(numbers[0], numbers[0] + known))
            assert len(kept) == lengths[numbers, task].sum()  # whole episodes, and no padding
            seen.add((numbers[0], known))
    assert seen == {(first, known) for first in (9, 12) for known in (1, 2, 3)}


def test_context_is_the_first_episodes_of_a_recent_round():
    check_context_is_the_first_episodes_of_a_recent_round(pearl)


def test_context_goes_red_when_it_is_old_of_another_task_or_padding():
    check = check_context_is_the_first_episodes_of_a_recent_round
    red(
        check,
        "rounds = min(replay.count // per_round, args.context_rounds)",
        "rounds = replay.count // per_round",
    )
    red(check, "replay.take(tasks, slot, step), args", "replay.take(tasks.flip(0), slot, step), args")  # T5
    red(check, "weight = (step < length).float()", "weight = torch.ones_like(slot * 1.0)")  # T9


def test_context_of_prior_episodes_and_of_single_transitions():
    replay, lengths = coded_replay(pearl, episodes=15)
    tasks = torch.tensor([3, 1, 0])
    args = context_args(pearl, context_data="prior")
    for _ in range(20):
        context, weight = pearl.sample_context(replay, tasks, args)
        assert set(context[weight > 0][:, 1].tolist()) <= {9, 12}
    args = context_args(pearl, context="transitions")
    mixed = 0
    for _ in range(50):
        context, weight = pearl.sample_context(replay, tasks, args)
        assert (weight == 1).all() and context.shape[1] in (6, 12, 18)
        number, step = context[..., 1].long(), context[..., 2].long()
        assert number.min() >= 9 and (step < lengths[number, tasks[:, None]]).all()
        mixed = max(mixed, len(number[0].unique()))
    assert mixed == 6
    context, weight = pearl.sample_context(replay, tasks, context_args(pearl, context_stride=4))
    assert set(context[weight > 0][:, 2].tolist()) <= {0, 4}


def test_context_may_hold_the_next_observation():
    replay, _ = coded_replay(pearl, episodes=15)
    for next_obs, width in ((True, 8), (False, 5)):
        args = context_args(pearl, context_next_obs=next_obs)
        assert pearl.sample_context(replay, torch.arange(4), args)[0].shape[2] == width


@pytest.mark.parametrize("stride", [1, 3])
def test_in_training_context_looks_exactly_as_it_does_on_a_new_task(stride):
    """The belief from a round in the ring is the one that the round was played with."""
    env = common.make("PointRobot-v0", 4, seed=0)
    args = context_args(pearl, context_rounds=1, context_stride=stride)
    agent = make_agent(pearl, args)
    episodes, beliefs = pearl.adapt(agent, pearl.sample_action, env, 4, 1, args)
    replay = pearl.ReplayBuffer(4, 30, 20, 2, 2, "cpu")
    for episode in episodes[:3]:
        replay.add(episode)
    seen = set()
    for _ in range(30):
        context, weight = pearl.sample_context(replay, torch.arange(4), args)
        known = round(context.shape[1] / math.ceil(20 / stride))
        for one, two in zip(pearl.infer(agent.encoder, context, weight), beliefs[known], strict=True):
            close(one, two, 1e-5)
        seen.add(known)
    assert seen == {1, 2, 3}


# ---- the update


def make_meta_batch(module, args, seed=0):
    torch.manual_seed(seed)
    batch = {name: torch.randn(N, M, 2).double() for name in ("obs", "next_obs")}
    batch |= {"action": torch.rand(N, M, 2).double() * 2 - 1, "reward": torch.zeros(N, M).double()}
    batch |= {"train_reward": torch.randn(N, M).double(), "terminated": (torch.rand(N, M) < 0.4).double()}
    context = torch.randn(N, 9, 7).double()
    weight = (torch.rand(N, 9) < 0.7).double()
    return batch, context, weight


def by_hand(agent, batch, context, weight, args, noise):
    """All four losses and their gradients from the definitions, with loops. What descends in steps of 1."""

    def layers(net, x):
        for layer in net.net:
            x = layer(x)
        return x

    def action_of(x):
        mean, log_std = layers(agent.actor, x).chunk(2, -1)
        gaussian = Independent(Normal(mean, log_std.clamp(-20, 2).exp()), 1)
        u = mean + log_std.clamp(-20, 2).exp() * noise
        return u.tanh(), gaussian.log_prob(u) - (1 - u.tanh() ** 2).log().sum(-1)

    def q(critic, k, x, action):
        y = torch.cat([x, action], -1)
        for layer, (w, b) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            y = y @ w[k] + b[k]
            y = y.relu() if layer < len(critic.weights) - 1 else y
        return y[..., 0]

    alpha = agent.temperature.log_alpha.exp().item()
    td, kl, told, targets = 0.0, 0.0, [], []
    for n in range(N):
        factors = layers(agent.encoder, context[n][weight[n] > 0])
        mean, var = factors[:, :LATENT], torch.nn.functional.softplus(factors[:, LATENT:])
        total = (1 / var).sum(0)
        mean, var = (mean / var).sum(0) / total, 1 / total
        kl = kl + kl_divergence(Normal(mean, var.sqrt()), Normal(0.0, 1.0)).sum() / N
        z = (mean + var.sqrt() * noise).expand(M, -1)
        told.append(z.detach())
        with torch.no_grad():
            next_x = torch.cat([batch["next_obs"][n], z], -1)
            action, logprob = action_of(next_x)
            value = torch.minimum(*(q(agent.target, k, next_x, action) for k in (0, 1))) - alpha * logprob
            bootstrap = torch.where(batch["terminated"][n] > 0, 0.0, value)
            y = args.reward_scale * batch["train_reward"][n] + args.gamma * bootstrap
            targets.append(y)
        for k in (0, 1):
            x = torch.cat([batch["obs"][n], z], -1)
            td = td + ((q(agent.critic, k, x, batch["action"][n]) - y) ** 2).sum() / (N * M)
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    inferring = [*agent.critic.parameters(), *agent.encoder.parameters()]
    grads = torch.autograd.grad(td + args.kl_coef * kl, inferring)
    with torch.no_grad():
        for p, grad in zip(inferring, grads, strict=True):
            p -= grad
    pi = 0.0
    entropy = []
    for n in range(N):
        x = torch.cat([batch["obs"][n], told[n]], -1)
        action, logprob = action_of(x)
        best = torch.minimum(*(q(agent.critic, k, x, action) for k in (0, 1)))
        pi = pi + (alpha * logprob - best).sum() / (N * M)
        entropy.append(logprob.detach())
    grads = torch.autograd.grad(pi, list(agent.actor.parameters()))
    with torch.no_grad():
        for p, grad in zip(agent.actor.parameters(), grads, strict=True):
            p -= grad
        slope = -alpha * (torch.stack(entropy).mean() - 2)  # of -alpha (log pi + H) in log alpha, H = -2
        agent.temperature.log_alpha -= slope
        for p, name in zip(agent.target.parameters(), agent.critic.state_dict(), strict=True):
            p += args.tau * (agent.critic.state_dict()[name] - before[f"target.{name}"])
    explained = 1 - td.item() / 2 / torch.stack(targets).var(correction=0).item()
    return {"kl": kl.item(), "td": td.item(), "pi": pi.item(), "explained": explained}


def check_gradient_step(module):
    args = small_args(module, kl_coef=0.7, reward_scale=3.0, tau=0.3, gamma=0.8)
    agents = [make_agent(module, args).double() for _ in range(2)]
    batch, context, weight = make_meta_batch(module, args)
    noise = 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: torch.full_like(x, noise))
        optimizer = torch.optim.SGD(agents[0].parameters(), lr=1.0)
        metrics = module.gradient_step(agents[0], optimizer, batch, context, weight, args)
    expected = by_hand(agents[1], batch, context, weight, args, noise)
    for (name, one), two in zip(agents[0].named_parameters(), agents[1].parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-7, atol=1e-9), name
    assert float(metrics["debug/kl"]) == pytest.approx(expected["kl"])
    assert float(metrics["losses/critic"]) == pytest.approx(expected["td"])
    assert float(metrics["losses/actor"]) == pytest.approx(expected["pi"])
    assert float(metrics["debug/explained_variance"]) == pytest.approx(expected["explained"])


def test_a_gradient_step_is_that_of_the_definitions_written_with_loops():
    check_gradient_step(pearl)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kl_to_prior(mean, var).mean()", "kl_to_prior(mean, var).sum()"),  # T1
        ('values = agent.critic(torch.cat([batch["obs"], z], -1)', "values = agent.critic(x"),  # T4
        ("gamma * (1 - terminated) * value", "gamma * value"),  # T6
        ("[:, None].expand(-1, batch", ".flip(0)[:, None].expand(-1, batch"),  # T5
        ("target_critic(next_x, action).amin(0)", "target_critic(next_x, action).amax(0)"),
        ("agent.actor, agent.critic, x, alpha)", "agent.actor, agent.target, x, alpha)"),
        ("1 - (values - y).square().mean()", "1 - values.square().mean()"),
    ],
    ids="kl-summed z-detached never-terminated other-tasks-z larger-critic actor-on-target explained".split(),
)
def test_a_gradient_step_goes_red(old, new):
    red(check_gradient_step, old, new)


def check_who_learns_from_what(module):
    """The actor's loss must not reach encoder or critic, though it reads z and Q."""
    args = small_args(module, kl_coef=0.0)
    agent = make_agent(module, args).double()
    batch, context, weight = make_meta_batch(module, args)
    touched, descend = [], module.descend

    def watch(optimizer, loss, parameters):
        names = {id(p): name.split(".")[0] for name, p in agent.named_parameters()}
        graph = torch.autograd.grad(loss, list(agent.parameters()), retain_graph=True, allow_unused=True)
        pairs = zip(agent.parameters(), graph, strict=True)
        reached = {names[id(p)] for p, grad in pairs if grad is not None and grad.abs().sum() > 0}
        descend(optimizer, loss, parameters)
        moved = {names[id(p)] for p in agent.parameters() if p.grad is not None}
        touched.append((reached, moved))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "descend", watch)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
        module.gradient_step(agent, optimizer, batch, context, weight, args)
    assert touched == [
        ({"encoder", "critic"}, {"encoder", "critic"}),
        ({"actor", "critic"}, {"actor"}),  # it reads the critic, and leaves it as it is
        ({"temperature"}, {"temperature"}),
    ]


def test_who_learns_from_what():
    check_who_learns_from_what(pearl)


def test_who_learns_goes_red_when_the_actor_moves_the_encoder():  # T4
    red(check_who_learns_from_what, "batch[name], z.detach()", "batch[name], z")


def test_a_fixed_temperature_stays():
    args = small_args(pearl, autotune=False, alpha=0.3)
    agent = make_agent(pearl, args).double()
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    pearl.gradient_step(agent, optimizer, *make_meta_batch(pearl, args), args)
    assert agent.temperature().item() == pytest.approx(0.3)


def test_the_temperature_grows_where_entropy_is_below_its_target():
    for logprob, up in ((3.0, True), (1.0, False)):  # entropies -3 and -1, target -2
        temperature = pearl.Temperature(0.5)
        pearl.temperature_loss(temperature(), torch.full((N, M), logprob), -2).backward()
        assert (temperature.log_alpha.grad.item() < 0) == up


def test_the_target_follows_and_does_not_lead():
    args = small_args(pearl)
    agent = make_agent(pearl, args)
    for p, q in zip(agent.critic.parameters(), agent.target.parameters(), strict=True):
        assert torch.equal(p, q) and p is not q
    with torch.no_grad():
        for p in agent.critic.parameters():
            p += 1
    pearl.follow(agent.target, agent.critic, 0.25)
    for p, q in zip(agent.critic.parameters(), agent.target.parameters(), strict=True):
        close(p - q, torch.full_like(p, 0.75), 1e-5)


def check_meta_batches(module):
    """Each has different tasks, every task comes, and a row's context and transitions are of one task."""
    replay, _ = coded_replay(module, episodes=15)
    args, seen = context_args(module, context_next_obs=False), []

    def step_fn(agent, optimizer, batch, context, weight, args):
        tasks = batch["obs"][:, 0, 0]
        assert batch["obs"].shape == (N, M, 3) and (batch["obs"][..., 0] == tasks[:, None]).all()
        assert (context[..., 0] == tasks[:, None])[weight > 0].all()
        seen.append(tasks.tolist())
        return {"debug/count": torch.tensor(float(len(seen)))}

    assert module.update(None, None, step_fn, replay, 40, args) == {"debug/count": 20.5}  # the mean
    assert all(len(set(tasks)) == N for tasks in seen) and set(sum(seen, [])) == {0, 1, 2, 3}


def test_a_meta_batch_has_different_tasks_each_with_its_own_context_and_transitions():
    check_meta_batches(pearl)


def test_a_meta_batch_goes_red_when_some_tasks_never_come():
    red(check_meta_batches, "[: args.num_tasks]", "[: args.num_tasks].clamp(max=1)")


# ---- adaptation and evaluation


def check_beliefs(module):
    env = common.make("PointRobot-v0", 6, seed=0)
    args = small_args(module)
    agent = make_agent(module, args)
    env.reset(seed=0)
    episodes, beliefs = module.adapt(agent, module.sample_action, env, 4, 2, args, seed=3)
    assert len(episodes) == len(beliefs) == 4
    for mean, var in beliefs[:2]:
        assert torch.equal(mean, torch.zeros(6, LATENT)) and torch.equal(var, torch.ones(6, LATENT))
    for number in (2, 3):
        parts = [module.episode_context(episode, args) for episode in episodes[:number]]
        context, weight = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        assert context.shape == (6, 20 * number, 7)
        for one, two in zip(beliefs[number], module.infer(agent.encoder, context, weight), strict=True):
            close(one, two, 1e-6)


def test_a_belief_is_the_prior_and_then_what_all_episodes_so_far_have_shown():
    check_beliefs(pearl)


def test_beliefs_go_red_when_the_first_one_knows():  # T11
    shipped = "mean = torch.zeros(env.num_envs, args.latent_size, device=env.device)"
    red(check_beliefs, shipped, "mean = env._task.clone()")


def quick_evaluate(module, env_id="PointRobot-v0", num_tasks=5, **changes):
    env = common.make(env_id, num_tasks, seed=0)
    args = small_args(module, **changes)
    agent = make_agent(module, args, env.single_observation_space.shape[0], env.single_action_space)
    return module.evaluate(agent, env, num_tasks, module.sample_action, args), env


def check_evaluation_is_on_frozen_held_out_tasks(module):
    set_tasks, seen = common.TaskVectorEnv.set_tasks, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common.TaskVectorEnv, "set_tasks", lambda env, tasks: seen.append(tasks) or set_tasks(env, tasks)
        )
        first, env = quick_evaluate(module)
        torch.rand(7)
        again, _ = quick_evaluate(module)
    held_out = env.sample_tasks(5, split="test")
    assert len(seen) == 2 and all(torch.equal(tasks, held_out) for tasks in seen)
    assert first == again
    assert [first[f"eval/adapt_steps_ep{k}"] for k in range(4)] == [0, 20, 40, 60]
    assert first["eval/posterior_std_ep0"] == 1


def test_evaluation_is_on_frozen_held_out_tasks():
    check_evaluation_is_on_frozen_held_out_tasks(pearl)


def test_evaluation_goes_red_on_training_tasks():  # T11
    red(check_evaluation_is_on_frozen_held_out_tasks, 'split="test"', 'split="train"')


def check_evaluation_has_random_numbers_of_its_own(module):
    env, args = common.make("PointRobot-v0", 5, seed=0), small_args(module)
    agent, reports = make_agent(module, args), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        reports.append(module.evaluate(agent, env, 5, module.sample_action, args))
        after = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(after, torch.rand(3))  # and leaves those of training alone
    assert reports[0] == reports[1]
    episodes, _ = module.adapt(agent, module.sample_action, env, 2, 1, args, seed=3)
    assert not torch.equal(episodes[0]["obs"][:, 0], episodes[1]["obs"][:, 0])  # each starts elsewhere


def test_evaluation_has_random_numbers_of_its_own():
    check_evaluation_has_random_numbers_of_its_own(pearl)


def test_evaluation_goes_red_with_trainings_random_numbers_or_one_start_for_all():
    red(check_evaluation_has_random_numbers_of_its_own, "torch.manual_seed(EVAL_SEED)", "pass")
    red(check_evaluation_has_random_numbers_of_its_own, "else seed + number", "else seed")


def test_evaluation_acts_by_the_mean_unless_told_otherwise():
    one, two = (quick_evaluate(pearl, deterministic_eval=flag)[0] for flag in (True, False))
    assert one["eval/return_ep0"] != two["eval/return_ep0"]
    with pytest.MonkeyPatch.context() as patch:
        stochastic = []
        shipped = pearl.sample_action
        patch.setattr(pearl, "sample_action", lambda *a: stochastic.append(a[2]) or shipped(*a))
        quick_evaluate(pearl)
    assert set(stochastic) == {True}


def check_prior_episodes_of_an_evaluation_are_its_own(module):
    for many in (1, 3):
        report, _ = quick_evaluate(module, eval_prior_episodes=many, prior_episodes=2)
        assert [report[f"eval/posterior_std_ep{k}"] == 1 for k in range(4)] == [k < many for k in range(4)]


def test_the_prior_episodes_of_an_evaluation_are_its_own():
    red(
        check_prior_episodes_of_an_evaluation_are_its_own, "args.eval_prior_episodes)", "args.prior_episodes)"
    )


def check_evaluation_counts_the_sparse_reward(module):
    report, _ = quick_evaluate(module, "SparsePointGoal-v0", num_tasks=50)
    assert all(
        report[f"eval/return_ep{k}"] >= 0 and 0 <= report[f"eval/success_ep{k}"] <= 1 for k in range(4)
    )


def test_evaluation_goes_red_when_it_counts_the_dense_reward():
    shipped = '(episode["reward"] * episode["valid"]).sum(1)'
    red(check_evaluation_counts_the_sparse_reward, shipped, shipped.replace("reward", "train_reward"))


def test_tasks_whose_episodes_end_early_run_too():
    report, _ = quick_evaluate(pearl, "PointGoal-v0", latent_size=3)
    assert all(math.isfinite(value) for value in report.values())


def test_the_number_of_gradient_steps_follows_the_environment_steps(tmp_path):
    """4 tasks x 2 episodes x 20 steps x .1 = 16 gradient steps an iteration."""
    calls, shipped = [], pearl.gradient_step
    flags = "--train-tasks 4 --num-tasks 2 --episodes-per-task 2 --context-episodes 2 --updates-per-step 0.1"
    flags += " --eval-tasks 5 --total-timesteps 320 --hidden-size 4 --device cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pearl, "gradient_step", lambda *a: calls.append(1) or shipped(*a))
        pearl.main([*flags.split(), "--run-dir", str(tmp_path)])
    assert len(calls) == 32


def test_a_round_in_training_has_its_prior_episodes_and_goes_into_the_replay_in_order(tmp_path):
    flags = "--train-tasks 3 --num-tasks 2 --episodes-per-task 4 --prior-episodes 2 --context-episodes 2"
    flags += " --eval-tasks 5 --eval-every 9 --total-timesteps 240 --hidden-size 4 --device cpu"
    played, shipped = [], pearl.adapt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pearl, "adapt", lambda *a: played.append(shipped(*a)) or played[-1])
        pearl.main([*flags.split(), "--updates-per-step", "0.01", "--run-dir", str(tmp_path)])
    episodes, beliefs = played[0]
    assert [bool((var == 1).all()) for _, var in beliefs] == [True, True, False, False]
    (run,) = tmp_path.iterdir()
    stored = pearl.load_checkpoint(run)["modules"]["replay"]
    assert stored["count"] == 4
    for number, episode in enumerate(episodes):
        assert torch.equal(stored["obs"][:, number], episode["obs"])


def test_discrete_actions_are_refused_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="--env-id Bandit5-v0: expected .*continuous actions"):
        pearl.main(["--env-id", "Bandit5-v0", "--run-dir", str(tmp_path)])


class Unbounded(PointRobot):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.single_action_space = gym.spaces.Box(-math.inf, math.inf, (2,), dtype="float32")


def test_actions_without_bounds_are_refused_in_one_line(tmp_path):
    gym.register("Unbounded-v0", vector_entry_point=Unbounded)
    with pytest.raises(SystemExit, match="--env-id Unbounded-v0: expected .*bounds"):
        pearl.main(["--env-id", "Unbounded-v0", "--run-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


# ---- learning


@pytest.mark.slow
def test_with_one_task_it_is_sac_and_solves_it(tmp_path):
    """The best path to the known goal from 1,000 random starts earns what PointRobot's optimum does there."""
    flags = "--env-id OneGoal-v0 --train-tasks 8 --num-tasks 8 --batch-size 32 --hidden-size 64 --kl-coef 1"
    flags += " --latent-size 1 --total-timesteps 12000 --updates-per-step 0.2 --eval-every 100 --device cpu"
    pearl.main([*flags.split(), "--run-dir", str(tmp_path)])
    (log,) = tmp_path.glob("*/metrics.jsonl")
    last = json.loads(log.read_text().splitlines()[-1])
    best = one_goals_optimum()
    for k in range(4):
        assert last[f"eval/return_ep{k}"] > best - 0.7, (last[f"eval/return_ep{k}"], best)


def probe(module, run, after):
    """R^2 on new tasks of a linear map from the belief's mean, after some episodes, to the goal."""
    checkpoint = module.load_checkpoint(run)
    args = module.Args(**checkpoint["args"])
    env = common.make(args.env_id, 1000, seed=0)
    agent = module.make_agent(2, env.single_action_space, args)
    agent.load_state_dict(checkpoint["modules"]["agent"])
    torch.manual_seed(0)
    goals = env.sample_tasks(1000, split="test")
    env.set_tasks(goals)
    _, beliefs = module.adapt(agent, module.sample_action, env, after + 1, 1, args, 0, True)
    x = torch.cat([beliefs[after][0], torch.ones(1000, 1)], 1).double()
    y = goals.double()
    line = torch.linalg.lstsq(x[:500], y[:500]).solution
    return float(1 - ((x[500:] @ line - y[500:]) ** 2).sum() / ((y[500:] - y[500:].mean(0)) ** 2).sum())


@pytest.mark.slow
def test_it_finds_the_goal_of_the_point_robot(tmp_path, full):
    """Short: until it has begun to. Full: the README's run, 70 % of the way from middle to optimum."""
    short = ["--total-timesteps", "48000", "--eval-tasks", "500", "--num-tasks", "32"]
    pearl.main(["--run-dir", str(tmp_path), "--device", "cpu", *([] if full else short)])
    (log,) = tmp_path.glob("*/metrics.jsonl")
    last = json.loads(log.read_text().splitlines()[-1])
    first, third = last["eval/return_ep0"], last["eval/return_ep2"]
    assert third > first + 5 and third > (-8.3 if full else -13)
    assert last["eval/posterior_std_ep3"] < last["eval/posterior_std_ep1"] < 0.3
    assert probe(pearl, log.parent, 3) > (0.9 if full else 0.6)
