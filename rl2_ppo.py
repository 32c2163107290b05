r"""RL^2: let a recurrent policy discover its own learning rule.
(Duan et al. 2016, arXiv:1611.02779; Wang et al. 2016, arXiv:1611.05763)

THE IDEA
    Play several episodes of the same unknown task in a row, and do not clear the network's memory between
    them. Reward the whole row. To score, the network must use episode 1 to find out what episode 2 needs:
    exploration is learned, not added. After training the weights stay fixed; learning a new task is nothing
    but the hidden state moving.

    Seen from outside this is PPO with a recurrent policy on one big POMDP whose "episode" is a trial: a
    task is drawn, n episodes of it are played, and what cannot be observed is the task. The fast learner
    (the GRU's dynamics) lives inside the slow one (PPO on its weights).

ALGORITHM
    repeat
        in every environment: draw a task M ~ p(M), hidden = 0                                     [Sec 2.2]
            play n episodes of M with action ~ pi(. | obs, last action, reward and done; hidden)    [Fig 1]
        A_t = sum_l (gamma lambda)^l delta_{t+l} over the whole trial                              [GAE Eq 16]
              delta_t = r_t + gamma V_{t+1} - V_t                                                  [GAE Eq 11]
        in minibatches of whole trials:
            maximise E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)], rho = pi / pi_old               [PPO Eq 7]
                - c (V - (A + V_old))^2 + a small bonus for entropy                                [PPO Eq 9]
    on a new task: play. Nothing is trained.
    GAE: Schulman et al. 2016, arXiv:1506.02438. PPO: Schulman et al. 2017, arXiv:1707.06347.

DIFFERS FROM THE PAPER (Duan et al., whose sections and figures the tags below name)
    D1  PPO instead of TRPO, as in the authors' own launch scripts.
    D2  Actor and critic are two linear heads on one GRU; the paper's baseline is a GRU of its own.
    D3  The critic predicts standardised returns, and its last layer is rescaled as their scale moves (PopArt,
        van Hasselt et al. 2016, arXiv:1602.07714): its loss has one scale, whatever trials sum to. With
        value_by_step, off by default, mean and deviation are those of the same step in all trials, and
        nothing is rescaled, as one layer serves all steps. It is for trials whose returns differ most by how
        many steps are left: the critic then learns only what the task, and what is known of it, add to that.
        TabularMDP, n = 25, lambda .8, one seed each, after 16 M steps: 418, without it 406.
    D4  gamma = 1 by default, since the plain sum over the trial is the objective. The trial is the horizon:
        V = 0 after its end, whatever gamma is. The authors' scripts, and some commands below, have .99.
    D5  Step size and entropy bonus fall linearly to zero. A run resumed for a larger total starts again from
        what is left of that: at 60 M of 100 M, from .4 of both.
    D6  bptt_window, for long trials: gradients stop where a window begins, GAE does not, and the hidden state
        it begins with is the one that was played with, stale from an iteration's second gradient step on.
    D7  normalize_inputs, off by default, for signals beyond a few units, like those of bodies that move: they
        enter the GRU with mean 0 and deviation 1, by what was played in earlier iterations (in the first as
        they are), cut to 5: a done flag that is 1 in one step of 400 would be 20.
    D8  Smaller: a GRU of 64 by default (their launch scripts: 128, with ReLU and weight normalisation) and
        batches of 20,000 steps (250,000).
    D9  bilinear, off by default and not in the paper, for tabular tasks: what an action paid in a state has
        to be stored under the pair and looked up by the state. Both are products, and a GRU that is given
        sums is slow to learn them. In: each entry of the last action, by itself and times each of the last
        observation's, and all of these once more times the reward. Out: policy and value are linear in the
        observation, with weights that the GRU writes (a hypernetwork; recurrent ones in meta-RL: Beck et al.
        2023, arXiv:2309.14970). TabularMDP, n = 10: 140 after 4 M steps, without it 143 after 49 M (lambda
        .8; without it .3).

TRAPS (each has a test that goes red when the trap is put in)
    T1  The hidden state cleared where an EPISODE ends: every episode plays the average task.
    T2  Credit cut where an episode ends: episode 1 is never paid for the information that it bought.
    T3  The hidden state kept where the TASK changes: a new task is taken for the old one.
    T4  A done flag that is never 1, or a first observation never shown: no telling where episodes begin.
    T5  Value targets made of standardised advantages: the critic learns a scale that means nothing.
    T6  Time shuffled, or cut into single steps: one step of backpropagation cannot teach what to remember.
    T7  First and last episode on different tasks, or on training tasks.
    T8  Episodes that end early end trials at different times: what follows the n-th episode is no data.

RUN
    python rl2_ppo.py                                     # 5 arms, 10 pulls: 1.5 to 3 minutes
    python rl2_ppo.py --env-id GridNavi-v0 --episodes-per-trial 4 --num-envs 1024 --epochs 2 --lr 0.005 \
        --gamma 0.99 --gae-lambda 0.95 --entropy-coef 0.1 --total-timesteps 14000000
    python rl2_ppo.py --episodes-per-trial 100 --num-envs 1024 --hidden-size 128 --lr 0.005 \
        --gae-lambda 0.95 --epochs 3 --entropy-coef 0.02 --total-timesteps 115000000    # longer trials
    python rl2_ppo.py --env-id TabularMDP-v0 --bilinear --num-envs 256 --hidden-size 256 --epochs 2 \
        --lr 0.005 --gamma 0.99 --gae-lambda 0.8 --entropy-coef 0.05 --total-timesteps 60000000
    python rl2_ppo.py --env-id HalfCheetahVel-v0 --episodes-per-trial 2 --num-envs 64 --hidden-size 128 \
        --lr 0.003 --gamma 0.97 --gae-lambda 0.9 --entropy-coef 0 --normalize-inputs --eval-tasks 100 \
        --eval-every 10 --total-timesteps 10000000       # a body that moves

RESULT (held-out tasks; +- a 95 % interval, over seeds where there are three, else over tasks (1.96 of the
        standard errors that are printed); seeds 1, 2, 3; minutes of one busy core, two quiet ones need half;
        flags in RUN or, for Bandit10, Maze and the other TabularMDP, benchmark/reproduce.py)
    Bandit5, n = 10    6.4 M steps, 3 min, 3 seeds: sum 6.64 +- .05 (6.626, 6.640, 6.665; pull 1 pays .50,
                       pull 10 .74); random 5.0, Bayes-optimal 6.660, the paper 6.7
    Bandit10, n = 10   12 M steps, 8 min, 3 seeds: sum 6.699 +- .009; Bayes-optimal 6.714
    GridNavi           14 M steps, 5 min, 3 seeds (its 21 goals are trained on): returns 4.0, 10.4, 11.0, 11.0
                       in episodes 1 to 4; path to the known goal 11.07, Bayes-optimal episode 1 4.0
    Maze               10 M steps, 25 min, 1 seed: 33.7 steps in the first episode, 20.4 in the second
    TabularMDP, n = 10 60 M steps, 75 min, 1 seed: sum 156.8 +- 1.6 (without --bilinear, with lambda .3, 154.0
                       after 130 M); random 100, a Bayesian who is paid for exploring (BEB) 152.3, the paper
                       156.2
    TabularMDP, n = 25 140 M steps, 98 min, 1 seed, with --value-by-step, lambda .9 and a GRU of 128: sum
                       444.0 +- 3.6; BEB 442.4, the paper 445.7
    Bandit5, n = 100   115 M steps, 44 min, 1 seed: 78.31 +- .32; players that know the prior: the index of
                       what is left of the trial 78.6, Gittins index 78.5 (both +- .3), the paper 78.7
    HalfCheetahVel     10 M steps, 25 min, seeds 1 and 2: -102, -91 in episode 1 and -103, -90 in episode 2;
                       one speed for all tasks -167, told -20
"""

import contextlib
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
from torch.distributions import Categorical, Independent, Normal
from torch.nn import functional as F
from tqdm import tqdm

import common  # task distributions; what one of your own has to offer is said in common/base.py

# ================================ 1. Args ================================


@dataclass
class Args:
    env_id: str = "Bandit5-v0"  # task distribution: one of common.ids(), or your_module:YourId-v0
    seed: int = 1  # of all that is random in training; evaluation has frozen seeds of its own
    total_timesteps: int = 6_400_000  # environment steps of training, adapting too; iterations are whole
    device: str = "auto"  # auto (a GPU if there is one), cpu or cuda
    compile: bool = False  # torch.compile acting or gradient steps, see main: may pay on a GPU
    track: bool = False  # log to Weights & Biases too; WANDB_MODE=offline works
    wandb_project: str = "onefile-meta-rl"  # W&B project
    wandb_entity: str = ""  # W&B user or team; empty: your default one
    run_dir: str = "runs"  # parent folder of this run's own folder
    eval_every: int = 20  # iterations between evaluations on the held-out tasks
    save_every: int = 20  # iterations between checkpoints
    resume: str = ""  # run folder (or checkpoint) to continue, on a CPU bit for bit; flags are remembered
    evaluate: str = ""  # run folder (or checkpoint) to evaluate, then exit; flags of evaluation may differ

    num_envs: int = 2048  # trials played side by side, each of its own task; an iteration is one in each
    episodes_per_trial: int = 10  # n, the episodes of one task that share a hidden state
    hidden_size: int = 64  # width of the GRU: all that the agent can remember of a task [D8]
    lr: float = 0.01  # Adam's step size, falling linearly to zero; less for smaller batches and longer trials
    gamma: float = 1.0  # discount per step, running on through the episodes of a trial [D4]
    gae_lambda: float = 1.0  # GAE: 1 uses whole sampled returns, less leans on the critic
    clip: float = 0.2  # PPO cuts the ratio of new to old probability to 1 +- this
    epochs: int = 4  # passes over each batch of trials
    minibatches: int = 4  # gradient steps a pass, at most, each on its share of whole trials (or windows)
    entropy_coef: float = 0.003  # bonus for random actions, falling linearly to zero
    value_coef: float = 0.5  # weight of the critic's loss beside the policy's
    max_grad_norm: float = 1.0  # longer gradients are shortened to this length
    normalize_inputs: bool = False  # observations, actions and rewards to mean 0 and deviation 1 [D7]
    bilinear: bool = False  # the GRU reads products and writes weights for obs: for tabular tasks [D9]
    value_by_step: bool = False  # standardise returns by step of the trial: for trials of one length [D3]
    bptt_window: int = 0  # backpropagate through so many steps, a divisor of a trial's [D6, T6]; 0: all
    eval_tasks: int = 0  # held-out tasks to evaluate on; 0: all there are, at most 10,000


# ============================== 2. Networks ==============================


class RecurrentActorCritic(nn.Module):
    """A GRU that reads the trial as it unfolds, and two linear heads that read the GRU. [D2]

    If bilinear, what the heads put out are weights, by which policy and value read the observation. [D9]
    """

    def __init__(self, obs_dim, action_space, hidden_size, bilinear=False):
        super().__init__()
        self.obs_dim, self.bilinear = obs_dim, bilinear
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n) if self.discrete else action_space.shape[0]
        of_action = 2 * (obs_dim + 1) * self.action_dim if bilinear else self.action_dim  # as in read
        heads = obs_dim + 1 if bilinear else 1  # D9: for each entry of the observation, then for a 1
        self.gru = nn.GRU(obs_dim + of_action + 2, hidden_size)
        self.actor = nn.Linear(hidden_size, heads * self.action_dim)
        self.critic = nn.Linear(hidden_size, heads)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(self.action_dim))
            for name, bound in (("low", action_space.low), ("high", action_space.high)):
                self.register_buffer(name, torch.tensor(bound), persistent=False)
        for name, shape in (("input", self.gru.input_size), ("return", ())):
            self.register_buffer(f"{name}_mean", torch.zeros(shape))  # [D7], [D3]
            self.register_buffer(f"{name}_std", torch.ones(shape))
        self.register_buffer("input_bound", torch.tensor(1e38))  # none, unless normalize_inputs [D7]
        for weight in (self.gru.weight_ih_l0, self.gru.weight_hh_l0):
            for gate in weight.chunk(3):  # orthogonal gate by gate, the usual start of a recurrent net
                nn.init.orthogonal_(gate)
        nn.init.orthogonal_(self.actor.weight, 0.01)  # start from an almost uniform policy
        nn.init.orthogonal_(self.critic.weight)
        for bias in (self.gru.bias_ih_l0, self.gru.bias_hh_l0, self.actor.bias, self.critic.bias):
            nn.init.zeros_(bias)

    def read(self, obs, last_obs, last_action, last_reward, last_done):
        """The GRU's input x: [B, obs + act + 2], or if bilinear [B, obs + 2 (obs + 1) act + 2]. [Fig 1]

        obs, last_obs: [B, obs]; last_action: [B, act], encoded; last_reward, last_done: [B]. Before the first
        step of a trial all that is last is 0.
        """
        reward, done = last_reward[:, None], last_done[:, None]
        if not self.bilinear:
            return torch.cat([obs, last_action, reward, done], 1)
        place = F.pad(last_obs, (0, 1), value=1.0)  # [B, obs + 1]: times this 1 the action stays itself
        pair = (place[:, :, None] * last_action[:, None]).flatten(1)  # D9: [B, (obs + 1) * act]
        return torch.cat([obs, pair, pair * reward, reward, done], 1)

    def forward(self, x, hidden):
        """x: [T, B, input], steps of a trial or window, as read; hidden: [1, B, H], before the first of them.

        Returns the action distribution over [T, B], value [T, B] in units of return (or, if value_by_step, of
        StepReturns), and the last hidden.
        """
        x = (x - self.input_mean) / self.input_std  # as it is unless normalize_inputs [D7]
        x = x.clamp(-self.input_bound, self.input_bound)
        memory, hidden = self.gru(x, hidden)  # [T, B, H] in one call: nothing is reset inside a trial [T1]
        value, head = self.critic(memory), self.actor(memory)  # [T, B, 1], [T, B, act]: logits or means
        if self.bilinear:  # D9: they are [T, B, obs + 1] and [T, B, (obs + 1) act], weights for (obs, 1)
            here = F.pad(x[..., : self.obs_dim], (0, 1), value=1.0)  # obs is what x begins with
            value = (here * value).sum(-1, keepdim=True)
            head = (here.unsqueeze(-2) @ head.unflatten(-1, (-1, self.action_dim))).squeeze(-2)
        value = self.return_mean + self.return_std * value.squeeze(-1)
        if self.discrete:
            return Categorical(logits=head, validate_args=False), value, hidden
        normal = Normal(head, self.log_std.exp().expand_as(head), validate_args=False)
        return Independent(normal, 1, validate_args=False), value, hidden  # log-probs summed over dimensions

    def initial_hidden(self, batch):
        return torch.zeros(1, batch, self.gru.hidden_size, device=self.return_mean.device)

    def encode(self, action):
        """What the next input tells of an action: [B] -> one-hot [B, act]; [B, act] as it was drawn."""
        return F.one_hot(action, self.action_dim).float() if self.discrete else action

    def to_env(self, action):
        """Actions are cut to [-1, 1] and stretched to the environment's box. Discrete: as it is."""
        return action if self.discrete else self.low + (action.clamp(-1, 1) + 1) / 2 * (self.high - self.low)


class StepReturns(nn.Module):
    """Mean and deviation [T, 1], over trials, of the return from each step of a trial on. [D3]"""

    def __init__(self, steps):
        super().__init__()
        self.register_buffer("mean", torch.zeros(steps, 1))
        self.register_buffer("std", torch.ones(steps, 1))

    @torch.no_grad()
    def follow(self, ret, rate):
        """Move to the moments of ret, [T, B]. rate: 1 takes them over, less follows slowly."""
        batch = ret.mean(1, keepdim=True), ret.std(1, correction=0, keepdim=True)
        self.mean, self.std = mix_moments((self.mean, self.std), batch, rate)


# ================================ 3. Data ================================


@torch.no_grad()
def rollout(agent, env, tasks, num_episodes, window, seed=None):
    """Play a trial in every environment: num_episodes episodes of tasks[i], hidden never cleared. [Sec 2.2]

    tasks: [B, task_dim]; window: steps between two stored hidden states; seed: of starts and noise.
    Returns a dict of [T, B, ...] tensors, T at least the steps of the longest trial: x (the input), action,
    logprob, value, reward, episode (its number in the trial), success, valid (1 inside the trial, 0 after);
    and hidden [ceil(T / window), B, H], with which each window begins.
    """
    env.set_tasks(tasks)
    obs, _ = env.reset(seed=seed)
    hidden = agent.initial_hidden(env.num_envs)  # T3: a new task begins from nothing
    last_obs = torch.zeros_like(obs)
    last_action = torch.zeros(env.num_envs, agent.action_dim, device=obs.device)
    last_reward, last_done, no_success = torch.zeros(3, env.num_envs, device=obs.device)
    episode = torch.zeros(env.num_envs, dtype=torch.int64, device=obs.device)
    steps, window_hidden = [], []
    trial_steps = num_episodes * env.horizon
    at_once = 1 if obs.device.type == "cpu" else 10  # looking means waiting for a GPU
    look_every = at_once if window == trial_steps else window
    for step in range(trial_steps):
        if env.terminates and step % look_every == 0:
            over = episode >= num_episodes
            if bool(over.all()):
                break  # every trial is over; if there are windows, one would begin here: none is cut
            env.rest(over)  # what follows a trial is no data: MuJoCo need not simulate it
        if step % window == 0:
            window_hidden.append(hidden[0])  # [B, H]
        # T4: where an episode has ended, obs is the next one's first observation and last_done is 1. [Fig 1]
        # obs and reward go in as they are: keep those of your own within a few units (about one if bilinear,
        # which multiplies them), or normalize_inputs.
        x = agent.read(obs, last_obs, last_action, last_reward, last_done)  # [B, input]
        policy, value, hidden = agent(x[None], hidden)  # T1: hidden runs on where an episode ends
        action = policy.sample()  # [1, B] or [1, B, act]
        played = {"x": x, "action": action[0], "logprob": policy.log_prob(action)[0], "value": value[0]}
        last_obs = obs
        obs, reward, terminated, truncated, info = env.step(agent.to_env(action[0]))
        success = info.get("success", no_success)
        steps.append({**played, "reward": reward, "episode": episode, "success": success})
        done = terminated | truncated
        last_action, last_reward, last_done = agent.encode(action[0]), reward, done.float()
        episode = episode + done
    trials = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
    trials["valid"] = (trials["episode"] < num_episodes).float()  # T8
    trials["hidden"] = torch.stack(window_hidden)
    return trials


def gae(reward, value, valid, gamma, gae_lambda):
    """Generalised advantage estimation over sequences that end for good: nothing is bootstrapped after them.

    reward, value, valid: [T, ...]; valid is 1 for the steps of a sequence and 0 for the padding behind them.
    Returns advantage [T, ...], 0 in the padding.  A_t = delta_t + gamma lambda A_{t+1}  [GAE Eq 11, 16]

    A sequence is what the objective sums over: an episode, or RL^2's trial of several. Cutting a trial where
    an episode ends, as several public versions do, would leave exploration in the first one unpaid.
    """
    advantage = torch.zeros_like(reward)
    next_value = next_advantage = torch.zeros_like(reward[0])
    for step in reversed(range(len(reward))):
        delta = reward[step] + gamma * next_value - value[step]
        next_advantage = (delta + gamma * gae_lambda * next_advantage) * valid[step]
        next_value = value[step] * valid[step]
        advantage[step] = next_advantage
    return advantage


def masked_mean(x, valid):
    """Mean of x over the entries where valid is 1."""
    return (x * valid).sum() / valid.sum().clamp(min=1)  # 0 where none counts


def masked_std(x, valid):
    """Standard deviation of x over the entries where valid is 1."""
    return masked_mean((x - masked_mean(x, valid)) ** 2, valid).sqrt()


def make_sequences(trials, window, args):
    """Trials -> what PPO learns from: a dict of [window, S, ...] and hidden [S, H].

    In the dict are x, action, logprob, value, valid, ret (the value's target) and advantage, standardised
    over the valid steps. S = T / window * B, less the windows that begin after their trial's end. Where valid
    is 0 the entries mean nothing.
    """
    valid, value = trials["valid"], trials["value"]
    advantage = gae(trials["reward"], value, valid, args.gamma, args.gae_lambda)  # T2: of the whole trial
    mean, std = masked_mean(advantage, valid), masked_std(advantage, valid)
    data = {name: trials[name] for name in ("x", "action", "logprob", "value", "valid")}
    data["ret"] = advantage + value  # T5: of the advantages as they are; they are standardised next
    data["advantage"] = (advantage - mean) / (std + 1e-8)
    window = min(window, len(value))  # whole trials may all have ended early
    # T6: a window keeps its order in time; [T, B, ...] -> [T / window, window, B, ...] -> [window, S, ...]
    data = {name: x.unflatten(0, (-1, window)).transpose(0, 1).flatten(1, 2) for name, x in data.items()}
    some = data["valid"].amax(0) > 0  # T8
    return {name: x[:, some] for name, x in data.items()}, trials["hidden"].flatten(0, 1)[some]


# =============================== 4. Update ===============================


def ppo_policy_loss(logprob, old_logprob, advantage, valid, clip):
    """The clipped surrogate as a loss [D1, PPO Eq 7]. All [T, B]. Returns it and the share beyond clip."""
    # The ratio is 1 at an iteration's first gradient step, but for rounding; in padding, where it might
    # overflow, always.
    ratio = ((logprob - old_logprob) * valid).exp()
    gain = torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    clipped = ((ratio - 1).abs() > clip).float()
    return -masked_mean(gain, valid), masked_mean(clipped, valid)


def ppo_value_loss(value, ret, valid, scale):
    """Half the squared error in units of scale, the returns' std. value, ret, valid: [T, B].

    Everywhere else, GAE included, value is in units of return. [D3] With value_by_step scale is 1, for value
    and ret have StepReturns' units here.
    """
    return 0.5 * masked_mean(((value - ret) / scale) ** 2, valid)


def mix_moments(old, new, rate):
    """Mean and standard deviation (at least .001) of a mixture. old, new: (mean, std); rate: new's share."""
    (old_mean, old_std), (new_mean, new_std) = old, new
    between = rate * (1 - rate) * (new_mean - old_mean) ** 2
    std = (torch.lerp(old_std**2, new_std**2, rate) + between).clamp(min=1e-6).sqrt()
    return torch.lerp(old_mean, new_mean, rate), std


@torch.no_grad()
def see_inputs(agent, x, valid, rate):
    """Move the inputs' moments to those of x. [D7] x: [T, B, input]; valid: [T, B].

    rate: 1 takes the new moments over; 1 / iteration lets every batch so far count alike. Changes the agent
    in place.
    """
    x = x[valid > 0]  # [n, input]
    batch = x.mean(0), x.std(0, correction=0)
    mean, std = mix_moments((agent.input_mean, agent.input_std), batch, rate)
    agent.input_mean.copy_(mean)
    agent.input_std.copy_(std.clamp(min=0.01))  # what hardly changes is not blown up
    agent.input_bound.fill_(5.0)


@torch.no_grad()
def popart_update(agent, ret, valid, rate):
    """Move the critic's unit to the moments of these returns without moving its predictions. [D3]

    ret, valid: [T, B]; rate: 1 takes the new moments over, less follows slowly. Changes the agent in place.
    """
    batch = masked_mean(ret, valid), masked_std(ret, valid)
    mean, std = mix_moments((agent.return_mean, agent.return_std), batch, rate)
    agent.critic.weight.mul_(agent.return_std / std)
    agent.critic.bias.mul_(agent.return_std)
    agent.critic.bias[-1].add_(agent.return_mean - mean)  # if bilinear, of the weights the one times 1 [D9]
    agent.critic.bias.div_(std)
    agent.return_mean.copy_(mean)
    agent.return_std.copy_(std)


def ppo_step(agent, optimizer, data, hidden, entropy_coef, args):
    """One gradient step on b of the sequences: data [window, b, ...], hidden [b, H]. Returns metrics.

    hidden was stored without its gradient, so backpropagation stops where a window begins. [D6]
    """
    policy, value, _ = agent(data["x"], hidden[None])
    logprob, valid = policy.log_prob(data["action"]), data["valid"]
    pg_loss, clipfrac = ppo_policy_loss(logprob, data["logprob"], data["advantage"], valid, args.clip)
    v_loss = ppo_value_loss(value, data["ret"], valid, agent.return_std)
    entropy = masked_mean(policy.entropy(), valid)
    loss = pg_loss + args.value_coef * v_loss - entropy_coef * entropy  # [PPO Eq 9]
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    logratio = (logprob.detach() - data["logprob"]) * valid
    kl = masked_mean(logratio.exp() - 1 - logratio, valid)  # KL(pi_old || pi), an estimator of low variance
    metrics = {"losses/policy": pg_loss, "losses/value": v_loss, "debug/entropy": entropy, "debug/kl": kl}
    metrics |= {"debug/clipfrac": clipfrac, "debug/grad_norm": grad_norm}
    return {name: value.detach() for name, value in metrics.items()}


def update(agent, optimizer, step_fn, trials, window, first, anneal, args, by_step=None):
    """All gradient steps of an iteration on trials, rollout's dict. Returns metrics, means over the steps.

    first: is it the first one, which takes the scale of the returns over at once (of GAE's: with lambda < 1
    they lean on a critic that knows nothing yet); anneal: falls from 1 to 0;
    by_step: StepReturns of the whole trial, which the critic's outputs are in units of, or None. [D3]
    """
    if by_step is not None:
        trials = {**trials, "value": by_step.mean + by_step.std * trials["value"]}  # in units of return
    data, hidden = make_sequences(trials, window, args)
    error = masked_mean((data["ret"] - data["value"]) ** 2, data["valid"])
    variance = masked_std(data["ret"], data["valid"]).square().clamp(min=1e-8)
    rate = 1.0 if first else 0.1  # .1: some ten iterations
    if by_step is None:
        popart_update(agent, data["ret"], data["valid"], rate)
    else:  # unlike PopArt's, a prediction moves with the mean of its step
        by_step.follow(data["ret"], rate)
        data["ret"] = (data["ret"] - by_step.mean) / by_step.std
    if first:  # what an untrained critic predicts is not worth keeping: it begins at the mean return
        for parameter in agent.critic.parameters():
            nn.init.zeros_(parameter)
    steps = []
    for _ in range(args.epochs):
        for index in torch.randperm(len(hidden), device=hidden.device).chunk(args.minibatches):
            part = {name: x[:, index] for name, x in data.items()}
            steps.append(step_fn(agent, optimizer, part, hidden[index], args.entropy_coef * anneal, args))
    metrics = {name: torch.stack([step[name] for step in steps]).mean() for name in steps[0]}
    metrics["debug/explained_variance"] = 1 - error / variance  # an error shared by all counts, too
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))  # in one transfer


# ================================ 5. Adapt ===============================


def adapt(agent, env, tasks, num_episodes, seed=None):
    """Learn new tasks: nothing is trained, the hidden state moves. tasks: [N, task_dim], N = env.num_envs.

    Returns for every episode of the trial, [N, num_episodes] each: return, length in steps, success (0 or 1).
    """
    trials = rollout(agent, env, tasks, num_episodes, window=num_episodes * env.horizon, seed=seed)
    episode = trials["episode"].clamp(max=num_episodes).T  # [N, T]; the last bin takes the padding
    sums = torch.zeros(3, env.num_envs, num_episodes + 1, device=episode.device)  # of reward, steps, success
    for total, per_step in zip(sums, (trials["reward"], trials["valid"], trials["success"]), strict=True):
        total.scatter_add_(1, episode, per_step.T.float())
    returns, lengths, successes = sums[:, :, :-1]
    return returns, lengths, (successes > 0).float()


# ============================== 6. Evaluate ==============================

EVAL_SEED = 20_161_109  # of starts, noise and actions in every evaluation of every run


def evaluate(agent, env, num_episodes):
    """Play a trial on each of env.num_envs frozen held-out tasks, actions sampled as in training. [T7]"""
    with torch.random.fork_rng(devices=[env.device] if env.device.type == "cuda" else []):
        torch.manual_seed(EVAL_SEED)
        tasks = env.sample_tasks(env.num_envs, split="test")  # a list of their own, the same at every call
        returns, lengths, success = adapt(agent, env, tasks, num_episodes, seed=EVAL_SEED)
    metrics = summarize(returns, lengths, success if env.has_success else None)
    total = returns.sum(1)
    metrics["eval/return_trial"] = float(total.mean())
    metrics["eval/return_trial_se"] = float(total.std(correction=0)) * max(len(total) - 1, 1) ** -0.5
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


def check_rl2(args):
    """Check the flags of this script, except for what depends on the environment."""
    positive = "num_envs episodes_per_trial hidden_size epochs minibatches lr clip max_grad_norm"
    for name in positive.split():
        fine = 0 < getattr(args, name) < 1e36  # float32 has to hold multiples of it
        require(fine, name, getattr(args, name), "a positive number")
    for name in "entropy_coef value_coef bptt_window eval_tasks".split():
        require(0 <= getattr(args, name) < math.inf, name, getattr(args, name), "zero or a positive number")
    if args.bilinear and args.normalize_inputs:  # D7 would cut a product, which is rarely not 0
        fail("--bilinear with --normalize-inputs: one of them, as what the one adds the other would cut")
    for name in ("gamma", "gae_lambda"):
        require(0 <= getattr(args, name) <= 1, name, getattr(args, name), "a number from 0 to 1")


def main(argv=None):
    args, checkpoint = parse_args(Args, argv)
    device = check_experiment(args)
    check_rl2(args)
    torch.manual_seed(args.seed)

    env = make_env(args.env_id, 1 if args.evaluate else args.num_envs, device, args.seed)
    held_out = env.num_test_tasks
    eval_tasks = args.eval_tasks or min(10_000, held_out)
    require(eval_tasks <= held_out, "eval_tasks", eval_tasks, f"at most {held_out}, all that are held out")
    eval_env = make_env(args.env_id, eval_tasks, device, seed=0)
    obs_dim, action_space = env.single_observation_space.shape[0], env.single_action_space
    agent = RecurrentActorCritic(obs_dim, action_space, args.hidden_size, args.bilinear).to(device)
    step_fn = torch.compile(ppo_step) if args.compile else ppo_step
    if args.evaluate:
        restore(checkpoint, {"agent": agent})
        report = evaluate(agent, eval_env, args.episodes_per_trial)
        print_report(eval_env, report, eval_tasks, "episode")
        return

    trial_steps = args.episodes_per_trial * env.horizon
    window = args.bptt_window or trial_steps
    require(trial_steps % window == 0, "bptt_window", window, f"a divisor of {trial_steps}, a trial's steps")
    sequences, parts = args.num_envs * (trial_steps // window), args.minibatches
    require(sequences % parts == 0, "minibatches", parts, f"a divisor of {sequences}, a batch's sequences")
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, eps=1e-5)  # as in OpenAI's PPO
    if args.value_by_step and (env.terminates or window < trial_steps):
        fail("--value-by-step needs episodes that never end early, and no --bptt-window")
    by_step = StepReturns(trial_steps).to(device) if args.value_by_step else None
    modules = {"agent": agent, "optimizer": optimizer, "env": env}  # all that has a state
    modules |= {"by_step": by_step} if by_step else {}
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
            anneal = 1 - global_step / total  # D5
            optimizer.param_groups[0]["lr"] = args.lr * anneal

            # Collect: a new task in every environment, and a trial of each.
            tasks = env.sample_tasks(args.num_envs)
            trials = rollout(agent, env, tasks, args.episodes_per_trial, window)
            steps = int(trials["valid"].sum(dtype=torch.int64))  # padding is not experience
            collected = clock(device)
            metrics = update(agent, optimizer, step_fn, trials, window, iteration == 0, anneal, args, by_step)
            if args.normalize_inputs:  # after the gradient steps, whose ratios begin at 1
                see_inputs(agent, trials["x"], trials["valid"], 1 / (iteration + 1))
            learned = clock(device)

            metrics["charts/return"] = float((trials["reward"] * trials["valid"]).sum(0).mean())
            iteration, global_step = iteration + 1, global_step + steps
            metrics |= {"charts/iteration": iteration, "charts/SPS": steps / (learned - start)}
            metrics |= {"time/rollout": collected - start, "time/update": learned - collected}
            check_finite(run, global_step, metrics)
            if iteration % args.eval_every == 0 or global_step >= total:
                report = evaluate(agent, eval_env, args.episodes_per_trial)
                metrics |= {**report, "time/evaluate": clock(device) - learned}
                bar.set_postfix(held_out=f"{report['eval/return_trial']:.2f}")
            log(run, global_step, metrics)
            if iteration % args.save_every == 0 or global_step >= total:
                save_checkpoint(run, args, modules, iteration, global_step)
            bar.update(steps)

    if run["wandb"] is not None:
        run["wandb"].finish()
    report = report or evaluate(agent, eval_env, args.episodes_per_trial)
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
