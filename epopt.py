r"""EPOpt: train on an ensemble of simulators, on those that go worst, and narrow the ensemble by real data.
(Rajeswaran et al. 2017, arXiv:1610.01283)

THE IDEA
    A policy will act in a target system whose physics we know only roughly: a mass between 3 and 9 kg, some
    friction. A policy trained in one simulator leans on its numbers and falls over with others. Training on
    random draws of the numbers helps, but maximises the mean over models, and a mean can be bought by giving
    up the few models that are hard to please.

    So look at the tail. Draw many models, play one trajectory of each, throw away all but the worst tenth by
    return, and improve the policy on those. It learns to be good where it is bad, until no part of the
    ensemble is much worse than the rest. It is told nothing about the model that it is in.

    And let the ensemble learn. A few trajectories of the target say which models could have made them: after
    Bayes' rule the ensemble is narrower, training goes on there, and robustness is no longer paid for where
    the target cannot be.

ALGORITHM
    repeat
        draw N models p_k from the source distribution; play a trajectory tau_k of each          [Alg 1 l.3-5]
        baseline and advantages A_t from all N                                                            [D4]
        T = the ceil(epsilon N) trajectories of lowest return, in the warm-up all                [Alg 1 l.7-8]
        a step of TRPO on T: ascend the mean of (pi / pi_played) A_t, KL at most delta; A_t standardised and
            both means taken over the steps of T                                     [Alg 1 l.9, TRPO Eq 14]
        at some times, with --adapt-to-target:                                                       [Sec 3.2]
            play trajectories of the target, recording the simulator's state s
            log w_i = sum log N(s' | simulate(p_i, s, a), noise) over some of the steps, for each particle p_i
            draw the particles anew with probability ~ w_i, in several steps: the new source          [D5]
    Objective: E[R | R is below its epsilon quantile], the conditional value at risk.            [Sec 3.1]
    On a new system the policy only acts; learning from it is what --adapt-to-target is for.
    TRPO: Schulman et al. 2015, arXiv:1502.05477. GAE: Schulman et al. 2016, arXiv:1506.02438.

DIFFERS FROM THE PAPER
    D1  As in the paper, this is not the gradient of the objective. With y the quantile that is E[(R - y)
        sum_t grad log pi_t | R <= y] (Tamar et al. 2015, arXiv:1404.3862); EPOpt takes E[sum_t A_t grad log
        pi_t | R <= y]. Over all trajectories baselines and centring change nothing, since grad log p(tau) has
        mean 0; over the worst its mean is grad log P(R <= y), so they do. Advantages there are negative on
        average; centring them, which the paper leaves open, adds a pull towards more such trajectories.
        Uncentred, most of the step is their mean times a noisy estimate of grad log P(R <= y): the one run
        that was tried in that way fell to nothing.
    D2  Trajectories are ranked by the sum of their rewards, as in the authors' code and as evaluation counts
        them; the paper writes the discounted sum.
    D3  Fisher products see a random share of the steps (fisher_fraction; TRPO's appendix C).
    D4  The linear baseline is fitted to this iteration's trajectories, the authors' to the last one's: the
        returns that it explains are in its fit, so explained_variance is a little flattered, and
        advantages are a little too small.
    D5  A likelihood of hundreds of exact steps leaves one particle alone. So it is let in bit by bit: raised
        to the largest power that leaves an effective sample size of min_ess, then the particles are drawn
        anew and simulated again, until the powers add up to 1 (or 20 times: see adapt/beta). And new
        particles are copies moved a little, by which mean and covariance stay, but for the limits (Liu and
        West 2001). The noise is a share of how much each entry of the state changes in a step.
    D6  Rounds of adaptation are spread evenly over one training, which goes on from the policy that it has.
    D7  The default job is no body of MuJoCo, and smaller: 200 models, epsilon 1 for 30 iterations.
        Paper: 240, and 100. Hopper's command in RUN: 240, and 120.
    D8  The bound on the KL falls linearly to zero, as a step from a few trajectories is noisy. Two seeds that
        had ended low with a constant bound ended higher with a falling one; no others were compared.

TRAPS (each has a test that goes red when the trap is put in)
    T1  Log-probabilities or KL averaged over action dimensions: steps shrink as bodies grow.
    T2  The baseline fitted to the worst trajectories only: it takes their bad returns for normal, state by
        state, which centring does not repair.
    T3  The baseline's clock running over the whole batch instead of each episode.
    T4  Episodes that end early: what follows in their row is padding and no data.
    T5  The count of the worst: ceil(epsilon N), and .07 of 100 is 7.000000000000001 in floating point. Or
        ties broken at random: of equal returns the first are taken.
    T6  Advantages standardised for each trajectory, as in the authors' code: what made one worse than another
        is taken away.
    T7  The next episode's first state taken for the last one's successor: no model explains that jump.
    T8  Likelihoods instead of their logarithms: a few hundred steps, and all are 0.
    T9  Conjugate gradient updated in place, residual and direction being one tensor at the start.
    T10 A mass changed without its moments of inertia.
    T11 Trajectories ranked by what was paid after their end, by means, or by normalised rewards.
    T12 Particles that leave the range that models may have, or all fall onto one.

RUN
    python epopt.py                                                     # a cart that runs: a minute or two
    python epopt.py --epsilon 1                                         # plain domain randomisation
    python epopt.py --epsilon 1 --ensemble single                       # TRPO in one simulator
    python epopt.py --adapt-to-target                                   # and learn from the target
    python epopt.py --env-id HopperEnsemble-v0 --num-models 240 --warmup-iterations 120 --max-kl 0.03 \
        --gamma 0.995 --gae-lambda 0.97 --total-timesteps 40000000 --eval-every 10 --eval-episodes 1

RESULT (held-out grid inside the training range; +- a 95 % interval over seeds; one core)
    CartPoleRun     8 M steps, 1.3 min, 10 seeds: mean 856 +- 21, 10th percentile 785 +- 20, mean of the worst
                    tenth 680 +- 81; --epsilon 1: 853 +- 33, 246 +- 145, 173 +- 121; one model: 697 +- 61, 29,
                    22. --adapt-to-target: 10th percentile in the target 825 +- 37, without 754 +- 23
    HopperEnsemble  40 M steps, 77 min of a busy core, 1 seed: mean 2797, 10th percentile 2650, mean of the
                    worst tenth 2072; --epsilon 1: 2782, 2618, 2018; one model, cut off at 10 M: 1294, 499,
                    295. Most was learned before epsilon falls to .1, so the first two are close
    HalfCheetahEnsemble  14 M steps, 9 min, 1 seed: 853, 490, 380; --epsilon 1: 1419, 928, 833. Here epsilon
                    fell to .1 after 5 M steps, with most still to be learned
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
from torch.distributions import Categorical, Independent, Normal, kl_divergence
from torch.nn.utils import vector_to_parameters
from tqdm import tqdm

import common  # task distributions; what one of your own has to offer is said in common/base.py

# ================================ 1. Args ================================


@dataclass
class Args:
    env_id: str = "CartPoleRunEnsemble-v0"  # task distribution: one of common.ids(), or your_module:YourId-v0
    seed: int = 1  # of all that is random in training; evaluation has frozen seeds of its own
    total_timesteps: int = 8_000_000  # environment steps of training, adapting too; iterations are whole
    device: str = "auto"  # auto (a GPU if there is one), cpu or cuda
    compile: bool = False  # torch.compile acting or gradient steps, see main: may pay on a GPU
    track: bool = False  # log to Weights & Biases too; WANDB_MODE=offline works
    wandb_project: str = "onefile-meta-rl"  # W&B project
    wandb_entity: str = ""  # W&B user or team; empty: your default one
    run_dir: str = "runs"  # parent folder of this run's own folder
    eval_every: int = 10  # iterations between evaluations on the held-out tasks
    save_every: int = 10  # iterations between checkpoints
    resume: str = ""  # run folder (or checkpoint) to continue, on a CPU bit for bit; flags are remembered
    evaluate: str = ""  # run folder (or checkpoint) to evaluate, then exit; flags of evaluation may differ

    ensemble: str = "normal"  # models to train on: normal or uniform draws, or single: nothing but the mean
    source_mean: tuple[float, ...] = ()  # of each entry of a task row (not uniform); empty: the environment's
    source_std: tuple[float, ...] = ()  # deviation of each entry; empty: the environment's own
    source_low: tuple[float, ...] = ()  # no model is drawn from below these; empty: the environment's own
    source_high: tuple[float, ...] = ()  # no model is drawn from above these; empty: the environment's own
    num_models: int = 200  # N, models of an iteration, each with one trajectory [D7]
    epsilon: float = 0.1  # share of the trajectories to learn from, the worst; 1: plain domain randomisation
    warmup_iterations: int = 30  # at first epsilon is 1, for so many iterations [D7]
    adapt_to_target: bool = False  # fit the source distribution to trajectories of the target
    target: tuple[float, ...] = ()  # task row of the target; empty: the environment's named_tasks["target"]
    adapt_rounds: int = 3  # how often that is done, spread evenly over training [D6]
    target_episodes: int = 2  # trajectories of the target that a round sees
    transitions: int = 100  # steps of these that particles are judged by
    particles: int = 1000  # models that stand for the source distribution from the first round on
    model_noise: float = 0.2  # deviation of the likelihood, in units of how much each entry changes [D5]
    min_ess: float = 0.3  # least effective sample size in a step of a round, as a share of the particles [D5]
    hidden_size: int = 64  # width of the policy's two hidden layers
    init_std: float = 1.0  # standard deviation of the first actions, whose bounds are -1 and 1
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 1.0  # GAE: 1 uses whole sampled returns, less leans on the baseline
    max_kl: float = 0.05  # delta, how far one iteration may move the policy; falls linearly to zero [D8]
    cg_steps: int = 10  # conjugate gradient iterations, one Fisher product each
    cg_damping: float = 1e-5  # added to the diagonal of F
    fisher_fraction: float = 0.1  # share of the steps in the Fisher products, but 1,000 of them at least [D3]
    deterministic_eval: bool = True  # at evaluation act by the policy's mean
    eval_episodes: int = 10  # episodes of each held-out model
    eval_tasks: int = 0  # held-out models, of a grid the first so many (the lightest); 0: all, at most 10,000


# ============================== 2. Networks ==============================


class TanhPolicy(nn.Module):
    """Two hidden layers of tanh units; the deviation of actions is the same in all states."""

    def __init__(self, obs_dim, action_space, hidden_size, init_std):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n) if self.discrete else action_space.shape[0]
        sizes = (obs_dim, hidden_size, hidden_size, self.action_dim)
        layers = []
        for fan_in, fan_out, gain in zip(sizes, sizes[1:], (1.0, 1.0, 0.01), strict=False):
            layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
            nn.init.orthogonal_(layers[-2].weight, gain)
            nn.init.zeros_(layers[-2].bias)
        self.net = nn.Sequential(*layers[:-1])
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((self.action_dim,), math.log(init_std)))
            for name, bound in (("low", action_space.low), ("high", action_space.high)):
                self.register_buffer(name, torch.tensor(bound), persistent=False)

    def forward(self, obs):
        """obs: [..., obs]. Returns what defines the action distributions: (logits [..., act],), or (mean
        [..., act], log_std [act]).
        """
        x = self.net(obs)
        return (x,) if self.discrete else (x, self.log_std)

    def distribution(self, output):
        """forward's output -> the distributions of actions, one for each state."""
        if self.discrete:
            return Categorical(logits=output[0], validate_args=False)
        mean, log_std = output
        normal = Normal(mean, log_std.exp(), validate_args=False)
        return Independent(normal, 1, validate_args=False)  # T1: log-probs and KL SUM over action dimensions

    def to_env(self, action):
        """Actions are cut to [-1, 1] and stretched to the environment's box. Discrete: as it is."""
        return action if self.discrete else self.low + (action.clamp(-1, 1) + 1) / 2 * (self.high - self.low)


class Source(nn.Module):
    """The distribution that models are drawn from: the environment's, and once adapted a set of particles."""

    def __init__(self, env, count):
        super().__init__()
        self.register_buffer("particles", env.sample_tasks(count))  # [P, task_dim]
        self.register_buffer("rounds", torch.zeros((), dtype=torch.int64, device=env.device))  # so far

    def sample(self, env, count):
        """-> models [count, task_dim]."""
        if not self.rounds:
            return env.sample_tasks(count)
        return self.particles[torch.randint(len(self.particles), (count,), device=self.particles.device)]


# ================================ 3. Data ================================


def draw_action(policy, obs, deterministic):
    """obs [N, obs] -> actions [N] or [N, act], and their log-probability [N]."""
    policies = policy.distribution(policy(obs))
    action = policies.mode if deterministic else policies.sample()
    return action, policies.log_prob(action)


@torch.no_grad()
def rollout(policy, act_fn, env, models, seed=None, deterministic=False, record=False):
    """Play one trajectory of each model. [Alg 1 l.5]

    models: [N, task_dim], N = env.num_envs; seed: of starts and noise; record: the simulator's states, too.
    Returns a dict of [T, N, ...] tensors, T at least the steps of the longest episode: obs, action, logprob,
    reward, success, valid (1 inside the episode, 0 after); if recorded state and next_state.
    """
    env.set_tasks(models)  # T10: where a mass comes with its moments of inertia
    obs, info = env.reset(seed=seed, options={"state": True} if record else None)
    state = info.get("state")
    valid = torch.ones(env.num_envs, device=obs.device)
    no_success = torch.zeros_like(valid)
    steps = []
    for step in range(env.horizon):
        if env.terminates and step % 10 == 0:  # seldom, as looking means waiting for a GPU
            if not bool(valid.any()):
                break  # every episode is over
            env.rest(valid == 0)  # what follows an episode is no data: MuJoCo need not simulate it
        action, logprob = act_fn(policy, obs, deterministic)
        played = {"obs": obs, "action": action, "logprob": logprob, "valid": valid}
        obs, reward, terminated, truncated, info = env.step(policy.to_env(action))
        steps.append({**played, "reward": reward, "success": info.get("success", no_success)})
        if record:  # T7: info's state is the one that this step led to; after an end, state is of no use
            steps[-1] |= {"state": state, "next_state": info["state"]}
            state = info["state"]
        valid = valid * ~(terminated | truncated)  # T4: the environment begins anew, but that is no data
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}


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


def linear_baseline(obs, ret, valid, ridge=1e-5):
    """Predict returns from a state and its time within the episode: for each task one ridge regression.

    obs: [T, N, E, obs]; ret, valid: [T, N, E]. Returns value [T, N, E], in padding a meaningless one.
    Features as in Duan et al. 2016, arXiv:1604.06778: obs cut to 10, its squares, three powers of time in
    hundreds of steps, and 1. One batched solve, in float64; the ridge is for fewer steps than features. [D4]
    """
    time = torch.arange(len(obs), device=obs.device).view(-1, 1, 1, 1) / 100
    time = time.expand(*valid.shape, 1)  # T3: since the episode began, in every episode the same
    x = obs.clamp(-10, 10)
    features = torch.cat([x, x**2, time, time**2, time**3, torch.ones_like(time)], -1).double()
    features = features.transpose(0, 1).flatten(1, 2)  # [N, T * E, features]
    target, weight = (y.transpose(0, 1).flatten(1, 2)[..., None].double() for y in (ret, valid))
    gram = (features * weight).mT @ features
    gram = gram + ridge * torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    coefficients = torch.linalg.solve(gram, (features * weight).mT @ target)  # [N, features, 1]
    value = (features @ coefficients).to(ret.dtype)
    return value.view(valid.shape[1], valid.shape[0], -1).transpose(0, 1)


def add_values(episodes, gamma, gae_lambda):
    """rollout's dict of [T, N, ...] with value, ret (discounted returns) and, 0 in the padding, advantage.

    One baseline for all models, fitted to all trajectories, also to those that nothing is learned from. [T2]
    An episode's end, be it the horizon, is the end of what is paid: nothing is bootstrapped after it.
    """
    reward, valid = episodes["reward"], episodes["valid"]
    ret = gae(reward, torch.zeros_like(reward), valid, gamma, 1.0)  # without a critic: the discounted return
    one_task = (x[:, None] for x in (episodes["obs"], ret, valid))  # [T, 1, N, ...]
    value = linear_baseline(*one_task)[:, 0]  # D4
    advantage = gae(reward, value, valid, gamma, gae_lambda)
    return {**episodes, "value": value, "ret": ret, "advantage": advantage}


def trajectory_returns(episodes):
    """Undiscounted return of each trajectory: a dict of [T, N] -> [N]. [D2, T11]"""
    return (episodes["reward"] * episodes["valid"]).sum(0)


def worst(returns, epsilon):
    """Indices of the ceil(epsilon N) lowest of N returns, lowest first; of equal ones those that come first.

    returns: [N]; epsilon: more than 0, at most 1. [Alg 1 l.7]
    """
    count = math.ceil(round(epsilon * len(returns), 9))  # T5
    return returns.sort(stable=True).indices[:count]


def select(episodes, chosen):
    """The steps inside the chosen trajectories. [Alg 1 l.8]

    episodes: a dict of [T, N, ...]; chosen: indices of trajectories. Returns a dict of [M, ...], M steps in
    all, whose advantage is standardised over them together (population deviation) [T6], with weight, the
    same for all of them.
    """
    episodes = {name: x[:, chosen] for name, x in episodes.items()}
    inside = episodes["valid"] > 0  # T4
    batch = {name: x[inside] for name, x in episodes.items()}
    std, mean = torch.std_mean(batch["advantage"], correction=0)
    batch["advantage"] = (batch["advantage"] - mean) / (std + 1e-8)  # equal returns: rounding, at size 1
    return {**batch, "weight": torch.ones_like(batch["advantage"])}


# =============================== 4. Update ===============================

FISHER_STEPS = 1000  # at least so many of a batch, if it has them: fewer leave out directions of theta [D3]


def surrogate_loss(policy, output, batch):
    """-mean (pi / pi_played) A_t over steps by their weight; at pi_played its gradient is minus the policy's.

    output: of the policy in the batch's states; batch: action, logprob, advantage, weight. [TRPO Eq 14]
    """
    logprob = policy.distribution(output).log_prob(batch["action"])
    ratio = (logprob - batch["logprob"]).exp()
    return -(batch["weight"] * ratio * batch["advantage"]).sum() / batch["weight"].sum()


def mean_kl(policy, output, old_output, batch):
    """Mean of KL(pi_old || pi) over the batch's steps by their weight."""
    kl = kl_divergence(policy.distribution(old_output), policy.distribution(output))
    return (batch["weight"] * kl).sum() / batch["weight"].sum()


def flatten(tensors):
    """A list of tensors -> one vector."""
    return torch.cat([x.reshape(-1) for x in tensors])


def fisher_product(policy, output, batch):
    """Returns v -> F v, F the Hessian of mean_kl in theta, at the theta that made output. v: [theta], flat.

    output: what forward returns, still attached to theta.

    With J = d output / d theta and H the Hessian of the KL in the output, the Hessian is J^T H J plus a term
    in the KL's first derivative, which is zero here: nothing is left out. J runs through whatever made output
    from theta, and all graphs are built once and used by every product. [TRPO App C]
    """
    theta = list(policy.parameters())
    at_old = [x.detach().clone().requires_grad_() for x in output]
    kl = mean_kl(policy, at_old, [x.detach() for x in output], batch)
    kl_gradient = torch.autograd.grad(kl, at_old, create_graph=True)  # zero here; its derivative is H
    dummy = [torch.zeros_like(x, requires_grad=True) for x in output]
    pullback = torch.autograd.grad(output, theta, dummy, create_graph=True)  # J^T dummy, linear in dummy

    def product(vector):
        parts = vector.split([p.numel() for p in theta])
        parts = [part.view_as(p) for part, p in zip(parts, theta, strict=True)]
        change = torch.autograd.grad(pullback, dummy, parts, retain_graph=True)  # J v
        change = torch.autograd.grad(kl_gradient, at_old, change, retain_graph=True)  # H J v
        return flatten(torch.autograd.grad(output, theta, change, retain_graph=True))  # J^T H J v

    return product


def conjugate_gradient(product, b, steps, tolerance=1e-10):
    """Solve A x = b for a positive definite A given as x -> A x. b: [n]. Returns x after at most steps.

    tolerance: of the squared residual, as a share of b's.
    """
    x, residual = torch.zeros_like(b), b
    direction, square = residual, residual @ residual
    for _ in range(steps):
        if square <= tolerance * (b @ b):
            break
        image = product(direction)
        step = square / (direction @ image)
        x = x + step * direction  # T9: new tensors each time, since these begin as one and the same
        residual = residual - step * image
        last, square = square, residual @ residual
        direction = residual + square / last * direction
    return x


def policy_line_search(policy, batch, old_output, old_loss, step, args):
    """Move theta by step, shortened by .8 until the loss falls and the KL is at most delta, or not at all.

    batch: as in select; old_output: of the policy that played; old_loss: a scalar; step: [theta], flat.
    Returns the loss, the KL and the fraction of the step that was taken (0: none).
    """
    theta = flatten(policy.parameters()).detach()
    for fraction in [0.8**k for k in range(15)]:  # numbers of the authors' code
        vector_to_parameters(theta + fraction * step, policy.parameters())
        with torch.no_grad():
            output = policy(batch["obs"])
            loss = surrogate_loss(policy, output, batch)
            kl = mean_kl(policy, output, old_output, batch)
        if loss < old_loss and kl <= args.max_kl:  # false for nan, too
            return loss, kl, fraction
    vector_to_parameters(theta, policy.parameters())
    return old_loss, torch.zeros_like(old_loss), 0.0


def update(policy, batch, args):
    """A step of TRPO, in place. [Alg 1 l.9] batch: the chosen trajectories, as in select. Returns metrics."""
    output = policy(batch["obs"])
    old_output = [x.detach() for x in output]
    loss = surrogate_loss(policy, output, batch)
    gradient = flatten(torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True))  # D1
    total, seen = len(batch["weight"]), batch
    count = max(math.ceil(round(args.fisher_fraction * total, 9)), FISHER_STEPS)
    if count < total:  # D3: at random, since steps stand in the order of time and trajectory
        some = torch.randperm(total, device=gradient.device)[:count]
        seen = {name: x[some] for name, x in batch.items()}
        output = policy(seen["obs"])
    product = fisher_product(policy, output, seen)

    def damped_fisher(vector):
        return product(vector) + args.cg_damping * vector

    direction = conjugate_gradient(damped_fisher, gradient, args.cg_steps)
    # The KL along it is about x^T F x / 2, and x^T F x = x^T g for whatever conjugate gradient returns.
    step = -direction * (2 * args.max_kl / (direction @ gradient).clamp(min=1e-30)).sqrt()
    new_loss, kl, fraction = policy_line_search(policy, batch, old_output, loss.detach(), step, args)
    metrics = {"losses/policy": new_loss, "debug/kl": kl, "debug/step": fraction}
    metrics |= {"debug/grad_norm": gradient.norm()}
    metrics["debug/entropy"] = policy.distribution(old_output).entropy().mean()
    return {name: float(x) for name, x in metrics.items()}


def played_metrics(episodes, returns, chosen):
    """Mean return of all trajectories and of the chosen ones, and how well the baseline explains them all."""
    inside = episodes["valid"] > 0
    ret, value = episodes["ret"][inside], episodes["value"][inside]
    explained = 1 - ((ret - value) ** 2).mean() / ret.var(correction=0).clamp(min=1e-8)
    metrics = {"charts/return": returns.mean(), "charts/return_worst": returns[chosen].mean()}
    metrics["debug/explained_variance"] = explained
    return {name: float(x) for name, x in metrics.items()}


# ================================ 5. Adapt ===============================

TEMPERING_STEPS = 20  # at most so many in a round [D5]


def log_likelihood(env, particles, played, noise):
    """How well each model explains recorded steps: sum of log p(s' | s, a, model) + a constant. [Sec 3.2]

    s' ~ N(simulate(model, s, a), (noise * spread)^2), spread: how much an entry of the state changes in a
    step, root mean square.
    particles: [P, task_dim]; played: a dict of state, next_state [M, state] and action [M, act], as the
    environment got it. Returns [P] in float64; not finite where a simulation failed. No prior is added, as
    the particles are draws from it.
    """
    state, action, after = (played[name] for name in ("state", "action", "next_state"))
    rows = particles.repeat_interleave(len(state), 0)
    repeated = (torch.cat([x] * len(particles)) for x in (state, action))
    predicted = env.simulate(rows, *repeated)
    if predicted.shape != (len(rows), *state.shape[1:]):
        wanted = [len(rows), *state.shape[1:]]
        raise common.ContractError(f"simulate returns {list(predicted.shape)}, expected {wanted}")
    rounding = 1e-6 * after.abs().amax(0).clamp(min=1)  # where nothing changes: what float32 can tell apart
    spread = (after - state).square().mean(0).sqrt().maximum(rounding)
    error = (predicted.unflatten(0, (len(particles), -1)) - after) / (noise * spread)  # [P, M, state]
    return -(error.double() ** 2).sum((1, 2)) / 2


def effective_sample_size(weights):
    """Of weights that sum to 1, [P]: P where all are the same, 1 where one has everything."""
    return 1 / (weights**2).sum()


def tempered_weights(log_weights, min_ess):
    """exp(beta log_weights), normalised, with the largest beta up to 1 by which a share stays effective. [D5]

    log_weights: [P]; where one is not finite its particle gets nothing. min_ess: the share, of the others.
    Returns weights [P], beta.
    """
    known = log_weights.isfinite()
    if not known.any():  # no model explains anything: believe what was believed
        return torch.full_like(log_weights, 1 / len(log_weights)), 0.0

    def weigh(beta):  # T8: softmax subtracts the largest first
        return (beta * log_weights).masked_fill(~known, -math.inf).softmax(0)

    floor = min_ess * int(known.sum()) * (1 - 1e-9)  # of equal weights the size rounds to less than all
    if effective_sample_size(weigh(1.0)) >= floor:
        return weigh(1.0), 1.0
    low, high = 0.0, 1.0
    for _ in range(100):  # halving: betas of 1e-9 occur
        middle = (low + high) / 2
        low, high = (middle, high) if effective_sample_size(weigh(middle)) >= floor else (low, middle)
    return weigh(low), low


def resample(particles, weights, low, high, keep=0.98):
    """Draw particles by their weights and move each a little; mean and covariance stay as weighted. [D5]

    particles: [P, task_dim]; weights: [P], summing to 1; low, high: [task_dim], limits of a model [T12]. A
    copy is keep of itself and (1 - keep) of the mean, plus noise of (1 - keep^2) of the covariance.
    """
    x, weights = particles.double(), weights.double()
    mean = weights @ x
    covariance = (weights[:, None] * (x - mean)).T @ (x - mean)
    values, vectors = torch.linalg.eigh(covariance)  # singular where an entry does not vary
    root = vectors * values.clamp(min=0).sqrt()
    # one random number and equal strides: a weight of k / P gives k copies
    places = (torch.arange(len(x), device=x.device) + torch.rand((), device=x.device, dtype=x.dtype)) / len(x)
    chosen = torch.searchsorted(weights.cumsum(0), places).clamp(max=len(x) - 1)
    x = mean + keep * (x[chosen] - mean) + (1 - keep**2) ** 0.5 * torch.randn_like(x) @ root.T
    x = low + (x - low).abs()  # what would leave is thrown back
    x = high - (high - x).abs()
    return torch.maximum(torch.minimum(x, high), low).to(particles.dtype)


def adapt(policy, act_fn, env, source, target, args):
    """A round: play the target, and fit the source distribution to what it did, in place. [Sec 3.2]

    env: an environment of target_episodes rows; target: the true model [task_dim], which only env is told.
    Returns metrics, and how many steps were played in the target.
    """
    episodes = rollout(policy, act_fn, env, target.expand(env.num_envs, -1), record=True)
    inside = episodes["valid"] > 0
    played = {name: episodes[name][inside] for name in ("state", "action", "next_state")}
    total = len(played["state"])
    some = torch.randperm(total, device=inside.device)[: args.transitions]
    played = {name: x[some] for name, x in played.items()}  # [M, ...]
    played["action"] = policy.to_env(played["action"])
    low, high = env.ensemble[2:]
    left, smallest = 1.0, 1.0  # exponent of the likelihood that is still to come; effective sample size
    for _ in range(TEMPERING_STEPS):
        fits = log_likelihood(env, source.particles, played, args.model_noise)
        log_weights = left * fits
        weights, share = tempered_weights(log_weights, args.min_ess)
        smallest = min(smallest, float(effective_sample_size(weights) / len(weights)))
        source.particles.copy_(resample(source.particles, weights, low, high))
        left *= 1 - share
        if share in (0.0, 1.0):  # no model explains anything, or all is said
            break
    source.rounds += 1
    misfit = (-2 * fits.nan_to_num(-1e30, neginf=-1e30).max() / played["next_state"].numel()).sqrt()
    metrics = {"adapt/ess": smallest, "adapt/beta": 1 - left, "adapt/misfit": float(misfit)}
    for name, entry in zip(env.parameter_names, source.particles.T, strict=True):
        metrics |= {f"adapt/mean {name}": float(entry.mean()), f"adapt/std {name}": float(entry.std())}
    return metrics, total


# ============================== 6. Evaluate ==============================

EVAL_SEED = 20_161_005  # of starts, noise and actions in every evaluation of every run
TARGET_ROWS = 20  # the target stands in the evaluation as so many models


def evaluate(policy, env, models, groups, act_fn, args):
    """Play eval_episodes of each held-out model, env.num_envs in all. Nothing is told, nothing changes.

    models: [G, task_dim]; groups: name -> slice of them; the first is what has no suffix in the metrics.
    eval/return_std, _p10, _cvar10 (mean of the worst tenth) are over all episodes of a group's models, and
    eval/return_at_V, _p10_at_V, _p90_at_V are over the models whose first entry is V: those inside, or where
    there is none, beyond.
    """
    with torch.random.fork_rng(devices=[env.device] if env.device.type == "cuda" else []):
        torch.manual_seed(EVAL_SEED)
        rows = models.repeat_interleave(args.eval_episodes, 0)
        episodes = rollout(policy, act_fn, env, rows, EVAL_SEED, args.deterministic_eval)
    returns = trajectory_returns(episodes).unflatten(0, (len(models), -1))  # [G, episodes]
    lengths = episodes["valid"].sum(0).unflatten(0, (len(models), -1))
    success = (episodes["success"] * episodes["valid"]).amax(0).unflatten(0, (len(models), -1))
    first, *others = groups
    *of_models, solved = (x[groups[first]].mean(1, keepdim=True) for x in (returns, lengths, success))
    metrics = summarize(*of_models, solved if env.has_success else None)
    for group in groups:
        x, suffix = returns[groups[group]].flatten(), f"_{group}" if group in others else ""
        numbers = {"": x.mean(), "_std": x.std(correction=0)}
        numbers |= {"_p10": x.quantile(0.1), "_cvar10": x[worst(x, 0.1)].mean()}
        metrics |= {f"eval/return{name}{suffix}": float(value) for name, value in numbers.items()}
    if env.ensemble is not None:
        parts = [groups.get(name, slice(0, 0)) for name in ("inside", "beyond")]
        inside, beyond = (models[part, 0].tolist() for part in parts)
        for value in sorted({*inside, *beyond}):
            group = "inside" if value in inside else "beyond"
            x = returns[groups[group]][models[groups[group], 0] == value].flatten()
            for name, number in (("", x.mean()), ("_p10", x.quantile(0.1)), ("_p90", x.quantile(0.9))):
                metrics[f"eval/return{name}_at_{value:.6g}"] = float(number)
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


def check_epopt(args):
    """Check the flags of this script, except for what depends on the environment."""
    positive = "num_models adapt_rounds target_episodes transitions particles model_noise hidden_size"
    positive += " init_std max_kl cg_steps eval_episodes"
    for name in positive.split():
        require(0 < getattr(args, name) < math.inf, name, getattr(args, name), "a positive number")
    for name in "warmup_iterations cg_damping eval_tasks".split():
        require(0 <= getattr(args, name) < math.inf, name, getattr(args, name), "zero or a positive number")
    for name in ("gamma", "gae_lambda"):
        require(0 <= getattr(args, name) <= 1, name, getattr(args, name), "a number from 0 to 1")
    for name in ("epsilon", "fisher_fraction", "min_ess"):
        require(0 < getattr(args, name) <= 1, name, getattr(args, name), "more than 0, at most 1")
    kinds = "normal uniform single"
    require(args.ensemble in kinds.split(), "ensemble", args.ensemble, f"one of {kinds}")
    enough = args.num_models * args.epsilon >= 1 - 1e-9
    require(enough, "num_models", args.num_models, f"at least 1 / epsilon, with --epsilon {args.epsilon}")
    several = args.ensemble != "single" or not args.adapt_to_target
    wanted = "normal or uniform: --adapt-to-target chooses among several models"
    require(several, "ensemble", args.ensemble, wanted)
    useful = args.ensemble == "normal" or not args.source_std
    require(useful, "source_std", args.source_std, "nothing: it belongs to --ensemble normal")
    useful = args.ensemble != "uniform" or not args.source_mean
    require(useful, "source_mean", args.source_mean, "nothing: --ensemble uniform draws without it")
    enough = args.particles * args.min_ess >= 5 or not args.adapt_to_target
    wanted = "at least 5 / min_ess, so that no round ends with one model"
    require(enough, "particles", args.particles, wanted)


def set_ensemble(env, args):
    """Let env draw its models from what the flags say. [Alg 1 l.4]"""
    rows, names = env.ensemble, ("mean", "std", "low", "high")
    given = {name: getattr(args, f"source_{name}") for name in names}
    if rows is None:
        if args.ensemble != "normal" or args.adapt_to_target or args.target or any(given.values()):
            unable = "has no ensemble, so no --ensemble, --source-..., --target or --adapt-to-target"
            fail(f"--env-id {args.env_id}: {unable}")
        return
    able = env.can_simulate or not args.adapt_to_target
    require(able, "env_id", args.env_id, "an ensemble with simulate, for --adapt-to-target")
    for row, (name, values) in zip(rows, given.items(), strict=True):
        if values:
            one_each = f"a number for each of {', '.join(env.parameter_names)}"
            require(len(values) == len(row), f"source_{name}", values, one_each)
            row[:] = torch.tensor(values, dtype=row.dtype)
    mean, std, low, high = rows
    if args.ensemble == "uniform":
        mean[:] = (low + high) / 2  # it has to lie between them
    kinds = {"normal": std, "uniform": torch.where(low < high, math.inf, 0.0), "single": 0 * mean}
    std[:] = kinds[args.ensemble]
    several = bool(((std > 0) & (low < high)).any()) or not args.adapt_to_target
    require(
        several, "source_std", args.source_std, "a positive number where low < high, for --adapt-to-target"
    )
    try:
        env.ensemble = rows
    except ValueError as error:
        flags = ", ".join(f"--source-{name}" for name, values in given.items() if values)
        fail(f"{flags or f'--env-id {args.env_id}'}: {error}")


def held_out_models(env, args):
    """-> models [G, task_dim] to evaluate on, and name -> slice of them: the held-out set's parts, and at the
    end the target.
    """
    held_out = env.num_test_tasks
    eval_tasks = args.eval_tasks or min(10_000, held_out)
    require(eval_tasks <= held_out, "eval_tasks", eval_tasks, f"at most {held_out}, all that are held out")
    models = env.sample_tasks(eval_tasks, split="test")
    parts = env.test_groups or {"all": slice(0, eval_tasks)}
    parts = {name: rows for name, rows in parts.items() if rows.start < eval_tasks}
    groups = {name: slice(rows.start, min(rows.stop, eval_tasks)) for name, rows in parts.items()}
    target = torch.tensor(args.target, device=env.device) if args.target else env.named_tasks.get("target")
    known = target is not None or not args.adapt_to_target
    require(known, "target", args.target, "a task row, as there is no other")
    if target is not None and env.ensemble is not None:
        one_each = f"a positive number for each of {', '.join(env.parameter_names)}"
        fits = target.shape == env.task_space.shape and bool((target > 0).all() and target.isfinite().all())
        require(fits, "target", args.target, one_each)
        low, high = env.ensemble[2:].float()  # as the target is
        found = bool(((low <= target) & (target <= high)).all()) or not args.adapt_to_target or args.evaluate
        within = f"{[round(x, 6) for x in low.tolist()]} to {[round(x, 6) for x in high.tolist()]}"
        require(found, "target", args.target, f"{within}, where --adapt-to-target looks for it")
        try:
            env.check(target.expand(4, -1).double())
        except ValueError as error:
            fail(f"--target {tuple(args.target)}: {error}")
        models = torch.cat([models, target.expand(TARGET_ROWS, -1)])
        groups["target"] = slice(eval_tasks, len(models))
    return models, groups


def print_grid(metrics, groups):
    """What print_report leaves out: the spread over episodes, for each group of models."""
    columns = ("", "_std", "_p10", "_cvar10")
    print("\n" + "".join(f"{name:>14}" for name in ("models", "return", "std", "p10", "cvar10")))
    for group in groups:
        suffix = "" if group == next(iter(groups)) else f"_{group}"
        keys = [f"eval/return{column}{suffix}" for column in columns]
        print(f"{group:>14}" + "".join(f"{metrics[key]:14.3f}" for key in keys))


def print_source(env, source, target):
    """The adapted source distribution, beside the model that it was to find. target: [task_dim]."""
    print("\n" + "".join(f"{name:>18}" for name in ("adapted to", "mean", "std", "target")))
    for name, entry, true in zip(env.parameter_names, source.particles.T, target.tolist(), strict=True):
        print(f"{name:>18}{float(entry.mean()):18.3f}{float(entry.std()):18.3f}{true:18.3f}")


def main(argv=None):
    args, checkpoint = parse_args(Args, argv)
    device = check_experiment(args)
    check_epopt(args)
    torch.manual_seed(args.seed)

    env = make_env(args.env_id, 1 if args.evaluate else args.num_models, device, args.seed)
    set_ensemble(env, args)
    models, groups = held_out_models(env, args)  # the last of them is the target, if there is one
    target_env = make_env(args.env_id, args.target_episodes, device, args.seed)
    set_ensemble(target_env, args)  # it is from this one that a round takes the limits of a model
    eval_env = make_env(args.env_id, len(models) * args.eval_episodes, device, seed=0)
    obs_dim, action_space = env.single_observation_space.shape[0], env.single_action_space
    policy = TanhPolicy(obs_dim, action_space, args.hidden_size, args.init_std).to(device)
    source = Source(target_env, args.particles)  # not from env: what it draws must not depend on particles
    act_fn = torch.compile(draw_action) if args.compile else draw_action
    if args.evaluate:
        restore(checkpoint, {"policy": policy})
        report = evaluate(policy, eval_env, models, groups, act_fn, args)
        print_report(eval_env, report, next(iter(groups.values())).stop, "episode")
        print_grid(report, groups)
        return

    modules = {"policy": policy, "env": env, "source": source, "target_env": target_env}  # all with a state
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
            now = replace(args, max_kl=args.max_kl * (1 - global_step / total))  # D8

            # Collect: a trajectory of each of N models, and of these the worst.
            episodes = rollout(policy, act_fn, env, source.sample(env, args.num_models))
            episodes = add_values(episodes, args.gamma, args.gae_lambda)
            returns, steps = trajectory_returns(episodes), int(episodes["valid"].sum(dtype=torch.int64))
            chosen = worst(returns, 1.0 if iteration < args.warmup_iterations else args.epsilon)
            collected = clock(device)
            metrics = update(policy, select(episodes, chosen), now)
            rounds = int(source.rounds)
            due = (global_step + steps) / total >= (rounds + 1) / (args.adapt_rounds + 1)
            if args.adapt_to_target and rounds < args.adapt_rounds and due:  # D6
                adapted, played = adapt(policy, act_fn, target_env, source, models[-1], args)
                metrics, steps = metrics | adapted, steps + played
            learned = clock(device)

            metrics |= played_metrics(episodes, returns, chosen)
            iteration, global_step = iteration + 1, global_step + steps
            metrics |= {"charts/iteration": iteration, "charts/SPS": steps / (learned - start)}
            metrics |= {"time/rollout": collected - start, "time/update": learned - collected}
            check_finite(run, global_step, metrics)
            if iteration % args.eval_every == 0 or global_step >= total:
                report = evaluate(policy, eval_env, models, groups, act_fn, args)
                metrics |= {**report, "time/evaluate": clock(device) - learned}
                mean, tail = report["eval/return_ep0"], report["eval/return_p10"]
                bar.set_postfix(held_out=f"{mean:.2f}", p10=f"{tail:.2f}")
            log(run, global_step, metrics)
            if iteration % args.save_every == 0 or global_step >= total:
                save_checkpoint(run, args, modules, iteration, global_step)
            bar.update(steps)

    if run["wandb"] is not None:
        run["wandb"].finish()
    report = report or evaluate(policy, eval_env, models, groups, act_fn, args)
    print_report(eval_env, report, next(iter(groups.values())).stop, "episode")
    print_grid(report, groups)
    if source.rounds:
        print_source(env, source, models[-1])
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
