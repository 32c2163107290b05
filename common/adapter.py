"""Your own environment as a task distribution: any Gymnasium environment that can be changed from outside.

    # my_tasks.py
    import common

    def set_lengths(vector_env, tasks):  # tasks: numpy float32 [B, 1], one row an environment
        vector_env.set_attr("length", tasks[:, 0].tolist())
        vector_env.set_attr("polemass_length", (0.1 * tasks[:, 0]).tolist())  # CartPole keeps both

    common.register("CartPoleLength-v0", "CartPole-v1", set_lengths, low=[0.25], high=[1.5])

    $ python rl2_ppo.py --env-id my_tasks:CartPoleLength-v0 --num-envs 16 ...

Slow environments run in processes of their own with vectorization_mode="async". Gymnasium's set_attr makes a
new attribute, without a word, when a name is misspelt: look once with vector_env.get_attr.
"""

import functools
import inspect
import io
import warnings

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from common.base import ContractError, TaskVectorEnv, box


class AdaptedTasks(TaskVectorEnv):
    """A gymnasium.vector.VectorEnv with NumPy inside, seen as a task distribution.

    env: a Gymnasium id (observations of any kind are flattened), or a callable num_envs -> VectorEnv in
    SAME_STEP autoreset mode with flat Box observations. Actions: Discrete counts from 0 here, and a Box is
    [-1, 1] here, clipped and rescaled.
    set_tasks_fn(vector_env, tasks): applies task rows, numpy float32 [B, task_dim], before the inner reset,
    which has to leave them alone.
    low, high: bounds of the task row; training and held-out tasks are uniform between them, unless
    sample(n, generator) -> [n, task_dim] is given, which draws from this generator only, on generator.device.
    horizon: episodes are cut there. An id has its own limit; a callable must keep to it itself.
    get_state(vector_env) and set_state(vector_env, state): plain tensors and numbers, no NumPy; only with
    both is a resumed run exact.
    num_test_tasks: size of the held-out set; evaluating on all of it takes that many inner environments.
    test_tasks: [n, task_dim], the held-out set itself, where it is not drawn like the others.
    goals: three functions in torch, achieved_goal(obs), compute_reward(achieved, goal) and
    compute_terminated(achieved, goal), where a task row is a goal (see TaskVectorEnv); obs must not show it.
    success: the name under which the inner environment's info says whether the goal is reached; an info
    without it says no.

    Raises ValueError for arguments that cannot work, and ContractError (one too) for what shows later.
    """

    terminates = True

    def __init__(
        self, num_envs, env, set_tasks_fn, low, high, vectorization_mode="sync", horizon=None, sample=None,
        get_state=None, set_state=None, references=None, num_test_tasks=64, test_tasks=None,
        goals=None, success=None, device="cpu", seed=None,
    ):  # fmt: skip
        low, high = np.atleast_1d(np.float32(low)), np.atleast_1d(np.float32(high))
        if sample is None and not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError(f"low and high must be finite unless sample= draws the tasks, got {low}, {high}")
        if isinstance(env, str):
            if vectorization_mode not in ("sync", "async"):
                raise ValueError(f"vectorization_mode is 'sync' or 'async', got {vectorization_mode!r}")
            limit = {} if horizon is None else {"max_episode_steps": horizon}
            mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
            flatten = [gym.wrappers.FlattenObservation]
            options = {"vector_kwargs": mode, "wrappers": flatten, **limit}
            self.inner = gym.make_vec(env, num_envs, vectorization_mode, **options)
        else:
            self.inner = env(num_envs)
        try:
            obs_space, action_space, horizon = self._look_at(self.inner, num_envs, horizon)
        except ValueError:
            self.inner.close()  # no worker processes are left behind
            raise
        task_space = gym.spaces.Box(low, high, dtype=np.float32)
        super().__init__(num_envs, obs_space, action_space, task_space, horizon, device, seed)
        self._held_out = None if test_tasks is None else torch.as_tensor(test_tasks, dtype=torch.float32)
        if test_tasks is not None:
            num_test_tasks = len(self._checked_tasks(self._held_out, len(test_tasks), "test_tasks must be"))
        self.references, self.num_test_tasks = references or {}, num_test_tasks
        self._set_tasks_fn, self._sample = set_tasks_fn, sample
        self._get_state, self._set_state = get_state, set_state
        if goals is not None:
            self.goal_space = self.task_space
            self.achieved_goal, self.compute_reward, self.compute_terminated = goals
        self._success, self.has_success = success, success is not None
        self._length = np.zeros(num_envs, np.int64)  # steps of each episode so far
        self._steps = 0  # in all

    def _look_at(self, inner, num_envs, horizon):
        """Observation space, action space and horizon as base.py wants them. Refuses what cannot work."""
        if not isinstance(inner, gym.vector.VectorEnv) or inner.num_envs != num_envs:
            raise ValueError(f"env must return a gymnasium.vector.VectorEnv of {num_envs} envs, got {inner}")
        if (inner.metadata or {}).get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ValueError("an adapted VectorEnv must be made with autoreset_mode=AutoresetMode.SAME_STEP")
        horizon = horizon or (inner.spec.max_episode_steps if inner.spec else None)
        if not horizon:
            raise ValueError("this environment has no time limit of its own: give horizon=")
        seen, acted = inner.single_observation_space, inner.single_action_space
        if not isinstance(seen, gym.spaces.Box) or len(seen.shape) != 1:
            raise ValueError(
                f"observations must be a flat Box, got {seen}: wrap it in FlattenObservation first"
            )
        obs_space = gym.spaces.Box(np.float32(seen.low), np.float32(seen.high), dtype=np.float32)
        if isinstance(acted, gym.spaces.Discrete):
            self._to_inner = lambda action: action + acted.start
            return obs_space, gym.spaces.Discrete(int(acted.n)), horizon
        flat = isinstance(acted, gym.spaces.Box) and len(acted.shape) == 1 and acted.dtype.kind == "f"
        if not flat or not acted.is_bounded():
            raise ValueError(f"actions must be Discrete or a flat float Box with finite bounds, got {acted}")
        middle, half = (acted.high + acted.low) / 2, (acted.high - acted.low) / 2
        self._to_inner = lambda action: (middle + half * np.clip(action, -1, 1)).astype(acted.dtype)
        return obs_space, box(-1, 1, acted.shape), horizon

    def _draw_tasks(self, n, generator):
        if self._sample is not None:
            rows = torch.as_tensor(self._sample(n, generator), dtype=torch.float32, device=generator.device)
            return self._checked_tasks(rows, n, "sample must give")
        bounds = torch.tensor(np.stack([self.task_space.low, self.task_space.high]), device=generator.device)
        low, high = bounds
        return low + (high - low) * torch.rand(n, len(low), generator=generator, device=generator.device)

    def _draw_test_tasks(self, generator):
        if self._held_out is None:
            return super()._draw_test_tasks(generator)
        return self._held_out

    def _prepare(self):
        self._set_tasks_fn(self.inner, self._task.cpu().numpy().copy())

    def reset(self, *, seed=None, options=None):
        self._begin(seed)
        # the inner environments carry their own random states from then on
        first = self._state is None or seed is not None
        draw = int(torch.randint(2**31, (), generator=self._generator, device=self.device)) if first else None
        obs, _ = self.inner.reset(seed=draw)  # environment i gets draw + i
        if self._state is None and self._get_state is not None:
            self._check_state(self._get_state(self.inner))
        self._state = True
        self._length[:] = 0
        self._check_finite({"first observation": obs})
        return self._to_torch(obs), {}

    def step(self, action):
        self._require_reset()
        action = self._to_inner(action.detach().cpu().numpy())
        obs, reward, terminated, truncated, info = self.inner.step(action)
        terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
        final_obs, ended = np.array(obs, np.float32), terminated | truncated
        if ended.any():
            final_obs[ended] = np.stack(list(info["final_obs"][ended]))
        self._check_step(obs, final_obs, reward, ended)
        flags = (self._to_torch(flag, torch.bool) for flag in (terminated, truncated & ~terminated))
        seen = {"final_obs": self._to_torch(final_obs)}
        if self.has_success:  # where an episode ended, the last step's info is under final_info
            success = np.array(info.get(self._success, np.zeros(self.num_envs)), bool)
            if ended.any():
                success[ended] = info["final_info"].get(self._success, np.zeros(self.num_envs))[ended]
            seen["success"] = self._to_torch(success, torch.bool)
        reward, (terminated, truncated) = self._to_torch(reward), flags
        if self.goal_space is not None and self._steps <= self.horizon:  # rounding may differ at an edge
            self._check_goals(seen["final_obs"], reward, terminated)
        return self._to_torch(obs), reward, terminated, truncated, seen

    def _check_state(self, state):
        """A checkpoint that cannot be read back is found out before training."""
        file = io.BytesIO()
        try:
            torch.save(state, file)
            torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        except Exception as error:  # whatever pickle makes of somebody else's objects
            raise ContractError(
                f"get_state must return plain tensors and numbers, no NumPy ({type(error).__name__})"
            ) from error

    def _check_step(self, obs, final_obs, reward, ended):
        """Refuse what would be learned from without a word."""
        self._check_finite({"observation": obs, "last observation": final_obs, "reward": reward})
        self._steps, self._length = self._steps + 1, self._length + 1
        if self._length.max() > self.horizon:
            raise ContractError(f"an episode of the inner environment went beyond its {self.horizon} steps")
        self._length[ended] = 0

    def _check_finite(self, values):
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise ContractError(f"the inner environment's {name} is not finite")

    def _check_goals(self, final_obs, reward, terminated):
        """goals= have to say what the inner environment does, or hindsight learns from something else."""
        achieved = self.achieved_goal(final_obs)
        if achieved.shape != self._task.shape:
            raise ContractError(
                f"achieved_goal: expected {list(self._task.shape)}, got {list(achieved.shape)}"
            )
        pays, ends = (f(achieved, self._task) for f in (self.compute_reward, self.compute_terminated))
        if pays.shape != reward.shape or not torch.allclose(pays, reward, rtol=1e-3, atol=1e-4):
            raise ContractError("compute_reward does not give the rewards of the inner environment")
        if ends.dtype != torch.bool or not torch.equal(ends, terminated):
            raise ContractError("compute_terminated does not end the inner environment's episodes")

    def close_extras(self, **kwargs):
        self.inner.close()

    def state_dict(self):
        state = {**super().state_dict(), "exact": self._get_state is not None and self._set_state is not None}
        if not state["exact"]:
            warnings.warn("no get_state and set_state: a run on this cannot be resumed", stacklevel=2)
        return {**state, "inner": self._get_state(self.inner)} if state["exact"] and self._state else state

    def load_state_dict(self, state):
        if not (state["exact"] and self._set_state):
            raise ValueError(
                "without get_state and set_state an adapted environment cannot be resumed exactly"
            )
        super().load_state_dict(state)
        if self._state:
            self.inner.reset(seed=0)  # Gymnasium refuses to step what was never reset
            self._set_state(self.inner, state["inner"])

    def _to_torch(self, array, dtype=torch.float32):
        # copies: the inner environment may reuse its arrays
        return torch.tensor(np.asarray(array), dtype=dtype, device=self.device)


def register(env_id, env, set_tasks_fn, low, high, **kwargs):
    """Give your own task distribution an id that every script takes. Arguments: see AdaptedTasks."""
    kwargs = {"env": env, "set_tasks_fn": set_tasks_fn, "low": low, "high": high, **kwargs}
    inspect.signature(AdaptedTasks).bind_partial(**kwargs)  # a name misspelt is a TypeError here
    entry = functools.partial(AdaptedTasks, **kwargs)
    entry.is_task_distribution = True  # a partial hides the class that says so
    gym.register(env_id, vector_entry_point=entry)
