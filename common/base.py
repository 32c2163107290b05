"""The contract of every task distribution: a Gymnasium vector environment whose rows play MDPs of their own.

A task is one row of numbers, and the row is the whole MDP: two environments given the same row are the same
MDP. So tasks are stored, sorted, held out, told to an oracle or repeated over a batch by mere indexing:

    env = common.make("PointGoal-v0", num_envs=800, device="cuda", seed=1)
    tasks = env.sample_tasks(40)                   # [40, task_dim]
    env.set_tasks(tasks.repeat_interleave(20, 0))  # row i plays tasks[i // 20] from the next reset on
    obs, info = env.reset(seed=1)
    obs, reward, terminated, truncated, info = env.step(action)

All tensors live on `device`: obs float32 [B, obs], reward float32 [B], terminated and truncated bool [B].

One of your own: subclass TaskVectorEnv and fill in four hooks, or let common.register (adapter.py) make one
of a Gymnasium environment in which something can be set; --env-id your_module:YourId-v0 imports your_module
first. The scripts use what TaskVectorEnv has (epopt.py also what ensembles.py adds), and nothing else: its
attributes and their defaults are below. Observations are float32 with one axis, actions Discrete (from 0) or
a float32 Box with one axis and finite bounds, and final_obs is in info at every step. Numbers are finite.
rl2_ppo.py reads observations and rewards as they are: keep them within a few units, or --normalize-inputs.
A whole family, a sledge whose friction is the task:

    import gymnasium as gym
    import torch
    from common.base import TaskVectorEnv, box

    class Sledge(TaskVectorEnv):
        def __init__(self, num_envs, device="cpu", seed=None):  # these three, by these names
            spaces = box(-9, 9, (2,)), box(-1, 1, (1,)), box(0, 1, (1,))  # of observations, actions, tasks
            super().__init__(num_envs, *spaces, 50, device, seed)  # 50 steps an episode

        def _draw_tasks(self, n, generator):
            return torch.rand(n, 1, generator=generator, device=generator.device)

        def _start(self):
            return torch.zeros(self.num_envs, 2, device=self.device)  # position, speed

        def _transition(self, state, action):  # None: nothing ends early; else [B] bool and terminates = True
            speed = state[:, 1] + 0.1 * (action[:, 0] - self._task[:, 0] * state[:, 1])
            state = torch.stack([state[:, 0] + 0.1 * speed, speed], 1)
            return state, -(state[:, 0] - 1).abs(), None, {}

        def _observe(self, state):
            return state.clone()

    gym.register("Sledge-v0", vector_entry_point=Sledge)
"""

import os

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode

# Three ranges of seeds below 2**32: torch's CPU generator reads no higher bits, so 2**40 + 7 would be 7
# again.
SEEDS = 2**30  # what a user gives is below this, and seeds the draws of training tasks as it is
DYNAMICS_STREAM = 2**31  # added for starts and noise: else a bandit's payout would repeat the draw of p
TEST_SEED = 3 * 2**30 + 7  # beyond both, so no training stream ever repeats the held-out draws

STATE = ("_task", "_next_task", "_state", "_clock", "_deadline")  # state_dict adds the random states


class ContractError(ValueError):
    """A task distribution does not do what it has to; the scripts end with its one line."""


class TaskVectorEnv(gym.vector.VectorEnv):
    """A distribution over MDPs, played in parallel. Families in pure torch fill in the hooks.

    Hooks:  _draw_tasks(n, generator) -> [n, task_dim]    training distribution, on the generator's device
            _start() -> state [B, ...]                    a fresh start for every environment of the batch
            _transition(state, action) -> (next_state, reward [B], terminated [B] or None, info)
            _observe(state) -> obs [B, obs]               a new tensor, which the caller may overwrite
    The reward is a new tensor, too. info["dense_reward"] [B], where there is one, is what PEARL, DARC and,
    without hindsight, contextual policies are trained on; evaluation counts the reward.

    Autoreset is SAME_STEP: where an episode ends, obs is already the next episode's first observation, and
    info["final_obs"] (always there, always full, never the same memory as obs) is the true last one. Only
    set_tasks changes a task, never an episode's end.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    is_task_distribution = True  # common.ids() lists what is registered with this class as its entry point
    references = {}  # player -> mean return of ONE episode on this distribution
    trial_references = {}  # episodes in a trial -> {player that learns within it -> mean return of the trial}
    num_test_tasks = 1000  # size of the frozen held-out set
    terminates = False  # False: every episode lasts `horizon` steps, so all end together and need no masks
    has_success = False  # True: info["success"] [B] bool says at which steps the goal is reached
    named_tasks = {}  # name -> task row [task_dim] on `device`, where some rows have names
    test_groups = {}  # name -> slice of the held-out set, where it has parts
    ensemble = None  # where tasks are models of one body: [4, task_dim], see ensembles.py
    goal_space = None  # where a task is a goal to reach: the space of goals, which is the task space

    def __init__(self, num_envs, obs_space, action_space, task_space, horizon, device="cpu", seed=None):
        if num_envs < 1 or horizon < 1:
            raise ValueError(f"num_envs and horizon must be at least 1, got {num_envs} and {horizon}")
        discrete = isinstance(action_space, gym.spaces.Discrete) and action_space.start == 0
        flat = isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1
        if not (discrete or flat and action_space.is_bounded() and action_space.dtype == "float32"):
            wanted = "Discrete from 0 or a flat Box with finite bounds, of float32"
            raise ValueError(f"actions: {wanted}, got {action_space}")
        if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
            raise ValueError(f"observations: a flat Box, got {obs_space}")
        seed = int.from_bytes(os.urandom(4), "little") % SEEDS if seed is None else _checked_seed(seed)
        self.num_envs, self.horizon, self.device = num_envs, horizon, torch.device(device)
        self.single_observation_space, self.single_action_space = obs_space, action_space
        self.task_space = task_space
        self.observation_space = gym.vector.utils.batch_space(obs_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(action_space, num_envs)
        self._task_generator = torch.Generator(self.device)  # drives sample_tasks and nothing else
        self._generator = torch.Generator(self.device)  # drives starts, noise and dynamics
        self._task_generator.manual_seed(seed)
        self._generator.manual_seed(seed + DYNAMICS_STREAM)
        self._test_tasks = None  # drawn when first asked for
        self._task = None  # [B, task_dim], what is being played
        self._next_task = None  # [B, task_dim], what set_tasks has announced for the next reset
        self._state = None  # whatever _start returns
        self._clock = 0  # steps since the last reset()
        self._given = None  # between the first two steps, what the first one returned
        self._deadline = None  # int64 [B], the clock at which each episode is cut; only if `terminates`

    # ---- tasks

    def sample_tasks(self, n, split="train"):
        """n task rows, [n, task_dim]: fresh ones, or for split="test" the first n of the frozen set."""
        if split == "train":
            return self._checked_tasks(self._draw_tasks(n, self._task_generator), n, "_draw_tasks must give")
        if split != "test":
            raise ValueError(f"split is 'train' or 'test', got {split!r}")
        if n > self.num_test_tasks:
            raise ValueError(f"the held-out set has {self.num_test_tasks} tasks, {n} asked for")
        if self._test_tasks is None:  # drawn on the CPU, so that every device holds out the same tasks
            generator = torch.Generator().manual_seed(TEST_SEED)
            tasks = self._checked_tasks(
                self._draw_test_tasks(generator), self.num_test_tasks, "the held-out set must be"
            )
            if not torch.equal(tasks, self._draw_test_tasks(torch.Generator().manual_seed(TEST_SEED))):
                raise ContractError(f"{type(self).__name__}: tasks must be drawn from the generator alone")
            self._test_tasks = tasks.to(self.device)
        return self._test_tasks[:n].clone()

    def set_tasks(self, tasks):
        """tasks: [B, task_dim]. Takes effect at the next reset; stepping before it raises."""
        tasks = torch.as_tensor(tasks, dtype=torch.float32, device=self.device)
        self._next_task = self._checked_tasks(tasks, self.num_envs, "set_tasks needs").clone()

    # ---- Gymnasium's interface

    def reset(self, *, seed=None, options=None):
        """Begin a new episode everywhere, with the tasks last set (or, if none ever was, fresh ones)."""
        self._begin(seed)
        self._state, self._clock = self._start(), 0
        if self.terminates:
            self._deadline = torch.full((self.num_envs,), self.horizon, dtype=torch.int64, device=self.device)
        obs = self._observe(self._state)
        self._check_obs(obs)
        return obs, {}

    def step(self, action):
        """action: int64 [B] or float32 [B, act]. Returns obs [B, obs], three of [B], and info."""
        self._require_reset()
        self._clock += 1
        state, reward, terminated, info = self._transition(self._state, action)
        final_obs = self._observe(state)
        if self._clock == 1:
            self._check_transition(final_obs, reward, terminated, info)
            self._given = [(x, x.clone()) for x in (final_obs, reward)]  # held: its memory is not free
        elif self._given is not None:
            self._check_memory(final_obs, reward)
        if terminated is None:
            some_ended = self._clock % self.horizon == 0
            terminated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
            truncated = torch.full_like(terminated, some_ended)
            state = self._start() if some_ended else state
        else:
            truncated = (self._deadline == self._clock) > terminated  # > is "and not": never both
            ended = terminated | truncated
            some_ended = self.device.type != "cpu" or bool(ended.any())  # a GPU would have to be waited for
            if some_ended:
                mask = ended.view(-1, *[1] * (state.dim() - 1))
                state = torch.where(mask, self._start(), state)
                self._deadline = self._deadline.masked_fill(ended, self._clock + self.horizon)
        self._state = state
        info["final_obs"] = final_obs
        return self._observe(state) if some_ended else final_obs.clone(), reward, terminated, truncated, info

    def rest(self, rows):
        """These rows, [B] bool, need not be simulated until the next reset: their episode, or trial, is over.

        What they return means nothing, but is finite: padding is multiplied by 0. Cheap families ignore it.
        """

    # ---- goals: only where goal_space is not None. There a task row is a goal, obs does not contain it, and
    # reward and termination depend on nothing but the goal and what was achieved

    def achieved_goal(self, obs):
        """[..., obs] -> [..., goal], the goal that is reached where obs was observed."""
        raise NotImplementedError(f"{type(self).__name__} has no goals")

    def compute_reward(self, achieved, goal):
        """The reward of a step that leads to `achieved`, both [..., goal] -> [...]. Pure."""
        raise NotImplementedError(f"{type(self).__name__} has no goals")

    def compute_terminated(self, achieved, goal):
        """Does a step that leads to `achieved` end the episode? Both [..., goal] -> [...] bool. Pure."""
        raise NotImplementedError(f"{type(self).__name__} has no goals")

    # ---- exact resume

    def state_dict(self):
        """Everything that decides the future, random states included: plain tensors and numbers."""
        values = {name: getattr(self, name) for name in STATE}
        values = {name: value.clone() if torch.is_tensor(value) else value for name, value in values.items()}
        random = {name: getattr(self, name).get_state() for name in ("_task_generator", "_generator")}
        return {**values, **random}

    def load_state_dict(self, state):
        """Continue exactly where state_dict() was taken."""
        saved = state["_task"] if state["_task"] is not None else state["_next_task"]
        if saved is not None and saved.shape != (self.num_envs, *self.task_space.shape):
            raise ValueError(
                f"this state has tasks {list(saved.shape)}, not [{self.num_envs}, {self.task_space.shape[0]}]"
            )
        for name in STATE:
            value = state[name]
            setattr(self, name, value.to(self.device, copy=True) if torch.is_tensor(value) else value)
        for name in ("_task_generator", "_generator"):
            getattr(self, name).set_state(state[name].cpu())  # a generator's state is a CPU tensor everywhere
        if self._task is not None:
            self._prepare()

    # ---- hooks

    def _draw_test_tasks(self, generator):
        return self._draw_tasks(self.num_test_tasks, generator)

    def _prepare(self):
        """Called when new tasks take effect: a place to derive tables from self._task."""

    def _begin(self, seed):
        """What every reset begins with: the seed of starts and noise, and the tasks that were announced."""
        if seed is not None:
            self._generator.manual_seed(_checked_seed(seed) + DYNAMICS_STREAM)
        if self._next_task is None and self._task is None:
            self._next_task = self.sample_tasks(self.num_envs)
        if self._next_task is not None:
            self._task, self._next_task = self._next_task, None
            self._prepare()

    def _checked_tasks(self, tasks, n, what):
        if tasks.shape != (n, *self.task_space.shape):
            wanted = f"{what} [{n}, {self.task_space.shape[0]}]"
            raise ContractError(f"{type(self).__name__}: {wanted}, got {list(tasks.shape)}")
        return tasks

    def _check_obs(self, obs):
        wanted = f"float32 [{self.num_envs}, {self.single_observation_space.shape[0]}]"
        if _described(obs) != wanted:
            raise ContractError(f"{type(self).__name__}: _observe gives {_described(obs)}, expected {wanted}")
        if not bool(obs.isfinite().all()):
            raise ContractError(f"{type(self).__name__}: an observation is not finite")

    def _check_transition(self, obs, reward, terminated, info):
        """Say what a family returns that it may not, before it fails far from here."""
        name, batch = type(self).__name__, (self.num_envs,)
        self._check_obs(obs)
        if _described(reward) != f"float32 [{self.num_envs}]":
            raise ContractError(f"{name}: a reward is float32 [{self.num_envs}], got {_described(reward)}")
        if (terminated is not None) != self.terminates:
            given = "None" if terminated is None else "a tensor"
            raise ContractError(f"{name}: terminates is {self.terminates}, and terminated is {given}")
        if terminated is not None and (terminated.shape != batch or terminated.dtype != torch.bool):
            given = f"{terminated.dtype} {list(terminated.shape)}"
            raise ContractError(f"{name}: terminated is [{self.num_envs}] bool, got {given}")
        if self.has_success and "success" not in info:
            raise ContractError(f"{name}: has_success is True, and info has no success")
        if _described(info.get("dense_reward", reward)) != _described(reward):
            raise ContractError(
                f"{name}: dense_reward is like reward, got {_described(info['dense_reward'])}"
            )
        if self.goal_space is not None:
            achieved = self.achieved_goal(obs)
            pays, ends = (f(achieved, self._task) for f in (self.compute_reward, self.compute_terminated))
            ended = torch.zeros_like(ends) if terminated is None else terminated
            if pays.shape != reward.shape or not torch.allclose(pays, reward, rtol=1e-3, atol=1e-4):
                raise ContractError(f"{name}: compute_reward does not give the rewards of its steps")
            if not torch.equal(ends, ended):
                raise ContractError(f"{name}: compute_terminated does not end its episodes")

    def _check_memory(self, *given):
        for what, (old, copy), new in zip(("_observe", "the reward"), self._given, given, strict=True):
            same = old.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
            if same and not torch.equal(old, copy):  # what was handed out has been written over
                raise ContractError(f"{type(self).__name__}: {what} must be a new tensor at every step")
        self._given = None

    def _require_reset(self):
        if self._state is None or self._next_task is not None:
            raise gym.error.ResetNeeded("call reset() before step(): new tasks take effect at a reset")


def _described(tensor):
    if not torch.is_tensor(tensor):
        return f"a {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _checked_seed(seed):
    if not 0 <= int(seed) < SEEDS:
        raise ValueError(f"seed must be in [0, 2**30), got {seed}")
    return int(seed)


def box(low, high, shape):
    """A float32 Box; the shape is spelled out because every observation and action here is a flat vector."""
    return gym.spaces.Box(low, high, shape, dtype="float32")
