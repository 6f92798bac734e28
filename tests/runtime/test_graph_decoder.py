"""The step that a CUDA graph records: the same each time, and never in need of the host."""

from __future__ import annotations

import contextlib
import io
import itertools
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from other_device import NAME, OtherDevice, no_extension
from quantine import load
from quantine.errors import BackendUnavailable
from quantine.runtime import graph_decoder
from quantine.runtime.decoder import most_likely
from quantine.runtime.generate import ModuleDecoder, decoder_on
from quantine.runtime.graph_decoder import (
    WARM_UPS,
    NoHost,
    StaticDecoder,
    Step,
    cuda_graph,
    graph_decoder_for,
)
from quantine.runtime.load import load_model
from quantine.source.locate import locate
from quantine.survey.specimen import specimen_config, write_specimen
from tiny_models import FAMILIES, build, some_tokens, tiny_config

Tiny = Callable[[str], Path]
Packed = Callable[[str, str], Path]
NEEDS_THE_HOST = ("opt", "opt_projected", "falcon_old", "falcon_new", "falcon_alibi")
NEEDED_THE_HOST = ("bloom",) if Version(transformers.__version__) < Version("5.23") else ()
"""Likewise, in versions that vLLM wants."""
RECORDABLE = [name for name in FAMILIES if name not in (*NEEDS_THE_HOST, *NEEDED_THE_HOST)]


def replayed(step: Step) -> Step:
    """What a graph does: the step runs as it is, and where its result is was decided before."""
    kept = step()

    def replay() -> Tensor:
        with NoHost():
            kept.copy_(step())
        return kept

    return replay


def recorded(step: Step) -> Step:
    """The operators of a step on the memory they had, without Python: what a CUDA graph holds."""
    for _ in range(WARM_UPS):
        step()
    graph = make_fx(lambda: step(), tracing_mode="real")()
    return lambda: graph()


def decoded(decoder: Any, prompt: Tensor, count: int) -> list[Tensor]:
    """Logits for so many tokens after a prompt, each chosen by those before."""
    decoder.reset()
    found = [decoder.append(prompt).clone()]
    while len(found) < count:
        found.append(decoder.append(torch.tensor([most_likely(found[-1])])).clone())
    return found


@pytest.mark.parametrize("name", RECORDABLE)
def test_a_repeated_step_computes_what_the_modules_do(name: str, packed: Packed) -> None:
    model, _ = load(packed(name, "rtn"), torch.float32)
    with no_extension():  # whose products are no operators
        decoder, usual = StaticDecoder(model, 40, recorded), ModuleDecoder(model)
        for prompt in (some_tokens(20, 1)[0], some_tokens(1, 1)[0]):
            pairs = zip(decoded(decoder, prompt, 6), decoded(usual, prompt, 6), strict=True)
            for one, other in pairs:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            assert decoder.position == len(prompt) + 5


def test_it_refuses_more_tokens_than_it_has_room_for(packed: Packed) -> None:
    decoder = StaticDecoder(load(packed("llama", "rtn"))[0], 4, replayed)
    decoder.append(torch.tensor([3, 4, 5]))
    for tokens in ([6, 7], []):
        with pytest.raises(ValueError, match="after 3, with room for 4"):
            decoder.append(torch.tensor(tokens, dtype=torch.int64))


def test_no_tensor_of_the_cpu_is_in_the_step(packed: Packed) -> None:
    prompt, out = some_tokens(7, 1)[0], packed("llama", "rtn")
    expected = decoded(ModuleDecoder(load(out, torch.float32)[0]), prompt, 4)
    with OtherDevice():
        model, _ = load(out, torch.float32, device=NAME)
        found = decoded(StaticDecoder(model, 16, replayed), prompt, 4)
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == "cpu"
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "used",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: bool((x > 0).all()),
    ],
)
def test_values_that_the_host_needs_are_refused(used: Callable[[Tensor], Any]) -> None:
    with NoHost(), pytest.raises(BackendUnavailable, match="reads values on the host"):
        used(torch.ones(3))


@pytest.mark.parametrize("used", [lambda x: x.cpu(), lambda x: x.copy_(torch.ones(3))])
def test_values_that_change_devices_are_refused(used: Callable[[Tensor], Any]) -> None:
    with OtherDevice():
        x = torch.ones(3).to(NAME)
        with NoHost(), pytest.raises(BackendUnavailable, match="moves values between devices"):
            used(x)


@pytest.mark.parametrize("name", NEEDS_THE_HOST)
def test_a_model_that_needs_the_host_says_so(name: str, tiny: Tiny) -> None:
    with pytest.raises(BackendUnavailable, match="reads values on the host"):
        StaticDecoder(load_model(locate(tiny(name)), torch.float32), 8, recorded)


def test_rotary_angles_that_follow_the_length_need_the_host(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    made = build(tiny_config("llama", rope_parameters=rope), tmp_path / "dynamic")
    with pytest.raises(BackendUnavailable, match="reads values on the host"):
        StaticDecoder(load_model(locate(made), torch.float32), 8, recorded)


def test_a_model_that_counts_tokens_in_python_is_not_recorded(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(packed("llama", "rtn"), torch.float32)
    norm, seen = model.model.norm.forward, itertools.count(1)
    monkeypatch.setattr(model.model.norm, "forward", lambda x: norm(x) + next(seen))
    with (
        no_extension(),
        pytest.raises(BackendUnavailable, match="repeated as it was computes something else"),
    ):
        StaticDecoder(model, 8, recorded)


def test_what_cannot_be_recorded_is_said(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load(packed("llama", "rtn"))
    with pytest.raises(BackendUnavailable, match="no CUDA graph: the model is on cpu"):
        graph_decoder_for(model, 8)
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    model.model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(BackendUnavailable, match="no CUDA graph: the model has hooks"):
        graph_decoder_for(model, 8)
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(BackendUnavailable, match="spread the modules"):
        graph_decoder_for(model, 8)
    log = io.StringIO()
    assert decoder_on(model, 8, log) is None
    assert "no CUDA graph: accelerate has spread the modules" in log.getvalue()


def test_a_step_is_recorded_on_the_gpu_that_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own stream for recordings belongs to the GPU that was first asked for it."""
    cuda, devices, streams = torch.cuda, [0], []

    class Stream:
        def __init__(self) -> None:
            self.device = devices[-1]

        def wait_stream(self, other: Any) -> None:
            pass

    @contextlib.contextmanager
    def entered(device: int) -> Iterator[None]:
        devices.append(device)
        yield
        devices.pop()

    @contextlib.contextmanager
    def recording(graph: Any, stream: Any = None) -> Iterator[None]:
        streams.append(stream)
        yield

    monkeypatch.setattr(cuda, "device", lambda device: entered(device.index))
    monkeypatch.setattr(cuda, "Stream", Stream)
    monkeypatch.setattr(cuda, "current_stream", Stream)
    monkeypatch.setattr(cuda, "stream", lambda stream: entered(stream.device))
    monkeypatch.setattr(cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(cuda, "graph", recording)
    seen: list[int] = []
    for index in (0, 1):
        cuda_graph(torch.device("cuda", index), lambda: seen.append(devices[-1]))()
        assert seen == [index] * (WARM_UPS + 1)
        seen.clear()
        assert streams[-1].device == index


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba2", "it keeps what it has seen in no cache"),  # each step would begin anew
        # Refuses such a cache by an error of its own, whose words differ between versions.
        ("qwen3_next", "(linear attention|has_previous_state)"),
    ],
)
def test_models_with_other_caches_are_refused(
    model_type: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_specimen(specimen_config(model_type), tmp_path / "model")
    model = load_model(locate(tmp_path / "model"), torch.float32)
    monkeypatch.setattr(graph_decoder, "_refusal", lambda _: None)
    monkeypatch.setattr(graph_decoder, "cuda_graph", lambda _, step: step)
    with pytest.raises(BackendUnavailable, match=f"no CUDA graph: .*{reason}"):
        graph_decoder_for(model, 8)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "openai-gpt"])
def test_models_without_a_cache_read_their_text_anew(model_type: str, tmp_path: Path) -> None:
    write_specimen(specimen_config(model_type), tmp_path / "model")
    model = load_model(locate(tmp_path / "model"), torch.float32)
    text, decoder = torch.tensor([3, 7, 5, 2, 9]), ModuleDecoder(model)
    with torch.no_grad():
        expected = model(input_ids=text.unsqueeze(0)).logits[0]
    for _ in range(2):
        decoder.append(text[:3])
        found = [decoder.append(text[place : place + 1]) for place in (3, 4)]
        torch.testing.assert_close(torch.stack(found), expected[3:], rtol=1e-4, atol=1e-4)
        decoder.reset()


def test_blocks_are_counted_in_the_part_of_a_model_that_reads_text(tmp_path: Path) -> None:
    config = specimen_config("gemma3")
    assert not hasattr(config, "num_hidden_layers")
    write_specimen(config, tmp_path / "model")
    model = load_model(locate(tmp_path / "model"), torch.float32)
    tokens = torch.tensor([3, 7, 5])
    found = StaticDecoder(model, 8, replayed).append(tokens)
    torch.testing.assert_close(found, ModuleDecoder(model).append(tokens), rtol=1e-4, atol=1e-4)
