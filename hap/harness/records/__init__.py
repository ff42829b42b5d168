"""Records of runs on disk: what they hold, where they lie, which code made them, what must be true of them."""
