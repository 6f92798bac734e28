"""What rounded activations cost in quality: exact against fast products on the same packed model.

``codes``: every product is made straight from the codes, as for a few tokens. ``many rows``: as
modules multiply prompts, in bfloat16 where the processor can.
"""

from __future__ import annotations

import argparse
import functools

import torch
from torch import Tensor, nn

import quantine
from quantine.core.arithmetic import Arithmetic
from quantine.eval.perplexity import cut_windows, perplexity_of, predict, score_windows
from quantine.kernels.matrix import multiply
from quantine.runtime.modules import QuantLinear, TiedHead
from quantine.runtime.packed import packed_modules
from quantine.source.locate import locate


class Straight(nn.Module):
    """A packed linear layer whose products are made from codes, however many rows there are."""

    def __init__(self, packed: QuantLinear | TiedHead, arithmetic: Arithmetic) -> None:
        super().__init__()
        table = packed.table if isinstance(packed, TiedHead) else packed
        self._matrix = table.matrix()
        self._bias = getattr(packed, "bias", None)
        self._arithmetic = arithmetic

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        (product,) = multiply([self._matrix], rows, self._arithmetic)
        product = product.view(*x.shape[:-1], -1)
        return product if self._bias is None else product + self._bias


def straight(directory: str, arithmetic: Arithmetic) -> nn.Module:
    model = quantine.load(directory, torch.float32)[0]
    heads = [(name, m) for name, m in model.named_modules() if isinstance(m, TiedHead)]
    linears = [(name, m) for name, m in packed_modules(model) if isinstance(m, QuantLinear)]
    for name, module in [*heads, *linears]:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Straight(module, arithmetic))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a quantized directory")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=24)
    arguments = parser.parse_args()
    source = locate(arguments.model)
    vocabulary = source.config().vocab_size
    windows = cut_windows(source, arguments.text, arguments.window, arguments.limit, vocabulary)
    exact = quantine.load(arguments.model, torch.float32, "exact")[0]
    expected = perplexity_of(list(score_windows(exact, None, windows)))[0]
    print(f"exact: perplexity {expected:.4f}")
    rivals = {
        "fast, codes": straight(arguments.model, "fast"),
        "fast, many rows": quantine.load(arguments.model, torch.float32, "fast")[0],
    }
    for name, model in rivals.items():
        scores = list(score_windows(model, functools.partial(predict, exact), windows))
        tokens = sum(score.tokens for score in scores)
        found = perplexity_of(scores)[0]
        kl = sum(score.kl for score in scores) / tokens
        agree = sum(score.agree for score in scores) / tokens
        print(
            f"{name}: perplexity {found:.4f} ({found / expected - 1:+.4%}), "
            f"KL {kl:.7f} nats per token, top-1 {agree:.2%}"
        )


if __name__ == "__main__":
    main()
