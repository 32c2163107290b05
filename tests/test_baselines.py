"""The reference numbers measure everything else, so brute force and closed forms measure them."""

import itertools
import math

import pytest
import torch

import common
from benchmark import baselines


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_bayes_optimal_return_of_ten_pulls():
    expected = {2: 6.0218, 5: 6.6600, 10: 6.7140, 50: 6.7140}
    for arms, value in expected.items():
        assert baselines.bayes_optimal_bandit(arms, 10) == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("arms, pulls", [(1, 4), (2, 3), (2, 5), (3, 4)])
def test_the_bandit_programme_equals_expectimax_over_every_history(arms, pulls):
    def expectimax(wins, losses, left):
        if left == 0:
            return 0.0
        values = []
        for arm in range(arms):
            chance = (wins[arm] + 1) / (wins[arm] + losses[arm] + 2)
            one = [int(other == arm) for other in range(arms)]
            won = expectimax([w + o for w, o in zip(wins, one, strict=True)], losses, left - 1)
            lost = expectimax(wins, [lo + o for lo, o in zip(losses, one, strict=True)], left - 1)
            values.append(chance * (1 + won) + (1 - chance) * lost)
        return max(values)

    brute = expectimax([0] * arms, [0] * arms, pulls)
    assert baselines.bayes_optimal_bandit(arms, pulls) == pytest.approx(brute, abs=1e-12)


def test_gittins_indices_are_those_of_the_published_tables():
    table = baselines.gittins_index(
        0.9, 10, tail=10.0
    )  # Gittins, Glazebrook & Weber 2011; ours counts from Beta(1, 1)
    published = {(0, 0): 0.7029, (0, 1): 0.5001, (1, 0): 0.8001, (1, 1): 0.6346, (2, 0): 0.8452}
    for (wins, losses), index in published.items():
        assert table[wins, losses].item() == pytest.approx(index, abs=2e-4)
    assert baselines.gittins_index(0.99, 10)[0, 0].item() == pytest.approx(0.8699, abs=3e-4)


def test_finite_horizon_index_is_the_mean_at_the_end_and_grows_with_the_pulls_left():
    tables = baselines.finite_horizon_index(20)
    wins = torch.arange(20.0)[:, None]
    assert torch.allclose(tables[1], (wins + 1) / (wins + wins.T + 2), atol=1e-5)
    assert tables[2][0, 0].item() == pytest.approx(5 / 9, abs=1e-4)  # (1/2 + 1/2 * 2/3) rewards in 3/2 pulls
    fresh = [tables[left][0, 0].item() for left in range(1, 21)]
    assert fresh == sorted(fresh)


@pytest.mark.parametrize("arms, pulls", [(2, 20), (3, 12), (5, 10)])
def test_finite_horizon_gittins_is_within_a_tenth_of_a_per_cent_of_optimal_and_the_bound_above(arms, pulls):
    tables = baselines.finite_horizon_index(pulls)
    best = baselines.bayes_optimal_bandit(arms, pulls)
    index = baselines.bayes_optimal_bandit(arms, pulls, lambda wins, losses, left: tables[left][wins, losses])
    bound, _ = baselines.lagrangian_bound(arms, pulls, steps=30)
    assert 0.999 * best < index <= best + 1e-12
    assert best < bound < 1.1 * best


def test_a_player_in_the_environment_gets_what_the_exact_programme_says():
    env = common.make("Bandit5-v0", num_envs=10_000, seed=1)
    tasks = env.sample_tasks(10_000, split="test")
    player = baselines.bandit_player(
        "finite_horizon_gittins", 5, 10, baselines.finite_horizon_index(10), None
    )
    mean, error = baselines.over_all_bandits(baselines.play_bandits(env, tasks, 10, player), tasks)
    assert abs(mean - 6.660) < 4 * error


def test_the_posterior_of_an_mdp_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    posterior = baselines.Posterior(2, states=3, actions=2)
    count, steps = torch.zeros(2, 3, 2, 3), 40
    rewards = [[[[] for _ in range(2)] for _ in range(3)] for _ in range(2)]
    for _ in range(steps):
        state, next_state = (torch.randint(3, (2,), generator=generator) for _ in range(2))
        action, reward = torch.randint(2, (2,), generator=generator), torch.randn(2, generator=generator)
        posterior.update(state, action, reward, next_state)
        for task in range(2):
            count[task, state[task], action[task], next_state[task]] += 1
            rewards[task][state[task]][action[task]].append(reward[task].item())
    assert torch.equal(posterior.counts, 1 + count)
    for task, state, action in itertools.product(range(2), range(3), range(2)):
        paid = rewards[task][state][action]
        assert posterior.precision[task, state, action] == 1 + len(paid)
        mean = (1.0 + sum(paid)) / (1 + len(paid))  # prior N(1, 1), noise N(0, 1)
        assert posterior.mean[task, state, action].item() == pytest.approx(mean, abs=1e-5)
    draws = [posterior.sample_mdp(generator) for _ in range(4000)]
    transitions, means = (torch.stack(tables) for tables in zip(*draws, strict=True))
    expected = posterior.counts / posterior.counts.sum(-1, keepdim=True)
    assert torch.allclose(transitions.mean(0), expected, atol=0.02)
    assert torch.allclose(means.mean(0), posterior.mean, atol=0.08)
    assert torch.allclose(means.var(0), 1 / posterior.precision, rtol=0.15)


def test_value_iteration_equals_trying_every_policy():
    states, actions, horizon = 2, 2, 3
    generator = torch.Generator().manual_seed(0)
    transitions = torch.rand(3, states, actions, states, generator=generator)
    transitions /= transitions.sum(-1, keepdim=True)
    rewards = torch.randn(3, states, actions, generator=generator)
    policy, value = baselines.plan(transitions, rewards, horizon)

    def follow(task, plan):
        future = [0.0] * states
        for choice in reversed(plan):
            future = [
                rewards[task, s, choice[s]].item()
                + sum(transitions[task, s, choice[s], n].item() * future[n] for n in range(states))
                for s in range(states)
            ]
        return future

    choices = list(itertools.product(range(actions), repeat=states))
    for task in range(3):
        best = max(follow(task, plan)[0] for plan in itertools.product(choices, repeat=horizon))
        assert value[task, 0].item() == pytest.approx(best, abs=1e-5)
        assert follow(task, policy[:, task].tolist())[0] == pytest.approx(best, abs=1e-5)


def test_told_players_of_mdps_reach_in_play_what_the_tables_say():
    env = common.make("TabularMDP-v0", num_envs=1000, seed=1)
    tasks = env.sample_tasks(1000, split="test")
    transitions, rewards = env.tables(tasks)
    policy, value = baselines.plan(transitions, rewards, env.horizon)
    env.set_tasks(tasks)
    obs, _ = env.reset(seed=1)
    row, returns = torch.arange(1000), torch.zeros(1000)
    for step in range(env.horizon):
        obs, reward, *_ = env.step(policy[step, row, obs.argmax(1)])
        returns += reward
    mean, error = baselines.mean_and_error(returns - value[:, 0])
    assert abs(mean) < 4 * error


def test_gridnavi_search_path_is_legal_and_play_reaches_the_exact_numbers():
    env = common.make("GridNavi-v0", num_envs=21, seed=1)
    tasks = env.sample_tasks(21, split="test")
    for path in (baselines.SEARCH, baselines.SEARCH_REST):
        hops = [abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in itertools.pairwise([(0, 0), *path])]
        assert set(hops) == {1}
    goals = {tuple(goal) for goal in tasks.long().tolist()}
    assert goals <= set(baselines.SEARCH) | set(baselines.SEARCH_REST)
    optimal = baselines.gridnavi_optimal(tasks, env.horizon)
    assert torch.allclose(baselines.play_gridnavi(env, tasks, 1, "optimal")[:, 0], optimal, atol=1e-4)
    bayes = baselines.play_gridnavi(env, tasks, 3, "bayes_optimal")
    assert torch.allclose(bayes[:, 1:].mean(0), optimal.mean().expand(2), atol=1e-4)
    assert bayes[:, 0].mean().item() == pytest.approx(env.references["bayes_optimal_ep0"], abs=1e-3)


def test_maze_distances_equal_a_plain_search_maze_by_maze():
    env = common.make("Maze-v0", num_envs=20, seed=1)
    tasks = env.sample_tasks(20)
    walls, target, side = tasks[:, :-2].bool(), tasks[:, -1].long(), env.side
    ahead = torch.tensor([-side, 1, side, -1])
    sources = torch.arange(side * side) == target[:, None]
    steps = baselines.distances(walls, ahead, sources)
    for maze in range(20):
        start = int(tasks[maze, -2])
        frontier, seen, depth = {(start // 4, start % 4)}, set(), 0
        while all(square != target[maze] for square, _ in frontier):
            seen |= frontier
            turned = {(square, (heading + turn) % 4) for square, heading in frontier for turn in (1, -1)}
            moved = {(square + int(ahead[heading]), heading) for square, heading in frontier}
            frontier = {place for place in turned | moved if not walls[maze, place[0]]} - seen
            depth += 1
        assert steps[maze, start // 4, start % 4] == depth


def test_maze_players_are_ordered_and_the_told_one_takes_the_shortest_way():
    env = common.make("Maze-v0", num_envs=60, seed=1)
    tasks = env.sample_tasks(60, split="test")
    results = {
        player: baselines.play_mazes(env, tasks, player) for player in ("random", "explore", "optimal")
    }
    ahead = torch.tensor([-env.side, 1, env.side, -1])
    sources = torch.arange(env.side**2) == tasks[:, -1:].long()
    shortest = baselines.distances(tasks[:, :-2].bool(), ahead, sources)
    start = tasks[:, -2].long()
    shortest = shortest[torch.arange(60), start // 4, start % 4]
    assert torch.equal(results["optimal"][1].long(), shortest)
    assert (results["explore"][1] >= shortest).all() and results["explore"][2].float().mean() > 0.95
    assert results["random"][0].mean() < results["explore"][0].mean() < results["optimal"][0].mean()


@pytest.mark.parametrize("env_id", baselines.POINT_PLAYERS)
def test_going_straight_at_a_goal_gets_the_closed_form_which_no_random_detour_beats(env_id):
    env = common.make(env_id, num_envs=500, seed=1)
    tasks = env.sample_tasks(500, split="test")
    returns = baselines.play_points(env, tasks, "optimal")
    env.set_tasks(tasks)
    start, _ = env.reset(seed=baselines.SEED)
    formula = baselines.straight_line(start, tasks, env.horizon, env_id.startswith("Sparse"))
    assert torch.allclose(returns, formula, atol=2e-3)
    for player in baselines.POINT_PLAYERS[env_id]:
        assert (baselines.play_points(env, tasks, player) <= returns + 1e-3).all()


def test_exact_posterior_sampling_tries_one_place_an_episode_and_goes_back_to_the_one_that_paid():
    env = common.make("SparsePointGoal-v0", num_envs=400, seed=1)
    angle = torch.tensor([0.1, 1.5, 2.9])  # so far apart that an episode tells about one of them only
    goals = torch.stack([angle.cos(), angle.sin()], 1)
    tasks = goals[torch.arange(400) % 3]
    optimal = baselines.play_points(env, tasks, "optimal")
    known = baselines.play_posterior_sampling(env, tasks, tasks[:1], 1)[::3, 0]
    assert torch.allclose(known, optimal[::3], atol=1e-4)  # only one goal is possible: nothing to find out
    returns = baselines.play_posterior_sampling(env, tasks, goals, 4)
    found = returns > 0
    assert torch.allclose(returns[found], optimal[:, None].expand(-1, 4)[found], atol=1e-4)
    assert (found[:, 1:] >= found[:, :-1]).all() and found[:, 2:].all()  # two misses leave the third goal
    assert found.float().mean(0)[:2].tolist() == pytest.approx([1 / 3, 2 / 3], abs=0.1)


# ---- the constants in common/ are what the programme measures


@pytest.mark.parametrize("arms", [5, 10, 50])
def test_bandit_constants(arms):
    env = common.make(f"Bandit{arms}-v0", num_envs=1000, seed=3)
    tasks = env.sample_tasks(1000)
    for pulls in (10, 100):
        references = env.trial_references[pulls]
        assert references["random"] == pulls / 2
        for name in ("greedy", "thompson", "finite_horizon_gittins"):
            setting = baselines.finite_horizon_tables(pulls) if name.startswith("finite") else None
            player = baselines.bandit_player(name, arms, pulls, setting, torch.Generator().manual_seed(5))
            mean, error = baselines.over_all_bandits(baselines.play_bandits(env, tasks, pulls, player), tasks)
            assert abs(mean - references[name]) < 4 * error, (pulls, name, mean, error)
    exact = baselines.bayes_optimal_bandit(arms, 10)
    assert env.trial_references[10]["bayes_optimal"] == pytest.approx(exact, abs=1e-3)


def test_tabular_constants():
    env = common.make("TabularMDP-v0", num_envs=300, seed=3)
    for player, returns in zip(
        ("random", "optimal"), baselines.told_mdps(env, env.sample_tasks(1000, "test")), strict=True
    ):
        assert env.references[player] == pytest.approx(returns.mean().item(), abs=0.01)
    tasks = env.sample_tasks(300, split="test")
    for player in ("greedy", "psrl"):
        returns = baselines.play_mdps(env, tasks, 10, player).sum(1)
        mean, error = baselines.mean_and_error(returns)
        assert abs(mean - env.trial_references[10][player]) < 4 * error


def test_grid_constants():
    env = common.make("GridNavi-v0", num_envs=21, seed=3)
    goals = env.sample_tasks(21, split="test")
    optimal = baselines.gridnavi_optimal(goals, env.horizon).mean().item()
    random = sum(baselines.gridnavi_random(goal, env.horizon) for goal in goals) / 21
    assert env.references["optimal"] == pytest.approx(optimal, abs=1e-3)
    assert env.references["random"] == pytest.approx(random, abs=1e-3)
    maze = common.make("Maze-v0", num_envs=100, seed=3)
    tasks = maze.sample_tasks(100, split="test")
    for player in ("random", "explore", "optimal"):
        mean, error = baselines.mean_and_error(baselines.play_mazes(maze, tasks, player)[0])
        assert abs(mean - maze.references[player]) < 4 * error, player


@pytest.mark.parametrize("env_id", baselines.POINT_PLAYERS)
def test_point_constants(env_id):
    env = common.make(env_id, num_envs=1000, seed=3)
    tasks = env.sample_tasks(1000)
    assert set(env.references) == set(baselines.POINT_PLAYERS[env_id])
    for player, value in env.references.items():
        mean, error = baselines.mean_and_error(baselines.play_points(env, tasks, player))
        assert math.isclose(mean, value, abs_tol=6 * error + 1e-3), (player, mean, error)


@pytest.mark.parametrize(
    "env_id",
    [
        "HalfCheetahDir-v0",
        "HopperRandParams-v0",
        "ReacherGoal-v0",
        "PendulumSwingUp-v0",
        "BrokenReacher-v0",
        "HopperGravity2-v0",
        "GaussianPair-v0",
    ],
)
@pytest.mark.parametrize("player", ["random", "still"])
def test_the_constants_of_simple_players_are_what_the_players_reach(env_id, player):
    pytest.importorskip("mujoco")
    env = common.make(env_id, num_envs=80, seed=0)
    tasks = env.sample_tasks(40, split="test").repeat_interleave(2, 0)
    mean, error = baselines.mean_and_error(baselines.play_locomotion(env, tasks, player).view(40, 2).mean(1))
    assert abs(mean - env.references[player]) < 4 * error + 0.1


@pytest.mark.parametrize("env_id", ["PointWall-v0", "PointDoor-v0"])
@pytest.mark.parametrize("player", ["straight", "around"])
def test_the_constants_of_the_wall_are_what_the_players_reach(env_id, player):
    env = common.make(env_id, num_envs=1000, seed=0)
    tasks = env.sample_tasks(100, split="test").repeat_interleave(10, 0)
    returns = baselines.play_wall(env, tasks, player, torch.full((1000, 1), 0.6))
    mean, error = baselines.mean_and_error(returns)
    assert abs(mean - env.references[player]) < 6 * error  # of both
