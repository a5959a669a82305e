"""Any model that Gyrocompass can score, as lm-evaluation-harness asks for it: `--model gyro`.

    gyro lm-eval --model gyro --model_args pretrained=FOLDER,dtype=float32 --tasks ...

Requests are tokenised as the harness's own `hf` model does, so that numbers can be compared; the
log-probabilities are those of the primitive, packed without padding, for the tokens that are asked about
alone.

Left out: several devices, and texts that are drawn (the harness's tasks hardly ever do; a request that asks
to sample is refused).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.measure.generate import cut_at
from gyrocompass.model.head import causal_lm, context_length
from gyrocompass.model.open import open_model
from gyrocompass.model.sampler import Sampling, end_ids, sample
from gyrocompass.model.write import score_pairs

DTYPES = {"auto": None, "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
MAX_GEN_TOKS = 256


class GyroLM(TemplateLM):  # type: ignore[misc]
    """A model folder for the harness.

    Args:
        pretrained: the folder.
        dtype: of the weights: auto, float32, float64 or bfloat16.
        device: where it runs; None: on a GPU if there is one.
        batch_size: rows of packed tokens in a batch.
        max_length: positions that the model looks back over; None: its context, at most 2048.
        add_bos_token: put BOS before every text, as `hf` does when asked.
        max_batch_size: not used; the harness passes it.

    Raises:
        BadInput: the folder or the dtype is not known.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 8,
        max_length: int | str | None = None,
        add_bos_token: bool | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise BadInput(f"unknown dtype {dtype!r}", fix=f"choose one of {', '.join(DTYPES)}")
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = open_model(Path(pretrained), dtype=DTYPES[dtype], device=torch.device(where))
        self.tokenizer = load_tokenizer(Path(pretrained))
        self.batch_size = 8 if batch_size == "auto" else int(batch_size)
        self.max_length = int(max_length) if max_length else min(context_length(self.model), 2048)
        self.add_bos_token = add_bos_token
        self.pretrained = pretrained

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_gen_toks(self) -> int:
        """The most tokens that are written where a task does not say."""
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """Part of the harness's cache keys."""
        return self.pretrained.replace("/", "__")

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        """A text's ids; special tokens are added as `hf` adds them."""
        added = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            added = False
        ids: list[int] = self.tokenizer.encode(
            string, **({} if added is None else {"add_special_tokens": added})
        )
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's template writes it."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether it is what greedy decoding would write."""
        # Longest first, and those with one context side by side: it is read once for all of them.
        order = sorted(range(len(requests)), key=lambda place: (-len(requests[place][1]), requests[place][1]))
        pairs = ((requests[place][1], requests[place][2]) for place in order)
        answers: dict[int, tuple[float, bool]] = {}
        scores = score_pairs(self.model, pairs, length=self.max_length, rows=self.batch_size)
        for place, found in zip(order, scores, strict=True):
            answer = (float(found.logprob_N.sum()), bool((found.rank_N == 0).all()))
            answers[place] = answer
            if requests[place][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
        return [answers[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows that do not overlap in what they predict."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            own = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += [(None, before, after) for before, after in own]
            counts.append(len(own))
        answers = [logprob for logprob, _ in self._loglikelihood_tokens(windows)]
        sums, start = [], 0
        for request, count in zip(requests, counts, strict=True):
            sums.append(sum(answers[start : start + count]))
            start += count
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[-1])
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts, each up to its first stop."""
        found = []
        eos = self.tokenizer.decode([self.eot_token_id])
        for request in requests:
            context, asked = request.args
            settings = normalize_gen_kwargs(asked, self.max_gen_toks)
            stops = handle_stop_sequences(settings.pop("until", None), eos=eos)
            most = settings.pop("max_gen_toks")
            if settings.get("do_sample") or settings.get("temperature", 0) > 0:
                raise BadInput("this adapter writes greedily", fix="set do_sample: false for the task")
            ids = self.tok_encode(context, left_truncate_len=context_length(self.model) - most)
            sampling = Sampling(most, end_ids(causal_lm(self.model), self.tokenizer), temperature=0.0)
            (one,) = sample(self.model, [ids], [0], sampling)
            text, _ = cut_at(self.tokenizer.decode(one.token_ids, skip_special_tokens=True), stops)
            self.cache_hook.add_partial("generate_until", request.args, text)
            found.append(text)
        return found
