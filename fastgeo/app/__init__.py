"""The command line: a run in its folder, stage by stage, and its report."""
