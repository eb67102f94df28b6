"""Where in a collection each prompt is, what was collected there, and whether it is what the pairs file says.

Grouped collections have a folder per prompt, flat ones a folder per batch; folders that other tools or earlier
versions wrote have the files of the grouped layout, without manifest and markers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment_artifacts.pairs import SIDES, Pair
from gemma_refactored.conversation import as_prompt
from gemma_refactored.errors import UserError, shown
from gemma_refactored.files import BATCH_MARKER, MANIFEST, PROMPT_MARKER, is_folder, read_json, step_file


@dataclass(frozen=True)
class Source:
    """Where the activations of one prompt are.

    Attributes:
        folder: with a file for each step.
        row: of this prompt, of the `rows` that each array has.
        text: the prompt that was collected; None if nothing says.
        prompt_tokens: their number, in the chat format; None if nothing says.
        answer_length: generated tokens; None if nothing says.
        thought_tokens: how many of them are a thought before the answer; None if that has not ended.
        problem: why the files cannot be used.
    """

    folder: Path
    row: int = 0
    rows: int = 1
    text: str | None = None
    prompt_tokens: int | None = None
    answer_length: int | None = None
    thought_tokens: int | None = 0
    problem: str | None = None

    def file(self, step: int) -> Path:
        """Step 0 is the prompt's last token, step k + 1 the k-th generated one."""
        return self.folder / step_file(str(step - 1) if step else "prefill")

    @property
    def is_collected(self) -> bool:
        return self.problem is None and self.file(0).exists()

    def find_steps(self, most: int) -> tuple[int, str | None]:
        """How many steps there are to read, of at most so many; and why they cannot be used, if so."""
        if self.problem:
            return 0, self.problem
        if not self.file(0).exists():
            return 0, f"not collected: {self.folder} has no {self.file(0).name}"
        expected = most if self.answer_length is None else min(most, self.answer_length + 1)
        for step in range(1, expected):
            if not self.file(step).exists():
                return step, None if self.answer_length is None else f"a step is missing: {self.file(step)}"
        return expected, None


def read_manifest(folder: Path) -> dict:
    """The manifest of a collection; {} if it has none."""
    if not is_folder(folder, "activations folder"):
        raise UserError(f"There is no collection in {folder}; run `bash collect_activations.sh` first.")
    path = folder / MANIFEST
    manifest = read_json(path, "manifest") if path.exists() else {}
    if not isinstance(manifest, dict):
        raise UserError(f"The manifest {path} is not an object; run the collection again.")
    return manifest


def find_sources(folder: Path, manifest: dict, pairs: list[Pair], subcategory: str) -> list[list[Source]]:
    """The natural and the artifact source of each pair.

    Raises:
        UserError: a marker that cannot be read.
    """
    is_flat = manifest.get("layout") == "flat" or (not manifest and any(folder.glob(f"batch_*/{BATCH_MARKER}")))
    find = _in_batches(folder, subcategory) if is_flat else _in_groups(folder, manifest, subcategory)
    return [[find(pair.group(side)) for side in SIDES] for pair in pairs]


def _in_groups(folder: Path, manifest: dict, subcategory: str) -> Callable[[str], Source]:
    def find(group: str) -> Source:
        place = folder / group / subcategory / "batch_1"
        path = place / PROMPT_MARKER
        if not path.exists():
            # Collections without a manifest have no markers; in others a prompt without one was interrupted.
            is_cut = bool(manifest) and (place / step_file("prefill")).exists()
            return Source(place, problem=f"not complete: {place} has no {PROMPT_MARKER}" if is_cut else None)
        marker = read_json(path, "prompt marker")
        answer = marker.get("token_ids") if isinstance(marker, dict) else None
        if not isinstance(answer, list):
            raise UserError(
                f"The prompt marker {path} has no 'token_ids'; delete its folder and run the collection again."
            )
        return Source(place, 0, 1, _text(marker), _prompt_tokens(marker), len(answer), _thought_tokens(marker))

    return find


def _in_batches(folder: Path, subcategory: str) -> Callable[[str], Source]:
    sources = {}
    for path in sorted(folder.glob(f"batch_*/{BATCH_MARKER}")):
        rows = list(_batch_rows(path))
        for number, row in enumerate(rows):
            if row["subcategory"] == subcategory and row["number"] == 1:
                facts = (_text(row), _prompt_tokens(row), row["valid_steps"], _thought_tokens(row))
                sources[row["group"]] = Source(path.parent, number, len(rows), *facts)
    missing = f"not collected, or not complete: no {BATCH_MARKER} in {folder} has it"
    return lambda group: sources.get(group) or Source(folder, problem=missing)


def _batch_rows(path: Path) -> Iterator[dict]:
    marker = read_json(path, "batch marker")
    rows = marker.get("rows") if isinstance(marker, dict) else None
    for row in rows if isinstance(rows, list) else [{}]:
        facts = row if isinstance(row, dict) else {}
        values = [facts.get(name) for name in ("group", "subcategory", "number", "valid_steps")]
        if [type(value) for value in values] != [str, str, int, int]:
            raise UserError(
                f"The batch marker {path} does not say which prompts its rows are (group, subcategory, number, "
                "valid_steps); delete its folder and run the collection again."
            )
        yield row


def _text(marker: dict) -> str | None:
    prompt = marker.get("prompt")
    return as_prompt(prompt, "A collected prompt") if isinstance(prompt, str | list) else None


def _prompt_tokens(marker: dict) -> int | None:
    number = marker.get("prompt_tokens")
    return number if isinstance(number, int) else None


def _thought_tokens(marker: dict) -> int | None:
    number = marker.get("thought_tokens", 0)  # markers of earlier versions do not say
    return number if isinstance(number, int) else None


def difference(pair: Pair, sources: list[Source], names: Sequence[str] = SIDES) -> str | None:
    """How the texts of a pair differ from what was collected, if they do; `names` of the two sides."""
    collected = [source.text for source in sources]
    texts = [getattr(pair, side) for side in SIDES]
    if collected == texts[::-1] != texts:
        return "its two sides were swapped in the pairs file after the collection"
    changed = [
        f"{name} prompt was collected as {shown(old)}, but is {shown(new)} in the pairs file"
        for name, old, new in zip(names, collected, texts, strict=True)
        if old not in (None, new)
    ]
    return f"its {', and its '.join(changed)}" if changed else None
