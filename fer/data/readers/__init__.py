"""Readers of data sets, one file each; the table is in fer/data/datasets.py."""
