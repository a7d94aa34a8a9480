"""Which heads of a memory remember? Recall beyond the window with some of them silenced.

    python scripts/silence_heads.py --checkpoint runs/long60s/000/checkpoints/best.safetensors
    python scripts/silence_heads.py --checkpoint assets/tiny/memory.safetensors --layers 4

Held-out recordings are read with nothing silenced, then with the whole memory, each layer's and
each head's; and with all but that layer or head. A silenced head reads and writes as ever, and what
it reads is taken for nothing. Prints the own facts that attention no longer reaches, answer words
right, and writes OUT/heads.json.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from moshi.models.lm import LMModel
from torch import Tensor

from moshi_ttt.command_line import add_device, add_held_out, parse, program_parser
from moshi_ttt.data import EncodedRecording, read_recordings
from moshi_ttt.data.bundled import bundled_held_out
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.files import write_json
from moshi_ttt.memory import MemoryRule, MemoryState
from moshi_ttt.model.hybrid import hybrid_layers
from moshi_ttt.model.subject import open_subject
from moshi_ttt.teacher_forcing.controls import Share, beyond_window, read_recall

Heads = Collection[tuple[int, int]]
"""Layer and head."""


def main(args: list[str] | None = None) -> None:
    """Silence what the command line asks for, print and write what is left."""
    options = parse(_parser(), args)
    subject = open_subject(options.checkpoint, options.device, base=options.base)
    lm, clock = subject.lm, subject.source.clock
    if lm.context is None or not hybrid_layers(lm):
        raise UserError(
            f"--checkpoint {options.checkpoint} has no memory, or no window beside it; give one "
            "that was trained with --model.train memory"
        )
    manifest = options.manifest or bundled_held_out(subject.source)
    recordings = read_recordings(subject.source, manifest, options.cache_dir)[: options.recordings]
    found: dict[str, Share] = {}
    for name, heads in cases(lm, options.layers).items():
        with silenced(lm, heads):
            share = own_beyond(lm, recordings, clock.seconds(lm.context))
        if share is None:
            raise UserError(f"{manifest}: nothing is asked for that attention has lost")
        found[name] = share
        print(f"{name:28} {share.share:4.0%} of {share.words:.0f} words", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {name: {"right": one.right, "words": one.words} for name, one in found.items()}
    write_json(options.out / "heads.json", record)
    print(options.out / "heads.json")


def cases(lm: LMModel, layers: Collection[int] | None) -> dict[str, Heads]:
    """What is silenced, by name.

    Args:
        lm: with a memory.
        layers: those whose heads are looked at one by one; None: all.

    Raises:
        UserError: a layer without a memory.
    """
    heads = {
        layer: [(layer, head) for head in range(one.branch.rule.heads)]
        for layer, one in hybrid_layers(lm).items()
    }
    if strangers := set(layers or ()) - set(heads):
        raise UserError(f"--layers {sorted(strangers)} have no memory; use some of {[*heads]}")
    every = [one for of in heads.values() for one in of]
    parts = {f"layer {layer}": of for layer, of in heads.items()}
    for layer in heads if layers is None else layers:
        parts |= {f"layer {layer}, head {head}": [(layer, head)] for _, head in heads[layer]}
    but = {
        f"all but {name}": [one for one in every if one not in part] for name, part in parts.items()
    }
    return {"nothing": (), "the whole memory": every, **parts, **but}


@contextmanager
def silenced(lm: LMModel, heads: Heads) -> Iterator[None]:
    """What these heads read is 0 in this scope; of clips, not of streams."""
    with ExitStack() as scope:
        for layer, one in hybrid_layers(lm).items():
            if mine := [head for at, head in heads if at == layer]:
                hook = one.branch.rule.register_forward_hook(partial(_mute, mine))
                scope.callback(hook.remove)
        yield


def _mute(
    heads: list[int], rule: MemoryRule, _: Any, out: tuple[Tensor, MemoryState]
) -> tuple[Tensor, MemoryState]:
    """Forward hook: what the rule read, [B, T, H x dh], with nothing of some heads."""
    read = out[0].unflatten(-1, (rule.heads, rule.head_dim)).clone()
    read[..., heads, :] = 0
    return read.flatten(-2), out[1]


def own_beyond(
    lm: LMModel, recordings: Sequence[EncodedRecording], window_sec: float
) -> Share | None:
    """Own facts that attention no longer reaches, answered; None if there are none."""
    longest = max((one.steps for one in recordings), default=1)
    recall = read_recall(lm, recordings, "kept", longest, longest)
    if recall is None:
        return None
    return beyond_window({"kept": recall}, window_sec).get("own", {}).get("kept")


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        help="Trained with a memory: .ckpt or .safetensors.",
    )
    add("--base", type=str, help="Where its base lies now, or a hub id; null: where it lay.")
    add_held_out(parser)
    add_device(parser)
    add("--layers", type=int, nargs="+", help="Whose heads to look at one by one; null: all.")
    add("--recordings", type=int, default=6, help="How many to read, the first ones.")
    add("--out", type=Path, default=Path("runs/heads"), help="Folder to write.")
    return parser


if __name__ == "__main__":
    run_program(main)
