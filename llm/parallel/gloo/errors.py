"""What can go wrong between ranks."""


class CollectiveError(ValueError):
    """Ranks of a group failed to communicate."""


class CollectiveMismatchError(CollectiveError):
    """Ranks of a group called different collectives, or the same one with other sizes."""


class CollectiveTimeoutError(CollectiveError):
    """A rank did not arrive at a collective in time."""


class PeerLostError(CollectiveError):
    """A rank ended while another one waited for it."""
