"""Other people's code and ours on one machine, in turns, so that a slow minute hits both.

    python -m benchmark.peers [rl2] [sac] [hopper] [--odrl FOLDER] [--write]

rl2, sac and hopper (without a word: all three) want `pip install sb3-contrib`; --odrl wants a checkout of
OffDynamicsRL/off-dynamics-rl and runs two of its files. --write puts the figures into results/throughput.csv,
beside those of benchmark.throughput; do that with nothing else running.
"""

import argparse
import dataclasses
import json
import os
import platform
import runpy
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the scripts have it, before PyTorch is loaded

import gymnasium as gym
import torch

import common
import epopt
import rl2_ppo
from benchmark import throughput
from benchmark.throughput import GRIDNAVI, darc_job, note


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


def trials_of(env, episodes):
    """env as stable-baselines3 wants one, an episode being a whole trial and RL^2's input its observation."""
    from stable_baselines3.common.vec_env import VecEnv

    class Trials(VecEnv):
        def __init__(self):
            self.arms, self.steps = int(env.single_action_space.n), episodes * env.horizon
            width = env.single_observation_space.shape[0] + self.arms + 2
            seen = gym.spaces.Box(-float("inf"), float("inf"), (width,))
            super().__init__(env.num_envs, seen, gym.spaces.Discrete(self.arms))

        def reset(self):
            env.set_tasks(env.sample_tasks(env.num_envs))
            self.count, obs = 0, env.reset()[0]
            return torch.cat([obs, torch.zeros(len(obs), self.arms + 2)], 1).numpy()

        def step_async(self, actions):
            self.actions = torch.as_tensor(actions)

        def step_wait(self):
            obs, reward, terminated, truncated, _ = env.step(self.actions)
            self.count += 1
            before = [torch.nn.functional.one_hot(self.actions, self.arms), reward[:, None]]
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
    theirs = {name: runpy.run_path(str(Path(folder) / file)) for name, file in files.items()}
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="rl2, sac, hopper")
    parser.add_argument("--odrl", default="", help="a checkout of off-dynamics-rl")
    parser.add_argument("--write", action="store_true", help="write results/throughput.csv")
    options = parser.parse_args()
    threads = f"{torch.get_num_threads()} threads"
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()}, {threads}")
    jobs = {"rl2": recurrent_peer, "sac": sac_peer, "hopper": hopper_peer}
    unknown = set(options.what) - set(jobs)
    if unknown:
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(jobs)}")
    for name in options.what or (() if options.odrl else jobs):
        jobs[name]()
    if options.odrl:
        odrl(options.odrl)
    if options.write:
        throughput.write(f"{threads}, {platform.machine()}")


if __name__ == "__main__":
    main()
