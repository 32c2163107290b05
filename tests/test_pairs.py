"""Pairs of domains: the wall and the Gaussian pair against naive versions, the bodies against Gymnasium."""

import importlib.util
import math
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Normal

import common

SHIFTS = {"Gravity0.5": 0.5, "Gravity2": 2, "Friction0.5": 0.5, "Friction2": 2, "JointRange0.5": 0.5}
NO_CONTACT = {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0}
BODIES = {"HalfCheetah": {}, "Hopper": {}, "Walker2d": {}, "Ant": NO_CONTACT}
PAIRS = {  # id -> Gymnasium's id, its options, the motor that does not answer in the target
    "BrokenReacher-v0": ("Reacher-v5", {}, 0),
    "BrokenHalfCheetah-v0": ("HalfCheetah-v5", {}, 0),
    "BrokenAnt-v0": ("Ant-v5", NO_CONTACT, 3),
    "HalfCheetahObstacle-v0": ("HalfCheetah-v5", {}, None),
}
PAIRS |= {
    f"{body}{shift}-v0": (f"{body}-v5", options, None) for body, options in BODIES.items() for shift in SHIFTS
}
B = 2
BLOCK = '<geom type="box" size="1 10 10" pos="-3 0 1" contype="1" conaffinity="1"/>'


def domain(env_id, name, num_envs=B, seed=0, **kwargs):
    env = common.make(env_id, num_envs, seed=seed, **kwargs).unwrapped
    env.set_tasks(env.named_tasks[name].repeat(num_envs, 1))
    return env, env.reset(seed=seed)[0]


# ---- what all pairs promise


@pytest.mark.parametrize("env_id", ["PointWall-v0", "PointDoor-v0", "GaussianPair-v0", *PAIRS])
def test_the_source_is_trained_on_and_the_target_is_held_out(env_id):
    if env_id in PAIRS:
        pytest.importorskip("mujoco")
    env = common.make(env_id, 1, seed=0)
    assert env.named_tasks.keys() == {"source", "target"}
    source, target = env.named_tasks["source"], env.named_tasks["target"]
    assert not torch.equal(source, target)
    assert (env.sample_tasks(5) == source).all() and (env.sample_tasks(5, split="test") == target).all()
    assert env.task_space.contains(source.numpy()) and env.task_space.contains(target.numpy())


# ---- the wall


def naive_wall(place, action, wall):
    """One step of one point, by cases."""
    x, y = place
    new_x = min(1, max(-1, x + 0.1 * min(1, max(-1, action[0]))))
    if 0.45 < new_x < 0.65 and abs(y) < wall:
        new_x = 0.449 if x <= 0.45 else 0.651
    new_y = min(1, max(-1, y + 0.1 * min(1, max(-1, action[1]))))
    if 0.45 < new_x < 0.65 and abs(new_y) < wall:
        new_y = math.copysign(wall + 0.001, y)
    return new_x, new_y


@pytest.mark.parametrize("name", ["source", "target"])
def test_the_wall_stops_what_a_naive_wall_stops(name):
    n = 400
    env, obs = domain("PointWall-v0", name, n)
    wall = float(env.named_tasks[name])
    generator, stopped, slid = torch.Generator().manual_seed(0), 0, 0
    direction = 3 * torch.randn(n, 2, generator=generator)
    for step in range(60):
        if step % 7 == 0:
            direction = 3 * torch.randn(n, 2, generator=generator)
        before, (obs, reward, terminated, _, info) = obs, env.step(direction)
        for i in range(n):
            expected = naive_wall(before[i].tolist(), direction[i].tolist(), wall)
            assert info["final_obs"][i].tolist() == pytest.approx(expected, abs=1e-6)
            distance = math.dist(expected, (0.85, 0))
            assert reward[i].item() == pytest.approx(-distance, abs=1e-5)
            assert bool(terminated[i]) == bool(info["success"][i]) == (distance < 0.1)
        place = info["final_obs"]
        inside = (place[:, 0] > 0.45) & (place[:, 0] < 0.65) & (place[:, 1].abs() < wall)
        assert not inside.any()
        stopped += int((place[:, 0] == torch.tensor(0.449)).sum())
        slid += int((place[:, 1].abs() == torch.tensor(0.601)).sum())
    assert (stopped > 0) == (name == "target") and (slid > 0) == (name == "target")


def test_starts_are_anywhere_but_in_the_strip_and_the_same_in_both_domains():
    starts = {name: domain("PointWall-v0", name, 5000)[1] for name in ("source", "target")}
    assert torch.equal(starts["source"], starts["target"])
    x, y = starts["source"].unbind(1)
    assert not ((x > 0.45) & (x < 0.65)).any()
    assert (x > 0.65).float().mean() == pytest.approx(0.35 / 1.8, abs=0.03)
    assert x.min() < -0.99 and x.max() > 0.99 and y.abs().max() > 0.99 and y.mean().abs() < 0.03


# ---- the Gaussian pair


@pytest.mark.parametrize("name", ["source", "target"])
def test_gaussian_steps_have_the_density_that_is_told(name):
    n = 20_000
    env, obs = domain("GaussianPair-v0", name, n)
    action = 3 * torch.rand(n, 1, generator=torch.Generator().manual_seed(0)) - 1.5
    after, reward, *_ = env.step(action)
    shift, std = {"source": (0.0, 1.0), "target": (0.5, 0.8)}[name]
    expected = Normal((obs + action.clamp(-1, 1)) / 2 + shift, std)
    told = env.log_prob(env.named_tasks[name], obs, action, after)
    assert torch.allclose(told, expected.log_prob(after)[:, 0], atol=1e-5)
    error = ((after - expected.mean) / std)[:, 0]
    assert abs(error.mean()) < 0.03 and abs(error.std() - 1) < 0.03
    assert torch.equal(reward, -after[:, 0].abs())


# ---- the bodies


def lone(env_id, name):
    """Gymnasium's own environment, edited as the domain says; and what becomes of an action."""
    if importlib.util.find_spec("imageio") is None:
        sys.modules["imageio"] = types.ModuleType("imageio")  # Gymnasium wants it, but only for videos
    gym_id, options, broken = PAIRS[env_id]
    env = gym.make(gym_id, **options).unwrapped
    env.reset()
    shift = next((shift for shift in SHIFTS if shift in env_id), None)
    if name == "target" and shift:
        model, factor = env.model, SHIFTS[shift]
        if "Gravity" in shift:
            model.opt.gravity[:] *= factor
        elif "Friction" in shift:
            model.geom_friction[:] *= factor
        else:
            model.jnt_range[model.actuator_trnid[0, 0]] *= factor

    def heard(action):
        action = action.double().numpy().copy()
        if name == "target" and broken is not None:
            action[broken] = 0
        return action

    return env, heard


@pytest.mark.parametrize("env_id", PAIRS)
def test_both_domains_equal_gymnasiums_edited_environment_to_the_last_bit(env_id, tmp_path, monkeypatch):
    mujoco = pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)  # Gymnasium's own models make MuJoCo write a log file there
    last = {}
    for name in ("source", "target"):
        env, obs = domain(env_id, name, horizon=40)
        others = [lone(env_id, name) for _ in range(B)]

        def start(i, env=env, others=others):
            other = others[i][0]
            mujoco.mj_resetData(other.model, other.data)
            if "Reacher" in env_id:
                other.goal = env._qpos[i, 2:].copy()
            other.set_state(env._qpos[i].copy(), env._qvel[i].copy())
            return np.float32(other._get_obs())

        assert all(np.array_equal(start(i), obs[i]) for i in range(B))
        generator, ends = torch.Generator().manual_seed(0), 0
        steps = 60 if "Obstacle" in env_id else 100  # before anybody has come to the block
        size = (steps, B, *env.single_action_space.shape)
        for action in 2.4 * torch.rand(size, generator=generator) - 1.2:  # a sixth beyond the bounds
            obs, reward, terminated, truncated, info = env.step(action)
            for i in range(B):
                other, heard = others[i]
                expected, pay, over, _, said = other.step(heard(action[i]))
                pay = abs(said["x_velocity"]) + said["reward_ctrl"] if "Obstacle" in env_id else pay
                assert np.array_equal(np.float32(expected), info["final_obs"][i])
                assert reward[i].item() == np.float32(pay) and bool(terminated[i]) == over
                if terminated[i] or truncated[i]:
                    ends += 1
                    assert np.array_equal(start(i), obs[i])
        assert ends >= B
        last[name] = info["final_obs"]
    if "Obstacle" not in env_id and "JointRange" not in env_id:  # nobody has come to these yet
        assert not torch.equal(last["source"], last["target"])


@pytest.mark.parametrize("body", BODIES)
def test_a_halved_range_is_that_of_the_first_motors_joint_and_of_no_other(body):
    pytest.importorskip("mujoco")
    env, _ = domain(f"{body}JointRange0.5-v0", "target")
    joint, ranges = env.model.actuator_trnid[0, 0], env._batch.expand("jnt_range")
    expected = env.model.jnt_range.copy()
    expected[joint] /= 2
    assert (ranges == expected).all() and (expected != env.model.jnt_range).any()


def test_domains_side_by_side_are_the_domains_apart():
    """A world's physics is its own row's, whatever its neighbours play; and a state says so exactly."""
    pytest.importorskip("mujoco")
    for env_id in ("HopperGravity2-v0", "AntFriction0.5-v0", "BrokenReacher-v0", "HalfCheetahObstacle-v0"):
        both = common.make(env_id, 2, seed=0, horizon=30).unwrapped
        both.set_tasks(torch.stack([both.named_tasks["source"], both.named_tasks["target"]]))
        both.reset(seed=0)
        copy = common.make(env_id, 2, seed=5, horizon=30).unwrapped
        generator = torch.Generator().manual_seed(0)
        for step in range(50):
            if step == 20:
                copy.load_state_dict(both.state_dict())
            action = 2 * torch.rand(2, *both.single_action_space.shape, generator=generator) - 1
            if step == 0 and env_id != "BrokenReacher-v0":  # the same start in both, so only physics differ
                both._batch.state[1] = both._batch.state[0]
                both._place[1] = both._place[0]
            obs = both.step(action[:1].repeat(2, 1))[0]
            if step >= 20:
                assert torch.equal(obs, copy.step(action[:1].repeat(2, 1))[0])
        if env_id != "HalfCheetahObstacle-v0":
            assert not torch.equal(obs[0], obs[1])


@pytest.mark.parametrize("height", [0.0, 0.3, 0.6, 3.0])
def test_the_obstacle_is_solid_and_is_not_there_in_the_source(height):
    """As solid as in a model that is made with the block in its place, at whatever height and speed."""
    mujoco = pytest.importorskip("mujoco")
    from common.locomotion import load_model

    ends = {}
    for name in ("source", "target"):
        env, _ = domain("HalfCheetahObstacle-v0", name, 4)
        env._qpos[:, 0], env._qpos[:, 1], env._qvel[:, 0] = -1.0, height, -8.0
        paid = []
        if name == "target":
            fixed = load_model(env.xml, BLOCK)
            data = mujoco.MjData(fixed)
            data.qpos[:], data.qvel[:] = env._qpos[0], env._qvel[0]
        for _ in range(40):
            paid.append(env.step(torch.zeros(4, 6))[1].min())
            if name == "target":
                mujoco.mj_step(fixed, data, nstep=5)
        assert min(paid) >= 0  # speed pays in either direction
        ends[name] = env._qpos[0, 0].copy()
    assert ends["target"] == pytest.approx(data.qpos[0], abs=1e-6)
    assert ends["source"] < -4 and ends["target"] > -2.5, ends
