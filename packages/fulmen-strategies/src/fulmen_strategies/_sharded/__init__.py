"""What strategies have in common whose parameters are DTensors, on a mesh of any shape."""
