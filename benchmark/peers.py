"""Other people's code and ours on one machine, in turns, so that a slow minute hits both.

    python -m benchmark.peers [rl2] [sac] [hopper] [--odrl FOLDER] [--oyster FOLDER] [--maml-rl FOLDER]
                              [--write]

rl2, sac and hopper (without a word: all three) want `pip install sb3-contrib`. The folders are checkouts of
OffDynamicsRL/off-dynamics-rl, katerakelly/oyster and tristandeleu/pytorch-maml-rl, of which as much is run as
needs no simulator. --write puts the figures into results/throughput.csv, beside those of
benchmark.throughput; do that with nothing else running.
"""

import argparse
import copy
import dataclasses
import importlib
import json
import os
import platform
import runpy
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the scripts have it, before PyTorch is loaded

import gymnasium as gym
import torch

import common
import epopt
import maml_trpo
import rl2_ppo
from benchmark import throughput
from benchmark.throughput import GRIDNAVI, OYSTER, darc_job, note, pearl_job


def in_turns(jobs, turns):
    """Median seconds of each job, {name: function}, run in turns so that a slow minute hits all of them."""
    seconds = {name: [] for name in jobs}
    for turn in range(turns + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn:  # the first is burn-in
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def repeatable(job, module):
    """job, but the module has its first weights back afterwards, so that every call does the same."""
    first = copy.deepcopy(module.state_dict())

    def again():
        job()
        module.load_state_dict(first)

    return again


def trials_of(env, episodes):
    """env as stable-baselines3 wants one, an episode being a whole trial and RL^2's input its observation."""
    from stable_baselines3.common.vec_env import VecEnv

    class Trials(VecEnv):
        def __init__(self):
            self.choices, self.steps = int(env.single_action_space.n), episodes * env.horizon
            width = env.single_observation_space.shape[0] + self.choices + 2
            seen = gym.spaces.Box(-float("inf"), float("inf"), (width,))
            super().__init__(env.num_envs, seen, gym.spaces.Discrete(self.choices))

        def reset(self):
            env.set_tasks(env.sample_tasks(env.num_envs))
            self.count, obs = 0, env.reset()[0]
            return torch.cat([obs, torch.zeros(len(obs), self.choices + 2)], 1).numpy()

        def step_async(self, actions):
            self.actions = torch.as_tensor(actions)

        def step_wait(self):
            obs, reward, terminated, truncated, _ = env.step(self.actions)
            self.count += 1
            before = [torch.nn.functional.one_hot(self.actions, self.choices), reward[:, None]]
            x = torch.cat([obs, *before, (terminated | truncated)[:, None]], 1).numpy()
            over = self.count == self.steps  # episodes have one length here
            infos = [{"terminal_observation": row} if over else {} for row in x]
            x = self.reset() if over else x
            return x, reward.numpy(), torch.full((len(x),), over).numpy(), infos

        def get_attr(self, attr_name, indices=None):
            return [None] * self.num_envs

        def env_is_wrapped(self, wrapper_class, indices=None):
            return [False] * self.num_envs

        close = set_attr = env_method = lambda self, *_, **__: None

    return Trials()


def recurrent_peer(turns=2):
    """Env steps/s end to end of sb3-contrib's RecurrentPPO and of rl2_ppo.py on GridNavi, in turns.

    Both: trials of 4 x 15 steps in 1,024 environments, 64 units (theirs an LSTM, ours a GRU), 2 epochs of 4
    minibatches.
    """
    from sb3_contrib import RecurrentPPO

    args = dataclasses.replace(rl2_ppo.Args(), env_id="GridNavi-v0", **GRIDNAVI)
    envs = [common.make(args.env_id, args.num_envs, seed=seed) for seed in (0, 1)]
    steps = args.episodes_per_trial * envs[0].horizon
    count = steps * args.num_envs
    net = {"lstm_hidden_size": args.hidden_size, "shared_lstm": True, "enable_critic_lstm": False}
    net["net_arch"] = []  # linear heads
    sizes = {"n_steps": steps, "batch_size": count // args.minibatches, "n_epochs": args.epochs}
    played = trials_of(envs[0], args.episodes_per_trial)
    theirs = RecurrentPPO("MlpLstmPolicy", played, policy_kwargs=net, device="cpu", seed=1, **sizes)
    agent = rl2_ppo.RecurrentActorCritic(
        envs[1].single_observation_space.shape[0], envs[1].single_action_space, args.hidden_size
    )
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, eps=1e-5)

    def ours():
        tasks = envs[1].sample_tasks(args.num_envs)
        trials = rl2_ppo.rollout(agent, envs[1], tasks, args.episodes_per_trial, steps)
        rl2_ppo.update(agent, optimizer, rl2_ppo.ppo_step, trials, steps, False, 1.0, args)

    seconds = in_turns({"sb3": lambda: theirs.learn(count), "ours": ours}, turns)
    speed = {name: count / value for name, value in seconds.items()}
    print(f"\nRL^2 on GridNavi: ours {speed['ours']:,.0f} env steps/s end to end")
    ratio = speed["ours"] / speed["sb3"]
    print(f"  sb3-contrib's RecurrentPPO, in turns: {speed['sb3']:,.0f}; ours {ratio:.1f} times that")
    note("peer_recurrent", **speed, ratio=ratio)


def sac_peer(turns=6, count=50):
    """Gradient steps/s of stable-baselines3's SAC and of darc_offdynamics.py's, on HalfCheetah, in turns.

    Both 2 x 256, batch 256, a learned temperature, and replay of 1,000 random steps; playing is left out.
    """
    from stable_baselines3 import SAC

    sizes = {"policy_kwargs": {"net_arch": [256, 256]}, "batch_size": 256, "buffer_size": 10_000}
    sac = SAC("MlpPolicy", "HalfCheetah-v5", device="cpu", seed=1, learning_starts=1000, **sizes)
    sac.learn(1000)  # plays, and learns nothing yet
    jobs = {
        "stable-baselines3": lambda: sac.train(count, 256),
        "ours (--method source)": darc_job("cpu", count, method="source")[0],
    }
    speed = {name: count / seconds for name, seconds in in_turns(jobs, turns).items()}
    print("\nSAC, gradient steps/s: " + ", ".join(f"{name} {value:.1f}" for name, value in speed.items()))
    note("peer_sac", **dict(zip(("sb3", "ours"), speed.values(), strict=True)))


def hopper_peer(turns=3, steps=32_768):
    """Env steps/s end to end of stable-baselines3's PPO on Hopper and of epopt.py on its ensemble, in turns.

    epopt.py is taken where its Hopper runs for a second or two, not where it falls at once.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    ppo = PPO("MlpPolicy", make_vec_env("Hopper-v5", n_envs=8, seed=1), device="cpu", seed=1)
    ppo.learn(16_384)  # burn-in
    flags = "--env-id HopperEnsemble-v0 --num-models 240 --max-kl 0.03 --gamma 0.995 --gae-lambda 0.97"
    flags += " --eval-every 1000 --save-every 1000 --eval-tasks 10 --eval-episodes 1 --device cpu"
    theirs, ours = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(turns + 1):
            start = time.perf_counter()
            ppo.learn(steps)
            theirs.append(steps / (time.perf_counter() - start))
            begun = ["--resume", *map(str, Path(folder).iterdir())]  # once there is a run
            total = ["--total-timesteps", str(1_000_000 * (turn + 1))]
            epopt.main([*(begun if turn else [*flags.split(), "--run-dir", folder]), *total])
            (file,) = Path(folder).glob("*/metrics.jsonl")
            rows = [json.loads(row) for row in file.read_text().splitlines()]
            new = [row for row in rows if row["global_step"] > 1_000_000 * turn]
            ours.append(statistics.median(row["charts/SPS"] for row in new))
    theirs, ours = statistics.median(theirs[1:]), statistics.median(ours[1:])
    print(f"\nHopper: epopt.py {ours:,.0f} env steps/s end to end, {ours / theirs:.1f} times")
    print(f"  stable-baselines3's PPO with 8 environments, {theirs:,.0f}, measured in turns")
    note("peer_Hopper", epopt=ours, sb3=theirs, ratio=ours / theirs)


def odrl(folder, turns=6, count=50):
    """Gradient steps/s of ODRL's DARC and of darc_offdynamics.py, in turns; playing is left out of both.

    folder: a checkout of off-dynamics-rl. Its classifiers learn in one of ten steps, from 128 transitions of
    each domain, and not at all in its first 100,000 steps; ours in every step, from 256 of each. Its
    temperature is fixed, ours learned.
    """
    files = {"darc": "algo/online_online/darc.py", "utils": "algo/utils.py"}
    theirs = {name: runpy.run_path(str(folder / file)) for name, file in files.items()}
    config = {"gamma": 0.99, "tau": 0.005, "state_dim": 17, "action_dim": 6, "max_action": 1.0}
    config |= {"hidden_sizes": 256, "temperature_opt": False, "gaussian_noise_std": 1.0, "update_interval": 2}
    config |= {"critic_lr": 3e-4, "actor_lr": 3e-4, "penalty_coefficient": 1.0}
    replays = [theirs["utils"]["ReplayBuffer"](17, 6, "cpu", 10_000) for _ in range(2)]
    for replay in replays:
        for _ in range(1000):
            state, after = torch.randn(2, 17).numpy()
            replay.add(state, 2 * torch.rand(6).numpy() - 1, after, 0.0, 0.0)

    def their_job(every, steps_before):
        agent = theirs["darc"]["DARC"]({**config, "tar_env_interact_freq": every}, "cpu")
        agent.total_it = steps_before
        return lambda: [agent.train(*replays, 128) for _ in range(count)]

    jobs = {
        "ODRL, classifiers every tenth step": their_job(10, 100_000),
        "ODRL, classifiers every step": their_job(1, 100_000),
        "ODRL without, its first 100,000 steps": their_job(10, 0),
        "ours, classifiers every step": darc_job("cpu", count)[0],
        "ours without (--method source)": darc_job("cpu", count, method="source")[0],
    }
    speed = {name: count / seconds for name, seconds in in_turns(jobs, turns).items()}
    print("\nDARC, gradient steps/s: " + ", ".join(f"{name} {value:.1f}" for name, value in speed.items()))
    keys = ("odrl", "odrl_every", "odrl_sac", "ours", "ours_sac")
    note("peer_darc", **dict(zip(keys, speed.values(), strict=True)))


def done(loop, value):
    """An asyncio future that has its value."""
    future = loop.create_future()
    future.set_result(value)
    return future


def maml_rl_job(folder, args, obs_dim=2, act_dim=2, steps=100):
    """A meta-update of pytorch-maml-rl, from episodes of random numbers in memory, as a function to call."""
    # its samplers want gym and processes, and nothing else wants them
    sys.modules.setdefault("maml_rl.samplers", types.SimpleNamespace(MultiTaskSampler=type(None)))
    sys.path.insert(0, str(folder))
    names = {"episode": "BatchEpisodes", "baseline": "LinearFeatureBaseline", "metalearners": "MAMLTRPO"}
    names["policies"] = "NormalMLPPolicy"
    parts = [getattr(importlib.import_module(f"maml_rl.{module}"), name) for module, name in names.items()]
    episodes_class, baseline_class, learner_class, policy_class = parts
    policy = policy_class(obs_dim, act_dim, hidden_sizes=(args.hidden_size,) * 2, nonlinearity=torch.tanh)
    learner, baseline = learner_class(policy, fast_lr=args.inner_lr), baseline_class(obs_dim)

    def episodes():
        batch = episodes_class(args.episodes_per_task, gamma=args.gamma)
        for _ in range(steps):
            obs = torch.randn(args.episodes_per_task, obs_dim)
            with torch.no_grad():
                action = policy(obs).sample()
            numbers = range(args.episodes_per_task)
            batch.append(obs.numpy(), action.numpy(), torch.randn(args.episodes_per_task).numpy(), numbers)
        baseline.fit(batch)
        batch.compute_advantages(baseline, gae_lambda=args.gae_lambda)
        return done(learner._event_loop, batch)

    train, valid = ([episodes() for _ in range(args.num_tasks)] for _ in range(2))
    sizes = {"cg_iters": args.cg_steps, "cg_damping": args.cg_damping, "max_kl": args.max_kl}

    def job():
        learner.step([train], valid, ls_max_steps=15, ls_backtrack_ratio=0.8, **sizes)

    return repeatable(job, policy)


def maml_rl(folder, turns=5):
    """Seconds of a meta-update of pytorch-maml-rl and of maml_trpo.py on PointGoal, in turns; no playing.

    folder: a checkout of pytorch-maml-rl, whose torch.lstsq, gone from PyTorch, has to be torch.linalg.lstsq.
    20 tasks x 20 episodes x 100 steps, 2 x 64.
    """
    args = maml_trpo.Args()
    torch.manual_seed(0)
    env = common.make(args.env_id, args.num_tasks * args.episodes_per_task, seed=0)
    policy = maml_trpo.Policy(2, env.single_action_space, args.hidden_size, args.init_std)
    tasks = env.sample_tasks(args.num_tasks)
    *inner, outer = maml_trpo.adapt(policy, maml_trpo.act, env, tasks, [args.inner_lr], args)
    ours = repeatable(lambda: maml_trpo.update(policy, inner, outer, args), policy)
    seconds = in_turns({"theirs": maml_rl_job(folder, args), "ours": ours}, turns)
    ratio = seconds["theirs"] / seconds["ours"]
    print(f"\nMAML's meta-update on PointGoal: ours {seconds['ours']:.2f} s")
    print(f"  pytorch-maml-rl, in turns: {seconds['theirs']:.2f} s, {ratio:.1f} times that")
    note("peer_maml", **seconds, ratio=ratio)


def oyster_job(folder, meta_batch, batch_size, count, obs_dim=2, act_dim=2):
    """count gradient steps of oyster's PEARL, at its point robot's settings, from random steps in replay."""
    for name, stub in (("gym", gym), ("gym.spaces", gym.spaces), ("gtimer", types.ModuleType("gtimer"))):
        sys.modules.setdefault(name, stub)  # no gradient step uses more of them
    sys.path.insert(0, str(folder))
    names = ("networks", "sac.policies", "sac.agent", "sac.sac")
    networks, policies, agents, learners = (importlib.import_module(f"rlkit.torch.{name}") for name in names)
    config = runpy.run_path(str(folder / "configs/default.py"))["default_config"]
    flags = (
        config["algo_params"] | json.loads((folder / "configs/point-robot.json").read_text())["algo_params"]
    )
    flags |= {"meta_batch": meta_batch, "batch_size": batch_size, "replay_buffer_size": 1000}
    wide, latent = {"hidden_sizes": [300] * 3}, config["latent_size"]
    encoder = networks.MlpEncoder([200] * 3, input_size=obs_dim + act_dim + 1, output_size=2 * latent)
    critics = [
        networks.FlattenMlp(**wide, input_size=width + latent, output_size=1)
        for width in (obs_dim + act_dim, obs_dim + act_dim, obs_dim)
    ]
    actor = policies.TanhGaussianPolicy(
        **wide, obs_dim=obs_dim + latent, latent_dim=latent, action_dim=act_dim
    )
    agent = agents.PEARLAgent(latent, encoder, actor, **flags)
    box = {width: gym.spaces.Box(-1, 1, (width,)) for width in (obs_dim, act_dim)}
    env = types.SimpleNamespace(observation_space=box[obs_dim], action_space=box[act_dim])
    tasks = list(range(OYSTER["train_tasks"]))
    nets = {"nets": [agent, *critics], "latent_dim": latent, "train_tasks": tasks, "eval_tasks": tasks[:1]}
    learner = learners.PEARLSoftActorCritic(env, **nets, **flags)
    for buffer in (learner.replay_buffer, learner.enc_replay_buffer):
        for task in tasks:
            for _ in range(flags["replay_buffer_size"]):
                obs, after, action = (torch.rand(dim).numpy() for dim in (obs_dim, obs_dim, act_dim))
                buffer.add_sample(task, obs, action, -1.0, False, after, env_info={})
    learner.training_mode(True)

    def job():
        for _ in range(count):
            chosen = torch.randperm(len(tasks))[:meta_batch].tolist()
            learner._do_training(chosen)
            learner._n_train_steps_total += 1

    return job


def oyster(folder, turns=5, count=20):
    """Gradient steps/s of oyster and of pearl_sac.py at oyster's sizes, in turns; playing is left out.

    folder: a checkout of oyster. It has a third critic for V, and context of 64 single transitions; ours
    learns its temperature and has context of one to three whole episodes of 20.
    """
    for size in ((8, 64), (16, 256)):
        learn, collect, *_ = pearl_job("cpu", count, num_tasks=size[0], batch_size=size[1], **OYSTER)
        for _ in range(4):
            collect()
        seconds = in_turns({"theirs": oyster_job(folder, *size, count), "ours": learn}, turns)
        speed = {name: count / value for name, value in seconds.items()}
        ratio = speed["ours"] / speed["theirs"]
        print(f"\nPEARL, {size[0]} tasks x {size[1]}: ours {speed['ours']:.1f} gradient steps/s")
        print(f"  oyster, in turns: {speed['theirs']:.1f}; ours {ratio:.2f} times that")
        note(f"peer_pearl_{size[0]}x{size[1]}", **speed, ratio=ratio)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="rl2, sac, hopper")
    checkouts = {"odrl": odrl, "oyster": oyster, "maml-rl": maml_rl}
    for name in checkouts:
        parser.add_argument(f"--{name}", type=Path, help="the folder of its checkout")
    parser.add_argument("--write", action="store_true", help="write results/throughput.csv")
    options = parser.parse_args()
    threads = f"{torch.get_num_threads()} threads"
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()}, {threads}")
    jobs = {"rl2": recurrent_peer, "sac": sac_peer, "hopper": hopper_peer}
    unknown = set(options.what) - set(jobs)
    if unknown:
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(jobs)}")
    folders = {name: getattr(options, name.replace("-", "_")) for name in checkouts}
    for name in options.what or (() if any(folders.values()) else jobs):
        jobs[name]()
    for name, folder in folders.items():
        if folder:
            checkouts[name](folder)
    if options.write:
        throughput.write(f"{threads}, {platform.machine()}")


if __name__ == "__main__":
    main()
