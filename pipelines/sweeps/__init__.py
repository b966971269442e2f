"""Searches for better settings of an experiment: a file in sweeps/, a folder in data/sweeps/, trials that are runs."""
