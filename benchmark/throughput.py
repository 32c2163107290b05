"""How fast the scripts are, where the time goes, and how far that is from the raw limit, measured in one run.

    python -m benchmark.throughput [envs] [physics] [rl2] [maml] [pearl] [mtl] [darc] [epopt] [metaworld]
                                   [--device cpu|cuda] [--threads N] [--write]

--write puts the figures into results/throughput.csv, from which benchmark.report fills the README's tables of
speed; do that with nothing else running. Every figure is a median over repetitions after a burn-in; ratios
inside a run are good to a few %. Other people's code is measured beside ours by benchmark.peers. What stands
here of theirs was measured by us on another two cores: a ratio to them says an order of magnitude.
"""

import argparse
import csv
import dataclasses
import os
import platform
import statistics
import time

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the scripts have it, before PyTorch is loaded

import gymnasium as gym
import torch

import common
import darc_offdynamics
import epopt
import maml_trpo
import mtl_contextual
import pearl_sac
import rl2_ppo
from benchmark.baselines import ids_of
from benchmark.reproduce import RESULTS, git_commit

MUJOCO = ("common.locomotion", "common.reacher", "common.mujoco_ensembles")
VARIBAD_GRIDNAVI_SPS = 763  # env steps/s of varibad's RL^2 on GridNavi, end to end, two cores without a GPU
OYSTER_STEPS = {(8, 64): 23, (16, 256): 4.2}  # gradient steps/s of oyster, meta-batch x batch, two threads
OYSTER_SPS = 4600  # its env steps/s in collecting
MAML_RL_SECONDS = {"PointGoal-v0": 4.46, "HalfCheetahDir-v0": 32.5}  # a meta-iteration of pytorch-maml-rl


FIGURES = {}  # name -> value, what --write writes


def note(subject, **figures):
    """Keep figures under the names subject_figure."""
    FIGURES.update({f"{subject}_{name}": value for name, value in figures.items()})


def microseconds(step, device):
    """Microseconds of one call of step, which is short."""

    def hundred_steps():
        for _ in range(100):
            step()

    return median_seconds(hundred_steps, torch.device(device), 9) * 1e4


def bare_steps(count, device):
    """The dynamics with nothing around them: no episodes, no final_obs, no checks. {env_id: function}"""
    draw = {"device": device}
    arms, chance = torch.randint(5, (count, 1), **draw), torch.rand(count, 5, **draw)
    point, goal, push = (torch.rand(count, 2, **draw) - 0.5 for _ in range(3))
    cumulative = torch.rand(count * 50, 10, **draw).cumsum(1)
    mean_reward, first = torch.randn(count * 50, **draw), 50 * torch.arange(count, **draw)

    def bandit():
        return torch.rand(count, **draw) < chance.gather(1, arms)[:, 0]

    def tabular_mdp():
        pair = first + arms[:, 0]
        reward = mean_reward.index_select(0, pair) + torch.randn(count, **draw)
        return (cumulative.index_select(0, pair) < torch.rand(count, 1, **draw)).sum(1), reward

    def point_goal():
        moved = point + push.clamp(-0.1, 0.1)
        dx, dy = (moved - goal).abs().unbind(1)
        return moved, -torch.hypot(dx, dy), (dx < 0.01) & (dy < 0.01)

    return {"Bandit5-v0": bandit, "TabularMDP-v0": tabular_mdp, "PointGoal-v0": point_goal}


def plain_id(env_id):
    """PointGoal-v0 -> PointGoal, for a figure's name."""
    return env_id.split("-")[0]


def median_seconds(function, device, repeats, burn_in=2):
    """Median seconds of one call, all device work included."""
    for _ in range(burn_in):
        function()
    times = []
    for _ in range(repeats):
        start = rl2_ppo.clock(device)
        function()
        times.append(rl2_ppo.clock(device) - start)
    return statistics.median(times)


def env_steps(device, counts=(64, 1024, 16384)):
    """Microseconds a vector step for every task distribution, with random actions drawn beforehand."""
    print(f"\nmicroseconds a vector step on {device}")
    print(
        f"{'environments':>22}"
        + "".join(f"{count:>10}" for count in counts)
        + "   at 1,024 against the bare dynamics"
    )
    bare = bare_steps(1024, device)
    slow = ids_of(*MUJOCO, "common.shifts", "common.metaworld")
    for env_id in sorted(set(common.ids()) - set(slow)):
        cells = []
        for count in counts:
            env = common.make(env_id, count, device=device, seed=1)
            env.set_tasks(env.sample_tasks(count))
            env.reset(seed=1)
            action = torch.as_tensor(env.action_space.sample(), device=device)
            cells.append(microseconds(lambda env=env, action=action: env.step(action), device))
        ratio = ""
        if env_id in bare:
            raw = microseconds(bare[env_id], device)
            ratio = f"   {cells[counts.index(1024)] / raw:.1f} times {raw:.0f}"
            note(f"env_{plain_id(env_id)}", ratio=cells[counts.index(1024)] / raw)
        note(f"env_{plain_id(env_id)}", microseconds=cells[counts.index(1024)])
        print(f"{env_id:>22}" + "".join(f"{cell:10.0f}" for cell in cells) + ratio)


def physics(device, repeats=7):
    """Env steps/s of the locomotion tasks, and the share that the bare physics has of that time.

    The two take turns in the same environment, since the physics costs more or less as the bodies move.
    """
    print(f"\n{'worlds':>30}   env steps/s   the bare physics' share of the time")
    for env_id in ids_of(*MUJOCO):
        counts = (240,) if "Ensemble" in env_id else (8192, 800) if "HalfCheetah" in env_id else (800,)
        for count in counts:
            env = common.make(env_id, count, device=device, seed=1)
            env.reset(seed=1)
            high = float(env.single_action_space.high[0])
            size, seconds = (count, *env.single_action_space.shape), {"step": [], "bare": []}
            for _ in range(repeats + 2):
                action = high * (2 * torch.rand(size, device=device) - 1)
                arrays = action.cpu().double().numpy()
                for what, call in (
                    ("step", lambda env=env, action=action: env.step(action)),
                    ("bare", lambda env=env, arrays=arrays: env.unwrapped.step_physics(arrays)),
                ):
                    start = rl2_ppo.clock(torch.device(device))
                    call()
                    seconds[what].append(rl2_ppo.clock(torch.device(device)) - start)
            step, bare = (statistics.median(seconds[what][2:]) for what in ("step", "bare"))
            print(f"{env_id:>22}{count:8d}{count / step:14,.0f}{bare / step:10.0%}")
            note(f"physics_{plain_id(env_id)}_{count}", sps=count / step, share=bare / step)


def epopt_step(device, env_id="HalfCheetahEnsemble-v0", repeats=3, **flags):
    """Seconds of an iteration of epopt.py by stage, on a body that does not fall: all of its steps count."""
    device = torch.device(device)
    args = dataclasses.replace(epopt.Args(), **{"num_models": 240, "warmup_iterations": 0, **flags})
    torch.manual_seed(0)
    env = common.make(env_id, args.num_models, device=device, seed=0)
    sizes = (env.single_observation_space.shape[0], env.single_action_space, args.hidden_size, args.init_std)
    policy, source = epopt.TanhPolicy(*sizes).to(device), epopt.Source(env, args.particles)
    rows = []
    for _ in range(repeats + 1):
        start = epopt.clock(device)
        episodes = epopt.rollout(policy, epopt.draw_action, env, source.sample(env, args.num_models))
        episodes = epopt.add_values(episodes, args.gamma, args.gae_lambda)
        chosen, steps = epopt.worst(epopt.trajectory_returns(episodes), args.epsilon), episodes["valid"].sum()
        collected = epopt.clock(device)
        epopt.update(policy, epopt.select(episodes, chosen), args)
        learned = epopt.clock(device)
        rows.append([collected - start, learned - collected, float(steps) / (learned - start)])
    playing, learning, sps = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    print(f"\nepopt.py on {env_id}, {args.num_models} models, epsilon {args.epsilon:g}, {device}")
    print(f"  seconds: play {playing:.2f}, update {learning:.2f}; {sps:,.0f} env steps/s")
    name = f"epopt_{plain_id(env_id)}" + ("" if args.epsilon < 1 else "_randomised")
    note(name, play=playing, update=learning, sps=sps)


def maml(device, env_id, repeats=5, **flags):
    """Seconds of a meta-iteration of maml_trpo.py by stage, and how much of the update is matrix products."""
    device = torch.device(device)
    args = dataclasses.replace(maml_trpo.Args(), env_id=env_id, **flags)
    torch.manual_seed(0)
    env = common.make(env_id, args.num_tasks * args.episodes_per_task, device=device, seed=0)
    obs_dim, space = env.single_observation_space.shape[0], env.single_action_space
    policy = maml_trpo.Policy(obs_dim, space, args.hidden_size, args.init_std).to(device)
    seconds = {"play and adapt": [], "update": []}
    for _ in range(repeats + 1):
        start = maml_trpo.clock(device)
        step_sizes = [args.inner_lr] * args.inner_steps
        tasks = env.sample_tasks(args.num_tasks)
        *inner, outer = maml_trpo.adapt(policy, maml_trpo.act, env, tasks, step_sizes, args)
        played = maml_trpo.clock(device)
        maml_trpo.update(policy, inner, outer, args)
        seconds["play and adapt"].append(played - start)
        seconds["update"].append(maml_trpo.clock(device) - played)
    seconds = {stage: statistics.median(times[1:]) for stage, times in seconds.items()}
    steps = (args.inner_steps + 1) * env.num_envs * env.horizon
    total = sum(seconds.values())
    print(f"\nmaml_trpo.py on {env_id}: {args.num_tasks} tasks x {args.episodes_per_task} episodes, {device}")
    print("  seconds: " + ", ".join(f"{stage} {value:.2f}" for stage, value in seconds.items()))
    print(f"  {total:.2f} s a meta-iteration, {steps / total:,.0f} env steps/s; {steps} of them")
    name = f"maml_{plain_id(env_id)}" + ("" if args.tasks_at_once else "_all")
    played, learned = seconds.values()
    note(name, play=played, update=learned, seconds=total, sps=steps / total)
    peer = MAML_RL_SECONDS[env_id]
    print(f"  pytorch-maml-rl, measured by us on another two cores: {peer} s, {peer / total:.1f} times that")
    if device.type == "cpu":
        products, whole = seconds_of_products(lambda: maml_trpo.update(policy, inner, outer, args))
        print(f"  matrix products are {products / whole:.0%} of the update")
        note(name, products=products / whole)


def seconds_of_products(function):
    """Seconds that a call spends in matrix products, and in all operations, by PyTorch's profiler."""
    with torch.profiler.profile() as profile:
        function()
    times = {event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
    names = ("baddbmm", "bmm", "mm", "addmm", "matmul")
    return sum(times.get(f"aten::{name}", 0) for name in names), sum(times.values())


def pearl_job(device, count, compiled=False, **flags):
    """Two functions to call, count gradient steps of pearl_sac.py and a round of its play; args and env."""
    args = dataclasses.replace(pearl_sac.Args(), **flags)
    torch.manual_seed(0)
    env = common.make(args.env_id, args.train_tasks, device=device, seed=0)
    env.set_tasks(env.sample_tasks(args.train_tasks))
    obs_dim, space = env.single_observation_space.shape[0], env.single_action_space
    agent = pearl_sac.make_agent(obs_dim, space, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, fused=True)
    rings = (args.train_tasks, 4 * args.episodes_per_task)
    replay = pearl_sac.ReplayBuffer(*rings, env.horizon, obs_dim, space.shape[0], device)
    step_fn = torch.compile(pearl_sac.gradient_step) if compiled else pearl_sac.gradient_step
    number = (args.episodes_per_task, args.prior_episodes)

    def collect():
        for episode in pearl_sac.adapt(agent, pearl_sac.sample_action, env, *number, args)[0]:
            replay.add(episode)

    def learn():
        pearl_sac.update(agent, optimizer, step_fn, replay, count, args)

    return learn, collect, args, env


def pearl(device, repeats=5, count=20, compiled=False, **flags):
    """Gradient steps/s of pearl_sac.py, the share that its matrix products alone would take, collection."""
    device = torch.device(device)
    learn, collect, args, env = pearl_job(device, count, compiled, **flags)
    collecting = median_seconds(collect, device, repeats)
    learning = median_seconds(learn, device, repeats) / count
    sps = args.train_tasks * args.episodes_per_task * env.horizon / collecting
    size = (args.num_tasks, args.batch_size)
    shape = f"{size[0]} tasks x {size[1]}, {args.hidden_layers} x {args.hidden_size}"
    print(f"\npearl_sac.py on {args.env_id}: {shape}, {device}{', compiled' * compiled}")
    if device.type == "cpu":
        products = statistics.median(seconds_of_products(learn)[0] / count for _ in range(repeats))
        share = f"; the matrix products alone would take {products / learning:.0%} of that time"
        note(f"pearl_{size[0]}x{size[1]}", products=products / learning)
    print(f"  {1 / learning:.1f} gradient steps/s{share if device.type == 'cpu' else ''}")
    note(f"pearl_{size[0]}x{size[1]}" + "_compiled" * compiled, updates=1 / learning, collect=sps)
    if size in OYSTER_STEPS:
        print(f"  oyster, measured by us on another two cores: {OYSTER_STEPS[size]} a second")
    print(f"  collecting: {sps:,.0f} env steps/s, {sps / OYSTER_SPS:.0f} times oyster's")


def mtl(device, repeats=5, count=20, compiled=False, **flags):
    """Gradient steps/s of mtl_contextual.py, and the share of that time that hindsight takes."""
    device = torch.device(device)
    changes = {"env_id": "PointRobot-v0", "context": "goal", "her": "future", **flags}
    args = dataclasses.replace(mtl_contextual.Args(), **changes)
    torch.manual_seed(0)
    env = common.make(args.env_id, args.train_tasks, device=device, seed=0)
    tasks = env.sample_tasks(args.train_tasks)
    env.set_tasks(tasks)
    obs_dim, space = env.single_observation_space.shape[0], env.single_action_space
    agent = mtl_contextual.make_contextual_agent(obs_dim, tasks, space, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, fused=True)
    replay = mtl_contextual.ReplayBuffer(args.train_tasks, 12, env.horizon, obs_dim, space.shape[0], device)
    step_fn = torch.compile(mtl_contextual.sac_step) if compiled else mtl_contextual.sac_step
    for _ in range(12):
        mtl_contextual.collect(agent, mtl_contextual.sample_action, env, tasks, replay, args)
    scales, rows = torch.ones(args.train_tasks, device=device), torch.arange(args.num_tasks, device=device)
    where = replay.draw(rows, args.batch_size)
    batch = replay.take(rows, *where)
    batch["context"] = tasks[rows][:, None].expand(-1, args.batch_size, -1)

    def learn():
        mtl_contextual.update(agent, optimizer, step_fn, replay, tasks, scales, env, count, args)

    def pretend():
        for _ in range(count):
            mtl_contextual.hindsight(replay, rows, batch, *where, env, args)

    learning = median_seconds(learn, device, repeats) / count
    share = median_seconds(pretend, device, repeats) / count / learning
    shape = f"{args.num_tasks} tasks x {args.batch_size}, {args.hidden_layers} x {args.hidden_size}"
    print(f"\nmtl_contextual.py on {args.env_id}: {shape}, {device}{', compiled' * compiled}")
    print(f"  {1 / learning:.1f} gradient steps/s, hindsight takes {share:.1%} of that time")
    name = f"mtl_{args.num_tasks}x{args.batch_size}" + "_compiled" * compiled
    note(name, updates=1 / learning, hindsight=share)


def darc_job(device, count, compiled=False, **changes):
    """darc_offdynamics.py at ODRL's sizes. Returns count gradient steps to call, agent, source and args."""
    sizes = {"env_id": "BrokenHalfCheetah-v0", "hidden_size": 256, "batch_size": 256, "replay_episodes": 20}
    args = dataclasses.replace(darc_offdynamics.Args(), **{**sizes, **changes})
    torch.manual_seed(0)
    envs = darc_offdynamics.make_domains(args, args.num_envs, device, (0, 1))
    source = envs["source"]
    obs_dim, space = source.single_observation_space.shape[0], source.single_action_space
    agent = darc_offdynamics.make_domain_agent(obs_dim, space, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, fused=True)
    shape = (args.num_envs, args.replay_episodes, source.horizon, obs_dim, space.shape[0], device)
    replays = {name: darc_offdynamics.ReplayBuffer(*shape) for name in envs}
    step_fn = torch.compile(darc_offdynamics.darc_step) if compiled else darc_offdynamics.darc_step
    for number, (name, env) in enumerate(envs.items()):
        play = (agent, darc_offdynamics.sample_action, env, replays[name], number)
        darc_offdynamics.play_domain(*play)

    def learn():
        darc_offdynamics.update(agent, optimizer, step_fn, replays, count, True, args)

    return learn, agent, source, args


def darc(device, repeats=5, count=100, compiled=False, **changes):
    """Iterations/s of darc_offdynamics.py at ODRL's sizes: a step of the source and a gradient step each."""
    device = torch.device(device)
    learn, agent, source, args = darc_job(device, count, compiled, **changes)
    obs_dim, space = source.single_observation_space.shape[0], source.single_action_space
    start = rl2_ppo.clock(device)
    darc_offdynamics.rollout(agent, darc_offdynamics.sample_action, source)
    playing = (rl2_ppo.clock(device) - start) / source.horizon / args.num_envs
    learning = median_seconds(learn, device, repeats) / count
    raw = products_seconds(obs_dim, space.shape[0], args, device)
    shape = f"batch {args.batch_size}, {args.hidden_layers} x {args.hidden_size}"
    print(f"\ndarc_offdynamics.py, --method {args.method}: {shape}, {device}{', compiled' * compiled}")
    total = learning + playing
    print(f"  {1 / total:.1f} iterations/s, of which playing {playing / total:.1%}")
    print(f"  the matrix products alone: {1 / raw:.0f}/s, {raw / total:.0%} of that time")
    name = f"darc_{args.method}" + "_compiled" * compiled
    note(name, iterations=1 / total, playing=playing / total, products=raw / total)


def products_seconds(obs_dim, action_dim, args, device):
    """The raw limit of a gradient step: its matrix products, forwards and backwards, and nothing else."""
    batch, hidden = args.batch_size, args.hidden_size
    classifying = args.method in ("darc", "importance_weighting")

    def products(rows, sizes, nets, passes):
        for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
            x = torch.randn(nets, rows, fan_in, device=device)
            yield from [(x, torch.randn(nets, fan_in, fan_out, device=device))] * passes

    q = [obs_dim + action_dim] + [hidden] * args.hidden_layers + [1]
    pi = [obs_dim] + [hidden] * args.hidden_layers + [2 * action_dim]
    sas = [3 * obs_dim + action_dim] + [hidden] * args.hidden_layers + [2]
    sa = [obs_dim + action_dim] + [hidden] * args.hidden_layers + [2]
    # forward 1, backward 2; the actor's loss needs no gradient of the critics' weights
    work = [*products(batch, pi, 1, 4), *products(batch, q, 2, 1 + 3 + 2)]
    if classifying:
        work += [*products(2 * batch, sas, 1, 3), *products(2 * batch, sa, 1, 3)]
        work += [*products(batch, sas, 1, 1), *products(batch, sa, 1, 1)]

    def multiply():
        for x, w in work:
            x @ w

    return median_seconds(multiply, device, 20)


def metaworld(steps=300, repeats=3):
    """Env steps/s of MT10 in common/, beside Meta-World's own vector environment, in turns."""
    ours = common.make("MT10", 10, seed=1)
    ours.set_tasks(ours.sample_tasks(10))
    theirs = gym.make_vec("Meta-World/MT10", vector_strategy="sync", seed=1)
    seconds = {"ours": [], "Meta-World's own": []}
    for _ in range(repeats):
        actions = 2 * torch.rand(steps, 10, 4) - 1
        for name, env, moves in (("ours", ours, actions), ("Meta-World's own", theirs, actions.numpy())):
            env.reset(seed=1)
            start = time.perf_counter()
            for move in moves:
                env.step(move)
            seconds[name].append(time.perf_counter() - start)
    speed = {name: 10 * steps / statistics.median(times) for name, times in seconds.items()}
    ratio = speed["ours"] / speed["Meta-World's own"]
    print("\nMT10, env steps/s: " + ", ".join(f"{name} {value:,.0f}" for name, value in speed.items()))
    print(f"  {ratio:.0%}")
    note("metaworld", sps=speed["ours"], share=ratio)


def gru_seconds(args, inputs, steps, device, repeats):
    """The raw limit of an iteration: its GRU passes alone, forwards and backwards, and nothing else."""
    gru = torch.nn.GRU(inputs, args.hidden_size).to(device)
    size = args.num_envs // args.minibatches
    x = torch.randn(steps, size, inputs, device=device)

    def train_pass():
        gru.zero_grad()
        gru(x)[0].sum().backward()

    @torch.no_grad()
    def acting():
        hidden = torch.zeros(1, args.num_envs, args.hidden_size, device=device)
        row = torch.randn(1, args.num_envs, inputs, device=device)
        for _ in range(steps):
            _, hidden = gru(row, hidden)

    learning = median_seconds(train_pass, device, repeats) * args.epochs * args.minibatches
    return learning + median_seconds(acting, device, repeats)


def rl2(device, env_id, repeats=7, compiled=False, **flags):
    """Seconds of an iteration of rl2_ppo.py by stage, and its env steps/s, which it returns."""
    device = torch.device(device)
    args = dataclasses.replace(rl2_ppo.Args(), env_id=env_id, **flags)
    torch.manual_seed(0)
    env = common.make(env_id, args.num_envs, device=device, seed=0)
    obs_dim, steps = env.single_observation_space.shape[0], args.episodes_per_trial * env.horizon
    agent = rl2_ppo.RecurrentActorCritic(obs_dim, env.single_action_space, args.hidden_size).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, eps=1e-5)
    step_fn = torch.compile(rl2_ppo.ppo_step) if compiled else rl2_ppo.ppo_step
    stages = {"rollout": [], "update": []}
    for _ in range(repeats + 2):
        start = rl2_ppo.clock(device)
        trials = rl2_ppo.rollout(agent, env, env.sample_tasks(args.num_envs), args.episodes_per_trial, steps)
        collected = rl2_ppo.clock(device)
        rl2_ppo.update(agent, optimizer, step_fn, trials, steps, False, 1.0, args)
        stages["rollout"].append(collected - start)
        stages["update"].append(rl2_ppo.clock(device) - collected)
    seconds = {stage: statistics.median(times[2:]) for stage, times in stages.items()}
    eval_env = common.make(env_id, min(1000, env.num_test_tasks), device=device, seed=0)
    seconds["evaluate"] = median_seconds(
        lambda: rl2_ppo.evaluate(agent, eval_env, args.episodes_per_trial), device, 3
    )
    total = seconds["rollout"] + seconds["update"]
    sps = args.num_envs * steps / total
    raw = gru_seconds(args, obs_dim + agent.action_dim + 2, steps, device, 3)
    shape = f"{args.num_envs} trials of {steps} steps, {args.epochs} epochs x {args.minibatches} minibatches"
    where = f"{device}, compiled" if compiled else f"{device}"
    print(f"\nrl2_ppo.py on {env_id}: {shape}, GRU {args.hidden_size}, {where}")
    print("  seconds: " + ", ".join(f"{stage} {value:.3f}" for stage, value in seconds.items()))
    print(f"  {sps:,.0f} env steps/s; the GRU passes alone would take {raw / total:.0%} of that time")
    name = f"rl2_{plain_id(env_id)}" + "_compiled" * compiled
    note(name, sps=sps, gru=raw / total, **seconds)
    return sps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="*", help="envs, physics, rl2, maml, pearl, mtl, darc, epopt, metaworld"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's own choice")
    parser.add_argument("--write", action="store_true", help="write results/throughput.csv")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()}, {name}")
    everything = {"envs", "physics", "rl2", "maml", "pearl", "mtl", "darc", "epopt"}
    what = set(options.what) or everything
    unknown = what - everything - {"metaworld"}
    if unknown:
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(sorted(everything))}, metaworld")
    if "envs" in what:
        env_steps(options.device)
    if "physics" in what:
        physics(options.device)
    if "maml" in what:
        for at_once in (2, 0):
            print(f"\n{at_once or 'all'} tasks at once")
            maml(options.device, "PointGoal-v0", tasks_at_once=at_once)
            maml(options.device, "HalfCheetahDir-v0", num_tasks=40, tasks_at_once=at_once)
    if "epopt" in what:
        for epsilon in (0.1, 1.0):
            epopt_step(options.device, "CartPoleRunEnsemble-v0", epsilon=epsilon)
            epopt_step(options.device, epsilon=epsilon)
    if "pearl" in what:
        for flags in (
            {},
            {"num_tasks": 8, "batch_size": 64, **OYSTER},
            {"num_tasks": 16, "batch_size": 256, **OYSTER},
        ):
            for compiled in (False, True) if options.device == "cuda" else (False,):
                pearl(options.device, compiled=compiled, **flags)
    if "mtl" in what:
        for flags in (
            {},
            {"num_tasks": 8, "batch_size": 64, **OYSTER},
            {"num_tasks": 16, "batch_size": 256, **OYSTER},
        ):
            for compiled in (False, True) if options.device == "cuda" else (False,):
                mtl(options.device, compiled=compiled, **flags)
    if "darc" in what:
        for method in ("darc", "source"):
            for compiled in (False, True) if options.device == "cuda" else (False,):
                darc(options.device, compiled=compiled, method=method)
    if "metaworld" in what:
        metaworld()
    if "rl2" in what:
        sps = rl2(options.device, "GridNavi-v0", **GRIDNAVI)
        print(f"  {sps / VARIBAD_GRIDNAVI_SPS:.0f} times varibad's {VARIBAD_GRIDNAVI_SPS} env steps/s")
        rl2(options.device, "Bandit5-v0")
        if options.device == "cuda":
            for count in (1024, 8192, 65536):
                for compiled in (False, True):
                    rl2("cuda", "GridNavi-v0", compiled=compiled, **{**GRIDNAVI, "num_envs": count})
    if options.write:
        write(f"{name}, {platform.machine()}")


def write(machine):
    """Write FIGURES into results/throughput.csv, over the figures of the same name that are there."""
    file, rows = RESULTS / "throughput.csv", {}
    if file.exists():
        with open(file) as old:
            rows = {row["figure"]: row for row in csv.DictReader(old)}
    origin = {"device": machine, "commit": git_commit(), "date": time.strftime("%Y-%m-%d")}
    for figure, value in FIGURES.items():
        rows[figure] = {"figure": figure, "value": f"{value:.4g}", **origin, "torch": torch.__version__}
    with open(file, "w", newline="") as new:
        writer = csv.DictWriter(new, next(iter(rows.values())))
        writer.writeheader()
        writer.writerows(rows.values())
    print(f"\nwrote {file}")


OYSTER = {"hidden_size": 300, "hidden_layers": 3, "train_tasks": 80}  # its sizes
GRIDNAVI = {"episodes_per_trial": 4, "num_envs": 1024, "epochs": 2, "minibatches": 4}  # the README's run

if __name__ == "__main__":
    main()
