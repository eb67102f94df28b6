"""Where files are: the one place that knows.

Everything is below HOME, whatever the current directory; paths that users type are relative to the latter.

    collected_activations_output/             the default model's activations, collected_activations_NAME/ another's;
                                              _PAIRS and _SITE follow for pairs and sites of your own
    toxicity_results/                         the second experiment, toxicity_results_NAME/ with another model
    results/MODEL/PAIRS/                      one model on one pairs file: about.json, data/, figures/, report.html
    alignment_artifact_analysis_results.json  the last analysis, and its plot beside it
    alignment_artifacts_cache/                measurements of models

MODEL is the last part of the model's name, PAIRS the stem of the pairs file. To whom a folder belongs is recorded in
its `about.json` (results), its manifest or certificate (activations), or its results (toxicity). If another model (by
the revision of its weights) or another pairs file (by its texts) has the name already, a short hash is appended:
nothing is ever written over another model's files.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from alignment_artifacts.default_model import DEFAULT_MODEL
from alignment_artifacts.pairs import PAIRS_JSON, REFUSAL, SIDES, Pair, PromptPairs, pairs_hash, prompt_groups
from gemma_refactored.configuration import Chat
from gemma_refactored.errors import UserError
from gemma_refactored.files import (
    CERTIFICATE,
    MANIFEST,
    TEMPORARY,
    cannot_write,
    displayed,
    is_file,
    is_folder,
    locked,
    read_json,
    write_json,
)
from gemma_refactored.site_names import SITE_KINDS, kind_of
from gemma_refactored.versions import library_versions

if TYPE_CHECKING:
    from gemma_refactored.model_loading import LoadedModel

CHECKOUT = Path(__file__).resolve().parent.parent
IN_CHECKOUT = (CHECKOUT / "collect_activations.sh").exists()
HOME = CHECKOUT if IN_CHECKOUT else Path.cwd()  # an installed package has no scripts beside it

ANALYSIS, PLOT = "alignment_artifact_analysis_results.json", "alignment_artifact_analysis_plot.png"
COMPARISON_FIGURES = "model_comparison", "weight_changes"
ABOUT, REPORT = "about.json", "report.html"
COLLECTED, COLLECTED_BY_DEFAULT = "collected_activations", "collected_activations_output"
TOXICITY, TOXICITY_RESULTS = "toxicity_results", ("experiment_results.json", "intermediate_experiment_output.json")
DEFAULT_SITE = "mlp"  # what is collected where no site is named
SHORT = 8  # digits of a hash behind a name
LONGEST_NAME, MOST_BYTES = 80, 200  # of a name in characters and in UTF-8; file systems take 255 bytes


# Paths and names that users type.


def find(path: str | Path) -> Path:
    """An input file or folder: where the user is, else beside the scripts."""
    path = Path(os.path.expanduser(path))
    return path if path.is_absolute() or os.path.exists(path) else HOME / path


def find_model(name: str | Path) -> str:
    """A model's folder or file, as `find` does; any other name is one of Hugging Face's, and stays as it is."""
    path = find(name)
    return str(path) if str(name).strip() and os.path.exists(path) else str(name).rstrip("/")


def resolved_model(name: str | Path) -> str:
    """A model or adapter by what it is, however it is spelt: an absolute path without links, or a Hugging Face id."""
    path = find_model(name)
    return str(Path(path).resolve()) if os.path.exists(path) else path


def told(label: str, path: Path) -> str:
    """Where something is, for a terminal of 80 columns; the path itself is never broken."""
    return textwrap.fill(f"{label}: {displayed(path)}", 80, break_long_words=False, break_on_hyphens=False)


def recorded(path: str | Path) -> str:
    """A path in a result file: relative if it is below HOME, so that the whole folder can be moved."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(HOME)) if path.is_relative_to(HOME) else str(path)


def safe_name(name: str) -> str:
    """The last part of a name, as the name of a file: letters, digits, dot, dash and underscore."""
    last = re.split(r"[/\\]", name.strip().rstrip("/\\"))[-1]
    name = re.sub(r"[^\w.-]+", "_", last).strip("._-")[:LONGEST_NAME]
    return name.encode()[:MOST_BYTES].decode(errors="ignore") or "unnamed"


def short(revision: str) -> str:
    """A revision or hash in a message."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]+\b", r"\1", revision)


def hashed_name(name: str, identity: str) -> str:
    """A file name that no other identity has."""
    return f"{safe_name(name)}_{hashlib.sha256(identity.encode('utf-8', 'surrogatepass')).hexdigest()[:SHORT]}"


# Folders that follow a model.


def cache_folder() -> Path:
    """Measurements of models: $ALIGNMENT_ARTIFACTS_CACHE, else beside the scripts, else in the user's cache."""
    if typed := os.environ.get("ALIGNMENT_ARTIFACTS_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(typed)))
    return HOME / "alignment_artifacts_cache" if IN_CHECKOUT else Path.home() / ".cache" / "alignment_artifacts"


def collection_folder(loaded: LoadedModel, pairs: PromptPairs | None = None, site: str | None = None) -> Path:
    """Where this model's activations go unless told otherwise, and where they are looked for.

    Args:
        pairs: None, or the shipped ones: no name of pairs in the folder's.
        site: "attention" or "residual"; MLP outputs, the default, need no name.
    """
    name = safe_name(loaded.name) + _site_ending(site)
    if pairs is None or (pairs.file and pairs.file.resolve() == PAIRS_JSON.resolve()):
        if name == safe_name(loaded.name) and _is_default(loaded):
            return HOME / COLLECTED_BY_DEFAULT
        return _of_model(COLLECTED, name, loaded.revision, _collected_from)
    name = f"{safe_name(loaded.name)}_{safe_name(pairs.file.stem if pairs.file else pairs.behaviour)}"
    identity, groups = f"{loaded.revision} {pairs_hash(pairs)}", prompt_groups(pairs)

    def owner(folder: Path) -> str | None:
        revision = _collected_from(folder)
        is_ours = revision == loaded.revision and _facts(folder / MANIFEST).get("prompt_groups") in (None, groups)
        return identity if is_ours else revision

    return _of_model(COLLECTED, name + _site_ending(site), identity, owner)


def collection_folders(loaded: LoadedModel, pairs: PromptPairs) -> list[Path]:
    """Those of every kind of site."""
    return [collection_folder(loaded, pairs, site) for site in SITE_KINDS]


def _site_ending(site: str | None) -> str:
    return "" if site in (None, DEFAULT_SITE) else f"_{site}"


def toxicity_folder(loaded: LoadedModel) -> Path:
    """Where this model's results of the toxicity experiment go unless told otherwise."""
    if _is_default(loaded):
        return HOME / TOXICITY
    return _of_model(TOXICITY, loaded.name, loaded.revision, _steered)


def toxicity_results(revision: str | None, model: str | None = None) -> Path | None:
    """The results of the toxicity experiment on these weights, if there are any.

    Args:
        model: its name, which ends with a hash of the chat format where that is not the checkpoint's.
    """
    found = [folder / TOXICITY_RESULTS[0] for folder in sorted(HOME.glob(f"{TOXICITY}*"))]
    return next(
        (
            path
            for path in found
            if path.exists()
            and _steered(path.parent) == revision
            and _chat_in(_facts(path)["experiment"].get("model")) == _chat_in(model)
        ),
        None,
    )


def _chat_in(name: str | None) -> str | None:
    found = re.search(r"\(chat \w+\)$", name or "")
    return found and found[0]


def _is_default(loaded: LoadedModel) -> bool:
    return loaded.folder.resolve() == Path(DEFAULT_MODEL).resolve() and loaded.is_as_published


def _of_model(stem: str, name: str, identity: str, owner: Callable[[Path], str | None]) -> Path:
    plain, hashed = HOME / f"{stem}_{safe_name(name)}", HOME / f"{stem}_{hashed_name(name, identity)}"
    is_reserved = plain.name == COLLECTED_BY_DEFAULT  # a model that is called "output"
    return hashed if is_reserved or owner(plain) not in (None, identity) else plain


def _collected_from(folder: Path) -> str | None:
    """The revision of the model that a collection, or a certificate alone, was made with; None: there is neither."""
    path = next((folder / name for name in (MANIFEST, CERTIFICATE) if (folder / name).exists()), None)
    return _facts(path).get("model_revision") if path else None


def _steered(folder: Path) -> str | None:
    path = next((folder / name for name in TOXICITY_RESULTS if (folder / name).exists()), None)
    experiment = _facts(path).get("experiment") if path else None
    return experiment.get("model_revision") if isinstance(experiment, dict) else None


def _facts(path: Path) -> dict:
    """What a file says about its folder; nothing if it is damaged, which the user of the folder will report."""
    try:
        content = read_json(path, "description")
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


# What was collected.


@dataclass(frozen=True)
class Collected:
    """A folder of activations and its manifest ({} if it has none)."""

    folder: Path
    manifest: dict

    @property
    def when(self) -> tuple[bool, float]:
        """Sort key: finished ones last, and among those the newest."""
        text = self.manifest.get("finished") or self.manifest.get("created", "")
        try:
            time = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
        except (TypeError, ValueError):
            time = 0.0
        return "finished" in self.manifest, time

    def holds(self, site: str | None) -> bool:
        """Does it hold this kind of site? (If its manifest does not say, it may.)"""
        sites = self.manifest.get("sites")
        return site is None or not isinstance(sites, list) or any(kind_of(name) == site for name in sites)

    def describe(self) -> str:
        state = "" if "finished" in self.manifest else ", not finished"
        return f"{displayed(self.folder)} ({self.manifest.get('model', 'model unknown')}{state})"


def collections(pairs: list[Pair]) -> list[Collected]:
    """The collections below HOME that hold activations of these pairs, with the one to analyse at the end."""
    found = []
    wanted = prompt_groups(pairs)
    for folder in sorted(HOME.glob(f"{COLLECTED}_*")):
        manifest = _facts(folder / MANIFEST)
        groups = manifest.get("prompt_groups")
        if isinstance(groups, dict):  # other pairs may have the same names
            is_of_pairs = any(groups.get(group) == texts for group, texts in wanted.items())
        else:
            is_of_pairs = any((folder / group).is_dir() for group in wanted)
        if is_of_pairs:
            found.append(Collected(folder, manifest))
    return sorted(found, key=lambda one: one.when)


def choose_collection(
    pairs: list[Pair],
    typed: str | Path | None,
    model: str | None,
    site: str | None = None,
    adapter: str | None = None,
    chat: Chat = Chat(),
) -> tuple[Path, list[Collected]]:
    """The collection to analyse, and the others there are.

    Args:
        typed: the folder that the user has named; None: the latest collection.
        model: only collections of this model: of these weights where it is on this machine, else of this name on
            Hugging Face; None: of any model.
        site: collections that hold this kind of site come first; None: whatever they hold.
        adapter: only collections made with this LoRA adapter, likewise; None: where a model is named, without any.
        chat: only collections with this around their prompts; the default: likewise.
    Raises:
        UserError: there is none; or the folder that the user has named was made with another adapter.
    """
    found = collections(pairs)
    if typed is not None:
        folder = find(typed)
        one = Collected(folder, _facts(folder / MANIFEST))
        if adapter and not wanted(None, adapter)(one.manifest):
            raise UserError(
                f"{one.describe()} was not made with the adapter {adapter} as it is now; unset ADAPTER, or "
                "ACTIVATIONS_DIR."
            )
        return folder, [one for one in found if one.folder != Path(os.path.abspath(folder))]
    is_wanted = wanted(model, adapter, chat)
    fitting = [one for one in found if is_wanted(one.manifest)]
    if fitting:
        chosen = ([one for one in fitting if one.holds(site)] or fitting)[-1]
        return chosen.folder, [one for one in found if one is not chosen]
    if found:
        raise UserError(
            f"There is no collection of {model or 'a model'}{f' with the adapter {adapter}' if adapter else ''}"
            f"{'' if chat.is_default else ' in this chat format'}; run `bash collect_activations.sh` with these "
            "MODEL_NAME and ADAPTER first (one that has been edited since is another). "
            f"There are: {'; '.join(one.describe() for one in found)}."
        )
    raise UserError(
        f"There is no collection of these pairs in {displayed(HOME / COLLECTED_BY_DEFAULT)} or beside it; run "
        "`bash collect_activations.sh` first."
    )


def wanted(model: str | None, adapter: str | None = None, chat: Chat = Chat()) -> Callable[[dict], bool]:
    """A function of manifests: was it made with what was typed? If only a model was: without an adapter, in the
    checkpoint's own chat format; if nothing was: with any.

    Models and adapters on this machine count by their content: one that is edited is another, one that is renamed is
    not. Those of Hugging Face count by name.
    """
    from gemma_refactored.adapter_files import adapter_hash
    from gemma_refactored.checkpoint_files import local_revision

    def mark(name: str, content: Callable[[Path], str]) -> str:
        path = find_model(name)
        return content(Path(path)) if os.path.exists(path) else path

    of_model, of_adapter = model and mark(model, local_revision), adapter and mark(adapter, adapter_hash)

    def is_wanted(manifest: dict) -> bool:
        facts = manifest.get("adapter")
        added = facts if isinstance(facts, dict) else {}
        base = added.get("base_revision", manifest.get("model_revision"))
        if of_model and of_model not in (base, manifest.get("model_path")):
            return False
        if of_adapter and of_adapter not in (added.get("sha256"), manifest.get("adapter_path")):
            return False
        if of_model and not of_adapter and manifest.get("adapter_path") is not None:
            return False
        said = {name: manifest.get(name) for name in asdict(chat)}
        return said == asdict(chat) or (chat.is_default and not of_model)

    return is_wanted


# Results.


@dataclass(frozen=True)
class Origin:
    """What results belong to; every result file has it as "origin".

    Attributes:
        behaviour, sides: names of the pairs' contrast, see `PromptPairs`.
        site: what was read or edited: a kind of site, or the pattern of another; None: several.
    """

    model: str
    model_revision: str
    pairs_file: str
    pairs_hash: str
    behaviour: str = REFUSAL
    sides: tuple[str, str] = SIDES
    site: str | None = None

    @classmethod
    def of_model(cls, facts: dict, pairs_file: str | Path, pairs: list[Pair], site: str | None = None) -> Origin:
        """Args: facts: of the model, or a manifest."""
        named = PromptPairs.of(pairs)
        digest = pairs_hash(pairs)
        contrast = (named.behaviour, named.sides)
        return cls(facts["model"], facts["model_revision"], Path(pairs_file).name, digest, *contrast, site)

    @classmethod
    def of_collection(
        cls,
        manifest: dict,
        model: str,
        folder: Path,
        pairs_file: str | Path,
        pairs: list[Pair],
        site: str | None = None,
    ) -> Origin:
        """A collection that does not say of which model it is counts as a model of its own.

        Args:
            model: what to call it (`ActivationSet.model`).
        """
        if "model_revision" not in manifest:
            model = f"{folder.resolve().name}, {model}"
        facts = {"model_revision": f"folder {folder.resolve()}", **manifest, "model": model}
        return cls.of_model(facts, pairs_file, pairs, site)

    def record(self) -> dict:
        return {**asdict(self), "sides": list(self.sides)}

    def stamp(self, result: dict) -> dict:
        """A result with what it belongs to and the versions it was made with."""
        return {**result, "versions": library_versions(), "origin": self.record()}


def results_folder(base: str | Path, origin: Origin, site: str | None = None) -> Path:
    """The folder for a model's results on a pairs file, created and marked as theirs if necessary.

    Args:
        site: of measurements, for a folder beside the one of MLP outputs; None: of whatever lies there.
        base: the folder of all results; a relative one is beside the scripts.
    """
    base = HOME / os.path.expanduser(base)
    model = {"model": origin.model, "model_revision": origin.model_revision}
    about = {**origin.record(), "site": None if site == DEFAULT_SITE else site}
    try:
        base.mkdir(parents=True, exist_ok=True)
        with locked(base, wait=True):
            folder = _claim(base, origin.model, model, ("model_revision",))
            return _claim(folder, Path(origin.pairs_file).stem + _site_ending(site), about, ("pairs_hash", "site"))
    except OSError as error:
        raise cannot_write(base, error) from error


def _claim(parent: Path, name: str, about: dict, keys: tuple[str, ...]) -> Path:
    """The folder of that name, if it is free or ours by these keys; else one with a hash behind the name."""
    identity = "".join(about[key] or "" for key in keys)
    for folder in (parent / safe_name(name), parent / hashed_name(name, identity)):
        path = folder / ABOUT
        if path.exists():
            facts = _facts(path)
            if all(facts.get(key) == about[key] for key in keys):
                return folder
        elif not folder.exists() or not any(folder.iterdir()):
            write_json(path, about)
            return folder
    raise UserError(f"{folder} holds something other than results of {about['model']}; move it away.")


def result_files(folder: Path, name: str) -> list[Path]:
    """Results that are not of one site alone (names by a glob): in this folder, and in those that the same model has
    for the same pairs at other sites."""
    about = _facts(folder / ABOUT)
    keys = ("model_revision", "pairs_hash")
    others = [path.parent for path in sorted(folder.resolve().parent.glob(f"*/{ABOUT}")) if about]
    same = [other for other in others if all(_facts(other / ABOUT).get(key) == about.get(key) for key in keys)]
    folders = dict.fromkeys([folder, *(other for other in same if other != folder.resolve())])
    found: dict[str, Path] = {}
    for path in (path for one in folders for path in sorted(one.glob(name))):
        found.setdefault(path.name, path)
    return [found[name] for name in sorted(found, key=lambda name: (len(name), name))]


@contextmanager
def written_together(folder: Path) -> Iterator[Path]:
    """A folder to write files into; they appear in `folder` once all of them are written, or not at all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".writing.", suffix=TEMPORARY, dir=folder))
        try:
            yield scratch
            for file in sorted(path for path in scratch.rglob("*") if path.is_file()):
                target = folder / file.relative_to(scratch)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise cannot_write(folder, error) from error


def folder_to_report(folder: Path) -> Path:
    """A folder of results; or, below a folder that commands were run in, that of the latest analysis.

    Raises:
        UserError: there are no results.
    """
    if is_folder(folder / "data", "folder of results"):
        return folder
    path = folder / ANALYSIS
    if is_file(path, "results file"):
        content = read_json(path, "results file")
        last = content.get("results") if isinstance(content, dict) else None
        if isinstance(last, str) and (folder / last / "data").is_dir():
            return folder / last
        raise UserError(
            f"{path} does not say where its other results are; run `python analyze_collected_activations.py` again."
        )
    dated = [(max(f.stat().st_mtime for f in data.iterdir()), data.parent)
             for data in folder.glob("results/*/*/data") if any(data.iterdir())]  # fmt: skip
    if not dated:
        raise UserError(
            f"There are no results in {folder.resolve()} to report on; run `bash collect_activations.sh` and "
            "`python analyze_collected_activations.py` first."
        )
    return max(dated)[1]
