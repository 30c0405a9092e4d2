"""Teach a cart to balance a pole, by advantage actor-critic in a loop of your own. The environment is in this file.

Sixteen carts run side by side as one batch; a score is the number of steps for which a pole stands, at most 500::

    python docs/examples/fabric/actor_critic.py
"""

import argparse
import math

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from fulmen_fabric import Fabric

CARTS, HORIZON, LONGEST = 16, 32, 500
REWARD, DISCOUNT, BLEND = 0.05, 0.99, 0.95


class CartPoles:
    """A batch of poles on carts, each pushed left or right at every step.

    Source of the equations and constants: Barto, Sutton and Anderson 1983; Euler's method with a step of 20 ms.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.state = torch.empty(count, 4, device=device)
        """Position (m), speed (m/s), angle (rad) and angular speed (rad/s) of each."""
        self.steps = torch.zeros(count, device=device)
        self.restart(torch.ones(count, dtype=torch.bool, device=device))

    def restart(self, which: Tensor) -> None:
        self.state = torch.where(which[:, None], torch.rand_like(self.state) * 0.1 - 0.05, self.state)
        self.steps = torch.where(which, 0, self.steps)

    def push(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Push each cart with 10 N; returns which poles fell, and which episodes ended for that or another reason."""
        x, speed, angle, turning = self.state.unbind(dim=1)
        force = torch.where(right.bool(), 10.0, -10.0)
        sine, cosine = angle.sin(), angle.cos()
        pull = (force + 0.05 * turning.square() * sine) / 1.1  # masses: cart 1 kg, pole 0.1 kg of half length 0.5 m
        spin = (9.8 * sine - cosine * pull) / (0.5 * (4 / 3 - 0.1 * cosine.square() / 1.1))
        push = pull - 0.05 * spin * cosine / 1.1
        moved = (x + 0.02 * speed, speed + 0.02 * push, angle + 0.02 * turning, turning + 0.02 * spin)
        self.state = torch.stack(moved, dim=1)
        self.steps = self.steps + 1
        fell = (self.state[:, 0].abs() > 2.4) | (self.state[:, 2].abs() > math.radians(12))
        return fell, fell | (self.steps >= LONGEST)


class ActorCritic(nn.Module):
    """Two networks: one chooses, the other says how well it will go."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
        self.critic = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(state), self.critic(state).squeeze(-1)


def evaluate(model: nn.Module, device: torch.device) -> float:
    """Mean number of steps that poles stand when the likelier action is always taken."""
    poles = CartPoles(32, device)
    standing = torch.ones(32, dtype=torch.bool, device=device)
    total = 0.0
    with torch.no_grad():
        for _ in range(LONGEST):
            total += standing.float().mean().item()
            fell, _ = poles.push(model(poles.state)[0].argmax(dim=1))
            standing &= ~fell
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda, mps or auto (default cpu)")
    parser.add_argument("--devices", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--max-updates", type=int, default=800, help="updates of 32 steps of 16 carts (default 800)")
    args = parser.parse_args()

    fabric = Fabric(accelerator=args.accelerator, devices=args.devices)
    fabric.launch()
    fabric.seed_everything(fabric.global_rank, verbose=False)  # each rank's carts have a fate of their own
    torch.set_num_threads(1)

    torch.manual_seed(0)
    module = ActorCritic()
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=3e-3))
    torch.manual_seed(1 + fabric.global_rank)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=args.max_updates)
    poles, lengths = CartPoles(CARTS, fabric.device), []

    for update in range(1, args.max_updates + 1):
        states, actions, ends, falls, after = [], [], [], [], []
        for _ in range(HORIZON):
            with torch.no_grad():
                action = Categorical(logits=model(poles.state)[0]).sample()
            states.append(poles.state)
            fell, over = poles.push(action)
            after.append(poles.state)
            actions.append(action), ends.append(over), falls.append(fell)
            lengths.extend(poles.steps[over].tolist())
            poles.restart(over)

        states, ends = torch.stack(states), torch.stack(ends)
        logits, values = model(states)
        # What each action was worth beyond what the critic expected. Source: generalized advantage estimation, Schulman
        # et al. 2015, equation 16; a pole that has fallen expects nothing more.
        with torch.no_grad():
            expected = model(torch.stack(after))[1] * ~torch.stack(falls)
            surprise = REWARD + DISCOUNT * expected - values
            advantages, later = torch.zeros_like(surprise), torch.zeros_like(surprise[0])
            for step in reversed(range(HORIZON)):
                later = surprise[step] + DISCOUNT * BLEND * later * ~ends[step]
                advantages[step] = later
            returns = advantages + values
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-6)

        optimizer.zero_grad()
        choice = Categorical(logits=logits)
        policy = -(choice.log_prob(torch.stack(actions)) * advantages).mean()
        value = nn.functional.mse_loss(values, returns)
        fabric.backward(policy + 5 * value - 0.01 * choice.entropy().mean())
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        schedule.step()
        if update % 100 == 0:
            recent = lengths[-100:]
            fabric.print(f"update {update}: the last 100 poles stood for {sum(recent) / max(len(recent), 1):.0f} steps")

    fabric.print(f"Poles stand for: {evaluate(model, fabric.device):.1f} steps of 500")


if __name__ == "__main__":
    main()
