"""Data sets: labels, readers, splits, augmentation."""
