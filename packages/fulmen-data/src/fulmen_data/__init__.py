"""Combined loaders, samplers for ranks and exact data position, for fulmen or for your own loop."""
