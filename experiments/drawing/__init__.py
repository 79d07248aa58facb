"""The parts of `drawing_study`."""
