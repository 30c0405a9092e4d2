"""Train a generative adversarial network in a loop of your own: two models, two optimizers, one Fabric.

The generator learns to draw points of a ring of eight clusters, which it never sees; only the discriminator does. The
data are generated. The score is the share of drawn points that lie in a cluster, and how many clusters are drawn::

    python docs/examples/fabric/gan.py
"""

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fulmen_fabric import Fabric

NOISE, CLUSTERS, RADIUS, SPREAD = 8, 8, 2.0, 0.1


def centres() -> Tensor:
    """Shape (8, 2), on a ring."""
    angles = torch.arange(CLUSTERS) * (2 * math.pi / CLUSTERS)
    return RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)


def points(count: int, generator: torch.Generator) -> Tensor:
    """Shape (count, 2): a cluster at random and a little noise."""
    cluster = torch.randint(0, CLUSTERS, (count,), generator=generator)
    return centres()[cluster] + SPREAD * torch.randn(count, 2, generator=generator)


def mlp(inputs: int, outputs: int) -> nn.Module:
    layers = [nn.Linear(inputs, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(128, outputs))


def score(drawn: Tensor) -> tuple[float, int]:
    """Share of points within four spreads of a centre, and how many clusters get at least 2 % of those."""
    distance, cluster = torch.cdist(drawn, centres()).min(dim=1)
    near = distance < 4 * SPREAD
    counts = torch.bincount(cluster[near], minlength=CLUSTERS)
    return near.float().mean().item(), int((counts >= 0.02 * counts.sum()).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda, mps or auto (default cpu)")
    parser.add_argument("--devices", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--max-epochs", type=int, default=40, help="epochs of 100 batches (default 40)")
    args = parser.parse_args()

    fabric = Fabric(accelerator=args.accelerator, devices=args.devices)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    torch.set_num_threads(1)

    generator, discriminator = mlp(NOISE, 2), mlp(2, 1)
    rates = {"lr": 1e-3, "betas": (0.5, 0.99)}
    generator, of_generator = fabric.setup(generator, torch.optim.Adam(generator.parameters(), **rates))
    discriminator, of_discriminator = fabric.setup(discriminator, torch.optim.Adam(discriminator.parameters(), **rates))
    real = TensorDataset(points(25_600, torch.Generator().manual_seed(0)))
    loader = fabric.setup_dataloaders(DataLoader(real, batch_size=256, shuffle=True))

    def noise(count: int) -> Tensor:
        return torch.randn(count, NOISE, device=fabric.device)

    # Each learns from the other's relative verdict. Source: relativistic average GAN with its zero-centred gradient
    # penalty, Jolicoeur-Martineau 2018, and Huang et al. 2024, "The GAN is dead; long live the GAN!".
    def discriminate(batch: Tensor) -> Tensor:
        of_discriminator.zero_grad()
        batch = batch.requires_grad_()
        fake = generator(noise(len(batch))).detach().requires_grad_()
        says_real, says_fake = discriminator(batch), discriminator(fake)
        loss = F.softplus(says_fake - says_real).mean()
        slopes = torch.autograd.grad([says_real.sum(), says_fake.sum()], [batch, fake], create_graph=True)
        loss = loss + 0.05 * sum(slope.square().sum(dim=1).mean() for slope in slopes)
        fabric.backward(loss)
        of_discriminator.step()
        return loss.detach()

    def generate(batch: Tensor) -> Tensor:
        of_generator.zero_grad()
        says_fake, says_real = discriminator(generator(noise(len(batch)))), discriminator(batch)
        loss = F.softplus(says_real - says_fake).mean()
        fabric.backward(loss)
        of_generator.step()
        return loss.detach()

    for epoch in range(args.max_epochs):
        for (batch,) in loader:
            loss_discriminator = discriminate(batch)
            loss_generator = generate(batch)
        if epoch % 10 == 9:
            fabric.print(f"epoch {epoch + 1}: discriminator {loss_discriminator:.3f}, generator {loss_generator:.3f}")

    with torch.no_grad():
        drawn = generator(noise(2000)).cpu()
    near, found = score(drawn)
    untrained, _ = score(torch.randn(2000, 2) * RADIUS / math.sqrt(2))
    fabric.print(
        f"Points in a cluster: {near:.1%} (a cloud of that size: {untrained:.1%}); clusters drawn: {found} of 8"
    )


if __name__ == "__main__":
    main()
