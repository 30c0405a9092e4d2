"""True and mixed precision (64, 32, 16, bf16) with gradient scaling, for fulmen or for your own loop."""
