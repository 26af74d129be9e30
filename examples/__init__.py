"""Ordinary PyTorch models, and the loop that trains them with or without the compiler."""
