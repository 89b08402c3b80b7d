"""What a long run says: its steps with their times; failures and what is incomplete, for the end."""

import sys
import time


class Log:
    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.failures: list[tuple[str, str]] = []
        self.incomplete: list[str] = []

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:5.0f} s] {text}", flush=True)

    def fail(self, step: str, output: str) -> None:
        self.say(f"{step}: FAILED")
        self.failures.append((step, output))

    def lack(self, text: str) -> None:
        """What was left out or cut short; no failure."""
        self.say(text)
        self.incomplete.append(text)

    def close(self) -> int:
        """Print what must not be missed; returns the exit code."""
        for text in self.incomplete:
            print(f"incomplete: {text}", file=sys.stderr)
        for step, output in self.failures:
            print(f"\n=== FAILED: {step}\n{output}", file=sys.stderr)
        if self.failures:
            print(f"\nfailed: {', '.join(step for step, _ in self.failures)}", file=sys.stderr)
        return 1 if self.failures else 0
