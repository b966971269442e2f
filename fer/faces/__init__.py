"""Faces in photographs and videos: found, cropped like the training data, predicted."""
