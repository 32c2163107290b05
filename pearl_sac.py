r"""PEARL: infer the task as a posterior over a latent variable, and act as if a sample of it were true.
(Rakelly et al. 2019, arXiv:1903.08254)

THE IDEA
    If the agent knew its task, one policy pi(a | s, task) would do, trained off-policy as usual. It does not
    know it, so it reads what it has met so far, the context, and keeps a belief q(z | context) about a small
    vector z that stands for the task. z has no given meaning: an encoder is trained so that a critic that
    reads z can predict returns, and what that needs is what z comes to hold.

    On a new task z is drawn from the prior, acted upon for a whole episode, the belief sharpened with what
    happened, z drawn again. As in Thompson sampling, exploring is acting well on a task that may be the case.
    Inference is apart from control, so control can be soft actor-critic, which goes on learning from old
    data, where RL^2 and MAML throw theirs away after an update: in the paper, and here on HalfCheetahVel,
    far fewer environment steps than they need.

ALGORITHM
    repeat
        on every training task: play some episodes with z ~ N(0, 1) (by default one), each of the others with
            z ~ q(z | the episodes before): a round of E. All go into the task's replay            [Alg 1, 2]
        for a number of gradient steps, on a meta-batch of N tasks:
            c = recent episodes of the task, and a batch (s, a, r, s') of all its replay               [Alg 1]
            q(z | c) = product over n of N(mu(c_n), var(c_n)), normalised; z ~ q                        [Eq 2]
            y = r + gamma (1 - terminated) (min_i Q_target_i(s', a', z) - alpha log pi(a' | s', z))
            critics, encoder: descend sum_i (Q_i(s, a, z) - y)^2 + beta KL(q(z | c) || N(0, 1))      [Eq 1, 3]
            actor: descend alpha log pi(a~ | s, z) - min_i Q_i(s, a~, z), z without gradient            [Eq 4]
            alpha: descend -alpha (log pi(a~ | s, z) + target entropy)                             [SAC Eq 18]
            where a' ~ pi(. | s', z) and a~ ~ pi(. | s, z)
    on a new task: play, infer, play again, with the policy's mean for an action. Nothing is trained.
    A dense reward that the environment tells (SparsePointGoal does) is the r of y, as in the paper; context
    and evaluation stay sparse.
    SAC: Haarnoja et al. 2018, arXiv:1801.01290; with a learned temperature 1812.05905, whose equation
    numbers these are.

DIFFERS FROM THE PAPER
    D1  The later SAC: two target critics and a learned temperature. The paper's has a state-value network,
        which is not here, and alpha = 1 with scaled rewards (--no-autotune --alpha 1 --reward-scale 5).
    D2  Context is whole episodes, the first few of a recent round: much as it will be on a new task. The
        released code draws single transitions from recent data (--context transitions): z can be read off a
        mixture of many episodes easily, and off the few real ones of a new task much less well.
    D3  All that is played enters context and replay alike, as both kinds are met at test. In most released
        configurations episodes played with a z from the posterior enter the replay only
        (--context-data prior).
    D4  c_n = (s, a, r, s') as in the paper; the released code by default leaves s' out
        (--no-context-next-obs).
    D5  Every training task is played in every iteration, all in one batch; the released code draws a few at a
        time, and the context of the others grows stale.
    D6  The KL's weight beta is per task, in units of the critics' mean squared error. The released code sums
        the KL over the meta-batch beside a mean over transitions: its .1 is 1.6 here. But its rewards are
        scaled by 5 or more and their squares by 25 or more. On the point robot --kl-coef 0.1 costs a seventh
        of what is gained between the first and the fourth episode (-9.5 there).
    D7  Smaller networks and batches by default, a larger meta-batch and more training tasks: a gradient step
        shows the encoder one context a task, however large the batch. gamma, tau and lr suit the point
        robot's short episodes. The paper's sizes: see RUN.

TRAPS (each has a test that goes red when the trap is put in)
    T1  The KL summed over tasks while the critic's loss is a mean: beta grows with the meta-batch.
    T2  Twin critics that are copies of one another: they stay equal, and the minimum of two is one.
    T3  A factor whose variance rounds to zero: infinite precision, and a posterior that is no number.
    T4  z detached in the critics' loss: the encoder learns nothing but the prior. Or not detached in the
        actor's: the encoder learns to flatter the critic.
    T5  Context that does not look as it will at test: episodes of a policy long gone, always as many
        transitions as the critics' batch has; or one task's context for another's transitions.
    T6  A time limit taken for an end: the critic learns that nothing comes after it.
    T7  The next episode's first observation taken for the last one's next observation.
    T8  z drawn again at every step: no hypothesis is held long enough to be tested.
    T9  Episodes that end early: what follows in their row is padding, neither context nor data.
    T10 Squashing forgotten in the log-probability, or its Jacobian taken where tanh is flat: log 0.
    T11 The first episode played with knowledge of the task, or evaluation on training tasks.

RUN
    python pearl_sac.py                                                 # dense point robot: two minutes
    python pearl_sac.py --train-tasks 2000 --total-timesteps 1200000 --updates-per-step 0.01 --latent-size 20
    python pearl_sac.py --env-id HalfCheetahVel-v0 --train-tasks 100 --num-tasks 16 --batch-size 64 \
        --latent-size 5 --context-stride 10 --kl-coef 0.01 --updates-per-step 0.05 --replay-episodes 300 \
        --gamma 0.99 --tau 0.005 --total-timesteps 1500000 --eval-tasks 100 --save-every 5
    python pearl_sac.py --env-id HalfCheetahVel-v0 --train-tasks 100 --num-tasks 16 --batch-size 256 \
        --hidden-size 300 --hidden-layers 3 --latent-size 5 --lr 3e-4 --gamma 0.99 --tau 0.005 --kl-coef 1.6 \
        --no-autotune --alpha 1 --reward-scale 5 --updates-per-step 0.4 --replay-episodes 300 \
        --context transitions --context-data prior --context-stride 4 --no-context-next-obs \
        --episodes-per-task 4 --prior-episodes 2 --context-episodes 2 --total-timesteps 2500000 \
        --eval-tasks 30 --save-every 5     # close to the released code, but for its penalties on the policy's
                                           # outputs (.001 of their squares); not run to its end by us

RESULT (held-out tasks by episode, the first is eval/return_ep0; +- a 95 % interval, over seeds where there
        are three, else over tasks; flags in RUN or, for SparsePointGoal, HalfCheetahDir and 4,000 tasks, in
        benchmark/reproduce.py)
    PointRobot         240,000 steps, 2 min of one core, 3 seeds: -18.1, -10.5 +- .4, -7.8, -7.3 in episodes
                       1 to 4; going to the middle -15.7, optimum told the goal -5.1
    the same with --context transitions                             -17.4, -15.5 +- .5, -12.9, -11.2
    PointRobot         2,000 training tasks (RUN), 5 min of a busy core, 3 seeds: -18.5, -9.8 +- .4, -6.9,
                       -6.6; with 4,000 of them, 39 min, 1 seed: -19.2, -9.3 +- .4, -6.7, -6.4
    SparsePointGoal    400 training tasks, 5.8 M steps, 10 min of a busy core, 3 seeds: 1.4, 3.3, 5.2 +- 1.0,
                       6.6; posterior sampling with exact inference 1.5, 3.2, 4.9, 6.4; optimum 13.4
    HalfCheetahVel     1.5 M steps, 35 min of a busy core, 1 seed: -186, -36 +- 5, -34, -32; standing
                       still -282, VariBAD's released runs -25
    HalfCheetahDir     .9 M steps, 21 min, 1 seed: 172, 1187 +- 28, 1215, 1198; VariBAD's released runs 1900.
                       Its two tasks are trained on
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
    env_id: str = "PointRobot-v0"  # task distribution: one of common.ids(), or your_module:YourId-v0
    seed: int = 1  # of all that is random in training; evaluation has frozen seeds of its own
    total_timesteps: int = 240_000  # environment steps of training, adapting too; iterations are whole
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

    train_tasks: int = 400  # training tasks, drawn once: each has a ring of replay of its own
    episodes_per_task: int = 3  # E, episodes of every training task in an iteration: a round
    prior_episodes: int = 1  # of them the first so many have z from the prior
    updates_per_step: float = 0.025  # gradient steps per environment step
    num_tasks: int = 64  # N, tasks of a meta-batch
    batch_size: int = 16  # transitions of each of them in the critics' and the actor's losses
    replay_episodes: int = 1000  # episodes that a task's ring holds
    context: str = "episodes"  # whole episodes as at test, or transitions: single ones out of them [D2]
    context_episodes: int = 3  # context is 1 to so many episodes of a round, at most E (or prior_episodes)
    context_rounds: int = 5  # how many of the last rounds context comes from
    context_stride: int = 1  # the encoder reads every n-th step of an episode, or an n-th as many transitions
    context_data: str = "all"  # all episodes, or prior: only those played with z from the prior [D3]
    context_next_obs: bool = True  # context holds the next observation, too [D4]
    latent_size: int = 10  # dimensions of z
    kl_coef: float = 0.001  # beta, weight of the KL to the prior, a mean over tasks [D6]
    hidden_size: int = 128  # width of the hidden layers of all networks [D7]
    hidden_layers: int = 2  # how many there are in each network [D7]
    lr: float = 1e-3  # Adam's step size, of all networks
    gamma: float = 0.9  # discount per step, below 1
    tau: float = 0.01  # share of the critics that moves into the target critics at each gradient step
    reward_scale: float = 1.0  # factor on rewards in the critics' target [D1]
    autotune: bool = True  # learn the entropy temperature so that entropy is about minus the action dimension
    alpha: float = 0.1  # entropy temperature; with autotune the first one
    deterministic_eval: bool = True  # at evaluation act by the policy's mean; z is sampled all the same
    eval_episodes: int = 4  # episodes on a held-out task
    eval_prior_episodes: int = 1  # of them the first so many have z from the prior
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


class Encoder(nn.Module):
    """A Gaussian factor over z from each transition of context. [Sec 4.1]"""

    def __init__(self, context_dim, latent_size, hidden_size, hidden_layers):
        super().__init__()
        self.net = mlp(context_dim, hidden_size, hidden_layers, 2 * latent_size)

    def forward(self, context):
        """[N, C, context] -> mean, var of the factors, each [N, C, latent]."""
        mean, spread = self.net(context).chunk(2, -1)
        return mean, F.softplus(spread)


def make_agent(obs_dim, action_space, args):
    """All networks: encoder, actor, critic, target (of it) and temperature."""
    size, x_dim = (args.hidden_size, args.hidden_layers), obs_dim + args.latent_size
    action_dim = action_space.shape[0]
    context_dim = obs_dim + action_dim + 1 + obs_dim * args.context_next_obs
    networks = {"encoder": Encoder(context_dim, args.latent_size, *size)}
    networks |= {"actor": Actor(x_dim, action_space, *size), "critic": TwinCritic(x_dim + action_dim, *size)}
    networks["temperature"] = Temperature(args.alpha)
    return nn.ModuleDict({**networks, "target": copy.deepcopy(networks["critic"])})


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
def rollout(agent, act_fn, env, z, seed=None, deterministic=False):
    """Play one episode in every environment, z held from its first step to its last. [Alg 2] [T8]

    z: [B, latent]; seed: of starts and noise.
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
        action, _ = act_fn(agent.actor, torch.cat([obs, z], 1), deterministic)
        obs, reward, terminated, truncated, info = env.step(agent.actor.to_env(action))
        observations.append(info["final_obs"])  # T7: obs itself may already be the next episode's
        played = {"action": action, "reward": reward, "train_reward": info.get("dense_reward", reward)}
        ended = {"terminated": terminated.float()}  # T6: truncated is no end of the task
        steps.append({**played, **ended, "success": info.get("success", no_success), "valid": valid})
        valid = valid * ~(terminated | truncated)  # T9: the environment begins anew, but that is no data
    played = {name: torch.stack([step[name] for step in steps], 1) for name in steps[0]}
    return {"obs": torch.stack(observations, 1), **played}


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


def context_features(batch, next_obs):
    """A batch of transitions [N, C, ...] -> what the encoder reads of them, [N, C, context]. [D4]"""
    parts = [batch["obs"], batch["action"], batch["reward"][..., None]]
    return torch.cat(parts + ([batch["next_obs"]] if next_obs else []), -1)


def episode_context(episode, args):
    """An episode as rollout returns it -> context [B, C, context] and its weight [B, C], 0 for padding."""
    batch = {**episode, "obs": episode["obs"][:, :-1], "next_obs": episode["obs"][:, 1:]}
    context = context_features(batch, args.context_next_obs)
    return context[:, :: args.context_stride], episode["valid"][:, :: args.context_stride]


def sample_context(replay, tasks, args):
    """Context for a meta-batch, much as it will arrive on a new task. tasks: [N]. [T5]

    Whole rounds of E episodes, at least one, lie one after the other in the ring. Draws for each task one of
    the last context_rounds, and for all of them how many of its first episodes are known: 1 to
    context_episodes (context_data prior: to prior_episodes, if that is less); single transitions come from
    any of all that could be known. Returns context [N, C, context] and weight [N, C], 0 beyond an episode's
    end; C is the known episodes times the steps that context_stride leaves of a horizon.
    """
    device, whole, per_round = tasks.device, args.context == "episodes", args.episodes_per_task
    prior_only = args.context_data == "prior"  # D3
    most = min(args.context_episodes, args.prior_episodes if prior_only else args.episodes_per_task)
    known = int(torch.randint(1, most + 1, ()))
    rounds = min(replay.count // per_round, args.context_rounds)
    steps = torch.arange(0, replay.horizon, args.context_stride, device=device)
    shape = (len(tasks), known * len(steps))  # N, C
    # D2: if not whole, each transition comes from a round, episode and step of its own
    age = torch.randint(1, rounds + 1, (len(tasks), 1) if whole else shape, device=device)
    first_ones = torch.arange(known, device=device).repeat_interleave(len(steps))
    episode = first_ones if whole else torch.randint(most, shape, device=device)
    slot = (replay.count - per_round * age + episode) % replay.capacity
    length = replay.length[tasks[:, None], slot]
    step = steps.repeat(known).expand(shape) if whole else (torch.rand_like(length.float()) * length).long()
    weight = (step < length).float()  # T9
    return context_features(replay.take(tasks, slot, step), args.context_next_obs), weight


# =============================== 4. Update ===============================


def product_of_gaussians(mean, var, weight=None):
    """Posterior of z from one Gaussian factor a transition: precisions add up and weight the means. [Eq 2]

    mean, var: [N, C, latent], C transitions of context in each of N tasks; weight: [N, C], 0 leaves a factor
    out. Returns mean, var: [N, latent]. No context at all, or none of weight: the prior, N(0, 1), which is
    no factor itself.
    """
    precision = 1 / var.clamp(min=1e-7)  # T3
    if weight is not None:
        precision = precision * weight[..., None]
    total = precision.sum(1)
    total = torch.where(total > 0, total, 1.0)
    return (precision * mean).sum(1) / total, 1 / total


def kl_to_prior(mean, var):
    """KL(N(mean, var) || N(0, 1)) of each task. mean, var: [N, latent]. Returns [N]."""
    return 0.5 * (var + mean**2 - 1 - var.log()).sum(-1)


def infer(encoder, context, weight):
    """context [N, C, context], weight [N, C] -> mean, var of q(z | context), each [N, latent]. [Eq 2]"""
    return product_of_gaussians(*encoder(context), weight)


def sample_z(mean, var):
    """A draw from the belief, through which gradients reach mean and var. All [N, latent]."""
    return mean + var.sqrt() * torch.randn_like(mean)


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


def gradient_step(agent, optimizer, batch, context, weight, args):
    """One step of encoder, critics, actor and temperature on a meta-batch, in place. [Alg 1]

    batch: transitions, a dict of [N, M, ...]; context [N, C, context] and its weight [N, C]. Returns metrics.
    """
    mean, var = infer(agent.encoder, context, weight)
    kl = kl_to_prior(mean, var).mean()  # T1: per task
    z = sample_z(mean, var)[:, None].expand(-1, batch["reward"].shape[1], -1)  # [N, M, latent]
    x, next_x = (torch.cat([batch[name], z.detach()], -1) for name in ("obs", "next_obs"))
    alpha = agent.temperature().detach()

    reward, terminated = args.reward_scale * batch["train_reward"], batch["terminated"]
    y = critic_target(agent.actor, agent.target, next_x, reward, terminated, alpha, args.gamma)
    values = agent.critic(torch.cat([batch["obs"], z], -1), batch["action"])  # T4: z with its gradient
    td_loss = critic_loss(values, y)
    inferring = [*agent.critic.parameters(), *agent.encoder.parameters()]
    descend(optimizer, td_loss + args.kl_coef * kl, inferring)
    grad_norm = nn.utils.get_total_norm([p.grad for p in inferring])

    pi_loss, logprob = actor_loss(agent.actor, agent.critic, x, alpha)  # T4: x holds z.detach()
    descend(optimizer, pi_loss, list(agent.actor.parameters()))
    if args.autotune:
        alpha_loss = temperature_loss(agent.temperature(), logprob, -agent.actor.action_dim)
        descend(optimizer, alpha_loss, list(agent.temperature.parameters()))
    follow(agent.target, agent.critic, args.tau)

    explained = 1 - (values - y).square().mean() / y.var(correction=0).clamp(min=1e-8)
    metrics = {"losses/critic": td_loss, "losses/actor": pi_loss, "debug/alpha": alpha.mean()}
    metrics |= {"debug/entropy": -logprob.mean(), "debug/q": values.mean(), "debug/grad_norm": grad_norm}
    metrics["debug/explained_variance"] = explained
    metrics |= {"debug/kl": kl, "debug/posterior_std": var.sqrt().mean()}
    return {name: value.detach() for name, value in metrics.items()}


def update(agent, optimizer, step_fn, replay, count, args):
    """count gradient steps, each on a batch of its own. Returns the mean of their metrics."""
    sums = {}
    for _ in range(count):
        tasks = torch.randperm(args.train_tasks, device=replay.length.device)[: args.num_tasks]
        batch = replay.take(tasks, *replay.draw(tasks, args.batch_size))
        metrics = step_fn(agent, optimizer, batch, *sample_context(replay, tasks, args), args)
        sums = {name: sums.get(name, 0) + value for name, value in metrics.items()}
    return {name: float(value) / count for name, value in sums.items()}


# ================================ 5. Adapt ===============================


@torch.no_grad()
def adapt(agent, act_fn, env, num_episodes, prior_episodes, args, seed=None, deterministic=False):
    """Posterior sampling: the same in training as on new tasks. [Alg 2]

    The first prior_episodes are played with z ~ N(0, 1), the others with z from what all before have shown.
    seed: of starts and noise, one more for each episode.
    Returns the episodes, as rollout does, and their beliefs (mean, var), each [B, latent].
    """
    mean = torch.zeros(env.num_envs, args.latent_size, device=env.device)  # T11: nothing is known
    var = torch.ones_like(mean)
    episodes, beliefs, factors = [], [], []
    for number in range(num_episodes):
        if number:
            context, weight = episode_context(episodes[-1], args)
            factors.append((*agent.encoder(context), weight))
        if number >= prior_episodes:
            mean, var = product_of_gaussians(*(torch.cat(parts, 1) for parts in zip(*factors, strict=True)))
        episode_seed = None if seed is None else seed + number
        episode = rollout(agent, act_fn, env, sample_z(mean, var), episode_seed, deterministic)
        episodes.append(episode)
        beliefs.append((mean, var))
    return episodes, beliefs


# ============================== 6. Evaluate ==============================

EVAL_SEED = 20_190_319  # of starts, noise and actions in every evaluation of every run


def evaluate(agent, env, num_tasks, act_fn, args):
    """Play eval_episodes on the frozen held-out tasks, beginning with no knowledge of them. [T11]"""
    with torch.random.fork_rng(devices=[env.device] if env.device.type == "cuda" else []):
        torch.manual_seed(EVAL_SEED)
        tasks = env.sample_tasks(num_tasks, split="test")  # a list of their own, the same at every call
        env.set_tasks(tasks)
        number = (args.eval_episodes, args.eval_prior_episodes)
        episodes, beliefs = adapt(agent, act_fn, env, *number, args, EVAL_SEED, args.deterministic_eval)
    returns = torch.stack([(episode["reward"] * episode["valid"]).sum(1) for episode in episodes], 1)
    lengths = torch.stack([episode["valid"].sum(1) for episode in episodes], 1)
    success = torch.stack([(episode["success"] * episode["valid"]).amax(1) for episode in episodes], 1)
    metrics = summarize(returns, lengths, success if env.has_success else None)
    narrowing = {f"eval/posterior_std_ep{k}": float(var.sqrt().mean()) for k, (_, var) in enumerate(beliefs)}
    return metrics | narrowing


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


def check_pearl(args):
    """Check the flags of this script, except for what depends on the environment."""
    positive = "train_tasks episodes_per_task prior_episodes num_tasks batch_size replay_episodes latent_size"
    positive += " context_episodes context_rounds context_stride hidden_size hidden_layers eval_episodes"
    positive += " eval_prior_episodes updates_per_step lr reward_scale alpha"
    for name in positive.split():
        require(0 < getattr(args, name) < math.inf, name, getattr(args, name), "a positive number")
    for name in "kl_coef eval_tasks".split():
        require(0 <= getattr(args, name) < math.inf, name, getattr(args, name), "zero or a positive number")
    require(0 <= args.gamma < 1, "gamma", args.gamma, "at least 0 and below 1")
    require(0 < args.tau <= 1, "tau", args.tau, "more than 0, at most 1")
    for name, allowed in (("context", "episodes transitions"), ("context_data", "all prior")):
        require(getattr(args, name) in allowed.split(), name, getattr(args, name), f"one of {allowed}")
    most = args.train_tasks
    require(args.num_tasks <= most, "num_tasks", args.num_tasks, f"at most {most}, the training tasks")
    per_round = args.episodes_per_task
    for name in ("prior_episodes", "context_episodes"):
        value, limit = getattr(args, name), f"at most {per_round}, the episodes of a round"
        require(value <= per_round, name, value, limit)
    stored, needed = args.replay_episodes, per_round * args.context_rounds
    limit = f"at least {needed}, the rounds that context is from"
    require(stored >= needed, "replay_episodes", stored, limit)


def main(argv=None):
    args, checkpoint = parse_args(Args, argv)
    device = check_experiment(args)
    check_pearl(args)
    torch.manual_seed(args.seed)

    env = make_env(args.env_id, 1 if args.evaluate else args.train_tasks, device, args.seed)
    held_out = env.num_test_tasks
    eval_tasks = args.eval_tasks or min(10_000, held_out)
    require(eval_tasks <= held_out, "eval_tasks", eval_tasks, f"at most {held_out}, all that are held out")
    eval_env = make_env(args.env_id, eval_tasks, device, seed=0)
    obs_dim, action_space = env.single_observation_space.shape[0], env.single_action_space
    continuous = isinstance(action_space, gym.spaces.Box) and action_space.is_bounded()
    require(continuous, "env_id", args.env_id, "a task distribution with continuous actions between bounds")
    agent = make_agent(obs_dim, action_space, args).to(device)
    act_fn = torch.compile(sample_action) if args.compile else sample_action
    step_fn = torch.compile(gradient_step) if args.compile else gradient_step
    if args.evaluate:
        restore(checkpoint, {"agent": agent})
        report = evaluate(agent, eval_env, eval_tasks, act_fn, args)
        print_report(eval_env, report, eval_tasks, "episode")
        return

    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, fused=True)
    rings = (args.train_tasks, args.replay_episodes)
    replay = ReplayBuffer(*rings, env.horizon, obs_dim, action_space.shape[0], device)
    env.set_tasks(env.sample_tasks(args.train_tasks))  # from here on, in every episode
    modules = {"agent": agent, "optimizer": optimizer, "replay": replay, "env": env}  # all that has a state
    iteration = global_step = 0
    if checkpoint:
        restore(checkpoint, modules)
        iteration, global_step = checkpoint["iteration"], checkpoint["global_step"]
    run = start_run(args, checkpoint)
    del checkpoint  # all of it is in place
    save_checkpoint(run, args, modules, iteration, global_step)  # a run can be resumed from its first second
    report, total = {}, args.total_timesteps

    with tqdm(total=total, initial=global_step, unit="step", unit_scale=True) as bar:
        while global_step < total:
            start = clock(device)

            # Collect: a round of episodes on every training task, exploring as on a new one. [D5]
            episodes, _ = adapt(agent, act_fn, env, args.episodes_per_task, args.prior_episodes, args)
            for episode in episodes:
                replay.add(episode)
            steps = int(sum(episode["valid"].sum(dtype=torch.int64) for episode in episodes))
            collected = clock(device)
            count = max(1, round(steps * args.updates_per_step))
            metrics = update(agent, optimizer, step_fn, replay, count, args)
            learned = clock(device)

            iteration, global_step = iteration + 1, global_step + steps
            metrics |= {"charts/iteration": iteration, "charts/SPS": steps / (learned - start)}
            metrics |= {"time/rollout": collected - start, "time/update": learned - collected}
            metrics |= {"time/gradient_step": (learned - collected) / count}
            check_finite(run, global_step, metrics)
            if iteration % args.eval_every == 0 or global_step >= total:
                report = evaluate(agent, eval_env, eval_tasks, act_fn, args)
                metrics |= {**report, "time/evaluate": clock(device) - learned}
                before, after = (report[f"eval/return_ep{stage}"] for stage in (0, args.eval_episodes - 1))
                bar.set_postfix(held_out=f"{before:.2f} -> {after:.2f}")
            log(run, global_step, metrics)
            if iteration % args.save_every == 0 or global_step >= total:
                save_checkpoint(run, args, modules, iteration, global_step)
            bar.update(steps)

    if run["wandb"] is not None:
        run["wandb"].finish()
    report = report or evaluate(agent, eval_env, eval_tasks, act_fn, args)
    print_report(eval_env, report, eval_tasks, "episode")
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
