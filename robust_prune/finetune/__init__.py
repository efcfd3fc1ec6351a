"""Adversarial training: its methods, and the loop that runs them."""
