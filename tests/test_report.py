"""The comparison of all algorithms, and the README's tables: made from the CSVs, and from nothing else."""

import re
import shlex

import numpy as np
import pytest
import torch
from conftest import ROOT, script

import common
from benchmark import compare, plot, report, reproduce

# ---- statistics


def test_the_interquartile_mean_is_the_mean_of_the_middle_half():
    assert compare.interquartile_mean(np.array([[9.0, 1.0], [2.0, 3.0]])) == 2.5
    assert compare.interquartile_mean(np.array([[1.0, 2.0, 100.0]])) == pytest.approx(103 / 3)  # 3 // 4 is 0
    values = np.random.default_rng(0).normal(size=(5, 40))
    middle = np.sort(values.ravel())[50:150]
    assert compare.interquartile_mean(values) == pytest.approx(middle.mean())


def test_bootstrap_intervals_draw_whole_seeds_and_tasks_again():
    random = np.random.default_rng(1)
    tasks_only = random.normal(size=(1, 400))  # one seed: the tasks are all that varies
    low, high = compare.bootstrap(tasks_only)
    # the interquartile mean of n normal draws has a deviation of about 1.09 / sqrt(n)
    assert (high - low) / 2 == pytest.approx(1.96 * 1.09 / 20, rel=0.2) and low < 0.05 and high > -0.05
    one = np.zeros((4, 400)) + np.array([[0.0], [1.0], [2.0], [3.0]])  # a bad seed is bad on all of its tasks
    low, high = compare.bootstrap(one)
    assert low < 0.6 and high > 2.4  # drawn apart for each task it would be 1.5 +- .1
    assert compare.bootstrap(tasks_only).tolist() == compare.bootstrap(tasks_only).tolist()


# ---- the comparison


@pytest.fixture
def tiny_comparison(tmp_path, monkeypatch):
    """Runs of two methods with two seeds each, in run_dir, and a folder for results."""
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(compare, "NUM_TASKS", 8)
    flags = {
        "rl2_ppo": "--num-envs 4 --episodes-per-trial 4 --hidden-size 8 --minibatches 2 --eval-tasks 8",
        "maml_trpo": "--num-tasks 2 --episodes-per-task 2 --hidden-size 8 --eval-episodes 2 --cg-steps 2",
    }
    for name, words in flags.items():
        for seed in ("1", "2"):
            command = f"{words} --env-id SparsePointGoal-v0 --total-timesteps 320 --seed {seed} --device cpu"
            parent = tmp_path / "runs" / f"compare_sparse_{name.split('_')[0]}"
            script(name).main([*command.split(), "--run-dir", str(parent)])
    return tmp_path


def test_a_comparison_holds_what_the_scripts_evaluate_to(tiny_comparison, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.argv", ["compare", "sparse", "--run-dir", str(tiny_comparison / "runs")])
    compare.main()
    found = compare.read("sparse")
    assert list(found) == [
        "RL^2",
        "MAML, gradient steps of 40 episodes",
        "MAML, gradient steps of one episode",
        "random",
    ]
    assert "told its task: no run in" in capsys.readouterr().out
    for seed, run in enumerate(compare.runs_of("sparse", "rl2", tiny_comparison / "runs")):
        log = plot.read_run(run)[1]
        for stage in range(4):
            steps, trained, returns = found["RL^2"][stage]
            assert returns.shape == (2, 8) and trained[seed] == log[-1]["global_step"]
            assert returns[seed].mean() == pytest.approx(log[-1][f"eval/return_ep{stage}"], abs=1e-5)
            assert steps[seed] == log[-1][f"eval/adapt_steps_ep{stage}"] == 20 * stage
    # more episodes a gradient step, more steps spent on the task
    many, one = (
        found[name][1][0]
        for name in ("MAML, gradient steps of 40 episodes", "MAML, gradient steps of one episode")
    )
    assert many.tolist() == [800, 800] and one.tolist() == [20, 20]
    assert (tiny_comparison / "results" / "compare_sparse.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(report.compare, "RESULTS", tiny_comparison / "results")
    lines = report.comparison("sparse").splitlines()
    assert len(lines) == 2 + 4 and len({line.count("|") for line in lines}) == 1
    middle = compare.interquartile_mean(found["random"][0][2])
    assert f"| random | {report.plain(f'{middle:.2f}')} [" in lines[-1] and "not trained, 3 |" in lines[-1]


def test_all_methods_are_held_against_the_same_held_out_tasks(tiny_comparison, monkeypatch):
    seen = []
    sample = common.base.TaskVectorEnv.sample_tasks

    def listen(self, n, split="train"):
        tasks = sample(self, n, split)
        if split == "test":
            seen.append(tasks)
        return tasks

    monkeypatch.setattr(common.base.TaskVectorEnv, "sample_tasks", listen)
    compare.measure("sparse", tiny_comparison / "runs")
    assert len(seen) >= 2 + 4 + 3 and all(torch.equal(tasks, seen[0]) for tasks in seen)
    assert len(seen[0]) == 8


def test_a_comparison_without_runs_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["compare", "sparse", "--run-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="no runs of compare_sparse_"):
        compare.main()


def test_a_random_player_is_the_one_that_the_references_know():
    returns = np.concatenate([compare.random_player("PointGoal-v0", seed) for seed in range(5)])
    assert returns.shape == (500, 1)
    reference = common.make("PointGoal-v0", 1).references["random"]
    assert returns.mean() == pytest.approx(reference, abs=4 * returns.std() / 10)


# ---- the README


def test_the_readmes_tables_are_those_of_the_results():
    text = report.README.read_text()
    assert (
        text.count("<!-- table ")
        == text.count("<!-- end -->")
        == len(re.findall("<!-- table (.*) -->", text))
    )
    assert report.rewrite(text) == text, "python -m benchmark.report brings them up to date"


def test_a_number_that_was_changed_by_hand_is_found_and_put_right(tmp_path, monkeypatch):
    text = report.README.read_text()
    value = f"{report.Entry('rl2_bandit5_n10').return_trial}"
    changed = text.replace(f"sum {value}", "sum 6.66 +- .01")
    assert changed != text and report.rewrite(changed) == text
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text(changed)
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    with pytest.raises(SystemExit, match="not those of benchmark/results"):
        report.main()
    assert report.README.read_text() == changed
    monkeypatch.setattr("sys.argv", ["report"])
    report.main()
    assert report.README.read_text() == text
    with pytest.raises(SystemExit, match="has no table nothing"):
        report.rewrite("<!-- table nothing -->\n\nx\n\n<!-- end -->")


def test_every_result_is_in_the_tables_and_every_row_has_its_entry():
    fields = set(re.findall(r"{(\w+)", report.TEMPLATES.read_text())) - {"entry", "speed"}
    written = {file.stem for file in reproduce.RESULTS.glob("*.csv")}
    compared = {f"compare_{task}" for task in compare.ENV_IDS}
    assert (
        written - fields - {"throughput"}
        == {name for name in written if name.startswith("compare_")} - compared
    )
    assert fields <= written and fields - compared <= reproduce.ENTRIES.keys()


@pytest.mark.parametrize("name", reproduce.ENTRIES)
def test_a_result_is_of_its_entrys_flags_and_seeds_and_of_the_steps_that_it_asks_for(name):
    file, flags, seeds, _, _ = reproduce.ENTRIES[name]
    module = script(file.removesuffix(".py"))
    asked = module.parse_args(module.Args, flags.split())[0].total_timesteps
    rows = report.Entry(name).rows
    assert {row["command"] for row in rows} == {f"{file} {flags}"}
    assert tuple(int(row["seed"]) for row in rows) == seeds
    if min(int(row["global_step"]) for row in rows) < asked:
        (line,) = [line for line in report.TEMPLATES.read_text().splitlines() if f"{{{name}." in line]
        assert "cut off" in line


@pytest.mark.parametrize(
    "values, errors, text",
    [
        ([2.0, 3.0, 4.0], [0, 0, 0], "3.0 +- 2.5"),  # 4.303 / sqrt(3) is 2.48
        ([0.1, 0.1004], [0, 0], ".1002 +- .0025"),
        ([-38.0, -39.0, -38.2], [0, 0, 0], "-38.4 +- 1.3"),
        ([100.0], [11.7], "100 +- 23"),
        ([100.0], [29.6], "100 +- 58"),
        ([-0.5], [0.26], "-.5 +- .5"),
        ([1.0, 1.0], [0, 0], "1.00"),
        ([6.64], [0.0071], "6.640 +- .014"),
        ([5.0], [0.5], "5.0 +- 1.0"),
    ],
)
def test_means_are_written_as_far_as_their_interval_lets_them(values, errors, text):
    assert f"{report.Measured(values, errors)}" == text


def test_one_figure_of_many_seeds():
    measured = report.Measured([0.25, -0.5], [0, 0])
    assert f"{measured:.3f}" == "-.125" and f"{measured[1]:.1f}" == "-.5"


# ---- sweeps


def agent_command(sweep, choice):
    """The words that W&B's agent runs for a choice of the parameters: ${args} are --name=value."""
    args = [f"--{name}={value}" for name, value in choice.items()]
    words = []
    for word in sweep["command"]:
        words += args if word == "${args}" else [word.replace("${program}", sweep["program"])]
    return [word for word in words if word != "${env}"]


def test_the_sweep_files_commands_are_ones_that_the_script_takes():
    yaml = pytest.importorskip("yaml")
    sweep = yaml.safe_load((ROOT / "benchmark" / "sweep.yaml").read_text())
    first = {
        name: spec.get("value", spec.get("values", [None])[0]) for name, spec in sweep["parameters"].items()
    }
    python, program, *words = agent_command(sweep, first)
    module = script(program.removesuffix(".py"))
    args, _ = module.parse_args(module.Args, words)
    assert python == "python" and args.track and args.env_id == "GridNavi-v0" and args.episodes_per_trial == 4
    assert (args.lr, args.entropy_coef, args.seed) == (0.003, 0.03, 1)


def test_an_entry_as_a_sweep_runs_that_entry(monkeypatch, capsys):
    yaml = pytest.importorskip("yaml")
    monkeypatch.setattr("sys.argv", ["reproduce", "darc_reacher_target", "--sweep"])
    reproduce.main()
    sweep = yaml.safe_load(capsys.readouterr().out)
    file, flags, seeds, _, _ = reproduce.ENTRIES["darc_reacher_target"]
    assert sweep["parameters"]["seed"]["values"] == list(seeds)
    assert agent_command(sweep, {"seed": 2}) == ["python", file, *shlex.split(flags), "--track", "--seed=2"]
    monkeypatch.setattr("sys.argv", ["reproduce", "darc_reacher*", "--sweep"])
    with pytest.raises(SystemExit, match="--sweep takes one entry"):
        reproduce.main()


def test_a_star_names_several_entries(monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.setattr(reproduce, "run_seed", lambda name, seed, *rest: ran.append((name, seed)))
    monkeypatch.setattr(reproduce, "summarize", lambda name, folders: None)
    monkeypatch.setattr(
        "sys.argv", ["reproduce", "darc_pointdoor*", "darc_pointdoor", "--run-dir", str(tmp_path)]
    )
    reproduce.main()
    assert sorted(ran) == [("darc_pointdoor", 1), ("darc_pointdoor_target", 1)]
