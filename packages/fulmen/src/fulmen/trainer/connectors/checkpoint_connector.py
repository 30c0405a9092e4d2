"""Not here on purpose; importing it says why."""

from fulmen._not_here import no_module

raise no_module(__name__)
