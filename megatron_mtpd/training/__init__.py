"""Training: flags, the forward step, what is reported, and the entry that drives `megatron.training.pretrain`."""
