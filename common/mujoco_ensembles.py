"""Ensembles of Gymnasium's MuJoCo bodies, as in EPOpt (Rajeswaran et al. 2017, arXiv:1610.01283).

HopperEnsemble-v0        Hopper-v5: its reward v + 1 - .001 |a|^2, its 1000 steps, and it falls.
HalfCheetahEnsemble-v0   HalfCheetah-v5: its reward v - .1 |a|^2, 1000 steps.

A task row is (torso mass in kg, friction, joint damping, joint armature, factor on a limb's mass), the last
of which is not varied in training; see ensembles.py. The means, deviations and limits are the paper's table
as we remember it. A mass comes with its moments of inertia. Friction is set for the floor and the feet, as a
contact takes the larger of its two; damping and armature for all joints that have a motor. The cheetah's
joints have dampings of their own, 1.5 to 6, and its stiffness is left as it is.
"""

import mujoco
import numpy as np
import torch
from mujoco.batch import Batch

from common.ensembles import Ensemble
from common.locomotion import EXPLODED, HalfCheetah, Hopper

PROBE_STEPS = 100  # of random actions, before an ensemble is accepted
CHUNK = 2048  # worlds that simulate steps at once


class BodyEnsemble(Ensemble):
    """What the two have in common; a body comes beside it."""

    feet, limb = (), ""
    unmodelled_factors, usual_horizon = (0.5, 2.0), 1000

    def __init__(self, num_envs, horizon=None, nthread=None, device="cpu", seed=None):
        super().__init__(num_envs, horizon or self.usual_horizon, nthread, device, seed)
        self._spare = None  # worlds for simulate
        self._found()

    @property
    def unmodelled(self):
        return f"{self.limb} mass"

    def simulate(self, tasks, state, action):
        """A step that explodes is NaN. MuJoCo begins it without a guess, so it is exact to about 1e-8."""
        if self._spare is None:
            self._spare = Batch(self.model, CHUNK, self._batch.nthread)
            self._blank_spare = self._spare.state.copy()
        spare, after = self._spare, []
        qpos, qvel, ctrl = (spare.bind(name) for name in ("qpos", "qvel", "ctrl"))
        for rows in torch.arange(len(state)).split(CHUNK):
            worlds = np.arange(len(rows))
            self._write(spare, tasks[rows])
            spare.state[:] = self._blank_spare
            qpos[worlds], qvel[worlds] = np.split(state[rows].cpu().numpy(), [self.model.nq], 1)
            ctrl[worlds] = action[rows].cpu().numpy()
            spare.step(worlds, nstep=self.frame_skip)
            after.append(np.concatenate([qpos[worlds], qvel[worlds]], 1))
            after[-1][spare.warning[worlds][:, EXPLODED, 1].any(1)] = np.nan
            spare.warning[:] = 0
        return torch.from_numpy(np.concatenate(after)).to(self.device)

    # ---- hooks

    def check(self, rows):
        """Play the corners of the range with random actions: what explodes there is no ensemble."""
        low, high = rows[2:].cpu()
        ends = [torch.stack([low[entry], high[entry]]).unique() for entry in range(len(low))]
        corners = torch.cartesian_prod(*ends)
        probe = Batch(self.model, len(corners), self._batch.nthread)
        limits, draw = self.model.actuator_ctrlrange.T, np.random.default_rng(0)
        before = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(lambda message: None)  # said once, and better, below
        try:
            self._write(probe, corners)
            for _ in range(PROBE_STEPS):
                probe.bind("ctrl")[:] = draw.uniform(*limits, (len(corners), self.model.nu))
                probe.step(nstep=self.frame_skip)
        finally:
            mujoco.set_mju_user_warning(before)
        exploded = probe.warning[:, EXPLODED, 1].any(1)
        if exploded.any():
            worst = dict(zip(self.parameter_names, corners[int(exploded.argmax())].tolist(), strict=True))
            where = ", ".join(f"{name} {value:g}" for name, value in worst.items())
            raise ValueError(f"MuJoCo is not stable with {where}")

    def _task_box(self):
        return self._task_space()

    def _prepare(self):
        super()._prepare()
        self._write(self._batch, self._task)

    def _write(self, batch, tasks):
        """Give the first worlds of a batch these models."""
        model, (mass, friction, damping, armature, factor) = self.model, tasks.cpu().double().numpy().T
        count = len(mass)
        field = {name: batch.expand(name)[:count] for name in FIELDS}
        torso, limb = model.body("torso").id, model.body(self.limb).id
        for body, new in ((torso, mass), (limb, factor * model.body_mass[limb])):
            field["body_mass"][:, body] = new
            field["body_inertia"][:, body] = model.body_inertia[body] * (new / model.body_mass[body])[:, None]
        for geom in ("floor", *self.feet):
            field["geom_friction"][:, model.geom(geom).id, 0] = friction
        for dof in model.jnt_dofadr[model.actuator_trnid[:, 0]]:
            field["dof_damping"][:, dof] = damping
            field["dof_armature"][:, dof] = armature
        batch.set_const(np.arange(count))  # what MuJoCo derives from these

    def _now(self):
        return torch.from_numpy(np.concatenate([self._qpos, self._qvel], 1)).to(self.device)


FIELDS = ("body_mass", "body_inertia", "geom_friction", "dof_damping", "dof_armature")


class HopperEnsemble(BodyEnsemble, Hopper):
    """task_dim 5; obs [B, 11], actions in [-1, 1]^3, .008 s a step."""

    terminates, ctrl_cost = True, 0.001
    feet, limb = ("foot_geom",), "leg"
    parameters = {
        "torso mass": (6.0, 1.5, 3.0, 9.0),
        "friction": (2.0, 0.25, 1.5, 2.5),
        "joint damping": (2.5, 1.0, 1.0, 4.0),
        "armature": (1.0, 0.25, 0.5, 1.5),
    }

    def _pay(self, velocity, place):
        return velocity[:, 0] + self._healthy()


class HalfCheetahEnsemble(BodyEnsemble, HalfCheetah):
    """task_dim 5; obs [B, 17], actions in [-1, 1]^6, .05 s a step."""

    ctrl_cost = 0.1
    feet, limb = ("bfoot", "ffoot"), "bthigh"
    parameters = {
        "torso mass": (6.0, 1.5, 3.0, 9.0),
        "friction": (0.5, 0.1, 0.3, 0.7),
        "joint damping": (1.5, 0.5, 0.5, 2.5),
        "armature": (0.125, 0.04, 0.05, 0.2),
    }

    def _pay(self, velocity, place):
        return velocity[:, 0]
