"""Pairs of MuJoCo domains: a body of Gymnasium's v5 classes, and the same body under other physics.

A domain is a task row of five numbers: factors on gravity, on the friction of all geoms, on the range of the
body's first motor's joint and on the command of one motor, and whether the obstacle is there (0 or 1). The
source is (1, 1, 1, 1, 0): Gymnasium's own class. sample_tasks draws the source, split="test" is the target.

BrokenReacher-v0          Reacher-v5 with 100 steps; in the target motor 0 (the shoulder) does not answer.
BrokenHalfCheetah-v0      HalfCheetah-v5; motor 0 (the back thigh) does not answer in the target.
BrokenAnt-v0              Ant-v5; motor 3 (an ankle) does not answer in the target.
HalfCheetahObstacle-v0    HalfCheetah-v5 paid for speed forward or backward, |v| - .1 |a|^2; in the target a
                          block, 2 m long and higher than any leap, lies 2 to 4 m behind the start.
{HalfCheetah,Hopper,Walker2d,Ant}{Gravity0.5,Gravity2,Friction0.5,Friction2,JointRange0.5}-v0
                          The targets that off-dynamics papers use today: gravity or friction halved or
                          doubled, or the range of one joint halved (both its limits).
The first four are those of DARC (Eysenbach et al. 2021, arXiv:2006.13916) and its released code.

An episode is 1000 steps (the reacher's 100), and ends where Gymnasium's v5 class ends it. Rewards are v5's:
a motor that does not answer costs nothing either, as in the released code, so there the two domains' rewards
differ by what its commands cost in the source.
DIFFERS from DARC: its reaching arm has seven joints and a state that holds the last action, and its
simulators are older. From v5: contact forces are neither observed nor charged (Ant), see locomotion.py.
"""

import mujoco
import numpy as np
import torch

from common.base import box
from common.locomotion import Ant, HalfCheetah, Hopper, Walker2d, load_model
from common.pairs import Pair
from common.reacher import Reacher, in_the_disc

SOURCE = [1.0, 1.0, 1.0, 1.0, 0.0]
GRAVITY, FRICTION, JOINT_RANGE, MOTOR, OBSTACLE = range(5)
FIELDS = {  # what a factor acts on: MuJoCo's name of it, and its numbers in a model
    GRAVITY: ("opt.gravity", lambda model: model.opt.gravity),
    FRICTION: ("geom_friction", lambda model: model.geom_friction),
    JOINT_RANGE: ("jnt_range", lambda model: model.jnt_range),
}
BELOW = -50.0  # m, the height of an obstacle's middle where it is out of the way; else 1
SHIFTS = {  # name in an id -> which entry of the target's row, and what stands there
    "Gravity0.5": (GRAVITY, 0.5),
    "Gravity2": (GRAVITY, 2.0),
    "Friction0.5": (FRICTION, 0.5),
    "Friction2": (FRICTION, 2.0),
    "JointRange0.5": (JOINT_RANGE, 0.5),
    "Broken": (MOTOR, 0.0),
    "Obstacle": (OBSTACLE, 1.0),
}


class Shifted(Pair):
    """What the pairs have in common; a body comes beside it. shift: one of SHIFTS."""

    usual_horizon = 1000
    motor = 0  # the one that a row can silence

    def __init__(self, num_envs, shift, horizon=None, nthread=None, device="cpu", seed=None):
        entry, value = SHIFTS[shift]
        self.rows = {"source": SOURCE, "target": [*SOURCE[:entry], value, *SOURCE[entry + 1 :]]}
        super().__init__(num_envs, horizon or self.usual_horizon, nthread, device, seed)
        if self.horizon == self.usual_horizon:
            body = type(self).__name__.removesuffix("Pair").removesuffix("Obstacle")
            self.references = REFERENCES[f"Broken{body}-v0" if shift == "Broken" else f"{body}{shift}-v0"]

    def _task_box(self):
        return box(0, 10, (len(SOURCE),))

    def _prepare(self):
        self._row = self._task.cpu().double().numpy()
        self._strength = torch.ones(self.num_envs, self.single_action_space.shape[0])
        self._strength[:, self.motor] = torch.from_numpy(self._row[:, MOTOR])
        for entry, (name, worlds_own) in FIELDS.items():
            factor = self._row[:, entry]
            if (factor != 1).any() or self._batch.expanded(name):
                nominal = worlds_own(self.model)
                field = self._batch.expand(name)
                field[:] = nominal
                index = self.model.actuator_trnid[0, 0] if entry == JOINT_RANGE else ...
                field[:, index] = nominal[index] * factor.reshape(-1, *[1] * nominal[index].ndim)

    def step(self, action):
        self._require_reset()
        return super().step(torch.as_tensor(action).cpu() * self._strength)

    def _pay(self, velocity, place):
        return velocity[:, 0] + (self._healthy() if self.terminates else 0.0)


class ReacherPair(Shifted, Reacher):
    """task_dim 5; obs [B, 10], actions in [-1, 1]^2, .02 s a step."""

    obs_dim, ctrl_cost, usual_horizon = 10, 1.0, 100

    def _goals(self, worlds):
        u = torch.rand(len(worlds), 2, generator=self._generator, dtype=torch.float64)
        return in_the_disc(u).numpy()

    def _to_goal(self):
        """From the goal to the fingertip, [B, 3], in m."""
        tip, goal = (self.model.body(name).id for name in ("fingertip", "target"))
        return self._batch.bind("xpos")[:, tip] - self._batch.bind("xpos")[:, goal]

    def _look(self, worlds=slice(None)):
        angle, goal = self._qpos[worlds, :2], self._qpos[worlds, 2:]
        parts = [np.cos(angle), np.sin(angle), goal, self._qvel[worlds, :2], self._to_goal()[worlds, :2]]
        return torch.from_numpy(np.concatenate(parts, 1).astype(np.float32))

    def _pay(self, velocity, place):
        return -np.linalg.norm(self._to_goal(), axis=1)


class HalfCheetahPair(Shifted, HalfCheetah):
    """task_dim 5; obs [B, 17], actions in [-1, 1]^6, .05 s a step."""

    ctrl_cost = 0.1


class HalfCheetahObstacle(HalfCheetahPair):
    """The same, paid for speed in either direction, with a block that a row can put in the way."""

    def _load(self):
        where = f'size="1 10 10" pos="-3 0 {BELOW}" contype="1" conaffinity="1"'
        model = load_model(self.xml, f'<geom name="obstacle" type="box" {where}/>')
        # a pass that skips distant pairs remembers where the block was when the model was made
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_MIDPHASE)
        return model

    def _prepare(self):
        super()._prepare()
        height = self._batch.expand("geom_pos")[:, self.model.geom("obstacle").id, 2:]
        height[:] = BELOW + (1 - BELOW) * self._row[:, OBSTACLE, None]

    def _pay(self, velocity, place):
        return np.abs(velocity[:, 0])


class AntPair(Shifted, Ant):
    """task_dim 5; obs [B, 27], actions in [-1, 1]^8, .05 s a step."""

    motor, terminates, ctrl_cost = 3, True, 0.5


class HopperPair(Shifted, Hopper):
    """task_dim 5; obs [B, 11], actions in [-1, 1]^3, .008 s a step."""

    terminates, ctrl_cost = True, 0.001


class Walker2dPair(Shifted, Walker2d):
    """task_dim 5; obs [B, 17], actions in [-1, 1]^6, .008 s a step."""

    terminates, ctrl_cost = True, 0.001


# python -m benchmark.baselines pairs: the target, 40 x 2 starts, one episode. "random" is uniform in the
# action box, "still" does nothing.
REFERENCES = {
    "AntFriction0.5-v0": {"random": -96.7, "still": 999.1},
    "AntFriction2-v0": {"random": -62.9, "still": 999.4},
    "AntGravity0.5-v0": {"random": -12.2, "still": 999.3},
    "AntGravity2-v0": {"random": -178.1, "still": 1000.5},
    "AntJointRange0.5-v0": {"random": -52.2, "still": 999.1},
    "BrokenAnt-v0": {"random": -28.2, "still": 999.2},
    "BrokenHalfCheetah-v0": {"random": -195.2, "still": -0.3},
    "BrokenReacher-v0": {"random": -52.4, "still": -24.2},
    "HalfCheetahFriction0.5-v0": {"random": -218.0, "still": -0.1},
    "HalfCheetahFriction2-v0": {"random": -348.5, "still": -0.1},
    "HalfCheetahGravity0.5-v0": {"random": -277.8, "still": -0.2},
    "HalfCheetahGravity2-v0": {"random": -166.4, "still": -0.2},
    "HalfCheetahJointRange0.5-v0": {"random": -299.0, "still": -0.3},
    "HalfCheetahObstacle-v0": {"random": 318.8, "still": 1.6},
    "HopperFriction0.5-v0": {"random": 18.9, "still": 165.6},
    "HopperFriction2-v0": {"random": 19.3, "still": 170.4},
    "HopperGravity0.5-v0": {"random": 19.6, "still": 206.1},
    "HopperGravity2-v0": {"random": 18.2, "still": 93.7},
    "HopperJointRange0.5-v0": {"random": 18.8, "still": 143.2},
    "Walker2dFriction0.5-v0": {"random": 1.9, "still": 101.1},
    "Walker2dFriction2-v0": {"random": 1.6, "still": 117.3},
    "Walker2dGravity0.5-v0": {"random": 2.1, "still": 143.6},
    "Walker2dGravity2-v0": {"random": 0.8, "still": 62.2},
    "Walker2dJointRange0.5-v0": {"random": 1.7, "still": 96.4},
}
