"""rl2_ppo.py: the mathematics, and every trap of its docstring.

A claim is a function check_xxx(module, ...). It must hold on the shipped script and fail on a mutant, the
script with the trap put in.
"""

import functools
import itertools
import json
import math
import os
import random
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import CueTask, FuseTask, mutant, script
from torch import nn
from torch.distributions import Normal

import common

rl2 = script("rl2_ppo")


def red(check, *edits):
    """The claim fails on the script with these edits."""
    broken = mutant("rl2_ppo", *edits)
    with pytest.raises(AssertionError):
        check(broken)


def make_agent(module, env, hidden_size=8, seed=0, bilinear=False):
    """A fresh agent that is far from indifferent: its memory moves and its actions depend on it."""
    torch.manual_seed(seed)
    agent = module.RecurrentActorCritic(
        env.single_observation_space.shape[0], env.single_action_space, hidden_size, bilinear
    )
    with torch.no_grad():
        agent.actor.weight.mul_(50.0)
        for bias in (agent.gru.bias_ih_l0, agent.gru.bias_hh_l0, agent.actor.bias, agent.critic.bias):
            bias.normal_(0.0, 0.3)
        agent.return_mean.fill_(2.0)
        agent.return_std.fill_(3.0)
    return agent


def envs_of_each_kind():
    """Discrete and continuous actions, episodes of equal and of unequal lengths."""
    yield CueTask(5, seed=1)
    yield FuseTask(6)
    yield FuseTask(6, actions=common.make("PointGoal-v0", 1).single_action_space)
    yield common.make("SparsePointGoal-v0", 4, seed=1, horizon=4)


def play(module, env, num_episodes=3, window=None, hidden_size=8, bilinear=False):
    agent = make_agent(module, env, hidden_size, bilinear=bilinear)
    tasks = env.sample_tasks(env.num_envs)
    return agent, module.rollout(agent, env, tasks, num_episodes, window or num_episodes * env.horizon)


def small_args(module, **changes):
    return module.Args(**{"clip": 0.2, "max_grad_norm": 1e9, "gamma": 0.9, "gae_lambda": 0.8, **changes})


# ---- generalised advantage estimation


def advantage_as_double_sum(reward, value, length, gamma, gae_lambda):
    """The definition: A_t = sum_l (gamma lambda)^l delta_{t+l}, for one trial, with nothing after its end."""
    value = [*value[:length], 0.0]
    delta = [reward[t] + gamma * value[t + 1] - value[t] for t in range(length)]
    return [sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]


def advantage_as_average_of_returns(reward, value, length, gamma, gae_lambda):
    """The other definition: the lambda-weighted average of n-step advantages; the last takes the rest."""
    value = [*value[:length], 0.0]
    advantage = []
    for t in range(length):
        total, most = 0.0, length - t
        for n in range(1, most + 1):
            n_step = sum(gamma**k * reward[t + k] for k in range(n)) + gamma**n * value[t + n] - value[t]
            total += n_step * (
                gae_lambda ** (n - 1) if n == most else (1 - gae_lambda) * gae_lambda ** (n - 1)
            )
        advantage.append(total)
    return advantage


def check_gae(module):
    dice = random.Random(0)
    for case in range(40):
        steps, batch = dice.randint(1, 9), dice.randint(1, 4)
        gamma = dice.choice([0.0, 1.0, dice.random()])
        gae_lambda = dice.choice([0.0, 1.0, dice.random()])
        lengths = [dice.randint(1, steps) if case % 2 else steps for _ in range(batch)]
        generator = torch.Generator().manual_seed(case)
        reward = torch.randn(steps, batch, generator=generator, dtype=torch.float64)
        value = torch.randn(steps, batch, generator=generator, dtype=torch.float64)
        valid = (torch.arange(steps)[:, None] < torch.tensor(lengths)).double()
        advantage = module.gae(reward, value, valid, gamma, gae_lambda)
        for b, length in enumerate(lengths):
            trial = reward[:, b].tolist(), value[:, b].tolist(), length, gamma, gae_lambda
            for expected in (advantage_as_double_sum(*trial), advantage_as_average_of_returns(*trial)):
                assert advantage[:length, b].tolist() == pytest.approx(expected, abs=1e-9)
            assert advantage[length:, b].abs().sum() == 0


def test_gae_is_the_double_sum_and_the_average_of_n_step_returns():
    check_gae(rl2)


def test_gae_goes_red_when_it_looks_beyond_the_trial():  # T3: the next trial's value belongs to another task
    red(check_gae, "next_value = next_advantage = ", "next_value, next_advantage = value[0], ")


def test_gae_goes_red_when_padding_leaks_in():  # T8
    red(check_gae, "next_value = value[step] * valid[step]", "next_value = value[step]")


# ---- the policy: one step at a time, or the whole trial at once


def check_stepwise_equals_whole_sequence(module, bilinear=False):
    for env in envs_of_each_kind():
        agent, trials = play(module, env, window=1, bilinear=bilinear)
        policy, value, hidden = agent(trials["x"], agent.initial_hidden(env.num_envs))
        torch.testing.assert_close(policy.log_prob(trials["action"]), trials["logprob"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(value, trials["value"], atol=1e-5, rtol=1e-5)
        memory, last = agent.gru(trials["x"])
        before = torch.cat([torch.zeros_like(memory[:1]), memory[:-1]])
        torch.testing.assert_close(trials["hidden"], before, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bilinear", [False, True])
def test_playing_step_by_step_equals_reading_the_whole_trial(bilinear):
    check_stepwise_equals_whole_sequence(rl2, bilinear)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 6, 12])
def test_windows_begin_with_the_memory_that_was_there_when_they_were_played(window):
    for env in (FuseTask(6), FuseTask(6, actions=common.make("PointGoal-v0", 1).single_action_space)):
        agent, trials = play(rl2, env, num_episodes=3, window=window)
        batch, hidden = rl2.make_sequences(trials, window, small_args(rl2))
        steps, longest = len(trials["x"]), int(trials["valid"].sum(0).max())
        look_every = 1 if window == 12 else window  # it stops when all are over, windows where one ends
        assert longest < 12 and steps == min(12, math.ceil(longest / look_every) * look_every)
        lengths = trials["valid"].sum(0).tolist()
        sequences = sum(math.ceil(length / window) for length in lengths)  # none that holds padding only
        assert batch["x"].shape[:2] == (min(window, steps), sequences) and hidden.shape == (sequences, 8)
        policy, value, _ = agent(batch["x"], hidden[None])
        torch.testing.assert_close(policy.log_prob(batch["action"]), batch["logprob"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(value, batch["value"], atol=1e-5, rtol=1e-5)


def test_windows_keep_time_in_order_and_trials_apart():
    _, trials = play(rl2, CueTask(2, seed=1), num_episodes=3, window=3)
    trials["x"] = 10.0 * torch.arange(6)[:, None] + torch.arange(2)  # entry = 10 t + b
    data, _ = rl2.make_sequences(trials, 3, small_args(rl2))
    assert data["x"].T.tolist() == [[0, 10, 20], [1, 11, 21], [30, 40, 50], [31, 41, 51]]


def check_first_update_has_ratio_one(module):
    for env in envs_of_each_kind():
        for window in (env.horizon, 3 * env.horizon):
            agent, trials = play(module, env, window=window)
            batch, hidden = module.make_sequences(trials, window, small_args(module))
            policy, _, _ = agent(batch["x"], hidden[None])
            ratio = (policy.log_prob(batch["action"]) - batch["logprob"]).exp()
            assert (ratio - 1).abs().max() < 1e-5
            optimizer = torch.optim.SGD(agent.parameters(), lr=1e-3)
            metrics = module.ppo_step(agent, optimizer, batch, hidden, 0.0, small_args(module))
            assert metrics["debug/kl"].abs() < 1e-6 and metrics["debug/clipfrac"] == 0


def test_the_ratio_is_one_at_the_first_update():
    check_first_update_has_ratio_one(rl2)


def test_the_ratio_goes_red_when_time_is_shuffled():  # T6
    shuffle = ".transpose(0, 1)[torch.randperm(window, generator=torch.Generator().manual_seed(1))]"
    red(check_first_update_has_ratio_one, ".transpose(0, 1)", shuffle)


def test_the_ratio_goes_red_when_windows_begin_with_the_wrong_memory():
    red(
        check_first_update_has_ratio_one,
        'trials["hidden"].flatten(0, 1)',
        'trials["hidden"].transpose(0, 1).flatten(0, 1)',
    )


# ---- T1, T3: the hidden state crosses episodes but not trials


def check_hidden_crosses_episodes_but_not_trials(module):
    env = CueTask(5, seed=1)
    agent, first = play(module, env, num_episodes=4, window=env.horizon)
    second = module.rollout(agent, env, env.sample_tasks(5), 4, env.horizon)
    for trials in (first, second):
        assert trials["hidden"][0].abs().max() == 0
        memory, _ = agent.gru(trials["x"])
        expected = memory[env.horizon - 1 :: env.horizon][
            :-1
        ]  # after the last step of each episode but the last
        assert expected.abs().max() > 0.05
        torch.testing.assert_close(trials["hidden"][1:], expected, atol=1e-5, rtol=1e-5)


CLEAR_AT_EPISODE_END = (
    "episode = episode + done",
    "episode, hidden = episode + done, hidden * (1 - done.float())[None, :, None]",
)


def test_hidden_state_crosses_episodes_but_not_trials():
    check_hidden_crosses_episodes_but_not_trials(rl2)


def test_hidden_state_goes_red_when_episode_ends_clear_it():  # T1
    red(check_hidden_crosses_episodes_but_not_trials, *CLEAR_AT_EPISODE_END)


def test_hidden_state_goes_red_when_a_new_task_does_not_clear_it():  # T3
    keep = (
        "hidden = agent.initial_hidden(env.num_envs)",
        'hidden = agent.__dict__.get("kept", agent.initial_hidden(env.num_envs))',
    )
    store = ("episode = episode + done", 'episode = episode + done; agent.__dict__["kept"] = hidden')
    red(check_hidden_crosses_episodes_but_not_trials, *keep, *store)


def train_on_cue_task(module, folder, *flags):
    """A short learning run through main itself. Returns the held-out metrics of the last evaluation."""
    argv = (
        "--env-id CueTask-v0 --num-envs 256 --hidden-size 16 --episodes-per-trial 4 --total-timesteps 61440"
    )
    argv += " --eval-tasks 500 --eval-every 1000 --save-every 1000 --lr 0.02 --device cpu --minibatches 2"
    module.main([*argv.split(), "--run-dir", str(folder), *flags])
    (log,) = folder.glob("*/metrics.jsonl")
    return json.loads(log.read_text().splitlines()[-1])


def test_an_agent_with_memory_solves_what_only_memory_can_solve(tmp_path):
    held_out = train_on_cue_task(rl2, tmp_path)
    assert held_out["eval/return_trial"] > 2.7  # the best there is: 0 + 1 + 1 + 1
    assert abs(held_out["eval/return_ep0"]) < 0.15 and held_out["eval/return_ep3"] > 0.95


FORGET = """keep = {keep}
        episode, hidden, last_reward = episode + done, hidden * keep[None, :, None], last_reward * keep
        last_action = last_action * keep[:, None]"""


def test_an_agent_that_forgets_at_every_episode_stays_at_chance(tmp_path):  # T1, felt in the score
    forgetful = mutant("rl2_ppo", "episode = episode + done", FORGET.format(keep="1 - done.float()"))
    held_out = train_on_cue_task(forgetful, tmp_path, "--bptt-window", "2")
    assert abs(held_out["eval/return_trial"]) < 0.5


def test_an_agent_that_forgets_at_every_step_stays_at_chance(tmp_path):
    forgetful = mutant("rl2_ppo", "episode = episode + done", FORGET.format(keep="torch.zeros_like(reward)"))
    held_out = train_on_cue_task(forgetful, tmp_path, "--bptt-window", "1")
    assert abs(held_out["eval/return_trial"]) < 0.5


# ---- T2, T5: who is paid for what


def check_the_first_episode_is_paid_for_the_last(module):
    env = CueTask(5, seed=1)
    _, trials = play(module, env, num_episodes=3)
    trials["reward"] = torch.zeros_like(trials["reward"])
    trials["reward"][-1] = 7.0
    batch, _ = module.make_sequences(trials, 6, small_args(module, gamma=1.0, gae_lambda=1.0))
    torch.testing.assert_close(batch["ret"], torch.full_like(batch["ret"], 7.0))


def test_the_first_episode_is_paid_for_what_the_last_one_earns():
    check_the_first_episode_is_paid_for_the_last(rl2)


def test_pay_goes_red_when_gae_is_cut_at_episode_ends():  # T2
    cut = """cut = lambda reward, value, valid, *rest: sum(
        gae(reward, value, (trials["episode"] == episode).float(), *rest) for episode in range(3)
    )
    advantage = cut("""
    red(check_the_first_episode_is_paid_for_the_last, "advantage = gae(", cut)


def check_the_critic_learns_returns_and_the_actor_standardised_advantages(module):
    env = FuseTask(6)
    _, trials = play(module, env)
    args = small_args(module)
    batch, _ = module.make_sequences(trials, 12, args)
    advantage = module.gae(trials["reward"], trials["value"], trials["valid"], args.gamma, args.gae_lambda)
    valid = trials["valid"].bool()
    torch.testing.assert_close(batch["ret"][valid], (advantage + trials["value"])[valid])
    assert abs(float(batch["advantage"][valid].mean())) < 1e-5
    assert float(batch["advantage"][valid].std(correction=0)) == pytest.approx(1.0, abs=1e-4)
    order = advantage[valid].argsort()
    assert (batch["advantage"][valid][order].diff() >= 0).all()


def test_the_critic_learns_returns_and_the_actor_standardised_advantages():
    check_the_critic_learns_returns_and_the_actor_standardised_advantages(rl2)


def test_targets_go_red_when_made_of_standardised_advantages():  # T5
    trap = "= (advantage - mean) / std + value"
    red(check_the_critic_learns_returns_and_the_actor_standardised_advantages, "= advantage + value", trap)


def test_with_lambda_one_the_target_is_the_sampled_return_whatever_the_critic_says():
    env = FuseTask(4)
    _, trials = play(rl2, env)
    batch, _ = rl2.make_sequences(trials, 12, small_args(rl2, gamma=1.0, gae_lambda=1.0))
    to_go = (trials["reward"] * trials["valid"]).flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(batch["ret"] * trials["valid"], to_go * trials["valid"], atol=1e-3, rtol=1e-5)


# ---- T4: what the policy is shown


def check_the_input_holds_what_it_says(module):
    env = FuseTask(6, horizon=2)  # some episodes end by themselves, others by the time limit
    agent, trials = play(module, env, num_episodes=3)
    obs, last_action, last_reward, last_done = trials["x"].split([3, 3, 1, 1], -1)
    assert last_action[0].abs().sum() == last_reward[0].abs().sum() == last_done[0].abs().sum() == 0
    age = [0] * env.num_envs  # steps since the episode began
    for t in range(len(trials["x"])):
        for b in range(env.num_envs):
            assert obs[t, b].tolist() == [float(age[b] == 0), float(age[b]), float(env.played[t][b, 0])]
            if t > 0:
                assert (
                    last_action[t, b].argmax() == trials["action"][t - 1, b] and last_action[t, b].sum() == 1
                )
                assert last_reward[t, b] == trials["reward"][t - 1, b] == t + b / 8
                assert last_done[t, b] == float(age[b] == 0)
            ends = bool(env.ends[t, b]) or age[b] == env.horizon - 1
            age[b] = 0 if ends else age[b] + 1


def test_each_episode_begins_with_its_first_observation_and_done_and_what_came_before():
    check_the_input_holds_what_it_says(rl2)


def test_the_input_goes_red_when_done_is_never_one():  # T4
    for never in ("torch.zeros_like(reward)", "terminated.float()", "truncated.float()"):
        red(check_the_input_holds_what_it_says, "done.float()", never)


def test_the_input_goes_red_when_the_first_observation_is_never_shown():  # T4
    red(
        check_the_input_holds_what_it_says,
        "done = terminated | truncated",
        'done = terminated | truncated; obs = info["final_obs"]',
    )


def test_the_input_goes_red_when_the_last_reward_is_missing():
    red(
        check_the_input_holds_what_it_says,
        "agent.encode(action[0]), reward,",
        "agent.encode(action[0]), 0 * reward,",
    )


def check_pairs_are_what_was_tried_where_and_what_it_paid(module):  # D9
    """Numbers that no two environments share; episodes end early, and the pair is of the step before."""
    env = FuseTask(6)
    _, trials = play(module, env, num_episodes=3, bilinear=True)
    obs, pair, paid, last_reward, last_done = trials["x"].split([3, 12, 12, 1, 1], -1)
    assert pair[0].abs().sum() == paid[0].abs().sum() == 0
    for t, b in itertools.product(range(1, len(obs)), range(env.num_envs)):
        expected = torch.zeros(4, 3)  # row: entry of the observation, the last a 1; column: action
        expected[:, trials["action"][t - 1, b]] = torch.cat([obs[t - 1, b], torch.ones(1)])
        assert torch.equal(pair[t, b], expected.flatten())
        assert torch.equal(paid[t, b], expected.flatten() * trials["reward"][t - 1, b])
        assert last_reward[t, b] == trials["reward"][t - 1, b] > 0
    assert last_done.sum() > 0 and env.single_observation_space.shape == (3,)


def test_pairs_are_what_was_tried_where_and_what_it_paid():
    check_pairs_are_what_was_tried_where_and_what_it_paid(rl2)


@pytest.mark.parametrize(
    "edit",
    [
        ("place = F.pad(last_obs,", "place = F.pad(obs,"),
        ("[obs, pair, pair * reward,", "[obs, pair, pair,"),
        ("F.pad(last_obs, (0, 1), value=1.0)", "F.pad(last_obs, (0, 1))"),
        ("last_obs = obs", "pass"),
    ],
)
def test_pairs_go_red(edit):
    red(check_pairs_are_what_was_tried_where_and_what_it_paid, *edit)


def check_the_heads_see_the_observation_if_bilinear(module):  # D9
    env, depends = FuseTask(6), []
    for bilinear in (False, True):
        agent = make_agent(module, env, bilinear=bilinear)
        for parameter in agent.gru.parameters():
            nn.init.zeros_(parameter)  # no memory
        x = torch.randn(2, 6, agent.gru.input_size)
        policy, value, _ = agent(x, agent.initial_hidden(6))
        depends.append([bool(policy.logits.std((0, 1)).max() > 0.1), bool(value.std() > 0.1)])
    assert depends == [[False, False], [True, True]]


def test_the_heads_see_the_observation_if_bilinear():
    check_the_heads_see_the_observation_if_bilinear(rl2)


def check_the_memory_writes_the_heads(module):  # D9
    agent = make_agent(module, FuseTask(6), bilinear=True)
    x = torch.randn(5, 6, agent.gru.input_size)
    policy, value, _ = agent(x, agent.initial_hidden(6))
    memory, logits, values = agent.gru(x)[0], torch.zeros(5, 6, 3), torch.zeros(5, 6)
    for entry in range(4):  # of the observation, and a 1
        place = x[..., entry] if entry < 3 else torch.ones(5, 6)
        values += place * (memory @ agent.critic.weight[entry] + agent.critic.bias[entry])
        for action in range(3):
            row = 3 * entry + action
            logits[..., action] += place * (memory @ agent.actor.weight[row] + agent.actor.bias[row])
    torch.testing.assert_close(policy.logits, logits.log_softmax(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(value, 2 + 3 * values, atol=1e-5, rtol=1e-5)


def test_the_memory_writes_the_heads():
    check_the_memory_writes_the_heads(rl2)


def test_the_heads_go_red_when_actions_and_entries_are_swapped():
    red(
        check_the_memory_writes_the_heads,
        "(-1, self.action_dim))).squeeze",
        "(self.action_dim, -1)).mT).squeeze",
    )


def check_the_flag_reaches_the_network(module):  # D9
    flags = "--num-envs 4 --episodes-per-trial 2 --eval-tasks 5 --total-timesteps 8 --device cpu"
    for flag, held in (("", False), ("--bilinear", True)):
        with tempfile.TemporaryDirectory() as folder:
            module.main(f"{flags} {flag} --run-dir {folder}".split())
            (file,) = Path(folder).glob("*/checkpoint.pt")
            assert (len(torch.load(file)["modules"]["agent"]["critic.bias"]) > 1) == held


def test_the_flag_reaches_the_network():
    check_the_flag_reaches_the_network(rl2)


def test_the_flag_goes_red_when_it_is_dropped():
    red(check_the_flag_reaches_the_network, "args.hidden_size, args.bilinear", "args.hidden_size")


def test_the_heads_go_red_when_they_see_the_memory_alone():
    red(check_the_heads_see_the_observation_if_bilinear, "here = F.pad(x[", "here = F.pad(0 * x[")


def test_a_continuous_action_is_remembered_as_it_was_sampled():
    env = common.make("PointGoal-v0", 4, seed=1, horizon=4)
    _, trials = play(rl2, env)
    assert torch.equal(trials["x"][1:, :, 2:4], trials["action"][:-1])


# ---- T6: backpropagation through the trial


def check_the_last_step_teaches_the_first(module):
    """A loss on the last step alone moves the weights that read what only the first step showed."""
    env = CueTask(5, seed=1)
    agent, trials = play(module, env)
    batch, hidden = module.make_sequences(trials, 6, small_args(module))
    batch["x"] = torch.zeros_like(batch["x"])
    batch["x"][0, :, 0] = 1.0  # only the first step has anything in column 0
    batch["valid"] = torch.zeros_like(batch["valid"])
    batch["valid"][-1] = 1.0
    module.ppo_step(
        agent, torch.optim.SGD(agent.parameters(), lr=0.0), batch, hidden, 0.0, small_args(module)
    )
    assert agent.gru.weight_ih_l0.grad[:, 0].norm() > 1e-6


def test_the_last_step_teaches_the_first():
    check_the_last_step_teaches_the_first(rl2)


def test_teaching_goes_red_when_backpropagation_runs_through_one_step():  # T6
    one_step = """outputs = []
        for row in x.unbind(0):
            output, hidden = self.gru(row[None], hidden.detach())
            outputs.append(output)
        memory = torch.cat(outputs)"""
    red(check_the_last_step_teaches_the_first, "memory, hidden = self.gru(x, hidden)", one_step)


def check_sequences_are_whole_trials_unless_asked(module, folder):
    asked = {}

    class Enough(Exception):
        pass

    def spy(agent, env, tasks, num_episodes, window):
        asked["window"] = window
        raise Enough

    module.rollout, shipped = spy, module.rollout
    try:
        for flags, window in (([], 20), (["--bptt-window", "5"], 5)):
            with pytest.raises(Enough):
                argv = "--env-id CueTask-v0 --num-envs 8 --eval-tasks 8 --total-timesteps 1 --device cpu"
                module.main([*argv.split(), "--run-dir", str(folder / "".join(flags)), *flags])
            assert asked["window"] == window
    finally:
        module.rollout = shipped


def test_sequences_are_whole_trials_unless_a_window_is_asked_for(tmp_path):
    check_sequences_are_whole_trials_unless_asked(rl2, tmp_path)


def test_sequences_go_red_when_they_are_single_steps(tmp_path):  # T6
    check = functools.partial(check_sequences_are_whole_trials_unless_asked, folder=tmp_path)
    red(check, "args.bptt_window or trial_steps", "args.bptt_window or 1")


def test_pairs_are_not_cut_by_normalised_inputs():
    with pytest.raises(SystemExit, match="--bilinear with --normalize-inputs: one of them"):
        rl2.main("--bilinear --normalize-inputs --device cpu".split())


# ---- the losses, by hand


def test_the_policy_loss_is_the_clipped_surrogate_of_ppo_eq_7():
    generator = torch.Generator().manual_seed(0)
    logprob, old, advantage = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    valid = (torch.arange(5)[:, None] < torch.tensor([5, 2, 3])).double()
    logprob.requires_grad_()
    loss, clipfrac = rl2.ppo_policy_loss(logprob, old, advantage, valid, 0.2)
    total, clipped, count = 0.0, 0, 0
    flat = set()  # where the gradient must be zero
    for t in range(5):
        for b in range(3):
            ratio, gain = math.exp(logprob[t, b].item() - old[t, b].item()), advantage[t, b].item()
            if not valid[t, b]:
                flat.add((t, b))
                continue
            total += min(ratio * gain, max(0.8, min(1.2, ratio)) * gain)
            clipped += abs(ratio - 1) > 0.2
            count += 1
            if (gain > 0 and ratio > 1.2) or (gain < 0 and ratio < 0.8):
                flat.add((t, b))
    assert loss.item() == pytest.approx(-total / count) and clipfrac.item() == pytest.approx(clipped / count)
    loss.backward()
    zero = {tuple(place) for place in (logprob.grad == 0).nonzero().tolist()}
    assert zero == flat and 0 < clipped < count


def test_the_value_loss_is_half_the_squared_error_in_units_of_the_scale():
    value, ret = torch.tensor([[1.0, 2.0], [3.0, 99.0]]), torch.tensor([[0.0, 4.0], [7.0, -99.0]])
    valid = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert rl2.ppo_value_loss(value, ret, valid, torch.tensor(2.0)).item() == pytest.approx(
        (0.25 + 1 + 4) / 3 / 2
    )


def test_masked_moments_are_those_of_what_counts():
    x, valid = torch.tensor([1.0, 2.0, 1e6]), torch.tensor([1.0, 1.0, 0.0])
    assert rl2.masked_mean(x, valid).item() == 1.5 and rl2.masked_std(x, valid).item() == 0.5
    assert rl2.masked_mean(x, torch.zeros(3)).item() == 0  # a window of nothing but padding


def test_an_update_is_one_step_down_the_sum_of_the_three_losses():
    env = FuseTask(6, actions=common.make("PointGoal-v0", 1).single_action_space)
    agent, trials = play(rl2, env)
    args = small_args(rl2, value_coef=0.7)
    batch, hidden = rl2.make_sequences(trials, 12, args)
    batch["logprob"] = batch["logprob"] + 0.3 * torch.randn_like(batch["logprob"])  # away from ratio 1
    before = [parameter.detach().clone() for parameter in agent.parameters()]
    normal, value, _ = agent(batch["x"], hidden[None])
    mean, std, valid = normal.base_dist.loc, agent.log_std.exp(), batch["valid"].bool()
    logprob = (-0.5 * ((batch["action"] - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    ratio = (logprob - batch["logprob"]).exp()[valid]
    advantage = batch["advantage"][valid]
    surrogate = torch.where(advantage > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8)) * advantage
    error = ((value - batch["ret"]) / 3.0)[valid]
    entropy = (0.5 + 0.5 * math.log(2 * math.pi) + agent.log_std).sum()
    loss = -surrogate.mean() + 0.7 * 0.5 * (error**2).mean() - 0.01 * entropy
    gradient = torch.autograd.grad(loss, list(agent.parameters()))
    metrics = rl2.ppo_step(agent, torch.optim.SGD(agent.parameters(), lr=0.5), batch, hidden, 0.01, args)
    for parameter, was, slope in zip(agent.parameters(), before, gradient, strict=True):
        torch.testing.assert_close(parameter.detach(), was - 0.5 * slope, atol=1e-4, rtol=1e-4)
    assert metrics["losses/policy"].item() == pytest.approx(-surrogate.mean().item(), abs=1e-5)
    assert metrics["losses/value"].item() == pytest.approx(0.5 * (error**2).mean().item(), rel=1e-4)
    assert metrics["debug/entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)
    norm = math.sqrt(sum(float(slope.square().sum()) for slope in gradient))
    assert metrics["debug/grad_norm"].item() == pytest.approx(norm, rel=1e-4)


def test_long_gradients_are_shortened():
    env = FuseTask(6)
    agent, trials = play(rl2, env)
    args = small_args(rl2, max_grad_norm=0.01)
    batch, hidden = rl2.make_sequences(trials, 12, args)
    before = torch.cat([parameter.detach().flatten() for parameter in agent.parameters()])
    rl2.ppo_step(agent, torch.optim.SGD(agent.parameters(), lr=1.0), batch, hidden, 0.0, args)
    after = torch.cat([parameter.detach().flatten() for parameter in agent.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_explained_variance_counts_a_critic_that_is_off_everywhere():
    torch.manual_seed(0)
    reward, valid = torch.randn(6, 8), torch.ones(6, 8)
    value = rl2.gae(reward, torch.zeros(6, 8), valid, 1.0, 1.0)
    agent = rl2.RecurrentActorCritic(2, common.make("Bandit5-v0", 1).single_action_space, 4)
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.0)
    args = rl2.Args(epochs=1, minibatches=1, gamma=1.0, gae_lambda=1.0)
    trials = {"x": torch.zeros(6, 8, 9), "action": torch.zeros(6, 8, dtype=torch.int64), "reward": reward}
    trials |= {"logprob": torch.zeros(6, 8), "valid": valid, "hidden": torch.zeros(1, 8, 4)}
    for offset in (0.0, 5.0):
        batch = {**trials, "value": value + offset}
        metrics = rl2.update(agent, optimizer, rl2.ppo_step, batch, 6, False, 1.0, args)
        expected = 1 - offset**2 / value.var(correction=0).item()
        assert metrics["debug/explained_variance"] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_update_shows_every_sequence_once_an_epoch():
    env = CueTask(8, seed=1)
    agent, trials = play(rl2, env)
    seen = []

    def spy(agent, optimizer, sequences, hidden, entropy_coef, args):
        seen.append(sequences["x"].transpose(0, 1).flatten(1))
        return rl2.ppo_step(agent, optimizer, sequences, hidden, entropy_coef, args)

    args = small_args(rl2, epochs=3, minibatches=4)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    metrics = rl2.update(agent, optimizer, spy, trials, 6, True, 1.0, args)
    assert [len(x) for x in seen] == [2] * 12 and all(isinstance(value, float) for value in metrics.values())
    everything = sorted(trials["x"].transpose(0, 1).flatten(1).tolist())
    for epoch in range(3):
        assert sorted(torch.cat(seen[4 * epoch : 4 * epoch + 4]).tolist()) == everything


# ---- T8: padding


def check_padding_is_what_lies_beyond_the_last_episode(module):
    env = FuseTask(6, horizon=3)  # some episodes end by themselves, others by the time limit
    _, trials = play(module, env)
    assert trials["valid"][-1].any()  # nobody plays on when all trials are over
    for b in range(env.num_envs):
        age, episode = 0, 0
        for t in range(len(trials["valid"])):
            assert trials["valid"][t, b] == float(episode < 3)
            assert trials["episode"][t, b] == episode
            ends = bool(env.ends[t, b]) or age == env.horizon - 1
            age, episode = (0, episode + 1) if ends else (age + 1, episode)
    assert 0 < trials["valid"].mean() < 1


def test_padding_is_what_is_played_beyond_the_last_episode():
    check_padding_is_what_lies_beyond_the_last_episode(rl2)


def test_padding_goes_red_when_everything_counts():  # T8
    trap = 'torch.ones_like(trials["reward"])'
    red(
        check_padding_is_what_lies_beyond_the_last_episode, '(trials["episode"] < num_episodes).float()', trap
    )


def check_padding_moves_nothing(module):
    """Losses, gradients and the critic's unit are the same whatever stands in the padding."""
    results = []
    for junk in (0.0, 50.0):
        env = FuseTask(6)
        agent, trials = play(module, env, window=4)
        padding = trials["valid"] == 0
        assert padding.any()
        for name in ("reward", "value", "logprob"):
            trials[name] = trials[name] + junk * padding
        trials["x"] = trials["x"] + junk * padding[..., None]
        trials["action"] = torch.where(padding & (junk > 0), 2 - trials["action"], trials["action"])
        batch, hidden = module.make_sequences(trials, 4, small_args(module))
        module.popart_update(agent, batch["ret"], batch["valid"], 1.0)
        metrics = module.ppo_step(
            agent, torch.optim.SGD(agent.parameters(), lr=0.0), batch, hidden, 0.01, small_args(module)
        )
        gradient = [parameter.grad.clone() for parameter in agent.parameters()]
        results.append([*metrics.values(), agent.return_mean, agent.return_std, *gradient])
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(clean, dirty, atol=1e-6, rtol=1e-6)


def test_what_stands_in_the_padding_moves_nothing():
    check_padding_moves_nothing(rl2)


def test_padding_goes_red_when_a_loss_forgets_the_mask():  # T8
    forgotten = ("(logprob - old_logprob) * valid", "logprob - old_logprob")
    red(check_padding_moves_nothing, "-masked_mean(gain, valid)", "-gain.mean()", *forgotten)


def check_padding_overflows_nothing(module):
    """A policy as narrow as it may become finds what stands in the padding impossible."""
    logprob, valid = torch.zeros(3, 2, requires_grad=True), torch.tensor([[1.0, 1], [1, 0], [0, 0]])
    old_logprob = -1000.0 * (1 - valid)
    loss, _ = module.ppo_policy_loss(logprob, old_logprob, torch.ones(3, 2), valid, 0.2)
    (gradient,) = torch.autograd.grad(loss, logprob)
    assert loss.isfinite() and torch.equal(gradient, -valid / 3)


def test_what_stands_in_the_padding_overflows_nothing():
    check_padding_overflows_nothing(rl2)


def test_overflow_goes_red_when_the_ratio_forgets_the_mask():  # T8
    red(check_padding_overflows_nothing, "(logprob - old_logprob) * valid", "logprob - old_logprob")


def test_padding_goes_red_when_the_advantages_are_standardised_with_it():  # T8
    red(
        check_padding_moves_nothing,
        "masked_mean(advantage, valid), masked_std(advantage, valid)",
        "masked_mean(trials['reward'], 1 + 0 * valid), masked_std(trials['reward'], 1 + 0 * valid)",
    )


# ---- D3: the critic's unit


def check_following_the_scale_moves_no_prediction(module, bilinear=False):
    env = FuseTask(6)
    agent, trials = play(module, env, bilinear=bilinear)
    valid = trials["valid"]
    ret = 400 + 50 * torch.randn_like(valid)
    inside = ret[valid.bool()]
    for rate in (1.0, *[0.1] * 80):
        value = agent(trials["x"], agent.initial_hidden(6))[1]
        module.popart_update(agent, ret, valid, rate)
        torch.testing.assert_close(
            agent(trials["x"], agent.initial_hidden(6))[1], value, atol=1e-2, rtol=1e-4
        )
        if rate == 1.0:
            assert agent.return_mean.item() == pytest.approx(inside.mean().item(), rel=1e-5)
            assert agent.return_std.item() == pytest.approx(inside.std(correction=0).item(), rel=1e-4)
            ret = ret - 390
    assert agent.return_mean.item() == pytest.approx(inside.mean().item() - 390, abs=0.5)


@pytest.mark.parametrize("bilinear", [False, True])
def test_following_the_scale_of_the_returns_moves_no_prediction_and_reaches_their_scale(bilinear):
    check_following_the_scale_moves_no_prediction(rl2, bilinear)


def test_following_the_scale_goes_red_when_every_head_is_moved():
    check = functools.partial(check_following_the_scale_moves_no_prediction, bilinear=True)
    red(check, "critic.bias[-1].add_", "critic.bias.add_")


def test_the_scale_of_returns_that_differ_little_is_not_lost_in_rounding():
    agent = make_agent(rl2, FuseTask(6))
    for mean, std in ((300, 0.1), (2000, 0.5)):
        rl2.popart_update(agent, mean + std * torch.randn(50, 100), torch.ones(50, 100), 1.0)
        assert agent.return_std.item() == pytest.approx(std, rel=0.05)


def test_the_critics_unit_is_that_of_a_mixture_of_old_and_new_returns():
    agent, ones = make_agent(rl2, FuseTask(6)), torch.ones(1, 4)
    rl2.popart_update(agent, torch.tensor([[1.0, 3, 1, 3]]), ones, 1.0)  # mean 2, deviation 1
    rl2.popart_update(agent, torch.tensor([[8.0, 12, 8, 12]]), ones, 0.1)  # mean 10, deviation 2
    assert agent.return_mean.item() == pytest.approx(2.8)
    assert agent.return_std.item() ** 2 == pytest.approx(0.9 * (1 + 4) + 0.1 * (4 + 100) - 2.8**2)


def check_each_step_has_a_unit_of_its_own(module):  # D3
    """Values, advantages, targets and moments of two iterations, by the definition, trial by trial."""
    env = CueTask(8, seed=1)
    agent, trials = play(module, env)
    agent.return_mean.fill_(0.0), agent.return_std.fill_(1.0)  # as in a run that begins with the flag
    args = small_args(module, epochs=1, minibatches=1, value_by_step=True)
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
    by_step, seen = module.StepReturns(6), []
    mean, std = torch.zeros(6, 1), torch.ones(6, 1)

    def spy(agent, optimizer, data, hidden, entropy_coef, args):
        order = [
            (trials["x"][:, i] == data["x"].transpose(0, 1)).flatten(1).all(1).nonzero()[0] for i in range(8)
        ]
        seen.append({name: x[:, torch.cat(order)] for name, x in data.items()})
        return module.ppo_step(agent, optimizer, data, hidden, entropy_coef, args)

    trials["reward"] = trials["reward"] + torch.arange(6.0)[:, None] + torch.randn(6, 8)
    trials["x"] = trials["x"] + torch.randn(1, 8, 1)  # no two trials alike
    for first in (True, False):
        trials["value"] = torch.randn(6, 8)
        metrics = module.update(agent, optimizer, spy, trials, 6, first, 1.0, args, by_step)
        value = mean + std * trials["value"]
        columns = zip(trials["reward"].T.tolist(), value.T.tolist(), strict=True)
        advantage = torch.tensor([advantage_as_double_sum(r, v, 6, 0.9, 0.8) for r, v in columns]).T
        ret, rate = advantage + value, 1.0 if first else 0.1
        error = ((ret - value) ** 2).mean() / ret.var(correction=0)
        assert metrics["debug/explained_variance"] == pytest.approx(1 - error.item(), rel=1e-3)
        second = torch.lerp(std**2 + mean**2, ret.pow(2).mean(1, keepdim=True), rate)
        mean = torch.lerp(mean, ret.mean(1, keepdim=True), rate)
        std = (second - mean**2).sqrt()
        for found, expected in (
            (by_step.mean, mean),
            (by_step.std, std),
            (seen[-1]["ret"], (ret - mean) / std),
        ):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
        standard = (advantage - advantage.mean()) / advantage.std(correction=0)
        torch.testing.assert_close(seen[-1]["advantage"], standard, atol=1e-4, rtol=1e-3)
    assert agent.return_mean == 0 and agent.return_std == 1  # one unit, not two on top of one another
    assert not any(parameter.any() for parameter in agent.critic.parameters())  # lr is 0: as it began


def test_each_step_has_a_unit_of_its_own_if_asked_for():
    check_each_step_has_a_unit_of_its_own(rl2)


@pytest.mark.parametrize(
    "edit",
    [
        ("by_step.mean + by_step.std * trials", "trials"),
        ('data["ret"] = (data["ret"] - by_step.mean) / by_step.std', "pass"),
        (
            'data["ret"] = (data["ret"] - by_step.mean) / by_step.std',
            'data["ret"] = data["ret"] - by_step.mean',
        ),
        (
            "ret.mean(1, keepdim=True), ret.std(1, correction=0, keepdim=True)",
            "ret.mean(), ret.std(correction=0)",
        ),
        ("    if by_step is None:", "    if True:"),
        ("    if first:  # what an untrained", "    if first and by_step is None:  # what an untrained"),
        ('by_step.follow(data["ret"], rate)', 'by_step.follow(data["ret"], 1.0)'),
    ],
    ids=["values", "targets", "deviation", "over_steps", "popart", "start", "rate"],
)
def test_a_unit_for_each_step_goes_red(edit):
    red(check_each_step_has_a_unit_of_its_own, *edit)


def check_units_of_steps_are_saved_and_taken_up(module):
    """A resumed run goes on with the units it had; a trial to evaluate on may have another length."""
    flags = (
        "--env-id CueTask-v0 --num-envs 8 --eval-tasks 8 --hidden-size 4 --device cpu --episodes-per-trial 3"
    )
    shipped, began = module.update, []

    def update(*args):
        began.append((args[5], None if args[8] is None else torch.cat([args[8].mean, args[8].std], 1)))
        return shipped(*args)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(module, "update", update):
        for flag in ("", "--value-by-step"):
            module.main(f"{flags} {flag} --total-timesteps 96 --run-dir {folder}/{len(began)}".split())
        (run,) = Path(folder, "2").iterdir()
        saved = torch.load(run / "checkpoint.pt")["modules"]["by_step"]
        module.main(f"--resume {run} --total-timesteps 144".split())
        module.main(f"--evaluate {run} --episodes-per-trial 5".split())
    assert [first for first, _ in began] == [True, False, True, False, False]
    assert [units is None for _, units in began] == [True, True, False, False, False]
    assert (
        began[2][1].tolist() == [[0, 1]] * 6
        and torch.equal(began[4][1], torch.cat([saved["mean"], saved["std"]], 1))
        and saved["mean"].any()
    )


def test_units_of_steps_are_saved_and_taken_up():
    check_units_of_steps_are_saved_and_taken_up(rl2)


@pytest.mark.parametrize(
    "edit",
    [
        ('modules |= {"by_step": by_step} if by_step else {}', "pass"),
        ('"std", torch.ones(steps, 1)', '"std", torch.ones(steps, 1), persistent=False'),
        ("iteration == 0, anneal, args, by_step)", "iteration == 0, anneal, args, None)"),
        ("if args.value_by_step else None", "if True else None"),
    ],
    ids=["saved", "deviation", "passed", "flag"],
)
def test_saving_the_units_of_steps_goes_red(edit):
    with pytest.raises((AssertionError, KeyError)):
        check_units_of_steps_are_saved_and_taken_up(mutant("rl2_ppo", *edit))


@pytest.mark.parametrize("flags", ["--env-id Maze-v0 --episodes-per-trial 2", "--bptt-window 5"])
def test_units_of_steps_need_whole_trials_of_one_length(flags):
    with pytest.raises(
        SystemExit, match="--value-by-step needs episodes that never end early, and no --bptt-window"
    ):
        rl2.main(f"{flags} --value-by-step --device cpu --eval-tasks 2".split())


def test_the_first_returns_do_not_drown_the_policy_in_the_critics_error():
    """A critic that predicts 0 where returns are 200 +- 2 would have an error of 100 deviations."""
    env = FuseTask(6)
    agent, trials = play(rl2, env)
    trials["reward"] = trials["reward"] * 0.1 + 100
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
    args = small_args(rl2, gae_lambda=1.0, gamma=0.0, epochs=1, minibatches=1)
    metrics = rl2.update(agent, optimizer, rl2.ppo_step, trials, len(trials["x"]), True, 1.0, args)
    assert metrics["losses/value"] == pytest.approx(0.5, abs=0.01)


def test_constant_returns_do_not_divide_by_zero():
    env = CueTask(5, seed=1)
    agent, trials = play(rl2, env)
    rl2.popart_update(agent, torch.ones(6, 5), trials["valid"], 1.0)
    assert all(torch.isfinite(parameter).all() for parameter in agent.parameters())


def check_inputs_are_normalised_by_what_was_played(module):
    """Batches count alike, padding does not; the GRU reads mean 0 and deviation 1, and nothing beyond 5."""
    torch.manual_seed(0)
    agent = make_agent(module, FuseTask(6))
    valid = (torch.arange(30)[:, None] < torch.tensor([30, 10, 20, 30])).float()
    batches = [scale * torch.randn(30, 4, agent.gru.input_size) + 7 - scale for scale in (1.0, 4.0, 2.0)]
    batches[1][3, 2] = 300.0  # what is rare is large
    start = agent.initial_hidden(4)
    torch.testing.assert_close(agent(batches[1], start)[2], agent.gru(batches[1])[1])  # so far as they are
    for number, x in enumerate(batches, start=1):
        module.see_inputs(agent, x, valid, 1 / number)
    seen = torch.cat([x[valid.bool()] for x in batches])
    torch.testing.assert_close(agent.input_mean, seen.mean(0))
    torch.testing.assert_close(agent.input_std, seen.std(0, correction=0))
    _, value, hidden = agent(batches[1][:4], start)  # a GRU forgets the spike if it goes on for long
    memory, expected = agent.gru(((batches[1][:4] - seen.mean(0)) / seen.std(0, correction=0)).clamp(-5, 5))
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(value, 2 + 3 * agent.critic(memory)[..., 0], atol=1e-4, rtol=1e-4)


def test_inputs_are_normalised_by_what_was_played():
    check_inputs_are_normalised_by_what_was_played(rl2)
    agent = make_agent(rl2, FuseTask(6))
    rl2.see_inputs(agent, torch.full((5, 4, agent.gru.input_size), 3.0), torch.ones(5, 4), 1.0)
    assert torch.all(agent.input_mean == 3) and torch.all(agent.input_std == 0.01)  # what never changes


@pytest.mark.parametrize(
    "edit",
    [
        ("x = x[valid > 0]", "x = x.flatten(0, 1)"),
        ("x = (x - self.input_mean) / self.input_std", "pass"),
        ("x = x.clamp(-self.input_bound, self.input_bound)", "pass"),
        ("torch.tensor(1e38)", "torch.tensor(5.0)"),
        ("rate * (1 - rate) * (new_mean - old_mean) ** 2", "0"),
    ],
)
def test_normalised_inputs_go_red(edit):
    red(check_inputs_are_normalised_by_what_was_played, edit[0], edit[1])


def check_normalised_inputs_leave_the_ratio_at_one(module):
    """One gradient step an iteration: the policy that it starts from is the one that played."""
    flags = (
        "--env-id PointGoal-v0 --num-envs 2 --episodes-per-trial 2 --epochs 1 --minibatches 1 --eval-tasks 4"
    )
    with tempfile.TemporaryDirectory() as folder:
        module.main(f"{flags} --normalize-inputs --total-timesteps 1200 --run-dir {folder}".split())
        (run,) = Path(folder).iterdir()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        checkpoint = torch.load(run / "checkpoint.pt")
    assert len(rows) == 3 and all(abs(row["debug/kl"]) < 1e-6 for row in rows)
    assert checkpoint["modules"]["agent"]["input_mean"].abs().min() > 0


def test_normalised_inputs_leave_the_ratio_at_one():
    check_normalised_inputs_leave_the_ratio_at_one(rl2)


def check_every_batch_so_far_counts_alike(module):
    """The moments after iterations 1, 2, 3 are asked for with shares 1, 1/2, 1/3; without the flag, never."""
    shares = []
    listen = mock.patch.object(module, "see_inputs", lambda agent, x, valid, rate: shares.append(rate))
    flags = "--env-id PointGoal-v0 --num-envs 4 --episodes-per-trial 1 --eval-tasks 4 --total-timesteps 1200"
    for flag in ("", "--normalize-inputs"):
        assert not shares
        with listen, tempfile.TemporaryDirectory() as folder:
            module.main(f"{flags} {flag} --run-dir {folder}".split())
    assert shares == [1, 1 / 2, 1 / 3]


def test_every_batch_so_far_counts_alike():
    check_every_batch_so_far_counts_alike(rl2)


@pytest.mark.parametrize(
    "edit", [("1 / (iteration + 1)", "1.0"), ("if args.normalize_inputs:", "if True:")], ids=["rate", "flag"]
)
def test_counting_goes_red(edit):
    red(check_every_batch_so_far_counts_alike, *edit)


def test_the_ratio_goes_red_when_inputs_are_counted_before_the_gradient_steps():
    update = "metrics = update(agent,"
    early = f'see_inputs(agent, trials["x"], trials["valid"], 1.0); {update}'
    red(check_normalised_inputs_leave_the_ratio_at_one, update, early)


# ---- actions


def test_log_probabilities_of_continuous_actions_are_summed_over_dimensions():
    env = common.make("PointGoal-v0", 4, seed=1, horizon=4)
    agent = make_agent(rl2, env)
    with torch.no_grad():
        agent.log_std.copy_(torch.tensor([-1.0, 0.5]))
    trials = rl2.rollout(agent, env, env.sample_tasks(4), 2, 8)
    mean = agent(trials["x"], agent.initial_hidden(4))[0].base_dist.loc
    by_hand = Normal(mean[..., 0], math.exp(-1)).log_prob(trials["action"][..., 0])
    by_hand = by_hand + Normal(mean[..., 1], math.exp(0.5)).log_prob(trials["action"][..., 1])
    torch.testing.assert_close(trials["logprob"], by_hand, atol=1e-5, rtol=1e-5)


def test_actions_reach_the_environments_box_and_never_leave_it():
    space = rl2.gym.spaces.Box(torch.tensor([-0.1, 2.0]).numpy(), torch.tensor([0.1, 6.0]).numpy())
    agent = rl2.RecurrentActorCritic(3, space, 4)
    action = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.5], [-7.0, 7.0]])
    expected = torch.tensor([[-0.1, 2.0], [0.1, 6.0], [0.0, 5.0], [-0.1, 6.0]])
    torch.testing.assert_close(agent.to_env(action), expected)
    discrete = rl2.RecurrentActorCritic(3, rl2.gym.spaces.Discrete(4), 4)
    assert torch.equal(discrete.to_env(torch.tensor([3, 0])), torch.tensor([3, 0]))


# ---- adapt and evaluate


def check_returns_by_episode(module):
    env = FuseTask(6)
    agent = make_agent(module, env)
    returns, lengths, success = module.adapt(agent, env, env.sample_tasks(6), 3)
    assert returns.shape == lengths.shape == success.shape == (6, 3)
    for b in range(6):
        expected = [[0.0, 0, 0.0]]  # return, length, success of each episode
        for t in range(12):
            expected[-1][0] += t + 1 + b / 8
            expected[-1][1] += 1
            expected[-1][2] = max(expected[-1][2], float((t + 1) % 7 == 0))
            if env.ends[t, b] or expected[-1][1] == env.horizon:
                expected.append([0.0, 0, 0.0])
        for episode in range(3):
            found = [returns[b, episode].item(), lengths[b, episode].item(), success[b, episode].item()]
            assert found == expected[episode]


def test_adapt_books_every_reward_to_its_episode():
    check_returns_by_episode(rl2)


def test_adapt_goes_red_when_padding_is_booked_to_the_last_episode():  # T8
    red(check_returns_by_episode, "clamp(max=num_episodes)", "clamp(max=num_episodes - 1)")


def test_the_summary_is_means_and_standard_errors_over_tasks():
    returns = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 4.0]])
    lengths = torch.tensor([[2.0, 1.0], [4.0, 1.0], [3.0, 1.0]])
    summary = rl2.summarize(returns, lengths, torch.tensor([[0.0, 1.0]] * 3))
    assert summary["eval/return_ep0"] == 3 and summary["eval/return_ep1"] == 4
    assert summary["eval/adaptation_gain"] == 1
    assert summary["eval/return_se_ep0"] == pytest.approx(math.sqrt(8 / 2) / math.sqrt(3))
    assert summary["eval/adapt_steps_ep0"] == 0 and summary["eval/adapt_steps_ep1"] == 3
    assert summary["eval/success_ep0"] == 0 and summary["eval/success_ep1"] == 1
    alone = rl2.summarize(returns[:1], lengths[:1])
    assert all(math.isfinite(value) for value in alone.values()) and "eval/success_ep0" not in alone


def test_the_return_of_a_trial_is_the_sum_over_its_episodes(monkeypatch):
    env = common.make("Bandit5-v0", 3, seed=0)
    returns = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 4.0]])
    monkeypatch.setattr(rl2, "adapt", lambda *_, **__: (returns, torch.ones(3, 2), torch.zeros(3, 2)))
    report = rl2.evaluate(make_agent(rl2, env), env, 2)
    assert report["eval/return_trial"] == 7
    assert report["eval/return_trial_se"] == pytest.approx(math.sqrt(24 / 2) / math.sqrt(3))  # of 3, 9, 9


def test_evaluation_is_the_same_every_time_and_training_does_not_notice():
    env, training = common.make("Bandit5-v0", 200, seed=0), common.make("Bandit5-v0", 4, seed=1)
    agent = make_agent(rl2, env)
    torch.manual_seed(5)
    random_state, training_state = torch.get_rng_state(), training.state_dict()["_generator"]
    first = rl2.evaluate(agent, env, 4)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(training.state_dict()["_generator"], training_state)
    torch.manual_seed(6)
    assert rl2.evaluate(agent, env, 4) == first
    assert (
        rl2.evaluate(agent, common.make("Bandit5-v0", 200, seed=77), 4) == first
    )  # nor does the environment's own seed matter
    assert not any(parameter.grad is not None for parameter in agent.parameters())


def check_before_and_after_are_the_same_held_out_tasks(module):
    env = FuseTask(6)
    agent = make_agent(module, env)
    module.evaluate(agent, env, 3)
    held_out = env.sample_tasks(6, split="test")
    assert len(env.played) > 6 and all(torch.equal(tasks, held_out) for tasks in env.played)


def test_before_and_after_are_the_same_held_out_tasks():
    check_before_and_after_are_the_same_held_out_tasks(rl2)


def test_evaluation_goes_red_on_training_tasks():  # T7
    red(check_before_and_after_are_the_same_held_out_tasks, 'split="test"', 'split="train"')


def test_evaluation_goes_red_when_the_task_changes_with_the_episode():  # T7
    trap = (
        "done = terminated | truncated; env._task = env.sample_tasks(len(done)) if done.any() else env._task"
    )
    red(check_before_and_after_are_the_same_held_out_tasks, "done = terminated | truncated", trap)


# ---- the main loop


def check_the_main_loop(module):
    """What falls, falls by the steps that count; the critic's unit is taken over once, then followed."""
    seen = {"steps": [], "returns": [], "lr": [], "bonus": [], "rate": []}

    def rollout(*args, shipped=module.rollout, **kwargs):
        trials = shipped(*args, **kwargs)
        if len(args) == 5 and not kwargs:  # evaluation gives a seed
            seen["steps"].append(int(trials["valid"].sum()))
            seen["returns"].append(float((trials["reward"] * trials["valid"]).sum(0).mean()))
        return trials

    def ppo_step(agent, optimizer, data, hidden, entropy_coef, args, shipped=module.ppo_step):
        seen["lr"].append(optimizer.param_groups[0]["lr"])
        seen["bonus"].append(entropy_coef)
        return shipped(agent, optimizer, data, hidden, entropy_coef, args)

    def popart_update(agent, ret, valid, rate, shipped=module.popart_update):
        seen["rate"].append(rate)
        return shipped(agent, ret, valid, rate)

    flags = "--env-id Maze-v0 --episodes-per-trial 1 --num-envs 8 --hidden-size 8 --eval-tasks 2 --device cpu"
    flags += " --epochs 1 --minibatches 1 --lr 0.001 --entropy-coef 0.02 --eval-every 1000"
    spies = {"rollout": rollout, "ppo_step": ppo_step, "popart_update": popart_update}
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(module, **spies):
        module.main([*flags.split(), "--total-timesteps", "2500", "--run-dir", folder])
        (log,) = Path(folder).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    ends = list(itertools.accumulate(seen["steps"]))
    assert min(seen["steps"]) < 800 and ends[-2] < 2500 <= ends[-1]  # 800: with padding
    assert [row["global_step"] for row in rows] == ends
    assert [row["charts/return"] for row in rows] == pytest.approx(seen["returns"])
    left = [1 - end / 2500 for end in [0, *ends[:-1]]]
    assert seen["lr"] == pytest.approx([0.001 * x for x in left])
    assert seen["bonus"] == pytest.approx([0.02 * x for x in left])
    assert seen["rate"] == [1.0] + [0.1] * (len(ends) - 1)


def test_step_size_and_bonus_fall_by_the_steps_that_count():
    check_the_main_loop(rl2)


@pytest.mark.parametrize(
    ("edit", "trap"),
    [
        ("args.lr * anneal", "args.lr"),  # D5
        ("args.entropy_coef * anneal, args", "args.entropy_coef, args"),
        ('int(trials["valid"].sum(dtype=torch.int64))', 'trials["valid"].numel()'),  # T8
        ('(trials["reward"] * trials["valid"]).sum(0)', 'trials["reward"].cumsum(0).amax(0)'),
        ("rate = 1.0 if first else 0.1", "rate = 1.0"),  # D3
    ],
)
def test_the_main_loop_goes_red(edit, trap):
    red(check_the_main_loop, edit, trap)


# ---- the default run


@pytest.mark.slow
def test_the_default_run_learns_the_bandit(tmp_path, full):
    """In full it comes within one per cent of Bayes-optimal play (6.66); else it clearly learns.

    The one default run that continuous integration does in full: two or three minutes.
    """
    full = full or bool(os.environ.get("CI"))
    argv = "--device cpu --eval-every 1000"
    argv += "" if full else " --total-timesteps 128000 --num-envs 256 --lr 0.005 --eval-tasks 4000"
    rl2.main(["--run-dir", str(tmp_path), *argv.split()])
    (log,) = tmp_path.glob("*/metrics.jsonl")
    held_out = json.loads(log.read_text().splitlines()[-1])
    assert held_out["eval/return_trial"] > (6.60 if full else 5.4)  # random play earns 5.0
    assert held_out["eval/return_ep9"] > held_out["eval/return_ep0"] + 0.05
