"""Hugging Face folders in, Hugging Face folders out, between files alone: no model is built, and blocks of tensors are
in memory, whatever the size of a model or of a tensor.

`shape` says what a model is like, in words of neither side; `architectures` holds a file for each Hugging Face
architecture, with the table of names; `layouts` says which rows of ours are which rows of theirs; `formats` where heads
go, and for which engine. `folder` (on `stored` and `fp8`) reads and writes the folders, `torch_dist` (on `archive`) the
checkpoints, `blocks` moves rows between them. `arguments` are a checkpoint's words for a shape. `importing` and
`exporting` put them together, `card` writes what a reader of an export has to know.

Megatron-Bridge (0.6.2) maps many more architectures, DeepSeek-V3's heads among them, and is not used: it builds the
model and moves tensors through it, so a model of any size needs the machines that hold it; the model is a GPTModel,
ours a HybridModel; its maps of dense models know no heads; and it wants transformers <= 5.12, older than
`generate(use_mtp=True)`. transformers knows none of Megatron's names, and would hold the model in memory; it does what
it can do from files: it reads configurations and GGUF.
"""
