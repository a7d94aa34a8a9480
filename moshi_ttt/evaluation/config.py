"""What to generate and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moshi_ttt.clock import Clock
from moshi_ttt.errors import check_bounds, check_fields
from moshi_ttt.generation.chunks import Chunks

STEPS_PAST_2C = 150
"""12 s: how far a run goes beyond the second turn of the ring, unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class LongRunConfig:
    """What to generate and how."""

    seconds: float | None = None
    """Length of the generation in seconds; null runs 150 steps past 2C, the second turn of the
    ring."""
    prompts: int = 2
    """Different starting points, taken from the held-out recordings."""
    seeds: int = 2
    """Random continuations of each prompt; prompts x seeds streams run as one batch."""
    prompt_sec: float = 10.0
    """Seconds of a recording that are forced before the model runs free; the length of the run or
    more forces it throughout, which records the model reading instead of talking."""
    chunk_sec: float | None = None
    """Generate in chunks: after every so many seconds attention begins afresh, with what was said
    last read once more; null goes on with what the ring holds."""
    reprompt_sec: float = 5.0
    """Seconds that are read again where a chunk begins."""
    keep_memory: bool = True
    """Whether the memory goes on from chunk to chunk; otherwise it begins afresh as well."""
    user: Literal["recording", "silence"] = "recording"
    """What the user does after the prompt: goes on as recorded (then silence), or is silent."""
    text: Literal["free", "recording"] = "free"
    """What Moshi writes after the prompt: what it samples, or what was written in the recording, as
    long as that lasts. Then models say the same, and what a recogniser hears tells their voices
    apart; where each writes for itself it tells as well how hard that is to say."""
    temperature: float = 0.8
    """Sampling temperature of the audio tokens."""
    text_temperature: float = 0.7
    """Sampling temperature of the text tokens."""
    top_k: int = 250
    """Audio tokens to sample from."""
    top_k_text: int = 25
    """Text tokens to sample from."""
    seed: int = 0
    """Seed of the sampling; equal weights and seeds generate equally."""
    nll_window_sec: float = 5.0
    """Window of the teacher-forced NLL against position, in seconds."""
    nll_sec: float | None = None
    """How far recordings are read for it; null as far as the generation goes. For their probes they
    are read on, text alone."""
    nll_recordings: int = 12
    """Held-out recordings that are read teacher-forced, the first ones of their manifest."""
    context_sec: tuple[float, ...] = (10.0, 100.0)
    """Seconds of recordings that are read before the same 5 s, whose loss is compared; none:
    `[]`."""
    audio_streams: int = 4
    """Generated streams that are decoded to stereo audio (left Moshi, right user)."""
    quality_window_sec: float = 5.0
    """Seconds before and after each critical position that text and sound are compared in."""
    log_interval: int | str = 0
    """How often a text log has a line while it runs: every 100 steps (100), 8 seconds (8s) or 800
    legacy tokens (800tokens); critical positions and turns of the ring have lines as well. 0 logs
    nothing."""
    attention_layers: tuple[int, ...] = ()
    """Layers whose attention on the first key, on the first four positions and on the oldest
    quarter of the ring is computed again now and then; none by default."""
    attention_every_steps: int = 25
    """Steps between two looks at that attention."""

    def __post_init__(self) -> None:
        check_fields(self, "prompts", "seeds", "top_k", "top_k_text", least=1)
        check_fields(self, "nll_recordings", "attention_every_steps", least=1)
        check_fields(self, "temperature", "text_temperature", above=0)
        check_fields(self, "seconds", "nll_sec", "nll_window_sec", above=0)
        check_fields(self, "quality_window_sec", above=0)
        for seconds in self.context_sec:
            check_bounds("context_sec", seconds, above=0)
        Clock().interval("log_interval", self.log_interval)  # the form is no matter of the clock
        check_fields(self, "reprompt_sec", above=0)
        remedy = "a chunk adds something to what is read again in it; lower reprompt_sec"
        check_fields(self, "chunk_sec", above=self.reprompt_sec, remedy=remedy)
        check_fields(self, "prompt_sec", "audio_streams", least=0)

    @property
    def said(self) -> str:
        """What a title adds to the name of a model that runs so; nothing as a rule."""
        said = ", text as recorded" if self.text == "recording" else ""
        if self.chunk_sec is None:
            return said
        memory = "" if self.keep_memory else ", memory not kept"
        return f"{said}, chunks of {self.chunk_sec:g} s{memory}"

    def chunks(self, clock: Clock) -> Chunks | None:
        """Where the run is cut, in steps; None: nowhere."""
        if self.chunk_sec is None:
            return None
        again = clock.steps(self.reprompt_sec)
        return Chunks(max(clock.steps(self.chunk_sec), again + 1), again, self.keep_memory)

    def steps(self, clock: Clock, context_steps: int) -> int:
        """Length of the run in steps."""
        if self.seconds is not None:
            return clock.steps(self.seconds)
        return 2 * context_steps + STEPS_PAST_2C
