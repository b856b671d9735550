"""Text to tokens to Megatron's indexed dataset.

`text` reads files as documents, `tokenizers` turns documents into token ids exactly as training will see them,
`preprocess` writes the dataset in parallel, `spm` trains a SentencePiece tokenizer, `stdlib_corpus` is the text that
every machine already has. Nothing here needs CUDA, and importing these modules is cheap: torch, Megatron and
transformers are imported only by the functions that use them, because every worker process imports this package too.

Absent on purpose: shuffling, blending and splitting, which Megatron's own datasets do at training time; downloading.
"""
