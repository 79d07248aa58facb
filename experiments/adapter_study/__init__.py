"""The parts of `experiments.adapters`: its methods and report."""
