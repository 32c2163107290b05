"""What a run leaves behind: the same numbers again, exact resume, W&B, and one line for every bad input.

Every run here is tiny. Where a run must die it is a process of its own, forked by a server that has
imported the script already.
"""

import contextlib
import dataclasses
import errno
import functools
import inspect
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import typing
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from conftest import ROOT, script

import common


class Job:
    """A script and a tiny job for it, of which an iteration takes `steps` environment steps.

    policy: its networks' name in a checkpoint; long_tasks: other tasks to try, with environment steps.
    """

    def __init__(self, name, env_id, steps, flags, policy, long_tasks):
        self.name, self.env_id, self.steps, self.policy = name, env_id, steps, policy
        self.long_tasks, self.module = long_tasks, script(name)
        flags += " --hidden-size 8 --eval-tasks 20 --eval-every 2 --save-every 2 --device cpu"
        self.tiny = f"--env-id {env_id} {flags}".split()


EARLY_ENDS = {"Maze-v0": 14400, "PointRobot-v0": 3840, "HalfCheetahDir-v0": 24000}
RL2 = "--num-envs 16 --epochs 1 --minibatches 2 --episodes-per-trial 3"
MAML = "--num-tasks 3 --episodes-per-task 4 --eval-episodes 4"
PEARL = "--train-tasks 4 --num-tasks 2 --batch-size 4 --episodes-per-task 2 --context-episodes 2"
MTL = "--train-tasks 4 --num-tasks 2 --batch-size 5 --replay-episodes 6"
DARC = "--num-envs 4 --batch-size 8 --replay-episodes 6 --eval-episodes 3 --warmup-steps 240"
EPOPT = "--num-models 4 --particles 10"
JOBS = {
    job.name: job
    for job in (
        Job("rl2_ppo", "Bandit5-v0", 48, RL2, "agent", EARLY_ENDS),
        Job("maml_trpo", "Bandit5-v0", 24, MAML, "policy", EARLY_ENDS),
        Job(
            "pearl_sac",
            "PointRobot-v0",
            160,
            f"{PEARL} --context-rounds 2 --replay-episodes 6 --updates-per-step 0.02",
            "agent",
            {"PointGoal-v0": 3200, "HalfCheetahDir-v0": 8000},
        ),
        Job(
            "mtl_contextual",
            "PointRobot-v0",
            80,
            f"{MTL} --context goal --her future --eval-episodes 3 --updates-per-step 0.04",
            "agent",
            {"PointGoal-v0": 1600, "ReacherGoal-v0": 1000},
        ),
        Job(
            "darc_offdynamics",
            "GaussianPair-v0",
            160,
            f"{DARC} --target-ratio 1 --updates-per-step 0.04",
            "agent",
            {"PointWall-v0": 3000, "BrokenReacher-v0": 2400},
        ),
        Job(
            "epopt",
            "conftest:ShortPendulum-v0",
            80,
            f"{EPOPT} --epsilon 0.5 --warmup-iterations 2 --eval-episodes 2 --fisher-fraction 0.5",
            "policy",
            {"CartPoleRunEnsemble-v0": 1000, "HopperEnsemble-v0": 1000},
        ),
    )
}
SAC = ("mtl_contextual", "darc_offdynamics")
LONG_TASKS = [(job.name, env_id) for job in JOBS.values() for env_id in job.long_tasks]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
)  # for the server
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [*JOBS, "torch._dynamo", "conftest", "test_plumbing"]
)  # what a first update imports, too


@pytest.fixture(scope="module", params=JOBS)
def job(request):
    return JOBS[request.param]


def train(job, folder, iterations=6, *flags):
    """A run in this process. Returns its folder."""
    steps = str(job.steps * iterations)
    job.module.main([*job.tiny, "--total-timesteps", steps, "--run-dir", str(folder), *flags])
    return only_run(folder)


def only_run(folder):
    (run,) = Path(folder).glob("*__*__*")
    return run


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_time(rows):
    return [
        {key: value for key, value in row.items() if not key.startswith("time/") and key != "charts/SPS"}
        for row in rows
    ]


def checkpoint_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def assert_same(a, b, path="checkpoint"):
    """Bit for bit, whatever it is made of."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{index}]")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, path


def assert_same_run(run, reference):
    """The same rows once each, and the same last checkpoint, but for the clock and the name of the folder."""
    assert without_time(rows_of(run)) == without_time(rows_of(reference))
    found, expected = checkpoint_of(run), checkpoint_of(reference)
    assert found.keys() == expected.keys()
    for key in found.keys() - {"args", "metrics_bytes", "wandb_id"}:
        assert_same(found[key], expected[key], key)


def the_error(text):
    """The one line of stderr that begins with "error: "; beside it only the bar may stand there."""
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and all("step/s" in line for line in lines if line not in errors), text
    assert 10 < len(errors[0]) < 1600  # that of an unknown id lists all
    return errors[0]


def one_line(call, *arguments):
    """The one line with which a call ends the program."""
    words = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(words):
        call(*arguments)
    assert stop.value.code not in (None, 0)
    return the_error(words.getvalue() + (f"\n{stop.value.code}" if isinstance(stop.value.code, str) else ""))


# ---- runs in processes of their own


def run_main(name, argv, errors=None, environ=None, kill=None, max_file=None):
    """What a child does. kill: (module, function, n, moment), SIGKILL itself at the n-th call of it."""
    with open(errors or os.devnull, "w") as handle, open(os.devnull, "w") as nowhere:
        os.dup2(handle.fileno(), 2)
        os.dup2(nowhere.fileno(), 1)
    sys.stderr, sys.stdout = (os.fdopen(number, "w", closefd=False) for number in (2, 1))
    os.environ.update(environ or {})
    torch.set_num_threads(1)
    if max_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file, max_file))
    if kill:
        module, function, call, moment = kill
        owner = {"os": os, "torch": torch, "job": JOBS[name].module, "Path": Path}[module]
        shipped, calls = getattr(owner, function), []

        def deadly(*args, **kwargs):
            calls.append(1)
            if len(calls) == call and moment == "half":  # half a file, as far as the disk is concerned
                if module == "torch":
                    args[1].write(b"PK half a checkpoint")
                    args[1].flush()
                else:
                    os.truncate(args[0], 0) if args[0].exists() else args[0].touch()
            result = shipped(*args, **kwargs) if len(calls) < call or moment == "after" else None
            if len(calls) == call:
                time.sleep(1.0 if environ else 0.0)  # for W&B to write what it was sent
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, function, deadly)
    JOBS[name].module.main(argv)


def start(job, *args, **kwargs):
    process = CONTEXT.Process(target=run_main, args=(job.name, *args), kwargs=kwargs)
    process.start()
    return process


def finish(job, *args, **kwargs):
    process = start(job, *args, **kwargs)
    process.join(120)
    return process.exitcode


# ---- the same again


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(job, tmp_path):
    first, again, other = (
        train(job, tmp_path / name, 4, "--seed", seed) for name, seed in (("a", "3"), ("b", "3"), ("c", "4"))
    )
    assert_same_run(again, first)
    assert without_time(rows_of(other)) != without_time(rows_of(first))


def test_a_run_writes_a_row_an_iteration_with_the_keys_that_every_script_has(job, tmp_path):
    run = train(job, tmp_path, 5)
    rows = rows_of(run)
    assert [row["global_step"] for row in rows] == [job.steps * (i + 1) for i in range(5)]
    assert [row["charts/iteration"] for row in rows] == [1, 2, 3, 4, 5]
    assert [i + 1 for i, row in enumerate(rows) if "eval/return_ep0" in row] == [
        2,
        4,
        5,
    ]  # every second, and the last
    last = 0 if job.name == "epopt" else 2  # nothing is adapted to a held-out model, so nothing has stages
    expected = {
        "eval/return_ep0",
        f"eval/return_ep{last}",
        "eval/adaptation_gain",
        f"eval/adapt_steps_ep{last}",
        "charts/SPS",
    }
    expected |= {"debug/grad_norm", "debug/entropy", "debug/explained_variance"}
    expected |= {"debug/alpha"} if job.name in SAC else {"debug/kl"}  # SAC knows no KL
    assert expected <= rows[-1].keys()
    assert {key.split("/")[0] for key in rows[-1]} == {
        "global_step",
        "eval",
        "charts",
        "losses",
        "debug",
        "time",
    }
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert json.loads((run / "args.json").read_text())["hidden_size"] == 8
    assert re.fullmatch(rf"{job.name}__{re.sub(':', '.', job.env_id)}__1__\d{{8}}-\d{{6}}", run.name)
    assert sorted(file.name for file in run.iterdir()) == ["args.json", "checkpoint.pt", "metrics.jsonl"]


# ---- exact resume


@pytest.fixture(scope="module")
def uninterrupted(job, tmp_path_factory):
    """24 iterations that nothing disturbs."""
    return train(job, tmp_path_factory.mktemp("uninterrupted"), 24)


@pytest.mark.parametrize("cut", [1, 2, 3, 12])
def test_2n_iterations_equal_n_and_a_cut_and_the_rest(job, tmp_path, uninterrupted, monkeypatch, cut):
    def stop_there(run, global_step, metrics, shipped=job.module.log):
        shipped(run, global_step, metrics)
        if global_step == job.steps * cut:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job.module, "log", stop_there)
        train(job, tmp_path, 24)
    run = only_run(tmp_path)
    assert len(rows_of(run)) == cut
    job.module.main(["--resume", str(run)])
    assert_same_run(run, uninterrupted)
    job.module.main(
        ["--resume", str(run / "checkpoint.pt")]
    )  # there is nothing left to do, and nothing is done
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize(("name", "env_id"), LONG_TASKS)
def test_resuming_is_exact_where_episodes_end_early_and_where_actions_are_continuous(
    tmp_path, monkeypatch, name, env_id
):
    job = JOBS[name]
    if env_id in ("HalfCheetahDir-v0", "ReacherGoal-v0", "BrokenReacher-v0"):
        pytest.importorskip("mujoco")
    iterations = job.long_tasks[env_id] // job.steps  # of the tiny job; these are longer
    check_exact_resume(job, tmp_path, monkeypatch, iterations, "--env-id", env_id)


@pytest.mark.parametrize("flag", ["--value-by-step", "--bilinear", "--normalize-inputs"])
def test_resuming_is_exact_with_each_way_of_reading_and_of_standardising(tmp_path, monkeypatch, flag):
    check_exact_resume(JOBS["rl2_ppo"], tmp_path, monkeypatch, 6, flag)


def check_exact_resume(job, tmp_path, monkeypatch, iterations, *flags):
    """Cut after two iterations and resumed, a run ends as one that nothing disturbed."""
    flags = [*flags, "--save-every", "1", "--eval-every", "3", "--eval-tasks", "4"]
    reference = train(job, tmp_path / "reference", iterations, *flags)

    def stop_there(run, *args, shipped=job.module.log):
        shipped(run, *args)
        if args[1]["charts/iteration"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job.module, "log", stop_there)
        train(job, tmp_path / "cut", iterations, *flags)
    run = only_run(tmp_path / "cut")
    job.module.main(["--resume", str(run)])
    assert len(rows_of(run)) > 2
    assert_same_run(run, reference)


def test_worlds_whose_episode_is_over_are_not_simulated(job, tmp_path, monkeypatch):
    pytest.importorskip("mujoco")
    from common.locomotion import Locomotion

    falls = {"darc_offdynamics": "HopperGravity2-v0", "epopt": "HopperEnsemble-v0"}
    flags = ["--env-id", falls.get(job.name, "HopperRandParams-v0"), "--eval-tasks", "2"]
    flags += ["--context", "none", "--her", "none"] if job.name == "mtl_contextual" else []
    simulated, step_physics = [], Locomotion.step_physics

    def watched(env, action):
        simulated.append(1 if env._awake is None else len(env._awake) / env.num_envs)
        return step_physics(env, action)

    monkeypatch.setattr(Locomotion, "step_physics", watched)
    train(job, tmp_path, 1, *flags)
    assert 0 < min(simulated) < 1


def test_killed_again_and_again_at_random_moments_and_resumed_it_is_the_same_run(
    job, tmp_path, uninterrupted
):
    """Most kills wait for a checkpoint that is being written. The one on disk is always whole."""
    dice = random.Random(int.from_bytes(os.urandom(4), "little"))
    argv = [*job.tiny, "--total-timesteps", str(24 * job.steps), "--run-dir", str(tmp_path)]
    deaths = 0
    for attempt in range(40):
        process = start(job, argv)
        deadline = time.monotonic() + 60
        while (
            not list(tmp_path.glob("*/metrics.jsonl")) and process.is_alive() and time.monotonic() < deadline
        ):
            time.sleep(0.002)
        unfinished = only_run(tmp_path) / "checkpoint.pt.tmp"
        if attempt < 4 or attempt % 2:
            while not unfinished.exists() and process.is_alive() and time.monotonic() < deadline:
                pass
        else:
            time.sleep(dice.uniform(0.0, 0.2))
        process.kill()
        process.join()
        run = only_run(tmp_path)
        deaths += process.exitcode == -signal.SIGKILL
        if (run / "checkpoint.pt").exists():
            step = checkpoint_of(run)["global_step"]
            argv = ["--resume", str(run)]
            if step == 24 * job.steps:
                break
        else:  # killed before its first checkpoint: there is nothing to resume, and it says so
            assert "there is no checkpoint" in one_line(job.module.main, ["--resume", str(run)])
            for file in run.iterdir():
                file.unlink()
            run.rmdir()
    job.module.main(argv)
    assert deaths >= 2
    assert_same_run(only_run(tmp_path), uninterrupted)


MOMENTS = [
    ("torch", "save", 4, "half"),
    ("os", "fsync", 4, "before"),
    ("os", "replace", 4, "before"),
    ("os", "replace", 4, "after"),
    ("job", "log", 7, "after"),
]


@pytest.mark.parametrize("kill", MOMENTS, ids=lambda kill: "-".join(map(str, kill)))
def test_a_kill_in_the_middle_of_saving_leaves_a_whole_checkpoint_and_an_exact_resume(
    job, tmp_path, uninterrupted, kill
):
    argv = [*job.tiny, "--total-timesteps", str(24 * job.steps), "--run-dir", str(tmp_path)]
    assert finish(job, argv, kill=kill) == -signal.SIGKILL
    run = only_run(tmp_path)
    expected = 3 if kill[3] == "after" else 2  # the first save is that of the beginning
    assert checkpoint_of(run)["global_step"] == job.steps * 2 * expected
    job.module.main(["--resume", str(run)])
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("write", [1, 2])
def test_a_kill_in_the_middle_of_resuming_does_no_harm(job, tmp_path, uninterrupted, write):
    """Killed where a small file of the run folder has been emptied and not yet been written again."""
    argv = [*job.tiny, "--total-timesteps", str(24 * job.steps), "--run-dir", str(tmp_path)]
    assert finish(job, argv, kill=("job", "log", 7, "after")) == -signal.SIGKILL
    run = only_run(tmp_path)
    assert finish(job, ["--resume", str(run)], kill=("Path", "write_text", write, "half")) in (
        -signal.SIGKILL,
        0,
    )
    job.module.main(["--resume", str(run)])
    assert_same_run(run, uninterrupted)


def test_resume_makes_do_with_the_checkpoint_alone(job, tmp_path, uninterrupted):
    """metrics.jsonl may have stayed elsewhere; what is written from here on must still be readable."""
    job.module.main([*job.tiny, "--total-timesteps", str(2 * job.steps), "--run-dir", str(tmp_path)])
    run = only_run(tmp_path)
    (run / "metrics.jsonl").unlink()
    job.module.main(["--resume", str(run), "--total-timesteps", str(4 * job.steps)])
    assert [row["global_step"] for row in rows_of(run)] == [3 * job.steps, 4 * job.steps]


def test_a_finished_run_can_be_given_more_steps(job, tmp_path):
    run = train(job, tmp_path, 2)
    job.module.main(["--resume", str(run), "--total-timesteps", str(5 * job.steps)])
    assert [row["global_step"] for row in rows_of(run)] == [job.steps * (i + 1) for i in range(5)]


# ---- Weights & Biases


def wandb_records(file):
    """The records of a .wandb file, for which W&B ships no reader.

    It is a LevelDB log of protocol buffers: blocks of 32 KiB, records cut into pieces to fill them.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, pieces = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        piece = data[place + 7 : place + 7 + length]
        if kind == 0 or len(piece) < length:
            break  # a killed run's last record may be torn
        place += 7 + length
        pieces = piece if kind in (1, 2) else pieces + piece
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(pieces)


def read_back(run):
    """A run's offline segments in order: history rows without W&B's own columns, config, axes, ids."""
    rows, config, axes, ids = [], {}, set(), set()
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.append({key: value for key, value in items.items() if not key.startswith("_")})
            elif kind == "run":
                ids.add(record.run.run_id)
                config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
            elif kind == "metric":
                axes.add((record.metric.glob_name or record.metric.name, record.metric.step_metric))
    return rows, config, axes, ids


def test_wandb_gets_every_row_once_even_if_the_run_dies_and_is_resumed(job, tmp_path):
    pytest.importorskip("wandb")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    argv = [
        *job.tiny,
        "--track",
        "--save-every",
        "4",
        "--total-timesteps",
        str(9 * job.steps),
        "--run-dir",
        str(tmp_path),
    ]
    errors = tmp_path / "errors"
    assert finish(job, argv, errors, offline, kill=("job", "log", 7, "after")) == -signal.SIGKILL, (
        errors.read_text()
    )
    run = only_run(tmp_path)
    assert checkpoint_of(run)["global_step"] == 4 * job.steps and len(rows_of(run)) == 7
    assert len(read_back(run)[0]) >= 4, "W&B has lost what was logged before the checkpoint"
    time.sleep(1.1)  # segments are named by the second
    command = [sys.executable, f"{job.name}.py", "--resume", str(run)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, config, axes, ids = read_back(run)
    assert without_time(rows) == without_time(rows_of(run))
    assert [row["global_step"] for row in rows] == [job.steps * (i + 1) for i in range(9)]
    assert ("*", "global_step") in axes
    assert ids == {checkpoint_of(run)["wandb_id"]}
    assert (config["hidden_size"], config["env_id"], config["seed"]) == (8, job.env_id, 1)
    assert {field.name for field in dataclasses.fields(job.module.Args)} <= config.keys()
    assert [file.name for file in run.glob("wandb/offline-run-*/files/code/**/*.py")] == [f"{job.name}.py"]


def test_wandb_is_not_touched_unless_asked(job, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now fails
    train(job, tmp_path, 2)


# ---- the command line


def comments_of_args(job):
    """Field -> its trailing comment in the source."""
    lines = inspect.getsource(job.module.Args).splitlines()
    found = [re.match(r"\s+(\w+): [\w.\[\], ]+ = .*?  # (.+)", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def test_help_explains_every_flag(job, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        job.module.main(["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    squeezed = re.sub(
        r"[^!-~]", "", re.sub(r"\x1b\[[0-9;]*m", "", text)
    )  # without colours, boxes and line breaks
    comments = comments_of_args(job)
    for field in dataclasses.fields(job.module.Args):
        assert f"--{field.name.replace('_', '-')}" in text
        assert len(comments[field.name]) > 5
        assert re.sub(r"[^!-~]", "", comments[field.name]) in squeezed, (
            f"--help does not explain {field.name}"
        )
    assert job.module.__doc__.split(":")[0] in text


def test_every_default_has_its_declared_type(job):
    for field in dataclasses.fields(job.module.Args):
        declared = typing.get_origin(field.type) or field.type
        assert type(field.default) is declared, field.name
        for part in field.default if declared is tuple else ():
            assert type(part) is typing.get_args(field.type)[0], field.name


def test_evaluate_prints_the_table_and_leaves_everything_as_it_was(job, tmp_path, capsys):
    run = train(job, tmp_path, 4)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in run.iterdir()}
    capsys.readouterr()
    job.module.main(["--evaluate", str(run), "--run-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in run.iterdir()} == before
    assert only_run(tmp_path) == run  # no other folder
    last = rows_of(run)[-1]
    for episode in range(1 if job.name == "epopt" else 3):  # the same frozen tasks and seeds as in training
        assert re.search(rf"^\s*{episode} .*{last[f'eval/return_ep{episode}']:.3f}", printed, re.MULTILINE)
    assert f"{job.env_id.split(':')[-1]}: 20 held-out tasks" in printed


def test_the_last_words_of_a_run_say_where_it_is_and_how_to_plot_it(job, tmp_path, capsys):
    run = train(job, tmp_path / "two words", 2)
    printed = capsys.readouterr().out
    assert shlex.split(printed.splitlines()[-1])[-1] == str(run)  # as a shell would read it
    assert (
        str(run) in printed
        and "benchmark.plot" in printed
        and re.search("reference, an episode: random -?[0-9.]+", printed)
    )


# ---- bad input: one line that names the flag and the value, before any training, and no run folder


@pytest.fixture
def no_training(tmp_path, monkeypatch):
    """Nothing may be played and no folder made."""
    for job in JOBS.values():
        monkeypatch.setattr(job.module, "rollout", lambda *args: pytest.fail("training began"))
    parent = tmp_path / "runs"
    yield ["--run-dir", str(parent)]
    assert not parent.exists()


ABOVE_ZERO, NOT_BELOW, UNIT = ("0", "-3", "nan", "inf"), ("-0.1", "nan", "inf"), ("-0.1", "1.1", "nan")
WRONG = {  # script -> flag -> values
    "": {
        "total-timesteps": ("0", "-3", "nan"),
        "eval-every": ("0", "-3"),
        "save-every": ("0", "-3"),
        "hidden-size": ("0", "-3", "abc", "2.5", "5e3"),
    }
    | {"eval-tasks": ("-1", "100001"), "seed": ("-1",), "device": ("tpu",), "gamma": UNIT},
    "rl2_ppo": {
        "gae-lambda": UNIT,
        "lr": (*ABOVE_ZERO, "fast"),
        "clip": ABOVE_ZERO,
        "max-grad-norm": ABOVE_ZERO,
        "entropy-coef": NOT_BELOW,
        "value-coef": NOT_BELOW,
    }
    | {"bptt-window": ("-1", "2", "6"), "minibatches": ("0", "-3", "5", "32")}
    | dict.fromkeys(("num-envs", "episodes-per-trial", "epochs"), ("0", "-3")),
    "maml_trpo": dict.fromkeys(("inner-lr", "init-std", "max-kl", "eval-lr-factor"), ABOVE_ZERO)
    | dict.fromkeys(("num-tasks", "episodes-per-task", "cg-steps", "eval-episodes"), ("0", "-3"))
    | {
        "gae-lambda": UNIT,
        "inner-steps": ("-1", "1.5"),
        "tasks-at-once": ("-1",),
        "cg-damping": NOT_BELOW,
        "fisher-fraction": ("0", "1.1", "nan"),
        "inner-objective": ("reinforce",),
    },
    "pearl_sac": dict.fromkeys(("updates-per-step", "lr", "reward-scale", "alpha"), ABOVE_ZERO)
    | dict.fromkeys(
        ("latent-size", "hidden-layers", "batch-size", "context-stride", "eval-prior-episodes"), ("0", "-3")
    )
    | {
        "num-tasks": ("0", "5"),  # of 4 training tasks
        "prior-episodes": ("0", "3"),  # of 2 in a round
        "context-episodes": ("0", "3"),
        "replay-episodes": ("0", "3"),  # 2 rounds of 2 are drawn from
        "context": ("everything",),
        "context-data": ("posterior",),
        "kl-coef": NOT_BELOW,
        "gamma": ("1",),
        "tau": ("0", "1.1", "nan"),
    },
    "mtl_contextual": dict.fromkeys(("updates-per-step", "lr", "reward-scale", "alpha"), ABOVE_ZERO)
    | dict.fromkeys(("hidden-layers", "batch-size", "her-k", "train-tasks", "eval-episodes"), ("0", "-3"))
    | {
        "num-tasks": ("0", "5"),  # of 4 training tasks
        "replay-episodes": ("0", "-3"),
        "context": ("everything",),
        "her": ("past",),
        "gamma": ("1",),
        "tau": ("0", "1.1", "nan"),
    },
    "darc_offdynamics": dict.fromkeys(("updates-per-step", "lr", "reward-scale", "alpha"), ABOVE_ZERO)
    | dict.fromkeys(("hidden-layers", "num-envs", "eval-episodes", "replay-episodes"), ("0", "-3"))
    | dict.fromkeys(("input-noise", "decay", "warmup-steps"), ("-1",))
    | {
        "batch-size": ("0", "-4", "10"),  # of 4 environments
        "target-ratio": ("0", "-0.1", "nan"),
        "method": ("magic",),
        "gamma": ("1",),
        "tau": ("0", "1.1", "nan"),
    },
}
WRONG["epopt"] = (
    dict.fromkeys(("init-std", "max-kl", "model-noise"), ABOVE_ZERO)
    | dict.fromkeys(("epsilon", "fisher-fraction", "min-ess"), ("0", "1.1", "nan"))
    | dict.fromkeys(("num-models", "particles", "transitions", "cg-steps", "adapt-rounds"), ("0", "-3"))
    | {"gae-lambda": UNIT, "warmup-iterations": ("-1",), "cg-damping": NOT_BELOW, "ensemble": ("gamma",)}
)
BAD = [
    (name, f"--{flag}", value)
    for name in JOBS
    for part in ("", name)
    for flag in WRONG[part]
    for value in WRONG[part][flag]
]


@pytest.mark.parametrize(("name", "flag", "value"), BAD, ids="=".join)
def test_a_number_out_of_range_is_named(no_training, name, flag, value):
    job = JOBS[name]
    message = one_line(job.module.main, [*job.tiny, *no_training, flag, value])
    assert flag in message and value.rstrip("0").rstrip(".") in message


@pytest.mark.parametrize("seed", [2**30, 2**32 - 1, 2**32, 2**63])
def test_a_seed_that_is_too_large_is_named(job, no_training, seed):
    message = one_line(job.module.main, [*job.tiny, *no_training, "--seed", str(seed)])
    assert message.startswith(f"error: --seed {seed}")


@pytest.mark.parametrize("flag", ["--hidden-size", "--eval-every", "--eval-tasks"])
def test_a_number_too_large_for_pytorch_is_named(job, no_training, flag):
    for value in (10**12, 2**63, 10**23):
        message = one_line(job.module.main, [*job.tiny, *no_training, flag, str(value)])
        assert message == f"error: {flag} {value}: expected a number below 10^12"


def test_an_unknown_environment_lists_the_known_ones(job, no_training):
    for env_id in ("CartPole-v1", "Bandit5", "nonsense"):
        message = one_line(job.module.main, [*job.tiny, *no_training, "--env-id", env_id])
        assert f"--env-id {env_id}" in message and "Bandit5-v0" in message and "GridNavi-v0" in message
    assert "no_such_module" in one_line(
        job.module.main, [*job.tiny, *no_training, "--env-id", "no_such_module:Mine-v0"]
    )


def test_a_mode_that_wandb_does_not_have(tmp_path):
    pytest.importorskip("wandb")
    job = JOBS["rl2_ppo"]  # wandb reads its settings once a process
    command = [sys.executable, f"{job.name}.py", *job.tiny, "--track", "--run-dir", str(tmp_path)]
    mode = {**os.environ, "WANDB_MODE": "off"}
    done = subprocess.run(command, cwd=ROOT, env=mode, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(r"error: --track: .*mode.*'off'.*\n", done.stderr)


def test_complaints_of_many_lines_become_one(job, no_training, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("one\n  and two")

    monkeypatch.setattr(job.module.common, "make", refuse)
    message = one_line(job.module.main, [*job.tiny, *no_training])
    assert message == f"error: --env-id {job.env_id}: one and two"


def test_an_adapted_environment_that_gymnasium_does_not_know(job, no_training):
    common.register("NoInner-v0", "NoSuchEnv-v1", print, low=[0.0], high=[1.0])
    try:
        message = one_line(job.module.main, [*job.tiny, *no_training, "--env-id", "NoInner-v0"])
    finally:
        gym.registry.pop("NoInner-v0")
    assert "--env-id NoInner-v0" in message and "NoSuchEnv" in message


def test_compile_without_a_compiler(job, no_training, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        message = one_line(job.module.main, [*job.tiny, *no_training, "--compile"])
    assert message.startswith("error: --compile: PyTorch needs a C++ compiler")
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/no/headers/here")
    assert one_line(job.module.main, [*job.tiny, *no_training, "--compile"]) == message


def test_cuda_without_cuda(job, no_training, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # on a machine with a GPU, too
    message = one_line(job.module.main, [*job.tiny, *no_training, "--device", "cuda"])
    assert "--device cuda" in message and "cpu" in message


SAC = ("pearl_sac", "mtl_contextual", "darc_offdynamics")


@pytest.mark.parametrize("name", SAC)
@pytest.mark.parametrize("episodes", [10**9, 10**11])
def test_replay_that_no_memory_holds(no_training, name, episodes):
    job = JOBS[name]
    message = one_line(job.module.main, [*job.tiny, *no_training, "--replay-episodes", str(episodes)])
    assert f"--replay-episodes {episodes}" in message and re.search(r"would take \d+.\d GB", message)


@pytest.mark.parametrize("name", SAC)
@pytest.mark.parametrize("where", ["obs", "reward", "train_reward"])
def test_numbers_that_are_not_finite_do_not_enter_replay(name, where):
    replay = JOBS[name].module.ReplayBuffer(2, 3, 4, 5, 1, "cpu")
    shapes = {"obs": (2, 5, 5), "action": (2, 4, 1)}
    names = ("obs", "action", "reward", "train_reward", "terminated", "valid")
    episode = {key: torch.ones(shapes.get(key, (2, 4))) for key in names}
    replay.add(episode)
    episode[where][1, 2] = math.inf
    with pytest.raises(common.ContractError, match="is not finite"):
        replay.add(episode)
    assert replay.count == 1 and torch.isfinite(replay.data[where]).all()


def test_flags_that_do_not_exist_or_have_no_value(job, no_training):
    assert "--learning-rate" in one_line(job.module.main, [*job.tiny, *no_training, "--learning-rate", "1"])
    assert "--gamma" in one_line(job.module.main, [*job.tiny, *no_training, "--gamma"])
    assert "stray" in one_line(job.module.main, [*job.tiny, *no_training, "stray"])


def test_evaluate_and_resume_together(job, no_training):
    message = one_line(job.module.main, [*no_training, "--evaluate", "a", "--resume", "b"])
    assert "--evaluate" in message and "--resume" in message


def test_from_the_shell_an_error_is_one_line_on_stderr_and_exit_code_1(job, tmp_path):
    command = [sys.executable, f"{job.name}.py", "--eval-every", "0", "--run-dir", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "runs").exists()
    assert done.stderr == "error: --eval-every 0: expected a positive number\n"


# ---- bad checkpoints


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    return train(job, tmp_path_factory.mktemp("finished"), 2)


def both_ways(job, path, *flags):
    """The complaint of --resume, which --evaluate must share."""
    messages = [one_line(job.module.main, [flag, str(path), *flags]) for flag in ("--resume", "--evaluate")]
    assert messages[0] == messages[1] and str(path) in messages[0]
    return messages[0]


def edited(finished, path, **changes):
    torch.save({**checkpoint_of(finished), **changes}, path)
    return path


def test_a_missing_checkpoint(job, no_training, tmp_path):
    assert "there is no checkpoint" in both_ways(job, tmp_path / "nowhere")
    assert "there is no checkpoint" in both_ways(job, tmp_path)  # a folder without one


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_is_not_a_checkpoint(job, no_training, tmp_path):
    junk = tmp_path / "junk.pt"
    for content in (b"", b"\0" * 100, b"hello\n", b"PK\3\4", os.urandom(5000), b"\x80\x04N."):
        junk.write_bytes(content)
        both_ways(job, junk)
    for foreign in (
        torch.zeros(3),
        {"weight": torch.zeros(3)},
        [1],
        {"script": job.name},
        {"script": job.name, "modules": {}, "args": 3},
    ):
        torch.save(foreign, junk)
        both_ways(job, junk)


def test_a_truncated_or_damaged_checkpoint(job, no_training, tmp_path, finished):
    whole = (finished / "checkpoint.pt").read_bytes()
    damaged = tmp_path / "damaged.pt"
    for length in sorted({1, 10, 100, 1000, *range(0, len(whole), max(1, len(whole) // 25)), len(whole) - 1}):
        damaged.write_bytes(whole[:length])
        both_ways(job, damaged)


def test_a_checkpoint_that_runs_code_is_refused(job, no_training, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"script": job.name, "args": {}, "modules": Evil()}, tmp_path / "evil.pt")
    both_ways(job, tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_of_another_script(job, no_training, tmp_path, finished):
    message = both_ways(job, edited(finished, tmp_path / "other.pt", script="some_other"))
    assert "some_other.py" in message and f"{job.name}.py" in message


def test_a_checkpoint_of_another_environment(job, no_training, finished):
    for flag in ("--resume", "--evaluate"):
        message = one_line(job.module.main, [flag, str(finished), "--env-id", "Bandit10-v0"])
        assert "--env-id Bandit10-v0" in message and job.env_id in message


def test_a_checkpoint_of_another_version(job, no_training, tmp_path, finished):
    args = {**checkpoint_of(finished)["args"], "a_flag_of_the_past": 1}
    assert "another version" in both_ways(job, edited(finished, tmp_path / "old.pt", args=args))
    message = both_ways(job, edited(finished, tmp_path / "old.pt", args=list(args)))
    assert "is not a checkpoint of this project" in message


def test_a_checkpoint_whose_parts_do_not_fit(job, no_training, tmp_path, finished):
    assert "hidden" in one_line(job.module.main, ["--resume", str(finished), "--hidden-size", "9"])
    assert job.policy in one_line(job.module.main, ["--evaluate", str(finished), "--hidden-size", "9"])
    modules = checkpoint_of(finished)["modules"]
    both_ways(job, edited(finished, tmp_path / "a.pt", modules={**modules, job.policy: {}}))
    for part in (None, [1], {"weight": None}):
        both_ways(job, edited(finished, tmp_path / "a.pt", modules={**modules, job.policy: part}))
    path = edited(finished, tmp_path / "b.pt", modules={job.policy: modules[job.policy]})
    assert re.search("the (optimizer|env) of", one_line(job.module.main, ["--resume", str(path)]))


def test_a_copy_of_a_checkpoint_does_not_undo_what_followed(job, no_training, finished):
    before = {file: file.read_bytes() for file in finished.iterdir()}
    copy = shutil.copy(finished / "checkpoint.pt", finished / "earlier.pt")
    message = one_line(job.module.main, ["--resume", str(copy)])
    Path(copy).unlink()
    assert "earlier.pt" in message and "a folder of its own and the name checkpoint.pt" in message
    assert {file: file.read_bytes() for file in finished.iterdir()} == before


def test_a_checkpoint_that_lacks_an_entry_is_named(job, no_training, tmp_path, finished):
    for name in ("rng", "iteration", "global_step", "metrics_bytes", "wandb_id"):
        checkpoint = checkpoint_of(finished)
        del checkpoint[name]
        torch.save(checkpoint, tmp_path / "part.pt")
        assert "part.pt" in one_line(job.module.main, ["--resume", str(tmp_path / "part.pt")])


def test_a_checkpoint_with_an_entry_of_another_kind(job, no_training, tmp_path, finished):
    for name, values in {"iteration": ("x", -1), "global_step": (None,), "metrics_bytes": (-5, 1.5)}.items():
        for value in values:
            message = both_ways(job, edited(finished, tmp_path / "odd.pt", **{name: value}))
            assert "is not a checkpoint of this project" in message
    for state in (None, 1.5, torch.zeros(3, dtype=torch.uint8)):
        message = one_line(
            job.module.main, ["--resume", str(edited(finished, tmp_path / "odd.pt", rng=state))]
        )
        assert "the random state of" in message
    for name, value in {"seed": "abc", "env_id": None, "gamma": "x"}.items():
        args = {**checkpoint_of(finished)["args"], name: value}
        message = both_ways(job, edited(finished, tmp_path / "odd.pt", args=args))
        assert f"has {value!r} for --{name.replace('_', '-')}" in message


def test_flags_of_ones_own_are_remembered_whatever_their_defaults(job, tmp_path, finished):
    """A copied script may have a flag that is None by default, or a float whose default is written 1."""
    fields = [("extra", float | None, None), ("factor", float, 1)]
    own = dataclasses.make_dataclass("Own", fields, bases=(job.module.Args,))
    args = {**checkpoint_of(finished)["args"], "extra": 0.5, "factor": 0.25}
    path = edited(finished, tmp_path / "own.pt", args=args)
    restored, _ = job.module.parse_args(own, ["--evaluate", str(path)])
    assert restored.extra == 0.5 and restored.factor == 0.25


def test_a_finished_run_is_not_made_shorter_and_does_not_show_that_it_was_resumed(job, finished, tmp_path):
    run = tmp_path / finished.name
    shutil.copytree(finished, run)
    before = (run / "args.json").read_text()
    message = one_line(job.module.main, ["--resume", str(run), "--total-timesteps", "1"])
    assert "--total-timesteps 1: expected at least" in message
    job.module.main(["--resume", str(run)])
    assert (run / "args.json").read_text() == before and json.loads(before)["resume"] == ""


def test_resume_refuses_to_change_what_decides_the_run(job, no_training, finished):
    for name, value in (("seed", 9), ("gamma", 0.5), ("hidden_size", 9)):
        flag, was = f"--{name.replace('_', '-')}", checkpoint_of(finished)["args"][name]
        message = one_line(job.module.main, ["--resume", str(finished), flag, str(value)])
        assert f"{flag} {value}" in message and str(was) in message


# ---- a disk that refuses, a loss that is lost


def test_a_run_folder_that_cannot_be_made(job, tmp_path):
    (tmp_path / "taken").write_text("a file")
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        message = one_line(train, job, path)
        assert f"--run-dir {path}" in message
    assert (tmp_path / "taken").read_text() == "a file"


@pytest.mark.parametrize("place", ["torch.save", "os.fsync", "os.replace", "writer"])
def test_a_disk_that_is_full_while_saving_leaves_the_checkpoint_before(
    job, tmp_path, monkeypatch, uninterrupted, place
):
    calls = []

    def full_disk(*args):
        calls.append(1)
        if len(calls) == 4:
            if place == "writer":  # what torch says when the stream under it fails
                raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return shipped(*args)

    owner, name = (
        (torch, "save")
        if place == "writer"
        else ({"torch": torch, "os": os}[place.split(".")[0]], place.split(".")[1])
    )
    shipped = getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full_disk)
        message = one_line(train, job, tmp_path, 24)
    run = only_run(tmp_path)
    assert "checkpoint.pt" in message and ("No space left on device" in message or place == "writer")
    assert sorted(file.name for file in run.iterdir()) == [
        "args.json",
        "checkpoint.pt",
        "metrics.jsonl",
    ]  # no half-written file stays
    assert checkpoint_of(run)["global_step"] == 4 * job.steps
    job.module.main(["--resume", str(run)])  # once there is room again
    assert_same_run(run, uninterrupted)


def test_a_real_limit_on_the_size_of_files_ends_in_one_line_and_leaves_the_checkpoint_before(job, tmp_path):
    run = train(job, tmp_path, 2)
    size, errors = (run / "checkpoint.pt").stat().st_size, tmp_path / "errors"
    for limit in (size // 2, size - 100):
        assert (
            finish(
                job, ["--resume", str(run), "--total-timesteps", str(8 * job.steps)], errors, max_file=limit
            )
            == 1
        )
        assert the_error(errors.read_text()).startswith("error: cannot save")
        assert checkpoint_of(run)["global_step"] == 2 * job.steps and not (run / "checkpoint.pt.tmp").exists()
    job.module.main(["--resume", str(run), "--total-timesteps", str(8 * job.steps)])
    assert [row["global_step"] for row in rows_of(run)] == [job.steps * (i + 1) for i in range(8)]


def test_a_real_limit_on_the_log_ends_in_one_line(job, tmp_path):
    run = train(job, tmp_path, 2, "--save-every", "1000")
    errors = tmp_path / "errors"
    (run / "metrics.jsonl").write_text(
        "\n" * (10 * (run / "checkpoint.pt").stat().st_size)
    )  # a long log, then no more room
    checkpoint = checkpoint_of(run)
    checkpoint["metrics_bytes"] = (run / "metrics.jsonl").stat().st_size
    torch.save(checkpoint, run / "checkpoint.pt")
    argv = ["--resume", str(run), "--total-timesteps", str(8 * job.steps)]
    assert finish(job, argv, errors, max_file=checkpoint["metrics_bytes"] + 300) == 1
    said = the_error(errors.read_text())
    assert said.startswith("error: cannot write") and "metrics.jsonl" in said
    assert checkpoint_of(run)["global_step"] == 2 * job.steps


LOSSES = {
    "rl2_ppo": ("ppo_value_loss", "ppo_policy_loss"),
    "maml_trpo": ("inner_loss", "returns_of"),
    "pearl_sac": ("critic_loss", "kl_to_prior"),
    "mtl_contextual": ("critic_loss", "temperature_loss"),
    "darc_offdynamics": ("critic_loss", "reward_correction"),
    "epopt": ("surrogate_loss", "trajectory_returns"),
}


@pytest.mark.parametrize("loss", [0, 1])
def test_a_number_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    job, tmp_path, monkeypatch, uninterrupted, loss
):
    loss = LOSSES[job.name][loss]
    shipped, rows = getattr(job.module, loss), []

    def count(*args, log=job.module.log):
        rows.append(1)
        log(*args)

    def lost(*args):  # from the sixth iteration on
        result = shipped(*args)
        factor = math.nan if len(rows) >= 5 else 1.0
        return result * factor if torch.is_tensor(result) else (result[0] * factor, result[1])

    with monkeypatch.context() as patch:
        patch.setattr(job.module, "log", count)
        patch.setattr(job.module, loss, lost)
        message = one_line(train, job, tmp_path, 24)
    run = only_run(tmp_path)
    stopped = re.search(r"\w+/\w+ is nan", message) and "checkpoint.pt" in message
    assert stopped or "weights are not finite" in message and "--inner-lr" in message
    saved = checkpoint_of(run)
    assert saved["global_step"] == 4 * job.steps and len(rows_of(run)) == 5
    assert all(torch.isfinite(value).all() for value in saved["modules"][job.policy].values())
    job.module.main(["--resume", str(run)])
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize(
    "flags",
    [["--eval-every", "1"], ["--eval-every", "100"], ["--eval-every", "1", "--epochs", "3"]],
    ids="".join,
)
@pytest.mark.parametrize("env_id", ["Bandit5-v0", "PointRobot-v0"])
def test_a_learning_rate_beyond_reason_ends_in_one_line(tmp_path, env_id, flags):
    message = one_line(
        train,
        JOBS["rl2_ppo"],
        tmp_path,
        40,
        "--lr",
        "1e30",
        "--env-id",
        env_id,
        "--episodes-per-trial",
        "2",
        *flags,
    )
    assert re.search(r"(losses|debug|eval)/\w+", message)
    saved = checkpoint_of(only_run(tmp_path))["modules"]["agent"]
    assert all(torch.isfinite(value).all() for value in saved.values())


@pytest.mark.parametrize("name", ["pearl_sac", *SAC])
def test_a_learning_rate_beyond_reason_ends_in_one_line_of_sac_too(tmp_path, name):
    message = one_line(train, JOBS[name], tmp_path, 40, "--lr", "1e30")
    assert re.search(r"(losses|debug|eval)/\w+", message)
    saved = checkpoint_of(only_run(tmp_path))["modules"]["agent"]
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_a_gradient_step_that_diverges_names_its_own_size(tmp_path):
    job = JOBS["maml_trpo"]
    flags = ["--inner-lr", "0.1", "--eval-lr-factor", "1e42", "--run-dir", str(tmp_path)]
    message = one_line(job.module.main, [*job.tiny, *flags, "--total-timesteps", str(2 * job.steps)])
    assert re.search(r"after gradient step \d, of size 1e\+41", message)


def test_a_learning_rate_that_float32_cannot_hold_is_named(no_training):
    job = JOBS["rl2_ppo"]
    message = one_line(job.module.main, [*job.tiny, *no_training, "--lr", "1e38"])
    assert message == "error: --lr 1e+38: expected a positive number"


def test_an_error_in_the_middle_of_a_run_stands_on_a_line_of_its_own(tmp_path):
    """The bar leaves the cursor behind itself; the message must not be glued to it."""
    job, errors = JOBS["rl2_ppo"], tmp_path / "errors"
    argv = [*job.tiny, "--lr", "1e30", "--total-timesteps", str(10 * job.steps), "--run-dir", str(tmp_path)]
    assert finish(job, argv, errors) == 1
    assert "losses/" in the_error(errors.read_text())


def test_interrupted_by_hand_it_says_in_one_line_how_to_go_on(tmp_path):
    job = JOBS["rl2_ppo"]
    endless = [*job.tiny, "--total-timesteps", "1000000000", "--run-dir", str(tmp_path)]
    command = [sys.executable, "-u", f"{job.name}.py", *endless]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background may not
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heed, **pipes) as process:
        said = process.stdout.readline()  # where it is, before training
        while not (only_run(tmp_path) / "metrics.jsonl").read_text():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
    assert said == f"run folder: {only_run(tmp_path)}\n"
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: interrupted; --resume")
    assert checkpoint_of(only_run(tmp_path))


def test_an_environment_that_breaks_its_contract_while_training_ends_in_one_line(tmp_path):
    """Without the adapter's look PyTorch would refuse to draw from probabilities that are NaN."""
    (tmp_path / "leaking.py").write_text("""
import common, gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Leaking(CartPoleEnv):
    def step(self, action):
        obs, *rest = super().step(action)
        return obs * float("nan"), *rest

gymnasium.register("Leaking-v0", entry_point=Leaking, max_episode_steps=9)
common.register("LeakingTasks-v0", "Leaking-v0", lambda env, tasks: None, low=[0.0], high=[1.0])
""")
    job = JOBS["rl2_ppo"]
    argv = [*job.tiny, "--env-id", "leaking:LeakingTasks-v0", "--run-dir", str(tmp_path / "runs")]
    path = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, f"{job.name}.py", *argv]
    done = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: the inner environment's observation is not finite"


def words_of(script, *flags):
    """Exit status and the lines on stderr of a script that is run as a user would."""
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script), *flags], env=path, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


def test_more_than_the_memory_holds_ends_in_one_line(tmp_path):
    for flag, value in (("--hidden-size", 10**8), ("--num-envs", 9 * 10**11)):  # PyTorch, NumPy
        status, words = words_of(ROOT / "rl2_ppo.py", flag, str(value), "--run-dir", str(tmp_path))
        assert status == 1 and len(words) == 1 and "allocate" in words[0]
        assert words[0].startswith("error: there is not enough memory for these flags: ")
    assert not list(tmp_path.iterdir())


def rl2_that_begins_with(line, folder):
    """A copy of rl2_ppo.py whose main runs a line before anything else. Returns its path."""
    start = "\n    device = check"
    text = (ROOT / "rl2_ppo.py").read_text()
    assert text.count(start) == 1
    (folder / "broken.py").write_text(text.replace(start, f"\n    {line}{start}"))
    return folder / "broken.py"


def test_other_errors_of_pytorch_keep_their_traceback(tmp_path):
    status, words = words_of(rl2_that_begins_with("torch.ones(2) @ torch.ones(3)", tmp_path))
    assert status == 1 and words[0].startswith("Traceback") and words[-1].startswith("RuntimeError")


@pytest.mark.parametrize(
    "error", ["MemoryError", "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')"]
)
def test_a_full_gpu_and_a_full_heap_end_in_one_line(tmp_path, error):
    status, words = words_of(rl2_that_begins_with(f"raise {error}", tmp_path))
    assert status == 1 and len(words) == 1 and words[0].startswith("error: there is not enough memory")


def test_every_script_ends_in_the_same_way():
    endings = {(ROOT / f"{name}.py").read_text().split("\nif __name__")[1] for name in JOBS}
    assert len(endings) == 1
