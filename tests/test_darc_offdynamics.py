"""darc_offdynamics.py: the correction against known densities, what SAC is given, every trap."""

import dataclasses
import json
import math

import gymnasium as gym
import numpy as np
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
)

import common
from common import pairs

darc = script("darc_offdynamics")
LN2 = math.log(2)


def small_args(module, **changes):
    small = {"num_envs": 4, "batch_size": 20, "hidden_size": 8, "replay_episodes": 12}
    return dataclasses.replace(module.Args(), **{**small, **changes})


def red(check, old, new, *more):
    """The check passes as shipped and fails once the trap is put in."""
    check(darc)
    broken = mutant("darc_offdynamics", old, new, *more)  # outside: a text that is no longer there is no trap
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check(broken)


def make_agent(module, args, obs_dim=2, space=BOX, seed=0):
    torch.manual_seed(seed)
    return module.make_domain_agent(obs_dim, space, args)


# ---- networks of SAC


def test_twins_go_red_as_copies():  # T2
    red(check_twins_differ, *TWIN_COPIES)


def test_log_probabilities_go_red_without_the_squashing_or_with_a_rounded_jacobian():  # T10
    for trap in NO_JACOBIANS:
        red(check_log_probability, JACOBIAN, trap)


# ---- the correction, against known densities


def gaussian_steps(name, n, seed=0, low=-1.0, scale=1.0):
    """n transitions of a domain, and their true log-ratio. Actions ~ U[low, 1]; s, s' times scale."""
    env = common.make("GaussianPair-v0", n, seed=seed).unwrapped
    rows = env.named_tasks
    env.set_tasks(rows[name].repeat(n, 1))
    obs, _ = env.reset(seed=seed)
    action = low + (1 - low) * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed))
    after = env.step(action)[0]
    target, source = (env.log_prob(rows[row], obs, action, after) for row in ("target", "source"))
    return {"obs": scale * obs, "action": action, "next_obs": scale * after}, target - source


def fitted(module, target_low=-1.0, noise=0.0, scale=1.0, steps=1500, domains=("source", "target")):
    """Classifiers trained on the pair; their correction on fresh steps of the source, and the true one."""
    lows = {"source": -1.0, "target": target_low}
    data = [gaussian_steps(name, 20_000, seed, lows[name], scale)[0] for seed, name in enumerate(domains)]
    torch.manual_seed(0)
    classifiers = module.DomainClassifiers(1, 1, 64, 2)
    names = ("obs", "action", "next_obs")
    for part in data:
        classifiers.normalizer.see(classifiers.inputs(*(part[name] for name in names)))
    optimizer = torch.optim.Adam(classifiers.parameters(), lr=3e-3)
    for step in range(steps):
        rows = torch.randint(20_000, (2, 1, 500))
        source, target = ({name: part[name][i] for name in names} for part, i in zip(data, rows, strict=True))
        losses = module.classifier_loss(classifiers, source, target, noise, module.Args().decay)
        module.descend(optimizer, sum(losses), list(classifiers.parameters()))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
    fresh, truth = gaussian_steps("source", 5000, 9, scale=scale)
    found = module.reward_correction(classifiers, *(fresh[name] for name in names))
    return found.double().numpy(), truth.double().numpy(), losses


def slope_and_correlation(found, truth):
    inside = np.abs(truth) < 6  # the quadratic's tail holds one step in a thousand
    return np.polyfit(truth[inside], found[inside], 1)[0], np.corrcoef(truth[inside], found[inside])[0, 1]


def check_the_correction_is_the_log_ratio(module):
    slope, correlation = slope_and_correlation(*fitted(module)[:2])
    assert abs(slope - 1) < 0.1 and correlation > 0.95, (slope, correlation)


def test_the_correction_is_the_true_log_ratio():
    check_the_correction_is_the_log_ratio(darc)


def test_the_correction_goes_red_with_a_double_softmax():  # T1
    red(
        check_the_correction_is_the_log_ratio,
        "return sas.log_softmax(-1), sa.log_softmax(-1)",
        "return sas.softmax(-1).log_softmax(-1), sa.softmax(-1).log_softmax(-1)",
    )


def check_noise_is_for_training(module):
    classifiers = module.DomainClassifiers(1, 1, 16, 2)
    part, _ = gaussian_steps("source", 100)
    found = [module.reward_correction(classifiers, *part.values()) for _ in range(2)]
    assert torch.equal(*found)
    losses = [module.classifier_loss(classifiers, part, part, noise, 0.0) for noise in (0.0, 0.0, 0.3, 0.3)]
    assert losses[0] == losses[1] and losses[2] != losses[3]


def test_there_is_no_noise_in_the_correction():  # T3
    check_noise_is_for_training(darc)
    trap = "return log_ratio(*classifiers(obs, action, next_obs, 0.3))"
    red(check_noise_is_for_training, "return log_ratio(*classifiers(obs, action, next_obs))", trap)


def check_small_numbers_are_not_drowned(module):
    slope, correlation = slope_and_correlation(*fitted(module, noise=0.1, scale=0.02, steps=800)[:2])
    assert slope > 0.8 and correlation > 0.9, (slope, correlation)


def test_small_numbers_are_not_drowned_in_noise():  # T4
    shipped = "x = self.normalizer(self.inputs(obs, action, next_obs))"
    red(check_small_numbers_are_not_drowned, shipped, "x = self.inputs(obs, action, next_obs)")


def check_where_a_domain_was_visited_does_not_count(module):
    """The target's actions are others, the dynamics decide alone."""
    slope, correlation = slope_and_correlation(*fitted(module, target_low=0.0)[:2])
    assert abs(slope - 1) < 0.2 and correlation > 0.93, (slope, correlation)


def test_where_a_domain_was_visited_does_not_count():  # T5
    shipped = "return log_sas[..., 1] - log_sas[..., 0] - log_sa[..., 1] + log_sa[..., 0]"
    red(check_where_a_domain_was_visited_does_not_count, shipped, "return log_sas[..., 1] - log_sas[..., 0]")


def check_what_s_prime_tells_trains_the_correction_alone(module):
    torch.manual_seed(0)
    classifiers = module.DomainClassifiers(1, 1, 8, 2)
    parts = [gaussian_steps(name, 64)[0] for name in ("source", "target")]
    parts = [{name: value[None] for name, value in part.items()} for part in parts]
    for decay in (0.0, 0.5):
        sas, sa = module.classifier_loss(classifiers, *parts, 0.0, decay)
        for loss, own, other in (
            (sas, classifiers.sas, classifiers.sa),
            (sa, classifiers.sa, classifiers.sas),
        ):
            wanted = [*own.parameters(), *other.parameters()]
            grads = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
            count = len(list(own.parameters()))
            assert all(grad is not None for grad in grads[:count])
            assert all(grad is None for grad in grads[count:])


def test_what_s_prime_tells_trains_the_correction_alone():
    check = check_what_s_prime_tells_trains_the_correction_alone
    red(check, "sas = sa.detach() + self.sas(x)", "sas = sa + self.sas(x)")
    red(check, "log_ratio(log_sas, log_sa.detach())", "log_ratio(log_sas, log_sa)")


def test_identical_domains_give_no_correction():
    found, _, losses = fitted(darc, domains=("source", "source"))
    assert abs(found.mean()) < 0.05 and found.std() < 0.2
    assert all(abs(loss.item() - LN2) < 0.05 for loss in losses)


# ---- the theory on tables: what the corrected reward makes of it


def table_correction(module, source, target, samples=40_000, steps=1500):
    """delta r [S, A, S] learned from uniform visits. source, target: transition probabilities [S, A, S]."""
    states, actions = source.shape[:2]
    generator = torch.Generator().manual_seed(0)
    parts = []
    for table in (source, target):
        s = torch.randint(states, (samples,), generator=generator)
        a = torch.randint(actions, (samples,), generator=generator)
        after = table[s, a].multinomial(1, generator=generator)[:, 0]
        one_hot = torch.nn.functional.one_hot
        names = {"obs": one_hot(s, states), "action": one_hot(a, actions), "next_obs": one_hot(after, states)}
        parts.append({name: value.float() for name, value in names.items()})
    torch.manual_seed(0)
    classifiers = module.DomainClassifiers(states, actions, 64, 2)
    for part in parts:
        classifiers.normalizer.see(classifiers.inputs(*part.values()))
    optimizer = torch.optim.Adam(classifiers.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(samples, (2, 1, 256))
        batch = [{name: x[i] for name, x in part.items()} for part, i in zip(parts, rows, strict=True)]
        losses = module.classifier_loss(classifiers, *batch, 0.0, module.Args().decay)
        module.descend(optimizer, sum(losses), list(classifiers.parameters()))
    eye = torch.eye
    grid = torch.meshgrid(torch.arange(states), torch.arange(actions), torch.arange(states), indexing="ij")
    s, a, after = (eye(size)[index] for size, index in zip((states, actions, states), grid, strict=True))
    return module.reward_correction(classifiers, s, a, after)


def best_actions(table, reward, gamma=0.9, sweeps=200):
    """Value iteration. table: [S, A, S], reward: [S, A, S]. Returns the best action of each state, [S]."""
    value = torch.zeros(len(table))
    for _ in range(sweeps):
        q = (table * (reward + gamma * value)).sum(-1)
        value = q.amax(1)
    return q.argmax(1)


def test_on_a_deterministic_table_the_corrected_optimum_is_the_targets_where_the_source_covers_it():
    """Two ways from 0 to the goal 5: the short one, 0-1-5, is blocked in the target between 1 and 5."""
    moves = {0: (1, 2), 1: (5, 0), 2: (3, 0), 3: (4, 2), 4: (5, 3), 5: (5, 5)}
    source = torch.zeros(6, 2, 6)
    for s, after in moves.items():
        source[s, 0, after[0]] = source[s, 1, after[1]] = 1
    target = source.clone()
    target[1, 0] = torch.eye(6)[1]  # it stays where it is
    reward = -torch.ones(6, 2, 6)
    reward[5] = 0
    corrected = best_actions(source, reward + table_correction(darc, source, target))
    in_source, in_target = best_actions(source, reward), best_actions(target, reward)
    assert in_source[0] == 0 and in_target[0] == 1  # they differ at the fork
    reachable = [0, 2, 3, 4]
    assert torch.equal(corrected[reachable], in_target[reachable])


def test_where_outcomes_are_drawn_a_risk_that_the_target_rewards_is_left_alone():  # T12
    """A gamble that wins with .5 in the source and .9 in the target, or .6 for sure. The target's best is to
    gamble; the corrected reward of the gamble is .5 (1 + ln 1.8) + .5 ln .2 = -.01.
    """
    source, target = torch.zeros(2, 3, 2, 3)  # states: begin, lost, won
    for table, chance in ((source, 0.5), (target, 0.9)):
        table[0, 0] = torch.tensor([0, 1 - chance, chance])
        table[0, 1] = torch.tensor([0.0, 0, 1])
        table[1, :, 1] = table[2, :, 2] = 1
    delta = table_correction(darc, source, target)
    truth = torch.tensor([math.log(0.1 / 0.5), math.log(0.9 / 0.5)])
    close(delta[0, 0, 1:], truth, 0.15)
    assert delta[0, 1, 2].abs() < 0.1
    reward = torch.tensor([[0.0, 0, 1], [0, 0, 0.6]])  # of both actions at the beginning
    worth = {"target": (target[0] * reward).sum(-1), "corrected": (source[0] * (reward + delta[0])).sum(-1)}
    assert worth["target"][0] > worth["target"][1] and worth["corrected"][0] < worth["corrected"][1]
    assert worth["corrected"][0].item() == pytest.approx(-0.01, abs=0.1)


# ---- playing


def check_an_episode_is_recorded_as_it_was(module):
    """FuseTask's observations count the steps since an episode began, and its rewards tell the time."""
    env = FuseTask(24, actions=BOX)
    env.reset(seed=0)
    agent = make_agent(module, small_args(module), obs_dim=3)
    episode = module.rollout(agent, module.sample_action, env)
    horizon = episode["reward"].shape[1]
    ends = env.ends[:horizon].T  # [B, T]
    some_truncated, lengths = False, []
    for b in range(24):
        length = int(ends[b].nonzero()[0]) + 1 if ends[b].any() else horizon
        lengths.append(length)
        assert torch.equal(episode["valid"][b], (torch.arange(horizon) < length).float())
        assert torch.equal(episode["obs"][b, : length + 1, 1], torch.arange(length + 1).float())
        assert torch.equal(episode["reward"][b, :length], 1 + torch.arange(length) + b / 8)
        assert torch.equal(episode["terminated"][b, :length], ends[b, :length].float())
        some_truncated |= not bool(ends[b, :length].any())
    assert some_truncated and 0 < episode["valid"].mean() < 1
    obs, action, after = module.transitions_of(episode)  # the last of each episode included
    assert len(obs) == len(action) == len(after) == sum(lengths)
    assert torch.equal(after[:, 1], obs[:, 1] + 1) and torch.equal(after[:, 2], obs[:, 2])


def test_recording_goes_red_with_the_wrong_end_or_the_wrong_next_observation():
    check = check_an_episode_is_recorded_as_it_was
    old = '"terminated": terminated.float()'
    red(check, old, '"terminated": (terminated | truncated).float()')  # T6
    red(check, 'observations.append(info["final_obs"])', "observations.append(obs)")  # T7
    red(check, "valid = valid * ~(terminated | truncated)", "pass")  # T9
    red(check, 'inside = episode["valid"] > 0', 'inside = episode["valid"] > -1')  # T9


def test_the_classifiers_are_shown_terminal_transitions_with_their_true_ends():
    """Both buffers give the last transition of an episode as often as any other."""
    replay, lengths = coded_replay(darc)
    args = small_args(darc, num_envs=4, batch_size=4000)
    batch = darc.draw_domain(replay, args)
    assert torch.equal(batch["next_obs"][..., 2], batch["obs"][..., 2] + 1)  # never padding
    row, episode, step = batch["obs"].flatten(0, 1).long().unbind(1)
    last = (step + 1 == lengths[episode, row]).float().mean()
    held = lengths[-12:].float()
    assert abs(last - 12 / held.mean(1).sum()) < 0.05 and last > 0


def collected(module, args, iterations=40):
    envs = module.make_domains(args, args.num_envs, torch.device("cpu"), (1, 2))
    agent = make_agent(module, args)
    replays = {
        name: module.ReplayBuffer(args.num_envs, args.replay_episodes, env.horizon, 2, 2, "cpu")
        for name, env in envs.items()
    }
    counts = [
        module.collect_domains(agent, module.sample_action, envs, replays, args) for _ in range(iterations)
    ]
    return agent, replays, np.array(counts)


def check_the_target_gets_its_share_of_steps(module):
    """Episodes of the source end early (PointWall's do), and shares are of steps."""
    for ratio in (0.1, 2.0):
        args = small_args(module, target_ratio=ratio)
        agent, replays, counts = collected(module, args)
        source, target = agent.steps.tolist()
        assert counts[:, 0].sum() == source + target and counts[:, 1].sum() == source
        assert ratio <= target / source < ratio + 2 * 4 * 50 / source
        assert replays["source"].count == 40 and 0 < replays["target"].count != 40
        assert agent.classifiers.normalizer.count == agent.normalizer.count == source + target


def test_the_target_gets_its_share_of_steps():
    shipped = "played_target + target_steps < args.target_ratio * played:"
    red(check_the_target_gets_its_share_of_steps, shipped, "target_steps == 0:")
    counter = "agent.steps[domain] += len(transitions[0])"
    red(check_the_target_gets_its_share_of_steps, counter, "agent.steps[domain] += 1 if domain else 40")


def test_the_lower_and_the_upper_bound_play_in_one_domain_only():
    agent, replays, counts = collected(darc, small_args(darc, method="source"), 4)
    assert agent.steps[1] == 0 and replays["target"].count == 0 and (counts[:, 0] == counts[:, 1]).all()
    agent, replays, counts = collected(darc, small_args(darc, method="target"), 4)
    assert agent.steps[0] == 0 and replays["source"].count == 0 and (counts[:, 0] == counts[:, 1]).all()


# ---- what SAC is given


def make_batch(seed=0):
    torch.manual_seed(seed)
    batch = {name: torch.randn(N, M, 2) for name in ("obs", "next_obs")}
    batch |= {"action": torch.rand(N, M, 2) * 2 - 1, "reward": torch.randn(N, M)}
    return {**batch, "terminated": (torch.rand(N, M) < 0.4).float()}


def test_adapting_corrects_the_reward_or_weighs_or_does_neither():
    source, target = make_batch(0), make_batch(1)
    agent = make_agent(darc, small_args(darc))
    names = ("obs", "action", "next_obs")
    delta = darc.reward_correction(agent.classifiers, *(source[name] for name in names))
    assert delta.abs().min() > 0 and not delta.requires_grad
    found = {}
    for method in ("darc", "importance_weighting", "source", "target"):
        for correcting in (True, False):
            args = small_args(darc, method=method)
            found[method, correcting] = darc.adapt(agent.classifiers, source, target, correcting, args)
    for (method, correcting), batch in found.items():
        own = target if method == "target" else source
        assert all(torch.equal(batch[name], own[name]) for name in (*names, "terminated"))
        corrected = method == "darc" and correcting
        assert torch.equal(batch["reward"], own["reward"] + delta if corrected else own["reward"])
        known = method in darc.CLASSIFYING and correcting
        assert torch.equal(batch["correction"], delta if known else torch.zeros(N, M))
        weighed = method == "importance_weighting" and correcting
        close(batch["weight"], delta.exp().clamp(max=darc.MAX_WEIGHT) if weighed else torch.ones(N, M), 1e-6)


def check_no_weight_is_above_ten(module):
    agent = make_agent(module, small_args(module))
    torch.nn.init.constant_(agent.classifiers.sas[-1].bias, 0)
    with torch.no_grad():
        agent.classifiers.sas[-1].bias[1] = 20  # surely of the target
    args = small_args(module, method="importance_weighting")
    batch = module.adapt(agent.classifiers, make_batch(0), make_batch(1), True, args)
    assert batch["correction"].min() > 3 and (batch["weight"] == 10).all()


def test_no_weight_is_above_ten():  # D6
    red(check_no_weight_is_above_ten, "delta.exp().clamp(max=MAX_WEIGHT)", "delta.exp()")


def test_the_targets_transitions_may_enter_sac_as_they_are():
    source, target = make_batch(0), make_batch(1)
    agent = make_agent(darc, small_args(darc))
    args = small_args(darc, target_in_sac=True)
    batch = darc.adapt(agent.classifiers, source, target, True, args)
    assert batch["obs"].shape == (2 * N, M, 2)
    assert torch.equal(batch["reward"][N:], target["reward"]) and (batch["correction"][N:] == 0).all()
    assert not torch.equal(batch["reward"][:N], source["reward"])


@pytest.mark.parametrize(
    "changes", [{}, {"target_in_sac": True}, {"method": "importance_weighting"}], ids=str
)
def test_the_correction_that_is_logged_is_that_of_the_sources_steps(changes):
    source, target = make_batch(0), make_batch(1)
    args = small_args(darc, **changes)
    agent = make_agent(darc, args)
    still = torch.optim.SGD(agent.parameters(), lr=0.0)
    metrics = darc.darc_step(agent, still, source, target, True, args)
    names = ("obs", "action", "next_obs")
    delta = darc.reward_correction(agent.classifiers, *(source[name] for name in names))
    close(metrics["debug/correction"], delta.mean(), 1e-6)


def stepped(module, correcting=True, seed=0, **changes):
    """One darc_step: what the critics were to predict, what has changed, and the batch of the source."""
    args = small_args(module, **changes)
    agent = make_agent(module, args)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    source, target = make_batch(seed), make_batch(seed + 1)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    told, shipped = {}, module.critic_target

    def spy(actor, critic, next_x, reward, *rest):
        told["reward"] = reward
        names = ("obs", "action", "next_obs")
        told["delta"] = module.reward_correction(agent.classifiers, *(source[name] for name in names))
        return shipped(actor, critic, next_x, reward, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "critic_target", spy)
        told["metrics"] = module.darc_step(agent, optimizer, source, target, correcting, args)
    told["changed"] = {name for name, value in agent.state_dict().items() if not value.equal(before[name])}
    return told, source


def check_the_correction_is_scaled_with_the_reward(module):
    told, source = stepped(module, reward_scale=0.1)
    close(told["reward"], 0.1 * (source["reward"] + told["delta"]), 1e-6)


def test_the_correction_is_added_before_the_reward_scale():  # T8
    shipped = 'reward, terminated = args.reward_scale * batch["reward"], batch["terminated"]'
    late = 'args.reward_scale * (batch["reward"] - batch["correction"]) + batch["correction"]'
    check = check_the_correction_is_scaled_with_the_reward
    red(check, shipped, f'reward, terminated = {late}, batch["terminated"]')


def check_classifiers_learn_during_the_warm_up(module):
    told, source = stepped(module, correcting=False)
    assert torch.equal(told["reward"], source["reward"])
    assert any(name.startswith("classifiers.sas") for name in told["changed"])
    assert any(name.startswith("classifiers.sa.") for name in told["changed"])


def test_classifiers_learn_during_the_warm_up():  # T11
    shipped = "if source is not None and target is not None:"
    red(check_classifiers_learn_during_the_warm_up, shipped, f"{shipped[:-1]} and correcting:")


def test_batches_are_of_the_domains_that_a_method_needs():
    seen, args = [], small_args(darc)
    replay = coded_replay(darc)[0]

    def step_fn(agent, optimizer, source, target, correcting, args):
        seen.append((correcting, source is not None, target is not None))
        return {"debug/count": torch.tensor(float(len(seen)))}

    replays = {"source": replay, "target": replay}
    for correcting in (False, True):
        found = darc.update(None, None, step_fn, replays, 3, correcting, args)
    assert found == {"debug/count": 5.0} and seen == [(False, True, True)] * 3 + [(True, True, True)] * 3
    for method, given in (("source", (True, False)), ("target", (False, True))):
        seen.clear()
        darc.update(None, None, step_fn, replays, 1, True, small_args(darc, method=method))
        assert seen[0][1:] == given


def check_the_warm_up_is_of_trained_classifiers(module, folder):
    """One bout is longer than the warm-up: the classifiers learn from it before they are believed."""
    flags = "--env-id GaussianPair-v0 --num-envs 8 --batch-size 8 --hidden-size 8 --warmup-steps 100"
    flags += " --total-timesteps 700 --updates-per-step 0.02 --target-ratio 0.5 --eval-tasks 8 --device cpu"
    seen, shipped = [], module.darc_step

    def spy(*args):
        seen.append(args[4])
        return shipped(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "darc_step", spy)
        module.main([*flags.split(), "--run-dir", str(folder)])
    assert seen == [False] * 3 + [True] * (len(seen) - 3) and len(seen) > 3  # 160 steps x .02 a bout


def test_the_correction_begins_when_the_classifiers_have_trained_through_the_warm_up(tmp_path):  # T11
    check_the_warm_up_is_of_trained_classifiers(darc, tmp_path / "shipped")
    trapped = mutant(
        "darc_offdynamics",
        "correcting = int(agent.steps[0]) >= args.warmup_steps",
        "correcting = int(agent.steps[0]) + 160 >= args.warmup_steps",
    )
    with pytest.raises(AssertionError):
        check_the_warm_up_is_of_trained_classifiers(trapped, tmp_path / "trapped")


def test_which_parameters_a_method_trains():
    for method in ("darc", "importance_weighting"):
        told, _ = stepped(darc, method=method)
        parts = {name.split(".")[0] for name in told["changed"]}
        assert parts == {"actor", "critic", "target", "temperature", "classifiers"}
    assert {"losses/classifier_sas", "losses/classifier_sa"} <= told["metrics"].keys()


def check_weights_weigh_squared_errors(module):
    args = small_args(module, method="importance_weighting", input_noise=0.0)
    agent, source, target = make_agent(module, args), make_batch(0), make_batch(1)
    delta = module.reward_correction(
        agent.classifiers, *(source[name] for name in ("obs", "action", "next_obs"))
    )
    x, next_x, alpha = (
        source["obs"],
        source["next_obs"],
        agent.temperature().detach(),
    )  # nothing normalised yet
    x, next_x, settings = x.clamp(-5, 5), next_x.clamp(-5, 5), (source["reward"], source["terminated"])
    torch.manual_seed(3)
    y = module.critic_target(agent.actor, agent.target, next_x, *settings, alpha, args.gamma)
    errors = (agent.critic(x, source["action"]) - y) ** 2
    expected = (delta.exp().clamp(max=module.MAX_WEIGHT) * errors).mean((1, 2)).sum().item()
    torch.manual_seed(3)
    still = torch.optim.SGD(agent.parameters(), lr=0.0)
    metrics = module.darc_step(agent, still, source, target, True, args)
    assert metrics["losses/critic"].item() == pytest.approx(expected, rel=1e-5)
    explained = 1 - (errors.mean() / y.var(correction=0)).item()  # unweighed
    assert metrics["debug/explained_variance"].item() == pytest.approx(explained, rel=1e-4)


def test_weights_weigh_squared_errors():
    shipped = 'root_weight = batch["weight"].sqrt()'
    red(check_weights_weigh_squared_errors, shipped, 'root_weight = batch["weight"]')
    red(check_weights_weigh_squared_errors, "1 - (values - y).square().mean()", "1 - td_loss / 2")


# ---- evaluation


def quick_evaluate(module, seed=0, **changes):
    args = small_args(module, eval_episodes=3, **changes)
    envs = module.make_domains(args, 30, torch.device("cpu"), (0, 0))
    agent = make_agent(module, args, seed=seed)
    agent.steps += 1  # both domains were played
    return module.evaluate(agent, envs, module.sample_action, args), envs


def test_evaluation_is_in_both_domains_and_leaves_the_random_numbers_of_training_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    reports = []
    for seed in (1, 2):
        agent = make_agent(darc, small_args(darc), seed=5)
        agent.steps += 1
        envs = darc.make_domains(small_args(darc), 30, torch.device("cpu"), (0, 0))
        torch.manual_seed(seed)
        reports.append(darc.evaluate(agent, envs, darc.sample_action, small_args(darc)))
        torch.manual_seed(0)
        assert torch.equal(expected, torch.rand(3))
    assert reports[0] == reports[1]
    keys = {f"eval/{what}_{name}" for what in ("return", "success") for name in ("source", "target")}
    keys |= {f"eval/correction_{what}" for what in ("mean", "q5", "q50", "q95")}
    assert keys <= reports[0].keys()
    quantiles = [reports[0][f"eval/correction_q{percent}"] for percent in (5, 50, 95)]
    assert quantiles == sorted(quantiles) and quantiles[0] < quantiles[-1]


def test_a_method_without_classifiers_reports_no_correction():
    for method in ("source", "target"):
        report, _ = quick_evaluate(darc, method=method)
        assert not [key for key in report if "correction" in key] and "eval/return_ep0" in report


def test_classifiers_that_met_one_domain_only_are_not_reported():
    """--evaluate RUN --method darc, where RUN was trained in the source."""
    for played in ([1, 0], [0, 1]):
        args = small_args(darc)
        envs, agent = darc.make_domains(args, 30, torch.device("cpu"), (0, 0)), make_agent(darc, args)
        agent.steps += torch.tensor(played)
        report = darc.evaluate(agent, envs, darc.sample_action, args)
        assert not [key for key in report if "correction" in key]


def test_what_is_counted_by_episode_is_the_targets():
    report, _ = quick_evaluate(darc)
    mean = sum(report[f"eval/return_ep{k}"] for k in range(3)) / 3
    assert mean == pytest.approx(report["eval/return_target"], rel=1e-5) and "eval/success_ep0" in report
    assert report["eval/return_source"] != report["eval/return_target"]


def check_domains_are_what_they_are_called(module):
    envs = module.make_domains(small_args(module), 3, torch.device("cpu"), (0, 1))
    for name, env in envs.items():
        env.reset(seed=0)
        assert (env.state_dict()["_task"] == env.named_tasks[name]).all()


def test_domains_are_what_they_are_called():
    trap, shipped = (
        '"target": target.sample_tasks(num_envs)}',
        '"target": target.sample_tasks(num_envs, split="test")}',
    )
    unchecked = "if not args.target_env_id:", "if False:"
    red(check_domains_are_what_they_are_called, shipped, trap, *unchecked)


@pytest.mark.parametrize(("hook", "name"), [("_draw_tasks", "source"), ("_draw_test_tasks", "target")])
def test_a_pair_whose_names_are_not_what_is_played_is_refused(hook, name, monkeypatch):
    draw = {  # each gives what the other should
        "_draw_tasks": lambda self, n, generator, name="": self.named_tasks["target"].expand(n, -1).clone(),
        "_draw_test_tasks": lambda self, generator: (
            self.named_tasks["source"].expand(self.num_test_tasks, -1).clone()
        ),
    }
    monkeypatch.setattr(pairs.Pair, hook, draw[hook])
    with pytest.raises(SystemExit, match=f"a pair whose .* gives the task named {name}"):
        darc.make_domains(small_args(darc), 3, torch.device("cpu"), (0, 1))


def check_success_of_any_step_counts(module):
    env = FuseTask(6, horizon=20, actions=BOX)  # success at every seventh step
    env.ends[:] = False
    env.reset(seed=0)
    args = small_args(module)
    agent = make_agent(module, args, obs_dim=3)
    report = module.evaluate(agent, {"source": env, "target": env}, module.sample_action, args)
    assert report["eval/success_target"] == report["eval/success_ep0"] == 1


def test_success_of_any_step_counts():
    shipped = '(episode["success"] * episode["valid"]).amax(1)'
    red(check_success_of_any_step_counts, shipped, '(episode["success"] * episode["valid"])[:, -1]')


# ---- bad input, and a pair of one's own


class Thirsty(FuseTask):
    """FuseTask with another observation."""

    def __init__(self, **kwargs):
        super().__init__(actions=BOX, **kwargs)
        self.single_observation_space = gym.spaces.Box(-1, 1, (4,))


def thirsty(**kwargs):
    return Thirsty(**kwargs)


thirsty.is_task_distribution = True
gym.register("Thirsty-v0", vector_entry_point=thirsty)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--target-ratio 0", "--target-ratio 0.0: expected more than 0: --method darc compares"),
        ("--method importance_weighting --target-ratio 0", "--target-ratio 0.0: expected more than 0"),
        ("--method magic", "--method magic: expected one of darc importance_weighting source target"),
        ("--method source --target-in-sac", "--target-in-sac True: expected --method darc"),
        ("--batch-size 250", "--batch-size 250: expected a multiple of 16"),
        ("--env-id PointGoal-v0", "--env-id PointGoal-v0: expected a pair of domains"),
        (
            "--env-id PointRobot-v0 --target-env-id Thirsty-v0",
            "--target-env-id Thirsty-v0: expected the source's single observation space",
        ),
        (
            "--env-id PointWall-v0 --target-env-id PointGoal-v0",
            "--target-env-id PointGoal-v0: expected the source's single observation space",
        ),
        (
            "--env-id CueTask-v0 --target-env-id CueTask-v0",
            "--env-id CueTask-v0: expected a task distribution with continuous actions",
        ),
        ("--num-envs 128", "--num-envs 128: expected at most 100"),
        ("--eval-tasks 101", "--eval-tasks 101: expected at most 100"),
        (
            "--env-id PointWall-v0 --target-env-id Nope-v0",
            "--target-env-id Nope-v0: unknown task distribution",
        ),
        ("--correction-scale nan", "--correction-scale nan: expected zero or a positive number"),
        ("--decay -1", "--decay -1.0: expected zero or a positive number"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, flags, complaint):
    with pytest.raises(SystemExit, match=f"error: {complaint}"):
        darc.main([*flags.split(), "--run-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_any_two_task_distributions_alike_may_be_a_pair(tmp_path):
    """PointRobot's training goals as the source, its held-out ones as the target."""
    flags = "--env-id PointRobot-v0 --target-env-id PointRobot-v0 --total-timesteps 1000 --hidden-size 8"
    darc.main([*flags.split(), "--updates-per-step", "0.01", "--run-dir", str(tmp_path), "--device", "cpu"])
    assert last_row(tmp_path)["charts/target_steps"] == 320


# ---- learning


def last_row(folder):
    (log,) = folder.glob("*/metrics.jsonl")
    return json.loads(log.read_text().splitlines()[-1])


@pytest.mark.slow
def test_it_walks_around_the_wall_and_without_the_correction_it_does_not(tmp_path, full):
    """Short: until the correction has found the wall. Full: the README's runs."""
    short = ["--total-timesteps", "10000", "--eval-every", "1000"]
    rows = {}
    for method in ("darc", "source"):
        flags = ["--method", method, "--run-dir", str(tmp_path / method), "--device", "cpu"]
        darc.main([*flags, *([] if full else short)])
        rows[method] = last_row(tmp_path / method)
    assert rows["source"]["eval/success_target"] <= 0.3 < 0.9 < rows["source"]["eval/success_source"]
    if full:
        assert rows["darc"]["eval/success_target"] >= 0.9
    else:  # the steps through the wall cost
        assert rows["darc"]["debug/correction"] < -0.2, rows["darc"]
