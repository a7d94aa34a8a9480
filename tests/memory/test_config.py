from __future__ import annotations

import dataclasses

import pytest
import torch
from jsonargparse import auto_cli

from moshi_ttt.errors import UserError
from moshi_ttt.memory import MemoryConfig, build_rule, resolve_layers


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        ("last:1", 4, [3]),
        ("last:3", 4, [1, 2, 3]),
        ("every:1", 3, [0, 1, 2]),
        ("every:4", 32, [3, 7, 11, 15, 19, 23, 27, 31]),
        ("every:3", 4, [2]),
        ([2, 0], 4, [0, 2]),
    ],
)
def test_layers_resolve_to_sorted_indices(
    layers: list[int] | str, num_layers: int, expected: list[int]
) -> None:
    assert resolve_layers(layers, num_layers) == expected


@pytest.mark.parametrize("layers", ["last:5", "every:5", [4], [-1], [0, 4]])
def test_layers_the_model_does_not_have_are_refused(layers: list[int] | str) -> None:
    with pytest.raises(UserError, match=r"^layers=.*the model has 4 layers"):
        resolve_layers(layers, 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rule", "lstm"),
        ("placement", "before"),
        ("layers", "last:0"),
        ("layers", "last"),
        ("layers", "first:2"),
        ("layers", "last:-1"),
        ("layers", []),
        ("layers", [1, 1]),
        ("heads", 0),
        ("head_dim", 1),
        ("mini_batch_steps", 0),
        ("mini_batch_steps", 10**9),
        ("inner_lr", 0.0),
        ("forgetting_time_steps", (0.0, 10.0)),
        ("forgetting_time_steps", (100.0, 10.0)),
        ("forgetting_time_steps", (100.0, float("inf"))),
        ("write_gate", 0.0),
        ("write_gate", 1.0),
    ],
)
def test_impossible_values_are_refused_by_key_and_value(field: str, value: object) -> None:
    with pytest.raises(UserError) as error:
        MemoryConfig(**{field: value})
    assert str(error.value).startswith(f"{field}={value} ")
    assert "use " in str(error.value)


def test_heads_that_do_not_divide_the_model_are_refused() -> None:
    with pytest.raises(UserError, match=r"^heads=5 .* 32 channels"):
        MemoryConfig(heads=5).fitted(32, 4)
    wider = MemoryConfig(projections="own", heads=5, head_dim=8)
    assert build_rule(wider.fitted(32, 4), 32).width == 40
    assert MemoryConfig().fitted(32, 4).heads == 4


@pytest.mark.parametrize(
    "sizes",
    [
        {"head_dim": 10**6},
        {"head_dim": 129, "heads": 1},
        {"heads": 10**9},
        {"heads": 10**9, "head_dim": 2},
        {"heads": 65, "head_dim": 2},
        {"projections": "shared", "rank": 10**9},
    ],
    ids=str,
)
def test_sizes_no_model_has_are_refused_before_anything_is_allocated(sizes: dict) -> None:
    with pytest.raises(UserError, match=r"^(head_dim|heads|rank)=\d+ .*the model.*; use "):
        MemoryConfig(**sizes).fitted(32, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"rule": "ttt_mlp"},
        {"rule": "gated_delta"},
        {"heads": 2},
        {"head_dim": 4},
        {"mini_batch_steps": 8},
        {"inner_lr": 0.5},
        {"forgetting_time_steps": (20.0, 30.0)},
        {"write_gate": 0.3},
    ],
    ids=str,
)
def test_every_field_of_the_rule_changes_what_it_computes(change: dict) -> None:
    # layers, placement and bounded_readout belong to the hybrid and are tested there
    def run(**settings: object) -> torch.Tensor:
        torch.manual_seed(0)
        config = MemoryConfig(**{"rule": "ttt_linear", "projections": "own"} | settings)
        return build_rule(config.fitted(32, 4), 32)(torch.randn(1, 40, 32))[0]

    base, changed = run(), run(**change)
    assert base.shape != changed.shape or not torch.allclose(base, changed, atol=1e-4)


@pytest.mark.parametrize("rule", ["ttt_linear", "ttt_mlp", "gated_delta"])
def test_gates_and_forgetting_times_start_where_the_config_says(rule: str) -> None:
    config = MemoryConfig(rule=rule, heads=4, write_gate=0.03, forgetting_time_steps=(1.0, 1e4))
    memory = build_rule(config.fitted(32, 4), 32)
    times = (-memory.log_rate).exp()
    torch.testing.assert_close(times, 10 ** torch.tensor([0.5, 1.5, 2.5, 3.5]))
    gates = memory.write(torch.randn(3, 32)).sigmoid()
    torch.testing.assert_close(gates, torch.full((3, 4), 0.03))


def test_the_command_line_reads_every_field() -> None:
    def parse(memory: MemoryConfig) -> MemoryConfig:
        return memory

    values = {
        "rule": ("gated_delta", "gated_delta"),
        "layers": ("[25, 26]", [25, 26]),
        "placement": ("parallel", "parallel"),
        "projections": ("shared", "shared"),
        "rank": ("8", 8),
        "gate_init": ("0.1", 0.1),
        "heads": ("8", 8),
        "head_dim": ("16", 16),
        "mini_batch_steps": ("32", 32),
        "inner_lr": ("0.5", 0.5),
        "forgetting_time_steps": ("[10, 1000]", (10.0, 1000.0)),
        "write_gate": ("0.05", 0.05),
        "bounded_readout": ("false", False),
    }
    assert values.keys() == {field.name for field in dataclasses.fields(MemoryConfig)}
    config = auto_cli(parse, args=[f"--memory.{key}={text}" for key, (text, _) in values.items()])
    assert config == MemoryConfig(**{key: value for key, (_, value) in values.items()})
    assert auto_cli(parse, args=["--memory.layers=every:4"]).layers == "every:4"
