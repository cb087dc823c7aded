"""The parts of `benchmarks.device`: each measures one thing and gives rows as it finds them."""
