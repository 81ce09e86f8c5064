"""Deformable transformer: feature pyramid -> encoder -> object queries -> decoder.

Source: Deformable DETR (arXiv:2010.04159), figure 2 and appendix A.4; groups of queries in training
from Group DETR (Chen et al., ICCV 2023, arXiv:2207.13085). Parameter names are those of the
published checkpoints but for the two-stage layers, which sit in `proposals`. Differences: no
encoder layer and a single level are allowed; queries come from learned embeddings or, with
`two_stage`, from the encoder's cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detection_kd.models.deformable_layers import (
    DeformableDecoder,
    DeformableDecoderLayer,
    DeformableEncoder,
    DeformableEncoderLayer,
    MSDeformAttn,
    Pyramid,
)
from detection_kd.models.denoising import NoisedTargets
from detection_kd.models.position_encoding import sine_position_encoding
from detection_kd.models.proposals import ProposalHead
from wsi_common.config import key


@dataclass
class Architecture:
    """What it takes, beside the backbone and the categories, to build the detector again."""

    hidden_dim: int = key(256, "channels of the transformer, a multiple of 32 and of heads")
    heads: int = key(8, "attention heads")
    feedforward_dim: int = key(1024, "hidden channels of the feed-forward networks")
    encoder_layers: int = key(6, "encoder layers, 0 or more")
    decoder_layers: int = key(6, "decoder layers, 1 or more")
    levels: int = key(4, "feature levels, 1..4: strides 32 | 16, 32 | 8, 16, 32 | 8, 16, 32, 64 px")
    points: int = key(4, "sampled positions per head and level")
    queries: int = key(300, "object queries: the most boxes an image can get")
    dropout: float = key(0.1, "dropout of the transformer")
    box_refine: bool = key(False, "each decoder layer starts from the box of the layer before")
    two_stage: bool = key(False, "queries come from the encoder's best proposals; needs box_refine")
    mixed_selection: bool = key(
        False, "proposals place the queries, their contents are learned (DINO); needs two_stage"
    )
    groups: int = key(
        1,
        "groups of queries in training, each matched on its own (Group DETR); 1: off; inference "
        "keeps one",
    )
    denoising: int = key(
        0,
        "noised copies of an image's boxes as extra training queries (DINO: 100); 0: off; needs "
        "two_stage",
    )


@dataclass
class Detections:
    """Raw predictions; boxes are (cx, cy, w, h) as fractions of the unpadded image.

    Attributes:
        logits: (decoder layers, B, Q, classes); in training Q counts the queries of all groups.
        boxes: (decoder layers, B, Q, 4).
        proposal_logits: (B, S, classes) of the first stage, or None.
        proposal_boxes: (B, S, 4) of the first stage, or None.
        denoised: predictions (as the first two) for noised annotations, and those, or None.
        groups: groups of queries.
    """

    logits: Float[Tensor, "layers b q classes"]
    boxes: Float[Tensor, "layers b q 4"]
    proposal_logits: Float[Tensor, "b s classes"] | None = None
    proposal_boxes: Float[Tensor, "b s 4"] | None = None
    denoised: tuple[Tensor, Tensor, NoisedTargets] | None = None
    groups: int = 1


@dataclass
class Queries:
    """What the decoder starts from.

    Attributes:
        content: (B, Q, D).
        position: (B, Q, D) positional encodings.
        reference: (B, Q, 2 or 4).
    """

    content: Float[Tensor, "b q d"]
    position: Float[Tensor, "b q d"]
    reference: Float[Tensor, "b q coords"]


class DeformableTransformer(nn.Module):
    """Encoder, query selection and decoder."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.groups = a.groups
        shape = (a.hidden_dim, a.heads, a.levels, a.points, a.feedforward_dim, a.dropout)
        self.encoder = DeformableEncoder(
            [DeformableEncoderLayer(*shape) for _ in range(a.encoder_layers)]
        )
        self.decoder = DeformableDecoder(
            [DeformableDecoderLayer(*shape) for _ in range(a.decoder_layers)], a.box_refine
        )
        if a.encoder_layers:  # without an encoder nothing reads positions of cells
            self.level_embed = nn.Parameter(torch.empty(a.levels, a.hidden_dim))
        if a.two_stage:
            self.proposals = ProposalHead(a.hidden_dim, a.queries, a.mixed_selection)
        else:
            self.reference_points = nn.Linear(a.hidden_dim, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Published initial values: Xavier-uniform matrices, then the attention layers' own."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        if hasattr(self, "reference_points"):
            nn.init.zeros_(self.reference_points.bias)
        if hasattr(self, "level_embed"):
            nn.init.normal_(self.level_embed)

    def pyramid(
        self, features: Sequence[Float[Tensor, "b d _h _w"]], padding: Bool[Tensor, "b h w"]
    ) -> Pyramid:
        """Flatten the levels' maps and describe where they are padded.

        Args:
            features: one map per level, D channels each.
            padding: True where a pixel of the batch is padding.
        """
        dtype = torch.promote_types(features[0].dtype, torch.float32)
        masks = [
            nn.functional.interpolate(padding[None].float(), size=map.shape[-2:])[0].bool()
            for map in features
        ]
        ratios = [
            torch.stack(((~m[:, 0]).to(dtype).mean(1), (~m[:, :, 0]).to(dtype).mean(1)), -1)
            for m in masks
        ]
        positions = [
            sine_position_encoding(m, features[0].shape[1], dtype).flatten(2) for m in masks
        ]
        if hasattr(self, "level_embed"):
            positions = [p + self.level_embed[level][:, None] for level, p in enumerate(positions)]
        return Pyramid(
            tokens=torch.cat([map.flatten(2) for map in features], 2).transpose(1, 2).to(dtype),
            positions=torch.cat(positions, 2).transpose(1, 2),
            padding=torch.cat([m.flatten(1) for m in masks], 1),
            shapes=[(map.shape[2], map.shape[3]) for map in features],
            valid_ratios=torch.stack(ratios, 1),
        )

    def forward(
        self,
        pyramid: Pyramid,
        query_embed: Float[Tensor, "q _width"] | None,
        class_heads: nn.ModuleList,
        box_heads: nn.ModuleList,
        noised: NoisedTargets | None = None,
        label_embed: nn.Embedding | None = None,
    ) -> Detections:
        """Predictions of every decoder layer.

        Args:
            pyramid: from `pyramid`.
            query_embed: learned positions and contents of the queries (Q, 2 D); contents alone (Q,
                D) with mixed selection; None with `two_stage` without it. Q counts the queries of
                all groups.
            class_heads: one per decoder layer, and with `two_stage` one more for the encoder's
                cells.
            box_heads: likewise.
            noised: annotations as extra queries, with `label_embed`, the content of each class.
        """
        memory = self.encoder(pyramid)
        layers, groups = len(self.decoder.layers), self.groups if self.training else 1
        proposal_logits = proposal_boxes = None
        if hasattr(self, "proposals"):
            proposal_logits, box_logits = self.proposals.score(
                memory, pyramid, class_heads[layers], box_heads[layers]
            )
            queries = self.from_proposals(
                self.proposals.select(proposal_logits, box_logits), query_embed, groups
            )
            proposal_boxes = box_logits.sigmoid()
        else:
            assert query_embed is not None
            queries = self.learned(query_embed, memory, groups)
        sizes = [queries.content.shape[1] // groups] * groups
        if noised is not None:
            assert label_embed is not None
            queries = self.with_noised(queries, noised, label_embed)
            sizes = [noised.group_size] * noised.groups + sizes
        hidden, boxes = self.decoder(
            queries.content,
            queries.position,
            queries.reference,
            memory,
            pyramid,
            box_heads[:layers],
            apart(sizes, memory.device),
        )
        logits = torch.stack([head(x) for head, x in zip(class_heads, hidden, strict=False)])
        if noised is None:
            return Detections(logits, boxes, proposal_logits, proposal_boxes, None, groups)
        count = noised.labels.shape[1]
        denoised = logits[:, :, :count], boxes[:, :, :count], noised
        return Detections(
            logits[:, :, count:],
            boxes[:, :, count:],
            proposal_logits,
            proposal_boxes,
            denoised,
            groups,
        )

    def learned(
        self, query_embed: Float[Tensor, "q two_d"], memory: Float[Tensor, "b s d"], groups: int
    ) -> Queries:
        """Queries from embeddings of position and content."""
        used = query_embed[: len(query_embed) // self.groups * groups]
        position, content = used.expand(memory.shape[0], -1, -1).chunk(2, dim=-1)
        with torch.autocast(memory.device.type, enabled=False):
            return Queries(content, position, self.reference_points(position).sigmoid())

    def from_proposals(
        self,
        reference: Float[Tensor, "b q 4"],
        query_embed: Float[Tensor, "all_q d"] | None,
        groups: int,
    ) -> Queries:
        """Queries at the proposals; with learned contents every group gets the same positions."""
        if query_embed is None:
            position, content = self.proposals.encode(reference).chunk(2, dim=-1)
            return Queries(content, position, reference)
        kept = reference.shape[1]
        rows = query_embed.view(self.groups, -1, query_embed.shape[-1])[:groups, :kept].flatten(
            0, 1
        )  # (groups * Q, D)
        position = self.proposals.encode(reference).repeat(1, groups, 1)
        return Queries(
            rows.expand(reference.shape[0], -1, -1), position, reference.repeat(1, groups, 1)
        )

    def with_noised(
        self, queries: Queries, noised: NoisedTargets, label_embed: nn.Embedding
    ) -> Queries:
        """The noised annotations before the queries."""
        position = self.proposals.encode(noised.boxes.to(queries.reference.dtype))[
            ..., : queries.position.shape[-1]
        ]
        return Queries(
            torch.cat((label_embed(noised.labels).to(queries.content.dtype), queries.content), 1),
            torch.cat((position, queries.position), 1),
            torch.cat((noised.boxes.to(queries.reference.dtype), queries.reference), 1),
        )


def apart(sizes: list[int], device: torch.device) -> Bool[Tensor, "q q"] | None:
    """Self-attention mask of blocks that do not see each other (True: blocked); None for one."""
    if len(sizes) == 1:
        return None
    block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
    return block[:, None] != block[None, :]
