"""What the server counts, as Prometheus reads it (text exposition format 0.0.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Histogram:
    """Seconds, counted in buckets."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self._counts[sum(seconds > bound for bound in _SECONDS)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        """The lines of this histogram."""
        below = 0
        for bound, count in zip((*map(str, _SECONDS), "+Inf"), self._counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {below}"


class Metrics:
    """The server's counters since it started. For one thread, that of the event loop."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by route and status
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.first_token = Histogram()
        self.answer = Histogram()

    def text(self, gauges: Mapping[str, tuple[str, int]], counted: Mapping[str, tuple[str, int]]) -> str:
        """Everything; a gauge is its name, its help and its value, and so is what others have counted."""
        lines = [
            "# HELP hrmcore_requests_total Requests, by route and status.",
            "# TYPE hrmcore_requests_total counter",
        ]
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'hrmcore_requests_total{{route="{route}",status="{status}"}} {count}')
        counters = {
            "hrmcore_prompt_tokens_total": ("Tokens of prompts whose answers ended.", self.prompt_tokens),
            "hrmcore_completion_tokens_total": ("Tokens generated.", self.completion_tokens),
            **counted,
        }
        for kind, values in (("counter", counters), ("gauge", gauges)):
            for name, (described, value) in values.items():
                lines += [f"# HELP {name} {described}", f"# TYPE {name} {kind}", f"{name} {value}"]
        histograms = {
            "hrmcore_first_token_seconds": ("From a request to its first text.", self.first_token),
            "hrmcore_answer_seconds": ("From a request to the end of its answers.", self.answer),
        }
        for name, (described, histogram) in histograms.items():
            lines += [f"# HELP {name} {described}", f"# TYPE {name} histogram", *histogram.lines(name)]
        return "\n".join(lines) + "\n"
