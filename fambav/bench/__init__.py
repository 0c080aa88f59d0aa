"""Benchmarks for users: candidates side by side, each once in every round.

operations    a scan, or a block, by every backend
passes        training steps and forward passes of our models beside those of timm
strategies    what token fusion saves, and what merging costs
reduction     what each reduction method costs where it acts, in layers
data_loader   training images a second
profile, ceilings    where the time goes, and what share of the device's best that is

Every benchmark takes, by keyword, and returns a `Report`:
    batch       images or sequences; by default 128 on a GPU and few on a CPU
    rounds      how often each candidate is timed, at least 1
    warmup      rounds before those
    device      where
    dtype, dtypes    of the tokens or the forward pass, under autocast; by default as in training
"""
