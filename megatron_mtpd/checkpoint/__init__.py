"""What can be known and done from the files of a `torch_dist` checkpoint alone: no GPU, no model, no training.

`metadata` reads what a checkpoint holds, `integrity` whether its bytes are what was written, `iterations` which of a
run's checkpoints can be loaded, `looping` plans one with other heads, `extend` writes it, `inspection` describes
it. `seam` holds what Megatron calls while it saves and loads. `pickles` and `files` are what they stand on.

Nothing here imports torch or Megatron unless it compares tensors: a command answers in a fraction of a second, on any
machine, and no name that a checkpoint's pickles mention is ever imported.
"""
