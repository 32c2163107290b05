"""Meta-World as task distributions: its own environments and places, exact resume, scripted policies."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import common

metaworld = pytest.importorskip("metaworld", reason="pip install --no-deps metaworld==3.1.1")
from metaworld.policies import ENV_POLICY_MAP  # noqa: E402

from common import metaworld as ours  # noqa: E402


def started(env_id, rows, seed=0):
    env = common.make(env_id, num_envs=len(rows), seed=seed)
    env.set_tasks(rows)
    return env, env.reset(seed=seed)[0]


def actions(env, steps, seed=0):
    return 2.4 * torch.rand(steps, env.num_envs, 4, generator=torch.Generator().manual_seed(seed)) - 1.2


def play(env, moves):
    taken = [env.step(move) for move in moves]
    return [torch.stack([step[i] for step in taken]) for i in range(4)] + [
        torch.stack([step[4][name] for step in taken]) for name in ("final_obs", "success")
    ]


@pytest.fixture(scope="module")
def mt3():
    return common.make("MT3", num_envs=3, seed=0)


def test_the_spaces_are_meta_worlds(mt3):
    assert mt3.horizon == 500 and mt3.has_success and not mt3.terminates
    assert mt3.single_observation_space.shape == (39,) and mt3.single_action_space.shape == (4,)
    assert list(mt3.named_tasks) == ["reach-v3", "drawer-close-v3", "button-press-topdown-v3"]


def test_training_tasks_are_all_things_in_turn_and_the_same_are_tested(mt3):
    tasks = mt3.sample_tasks(7)
    assert (tasks.sum(1) == 1).all() and tasks.sum(0).min() == 2 and tasks.sum(0).max() == 3
    assert torch.equal(mt3.sample_tasks(3).sum(0), torch.ones(3))
    assert torch.equal(mt3.sample_tasks(30, split="test"), torch.eye(3).repeat(10, 1))


def test_an_episode_is_meta_worlds_own():
    """The same place, the same actions: the same observations, rewards and successes, resets included."""
    env, obs = started("MT3", torch.eye(3))
    train, _ = ours.places("MT3")
    moves = actions(env, 60)
    for row, name in enumerate(ours.MT3):
        twin = metaworld.env_dict.ALL_V3_ENVIRONMENTS[name]()
        place = env.inner.envs[row].place
        assert any(np.array_equal(place, known) for known in train[name])
        settings = {"rand_vec": place, "env_cls": type(twin), "partially_observable": False}
        twin.set_task(metaworld._encode_task(name, settings))
        seen = [torch.from_numpy(twin.reset()[0]).float()]
        assert torch.equal(seen[0], obs[row])
        paid, solved = [], []
        for move in moves[:, row].clamp(-1, 1).numpy():
            after, reward, _, _, info = twin.step(move)
            seen.append(torch.from_numpy(after).float()), paid.append(reward), solved.append(info["success"])
        env.set_tasks(torch.eye(3))
        env.reset(seed=0)  # the same seed: the same places
        found = play(env, moves)
        assert torch.equal(found[4][:, row], torch.stack(seen[1:]))
        assert torch.equal(found[1][:, row], torch.tensor(paid, dtype=torch.float32))
        assert torch.equal(found[5][:, row], torch.tensor(solved) > 0)


def test_the_goal_is_seen_in_mt_and_hidden_in_ml():
    _, seen = started("MT1-reach-v3", torch.ones(2, 1))
    env = common.make("ML1-reach-v3", num_envs=2, seed=0)
    rows = env.sample_tasks(2)
    _, hidden = started("ML1-reach-v3", rows)
    assert (seen[:, 36:] != 0).any(1).all() and (hidden[:, 36:] == 0).all()
    assert rows.shape == (2, 7) and not torch.equal(rows[0], rows[1])


def test_ml_holds_other_places_out_and_a_row_says_which_place():
    env = common.make("ML1-push-v3", num_envs=3, seed=0)
    train, test = env.sample_tasks(400), env.sample_tasks(50, split="test")
    known = set(map(tuple, train.tolist()))
    assert len(known) == 50 and len(set(map(tuple, test.tolist()))) == 50
    assert known.isdisjoint(map(tuple, test.tolist()))
    theirs = metaworld.ML1("push-v3", seed=ours.PLACES_SEED)
    places = np.float32([ours._data(task)["rand_vec"] for task in theirs.train_tasks])
    assert known == {(1.0, *place) for place in places.tolist()}
    one, obs = started("ML1-push-v3", train[:1].repeat(2, 1), seed=1)
    _, again = started("ML1-push-v3", train[:1].repeat(2, 1), seed=2)
    assert torch.equal(obs, again) and torch.equal(obs[0], obs[1])


def test_success_arrives_from_the_step_that_ends_the_episode_too():
    """A drawer that is pushed shut stays shut: the scripted policy succeeds in the last step as well."""
    env, obs = started("MT1-drawer-close-v3", torch.ones(2, 1))
    policy = ENV_POLICY_MAP["drawer-close-v3"]()
    for step in range(500):
        move = np.stack([policy.get_action(row) for row in obs.double().numpy()])
        obs, reward, terminated, truncated, info = env.step(torch.from_numpy(move).float())
        assert not terminated.any() and truncated.all() == (step == 499)
    assert info["success"].all() and (reward > 5).all()
    assert not torch.equal(obs, info["final_obs"])  # the next episode has begun


@pytest.mark.parametrize("name", ["reach-v3", "button-press-topdown-v3"])
def test_the_scripted_policies_solve_the_tasks(name):
    env, obs = started(f"MT1-{name}", torch.ones(3, 1))
    policies = [ENV_POLICY_MAP[name]() for _ in range(3)]
    solved = torch.zeros(3, dtype=torch.bool)
    for _ in range(300):
        rows = zip(policies, obs.double().numpy(), strict=True)
        move = np.stack([policy.get_action(row) for policy, row in rows])
        obs, _, _, _, info = env.step(torch.from_numpy(move).float())
        solved |= info["success"]
    assert solved.all()


def test_a_resume_in_the_middle_of_the_second_episode_is_exact(tmp_path):
    env, _ = started("MT3", torch.eye(3))
    moves = actions(env, 600)
    play(env, moves[:530])
    torch.save(env.state_dict(), tmp_path / "state.pt")
    expected, tasks = play(env, moves[530:]), env.sample_tasks(4)
    other = common.make("MT3", num_envs=3, seed=9)
    other.reset(seed=4)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(*pair) for pair in zip(expected, play(other, moves[530:]), strict=True))
    assert torch.equal(tasks, other.sample_tasks(4))
    assert torch.equal(env.reset()[0], other.reset()[0])  # at the same places, drawn from the same dice


def test_a_name_that_meta_world_does_not_have_lists_those_it_has():
    with pytest.raises(ValueError, match="has no juggle-v3; it has .*reach-v3"):
        common.make("MT1-juggle-v3", num_envs=1)


def test_without_meta_world_one_line_says_how_to_install_it():
    code = "import sys; sys.modules['metaworld'] = None; import common; common.make('MT10', num_envs=1)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode and "pip install --no-deps metaworld" in last
