"""Benchmarks for users: candidates take turns, each once in every round.

operations    a scan, or a block, by every backend
passes        training steps and forward passes of our models and of models of timm
strategies    savings of token fusion, and the cost of merging
reduction     the cost of each reduction method at one layer, in units of a layer
data_loader   throughput of the training images
profile       shares of the time by layer and by operation
roofline      peak compute and bandwidth of the device, and shares of them

Every benchmark has these keyword arguments and returns a `Report`:
    batch       images or sequences; by default 128 on a GPU and few on a CPU
    rounds      timings of each candidate, at least 1
    warmup      rounds before those
    device      where it runs
    dtype, dtypes    of the tokens or the forward pass, under autocast; by default as in training
"""
