# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Replace the ids of a data set by pseudonyms that group as the ids do, and cannot be turned back without a key."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path

from .schema import ImageFile, StudyRecord

__all__ = ["Pseudonyms"]

_KEY_BYTES = 32
_HEX_DIGITS = 24
# Of a name, nothing but these is kept: "name.surname.png" has more than one suffix.
_SUFFIXES = (".nii.gz", ".nii", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".jp2")


@dataclass(frozen=True)
class Pseudonyms:
    """Replaces ids by keyed hashes (HMAC-SHA-256): one patient has one pseudonym, in every set made with one key.

    Args:
        key: 32 random bytes. Who has it and a list of ids can tell which pseudonym is whose.

    Raises:
        ValueError: If the key has another length.
    """

    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Check the key."""
        if len(self.key) != _KEY_BYTES:
            raise ValueError(f"expected a key of {_KEY_BYTES} bytes, got {len(self.key)}")

    @classmethod
    def from_file(cls, path: str | Path) -> Pseudonyms:
        """Read the key from a file of hexadecimal digits, which is made, for its owner alone, where it is missing.

        Raises:
            ValueError: If the file holds no key.
        """
        path = Path(path)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with open(handle, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(_KEY_BYTES) + "\n")
        try:
            key = bytes.fromhex(path.read_text(encoding="ascii").strip())
        except ValueError:
            raise ValueError(f"{path}: expected {2 * _KEY_BYTES} hexadecimal digits") from None
        return cls(key)

    @property
    def fingerprint(self) -> str:
        """Name the key without telling it."""
        return self.of("key", "fingerprint")

    def of(self, kind: str, identifier: str) -> str:
        """Return the pseudonym of an id of a kind, as hexadecimal digits."""
        return hmac.new(self.key, f"{kind}:{identifier}".encode(), hashlib.sha256).hexdigest()[:_HEX_DIGITS]

    def replace(self, record: StudyRecord) -> StudyRecord:
        """Return the record with pseudonyms for its study, patient, documents and image names.

        The text of reports is left as it is.
        """
        study = self.of("study", record.study_id)
        return replace(
            record,
            study_id=study,
            patient_id=None if record.patient_id is None else self.of("patient", record.patient_id),
            documents=tuple(f"document:{self.of('document', each)}" for each in record.documents),
            images=tuple(
                ImageFile(Path(f"{study}-{number}{_suffix(each.path)}"), each.data, each.view)
                for number, each in enumerate(record.images)
            ),
        )


def _suffix(path: Path | None) -> str:
    name = "" if path is None else path.name.lower()
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
