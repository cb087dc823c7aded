"""One step on one batch of a path: its energy, the engine, the memory and the update."""
