"""The bf16 checkpoints of a float32 policy."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2ForCausalLM


class RoundedCopy:
    """The bf16 image of a float32 model: what is saved, and what changes from step to step.

    Parameters
    ----------
    masters : Qwen2ForCausalLM
        The float32 model.
    tokenizer : PreTrainedTokenizerFast
        Saved with every checkpoint, as trainers do.
    """

    def __init__(self, masters: Qwen2ForCausalLM, tokenizer: Any) -> None:
        self._masters = masters
        self.tokenizer = tokenizer
        self._model = deepcopy(masters).bfloat16()
        self._model.generation_config.do_sample = False

    def refresh(self) -> float:
        """Round the masters to nearest even; return the share of weights whose bits changed."""
        changed = total = 0
        with torch.no_grad():
            pairs = zip(self._model.parameters(), self._masters.parameters(), strict=True)
            for rounded, master in pairs:
                latest = master.to(torch.bfloat16)
                changed += int((latest.view(torch.int16) != rounded.view(torch.int16)).sum())
                total += rounded.numel()
                rounded.copy_(latest)
        return changed / total

    def widen_into_masters(self) -> None:
        """Make the masters exactly equal to their rounded image."""
        with torch.no_grad():
            pairs = zip(self._model.parameters(), self._masters.parameters(), strict=True)
            for rounded, master in pairs:
                master.copy_(rounded)

    def save(self, directory: Path) -> None:
        """Write weights, config, generation config and tokenizer files."""
        self._model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        # transformers 5 writes a class that older versions do not know; this one both know.
        config_path = directory / "tokenizer_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
