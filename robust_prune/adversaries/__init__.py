"""Attacks as pure functions: a model and images in [0, 1] go in, images come out."""
