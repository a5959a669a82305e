"""From raw documents to a data set with a reason for everything that is not in it.

    sources --ingest--> corpus (Parquet shards of all documents)            (corpus)
    corpus  --Step.annotate, GlobalStep.resolve--> annotations, one Parquet file a shard      (step, executor)
    corpus + annotations + rules --decide--> verdicts, ledger               (rules, decide)
    corpus + verdicts --write--> data set: shards, ledger, Merkle root      (dataset)

Nothing is overwritten and no step drops anything: steps say what they see, rules decide, so that a threshold
can be changed without another scan. One module a step; nothing here imports torch.
"""
