"""LoRA on Moshi: alive wherever it is put, in training and in streaming."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moshi.models.lm import LMModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from moshi_ttt.errors import UserError
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.hybrid import add_memory
from moshi_ttt.model.lora import LoraConfig, add_lora

MakeLM = Callable[..., LMModel]
ALL = ("qkv", "attention_out", "ffn", "depformer")
STEPS = 20


def adapted(make_lm: MakeLM, targets: tuple[str, ...] = ALL) -> tuple[LMModel, list[str]]:
    lm = make_lm(num_layers=2).eval()
    names = add_lora(lm, LoraConfig(rank=2, targets=targets))
    return lm, names


def codes() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 16, (1, 17, STEPS), generator=generator)


def training_outputs(lm: LMModel) -> Tensor:
    with torch.no_grad():
        output = lm(codes())
    return torch.cat([output.text_logits.flatten(), output.logits[output.mask].flatten()])


def streaming_outputs(lm: LMModel) -> Tensor:
    """Entropies of text and of every own codebook, at every step of a forced generation."""
    seen: list[Tensor] = []

    def see(_: object, __: object, logits: Tensor) -> None:
        log_p = logits.log_softmax(-1)
        seen.append(-(log_p.exp() * log_p).sum(-1).flatten())

    heads = [lm.text_linear, *lm.linears]
    handles = [head.register_forward_hook(see) for head in heads]
    with borrowed(lm, 0):
        generate(lm, codes(), codes()[:, 9:])
    for handle in handles:
        handle.remove()
    return torch.cat(seen)


def test_fresh_adapters_change_nothing(make_lm: MakeLM) -> None:
    plain = make_lm(num_layers=2).eval()
    lm, _ = adapted(make_lm)
    torch.testing.assert_close(training_outputs(lm), training_outputs(plain), atol=1e-6, rtol=0)
    torch.testing.assert_close(streaming_outputs(lm), streaming_outputs(plain), atol=1e-6, rtol=0)


def test_every_adapter_changes_the_output_in_training_and_in_streaming(make_lm: MakeLM) -> None:
    lm, names = adapted(make_lm)
    # 2 layers of qkv, out, two ffn matrices; the depformer's own 8 of each, 8 inputs, 8 heads
    assert len(names) == 2 * 4 + 8 * 4 + 8 + 8
    training, streaming = training_outputs(lm), streaming_outputs(lm)
    for name in names:
        layer = lm.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        weight = layer.lora_B["default"].weight
        with torch.no_grad():
            weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
        assert not torch.equal(training_outputs(lm), training), name
        assert not torch.equal(streaming_outputs(lm), streaming), name
        with torch.no_grad():
            weight.zero_()


def test_streaming_equals_training_forward_with_open_adapters_and_memory(make_lm: MakeLM) -> None:
    lm, names = adapted(make_lm)
    add_memory(lm, MemoryConfig(layers=[1], heads=2, mini_batch_steps=5))
    torch.manual_seed(0)
    with torch.no_grad():
        lm.transformer.layers[1].branch.gate.normal_()
        for name in names:
            layer = lm.get_submodule(name.replace("layers.1.", "layers.1.base.", 1))
            if name.startswith("depformer.") or not hasattr(layer, "lora_B"):
                layer = lm.get_submodule(name)
            layer.lora_B["default"].weight.normal_(std=0.2)
        logits = lm(codes()).text_logits[:, 0].log_softmax(-1)
    with borrowed(lm, 0):
        recorder = Recorder(lm, 1, STEPS)
        generate(lm, codes(), codes()[:, 9:], observers=[recorder])
    recorded = torch.from_numpy(recorder.arrays()["text_entropy"])
    torch.testing.assert_close(recorded, -(logits.exp() * logits).sum(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ALL)
def test_a_target_adapts_its_modules_only(make_lm: MakeLM, target: str) -> None:
    _, names = adapted(make_lm, (target,))
    parts = {"qkv": "in_projs", "attention_out": "out_projs", "ffn": "gating.linear_"}
    assert names
    if target == "depformer":
        assert not any(name.startswith("transformer.") for name in names)
    else:
        assert all(name.startswith("transformer.") and parts[target] in name for name in names)


def test_adapters_learn_in_fp32_on_a_bf16_base_and_keep_its_type(make_lm: MakeLM) -> None:
    lm = make_lm(num_layers=2).to(torch.bfloat16).eval()
    add_lora(lm, LoraConfig(rank=2, targets=ALL))
    trained = [p for name, p in lm.named_parameters() if "lora_" in name]
    assert {p.dtype for p in trained} == {torch.float32}
    assert lm(codes()).text_logits.dtype == torch.bfloat16


def test_a_model_that_has_streamed_is_refused(make_lm: MakeLM) -> None:
    lm = make_lm(num_layers=2).eval()
    with lm.streaming(1):
        pass
    with pytest.raises(UserError, match="before the first generation"):
        add_lora(lm, LoraConfig())


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": ()}, "targets"),
        ({"targets": ("qvk",)}, "targets"),
    ],
)
def test_impossible_settings_name_their_key(wrong: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}="):
        LoraConfig(**wrong)
