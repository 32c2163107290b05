r"""DARC: practise in a simulator whose physics are wrong, paid for what would also work in the real world.
(Eysenbach et al. 2021, arXiv:2006.13916)

THE IDEA
    Two domains share states, actions and (as far as possible) rewards, and differ in their dynamics: a
    source, where steps are cheap, and a target, where the policy will have to act and steps are scarce. A
    policy trained in the source makes use of whatever the source permits, also of what the target does not.

    So take from the reward what gives the source away. After a step, ask how much likelier the target is to
    make it than the source: delta r = log p_target(s' | s, a) - log p_source(s' | s, a). Where both domains
    do the same it is 0. A step that only the source can make costs dearly, and the policy goes another way,
    though no reward of the target ever reaches it. Maximising the sum of r + delta r and entropy in the
    source is fitting, by KL divergence, those trajectories of the target that are the likelier the more
    they earn. What the source cannot do cannot be learned in this way.

    Nobody knows those densities. But a classifier that tells transitions of the two domains apart knows
    their ratio, by Bayes' rule; a second one, which sees only (s, a), takes away what comes from the domains
    being visited in different places. Neither models the dynamics.

ALGORITHM  [Alg 1]
    repeat
        play episodes in the source with pi, into the source's replay
        whenever there are fewer than target_ratio target steps for each source step: play in the target
        for a number of gradient steps:
            draw a batch of each domain
            classifiers: descend the cross-entropy of q(domain | s, a, s') and of q(domain | s, a)
            delta r = log q(target | s, a, s') - log q(source | s, a, s')
                      - log q(target | s, a) + log q(source | s, a)       on the source's batch, anew
            y = reward_scale (r + correction_scale delta r), the latter once the warm-up is over
                + gamma (1 - terminated) (min_i Q_target_i(s', a') - alpha log pi(a' | s'))
            critics: descend sum_i (Q_i(s, a) - y)^2                                              [SAC Eq 5]
            actor: descend alpha log pi(a~ | s) - min_i Q_i(s, a~)                                [SAC Eq 7]
            alpha: descend -alpha (log pi(a~ | s) + target entropy)                              [SAC Eq 18]
            where a' ~ pi(. | s') and a~ ~ pi(. | s)
    in the target: play with the policy's mean for an action. Nothing is trained.
    --method source leaves out delta r, classifiers and target; importance_weighting weighs the critics'
    squared errors by exp(delta r) instead; target is SAC in the target alone, with all total_timesteps there.
    SAC: Haarnoja et al. 2018, arXiv:1801.01290; with a learned temperature 1812.05905, whose equation
    numbers these are.

DIFFERS FROM THE PAPER
    D1  Whole episodes are played between bouts of gradient steps, in num_envs environments side by side;
        there, a step and a gradient step alternate, here it is five steps to one, on BrokenReacher fourteen.
        A batch has as many transitions of each environment, and the target is played in the warm-up, too.
    D2  The classifier of (s, a, s') reads s' - s as well: the same information, and what domains differ in.
    D3  The logits of (s, a, s') are those of (s, a) plus a network's, which is the correction itself. So are
        the paper's, whose gradient goes through both networks; here those of (s, a) are held fixed in it, and
        one draw of noise serves both. With classifiers apart, where the target never comes both say "source"
        with more and more conviction, and the difference of two such numbers is anything: the policy finds
        the places where it happens to be positive.
    D4  The inputs of all networks are normalised by what was played, as in HER (arXiv:1707.01495). The
        classifiers' had better be: the noise on them has one size for all. Deviations below .01 are not
        blown up: choose units in which a step changes more.
    D5  The squared correction is in the classifiers' loss, with a weight so small that data overrule it at
        once (decay, 0 for the paper's): domains count as alike until a difference is seen. Where they are
        told apart for certain it holds delta r to 4.7 nats: sigmoid(-m) = 2 decay m.
    D6  Importance weighting touches the critics only: given (s, a), it is s' that the domains deal out
        differently, and the actor's loss has none. The released code weighs that, too. Weights are kept
        below 10, as a ratio knows no bound.
    D7  The default task is small, and so are its networks, its warm-up (paper 1e5 steps) and its discount
        (paper .99), and its step size is larger (paper 3e-4). Paper: 2 x 256, tau .005, reward scale .1,
        noise 1 on inputs that are not normalised; its code: random play in both domains at first.
    D8  delta r is in nats, and the derivation has the entropy's temperature at 1. With rewards in other units
        and a temperature that is learned, what a nat costs is a choice: correction_scale, which the released
        code has, too. Where steps earn a tenth, errors of a tenth of a nat decide everything at 1.

TRAPS (each has a test that goes red when the trap is put in)
    T1  A softmax on top of a softmax, as where a loss that takes logits is given probabilities: the
        correction gets a wrong slope, and nothing else looks wrong.
    T2  Twin critics that are copies of one another: they stay equal, and the minimum of two is one.
    T3  Noise on the inputs while delta r is computed: it belongs to training, where it smooths.
    T4  Inputs of different size beside noise of one size: it drowns the small ones, and the change in a
        short step is the smallest of all.
    T5  The second classifier left out: the policy is paid for being where the target's data are.
    T6  A time limit taken for an end: the critic learns that nothing comes after it. (The classifiers see
        no ends at all: the domains have to end episodes alike.)
    T7  The next episode's first observation taken for the last one's next observation: a jump that no
        dynamics make, and both classifiers learn it.
    T8  delta r added after the reward scale: correction_scale is then in other units, 1 / scale too large.
    T9  Episodes that end early: what follows in their row is padding and no data.
    T10 Squashing forgotten in the log-probability, or its Jacobian taken where tanh is flat: log 0.
    T11 Classifiers that begin when the warm-up is over: the first corrections are noise.
    T12 Chance. Where outcomes are drawn, r + delta r is a lower bound, not the target's reward: on average
        delta r costs KL(source || target) of the next state, whichever of the two is the kinder, so a risky
        action that is right in the target may be left alone, and where bodies fall, falling soon may pay.
        That is the theory, not an error; its test shows it.

RUN
    python darc_offdynamics.py                                          # a wall: two minutes
    python darc_offdynamics.py --method source                          # and how it goes without
    python darc_offdynamics.py --env-id BrokenReacher-v0 --total-timesteps 165000 --updates-per-step 0.07 \
        --warmup-steps 15000 --input-noise 0.4 --correction-scale 0.1 --decay 0.01 --gamma 0.95 --tau 0.005
        # two environments of your own: --env-id my_module:Simulator-v0 --target-env-id my_module:Robot-v0
        # (what they must offer: common/base.py); a robot that is one: --num-envs 1 --eval-tasks 1
        # --eval-every 100: evaluation plays in the target, too, uncounted and in a second environment of it

RESULT (in the target; +- a 95 % interval over seeds)
    PointWall       60,000 steps, 5,500 of them in the target, 2.3 min of a busy core, 3 seeds: 1.00 +- .01
                    of the episodes come to the goal, source only and importance weighting .26
    BrokenReacher   165,000 steps, 16,000 in the target, 3 min, 10 seeds: -10.3 +- .3; source only -11.1
                    +- .6, importance weighting -11.3 +- .5; trained in the target, ten times its steps, -9.4
                    --target-in-sac, 220,000 steps, 10 seeds: -9.9 +- .2; without the correction, and SAC in
                    the target alone, from as many steps there, better still: -9.6, -9.5 (3 seeds each)
    BrokenHalfCheetah, flags in benchmark/reproduce.py: 220,000 steps, 20,000 in the target, 17 min, 3 seeds:
                    2529, 3662, 3745; source only 2059, 2628, 1493; importance weighting 2021, 8, 644
                    SAC in the target alone, from as many steps there: 3924, 1688, 2111
    PointDoor       --env-id PointDoor-v0, the wall is in the source: DARC ends by walking around it in the
                    target, too, -12.0 with all episodes at the goal, after evaluations from .00 to 1.00 of
                    them (1 seed). Straight on would be -6.0
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
    env_id: str = "PointWall-v0"  # a pair of domains: one of common.ids(), or your_module:YourId-v0
    seed: int = 1  # of all that is random in training; evaluation has frozen seeds of its own
    total_timesteps: int = 60_000  # environment steps of training, adapting too; iterations are whole
    device: str = "auto"  # auto (a GPU if there is one), cpu or cuda
    compile: bool = False  # torch.compile acting or gradient steps, see main: may pay on a GPU
    track: bool = False  # log to Weights & Biases too; WANDB_MODE=offline works
    wandb_project: str = "onefile-meta-rl"  # W&B project
    wandb_entity: str = ""  # W&B user or team; empty: your default one
    run_dir: str = "runs"  # parent folder of this run's own folder
    eval_every: int = 4  # iterations between evaluations on the held-out tasks
    save_every: int = 4  # iterations between checkpoints
    resume: str = ""  # run folder (or checkpoint) to continue, on a CPU bit for bit; flags are remembered
    evaluate: str = ""  # run folder (or checkpoint) to evaluate, then exit; flags of evaluation may differ

    target_env_id: str = ""  # whose held-out tasks are the target; empty: env_id itself, a pair
    method: str = "darc"  # darc, importance_weighting, source (no correction) or target (SAC there)
    target_ratio: float = 0.1  # target steps for each source step, played num_envs episodes at a time
    correction_scale: float = 1.0  # factor on delta r: in units of the reward, what a nat costs [D8]
    target_in_sac: bool = False  # let as many target transitions into SAC's batch as well, as they are
    warmup_steps: int = 5000  # source steps in which SAC learns from r alone; the classifiers train already
    input_noise: float = 0.1  # deviation of the noise on the classifiers' normalised inputs, in training
    decay: float = 0.001  # weight of the squared correction in the classifiers' loss; no schedule [D5]
    num_envs: int = 16  # episodes that are played side by side
    updates_per_step: float = 0.2  # gradient steps per source step (--method target: per target step)
    batch_size: int = 256  # transitions of a batch, as many of each of the num_envs environments [D1]
    replay_episodes: int = 500  # episodes that an environment's ring holds
    hidden_size: int = 128  # width of the hidden layers of all networks [D7]
    hidden_layers: int = 2  # how many there are in each network [D7]
    lr: float = 5e-4  # Adam's step size, of all networks
    gamma: float = 0.98  # discount per step, below 1
    tau: float = 0.01  # share of the critics that moves into the target critics at each gradient step
    reward_scale: float = 1.0  # factor on rewards, corrected ones included
    autotune: bool = True  # learn the entropy temperature so that entropy is about minus the action dimension
    alpha: float = 0.1  # entropy temperature; with autotune the first one
    deterministic_eval: bool = True  # at evaluation act by the policy's mean
    eval_episodes: int = 1  # episodes in each environment, every one from a frozen start of its own
    eval_tasks: int = 0  # frozen starts in each domain; 0: as many as the target has, at most 1,000


CLASSIFYING = ("darc", "importance_weighting")  # the methods that compare the two domains


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


def log_ratio(log_sas, log_sa):
    """log p_target(s' | s, a) / p_source(s' | s, a), by Bayes' rule.

    log_sas, log_sa: log-probabilities of (source, target), [..., 2]. Returns [...].
    """
    return log_sas[..., 1] - log_sas[..., 0] - log_sa[..., 1] + log_sa[..., 0]  # T5


class DomainClassifiers(nn.Module):
    """Which domain is a transition from? One network sees (s, a, s'), the other (s, a) only. [D3]"""

    def __init__(self, obs_dim, action_dim, hidden_size, hidden_layers):
        super().__init__()
        self.sa_dim = obs_dim + action_dim
        self.normalizer = Normalizer(self.sa_dim + 2 * obs_dim)
        self.sas = mlp(self.sa_dim + 2 * obs_dim, hidden_size, hidden_layers, 2)
        self.sa = mlp(self.sa_dim, hidden_size, hidden_layers, 2)

    @staticmethod
    def inputs(obs, action, next_obs):
        """[..., obs], [..., act], [..., obs] -> [..., obs + act + 2 obs]"""
        return torch.cat([obs, action, next_obs, next_obs - obs], -1)  # D2

    def forward(self, obs, action, next_obs, noise=0.0):
        """Log-probabilities of (source, target), by (s, a, s') and by (s, a), each [..., 2].

        noise: deviation of the Gaussian noise on the normalised inputs.
        """
        x = self.normalizer(self.inputs(obs, action, next_obs))  # T4
        if noise:
            x = x + noise * torch.randn_like(x)
        sa = self.sa(x[..., : self.sa_dim])
        sas = sa.detach() + self.sas(x)  # D3
        return sas.log_softmax(-1), sa.log_softmax(-1)  # T1: once


def make_domain_agent(obs_dim, action_space, args):
    """All networks: normalizer, actor, critic, target (of it), temperature and classifiers.

    Its buffer steps counts what was played in the source and in the target.
    """
    size, action_dim = (args.hidden_size, args.hidden_layers), action_space.shape[0]
    critic = TwinCritic(obs_dim + action_dim, *size)
    networks = {"normalizer": Normalizer(obs_dim), "actor": Actor(obs_dim, action_space, *size)}
    networks |= {"critic": critic, "target": copy.deepcopy(critic), "temperature": Temperature(args.alpha)}
    networks["classifiers"] = DomainClassifiers(obs_dim, action_dim, *size)
    agent = nn.ModuleDict(networks)
    agent.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
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
def rollout(agent, act_fn, env, seed=None, deterministic=False):
    """Play one episode in every environment.

    seed: of starts and noise.
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
        action, _ = act_fn(agent.actor, agent.normalizer(obs), deterministic)
        obs, reward, terminated, truncated, info = env.step(agent.actor.to_env(action))
        observations.append(info["final_obs"])  # T7: obs itself may already be the next episode's
        played = {"action": action, "reward": reward, "train_reward": info.get("dense_reward", reward)}
        ended = {"terminated": terminated.float()}  # T6: truncated is no end of the task
        steps.append({**played, **ended, "success": info.get("success", no_success), "valid": valid})
        valid = valid * ~(terminated | truncated)  # T9: the environment begins anew, but that is no data
    played = {name: torch.stack([step[name] for step in steps], 1) for name in steps[0]}
    return {"obs": torch.stack(observations, 1), **played}


def transitions_of(episode):
    """obs, action and next_obs of all transitions in an episode of rollout, [n, ...]."""
    inside = episode["valid"] > 0  # T9
    return episode["obs"][:, :-1][inside], episode["action"][inside], episode["obs"][:, 1:][inside]


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


def play_domain(agent, act_fn, env, replay, domain):
    """An episode in every environment of a domain (0 source, 1 target). Returns the number of steps."""
    episode = rollout(agent, act_fn, env)
    replay.add(episode)
    transitions = transitions_of(episode)
    agent.normalizer.see(transitions[0])
    agent.classifiers.normalizer.see(agent.classifiers.inputs(*transitions))
    agent.steps[domain] += len(transitions[0])
    return len(transitions[0])


def collect_domains(agent, act_fn, envs, replays, args):
    """Play in the source, and in the target when its share of steps is due. [Alg 1]

    envs, replays: by domain. Returns the numbers of steps: of all, and of those that gradient steps go by.
    """
    if args.method == "target":
        steps = play_domain(agent, act_fn, envs["target"], replays["target"], 1)
        return steps, steps
    source_steps = play_domain(agent, act_fn, envs["source"], replays["source"], 0)
    played, played_target = agent.steps.tolist()
    target_steps = 0
    while args.method != "source" and played_target + target_steps < args.target_ratio * played:
        target_steps += play_domain(agent, act_fn, envs["target"], replays["target"], 1)
    return source_steps + target_steps, source_steps


def draw_domain(replay, args):
    """A batch of one domain, as many transitions of each environment: a dict of [num_envs, M, ...].

    Its reward is the dense one, where there is one; evaluation counts the plain one.
    """
    rows = torch.arange(args.num_envs, device=replay.length.device)
    batch = replay.take(rows, *replay.draw(rows, args.batch_size // args.num_envs))
    return {**batch, "reward": batch["train_reward"]}


# =============================== 4. Update ===============================


def classifier_loss(classifiers, source, target, noise, decay):
    """Cross-entropy of both classifiers, over as many transitions of either domain. [Alg 1]

    source, target: dicts of [N, M, ...] with obs, action, next_obs; decay: weight of the squared correction.
    Returns the loss of (s, a, s'), which holds the decay, and that of (s, a): scalars; a coin's is ln 2.
    """
    names = ("obs", "action", "next_obs")
    both = (torch.stack([source[name], target[name]]) for name in names)  # [2, N, M, ...]
    log_sas, log_sa = classifiers(*both, noise)
    sas, sa = (-(log_q[0, ..., 0].mean() + log_q[1, ..., 1].mean()) / 2 for log_q in (log_sas, log_sa))
    return sas + decay * log_ratio(log_sas, log_sa.detach()).square().mean(), sa  # D5


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


def darc_step(agent, optimizer, source, target, correcting, args):
    """One step of the classifiers, then of critics, actor and temperature, in place.

    source, target: batches of the two domains, dicts of [N, M, ...]; one is None where the method needs
    none. correcting: is the warm-up over? Returns metrics.
    """
    metrics = {}
    if source is not None and target is not None:  # T11: during the warm-up, too
        losses = classifier_loss(agent.classifiers, source, target, args.input_noise, args.decay)
        descend(optimizer, sum(losses), list(agent.classifiers.parameters()))
        metrics = {"losses/classifier_sas": losses[0], "losses/classifier_sa": losses[1]}
    batch = adapt(agent.classifiers, source, target, correcting, args)
    x, next_x = (agent.normalizer(batch[name]) for name in ("obs", "next_obs"))
    alpha = agent.temperature().detach()

    reward, terminated = args.reward_scale * batch["reward"], batch["terminated"]  # T8
    y = critic_target(agent.actor, agent.target, next_x, reward, terminated, alpha, args.gamma)
    values = agent.critic(x, batch["action"])
    root_weight = batch["weight"].sqrt()  # so that squared errors are weighed
    td_loss = critic_loss(root_weight * values, root_weight * y)
    critics = list(agent.critic.parameters())
    descend(optimizer, td_loss, critics)
    grad_norm = nn.utils.get_total_norm([p.grad for p in critics])

    pi_loss, logprob = actor_loss(agent.actor, agent.critic, x, alpha)
    descend(optimizer, pi_loss, list(agent.actor.parameters()))
    if args.autotune:
        alpha_loss = temperature_loss(agent.temperature(), logprob, -agent.actor.action_dim)
        descend(optimizer, alpha_loss, list(agent.temperature.parameters()))
    follow(agent.target, agent.critic, args.tau)

    explained = 1 - (values - y).square().mean() / y.var(correction=0).clamp(min=1e-8)
    metrics |= {"losses/critic": td_loss, "losses/actor": pi_loss, "debug/alpha": alpha.mean()}
    metrics |= {"debug/entropy": -logprob.mean(), "debug/q": values.mean(), "debug/grad_norm": grad_norm}
    metrics["debug/explained_variance"] = explained
    own = len(root_weight) // (1 + args.target_in_sac)  # the others are the target's
    metrics |= {f"debug/{name}": batch[name][:own].mean() for name in ("correction", "weight")}
    return {name: value.detach() for name, value in metrics.items()}


def update(agent, optimizer, step_fn, replays, count, correcting, args):
    """count gradient steps, each on batches of their own. Returns the mean of their metrics."""
    sums = {}
    needed = ("source", "target") if args.method in CLASSIFYING else (args.method,)
    for _ in range(count):
        source, target = (draw_domain(replays[name], args) if name in needed else None for name in replays)
        metrics = step_fn(agent, optimizer, source, target, correcting, args)
        sums = {name: sums.get(name, 0) + value for name, value in metrics.items()}
    return {name: float(value) / count for name, value in sums.items()}


# ================================ 5. Adapt ===============================

MAX_WEIGHT = 10.0  # of a transition [D6]


@torch.no_grad()
def reward_correction(classifiers, obs, action, next_obs):
    """delta r, the log of how much likelier the target is than the source to make this step.

    obs, next_obs: [..., obs]; action: [..., act]. Returns [...], in nats.
    """
    return log_ratio(*classifiers(obs, action, next_obs))  # T3: no noise


def adapt(classifiers, source, target, correcting, args):
    """What SAC learns from: practice in the source, valued as the target would have it.

    source, target: batches as in darc_step. Returns a dict of [N, M, ...] whose reward is corrected (darc),
    with weight (importance_weighting) and correction (delta r in nats) [N, M] beside it.
    """
    learned_from = target if args.method == "target" else source
    one, zero = torch.ones_like(learned_from["reward"]), torch.zeros_like(learned_from["reward"])
    batch = {**learned_from, "weight": one, "correction": zero}
    if correcting and args.method in CLASSIFYING:
        delta = reward_correction(classifiers, *(source[name] for name in ("obs", "action", "next_obs")))
        batch["correction"] = delta
        if args.method == "darc":  # T12: exact for deterministic dynamics
            batch["reward"] = source["reward"] + args.correction_scale * delta
        else:
            batch["weight"] = delta.exp().clamp(max=MAX_WEIGHT)
    if args.target_in_sac:
        real = {**target, "weight": one, "correction": zero}
        batch = {name: torch.cat([value, real[name]]) for name, value in batch.items()}  # [2 N, M, ...]
    return batch


# ============================== 6. Evaluate ==============================

EVAL_SEED = 20_190_319  # of starts, noise and actions in every evaluation of every run


def evaluate(agent, envs, act_fn, args):
    """Play eval_episodes from frozen starts in both domains; what is counted by episode is the target's.

    Nothing is trained, and the target steps played here are not counted. eval/correction_* says what the
    classifiers hold against the source's steps.
    """
    metrics, device = {}, envs["target"].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(EVAL_SEED)
        seeds = range(EVAL_SEED, EVAL_SEED + args.eval_episodes)
        for name, env in envs.items():
            episodes = [rollout(agent, act_fn, env, seed, args.deterministic_eval) for seed in seeds]
            returns = torch.stack([(episode["reward"] * episode["valid"]).sum(1) for episode in episodes], 1)
            lengths = torch.stack([episode["valid"].sum(1) for episode in episodes], 1)
            reached = [(episode["success"] * episode["valid"]).amax(1) for episode in episodes]
            success = torch.stack(reached, 1) if env.has_success else None
            metrics[f"eval/return_{name}"] = float(returns.mean())
            if env.has_success:
                metrics[f"eval/success_{name}"] = float(success.mean())
            both_played = bool(agent.steps.all())  # no classifier was trained by --method source or target
            if name == "source" and args.method in CLASSIFYING and both_played:
                transitions = [torch.cat(parts) for parts in zip(*map(transitions_of, episodes), strict=True)]
                delta = reward_correction(agent.classifiers, *transitions).sort().values
                metrics["eval/correction_mean"] = float(delta.mean())
                for percent in (5, 50, 95):
                    place = int(percent / 100 * (len(delta) - 1))
                    metrics[f"eval/correction_q{percent}"] = float(delta[place])
            if name == "target":
                metrics |= summarize(returns, lengths, success)
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


def check_darc(args):
    """Check the flags of this script, except for what depends on the environment."""
    positive = "num_envs updates_per_step batch_size replay_episodes hidden_size hidden_layers lr"
    positive += " reward_scale alpha eval_episodes"
    for name in positive.split():
        require(0 < getattr(args, name) < math.inf, name, getattr(args, name), "a positive number")
    for name in "eval_tasks warmup_steps input_noise decay target_ratio correction_scale".split():
        require(0 <= getattr(args, name) < math.inf, name, getattr(args, name), "zero or a positive number")
    require(0 <= args.gamma < 1, "gamma", args.gamma, "at least 0 and below 1")
    require(0 < args.tau <= 1, "tau", args.tau, "more than 0, at most 1")
    kinds = "darc importance_weighting source target"
    require(args.method in kinds.split(), "method", args.method, f"one of {kinds}")
    classifying = args.method in CLASSIFYING
    more = f"more than 0: --method {args.method} compares the source's steps with the target's"
    require(args.target_ratio > 0 or not classifying, "target_ratio", args.target_ratio, more)
    wanted = "--method darc or importance_weighting beside it"
    require(classifying or not args.target_in_sac, "target_in_sac", args.target_in_sac, wanted)
    multiple = args.batch_size % args.num_envs == 0
    require(multiple, "batch_size", args.batch_size, f"a multiple of {args.num_envs}, the environments")


def make_domains(args, num_envs, device, seeds):
    """The two domains, {"source": env, "target": env}, each with its tasks set. seeds: of each.

    The source plays training tasks, the target held-out ones, the same in training and in evaluation.
    """
    source = make_env(args.env_id, num_envs, device, seeds[0])
    target = make_env(args.target_env_id or args.env_id, num_envs, device, seeds[1], "--target-env-id")
    envs = {"source": source, "target": target}
    pair = bool(args.target_env_id) or source.named_tasks.keys() >= {"source", "target"}
    require(pair, "env_id", args.env_id, "a pair of domains, or --target-env-id beside it")
    for what in ("single_observation_space", "single_action_space"):
        one, two = getattr(source, what), getattr(target, what)
        expected = f"the source's {what.replace('_', ' ')}, {one}, and it has {two}"
        require(one == two, "target_env_id", args.target_env_id, expected)
    most = target.num_test_tasks
    require(num_envs <= most, "num_envs", num_envs, f"at most {most}, the target's held-out tasks")
    tasks = {"source": source.sample_tasks(num_envs), "target": target.sample_tasks(num_envs, split="test")}
    for name, env in envs.items():
        if not args.target_env_id:
            own = bool((tasks[name].cpu() == env.named_tasks[name].cpu()).all())
            where = "sample_tasks" if name == "source" else 'split="test"'
            require(own, "env_id", args.env_id, f"a pair whose {where} gives the task named {name}")
        env.set_tasks(tasks[name])  # from here on, in every episode
    return envs


def print_domains(envs, metrics, source_steps, args):
    """Both domains side by side, and what the classifiers hold against the source's steps."""
    for name, env in envs.items():
        solved = f", success {metrics[f'eval/success_{name}']:.3f}" if env.has_success else ""
        print(f"in the {name}: return {metrics[f'eval/return_{name}']:.3f}{solved}")
    if "eval/correction_mean" in metrics:
        quantiles = ", ".join(f"{metrics[f'eval/correction_q{percent}']:.2f}" for percent in (5, 50, 95))
        mean = metrics["eval/correction_mean"]
        print(f"delta r of the source's steps: mean {mean:.3f}; 5, 50, 95 %: {quantiles}")
    if args.method in CLASSIFYING and source_steps < args.warmup_steps:
        print(f"{source_steps} steps in the source are still warm-up: no reward or weight was corrected")


def main(argv=None):
    args, checkpoint = parse_args(Args, argv)
    device = check_experiment(args)
    check_darc(args)
    torch.manual_seed(args.seed)

    num_envs = 1 if args.evaluate else args.num_envs
    envs = make_domains(args, num_envs, device, (args.seed, 2**30 - 1 - args.seed))  # seeds that differ
    held_out = envs["target"].num_test_tasks
    eval_tasks = args.eval_tasks or min(1_000, held_out)
    require(eval_tasks <= held_out, "eval_tasks", eval_tasks, f"at most {held_out}, all that are held out")
    eval_envs = make_domains(args, eval_tasks, device, (0, 0))
    env = envs["source"]
    obs_dim, action_space = env.single_observation_space.shape[0], env.single_action_space
    continuous = isinstance(action_space, gym.spaces.Box) and action_space.is_bounded()
    require(continuous, "env_id", args.env_id, "a task distribution with continuous actions between bounds")
    agent = make_domain_agent(obs_dim, action_space, args).to(device)
    act_fn = torch.compile(sample_action) if args.compile else sample_action
    step_fn = torch.compile(darc_step) if args.compile else darc_step
    if args.evaluate:
        restore(checkpoint, {"agent": agent})
        report = evaluate(agent, eval_envs, act_fn, args)
        print_report(eval_envs["target"], report, eval_tasks, "episode")
        print_domains(eval_envs, report, int(agent.steps[0]), args)
        return

    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, fused=True)
    rings = (args.num_envs, args.replay_episodes)
    sizes = (obs_dim, action_space.shape[0], device)
    replays = {name: ReplayBuffer(*rings, env.horizon, *sizes) for name, env in envs.items()}
    modules = {"agent": agent, "optimizer": optimizer}  # all that has a state
    modules |= {f"env of the {name}": env for name, env in envs.items()}
    modules |= {f"replay of the {name}": replay for name, replay in replays.items()}
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

            # Collect: episodes in the source, and in the target when its share is due.
            correcting = int(agent.steps[0]) >= args.warmup_steps  # T11: classifiers have trained on those
            steps, own_steps = collect_domains(agent, act_fn, envs, replays, args)
            collected = clock(device)
            count = max(1, round(own_steps * args.updates_per_step))
            metrics = update(agent, optimizer, step_fn, replays, count, correcting, args)
            learned = clock(device)

            iteration, global_step = iteration + 1, global_step + steps
            metrics |= {"charts/iteration": iteration, "charts/SPS": steps / (learned - start)}
            metrics |= {"charts/target_steps": int(agent.steps[1])}
            metrics |= {"time/rollout": collected - start, "time/update": learned - collected}
            metrics |= {"time/gradient_step": (learned - collected) / count}
            check_finite(run, global_step, metrics)
            if iteration % args.eval_every == 0 or global_step >= total:
                report = evaluate(agent, eval_envs, act_fn, args)
                metrics |= {**report, "time/evaluate": clock(device) - learned}
                bar.set_postfix(held_out=f"{report['eval/return_ep0']:.2f}")
            log(run, global_step, metrics)
            if iteration % args.save_every == 0 or global_step >= total:
                save_checkpoint(run, args, modules, iteration, global_step)
            bar.update(steps)

    if run["wandb"] is not None:
        run["wandb"].finish()
    report = report or evaluate(agent, eval_envs, act_fn, args)
    print_report(eval_envs["target"], report, eval_tasks, "episode")
    print_domains(eval_envs, report, int(agent.steps[0]), args)
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
