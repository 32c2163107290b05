"""Meta-World (Yu et al. 2019, arXiv:1910.10897; 3.1.1, "V3"): a Sawyer arm and fifty things to do with it.

MT1-NAME         one of the fifty, by Meta-World's name: MT1-reach-v3. The goal is observed.
MT10, MT50       ten or all of them. A task row is a one-hot vector: the thing to do. Where object and goal
                 are differs from episode to episode, one of 50 places drawn at each start, and is observed.
MT3              the easiest three of MT10: reach, drawer-close, button-press-topdown.
ML1-NAME         one of them, the goal hidden (zeros): a task row is [1, place]. 50 places train, 50 others
                 test.
ML10, ML45       a task row is [one-hot vector of 15 or 50, place]: 10 or 45 train, 5 others test.

An episode is 500 steps and never ends sooner; obs [B, 39], actions in [-1, 1]^4, the reward is between 0
and 10 a step ("V2 rewards"). info["success"] is Meta-World's at this step; an episode counts as solved if any
step was. Where the benchmark would draw its places anew in each process, they are frozen here.

Meta-World asks for a MuJoCo that has no batches, so it is installed without what it asks for:

    pip install imageio scipy packaging && pip install --no-deps metaworld==3.1.1

DIFFERS from Meta-World: on MuJoCo newer than 3.3 a row of weld data is wider, and one method that writes it
is replaced. Places come from Meta-World's benchmark classes: its Gymnasium id for ML1 has test goals in
training.
"""

import functools
import pickle

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from common.adapter import AdaptedTasks

try:
    import metaworld
    from metaworld import env_dict
    from metaworld.sawyer_xyz_env import SawyerMocapBase
except ImportError as error:
    how = "pip install imageio scipy packaging && pip install --no-deps metaworld==3.1.1"
    raise ImportError(f"Meta-World cannot be imported ({error}): {how}") from None

PLACES_SEED = 42  # of the places of all benchmarks
PLACE_DIM = 6  # where the object and its goal are: three numbers or six
MT3 = ("reach-v3", "drawer-close-v3", "button-press-topdown-v3")


def _reset_mocap_welds(self):
    """What Meta-World does to the weld that moves the hand, for rows of 11 numbers or more."""
    for weld in np.flatnonzero(self.model.eq_type == mujoco.mjtEq.mjEQ_WELD):
        self.model.eq_data[weld, :11] = [0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5]


SawyerMocapBase.reset_mocap_welds = _reset_mocap_welds


@functools.cache
def places(benchmark):
    """Meta-World's frozen places of a benchmark: two dicts, of training and of test, name -> [50, 3 or 6]."""
    kind, _, name = benchmark.partition("-")
    if name and name not in env_dict.ALL_V3_ENVIRONMENTS:
        raise ValueError(f"Meta-World has no {name}; it has {', '.join(env_dict.ALL_V3_ENVIRONMENTS)}")
    if benchmark == "MT3":
        return {name: places(f"MT1-{name}")[0][name] for name in MT3}, {}
    make = getattr(metaworld, kind)
    tasks = make(name, seed=PLACES_SEED) if name else make(seed=PLACES_SEED)
    found = []
    for drawn in (tasks.train_tasks, tasks.test_tasks):
        by_name = {}
        for task in drawn:
            by_name.setdefault(task.env_name, []).append(_data(task)["rand_vec"])
        found.append({name: np.array(rows) for name, rows in by_name.items()})
    return tuple(found)


def _data(task):
    return pickle.loads(task.data)


class Sawyer(gym.Env):
    """One arm that can do everything in `names`. `row` says what from the next reset on.

    choices: name -> [50, 3 or 6], the places that an episode draws from; None: the row holds the place.
    """

    def __init__(self, names, choices):
        self.names, self.choices = names, choices
        self.row, self.envs, self.env = None, {}, None
        self.place, self.played = None, []  # all that decides the state, as Meta-World's resets are exact
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float64)
        self.action_space = gym.spaces.Box(-1, 1, (4,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        place = self.row[len(self.names) :].astype(np.float64)
        if self.choices is not None:
            places = self.choices[self.name()]
            place = places[self.np_random.integers(len(places))]
        return self.begin(place), {}

    def name(self):
        """The thing to do that the row says."""
        return self.names[int(np.argmax(self.row[: len(self.names)]))]

    def begin(self, place):
        """Start an episode with object and goal at this place. Returns its first observation."""
        name = self.name()
        if name not in self.envs:
            self.envs[name] = env_dict.ALL_V3_ENVIRONMENTS[name]()
        self.env, self.place, self.played = self.envs[name], place, []
        size = self.env._random_reset_space.low.size
        settings = {"rand_vec": place[:size], "env_cls": type(self.env)}
        settings["partially_observable"] = self.choices is None
        self.env.set_task(metaworld._encode_task(name, settings))
        return self.env.reset()[0]

    def step(self, action):
        self.played.append(np.array(action))
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {"success": bool(info["success"])}

    def close(self):
        for env in self.envs.values():
            env.close()


def _get_state(vector_env):
    """Of each arm: its random state, the place of object and goal, and what it has done since the start."""
    state = []
    for arm in vector_env.envs:
        random = arm.np_random.bit_generator.state
        played = torch.tensor(np.array(arm.played, np.float32).reshape(-1, 4))
        state.append({"random": random, "place": torch.tensor(arm.place), "played": played})
    return state


def _set_state(vector_env, state):
    for arm, saved in zip(vector_env.envs, state, strict=True):
        arm.np_random.bit_generator.state = saved["random"]
        arm.begin(saved["place"].numpy().copy())
        for action in saved["played"].numpy():
            arm.step(action)


def make(num_envs, benchmark, device="cpu", seed=None):
    """A benchmark of Meta-World as a task distribution, all arms in one process (see AdaptedTasks)."""
    train, test = places(benchmark)
    hidden = benchmark.startswith("ML")
    names = list(dict.fromkeys([*train, *test]))  # one-hot vectors in this order
    low = [0] * len(names) + [-2] * PLACE_DIM * hidden
    high = [1] * len(names) + [2] * PLACE_DIM * hidden

    def rows(split, index, place):
        """Rows of the index-th things to do of a split, at the place-th of 50 places. NumPy."""
        split_names = list(split)
        out = np.zeros((len(index), len(low)), np.float32)
        for row, i, j in zip(out, index, place, strict=True):
            name = split_names[i]
            row[names.index(name)] = 1
            if hidden:
                vector = split[name][j]
                row[len(names) : len(names) + len(vector)] = vector
        return out

    def sample(n, generator):
        """As many of each as possible, in turn."""
        draw = {"generator": generator, "device": generator.device}
        first = torch.randint(len(train), (1,), **draw)
        index = (torch.arange(n, device=generator.device) + first) % len(train)
        return rows(train, index.tolist(), torch.randint(50, (n,), **draw).tolist())

    held_out = test or train  # the MT benchmarks test what they train, from fresh starts
    number = len(held_out) * (50 if hidden else 10)
    test_rows = rows(
        held_out, [i % len(held_out) for i in range(number)], [i // len(held_out) for i in range(number)]
    )
    arms = [functools.partial(Sawyer, names, None if hidden else train)] * num_envs
    env = AdaptedTasks(
        num_envs, lambda n: SyncVectorEnv(arms, autoreset_mode=AutoresetMode.SAME_STEP),
        lambda inner, tasks: inner.set_attr("row", list(tasks)), low, high, horizon=500, sample=sample,
        get_state=_get_state, set_state=_set_state, num_test_tasks=number, success="success",
        test_tasks=test_rows, device=device, seed=seed,
    )  # fmt: skip
    env.terminates = False
    if not hidden:
        env.named_tasks = {name: torch.eye(len(names), device=env.device)[i] for i, name in enumerate(names)}
    return env
