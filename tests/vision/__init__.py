"""Tests of vision: opening pictures, and the image processors."""
