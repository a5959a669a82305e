"""What the tests of tokenizers and of encoding share."""

import json
from pathlib import Path

from hypothesis import strategies as st

from gyrocompass.data.tokenizer import END_OF_TEXT, PADDING, ROLE_TOKENS

TRAINING_TEXTS = [Path(module.__file__).read_text() for module in (json, json.decoder, json.encoder)]
SPECIALS = [END_OF_TEXT, PADDING, *ROLE_TOKENS.values()]
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
