"""Categories of warnings, by the names people look for here; they live in fulmen-fabric."""

from fulmen_fabric import (
    LightningDeprecationWarning,
    PossibleUserWarning,
    WarningCache,
    disable_possible_user_warnings,
)

__all__ = ["LightningDeprecationWarning", "PossibleUserWarning", "WarningCache", "disable_possible_user_warnings"]
