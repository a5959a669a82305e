"""Models of `transformers`: loaded and saved, and asked for log-probabilities through the one primitive.

    folder --load_causal_lm--> model --find_head, hidden_states--> token_logprobs --> TokenLogProbs

Only safetensors are read and nothing is fetched: a model is a folder.
"""
