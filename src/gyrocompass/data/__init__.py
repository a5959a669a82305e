"""From raw files to windows of packed tokens.

    sources --read_sources--> Document | Quarantined | Skipped      (sources, records, stdlib)
    Document --side--> train | held_out                             (split)
    Document --tokenise--> Parquet --TokenDataset.open--> flat arrays   (tokenizer, encode, tokens)
    TokenDataset --cut, pack, assemble--> Packed                    (pack)
    TokenDataset --Sampler--> Packed, Packed, ...                   (mixture)

Nothing here imports torch: `Packed` holds numpy arrays, and the model's side turns them into a batch.
"""
