"""Own your loop, keep the engineering: assembly of devices, precision, distribution and checkpoints."""
