"""CSV and TensorBoard loggers for fulmen or for your own loop."""
