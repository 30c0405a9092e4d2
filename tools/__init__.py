"""What the nox sessions do. Each module runs by itself: ``python -m tools.api``. Not part of any package."""
