"""Task distributions as Gymnasium vector environments. Importing registers their ids; make builds one."""

import importlib
import re
import sys

import gymnasium as gym

from common.adapter import register
from common.base import ContractError, TaskVectorEnv

__all__ = ["ContractError", "TaskVectorEnv", "ids", "make", "register"]

for _id, _entry, _kwargs in [
    ("Bandit5-v0", "common.bandits:Bandit", {"arms": 5}),
    ("Bandit10-v0", "common.bandits:Bandit", {"arms": 10}),
    ("Bandit50-v0", "common.bandits:Bandit", {"arms": 50}),
    ("TabularMDP-v0", "common.tabular:TabularMDP", {}),
    ("GridNavi-v0", "common.grids:GridNavi", {}),
    ("Maze-v0", "common.grids:Maze", {}),
    ("PointGoal-v0", "common.points:PointGoal", {}),
    ("PointRobot-v0", "common.points:PointRobot", {}),
    ("SparsePointGoal-v0", "common.points:SparsePointGoal", {}),
    ("PointMaze-v0", "common.pointmaze:PointMaze", {}),
    ("ClassicControl-v0", "common.classic:ClassicControl", {}),
    ("CartPoleSwingUp-v0", "common.classic:ClassicControl", {"bodies": ("cartpole",)}),
    ("PendulumSwingUp-v0", "common.classic:ClassicControl", {"bodies": ("pendulum",)}),
    ("AcrobotSwingUp-v0", "common.classic:ClassicControl", {"bodies": ("acrobot",)}),
    ("ReacherGoal-v0", "common.reacher:ReacherGoal", {}),
    ("HalfCheetahDir-v0", "common.locomotion:HalfCheetahDir", {}),
    ("HalfCheetahVel-v0", "common.locomotion:HalfCheetahVel", {}),
    ("AntDir-v0", "common.locomotion:AntDir", {}),
    ("AntVel-v0", "common.locomotion:AntVel", {}),
    ("AntGoal-v0", "common.locomotion:AntGoal", {}),
    ("HumanoidDir-v0", "common.locomotion:HumanoidDir", {}),
    ("Walker2dRandParams-v0", "common.locomotion:Walker2dRandParams", {}),
    ("HopperRandParams-v0", "common.locomotion:HopperRandParams", {}),
    ("PointWall-v0", "common.pairs:PointWall", {}),
    ("PointDoor-v0", "common.pairs:PointDoor", {}),
    ("GaussianPair-v0", "common.pairs:GaussianPair", {}),
    ("BrokenReacher-v0", "common.shifts:ReacherPair", {"shift": "Broken"}),
    ("BrokenHalfCheetah-v0", "common.shifts:HalfCheetahPair", {"shift": "Broken"}),
    ("BrokenAnt-v0", "common.shifts:AntPair", {"shift": "Broken"}),
    ("HalfCheetahObstacle-v0", "common.shifts:HalfCheetahObstacle", {"shift": "Obstacle"}),
    *[
        (f"{body}{shift}-v0", f"common.shifts:{body}Pair", {"shift": shift})
        for body in ("HalfCheetah", "Hopper", "Walker2d", "Ant")
        for shift in ("Gravity0.5", "Gravity2", "Friction0.5", "Friction2", "JointRange0.5")
    ],
    ("CartPoleEnsemble-v0", "common.ensembles:CartPoleEnsemble", {}),
    ("CartPoleRunEnsemble-v0", "common.ensembles:CartPoleRunEnsemble", {}),
    ("PendulumEnsemble-v0", "common.ensembles:PendulumEnsemble", {}),
    ("HopperEnsemble-v0", "common.mujoco_ensembles:HopperEnsemble", {}),
    ("HalfCheetahEnsemble-v0", "common.mujoco_ensembles:HalfCheetahEnsemble", {}),
    ("MT3", "common.metaworld:make", {"benchmark": "MT3"}),
    ("MT10", "common.metaworld:make", {"benchmark": "MT10"}),
    ("MT50", "common.metaworld:make", {"benchmark": "MT50"}),
    ("ML10", "common.metaworld:make", {"benchmark": "ML10"}),
    ("ML45", "common.metaworld:make", {"benchmark": "ML45"}),
]:
    gym.register(_id, vector_entry_point=_entry, kwargs=_kwargs)


def ids():
    """The ids of every task distribution that is registered: ours, those added by common.register, and
    subclasses of TaskVectorEnv that gymnasium.register got as vector_entry_point.
    """
    entries = {id: spec.vector_entry_point for id, spec in gym.registry.items()}
    ours = [id for id, entry in entries.items() if isinstance(entry, str) and entry.startswith("common.")]
    others = [id for id, entry in entries.items() if id not in ours and _is_task_distribution(entry)]
    return sorted(ours + others)


def _is_task_distribution(entry):
    """entry: a class or function, or "module:name" of one, which counts once its module is imported."""
    if isinstance(entry, str):
        module, _, name = entry.partition(":")
        entry = getattr(sys.modules.get(module), name, None)
    return getattr(entry, "is_task_distribution", False)


def make(env_id, num_envs, device="cpu", seed=None, **kwargs):
    """Build a task distribution: gymnasium.make_vec with the one mode that batches tasks.

    env_id: one of ids(), or "module:id" to import the module that registers your own first.
    Raises ValueError, with the known ids, for an id that is not a task distribution.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        if not all(part.isidentifier() for part in module.split(".")):
            raise ValueError(f"{module!r} is no module's name: as in an import, no slashes and no .py")
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            hint = "; is its folder on PYTHONPATH?" * f"{module}.".startswith(f"{error.name}.")
            raise ValueError(f"cannot import the module of {env_id!r}: {error}{hint}") from error
    if re.fullmatch(r"M[TL]1-[\w-]+", name) and name not in gym.registry:  # of Meta-World's fifty, by name
        gym.register(name, vector_entry_point="common.metaworld:make", kwargs={"benchmark": name})
    if name not in ids():
        hint = " (an environment of Gymnasium: common.register can make one of it)" * (name in gym.registry)
        raise ValueError(f"unknown task distribution {env_id!r}{hint}; known are {', '.join(ids())}")
    mode = gym.VectorizeMode.VECTOR_ENTRY_POINT
    return gym.make_vec(name, num_envs=num_envs, vectorization_mode=mode, device=device, seed=seed, **kwargs)
