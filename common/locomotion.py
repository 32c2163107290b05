"""Bodies of Gymnasium's MuJoCo v5 classes with the tasks of the meta-RL papers, all worlds in one batch.

v is the velocity in m/s, a the action. A task row is the goal, or the logarithms of the multipliers.

HalfCheetahDir-v0      MAML (Finn et al. 2017, arXiv:1703.03400): direction d = +-1, reward d v - .05 |a|^2.
HalfCheetahVel-v0      The same, with a goal speed g: reward -|v - g| - .05 |a|^2. g ~ U[0, 3] as in ProMP
                       (Rothfuss et al. 2019, arXiv:1810.06784), PEARL and VariBAD; MAML drew from U[0, 2].
AntDir-v0              MAML: forward or backward, reward d v - .005 |a|^2 + .05.
AntVel-v0              MAML: g ~ U[0, 3], reward 1 - |v - g| - .005 |a|^2 + .05.
AntGoal-v0             PEARL (Rakelly et al. 2019, arXiv:1903.08254): goal uniform in the disc of radius 3,
                       reward -|x - g_x| - |y - g_y| - .1 |a|^2; x and y are observed.
HumanoidDir-v0         PEARL: any direction in the plane, as (cos, sin); reward 1.25 v.d - .1 |a|^2 + 5.
Walker2dRandParams-v0  PEARL, from the public rand_param_envs: each body's mass and inertia (by axis) and each
HopperRandParams-v0    geom's friction (by component) times 1.5^u, each joint's damping times 1.3^u, all
                       u ~ U[-3, 3] of their own; reward v - .001 |a|^2 + 1.

An episode is 200 steps. It ends sooner where the body falls (AntDir, AntVel, HumanoidDir and the RandParams),
by the rule of the v5 class. The two Dir families have two tasks: both are trained on, and both are tested,
in turn, with fresh starts. The others hold out 1,000 frozen draws.

Observations, physics, starts, velocities and fall rules are those of Gymnasium's v5 classes, to the last bit.
DIFFERS from the papers: their simulators and bodies are older, so returns do not compare. Contact forces are
neither observed nor charged: MuJoCo computes them in a pass of their own after the step, which a batch does
not run. v is the distance moved over the time, as in v5; MAML took the torso's velocity at the step's end,
and showed the policy where the torso is.

An action beyond the bounds moves the body as the bound would, and |a|^2 charges it as it was given.
A world whose physics explodes (numbers not finite or over 1e10) stands at MuJoCo's own start pose again and
has moved 0 in that step; where bodies fall, it has fallen. The other worlds never notice. A NaN action acts
as 0 and its reward is NaN.
"""

import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

from common.base import TaskVectorEnv, box

try:
    import mujoco
    from mujoco.batch import Batch
except ImportError:  # not there, or too old to have batches
    raise ImportError('locomotion needs MuJoCo 3.17 or newer: pip install "mujoco>=3.17"') from None

EXPLODED = slice(mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQACC + 1)


class Locomotion(TaskVectorEnv):
    """One MuJoCo world per environment. A subclass is a body, a subclass of that a distribution of tasks.

    Hooks, in NumPy and float64 but for _to_task:
        _find() -> place [B, 1 or 2], a new array      what velocity is measured on
        _healthy() -> [B] bool                         only for bodies that fall
        _pay(velocity, place) -> reward [B]            without `alive` and the control cost
        _to_task(u [n, task_dim]) -> [n, task_dim]     numbers uniform on [0, 1) to task rows, in torch

    The physics runs on the CPU in `nthread` threads (by default on all cores that this process may use),
    whatever the device; the number of threads changes no bit.
    """

    xml, frame_skip, obs_dim = "", 5, 0
    unseen = 1  # that many first entries of qpos are left out of the observation: x, or x and y
    reset_noise = 0.1  # starts: qpos + U[-1, 1] of this, qvel + the same, or + N(0, 1) of it
    gaussian_qvel = False
    qvel_limit = None  # observed velocities are clipped there
    fresh_stage = None  # how far MuJoCo must compute after a reset, for what is read beyond qpos and qvel
    ctrl_cost, alive = 0.0, 0.0
    low, high, task_dim = -1, 1, 1  # of a task row

    def __init__(self, num_envs, horizon=200, nthread=None, device="cpu", seed=None):
        self.model = model = self._load()
        low, high = model.actuator_ctrlrange[0]
        obs_space, actions = box(-np.inf, np.inf, (self.obs_dim,)), box(low, high, (model.nu,))
        super().__init__(num_envs, obs_space, actions, self._task_box(), horizon, device, seed)
        # starts are drawn where the physics is, so a seed means the same starts on every device
        self._generator = torch.Generator().manual_seed(self._generator.initial_seed())
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._batch = Batch(model, num_envs, nthread or cores)
        self._qpos, self._qvel, self._ctrl = (self._batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self._rows = torch.from_numpy(self._batch.state)  # [B, nstate], all that a world's future depends on
        self._blank = self._batch.state[0].copy()  # [nstate], a world at time 0 that nothing has touched
        self._seen = [self._qpos[:, self.unseen :], self._qvel]  # live views; a step only concatenates
        self._place = self._find()  # [B, 1 or 2] after the last step; MuJoCo's xpos lags, so it is state too
        self._goal = None  # [B, task_dim], the task in float64
        self._awake = None  # indices of the worlds that are simulated; None: all
        self.dt = model.opt.timestep * self.frame_skip
        if horizon == 200:
            self.references = REFERENCES.get(f"{type(self).__name__}-v0", {})

    # ---- Gymnasium's interface

    def reset(self, *, seed=None, options=None):
        self._begin(seed)
        self._state, self._clock, self._awake = self._rows, 0, None
        self._deadline = torch.full((self.num_envs,), self.horizon, dtype=torch.int64)
        self._restart(np.arange(self.num_envs))
        return self._deliver(self._look())[0], {}

    def step(self, action):
        self._require_reset()
        self._clock += 1
        action = torch.as_tensor(action).detach().to("cpu", torch.float64).numpy()
        self.step_physics(action)
        exploded = self._recover()
        before, self._place = self._place, self._find()
        velocity = (self._place - before) / self.dt
        reward = self._pay(velocity, self._place) + self.alive
        reward -= self.ctrl_cost * np.einsum("ij,ij->i", action, action)
        terminated = ~self._healthy() if self.terminates else np.zeros(self.num_envs, bool)
        terminated[exploded] = self.terminates
        truncated = (self._deadline.numpy() == self._clock) & ~terminated
        final_obs, extra = self._look(), self._inform()
        obs, ended = final_obs.clone(), np.flatnonzero(terminated | truncated)
        if len(ended):
            self._restart(ended)
            obs.numpy()[ended] = self._look(ended)
            self._deadline.numpy()[ended] = self._clock + self.horizon
        out = map(torch.from_numpy, (reward.astype(np.float32), terminated, truncated))
        obs, final_obs, *out = self._deliver(obs, final_obs, *out)
        return obs, *out, {**extra, "final_obs": final_obs}

    def step_physics(self, action):
        """The simulation alone, which benchmark compares step with. action: NumPy [B, act]."""
        self._ctrl[:] = action
        self._batch.step(self._awake, nstep=self.frame_skip)

    def rest(self, rows):
        self._awake = np.flatnonzero(~rows.cpu().numpy())

    # ---- exact resume

    def state_dict(self):
        awake = None if self._awake is None else torch.from_numpy(self._awake.copy())
        return {**super().state_dict(), "_place": torch.from_numpy(self._place.copy()), "_awake": awake}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._place = state["_place"].cpu().numpy().copy()
        self._awake = None if state["_awake"] is None else state["_awake"].cpu().numpy().copy()
        if self._state is not None:
            self._state = self._rows.copy_(self._state)  # MuJoCo reads its own memory
            self._deadline = self._deadline.cpu()

    # ---- tasks

    def _task_box(self):
        return box(self.low, self.high, (self.task_dim,))

    def _draw_tasks(self, n, generator, test=0):
        """A line is short of float32s: even multiples of 2^-23 train, odd ones are held out."""
        draw = {"generator": generator, "device": generator.device}
        u = (2 * torch.randint(2**22, (n, self.task_space.shape[0]), **draw) + test).double() / 2**23
        return self._to_task(u).float()

    def _draw_test_tasks(self, generator):
        return self._draw_tasks(self.num_test_tasks, generator, test=1)

    def _prepare(self):
        self._goal = self._task.cpu().double().numpy()

    # ---- worlds

    def _load(self):
        """The model that all worlds begin with."""
        return load_model(self.xml)

    def _furnish(self, worlds):
        """Called when these worlds have a fresh pose: a place to change it."""

    def _inform(self):
        """What else a step's info says, before worlds whose episode is over begin anew."""
        return {}

    def _find(self):
        return self._qpos[:, :1].copy()

    def _look(self, worlds=slice(None)):
        """Observations of these worlds: a new float32 tensor on the CPU, rounded from float64."""
        parts = [part[worlds] for part in self._seen]
        obs = torch.empty(len(parts[0]), self.obs_dim)
        np.concatenate(parts, axis=1, out=obs.numpy(), casting="same_kind")
        if self.qvel_limit:
            obs[:, parts[0].shape[1] :].clamp_(-self.qvel_limit, self.qvel_limit)
        return obs

    def _restart(self, worlds, noise=None):
        """Fresh starts, drawn as in Gymnasium's v5, for these worlds (sorted indices) and no others."""
        noise = self.reset_noise if noise is None else noise
        draw, shape = {"generator": self._generator, "dtype": torch.float64}, (len(worlds), self.model.nv)
        qpos = 2 * torch.rand(len(worlds), self.model.nq, **draw) - 1
        qvel = torch.randn(shape, **draw) if self.gaussian_qvel else 2 * torch.rand(shape, **draw) - 1
        self._batch.state[worlds] = self._blank
        self._qpos[worlds] += noise * qpos.numpy()
        self._qvel[worlds] += noise * qvel.numpy()
        self._furnish(worlds)
        if self.fresh_stage is not None:
            self._batch.forward(worlds, stage=self.fresh_stage)
        self._place[worlds] = self._find()[worlds]

    def _recover(self):
        """Put the worlds that exploded back on their feet; returns their indices, nearly always none."""
        warned = self._batch.warning[:, EXPLODED, 1]  # how often MuJoCo found a bad number
        if not warned.any() and np.isfinite(self._qvel).all():
            return []
        exploded = np.flatnonzero(warned.any(1) | ~np.isfinite(self._qvel).all(1))
        self._restart(exploded, noise=0.0)
        warned[:] = 0
        return exploded

    def _deliver(self, *tensors):
        """The tensors on the device, in a single transfer, no two of them in the same memory."""
        if self.device.type == "cpu":
            return tensors
        flat = torch.cat([tensor.flatten().float() for tensor in tensors]).to(self.device)
        parts = zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True)
        return [part.view(tensor.shape).to(tensor.dtype, copy=True) for part, tensor in parts]


def load_model(xml, fixtures=""):
    """One of the XML files that Gymnasium ships. fixtures: XML of what stands in its world besides."""
    text = (Path(gym.__file__).parent / "envs/mujoco/assets" / xml).read_text()
    before = mujoco.get_mju_user_warning()
    # half_cheetah.xml uses a deprecated attribute: MuJoCo would write a log file into the current folder
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        return mujoco.MjModel.from_xml_string(text.replace("</worldbody>", f"{fixtures}</worldbody>"))
    finally:
        mujoco.set_mju_user_warning(before)


# ---- bodies


class HalfCheetah(Locomotion):
    xml, obs_dim, gaussian_qvel = "half_cheetah.xml", 17, True


class Ant(Locomotion):
    xml, obs_dim, unseen, gaussian_qvel = "ant.xml", 27, 2, True
    fresh_stage = mujoco.mjtStage.mjSTAGE_POS

    def _find(self):
        return self._batch.bind("xpos")[:, 1, :2].copy()

    def _healthy(self):
        height = self._qpos[:, 2]
        return (height >= 0.2) & (height <= 1)


class Humanoid(Locomotion):
    xml, obs_dim, unseen, reset_noise = "humanoid.xml", 270, 2, 0.01
    fresh_stage = mujoco.mjtStage.mjSTAGE_ACC

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        fields = (self._batch.bind(name) for name in ("cinert", "cvel", "qfrc_actuator"))
        inertia, velocity, force = (field.reshape(self.num_envs, -1) for field in fields)
        self._seen += [inertia[:, 10:], velocity[:, 6:], force[:, 6:]]  # without the world's and the root's

    def _find(self):  # the centre of mass
        mass, position = self.model.body_mass, self._batch.bind("xipos")[:, :, :2]
        return np.einsum("b,nbj->nj", mass, position) / mass.sum()

    def _healthy(self):
        return (self._qpos[:, 2] > 1) & (self._qpos[:, 2] < 2)


class Walker2d(Locomotion):
    xml, obs_dim, frame_skip, reset_noise, qvel_limit = "walker2d_v5.xml", 17, 4, 0.005, 10

    def _healthy(self):
        height, angle = self._qpos[:, 1], self._qpos[:, 2]
        return (height > 0.8) & (height < 2) & (np.abs(angle) < 1)


class Hopper(Locomotion):
    xml, obs_dim, frame_skip, reset_noise, qvel_limit = "hopper.xml", 11, 4, 0.005, 10

    def _healthy(self):
        upright = (self._qpos[:, 1] > 0.7) & (np.abs(self._qpos[:, 2]) < 0.2)
        return upright & (np.abs(self._qpos[:, 2:]) < 100).all(1) & (np.abs(self._qvel) < 100).all(1)


# ---- distributions of tasks


class TwoDirections:
    num_test_tasks = 40  # +1 and -1 in turn, so that any even number of them is balanced

    def _draw_tasks(self, n, generator):
        """As many of one as of the other: else most of a meta-gradient is which direction came up more."""
        draw = {"generator": generator, "device": generator.device}
        side = (torch.randperm(n, **draw) + torch.randint(2, (1,), **draw)) % 2
        return (2.0 * side - 1)[:, None]

    def _draw_test_tasks(self, generator):
        return torch.tensor([[1.0], [-1.0]]).repeat(self.num_test_tasks // 2, 1)

    def _pay(self, velocity, place):
        return self._goal[:, 0] * velocity[:, 0]


class GoalSpeed:
    low, high = 0, 3

    def _to_task(self, u):
        return 3 * u

    def _pay(self, velocity, place):
        return -np.abs(velocity[:, 0] - self._goal[:, 0])


class HalfCheetahDir(TwoDirections, HalfCheetah):
    """task_dim 1, +1 or -1; obs [B, 17], actions in [-1, 1]^6, horizon 200, .05 s a step."""

    ctrl_cost = 0.05


class HalfCheetahVel(GoalSpeed, HalfCheetah):
    """task_dim 1, in m/s; obs [B, 17], actions in [-1, 1]^6, horizon 200, .05 s a step."""

    ctrl_cost = 0.05


class AntDir(TwoDirections, Ant):
    """task_dim 1, +1 or -1; obs [B, 27], actions in [-1, 1]^8, horizon 200 or a fall, .05 s a step."""

    # MAML's numbers. ProMP, PEARL and VariBAD take gym's .5 and 1, so that standing still pays; VariBAD's
    # code (at 674ce0c) also reads +-1 as radians: its two directions are 57 degrees left and right.
    terminates, ctrl_cost, alive = True, 0.005, 0.05


class AntVel(GoalSpeed, Ant):
    """task_dim 1, in m/s; obs [B, 27], actions in [-1, 1]^8, horizon 200 or a fall, .05 s a step."""

    terminates, ctrl_cost, alive = True, 0.005, 1.05


class AntGoal(Ant):
    """task_dim 2, x and y in m; obs [B, 29] with x and y, actions in [-1, 1]^8, horizon 200, .05 s a step."""

    obs_dim, unseen, ctrl_cost = 29, 0, 0.1
    low, high, task_dim = -3, 3, 2

    def _to_task(self, u):
        radius, angle = 3 * u[:, :1].sqrt(), 2 * torch.pi * u[:, 1:]
        return radius * torch.cat([angle.cos(), angle.sin()], 1)

    def _pay(self, velocity, place):
        # along x plus along y, as in ProMP's, PEARL's and VariBAD's code, not the straight line
        return -np.abs(place - self._goal).sum(1)


class HumanoidDir(Humanoid):
    """task_dim 2, a unit vector; obs [B, 270], actions in [-.4, .4]^17, horizon 200 or a fall, .015 s a step.

    obs is v5's without its 78 contact forces. PEARL's tasks are angles; as vectors they do not jump at 2 pi.
    """

    terminates, ctrl_cost, task_dim = True, 0.1, 2
    alive = 5.0  # in the step of the fall too, as in PEARL's code; v5 no longer pays it there

    def _to_task(self, u):
        angle = 2 * torch.pi * u[:, :1]
        return torch.cat([angle.cos(), angle.sin()], 1)

    def _pay(self, velocity, place):
        return 1.25 * np.einsum("ij,ij->i", velocity, self._goal)


class RandParams:
    """A task row is a logarithm for each number in these fields that is not zero, in this order.

    The factor is exp(row), and all zeros, named_tasks["nominal"], is the body as it comes. A contact's
    friction is the larger of its two geoms'. rand_param_envs drew factors for the zeros as well.
    """

    factors = {"body_mass": 1.5, "body_inertia": 1.5, "dof_damping": 1.3, "geom_friction": 1.5}
    terminates, ctrl_cost = True, 0.001
    alive = 1.0  # in the step of the fall too, unlike v5

    def _task_box(self):
        self._entries = {name: np.flatnonzero(getattr(self.model, name)) for name in self.factors}
        limits = [np.full(len(self._entries[name]), 3 * np.log(most)) for name, most in self.factors.items()]
        limit = np.concatenate(limits).astype(np.float32)
        return gym.spaces.Box(-limit, limit)

    @property
    def named_tasks(self):
        return {"nominal": torch.zeros(self.task_space.shape, device=self.device)}

    def _to_task(self, u):
        return (2 * u - 1) * torch.from_numpy(self.task_space.high).to(u.device)

    def _prepare(self):
        factors = np.exp(self._task.cpu().double().numpy())
        for name, entries in self._entries.items():
            field = self._batch.expand(name).reshape(self.num_envs, -1)  # a view
            field[:, entries] = getattr(self.model, name).flat[entries] * factors[:, : len(entries)]
            factors = factors[:, len(entries) :]
        self._batch.set_const()  # what MuJoCo derives from these; rand_param_envs left it as it was

    def _pay(self, velocity, place):
        return velocity[:, 0]


class Walker2dRandParams(RandParams, Walker2d):
    """task_dim 58; obs [B, 17], actions in [-1, 1]^6, horizon 200 or a fall, .008 s a step."""

    # 4 frames a step as in v5 and VariBAD; rand_param_envs took 5 for the walker, 4 for the hopper


class HopperRandParams(RandParams, Hopper):
    """task_dim 34; obs [B, 11], actions in [-1, 1]^3, horizon 200 or a fall, .008 s a step."""


# python -m benchmark.baselines locomotion: 40 held-out tasks, 20 starts each, one episode. "random" is
# uniform in the action box, "still" does nothing.
REFERENCES = {
    "AntDir-v0": {"random": 3.5, "still": 10.1},
    "AntGoal-v0": {"random": -700.4, "still": -472.6},
    "AntVel-v0": {"random": -44.6, "still": -72.4},
    "HalfCheetahDir-v0": {"random": -19.8, "still": 0.0},
    "HalfCheetahVel-v0": {"random": -332.1, "still": -282.2},
    "HopperRandParams-v0": {"random": 19.1, "still": 139.7},
    "HumanoidDir-v0": {"random": 118.3, "still": 201.7},
    "Walker2dRandParams-v0": {"random": 3.5, "still": 84.3},
}
