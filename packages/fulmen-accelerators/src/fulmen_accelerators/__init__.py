"""CPU, CUDA and MPS devices for fulmen or for your own loop."""
