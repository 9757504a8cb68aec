"""What a user of these commands can mend."""


class PlanError(ValueError):
    """A plan cannot be made; the message names what is wrong and the remedy."""
