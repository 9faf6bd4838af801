"""One model on several processes with PyTorch's engines; loss and gradients are those of one process.

sharding: weights in shards between steps (FSDP2). tensor: heads and feed-forward channels divided, as DTensors.
sequence: the tokens of a causal recurrent encoder divided, its state passed from rank to rank. pipeline: the blocks of
an encoder divided.
"""
