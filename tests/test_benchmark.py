"""The tools behind the README's numbers: reproduce writes what the run logged, plot draws what was logged."""

import csv
import json

import pytest
import torch

import common
import darc_offdynamics
import epopt
import maml_trpo
import mtl_contextual
import pearl_sac
from benchmark import (
    ensembles,
    mazes,
    peers,
    plot,
    posteriors,
    report,
    reproduce,
    throughput,
    trajectories,
    walls,
)

TINY = (
    "--num-envs 8 --episodes-per-trial 3 --hidden-size 8 --total-timesteps 48 --eval-every 1 --eval-tasks 16"
)


@pytest.fixture
def tiny_entry(monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "ENTRIES", {"tiny": ("rl2_ppo.py", TINY, (1, 2), 1, "none")})
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    return tmp_path / "runs"


def run_reproduce(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["reproduce", *map(str, words)])
    reproduce.main()


def read_csv(folder):
    with open(folder / "results" / "tiny.csv") as file:
        return list(csv.DictReader(file))


def test_reproduce_trains_every_seed_and_writes_its_last_evaluation(
    tiny_entry, tmp_path, monkeypatch, capsys
):
    run_reproduce(monkeypatch, "tiny", "--run-dir", tiny_entry, "--jobs", 2)
    rows = read_csv(tmp_path)
    assert [row["seed"] for row in rows] == ["1", "2"]
    for row in rows:
        (folder,) = (tiny_entry / "tiny").glob(f"*__{row['seed']}__*")
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert int(row["global_step"]) == last["global_step"] == 48
        for key in ("eval/return_trial", "eval/return_trial_se", "eval/return_ep2"):
            assert float(row[key]) == pytest.approx(last[key], abs=1e-5)
        assert row["command"] == f"rl2_ppo.py {TINY}" and row["torch"] == torch.__version__ and row["commit"]
    # again: finished runs are found, not repeated
    before = {file: file.read_bytes() for file in (tiny_entry / "tiny").glob("*/metrics.jsonl")}
    run_reproduce(monkeypatch, "tiny", "--run-dir", tiny_entry)
    assert {file: file.read_bytes() for file in (tiny_entry / "tiny").glob("*/metrics.jsonl")} == before
    assert [row["eval/return_trial"] for row in read_csv(tmp_path)] == [r["eval/return_trial"] for r in rows]
    assert capsys.readouterr().out.count("tiny seed 1: ") == 2


def test_an_entry_that_was_made_longer_is_trained_on(tiny_entry, tmp_path, monkeypatch):
    run_reproduce(monkeypatch, "tiny", "--run-dir", tiny_entry)
    longer = f"{TINY} --total-timesteps 96"  # the last of a flag counts
    monkeypatch.setitem(reproduce.ENTRIES, "tiny", ("rl2_ppo.py", longer, (1,), 1, "none"))
    run_reproduce(monkeypatch, "tiny", "--run-dir", tiny_entry)
    assert [row["global_step"] for row in read_csv(tmp_path)] == ["96"]


def test_a_run_with_other_flags_is_not_taken_for_the_entrys(tiny_entry, tmp_path, monkeypatch):
    run_reproduce(monkeypatch, "tiny", "--run-dir", tiny_entry)
    made = (tmp_path / "results" / "tiny.csv").read_bytes()
    other = f"{TINY} --gae-lambda 0.8"
    monkeypatch.setitem(reproduce.ENTRIES, "tiny", ("rl2_ppo.py", other, (1, 2), 1, "none"))
    with pytest.raises(SystemExit, match="--gae-lambda 0.8 .* ended with 1"):
        run_reproduce(monkeypatch, "tiny", "--run-dir", tiny_entry)
    said = (tiny_entry / "tiny" / "seed1.log").read_text().splitlines()[-1]
    assert said.startswith("error: --gae-lambda 0.8: ") and said.endswith("was trained with 1.0")
    assert (tmp_path / "results" / "tiny.csv").read_bytes() == made


def test_reproduce_lists_its_entries_and_names_an_unknown_one(tiny_entry, monkeypatch, capsys):
    run_reproduce(monkeypatch)
    assert "tiny: rl2_ppo.py --num-envs 8" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run_reproduce(monkeypatch, "tinny")
    assert stop.value.code == "error: no entry named tinny; there are tiny"


def test_a_run_that_fails_ends_reproduce_and_leaves_no_csv(tiny_entry, tmp_path, monkeypatch):
    monkeypatch.setitem(reproduce.ENTRIES, "tiny", ("rl2_ppo.py", "--num-envs 0", (1,), 1, "none"))
    with pytest.raises(SystemExit, match="ended with 1"):
        run_reproduce(monkeypatch, "tiny", "--run-dir", tiny_entry)
    assert not (tmp_path / "results" / "tiny.csv").exists()


def test_every_entry_has_flags_that_its_script_accepts(monkeypatch):
    from conftest import script

    for name, (file, flags, seeds, minutes, reference) in reproduce.ENTRIES.items():
        module = script(file.removesuffix(".py"))
        args, _ = module.parse_args(module.Args, flags.split())
        assert args.env_id in common.ids() and len(set(seeds)) == len(seeds) > 0, name
        assert minutes > 0 and reference, name


# ---- plot


def write_run(parent, seed, trial, rows=2, lr=0.01):
    """A run folder as a script leaves it, with `rows` evaluations of a trial of two pulls."""
    folder = parent / f"rl2_ppo__Bandit5-v0__{seed}__20000101-00000{seed}-{lr}"
    folder.mkdir()
    (folder / "args.json").write_text(
        json.dumps({"env_id": "Bandit5-v0", "seed": seed, "lr": lr, "episodes_per_trial": 2})
    )
    log = []
    for number in range(rows):
        row = {"global_step": 10 * (number + 1), "eval/return_trial": trial + number}
        row |= {"eval/return_trial_se": 0.5}
        for episode in range(2):
            row |= {f"eval/return_ep{episode}": trial / 2 + episode, f"eval/return_se_ep{episode}": 0.25}
        log += [json.dumps({"global_step": row["global_step"] - 5, "losses/policy": 0.0}), json.dumps(row)]
    (folder / "metrics.jsonl").write_text("\n".join(log) + "\n")
    return folder


def test_intervals_over_seeds_are_students_and_over_the_tasks_of_one_seed_normal():
    mean, band = plot.mean_and_error([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]], [[9.0, 9.0]] * 3)
    assert mean == [2.0, 5.0]
    assert band == pytest.approx([4.303 / 3**0.5, 0.0], abs=2e-3)  # std 1; t of two degrees of freedom
    seeds = [[float(i % 2)] for i in range(11)]  # beyond the table: t of ten degrees of freedom is 2.228
    deviation = (5 * 6 / 11 / 10) ** 0.5
    assert plot.mean_and_error(seeds, seeds)[1] == pytest.approx([2.228 * deviation / 11**0.5], rel=0.01)
    mean, band = plot.mean_and_error([[1.0, 5.0]], [[0.5, 1.0]])
    assert (mean, band) == ([1.0, 5.0], pytest.approx([0.98, 1.96]))


def test_the_curves_are_what_was_logged(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    folders = [write_run(tmp_path, seed, trial) for seed, trial in ((1, 1.0), (2, 2.0), (3, 3.0))]
    plot.draw(folders, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    left, right = drawn[0].axes
    assert left.lines[0].get_xydata().tolist() == [[10, 2.0], [20, 3.0]]  # means of three seeds
    assert right.lines[0].get_xydata().tolist() == [
        [0, 1.0],
        [1, 2.0],
    ]  # by episode, from the last evaluation
    assert left.lines[0].get_label() == "rl2_ppo on Bandit5-v0, 3 seeds"


def test_plot_leaves_out_what_is_not_evaluated_and_reads_a_log_cut_in_its_last_line(tmp_path, capsys):
    whole, empty = write_run(tmp_path, 1, 1.0), write_run(tmp_path, 2, 2.0, rows=0)
    with open(whole / "metrics.jsonl", "a") as log:
        log.write('{"global_step": 30, "eval/ret')
    groups = plot.group_runs([whole, empty])
    assert [len(rows) for _, _, (rows,) in groups] == [2]
    assert f"{empty}: no evaluation yet" in capsys.readouterr().out


def test_only_runs_that_differ_in_nothing_but_the_seed_are_one_curve(tmp_path):
    folders = [write_run(tmp_path, seed, 1.0, lr=lr) for seed in (1, 2) for lr in (0.01, 0.02)]
    groups = plot.group_runs(folders)
    assert [len(seeds) for _, _, seeds in groups] == [2, 2]
    assert plot.differing_flags([args for _, args, _ in groups]) == ["lr=0.01", "lr=0.02"]
    assert plot.differing_flags([groups[0][1]]) == [""]
    with pytest.raises(SystemExit, match="seed 1 of an experiment that has it already"):
        plot.group_runs([*folders, folders[0]])


def test_scripts_that_are_judged_by_different_returns_say_so_in_the_legend(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    plot.draw([write_run(tmp_path, 1, 1.0), tiny_maml(tmp_path)], tmp_path / "curves.png")
    left, right = drawn[0].axes
    labels = [line.get_label() for line in left.lines if not line.get_label().startswith("_")]
    assert labels[0] == "rl2_ppo on Bandit5-v0, sum over the trial, 1 seed, band over tasks"
    assert labels[1].endswith("after the gradient steps trained for, 1 seed, band over tasks")
    assert (
        "see below" in left.get_ylabel() and right.get_xlabel() == "episode or gradient steps on a new task"
    )


def test_plot_says_in_one_line_what_is_not_a_run_folder(tmp_path):
    with pytest.raises(SystemExit) as stop:
        plot.draw([tmp_path / "nothing"], tmp_path / "curves.png")
    assert "is not a run folder" in stop.value.code and "\n" not in stop.value.code
    with pytest.raises(SystemExit, match="nothing to draw"):
        plot.draw([write_run(tmp_path, 1, 1.0, rows=0)], tmp_path / "curves.png")


# ---- throughput


def test_the_bare_dynamics_are_those_of_the_environments():
    """What stepping is compared with must do the same work: same shapes, same kinds of numbers."""
    bare = throughput.bare_steps(4096, "cpu")
    assert set(bare) <= set(common.ids())
    assert bare["Bandit5-v0"]().shape == (4096,)
    state, reward = bare["TabularMDP-v0"]()
    assert state.shape == reward.shape == (4096,) and state.max() <= 10
    assert reward.var().item() == pytest.approx(2.0, abs=0.3)  # of the means and of the noise
    position, reward, near = bare["PointGoal-v0"]()
    assert position.shape == (4096, 2) and reward.max() <= 0 and near.dtype == torch.bool


def test_figures_of_speed_are_written_over_old_ones_and_read_by_the_report(tmp_path, monkeypatch):
    for module in (throughput, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(throughput, "FIGURES", {})
    throughput.note("pearl_8x64", updates=12.34567, products=0.5)
    throughput.write("a device")
    monkeypatch.setattr(throughput, "FIGURES", {})
    throughput.note("pearl_8x64", updates=20.0)  # another run, of this part alone
    throughput.write("another device")
    speed = report.Speed()
    assert f"{speed.pearl_8x64_updates:.1f} {speed.pearl_8x64_products:.0%}" == "20.0 50%"
    rows = list(csv.DictReader((tmp_path / "throughput.csv").read_text().splitlines()))
    assert [row["device"] for row in rows] == ["another device", "a device"]
    assert throughput.plain_id("PointGoal-v0") == "PointGoal"


def test_a_figure_of_speed_is_what_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(throughput, "FIGURES", {})
    flags = {"train_tasks": 4, "num_tasks": 2, "batch_size": 4, "hidden_size": 8, "replay_episodes": 12}
    throughput.mtl("cpu", repeats=1, count=2, **flags)
    printed = capsys.readouterr().out
    assert f"{throughput.FIGURES['mtl_2x4_updates']:.1f} gradient steps/s" in printed
    assert throughput.FIGURES.keys() == {"mtl_2x4_updates", "mtl_2x4_hindsight"}


def test_peers_are_measured_in_turns_after_a_burn_in(monkeypatch):
    """A slow first call counts for nobody, and no job runs twice before the other has run."""
    clock, order, took = [0.0], [], {"theirs": [9.0, 2.0, 3.0, 4.0], "ours": [9.0, 1.0, 1.0, 5.0]}
    monkeypatch.setattr(peers.time, "perf_counter", lambda: clock[0])

    def job(name):
        order.append(name)
        clock[0] += took[name][order.count(name) - 1]

    assert peers.in_turns({name: lambda name=name: job(name) for name in took}, 3) == {"theirs": 3, "ours": 1}
    assert order == ["theirs", "ours"] * 4


def test_a_repeatable_job_begins_with_the_first_weights_each_time():
    module, seen = torch.nn.Linear(2, 1, bias=False), []

    def job():
        seen.append(module.weight.tolist())
        with torch.no_grad():
            module.weight.add_(1.0)

    again = peers.repeatable(job, module)
    again(), again()
    assert len(seen) == 2 and seen[0] == seen[1] == module.weight.tolist()


@pytest.mark.parametrize("module", [throughput, peers])
def test_what_is_not_there_to_be_measured_is_refused(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [module.__name__, "mamll"])
    with pytest.raises(SystemExit):
        module.main()
    assert "no mamll; there are" in capsys.readouterr().err


# ---- MAML's pictures


def tiny_maml(folder, env_id="PointGoal-v0"):
    flags = (
        "--num-tasks 2 --episodes-per-task 3 --eval-episodes 3 --eval-tasks 3 --hidden-size 8 --cg-steps 2"
    )
    maml_trpo.main(
        [*flags.split(), "--env-id", env_id, "--total-timesteps", "1200", "--run-dir", str(folder)]
    )
    (run,) = folder.glob("maml_trpo__*")
    return run


def test_trajectories_are_of_the_held_out_tasks_that_the_run_was_evaluated_on(tmp_path, monkeypatch):
    run = tiny_maml(tmp_path)
    batches, tasks = trajectories.play(run, 3)
    assert torch.equal(tasks, common.make("PointGoal-v0", 1).sample_tasks(3, split="test"))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for stage, batch in enumerate(batches):  # the same tasks, weights and noise give the same returns
        assert maml_trpo.returns_of(batch).mean().item() == pytest.approx(
            last[f"eval/return_ep{stage}"], abs=1e-3
        )
    pytest.importorskip("matplotlib")
    trajectories.draw(run, 2, tmp_path / "paths.png")
    assert (tmp_path / "paths.png").read_bytes().startswith(b"\x89PNG")


def test_a_gradient_learner_is_judged_after_as_many_steps_as_it_was_trained_for(tmp_path):
    run = tiny_maml(tmp_path)
    ((_, args, (rows,)),) = plot.group_runs([run])
    for inner_steps, key in ((0, "eval/return_ep0"), (1, "eval/return_ep1"), (2, "eval/return_ep2")):
        found, error, _ = plot.headline({**args, "inner_steps": inner_steps}, rows[-1])
        assert found == key and error in rows[-1]
    pytest.importorskip("matplotlib")
    plot.draw([run], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# ---- PEARL's pictures


def tiny_pearl(folder):
    flags = "--train-tasks 4 --num-tasks 2 --episodes-per-task 2 --context-episodes 2 --updates-per-step 0.02"
    flags += " --hidden-size 8 --eval-tasks 20 --total-timesteps 160"
    pearl_sac.main([*flags.split(), "--device", "cpu", "--run-dir", str(folder)])
    (run,) = folder.glob("pearl_sac__*")
    return run


def test_beliefs_and_paths_are_those_that_the_run_was_evaluated_on(tmp_path):
    run = tiny_pearl(tmp_path)
    episodes, beliefs, tasks = posteriors.play(run, 0)
    assert torch.equal(tasks, common.make("PointRobot-v0", 1).sample_tasks(20, split="test"))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for number, (episode, (_, var)) in enumerate(zip(episodes, beliefs, strict=True)):
        found = episode["reward"].sum(1).mean().item()
        assert found == pytest.approx(last[f"eval/return_ep{number}"], abs=1e-3)
        assert var.sqrt().mean().item() == pytest.approx(last[f"eval/posterior_std_ep{number}"], abs=1e-4)
    pytest.importorskip("matplotlib")
    posteriors.draw(run, 3, 2, tmp_path / "beliefs.png")
    plot.draw([run], tmp_path / "curves.png")
    for picture in ("beliefs.png", "curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_posterior_sampler_is_judged_by_its_last_episode(tmp_path):
    ((_, args, (rows,)),) = plot.group_runs([tiny_pearl(tmp_path)])
    assert plot.headline(args, rows[-1]) == ("eval/return_ep3", "eval/return_se_ep3", "in episode 4")


# ---- pictures of the maze


def test_maze_paths_are_those_that_the_run_was_evaluated_on(tmp_path):
    flags = "--env-id PointMaze-v0 --context goal --her future --train-tasks 4 --num-tasks 2 --batch-size 5"
    flags += " --hidden-size 8 --eval-tasks 20 --total-timesteps 400 --device cpu"
    for seed in ("1", "2"):
        mtl_contextual.main([*flags.split(), "--seed", seed, "--run-dir", str(tmp_path)])
    runs = sorted(tmp_path.glob("mtl_contextual__*"))
    episode, tasks, args = mazes.play(runs[0], 20)
    assert torch.equal(tasks, common.make("PointMaze-v0", 1).sample_tasks(20, split="test"))
    last = json.loads((runs[0] / "metrics.jsonl").read_text().splitlines()[-1])
    found = (episode["reward"] * episode["valid"]).sum(1).mean().item()
    assert found == pytest.approx(last["eval/return_ep0"], abs=1e-3) and args.her == "future"
    pytest.importorskip("matplotlib")
    mazes.draw(runs, 5, tmp_path / "mazes.png")
    plot.draw(runs, tmp_path / "curves.png")  # of agents that are told: success instead of episodes
    for picture in ("mazes.png", "curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_the_principal_plane_is_where_points_vary_most():
    torch.manual_seed(0)
    points = torch.randn(500, 5) * torch.tensor([0.1, 5.0, 0.1, 2.0, 0.1])
    plane = posteriors.principal_plane(points).abs()
    assert (
        plane[1, 0] > 0.99
        and plane[3, 1] > 0.99
        and posteriors.principal_plane(points[:, :1]).shape == (1, 1)
    )


def test_matrix_products_are_a_part_of_the_time():
    a = torch.randn(400, 400)
    products, whole = throughput.seconds_of_products(lambda: (a @ a, a.exp()))
    assert 0 < products < whole


def test_paths_along_the_wall_are_those_that_the_run_was_evaluated_on(tmp_path):
    flags = "--num-envs 4 --batch-size 8 --hidden-size 8 --eval-tasks 20 --total-timesteps 400 --device cpu"
    darc_offdynamics.main([*flags.split(), "--updates-per-step", "0.01", "--run-dir", str(tmp_path)])
    (run,) = tmp_path.glob("darc_offdynamics__*")
    played, args = walls.play(run, 20)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for name, wall in (("source", 0.0), ("target", 0.6)):
        episode, found = played[name]
        total = (episode["reward"] * episode["valid"]).sum(1).mean().item()
        assert total == pytest.approx(last[f"eval/return_{name}"], abs=1e-3) and found == pytest.approx(wall)
    pytest.importorskip("matplotlib")
    walls.draw([run], 5, tmp_path / "walls.png")
    assert (tmp_path / "walls.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_of_an_ensemble_show_the_last_evaluation(tmp_path):
    flags = (
        "--num-models 10 --hidden-size 8 --eval-episodes 1 --total-timesteps 3000 --device cpu --particles 60"
    )
    for number, more in enumerate((["--epsilon", "1"], ["--adapt-to-target", "--transitions", "10"])):
        epopt.main([*flags.split(), *more, "--run-dir", str(tmp_path / str(number))])
    runs = sorted(tmp_path.glob("*/epopt__*"))
    found = ensembles.curves([run for folder in runs for run in ensembles.read(folder)])
    assert found.keys() == {"randomised", "EPOpt(0.1), adapted"}
    last = json.loads((runs[0] / "metrics.jsonl").read_text().splitlines()[-1])
    ((points,),) = (found["randomised"],)
    assert len(points) == 9 and [point[0] for point in points] == sorted(point[0] for point in points)
    for value, *numbers in points:
        keys = [f"eval/{name}_at_{value:.3g}" for name in ("return", "return_p10", "return_p90")]
        assert numbers == [last[key] for key in keys]
    row = {"command": f"epopt.py {flags} --epsilon 1", **last}
    with open(tmp_path / "randomised.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    assert ensembles.curves(ensembles.read(tmp_path / "randomised.csv")) == {"randomised": [points]}
    ensembles.draw([*runs, tmp_path / "randomised.csv"], tmp_path / "ensembles.png")
    assert (tmp_path / "ensembles.png").read_bytes().startswith(b"\x89PNG")
