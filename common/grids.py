"""Grids with something hidden in them.

GridNavi-v0  VariBAD's 5 x 5 grid (Zintgraf et al. 2020, arXiv:1910.08348): start in a corner; one cell is the
             goal and looks like any other; +1 for every step that ends on it, -.1 for every other; five
             actions (stay, up, right, down, left); 15 steps. The goal is none of the four cells around the
             start, so there are 21 tasks: the "held-out" set is all of them, with fresh seeds.
Maze-v0      A gridded form of RL^2's visual navigation (Duan et al. 2016, arXiv:1611.02779, Sec 3.3): a maze
             that is new in every task, of which the agent sees only the 3 x 3 squares around it, turned to
             its heading, and its compass. Somewhere waits a target that it cannot see. Turn left, turn right
             or go forward; -.01 a step, +1 on the target, which ends the episode. The maze, the start and the
             target stay the same for all episodes of the task: the second time, one should know the way.
"""

import gymnasium as gym
import numpy as np
import torch

from common.base import TaskVectorEnv, box


class GridNavi(TaskVectorEnv):
    """VariBAD's grid. task_dim 2 = goal (row, column), obs = one-hot cell [B, 25], Discrete(5)."""

    size = 5
    num_test_tasks = 21 * 48

    def __init__(self, num_envs, horizon=15, device="cpu", seed=None):
        cells = self.size**2
        space = box(0, self.size - 1, (2,))
        super().__init__(num_envs, box(0, 1, (cells,)), gym.spaces.Discrete(5), space, horizon, device, seed)
        row, column = torch.arange(cells) // self.size, torch.arange(cells) % self.size
        moves = torch.tensor([(0, 0), (-1, 0), (0, 1), (1, 0), (0, -1)])  # stay, up, right, down, left
        places = torch.stack([row, column], 1) + moves[:, None]  # [5, 25, 2]
        places = places.clamp(0, self.size - 1)  # a wall stops the move
        self._next_cell = (places[..., 0] * self.size + places[..., 1]).flatten().to(self.device)  # [5 * 25]
        self._one_hot = torch.eye(cells, device=self.device)
        self._on_goal, self._elsewhere = torch.tensor([1.0, -0.1], device=self.device)
        goals = torch.stack([row, column], 1).float()
        self._goals = goals[(row > 1) | (column > 1)]  # [21, 2], on the CPU
        if horizon == 15:
            self.references = GRIDNAVI_REFERENCES

    def _draw_tasks(self, n, generator):
        pick = torch.randint(len(self._goals), (n,), generator=generator, device=generator.device)
        return self._goals.to(generator.device)[pick]

    def _draw_test_tasks(self, generator):
        return self._goals.repeat(self.num_test_tasks // len(self._goals), 1)  # every goal equally often

    def _prepare(self):
        self._goal = (self._task[:, 0] * self.size + self._task[:, 1]).long()

    def _start(self):
        return torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)

    def _observe(self, state):
        return self._one_hot.index_select(0, state)

    def _transition(self, state, action):
        state = self._next_cell.index_select(0, torch.add(state, action, alpha=self.size**2))
        return state, torch.where(state == self._goal, self._on_goal, self._elsewhere), None, {}


class Maze(TaskVectorEnv):
    """Random mazes seen through a window. task_dim = squares + 2: walls, start 4 * square + heading, target.

    A maze of c x c rooms is a spanning tree on them, drawn on a board of (2c + 1)^2 squares: rooms at odd
    coordinates, the squares between two rooms open or walled. obs [B, 9 + 4]: walls of the window (row by
    row, the agent's heading is up), one-hot heading (N, E, S, W). Discrete(3): left, right, forward.
    """

    terminates = True
    has_success = True

    def __init__(self, num_envs, rooms=4, horizon=100, device="cpu", seed=None):
        self.rooms, self.side = rooms, 2 * rooms + 1
        squares = self.side**2
        high = np.concatenate([np.ones(squares), [4 * squares - 1, squares - 1]]).astype(np.float32)
        task_space = gym.spaces.Box(np.zeros_like(high), high, dtype=np.float32)
        obs_space = box(0, 1, (13,))
        super().__init__(num_envs, obs_space, gym.spaces.Discrete(3), task_space, horizon, device, seed)
        # the nine squares around, north up, as steps on the flattened board
        self._around = [row * self.side + column for row in (-1, 0, 1) for column in (-1, 0, 1)]
        self._view, self._move = self._tables()
        self._on_target, self._elsewhere = torch.tensor([1.0, -0.01], device=self.device)
        # the table's rows from here on: on target
        self._first_found = torch.tensor(4 * 512, device=self.device)
        if (rooms, horizon) == (4, 100):
            self.references = MAZE_REFERENCES

    def _draw_tasks(self, n, generator, test=False):
        """Mazes whose door pattern falls into one class of eight are held out: disjoint by construction."""
        kept, found, batch = [], 0, (9 * n if test else n + n // 4) + 64
        while found < n or not kept:
            doors = self._draw_doors(batch, generator)  # [batch, D] bool
            code = (doors * torch.arange(1, doors.shape[1] + 1, device=doors.device)).sum(1)
            doors = doors[(code % 8 == 0) == test]
            kept.append(doors)
            found += len(doors)
        return self._furnish(torch.cat(kept)[:n], generator)

    def _draw_test_tasks(self, generator):
        return self._draw_tasks(self.num_test_tasks, generator, test=True)

    def _doors(self):
        """Where a door can be: pairs of neighbouring rooms, [D, 2], those across first."""
        room = torch.arange(self.rooms**2).view(self.rooms, self.rooms)
        across = torch.stack([room[:, :-1], room[:, 1:]], -1).view(-1, 2)
        return torch.cat([across, torch.stack([room[:-1], room[1:]], -1).view(-1, 2)])

    def _draw_doors(self, n, generator):
        """n spanning trees at once, bool [n, D]: Prim's algorithm on random weights, looping over rooms."""
        device = generator.device
        first, second = self._doors().to(device).T
        weight = torch.rand(n, len(first), generator=generator, device=device)
        reached = torch.zeros(n, self.rooms**2, dtype=torch.bool, device=device)
        reached[:, 0] = True
        doors = torch.zeros_like(weight, dtype=torch.bool)
        for _ in range(self.rooms**2 - 1):
            frontier = reached[:, first] != reached[:, second]
            # [n, 1] cheapest into a new room
            door = weight.masked_fill(~frontier, 2.0).argmin(1, keepdim=True)
            doors.scatter_(1, door, True)
            reached.scatter_(1, first[door], True).scatter_(1, second[door], True)
        return doors

    def _furnish(self, doors, generator):
        """Doors [n, D] -> task rows: the walls, a start room and heading, a target in another room."""
        n, device = len(doors), generator.device
        room = torch.arange(self.rooms**2, device=device)
        row, column = room // self.rooms, room % self.rooms
        square = (2 * row + 1) * self.side + 2 * column + 1  # [rooms^2] where each room lies
        first, second = self._doors().to(device).T
        walls = torch.ones(n, self.side**2, device=device)
        walls[:, square] = 0.0
        walls[:, (square[first] + square[second]) // 2] = 1.0 - doors.float()  # a door lies between its rooms
        start = torch.randint(len(room), (n,), generator=generator, device=device)
        jump = torch.randint(1, len(room), (n,), generator=generator, device=device)
        heading = torch.randint(4, (n,), generator=generator, device=device)
        target = square[(start + jump) % len(room)]
        return torch.cat([walls, (4 * square[start] + heading)[:, None].float(), target[:, None].float()], 1)

    # A state is a place, 4 * square + heading. What is seen from it, and where each action leads, depend on
    # the nine squares around and on the heading alone: 512 x 4 cases, one table for all mazes. So a step is
    # four look-ups, whatever the size of the maze. A state of the batch is 4 * squares * row + place.

    def _tables(self):
        """By nine squares and heading: what is seen, [2 * 512 * 4, 13], and how actions move the state."""
        ahead = torch.tensor([-self.side, 1, self.side, -1])  # one square N, E, S, W
        window = [f * ahead + r * ahead.roll(-1) for f in (1, 0, -1) for r in (-1, 0, 1)]
        window = torch.stack(window, 1)  # [4, 9] the squares as each heading sees them, forward up
        # [4, 9] their north-up places
        turned = (window[:, :, None] == torch.tensor(self._around)).int().argmax(-1)
        bits = torch.arange(512)[:, None] >> torch.arange(9) & 1  # [512, 9] a bit of the code is a square
        view = bits[:, turned].float()  # [512, 4, 9]
        turns = torch.tensor([[3, 1], [-1, 1], [-1, 1], [-1, -3]])  # [4, 2] left and right, from each heading
        forward = 4 * ahead * (view[:, :, 1] == 0)  # [512, 4] a wall in front stops it
        move = torch.cat([turns.expand(512, 4, 2), forward[..., None]], 2)
        view = torch.cat([view, torch.eye(4).expand(512, 4, 4)], 2).flatten(0, 1)
        view, move = view.repeat(2, 1), move.flatten().repeat(2)  # twice: the target looks like any square
        return view.to(self.device), move.to(self.device)

    def _prepare(self):
        walls, first, target = self._task[:, :-2].short(), self._task[:, -2].long(), self._task[:, -1:].long()
        # [B, squares]; on the border the code is nonsense, but nobody stands there
        code = sum(walls.roll(-shift, 1) << bit for bit, shift in enumerate(self._around))
        code.scatter_add_(1, target, torch.full_like(target, 512, dtype=torch.int16))
        key = 4 * code.long()[:, :, None] + torch.arange(4, device=self.device)
        self._key = key.flatten()  # [B * squares * 4]: for each environment and place a row of the tables
        # [B] into _key
        self._first = first + torch.arange(0, len(self._key), 4 * self.side**2, device=self.device)

    def _start(self):
        return self._first

    def _observe(self, state):
        return self._view.index_select(0, self._key.index_select(0, state))

    def _transition(self, state, action):
        key = self._key.index_select(0, state)
        state = state + self._move.index_select(0, torch.add(action, key, alpha=3))
        found = self._key.index_select(0, state) >= self._first_found
        return state, torch.where(found, self._on_target, self._elsewhere), found, {"success": found.clone()}


# python -m benchmark.baselines gridnavi: exact. The Bayes-optimal player earns 4.0 in its first episode;
# from the second on it earns as much as one who was told the goal ("optimal").
GRIDNAVI_REFERENCES = {"random": -1.165, "bayes_optimal_ep0": 4.0, "optimal": 11.071}
# python -m benchmark.baselines maze: 1,000 held-out mazes, standard errors .02, .007, .002. "explore" recalls
# all it saw and goes to the nearest room not yet visited (32 steps on average); "optimal" is told all (12).
MAZE_REFERENCES = {"random": -0.744, "explore": 0.685, "optimal": 0.893}
