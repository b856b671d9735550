"""Hugging Face folders in, Hugging Face folders out, between files alone: no model is built, and a few tensors are in
memory at a time.

`shape` says what a model is like, in words of neither side; `architectures` holds a file for each Hugging Face
architecture, with the table of names; `layouts` says how a tensor of ours is made of theirs; `formats` where heads go,
and for which engine. `folder` reads and writes the folders, `torch_dist` the checkpoints. `importing` and `exporting`
put them together, `card` writes what a reader of an export has to know.

Megatron-Bridge maps many more architectures, and is not used: it goes through a built GPTModel, ours is a HybridModel;
its maps of dense models know no heads; and it pins (0.6.2) a transformers older than `generate(use_mtp=True)`.
transformers does what it can do from files: it reads configurations and GGUF.
"""
