"""Bad input to pq_decode, pq_linear, pq_embedding and their gradients: what the errors say."""

import pytest
import torch

from qnkernels import functional as F

CODES = torch.zeros(6, 3, dtype=torch.uint8)
BOOK = torch.ones(5, 4)
X = torch.ones(2, 12)
OPS = torch.ops.qnkernels


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: F.pq_decode(CODES.long(), BOOK), TypeError, ("codes", "uint8 or uint16", "int64")),
        (lambda: F.pq_decode(CODES[0], BOOK), ValueError, ("codes", "[rows, n_blocks]", "(3,)")),
        (lambda: F.pq_decode(CODES, BOOK.long()), TypeError, ("codebook", "float32", "int64")),
        (lambda: F.pq_decode(CODES, BOOK[0]), ValueError, ("codebook", "[K, d]", "(4,)")),
        (lambda: F.pq_decode(CODES, BOOK[:0]), ValueError, ("codebook", "[K, d]", "(0, 4)")),
        (lambda: F.pq_decode(CODES, torch.ones(257, 4)), ValueError, ("codebook", "256", "(257, 4)")),
        (
            lambda: F.pq_decode(CODES.to(torch.uint16), torch.ones(65537, 1)),
            ValueError,
            ("codebook", "65536", "(65537, 1)"),
        ),
        (lambda: F.pq_decode(CODES, torch.ones(5, 65)), ValueError, ("codebook", "64", "(5, 65)")),
        (lambda: F.pq_decode(CODES, BOOK, "max"), ValueError, ("codebook_grad", "mean", "'max'")),
        (lambda: F.pq_linear(X[:, :8], CODES, BOOK), ValueError, ("x", "12", "(2, 8)")),
        (lambda: F.pq_linear(torch.tensor(1.0), CODES, BOOK), ValueError, ("x", "12", "()")),
        (lambda: F.pq_linear(X.long(), CODES, BOOK), TypeError, ("x", "float32", "int64")),
        (lambda: F.pq_linear(X, CODES, BOOK, torch.ones(5)), ValueError, ("bias", "(6,)", "(5,)")),
        (lambda: F.pq_linear(X, CODES, BOOK, CODES[:, 0]), TypeError, ("bias", "float32", "uint8")),
        (lambda: F.pq_linear(X, CODES, BOOK, None, "none"), ValueError, ("codebook_grad", "sum", "'none'")),
        (lambda: F.pq_linear(X, CODES, BOOK.to("meta")), ValueError, ("codebook", "cpu", "meta")),
        (lambda: F.pq_embedding(X, CODES, BOOK), TypeError, ("indices", "int64", "float32")),
        (
            lambda: F.pq_embedding(torch.tensor([0]), CODES, BOOK, "average"),
            ValueError,
            ("codebook_grad", "sum", "'average'"),
        ),
        (
            lambda: OPS.pq_decode_backward(torch.ones(6, 13), CODES, 5, True),
            ValueError,
            ("grad", "[6, 3 * d]", "(6, 13)"),
        ),
        (
            lambda: OPS.pq_decode_backward(torch.ones(6, 12), CODES, 0, True),
            ValueError,
            ("n_centroids", "at least 1", "0"),
        ),
        (
            lambda: OPS.pq_linear_backward(torch.ones(2, 5), X, CODES, BOOK, True, True, True),
            ValueError,
            ("grad", "(2, 6)", "(2, 5)"),
        ),
        (
            lambda: OPS.pq_linear_backward(torch.ones(2, 6).half(), X, CODES, BOOK, True, True, True),
            TypeError,
            ("grad", "float32", "float16"),
        ),
        (
            lambda: OPS.pq_embedding_backward(torch.ones(3, 12), torch.tensor([0]), CODES, 5, True),
            ValueError,
            ("grad", "(1, ", "(3, 12)"),
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
