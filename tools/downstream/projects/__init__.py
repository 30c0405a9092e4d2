"""One module for each library: what to install, which packages to move, and a tiny run of it."""
