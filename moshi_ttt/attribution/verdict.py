"""The verdict in words: what there is to explain, and what explains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moshi_ttt.attribution.changepoint import presence
from moshi_ttt.attribution.evidence import Evidence
from moshi_ttt.attribution.hypotheses import Decision, Finding, decide, no_change
from moshi_ttt.clock import Clock


@dataclass(frozen=True, slots=True)
class Verdict:
    """What there is to explain, and what explains it."""

    change: str
    """`step`, `growth`, `none` or `unclear`."""
    headline: str
    observations: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def supported(self) -> list[str]:
        """Names of the supported hypotheses."""
        return [one.hypothesis for one in self.findings if one.decision == "supported"]

    def decision(self, hypothesis: str) -> Decision:
        """The decision about one hypothesis."""
        return next(one.decision for one in self.findings if one.hypothesis == hypothesis)

    def text(self) -> str:
        """All of it, one statement a line."""
        lines = [self.headline, *self.observations, *(one.text() for one in self.findings)]
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """For `verdict.json`."""
        return {
            "change": self.change,
            "headline": self.headline,
            "supported": self.supported,
            "observations": list(self.observations),
            "hypotheses": {
                one.hypothesis: {
                    "decision": one.decision,
                    "reasons": list(one.reasons),
                    "effects": {
                        name: {"value": effect.value, "interval_95": [effect.low, effect.high]}
                        for name, effect in one.effects.items()
                    },
                }
                for one in self.findings
            },
        }


def judge(evidence: Evidence, clock: Clock) -> Verdict:
    """Decide every hypothesis of docs/finding_the_jump.md, and say what there is to explain."""
    findings = decide(evidence)
    supported = [one.hypothesis for one in findings if one.decision == "supported"]
    if evidence.change == "none":
        headline = "nothing to explain: " + no_change(evidence)
    elif evidence.change == "unclear":
        headline = (
            "undecided: these runs cannot tell whether the norm rises; more prompts, seeds or "
            "steps are needed"
        )
    elif supported:
        headline = f"{_what(evidence)}; supported: {', '.join(supported)}"
    else:
        headline = f"{_what(evidence)}; no hypothesis is supported by these runs"
    return Verdict(evidence.change, headline, tuple(_observations(evidence, clock)), findings)


def _what(evidence: Evidence) -> str:
    if evidence.change == "step":
        ratios = [one.log_ratio.exp().text() for one in evidence.located]
        return f"the norm rises at one place (x{', x'.join(ratios)})"
    return f"the norm rises slowly, x{evidence.growth.exp().text()} from early to late"


def _observations(evidence: Evidence, clock: Clock) -> list[str]:
    lines = [f"examined: input norm of layer {evidence.layer}, where the change is largest"]
    if evidence.followed > 0:
        lines.append(
            f"{evidence.followed:.0%} of what it does follows who speaks, and is taken out; with "
            f"it, late over early x{evidence.growth_as_heard.exp().text()}"
        )
    for one in evidence.locations:
        if one.log_ratio.known:
            line = f"C = {one.context_steps}: rise at one place {one.presence}"
            line += f", x{one.log_ratio.exp().text()}"
            if one.presence == "present":
                step = one.step
                line += f" at {clock.describe(round(step.value))}, between steps {step.low:.0f} "
                line += f"and {step.high:.0f}"
            lines.append(line)
    for condition in evidence.where(lambda one: one.context_steps in evidence.references):
        layer, added = evidence.added_growth(condition)
        # whatever the hypotheses ask, an intervention that makes the norm rise is worth a line
        if evidence.references[condition.context_steps] != condition and (
            presence(added) == "present"
        ):
            lines.append(
                f"{condition.name}: late over early norm of layer {layer} "
                f"x{added.exp().text()} that of the plain run"
            )
    for condition in evidence.conditions:
        rises = evidence.nll_rise(condition)
        if rises is not None and rises[0].known:
            lines.append(
                f"{condition.name}: teacher-forced NLL, last third less first third: text "
                f"{rises[0].text('+.3f')} nats, first codebook {rises[1].text('+.3f')} nats"
            )
    return lines
