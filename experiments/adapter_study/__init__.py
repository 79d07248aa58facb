"""The parts of `experiments.adapters`: its texts and its report."""
