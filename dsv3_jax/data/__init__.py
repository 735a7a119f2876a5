"""Corpus, tokenizer, fill-in-the-middle, packing and batches (report sections 4.1 and 4.2).

The way of a text: `sources` reads documents, `tokenizer` turns them into ids, `shards` keeps the
ids in memory-mapped files, `units` splits off validation, `fim` rearranges some documents,
`packing` cuts the stream into sequences, `loader` runs that in background workers through grain,
and `pipeline.prepare` ties it together. `tokenize` is the part that needs no training run;
`domains` tells kinds of text apart for evaluation.
"""
