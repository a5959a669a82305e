"""Sums of log-probabilities by tag, and the honest numbers that are made from them.

    TokenLogProbs + tags --Ledger------> sums per slice, source, document, objective
    sums per document    --intervals---> nats per token, perplexity, bits per byte, each with its interval
    texts                --Score-------> TokenScores (a model's answer, without the model)
    samples              --Reward------> a float each, in a stated range; code runs in the sandbox
    judged samples       --GamingMonitor> rows, and the verdict that a reward is gamed

Nothing here imports torch or sees a model.
"""
