"""Ensembles: the models against Gymnasium's environments edited in the same way, the draws against SciPy-free
formulas, the grid against what it is said to be."""

import importlib.util
import math
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
import torch

import common
from common.ensembles import truncated_normal

TORCH = ["CartPoleEnsemble-v0", "CartPoleRunEnsemble-v0", "PendulumEnsemble-v0"]
BODIES = {"HopperEnsemble-v0": "Hopper-v5", "HalfCheetahEnsemble-v0": "HalfCheetah-v5"}
has_mujoco = importlib.util.find_spec("mujoco") is not None
IDS = TORCH + list(BODIES) * has_mujoco
every_id = pytest.mark.parametrize("env_id", IDS)
every_body = pytest.mark.parametrize("env_id", BODIES)
EPOPT = {  # PAPERS: mean, std, low, high
    "HopperEnsemble-v0": [(6, 1.5, 3, 9), (2, 0.25, 1.5, 2.5), (2.5, 1, 1, 4), (1, 0.25, 0.5, 1.5)],
    "HalfCheetahEnsemble-v0": [
        (6, 1.5, 3, 9),
        (0.5, 0.1, 0.3, 0.7),
        (1.5, 0.5, 0.5, 2.5),
        (0.125, 0.04, 0.05, 0.2),
    ],
}


@pytest.fixture
def mujoco():
    if importlib.util.find_spec("imageio") is None:
        sys.modules["imageio"] = types.ModuleType("imageio")  # Gymnasium wants it, but only for videos
    return pytest.importorskip("mujoco")


def actions(env, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2.4 * torch.rand(steps, env.num_envs, *env.single_action_space.shape, generator=generator) - 1.2


# ---- the distribution of models


def test_draws_have_the_distribution_of_a_truncated_normal():
    mean, std, low, high = (torch.tensor([x], dtype=torch.float64) for x in (2.0, 0.5, 1.7, 3.5))
    u = (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000
    x = truncated_normal(u, mean, std, low, high)[:, 0]

    def phi(z):
        return math.erf(z / math.sqrt(2)) / 2 + 0.5

    below, above = phi((1.7 - 2) / 0.5), phi((3.5 - 2) / 0.5)
    for place in (1.8, 2.0, 2.3, 3.0):
        share = (phi((place - 2) / 0.5) - below) / (above - below)
        assert (x < place).double().mean().item() == pytest.approx(share, abs=1e-3)
    assert x.min() >= 1.7 and x.max() <= 3.5 and (x.diff() > 0).all()


def test_a_deviation_of_infinity_is_uniform_and_of_zero_the_mean():
    u = torch.rand(10_000, 2, dtype=torch.float64)
    ends = (torch.tensor(x, dtype=torch.float64) for x in ([2.0, 1], [math.inf, 0], [1.5, 0.5], [3.5, 4]))
    x = truncated_normal(u, *ends)
    assert torch.allclose(x[:, 0], 1.5 + 2 * u[:, 0]) and (x[:, 1] == 1).all()


@every_id
def test_models_come_from_the_ensemble_and_never_leave_its_range(env_id):
    env = common.make(env_id, 1, seed=0)
    tasks = env.sample_tasks(20_000).double()
    mean, std, low, high = env.ensemble
    assert (tasks >= low - 1e-6).all() and (tasks <= high + 1e-6).all() and (tasks[:, -1] == 1).all()
    varied = slice(0, -1)
    assert (tasks.mean(0) - mean)[varied].abs().max() < 0.2 * std[varied].max()
    correlation = torch.corrcoef(tasks.T[varied])
    assert (correlation - torch.eye(len(correlation))).abs().max() < 0.03
    for row, numbers in zip(env.ensemble.T, EPOPT.get(env_id, []), strict=False):
        assert row.tolist() == pytest.approx(numbers)


@every_id
def test_an_ensemble_can_be_set_and_nonsense_is_refused(env_id):
    env = common.make(env_id, 1, seed=0)
    rows = env.ensemble
    rows[1] = 0
    env.ensemble = rows
    assert torch.equal(env.sample_tasks(3), env.named_tasks["mean"].expand(3, -1))
    assert len(env.sample_tasks(3, split="test").unique(dim=0)) == 3  # the grid stays where it is
    for row, value in ((2, -1.0), (2, 100.0), (3, 0.01), (0, 100.0), (1, -1.0), (3, math.inf), (0, math.nan)):
        wrong = env.ensemble
        wrong[row, 0] = value
        with pytest.raises(ValueError, match=f"{env.parameter_names[0]}: expected 0 < low <= mean <= high"):
            env.ensemble = wrong
    with pytest.raises(ValueError, match="an ensemble is"):
        env.ensemble = rows[:, :1]


@pytest.mark.parametrize(("env_id", "low"), [("HopperEnsemble-v0", 0.01), ("HalfCheetahEnsemble-v0", 0.01)])
def test_models_that_mujoco_cannot_simulate_are_named_before_any_training(
    env_id, low, mujoco, capfd, tmp_path
):
    env = common.make(env_id, 1, seed=0)
    wrong = env.ensemble
    wrong[2, 0], wrong[2, 2], wrong[2, 3] = low, 1e-5, 1e-5
    with pytest.raises(ValueError, match=r"MuJoCo is not stable with torso mass 0\.01"):
        env.ensemble = wrong
    assert not torch.equal(env.ensemble, wrong)
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""


# ---- the grid


@every_id
def test_the_grid_has_its_three_parts(env_id):
    env = common.make(env_id, 1, seed=0)
    tasks = env.sample_tasks(env.num_test_tasks, split="test").double()
    mean, std, low, high = env.ensemble
    parts = {name: tasks[rows] for name, rows in env.test_groups.items()}
    assert list(parts) == ["inside", "beyond", "unmodelled"]
    assert sum(map(len, parts.values())) == env.num_test_tasks == len(tasks.unique(dim=0))
    count = len(mean) - 1
    assert len(parts["inside"]) == 7 * 3 ** (count - 1)
    out = (tasks < low - 1e-6) | (tasks > high + 1e-6)
    outside = {name: out[rows] for name, rows in env.test_groups.items()}
    assert not outside["inside"].any()
    assert (outside["beyond"].sum(1) == 1).all() and not outside["beyond"][:, -1].any()
    assert outside["beyond"][:, :-1].any(0).all()
    assert outside["unmodelled"][:, -1].all() and not outside["unmodelled"][:, :-1].any()
    assert (tasks > 0).all()
    assert not (env.sample_tasks(20_000)[:, None] == tasks[None].float()).all(2).any()
    levels = parts["inside"][:, 0].unique()
    assert levels.tolist() == pytest.approx(
        torch.linspace(float(low[0]), float(high[0]), 7).tolist(), rel=1e-6
    )


@every_id
def test_the_target_is_inside_the_range_and_more_than_a_deviation_from_the_mean(env_id):
    env = common.make(env_id, 1, seed=0)
    target, (mean, std, low, high) = env.named_tasks["target"].double(), env.ensemble
    assert ((target - mean).abs() / std)[0] > 1.4 and target[-1] == 1
    assert (target >= low).all() and (target <= high).all()


# ---- against Gymnasium


def test_every_cart_and_pole_moves_as_gymnasiums_with_these_numbers():
    env = common.make("CartPoleEnsemble-v0", 8, seed=0)
    tasks = env.sample_tasks(8)
    tasks[4:, 3] = 0.5  # a weaker motor
    env.set_tasks(tasks)
    obs, info = env.reset(seed=0, options={"state": True})
    lone = []
    for row, state in zip(tasks.double().tolist(), info["state"], strict=True):
        theirs = gym.make("CartPole-v1").unwrapped
        theirs.reset()
        theirs.masscart, theirs.masspole, theirs.length, factor = row
        theirs.total_mass, theirs.polemass_length = row[0] + row[1], row[1] * row[2]
        theirs.force_mag, theirs.state = 10 * factor, tuple(state.tolist())
        lone.append(theirs)
    sides = torch.randint(2, (60, 8), generator=torch.Generator().manual_seed(0))
    alive, falls = [True] * 8, 0
    for side in sides:
        obs, reward, terminated, _, info = env.step(2.0 * side[:, None] - 1)
        for i, theirs in enumerate(lone):
            if not alive[i]:
                continue
            state, their_reward, ended, _, _ = theirs.step(int(side[i]))
            assert info["final_obs"][i].tolist() == pytest.approx(state.tolist(), abs=1e-6)
            assert reward[i] == their_reward and bool(terminated[i]) == ended
            alive[i], falls = not ended, falls + ended
    assert falls == 8


def test_a_cart_that_runs_is_the_same_cart_paid_for_its_speed_and_has_no_end_of_track():
    env, slow = (common.make(id, 5, seed=0) for id in ("CartPoleRunEnsemble-v0", "CartPoleEnsemble-v0"))
    tasks = env.sample_tasks(5)
    env.set_tasks(tasks)
    state = env.reset(seed=0, options={"state": True})[1]["state"]
    weaker = torch.cat([tasks[:, :3], torch.full((5, 1), 0.3)], 1)
    for action in actions(env, 40):
        expected = slow.simulate(weaker, state, action)
        obs, reward, terminated, _, info = env.step(action)
        assert torch.allclose(info["state"], expected) and torch.allclose(
            reward, 1 + 2 * expected[:, 1].float()
        )
        seen = torch.stack([expected[:, 1], expected[:, 2] * 10, expected[:, 3] * 2], 1).float()
        assert torch.allclose(info["final_obs"], seen)
        assert torch.equal(terminated, expected[:, 2].abs() > 24 * math.pi / 360)
        state = info["state"]
        if terminated.any():
            break
    env._state = torch.tensor([[50.0, 1, 0, 0]]).repeat(5, 1).double()
    assert not env.step(torch.zeros(5, 1))[2].any()


def test_every_pendulum_swings_as_gymnasiums_with_these_numbers():
    env = common.make("PendulumEnsemble-v0", 6, seed=0)
    tasks = env.sample_tasks(6)
    tasks[3:, 2] = 1.2
    env.set_tasks(tasks)
    state = env.reset(seed=0, options={"state": True})[1]["state"]
    lone = []
    for row, start in zip(tasks.double().tolist(), state, strict=True):
        theirs = gym.make("Pendulum-v1").unwrapped
        theirs.reset()
        theirs.m, theirs.l, theirs.g, theirs.state = row[0], row[1], 10 * row[2], start.numpy().copy()
        lone.append(theirs)
    for action in actions(env, 200):
        _, reward, _, truncated, info = env.step(action)
        for i, theirs in enumerate(lone):
            obs, their_reward, *_ = theirs.step(2 * action[i].double().numpy())
            assert info["final_obs"][i].tolist() == pytest.approx(obs.tolist(), abs=2e-5)
            assert reward[i].item() == pytest.approx(float(their_reward), abs=1e-4)
    assert truncated.all()


def edit(model, data, row, feet, limb, mujoco):
    """A lone model changed as the row says."""
    mass, friction, damping, armature, factor = row
    for body, scale in (("torso", mass / model.body("torso").mass[0]), (limb, factor)):
        model.body(body).mass[:] *= scale
        model.body(body).inertia[:] *= scale
    for geom in ("floor", *feet):
        model.geom(geom).friction[0] = friction
    for name in [model.joint(index).name for index in range(3, model.njnt)]:
        model.joint(name).damping[:] = damping
        model.joint(name).armature[:] = armature
    mujoco.mj_setConst(model, data)


@every_body
def test_every_world_equals_gymnasiums_environment_edited_in_the_same_way(
    env_id, mujoco, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # Gymnasium's models make MuJoCo write a log file
    env = common.make(env_id, 4, seed=0)
    tasks = env.sample_tasks(4)
    tasks[2:, -1] = 2.0
    env.set_tasks(tasks)
    state = env.reset(seed=0, options={"state": True})[1]["state"]
    feet, limb = (("foot_geom",), "leg") if "Hopper" in env_id else (("bfoot", "ffoot"), "bthigh")
    taken = actions(env, 120)
    played = [env.step(action) for action in taken]
    for i, row in enumerate(tasks.double().tolist()):
        theirs = gym.make(BODIES[env_id]).unwrapped
        theirs.reset(seed=0)
        edit(theirs.model, theirs.data, row, feet, limb, mujoco)
        mujoco.mj_resetData(theirs.model, theirs.data)
        theirs.set_state(*np.split(state[i].numpy(), [theirs.model.nq]))
        for action, (_, reward, terminated, _, info) in zip(taken, played, strict=True):
            obs, their_reward, ended, _, _ = theirs.step(action[i].double().numpy())
            assert np.abs(info["final_obs"][i].numpy() - obs).max() < 1e-4
            assert reward[i].item() == pytest.approx(their_reward, abs=1e-4)
            assert bool(terminated[i]) == ended
            if ended:
                break


@every_body
def test_a_mass_comes_with_its_moments_of_inertia(env_id, mujoco):  # T1
    env = common.make(env_id, 2, seed=0)
    tasks = env.named_tasks["mean"].repeat(2, 1)
    tasks[1, 0] *= 1.5
    tasks[1, -1] = 0.5
    env.set_tasks(tasks)
    env.reset(seed=0)
    models = [env.unwrapped._batch.get_model(world) for world in range(2)]
    for body, factor in (("torso", 1.5), (env.unwrapped.limb, 0.5)):
        light, heavy = (model.body(body) for model in models)
        assert heavy.mass / light.mass == pytest.approx(factor)
        assert heavy.inertia / light.inertia == pytest.approx([factor] * 3)
    torso = models[0].body("torso")
    shipped = env.unwrapped.model.body("torso")
    assert torso.mass == pytest.approx(6.0)
    assert torso.inertia / torso.mass == pytest.approx(shipped.inertia / shipped.mass)


@every_body
def test_friction_is_set_where_the_feet_meet_the_floor(env_id, mujoco):
    """A contact takes the larger of the two, so one alone would change nothing."""
    env = common.make(env_id, 2, seed=0)
    tasks = env.named_tasks["mean"].repeat(2, 1)
    tasks[1, 1] = 0.31
    env.set_tasks(tasks)
    env.reset(seed=0)
    for geom in ("floor", *env.unwrapped.feet):
        frictions = [env.unwrapped._batch.get_model(world).geom(geom).friction[0] for world in range(2)]
        assert frictions == pytest.approx(tasks[:, 1].tolist())


def test_a_saved_state_draws_from_the_same_ensemble():
    env = common.make("CartPoleEnsemble-v0", 2, seed=0).unwrapped
    rows = env.ensemble
    rows[1, :2] = 0
    env.ensemble = rows
    fresh = common.make("CartPoleEnsemble-v0", 2, seed=1).unwrapped
    fresh.load_state_dict(env.state_dict())
    assert torch.equal(fresh.ensemble, rows) and torch.equal(fresh.sample_tasks(3), env.sample_tasks(3))


# ---- the simulator's state


@every_id
def test_simulate_repeats_what_was_recorded_and_changes_nothing(env_id):
    n = 5
    env = common.make(env_id, n, seed=0)
    tasks = env.sample_tasks(n)
    env.set_tasks(tasks)
    state = env.reset(seed=0, options={"state": True})[1]["state"]
    assert state.dtype == torch.float64
    for action in actions(env, 30):
        before = env.state_dict()
        predicted = env.simulate(tasks, state, action)
        other = env.simulate(env.named_tasks["mean"].expand(n, -1), state, action)
        after = env.state_dict()
        assert all(
            torch.equal(after[name], x) if torch.is_tensor(x) else after[name] == x
            for name, x in before.items()
        )
        _, _, terminated, _, info = env.step(action)
        assert (predicted - info["state"]).abs().max() < 1e-7
        if terminated.any():
            break
        state = info["state"]
        assert (other - state).abs().max() > 1e-5
    again = env.simulate(tasks.repeat(3, 1), state.repeat(3, 1), action.repeat(3, 1))
    assert torch.equal(again, env.simulate(tasks, state, action).repeat(3, 1))


@every_id
def test_the_state_is_that_before_the_autoreset_and_only_told_when_asked_for(env_id):
    env = common.make(env_id, 3, seed=0, horizon=4)
    assert env.reset(seed=0)[1] == {} and env.step(actions(env, 1)[0])[4].keys() == {"final_obs"}
    start = env.reset(seed=0, options={"state": True})[1]["state"]
    taken = actions(env, 4)
    for action in taken:  # the last one ends the episode
        *_, truncated, info = env.step(action)
        tasks = env.unwrapped._task
        assert (env.simulate(tasks, start, action) - info["state"]).abs().max() < 1e-7
        start = info["state"]
    assert truncated.all()
    env.reset(seed=0)
    assert "state" not in env.step(actions(env, 1)[0])[4]


@every_body
def test_a_step_that_explodes_is_not_a_number_and_leaves_the_others_alone(
    env_id, mujoco, capfd, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    env = common.make(env_id, 1, seed=0)
    state = env.reset(seed=0, options={"state": True})[1]["state"].repeat(3, 1)
    state[1, -1] = 1e9
    tasks, action = env.named_tasks["mean"].repeat(3, 1), torch.zeros(3, *env.single_action_space.shape)
    after = env.simulate(tasks, state, action)
    assert after[1].isnan().all() and after[[0, 2]].isfinite().all() and torch.equal(after[0], after[2])
    assert env.simulate(tasks[:1], state[:1], action[:1]).isfinite().all()
