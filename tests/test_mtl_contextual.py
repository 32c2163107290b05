"""mtl_contextual.py: hindsight, equal shares, temperatures, heads, SAC against its definition, every trap."""

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
    one_goals_optimum,
)
from torch.distributions import Independent, Normal

import common
from benchmark import plot
from common import pointmaze

mtl = script("mtl_contextual")
K = 4  # training tasks


def small_args(module, **changes):
    small = {"train_tasks": K, "num_tasks": N, "batch_size": M, "hidden_size": 8, "replay_episodes": 30}
    return dataclasses.replace(module.Args(), **{**small, **changes})


def red(check, old, new, *more):
    """The check passes as shipped and fails once the trap is put in."""
    check(mtl)
    broken = mutant("mtl_contextual", old, new, *more)  # outside: a text that is no longer there is no trap
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check(broken)


def make_agent(module, args, tasks=None, obs_dim=2, space=BOX, seed=0):
    torch.manual_seed(seed)
    tasks = torch.randn(args.train_tasks, 2) if tasks is None else tasks
    return module.make_contextual_agent(obs_dim, tasks, space, args)


# ---- what the policy is told


def test_each_kind_of_context_tells_what_it_says():
    known = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.1, 0.2], [0.5, 0.6]])
    rows = known[[3, 2, 1]]
    assert torch.equal(mtl.adapt(rows, known, "task"), rows) and torch.equal(
        mtl.adapt(rows, known, "goal"), rows
    )
    assert mtl.adapt(rows, known, "none").shape == (3, 0)
    expected = torch.eye(4)[[3, 0, 1]]  # of two that are the same, the first
    assert torch.equal(mtl.adapt(rows, known, "onehot"), expected)


def check_an_unseen_task_has_no_number(module):
    known = torch.arange(8.0).view(4, 2)
    with pytest.raises(ValueError, match="1 of 3 held-out tasks are none of the 4 training tasks"):
        module.adapt(torch.stack([known[1], known[1] + 1e-3, known[2]]), known, "onehot")


def test_an_unseen_task_has_no_number():  # T11
    check_an_unseen_task_has_no_number(mtl)
    trapped = mutant("mtl_contextual", "if bool(unseen.any()):", "if False:")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_an_unseen_task_has_no_number(trapped)


def test_a_one_hot_of_unseen_tasks_is_one_line_before_any_training(tmp_path):
    with pytest.raises(SystemExit, match="--context onehot: 1000 of 1000 held-out tasks are none of the 200"):
        mtl.main(["--context", "onehot", "--run-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_what_a_number_means_is_kept_with_the_agent(tmp_path):
    """Numbers among the training tasks mean nothing without them, so a checkpoint holds the tasks."""
    flags = "--env-id ClassicControl-v0 --context onehot --train-tasks 3 --num-tasks 3 --hidden-size 4"
    flags += " --total-timesteps 600 --eval-tasks 3 --updates-per-step 0.01 --device cpu"
    mtl.main([*flags.split(), "--run-dir", str(tmp_path)])
    (run,) = tmp_path.iterdir()
    saved = mtl.load_checkpoint(run)["modules"]["agent"]
    assert torch.equal(saved["tasks"], torch.eye(3))
    mtl.main(["--evaluate", str(run)])
    with pytest.raises(SystemExit, match="--context task: expected onehot, which is what this policy was"):
        mtl.main(["--evaluate", str(run), "--context", "task"])  # as wide, and another order


# ---- networks


def test_twins_go_red_as_copies():  # T2
    red(check_twins_differ, *TWIN_COPIES)


def test_log_probabilities_go_red_without_the_squashing_or_with_a_rounded_jacobian():  # T10
    for trap in NO_JACOBIANS:
        red(check_log_probability, JACOBIAN, trap)


def test_normalised_inputs_have_mean_0_and_deviation_1_over_all_that_was_seen():
    torch.manual_seed(0)
    x = torch.randn(5000, 3) * torch.tensor([3.0, 0.2, 0.0]) + torch.tensor([100.0, -1.0, 7.0])
    normalizer = mtl.Normalizer(3)
    assert torch.equal(normalizer(x[:4]), x[:4].clamp(-5, 5))  # before anything was seen
    for part in x.split([10, 990, 4000]):
        normalizer.see(part)
    y = normalizer(x)
    close(y.mean(0), torch.zeros(3), 1e-3)
    close(y[:, :2].std(0), torch.ones(2), 1e-2)
    assert (y[:, 2] == 0).all() and normalizer(torch.full((1, 3), 1e6)).max() == 5
    other = mtl.Normalizer(3)
    other.load_state_dict(normalizer.state_dict())
    other.see(x[:7]), normalizer.see(x[:7])
    assert torch.equal(other(x), normalizer(x))  # it goes on exactly


def check_the_normalizer_reads_no_padding(module):
    env = FuseTask(24, actions=BOX)
    env.reset(seed=0)
    args = small_args(module, train_tasks=24, context="task")
    agent = make_agent(module, args, tasks=env._task.clone(), obs_dim=3)
    episode = module.rollout(agent, module.sample_action, env, env._task.clone())
    told = module.told_in(episode, env._task.clone(), env, args)
    x = module.inputs_of(episode, told)
    assert x.shape == (int(episode["valid"].sum()), 4)
    assert torch.equal(x[:, 2], x[:, 3])  # FuseTask shows its task: each row has its own context beside it
    lengths = episode["valid"].sum(1)
    assert x[:, 1].sum() == (lengths * (lengths - 1) / 2).sum()  # 0, 1, 2, ... of each


def test_the_normalizer_reads_no_padding():  # T9
    red(check_the_normalizer_reads_no_padding, '[episode["valid"] > 0]  # T9', ".flatten(0, 1)")


def check_the_normalizer_counts_hindsight_goals(module, her, rows=400):
    """Of each episode's steps k of k + 1 are told a goal of a later step of their own episode."""
    steps, lengths = 6, torch.arange(rows) % 6 + 1
    numbers = torch.arange(steps + 1.0).expand(rows, -1)
    obs = torch.stack([torch.arange(float(rows))[:, None].expand(-1, steps + 1), numbers], -1)
    valid = (numbers[:, :-1] < lengths[:, None]).float()
    torch.manual_seed(0)
    args = small_args(module, her=her, her_k=4, batch_size=10)
    told = module.told_in({"obs": obs, "valid": valid}, torch.full((rows, 2), -7.0), CodedGoals(), args)
    x = module.inputs_of({"obs": obs, "valid": valid}, told)
    assert x.shape == (lengths.sum(), 4)
    changed = x[:, 2] != -7
    assert abs(changed.float().mean() - 0.8) < 0.05
    some = (told[lengths == 6][..., 0] != -7).any(1) & (told[lengths == 6][..., 0] == -7).any(1)
    assert some.any()  # drawn for each step by itself
    row, step, goal_row, goal = x[changed].T
    assert torch.equal(row, goal_row)
    end = lengths[row.long()].float()
    assert (goal > step).all() and (goal <= end).all()
    if her == "final":
        assert torch.equal(goal, end)
    else:
        first = goal[(step == 0) & (end == 6)]
        counts = torch.bincount(first.long(), minlength=7)[1:]
        assert (counts - len(first) / 6).abs().max() < 4 * (len(first) / 6) ** 0.5


@pytest.mark.parametrize("her", ["future", "final"])
def test_the_normalizer_counts_hindsight_goals(her):
    check_the_normalizer_counts_hindsight_goals(mtl, her)
    for trap in (
        ("torch.where(pretended[..., None], goal, told)", "told"),
        ("torch.where(pretended[..., None], goal, told)", "goal"),
        ("rows = torch.arange(len(told), device=told.device)", "rows = torch.arange(len(told)).flip(0)"),
        ('length = episode["valid"].sum(1, keepdim=True).long()', "length = torch.tensor([[6]])"),
        ("torch.rand(step.shape, device=step.device) <", "torch.rand(len(told), 1) <"),
        ("< hindsight_count(args) / args.batch_size", "< 0.5"),
    ):
        with pytest.raises(AssertionError):
            check_the_normalizer_counts_hindsight_goals(mutant("mtl_contextual", *trap), her)


def check_a_goal_that_never_varies(module, folder):
    """What a normaliser never saw vary it blows up and cuts: hindsight goals, had it seen one goal alone."""
    flags = "--env-id PointRobot-v0 --context goal --her future --train-tasks 1 --num-tasks 1 --batch-size 5"
    flags += " --total-timesteps 200 --updates-per-step 0.01 --eval-tasks 5 --hidden-size 4 --device cpu"
    module.main([*flags.split(), "--run-dir", str(folder)])
    (run,) = folder.iterdir()
    std = mtl.load_checkpoint(run)["modules"]["agent"]["normalizer.std"]
    assert std.shape == (4,) and (std > 0.1).all()  # of two observations and two goals


def test_a_goal_that_never_varies_is_seen_beside_those_of_hindsight(tmp_path):
    check_a_goal_that_never_varies(mtl, tmp_path / "shipped")
    trapped = mutant("mtl_contextual", "torch.where(pretended[..., None], goal, told)", "told")
    with pytest.raises(AssertionError):
        check_a_goal_that_never_varies(trapped, tmp_path / "trapped")


def headed(module, seen):
    args = small_args(module, heads=True, context="onehot")
    tasks = torch.arange(2.0 * K).view(K, 2)
    agent = make_agent(module, args, tasks).double()
    if seen:
        agent.normalizer.see(torch.cat([torch.randn(400, 2), torch.eye(K).repeat(100, 1)], 1).double())
    return agent


def check_heads_are_apart(module):
    for seen in (True, False):  # before anything was normalised, too
        check_heads_of(headed(module, seen))


def check_heads_of(agent):
    x = agent.normalizer(torch.cat([torch.randn(K, 2), torch.eye(K)], 1).double())
    mean, log_std = agent.actor(x)
    values = agent.critic(x, torch.rand(K, 2).double())
    assert mean.shape == log_std.shape == (K, 2) and values.shape == (2, K)
    for task in range(K):
        last = [agent.actor.shared.net[-1].weight, agent.critic.shared.weights[-1]]
        grads = torch.autograd.grad(mean[task].sum() + values[:, task].sum(), last, retain_graph=True)
        moved = (
            grads[0].abs().sum(1).view(2, K, 2).sum((0, 2)) > 0
        )  # means then deviations, K tasks, 2 actions
        assert torch.equal(moved, torch.arange(K) == task)
        assert torch.equal(grads[1].abs().sum((0, 1)) > 0, torch.arange(K) == task)


def test_a_tasks_loss_reaches_its_own_head_and_no_other():  # T13
    shipped = "own = F.one_hot(x[..., -self.heads :].argmax(-1), self.heads)"
    red(check_heads_are_apart, shipped, "own = x[..., -self.heads :].exp()")
    shipped = "values * F.one_hot(x[..., -self.heads :].argmax(-1), self.heads)"
    red(check_heads_are_apart, shipped, "values * x[..., -self.heads :]")


def test_a_single_head_is_the_plain_network():
    one = small_args(mtl, train_tasks=1, num_tasks=1, heads=True, context="onehot")
    agents = [
        make_agent(mtl, dataclasses.replace(one, heads=heads), torch.zeros(1, 2)) for heads in (True, False)
    ]
    agents[0].normalizer.see(torch.cat([torch.randn(9, 2), torch.ones(9, 1)], 1))
    x = agents[0].normalizer(torch.cat([torch.randn(7, 2), torch.ones(7, 1)], 1))
    agents[0].actor.shared.load_state_dict(agents[1].actor.state_dict())
    agents[0].critic.shared.load_state_dict(agents[1].critic.state_dict())
    action = torch.rand(7, 2)
    close(agents[0].critic(x, action), agents[1].critic(x, action), 1e-6)
    for one, two in zip(agents[0].actor(x), agents[1].actor(x), strict=True):
        close(one, two, 1e-6)


def test_actions_of_heads_are_stretched_to_the_environments_box():
    space = gym.spaces.Box(np.float32([-0.1, 0]), np.float32([0.1, 4]))
    args = small_args(mtl, heads=True, context="onehot")
    actor = make_agent(mtl, args, torch.arange(2.0 * K).view(K, 2), space=space).actor
    found = actor.to_env(torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]))
    close(found, torch.tensor([[-0.1, 0.0], [0.1, 4.0], [0.0, 2.0]]), 1e-6)


# ---- playing


def check_an_episode_is_recorded_as_it_was(module):
    """FuseTask's observations count the steps since an episode began, and its rewards tell the time."""
    env = FuseTask(24, actions=BOX)
    env.reset(seed=0)
    agent = make_agent(module, small_args(module, train_tasks=24), env._task.clone(), obs_dim=3)
    episode = module.rollout(agent, module.sample_action, env, env._task.clone())
    horizon = episode["reward"].shape[1]
    ends = env.ends[:horizon].T  # [B, T]
    some_truncated = False
    for b in range(24):
        length = int(ends[b].nonzero()[0]) + 1 if ends[b].any() else horizon
        assert torch.equal(episode["valid"][b], (torch.arange(horizon) < length).float())
        count = torch.arange(length + 1).float()
        assert torch.equal(episode["obs"][b, : length + 1, 1], count)  # the last observation included
        assert torch.equal(episode["reward"][b, :length], 1 + torch.arange(length) + b / 8)
        assert torch.equal(episode["terminated"][b, :length], ends[b, :length].float())
        some_truncated |= not bool(ends[b, :length].any())
    assert some_truncated and 0 < episode["valid"].mean() < 1


def test_recording_goes_red_with_the_wrong_end_or_the_wrong_next_observation():
    check = check_an_episode_is_recorded_as_it_was
    old = '"terminated": terminated.float()'
    red(check, old, '"terminated": (terminated | truncated).float()')  # T6
    red(check, 'observations.append(info["final_obs"])', "observations.append(obs)")  # T7
    red(check, "valid = valid * ~(terminated | truncated)", "pass")  # T9


def test_what_is_told_is_held_through_an_episode_and_goes_through_the_normalizer():
    env, seen = common.make("PointRobot-v0", K, seed=0), []
    args = small_args(mtl)
    agent = make_agent(mtl, args)
    agent.normalizer.see(torch.randn(100, 4) * 3 + 1)

    def act(actor, x, deterministic):
        seen.append(x)
        return mtl.sample_action(actor, x, deterministic)

    context = torch.randn(K, 2)
    episode = mtl.rollout(agent, act, env, context)
    for step, x in enumerate(seen):
        assert torch.equal(x, agent.normalizer(torch.cat([episode["obs"][:, step], context], 1)))
    assert len(seen) == 20


# ---- hindsight


class CodedGoals:
    """The goal that an observation achieves is the observation; being there pays 1 and ends the episode."""

    def achieved_goal(self, obs):
        return obs

    def compute_reward(self, achieved, goal):
        return (achieved == goal).all(-1).float()

    def compute_terminated(self, achieved, goal):
        return (achieved == goal).all(-1)


def check_hindsight(module, her="future", size=20_000):
    """Goals are of the same row and episode, achieved after the step, before the end, all equally often."""
    replay, lengths = coded_replay(module)
    args = small_args(module, her=her, her_k=4, batch_size=size)
    tasks = torch.tensor([2, 0])
    torch.manual_seed(0)
    episode, step = replay.draw(tasks, size)
    batch = replay.take(tasks, episode, step)
    batch["context"] = torch.full((2, size, 3), -7.0)  # the goals that were meant
    env = CodedGoals()
    found = module.hindsight(replay, tasks, batch, episode, step, env, args)
    changed = (found["context"] != -7).all(-1)
    assert changed.sum(1).tolist() == [size * 4 // 5] * 2
    for name in ("obs", "action", "next_obs"):
        assert torch.equal(found[name], batch[name])
    for name in ("reward", "terminated"):
        assert torch.equal(found[name][~changed], batch[name][~changed])
    goal, obs, after = found["context"][changed], batch["obs"][changed], batch["next_obs"][changed]
    assert torch.equal(goal[:, :2], obs[:, :2])  # row and episode
    length = lengths[obs[:, 1].long(), obs[:, 0].long()]
    ahead, most = (goal[:, 2] - obs[:, 2]).long(), length - obs[:, 2].long()
    assert (ahead >= 1).all() and (ahead <= most).all()
    if her == "final":
        assert torch.equal(ahead, most)
    else:
        for left in range(1, 7):
            counts = torch.bincount(ahead[most == left], minlength=left + 1)[1:]
            expected = counts.sum() / left
            assert (counts - expected).abs().max() < 5 * expected**0.5
    reached = (goal == after).all(-1).float()
    assert 0 < reached.mean() < 1
    assert torch.equal(found["reward"][changed], reached)
    assert torch.equal(found["terminated"][changed], reached)


@pytest.mark.parametrize("her", ["future", "final"])
def test_hindsight_goals_were_achieved_later_in_the_same_episode(her):
    check_hindsight(mtl, her)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return step + 1 + (torch", "return step + (torch"),  # T1
        ("(length - step)).long()", "length).long()"),  # T1
        (
            "return step + 1 + (torch.rand(step.shape, device=step.device) * (length",
            "return step + 1 + (0 * (length",
        ),
        ('"terminated": terminated}', '"terminated": batch["terminated"]}'),  # T3
        (
            'achieved = env.achieved_goal(batch["next_obs"])',
            'achieved = env.achieved_goal(batch["obs"])',
        ),  # T3
        ('"reward": env.compute_reward(achieved, goal)', '"reward": batch["reward"]'),  # T3
        ('["obs"][rows, episode, index])', '["obs"][rows, (episode + 1) % replay.capacity, index])'),  # T5
        ('["obs"][rows, episode, index])', '["obs"][rows.flip(0), episode, index])'),  # T5
        ("replay.length[rows, episode], args.her)", "torch.full_like(step, replay.horizon), args.her)"),  # T9
        (
            "return round(args.batch_size * args.her_k / (args.her_k + 1))",
            "return args.batch_size // args.her_k",
        ),
    ],
)
def test_hindsight_goes_red(old, new):
    red(check_hindsight, old, new)


@pytest.mark.parametrize("env_id", ["PointGoal-v0", "PointMaze-v0", "SparsePointGoal-v0", "ReacherGoal-v0"])
@pytest.mark.parametrize("her", ["future", "final"])
def test_relabelled_rewards_are_the_environments_own_on_every_transition(env_id, her):
    """A world that is put where the transition began and given the pretended goal pays the same."""
    if env_id == "ReacherGoal-v0":
        pytest.importorskip("mujoco")
    env = common.make(env_id, K, seed=0)
    env.set_tasks(env.sample_tasks(K))
    env.reset(seed=0)
    args = small_args(mtl, her=her, context="goal", batch_size=40)
    obs_dim, space = env.single_observation_space.shape[0], env.single_action_space
    agent = make_agent(mtl, args, env._task.clone(), obs_dim, space)
    replay = mtl.ReplayBuffer(K, 8, env.horizon, obs_dim, space.shape[0], "cpu")
    for _ in range(3):
        replay.add(mtl.rollout(agent, mtl.sample_action, env, env._task.clone()))
    tasks = torch.arange(K)
    contexts, scales = env._task.clone(), torch.ones(K)
    batch = mtl.draw_batch(replay, tasks, contexts, scales, env, args)
    goals = batch["context"].flatten(0, 1)
    judge = common.make(env_id, len(goals), seed=1)
    judge.set_tasks(goals)
    judge.reset(seed=0)
    if env_id == "ReacherGoal-v0":  # the place of the fingertip is all that its reward reads
        reward = judge._pay(None, batch["next_obs"].flatten(0, 1)[:, 6:].numpy())
        assert np.array_equal(reward.astype(np.float32), batch["reward"].flatten().numpy())
        assert (batch["terminated"] == 0).all() and (batch["reward"] == 0).any()
        return
    shift = 4.0 if env_id == "PointMaze-v0" else 0.0  # its state counts from the corner
    judge._state = batch["obs"].flatten(0, 1) + shift
    action = agent.actor.to_env(batch["action"]).flatten(0, 1)
    _, reward, terminated, _, info = judge.step(action)
    moved = (info["final_obs"] - batch["next_obs"].flatten(0, 1)).abs().max()
    assert moved < 1e-5
    sure = torch.ones(len(goals), dtype=torch.bool)
    if moved > 0:  # rounding may decide at the edge of a goal
        distance = (info["final_obs"] - goals).norm(dim=1)
        sure = ((distance - pointmaze.RADIUS).abs() > 1e-4) & ((distance - 0.2).abs() > 1e-4)
    close(batch["reward"].flatten()[sure], reward[sure], 1e-5)
    assert torch.equal(batch["terminated"].flatten()[sure], terminated.float()[sure])
    assert len(set(batch["reward"].flatten().tolist())) > 1


# ---- the update


def check_equal_shares(module):
    """A batch has as many transitions of each task, whatever its episodes' lengths, told its own context."""
    replay, _ = coded_replay(module)
    replay.length[3] = 1  # this row's episodes are short
    args, seen = small_args(module), []
    contexts = torch.arange(2.0 * K).view(K, 2)
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def step_fn(agent, optimizer, batch, tasks, args):
        assert batch["obs"].shape == (N, M, 3) and torch.equal(
            batch["obs"][..., 0], tasks[:, None].expand(N, M).float()
        )
        assert torch.equal(batch["context"], contexts[tasks][:, None].expand(N, M, 2))
        assert torch.equal(batch["reward"], batch["train_reward"] * scales[tasks][:, None])
        seen.append(tasks.tolist())
        return {"debug/count": torch.tensor(float(len(seen)))}

    found = module.update(None, None, step_fn, replay, contexts, scales, None, 200, args)
    assert found == {"debug/count": 100.5}  # the mean
    assert all(len(set(tasks)) == N for tasks in seen)
    counts = np.bincount(sum(seen, []), minlength=K)
    assert abs(counts - 150).max() < 30


def test_every_task_has_an_equal_share():
    check_equal_shares(mtl)


def test_shares_go_red_from_one_heap_or_when_tasks_never_come():  # T4
    heap = "tasks = replay.length.sum(1).float().multinomial(args.num_tasks)"
    shipped = "tasks = torch.randperm(args.train_tasks, device=replay.length.device)[: args.num_tasks]"
    red(check_equal_shares, shipped, heap)
    red(check_equal_shares, "contexts[tasks][:, None]", "contexts[: len(tasks)][:, None]")
    red(check_equal_shares, "scales[tasks][:, None] * batch", "scales[0] * batch")


def make_batch(seed=0):
    torch.manual_seed(seed)
    batch = {name: torch.randn(N, M, 2).double() for name in ("obs", "next_obs", "context")}
    batch |= {"action": torch.rand(N, M, 2).double() * 2 - 1, "reward": torch.randn(N, M).double()}
    return {**batch, "terminated": (torch.rand(N, M) < 0.4).double()}


def descend_by_one(network, loss):
    grads = torch.autograd.grad(loss, list(network.parameters()))
    with torch.no_grad():
        for p, grad in zip(network.parameters(), grads, strict=True):
            p -= grad


def by_hand(agent, batch, tasks, args, noise):
    """All three losses and their gradients from the definitions, with loops. What descends in steps of 1."""

    def action_of(x):
        for layer in agent.actor.net:
            x = layer(x)
        mean, log_std = x.chunk(2, -1)
        gaussian = Independent(Normal(mean, log_std.clamp(-20, 2).exp()), 1)
        u = mean + log_std.clamp(-20, 2).exp() * noise
        return u.tanh(), gaussian.log_prob(u) - (1 - u.tanh() ** 2).log().sum(-1)

    def q(critic, k, x, action):
        y = torch.cat([x, action], -1)
        for layer, (w, b) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            y = y @ w[k] + b[k]
            y = y.relu() if layer < len(critic.weights) - 1 else y
        return y[..., 0]

    def told(name, n):
        x = torch.cat([batch[name][n], batch["context"][n]], -1)
        return ((x - agent.normalizer.mean) / agent.normalizer.std).clamp(-5, 5)

    alphas = agent.temperature.log_alpha.exp().tolist()
    td, targets = 0.0, []
    for n, task in enumerate(tasks.tolist()):
        with torch.no_grad():
            action, logprob = action_of(told("next_obs", n))
            values = [q(agent.target, k, told("next_obs", n), action) for k in (0, 1)]
            bootstrap = torch.minimum(*values) - alphas[task] * logprob
            y = batch["reward"][n] + args.gamma * torch.where(batch["terminated"][n] > 0, 0.0, bootstrap)
            targets.append(y)
        for k in (0, 1):
            td = td + ((q(agent.critic, k, told("obs", n), batch["action"][n]) - y) ** 2).sum() / (N * M)
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    descend_by_one(agent.critic, td)
    pi, slopes = 0.0, torch.zeros(K).double()
    for n, task in enumerate(tasks.tolist()):
        action, logprob = action_of(told("obs", n))
        best = torch.minimum(*(q(agent.critic, k, told("obs", n), action) for k in (0, 1)))
        pi = pi + (alphas[task] * logprob - best).sum() / (N * M)
        slopes[task] = -alphas[task] * (logprob.detach() - 2).sum() / (N * M)  # in log alpha, H = -2
    descend_by_one(agent.actor, pi)
    with torch.no_grad():
        agent.temperature.log_alpha -= slopes
        for p, name in zip(agent.target.parameters(), agent.critic.state_dict(), strict=True):
            p += args.tau * (agent.critic.state_dict()[name] - before[f"target.{name}"])
    explained = 1 - td.item() / 2 / torch.stack(targets).var(correction=0).item()
    return {"td": td.item(), "pi": pi.item(), "explained": explained}


def check_sac_step(module):
    args = small_args(module, tau=0.3, gamma=0.8)
    agents = [make_agent(module, args).double() for _ in range(2)]
    for agent in agents:
        agent.temperature.log_alpha.data = torch.tensor([0.1, -1.0, -2.0, -3.0]).double()
        torch.manual_seed(5)
        agent.normalizer.see(2 * torch.randn(50, 4) + 1)
    batch, tasks = make_batch(), torch.tensor([2, 0, 3])
    noise = 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: torch.full_like(x, noise))
        optimizer = torch.optim.SGD(agents[0].parameters(), lr=1.0)
        metrics = module.sac_step(agents[0], optimizer, batch, tasks, args)
    expected = by_hand(agents[1], batch, tasks, args, noise)
    for (name, one), two in zip(agents[0].named_parameters(), agents[1].parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-7, atol=1e-9), name
    assert float(metrics["losses/critic"]) == pytest.approx(expected["td"])
    assert float(metrics["losses/actor"]) == pytest.approx(expected["pi"])
    assert float(metrics["debug/explained_variance"]) == pytest.approx(expected["explained"])


def test_a_step_is_that_of_the_definitions_written_with_loops():
    check_sac_step(mtl)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("agent.temperature().detach()[tasks][:, None]", "agent.temperature().detach().mean()"),  # T8
        (
            "agent.temperature().detach()[tasks][:, None]",
            "agent.temperature().detach()[: len(tasks)][:, None]",
        ),  # T8
        (
            "temperature_loss(agent.temperature()[tasks][:, None]",
            "temperature_loss(agent.temperature().mean()",
        ),  # T8
        ("gamma * (1 - terminated) * value", "gamma * value"),  # T6
        ("target_critic(next_x, action).amin(0)", "target_critic(next_x, action).amax(0)"),
        ("agent.actor, agent.critic, x, alpha)", "agent.actor, agent.target, x, alpha)"),
        ("agent.normalizer(torch.cat([batch[name], told], -1))", "torch.cat([batch[name], told], -1)"),
        ("1 - (values - y).square().mean()", "1 - values.square().mean()"),
    ],
)
def test_a_step_goes_red(old, new):
    red(check_sac_step, old, new)


def test_temperatures_of_tasks_with_rewards_of_different_size_move_apart():
    """Two tasks alike but for the size of their rewards: the larger needs the larger temperature."""
    args = small_args(mtl, train_tasks=2, num_tasks=2, batch_size=32, lr=0.01, gamma=0.0, context="onehot")
    agent = make_agent(mtl, args, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr)
    torch.manual_seed(0)
    tasks = torch.arange(2)
    for _ in range(600):
        action = 2 * torch.rand(2, 32, 2) - 1
        reward = torch.tensor([[0.1], [10.0]]) * (1 - (action - 0.3).norm(dim=-1))
        obs, told = torch.zeros(2, 32, 2), torch.eye(2)[:, None].expand(2, 32, 2)
        batch = {"obs": obs, "next_obs": obs, "context": told, "action": action, "reward": reward}
        metrics = mtl.sac_step(agent, optimizer, {**batch, "terminated": torch.ones(2, 32)}, tasks, args)
    small, large = agent.temperature().tolist()
    assert large > 5 * small
    assert float(metrics["debug/alpha_max"]) / float(metrics["debug/alpha_min"]) > 5


def test_a_fixed_temperature_stays():
    args = small_args(mtl, autotune=False, alpha=0.3)
    agent = make_agent(mtl, args).double()
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    mtl.sac_step(agent, optimizer, make_batch(), torch.arange(N), args)
    close(agent.temperature(), torch.full((K,), 0.3).double(), 1e-6)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e39])
def test_a_reward_scale_beyond_float32_is_named(scale):
    with pytest.raises(SystemExit, match="--reward-scale .*one positive number"):
        mtl.check_contextual(small_args(mtl, reward_scale=(scale,)))


def test_each_named_task_has_its_own_reward_scale():
    env = common.make("ClassicControl-v0", 5, seed=0)
    names = ["acrobot", "cartpole", "acrobot", "pendulum", "cartpole"]
    tasks = torch.stack([env.named_tasks[name] for name in names])
    found = mtl.task_scales(env, tasks, small_args(mtl, reward_scale=(1.0, 0.1, 5.0)))
    close(found, torch.tensor([5.0, 1.0, 5.0, 0.1, 1.0]), 1e-6)
    close(mtl.task_scales(env, tasks, small_args(mtl, reward_scale=(3.0,))), torch.full((5,), 3.0), 1e-6)
    with pytest.raises(SystemExit, match="--reward-scale .*one for each of: cartpole, pendulum, acrobot"):
        mtl.task_scales(env, tasks, small_args(mtl, reward_scale=(1.0, 2.0)))
    with pytest.raises(SystemExit, match="some training tasks have no name"):
        mtl.task_scales(env, tasks + 0.5, small_args(mtl, reward_scale=(1.0, 2.0, 3.0)))
    with pytest.raises(SystemExit, match="no task has a name"):
        mtl.task_scales(common.make("PointGoal-v0", 5), tasks, small_args(mtl, reward_scale=(1.0, 2.0)))


# ---- collection and evaluation


def check_collection(module, folder):
    """Told its own task, every step counted by the normalizer, gradient steps in proportion to steps."""
    flags = "--env-id PointRobot-v0 --train-tasks 4 --num-tasks 2 --batch-size 5 --episodes-per-task 2"
    flags += " --updates-per-step 0.05 --eval-tasks 5 --total-timesteps 320 --hidden-size 4 --device cpu"
    steps, told, shipped_step, shipped_rollout = [], [], module.sac_step, module.rollout

    def rollout(agent, act_fn, env, context, *settings):
        episode = shipped_rollout(agent, act_fn, env, context, *settings)
        told.append(torch.equal(context, env._task))
        return episode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sac_step", lambda *a: steps.append(1) or shipped_step(*a))
        patch.setattr(module, "rollout", rollout)
        module.main([*flags.split(), "--run-dir", str(folder)])
    (run,) = folder.iterdir()
    modules = mtl.load_checkpoint(run)["modules"]
    assert len(steps) == 16 and modules["replay"]["count"] == 4  # 4 tasks x 2 episodes x 20 steps, twice
    assert modules["agent"]["normalizer.count"] == 320
    assert len(told) == 6 and all(told)  # in evaluation, too


def test_collection_and_evaluation_tell_each_environment_its_own_task(tmp_path):
    check_collection(mtl, tmp_path / "shipped")
    traps = (
        ("agent.normalizer.see(inputs_of(episode, told_in(episode, contexts, env, args)))", "pass"),
        ("contexts = adapt(agent.tasks, agent", "contexts = adapt(agent.tasks.flip(0), agent"),
        ("context = adapt(tasks, agent", "context = adapt(tasks.flip(0), agent"),
        ("count = max(1, round(steps * args.updates_per_step))", "count = 1"),
    )
    for number, trap in enumerate(traps):
        with pytest.raises(AssertionError):
            check_collection(mutant("mtl_contextual", *trap), tmp_path / str(number))


def quick_evaluate(module, env_id="PointRobot-v0", num_tasks=5, **changes):
    env = common.make(env_id, num_tasks, seed=0)
    args = small_args(module, eval_episodes=3, **changes)
    tasks = env.sample_tasks(num_tasks, split="test")
    space = env.single_action_space
    agent = make_agent(module, args, tasks, env.single_observation_space.shape[0], space)
    return module.evaluate(agent, env, tasks, module.sample_action, args)


def test_evaluation_has_random_numbers_of_its_own():
    reports = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        report = quick_evaluate(mtl)
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        env = common.make("PointRobot-v0", 5, seed=0)
        args = small_args(mtl)
        agent = make_agent(mtl, args)
        torch.manual_seed(seed)
        mtl.evaluate(agent, env, env.sample_tasks(5, split="test"), mtl.sample_action, args)
        assert torch.equal(expected, torch.rand(3))  # and leaves those of training alone
        reports.append(report)
    assert reports[0] == reports[1]
    assert len({reports[0][f"eval/return_ep{k}"] for k in range(3)}) == 3  # each starts elsewhere


def test_evaluation_acts_by_the_mean_unless_told_otherwise():
    one, two = (quick_evaluate(mtl, deterministic_eval=flag) for flag in (True, False))
    assert one["eval/return_ep0"] != two["eval/return_ep0"]


def check_training_ends_with_the_held_out_tasks(module, folder):
    set_tasks, seen = common.TaskVectorEnv.set_tasks, []
    flags = "--env-id PointRobot-v0 --train-tasks 4 --num-tasks 2 --eval-tasks 5 --total-timesteps 80"
    flags += " --device cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common.TaskVectorEnv, "set_tasks", lambda env, tasks: seen.append(tasks) or set_tasks(env, tasks)
        )
        module.main([*flags.split(), "--run-dir", str(folder)])
    held_out = common.make("PointRobot-v0", 5, seed=0).sample_tasks(5, split="test")
    assert len(seen) == 2 and torch.equal(seen[1], held_out)  # training tasks once, then these


def test_evaluation_is_on_frozen_held_out_tasks(tmp_path):
    check_training_ends_with_the_held_out_tasks(mtl, tmp_path / "shipped")
    trapped = mutant("mtl_contextual", 'split="test"', 'split="train"')
    with pytest.raises(AssertionError):
        check_training_ends_with_the_held_out_tasks(trapped, tmp_path / "trapped")


def check_success_of_any_step_counts(module):
    env = FuseTask(6, horizon=20, actions=BOX)  # success at every seventh step
    env.ends[:] = False
    env.reset(seed=0)
    args = small_args(module, train_tasks=6, context="none")
    agent = make_agent(module, args, env._task.clone(), obs_dim=3)
    report = module.evaluate(agent, env, env._task.clone(), module.sample_action, args)
    assert report["eval/success_ep0"] == 1


def test_success_of_any_step_counts():  # T12
    shipped = '(episode["success"] * episode["valid"]).amax(1)'
    red(check_success_of_any_step_counts, shipped, '(episode["success"] * episode["valid"])[:, -1]')


def test_named_tasks_have_means_of_their_own():
    report = quick_evaluate(mtl, "ClassicControl-v0", num_tasks=6, train_tasks=6)
    means = [report[f"eval/return_{name}"] for name in ("cartpole", "pendulum", "acrobot")]
    total = sum(report[f"eval/return_ep{k}"] for k in range(3)) / 3
    assert sum(means) / 3 == pytest.approx(total, rel=1e-5)
    assert means[1] < -500 and means[0] >= 0 and means[2] >= 0


def test_evaluation_counts_the_sparse_reward():
    report = quick_evaluate(mtl, "SparsePointGoal-v0", num_tasks=50)
    assert all(report[f"eval/return_ep{k}"] >= 0 for k in range(3))


def test_a_dense_reward_is_trained_on_unless_hindsight_makes_rewards():
    env = common.make("SparsePointGoal-v0", K, seed=0)
    env.set_tasks(env.sample_tasks(K))
    env.reset(seed=0)
    agent = make_agent(mtl, small_args(mtl), env._task.clone())
    replay = mtl.ReplayBuffer(K, 8, env.horizon, 2, 2, "cpu")
    replay.add(mtl.rollout(agent, mtl.sample_action, env, env._task.clone()))
    settings = (replay, torch.arange(K), env._task.clone(), torch.ones(K), env)
    dense = mtl.draw_batch(*settings, small_args(mtl))
    sparse = mtl.draw_batch(*settings, small_args(mtl, context="goal", her="future"))
    assert (dense["reward"] < 0).all() and (sparse["reward"] >= 0).all()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--her future", "--her future: expected --context goal"),
        ("--heads", "--heads True: expected --context onehot"),
        (
            "--env-id HalfCheetahVel-v0 --context goal --her future",
            "--context goal: expected a task .*whose task rows are goals",
        ),
        (
            "--env-id ClassicControl-v0 --context goal",
            "--context goal: expected .*those of ClassicControl-v0 are not",
        ),
        ("--context goal --her future --batch-size 2", "--batch-size 2: expected more"),
        (
            "--env-id ClassicControl-v0 --context onehot --heads",
            "--train-tasks 200: expected at most 3: more are repetitions",
        ),
        ("--env-id Bandit5-v0", "--env-id Bandit5-v0: expected .*continuous actions"),
        ("--env-id MT1-juggle-v3", "--env-id MT1-juggle-v3: (Meta-World has no juggle-v3|Meta-World cannot)"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, monkeypatch, flags, complaint):
    monkeypatch.setattr(mtl, "rollout", lambda *args: pytest.fail("training began"))
    if "Cheetah" in flags:
        pytest.importorskip("mujoco")
    with pytest.raises(SystemExit, match=f"error: {complaint}"):
        mtl.main([*flags.split(), "--run-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_task_whose_name_begins_like_a_stage_is_no_stage(capsys):
    env = common.make("PointGoal-v0", 1, seed=1)
    metrics = {"eval/return_ep0": -1.5, "eval/return_se_ep0": 0.1, "eval/adapt_steps_ep0": 0.0}
    named = {"eval/return_epsilon": -9.25, "eval/return_episode_2": -8.25}
    mtl.print_report(env, {**metrics, **named}, 4, "episode")
    table = capsys.readouterr().out
    assert "-1.500" in table and "9.25" not in table and "8.25" not in table
    assert plot.stage_numbers({**metrics, **named, "eval/return_ep10": 0.0}) == [0, 10]


# ---- learning


def last_row(folder):
    (log,) = folder.glob("*/metrics.jsonl")
    return json.loads(log.read_text().splitlines()[-1])


@pytest.mark.slow
def test_with_one_task_and_nothing_told_it_is_sac_and_solves_it(tmp_path):
    flags = "--env-id OneGoal-v0 --context none --train-tasks 8 --num-tasks 8 --batch-size 32"
    flags += " --hidden-size 64 --total-timesteps 12000 --updates-per-step 0.1 --lr 0.001 --eval-every 100"
    flags += " --device cpu"
    mtl.main([*flags.split(), "--run-dir", str(tmp_path)])
    best = one_goals_optimum()
    assert last_row(tmp_path)["eval/return_ep0"] > best - 0.7


@pytest.mark.slow
def test_told_the_goal_it_goes_there_and_told_nothing_it_does_not(tmp_path, full):
    """Short: until it has begun to. Full: the README's run."""
    short = ["--total-timesteps", "28000", "--eval-tasks", "500"]
    returns = {}
    for context in ("task", "none"):
        flags = ["--context", context, "--run-dir", str(tmp_path / context), "--device", "cpu"]
        mtl.main([*flags, *([] if full else short), "--eval-every", "1000"])
        returns[context] = last_row(tmp_path / context)["eval/return_ep0"]
    assert returns["task"] > (-0.7 if full else -5) and returns["none"] < -10


@pytest.mark.slow
def test_hindsight_learns_where_nothing_else_does(tmp_path, full):
    """In the maze. Short: it reaches far more goals with hindsight than without."""
    flags = "--env-id PointMaze-v0 --context goal --gamma 0.98 --lr 0.001 --eval-every 1000 --device cpu"
    flags += " --eval-tasks 300 --save-every 1000"
    whole = " --total-timesteps 200000 --updates-per-step 0.05"
    short = " --total-timesteps 40000 --updates-per-step 0.04 --num-tasks 24 --train-tasks 100"
    flags += whole if full else short
    solved = {}
    for her in ("future", "none"):
        mtl.main([*flags.split(), "--her", her, "--run-dir", str(tmp_path / her)])
        solved[her] = last_row(tmp_path / her)["eval/success_ep0"]
    assert solved["future"] > (0.9 if full else 0.3) and solved["none"] < 0.2, solved


def test_nothing_here_is_infinite():
    report = quick_evaluate(mtl, "PointGoal-v0")
    assert all(math.isfinite(value) for value in report.values())
