"""What sparsity is worth at the inference of a finished run: one sentence for each number of threads."""

from __future__ import annotations

from collections.abc import Mapping

from gapfx.bench.findings import DENSE, Findings

LEAST_GAIN = 1.05
SPARSE, FP32 = "sparse ", "sparse fp32"
Gains = Mapping[str, float]


def run_verdicts(findings: Findings) -> list[str]:
    """Gains of the loaded model over dense torch in fp32 at each batch, and where something else is faster."""
    of_model = [timing for timing in findings.timings if timing.batch and timing.seconds]
    lines: list[str] = []
    for threads in dict.fromkeys(timing.threads for timing in of_model):
        gains: dict[int, dict[str, float]] = {}
        for timing in of_model:
            gain = findings.gain(timing)
            if timing.threads == threads and gain is not None and timing.way != DENSE:
                gains.setdefault(timing.batch, {})[timing.way] = gain
        text = _sentence({batch: found for batch, found in gains.items() if _best(found)})
        if text:
            lines.append(f"inference on {threads} thread{'s' * (threads > 1)}: {text}")
    return lines


def _sentence(gains: Mapping[int, Gains]) -> str:
    paying = {batch: found for batch, found in gains.items() if found[_best(found)] >= LEAST_GAIN}
    parts: list[str] = []
    if paying:
        told = ", ".join(f"{_gain(found)} at batch {batch}{_form(found)}" for batch, found in paying.items())
        parts.append(f"faster than torch fp32 here: {told}")
    level = ", ".join(f"{_gain(found)} at batch {batch}" for batch, found in gains.items() if batch not in paying)
    if level:
        parts.append(f"not faster than torch fp32 here: {level}")
    others = [f"{other} at batch {batch}" for batch, found in gains.items() if (other := _faster(found))]
    if others:
        parts.append(f"a dense way is faster still: {', '.join(others)}")
    return "; ".join(parts)


def _best(gains: Gains) -> str:
    return max((way for way in gains if way.startswith(SPARSE)), key=lambda way: gains[way], default="")


def _gain(gains: Gains) -> str:
    return f"{gains[_best(gains)]:.1f}x"


def _form(gains: Gains) -> str:
    """In what form the values are held; with fewer bits than fp32 the outputs are rounded, so its gain is told too."""
    best = _best(gains)
    rest = f", in fp32 {gains[FP32]:.1f}x" if best != FP32 and FP32 in gains else ""
    return f" ({best.removeprefix(SPARSE)} values{rest})"


def _faster(gains: Gains) -> str:
    others = [way for way in gains if not way.startswith(SPARSE) and gains[way] > max(1.0, gains[_best(gains)])]
    fastest = max(others, key=lambda way: gains[way], default="")
    return f"{fastest.removeprefix('dense ')} {gains[fastest]:.1f}x" if fastest else ""
