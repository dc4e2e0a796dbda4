# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What a step of stage 1 costs as it grows: formulas, which `benchmarks/contrastive_scaling.py` holds against runs.

Bytes sent are those of one rank by ring algorithms: an all-gather or a reduce-scatter of n bytes in total sends
(W - 1) / W * n, an all-reduce both (Patarasuk and Yuan, JPDC 2009). Embeddings and gradients are float32.

Letters: W ranks, B studies of a step over all ranks, D width of the shared space, L languages, R rows of the loss at
once, F findings, P parameters, T tokens.
"""

from dataclasses import dataclass

__all__ = [
    "WAYS",
    "ContrastiveStep",
    "Machine",
    "activation_bytes",
    "attention_flops",
    "dense_flops",
    "reduce_bytes",
    "state_bytes",
    "step_seconds",
]

#: Ways to compute a contrastive loss over ranks; see `ContrastiveStep`.
WAYS = ("whole", "local", "ring", "ours")
_FLOAT, _LONG = 4, 8


@dataclass(frozen=True)
class ContrastiveStep:
    """A step in which every study has an image and a text in each language.

    Ways: "whole", every rank computes all logits (CLIP's figure 3, embeddings gathered with gradient); "local", each
    its own rows and columns (open_clip's `local_loss`); "ring", texts are passed on from rank to rank (SigLIP, Zhai et
    al., ICCV 2023, section 3.3; sigmoid loss alone); "ours", `AlignmentObjective`: own rows, R at a time.

    Attributes:
        studies: B.
        ranks: W.
        width: D.
        languages: L.
        rows: R.
        findings: F.
    """

    studies: int
    ranks: int = 1
    width: int = 512
    languages: int = 1
    rows: int = 1024
    findings: int = 0

    @property
    def contrasts(self) -> int:
        """Matrices of logits: images with each language, and the first language with each other one."""
        return 2 * self.languages - 1

    def logits(self, way: str) -> float:
        """Returns how many logits one rank holds at once; several numbers are held for each.

        What autograd computes it keeps until the gradient has come back, for all contrasts and both softmaxes. "ours"
        holds one part of one of them.
        """
        own = self.studies / self.ranks
        return {
            "whole": self.contrasts * self.studies**2,
            "local": self.contrasts * 2 * own * self.studies,
            "ring": self.contrasts * own * self.studies,
            "ours": min(self.rows, own) * self.studies,
        }[way]

    def embedding_bytes(self, way: str) -> float:
        """Returns the bytes of the embeddings that one rank holds at once, without gradients."""
        of_text = self.languages * self.studies * self.width * _FLOAT
        return 2 * of_text / self.ranks if way == "ring" else of_text * (1 + 1 / self.languages)

    def sent_bytes(self, way: str) -> float:
        """Returns the bytes that one rank sends: embeddings there, gradients back, and what the targets need to know.

        A ring passes on texts alone, and their gradients.
        """
        others = (self.ranks - 1) / self.ranks
        texts = self.languages * self.studies * self.width * _FLOAT
        images = self.studies * self.width * _FLOAT
        if way == "ring":
            return others * 2 * texts
        facts = self.studies * self.fact_bytes if way == "ours" else 0
        return others * (2 * (images + texts) + facts)

    @property
    def fact_bytes(self) -> int:
        """Bytes of `BatchFacts` for one study."""
        of_text = 3 * _LONG  # study, number, language
        return 2 * _LONG + 1 + self.findings * (_FLOAT + 1) + self.languages * of_text

    def flops(self) -> float:
        """Returns the floating point operations of the loss on one rank, there and back: both softmaxes."""
        return 2 * self.contrasts * 3 * 2 * (self.studies / self.ranks) * self.studies * self.width


def reduce_bytes(parameters: float, ranks: int) -> float:
    """Returns the bytes that one rank sends when the gradients of the weights are added up, once a step."""
    return 2 * (ranks - 1) / ranks * parameters * _FLOAT


def state_bytes(trained: float, frozen: float = 0.0, shards: int = 1) -> float:
    """Returns the bytes of float32 weights, gradients and AdamW's two moments on one rank.

    Args:
        trained: Parameters that are trained.
        frozen: Those that are not.
        shards: Ranks that they are parted among (FSDP2, ZeRO-3: Rajbhandari et al., SC 2020); 1 for DDP.
    """
    return (4 * _FLOAT * trained + _FLOAT * frozen) / shards


def activation_bytes(layers: int, tokens: float, width: int) -> float:
    """Returns what a tower in 16 bits keeps of one image or text for the gradient.

    34 bytes a token, layer and channel (Korthikanti et al., MLSys 2023, equation 2, whose term in T^2 fused attention
    does away with).
    """
    return 34 * layers * tokens * width


def dense_flops(parameters: float, tokens: float) -> float:
    """Returns the floating point operations of weights on T tokens, forward; a training step takes three times these.

    With cached gradients it takes four times these: there are two forward passes.
    """
    return 2 * parameters * tokens


def attention_flops(layers: int, tokens: float, width: int) -> float:
    """Returns those of attention between T tokens, which have no weights."""
    return 4 * layers * tokens**2 * width


@dataclass(frozen=True)
class Machine:
    """What a step is estimated on; the defaults are an H100's, at 40 % of its nominal speed in bfloat16.

    Attributes:
        flops_per_s: That the towers reach on one rank.
        node: Ranks that are joined by fast links.
        node_bytes_per_s: One rank sends within a node.
        network_bytes_per_s: All links of a node send together, eight of 400 Gbit/s: a ring leaves a node once.
    """

    flops_per_s: float = 4e14
    node: int = 8
    node_bytes_per_s: float = 4.5e11
    network_bytes_per_s: float = 4e11


def step_seconds(step: ContrastiveStep, flops: float, parameters: float, machine: Machine) -> dict[str, float]:
    """Estimates the parts of a step of our loss, as if nothing were done at the same time.

    Args:
        step: The contrastive step.
        flops: Of the towers on one rank, there and back.
        parameters: That are trained.
        machine: Its speeds.

    Returns:
        Seconds of "towers", of the "loss", of the "embeddings" that are sent, and of adding up "gradients".
    """
    speed = machine.node_bytes_per_s if step.ranks <= machine.node else machine.network_bytes_per_s
    return {
        "towers": flops / machine.flops_per_s,
        "loss": step.flops() / machine.flops_per_s,
        "embeddings": step.sent_bytes("ours") / speed,
        "gradients": reduce_bytes(parameters, step.ranks) / speed,
    }
