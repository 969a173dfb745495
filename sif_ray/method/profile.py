"""The two readings of the method: as released (``published``) and repaired (``corrected``, the default)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


class ProfileError(ValueError):
    """A profile that is neither a :class:`Profile` nor the name of one."""


@dataclass(frozen=True)
class Profile:
    """Every switch of the method. There is no other switch for the same thing.

    To try one repair alone: ``dataclasses.replace(PUBLISHED, name="published+margin", expansion="margin")``.
    """

    name: str
    converts_padded_square: bool
    """True: boxes stored in the padded-square frame become image-frame boxes; False: their numbers are read as is."""
    expansion: Literal["remaining_space", "margin"]
    """How far the first reverse expansion moves a side; see :func:`sif_ray.method.expansion.expand`."""
    repeated_frames_kept: bool
    """Whether a frame that equals its neighbour is shown twice."""
    empty_area_allowed: bool
    """Whether ``<area>[]</area>`` is well formed."""
    stray_content_allowed: bool
    """Whether a trace may hold repeated or misplaced tags, words between its tags and twice the same JSON key."""
    unreadable_area_voids_box_reward: bool
    """True: one area that cannot be read makes the box reward 0; False: that area counts as one without boxes."""
    box_bonus_cap: float | None
    """Most the correction bonus of the box reward may add; None = no cap, 0 = no bonus."""
    depth_reward_counts_full_image: bool
    """Whether the depth stated for the whole image earns depth reward."""
    progress_baseline: Literal["augmented", "raw"]
    """What the progress record keeps of a group: the mean of its answer rewards or of its judge scores."""
    gray_depth_is_bright_far: bool
    """Polarity of a grayscale depth image: True = white is far, False = white is near."""


PUBLISHED = Profile(
    name="published",
    converts_padded_square=False,
    expansion="remaining_space",
    repeated_frames_kept=True,
    empty_area_allowed=True,
    stray_content_allowed=True,
    unreadable_area_voids_box_reward=True,
    box_bonus_cap=None,
    depth_reward_counts_full_image=True,
    progress_baseline="augmented",
    gray_depth_is_bright_far=True,
)
"""The released code, defects included."""

CORRECTED = Profile(
    name="corrected",
    converts_padded_square=True,
    expansion="margin",
    repeated_frames_kept=False,
    empty_area_allowed=False,
    stray_content_allowed=False,
    unreadable_area_voids_box_reward=False,
    box_bonus_cap=None,
    depth_reward_counts_full_image=False,
    progress_baseline="raw",
    gray_depth_is_bright_far=False,
)
"""The default. The bonus stays uncapped: any positive bonus lets a bad first look earn more than a good one, so a
study of that effect sets ``box_bonus_cap`` itself."""

_BY_NAME = {profile.name: profile for profile in (PUBLISHED, CORRECTED)}


def resolve(profile: str | Profile) -> Profile:
    """The profile itself, or the one of that name.

    Raises:
        ProfileError: for an unknown name or another type.
    """
    if isinstance(profile, Profile):
        return profile
    if isinstance(profile, str) and profile in _BY_NAME:
        return _BY_NAME[profile]
    raise ProfileError(f"profile is {profile!r}; use one of {', '.join(_BY_NAME)} or a Profile")
