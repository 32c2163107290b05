"""Swing up: three bodies of Gymnasium's classic control as tasks of one distribution, continuous torque.

ClassicControl-v0   A task row is one of three one-hot vectors: cart pole, pendulum, acrobot. Each hangs down,
                    or nearly (the pendulum starts anywhere), and should stand. obs [B, 6] and actions in
                    [-1, 1] mean different things to them; what a body does not use of obs is 0. 200 steps.

body      dynamics     action times   obs                                         reward of a step
cartpole  CartPole-v1  10 N           x, x', cos, sin, angle', 0                  (1 + cos) / 2
pendulum  Pendulum-v1  2 Nm           cos, sin, angle', 0, 0, 0                   Pendulum-v1's, -16.3 to 0
acrobot   Acrobot-v1   1 Nm           cos, sin, cos, sin, and both velocities     height of the tip, 0 to 1

The cart's episode ends where CartPole-v1's does, 2.4 m from the middle (not where the pole falls: it begins
there). CartPole-v1 pushes to either side only, Acrobot-v1 knows -1, 0 and 1 Nm; here any force between is
possible. A step is .02, .05 and .2 s. CartPoleSwingUp-v0, PendulumSwingUp-v0 and AcrobotSwingUp-v0 have the
one body only.
"""

import math

import torch

from common.base import TaskVectorEnv, box


def push_cart(state, force, length=0.5, pole=0.1, cart=1.0):
    """CartPole-v1's step of .02 s. state [n, 4]: x, x', angle from upright, angle'; force [n] in N.

    length: half the pole's, in m; pole, cart: masses in kg; numbers or [n]. Returns the next state.
    """
    x, x_dot, theta, theta_dot = state.unbind(1)
    cos, sin, both = theta.cos(), theta.sin(), pole + cart
    temp = (force + pole * length * theta_dot**2 * sin) / both
    theta_acc = (9.8 * sin - cos * temp) / (length * (4 / 3 - pole * cos**2 / both))
    x_acc = temp - pole * length * theta_acc * cos / both
    return state + 0.02 * torch.stack([x_dot, x_acc, theta_dot, theta_acc], 1)


def cartpole(state, push):
    """state [n, 4]: x, x', angle from upright, angle'. push [n]. Returns the next state, reward, ended."""
    after = push_cart(state, 10 * push)
    return after, (1 + after[:, 2].cos()) / 2, after[:, 0].abs() > 2.4


def see_cartpole(state):
    x, x_dot, theta, theta_dot = state.unbind(1)
    return torch.stack([x, x_dot, theta.cos(), theta.sin(), theta_dot], 1)


def turn_pendulum(theta, theta_dot, torque, mass=1.0, length=1.0, gravity=10.0):
    """Pendulum-v1's step of .05 s. theta, from upright, theta_dot, torque in Nm: [n].

    mass in kg, length in m, gravity in m/s^2: numbers or [n]. Returns theta, theta_dot, reward.
    """
    angle = (theta + math.pi) % (2 * math.pi) - math.pi
    cost = angle**2 + 0.1 * theta_dot**2 + 0.001 * torque**2
    change = 3 * gravity / (2 * length) * theta.sin() + 3 / (mass * length**2) * torque
    theta_dot = (theta_dot + change * 0.05).clamp(-8, 8)
    return theta + 0.05 * theta_dot, theta_dot, -cost


def pendulum(state, push):
    """state [n, 4]: angle from upright, angle', 0, 0. push [n]. Returns the next state, reward, ended."""
    theta, theta_dot, reward = turn_pendulum(state[:, 0], state[:, 1], 2 * push)
    none = torch.zeros_like(theta)
    return torch.stack([theta, theta_dot, none, none], 1), reward, none > 0


def see_pendulum(state):
    return torch.stack([state[:, 0].cos(), state[:, 0].sin(), state[:, 1]], 1)


def acrobot(state, push):
    """state [n, 4]: angle of the first link from hanging, of the second from the first, and their velocities.

    push [n]: the torque between the links. Returns the next state, reward, ended.
    """
    k1 = acrobot_change(state, push)  # Runge and Kutta's step of .2 s
    k2 = acrobot_change(state + 0.1 * k1, push)
    k3 = acrobot_change(state + 0.1 * k2, push)
    k4 = acrobot_change(state + 0.2 * k3, push)
    after = state + 0.2 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    angle = after[:, :2] - 2 * math.pi * (after[:, :2] / (2 * math.pi)).round()
    fast = torch.tensor([4 * math.pi, 9 * math.pi], dtype=state.dtype, device=state.device)
    after = torch.cat([angle, after[:, 2:].clamp(-fast, fast)], 1)
    height = -angle[:, 0].cos() - angle.sum(1).cos()  # -2 to 2
    return after, (2 + height) / 4, torch.zeros_like(push, dtype=torch.bool)


def acrobot_change(state, torque):
    """Time derivative of the state, as in Sutton and Barto's book: links of 1 m and 1 kg, moments of 1."""
    theta1, theta2, dtheta1, dtheta2 = state.unbind(1)
    cos, sin = theta2.cos(), theta2.sin()
    d1 = 0.25 + (1 + 0.25 + cos) + 2
    d2 = 0.25 + 0.5 * cos + 1
    phi2 = 0.5 * 9.8 * (theta1 + theta2 - math.pi / 2).cos()
    phi1 = -0.5 * dtheta2**2 * sin - dtheta2 * dtheta1 * sin
    phi1 = phi1 + 1.5 * 9.8 * (theta1 - math.pi / 2).cos() + phi2
    ddtheta2 = torque + d2 / d1 * phi1 - 0.5 * dtheta1**2 * sin - phi2
    ddtheta2 = ddtheta2 / (1.25 - d2**2 / d1)
    ddtheta1 = -(d2 * ddtheta2 + phi1) / d1
    return torch.stack([dtheta1, dtheta2, ddtheta1, ddtheta2], 1)


def see_acrobot(state):
    theta1, theta2, dtheta1, dtheta2 = state.unbind(1)
    return torch.stack([theta1.cos(), theta1.sin(), theta2.cos(), theta2.sin(), dtheta1, dtheta2], 1)


# a body's place in a task row is its place here
BODIES = {
    "cartpole": (cartpole, see_cartpole),
    "pendulum": (pendulum, see_pendulum),
    "acrobot": (acrobot, see_acrobot),
}


class ClassicControl(TaskVectorEnv):
    """task_dim 3, obs [B, 6], actions in [-1, 1], horizon 200 or the end of the track."""

    terminates = True
    num_test_tasks = 60  # the bodies in turn: all are trained on and tested, from fresh starts

    def __init__(self, num_envs, bodies=tuple(BODIES), horizon=200, device="cpu", seed=None):
        spaces = box(-math.inf, math.inf, (6,)), box(-1, 1, (1,)), box(0, 1, (3,))
        super().__init__(num_envs, *spaces, horizon, device, seed)
        rows = dict(zip(BODIES, torch.eye(3, device=self.device), strict=True))
        self.named_tasks = {body: rows[body] for body in bodies}
        self._members = []  # for each body that is there: its environments [n], its dynamics, its observation

    @property
    def references(self):
        return REFERENCES.get(self.spec.id, {}) if self.spec and self.horizon == 200 else {}

    def _draw_tasks(self, n, generator):
        """All bodies in turn; which of them get one more, if n leaves a rest, is random."""
        rows = torch.stack(list(self.named_tasks.values())).to(generator.device)
        order = torch.randperm(len(rows), generator=generator, device=generator.device)
        turns, rest = divmod(n, len(rows))
        return torch.cat([rows.repeat(turns, 1), rows[order[:rest]]])

    def _prepare(self):
        body = self._task.argmax(1)
        members = [((body == number).nonzero()[:, 0], *BODIES[name]) for number, name in enumerate(BODIES)]
        self._members = [member for member in members if len(member[0])]

    def _start(self):
        """State [B, 4] in float64, as in Gymnasium: metres and radians, and their velocities."""
        draw = {"generator": self._generator, "device": self.device, "dtype": torch.float64}
        u = 2 * torch.rand(self.num_envs, 4, **draw) - 1
        hanging = torch.tensor([0, 0, math.pi, 0], dtype=torch.float64, device=self.device)
        anywhere = torch.tensor([math.pi, 1, 0, 0], dtype=torch.float64, device=self.device)
        starts = torch.stack([hanging + 0.05 * u, anywhere * u, 0.1 * u], 1)  # [B, body, 4]
        return starts[torch.arange(self.num_envs, device=self.device), self._task.argmax(1)]

    def _observe(self, state):
        obs = torch.zeros(self.num_envs, 6, device=self.device)
        for rows, _, see in self._members:
            seen = see(state[rows])
            obs[rows, : seen.shape[1]] = seen.float()
        return obs

    def _transition(self, state, action):
        push = action[:, 0].double().clamp(-1, 1)
        after = torch.empty_like(state)
        reward = torch.zeros(self.num_envs, device=self.device)
        ended = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        for rows, move, _ in self._members:
            after[rows], paid, ended[rows] = move(state[rows], push[rows])
            reward[rows] = paid.float()
        return after, reward, ended, {}


# python -m benchmark.baselines goals: 60 held-out tasks, 5 starts each, one episode
REFERENCES = {
    "AcrobotSwingUp-v0": {"random": 3.31, "still": 0.2},
    "CartPoleSwingUp-v0": {"random": 5.01, "still": 0.05},
    "ClassicControl-v0": {"random": -411.4, "still": -420.59},
    "PendulumSwingUp-v0": {"random": -1225.81, "still": -1220.11},
}
