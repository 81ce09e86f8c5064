"""Which of the slides that are predicted the models have met in their training, validation or test.

A slide that was trained on is predicted well by any model, so that its prediction says nothing. It
is known again by its id, by the content of its bag, or by its patient.
"""

from __future__ import annotations

from collections.abc import Mapping

from mil.ensembles.classifier import Classifier
from mil.ensembles.subjects import Subject
from mil.training.bag_record import digest_case


class KnownSlides:
    """Slides, bags and patients of the training cohort of a classifier's models."""

    def __init__(self, classifier: Classifier) -> None:
        records = [member.config["bags"] for member in classifier.members]
        self.slides = {slide for record in records for slide in record["digests"]}
        self.digests = {digest for record in records for digest in record["digests"].values()}
        self.cases = {case for record in records for case in record["cases"]}

    def describe(self, subject: Subject, digests: Mapping[str, str]) -> str:
        """By what a subject is known: `slide`, `bag` or `patient`; empty for a new one.

        Args:
            subject: a slide or a case.
            digests: slide id -> digest of its bag.
        """
        if any(slide in self.slides for slide in subject.slides):
            return "slide"
        if any(digests[slide] in self.digests for slide in subject.slides):
            return "bag"
        return "patient" if digest_case(subject.case_id) in self.cases else ""
