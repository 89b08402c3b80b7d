"""Byte-pair encoding, small enough to read: the demo's text in tokens of about three bytes.

Source: Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016).
"""

import heapq
import re
from collections import Counter, defaultdict
from itertools import pairwise

import torch

# Tokens do not cross these pieces: a new line with its indent, a word or a number with the space before it,
# punctuation.
PIECE = re.compile(r"\n *| ?[^\W\d]+| ?\d+| ?[^\s\w]+|\s+", re.UNICODE)
BYTES = 256
RARE = 5  # pieces that occur less often have no say in the merges

Pair = tuple[int, int]


class Tokenizer:
    """Token t < 256 is the byte t; token 256 + i is the pair merges[i] of earlier tokens."""

    def __init__(self, merges: list[Pair]) -> None:
        self.merges = merges
        self._token = {pair: BYTES + i for i, pair in enumerate(merges)}
        self._known: dict[str, list[int]] = {}  # pieces met so far

    @classmethod
    def learn(cls, text: str, size: int) -> "Tokenizer":
        """Merge the most frequent pair of tokens until there are `size` tokens or no pair occurs twice."""
        counts = Counter(PIECE.findall(text))
        return cls(_learn({piece: n for piece, n in counts.items() if n >= RARE}, size - BYTES))

    def encode(self, text: str) -> torch.Tensor:
        """int32 [tokens]; decode gives the text back."""
        tokens: list[int] = []
        for piece in PIECE.findall(text):
            if piece not in self._known:
                self._known[piece] = self._merge(list(piece.encode()))
            tokens += self._known[piece]
        return torch.tensor(tokens, dtype=torch.int32)

    def decode(self, tokens: torch.Tensor) -> str:
        """The text of tokens [n]; bytes that are no UTF-8 become U+FFFD."""
        parts = [bytes([byte]) for byte in range(BYTES)]
        for left, right in self.merges:
            parts.append(parts[left] + parts[right])
        return b"".join(parts[token] for token in tokens.tolist()).decode("utf-8", errors="replace")

    def _merge(self, tokens: list[int]) -> list[int]:
        """Apply the merges to the tokens of one piece, the earliest learned first."""
        while len(tokens) > 1:
            pair = min(pairwise(tokens), key=lambda pair: self._token.get(pair, len(self.merges) + BYTES))
            if pair not in self._token:
                break
            tokens = _replace(tokens, pair, self._token[pair])
        return tokens


def _replace(tokens: list[int], pair: Pair, new: int) -> list[int]:
    merged: list[int] = []
    i = 0
    left, right = pair
    last = len(tokens) - 1
    while i <= last:
        if tokens[i] == left and i < last and tokens[i + 1] == right:
            merged.append(new)
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged


def _learn(counts: dict[str, int], merges: int) -> list[Pair]:
    """The merges, most frequent pair first, ties to the smaller pair; counts of pairs are kept up to date."""
    pieces = [list(piece.encode()) for piece in counts]
    weights = list(counts.values())
    frequency: Counter[Pair] = Counter()
    pieces_with: dict[Pair, set[int]] = defaultdict(set)
    for i, piece in enumerate(pieces):
        for pair in pairwise(piece):
            frequency[pair] += weights[i]
            pieces_with[pair].add(i)
    queue = [(-count, pair) for pair, count in frequency.items()]
    heapq.heapify(queue)
    learned: list[Pair] = []
    while queue and len(learned) < merges:
        count, pair = heapq.heappop(queue)
        if -count != frequency[pair]:  # out of date: it goes back with the count of now
            if frequency[pair] > 1:
                heapq.heappush(queue, (-frequency[pair], pair))
            continue
        if -count < 2:
            break
        new = BYTES + len(learned)
        learned.append(pair)
        appeared: set[Pair] = set()
        for i in pieces_with.pop(pair):
            for old in pairwise(pieces[i]):
                frequency[old] -= weights[i]
            pieces[i] = _replace(pieces[i], pair, new)
            for now in pairwise(pieces[i]):
                frequency[now] += weights[i]
                pieces_with[now].add(i)
                if new in now:
                    appeared.add(now)
        for now in appeared:
            heapq.heappush(queue, (-frequency[now], now))
    return learned
