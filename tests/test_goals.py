"""Goals, the point maze, the sparse reacher and classic control: against naive versions and Gymnasium."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import common
from common import classic, pointmaze

GOALS = ["PointGoal-v0", "PointRobot-v0", "SparsePointGoal-v0", "PointMaze-v0", "ReacherGoal-v0"]


def make(env_id, num_envs, **kwargs):
    if env_id == "ReacherGoal-v0":
        pytest.importorskip("mujoco")
    return common.make(env_id, num_envs=num_envs, seed=0, **kwargs)


def seeker(env, tasks, obs, generator):
    """Half of the environments walk to their goals, the others about."""
    noise = 2 * torch.rand(env.num_envs, 2, generator=generator) - 1
    walk = 10 * (tasks - env.achieved_goal(obs))
    return torch.where(torch.arange(env.num_envs)[:, None] % 2 == 0, walk, noise)


# ---- the interface


@pytest.mark.parametrize("env_id", GOALS)
def test_reward_and_termination_are_those_of_the_goal_that_is_the_task(env_id):
    """On every step, to the last bit: what hindsight computes is what the environment would have paid."""
    n = 300
    env = make(env_id, n)
    tasks = env.sample_tasks(n)
    env.set_tasks(tasks)
    obs, _ = env.reset(seed=0)
    generator, met = torch.Generator().manual_seed(0), 0
    for _ in range(2 * env.horizon):
        action = seeker(env, tasks, obs, generator) * float(env.single_action_space.high[0])
        obs, reward, terminated, _, info = env.step(action)
        achieved = env.achieved_goal(info["final_obs"])
        assert achieved.shape == (n, *env.goal_space.shape)
        assert torch.equal(env.compute_reward(achieved, tasks), reward)
        assert torch.equal(env.compute_terminated(achieved, tasks), terminated)
        if env.has_success and env_id not in ("SparsePointGoal-v0", "PointGoal-v0"):
            assert torch.equal(info["success"], reward == 0)
        met += int(info.get("success", terminated).sum())
    assert met > 0 or not env.has_success


@pytest.mark.parametrize("env_id", GOALS)
def test_any_goal_can_be_judged_anywhere_in_any_shape(env_id):
    env = make(env_id, 4)
    goals = env.sample_tasks(60).view(3, 4, 5, -1)
    achieved = goals.flip(2)
    reward, terminated = env.compute_reward(achieved, goals), env.compute_terminated(achieved, goals)
    assert reward.shape == terminated.shape == (3, 4, 5)
    assert reward.dtype == torch.float32 and terminated.dtype == torch.bool
    one = env.compute_reward(achieved[1, 2, 0], goals[1, 2, 0])
    assert one == reward[1, 2, 0]
    assert (env.compute_reward(goals, goals) >= reward).all()  # nowhere is better than at the goal


def test_without_goals_there_is_no_goal_space_and_asking_raises():
    env = common.make("Bandit5-v0", num_envs=2, seed=0)
    assert env.goal_space is None
    with pytest.raises(NotImplementedError, match="Bandit has no goals"):
        env.achieved_goal(torch.zeros(2, 1))


# ---- the point maze


def free(x, y):
    """Is (x, y), the middle at (0, 0), inside a free cell? Read off the picture."""
    size = len(pointmaze.WALLS)
    return pointmaze.WALLS[size - 1 - int(np.floor(y + size / 2))][int(np.floor(x + size / 2))] == "."


def test_maze_goals_are_uniform_over_the_free_cells_and_starts_in_the_upper_left_one():
    env = make("PointMaze-v0", 2000)
    goals = env.sample_tasks(20_000).numpy()
    assert all(free(x, y) for x, y in goals)
    cells = {}
    for x, y in np.floor(goals).astype(int):
        cells[x, y] = cells.get((x, y), 0) + 1
    assert len(cells) == sum(row.count(".") for row in pointmaze.WALLS)
    expected = 20_000 / len(cells)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in cells.values())
    obs, _ = env.reset(seed=0)
    assert (obs[:, 0] >= -3).all() and (obs[:, 0] <= -2).all() and pointmaze.WALLS[1][1] == "."
    assert (obs[:, 1] >= 2).all() and (obs[:, 1] <= 3).all() and obs.std(0).min() > 0.2


def test_no_wall_is_ever_entered_and_the_point_slides_along_it():
    n = 400
    env = make("PointMaze-v0", n)
    env.set_tasks(torch.full((n, 2), 3.9))  # inside a wall: no episode ends early
    obs, _ = env.reset(seed=0)
    generator, stopped = torch.Generator().manual_seed(0), 0
    heading = torch.randn(n, 2, generator=generator)
    for _ in range(99):
        heading = heading + 0.5 * torch.randn(n, 2, generator=generator)
        before = obs.double().numpy()
        obs = env.step(heading)[0]
        push = 0.25 * heading.clamp(-1, 1).double().numpy()
        for (x, y), (dx, dy), (new_x, new_y) in zip(before, push, obs.double().numpy(), strict=True):
            assert free(new_x, new_y)
            assert abs(new_x - x) <= 0.251 and abs(new_y - y) <= 0.251
            if free(x + dx, y):
                assert new_x == pytest.approx(x + dx, abs=1e-5)
            else:  # up to the wall
                edge = np.floor(x) + (dx > 0)
                assert abs(new_x - edge) < 0.0011
                stopped += 1
            if free(new_x, y + dy):
                assert new_y == pytest.approx(y + dy, abs=1e-5)
            else:
                assert abs(new_y - (np.floor(y) + (dy > 0))) < 0.0011
    assert stopped > 1000


def test_every_free_cell_can_be_reached_in_an_episode():
    """Breadth first over cells: 4 steps a cell is enough, and 100 steps are an episode."""
    size, distance, queue = len(pointmaze.WALLS), {(1, 1): 0}, [(1, 1)]
    for r, c in queue:
        for cell in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            if pointmaze.WALLS[cell[0]][cell[1]] == "." and cell not in distance:
                distance[cell] = distance[r, c] + 1
                queue.append(cell)
    assert len(distance) == sum(row.count(".") for row in pointmaze.WALLS) and size == 8
    assert 4 * (max(distance.values()) + 1) <= 100


# ---- the reacher


def test_the_reacher_is_gymnasiums_to_the_last_bit():
    n = 5
    env = make("ReacherGoal-v0", n)
    env.set_tasks(env.sample_tasks(n))
    obs, _ = env.reset(seed=3)
    twins = [gym.make("Reacher-v5").unwrapped for _ in range(n)]
    for world, twin in enumerate(twins):
        twin.reset(seed=0)
        twin.set_state(env._qpos[world].copy(), env._qvel[world].copy())
    generator, near = torch.Generator().manual_seed(0), 0
    for _ in range(49):
        action = 2 * torch.rand(n, 2, generator=generator) - 1
        obs, reward, *_ = env.step(action)
        for world, twin in enumerate(twins):
            seen = twin.step(action[world].double().numpy())[0]
            assert np.array_equal(env._qpos[world], twin.data.qpos)
            assert np.array_equal(env._qvel[world], twin.data.qvel)
            tip = twin.get_body_com("fingertip")[:2]
            expected = np.concatenate([seen[:4], seen[6:8], tip]).astype(np.float32)
            assert np.array_equal(obs[world].numpy(), expected)
            distance = np.linalg.norm(seen[8:10])
            assert abs(distance - 0.02) < 1e-6 or (reward[world] == 0) == (distance < 0.02)
            near += distance < 0.02
    twin.close()


def test_reacher_starts_and_goals_are_spread_as_gymnasiums():
    n = 4000
    env = make("ReacherGoal-v0", n)
    goals = env.sample_tasks(n)
    env.set_tasks(goals)
    obs, _ = env.reset(seed=0)
    radius = goals.norm(dim=1)
    assert (
        radius.max() <= 0.2 and abs(float((radius / 0.2).square().mean()) - 0.5) < 0.02
    )  # uniform in the disc
    angle, velocity = env._qpos[:, :2], env._qvel
    assert np.abs(angle).max() <= 0.1 and abs(angle.std() - 0.1 / 3**0.5) < 0.002
    assert np.abs(velocity[:, :2]).max() <= 0.005 and abs(velocity[:, :2].std() - 0.005 / 3**0.5) < 0.0001
    assert (velocity[:, 2:] == 0).all() and np.array_equal(env._qpos[:, 2:], goals.double().numpy())
    assert torch.allclose(obs[:, 6:], torch.tensor([0.21, 0.0]).expand(n, 2), atol=0.04)


# ---- classic control


def test_the_pendulum_and_its_reward_are_gymnasiums():
    twin = gym.make("Pendulum-v1").unwrapped
    dice = np.random.default_rng(0)
    for seed in range(5):
        twin.reset(seed=seed)
        state = torch.tensor([[*twin.state, 0, 0]], dtype=torch.float64)
        for _ in range(200):
            push = dice.uniform(-1.5, 1.5)
            obs, reward, *_ = twin.step(np.array([2 * push]))
            state, paid, ended = classic.pendulum(
                state, torch.tensor([push], dtype=torch.float64).clamp(-1, 1)
            )
            assert paid.item() == pytest.approx(reward, abs=1e-12) and not ended
            assert state[0, :2].numpy() == pytest.approx(twin.state, abs=1e-12)
            assert classic.see_pendulum(state)[0].float().numpy() == pytest.approx(obs, abs=1e-6)
            state[0, :2] = torch.tensor(twin.state)  # rounding grows: compare step by step


@pytest.mark.filterwarnings("ignore:.*already returned terminated")
def test_cart_and_pole_move_as_gymnasiums_and_the_reward_is_how_upright_the_pole_is():
    twin = gym.make("CartPole-v1").unwrapped
    twin.reset(seed=0)
    dice, ends = np.random.default_rng(0), set()
    for _ in range(10):
        twin.state = dice.uniform(-1, 1, 4) * [2, 6, np.pi, 5]
        state = torch.tensor(twin.state)[None]
        for _ in range(50):
            side = int(dice.integers(2))
            twin.step(side)
            state, reward, ended = classic.cartpole(state, torch.tensor([2.0 * side - 1]).double())
            assert state[0].numpy() == pytest.approx(twin.state, abs=1e-12)
            assert reward.item() == pytest.approx((1 + np.cos(twin.state[2])) / 2)
            assert bool(ended) == (abs(twin.state[0]) > 2.4)
            ends.add(np.sign(twin.state[0]) * bool(ended))
    assert ends >= {-1, 0, 1}  # it came to both ends of its track


def test_the_acrobot_moves_as_gymnasiums_and_the_reward_is_the_height_of_its_tip():
    twin = gym.make("Acrobot-v1").unwrapped
    dice = np.random.default_rng(0)
    for seed in range(5):
        twin.reset(seed=seed)
        state, held = torch.tensor(twin.state, dtype=torch.float64)[None], 0
        for _ in range(300):  # pushes that swing it up
            held = int(twin.state[3] > 0) * 2 if dice.random() < 0.9 else int(dice.integers(3))
            obs, *_ = twin.step(held)
            state, reward, ended = classic.acrobot(state, torch.tensor([held - 1.0]).double())
            assert state[0].numpy() == pytest.approx(twin.state, abs=1e-6)
            state = torch.tensor(twin.state)[None]  # it is chaotic: compare step by step
            assert classic.see_acrobot(state)[0].float().numpy() == pytest.approx(obs, abs=1e-6)
            height = -np.cos(twin.state[0]) - np.cos(twin.state[0] + twin.state[1])
            assert reward.item() == pytest.approx((height + 2) / 4, abs=1e-6) and not ended


def test_each_body_of_a_mixed_batch_moves_as_it_does_alone():
    names = ["acrobot", "cartpole", "pendulum", "pendulum", "acrobot"]
    env = make("ClassicControl-v0", len(names))
    env.set_tasks(torch.stack([env.named_tasks[name] for name in names]))
    env.reset(seed=0)
    state = env.state_dict()["_state"]
    action = torch.linspace(-1.5, 1.5, len(names))[:, None]
    obs, reward, terminated, truncated, info = env.step(action)
    for row, name in enumerate(names):
        move, see = classic.BODIES[name]
        after, paid, _ = move(state[row : row + 1], action[row].double().clamp(-1, 1))
        seen = see(after)[0].float()
        assert torch.equal(info["final_obs"][row, : len(seen)], seen)
        assert (info["final_obs"][row, len(seen) :] == 0).all() and reward[row] == paid.float()


def test_bodies_start_hanging_and_the_cart_ends_only_at_the_end_of_its_track():
    n = 300
    env = make("ClassicControl-v0", n)
    tasks = env.sample_tasks(n)
    assert torch.equal(tasks.sum(0), torch.tensor([100.0, 100.0, 100.0]))  # equal shares
    assert torch.equal(env.sample_tasks(6, split="test").argmax(1), torch.tensor([0, 1, 2, 0, 1, 2]))
    env.set_tasks(tasks)
    obs, _ = env.reset(seed=0)
    cart, pendulum, acrobot = (obs[tasks.argmax(1) == body] for body in range(3))
    assert (cart[:, 2] < -0.99).all() and cart[:, 0].abs().max() <= 0.05
    assert pendulum[:, 0].mean().abs() < 0.2 and pendulum[:, 2].abs().max() <= 1
    assert (acrobot[:, [0, 2]] > 0.99).all()
    for _ in range(199):
        obs, reward, terminated, truncated, info = env.step(torch.ones(n, 1))
        over = (tasks[:, 0] == 1) & (info["final_obs"][:, 0].abs() > 2.4)
        assert torch.equal(terminated, over)
        assert (reward[tasks[:, 1] == 0] >= 0).all()  # to go on never costs a cart or an acrobot
    one = common.make("PendulumSwingUp-v0", num_envs=4, seed=0)
    assert (one.sample_tasks(4).argmax(1) == 1).all() and list(one.named_tasks) == ["pendulum"]
