"""Text and tokens of the demo."""

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from qnkernels.recipes.text import TextError, load, read, standard_library
from qnkernels.recipes.tokens import PIECE, Tokenizer


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_standard_library_is_split_by_file() -> None:
    files = standard_library()
    assert files == sorted(files) and len(files) > 100
    assert not any(part in {"test", "tests", "site-packages"} for file in files for part in file.parts[-3:])
    text = load(files)
    assert not set(text.train_files) & set(text.validation_files)
    assert sorted(text.train_files + text.validation_files) == [str(file) for file in files]
    assert len(text.train_files) > 15 * len(text.validation_files) > 0
    assert text.train == "\n".join(Path(name).read_bytes().decode() for name in text.train_files)


@pytest.mark.parametrize("count", [2, 3, 20, 41])
def test_several_files_are_split_by_file(tmp_path: Path, count: int) -> None:
    files = [write(tmp_path, f"{i:02}.txt", f"text {i} é\r\n") for i in range(count)]
    text = load([*files, files[0]])
    assert not set(text.train_files) & set(text.validation_files)
    assert len(text.train_files) + len(text.validation_files) == count
    assert len(text.validation_files) == max(1, count // 20)
    for name in text.validation_files:
        assert Path(name).read_bytes().decode() in text.validation


def test_one_file_gives_its_last_tenth(tmp_path: Path) -> None:
    content = "".join(random.Random(3).choices("abcdef é\n", k=997))
    text = load([write(tmp_path, "one.txt", content)])
    assert text.train + text.validation == content
    assert len(text.train) == int(997 * 0.9)


def test_digest_tells_texts_apart(tmp_path: Path) -> None:
    one = load([write(tmp_path, "a", "0123456789")])
    same = load([write(tmp_path, "b", "0123456789")])
    other = load([write(tmp_path, "c", "0123456798")])
    assert one.digest == same.digest != other.digest


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"missing\.txt: cannot be read \(No such file"):
        read(tmp_path / "missing.txt")
    with pytest.raises(TextError, match=f"{tmp_path.name}: cannot be read"):
        read(tmp_path)
    latin = write(tmp_path, "latin.txt", "abc caf\xe9".encode("latin-1"))
    with pytest.raises(TextError, match=r"latin\.txt: not UTF-8 text \(byte 7 is 0xe9\)"):
        load([latin])


def reference_merges(text: str, size: int, rare: int) -> list[tuple[int, int]]:
    """Byte-pair encoding by its definition: count all pairs anew for each merge."""
    counts = {piece: n for piece, n in Counter(PIECE.findall(text)).items() if n >= rare}
    pieces = {piece: list(piece.encode()) for piece in counts}
    merges: list[tuple[int, int]] = []
    while len(merges) < size - 256:
        pairs: Counter[tuple[int, int]] = Counter()
        for piece, tokens in pieces.items():
            for pair in pairwise(tokens):
                pairs[pair] += counts[piece]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        for tokens in pieces.values():
            i = 0
            while i < len(tokens) - 1:
                if (tokens[i], tokens[i + 1]) == best:
                    tokens[i : i + 2] = [256 + len(merges)]
                i += 1
        merges.append(best)
    return merges


@pytest.mark.parametrize("seed", range(4))
def test_tokenizer_learns_the_merges_of_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices("aab \n1.é", k=4000))
    size = 256 + rng.randrange(1, 90)
    tokenizer = Tokenizer.learn(text, size)
    assert tokenizer.merges == reference_merges(text, size, rare=5)


@pytest.mark.parametrize(
    "text", ["", "a", "aaaa aaaa\n    é€😀\t\r\n\x00_x1 --> 42", "def f(x):\n    return x\n" * 9]
)
def test_decode_gives_the_text_back(text: str) -> None:
    tokenizer = Tokenizer.learn("def f(x):\n    return xx aaaa\n" * 10, 300)
    tokens = tokenizer.encode(text)
    assert tokens.dtype == torch.int32
    assert tokenizer.decode(tokens) == text
    assert len(tokens) <= len(text.encode())


def test_tokens_are_fewer_than_bytes_and_within_the_vocabulary() -> None:
    text = load(standard_library()[:40])
    tokenizer = Tokenizer.learn(text.train, 300)
    tokens = tokenizer.encode(text.validation)
    assert int(tokens.max()) < 300
    assert len(tokens) < 0.75 * len(text.validation.encode())
