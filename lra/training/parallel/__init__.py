"""One model on several processes, by PyTorch's own engines; the loss and the gradients are those of one process.

sharding: FSDP2, weights at rest in shards. tensor: heads and feed-forward channels divided, as DTensors. sequence: the
tokens of a causal recurrent encoder divided, its state passed along the ranks. pipeline: its blocks divided.
"""
