"""What the tests share: the scripts, mutants of them with a trap put in, and tasks of known answers."""

import importlib
import itertools
import os
import sys
import tomllib
import types
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: these tensors are too small to share out
ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import gymnasium as gym  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from common.base import TaskVectorEnv, box  # noqa: E402
from common.ensembles import PendulumEnsemble  # noqa: E402

torch.set_num_threads(1)
# every module at the top level is one algorithm; not a glob, as a user's own files may lie there, too
MODULES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"]
SCRIPTS = sorted(ROOT / f"{name}.py" for name in MODULES)
_count = itertools.count()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="learning tests train to the README's numbers")


@pytest.fixture
def full(request):
    """Was --full given? Learning tests then train to the README's number, else only until they learn."""
    return request.config.getoption("--full")


def script(name):
    """The shipped script as a module."""
    return importlib.import_module(name)


def mutant(name, old, new, *more):
    """The script `name` with a trap put in: `old`, which must stand there exactly once, becomes `new`.

    more: further pairs of old and new.
    """
    file = ROOT / f"{name}.py"
    text = file.read_text()
    pairs = (old, new, *more)
    for before, after in zip(pairs[::2], pairs[1::2], strict=True):
        assert text.count(before) == 1, (
            f"{name}.py must hold {before!r} exactly once: change this test with the script"
        )
        text = text.replace(before, after)
    module = types.ModuleType(f"{name}_mutant{next(_count)}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    exec(compile(text, f"<{module.__name__}>", "exec"), module.__dict__)
    return module


def gaussian_kl(old, new, weight):
    """Mean by weight [n] of KL(old || new) in closed form; each is mean, log_std, both [n, act]."""
    (m, s), (m_new, s_new) = ((mean, log_std.exp()) for mean, log_std in (old, new))
    kl = ((s_new / s).log() + (s**2 + (m - m_new) ** 2) / (2 * s_new**2) - 0.5).sum(-1)
    return (weight * kl).sum() / weight.sum()


class CueTask(TaskVectorEnv):
    """Only a memory of earlier episodes scores here. One of two arms is good for the whole trial.

    An episode has two steps. The first pays +1 for the good arm, -1 for the other; the second pays nothing,
    whatever is done, so that when the next episode begins the last reward tells nothing any more. Blind play
    earns 0 on average, the best play 1 in every episode but the first.

    The second action can still be a note to oneself, read in the next episode as the last action, and agents
    without any other memory do find that trick. One that is to have no memory must lose the last action, too.
    """

    num_test_tasks = 1000

    def __init__(self, num_envs, device="cpu", seed=None):
        super().__init__(num_envs, box(0, 1, (2,)), gym.spaces.Discrete(2), box(0, 1, (1,)), 2, device, seed)

    def _draw_tasks(self, n, generator):
        return torch.randint(2, (n, 1), generator=generator, device=generator.device).float()

    def _start(self):
        return torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)

    def _observe(self, state):
        return torch.nn.functional.one_hot(state.clamp(max=1), 2).float()

    def _transition(self, state, action):
        pays = torch.where(action == self._task[:, 0], 1.0, -1.0)
        return state + 1, torch.where(state == 0, pays, 0.0), None, {}


class FuseTask(TaskVectorEnv):
    """Episodes of all lengths to `horizon`: ends[t, b] says whether step t of environment b ends its episode.

    obs = [1 at an episode's first observation, steps since then, task]. The reward of step t in environment b
    is t + 1 + b / 8, so that every reward tells where it was earned. info["success"] is true at every seventh
    step. `played` keeps the tasks of every step.
    """

    terminates = True
    has_success = True
    num_test_tasks = 64

    def __init__(self, num_envs, horizon=4, steps=64, actions=3, device="cpu", seed=0):
        actions = gym.spaces.Discrete(actions) if isinstance(actions, int) else actions
        super().__init__(num_envs, box(-100, 100, (3,)), actions, box(0, 1, (1,)), horizon, device, seed)
        self.ends = torch.rand(steps, num_envs, generator=torch.Generator().manual_seed(3)) < 0.3
        self.played = []

    def _draw_tasks(self, n, generator):
        return torch.rand(n, 1, generator=generator)

    def _start(self):
        return torch.zeros(self.num_envs)

    def _observe(self, state):
        task = self._task[:, 0]
        return torch.stack([(state == 0).float(), state, task], 1)

    def _transition(self, state, action):
        self.played.append(self._task.clone())
        reward = self._clock + torch.arange(self.num_envs) / 8
        success = torch.full((self.num_envs,), self._clock % 7 == 0)
        return state + 1, reward, self.ends[self._clock - 1], {"success": success}


class ShortPendulum(PendulumEnsemble):
    """A tenth of the steps, for runs that need not learn."""

    references = {"random": -121.7}  # -1216.8 in 200 steps

    def __init__(self, num_envs, device="cpu", seed=None):
        super().__init__(num_envs, 20, device, seed)


def _register(env_id, entry):
    def make(**kwargs):
        return entry(**kwargs)

    make.is_task_distribution = True
    gym.register(env_id, vector_entry_point=make)


_register("CueTask-v0", CueTask)
_register("ShortPendulum-v0", ShortPendulum)
