"""What every task distribution promises, and each family against a naive version of its definition."""

import collections
import contextlib
import importlib.util
import inspect
import sys
import textwrap
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import common
from common import ensembles
from common.base import SEEDS, TaskVectorEnv, box

torch.set_num_threads(1)
IDS = [
    id
    for id in common.ids()
    if gym.spec(id).kwargs is not None and isinstance(gym.spec(id).vector_entry_point, str)
]
MODULE = {id: gym.spec(id).vector_entry_point.split(":")[0] for id in IDS}
IDS = [id for id in IDS if MODULE[id] != "common.metaworld"]  # tests/test_metaworld.py looks at these
IDS = [id for id in IDS if "0.5" not in id and "Friction" not in id]  # tests/test_pairs.py looks at these
MUJOCO = ("common.locomotion", "common.reacher", "common.shifts", "common.mujoco_ensembles")
LOCOMOTION = [id for id in IDS if MODULE[id] in MUJOCO]
RANDOM_STARTS = ["PointRobot-v0", "PointMaze-v0", "PointWall-v0", "PointDoor-v0", "GaussianPair-v0"]
PAIRS = [id for id in IDS if MODULE[id] in ("common.pairs", "common.shifts")]
RANDOM_STARTS += [id for id in IDS if MODULE[id] in ("common.classic", "common.ensembles")]
if importlib.util.find_spec("mujoco") is None:
    IDS = [id for id in IDS if id not in LOCOMOTION]
every_id = pytest.mark.parametrize("env_id", IDS)
B = 6


def make(env_id, **kwargs):
    """common.make, with episodes of 20 steps where steps are slow."""
    return common.make(env_id, **kwargs, **({"horizon": 20} if env_id in LOCOMOTION else {}))


def actions(env, steps, seed=0):
    """Random actions, [steps, B] or [steps, B, act]; in boxes twice as wide as the bounds."""
    generator, space = torch.Generator().manual_seed(seed), env.single_action_space
    if isinstance(space, gym.spaces.Discrete):
        return torch.randint(int(space.n), (steps, env.num_envs), generator=generator)
    low, high = torch.from_numpy(2 * space.low), torch.from_numpy(2 * space.high)
    return low + (high - low) * torch.rand(steps, env.num_envs, *space.shape, generator=generator)


def play(env, steps, seed=0):
    """Everything that `steps` random steps return, each thing stacked to [steps, B, ...]."""
    taken = [env.step(action) for action in actions(env, steps, seed)]
    names = ("obs", "reward", "terminated", "truncated")
    out = {name: torch.stack([step[i] for step in taken]) for i, name in enumerate(names)}
    return {**out, **{name: torch.stack([step[4][name] for step in taken]) for name in taken[0][4]}}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---- the contract


@every_id
def test_spaces_shapes_and_dtypes_are_what_the_contract_says(env_id):
    env = make(env_id, num_envs=B, seed=0)
    assert isinstance(env, gym.vector.VectorEnv) and env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.spec.id == env_id and env.horizon >= 1 and env.num_envs == B
    tasks = env.sample_tasks(7)
    assert tasks.dtype == torch.float32 and tasks.shape == (7, *env.task_space.shape)
    assert all(env.task_space.contains(row) for row in tasks.numpy())
    obs, info = env.reset(seed=0)
    assert obs.dtype == torch.float32 and env.observation_space.contains(obs.numpy()) and info == {}
    for action in actions(env, 2 * env.horizon + 1):
        obs, reward, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(obs.numpy()) and env.observation_space.contains(
            info["final_obs"].numpy()
        )
        assert reward.dtype == torch.float32 and terminated.dtype == truncated.dtype == torch.bool
        assert reward.shape == terminated.shape == truncated.shape == (B,)
        assert {tensor.device for tensor in (obs, reward, terminated, truncated, *info.values())} == {
            env.device
        }


@every_id
def test_every_returned_tensor_may_be_overwritten_by_the_caller(env_id):
    runs = []
    for vandal in (False, True):
        env = make(env_id, num_envs=B, seed=0)
        tasks = env.sample_tasks(B)
        env.set_tasks(tasks)
        out = [env.reset(seed=0)[0].clone()]
        for action in actions(env, 2 * env.horizon + 3):
            obs, reward, terminated, truncated, info = env.step(action)
            tensors = [obs, reward, terminated, truncated, *info.values()]
            # writing into one leaves the others alone
            assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
            out += [tensor.clone() for tensor in tensors]
            if vandal:
                for tensor in [*tensors, tasks, action, env.sample_tasks(3, split="test")]:
                    tensor.fill_(1)
        out.append(env.sample_tasks(3, split="test"))
        runs.append(out)
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@every_id
def test_after_an_episodes_end_obs_is_a_first_observation_and_the_task_stays(env_id):
    env = make(env_id, num_envs=B, seed=0)
    tasks = env.sample_tasks(B)
    env.set_tasks(tasks)
    first, _ = env.reset(seed=0)
    steps = play(env, 3 * env.horizon)
    ended = steps["terminated"] | steps["truncated"]
    assert ended.any(0).all()
    assert torch.equal(steps["obs"][~ended], steps["final_obs"][~ended])
    if env_id == "PointRobot-v0":
        assert (steps["obs"][ended].abs() <= 1).all()  # its starts are random
    elif env_id not in (*LOCOMOTION, *RANDOM_STARTS):  # as are these; other tests look at them
        assert torch.equal(steps["obs"][ended], first.expand(len(ended), *first.shape)[ended])
    assert torch.equal(env.state_dict()["_task"], tasks)


@every_id
def test_no_episode_outlives_the_horizon_and_only_time_truncates(env_id):
    env = make(env_id, num_envs=B, seed=0)
    env.reset(seed=0)
    steps = play(env, 3 * env.horizon)
    assert not (steps["terminated"] & steps["truncated"]).any()
    age = torch.zeros(B, dtype=torch.int64)
    for terminated, truncated in zip(steps["terminated"], steps["truncated"], strict=True):
        age += 1
        assert torch.equal(truncated, (age == env.horizon) & ~terminated)
        age[terminated | truncated] = 0
    if env_id in ("TabularMDP-v0", "GridNavi-v0", "PointRobot-v0", "SparsePointGoal-v0"):
        assert not steps["terminated"].any()
    if env_id.startswith("Bandit"):
        assert steps["terminated"].all()


@every_id
def test_new_tasks_wait_for_the_reset_and_a_step_before_it_raises(env_id):
    env = make(env_id, num_envs=B, seed=0)
    action = actions(env, 1)[0]
    with pytest.raises(gym.error.ResetNeeded):
        env.step(action)
    env.reset(seed=0)
    old, new = env.state_dict()["_task"], env.sample_tasks(B)
    env.set_tasks(new)
    assert torch.equal(env.state_dict()["_task"], old)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(action)
    env.reset()
    env.step(action)
    assert torch.equal(env.state_dict()["_task"], new)
    with pytest.raises(ValueError, match=f"set_tasks needs \\[{B}, "):
        env.set_tasks(new[:-1])


@every_id
def test_two_environments_given_the_same_row_are_the_same_mdp(env_id):
    left, right = make(env_id, num_envs=B, seed=1), make(env_id, num_envs=B, seed=2)
    row = left.sample_tasks(1)
    left.sample_tasks(9), right.set_tasks(row.expand(B, -1)), left.set_tasks(row.expand(B, -1))
    assert torch.equal(left.reset(seed=3)[0], right.reset(seed=3)[0])
    assert same(play(left, 2 * left.horizon + 1), play(right, 2 * left.horizon + 1))


@every_id
def test_construction_seeds_the_tasks_and_reset_seeds_the_dynamics(env_id):
    def run(construction, dynamics):
        env = make(env_id, num_envs=B, seed=construction)
        tasks = env.sample_tasks(B)
        obs, _ = env.reset(seed=dynamics)
        fresh = env.state_dict()["_task"]  # with no tasks set, reset draws training tasks
        return {"tasks": tasks, "fresh": fresh, "first": obs, **play(env, 20)}

    assert same(run(1, 2), run(1, 2)) and same(run(1, None), run(1, None))
    base, other_tasks, other_dynamics = run(1, 2), run(7, 2), run(1, 7)
    assert torch.equal(base["tasks"], other_dynamics["tasks"]) and torch.equal(
        base["fresh"], other_dynamics["fresh"]
    )
    if env_id not in PAIRS and MODULE[env_id] != "common.classic":  # which has its three tasks in turn
        assert not torch.equal(base["tasks"], other_tasks["tasks"])
    # the others are deterministic
    if env_id.startswith("Bandit") or env_id in ("TabularMDP-v0", *RANDOM_STARTS, *LOCOMOTION):
        assert not same(base, other_dynamics)


@every_id
def test_global_random_states_are_neither_read_nor_written(env_id):
    def run():
        env = make(env_id, num_envs=B, seed=0)
        return {
            "train": env.sample_tasks(5),
            "test": env.sample_tasks(5, "test"),
            "first": env.reset(seed=0)[0],
            **play(env, 20),
        }

    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = run()
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(99)
    assert same(first, run())


@pytest.mark.parametrize("seed", [0, 1, 7, SEEDS - 1])
def test_reward_noise_does_not_repeat_the_draw_of_the_task(seed):
    n = 4000  # on one stream, the payout would compare p with itself
    env = common.make("Bandit5-v0", num_envs=n, seed=seed)
    tasks = env.sample_tasks(n)
    env.set_tasks(tasks)
    env.reset(seed=seed)
    for arm in range(5):
        reward = env.step(torch.full((n,), arm))[1]
        noise = torch.rand(n, generator=torch.Generator().manual_seed(seed))
        assert abs(np.corrcoef(reward - tasks[:, arm], tasks[:, arm])[0, 1]) < 0.06  # four standard errors
        assert abs(np.corrcoef(reward - tasks[:, arm], noise)[0, 1]) < 0.06
    assert abs(float(reward.mean()) - 0.5) < 0.04


@every_id
def test_the_held_out_set_is_frozen_and_no_training_seed_repeats_it(env_id):
    env = make(env_id, num_envs=2, seed=3)
    held_out = env.sample_tasks(env.num_test_tasks, split="test")
    env.reset(seed=5), play(env, 3), env.sample_tasks(11)
    other = make(env_id, num_envs=5, seed=4)
    assert torch.equal(held_out[:10], other.sample_tasks(10, split="test"))
    assert torch.equal(held_out, env.sample_tasks(env.num_test_tasks, split="test"))
    with pytest.raises(ValueError, match="held-out set has"):
        env.sample_tasks(env.num_test_tasks + 1, split="test")
    with pytest.raises(ValueError, match="'train' or 'test'"):
        env.sample_tasks(1, split="validation")
    if env_id in ("GridNavi-v0", "HalfCheetahDir-v0", "AntDir-v0") or MODULE[env_id] == "common.classic":
        # all tasks, and they say so
        assert set(map(tuple, held_out.tolist())) == set(map(tuple, env.sample_tasks(999).tolist()))
        return
    known = set(map(tuple, held_out[:1000].tolist()))
    a_grid = bool(env.test_groups) and len(known) == env.num_test_tasks
    assert len(known) > 990 or a_grid or env_id in PAIRS  # whose target is one row
    for seed in (0, 7, SEEDS - 1):
        training = make(env_id, num_envs=2, seed=seed).sample_tasks(1000)
        assert known.isdisjoint(map(tuple, training.tolist()))


@every_id
def test_a_resumed_environment_continues_bit_for_bit_from_the_middle_of_an_episode(env_id, tmp_path):
    env = make(env_id, num_envs=B, seed=0)
    env.set_tasks(env.sample_tasks(B))
    env.reset(seed=0)
    play(env, env.horizon + env.horizon // 2)
    saved = env.state_dict()
    torch.save(saved, tmp_path / "state.pt")
    copies = {name: value.clone() for name, value in saved.items() if torch.is_tensor(value)}
    expected, tasks = play(env, 2 * env.horizon, seed=1), env.sample_tasks(4)
    # a state once taken does not move
    assert all(torch.equal(saved[name], copy) for name, copy in copies.items())
    other = make(env_id, num_envs=B, seed=77)
    other.reset(seed=5)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(expected, play(other, 2 * env.horizon, seed=1)) and torch.equal(tasks, other.sample_tasks(4))
    with pytest.raises(ValueError, match="this state has tasks"):
        make(env_id, num_envs=B + 1).load_state_dict(saved)


@every_id
def test_announced_tasks_survive_a_resume(env_id):
    env, other = make(env_id, num_envs=B, seed=0), make(env_id, num_envs=B, seed=1)
    other.load_state_dict(env.state_dict())  # even before anything has happened
    env.reset(seed=0)
    env.set_tasks(env.sample_tasks(B))
    other.load_state_dict(env.state_dict())
    with pytest.raises(gym.error.ResetNeeded):
        other.step(actions(other, 1)[0])
    assert torch.equal(env.reset()[0], other.reset()[0]) and same(play(env, 12), play(other, 12))


def test_make_names_the_known_ids_when_it_does_not_know_one():
    for wrong in ("Bandit6-v0", "CartPole-v1", "nothing"):
        with pytest.raises(ValueError, match="GridNavi-v0.*PointGoal-v0"):
            common.make(wrong, num_envs=2)
    with pytest.raises(ValueError, match="at least 1"):
        common.make("Bandit5-v0", num_envs=0)
    for seed in (-1, SEEDS):
        with pytest.raises(ValueError, match="seed must be in"):
            common.make("Bandit5-v0", num_envs=2, seed=seed)
        with pytest.raises(ValueError, match="seed must be in"):
            common.make("Bandit5-v0", num_envs=2).reset(seed=seed)


# ---- the definitions, against naive versions


def started(env_id, tasks, **kwargs):
    env = common.make(env_id, num_envs=len(tasks), seed=0, **kwargs)
    env.set_tasks(tasks)
    return env, env.reset(seed=0)[0]


def test_a_bandit_arm_pays_as_often_as_its_row_says():
    chances = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    env, _ = started("Bandit5-v0", chances.expand(20_000, 5))
    for arm, chance in enumerate(chances.tolist()):
        obs, reward, *_ = env.step(torch.full((20_000,), arm))
        assert set(reward.tolist()) <= {0.0, 1.0} and (obs == 1).all()
        assert abs(float(reward.mean()) - chance) <= 4 * (chance * (1 - chance) / 20_000) ** 0.5


def test_bandit_tasks_are_uniform_and_best_arm_is_the_optimal_reference():
    for arms in (5, 10, 50):
        env = common.make(f"Bandit{arms}-v0", num_envs=1, seed=0)
        tasks = env.sample_tasks(20_000)
        assert (
            tasks.shape[1] == arms
            and abs(float(tasks.mean()) - 0.5) < 0.01
            and abs(float(tasks.var()) - 1 / 12) < 0.002
        )
        assert abs(float(tasks.max(1).values.mean()) - env.references["optimal"]) < 0.006


def test_tabular_mdps_move_and_pay_as_their_tables_say():
    n = 20_000
    env = common.make("TabularMDP-v0", num_envs=n, seed=0)
    row = env.sample_tasks(1)
    transitions, rewards = (table[0].numpy() for table in env.tables(row))
    assert (
        transitions.shape == (10, 5, 10)
        and rewards.shape == (10, 5)
        and np.allclose(transitions.sum(-1), 1, atol=1e-5)
    )
    env, obs = started("TabularMDP-v0", row.expand(n, -1))
    assert (obs.argmax(1) == 0).all()
    seen, paid = np.zeros((10, 5, 10)), collections.defaultdict(list)
    for action in actions(env, 30):
        state = obs.argmax(1).numpy()
        obs, reward, _, truncated, info = env.step(action)
        assert ((info["final_obs"] == 0) | (info["final_obs"] == 1)).all() and (
            info["final_obs"].sum(1) == 1
        ).all()
        np.add.at(seen, (state, action.numpy(), info["final_obs"].argmax(1).numpy()), 1)
        for pair in range(50):
            paid[pair].append(reward.numpy()[state * 5 + action.numpy() == pair])
        if truncated.all():
            assert (obs.argmax(1) == 0).all()
    visits = seen.sum(-1, keepdims=True)
    error = 5 * np.sqrt(transitions * (1 - transitions) / visits) + 5 / visits
    assert (np.abs(seen / visits - transitions) <= error).all()
    for pair, samples in paid.items():
        samples = np.concatenate(samples)
        assert abs(samples.mean() - rewards.flat[pair]) < 5 / len(samples) ** 0.5
        assert abs(samples.std() - 1) < 5 / len(samples) ** 0.5


def test_tabular_tables_come_from_the_flat_dirichlet_and_from_n_1_1():
    env = common.make("TabularMDP-v0", num_envs=1, seed=0)
    transitions, rewards = env.tables(env.sample_tasks(2000))
    assert abs(float(rewards.mean()) - 1) < 0.015 and abs(float(rewards.std()) - 1) < 0.015
    assert abs(float(transitions.mean()) - 0.1) < 1e-5
    # Dirichlet(1, ..., 1): (k - 1) / (k^2 (k + 1))
    assert abs(float(transitions.var()) - 9 / (100 * 11)) < 1e-4
    assert float(transitions.isnan().sum()) == 0


def test_gridnavi_moves_cell_by_cell_as_on_squared_paper():
    moves = [(0, 0), (-1, 0), (0, 1), (1, 0), (0, -1)]
    env = common.make("GridNavi-v0", num_envs=21, seed=0)
    goals = env.sample_tasks(21, split="test")
    assert {tuple(goal) for goal in goals.int().tolist()} == {
        (r, c) for r in range(5) for c in range(5) if r > 1 or c > 1
    }
    env, obs = started("GridNavi-v0", goals)
    assert (obs.argmax(1) == 0).all()
    place = [(0, 0)] * 21
    for step, action in enumerate(actions(env, 60), start=1):
        obs, reward, terminated, truncated, info = env.step(action)
        for i in range(21):
            r, c = place[i][0] + moves[action[i]][0], place[i][1] + moves[action[i]][1]
            place[i] = (min(max(r, 0), 4), min(max(c, 0), 4))
            assert info["final_obs"][i].nonzero().tolist() == [[5 * place[i][0] + place[i][1]]]
            assert float(reward[i]) == pytest.approx(1 if list(place[i]) == goals[i].tolist() else -0.1)
        assert bool(truncated.all()) == (step % 15 == 0)
        if step % 15 == 0:
            place = [(0, 0)] * 21


def test_gridnavi_told_the_goal_walks_straight_there_and_earns_11_07_on_average():
    env = common.make("GridNavi-v0", num_envs=21, seed=0)
    goals = env.sample_tasks(21, split="test")
    env, obs = started("GridNavi-v0", goals)
    total = torch.zeros(21)
    for _ in range(15):
        cell = obs.argmax(1)
        down, right = cell // 5 < goals[:, 0], cell % 5 < goals[:, 1]
        obs, reward, *_ = env.step(torch.where(down, 3, torch.where(right, 2, 0)))
        total += reward
    distance = goals.sum(1)
    assert torch.allclose(total, (16 - distance) - 0.1 * (distance - 1))
    assert float(total.mean()) == pytest.approx(11.07, abs=0.005)


def naive_point(env_id, place, goal, action):
    """One step of the point, in float64. Returns place, reward, terminated, info."""
    bound = 0.1 if env_id == "PointGoal-v0" else 1.0
    place = place + 0.1 / bound * np.clip(action, -bound, bound)
    distance = np.sqrt(((place - goal) ** 2).sum(-1))
    if env_id == "PointGoal-v0":
        near = (np.abs(place - goal) < 0.01).all(-1)
        return place, -distance, near, {"success": near}
    if env_id == "PointRobot-v0":
        return place, -distance, np.zeros(len(place), bool), {}
    near = distance <= 0.2
    return (
        place,
        np.where(near, 1 - distance, 0),
        np.zeros(len(place), bool),
        {"dense_reward": -distance, "success": near},
    )


@pytest.mark.parametrize("env_id", ["PointGoal-v0", "PointRobot-v0", "SparsePointGoal-v0"])
def test_points_move_pay_and_end_as_defined(env_id):
    n = 200
    env = common.make(env_id, num_envs=n, seed=0)
    tasks = env.sample_tasks(n)
    env, obs = started(env_id, tasks)
    assert (obs == 0).all() or env_id == "PointRobot-v0"
    goal, bound = tasks.double().numpy(), float(env.single_action_space.high[0])
    assert bound == pytest.approx(0.1 if env_id == "PointGoal-v0" else 1.0)
    age, arrived = np.zeros(n, int), 0
    generator = torch.Generator().manual_seed(0)
    for step in range(2 * env.horizon):
        # half the points search blindly, half walk to the goal
        noise = bound * torch.randn(n, 2, generator=generator)
        action = torch.where(torch.arange(n)[:, None] % 2 == 0, (tasks - obs) * 10 * bound, noise)
        place = obs.double().numpy()
        obs, reward, terminated, truncated, info = env.step(action)
        place, naive_reward, naive_terminated, naive_info = naive_point(
            env_id, place, goal, action.double().numpy()
        )
        edge = np.abs(np.abs(place - goal) - 0.01).min(-1) < 1e-5  # where rounding decides
        edge |= (
            np.abs(np.abs(naive_reward if env_id == "PointRobot-v0" else np.hypot(*(place - goal).T)) - 0.2)
            < 1e-5
        )
        assert np.allclose(info["final_obs"], place, atol=1e-5)
        assert np.allclose(reward[~edge], naive_reward[~edge], atol=1e-5)
        assert (terminated.numpy()[~edge] == naive_terminated[~edge]).all()
        assert set(info) == {"final_obs", *naive_info}
        for name, value in naive_info.items():
            assert np.allclose(info[name][~edge], value[~edge], atol=1e-5)
        age, arrived = age + 1, arrived + int(terminated.sum())
        ended = (terminated | truncated).numpy()
        assert (truncated.numpy() == ((age == env.horizon) & ~terminated.numpy())).all()
        age[ended] = 0
        assert step == 0 or (obs[ended] == 0).all() or env_id == "PointRobot-v0"
    assert (arrived > n) == (env_id == "PointGoal-v0")


def test_point_goals_come_from_the_papers_distributions():
    sample = {
        id: common.make(id, num_envs=1, seed=0).sample_tasks(20_000)
        for id in IDS
        if MODULE[id] == "common.points"
    }
    for env_id, half in (("PointGoal-v0", 0.5), ("PointRobot-v0", 1.0)):
        assert sample[env_id].abs().max() <= half and abs(float(sample[env_id].std()) - half / 3**0.5) < 0.01
    x, y = sample["SparsePointGoal-v0"].T
    assert torch.allclose(x**2 + y**2, torch.ones(20_000)) and (y >= -1e-6).all()
    angle = torch.atan2(y, x) / torch.pi
    assert abs(float(angle.mean()) - 0.5) < 0.01 and abs(float(angle.var()) - 1 / 12) < 0.002


# ---- the maze

NORTH, EAST, SOUTH, WEST = (-1, 0), (0, 1), (1, 0), (0, -1)
COMPASS = [NORTH, EAST, SOUTH, WEST]


def unpack(row, side=9):
    """A task row -> walls [side, side], start (row, column), heading, target (row, column)."""
    start, target = divmod(int(row[-2]), 4), int(row[-1])
    return row[:-2].reshape(side, side).astype(int), divmod(start[0], side), start[1], divmod(target, side)


def paths(walls, start):
    """Breadth first from start: {square: the square before it}."""
    before, queue = {start: None}, collections.deque([start])
    while queue:
        r, c = queue.popleft()
        for dr, dc in COMPASS:
            square = (r + dr, c + dc)
            if not walls[square] and square not in before:
                before[square] = (r, c)
                queue.append(square)
    return before


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_maze_is_a_tree_over_all_rooms_and_the_target_is_in_another_room(split):
    tasks = common.make("Maze-v0", num_envs=1, seed=0).sample_tasks(200, split=split).numpy()
    headings = collections.Counter()
    for row in tasks:
        walls, start, heading, target = unpack(row)
        rooms = {(r, c) for r in range(1, 9, 2) for c in range(1, 9, 2)}
        free = {tuple(square) for square in np.argwhere(walls == 0)}
        assert walls[[0, -1]].all() and walls[:, [0, -1]].all() and rooms <= free
        assert len(free) == len(rooms) + len(rooms) - 1  # rooms^2 - 1 doors, and connected: a tree
        assert paths(walls, start).keys() == free
        assert start in rooms and target in rooms and start != target
        headings[heading] += 1
    assert set(headings) == {0, 1, 2, 3}
    assert len({tuple(row[:81]) for row in tasks}) > 190  # a new maze in nearly every task


@pytest.mark.parametrize(("rooms", "kwargs"), [(4, {}), (3, {"rooms": 3, "horizon": 40})])
def test_the_maze_window_shows_the_walls_around_as_a_rotated_map_and_walls_stop_the_agent(rooms, kwargs):
    side, n = 2 * rooms + 1, 12
    env = common.make("Maze-v0", num_envs=n, seed=0, **kwargs)
    tasks = env.sample_tasks(n)
    env, obs = started("Maze-v0", tasks, **kwargs)
    mazes = [unpack(row, side) for row in tasks.numpy()]
    place, heading = [start for _, start, _, _ in mazes], [turned for _, _, turned, _ in mazes]
    age, bumps, found = [0] * n, 0, 0

    def check(seen, i):
        r, c = place[i]
        # counter-clockwise: what is East comes to lie on top
        window = np.rot90(mazes[i][0][r - 1 : r + 2, c - 1 : c + 2], heading[i])
        assert seen[:9].tolist() == window.flatten().tolist()
        assert seen[9:].tolist() == np.eye(4)[heading[i]].tolist()

    generator = torch.Generator().manual_seed(1)
    for _ in range(400):
        action = torch.multinomial(torch.tensor([1.0, 1.0, 3.0]), n, replacement=True, generator=generator)
        obs, reward, terminated, truncated, info = env.step(action)
        for i, (walls, start, first_heading, target) in enumerate(mazes):
            dr, dc = COMPASS[heading[i]]
            ahead = (place[i][0] + dr, place[i][1] + dc)
            if action[i] == 2:
                bumps += int(walls[ahead])
                place[i] = place[i] if walls[ahead] else ahead
            else:
                heading[i] = (heading[i] + (1 if action[i] == 1 else -1)) % 4
            check(info["final_obs"][i], i)
            age[i] += 1
            success = place[i] == target
            found += success
            assert bool(terminated[i]) == bool(info["success"][i]) == success
            assert float(reward[i]) == pytest.approx(1.0 if success else -0.01)
            assert bool(truncated[i]) == (age[i] == env.horizon and not success)
            if success or truncated[i]:
                place[i], heading[i], age[i] = start, first_heading, 0
            check(obs[i], i)
    assert bumps > 100 and found > 10


def test_the_mazes_target_cannot_be_seen():
    env = common.make("Maze-v0", num_envs=16, seed=0)
    tasks = env.sample_tasks(1).repeat(16, 1)
    rooms = torch.tensor([9 * r + c for r in range(1, 9, 2) for c in range(1, 9, 2)])
    tasks[:, -1] = rooms  # the same maze with the target in every room in turn
    env, obs = started("Maze-v0", tasks)
    assert (obs == obs[0]).all()
    action, alive = actions(env, 100)[:, :1].expand(100, 16), torch.ones(16, dtype=torch.bool)
    for step in range(99):
        final_obs = env.step(action[step])[4]["final_obs"]
        assert (final_obs[alive] == final_obs[alive][0]).all()
        alive &= env.state_dict()["_deadline"] == 100


def test_the_shortest_path_through_the_maze_reaches_the_target():
    n = 64
    env = common.make("Maze-v0", num_envs=n, seed=0)
    tasks = env.sample_tasks(n)
    env, _ = started("Maze-v0", tasks)
    plans = []
    for row in tasks.numpy():
        walls, start, heading, target = unpack(row)
        before, route, plan = paths(walls, start), [target], []
        while route[-1] != start:
            route.append(before[route[-1]])
        for (r, c), (next_r, next_c) in zip(route[::-1], route[-2::-1], strict=False):
            wanted = COMPASS.index((next_r - r, next_c - c))
            plan += {0: [], 1: [1], 2: [1, 1], 3: [0]}[(wanted - heading) % 4] + [2]
            heading = wanted
        plans.append(plan)
    assert max(map(len, plans)) < env.horizon  # every maze can be solved in time
    done = torch.zeros(n, dtype=torch.int64)
    for step in range(max(map(len, plans))):
        action = torch.tensor([plan[step] if step < len(plan) else 0 for plan in plans])
        terminated = env.step(action)[2]
        assert terminated.tolist() == [len(plan) == step + 1 for plan in plans]
        done += terminated
    assert (done == 1).all()


# ---- families of one's own


def sledge(module):
    """The class that a docstring shows, as a reader would copy it, but for its name in the registry."""
    lines = inspect.getdoc(module).split("\n")
    first, last = (
        next(i for i, line in enumerate(lines) if line.strip().startswith(start))
        for start in ("import gymnasium", "gym.register(")
    )
    names = {}
    exec(textwrap.dedent("\n".join(lines[first:last])), names)
    return names["Sledge"]


def test_the_family_of_the_docstring_can_be_played():
    env = sledge(common.base)(3, device="cpu", seed=1)
    env.set_tasks(env.sample_tasks(3, split="test"))
    obs, _ = env.reset(seed=2)
    for step in range(50):
        obs, reward, terminated, truncated, info = env.step(torch.ones(3, 1))
        assert obs.shape == (3, 2) and not terminated.any() and bool(truncated.all()) == (step == 49)
    assert info["final_obs"][:, 0].std() > 0 and (obs == 0).all()  # friction differs; a new episode has begun


def test_the_ensemble_of_the_docstring_can_be_played_and_simulated():
    env = sledge(ensembles.Ensemble)(4, seed=1)
    tasks = env.sample_tasks(4)
    env.set_tasks(tasks)
    _, info = env.reset(seed=2, options={"state": True})
    after = env.simulate(tasks, info["state"], torch.ones(4, 1))
    assert (env.step(torch.ones(4, 1))[4]["state"] == after).all() and after.dtype == torch.float64
    assert env.ensemble.shape == (4, 3) and set(env.named_tasks) == {"mean", "target"}
    assert [part.stop - part.start for part in env.test_groups.values()] == [21, 20, 14]


def changed(**names):
    base = sledge(common.base)
    return type("Changed", (base,), names)(2, seed=1)


@pytest.mark.parametrize(
    "returned, message",
    [
        ((torch.zeros(2, 2), torch.zeros(2, 1), None, {}), r"a reward is float32 \[2\], got .*\[2, 1\]"),
        ((torch.zeros(2, 2), torch.zeros(2).double(), None, {}), r"a reward is float32 \[2\], got float64"),
        ((torch.zeros(2, 2), [0, 0], None, {}), r"a reward is float32 \[2\], got a list"),
        ((torch.zeros(2, 3), torch.zeros(2), None, {}), r"_observe gives float32 \[2, 3\], expected .*2\]"),
        ((torch.zeros(2, 2), torch.zeros(2), torch.zeros(2).bool(), {}), "terminates is False"),
    ],
)
def test_what_a_family_may_not_return_is_said_at_its_first_step(returned, message):
    env = changed(_transition=lambda self, state, action: returned)
    env.reset(seed=1)
    with pytest.raises(ValueError, match=f"Changed: {message}"):
        env.step(torch.zeros(2, 1))


def test_a_dense_reward_is_like_the_reward():
    step = (torch.zeros(2, 2), torch.zeros(2), None, {"dense_reward": torch.zeros(2, 1)})
    env = changed(_transition=lambda self, state, action: step)
    env.reset(seed=1)
    with pytest.raises(common.ContractError, match=r"dense_reward is like reward, got float32 \[2, 1\]"):
        env.step(torch.zeros(2, 1))


def test_memory_that_is_used_again_is_refused_before_anything_is_learned_from_it():
    kept, reward = torch.zeros(2, 2), torch.zeros(2)
    same_obs = {"_observe": lambda self, state: state, "_start": lambda self: kept}
    same_obs["_transition"] = lambda self, state, action: (state.add_(1), torch.zeros(2), None, {})
    same_reward = {"_transition": lambda self, state, action: (state + 1, reward.add_(1), None, {})}
    for names, what in ((same_obs, "_observe"), (same_reward, "the reward")):
        env = changed(**names)
        env.reset(seed=1), env.step(torch.zeros(2, 1))
        with pytest.raises(common.ContractError, match=f"{what} must be a new tensor at every step"):
            env.step(torch.zeros(2, 1))
    env = changed()
    env.reset(seed=1), env.step(torch.zeros(2, 1))
    other = changed()
    other.load_state_dict(env.state_dict())  # resumed between the two steps that are compared
    other.step(torch.zeros(2, 1))
    constant = changed(_transition=lambda self, state, action: (state + 1, reward, None, {}))
    constant.reset(seed=1)
    for _ in range(3):
        constant.step(torch.zeros(2, 1))  # the same tensor, but nobody writes into it


def test_held_out_tasks_come_from_their_generator_alone():
    env = changed(_draw_tasks=lambda self, n, generator: torch.rand(n, 1))
    with pytest.raises(common.ContractError, match="Changed: tasks must be drawn from the generator alone"):
        env.sample_tasks(2, split="test")


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("compute_reward", lambda self, achieved, goal: (achieved[..., 0] - 1).abs(), "rewards of its steps"),
        ("compute_terminated", lambda self, achieved, goal: achieved[..., 0] < 9, "end its episodes"),
    ],
)
def test_a_subclass_whose_goals_say_something_else_than_it_does_is_refused(name, function, message):
    goals = {
        "goal_space": box(0, 1, (1,)),
        "achieved_goal": lambda self, obs: obs[..., :1],
        "compute_reward": lambda self, achieved, goal: -(achieved[..., 0] - 1).abs(),
        "compute_terminated": lambda self, achieved, goal: torch.zeros_like(achieved[..., 0]).bool(),
    }
    for right in (True, False):
        env = changed(**{**goals, **({} if right else {name: function})})
        env.reset(seed=1)
        with contextlib.nullcontext() if right else pytest.raises(common.ContractError, match=message):
            env.step(torch.ones(2, 1))


def test_success_and_ends_have_to_be_given_as_they_were_announced():
    step = (torch.zeros(2, 2), torch.zeros(2), torch.zeros(2), {})
    for names, message in (
        ({"terminates": True}, "bool, got torch.float32"),
        ({"has_success": True}, "no success"),
    ):
        returned = step if "terminates" in names else (*step[:2], None, {})
        env = changed(_transition=lambda self, state, action, returned=returned: returned, **names)
        env.reset(seed=1)
        with pytest.raises(ValueError, match=message):
            env.step(torch.zeros(2, 1))


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(-np.inf, np.inf, (1,)),
        gym.spaces.Box(-1, 1, (1, 1)),
        gym.spaces.Discrete(3, start=1),
        gym.spaces.MultiDiscrete([2, 2]),
        gym.spaces.Box(-1, 1, (1,), dtype=np.float64),
    ],
)
def test_actions_that_no_script_could_draw_are_refused_at_once(space):
    with pytest.raises(ValueError, match="Discrete from 0 or a flat Box with finite bounds, of float32, got"):
        TaskVectorEnv(2, box(-9, 9, (2,)), space, box(0, 1, (1,)), 50)


@pytest.mark.parametrize(
    "space", [gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, ()), gym.spaces.Box(0, 1, (2, 2))]
)
def test_observations_that_no_script_could_read_are_refused_at_once(space):
    with pytest.raises(ValueError, match="observations: a flat Box, got"):
        TaskVectorEnv(2, space, box(-1, 1, (1,)), box(0, 1, (1,)), 50)


@pytest.mark.parametrize(
    ("seen", "given"),
    [
        (lambda self, state: state.double(), r"float64 \[2, 2\]"),
        (lambda self, state: state[:, :1].clone(), r"float32 \[2, 1\]"),
        (lambda self, state: state.numpy(), "a ndarray"),
    ],
)
def test_first_observations_of_the_wrong_kind_are_refused_at_the_reset(seen, given):
    with pytest.raises(
        common.ContractError, match=rf"Changed: _observe gives {given}, expected float32 \[2, 2\]"
    ):
        changed(_observe=seen).reset(seed=1)


def test_first_observations_that_are_not_finite_are_refused_at_the_reset():
    with pytest.raises(common.ContractError, match="Changed: an observation is not finite"):
        changed(_observe=lambda self, state: state.clone().fill_(torch.nan)).reset(seed=1)


def test_task_rows_of_the_wrong_width_are_refused_where_they_are_drawn():
    env = changed(_draw_tasks=lambda self, n, generator: torch.rand(n, 2, generator=generator))
    with pytest.raises(common.ContractError, match=r"_draw_tasks must give \[3, 1\], got \[3, 2\]"):
        env.sample_tasks(3)
    with pytest.raises(common.ContractError, match=r"held-out set must be \[1000, 1\], got \[1000, 2\]"):
        env.sample_tasks(3, split="test")


@pytest.mark.parametrize("module", ["./my_tasks", "../my_tasks", "folder/my_tasks", ".my_tasks", "my-tasks"])
def test_a_path_is_not_a_modules_name(module):
    with pytest.raises(ValueError, match="is no module's name: as in an import, no slashes"):
        common.make(f"{module}:Mine-v0", 2)


def test_an_ensemble_that_was_not_finished_says_what_is_missing():
    class Hasty(ensembles.Ensemble):
        def __init__(self):
            TaskVectorEnv.__init__(self, 2, box(-9, 9, (2,)), box(-1, 1, (1,)), self._task_space(), 9)

    with pytest.raises(ValueError, match="Hasty has to end with self._found"):
        Hasty().ensemble  # noqa: B018


def test_an_entry_point_may_be_named_and_other_environments_are_told_apart(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_sledges", types.SimpleNamespace(Sledge=type(changed())))
    gym.register("NamedSledge-v0", vector_entry_point="my_sledges:Sledge")
    try:
        assert "NamedSledge-v0" in common.ids()
    finally:
        gym.registry.pop("NamedSledge-v0")
    with pytest.raises(ValueError, match="'CartPole-v1' .an environment of Gymnasium: common.register can"):
        common.make("CartPole-v1", 2)
