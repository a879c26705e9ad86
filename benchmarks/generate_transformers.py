"""`transformers.generate` of a checkpoint, as a child of `generate`: `... MODEL THREADS`."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.child import serve


def main(folder: str, threads: str) -> None:
    """Answers {"implementations": true} with those that run here, and {"implementation", "prompts", "tokens"}.

    That is answered with tokens per second and the tokens.
    """
    torch.set_num_threads(int(threads))
    model: Any = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def generate(implementation: str, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        model.set_experts_implementation(implementation)
        ids_BT = torch.tensor(prompts)
        started_s = time.perf_counter()
        with torch.inference_mode():
            given_BT = model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        rate = ids_BT.shape[0] * tokens / (time.perf_counter() - started_s)
        return {"rate": rate, "tokens": given_BT[:, ids_BT.shape[1] :].tolist()}

    def answer(implementations: bool = False, **question: Any) -> Any:
        if not implementations:
            return generate(**question)
        able = []
        for name in ("eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()):
            try:
                generate(name, [[5] * 8], 2)
            except Exception as error:  # one that wants a GPU, or a package that is not there, fails in its own way
                print(f"{name}: {error}", file=sys.stderr)
            else:
                able.append(name)
        return able

    serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
