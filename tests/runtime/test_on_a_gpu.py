"""Whole models on a GPU of NVIDIA, where there is one: `make gpu` runs this file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantine import load
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix
from quantine.runtime.decoder import most_likely
from quantine.runtime.generate import ModuleDecoder
from quantine.runtime.graph_decoder import graph_decoder_for
from quantine.runtime.packed import packed_modules
from quantine.runtime.recording import recording
from tiny_models import some_tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

Packed = Callable[[str, str], Path]
PROMPT = some_tokens(9, 1)[0]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_a_cuda_graph_computes_what_the_modules_do(name: str, packed: Packed) -> None:
    model, _ = load(packed(name, "rtn"), torch.float32, device="cuda")
    decoder, usual = graph_decoder_for(model, 40), ModuleDecoder(model)
    for _ in range(2):
        decoder.reset()
        usual.reset()
        tokens = PROMPT
        for _ in range(8):
            one, other = decoder.append(tokens), usual.append(tokens)
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
            tokens = torch.tensor([most_likely(other)])


def test_a_packed_matrix_takes_memory_once(packed: Packed) -> None:
    model, _ = load(packed("llama", "rtn"), torch.float32, device="cuda")
    with torch.no_grad():
        model(PROMPT.unsqueeze(0).cuda())
    for _, module in packed_modules(model):
        assert isinstance(module.matrix(), UnitMatrix)
        assert {buffer.device.type for buffer in module.buffers()} == {"cpu"}


@pytest.mark.parametrize("kind", ["rtn", "W4A8"])
def test_a_compiled_static_cache_generates_the_same_tokens(kind: str, packed: Packed) -> None:
    model, _ = load(packed("llama", kind), torch.float32, device="cuda")
    ids = PROMPT.unsqueeze(0).cuda()
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    found = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(found, expected)


def test_recordings_in_one_stream_have_numbers_of_their_own() -> None:
    x, stream, found = torch.zeros(3, device="cuda"), torch.cuda.Stream(), []
    assert recording(torch.cuda.current_stream()) is None
    for _ in range(2):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            numbers = {recording(torch.cuda.current_stream()) for _ in range(2)}
            x.add_(1)
        assert len(numbers) == 1
        found += numbers
    assert all(isinstance(number, int) for number in found)
    assert found[0] != found[1]
