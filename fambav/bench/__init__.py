"""Measurements: candidates side by side in every round, and time beside what it must at least be.

scan, block, step    one operation, one block or one training step by every backend
strategies           what token fusion saves, and what merging costs
reduction            what each reduction method costs where it acts, in layers
floors               what bytes and instructions allow at best
check, sweep         whether kernels are right on a GPU, and which block sizes suit it
"""
