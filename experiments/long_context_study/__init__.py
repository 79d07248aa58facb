"""The parts of `experiments.long_context`: losses by position, and its report."""
