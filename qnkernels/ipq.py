"""Iterative product quantization: stage after stage is quantized, and the model finetuned in between.

Source: "And the Bit Goes Down", arXiv 1907.05686; Quant-Noise, arXiv 2004.07320, section 3.2.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import yaml
from torch import nn

from .checkpoint import compressed_size, load_compressed
from .layers import Layers, check_sharing, naming, tied_layers, weight_id
from .matching import Option, resolve
from .nn.compressed import become_
from .nn.distributed import keep_codes_from_ddp_
from .nn.encoder import choose_encoder_path_
from .nn.pq_weight import PQLayer
from .ops.checks import fail
from .pq import PQConfig, Quantized


@dataclass(frozen=True)
class QuantizedLayer:
    """What became of a layer. objective: that of the last step of k-means, |decoded - weight| (Frobenius);
    error: the same by |weight|.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    block_size: int
    n_centroids: int
    objective: float
    error: float

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return (
            f"{self.name} ({self.type}, {shape}): blocks of {self.block_size}, {self.n_centroids} centroids, "
            f"objective {self.objective:.4g}, relative error {self.error:.4f}"
        )


@dataclass(frozen=True)
class Stage:
    """A stage that has just been quantized. number: from 1 to total; size: bytes of the model as it is now,
    those that save_compressed writes.
    """

    number: int
    total: int
    pattern: str
    layers: tuple[QuantizedLayer, ...]
    size: int

    def __str__(self) -> str:
        count = "1 layer" if len(self.layers) == 1 else f"{len(self.layers)} layers"
        head = (
            f"stage {self.number} of {self.total}, {self.pattern}: {count}, {self.size / 1e6:.3f} MB so far"
        )
        return "\n  ".join([head, *map(str, self.layers)])


class IPQ:
    """Quantizes a model stage by stage; each turn of the loop has just quantized one, for you to finetune:

        for stage in qnk.IPQ(model, stages=[r"fc[12]", r"emb", r"attn"], block_size={"attn": 4, "*": 8}):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)  # the codebooks are new parameters
            train(model, optimizer)
            print(stage)

    stages: regular expressions. A Linear, Embedding or Conv2d layer, noisy or not, belongs to the first that
    is found in its name (re.search); those that share its weight come along, with its options and codes. The
    others stay, and those that are noisy keep their noise. block_size, n_centroids: an integer, or a table as
    `matching.resolve` describes. n_iter, seed: of the k-means. codebook_grad: "mean" or "sum".
    codebook_dtype: what the codewords are rounded to, in every forward and in the file; weights of 16 bits
    keep their own dtype. int8: codewords in int8 instead, and the output of each layer fake-quantized to 8
    bits. group: processes, all of which run this loop, that share the k-means and get the same codes.
    resume: a file of save_compressed, written in an earlier loop, to load into the unquantized model. Stages
    whose layers are quantized already are passed over.

    Raises ValueError and TypeError, naming the layer or the argument, before anything is quantized.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[str],
        block_size: Option = 8,
        n_centroids: Option = 256,
        n_iter: int = 20,
        seed: int = 0,
        codebook_grad: str = "mean",
        codebook_dtype: torch.dtype | None = torch.float16,
        int8: bool = False,
        group: "dist.ProcessGroup | None" = None,
        resume: str | os.PathLike | None = None,
    ) -> None:
        self.model, self.patterns = model, _checked_patterns(stages)
        self._sizes = {"block_size": block_size, "n_centroids": n_centroids}
        self._codebook_dtype = torch.int8 if int8 else codebook_dtype
        self._options = dict(
            n_iter=n_iter, seed=seed, codebook_grad=codebook_grad, activations=int8, group=group
        )
        if resume is not None:
            load_compressed(model, resume)
        self._stages = _assigned(model, self.patterns)
        for layers in self._stages:
            self._configs(layers)

    @classmethod
    def from_fairseq(cls, model: nn.Module, config: str | os.PathLike | Mapping, **options) -> "IPQ":
        """Stages, block sizes and numbers of centroids from a YAML configuration of fairseq, or its contents.

        Keys: layers_to_quantize, block_sizes and n_centroids. A doubled backslash in a pattern, as in
        fairseq's example, counts as one: no name has a backslash. options: the other arguments of IPQ.
        """
        if not isinstance(config, Mapping):
            with open(config) as file:
                config = yaml.safe_load(file)
        if not isinstance(config, Mapping) or "layers_to_quantize" not in config:
            fail("config", "a table with the key layers_to_quantize", repr(config))
        names = {"block_sizes": "block_size", "n_centroids": "n_centroids"}
        if unknown := config.keys() - names.keys() - {"layers_to_quantize"}:
            fail("config", f"the keys layers_to_quantize, {', '.join(names)}", repr(sorted(unknown)))
        stages = [str(pattern).replace("\\\\", "\\") for pattern in config["layers_to_quantize"]]
        tables = {names[key]: table for key, table in config.items() if key in names}
        return cls(model, stages, **tables, **options)

    def __len__(self) -> int:
        return len(self.patterns)

    def __iter__(self) -> Iterator[Stage]:
        for number, layers in enumerate(self._stages, start=1):
            if any(not isinstance(layer, PQLayer) for _, layer in layers):
                yield self._quantize(number, layers)

    def _configs(self, layers: Layers) -> list[tuple[str, nn.Module, PQConfig]]:
        """What each layer that is not quantized yet is to become, after every check."""
        configs, by_weight = [], {}
        for name, layer in layers:
            if not isinstance(layer, PQLayer):
                with naming(name):
                    key = weight_id(layer)
                    if key not in by_weight:
                        by_weight[key] = self._config(name, layer)
                    by_weight[key].check(layer)
                    configs.append((name, layer, by_weight[key]))
        return configs

    def _config(self, name: str, layer: nn.Module) -> PQConfig:
        sizes = {key: resolve(key, option, name, layer) for key, option in self._sizes.items()}
        dtype = self._codebook_dtype
        if dtype in (torch.float16, torch.bfloat16) and layer.weight.dtype.itemsize == 2:
            dtype = None
        return PQConfig(**sizes, **self._options, codebook_dtype=dtype)

    def _quantize(self, number: int, layers: Layers) -> Stage:
        """All layers of the stage are clustered before any is turned."""
        quantized: Quantized = {}
        turned, report = [], []
        for name, layer, config in self._configs(layers):
            with naming(name):
                pq = config.convert(layer, quantized)
            turned.append((layer, pq))
            report.append(_describe(name, layer, pq, quantized[id(layer.weight)][1][-1]))
        for layer, pq in turned:
            become_(layer, pq)
        choose_encoder_path_(self.model)
        keep_codes_from_ddp_(self.model)
        pattern = self.patterns[number - 1].pattern
        return Stage(number, len(self), pattern, tuple(report), compressed_size(self.model))


def _describe(name: str, layer: nn.Module, pq: PQLayer, objective: float) -> QuantizedLayer:
    norm = max(float(torch.linalg.vector_norm(layer.weight.detach().float())), math.ulp(0.0))
    sizes = (tuple(layer.weight.shape), pq.block_size, pq.n_centroids)
    return QuantizedLayer(name, type(pq).__name__, *sizes, objective, objective / norm)


def _checked_patterns(stages: Sequence[str]) -> list[re.Pattern]:
    if isinstance(stages, str) or not all(isinstance(pattern, str) for pattern in stages) or not stages:
        fail("stages", "a list of regular expressions", repr(stages))
    try:
        return [re.compile(pattern) for pattern in stages]
    except re.error as error:
        raise ValueError(f"stages: expected regular expressions, got {error.pattern!r} ({error})") from error


def _assigned(model: nn.Module, patterns: list[re.Pattern]) -> list[Layers]:
    """The layers of each stage. Layers of one weight go together, with the first of them that is due; those
    that its pattern finds stand before the others.
    """
    stages: list[Layers] = [[] for _ in patterns]
    ours = lambda layer: type(layer) in PQConfig.CONVERTS or isinstance(layer, PQLayer)  # noqa: E731
    for layers in tied_layers(model, ours):
        matches = (i for i, pattern in enumerate(patterns) if any(pattern.search(name) for name, _ in layers))
        number = next(matches, None)
        if number is not None:
            stages[number] += sorted(layers, key=lambda item: patterns[number].search(item[0]) is None)
    for pattern, layers in zip(patterns, stages, strict=True):
        if not layers:
            fail("stages", "patterns that each find a layer that no earlier one does", repr(pattern.pattern))
    check_sharing(model, [item for layers in stages for item in layers])
    return stages
