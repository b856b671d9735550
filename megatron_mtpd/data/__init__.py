"""Text to tokens to Megatron's indexed dataset.

`text` reads files as documents, `tokenizers` turns documents into token ids exactly as training will see
them, `preprocess` writes the dataset in parallel, `spm` trains a SentencePiece tokenizer, `stdlib_corpus` is
the text that every machine already has; `datasets` feeds training. Nothing but `datasets` needs torch or
Megatron to be imported: every worker process imports the other modules, and has to start at once.

Absent on purpose: shuffling, blending and splitting, which Megatron's own datasets do at training time;
downloading.
"""
