"""Published libraries that build on Lightning, run on Lightning and on fulmen, and compared."""
