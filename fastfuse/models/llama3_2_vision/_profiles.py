"""Where implementations of the same model differ, as rows of data."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Profile:
    """One implementation's choices. The weights are the same; only `tile_tables` changes the shape of three of them.

    cross_norm_eps: of the two norms in a cross-attention layer. None: the eps of all other norms.
    pad_tokens_to: vision tokens per tile are filled up to a multiple, and padding does not attend to padding.
    states_after_layer: index k of the hidden vision states is the output of layer k, not its input.
    empty_rows: a text token that may see no image passes a cross-attention layer unchanged ("zero"), or attends to all
        image tokens and leaves out the MLP alone ("uniform").
    tile_tables: positions of tiles as one grid, or as a row per aspect ratio.
    """

    name: str
    cross_norm_eps: float | None
    pad_tokens_to: int
    states_after_layer: bool
    empty_rows: Literal["zero", "uniform"]
    tile_tables: Literal["grid", "ratios"]


PROFILES = {
    row.name: row
    for row in (
        Profile("torchtune", 1e-6, 1, False, "zero", "grid"),
        Profile("meta", None, 8, False, "zero", "grid"),
        Profile("transformers", None, 8, True, "uniform", "ratios"),  # transformers >= 5; 4.x took the states before the layer
    )
}


def profile_of(profile: str | Profile) -> Profile:
    """Raises ValueError for a name that is not in PROFILES."""
    if isinstance(profile, Profile):
        return profile
    if profile not in PROFILES:
        raise ValueError(f"profile is {profile!r}, expected one of {list(PROFILES)}")
    return PROFILES[profile]
