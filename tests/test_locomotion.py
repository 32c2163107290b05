"""Locomotion against Gymnasium's own v5 environments, to the last bit, and its tasks against formulas."""

import importlib.util
import subprocess
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT

import common

mujoco = pytest.importorskip("mujoco")
if importlib.util.find_spec("imageio") is None:
    sys.modules["imageio"] = types.ModuleType("imageio")  # Gymnasium wants it, but only for videos
torch.set_num_threads(1)
B = 3

# id -> (Gymnasium's id, what ours leaves out of it)
GYMNASIUM = {
    "HalfCheetahDir-v0": ("HalfCheetah-v5", {"ctrl_cost_weight": 0.05}),
    "HalfCheetahVel-v0": ("HalfCheetah-v5", {"ctrl_cost_weight": 0.05}),
    "AntDir-v0": ("Ant-v5", {"ctrl_cost_weight": 0.005, "include_cfrc_ext_in_observation": False}),
    "AntVel-v0": ("Ant-v5", {"ctrl_cost_weight": 0.005, "include_cfrc_ext_in_observation": False}),
    "AntGoal-v0": (
        "Ant-v5",
        {
            "ctrl_cost_weight": 0.1,
            "include_cfrc_ext_in_observation": False,
            "exclude_current_positions_from_observation": False,
            "terminate_when_unhealthy": False,
        },
    ),
    "HumanoidDir-v0": ("Humanoid-v5", {"include_cfrc_ext_in_observation": False}),
    "Walker2dRandParams-v0": ("Walker2d-v5", {}),
    "HopperRandParams-v0": ("Hopper-v5", {}),
}
FALLS = {"AntDir-v0", "AntVel-v0", "HumanoidDir-v0", "Walker2dRandParams-v0", "HopperRandParams-v0"}
FIELDS = {"body_mass": 1.5, "body_inertia": 1.5, "dof_damping": 1.3, "geom_friction": 1.5}
every_id = pytest.mark.parametrize("env_id", GYMNASIUM)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Gymnasium's own models make MuJoCo write a log file into the current folder."""
    monkeypatch.chdir(tmp_path)


def formula(env_id, task, info, x, y):
    """The papers' rewards, from what Gymnasium reports of the step. x, y: the torso's place."""
    v, cost = info["x_velocity"], info["reward_ctrl"]
    if env_id in ("HalfCheetahDir-v0", "AntDir-v0"):
        return task[0] * v + cost + (0.05 if env_id == "AntDir-v0" else 0)
    if env_id == "HalfCheetahVel-v0":
        return -abs(v - task[0]) + cost
    if env_id == "AntVel-v0":
        return 1 - abs(v - task[0]) + cost + 0.05
    if env_id == "AntGoal-v0":
        return -abs(x - task[0]) - abs(y - task[1]) + cost
    if env_id == "HumanoidDir-v0":
        return 1.25 * (task[0] * v + task[1] * info["y_velocity"]) + cost + 5
    return v + 1 + cost


def edit(model, data, row):
    """A lone model changed as the row says: one logarithm for each number that is not zero."""
    row = list(row)
    for name in FIELDS:
        values = getattr(model, name).reshape(-1)  # a view
        for entry, value in enumerate(values):
            values[entry] = value * np.exp(row.pop(0)) if value else 0.0
    assert not row
    mujoco.mj_setConst(model, data)


class Lone:
    """One Gymnasium environment that is put where one of our worlds starts."""

    def __init__(self, env_id, task):
        name, options = GYMNASIUM[env_id]
        self.env, self.env_id, self.task = gym.make(name, **options).unwrapped, env_id, task.double().numpy()
        if "RandParams" in env_id:
            edit(self.env.model, self.env.data, self.task)

    def start(self, qpos, qvel):
        mujoco.mj_resetData(self.env.model, self.env.data)
        self.env.set_state(qpos, qvel)
        return np.float32(self.env._get_obs())

    def step(self, action):
        obs, _, terminated, _, info = self.env.step(action.double().numpy())
        reward = formula(self.env_id, self.task, info, *self.env.data.xpos[1, :2])
        return np.float32(obs), np.float32(reward), terminated


def made(env_id, num_envs=B, horizon=60, seed=0, **kwargs):
    env = common.make(env_id, num_envs, seed=seed, horizon=horizon, **kwargs).unwrapped
    env.set_tasks(env.sample_tasks(num_envs))
    return env, env.reset(seed=seed)[0]


def actions(env, steps, seed=0, beyond=1.2):
    """Random, a sixth of them beyond the bounds."""
    generator, high = torch.Generator().manual_seed(seed), float(env.single_action_space.high[0])
    size = (steps, env.num_envs, *env.single_action_space.shape)
    return beyond * high * (2 * torch.rand(size, generator=generator) - 1)


def play(env, steps, seed=0):
    taken = [env.step(action) for action in actions(env, steps, seed)]
    return [torch.stack([step[i] for step in taken]) for i in range(4)] + [
        torch.stack([step[4]["final_obs"] for step in taken])
    ]


def same(left, right):
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


# ---- the same as Gymnasium


@every_id
def test_300_steps_equal_gymnasiums_to_the_last_bit_resets_included(env_id):
    env, obs = made(env_id)
    lone = [Lone(env_id, task) for task in env.state_dict()["_task"]]
    resets = falls = 0

    def start(i):
        """Where world i now stands, read from its state."""
        expected = lone[i].start(env._qpos[i].copy(), env._qvel[i].copy())
        assert np.array_equal(obs[i], expected)

    for i in range(B):
        start(i)
    for action in actions(env, 300):
        obs, reward, terminated, truncated, info = env.step(action)
        for i in range(B):
            expected_obs, expected_reward, expected_end = lone[i].step(action[i])
            assert np.array_equal(info["final_obs"][i], expected_obs)
            assert reward[i].item() == expected_reward
            assert bool(terminated[i]) == bool(expected_end)
            if terminated[i] or truncated[i]:
                resets, falls = resets + 1, falls + int(terminated[i])
                start(i)
    assert resets >= 5 * B
    if env_id in ("HumanoidDir-v0", "HopperRandParams-v0", "Walker2dRandParams-v0"):
        assert falls > 5


def test_spaces_and_the_length_of_a_step_are_gymnasiums():
    for env_id, (name, options) in GYMNASIUM.items():
        env, single = common.make(env_id, 1).unwrapped, gym.make(name, **options).unwrapped
        assert env.single_observation_space.shape == single.observation_space.shape
        assert env.single_action_space == single.action_space
        assert env.dt == single.dt and env.horizon == 200
        assert env.terminates == (env_id in FALLS)


@pytest.mark.parametrize(
    "env_id", ["HalfCheetahDir-v0", "AntGoal-v0", "HumanoidDir-v0", "HopperRandParams-v0"]
)
def test_starts_are_spread_as_gymnasiums(env_id):
    n = 4000
    env, _ = made(env_id, num_envs=n)
    single = gym.make(GYMNASIUM[env_id][0]).unwrapped
    single.reset(seed=0)
    starts = [(single.reset_model(), single.data.qpos.copy(), single.data.qvel.copy())[1:] for _ in range(n)]
    for ours, theirs in zip((env._qpos, env._qvel), map(np.stack, zip(*starts, strict=True)), strict=True):
        scale = env.reset_noise
        assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 6 * scale * (2 / n) ** 0.5
        assert np.abs(ours.std(0) - theirs.std(0)).max() < 6 * scale / n**0.5
        assert np.abs(np.abs(ours).max() - np.abs(theirs).max()) < scale  # uniform or normal
        assert abs(np.corrcoef(ours[:, 0], ours[:, 1])[0, 1]) < 6 / n**0.5


def test_an_action_beyond_the_bounds_moves_as_the_bound_and_is_charged_as_given():
    env, _ = made("HalfCheetahVel-v0", num_envs=2)
    env.set_tasks(torch.zeros(2, 1))
    env.reset()
    env._batch.state[1] = env._batch.state[0]
    env._place[1] = env._place[0]
    obs, reward, *_ = env.step(torch.tensor([[1.0] * 6, [3.0] * 6]))
    assert torch.equal(obs[0], obs[1])
    assert float(reward[0] - reward[1]) == pytest.approx(0.05 * 6 * (9 - 1), abs=1e-5)


# ---- the tasks


@pytest.mark.parametrize("n", [1, 7, 10])
def test_every_draw_of_directions_is_balanced_and_in_random_order(n):
    env = common.make("HalfCheetahDir-v0", 1, seed=0)
    draws = torch.stack([env.sample_tasks(n)[:, 0] for _ in range(400)])
    assert (draws.sum(1).abs() == n % 2).all() and draws.mean(0).abs().max() < 0.2


def test_the_two_directions_are_trained_and_tested_in_equal_numbers():
    for env_id in ("HalfCheetahDir-v0", "AntDir-v0"):
        env = common.make(env_id, 1, seed=0)
        train = env.sample_tasks(4000)
        assert set(train.flatten().tolist()) == {-1.0, 1.0} and abs(float(train.mean())) < 0.07
        for n in (2, 20, env.num_test_tasks):
            assert float(env.sample_tasks(n, split="test").sum()) == 0


def test_goals_come_from_the_papers_distributions():
    sample = {env_id: common.make(env_id, 1, seed=0).sample_tasks(20_000).numpy() for env_id in GYMNASIUM}
    for env_id in ("HalfCheetahVel-v0", "AntVel-v0"):
        speed = sample[env_id][:, 0] / 3
        assert speed.min() >= 0 and speed.max() < 1
        assert abs(speed.mean() - 0.5) < 0.01 and abs(speed.var() - 1 / 12) < 0.002
    x, y = sample["AntGoal-v0"].T
    area, angle = (x**2 + y**2) / 9, np.arctan2(y, x) / np.pi  # uniform in the disc: both uniform
    assert area.max() < 1 and abs(area.mean() - 0.5) < 0.01 and abs(area.var() - 1 / 12) < 0.002
    assert abs(angle.mean()) < 0.02 and abs(angle.var() - 1 / 3) < 0.01
    x, y = sample["HumanoidDir-v0"].T
    angle = np.arctan2(y, x) / np.pi
    assert np.allclose(x**2 + y**2, 1) and abs(angle.mean()) < 0.02 and abs(angle.var() - 1 / 3) < 0.01


def test_training_and_held_out_goals_lie_on_different_grids():
    env = common.make("HalfCheetahVel-v0", 1, seed=0)
    train, test = (env.sample_tasks(1000, split).double() / 3 * 2**23 for split in ("train", "test"))
    assert (train.round() % 2 == 0).all() and (test.round() % 2 == 1).all()


@pytest.mark.parametrize(
    ("env_id", "sizes"), [("Walker2dRandParams-v0", (7, 21, 6, 24)), ("HopperRandParams-v0", (4, 12, 3, 15))]
)
def test_every_multiplier_is_a_power_of_its_base_with_a_uniform_exponent(env_id, sizes):
    env = common.make(env_id, 1, seed=0)
    exponents = np.split(env.sample_tasks(20_000).numpy(), np.cumsum(sizes), axis=1)
    assert exponents.pop().shape[1] == 0
    for log, base in zip(exponents, FIELDS.values(), strict=True):
        u = log / np.log(base) / 3
        assert np.abs(u).max() <= 1 + 1e-6 and np.abs(u).max() > 0.999
        assert np.abs(u.mean(0)).max() < 0.02 and np.abs(u.var(0) - 1 / 3).max() < 0.01
    correlation = np.corrcoef(np.concatenate(exponents, 1).T) - np.eye(sum(sizes))
    assert np.abs(correlation).max() < 0.04  # each number has a multiplier of its own


@pytest.mark.parametrize("env_id", ["Walker2dRandParams-v0", "HopperRandParams-v0"])
def test_worlds_carry_their_own_model_and_the_nominal_row_is_gymnasiums(env_id):
    env, _ = made(env_id)
    tasks = env.sample_tasks(B)
    tasks[0] = env.named_tasks["nominal"]
    env.set_tasks(tasks)
    env.reset()
    for i, task in enumerate(tasks):
        single = gym.make(GYMNASIUM[env_id][0]).unwrapped
        before = {name: getattr(single.model, name).copy() for name in FIELDS}
        edit(single.model, single.data, task.double().numpy())
        model = env._batch.get_model(i)
        for name in (*FIELDS, "dof_invweight0", "body_invweight0", "body_subtreemass"):
            assert np.array_equal(getattr(model, name), getattr(single.model, name)), name
        assert i or all(np.array_equal(getattr(model, name), before[name]) for name in FIELDS)
    assert np.array_equal(env.model.body_mass, before["body_mass"])  # the common model stays as it was


# ---- episodes


@every_id
def test_a_worlds_reset_leaves_the_others_bitwise_unchanged(env_id):
    """World 0 is sent to its reset at step 7, or not; the others must not notice."""
    runs = []
    for early in (False, True):
        env, _ = made(env_id, horizon=40)
        steps = []
        for step, action in enumerate(actions(env, 20)):
            if step == 7 and early:
                env._restart(np.array([0]))
            obs, reward, terminated, truncated, info = env.step(action)
            if env.terminates and (terminated[1:].any() or truncated.any()):
                break  # from its own reset on, a world's start depends on how many were drawn before
            steps.append([obs[1:], reward[1:], info["final_obs"][1:]])
        runs.append(steps)
        rows = env._batch.state.copy()
    assert len(runs[0]) > 7 and not np.array_equal(rows[0], rows[1])
    for one, two in zip(*runs, strict=False):
        assert same(one, two)


@pytest.mark.parametrize("env_id", ["HopperRandParams-v0", "HumanoidDir-v0"])
def test_only_the_worlds_that_fell_start_again(env_id):
    env, before = made(env_id, num_envs=32)
    alone = 0
    for action in actions(env, 60):
        obs, _, terminated, truncated, info = env.step(action)
        ended = terminated | truncated
        assert torch.equal(obs[~ended], info["final_obs"][~ended])
        assert not (obs[ended] == info["final_obs"][ended]).all(1).any()
        # a start stands at time 0 near the body's own pose, a world that goes on does not
        assert ((env._batch.bind("time") == 0) == ended.numpy()).all()
        assert (np.abs(env._qpos[ended.numpy()] - env.model.qpos0) <= env.reset_noise + 1e-12).all()
        alone += int(0 < ended.sum() < 32)
    assert alone > 5


def test_worlds_that_rest_stand_still_and_no_other_notices():
    envs = [common.make("HopperRandParams-v0", 6, seed=0) for _ in range(2)]
    tasks = envs[0].sample_tasks(6)
    for env in envs:
        env.set_tasks(tasks)
        env.reset(seed=0)
    generator, rests = torch.Generator().manual_seed(0), torch.tensor([0, 1, 0, 0, 1, 0]).bool()
    envs[1].rest(rests)
    for _ in range(5):  # nobody falls so soon
        action = 2 * torch.rand(6, 3, generator=generator) - 1
        (obs, reward, *_), (resting_obs, resting_reward, *_) = (env.step(action) for env in envs)
        assert torch.equal(obs[~rests], resting_obs[~rests])
        assert torch.equal(reward[~rests], resting_reward[~rests])
    before = resting_obs[rests]
    assert torch.equal(envs[1].step(action)[0][rests], before)
    envs[1].reset(seed=0)
    assert not torch.equal(envs[1].step(action)[0][rests], envs[1].step(action)[0][rests])


def test_worlds_that_rest_go_on_resting_in_a_saved_state(tmp_path):
    env, _ = made("HopperRandParams-v0", 6)
    env.rest(torch.tensor([1, 0, 1, 0, 0, 0]).bool())
    play(env, 2)
    torch.save(env.state_dict(), tmp_path / "state.pt")
    fresh = common.make("HopperRandParams-v0", 6, seed=9).unwrapped
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    # long enough to fall: a world that woke up would draw the next start of another
    assert same(play(env, 60, seed=1), play(fresh, 60, seed=1))


def test_a_fall_at_the_horizon_terminates_and_does_not_truncate():
    env, _ = made("HopperRandParams-v0", num_envs=256, horizon=12)
    _, _, terminated, truncated, _ = play(env, 48)
    assert not (terminated & truncated).any() and terminated.any() and truncated.any()
    age = torch.zeros(256, dtype=torch.int64)
    at_the_horizon = 0
    for fell, cut in zip(terminated, truncated, strict=True):
        age += 1
        assert torch.equal(cut, (age == 12) & ~fell)
        at_the_horizon += int((fell & (age == 12)).sum())
        age[fell | cut] = 0
    assert at_the_horizon > 0


@pytest.mark.parametrize("env_id", ["HalfCheetahDir-v0", "AntVel-v0"])
def test_a_world_that_explodes_stands_still_again_and_no_other_notices(env_id):
    runs = []
    for harm in ("none", "position", "speed"):
        env, _ = made(env_id)
        play(env, 3)
        if harm != "none":
            (env._qpos if harm == "position" else env._qvel)[1, -1] = np.nan if harm == "position" else 1e12
        out = play(env, 4, seed=1)
        runs.append(out)
        assert all(torch.isfinite(tensor).all() for tensor in out)
        if harm != "none":
            obs, reward, terminated, _, final_obs = (tensor[0, 1] for tensor in out)
            assert bool(terminated) == env.terminates
            pose = np.concatenate([env.model.qpos0[env.unseen :], np.zeros(env.model.nv)])
            assert np.array_equal(final_obs, np.float32(pose))
            assert not (out[4][1:, 1].numpy() == np.float32(pose)).all(1).any()  # once, and it goes on
            cost = env.ctrl_cost * actions(env, 4, seed=1)[0, 1].double().square().sum()
            speed = 0 if env_id == "HalfCheetahDir-v0" else -env._goal[1, 0]
            assert float(reward) == pytest.approx(float(speed + env.alive - cost), abs=1e-6)
    for out in runs[1:]:
        assert all(torch.equal(one[:, [0, 2]], two[:, [0, 2]]) for one, two in zip(out, runs[0], strict=True))


def test_a_nan_action_acts_as_zero_and_shows_in_the_reward():
    (env, _), (other, _) = made("HalfCheetahDir-v0"), made("HalfCheetahDir-v0")
    action = actions(env, 1)[0]
    action[1] = 0
    obs, reward, *_ = other.step(action)
    action[1, 2] = torch.nan
    nan_obs, nan_reward, *_ = env.step(action)
    assert torch.equal(obs, nan_obs)
    assert nan_reward.isnan().tolist() == [False, True, False] and torch.equal(reward[::2], nan_reward[::2])


# ---- state, seeds, threads, installation


@every_id
def test_a_fresh_environment_continues_50_steps_from_a_saved_state_bit_for_bit(env_id, tmp_path):
    env, _ = made(env_id, horizon=30)
    play(env, 17)
    torch.save(env.state_dict(), tmp_path / "state.pt")
    expected, tasks, start = play(env, 50, seed=1), env.sample_tasks(3), env.reset()[0]
    fresh = common.make(env_id, B, seed=9, horizon=30).unwrapped  # never reset
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(expected, play(fresh, 50, seed=1))
    assert torch.equal(tasks, fresh.sample_tasks(3)) and torch.equal(start, fresh.reset()[0])
    saved = env.state_dict()
    copies = {name: value.clone() for name, value in saved.items() if torch.is_tensor(value)}
    for _ in range(2):  # what was saved does not move with an environment that gave it, or that took it
        env.reset()
        assert all(torch.equal(saved[name], copy) for name, copy in copies.items())
        env.load_state_dict(saved)


@pytest.mark.parametrize("env_id", ["AntDir-v0", "Walker2dRandParams-v0"])
def test_the_number_of_threads_and_of_worlds_changes_no_bit(env_id):
    runs = []
    for nthread, num_envs in ((1, 8), (2, 8)):
        env, first = made(env_id, num_envs=num_envs, nthread=nthread)
        runs.append([first, *play(env, 40)])
    assert same(*runs)


def test_results_on_another_device_arrive_in_one_transfer_and_share_no_memory():
    env, _ = made("AntDir-v0")
    expected = play(env, 70)
    env, _ = made("AntDir-v0")
    env.device = torch.device("cuda")  # only to take that branch; "to" is the CPU's below
    transfers, to = [], torch.Tensor.to

    def counted(tensor, target, *args, **kwargs):
        transfers.append(target == env.device)
        return to(tensor, torch.device("cpu") if target == env.device else target, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", counted)
        out = play(env, 70)
        assert sum(transfers) == 70
        obs, *rest, info = env.step(actions(env, 1)[0])
    assert same(expected, out)
    pointers = {t.untyped_storage().data_ptr() for t in (obs, *rest, info["final_obs"])}
    assert len(pointers) == 5


@pytest.mark.parametrize("broken", ["mujoco", "mujoco.batch"])  # not installed; too old
def test_without_mujoco_one_line_says_what_to_install_and_the_rest_works(broken):
    program = f"""
import sys
sys.modules[{broken!r}] = None
import common
assert "HalfCheetahVel-v0" in common.ids()
common.make("PointGoal-v0", num_envs=2).reset()
try:
    common.make("HalfCheetahVel-v0", num_envs=2)
except ImportError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert 'pip install "mujoco>=3.17"' in found.stdout and found.stdout.count("\n") == 1


def test_building_a_cheetah_writes_nothing(tmp_path, capfd):
    common.make("HalfCheetahDir-v0", 2)
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")
