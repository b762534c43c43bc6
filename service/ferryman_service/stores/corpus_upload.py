"""An upload: the text goes into files as it comes, and is checked and stored whole at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import IO, Final

from ferryman_service.domain.cleanup import clean_up
from ferryman_service.domain.corpora import Corpus, CorpusHeader, CorpusWarning, SentencePair, Side, Split
from ferryman_service.domain.errors import CorpusTooLarge, InvalidCorpus, Violation
from ferryman_service.domain.ids import CORPUS_PREFIX, new_id
from ferryman_service.stores.corpus_signs import CorpusSigns
from ferryman_service.stores.corpus_text import CheckedSplit, CorpusLimits, check_split
from ferryman_service.stores.database import disk_errors
from ferryman_service.stores.folders import HeldFolder, sync_folder
from ferryman_service.stores.free_space import FreeSpace

_CHECKED: Final = "checked"


class FileCorpusUpload:
    """A CorpusUpload. Its files lie in a folder of its own, so an upload that is given up leaves nothing."""

    def __init__(
        self,
        header: CorpusHeader,
        limits: CorpusLimits,
        held: HeldFolder,
        space: FreeSpace,
        keep: Callable[[Corpus, Path], Corpus],
    ) -> None:
        """Store the parts; `keep` stores a corpus whose four checked files lie in the given folder."""
        self._space = space
        self._header = header
        self._limits = limits
        self._held = held
        self._keep = keep
        self._files: dict[tuple[Split, Side], IO[bytes]] = {}
        self._forms: dict[Split, str] = {}
        self._pairs: dict[Split, int] = dict.fromkeys(Split, 0)
        self._line_breaks: list[Violation] = []
        self._line_break_count = 0
        self.size_bytes = 0
        """How much text has come so far."""

    def add_pairs(self, split: Split, pairs: Sequence[SentencePair]) -> None:
        """Append pairs. Raises CorpusTooLarge, DiskFull, InvalidCorpus (the split came as files before)."""
        self._check_form(split, "pairs")
        self._space.require()
        for pair in pairs:
            self._pairs[split] += 1
            for side, sentence in ((Side.SOURCE, pair.source), (Side.TARGET, pair.target)):
                if "\n" in sentence:
                    self._refuse_line_break(split, side)
                self._write(split, side, sentence.replace("\n", " ").encode() + b"\n")

    def add_chunk(self, split: Split, side: Side, data: bytes) -> None:
        """Append a piece of a file. Raises CorpusTooLarge, DiskFull, InvalidCorpus (the split came as pairs before)."""
        self._check_form(split, "files")
        self._space.require(len(data))
        self._write(split, side, data)

    def finish(self) -> Corpus:
        """Check and store the corpus, atomically. Raises DiskFull, InvalidCorpus, RequestIdReused."""
        try:
            with disk_errors():
                self._close_files()
                self._space.require(self.size_bytes)  # what is checked is written once more
                checked_dir = self._held.path / _CHECKED
                checked_dir.mkdir()
                signs = CorpusSigns()
                checked = {
                    split: check_split(split, self._held.path, checked_dir, self._limits, signs)
                    for split in (Split.VALIDATION, Split.TRAIN)  # the order that the signs want
                }
                self._refuse_violations(checked)
                sync_folder(checked_dir)
                return self._keep(self._describe(checked, tuple(signs.warnings())), checked_dir)
        finally:
            self.abort()

    def abort(self) -> None:
        """Throw the upload away; harmless after finish, and raises nothing."""
        files = list(self._files.values())
        self._files.clear()
        # On a full disk closing a file fails too: it writes what is still in memory.
        clean_up(*(file.close for file in files), self._held.release)

    def _check_form(self, split: Split, form: str) -> None:
        known = self._forms.setdefault(split, form)
        if known != form:
            text = f"came as {known} before and comes as {form} now: give each split in one form"
            raise InvalidCorpus([Violation(field=split.value, description=text, reason="MIXED_FORMS")])

    def _refuse_line_break(self, split: Split, side: Side) -> None:
        self._line_break_count += 1
        if len(self._line_breaks) < self._limits.max_violations:
            text = f"sentence {self._pairs[split]} holds a line break: a sentence is one line"
            self._line_breaks.append(Violation(field=f"{split}.{side}", description=text, reason="LINE_BREAK"))

    def _write(self, split: Split, side: Side, data: bytes) -> None:
        self.size_bytes += len(data)
        if self.size_bytes > self._limits.max_bytes:
            raise CorpusTooLarge(
                f"the corpus is over {self._limits.max_bytes} bytes, the limit of this server: upload less",
                limit_bytes=self._limits.max_bytes,
            )
        with disk_errors():
            if (split, side) not in self._files:
                self._files[split, side] = (self._held.path / f"{split}.{side}").open("wb")
            self._files[split, side].write(data)

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()

    def _refuse_violations(self, checked: Mapping[Split, CheckedSplit]) -> None:
        # What concerns a whole split comes first, then each file in turn: bad lines of one never crowd out the others.
        violations = [violation for split in Split for violation in checked[split].split_violations]
        whole = len(violations)
        by_file = [self._line_breaks, *(lines for split in Split for lines in checked[split].line_violations)]
        violations += [violation for turn in zip_longest(*by_file) for violation in turn if violation is not None]
        if violations:
            total = whole + self._line_break_count + sum(checked[split].bad_lines for split in Split)
            raise InvalidCorpus(violations[: self._limits.max_violations], total)

    def _describe(self, checked: Mapping[Split, CheckedSplit], warnings: Sequence[CorpusWarning]) -> Corpus:
        """Return the corpus; the warnings are those about both splits."""
        validation = checked[Split.VALIDATION].statistics
        languages = [self._header.source_language, self._header.target_language]
        return Corpus(
            corpus_id=new_id(CORPUS_PREFIX),
            header=self._header,
            train=checked[Split.TRAIN].statistics,
            validation=dataclasses.replace(validation, warnings=(*validation.warnings, *warnings)),
            digest=corpus_digest(languages, checked),
            create_time_ns=time.time_ns(),
        )


def corpus_digest(languages: Sequence[str], checked: Mapping[Split, CheckedSplit]) -> str:
    """Return the SHA-256 of a corpus: source and target language, and the normalised text of all splits."""
    return digest_of(languages, [checked[split].digests for split in Split])


def digest_of(languages: Sequence[str], digests: Sequence[Sequence[str]]) -> str:
    """Return the SHA-256 of a corpus whose splits have these digests of source and target."""
    return hashlib.sha256(json.dumps([languages, *digests]).encode()).hexdigest()
