"""Every number of the README's tables is an entry: a command line, its seeds, its minutes, its reference.

    python -m benchmark.reproduce                       list the entries
    python -m benchmark.reproduce NAME... [--jobs 2]    run them, or go on with them; write results/NAME.csv
    python -m benchmark.reproduce NAME --sweep          print it as a W&B sweep, a run a seed

A NAME may hold a *, in quotes: 'compare_pointgoal_*'. Runs lie in RUN_DIR/NAME/. With several jobs each run
gets one thread, which on small networks is the better use of two cores.
"""

import argparse
import csv
import fnmatch
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent

BANDIT10 = "--env-id Bandit10-v0 --total-timesteps 12000000"
N100 = (
    "--episodes-per-trial 100 --num-envs 512 --hidden-size 128 --lr 0.005 --gamma 0.99 --gae-lambda 0.97"
    " --entropy-coef 0.02 --total-timesteps 55000000 --eval-every 100 --save-every 50"
)
N100_LARGE = (  # twice the trials a batch, no discount: better, tried on five arms only
    "--episodes-per-trial 100 --num-envs 1024 --hidden-size 128 --lr 0.005 --gae-lambda 0.95 --epochs 3"
    " --entropy-coef 0.02 --total-timesteps 115000000 --eval-every 60 --save-every 30"
)
GRIDNAVI = (
    "--env-id GridNavi-v0 --episodes-per-trial 4 --num-envs 1024 --epochs 2 --lr 0.005 --gamma 0.99"
    " --gae-lambda 0.95 --entropy-coef 0.1 --total-timesteps 14000000"
)
MAZE = (
    "--env-id Maze-v0 --episodes-per-trial 2 --num-envs 512 --hidden-size 128 --epochs 3 --lr 0.003"
    " --gamma 0.97 --gae-lambda 0.9 --entropy-coef 0.1 --total-timesteps 10000000 --eval-every 20"
)

CHEETAH = (
    "--env-id HalfCheetah{}-v0 --num-tasks {} --inner-lr 0.06 --init-std 0.3 --max-kl 0.03"
    " --gae-lambda {} --fisher-fraction 0.25 --total-timesteps 20000000 --eval-tasks 40"
    " --eval-episodes 20 --eval-every 25"
)
SMALL_STEPS = "--inner-steps 0 --inner-lr 0.03 --eval-lr-factor 1"  # .03: of .01 to .2, chosen on these tasks
TOLD = "--inner-steps 0 --oracle --total-timesteps 1000000"  # then episodes are five steps long
CHEETAH_DIR, CHEETAH_VEL = CHEETAH.format("Dir", 10, 0.9), CHEETAH.format("Vel", 20, 0.95)
ANT_DIR = CHEETAH.format("Dir", 10, 0.95).replace("HalfCheetahDir", "AntDir").replace("20000000", "4000000")

TABULAR = "--env-id TabularMDP-v0 --epochs 2 --lr 0.005 --gamma 0.99 --entropy-coef 0.05"
TABULAR_PLAIN = (
    f"{TABULAR} --num-envs 256 --hidden-size 256 --gae-lambda 0.3 --total-timesteps 130000000"
    " --eval-every 100 --save-every 100"
)
TABULAR_N10 = (
    f"{TABULAR} --num-envs 256 --hidden-size 256 --gae-lambda 0.8 --bilinear --total-timesteps 60000000"
    " --eval-every 50"
)
TABULAR_N25 = (
    f"{TABULAR} --episodes-per-trial 25 --num-envs 128 --hidden-size 128 --gae-lambda 0.9 --bilinear"
    " --value-by-step --total-timesteps 140000000 --eval-every 50"
)

PEARL_CHEETAH = (
    "--env-id HalfCheetah{}-v0 --train-tasks 100 --num-tasks 16 --batch-size 64 --latent-size 5"
    " --context-stride 10 --kl-coef 0.01 --updates-per-step 0.05 --replay-episodes 300 --gamma 0.99"
    " --tau 0.005 --total-timesteps {} --eval-tasks {} --save-every 5"
)

PEARL_SPARSE = (
    "--env-id SparsePointGoal-v0 --train-tasks {} --episodes-per-task 12 --prior-episodes 8"
    " --context-episodes 12 --context-rounds 3 --context-stride 2 --num-tasks 32 --batch-size 32"
    " --latent-size 5 --updates-per-step {} --eval-episodes 6 --total-timesteps {}"
)
PEARL_LONG = (
    "--train-tasks 4000 --replay-episodes 100 --context-rounds 3 --total-timesteps 7200000"
    " --updates-per-step 0.01 --latent-size 20 --eval-every 2 --save-every 10"
)

HER_MAZE = (
    "--env-id PointMaze-v0 --context goal --gamma 0.98 --lr 0.001 --updates-per-step 0.05"
    " --total-timesteps 200000"
)
HER_REACHER = (
    "--env-id ReacherGoal-v0 --context goal --train-tasks 64 --num-tasks 32 --batch-size 10"
    " --updates-per-step 0.1 --gamma 0.95 --lr 0.001 --total-timesteps 150000 --eval-every 10 --save-every 10"
)
SWING_UP = (
    "--env-id {}-v0 --context onehot --train-tasks {} --num-tasks {} --batch-size 64 --updates-per-step {}"
    " --gamma 0.98 --lr 0.001 --reward-scale {} --replay-episodes 1000 --total-timesteps {} --eval-every 10"
    " --save-every 10"
)
ALONE = (1, 1, 0.6)
TOLD_NOTHING = "--context none --lr 0.001 --total-timesteps 240000"
HER = "--context goal --her future"
TOLD_SPARSE = "--env-id SparsePointGoal-v0 --lr 0.001 --total-timesteps 120000"
TOLD_CHEETAH = (
    "--env-id HalfCheetah{}-v0 --train-tasks {} --num-tasks {} --batch-size {} --hidden-size 256 --gamma 0.99"
    " --lr 0.001 --tau 0.005 --updates-per-step 0.1 --replay-episodes {} --total-timesteps {} --eval-tasks {}"
    " --eval-every 4 --save-every 10"
)
MT = (
    "--env-id {0} --context onehot --train-tasks {1} --num-tasks {1} --batch-size 64 --hidden-size 256"
    " --lr 3e-4 --gamma 0.99 --tau 0.005 --reward-scale 0.1 --updates-per-step {2} --replay-episodes 1000"
    " --eval-tasks {3} --eval-every 20 --save-every 20 --total-timesteps {4}"
)

BROKEN_REACHER = (
    "--env-id BrokenReacher-v0 --warmup-steps 15000 --input-noise 0.4 --correction-scale 0.1 --gamma 0.95"
    " --lr 5e-4 --tau 0.005 --updates-per-step 0.07 --total-timesteps 165000"
)
HOPPER = (
    "--env-id HopperEnsemble-v0 --num-models 240 --warmup-iterations 120 --max-kl 0.03 --gamma 0.995"
    " --gae-lambda 0.97 --eval-every 10 --save-every 5 --eval-episodes 1 --total-timesteps"
)
RUNNING_ENSEMBLE = (
    "--env-id HalfCheetahEnsemble-v0 --num-models 100 --warmup-iterations 50 --max-kl 0.03 --gamma 0.99"
    " --gae-lambda 0.97 --eval-every 20 --save-every 10 --eval-episodes 1 --total-timesteps 14000000"
)
TEN = tuple(range(1, 11))
BROKEN_CHEETAH = (
    "--env-id BrokenHalfCheetah-v0 --num-envs 4 --warmup-steps 20000 --input-noise 0.4 --gamma 0.99"
    " --tau 0.005 --replay-episodes 100 --total-timesteps 220000 --eval-tasks 20"
)
# The comparison: one budget of environment steps a task, at most 16 minutes of a core a run on the plane
BUDGET = 4_500_000
SAME_TASKS = f"--total-timesteps {BUDGET} --eval-tasks 100"
ON_PLANE = f"--env-id PointGoal-v0 {SAME_TASKS}"
ON_ARC = f"--env-id SparsePointGoal-v0 {SAME_TASKS}"
RL2_TRIALS = "--episodes-per-trial 4 --hidden-size 128 --lr 0.003 --eval-every 10"
RL2_PLANE = f"{RL2_TRIALS} --num-envs 128 --epochs 4 --gamma 0.95 --gae-lambda 0.9 --entropy-coef 0"
RL2_ARC = f"{RL2_TRIALS} --num-envs 256 --epochs 3 --gamma 0.97 --gae-lambda 0.9 --entropy-coef 0.01"
PEARL_PLANE = (
    "--train-tasks 400 --replay-episodes 50 --context-stride 25 --latent-size 5 --gamma 0.95"
    " --updates-per-step 0.006 --eval-every 2 --save-every 5"
)
PEARL_ARC = (
    f"{PEARL_SPARSE.format(100, 0.003, BUDGET)} --replay-episodes 500 --eval-tasks 100 --save-every 10"
)
TOLD_PLANE = "--updates-per-step 0.003 --eval-every 5 --save-every 20"
RUNNING = "--env-id HalfCheetahVel-v0 --total-timesteps 10000000 --eval-tasks 100"
RL2_RUNNING = (
    "--episodes-per-trial 2 --num-envs 64 --hidden-size 128 --lr 0.003 --gamma 0.97 --gae-lambda 0.9"
    " --entropy-coef 0 --normalize-inputs --eval-every 10"
)
MAML_RUNNING = (
    "--num-tasks 10 --inner-lr 0.06 --init-std 0.3 --max-kl 0.03 --gae-lambda 0.95 --fisher-fraction 0.25"
    " --eval-episodes 20 --eval-every 25"
)
PEARL_RUNNING = (
    "--train-tasks 100 --num-tasks 16 --batch-size 64 --latent-size 5 --context-stride 10 --kl-coef 0.01"
    " --updates-per-step 0.006 --replay-episodes 300 --gamma 0.99 --tau 0.005 --save-every 5"
)
TOLD_DIRECTION = (  # PEARL's batches, network and steps; with its first temperature seed 1 hardly ran forward
    TOLD_CHEETAH.format("Dir", 100, 16, 64, 300, 900_000, 40)
    + " --hidden-size 128 --updates-per-step 0.05 --alpha 1"
)
TOLD_RUNNING = (  # PEARL's gradient steps a step; a temperature of .1 at first gets stuck at a crawl
    "--train-tasks 50 --num-tasks 32 --batch-size 8 --hidden-size 256 --gamma 0.99 --lr 0.001 --tau 0.005"
    " --updates-per-step 0.006 --replay-episodes 200 --alpha 1 --eval-every 50 --save-every 100"
)
AS_MUCH_TARGET = "--method target --total-timesteps 5500 --updates-per-step 2"  # as gradient steps

# name: (script, flags, seeds, minutes a run on one core, reference)
ENTRIES = {
    "rl2_bandit5_n10": ("rl2_ppo.py", "", (1, 2, 3), 3, "Bayes-optimal 6.660, paper 6.7"),
    "rl2_bandit10_n10": ("rl2_ppo.py", BANDIT10, (1, 2, 3), 6, "Bayes-optimal 6.714, paper 6.7"),
    "rl2_bandit5_n100": ("rl2_ppo.py", N100_LARGE, (1,), 45, "Gittins 78.5, paper 78.7"),
    "rl2_bandit10_n100": ("rl2_ppo.py", f"--env-id Bandit10-v0 {N100}", (1,), 40, "Gittins 83.7, paper 83.5"),
    "rl2_tabular_n10": ("rl2_ppo.py", TABULAR_N10, (1,), 75, "paper 156.2, BEB 152.3"),
    "rl2_tabular_n10_plain": ("rl2_ppo.py", TABULAR_PLAIN, (1,), 180, "paper 156.2, BEB 152.3"),
    "rl2_tabular_n25": ("rl2_ppo.py", TABULAR_N25, (1,), 98, "paper 445.7, BEB 442.4"),
    "rl2_gridnavi": ("rl2_ppo.py", GRIDNAVI, (1, 2, 3), 5, "path to the known goal 11.07 an episode"),
    "maml_pointgoal": ("maml_trpo.py", "", (1, 2, 3), 5, "paper -40.4, -11.7, -3.33, -3.23"),
    "maml_pointgoal_100": (
        "maml_trpo.py",
        "--gae-lambda 0.95 --total-timesteps 7400000 --eval-every 10",
        (1, 2, 3),
        4,
        "paper -40.4, -11.7, -3.33, -3.23",
    ),
    "maml_pointgoal_quarter": (
        "maml_trpo.py",
        "--fisher-fraction 0.25",
        (1, 2, 3),
        4,
        "what fewer states cost",
    ),
    "maml_pointgoal_pretrained": ("maml_trpo.py", "--inner-steps 0", (1, 2, 3), 3, "below MAML"),
    "maml_pointgoal_pretrained_small_steps": ("maml_trpo.py", SMALL_STEPS, (1, 2, 3), 3, "below MAML"),
    "maml_pointgoal_told": (
        "maml_trpo.py",
        "--inner-steps 0 --oracle --total-timesteps 1000000",
        (1, 2, 3),
        2,
        "paper -2.29",
    ),
    "maml_cheetah_dir": (
        "maml_trpo.py",
        f"{CHEETAH_DIR} --gamma 1 --eval-lr-factor 0.5",
        (1, 2, 3),
        17,
        "paper's simulator -50.7, 293, 313.5, 315.7",
    ),
    "maml_cheetah_vel": (
        "maml_trpo.py",
        CHEETAH_VEL,
        (1,),
        30,
        "paper's simulator -129, -78.6, -66.6, -60.8",
    ),
    "maml_ant_dir": ("maml_trpo.py", ANT_DIR, (1,), 40, "paper's simulator 8.7, 499"),
    "maml_cheetah_dir_told": (
        "maml_trpo.py",
        f"{CHEETAH_DIR} --inner-steps 0 --oracle --eval-every 100",
        (1, 2, 3),
        10,
        "paper 443",
    ),
    "maml_cheetah_vel_told": (
        "maml_trpo.py",
        f"{CHEETAH_VEL} --inner-steps 0 --oracle --eval-every 100",
        (1,),
        30,
        "paper -54.5",
    ),
    "maml_cheetah_dir_pretrained": (
        "maml_trpo.py",
        f"{CHEETAH.format('Dir', 10, 0.95)} --inner-steps 0 --eval-every 100",
        (1,),
        30,
        "below MAML",
    ),
    "maml_cheetah_vel_pretrained": (
        "maml_trpo.py",
        f"{CHEETAH_VEL} --inner-steps 0 --eval-every 100",
        (1,),
        30,
        "below MAML",
    ),
    "pearl_pointrobot": ("pearl_sac.py", "", (1, 2, 3), 4, "middle -15.71, optimal -5.13"),
    "pearl_pointrobot_more": (
        "pearl_sac.py",
        "--train-tasks 2000 --total-timesteps 1200000 --updates-per-step 0.01 --latent-size 20",
        (1, 2, 3),
        7,
        "middle -15.71, optimal -5.13",
    ),
    "pearl_pointrobot_long": ("pearl_sac.py", PEARL_LONG, (1,), 40, "middle -15.71, optimal -5.13"),
    "pearl_pointrobot_transitions": ("pearl_sac.py", "--context transitions", (1, 2, 3), 4, "whole episodes"),
    "pearl_pointrobot_kl": ("pearl_sac.py", "--kl-coef 0.1", (1,), 4, "a KL too heavy"),
    "pearl_sparse": (
        "pearl_sac.py",
        f"{PEARL_SPARSE.format(400, 0.00375, 5_760_000)} --replay-episodes 400 --save-every 10",
        (1, 2, 3),
        10,
        "exact posterior sampling 4.9 in the third episode, optimum 13.39",
    ),
    "pearl_cheetah_vel": (
        "pearl_sac.py",
        PEARL_CHEETAH.format("Vel", 1_500_000, 100),
        (1,),
        30,
        "VariBAD -25, PEARL -40 to -50",
    ),
    "pearl_cheetah_dir": ("pearl_sac.py", PEARL_CHEETAH.format("Dir", 900_000, 40), (1,), 30, "VariBAD 1900"),
    "mtl_pointgoal": ("mtl_contextual.py", "", (1, 2, 3), 2, "optimum -.488"),
    "mtl_pointgoal_none": ("mtl_contextual.py", TOLD_NOTHING, (1, 2, 3), 2, "the lower bound"),
    "mtl_sparse": ("mtl_contextual.py", TOLD_SPARSE, (1, 2, 3), 1, "optimum 13.39"),
    "mtl_sparse_her": ("mtl_contextual.py", f"{TOLD_SPARSE} {HER}", (1, 2, 3), 1, "optimum 13.39"),
    "mtl_pointmaze": ("mtl_contextual.py", f"{HER_MAZE} --her future", (1, 2, 3), 3, "success .9"),
    "mtl_pointmaze_no_her": ("mtl_contextual.py", HER_MAZE, (1, 2, 3), 3, "far below"),
    "mtl_reacher": ("mtl_contextual.py", f"{HER_REACHER} --her future", (1, 2, 3), 4, "success .9"),
    "mtl_reacher_no_her": ("mtl_contextual.py", HER_REACHER, (1, 2, 3), 4, "far below"),
    "mtl_classic": (
        "mtl_contextual.py",
        f"{SWING_UP.format('ClassicControl', 3, 3, 0.2, '1 0.1 1', 250_000)} --alpha 1",
        (1, 2, 3),
        24,
        "each body alone",
    ),
    "mtl_cartpole": (
        "mtl_contextual.py",
        SWING_UP.format("CartPoleSwingUp", *ALONE, 1, 83_000),
        (1, 2, 3),
        5,
        "alone",
    ),
    "mtl_pendulum": (
        "mtl_contextual.py",
        SWING_UP.format("PendulumSwingUp", *ALONE, 0.1, 83_000),
        (1, 2, 3),
        4,
        "alone",
    ),
    "mtl_acrobot": (
        "mtl_contextual.py",
        SWING_UP.format("AcrobotSwingUp", *ALONE, 1, 83_000),
        (1, 2, 3),
        5,
        "alone",
    ),
    "mtl_cheetah_vel": (
        "mtl_contextual.py",
        TOLD_CHEETAH.format("Vel", 50, 32, 8, 200, 600_000, 100),
        (1, 2, 3),
        19,
        "PEARL -36, VariBAD -25",
    ),
    "mtl_cheetah_dir": ("mtl_contextual.py", TOLD_DIRECTION, (1, 2, 3), 15, "PEARL 1187, VariBAD 1900"),
    "mtl_mt3": ("mtl_contextual.py", MT.format("MT3", 3, 0.333, 30, 810_000), (1,), 90, "scripted 1.0"),
    "mtl_mt10": (
        "mtl_contextual.py",
        MT.format("MT10", 10, 0.1, 100, 20_000_000) + " --heads",
        (1,),
        1600,
        "multi-task SAC about .75 at 20 M steps",
    ),
    "darc_pointwall": ("darc_offdynamics.py", "", (1, 2, 3), 3, "success .9, around the wall -9.39"),
    "darc_pointwall_source": ("darc_offdynamics.py", "--method source", (1, 2, 3), 2, "success .3 at most"),
    "darc_pointwall_weighting": (
        "darc_offdynamics.py",
        "--method importance_weighting",
        (1, 2, 3),
        3,
        "paper: below DARC",
    ),
    "darc_pointwall_target": ("darc_offdynamics.py", AS_MUCH_TARGET, (1, 2, 3), 2, "as many target steps"),
    "darc_pointdoor": (
        "darc_offdynamics.py",
        "--env-id PointDoor-v0",
        (1,),
        3,
        "straight -6.03: not reached",
    ),
    "darc_pointdoor_target": (
        "darc_offdynamics.py",
        f"--env-id PointDoor-v0 {AS_MUCH_TARGET}",
        (1,),
        2,
        "straight -6.03",
    ),
    "darc_reacher": ("darc_offdynamics.py", BROKEN_REACHER, TEN, 2, "above the next two"),
    "darc_reacher_decay": (
        "darc_offdynamics.py",
        f"{BROKEN_REACHER} --decay 0.01",
        TEN,
        2,
        "above the next two, within 10 % of the last",
    ),
    "darc_reacher_source": ("darc_offdynamics.py", f"{BROKEN_REACHER} --method source", TEN, 1, "below DARC"),
    "darc_reacher_weighting": (
        "darc_offdynamics.py",
        f"{BROKEN_REACHER} --method importance_weighting",
        TEN,
        2,
        "below DARC",
    ),
    "darc_reacher_target": (
        "darc_offdynamics.py",
        f"{BROKEN_REACHER} --method target --total-timesteps 150000",
        (1, 2, 3),
        1,
        "ten times the target's steps: DARC within 10 %",
    ),
    "darc_reacher_long": (
        "darc_offdynamics.py",
        f"{BROKEN_REACHER} --total-timesteps 220000",
        TEN,
        5,
        "above the next two, within 10 % of the last",
    ),
    "darc_reacher_in_sac_long": (
        "darc_offdynamics.py",
        f"{BROKEN_REACHER} --total-timesteps 220000 --target-in-sac",
        TEN,
        5,
        "the target's transitions in SAC's batch as well",
    ),
    "darc_reacher_mixed_long": (
        "darc_offdynamics.py",
        f"{BROKEN_REACHER} --total-timesteps 220000 --target-in-sac --correction-scale 0",
        (1, 2, 3),
        5,
        "the same without the correction",
    ),
    "darc_reacher_scarce_long": (
        "darc_offdynamics.py",
        f"{BROKEN_REACHER} --method target --total-timesteps 20800 --updates-per-step 0.67 --eval-every 1",
        (1, 2, 3),
        2,
        "SAC in the target alone: DARC's target steps, DARC's gradient steps",
    ),
    "darc_reacher_source_long": (
        "darc_offdynamics.py",
        f"{BROKEN_REACHER} --total-timesteps 220000 --method source",
        TEN,
        3,
        "below DARC",
    ),
    "darc_reacher_weighting_long": (
        "darc_offdynamics.py",
        f"{BROKEN_REACHER} --total-timesteps 220000 --method importance_weighting",
        TEN,
        5,
        "below DARC",
    ),
    "darc_reacher_target_long": (
        "darc_offdynamics.py",
        f"{BROKEN_REACHER} --method target --total-timesteps 200000",
        (1, 2, 3),
        2,
        "ten times the target's steps",
    ),
    "epopt_hopper": ("epopt.py", f"{HOPPER} 40000000", (1,), 90, "mean 2500, p10 2000"),
    "epopt_hopper_randomised": ("epopt.py", f"{HOPPER} 40000000 --epsilon 1", (1,), 90, "below EPOpt's p10"),
    "epopt_hopper_single": (
        "epopt.py",
        f"{HOPPER} 16000000 --epsilon 1 --ensemble single",
        (1,),
        40,
        "below 1500 at the ends",
    ),
    "epopt_cheetah": ("epopt.py", RUNNING_ENSEMBLE, (1,), 10, "p10 above the next one"),
    "epopt_cheetah_randomised": ("epopt.py", f"{RUNNING_ENSEMBLE} --epsilon 1", (1,), 10, "lower p10"),
    "epopt_run": ("epopt.py", "", TEN, 2, "p10 above the next two"),
    "epopt_run_randomised": ("epopt.py", "--epsilon 1", TEN, 2, "p10 above the next one"),
    "epopt_run_single": ("epopt.py", "--epsilon 1 --ensemble single", TEN, 2, "lowest p10"),
    "epopt_run_uniform": ("epopt.py", "--ensemble uniform", (1, 2, 3), 2, "against normal draws"),
    "epopt_run_adapted": ("epopt.py", "--adapt-to-target", TEN, 2, "the target above epopt_run"),
    "darc_cheetah": (
        "darc_offdynamics.py",
        f"{BROKEN_CHEETAH} --correction-scale 0.2",
        (1, 2, 3),
        15,
        "above the last two",
    ),
    "darc_cheetah_full": ("darc_offdynamics.py", BROKEN_CHEETAH, (1,), 27, "what a nat costs"),
    "darc_cheetah_source": (
        "darc_offdynamics.py",
        f"{BROKEN_CHEETAH} --method source",
        (1, 2, 3),
        10,
        "below DARC",
    ),
    "darc_cheetah_target": (
        "darc_offdynamics.py",
        f"{BROKEN_CHEETAH} --method target --total-timesteps 20000 --updates-per-step 2 --num-envs 1",
        (1, 2, 3),
        8,
        "SAC in the target alone: DARC's target steps, DARC's gradient steps",
    ),
    "darc_cheetah_weighting": (
        "darc_offdynamics.py",
        f"{BROKEN_CHEETAH} --method importance_weighting",
        (1, 2, 3),
        15,
        "below DARC",
    ),
    "compare_pointgoal_rl2": ("rl2_ppo.py", f"{ON_PLANE} {RL2_PLANE}", (1, 2, 3), 14, "optimum -.488"),
    "compare_pointgoal_maml": ("maml_trpo.py", f"{ON_PLANE} --eval-every 5", (1, 2, 3), 4, "optimum -.488"),
    "compare_pointgoal_pearl": ("pearl_sac.py", f"{ON_PLANE} {PEARL_PLANE}", (1, 2, 3), 11, "optimum -.488"),
    "compare_pointgoal_told": (
        "mtl_contextual.py",
        f"{ON_PLANE} {TOLD_PLANE}",
        (1, 2, 3),
        7,
        "optimum -.488",
    ),
    "compare_pointgoal_nothing": (
        "mtl_contextual.py",
        f"{ON_PLANE} {TOLD_PLANE} --context none",
        (1, 2, 3),
        4,
        "standing still -37.8",
    ),
    "compare_sparse_rl2": ("rl2_ppo.py", f"{ON_ARC} {RL2_ARC}", (1, 2, 3), 4, "optimum 13.39"),
    "compare_sparse_maml": ("maml_trpo.py", f"{ON_ARC} --eval-every 10", (1, 2, 3), 5, "optimum 13.39"),
    "compare_sparse_pearl": ("pearl_sac.py", PEARL_ARC, (1, 2, 3), 6, "optimum 13.39"),
    "compare_sparse_told": (
        "mtl_contextual.py",
        f"{ON_ARC} {TOLD_PLANE} {HER}",
        (1, 2, 3),
        4,
        "optimum 13.39",
    ),
    "compare_sparse_nothing": (
        "mtl_contextual.py",
        f"{ON_ARC} {TOLD_PLANE} --context none",
        (1, 2, 3),
        4,
        "the best single place",
    ),
    "compare_cheetah_vel_rl2": ("rl2_ppo.py", f"{RUNNING} {RL2_RUNNING}", (1, 2), 30, "VariBAD's RL^2"),
    "compare_cheetah_vel_maml": (
        "maml_trpo.py",
        f"{RUNNING} {MAML_RUNNING}",
        (1, 2),
        36,
        "standing still -282",
    ),
    "compare_cheetah_vel_pearl": (
        "pearl_sac.py",
        f"{RUNNING} {PEARL_RUNNING}",
        (1, 2),
        40,
        "PEARL -40 to -50",
    ),
    "compare_cheetah_vel_told": (
        "mtl_contextual.py",
        f"{RUNNING} {TOLD_RUNNING}",
        (1,),
        20,
        "the upper bound",
    ),
    "compare_cheetah_vel_nothing": (
        "mtl_contextual.py",
        f"{RUNNING} {TOLD_RUNNING} --context none",
        (1,),
        20,
        "the lower bound",
    ),
    "rl2_maze": ("rl2_ppo.py", MAZE, (1,), 40, "explorer 32.5 steps, shortest path 11.7"),
}


def run_seed(name, seed, run_dir, threads):
    """Train one seed of an entry, or go on with it, or find it finished. Returns its run folder."""
    script, flags, _, _, _ = ENTRIES[name]
    parent = run_dir / name
    found = sorted(parent.glob(f"*__{seed}__*/checkpoint.pt"))
    command = [sys.executable, str(ROOT / script), *flags.split()]
    if found:  # the script refuses other flags than a run has, but for a longer total, which it trains on to
        command += ["--resume", str(found[-1].parent)]
    else:
        command += ["--seed", str(seed), "--run-dir", str(parent)]
    parent.mkdir(parents=True, exist_ok=True)
    if not found:  # the code that a run began with is the code its numbers belong to
        (parent / f"seed{seed}.commit").write_text(git_commit())
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    with open(parent / f"seed{seed}.log", "a") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment).returncode
    if code:
        sys.exit(f"error: {' '.join(command)} ended with {code}, see {log.name}")
    return sorted(parent.glob(f"*__{seed}__*/checkpoint.pt"))[-1].parent


def sweep(name):
    """An entry as a sweep of Weights & Biases: its flags fixed, its seeds a grid. JSON is YAML, too."""
    script, flags, seeds, _, _ = ENTRIES[name]
    command = ["${env}", "python", "${program}", *flags.split(), "--track", "${args}"]
    grid = {"method": "grid", "parameters": {"seed": {"values": list(seeds)}}}
    return {"name": name, "program": script, **grid, "command": command}


def git_commit():
    """The short hash of HEAD, with a + when files differ from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def summarize(name, folders):
    """Write results/NAME.csv: one row a seed, its last evaluation and all that is needed to doubt it."""
    rows = []
    for folder in folders:
        args = json.loads((folder / "args.json").read_text())
        log = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [row for row in log if "eval/return_ep0" in row][-1]
        seconds = sum(row["time/rollout"] + row["time/update"] + row.get("time/evaluate", 0) for row in log)
        commit = (folder.parent / f"seed{args['seed']}.commit").read_text()
        row = {"name": name, "command": f"{ENTRIES[name][0]} {ENTRIES[name][1]}", "seed": args["seed"]}
        row |= {"global_step": last["global_step"], "minutes": round(seconds / 60, 2)}
        rounds = {key: value for row in log for key, value in row.items() if key.startswith("adapt/")}
        measured = {key: value for key, value in last.items() if key.startswith("eval/")} | rounds
        row |= {key: round(value, 5) for key, value in measured.items()}
        row |= {"commit": commit, "date": time.strftime("%Y-%m-%d"), "machine": platform.machine()}
        row |= {package: version(package) for package in ("torch", "gymnasium", "numpy")}
        rows.append(row)
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        stages = [row[key] for key in row if key.startswith("eval/return_ep")]
        trial = f", sum {row['eval/return_trial']:.3f}" if "eval/return_trial" in row else ""
        print(f"{name} seed {row['seed']}: {', '.join(f'{value:.3f}' for value in stages)}{trial}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="entries to run; none: list them")
    parser.add_argument("--run-dir", default="runs", help="where run folders lie")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, a thread each")
    parser.add_argument("--sweep", action="store_true", help="run nothing, print a sweep for W&B's agents")
    options = parser.parse_args()
    matches = {name: fnmatch.filter(ENTRIES, name) for name in options.names}
    unknown = {name for name, found in matches.items() if not found}
    if unknown:
        sys.exit(f"error: no entry named {', '.join(sorted(unknown))}; there are {', '.join(ENTRIES)}")
    if not options.names:
        for name, (script, flags, seeds, minutes, reference) in ENTRIES.items():
            print(f"{name}: {script} {flags}\n    seeds {seeds}, about {minutes} minutes each; {reference}")
        return
    options.names = list(dict.fromkeys(name for found in matches.values() for name in found))
    if options.sweep:
        if len(options.names) > 1:
            sys.exit(f"error: --sweep takes one entry, these are {', '.join(options.names)}")
        print(json.dumps(sweep(options.names[0]), indent=2))
        return
    threads = 1 if options.jobs > 1 else 0
    with ThreadPoolExecutor(options.jobs) as pool:
        run_dir = Path(options.run_dir).absolute()
        runs = {
            n: [pool.submit(run_seed, n, seed, run_dir, threads) for seed in ENTRIES[n][2]]
            for n in options.names
        }
        for name, jobs in runs.items():
            summarize(name, [job.result() for job in jobs])


if __name__ == "__main__":
    main()
