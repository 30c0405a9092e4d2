"""pytest kits that prove a backend meets a fulmen protocol; ours and vendors' run the same ones."""
