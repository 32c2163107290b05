r"""Contextual policies: one soft actor-critic for many tasks, told which one, or which goal is meant.
(multi-task SAC: Yu et al. 2019, arXiv:1910.10897; hindsight: Andrychowicz et al. 2017, arXiv:1707.01495)

THE IDEA
    If the agent knows its task there is nothing to infer: give the policy and the critic a description w of
    the task beside the observation, and learn all tasks at once with one off-policy algorithm. What a task
    teaches serves the others through the shared weights, and a description never met lies between ones that
    were. Its optimum is the upper bound for every algorithm that has to find out (PEARL, RL^2, MAML), as that
    of w = nothing is the lower one.

    Where the task is a goal and only reaching it pays, a beginner never sees a reward, and nothing is
    learned. Hindsight (HER) makes use of what did happen: wherever the episode went, it would have been a
    success had that been the goal. So most transitions are replayed with a goal that their own episode
    reached later. The policy learns to go anywhere it has been, and from there a little further.

ALGORITHM
    w is what the policy is told of its task: its row of numbers, its number among the training tasks
    (one-hot), a goal, or nothing.
    repeat
        on every training task: play an episode with pi(a | s, w), into the task's own replay
        for a number of gradient steps:
            draw N tasks, and M transitions (s, a, r, s') of each
            her: to k of k + 1 of them give a goal g' that was achieved at one of the steps t+1..T of the
                same episode (final: at T); r = r(s', g'), w = g'                         [HER Alg 1, Sec 4.5]
                and terminated likewise, where reaching a goal ends the episode (HER's own run on)
            y = r + gamma (1 - terminated) (min_i Q_target_i(s', a', w) - alpha_task log pi(a' | s', w))
            critics: descend sum_i (Q_i(s, a, w) - y)^2                                           [SAC Eq 5]
            actor: descend alpha_task log pi(a~ | s, w) - min_i Q_i(s, a~, w)                     [SAC Eq 7]
            alpha_task: descend -alpha_task (log pi(a~ | s, w) + target entropy)                 [SAC Eq 18]
            where a' ~ pi(. | s', w) and a~ ~ pi(. | s, w)
    on a new task: play, told its w, with the policy's mean for an action. Nothing is trained.
    A dense reward that the environment tells (SparsePointGoal does) is the r of y, unless hindsight is on.
    SAC: Haarnoja et al. 2018, arXiv:1801.01290; with a learned temperature 1812.05905, whose equation
    numbers these are.

DIFFERS FROM THE PAPER
    D1  HER came with DDPG. SAC explores by its entropy, so there is none of HER's added noise and no share
        of random actions; targets are not clipped.
    D2  Hindsight goals are drawn afresh whenever a transition is drawn, instead of being stored k times: the
        same distribution, more of it, and the replay stays PEARL's and DARC's.
    D3  Multi-task SAC has one temperature a task (arXiv:1910.10897, App). Here that is one for each training
        task, also where tasks are draws from a continuum; with hindsight it is that of the task in which the
        transition was played. Adam's momentum also moves those (and heads) of tasks not in the batch.
    D4  Inputs are normalised as in HER, unlike in multi-task SAC, by what was played, with hindsight goals in
        the share that batches have, and cut to 5; deviations below .01 are not blown up. The statistics move
        after each episode of all tasks, and the first one is played without. With the same flags the sparse
        reacher came to .98 of its goals after 256,000 steps without normalising, and to all of them after
        32,000 with it (one seed).
    D5  Smaller networks, and fewer transitions of a task, by default than the papers'.

TRAPS (each has a test that goes red when the trap is put in)
    T1  Hindsight goals achieved before the step or at its beginning: the goal is behind, and nothing in
        the transition leads to it.
    T2  Twin critics that are copies of one another: they stay equal, and the minimum of two is one.
    T3  Reward relabelled and termination not, or neither: the critic values a goal by another goal's pay.
    T4  Transitions drawn from one heap: tasks with long episodes crowd out the others.
    T5  Goals from another episode, or from another task's: they could never be reached from here.
    T6  A time limit taken for an end: the critic learns that nothing comes after it.
    T7  The next episode's first observation taken for the last one's next observation.
    T8  One temperature for tasks with rewards of different size: the small ones are played at random.
    T9  Episodes that end early: what follows in their row is padding, no data and no goal either.
    T10 Squashing forgotten in the log-probability, or its Jacobian taken where tanh is flat: log 0.
    T11 A one-hot for a task that was not trained: an argmax over nothing says task 0, without a word.
    T12 Success read off the last step, where an episode counts as solved if any step was.
    T13 Heads that read each other: a task's loss moves another task's output layer.

RUN
    python mtl_contextual.py                # told the task's row, here the goal: 1.5 to 3 minutes
    python mtl_contextual.py --env-id PointMaze-v0 --context goal --her future --gamma 0.98 --lr 1e-3 \
        --updates-per-step 0.05 --total-timesteps 200000
    python mtl_contextual.py --env-id ClassicControl-v0 --context onehot --train-tasks 3 --num-tasks 3 \
        --batch-size 64 --updates-per-step 0.2 --gamma 0.98 --lr 1e-3 --reward-scale 1 0.1 1 \
        --replay-episodes 1000 --total-timesteps 250000 --eval-every 10 --save-every 10 --alpha 1
    python mtl_contextual.py --env-id MT10 --context onehot --heads --train-tasks 10 --num-tasks 10 \
        --batch-size 64 --hidden-size 256 --lr 3e-4 --gamma 0.99 --tau 0.005 --reward-scale 0.1 \
        --updates-per-step 0.1 --replay-episodes 1000 --total-timesteps 20000000 --eval-tasks 100 \
        --eval-every 20 --save-every 20    # Meta-World's own sizes: --hidden-size 400 --hidden-layers 3
                                           # --batch-size 128; the first 100,000 steps were run by us

RESULT (held-out tasks, zero-shot; ClassicControl and MT3: the trained ones from new starts; +- a 95 %
        interval, over seeds where there are three, else over tasks; more flags in benchmark/reproduce.py)
    PointGoal          300,000 steps, 1.5 min of two cores, 3 seeds: -.538 +- .004, all goals reached; told
                       nothing -37.9; optimum -.488
    PointMaze          200,000 steps, 3 to 7 min of a busy core, 3 seeds: .95 +- .03 of the goals, without
                       hindsight .08 to .66
    ReacherGoal        150,000 steps, 2 to 4 min, 3 seeds: all goals, without hindsight .10 to .38
    ClassicControl     250,000 steps, 24 min of a core that two other runs shared, 3 seeds: cart pole 147,
                       pendulum -143, acrobot 81 on average
    HalfCheetahVel     600,000 steps, 19 min, 3 seeds: -26 +- 13 (-24, -32, -23); PEARL -32
    MT3                810,000 steps, 69 min, 1 seed: all of 30 episodes solved, ten of each task
"""

import contextlib
import copy
import ctypes
import io
import json
import math
import os
import re
import shlex
import shutil
import sysconfig
import textwrap
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: its idle threads would spin on MuJoCo's cores
with contextlib.suppress(AttributeError, OSError, TypeError):  # on glibc; elsewhere nothing
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: up to 2 GB that were freed stay ours, and
    ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: large pieces, too; else gradient steps pay in page faults

import gymnasium as gym
import torch
import tyro
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import common  # task distributions; what one of your own has to offer is said in common/base.py

# ================================ 1. Args ================================


@dataclass
class Args:
    env_id: str = "PointGoal-v0"  # task distribution: one of common.ids(), or your_module:YourId-v0
    seed: int = 1  # of all that is random in training; evaluation has frozen seeds of its own
    total_timesteps: int = 300_000  # environment steps of training, adapting too; iterations are whole
    device: str = "auto"  # auto (a GPU if there is one), cpu or cuda
    compile: bool = False  # torch.compile acting or gradient steps, see main: may pay on a GPU
    track: bool = False  # log to Weights & Biases too; WANDB_MODE=offline works
    wandb_project: str = "onefile-meta-rl"  # W&B project
    wandb_entity: str = ""  # W&B user or team; empty: your default one
    run_dir: str = "runs"  # parent folder of this run's own folder
    eval_every: int = 1  # iterations between evaluations on the held-out tasks
    save_every: int = 1  # iterations between checkpoints
    resume: str = ""  # run folder (or checkpoint) to continue, on a CPU bit for bit; flags are remembered
    evaluate: str = ""  # run folder (or checkpoint) to evaluate, then exit; flags of evaluation may differ

    train_tasks: int = 200  # training tasks, drawn once: each has a ring of replay of its own
    episodes_per_task: int = 1  # episodes of every training task in an iteration
    updates_per_step: float = 0.025  # gradient steps per environment step
    num_tasks: int = 64  # N, tasks of a batch
    batch_size: int = 16  # transitions of each of them in the critics' and the actor's losses
    replay_episodes: int = 200  # episodes that a task's ring holds
    context: str = "task"  # what the policy is told: task (its row), onehot (its number), goal or none
    heads: bool = False  # an output layer a task (actor and critics) on a shared trunk, with --context onehot
    her: str = "none"  # hindsight: none, or goals from the episode's final step, or from any future one
    her_k: int = 4  # hindsight: of k + 1 transitions k get another goal, in whole numbers
    hidden_size: int = 128  # width of the hidden layers of all networks [D5]
    hidden_layers: int = 2  # how many there are in each network [D5]
    lr: float = 5e-4  # Adam's step size, of all networks
    gamma: float = 0.9  # discount per step, below 1
    tau: float = 0.01  # share of the critics that moves into the target critics at each gradient step
    reward_scale: tuple[float, ...] = (1.0,)  # factor on rewards: one, or one each in env.named_tasks' order
    autotune: bool = True  # learn the entropy temperature so that entropy is about minus the action dimension
    alpha: float = 0.1  # entropy temperature; with autotune the first one
    deterministic_eval: bool = True  # at evaluation act by the policy's mean
    eval_episodes: int = 1  # episodes on a held-out task
    eval_tasks: int = 0  # held-out tasks to evaluate on; 0: all there are, at most 10,000


# ============================== 2. Networks ==============================


def mlp(input_dim, hidden_size, hidden_layers, output_dim):
    """[..., input_dim] -> [..., output_dim] through hidden layers of ReLUs."""
    sizes = [input_dim] + [hidden_size] * hidden_layers
    layers = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], output_dim))


class Actor(nn.Module):
    """Squashed Gaussian policy: action = tanh(u), u ~ N(mean(x), std(x)), in units of [-1, 1]."""

    def __init__(self, input_dim, action_space, hidden_size, hidden_layers):
        super().__init__()
        self.action_dim = action_space.shape[0]
        self.net = mlp(input_dim, hidden_size, hidden_layers, 2 * self.action_dim)
        for name, bound in (("low", action_space.low), ("high", action_space.high)):
            self.register_buffer(name, torch.tensor(bound), persistent=False)

    def forward(self, x):
        """x: [..., input], what the policy sees. Returns mean, log_std of u, each [..., act]."""
        mean, log_std = self.net(x).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)  # numbers of the authors' code

    def to_env(self, action):
        """[-1, 1] -> the environment's box."""
        return self.low + (action + 1) / 2 * (self.high - self.low)


class TwinCritic(nn.Module):
    """Q1 and Q2 side by side: every hidden layer is one batched matrix product."""

    def __init__(self, input_dim, hidden_size, hidden_layers, output_dim=1):
        super().__init__()
        sizes = [input_dim] + [hidden_size] * hidden_layers + [output_dim]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
            bound = fan_in**-0.5  # as in nn.Linear; T2: each of the two draws its own
            self.weights.append(nn.init.uniform_(torch.empty(2, fan_in, fan_out), -bound, bound))
            self.biases.append(nn.init.uniform_(torch.empty(2, 1, fan_out), -bound, bound))

    def forward(self, x, action):
        """x: [..., input - act], action: [..., act] -> both values, [2, ...]; [2, ..., output] if over 1."""
        shape = action.shape[:-1]
        y = torch.cat([x, action], -1).flatten(0, -2).expand(2, -1, -1)
        *hidden, output = zip(self.biases, self.weights, strict=True)
        for bias, weight in hidden:
            y = torch.baddbmm(bias, y, weight).relu()
        # on a CPU a batched product with one column takes five to ten times as long as two plain ones
        y = torch.stack([torch.addmm(*layer) for layer in zip(output[0], y, output[1], strict=True)])
        return y.view(2, *shape, -1).squeeze(-1)


class Temperature(nn.Module):
    """Entropy temperatures alpha > 0, learned through their logarithms."""

    def __init__(self, alpha, count=1):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((count,), math.log(alpha)))

    def forward(self):
        return self.log_alpha.exp()


class Normalizer(nn.Module):
    """Inputs to mean 0 and deviation 1, by the statistics of all that was played. [HER App A] [D4]"""

    def __init__(self, dim):
        super().__init__()
        for name in ("total", "squares"):
            self.register_buffer(name, torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @torch.no_grad()
    def see(self, x):
        """x: [n, input], to be counted from now on."""
        x = x.double()
        self.count += len(x)
        self.total += x.sum(0)
        self.squares += (x**2).sum(0)
        mean = self.total / self.count
        self.mean.copy_(mean)
        # what hardly changes is not blown up
        self.std.copy_((self.squares / self.count - mean**2).clamp(min=0.01**2).sqrt())

    def forward(self, x):
        """[..., input] -> [..., input], cut to 5 deviations."""
        return ((x - self.mean) / self.std).clamp(-5, 5)


class ActorHeads(nn.Module):
    """An actor with an output layer a task on a shared trunk: all answer, the task's own is taken.

    The last `heads` inputs say which: the largest of them. So a normalised one-hot vector does, too.
    """

    def __init__(self, heads, input_dim, action_space, hidden_size, hidden_layers):
        super().__init__()
        self.heads, self.action_dim = heads, action_space.shape[0]
        low, high = (torch.tensor(x).repeat(heads).numpy() for x in (action_space.low, action_space.high))
        self.shared = Actor(input_dim, gym.spaces.Box(low, high), hidden_size, hidden_layers)

    def forward(self, x):
        """x: [..., input] -> mean, log_std of u by the task's own head, each [..., act]."""
        own = F.one_hot(x[..., -self.heads :].argmax(-1), self.heads)  # T13: 0 for all others
        return tuple((y.unflatten(-1, (self.heads, -1)) * own[..., None]).sum(-2) for y in self.shared(x))

    def to_env(self, action):
        """[-1, 1] -> the environment's box."""
        return self.shared.to_env(torch.cat([action] * self.heads, -1))[..., : self.action_dim]


class CriticHeads(nn.Module):
    """Twin critics with an output layer a task on a shared trunk."""

    def __init__(self, heads, input_dim, hidden_size, hidden_layers):
        super().__init__()
        self.heads, self.shared = heads, TwinCritic(input_dim, hidden_size, hidden_layers, heads)

    def forward(self, x, action):
        """x: [..., input - act], action: [..., act] -> both values by the task's own head, [2, ...]."""
        values = self.shared(x, action).view(2, *action.shape[:-1], self.heads)
        return (values * F.one_hot(x[..., -self.heads :].argmax(-1), self.heads)).sum(-1)


def make_contextual_agent(obs_dim, tasks, action_space, args):
    """All networks: normalizer, actor, critic, target (of it) and temperature, one for each training task.

    tasks: [K, task_dim], kept as a buffer: a number among them means nothing without them.
    """
    x_dim = obs_dim + adapt(tasks[:1], tasks, args.context).shape[1]
    size, xa_dim = (args.hidden_size, args.hidden_layers), x_dim + action_space.shape[0]
    if args.heads:
        actor = ActorHeads(len(tasks), x_dim, action_space, *size)
        critic = CriticHeads(len(tasks), xa_dim, *size)
    else:
        actor, critic = Actor(x_dim, action_space, *size), TwinCritic(xa_dim, *size)
    networks = {"normalizer": Normalizer(x_dim), "actor": actor, "critic": critic}
    networks["temperature"] = Temperature(args.alpha, len(tasks))
    agent = nn.ModuleDict({**networks, "target": copy.deepcopy(critic)})
    agent.register_buffer("tasks", tasks)
    return agent


# ================================ 3. Data ================================


def sample_action(actor, x, deterministic=False):
    """x: [..., input] -> action [..., act] in [-1, 1], and its log-probability [...]. [SAC App C]"""
    mean, log_std = actor(x)
    noise = torch.zeros_like(mean) if deterministic else torch.randn_like(mean)
    u = mean + log_std.exp() * noise  # the gradient goes through the sample
    gaussian = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    # T10: tanh' = 1 - tanh^2 rounds to 0 for |u| > 9; this is its logarithm without the rounding
    jacobian = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return u.tanh(), (gaussian - jacobian).sum(-1)


@torch.no_grad()
def rollout(agent, act_fn, env, context, seed=None, deterministic=False):
    """Play one episode in every environment, told the same from its first step to its last.
    What it explores by is the policy's own entropy. [D1]

    context: [B, context]; seed: of starts and noise.
    Returns a dict of [B, T, ...] tensors, T at least the steps of the longest episode: obs [B, T + 1, obs],
    the last one included, action, reward, train_reward, terminated, success, valid (1 inside the episode,
    0 after).
    """
    obs, _ = env.reset(seed=seed)
    valid = torch.ones(env.num_envs, device=obs.device)
    no_success = torch.zeros_like(valid)
    observations, steps = [obs], []
    for step in range(env.horizon):
        if env.terminates and step % 10 == 0:  # seldom, as looking means waiting for a GPU
            if not bool(valid.any()):
                break  # every episode is over
            env.rest(valid == 0)  # what follows an episode is no data: MuJoCo need not simulate it
        action, _ = act_fn(agent.actor, agent.normalizer(torch.cat([obs, context], 1)), deterministic)
        obs, reward, terminated, truncated, info = env.step(agent.actor.to_env(action))
        observations.append(info["final_obs"])  # T7: obs itself may already be the next episode's
        played = {"action": action, "reward": reward, "train_reward": info.get("dense_reward", reward)}
        ended = {"terminated": terminated.float()}  # T6: truncated is no end of the task
        steps.append({**played, **ended, "success": info.get("success", no_success), "valid": valid})
        valid = valid * ~(terminated | truncated)  # T9: the environment begins anew, but that is no data
    played = {name: torch.stack([step[name] for step in steps], 1) for name in steps[0]}
    return {"obs": torch.stack(observations, 1), **played}


def inputs_of(episode, told):
    """Observations of an episode of rollout beside what is told. told: [B, T, context] -> [n, input]."""
    return torch.cat([episode["obs"][:, :-1], told], -1)[episode["valid"] > 0]  # T9


class ReplayBuffer:
    """Rings of whole episodes, one ring a row: tensors [rows, capacity, T, ...] on the device.

    A row is a task or whatever else has episodes of its own; all rows get their next episode together.
    obs has T + 1 steps, so that a next observation is not stored twice.
    """

    def __init__(self, rows, capacity, horizon, obs_dim, action_dim, device):
        widths = {"action": (action_dim,), "reward": (), "train_reward": (), "terminated": ()}
        shapes = {"obs": (horizon + 1, obs_dim), **{key: (horizon, *width) for key, width in widths.items()}}
        size = 4 * rows * capacity * sum(math.prod(shape) for shape in shapes.values())  # bytes
        try:
            self.data = {key: torch.zeros(rows, capacity, *s, device=device) for key, s in shapes.items()}
        except RuntimeError:
            fail(f"--replay-episodes {capacity}: {rows} rings of so many would take {size / 1e9:.1f} GB")
        self.length = torch.zeros(rows, capacity, dtype=torch.int64, device=device)  # steps of each episode
        self.capacity, self.horizon, self.count = capacity, horizon, 0  # count: of episodes, for each row

    def add(self, episode):
        """One more episode for every row, as rollout returns it: a dict of [rows, T, ...]."""
        if not all(bool(episode[name].isfinite().all()) for name in ("obs", "reward", "train_reward")):
            raise common.ContractError("an observation or a reward of the environment is not finite")
        slot = self.count % self.capacity
        for name, ring in self.data.items():
            ring[:, slot, : episode[name].shape[1]] = episode[name]
        self.length[:, slot] = episode["valid"].sum(1).long()
        self.count += 1

    def draw(self, rows, size):
        """rows: [N] -> episode and step, each [N, size]: uniform over all steps that a row holds. [T9]"""
        length = self.length[rows, : self.count]
        ends = length.cumsum(1)  # [N, episodes]
        number = torch.rand(len(rows), size, dtype=torch.float64, device=ends.device) * ends[:, -1:]
        number = number.long()
        episode = torch.searchsorted(ends, number, right=True)
        return episode, number - (ends - length).gather(1, episode)

    def take(self, rows, episode, step):
        """rows: [N]; episode, step: [N, M] -> these transitions, a dict of [N, M, ...], and next_obs."""
        rows = rows[:, None]
        batch = {name: ring[rows, episode, step] for name, ring in self.data.items()}
        return {**batch, "next_obs": self.data["obs"][rows, episode, step + 1]}

    def state_dict(self):
        """What has been filled: a checkpoint grows with the run."""
        filled = {name: ring[:, : self.count].clone() for name, ring in self.data.items()}
        return {**filled, "length": self.length[:, : self.count].clone(), "count": self.count}

    def load_state_dict(self, state):
        """Continue exactly where state_dict() was taken."""
        self.count = state["count"]
        for name, ring in (*self.data.items(), ("length", self.length)):
            if state[name].shape != ring[:, : self.count].shape:
                raise ValueError(f"{name} is {list(state[name].shape)}, the ring {list(ring.shape)}")
            ring[:, : self.count] = state[name]


def collect(agent, act_fn, env, contexts, replay, args):
    """Play the same number of episodes on every training task. contexts: [B, context]. Returns the steps."""
    steps = 0
    for _ in range(args.episodes_per_task):
        episode = rollout(agent, act_fn, env, contexts)
        replay.add(episode)
        agent.normalizer.see(inputs_of(episode, told_in(episode, contexts, env, args)))
        steps += int(episode["valid"].sum(dtype=torch.int64))
    return steps


def hindsight_index(step, length, strategy):
    """Which observation's goal to pretend: the last (strategy "final") or any later one ("future").

    step, length (of the episode): [N, M] -> [N, M].

    Observation i is the one before step i, so step t leads to observation t + 1, and `length` is the last.
    """
    if strategy == "final":
        return length
    return step + 1 + (torch.rand(step.shape, device=step.device) * (length - step)).long()  # T1: after


def told_in(episode, contexts, env, args):
    """What a batch would tell of each step of an episode of rollout. [D4]

    contexts: [B, context]. Returns [B, T, context]: with hindsight a later goal in k of k + 1 steps.
    """
    told = contexts[:, None].expand(-1, episode["valid"].shape[1], -1)
    if args.her == "none":
        return told
    step = torch.arange(told.shape[1], device=told.device).expand(told.shape[:2])
    length = episode["valid"].sum(1, keepdim=True).long().expand_as(step)
    rows = torch.arange(len(told), device=told.device)[:, None]
    goal = env.achieved_goal(episode["obs"][rows, hindsight_index(step, length, args.her)])
    pretended = torch.rand(step.shape, device=step.device) < hindsight_count(args) / args.batch_size
    return torch.where(pretended[..., None], goal, told)


def relabel(batch, goal, env):
    """The same transitions as if `goal` had been meant: reward and termination are made anew. [T3]

    From what was achieved and the goal alone: what an action costs, or a fall, has no place in them.
    batch: a dict of [N, M, ...] with next_obs; goal: [N, M, goal]. Returns a dict of context, reward and
    terminated.
    """
    achieved = env.achieved_goal(batch["next_obs"])
    terminated = env.compute_terminated(achieved, goal).float()
    return {"context": goal, "reward": env.compute_reward(achieved, goal), "terminated": terminated}


def hindsight_count(args):
    """How many of a task's transitions in a batch get another goal: k of k + 1, in whole numbers."""
    return round(args.batch_size * args.her_k / (args.her_k + 1))


def hindsight(replay, tasks, batch, episode, step, env, args):
    """Give k of k + 1 transitions a goal that their own episode has reached later. [HER Alg 1] [D2]

    tasks: [N]; batch: a dict of [N, M, ...], the transitions at episode, step, each [N, M]. Returns a batch.
    """
    count = hindsight_count(args)  # the first so many; their order is random
    rows, episode, step = tasks[:, None], episode[:, :count], step[:, :count]
    index = hindsight_index(step, replay.length[rows, episode], args.her)
    goal = env.achieved_goal(replay.data["obs"][rows, episode, index])  # T5: of the same episode
    first = {name: value[:, :count] for name, value in batch.items()}
    pretended = relabel(first, goal, env)
    merged = {name: torch.cat([new, batch[name][:, count:]], 1) for name, new in pretended.items()}
    return {**batch, **merged}


def draw_batch(replay, tasks, contexts, scales, env, args):
    """A batch with as many transitions of each task, and what the policy is told in them. tasks: [N].

    contexts: [K, context], what it is told on each training task; scales: [K], factors on rewards. Returns a
    dict of [N, M, ...].
    """
    episode, step = replay.draw(tasks, args.batch_size)  # T4
    batch = replay.take(tasks, episode, step)
    batch["context"] = contexts[tasks][:, None].expand(-1, args.batch_size, -1)  # [N, M, context]
    if args.her == "none":
        batch["reward"] = batch["train_reward"]
    else:
        batch = hindsight(replay, tasks, batch, episode, step, env, args)
    batch["reward"] = scales[tasks][:, None] * batch["reward"]
    return batch


# =============================== 4. Update ===============================


@torch.no_grad()
def critic_target(actor, target_critic, next_x, reward, terminated, alpha, gamma):
    """y = r + gamma (1 - terminated) (min_i Q_target_i - alpha log pi), action by today's policy. [SAC Eq 5]

    next_x: [N, M, input]; reward, terminated: [N, M]; alpha: broadcasts to them. Returns [N, M].
    """
    action, logprob = sample_action(actor, next_x)
    value = target_critic(next_x, action).amin(0) - alpha * logprob
    return reward + gamma * (1 - terminated) * value  # T6: bootstrapped wherever the task goes on


def critic_loss(values, target):
    """Sum over the two critics of their mean squared error. values: [2, N, M], target: [N, M]."""
    return ((values - target) ** 2).mean((1, 2)).sum()


def actor_loss(actor, critic, x, alpha):
    """alpha log pi - min_i Q_i at a fresh action, and log pi [N, M]. x: [N, M, input]. [SAC Eq 7]"""
    action, logprob = sample_action(actor, x)
    return (alpha * logprob - critic(x, action).amin(0)).mean(), logprob.detach()


def temperature_loss(alpha, logprob, target_entropy):
    """-alpha (log pi + target entropy): alpha grows where the policy's entropy is below it. [SAC Eq 18]"""
    return -(alpha * (logprob + target_entropy)).mean()


def descend(optimizer, loss, parameters):
    """One step of the optimizer on these parameters and no others."""
    optimizer.zero_grad()  # to None, and what has no gradient is left alone
    loss.backward(inputs=parameters)
    optimizer.step()


@torch.no_grad()
def follow(target, online, tau):
    """Move the target network's weights by tau of their way to the online network's."""
    for p, q in zip(target.parameters(), online.parameters(), strict=True):
        p.lerp_(q, tau)


def sac_step(agent, optimizer, batch, tasks, args):
    """One step of critics, actor and temperatures on a batch, in place.

    batch: transitions, a dict of [N, M, ...], and what the policy is told, context [N, M, context]; tasks:
    [N], whose temperatures to use. Returns metrics.
    """
    told = batch["context"]
    x, next_x = (agent.normalizer(torch.cat([batch[name], told], -1)) for name in ("obs", "next_obs"))
    alpha = agent.temperature().detach()[tasks][:, None]  # [N, 1]. T8, D3

    reward, terminated = batch["reward"], batch["terminated"]
    y = critic_target(agent.actor, agent.target, next_x, reward, terminated, alpha, args.gamma)
    values = agent.critic(x, batch["action"])
    td_loss = critic_loss(values, y)
    critics = list(agent.critic.parameters())
    descend(optimizer, td_loss, critics)
    grad_norm = nn.utils.get_total_norm([p.grad for p in critics])

    pi_loss, logprob = actor_loss(agent.actor, agent.critic, x, alpha)
    descend(optimizer, pi_loss, list(agent.actor.parameters()))
    if args.autotune:
        alpha_loss = temperature_loss(agent.temperature()[tasks][:, None], logprob, -agent.actor.action_dim)
        descend(optimizer, alpha_loss, list(agent.temperature.parameters()))
    follow(agent.target, agent.critic, args.tau)

    explained = 1 - (values - y).square().mean() / y.var(correction=0).clamp(min=1e-8)
    metrics = {"losses/critic": td_loss, "losses/actor": pi_loss, "debug/alpha": alpha.mean()}
    metrics |= {"debug/entropy": -logprob.mean(), "debug/q": values.mean(), "debug/grad_norm": grad_norm}
    metrics["debug/explained_variance"] = explained
    lowest, highest = agent.temperature().aminmax()
    metrics |= {"debug/alpha_min": lowest, "debug/alpha_max": highest}
    return {name: value.detach() for name, value in metrics.items()}


def update(agent, optimizer, step_fn, replay, contexts, scales, env, count, args):
    """count gradient steps, each on a batch of its own. Returns the mean of their metrics."""
    sums = {}
    for _ in range(count):
        tasks = torch.randperm(args.train_tasks, device=replay.length.device)[: args.num_tasks]
        batch = draw_batch(replay, tasks, contexts, scales, env, args)
        metrics = step_fn(agent, optimizer, batch, tasks, args)
        sums = {name: sums.get(name, 0) + value for name, value in metrics.items()}
    return {name: float(value) / count for name, value in sums.items()}


# ================================ 5. Adapt ===============================


def adapt(tasks, known, kind):
    """What the policy is told about each task. It is all that a new task takes: there is nothing to learn.

    tasks: [B, task_dim]; known: [K, task_dim], the training tasks. Returns [B, context]: for "task" and
    "goal" the row itself (they differ in that a goal is open to hindsight), for "onehot" which of the
    training tasks it is, for "none" nothing. Raises ValueError for a task that has no number.
    """
    if kind == "none":
        return tasks[:, :0]
    if kind in ("task", "goal"):
        return tasks
    same = (tasks[:, None] == known).all(-1)  # [B, K]
    unseen = ~same.any(1)
    if bool(unseen.any()):  # T11
        many = f"{int(unseen.sum())} of {len(tasks)} held-out tasks"
        raise ValueError(f"{many} are none of the {len(known)} training tasks and have no number")
    return F.one_hot(same.int().argmax(1), len(known)).float()


# ============================== 6. Evaluate ==============================

EVAL_SEED = 20_190_319  # of starts, noise and actions in every evaluation of every run


def evaluate(agent, env, tasks, act_fn, args):
    """Play eval_episodes on the frozen held-out tasks [B, task_dim], told what --context says of them.

    Nothing changes from one to the next. An episode is solved if any step of it was [T12]. Named tasks get a
    mean of their own, too.
    """
    context = adapt(tasks, agent.tasks, args.context)
    with torch.random.fork_rng(devices=[env.device] if env.device.type == "cuda" else []):
        torch.manual_seed(EVAL_SEED)
        env.set_tasks(tasks)
        seeds = range(EVAL_SEED, EVAL_SEED + args.eval_episodes)
        episodes = [rollout(agent, act_fn, env, context, seed, args.deterministic_eval) for seed in seeds]
    returns = torch.stack([(episode["reward"] * episode["valid"]).sum(1) for episode in episodes], 1)
    lengths = torch.stack([episode["valid"].sum(1) for episode in episodes], 1)
    success = torch.stack([(episode["success"] * episode["valid"]).amax(1) for episode in episodes], 1)
    metrics = summarize(returns, lengths, success if env.has_success else None)
    for name, row in env.named_tasks.items():
        own = (tasks == row).all(1)
        if bool(own.any()):
            metrics[f"eval/return_{name}"] = float(returns[own].mean())
            if env.has_success:
                metrics[f"eval/success_{name}"] = float(success[own].mean())
    return metrics


def summarize(returns, lengths, success=None):
    """Held-out results as metrics, counted from 0. All [N, stages]; lengths are in steps.

    A stage is an episode, or where an agent learns by gradient steps, what it plays between two of them.
    """
    num_tasks, num_stages = returns.shape
    to_error = max(num_tasks - 1, 1) ** -0.5  # from the deviation in this sample to a standard error
    steps_before = lengths.cumsum(1) - lengths
    metrics = {"eval/adaptation_gain": (returns[:, -1] - returns[:, 0]).mean()}
    stride = max(1, num_stages // 10)  # of a hundred pulls, every tenth will do
    for stage in sorted({*range(min(2, num_stages)), *range(0, num_stages, stride), num_stages - 1}):
        metrics[f"eval/return_ep{stage}"] = returns[:, stage].mean()
        metrics[f"eval/return_se_ep{stage}"] = returns[:, stage].std(correction=0) * to_error
        metrics[f"eval/adapt_steps_ep{stage}"] = steps_before[:, stage].mean()
        metrics[f"eval/length_ep{stage}"] = lengths[:, stage].mean()
        if success is not None:
            metrics[f"eval/success_ep{stage}"] = success[:, stage].mean()
    return {name: float(value) for name, value in metrics.items()}


# ==================== Run folder, log, checkpoint [shared] ====================

# The same text in every script, and nothing of the algorithm in it.

SCRIPT = Path(__file__).stem  # a checkpoint knows which script wrote it
MAY_CHANGE = "total_timesteps compile track wandb_project wandb_entity eval_every save_every".split()
ENTRIES = set("script args modules rng cuda_rng iteration global_step metrics_bytes wandb_id".split())


def fail(message):
    """End the program with one clear line instead of a traceback."""
    raise SystemExit(f"error: {message}")


def require(condition, flag, value, expected):
    """Stop, before any training, over a flag that is out of range."""
    if not condition:
        fail(f"--{flag.replace('_', '-')} {value}: expected {expected}")


def parse_args(args_class, argv=None):
    """Command line -> args, checkpoint. For --resume and --evaluate its flags are the defaults."""

    def parse(default):
        words = io.StringIO()  # tyro draws a box around its complaints: keep the words
        title = __doc__.split("\n\n")[0]
        try:
            with contextlib.redirect_stderr(words):
                return tyro.cli(args_class, args=argv, default=default, description=title)
        except SystemExit as stop:
            if not stop.code:
                raise  # --help
            text = " ".join(re.sub(r"[^\x20-\x7e]+", " ", words.getvalue()).split())
            fail(re.sub(r"^(.+?) \1", r"\1", text))  # the box's title is said again in it

    args = parse(args_class())
    if args.resume and args.evaluate:
        fail("--resume continues training and --evaluate does not train: give one of them")
    if not (args.resume or args.evaluate):
        return args, None
    checkpoint = load_checkpoint(args.resume or args.evaluate)
    if checkpoint["args"].keys() != asdict(args).keys():
        fail(f"{checkpoint['file']} was written by another version of {SCRIPT}.py, which had other flags")
    for name, value in checkpoint["args"].items():
        default, is_text = getattr(args, name), isinstance(value, str)
        if default is not None and (value is None or is_text != isinstance(default, str)):
            fail(f"{checkpoint['file']} has {value!r} for --{name.replace('_', '-')}")
    saved = replace(args_class(**checkpoint["args"]), resume="", evaluate="")
    args = parse(saved)
    for name, given in asdict(replace(args, resume="", evaluate="")).items():
        was = getattr(saved, name)
        if given != was and (name not in MAY_CHANGE if args.resume else name == "env_id"):
            fail(f"--{name.replace('_', '-')} {given}: {checkpoint['file']} was trained with {was}")
    shortest = min(checkpoint["global_step"], saved.total_timesteps)  # the last iteration may go beyond it
    require(args.total_timesteps >= shortest, "total_timesteps", args.total_timesteps, f"at least {shortest}")
    return replace(args, resume=""), checkpoint  # a run's flags do not tell whether it was interrupted


def check_experiment(args):
    """Check the flags that every script has. Returns the torch device."""
    for name in ("total_timesteps", "eval_every", "save_every"):
        require(getattr(args, name) > 0, name, getattr(args, name), "a positive number")
    for name, value in asdict(args).items():
        require(not isinstance(value, int) or value < 10**12, name, value, "a number below 10^12")
    require(0 <= args.seed < 2**30, "seed", args.seed, "a whole number from 0 to 2^30 - 1")
    require(args.device in ("auto", "cpu", "cuda"), "device", args.device, "auto, cpu or cuda")
    cuda = torch.cuda.is_available()
    require(cuda or args.device != "cuda", "device", "cuda", "cpu, since PyTorch sees no GPU on this machine")
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    if args.compile and not (headers and shutil.which(os.environ.get("CXX", "g++"))):
        fail(
            "--compile: PyTorch needs a C++ compiler (g++, or CXX) and Python's headers (python3-dev) for it"
        )
    return torch.device("cuda" if cuda and args.device != "cpu" else "cpu")


def make_env(env_id, num_envs, device, seed, flag="--env-id"):
    """common.make, whose complaints end the program in one line."""
    try:
        return common.make(env_id, num_envs=num_envs, device=device, seed=seed)
    except (ValueError, ImportError, gym.error.Error) as error:
        fail(f"{flag} {env_id}: {' '.join(str(error).split())}")


def clock(device):
    """Seconds, once all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def load_checkpoint(path):
    """Read a checkpoint of this script (the file, or its run folder); anything else ends in one line."""
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"there is no checkpoint at {file}")
    except Exception as error:  # whatever a damaged or foreign file makes the reader say
        fail(f"{file} cannot be read as a checkpoint ({type(error).__name__})")
    whole = isinstance(checkpoint, dict) and checkpoint.keys() >= ENTRIES
    counts = [checkpoint[name] for name in ("iteration", "global_step", "metrics_bytes")] if whole else [-1]
    if not all(isinstance(x, int) and x >= 0 for x in counts) or not isinstance(checkpoint["args"], dict):
        fail(f"{file} is not a checkpoint of this project")
    if checkpoint["script"] != SCRIPT:
        fail(f"{file} was written by {checkpoint['script']}.py, this is {SCRIPT}.py")
    return {**checkpoint, "file": str(file)}


def restore(checkpoint, modules):
    """Put the saved state into modules, a dict of all that has a state_dict; and set the random states."""
    for name, module in modules.items():
        try:
            module.load_state_dict(checkpoint["modules"][name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"the {name} of {checkpoint['file']} does not fit: {textwrap.shorten(str(error), 200)}")
    try:
        torch.set_rng_state(checkpoint["rng"])
        if checkpoint["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
    except (RuntimeError, TypeError):
        fail(f"the random state of {checkpoint['file']} does not fit")


def start_run(args, checkpoint):
    """Make (to resume: reopen) run folder and log. Returns a dict: folder, log, wandb, wandb_id, unsent."""
    stamp = f"{SCRIPT}__{args.env_id}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.run_dir) / re.sub(r"[^\w.-]", ".", stamp)
    folder = folder.with_name(f"{folder.name}-{os.getpid()}") if folder.exists() else folder
    folder = Path(checkpoint["file"]).parent if checkpoint else folder
    if checkpoint and Path(checkpoint["file"]).name != "checkpoint.pt":  # a copy must not undo what followed
        fail(f"--resume {checkpoint['file']}: give it a folder of its own and the name checkpoint.pt")
    wandb_id = checkpoint["wandb_id"] if checkpoint else ""
    run = {"folder": folder, "wandb": None, "wandb_id": wandb_id, "unsent": []}
    try:
        folder.mkdir(parents=True, exist_ok=bool(checkpoint))
        (folder / "args.json").write_text(json.dumps(asdict(args), indent=2))
        run["log"] = open(folder / "metrics.jsonl", "a+")  # noqa: SIM115 (open as long as the run)
        if checkpoint:  # rows past the checkpoint will be made again
            run["log"].truncate(run["log"].seek(min(checkpoint["metrics_bytes"], run["log"].tell())))
    except OSError as error:
        fail(f"--run-dir {folder.parent}: cannot write {folder} ({error.strerror})")
    if args.track:
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "0.1")  # else a kill loses 15 seconds
        import wandb

        where = {"project": args.wandb_project, "entity": args.wandb_entity or None, "dir": folder}
        identity = {"name": folder.name, "id": wandb_id or None, "resume": "allow"}
        try:
            run["wandb"] = wandb.init(**where, **identity, config=asdict(args), save_code=True)
        except (wandb.errors.Error, ValueError) as error:  # the latter of a WANDB_MODE that does not exist
            fail(f"--track: {' '.join(str(error).split())} (WANDB_MODE=offline needs no account)")
        run["wandb_id"] = run["wandb"].id
        run["wandb"].define_metric("*", step_metric="global_step")
    print(f"run folder: {folder}")
    return run


def check_finite(run, global_step, metrics):
    """A number that is not finite stops the run before it can be saved."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            last_good = run["folder"] / "checkpoint.pt"
            fail(f"{name} is {value} at step {global_step}; {last_good} is from before it")


def log(run, global_step, metrics):
    """A row for metrics.jsonl now, and for W&B once a checkpoint covers it: resuming sends none twice."""
    check_finite(run, global_step, metrics)
    row = {"global_step": global_step, **metrics}
    try:
        run["log"].write(json.dumps(row) + "\n")
        run["log"].flush()
    except OSError as error:
        fail(f"cannot write {run['log'].name} ({error.strerror}); go on later with --resume {run['folder']}")
    run["unsent"].append(row)


def save_checkpoint(run, args, modules, iteration, global_step):
    """All that decides the rest of the run, as plain tensors and numbers, in a file that is always whole."""
    checkpoint = {"script": SCRIPT, "args": asdict(args), "iteration": iteration, "global_step": global_step}
    checkpoint["modules"] = {name: module.state_dict() for name, module in modules.items()}
    checkpoint["rng"] = torch.get_rng_state()
    checkpoint["cuda_rng"] = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    checkpoint |= {"metrics_bytes": run["log"].tell(), "wandb_id": run["wandb_id"]}
    file = run["folder"] / "checkpoint.pt"
    try:
        with open(f"{file}.tmp", "wb") as handle:
            torch.save(checkpoint, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(f"{file}.tmp", file)  # a crash leaves the old one or the new one, never half of one
    except (OSError, RuntimeError) as error:
        Path(f"{file}.tmp").unlink(missing_ok=True)
        fail(f"cannot save {file} ({' '.join(str(error).split())}); the one before it, if any, is untouched")
    if run["wandb"] is not None:
        for row in run["unsent"]:
            run["wandb"].log(row)
    run["unsent"].clear()


def print_report(env, metrics, num_tasks, stage):
    """The held-out result as a small table, beside the references that the task distribution knows.

    stage: what the numbers in eval/return_ep0, ep1, ... count.
    """
    stages = [int(key[14:]) for key in metrics if re.fullmatch(r"eval/return_ep\d+", key)]
    columns = [c for c in ("adapt_steps", "return", "return_se", "success") if f"eval/{c}_ep0" in metrics]
    print(f"\n{env.spec.id}: {num_tasks} held-out tasks")
    print("".join(f"{column:>14}" for column in (stage, *columns)))
    for number in stages:
        cells = [f"{metrics[f'eval/{key}_ep{number}']:14.3f}" for key in columns]
        print(f"{number:14d}" + "".join(cells))
    tables = {"an episode": env.references}
    if "eval/return_trial" in metrics:
        total, error = metrics["eval/return_trial"], metrics["eval/return_trial_se"]
        print(f"sum over the trial: {total:.3f} +- {error:.3f} (standard error)")
        tables["the trial"] = env.trial_references.get(stages[-1] + 1, {})
    for what, players in tables.items():
        for player, value in players.items():
            print(f"reference, {what}: {player} {value:.3f}")


def print_folder(run):
    """Where the run is, and the command that draws its curves."""
    print(f"\nrun folder: {run['folder']}")
    print(f"plot it:    python -m benchmark.plot {shlex.quote(str(run['folder']))}")


# ================================ 7. Main ================================


def check_contextual(args, checkpoint=None):
    """Check the flags of this script, except for what depends on the environment."""
    positive = "train_tasks episodes_per_task num_tasks batch_size replay_episodes her_k hidden_size"
    positive += " hidden_layers eval_episodes updates_per_step lr alpha"
    for name in positive.split():
        require(0 < getattr(args, name) < math.inf, name, getattr(args, name), "a positive number")
    require(args.eval_tasks >= 0, "eval_tasks", args.eval_tasks, "zero or a positive number")
    require(0 <= args.gamma < 1, "gamma", args.gamma, "at least 0 and below 1")
    require(0 < args.tau <= 1, "tau", args.tau, "more than 0, at most 1")
    for name, allowed in (("context", "task onehot goal none"), ("her", "none final future")):
        require(getattr(args, name) in allowed.split(), name, getattr(args, name), f"one of {allowed}")
    was = checkpoint["args"]["context"] if checkpoint else args.context  # another as wide would be restored
    same = args.context == was or {args.context, was} == {"task", "goal"}
    require(same, "context", args.context, f"{was}, which is what this policy was trained with")
    fine = bool(args.reward_scale) and all(0 < scale < 1e38 for scale in args.reward_scale)
    require(fine, "reward_scale", args.reward_scale, "one positive number, or one for each named task")
    most = args.train_tasks
    require(args.num_tasks <= most, "num_tasks", args.num_tasks, f"at most {most}, the training tasks")
    require(args.context == "onehot" or not args.heads, "heads", args.heads, "--context onehot beside it")
    require(args.context == "goal" or args.her == "none", "her", args.her, "--context goal beside it")
    some = 0 < hindsight_count(args) < args.batch_size
    require(some or args.her == "none", "batch_size", args.batch_size, "more, to be shared out by --her-k")


def check_told(env, agent, test_tasks, args):
    """Check, with all that was restored, that what --context promises can be told of these tasks."""
    wanted = f"a task distribution whose task rows are goals, and those of {args.env_id} are not"
    fits = env.goal_space is not None and env.goal_space.shape == env.task_space.shape
    require(args.context != "goal" or fits, "context", "goal", wanted)
    if args.context == "onehot":  # two numbers for one task would be two heads and two temperatures
        different = len(agent.tasks.unique(dim=0))
        what = f"at most {different}: more are repetitions, which --context onehot cannot number"
        require(different == args.train_tasks, "train_tasks", args.train_tasks, what)
    try:
        adapt(test_tasks, agent.tasks, args.context)
    except ValueError as error:
        fail(f"--context {args.context}: {error}; --context task tells what they are")


def task_scales(env, tasks, args):
    """reward_scale for each of the tasks [K, task_dim] -> [K]."""
    if len(args.reward_scale) == 1:
        return torch.full((len(tasks),), args.reward_scale[0], device=tasks.device)
    named, given = env.named_tasks, args.reward_scale
    names = f"one number, or one for each of: {', '.join(named) or 'no task has a name'}"
    require(len(given) == len(named), "reward_scale", given, names)
    scales = torch.full((len(tasks),), math.nan, device=tasks.device)
    for row, scale in zip(named.values(), given, strict=True):
        scales[(tasks == row).all(1)] = scale
    only = "one number, as some training tasks have no name"
    require(bool(scales.isfinite().all()), "reward_scale", given, only)
    return scales


def print_named(env, metrics):
    """The tasks that have a name, each by itself."""
    for name in env.named_tasks:
        if f"eval/return_{name}" in metrics:
            solved = f", success {metrics[f'eval/success_{name}']:.3f}" if env.has_success else ""
            print(f"{name}: return {metrics[f'eval/return_{name}']:.3f}{solved}")


def main(argv=None):
    args, checkpoint = parse_args(Args, argv)
    device = check_experiment(args)
    check_contextual(args, checkpoint)
    torch.manual_seed(args.seed)

    env = make_env(args.env_id, 1 if args.evaluate else args.train_tasks, device, args.seed)
    held_out = env.num_test_tasks
    eval_tasks = args.eval_tasks or min(10_000, held_out)
    require(eval_tasks <= held_out, "eval_tasks", eval_tasks, f"at most {held_out}, all that are held out")
    eval_env = make_env(args.env_id, eval_tasks, device, seed=0)
    obs_dim, action_space = env.single_observation_space.shape[0], env.single_action_space
    continuous = isinstance(action_space, gym.spaces.Box) and action_space.is_bounded()
    require(continuous, "env_id", args.env_id, "a task distribution with continuous actions between bounds")
    tasks, test_tasks = env.sample_tasks(args.train_tasks), eval_env.sample_tasks(eval_tasks, split="test")
    agent = make_contextual_agent(obs_dim, tasks, action_space, args).to(device)
    act_fn = torch.compile(sample_action) if args.compile else sample_action
    step_fn = torch.compile(sac_step) if args.compile else sac_step
    if args.evaluate:
        restore(checkpoint, {"agent": agent})
        check_told(env, agent, test_tasks, args)
        report = evaluate(agent, eval_env, test_tasks, act_fn, args)
        print_report(eval_env, report, eval_tasks, "episode")
        print_named(eval_env, report)
        return

    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, fused=True)
    rings = (args.train_tasks, args.replay_episodes)
    replay = ReplayBuffer(*rings, env.horizon, obs_dim, action_space.shape[0], device)
    env.set_tasks(tasks)  # from here on, in every episode
    modules = {"agent": agent, "optimizer": optimizer, "replay": replay, "env": env}  # all that has a state
    iteration = global_step = 0
    if checkpoint:
        restore(checkpoint, modules)
        iteration, global_step = checkpoint["iteration"], checkpoint["global_step"]
    check_told(env, agent, test_tasks, args)
    contexts = adapt(agent.tasks, agent.tasks, args.context)
    scales = task_scales(env, agent.tasks, args)
    run = start_run(args, checkpoint)
    del checkpoint  # all of it is in place
    save_checkpoint(run, args, modules, iteration, global_step)  # a run can be resumed from its first second
    report, total = {}, args.total_timesteps

    with tqdm(total=total, initial=global_step, unit="step", unit_scale=True) as bar:
        while global_step < total:
            start = clock(device)

            # Collect: an episode or more of every training task, told what it is.
            steps = collect(agent, act_fn, env, contexts, replay, args)
            collected = clock(device)
            count = max(1, round(steps * args.updates_per_step))
            metrics = update(agent, optimizer, step_fn, replay, contexts, scales, env, count, args)
            learned = clock(device)

            iteration, global_step = iteration + 1, global_step + steps
            metrics |= {"charts/iteration": iteration, "charts/SPS": steps / (learned - start)}
            metrics |= {"time/rollout": collected - start, "time/update": learned - collected}
            metrics |= {"time/gradient_step": (learned - collected) / count}
            check_finite(run, global_step, metrics)
            if iteration % args.eval_every == 0 or global_step >= total:
                report = evaluate(agent, eval_env, test_tasks, act_fn, args)
                metrics |= {**report, "time/evaluate": clock(device) - learned}
                bar.set_postfix(held_out=f"{report['eval/return_ep0']:.2f}")
            log(run, global_step, metrics)
            if iteration % args.save_every == 0 or global_step >= total:
                save_checkpoint(run, args, modules, iteration, global_step)
            bar.update(steps)

    if run["wandb"] is not None:
        run["wandb"].finish()
    report = report or evaluate(agent, eval_env, test_tasks, act_fn, args)
    print_report(eval_env, report, eval_tasks, "episode")
    print_named(eval_env, report)
    print_folder(run)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; --resume and the run folder go on from its last checkpoint")
    except common.ContractError as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:  # NumPy says the one, PyTorch the other
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        words = textwrap.shorten(str(error) or "MemoryError", 200)
        fail(f"there is not enough memory for these flags: {words}")
