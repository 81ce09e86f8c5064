"""What the licences of encoders say about models that are made from them.

A model comes from an encoder in one of two ways: from its weights (a pre-training or a fine-tuning
that starts from them), or from its outputs (a student that reproduces its features, a classifier
that was trained on them). The clauses are those of the model cards of UNI and Virchow2
("derivatives, which include models trained on outputs"), taken for all encoders under CC BY-NC-ND
4.0, and of the licences of Owkin (HistoSSLscaling), kaiko.ai (towards_large_pathology_fms), Lunit
(benchmark-ssl-pathology). Where a licence does not speak of outputs, the stricter reading is taken.
This is a help against mistakes, and no legal advice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from patch_encoder.models.encoder_names import find_row
from patch_encoder.models.encoder_table import ALIASES, ENCODERS, NC, NC_ND
from wsi_common.errors import UserError

NON_COMMERCIAL = ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0")
ANY: tuple[str, ...] = ()
PERMISSIVE = ("imagenet_lite0", "dinov2_vitb14", "virchow", "h_optimus_0", "hibou_b")


@dataclass(frozen=True)
class Terms:
    """What a licence permits.

    Attributes:
        weights, outputs: licences under which a model that comes from the weights, or from the
            outputs, may be shared; `ANY`: its author's choice; None: it may not be shared.
        clause: what the licence says, for people; follows "whose licence".
    """

    weights: tuple[str, ...] | None
    outputs: tuple[str, ...] | None
    clause: str


FREE = Terms(ANY, ANY, "permits models that are made from it")
ALIKE = "asks for its own terms, for non-commercial use, on all that comes from it"
TERMS = {
    "apache-2.0": FREE,
    "apache-2.0, research use": Terms(
        ANY, ANY, "permits it; its card asks for research use, and excludes clinical use"
    ),
    "mit": FREE,
    "bsd-3-clause": FREE,
    "cc-by-4.0": FREE,
    "gpl-3.0": Terms(
        ("gpl-3.0",), ANY, "asks for the same licence on all that contains its weights"
    ),
    "dinov3 licence": Terms(
        ("dinov3-license",), ("dinov3-license",), "asks for the same agreement on derivative works"
    ),
    NC.lower(): Terms(NON_COMMERCIAL, NON_COMMERCIAL, "excludes commercial use"),
    "cc-by-nc-sa-4.0": Terms(
        ("cc-by-nc-sa-4.0",),
        ("cc-by-nc-sa-4.0",),
        "asks for the same licence on what comes from it",
    ),
    NC_ND.lower(): Terms(
        None, None, "forbids sharing derivatives, which include models trained on its outputs"
    ),
    "owkin non-commercial": Terms(("owkin-non-commercial",), ("owkin-non-commercial",), ALIKE),
    "kaiko.ai non-commercial": Terms(("kaiko-non-commercial",), ("kaiko-non-commercial",), ALIKE),
    "lunit non-commercial": Terms(
        ("lunit-non-commercial", *NON_COMMERCIAL), NON_COMMERCIAL, "excludes commercial use"
    ),
}
# licences that are not the hub's own identifiers, and where their text is
LINKS = {
    "owkin-non-commercial": "https://github.com/owkin/HistoSSLscaling/blob/main/LICENSE.txt",
    "kaiko-non-commercial": "https://github.com/kaiko-ai/towards_large_pathology_fms/blob/main/LICENSE",
    "lunit-non-commercial": "https://github.com/lunit-io/benchmark-ssl-pathology/blob/main/LICENSE",
    "dinov3-license": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
}


@dataclass(frozen=True)
class Origin:
    """An encoder that a model comes from.

    Attributes:
        encoder: as the checkpoint names it; empty where it names none.
        way: `weights` or `outputs`.
        role: what it was to the model, for people, as "teacher".
    """

    encoder: str
    way: str
    role: str


def find_licence(encoder: str, stated: Mapping[str, str]) -> str:
    """The licence of an encoder's weights, empty where nobody knows it.

    Args:
        encoder: a name as in a checkpoint: of the table, of a library, or a file's.
        stated: encoder -> licence as the user states it; what the table says cannot be changed.
    """
    name = encoder
    while name not in ENCODERS and name not in ALIASES and "-" in name:
        name = name.rpartition("-")[0]  # `uni-mean` is uni with another pooling
    if name in ENCODERS or name in ALIASES:
        found = ENCODERS[ALIASES.get(name, name)].licence
        return found if found.lower() in TERMS else stated.get(encoder, found)
    if encoder in stated:
        return stated[encoder]
    if not encoder.startswith(("timm:", "open_clip:")):
        return ""
    try:
        return find_row(encoder).licence
    except UserError:
        return ""


def judge(origin: Origin, stated: Mapping[str, str]) -> tuple[str, ...]:
    """The licences under which a model of this origin may be shared; `ANY`: all.

    Raises:
        UserError: it may not be shared, or nobody knows; names the licence and the remedy.
    """
    role = f"the {origin.way} of its {origin.role}"
    if not origin.encoder:
        raise UserError(
            f"the model comes from {role}, which its checkpoint does not name; name it with "
            "teacher=<encoder>"
        )
    licence = find_licence(origin.encoder, stated)
    terms = TERMS.get(licence.lower())
    if terms is None:
        raise UserError(
            f"the model comes from {role} {origin.encoder}, whose licence is not known "
            f"({licence or 'none is recorded'}); state it as "
            f"licences='{{\"{origin.encoder}\": <one of {', '.join(sorted(TERMS))}>}}'"
        )
    permitted = terms.weights if origin.way == "weights" else terms.outputs
    if permitted is None:
        raise UserError(
            f"the model comes from {role} {origin.encoder}, whose licence ({licence}) "
            f"{terms.clause}; share the configuration instead, or train with an encoder that "
            f"permits it ({', '.join(PERMISSIVE)}); upload=false writes the folder for yourself"
        )
    return permitted


def choose_licence(origins: Sequence[Origin], wanted: str, stated: Mapping[str, str]) -> str:
    """The licence of a model with these origins.

    Args:
        origins: the encoders behind it.
        wanted: the user's choice; empty: the one that an encoder asks for.
        stated: as for `find_licence`.

    Raises:
        UserError: it may not be shared, or not under that licence, or there is no choice.
    """
    permitted: tuple[str, ...] = ANY
    asks = ""
    for origin in origins:
        found = judge(origin, stated)
        if found and permitted and not set(found) & set(permitted):
            raise UserError(
                f"the model comes from {asks} and from {origin.encoder}, whose licences ask for "
                f"{' or '.join(permitted)} and {' or '.join(found)}: no licence satisfies both"
            )
        if found:
            permitted = tuple(name for name in found if not permitted or name in permitted)
            asks = origin.encoder
    if wanted and permitted and wanted not in permitted:
        raise UserError(
            f"licence={wanted}: expected {' or '.join(permitted)}, which the licence of {asks} "
            "asks for; set licence to that or leave it out"
        )
    if not wanted and not permitted:
        raise UserError(
            "licence: expected one for the model, as none of its encoders asks for any; set "
            "licence=apache-2.0, mit, cc-by-4.0, ..."
        )
    return wanted or permitted[0]
