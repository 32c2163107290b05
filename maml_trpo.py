r"""MAML: learn a starting point from which a few policy-gradient steps solve a new task.
(Finn et al. 2017, arXiv:1703.03400)

THE IDEA
    Ordinary training over many tasks finds the one policy that is best on average, and that can be a bad
    place to learn from. MAML asks something else of the weights theta: that the policy be good AFTER a step
    of policy gradient on a handful of episodes of the task at hand. The objective is the return of
    theta' = theta - alpha grad L(theta), and its gradient runs through that step: the second derivatives of
    L say how theta' moves when theta does.

    The learner is plain policy gradient, in training as at test time. Only its starting point is learned,
    so it can go on learning with more steps, or on tasks unlike those of training.

ALGORITHM
    repeat
        draw N tasks from p(T); for each, all in one batched tensor program:                     [Alg 3 l.3]
            play E episodes with theta                                                           [Alg 3 l.5]
            theta' = theta - alpha grad L(theta),  L = -mean_t log pi(a_t | s_t) A_t           [Alg 3 l.6-7]
            play E episodes with theta'                                                          [Alg 3 l.8]
        L'(theta) = -mean over tasks of mean_t rho_t A'_t,  rho = pi_theta' / pi_played        [TRPO Eq 14]
        g = grad L'(theta), through theta';  F = Hessian of the adapted policies' mean KL      [TRPO App C]
        solve F x = g by conjugate gradient; scale -x until the quadratic model of the KL is delta
        shorten the step by .8 until L' falls and KL <= delta                         [Alg 3 l.10, Sec 5.3]
    on a new task: play, step, play again.
    TRPO: Schulman et al. 2015, arXiv:1502.05477. GAE: Schulman et al. 2016, arXiv:1506.02438.

DIFFERS FROM THE PAPER
    D1  As in the authors' code, the inner loss has the policy gradient as its first derivative, but in its
        second derivative it is as if theta did not change which states and actions are met (Rothfuss et al.
        2019, arXiv:1810.06784). --inner-objective dice keeps that term; it is noisier.
    D2  Two hidden layers of 64 tanh units instead of 100 ReLUs: smaller, and smooth. Mean actions begin at
        almost 0 (orthogonal weights, the last layer's by .01). An inner step, and its sampling noise, move
        them by about alpha / std: with a larger alpha the deviation std stayed larger. HalfCheetah, which
        pays for precise ones, has small alpha and first std: see RUN.
    D3  Actions are in units of the environment's bounds, as in the authors' code; the paper does not say.
    D4  As in the authors' code the baseline is fitted to the very returns that it is subtracted from: theta'
        differs in every task, so an older fit would not do. GAE's lambda is .98 instead of 1.
    D5  Fisher products are exact; the paper takes finite differences of gradients. fisher_fraction < 1 takes
        them over some of the outer episodes (TRPO's appendix C). Leaving out tasks instead diverges: F does
        not see where the other tasks' gradients lead.
    D6  In 2D navigation alpha is .5 as in the authors' script (the paper: .1). At evaluation it is a quarter
        of that in gradient steps beyond those trained with (the paper: half, as in HalfCheetahDir's command):
        as the deviation of actions shrinks in training, gradients grow, and some tasks overshoot. The last
        policy is evaluated, not the best one. HalfCheetahDir's command has 10 tasks a meta-batch, alpha .06
        and delta .03, the authors' released run 40, .1 and .02.

TRAPS (each has a test that goes red when the trap is put in)
    T1  Log-probabilities or KL averaged over action dimensions: steps shrink as bodies grow.
    T2  Tasks that share their action noise (workers forked with one random state): correlated gradients.
    T3  The baseline's clock running over the whole batch instead of each episode.
    T4  Episodes that end early: what follows in their row is padding, and in a mean of means they weigh more.
    T5  The inner gradient detached (create_graph forgotten): first-order MAML under the name of MAML.
    T6  A task adapted on another task's episodes (repeat instead of repeat_interleave).
    T7  "Before" and "after" on different tasks, or on training tasks.
    T8  The KL bounded before adaptation instead of after it, or a step accepted that breaks the bound.
    T9  Conjugate gradient updated in place, residual and direction being one tensor at the start.

RUN
    python maml_trpo.py                                                 # 2D navigation: 1.6 to 5 minutes
    python maml_trpo.py --gae-lambda 0.95 --total-timesteps 7400000     # 104 meta-iterations; the paper's 100
    python maml_trpo.py --inner-steps 0                                 # its "pretrained" baseline
    python maml_trpo.py --inner-steps 0 --oracle                        # its "told" reference line
    python maml_trpo.py --env-id HalfCheetahDir-v0 --num-tasks 10 --inner-lr 0.06 --init-std 0.3 \
        --max-kl 0.03 --gamma 1 --gae-lambda 0.9 --fisher-fraction 0.25 --total-timesteps 20000000 \
        --eval-tasks 40 --eval-episodes 20 --eval-lr-factor 0.5
    python maml_trpo.py --evaluate runs/NAME --inner-steps 10           # ten gradient steps on new tasks
    python maml_trpo.py --evaluate runs/NAME --inner-lr 0.03 --eval-lr-factor 1  # best for the pretrained one

RESULT (held-out tasks after 0, 1, 2, 3 gradient steps; +- a 95 % interval, over seeds where there are three,
        else over tasks; minutes of one busy core)
    2D navigation      4.5 M steps, 63 meta-iterations, 2 min, 3 seeds: -38.4, -11.4 +- 1.8, -5.8 +- 1.0,
                       -3.4 +- 1.4; 104 meta-iterations with lambda .95, 3 min: -11.0, -4.7, -2.3 +- .6;
                       pretrained with its best step size -38.2, -19.4, -10.0, -7.0; told the goal -.50;
                       MAML's released runs, 100 meta-iterations: -40.4, -11.7, -3.33, -3.23
    HalfCheetahDir     20 M steps, 17 min, 3 seeds: -25, 576 +- 55, 613 +- 61, 635 +- 68; told (gamma
                       .99) 889; pretrained -1, 8, 37, 68. Its two tasks are trained on
    HalfCheetahVel     20 M steps, 33 min, 1 seed, flags in benchmark/reproduce.py: -183, -102 +- 16, -77,
                       -68; told -32; pretrained, with steps of .003 -155, -126, -108, -92. Off-policy
                       learners do better there: pearl_sac.py, mtl_contextual.py
    AntDir             4 M steps, 42 min, 1 seed, flags there: 6, 73 +- 5, 81, 83
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
    env_id: str = "PointGoal-v0"  # task distribution: one of common.ids(), or your_module:YourId-v0
    seed: int = 1  # of all that is random in training; evaluation has frozen seeds of its own
    total_timesteps: int = 4_500_000  # environment steps of training, adapting too; iterations are whole
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

    num_tasks: int = 20  # N, tasks of a meta-batch
    episodes_per_task: int = 20  # E, episodes of a task that one gradient step is made of, inner or outer
    inner_steps: int = 1  # K, gradient steps to adapt; 0: plain TRPO, "pretrained"; evaluated after 3 anyway
    inner_lr: float = 0.5  # alpha, size of these steps; small where actions have to be precise [D2]
    inner_objective: str = "logprob"  # logprob (the authors'), or dice: the full second derivative [D1]
    first_order: bool = False  # first-order MAML: drop all second derivatives
    oracle: bool = False  # tell the policy its task; with inner_steps 0 this is the "told" reference line
    hidden_size: int = 64  # width of the policy's two hidden layers
    init_std: float = 1.0  # standard deviation of the first actions, whose bounds are -1 and 1 [D2]
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.98  # GAE: 1 uses whole sampled returns, less leans on the baseline [D4]
    max_kl: float = 0.01  # delta, how far one meta-step may move the adapted policies
    cg_steps: int = 10  # conjugate gradient iterations, one Fisher product each
    cg_damping: float = 1e-5  # added to the diagonal of F
    fisher_fraction: float = 1.0  # share of the outer episodes in the Fisher products [D5]
    tasks_at_once: int = 2  # tasks whose derivatives are taken together; 0: all, for a GPU
    eval_episodes: int = 40  # episodes of a gradient step at evaluation (the paper's number)
    eval_lr_factor: float = 0.25  # at evaluation, factor on the steps beyond those trained with [D6]
    eval_tasks: int = 0  # held-out tasks, of an ensemble's grid the first (the lightest); 0: at most 100


# ============================== 2. Networks ==============================


class Policy(nn.Module):
    """Two hidden layers whose weights are an argument: every task can have weights of its own. [D2]"""

    def __init__(self, obs_dim, action_space, hidden_size, init_std):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n) if self.discrete else action_space.shape[0]
        sizes = (obs_dim, hidden_size, hidden_size, self.action_dim)
        theta = []
        for fan_in, fan_out, gain in zip(sizes, sizes[1:], (1.0, 1.0, 0.01), strict=False):
            theta += [nn.init.orthogonal_(torch.empty(fan_in, fan_out), gain), torch.zeros(1, fan_out)]
        if not self.discrete:
            theta.append(torch.full((1, self.action_dim), math.log(init_std)))
            for name, bound in (("low", action_space.low), ("high", action_space.high)):
                self.register_buffer(name, torch.tensor(bound), persistent=False)
        self.theta = nn.ParameterList(theta)

    def forward(self, obs, phi):
        """obs: [N, ..., obs], states in each of N tasks; phi: a list of weights like theta, each [N, ...].

        Returns what defines the action distributions: (logits [N, ..., act],), or (mean [N, ..., act],
        log_std [N, 1, ..., 1, act]).
        """
        x = torch.baddbmm(phi[1], obs.flatten(1, -2), phi[0]).tanh()  # N matrix products in one call
        x = torch.baddbmm(phi[3], x, phi[2]).tanh()
        x = torch.baddbmm(phi[5], x, phi[4]).view(*obs.shape[:-1], -1)
        return (x,) if self.discrete else (x, phi[6].view(len(obs), *[1] * (obs.dim() - 2), -1))

    def distribution(self, output):
        """forward's output -> the distributions of actions, one for each state."""
        if self.discrete:
            return Categorical(logits=output[0], validate_args=False)
        mean, log_std = output
        normal = Normal(mean, log_std.exp(), validate_args=False)
        return Independent(normal, 1, validate_args=False)  # T1: log-probs and KL SUM over action dimensions

    def per_task(self, num_tasks):
        """theta for each task: views [N, ...] of one theta, whose gradients add up there."""
        return [p.expand(num_tasks, *p.shape) for p in self.theta]

    def to_env(self, action):
        """Actions are cut to [-1, 1] and stretched to the environment's box. Discrete: as it is."""
        return action if self.discrete else self.low + (action.clamp(-1, 1) + 1) / 2 * (self.high - self.low)


# ================================ 3. Data ================================


def act(policy, obs, phi):
    """obs [N, E, obs], phi [N, ...] -> actions [N, E] or [N, E, act], and their log-probability [N, E]."""
    policies = policy.distribution(policy(obs, phi))
    action = policies.sample()  # T2: one call, and noise of its own for every task and episode
    return action, policies.log_prob(action)


@torch.no_grad()
def rollout(policy, act_fn, env, tasks, phi, oracle, seed=None):
    """Play E = num_envs / N episodes of each task with its own weights phi[n]. [Alg 3 l.5, l.8]

    tasks: [N, task_dim]; oracle: append the task to obs; seed: of starts and noise.
    Returns a dict of [T, N, E, ...] tensors, T at least the steps of the longest episode: obs, action,
    logprob, reward, success, valid (1 inside the episode, 0 after).
    """
    num_tasks = len(tasks)
    task_of_env = tasks.repeat_interleave(env.num_envs // num_tasks, 0)  # T6: [N * E, task_dim], task by task
    env.set_tasks(task_of_env)
    obs, _ = env.reset(seed=seed)
    told = task_of_env if oracle else task_of_env[:, :0]
    valid = torch.ones(env.num_envs, device=obs.device)
    no_success = torch.zeros_like(valid)
    steps = []
    for step in range(env.horizon):
        if env.terminates and step % 10 == 0:  # seldom, as looking means waiting for a GPU
            if not bool(valid.any()):
                break  # every episode is over
            env.rest(valid == 0)  # what follows an episode is no data: MuJoCo need not simulate it
        x = torch.cat([obs, told], 1).unflatten(0, (num_tasks, -1))  # [N, E, obs]
        action, logprob = act_fn(policy, x, phi)
        obs, reward, terminated, truncated, info = env.step(policy.to_env(action.flatten(0, 1)))  # D3
        played = {"reward": reward, "valid": valid, "success": info.get("success", no_success)}
        played = {name: value.unflatten(0, (num_tasks, -1)) for name, value in played.items()}
        steps.append({"obs": x, "action": action, "logprob": logprob, **played})
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


def add_advantage(episodes, gamma, gae_lambda):
    """rollout's dict of [T, N, E, ...] -> a batch, what gradient steps learn from: a dict of [N, T, E, ...].

    Adds value, ret (discounted returns) and, 0 where valid is 0, advantage, standardised over each task's
    steps (population deviation), and weight, which sums to 1 over each task's steps. An episode's end, be it
    the horizon, is the end of what is paid: nothing is bootstrapped after it.
    """
    reward, valid = episodes["reward"], episodes["valid"]
    ret = gae(reward, torch.zeros_like(reward), valid, gamma, 1.0)  # without a critic: the discounted return
    value = linear_baseline(episodes["obs"], ret, valid)
    advantage = gae(reward, value, valid, gamma, gae_lambda)
    # T4: one mean over all steps of a task, not a mean of the means of its episodes
    weight = valid / valid.sum((0, 2), keepdim=True)
    mean = (advantage * weight).sum((0, 2), keepdim=True)
    std = ((advantage - mean) ** 2 * weight).sum((0, 2), keepdim=True).sqrt()
    advantage = (advantage - mean) / (std + 1e-8) * valid  # equal returns: rounding, at size 1
    batch = {**episodes, "value": value, "ret": ret, "advantage": advantage, "weight": weight}
    return {name: x.transpose(0, 1).contiguous() for name, x in batch.items()}


def returns_of(batch):
    """Undiscounted return of each episode: a dict of [N, T, E] -> [N, E]."""
    return (batch["reward"] * batch["valid"]).sum(1)


# =============================== 4. Update ===============================


def inner_loss(logprob, old_logprob, advantage, weight, objective):
    """The loss of a gradient step on each task. All [N, T, E], weight as in add_advantage. Returns [N].

    At the policy that played, logprob = old_logprob, the first derivative is -sum_t w_t A_t grad log pi_t in
    both cases, the policy gradient. They differ in the second, which the meta-gradient is made of. [D1]
        logprob  -sum_t w_t A_t grad^2 log pi_t, as if theta did not change which states and actions are met.
        dice     adds -sum_t w_t A_t (S_t S_t^T - S_t-1 S_t-1^T), S_t = sum_{u <= t} grad log pi_u: theta also
                 changes how likely the whole past of step t is. Unbiased where the advantages are. (Foerster
                 et al. 2018, arXiv:1802.05098; for advantages: Farquhar et al. 2019, arXiv:1909.10549.) As
                 likelihood ratios of what was played, so that the line search sees the same function.
    """
    if objective == "dice":
        logratio = (logprob - old_logprob) * (weight > 0)
        past = logratio.cumsum(1)  # of the actions up to t
        logprob = past.exp() - (past - logratio).exp()
    return -(weight * advantage * logprob).sum((1, 2))


def inner_step(policy, phi, batch, step_size, args, create_graph=False):
    """One step of gradient descent on each task's loss. phi: list of [N, ...] -> phi' likewise. [Alg 3 l.7]

    create_graph: let theta' be differentiated for theta.
    """
    logprob = policy.distribution(policy(batch["obs"], phi)).log_prob(batch["action"])  # [N, T, E]
    fixed = (batch[name] for name in ("logprob", "advantage", "weight"))
    loss = inner_loss(logprob, *fixed, args.inner_objective).sum()  # tasks share no weights in phi: no mixing
    differentiable = create_graph and not args.first_order  # T5
    grads = torch.autograd.grad(loss, phi, create_graph=differentiable)
    return [p - step_size * grad for p, grad in zip(phi, grads, strict=True)]


def adapted_output(policy, inner, outer, args, create_graph=True):
    """The adapted policies' output in the outer states, as a function of theta. [Alg 3 l.7, l.10]

    inner: the batches of the gradient steps; outer: the batch after them. Returns Policy.forward's output.
    """
    phi = policy.per_task(len(outer["weight"]))
    for batch in inner:
        phi = inner_step(policy, phi, batch, args.inner_lr, args, create_graph)
    return policy(outer["obs"], phi)


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


def split_tasks(batches, size):
    """Batches of N tasks -> [(the same batches of `size` tasks, their share of N), ...]; size 0: all in one.

    Derivatives of a mean over tasks are means over such parts. On a CPU small parts are faster: what they
    compute with stays in the cache, and the system need not hand out large pieces of memory again and again.
    """
    num_tasks = len(batches[-1]["weight"])
    groups = [slice(start, start + (size or num_tasks)) for start in range(0, num_tasks, size or num_tasks)]
    parts = [[{name: x[group] for name, x in batch.items()} for batch in batches] for group in groups]
    return [(part, len(part[-1]["weight"]) / num_tasks) for part in parts]


def line_search(policy, parts, old_outputs, old_loss, step, args):
    """Move theta by step, shortened by .8 until the loss falls and the KL is at most delta, or not at all.

    parts: as split_tasks makes them of K inner batches and the outer one; old_outputs: one for each part;
    old_loss: a scalar; step: [theta], flat, in the order of policy.parameters(). Returns the loss, the KL and
    the fraction of the step that was taken (0: none). [T8]
    """
    theta = flatten(policy.parameters()).detach()
    for fraction in [0.8**k for k in range(15)]:  # numbers of the authors' code
        vector_to_parameters(theta + fraction * step, policy.parameters())
        loss = kl = 0.0
        for ((*inner, outer), share), old_output in zip(parts, old_outputs, strict=True):
            output = adapted_output(policy, inner, outer, args, create_graph=False)
            loss = loss + share * surrogate_loss(policy, output, outer).detach()
            kl = kl + share * mean_kl(policy, output, old_output, outer).detach()
        if loss < old_loss and kl <= args.max_kl:  # false for nan, too
            return loss, kl, fraction
    vector_to_parameters(theta, policy.parameters())
    return old_loss, torch.zeros_like(old_loss), 0.0


def update(policy, inner, outer, args):
    """A step of TRPO on theta, in place. [Alg 3 l.10]

    inner: the batches of the K gradient steps; outer: the batch played after them. Returns metrics.
    """
    parts = split_tasks([*inner, outer], args.tasks_at_once)
    outputs = [adapted_output(policy, part[:-1], part[-1], args) for part, _ in parts]
    old_outputs = [[x.detach() for x in output] for output in outputs]
    both = list(zip(outputs, parts, strict=True))
    loss = sum(share * surrogate_loss(policy, output, part[-1]) for output, (part, share) in both)
    gradient = flatten(torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True))
    products = []
    for output, ((*some_inner, some), share) in both:
        if args.fisher_fraction < 1:  # D5
            count = math.ceil(round(args.fisher_fraction * some["weight"].shape[2], 9))
            some = {name: x[:, :, :count] for name, x in some.items()}
            some["weight"] = some["weight"] / some["weight"].sum((1, 2), keepdim=True)
            output = adapted_output(policy, some_inner, some, args)
        products.append((fisher_product(policy, output, some), share))

    def damped_fisher(vector):
        return sum(share * product(vector) for product, share in products) + args.cg_damping * vector

    direction = conjugate_gradient(damped_fisher, gradient, args.cg_steps)
    # The KL along it is about x^T F x / 2, and x^T F x = x^T g for whatever conjugate gradient returns.
    step = -direction * (2 * args.max_kl / (direction @ gradient).clamp(min=1e-30)).sqrt()
    new_loss, kl, fraction = line_search(policy, parts, old_outputs, loss.detach(), step, args)
    metrics = {"losses/policy": new_loss, "debug/kl": kl, "debug/step": fraction}
    metrics |= {"debug/grad_norm": gradient.norm(), "debug/explained_variance": explained_variance(outer)}
    entropies = [policy.distribution(output).entropy() for output in old_outputs]  # [n, T, E] each
    metrics["debug/entropy"] = (torch.cat(entropies) * outer["weight"]).sum((1, 2)).mean()
    for when, batch in (("before", [*inner, outer][0]), ("after", outer)):
        metrics[f"charts/return_{when}"] = returns_of(batch).mean()
    return {name: float(x) for name, x in metrics.items()}


def explained_variance(batch):
    """How much of the variance of returns within a task the baseline explains, which was fitted to them."""
    mean = (batch["ret"] * batch["weight"]).sum((1, 2), keepdim=True)
    error, variance = ((batch["weight"] * (batch["ret"] - x) ** 2).sum() for x in (batch["value"], mean))
    return 1 - error / variance.clamp(min=1e-8)


# ================================ 5. Adapt ===============================


def adapt(policy, act_fn, env, tasks, step_sizes, args, seed=None):
    """Learn tasks by gradient steps: play, step, play, ..., play; in training and on a new task.

    tasks: [N, task_dim], of env.num_envs / N episodes each. Returns a list of batches, as add_advantage makes
    them, played after 0, 1, ..., len(step_sizes) gradient steps.
    """
    phi, batches = policy.per_task(len(tasks)), []
    for stage, step_size in enumerate([*step_sizes, None]):
        stage_seed = None if seed is None else seed + stage
        episodes = rollout(policy, act_fn, env, tasks, phi, args.oracle, stage_seed)
        batches.append(add_advantage(episodes, args.gamma, args.gae_lambda))
        if step_size is not None:
            phi = inner_step(policy, phi, batches[-1], step_size, args)
            phi = [p.detach().requires_grad_() for p in phi]
            if not (flatten(phi).abs() < 1e30).all():  # nan is not, either
                bad = f"weights are not finite after gradient step {stage + 1}, of size {step_size:g}"
                fail(f"{bad}: --inner-lr too large, --init-std too small or large, or a reward not finite")
    return batches


# ============================== 6. Evaluate ==============================

EVAL_SEED = 20_161_109  # of starts, noise and actions in every evaluation of every run


def eval_step_sizes(args, trained_steps):
    """max(3, inner_steps) of them: as many as were trained with, or one, are inner_lr, others less. [D6]"""
    whole, total = max(1, trained_steps), max(3, args.inner_steps)
    return [args.inner_lr * (1.0 if step < whole else args.eval_lr_factor) for step in range(total)]


def evaluate(policy, env, num_tasks, act_fn, args, trained_steps):
    """The same frozen held-out tasks before and after every gradient step of eval_step_sizes. [T7]

    trained_steps: K of the training, whatever args.inner_steps asks for now.
    """
    step_sizes = eval_step_sizes(args, trained_steps)
    with torch.random.fork_rng(devices=[env.device] if env.device.type == "cuda" else []):
        torch.manual_seed(EVAL_SEED)
        tasks = env.sample_tasks(num_tasks, split="test")  # a list of their own, the same at every call
        batches = adapt(policy, act_fn, env, tasks, step_sizes, args, seed=EVAL_SEED)
    returns = torch.stack([returns_of(batch).mean(1) for batch in batches], 1)  # [N, steps + 1]
    lengths = torch.stack([batch["valid"].sum((1, 2)) for batch in batches], 1)  # of all E episodes together
    success = torch.stack([(batch["success"] * batch["valid"]).amax(1).mean(1) for batch in batches], 1)
    return summarize(returns, lengths, success if env.has_success else None)


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


def check_maml(args):
    """Check the flags of this script, except for what depends on the environment."""
    positive = "num_tasks episodes_per_task inner_lr hidden_size init_std max_kl cg_steps"
    positive += " eval_episodes eval_lr_factor"
    for name in positive.split():
        require(0 < getattr(args, name) < math.inf, name, getattr(args, name), "a positive number")
    for name in "inner_steps cg_damping tasks_at_once eval_tasks".split():
        require(0 <= getattr(args, name) < math.inf, name, getattr(args, name), "zero or a positive number")
    for name in ("gamma", "gae_lambda"):
        require(0 <= getattr(args, name) <= 1, name, getattr(args, name), "a number from 0 to 1")
    require(0 < args.fisher_fraction <= 1, "fisher_fraction", args.fisher_fraction, "more than 0, at most 1")
    kinds = "logprob dice"
    require(args.inner_objective in kinds.split(), "inner_objective", args.inner_objective, f"one of {kinds}")


def main(argv=None):
    args, checkpoint = parse_args(Args, argv)
    device = check_experiment(args)
    check_maml(args)
    torch.manual_seed(args.seed)

    num_envs = 1 if args.evaluate else args.num_tasks * args.episodes_per_task
    env = make_env(args.env_id, num_envs, device, args.seed)
    held_out = env.num_test_tasks
    eval_tasks = args.eval_tasks or min(100, held_out)
    require(eval_tasks <= held_out, "eval_tasks", eval_tasks, f"at most {held_out}, all that are held out")
    eval_env = make_env(args.env_id, eval_tasks * args.eval_episodes, device, seed=0)
    obs_dim, action_space = env.single_observation_space.shape[0], env.single_action_space
    obs_dim += args.oracle * env.task_space.shape[0]
    policy = Policy(obs_dim, action_space, args.hidden_size, args.init_std).to(device)
    act_fn = torch.compile(act) if args.compile else act
    if args.evaluate:
        restore(checkpoint, {"policy": policy})
        report = evaluate(policy, eval_env, eval_tasks, act_fn, args, checkpoint["args"]["inner_steps"])
        print_report(eval_env, report, eval_tasks, "gradient steps")
        return

    modules = {"policy": policy, "env": env}  # all that has a state
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

            # Collect: a meta-batch of tasks, played before and after every gradient step.
            tasks = env.sample_tasks(args.num_tasks)
            *inner, outer = adapt(policy, act_fn, env, tasks, [args.inner_lr] * args.inner_steps, args)
            steps = int(sum(batch["valid"].sum(dtype=torch.int64) for batch in (*inner, outer)))
            collected = clock(device)
            metrics = update(policy, inner, outer, args)
            learned = clock(device)

            iteration, global_step = iteration + 1, global_step + steps
            metrics |= {"charts/iteration": iteration, "charts/SPS": steps / (learned - start)}
            metrics |= {"time/rollout": collected - start, "time/update": learned - collected}
            check_finite(run, global_step, metrics)
            if iteration % args.eval_every == 0 or global_step >= total:
                report = evaluate(policy, eval_env, eval_tasks, act_fn, args, args.inner_steps)
                metrics |= {**report, "time/evaluate": clock(device) - learned}
                before, after = (report[f"eval/return_ep{stage}"] for stage in (0, max(1, args.inner_steps)))
                bar.set_postfix(held_out=f"{before:.2f} -> {after:.2f}")
            log(run, global_step, metrics)
            if iteration % args.save_every == 0 or global_step >= total:
                save_checkpoint(run, args, modules, iteration, global_step)
            bar.update(steps)

    if run["wandb"] is not None:
        run["wandb"].finish()
    report = report or evaluate(policy, eval_env, eval_tasks, act_fn, args, args.inner_steps)
    print_report(eval_env, report, eval_tasks, "gradient steps")
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
