"""Single-device and DDP strategies, launchers and cluster environments for fulmen or for your own loop."""
