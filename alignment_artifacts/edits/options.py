"""The settings of an edit: mode, strength, place, and the modes' parameters. Needs no MLX."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Final, Literal

from alignment_artifacts.directions import Site
from alignment_artifacts.formatting import named_layers
from gemma_refactored.settings import Between, Must, Written

EVERYWHERE: Final = "everywhere"
PROMPT_END: Final = "prompt_end"
WHERE = (EVERYWHERE, PROMPT_END)
Mode = Literal["always", "proximity", "adaptive", "sphere", "subspace", "ablate", "cap", "add"]
Scale = Annotated[float, Between(-1000, 1000)]
Quantile = Annotated[float, Between(0, 1)]
MEASURED_AT = ("prompt_end", "generated", "all", "answer", "answer_start")
ELSEWHERE = "elsewhere"  # for a direction from a file: other tokens, or the file does not say which
Positions = Annotated[
    str,
    Must(lambda name: name in (*MEASURED_AT, ELSEWHERE), f"be one of {', '.join(MEASURED_AT)}"),
    Written("|".join(MEASURED_AT)),
]
Where = Literal["everywhere", "prompt_end"]


@dataclass(frozen=True)
class ModeOptions:
    """Parameters that belong to one mode each."""

    proximity_threshold: Annotated[float, Between(-1, 1)] = 0.3
    """proximity: cosine with the direction above which it acts"""
    distance_threshold: Annotated[float, Between(0, 1e6)] = 2.0
    """sphere: distance from the artifact mean, in within-class standard deviations, below which it acts"""
    decay_rate: Annotated[float, Between(0, 1e6)] = 1.0
    """sphere: how fast its push decays with that distance"""
    pca_components: Annotated[int, Between(1, 32)] = 3
    """subspace: number of directions that are removed"""
    cap_quantile: Quantile = 0.9
    """cap: share of natural tokens that lie below its threshold and stay untouched"""


@dataclass(frozen=True)
class Setting:
    """One way to suppress (or, with mode `add`, amplify)."""

    mode: Mode
    """how to suppress; add amplifies"""
    scale: Scale
    """strength; 1 is the mean difference itself, 0 changes nothing"""
    layers: Annotated[tuple[Annotated[int, Between(0)], ...], Written("N,N-N")]
    """blocks to edit, from 0"""
    site: Site = "mlp"
    """what is edited"""
    positions: Positions = "prompt_end"
    """where the direction is measured"""
    options: ModeOptions = ModeOptions()
    where: Where = EVERYWHERE
    """tokens that are edited; prompt_end: the last prompt token only. A direction measured there encodes what the next
    word is going to be; added to every token, it writes that word forever"""
    direction_layer: Annotated[int, Between(0)] | None = None
    """block whose direction is used at all edited blocks; by default each has its own"""
    edit_sinks: bool = False
    """edit the prompt's attention sinks too: tokens whose residual stream is many times as long as that of others"""

    def record(self) -> dict:
        """As JSON keeps it, with a description for display."""
        return {**asdict(self), "layers": list(self.layers), "description": self.describe()}

    @staticmethod
    def from_record(record: dict) -> Setting:
        # Before there was a choice, sinks were edited like all tokens.
        fields = {"edit_sinks": True, **{name: value for name, value in record.items() if name != "description"}}
        return Setting(**{**fields, "layers": tuple(record["layers"]), "options": ModeOptions(**record["options"])})

    def describe(self) -> str:
        where = "" if self.where == EVERYWHERE else " (there only)"
        of_layer = "" if self.direction_layer is None else f" of layer {self.direction_layer}"
        direction = f"direction{of_layer} from {self.positions}"
        where += ", attention sinks too" if self.edit_sinks else ""
        return f"{self.mode} x{self.scale:g}, {self.site}, {named_layers(self.layers)}, {direction}{where}"
