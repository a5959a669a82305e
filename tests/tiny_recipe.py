"""A tiny recipe on files that the test writes: every kind of stage, in seconds."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

RECIPE = """\
name: tiny
tracking: {{mlflow: null}}
stages:
  documents: {{kind: documents, sources: [{{files: {{path: {data}}}}}]}}
  train_documents: {{kind: split, documents: documents, side: train, held_out_share: 0.25}}
  held_out_documents: {{kind: split, documents: documents, side: held_out, held_out_share: 0.25}}
  tokenizer: {{kind: tokenizer, documents: train_documents, vocabulary_size: 300}}
  train_tokens: {{kind: tokens, documents: train_documents, tokenizer: tokenizer}}
  held_out_tokens: {{kind: tokens, documents: held_out_documents, tokenizer: tokenizer}}
  train_pairs: {{kind: pairs, documents: train_documents}}
  train_pair_tokens: {{kind: tokens, documents: train_pairs, tokenizer: tokenizer}}
  untrained:
    kind: new_model
    tokenizer: tokenizer
    config:
      model_type: llama
      hidden_size: 16
      intermediate_size: 24
      num_hidden_layers: 1
      num_attention_heads: 2
      max_position_embeddings: 128
  pretrained:
    kind: train
    model: untrained
    data: train_tokens
    held_out: held_out_tokens
    steps: 4
    sequence_length: 64
    rows_per_step: 4
    rows_per_micro_batch: 2
    evaluate_every_steps: 2
    checkpoint_every_steps: 2
  fine_tuned:
    kind: train
    model: pretrained
    data: train_pair_tokens
    epochs: 1
    sequence_length: 64
    rows_per_step: 8
  score_untrained: {{kind: score, model: untrained, data: [held_out_tokens], sequence_length: 64}}
  score_fine_tuned: {{kind: score, model: fine_tuned, data: [held_out_tokens], sequence_length: 64}}
  completions: {{kind: completions, model: fine_tuned, prompts: [hello], chat: true, max_new_tokens: 4}}
"""


def write_recipe(folder: Path) -> Path:
    """Twenty little modules and the recipe that reads them."""
    data = folder / "data"
    data.mkdir(parents=True)
    for number in range(20):
        module = f'''\
            def add_{number}(first, second):
                """Return the sum of first and second, and {number} more on top of it."""
                total = first + second
                return total + {number}
            '''
        (data / f"module_{number}.py").write_text(textwrap.dedent(module), encoding="utf-8")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(data=data), encoding="utf-8")
    return path


class FinishedRun(NamedTuple):
    """A recipe and the store it has run in; not to be written to."""

    recipe: Path
    store: Path
