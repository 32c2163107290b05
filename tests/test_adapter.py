"""Somebody else's Gymnasium environment as a task distribution: CartPole with poles of different lengths."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import common
from common.adapter import AdaptedTasks
from common.points import PointGoal

torch.set_num_threads(1)
B = 3


def set_lengths(vector_env, tasks):
    vector_env.set_attr("length", tasks[:, 0].tolist())
    vector_env.set_attr("polemass_length", (0.1 * tasks[:, 0]).tolist())


def get_state(vector_env):
    names = ("state", "_elapsed_steps", "steps_beyond_terminated")
    state = {name: list(vector_env.get_attr(name)) for name in names}
    state["state"] = [torch.tensor(np.asarray(row, np.float64)) for row in state["state"]]
    return {
        **state,
        "random": [generator.bit_generator.state for generator in vector_env.get_attr("np_random")],
    }


def set_state(vector_env, state):
    generators = vector_env.get_attr("np_random")
    for generator, random in zip(generators, state["random"], strict=True):
        generator.bit_generator.state = random
    vector_env.set_attr("np_random", list(generators))
    vector_env.set_attr("state", [row.numpy() for row in state["state"]])
    vector_env.set_attr("_elapsed_steps", state["_elapsed_steps"])
    vector_env.set_attr("steps_beyond_terminated", state["steps_beyond_terminated"])


def cartpole(mode="sync", num_envs=B, seed=0, **kwargs):
    return AdaptedTasks(
        num_envs, "CartPole-v1", set_lengths, [0.25], [1.5], vectorization_mode=mode, seed=seed, **kwargs
    )


def adapted(env, num_envs=B, **kwargs):
    """Any environment, with a task that changes nothing."""
    return AdaptedTasks(num_envs, env, lambda vector_env, tasks: None, low=0.0, high=1.0, seed=0, **kwargs)


def play(env, steps, policy=lambda step: torch.full((B,), step % 2)):
    return [env.step(policy(step)) for step in range(steps)]


def same(left, right):
    return all(
        all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
        and torch.equal(a[4]["final_obs"], b[4]["final_obs"])
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_length_reaches_the_sub_environments_at_the_reset_and_not_before(mode):
    env = cartpole(mode)
    env.reset(seed=1)
    before = env.inner.get_attr("length")
    tasks = torch.tensor([[0.3], [0.8], [1.4]])
    env.set_tasks(tasks)
    assert env.inner.get_attr("length") == before
    with pytest.raises(gym.error.ResetNeeded):
        env.step(torch.zeros(B, dtype=torch.int64))
    env.reset()
    assert torch.tensor(env.inner.get_attr("length")).allclose(tasks[:, 0])
    assert torch.tensor(env.inner.get_attr("polemass_length")).allclose(0.1 * tasks[:, 0])
    play(env, 60)  # many episodes end, and the tasks stay
    assert torch.tensor(env.inner.get_attr("length")).allclose(tasks[:, 0])
    env.close()


def test_each_environment_moves_as_a_lone_cartpole_of_its_length():
    env = cartpole()
    tasks = torch.tensor([[0.3], [0.8], [1.4]])
    env.set_tasks(tasks)
    obs, _ = env.reset(seed=5)
    lone = [gym.make("CartPole-v1").unwrapped for _ in range(B)]
    for row, (single, length) in enumerate(zip(lone, tasks[:, 0].tolist(), strict=True)):
        single.reset()
        single.length, single.polemass_length = length, 0.1 * length
        single.state = env.inner.envs[row].unwrapped.state
    for step in range(8):
        obs, *_ = env.step(torch.full((B,), step % 2))
        expected = [single.step(step % 2)[0] for single in lone]
        assert obs.allclose(torch.tensor(np.stack(expected)), atol=1e-6)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_final_obs_is_the_last_observation_and_obs_the_next_episodes_first(mode):
    env = cartpole(mode)
    env.reset(seed=1)
    ends = 0
    for _ in range(40):
        obs, reward, terminated, truncated, info = env.step(torch.ones(B, dtype=torch.int64))
        final = info["final_obs"]
        assert (
            obs.shape == final.shape == (B, 4) and obs.dtype == final.dtype == reward.dtype == torch.float32
        )
        assert terminated.dtype == truncated.dtype == torch.bool
        fallen = (final[:, 2].abs() > 0.2094) | (final[:, 0].abs() > 2.4)
        assert torch.equal(fallen, terminated)  # the pole lies in final_obs ...
        assert (obs[terminated].abs() <= 0.05).all()  # ... and stands again in obs
        assert torch.equal(obs[~terminated], final[~terminated])
        ends += int(terminated.sum())
    assert ends > B
    env.close()


def test_a_time_limit_truncates_and_a_fall_terminates_never_both():
    env = cartpole(horizon=5)
    env.reset(seed=1)
    assert env.horizon == 5
    for step, (_, _, terminated, truncated, _) in enumerate(play(env, 20), start=1):
        assert not terminated.any() and bool(truncated.all()) == (step % 5 == 0)

    class FallsAtTheLimit(Toy):
        def step(self, action):
            self.count += 1
            return self.see(), 0.0, np.bool_(self.count == 5), self.count == 5, {}

    env = adapted(vectorized(FallsAtTheLimit), horizon=5)
    env.reset()
    *_, terminated, truncated, _ = play(env, 5)[-1]
    assert terminated.all() and not truncated.any()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_same_seed_gives_the_same_numbers_and_sub_environments_differ(mode):
    runs = []
    for construction in (0, 0, 1):
        env = cartpole(mode, seed=construction)
        tasks = env.sample_tasks(B)
        env.set_tasks(tasks)
        obs, _ = env.reset()
        runs.append((tasks, obs, play(env, 30)))
        env.close()
    assert (
        torch.equal(runs[0][0], runs[1][0])
        and torch.equal(runs[0][1], runs[1][1])
        and same(runs[0][2], runs[1][2])
    )
    assert not torch.equal(runs[0][0], runs[2][0]) and not torch.equal(runs[0][1], runs[2][1])
    assert len(set(runs[0][1][:, 0].tolist())) == B


def test_sync_and_async_are_the_same_environment():
    runs = []
    for mode in ("sync", "async"):
        env = cartpole(mode)
        env.reset(seed=3)
        runs.append(play(env, 40))
        env.close()
    assert same(*runs)


def test_global_random_states_are_untouched():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    env = cartpole()
    env.sample_tasks(5), env.sample_tasks(5, split="test"), env.reset(seed=1), play(env, 30)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_without_get_state_and_set_state_a_resume_is_refused():
    env = cartpole()
    env.reset(seed=1)
    with pytest.warns(UserWarning, match="cannot be resumed"):  # a run says so at its first checkpoint
        state = env.state_dict()
    with pytest.raises(ValueError, match="cannot be resumed exactly"):
        cartpole().load_state_dict(state)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_with_get_state_and_set_state_a_resume_is_exact(mode, tmp_path):
    env = cartpole(mode, get_state=get_state, set_state=set_state)
    env.set_tasks(torch.tensor([[0.3], [0.8], [1.4]]))
    env.reset(seed=1)
    play(env, 7)
    torch.save(env.state_dict(), tmp_path / "state.pt")
    expected, more_tasks = play(env, 60), env.sample_tasks(B)
    other = cartpole(mode, seed=9, get_state=get_state, set_state=set_state)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(expected, play(other, 60))
    assert torch.equal(more_tasks, other.sample_tasks(B))
    assert torch.equal(env.reset()[0], other.reset()[0])
    env.close(), other.close()


def test_a_state_that_no_checkpoint_gives_back_is_refused_at_the_first_reset():
    def with_numpy(vector_env):
        return {"state": list(vector_env.get_attr("state"))}

    for state in (with_numpy, lambda vector_env: [lambda: 0], lambda vector_env: np.float64(1)):
        env = cartpole(get_state=state, set_state=set_state)
        with pytest.raises(common.ContractError, match="get_state must return plain tensors and numbers"):
            env.reset(seed=1)


# ---- what a foreign environment may look like


class Toy(gym.Env):
    """Observes with `see`, and remembers the action it was given."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,), np.float64), gym.spaces.Discrete(2)

    def see(self):
        return np.full(2, 0.5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.see(), {}

    def step(self, action):
        self.count, self.action = self.count + 1, action
        return self.see(), np.float64(1.0), np.bool_(self.count == 3), np.bool_(False), {}


def vectorized(cls, mode=AutoresetMode.SAME_STEP, wrap=lambda env: env):
    """num_envs -> VectorEnv without a spec, as people write them."""
    return lambda num_envs: gym.vector.SyncVectorEnv(
        [lambda: wrap(cls()) for _ in range(num_envs)], autoreset_mode=mode
    )


def test_float64_observations_and_numpy_flags_arrive_as_float32_and_bool():
    env = adapted(vectorized(Toy), horizon=3)
    obs, _ = env.reset()
    assert env.single_observation_space.dtype == np.float32 and obs.dtype == torch.float32
    obs, reward, terminated, truncated, info = play(env, 3)[-1]
    assert (
        obs.dtype == reward.dtype == info["final_obs"].dtype == torch.float32
        and terminated.all()
        and terminated.dtype == torch.bool
    )
    info["final_obs"].fill_(7), obs.fill_(7)
    assert (play(env, 1)[0][0] == 0.5).all()


def test_discrete_and_nested_observations_are_flattened():
    gym.register("TestDictObs-v0", entry_point=DictToy, max_episode_steps=4)
    env = adapted("TestDictObs-v0")
    obs, _ = env.reset()
    assert env.single_observation_space.shape == (5,) and obs.tolist() == [[0.5, 0.5, 0, 1, 0]] * B
    frozen_lake = adapted("FrozenLake-v1")
    assert frozen_lake.reset()[0].tolist() == [[1.0] + [0.0] * 15] * B


class DictToy(Toy):
    observation_space = gym.spaces.Dict(
        place=gym.spaces.Box(-1, 1, (2,), np.float64), room=gym.spaces.Discrete(3)
    )

    def see(self):
        return {"place": np.full(2, 0.5), "room": 1}


def test_box_actions_are_rescaled_from_one_and_clipped_and_discrete_ones_count_from_zero():
    class Steered(Toy):
        action_space = gym.spaces.Box(np.array([0.0, -4.0]), np.array([2.0, 4.0]), dtype=np.float64)

    env = adapted(vectorized(Steered), horizon=3)
    env.reset()
    assert (env.single_action_space.low == -1).all() and (env.single_action_space.high == 1).all()
    env.step(torch.tensor([[0.0, 0.5], [1.0, -1.0], [9.0, -9.0]], requires_grad=True))
    assert [single.action.tolist() for single in env.inner.envs] == [[1, 2], [2, -4], [2, -4]]

    class FromOne(Toy):
        action_space = gym.spaces.Discrete(2, start=1)

    env = adapted(vectorized(FromOne), horizon=3)
    env.reset(), env.step(torch.tensor([0, 1, 0]))
    assert env.single_action_space == gym.spaces.Discrete(2) and [
        single.action for single in env.inner.envs
    ] == [1, 2, 1]


def test_own_sampling_and_references_are_used():
    def sample(n, generator):
        return torch.randint(2, (n, 1), generator=generator, device=generator.device).float()

    env = adapted("CartPole-v1", sample=sample, references={"random": 22.0})
    assert set(env.sample_tasks(50).flatten().tolist()) == {0.0, 1.0} and env.references == {"random": 22.0}
    assert env.sample_tasks(50, split="test").shape == (50, 1) and env.horizon == 500


class Unbounded(Toy):
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,))


class Many(Toy):
    action_space = gym.spaces.MultiDiscrete([2, 3])


@pytest.mark.parametrize(
    ("env", "kwargs", "complaint"),
    [
        (vectorized(Toy, AutoresetMode.NEXT_STEP), {"horizon": 3}, "SAME_STEP"),
        (lambda num_envs: gym.make_vec("CartPole-v1", num_envs, "sync"), {}, "SAME_STEP"),
        (lambda num_envs: gym.make("CartPole-v1"), {}, "must return a gymnasium.vector.VectorEnv of 3"),
        (
            lambda num_envs: vectorized(Toy)(2),
            {"horizon": 3},
            "must return a gymnasium.vector.VectorEnv of 3",
        ),
        (vectorized(Toy), {}, "give horizon="),
        (vectorized(DictToy), {"horizon": 3}, "flat Box"),
        (vectorized(Unbounded), {"horizon": 3}, "finite bounds"),
        (vectorized(Many), {"horizon": 3}, "must be Discrete or a flat float Box"),
        ("CartPole-v1", {"vectorization_mode": "vector_entry_point"}, "'sync' or 'async'"),
        ("CartPole-v1", {"test_tasks": [0.1, 0.2]}, r"test_tasks must be \[2, 1\], got \[2\]"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(env, kwargs, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        adapted(env, **kwargs)
    assert "\n" not in str(error.value)


def test_bounds_have_to_be_finite_where_tasks_are_drawn_between_them():
    arguments = (2, "CartPole-v1", set_lengths, [0.25], [np.inf])
    with pytest.raises(ValueError, match="low and high must be finite"):
        AdaptedTasks(*arguments)
    env = AdaptedTasks(*arguments, sample=lambda n, generator: np.full((n, 1), 7.0))
    assert env.sample_tasks(3).tolist() == [[7.0]] * 3


def test_a_held_out_set_that_is_given_has_its_own_size():
    env = adapted("CartPole-v1", test_tasks=[[0.1], [0.2], [0.3]])
    assert env.num_test_tasks == 3 and env.sample_tasks(2, split="test").flatten().tolist() == [
        pytest.approx(0.1),
        pytest.approx(0.2),
    ]
    with pytest.raises(ValueError, match="has 3 tasks, 5 asked for"):
        env.sample_tasks(5, split="test")


def test_rows_that_sample_gives_in_another_shape_are_refused():
    env = adapted("CartPole-v1", sample=lambda n, generator: torch.rand(n, generator=generator))
    with pytest.raises(common.ContractError, match=r"sample must give \[4, 1\], got \[4\]"):
        env.sample_tasks(4)


def test_an_episode_beyond_the_horizon_is_refused_and_one_of_that_length_is_not():
    env = adapted(vectorized(Toy), horizon=3)
    env.reset(), play(env, 10)
    env = adapted(vectorized(Toy), horizon=2)
    env.reset(), play(env, 2)
    with pytest.raises(common.ContractError, match="went beyond its 2 steps"):
        play(env, 1)
    for _ in range(3):  # a reset begins new episodes
        env.reset(), play(env, 2)


@pytest.mark.parametrize("bad", ["observation", "last observation", "reward"])
def test_numbers_that_are_not_finite_are_refused_where_they_come_from(bad):
    class Broken(Toy):
        def see(self):
            first = self.count == 0 and getattr(self, "ends", 0) > 0
            now = {"observation": first, "last observation": self.count == 3}.get(bad, False)
            return np.array([0.5, np.nan if now else 0.5])

        def step(self, action):
            obs, reward, terminated, truncated, info = super().step(action)
            self.ends = getattr(self, "ends", 0) + int(terminated)
            return obs, np.inf if bad == "reward" and terminated else reward, terminated, truncated, info

    env = adapted(vectorized(Broken), horizon=3)
    env.reset(), play(env, 2)
    with pytest.raises(common.ContractError, match=f"environment's {bad} is not finite"):
        play(env, 1)


def test_a_first_observation_that_is_not_finite_is_refused_at_the_reset():
    class Broken(Toy):
        def see(self):
            return np.array([0.5, np.nan])

    with pytest.raises(common.ContractError, match="environment's first observation is not finite"):
        adapted(vectorized(Broken), horizon=3).reset()


def test_a_misspelt_argument_is_refused_where_it_is_registered():
    with pytest.raises(TypeError, match="horizn"):
        common.register("NeverMade-v0", "CartPole-v1", set_lengths, low=[0.25], high=[1.5], horizn=3)
    assert "NeverMade-v0" not in common.ids()


def test_a_registered_environment_is_made_like_ours(tmp_path, monkeypatch):
    source = "import common\ncommon.register('ModulePole-v0', 'CartPole-v1', print, low=[0.5], high=[1.0])\n"
    (tmp_path / "my_test_tasks.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    env = common.make("my_test_tasks:ModulePole-v0", num_envs=2, seed=3)
    assert (
        "ModulePole-v0" in common.ids()
        and env.spec.id == "ModulePole-v0"
        and env.sample_tasks(4).shape == (4, 1)
    )
    with pytest.raises(ValueError, match="no_such_module.*is its folder on PYTHONPATH?"):
        common.make("no_such_module:ModulePole-v0", num_envs=2)
    (tmp_path / "my_needy_tasks.py").write_text("import not_installed\n")
    with pytest.raises(ValueError, match="No module named 'not_installed'$"):  # the folder was found
        common.make("my_needy_tasks:ModulePole-v0", num_envs=2)
    gym.registry.pop("ModulePole-v0")


def test_the_held_out_set_has_the_size_that_was_asked_for():
    assert adapted("CartPole-v1").num_test_tasks == 64  # each of them may be a process
    assert adapted("CartPole-v1", num_test_tasks=5).sample_tasks(5, split="test").shape == (5, 1)
    with pytest.raises(ValueError, match="has 5 tasks, 6 asked"):
        adapted("CartPole-v1", num_test_tasks=5).sample_tasks(6, split="test")


def test_a_subclass_in_pure_torch_is_registered_with_gymnasium_alone():
    class HeavyPoints(PointGoal):
        pass

    gym.register("HeavyPoints-v0", vector_entry_point=HeavyPoints)
    try:
        assert "HeavyPoints-v0" in common.ids()
        assert isinstance(common.make("HeavyPoints-v0", num_envs=3, seed=1).unwrapped, HeavyPoints)
    finally:
        gym.registry.pop("HeavyPoints-v0")


class Lights(gym.Env):
    """A number that actions move to a goal. It tells of success only where there is some."""

    observation_space = gym.spaces.Box(-9, 9, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    goal, place, age = 0.0, 0.0, 0

    def reset(self, *, seed=None, options=None):
        self.place, self.age = 0.0, 0
        return np.float32([self.place]), {}

    def step(self, action):
        self.place, self.age = self.place + float(action[0]), self.age + 1
        near = abs(self.place - self.goal) < 0.5
        info = {"near": True} if near else {}
        return np.float32([self.place]), float(near) - 1, near, self.age == 5, info


GOALS = (
    lambda obs: obs,
    lambda achieved, goal: ((achieved - goal).abs() < 0.5).float().squeeze(-1) - 1,
    lambda achieved, goal: ((achieved - goal).abs() < 0.5).squeeze(-1),
)
LIGHTS = (
    lambda n: gym.vector.SyncVectorEnv([Lights] * n, autoreset_mode=AutoresetMode.SAME_STEP),
    lambda env, tasks: env.set_attr("goal", tasks[:, 0].tolist()),
)


@pytest.mark.parametrize(
    ("which", "wrong", "complaint"),
    [
        (0, lambda obs: obs.repeat(1, 2), r"achieved_goal: expected \[6, 1\], got \[6, 2\]"),
        (1, lambda achieved, goal: ((achieved - goal).abs() < 2).float().squeeze(-1) - 1, "compute_reward"),
        (1, lambda achieved, goal: ((achieved - goal).abs() < 0.5).float() - 1, "compute_reward"),
        (2, lambda achieved, goal: ((achieved - goal).abs() < 2).squeeze(-1), "compute_terminated"),
        (2, lambda achieved, goal: ((achieved - goal).abs() < 0.5).squeeze(-1).float(), "compute_terminated"),
    ],
)
def test_goals_that_say_something_else_than_the_environment_are_refused(which, wrong, complaint):
    goals = [*GOALS[:which], wrong, *GOALS[which + 1 :]]
    env = AdaptedTasks(6, *LIGHTS, low=[-5], high=[5], horizon=5, goals=goals)
    env.set_tasks(torch.arange(6.0)[:, None] + 1)
    env.reset(seed=0)
    with pytest.raises(common.ContractError, match=complaint):
        env.step(torch.full((6, 1), 0.4))


def test_goals_are_compared_for_one_horizon_only():
    """Rounding at a goal's edge must not end a long run."""
    seen = []

    def late(achieved, goal):
        seen.append(0)
        return GOALS[1](achieved, goal) - int(len(seen) > 5)

    env = AdaptedTasks(6, *LIGHTS, low=[-5], high=[5], horizon=5, goals=(GOALS[0], late, GOALS[2]))
    env.set_tasks(torch.arange(6.0)[:, None] + 1)
    env.reset(seed=0)
    for _ in range(12):
        env.step(torch.full((6, 1), 0.4))
    assert len(seen) == 5


def test_goals_and_success_of_an_adapted_environment():
    common.register("Lights-v0", *LIGHTS, low=[-5], high=[5], horizon=5, goals=GOALS, success="near")
    env = common.make("Lights-v0", num_envs=6, seed=0)
    assert env.goal_space == env.task_space and env.has_success
    tasks = torch.tensor([[1.0], [2.0], [3.0], [-1.0], [9.0], [4.0]])
    env.set_tasks(tasks)
    env.reset(seed=0)
    seen = []
    for _ in range(12):
        _, reward, terminated, _, info = env.step(torch.ones(6, 1))
        achieved = env.achieved_goal(info["final_obs"])
        assert torch.equal(env.compute_reward(achieved, tasks), reward)
        assert torch.equal(env.compute_terminated(achieved, tasks), terminated)
        assert torch.equal(info["success"], terminated)
        seen.append(info["success"])
    assert torch.stack(seen).sum(0).tolist() == [12, 6, 4, 0, 0, 3]
