"""Measurements: candidates side by side in every round, and time beside what it must at least be.

scan, block, step    one operation, one block or one training step by every backend
infer, latency       forward passes of our models beside those of timm
strategies           what token fusion saves, and what merging costs
reduction            what each reduction method costs where it acts, in layers
split, ceilings      where the time goes, and what share of the device's best that is
floors               what bytes and instructions allow at best
check, sweep         whether kernels are right on a GPU, and which block sizes suit it
"""
