"""The parts of `experiments.adapters`: its methods, training and report."""
