"""The runtime's two errors: a bundle that cannot be used, and a request that cannot be answered."""


class BundleError(Exception):
    """The bundle is missing, incomplete or damaged: what, where, and what to do."""


class RequestError(ValueError):
    """The request is at fault: what was wrong with it."""
