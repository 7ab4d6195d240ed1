"""Mistakes that a user can mend. The command line prints them without a traceback and exits with 2.

Every message names the path (of a key or of a file), the value found and the remedy.
"""


class MegarecurError(Exception):
    """Base of every error that is the user's to mend."""


class ConfigError(MegarecurError):
    """A config, a flag or a combination of them that cannot be run."""


class MeshError(MegarecurError):
    """A world of processes that does not factor into the requested mesh."""


class PlacementError(MegarecurError):
    """Blocks that cannot be placed on the pipeline ranks."""


class CheckpointError(MegarecurError):
    """A checkpoint that is missing, damaged, or of another run."""


class DataError(MegarecurError):
    """A corpus, a shard or a tokenizer that cannot be used."""
