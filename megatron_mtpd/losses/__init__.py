"""The losses: objectives, alignment of heads and targets, and their reductions over vocabulary shards."""
