"""Ensembles: one body whose physical parameters are uncertain, in pure torch. mujoco_ensembles.py has more.

A task row is a model: its parameters in their physical units, as in `parameters`, and last a factor on
something that the ensemble does not vary. It is 1 in training; policies can be tested where it is not.

CartPoleEnsemble-v0     CartPole-v1 with any force from -10 to 10 N: the cart's mass, the pole's mass and its
                        half-length. Reward 1 for every step; the episode is over 2.4 m from the middle, where
                        the pole leans by more than 12 degrees, or after 500 steps. Not varied: the force.
CartPoleRunEnsemble-v0  The same cart with a weaker motor, 3 N, on a track without ends: a hopper in small.
                        Reward 1 + 2 v, v the cart's speed to the right in m/s, until the pole leans by more
                        than 12 degrees, or 200 steps. To run, the pole must lean; but a heavy cart cannot
                        catch a pole that leans as far as a light one can.
PendulumEnsemble-v0     Pendulum-v1, to be swung up: mass and length. 200 steps. Not varied: gravity.

Training models are truncated normals, each parameter on its own, as in EPOpt (Rajeswaran et al. 2017,
arXiv:1610.01283), whose ensembles are the MuJoCo ones. The held-out set is a grid in three parts, whose rows
`test_groups` tells apart:
    inside       the first parameter in 7 steps over its range, the others at their mean and one deviation to
                 both sides of it, all combinations
    beyond       one parameter past an end of its range by a sixth of it (not below half of the low end): the
                 first, the others as above; or another, the first in 7 steps and the rest at their means
    unmodelled   the first parameter in 7 steps, the others at their means, and the last entry not 1
"""

import math

import torch

from common.base import ContractError, TaskVectorEnv, box
from common.classic import push_cart, turn_pendulum

UPRIGHT = 12 * 2 * math.pi / 360  # CartPole-v1's limit


class Ensemble(TaskVectorEnv):
    """Models as tasks. A subclass has a body, and says what is uncertain about it.

    parameters: name -> (mean, std, low, high). unmodelled: what the last entry is a factor on, and where it
    is tested. `ensemble` can be set: a narrower, wider, flatter or shifted distribution to draw models from.

    One of your own, a mass on rough ground; simulate and the float64 state serve --adapt-to-target:

        import gymnasium as gym
        import torch
        from common.base import box
        from common.ensembles import Ensemble

        class Sledge(Ensemble):
            parameters = {"mass": (1.0, 0.3, 0.4, 1.6), "friction": (0.5, 0.2, 0.1, 0.9)}
            unmodelled, unmodelled_factors = "force", (0.5, 2.0)

            def __init__(self, num_envs, device="cpu", seed=None):
                spaces = box(-9, 9, (2,)), box(-1, 1, (1,)), self._task_space()
                super().__init__(num_envs, *spaces, 100, device, seed)
                self._found()  # last: it reads the parameters

            def _start(self):  # position, speed
                return torch.zeros(self.num_envs, 2, dtype=torch.float64, device=self.device)

            def simulate(self, tasks, state, action):
                mass, friction, factor = tasks.double().unbind(1)
                speed = state[:, 1] + 0.1 * (factor * action[:, 0] / mass - friction * state[:, 1])
                return torch.stack([state[:, 0] + 0.1 * speed, speed], 1)

            def _transition(self, state, action):
                after = self.simulate(self._task, state, action)
                return after, -(after[:, 0] - 1).abs().float(), None, self._inform(after)

            def _observe(self, state):
                return state.float()

        gym.register("Sledge-v0", vector_entry_point=Sledge)
    """

    parameters = {}
    unmodelled, unmodelled_factors = "", ()
    usual_horizon = 200

    @property
    def parameter_names(self):
        return [*self.parameters, self.unmodelled or "1"]

    @property
    def ensemble(self):
        """What sample_tasks draws from: mean, std, low and high of each entry of a row, [4, task_dim].

        A normal cut off at low and high; with std inf it is uniform between them, with std 0 the mean.
        """
        if not hasattr(self, "_ensemble"):
            raise ContractError(f"the constructor of {type(self).__name__} has to end with self._found()")
        return self._ensemble.clone()

    @ensemble.setter
    def ensemble(self, rows):
        rows = torch.as_tensor(rows, dtype=torch.float64, device=self.device).clone()
        if rows.shape != (4, self.task_space.shape[0]):
            raise ValueError(f"an ensemble is [4, {self.task_space.shape[0]}], got {list(rows.shape)}")
        for name, row in zip(self.parameter_names, rows.T.tolist(), strict=True):
            mean, std, low, high = row
            if not (0 < low <= mean <= high < math.inf and std >= 0):
                raise ValueError(
                    f"{name}: expected 0 < low <= mean <= high and 0 <= std, got mean {mean:g}, std {std:g},"
                    f" low {low:g}, high {high:g}"
                )
        self.check(rows)
        self._ensemble = rows

    def reset(self, *, seed=None, options=None):
        """options={"state": True}: also the simulator's state, as info["state"] [B, state] in float64.

        A step's info["state"] is what it led to, as info["final_obs"] is.
        """
        self._recording = bool((options or {}).get("state"))
        obs, info = super().reset(seed=seed, options=options)
        return obs, {**info, **self._inform()}

    def state_dict(self):
        return {**super().state_dict(), "_ensemble": self.ensemble}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._ensemble = state["_ensemble"].to(self.device, copy=True)

    def simulate(self, tasks, state, action):
        """One step of each model from a recorded state. Pure: this environment's own worlds never notice.

        tasks: [n, task_dim], state: [n, state] float64, action: [n, act]. Returns the next state, [n, state].
        """
        raise NotImplementedError(f"{type(self).__name__} cannot repeat a step under other models")

    def check(self, rows):
        """Raise ValueError where models of such an ensemble, [4, task_dim], cannot be simulated."""

    @property
    def can_simulate(self):
        """Does the subclass have a simulate of its own?"""
        return type(self).simulate is not Ensemble.simulate

    # ---- hooks

    def _now(self):
        return self._state.clone()

    def _inform(self, state=None):
        """For info: the simulator's state, if it was asked for; by default that of now."""
        if not self._recording:
            return {}
        return {"state": self._now() if state is None else state.clone()}

    def _found(self):
        """Called once the body is there: the rest of the constructor."""
        self._recording = False
        if self.horizon == self.usual_horizon:
            self.references = REFERENCES.get(f"{type(self).__name__}-v0", {})
        rows = [*self.parameters.values(), (1.0, 0.0, 1.0, 1.0)]
        self._ensemble = torch.tensor(rows, dtype=torch.float64, device=self.device).T.contiguous()
        mean, _, low, high = self._ensemble.cpu()
        self._grid, self.test_groups = held_out_grid(self._ensemble.cpu(), self.unmodelled_factors)
        self.num_test_tasks = len(self._grid)
        # far from the mean in every parameter, most of all in the first
        share = torch.tensor([0.9] + [(0.25, 0.75)[entry % 2] for entry in range(len(rows) - 1)])
        self.named_tasks = {"mean": mean, "target": low + share.double() * (high - low)}
        self.named_tasks = {name: row.float().to(self.device) for name, row in self.named_tasks.items()}

    def _task_space(self):
        return box(0, math.inf, (len(self.parameters) + 1,))

    def _draw_tasks(self, n, generator):
        mean, std, low, high = self._ensemble.to(generator.device)
        draw = {"generator": generator, "device": generator.device, "dtype": torch.float64}
        return truncated_normal(torch.rand(n, len(mean), **draw), mean, std, low, high).float()

    def _draw_test_tasks(self, generator):
        return self._grid.float()


def truncated_normal(u, mean, std, low, high):
    """Numbers uniform on [0, 1) -> draws of a normal cut off at low and high. u: [n, d]; the others [d].

    std inf: uniform between low and high; std 0: mean. The inverse of the distribution function.
    """
    flat = std > 1e4 * (high - low)  # where rounding would be all that the density has
    scale = torch.where((std == 0) | flat, torch.ones_like(std), std)
    below, above = (torch.special.ndtr((end - mean) / scale) for end in (low, high))
    x = mean + scale * torch.special.ndtri(below + u * (above - below))
    x = torch.where(flat, low + u * (high - low), torch.where(std == 0, mean, x))
    return torch.maximum(torch.minimum(x, high), low)


def held_out_grid(ensemble, factors):
    """-> rows [n, task_dim] in float64, and {"inside", "beyond", "unmodelled": slice of them}.

    ensemble: [4, task_dim], mean, std, low and high; factors: values of the last entry of unmodelled models.
    """
    mean, std, low, high = ensemble
    count = len(mean) - 1  # the last entry is no parameter
    step, one = (high - low) / 6, torch.ones(1, dtype=torch.float64)
    first = low[0] + step[0] * torch.arange(7)
    around = [mean[entry] + std[entry] * torch.arange(-1, 2) for entry in range(1, count)]
    inside = torch.cartesian_prod(first, *around, one)
    sweep = mean.repeat(7, 1)
    sweep[:, 0] = first
    beyond = []
    for entry in range(count):
        rows = inside[inside[:, 0] == first[0]] if entry == 0 else sweep
        beyond += [with_entry(rows, entry, torch.maximum(low[entry] - step[entry], low[entry] / 2))]
        beyond += [with_entry(rows, entry, high[entry] + step[entry])]
    unmodelled = [with_entry(sweep, count, factor) for factor in factors]
    groups = {
        "inside": inside,
        "beyond": torch.cat(beyond),
        "unmodelled": torch.cat([sweep[:0], *unmodelled]),
    }
    ends = torch.tensor([len(rows) for rows in groups.values()]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return torch.cat(list(groups.values())), dict(zip(groups, map(slice, starts, ends), strict=True))


def with_entry(rows, entry, value):
    """The same rows, [n, task_dim], with one entry changed."""
    rows = rows.clone()
    rows[:, entry] = value
    return rows


class CartPoleEnsemble(Ensemble):
    """task_dim 4; obs [B, 4] as CartPole-v1's, action in [-1, 1] times 10 N, .02 s a step."""

    terminates, usual_horizon = True, 500
    motor = 10.0  # N
    parameters = {
        "cart mass": (1.0, 0.25, 0.5, 1.5),
        "pole mass": (0.3, 0.1, 0.1, 0.5),
        "pole half-length": (0.6, 0.2, 0.2, 1.0),
    }
    unmodelled, unmodelled_factors = "force", (0.5, 2.0)

    def __init__(self, num_envs, horizon=None, obs_dim=4, device="cpu", seed=None):
        spaces = box(-math.inf, math.inf, (obs_dim,)), box(-1, 1, (1,)), self._task_space()
        super().__init__(num_envs, *spaces, horizon or self.usual_horizon, device, seed)
        self._found()

    def simulate(self, tasks, state, action):
        cart, pole, length, factor = tasks.to(state).unbind(1)
        force = self.motor * factor * action[:, 0].to(state).clamp(-1, 1)
        return push_cart(state, force, length, pole, cart)

    def _start(self):
        draw = {"generator": self._generator, "device": self.device, "dtype": torch.float64}
        return 0.1 * torch.rand(self.num_envs, 4, **draw) - 0.05

    def _observe(self, state):
        return state.float()

    def _transition(self, state, action):
        after = self.simulate(self._task, state, action)
        fallen = (after[:, 0].abs() > 2.4) | (after[:, 2].abs() > UPRIGHT)
        return after, torch.ones(self.num_envs, device=self.device), fallen, self._inform(after)


class CartPoleRunEnsemble(CartPoleEnsemble):
    """task_dim 4; obs [B, 3]: m/s, .1 rad, .5 rad/s; action in [-1, 1] times 3 N, .02 s a step."""

    motor, usual_horizon = 3.0, 200
    parameters = CartPoleEnsemble.parameters | {"cart mass": (1.2, 0.45, 0.3, 2.1)}

    def __init__(self, num_envs, horizon=None, device="cpu", seed=None):
        super().__init__(num_envs, horizon, 3, device, seed)

    def _observe(self, state):
        units = torch.tensor([1.0, 0.1, 0.5], dtype=state.dtype, device=state.device)
        return (state[:, 1:] / units).float()  # the place on the track is of no interest

    def _transition(self, state, action):
        after = self.simulate(self._task, state, action)
        fallen = after[:, 2].abs() > UPRIGHT
        return after, (1 + 2 * after[:, 1]).float(), fallen, self._inform(after)


class PendulumEnsemble(Ensemble):
    """task_dim 3; obs [B, 3] as Pendulum-v1's, action in [-1, 1] times 2 Nm, 200 steps."""

    parameters = {"mass": (1.25, 0.375, 0.5, 2.0), "length": (1.0, 0.15, 0.7, 1.3)}
    unmodelled, unmodelled_factors = "gravity", (0.8, 1.2)

    def __init__(self, num_envs, horizon=None, device="cpu", seed=None):
        spaces = box(-8, 8, (3,)), box(-1, 1, (1,)), self._task_space()
        super().__init__(num_envs, *spaces, horizon or self.usual_horizon, device, seed)
        self._found()

    def simulate(self, tasks, state, action):
        return torch.stack(self._turn(tasks, state, action)[:2], 1)

    def _turn(self, tasks, state, action):
        mass, length, gravity = tasks.to(state).unbind(1)
        torque = 2 * action[:, 0].to(state).clamp(-1, 1)
        return turn_pendulum(*state.unbind(1), torque, mass, length, 10 * gravity)

    def _start(self):
        draw = {"generator": self._generator, "device": self.device, "dtype": torch.float64}
        u = 2 * torch.rand(self.num_envs, 2, **draw) - 1
        return u * torch.tensor([math.pi, 1.0], dtype=torch.float64, device=self.device)

    def _observe(self, state):
        return torch.stack([state[:, 0].cos(), state[:, 0].sin(), state[:, 1]], 1).float()

    def _transition(self, state, action):
        theta, theta_dot, reward = self._turn(self._task, state, action)
        after = torch.stack([theta, theta_dot], 1)
        return after, reward.float(), None, self._inform(after)


# python -m benchmark.baselines ensembles: the grid inside the range, 5 starts each, one episode. "random" is
# uniform in the action box, "still" does nothing.
REFERENCES = {
    "CartPoleEnsemble-v0": {"random": 29.8, "still": 41.5},
    "CartPoleRunEnsemble-v0": {"random": 39.6, "still": 41.7},
    "HalfCheetahEnsemble-v0": {"random": -229.3, "still": -0.3},
    "HopperEnsemble-v0": {"random": 19.7, "still": 148.8},
    "PendulumEnsemble-v0": {"random": -1216.8, "still": -1223.5},
}
