"""Larger images out of small ones: one function per method, all of the form upscale(images, scale)."""
